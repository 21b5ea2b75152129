"""Data files for other trainers, read as those trainers document that they read them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from darseg.data.classes import ClassSet
from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import RunError
from darseg.model.weights import read_spec
from darseg.run.label import label_folder
from darseg.run.trainers import write_for
from wording import refused, says

SUFFIXES = {".png", ".jpg"}
K = len(SCENE_CLASSES)


@pytest.fixture
def photos(project: Path) -> Path:
    """A folder images/ with pictures in subfolders, one of them a JPEG."""
    folder = project / "photos"
    shutil.copytree(project / "data" / "images" / "u", folder / "images" / "u")
    picture = folder / "images" / "u" / "07.png"
    cv2.imwrite(str(picture.with_suffix(".jpg")), cv2.imread(str(picture)))
    picture.unlink()
    return folder


def label(project: Path, photos: Path, out: Path, trainer: str) -> None:
    label_folder(project / "runs/tiny", photos / "images", out, labeling_ratio=0.5, trainer=trainer)  # ty: ignore[invalid-argument-type]


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def check_pairs(pairs: list[tuple[Path, Path]], images: Path, out: Path) -> None:
    """Every image has its own label map: one channel, of its size, with classes and 255."""
    assert sorted(image for image, _ in pairs) == pictures_in(images) and len(pairs) == 6
    seen: set[int] = set()
    for image, mask in pairs:
        values = cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
        assert values.dtype == np.uint8 and values.shape == cv2.imread(str(image)).shape[:2]
        ours = out / image.relative_to(images).with_suffix(".png")
        assert np.array_equal(values, read_label(ours))
        seen |= set(np.unique(values).tolist())
    assert 255 in seen and seen - {255} and seen <= {*range(K), 255}


def test_yolo_replaces_the_folder_of_the_images(project: Path, photos: Path) -> None:
    out = photos / "masks"
    label(project, photos, out, "yolo")
    data = yaml.safe_load((out / "yolo.yaml").read_text())
    assert data["names"] == dict(enumerate(SCENE_CLASSES.names)) and set(data) == {
        "path",
        "train",
        "masks_dir",
        "names",
    }
    pairs = []
    for image in pictures_in(Path(data["path"]) / data["train"]):
        masks = str(image).replace(f"{os.sep}images{os.sep}", f"{os.sep}{data['masks_dir']}{os.sep}")
        pairs.append((image, Path(masks).with_suffix(".png")))
    check_pairs(pairs, photos / "images", out)


def test_lightly_train_knows_every_value_of_the_masks(project: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    label(project, photos, out, "lightly-train")
    data = yaml.safe_load((out / "lightly_train.yaml").read_text())
    assert data["classes"] == dict(enumerate(SCENE_CLASSES.names)) | {255: "unlabeled"}
    assert data["ignore_classes"] == [255] and set(data) == {"train", "classes", "ignore_classes"}
    images, masks = (Path(data["train"][name]) for name in ("images", "masks"))
    pairs = [(path, (masks / path.relative_to(images)).with_suffix(".png")) for path in pictures_in(images)]
    check_pairs(pairs, photos / "images", out)


def test_mmseg_has_a_data_set_for_each_suffix(project: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    label(project, photos, out, "mmseg")
    config: dict = {}
    exec((out / "mmseg.py").read_text(), config)
    joined = config["train_dataloader"]["dataset"]
    colors = read_spec(project / "runs/tiny/round_0/network.safetensors").class_colors
    assert joined["type"] == "ConcatDataset" and [d["img_suffix"] for d in joined["datasets"]] == [
        ".jpg",
        ".png",
    ]
    pairs = []
    for dataset in joined["datasets"]:
        assert (dataset["type"], dataset["ignore_index"], dataset["reduce_zero_label"]) == (
            "BaseSegDataset",
            255,
            False,
        )
        assert dataset["metainfo"]["classes"] == SCENE_CLASSES.names
        assert dataset["metainfo"]["palette"] == [list(color) for color in colors]
        for line in Path(dataset["ann_file"]).read_text().splitlines():
            image, mask = (
                Path(dataset["data_prefix"][prefix]) / f"{line.strip()}{dataset[suffix]}"
                for prefix, suffix in (("img_path", "img_suffix"), ("seg_map_path", "seg_map_suffix"))
            )
            pairs.append((image, mask))
    check_pairs(pairs, photos / "images", out)


def test_names_and_paths_come_back_as_they_were(tmp_path: Path) -> None:
    names = ("it's", 'a "b"', "x: y # z", "{{ f }}", "back\\slash", "line\nbreak\x85", "unlabeled", "Straße")
    classes = ClassSet(names, tuple((k, 0, 0) for k in range(len(names))))
    images, out = tmp_path / "it's: #" / "images", tmp_path / "it's: #" / "maps"
    sample = [Sample("ä b", images / "ä b.JPG")]
    read = {
        trainer: write_for(trainer, images, out, samples=sample, classes=classes).read_text()
        for trainer in ("yolo", "lightly-train", "mmseg")
    }
    yolo, lightly = yaml.safe_load(read["yolo"]), yaml.safe_load(read["lightly-train"])
    assert (yolo["names"], yolo["path"]) == (dict(enumerate(names)), str(images.parent))
    assert lightly["classes"] == yolo["names"] | {255: "unlabeled_"}
    assert lightly["train"] == {"images": str(images), "masks": str(out)}
    config: dict = {}
    exec(read["mmseg"], config)
    assert config["metainfo"]["classes"] == names
    dataset = config["train_dataset"]
    assert (
        dataset["img_suffix"] == ".JPG" and Path(dataset["ann_file"]).read_text(encoding="utf-8") == "ä b\n"
    )


def test_one_suffix_is_one_data_set(project: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "images" / "u" / "07.jpg").unlink()
    label(project, photos, tmp_path / "labels", "mmseg")
    config: dict = {}
    exec((tmp_path / "labels" / "mmseg.py").read_text(), config)
    assert config["train_dataloader"]["dataset"]["type"] == "BaseSegDataset"


def test_the_command_writes_the_file_also_for_finished_labels(
    call, project: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = (
        "label",
        project / "runs/tiny",
        photos / "images",
        tmp_path / "labels",
        "--labeling-ratio",
        0.5,
    )
    assert call(*arguments)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").rglob("*.png")}
    code, out, _ = call(*arguments, "--for", "lightly-train")
    assert code == 0 and str(tmp_path / "labels" / "lightly_train.yaml") in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    data_file = tmp_path / "labels" / "lightly_train.yaml"
    written = data_file.read_text()
    assert call(*arguments, "--for", "lightly-train")[0] == 0 and data_file.read_text() == written
    data_file.write_text(written + "val: {images: a, masks: b}\n")  # as its first lines say
    code, _, error = call(*arguments, "--for", "lightly-train")
    assert code == 2 and data_file.read_text().endswith("val: {images: a, masks: b}\n")
    says(error, str(data_file), "rename it")
    code, _, error = call(*arguments, "--for", "keras")
    assert code == 2 and "mmseg" in error


def test_places_where_yolo_would_find_no_mask(project: Path, photos: Path, tmp_path: Path) -> None:
    with refused(RunError, str(photos / "masks"), "images"):
        label(project, photos, tmp_path / "labels", "yolo")
    photos.rename(project / "images")
    with refused(RunError, "exactly one"):
        label(project, project / "images", project / "images" / "masks", "yolo")
    picture = project / "images" / "images" / "u" / "08.png"
    with refused(RunError, str(picture), "folder"):
        label_folder(project / "runs/tiny", picture, tmp_path / "labels", trainer="mmseg")
    assert not (tmp_path / "labels").exists()
