"""Folds of the labeled images: each is predicted by a network that was trained on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.config.recipe import Recipe
from darseg.data.manifest import Manifest, Sample
from darseg.data.splits import draw
from darseg.errors import RecipeError
from darseg.pseudo.precision import LEAST_HELD_OUT
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal
from darseg.run.records import StepRecord

USUAL_FOLDS = 2
"""Folds if the recipe names no number: the cheapest. More train longer, and on more of the images."""

UNLEARNED = (
    "cross-fit: all labeled images of these classes are in one fold. The network that predicts these images has not "
    "learned the class, and every other prediction of it is wrong, so little or nothing of it will be pseudo-labeled"
)
"""Begins the warning of classes of which no precision can be measured; their names follow."""

TRAINED_ROUND = 0
"""The round as which the network of a fold is trained: the one on labeled images alone."""


@dataclass(frozen=True)
class Fold:
    """A part of the labeled images.

    Attributes:
        number: its own, from 0 on.
        count: of all folds.
        held_out: its images.
        rest: those of the other folds, on which its network is trained.
    """

    number: int
    count: int
    held_out: tuple[Sample, ...]
    rest: tuple[Sample, ...]


def fold_count(recipe: Recipe, validation: int) -> int:
    """How many folds the labeled images of a run are divided into; 0 if it does not cross-fit.

    Args:
        validation: number of validation images.
    """
    if not recipe.follows_precision:
        return 0
    return recipe.labeling.cross_fit or (USUAL_FOLDS if validation < LEAST_HELD_OUT else 0)


def planned_folds(recipe: Recipe, validation: int, steps: int) -> dict[int, tuple[int, int]]:
    """Round → number of networks that are trained on folds before it, and the steps of each.

    Args:
        validation: number of validation images.
        steps: of the round as which they are trained.
    """
    count = fold_count(recipe, validation)
    return {recipe.follows_precision[0]: (count, steps)} if count else {}


def held_out_role(recipe: Recipe, validation: int) -> str:
    """The images on which rounds whose ratio is auto measure precision; empty if there is no such round.

    Args:
        validation: number of validation images.
    """
    if fold_count(recipe, validation):
        return "labeled"
    return "validation" if recipe.follows_precision else ""


def check_folds(recipe: Recipe, manifest: Manifest) -> None:
    """Raise RecipeError if a run has to cross-fit and cannot: too few images, or another network."""
    labeled, validation = len(manifest.labeled), len(manifest.validation)
    count = fold_count(recipe, validation)
    if not count:
        return
    key = f"rounds.{recipe.follows_precision[0]}.labeling_ratio"
    trained = "trains networks on parts of the labeled images as round 0 is trained"
    without = ", and leave out labeling.cross_fit" if recipe.labeling.cross_fit else ""
    otherwise = (
        f"hold at least {LEAST_HELD_OUT} labeled images out, as with data.validation: {{every: 4}}{without}, or give a "
        "number"
    )
    if labeled < LEAST_HELD_OUT:
        raise RecipeError(
            f"{key}: auto measures how precise predictions are on images that a network was not trained on. There are "
            f"{validation} validation images, and {labeled} labeled ones to cross-fit; at least {LEAST_HELD_OUT} of "
            f"either are needed. Label more images, {otherwise}."
        )
    if count > labeled:
        raise RecipeError(
            f"labeling.cross_fit: {count} folds cannot be made of {labeled} labeled images. Give {labeled} at most; "
            f"{USUAL_FOLDS} are the cheapest."
        )
    if recipe.image_classes is not None:
        raise RecipeError(
            f"image_classes: the classifier learns from all labeled images and changes what networks predict of them, so "
            f"{key}: auto cannot cross-fit them. Remove image_classes, {otherwise}."
        )
    if recipe.rounds[0].use == "online" or recipe.pseudo_labels(0):
        raise RecipeError(
            f"{key}: auto cross-fits here, which {trained}. But round 0 learns from unlabeled images too. Let it learn "
            f"from labeled images alone, {otherwise}."
        )
    if recipe.rounds[0].labeled_part is not None:
        raise RecipeError(
            f"rounds.0.labeled_part: round 0 learns from a part of the labeled images, and {key}: auto cross-fits here, "
            f"which {trained}. Remove labeled_part, {otherwise}."
        )
    for index in recipe.follows_precision:
        if isinstance(recipe.rounds[index].labels_from, str) or any(
            map(recipe.starts, _labelers(recipe, index))
        ):
            raise RecipeError(
                f"rounds.{index}.labeling_ratio: auto cross-fits here, which {trained}. But another network labels "
                f"in this round, and they say nothing about its precision. Let round 0's network label, {otherwise}."
            )


def _labelers(recipe: Recipe, index: int) -> Sequence[int]:
    """The rounds whose networks may label in a round that has no labeler of another run."""
    named = recipe.result.keep == "last" or isinstance(recipe.rounds[index].labels_from, int)
    return [recipe.labeled_by(index)] if named else range(index)


def assign_folds(
    samples: Sequence[Sample], present_NK: NDArray[np.bool_], count: int, *, seed: int
) -> tuple[int, ...]:
    """The fold of each sample. Ids and seed decide, and folds have about the same mix of classes.

    A class that several images have is nearly always in several folds; see `fold_warnings`.

    Args:
        present_NK: whether an image has pixels of a class.
        count: of folds, at least 1 and at most one for each sample.
    """
    names, fold_of = [sample.id for sample in samples], dict[str, int]()
    for fold in range(count - 1):
        open_ = [place for place, name in enumerate(names) if name not in fold_of]
        drawn = draw(
            [names[place] for place in open_],
            len(open_) // (count - fold),
            seed,
            present=present_NK[open_],
        )
        fold_of |= dict.fromkeys(drawn, fold)
    return tuple(fold_of.get(name, count - 1) for name in names)


def folds_of(samples: Sequence[Sample], fold_of: Sequence[int]) -> tuple[Fold, ...]:
    """The folds, by what `assign_folds` returned; none of an empty assignment."""
    if not fold_of:
        return ()
    pairs, count = list(zip(samples, fold_of, strict=True)), max(fold_of) + 1
    return tuple(
        Fold(
            number,
            count,
            held_out=tuple(sample for sample, fold in pairs if fold == number),
            rest=tuple(sample for sample, fold in pairs if fold != number),
        )
        for number in range(count)
    )


def assigned_folds(recipe: Recipe, manifest: Manifest, pixels_NK: NDArray[np.int64]) -> tuple[int, ...]:
    """The fold of each labeled image; none if the run does not cross-fit.

    Args:
        pixels_NK: pixels of each class in each labeled image.
    """
    count = fold_count(recipe, len(manifest.validation))
    return assign_folds(manifest.labeled, pixels_NK > 0, count, seed=recipe.seed) if count else ()


def fold_warnings(names: Sequence[str], pixels_NK: NDArray[np.int64], fold_of: Sequence[int]) -> list[str]:
    """A line about classes whose images are all in one fold; none without such, and without folds.

    Args:
        names: of the classes.
        pixels_NK: pixels of each class in each labeled image.
        fold_of: what `assigned_folds` returned.
    """
    if not fold_of:
        return []
    folds = np.array(fold_of)
    alone = [
        name for name, has in zip(names, (pixels_NK > 0).T, strict=True) if len({*folds[has].tolist()}) == 1
    ]
    return [f"{UNLEARNED}: {', '.join(alone)}"] if alone else []


def fold_run(run: RunDirectory, number: int) -> RunDirectory:
    """The folder of a fold's training: that of a run with one round."""
    return RunDirectory(run.root / "folds" / f"fold_{number}")


