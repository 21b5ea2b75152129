"""Images that the user marked as bad: kept in the run folder, left out by the rounds that begin after.

`bad_images.json` holds the marks of now, [{"id": …, "time": seconds since 1970}, …]. A round copies their ids into its
own `excluded.json` before it counts confidences, and keeps to that copy. A round without the file left nothing out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from darseg.data.manifest import Sample
from darseg.errors import RunError, faults
from darseg.run.build import manifest_of, recipe_of
from darseg.run.directory import RunDirectory, write_json


def mark_bad(run: Path | str, ids: Iterable[str], bad: bool = True) -> list[str]:
    """Mark unlabeled images of a run as bad, or (`bad=False`) take their marks away.

    Rounds that begin to label after this leave marked images out: they are neither labeled nor trained on. Rounds that
    have begun stay as they are.

    Returns:
        the ids of all images marked now, sorted.

    Raises RunError naming every id that is no unlabeled image of the run, and where `run` is no run folder.
    """
    known = {sample.id for sample in manifest_of(recipe_of(run)).unlabeled}
    return sorted(change_marks(RunDirectory(run), known, ids, bad))


def change_marks(
    run: RunDirectory, known: Collection[str], ids: Iterable[str], bad: bool
) -> dict[str, float]:
    """`mark_bad` for one who has the ids of the unlabeled images at hand. Returns all marks, id → time."""
    wanted = list(ids)
    _check_known("These cannot be marked", wanted, known)
    marks = read_marks(run, known)
    changed = {name for name in wanted if (name in marks) != bad}
    if changed:
        kept = {name: when for name, when in marks.items() if name not in changed}
        marks = dict(sorted((kept | (dict.fromkeys(changed, round(time.time(), 3)) if bad else {})).items()))
        write_json(run.bad_images, [{"id": name, "time": when} for name, when in marks.items()])
    return marks


def read_marks(run: RunDirectory, known: Collection[str]) -> dict[str, float]:
    """The marks of now, id → time in seconds since 1970, sorted by id; empty where there are none.

    Raises RunError where the file is damaged or names images that are not among `known`.
    """
    path = run.bad_images
    found = _read_json(path, f"Mend it or delete it: without {path.name} no image is marked.")
    if found is None:
        return {}
    wrong = [f"entry {at}: {entry!r}" for at, entry in enumerate(found) if not _is_mark(entry)]
    if wrong:
        raise RunError(faults(f'{path}: wanted are entries {{"id": "…", "time": seconds}}, found', wrong))
    _check_known(f"{path}: marks of", [entry["id"] for entry in found], known)
    return {entry["id"]: entry["time"] for entry in sorted(found, key=lambda entry: entry["id"])}


def read_excluded(run: RunDirectory, index: int) -> tuple[str, ...]:
    """The ids that a round leaves out, sorted. Raises RunError where the file is damaged."""
    path = run.excluded(index)
    found = _read_json(
        path, f"To do the round anew with the marks of now, delete {run.round(index)} and all later ones."
    )
    if found is None:
        return ()
    wrong = [f"entry {at}: {entry!r}" for at, entry in enumerate(found) if not isinstance(entry, str)]
    if wrong:
        raise RunError(faults(f"{path}: wanted are ids, found", wrong))
    return tuple(found)


def fix_excluded(run: RunDirectory, index: int, unlabeled: Sequence[Sample]) -> tuple[str, ...]:
    """The ids a round leaves out: those it began with; where it has yet to begin, the marks of now are written down.

    Without marks nothing is written. So a round has begun without any where its confidences are counted and it has no
    `excluded.json`; before that nothing in it depends on which images are left out.

    Raises RunError for damaged files, unknown ids, and where no image would be left.
    """
    path, known = run.excluded(index), {sample.id for sample in unlabeled}
    counted = (
        run.record_path(index, "label"),
        run.round(index) / "histogram.npz",
        run.round(index) / "thresholds.json",
    )
    if path.exists() or any(one.exists() for one in counted):
        ids = read_excluded(run, index)
        _check_known(f"{path}: ids of", ids, known)
        return ids
    ids = tuple(read_marks(run, known))
    if len(ids) == len(known):
        raise RunError(
            f"{run.bad_images}: all {len(ids)} unlabeled images are marked as bad, so round {index} has none to label. "
            f"Take marks away with `darseg view {run.root}`, or delete the file."
        )
    if ids:
        write_json(path, list(ids))
    return ids


def without(samples: Sequence[Sample], ids: Collection[str]) -> tuple[Sample, ...]:
    """The samples but those with these ids, in their order."""
    left_out = set(ids)
    return tuple(sample for sample in samples if sample.id not in left_out)


def _read_json(path: Path, remedy: str) -> list[Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}). {remedy}") from error
    if not isinstance(found, list):
        raise RunError(f"{path}: wanted is a list, found {type(found).__name__}. {remedy}")
    return found


def _is_mark(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and isinstance(entry.get("time"), (int, float))
    )


def _check_known(what: str, ids: Iterable[str], known: Collection[str]) -> None:
    unknown = [repr(name) for name in ids if name not in known]
    if unknown:
        raise RunError(
            faults(f"{what} images that are not among the {len(known)} unlabeled ones of this run", unknown)
            + "\nAn id is the image's path below the images' folder, without suffix."
        )
