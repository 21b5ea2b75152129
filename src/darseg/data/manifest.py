"""Find images and labels, pair them, and say everything that is wrong with them in one go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from darseg.data.classes import IGNORE, ClassSet
from darseg.errors import DataError, faults

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)


@dataclass(frozen=True)
class Sample:
    """An image and, where there is one, its label map.

    `id` is the image's path relative to its root, without suffix, with forward slashes.
    """

    id: str
    image: Path
    label: Path | None = None


@dataclass(frozen=True)
class Source:
    """Where the samples of one role come from.

    Without `list_file`: all images below `images`. With it, a line is an id below `images`, or
    `image-path [label-path]` relative to `root`. `every` keeps entries 0, n, 2n, …; `except_every` the others.
    """

    root: Path
    images: Path
    labels: Path
    list_file: Path | None = None
    every: int | None = None
    except_every: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The samples of every role. `unlabeled` samples may have labels: those are for measuring only."""

    classes: ClassSet
    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()

    def roles(self) -> dict[str, tuple[Sample, ...]]:
        return {
            "labeled": self.labeled,
            "unlabeled": self.unlabeled,
            "validation": self.validation,
            "test": self.test,
        }


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3], RGB. Raises DataError where it is missing or cannot be decoded."""
    image = _decode(path, cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label(path: Path, ignore: int = IGNORE) -> np.ndarray:
    """An 8-bit index PNG as uint8 [H, W]; the value `ignore` is read as 255.

    Raises DataError where it is missing, cannot be decoded, or has colours or 16 bits.
    """
    label = _decode(path, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != np.uint8:
        channels = 1 if label.ndim == 2 else label.shape[2]
        raise DataError(
            f"{path}: found {channels} channel(s) of {label.dtype}, wanted an 8-bit single-channel PNG of "
            "class indices. Convert colour or palette labels to indices first."
        )
    if ignore != IGNORE:
        label = np.where(label == ignore, np.uint8(IGNORE), label)
    return label


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file."""
    image = read_image(path)
    return image.shape[0], image.shape[1]


def _decode(path: Path, flags: int) -> np.ndarray:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the list and the folders in the recipe.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not _complete(data):
        raise DataError(f"{path}: the file is truncated ({len(data)} bytes). Copy or download it again.")
    try:
        # EXIF rotation would turn the image but not its label.
        image = (
            cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
            if data
            else None
        )
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{path}: cannot be decoded as JPEG or PNG. Remove it from the list or replace it.")
    return image


def _complete(data: bytes) -> bool:
    """False where a JPEG or PNG lacks its end mark: decoders fill the missing part with grey in silence."""
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9", max(0, len(data) - 4096)) >= 0
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND", max(0, len(data) - 4096)) >= 0
    return True


