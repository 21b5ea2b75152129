"""Several masks per picture: patterns for `data.label_parts`, if file names show them clearly."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from darseg.data.classes import IGNORE
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.label_parts import PartRule, Parts, join_parts
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.manifest import sample_id
from darseg.errors import DataError
from darseg.init.words import (
    COLOR_WORDS,
    FILLERS,
    IMAGE_WORDS,
    LABEL_WORDS,
    OTHER_WORDS,
    SPLIT_OF,
    Picture,
    words_of,
)

MOST_CLASSES = 50
"""So many patterns are names of something else."""

MOST_READ = 24
"""Files that are read to see whether they are masks."""

BACKGROUND = "background"
OBJECT = "object"
"""The class of masks that are only numbered, if pictures have different numbers of them."""

PEOPLE = frozenset(("annotator", "expert", "observer", "rater", "reader", "user"))
"""Words for masks of the same things by several people."""

LABEL_STUDIO = re.compile(r"(.*)-annotation-\d+-by-\d+-tag-(.+)-\d+")


@dataclass(frozen=True)
class FoundParts:
    """Masks of which several make up a label map.

    Attributes:
        images, labels: folders below the root.
        patterns: class → pattern, as in a recipe.
        of_image: image → its masks.
        background: pixels of no mask are the first class; otherwise they are not labeled.
        unused: files in the folder of labels that are no masks of an image.
    """

    images: str
    labels: str
    patterns: Mapping[str, str]
    of_image: Mapping[Path, Parts]
    background: bool
    unused: int

    @property
    def classes(self) -> list[str]:
        return [BACKGROUND, *self.patterns] if self.background else list(self.patterns)


def find_parts(root: Path, pictures: Sequence[Picture]) -> FoundParts | None:
    """The masks of a folder; None if there are none, or if it is not clear which is which."""
    images = [p.path for p in pictures if not p.label_folder and p.path.suffix.lower() in IMAGE_SUFFIXES]
    masks = [p.path for p in pictures if p.label_folder] or images
    masks = [path for path in masks if path.suffix.lower() in LABEL_SUFFIXES]
    if not images or len(masks) < 2:
        return None
    folder, labels = (
        Path(os.path.commonpath([str(path.parent) for path in group])) for group in (images, masks)
    )
    image_of = {sample_id(path.relative_to(folder)): path for path in images}
    mask_of = {sample_id(path.relative_to(labels)): path for path in masks}
    if folder != labels and image_of.keys() & mask_of.keys():
        return None  # whole label maps
    patterns = _patterns(mask_of, image_of.keys())
    if patterns is None:
        return None
    has_background = BACKGROUND not in patterns
    rule = PartRule(
        tuple((pattern, at + has_background) for at, pattern in enumerate(patterns.values())),
        0 if has_background else IGNORE,
    )
    try:
        parts = rule.group(mask_of, image_of)
    except DataError:
        return None
    used = [path for group in parts.values() for path, _ in group.files]
    if max(len(group.files) for group in parts.values()) < 2 or not _are_masks(used):
        return None
    below = [path.relative_to(root).as_posix() for path in (folder, labels)]
    return FoundParts(
        images=below[0],
        labels=below[1],
        patterns=patterns,
        of_image={image_of[name]: group for name, group in parts.items()},
        background=has_background,
        unused=0 if folder == labels else len(masks) - len(used),
    )


def _patterns(masks: Mapping[str, Path], images: Set[str]) -> dict[str, str] | None:
    """Class → pattern of all masks that begin or end like an image; None if they are not clear."""
    owners: dict[str, set[str]] = {}  # pattern → images
    for name in masks:
        if (found := _split(name, images)) is not None:
            owners.setdefault(found[0], set()).add(found[1])
    named = {pattern: _class_name(pattern) for pattern in owners}
    if len(owners) < 2 or not all(named.values()):
        return None
    if all(name is not None and name.isdigit() for name in named.values()):
        if len({frozenset(group) for group in owners.values()}) > 1:
            general = {re.sub(r"\d+(?=\D*$)", "*", pattern) for pattern in owners}
            return {OBJECT: general.pop()} if len(general) == 1 else None
        named = {pattern: f"class_{name}" for pattern, name in named.items()}
    classes = {name: pattern for pattern, name in sorted(named.items()) if name}
    return classes if len(classes) == len(owners) <= MOST_CLASSES else None


def _split(name: str, images: Set[str]) -> tuple[str, str] | None:
    """The pattern of a mask and the id of its image; None if it has none."""
    if match := LABEL_STUDIO.fullmatch(name):
        pattern = f"{{id}}-annotation-*-tag-{match[2]}-*"
        return (pattern, match[1]) if match[1] in images else None
    folders = name.split("/")
    for depth in range(len(folders)):
        head, tail = "/".join(folders[:depth]), "/".join(folders[depth:])
        for end in _ends(tail):
            if tail[:end] in images and (head or end < len(tail)):
                return f"{head}/{{id}}{tail[end:]}" if head else f"{{id}}{tail[end:]}", tail[:end]
    return None


def _ends(name: str) -> Iterator[int]:
    """Where an image's id may end within the name of a mask, the longest first."""
    yield len(name)
    yield from reversed([match.start() for match in re.finditer(r"[_\-. ]", name)])


def _class_name(pattern: str) -> str | None:
    """What a pattern says besides words for masks; None if that is not the name of a class."""
    if "*" in pattern:
        return pattern.removeprefix("{id}-annotation-*-tag-").removesuffix("-*")
    words = [word for word in words_of(pattern.replace("{id}", "_")) if word not in LABEL_WORDS | FILLERS]
    unclear = IMAGE_WORDS | COLOR_WORDS | OTHER_WORDS | PEOPLE | SPLIT_OF.keys()
    return None if unclear & {re.sub(r"\d+$", "", word) for word in words} else "_".join(words)


def _are_masks(paths: Sequence[Path]) -> bool:
    """Whether some of the files, spread over all, mark pixels by one value."""
    try:
        for path in paths[:: max(1, len(paths) // MOST_READ)]:
            join_parts(Parts(((path, 0),), IGNORE))
    except DataError:
        return False
    return True
