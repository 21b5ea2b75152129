"""Which label map belongs to which image, if their names are not quite the same.

Names are compared in this order, and what one comparison pairs is left out of the next:

* as they are;
* in one composition of their letters (Unicode NFC): a zip from a Mac has ü as two characters;
* without regard to case;
* without the label map's words (`a_mask` and `a.jpg` for the image `a`), then without the image's words, too.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.label_parts import PartRule, Parts

_LABEL = "masks?|labels?|gt|seg|segmentation|annotations?|annot|ground_?truth|labelmap|lbl"
_IMAGE = "images?|img|rgb|photo|frame|sat"
_SUFFIX = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_OF_LABEL = re.compile(rf"[_\-. ]({_LABEL})$|(?<![^/])({_LABEL})[_\-. ](?=[^/]+$)|\.({_SUFFIX})$")
_OF_IMAGE = re.compile(rf"[_\-. ]({_IMAGE})$|(?<![^/])({_IMAGE})[_\-. ](?=[^/]+$)")

MOST_NAMES = 4
"""Label maps that a line lists for an image."""


@dataclass(frozen=True)
class Pairs:
    """Images and label maps of two folders, id → file, and which belong together, by their ids.

    Attributes:
        label_of: image → label map.
        ways: how the names of some pairs differ → these pairs.
        ambiguous: image → the label maps that may be its own, if that is not clear.
        lonely: label maps that belong to no image.
        parts: image → its masks, if a label map is several files; then `label_of` is empty.
    """

    images: Mapping[str, Path]
    labels: Mapping[str, Path]
    label_of: Mapping[str, str]
    ways: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lonely: tuple[str, ...] = ()
    parts: Mapping[str, Parts] | None = None

    def label_file(self, name: str) -> Path | Parts | None:
        """The label map, or the masks, of an id, which need not be that of an image in the folder."""
        if self.parts is not None:
            return self.parts.get(name)
        return self.labels.get(self.label_of.get(name, name))

    def faults(self, label_of: Mapping[Path, Path | None]) -> list[str]:
        """A line for each image in `label_of` that has no label map, though several fit."""
        return [
            f"{image} has no label map of its own name, and it is not clear which of these it should have: "
            f"{' or '.join(str(self.labels[label]) for label in names[:MOST_NAMES])}. Give one the name of the image, or "
            "name both in a list."
            for name, names in sorted(self.ambiguous.items())
            if (image := self.images[name]) in label_of and label_of[image] is None
        ]


def pair(images: Mapping[str, Path], labels: Mapping[str, Path]) -> Pairs:
    """Pair images and label maps by their ids (paths without suffix)."""
    image_ids, label_ids = images.keys(), labels.keys()
    label_of = {name: name for name in image_ids & label_ids}
    open_images, open_labels = image_ids - label_ids, label_ids - image_ids
    ways: dict[str, tuple[tuple[str, str], ...]] = {}
    ambiguous: dict[str, tuple[str, ...]] = {}
    for way, key_of_image, key_of_label in _WAYS:
        if not open_images or not open_labels:
            break
        candidates, rivals = _grouped(open_images, key_of_image), _grouped(open_labels, key_of_label)
        pairs = []
        for key in candidates.keys() & rivals.keys():
            if len(candidates[key]) == len(rivals[key]) == 1:
                pairs.append((candidates[key][0], rivals[key][0]))
            else:
                ambiguous |= dict.fromkeys(candidates[key], tuple(sorted(rivals[key])))
            open_images.difference_update(candidates[key])
            open_labels.difference_update(rivals[key])
        if pairs:
            label_of |= dict(pairs)
            ways[way] = tuple(sorted((*ways.get(way, ()), *pairs)))
    return Pairs(images, labels, label_of, ways=ways, ambiguous=ambiguous, lonely=tuple(sorted(open_labels)))


def join(images: Mapping[str, Path], labels: Mapping[str, Path], rule: PartRule) -> Pairs:
    """Give every image its masks; masks in the folder of images are no images."""
    parts = rule.group(labels, images)
    masks = {path for group in parts.values() for path, _ in group.files}
    images = {name: path for name, path in images.items() if path not in masks}
    others = masks | set(images.values())
    lonely = tuple(sorted(name for name, path in labels.items() if path not in others))
    return Pairs(images, labels, {}, lonely=lonely, parts=parts)


def pairing_lines(
    folders: Iterable[Pairs], label_of: Mapping[Path, Path | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes about names that differ, and warnings about label maps that nothing uses or pairs.

    Args:
        label_of: image file → label file, of all roles.
    """
    paired: set[Path | None] = set(label_of.values())
    lonely: set[Path] = set()
    ways: dict[str, list[tuple[Path, Path]]] = defaultdict(list)
    for pairs in folders:
        paired |= {pairs.labels[name] for name in pairs.label_of.values()}
        paired |= {pairs.labels[name] for names in pairs.ambiguous.values() for name in names}
        paired |= {path for group in (pairs.parts or {}).values() for path, _ in group.files}
        lonely |= {pairs.labels[name] for name in pairs.lonely}
        for way, names in pairs.ways.items():
            files = [(pairs.images[image], pairs.labels[label]) for image, label in names]
            ways[way] += [(image, label) for image, label in files if label_of.get(image) == label]
    notes = [
        f"{len(dict.fromkeys(files)):,} image(s) and their label maps have names that differ in {way}. They are paired, "
        f"for example {files[0][0].name} with {files[0][1].name}."
        for way, files in ways.items()
        if files
    ]
    alone = sorted(path for path in lonely if path not in paired)
    if alone:  # a file may have another name by a link
        real = {os.path.realpath(path) for path in paired if path}
        alone = [path for path in alone if os.path.realpath(path) not in real]
    warning = (
        f"{len(alone):,} label map(s) belong to no image; the first is {alone[0]}. Give each the path of its image (the "
        "suffix may differ), or remove them."
        if alone
        else ""
    )
    return tuple(notes), (warning,) if warning else ()


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())


def _bare_label(name: str) -> str:
    return _stripped(name, _OF_LABEL)


def _bare_image(name: str) -> str:
    return _stripped(name, _OF_IMAGE)


def _stripped(name: str, words: re.Pattern[str]) -> str:
    folded = _folded(name)
    while (shorter := words.sub("", folded, count=1)) != folded and shorter and not shorter.endswith("/"):
        folded = shorter
    return folded


_WORDS = "a word (like _mask) or a suffix"
_WAYS = (
    ("the composition of letters (Unicode)", _composed, _composed),
    ("case", _folded, _folded),
    (_WORDS, _folded, _bare_label),
    (_WORDS, _bare_image, _bare_label),
)
"""How names of a pair differ, and what of an image's and of a label map's name is compared."""
