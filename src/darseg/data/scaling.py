"""Values of any type → 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

STEP_16_BIT = 257
"""65535 / 255: 16-bit values are divided by this and rounded."""

ROWS = 1024
"""Rows that are scaled at a time, so that copies as floats stay small."""


@dataclass(frozen=True)
class Scaling:
    """Which values become 0 and 255, for files of other than 8 bits.

    Values beyond them become 0 and 255, too.

    Attributes:
        white: None: the largest value of 16 bits; for other types it must be given.
    """

    black: float = 0.0
    white: float | None = None


PLAIN_SCALING = Scaling()


def to_uint8(values: np.ndarray, bits: int, scaling: Scaling, *, path: Path) -> NDArray[np.uint8]:
    """The values [H, W, C] as uint8: the same if they have 8 bits, otherwise scaled linearly and rounded.

    Values of 1 to 7 bits are stretched to 0 to 255, those of 16 bits divided by 257, and what is not a number becomes 0.

    Raises DataError for signed, 32-bit and floating-point values if `scaling.white` is not given.
    """
    kind = values.dtype
    if kind == np.uint8 and bits == 8:
        return np.ascontiguousarray(values)
    if kind == np.uint8:
        return np.ascontiguousarray(values.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
    if kind == np.uint16 and bits == 16 and scaling == PLAIN_SCALING:
        return ((values.astype(np.uint32) + STEP_16_BIT // 2) // STEP_16_BIT).astype(np.uint8)
    white = scaling.white
    if white is None and kind == np.uint16:
        white = 2.0**bits - 1
    if white is None:
        finite = values[np.isfinite(values)]
        extent = f", from {finite.min():g} to {finite.max():g}" if finite.size else ""
        raise DataError(
            f"{path}: this image has values of type {kind}{extent}. Set data.white to the value that is "
            "white, and data.black to the one that is black, if that is not 0."
        )
    scaled = np.empty(values.shape, np.uint8)
    factor = 255 / (white - scaling.black)
    for row in range(0, len(values), ROWS):
        part = (values[row : row + ROWS].astype(np.float64) - scaling.black) * factor
        scaled[row : row + ROWS] = np.rint(np.clip(np.nan_to_num(part, nan=0.0), 0, 255))
    return scaled
