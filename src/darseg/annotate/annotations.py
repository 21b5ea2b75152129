"""Other tools' annotation files: every format becomes images with regions, and one painter draws them.

Which pixels a shape covers:

* Polygons and boxes: coordinates are rounded to the nearest pixel (halves up), then `cv2.fillPoly` draws. A pixel belongs
  where its integer coordinates lie on the outline or inside it (even-odd rule), or where the line that OpenCV draws along
  an edge passes, at most half a pixel off. So edges belong, as in labelme's and Cityscapes' own conversions, and a box
  from 2 to 4 is 3 pixels wide.
* Circles and ellipses: where the integer coordinates lie on the outline or inside it.
* COCO polygons: as pycocotools draws them. Run lengths and panoptic ids are exact.

What lies outside the image is cut off.
"""

from __future__ import annotations

import base64
import functools
import importlib
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any, get_args

import cv2
import numpy as np

from darseg.choices import AnnotationFormat
from darseg.data.classes import IGNORE
from darseg.data.images import read_image
from darseg.data.manifest import find_files, sample_id
from darseg.errors import DarsegError, DataError

FORMATS = get_args(AnnotationFormat)
PER_IMAGE = ("labelme", "cityscapes")  # one file per image, so a folder of them is read

# What OpenCV reads at most; also the most that a polygon, drawn whole before it is cut, may span.
MAX_SIDE = 1 << 20
MAX_PIXELS = 1 << 30

# Cityscapes' labels that are no evaluation classes (its label table: trainId 255). polegroup is one, not poles.
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
CITYSCAPES_UNDRAWN = "license plate"  # its id is -1: the official conversion leaves what lies below, the car
LABELME_LINES = ("point", "points", "line", "linestrip")
CVAT_NO_AREAS = ("points", "polyline", "cuboid", "skeleton", "tag")

KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
NOT_PANOPTIC = "a panoptic folder belongs to COCO panoptic annotations, these are"

Patch = tuple[np.ndarray, int, int]  # bool [h, w], and the image's column and row of its first pixel
Draw = Callable[[], Patch]
NOBODY = -1  # while painting: pixels that no region has claimed yet


@dataclass(frozen=True)
class Region:
    """An area of one category. `draw` makes its mask when it is painted: one at a time is in memory."""

    category: str
    where: str
    draw: Draw


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's regions. `ordered`: later ones lie on top; otherwise a pixel of two categories is not labeled.

    Attributes:
        id: the image's path without suffix.
        where: file and place of its entry.
        void: categories that are no classes of this format unless somebody asks for them.
        skipped: the kinds of shapes that are no areas, one each.
    """

    id: str
    where: str
    height: int
    width: int
    regions: tuple[Region, ...]
    ordered: bool
    void: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotations:
    """Annotation files of one format.

    Attributes:
        images: makes an iterator over the images; an image with faults gives a line for each of them instead.
        total: how many images there are.
        categories: the file's own list of names, in order of their ids; None where a format has none.
    """

    images: Callable[[], Iterator[AnnotatedImage | str]]
    total: int
    categories: tuple[str, ...] | None


def read_annotations(
    path: Path, format: AnnotationFormat | None = None, panoptic_folder: Path | None = None
) -> Annotations:
    """Annotations of a file, or of a folder with one JSON file per image (labelme, Cityscapes).

    Args:
        format: one of `FORMATS`; None: recognized by content.
        panoptic_folder: the PNGs of a COCO panoptic file; default: the file's path without suffix.

    Raises DataError where nothing can be read at all; faults of single images come while iterating.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"No annotation format {format!r}: there are {', '.join(FORMATS)}.")
    if path.is_dir():
        if panoptic_folder is not None:
            raise DataError(f"{path}: {NOT_PANOPTIC} a folder. Give the one JSON file.")
        files = find_files(path, (".json",))
        if not files:
            raise DataError(
                f"{path}: no JSON files. A folder holds labelme's or Cityscapes' files, one per image; for COCO and "
                "CVAT give the one JSON or XML file itself."
            )
        if format is not None and format not in PER_IMAGE:
            raise DataError(f"{path} is a folder, but {format} annotations are one file: give that file.")
        return _per_image(path, files, format)
    data = _read(path)
    markup = data[:64].lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"<")
    content = None if format == "cvat" or (markup and format is None) else _parse_json(path, data)
    found = format or ("cvat" if content is None else _recognize(path, content))
    if panoptic_folder is not None and found != "panoptic":
        raise DataError(f"{path}: {NOT_PANOPTIC} {found}. Leave it away.")
    if found in PER_IMAGE:
        return _per_image(path.parent, {path.stem: path}, found)
    if found == "cvat":
        return _cvat(path, data)
    return _coco(path, content, (panoptic_folder or path.with_suffix("")) if found == "panoptic" else None)


