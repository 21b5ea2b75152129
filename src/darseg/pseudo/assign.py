"""One image's prediction to its pseudo-label map."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.distribution import count_label_pixels
from darseg.pseudo.histogram import check_predicted_classes
from darseg.pseudo.thresholds import Thresholds


@dataclass(frozen=True)
class LabelRule:
    """How predictions become label maps: by thresholds, with random sampling by seed, round and image id."""

    thresholds: Thresholds
    seed: int
    round_index: int = 0

    def label_map(self, prediction: Prediction, sample_id: str) -> NDArray[np.uint8]:
        """The label map of one image, uint8 [H, W]; see `assign`."""
        return assign(prediction, self.thresholds, image_generator(self.seed, self.round_index, sample_id))


def assign(
    prediction: Prediction, thresholds: Thresholds, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """The label map of one image, uint8 [H, W]: the predicted class, or 255 where not labeled.

    Pixels below their class's threshold become 255. Of the m accepted pixels of class k in this image,
    int(m - m·keep_k), drawn uniformly at random from all of them, become 255 as well (DARS, section 3.3);
    product and difference are rounded to float32, as in the release.

    Args:
        generator: is drawn from class by class; give each image its own (`image_generator`).

    Raises:
        DataError: a predicted class is not among the thresholds, or their confidence scales differ.
    """
    check_predicted_classes(prediction, len(thresholds.accept))
    if prediction.scale is not thresholds.scale:
        raise DataError(
            f"The prediction is on the confidence scale {prediction.scale.name}, the thresholds are on "
            f"{thresholds.scale.name}. Choose the thresholds from a histogram of these predictions."
        )
    # A class that accepts nothing may have a code beyond 16 bits; its kept share, 0, then drops every pixel.
    lowest = np.minimum(thresholds.accept, 65535).astype(np.uint16)[prediction.classes]
    labels = np.where(prediction.codes >= lowest, prediction.classes, np.uint8(IGNORE))
    flat = labels.ravel()  # row by row whatever the memory layout, since positions decide what is drawn
    accepted = np.bincount(flat, minlength=IGNORE + 1)
    for k, keep in enumerate(thresholds.keep):
        count = int(accepted[k])
        dropped = _drop_count(count, keep)
        if dropped == 0:
            continue
        pixels = np.flatnonzero(flat == k)
        if dropped <= count - dropped:
            flat[pixels[_draw(generator, count, dropped)]] = IGNORE
        else:  # drawing the kept pixels instead is equivalent and draws fewer
            kept = pixels[_draw(generator, count, count - dropped)]
            flat[pixels] = IGNORE
            flat[kept] = k
    return flat.reshape(labels.shape)


def image_generator(seed: int, round_index: int, sample_id: str) -> np.random.Generator:
    """The source of randomness for one image in one round.

    It depends on these three alone, so neither the order of images nor the number of processes matters.
    """
    name = json.dumps(["darseg.pseudo.assign", int(seed), int(round_index), sample_id])
    digest = hashlib.sha256(name.encode("ascii")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def kept_counts(label_map: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Labeled pixels of each class in a label map, uint8 [H, W] → int64 [K]."""
    return count_label_pixels(label_map, classes)


def _drop_count(count: int, keep: float) -> int:
    whole = np.float32(count)
    # Above 2^24 pixels float32 may round the count up; more than there are cannot be dropped.
    return min(count, int(whole - whole * np.float32(keep)))


def _draw(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """`size` different indices below `count`, each set equally likely; their order is not random."""
    return generator.choice(count, size, replace=False, shuffle=False)
