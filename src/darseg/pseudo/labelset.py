"""Label maps of the unlabelled images on the disk: predicted, counted, decided, assigned, written.

The only module of this room that touches the disk. Memory does not grow with the number of images: between
counting and assigning, predictions wait in files (3 bytes a pixel before compression).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from darseg.data.files import write_whole
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.thresholds import Thresholds


@dataclass(frozen=True)
class PseudoLabelSet:
    """A finished set of label maps `ID.png` (uint8 [H, W], 255 = not labelled) and how it came about.

    Attributes:
        kept: int64 [K], pixels labelled per class, over all maps.
    """

    folder: Path
    histogram: ConfidenceHistogram
    thresholds: Thresholds
    kept: np.ndarray

    def save(self, histogram: Path, thresholds: Path) -> None:
        """Write histogram (npz) and thresholds (JSON, with the counts kept), each whole."""
        write_whole(histogram, self.histogram.to_bytes())
        described = self.thresholds.to_json() | {"kept": self.kept.tolist()}
        write_whole(thresholds, json.dumps(described, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, histogram: Path, thresholds: Path) -> PseudoLabelSet:
        """What `save` wrote. Raises DataError where it is damaged."""
        described = json.loads(thresholds.read_text())
        kept = np.array(described["kept"], np.int64)
        counts = ConfidenceHistogram.from_bytes(histogram.read_bytes())
        return cls(folder, counts, Thresholds.from_json(described), kept)

    def samples(self, unlabeled: Sequence[Sample]) -> tuple[Sample, ...]:
        """The samples with these label maps in place of any label they had: like any other samples."""
        return tuple(replace(sample, label=label_path(self.folder, sample.id)) for sample in unlabeled)


def label_path(folder: Path, sample_id: str) -> Path:
    """Where the label map of an image lies."""
    return folder / f"{sample_id}.png"


def write_map(path: Path, values: np.ndarray) -> None:
    """Write an 8- or 16-bit map as PNG, whole. OpenCV's default settings are its fastest."""
    encoded, data = cv2.imencode(".png", values)
    if not encoded:
        raise DataError(f"{path}: a map of shape {values.shape} and type {values.dtype} cannot be a PNG.")
    write_whole(path, data.tobytes())


def _store(folder: Path, sample_id: str, prediction: Prediction) -> None:
    # The class map is written second: where it is there, both are.
    write_map(folder / f"{sample_id}.codes.png", prediction.codes)
    write_map(folder / f"{sample_id}.classes.png", prediction.classes)


def _stored(folder: Path, sample_id: str) -> Prediction | None:
    path = folder / f"{sample_id}.classes.png"
    if not path.exists():
        return None
    classes = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    codes = cv2.imread(str(folder / f"{sample_id}.codes.png"), cv2.IMREAD_UNCHANGED)
    if classes is None or codes is None:  # damaged from outside: predicted again
        return None
    return Prediction(classes.astype(np.uint8, copy=False), codes.astype(np.uint16, copy=False))


def count_predictions(
    samples: Sequence[Sample],
    classes: int,
    predict: Callable[[Sample], Prediction],
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> ConfidenceHistogram:
    """Predict every sample, keep the predictions in `folder`, count their confidences.

    Args:
        predict: Sample → Prediction; called only for images whose prediction is not in `folder` yet, so
            killed and called again this goes on where it was.
        advance: called after each image.

    Raises StorageError where the disk is full.
    """
    builder = HistogramBuilder(classes)
    for sample in samples:
        prediction = _stored(folder, sample.id)
        if prediction is None:
            prediction = predict(sample)
            _store(folder, sample.id, prediction)
        builder.add(prediction)
        advance()
    return builder.build()


def assign_labels(
    samples: Sequence[Sample],
    thresholds: Thresholds,
    seed: int,
    round_index: int,
    predictions: Path,
    labels: Path,
    advance: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Write the label map of every sample to `labels/ID.png` from the predictions that wait in a folder.

    Seed, round and an image's id decide its random sampling, nothing else does.

    Returns:
        int64 [K]: pixels labelled per class, over all maps.
    """
    kept = np.zeros(len(thresholds.keep), np.int64)
    for sample in samples:
        prediction = _stored(predictions, sample.id)
        if prediction is None:
            raise DataError(
                f"{predictions}: the prediction of {sample.id!r} vanished while labelling; run again."
            )
        label = assign(prediction, thresholds, image_generator(seed, round_index, sample.id))
        write_map(label_path(labels, sample.id), label)
        kept += kept_counts(label, len(kept))
        advance()
    return kept
