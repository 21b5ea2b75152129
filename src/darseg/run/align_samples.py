"""Align the decisions on a set of files by one process or many: sample scores, find class weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from darseg.data.files import raise_if_unreadable, read_json
from darseg.data.manifest import Sample
from darseg.data.maps import label_path
from darseg.errors import DataError, RunError
from darseg.pseudo.align import align
from darseg.pseudo.alignment import Alignment, for_images
from darseg.pseudo.pixel_sample import PixelSample
from darseg.pseudo.scores import SCORES_VERSION, ScoreSource
from darseg.run.directory import write_json
from darseg.run.label_task import LabelFiles, LabelTask, Progress
from darseg.run.settings import digest_settings
from darseg.training.processes import Processes


def align_samples(
    samples: Sequence[Sample],
    task: LabelTask,
    source: ScoreSource,
    *,
    files: LabelFiles,
    processes: Processes,
    progress: Progress,
) -> Alignment:
    """The class weights of a set of files, from a sample of their pixels or by an earlier call.

    What an earlier call left is removed if its weights were found with other inputs; without weights, predictions that
    wait were made with others, and are removed.
    """
    inputs = digest_settings(inputs=task.inputs, scores=SCORES_VERSION)

    def look() -> Alignment | None:
        alignment = _read_alignment(files.alignment, inputs)
        if alignment is None:
            if files.alignment.exists():
                _remove_labeling(samples, source, files)
            if source.predictions is not None:
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
        labeling, share = task.labeling, task.distribution.share
        if task.evidence is not None:
            share = task.shrunk(np.bincount(rows.argmax(axis=1), minlength=len(share)) / len(rows)).share
        aligned = align(rows, share, bound=labeling.bound, strength=labeling.strength)
        made = for_images(aligned, len(samples))
        write_json(files.alignment, made.to_json() | {"inputs": inputs})
        return made

    return processes.from_first(make)


def _remove_labeling(samples: Sequence[Sample], source: ScoreSource, files: LabelFiles) -> None:
    """Remove what followed from other class weights.

    The weights themselves go last, so that a kill before leaves a trace.
    """
    files.histogram.unlink(missing_ok=True)
    if files.held_out is not None:
        files.held_out.unlink(missing_ok=True)
    for sample in samples:
        label_path(files.labels, sample.id).unlink(missing_ok=True)
    for log in files.logs.glob("images_*.jsonl") if files.logs else ():
        log.unlink()
    for folder in (source.scores, source.predictions):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    files.alignment.unlink()


def _read_alignment(file: Path, inputs: str) -> Alignment | None:
    """The alignment that an earlier call left; None if there is none, or it has other inputs."""
    if not file.exists():
        return None
    try:
        content = read_json(file)
        alignment = Alignment.from_json(content)
        return alignment if content.get("inputs") == inputs else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        raise_if_unreadable(error, file)
        raise RunError(
            f"{file} is damaged ({error}). Remove it, and the class weights are found again."
        ) from error
