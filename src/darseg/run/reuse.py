"""Steps of another run are copied only if their images and labels are the same, byte by byte."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from pathlib import Path

from darseg.data.files import read_json
from darseg.data.manifest import Manifest
from darseg.errors import DarsegError
from darseg.run.build import manifest_of, recipe_of
from darseg.run.contents import Contents, changed_files, files_of, keep_contents, read_contents
from darseg.run.directory import RunDirectory

Judgment = tuple[bool, dict[str, str]]
"""What `judge_contents` returns."""


def judge_contents(
    run: RunDirectory, reuse: RunDirectory | None, manifest: Manifest, *, data: Mapping[str, str]
) -> Judgment:
    """Record what a run's data hold; raises as `keep_contents`.

    Returns whether they were compared with an earlier record, and the answer of `other_content`.
    """
    compared = run.contents.exists()
    contents = keep_contents(run, manifest)
    return compared, other_content(reuse, manifest, data=data, contents=contents) if reuse else {}


def other_content(
    reuse: RunDirectory, manifest: Manifest, *, data: Mapping[str, str], contents: Contents
) -> dict[str, str]:
    """Role → why no step that depends on it is copied, though names and sizes are the same.

    Args:
        data: role → digest of its samples. Roles that differ already are left out: no step with them is copied anyway.
        contents: of this run's data.
    """
    try:
        recorded = read_json(reuse.data)
        earlier = read_contents(reuse)
        changed = _compare(reuse, manifest) if earlier is None else changed_files(manifest, contents, earlier)
    except (DarsegError, OSError, ValueError) as error:
        return dict.fromkeys(data, f"its data cannot be compared with this run's ({error})")
    return {
        role: f"{len(paths):,} file(s) of the {role} images have other contents there, though the same size; the first "
        f"is {paths[0]}"
        for role, paths in changed.items()
        if isinstance(recorded, dict) and recorded.get(role) == data.get(role)
    }


def _compare(reuse: RunDirectory, manifest: Manifest) -> Mapping[str, list[Path]]:
    """Role → files that are not the other run's, which has no record of their contents."""
    earlier = {(role, name): path for role, name, path in files_of(manifest_of(recipe_of(reuse.root)))}
    changed: dict[str, list[Path]] = {}
    for role, name, path in files_of(manifest):
        if not _same(path, earlier.get((role, name))):
            changed.setdefault(role, []).append(path)
    return changed


def _same(path: Path, before: Path | None) -> bool:
    """Whether two files have the same content."""
    if before is None:
        return False
    try:
        return path.samefile(before) or filecmp.cmp(path, before, shallow=False)
    except OSError:
        return False