def paint(image: AnnotatedImage, index: Mapping[str, int], unclaimed: int = IGNORE) -> np.ndarray | list[str]:
    """The label map of an image, uint8 [H, W]; or its faults, where regions cannot be drawn.

    Args:
        index: category → class; regions of other categories are 255.
        unclaimed: value of pixels in no region.
    """
    label = np.full((image.height, image.width), NOBODY, np.int16)
    wrong: dict[str, None] = {}  # in order, each once: the segments of one panoptic PNG share its faults
    for region in image.regions:
        try:
            mask, left, top = region.draw()
        except DataError as error:
            wrong[f"{region.where}: {error}"] = None
            continue
        rows = slice(max(top, 0), max(0, top + mask.shape[0]))
        columns = slice(max(left, 0), max(0, left + mask.shape[1]))
        below = label[rows, columns]
        mask = mask[rows.start - top :, columns.start - left :][: below.shape[0], : below.shape[1]]
        value = index.get(region.category, IGNORE)
        if image.ordered:
            below[mask] = value
        else:  # the same whatever the order: one claim counts, two different ones are 255 for good
            below[mask] = np.where((below == NOBODY) | (below == value), value, IGNORE)[mask]
    if wrong:
        return list(wrong)
    label[label == NOBODY] = unclaimed
    return label.astype(np.uint8)


# Reading


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file or folder. Give an annotation file, or a folder of them."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}). Export or copy it again.") from error


def _recognize(path: Path, content: Any) -> str:
    keys = set(content) if isinstance(content, dict) else set()
    if "shapes" in keys:
        return "labelme"
    if {"objects", "imgHeight"} <= keys:
        return "cityscapes"
    if {"images", "annotations"} <= keys:
        entries = content["annotations"] if isinstance(content["annotations"], list) else []
        return "panoptic" if any(isinstance(e, dict) and "segments_info" in e for e in entries) else "coco"
    found = f"an object with {', '.join(map(repr, sorted(keys)[:6])) or 'no keys'}"
    raise DataError(
        f"{path}: the format is not recognized, found {found if isinstance(content, dict) else 'no object'}. Wanted "
        "COCO ('images', 'annotations'), labelme ('shapes'), Cityscapes ('objects', 'imgHeight') or CVAT's XML; "
        "--format says which one it is."
    )


