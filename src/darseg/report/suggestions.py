"""A page with the images to label next: predictions, where the network is unsure, and the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from darseg.data.classes import ClassSet
from darseg.data.images import shrink
from darseg.model.uncertain import Uncertain
from darseg.report.elements import Row, Table, class_entries
from darseg.report.gallery import JPEG_QUALITY, SIDE, PictureMap, data_url, jpeg_url, map_url
from darseg.report.page import Page, check_out, render
from darseg.run.predict import draw_overlay
from darseg.run.suggest import COUNT, suggest_images
from darseg.run.suggestions import RECORD, Suggested, SuggestedImage, percent

NAME = "suggestions.html"
"""The page, in the output folder."""

UNSURE = 235, 80, 30
"""Color of a pixel whose uncertainty is 1, RGB; certain pixels are white."""


@dataclass(frozen=True)
class _Shown:
    """A suggested image on the page. position: 1 for the one to label first."""

    position: int
    image: SuggestedImage
    maps: tuple[PictureMap, ...]


def suggest(
    run: Path | str,
    out: Path | str,
    *,
    count: int = COUNT,
    round_index: int | None = None,
    pool: int | None = None,
    plain: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Suggested:
    """Suggest which unlabeled images of a run to label next, with list, page and pre-labels in `out`.

    Arguments, errors and files are those of `darseg.run.suggest.suggest_images`; the page is `suggestions.html`.
    """
    page_path = Path(out) / NAME
    pictures: list[tuple[PictureMap, ...]] = []
    check_out(page_path)

    def draw(image: NDArray[np.uint8], prediction: Uncertain, classes: ClassSet) -> None:
        pictures.append(_maps(image, prediction, classes))

    suggested = suggest_images(
        run,
        out,
        count=count,
        round_index=round_index,
        pool=pool,
        plain=plain,
        overrides=overrides,
        console=console,
        draw=draw,
    )
    page_of(suggested, pictures, name=Path(run).resolve().name).write(page_path)
    return suggested


def page_of(suggested: Suggested, pictures: Sequence[tuple[PictureMap, ...]], *, name: str) -> Page:
    """The page of suggested images with their pictures, in the same order."""
    count = len(suggested.images)
    page = Page(
        f"{name}: label these {count} images next",
        f"Chosen from {suggested.looked_at:,} of {suggested.available:,} unlabeled images, the most useful first.",
    )
    page.section(
        "How they were chosen",
        render("suggested", settings=_settings(suggested), classes=class_entries(suggested.class_set)),
    )
    shown = [
        _Shown(position, image, maps)
        for position, (image, maps) in enumerate(zip(suggested.images, pictures, strict=True), 1)
    ]
    page.section("Images", render("suggested_images", shown=shown, notes=suggested.notes))
    return page


def _settings(suggested: Suggested) -> Table:
    total = max(1, sum(suggested.labeled_pixels))
    shares = [
        f"{name} {percent(pixels / total)}"
        for name, pixels in zip(suggested.classes, suggested.labeled_pixels, strict=True)
    ]
    rows = [
        Row("Labeled pixels", [", ".join(shares)]),
        Row("Decisions", [suggested.decisions.removeprefix("Decisions: ")]),
        Row("Prediction", [suggested.protocol]),
    ]
    if suggested.marked:
        rows.append(Row("Left out", [f"{suggested.marked} images that are marked as bad"]))
    if suggested.failed:
        rows.append(Row("Not readable", [f"{len(suggested.failed)} images; {RECORD} names them"]))
    return Table([], rows, "facts")


def _maps(image: NDArray[np.uint8], prediction: Uncertain, classes: ClassSet) -> tuple[PictureMap, ...]:
    """The pictures of an image: itself, prediction over it, prediction, where the network is unsure."""
    overlay = draw_overlay(image, classes.palette()[prediction.classes])
    return (
        PictureMap(jpeg_url(image), "image"),
        PictureMap(jpeg_url(overlay), "prediction over the image"),
        PictureMap(map_url(prediction.classes, classes), "prediction"),
        PictureMap(_uncertainty_url(prediction.uncertainty), "where the network is unsure"),
    )


def _uncertainty_url(uncertainty: NDArray[np.float32]) -> str:
    """White where the network is certain, orange where it is not."""
    small = shrink(np.round(uncertainty * 255).astype(np.uint8), SIDE, cv2.INTER_AREA)[..., None] / 255
    color = np.round(255 + (np.array(UNSURE) - 255) * small).astype(np.uint8)
    return data_url(Image.fromarray(color), "jpeg", quality=JPEG_QUALITY)
