"""Image files → pixels."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.data.files import read_file
from darseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGB with alpha"}

JPEG_MARK = b"\xff\xd8"
TIFF_MARKS = (b"II*\0", b"MM\0*")
PICTURE_MARKS = (JPEG_MARK, b"\x89PNG", b"BM", *TIFF_MARKS, b"II+\0", b"MM\0+")
"""Beginnings of the files that are decoded; WebP has its name after a length. OpenCV knows more formats."""

PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
"""Those that files of IMAGE_SUFFIXES may hold. Pillow would also give PostScript to Ghostscript, which runs it."""

BITS_PER_SAMPLE, ORIENTATION = 258, 274
"""TIFF tags."""

STEP_16_BIT = 257
"""65535 / 255: 16-bit values are divided by this and rounded."""

# Our errors report broken files with path and remedy, so OpenCV need not report them on standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """An image file as uint8 [H, W, 3], RGB.

    Reads JPEG, PNG, BMP, TIFF (its first page) and WebP. Gray becomes three equal channels, alpha is dropped, and 16-bit
    values v become round(v / 257). Orientation marks of cameras (EXIF) are ignored, because they would turn the image
    but not its label.

    Raises DataError if the file is missing, cannot be decoded, or holds values of other than 8 or 16 bits.
    """
    path = Path(path)
    data = read_whole(path)
    if data.startswith(TIFF_MARKS) and (small := _small_tiff(path, data)) is not None:
        return small
    # IMREAD_COLOR is faster, but drops the lower byte of 16-bit values.
    eight_bits = data[24] <= 8 if is_png(data) else data.startswith(JPEG_MARK)
    flags = cv2.IMREAD_COLOR if eight_bits else cv2.IMREAD_UNCHANGED
    try:
        image = (
            cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
            if is_picture(data)
            else None
        )
    except cv2.error:  # an empty file, among others
        image = None
    if image is None:
        raise DataError(
            f"{path}: this file cannot be decoded as an image ({', '.join(IMAGE_SUFFIXES)}). Replace or remove it."
        )
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + STEP_16_BIT // 2) // STEP_16_BIT).astype(np.uint8)
    channels = 1 if image.ndim == 2 else image.shape[2]
    if image.dtype != np.uint8 or channels not in (1, 3, 4):
        raise DataError(
            f"{path}: this image has {channels} channel(s) of type {image.dtype}. Convert it to gray or RGB of 8 or 16 "
            "bits."
        )
    conversions = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    # It has that type already; only type checkers do not know.
    return cv2.cvtColor(image, conversions[channels]).astype(np.uint8, copy=False)


def _small_tiff(path: Path, data: bytes) -> NDArray[np.uint8] | None:
    """A TIFF of at most 8 bits, whose colors OpenCV would multiply with its alpha; None for other TIFFs."""
    try:
        image, bits = open_with_pillow(data)
    except Exception:  # OpenCV reads more kinds, or reports the same fault
        return None
    if bits > 8 or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
        return None
    try:
        return np.ascontiguousarray(image.convert("RGB"))
    except Exception as error:
        raise DataError(
            f"{path}: this file cannot be decoded ({error}). Copy or download it again."
        ) from None


def open_with_pillow(data: bytes) -> tuple[Image.Image, int]:
    """An image, not decoded yet, and the bits of its values, 8 for other formats than TIFF.

    Pillow may raise any error.
    """
    image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
    return image, max(
        getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8 if image.format != "TIFF" else 1,))
    )


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file."""
    image = read_image(path)
    return image.shape[0], image.shape[1]


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises DataError if it cannot be read."""
    try:
        return read_file(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: this file does not exist. Check the list and the folders in the recipe."
        ) from None
    except OSError as error:
        remedy = "Check its permissions." if isinstance(error, PermissionError) else "Replace or remove it."
        raise DataError(f"{path}: this file cannot be read ({error.strerror or error}). {remedy}") from error


def read_whole(path: Path) -> bytes:
    """The content of an image or label file, without a TIFF's orientation mark.

    Raises DataError if the file cannot be read, is cut off, or is damaged according to a checksum in it.
    """
    data = read_bytes(path)
    check_complete(path, data)
    return _unturned(data) if data.startswith(TIFF_MARKS) else data


def _unturned(tiff: bytes) -> bytes:
    """The TIFF with its orientation mark, which some decoders follow, set to 1 (not turned)."""
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    first = number(4, 4) + 2
    for at in range(first, first + 12 * number(first - 2, 2), 12):
        if number(at, 2) == ORIENTATION:
            return tiff[: at + 8] + (1).to_bytes(2, order) + tiff[at + 10 :]
    return tiff


def is_picture(data: bytes) -> bool:
    """Whether a file begins as one of the formats of IMAGE_SUFFIXES; its own suffix does not matter."""
    return data.startswith(PICTURE_MARKS) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def check_complete(path: Path, data: bytes) -> None:
    """Raise DataError if a JPEG or PNG is cut off, or if a PNG's checksum is wrong.

    Decoders silently fill what is cut off with gray, and not all of them compare checksums.
    """
    if is_png(data):
        kind, at, view = b"", 8, memoryview(data)
        while kind != b"IEND" and at < len(data):
            kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
            damaged = zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big")
            # Chunks whose names begin with a lower-case letter are not needed to decode the image.
            if end <= len(data) and ((damaged and kind[:1].isupper()) or (at == 8 and kind != b"IHDR")):
                raise DataError(f"{path}: this file is damaged. Copy or download it again.")
            at = end
        whole = kind == b"IEND" and at <= len(data)
    else:
        whole = not data.startswith(JPEG_MARK) or _ends(data)
    if not whole:
        raise DataError(f"{path}: this file is cut off after {len(data)} bytes. Copy or download it again.")


def _ends(jpeg: bytes) -> bool:
    """Whether a JPEG has its end mark."""
    # Segments before the scan may hold a whole thumbnail with an end mark. Cameras add more data after the picture.
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg.find(b"\xff\xd9", at) >= 0


def shrink(values: np.ndarray, side: int, interpolation: int) -> np.ndarray:
    """The image or map, scaled down if its long side has more than `side` pixels."""
    height, width = values.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return values
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(values, size, interpolation=interpolation)
