"""Re-distribution on arrays: scores of any framework in, label maps out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from darseg.data.prediction import SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.model.decide import PROBABILITY_TOLERANCE, decide
from darseg.pseudo.align import align as align_scores
from darseg.pseudo.alignment import Alignment, for_images
from darseg.pseudo.assign import LabelRule, kept_counts
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.labeling import AlignSettings, Confidence, Labeling, LabelingMethod, Sampling
from darseg.pseudo.pixel_sample import PixelSample
from darseg.pseudo.thresholds import Thresholds, choose_thresholds


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Label maps by id (uint8 [H, W], 255 = not labeled), and what they were made by.

    Attributes:
        kept: int64 [K], labeled pixels per class over all maps.
        alignment: the class weights that the decisions were made with; None without `align`.
    """

    labels: Mapping[str, NDArray[np.uint8]]
    histogram: ConfidenceHistogram
    thresholds: Thresholds
    kept: NDArray[np.int64]
    alignment: Alignment | None = None


def redistribute(
    predictions: Mapping[str, ArrayLike] | Iterable[tuple[str, ArrayLike]],
    class_counts: ArrayLike,
    labeling_ratio: float | None,
    *,
    method: LabelingMethod = "dars",
    threshold: float | None = None,
    confidence: Confidence = "float16",
    sampling: Sampling = "random",
    align: bool | AlignSettings = False,
    seed: int = 0,
    probabilities: bool = False,
) -> Redistribution:
    """Label images without majority bias (DARS, section 3), from predictions of any framework.

    Args:
        predictions: id → logits, floating-point numbers [K, H, W], sizes may differ; a mapping, or an iterable of pairs
            that is read once, with `align` twice. Three bytes per pixel are kept in memory until the end.
        class_counts: labeled pixels of each class, integers [K].
        labeling_ratio: share of all pixels to label, above 0, at most 1; None with method "global".
        method: "dars", "cbst" or "global", the last one with `threshold`.
        threshold: confidence from 0 to 1, for method "global".
        confidence: "float16", as in the paper, or "fine", with hardly any ties.
        sampling: "random" drops the surplus that ties let in; "none" keeps it (method "dars").
        align: first give the decisions the class shares of the labeled pixels; see `darseg.align`.
        seed: of the random sampling and of the sample that `align` looks at, together with an image's id.
        probabilities: `predictions` are probabilities, after softmax.

    Raises:
        DataError: an array cannot be used; the message names its id.
        RecipeError: settings cannot work; the message names all of them.

    >>> scores = np.zeros((2, 1, 4), np.float32)
    >>> scores[1, 0] = [3, 2, 1, -1]
    >>> redistribute({"a": scores}, [50, 50], 0.5).labels["a"]
    array([[  1, 255, 255,   0]], dtype=uint8)
    """
    choices: Any = {"threshold": threshold, "confidence": confidence, "sampling": sampling}
    labeling = Labeling(method, labeling_ratio, **choices, **AlignSettings.fields(align))
    distribution, scale = ClassDistribution.from_counts(class_counts), SCALES[labeling.confidence]
    classes = len(distribution)
    pairs: Any = predictions.items() if isinstance(predictions, Mapping) else predictions
    alignment = _align_arrays(pairs, labeling, distribution, seed=seed, probabilities=probabilities)
    weights = None if alignment is None else alignment.factors
    decided, histogram = _decide_all(pairs, classes, scale, probabilities=probabilities, weights=weights)
    rule = LabelRule(choose_thresholds(histogram, labeling, distribution), seed)
    labels = {name: rule.label_map(prediction, name) for name, prediction in decided.items()}
    kept = sum((kept_counts(label, classes) for label in labels.values()), np.zeros(classes, np.int64))
    return Redistribution(
        labels, histogram=histogram, thresholds=rule.thresholds, kept=kept, alignment=alignment
    )


def _decide_all(
    pairs: Iterable[tuple[str, ArrayLike]],
    classes: int,
    scale: ConfidenceScale,
    *,
    probabilities: bool,
    weights: NDArray[np.float64] | None,
) -> tuple[dict[str, Prediction], ConfidenceHistogram]:
    """The predictions by id, and their histogram; logits that look like probabilities are warned of."""
    builder, decided, alike = HistogramBuilder(classes, scale), {}, 0
    for name, array in pairs:
        if name in decided:
            raise DataError(f"The id {name!r} is given twice. Give every image an id of its own.")
        scores = np.asarray(array)
        alike += not probabilities and looks_like_probabilities(scores)
        decided[name] = decide_array(
            scores, classes, scale, probabilities=probabilities, name=name, weights=weights
        )
        builder.add(decided[name])
    if alike:
        message = probabilities_message(f"the scores of {alike} of {len(decided)} image(s)")
        warnings.warn(message, stacklevel=3)
    return decided, builder.build()


