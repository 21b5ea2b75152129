"""Folders below a folder: each real one once, whatever links lead to it, and none that darseg wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from darseg.errors import DataError

RUN = ("run.json", "data.json", "journal.jsonl")
"""With recipe.yaml, each of these marks a run folder."""

PREDICTED, PSEUDO_LABELED = ".predicted.json", "redistribution.json"
"""Records that `darseg predict`, and `darseg label` and `redistribute`, leave in their folders."""


def walk(
    folder: Path, fail: Callable[[OSError], object] | None = None, *, labels: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yield folders, from `folder` itself on, and the names of their files.

    Hidden folders, run folders and folders of predictions are left out, unless `folder` itself is one. A folder that
    several links lead to is visited once, by its own path if that is below `folder`.

    Args:
        fail: called for a folder that cannot be read; None: such a folder is left out.
        labels: label maps are looked for. One folder of them may then stand for several of images, so it is visited by
            each link; only loops are left out. Pseudo labels below `folder` count.
    """
    visited: set[tuple[int, int]] = set()
    starts: list[tuple[str, frozenset[tuple[int, int]]]] = [(os.fspath(folder), frozenset())]
    while starts:
        start, above = starts.pop(0)
        chains: dict[str, frozenset[tuple[int, int]]] = {}  # a folder, and those that it was reached through
        for directory, subfolders, names in os.walk(start, onerror=fail):
            try:
                status = os.stat(directory)
            except OSError as error:  # removed since it was listed
                subfolders.clear()
                if fail is not None:
                    fail(error)
                continue
            identity = status.st_dev, status.st_ino
            chain = chains.get(os.path.dirname(directory), above)
            written = directory != os.fspath(folder) and is_written(names, labels=labels)
            if written or identity in (chain if labels else visited):
                subfolders.clear()
                continue
            visited.add(identity)
            chains[directory] = chain | {identity}
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            below = (os.path.join(directory, name) for name in subfolders)
            starts += [(path, chains[directory]) for path in below if os.path.islink(path)]
            yield directory, names
        starts.sort(key=lambda entry: entry[0])


def refuse(folder: Path) -> Callable[[OSError], None]:
    """What `walk` calls to raise DataError if `folder` itself cannot be read; others are left out."""

    def fail(error: OSError) -> None:
        if error.filename == os.fspath(folder):
            raise DataError(
                f"{folder}: this folder cannot be read ({error.strerror}). Check its permissions."
            ) from error

    return fail


def unreadable(folder: Path) -> str:
    """A sentence about folders below `folder` that cannot be read; empty if there are none."""
    errors: list[OSError] = []
    for _ in walk(folder, errors.append):
        pass
    if not errors or not folder.exists():  # recipes with lists have no folders of the usual names
        return ""
    first = f"{errors[0].filename} ({errors[0].strerror})"
    return (
        f"{folder}: {len(errors):,} folder(s) in it cannot be read, so the files in them are left out; the first is "
        f"{first}. Change their permissions if these files are needed."
    )


def is_written(names: Collection[str], *, labels: bool = False) -> bool:
    """Whether a folder with these files was written by darseg, so that its pictures are no data."""
    if PREDICTED in names or (PSEUDO_LABELED in names and not labels):
        return True
    return "recipe.yaml" in names and any(name in names for name in RUN)
