"""Find images and labels, pair them, and give each image its role."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from darseg.data.classes import ClassSet
from darseg.data.encoding import PLAIN, LabelEncoding
from darseg.data.files import read_text
from darseg.data.images import IMAGE_SUFFIXES, USUAL, Reading, image_size
from darseg.data.label_parts import PartRule, Parts
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.layouts import Layout
from darseg.data.orientation import MarkedLabels
from darseg.data.pairing import Pairs, join, pair, pairing_lines
from darseg.data.splits import held_out_line
from darseg.data.suffixes import found_suffixes
from darseg.data.walk import refuse, walk
from darseg.errors import DataError, faults


@dataclass(frozen=True)
class Sample:
    """An image and its label map, if it has one.

    Attributes:
        id: the image's path relative to its root, without suffix, with forward slashes.
        encoding: how the values of the label file become classes.
        reading: how the pixels of the image file become RGB.
        parts: the masks that make up the label map, if there are several; `label` is the first of them.
        confidence: map of how sure whoever made the label map was; None: not known.
    """

    id: str
    image: Path
    label: Path | None = None
    encoding: LabelEncoding = PLAIN
    reading: Reading = USUAL
    parts: Parts | None = None
    confidence: Path | None = None

    @property
    def label_files(self) -> tuple[Path, ...]:
        """All files that hold the label map."""
        if self.parts is not None:
            return tuple(path for path, _ in self.parts.files)
        return () if self.label is None else (self.label,)


@dataclass(frozen=True)
class Source:
    """Where the samples of one role come from.

    Attributes:
        root: paths in `list_file` are relative to it.
        images: folder; without `list_file` the samples are all images below it.
        labels: folder; an image without a label path has the label map with its path below here, if there is one.
        list_file: a line is an id below `images`, or `image-path [label-path]` relative to `root`.
        every: keeps entries 0, n, 2n, …; without `list_file` only images that have a label count.
        except_every: keeps the entries that `every` would leave out.
        encoding: of the label files.
        reading: of the image files.
        layout: labels are where this data set keeps them, and `labels` is not used. If a label path in a list does not
            exist, the layout's label file is taken instead.
        ids: takes these images below `images` instead of all.
        optional: `images` may be missing; then there are no images that no other source names.
        parts: which files below `labels` are masks of which class, if a label map is several files.
    """

    root: Path
    images: Path
    labels: Path
    list_file: Path | None = None
    every: int | None = None
    except_every: int | None = None
    encoding: LabelEncoding = PLAIN
    reading: Reading = USUAL
    layout: Layout | None = None
    ids: tuple[str, ...] | None = None
    optional: bool = False
    parts: PartRule | None = None


@dataclass(frozen=True)
class Sources:
    """The source of each role, and of all roles that have none (`default`)."""

    default: Source
    labeled: Source | None = None
    unlabeled: Source | None = None
    validation: Source | None = None
    test: Source | None = None

    def roles(self) -> dict[str, Source]:
        """Role → its source, for the roles that have one."""
        sources = {role: getattr(self, role) for role in ("labeled", "unlabeled", "validation", "test")}
        return {role: source for role, source in sources.items() if source is not None}


@dataclass(frozen=True)
class Manifest:
    """The samples of every role. `unlabeled` samples may have labels, which are for measuring only.

    Attributes:
        marks: what the labels of images with an orientation mark say about how these are to be read; None if it was not
            looked at.
        notes: lines about the images that are held out, and about label maps whose names differ from their images'.
        warnings: lines about label maps that belong to no image.
    """

    classes: ClassSet
    labeled: tuple[Sample, ...]
    unlabeled: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()
    marks: MarkedLabels | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def roles(self) -> dict[str, tuple[Sample, ...]]:
        return {
            "labeled": self.labeled,
            "unlabeled": self.unlabeled,
            "validation": self.validation,
            "test": self.test,
        }


def count_pixels(samples: Sequence[Sample], size_of: Callable[[Path], tuple[int, ...]] | None = None) -> int:
    """Estimate the pixels of all images: as if each were as large as the first that can be read.

    Args:
        size_of: image file → height and width; None: as the sample is read.
    """
    for sample in samples:
        with contextlib.suppress(DataError):
            size = image_size(sample.image, sample.reading) if size_of is None else size_of(sample.image)
            return math.prod(size) * len(samples)
    return 0


def find_files(folder: Path, suffixes: Sequence[str], *, labels: bool = False) -> dict[str, Path]:
    """Id → file, for all files below `folder` with one of the suffixes, sorted by id.

    Hidden files and folders (.ipynb_checkpoints) are ignored, folders that darseg wrote, and those below `folder` that
    cannot be read; see `walk` and `unreadable`.

    Args:
        labels: label maps are looked for, so that a folder counts for every link to it.

    Raises DataError if a folder is missing or unreadable, or if ids are equal or differ only in case.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: this folder does not exist. Check data.root, data.images and data.labels in the recipe."
        )
    files: list[tuple[str, Path]] = []
    for directory, names in walk(folder, refuse(folder), labels=labels):
        base = Path(directory)
        start = "" if base == folder else f"{base.relative_to(folder).as_posix()}/"
        for name in names:
            stem, suffix = os.path.splitext(name)  # of 100,000 files paths would take most of the time
            if suffix.lower() in suffixes and not name.startswith("."):
                files.append((start + stem, base / name))
    files.sort()
    clashes = _clashes(files)
    if clashes:
        raise DataError(
            faults(
                f"{folder}: these names differ only in suffix or case, so they would have the same id. Rename one of "
                "each",
                clashes,
            )
        )
    return dict(files)


