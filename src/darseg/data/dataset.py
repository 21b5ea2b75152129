"""Sample → Example: what a network sees of one image."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from darseg.data.augment import Augmentation, augment
from darseg.data.classes import ClassSet
from darseg.data.images import read_image
from darseg.data.labels import read_label, unknown_values
from darseg.data.manifest import Sample
from darseg.errors import DataError

# Images are prepared in parallel; threads inside OpenCV would only get in each other's way.
cv2.setNumThreads(1)


@dataclass(frozen=True)
class Example:
    """image uint8 [H, W, 3], label uint8 [H, W] (255 = not labeled), and the id they came from."""

    id: str
    image: np.ndarray
    label: np.ndarray


def load_example(sample: Sample, classes: ClassSet) -> Example:
    """Read a labeled sample. Raises DataError: no label, other size, values that are no class."""
    if sample.label is None:
        raise DataError(f"{sample.image}: has no label map, and one is needed here.")
    image, label = read_image(sample.image), read_label(sample.label, sample.encoding)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"{sample.label}: {label.shape[0]}x{label.shape[1]} pixels, but its image {sample.image} has "
            f"{image.shape[0]}x{image.shape[1]} (height x width). Run `darseg check` for all such faults."
        )
    if label.max(initial=0) >= len(classes):
        line = unknown_values(np.bincount(label.reshape(-1), minlength=256), len(classes))
        if line:
            raise DataError(f"{sample.label}: {line}.")
    return Example(sample.id, image, label)


Load = Callable[[Sample, ClassSet], Example]
"""Reads a labeled sample: `load_example`, or that of a Cache."""


class Cache:
    """Decoded examples, kept in memory up to a number of bytes; those beyond it are decoded whenever they are asked for.

    For one set of classes and files that do not change meanwhile. Any number of threads may ask.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[tuple[Path, Path | None], Example] = {}
        self._lock = threading.Lock()

    def load(self, sample: Sample, classes: ClassSet) -> Example:
        """As `load_example`; the arrays are for reading only where they are kept."""
        key = sample.image, sample.label
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        example = load_example(sample, classes)
        size = example.image.nbytes + example.label.nbytes
        with self._lock:
            if key not in self._kept and size <= self._left:
                self._left -= size
                example.image.setflags(write=False)
                example.label.setflags(write=False)
                self._kept[key] = example
        return example


def draw_example(
    sample: Sample,
    classes: ClassSet,
    augmentation: Augmentation,
    generator: np.random.Generator,
    load: Load = load_example,
) -> Example:
    """Read a labeled sample and augment it."""
    example = load(sample, classes)
    return Example(sample.id, *augment(example.image, example.label, augmentation, generator))
