"""From the trials of an experiment to means, paired differences, and how sure they are.

Two things vary: the images (others could have been drawn) and the training (other seeds could have been taken). An
interval adds both. With a mean m, a t interval over the seeds m ± a, and a bootstrap interval over the images from m - b
to m + c, it goes from m - √(a² + b²) to m + √(a² + c²). For independent normal parts it holds the true value at least
as often as either part would.

Sources: Banerjee, Approximate confidence interval for linear functions of means of k populations when the population
variances are not equal, Sankhya 1960; for the ends of intervals instead of standard errors: Zou and Donner, Construction
of confidence limits about effect measures, Statistics in Medicine 2008.

Letters: R seeds, N images, S drawn sets of images, K classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from darseg.data.resampling import student_t
from darseg.experiment.trial import Arm, Basis, Evidence, RoleScores, Trial
from darseg.training.bootstrap import (
    RESAMPLES,
    drawn_counts,
    expanded_interval,
    iou_of,
    mean_over_classes,
)

Role = Literal["validation", "test"]
Decisions = Literal["plain", "aligned"]

LEVEL = 0.95
"""How often an interval should hold the true value."""
POINT = 0.01
"""A difference of one point of mean IoU."""
POWER = 0.8
"""How often a true difference of one point should be told apart from none."""
MOST_SEEDS = 1000
"""Numbers of seeds above are not given."""
WIDE = 0.5
"""The score of a class says little if its interval is wider: half of all scores are possible."""
FEW_SHOWING = 5
"""Nor does it if fewer images show the class: an interval over so few images is too narrow."""
BOOTSTRAP_SEED = 0
"""Of the drawing of images, the same for all arms, so that the same trials give the same intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the interval of the true value; NaN where it is unknown.

    Attributes:
        deviation: sample standard deviation over the seeds; NaN for fewer than two.
        image_low, image_high: the part of the interval that the images alone cause. More seeds do not narrow it.
    """

    mean: float
    deviation: float
    low: float
    high: float
    image_low: float
    image_high: float

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class ClassScore:
    """IoU of a class, and in how many images it occurs."""

    iou: Estimate
    images: int

    @property
    def uncertain(self) -> bool:
        """Whether the score says little: a wide interval or none, or too few images for an interval."""
        return self.images < FEW_SHOWING or not self.iou.width <= WIDE


@dataclass(frozen=True)
class Score:
    """Mean IoU of an arm on the images of a role, with one kind of decisions.

    Attributes:
        seeds: those that have it, ascending.
        values: mean IoU of each, of the added counts of all images.
    """

    role: Role
    decisions: Decisions
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean_iou: Estimate
    classes: tuple[ClassScore, ...]


@dataclass(frozen=True)
class Difference:
    """Mean IoU of a variant minus that of a control, paired by seed and image.

    Attributes:
        basis: what the control has as much of.
        seeds: those that both have, ascending.
        values: one for each seed.
        classes: differences of IoU.
        seeds_for_one_point: smallest number of seeds that tells a difference of POINT on these images, with chance POWER;
            None if it is unknown or above MOST_SEEDS.
    """

    role: Role
    decisions: Decisions
    basis: Basis
    control: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean_iou: Estimate
    classes: tuple[Estimate, ...]
    seeds_for_one_point: int | None

    @property
    def includes_training(self) -> bool:
        """Whether the interval includes the variation between seeds; that of one seed cannot."""
        return len(self.seeds) > 1

    @property
    def told_apart(self) -> bool:
        """Whether the interval includes training and not 0."""
        return self.includes_training and (self.mean_iou.low > 0 or self.mean_iou.high < 0)


@dataclass(frozen=True)
class Summary:
    """One arm: its cost, scores and differences. Costs are means over the seeds; NaN without a run.

    Attributes:
        trials: ascending by seed.
    """

    arm: Arm
    seeds: tuple[int, ...]
    steps: float
    images: float
    seconds: float
    scores: tuple[Score, ...]
    differences: tuple[Difference, ...]

    def score(self, role: Role, decisions: Decisions = "plain") -> Score | None:
        """Its score, if there is one."""
        return next(
            (score for score in self.scores if (score.role, score.decisions) == (role, decisions)), None
        )

    def difference(
        self, role: Role = "validation", decisions: Decisions = "plain", basis: Basis | None = None
    ) -> Difference | None:
        """Its difference to the control of this basis, by default to its first control."""
        if basis is None and self.arm.controls:
            basis = self.arm.controls[0][0]
        wanted = (role, decisions, basis)
        return next((it for it in self.differences if (it.role, it.decisions, it.basis) == wanted), None)


@dataclass(frozen=True, eq=False)
class Comparison:
    """An experiment's answer. rows: one for each arm, in the order of the experiment."""

    evidence: Evidence
    rows: tuple[Summary, ...]
    images: Mapping[Role, int]

    @property
    def labels(self) -> tuple[int, ...]:
        """The numbers of labels of variants, ascending."""
        return tuple(sorted({row.arm.labels for row in self.variants}))

    @property
    def variants(self) -> tuple[Summary, ...]:
        return tuple(row for row in self.rows if row.arm.kind == "variant")


