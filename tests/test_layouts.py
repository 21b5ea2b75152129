"""Cityscapes, VOC 2012 and SBD as they unpack: found, paired and mapped; what a broken download is told."""

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
from darseg.run.directory import digest_manifest, digest_samples
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
    """Every label reads as it was drawn, by all who read labels."""
    for samples in manifest.roles().values():
        for sample in samples:
            assert sample.label is not None
            assert np.array_equal(read_label(sample.label, sample.encoding), truth[stem(sample)]), sample.id
            assert np.array_equal(load_example(sample, manifest.classes).label, truth[stem(sample)])
    found = examine(manifest)
    assert found.faults == ()
    for role, samples in manifest.roles().items():
        everything = np.concatenate(
            [truth[name].reshape(-1) for name in stems(samples)] or [np.zeros(0, np.uint8)]
        )
        wanted = np.bincount(everything, minlength=256)
        assert found.pixels[role].tolist() == [*wanted[: len(manifest.classes)], wanted[255]]


# Cityscapes


def test_the_table_is_the_published_one():
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
def test_cityscapes_is_found(tmp_path: Path, train_ids: bool, ids: bool):
    truth = draw_cityscapes(tmp_path / "city", train_ids=train_ids, ids=ids)
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path / "city")
    manifest = manifest_of(recipe)
    wanted = [f"{city}_{number:06d}_000019" for city in TRAIN_CITIES for number in range(4)]
    assert stems(manifest.labeled) == wanted and manifest.unlabeled == () == manifest.test
    assert stems(manifest.validation) == ["frankfurt_000000_000019", "frankfurt_000001_000019"]
    kind = "_labelTrainIds.png" if train_ids else "_labelIds.png"
    assert all(sample.label and sample.label.name.endswith(kind) for sample in manifest.labeled)
    assert_true(manifest, truth)
    notes = examine(manifest).notes
    assert notes == (
        () if train_ids else ("14 label files hold Cityscapes' ids (labelIds), read as the 19 train ids",)
    )


def test_each_image_has_the_first_label_there_is(tmp_path: Path):
    truth = draw_cityscapes(tmp_path)
    for name in ("aachen_000001", "bremen_000000"):
        next(tmp_path.rglob(f"{name}_*_labelTrainIds.png")).unlink()
    manifest = manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path))
    endings = Counter(sample.label.name.rpartition("_")[2] for sample in manifest.labeled if sample.label)
    assert endings == {"labelTrainIds.png": 10, "labelIds.png": 2}
    assert_true(manifest, truth)


@pytest.mark.parametrize("named", ["index", "cityscapes_ids"])
@pytest.mark.parametrize("train_ids", [True, False])
def test_the_names_of_files_say_what_they_hold(tmp_path: Path, named: str, train_ids: bool):
    """A recipe that says cityscapes_ids must not map train ids, or a layout's choice would be silent garbage."""
    truth = draw_cityscapes(tmp_path, train_ids=train_ids)
    assert_true(manifest_of(recipe_of(tmp_path, "cityscapes", tmp_path, label_values=named)), truth)
    # The same in plain folders, where a list names the files.
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


def test_published_lists_name_train_ids_that_few_have(tmp_path: Path):
    """labelTrainIds gives way to labelIds, and line ends may hold blanks."""
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
    with pytest.raises(DataError) as caught:
        manifest_of(recipe)
    assert "line 1: label" in str(
        caught.value
    ) and "aachen_000000_000019_gtFine_labelTrainIds.png does not" in str(caught.value)


def test_classes_of_ones_own_are_read_from_the_downloaded_ids(tmp_path: Path):
    """A map of ids must not meet train ids, whose numbers mean others."""
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
    with pytest.raises(DataError, match=r"line 1: label .*_labelTrainIds\.png does not exist"):
        manifest_of(recipe)


def test_more_unlabeled_images(tmp_path: Path):
    """Cityscapes' train_extra has coarse labels alone; the test split has none that say anything."""
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


def test_every_nth_image(tmp_path: Path):
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
def test_voc_is_found(tmp_path: Path, sbd: str | None, augmented: bool):
    """Labeled: train.txt; unlabeled: whatever else has a label, but for val.txt."""
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