def _get(record: Any, key: str, *kinds: type) -> Any:
    """A key's value of one of the kinds; bool is none of them."""
    if not isinstance(record, dict):
        raise DataError(f"found {_short(record)}, wanted an object with {key!r}")
    if key not in record:
        raise DataError(f"{key!r} is missing")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise DataError(f"{key!r} is {_short(value)}, wanted {wanted}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def _image_id(name: str) -> str:
    path = PurePosixPath(name)
    absolute = path.is_absolute() or PureWindowsPath(name).drive
    if not path.parts or absolute or ".." in path.parts or {"\\", "\0"} & set(name):
        raise DataError(
            f"the image's name {name!r} is no path below a folder of images: wanted is a relative path with forward "
            "slashes and without '..'"
        )
    return sample_id(path)


def _size(height: float, width: float) -> tuple[int, int]:
    sides = (height, width)
    if not all(1 <= side <= MAX_SIDE and side == int(side) for side in sides) or height * width > MAX_PIXELS:
        raise DataError(f"the image's size is {height} x {width} (height x width): no image is like that")
    return int(height), int(width)


@dataclass(frozen=True)
class _Faults:
    lines: list[str]

    @contextmanager
    def at(self, where: str) -> Generator[None, None, None]:
        """Keep a DataError as a line that says where, and go on."""
        try:
            yield
        except DataError as error:
            self.lines.append(f"{where}: {error}")


def _image(
    where: str,
    header: Callable[[], tuple[str, tuple[int, int]]],
    shapes: Iterable[tuple[str, Any]],
    region: Callable[[Any, tuple[int, int]], tuple[str, Draw] | str],
    ordered: bool,
    void: frozenset[str] = frozenset(),
) -> Iterator[AnnotatedImage | str]:
    """One image of any format, or all of its faults.

    Args:
        header: gives id and (height, width).
        shapes: where each is, and its record.
        region: makes category and drawing of a record, or says which kind of shape is passed over.
    """
    wrong, regions, skipped = _Faults([]), [], []
    name, size = "", (0, 0)
    with wrong.at(where):
        name, size = header()
    for at, shape in shapes:
        with wrong.at(at):
            made = region(shape, size)
            if isinstance(made, str):
                skipped.append(made)
            else:
                regions.append(Region(made[0], at, made[1]))
    if wrong.lines:
        yield from wrong.lines
    else:
        yield AnnotatedImage(name, where, *size, tuple(regions), ordered, void, tuple(skipped))


# Shapes


def _points(pairs: Sequence[Sequence[Any]], least: int, most: int | None = None) -> np.ndarray:
    """float64 [N, 2], checked."""
    kind = f"{least}" if least == most else f"at least {least}"
    if not isinstance(pairs, list) or not least <= len(pairs) <= (most or len(pairs)):
        found = f"{len(pairs)} point(s)" if isinstance(pairs, list) else _short(pairs)
        raise DataError(f"found {found}, wanted {kind}. Mend or remove the shape")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"found {_short(pair)}, wanted a point [x, y]")
        for value in pair:
            _check_coordinate(value)
    return np.array(pairs, np.float64)


def _check_coordinate(value: Any) -> None:
    # The comparison is false for NaN. int() cannot overflow below the bound, neither in OpenCV nor in pycocotools.
    if type(value) not in (int, float) or not abs(value) <= MAX_SIDE:
        raise DataError(
            f"found the coordinate {_short(value)}, wanted a number from -{MAX_SIDE} to {MAX_SIDE}"
        )


def _polygon(points: np.ndarray) -> Draw:
    corners = np.floor(points + 0.5).astype(np.int32)
    (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    width, height = right - left + 1, bottom - top + 1
    if width * height > MAX_PIXELS:
        raise DataError(f"a shape of {height} x {width} pixels (height x width) is too large to be drawn")

    def draw() -> Patch:
        # Whole, to be cut afterwards: fillPoly's own clipping displaces edges that begin outside, by several pixels.
        canvas = np.zeros((height, width), np.uint8)
        cv2.fillPoly(canvas, [(corners - (left, top)).astype(np.int32)], (1,))
        return canvas.view(bool), left, top

    return draw


def _ellipse(
    x: float, y: float, radius_x: float, radius_y: float, size: tuple[int, int], degrees: float = 0
) -> Draw:
    """Turned clockwise, as seen in the image."""
    if not (radius_x > 0 and radius_y > 0):
        raise DataError(
            f"the radii are {radius_x:g} and {radius_y:g}, wanted are numbers above 0. Remove the shape"
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


def _box(left: float, top: float, right: float, bottom: float, degrees: float = 0) -> Draw:
    """Turned clockwise about its center, as seen in the image."""
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    if degrees:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        center = corners.mean(axis=0)
        corners = (corners - center) @ np.array([[cos, sin], [-sin, cos]]) + center
    return _polygon(corners)


def _runs(counts: Sequence[Any], height: int, width: int) -> np.ndarray:
    """bool [height · width] of run lengths, the first of them outside."""
    if not all(type(count) is int and count >= 0 for count in counts):
        raise DataError("run lengths must be integers from 0 on. Export the mask again")
    if sum(counts) != height * width:
        raise DataError(
            f"the run lengths cover {sum(counts)} pixels, wanted {height * width} ({height} x {width}, height x "
            "width). Export the mask again"
        )
    return np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, np.int64))


