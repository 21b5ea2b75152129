"""Label maps of the unlabeled images on the disk: predicted, counted, assigned, written.

Next to `scores`, the only module of this room that touches the disk. Memory does not grow with the number of images:
between counting and assigning, predictions wait in files (3 bytes per pixel before compression), or are made again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from darseg.data.batches import CERTAIN
from darseg.data.files import (
    open_to_append,
    parse_json,
    raise_if_unreadable,
    read_file,
    read_json,
    read_text,
    storage_error,
    write_whole,
)
from darseg.data.manifest import Sample
from darseg.data.maps import is_whole, label_path, labeled_by, path_of_id, write_map
from darseg.data.pipeline import ONE_BY_ONE, Finish, Flow, each, overlapped_groups
from darseg.data.prediction import FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.assign import LabelRule, kept_counts
from darseg.pseudo.distribution import count_label_pixels
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.precision import ExpectedPrecision
from darseg.pseudo.shrink import ShrunkShares
from darseg.pseudo.thresholds import Thresholds

LARGEST_COUNT = 1 << 53
"""Counts of pixels are below this: floats hold them exactly, and sums of many fit into int64."""


@dataclass(frozen=True)
class PseudoLabelSet:
    """A finished set of label maps `ID.png` (uint8 [H, W], 255 = not labeled), and their settings.

    Attributes:
        folder: holds the label maps.
        kept: int64 [K], labeled pixels per class over all maps.
        alignment: the class weights that the decisions were made with; None if they were not aligned.
        expected: how precise held-out images say the labels are; None unless the ratio was auto.
        prior: the class shares aimed at; None if they are those of the labeled images.
    """

    folder: Path
    histogram: ConfidenceHistogram
    thresholds: Thresholds
    kept: NDArray[np.int64]
    alignment: Alignment | None = None
    expected: ExpectedPrecision | None = None
    prior: ShrunkShares | None = None

    def to_json(self) -> dict[str, Any]:
        """Thresholds and counts, each a list of K, and what else the labels followed."""
        described = self.thresholds.to_json() | {"kept": self.kept.tolist()}
        parts = {"alignment": self.alignment, "expected_precision": self.expected, "prior": self.prior}
        for name, value in parts.items():
            if value is not None:
                described[name] = value.to_json()
        return described

    @classmethod
    def load(cls, folder: Path, histogram: Path, thresholds: Path) -> PseudoLabelSet:
        """The set whose maps are in `folder`. Raises DataError if histogram or thresholds are damaged.

        Args:
            histogram: file of `ConfidenceHistogram.to_bytes`.
            thresholds: JSON file of `to_json`.
        """
        path = thresholds
        try:
            content = read_json(thresholds)
            read, kept, alignment = described_labels(content)
            expected = content.get("expected_precision")
            if expected is not None:
                expected = ExpectedPrecision.from_json(expected, len(kept))
            prior = ShrunkShares.from_json(content["prior"]) if "prior" in content else None
            if prior is not None and len(prior.share) != len(kept):
                raise ValueError(f"it shrinks {len(prior.share)} class shares instead of {len(kept)}")
            path = histogram
            counts = ConfidenceHistogram.from_bytes(read_file(histogram))
            if len(counts.counts) != len(kept):
                raise ValueError(f"it counts {len(counts.counts)} classes instead of {len(kept)}")
        except (OSError, ValueError, TypeError, KeyError, OverflowError, DataError) as error:
            raise_if_unreadable(error, path)
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}). Restore it from a copy, or label again."
            ) from error
        return cls(folder, counts, read, kept=kept, alignment=alignment, expected=expected, prior=prior)

    def samples(self, unlabeled: Sequence[Sample]) -> tuple[Sample, ...]:
        """The samples with these label maps instead of any label they had."""
        return labeled_by(self.folder, unlabeled)


def described_labels(described: Any) -> tuple[Thresholds, NDArray[np.int64], Alignment | None]:
    """Thresholds, kept pixels int64 [K], and any alignment of what `PseudoLabelSet.to_json` made.

    Raises DataError, ValueError, TypeError, KeyError or OverflowError for anything else.
    """
    kept, thresholds = np.array(described["kept"]), Thresholds.from_json(described)
    if kept.dtype != np.int64 or kept.shape != thresholds.accept.shape or kept.min(initial=0) < 0:
        raise ValueError("'kept' must be a count for each class")
    if "alignment" not in described:
        return thresholds, kept, None
    alignment = Alignment.from_json(described["alignment"])
    if len(alignment.weights) != len(kept):
        raise ValueError(f"it aligns {len(alignment.weights)} classes instead of {len(kept)}")
    return thresholds, kept, alignment


def prediction_path(folder: Path, sample_id: str) -> Path:
    """Where the prediction of an image waits: `folder/ID.prediction`."""
    return path_of_id(folder, sample_id, ".prediction")


def read_prediction(folder: Path, sample_id: str) -> Prediction | None:
    """A waiting prediction; None if it is missing or damaged and has to be made again."""
    try:
        return Prediction.from_bytes(read_file(prediction_path(folder, sample_id)))
    except (OSError, DataError):
        return None


@dataclass(frozen=True)
class ImageFacts:
    """What labeling counted in one image, so that thousands of images can be sorted by it.

    Attributes:
        pixels: number of pixels of the image.
        kept: labeled pixels per class, K numbers.
        predicted: pixels predicted per class, K numbers; None if only the label map is left.
        confidence: mean confidence over the pixels, in [0, 1]; None if only the label map is left.
    """

    pixels: int
    kept: tuple[int, ...]
    predicted: tuple[int, ...] | None = None
    confidence: float | None = None

    @property
    def coverage(self) -> float:
        """Share of the pixels that are labeled."""
        return sum(self.kept) / max(1, self.pixels)

    def to_json(self) -> dict[str, Any]:
        """Confidence and counts as a JSON object."""
        return {"confidence": self.confidence, "predicted": self.predicted, "kept": self.kept}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], classes: int) -> ImageFacts:
        """What `to_json` made. Raises ValueError, KeyError or TypeError for anything else."""
        predicted, kept = (tuple(entry[key]) for key in ("predicted", "kept"))
        if (len(predicted), len(kept)) != (classes, classes):
            raise ValueError(f"counts of {len(predicted)} and {len(kept)} classes instead of {classes}")
        if not all(type(count) is int and 0 <= count < LARGEST_COUNT for count in (*predicted, *kept)):
            raise ValueError("counts must be whole numbers of pixels")
        confidence = float(entry["confidence"])
        if not 0 <= confidence <= 1:
            raise ValueError(f"the confidence is {confidence}, expected a number from 0 to 1")
        return cls(sum(predicted), kept, predicted, confidence=confidence)

    @classmethod
    def of_map(cls, label_map: np.ndarray, classes: int) -> ImageFacts:
        """What can be counted in a label map alone, uint8 [H, W]."""
        return cls(label_map.size, tuple(kept_counts(label_map, classes).tolist()))

    @classmethod
    def of_labeling(cls, prediction: Prediction, kept: np.ndarray) -> ImageFacts:
        """The facts of a labeled prediction. kept: int64 [K], labeled pixels per class."""
        predicted = count_label_pixels(prediction.classes, len(kept))
        return cls(
            pixels=prediction.classes.size,
            kept=tuple(kept.tolist()),
            predicted=tuple(predicted.tolist()),
            confidence=prediction.mean_confidence,
        )


class FactsLog:
    """Appends the facts of images to a file, one line each. Several threads may use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, sample_id: str, facts: ImageFacts) -> None:
        """Append one image. Raises StorageError if it cannot be written."""
        # The line break comes first, so that a line cut off by a kill does not spoil the next one.
        line = "\n" + json.dumps({"id": sample_id, **facts.to_json()})
        try:
            with self._lock, open_to_append(self.path) as file:
                file.write(line.encode())
        except OSError as error:
            raise storage_error(error, self.path) from error


