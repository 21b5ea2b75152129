"""Label maps of the unlabeled images on the disk: predicted, counted, decided, assigned, written.

The only module of this room that touches the disk. Memory does not grow with the number of images: between
counting and assigning, predictions wait in files (3 bytes a pixel before compression), or are made again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from darseg.data.encoding import PLAIN
from darseg.data.files import storage_error, write_whole
from darseg.data.manifest import Sample
from darseg.data.maps import label_path, path_of_id, write_map
from darseg.data.pipeline import overlapped
from darseg.data.prediction import FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.distribution import count_label_pixels
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.thresholds import Thresholds


@dataclass(frozen=True)
class PseudoLabelSet:
    """A finished set of label maps `ID.png` (uint8 [H, W], 255 = not labeled) and how it came about.

    Attributes:
        kept: int64 [K], pixels labeled per class, over all maps.
    """

    folder: Path
    histogram: ConfidenceHistogram
    thresholds: Thresholds
    kept: np.ndarray

    def to_json(self) -> dict:
        """Thresholds and counts, a list of K each."""
        return self.thresholds.to_json() | {"kept": self.kept.tolist()}

    @classmethod
    def load(cls, folder: Path, histogram: Path, thresholds: Path) -> PseudoLabelSet:
        """From its folder, the bytes of its histogram and its `to_json`. Raises DataError where it is damaged."""
        described = json.loads(thresholds.read_text())
        kept = np.array(described["kept"], np.int64)
        counts = ConfidenceHistogram.from_bytes(histogram.read_bytes())
        return cls(folder, counts, Thresholds.from_json(described), kept)

    def samples(self, unlabeled: Sequence[Sample]) -> tuple[Sample, ...]:
        """The samples with these label maps in place of any label they had: like any other samples."""
        return tuple(
            replace(sample, label=label_path(self.folder, sample.id), encoding=PLAIN) for sample in unlabeled
        )


def prediction_path(folder: Path, sample_id: str) -> Path:
    """Where the prediction of an image waits."""
    return path_of_id(folder, sample_id, ".prediction")


def read_prediction(folder: Path, sample_id: str) -> Prediction | None:
    """A waiting prediction; None where it is missing or damaged, and has to be made again."""
    try:
        return Prediction.from_bytes(prediction_path(folder, sample_id).read_bytes())
    except (OSError, DataError):
        return None


@dataclass(frozen=True)
class ImageFacts:
    """What labeling found in one image, for those who look through thousands.

    Attributes:
        pixels: of the image.
        kept: pixels labeled, per class, K numbers.
        predicted, confidence: pixels predicted per class; mean over the pixels, in [0, 1]. None where all that is left of
            them is the label map.
    """

    pixels: int
    kept: tuple[int, ...]
    predicted: tuple[int, ...] | None = None
    confidence: float | None = None

    @property
    def coverage(self) -> float:
        """Share of the pixels that are labeled."""
        return sum(self.kept) / max(1, self.pixels)

    def to_json(self) -> dict:
        return {"confidence": self.confidence, "predicted": self.predicted, "kept": self.kept}

    @classmethod
    def from_json(cls, entry: dict, classes: int) -> ImageFacts:
        """What `to_json` made. Raises ValueError, KeyError or TypeError for anything else."""
        predicted, kept = (tuple(int(count) for count in entry[key]) for key in ("predicted", "kept"))
        if (len(predicted), len(kept)) != (classes, classes):
            raise ValueError(f"counts of {len(predicted)} and {len(kept)} classes instead of {classes}")
        return cls(sum(predicted), kept, predicted, float(entry["confidence"]))

    @classmethod
    def of_map(cls, label_map: np.ndarray, classes: int) -> ImageFacts:
        """What a label map tells, uint8 [H, W]."""
        return cls(label_map.size, tuple(kept_counts(label_map, classes).tolist()))


class FactsLog:
    """Appends the facts of images to a file, a line each; several threads may."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, sample_id: str, facts: ImageFacts) -> None:
        # The line end comes first: a line that a kill cut off stays a line of its own.
        line = "\n" + json.dumps({"id": sample_id, **facts.to_json()})
        try:
            with self._lock, open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise storage_error(error, self.path) from error


