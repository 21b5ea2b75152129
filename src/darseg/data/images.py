"""Image files → pixels, by one rule for all formats (docs/formats.md)."""

from __future__ import annotations

import io
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from darseg.data.decoders import decode_quietly
from darseg.data.files import read_file
from darseg.data.orientation import UPRIGHT, orientation_mark, turn_upright
from darseg.data.scaling import PLAIN_SCALING, Scaling, to_uint8
from darseg.data.tiff import TIFF_MARKS, Raster, read_tiff, tiff_size, too_large
from darseg.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
PNG_COLORS = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGB with alpha"}

JPEG_MARK = b"\xff\xd8"
GIF_MARKS = (b"GIF87a", b"GIF89a")

MOST_PIXELS = 2**30
"""Pixels of a picture that are decoded unless the recipe says otherwise; also OpenCV's own limit."""

HOLE = bytes(32)
"""As many bits as the 63 AC coefficients of a block have if all are small."""

PADDING = 16
"""Superfluous bytes before a JPEG's end mark that some cameras write."""

# Our errors report broken files with path and remedy, so OpenCV need not report them on standard error.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class Reading:
    """How the pixels of image files become RGB of 8 bits.

    Attributes:
        upright: turn pictures as their orientation marks say (EXIF); otherwise they stay as they are stored.
        bands: numbers, from 1 on, of the three bands that become red, green and blue, or of one that becomes gray.
            None: the first three; the first one if there are fewer.
        scaling: which values become black and white, for files of other than 8 bits.
        max_pixels: larger pictures are refused.
    """

    upright: bool = True
    bands: tuple[int, ...] | None = None
    scaling: Scaling = PLAIN_SCALING
    max_pixels: int = MOST_PIXELS


USUAL = Reading()


@dataclass(frozen=True)
class Picture:
    """A decoded image file.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        mark: the file's orientation mark, 1 to 8, whether it was followed or not.
        peak: the largest value of a file of 16 bits, None for all others.
        notes: lines about what of the file is not read, equal for equal causes.
    """

    pixels: NDArray[np.uint8]
    mark: int = UPRIGHT
    peak: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(path: Path | str, reading: Reading = USUAL) -> NDArray[np.uint8]:
    """An image file as uint8 [H, W, 3], RGB; see `read_picture`."""
    return read_picture(Path(path), reading).pixels


def read_picture(path: Path, reading: Reading = USUAL) -> Picture:
    """Decode an image file.

    Reads JPEG, PNG, BMP, TIFF and BigTIFF (the first page), WebP and GIF (the first frame). Gray becomes three equal
    channels, alpha is dropped, and 16-bit values v become round(v / 257). Pictures with an orientation mark are turned
    upright, unless `reading` says otherwise.

    Raises DataError if the file is missing, damaged, too large or cannot be decoded, or if its bands or values are none
    that `reading` covers.
    """
    data = read_whole(path)
    mark = orientation_mark(data)
    if data.startswith(TIFF_MARKS):
        picture = _of_raster(path, read_tiff(path, data, reading.max_pixels), reading)
    else:
        picture = _of_picture(path, data, reading)
    pixels = turn_upright(picture.pixels, mark) if reading.upright and mark != UPRIGHT else picture.pixels
    return replace(picture, pixels=pixels, mark=mark)


def _of_picture(path: Path, data: bytes, reading: Reading) -> Picture:
    """The stored pixels of a file that is no TIFF."""
    if reading.max_pixels != MOST_PIXELS or data.startswith(GIF_MARKS):
        check_pixels(path, data, reading.max_pixels)
    values, notes = _decode(path, data, reading.max_pixels)
    if (
        values.shape[0] * values.shape[1] > reading.max_pixels
    ):  # Pillow does not open the header of a large WebP
        raise too_large(path, values.shape[:2], reading.max_pixels)
    if values.ndim == 2:
        values = values[..., None]
    peak = int(values.max()) if values.dtype == np.uint16 and reading.scaling.white is None else None
    values = to_uint8(values, 8 * values.itemsize, reading.scaling, path=path)
    channels = values.shape[2]
    if values.dtype != np.uint8 or channels not in (1, 3, 4):
        raise DataError(
            f"{path}: this image has {channels} channel(s) of type {values.dtype}. Convert it to gray or RGB of 8 or 16 "
            "bits."
        )
    conversions = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    # It has that type already; only type checkers do not know.
    pixels = cv2.cvtColor(values, conversions[channels]).astype(np.uint8, copy=False)
    if reading.bands is not None:
        _check_bands(path, 3, reading.bands)
        pixels = np.ascontiguousarray(pixels[..., [band - 1 for band in reading.bands]])
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    return Picture(pixels, peak=peak, notes=notes)