def read_facts_logs(paths: Iterable[Path], classes: int) -> dict[str, ImageFacts]:
    """Id → facts, from the logs of all processes.

    Lines cut off by a kill are skipped. If an id occurs more than once, its last line counts.
    """
    facts_by_id = {}
    for path in paths:
        for line in read_text(path, errors="replace").splitlines():
            try:
                entry = parse_json(line)
                sample_id, facts = entry["id"], ImageFacts.from_json(entry, classes)
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            facts_by_id[sample_id] = facts
    return facts_by_id


@dataclass(frozen=True)
class Predictor:
    """Where the predictions of a set of images come from.

    Attributes:
        read: Sample → what `predict` needs of it; called ahead, in threads.
        predict: (Sample, what was read) → Prediction; called for one image at a time.
        folder: where predictions wait for the second pass; None: every image is predicted twice.
        written: called when a new prediction is in `folder`.
        groups: predicts groups of images instead; None: each by `predict`.
    """

    read: Callable[[Sample], Any]
    predict: Callable[[Sample, Any], Prediction]
    folder: Path | None
    written: Callable[[Sample], object] = lambda _: None
    groups: Groups | None = None

    @property
    def images(self) -> int:
        """How many consecutive images of a set are predicted as a group, always together."""
        return self._grouped.images

    @property
    def _grouped(self) -> Groups:
        """The groups; without any, each image is one."""
        if self.groups is not None:
            return self.groups
        return Groups(1, self.read, each(lambda task, image: self.predict(task.sample, image)))

    def run(
        self,
        samples: Sequence[Sample],
        use: Callable[[Sample, Prediction], object],
        advance: Callable[[], object] = lambda: None,
        *,
        wanted: Collection[str] | None = None,
    ) -> None:
        """Call `use` with every sample's prediction, in threads; new predictions are first kept in `folder`.

        Args:
            samples: beginning with a whole group, all of the same lengths but the last.
            wanted: ids of the samples to use; None: all. Others are predicted only if they belong to a group that is
                predicted again: without them, the last bits of its scores may differ.
        """
        left = iter(range(len(samples) if wanted is None else len(wanted)))
        groups = self._grouped

        def read(task: _Task) -> Any:
            waiting = read_prediction(self.folder, task.sample.id) if task.waits and self.folder else None
            if waiting is not None:
                return waiting
            return groups.read(task.sample)

        def write(task: _Task, made: _Made) -> None:
            sample = task.sample
            if made.new and self.folder is not None:
                write_whole(prediction_path(self.folder, sample.id), made.prediction.to_bytes())
                self.written(sample)
            if wanted is None or sample.id in wanted:
                use(sample, made.prediction)

        overlapped_groups(
            self._tasks(samples, wanted),
            read=read,
            work=self._work,
            write=write,
            # Images that are not wanted were counted before.
            advance=lambda: next(left, None) is not None and advance(),
            flow=groups.flow,
        )

    def _tasks(self, samples: Sequence[Sample], wanted: Collection[str] | None) -> Iterator[list[_Task]]:
        """Groups of samples, without those of which nothing has to be done."""
        for start in range(0, len(samples), self.images):
            group = samples[start : start + self.images]
            needed = [sample for sample in group if wanted is None or sample.id in wanted]
            waits = self.folder is not None and (
                self.images == 1 or all(prediction_path(self.folder, sample.id).exists() for sample in group)
            )
            if needed:
                yield [_Task(sample, waits) for sample in (needed if waits else group)]

    def _work(self, contents: Iterator[tuple[_Task, Any]]) -> Iterator[tuple[_Task, Finish[_Made]]]:
        """The predictions of a group: those that wait, or new ones."""
        first = next(contents, None)
        if first is None:
            return
        rest = chain([first], contents)
        if not first[0].waits:
            yield from self._new(rest)
            return
        for task, content in rest:
            if isinstance(content, Prediction):
                yield task, partial(_Made, False, content)
            else:  # it did not wait, or was damaged
                yield from self._new(iter([(task, content)]))

    def _new(self, images: Iterator[tuple[_Task, Any]]) -> Iterator[tuple[_Task, Finish[_Made]]]:
        return ((task, partial(_made, finish)) for task, finish in self._grouped.predict(images))


