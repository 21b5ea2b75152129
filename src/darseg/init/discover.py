"""An unknown folder → its images, their labels, its list files and its annotation files.

These are guesses by names; the caller lets `survey` read the files. Nothing is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from darseg.data.files import open_file
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.label_parts import Parts
from darseg.data.labels import LABEL_SUFFIXES, decode_label
from darseg.data.video import VIDEO_SUFFIXES
from darseg.data.walk import refuse, walk
from darseg.errors import DataError
from darseg.init.lists import read_lists
from darseg.init.parts import FoundParts, find_parts
from darseg.init.words import Picture, take_apart

MOST_OF_A_TWIN = 64
"""How many different values or colors a file may hold if its name does not distinguish it from a photograph."""


@dataclass(frozen=True)
class FoundImage:
    """An image, its label file, and the part of the data set that folders name (a key of SPLITS).

    With `parts`, the label map is several masks, and `label` is the first of them.
    """

    image: Path
    label: Path | None
    split: str | None
    parts: Parts | None = None


@dataclass(frozen=True)
class Discovery:
    """What is in a folder.

    Attributes:
        images: all images, sorted by path.
        lists: part of the data set → images, from list files; `list_files`: part → the file.
        annotations: files of annotation tools; `annotation_kind`: the format of the first, or empty.
        notes: what is not used, and why.
        parts: the masks of all images, if label maps are several files.
    """

    root: Path
    images: tuple[FoundImage, ...]
    lists: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    list_files: Mapping[str, Path] = field(default_factory=dict)
    annotations: tuple[Path, ...] = ()
    annotation_kind: str = ""
    notes: tuple[str, ...] = ()
    parts: FoundParts | None = None


def discover(root: Path) -> Discovery:
    """Look through a folder. Raises DataError if it cannot be read or holds labels without images."""
    picture_paths, text_paths, video_paths = _walk(root)
    pictures = [take_apart(path, root) for path in picture_paths]
    parts = find_parts(root, pictures)
    images, labels = _tell_apart(pictures) if parts is None else (_without_masks(pictures, parts), [])
    if labels and not images:
        raise DataError(
            f"{root}: by their names, {len(labels)} file(s) are label maps, for example {labels[0].path}, and no file is "
            "an image. Give the folder that holds both."
        )
    if parts is None:
        label_of, notes = _pair(images, labels)
        maps = [label.path for label in labels if label.path.suffix.lower() in LABEL_SUFFIXES]
        lists = read_lists(root, [picture.path for picture in images], maps)
        notes += _follow(lists.labels, label_of)
        found_images = tuple(
            FoundImage(picture.path, label_of.get(picture.path), picture.split) for picture in images
        )
    else:
        masks, notes = parts.of_image, []
        lists = read_lists(root, [picture.path for picture in images], [])
        found_images = tuple(_with_masks(picture, masks.get(picture.path)) for picture in images)
    if video_paths:
        notes.append(
            f"{len(video_paths)} video(s) are not used, for example {video_paths[0]}. To use them, extract their frames "
            "as images"
        )
    kinds = {path: kind for path in text_paths if (kind := _annotation_kind(path))}
    return Discovery(
        root=root,
        images=found_images,
        lists=lists.images,
        list_files=lists.files,
        annotations=tuple(kinds),
        annotation_kind=next(iter(kinds.values()), ""),
        notes=(*notes, *lists.notes),
        parts=parts,
    )


def _follow(named: Mapping[Path, Path], label_of: dict[Path, Path]) -> list[str]:
    """Give images the label maps that lists name, and a note if names would pair others."""
    changed = {image: label for image, label in named.items() if label_of.get(image) != label}
    label_of.update(changed)
    if not changed:
        return []
    image, label = next(iter(changed.items()))
    return [
        f"{len(changed)} image(s) have the label map that a list names, not the one of their own name, for example "
        f"{image} with {label}"
    ]


def _without_masks(pictures: Sequence[Picture], parts: FoundParts) -> list[Picture]:
    """The images: what is no mask and not in a folder of labels."""
    masks = {path for group in parts.of_image.values() for path, _ in group.files}
    return [picture for picture in pictures if not picture.label_folder and picture.path not in masks]


def _with_masks(picture: Picture, parts: Parts | None) -> FoundImage:
    return FoundImage(picture.path, parts.files[0][0] if parts else None, picture.split, parts=parts)


def _walk(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, JSON and XML files, and videos; hidden files and what darseg wrote are left out."""
    pictures, texts, videos = [], [], []
    for directory, names in walk(root, refuse(root)):
        for name in sorted(names):
            path = Path(directory, name)
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES or suffix in LABEL_SUFFIXES:
                pictures.append(path)
            elif suffix in (".json", ".xml"):
                texts.append(path)
            elif suffix in VIDEO_SUFFIXES:
                videos.append(path)
    return pictures, texts, videos


