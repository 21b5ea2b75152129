"""Find images and labels, pair them, and say everything that is wrong with them in one go."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from darseg.data.classes import IGNORE, ClassSet
from darseg.errors import DataError, faults

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png",)
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


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
    `image-path [label-path]` relative to `root`. An image without label path has the label map that lies
    below `labels` as the image lies below `images`, if there is one.
    `every` keeps entries 0, n, 2n, …; `except_every` the others. Without `list_file` they count the images
    that have a label.
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
    image = _decode(path, _read(path), cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label(path: Path, ignore: int = IGNORE) -> np.ndarray:
    """An 8-bit index PNG as uint8 [H, W]; the value `ignore` is read as 255.

    Raises DataError where it is missing, cannot be decoded, or is not an 8-bit grey PNG.
    """
    data = _read(path)
    label = _decode(path, data, cv2.IMREAD_UNCHANGED)
    # The file's own word counts: decoders stretch 1, 2 and 4 bits to 0..255, and class 1 would become 255.
    kind = f"{data[24]}-bit {PNG_COLORS.get(data[25])} PNG" if _is_png(data) else "no PNG"
    if kind != "8-bit grey PNG" or label.ndim != 2:
        raise DataError(
            f"{path}: found {kind}, wanted an 8-bit grey PNG of class indices (single-channel). "
            "Convert colour or palette labels to indices first."
        )
    if ignore != IGNORE:
        label = np.where(label == ignore, np.uint8(IGNORE), label)
    return label


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file."""
    image = read_image(path)
    return image.shape[0], image.shape[1]


def count_pixels(samples: Sequence[Sample], size_of: Callable[[Path], tuple[int, ...]] = image_size) -> int:
    """Pixels of all images, taking all to be as large as the first that can be read (`size_of`: height, width)."""
    for sample in samples:
        with contextlib.suppress(DataError):
            return math.prod(size_of(sample.image)) * len(samples)
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the list and the folders in the recipe.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _decode(path: Path, data: bytes, flags: int) -> np.ndarray:
    if not _complete(data):
        raise DataError(f"{path}: the file is truncated ({len(data)} bytes). Copy or download it again.")
    try:
        # EXIF rotation would turn the image but not its label.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # an empty file, among others
        image = None
    if image is None:
        raise DataError(f"{path}: cannot be decoded as JPEG or PNG. Remove it from the list or replace it.")
    return image


def _is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def _complete(data: bytes) -> bool:
    """False where a JPEG or PNG lacks its end mark: decoders fill the missing part with grey in silence."""
    if _is_png(data):
        return b"IEND" in data
    if not data.startswith(b"\xff\xd8"):
        return True
    # Segments before the scan may hold a whole thumbnail, end mark included; after the picture cameras add more.
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) >= 0


def find_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """id → file for all files below `folder` with one of the suffixes, ids in sorted order.

    Hidden files and folders (.ipynb_checkpoints) are not looked at.
    Raises DataError where a folder is missing or cannot be read, or ids are equal or differ only in case.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. Check data.root, data.images and data.labels in the recipe."
        )
    found: list[tuple[str, Path]] = []
    for directory, subfolders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
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


def _raise_unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: the folder cannot be read ({error.strerror}). Check its permissions."
    ) from error


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
        images, labels = _find_both(source)
        samples = [Sample(name, path, labels.get(name)) for name, path in images.items()]
        where = source.images
        if source.every or source.except_every:
            bare, samples = samples, [sample for sample in samples if sample.label]
            if bare and not samples:
                raise DataError(
                    f"{where}: none of the {len(bare)} images has a label map in {source.labels}, and every and "
                    "except_every count those that have. Check data.labels (same path, .png)."
                )
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


def _find_both(source: Source) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and label maps by id. Label maps in a folder below the images' are no images."""
    images = (
        find_files(source.images, IMAGE_SUFFIXES) if source.images.is_dir() or not source.list_file else {}
    )
    labels = find_files(source.labels, LABEL_SUFFIXES) if source.labels.is_dir() else {}
    if source.images in source.labels.parents:
        images = {name: path for name, path in images.items() if source.labels not in path.parents}
    return images, labels


