"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def poly(base: float, progress: float, power: float = 0.9) -> float:
    """base · (1 − progress)^power, progress in [0, 1] (the poly schedule of DeepLab and the release)."""
    return base * (1.0 - progress) ** power


def cosine(base: float, progress: float) -> float:
    """base · ½ (1 + cos(π · progress)), progress in [0, 1] (Loshchilov and Hutter 2017, one cycle)."""
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def warm_up(step: int, steps: int) -> float:
    """The factor of the rate in the first `steps` steps: (step + 1) / steps, then 1."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


@dataclass(frozen=True)
class Schedule:
    """How the rate moves during a stage.

    Attributes:
        kind: "poly", "cosine", or "constant".
        span: the fractions of the curve that the stage covers.
        power: of the poly curve.
        warm_up_steps: the rate first rises linearly over so many steps.
        first_step_at_zero: the first step runs at rate 0, as in the release by mistake.
        lowest: the rate at which the cosine curve ends.
        hold: steps for which the rate stays the same; those of an epoch, if it changes from epoch to epoch.
    """

    kind: Literal["poly", "cosine", "constant"] = "poly"
    span: tuple[float, float] = (0.0, 1.0)
    power: float = 0.9
    warm_up_steps: int = 0
    first_step_at_zero: bool = False
    lowest: float = 0.0
    hold: int = 1

    def rate(self, step: int, steps: int, base: float) -> float:
        """The rate of `step` (0-based) of `steps`; the curve reaches the span's end after the last step."""
        if step == 0 and self.first_step_at_zero:
            return 0.0
        begin, end = self.span
        progress = begin + (end - begin) * (step - step % self.hold) / steps
        match self.kind:
            case "poly":
                rate = poly(base, progress, self.power)
            case "cosine":
                rate = self.lowest + cosine(base - self.lowest, progress)
            case "constant":
                rate = base
        return rate * warm_up(step, self.warm_up_steps)
