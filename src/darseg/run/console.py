"""Standard output and error that outlive their console: work goes on if nobody reads its output."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)
"""Errors of a console that does not come back: a closed pipe or terminal. Others, such as a full disk, may pass."""


class Enduring:
    """A text stream that drops what cannot be written; it raises neither OSError nor UnicodeEncodeError.

    A closed pipe, a closed terminal or a full log disk is no reason to end hours of work. A character that the stream's
    encoding does not have is written as its escape, such as \\u2192.

    Attributes:
        lost: why something could not be written; None if all was, or if its reader has gone.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lost(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def let_go(self) -> None:
        """Write what is left, or drop it: otherwise Python complains when it ends."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _lost(self, error: OSError) -> None:
        if error.errno in GONE:
            self._discard()
        else:
            self.lost = error.strerror

    def _discard(self) -> None:
        """From now on everything goes to the null device, also what the stream still holds."""
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def enduring(stream: Any) -> Any:
    """The stream, as one that outlives its console."""
    return stream if isinstance(stream, Enduring) else Enduring(stream)


def quiet_writers(before: Callable[[threading.ExceptHookArgs], object]) -> Callable[[Any], object]:
    """What to call if a thread ends with an error: `before`, unless it is TensorBoard's and about a file.

    TensorBoard raises that error again in the main thread, which reports it; its thread would print a traceback besides.
    """

    def ended(error: threading.ExceptHookArgs) -> None:
        if not (
            isinstance(error.exc_value, OSError) and type(error.thread).__module__.startswith("tensorboard.")
        ):
            before(error)

    return ended


@contextlib.contextmanager
def enduring_streams() -> Generator[Enduring]:
    """Inside the block, standard output and error outlive their console and print any character.

    Yields standard output.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            # None: closed by whoever started this process.
            stream = stack.enter_context(open(os.devnull, "w")) if stream is None else stream
            setattr(sys, name, enduring(stream))
        try:
            yield sys.stdout  # ty: ignore[invalid-yield]
        finally:
            for name, stream in zip(("stdout", "stderr"), before, strict=True):
                enduring(getattr(sys, name)).let_go()
                setattr(sys, name, stream)
