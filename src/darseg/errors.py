"""Every error a user can meet.

    DarsegError
    ├── RecipeError      the recipe: unknown keys, wrong types, values that cannot work
    ├── DataError        images, labels and lists: missing, unreadable, contradictory
    │   └── SizeError    sizes a network cannot take
    ├── WeightsError     weight files: missing, damaged, unsafe, ill-fitting
    ├── ExportError      a network that other programs cannot be given, or give other classes of
    ├── NumericsError    a loss or gradient that is not finite
    ├── RunError         run folders: another recipe, damaged state, not there
    ├── MemoryLimit      a GPU without the memory that a step needs
    └── StorageError     the disk: full, read-only

Interrupted, by a signal, is none of these: it is no Exception, so nothing takes it for a damaged file.

A message says what was found and where, what was wanted, and what to do. The command line prints it
and exits with code 2; anything that is not a DarsegError is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class DarsegError(Exception):
    """Root of all errors a user can cause and mend."""


class RecipeError(DarsegError):
    """The recipe has unknown keys, ill-typed values, or values that cannot work together."""


class DataError(DarsegError):
    """An image, label or list is missing, unreadable or contradicts another."""


class SizeError(DataError):
    """An image or crop has a size the network cannot take."""


class WeightsError(DarsegError):
    """A weight file is missing, damaged, unsafe to read, or does not fit the network."""


class ExportError(DarsegError):
    """A network cannot be written for other programs, or the file written does not agree with it."""


class NumericsError(DarsegError):
    """A loss or gradient is not finite; weights are left as they were before the step."""


class MemoryLimit(DarsegError):
    """A GPU has less memory than a step needs."""


class Interrupted(BaseException):
    """A signal asked a run to end; what it had done is saved, and the same command goes on.

    No Exception, so that code which meets all sorts of errors of a damaged file does not take it for one; and no
    KeyboardInterrupt, which the command line's library would end by itself.
    """

    code = 130  # exit status: 128 + number of the signal


class RunError(DarsegError):
    """A run folder belongs to another recipe, is damaged, or is not a run folder."""


class StorageError(DarsegError):
    """The disk is full or a folder cannot be written."""


def faults(what: str, lines: Sequence[str], limit: int = 50) -> str:
    """One message for all faults of one kind: a headline, then a line each (at most `limit`)."""
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  … and {len(lines) - limit} more")
    return "\n".join([f"{what}:", *shown])
