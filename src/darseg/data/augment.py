"""Move image and label together: scale, rotate, blur, mirror, crop.

This is the sequence of the release (DARS, section 4).

Scale, rotation, mirror and crop are one affine map, so only the pixels of the crop are resampled, and only once.
The blur then runs on the part of the crop that shows the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from darseg.data.classes import IGNORE
from darseg.data.colors import Colors, recolor
from darseg.errors import RecipeError

BLUR_KERNEL = (5, 5)  # pixels; the release's Gaussian, sigma as OpenCV derives it from the size


@dataclass(frozen=True)
class Augmentation:
    """How a training example is drawn at random from an image.

    Attributes:
        crop: height and width of the example, in pixels.
        scale: smallest and largest factor, relative to the original image; the factor is drawn uniformly.
        rotate: half of the examples are rotated, by an angle drawn uniformly in [-rotate, rotate] degrees.
        blur: half of the examples get a 5x5 Gaussian blur.
        mirror: half of the examples have left and right swapped.
        fill: color of pixels outside the image, RGB 0..255: the network's mean color.
        colors: how colors are changed; None: they stay as they are.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    rotate: float = 10.0
    blur: bool = True
    mirror: bool = True
    fill: tuple[int, int, int] = (124, 116, 104)
    colors: Colors | None = None

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise RecipeError(
                f"The crop {self.crop} is too small. Its height and width must be at least 1 pixel."
            )
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise RecipeError(
                f"The scale factors {self.scale} are not valid. Give the smallest and the largest, both above 0."
            )
        if not 0 <= self.rotate < math.inf:
            raise RecipeError(f"The largest rotation, {self.rotate} degrees, is not valid. Give 0 or more.")


def crop_to_source(
    size: tuple[int, int],
    scaled: tuple[int, int],
    *,
    angle: float,
    mirror: bool,
    offset: tuple[int, int],
) -> np.ndarray:
    """The affine map from pixel centers (x, y) of the crop to those of the source image, float64 [2, 3].

    Args:
        size: height and width of the source.
        scaled: height and width after scaling.
        angle: rotation of the scaled image about its center in degrees, counter-clockwise; the size stays the same.
        mirror: the rotated image is mirrored left to right.
        offset: row and column of the crop's corner in the mirrored image; negative if the crop is padded.
    """
    (height, width), (scaled_height, scaled_width) = size, scaled
    to_scaled = np.array([[1.0, 0.0, offset[1]], [0.0, 1.0, offset[0]], [0.0, 0.0, 1.0]])
    unmirror = np.eye(3)
    if mirror:
        unmirror[0] = [-1.0, 0.0, scaled_width - 1.0]
    center_x, center_y = (scaled_width - 1) / 2, (scaled_height - 1) / 2
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    unrotate = np.array(
        [
            [cosine, -sine, center_x - cosine * center_x + sine * center_y],
            [sine, cosine, center_y - sine * center_x - cosine * center_y],
            [0.0, 0.0, 1.0],
        ]
    )
    factor_x, factor_y = width / scaled_width, height / scaled_height
    # Pixel centers are at half-integers of the plane, as in all resizing of OpenCV and PyTorch.
    unscale = np.array(
        [[factor_x, 0.0, factor_x / 2 - 0.5], [0.0, factor_y, factor_y / 2 - 0.5], [0.0, 0.0, 1.0]]
    )
    return (unscale @ unrotate @ unmirror @ to_scaled)[:2]


@dataclass(frozen=True)
class Draw:
    """What was drawn for one example.

    Attributes:
        matrix: affine map from the crop's pixel centers to those of the source, float64 [2, 3].
        canvas: rows and columns of the crop in which the scaled image lies; everything outside is padding, even if
            corners of the rotated image reach into it.
        blurs: whether the example is blurred.
    """

    matrix: np.ndarray
    canvas: tuple[slice, slice]
    blurs: bool


def draw(size: tuple[int, int], how: Augmentation, *, generator: np.random.Generator) -> Draw:
    """How an example is cut out of an image of this size; each call takes equally many draws."""
    height, width = size
    factor, angle_draw, row_draw, column_draw = generator.random(4)
    rotates, blurs, mirrors = generator.random(3) < 0.5
    scale = how.scale[0] + factor * (how.scale[1] - how.scale[0])
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    angle = (2 * angle_draw - 1) * how.rotate if rotates else 0.0
    offset = _offset(scaled[0], how.crop[0], row_draw), _offset(scaled[1], how.crop[1], column_draw)
    matrix = crop_to_source(size, scaled, angle=angle, mirror=bool(mirrors and how.mirror), offset=offset)
    top, left = max(0, -offset[0]), max(0, -offset[1])
    canvas = slice(top, min(top + scaled[0], how.crop[0])), slice(left, min(left + scaled[1], how.crop[1]))
    return Draw(matrix, canvas, bool(blurs and how.blur))


