"""Tiny data sets in the folders of Cityscapes, VOC 2012 and SBD: python tests/draw_layouts.py OUT

Images and labels are drawn scenes whose classes stand for some of the real ones. The other files of a download are
written too: color maps, a test split, lists, images without any label.
Each function returns the truth: name (aachen_000000_000019, 2007_000032) → classes uint8 [H, W], 255 = not labeled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from darseg.data.classes import CITYSCAPES, VOC
from darseg.demo.scenes import draw_scene

SIZE = (97, 129)  # height, width
SEED = 11

# Class of each class of the scenes: sky, road, path, building, vegetation, grass, car, van, person, pole, sign.
AS_CITYSCAPES = (10, 0, 1, 2, 8, 9, 13, 14, 11, 5, 7)
AS_VOC = (0, 0, 0, 18, 16, 0, 7, 6, 15, 20, 20)

# Cityscapes' labels.py: id of each train id, and of three labels that are not evaluated.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
UNLABELED, EGO_VEHICLE, OUT_OF_ROI = 0, 1, 3

TRAIN_CITIES = ("aachen", "bochum", "bremen")
VOC_TRAIN = ("2007_000032", "2007_000039", "2007_000063", "2008_000045")
VOC_VAL = ("2007_000033", "2007_000042", "2008_000009")
VOC_FURTHER = ("2008_000002", "2008_000003", "2008_000007", "2009_000001", "2010_000005", "2011_000007")
"""These have labels only in SBD, and in SegmentationClassAug, which was made from SBD."""
VOC_BARE = ("2008_000001", "2012_000004")
"""These have no labels, as most images of VOC."""


def scene(index: int, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A drawn image and its label, with its classes replaced by `classes`."""
    image, label = draw_scene(SEED, index, SIZE)
    table = np.full(256, 255, np.uint8)
    table[: len(classes)] = classes
    return image, table[label]


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92) if path.suffix == ".jpg" else image.save(path)


def draw_cityscapes(
    root: Path,
    *,
    train_ids: bool = True,
    ids: bool = True,
    cities: Iterable[str] = TRAIN_CITIES,
    per_city: int = 4,
    per_val_city: int = 2,
) -> dict[str, np.ndarray]:
    """Draw `leftImg8bit` and `gtFine` below `root`.

    There are training cities, frankfurt for validation and berlin for the test.

    Args:
        train_ids: write *_labelTrainIds.png, as cityscapesScripts does.
        ids: write *_labelIds.png, as in the download.
    """
    truth = {}
    folders = [("train", city, per_city) for city in cities]
    folders += [("val", "frankfurt", per_val_city), ("test", "berlin", 1)]
    for place, (split, city, count) in enumerate(folders):
        for number in range(count):
            name = f"{city}_{number:06d}_000019"
            image, label = scene(100 * place + number, AS_CITYSCAPES)
            raw = np.full(label.shape, UNLABELED, np.uint8)
            for k, value in enumerate(IDS):
                raw[label == k] = value
            raw[-5:] = EGO_VEHICLE
            raw[:, :2] = OUT_OF_ROI
            label[-5:] = label[:, :2] = 255
            if split == "test":  # its labels are not published
                raw[:] = UNLABELED
                label[:] = 255
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", Image.fromarray(image))
            stem = root / "gtFine" / split / city / f"{name}_gtFine"
            if train_ids:
                save(Path(f"{stem}_labelTrainIds.png"), Image.fromarray(label))
            if ids:
                save(Path(f"{stem}_labelIds.png"), Image.fromarray(raw))
            colors = np.zeros((256, 4), np.uint8)
            colors[: len(CITYSCAPES), :3] = CITYSCAPES.colors
            colors[:, 3] = 255
            save(Path(f"{stem}_color.png"), Image.fromarray(colors[label]))
            save(Path(f"{stem}_instanceIds.png"), Image.fromarray(raw.astype(np.uint16) * 1000))
            polygons = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": []}
            Path(f"{stem}_polygons.json").write_text(json.dumps(polygons))
            truth[name] = label
    return truth


def voc_palette() -> list[int]:
    """VOC's color map of 256 entries, as its development kit computes it."""
    palette = []
    for index in range(256):
        color, rest = [0, 0, 0], index
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (rest >> channel & 1) << 7 - bit
            rest >>= 3
        palette += color
    return palette


def draw_voc(
    root: Path, *, augmented: bool = False, sbd: Path | None = None, train: Sequence[str] = VOC_TRAIN
) -> dict[str, np.ndarray]:
    """Draw `root` as VOCdevkit/VOC2012.

    Args:
        augmented: write SegmentationClassAug, which has the labels of all images.
        sbd: write SBD's .mat files into this folder, for the further images and, without the border, for some of VOC's
            train and val.
        train: names of the images in train.txt.
    """
    truth, whole = {}, {}
    for index, name in enumerate((*train, *VOC_VAL, *VOC_FURTHER, *VOC_BARE)):
        image, label = scene(index, AS_VOC)
        save(root / "JPEGImages" / f"{name}.jpg", Image.fromarray(image))
        if name in VOC_BARE:
            continue
        whole[name] = np.where(label == 255, 0, label).astype(np.uint8)
        truth[name] = whole[name] if name in VOC_FURTHER else label
        if name not in VOC_FURTHER:
            paletted = Image.fromarray(label)  # putpalette makes its mode "P" and keeps the values
            paletted.putpalette(voc_palette())
            save(root / "SegmentationClass" / f"{name}.png", paletted)
        if augmented:
            save(root / "SegmentationClassAug" / f"{name}.png", Image.fromarray(truth[name]))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for role, names in {"train": train, "val": VOC_VAL, "trainval": sorted({*train, *VOC_VAL})}.items():
        (lists / f"{role}.txt").write_text("".join(f"{name}\n" for name in names))
    if sbd is not None:
        draw_sbd(sbd, {name: whole[name] for name in (*VOC_FURTHER, *train[:2], *VOC_VAL[:1])})
    return truth


def draw_sbd(folder: Path, labels: Mapping[str, np.ndarray]) -> None:
    """Draw `folder` as benchmark_RELEASE/dataset: cls/ID.mat and the lists train.txt and val.txt."""
    (folder / "cls").mkdir(parents=True)
    for name, label in labels.items():
        write_mat(folder / "cls" / f"{name}.mat", label)
    names = sorted(labels)
    (folder / "train.txt").write_text("\n".join(names[1:]) + "\n")
    (folder / "val.txt").write_text(names[0] + "\n")


def write_mat(path: Path, label: np.ndarray) -> None:
    """Write a class map as SBD does: GTcls{Boundaries, Segmentation, CategoriesPresent}, compressed."""
    from scipy.io import savemat
    from scipy.sparse import csc_matrix

    boundaries = np.empty((len(VOC) - 1, 1), object)
    for k in range(1, len(VOC)):
        mask = label == k
        boundaries[k - 1, 0] = csc_matrix(mask[:, 1:] != mask[:, :-1])
    present = np.setdiff1d(label, [0, 255]).astype(np.uint8)[:, None]
    gtcls = {"Boundaries": boundaries, "Segmentation": label, "CategoriesPresent": present}
    savemat(path, {"GTcls": gtcls}, do_compression=True)


def draw_all(out: Path) -> None:
    """Draw Cityscapes, VOC and SBD next to each other, as their archives unpack."""
    draw_cityscapes(out / "cityscapes")
    draw_voc(out / "VOCdevkit" / "VOC2012", augmented=True, sbd=out / "benchmark_RELEASE" / "dataset")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw_all(Path(sys.argv[1]))
