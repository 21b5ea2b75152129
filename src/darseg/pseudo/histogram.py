"""Exact counts of confidences per predicted class.

There are 15,361 float16 values in [0, 1], so counting them loses nothing: every order statistic of the
confidences can be read from the counts. The release sorts a list of every pixel's confidence instead.
The fine scale has 65,536 codes, counted in the same way.
"""

from __future__ import annotations

import io
import threading
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16, SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.pseudo.distribution import check_class_count

LARGEST = 1 << 28
"""Bytes of counts in a file: 255 classes on the fine scale need half of it."""


@dataclass(frozen=True, eq=False)
class ConfidenceHistogram:
    """How many pixels were predicted as class k with confidence code c. Histograms add up with `+`.

    Attributes:
        counts: int64 [K, codes of the scale], none negative, K from 2 to 255; copied and read-only.

    Raises DataError for other counts.
    """

    counts: NDArray[np.int64]
    scale: ConfidenceScale = FLOAT16

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
        if counts.dtype != np.int64 or counts.ndim != 2 or counts.shape[1] != self.scale.codes:
            raise DataError(
                f"Histogram counts are {counts.dtype} {list(counts.shape)}; expected int64 [K, {self.scale.codes}]."
            )
        check_class_count(len(counts))
        if counts.min() < 0:
            raise DataError(
                f"{np.count_nonzero(counts < 0)} histogram counts are negative. The histogram is damaged; count again."
            )
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)

    @classmethod
    def empty(cls, classes: int, scale: ConfidenceScale = FLOAT16) -> ConfidenceHistogram:
        """A histogram that counts no pixels."""
        return HistogramBuilder(classes, scale).build()

    @classmethod
    def count(cls, prediction: Prediction, classes: int) -> ConfidenceHistogram:
        """The histogram of one image. Raises DataError if a predicted class is not below `classes`."""
        builder = HistogramBuilder(classes, prediction.scale)
        builder.add(prediction)
        return builder.build()

    @classmethod
    def from_bytes(cls, data: bytes) -> ConfidenceHistogram:
        """The histogram that `to_bytes` wrote. Raises DataError for other bytes. Never unpickles."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as members:
                if (size := sum(member.file_size for member in members.infolist())) > LARGEST:
                    raise ValueError(f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                name = archive.files[0].removesuffix("_counts")
                counts, scale = archive[archive.files[0]], SCALES[name]
        except (
            Exception
        ) as error:  # zip, zlib and numpy raise a dozen kinds for damaged bytes; all mean the same
            raise DataError(
                f"These {len(data)} bytes are not a confidence histogram ({type(error).__name__}: {error}). The file "
                "is damaged or of another kind; count the predictions again."
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
                f"{other.scale.name}, cannot be added. Count both with the same classes and scale."
            )
        return ConfidenceHistogram(self.counts + other.counts, self.scale)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfidenceHistogram) and np.array_equal(self.counts, other.counts)


class HistogramBuilder:
    """Counts predictions one after the other in constant memory: 8 bytes · K · codes of the scale.

    Several threads may use it at once.
    """

    def __init__(self, classes: int, scale: ConfidenceScale = FLOAT16) -> None:
        check_class_count(classes)
        self.scale = scale
        self._counts = np.zeros((classes, scale.codes), np.int64)
        self._lock = threading.Lock()

    def add(self, prediction: Prediction) -> None:
        """Count the pixels of one image. Raises DataError if a predicted class is not below K."""
        check_predicted_classes(prediction, len(self._counts))
        if prediction.scale is not self.scale:
            raise DataError(
                f"A prediction on the confidence scale {prediction.scale.name} cannot be counted on the scale "
                f"{self.scale.name}. Predict and count on the same scale."
            )
        cells = prediction.classes.astype(np.int64).ravel()
        cells *= self.scale.codes
        cells += prediction.codes.ravel()
        counted = np.bincount(cells)
        with self._lock:
            self._counts.reshape(-1)[: len(counted)] += counted

    def build(self) -> ConfidenceHistogram:
        """The histogram of everything counted so far."""
        return ConfidenceHistogram(self._counts, self.scale)


def check_predicted_classes(prediction: Prediction, classes: int) -> None:
    """Raise DataError if a predicted class is not below `classes`."""
    if prediction.classes.size and (largest := int(prediction.classes.max())) >= classes:
        raise DataError(
            f"A prediction contains class {largest}, but there are only {classes} classes (0..{classes - 1}). Use a "
            "network that was built for these classes."
        )
