"""COCO's files: instances and stuff, and panoptic."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from darseg.annotate.beside import picture_size
from darseg.annotate.records import Faults, check_coordinate, checked_size, field, image_id, shortened
from darseg.annotate.regions import AnnotatedImage, Annotations, Draw, Entry, Patch, checked_image
from darseg.annotate.shapes import check_outline, run_mask
from darseg.data.advice import pixel_count
from darseg.data.images import read_image
from darseg.errors import DarsegError, DataError

LARGEST_SEGMENT = (1 << 24) - 1
"""Segment ids are colors of a PNG: red + 256 green + 65536 blue."""


@dataclass(frozen=True)
class _File:
    """A COCO file with its references followed.

    Attributes:
        images: index and id of the images with a usable id.
        annotations_of: image id → indices of its annotations.
        names: category id → name.
        faults: lines about entries that cannot be used.
        lost: number of annotations whose image is not known.

    Ids are numbers, or their texts: some tools write "1" for 1.
    """

    path: Path
    entries: list[Any]
    annotations: list[Any]
    images: list[tuple[int, str]]
    annotations_of: dict[str, list[int]]
    names: dict[str, str]
    faults: list[str]
    lost: int

    def category(self, record: Any) -> str:
        """The category's name of an annotation or a segment. Raises DataError."""
        number = _id_of(record, "category_id")
        if number not in self.names:
            raise DataError(
                f"'category_id' is {shortened(record['category_id'])}, but no category has this id"
            )
        return self.names[number]


def read_coco(path: Path, content: Any, panoptic_folder: Path | None) -> Annotations:
    """Instances and stuff, or panoptic if `panoptic_folder` is given. Raises DataError for other files."""
    file = _index(path, content)

    def region(annotation: Any, size: tuple[int, int]) -> tuple[str, Draw]:
        return file.category(annotation), _drawing(field(annotation, "segmentation", list | dict), size)

    def images() -> Iterator[AnnotatedImage | str]:
        yield from file.faults
        for k, number in file.images:
            where = f"{path}: images[{k}]"
            own = [(f"{path}: annotations[{i}]", file.annotations[i]) for i in file.annotations_of[number]]
            header = functools.partial(_header, file.entries[k], path.parent)
            if panoptic_folder is None and not own and file.lost:
                yield (
                    f"{where}: the image has no annotation, but {file.lost} annotation(s) of the file find no image and "
                    "may be its own. Fix their 'image_id'; then the image is drawn"
                )
            elif panoptic_folder is None:
                yield from checked_image(Entry(where, header, own, region=region, ordered=False))
            elif len(own) != 1:
                yield f"{where}: the image has {len(own)} annotations, expected one, with its PNG and segments"
            else:
                at, annotation = own[0]
                entry = _panoptic_entry(file, k, annotation, at=at, folder=panoptic_folder)
                yield from checked_image(entry)

    categories = dict.fromkeys(file.names[number] for number in sorted(file.names, key=_order))
    return Annotations(images, len(file.entries), tuple(categories))


def _index(path: Path, content: Any) -> _File:
    """The file with its references followed. Raises DataError if it is not a COCO file."""
    try:
        entries, annotations, categories = (
            field(content, key, list) for key in ("images", "annotations", "categories")
        )
    except DataError as error:
        raise DataError(f"{path} is not a COCO file: {error}.") from error
    faults = Faults([])
    names: dict[str, str] = {}
    for k, category in enumerate(categories):
        with faults.at(f"{path}: categories[{k}]"):
            number, name = _id_of(category, "id"), field(category, "name", str)
            if names.setdefault(number, name) != name:
                raise DataError(
                    f"the id {number} stands for {names[number]!r} and for {name!r}. Give each category its own id"
                )
    annotations_of: dict[str, list[int]] = {}
    images: list[tuple[int, str]] = []
    for k, entry in enumerate(entries):
        with faults.at(f"{path}: images[{k}]"):
            number = _id_of(entry, "id")
            if number in annotations_of:
                raise DataError(f"an earlier image has the id {number}, too. Give each image its own id")
            annotations_of[number] = []
            images.append((k, number))
    placed = 0
    for k, annotation in enumerate(annotations):
        with faults.at(f"{path}: annotations[{k}]"):
            number = _id_of(annotation, "image_id")
            if number not in annotations_of:
                raise DataError(
                    f"'image_id' is {shortened(annotation['image_id'])}, but no image has this id, so the area is in "
                    "no map"
                )
            annotations_of[number].append(k)
            placed += 1
    return _File(
        path=path,
        entries=entries,
        annotations=annotations,
        images=images,
        annotations_of=annotations_of,
        names=names,
        faults=faults.lines,
        lost=len(annotations) - placed,
    )


def _id_of(record: Any, key: str) -> str:
    """An id as text, the same for 1 and "1". Raises DataError."""
    return str(field(record, key, int | str)).strip()


def _order(number: str) -> tuple[bool, int, str]:
    """Numbers by their size, then other ids."""
    is_number = number.lstrip("-").isdecimal()
    return not is_number, int(number) if is_number else 0, number


