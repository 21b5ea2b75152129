"""The class shares of labeled images, and how far other such images would change them.

Letters: N images, K classes, S drawn sets of images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.data.resampling import LEVEL, RESAMPLES, expanded_tail
from darseg.errors import DataError
from darseg.pseudo.distribution import ClassDistribution

WIDE = 2.0
"""Factor between the ends of an interval from which a share counts as uncertain."""
LEAST_IMAGES = 4
"""Images with a class from which the deviation of its share is known; Student's t has no variance below."""
SEED = 0
"""Of the drawn sets: the same images have the same interval everywhere."""
BLOCK = 1 << 20
"""Images drawn at a time, in all sets together, for constant memory."""


@dataclass(frozen=True, eq=False)
class LabeledShares:
    """Class shares with their intervals.

    Attributes:
        share: float64 [K], share of the labeled pixels, sum 1.
        low, high: float64 [K], ends of the 90 % interval; NaN for a class that is in fewer than two images.
        deviation: float64 [K], standard deviation of the share's logarithm; inf if it is not known.
        images: int64 [K], labeled images with the class.
        total: labeled images with a labeled pixel.
    """

    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    deviation: NDArray[np.float64]
    images: NDArray[np.int64]
    total: int

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            array = np.array(getattr(self, field.name))
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)

    @property
    def uncertain(self) -> NDArray[np.bool_]:
        """bool [K]: whether there is no interval, or its ends differ by a factor of `WIDE` or more."""
        return ~(self.high < WIDE * self.low)

    def describe(self, k: int) -> str:
        """The interval of class k in percent, or why there is none."""
        if not self.images[k]:
            return "in no labeled image"
        if np.isnan(self.low[k]):
            return "in one labeled image only"
        return f"{100 * self.low[k]:.3g} to {100 * self.high[k]:.3g} %"

    def flag(self, k: int) -> str:
        """The interval of class k, and whether the share is uncertain."""
        wide = self.uncertain[k] and not np.isnan(self.low[k])
        return f"uncertain: {self.describe(k)}" if wide else self.describe(k)


def labeled_shares(counts_NK: ArrayLike) -> LabeledShares:
    """The class shares of labeled images, from a bootstrap over the images; their order has no effect.

    Images are drawn with replacement, as many as there are, `RESAMPLES` times; the interval holds the middle of the
    shares, see `expanded_tail`.

    Args:
        counts_NK: labeled pixels of each class in each image, integers [N, K]. Images without any count for nothing.

    Raises DataError if no pixel is labeled.

    >>> shares = labeled_shares([[90, 10], [80, 20], [100, 0], [85, 15]])
    >>> shares.share.round(4).tolist(), shares.describe(1), shares.uncertain.tolist()
    ([0.8875, 0.1125], '2.5 to 18.8 %', [False, True])
    """
    counts = np.asarray(counts_NK)
    if counts.ndim != 2 or counts.dtype.kind not in "iu":
        raise DataError(f"Pixel counts are {counts.dtype} {list(counts.shape)}; expected integers [N, K].")
    share = ClassDistribution.from_counts(counts.sum(axis=0)).share
    counts = counts[counts.any(axis=1)]
    counts = counts[np.lexsort(counts.T)].astype(np.float64)  # the set of images decides, not their order
    images, total = np.count_nonzero(counts, axis=0), len(counts)
    tail = expanded_tail(LEVEL, total)
    ends = np.quantile(_drawn_shares(counts), [tail, 1 - tail], axis=0)
    low, high = np.where(images >= 2, ends, np.nan)
    occurs = np.maximum(counts.sum(axis=0), 1)
    influence = counts / occurs - (counts.sum(axis=1) / counts.sum())[:, None]
    return LabeledShares(
        share, low=low, high=high, deviation=log_deviation(influence, images), images=images, total=total
    )


def log_deviation(influence_NK: NDArray[np.float64], images: NDArray[np.int64]) -> NDArray[np.float64]:
    """The standard deviation of the logarithm of ratios of sums over images, float64 [K].

    It is the bootstrap's for many drawn sets, made larger as the variance of Student's t is for few images.

    Args:
        influence_NK: by how much of itself each image moves each figure.
        images: int64 [K], those that have a part in each figure.

    Returns:
        inf where fewer than `LEAST_IMAGES` have a part.
    """
    total = len(influence_NK)
    variance = np.log1p((influence_NK**2).sum(axis=0) * total / max(1, total - 1))
    known = images >= LEAST_IMAGES
    return np.sqrt(np.where(known, variance * (images - 1) / np.where(known, images - 3, 1), np.inf))


def _drawn_shares(counts_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The class shares of the drawn sets, float64 [S, K]."""
    generator, images = np.random.default_rng(SEED), len(counts_NK)
    drawn, block = [], max(1, BLOCK // images)
    for start in range(0, RESAMPLES, block):
        sets = min(block, RESAMPLES - start)
        places = generator.integers(images, size=(sets, images)) + np.arange(sets)[:, None] * images
        times_SN = np.bincount(places.ravel(), minlength=sets * images).reshape(sets, images)
        drawn.append(times_SN.astype(np.float64) @ counts_NK)
    sums = np.concatenate(drawn)
    return sums / sums.sum(axis=1, keepdims=True)
