"""What a network predicts for one image: a class and a confidence for every pixel."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from darseg.data.files import parse_json
from darseg.errors import DataError

LARGEST = 3 << 30
"""Bytes of a stored prediction unpacked: three for each pixel of the largest picture that is read."""

FINE_LOWEST = -8.0
"""Log-odds of code 0 of the fine scale. The largest of K <= 255 probabilities is at least 1/255: log-odds -5.5."""
FINE_STEPS = 1024
"""Codes per unit of log-odds, so that 65,536 codes reach from -8 to 56."""


@dataclass(frozen=True)
class ConfidenceScale:
    """How confidences are coded as uint16, so that they can be counted exactly.

    Attributes:
        codes: number of codes, 0 to codes - 1, in the order of the confidences.
    """

    name: str
    codes: int

    def confidence(self, codes: NDArray[np.integer]) -> NDArray[np.float64]:
        """The confidences in [0, 1] of codes, of any shape."""
        if self is FLOAT16:
            return np.asarray(codes).astype(np.uint16).view(np.float16).astype(np.float64)
        return 1 / (1 + np.exp(-(np.asarray(codes, np.float64) / FINE_STEPS + FINE_LOWEST)))

    def at_least(self, confidence: float) -> int:
        """The smallest code whose confidence is at least `confidence`; `codes` if there is none."""
        return int(np.searchsorted(self.confidence(np.arange(self.codes)), confidence))


FLOAT16 = ConfidenceScale("float16", 15361)
"""Bit patterns of float16, 0 (0.0) to 15360 (1.0), as the paper measured; from 0.99976 on all round to 1.0."""

FINE = ConfidenceScale("fine", 65536)
"""Log-odds ln(p / (1 - p)) from -8 to 56 in steps of 1/1024, rounded to the nearest.

The error is at most 1/2048 in log-odds, so at most p(1 - p)/2048 <= 1.3e-4 in probability, and relative to 1 - p at
most 1/2048, however small 1 - p is. Ties nearly vanish.
"""

BYTES_PER_PIXEL = 3
"""Size of a prediction before compression: 1 byte for the class, 2 for the confidence code."""

SCALES = {scale.name: scale for scale in (FLOAT16, FINE)}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The most probable class of every pixel and its probability.

    Attributes:
        classes: uint8 [H, W], class indices.
        codes: uint16 [H, W], confidences as codes of `scale` (FLOAT16: bit patterns; FINE: log-odds).

    The arrays are not copied; they are read-only through this object.

    Raises DataError for wrong types or shapes, and for codes that are not confidences. A logit above 65504 is infinite in
    float16 and makes the softmax NaN, which is refused here; a logit below -65504 gives probability 0.
    """

    classes: NDArray[np.uint8]
    codes: NDArray[np.uint16]
    scale: ConfidenceScale = FLOAT16

    def __post_init__(self) -> None:
        for name, dtype in (("classes", np.uint8), ("codes", np.uint16)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 2:
                kind = (
                    f"{array.dtype} {list(array.shape)}"
                    if isinstance(array, np.ndarray)
                    else f"a {type(array).__name__}"
                )
                raise DataError(f"Prediction.{name} is {kind}. Give a numpy array, {dtype.__name__} [H, W].")
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)
        if self.classes.shape != self.codes.shape:
            raise DataError(
                f"The prediction has classes of shape {list(self.classes.shape)}, but confidence codes of shape "
                f"{list(self.codes.shape)}. Give both for the same pixels."
            )
        largest = int(self.codes.max(initial=0))
        if largest >= self.scale.codes:
            invalid = np.count_nonzero(self.codes >= self.scale.codes)
            raise DataError(
                f"{invalid} of {self.codes.size} confidence codes are above {self.scale.codes - 1} (the largest is "
                f"{largest}), so they are not confidences in [0, 1]. Logits that are NaN or too large for float16 are "
                "the usual cause. Check whether training diverged."
            )

    @property
    def confidence(self) -> NDArray[np.float32]:
        """The confidence of every pixel, float32 [H, W], in [0, 1]."""
        return self.scale.confidence(self.codes).astype(np.float32)

    @property
    def mean_confidence(self) -> float:
        """The mean over all pixels; counted by code, which is faster than converting every pixel to a float."""
        counts = np.bincount(self.codes.ravel())
        return float(counts @ self.scale.confidence(np.arange(len(counts))) / max(1, self.codes.size))

    def to_bytes(self) -> bytes:
        """The prediction, compressed; equal predictions give equal bytes.

        Neighboring pixels are alike, so the differences along a row are stored, with low and high bytes apart.
        """
        height, width = self.classes.shape
        steps = np.diff(self.codes, axis=1, prepend=np.uint16(0))
        low, high = steps.astype(np.uint8), (steps >> 8).astype(np.uint8)
        head = json.dumps({"scale": self.scale.name, "height": height, "width": width}).encode() + b"\n"
        body = b"".join(part.tobytes() for part in (self.classes, high, low))
        # With a checksum, so that part of a file on a failing disk does not pass for the whole.
        return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(head + body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Prediction:
        """The prediction that `to_bytes` wrote. Raises DataError if the bytes are damaged or something else."""
        try:
            if not 0 <= (size := zstandard.frame_content_size(data)) <= LARGEST:
                raise ValueError(f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most")
            head, body = zstandard.ZstdDecompressor().decompress(data).split(b"\n", 1)
            about = parse_json(head.decode())
            parts = np.frombuffer(body, np.uint8).reshape(3, about["height"], about["width"])
            steps = parts[1].astype(np.uint16)
            steps <<= 8
            steps |= parts[2]
            return cls(parts[0], np.cumsum(steps, axis=1, dtype=np.uint16), SCALES[about["scale"]])
        except (zstandard.ZstdError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DataError(
                f"These {len(data)} bytes are not a stored prediction ({type(error).__name__}: {error}). Predict the "
                "image again."
            ) from error
