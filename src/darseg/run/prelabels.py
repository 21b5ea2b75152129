"""Predicted label maps as files for annotation tools: in the recipe's values, for labelme, and COCO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import ClassSet
from darseg.data.encoding import LabelEncoding
from darseg.data.files import write_whole
from darseg.data.manifest import Sample
from darseg.data.maps import label_path, path_of_id, write_map
from darseg.run.directory import write_json

LABELS, LABELME, COCO = "labels", "labelme", "coco.json"
"""In the output folder: label maps, labelme's files, and COCO's file."""

SPECK = 8
"""Regions of fewer pixels get no polygon: at 200x200 pixels they are noise, and each would have to be deleted by hand."""

TOLERANCE = 1.0
"""Pixels by which a polygon may leave the outline of its region (Douglas-Peucker): far fewer points to correct."""


def stored_map(classes: NDArray[np.uint8], encoding: LabelEncoding) -> NDArray[np.generic]:
    """A map of classes as the recipe's label files hold it, for `write_map`.

    `read_label` gives the classes back. A class of several values or colors gets the largest value, and the first color.
    """
    if encoding.format == "color" and encoding.colors:
        table = np.zeros((256, 3), np.uint8)
        for color, k in reversed(encoding.colors):
            table[k] = color[::-1]  # OpenCV's order
        return table[classes]
    if encoding.values is None:
        return classes
    values = np.zeros(256, np.uint16)
    for value, k in sorted(encoding.values):
        values[k] = value
    stored = values[classes]
    return stored.astype(np.uint8) if stored.max(initial=0) < 256 else stored


@dataclass(frozen=True, eq=False)
class Region:
    """A connected region of one class. outline: int32 [P, 2], x and y of its corners."""

    k: int
    outline: NDArray[np.int32]


def regions_of(classes: NDArray[np.uint8]) -> tuple[int, list[Region]]:
    """The largest class of a map, and the regions to draw over it, later ones on top.

    Polygons have no holes: what lies in a region's hole is drawn over it. Outlines go through the centers of the
    outermost pixels, as `darseg rasterize`, labelme and `cv2.fillPoly` draw them.
    """
    base = int(np.bincount(classes.ravel()).argmax())
    outlines = [pair for k in np.unique(classes) for pair in _outlines(classes == k, int(k))]
    drawn = np.full_like(classes, base)
    regions = []
    for _, box, inside, region in sorted(outlines, key=lambda entry: -entry[0]):
        part = drawn[box]
        if (
            np.mean(part[inside] != region.k) > 0.5
        ):  # not drawn yet, as regions of the largest class mostly are
            cv2.fillPoly(drawn, [region.outline], region.k)
            regions.append(region)
    return base, regions


def _outlines(mask: NDArray[np.bool_], k: int) -> list[tuple[int, Any, NDArray[np.bool_], Region]]:
    """Each connected part of a mask: pixels that its outline encloses, box, pixels in it, and region."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    parts = []
    for number in range(1, count):
        left, top, width, height, size = stats[number].tolist()
        if size < SPECK:
            continue
        box = slice(top, top + height), slice(left, left + width)
        inside = labels[box] == number
        contours, _ = cv2.findContours(
            inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        exact = contours[0]
        simple = cv2.approxPolyDP(exact, TOLERANCE, closed=True)
        outline = (simple if len(simple) >= 3 else exact).reshape(-1, 2)
        while len(outline) < 3:  # a line of pixels, there and back
            outline = np.concatenate([outline, outline[:1]])
        filled = np.zeros((height, width), np.uint8)
        cv2.fillPoly(filled, [exact - (left, top)], 1)
        parts.append((int(filled.sum()), box, inside, Region(k, outline.astype(np.int32))))
    return parts


def labelme_content(classes: NDArray[np.uint8], names: Sequence[str], image: str) -> dict[str, Any]:
    """A map as labelme's JSON: a rectangle of the largest class, and polygons on top of it.

    Args:
        image: path of the picture as seen from the JSON file.
    """
    (height, width), (base, regions) = classes.shape, regions_of(classes)
    shapes = [_shape(names[base], "rectangle", [[0, 0], [width - 1, height - 1]])]
    shapes += [_shape(names[region.k], "polygon", region.outline.tolist()) for region in regions]
    return {
        "version": "5.0.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _shape(label: str, kind: str, points: list[list[int]]) -> dict[str, Any]:
    floats = [[float(x), float(y)] for x, y in points]
    return {"label": label, "points": floats, "group_id": None, "shape_type": kind, "flags": {}}


@dataclass
class CocoFile:
    """Collects maps for one COCO file: run lengths, since polygons have no holes."""

    classes: ClassSet

    def __post_init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, sample: Sample, classes: NDArray[np.uint8]) -> None:
        """Add the map of an image: an annotation for each of its classes."""
        height, width = classes.shape
        number = len(self._images) + 1
        name = f"{sample.id}{sample.image.suffix}"
        self._images.append({"id": number, "file_name": name, "height": height, "width": width})
        for k in np.unique(classes).tolist():
            mask = classes == k
            left, top, wide, high = cv2.boundingRect(mask.astype(np.uint8))
            annotation = {
                "id": len(self._annotations) + 1,
                "image_id": number,
                "category_id": k + 1,
                "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                "area": int(mask.sum()),
                "bbox": [left, top, wide, high],
                "iscrowd": 1,  # how COCO marks run lengths
            }
            self._annotations.append(annotation)

    def write(self, path: Path) -> None:
        """Write the file, whole."""
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes.names)]
        content = {"images": self._images, "annotations": self._annotations, "categories": categories}
        write_whole(path, json.dumps(content) + "\n")


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths of a mask: down the columns, the first run outside."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


@dataclass(frozen=True, eq=False)
class Prelabels:
    """The files of suggested images in a folder; those that exist are kept, as they may be corrected."""

    out: Path
    classes: ClassSet
    encoding: LabelEncoding
    coco: CocoFile

    def write(self, sample: Sample, classes: NDArray[np.uint8]) -> None:
        """Write label map and labelme's file of an image, and add it to COCO's."""
        self.coco.add(sample, classes)
        path = label_path(self.out / LABELS, sample.id)
        if not path.exists():
            write_map(path, stored_map(classes, self.encoding.for_file(path)))
        path = path_of_id(self.out / LABELME, sample.id, ".json")
        if not path.exists():
            image = Path(os.path.relpath(sample.image, path.parent)).as_posix()
            write_json(path, labelme_content(classes, self.classes.names, image))

    def finish(self) -> None:
        """Write COCO's file."""
        if not (self.out / COCO).exists():
            self.coco.write(self.out / COCO)
