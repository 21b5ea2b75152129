"""The whole of it on arrays: anybody's scores in, re-distributed label maps out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from darseg.data.prediction import SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError, RecipeError, faults
from darseg.model.decide import decide
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.thresholds import Thresholds, choose_cbst, choose_dars, choose_global

METHODS = ("dars", "cbst", "global")


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
    method: str = "dars",
    threshold: float | None = None,
    confidence: str = "float16",
    sampling: str = "random",
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
    choose = chooser(method, class_counts, labeling_ratio, threshold, sampling, confidence)
    scale = scale_of(confidence)
    classes = len(np.asarray(class_counts))
    pairs: Any = predictions.items() if isinstance(predictions, Mapping) else predictions
    builder, decided = HistogramBuilder(classes, scale), {}
    for name, scores in pairs:
        if name in decided:
            raise DataError(f"{name!r} is given twice: an id names one image.")
        decided[name] = decide_array(np.asarray(scores), classes, scale, probabilities, name)
        builder.add(decided[name])
    histogram = builder.build()
    thresholds = choose(histogram)
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


def scale_of(confidence: str) -> ConfidenceScale:
    """The confidence scale of that name. Raises RecipeError."""
    if confidence not in SCALES:
        raise RecipeError(f"No confidence scale {confidence!r}: there are {', '.join(SCALES)}.")
    return SCALES[confidence]


def chooser(
    method: str,
    class_counts: ArrayLike,
    labeling_ratio: float | None,
    threshold: float | None = None,
    sampling: str = "random",
    confidence: str = "float16",
) -> partial[Thresholds]:
    """The labeling method of that name, ready for a histogram. Raises RecipeError naming all that does not fit."""
    wrong = []
    if confidence not in SCALES:
        wrong.append(f"confidence {confidence!r}: there are {', '.join(SCALES)}")
    if sampling not in ("random", "none"):
        wrong.append(f"sampling {sampling!r}: there are random and none")
    elif sampling == "none" and method in ("cbst", "global"):
        wrong.append(f"only method dars samples, so {method} takes no sampling none")
    if method not in METHODS:
        wrong.append(f"method {method!r}: there are {', '.join(METHODS)}")
    elif method == "global":
        if threshold is None:
            wrong.append("method global needs a threshold, a confidence between 0 and 1")
        elif not 0 <= threshold <= 1:
            wrong.append(f"a confidence threshold of {threshold}: choose one from 0 to 1")
        if labeling_ratio is not None:
            wrong.append("method global takes no labeling ratio: the threshold decides")
    else:
        if labeling_ratio is None:
            wrong.append(f"method {method} needs a labeling ratio, above 0 and at most 1")
        elif not 0 < labeling_ratio <= 1:
            wrong.append(f"a labeling ratio of {labeling_ratio}: choose one above 0 and at most 1")
        if threshold is not None:
            wrong.append(f"method {method} takes no threshold (only global does)")
    if wrong:
        raise RecipeError(faults("These settings cannot work", wrong))
    distribution = ClassDistribution.from_counts(class_counts)
    if method == "global":
        assert threshold is not None
        return partial(choose_global, threshold=threshold)
    assert labeling_ratio is not None
    if method == "cbst":
        return partial(choose_cbst, labeling_ratio=labeling_ratio)
    aligned = {"distribution": distribution, "labeling_ratio": labeling_ratio}
    return partial(choose_dars, **aligned, sampling=sampling == "random")
