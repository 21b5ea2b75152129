"""What a run records of its data, so that it goes on with the same data only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from darseg.data.encoding import PLAIN, LabelEncoding
from darseg.data.images import USUAL
from darseg.data.label_parts import Parts
from darseg.data.manifest import Manifest, Sample
from darseg.errors import DataError, faults
from darseg.run.settings import default_of, digest_settings, digest_text

ENCODING_OF_FORMAT_1 = ("format", "values", "other", "ignore", "colors", "city_ids")
"""Fields of a label encoding that digests of data have always named."""


def digest_samples(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, file sizes and how images and labels are read.

    It changes if files are added, removed or changed in size, and needs no reading of contents; see `keep_contents`
    for these.
    """
    lines, missing = [], []
    for sample in samples:
        try:
            label = "+".join(str(path.stat().st_size) for path in sample.label_files) or "-"
            encoding = "" if sample.encoding == PLAIN else f"\t{_described(sample.encoding)}"
            reading = "" if sample.reading == USUAL else f"\t{digest_settings(reading=sample.reading)}"
            parts = "" if sample.parts is None else f"\t{_described_parts(sample.parts)}"
            lines.append(f"{sample.id}\t{sample.image.stat().st_size}\t{label}{encoding}{reading}{parts}")
        except OSError as error:
            missing.append(f"{error.filename}: {error.strerror}")
    if missing:
        raise DataError(faults("Files of the data set cannot be read", missing))
    return digest_text("\n".join(lines))


def _described_parts(parts: Parts) -> str:
    """Masks of a picture as text: their names, in the order in which they are drawn, and their classes."""
    return f"{[(path.name, k) for path, k in parts.files]}\t{parts.other}"


def _described(encoding: LabelEncoding) -> str:
    """An encoding as text, as format 1 had it; a later field counts if it is not at its default."""
    values = [
        f"{item.name}={getattr(encoding, item.name)!r}"
        for item in fields(encoding)
        if item.name in ENCODING_OF_FORMAT_1 or getattr(encoding, item.name) != default_of(item)
    ]
    return f"LabelEncoding({', '.join(values)})"


def stranger(root: str, changed: Sequence[str], command: str) -> str:
    """Why images below `root` are not shown, if the digests of these roles differ; empty if none.

    A run folder of somebody else may name any folder of this machine as its data. But it cannot know the names and sizes
    of all files there, which a run records when it begins.
    """
    if not changed:
        return ""
    return (
        f"No pictures are shown, because the images in {root} are not those that the run began with "
        f"({', '.join(changed)}: other files or sizes). If you trust this run folder, show them with darseg {command} "
        "--pictures."
    )


def sources(run: Path, root: str, samples: Iterable[Sample]) -> str:
    """A line that says which files of a run and its data are read, and whether all are in the data root.

    Links are followed.
    """
    places: dict[str, str] = {}
    below, elsewhere, start = 0, [], os.path.join(os.path.realpath(root), "")
    paths = {str(path) for sample in samples for path in (sample.image, *sample.label_files)}
    for path in sorted(paths):
        folder, name = os.path.split(path)
        if folder not in places:
            places[folder] = os.path.realpath(folder)
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(places[folder], name)
        if real.startswith(start):
            below += 1
        else:
            elsewhere.append(real)
    others = f"; {len(elsewhere):,} elsewhere, the first is {elsewhere[0]}" if elsewhere else ""
    return f"Reads: {run}; {below:,} images and label maps below {root}{others}"


def written_since(manifest: Manifest, moment: float) -> list[Path]:
    """Images and label maps written after `moment` (seconds since 1970), perhaps with other content.

    Both times of a file must be later. A camera or another machine, whose clock may be wrong, sets the time of writing;
    copies and renames set that of the last change.
    """
    paths = {
        path
        for samples in manifest.roles().values()
        for sample in samples
        for path in (sample.image, *sample.label_files)
    }

    def written(path: Path) -> float:
        status = path.stat()
        return min(status.st_mtime, status.st_ctime)

    return sorted(path for path in paths if written(path) > moment)


def digest_manifest(manifest: Manifest) -> dict[str, str]:
    """Role → digest of its samples."""
    return {role: digest_samples(samples) for role, samples in manifest.roles().items()}