@dataclass(frozen=True, eq=False)
class _Drawn:
    """The scores of an arm by seed: IoU of all images float64 [R, K], and of drawn sets [R, S, K]."""

    seeds: tuple[int, ...]
    iou_RK: NDArray[np.float64]
    iou_RSK: NDArray[np.float64]
    images: int
    images_with_class_K: NDArray[np.int64]

    def of(self, seeds: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The scores of these seeds."""
        at = [self.seeds.index(seed) for seed in seeds]
        return self.iou_RK[at], self.iou_RSK[at]


def compare_trials(evidence: Evidence, resamples: int = RESAMPLES) -> Comparison:
    """The statistics of an experiment; the order of its trials and of their images does not matter.

    Args:
        resamples: number of drawn sets of images.
    """
    trials: dict[Arm, list[Trial]] = {arm: [] for arm in evidence.arms}
    arms = {(arm.name, arm.labels): arm for arm in evidence.arms}
    for trial in sorted(evidence.trials, key=lambda trial: trial.seed):
        trials[arms[trial.variant, trial.labels]].append(trial)
    scores: dict[Arm, list[Score]] = {arm: [] for arm in evidence.arms}
    differences: dict[Arm, list[Difference]] = {arm: [] for arm in evidence.arms}
    images: dict[Role, int] = {}
    for labels in sorted({arm.labels for arm in evidence.arms}):
        same = [arm for arm in evidence.arms if arm.labels == labels]
        for role, decisions in itertools.product(get_args(Role), get_args(Decisions)):
            drawn = {arm.name: _draw(trials[arm], role, decisions, resamples=resamples) for arm in same}
            for arm in same:
                if (own := drawn[arm.name]) is None:
                    continue
                images[role] = own.images
                scores[arm].append(_score(own, role, decisions))
                differences[arm] += _differences(arm, drawn, role=role, decisions=decisions)
    rows = [
        Summary(
            arm,
            tuple(trial.seed for trial in trials[arm]),
            steps=_mean(trial.steps for trial in trials[arm]),
            images=_mean(trial.images for trial in trials[arm]),
            seconds=_mean(trial.seconds for trial in trials[arm]),
            scores=tuple(scores[arm]),
            differences=tuple(differences[arm]),
        )
        for arm in evidence.arms
    ]
    return Comparison(evidence, tuple(rows), images)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan


def _draw(trials: Sequence[Trial], role: Role, decisions: Decisions, *, resamples: int) -> _Drawn | None:
    """The scores of the trials that have them; None if none has."""
    seeds, counts = [], []
    for trial in trials:
        scores: RoleScores | None = getattr(trial, role)
        counts_N3K = None if scores is None else getattr(scores, decisions)
        if scores is None or counts_N3K is None or not len(counts_N3K):
            continue
        seeds.append(trial.seed)
        counts.append(counts_N3K[sorted(range(len(scores.ids)), key=scores.ids.__getitem__)])
    if not seeds:
        return None
    counts_RN3K = np.stack(counts)
    return _Drawn(
        tuple(seeds),
        iou_of(counts_RN3K.sum(axis=1)),
        iou_of(drawn_counts(counts_RN3K, seed=BOOTSTRAP_SEED, resamples=resamples)),
        images=counts_RN3K.shape[1],
        images_with_class_K=(counts_RN3K[0, :, 1] > 0).sum(axis=0),
    )


def _score(own: _Drawn, role: Role, decisions: Decisions) -> Score:
    values_R = mean_over_classes(own.iou_RK)
    return Score(
        role,
        decisions,
        own.seeds,
        values=tuple(values_R.tolist()),
        mean_iou=within(estimate(values_R, mean_over_classes(own.iou_RSK), images=own.images)),
        classes=tuple(
            ClassScore(within(estimate(own.iou_RK[:, k], own.iou_RSK[..., k], images=own.images)), int(count))
            for k, count in enumerate(own.images_with_class_K)
        ),
    )


def _differences(
    arm: Arm, drawn: Mapping[str, _Drawn | None], *, role: Role, decisions: Decisions
) -> Iterator[Difference]:
    """Those of an arm that was scored to those of its controls that have a seed in common with it."""
    own = drawn[arm.name]
    for basis, name in arm.controls:
        control = drawn[name]
        seeds = [] if own is None or control is None else sorted(set(own.seeds) & set(control.seeds))
        if own is None or control is None or not seeds:
            continue
        iou_RK, iou_RSK = own.of(seeds)
        control_RK, control_RSK = control.of(seeds)
        values_R = mean_over_classes(iou_RK) - mean_over_classes(control_RK)
        mean_iou = estimate(
            values_R, mean_over_classes(iou_RSK) - mean_over_classes(control_RSK), images=own.images
        )
        by_class_RK, by_class_RSK = iou_RK - control_RK, iou_RSK - control_RSK
        yield Difference(
            role,
            decisions,
            basis,
            control=name,
            seeds=tuple(seeds),
            values=tuple(values_R.tolist()),
            mean_iou=mean_iou,
            classes=tuple(
                estimate(by_class_RK[:, k], by_class_RSK[..., k], images=own.images)
                for k in range(by_class_RK.shape[1])
            ),
            seeds_for_one_point=seeds_needed(mean_iou.deviation),
        )


def estimate(values_R: NDArray[np.float64], drawn_RS: NDArray[np.float64], *, images: int) -> Estimate:
    """The mean over seeds and the interval of its true value.

    The interval is for other images and, with several seeds, for other seeds.

    Args:
        values_R: float64 [R]: of all images, by seed.
        drawn_RS: float64 [R, S]: of drawn sets of images, the same for all seeds.
        images: in a set. An interval needs two.
    """
    mean = float(values_R.mean())
    drawn_S = drawn_RS.mean(axis=0)
    known_S = drawn_S[~np.isnan(drawn_S)]  # a set of images may lack a class
    seeds = len(values_R)
    deviation = float(np.std(values_R, ddof=1)) if seeds > 1 else math.nan
    if images < 2 or math.isnan(mean) or not len(known_S):
        return Estimate(mean, deviation, low=math.nan, high=math.nan, image_low=math.nan, image_high=math.nan)
    low, high = (float(end) for end in expanded_interval(known_S, level=LEVEL, images=images))
    low, high = min(low, mean), max(high, mean)
    training = 0.0
    if seeds > 1:
        training = -student_t((1 - LEVEL) / 2, seeds - 1) * deviation / math.sqrt(seeds)
    return Estimate(
        mean,
        deviation,
        low=mean - math.hypot(mean - low, training),
        high=mean + math.hypot(high - mean, training),
        image_low=low,
        image_high=high,
    )


def within(iou: Estimate) -> Estimate:
    """The same for a score, which is never below 0 or above 1."""
    return replace(iou, low=max(iou.low, 0.0), high=min(iou.high, 1.0)) if iou.low == iou.low else iou


def seeds_needed(deviation: float, difference: float = POINT) -> int | None:
    """How many seeds tell a difference, with chance POWER at LEVEL; None above MOST_SEEDS.

    Source: the sample size of a paired t test: n ≥ (t(1 - α/2, n - 1) + t(power, n - 1))² · deviation² / difference².

    >>> seeds_needed(0.01)
    10
    """
    if math.isnan(deviation):
        return None
    for seeds in range(2, MOST_SEEDS + 1):
        width = -student_t((1 - LEVEL) / 2, seeds - 1) - student_t(1 - POWER, seeds - 1)
        if (width * deviation / difference) ** 2 <= seeds:
            return seeds
    return None
