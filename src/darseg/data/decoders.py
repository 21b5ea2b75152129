"""Run decoders written in C, and get what they print to standard error, which names no file.

libjpeg and libpng report damage only there: OpenCV still returns a picture. All threads of a process share standard
error, so it is led aside while any of them decodes. If something was printed meanwhile, each of those files is decoded
once more, alone. What others print in this time is passed on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

Result = TypeVar("Result")

STANDARD_ERROR = 2
"""The file descriptor."""

LONGEST = 1 << 20
"""Bytes of the file beyond which it is emptied."""

DECODER_LINE = re.compile(
    r"Corrupt JPEG data|Premature end of JPEG|Invalid (SOS|progressive) parameters|Inconsistent progression|"
    r"Warning: unknown JFIF|Application transferred too (few|many) scanlines|Unsupported JPEG|Unsupported marker|"
    r"Invalid JPEG|Not a JPEG|Bogus |libpng (warning|error)|TIFF(Read|Fetch|Fill|Decode|Open)\w*: |"
    r"\[ ?(WARN|ERROR|INFO):\d|\[OPENCV:FFMPEG|\[[\w,]+ @ 0x|Last message repeated"
)
"""Matches lines of libjpeg, libpng, libtiff, OpenCV and FFmpeg."""


FFMPEG_LINE = re.compile(r"\[[\w,]+ @ 0x")


class _Aside:
    """Standard error led into a temporary file while any thread decodes."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._decoding = 0
        self._waiting = 0  # for being alone
        self._alone = False
        self._original = -1
        self._file = -1
        self._passed_on = 0

    @contextlib.contextmanager
    def together(self) -> Generator[Callable[[], bool], None, None]:
        """Decode while others may decode, too; call the value afterwards: whether anything was printed."""
        with self._condition:
            while self._alone or self._waiting:
                self._condition.wait()
            self._enter()
            before = os.fstat(self._file).st_size
        try:
            yield lambda: os.fstat(self._file).st_size > before
        finally:
            with self._condition:
                self._leave()

    @contextlib.contextmanager
    def alone(self) -> Generator[Callable[[], list[str]], None, None]:
        """Decode while nobody else does; call the value afterwards: the decoder's lines."""
        with self._condition:
            self._waiting += 1
            while self._alone or self._decoding:
                self._condition.wait()
            self._waiting -= 1
            self._alone = True
            self._enter()
            before = os.fstat(self._file).st_size
        try:
            yield lambda: [line for line in self._lines(before) if DECODER_LINE.search(line)]
        finally:
            with self._condition:
                self._alone = False
                self._leave()

    def _enter(self) -> None:
        if self._decoding == 0:
            if self._file < 0:
                self._file = _temporary_file()
            # Not each time: another thread's line may be on its way into the file.
            if os.fstat(self._file).st_size > LONGEST:
                os.ftruncate(self._file, 0)
                self._passed_on = 0
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            self._original = _duplicate(STANDARD_ERROR)
            os.dup2(self._file, STANDARD_ERROR)
        self._decoding += 1

    def _leave(self) -> None:
        self._decoding -= 1
        original = self._original
        if self._decoding == 0:
            if original >= 0:
                os.dup2(original, STANDARD_ERROR)
            else:  # it was closed before
                os.close(STANDARD_ERROR)
            self._condition.notify_all()
        size = os.fstat(self._file).st_size
        if size > self._passed_on and original >= 0:
            others = [line for line in self._lines(self._passed_on, size) if not DECODER_LINE.search(line)]
            os.write(original, "".join(f"{line}\n" for line in others).encode(errors="surrogateescape"))
        self._passed_on = size
        if self._decoding == 0 and original >= 0:
            os.close(original)

    def _lines(self, begin: int, end: int | None = None) -> list[str]:
        """What was printed since the file had `begin` bytes."""
        size = (os.fstat(self._file).st_size if end is None else end) - begin
        text = os.pread(self._file, size, begin).decode(errors="surrogateescape")
        return [line for line in text.splitlines() if line.strip()]


def _temporary_file() -> int:
    """A file descriptor that always appends, so that no position has to be kept."""
    if hasattr(os, "memfd_create"):  # in memory, on Linux
        first = os.memfd_create("decoders")
        copy = _duplicate(first)
        os.close(first)
    else:
        with tempfile.TemporaryFile() as file:
            copy = _duplicate(file.fileno())
    fcntl.fcntl(copy, fcntl.F_SETFL, fcntl.fcntl(copy, fcntl.F_GETFL) | os.O_APPEND)
    return copy


def _duplicate(descriptor: int) -> int:
    """A copy of a file descriptor; -1 if it is not open."""
    try:
        # Standard error's own number, if it is closed, must not be taken.
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, STANDARD_ERROR + 1)
    except OSError:
        return -1


_aside = _Aside()


def decode_quietly(decode: Callable[[], Result]) -> tuple[Result, list[str]]:
    """What `decode` returns, and the lines that the decoder printed to standard error meanwhile.

    Any number of threads may decode at the same time. `decode` may run twice, and must not call this function.
    """
    with _aside.together() as printed:
        result = decode()
        if not printed():
            return result, []
    with _aside.alone() as lines:
        result = decode()
        return result, lines()


@contextlib.contextmanager
def together_quietly() -> Generator[Callable[[], list[str]], None, None]:
    """Lead standard error aside once; call the value afterwards for FFmpeg's lines."""
    lines: list[str] = []
    with _aside.together() as printed:
        begin = os.fstat(_aside._file).st_size
        yield lambda: lines
        if printed():
            lines += [line for line in _aside._lines(begin) if FFMPEG_LINE.search(line)]


def _after_fork() -> None:
    """Give standard error back to a child process that was made while a thread decoded."""
    global _aside
    if _aside._decoding and _aside._original >= 0:
        os.dup2(_aside._original, STANDARD_ERROR)
    _aside = _Aside()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
