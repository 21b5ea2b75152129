"""Re-distribution on arrays: scores of any framework in, label maps out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from darseg.data.prediction import SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.model.decide import decide
from darseg.pseudo.assign import LabelRule, kept_counts
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.labeling import Confidence, Labeling, LabelingMethod, Sampling
from darseg.pseudo.thresholds import Thresholds, choose_thresholds


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Label maps by id (uint8 [H, W], 255 = not labeled), and what they were made by.

    Attributes:
        kept: int64 [K], labeled pixels per class over all maps.
    """

    labels: Mapping[str, NDArray[np.uint8]]
    histogram: ConfidenceHistogram
    thresholds: Thresholds
    kept: NDArray[np.int64]


def redistribute(
    predictions: Mapping[str, ArrayLike] | Iterable[tuple[str, ArrayLike]],
    class_counts: ArrayLike,
    labeling_ratio: float | None,
    *,
    method: LabelingMethod = "dars",
    threshold: float | None = None,
    confidence: Confidence = "float16",
    sampling: Sampling = "random",
    seed: int = 0,
    probabilities: bool = False,
) -> Redistribution:
    """Label images without majority bias (DARS, section 3), from predictions of any framework.

    Args:
        predictions: id → logits, float16 or float32 [K, H, W], sizes may differ; a mapping, or an iterable of pairs
            that is read once. Three bytes per pixel are kept in memory until the end.
        class_counts: labeled pixels of each class, integers [K].
        labeling_ratio: share of all pixels to label, above 0, at most 1; None with method "global".
        method: "dars", "cbst" or "global", the last one with `threshold`.
        threshold: confidence from 0 to 1, for method "global".
        confidence: "float16", as in the paper, or "fine", with hardly any ties.
        sampling: "random" drops the surplus that ties let in; "none" keeps it (method "dars").
        seed: of the random sampling, together with an image's id.
        probabilities: `predictions` are probabilities, after softmax.

    Raises:
        DataError: an array cannot be used; the message names its id.
        RecipeError: settings cannot work; the message names all of them.

    >>> scores = np.zeros((2, 1, 4), np.float32)
    >>> scores[1, 0] = [3, 2, 1, -1]
    >>> redistribute({"a": scores}, [50, 50], 0.5).labels["a"]
    array([[  1, 255, 255,   0]], dtype=uint8)
    """
    labeling = Labeling(method, labeling_ratio, threshold=threshold, confidence=confidence, sampling=sampling)
    distribution, scale = ClassDistribution.from_counts(class_counts), SCALES[labeling.confidence]
    classes = len(distribution)
    pairs: Any = predictions.items() if isinstance(predictions, Mapping) else predictions
    builder, decided = HistogramBuilder(classes, scale), {}
    for name, scores in pairs:
        if name in decided:
            raise DataError(f"The id {name!r} is given twice. Give every image an id of its own.")
        decided[name] = decide_array(
            np.asarray(scores), classes, scale, probabilities=probabilities, name=name
        )
        builder.add(decided[name])
    histogram = builder.build()
    rule = LabelRule(choose_thresholds(histogram, labeling, distribution), seed)
    labels = {name: rule.label_map(prediction, name) for name, prediction in decided.items()}
    kept = sum((kept_counts(label, classes) for label in labels.values()), np.zeros(classes, np.int64))
    return Redistribution(labels, histogram=histogram, thresholds=rule.thresholds, kept=kept)


def decide_array(
    scores: NDArray, classes: int, scale: ConfidenceScale, *, probabilities: bool, name: str
) -> Prediction:
    """`decide` on a foreign array. Raises DataError that begins with `name` unless it is [K, H, W]."""
    if scores.dtype not in (np.float16, np.float32):
        raise DataError(
            f"{name}: the array is {scores.dtype} {list(scores.shape)}; expected float16 or float32 [K, H, W]."
        )
    if scores.ndim == 3 and len(scores) != classes:
        raise DataError(
            f"{name}: the array {list(scores.shape)} has {len(scores)} classes, but the class counts have {classes}. "
            "Expected [K, H, W], classes first."
        )
    tensor = torch.from_numpy(np.ascontiguousarray(scores))
    return decide(tensor, scale, probabilities=probabilities, name=name)
