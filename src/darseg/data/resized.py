"""Label maps of indices that were resized with interpolation: a third class between two others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from darseg.choices import LabelFormat
from darseg.data.classes import IGNORE
from darseg.data.labels import read_raw
from darseg.data.strays import steps_between
from darseg.errors import DataError

MOST_OPENED, MOST_PIXELS = 16, 10_000_000
"""Files and pixels that are looked at: below a second."""

INTERPOLATED = 0.35
"""Share of steps among the edges between values at least 2 apart. Most resized label maps have 0.4 to 1; those of CamVid
have 0.07 (0.2 if every eighth pixel is taken), small drawn ones with thin objects 0.33."""

OUTLINE, AREAS = 0.5, 0.2
"""Share of a value's pixels in steps from which on it may be a class of outlines; least share of steps that have other
values. Interpolation also leaves steps of values that have areas elsewhere."""

FEWEST = 100
"""Pixels in steps below which nothing is said."""


def interpolation_lines(paths: Sequence[Path], format: LabelFormat) -> list[str]:
    """A line if the label maps look resized with interpolation, so that wrong classes lie along edges."""
    jumps = size = 0
    pixels, in_steps = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    chosen = [paths[at * len(paths) // MOST_OPENED] for at in range(MOST_OPENED)] if paths else []
    for path in dict.fromkeys(chosen):
        if size > MOST_PIXELS:
            break
        try:
            raw = read_raw(path, format).values
        except DataError:
            continue
        if raw.dtype != np.int32:  # colors between others are no classes
            size += raw.size
            pixels += np.bincount(raw[raw >= 0], minlength=len(pixels))
            in_steps += np.bincount(raw[steps_between(raw)], minlength=len(pixels))
            jumps += _jumps(raw) + _jumps(raw.T)
    steps = int(in_steps.sum())
    areas = int(in_steps[in_steps < OUTLINE * pixels].sum())
    if areas < max(FEWEST, AREAS * steps) or steps < INTERPOLATED * (steps + jumps):
        return []
    return [
        f"The label maps look resized with interpolation, for example {paths[0]}: along edges between two values lie "
        f"narrow steps of values in between ({steps:,} pixels, {steps / size:.2%} of {len(set(chosen)):,} file(s)), "
        "which are read as other classes. Resize the original label maps again, with nearest-neighbor interpolation. If "
        "these lines are a class of outlines, all is well."
    ]


def _jumps(raw: np.ndarray) -> int:
    """Neighbors in a row whose values differ by at least 2, so that a value lies between."""
    left, right = raw[:, :-1].astype(np.int32), raw[:, 1:].astype(np.int32)
    far = (np.abs(left - right) >= 2) & (np.minimum(left, right) >= 0) & (np.maximum(left, right) < IGNORE)
    return int(far.sum())
