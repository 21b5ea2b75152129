"""Which predictions of unlabeled images are learned from: one value, matched in `accept`.

A further rule is a frozen dataclass here, a case of `accept`, and a key of the recipe that makes it (config/online.py,
run/online.py). A rule that remembers – a histogram, thresholds – keeps its tensors in the module that
`acceptance_state` makes; it lies in the method's state, so it is saved, resumed and placed with it. `accept` must not
change that module: it returns in `Accepted.seen` what all processes have seen, and `advance` adds it after the step. So
the rule of a step depends on the steps before it alone, which is the same for all processes and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from darseg.data.classes import IGNORE
from darseg.errors import RecipeError


@dataclass(frozen=True)
class Above:
    """Accept pixels whose most probable class has at least this probability (FixMatch)."""

    threshold: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise RecipeError(f"The threshold {self.threshold} is not valid. Give a probability from 0 to 1.")


Acceptance = Above
"""What to accept; a union, once there are more rules."""


@dataclass(frozen=True)
class Predicted:
    """What a teacher says about a process's share of the weak views.

    Attributes:
        probabilities: float [B, K, H, W].
        inside: bool [B, H, W], false on padding.
        positions: int64 [B], of the images in their stream: keys of draws (draws.py).
    """

    probabilities: Tensor
    inside: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Accepted:
    """What is learned from.

    Attributes:
        labels: uint8 [B, H, W]; 255: not accepted, or outside.
        predicted: uint8 [B, H, W], the classes before anything was rejected; 255: outside.
        seen: tensors that `advance` gets, added up over processes.
    """

    labels: Tensor
    predicted: Tensor
    seen: Mapping[str, Tensor] = field(default_factory=dict)


def acceptance_state(how: Acceptance) -> nn.Module:
    """What a rule remembers from step to step, as buffers."""
    match how:
        case Above():
            return nn.Module()


def accept(how: Acceptance, state: nn.Module, predicted: Predicted) -> Accepted:
    """Labels for the pixels that the rule accepts; of equally probable classes the first."""
    match how:
        case Above(threshold):
            confidence, classes = predicted.probabilities.max(1)
            classes = classes.to(torch.uint8).masked_fill(~predicted.inside, IGNORE)
            return Accepted(
                classes.masked_fill(~(confidence >= threshold), IGNORE), classes
            )  # NaN is rejected


def advance(how: Acceptance, state: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
    """Let what a rule remembers follow, after the optimizers have stepped."""
    match how:
        case Above():
            pass
