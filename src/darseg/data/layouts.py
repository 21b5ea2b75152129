"""Where the published data sets keep their files: Cityscapes, and PASCAL VOC 2012 with SBD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from darseg.data.labels import IDS_SUFFIX, TRAIN_IDS_SUFFIX
from darseg.errors import DataError

CITIES = (
    *("aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt", "hamburg", "hanover"),
    *("jena", "krefeld", "monchengladbach", "strasbourg", "stuttgart", "tubingen", "ulm", "weimar", "zurich"),
)
"""Of Cityscapes' training images."""

VALIDATION_CITIES = ("frankfurt", "lindau", "munster")

CITYSCAPES_COUNTS = {"train": 2975, "val": 500}
VOC_COUNTS = {"train": 1464, "val": 1449}
VOC_UNLABELED = 9118
"""Images of SBD that are in neither list of VOC 2012."""

# What to unpack where a folder is missing (file names of the official downloads).
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
"""Semantic Boundaries Dataset (Hariharan et al., ICCV 2011); brings the folder benchmark_RELEASE."""

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
"""Where SBD's folder `cls` is looked for, relative to VOC2012."""

IMAGE_ENDING = "_leftImg8bit"


@dataclass(frozen=True)
class Layout:
    """A published data set below `root`: `leftImg8bit` + `gtFine`, or `JPEGImages` + `SegmentationClass` + SBD.

    Attributes:
        sbd: the folder of SBD that holds `cls/ID.mat`; None where there is none.
        train_ids: of Cityscapes' labels the 19 train ids are wanted: `labelTrainIds`, else `labelIds`, which are mapped.
            False: the ids of the download are, for classes of the user's own, and those of the other file mean others.
    """

    name: Literal["cityscapes", "voc"]
    root: Path
    sbd: Path | None = None
    train_ids: bool = True

    @property
    def images(self) -> Path:
        return self.root / ("leftImg8bit" if self.name == "cityscapes" else "JPEGImages")

    def label_of(self, image: Path) -> Path | None:
        """The label file of an image, the first there is.

        Cityscapes: `labelTrainIds`, if these are wanted, else `labelIds`. VOC: `SegmentationClass`, else
        `SegmentationClassAug`, else SBD's.
        """
        return next((path for path in self._candidates(image) if path.is_file()), None)

    def stand_in(self, image: Path) -> Path | None:
        """The label file to take where a list names one that does not exist."""
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
        """For messages."""
        if self.name == "cityscapes":
            return f"gtFine (as its image, …{TRAIN_IDS_SUFFIX} or …{IDS_SUFFIX})"
        return "SegmentationClass, SegmentationClassAug or SBD's cls"

    def training_ids(self) -> list[str]:
        """Ids of VOC's training images with SBD's: 1,464 + 9,118, every image with a label but those of val.txt."""
        segmentation = self.root / "ImageSets/Segmentation"
        ids = set(_list(segmentation / "train.txt"))
        ids |= {path.stem for path in _files(self.root / AUGMENTED, "*.png")}
        if self.sbd:
            ids |= {path.stem for path in _files(self.sbd / "cls", "*.mat")}
        return sorted(ids - set(_list(segmentation / "val.txt")))

    def missing(self) -> list[str]:
        """A line for each folder that is not there, and what to do about it."""
        if not self.root.is_dir():
            archives = dict.fromkeys(ARCHIVES[folder] for folder in NEEDED[self.name])
            return [
                f"{self.root} does not exist: set data.root to the folder that holds {self.images.name}, or "
                f"{self._get(archive)}"
                for archive in archives
            ]
        folders = self._lacking(self.root)
        if folders and (meant := next((place for place in self._near() if not self._lacking(place)), None)):
            return [f"{self.root} has no {' and no '.join(folders)}, {meant} has: set data.root to that"]
        lines = []
        for folder in folders:
            path = self.root / folder
            elsewhere = next((near / folder for near in self._near() if (near / folder).is_dir()), None)
            if elsewhere:
                lines.append(f"{path} is missing, but {elsewhere} is there: move or link it to {path}")
            else:
                lines.append(f"{path} is missing: {self._get(ARCHIVES[folder])}")
        if self.name == "voc" and not lines:
            for name in VOC_COUNTS:
                if not (self.root / f"ImageSets/Segmentation/{name}.txt").is_file():
                    lines.append(
                        f"{self.root}/ImageSets/Segmentation/{name}.txt is missing: unpack "
                        f"{ARCHIVES['ImageSets/Segmentation']} again"
                    )
        return lines

    def _get(self, archive: str) -> str:
        """What to do to have an archive ("NAME from SITE") unpacked. VOC's and SBD's bring their own folders."""
        name, _, site = archive.partition(" from ")
        packed = next((near / name for near in (self.root, *self._near()) if (near / name).is_file()), None)
        what = (
            f"{packed} is still packed: unpack it in"
            if packed
            else f"get {name} from {site} and unpack it in"
        )
        if self.name == "cityscapes":
            return f"{what} {self.root}"
        if self.root.parts[-2:] == ("VOCdevkit", "VOC2012"):
            return f"{what} {self.root.parent.parent}"
        if archive == SBD_ARCHIVE:
            return f"{what} {self.root.parent}"
        return f"{what} a folder of your choice; then set data.root to VOCdevkit/VOC2012 in it"

    def _lacking(self, root: Path) -> list[str]:
        there = {folder for folder in (*NEEDED[self.name], AUGMENTED) if (root / folder).is_dir()}
        if AUGMENTED in there:  # has the labels of the other, too
            there.add("SegmentationClass")
        return [folder for folder in NEEDED[self.name] if folder not in there]

    def _near(self) -> list[Path]:
        """Folders that `root` may have been meant to be: in it, later years first, in those, and around it."""
        inside = [path for pattern in ("*", "*/*") for path in sorted(self.root.glob(pattern), reverse=True)]
        return [*(path for path in inside if path.is_dir()), self.root.parent, self.root.parent.parent]

    def warnings(self) -> list[str]:
        """What a half-unpacked or half-loaded download lacks, compared with the published counts."""
        return self._cityscapes_warnings() if self.name == "cityscapes" else self._voc_warnings()

    def _cityscapes_warnings(self) -> list[str]:
        lines = []
        for split, cities in (("train", CITIES), ("val", VALIDATION_CITIES)):
            images = _files(self.images / split, f"*/*{IMAGE_ENDING}.*")
            if len(images) != CITYSCAPES_COUNTS[split]:
                gone = [city for city in cities if not (self.images / split / city).is_dir()]
                named = f"; cities without a folder: {', '.join(gone)}" if gone else ""
                lines.append(
                    f"{self.images / split} has {len(images):,} images, Cityscapes has {CITYSCAPES_COUNTS[split]:,}"
                    f"{named}. Unpack {ARCHIVES['leftImg8bit']} again if it should be whole"
                )
            bare = Counter(path.parent.name for path in images if self.label_of(path) is None)
            if bare:
                named = ", ".join(f"{city} ({count})" for city, count in sorted(bare.items()))
                lines.append(
                    f"{bare.total():,} images in {self.images / split} have no label in {self.root / 'gtFine' / split}: "
                    f"{named}. Unpack {ARCHIVES['gtFine']} again if they should have"
                )
        return lines

    def _voc_warnings(self) -> list[str]:
        lines = []
        segmentation = self.root / "ImageSets/Segmentation"
        for name, count in VOC_COUNTS.items():
            found = len(_list(segmentation / f"{name}.txt"))
            if found != count:
                lines.append(
                    f"{segmentation / name}.txt lists {found:,} images, VOC 2012 has {count:,}. Unpack "
                    f"{ARCHIVES['ImageSets/Segmentation']} again if it should be the official list"
                )
        if not (self.root / "SegmentationClass").is_dir():
            lines.append(
                f"{self.root / 'SegmentationClass'} is missing; the labels in {AUGMENTED} are taken instead. To have the "
                f"official ones, {self._get(ARCHIVES['SegmentationClass'])}"
            )
        ids = set(self.training_ids())
        bare = sorted(ids - {path.stem for path in _files(self.images, "*")})
        if bare:
            lines.append(
                f"{len(bare):,} images with a label are not in {self.images} and are left out, the first is {bare[0]}. "
                f"Unpack {ARCHIVES['JPEGImages']} again"
            )
        beyond = len(ids - set(_list(segmentation / "train.txt")))
        if beyond == 0:
            lines.append(
                f"neither {self.root / AUGMENTED} nor SBD's cls/*.mat (in {' or '.join(SBD_PLACES[:2])}, or data.sbd) is "
                f"there, so which {VOC_UNLABELED:,} images are unlabeled cannot be told: {self._get(SBD_ARCHIVE)}"
            )
        elif beyond != VOC_UNLABELED:
            lines.append(
                f"{beyond:,} images have a label besides those of train.txt and val.txt; VOC with SBD has "
                f"{VOC_UNLABELED:,}. Unpack SBD's benchmark.tgz again if it should be whole"
            )
        return lines


def find_sbd(root: Path, given: Path | None) -> Path | None:
    """SBD's folder, which holds `cls`: the given one, or one of SBD_PLACES. Raises DataError for one without `cls`."""
    if given is not None:
        if not (given / "cls").is_dir():
            raise DataError(
                f"data.sbd: {given} has no folder cls. Give benchmark_RELEASE/dataset of SBD's benchmark.tgz."
            )
        return given
    return next((root / place for place in SBD_PLACES if (root / place / "cls").is_dir()), None)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Without the hidden ones that some systems add."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _list(path: Path) -> list[str]:
    """Ids of one of VOC's lists; none where it is missing."""
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []
