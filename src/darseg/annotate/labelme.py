"""labelme's files: one JSON file for each image."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from darseg.annotate.beside import meant_picture
from darseg.annotate.records import field, image_id, shortened
from darseg.annotate.regions import AnnotatedImage, Draw, Entry, Patch, checked_image
from darseg.annotate.shapes import box, checked_points, ellipse, polygon
from darseg.data.images import size_in_header
from darseg.errors import DataError

NO_AREAS = ("point", "points", "line", "linestrip")
TURNED = ("rotation", "oriented_rectangle", "quadrilateral")
"""Boxes of four corners that need not be upright."""


def read_labelme(path: Path, content: Any, folder: PurePosixPath) -> Iterator[AnnotatedImage | str]:
    """The image of a file, or its faults.

    Args:
        folder: the file's folder as seen from the folder of all files.
    """

    renamed: list[str] = []

    def header() -> tuple[str, tuple[int, int]]:
        meant = meant_picture(path, content)
        renamed.extend([f"{path} ({meant.renamed})"] if meant.renamed else [])
        return image_id((folder / meant.name).as_posix() if meant.name else meant.name), meant.size

    entry = Entry(str(path), header, listed_shapes(path, content, "shapes"), region=_region, ordered=True)
    for image in checked_image(entry):
        yield image if isinstance(image, str) else replace(image, renamed="".join(renamed))


def listed_shapes(path: Path, content: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Where each shape is, and its record. A missing list gives one invalid record, so it is a fault."""
    shapes = content.get(key) if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        yield f"{path}: {key}", shapes
        return
    for k, shape in enumerate(shapes):
        yield f"{path}: {key}[{k}]", shape


def _region(shape: Any, size: tuple[int, int]) -> tuple[str, Draw] | str:
    label = field(shape, "label", str)
    kind = shape.get("shape_type") or "polygon"  # old files name no type: all their shapes are polygons
    points = shape.get("points")
    if kind in NO_AREAS:
        return kind
    corners = isinstance(points, list) and len(points) == 4
    if kind == "polygon" or (kind in TURNED and corners) or (kind == "rectangle" and corners):
        return label, polygon(checked_points(points, 3))  # AnyLabeling's boxes have four corners
    if kind not in ("rectangle", "circle", "mask"):
        raise DataError(
            f"'shape_type' is {shortened(kind)}, expected polygon, rectangle, rotation, circle or mask"
        )
    first, last = (tuple(point) for point in checked_points(points, 2, 2).tolist())
    if kind == "rectangle":
        return label, box(first, last)
    if kind == "circle":  # the center, and a point on the outline
        radius = math.hypot(last[0] - first[0], last[1] - first[1])
        return label, ellipse(first, (radius, radius), size)
    (left, top), (right, bottom) = (tuple(int(value) for value in point) for point in (first, last))
    mask_size = (bottom - top + 1, right - left + 1)
    return label, functools.partial(_mask, field(shape, "mask", str), (left, top), mask_size)


def _mask(text: str, corner: tuple[int, int], size: tuple[int, int]) -> Patch:
    """A mask in Base64. Raises DataError if it cannot be read or is not of (height, width) `size`."""
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        declared = size_in_header(data.tobytes())
        mask = (
            cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
            if declared in (None, size)
            else np.zeros((0, 0), np.uint8)
        )
    except (ValueError, cv2.error):  # not Base64; no bytes at all
        mask, declared = None, None
    if mask is None or mask.shape != size:
        content = "no image" if mask is None else "{} x {} pixels".format(*(declared or mask.shape))
        raise DataError(
            f"'mask' holds {content}, but its points span {size[0]} x {size[1]} (height x width). Fix or remove the shape"
        )
    return mask > 0, *corner
