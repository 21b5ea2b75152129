"""Image files → pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from darseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PNG_COLORS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}

STEP_16_BIT = 257
"""65535 / 255: 16-bit values are divided by this and rounded."""

# What OpenCV says of broken files on standard error, our errors say with path and remedy.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3], RGB.

    JPEG, PNG, BMP, TIFF (its first page) and WebP; grey becomes three equal channels, alpha is left out, 16-bit
    values v become round(v / 257). Orientation marks of cameras (EXIF) are not followed: they would turn the image but
    not its label. Raises DataError where it is missing, cannot be decoded, or holds anything but 8- or 16-bit values.
    """
    data = read_bytes(path)
    check_complete(path, data)
    # Faster where there are 8 bits; of 16 it would cut off the lower byte.
    eight_bits = data[24] <= 8 if is_png(data) else data.startswith(b"\xff\xd8")
    flags = cv2.IMREAD_COLOR if eight_bits else cv2.IMREAD_UNCHANGED
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # an empty file, among others
        image = None
    if image is None:
        raise DataError(
            f"{path}: cannot be decoded as an image ({', '.join(IMAGE_SUFFIXES)}). Remove it from the list or "
            "replace it."
        )
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + STEP_16_BIT // 2) // STEP_16_BIT).astype(np.uint8)
    channels = 1 if image.ndim == 2 else image.shape[2]
    if image.dtype != np.uint8 or channels not in (1, 3, 4):
        raise DataError(
            f"{path}: found {channels} channels of {image.dtype}, wanted grey or RGB of 8 or 16 bits. Convert it first."
        )
    conversions = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    return cv2.cvtColor(image, conversions[channels])


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file."""
    image = read_image(path)
    return image.shape[0], image.shape[1]


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises DataError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the list and the folders in the recipe.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def check_complete(path: Path, data: bytes) -> None:
    """Raise DataError where a JPEG or PNG lacks its end mark: decoders fill the missing part with grey in silence."""
    if not _complete(data):
        raise DataError(f"{path}: the file is truncated ({len(data)} bytes). Copy or download it again.")


def _complete(data: bytes) -> bool:
    if is_png(data):
        return b"IEND" in data
    if not data.startswith(b"\xff\xd8"):
        return True
    # Segments before the scan may hold a whole thumbnail, end mark included; after the picture cameras add more.
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(b"\xff\xd9", at) >= 0