def _decode(path: Path, data: bytes, limit: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """What OpenCV makes of a file, in its order of colors, and notes."""
    if data.startswith(GIF_MARKS):
        return _decode_gif(path, data)
    # IMREAD_COLOR is faster, but drops the lower byte of 16-bit values.
    eight_bits = data[24] <= 8 if is_png(data) else data.startswith(JPEG_MARK)
    flags = (cv2.IMREAD_COLOR if eight_bits else cv2.IMREAD_UNCHANGED) | cv2.IMREAD_IGNORE_ORIENTATION

    def decode() -> np.ndarray | None:
        try:
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if is_picture(data) else None
        except cv2.error:  # an empty file, among others
            return None

    image, lines = decode_quietly(decode)
    if image is None:
        # OpenCV has a limit of its own.
        if is_picture(data) and check_pixels(path, data, limit) > MOST_PIXELS:
            return np.ascontiguousarray(load_with_pillow(path, data).convert("RGB"))[..., ::-1], ()
        reason = f": {lines[0].partition(': ')[2]}" if lines else ""
        raise DataError(
            f"{path}: this file cannot be decoded as an image ({', '.join(IMAGE_SUFFIXES)}){reason}. Replace or remove "
            "it."
        )
    if (damage := _damage(data, lines)) is not None:
        raise DataError(
            f"{path}: this JPEG is damaged ({damage}), so a part of the picture is lost. Copy or download it again."
        )
    return image, _notes(data, lines)


def _decode_gif(path: Path, data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    image = load_with_pillow(path, data)
    frames = getattr(image, "n_frames", 1)
    pixels = np.ascontiguousarray(image.convert("RGB"))[..., ::-1]
    notes = ("This GIF is animated; only its first frame is read.",) if frames > 1 else ()
    return np.ascontiguousarray(pixels), notes


EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
HARMLESS = re.compile(r"unknown JFIF|libpng warning|Invalid SOS parameters")


def _damage(data: bytes, lines: list[str]) -> str | None:
    """The line of a decoder that tells of lost pixels."""
    for line in lines:
        if HARMLESS.search(line):
            continue
        if padding := EXTRANEOUS.search(line):
            count, end = int(padding[1]), data.rfind(b"\xff\xd9")
            if count <= PADDING or len(set(data[end - count : end])) == 1:
                continue
        return line.removeprefix("Corrupt JPEG data: ")
    return "a hole of zeros in its data" if data.startswith(JPEG_MARK) and _has_hole(data) else None


def _has_hole(jpeg: bytes) -> bool:
    """Whether the data of a sequential JPEG hold zeros that no picture has.

    Zeros are the code of the first symbol in a table. Unless that ends a block, `HOLE` stands for dozens of equal AC
    coefficients. After it the decoder may find its way back without a word.
    """
    at, first = 2, 0
    while jpeg[at : at + 1] == b"\xff" and (kind := jpeg[at + 1 : at + 2]) not in (b"\xda", b""):
        if kind == b"\xc2":  # progressive
            return False
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        table = at + 4
        while kind == b"\xc4" and table + 17 < end:
            first = jpeg[table + 17] if jpeg[table] == 0x10 else first
            table += 17 + sum(jpeg[table + 1 : table + 17])
        at = end
    # Zeros right before the end mark are padding.
    return first != 0 and HOLE in jpeg[at : jpeg.find(b"\xff\xd9", at)].rstrip(b"\0")


def _notes(data: bytes, lines: list[str]) -> tuple[str, ...]:
    notes = []
    if any(EXTRANEOUS.search(line) for line in lines):
        notes.append(
            "Bytes that belong to no pixel stand before the end of this JPEG; the picture seems whole."
        )
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X" and data[20] & 2:
        notes.append("This WebP is animated; only its first frame is read.")
    return tuple(notes)


def _of_raster(path: Path, raster: Raster, reading: Reading) -> Picture:
    """The stored pixels of a TIFF, with its bands chosen and its values scaled."""
    values, notes = raster.values, []
    if raster.pages > 1:
        notes.append("This TIFF has several pages; only the first is read.")
    if raster.palette is not None or raster.color in ("CMYK", "YCbCr"):
        return Picture(_colored(path, raster), notes=tuple(notes))
    bands = reading.bands or ((1, 2, 3) if raster.bands >= 3 else (1,))
    _check_bands(path, values.shape[2], bands)
    if reading.bands is None and raster.bands > 3:
        notes.append(
            f"This TIFF has {raster.bands} bands; 1, 2 and 3 are read as red, green and blue. Set data.bands to choose "
            "others."
        )
    elif reading.bands is None and raster.bands == 2:
        notes.append("This TIFF has 2 bands; the first is read as gray. Set data.bands to choose the other.")
    if bands != tuple(range(1, values.shape[2] + 1)):
        values = values[..., [band - 1 for band in bands]]
    peak = None
    if values.dtype == np.uint16 and raster.bits == 16 and reading.scaling.white is None:
        peak = int(values.max(initial=0))
    empty = None if raster.nodata is None else (values == raster.nodata).all(axis=2)
    pixels = to_uint8(values, raster.bits, reading.scaling, path=path)
    if raster.color == "white is zero":
        pixels = 255 - pixels
    if empty is not None:
        pixels[empty] = 0
    pixels = np.repeat(pixels, 3, axis=2) if len(bands) == 1 else pixels
    return Picture(pixels, peak=peak, notes=tuple(notes))


def _colored(path: Path, raster: Raster) -> NDArray[np.uint8]:
    """RGB of a palette, of CMYK or of YCbCr."""
    if raster.palette is not None:
        indices = raster.values[..., 0]
        if indices.max(initial=0) >= len(raster.palette):
            raise DataError(
                f"{path}: the palette has {len(raster.palette)} colors, and index {indices.max()} is used. Save it again."
            )
        return raster.palette[indices]
    if raster.values.dtype != np.uint8:
        raise DataError(
            f"{path}: this TIFF is {raster.color} of type {raster.values.dtype}. Convert it to RGB of 8 or 16 bits."
        )
    bands = 4 if raster.color == "CMYK" else 3
    stored = np.ascontiguousarray(raster.values[..., :bands])
    image = Image.frombuffer(raster.color, stored.shape[1::-1], stored.tobytes(), "raw", raster.color, 0, 1)
    return np.array(image.convert("RGB"))


def _check_bands(path: Path, present: int, bands: tuple[int, ...]) -> None:
    if max(bands) > present:
        raise DataError(
            f"{path}: data.bands is {list(bands)}, but this image has {present} band(s). Bands are counted from 1."
        )


def open_with_pillow(data: bytes) -> Image.Image:
    """An image that is no TIFF, not decoded yet. Pillow may raise any error.

    Its own classes are called, since Image.open has a limit of pixels for the whole process, and would give PostScript
    to Ghostscript, which runs it.
    """
    file = io.BytesIO(data)
    if is_png(data):
        return PngImagePlugin.PngImageFile(file)
    if data.startswith(JPEG_MARK):
        return JpegImagePlugin.JpegImageFile(file)
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file)
    if data.startswith(GIF_MARKS):
        return GifImagePlugin.GifImageFile(file)
    if _is_webp(data):
        return WebPImagePlugin.WebPImageFile(file)
    raise ValueError("unknown file type")


def load_with_pillow(path: Path, data: bytes) -> Image.Image:
    """A decoded image that is no TIFF; of several frames the first. Raises DataError."""
    try:
        image = open_with_pillow(data)
        image.load()
        return image
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        raise DataError(
            f"{path}: this file cannot be decoded ({error}). Copy or download it again."
        ) from None


def check_pixels(path: Path, data: bytes, limit: int) -> int:
    """The pixels of an image that is no TIFF, by its header; 0 if that cannot be read.

    Raises DataError above the limit.
    """
    try:
        width, height = open_with_pillow(data).size
    except Exception:
        return 0
    if width * height > limit:
        raise too_large(path, (height, width), limit)
    return width * height


def stored_size(path: Path) -> tuple[int, int] | None:
    """Stored height and width of an image or label file, by its header; None if that cannot be read."""
    try:
        return size_in_header(read_bytes(path))
    except DataError:
        return None


def size_in_header(data: bytes) -> tuple[int, int] | None:
    """Stored height and width of a picture in memory; None if its header cannot be read."""
    try:
        if data.startswith(TIFF_MARKS):
            return tiff_size(data)
        width, height = open_with_pillow(data).size
        return height, width
    except Exception:
        return None


def image_size(path: Path, reading: Reading = USUAL) -> tuple[int, int]:
    """Height and width of an image file, which is decoded for it."""
    return read_picture(path, reading).size


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises DataError if it cannot be read."""
    try:
        return read_file(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(
                f"{path}: this is a link to {os.readlink(path)}, which does not exist. Restore or remove it."
            ) from None
        raise DataError(
            f"{path}: this file does not exist. Check the list and the folders in the recipe."
        ) from None
    except OSError as error:
        remedy = "Check its permissions." if isinstance(error, PermissionError) else "Replace or remove it."
        raise DataError(f"{path}: this file cannot be read ({error.strerror or error}). {remedy}") from error


def read_whole(path: Path) -> bytes:
    """The content of an image or label file.

    Raises DataError if the file cannot be read, is cut off, or is damaged according to a checksum in it.
    """
    data = read_bytes(path)
    check_complete(path, data)
    return data


def is_picture(data: bytes) -> bool:
    """Whether a file begins as one of the formats of IMAGE_SUFFIXES; its own suffix does not matter."""
    marks = (JPEG_MARK, b"\x89PNG", b"BM", *TIFF_MARKS, *GIF_MARKS)
    return data.startswith(marks) or _is_webp(data)


def _is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG")


def check_complete(path: Path, data: bytes) -> None:
    """Raise DataError if a JPEG, PNG or WebP is cut off, or if a PNG's checksum is wrong.

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
    elif _is_webp(data):
        whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
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
