"""Only files are opened as files, and what is written appears whole: written aside, then renamed.

What is read may come from somebody else. A named pipe, socket or device would be waited on, or would never end, so it is
refused before it is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

from darseg.errors import StorageError

ASIDE = ".part"
"""Suffix of files that are being written."""

_LEFTOVER = re.compile(r"\.[0-9a-f]{16}\.part(\.\w+)?$")
"""Ends the names of files that are being written, or that a kill left."""

LONGEST_NAME = 200
"""Bytes of a file's name that its name aside keeps: file systems take 255."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# --- reading

ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors that say nothing about a file's content: it may be whole, so nobody may be told to delete it."""


_GONE = (errno.ENOENT, errno.ENOTDIR)


def check_regular(path: Path | str) -> None:
    """Raise OSError unless `path` is a file, or a link to one. For libraries that open files themselves."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def open_file(path: Path | str) -> BinaryIO:
    """A file, opened for reading bytes. Raises OSError; at once, too, if it is no regular file."""
    check_regular(path)  # before it is opened, because opening a device can do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return file


LARGEST, LARGEST_TEXT = 16 << 30, 1 << 30
"""Bytes of files that are read as a whole: a file full of holes states any size and takes no room on the disk."""


def read_file(path: Path | str, most: int = LARGEST) -> bytes:
    """The content of a file. Raises OSError; at once, if it is no regular file or larger than `most`."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, of {most:,} at most", str(path))
        return file.read()


def read_text(path: Path | str, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file. Raises OSError, or UnicodeDecodeError, which is a ValueError."""
    text = read_file(path, LARGEST_TEXT).decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def raise_if_unreadable(error: BaseException, path: Path) -> None:
    """Raise StorageError if this error is about the access to a file, whose content may be whole."""
    cause = _os_error(error)
    if cause is not None and cause.errno in ACCESS:
        denied = cause.errno in (errno.EACCES, errno.EPERM)
        remedy = "Change its permissions." if denied else _REMEDIES.get(cause.errno, "Try again.")
        raise StorageError(f"Cannot read {path}: {os.strerror(cause.errno)}. {remedy}") from error


def explained(error: OSError) -> str:
    """A message about a file that the system refuses, from an error nobody caught; empty for others."""
    if error.filename is None or error.errno not in (*ACCESS, *_GONE):
        return ""
    if error.errno in _GONE:
        return f"{error.filename}: {error.strerror}. Check the path. If it was there when the command began, put it back."
    remedy = _REMEDIES.get(error.errno, "Try again.")
    denied = error.errno in (errno.EACCES, errno.EPERM)
    return f"{error.filename}: {error.strerror}. {'Change its permissions.' if denied else remedy}"


def read_json(path: Path | str, encoding: str = "utf-8") -> Any:
    """The content of a JSON file. Raises OSError; ValueError if it is no JSON, or nested too deeply."""
    return parse_json(read_text(path, encoding))


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text. Raises ValueError if it is no JSON, or nested too deeply.

    Args:
        pairs: makes objects of their pairs of names and values, which may repeat a name; None: dicts.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError(f"it holds a number of more than {sys.get_int_max_str_digits()} digits") from None


# --- writing

_REMEDIES = {
    errno.EACCES: "Choose another folder, or change its permissions.",
    errno.EPERM: "Choose another folder, or change its permissions.",
    errno.EFBIG: "The file system, or a limit (`ulimit -f`), takes no file of this size. Raise the limit, or choose a "
    "folder on another disk.",
    errno.ENAMETOOLONG: "File systems take names of up to 255 bytes. Give a shorter name.",
    errno.EMFILE: "Too many files are open at once. Raise the limit (`ulimit -n`), or lower training.workers.",
    errno.ENOENT: "A folder of this path was removed meanwhile. Put it back, or choose another folder.",
    errno.EEXIST: "A link that leads nowhere has this name. Remove it, or choose another folder.",
    errno.EIO: "The disk or the network that it is reached by has failed. Check it, and run the same command again.",
    errno.ESTALE: "The network that the disk is reached by has failed. Check it, and run the same command again.",
}
"""What to do if a file cannot be written, by the number of the error."""


def is_taken(path: Path) -> bool:
    """Whether something has this name, be it a link that leads nowhere; it is not written over unasked."""
    return os.path.lexists(path)


def real(path: Path) -> Path:
    """The absolute path without links. Path.resolve raises RuntimeError for a link that leads to itself."""
    return Path(os.path.realpath(path))


def named(path: Path) -> str:
    """The path, for messages; of a link that leads nowhere also where it leads."""
    if path.is_symlink() and not path.exists():
        return f"{path}, a link to {os.readlink(path)}, which is not there,"
    return str(path)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The error to raise when writing `path` failed with this OSError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full: {path} could not be written. No half-written file was left behind. "
            "Free some space and run the same command again; it goes on where it stopped."
        )
    if error.errno == errno.ELOOP and path.is_symlink():
        return StorageError(
            f"{path} is a link to {os.readlink(path)}, and darseg does not write through links. Remove the link, or "
            "put the file itself there."
        )
    blocking = next((folder for folder in path.parents if folder.is_file()), None)
    reason = f"{blocking} is a file, not a folder" if blocking else error.strerror or str(error)
    number = errno.EISDIR if blocking else error.errno or 0
    return StorageError(f"Cannot write {path}: {reason}. {_REMEDIES.get(number, 'Choose another folder.')}")


def open_to_append(path: Path) -> BinaryIO:
    """A file, opened for appending, and made if it is missing. Links are not followed. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def write_whole_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file next to `path`, then rename it to `path`.

    Raises StorageError if the disk is full or the folder cannot be written. After any error the half-written file is
    removed, and an earlier file at `path` is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside_of(path) as aside:
            write(aside)
    except BaseException as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise storage_error(cause, path) from error


@contextlib.contextmanager
def aside_of(path: Path, suffix: str = "") -> Generator[Path, None, None]:
    """A new, empty file next to `path`, which is renamed to `path` at the end, or removed after an error.

    Nobody can know its name before, so no link can wait there. It has the mode of any new file, and is locked while it is
    written, by which `remove_leftovers` knows it from one that a kill left.

    Args:
        suffix: ends the name, for libraries that choose a format by it.

    Raises OSError.
    """
    aside, descriptor = _new_file(path, suffix)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        yield aside
        finished = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(finished, mode)  # safetensors puts a file that only its owner can read in its place
            os.fsync(finished)
        finally:
            os.close(finished)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def aside_name(path: Path, suffix: str = "") -> Path:
    """A name next to `path` that no file has."""
    name = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])
    return path.with_name(f"{name}.{os.urandom(8).hex()}{ASIDE}{suffix}")


