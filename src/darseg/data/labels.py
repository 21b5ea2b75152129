"""Label files → classes uint8 [H, W]: index, palette and color images, and SBD's .mat files."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.choices import LabelFormat
from darseg.data.advice import MOST_LISTED, color_advice, list_counts, pixel_count
from darseg.data.classes import IGNORE
from darseg.data.encoding import AS_DRAWN, NEAREST, PLAIN, RGB, LabelEncoding
from darseg.data.images import (
    JPEG_MARK,
    MOST_PIXELS,
    PNG_COLORS,
    check_pixels,
    is_png,
    open_with_pillow,
    read_bytes,
    read_whole,
)
from darseg.data.tables import (
    LARGEST,
    TRANSPARENT,
    UNKNOWN,
    classes_by_color,
    color_table,
    nearest_classes,
    of_transparent,
    value_table,
)
from darseg.data.tiff import TIFF_MARKS, Raster, read_tiff
from darseg.errors import DataError

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".mat")

ONE_CHANNEL = ("1", "L", "P", "I;16", "I;16B", "I", "LA")
"""Pillow's modes of images with one channel of values; LA has transparency with it."""

LARGEST_MAT = 1 << 28  # bytes of a part unpacked
MAT_COMPRESSED = 15
"""Kind of a compressed part of a .mat file (miCOMPRESSED)."""


def read_label(
    path: Path | str, encoding: LabelEncoding = PLAIN, max_pixels: int = MOST_PIXELS
) -> NDArray[np.uint8]:
    """A label file as uint8 [H, W] of classes, 255 = not labeled.

    Reads PNG, BMP, GIF and TIFF (one channel of values from 0 to 65535, palette or color) and SBD's .mat files. A pixel
    whose alpha is 0 is not labeled. An orientation mark of the label file itself is not followed. If the values are the
    classes (`encoding.values` is None), they are not compared with the number of classes; `unknown_values` does that.

    Raises DataError if the file is missing, cannot be decoded, or holds values or colors that are not classes.
    """
    path = Path(path)
    encoding = encoding.for_file(path)
    return raw_classes(read_raw(path, encoding.format, max_pixels), encoding, path)


@dataclass(frozen=True)
class RawLabel:
    """What a label file holds, before values or colors become classes.

    Attributes:
        values: uint8 or uint16 [H, W], or colors int32 [H, W] (R·65536 + G·256 + B). The values of a file with an alpha
            channel are int16; transparent values and colors are TRANSPARENT.
        palette: the colors of the values, if the file has a palette.
        alpha: uint8 [H, W], if the file has an alpha channel.
        drawn: with alpha, the values or colors as if nothing were transparent.
    """

    values: np.ndarray
    palette: tuple[RGB, ...] = ()
    alpha: NDArray[np.uint8] | None = None
    drawn: np.ndarray | None = None