def read_facts_logs(paths: Iterable[Path], classes: int) -> dict[str, ImageFacts]:
    """Id → facts, from logs of one process each; what a kill cut off is passed over, the last of equal ids counts."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                name, facts = entry["id"], ImageFacts.from_json(entry, classes)
            except (ValueError, KeyError, TypeError):
                continue
            found[name] = facts
    return found


@dataclass(frozen=True)
class Predictor:
    """How the predictions of a set of images are come by.

    Attributes:
        read: Sample → what `predict` needs of it; called in threads, ahead.
        predict: (Sample, what was read) → Prediction; called one image at a time.
        folder: where predictions wait for the second pass; None: they are made twice.
    """

    read: Callable[[Sample], Any]
    predict: Callable[[Sample, Any], Prediction]
    folder: Path | None

    def run(
        self,
        samples: Sequence[Sample],
        use: Callable[[Sample, Prediction], object],
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Call `use` with every sample's prediction, in threads behind; new predictions are kept in `folder` first."""

        def read(sample: Sample) -> Any:
            waiting = None if self.folder is None else read_prediction(self.folder, sample.id)
            return self.read(sample) if waiting is None else waiting

        def work(sample: Sample, found: Any) -> tuple[bool, Prediction]:
            if isinstance(found, Prediction):
                return False, found
            return True, self.predict(sample, found)

        def write(sample: Sample, result: tuple[bool, Prediction]) -> None:
            new, prediction = result
            if new and self.folder is not None:
                write_whole(prediction_path(self.folder, sample.id), prediction.to_bytes())
            use(sample, prediction)

        overlapped(samples, read=read, work=work, write=write, advance=advance)


def count_predictions(
    samples: Sequence[Sample],
    classes: int,
    predictor: Predictor,
    scale: ConfidenceScale = FLOAT16,
    advance: Callable[[], object] = lambda: None,
) -> ConfidenceHistogram:
    """Predict every sample and count the confidences; what was predicted before, and waits, is not predicted again.

    Raises StorageError where the disk is full; DataError naming all images that cannot be used, once the others
    are done.
    """
    builder = HistogramBuilder(classes, scale)
    predictor.run(samples, lambda _, prediction: builder.add(prediction), advance)
    return builder.build()


def assign_labels(
    samples: Sequence[Sample],
    thresholds: Thresholds,
    seed: int,
    round_index: int,
    predictor: Predictor,
    labels: Path,
    advance: Callable[[], object] = lambda: None,
    log: FactsLog | None = None,
) -> np.ndarray:
    """Write the label map of every sample to `labels/ID.png`; maps that are there already are only counted.

    Seed, round and an image's id decide its random sampling, nothing else does.

    Args:
        log: gets the facts of each image before its map is written, so that a map that is there has its facts there.

    Returns:
        int64 [K]: pixels labeled per class, over all maps.
    """
    kept = np.zeros(len(thresholds.keep), np.int64)
    lock = threading.Lock()

    def add(label: np.ndarray) -> np.ndarray:
        counts = kept_counts(label, len(kept))
        with lock:
            kept[:] += counts
        return counts

    def write(sample: Sample, prediction: Prediction) -> None:
        label = assign(prediction, thresholds, image_generator(seed, round_index, sample.id))
        counts = add(label)
        if log is not None:
            predicted = count_label_pixels(prediction.classes, len(kept))
            kept_here, predicted_here = tuple(counts.tolist()), tuple(predicted.tolist())
            facts = ImageFacts(prediction.classes.size, kept_here, predicted_here, prediction.mean_confidence)
            log.add(sample.id, facts)
        write_map(label_path(labels, sample.id), label)

    missing = []
    for sample in samples:
        path = label_path(labels, sample.id)
        there = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.exists() else None
        if there is None:
            missing.append(sample)
        else:
            add(there)
            advance()
    predictor.run(missing, write, advance)
    return kept
