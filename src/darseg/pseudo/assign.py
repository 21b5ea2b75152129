"""One image's prediction to its pseudo-label map."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import IGNORE
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.distribution import count_label_pixels
from darseg.pseudo.histogram import check_predicted_classes
from darseg.pseudo.thresholds import Thresholds


def assign(
    prediction: Prediction, thresholds: Thresholds, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """The label map of one image, uint8 [H, W]: the predicted class, or 255 where not labeled.

    Pixels below their class's threshold become 255. Of the m accepted pixels of class k in this image,
    int(m - m·keep_k) drawn uniformly at random from all of them become 255 as well (DARS, section 3.3);
    product and difference are rounded to float32, as in the release.

    `generator` is drawn from, class by class: give each image its own (`image_generator`).
    Raises DataError when a predicted class is not among the thresholds.
    """
    check_predicted_classes(prediction, len(thresholds.accept))
    if prediction.scale is not thresholds.scale:
        raise DataError(
            f"A prediction on the scale {prediction.scale.name} and thresholds on {thresholds.scale.name}: "
            "count and choose on the scale of the predictions."
        )
    # Where nothing is accepted the code may not fit in 16 bits; the kept share, 0, then drops all.
    lowest = np.minimum(thresholds.accept, 65535).astype(np.uint16)[prediction.classes]
    labels = np.where(prediction.codes >= lowest, prediction.classes, np.uint8(IGNORE))
    flat = labels.ravel()  # row by row, whatever the arrays' layout: positions decide what is drawn
    accepted = np.bincount(flat, minlength=IGNORE + 1)
    for k, keep in enumerate(thresholds.keep):
        count = int(accepted[k])
        dropped = _drop_count(count, keep)
        if dropped == 0:
            continue
        pixels = np.flatnonzero(flat == k)
        if dropped <= count - dropped:
            flat[pixels[_draw(generator, count, dropped)]] = IGNORE
        else:  # drawing the kept ones is the same and draws fewer
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
    """Pixels that were given each class, uint8 [H, W] → int64 [K]."""
    return count_label_pixels(label_map, classes)


def _drop_count(count: int, keep: float) -> int:
    all_of_them = np.float32(count)
    # Above 2^24 pixels float32 may round the count up: never drop more than there are.
    return min(count, int(all_of_them - all_of_them * np.float32(keep)))


def _draw(generator: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """`size` different indices below `count`, each set equally likely; their order is not random."""
    return generator.choice(count, size, replace=False, shuffle=False)
