"""Label images by one process or many: count all confidences, choose thresholds, assign labels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from darseg.data.files import read_file, write_whole
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.prediction import BYTES_PER_PIXEL, SCALES, ConfidenceScale, Prediction
from darseg.errors import StorageError
from darseg.model.network import Network
from darseg.model.predict import Memory, Protocol, predict_for_labeling
from darseg.pseudo.assign import LabelRule
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.labelset import FactsLog, Predictor, PseudoLabelSet, assign_labels, count_predictions
from darseg.pseudo.thresholds import choose_thresholds
from darseg.run.journal import Advance
from darseg.training.processes import Processes

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a progress bar: what is done, how many steps it takes → a function that advances it."""


@dataclass(frozen=True)
class LabelTask:
    """What decides the label maps of a set of images besides their predictions.

    Attributes:
        distribution: shares of the classes among all labeled pixels.
        seed, round_index: of the random sampling, with an image's id.
    """

    labeling: Labeling
    distribution: ClassDistribution
    seed: int
    round_index: int = 0

    @property
    def scale(self) -> ConfidenceScale:
        """The scale that confidences are counted on."""
        return SCALES[self.labeling.confidence]


@dataclass(frozen=True)
class LabelFiles:
    """Where labeling writes.

    Attributes:
        labels: folder of the label maps, `ID.png`.
        histogram: file of the confidences of all images, written between counting and assigning.
        logs: folder for the facts of images, one file per process; None: they are not kept.
    """

    labels: Path
    histogram: Path
    logs: Path | None = None


def label_samples(
    samples: Sequence[Sample],
    task: LabelTask,
    predictor: Predictor,
    *,
    files: LabelFiles,
    processes: Processes,
    progress: Progress,
) -> PseudoLabelSet:
    """Count, choose, assign: write the label maps of all samples, each by one of the processes.

    If it is killed and called again with the same arguments, it continues: waiting predictions, a complete histogram
    and label maps are not made again.
    """
    own = processes.share(samples)
    if files.histogram.exists():
        histogram = ConfidenceHistogram.from_bytes(read_file(files.histogram))
        processes.wait()
    else:
        with progress("predict", len(own)) as advance:
            count = partial(count_predictions, own, len(task.distribution), predictor)
            part = processes.together(lambda: count(scale=task.scale, advance=advance))
        histogram = ConfidenceHistogram(processes.add_up(part.counts), task.scale)
        processes.from_first(lambda: write_whole(files.histogram, histogram.to_bytes()))
    thresholds = processes.together(lambda: choose_thresholds(histogram, task.labeling, task.distribution))
    rule = LabelRule(thresholds, task.seed, task.round_index)
    log = None if files.logs is None else FactsLog(files.logs / f"images_{processes.rank}.jsonl")
    with progress("label", len(own)) as advance:
        assign = partial(assign_labels, own, rule, predictor, labels=files.labels)
        kept = processes.together(lambda: assign(log=log, advance=advance))
    return PseudoLabelSet(
        folder=files.labels, histogram=histogram, thresholds=thresholds, kept=processes.add_up(kept)
    )


def network_predictor(
    network: Network,
    protocol: Callable[[np.ndarray], Protocol],
    scale: ConfidenceScale,
    *,
    folder: Path | None = None,
) -> Predictor:
    """A predictor of images by a network in eval mode.

    Args:
        protocol: image, uint8 [H, W, 3] → how it is predicted.
        folder: where predictions wait for the second pass; None: images are predicted twice.
    """
    memory = Memory()

    def run(sample: Sample, image: np.ndarray) -> Prediction:
        return predict_for_labeling(
            network, image, protocol(image), name=str(sample.image), scale=scale, memory=memory
        )

    return Predictor(lambda sample: read_image(sample.image), run, folder)


def check_disk(folder: Path, pixels: int, remedy: str) -> None:
    """Raise StorageError if waiting predictions of so many pixels may not fit on the disk of `folder`.

    Args:
        remedy: what makes labeling do without waiting predictions, as in "use --predict-twice".
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, BYTES_PER_PIXEL * pixels
    if free < needed:
        raise StorageError(
            f"{folder}: {_size(free)} are free, but labeling may need {_size(needed)} for predictions that wait "
            f"between counting and assigning ({BYTES_PER_PIXEL} bytes per pixel). Free some space, or {remedy}: then "
            "each image is predicted twice and nothing waits."
        )


def _size(count: int) -> str:
    """A number of bytes in words, in the largest unit of which there is at least one."""
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if count >= pair[0]), (1, "B")
    )
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count} {name}"
