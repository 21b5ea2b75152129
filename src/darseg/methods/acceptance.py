"""Which predictions of unlabeled images are learned from: one value, matched in `accept`.

A further rule is a frozen dataclass here, a case of each `match`, and a key of the recipe that makes it
(config/online.py, run/online.py). A rule that remembers – a histogram, thresholds – keeps its tensors in the module that
`acceptance_state` makes; it lies in the method's state, so it is saved, resumed and placed with it. `accept` must not
change that module: it returns in `Accepted.seen` what all processes have seen, and `advance` adds it after the step. So
the rule of a step depends on the steps before it alone, which is the same for all processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from darseg.data.classes import IGNORE
from darseg.errors import RecipeError
from darseg.methods.aligned import WindowThresholds, codes_of, counted
from darseg.methods.draws import uniform
from darseg.methods.realigned import WeightSearch, WindowWeights
from darseg.methods.running_means import RunningMeans, sums_of

KEEP_DRAWS, SAMPLE_DRAWS = 1 << 20, 1 << 21
"""Part of the seed of draws that keep and sample pixels; those of mixing have the number of a view there."""

MOVED, UNALIGNED = "pixels_moved", "pixels_unaligned"
"""Figures of alignments: pixels inside whose class they changed, and those that were decided without weights."""


@dataclass(frozen=True)
class Above:
    """Accept pixels whose most probable class has at least this probability (FixMatch)."""

    threshold: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"The threshold {self.threshold} is not valid. Give a probability from 0 to 1.")


@dataclass(frozen=True)
class Aligned:
    """Accept pixels so that the labels have the class mix of the labeled pixels (DARS).

    Attributes:
        ratio: share of the predicted pixels to accept, the labeling ratio of DARS.
        window: steps after which thresholds and keep shares are chosen from the predictions of these steps. In the first
            window nothing is accepted.
        counts: labeled pixels per class, whose shares are followed; see `with_prior`.
    """

    ratio: float
    window: int = 50
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"The ratio {self.ratio} is not valid. Give a share above 0 and at most 1.")
        check_window(self.window)


@dataclass(frozen=True)
class ClassThresholds:
    """Accept by a threshold per class that follows the predictions (FreeMatch); see `RunningMeans`."""


Rule = Above | Aligned | ClassThresholds
"""What decides for each pixel."""


@dataclass(frozen=True)
class Realigned:
    """Give the decisions the class shares of the labeled pixels; then accept by another rule.

    Attributes:
        accept: the rule, for the probabilities times the weights.
        window: steps after which weights are found from the predictions of these steps. In the first window, and if none
            can be found, the decisions are the teacher's own.
        search: how they are found.
        counts: labeled pixels per class; see `with_prior`.
    """

    accept: Rule
    window: int = 50
    search: WeightSearch = field(default_factory=WeightSearch)
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_window(self.window)


@dataclass(frozen=True)
class MeanAligned:
    """Give mean probabilities the labeled class shares (ReMixMatch); then accept by another rule.

    Attributes:
        accept: the rule, for these probabilities.
        counts: labeled pixels per class; see `with_prior`.
    """

    accept: Rule
    counts: tuple[int, ...] = ()


Acceptance = Rule | Realigned | MeanAligned
"""What to accept."""


def check_window(window: int) -> None:
    """Raise RecipeError unless a window has steps."""
    if window < 1:
        raise RecipeError(f"A window of {window} steps is not valid. Give at least 1.")


def with_prior(how: Acceptance, counts: Sequence[int]) -> Acceptance:
    """The rule, with the labeled pixels per class if it follows them."""
    match how:
        case Above() | ClassThresholds():
            return how
        case Aligned():
            return replace(how, counts=tuple(counts))
        case Realigned(accept=rule) | MeanAligned(accept=rule):
            return replace(how, accept=with_prior(rule, counts), counts=tuple(counts))


def first_steps(how: Acceptance) -> int:
    """Steps of a round before the rule does what it is for."""
    match how:
        case Above() | ClassThresholds():
            return 0
        case MeanAligned(accept=rule):
            return first_steps(rule)
        case Aligned(window=window):
            return window
        case Realigned(accept=rule, window=window):
            return max(window, first_steps(rule))


def window_of(how: Acceptance) -> int:
    """Steps at the beginning of a round in which nothing is accepted."""
    match how:
        case Above() | ClassThresholds():
            return 0
        case Aligned(window=window):
            return window
        case MeanAligned(accept=rule) | Realigned(accept=rule):
            return window_of(rule)


@dataclass(frozen=True)
class Predicted:
    """What a teacher says about a process's share of the weak views.

    Attributes:
        probabilities: float [B, K, H, W].
        inside: bool [B, H, W], false on padding.
        positions: int64 [B], of the images in their stream: keys of draws (draws.py).
        seed: of the draws.
    """

    probabilities: Tensor
    inside: Tensor
    positions: Tensor
    seed: Sequence[int] = ()


@dataclass(frozen=True)
class Accepted:
    """What is learned from.

    Attributes:
        labels: uint8 [B, H, W]; 255: not accepted, or outside.
        predicted: uint8 [B, H, W], the classes before anything was rejected; 255: outside.
        seen: tensors that `advance` gets, added up over processes.
        figures: counts of pixels to report.
        thresholds: float [K], smallest accepted confidence of each class; NaN for classes of which nothing is accepted.
            None: the rule has one for all, which does not change.
    """

    labels: Tensor
    predicted: Tensor
    seen: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    thresholds: Tensor | None = None


class AlignmentState(nn.Module):
    """What an alignment remembers, and what the rule after it does."""

    def __init__(self, weights: WindowWeights | RunningMeans, rule: nn.Module) -> None:
        super().__init__()
        self.weights, self.rule = weights, rule


def acceptance_state(how: Acceptance, images: int, classes: int) -> nn.Module:
    """What a rule remembers from step to step, as buffers.

    Args:
        images: unlabeled ones of a step, over all processes.
        classes: K.
    """
    match how:
        case Above():
            return nn.Module()
        case Aligned():
            return WindowThresholds(classes)
        case ClassThresholds():
            return RunningMeans(classes)
        case Realigned(rule, window):
            weights = WindowWeights(classes, window=window, images=images)
            return AlignmentState(weights, acceptance_state(rule, images, classes))
        case MeanAligned(rule, counts):
            return AlignmentState(RunningMeans(classes, counts), acceptance_state(rule, images, classes))


def accept(how: Acceptance, state: nn.Module, predicted: Predicted) -> Accepted:
    """Labels for the pixels that the rule accepts; of equally probable classes the first."""
    if isinstance(how, Realigned | MeanAligned):
        assert isinstance(state, AlignmentState)
        return _accept_aligned(how, state, predicted)
    probabilities, inside = predicted.probabilities, predicted.inside
    confidence, classes = probabilities.max(1)
    labels = classes.to(torch.uint8).masked_fill(~inside, IGNORE)
    seen: Mapping[str, Tensor] = {}
    thresholds = None
    match how:
        case Above(threshold):
            kept = confidence >= threshold  # NaN is rejected
        case Aligned():
            assert isinstance(state, WindowThresholds)
            codes = codes_of(confidence, inside)
            kept = state.accepts(classes, codes, _pixel_draws(predicted))
            seen = {"confidences": counted(classes, codes, probabilities.shape[1])}
            thresholds = state.thresholds()
        case ClassThresholds():
            assert isinstance(state, RunningMeans)
            thresholds = state.class_thresholds()
            kept = confidence >= thresholds[classes]
            seen = {"sums": sums_of(probabilities, inside)}
    return Accepted(labels.masked_fill(~kept, IGNORE), labels, seen, thresholds=thresholds)


def advance(how: Acceptance, state: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
    """Let what a rule remembers follow, after the optimizers have stepped."""
    match how:
        case Above():
            pass
        case Aligned(ratio, window, counts):
            assert isinstance(state, WindowThresholds)
            state.follow(seen["confidences"], counts, ratio=ratio, full=(step + 1) % window == 0)
        case ClassThresholds():
            assert isinstance(state, RunningMeans)
            state.follow(seen["sums"])
        case MeanAligned(rule):
            assert isinstance(state, AlignmentState) and isinstance(state.weights, RunningMeans)
            state.weights.follow(seen["plain_sums"])
            advance(rule, state.rule, seen, step=step)
        case Realigned(rule, search=search, counts=counts):
            assert isinstance(state, AlignmentState) and isinstance(state.weights, WindowWeights)
            state.weights.follow(seen["sample"], step, share=counts, search=search)
            advance(rule, state.rule, seen, step=step)


def _accept_aligned(how: Realigned | MeanAligned, state: AlignmentState, predicted: Predicted) -> Accepted:
    """What the rule after an alignment accepts, with what the alignment sees and counts."""
    probabilities, inside, seed = predicted.probabilities, predicted.inside, (*predicted.seed, SAMPLE_DRAWS)
    weights, figures = state.weights, {}
    if isinstance(weights, WindowWeights):
        aligned = weights.weighted(probabilities)
        sample = weights.sampled(probabilities, inside, positions=predicted.positions, seed=seed)
        own = {"sample": sample}
        figures = {UNALIGNED: inside.sum() * (1 - weights.found)}
    else:
        aligned = weights.aligned(probabilities)
        own = {"plain_sums": sums_of(probabilities, inside)}
    accepted = accept(how.accept, state.rule, replace(predicted, probabilities=aligned))
    moved = (accepted.predicted != probabilities.argmax(1)) & inside
    return replace(accepted, seen={**accepted.seen, **own}, figures={MOVED: moved.sum(), **figures})


def _pixel_draws(predicted: Predicted) -> Tensor:
    """A number in [0, 1) for each pixel, float32 [B, H, W], decided by seed and position."""
    inside = predicted.inside
    pixels = torch.arange(inside[0].numel(), device=inside.device).view(inside.shape[1:])
    return uniform((*predicted.seed, KEEP_DRAWS), predicted.positions[:, None, None], pixels)
