"""`darseg init` judges a folder by what its files hold, not by the names of its folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from darseg.config.text import load_recipe
from darseg.data.classes import VOC
from darseg.errors import DataError, WeightsError
from darseg.init import fit
from darseg.init.propose import propose_recipe
from darseg.model.network import NetworkSpec
from darseg.model.weights import save_network
from darseg.run.build import classes_of, manifest_of
from darseg.run.check import check
from darseg.run.rounds import train
from draw_layouts import draw_cityscapes, draw_voc, voc_palette
from wording import refused, says

SIZE = (40, 48)
LEAF = [(0, 0, 0), (48, 112, 32), (176, 112, 32)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is timed."""
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)


def photo(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8))


def three_classes(number: int) -> np.ndarray:
    label = np.zeros(SIZE, np.uint8)
    label[8:30, 4 + number : 30 + number] = 1
    label[12:18, 12:20] = 2
    return label


def save(path: Path, label: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette:
        image.putpalette(palette)
    image.save(path)


def own_in_voc(root: Path, palette: list[int] | None, names: str = "") -> None:
    """Six pictures in lists, two more without label, in VOC's folders."""
    for number in range(8):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        photo(number).save(root / f"JPEGImages/plant_{number}.jpg")
        if number < 6:
            save(root / f"SegmentationClass/plant_{number}.png", three_classes(number), palette)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"plant_{number}\n" for number in range(4)))
    (lists / "val.txt").write_text("plant_4\nplant_5\n")
    if names:
        (root / "labelmap.txt").write_text(names)


CVAT_NAMES = "# label:color_rgb:parts:actions\n" + "".join(
    f"{name}:{','.join(map(str, color))}::\n"
    for name, color in zip(("background", "leaf", "mildew"), LEAF, strict=True)
)


@pytest.mark.parametrize(
    ("palette", "names", "classes"),
    [
        pytest.param(
            [part for color in LEAF for part in color],
            CVAT_NAMES,
            ("background", "leaf", "mildew"),
            id="names",
        ),
        pytest.param(
            [part for color in LEAF for part in color], "", ("class_0", "class_1", "class_2"), id="palette"
        ),
        pytest.param(voc_palette(), "", ("class_0", "class_1", "class_2"), id="voc_colors"),
        pytest.param(None, "", ("class_0", "class_1", "class_2"), id="gray"),
    ],
)
def test_own_data_in_the_folders_of_voc(tmp_path: Path, palette, names: str, classes) -> None:
    own_in_voc(tmp_path / "in" / "VOC", palette, names)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert recipe.data.layout == "folders" and classes_of(recipe).names == classes
    findings = check(recipe)
    assert not findings.faults
    assert dict(findings.images) == {"labeled": 4, "unlabeled": 2, "validation": 2, "test": 0}
    says(proposal.notes[0], "voc", "labelmap.txt" if names else "plant_0.jpg")


def test_colors_and_values_decide_even_if_images_are_named_as_in_voc(tmp_path: Path) -> None:
    draw_voc(tmp_path / "voc")
    proposal = propose_recipe(tmp_path / "voc", tmp_path / "r.yaml")
    assert load_recipe(proposal.recipe).data.layout == "voc"
    for path in (tmp_path / "voc" / "SegmentationClass").iterdir():
        values = np.array(Image.open(path))
        save(path, np.where(values == 255, 0, values % 3 + 40).astype(np.uint8))
    proposal = propose_recipe(tmp_path / "voc", tmp_path / "own.yaml")
    assert load_recipe(proposal.recipe).data.layout == "folders"
    says(proposal.notes[0], "40, 41", "2007_000032.png")


def test_own_data_in_the_folders_of_cityscapes(tmp_path: Path) -> None:
    for part, count in {"train": 4, "val": 2}.items():
        for number in range(count):
            image = tmp_path / f"in/leftImg8bit/{part}/site/site_{number:03d}_leftImg8bit.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            photo(number).save(image)
            label = tmp_path / f"in/gtFine/{part}/site/site_{number:03d}_gtFine_labelTrainIds.png"
            save(label, three_classes(number))
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    recipe = load_recipe(proposal.recipe)
    assert classes_of(recipe).names == ("class_0", "class_1", "class_2")
    findings = check(recipe)
    assert not findings.faults and findings.images["labeled"] == 4 and findings.images["validation"] == 2
    says(proposal.notes[0], "cityscapes", "site")


def test_names_outweigh_the_folders_and_file_names_of_cityscapes(tmp_path: Path) -> None:
    """All values are ids of Cityscapes, whose classes would be taken without a word."""
    root = tmp_path / "in"
    for part in ("train", "val"):
        for number in range(4):
            name = f"{part}/aachen/aachen_{number:06d}_000019"
            (root / f"leftImg8bit/{part}/aachen").mkdir(parents=True, exist_ok=True)
            photo(number).save(root / f"leftImg8bit/{name}_leftImg8bit.png")
            save(root / f"gtFine/{name}_gtFine_labelTrainIds.png", three_classes(number))
    (root / "classes.txt").write_text("soil\nleaf\nmildew\n")
    proposal = propose_recipe(root, tmp_path / "r.yaml")
    says(proposal.notes[0], "classes.txt", "soil, leaf, mildew")
    recipe = load_recipe(proposal.recipe)
    assert classes_of(recipe).names == ("soil", "leaf", "mildew") and not check(recipe).faults


