"""Where commands write: users' files stay, and one command writes into a folder at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from darseg.data.files import read_json, storage_error
from darseg.errors import RunError, StorageError


@contextlib.contextmanager
def held_folder(folder: Path) -> Generator[None]:
    """Hold an exclusive lock on an output folder; the system releases it when the process ends.

    The folder is made if it is missing.

    Raises RunError if another process holds it, StorageError if the folder cannot be made. On a file system without
    locks nothing is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        lock(
            descriptor,
            f"{folder}: another process is writing into this folder. Wait for it, end it, or choose another folder.",
        )
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, refusal: str) -> bool:
    """Lock an open file or folder exclusively; False if the file system has no locks.

    Raises RunError with the refusal if another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(refusal) from None
    except OSError:
        return False
    return True


def check_scores_file(path: Path) -> None:
    """Raise an error, before the work, if scores cannot be written to `path`.

    A file that `darseg evaluate` wrote is replaced. Raises RunError for other files and folders, StorageError if the
    folder cannot be written.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder. Give --out the name of a JSON file.")
    if path.exists() or path.is_symlink():
        try:
            content = read_json(path)
        except (OSError, ValueError):
            content = None
        if not isinstance(content, dict) or not {"mean_iou", "iou", "protocol", "role"} <= content.keys():
            raise RunError(
                f"{path} exists already and was not written by `darseg evaluate`, so it was left as it is. Give --out "
                "another name, or remove the file."
            )
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raise StorageError if a file at `path` cannot be made: found out before hours of work."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        error = (
            NotADirectoryError(20, "a part of this path is a file")
            if not folder.is_dir()
            else PermissionError(13, "Permission denied")
        )
        raise storage_error(error, path)


def read_settings(path: Path, damaged_is_unknown: bool = False) -> list[Mapping[str, Any]]:
    """What made the files of a folder, as its record says: one entry for each network or protocol.

    Args:
        damaged_is_unknown: an entry without settings stands for a damaged record.

    Raises RunError if the record is damaged, StorageError if it may not be read.
    """
    if not path.exists():
        return []
    try:
        return _read_settings(path)
    except RunError:
        if damaged_is_unknown:
            return [{}]
        raise


def _read_settings(path: Path) -> list[Mapping[str, Any]]:
    try:
        content: Any = read_json(path)
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Change its permissions.") from error
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Choose another folder, or use --existing replace."
        ) from error
    entries = content.get("made_by") if isinstance(content, dict) else None
    if not isinstance(entries, Sequence) or not all(isinstance(entry, dict) for entry in entries):
        raise RunError(f"{path} is not a record of darseg. Choose another folder, or remove this file.")
    return list(entries)
