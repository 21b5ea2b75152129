"""Images marked as bad: the run folder keeps the list, and rounds that begin later omit them.

`bad_images.json` holds the current marks, [{"id": …, "time": seconds since 1970}, …]. A round copies their ids into its
own `excluded.json` before it counts confidences or finds class weights, and then uses that copy. A round without the
file left nothing out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darseg.data.files import storage_error
from darseg.data.manifest import Sample
from darseg.errors import RunError, faults
from darseg.run.build import check_overrides, manifest_of, recipe_of
from darseg.run.directory import RunDirectory, write_json
from darseg.run.journal import Journal
from darseg.run.outputs import lock
from darseg.run.records import is_number, read_object

PATIENCE = 10.0
"""Seconds to wait for others who change the marks, which takes milliseconds."""


def mark_bad(
    run: Path | str, ids: Iterable[str], bad: bool = True, *, overrides: Sequence[str] = ()
) -> list[str]:
    """Mark unlabeled images of a run as bad, or (`bad=False`) remove their marks.

    Rounds that begin later neither label marked images nor train on them. Rounds that have begun stay as they are.

    Args:
        overrides: "data.root=PATH", if the run's data were moved.

    Returns:
        the ids of all marked images, sorted.

    Raises:
        RunError: `run` is not a run folder, or ids are not unlabeled images of the run; all are named.
    """
    check_overrides(run, overrides)
    known = {sample.id for sample in manifest_of(recipe_of(run, overrides)).unlabeled}
    return sorted(change_marks(RunDirectory(run), known, ids, bad=bad))


def change_marks(
    run: RunDirectory, known: Collection[str], ids: Iterable[str], bad: bool
) -> dict[str, float]:
    """`mark_bad` with the ids of all unlabeled images at hand. Returns all marks, id → time."""
    ids = _listed(ids)
    _check_known("Cannot mark", ids, known)
    with _marking(run):
        marks = read_marks(run, known)
        changed = {name for name in ids if (name in marks) != bad}
        if changed:
            kept = {name: when for name, when in marks.items() if name not in changed}
            added = dict.fromkeys(changed, round(time.time(), 3)) if bad else {}
            marks = dict(sorted((kept | added).items()))
            write_json(run.bad_images, [{"id": name, "time": when} for name, when in marks.items()])
    return marks


def _listed(ids: Iterable[str]) -> list[str]:
    """The ids as a list. Raises RunError if they are a single string or not strings."""
    if isinstance(ids, (str, bytes, os.PathLike)):
        raise RunError(
            f"mark_bad takes a list of ids, and got {ids!r}. Give a list, as in [{os.fsdecode(ids)!r}]."
        )
    if not isinstance(ids, Iterable):
        raise RunError(f"mark_bad takes a list of ids, and got {ids!r}. Give a list of strings.")
    ids = list(ids)
    if wrong := [repr(name) for name in ids if not isinstance(name, str)]:
        raise RunError(faults("mark_bad takes a list of ids, which are strings, and got", wrong))
    return ids


@contextmanager
def _marking(run: RunDirectory) -> Generator[None, None, None]:
    """Hold the lock of the marks, so that several viewers and scripts change them one after the other.

    A file of its own, because training holds the lock of the run for hours. Without locks (some network disks) the
    marks are changed all the same. Raises StorageError if the file cannot be made, RunError if the lock stays held.
    """
    path, flags = run.bad_images.with_suffix(".lock"), os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | flags, 0o666)  # NFS locks only what is open for writing
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY | flags, 0o666)  # another user of the folder made it
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        _wait_for_lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path) -> None:
    """Lock an open file, for which others may be a moment ahead. Raises RunError after PATIENCE seconds."""
    refusal = (
        f"{path} has been held by another process for {PATIENCE:g} seconds, so no mark was changed. End that viewer or "
        "script if it hangs, and mark again."
    )
    end = time.monotonic() + PATIENCE
    while True:
        try:
            lock(descriptor, refusal)
            return
        except RunError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


def read_marks(run: RunDirectory, known: Collection[str]) -> dict[str, float]:
    """The current marks, id → time in seconds since 1970, sorted by id.

    Raises RunError if the file is damaged or names images that are not among `known`.
    """
    path = run.bad_images
    entries = _read_list(path, f"Fix it or delete it; without {path.name} no image is marked.")
    damaged = [f"entry {index}: {entry!r}" for index, entry in enumerate(entries) if not _is_mark(entry)]
    if damaged:
        raise RunError(
            faults(f'{path}: expected only entries {{"id": "…", "time": seconds}}, found', damaged)
        )
    _check_known(f"{path} marks", [entry["id"] for entry in entries], known)
    return {entry["id"]: entry["time"] for entry in sorted(entries, key=lambda entry: entry["id"])}


def read_excluded(run: RunDirectory, index: int) -> tuple[str, ...]:
    """The ids that a round leaves out, sorted. Raises RunError if the file is damaged."""
    path = run.excluded(index)
    remedy = f"To repeat the round with the current marks, delete {run.round(index)} and all later rounds."
    ids = _read_list(path, remedy)
    damaged = [f"entry {place}: {entry!r}" for place, entry in enumerate(ids) if not isinstance(entry, str)]
    if damaged:
        raise RunError(faults(f"{path}: expected only ids, found", damaged) + f"\n{remedy}")
    return tuple(ids)


def report_excluded(journal: Journal, index: int, *, excluded: int, total: int) -> None:
    """Note how many of a round's unlabeled images are left out; nothing if none is."""
    if excluded:
        journal.event("excluded", round=index, images=excluded, of=total)
        journal.say(f"round {index}: {excluded} of {total} unlabeled images are marked as bad and left out")


