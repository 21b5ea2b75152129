"""Where the published data sets keep their files: Cityscapes, and PASCAL VOC 2012 with SBD."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from darseg.data.encoding import IDS_SUFFIX, TRAIN_IDS_SUFFIX
from darseg.data.files import read_text
from darseg.errors import DataError

CITIES = (
    *("aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt", "hamburg", "hanover"),
    *("jena", "krefeld", "monchengladbach", "strasbourg", "stuttgart", "tubingen", "ulm", "weimar", "zurich"),
)
"""Folders of Cityscapes' training images."""

VALIDATION_CITIES = ("frankfurt", "lindau", "munster")

CITYSCAPES_COUNTS = {"train": 2975, "val": 500}
VOC_COUNTS = {"train": 1464, "val": 1449}
VOC_UNLABELED = 9118
"""Number of images of SBD that are in neither list of VOC 2012."""

# What to unpack if a folder is missing (file names of the official downloads).
ARCHIVES = {
    "leftImg8bit": "leftImg8bit_trainvaltest.zip from cityscapes-dataset.com",
    "gtFine": "gtFine_trainvaltest.zip from cityscapes-dataset.com",
    "JPEGImages": "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012",
    "ImageSets/Segmentation": "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012",
    "SegmentationClass": "VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012",
}
SBD_ARCHIVE = (
    "benchmark.tgz from www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours"
)
"""Semantic Boundaries Dataset (Hariharan et al., ICCV 2011); it unpacks into the folder benchmark_RELEASE."""

NEEDED = {
    "cityscapes": ("leftImg8bit", "gtFine"),
    "voc": ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"),
}
AUGMENTED = "SegmentationClassAug"
VOC_LABELS = ("SegmentationClass", AUGMENTED)
SBD_PLACES = (
    "SBD",
    "benchmark_RELEASE/dataset",
    "../benchmark_RELEASE/dataset",
    "../../benchmark_RELEASE/dataset",
    "../SBD",
    "../../SBD",
)
"""Folders, relative to VOC2012, in which SBD's folder `cls` is searched."""

IMAGE_ENDING = "_leftImg8bit"