def _tell_apart(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Images and labels."""
    labels = [picture for picture in pictures if picture.label_folder]
    # A word in a name may be part of a picture's name: it makes a label only if there is an image without the word.
    plain = [picture for picture in pictures if not picture.label_folder and not picture.label_name]
    image_names = {picture.full for picture in plain} | {picture.bare for picture in plain}
    labels += [
        picture
        for picture in pictures
        if picture.label_name and not picture.label_folder and picture.bare in image_names
    ]
    if not labels:
        labels = _twins(pictures)
    label_paths = {picture.path for picture in labels}
    return [picture for picture in pictures if picture.path not in label_paths], labels


def _twins(pictures: Sequence[Picture]) -> list[Picture]:
    """Labels that have their images' names except for the suffix, as in a.jpg and a.png."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        groups[picture.full].append(picture)
    candidates: list[Picture] = []
    for group in groups.values():
        label = [picture for picture in group if picture.path.suffix.lower() in LABEL_SUFFIXES]
        if len(group) == 2 and len(label) == 1:
            candidates += label
    sample = candidates[:: max(1, len(candidates) // 8)]
    labels_in_sample = sum(_is_label(picture.path) for picture in sample)
    return candidates if sample and labels_in_sample * 2 > len(sample) else []


def _is_label(path: Path) -> bool:
    try:
        raw = decode_label(path, "auto")
    except DataError:
        return False
    return len(np.unique(raw)) <= MOST_OF_A_TWIN


def _pair(images: Sequence[Picture], labels: Sequence[Picture]) -> tuple[dict[Path, Path], list[str]]:
    """Image → label, and notes. If an image has several labels, the kind with the most pairs counts."""
    image_for = _finder(images)
    pairs: dict[tuple[str, ...], dict[Path, Path]] = defaultdict(dict)
    lonely, jpegs, notes = [], [], []
    several: list[tuple[Path, Path]] = []
    for label in labels:
        if label.path.suffix.lower() not in LABEL_SUFFIXES:
            jpegs.append(label.path)
        elif (image := image_for(label)) is None:
            lonely.append(label.path)
        else:
            first = pairs[label.place].setdefault(image.path, label.path)
            if first != label.path:
                several.append((first, label.path))
    if jpegs:
        notes.append(
            f"{len(jpegs)} label file(s) cannot be used, for example {jpegs[0]}: JPEG and WebP change the values. Export "
            "them again as PNG"
        )
    if several:
        first, second = several[0]
        notes.append(
            f"{len(several)} label file(s) are left out, because their image has another one already, for example "
            f"{second} next to {first}. If each holds a part of the labels, join them into one label map per image first"
        )
    if lonely:
        notes.append(
            f"{len(lonely)} label file(s) belong to no image, for example {lonely[0]}. Give each the name of its image"
        )
    rank = {label.place: label.rank for label in labels}
    label_of: dict[Path, Path] = {}
    for place in sorted(pairs, key=lambda place: (rank[place], -len(pairs[place]), place)):
        fresh = {image: label for image, label in pairs[place].items() if image not in label_of}
        usable = fresh if rank[place] == 0 or (rank[place] == 1 and not label_of) else {}
        unused = [label for image, label in pairs[place].items() if image not in usable]
        label_of.update(usable)
        if unused:
            notes.append(
                f"{len(unused)} file(s) like {unused[0]} are not used: they are additional labels of the same images, "
                "show instances, or are pictures for people"
            )
    return label_of, notes


def _finder(images: Sequence[Picture]) -> Callable[[Picture], Picture | None]:
    """A function: label → its image, or None if no image or several fit."""
    by_full: dict[str, list[Picture]] = defaultdict(list)
    by_bare: dict[str, list[Picture]] = defaultdict(list)
    by_name: dict[str, list[Picture]] = defaultdict(list)
    for picture in images:
        by_full[picture.full].append(picture)
        by_bare[picture.bare].append(picture)
        by_name[PurePosixPath(picture.bare).name].append(picture)

    def image_for(label: Picture) -> Picture | None:
        candidates = (
            by_full.get(label.full),
            by_full.get(label.bare),
            by_bare.get(label.bare),
            by_name.get(PurePosixPath(label.bare).name),
        )
        return next((group[0] for group in candidates if group and len(group) == 1), None)

    return image_for


def _annotation_kind(path: Path) -> str:
    """The annotation format of a file, by its beginning and end; empty for anything else."""
    try:
        with open_file(path) as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 12)))
            text = (head + file.read()).decode("utf-8", "replace")
    except OSError:
        return ""
    if path.suffix.lower() == ".xml":
        return "cvat" if "<annotations" in text else ""
    if '"shapes"' in text:
        return "labelme"
    if '"imgHeight"' in text and '"objects"' in text:
        return "cityscapes"
    if '"annotations"' in text and ('"images"' in text or '"categories"' in text):
        return "coco"
    return ""
