"""Whether a difference of scores is more than chance: a paired bootstrap over images.

Letters: N images, K classes, S sets of images.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Drawn sets of images; the ends of a 90 % interval then vary by about 2 % of its width."""
LEVEL = 0.9
"""How often an interval should hold the true difference."""
BLOCK = 100
"""Sets drawn at a time, for constant memory."""


class Difference(NamedTuple):
    """A difference of two mean IoU, and the ends of its interval."""

    mean_iou: float
    low: float
    high: float


def expanded_tail(level: float, images: int) -> float:
    """Share of the drawn differences below an interval that holds the true one with chance `level`."""
    tail = (1 - level) / 2
    if images < 2:
        return tail
    return NormalDist().cdf(math.sqrt(images / (images - 1)) * student_t(tail, images - 1))


def student_t(share: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to 0.002 for shares from 0.05 to 0.95.

    Source: exact for 1 and 2 degrees of freedom; otherwise the expansion around the normal distribution in Abramowitz
    and Stegun, Handbook of Mathematical Functions 1964, 26.7.5.

    >>> round(student_t(0.05, 9), 2)
    -1.83
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    z, n = NormalDist().inv_cdf(share), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (order + 1) for order, term in enumerate(terms))


def counts_of_image(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [3, K]: of each class the right, the true and the predicted pixels of a confusion matrix."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)])


def mean_iou_of(counts_S3K: NDArray) -> NDArray[np.float64]:
    """float64 [S]: mean IoU of sets of images whose `counts_of_image` are added up; NaN without pixels."""
    right, true, predicted = np.moveaxis(counts_S3K.astype(np.float64), 1, 0)
    union = true + predicted - right
    occurs = union > 0
    iou = np.divide(right, union, out=np.zeros_like(right), where=occurs)
    classes = occurs.sum(axis=1)
    return np.divide(iou.sum(axis=1), classes, out=np.full(len(iou), np.nan), where=classes > 0)


def paired_difference(
    counts_N3K: NDArray[np.int64],
    other_N3K: NDArray[np.int64],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Mean IoU of `other` minus that of `counts`, and how far it varies with the images.

    Images are drawn with replacement, as many as there are, the same ones for both; the interval holds the middle of the
    differences. Few images vary less among themselves than those they are drawn from, so the interval holds more than
    `level` of the differences: as much more as one of Student's t is wider than one of the normal distribution. NaN
    without a scored pixel.

    Source: expanded percentile interval, Hesterberg, What Teachers Should Know About the Bootstrap, 2015.

    Args:
        counts_N3K, other_N3K: `counts_of_image` of the same images.
        seed: of the drawing; the same seed draws the same sets.

    >>> counts = np.array([[[5, 5], [10, 10], [10, 10]]] * 4)
    >>> paired_difference(counts, counts, seed=0)
    Difference(mean_iou=0.0, low=0.0, high=0.0)
    """
    images = len(counts_N3K)
    if not images or not counts_N3K.any():
        return Difference(np.nan, low=np.nan, high=np.nan)
    generator = np.random.default_rng(seed)
    both = np.stack([counts_N3K, other_N3K]).astype(np.float64).reshape(2, images, -1)

    def difference(times_SN: NDArray) -> NDArray[np.float64]:
        plain, other = (mean_iou_of((times_SN @ part).reshape(len(times_SN), 3, -1)) for part in both)
        return other - plain

    drawn = [
        difference(
            generator.multinomial(images, np.full(images, 1 / images), size=min(BLOCK, resamples - at))
        )
        for at in range(0, resamples, BLOCK)
    ]
    tail = expanded_tail(level, images)
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return Difference(float(difference(np.ones((1, images)))[0]), low=float(low), high=float(high))