def test_labels_of_other_lists_in_voc(tmp_path: Path):
    """A list of labeled images of one's own leaves all others to be unlabeled."""
    truth = draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    (tmp_path / "VOC2012" / "mine.txt").write_text("2007_000039 \n2008_000007\n")
    manifest = manifest_of(recipe_of(tmp_path, "voc", tmp_path / "VOC2012", labeled="mine.txt"))
    assert stems(manifest.labeled) == ["2007_000039", "2008_000007"]
    assert set(stems(manifest.unlabeled)) == {*VOC_TRAIN, *VOC_FURTHER} - {"2007_000039", "2008_000007"}
    assert_true(manifest, truth)


def test_published_lists_name_augmented_labels(tmp_path: Path):
    """SegmentationClassAug gives way to what is there: VOC's own, or SBD's."""
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


def test_hidden_files_of_other_systems_do_no_harm(tmp_path: Path):
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


def test_the_published_rule_counts(shared: Path, tmp_path: Path):
    """1,464 + 9,118 from a tree of empty files, and the same images as the published lists have."""
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
    for role, some in names.items():
        for name in some:
            (root / "JPEGImages" / f"{name}.jpg").touch()
            if role == "1464_unlabeled":
                (root / "SBD" / "cls" / f"{name}.mat").touch()
            else:
                (root / "SegmentationClass" / f"{name}.png").touch()
    for name in (*names["1464_labeled"][:1112], *names["val"][:1125]):  # SBD has them, too
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


def test_the_published_cityscapes_lists(shared: Path, tmp_path: Path):
    """1/8, 1/4 and validation work as they are over a tree that has labelIds alone, and fit the official counts."""
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


# Encodings go where labels go, and nowhere else