def fix_excluded(
    run: RunDirectory, index: int, unlabeled: Sequence[Sample], begun: bool = False
) -> tuple[str, ...]:
    """The ids that a round leaves out, recorded. Arguments and errors as of `expect_excluded`."""
    ids = expect_excluded(run, index, unlabeled, begun=begun)
    path = run.excluded(index)
    if ids and not path.exists():
        write_json(path, list(ids))
    return ids


def expect_excluded(
    run: RunDirectory, index: int, unlabeled: Sequence[Sample], begun: bool = False
) -> tuple[str, ...]:
    """The ids that a round leaves out: those it began with, or the current marks. Nothing is written.

    Without marks nothing is recorded. So if a round has counted its confidences, or has class weights, and has no
    `excluded.json`, it began without marks; before, nothing in it depends on which images are left out.

    Args:
        begun: the round has trained on the images that were not left out.

    Raises RunError for damaged files, for unknown ids, and if no image would be left.
    """
    path, known = run.excluded(index), {sample.id for sample in unlabeled}
    counted = (
        run.record_path(index, "label"),
        run.round(index) / "alignment.json",
        run.round(index) / "histogram.npz",
        run.round(index) / "thresholds.json",
    )
    if begun or path.exists() or any(file.exists() for file in counted):
        ids = read_excluded(run, index)
        _check_known(f"{path} names", ids, known)
        return ids
    ids = tuple(read_marks(run, known))
    if len(ids) == len(known):
        raise RunError(
            f"{run.bad_images}: all {len(ids)} unlabeled images are marked as bad, so round {index} has none to label. "
            f"Remove marks with `darseg view {run.root}`, or delete the file."
        )
    return ids


def without(samples: Sequence[Sample], ids: Collection[str]) -> tuple[Sample, ...]:
    """The samples without those of these ids, in their order."""
    excluded = set(ids)
    return tuple(sample for sample in samples if sample.id not in excluded)


def _read_list(path: Path, remedy: str) -> list[Any]:
    """A JSON list, empty if there is no such file. Raises RunError that ends with the remedy."""
    try:
        return read_object(path, remedy, list)
    except FileNotFoundError:
        return []


def _is_mark(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), str) and is_number(entry.get("time"))


def _check_known(subject: str, ids: Iterable[str], known: Collection[str]) -> None:
    """Raise RunError that names all ids which are not `known`. subject: beginning of the message."""
    unknown = [repr(name) for name in ids if name not in known]
    if unknown:
        raise RunError(
            faults(f"{subject} images that are not among the run's {len(known)} unlabeled ones", unknown)
            + "\nAn id is the image's path below the image folder, without its suffix."
        )
