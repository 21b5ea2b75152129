"""Scores of all classes, which are needed until the class weights of aligned decisions are known.

Weights follow from all images, and a pixel's class and confidence follow from its K scores and the weights. So the
scores of a network wait in files between the first pass and the second, or it predicts again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from darseg.data.files import parse_json, read_file, write_whole
from darseg.data.manifest import Sample
from darseg.data.maps import path_of_id
from darseg.data.pipeline import overlapped
from darseg.data.prediction import ConfidenceScale, Prediction
from darseg.errors import DataError
from darseg.model.decide import decide_normalized, scores_dtype
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.pixel_sample import PixelSample

LARGEST = 2 << 30
"""Bytes of stored scores unpacked. Larger ones are made again."""

DTYPES = {name: np.dtype(name) for name in ("float16", "float32")}

SCORES_VERSION = 2
"""Of the arithmetic from scores to predictions: what waits was made by the same, or is made again."""


def scores_bytes_per_pixel(classes: int, scale: ConfidenceScale) -> int:
    """Size of the waiting scores of a pixel before compression, which takes off about 45%."""
    return classes * scores_dtype(scale).itemsize


def scores_path(folder: Path, sample_id: str) -> Path:
    """Where the scores of an image wait: `folder/ID.scores`."""
    return path_of_id(folder, sample_id, ".scores")


def scores_to_bytes(scores_KHW: NDArray) -> bytes:
    """float16 or float32 scores, compressed; equal scores give equal bytes.

    As in `Prediction.to_bytes`, the differences along a row are stored, with the bytes of each size apart.
    """
    bits = np.ascontiguousarray(scores_KHW).view(_bits(scores_KHW.dtype))
    steps = np.diff(bits, axis=-1, prepend=bits.dtype.type(0))
    head = json.dumps({"dtype": scores_KHW.dtype.name, "shape": scores_KHW.shape}).encode() + b"\n"
    planes = np.moveaxis(steps.view(np.uint8).reshape(*steps.shape, steps.itemsize), -1, 0)
    body = b"".join(plane.tobytes() for plane in planes)
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(head + body)


def scores_from_bytes(data: bytes) -> NDArray:
    """The scores that `scores_to_bytes` wrote.

    Raises DataError if the bytes are damaged or something else.
    """
    try:
        if not 0 <= (size := zstandard.frame_content_size(data)) <= LARGEST:
            raise ValueError(f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most")
        head, body = zstandard.ZstdDecompressor().decompress(data).split(b"\n", 1)
        about = parse_json(head.decode())
        dtype, (classes, height, width) = DTYPES[about["dtype"]], about["shape"]
        planes = np.frombuffer(body, np.uint8).reshape(dtype.itemsize, classes, height, width)
        steps = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(_bits(dtype))[..., 0]
        return np.cumsum(steps, axis=-1, dtype=steps.dtype).view(dtype)
    except (zstandard.ZstdError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            f"These {len(data)} bytes are not stored scores ({type(error).__name__}: {error}). Predict the image again."
        ) from error


def read_waiting_scores(folder: Path, sample_id: str) -> NDArray | None:
    """Waiting scores; None if they are missing or damaged and have to be made again."""
    try:
        return scores_from_bytes(read_file(scores_path(folder, sample_id)))
    except (OSError, DataError):
        return None


@dataclass(frozen=True)
class ScoreSource:
    """Where the scores of a set of images come from, and how they become predictions.

    Attributes:
        read: Sample → what `score` needs of it; called ahead, in threads.
        score: (Sample, what was read) → float16 or float32 [K, H, W]; called for one image at a time.
        decide: (Sample, scores, weights float64 [K]) → Prediction.
        plain: (Sample, what was read) → Prediction without weights.
        scores: folder where scores wait for the weights; None: they are read or made again.
        predictions: folder where aligned predictions wait for the thresholds; None: they are made again.
        probabilities: scores are probabilities, after softmax.
    """

    read: Callable[[Sample], Any]
    score: Callable[[Sample, Any], NDArray]
    decide: Callable[[Sample, NDArray, NDArray[np.float64]], Prediction]
    plain: Callable[[Sample, Any], Prediction]
    scores: Path | None = None
    predictions: Path | None = None
    probabilities: bool = False

    def collect(
        self,
        samples: Sequence[Sample],
        pixels: PixelSample,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        """Add the scores of every sample to a sample of pixels; new scores are kept in `scores`.

        Raises:
            StorageError: the disk is full.
            DataError: names all images that cannot be used, after all others are done.
        """

        def work(sample: Sample, content: Any) -> NDArray | None:
            scores = self._scores(sample, content)
            pixels.add(sample.id, scores, probabilities=self.probabilities, name=str(sample.image))
            return None if isinstance(content, _Waiting) else scores

        def write(sample: Sample, new: NDArray | None) -> None:
            if new is not None and self.scores is not None:
                write_whole(scores_path(self.scores, sample.id), scores_to_bytes(new))

        overlapped(samples, read=self._read, work=work, write=write, advance=advance)

    def predictor(self, weights: NDArray[np.float64] | None) -> Predictor:
        """The predictor of these images with class weights.

        Waiting scores are removed as soon as predictions wait instead.

        Args:
            weights: None: as if nothing was to be aligned, bit for bit. Scores that wait are of no use for that.
        """

        def predict(sample: Sample, content: Any) -> Prediction:
            assert weights is not None
            return self.decide(sample, self._scores(sample, content), weights)

        def written(sample: Sample) -> None:
            if self.scores is not None:
                scores_path(self.scores, sample.id).unlink(missing_ok=True)

        if weights is None:
            return Predictor(self.read, self.plain, self.predictions, written=written)
        return Predictor(self._read, predict, self.predictions, written=written)

    def plainly(self) -> Predictor:
        """The predictor of these images with all class weights 1, from the same scores as `normalized`."""

        def predict(sample: Sample, content: Any) -> Prediction:
            scores = self._scores(sample, content)
            return self.decide(sample, scores, np.ones(len(scores)))

        return Predictor(self._read, predict, None)

    def normalized(self, thresholds: NDArray[np.float64]) -> Predictor:
        """The predictor that decides by probability / threshold; see `decide_normalized`."""

        def predict(sample: Sample, content: Any) -> Prediction:
            scores = torch.from_numpy(self._scores(sample, content))
            return decide_normalized(scores, thresholds, probabilities=self.probabilities)

        return Predictor(self._read, predict, None)

    def _read(self, sample: Sample) -> Any:
        waiting = None if self.scores is None else read_waiting_scores(self.scores, sample.id)
        return self.read(sample) if waiting is None else _Waiting(waiting)

    def _scores(self, sample: Sample, content: Any) -> NDArray:
        return content.scores_KHW if isinstance(content, _Waiting) else self.score(sample, content)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Scores that were made before."""

    scores_KHW: NDArray


def _bits(dtype: np.dtype) -> np.dtype:
    """Whole numbers of the same size."""
    return np.dtype(f"u{dtype.itemsize}")
