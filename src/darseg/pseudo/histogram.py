"""Exact counts of confidences per predicted class.

A float16 in [0, 1] has 15,361 values, so counting them loses nothing: every order statistic of the
confidences can be read from the counts. The release sorts a list of every pixel's confidence instead.
The fine scale has 65,536 codes, counted in the same way.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16, SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.pseudo.distribution import check_class_count


@dataclass(frozen=True, eq=False)
class ConfidenceHistogram:
    """How many pixels were predicted as class k with confidence code c. Histograms of parts add up with `+`.

    counts: int64 [K, codes of the scale], none negative; K from 2 to 255. Copied, read-only. Raises DataError
        otherwise.
    """

    counts: NDArray[np.int64]
    scale: ConfidenceScale = FLOAT16

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
        if counts.dtype != np.int64 or counts.ndim != 2 or counts.shape[1] != self.scale.codes:
            raise DataError(
                f"Histogram counts are {counts.dtype} {list(counts.shape)}: give int64 [K, {self.scale.codes}]."
            )
        check_class_count(len(counts))
        if counts.min() < 0:
            raise DataError(
                f"{np.count_nonzero(counts < 0)} histogram counts are negative: the histogram is damaged."
            )
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    @classmethod
    def empty(cls, classes: int, scale: ConfidenceScale = FLOAT16) -> ConfidenceHistogram:
        """No pixel counted yet."""
        return HistogramBuilder(classes, scale).build()

    @classmethod
    def count(cls, prediction: Prediction, classes: int) -> ConfidenceHistogram:
        """The pixels of one image. Raises DataError when a predicted class is not below `classes`."""
        builder = HistogramBuilder(classes, prediction.scale)
        builder.add(prediction)
        return builder.build()

    @classmethod
    def from_bytes(cls, data: bytes) -> ConfidenceHistogram:
        """What `to_bytes` made. Raises DataError when it is damaged or something else. Never unpickles."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                name = archive.files[0].removesuffix("_counts")
                counts, scale = archive[archive.files[0]], SCALES[name]
        except (
            Exception
        ) as error:  # zip, zlib and numpy raise a dozen kinds for damaged bytes; all mean the same
            raise DataError(
                f"These {len(data)} bytes are not a confidence histogram ({type(error).__name__}: {error}): "
                "the file is damaged or another kind; count the predictions again."
            ) from error
        return cls(counts, scale)

    def to_bytes(self) -> bytes:
        """A compressed npz; equal histograms give equal bytes."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{f"{self.scale.name}_counts": self.counts})  # ty: ignore[invalid-argument-type]
        return buffer.getvalue()

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64 [K]: pixels predicted as each class."""
        return self.counts.sum(axis=1)

    def __add__(self, other: ConfidenceHistogram) -> ConfidenceHistogram:
        if self.counts.shape != other.counts.shape:
            raise DataError(
                f"Histograms of {len(self.counts)} and {len(other.counts)} classes, on the scales {self.scale.name} and "
                f"{other.scale.name}, cannot be added: count both with the same classes and scale."
            )
        return ConfidenceHistogram(self.counts + other.counts, self.scale)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfidenceHistogram) and np.array_equal(self.counts, other.counts)


class HistogramBuilder:
    """Counts predictions one after the other, in constant memory: 8 bytes · K · codes of the scale.

    May be used from several threads at once.
    """

    def __init__(self, classes: int, scale: ConfidenceScale = FLOAT16) -> None:
        check_class_count(classes)
        self.scale = scale
        self._counts = np.zeros((classes, scale.codes), np.int64)
        self._lock = threading.Lock()

    def add(self, prediction: Prediction) -> None:
        """Count the pixels of one image. Raises DataError when a predicted class is not below K."""
        check_predicted_classes(prediction, len(self._counts))
        if prediction.scale is not self.scale:
            raise DataError(
                f"A prediction on the scale {prediction.scale.name} cannot be counted on {self.scale.name}."
            )
        cells = prediction.classes.astype(np.int64).ravel()
        cells *= self.scale.codes
        cells += prediction.codes.ravel()
        counted = np.bincount(cells)
        with self._lock:
            self._counts.reshape(-1)[: len(counted)] += counted

    def build(self) -> ConfidenceHistogram:
        """What has been counted so far."""
        return ConfidenceHistogram(self._counts, self.scale)


def check_predicted_classes(prediction: Prediction, classes: int) -> None:
    """Raise DataError when a predicted class is not below `classes`."""
    if prediction.classes.size and (largest := int(prediction.classes.max())) >= classes:
        raise DataError(
            f"A prediction contains class {largest}, but there are {classes} classes (0..{classes - 1}): "
            "the network was built for other classes than these."
        )
