"""Steps of another run are copied only if its images and labels are the same, byte by byte."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from darseg.data.files import read_json
from darseg.data.manifest import Manifest
from darseg.errors import DarsegError, RunError
from darseg.run.build import manifest_of, recipe_of
from darseg.run.directory import RunDirectory


def check_same_content(reuse: RunDirectory, manifest: Manifest, data: Mapping[str, str]) -> None:
    """Raise RunError if files of the run to reuse are others, though of the same names and sizes.

    Args:
        data: role → digest of its samples. Roles that differ already are not compared.
    """
    try:
        recorded, roles = read_json(reuse.data), manifest_of(recipe_of(reuse.root)).roles()
    except (DarsegError, OSError, ValueError) as error:
        raise RunError(
            f"--reuse {reuse.root}: its data cannot be compared with this run's ({error}). Restore it, or omit --reuse."
        ) from error
    for role, samples in manifest.roles().items():
        if not isinstance(recorded, dict) or recorded.get(role) != data.get(role):
            continue
        earlier = {sample.id: (sample.image, *sample.label_files) for sample in roles[role]}
        for sample in samples:
            before = earlier.get(sample.id, ())
            for path, other in zip_longest((sample.image, *sample.label_files), before):
                if path is not None and not _same(path, other):
                    raise RunError(
                        f"--reuse {reuse.root}: {path} is not the file that it was begun with, though of the same size. "
                        "Omit --reuse; nothing of that run holds for other data."
                    )


def _same(path: Path, before: Path | None) -> bool:
    """Whether two files have the same content."""
    if before is None:
        return False
    try:
        return path.samefile(before) or filecmp.cmp(path, before, shallow=False)
    except OSError:
        return False
