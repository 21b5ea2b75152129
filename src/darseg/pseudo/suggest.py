"""Which unlabeled images to label next: what their labels would add, and how new they are.

The gain of an image is the sum over the classes k of log((n_k + u_k) / n_k): how much the labels of each class would
grow, as a part of what there is. n_k are the labeled pixels of the class, and u_k the pixels of the image that are
probably of this class: each counts with the probability of k, wholly if the network is unsure of the pixel, and half if
it is certain. Probabilities and not decisions count, since a network that saw few labels of a class hardly ever decides
for it.

The images are chosen one after the other. The next one stands best for the gains of all images: it has the largest sum,
over all images, of their gain times the distance by which it is nearer to them than what is labeled or chosen. So freaks
that resemble nothing are not chosen, and neither are images like those that are chosen already. The pixels that a chosen
image probably has then count as labeled. (Weighted k-medoids, chosen greedily: "facility location"; Wei, Iyer, Bilmes,
"Submodularity in data subset selection and active learning", ICML 2015.)

Letters: N images, K classes, D numbers of a feature.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

DUPLICATE = 0.1
"""An image is a near-duplicate if its distance to another one is at most this part of the typical distance."""

ROUNDING = 1e-3
"""Distances of features of length 1 that are smaller are 0, but for float32's rounding."""

BLOCK = 256
"""Images whose distances to all others are computed at once."""

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
        gain: of the image itself, the sum of `parts`.
        parts: float64 [K], of each class.
        stands_for: number of candidates that are nearer to it than to what was labeled or chosen before; itself too.
        newness: 0 to 1, its distance to the nearest image that was labeled or chosen before, as a part of the typical
            one.
        nearest: id of that image.
    """

    index: int
    gain: float
    parts: NDArray[np.float64]
    stands_for: int
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

    The result does not depend on the order of the candidates. Ties go to the smaller id.

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
    gains = gain_parts(known, useful)
    while len(picks) < count and (best := field.best(gains.sum(axis=1))) is not None:
        pick = Pick(
            index=int(order[best]),
            gain=float(gains[best].sum()),
            parts=gains[best],
            stands_for=field.stands_for(best),
            newness=field.newness(best),
            nearest=field.nearest(best),
        )
        picks.append(pick)
        field.take(best)
        known += candidates.expected[pick.index]
        gains = gain_parts(known, useful)
    return picks


class _Field:
    """How far each candidate is from what is labeled or chosen; places are in the order of the ids."""

    def __init__(self, images: Described, order: NDArray[np.intp], labeled: Described) -> None:
        self._names = [*(images.ids[index] for index in order), *labeled.ids]
        self._digests = np.array([images.digests[index] for index in order], object)
        self._directions = images.directions()[order]
        self._squares = np.einsum("nd,nd->n", self._directions, self._directions)
        self._distances = np.full(len(order), np.inf, np.float32)
        self._nearest = np.zeros(len(order), np.intp)
        self._same = np.isin(self._digests, list(labeled.digests))
        directions = labeled.directions()
        for at in sorted(range(len(labeled.ids)), key=lambda at: labeled.ids[at]):
            self._approach(self._away(directions[at : at + 1])[0], len(order) + at)
        apart = self._distances[self._distances > 0]
        self._typical = float(np.median(apart)) if len(apart) else 1.0
        self._bounds: list[tuple[float, int]] = []

    def best(self, gains: NDArray[np.float64]) -> int | None:
        """The candidate that stands best for these gains; None if all that are left are near-duplicates.

        What a candidate stands for never grows, as gains and distances do not. So an earlier value bounds it, and only
        those are computed again whose bound is the largest (Minoux 1978).
        """
        if not self._bounds:
            for start in range(0, len(gains), BLOCK):
                nearer = self._nearer(slice(start, start + BLOCK))
                values = (nearer @ gains).tolist()
                self._bounds += [(-value, start + at) for at, value in enumerate(values)]
            heapq.heapify(self._bounds)
        fresh: set[int] = set()
        while self._bounds:
            value, place = heapq.heappop(self._bounds)
            if self._is_near_duplicate(place):
                continue
            if place in fresh:
                return place
            fresh.add(place)
            value = float(self._nearer(slice(place, place + 1))[0] @ gains)
            heapq.heappush(self._bounds, (-value, place))
        return None

    def newness(self, place: int) -> float:
        return min(1.0, float(self._distances[place]) / self._typical)

    def nearest(self, place: int) -> str:
        return self._names[self._nearest[place]]

    def stands_for(self, place: int) -> int:
        return int((self._nearer(slice(place, place + 1)) > ROUNDING).sum())

    def take(self, place: int) -> None:
        """A candidate is chosen: those that resemble it are less new."""
        self._same |= self._digests == self._digests[place]
        self._approach(self._away(self._directions[place : place + 1])[0], place)

    def _is_near_duplicate(self, place: int) -> bool:
        return bool(self._same[place]) or float(self._distances[place]) <= DUPLICATE * self._typical

    def _nearer(self, places: slice) -> NDArray[np.float32]:
        """By how much candidates are nearer to each candidate than what is labeled or chosen, [places, N]."""
        return np.maximum(self._distances - self._away(self._directions[places]), 0)

    def _away(self, directions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Distances of features [B, D] to all candidates, float32 [B, N]."""
        own = np.einsum("nd,nd->n", directions, directions)
        squares = own[:, None] + self._squares - 2 * (directions @ self._directions.T)
        return np.sqrt(np.where(squares < ROUNDING**2, 0, squares))

    def _approach(self, away: NDArray[np.float32], number: int) -> None:
        """An image is labeled or chosen: its distances to all candidates, and its place in `_names`."""
        closer = away < self._distances
        self._distances[closer], self._nearest[closer] = away[closer], number
