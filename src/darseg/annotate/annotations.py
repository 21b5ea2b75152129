"""Other tools' annotation files: which format a file has, and its images.

`regions` says what every format becomes, `shapes` which pixels a shape covers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from darseg.annotate.cityscapes import read_cityscapes
from darseg.annotate.coco import read_coco
from darseg.annotate.cvat import read_cvat
from darseg.annotate.labelme import read_labelme
from darseg.annotate.records import Parsed, parse_json, read_file
from darseg.annotate.regions import AnnotatedImage, Annotations
from darseg.choices import AnnotationFormat
from darseg.data.foreign import foreign_format
from darseg.data.manifest import find_files
from darseg.data.suffixes import unread_files, unread_line
from darseg.errors import DataError

FORMATS: tuple[AnnotationFormat, ...] = get_args(AnnotationFormat)
PER_IMAGE = ("labelme", "cityscapes")
"""Formats with one file for each image, so a folder of files is read."""


def read_annotations(
    path: Path, format: AnnotationFormat | None = None, panoptic_folder: Path | None = None
) -> Annotations:
    """Annotations of a file, or of a folder with one JSON file for each image (labelme, Cityscapes).

    Args:
        format: one of `FORMATS`; None: recognized by content.
        panoptic_folder: the PNGs of a COCO panoptic file; default: the file's path without suffix.

    Raises DataError if nothing can be read at all. Faults of single images are reported by the iterator over the images.
    """
    if format is not None and format not in FORMATS:
        raise DataError(f"{format!r} is not an annotation format. Choose one of {', '.join(FORMATS)}.")
    if path.is_dir():
        if panoptic_folder is not None:
            raise DataError(_not_panoptic(f"{path} is a folder"))
        return _read_folder(path, format)
    data = read_file(path)
    is_markup = data[:64].lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"<")
    parsed = None if format == "cvat" or (is_markup and format is None) else parse_json(path, data)
    kind = format or ("cvat" if parsed is None else _recognize(path, parsed.content, data))
    if panoptic_folder is not None and kind != "panoptic":
        raise DataError(_not_panoptic(f"{path} is a {kind} file"))
    if kind in PER_IMAGE:
        return _per_image(path.parent, {path.stem: path}, kind)
    if kind == "cvat" or parsed is None:
        if foreign := foreign_format(path, data):
            raise DataError(f"{path} is {foreign.name}, which is not read. {foreign.remedy}.")
        return read_cvat(path, data)
    pngs = (panoptic_folder or path.with_suffix("")) if kind == "panoptic" else None
    coco = read_coco(path, parsed.content, pngs)
    return replace(coco, images=lambda: _marked(coco.images(), parsed))


def _marked(images: Iterable[AnnotatedImage | str], parsed: Parsed) -> Iterator[AnnotatedImage | str]:
    """The images of a file, which know whether it was read as Chinese."""
    for image in images:
        yield image if isinstance(image, str) else replace(image, chinese=parsed.chinese)


def _not_panoptic(finding: str) -> str:
    return f"--panoptic-folder is only for COCO panoptic annotations; {finding}. Omit the option."


def _read_folder(path: Path, format: str | None) -> Annotations:
    files = find_files(path, (".json",))
    if not files:
        raise DataError(
            f"{path} holds no JSON files. labelme and Cityscapes have one JSON file for each image; for COCO and CVAT, "
            f"give the JSON or XML file itself. {unread_line(path, unread_files(path, ()))}".rstrip()
        )
    if format is not None and format not in PER_IMAGE:
        raise DataError(f"{path} is a folder, but {format} annotations are one file. Give that file.")
    return _per_image(path, files, format)


def _per_image(root: Path, files: Mapping[str, Path], format: str | None) -> Annotations:
    """Files of labelme or Cityscapes. `files`: path without suffix below `root` → file."""

    def images() -> Iterator[AnnotatedImage | str]:
        for relative, path in files.items():
            try:
                data = read_file(path)
                parsed = parse_json(path, data)
                kind = format or _recognize(path, parsed.content, data)
            except DataError as error:
                yield str(error)
                continue
            if kind == "labelme":
                yield from _marked(read_labelme(path, parsed.content, PurePosixPath(relative).parent), parsed)
            elif kind == "cityscapes":
                yield from _marked(read_cityscapes(path, parsed.content, relative), parsed)
            else:
                yield (
                    f"{path}: {kind} annotations are one file for all images. Give this file instead of the folder {root}"
                )

    return Annotations(images, len(files), None)


def _recognize(path: Path, content: Any, data: bytes) -> str:
    """The format of a JSON file. Raises DataError if it is none of them."""
    keys = set(content) if isinstance(content, dict) else set()
    if "shapes" in keys:
        return "labelme"
    if {"objects", "imgHeight"} <= keys:
        return "cityscapes"
    if {"images", "annotations"} <= keys:
        annotations = content["annotations"] if isinstance(content["annotations"], list) else []
        is_panoptic = any(isinstance(entry, dict) and "segments_info" in entry for entry in annotations)
        return "panoptic" if is_panoptic else "coco"
    if foreign := foreign_format(path, data):
        raise DataError(f"{path} is {foreign.name}, which is not read. {foreign.remedy}.")
    finding = "not an object"
    if isinstance(content, dict):
        names = ", ".join(map(repr, sorted(keys)[:6]))
        finding = f"an object with the keys {names}" if names else "an empty object"
    raise DataError(
        f"{path}: the format is not recognized, since the content is {finding}. Expected COCO ('images', 'annotations'), "
        "labelme ('shapes'), Cityscapes ('objects', 'imgHeight') or CVAT's XML. --format names the format."
    )