def _uncompressed(text: str) -> list[int]:
    """The run lengths behind COCO's text: 5 bits a character, from the third on differences to the one but last.

    pycocotools' decoder does not check its input: of a damaged text it writes beyond its memory, or reads there.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise DataError(
                f"{character!r} does not belong into compressed run lengths. Export the mask again"
            )
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise DataError("compressed run lengths end in the middle. Export the mask again")
    return counts


# COCO


def _coco(path: Path, content: Any, panoptic: Path | None) -> Annotations:
    """Instances and stuff; with a folder of PNGs, panoptic."""
    wrong = _Faults([])
    try:
        entries, annotations, categories = (
            _get(content, key, list) for key in ("images", "annotations", "categories")
        )
    except DataError as error:
        raise DataError(f"{path}: {error}. Wanted is a COCO file.") from error
    names: dict[int, str] = {}
    for k, category in enumerate(categories):
        with wrong.at(f"{path}: categories[{k}]"):
            number, name = _get(category, "id", int), _get(category, "name", str)
            if names.setdefault(number, name) != name:
                raise DataError(
                    f"the id {number} is given to {names[number]!r} and to {name!r}. Give each its own"
                )
    mine: dict[int | str, list[int]] = {}  # image → its annotations
    sound: list[tuple[int, int | str]] = []  # images with a usable id
    for k, entry in enumerate(entries):
        with wrong.at(f"{path}: images[{k}]"):
            number = _get(entry, "id", int, str)
            if number in mine:
                raise DataError(f"the id {number!r} was given to an image before")
            mine[number] = []
            sound.append((k, number))
    for k, annotation in enumerate(annotations):
        with wrong.at(f"{path}: annotations[{k}]"):
            number = _get(annotation, "image_id", int, str)
            if number not in mine:
                raise DataError(f"'image_id' {number!r} is none of the images' ids")
            mine[number].append(k)

    def category_of(record: Any) -> str:
        number = _get(record, "category_id", int)
        if number not in names:
            raise DataError(f"'category_id' {number} is none of the categories' ids")
        return names[number]

    def region(annotation: Any, size: tuple[int, int]) -> tuple[str, Draw]:
        return category_of(annotation), _coco_draw(_get(annotation, "segmentation", list, dict), size)

    def images() -> Iterator[AnnotatedImage | str]:
        yield from wrong.lines
        for k, number in sound:
            where = f"{path}: images[{k}]"
            own = [(f"{path}: annotations[{i}]", annotations[i]) for i in mine[number]]
            if panoptic is None:
                yield from _image(
                    where, functools.partial(_coco_header, entries[k]), own, region, ordered=False
                )
            elif len(own) != 1:
                yield f"{where}: found {len(own)} annotations, wanted one, with its PNG and segments"
            else:
                yield from _panoptic_image(where, entries[k], *own[0], panoptic, category_of)

    ordered = dict.fromkeys(names[number] for number in sorted(names))
    return Annotations(images, len(entries), tuple(ordered))


def _coco_header(entry: Any) -> tuple[str, tuple[int, int]]:
    return (
        _image_id(_get(entry, "file_name", str)),
        _size(_get(entry, "height", int, float), _get(entry, "width", int, float)),
    )


def _coco_draw(segmentation: Any, size: tuple[int, int]) -> Draw:
    if isinstance(segmentation, dict):
        return functools.partial(_coco_runs, segmentation, *size)
    if not segmentation:
        raise DataError("'segmentation' is empty: there is no area. Remove the annotation")
    for k, polygon in enumerate(segmentation):
        if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < 6:
            found = f"{len(polygon)} numbers" if isinstance(polygon, list) else _short(polygon)
            raise DataError(
                f"polygon {k} has {found}, wanted x and y of at least 3 points. Mend or remove it"
            )
        for value in polygon:
            _check_coordinate(value)
    mask = _pycocotools()

    def draw() -> Patch:
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, *size))).view(bool), 0, 0

    return draw


def _pycocotools() -> ModuleType:
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise DarsegError(
            f"COCO's polygons need pycocotools, which could not be imported here ({error}). Install it with: "
            'pip install "darseg[coco]"'
        ) from error


def _coco_runs(segmentation: Any, height: int, width: int) -> Patch:
    size, counts = _get(segmentation, "size", list), _get(segmentation, "counts", list, str)
    if size != [height, width]:
        raise DataError(
            f"the mask's size is {_short(size)}, its image's [{height}, {width}] (height, width). Export both again"
        )
    runs = _runs(_uncompressed(counts) if isinstance(counts, str) else counts, height, width)
    return runs.reshape(width, height).T, 0, 0  # COCO counts down the columns


def _panoptic_image(
    where: str, entry: Any, at: str, annotation: Any, folder: Path, category_of: Callable[[Any], str]
) -> Iterator[AnnotatedImage | str]:
    listed: set[int] = set()

    def header() -> tuple[str, tuple[int, int]]:
        _image_id(_get(annotation, "file_name", str))
        if not _get(annotation, "segments_info", list):
            raise DataError(
                "'segments_info' is empty: nothing is annotated. Remove the image and its annotation"
            )
        return _coco_header(entry)

    @functools.cache
    def ids() -> np.ndarray:  # read once for all segments of the image, when it is drawn
        return _panoptic_ids(folder / annotation["file_name"], _coco_header(entry)[1], listed)

    def region(segment: Any, _: tuple[int, int]) -> tuple[str, Draw]:
        number = _get(segment, "id", int)
        if not 0 < number < 1 << 24 or number in listed:
            raise DataError(f"the segment id {number} is given twice, or is not from 1 to {(1 << 24) - 1}")
        listed.add(number)
        return category_of(segment), lambda: (ids() == number, 0, 0)

    segments = annotation.get("segments_info")
    shapes = [(at, segment) for segment in segments] if isinstance(segments, list) else []
    yield from _image(where, header, shapes, region, ordered=True)


def _panoptic_ids(png: Path, size: tuple[int, int], listed: set[int]) -> np.ndarray:
    """int32 [H, W], checked against the segments that are listed."""
    if not png.is_file():
        raise DataError(f"{png} does not exist. Put the PNGs there, or name their folder (--panoptic-folder)")
    parts = read_image(png).astype(np.int32)
    if parts.shape[:2] != size:
        found = f"{parts.shape[0]} x {parts.shape[1]}"
        raise DataError(f"{png} has {found} pixels, its image {size[0]} x {size[1]} (height x width)")
    ids = parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]
    values, pixels = np.unique(ids, return_counts=True)
    unlisted = [
        (v, n) for v, n in zip(values.tolist(), pixels.tolist(), strict=True) if v and v not in listed
    ]
    if unlisted:
        shown = ", ".join(f"{value} ({count} pixels)" for value, count in unlisted[:8])
        raise DataError(f"{png}: {len(unlisted)} segment id(s) are not in 'segments_info': {shown}")
    return ids


# One file per image


def _per_image(root: Path, files: Mapping[str, Path], format: str | None) -> Annotations:
    def images() -> Iterator[AnnotatedImage | str]:
        for relative, path in files.items():
            try:
                content = _parse_json(path, _read(path))
                found = format or _recognize(path, content)
            except DataError as error:
                yield str(error)
                continue
            if found == "labelme":
                yield from _labelme(path, content, PurePosixPath(relative).parent)
            elif found == "cityscapes":
                yield from _cityscapes(path, content, relative)
            else:
                yield f"{path}: {found} annotations are one file for all images: give that file, not {root}"

    return Annotations(images, len(files), None)


def _labelme(path: Path, content: Any, folder: PurePosixPath) -> Iterator[AnnotatedImage | str]:
    def header() -> tuple[str, tuple[int, int]]:
        # labelme writes the image's path as it lay on the annotator's disk, often ../images/x.jpg or with
        # backslashes: only its name is of use here, and the JSON file's own folder.
        name = PureWindowsPath(_get(content, "imagePath", str)).name
        size = _size(_get(content, "imageHeight", int), _get(content, "imageWidth", int))
        return _image_id((folder / name).as_posix() if name else name), size

    yield from _image(str(path), header, _shapes(path, content, "shapes"), _labelme_region, True)


def _shapes(path: Path, content: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Where each shape is, and its record; a missing list becomes a shape that is none, and so a fault."""
    shapes = content.get(key) if isinstance(content, dict) else None
    if not isinstance(shapes, list):
        yield f"{path}: {key}", shapes
        return
    for k, shape in enumerate(shapes):
        yield f"{path}: {key}[{k}]", shape


