"""Cityscapes, VOC 2012 and SBD as they unpack: images are found, paired and mapped; incomplete downloads are reported."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import draw_layouts
from conftest import recipe_dict
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.classes import CITYSCAPES, VOC
from darseg.data.dataset import load_example
from darseg.data.encoding import CITY_IDS, CITYSCAPES_IDS, PLAIN, label_encoding
from darseg.data.examine import examine
from darseg.data.labels import read_label
from darseg.data.layouts import (
    CITIES,
    CITYSCAPES_COUNTS,
    VALIDATION_CITIES,
    VOC_COUNTS,
    VOC_UNLABELED,
    Layout,
)
from darseg.data.manifest import Manifest, Sample
from darseg.errors import DataError, RecipeError
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.pseudo.thresholds import Thresholds
from darseg.run.build import layout_of, manifest_of
from darseg.run.check import check
from darseg.run.data_digest import digest_manifest, digest_samples
from draw_layouts import (
    TRAIN_CITIES,
    VOC_BARE,
    VOC_FURTHER,
    VOC_TRAIN,
    VOC_VAL,
    draw_all,
    draw_cityscapes,
    draw_voc,
    save,
)
from wording import refused, says


def recipe_of(folder: Path, layout: str, root: Path, **data: object) -> Recipe:
    recipe = recipe_dict(root)
    recipe["data"] = {"root": str(root), "layout": layout, "classes": layout, **data}
    folder.mkdir(exist_ok=True)
    path = folder / f"{layout}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_recipe(path)


def stem(sample: Sample) -> str:
    return sample.image.stem.removesuffix("_leftImg8bit")


def stems(samples) -> list[str]:
    return [stem(sample) for sample in samples]


def assert_true(manifest: Manifest, truth: dict[str, np.ndarray]) -> None:
    """Every label is read as it was drawn, by all readers of labels."""
    for samples in manifest.roles().values():
        for sample in samples:
            assert sample.label is not None
            assert np.array_equal(read_label(sample.label, sample.encoding), truth[stem(sample)]), sample.id
            assert np.array_equal(load_example(sample, manifest.classes).label, truth[stem(sample)])
    findings = examine(manifest)
    assert findings.faults == ()
    for role, samples in manifest.roles().items():
        everything = np.concatenate(
            [truth[name].reshape(-1) for name in stems(samples)] or [np.zeros(0, np.uint8)]
        )
        expected = np.bincount(everything, minlength=256)
        assert findings.pixels[role].tolist() == [*expected[: len(manifest.classes)], expected[255]]


# Cityscapes


def test_the_table_of_ids_is_the_published_one():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    evaluated = {label.trainId: label for label in labels if 0 <= label.trainId < 255}
    assert sorted(evaluated) == list(range(19))
    assert tuple(evaluated[k].id for k in range(19)) == CITYSCAPES_IDS == draw_layouts.IDS
    assert tuple(evaluated[k].name for k in range(19)) == CITYSCAPES.names
    assert tuple(evaluated[k].color for k in range(19)) == CITYSCAPES.colors
    table = {label.id: label.trainId if label.trainId != -1 else 255 for label in labels if label.id >= 0}
    assert len(table) == 34  # and license plate, -1, which is not drawn
    mapping = dict(CITY_IDS.values or ())
    assert CITY_IDS.other == 255
    assert {value: mapping.get(value, 255) for value in table} == table


@pytest.mark.parametrize(("train_ids", "ids"), [(True, True), (True, False), (False, True)])
def test_images_and_labels_of_cityscapes_are_found(tmp_path: Path, train_ids: bool, ids: bool):
    truth = draw_cityscapes(tmp_path / "city", train_ids=train_ids, ids=ids)
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path / "city")
    manifest = manifest_of(recipe)
    expected = [f"{city}_{number:06d}_000019" for city in TRAIN_CITIES for number in range(4)]
    assert stems(manifest.labeled) == expected and manifest.unlabeled == () == manifest.test
    assert stems(manifest.validation) == ["frankfurt_000000_000019", "frankfurt_000001_000019"]
    kind = "_labelTrainIds.png" if train_ids else "_labelIds.png"
    assert all(sample.label and sample.label.name.endswith(kind) for sample in manifest.labeled)
    assert_true(manifest, truth)
    notes = [note for note in examine(manifest).notes if not note.startswith("validation: ")]
    assert len(notes) == (0 if train_ids else 1)
    for note in notes:
        says(note, "14 label files", "labelIds", "19")


def test_train_ids_are_preferred_and_ids_replace_missing_ones(tmp_path: Path):
    truth = draw_cityscapes(tmp_path)
    for name in ("aachen_000001", "bremen_000000"):
        next(tmp_path.rglob(f"{name}_*_labelTrainIds.png")).unlink()
    manifest = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path))
    endings = Counter(sample.label.name.rpartition("_")[2] for sample in manifest.labeled if sample.label)
    assert endings == {"labelTrainIds.png": 10, "labelIds.png": 2}
    assert_true(manifest, truth)


@pytest.mark.parametrize("named", ["index", "cityscapes_ids"])
@pytest.mark.parametrize("train_ids", [True, False])
def test_file_names_decide_how_labels_of_cityscapes_are_read(tmp_path: Path, named: str, train_ids: bool):
    """cityscapes_ids in a recipe must not map train ids, otherwise labels would silently be wrong."""
    truth = draw_cityscapes(tmp_path, train_ids=train_ids)
    assert_true(manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path, label_values=named)), truth)
    # The same in plain folders, with a list that names the files.
    lines = []
    for image in sorted((tmp_path / "leftImg8bit" / "train").rglob("*.png")):
        kind = "labelTrainIds" if train_ids else "labelIds"
        label = str(image).replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.png", f"gtFine_{kind}.png")
        lines.append(f"{image.relative_to(tmp_path)} {Path(label).relative_to(tmp_path)}")
    (tmp_path / "l.txt").write_text("\n".join(lines[:-1]))
    (tmp_path / "u.txt").write_text(lines[-1])
    recipe = recipe_of(
        tmp_path,
        "folders",
        tmp_path,
        classes="cityscapes",
        label_values=named,
        labeled="l.txt",
        unlabeled="u.txt",
    )
    assert_true(manifest_of(recipe), truth)


def test_published_lists_work_without_the_train_ids_they_name(tmp_path: Path):
    """labelIds replaces labelTrainIds, and lines may end with blanks."""
    truth = draw_cityscapes(tmp_path, train_ids=False)
    names = [f"{city}_{number:06d}_000019" for city in TRAIN_CITIES for number in range(4)]

    def line(name: str) -> str:
        city = name.partition("_")[0]
        return f"leftImg8bit/train/{city}/{name}_leftImg8bit.png gtFine/train/{city}/{name}_gtFine_labelTrainIds.png \r\n"

    (tmp_path / "l.txt").write_text("".join(map(line, names[::4])))
    (tmp_path / "u.txt").write_text("".join(map(line, [name for name in names if name not in names[::4]])))
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path, labeled="l.txt", unlabeled="u.txt")
    manifest = manifest_of(recipe)
    assert (
        stems(manifest.labeled) == names[::4]
        and len(manifest.unlabeled) == 9
        and len(manifest.validation) == 2
    )
    assert_true(manifest, truth)
    next(tmp_path.rglob("aachen_000000_*_labelIds.png")).unlink()
    with refused(DataError, "l.txt", "line 1: ", "aachen_000000_000019_gtFine_labelTrainIds.png"):
        manifest_of(recipe)


def test_classes_of_the_users_own_are_read_from_the_downloaded_ids(tmp_path: Path):
    """A value map for ids must not be applied to train ids, whose numbers mean other classes."""
    truth = draw_cityscapes(tmp_path)
    classes, values = ["road", "car", "rest"], {7: "road", 26: "car", 0: "ignore", "other": "rest"}
    manifest = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path, classes=classes, label_values=values))
    for sample in manifest.labeled:
        assert sample.label and sample.label.name.endswith("_labelIds.png")
        label = read_label(sample.label, sample.encoding)
        drawn = truth[stem(sample)]
        assert np.array_equal(label == 0, drawn == 0) and np.array_equal(label == 1, drawn == 13)
    draw_cityscapes(tmp_path / "ids", train_ids=False)
    name = "aachen/aachen_000000_000019"
    (tmp_path / "ids" / "l.txt").write_text(
        f"leftImg8bit/train/{name}_leftImg8bit.png gtFine/train/{name}_gtFine_labelTrainIds.png"
    )
    recipe = recipe_of(
        tmp_path, "cityscapes", tmp_path / "ids", classes=classes, label_values=values, labeled="l.txt"
    )
    with refused(DataError, "l.txt", "line 1: ", f"{name}_gtFine_labelTrainIds.png"):
        manifest_of(recipe)


def test_further_folders_of_cityscapes_can_be_used(tmp_path: Path):
    """train_extra has coarse labels only; the labels of the test split are not published."""
    truth = draw_cityscapes(tmp_path)
    image, label = draw_layouts.scene(77, draw_layouts.AS_CITYSCAPES)
    place = "train_extra/augsburg/augsburg_000000_000000"
    save(tmp_path / "leftImg8bit" / f"{place}_leftImg8bit.png", Image.fromarray(image))
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path, unlabeled={"images": "leftImg8bit/train_extra"})
    assert [sample.label for sample in manifest_of(recipe).unlabeled] == [None]
    save(tmp_path / "gtCoarse" / f"{place}_gtCoarse_labelTrainIds.png", Image.fromarray(label))
    manifest = manifest_of(recipe)
    assert stems(manifest.unlabeled) == ["augsburg_000000_000000"] and len(manifest.labeled) == 12
    assert_true(manifest, truth | {"augsburg_000000_000000": label})
    test = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path, test={"images": "leftImg8bit/test"}))
    assert stems(test.test) == ["berlin_000000_000019"]


def test_every_nth_image_of_cityscapes_can_be_labeled(tmp_path: Path):
    draw_cityscapes(tmp_path)
    part = {"images": "leftImg8bit/train"}
    recipe = recipe_of(
        tmp_path,
        "cityscapes",
        tmp_path,
        labeled={**part, "every": 4},
        unlabeled={**part, "except_every": 4},
    )
    manifest = manifest_of(recipe)
    assert stems(manifest.labeled) == [f"{city}_000000_000019" for city in TRAIN_CITIES]
    assert len(manifest.unlabeled) == 9


# VOC and SBD


@pytest.mark.parametrize(
    "sbd", [None, "SBD", "benchmark_RELEASE/dataset", "../../benchmark_RELEASE/dataset", "given"]
)
@pytest.mark.parametrize("augmented", [False, True])
def test_images_and_labels_of_voc_are_found(tmp_path: Path, sbd: str | None, augmented: bool):
    """The images of train.txt are labeled; all others with a label, except those of val.txt, are unlabeled."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    root.mkdir(parents=True)
    place = None if sbd is None else tmp_path / "elsewhere" if sbd == "given" else root / sbd
    truth = draw_voc(root, augmented=augmented, sbd=place)
    recipe = recipe_of(tmp_path, "voc", root, **({"sbd": "../../elsewhere"} if sbd == "given" else {}))
    manifest = manifest_of(recipe)
    assert stems(manifest.labeled) == list(VOC_TRAIN) and stems(manifest.validation) == list(VOC_VAL)
    assert stems(manifest.unlabeled) == (sorted(VOC_FURTHER) if sbd or augmented else [])
    assert not set(VOC_BARE) & {name for samples in manifest.roles().values() for name in stems(samples)}
    folders = {sample.label.parent.name for sample in manifest.unlabeled if sample.label}
    assert folders == ({"SegmentationClassAug"} if augmented else {"cls"} if sbd else set())
    assert {s.label.parent.name for s in (*manifest.labeled, *manifest.validation) if s.label} == {
        "SegmentationClass"
    }
    assert_true(manifest, truth)


