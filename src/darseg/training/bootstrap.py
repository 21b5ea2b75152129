"""Whether a difference of scores is more than chance: a paired bootstrap over images.

Letters: N images, K classes, S sets of images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darseg.data.resampling import LEVEL, RESAMPLES, expanded_tail

LEAST_HELD_OUT = 10
"""Held-out images below which no interval decides: with 5, 1 of 11 networks that gain nothing would be taken for one that
gains, instead of 1 of 17 (docs/experiments.md)."""
BLOCK = 100
"""Sets drawn at a time, for constant memory."""


class Difference(NamedTuple):
    """A difference of two mean IoU, and the ends of its interval."""

    mean_iou: float
    low: float
    high: float


def counts_of_image(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [3, K]: of each class the right, the true and the predicted pixels of a confusion matrix."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)])


def iou_of(counts_S3K: NDArray) -> NDArray[np.float64]:
    """float64 [..., K]: IoU of added `counts_of_image`, [..., 3, K]; NaN without pixels."""
    right, true, predicted = np.moveaxis(counts_S3K.astype(np.float64), -2, 0)
    union = true + predicted - right
    return np.divide(right, union, out=np.full_like(right, np.nan), where=union > 0)


def mean_iou_of(counts_S3K: NDArray) -> NDArray[np.float64]:
    """float64 [...]: the mean of `iou_of` over the classes that occur; NaN without pixels."""
    return mean_over_classes(iou_of(counts_S3K))


def mean_over_classes(iou: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the last axis, the classes, of those that are not NaN; NaN if all are."""
    occurs = ~np.isnan(iou)
    classes = occurs.sum(axis=-1)
    total = np.where(occurs, iou, 0).sum(axis=-1)
    return np.divide(total, classes, out=np.full(classes.shape, np.nan), where=classes > 0)


def drawn_counts(
    counts_RN3K: NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """float64 [R, S, 3, K]: added counts of S drawn sets of images.

    A set has as many images as there are, drawn with replacement.

    Args:
        counts_RN3K: `counts_of_image` of the same images by R networks; each set holds the same images for all of them.
        seed: of the drawing; the same seed draws the same sets.
    """
    networks, images, _, classes = counts_RN3K.shape
    parts_RNC = counts_RN3K.reshape(networks, images, -1).astype(np.float64)
    generator = np.random.default_rng(seed)
    share = np.full(images, 1 / images)
    drawn = [
        generator.multinomial(images, share, size=min(BLOCK, resamples - at)) @ parts_RNC
        for at in range(0, resamples, BLOCK)
    ]
    return np.concatenate(drawn, axis=1).reshape(networks, resamples, 3, classes)


def expanded_interval(
    drawn_S: NDArray[np.float64], *, level: float, images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends of the interval that holds the true value with chance `level`.

    Few images vary less among themselves than those they are drawn from, so the interval holds more than `level` of the
    drawn values: as much more as one of Student's t is wider than one of the normal distribution. NaN is left out.

    Source: expanded percentile interval, Hesterberg, What Teachers Should Know About the Bootstrap, 2015.

    Args:
        drawn_S: float64 [S, ...]: the values of drawn sets of images.
        images: in a set.
    """
    tail = expanded_tail(level, images)
    low, high = np.nanquantile(drawn_S, [tail, 1 - tail], axis=0)
    return low, high


def paired_difference(
    counts_N3K: NDArray[np.int64],
    other_N3K: NDArray[np.int64],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Difference:
    """Mean IoU of `other` minus that of `counts`, and how far it varies with the images.

    Images are drawn with replacement, the same ones for both (`drawn_counts`). The interval is an `expanded_interval` of
    the differences. NaN without a scored pixel.

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
    both_RN3K = np.stack([counts_N3K, other_N3K])
    plain, other = mean_iou_of(both_RN3K.sum(axis=1))
    plain_S, other_S = mean_iou_of(drawn_counts(both_RN3K, seed=seed, resamples=resamples))
    low, high = expanded_interval(other_S - plain_S, level=level, images=images)
    return Difference(float(other - plain), low=float(low), high=float(high))