FindFiles = Callable[..., dict[str, Path]]
"""`find_files`, or a version of it that remembers what it has found."""


def sample_id(relative: Path | PurePosixPath | str) -> str:
    """The id of an image from its path relative to its root: without suffix, with forward slashes."""
    return PurePosixPath(Path(relative).with_suffix("")).as_posix()


def _clashes(files: Iterable[tuple[str, Path]]) -> list[str]:
    """A line for each group of files whose ids are equal but for case."""
    by_key: dict[str, list[Path]] = {}
    for name, path in files:
        by_key.setdefault(name.casefold(), []).append(path)
    return [" and ".join(map(str, paths)) for paths in by_key.values() if len(paths) > 1]


def find_samples(source: Source, find: FindFiles = find_files) -> tuple[Sample, ...]:
    """All samples of one role, in the order of the list; without a list, sorted by id.

    Raises DataError naming every line of the list that cannot be used, and every name that is not UTF-8.
    """
    if source.list_file is None:
        images, label_of = _find_both(source, find)
        if source.ids is not None:
            images = {name: images[name] for name in source.ids if name in images}
        samples = [
            _sample(source, name, image=path, label=label_of(name, path)) for name, path in images.items()
        ]
        where = source.images
        if source.every or source.except_every:
            everything, samples = samples, [sample for sample in samples if sample.label]
            if everything and not samples:
                raise DataError(
                    f"{where}: none of the {len(everything)} images has a label map in {source.labels}, but every and "
                    "except_every count only images that have one. Check data.labels. A label map there has the path of "
                    "its image, but ends in .png."
                )
    else:
        samples = _read_list(source, source.list_file, find)
        where = source.list_file
    if source.every is not None:
        samples = samples[:: source.every]
    if source.except_every is not None:
        samples = [sample for index, sample in enumerate(samples) if index % source.except_every]
    if not samples:
        types = f"there are no images here. These types are read: {', '.join(IMAGE_SUFFIXES)}"
        empty = "this list names no images. Add some, or remove its key from the recipe"
        raise DataError(f"{where}: {types if source.list_file is None else empty}.")
    undecodable = [ascii(str(sample.image)) for sample in samples if not _is_utf8(sample.id)]
    if undecodable:
        raise DataError(
            faults(f"{where}: these file names are not valid UTF-8. Rename the files", undecodable)
        )
    return tuple(samples)


