"""Shapes as masks. Which pixels a shape covers:

* Polygons and boxes: coordinates are rounded to the nearest pixel (halves up), then `cv2.fillPoly` draws. A pixel
  belongs to the shape if its integer coordinates lie on the outline or inside it (even-odd rule), or if the line that
  OpenCV draws along an edge passes through it, at most half a pixel away. So edges belong to the shape, as in labelme's
  and Cityscapes' own conversions, and a box from 2 to 4 is 3 pixels wide.
* Circles and ellipses: pixels whose integer coordinates lie on the outline or inside it.
* COCO polygons: as pycocotools draws them. Run lengths and panoptic ids are exact.

Parts outside of the image are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from darseg.annotate.records import MAX_PIXELS, check_coordinate, shortened
from darseg.annotate.regions import Draw, Patch
from darseg.data.advice import pixel_count
from darseg.errors import DataError

XY = tuple[float, float]

LONGEST_OUTLINE = 1 << 24
"""Pixels along a polygon's edges: drawing takes time and memory for each (pycocotools some 50 bytes)."""


def checked_points(pairs: Any, least: int, most: int | None = None) -> np.ndarray:
    """Points as float64 [N, 2]. Raises DataError unless they are `least` to `most` pairs of numbers."""
    kind = f"{least}" if least == most else f"at least {least}"
    if not isinstance(pairs, list):
        raise DataError(
            f"the points are {shortened(pairs)}, expected a list of {kind} points. Fix or remove the shape"
        )
    if not least <= len(pairs) <= (most or len(pairs)):
        raise DataError(f"the shape has {len(pairs)} point(s), expected {kind}. Fix or remove it")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"a point is {shortened(pair)}, expected [x, y]")
        for value in pair:
            check_coordinate(value)
    return np.array(pairs, np.float64)


def check_outline(points: np.ndarray) -> None:
    """Raise DataError if the edges of a closed polygon of points [N, 2] are too long to be drawn."""
    length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if length + len(points) > LONGEST_OUTLINE:
        raise DataError(
            f"the outline of {len(points)} points is {length:.0f} pixels long, expected at most {LONGEST_OUTLINE}. "
            "Fix or remove the shape"
        )


def polygon(points: np.ndarray) -> Draw:
    """Draws a closed polygon of points [N, 2]. Raises DataError if it is too large."""
    check_outline(points)
    corners = np.floor(points + 0.5).astype(np.int32)
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    width, height = right - left + 1, bottom - top + 1
    if width * height > MAX_PIXELS:
        raise DataError(
            f"the shape spans {height} x {width} pixels (height x width), expected at most {MAX_PIXELS} pixels. Fix or "
            "remove it"
        )

    def draw() -> Patch:
        # The polygon is drawn whole and cut later: fillPoly's own clipping moves edges that begin outside, by several
        # pixels.
        canvas = np.zeros((height, width), np.uint8)
        cv2.fillPoly(canvas, [(corners - (left, top)).astype(np.int32)], (1,))
        return canvas.view(bool), left, top

    return draw


def ellipse(center: XY, radii: XY, size: tuple[int, int], *, degrees: float = 0) -> Draw:
    """Draws an ellipse, turned clockwise in the image. Raises DataError for a radius of 0 or less.

    Args:
        center, radii: x and y in pixels.
        size: height and width of the image.
    """
    (x, y), (radius_x, radius_y) = center, radii
    if not (radius_x > 0 and radius_y > 0):
        raise DataError(
            f"the radii are {radius_x:g} and {radius_y:g}, expected numbers above 0. Fix or remove the shape"
        )

    def draw() -> Patch:
        reach = max(radius_x, radius_y)
        top, bottom = max(0, math.floor(y - reach)), min(size[0], math.ceil(y + reach) + 1)
        left, right = max(0, math.floor(x - reach)), min(size[1], math.ceil(x + reach) + 1)
        down = np.arange(top, max(top, bottom))[:, None] - y
        over = np.arange(left, max(left, right)) - x
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        along, across = over * cos + down * sin, down * cos - over * sin
        return (along / radius_x) ** 2 + (across / radius_y) ** 2 <= 1, left, top

    return draw


def box(first: XY, last: XY, *, degrees: float = 0) -> Draw:
    """Draws a box between two opposite corners, turned clockwise about its center as seen in the image."""
    (left, top), (right, bottom) = first, last
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if degrees:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        center = corners.mean(axis=0)
        corners = (corners - center) @ np.array([[cos, sin], [-sin, cos]]) + center
    return polygon(corners)


def run_mask(counts: Sequence[Any], height: int, width: int) -> np.ndarray:
    """bool [height · width] of run lengths, the first of which lies outside. Raises DataError."""
    if not all(type(count) is int and count >= 0 for count in counts):
        raise DataError("run lengths must be integers of 0 or more. Export the mask again")
    if sum(counts) != height * width:
        raise DataError(
            f"the run lengths cover {pixel_count(sum(counts))}, expected {height * width} ({height} x {width}, height x "
            "width). Export the mask again"
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, np.int64))