def decode_label(path: Path, format: LabelFormat, max_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The values or colors of a label file (`RawLabel.values`); arguments as for `read_raw`."""
    return read_raw(path, format, max_pixels).values


def read_raw(path: Path, format: LabelFormat, max_pixels: int = MOST_PIXELS) -> RawLabel:
    """What a label file holds.

    Args:
        format: as in `LabelEncoding`.
        max_pixels: larger maps are refused.
    """
    if path.suffix.lower() == ".mat":
        return RawLabel(_sbd(path, read_bytes(path)))
    data = read_whole(path)
    if data.startswith(JPEG_MARK):
        raise DataError(
            f"{path}: this file is a JPEG, whose compression changes label values. Use the original label map, saved as "
            "PNG."
        )
    if data.startswith(TIFF_MARKS):
        return _tiff(path, read_tiff(path, data, max_pixels), format)
    check_pixels(path, data, max_pixels)
    if is_png(data):
        depth, kind = data[24], PNG_COLORS.get(data[25], "unknown")
        if kind == "gray" and format != "color":
            return RawLabel(_unstretched(_decode_gray(path, data), depth))
        if depth == 16 and kind != "gray":
            raise DataError(
                f"{path}: this file is a 16-bit {kind} PNG. A 16-bit label map must have a single channel of values."
            )
    try:
        image = open_with_pillow(data)
        frames = getattr(image, "n_frames", 1)
        image.load()
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        raise DataError(
            f"{path}: this file cannot be decoded as a label map ({error}). Give a PNG, BMP, GIF or TIFF file, or one of "
            "SBD's .mat files."
        ) from None
    if frames > 1:
        raise _several_pages(path, frames)
    return _of_picture(path, image, format)


def _several_pages(path: Path, count: int) -> DataError:
    return DataError(
        f"{path}: this file has {count} pages or frames, and a label map is a single one. Save the page that holds the "
        "classes as PNG; if each page marks one class, save each as a file (data.label_parts joins them)."
    )


def _of_picture(path: Path, image: Image.Image, format: LabelFormat) -> RawLabel:
    """The values or colors of an image that Pillow has decoded."""
    if image.mode == "P" and format == "color":
        image.info.pop("transparency", None)
        image = image.convert("RGB")
    return _one_channel(path, image, format) if image.mode in ONE_CHANNEL else _colors(path, image, format)


def _tiff(path: Path, raster: Raster, format: LabelFormat) -> RawLabel:
    """The values or colors of a TIFF."""
    if raster.pages > 1:
        raise _several_pages(path, raster.pages)
    if raster.lossy:
        raise DataError(
            f"{path}: the pixels of this TIFF are compressed as {raster.lossy}, which changes label values. Use the "
            "original label map, saved without loss (for example with LZW or Deflate)."
        )
    if raster.color in ("RGB", "palette") and raster.bits > 8:
        raise DataError(
            f"{path}: the label map has colors of {raster.bits} bits. Only a label map with a single channel may have 16 "
            "bits."
        )
    if raster.color == "RGB" and raster.values.shape[2] in (3, 4):
        return _colors(path, Image.fromarray(raster.values), format)
    if raster.bands != 1 or raster.color not in ("gray", "white is zero", "palette"):
        raise DataError(
            f"{path}: this TIFF has {raster.bands} bands of the kind {raster.color}. A label map has one band of values, "
            "palette indices, or RGB colors."
        )
    values = raster.values[..., 0]
    if raster.palette is not None and format == "color":
        padded = np.zeros((2**raster.bits, 3), np.uint8)
        padded[: len(raster.palette)] = raster.palette
        return _colors(path, Image.fromarray(padded[values]), format)
    if format == "color":
        raise DataError(ONE_CHANNEL_FOR_COLORS.format(path=path))
    alpha = None if raster.alpha is None else raster.values[..., raster.alpha]
    if raster.color == "white is zero" and raster.bits == 1:
        values = 1 - values  # drawn masks; of more bits it says how values are displayed, as GDAL has it
    if alpha is None:
        palette = () if raster.palette is None else tuple(map(tuple, raster.palette.tolist()))
        return RawLabel(_whole_numbers(path, values, raster.nodata, transparent=None), palette)
    marked = _whole_numbers(path, values, raster.nodata, transparent=alpha == 0)
    drawn = _whole_numbers(path, values, raster.nodata, transparent=None)
    eight_bits = np.where(alpha == 0, 0, np.where(alpha == alpha.max(), 255, 128)).astype(np.uint8)
    return RawLabel(marked, alpha=eight_bits, drawn=drawn)


def _whole_numbers(
    path: Path, values: np.ndarray, nodata: float | None, *, transparent: np.ndarray | None
) -> np.ndarray:
    """Values of any type as uint8 or uint16; as int16 or int64 with TRANSPARENT if any are not labeled.

    Not labeled are transparent pixels, what is not a number, and `nodata` if it cannot be the value of a class.
    """
    if values.dtype == np.uint8 and transparent is None:
        return np.ascontiguousarray(values)
    empty = np.zeros(values.shape, bool) if transparent is None else transparent
    if values.dtype.kind == "f":
        empty = empty | np.isnan(values)
    if nodata is not None and not (0 <= nodata <= LARGEST):
        empty = empty | (values == values.dtype.type(nodata))
    kept = values[~empty] if empty.any() else values
    if kept.size and (kept.min() < 0 or kept.max() > LARGEST):
        raise DataError(
            f"{path}: the values are {kept.min():g} to {kept.max():g}. Label values must be between 0 and {LARGEST}."
        )
    if values.dtype.kind == "f" and kept.size and not (kept == np.floor(kept)).all():
        raise DataError(
            f"{path}: the values are no whole numbers, for example {kept[kept != np.floor(kept)][0]:g}. This looks like "
            "scores or heights, not a label map."
        )
    if not empty.any():
        return values.astype(np.uint8 if values.dtype == np.uint8 else np.uint16, copy=False)
    numbers = np.where(empty, 0, values).astype(np.int64)
    return np.where(empty, TRANSPARENT, numbers).astype(np.int16 if numbers.max() < 2**15 else np.int64)


def _unstretched(values: np.ndarray, bits: int) -> np.ndarray:
    """Decoders stretch values of 1, 2 and 4 bits to 0..255, so that class 1 would become 255. Undo that."""
    return values // np.uint8(255 // (2**bits - 1)) if bits < 8 else values


def _decode_gray(path: Path, data: bytes) -> np.ndarray:
    """The values of a gray PNG, uint8 or uint16 [H, W]; OpenCV is faster than Pillow."""
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    if values is None or values.ndim != 2:
        raise DataError(f"{path}: this PNG cannot be decoded. Replace or remove it.")
    return values


ONE_CHANNEL_FOR_COLORS = (
    "{path}: the label map has one channel of values, but data.label_format is color. "
    "Set it to index or auto."
)


def _one_channel(path: Path, image: Image.Image, format: LabelFormat) -> RawLabel:
    """The values, or palette indices, of an image of one of the modes ONE_CHANNEL."""
    if format == "color":
        raise DataError(ONE_CHANNEL_FOR_COLORS.format(path=path))
    if image.mode == "1":
        return RawLabel(np.asarray(image).astype(np.uint8))
    values = np.asarray(image)
    if image.mode == "P":
        flat = image.getpalette("RGB") or []
        return RawLabel(values, palette=tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=False)))
    if image.mode == "L":
        return RawLabel(values)
    if image.mode == "LA":
        values, alpha = np.moveaxis(values, 2, 0)
        return _with_alpha(values, alpha)
    if values.min() < 0 or values.max() > LARGEST:
        raise DataError(
            f"{path}: the values are {values.min()} to {values.max()}. Label values must be between 0 and {LARGEST}."
        )
    return RawLabel(values.astype(np.uint16))


def _with_alpha(drawn: np.ndarray, alpha: np.ndarray) -> RawLabel:
    """A label of an alpha channel: transparent pixels become TRANSPARENT."""
    marked = np.where(alpha == 0, np.array(TRANSPARENT, np.result_type(drawn, np.int16)), drawn)
    return RawLabel(marked, alpha=np.ascontiguousarray(alpha), drawn=np.ascontiguousarray(drawn))


def _colors(path: Path, image: Image.Image, format: LabelFormat) -> RawLabel:
    """The colors of an RGB or RGBA image, int32 [H, W]; for the format "index" its three equal channels."""
    if image.mode not in ("RGB", "RGBA"):
        raise DataError(
            f"{path}: the pixels have Pillow's mode {image.mode}. A label map has values, palette indices or RGB colors."
        )
    pixels = np.asarray(image)
    alpha = pixels[..., 3] if image.mode == "RGBA" else None
    if format == "index":
        if not (pixels[..., 0] == pixels[..., 1]).all() or not (pixels[..., 0] == pixels[..., 2]).all():
            raise DataError(
                f"{path}: the label map has colors, but data.label_format is index. Set it to color and give the "
                "classes their colors (data.classes: {name: [red, green, blue]})."
            )
        values = pixels[..., 0]
        return RawLabel(values) if alpha is None else _with_alpha(values, alpha)
    keys = pixels[..., 0].astype(np.int32)
    for channel in (1, 2):
        keys <<= 8
        keys |= pixels[..., channel]
    return RawLabel(keys) if alpha is None else _with_alpha(keys, alpha)


def _sbd(path: Path, data: bytes) -> np.ndarray:
    """The class map of SBD (Hariharan et al., ICCV 2011): struct GTcls, field Segmentation."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f'{path}: reading .mat files needs scipy ({error}). Install it: pip install "darseg[sbd]".'
        ) from error
    try:
        _check_mat(data)
        classes: Any = loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
        if classes.ndim != 2 or classes.dtype.kind not in "ui" or classes.min() < 0 or classes.max() > IGNORE:
            raise ValueError(f"{classes.dtype} of shape {classes.shape}")
    except Exception as error:  # scipy's reader fails in many ways on damaged files
        raise DataError(
            f"{path}: no class map of SBD (GTcls.Segmentation) can be read from this file "
            f"({type(error).__name__}: {error}). Use the files in benchmark_RELEASE/dataset/cls, and copy this one again "
            "if it is damaged."
        ) from error
    return np.ascontiguousarray(classes, dtype=np.uint8)


