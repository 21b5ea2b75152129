"""How often each class occurs: the class shares that pseudo labels follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.data.advice import pixel_count
from darseg.data.classes import IGNORE
from darseg.errors import DataError, faults

SHARE_TOLERANCE = 1e-9
"""How far the sum of shares may be from 1; the rounding of 255 float64 divisions stays far below."""


@dataclass(frozen=True, eq=False)
class ClassDistribution:
    """The share of each class among all labeled pixels, without 255 (DARS, section 3.2).

    Attributes:
        share: float64 [K], K from 2 to 255, none negative, sum 1 within 1e-9.

    Raises DataError for other shares.

    >>> ClassDistribution.from_counts([30, 10]).share
    array([0.75, 0.25])
    """

    share: NDArray[np.float64]

    def __post_init__(self) -> None:
        share = np.array(self.share)
        if share.dtype != np.float64 or share.ndim != 1:
            raise DataError(f"Class shares are {share.dtype} {list(share.shape)}; expected float64 [K].")
        check_class_count(len(share))
        impossible = np.flatnonzero(~(np.isfinite(share) & (share >= 0)))
        if len(impossible):
            lines = [f"class {k}: {share[k]}" for k in impossible]
            raise DataError(faults("Class shares must be finite and not negative", lines))
        if abs(share.sum() - 1) > SHARE_TOLERANCE:
            raise DataError(
                f"Class shares add up to {share.sum()}, not 1. Divide them by their sum, or make them from pixel "
                "counts with ClassDistribution.from_counts."
            )
        share.flags.writeable = False
        object.__setattr__(self, "share", share)

    @classmethod
    def from_counts(cls, counts: ArrayLike) -> ClassDistribution:
        """The shares of pixel counts, integers [K]. Raises DataError if all are zero or one is negative."""
        counts = np.asarray(counts)
        if counts.ndim != 1 or counts.dtype.kind not in "iu":
            raise DataError(f"Pixel counts are {counts.dtype} {list(counts.shape)}; expected integers [K].")
        check_class_count(len(counts))
        negative = np.flatnonzero(counts < 0)
        if len(negative):
            lines = [f"class {k}: {counts[k]}" for k in negative]
            raise DataError(faults("Pixel counts must not be negative", lines))
        if not counts.any():
            raise DataError(
                f"All {len(counts)} pixel counts are zero, so there are no class shares. Give at least one label map "
                "that is not all 255."
            )
        return cls(counts / counts.sum())

    def __len__(self) -> int:
        return len(self.share)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassDistribution) and np.array_equal(self.share, other.share)


def check_class_count(classes: int) -> None:
    """Raise DataError unless there are 2 to 255 classes: label maps have 8 bits, and 255 is not a class."""
    if not 2 <= classes <= IGNORE:
        raise DataError(f"The number of classes is {classes}; expected 2 to {IGNORE}.")


def count_label_pixels(label: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Pixels of each class in one label map, uint8 [H, W] → int64 [K]; 255 is not counted.

    Raises DataError that lists every other value outside 0..K-1 with its count.
    """
    return count_labels([("label map", label)], classes)


def count_labels(labels: Iterable[tuple[str, NDArray[np.uint8]]], classes: int) -> NDArray[np.int64]:
    """Pixels of each class in many label maps, (name, uint8 [H, W]) one at a time → int64 [K].

    Raises DataError that names every label map with values that are neither a class nor 255.
    """
    return sum(_counted(labels, classes), np.zeros(classes, np.int64))


def count_each(labels: Iterable[tuple[str, NDArray[np.uint8]]], classes: int) -> NDArray[np.int64]:
    """Pixels of each class in each of many label maps, int64 [N, K]; otherwise as `count_labels`."""
    return np.array(list(_counted(labels, classes)), np.int64).reshape(-1, classes)


def _counted(labels: Iterable[tuple[str, NDArray[np.uint8]]], classes: int) -> Iterator[NDArray[np.int64]]:
    """The pixels of each class in each label map, int64 [K]; raises DataError after the last."""
    check_class_count(classes)
    lines = []
    for name, label in labels:
        if label.dtype != np.uint8 or label.ndim != 2:
            lines.append(f"{name}: {label.dtype} {list(label.shape)}; expected uint8 [H, W]")
            continue
        pixels = np.bincount(label.ravel(), minlength=IGNORE + 1)
        yield pixels[:classes]
        foreign = classes + np.flatnonzero(pixels[classes:IGNORE])
        if len(foreign):
            lines.append(f"{name}: " + ", ".join(f"value {v} ({pixel_count(pixels[v])})" for v in foreign))
    if lines:
        headline = (
            f"Label values must be class indices 0..{classes - 1}, or {IGNORE} for pixels that are not labeled (for "
            "Cityscapes use *_gtFine_labelTrainIds.png)"
        )
        raise DataError(faults(headline, lines))
