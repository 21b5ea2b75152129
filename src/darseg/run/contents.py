"""What the files of a run's data hold: digests, made again only for files of another size or time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from darseg.data.files import raise_if_unreadable
from darseg.data.manifest import Manifest
from darseg.data.threads import in_threads
from darseg.errors import DataError, RunError, faults
from darseg.run.directory import RunDirectory, digest_path, write_json
from darseg.run.records import damaged, is_digest, read_object


class Content(NamedTuple):
    """Size in bytes, time of the last change in nanoseconds, and SHA-256 of a file."""

    size: int
    changed: int
    digest: str


Contents = dict[str, dict[str, Content]]
"""Role → id of an image, or for a file of its label map `ID<tab>NUMBER` → content."""


def files_of(manifest: Manifest) -> Iterator[tuple[str, str, Path]]:
    """Yield role, name (see `Contents`) and path of every image and label map."""
    for role, samples in manifest.roles().items():
        for sample in samples:
            yield role, sample.id, sample.image
            for number, path in enumerate(sample.label_files, 1):
                yield role, f"{sample.id}\t{number}", path


def digest_contents(manifest: Manifest, known: Contents) -> Contents:
    """The contents of all files; those of the size and time that `known` says are not read.

    Raises DataError or StorageError for a file that cannot be read.
    """

    def content_of(entry: tuple[str, str, Path]) -> Content:
        role, name, path = entry
        try:
            status = os.stat(path)
            earlier = known.get(role, {}).get(name)
            # Copying and unpacking set the time of writing back, but not that of the last change.
            changed = max(status.st_mtime_ns, status.st_ctime_ns)
            if earlier and (earlier.size, earlier.changed) == (status.st_size, changed):
                return earlier
            return Content(status.st_size, changed, digest_path(path))
        except OSError as error:
            raise_if_unreadable(error, path)
            raise DataError(f"{path}: this file cannot be read ({error.strerror}).") from error

    contents: Contents = {role: {} for role in manifest.roles()}
    entries = list(files_of(manifest))
    for (role, name, _), content in zip(entries, in_threads(content_of, entries), strict=True):
        contents[role][name] = content
    return contents


def keep_contents(run: RunDirectory, manifest: Manifest) -> Contents:
    """The contents of a run's data, recorded in its folder. A later call does not read all files again.

    Raises RunError if files have other contents than recorded; files that were only moved or touched are the same.
    """
    known = read_contents(run)
    contents = digest_contents(manifest, known or {})
    if known is not None and (changed := changed_files(manifest, contents, known)):
        lines = [str(path) for paths in changed.values() for path in paths]
        raise RunError(
            faults(
                f"{run.root} was begun with other images or labels: {len(lines):,} file(s) have other contents now, "
                "though the same size. Restore them to go on with that run, or start another run with --out NEW_FOLDER",
                lines,
            )
        )
    if contents != known:
        write_json(run.contents, contents)
    return contents


def changed_files(manifest: Manifest, contents: Contents, earlier: Contents) -> Mapping[str, list[Path]]:
    """Role → files whose contents are not the earlier ones, for roles with such files."""
    changed: dict[str, list[Path]] = {}
    for role, name, path in files_of(manifest):
        before = earlier.get(role, {}).get(name)
        if before is None or before.digest != contents[role][name].digest:
            changed.setdefault(role, []).append(path)
    return changed


def read_contents(run: RunDirectory) -> Contents | None:
    """The contents that a run folder records; None if it was begun before they were recorded.

    Raises RunError if the record is damaged.
    """
    remedy = (
        "Restore it from a copy; or delete it if the images and labels are those the run began with, and run the same "
        "command again."
    )
    try:
        value = read_object(run.contents, remedy)
    except FileNotFoundError:
        return None
    contents: Contents = {}
    for role, entries in value.items():
        if not isinstance(entries, dict) or not all(map(_is_content, entries.values())):
            raise damaged(run.contents, f"{role!r} does not hold sizes, times and SHA-256 digests", remedy)
        contents[role] = {name: Content(*entry) for name, entry in entries.items()}
    return contents


def _is_content(value: object) -> bool:
    if not isinstance(value, list) or [type(item) for item in value] != [int, int, str]:
        return False
    return is_digest(value[2])
