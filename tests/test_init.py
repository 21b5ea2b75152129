"""`darseg init`: usual folders, each with its truth; the proposed recipe reads exactly that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import REPOSITORY
from darseg.config.experiment import load_experiment
from darseg.config.text import flow, load_recipe
from darseg.data.classes import CAMVID, VOC
from darseg.data.labels import read_label
from darseg.errors import DataError, RecipeError
from darseg.init import fit, propose
from darseg.init.draft import Draft
from darseg.init.guess import guess_classes
from darseg.init.names import find_names
from darseg.init.propose import propose_recipe
from darseg.init.survey import Survey
from darseg.model.network import NetworkSpec
from darseg.model.weights import save_network
from darseg.run.build import classes_of, manifest_of
from darseg.run.check import check, plan
from darseg.run.rounds import train
from draw_layouts import draw_cityscapes, draw_voc, voc_palette
from wording import refused, says

SIZE = (40, 56)
PROGRESS = r"[\d.,]+/s, \d+ s left"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is timed, except in the test of the timing."""
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)


def truth_of(number: int, classes: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Blocks of classes, all of them in every map, and a strip without labels."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    label = ((rows // 8 + columns // 8 + number) % classes).astype(np.uint8)
    label[:3] = 255
    return label


def photo(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    generator = np.random.default_rng(number)
    return cv2.resize(
        generator.integers(0, 256, (6, 8, 3), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC
    )


@dataclass
class Drawn:
    """What was drawn, and what the recipe must say.

    Attributes:
        truth: image's path below the folder → classes.
        named: name of each class of the truth.
        void: what 255 of the truth is in files that cannot say 255.
        lists: whether the recipe needs list files.
    """

    truth: dict[str, np.ndarray] = field(default_factory=dict)
    roles: dict[str, int] = field(default_factory=dict)
    named: tuple[str, ...] = ("class_0", "class_1", "class_2")
    void: int = 255
    lists: bool = False


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path)


def roles(labeled: int, unlabeled: int, validation: int, test: int = 0) -> dict[str, int]:
    return {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}


def plain(root: Path) -> Drawn:
    """images/ and labels/ with folders in them, some images without label."""
    drawn = Drawn(roles=roles(4, 4, 2))
    for number in range(10):
        name = f"{'ab'[number % 2]}/{number:02d}"
        save(root / "images" / f"{name}.jpg", photo(number))
        if number < 6:
            drawn.truth[f"images/{name}.jpg"] = truth_of(number)
            save(root / "labels" / f"{name}.png", truth_of(number))
    return drawn


def binary(root: Path) -> Drawn:
    """0/255 masks next to the images, with a suffix; sizes differ; names have blanks and quotes."""
    drawn = Drawn(roles=roles(4, 1, 1), named=("background", "foreground"), lists=True)
    for number in range(6):
        size = (SIZE[0] + 3 * number, SIZE[1] + number)
        name = f'it\'s "no" {number} <b>é</b> _x'
        save(root / f"{name}.jpg", photo(number, size))
        if number < 5:
            truth = truth_of(number, 2, size)
            truth[truth == 255] = 1
            drawn.truth[f"{name}.jpg"] = truth
            save(root / f"{name}_mask.png", truth * 255)
    return drawn


def twins(root: Path) -> Drawn:
    """a.jpg and a.png; values with gaps."""
    drawn = Drawn(roles=roles(4, 2, 1), named=("class_2", "class_7", "class_11"), lists=True)
    values = np.full(256, 255, np.uint8)
    values[:3] = 2, 7, 11
    for number in range(7):
        save(root / "shots" / f"{number}.jpg", photo(number))
        if number < 5:
            drawn.truth[f"shots/{number}.jpg"] = truth_of(number)
            save(root / "shots" / f"{number}.png", values[truth_of(number)])
    return drawn


def colors(root: Path) -> Drawn:
    """RGB masks with a table of names, and a color that has none: not labeled."""
    drawn = Drawn(roles=roles(4, 1, 1), named=("road surface", "sky", "car: parked"))
    table = np.zeros((256, 3), np.uint8)
    table[:3] = (128, 64, 128), (70, 130, 180), (0, 0, 142)
    for number in range(6):
        save(root / "rgb" / f"{number}.png", photo(number))
        if number < 5:
            drawn.truth[f"rgb/{number}.png"] = truth_of(number)
            save(root / "masks" / f"{number}.png", table[truth_of(number)])
    (root / "class_dict.csv").write_text(
        "name,r,g,b\n"
        + "".join(f"{n},{','.join(map(str, c))}\n" for n, c in zip(drawn.named, table, strict=False))
    )
    return drawn


def unnamed_colors(root: Path) -> Drawn:
    """Only RGB masks: black is a class, with a warning."""
    drawn = Drawn(roles=roles(2, 0, 1), named=("background", "class_800000", "class_ffff00"), void=0)
    table = np.zeros((256, 3), np.uint8)
    table[1:3] = (128, 0, 0), (255, 255, 0)
    for number in range(3):
        save(root / "images" / f"{number}.png", photo(number))
        drawn.truth[f"images/{number}.png"] = truth_of(number)
        save(root / "gt_color" / f"{number}.png", table[truth_of(number)])
    return drawn


def split_folders(root: Path) -> Drawn:
    """train/ and val/ with images and masks next to each other; classes start at 1 and are named in a YAML file."""
    drawn = Drawn(roles=roles(3, 2, 2), named=("asphalt", "grass", "yes"))
    for part, numbers in {"train": range(5), "val": range(5, 7)}.items():
        for number in numbers:
            save(root / part / "images" / f"{number}.jpg", photo(number))
            if number not in (3, 4):
                truth = truth_of(number)
                drawn.truth[f"{part}/images/{number}.jpg"] = truth
                save(
                    root / part / "masks" / f"{number}.png",
                    np.where(truth == 255, 0, truth + 1).astype(np.uint8),
                )
    (root / "data.yaml").write_text(yaml.safe_dump({"names": list(drawn.named), "nc": 3}))
    return drawn


def camvid(root: Path) -> Drawn:
    """train.txt, val.txt and test.txt next to images/ and labels/; a palette of a known set."""
    drawn = Drawn(roles=roles(4, 3, 1, 1), named=CAMVID.names)
    palette = [part for color in CAMVID.colors for part in color] + [0] * (768 - 33)
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(9):
        part = ("train",) * 4 + (None,) * 3 + ("val", "test")
        name = f"s/{number:03d}"
        save(root / "images" / f"{name}.png", photo(number))
        if part[number] is not None:
            parts[part[number]].append(name)
            drawn.truth[f"images/{name}.png"] = truth_of(number, 11)
            save(root / "labels" / f"{name}.png", truth_of(number, 11), palette)
    for name, ids in parts.items():
        (root / f"{name}.txt").write_text("".join(f"{id_}\n" for id_ in ids))
    return drawn


def voc_without_lists(root: Path) -> Drawn:
    """JPEGImages, SegmentationClass and SegmentationObject without ImageSets: other data in VOC's format."""
    drawn = Drawn(roles=roles(4, 1, 1), named=VOC.names)
    for number in range(6):
        save(root / "JPEGImages" / f"p_{number}.jpg", photo(number))
        if number < 5:
            drawn.truth[f"JPEGImages/p_{number}.jpg"] = truth_of(number, 21)
            save(root / "SegmentationClass" / f"p_{number}.png", truth_of(number, 21), voc_palette())
            save(root / "SegmentationObject" / f"p_{number}.png", truth_of(number, 5), voc_palette())
    return drawn


def suffixes(root: Path) -> Drawn:
    """images/img_1.png and masks/mask_1.png, in nested folders; three equal channels; ids and names in JSON."""
    drawn = Drawn(roles=roles(4, 1, 1), named=("wall", "floor", "door"), lists=True)
    values = np.full(256, 0, np.uint8)
    values[:3] = 10, 20, 30
    for number in range(6):
        save(root / "data" / "images" / "x" / f"img_{number}.png", photo(number))
        if number < 5:
            drawn.truth[f"data/images/x/img_{number}.png"] = truth_of(number)
            gray = values[truth_of(number)]
            save(root / "data" / "masks" / "x" / f"mask_{number}.png", np.dstack([gray] * 3))
    (root / "data" / "id2label.json").write_text(json.dumps({"10": "wall", "20": "floor", "30": "door"}))
    return drawn


def segnet(root: Path) -> Drawn:
    """train, trainannot, val, valannot, as for SegNet."""
    drawn = Drawn(roles=roles(3, 0, 2))
    for part, numbers in {"train": range(3), "val": range(3, 5)}.items():
        for number in numbers:
            save(root / part / f"{number}.png", photo(number))
            drawn.truth[f"{part}/{number}.png"] = truth_of(number)
            save(root / f"{part}annot" / f"{number}.png", truth_of(number))
    return drawn


def corrupt(root: Path) -> Drawn:
    """A truncated image, a damaged label, one of another size, and a JPEG as label."""
    drawn = plain(root)
    bad = root / "images" / "b" / "09.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    label = root / "labels" / "a" / "00.png"
    label.write_bytes(label.read_bytes()[:-20])
    save(root / "labels" / "b" / "01.png", np.zeros((5, 5), np.uint8))
    save(root / "labels" / "a" / "06.jpg", photo(1))
    for name in ("a/00", "b/01"):
        del drawn.truth[f"images/{name}.jpg"]
    drawn.roles, drawn.lists = roles(3, 3, 1), True
    return drawn


FOLDERS: list[Callable[[Path], Drawn]] = [
    *(
        plain,
        binary,
        twins,
        colors,
        unnamed_colors,
        split_folders,
        camvid,
        voc_without_lists,
        suffixes,
        segnet,
        corrupt,
    )
]


@pytest.mark.parametrize("draw", FOLDERS, ids=lambda draw: draw.__name__)
def test_the_recipe_reads_exactly_what_was_drawn(
    draw: Callable[[Path], Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "my photos"
    drawn = draw(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    proposal = propose_recipe(root)
    assert proposal.recipe == Path("my photos.yaml")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert bool(proposal.lists) == drawn.lists
    recipe = load_recipe(proposal.recipe)
    findings = check(recipe)
    assert not findings.faults
    assert findings.images == drawn.roles
    manifest = manifest_of(recipe)
    names = classes_of(recipe).names
    labels = {}
    for role, samples in manifest.roles().items():
        for sample in samples:
            if role != "unlabeled":
                labels[sample.image.relative_to(root.resolve()).as_posix()] = read_label(
                    sample.label, sample.encoding
                )
    assert set(labels) == set(drawn.truth)
    for name, label in labels.items():
        truth = np.where(drawn.truth[name] == 255, drawn.void, drawn.truth[name])
        assert ((label == 255) == (truth == 255)).all(), name
        label_names = np.array([*names, *[""] * (256 - len(names))])[label]
        assert (label_names == np.array([*drawn.named, *[""] * (256 - len(drawn.named))])[truth]).all(), name
    check_every_proposal(recipe, manifest, proposal.recipe.read_text())


def check_every_proposal(recipe, manifest, text: str) -> None:
    """Sizes are legal and within the images, unlabeled images decide the rounds, every value has a reason."""
    sizes = [cv2.imread(str(s.image)).shape[:2] for some in manifest.roles().values() for s in some]
    for side, crop in enumerate(recipe.training.crop):
        assert (
            crop <= max(17, min(size[side] for size in sizes))
            and (crop - 1) % recipe.network.output_stride == 0
        )
    assert recipe.training.batch >= 4 and recipe.training.precision in ("fp32", "bf16")
    assert [round_.labeling_ratio for round_ in recipe.rounds] == (
        [None, 0.8] if manifest.unlabeled else [None]
    )
    assert recipe.labeling.align == ("decisions" if manifest.unlabeled else "none")
    if manifest.unlabeled:
        first, second = (planned.steps for planned in recipe.rounds)
        assert abs(second - 2 * first) <= 10 or first == 100  # the fewest
        assert recipe.rounds[1].span == (0, 1)
    lines = text.splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\s+(- )?\w+: .", line) and "#" not in before + line
    ]
    assert not bare


@pytest.mark.parametrize("draw", [binary, split_folders], ids=lambda draw: draw.__name__)
def test_a_proposal_trains(draw: Callable[[Path], Drawn], tmp_path: Path) -> None:
    draw(tmp_path / "in")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    rounds = "rounds=[{steps: 1}, {steps: 1, labeling_ratio: 0.4}]"
    summary = train(load_recipe(proposal.recipe, [rounds, "threads=1"]), tmp_path / "run")
    assert len(summary["rounds"]) == 2 and summary["rounds"][1]["mean_iou"] is not None


def test_cityscapes_as_downloaded(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path / "in" / "city", train_ids=False, cities=["aachen"], per_city=2, per_val_city=1)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert recipe.data.layout == "cityscapes" and recipe.data.classes == "cityscapes"
    assert recipe.data.root == str((tmp_path / "in" / "city").resolve())
    assert check(recipe).images == roles(2, 0, 1) and len(recipe.rounds) == 1
    assert recipe.training.one_pass is None  # it would have no effect
    says(proposal.notes[0], str(tmp_path / "in" / "city"), "cityscapes")
    says(proposal.notes[1], "2 labeled", "0 unlabeled", "1 for validation")


def test_voc_as_downloaded(tmp_path: Path) -> None:
    draw_voc(tmp_path / "VOCdevkit" / "VOC2012", augmented=True)
    recipe = load_recipe(propose_recipe(tmp_path / "VOCdevkit", tmp_path / "r.yaml").recipe)
    assert recipe.data.layout == "voc" and check(recipe).images == roles(4, 6, 3)
    assert len(recipe.rounds) == 2


def test_images_without_labels_ask_for_labels(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        save(tmp_path / "in" / f"{number:02d}.jpg", photo(number))
    monkeypatch.chdir(tmp_path)
    code, _, err = call("init", "in")
    assert code == 2
    says(err, "30 image", "about 10", "255", "darseg rasterize", "docs/init.md")
    assert [line.strip(" -") for line in err.splitlines() if line.startswith("  - ")] == [
        f"{number:02d}.jpg" for number in range(0, 30, 3)
    ]
    assert not (tmp_path / "in.yaml").exists()


def test_labels_with_unknown_names_are_taken_for_images(call, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "in" / "eins" / f"{number}.jpg", photo(number))
        save(tmp_path / "in" / "zwei" / f"{number}.png", np.zeros((20, 30), np.uint8))
    code, _, err = call("init", tmp_path / "in")
    assert code == 2
    says(err, "8 image", "labels or masks")


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        pytest.param("ann/1.json", {"shapes": [], "imagePath": "1.jpg"}, "in/ann", id="labelme"),
        pytest.param(
            "coco.json", {"images": [], "annotations": [], "categories": []}, "in/coco.json", id="coco"
        ),
    ],
)
def test_annotation_files_must_become_label_maps_first(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: dict, source: str
) -> None:
    save(tmp_path / "in" / "1.jpg", photo(1))
    (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    code, _, err = call("init", "in")
    assert code == 2
    says(err, "1 image", name, f"darseg rasterize {source} in/labels")


def no_images(root: Path) -> None:
    root.mkdir()


def no_folder(root: Path) -> None:
    pass


def labels_alone(root: Path) -> None:
    save(root / "labels" / "1.png", truth_of(1))


def photos_as_labels(root: Path) -> None:
    save(root / "images" / "1.png", photo(1))
    save(root / "labels" / "1.png", photo(2))


def one_value(root: Path) -> None:
    save(root / "images" / "1.png", photo(1))
    save(root / "labels" / "1.png", np.full(SIZE, 3, np.uint8))


def one_color(root: Path) -> None:
    save(root / "images" / "1.png", photo(1))
    save(root / "labels" / "1.png", np.full((*SIZE, 3), (1, 2, 3), np.uint8))


def labels_of_validation_alone(root: Path) -> None:
    save(root / "val" / "images" / "1.png", photo(1))
    save(root / "val" / "labels" / "1.png", truth_of(1))
    save(root / "train" / "images" / "2.png", photo(2))


@pytest.mark.parametrize(
    ("draw", "facts"),
    [
        pytest.param(draw, facts, id=draw.__name__)
        for draw, facts in [
            (no_images, ["in", "JPEG"]),
            (no_folder, ["in"]),
            (labels_alone, ["in", "1 file", "labels/1.png"]),
            (photos_as_labels, ["labels/1.png", "colors"]),
            (one_value, ["3", "255"]),
            (one_color, ["[1, 2, 3]"]),
            (labels_of_validation_alone, ["1", "validation", "training"]),
        ]
    ],
)
def test_folders_with_nothing_to_learn_from_are_refused(tmp_path: Path, draw, facts: list[str]) -> None:
    draw(tmp_path / "in")
    with refused(DataError, *facts, vary=[r"\d+ different"]):
        propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists() and not (tmp_path / "r_lists").exists()


def test_damaged_files_are_reported_and_left_out(call, tmp_path: Path) -> None:
    corrupt(tmp_path / "in")
    code, out, err = call("init", tmp_path / "in", "--out", tmp_path / "r.yaml")
    assert code == 0, err
    facts = ["3 file", "images/b/09.jpg", "labels/a/00.png", "labels/b/01.png", "5x5", "40x56", "a/06.jpg"]
    says(out, *facts, vary=[PROGRESS, r"\d+ bytes"])
    text = (tmp_path / "r.yaml").read_text()
    assert "# LOOK AT THIS: 3 file" in text and "sequences" not in text
    assert "a/06.jpg" in (tmp_path / "r_lists" / "unlabeled.txt").read_text()


def test_german_folder_names_and_a_run_of_one_round(call, tmp_path: Path, monkeypatch) -> None:
    plain(tmp_path / "in")
    (tmp_path / "in" / "images").rename(tmp_path / "in" / "Fotos")
    (tmp_path / "in" / "labels").rename(tmp_path / "in" / "Masken")
    for name in ("a/06", "b/07", "a/08", "b/09"):  # all others have labels
        (tmp_path / "in" / "Fotos" / f"{name}.jpg").unlink()
    monkeypatch.chdir(tmp_path)
    code, out, err = call("init", "in")
    assert code == 0 and "6 images, 6 of them with labels" in out, out + err
    assert "darseg report" in out and "darseg view" not in out


def test_the_next_commands_are_printed_and_an_earlier_recipe_is_kept(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "in here")
    monkeypatch.chdir(tmp_path)
    code, out, err = call("init", "in here")
    assert code == 0, err
    assert out.splitlines()[-5:] == [
        "  darseg check 'in here.yaml'",
        "  darseg plan 'in here.yaml'",
        "  darseg train 'in here.yaml'",
        "  darseg report 'runs/in here'",
        "  darseg view 'runs/in here'",
    ]
    changed = Path("in here.yaml").read_text() + "# changed\n"
    Path("in here.yaml").write_text(changed)
    code, _, err = call("init", "in here")
    assert code == 2 and Path("in here.yaml").read_text() == changed
    says(err, "in here.yaml", "--out", "--force")
    assert call("init", "in here", "--force")[0] == 0
    assert "# changed" not in Path("in here.yaml").read_text()


def test_a_replacement_that_fails_leaves_recipe_and_lists_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins(tmp_path / "in")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    assert proposal.lists
    proposal.lists[0].write_text(proposal.lists[0].read_text() + "\n")  # a change by the user
    before = {path: path.read_bytes() for path in (proposal.recipe, *proposal.lists)}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(propose, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        propose_recipe(tmp_path / "in", tmp_path / "r.yaml", overwrite=True)
    assert {path: path.read_bytes() for path in before} == before


def test_hostile_class_names_stay_text(tmp_path: Path) -> None:
    hostile = ["<script>alert(1)</script>", "a: b # c", "'\"", "🛣️ road", "null", "- x", "x" * 200]
    for number in range(5):
        save(tmp_path / "in" / "images" / f"{number}.png", photo(number))
        save(tmp_path / "in" / "labels" / f"{number}.png", truth_of(number, len(hostile)))
    (tmp_path / "in" / "classes.txt").write_text("\n".join(hostile))
    recipe = load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)
    assert list(classes_of(recipe).names) == hostile


@pytest.mark.parametrize("value", ["1", "yes", "a: b", "x\u2028y", "1e5", {"a # b": [1, 2]}, [1.5, None], ""])
def test_flow_is_read_back(value) -> None:
    assert yaml.safe_load(f"key: {flow(value)}  # comment") == {"key": value}
    assert "\n" not in flow(value)


@pytest.mark.parametrize(
    ("name", "text", "names", "values", "colors"),
    [
        ("classes.txt", "road\nsky\n", ("road", "sky"), None, None),
        ("classes.txt", "0 road\n7: traffic sign\n", ("road", "traffic sign"), (0, 7), None),
        ("label_colors.txt", "64 128 64\tAnimal\n192 0 128 Arch way\n", ("Animal", "Arch way"), None, True),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:1,2,3::\nsky:4,5,6::\n", ("road", "sky"), None, True),
        ("classes.csv", "name,r,g,b\nroad,1,2,3\nsky,4,5,6\n", ("road", "sky"), None, True),
        ("classes.json", '{"road": 3, "sky": 5}', ("road", "sky"), (3, 5), None),
        ("labels.json", '[{"id": 1, "name": "road", "color": [1, 2, 3]}, {"id": 2, "name": "sky", "color": [0, 0, 0]}]',
         ("road", "sky"), (1, 2), True),
        ("classes.yaml", "classes: [road, sky]\nimages: 3\n", ("road", "sky"), None, None),
        ("data.yaml", "names: {0: road, 1: sky}\n", ("road", "sky"), (0, 1), None),
    ],
)  # fmt: skip
def test_class_names_in_files(tmp_path: Path, name: str, text: str, names, values, colors) -> None:
    (tmp_path / name).write_text(text)
    (name_list,) = find_names([tmp_path])
    assert (name_list.names, name_list.values, name_list.colors is not None or None) == (
        names,
        values,
        colors,
    )


@pytest.mark.parametrize(
    "text",
    [
        *("images/a.jpg\nimages/b.jpg\n", "road\n", "road\nroad\n", "", "{broken"),
        *(f"a{' ' * 500_000}b\nsky\n", f"a{' ' * 900}1\n" * 500 + "sky sky\nsky sky\n"),
    ],
    ids=range(7),
)
def test_files_that_name_no_classes_are_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    (tmp_path / "classes.json").write_text(text)
    assert not find_names([tmp_path])


def test_names_with_one_value_more_are_taken_to_start_at_1(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    (tmp_path / "in" / "classes.txt").write_text("road\nsky\n")  # the values are 0, 1 and 2
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    assert load_recipe(proposal.recipe).data.label_values == "one_based"
    says(proposal.warnings[0], "classes.txt", "2 names", "0 to 2", "data.ignore: 2", "data.label_values")


def test_names_that_do_not_fit_are_reported(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    (tmp_path / "in" / "classes.txt").write_text("a\nroad\nsky\n")
    save(tmp_path / "in" / "labels" / "a" / "00.png", np.where(truth_of(0) == 2, 9, truth_of(0)))
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    says(proposal.warnings[0], str(tmp_path / "in" / "classes.txt"), "3")
    assert list(classes_of(load_recipe(proposal.recipe)).names) == [
        "class_0",
        "class_1",
        "class_2",
        "class_9",
    ]


@pytest.mark.parametrize(
    ("values", "classes", "keys", "warned"),
    [
        ({0, 255}, ["background", "foreground"], "binary", False),
        ({0, 1, 255}, ["class_0", "class_1"], None, False),
        ({1, 2, 3}, ["class_1", "class_2", "class_3"], "one_based", False),
        ({0, 3, 255}, ["class_0", "class_3"], {0: "class_0", 3: "class_3", 255: "ignore"}, False),
        ({0, 127, 255}, ["class_0", "class_127", "class_255"], {0: "class_0", 127: "class_127", 255: "class_255"}, True),
        ({0, 300}, ["class_0", "class_300"], {0: "class_0", 300: "class_300"}, False),
    ],
)  # fmt: skip
def test_values_are_understood(values, classes, keys, warned: bool) -> None:
    survey = Survey(sizes={}, faults={}, colors=False, pixels=dict.fromkeys(values, 10), palette=())
    guess = guess_classes(survey, [], [])
    assert (guess.classes, guess.keys.get("label_values"), bool(guess.warnings)) == (classes, keys, warned)


def test_sequences_are_reported(tmp_path: Path) -> None:
    for number in range(12):
        name = f"drive{number // 4}_{number:04d}"
        save(tmp_path / "in" / "images" / f"{name}.png", photo(number))
        save(tmp_path / "in" / "labels" / f"{name}.png", truth_of(number))
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    says(proposal.warnings[0], "3 sequences", "'images/drive0'", "data.validation")


def test_weights_in_the_folder_are_used(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    backbone = NetworkSpec(backbone="resnet34", classes=2, output_stride=16).build().backbone
    torch.save(backbone.state_dict(), tmp_path / "in" / "resnet34-b627a593.pth")
    (tmp_path / "resnet18-broken.pth").write_bytes(b"nothing")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert recipe.network.weights == str((tmp_path / "in" / "resnet34-b627a593.pth").resolve())
    assert recipe.network.backbone == "resnet34"
    assert any(str(tmp_path / "resnet18-broken.pth") in note for note in proposal.notes)


def test_the_network_of_a_given_file_is_taken_over(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    plain(tmp_path / "in")
    names = classes_of(load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)).names
    for architecture, backbone, rates in (
        ("dpt", "timm/test_vit", (None, None)),  # those published for transformers
        ("deeplabv3plus", "resnet18_half", (0.0003, 10)),
    ):
        spec = NetworkSpec(architecture, backbone, len(names), class_names=names)  # ty: ignore
        file, out = tmp_path / f"{architecture}.safetensors", tmp_path / f"{architecture}.yaml"
        save_network(spec.build(), file, spec)
        recipe = load_recipe(propose_recipe(tmp_path / "in", out, weights=file).recipe)
        network = recipe.network
        assert (network.architecture, network.backbone, network.weights) == (
            architecture,
            backbone,
            str(file),
        )
        training = recipe.training
        assert (training.optimizer, training.learning_rate, training.head_factor) == ("adamw", *rates)
        assert len(recipe.rounds) == 2
        few_steps = (None, 1) if architecture == "dpt" else (True, 0.4)
        assert (training.one_pass, training.pseudo_weight) == few_steps
        control = load_recipe(out, ["rounds=[{steps: 3}]"])  # as the docs say how to train one
        assert not control.pseudo_rounds and control.training == training
        assert plan(recipe).parameters == sum(value.numel() for value in spec.build().parameters())


GPU = fit.Machine("cuda", "a GPU (drawn)", budget=8 << 30, bf16=True)


def test_a_gpu_gets_dinov2_and_the_file_to_get_is_named(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    plain(tmp_path / "in")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml", machine=GPU)
    recipe, file = load_recipe(proposal.recipe), tmp_path / "dinov2_vits14_pretrain.pth"
    assert (recipe.network.architecture, recipe.network.backbone, recipe.network.weights) == (
        "dpt",
        "timm/vit_small_patch14_dinov2",
        str(file.resolve()),
    )
    assert (recipe.training.optimizer, recipe.training.precision) == ("adamw", "bf16")
    address = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
    (warning,) = [line for line in proposal.warnings if file.name in line]
    says(warning, address, "88 MB", str(file))
    docs = (REPOSITORY / "docs" / "networks.md").read_text()
    assert "`https://dl.fbaipublicfiles.com/dinov2/`" in docs and f"`dinov2_vits14/{file.name}`" in docs
    assert [str(file) in fault for fault in check(recipe).faults] == [True]  # and nothing else is wrong
    # With the file everything works, and nothing is left to get. DINOv2-S goes before other files.
    backbone = NetworkSpec("dpt", recipe.network.backbone, 2).build().backbone.body
    torch.save(backbone.state_dict(), file)
    torch.save(
        NetworkSpec(backbone="resnet50", classes=2).build().backbone.state_dict(), tmp_path / "resnet50.pth"
    )
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml", machine=GPU, overwrite=True)
    assert not any(file.name in line for line in proposal.warnings)
    assert load_recipe(proposal.recipe) == recipe and not check(recipe).faults


def test_a_gpu_with_a_resnet_at_hand(tmp_path: Path) -> None:
    """The file at hand is taken, and a note names DINOv2's."""
    pytest.importorskip("timm")
    plain(tmp_path / "in")
    backbone = NetworkSpec(backbone="resnet34", classes=2).build().backbone
    torch.save(backbone.state_dict(), tmp_path / "resnet34.pth")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml", machine=GPU)
    network = load_recipe(proposal.recipe).network
    assert (network.architecture, network.backbone, network.output_stride) == ("pspnet", "resnet34", 8)
    assert any("dinov2_vits14_pretrain.pth" in note for note in proposal.notes)


def test_a_gpu_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise RecipeError("no timm")

    monkeypatch.setattr(fit, "import_timm", absent)
    plain(tmp_path / "in")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml", machine=GPU)
    network = load_recipe(proposal.recipe).network
    assert (network.architecture, network.backbone, network.weights) == ("pspnet", "resnet50", "none")
    assert any("darseg[timm]" in note for note in proposal.notes)


def test_a_machine_that_is_not_possible() -> None:
    with refused(DataError, "'tpu'", "cuda"):
        fit.Machine("tpu", "", budget=1, bf16=False)


def test_given_weights_must_fit(call, tmp_path: Path) -> None:
    plain(tmp_path / "in")
    (tmp_path / "resnet18.pth").write_bytes(b"nothing")
    for name in ("resnet18.pth", "absent.pth"):
        code, _, err = call(
            "init", tmp_path / "in", "--out", tmp_path / "r.yaml", "--weights", tmp_path / name
        )
        assert code == 2 and name in err and not (tmp_path / "r.yaml").exists()


def test_crop_and_batch_fit_the_memory() -> None:
    spec = NetworkSpec(backbone="resnet18", classes=5, output_stride=16, head_channels=128)

    def choose(budget: int) -> tuple[tuple[int, int], int, int]:
        return fit.crop_and_batch(
            spec, smallest=(1000, 2000), target=257, labeled=100, budget=budget, kind="cpu"
        )

    crop, batch, whole = choose(1 << 40)
    assert crop == (257, 257) and batch == 8
    for budget in (whole - 1, whole // 2):
        crop, batch, memory = choose(budget)
        assert memory <= budget and (crop, batch) < ((257, 257), 8)
    assert choose(1)[1] == 4  # nothing fits: the smallest
    tiny = fit.crop_and_batch(spec, smallest=(5, 9), target=257, labeled=1, budget=1 << 40, kind="cpu")
    assert tiny[:2] == ((17, 17), 4)


@pytest.mark.parametrize(
    ("kind", "seconds", "unlabeled", "steps"),
    [
        ("cpu", 0.001, 4000, (16_670, 20_000)),
        ("cpu", 1.0, 4000, (1200, 2400)),
        ("cpu", 1000.0, 4000, (100, 100)),
        ("cpu", 1.0, 0, (3600,)),
        ("cuda", 1.0, 4000, (1200, 1200, 1200)),
        ("cuda", 0.001, 400, (4670, 4670, 4670)),
        ("cuda", 1000.0, 4000, (100, 100, 100)),
    ],
)
def test_steps_fit_the_time(kind: str, seconds: float, unlabeled: int, steps: tuple[int, ...]) -> None:
    draft = Draft(Path(), [], "", labeled=800, unlabeled=unlabeled)
    assert fit.steps_of_rounds(draft, kind, batch=8, seconds=seconds, limit=3600) == steps


def test_few_labels_get_what_won_on_neu_seg(tmp_path: Path) -> None:
    """docs/results.md: one long round from the full rate on, aligned labels, one pass, after a third of the steps."""
    plain(tmp_path / "in")
    recipe = load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)
    assert not recipe.labeling.predict_twice
    won = load_experiment(REPOSITORY / "experiments" / "neu_seg.yaml").recipes["one_round"]
    for section, keys in {
        "training": ("optimizer", "learning_rate", "head_factor", "one_pass", "pseudo_weight"),
        "labeling": ("align", "method", "strength", "bound"),
    }.items():
        for key in keys:
            assert getattr(getattr(recipe, section), key) == getattr(getattr(won, section), key), key
    (first, second), (_, longer) = won.rounds, recipe.rounds
    assert (second.labeling_ratio, second.span) == (longer.labeling_ratio, longer.span)
    assert fit.PARTS["cpu"] == (
        first.steps / (first.steps + second.steps),
        second.steps / (first.steps + second.steps),
    )


def test_many_large_unlabeled_images_are_predicted_twice() -> None:
    draft = Draft(Path(), [], "", sizes=[(1000, 2000)] * 3, labeled=10, unlabeled=250)
    spec = NetworkSpec(backbone="resnet18", classes=20, output_stride=16, head_channels=128)
    few = replace(draft, unlabeled=100)
    wanted = SimpleNamespace(spec=spec)
    assert fit.predicts_twice(draft, wanted) and not fit.predicts_twice(few, wanted)  # ty: ignore


def test_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    spec = NetworkSpec(backbone="resnet18_half", classes=3, output_stride=16, head_channels=8)
    small, large = fit.step_seconds(spec, 2, (33, 33)), fit.step_seconds(spec, 8, (161, 161))
    assert 0 < small < large
