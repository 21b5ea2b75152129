"""The viewer's pictures of photographs and maps: JPEG and indexed PNG, shrunk to fit a page."""

from __future__ import annotations

import io
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.data.images import shrink


def jpeg(image: NDArray[np.uint8], size: int, quality: int) -> bytes:
    """An image (uint8 [H, W, 3], RGB) as a JPEG whose long side has at most `size` pixels."""
    file = io.BytesIO()
    Image.fromarray(shrink(image, size, cv2.INTER_AREA)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def indexed_png(
    values: NDArray[np.uint8], size: int, *, palette: NDArray[np.uint8], transparent: int | None = None
) -> bytes:
    """A map (uint8 [H, W]) as an indexed PNG whose long side has at most `size` pixels.

    Args:
        palette: uint8 [256, 3], RGB.
        transparent: value whose pixels are transparent.
    """
    image = Image.fromarray(np.ascontiguousarray(shrink(values, size, cv2.INTER_NEAREST)), "P")
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    options = {} if transparent is None else {"transparency": transparent}
    image.save(file, "PNG", compress_level=3, **options)
    return file.getvalue()


@lru_cache(maxsize=1)
def colormap() -> NDArray[np.uint8]:
    """uint8 [256, 3], RGB: viridis, whose lightness rises evenly."""
    steps = np.arange(256, dtype=np.uint8)[None]
    return cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)[0, :, ::-1].copy()


def hex_color(color: tuple[int, int, int] | NDArray[np.uint8]) -> str:
    """RGB from 0 to 255 → "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def pixel_at(values: NDArray, x: float, y: float) -> tuple[int, int]:
    """Row and column of the pixel at fractions x, y of width and height."""
    height, width = values.shape
    x, y = (min(1.0, max(0.0, part)) for part in (x, y))
    return min(height - 1, int(y * height)), min(width - 1, int(x * width))
