"""Label images by one process or many: count all confidences, choose thresholds, assign labels."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from darseg.data.dataset import LoadImage, load_image
from darseg.data.files import read_file, real, write_whole
from darseg.data.manifest import Sample
from darseg.data.prediction import BYTES_PER_PIXEL, SCALES, ConfidenceScale, Prediction
from darseg.errors import StorageError
from darseg.model.decide import decide
from darseg.model.network import Network
from darseg.model.predict import predict_for_labeling, scores_for_labeling, whole_image
from darseg.model.together import Picture, Together, flow_for
from darseg.model.windows import Memory, Protocol
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.assign import LabelRule
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.labelset import (
    FactsLog,
    Groups,
    Predictor,
    PseudoLabelSet,
    assign_labels,
    count_predictions,
)
from darseg.pseudo.precision import ExpectedPrecision, HeldOutCounts, choose_by_precision
from darseg.pseudo.scores import ScoreSource, scores_bytes_per_pixel
from darseg.pseudo.shrink import ShrunkShares
from darseg.pseudo.thresholds import Thresholds, choose_thresholds
from darseg.run.align_samples import align_samples
from darseg.run.held_out import HeldOut, count_held_out
from darseg.run.label_task import LabelFiles, LabelTask, Progress
from darseg.training.processes import Processes


def label_samples(
    samples: Sequence[Sample],
    task: LabelTask,
    predictor: Predictor | ScoreSource,
    *,
    files: LabelFiles,
    processes: Processes,
    progress: Progress,
    held_out: HeldOut | None = None,
) -> PseudoLabelSet:
    """Count, choose, assign: write the label maps of all samples, each by one of the processes.

    If it is killed and called again with the same arguments, it continues: waiting predictions, a complete histogram
    and label maps are not made again.

    Args:
        predictor: for aligned decisions the source of scores; their class weights are found first.
        held_out: images that are predicted and compared with their labels first; only if the ratio is auto.
    """
    alignment = counts = None
    source = predictor
    assert isinstance(predictor, ScoreSource) == task.labeling.of_scores
    if isinstance(predictor, ScoreSource) and task.labeling.normalized:
        predictor = predictor.plainly()
    elif isinstance(predictor, ScoreSource):
        alignment = align_samples(
            samples, task, predictor, files=files, processes=processes, progress=progress
        )
        predictor = predictor.predictor(alignment.factors)
    if held_out is not None:
        counts = count_held_out(
            held_out,
            classes=len(task.distribution),
            scale=task.scale,
            factors=None if alignment is None else alignment.factors,
            processes=processes,
            progress=progress,
        )
    own = processes.share(samples, predictor.images)
    histogram = _counted(own, task, predictor, file=files.histogram, processes=processes, progress=progress)
    prior = _shrunk(task, histogram, alignment)
    choose = partial(_choose, histogram, task, counts, prior=prior, folds=held_out.folds if held_out else 0)
    thresholds, expected = processes.together(choose)
    if isinstance(source, ScoreSource) and task.labeling.normalized:
        predictor = source.normalized(_divisors(thresholds, task.labeling))
    rule = LabelRule(thresholds, task.seed, task.round_index)
    log = None if files.logs is None else FactsLog(files.logs / f"images_{processes.rank}.jsonl")
    with progress("label", len(own)) as advance:
        assign = partial(
            assign_labels, own, rule, predictor, labels=files.labels, confidences=files.confidences
        )
        kept = processes.add_up(processes.together(lambda: assign(log=log, advance=advance)))
    return PseudoLabelSet(
        files.labels, histogram, thresholds, kept=kept, alignment=alignment, expected=expected, prior=prior
    )


def _counted(
    own: Sequence[Sample],
    task: LabelTask,
    predictor: Predictor,
    *,
    file: Path,
    processes: Processes,
    progress: Progress,
) -> ConfidenceHistogram:
    """The confidences of all images, counted by all processes or by an earlier call."""
    if file.exists():
        histogram = ConfidenceHistogram.from_bytes(read_file(file))
        processes.wait()
        return histogram
    with progress("predict", len(own)) as advance:
        count = partial(count_predictions, own, len(task.distribution), predictor)
        part = processes.together(lambda: count(scale=task.scale, advance=advance))
    histogram = ConfidenceHistogram(processes.add_up(part.counts), task.scale)
    processes.from_first(lambda: write_whole(file, histogram.to_bytes()))
    return histogram


def _shrunk(
    task: LabelTask, histogram: ConfidenceHistogram, alignment: Alignment | None
) -> ShrunkShares | None:
    """The shrunk shares that a labeling aims at; None if it aims at the labeled ones."""
    if task.evidence is None:
        return None
    sums = histogram.predicted
    return task.shrunk(sums / max(1, sums.sum()) if alignment is None else alignment.plain)


def _choose(
    histogram: ConfidenceHistogram,
    task: LabelTask,
    counts: HeldOutCounts | None,
    *,
    prior: ShrunkShares | None,
    folds: int,
) -> tuple[Thresholds, ExpectedPrecision | None]:
    """The thresholds of a labeling, and the precision they should give, if that decides.

    Args:
        prior: the class shares aimed at; None: the labeled ones.
        folds: of the labeled images, if these are what was counted.
    """
    target = task.distribution if prior is None else ClassDistribution(prior.share)
    if counts is None:
        return choose_thresholds(histogram, task.labeling, target), None
    precision = task.labeling.target_precision
    thresholds, expected = choose_by_precision(histogram, target, counts, target_precision=precision)
    return thresholds, replace(expected, folds=folds)


def _divisors(thresholds: Thresholds, labeling: Labeling) -> NDArray[np.float64]:
    """What probabilities are divided by; with ratio 1 the same for all classes (DST-CBC)."""
    if labeling.ratio == 1:
        return np.ones(len(thresholds.accept))
    return np.nan_to_num(thresholds.threshold, nan=np.inf)


def network_predictor(
    network: Network,
    protocol: Protocol | None,
    scale: ConfidenceScale,
    *,
    folder: Path | None = None,
    read: LoadImage = load_image,
) -> Predictor:
    """A predictor of images by a network in eval mode.

    Args:
        protocol: how images are predicted; None: each in one window, and its mirror.
        folder: where predictions wait for the second pass; None: images are predicted twice.
        read: reads an image.
    """
    memory, together = Memory(), Together(network, protocol, average="logits", scale=scale)

    def run(sample: Sample, image: np.ndarray) -> Prediction:
        how = protocol or whole_image(network, image)
        return predict_for_labeling(network, image, how, name=str(sample.image), scale=scale, memory=memory)

    def picture(sample: Sample) -> Picture:
        return Picture.of(read(sample), str(sample.image), together.device)

    groups = Groups(
        together.images, read=picture, predict=together.predict_each, flow=flow_for(together.device)
    )
    return Predictor(read, run, folder, groups=groups)


def network_scores(
    network: Network,
    protocol: Protocol | None,
    scale: ConfidenceScale,
    *,
    scores: Path | None = None,
    predictions: Path | None = None,
    read: LoadImage = load_image,
) -> ScoreSource:
    """The scores of images by a network in eval mode, for aligned decisions.

    Args:
        protocol: how images are predicted; None: each in one window, and its mirror.
        scores, predictions: where they wait; see `ScoreSource`.
        read: reads an image.
    """
    memory = Memory()

    def score(sample: Sample, image: np.ndarray) -> np.ndarray:
        return scores_for_labeling(
            network,
            image,
            protocol or whole_image(network, image),
            scale=scale,
            name=str(sample.image),
            memory=memory,
        )

    def decide_scores(sample: Sample, scores: np.ndarray, weights: np.ndarray) -> Prediction:
        return decide(torch.from_numpy(scores), scale, name=str(sample.image), weights=weights)

    return ScoreSource(
        read,
        score,
        decide_scores,
        plain=network_predictor(network, protocol, scale).predict,
        scores=scores,
        predictions=predictions,
    )


def waiting_bytes(labeling: Labeling, classes: int, *, predict_twice: bool, from_files: bool = False) -> int:
    """Bytes per pixel, before compression, that wait on the disk between the passes of labeling.

    Args:
        from_files: scores are read from files, so they need not wait.
    """
    if labeling.normalized:
        return 0
    if labeling.align == "none" or from_files:
        return 0 if predict_twice else BYTES_PER_PIXEL
    # Scores make way for predictions, image by image.
    scores = 0 if predict_twice else scores_bytes_per_pixel(classes, SCALES[labeling.confidence])
    return max(scores, BYTES_PER_PIXEL)


def check_disk(
    folder: Path,
    pixels: int,
    labeling: Labeling,
    *,
    classes: int,
    predict_twice: bool,
    twice: str,
    from_files: bool = False,
) -> None:
    """Raise StorageError if what waits for so many pixels may not fit on the disk of `folder`.

    Args:
        twice: what makes labeling predict twice, as in "use --predict-twice".
        from_files: see `waiting_bytes`.
    """
    per_pixel, per_pixel_twice = (
        waiting_bytes(labeling, classes, predict_twice=choice, from_files=from_files)
        for choice in (predict_twice, True)
    )
    there = next(path for path in (folder, *real(folder).parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, per_pixel * pixels
    if free >= needed:
        return
    less = f"only {per_pixel_twice} bytes per pixel wait" if per_pixel_twice else "nothing waits"
    otherwise = f", or {twice}: then each image is predicted twice and {less}"
    what = "predictions that wait between counting and assigning"
    if per_pixel > BYTES_PER_PIXEL:
        what = "scores of all classes that wait until the class weights are known"
    raise StorageError(
        f"{folder}: {_size(free)} are free, but labeling may need {_size(needed)} for {what} "
        f"({per_pixel} bytes per pixel). Free some space{otherwise if per_pixel_twice < per_pixel else ''}."
    )


def _size(count: int) -> str:
    """A number of bytes in words, in the largest unit of which there is at least one."""
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if count >= pair[0]), (1, "B")
    )
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count} {name}"
