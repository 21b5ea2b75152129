"""The learning rate as a function of the step."""

from __future__ import annotations


def poly(base: float, progress: float, power: float = 0.9) -> float:
    """base · (1 − progress)^power, progress in [0, 1] (the poly schedule of DeepLab and the release)."""
    return base * (1.0 - progress) ** power


def rate_at(step: int, steps: int, span: tuple[float, float], base: float, power: float = 0.9) -> float:
    """Learning rate of `step` (0-based) in a stage of `steps` that covers the fractions `span` of the curve.

    The first step runs at the span's beginning; the curve reaches the span's end after the last step.
    """
    begin, end = span
    return poly(base, begin + (end - begin) * step / steps, power)
