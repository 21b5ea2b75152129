"""Rounds whose ratio is auto: what they need, and how precise predictions of held-out images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.config.recipe import Recipe
from darseg.data.dataset import read_truth
from darseg.data.files import raise_if_unreadable, read_file, write_whole
from darseg.data.manifest import Manifest, Sample
from darseg.data.prediction import ConfidenceScale, Prediction
from darseg.errors import DataError, RecipeError
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.precision import LEAST_HELD_OUT, HeldOutBuilder, HeldOutCounts
from darseg.pseudo.scores import ScoreSource
from darseg.run.calibrate import damaged_counts
from darseg.run.label_task import Progress
from darseg.training.processes import Processes


def check_held_out(recipe: Recipe, manifest: Manifest) -> None:
    """Raise RecipeError if a ratio is auto and too few images are held out to measure precision on."""
    held_out = len(manifest.validation)
    if recipe.follows_precision and held_out < LEAST_HELD_OUT:
        index = recipe.follows_precision[0]
        raise RecipeError(
            f"rounds.{index}.labeling_ratio: auto measures on the validation images how precise predictions are, and "
            f"there are {held_out}; at least {LEAST_HELD_OUT} are needed. Hold more labeled images out, as with "
            "data.validation: {every: 4}, or give a number."
        )


def describe_auto(recipe: Recipe, manifest: Manifest) -> list[str]:
    """What rounds whose ratio is auto do, and what that costs: a line, or none."""
    rounds = recipe.follows_precision
    if not rounds:
        return []
    held_out, unlabeled = len(manifest.validation), len(manifest.unlabeled)
    named = f"round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds))}"
    chosen = ""
    if recipe.result.keep == "best":
        chosen = ". result.keep: best chooses the network by the same images, so their precision is a little optimistic"
    return [
        f"labeling_ratio auto ({named}): of each class, as much as keeps a precision of "
        f"{recipe.labeling.target_precision:g} on the {held_out} validation images, at most its share. Each time these "
        f"are predicted as well, {held_out} images more than the {unlabeled} unlabeled ones{chosen}"
    ]


@dataclass(frozen=True)
class HeldOut:
    """Labeled images that a network was not trained on, predicted as it predicts the unlabeled ones.

    Attributes:
        predictor: keeps nothing on the disk.
        file: where the counts are kept until labeling is done.
        warn: called by the first process with a sentence if that file is damaged and all images are predicted again.
    """

    samples: Sequence[Sample]
    predictor: Predictor | ScoreSource
    file: Path
    warn: Callable[[str], object]


def count_held_out(
    held_out: HeldOut,
    *,
    classes: int,
    scale: ConfidenceScale,
    factors: NDArray[np.float64] | None,
    processes: Processes,
    progress: Progress,
) -> HeldOutCounts:
    """The counts of all held-out images, each predicted by a process; or those of an earlier call.

    Args:
        factors: class weights of aligned decisions; None: decisions are plain.
    """
    counts = processes.from_first(lambda: _read(held_out, classes, scale))
    if counts is not None:
        return counts
    predictor = held_out.predictor
    if isinstance(predictor, ScoreSource):
        predictor = predictor.predictor(factors)
    builder, own = HeldOutBuilder(classes, scale), processes.share(held_out.samples, predictor.images)

    def count(sample: Sample, prediction: Prediction) -> None:
        builder.add(prediction, read_truth(sample))

    with progress("predict held-out images", len(own)) as advance:
        processes.together(lambda: predictor.run(own, count, advance))
    part = processes.together(builder.build)
    total = processes.add_up(part.pack())
    counts = processes.together(lambda: HeldOutCounts.unpack(total, scale))
    processes.from_first(lambda: write_whole(held_out.file, counts.to_bytes()))
    return counts


def _read(held_out: HeldOut, classes: int, scale: ConfidenceScale) -> HeldOutCounts | None:
    """Counts that an earlier call kept; None if they have to be made."""
    file, images = held_out.file, len(held_out.samples)
    if not file.exists():
        return None
    try:
        counts = HeldOutCounts.from_bytes(read_file(file))
        if (counts.classes, counts.held_out, counts.scale) != (classes, images, scale):
            raise DataError(
                f"it has {counts.held_out} images of {counts.classes} classes, {counts.scale.name}"
            )
        return counts
    except (OSError, DataError) as error:
        raise_if_unreadable(error, file)
        held_out.warn(damaged_counts(file, error))
        return None
