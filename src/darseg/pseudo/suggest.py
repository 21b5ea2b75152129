"""Which unlabeled images to label next: what their labels would add, and how new they are.

The gain of an image is the sum over the classes k of log((n_k + u_k) / n_k): how much the labels of each class would
grow, as a part of what there is. n_k are the labeled pixels of the class, and u_k the pixels of the image that are
probably of this class: each counts with the probability of k, wholly if the network is unsure of the pixel, and half if
it is certain. Probabilities and not decisions count, since a network that saw few labels of a class hardly ever decides
for it.

The images are chosen one after the other; the next one has the largest product of gain and newness. The pixels that a
chosen image probably has then count as labeled, and it makes the images that resemble it less new (a soft form of greedy
k-center: Sener, Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018).

Letters: N images, K classes, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

NEW = 0.5
"""An image is wholly new from this part of the typical distance on. Farther ones are no better: many are freaks."""

DUPLICATE = 0.1
"""An image is a near-duplicate if its distance to another one is at most this part of the typical distance."""

FLOOR = 0.001
"""Share of all labeled pixels that is added to those of each class, so that classes without labels have a finite gain."""


@dataclass(frozen=True, eq=False)
class Described:
    """Images as the choice sees them.

    Attributes:
        ids: of the images, all different.
        features: float32 [N, D], what the backbone sees in each; their lengths do not matter.
        digests: of the pictures; equal ones are the same picture.
    """

    ids: tuple[str, ...]
    features: NDArray[np.float32]
    digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        counts = {len(self.ids), len(self.features), len(self.digests), len(set(self.ids))}
        if self.features.ndim != 2 or len(counts) != 1:
            raise DataError(
                f"Found {len(self.ids)} ids ({len(set(self.ids))} different), features {list(self.features.shape)} and "
                f"{len(self.digests)} digests. Give one of each for every image."
            )

    def directions(self) -> NDArray[np.float32]:
        """The features with length 1; zeros stay zeros."""
        lengths = np.linalg.norm(self.features, axis=1, keepdims=True)
        return self.features / np.where(lengths > 0, lengths, 1)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Unlabeled images that may be chosen.

    Attributes:
        expected: float64 [N, K], the sums of the probabilities of each class over the pixels of each image.
        uncertain: float64 [N, K], the sums of the probabilities times the uncertainty of the pixel, 0 to 1.
    """

    images: Described
    expected: NDArray[np.float64]
    uncertain: NDArray[np.float64]

    def useful(self) -> NDArray[np.float64]:
        """float64 [N, K], what each class's pixels count: certain ones half."""
        return (self.expected + self.uncertain) / 2


@dataclass(frozen=True, eq=False)
class Pick:
    """A chosen image.

    Attributes:
        index: among the candidates.
        gain: the sum of `parts`.
        parts: float64 [K], of each class.
        newness: 0 to 1, by the distance to the nearest image that is labeled or chosen before.
        nearest: id of that image.
    """

    index: int
    gain: float
    parts: NDArray[np.float64]
    newness: float
    nearest: str


def gain_parts(known: NDArray[np.float64], useful: NDArray[np.float64]) -> NDArray[np.float64]:
    """What labels of an image add to each class: log((known + useful) / known).

    Args:
        known: [K], labeled pixels of each class, all above 0.
        useful: [..., K], useful pixels of each class.
    """
    return np.log1p(useful / known)


def choose_images(
    candidates: Candidates,
    labeled: Described,
    *,
    counts: Sequence[int] | NDArray[np.int64],
    count: int,
) -> list[Pick]:
    """Choose images to label next; fewer than `count` if the others are near-duplicates.

    The result does not depend on the order of the candidates. Ties go to the newer image, then to the smaller id.

    Args:
        labeled: the images that are labeled; at least one.
        counts: [K], their labeled pixels of each class.
    """
    images = candidates.images
    order = np.array(sorted(range(len(images.ids)), key=lambda index: images.ids[index]), np.intp)
    useful, field = candidates.useful()[order], _Field(images, order, labeled)
    known = np.array(counts, np.float64)
    known += max(FLOOR * known.sum(), 1)
    picks: list[Pick] = []
    while len(picks) < count and (possible := field.possible()).any():
        parts, newness = gain_parts(known, useful), field.newness()
        scores = np.where(possible, parts.sum(axis=1) * newness, -1.0)
        best = int(np.lexsort((-newness, -scores))[0])
        pick = Pick(
            index=int(order[best]),
            gain=float(parts[best].sum()),
            parts=parts[best],
            newness=float(newness[best]),
            nearest=field.nearest(best),
        )
        picks.append(pick)
        known += candidates.expected[pick.index]
        field.take(best)
    return picks


class _Field:
    """How far each candidate is from what is labeled or chosen; places are in the order of the ids."""

    def __init__(self, images: Described, order: NDArray[np.intp], labeled: Described) -> None:
        self._names = [*(images.ids[index] for index in order), *labeled.ids]
        self._digests = np.array([images.digests[index] for index in order], object)
        self._directions = images.directions()[order]
        self._distances = np.full(len(order), np.inf)
        self._nearest = np.zeros(len(order), np.intp)
        self._same = np.isin(self._digests, list(labeled.digests))
        directions = labeled.directions()
        for at in sorted(range(len(labeled.ids)), key=lambda at: labeled.ids[at]):
            self._approach(directions[at], len(order) + at)
        apart = self._distances[self._distances > 0]
        self._typical = float(np.median(apart)) if len(apart) else 1.0

    def possible(self) -> NDArray[np.bool_]:
        """Whether each candidate may be chosen: it is no near-duplicate."""
        return (self._distances > DUPLICATE * self._typical) & ~self._same

    def newness(self) -> NDArray[np.float64]:
        return np.minimum(1, self._distances / (NEW * self._typical))

    def nearest(self, place: int) -> str:
        return self._names[self._nearest[place]]

    def take(self, place: int) -> None:
        """A candidate is chosen: those that resemble it are less new."""
        self._same |= self._digests == self._digests[place]
        self._approach(self._directions[place], place)

    def _approach(self, direction: NDArray[np.float32], number: int) -> None:
        """An image with this feature, whose id is `_names[number]`, is labeled or chosen."""
        away = np.linalg.norm(self._directions - direction, axis=1).astype(np.float64)
        closer = away < self._distances
        self._distances[closer], self._nearest[closer] = away[closer], number