def test_voc_images_outside_the_labeled_list_are_unlabeled(tmp_path: Path):
    truth = draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    (tmp_path / "VOC2012" / "mine.txt").write_text("2007_000039 \n2008_000007\n")
    manifest = manifest_of(recipe_of(tmp_path, "voc", tmp_path / "VOC2012", labeled="mine.txt"))
    assert stems(manifest.labeled) == ["2007_000039", "2008_000007"]
    assert set(stems(manifest.unlabeled)) == {*VOC_TRAIN, *VOC_FURTHER} - {"2007_000039", "2008_000007"}
    assert_true(manifest, truth)


def test_published_lists_work_without_the_augmented_labels_they_name(tmp_path: Path):
    """VOC's own labels, or SBD's, replace those of SegmentationClassAug."""
    truth = draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")

    def lines(names) -> str:
        return "".join(f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png \n" for name in names)

    (tmp_path / "VOC2012" / "l.txt").write_text(lines(VOC_TRAIN))
    (tmp_path / "VOC2012" / "u.txt").write_text(lines(VOC_FURTHER).rstrip())
    recipe = recipe_of(tmp_path, "voc", tmp_path / "VOC2012", labeled="l.txt", unlabeled="u.txt")
    manifest = manifest_of(recipe)
    assert stems(manifest.labeled) == list(VOC_TRAIN) and stems(manifest.unlabeled) == list(VOC_FURTHER)
    assert_true(manifest, truth)
    draw_voc(tmp_path / "again", augmented=True)
    shutil.copytree(
        tmp_path / "again" / "SegmentationClassAug", tmp_path / "VOC2012" / "SegmentationClassAug"
    )
    manifest = manifest_of(recipe)
    assert {sample.label.parent.name for sample in manifest.labeled if sample.label} == {
        "SegmentationClassAug"
    }
    assert_true(manifest, truth)


def test_hidden_files_of_other_systems_are_ignored(tmp_path: Path):
    draw_cityscapes(tmp_path / "city")
    draw_voc(tmp_path / "voc", augmented=True, sbd=tmp_path / "SBD")
    before = {name: digest_manifest(manifest_of(recipe_of(tmp_path, *name))) for name in places(tmp_path)}
    warned = {name: check(recipe_of(tmp_path, *name)).warnings for name in places(tmp_path)}
    for path in list(tmp_path.rglob("*.*")):
        if path.is_file() and path.parent != tmp_path:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    for name in places(tmp_path):
        recipe = recipe_of(tmp_path, *name)
        assert digest_manifest(manifest_of(recipe)) == before[name]
        assert check(recipe).warnings == warned[name]


def places(folder: Path) -> list[tuple[str, Path]]:
    return [("cityscapes", folder / "city"), ("voc", folder / "voc")]


def test_the_published_rule_gives_the_images_of_the_published_lists(shared: Path, tmp_path: Path):
    """1,464 + 9,118 images from a tree of empty files."""
    listed = {
        name: (shared / "splits" / f"voc_{name}.txt") for name in ("1464_labeled", "1464_unlabeled", "val")
    }
    names = {
        role: [
            line.split()[0][len("JPEGImages/") : -4] for line in path.read_text().splitlines() if line.strip()
        ]
        for role, path in listed.items()
    }
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "SBD/cls"):
        (root / folder).mkdir(parents=True)
    for role, listed_names in names.items():
        for name in listed_names:
            (root / "JPEGImages" / f"{name}.jpg").touch()
            if role == "1464_unlabeled":
                (root / "SBD" / "cls" / f"{name}.mat").touch()
            else:
                (root / "SegmentationClass" / f"{name}.png").touch()
    for name in (*names["1464_labeled"][:1112], *names["val"][:1125]):  # SBD also has these
        (root / "SBD" / "cls" / f"{name}.mat").touch()
    for name in ("1999_000001", "1999_000002"):  # as most of VOC's images, without any label
        (root / "JPEGImages" / f"{name}.jpg").touch()
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(names["1464_labeled"]) + "\n")
    (lists / "val.txt").write_text("\n".join(names["val"]) + "\n")
    for role, path in listed.items():
        shutil.copy(path, root / f"{role}.txt")
    by_rule = manifest_of(recipe_of(tmp_path, "voc", root))
    lists_of = {"labeled": "1464_labeled.txt", "unlabeled": "1464_unlabeled.txt", "validation": "val.txt"}
    by_list = manifest_of(recipe_of(tmp_path, "voc", root, **lists_of))
    for manifest in (by_rule, by_list):
        assert (
            len(manifest.labeled) == 1464
            and len(manifest.unlabeled) == 9118
            and len(manifest.validation) == 1449
        )
    for role, samples in by_rule.roles().items():
        assert {(s.image, s.label) for s in samples} == {(s.image, s.label) for s in by_list.roles()[role]}
    assert Layout("voc", root, root / "SBD").warnings() == []


