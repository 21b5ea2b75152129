"""Images and label files, read: sizes, values and colors, and what is wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from darseg.data.images import GIF_MARKS, image_size, is_png, open_with_pillow, read_bytes
from darseg.data.labels import decode_label
from darseg.data.orientation import orientation_mark, upright_size
from darseg.errors import DataError
from darseg.init.discover import FoundImage
from darseg.init.names import RGB

MOST_COLORS = 255
"""Different values or colors of label maps; files with more are photographs, or drawings with smoothed edges."""


@dataclass(frozen=True)
class LabelContent:
    """What one label file holds.

    Attributes:
        size: height and width.
        colors: whether it holds colors; otherwise values.
        pixels: value, or color as red · 65536 + green · 256 + blue → number of pixels.
        palette: colors of the values.
    """

    size: tuple[int, int]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What all images and labels hold.

    Attributes:
        sizes: image → height and width.
        faults: file → what is wrong with it.
        colors, pixels: of all usable label files together, as in `LabelContent`.
        palette: the palette of the first label file that has one.
    """

    sizes: Mapping[Path, tuple[int, int]]
    faults: Mapping[Path, str]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...]


def survey(images: Sequence[FoundImage], advance: Callable[[], object] = lambda: None) -> Survey:
    """Read every image and label file; `advance` is called after each image."""
    sizes: dict[Path, tuple[int, int]] = {}
    faults: dict[Path, str] = {}
    contents: dict[Path, LabelContent] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for image, (size, content) in zip(images, pool.map(_read, images), strict=True):
            if isinstance(size, str):
                faults[image.image] = size
            else:
                sizes[image.image] = size
            if image.label is not None and isinstance(content, str):
                faults[image.label] = content
            elif image.label is not None and isinstance(content, LabelContent):
                fitting = (
                    (size, upright_size(size, orientation_mark(image.image)))
                    if isinstance(size, tuple)
                    else ()
                )
                if isinstance(size, tuple) and content.size not in fitting:
                    faults[image.label] = (
                        f"{image.label}: the label has {content.size[0]}x{content.size[1]} pixels, but its image "
                        f"{image.image} has {size[0]}x{size[1]} (height x width)"
                    )
                else:
                    contents[image.label] = content
            advance()
    colors = sum(content.colors for content in contents.values()) * 2 > len(contents)
    pixels: Counter[int] = Counter()
    for path, content in contents.items():
        if content.colors == colors:
            pixels.update(content.pixels)
        else:
            kinds = ("values", "colors")
            faults[path] = (
                f"{path} holds {kinds[content.colors]}, but most label files hold {kinds[colors]}. Convert it"
            )
    palette = next((content.palette for content in contents.values() if content.palette), ())
    return Survey(sizes, faults, colors, pixels=dict(pixels), palette=palette)


def _read(image: FoundImage) -> tuple[tuple[int, int] | str, LabelContent | str | None]:
    """The image's size and the label's content; a text is what is wrong with the file."""
    try:
        size: tuple[int, int] | str = image_size(image.image)
    except DataError as error:
        size = str(error)
    try:
        return size, read_label_content(image.label) if image.label else None
    except DataError as error:
        return size, str(error)


def read_label_content(path: Path) -> LabelContent:
    """Values or colors of a label file. Raises DataError if it cannot be a label map of classes."""
    raw = decode_label(path, "auto")
    colors = raw.dtype == np.int32
    if colors:
        values, counts = np.unique(raw, return_counts=True)
    else:
        counted = np.bincount(raw[raw >= 0])
        values = np.flatnonzero(counted)
        counts = counted[values]
    if len(values) > MOST_COLORS:
        raise DataError(
            f"{path} holds {len(values)} different {'colors' if colors else 'values'}, so it is a photograph, shows "
            "instances, or has smoothed edges. Export it again, without smoothing and with one value per class"
        )
    pixels = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value >= 0}
    height, width = raw.shape
    return LabelContent((height, width), colors, pixels, palette=() if colors else palette_of(path))


def palette_of(path: Path) -> tuple[RGB, ...]:
    """The palette of a PNG or GIF; empty for any other file."""
    data = read_bytes(path)
    if not is_png(data) and not data.startswith(GIF_MARKS):
        return ()
    image = open_with_pillow(data)
    flat = image.getpalette("RGB") if image.mode == "P" else None
    return tuple((flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3)) if flat else ()