def test_digests_tell_encodings_apart(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012", augmented=True)
    samples = manifest_of(recipe_of(tmp_path, "voc", tmp_path / "VOC2012")).labeled
    others = [
        label_encoding(VOC, ignore=254),
        label_encoding(VOC, values="one_based"),
        label_encoding(VOC, values={0: 0, "other": "ignore"}),
        label_encoding(VOC, values={0: 0, "other": 1}),
        label_encoding(VOC, format="color"),
        label_encoding(VOC, colors={"ignore": [[224, 224, 192]]}),
        PLAIN,
    ]
    digests = [digest_samples(samples)]
    digests += [digest_samples([replace(s, encoding=encoding) for s in samples]) for encoding in others]
    assert len(set(digests)) == len(digests)
    assert digest_samples(list(samples)) == digests[0]


def test_pseudo_labels_are_read_as_they_are(tmp_path: Path):
    """Never through the user's map, nor taken for Cityscapes' ids."""
    histogram, thresholds = object.__new__(ConfidenceHistogram), object.__new__(Thresholds)  # not looked at
    draw_cityscapes(tmp_path / "city", train_ids=False)
    (tmp_path / "city" / "one.txt").write_text("train/aachen/aachen_000000_000019_leftImg8bit\n")
    rest = {"images": "leftImg8bit/train", "except_every": 4}
    for values in ("index", "cityscapes_ids", {7: 3, "other": "ignore"}):
        recipe = recipe_of(
            tmp_path, "cityscapes", tmp_path / "city", label_values=values, labeled="one.txt", unlabeled=rest
        )
        manifest = manifest_of(recipe)
        assert len(manifest.unlabeled) == 9
        labels = PseudoLabelSet(tmp_path / "pseudo", histogram, thresholds, np.zeros(19, np.int64))
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


# Half-unpacked downloads and wrong roots


def told(recipe: Recipe) -> str:
    """All that check says: an error, or faults and warnings."""
    try:
        found = check(recipe)
    except DataError as error:
        return str(error)
    return "\n".join([*found.faults, *found.warnings])


@pytest.mark.parametrize("layout", ["cityscapes", "voc"])
def test_a_root_beside_the_data(tmp_path: Path, layout: str):
    """One folder too high, two too high, too low: the right one is named, and works."""
    draw_all(tmp_path)
    right = tmp_path / "cityscapes" if layout == "cityscapes" else tmp_path / "VOCdevkit" / "VOC2012"
    inside = (
        ["leftImg8bit", "leftImg8bit/train", "gtFine"]
        if layout == "cityscapes"
        else ["JPEGImages", "ImageSets"]
    )
    roots = [tmp_path, *(right / name for name in inside), *([right.parent] if layout == "voc" else [])]
    for root in roots:
        with pytest.raises(DataError) as caught:
            layout_of(recipe_of(tmp_path / "r", layout, root))
        message = str(caught.value)
        assert f"data.layout {layout}: the data set is not whole" in message
        assert f"{right} has: set data.root to that" in message and message.count("\n") == 1
    assert layout_of(recipe_of(tmp_path / "r", layout, right)) is not None
    with pytest.raises(
        DataError, match=rf"{tmp_path}/gone does not exist: set data\.root to the folder that holds"
    ):
        layout_of(recipe_of(tmp_path / "r", layout, tmp_path / "gone"))


def test_the_later_year_of_voc_is_meant(tmp_path: Path):
    for year in ("VOC2007", "VOC2012", "VOC2010"):
        draw_voc(tmp_path / "VOCdevkit" / year, train=VOC_TRAIN[:1])
    assert f"{tmp_path}/VOCdevkit/VOC2012 has: set" in told(
        recipe_of(tmp_path / "r", "voc", tmp_path / "VOCdevkit")
    )


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine"])
def test_a_cityscapes_archive_that_is_missing(tmp_path: Path, folder: str):
    draw_cityscapes(tmp_path / "city")
    shutil.move(tmp_path / "city" / folder, tmp_path / "kept")
    recipe = recipe_of(tmp_path / "r", "cityscapes", tmp_path / "city")
    archive = f"{folder}_trainvaltest.zip"
    path = tmp_path / "city" / folder
    assert (
        f"{path} is missing: get {archive} from cityscapes-dataset.com and unpack it in {path.parent}"
        in told(recipe)
    )
    (tmp_path / archive).touch()
    assert f"{path} is missing: {tmp_path / archive} is still packed: unpack it in {path.parent}" in told(
        recipe
    )
    (tmp_path / "city" / archive).touch()
    assert f"{path} is missing: {path.parent / archive} is still packed" in told(recipe)
    # Unpacked into a folder of its own, as some programs do.
    shutil.move(tmp_path / "kept", tmp_path / "city" / archive[:-4] / folder)
    there = tmp_path / "city" / archive[:-4] / folder
    assert f"{path} is missing, but {there} is there: move or link it to {path}" in told(recipe)
    path.symlink_to(there)
    assert "is missing" not in told(recipe) and len(manifest_of(recipe).labeled) == 12


def test_both_archives_in_folders_of_their_own(tmp_path: Path):
    draw_cityscapes(tmp_path)
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / f"{folder}_trainvaltest").mkdir()
        shutil.move(tmp_path / folder, tmp_path / f"{folder}_trainvaltest" / folder)
    message = told(recipe_of(tmp_path / "r", "cityscapes", tmp_path))
    assert message.count("move or link it to") == 2 and "set data.root" not in message


@pytest.mark.parametrize("folder", ["JPEGImages", "ImageSets", "SegmentationClass"])
def test_a_voc_folder_that_is_missing(tmp_path: Path, folder: str):
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    shutil.rmtree(tmp_path / "VOC2012" / folder)
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    archive = "VOCtrainval_11-May-2012.tar"
    site = "host.robots.ox.ac.uk/pascal/VOC/voc2012"
    assert (
        f"{folder}{'/Segmentation' if folder == 'ImageSets' else ''} is missing: get {archive} from {site}"
        in told(recipe)
    )
    (tmp_path / archive).touch()
    assert f"{tmp_path / archive} is still packed: unpack it in" in told(recipe)