def _pairs(source: Source) -> bool:
    """Whether images and label maps of a source are paired by their names in two folders."""
    return source.layout is None and source.labels.is_dir() and source.images.is_dir()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python keeps bytes of a file name that it cannot decode as surrogates
        return False
    return True


LabelOf = Callable[[str, Path], Path | Parts | None]
"""(id below the images, image) → its label file, or its masks."""


def _find_both(source: Source, find: FindFiles) -> tuple[Mapping[str, Path], LabelOf]:
    """Images by id, and where their labels are."""
    if (layout := source.layout) is not None:
        images = find(source.images, IMAGE_SUFFIXES) if source.images.is_dir() or not source.list_file else {}
        return images, lambda _, image: layout.label_of(image)
    pairs = _folders(source, find)
    return pairs.images, lambda name, _: pairs.label_file(name)


def _folders(source: Source, find: FindFiles) -> Pairs:
    """Images and label files of a source without layout; label maps below the images are no images."""
    images = find(source.images, IMAGE_SUFFIXES) if source.images.is_dir() or not source.list_file else {}
    labels = find(source.labels, LABEL_SUFFIXES, labels=True) if source.labels.is_dir() else {}
    if source.images in source.labels.parents:
        images = {name: path for name, path in images.items() if source.labels not in path.parents}
    if source.parts is not None:
        return join(images, labels, source.parts)
    return pair(images, labels)


def _sample(source: Source, name: str, *, image: Path, label: Path | Parts | None) -> Sample:
    if isinstance(label, Parts):
        return Sample(name, image, label.files[0][0], reading=source.reading, parts=label)
    encoding = source.encoding if label else PLAIN
    return Sample(name, image, label, encoding=encoding, reading=source.reading)


def _read_list(source: Source, list_file: Path, find: FindFiles) -> list[Sample]:
    try:
        lines = read_text(list_file, "utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{list_file}: this list file does not exist. Check the data section of the recipe, or draw lists with "
            "darseg split."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{list_file}: this list cannot be read ({error}). Save it as UTF-8 text, one line per image."
        ) from error
    images, label_of = _find_both(source, find)
    samples, problems = [], []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if entry in images:
            image = images[entry]
            samples.append(_sample(source, entry, image=image, label=label_of(entry, image)))
        elif entry:
            try:
                samples.append(_sample_of_line(source, entry, label_of))
            except DataError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(faults(f"{list_file}: {len(problems)} line(s) of this list cannot be used", problems))
    clashes = _clashes([(sample.id, sample.image) for sample in samples])
    if clashes:
        raise DataError(
            faults(f"{list_file}: these images are listed twice, or their ids differ only in case", clashes)
        )
    return samples


def _sample_of_line(source: Source, entry: str, label_of: LabelOf) -> Sample:
    """The sample of a line that is not an id. Raises DataError, without the line's number."""
    pair = _split_line(source.root, entry)
    if pair is None:
        raise DataError(
            f"{entry!r} is neither the id of an image in {source.images} nor the path of one in {source.root}."
        )
    image, label = pair
    if label is not None and source.parts is not None:
        raise DataError(
            f"the line has a label path ({label}), but data.label_parts says which masks belong to an image. Keep the "
            "image's path alone."
        )
    path = source.root / image
    stand_in = source.layout.stand_in(path) if source.layout else None
    if label is not None and not os.path.isfile(source.root / label) and stand_in is None:
        raise DataError(f"the label file {source.root / label} does not exist.")
    if ".." in Path(image).parts or not path.is_relative_to(source.root):
        # Files are named by ids. Such an id would lead out of the run folder, perhaps onto the user's label.
        raise DataError(
            f"the image {image} must be inside data.root ({source.root}), with no '..' in its path."
        )
    if label is None:
        below = path.relative_to(source.images if path.is_relative_to(source.images) else source.root)
        label_file = label_of(sample_id(below), path)
    else:
        listed = source.root / label
        label_file = listed if stand_in is None or listed.is_file() else stand_in
    return _sample(source, sample_id(path.relative_to(source.root)), image=path, label=label_file)


