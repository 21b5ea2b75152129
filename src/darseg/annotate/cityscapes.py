"""Cityscapes' files: one JSON file of polygons for each image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from darseg.annotate.labelme import listed_shapes
from darseg.annotate.records import checked_size, field
from darseg.annotate.regions import AnnotatedImage, Draw, Entry, checked_image
from darseg.annotate.shapes import checked_points, polygon

# Labels that are not evaluation classes (trainId 255 in Cityscapes' label table). It lists polegroup, but not poles.
CITYSCAPES_VOID = frozenset(
    (
        "unlabeled",
        "ego vehicle",
        "rectification border",
        "out of roi",
        "static",
        "dynamic",
        "ground",
        "parking",
        "rail track",
        "guard rail",
        "bridge",
        "tunnel",
        "polegroup",
        "caravan",
        "trailer",
    )
)
CITYSCAPES_UNDRAWN = "license plate"
"""Its id is -1: the official conversion does not draw it and leaves what lies below, the car."""


def read_cityscapes(path: Path, content: Any, relative: str) -> Iterator[AnnotatedImage | str]:
    """The image of a file, or its faults.

    Args:
        relative: the file's path without suffix below the folder of all files.
    """

    def header() -> tuple[str, tuple[int, int]]:
        # The file does not name its image. Cityscapes' images are called …_leftImg8bit.png.
        name = re.sub(r"_gt(Fine|Coarse)_polygons$", "_leftImg8bit", relative)
        return name, checked_size(field(content, "imgHeight", int), field(content, "imgWidth", int))

    def region(record: Any, _: tuple[int, int]) -> tuple[str, Draw] | str:
        label = field(record, "label", str)
        if label == CITYSCAPES_UNDRAWN:
            return label
        if label not in CITYSCAPES_VOID:
            label = label.removesuffix("group") or label
        return label, polygon(checked_points(field(record, "polygon", list), 3))

    objects = listed_shapes(path, content, "objects")
    kept = (
        (where, record)
        for where, record in objects
        if not (isinstance(record, dict) and record.get("deleted"))
    )
    yield from checked_image(
        Entry(str(path), header, kept, region=region, ordered=True, void=CITYSCAPES_VOID)
    )