def test_the_published_lists_of_cityscapes_work(shared: Path, tmp_path: Path):
    """The lists of 1/8, 1/4 and validation, with a tree that has labelIds only, give the official counts."""
    for path in (shared / "splits").glob("cs_*.txt"):
        shutil.copy(path, tmp_path / path.name)
        for line in path.read_text().splitlines():
            image, label = line.split()
            label = label.replace("_labelTrainIds", "_labelIds")
            for name in (image, label):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).touch()
    for part, labeled, unlabeled in ((8, 372, 2603), (4, 744, 2231)):
        lists = {role: f"cs_split{part}_{role}.txt" for role in ("labeled", "unlabeled")}
        manifest = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path, **lists, validation="cs_val.txt"))
        assert [len(samples) for samples in manifest.roles().values()] == [labeled, unlabeled, 500, 0]
        samples = (*manifest.labeled, *manifest.unlabeled, *manifest.validation)
        assert all(sample.label and sample.label.name.endswith("_labelIds.png") for sample in samples)
    official = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path))
    assert len(official.labeled) == CITYSCAPES_COUNTS["train"] and len(official.validation) == 500
    assert {sample.image for sample in official.validation} == {
        sample.image for sample in manifest.validation
    }
    cities = {sample.image.parent.name for sample in official.labeled}
    assert cities == set(CITIES) and {s.image.parent.name for s in official.validation} == set(
        VALIDATION_CITIES
    )
    assert Layout("cityscapes", tmp_path).warnings() == []


