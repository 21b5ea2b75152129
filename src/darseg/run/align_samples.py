"""Align the decisions on a set of files by one process or many: sample scores, find class weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from darseg.data.files import read_json
from darseg.data.manifest import Sample
from darseg.data.pipeline import overlapped
from darseg.errors import DataError, RunError
from darseg.pseudo.align import Alignment, align
from darseg.pseudo.pixel_sample import PixelSample
from darseg.run.directory import write_json
from darseg.run.label_samples import LabelTask, Progress
from darseg.training.processes import Processes

AddSample = Callable[[PixelSample, Sample, Any], None]
"""(sample of pixels, file, what was read of it) → checks the scores and adds them to the sample of pixels."""


def align_samples(
    samples: Sequence[Sample],
    task: LabelTask,
    *,
    read: Callable[[Sample], Any],
    add: AddSample,
    file: Path,
    processes: Processes,
    progress: Progress,
) -> Alignment:
    """The class weights for a set of files, kept in `file`; if it exists, the files are not read.

    Args:
        read: called ahead, in threads.

    Raises DataError that names all files that cannot be used, after all others were read.
    """
    alignment = processes.from_first(lambda: _read_alignment(file))
    if alignment is not None:
        return alignment
    own = processes.share(samples)
    pixels = PixelSample(len(task.distribution), task.seed)
    with progress("sample", len(own)) as advance:

        def work(sample: Sample, content: Any) -> None:
            add(pixels, sample, content)

        processes.together(
            lambda: overlapped(own, read=read, work=work, write=lambda *_: None, advance=advance)
        )
    rows = processes.to_first(pixels.rows(processes.add_up(pixels.sizes())))

    def make() -> Alignment:
        labeling = task.labeling
        made = align(rows, task.distribution.share, bound=labeling.bound, strength=labeling.strength)
        write_json(file, made.to_json())
        return made

    return processes.from_first(make)


def _read_alignment(file: Path) -> Alignment | None:
    """The alignment that an earlier call left; None if there is none."""
    if not file.exists():
        return None
    try:
        return Alignment.from_json(read_json(file))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        raise RunError(
            f"{file} is damaged ({error}). Remove it, and the class weights are found again."
        ) from error