def _labelme_region(shape: Any, size: tuple[int, int]) -> tuple[str, Draw] | str:
    label = _get(shape, "label", str)
    kind = shape.get("shape_type") or "polygon"  # old files name none: all were polygons
    points = shape.get("points")
    if kind in LABELME_LINES:
        return kind
    if kind == "polygon":
        return label, _polygon(_points(points, 3))
    if kind not in ("rectangle", "circle", "mask"):
        raise DataError(f"'shape_type' is {_short(kind)}, wanted polygon, rectangle, circle or mask")
    (x1, y1), (x2, y2) = _points(points, 2, 2).tolist()
    if kind == "rectangle":
        return label, _box(x1, y1, x2, y2)
    if kind == "circle":  # the center, and a point on the outline
        radius = math.hypot(x2 - x1, y2 - y1)
        return label, _ellipse(x1, y1, radius, radius, size)
    return label, functools.partial(
        _labelme_mask, _get(shape, "mask", str), *(int(value) for value in (x1, y1, x2, y2))
    )


def _labelme_mask(text: str, left: int, top: int, right: int, bottom: int) -> Patch:
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        mask = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    except (ValueError, cv2.error):  # no base64; no bytes at all
        mask = None
    wanted = (bottom - top + 1, right - left + 1)
    if mask is None or mask.shape != wanted:
        found = "no image" if mask is None else f"{mask.shape[0]} x {mask.shape[1]} pixels"
        raise DataError(f"'mask' holds {found}, its points span {wanted[0]} x {wanted[1]} (height x width)")
    return mask > 0, left, top