def find_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """id → file for all files below `folder` with one of the suffixes, ids in sorted order.

    Raises DataError where the folder is missing, or two files have one id or ids that differ only in case.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. Check data.root, data.images and data.labels in the recipe."
        )
    found: list[tuple[str, Path]] = []
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        for name in names:
            path = Path(directory, name)
            if not name.startswith(".") and path.suffix.lower() in suffixes:
                found.append((sample_id(path.relative_to(folder)), path))
    found.sort()
    clashes = _clashes(found)
    if clashes:
        raise DataError(
            faults(f"{folder}: ids must differ by more than suffix and case, rename one of each", clashes)
        )
    return dict(found)


def sample_id(relative: Path | PurePosixPath | str) -> str:
    """The id of an image from its path relative to its root: without suffix, with forward slashes."""
    return PurePosixPath(Path(relative).with_suffix("")).as_posix()


def _clashes(found: Iterable[tuple[str, Path]]) -> list[str]:
    by_key: dict[str, list[Path]] = {}
    for name, path in found:
        by_key.setdefault(name.casefold(), []).append(path)
    return [" and ".join(map(str, paths)) for paths in by_key.values() if len(paths) > 1]


def find_samples(source: Source) -> tuple[Sample, ...]:
    """All samples of one role, in the order of the list, or of their ids where there is no list.

    Raises DataError naming every line that leads nowhere.
    """
    if source.list_file is None:
        images = find_files(source.images, IMAGE_SUFFIXES)
        labels = find_files(source.labels, LABEL_SUFFIXES) if source.labels.is_dir() else {}
        samples = [Sample(name, path, labels.get(name)) for name, path in images.items()]
        where = source.images
    else:
        samples = _read_list(source, source.list_file)
        where = source.list_file
    if source.every is not None:
        samples = samples[:: source.every]
    if source.except_every is not None:
        samples = [sample for index, sample in enumerate(samples) if index % source.except_every]
    if not samples:
        raise DataError(
            f"{where}: no images found. JPEG and PNG files are read ({', '.join(IMAGE_SUFFIXES)})."
        )
    return tuple(samples)


def _read_list(source: Source, list_file: Path) -> list[Sample]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{list_file}: no such list file. Check the recipe's data section.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read as UTF-8 text ({error}).") from error
    images = find_files(source.images, IMAGE_SUFFIXES) if source.images.is_dir() else {}
    labels = find_files(source.labels, LABEL_SUFFIXES) if source.labels.is_dir() else {}
    samples, wrong = [], []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        if entry in images:
            samples.append(Sample(entry, images[entry], labels.get(entry)))
            continue
        pair = _split_line(source.root, entry)
        if pair is None:
            wrong.append(
                f"line {number}: {entry!r} is neither an id below {source.images} nor an image path below {source.root}"
            )
            continue
        image, label = pair
        if label is not None and not (source.root / label).is_file():
            wrong.append(f"line {number}: label {source.root / label} does not exist")
            continue
        name = sample_id(image)
        if label is None:
            samples.append(Sample(name, source.root / image, labels.get(name)))
        else:
            samples.append(Sample(name, source.root / image, source.root / label))
    if wrong:
        raise DataError(faults(f"{list_file}: {len(wrong)} line(s) lead nowhere", wrong))
    clashes = _clashes([(sample.id, sample.image) for sample in samples])
    if clashes:
        raise DataError(faults(f"{list_file}: listed twice, or ids that differ only in case", clashes))
    return samples


def _split_line(root: Path, entry: str) -> tuple[str, str | None] | None:
    """`image-path [label-path]`: names may contain blanks, so the split is the one whose image exists."""
    if Path(entry).suffix.lower() in IMAGE_SUFFIXES and (root / entry).is_file():
        return entry, None
    parts = entry.split()
    for count in range(1, len(parts)):
        image, label = " ".join(parts[:count]), " ".join(parts[count:])
        if (root / image).is_file():
            return image, label
    return None


def build_manifest(
    classes: ClassSet,
    default: Source,
    labeled: Source | None,
    unlabeled: Source | None,
    validation: Source | None,
    test: Source | None = None,
) -> Manifest:
    """Give every image its role.

    Roles are filled in the order test, validation, labelled, unlabelled. A role without a source takes
    what is left of `default`: labelled the images that have a label, unlabelled those that have none,
    validation and test nothing. A source without list file but with `every` draws from the images that have a label.

    Raises DataError: an image in two roles, no labelled images, labelled, validation or test images without label.
    """

    def samples_of(source: Source | None) -> tuple[Sample, ...]:
        if source is None:
            return ()
        if source.list_file is None and (source.every or source.except_every):
            plain = Source(source.root, source.images, source.labels)
            with_label = [sample for sample in find_samples(plain) if sample.label]
            step = source.every or source.except_every or 1
            keep = source.every is not None
            return tuple(s for index, s in enumerate(with_label) if (index % step == 0) == keep)
        return find_samples(source)

    roles = {"test": samples_of(test), "validation": samples_of(validation)}
    taken = {sample.image for samples in roles.values() for sample in samples}
    named = {sample.image for sample in samples_of(unlabeled)} if unlabeled else set()
    rest = [] if labeled and unlabeled else [s for s in find_samples(default) if s.image not in taken]
    if labeled is not None:
        roles["labeled"] = samples_of(labeled)
    else:
        roles["labeled"] = tuple(s for s in rest if s.label is not None and s.image not in named)
    taken |= {sample.image for sample in roles["labeled"]}
    if unlabeled is not None:
        roles["unlabeled"] = samples_of(unlabeled)
    else:
        roles["unlabeled"] = tuple(s for s in rest if s.image not in taken)
    manifest = Manifest(classes, **roles)
    wrong = _role_faults(manifest)
    if wrong:
        raise DataError(faults("The roles of the images do not work out", wrong))
    return manifest


def _role_faults(manifest: Manifest) -> list[str]:
    wrong = []
    if not manifest.labeled:
        wrong.append(
            "no labelled images: at least one image needs a label map in data.labels (same path, .png)"
        )
    for role in ("labeled", "validation", "test"):
        bare = [sample.id for sample in manifest.roles()[role] if sample.label is None]
        if bare:
            wrong.append(f"{role}: {len(bare)} image(s) without label map, the first is {bare[0]!r}")
    role_of: dict[Path, str] = {}
    for role, samples in manifest.roles().items():
        for sample in samples:
            other = role_of.setdefault(sample.image, role)
            if other != role:
                wrong.append(f"{sample.image} is {other} and {role}: an image has one role")
    return wrong


@dataclass(frozen=True)
class Findings:
    """What `examine` found: faults a run would stumble over, warnings it would live with, pixels per class."""

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    images: Mapping[str, int]
    pixels: Mapping[str, np.ndarray]  # role → int64 [K + 1], the last entry counts ignored pixels


def examine(manifest: Manifest, advance=lambda: None) -> Findings:
    """Read every image and label of a manifest and collect all faults (`darseg check`).

    `advance` is called once per sample. Nothing is written.
    """
    classes = manifest.classes
    wrong: list[str] = []
    warnings: list[str] = []
    pixels: dict[str, np.ndarray] = {}
    for role, samples in manifest.roles().items():
        counts = np.zeros(256, np.int64)
        for sample in samples:
            try:
                height, width = image_size(sample.image)
                if sample.label is not None:
                    label = read_label(sample.label, classes.ignore)
                    if label.shape != (height, width):
                        wrong.append(
                            f"{sample.label}: {label.shape[0]}x{label.shape[1]} pixels, but its image "
                            f"{sample.image} has {height}x{width} (height x width)"
                        )
                    values = np.bincount(label.reshape(-1), minlength=256)
                    line = unknown_values(values, classes)
                    if line:
                        wrong.append(f"{sample.label}: {line}")
                    counts += values
            except DataError as error:
                wrong.append(str(error))
            advance()
        pixels[role] = np.append(counts[: len(classes)], counts[IGNORE])
    if manifest.labeled and not wrong:
        absent = [name for name, count in zip(classes.names, pixels["labeled"], strict=False) if count == 0]
        if len(absent) == len(classes):
            wrong.append("labeled: not one pixel is labelled, every label map holds only the ignore value")
        elif absent:
            warnings.append(
                f"absent from all labelled masks: {', '.join(absent)}. Such a class has no share and can never be "
                "pseudo-labelled; label a few pixels of it, or take it out of data.classes."
            )
    if not manifest.unlabeled:
        warnings.append("no unlabelled images: only round 0 (labelled images alone) can be trained")
    if not manifest.validation:
        warnings.append("no validation images: nothing will be scored; set data.validation (e.g. {every: 5})")
    return Findings(
        tuple(wrong),
        tuple(warnings),
        {role: len(samples) for role, samples in manifest.roles().items()},
        pixels,
    )


def unknown_values(values: np.ndarray, classes: ClassSet) -> str | None:
    """A fault line for label values that are no class, from their counts int64 [256]; None where all is well."""
    unknown = [
        value for value in np.flatnonzero(values).tolist() if value >= len(classes) and value != IGNORE
    ]
    if not unknown:
        return None
    listed = ", ".join(f"{value} ({values[value]} pixels)" for value in unknown[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (
        f"label values outside the classes 0..{len(classes) - 1} and ignore {classes.ignore}: {listed}{more}. "
        "Set data.ignore, or add the classes"
    )
