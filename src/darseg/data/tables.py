"""Lookup tables: the class of each value and color of label files, and of the colors of a palette."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE
from darseg.data.encoding import AS_DRAWN, RGB, LabelEncoding

UNKNOWN = 256
"""Entry of lookup tables for a value that is neither a class nor 255."""

TRANSPARENT = -1
"""Among values and colors: a pixel that is not labeled. As an index it is the last entry of the lookup tables."""

NEAR_COLOR, TIMES_AS_FAR = 32, 3
"""A color is clearly nearest if it differs by at most so much in each channel, and those of all other classes by so many
times as much. JPEG moves few colors of label maps further."""

LARGEST = 65535
"""Largest 16-bit label value."""


@lru_cache(maxsize=8)
def value_table(encoding: LabelEncoding) -> np.ndarray:
    """uint16 [65537]: class, 255 or UNKNOWN of each value."""
    table = np.full(LARGEST + 2, UNKNOWN if encoding.other is None else encoding.other, np.uint16)
    table[TRANSPARENT] = of_transparent(encoding)
    if encoding.values is None:
        table[:256] = np.arange(256)
        table[encoding.ignore] = IGNORE
    else:
        for value, k in encoding.values:
            table[value] = k
    return table


@lru_cache(maxsize=3)
def color_table(
    colors: tuple[tuple[RGB, int], ...], other: int | None, transparent: int
) -> NDArray[np.uint16]:
    """uint16 [2^24 + 1]: class, 255 or UNKNOWN of each color."""
    table = np.full(256**3 + 1, UNKNOWN if other is None else other, np.uint16)
    table[TRANSPARENT] = transparent
    for (red, green, blue), k in colors:
        table[red << 16 | green << 8 | blue] = k
    return table


def nearest_classes(values: NDArray[np.int32], colors: Iterable[tuple[RGB, int]]) -> NDArray[np.uint16]:
    """uint16 [N]: the class or 255 whose color is clearly the nearest to each color; 255 if none is.

    Args:
        values: int32 [N], colors as red · 65536 + green · 256 + blue.
    """
    unique, inverse = np.unique(values, return_inverse=True)
    channels = np.stack([unique >> shift & 255 for shift in (16, 8, 0)], 1)
    best, second = np.full(len(unique), 1 << 16), np.full(len(unique), 1 << 16)
    nearest = np.full(len(unique), UNKNOWN)
    for color, k in colors:
        distance = np.abs(channels - np.array(color)).max(axis=1)
        nearer, same = distance < best, nearest == k
        second = np.where(nearer & ~same, best, second)
        second = np.where(~nearer & ~same, np.minimum(second, distance), second)
        best, nearest = np.minimum(best, distance), np.where(nearer, k, nearest)
    clear = (best <= NEAR_COLOR) & (second >= TIMES_AS_FAR * best)
    return np.where(clear, nearest, IGNORE).astype(np.uint16)[inverse.reshape(-1)]


def of_transparent(encoding: LabelEncoding) -> int:
    """The class or 255 of pixels of alpha 0, if they are marked."""
    return IGNORE if encoding.transparent == AS_DRAWN else encoding.transparent


def classes_by_color(
    palette: tuple[RGB, ...], values: np.ndarray, encoding: LabelEncoding
) -> NDArray[np.uint8] | None:
    """uint8 [256]: the class of each value by its color, if a file must be read by color; or None."""
    if palette_table(palette, encoding) is None:
        return None
    used = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256))
    table = colors_against_values(palette, used, encoding)
    return None if table is None or (table[used] == UNKNOWN).any() else table.astype(np.uint8)


def colors_against_values(
    palette: tuple[RGB, ...], used: NDArray[np.intp], encoding: LabelEncoding
) -> NDArray[np.uint16] | None:
    """uint16 [256]: class by color, 255 or UNKNOWN, of each value, if the file's values contradict it.

    Args:
        used: the values that occur in the file.
    """
    table = palette_table(palette, encoding)
    first = palette[: used[-1] + 1]
    if table is None or used[-1] >= len(palette) or len(set(first)) < len(first):
        return None  # equal colors tell no classes apart
    named = used[table[used] != UNKNOWN]
    return None if (table[named] == value_table(encoding)[named]).all() else table


@lru_cache(maxsize=256)
def palette_table(palette: tuple[RGB, ...], encoding: LabelEncoding) -> NDArray[np.uint16] | None:
    """uint16 [256]: class by color, 255 or UNKNOWN, of each value of a palette.

    Returns None if the palette cannot contradict the values: the recipe has no colors or says that values count, or the
    palette is a ramp of grays.
    """
    if encoding.format != "auto" or not encoding.colors or is_ramp(palette):
        return None
    of_color, by_value = dict(encoding.colors), value_table(encoding)
    table = np.full(256, UNKNOWN, np.uint16)
    for value, color in enumerate(palette[:256]):
        # A value that is not labeled may have any color that no class has.
        table[value] = of_color.get(color, IGNORE if by_value[value] == IGNORE else UNKNOWN)
    agrees = (table == by_value[:256]) | (table == UNKNOWN)
    return None if agrees.all() else table


def is_ramp(palette: tuple[RGB, ...]) -> bool:
    """Whether each color of a palette is the gray of its value, and so says nothing about classes."""
    return all(color == (value, value, value) for value, color in enumerate(palette))