@dataclass(frozen=True)
class Groups:
    """Predicts groups of images.

    Attributes:
        images: how many are a group.
        read: Sample → what `predict` needs of it; called ahead, in threads.
        predict: the images of a group → each with what returns its prediction.
        flow: how many are read ahead and wait to be written.
    """

    images: int
    read: Callable[[Sample], Any]
    predict: Callable[[Iterator[tuple[Any, Any]]], Iterator[tuple[Any, Finish[Prediction]]]]
    flow: Flow = ONE_BY_ONE


@dataclass(frozen=True, eq=False)
class _Task:
    """An image to predict; or its prediction may wait, and is used if so."""

    sample: Sample
    waits: bool


@dataclass(frozen=True, eq=False)
class _Made:
    """A prediction, and whether it was made now."""

    new: bool
    prediction: Prediction


def _made(finish: Finish[Prediction]) -> _Made:
    return _Made(True, finish())


def count_predictions(
    samples: Sequence[Sample],
    classes: int,
    predictor: Predictor,
    *,
    scale: ConfidenceScale = FLOAT16,
    advance: Callable[[], object] = lambda: None,
) -> ConfidenceHistogram:
    """Predict every sample whose prediction is not stored yet, and count the confidences of all.

    Raises:
        StorageError: the disk is full.
        DataError: names all images that cannot be used, after all others are done.
    """
    builder = HistogramBuilder(classes, scale)
    predictor.run(samples, lambda _, prediction: builder.add(prediction), advance)
    return builder.build()