def augment(
    image: np.ndarray, label: np.ndarray, how: Augmentation, *, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one training example.

    Args:
        image: uint8 [H, W, 3].
        label: uint8 [H, W], 255 = not labeled; or several maps that move alike, [H, W, n].
        generator: all randomness; every call takes the same number of draws.

    Returns:
        Image uint8 [h, w, 3], resampled bilinearly, and label uint8 [h, w], nearest neighbor, of size `how.crop`.
        Outside the image they are `how.fill` and 255.
    """
    height, width = label.shape[:2]
    drawn = draw((height, width), how, generator=generator)
    cropped = move_image(image, drawn, how)
    if label.ndim == 2:
        moved = move_label(label, drawn, how)
    else:  # one by one: OpenCV rounds places otherwise for several channels
        moved = np.dstack([move_label(label[..., k], drawn, how) for k in range(label.shape[2])])
    if how.colors is not None:
        inside = inside_of((height, width), drawn, how)
        cropped = change_colors(cropped, how.colors, drawn, inside=inside, generator=generator)
    return cropped, moved


def move_image(image: np.ndarray, drawn: Draw, how: Augmentation) -> np.ndarray:
    """The crop that was drawn of an image, uint8 [h, w, 3]; `how.fill` outside of the image."""
    cropped = _warp(image, drawn.matrix, how)
    _fill_beyond(cropped, drawn.canvas, how.fill)
    if drawn.blurs:  # the padding is not blurred into the image
        cropped[drawn.canvas] = cv2.GaussianBlur(cropped[drawn.canvas], BLUR_KERNEL, 0)
    return cropped


def move_label(label: np.ndarray, drawn: Draw, how: Augmentation) -> np.ndarray:
    """The crop that was drawn of a label map, uint8 [h, w]; 255 outside of the image."""
    moved = cv2.warpAffine(
        label,
        drawn.matrix,
        (how.crop[1], how.crop[0]),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=IGNORE,
    )
    _fill_beyond(moved, drawn.canvas, IGNORE)
    return moved


def inside_of(size: tuple[int, int], drawn: Draw, how: Augmentation) -> np.ndarray:
    """Where the crop shows the image of this height and width, bool [h, w]; False on padding."""
    return move_label(np.zeros(size, np.uint8), drawn, how) != IGNORE


def change_colors(
    crop: np.ndarray, colors: Colors, drawn: Draw, *, inside: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """The crop with other colors; the padding keeps its color, and the canvas alone is recolored."""
    changed = crop.copy()
    changed[drawn.canvas] = recolor(crop[drawn.canvas], colors, generator=generator)
    changed[~inside] = crop[~inside]
    return changed


def _fill_beyond(crop: np.ndarray, canvas: tuple[slice, slice], value: int | tuple[int, int, int]) -> None:
    rows, columns = canvas
    for beyond in (
        np.s_[: rows.start],
        np.s_[rows.stop :],
        np.s_[:, : columns.start],
        np.s_[:, columns.stop :],
    ):
        crop[beyond] = value


def _warp(image: np.ndarray, matrix: np.ndarray, how: Augmentation) -> np.ndarray:
    """The crop of the image, uint8 [h, w, 3], resampled bilinearly from the part that it shows.

    OpenCV warps four channels over twice as fast as three (docs/performance.md).
    """
    height, width = how.crop
    corners = matrix @ np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1], [1, 1, 1, 1]])
    lowest, highest = np.floor(corners.min(axis=1)), np.ceil(corners.max(axis=1))
    left, top = (int(x) for x in np.clip(lowest - 2, 0, [image.shape[1] - 1, image.shape[0] - 1]))
    right, bottom = (int(x) for x in np.clip(highest + 3, [left + 1, top + 1], image.shape[1::-1]))
    # Repeat the edge pixels once, so that their outer halves are not mixed with the fill color (a resize does the same).
    # If the cut is not at the image's edge, the repeated pixels are outside of what the crop shows.
    with_fourth = cv2.cvtColor(image[top:bottom, left:right], cv2.COLOR_RGB2RGBA)
    source = cv2.copyMakeBorder(with_fourth, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    inner = matrix.copy()
    inner[:, 2] += 1 - left, 1 - top
    cropped = cv2.warpAffine(
        source,
        inner,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(*how.fill, 0),
    )
    return cv2.cvtColor(cropped, cv2.COLOR_RGBA2RGB)


def _offset(scaled: int, crop: int, draw: float) -> int:
    """Where the crop begins: drawn uniformly if there is room; otherwise centered, so negative."""
    room = scaled - crop
    return int(draw * (room + 1)) if room >= 0 else -((-room) // 2)