def _header(entry: Any, folder: Path) -> tuple[str, tuple[int, int]]:
    """Id and size of an image; a missing size is that of the picture in `folder` or its folder images."""
    name = field(entry, "file_name", str)
    number = image_id(name)
    if entry.get("height") is None and entry.get("width") is None:
        sizes = (picture_size(place / name) for place in (folder, folder / "images"))
        if (size := next(filter(None, sizes), None)) is None:
            raise DataError(
                f"'height' and 'width' are missing, and there is no picture {name} in {folder}. Put it there, or add both"
            )
        return number, checked_size(*size)
    return number, checked_size(field(entry, "height", int | float), field(entry, "width", int | float))


def _drawing(segmentation: Any, size: tuple[int, int]) -> Draw:
    """Draws polygons (a list) or run lengths (an object). Raises DataError."""
    if isinstance(segmentation, dict):
        return functools.partial(_run_lengths, segmentation, *size)
    if not segmentation:
        raise DataError("'segmentation' is empty, so there is no area. Remove the annotation")
    for k, polygon in enumerate(segmentation):
        if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < 6:
            problem = (
                f"has {len(polygon)} numbers" if isinstance(polygon, list) else f"is {shortened(polygon)}"
            )
            raise DataError(f"polygon {k} {problem}, expected x and y of at least 3 points. Fix or remove it")
        for value in polygon:
            check_coordinate(value)
        check_outline(np.array(polygon, np.float64).reshape(-1, 2))
    mask = _pycocotools()

    def draw() -> Patch:
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, *size))).view(bool), 0, 0

    return draw


def _pycocotools() -> ModuleType:
    try:
        return importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise DarsegError(
            f"Polygons of COCO files need pycocotools, which cannot be imported here ({error}). Install it with: "
            'pip install "darseg[coco]"'
        ) from error


def _run_lengths(segmentation: Any, height: int, width: int) -> Patch:
    size, counts = field(segmentation, "size", list), field(segmentation, "counts", list | str)
    if size != [height, width]:
        raise DataError(
            f"the mask's size is {shortened(size)}, but its image's is [{height}, {width}] (height, width). Export both "
            "again"
        )
    runs = run_mask(_uncompressed(counts) if isinstance(counts, str) else counts, height, width)
    return runs.reshape(width, height).T, 0, 0  # COCO counts down the columns


def _uncompressed(text: str) -> list[int]:
    """The run lengths of COCO's compressed string. Raises DataError.

    A character holds 5 bits; from the third number on, numbers are differences to the last but one. pycocotools' decoder
    does not check its input: with a damaged string it reads or writes outside of its memory.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise DataError(
                f"{character!r} is not valid in a compressed run-length string. Export the mask again"
            )
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise DataError("the compressed run-length string ends inside a number. Export the mask again")
    return counts


def _panoptic_entry(file: _File, k: int, annotation: Any, *, at: str, folder: Path) -> Entry:
    """Image `k` of a panoptic file with its only annotation. `at`: the place of the annotation."""
    entry = file.entries[k]
    listed: set[int] = set()

    def header() -> tuple[str, tuple[int, int]]:
        image_id(field(annotation, "file_name", str))
        if not field(annotation, "segments_info", list):
            raise DataError(
                "'segments_info' is empty, so nothing is annotated. Remove the image and its annotation"
            )
        return _header(entry, file.path.parent)

    @functools.cache
    def ids() -> np.ndarray:  # read once for all segments of the image, when the first is drawn
        return _panoptic_ids(folder / annotation["file_name"], _header(entry, file.path.parent)[1], listed)

    def region(segment: Any, _: tuple[int, int]) -> tuple[str, Draw]:
        number = field(segment, "id", int)
        if not 0 < number <= LARGEST_SEGMENT:
            raise DataError(f"the segment id is {number}, expected an integer from 1 to {LARGEST_SEGMENT}")
        if number in listed:
            raise DataError(f"the segment id {number} occurs twice. Give each segment its own id")
        listed.add(number)
        return file.category(segment), lambda: (ids() == number, 0, 0)

    segments = annotation.get("segments_info")
    shapes = [(at, segment) for segment in segments] if isinstance(segments, list) else []
    return Entry(f"{file.path}: images[{k}]", header, shapes, region=region, ordered=True)


def _panoptic_ids(png: Path, size: tuple[int, int], listed: set[int]) -> np.ndarray:
    """Segment ids, int32 [H, W]. Raises DataError if the PNG does not fit its image and segments."""
    if not png.is_file():
        raise DataError(f"{png} does not exist. Put the PNGs there, or name their folder (--panoptic-folder)")
    parts = read_image(png).astype(np.int32)
    if parts.shape[:2] != size:
        raise DataError(
            f"{png} has {parts.shape[0]} x {parts.shape[1]} pixels, but its image has {size[0]} x {size[1]} (height x "
            "width). Export it again"
        )
    ids = parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]
    values, pixels = np.unique(ids, return_counts=True)
    unlisted = [
        (value, count)
        for value, count in zip(values.tolist(), pixels.tolist(), strict=True)
        if value and value not in listed
    ]
    if unlisted:
        examples = ", ".join(f"{value} ({pixel_count(count)})" for value, count in unlisted[:8])
        raise DataError(f"{png}: {len(unlisted)} segment id(s) are missing from 'segments_info': {examples}")
    return ids
