"""What every annotation format becomes: images with regions; and the painter of label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from darseg.annotate.records import Faults
from darseg.data.classes import IGNORE
from darseg.errors import DataError

Patch = tuple[np.ndarray, int, int]
"""A mask, bool [h, w], and the image's column and row of its first pixel."""

Draw = Callable[[], Patch]
UNCLAIMED = -1
"""While painting: pixels that no region covers yet."""


@dataclass(frozen=True)
class Region:
    """An area of one category. `draw` makes its mask when it is painted, so only one is in memory."""

    category: str
    where: str
    draw: Draw


@dataclass(frozen=True)
class AnnotatedImage:
    """An image's regions.

    Attributes:
        id: the image's path without suffix.
        where: file and place of its entry.
        ordered: later regions lie on top; otherwise pixels of two categories are not labeled.
        void: categories that are not classes unless the user names them.
        skipped: kinds of the shapes that are not areas, one for each shape.
        renamed: its file, and the picture that this names, if another one was taken; otherwise empty.
        chinese: its file is not UTF-8 and was read as GB18030.
    """

    id: str
    where: str
    height: int
    width: int
    regions: tuple[Region, ...]
    ordered: bool
    void: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()
    renamed: str = ""
    chinese: bool = False


@dataclass(frozen=True)
class Annotations:
    """Annotation files of one format.

    Attributes:
        images: makes an iterator over the images; an image with faults gives a line for each fault instead.
        total: how many images there are.
        categories: the file's own list of names, in the order of their ids; None if the format has no list.
    """

    images: Callable[[], Iterator[AnnotatedImage | str]]
    total: int
    categories: tuple[str, ...] | None


@dataclass(frozen=True)
class Entry:
    """An image's entry in an annotation file, not checked yet.

    Attributes:
        where: file and place of the entry.
        header: gives the image's id and (height, width); may raise DataError.
        shapes: where each shape is, and its record.
        region: makes category and drawing of a record and the image's size, or names the kind of a shape that is not an
            area; may raise DataError.
        ordered, void: as in `AnnotatedImage`.
    """

    where: str
    header: Callable[[], tuple[str, tuple[int, int]]]
    shapes: Iterable[tuple[str, Any]]
    region: Callable[[Any, tuple[int, int]], tuple[str, Draw] | str]
    ordered: bool
    void: frozenset[str] = frozenset()


def checked_image(entry: Entry) -> Iterator[AnnotatedImage | str]:
    """One image, or a line for each of its faults."""
    faults, regions, skipped = Faults([]), [], []
    name, size = "", (0, 0)
    with faults.at(entry.where):
        name, size = entry.header()
    for where, shape in entry.shapes:
        with faults.at(where):
            result = entry.region(shape, size)
            if isinstance(result, str):
                skipped.append(result)
            else:
                category, draw = result
                regions.append(Region(category, where, draw))
    if faults.lines:
        yield from faults.lines
    else:
        yield AnnotatedImage(
            id=name,
            where=entry.where,
            height=size[0],
            width=size[1],
            regions=tuple(regions),
            ordered=entry.ordered,
            void=entry.void,
            skipped=tuple(skipped),
        )


def paint(
    image: AnnotatedImage,
    index: Mapping[str, int],
    unclaimed: int = IGNORE,
    *,
    empty: list[str] | None = None,
) -> np.ndarray | list[str]:
    """The label map of an image, uint8 [H, W], or its faults if regions cannot be drawn.

    Args:
        index: category → class; regions of other categories are 255.
        unclaimed: value of pixels that no region covers.
        empty: gets the place of each region without a pixel in the image.
    """
    label = np.full((image.height, image.width), UNCLAIMED, np.int16)
    faults: dict[
        str, None
    ] = {}  # in order and without repetition: segments of one panoptic PNG share its faults
    for region in image.regions:
        try:
            mask, left, top = region.draw()
        except DataError as error:
            faults[f"{region.where}: {error}"] = None
            continue
        rows = slice(max(top, 0), max(0, top + mask.shape[0]))
        columns = slice(max(left, 0), max(0, left + mask.shape[1]))
        below = label[rows, columns]
        mask = mask[rows.start - top :, columns.start - left :][: below.shape[0], : below.shape[1]]
        if empty is not None and not mask.any():
            empty.append(region.where)
        value = index.get(region.category, IGNORE)
        if image.ordered:
            below[mask] = value
        else:  # independent of the order: two different categories make a pixel 255 for good
            below[mask] = np.where((below == UNCLAIMED) | (below == value), value, IGNORE)[mask]
    if faults:
        return list(faults)
    label[label == UNCLAIMED] = unclaimed
    return label.astype(np.uint8)