def test_values_that_cityscapes_does_not_have_are_own_classes(tmp_path: Path) -> None:
    draw_cityscapes(tmp_path / "in", ids=False, cities=["aachen"], per_city=2, per_val_city=1)
    path = next((tmp_path / "in/gtFine/train/aachen").glob("*0000_000019_gtFine_labelTrainIds.png"))
    label = np.array(Image.open(path))
    label[:9, :9] = 77
    save(path, label)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    assert load_recipe(proposal.recipe).data.layout == "folders"
    says(proposal.notes[0], "77", path.name)


@pytest.mark.parametrize("extra", [False, True])
def test_sets_that_are_labeled_wholly_outside_images(tmp_path: Path, extra: bool) -> None:
    """As Roboflow exports masks: train, valid and test hold pictures, masks and _classes.csv."""
    for part, count in {"train": 5, "valid": 2, "test": 1}.items():
        for number in range(count):
            save(tmp_path / f"in/{part}/IMG_{number}_mask.png", three_classes(number))
            photo(number).save(tmp_path / f"in/{part}/IMG_{number}.jpg")
        names = "Pixel Value, Class\n0, background\n1, crack\n2, rust\n3, spall\n"
        (tmp_path / f"in/{part}/_classes.csv").write_text(names)
    if extra:
        photo(9).save(tmp_path / "in/train/extra.jpg")
    recipe = load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)
    findings = check(recipe)
    assert not findings.faults and findings.images["unlabeled"] == extra
    assert (findings.images["labeled"], findings.images["validation"], findings.images["test"]) == (5, 2, 1)
    assert classes_of(recipe).names == ("background", "crack", "rust", "spall")
    assert any("spall" in warning for warning in findings.warnings)
    overrides = ["rounds=[{steps: 2}]", "threads=1", "training.crop=33"]
    assert train(load_recipe(tmp_path / "r.yaml", overrides), tmp_path / "run")["rounds"]


def test_a_missing_folder_of_images_is_still_refused_if_nothing_else_is_named(tmp_path: Path) -> None:
    save(tmp_path / "in/labels/1.png", three_classes(1))
    (tmp_path / "r.yaml").write_text(
        "data: {root: in, classes: [a, b, c]}\nnetwork: {weights: none}\nrounds: [{steps: 1}]\n"
    )
    with refused(DataError, str(tmp_path / "in/images")):
        manifest_of(load_recipe(tmp_path / "r.yaml"))


