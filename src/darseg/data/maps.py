"""Label maps on the disk: where the map of an image is, and the only way to write one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from darseg.data.files import write_whole
from darseg.errors import DataError

WRITABLE = ((np.uint8, ()), (np.uint16, ()), (np.uint8, (3,)))
"""Types of values and channels that `write_map` takes."""

LONGEST_NAME = 255
"""Bytes of a file's name on all usual file systems."""


def label_path(folder: Path, sample_id: str) -> Path:
    """Where the label map of an image is: `folder/ID.png`. See `path_of_id` for its errors."""
    return path_of_id(folder, sample_id, ".png")


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