# Encodings are used for the labels of the data set only


def test_digests_differ_for_each_encoding(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012", augmented=True)
    samples = manifest_of(recipe_of(tmp_path, "voc", tmp_path / "VOC2012")).labeled
    encodings = [
        label_encoding(VOC, ignore=254),
        label_encoding(VOC, values="one_based"),
        label_encoding(VOC, values={0: 0, "other": "ignore"}),
        label_encoding(VOC, values={0: 0, "other": 1}),
        label_encoding(VOC, format="color"),
        label_encoding(VOC, colors={"ignore": [[224, 224, 192]]}),
        PLAIN,
    ]
    digests = [digest_samples(samples)]
    digests += [digest_samples([replace(s, encoding=encoding) for s in samples]) for encoding in encodings]
    assert len(set(digests)) == len(digests)
    assert digest_samples(list(samples)) == digests[0]


def test_pseudo_labels_are_read_without_the_encoding_of_the_data(tmp_path: Path):
    """They are not mapped, and not read as Cityscapes' ids."""
    histogram, thresholds = object.__new__(ConfidenceHistogram), object.__new__(Thresholds)  # not used
    draw_cityscapes(tmp_path / "city", train_ids=False)
    (tmp_path / "city" / "one.txt").write_text("train/aachen/aachen_000000_000019_leftImg8bit\n")
    rest = {"images": "leftImg8bit/train", "except_every": 4}
    for values in ("index", "cityscapes_ids", {7: 3, "other": "ignore"}):
        recipe = recipe_of(
            tmp_path, "cityscapes", tmp_path / "city", label_values=values, labeled="one.txt", unlabeled=rest
        )
        manifest = manifest_of(recipe)
        assert len(manifest.unlabeled) == 9
        labels = PseudoLabelSet(tmp_path / "pseudo", histogram, thresholds, kept=np.zeros(19, np.int64))
        for before, sample in zip(manifest.unlabeled, labels.samples(manifest.unlabeled), strict=True):
            assert sample.encoding == PLAIN and sample.label != before.label and sample.label is not None
            assert sample.encoding.for_file(sample.label) is PLAIN and (sample.id, sample.image) == (
                before.id,
                before.image,
            )
            drawn = np.arange(97 * 129).reshape(97, 129).astype(np.uint8) % 19
            sample.label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(sample.label)
            assert np.array_equal(load_example(sample, manifest.classes).label, drawn)


# Incomplete downloads and wrong roots


def report(recipe: Recipe) -> str:
    """All that `check` reports: an error, or faults and warnings."""
    try:
        findings = check(recipe)
    except DataError as error:
        return str(error)
    return "\n".join([*findings.faults, *findings.warnings])


@pytest.mark.parametrize("layout", ["cityscapes", "voc"])
def test_the_right_root_is_named(tmp_path: Path, layout: str):
    """The root is one or two folders too high, or too low; the one that is named works."""
    draw_all(tmp_path)
    right = tmp_path / "cityscapes" if layout == "cityscapes" else tmp_path / "VOCdevkit" / "VOC2012"
    inside = (
        ["leftImg8bit", "leftImg8bit/train", "gtFine"]
        if layout == "cityscapes"
        else ["JPEGImages", "ImageSets"]
    )
    roots = [tmp_path, *(right / name for name in inside), *([right.parent] if layout == "voc" else [])]
    for root in roots:
        with refused(DataError, f"data.layout {layout}", f"{root} ", f"Set data.root to {right}.") as caught:
            layout_of(recipe_of(tmp_path / "r", layout, root))
        assert str(caught.value).count("\n") == 1
    assert layout_of(recipe_of(tmp_path / "r", layout, right)) is not None
    with refused(DataError, str(tmp_path / "gone"), "data.root"):
        layout_of(recipe_of(tmp_path / "r", layout, tmp_path / "gone"))


def test_the_latest_of_several_voc_years_is_named(tmp_path: Path):
    for year in ("VOC2007", "VOC2012", "VOC2010"):
        draw_voc(tmp_path / "VOCdevkit" / year, train=VOC_TRAIN[:1])
    message = report(recipe_of(tmp_path / "r", "voc", tmp_path / "VOCdevkit"))
    says(message, f"Set data.root to {tmp_path}/VOCdevkit/VOC2012.")


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine"])
def test_a_missing_archive_of_cityscapes_is_named(tmp_path: Path, folder: str):
    draw_cityscapes(tmp_path / "city")
    shutil.move(tmp_path / "city" / folder, tmp_path / "kept")
    recipe = recipe_of(tmp_path / "r", "cityscapes", tmp_path / "city")
    archive = f"{folder}_trainvaltest.zip"
    path = tmp_path / "city" / folder
    says(report(recipe), str(path), archive, "cityscapes-dataset.com", f"unpack it in {path.parent}")
    (tmp_path / archive).touch()
    says(report(recipe), str(path), f"Unpack {tmp_path / archive} in {path.parent}")
    (tmp_path / "city" / archive).touch()
    says(report(recipe), str(path), f"Unpack {path.parent / archive} in {path.parent}")
    # Some programs unpack an archive into a folder of its own.
    shutil.move(tmp_path / "kept", tmp_path / "city" / archive[:-4] / folder)
    there = tmp_path / "city" / archive[:-4] / folder
    says(report(recipe), str(path), str(there))
    path.symlink_to(there)
    assert str(path) not in report(recipe).replace(f"{path}/", "") and len(manifest_of(recipe).labeled) == 12


def test_two_archives_in_folders_of_their_own_are_named(tmp_path: Path):
    draw_cityscapes(tmp_path)
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / f"{folder}_trainvaltest").mkdir()
        shutil.move(tmp_path / folder, tmp_path / f"{folder}_trainvaltest" / folder)
    message = report(recipe_of(tmp_path / "r", "cityscapes", tmp_path))
    places = [str(tmp_path / f"{name}_trainvaltest" / name) for name in ("leftImg8bit", "gtFine")]
    says(message, *places)
    assert "data.root" not in message


