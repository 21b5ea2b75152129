"""Rounds whose ratio is auto: what they cost, and how precise predictions of held-out images are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.config.recipe import Recipe
from darseg.data.dataset import read_truth
from darseg.data.files import raise_if_unreadable, read_file, write_whole
from darseg.data.manifest import Manifest, Sample
from darseg.data.prediction import ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.model.network import Network
from darseg.pseudo.distribution import count_each
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.precision import LEAST_HELD_OUT, HeldOutBuilder, HeldOutCounts
from darseg.pseudo.scores import ScoreSource
from darseg.run.build import masks
from darseg.run.calibrate import damaged_counts
from darseg.run.folds import TRAINED_ROUND, assigned_folds, fold_count, fold_warnings, held_out_role
from darseg.run.label_task import Progress
from darseg.training.processes import Processes


def notes_of_auto(recipe: Recipe, manifest: Manifest, *, steps: int, network: Network) -> list[str]:
    """What a plan says of rounds whose ratio is auto. Label maps are read if the recipe cross-fits.

    Args:
        steps: of round 0.
        network: its network.
    """
    parameters = sum(parameter.numel() for parameter in network.parameters())
    lines = describe_auto(recipe, manifest, steps=steps, parameters=parameters)
    if fold_count(recipe, len(manifest.validation)):
        with contextlib.suppress(
            DataError
        ):  # lines about the target of labels say that label maps are damaged
            pixels = count_each(masks(manifest.labeled), len(manifest.classes))
            folds = assigned_folds(recipe, manifest, pixels)
            lines += fold_warnings(manifest.classes.names, pixels, folds)
    return lines


def describe_auto(recipe: Recipe, manifest: Manifest, *, steps: int = 0, parameters: int = 0) -> list[str]:
    """What rounds whose ratio is auto do, and what that costs: lines, or none.

    Args:
        steps: of round 0.
        parameters: number of values in its network.
    """
    rounds = recipe.follows_precision
    if not rounds:
        return []
    held_out, unlabeled = len(manifest.validation), len(manifest.unlabeled)
    folds, role = fold_count(recipe, held_out), held_out_role(recipe, held_out)
    held_out = len(manifest.roles()[role])
    named = f"round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds))}"
    chosen = ""
    if recipe.result.keep == "best" and not folds:
        chosen = ". result.keep: best chooses the network by the same images, so their precision is a little optimistic"
    return [
        f"labeling_ratio auto ({named}): of each class, as much as keeps a precision of "
        f"{recipe.labeling.target_precision:g} on the {held_out} {role} images, at most its share. Each time these "
        f"are predicted as well, {held_out} images more than the {unlabeled} unlabeled ones{chosen}",
        *describe_folds(recipe, manifest, steps=steps, parameters=parameters),
    ]


def describe_folds(recipe: Recipe, manifest: Manifest, *, steps: int, parameters: int = 0) -> list[str]:
    """What a run that cross-fits trains in addition, what it costs and assumes: lines, or none.

    Arguments are those of `describe_auto`; parameters 0: disk is not mentioned.
    """
    labeled, validation = len(manifest.labeled), len(manifest.validation)
    count, auto = fold_count(recipe, validation), recipe.follows_precision
    if not count:
        return []
    why = (
        ""
        if recipe.labeling.cross_fit
        else f", since {LEAST_HELD_OUT} validation images are needed and there are {validation}"
    )
    disk = f", and {count * parameters * 4 / 1e6:.0f} MB that stay in the run folder" if parameters else ""
    lines = [
        f"cross-fit{why}: before round {auto[0]}, {count} more networks are trained as round {TRAINED_ROUND} is. Each "
        f"learns from the {labeled} labeled images without a fold, 1/{count} of them, and predicts that fold. This is "
        f"{count} times {steps} steps more, {count} times as long as round {TRAINED_ROUND}{disk}"
    ]
    if later := [index for index in auto if recipe.labeled_by(index) != TRAINED_ROUND]:
        lines.append(
            f"cross-fit: in round {', '.join(map(str, later))}, too, precision is that of networks which are trained as "
            f"round {TRAINED_ROUND} is. A network that learned from pseudo labels is more confident than these, so the "
            "target is less certain to be kept"
        )
    return lines


@dataclass(frozen=True)
class HeldOutPart:
    """Labeled images that a network was not trained on.

    Attributes:
        load: the network's predictor, which keeps nothing on the disk; called only if the images are predicted.
    """

    samples: Sequence[Sample]
    load: Callable[[], Predictor | ScoreSource]


@dataclass(frozen=True)
class HeldOut:
    """Labeled images, each predicted as the unlabeled ones by a network that was not trained on it.

    Attributes:
        parts: by their networks; their counts are added up.
        folds: how many parts of the labeled images these are; 0: validation images.
        file: where the counts are kept until labeling is done.
        warn: called by the first process with a sentence if that file is damaged and all images are predicted again.
    """

    parts: Sequence[HeldOutPart]
    folds: int
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
    builder = HeldOutBuilder(classes, scale)

    def count(sample: Sample, prediction: Prediction) -> None:
        builder.add(prediction, read_truth(sample))

    for part in held_out.parts:
        predictor = processes.together(part.load)
        if isinstance(predictor, ScoreSource):
            predictor = predictor.predictor(factors)
        own = processes.share(part.samples, predictor.images)
        with progress("predict held-out images", len(own)) as advance:
            processes.together(partial(predictor.run, own, count, advance))
    total = processes.add_up(processes.together(builder.build).pack())
    counts = processes.together(lambda: HeldOutCounts.unpack(total, scale))
    processes.from_first(lambda: write_whole(held_out.file, counts.to_bytes()))
    return counts


def _read(held_out: HeldOut, classes: int, scale: ConfidenceScale) -> HeldOutCounts | None:
    """Counts that an earlier call kept; None if they have to be made."""
    file, images = held_out.file, sum(len(part.samples) for part in held_out.parts)
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