def test_all_annotation_files_are_named_in_the_order_of_their_parts(
    call, tmp_path: Path, monkeypatch
) -> None:
    for part in ("test", "train", "valid"):
        (tmp_path / "in" / part).mkdir(parents=True)
        photo(1).save(tmp_path / "in" / part / f"{part}.jpg")
        content = {"images": [], "annotations": [], "categories": []}
        (tmp_path / "in" / part / "_annotations.coco.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    code, _, err = call("init", "in")
    assert code == 2
    commands = [line.strip() for line in err.splitlines() if "darseg rasterize" in line]
    assert commands == [
        f"darseg rasterize in/{part}/_annotations.coco.json in/{part}/labels --background background"
        for part in ("train", "valid", "test")
    ]
    says(err, "3 image(s)", "3 annotation file(s)", "coco")


def test_a_class_without_validation_pixels_is_a_warning(tmp_path: Path) -> None:
    for number in range(6):
        label = three_classes(number)
        if number == 0:  # every fifth: 0 and 5
            label[label == 2] = 1
        photo(number).save(_made(tmp_path / "in/images") / f"{number}.jpg")
        save(tmp_path / f"in/labels/{number}.png", np.where(label == 2, 0, label) if number == 5 else label)
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    warning = next(line for line in proposal.warnings if "validation image" in line and "pixel" in line)
    says(warning, "class_2", "data.validation")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_palette_of_voc_is_that_of_voc_if_most_classes_occur(tmp_path: Path) -> None:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for number in range(3):
        photo(number).save(_made(tmp_path / "in/images") / f"{number}.jpg")
        save(
            tmp_path / f"in/labels/{number}.png",
            ((rows // 8 * 6 + columns // 8) % 21).astype(np.uint8),
            voc_palette(),
        )
    recipe = load_recipe(propose_recipe(tmp_path / "in", tmp_path / "r.yaml").recipe)
    assert classes_of(recipe).names == VOC.names


def test_a_second_label_file_of_an_image_is_not_dropped_in_silence(tmp_path: Path) -> None:
    for number in range(3):
        photo(number).save(_made(tmp_path / "in/images") / f"{number}.jpg")
        for name in ("cat", "dog"):
            save(tmp_path / f"in/masks/{name}/{number}.png", three_classes(number))
    notes = propose_recipe(tmp_path / "in", tmp_path / "r.yaml").notes
    says(
        next(note for note in notes if "left out" in note),
        "3 label file(s)",
        "masks/dog/0.png",
        "masks/cat/0.png",
    )


def test_unread_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line about the whole folder counts those of its folders; other lines about these stay."""
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)
    for folder in ("images", "labels"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    for number in range(4):
        label = np.zeros((40, 48), np.uint8)
        label[5:20, 5:20] = 1
        Image.new("RGB", (48, 40), (90, 20 * number, 0)).save(tmp_path / f"set/images/{number}.png")
        Image.fromarray(label).save(tmp_path / f"set/labels/{number}.png")
    (tmp_path / "set/images/5.heic").write_bytes(b"x")
    Image.new("L", (48, 40)).save(tmp_path / "set/labels/6.jpg")
    proposal = propose_recipe(tmp_path / "set", tmp_path / "r.yaml")
    assert sum(".heic" in line for line in proposal.warnings) == 1
    assert sum(".jpg" in line for line in proposal.warnings) == 1


def test_names_that_are_not_utf_8_or_differ_in_case_are_reported(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "in/images").mkdir(parents=True, exist_ok=True)
        photo(number).save(tmp_path / f"in/images/{number}.png")
        save(tmp_path / f"in/labels/{number}.png", three_classes(number))
    (tmp_path / "in/classes.txt").write_bytes("Grund\nStraße\nstraße\n".encode("cp1252"))
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml")
    says(next(line for line in proposal.warnings if "UTF-8" in line), "classes.txt")
    (tmp_path / "in/classes.txt").write_text("Grund\nStraße\nstraße\n")
    proposal = propose_recipe(tmp_path / "in", tmp_path / "r.yaml", overwrite=True)
    says(next(line for line in proposal.warnings if "letter case" in line), "'Straße' and 'straße'")


def test_a_network_of_other_classes_is_refused_and_one_of_the_same_is_taken_as_it_is(tmp_path: Path) -> None:
    for number in range(5):
        for folder in ("images", "labels"):
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        photo(number).save(tmp_path / f"in/images/{number}.png")
        save(tmp_path / f"in/labels/{number}.png", three_classes(number))
    (tmp_path / "in/classes.txt").write_text("road\ncar\nsky\n")
    spec = NetworkSpec("pspnet", "resnet18_half", 3, output_stride=16, head_channels=8)
    for name, names in {"other": ("grass", "box", "sky"), "same": ("sky", "road", "car")}.items():
        described = replace(spec, class_names=names)
        save_network(described.build(), tmp_path / f"{name}.safetensors", described)
    with refused(WeightsError, "other.safetensors", "grass, box, sky", "road, car, sky"):
        propose_recipe(tmp_path / "in", tmp_path / "r.yaml", weights=tmp_path / "other.safetensors")
    propose_recipe(tmp_path / "in", tmp_path / "r.yaml", weights=tmp_path / "same.safetensors")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.network.backbone == "resnet18_half" and not check(recipe).faults


def test_files_of_names_that_contradict_each_other_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(4):
        (root / "images").mkdir(parents=True, exist_ok=True)
        photo(number).save(root / f"images/{number}.png")
        save(root / f"labels/{number}.png", three_classes(number))
    (root / "classes.txt").write_text("soil\nleaf\nmildew\n")
    (root / "obj.names").write_text("soil\nleaf\nmildew\n")
    assert "differently" not in "\n".join(propose_recipe(root, tmp_path / "a.yaml").warnings)
    (root / "obj.names").write_text("leaf\nmildew\nsoil\n")
    warnings = propose_recipe(root, tmp_path / "b.yaml").warnings
    (line,) = [line for line in warnings if "differently" in line]
    says(line, "obj.names", "classes.txt")


def test_lists_name_label_maps_and_may_repeat_images(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for number in range(4):
        photo(number).save(root / f"images/{number}.png")
        save(root / f"labels/{number}.png", three_classes(number))
    pairs = {0: 1, 1: 0, 2: 2}
    lines = [f"images/{image}.png labels/{label}.png" for image, label in pairs.items()]
    (root / "train.txt").write_text("\n".join([*lines, lines[0], lines[1]]))
    (root / "val.txt").write_text("3\n")
    notes = propose_recipe(root, tmp_path / "r.yaml").notes
    says("\n".join(notes), "2 of 5 lines", "2 image(s)", "0.png")
    samples = manifest_of(load_recipe(tmp_path / "r.yaml")).labeled
    assert {int(s.image.stem): int(s.label.stem) for s in samples if s.label} == pairs


def test_if_no_image_can_be_used_the_cause_is_named(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for number in range(2):
        tifffile.imwrite(root / f"images/{number}.tif", np.ones((*SIZE, 3), np.float32), photometric="rgb")
        save(root / f"labels/{number}.png", three_classes(number))
    with refused(DataError, "0.tif", "data.white"):
        propose_recipe(root, tmp_path / "r.yaml")