def fold_records(run: RunDirectory, count: int | None = None) -> list[StepRecord]:
    """The records of the networks that folds have trained.

    Args:
        count: of folds; None: not known. A record that is missing ends them.
    """
    records: list[StepRecord] = []
    while count is None or len(records) < count:
        record = fold_run(run, len(records)).read_record(TRAINED_ROUND, "train")
        if record is None:
            break
        records.append(record)
    return records


class FoldJournal(Journal):
    """A run's journal as the training of a fold sees it: its events have names of their own.

    Otherwise its steps would be taken for those of the round as which it is trained.
    """

    def __init__(self, journal: Journal, fold: Fold) -> None:
        super().__init__(journal.path, None, journal.console)
        self._fold, self._title = fold.number, f"fold {fold.number + 1} of {fold.count}"

    def event(self, name: str, **fields: Any) -> None:
        """Append `fold_NAME`, with the number of the fold; warnings are those of the run."""
        if name == "warning":
            super().event(name, **fields)
        else:
            super().event(f"fold_{name}", fold=self._fold, **fields)

    def events(self, *names: str) -> list[dict]:
        """The events that `event` appended for this fold."""
        listed = super().events(*(f"fold_{name}" for name in names))
        return [event for event in listed if event.get("fold") == self._fold]

    def say(self, text: str) -> None:
        """Print a line about the fold."""
        super().say(f"{self._title}: {text}")

    def warn(self, text: str) -> None:
        """Print a warning about the fold and add it to the journal."""
        super().warn(f"{self._title}: {text}")