def _cityscapes(path: Path, content: Any, relative: str) -> Iterator[AnnotatedImage | str]:
    def header() -> tuple[str, tuple[int, int]]:
        # The file does not name its image. Cityscapes' images are called …_leftImg8bit.png.
        name = re.sub(r"_gt(Fine|Coarse)_polygons$", "_leftImg8bit", relative)
        return name, _size(_get(content, "imgHeight", int), _get(content, "imgWidth", int))

    def region(record: Any, _: tuple[int, int]) -> tuple[str, Draw] | str:
        label = _get(record, "label", str)
        if label == CITYSCAPES_UNDRAWN:
            return label
        if label not in CITYSCAPES_VOID:
            label = label.removesuffix("group") or label
        return label, _polygon(_points(_get(record, "polygon", list), 3))

    objects = _shapes(path, content, "objects")
    kept = (
        (at, record) for at, record in objects if not (isinstance(record, dict) and record.get("deleted"))
    )
    yield from _image(str(path), header, kept, region, True, CITYSCAPES_VOID)


# CVAT


class _NoDoctype(ElementTree.TreeBuilder):
    """Entities, which can grow without bound or name files, are declared in a document type: none is read."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("a document type is not read, CVAT writes none. Remove the <!DOCTYPE …>")


def _cvat(path: Path, data: bytes) -> Annotations:
    parser = ElementTree.XMLParser(target=_NoDoctype())
    try:
        root = ElementTree.fromstring(data, parser)
    except DataError as error:
        raise DataError(f"{path}: {error}.") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}). Export or copy it again.") from error
    if root.tag != "annotations" or root.find("track") is not None:
        found = "tracks of a video" if root.tag == "annotations" else f"<{root.tag}>"
        raise DataError(
            f"{path}: found {found}, wanted <annotations> as CVAT exports for images (version 1.1)."
        )
    entries = root.findall("image")

    def images() -> Iterator[AnnotatedImage | str]:
        for k, entry in enumerate(entries):
            where = f"{path}: image[{k}]"
            shapes = [(f"{where}, {shape.tag}[{n}]", shape) for n, shape in enumerate(entry)]
            shapes.sort(key=lambda one: _layer(one[1]))  # stable: equal layers in the file's order
            yield from _image(where, functools.partial(_cvat_header, entry), shapes, _cvat_region, True)

    return Annotations(images, len(entries), None)


def _layer(shape: ElementTree.Element) -> float:
    try:
        return _attribute(shape, "z_order", "0")
    except DataError:
        return 0  # said when the shape itself is read


def _text(element: ElementTree.Element, key: str) -> str:
    if key not in element.attrib:
        raise DataError(f"the attribute {key!r} is missing")
    return element.attrib[key]


def _attribute(element: ElementTree.Element, key: str, default: str | None = None) -> float:
    text = element.attrib.get(key, default) if default is not None else _text(element, key)
    return _number(text, key)


def _number(text: str, key: str) -> float:
    try:
        value = float(text)
        _check_coordinate(value)
    except (ValueError, DataError):
        raise DataError(
            f"{key!r} holds {_short(text)}, wanted a number from -{MAX_SIDE} to {MAX_SIDE}"
        ) from None
    return value


def _integer(element: ElementTree.Element, key: str) -> int:
    value = _attribute(element, key)
    if value != int(value):
        raise DataError(f"{key!r} holds {value:g}, wanted an integer")
    return int(value)


def _cvat_header(entry: ElementTree.Element) -> tuple[str, tuple[int, int]]:
    return _image_id(_text(entry, "name")), _size(_attribute(entry, "height"), _attribute(entry, "width"))


def _cvat_region(shape: ElementTree.Element, size: tuple[int, int]) -> tuple[str, Draw] | str:
    if shape.tag in CVAT_NO_AREAS:
        return shape.tag
    if shape.tag not in ("polygon", "box", "ellipse", "mask"):
        raise DataError(f"found <{shape.tag}>, wanted <polygon>, <box>, <ellipse> or <mask>")
    label = _text(shape, "label")
    _attribute(shape, "z_order", "0")
    turned = _attribute(shape, "rotation", "0")
    if shape.tag == "polygon":
        pairs = [
            [_number(v, "points") for v in pair.split(",")] for pair in _text(shape, "points").split(";")
        ]
        return label, _polygon(_points(pairs, 3))
    if shape.tag == "box":
        return label, _box(*(_attribute(shape, key) for key in ("xtl", "ytl", "xbr", "ybr")), turned)
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = (_attribute(shape, key) for key in ("cx", "cy", "rx", "ry"))
        return label, _ellipse(x, y, radius_x, radius_y, size, turned)
    left, top, width, height = (_integer(shape, key) for key in ("left", "top", "width", "height"))
    if not (0 < width * height <= MAX_PIXELS and width > 0):
        raise DataError(f"the mask is {height} x {width} pixels (height x width). Export it again")
    return label, functools.partial(_cvat_mask, _text(shape, "rle"), left, top, width, height)


def _cvat_mask(text: str, left: int, top: int, width: int, height: int) -> Patch:
    try:
        counts = [int(run) for run in text.split(",")]
    except ValueError:
        raise DataError(f"'rle' holds {_short(text)}, wanted run lengths. Export the mask again") from None
    return _runs(counts, height, width).reshape(height, width), left, top  # CVAT counts along the rows
