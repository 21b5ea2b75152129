"""Checked values out of annotation files: files, records of JSON, image names, sizes and coordinates.

Messages leave out the place; the caller that reads the record adds it (`Faults.at`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Any, get_args

from darseg import errors
from darseg.data import files
from darseg.data.foreign import foreign_format
from darseg.data.manifest import sample_id
from darseg.errors import DataError

# The largest image that OpenCV reads; also the largest polygon, which is drawn whole before it is cut to the image.
MAX_SIDE = 1 << 20
MAX_PIXELS = 1 << 30

KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def read_file(path: Path) -> bytes:
    """The bytes of an annotation file. Raises DataError if it cannot be read."""
    try:
        return files.read_file(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Give an annotation file, or a folder of them.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error


@dataclass(frozen=True)
class Parsed:
    """The content of a JSON file, and whether it was not UTF-8 and read as Chinese (GB18030)."""

    content: Any
    chinese: bool = False


def parse_json(path: Path, data: bytes) -> Parsed:
    """The content of a JSON file. Raises DataError if it is damaged, or if its encoding is not known."""
    encoding = json.detect_encoding(data)
    try:
        try:
            text, chinese = data.decode(encoding, "surrogatepass"), False
        except UnicodeDecodeError as error:
            text, chinese = _as_chinese(data), True
            if text is None:
                raise DataError(
                    f"{path} is not {encoding.upper()}: byte {error.object[error.start]:#04x} at {error.start} is not "
                    "valid. Old versions of labelme write the encoding of their Windows. Convert the file, as with "
                    "iconv -f GB18030 -t UTF-8 (Chinese) or iconv -f CP1252 -t UTF-8 (western Europe)."
                ) from error
        return Parsed(files.parse_json(text), chinese)
    except ValueError as error:
        if kind := foreign_format(path, data):
            raise DataError(f"{path} is {kind.name}, which is not read. {kind.remedy}.") from None
        raise DataError(f"{path}: the JSON is damaged ({error}). Export or copy the file again.") from error


_WESTERN = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])|[A-Za-z][\x80-\xff]{2}[A-Za-z]")
"""One byte above 127 among others, or two between letters, as accented letters are. Chinese has pairs of them."""


def _as_chinese(data: bytes) -> str | None:
    """GB18030 as text, which includes GBK and GB2312; None if that is not what the bytes look like."""
    if _WESTERN.search(data):
        return None
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError:
        return None


def field(record: Any, key: str, kind: type | UnionType) -> Any:
    """A record's value of a kind, as `int | str`; a bool is none of them. Raises DataError."""
    if not isinstance(record, dict):
        raise DataError(f"found {shortened(record)}, expected an object with {key!r}")
    if key not in record:
        raise DataError(f"{key!r} is missing")
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = " or ".join(KINDS[part] for part in get_args(kind) or (kind,))
        raise DataError(f"{key!r} is {shortened(value)}, expected {expected}")
    return value


def shortened(value: Any) -> str:
    """A value for a message, as JSON: the reader looks for it in a file of JSON."""
    return errors.shortened(value, partial(json.dumps, ensure_ascii=False))


def image_id(name: str) -> str:
    """The id of an image from its name in the file. Raises DataError if the name leads out of the folder."""
    path = PurePosixPath(name)
    absolute = path.is_absolute() or PureWindowsPath(name).drive
    if not path.parts or absolute or ".." in path.parts or {"\\", "\0"} & set(name):
        raise DataError(
            f"the image name {name!r} is not a path below the image folder. Use a relative path with forward slashes and "
            "without '..'"
        )
    return sample_id(path)


def checked_size(height: float, width: float) -> tuple[int, int]:
    """(height, width) of an image in pixels. Raises DataError if no image can have this size."""
    sides = (height, width)
    if not all(1 <= side <= MAX_SIDE and side == int(side) for side in sides) or height * width > MAX_PIXELS:
        raise DataError(
            f"the image size is {height} x {width} (height x width), expected integers from 1 to {MAX_SIDE} and at most "
            f"{MAX_PIXELS} pixels"
        )
    return int(height), int(width)


def check_coordinate(value: Any) -> None:
    """Raise DataError unless the value is a number that can be drawn."""
    # The comparison is false for NaN. Below the bound, int() cannot overflow in OpenCV or pycocotools.
    if type(value) not in (int, float) or not abs(value) <= MAX_SIDE:
        raise DataError(
            f"a coordinate is {shortened(value)}, expected a number from -{MAX_SIDE} to {MAX_SIDE}"
        )


@dataclass(frozen=True)
class Faults:
    """Faults of one image or file, a line each."""

    lines: list[str]

    @contextmanager
    def at(self, where: str) -> Generator[None, None, None]:
        """Turn a DataError of the block into a line that begins with its place, and go on."""
        try:
            yield
        except DataError as error:
            self.lines.append(f"{where}: {error}")
