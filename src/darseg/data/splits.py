"""Which images are to be labeled: drawn at random by ids and a seed, and nothing else."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError, RecipeError, faults

LABELED, UNLABELED, OPEN = 0, 1, 2

MOST_HELD_OUT = 6
"""Names of held-out images that a line lists."""


def labeled_count(images: int, fraction: Fraction) -> int:
    """The number of images in a fraction of `images`, rounded half up, at least 1 and less than all.

    Cityscapes has 2,975 images: 1/8 are 372 and 1/4 are 744, as in the published splits.

    Raises RecipeError if the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise RecipeError(f"The fraction {fraction} should be above 0 and below 1, as in 1/8 or 0.125.")
    return min(max(1, math.floor(fraction * images + Fraction(1, 2))), images - 1)


def sequences_of(ids: Sequence[str], pattern: str) -> list[str]:
    """The sequence of each id: what the pattern matches, or its first group if it has one.

    Raises RecipeError if the pattern is not a regular expression, DataError with the ids that it does not match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"sequences: {pattern!r} is not a regular expression ({error}). Give one that finds the sequence in an id, "
            "as in 'images/([^_]+)_'."
        ) from None
    matches = [compiled.search(name) for name in ids]
    sequences = [(match and match[min(compiled.groups, 1)]) or "" for match in matches]
    unmatched = [repr(name) for name, sequence in zip(ids, sequences, strict=True) if not sequence]
    if unmatched:
        raise DataError(
            faults(
                f"sequences: {pattern!r} matches nothing in {len(unmatched)} of {len(ids)} ids (paths below data.root, "
                "without suffix). Change the pattern so that each image has a sequence",
                unmatched,
                limit=5,
            )
        )
    return sequences


def draw(
    ids: Sequence[str],
    count: int,
    seed: int,
    *,
    sequences: Sequence[str] | None = None,
    present: NDArray[np.bool_] | None = None,
) -> tuple[str, ...]:
    """The ids of the images to be labeled, drawn by the seed and the ids alone.

    The seed and its id give each image a place in an order. Images are taken from the start of the order until there
    are `count`. So a smaller set is a subset of every larger one of that seed, and neither the order of `ids` nor
    other images change which of two images comes first.

    With `sequences`, whole sequences are taken in place of images: from the start, each that still fits, or the
    smallest alone if none fits. Smaller draws are then not necessarily subsets of larger ones.

    With `present`, the draw is balanced, in three steps. First one image of each class is taken, starting with the
    class in the fewest images. Then iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the Stratification of
    Multi-Label Data, ECML PKDD 2011) divides the images: it repeatedly picks the class that is left in the fewest
    images, and sends each of these images, in random order, to the side that lacks more of the class. Without the
    first step it could leave the only image of a class unlabeled. Finally images are taken as above until there are
    `count`.

    Args:
        ids: N names, without duplicates.
        count: images to draw, 1 ≤ count < N.
        sequences: the sequence of each id.
        present: bool [N, K], whether an image has pixels of a class.

    Returns:
        sorted ids; `count` of them, except with sequences: fewer, or more if the smallest sequence is larger.

    Raises RecipeError for a count out of bounds, DataError if all images are one sequence.
    """
    total = len(ids)
    if not 1 <= count < total:
        possible = f"Choose 1 to {total - 1}." if total > 1 else "Give at least 2 images."
        raise RecipeError(f"Cannot label {count} of {total} images. {possible}")
    units, unit_of = np.unique(np.array(ids if sequences is None else sequences), return_inverse=True)
    if len(units) == 1:
        raise DataError(
            f"All {total} images are in one sequence, {str(units[0])!r}, so there is nothing to choose from. Change "
            "the pattern."
        )
    if present is None:
        present = np.zeros((total, 0), bool)
    # The last column counts all images, as a class that every image has.
    images = np.zeros((len(units), present.shape[1] + 1), np.int64)
    np.add.at(images, unit_of, np.column_stack([present, np.ones(total, bool)]))
    drawing = _Drawing(images, count)
    purposes = [f"class {k}" for k in range(present.shape[1])]
    orders = [[i for i in _order(units, seed, name) if images[i, k]] for k, name in enumerate(purposes)]
    drawing.take_each_class(orders)
    drawing.stratify(orders)
    drawing.fill(_order(units, seed, ""))
    return tuple(sorted(name for name, i in zip(ids, unit_of, strict=True) if drawing.side[i] == LABELED))


def part_bounds(part: tuple[float, float], count: int) -> tuple[int, int]:
    """The places in an order of `count` images at which a part of them begins and ends, rounded half up.

    Args:
        part: two shares from 0 to 1; [0, 0.8] and [0.2, 1] of 10 images are places 0 to 7 and 2 to 9.
    """
    first, end = (math.floor(share * count + 0.5) for share in part)
    return first, end


def part_of(ids: Sequence[str], part: tuple[float, float], seed: int) -> frozenset[str]:
    """The ids in a part of the order that the seed gives them, which is that of `draw`."""
    first, end = part_bounds(part, len(ids))
    return frozenset(ids[i] for i in _order(ids, seed, "")[first:end])


def _order(units: Iterable[str], seed: int, purpose: str) -> list[int]:
    """Indices of the units in an order of their own for each purpose."""
    # A hash and not a generator: all versions of numpy give the same, whatever else is in the pool.
    keys = [hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest() for name in units]
    return sorted(range(len(keys)), key=keys.__getitem__)


class _Drawing:
    """The side of each unit (an image, or a sequence of images), and what both sides still need.

    Attributes:
        images: int64 [U, K + 1], images of each unit that have class k; the last column counts all of them.
        side: int64 [U], LABELED, UNLABELED or OPEN.
        lacking: int64 [2, K + 1], images of each class that the labeled and the unlabeled side still need for the same
            mix of classes, in Nths of an image, so that all numbers are whole.
    """

    def __init__(self, images: NDArray[np.int64], count: int) -> None:
        self.images = images
        self.total = int(images[:, -1].sum())
        self.side = np.full(len(images), OPEN)
        self.lacking = np.outer([count, self.total - count], images.sum(0))

    def fits(self, unit: int) -> bool:
        """Whether the labeled side has room for all images of a unit."""
        return bool(self.total * self.images[unit, -1] <= self.lacking[LABELED, -1])

    def place(self, unit: int, side: int) -> None:
        self.side[unit] = side
        self.lacking[side] -= self.total * self.images[unit]

    def take_each_class(self, orders: Sequence[Sequence[int]]) -> None:
        """Label one unit of each class that no labeled unit has, rare classes first.

        Args:
            orders: the units of each class, in the order in which they are tried.
        """
        for k in np.argsort(self.images[:, :-1].sum(0), kind="stable"):
            if not self.images[self.side == LABELED, k].any():
                unit = next(filter(self.fits, orders[k]), None)
                if unit is not None:
                    self.place(unit, LABELED)

    def stratify(self, orders: Sequence[Sequence[int]]) -> None:
        """Divide all units that have a class, starting with the class that is left in the fewest images."""
        while (left := self.images[self.side == OPEN, :-1].sum(0)).any():
            k = min(np.flatnonzero(left), key=left.__getitem__)
            for unit in orders[k]:
                if self.side[unit] == OPEN:
                    labeled, unlabeled = self.lacking[:, [k, -1]].tolist()
                    wanted = labeled >= unlabeled or unlabeled[1] <= 0  # or the unlabeled side is complete
                    self.place(unit, LABELED if wanted and self.fits(unit) else UNLABELED)

    def fill(self, order: Sequence[int]) -> None:
        """Label units in this order, each that still fits; the smallest one if none ever fitted."""
        for unit in order:
            if self.side[unit] != LABELED and self.fits(unit):
                self.place(unit, LABELED)
        if not (self.side == LABELED).any():
            self.place(min(order, key=lambda unit: self.images[unit, -1]), LABELED)


def held_out_line(role: str, names: Sequence[str], place: Path, *, every: int | None) -> str:
    """A line about the images of a role that is not trained on.

    Args:
        place: their list file or folder.
        every: every n-th of the labeled images there is taken; None: all.
    """
    if every is None:
        return f"{role}: {len(names):,} image(s) of {place}."
    listed = ", ".join(names[:MOST_HELD_OUT])
    more = f" and {len(names) - MOST_HELD_OUT:,} more" if len(names) > MOST_HELD_OUT else ""
    return (
        f"{role} took {len(names):,} labeled image(s) of {place}, which are not trained on: {listed}{more}."
    )