def test_voc_with_augmented_labels_alone(tmp_path: Path):
    """Some unpack images, lists and SegmentationClassAug only: it has VOC's own labels, too."""
    truth = draw_voc(tmp_path / "VOC2012", augmented=True)
    shutil.rmtree(tmp_path / "VOC2012" / "SegmentationClass")
    manifest = manifest_of(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012"))
    assert stems(manifest.labeled) == list(VOC_TRAIN) and stems(manifest.unlabeled) == sorted(VOC_FURTHER)
    assert_true(manifest, truth)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_voc_list_that_is_missing(tmp_path: Path, name: str):
    draw_voc(tmp_path / "VOC2012")
    path = tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.unlink()
    message = told(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012"))
    assert f"{path} is missing: unpack VOCtrainval_11-May-2012.tar" in message


def test_voc_without_sbd(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012")
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    message = told(recipe)
    assert "which 9,118 images are unlabeled cannot be told: get benchmark.tgz from www2.eecs" in message
    assert f"unpack it in {tmp_path}" in message
    truth = draw_voc(tmp_path / "again", sbd=tmp_path / "VOC2012" / "benchmark_RELEASE" / "dataset")
    assert "cannot be told" not in told(recipe) and len(manifest_of(recipe).unlabeled) == 6
    assert_true(manifest_of(recipe), truth)
    with pytest.raises(
        DataError, match=r"data\.sbd: .*nowhere has no folder cls\. Give benchmark_RELEASE/dataset of"
    ):
        layout_of(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012", sbd="nowhere"))


def test_half_of_everything_is_counted(tmp_path: Path):
    """Counts that differ from the published ones, each with what to unpack again; nothing is left out in silence."""
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    (tmp_path / "VOC2012" / "JPEGImages" / f"{VOC_FURTHER[1]}.jpg").unlink()
    recipe = recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012")
    message = told(recipe)
    for part in (
        "train.txt lists 4 images, VOC 2012 has 1,464. Unpack VOCtrainval_11-May-2012.tar",
        "val.txt lists 3 images, VOC 2012 has 1,449. Unpack",
        "6 images have a label besides those of train.txt and val.txt; VOC with SBD has 9,118. Unpack SBD's benchmark",
        f"1 images with a label are not in {tmp_path}/VOC2012/JPEGImages and are left out, the first is 2008_000003",
    ):
        assert part in message, part
    assert len(manifest_of(recipe).unlabeled) == 5
    (tmp_path / "VOC2012" / "JPEGImages" / f"{VOC_TRAIN[1]}.jpg").unlink()
    message = told(recipe)
    assert "1 line(s) lead nowhere" in message and "2 images with a label are not in" in message


def test_a_city_without_labels(tmp_path: Path):
    """Its images become unlabeled ones, as any without a label; check says so."""
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine" / "train" / "bochum")
    next((tmp_path / "gtFine" / "train").rglob("bremen_000003*_labelTrainIds.png")).unlink()
    next((tmp_path / "gtFine" / "train").rglob("bremen_000003*_labelIds.png")).unlink()
    recipe = recipe_of(tmp_path, "cityscapes", tmp_path)
    message = told(recipe)
    assert f"5 images in {tmp_path}/leftImg8bit/train have no label in {tmp_path}/gtFine/train" in message
    assert "bochum (4), bremen (1). Unpack gtFine_trainvaltest.zip" in message
    assert (
        f"{tmp_path}/leftImg8bit/train has 12 images, Cityscapes has 2,975; cities without a folder: col"
        in message
    )
    assert "zurich. Unpack leftImg8bit_trainvaltest.zip from cityscapes-dataset.com again if" in message
    assert (
        "leftImg8bit/val has 2 images, Cityscapes has 500; cities without a folder: lindau, munster"
        in message
    )


def test_validation_without_labels_names_the_archive(tmp_path: Path):
    """Not data.labels, which a layout does not have."""
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine" / "val")
    message = told(recipe_of(tmp_path, "cityscapes", tmp_path))
    assert "validation: 2 image(s) without label map" in message and "data.labels" not in message
    assert "each needs one in gtFine (as its image, …_labelTrainIds.png or …_labelIds.png)" in message
    assert f"no label in {tmp_path}/gtFine/val: frankfurt (2). Unpack gtFine_trainvaltest.zip" in message


def test_only_one_split_is_unpacked(tmp_path: Path):
    draw_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit" / "train")
    message = told(recipe_of(tmp_path, "cityscapes", tmp_path))
    assert f"{tmp_path}/leftImg8bit/train: no such folder" in message
    assert f"{tmp_path}/leftImg8bit/train has 0 images, Cityscapes has 2,975" in message
    assert "Unpack leftImg8bit_trainvaltest.zip" in message
    shutil.rmtree(tmp_path / "leftImg8bit" / "val")
    assert "Cityscapes has 500" in told(recipe_of(tmp_path, "cityscapes", tmp_path))


def test_no_label_at_all(tmp_path: Path):
    draw_cityscapes(tmp_path, train_ids=False, ids=False)
    message = told(recipe_of(tmp_path, "cityscapes", tmp_path))
    assert "no labeled images: at least one image needs a label map in gtFine (as its image" in message


def test_damaged_sbd_files_are_named(tmp_path: Path):
    draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "SBD")
    path = tmp_path / "SBD" / "cls" / f"{VOC_FURTHER[2]}.mat"
    path.write_bytes(path.read_bytes()[:-40])
    found = check(recipe_of(tmp_path / "r", "voc", tmp_path / "VOC2012"))
    assert len(found.faults) == 1 and f"cls/{path.name}: no class map of SBD" in found.faults[0]
    assert "copy them again where one is damaged" in found.faults[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"images": "JPEGImages"}, "data.images: is fixed by layout voc; remove it"),
        ({"labels": "SegmentationClass"}, "data.labels: is fixed by layout voc; remove it"),
        (
            {"unlabeled": {"list": "u.txt", "labels": "SegmentationClass"}},
            "data.unlabeled.labels: is fixed by layout voc; remove it",
        ),
        (
            {"label_format": "index", "label_colors": {"ignore": [[1, 2, 3]]}},
            "has no effect with label_format index",
        ),
        ({"label_format": "color", "label_values": "one_based"}, "has no effect with label_format color"),
        (
            {"layout": "cityscapes", "sbd": "SBD"},
            "data.sbd: is only for layout voc, and the layout is cityscapes",
        ),
        ({"layout": "coco"}, "data.layout: found 'coco'; should be 'folders', 'cityscapes' or 'voc'"),
    ],
)
def test_recipes_that_contradict_the_layout(tmp_path: Path, data: dict, message: str):
    with pytest.raises(RecipeError) as caught:
        recipe_of(tmp_path, data.pop("layout", "voc"), tmp_path, **{"classes": "voc", **data})
    assert message in str(caught.value)


