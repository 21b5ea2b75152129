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

import numpy as np

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.images import IMAGE_SUFFIXES, image_size
from darseg.data.labels import (
    CITY_IDS,
    LABEL_SUFFIXES,
    PLAIN,
    LabelEncoding,
    decode_label,
    to_classes,
    unknown_values,
    usual_mistakes,
)
from darseg.data.layouts import Layout
from darseg.errors import DataError, faults


@dataclass(frozen=True)
class Sample:
    """An image and, where there is one, its label map.

    `id` is the image's path relative to its root, without suffix, with forward slashes. `encoding` is how the values
    of the label file become classes.
    """

    id: str
    image: Path
    label: Path | None = None
    encoding: LabelEncoding = PLAIN


@dataclass(frozen=True)
class Source:
    """Where the samples of one role come from.

    Without `list_file`: all images below `images`. With it, a line is an id below `images`, or
    `image-path [label-path]` relative to `root`. An image without label path has the label map that lies
    below `labels` as the image lies below `images`, if there is one.
    `every` keeps entries 0, n, 2n, …; `except_every` the others. Without `list_file` they count the images
    that have a label.
    With a `layout` labels are where that data set has them, and `labels` is not looked at; a label path of a list that
    does not exist gives way to the one the layout has. `ids`: these images below `images` instead of all.
    """

    root: Path
    images: Path
    labels: Path
    list_file: Path | None = None
    every: int | None = None
    except_every: int | None = None
    encoding: LabelEncoding = PLAIN
    layout: Layout | None = None
    ids: tuple[str, ...] | None = None


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


def count_pixels(samples: Sequence[Sample], size_of: Callable[[Path], tuple[int, ...]] = image_size) -> int:
    """Pixels of all images, taking all to be as large as the first that can be read (`size_of`: height, width)."""
    for sample in samples:
        with contextlib.suppress(DataError):
            return math.prod(size_of(sample.image)) * len(samples)
    return 0


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

    Raises DataError naming every line that leads nowhere, and every name that is no UTF-8.
    """
    if source.list_file is None:
        images, label_of = _find_both(source)
        if source.ids is not None:
            images = {name: images[name] for name in source.ids if name in images}
        samples = [_sample(source, name, path, label_of(name, path)) for name, path in images.items()]
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
        raise DataError(f"{where}: no images found ({', '.join(IMAGE_SUFFIXES)} are read).")
    odd = [ascii(str(sample.image)) for sample in samples if not _is_utf8(sample.id)]
    if odd:
        raise DataError(
            faults(f"{where}: ids go into records and pages, and these names are no UTF-8, rename them", odd)
        )
    return tuple(samples)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a file's name that Python could only keep, not read
        return False
    return True


LabelOf = Callable[[str, Path], Path | None]
"""(id below the images, image) → its label file."""


def _find_both(source: Source) -> tuple[dict[str, Path], LabelOf]:
    """Images by id, and where their labels are. Label maps in a folder below the images' are no images."""
    images = (
        find_files(source.images, IMAGE_SUFFIXES) if source.images.is_dir() or not source.list_file else {}
    )
    if (layout := source.layout) is not None:
        return images, lambda _, image: layout.label_of(image)
    labels = find_files(source.labels, LABEL_SUFFIXES) if source.labels.is_dir() else {}
    if source.images in source.labels.parents:
        images = {name: path for name, path in images.items() if source.labels not in path.parents}
    return images, lambda name, _: labels.get(name)


def _sample(source: Source, name: str, image: Path, label: Path | None) -> Sample:
    return Sample(name, image, label, source.encoding if label else PLAIN)


def _read_list(source: Source, list_file: Path) -> list[Sample]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{list_file}: no such list file. Check the recipe's data section, or draw lists with darseg split."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read as UTF-8 text ({error}).") from error
    images, label_of = _find_both(source)
    samples, wrong = [], []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        if entry in images:
            samples.append(_sample(source, entry, images[entry], label_of(entry, images[entry])))
            continue
        pair = _split_line(source.root, entry)
        if pair is None:
            wrong.append(
                f"line {number}: {entry!r} is neither an id below {source.images} nor an image path below {source.root}"
            )
            continue
        image, label = pair
        path = source.root / image
        stand_in = source.layout.stand_in(path) if source.layout else None
        if label is not None and not os.path.isfile(source.root / label) and stand_in is None:
            wrong.append(f"line {number}: label {source.root / label} does not exist")
            continue
        if ".." in Path(image).parts or not path.is_relative_to(source.root):
            # Files are named by ids; such an id would lead out of the run folder, perhaps onto the user's label.
            wrong.append(
                f"line {number}: image {image} must lie below data.root, {source.root}, and be written without '..'"
            )
            continue
        if label is not None:
            named = source.root / label
            label_path = named if stand_in is None or named.is_file() else stand_in
        else:
            below = path.relative_to(source.images if path.is_relative_to(source.images) else source.root)
            label_path = label_of(sample_id(below), path)
        samples.append(_sample(source, sample_id(path.relative_to(source.root)), path, label_path))
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

    A role without a source takes what the others leave of `default`: labeled the images that have a
    label, unlabeled all that remain, validation and test nothing.

    Raises DataError: an image in two roles, no labeled images, labeled, validation or test images without label.
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
    where = default.layout.where_labels_are() if default.layout else "data.labels (same path, .png)"
    wrong = _role_faults(manifest, where)
    if wrong:
        raise DataError(faults("The roles of the images do not work out", wrong))
    return manifest