def _read_list(source: Source, list_file: Path) -> list[Sample]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{list_file}: no such list file. Check the recipe's data section.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read as UTF-8 text ({error}).") from error
    images, labels = _find_both(source)
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
        if label is not None and not os.path.isfile(source.root / label):
            wrong.append(f"line {number}: label {source.root / label} does not exist")
            continue
        path = source.root / image
        if ".." in Path(image).parts or not path.is_relative_to(source.root):
            # Files are named by ids; such an id would lead out of the run folder, perhaps onto the user's label.
            wrong.append(
                f"line {number}: image {image} must lie below data.root, {source.root}, and be written without '..'"
            )
            continue
        if label is not None:
            label_path = source.root / label
        else:
            below = path.relative_to(source.images if path.is_relative_to(source.images) else source.root)
            label_path = labels.get(sample_id(below))
        samples.append(Sample(sample_id(path.relative_to(source.root)), path, label_path))
    if wrong:
        raise DataError(faults(f"{list_file}: {len(wrong)} line(s) lead nowhere", wrong))
    clashes = _clashes([(sample.id, sample.image) for sample in samples])
    if clashes:
        raise DataError(faults(f"{list_file}: listed twice, or ids that differ only in case", clashes))
    return samples


def _split_line(root: Path, entry: str) -> tuple[str, str | None] | None:
    """`image-path [label-path]`: names may contain blanks, so the split is the one whose files exist."""

    def is_image(path: str) -> bool:
        return Path(path).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(root / path)

    if is_image(entry):
        return entry, None
    splits = [(entry[: blank.start()], entry[blank.end() :]) for blank in re.finditer(r"\s+", entry)]
    pairs = [(image, label) for image, label in splits if is_image(image)]
    whole = [(image, label) for image, label in pairs if os.path.isfile(root / label)]
    return next(iter(whole + pairs), None)


def build_manifest(
    classes: ClassSet,
    default: Source,
    labeled: Source | None,
    unlabeled: Source | None,
    validation: Source | None,
    test: Source | None = None,
) -> Manifest:
    """Give every image its role.

    A role without a source takes what the others leave of `default`: labelled the images that have a
    label, unlabelled all that remain, validation and test nothing.

    Raises DataError: an image in two roles, no labelled images, labelled, validation or test images without label.
    """
    sources = {"labeled": labeled, "unlabeled": unlabeled, "validation": validation, "test": test}
    roles = {role: find_samples(source) for role, source in sources.items() if source is not None}
    if labeled is None or unlabeled is None:
        taken = {sample.image for samples in roles.values() for sample in samples}
        rest = [sample for sample in find_samples(default) if sample.image not in taken]
        roles.setdefault("labeled", tuple(sample for sample in rest if sample.label is not None))
        known = {sample.image for sample in roles["labeled"]}
        roles.setdefault("unlabeled", tuple(sample for sample in rest if sample.image not in known))
    manifest = Manifest(
        classes, roles["labeled"], roles["unlabeled"], roles.get("validation", ()), roles.get("test", ())
    )
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
            wrong.append(
                f"{role}: {len(bare)} image(s) without label map, the first is {bare[0]!r}; each needs one in "
                "data.labels (same path, .png) or behind its path in the list"
            )
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


def examine(manifest: Manifest, advance: Callable[[], object] = lambda: None) -> Findings:
    """Read every image and label of a manifest and collect all faults (`darseg check`, and a run's beginning).

    `advance` is called once per sample. Nothing is written.
    """
    classes = manifest.classes
    wrong: list[str] = []
    warnings: list[str] = []
    pixels: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        for role, samples in manifest.roles().items():
            counts = np.zeros(256, np.int64)
            for values, faults_found in pool.map(lambda sample: _examine_sample(sample, classes), samples):
                counts += values
                wrong += faults_found
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


def _examine_sample(sample: Sample, classes: ClassSet) -> tuple[np.ndarray, list[str]]:
    """Counts int64 [256] of the label values, and all faults of image and label."""
    counts, wrong, size = np.zeros(256, np.int64), [], None
    try:
        size = image_size(sample.image)
    except DataError as error:
        wrong.append(str(error))
    if sample.label is None:
        return counts, wrong
    try:
        label = read_label(sample.label, classes.ignore)
    except DataError as error:
        return counts, [*wrong, str(error)]
    if size is not None and label.shape != size:
        wrong.append(
            f"{sample.label}: {label.shape[0]}x{label.shape[1]} pixels, but its image "
            f"{sample.image} has {size[0]}x{size[1]} (height x width)"
        )
    counts += np.bincount(label.reshape(-1), minlength=256)
    line = unknown_values(counts, classes)
    if line:
        wrong.append(f"{sample.label}: {line}")
    return counts, wrong


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
