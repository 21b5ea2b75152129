"""A seeded sample of the pixels of many images, in constant memory."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError
from darseg.pseudo.distribution import check_class_count

PIXELS = 1 << 20
"""Most pixels in a sample: the standard error of a share is at most 0.5 / sqrt(2^19) = 0.0007, if half of them remain."""
SCORES = 1 << 26
"""Most scores in a sample, 128 MiB of float16; with more than 64 classes, fewer pixels are kept."""
LEVELS = 65
"""Levels of thinning: at level n, 1 of 2^n pixels is kept."""
FAR = -1000.0
"""Scores that are further below the largest are raised to this, so that float16 holds them."""


def sample_limit(classes: int) -> int:
    """Most pixels in a sample of scores of so many classes."""
    return min(PIXELS, SCORES // classes)


class PixelSample:
    """Collects scores of pixels, which a hash of seed, image id and position chooses.

    At level n, pixels are kept whose hash is below 2^(64 - n): 1 of 2^n, each with the same chance. The level rises when
    more than `limit` pixels are kept; so the sample is that of the lowest level at which all images together fit,
    whatever their order, and the samples of several processes join. If at least `limit` pixels were added, about half
    of the limit or more are kept. Several threads may use it at once.

    Args:
        limit: most pixels that are kept, and never more than `sample_limit`; None: that many.
    """

    def __init__(self, classes: int, seed: int, limit: int | None = None) -> None:
        check_class_count(classes)
        self.classes, self.seed = classes, seed
        self.limit = min(sample_limit(classes), PIXELS if limit is None else limit)
        self.level = 0
        self._hashes: list[NDArray[np.uint64]] = []
        self._columns: list[NDArray[np.float16]] = []
        self._lock = threading.Lock()

    def add(
        self, sample_id: str, scores_KHW: NDArray, *, probabilities: bool = False, name: str | None = None
    ) -> None:
        """Add the pixels of one image that the hash chooses.

        Args:
            scores_KHW: logits, float16 or float32; with `probabilities` their softmax.
            name: of the image, for error messages; None: its id.

        Raises DataError if the number of classes differs, or scores of chosen pixels are NaN or infinite.
        """
        name = name or sample_id
        if scores_KHW.ndim != 3 or len(scores_KHW) != self.classes:
            raise DataError(
                f"{name}: the scores have shape {list(scores_KHW.shape)}; expected [{self.classes}, H, W]."
            )
        hashes = pixel_hashes(self.seed, sample_id, scores_KHW[0].size)
        with self._lock:
            while True:
                chosen = np.flatnonzero(_is_kept(hashes, self.level))
                if self._size + len(chosen) <= self.limit:
                    break
                self._thin(self.level + 1)
            scores = scores_KHW.reshape(self.classes, -1)[:, chosen].astype(np.float32)
            if not np.isfinite(scores.sum(dtype=np.float64)):
                count = np.count_nonzero(~np.isfinite(scores))
                raise DataError(
                    f"{name}: {count} of {scores.size} scores that were looked at are NaN or infinite. Predict this "
                    "image again; if the scores are the same, the network has diverged."
                )
            self._hashes.append(hashes[chosen])
            self._columns.append(_relative(scores, probabilities))

    def sizes(self) -> NDArray[np.int64]:
        """int64 [LEVELS]: pixels kept at each level; more than the limit at levels that are passed already."""
        sizes = np.full(LEVELS, self.limit + 1, np.int64)
        for level in range(self.level, LEVELS):
            sizes[level] = sum(np.count_nonzero(_is_kept(hashes, level)) for hashes in self._hashes)
        return sizes

    def rows(self, sizes: NDArray[np.int64]) -> NDArray[np.float16]:
        """Hand over the sample, of the lowest level that fits, which is then empty.

        Scores are relative to the largest of their pixel, float16 [N, K].

        Args:
            sizes: of the whole sample; the sum of `sizes()` over all processes.
        """
        level = int(np.flatnonzero(sizes <= self.limit)[0])
        with self._lock:
            self._thin(level)
            columns = np.concatenate([np.empty((self.classes, 0), np.float16), *self._columns], axis=1)
            self._hashes, self._columns = [], []
            return columns.T

    @property
    def _size(self) -> int:
        return sum(map(len, self._hashes))

    def _thin(self, level: int) -> None:
        self.level = level
        for index, hashes in enumerate(self._hashes):
            kept = _is_kept(hashes, level)
            self._hashes[index], self._columns[index] = hashes[kept], self._columns[index][:, kept]


def pixel_hashes(seed: int, sample_id: str, pixels: int) -> NDArray[np.uint64]:
    """A number for each pixel of an image, uint64 [H · W], uniform over all of them (splitmix64).

    It depends on seed, id and position alone.
    """
    name = json.dumps(["darseg.pseudo.pixel_sample", int(seed), sample_id])
    start = np.frombuffer(hashlib.sha256(name.encode("ascii")).digest()[:8], "<u8")[0]
    z = np.arange(1, pixels + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def _is_kept(hashes: NDArray[np.uint64], level: int) -> NDArray[np.bool_]:
    if level == 0:
        return np.ones(len(hashes), np.bool_)
    if level == LEVELS - 1:
        return np.zeros(len(hashes), np.bool_)
    return hashes < np.uint64(1 << (64 - level))


def _relative(scores: NDArray[np.float32], probabilities: bool) -> NDArray[np.float16]:
    """Logits or log-probabilities, relative to the largest of their pixel, [K, N] → float16 [K, N]."""
    if probabilities:
        scores = np.log(scores.clip(1e-30, None))
    scores -= scores.max(axis=0)
    return np.maximum(scores, np.float32(FAR), out=scores).astype(np.float16)
