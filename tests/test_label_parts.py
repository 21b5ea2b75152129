"""Several masks per picture: joined by data.label_parts, overlaps counted, doubtful files refused."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from darseg.config.text import load_recipe
from darseg.data.dataset import read_truth
from darseg.errors import DataError, RecipeError
from darseg.init import fit
from darseg.init.propose import propose_recipe
from darseg.run.build import manifest_of
from darseg.run.check import check
from darseg.run.data_digest import digest_samples, written_since
from darseg.run.rounds import train
from wording import refused, says

SIZE = (40, 48)
CAT, DOG = (slice(0, 20), slice(0, 20)), (slice(10, 30), slice(10, 30))
BINARY = {"cat": "{id}_mask_1", "dog": "{id}_mask_2", "other": "ground"}


def draw_mask(path: Path, box: tuple[slice, slice], value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[box] = value
    Image.fromarray(mask).save(path)


def draw_images(root: Path, count: int = 6) -> None:
    (root / "images").mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"images/x{number}.jpg")


def recipe_at(root: Path, parts: object = BINARY, **data: object) -> Path:
    content = {
        "data": {"root": ".", "classes": ["ground", "cat", "dog"], "validation": {"every": 2}},
        "network": {"backbone": "resnet18_half", "head_channels": 16, "weights": "none"},
        "training": {"crop": 33, "batch": 2, "workers": 1},
        "rounds": [{"steps": 1}],
    }
    content["data"] |= {"label_parts": parts, **data}
    (root / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "r.yaml"


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Six pictures, of which four have the masks x_mask_1 (cat) and x_mask_2 (dog, over a quarter of the cat)."""
    draw_images(tmp_path)
    for number in range(4):
        draw_mask(tmp_path / f"labels/x{number}_mask_1.png", CAT)
        draw_mask(tmp_path / f"labels/x{number}_mask_2.png", DOG, value=1)
    return tmp_path


def expected(other: int = 0, *, last: int = 2) -> np.ndarray:
    label = np.full(SIZE, other, np.uint8)
    for box, k in ((CAT, 1), (DOG, 2)) if last == 2 else ((DOG, 2), (CAT, 1)):
        label[box] = k
    return label


def test_masks_that_contradict_those_of_the_same_picture_are_reported(numbered: Path) -> None:
    for number in (3, 4):
        shutil.copy(numbered / "images/x0.jpg", numbered / f"images/x{number}.jpg")
        draw_mask(numbered / f"labels/x{number}_mask_1.png", CAT if number == 3 else DOG)
        draw_mask(numbered / f"labels/x{number}_mask_2.png", DOG)
    (line,) = [text for text in check(recipe_at(numbered)).warnings if "label map(s) contradict" in text]
    says(line, "1 label map(s)", "x4_mask_1.png", "x3_mask_1.png")


@pytest.mark.parametrize("order", [("cat", "dog"), ("dog", "cat")])
def test_the_mask_listed_last_counts_where_masks_overlap(numbered: Path, order: tuple[str, str]) -> None:
    parts = {name: BINARY[name] for name in order} | {"other": "ground"}
    recipe = load_recipe(recipe_at(numbered, parts))
    manifest = manifest_of(recipe)
    assert [len(samples) for samples in manifest.roles().values()] == [2, 2, 2, 0]
    wanted = expected(last=2 if order[1] == "dog" else 1)
    for sample in (*manifest.labeled, *manifest.validation):
        np.testing.assert_array_equal(read_truth(sample), wanted)
    findings = check(recipe)
    assert not findings.faults
    assert findings.pixels["labeled"].tolist() == [2 * int((wanted == k).sum()) for k in range(3)] + [0]
    said = "\n".join(findings.notes)
    says(said, "8 masks", "4 images", "400 pixels of 4 image(s)", str(numbered / "labels"))


def test_pixels_of_no_mask_are_not_labeled_unless_the_recipe_says_more(numbered: Path) -> None:
    recipe = load_recipe(recipe_at(numbered, {k: v for k, v in BINARY.items() if k != "other"}))
    np.testing.assert_array_equal(read_truth(manifest_of(recipe).labeled[0]), expected(255))


