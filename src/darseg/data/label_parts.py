"""Several masks per picture → one label map: which file is which class, and what wins."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE
from darseg.data.images import MOST_PIXELS
from darseg.data.labels import read_raw
from darseg.errors import DataError, faults


@dataclass(frozen=True)
class Parts:
    """The masks of one picture.

    Attributes:
        files: (mask, class) in the order of the rule: where masks overlap, the later one counts.
        other: what pixels of no mask are: a class, or 255 (not labeled).
    """

    files: tuple[tuple[Path, int], ...]
    other: int


@dataclass(frozen=True)
class Joined:
    """A picture's masks as classes uint8 [H, W]; `overlapping` pixels lie in several classes."""

    classes: NDArray[np.uint8]
    overlapping: int


@dataclass(frozen=True)
class PartRule:
    """Which file is a mask of which class.

    Attributes:
        patterns: (pattern, class): the path of a mask below the folder of labels, without suffix. {id} stands for the id
            of the picture, * for anything but a slash.
        other: as in `Parts`.
    """

    patterns: tuple[tuple[str, int], ...]
    other: int

    def group(self, labels: Mapping[str, Path], images: Container[str]) -> dict[str, Parts]:
        """Id of a picture → its masks, for the pictures that have any.

        Args:
            labels: files by their path below the folder of labels, without suffix.

        Raises DataError naming every file that fits the patterns of several classes.
        """
        found: dict[str, list[tuple[int, Path, int]]] = {}
        problems = []
        for name, path in labels.items():
            fits = list(self._fits(name, images))
            if len({at for _, at in fits}) > 1 or len({owner for owner, _ in fits}) > 1:
                named = " and ".join(dict.fromkeys(self.patterns[at][0] for _, at in fits))
                problems.append(f"{path}: this mask fits {named}")
            for owner, at in fits[:1]:
                found.setdefault(owner, []).append((at, path, self.patterns[at][1]))
        if problems:
            raise DataError(
                faults(
                    "data.label_parts: these masks fit several patterns. Write the patterns so that a mask fits one",
                    problems,
                )
            )
        return {
            owner: Parts(tuple((path, k) for _, path, k in sorted(files)), self.other)
            for owner, files in found.items()
        }

    def _fits(self, name: str, images: Container[str]) -> Iterator[tuple[str, int]]:
        """(id of a picture, place of the pattern) for every pattern that a file fits."""
        for at, (pattern, _) in enumerate(self.patterns):
            for quantifier in (".+", ".+?"):  # with * the id may end in several places
                match = re.fullmatch(_expression(pattern, quantifier), name)
                if match and match["id"] in images:
                    yield match["id"], at
                    break


def _expression(pattern: str, quantifier: str) -> str:
    parts = re.split(r"(\{id\}|\*)", pattern)
    meaning = {"{id}": f"(?P<id>{quantifier})", "*": "[^/]*"}
    return "".join(meaning.get(part, re.escape(part)) for part in parts)


def join_parts(parts: Parts, max_pixels: int = MOST_PIXELS) -> Joined:
    """The label map of a picture's masks.

    A pixel is inside a mask if its value is not 0, its color is not black, and its alpha is not 0.

    Raises DataError for masks that cannot be read, have several values other than 0, or differ in size.
    """
    first = parts.files[0][0]
    masks = ((path, k, _inside(path, max_pixels)) for path, k in parts.files)
    classes = covered = doubled = None
    for path, k, inside in masks:
        if classes is None or covered is None or doubled is None:
            classes = np.full(inside.shape, parts.other, np.uint8)
            covered, doubled = np.zeros(inside.shape, bool), np.zeros(inside.shape, bool)
        if inside.shape != classes.shape:
            raise DataError(
                f"{path}: this mask is {inside.shape[0]}x{inside.shape[1]} pixels (height x width), but the mask {first} "
                f"of the same image is {classes.shape[0]}x{classes.shape[1]}. All masks of an image must have its size."
            )
        doubled |= inside & covered & (classes != k)
        covered |= inside
        classes[inside] = k
    assert classes is not None and doubled is not None
    return Joined(classes, overlapping=int(doubled.sum()))


def part_lines(joined: Sequence[tuple[Parts, int]]) -> list[str]:
    """Lines about the masks of all pictures; each comes with its number of overlapping pixels."""
    if not joined:
        return []
    classes = {k for parts, _ in joined for _, k in parts.files}
    lacking = sum({k for _, k in parts.files} < classes for parts, _ in joined)
    files = sum(len(parts.files) for parts, _ in joined)
    other = (
        "are not labeled"
        if joined[0][0].other == IGNORE
        else "are the class that data.label_parts.other names"
    )
    line = f"{files:,} masks make up the label maps of {len(joined):,} images. Pixels of no mask {other}."
    if lacking:
        line += f" {lacking:,} image(s) lack a mask of some class, which then does not occur in them."
    lines = [line]
    doubled = [(parts, count) for parts, count in joined if count]
    if doubled:
        pixels = sum(count for _, count in doubled)
        lines.append(
            f"{pixels:,} pixels of {len(doubled):,} image(s) lie in masks of several classes, for "
            f"example of {doubled[0][0].files[0][0]}. They have the class that data.label_parts lists last."
        )
    return lines


def _inside(path: Path, max_pixels: int) -> NDArray[np.bool_]:
    """bool [H, W]: the pixels inside a mask."""
    values = read_raw(path, "auto", max_pixels).values
    inside = values > 0  # transparent pixels are negative
    kept = values[inside]
    if kept.size and kept.min() != kept.max():
        count = len(np.unique(kept))
        raise DataError(
            f"{path}: this mask has {count} values or colors other than 0. With data.label_parts, each file marks the "
            "pixels of one class by one value. Save it again without smoothed edges, or remove data.label_parts if the "
            "values are classes."
        )
    return inside
