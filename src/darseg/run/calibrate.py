"""Calibrate a network's class shares: its predictions of validation images, against their truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from darseg.data.classes import IGNORE
from darseg.data.dataset import read_truth
from darseg.data.files import raise_if_unreadable, read_json
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.shrink import Calibration
from darseg.run.directory import write_json
from darseg.run.label_task import Progress
from darseg.training.processes import Processes


def calibrate(
    samples: Sequence[Sample],
    classes: int,
    predictor: Predictor,
    *,
    file: Path,
    inputs: str,
    processes: Processes,
    progress: Progress,
    warn: Callable[[str], object],
) -> Calibration:
    """The calibration of a network on images with known truth; all processes together.

    Args:
        samples: beginning with a whole group of the predictor, all of the same lengths but the last.
        file: where the counts wait until labeling is done, so that a call after a kill does not predict again.
        inputs: digest of what decides the predictions; counts made with others are not taken over.
        warn: called by the first process with a sentence if the file is damaged and all images are predicted again.
    """

    def read() -> np.ndarray | None:
        return _read_counts(file, inputs, (len(samples), 2, classes), warn=warn)

    counts = processes.from_first(read)
    if counts is None:
        own = processes.share(samples, predictor.images)
        with progress("calibrate", len(own)) as advance:
            counted: dict[str, np.ndarray] = {}

            def count(sample: Sample, prediction: Prediction) -> None:
                counted[sample.id] = count_truth(read_truth(sample), prediction.classes, classes)

            processes.together(lambda: predictor.run(own, count, advance))
        rows = np.array([counted[sample.id] for sample in own], np.int64).reshape(-1, 2, classes)
        rows = processes.to_first(rows)

        def write() -> np.ndarray:
            write_json(file, {"inputs": inputs, "counts": rows.tolist()})
            return rows

        counts = processes.from_first(write)
    return Calibration.of(counts[:, 0], counts[:, 1])


def count_truth(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class by truth and by prediction, int64 [2, K], of the pixels whose truth is known."""
    known = truth != IGNORE
    return np.stack([np.bincount(labels[known], minlength=classes) for labels in (truth, predicted)])


def _read_counts(
    file: Path, inputs: str, shape: tuple[int, int, int], *, warn: Callable[[str], object]
) -> np.ndarray | None:
    """The counts that an earlier call left, int64 [N, 2, K]; None if there are none with these inputs."""
    if not file.exists():
        return None
    try:
        content = read_json(file)
        if content["inputs"] != inputs:
            return None
        return np.array(content["counts"], np.int64).reshape(shape)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        raise_if_unreadable(error, file)
        warn(damaged_counts(file, error))
        return None


def damaged_counts(file: Path, error: object) -> str:
    """What to say if counts that only spare predictions are damaged: they are made again."""
    return f"{file} is damaged, so its images are predicted again: {error}"
