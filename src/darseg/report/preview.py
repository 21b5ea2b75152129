"""A page with what a round's network will see: images of the first steps with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.images import shrink
from darseg.report.elements import Row, Table, class_entries
from darseg.report.gallery import CHECK, CHECKS, SIDE, PictureMap, data_url
from darseg.report.page import Page, check_out, render
from darseg.run.preview import Preview, SeenBatch, preview_round
from darseg.run.seen import SeenImage, Tile

NAME = "preview.html"
"""The page, in the current folder, if no other is given."""

JPEG_QUALITY = 90
HATCHES = ((86, 92, 104), (120, 126, 138))
"""The two grays of the stripes that mean padding, RGB."""
STRIPE = 4  # pixels of a stripe, along the rows
FRAME = (255, 255, 255), (20, 20, 20)
"""The two colors of a box's frame, RGB, inside and outside: one of them is seen on any image."""


@dataclass(frozen=True)
class PreviewPage:
    """A written page. notes: what a reader should know about the labels."""

    out: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Figure:
    """A picture in its place. style: CSS class; column: where it stands, 0: after the one before."""

    map: PictureMap
    style: str
    column: int = 0


@dataclass(frozen=True)
class _Picture:
    """The pictures of an image. id: of the sample."""

    id: str
    columns: int
    figures: tuple[_Figure, ...]


def write_preview(
    source: Path | str,
    out: Path | None = None,
    *,
    round_index: int = 0,
    steps: int = 1,
    overrides: Sequence[str] = (),
) -> PreviewPage:
    """Write a page that shows the images of a round's first steps as its network sees them.

    Args:
        source: a recipe, or a run folder, which stays as it is.
        out: default: preview.html in the current folder. Pages of darseg are replaced.
        overrides: "section.key=value" for a recipe, "data.root=PATH" for a run folder.

    Raises DarsegError: a bad recipe, bad data, no such round, or a file that darseg did not write.
    """
    out = out or Path(NAME)
    check_out(out)
    preview = preview_round(source, round_index=round_index, steps=steps, overrides=overrides)
    return PreviewPage(page_of(preview).write(out), preview.notes)


def page_of(preview: Preview) -> Page:
    """The page of a preview, whose batches are drawn now."""
    first = "first step" if preview.steps == 1 else f"first {preview.steps} steps"
    page = Page(
        f"{preview.name}: what the network sees in round {preview.round}",
        f"The images of the {first}, cut out and changed exactly as training draws them.",
    )
    rows = [Row(name, [text]) for name, text in preview.settings]
    page.section(
        "Settings",
        render(
            "preview_settings",
            settings=Table([], rows, "facts"),
            classes=class_entries(preview.classes),
            boxes=preview.boxes,
        ),
    )
    for batch in preview.batches:
        title = f"Step {batch.step}: {batch.title}"
        page.section(title, render("preview", pictures=_pictures(batch, preview.classes), note=batch.note))
    return page


def _pictures(batch: SeenBatch, classes: ClassSet) -> list[_Picture]:
    return [_picture(image, classes) for image in batch.images]


def _picture(image: SeenImage, classes: ClassSet) -> _Picture:
    figures = [_figure(tile, classes) for tile in image.own]
    for view in image.views:
        for place, tile in enumerate(view):
            # Further views stand below the first.
            figures.append(_figure(tile, classes, column=0 if place else len(image.own) + 1))
    columns = len(image.own) + max((len(view) for view in image.views), default=0)
    return _Picture(image.id, columns, tuple(figures))


def _figure(tile: Tile, classes: ClassSet, column: int = 0) -> _Figure:
    is_label = tile.pixels.ndim == 2
    drawn = draw_tile(tile, classes)
    if is_label:
        url = data_url(Image.fromarray(drawn), "png", optimize=True)
    else:
        url = data_url(Image.fromarray(drawn), "jpeg", quality=JPEG_QUALITY)
    return _Figure(PictureMap(url, tile.caption), "map" if is_label else "", column)


def draw_tile(tile: Tile, classes: ClassSet) -> NDArray[np.uint8]:
    """The picture of a tile, uint8 [h, w, 3], at most SIDE pixels wide and high.

    Classes have their colors, pixels without one a checkerboard, padding has stripes, and a box a frame.
    """
    is_label = tile.pixels.ndim == 2
    small = shrink(tile.pixels, SIDE, cv2.INTER_NEAREST if is_label else cv2.INTER_AREA)
    inside = shrink(tile.inside.astype(np.uint8), SIDE, cv2.INTER_NEAREST) > 0
    rows, columns = np.indices(small.shape[:2])
    if is_label:
        drawn = classes.palette()[small]
        light = (rows // CHECK + columns // CHECK) % 2 == 0
        drawn[(small == IGNORE) & light] = CHECKS[0]
        drawn[(small == IGNORE) & ~light] = CHECKS[1]
    else:
        drawn = small.copy()
    dark = (rows + columns) // STRIPE % 2 == 0
    drawn[~inside & dark] = HATCHES[0]
    drawn[~inside & ~dark] = HATCHES[1]
    if tile.box is not None:
        factor = small.shape[0] / tile.pixels.shape[0]
        top, left, bottom, right = (round(edge * factor) for edge in tile.box)
        for grown, color in enumerate(FRAME):
            corner, opposite = (left - grown, top - grown), (right - 1 + grown, bottom - 1 + grown)
            cv2.rectangle(drawn, corner, opposite, color, 1)
    return drawn