def assign_labels(
    samples: Sequence[Sample],
    rule: LabelRule,
    predictor: Predictor,
    *,
    labels: Path,
    confidences: Path | None = None,
    log: FactsLog | None = None,
    advance: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Write the label map of every sample to `labels/ID.png`; maps that exist already are only counted.

    Args:
        confidences: folder for a map of how sure each image's prediction is, uint8; None: it is not written.
        log: gets the facts of each image before its map is written, so that every map that exists has its facts, and its
            confidences.

    Returns:
        int64 [K]: labeled pixels per class over all maps.
    """
    kept = np.zeros(len(rule.thresholds.keep), np.int64)
    lock = threading.Lock()

    def count(label_map: np.ndarray) -> np.ndarray:
        counts = kept_counts(label_map, len(kept))
        with lock:
            kept[:] += counts
        return counts

    def write(sample: Sample, prediction: Prediction) -> None:
        label_map = rule.label_map(prediction, sample.id)
        counts = count(label_map)
        if log is not None:
            log.add(sample.id, ImageFacts.of_labeling(prediction, counts))
        if confidences is not None:
            sureness = np.round(CERTAIN * prediction.scale.confidence(prediction.codes)).astype(np.uint8)
            write_map(label_path(confidences, sample.id), sureness)
        write_map(label_path(labels, sample.id), label_map)

    missing = set()
    for sample in samples:
        path = label_path(labels, sample.id)
        existing = _read_map(path)
        if existing is None or not (confidences is None or is_whole(label_path(confidences, sample.id))):
            missing.add(sample.id)
        else:
            count(existing)
            advance()
    predictor.run(samples, write, advance, wanted=missing)
    return kept


def _read_map(path: Path) -> np.ndarray | None:
    """A label map that was written before; None if it is missing or damaged and has to be made again."""
    try:
        if not is_whole(path):
            return None
        return cv2.imdecode(np.frombuffer(read_file(path), np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        return None
