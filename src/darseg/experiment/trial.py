"""What the runs of an experiment leave for its statistics: arms, trials with scores, failures.

Letters: N images, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darseg.errors import RunError, faults, shortened

Kind = Literal["variant", "control", "ceiling"]
"""What an arm is for; a ceiling trains on all labels."""

Basis = Literal["steps", "images", "seconds"]
"""What a control has as much of as its variant."""


@dataclass(frozen=True, eq=False)
class RoleScores:
    """The scores of one run on the images of one role.

    Attributes:
        ids: of the images, each once.
        plain: int64 [N, 3, K], `counts_of_image` of each image, of the network's plain decisions.
        aligned: the same of its aligned decisions; None if the run has none.

    Raises ValueError for counts of other shapes or types.
    """

    ids: tuple[str, ...]
    plain: NDArray[np.int64]
    aligned: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an image is scored twice")
        for counts in (self.plain, self.aligned):
            if counts is None:
                continue
            if counts.dtype != np.int64 or counts.ndim != 3 or counts.shape[:2] != (len(self.ids), 3):
                raise ValueError(
                    f"counts are {counts.dtype} {list(counts.shape)}, expected int64 [{len(self.ids)}, 3, K]"
                )


@dataclass(frozen=True)
class Arm:
    """One variant, control or ceiling at one number of labels; its runs differ in their seeds.

    Attributes:
        name: of the variant; unique among the arms of the same number of labels.
        labels: the number of labeled images that it trains on.
        controls: of a variant: what its control has as much of, and the control's name, an arm of the same number of
            labels. Differences are reported to the first one.
        changes: of the base recipe, "key=value" each, for readers.
    """

    name: str
    labels: int
    kind: Kind = "variant"
    controls: tuple[tuple[Basis, str], ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Trial:
    """A run that ended, of the arm with this variant's name and number of labels.

    Attributes:
        steps: of training, of all its rounds.
        images: that it saw in training, counted as often as it saw them.
        seconds: of labeling and training, without scores; of rounds that it took over, those of the run that did them.
        validation, test: None if they were not scored.
    """

    variant: str
    labels: int
    seed: int
    steps: int
    images: int
    seconds: float
    validation: RoleScores | None
    test: RoleScores | None = None


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error. reason: one line."""

    variant: str
    labels: int
    seed: int
    reason: str


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that an experiment knows so far.

    Attributes:
        title: of the experiment.
        classes: their names.
        planned: number of runs when everything is done.
        added_after_test: names of variants that were added to the experiment after it had scored test images.
        test_in_validation: how many test images are validation images too, by their content.
        notes: warnings of the runner, shown on the page.
        facts: name and value, for the end of the page: machine, version, commit.

    Raises RunError if trials do not fit together: an unknown arm, a seed twice, other images, other classes.
    """

    title: str
    classes: tuple[str, ...]
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    failures: tuple[Failure, ...] = ()
    planned: int = 0
    added_after_test: tuple[str, ...] = ()
    test_in_validation: int = 0
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        known = {(arm.name, arm.labels) for arm in self.arms}
        twice = [
            key for key, count in Counter((arm.name, arm.labels) for arm in self.arms).items() if count > 1
        ]
        lines = [f"variant {shortened(name)} with {labels} labels: named twice" for name, labels in twice]
        for arm in self.arms:
            lines += [
                f"{_place(arm.name, arm.labels)}: its control {shortened(name)} is no variant of that number of labels"
                for _, name in arm.controls
                if (name, arm.labels) not in known
            ]
        ended: Sequence[Trial | Failure] = (*self.trials, *self.failures)
        lines += [
            f"{_place(item.variant, item.labels, item.seed)}: no such variant"
            for item in ended
            if (item.variant, item.labels) not in known
        ]
        seeds = Counter((item.variant, item.labels, item.seed) for item in ended)
        lines += [f"{_place(*key)}: given {count} times" for key, count in seeds.items() if count > 1]
        for role in ("validation", "test"):
            lines += _differing(role, self.trials, len(self.classes))
        if lines:
            raise RunError(faults("These runs cannot be compared", lines))


def _place(name: str, labels: int, seed: int | None = None) -> str:
    place = f"variant {shortened(name)} with {labels} labels"
    return place if seed is None else f"{place}, seed {seed}"


def _differing(role: str, trials: Iterable[Trial], classes: int) -> list[str]:
    """A line for each run that was scored on other images than the first, or with other classes."""
    lines, reference = [], None
    for trial in trials:
        scores: RoleScores | None = getattr(trial, role)
        if scores is None:
            continue
        place = f"{_place(trial.variant, trial.labels, trial.seed)}"
        for counts in (scores.plain, scores.aligned):
            if counts is not None and counts.shape[2] != classes:
                lines.append(
                    f"{place}: scores of {counts.shape[2]} classes on {role} images, expected {classes}"
                )
        if reference is None:
            reference = set(scores.ids)
        elif set(scores.ids) != reference:
            differing = min(set(scores.ids) ^ reference)
            lines.append(
                f"{place}: scored on {len(scores.ids)} {role} images, the first run on {len(reference)}; "
                f"{shortened(differing)} is not in both"
            )
    return lines