@pytest.mark.parametrize("folder", ["JPEGImages", "ImageSets", "SegmentationClass"])
def test_a_missing_folder_of_voc_is_named(tmp_path: Path, folder: str):
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    shutil.rmtree(tmp_path / "VOC2012" / folder)
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    archive = "VOCtrainval_11-May-2012.tar"
    site = "host.robots.ox.ac.uk/pascal/VOC/voc2012"
    path = tmp_path / "VOC2012" / ("ImageSets/Segmentation" if folder == "ImageSets" else folder)
    says(report(recipe), str(path), archive, site)
    (tmp_path / archive).touch()
    says(report(recipe), str(path), f"Unpack {tmp_path / archive} in ")


def test_voc_works_with_augmented_labels_only(tmp_path: Path):
    """Some users unpack images, lists and SegmentationClassAug only, which also has VOC's own labels."""
    truth = draw_voc(tmp_path / "VOC2012", augmented=True)
    shutil.rmtree(tmp_path / "VOC2012" / "SegmentationClass")
    manifest = manifest_of(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012"))
    assert stems(manifest.labeled) == list(VOC_TRAIN) and stems(manifest.unlabeled) == sorted(VOC_FURTHER)
    assert_true(manifest, truth)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_missing_list_of_voc_is_named(tmp_path: Path, name: str):
    draw_voc(tmp_path / "VOC2012")
    path = tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.unlink()
    message = report(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012"))
    says(message, str(path), "VOCtrainval_11-May-2012.tar")


def test_voc_without_sbd_has_no_unlabeled_images(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012")
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    message = report(recipe)
    says(message, "9,118", "benchmark.tgz from www2.eecs", f"unpack it in {tmp_path}")
    truth = draw_voc(tmp_path / "again", sbd=tmp_path / "VOC2012" / "benchmark_RELEASE" / "dataset")
    assert "www2.eecs" not in report(recipe) and len(manifest_of(recipe).unlabeled) == 6
    assert_true(manifest_of(recipe), truth)
    with refused(
        DataError, "data.sbd", str(tmp_path / "VOC2012" / "nowhere"), "cls", "benchmark_RELEASE/dataset"
    ):
        layout_of(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012", sbd="nowhere"))


def test_what_an_incomplete_voc_lacks_is_counted(tmp_path: Path):
    """Counts that differ from the published ones are reported; no image is silently left out."""
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    (tmp_path / "VOC2012" / "JPEGImages" / f"{VOC_FURTHER[1]}.jpg").unlink()
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    message = report(recipe)
    says(
        message,
        "train.txt lists 4 images",
        "1,464",
        "VOCtrainval_11-May-2012.tar",
        "val.txt lists 3 images",
        "1,449",
        "6 images have a label",
        "9,118",
        "benchmark.tgz",
        f"{tmp_path}/VOC2012/JPEGImages",
        "2008_000003",
    )
    assert len(manifest_of(recipe).unlabeled) == 5
    (tmp_path / "VOC2012" / "JPEGImages" / f"{VOC_TRAIN[1]}.jpg").unlink()
    says(
        report(recipe),
        "train.txt: 1 line(s)",
        f"line 2: '{VOC_TRAIN[1]}'",
        f"2 label(s) have no image in {tmp_path}",
    )


def test_images_of_a_city_without_labels_become_unlabeled(tmp_path: Path):
    """As any image without a label; check reports it."""
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine" / "train" / "bochum")
    next((tmp_path / "gtFine" / "train").rglob("bremen_000003*_labelTrainIds.png")).unlink()
    next((tmp_path / "gtFine" / "train").rglob("bremen_000003*_labelIds.png")).unlink()
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path)
    assert len(manifest_of(recipe).unlabeled) == 5
    says(
        report(recipe),
        f"5 image(s) in {tmp_path}/leftImg8bit/train",
        f"{tmp_path}/gtFine/train: bochum (4), bremen (1)",
        "gtFine_trainvaltest.zip",
        f"{tmp_path}/leftImg8bit/train has 12 images",
        "2,975",
        "cologne",
        "zurich",
        "leftImg8bit_trainvaltest.zip",
        f"{tmp_path}/leftImg8bit/val has 2 images",
        "500",
        "lindau, munster",
    )


def test_the_archive_is_named_if_validation_has_no_labels(tmp_path: Path):
    """And not data.labels, which a layout does not use."""
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine" / "val")
    message = report(recipe_of(tmp_path, "cityscapes", tmp_path))
    assert "data.labels" not in message
    says(
        message,
        "validation: 2 image(s)",
        "_labelTrainIds.png or _labelIds.png",
        f"{tmp_path}/gtFine/val: frankfurt (2)",
        "gtFine_trainvaltest.zip",
    )


def test_a_split_that_is_not_unpacked_is_named(tmp_path: Path):
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit" / "train")
    message = report(recipe_of(tmp_path, "cityscapes", tmp_path))
    says(
        message,
        f"{tmp_path}/leftImg8bit/train: ",
        f"{tmp_path}/leftImg8bit/train has 0 images",
        "2,975",
        "leftImg8bit_trainvaltest.zip",
    )
    shutil.rmtree(tmp_path / "leftImg8bit" / "val")
    assert f"{tmp_path}/leftImg8bit/val has 0 images" in report(recipe_of(tmp_path, "cityscapes", tmp_path))


def test_cityscapes_without_any_label_is_refused(tmp_path: Path):
    draw_cityscapes(tmp_path, train_ids=False, ids=False)
    message = report(recipe_of(tmp_path, "cityscapes", tmp_path))
    says(message, "gtFine", "_labelTrainIds.png", "_labelIds.png")


def test_damaged_sbd_files_are_reported(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    path = tmp_path / "SBD" / "cls" / f"{VOC_FURTHER[2]}.mat"
    path.write_bytes(path.read_bytes()[:-40])
    (fault,) = check(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")).faults
    says(fault, f"cls/{path.name}", "SBD", "benchmark_RELEASE/dataset/cls")


CONTRADICTIONS = {
    "a folder of images": ({"images": "JPEGImages"}, ["data.images", "voc"]),
    "a folder of labels": ({"labels": "SegmentationClass"}, ["data.labels", "voc"]),
    "a folder of labels of one role": (
        {"unlabeled": {"list": "u.txt", "labels": "SegmentationClass"}},
        ["data.unlabeled.labels", "voc"],
    ),
    "label colors for index files": (
        {"label_format": "index", "label_colors": {"ignore": [[1, 2, 3]]}},
        ["data.label_colors", "label_format index"],
    ),
    "a value map for color files": (
        {"label_format": "color", "label_values": "one_based"},
        ["data.label_values", "label_format color"],
    ),
    "SBD for Cityscapes": ({"layout": "cityscapes", "sbd": "SBD"}, ["data.sbd", "voc", "cityscapes"]),
    "an unknown layout": ({"layout": "coco"}, ["data.layout", "'coco'", "'folders', 'cityscapes' or 'voc'"]),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_recipes_that_contradict_the_layout_are_refused(tmp_path: Path, case: str):
    data, facts = CONTRADICTIONS[case]
    settings = {"classes": "voc", **data}
    layout = settings.pop("layout", "voc")
    with refused(RecipeError, *facts):
        recipe_of(tmp_path, layout, tmp_path, **settings)


def test_check_reports_on_the_command_line(tmp_path: Path, call):
    draw_all(tmp_path)
    recipe_of(tmp_path, "voc", tmp_path / "VOCdevkit" / "VOC2012")
    code, out, _ = call("check", tmp_path / "voc.yaml")
    assert code == 0 and "1,464" in out
    code, _, err = call("check", tmp_path / "voc.yaml", f"data.root={tmp_path}")
    assert code == 2 and f"Set data.root to {tmp_path}/VOCdevkit/VOC2012" in " ".join(err.split())


# The drawn data sets


def test_the_drawn_data_sets_hold_several_classes(tmp_path: Path):
    truth = draw_cityscapes(tmp_path / "city")
    present = {int(value) for label in truth.values() for value in np.unique(label)}
    assert len(present - {255}) >= 9 and 255 in present and present < {*range(19), 255}
    pixels = np.asarray(Image.open(next(tmp_path.rglob("aachen_000000_*_color.png"))))
    road = truth["aachen_000000_000019"] == 0
    assert road.any() and (pixels[road][:, :3] == CITYSCAPES.colors[0]).all()
    voc = draw_voc(tmp_path / "voc", augmented=True)
    present = {int(value) for label in voc.values() for value in np.unique(label)}
    assert len(present - {255}) >= 6 and 255 in present
    assert Image.open(tmp_path / "voc" / "SegmentationClass" / f"{VOC_TRAIN[0]}.png").mode == "P"
    assert (VOC_COUNTS["train"], VOC_UNLABELED) == (1464, 9118)


def test_a_check_without_any_download_names_the_archives(tmp_path: Path) -> None:
    """VOC's archive unpacks into VOCdevkit/VOC2012, so it belongs two folders above; an archive there is found."""
    root, archive = tmp_path / "data/VOCdevkit/VOC2012", "VOCtrainval_11-May-2012.tar"
    (missing,) = Layout("voc", root).missing()
    says(
        missing,
        str(root),
        archive,
        "host.robots.ox.ac.uk/pascal/VOC/voc2012",
        f"unpack it in {tmp_path}/data",
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / archive).touch()
    (missing,) = Layout("voc", root).missing()
    says(missing, f"unpack {tmp_path}/data/{archive} in {tmp_path}/data")
    images, labels = Layout("cityscapes", tmp_path / "city").missing()
    says(images, str(tmp_path / "city"), "leftImg8bit_trainvaltest.zip")
    says(labels, str(tmp_path / "city"), "gtFine_trainvaltest.zip")


def test_voc_without_its_own_labels_reports_which_are_used(tmp_path: Path) -> None:
    draw_voc(tmp_path, augmented=True)
    shutil.rmtree(tmp_path / "SegmentationClass")
    layout = Layout("voc", tmp_path)
    assert not layout.missing()
    (warning,) = [line for line in layout.warnings() if "SegmentationClassAug are" in line]
    says(warning, str(tmp_path / "SegmentationClass"), "VOCtrainval_11-May-2012.tar")
