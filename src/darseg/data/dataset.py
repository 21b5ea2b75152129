"""Sample → Example: what a network sees of one image."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from darseg.data.advice import unknown_values
from darseg.data.augment import Augmentation, augment
from darseg.data.classes import ClassSet
from darseg.data.images import read_image
from darseg.data.label_parts import join_parts
from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.data.pictures import size_fault
from darseg.errors import DataError

# Images are prepared in parallel, so threads inside OpenCV would only compete with each other.
cv2.setNumThreads(1)


@dataclass(frozen=True)
class Example:
    """image uint8 [H, W, 3], label uint8 [H, W] (255 = not labeled), and the id they came from.

    confidence uint8 [H, W]: how sure whoever made the label was, 255 times its probability; None: not known.
    """

    id: str
    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None


def read_truth(sample: Sample) -> NDArray[np.uint8]:
    """The label map of a sample that has one, uint8 [H, W], 255 = not labeled.

    Masks in several files are joined.

    Raises DataError if a file cannot be read or holds values that are not classes.
    """
    if sample.parts is not None:
        return join_parts(sample.parts, sample.reading.max_pixels).classes
    _check_labeled(sample)
    assert sample.label is not None
    return read_label(sample.label, sample.encoding, sample.reading.max_pixels)


def _check_labeled(sample: Sample) -> None:
    if sample.parts is None and sample.label is None:
        raise DataError(f"{sample.image}: this image has no label map, but a labeled image is needed here.")


def load_example(sample: Sample, classes: ClassSet) -> Example:
    """Read a labeled sample.

    Raises DataError if a file cannot be read, or if the label is missing, has another size or unknown values.
    """
    _check_labeled(sample)
    image, label = read_image(sample.image, sample.reading), read_truth(sample)
    if image.shape[:2] != label.shape:
        raise DataError(
            f"{size_fault(sample, label.shape, image.shape[:2])} Run `darseg check` to find all such files."
        )
    if label.max(initial=0) >= len(classes):
        unknown = unknown_values(np.bincount(label.reshape(-1), minlength=256), len(classes))
        if unknown:
            raise DataError(f"{sample.label}: {unknown}")
    confidence = None if sample.confidence is None else read_label(sample.confidence)
    if confidence is not None and confidence.shape != label.shape:
        raise DataError(
            f"{sample.confidence} has {list(confidence.shape)} pixels, but the label map next to it, {sample.label}, has "
            f"{list(label.shape)}. Label again."
        )
    return Example(sample.id, image, label, confidence=confidence)


Load = Callable[[Sample, ClassSet], Example]
"""Reads a labeled sample: `load_example`, or `Cache.load`."""


LoadImage = Callable[[Sample], NDArray[np.uint8]]
"""Reads the image of a sample: `load_image`, or `Cache.load_image`."""


def load_image(sample: Sample) -> NDArray[np.uint8]:
    """The image of a sample, uint8 [H, W, 3]. Raises DataError if it cannot be read."""
    return read_image(sample.image, sample.reading)


class Cache:
    """Keeps decoded examples in memory, up to a number of bytes.

    Examples that do not fit are decoded each time they are needed. A cache serves one set of classes and assumes
    that files do not change. Any number of threads may use it.

    Args:
        limit: bytes.
        read, read_image: read an example and an image that are not kept.
    """

    def __init__(self, limit: int, read: Load = load_example, read_image: LoadImage = load_image) -> None:
        self._left, self._read, self._read_image = limit, read, read_image
        self._kept: dict[tuple[Path, Path | None], Example] = {}
        self._images: dict[Path, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def load(self, sample: Sample, classes: ClassSet) -> Example:
        """Load an example like `load_example`; the arrays of an example that is kept are read-only."""
        key = sample.image, sample.label
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        example = self._read(sample, classes)
        confidence = example.confidence
        arrays = [example.image, example.label, *([] if confidence is None else [confidence])]
        size = sum(array.nbytes for array in arrays)
        with self._lock:
            if key not in self._kept and size <= self._left:
                self._left -= size
                for array in arrays:
                    array.setflags(write=False)
                self._kept[key] = example
        return example

    def load_image(self, sample: Sample) -> NDArray[np.uint8]:
        """Read an image without its label, uint8 [H, W, 3]; one that is kept is read-only."""
        kept = self._images.get(sample.image)
        if kept is not None:
            return kept
        image = self._read_image(sample)
        with self._lock:
            if sample.image not in self._images and image.nbytes <= self._left:
                self._left -= image.nbytes
                image.setflags(write=False)
                self._images[sample.image] = image
        return image


def draw_example(
    sample: Sample,
    classes: ClassSet,
    augmentation: Augmentation,
    *,
    generator: np.random.Generator,
    load: Load = load_example,
) -> Example:
    """Read a labeled sample and augment it; a confidence of 255 beyond the image means nothing."""
    example = load(sample, classes)
    if example.confidence is None:
        return Example(sample.id, *augment(example.image, example.label, augmentation, generator=generator))
    maps = np.dstack([example.label, example.confidence])
    image, moved = augment(example.image, maps, augmentation, generator=generator)
    return Example(sample.id, image, label=moved[..., 0], confidence=moved[..., 1])
