"""Every error a user can meet.

    DarsegError
    ├── RecipeError      the recipe: unknown keys, wrong types, values that cannot work
    ├── DataError        images, labels and lists: missing, unreadable, contradictory
    │   └── SizeError    sizes that a network cannot take
    ├── WeightsError     weight files: missing, damaged, unsafe, of another network
    ├── ExportError      exported networks: not possible, or with other classes than the original
    ├── NumericsError    a loss or gradient that is not finite
    ├── RunError         run folders: of another recipe, damaged, missing
    │   └── FormatError  run folders and checkpoints that a later version wrote
    ├── MemoryLimit      a GPU or machine with less memory than a step needs
    └── StorageError     the disk: full, read-only

Interrupted is separate: a signal is not an Exception, so code that handles damaged files does not catch it.

A message says what is wrong and where, what was expected, and what to do. The command line prints it and exits with
code 2. Anything that is not a DarsegError is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any


class DarsegError(Exception):
    """Root of all errors that a user can cause and fix."""


class RecipeError(DarsegError):
    """The recipe has unknown keys, values of the wrong type, or values that do not work together."""


class DataError(DarsegError):
    """An image, label or list is missing, unreadable or contradicts another."""


class SizeError(DataError):
    """An image or crop has a size that the network cannot take."""


class WeightsError(DarsegError):
    """A weight file is missing, damaged, unsafe to read, or does not fit the network."""


class ExportError(DarsegError):
    """A network cannot be exported, or the exported file gives other classes."""


class NumericsError(DarsegError):
    """A loss or gradient is not finite; the weights are those before the step."""


class MemoryLimit(DarsegError):
    """The GPU or the machine has less memory than a step needs."""


class Interrupted(BaseException):
    """A signal asked a run to end; its state is saved, and the same command continues it.

    It is not an Exception, so that code that catches the errors of damaged files lets it pass; and not a
    KeyboardInterrupt, which the command line's library would handle itself.
    """

    code = 130  # exit status: 128 + number of the signal


class RunError(DarsegError):
    """A run folder belongs to another recipe, is damaged, or is not a run folder."""


class FormatError(RunError):
    """A run folder or checkpoint has a format that only a later version of darseg can read."""


class StorageError(DarsegError):
    """The disk is full or a folder cannot be written."""


# C0 but tab and newline, DEL, C1, marks and overrides of direction, separators of lines, and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text whose control characters, which names of files and classes may hold, are written as escapes.

    Otherwise a name could move the cursor, color or hide other lines, or be shown backwards.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def faults(what: str, lines: Sequence[str], limit: int = 50) -> str:
    """One message for all faults of a kind: the headline `what`, then a line per fault, at most `limit`."""
    listed = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        listed.append(f"  … and {len(lines) - limit} more")
    return "\n".join([f"{what}:", *listed])


def shortened(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A value for a message, at most 60 characters of what `write` makes of it."""
    text = write(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