def _new_file(path: Path, suffix: str) -> tuple[Path, int]:
    """A new file next to `path`, locked, and its descriptor."""
    while True:
        aside = aside_name(path, suffix)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(aside, flags, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):  # removed as a leftover before it was locked
            if os.path.samestat(os.stat(aside, follow_symlinks=False), os.fstat(descriptor)):
                return aside, descriptor
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove half-written files that a kill left in a folder or below it.

    These have a name that only `aside_of` gives, are files and not links, and no living process holds their lock. Folders
    behind links are not entered. What cannot be removed stays.
    """
    for directory, _, names in os.walk(folder):
        for name in filter(_LEFTOVER.search, names):
            with contextlib.suppress(OSError):
                _remove_unlocked(Path(directory, name))


def _remove_unlocked(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def regular_files(path: Path) -> list[Path]:
    """The files in a folder and below it, in order; no pipes and devices, nothing behind linked folders.

    Of a file, itself.
    """
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def refuse_links_out_of(folder: Path, files: bool = False) -> None:
    """Raise StorageError if a writer would leave the folder through a link to a folder elsewhere.

    Links to files do not matter to a writer: a file is replaced as a whole, and the link with it (see `open_to_append`).

    Args:
        files: also refuse links to files elsewhere, and links that lead nowhere; for readers.
    """
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *(names if files else ())):
            if os.path.islink(path := os.path.join(directory, name)):
                refuse_link(Path(path), folder)


def refuse_link(path: Path, folder: Path) -> None:
    """Raise StorageError if the way from a folder to a path in it leaves the folder through a link.

    What is read or written there would be a file of this machine's user, chosen by whoever made the folder.
    """
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return
    links = [part for part in (path, *path.parents) if part.is_symlink()]
    link = links[0] if links else path
    raise StorageError(
        f"{link} is a link to {os.readlink(link)}, and darseg neither reads nor writes outside {folder}. Remove the "
        "link, or put what it leads to in its place."
    )


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
