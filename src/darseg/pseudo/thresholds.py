"""Which confidences to accept per class, and what share of the accepted pixels to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16, SCALES, ConfidenceScale
from darseg.errors import DataError, RecipeError, faults
from darseg.pseudo.distribution import ClassDistribution, check_class_count
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labeling import Labeling

AUTO = (
    "labeling_ratio: auto is for the rounds of `darseg train`, which predict held-out labeled images too. Give a share "
    "of the pixels here, above 0 and at most 1."
)


@dataclass(frozen=True, eq=False)
class Thresholds:
    """What labeling accepts and keeps of each of K classes.

    Attributes:
        accept: int32 [K], smallest accepted confidence code; `scale.codes`, which accepts nothing, for a class that
            was never predicted.
        keep: float64 [K], share of the accepted pixels to keep; 0 if nothing is accepted or wanted.
        wanted: int64 [K], target number of pixels.
        predicted: int64 [K], pixels predicted as the class.
        accepted: int64 [K], pixels at or above the threshold; at most `predicted`.
        scale: what the codes mean.

    Raises DataError if the fields contradict each other.
    """

    accept: NDArray[np.int32]
    keep: NDArray[np.float64]
    wanted: NDArray[np.int64]
    predicted: NDArray[np.int64]
    accepted: NDArray[np.int64]
    scale: ConfidenceScale = FLOAT16

    def __post_init__(self) -> None:
        dtypes = {"accept": np.int32, "keep": np.float64}
        lines = []
        for field in fields(self)[:5]:
            array, dtype = np.array(getattr(self, field.name)), dtypes.get(field.name, np.int64)
            if array.dtype != dtype or array.ndim != 1 or len(array) != np.size(self.accept):
                expected = f"{np.dtype(dtype)} [{np.size(self.accept)}]"
                lines.append(f"{field.name} is {array.dtype} {list(array.shape)}; expected {expected}")
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        if lines:
            raise DataError(faults("Thresholds are arrays with one entry per class", lines))
        check_class_count(len(self.accept))
        codes = self.scale.codes
        nothing = self.accept == codes
        laws = (
            (
                f"accept must be a code from 0 to {codes - 1}, or {codes}",
                (self.accept >= 0) & (self.accept <= codes),
            ),
            (
                "keep must be from 0 to 1, and 0 exactly if nothing is accepted or wanted",
                (self.keep >= 0) & (self.keep <= 1) & ((self.keep == 0) == (nothing | (self.wanted == 0))),
            ),
            ("wanted must not be negative", self.wanted >= 0),
            (
                "accepted must be from 0 to predicted",
                (self.accepted >= 0) & (self.accepted <= self.predicted),
            ),
            ("accepted must be 0 if the code accepts nothing", ~nothing | (self.accepted == 0)),
        )
        lines = [f"class {k}: {law}" for law, holds in laws for k in np.flatnonzero(~holds)]
        if lines:
            raise DataError(faults("These thresholds contradict each other", lines))

    @property
    def threshold(self) -> NDArray[np.float64]:
        """float64 [K]: smallest accepted confidence; NaN for classes that accept nothing."""
        threshold = np.full(len(self.accept), np.nan)
        accepts_any = self.accept != self.scale.codes
        threshold[accepts_any] = self.scale.confidence(self.accept[accepts_any])
        return threshold

    @classmethod
    def from_json(cls, columns: Mapping[str, Any]) -> Thresholds:
        """The thresholds that `to_json` described. Other entries are ignored; the rest raises DataError."""
        try:
            scale = SCALES[columns["confidence"]]
            threshold = np.array([np.nan if v is None else v for v in columns["threshold"]], np.float64)
            accept = np.array(columns["code"], np.int32)
            counts = {name: np.array(columns[name]) for name in ("wanted", "predicted", "accepted")}
            thresholds = cls(accept, np.array(columns["keep"], np.float64), **counts, scale=scale)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"These are not thresholds ({type(error).__name__}: {error}). The file is damaged or of another kind; "
                "label again."
            ) from error
        if not np.array_equal(thresholds.threshold, threshold, equal_nan=True):
            raise DataError("The thresholds do not match their codes. The file was changed; label again.")
        return thresholds

    def to_json(self) -> dict[str, Any]:
        """A JSON object, a list per field; a threshold is None for a class that is never predicted."""
        return {
            "confidence": self.scale.name,
            "threshold": [None if np.isnan(value) else value for value in self.threshold.tolist()],
            "keep": self.keep.tolist(),
            "wanted": self.wanted.tolist(),
            "predicted": self.predicted.tolist(),
            "accepted": self.accepted.tolist(),
            "code": self.accept.tolist(),
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thresholds) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )


def choose_thresholds(
    histogram: ConfidenceHistogram, labeling: Labeling, distribution: ClassDistribution
) -> Thresholds:
    """The thresholds that a labeling chooses for these predictions.

    Args:
        distribution: shares of the classes among labeled pixels; only method "dars" follows them.

    Raises DataError for an empty histogram or one of another number of classes; RecipeError for ratio "auto", which needs
    held-out images (`choose_by_precision`).
    """
    if labeling.ratio == "auto":
        raise RecipeError(AUTO)
    match labeling.method:
        case "global":
            assert labeling.threshold is not None  # checked by Labeling
            return choose_global(histogram, labeling.threshold)
        case "cbst":
            assert labeling.ratio is not None
            return choose_cbst(histogram, labeling.ratio)
        case "dars":
            assert labeling.ratio is not None
            sampling = labeling.sampling == "random"
            return choose_dars(histogram, distribution, labeling.ratio, sampling=sampling)


def choose_dars(
    histogram: ConfidenceHistogram,
    distribution: ClassDistribution,
    labeling_ratio: float,
    sampling: bool = True,
) -> Thresholds:
    """Distribution alignment with random sampling (DARS, sections 3.2 and 3.3).

    Of class k, n_k = int(labeling_ratio · share_k · all pixels) are wanted, multiplied in this order in
    float64. The threshold is the n_k-th largest confidence among the pixels predicted as k, the smallest
    if fewer were predicted, the largest if none is wanted. The kept share is n_k ÷ (pixels at or above it),
    at most 1. A class that was never predicted accepts nothing.

    Args:
        labeling_ratio: above 0, at most 1.
        sampling: False keeps all accepted pixels, ties at the threshold included (alignment alone).

    Raises:
        RecipeError: the ratio is out of bounds.
        DataError: the histogram is empty or has another number of classes than the distribution.
    """
    if len(distribution) != len(histogram.counts):
        raise DataError(
            f"The class distribution has {len(distribution)} classes, the histogram has {len(histogram.counts)}. "
            "Measure both with the same classes."
        )
    Labeling("dars", labeling_ratio)  # checks the ratio
    predicted = _predicted(histogram)
    wanted = (float(labeling_ratio) * distribution.share * int(predicted.sum())).astype(np.int64)
    accept, accepted = _accept_largest(histogram, np.clip(wanted, 1, predicted))
    keep = np.minimum(1, wanted / np.maximum(accepted, 1)) if sampling else np.ones(len(wanted))
    keep = keep * ((accepted > 0) & (wanted > 0))
    return _thresholds(histogram, accept, keep=keep, wanted=wanted, accepted=accepted)


def choose_cbst(histogram: ConfidenceHistogram, labeling_ratio: float) -> Thresholds:
    """Class-balanced self-training: the same share of every class's own predictions, by confidence.

    The threshold is the (int(labeling_ratio · predicted_k) + 1)-th largest confidence of class k, the smallest
    if there are not so many (ratio 1). All pixels at or above it are kept; `wanted` is the rank used.

    Args:
        labeling_ratio: above 0, at most 1.

    Raises:
        RecipeError: the ratio is out of bounds.
        DataError: the histogram is empty.
    """
    Labeling("cbst", labeling_ratio)  # checks the ratio
    predicted = _predicted(histogram)
    rank = np.minimum((float(labeling_ratio) * predicted).astype(np.int64) + 1, predicted)
    accept, accepted = _accept_largest(histogram, rank)
    keep = (accepted > 0).astype(np.float64)
    return _thresholds(histogram, accept, keep=keep, wanted=rank, accepted=accepted)


def choose_global(histogram: ConfidenceHistogram, threshold: float) -> Thresholds:
    """One confidence threshold for all classes: every pixel whose confidence is >= `threshold` is kept.

    The comparison is exact: a threshold between the confidences of two codes means the larger one. `wanted` is
    what the threshold accepts, since there is no other target.

    Args:
        threshold: from 0 to 1.

    Raises:
        RecipeError: the threshold is out of bounds.
        DataError: the histogram is empty.
    """
    Labeling("global", threshold=threshold)  # checks the threshold
    predicted, codes = _predicted(histogram), histogram.scale.codes
    code = histogram.scale.at_least(threshold)
    accepted = histogram.counts[:, code:].sum(axis=1)
    accept = np.where(predicted > 0, code, codes).astype(np.int32)
    keep = (accepted > 0).astype(np.float64)
    return _thresholds(histogram, accept, keep=keep, wanted=accepted, accepted=accepted)


def _thresholds(
    histogram: ConfidenceHistogram,
    accept: NDArray[np.int32],
    *,
    keep: NDArray[np.float64],
    wanted: NDArray[np.int64],
    accepted: NDArray[np.int64],
) -> Thresholds:
    return Thresholds(
        accept=accept,
        keep=keep,
        wanted=wanted,
        predicted=histogram.predicted,
        accepted=accepted,
        scale=histogram.scale,
    )


def _accept_largest(
    histogram: ConfidenceHistogram, rank: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Code of each class's `rank`-th largest confidence, int32 [K]; pixels at or above it, int64 [K].

    Rank 0 gives the code that accepts nothing.
    """
    codes = histogram.scale.codes
    # at_least[k, c] counts the pixels of class k with code >= c; the last column accepts nothing.
    at_least = np.zeros((len(rank), codes + 1), np.int64)
    np.cumsum(histogram.counts[:, ::-1], axis=1, out=at_least[:, -2::-1])
    # Along c the counts never rise, so the columns with at least `rank` pixels come first.
    accept = (at_least >= rank[:, None]).sum(axis=1) - 1
    return accept.astype(np.int32), at_least[np.arange(len(rank)), accept]


def _predicted(histogram: ConfidenceHistogram) -> NDArray[np.int64]:
    predicted = histogram.predicted
    if not predicted.any():
        raise DataError(
            "The histogram counts no pixels, so no thresholds can be chosen. Predict unlabeled images first."
        )
    return predicted