def _check_mat(data: bytes) -> None:
    """Raise an error if a part of a .mat file (MATLAB 5) is cut off or damaged.

    scipy has crashed on such files.
    """
    order: Literal["little", "big"] = "big" if data[126:128] == b"MI" else "little"
    at = 128
    while at < len(data):
        kind, size = (int.from_bytes(data[place : place + 4], order) for place in (at, at + 4))
        part = data[at + 8 : at + 8 + size]
        if len(part) < size:
            raise ValueError("the file is truncated")
        if kind == MAT_COMPRESSED:
            unpacking = zlib.decompressobj()
            size = len(unpacking.decompress(part, LARGEST_MAT))  # compares its checksum
            if unpacking.unconsumed_tail or not unpacking.eof:
                raise ValueError(f"a part of it has more than {size:,} bytes unpacked, or is cut off")
        at += 8 + size


def raw_classes(raw: RawLabel, encoding: LabelEncoding, path: Path) -> NDArray[np.uint8]:
    """Classes uint8 [H, W] of a label file.

    A palette file whose colors number the classes differently than its values is read by color.

    Raises DataError for values and colors that are not classes.
    """
    values = raw.values if encoding.transparent != AS_DRAWN or raw.drawn is None else raw.drawn
    if raw.palette and (table := classes_by_color(raw.palette, values, encoding)) is not None:
        return table[values]
    return to_classes(values, encoding, path)