def test_a_folder_per_class(tmp_path: Path) -> None:
    """Pictures in subfolders; a picture without a mask of a class does not show it."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        path = tmp_path / f"images/site/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(path)
        draw_mask(tmp_path / f"labels/dog/site/{number}.png", DOG)
        if number % 2:
            draw_mask(tmp_path / f"labels/cat/site/{number}.png", CAT)
    recipe = load_recipe(recipe_at(tmp_path, {"cat": "cat/{id}", "dog": "dog/{id}", "other": "ground"}))
    manifest = manifest_of(recipe)
    without = np.zeros(SIZE, np.uint8)
    without[DOG] = 2
    by_id = {sample.id: read_truth(sample) for sample in (*manifest.labeled, *manifest.validation)}
    for number in range(4):
        np.testing.assert_array_equal(by_id[f"site/{number}"], expected() if number % 2 else without)
    says("\n".join(check(recipe).notes), "2 image(s)")


def test_names_of_label_studio(tmp_path: Path) -> None:
    """Several masks of a class are joined; * stands for numbers that differ."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"images/task-{number}.png")
        start = tmp_path / f"labels/task-{number}-annotation-{number + 7}-by-3-tag"
        draw_mask(Path(f"{start}-cat-0.png"), (slice(0, 10), slice(0, 20)))
        draw_mask(Path(f"{start}-cat-1.png"), (slice(10, 20), slice(0, 20)))
        draw_mask(Path(f"{start}-dog-0.png"), DOG)
    parts = {"cat": "{id}-annotation-*-tag-cat-*", "dog": "{id}-annotation-*-tag-dog-*", "other": "ground"}
    manifest = manifest_of(load_recipe(recipe_at(tmp_path, parts)))
    np.testing.assert_array_equal(read_truth(manifest.labeled[0]), expected())


def test_masks_next_to_their_pictures_are_no_pictures(tmp_path: Path) -> None:
    draw_images(tmp_path, 3)
    draw_mask(tmp_path / "images/x0_cat.png", CAT)
    draw_mask(tmp_path / "images/x1_dog.png", DOG)
    parts = {"cat": "{id}_cat", "dog": "{id}_dog", "other": "ground"}
    manifest = manifest_of(load_recipe(recipe_at(tmp_path, parts, labels="images")))
    assert [sample.id for role in manifest.roles().values() for sample in role] == ["x1", "x2", "x0"]


def test_masks_that_cannot_be_joined_are_faults(numbered: Path) -> None:
    soft = np.zeros(SIZE, np.uint8)
    soft[5:20, 5:20], soft[5, 5:20] = 255, 100
    Image.fromarray(soft).save(numbered / "labels/x0_mask_1.png")
    Image.new("L", (10, 10)).save(numbered / "labels/x1_mask_2.png")
    draw_mask(numbered / "labels/y7_mask_1.png", CAT)
    findings = check(load_recipe(recipe_at(numbered)))
    assert len(findings.faults) == 2
    says(findings.faults[0], "x1_mask_2.png", "10x10", "40x48", "x1_mask_1.png")
    says(findings.faults[1], "x0_mask_1.png", "2 values", "data.label_parts")
    says("\n".join(findings.warnings), "1 label map(s)", "y7_mask_1.png")


def test_a_mask_of_two_classes_and_unknown_classes_are_refused(numbered: Path) -> None:
    recipe = load_recipe(recipe_at(numbered, {"cat": "{id}_mask_*", "dog": "{id}_mask_2"}))
    with refused(DataError, "x0_mask_2.png", "{id}_mask_*", "{id}_mask_2"):
        manifest_of(recipe)
    with refused(RecipeError, "'cow'", "ground, cat, dog"):
        manifest_of(load_recipe(recipe_at(numbered, {"cow": "{id}_mask_1"})))
    with refused(RecipeError, "data.label_parts", "{id}"):
        load_recipe(recipe_at(numbered, {"cat": "mask_1"}))
    with refused(RecipeError, "data.label_values", "data.label_parts"):
        load_recipe(recipe_at(numbered, label_values="one_based"))
    (numbered / "pairs.txt").write_text("images/x0.jpg labels/x0_mask_1.png\n")
    with refused(DataError, "line 1", "labels/x0_mask_1.png", "data.label_parts"):
        manifest_of(load_recipe(recipe_at(numbered, labeled="pairs.txt")))


def test_lists_name_pictures(numbered: Path) -> None:
    (numbered / "mine.txt").write_text("x2\nimages/x3.jpg\n")
    recipe = load_recipe(recipe_at(numbered, labeled="mine.txt", validation=None))
    assert [len(sample.label_files) for sample in manifest_of(recipe).labeled] == [2, 2]


