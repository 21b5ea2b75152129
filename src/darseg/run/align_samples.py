"""Align the decisions on a set of files by one process or many: sample scores, find class weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from darseg.data.files import raise_if_unreadable, read_json
from darseg.data.manifest import Sample
from darseg.errors import DataError, RunError
from darseg.pseudo.align import Alignment, align
from darseg.pseudo.pixel_sample import PixelSample
from darseg.pseudo.scores import ScoreSource
from darseg.run.directory import write_json
from darseg.run.label_task import LabelTask, Progress
from darseg.training.processes import Processes


def align_samples(
    samples: Sequence[Sample],
    task: LabelTask,
    source: ScoreSource,
    *,
    file: Path,
    processes: Processes,
    progress: Progress,
) -> Alignment:
    """The class weights of a set of files, from a sample of their pixels or by an earlier call.

    Predictions that wait without a file of weights were made with others, and are removed.

    Args:
        file: JSON file of the alignment; later calls read it.
    """

    def look() -> Alignment | None:
        alignment = _read_alignment(file)
        if alignment is None and source.predictions is not None:
            shutil.rmtree(source.predictions, ignore_errors=True)
        return alignment

    alignment = processes.from_first(look)
    if alignment is not None:
        return alignment
    own = processes.share(samples)
    pixels = PixelSample(len(task.distribution), task.seed)
    with progress("sample", len(own)) as advance:
        processes.together(lambda: source.collect(own, pixels, advance))
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
        raise_if_unreadable(error, file)
        raise RunError(
            f"{file} is damaged ({error}). Remove it, and the class weights are found again."
        ) from error