def _align_arrays(
    pairs: Iterable[tuple[str, ArrayLike]],
    labeling: Labeling,
    distribution: ClassDistribution,
    *,
    seed: int,
    probabilities: bool,
) -> Alignment | None:
    """The alignment that the settings ask for, from a sample of all pixels."""
    if labeling.align == "none":
        return None
    if iter(pairs) is pairs:
        raise DataError(
            "Aligning reads the predictions twice, and this iterator can be read only once. Give a mapping or a list of "
            "(id, scores), or use redistribute_folder."
        )
    sample = PixelSample(len(distribution), seed)
    images = 0
    for images, (name, scores) in enumerate(pairs, 1):  # noqa: B007
        # Scores of pixels that are not chosen are first looked at by `decide_array`.
        array = check_array(np.asarray(scores), sample.classes, name).numpy()
        sample.add(name, array, probabilities=probabilities)
    rows = sample.rows(sample.sizes())
    found = align_scores(rows, distribution.share, bound=labeling.bound, strength=labeling.strength)
    return for_images(found, images)


def decide_array(
    scores: NDArray,
    classes: int,
    scale: ConfidenceScale,
    *,
    probabilities: bool,
    name: str,
    weights: NDArray[np.float64] | None = None,
) -> Prediction:
    """`decide` on a foreign array. Raises DataError that begins with `name` unless it is [K, H, W]."""
    tensor = check_array(scores, classes, name)
    return decide(tensor, scale, probabilities=probabilities, name=name, weights=weights)


def check_array(scores: NDArray, classes: int, name: str) -> torch.Tensor:
    """A foreign array as a tensor, float64 as float32.

    Any order of bytes, and of axes in memory, is read.

    Raises DataError that begins with `name` for another type, shape or number of classes, with the likely cause.
    """
    shape = list(scores.shape)
    if scores.dtype.kind != "f" or scores.ndim != 3:
        raise DataError(
            f"{name}: the array is {scores.dtype} {shape}; expected floating-point scores [K, H, W]. "
            f"{_likely_cause(scores, classes)}"
        )
    if len(scores) != classes:
        cause = ""
        if shape[-1] == classes:
            cause = " This looks like [H, W, K]: write numpy.moveaxis(array, -1, 0)."
        raise DataError(
            f"{name}: the array {shape} has {len(scores)} classes, but the class counts have {classes}. "
            f"Expected [K, H, W], classes first.{cause}"
        )
    half = scores.dtype.itemsize == 2
    with np.errstate(over="ignore"):  # what is infinite in float32 is refused later
        return torch.from_numpy(np.ascontiguousarray(scores, np.float16 if half else np.float32))


def _likely_cause(scores: NDArray, classes: int) -> str:
    """What an array of another type or number of axes probably is, and what to write instead."""
    if scores.ndim == 4 and len(scores) == 1:
        return "The first axis looks like a batch of one image: write array[0]."
    if scores.ndim == 4 and len(scores) != classes:
        return "The first axis looks like a batch: write one file for each image."
    if scores.ndim == 2:
        return "Classes or confidences alone are not enough: write the scores of all classes."
    if scores.dtype.kind in "iu":
        return "Whole numbers are rounded scores, or classes: write the scores before rounding."
    return "Write the scores of one image, before argmax."


SAMPLE = 4096
"""Pixels that are looked at before all others are."""


def looks_like_probabilities(scores: NDArray) -> bool:
    """Whether scores [K, H, W] are from 0 to 1 and add up to 1 over the classes at every pixel."""
    if scores.ndim != 3 or not scores.size or scores.dtype.kind != "f":
        return False
    pixels = scores.reshape(len(scores), -1)
    for part in (pixels[:, :: max(1, pixels.shape[1] // SAMPLE)], pixels):
        off = np.abs(part.sum(axis=0, dtype=np.float32) - 1).max()
        low, high = part.min(), part.max()
        if not (
            low >= -PROBABILITY_TOLERANCE
            and high <= 1 + PROBABILITY_TOLERANCE
            and off <= PROBABILITY_TOLERANCE
        ):
            return False
    return True


def probabilities_message(what: str) -> str:
    """What to say if scores that are given as logits look like probabilities."""
    return (
        f"{what} are from 0 to 1 and add up to 1, as probabilities do, but they were taken as logits. If they are "
        "probabilities, label again with --probabilities (probabilities=True); otherwise softmax is applied twice."
    )