def test_digests_cover_every_mask(numbered: Path) -> None:
    recipe = load_recipe(recipe_at(numbered))
    sample = manifest_of(recipe).labeled[0]
    before = digest_samples([sample])
    assert sample.parts is not None
    assert before != digest_samples([replace(sample, parts=replace(sample.parts, other=255))])
    assert before != digest_samples(
        [replace(sample, parts=replace(sample.parts, files=sample.parts.files[::-1]))]
    )
    second = sample.label_files[1]
    second.write_bytes(second.read_bytes() + b"more")
    assert digest_samples([sample]) != before
    assert second in written_since(manifest_of(recipe), second.stat().st_mtime - 1e-3)


def test_training_says_what_was_joined(numbered: Path) -> None:
    console = Console(file=io.StringIO(), width=500)
    train(recipe_at(numbered), numbered / "run", console=console)
    printed = console.file.getvalue()  # ty: ignore
    assert "400 pixels of 4 image(s)" in printed


PROPOSED = {
    "{id}_mask_1, {id}_mask_2": {"class_1": "{id}_mask_1", "class_2": "{id}_mask_2"},
    "cat/{id}, dog/{id}": {"cat": "cat/{id}", "dog": "dog/{id}"},
    "{id}_cat_mask, {id}_dog_mask": {"cat": "{id}_cat_mask", "dog": "{id}_dog_mask"},
    "{id}-annotation-7-by-3-tag-cat-0, {id}-annotation-7-by-3-tag-dog-0": {
        "cat": "{id}-annotation-*-tag-cat-*",
        "dog": "{id}-annotation-*-tag-dog-*",
    },
}


@pytest.mark.parametrize("names", PROPOSED)
@pytest.mark.parametrize("folder", ["labels", "images"])
def test_init_proposes_clear_patterns(
    names: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)
    if folder == "images" and "/" in names:
        pytest.skip("a folder per class is a folder of its own")
    draw_images(tmp_path / "set")
    for number in range(5):
        for name, box in zip(names.split(", "), (CAT, DOG), strict=True):
            draw_mask(tmp_path / f"set/{folder}/{name.replace('{id}', f'x{number}')}.png", box)
    proposal = propose_recipe(tmp_path / "set", tmp_path / "r.yaml", console=Console(file=io.StringIO()))
    recipe = load_recipe(proposal.recipe)
    assert recipe.data.label_parts == {**PROPOSED[names], "other": "background"}
    manifest = manifest_of(recipe)
    assert [len(samples) for samples in manifest.roles().values()] == [4, 1, 1, 0]
    np.testing.assert_array_equal(read_truth(manifest.labeled[0]), expected())
    assert not check(recipe).faults
    assert any("Pixels of no mask became the class background" in line for line in proposal.warnings)
    assert any("500 pixels of 5 image(s)" in note for note in proposal.notes)


def test_masks_of_which_pictures_have_different_numbers_are_one_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged one is left out with its picture, by lists that name pictures alone."""
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)
    draw_images(tmp_path / "set")
    for number in range(5):
        for mask in range(1, 2 + number):
            draw_mask(tmp_path / f"set/masks/x{number}_mask_{mask}.png", (slice(0, 8 * mask), slice(0, 9)))
    Image.new("L", (7, 7)).save(tmp_path / "set/masks/x3_mask_2.png")
    proposal = propose_recipe(tmp_path / "set", tmp_path / "r.yaml", console=Console(file=io.StringIO()))
    recipe = load_recipe(proposal.recipe)
    assert recipe.data.label_parts == {"object": "{id}_mask_*", "other": "background"}
    assert (tmp_path / "r_lists/labeled.txt").read_text().split() == [
        f"images/x{number}.jpg" for number in (1, 2, 4)
    ]
    says("\n".join(proposal.warnings), "x3_mask_2.png", "7x7")
    findings = check(recipe)
    assert not findings.faults
    assert findings.pixels["labeled"].tolist()[1] == 9 * (16 + 24 + 40)


@pytest.mark.parametrize(
    "names", ["annotator1/{id}, annotator2/{id}", "train/{id}, val/{id}", "{id}_mask, {id}_color"]
)
def test_init_takes_other_files_for_no_masks_of_classes(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)
    draw_images(tmp_path / "set")
    for number in range(5):
        for name in names.split(", "):
            draw_mask(tmp_path / f"set/labels/{name.replace('{id}', f'x{number}')}.png", CAT, value=1)
    propose_recipe(tmp_path / "set", tmp_path / "r.yaml", console=Console(file=io.StringIO()))
    assert load_recipe(tmp_path / "r.yaml").data.label_parts is None
