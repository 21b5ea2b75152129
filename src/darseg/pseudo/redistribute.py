"""The whole of it on arrays: anybody's scores in, re-distributed label maps out."""

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
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.labeling import Confidence, Labeling, Method, Sampling
from darseg.pseudo.thresholds import Thresholds, choose_thresholds


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Label maps by id (uint8 [H, W], 255 = not labeled) and how they came about.

    kept: int64 [K], pixels labeled per class, over all maps.
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
    method: Method = "dars",
    threshold: float | None = None,
    confidence: Confidence = "float16",
    sampling: Sampling = "random",
    seed: int = 0,
    probabilities: bool = False,
) -> Redistribution:
    """Label images without the bias toward majority classes (DARS, section 3), from predictions of any framework.

    Args:
        predictions: id → logits, float16 or float32 [K, H, W], sizes may differ; a mapping, or an iterable of pairs
            that is gone through once. Of each image three bytes a pixel are kept until the end.
        class_counts: labeled pixels of each class, integers [K].
        labeling_ratio: share of all pixels to label, above 0, at most 1; None with method "global".
        method: "dars", "cbst" or "global", the latter with `threshold`.
        confidence: "float16", as the paper has it, or "fine", where ties nearly vanish.
        sampling: "random" drops the surplus that ties let in; "none" keeps it (method "dars").
        seed: of the random sampling, with an image's id.
        probabilities: `predictions` are softmaxed already.

    Raises DataError naming the image, RecipeError for settings that cannot work.

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
            raise DataError(f"{name!r} is given twice: an id names one image.")
        decided[name] = decide_array(np.asarray(scores), classes, scale, probabilities, name)
        builder.add(decided[name])
    histogram = builder.build()
    thresholds = choose_thresholds(histogram, labeling, distribution)
    labels = {
        name: assign(prediction, thresholds, image_generator(seed, 0, name))
        for name, prediction in decided.items()
    }
    kept = sum((kept_counts(label, classes) for label in labels.values()), np.zeros(classes, np.int64))
    return Redistribution(labels, histogram, thresholds, kept)


def decide_array(
    scores: NDArray, classes: int, scale: ConfidenceScale, probabilities: bool, name: str
) -> Prediction:
    """`decide` on an array that someone else made. Raises DataError naming it."""
    if scores.dtype not in (np.float16, np.float32):
        raise DataError(
            f"{name}: found {scores.dtype} {list(scores.shape)}, wanted float16 or float32 [K, H, W]."
        )
    if scores.ndim == 3 and len(scores) != classes:
        raise DataError(
            f"{name}: found {list(scores.shape)}, that is {len(scores)} classes; the class counts have {classes}. "
            "Wanted is [K, H, W], classes first."
        )
    tensor = torch.from_numpy(np.ascontiguousarray(scores))
    return decide(tensor, scale, probabilities, name)
