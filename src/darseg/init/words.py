"""What the words of a path say: image or label, and the part of the data set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


LABEL_WORDS = _set(
    "label labels mask masks annotation annotations annot annots gt gts groundtruth truth segmentation segmentations seg "
    "segs target targets labelmap labelmaps labelids labeltrainids trainids gtfine gtcoarse maske masken"
)
IMAGE_WORDS = _set(
    "image images img imgs im photo photos picture pictures frame frames rgb input inputs original originals leftimg8bit "
    "bild bilder foto fotos"
)
COLOR_WORDS = _set("color colour colors colours colored coloured")
"""Labels as colors, used only if there are no others."""
OTHER_WORDS = _set("vis instance instances instanceids object objects overlay overlays")
"""Drawings that are not labels of classes, whatever else the name says."""
FILLERS = _set("class classes ground fine aug raw png jpeg jpg")
"""Words without meaning next to the words above."""
IN_NAMES = LABEL_WORDS | IMAGE_WORDS | COLOR_WORDS | OTHER_WORDS

SPLITS = {
    "labeled": ("labeled", "labelled"),
    "unlabeled": ("unlabeled", "unlabelled"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Part of the data set → words for it."""
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}

CITYSCAPES_NAME = re.compile(r"[a-z-]+_\d{6}_\d{6}_")
"""Begins the names of Cityscapes' files: city, sequence and frame."""


@dataclass(frozen=True)
class Picture:
    """A picture file, with the words of its path taken apart.

    Attributes:
        label_folder, label_name: whether a folder, or the file name, says that it is a label.
        rank: among label files: 0 for values, 1 for colors, 2 for drawings that are not labels of classes.
        place: equal for label files of one kind: the label words of folders and name, and the suffix.
        full, bare: what image and label have in common: folders without such words, and the name with them (`full`) or
            without them (`bare`).
        split: the part of the data set that a folder names (a key of SPLITS).
    """

    path: Path
    label_folder: bool
    label_name: bool
    rank: int
    place: tuple[str, ...]
    full: str
    bare: str
    split: str | None


@dataclass(frozen=True)
class _Folders:
    """What the folders of a path say; `rest` are their names without the words that were understood."""

    rest: list[str]
    place: list[str]
    is_label: bool
    rank: int
    split: str | None


def take_apart(path: Path, root: Path) -> Picture:
    """Read the words of a picture's path below `root`."""
    below = path.relative_to(root)
    folders = _read_folders(below.parts[:-1])
    name, name_words = _strip_name(below.stem)
    head = "/".join(folders.rest)
    return Picture(
        path=path,
        label_folder=folders.is_label,
        label_name=not IMAGE_WORDS.issuperset(name_words),
        rank=max(folders.rank, _rank(name_words)),
        place=(*folders.place, *sorted({*name_words} - IMAGE_WORDS), path.suffix.lower()),
        full=_folded(f"{head}/{below.stem}"),
        bare=_folded(f"{head}/{name}"),
        split=folders.split,
    )


def _folded(name: str) -> str:
    """A name without regard to case and to how its letters are composed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _read_folders(parts: Iterable[str]) -> _Folders:
    rest: list[str] = []
    place: list[str] = []
    split, any_label, rank = None, False, 0
    for part in parts:
        words = words_of(part)
        is_label = part.lower() in LABEL_WORDS or bool(LABEL_WORDS & set(words))
        has_meaning = is_label or part.lower() in IMAGE_WORDS or bool(IMAGE_WORDS & set(words))
        if is_label:
            any_label = True
            rank = max(rank, _rank(words))
            place.append("_".join(word for word in words if word not in SPLIT_OF))
            drop = LABEL_WORDS | COLOR_WORDS | OTHER_WORDS | FILLERS
        else:
            drop = IMAGE_WORDS | FILLERS if has_meaning else frozenset()
        is_one_word = part.lower() in LABEL_WORDS | IMAGE_WORDS  # leftImg8bit, which looks like two
        kept = [word for word in words if word not in drop] if has_meaning else [part.lower()]
        kept = [] if is_one_word else kept
        rest += ["_".join(kept)] if kept else []
        split = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), split)
    return _Folders(rest, place, any_label, rank=rank, split=split)


def _strip_name(name: str) -> tuple[str, list[str]]:
    """A file name without the words at its beginning and end that say what it is, and these words."""
    words: list[str] = []
    while True:
        end = re.fullmatch(r"(.+?)[_\-. ]([A-Za-z]+8?[A-Za-z]*)", name)
        begin = re.fullmatch(r"([A-Za-z]+)[_\-. ](.+)", name)
        for match, word, rest in ((end, 2, 1), (begin, 1, 2)):
            if match and (match[word].lower() in IN_NAMES or match[word] == "L"):  # L: CamVid's labels
                words.append(match[word].lower())
                name = match[rest]
                break
        else:
            return name, words


def words_of(name: str) -> list[str]:
    """Words in lower case, also of camelCase and of joined words like trainannot."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    words: list[str] = []
    for word in re.split(r"[^0-9a-z]+", apart.lower()):
        joined = re.fullmatch(r"(train|val|valid|test)(annots?|masks?|labels?|gt|images?|imgs?)", word)
        words += joined.groups() if joined else [word]
    return [word for word in words if word]


def _rank(words: Iterable[str]) -> int:
    """See `Picture.rank`."""
    present = set(words)
    return 2 if present & OTHER_WORDS else 1 if present & COLOR_WORDS else 0