@dataclass(frozen=True)
class Layout:
    """A published data set, with its images and labels where its archives unpack them.

    Attributes:
        root: holds `leftImg8bit` and `gtFine`, or `JPEGImages` and `SegmentationClass`.
        sbd: the folder of SBD that holds `cls/ID.mat`; None if there is none.
        train_ids: read Cityscapes' labels as the 19 train ids, from `labelTrainIds`, or mapped from `labelIds`. False is
            for classes of the user's own: read the ids in `labelIds` only, since `labelTrainIds` numbers other classes.
    """

    name: Literal["cityscapes", "voc"]
    root: Path
    sbd: Path | None = None
    train_ids: bool = True

    @property
    def images(self) -> Path:
        return self.root / ("leftImg8bit" if self.name == "cityscapes" else "JPEGImages")

    def label_of(self, image: Path) -> Path | None:
        """The first label file of an image that exists.

        Cityscapes: `labelTrainIds` (only if `train_ids`), then `labelIds`. VOC: `SegmentationClass`, then
        `SegmentationClassAug`, then SBD's.
        """
        return next((path for path in self._candidates(image) if os.path.isfile(path)), None)

    def stand_in(self, image: Path) -> Path | None:
        """The label file to take if a list names one that does not exist."""
        return self.label_of(image) if self.name == "voc" or self.train_ids else None

    def _candidates(self, image: Path) -> Iterable[Path]:
        if self.name == "cityscapes":
            below = image.relative_to(self.root) if image.is_relative_to(self.root) else image
            if below.parts[0] == "leftImg8bit":
                # train_extra has coarse labels only.
                kind = "gtCoarse" if below.parts[1] == "train_extra" else "gtFine"
                stem = image.stem.removesuffix(IMAGE_ENDING)
                folder = self.root.joinpath(kind, *below.parts[1:-1])
                if self.train_ids:
                    yield folder / f"{stem}_{kind}{TRAIN_IDS_SUFFIX}"
                yield folder / f"{stem}_{kind}{IDS_SUFFIX}"
        else:
            for folder in VOC_LABELS:
                yield self.root / folder / f"{image.stem}.png"
            if self.sbd:
                yield self.sbd / "cls" / f"{image.stem}.mat"

    def where_labels_are(self) -> str:
        """The folders of the label files, for messages."""
        if self.name == "cityscapes":
            return f"gtFine (with the path of its image, but ending in {TRAIN_IDS_SUFFIX} or {IDS_SUFFIX})"
        return "SegmentationClass, SegmentationClassAug or SBD's cls"

    def training_ids(self) -> list[str]:
        """Ids of the training images of VOC with SBD: all with a label, except those of val.txt.

        In the published data set these are 1,464 + 9,118.
        """
        segmentation = self.root / "ImageSets/Segmentation"
        ids = set(_list(segmentation / "train.txt"))
        ids |= {path.stem for path in _files(self.root / AUGMENTED, "*.png")}
        if self.sbd:
            ids |= {path.stem for path in _files(self.sbd / "cls", "*.mat")}
        return sorted(ids - set(_list(segmentation / "val.txt")))

    def missing(self) -> list[str]:
        """A line for each missing folder or list, with what to do about it."""
        if not os.path.isdir(self.root):
            archives = dict.fromkeys(ARCHIVES[folder] for folder in NEEDED[self.name])
            return [
                f"{self.root} does not exist. Set data.root to the folder that holds {self.images.name}, or "
                f"{self._get(archive)}."
                for archive in archives
            ]
        folders = self._lacking(self.root)
        if folders and (meant := next((place for place in self._near() if not self._lacking(place)), None)):
            return [
                f"{self.root} does not hold {' and '.join(folders)}, but {meant} does. Set data.root to {meant}."
            ]
        lines = []
        for folder in folders:
            path = self.root / folder
            elsewhere = next((near / folder for near in self._near() if os.path.isdir(near / folder)), None)
            if elsewhere:
                lines.append(
                    f"{path} is missing, but {elsewhere} exists. Move it to {path}, or link it there."
                )
            else:
                lines.append(f"{path} is missing. {_sentence(self._get(ARCHIVES[folder]))}")
        if self.name == "voc" and not lines:
            for name in VOC_COUNTS:
                if not os.path.isfile(self.root / f"ImageSets/Segmentation/{name}.txt"):
                    lines.append(
                        f"{self.root}/ImageSets/Segmentation/{name}.txt is missing. Unpack "
                        f"{ARCHIVES['ImageSets/Segmentation']} again."
                    )
        return lines

    def _get(self, archive: str) -> str:
        """What to do about an archive ("NAME from SITE") that is not unpacked: "unpack …", without a period.

        VOC's and SBD's archives unpack into folders of their own.
        """
        name, _, site = archive.partition(" from ")
        packed = next(
            (near / name for near in (self.root, *self._near()) if os.path.isfile(near / name)), None
        )
        what = f"unpack {packed} in" if packed else f"get {name} from {site} and unpack it in"
        if self.name == "cityscapes":
            return f"{what} {self.root}"
        if self.root.parts[-2:] == ("VOCdevkit", "VOC2012"):
            return f"{what} {self.root.parent.parent}"
        if archive == SBD_ARCHIVE:
            return f"{what} {self.root.parent}"
        return f"{what} any folder, then set data.root to VOCdevkit/VOC2012 in that folder"

    def _lacking(self, root: Path) -> list[str]:
        there = {folder for folder in (*NEEDED[self.name], AUGMENTED) if os.path.isdir(root / folder)}
        if AUGMENTED in there:  # it also has the labels of SegmentationClass
            there.add("SegmentationClass")
        return [folder for folder in NEEDED[self.name] if folder not in there]

    def _near(self) -> list[Path]:
        """Folders that the user may have meant by `root`: inside it, later years first, and around it."""
        inside = [path for pattern in ("*", "*/*") for path in sorted(self.root.glob(pattern), reverse=True)]
        return [*(path for path in inside if os.path.isdir(path)), self.root.parent, self.root.parent.parent]

    def warnings(self) -> list[str]:
        """Lines about what an incomplete download lacks, compared with the published counts."""
        return self._cityscapes_warnings() if self.name == "cityscapes" else self._voc_warnings()

    def _cityscapes_warnings(self) -> list[str]:
        lines = []
        for split, cities in (("train", CITIES), ("val", VALIDATION_CITIES)):
            images = _files(self.images / split, f"*/*{IMAGE_ENDING}.*")
            if len(images) != CITYSCAPES_COUNTS[split]:
                missing = [city for city in cities if not os.path.isdir(self.images / split / city)]
                named = f" These cities have no folder: {', '.join(missing)}." if missing else ""
                lines.append(
                    f"{self.images / split} has {len(images):,} images, but Cityscapes has "
                    f"{CITYSCAPES_COUNTS[split]:,}.{named} If it should be complete, unpack "
                    f"{ARCHIVES['leftImg8bit']} again."
                )
            unpaired = Counter(path.parent.name for path in images if self.label_of(path) is None)
            if unpaired:
                named = ", ".join(f"{city} ({count})" for city, count in sorted(unpaired.items()))
                lines.append(
                    f"{unpaired.total():,} image(s) in {self.images / split} have no label in "
                    f"{self.root / 'gtFine' / split}: {named}. If they should have one, unpack "
                    f"{ARCHIVES['gtFine']} again."
                )
        return lines

    def _voc_warnings(self) -> list[str]:
        lines = []
        segmentation = self.root / "ImageSets/Segmentation"
        for name, count in VOC_COUNTS.items():
            listed = len(_list(segmentation / f"{name}.txt"))
            if listed != count:
                lines.append(
                    f"{segmentation / name}.txt lists {listed:,} images, but VOC 2012's list has {count:,}. If it should "
                    f"be the official list, unpack {ARCHIVES['ImageSets/Segmentation']} again."
                )
        if not os.path.isdir(self.root / "SegmentationClass"):
            lines.append(
                f"{self.root / 'SegmentationClass'} is missing, so the labels in {AUGMENTED} are used. For the official "
                f"labels, {self._get(ARCHIVES['SegmentationClass'])}."
            )
        ids = set(self.training_ids())
        without_image = sorted(ids - {path.stem for path in _files(self.images, "*")})
        if without_image:
            lines.append(
                f"{len(without_image):,} label(s) have no image in {self.images} and are not used, the first is "
                f"{without_image[0]}. Unpack {ARCHIVES['JPEGImages']} again."
            )
        beyond = len(ids - set(_list(segmentation / "train.txt")))
        if beyond == 0:
            lines.append(
                f"Neither {self.root / AUGMENTED} nor SBD's cls/*.mat (in {' or '.join(SBD_PLACES[:2])}, or data.sbd) "
                f"exists, so the {VOC_UNLABELED:,} unlabeled images are not known. For these, {self._get(SBD_ARCHIVE)}."
            )
        elif beyond != VOC_UNLABELED:
            lines.append(
                f"{beyond:,} images have a label and are in neither train.txt nor val.txt, but VOC with SBD has "
                f"{VOC_UNLABELED:,} such images. If it should be complete, unpack SBD's benchmark.tgz again."
            )
        return lines


def find_sbd(root: Path, named: Path | None) -> Path | None:
    """SBD's folder, which holds `cls`: the named one, otherwise one of SBD_PLACES, if any.

    Raises DataError if the named one has no `cls`.
    """
    if named is not None:
        if not os.path.isdir(named / "cls"):
            raise DataError(
                f"data.sbd: {named} has no folder cls. Give benchmark_RELEASE/dataset from SBD's benchmark.tgz."
            )
        return named
    return next((root / place for place in SBD_PLACES if os.path.isdir(root / place / "cls")), None)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files of a pattern, sorted, without the hidden ones that some systems add."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _list(path: Path) -> list[str]:
    """Ids of one of VOC's lists; empty if the list is missing."""
    try:
        return read_text(path).split()
    except FileNotFoundError:
        return []
