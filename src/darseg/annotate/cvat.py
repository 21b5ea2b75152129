"""CVAT's XML for images, version 1.1."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from darseg.annotate.records import MAX_PIXELS, MAX_SIDE, check_coordinate, checked_size, image_id, shortened
from darseg.annotate.regions import AnnotatedImage, Annotations, Draw, Entry, Patch, checked_image
from darseg.annotate.shapes import box, checked_points, ellipse, polygon, run_mask
from darseg.errors import DataError

NO_AREAS = ("points", "polyline", "cuboid", "skeleton", "tag")


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types: they declare entities, which can name files or grow without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("the file has a document type, which CVAT never writes. Remove the <!DOCTYPE …>")


def read_cvat(path: Path, data: bytes) -> Annotations:
    """All images of a file. Raises DataError if it is not CVAT's XML for images."""
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        root = ElementTree.fromstring(data, parser)
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: the XML is damaged ({error}). Export or copy the file again.") from error
    if root.tag != "annotations" or root.find("track") is not None:
        content = "tracks of a video" if root.tag == "annotations" else f"<{root.tag}>"
        raise DataError(
            f"{path} holds {content}, expected <annotations>. Export it as 'CVAT for images 1.1'."
        )
    entries = root.findall("image")

    def images() -> Iterator[AnnotatedImage | str]:
        for k, entry in enumerate(entries):
            where = f"{path}: image[{k}]"
            shapes = [(f"{where}, {shape.tag}[{n}]", shape) for n, shape in enumerate(entry)]
            shapes.sort(key=lambda placed: _layer(placed[1]))  # stable: equal layers stay in the file's order
            header = functools.partial(_header, entry)
            yield from checked_image(Entry(where, header, shapes, region=_region, ordered=True))

    return Annotations(images, len(entries), None)


def _layer(shape: ElementTree.Element) -> float:
    try:
        return _number_of(shape, "z_order", "0")
    except DataError:
        return 0  # reported when the shape itself is read


def _text(element: ElementTree.Element, key: str) -> str:
    if key not in element.attrib:
        raise DataError(f"the attribute {key!r} is missing")
    return element.attrib[key]


def _number_of(element: ElementTree.Element, key: str, default: str | None = None) -> float:
    """A number in an attribute. Raises DataError."""
    text = element.attrib.get(key, default) if default is not None else _text(element, key)
    return _number(text, key)


def _number(text: str, key: str) -> float:
    try:
        value = float(text)
        check_coordinate(value)
    except (ValueError, DataError):
        raise DataError(
            f"{key!r} holds {shortened(text)}, expected a number from -{MAX_SIDE} to {MAX_SIDE}"
        ) from None
    return value


def _integer(element: ElementTree.Element, key: str) -> int:
    value = _number_of(element, key)
    if value != int(value):
        raise DataError(f"{key!r} is {value:g}, expected an integer")
    return int(value)


def _header(entry: ElementTree.Element) -> tuple[str, tuple[int, int]]:
    name = image_id(_text(entry, "name"))
    return name, checked_size(_number_of(entry, "height"), _number_of(entry, "width"))


def _region(shape: ElementTree.Element, size: tuple[int, int]) -> tuple[str, Draw] | str:
    if shape.tag in NO_AREAS:
        return shape.tag
    if shape.tag not in ("polygon", "box", "ellipse", "mask"):
        raise DataError(f"found <{shape.tag}>, expected <polygon>, <box>, <ellipse> or <mask>")
    label = _text(shape, "label")
    _number_of(shape, "z_order", "0")
    degrees = _number_of(shape, "rotation", "0")
    if shape.tag == "polygon":
        pairs = [
            [_number(value, "points") for value in pair.split(",")]
            for pair in _text(shape, "points").split(";")
        ]
        return label, polygon(checked_points(pairs, 3))
    if shape.tag == "box":
        left, top, right, bottom = (_number_of(shape, key) for key in ("xtl", "ytl", "xbr", "ybr"))
        return label, box((left, top), (right, bottom), degrees=degrees)
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = (_number_of(shape, key) for key in ("cx", "cy", "rx", "ry"))
        return label, ellipse((x, y), (radius_x, radius_y), size, degrees=degrees)
    left, top, width, height = (_integer(shape, key) for key in ("left", "top", "width", "height"))
    if not (0 < width * height <= MAX_PIXELS and width > 0):
        raise DataError(
            f"the mask is {height} x {width} pixels (height x width), expected 1 to {MAX_PIXELS} pixels. Export it again"
        )
    return label, functools.partial(_mask, _text(shape, "rle"), (left, top), (height, width))


def _mask(text: str, corner: tuple[int, int], size: tuple[int, int]) -> Patch:
    """A mask of (height, width) `size` in run lengths along the rows. Raises DataError."""
    try:
        counts = [int(run) for run in text.split(",")]
    except ValueError:
        raise DataError(
            f"'rle' holds {shortened(text)}, expected run lengths. Export the mask again"
        ) from None
    return run_mask(counts, *size).reshape(size), *corner
