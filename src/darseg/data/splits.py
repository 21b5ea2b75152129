"""Which images are to be labeled: drawn at random from ids and a seed, nothing else."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError, RecipeError, faults

LABELED, UNLABELED, OPEN = 0, 1, 2


def labeled_count(images: int, fraction: Fraction) -> int:
    """`fraction` of so many images, rounded half up, at least 1 and less than all.

    Of Cityscapes' 2,975 images 1/8 are 372 and 1/4 are 744, the numbers published splits have.

    Raises RecipeError where the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise RecipeError(f"A fraction of {fraction}: wanted one above 0 and below 1, as in 1/8 or 0.125.")
    return min(max(1, math.floor(fraction * images + Fraction(1, 2))), images - 1)


def sequences_of(ids: Sequence[str], pattern: str) -> list[str]:
    """The sequence of each id: what the pattern's first group matches, or without groups the whole pattern.

    Raises RecipeError where the pattern is no regular expression, DataError naming the ids without a match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"sequences {pattern!r}: not a regular expression ({error}). Wanted one that finds the sequence in an "
            "id, as in 'images/([^_]+)_'."
        ) from None
    matches = [compiled.search(name) for name in ids]
    sequences = [(match and match[min(compiled.groups, 1)]) or "" for match in matches]
    lost = [repr(name) for name, sequence in zip(ids, sequences, strict=True) if not sequence]
    if lost:
        raise DataError(
            faults(
                f"sequences {pattern!r}: matches nothing in {len(lost)} of {len(ids)} ids (paths below data.root, "
                "without suffix). Change the pattern so that each image has a sequence",
                lost,
                limit=5,
            )
        )
    return sequences


def draw(
    ids: Sequence[str],
    count: int,
    seed: int,
    sequences: Sequence[str] | None = None,
    present: NDArray[np.bool_] | None = None,
) -> tuple[str, ...]:
    """Draw the images to be labeled.

    Every image has its place in an order that the seed and its id decide. From the first on, images are taken
    until `count` are; so a smaller set lies in every larger one of that seed, and neither the order of `ids` nor
    other images change who comes before whom.

    With `sequences` whole sequences are taken instead, each that still fits, from the first on; where none fits,
    the smallest alone. Then the sets of one seed need not lie in each other.

    With `present` the draw is balanced. First, from the class in the fewest images on, one image with each class.
    Then iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, ECML
    PKDD 2011): again and again the class left in the fewest images has those divided, in random order, each going
    where most of the class is lacking. Alone it would keep a class's only image from the labeled ones. In the end
    images are taken as above until there are `count`.

    Args:
        ids: N names, each once.
        count: images wanted, 1 ≤ count < N.
        sequences: the sequence of each id.
        present: bool [N, K], whether an image has pixels of a class.

    Returns:
        ids, sorted; `count` of them unless sequences make it fewer, or more where the smallest is larger.

    Raises RecipeError for a count that cannot be, DataError where all images are one sequence.
    """
    total = len(ids)
    if not 1 <= count < total:
        raise RecipeError(f"{count} labeled of {total} images: wanted at least 1 and fewer than all.")
    names, unit_of = np.unique(np.array(ids if sequences is None else sequences), return_inverse=True)
    if len(names) == 1:
        raise DataError(
            f"All {total} images are one sequence, {str(names[0])!r}: there is nothing to choose. Change the pattern."
        )
    if present is None:
        present = np.zeros((total, 0), bool)
    classes = present.shape[1]
    # images [U, K + 1]: of each sequence those with class k; the last column all of them, a class that all have.
    images = np.zeros((len(names), classes + 1), np.int64)
    np.add.at(images, unit_of, np.column_stack([present, np.ones(total, bool)]))
    # lacking [2, K + 1]: images that the labeled and the unlabeled ones still need of each class for the same
    # mix, in Nths of an image, so that all of it is whole numbers.
    lacking = np.outer([count, total - count], images.sum(0))
    side = np.full(len(names), OPEN)

    def order(purpose: str) -> list[int]:
        # A hash instead of a generator: the same in all versions of numpy, and whatever else is in the pool.
        keys = [hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest() for name in names]
        return sorted(range(len(names)), key=keys.__getitem__)

    def fits(unit: int) -> bool:
        return bool(total * images[unit, -1] <= lacking[LABELED, -1])

    def place(unit: int, where: int) -> None:
        side[unit] = where
        lacking[where] -= total * images[unit]

    orders = [[unit for unit in order(f"class {k}") if images[unit, k]] for k in range(classes)]
    for k in np.argsort(images[:, :-1].sum(0), kind="stable"):
        if not images[side == LABELED, k].any():
            unit = next(filter(fits, orders[k]), None)
            if unit is not None:
                place(unit, LABELED)
    while (left := images[side == OPEN, :-1].sum(0)).any():
        k = min(np.flatnonzero(left), key=left.__getitem__)
        for unit in orders[k]:
            if side[unit] == OPEN:
                labeled, unlabeled = lacking[:, [k, -1]].tolist()
                lacks = labeled >= unlabeled or unlabeled[1] <= 0  # or the unlabeled ones are complete
                place(unit, LABELED if lacks and fits(unit) else UNLABELED)
    everything = order("")
    for unit in everything:
        if side[unit] != LABELED and fits(unit):
            place(unit, LABELED)
    if not (side == LABELED).any():
        place(min(everything, key=lambda unit: images[unit, -1]), LABELED)
    return tuple(sorted(name for name, unit in zip(ids, unit_of, strict=True) if side[unit] == LABELED))
