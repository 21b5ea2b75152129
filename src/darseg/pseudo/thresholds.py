"""Which confidences to accept per class, and what share of the accepted pixels to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16_CODES
from darseg.errors import DataError, RecipeError, faults
from darseg.pseudo.distribution import ClassDistribution, check_class_count
from darseg.pseudo.histogram import ConfidenceHistogram

ACCEPT_NOTHING = FLOAT16_CODES
"""The threshold code of a class of which no pixel is accepted: one above the code of confidence 1."""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """What a labelling accepts and keeps of each of K classes.

    accept: int32 [K], smallest accepted confidence code; ACCEPT_NOTHING for a class that was never
        predicted (found 0) or of which nothing is wanted (wanted 0).
    keep: float64 [K], share of the accepted pixels to keep; 0 exactly where nothing is accepted.
    wanted: int64 [K], pixels aimed at.
    found: int64 [K], pixels predicted as the class.
    accepted: int64 [K], pixels at or above the threshold; at most `found`.

    Raises DataError for fields that do not fit together.
    """

    accept: NDArray[np.int32]
    keep: NDArray[np.float64]
    wanted: NDArray[np.int64]
    found: NDArray[np.int64]
    accepted: NDArray[np.int64]

    def __post_init__(self) -> None:
        dtypes = {"accept": np.int32, "keep": np.float64}
        lines = []
        for field in fields(self):
            array, dtype = np.array(getattr(self, field.name)), dtypes.get(field.name, np.int64)
            if array.dtype != dtype or array.ndim != 1 or len(array) != np.size(self.accept):
                wanted = f"{np.dtype(dtype)} [{np.size(self.accept)}]"
                lines.append(f"{field.name} is {array.dtype} {list(array.shape)} instead of {wanted}")
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        if lines:
            raise DataError(faults("Thresholds need arrays with one entry per class", lines))
        check_class_count(len(self.accept))
        nothing = self.accept == ACCEPT_NOTHING
        laws = (
            (
                "accept must be a code from 0 to 15360, or 15361",
                (self.accept >= 0) & (self.accept <= ACCEPT_NOTHING),
            ),
            (
                "keep must lie in [0, 1] and be 0 just where nothing is accepted",
                (self.keep >= 0) & (self.keep <= 1) & ((self.keep == 0) == nothing),
            ),
            ("wanted must not be negative", self.wanted >= 0),
            ("accepted must lie between 0 and found", (self.accepted >= 0) & (self.accepted <= self.found)),
            ("accepted must be 0 where nothing is accepted", ~nothing | (self.accepted == 0)),
        )
        lines = [f"{law}: broken for class {k}" for law, holds in laws for k in np.flatnonzero(~holds)]
        if lines:
            raise DataError(faults("Thresholds that do not fit together", lines))

    @property
    def threshold(self) -> NDArray[np.float64]:
        """float64 [K]: smallest accepted confidence; NaN where no confidence is accepted."""
        threshold = np.full(len(self.accept), np.nan)
        some = self.accept != ACCEPT_NOTHING
        threshold[some] = self.accept[some].astype(np.uint16).view(np.float16)
        return threshold

    @classmethod
    def from_json(cls, columns: Mapping[str, Any]) -> Thresholds:
        """What `to_json` made; other entries do not matter. Raises DataError for anything else."""
        try:
            nothing = [value is None for value in columns["threshold"]]
            threshold = np.array(
                [0.0 if value is None else value for value in columns["threshold"]], np.float64
            )
            counts = {name: np.array(columns[name]) for name in ("wanted", "found", "accepted")}
            keep = np.array(columns["keep"], np.float64)
            rounded = np.clip(threshold, 0, 1).astype(np.float16)
            accept = np.where(nothing, ACCEPT_NOTHING, rounded.view(np.uint16)).astype(np.int32)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"These are not thresholds ({type(error).__name__}: {error}): the file is damaged or "
                "of another kind; label again."
            ) from error
        if not np.array_equal(rounded, threshold):
            raise DataError(
                "A threshold is not a float16 in [0, 1]: the thresholds file was changed; label again."
            )
        return cls(accept, keep, **counts)

    def to_json(self) -> dict[str, list[Any]]:
        """A JSON object, a list per field; thresholds as confidences, None where nothing is accepted."""
        return {
            "threshold": [None if np.isnan(value) else value for value in self.threshold.tolist()],
            "keep": self.keep.tolist(),
            "wanted": self.wanted.tolist(),
            "found": self.found.tolist(),
            "accepted": self.accepted.tolist(),
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thresholds) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )


def choose_dars(
    histogram: ConfidenceHistogram, distribution: ClassDistribution, labeling_ratio: float
) -> Thresholds:
    """Distribution alignment with random sampling (DARS, sections 3.2 and 3.3).

    Of class k, n_k = int(labeling_ratio · share_k · all pixels) are wanted, multiplied in this order in
    float64. The threshold is the n_k-th largest confidence among the pixels predicted as k, or the smallest
    if fewer were predicted; the kept share is n_k ÷ (pixels at or above it), at most 1. With n_k = 0 nothing
    of the class is accepted, and so for a class that was never predicted.

    labeling_ratio: above 0, at most 1. Raises RecipeError for another, DataError for an empty histogram or
    one of another number of classes.
    """
    if len(distribution) != len(histogram.counts):
        raise DataError(
            f"A class distribution of {len(distribution)} classes and a histogram of "
            f"{len(histogram.counts)}: measure both with the same classes."
        )
    _check_ratio(labeling_ratio)
    found = _found(histogram)
    wanted = (float(labeling_ratio) * distribution.share * int(found.sum())).astype(np.int64)
    return _accept_largest(histogram, np.minimum(wanted, found), wanted)


def choose_cbst(histogram: ConfidenceHistogram, labeling_ratio: float) -> Thresholds:
    """Class-balanced self-training: the same share of every class's own predictions, by confidence.

    The threshold is the (int(labeling_ratio · found_k) + 1)-th largest confidence of class k, the smallest
    where there are not so many (ratio 1). All pixels at or above it are kept; `wanted` is the rank used.

    labeling_ratio: above 0, at most 1. Raises RecipeError for another, DataError for an empty histogram.
    """
    _check_ratio(labeling_ratio)
    found = _found(histogram)
    rank = np.minimum((float(labeling_ratio) * found).astype(np.int64) + 1, found)
    return _accept_largest(histogram, rank, None)


def choose_global(histogram: ConfidenceHistogram, threshold: float) -> Thresholds:
    """One confidence threshold for all classes: every pixel whose confidence is >= `threshold` is kept.

    The comparison is exact: a threshold between two float16 values means the next larger one. `wanted` is
    what the threshold lets in, as there is no other aim.

    threshold: in [0, 1]. Raises RecipeError for another, DataError for an empty histogram.
    """
    if not 0 <= threshold <= 1:
        raise RecipeError(f"A confidence threshold of {threshold}: choose one from 0 to 1.")
    found = _found(histogram)
    confidences = np.arange(FLOAT16_CODES, dtype=np.uint16).view(np.float16).astype(np.float64)
    code = int(np.searchsorted(confidences, threshold))
    accept = np.where(found > 0, code, ACCEPT_NOTHING).astype(np.int32)
    accepted = histogram.counts[:, code:].sum(axis=1)
    return Thresholds(accept, (found > 0).astype(np.float64), accepted, found, accepted)


def _accept_largest(
    histogram: ConfidenceHistogram, rank: NDArray[np.int64], wanted: NDArray[np.int64] | None
) -> Thresholds:
    """Accept down to the `rank[k]`-th largest confidence (0: nothing; at most found), ties included.

    `wanted` pixels of the accepted are to be kept; None: all, and `rank` is what was wanted.
    """
    # at_least[k, c]: pixels of class k with code >= c; the last column is ACCEPT_NOTHING's.
    at_least = np.zeros((len(rank), FLOAT16_CODES + 1), np.int64)
    np.cumsum(histogram.counts[:, ::-1], axis=1, out=at_least[:, -2::-1])
    # Never rising along c, so the columns holding at least `rank` pixels come first.
    accept = (at_least >= rank[:, None]).sum(axis=1) - 1
    accepted = at_least[np.arange(len(rank)), accept]
    keep = (accepted > 0).astype(np.float64)
    if wanted is not None:
        keep *= np.minimum(1, wanted / np.maximum(accepted, 1))
    return Thresholds(
        accept.astype(np.int32), keep, rank if wanted is None else wanted, histogram.predicted, accepted
    )


def _found(histogram: ConfidenceHistogram) -> NDArray[np.int64]:
    found = histogram.predicted
    if not found.any():
        raise DataError(
            "The histogram counts no pixel, so there is nothing to choose: predict unlabelled images first."
        )
    return found


def _check_ratio(labeling_ratio: float) -> None:
    if not 0 < labeling_ratio <= 1:
        raise RecipeError(
            f"A labelling ratio of {labeling_ratio}: it is the share of the unlabelled pixels to label, "
            "above 0 and at most 1."
        )
