"""Pictures next to annotation files: which one a labelme file means, and the size of a picture."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from darseg.annotate.records import checked_size, field
from darseg.data.files import read_file
from darseg.data.images import IMAGE_SUFFIXES, stored_size
from darseg.data.orientation import orientation_mark, upright_size
from darseg.errors import DataError

Size = tuple[int, int]


@dataclass(frozen=True)
class Meant:
    """The picture that a labelme file is of.

    Attributes:
        name: its file name; only the part before the suffix matters.
        size: height and width.
        renamed: what imagePath says instead; empty if it says the same.
    """

    name: str
    size: Size
    renamed: str = ""


def picture_size(path: Path) -> Size | None:
    """Height and width of the upright picture; None if there is no picture that can be read."""
    stored = stored_size(path) if path.is_file() else None
    if stored is None:
        return None
    height, width = upright_size(stored, orientation_mark(path))
    return height, width


def meant_picture(path: Path, content: Any) -> Meant:
    """The picture that a labelme file is of, by what it says and by the pictures in its folder.

    imagePath counts if its picture is there, or if none is. If the picture is not there, but one with the name of the
    JSON file is, they were renamed together. If both are there, the embedded picture decides, then the size.

    Raises DataError if that does not decide, or if the size of the picture is not the one in the file.
    """
    # labelme writes the image's path on the annotator's disk, often ../images/x.jpg or with backslashes. Only the name is
    # useful here, together with the JSON file's own folder.
    written = field(content, "imagePath", str)
    name = PureWindowsPath(written).name
    size = _declared_size(content)
    own = _picture_called(path.parent, path.stem)
    if not name or Path(name).stem.casefold() == path.stem.casefold():
        if not name or own is None:
            return Meant(name, _checked(size, _elsewhere(path, written)))
        return Meant(own.name, _checked(size, own))
    named = path.parent / name if (path.parent / name).is_file() else None
    if named is None:
        named = _picture_called(path.parent, Path(name).stem)
    if own is None:
        return Meant(name, _checked(size, named or _elsewhere(path, written)))
    chosen = own if named is None else _more_likely(path, content, (named, own), size=size)
    return Meant(chosen.name, _checked(size, chosen), renamed=name if chosen == own else "")


def _declared_size(content: Any) -> Size | None:
    """The size in the file; None if it holds none, as of old versions."""
    if content.get("imageHeight") is None and content.get("imageWidth") is None:
        return None
    return checked_size(field(content, "imageHeight", int), field(content, "imageWidth", int))


def _picture_called(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for low in IMAGE_SUFFIXES for suffix in (low, low.upper()))
    return next((path for path in paths if path.is_file()), None)


def _elsewhere(path: Path, written: str) -> Path | None:
    """The picture at imagePath as seen from the JSON file, if it is there."""
    picture = path.parent / written.replace("\\", "/")
    return picture if picture.is_file() else None


def _checked(size: Size | None, picture: Path | None) -> Size:
    """The size in the file, or that of the picture. Raises DataError if there is none, or if they differ."""
    actual = picture_size(picture) if picture else None
    if size is None and actual is None:
        raise DataError(
            "'imageHeight' and 'imageWidth' are missing, and the picture is not next to this file, so its size is not "
            "known. Put the picture there, or add both"
        )
    if size is None:
        return checked_size(*actual) if actual else (0, 0)
    if picture and actual and size not in (actual, stored_size(picture)):
        raise DataError(
            f"the file says that the picture has {size[0]} x {size[1]} pixels (height x width), but {picture.name} has "
            f"{actual[0]} x {actual[1]}. Use the picture that was annotated"
        )
    return size


def _more_likely(path: Path, content: Any, pictures: tuple[Path, Path], *, size: Size | None) -> Path:
    """The picture that is embedded in the file, or the only one of its size. Raises DataError."""
    embedded = content.get("imageData")
    if isinstance(embedded, str) and embedded:
        try:
            data = base64.b64decode(embedded)
        except (binascii.Error, ValueError):
            data = b""
        same = [picture for picture in pictures if read_file(picture) == data]
        if len(same) == 1:
            return same[0]
    fitting = [
        picture for picture in pictures if size and size in (picture_size(picture), stored_size(picture))
    ]
    if len(fitting) == 1:
        return fitting[0]
    named, own = pictures
    raise DataError(
        f"'imagePath' names {named.name}, but {own.name} has the name of this file, and both are in its folder, so it is "
        "not clear which was annotated. Set 'imagePath' to the name of that picture, or move the other away"
    )