def to_classes(raw: np.ndarray, encoding: LabelEncoding, path: Path) -> NDArray[np.uint8]:
    """Classes uint8 [H, W] of what `decode_label` returned.

    Raises DataError for values and colors that are not classes.
    """
    if raw.dtype == np.int32:
        if not encoding.colors and encoding.other_color is None:
            raise DataError(
                f"{path}: the label map has colors, but the classes have none. {color_advice(raw)}"
            )
        near = encoding.other_color == NEAREST
        unlisted_class = None if near else encoding.other_color
        classes = color_table(encoding.colors, unlisted_class, of_transparent(encoding))[raw]
        if near and (unlisted := classes == UNKNOWN).any():
            classes[unlisted] = nearest_classes(raw[unlisted], encoding.colors)
    elif raw.dtype == np.uint8 and encoding.values is None:
        if encoding.ignore == IGNORE:
            return raw
        return np.where(raw == encoding.ignore, np.uint8(IGNORE), raw)
    else:
        classes = value_table(encoding)[raw]
    unknown = classes == UNKNOWN
    if not unknown.any():
        return classes.astype(np.uint8)
    colored = raw.dtype == np.int32
    values, counts = np.unique(raw[unknown], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    listed = [
        f"{list(_rgb(int(values[i]))) if colored else values[i]} ({pixel_count(counts[i])})"
        for i in order[:MOST_LISTED]
    ]
    advice = (
        color_advice(raw)
        if colored
        else "Add them to data.label_values (as value: class or value: ignore; other: ignore is for all the rest)."
    )
    raise DataError(
        f"{path}: the label map has {'colors' if colored else 'values'} that belong to no class: "
        f"{list_counts(listed, len(values))}. {advice}"
    )


def _rgb(key: int) -> RGB:
    return key >> 16, key >> 8 & 255, key & 255