def _split_line(root: Path, entry: str) -> tuple[str, str | None] | None:
    """Image path and label path of a line; None if it names no image.

    Names may contain blanks, so the line is split where both files exist; otherwise where the image exists.
    """

    def is_image(path: str) -> bool:
        return Path(path).suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(root / path)

    if is_image(entry):
        return entry, None
    splits = [(entry[: blank.start()], entry[blank.end() :]) for blank in re.finditer(r"\s+", entry)]
    pairs = [(image, label) for image, label in splits if is_image(image)]
    whole = [(image, label) for image, label in pairs if os.path.isfile(root / label)]
    return next(iter(whole + pairs), None)


def build_manifest(classes: ClassSet, sources: Sources) -> Manifest:
    """Give every image its role.

    A role without a source takes what the others leave of `sources.default`: labeled takes the images that have a label,
    unlabeled all that remain, validation and test nothing.

    Raises DataError if an image has two roles, if there are no labeled images, or if a labeled, validation or test image
    has no label.
    """
    default = sources.default
    find = functools.cache(find_files)  # roles often share their folders
    roles = {role: find_samples(source, find) for role, source in sources.roles().items()}
    if default.optional and sources.labeled is not None and not default.images.is_dir():
        roles.setdefault("unlabeled", ())
    if sources.labeled is None or "unlabeled" not in roles:
        taken = {sample.image for samples in roles.values() for sample in samples}
        rest = [sample for sample in find_samples(default, find) if sample.image not in taken]
        roles.setdefault("labeled", tuple(sample for sample in rest if sample.label is not None))
        labeled = {sample.image for sample in roles["labeled"]}
        roles.setdefault("unlabeled", tuple(sample for sample in rest if sample.image not in labeled))
    manifest = Manifest(
        classes,
        roles["labeled"],
        roles["unlabeled"],
        validation=roles.get("validation", ()),
        test=roles.get("test", ()),
    )
    where = (
        default.layout.where_labels_are()
        if default.layout
        else "data.labels (with a name as in data.label_parts)"
        if default.parts
        else "data.labels (with the path of its image, but ending in .png)"
    )
    named = {
        (each.images, each.labels): each for each in (default, *sources.roles().values()) if _pairs(each)
    }
    folders = [_folders(source, find) for source in named.values()]
    label_of = {sample.image: sample.label for samples in manifest.roles().values() for sample in samples}
    problems = [
        *_role_faults(manifest, where),
        *(line for pairs in folders for line in pairs.faults(label_of)),
    ]
    if problems:
        problems += [] if default.layout or manifest.labeled else _label_files(default)
        raise DataError(faults("The images cannot be given their roles", problems))
    notes, warnings = pairing_lines(folders, label_of)
    held_out = [
        held_out_line(role, names, source.list_file or source.images, every=source.every)
        for role, source in sources.roles().items()
        if role in ("validation", "test") and (names := [sample.id for sample in manifest.roles()[role]])
    ]
    return replace(manifest, notes=(*held_out, *notes), warnings=warnings)


def _label_files(source: Source) -> list[str]:
    """What the folder of label maps holds instead."""
    listed = found_suffixes(source.labels) if source.labels.is_dir() else "the folder does not exist"
    return [f"{source.labels}: {listed}. Label maps are read from {', '.join(LABEL_SUFFIXES)}."]


def _role_faults(manifest: Manifest, where: str) -> list[str]:
    problems = []
    if not manifest.labeled:
        problems.append(f"There are no labeled images. At least one image needs a label map in {where}.")
    for role in ("labeled", "validation", "test"):
        unpaired = [sample.id for sample in manifest.roles()[role] if sample.label is None]
        if unpaired:
            problems.append(
                f"{role}: {len(unpaired)} image(s) have no label map, the first is {unpaired[0]!r}. Each needs one in "
                f"{where}, or after its path in the list."
            )
    role_of: dict[Path, str] = {}
    for role, samples in manifest.roles().items():
        for sample in samples:
            earlier = role_of.setdefault(sample.image, role)
            if earlier != role:
                problems.append(
                    f"{sample.image} is both {earlier} and {role}. Remove it from one of the two."
                )
    return problems