def _role_faults(manifest: Manifest, where: str) -> list[str]:
    wrong = []
    if not manifest.labeled:
        wrong.append(f"no labeled images: at least one image needs a label map in {where}")
    for role in ("labeled", "validation", "test"):
        bare = [sample.id for sample in manifest.roles()[role] if sample.label is None]
        if bare:
            wrong.append(
                f"{role}: {len(bare)} image(s) without label map, the first is {bare[0]!r}; each needs one in "
                f"{where} or behind its path in the list"
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
    """What `examine` found: faults a run would stumble over, warnings it would live with, pixels per class, and
    notes: what was done with files that a reader might not expect."""

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    images: Mapping[str, int]
    pixels: Mapping[str, np.ndarray]  # role → int64 [K + 1], the last entry counts ignored pixels
    notes: tuple[str, ...] = ()


def examine(manifest: Manifest, advance: Callable[[], object] = lambda: None) -> Findings:
    """Read every image and label of a manifest and collect all faults (`darseg check`, and a run's beginning).

    `advance` is called once per sample. Nothing is written.
    """
    classes = manifest.classes
    wrong: list[str] = []
    warnings: list[str] = []
    pixels: dict[str, np.ndarray] = {}
    seen: dict[LabelEncoding, set[int]] = {}
    unread: set[LabelEncoding] = set()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter lock
        for role, samples in manifest.roles().items():
            counts = np.zeros(256, np.int64)
            found = pool.map(lambda sample: _examine_sample(sample, classes), samples)
            for sample, (values, raw, faults_found) in zip(samples, found, strict=True):
                counts += values
                wrong += faults_found
                if sample.label:
                    encoding = sample.encoding.for_file(sample.label)
                    seen.setdefault(encoding, set()).update(raw or ())
                    unread |= {encoding} if raw is None else set()
                advance()
            pixels[role] = np.append(counts[: len(classes)], counts[IGNORE])
    for encoding, raw in seen.items():
        beyond = {value for value in raw if value >= len(classes)} - {encoding.ignore, IGNORE}
        if (
            beyond or encoding not in unread
        ):  # values that are not there may be in files that could not be read
            mistakes = usual_mistakes(raw, classes, encoding)
            (wrong if beyond or raw == {0, IGNORE} else warnings).extend(mistakes)
    if manifest.labeled and not wrong:
        absent = [name for name, count in zip(classes.names, pixels["labeled"], strict=False) if count == 0]
        if len(absent) == len(classes):
            wrong.append("labeled: not one pixel is labeled, every label map holds only the ignore value")
        elif absent:
            warnings.append(
                f"absent from all labeled masks: {', '.join(absent)}. Such a class has no share and can never be "
                "pseudo-labeled; label a few pixels of it, or take it out of data.classes."
            )
    if not manifest.unlabeled:
        warnings.append("no unlabeled images: only round 0 (labeled images alone) can be trained")
    if not manifest.validation:
        warnings.append("no validation images: nothing will be scored; set data.validation (e.g. {every: 5})")
    return Findings(
        tuple(wrong),
        tuple(warnings),
        {role: len(samples) for role, samples in manifest.roles().items()},
        pixels,
        tuple(reading_notes(manifest)),
    )


def reading_notes(manifest: Manifest) -> list[str]:
    """How label files are read where their names decide it."""
    samples = [sample for role in manifest.roles().values() for sample in role]
    ids = sum(
        sample.label is not None and sample.encoding.for_file(sample.label) is CITY_IDS for sample in samples
    )
    return [f"{ids:,} label files hold Cityscapes' ids (labelIds), read as the 19 train ids"] if ids else []


def _examine_sample(sample: Sample, classes: ClassSet) -> tuple[np.ndarray, list[int] | None, list[str]]:
    """Counts int64 [256] of the classes, the values of an index label file, and all faults of image and label.

    The values are None where the label file cannot be read.
    """
    counts, values, wrong, size = np.zeros(256, np.int64), None, [], None
    try:
        size = image_size(sample.image)
    except DataError as error:
        wrong.append(str(error))
    if sample.label is None:
        return counts, values, wrong
    try:
        encoding = sample.encoding.for_file(sample.label)
        raw = decode_label(sample.label, encoding.format)
        values = [] if raw.dtype == np.int32 else np.flatnonzero(np.bincount(raw[raw >= 0])).tolist()
        label = to_classes(raw, encoding, sample.label)
    except DataError as error:
        return counts, values, [*wrong, str(error)]
    if size is not None and label.shape != size:
        wrong.append(
            f"{sample.label}: {label.shape[0]}x{label.shape[1]} pixels, but its image "
            f"{sample.image} has {size[0]}x{size[1]} (height x width)"
        )
    counts += np.bincount(label.reshape(-1), minlength=256)
    line = unknown_values(counts, len(classes))
    if line:
        wrong.append(f"{sample.label}: {line}")
    return counts, values, wrong
