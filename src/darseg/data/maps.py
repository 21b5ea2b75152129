"""Label maps on the disk: where the map of an image is, and the only way to write one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from darseg.data import files
from darseg.data.encoding import PLAIN
from darseg.data.files import open_file, write_whole
from darseg.data.manifest import Sample
from darseg.errors import DataError, faults

LONGEST_PATH = 4095
"""Bytes of a path: PATH_MAX of Linux without the byte that ends it."""

ASIDE_BYTES = 1 + 16 + len(files.ASIDE)
"""Bytes that a file's name has more while it is written (`files.aside_name`)."""

WRITABLE = ((np.uint8, ()), (np.uint16, ()), (np.uint8, (3,)))
"""Types of values and channels that `write_map` takes."""

LONGEST_NAME = 255
"""Bytes of a file's name on all usual file systems."""

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The first and last bytes of every PNG file (PNG specification, 5.2 and 11.2.5)."""


def label_path(folder: Path, sample_id: str) -> Path:
    """Where the label map of an image is: `folder/ID.png`. See `path_of_id` for its errors."""
    return path_of_id(folder, sample_id, ".png")


def labeled_by(
    folder: Path, unlabeled: Sequence[Sample], confidences: Path | None = None
) -> tuple[Sample, ...]:
    """The samples with the label maps of a folder instead of any label they had.

    Args:
        confidences: folder of the maps of how sure the labeler was; None: there are none.
    """
    return tuple(
        replace(
            sample,
            label=label_path(folder, sample.id),
            encoding=PLAIN,
            parts=None,
            confidence=None if confidences is None else label_path(confidences, sample.id),
        )
        for sample in unlabeled
    )


def path_of_id(folder: Path, sample_id: str, suffix: str) -> Path:
    """The file of an id, `folder/ID` + `suffix`. Raises DataError unless it is below the folder."""
    parts = PurePosixPath(sample_id).parts
    if not parts or sample_id.startswith("/") or ".." in parts:
        raise DataError(
            f"The id {sample_id!r} is not a path below {folder}. An id is a relative path without '..'."
        )
    if suffix != ".png" and len(os.fsencode(parts[-1] + suffix)) > LONGEST_NAME:  # files that only wait
        return folder / f"{hashlib.sha256(os.fsencode(sample_id)).hexdigest()}{suffix}"
    return folder / f"{sample_id}{suffix}"


def check_names(folder: Path, ids: Iterable[str]) -> None:
    """Raise DataError if names or paths are too long for maps of these ids below a folder."""
    folder = folder.absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    longest, lines = LONGEST_NAME, []
    with contextlib.suppress(OSError, ValueError):  # a file system that does not say
        longest = os.pathconf(there, "PC_NAME_MAX")
    for name in ids:
        parts = [os.fsencode(part) for part in f"{name}.png".split("/")]
        aside = min(len(parts[-1]), files.LONGEST_NAME) + ASIDE_BYTES  # its name while it is written
        name_bytes = max(aside, *map(len, parts))
        path_bytes = len(os.fsencode(f"{folder}/{name}")) + ASIDE_BYTES
        if name_bytes > longest:
            lines.append(
                f"{name}: the name of a file would have {name_bytes} bytes, at most {longest} are possible"
            )
        elif path_bytes > LONGEST_PATH:
            lines.append(
                f"{name}: its path would have {path_bytes} bytes, at most {LONGEST_PATH} are possible"
            )
    if lines:
        raise DataError(
            faults(
                f"{len(lines)} image(s) have names that are too long for files in {folder}. Rename them, or choose "
                "another folder",
                lines,
                limit=8,
            )
        )


def is_whole(path: Path) -> bool:
    """Whether a file begins and ends as a PNG file does: not so if it is missing, empty or cut off."""
    try:
        with open_file(path) as file:
            head = file.read(len(PNG_HEAD))
            file.seek(-len(PNG_END), os.SEEK_END)
            return head == PNG_HEAD and file.read() == PNG_END
    except OSError:
        return False


def write_map(path: Path, values: np.ndarray) -> None:
    """Write a map as a PNG that appears whole, with OpenCV's default settings, which are its fastest.

    Args:
        values: uint8 or uint16 [H, W]; or a picture, uint8 [H, W, 3], in OpenCV's order: blue, green, red.

    Raises:
        DataError: the array has another shape or type. StorageError: the file cannot be written.
    """
    channels = values.shape[2:]
    if values.ndim < 2 or not values.size or (values.dtype, channels) not in WRITABLE:
        raise DataError(
            f"{path}: an array of type {values.dtype} and shape {list(values.shape)} cannot be written as a map. "
            "Give uint8 or uint16 [H, W], or uint8 [H, W, 3]."
        )
    _, data = cv2.imencode(".png", np.ascontiguousarray(values))
    write_whole(path, data.tobytes())
