"""Orientation marks: how a picture's stored pixels have to be turned so that it stands upright."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from darseg.data.files import open_file

Order = Literal["little", "big"]

UPRIGHT = 1
"""The mark of a picture that is stored as it is to be seen; also what a file without a mark means."""

ORIENTATION = 274
"""The tag of EXIF and TIFF that holds the mark (EXIF 2.32, section 4.6.4)."""

TURNED_MARKS = frozenset({5, 6, 7, 8})
"""Marks that exchange height and width."""

TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "flipped",
    5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees",
    7: "mirrored and turned by 90 degrees",
    8: "turned by 90 degrees",
}

MOST_TEXT = 1 << 18
"""Bytes of a text in a PNG that may hold an EXIF block: less than 64 KB, in two digits a byte."""

MOST_ENTRIES = 4096
"""Entries of a TIFF directory that are looked at; real ones have a few dozen."""


@dataclass(frozen=True)
class MarkedLabels:
    """Labeled images with an orientation mark, by which picture their label maps have the size of.

    Attributes:
        upright, stored: only the upright picture's, or only the stored one's.
        both: both have the same size: turned by 180 degrees, mirrored, or square.
    """

    upright: int = 0
    stored: int = 0
    both: int = 0

    @property
    def say_stored(self) -> bool:
        """Whether more label maps fit the stored pictures."""
        return self.stored > self.upright


def orientation_mark(source: Path | bytes) -> int:
    """The orientation mark of an image file, 1 to 8; 1 if it has none, or if the file cannot be read.

    Reads EXIF in JPEG, PNG and WebP, and the tag of TIFF and BigTIFF. Only headers are read, no pixels.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            mark = _mark(file)
    except (OSError, OverflowError, ValueError, zlib.error):
        return UPRIGHT
    return mark if mark in TURNS else UPRIGHT


def upright_size(size: tuple[int, ...], mark: int) -> tuple[int, ...]:
    """Height and width of the picture once it stands upright."""
    return (size[1], size[0]) if mark in TURNED_MARKS else (size[0], size[1])


def turn_upright(pixels: np.ndarray, mark: int) -> np.ndarray:
    """The stored pixels [H, W] or [H, W, C], turned as their mark says."""
    match mark:
        case 2:
            pixels = pixels[:, ::-1]
        case 3:
            pixels = pixels[::-1, ::-1]
        case 4:
            pixels = pixels[::-1]
        case 5:
            pixels = pixels.swapaxes(0, 1)
        case 6:
            pixels = pixels[::-1].swapaxes(0, 1)
        case 7:
            pixels = pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            pixels = pixels[:, ::-1].swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _mark(file: BinaryIO) -> int | None:
    begin = file.read(12)
    if begin.startswith(b"\xff\xd8"):
        return _jpeg(file)
    if begin.startswith(b"\x89PNG"):
        return _chunks(file, 8, "png")
    if begin.startswith(b"RIFF") and begin[8:] == b"WEBP":
        return _chunks(file, 12, "webp")
    if begin.startswith((b"II", b"MM")):
        return _tiff(file, 0)
    return None


def _jpeg(file: BinaryIO) -> int | None:
    """The mark in the first EXIF segment (APP1) before the scan."""
    at = 2
    while True:
        file.seek(at)
        head = file.read(10)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xD9):
            return None
        if head[1] == 0xFF:  # a fill byte
            at += 1
        elif head[1] == 0xE1 and head[4:10] == b"Exif\0\0":
            return _tiff(file, at + 10)
        else:
            at += 2 + int.from_bytes(head[2:4], "big")


def _chunks(file: BinaryIO, at: int, kind: Literal["png", "webp"]) -> int | None:
    """The mark in the EXIF chunk of a PNG or WebP file, which may stand after the pixels."""
    while True:
        file.seek(at)
        head = file.read(14)
        if len(head) < 8:
            return None
        if kind == "png":
            name, length, extra = head[4:8], int.from_bytes(head[:4], "big"), 12
        else:
            name, length, extra = head[:4], int.from_bytes(head[4:8], "little"), 8
        if name in (b"eXIf", b"EXIF"):
            return _tiff(file, at + 8 + (6 if head[8:14] == b"Exif\0\0" else 0))
        if name in (b"tEXt", b"zTXt") and length <= MOST_TEXT:
            file.seek(at + 8)
            if exif := _exif_of_text(file.read(length), packed=name == b"zTXt"):
                return _tiff(io.BytesIO(exif), 0)
        at += extra + length + (length & 1 if kind == "webp" else 0)


def _exif_of_text(chunk: bytes, *, packed: bool) -> bytes | None:
    """The EXIF block that older versions of ImageMagick wrote as hexadecimal digits, if it is one."""
    keyword, _, text = chunk.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return None
    if packed:
        text = zlib.decompressobj().decompress(text[1:], 2 * MOST_TEXT)
    profile = bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    return profile[6:] if profile.startswith(b"Exif\0\0") else None


def _tiff(file: BinaryIO, base: int) -> int | None:
    """The mark in the first directory of a TIFF, a BigTIFF or an EXIF block that begins at `base`."""
    file.seek(base)
    head = file.read(16)
    order: Order = "little" if head.startswith(b"II") else "big"

    def number(data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    big = number(head, 2, 2) == 43
    size, wide = (20, 8) if big else (12, 4)
    first = number(head, 8, 8) if big else number(head, 4, 4)
    file.seek(base + first)
    count = min(number(file.read(8 if big else 2), 0, 8 if big else 2), MOST_ENTRIES)
    entries = file.read(count * size)
    for at in range(0, len(entries) - size + 1, size):
        if number(entries, at, 2) == ORIENTATION:
            # Some programs write the mark as a long or a byte instead of a short.
            width = {1: 1, 3: 2, 4: 4}.get(number(entries, at + 2, 2))
            return number(entries, at + 4 + wide, width) if width else None
    return None