def test_check_on_the_command_line(tmp_path: Path, call):
    draw_all(tmp_path)
    recipe_of(tmp_path, "voc", tmp_path / "VOCdevkit" / "VOC2012")
    code, shown, _ = call("check", tmp_path / "voc.yaml")
    assert code == 0 and "1,464" in shown
    code, _, err = call("check", tmp_path / "voc.yaml", f"data.root={tmp_path}")
    assert code == 2 and "set data.root to that" in " ".join(err.split())


# The drawing itself


def test_what_is_drawn_is_what_is_meant(tmp_path: Path):
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


def test_a_first_check_without_any_download_says_what_to_get(tmp_path: Path) -> None:
    """VOC's tar brings VOCdevkit/VOC2012, so it is unpacked two folders above; a packed one is found there."""
    missing = Layout("voc", tmp_path / "data/VOCdevkit/VOC2012").missing()
    assert len(missing) == 1 and "does not exist" in missing[0]
    assert (
        f"get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012 and unpack it in {tmp_path}/data"
        in missing[0]
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data/VOCtrainval_11-May-2012.tar").touch()
    (missing,) = Layout("voc", tmp_path / "data/VOCdevkit/VOC2012").missing()
    assert (
        f"{tmp_path}/data/VOCtrainval_11-May-2012.tar is still packed: unpack it in {tmp_path}/data"
        in missing
    )
    missing = Layout("cityscapes", tmp_path / "city").missing()
    assert len(missing) == 2
    assert "leftImg8bit_trainvaltest.zip" in missing[0] and "gtFine_trainvaltest.zip" in missing[1]


def test_voc_without_its_own_labels_says_whose_are_taken(tmp_path: Path) -> None:
    draw_voc(tmp_path, augmented=True)
    shutil.rmtree(tmp_path / "SegmentationClass")
    layout = Layout("voc", tmp_path)
    assert not layout.missing()
    assert any(
        "SegmentationClass is missing; the labels in SegmentationClassAug are taken" in line
        for line in layout.warnings()
    )
