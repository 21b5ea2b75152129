"""Annotation files of tools whose formats are not read, recognized by their content."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from darseg.data.files import open_file

ENOUGH = 1 << 16
"""Bytes of a file's beginning that show its format."""

TEXTS = (".txt", ".csv", ".json", ".geojson", ".xml")
"""Suffixes of annotation files, and of many others."""


@dataclass(frozen=True)
class Foreign:
    """A format that is not read: its name, and what to do."""

    name: str
    remedy: str


_COCO = "Export them as COCO with polygons or masks (`darseg rasterize` draws these), or as PNG label maps"
_YOLO_LINE = re.compile(r"\s*\d+(\.0)?(\s+-?\d+(\.\d+)?(e-?\d+)?){4,}\s*", re.IGNORECASE)
_JSON = (
    (("shape_attributes",), Foreign("VGG Image Annotator (VIA) JSON", _COCO)),
    (("classTitle",), Foreign("Supervisely JSON", _COCO)),
    (("geometryType",), Foreign("Supervisely JSON", _COCO)),
    (('"classes"', '"shape"', '"title"'), Foreign("Supervisely JSON", _COCO)),
    (('"result"', "labels"), Foreign("Label Studio JSON", _COCO)),
    (('"annotations"', '"completed_by"'), Foreign("Label Studio JSON", _COCO)),
    (('"ISAT"',), Foreign("ISAT JSON", _COCO)),
    (('"slots"', '"dataset"'), Foreign("Darwin (V7) JSON", _COCO)),
    (('"items"', '"dm_format_version"'), Foreign("Datumaro JSON", _COCO)),
    (
        ('"FeatureCollection"',),
        Foreign("GeoJSON", "Burn the shapes into label maps of the images' size (gdal_rasterize)"),
    ),
)
"""What all stands in the beginning of a JSON file → its format."""

_OTHER = {
    "yolo": Foreign("YOLO text", _COCO),
    "boxes": Foreign(
        "Pascal VOC XML", "They hold boxes, not areas. Segmentation needs label maps, polygons or masks"
    ),
    "kaggle": Foreign("CSV with run lengths", "Draw the run lengths as PNG label maps"),
    "via": Foreign("VGG Image Annotator (VIA) CSV", _COCO),
}

FORMATS = (*(kind for _, kind in _JSON), *_OTHER.values())


def foreign_format(path: Path, head: bytes | None = None) -> Foreign | None:
    """The format of an annotation file that is not read; None for any other file.

    Args:
        head: the beginning of the file, if it was read already.
    """
    if head is None:
        try:
            with open_file(path) as file:
                head = file.read(ENOUGH)
        except OSError:
            return None
    text = head[:ENOUGH].decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("<"):
        return _OTHER["boxes"] if re.search(r"<annotation[\s>]", text) and "<bndbox" in text else None
    if text.startswith(("{", "[")):
        return next((kind for words, kind in _JSON if all(word in text for word in words)), None)
    return _of_lines([line for line in text.splitlines()[:20] if line.strip()])


def _of_lines(lines: list[str]) -> Foreign | None:
    if not lines:
        return None
    header = lines[0].lower()
    if "region_shape_attributes" in header:
        return _OTHER["via"]
    if re.search(r"encoded_?pixels|\brle\b|segmentation_rle", header) and "," in header:
        return _OTHER["kaggle"]
    whole = lines if len(lines) < 20 else lines[:-1]
    return _OTHER["yolo"] if all(_YOLO_LINE.fullmatch(line) for line in whole) else None
