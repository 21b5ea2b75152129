"""Files appear whole: they are written aside in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from darseg.errors import StorageError

ASIDE = ".part"
"""Suffix of files that are being written. A leftover is an unfinished file and is overwritten the next time."""


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error to raise when writing `path` failed with this OSError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full: {path} could not be written. No half-written file was left behind. "
            "Free some space and run the same command again; it goes on where it stopped."
        )
    blocking = next((folder for folder in path.parents if folder.is_file()), None)
    reason = f"{blocking} is a file, not a folder" if blocking else error.strerror or str(error)
    return StorageError(f"Cannot write {path}: {reason}. Choose another folder, or change its permissions.")


def write_whole_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file next to `path`, then rename it to `path`.

    Raises StorageError if the disk is full or the folder cannot be written. After any error the half-written file is
    removed, and an earlier file at `path` is left as it was.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise storage_error(cause, path) from error


def _os_error(error: BaseException) -> OSError | None:
    """The OSError behind an error. safetensors, written in Rust, names it only in its message."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def write_whole(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`, so that the file is there whole or not at all (see `write_whole_with`)."""
    encoded = data.encode() if isinstance(data, str) else data
    write_whole_with(path, lambda aside: aside.write_bytes(encoded))
