"""Scores of a segmentation, all derived from one confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE


@dataclass(frozen=True)
class Scores:
    """Confusion matrix int64 [K, K]: rows are the truth, columns the prediction; ignored pixels left out.

    A prediction of 255 ("no answer", as pseudo labels give) is left out too. Undefined figures are NaN.
    """

    confusion: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.confusion.ndim != 2 or self.confusion.shape[0] != self.confusion.shape[1]:
            raise ValueError(f"A confusion matrix is square, this has shape {self.confusion.shape}.")

    @classmethod
    def empty(cls, classes: int) -> Scores:
        """Scores of no image."""
        return cls(np.zeros((classes, classes), np.int64))

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.confusion + other.confusion)

    def plus(self, truth: NDArray[np.uint8], predicted: NDArray[np.uint8]) -> Scores:
        """These scores with one more image: truth and predicted uint8 [H, W]."""
        classes = len(self.confusion)
        seen = (truth != IGNORE) & (predicted != IGNORE)
        pairs = truth[seen].astype(np.int64) * classes + predicted[seen]
        return Scores(self.confusion + np.bincount(pairs, minlength=classes**2).reshape(classes, classes))

    @cached_property
    def iou(self) -> NDArray[np.float64]:
        """float64 [K]: intersection over union; NaN for a class in neither truth nor prediction."""
        right = np.diag(self.confusion)
        return _share(right, self.confusion.sum(0) + self.confusion.sum(1) - right)

    @cached_property
    def recall(self) -> NDArray[np.float64]:
        """float64 [K]: share of a class's true pixels that are predicted as it ("class accuracy")."""
        return _share(np.diag(self.confusion), self.confusion.sum(1))

    @cached_property
    def precision(self) -> NDArray[np.float64]:
        """float64 [K]: share of the pixels predicted as a class that are it."""
        return _share(np.diag(self.confusion), self.confusion.sum(0))

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes for which it is defined."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of `recall` over the classes that occur in the truth."""
        return _mean(self.recall)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all scored pixels that are right."""
        total = int(self.confusion.sum())
        return float(np.trace(self.confusion) / total) if total else float("nan")

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Plain values; undefined figures are None."""
        return {
            "mean_iou": number(self.mean_iou),
            "mean_accuracy": number(self.mean_accuracy),
            "pixel_accuracy": number(self.pixel_accuracy),
            "iou": {name: number(value) for name, value in zip(names, self.iou, strict=True)},
            "precision": {name: number(value) for name, value in zip(names, self.precision, strict=True)},
            "recall": {name: number(value) for name, value in zip(names, self.recall, strict=True)},
            "confusion": self.confusion.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` described. Raises ValueError, TypeError or KeyError for others."""
        confusion = np.array(data["confusion"])
        if confusion.dtype != np.int64 or confusion.min(initial=0) < 0:
            raise ValueError("a confusion matrix holds counts of pixels")
        return cls(confusion)


def number(value: float) -> float | None:
    """A float for JSON; None if it is not a number."""
    return None if np.isnan(value) else float(value)


def _share(part: np.ndarray, whole: np.ndarray) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
