"""Sample → Example: what a network sees of one image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
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


LoadImage = Callable[[Sample], NDArray[np.uint8]]
"""Reads the image of a sample: `load_image`, or `Cache.load_image`."""


def load_image(sample: Sample) -> NDArray[np.uint8]:
    """The image of a sample, uint8 [H, W, 3]. Raises DataError if it cannot be read."""
    return read_image(sample.image, sample.reading)


def load_example(sample: Sample, classes: ClassSet, read: LoadImage = load_image) -> Example:
    """Read a labeled sample.

    Raises DataError if a file cannot be read, or if the label is missing, has another size or unknown values.
    """
    _check_labeled(sample)
    image, label = read(sample), read_truth(sample)
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


class Cache:
    """Keeps decoded images and label maps in memory, up to a number of bytes.

    What does not fit is decoded each time it is needed. An image is kept once, whether it was asked for with a label
    map or without. A cache serves one set of classes and assumes that files do not change. Any number of threads may
    use it.

    Args:
        limit: bytes.
        read: reads an example that is not kept; None: `load_example`, with the image if that is kept.
        read_image: reads an image that is not kept.
    """

    def __init__(self, limit: int, read: Load | None = None, read_image: LoadImage = load_image) -> None:
        self._left, self._read, self._read_image = limit, read, read_image
        self._examples: dict[tuple[Path, Path | None], Example] = {}
        self._images: dict[Path, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    @property
    def kept(self) -> int:
        """Bytes of the images that are kept."""
        with self._lock:
            return sum(image.nbytes for image in self._images.values())

    def restart(self, limit: int) -> None:
        """Drop all label maps, and as many images as are beyond a new limit.

        A round has label maps of its own, but the images of the round before.
        """
        with self._lock:
            self._examples.clear()
            self._left = limit - sum(image.nbytes for image in self._images.values())
            while self._left < 0 and self._images:
                self._left += self._images.popitem()[1].nbytes
            self._left = max(0, self._left)

    def load(self, sample: Sample, classes: ClassSet) -> Example:
        """Load an example like `load_example`; the arrays of an example that is kept are read-only."""
        key = sample.image, sample.label
        kept = self._examples.get(key)
        if kept is not None:
            return kept
        example = self._read(sample, classes) if self._read else load_example(sample, classes, self._image)
        image, confidence = example.image, example.confidence
        maps = [example.label, *([] if confidence is None else [confidence])]
        with self._lock:
            if key not in self._examples and self._keep([*maps, *self._new(sample, image)]):
                self._examples[key] = example
                self._images.setdefault(sample.image, image)
        return example

    def load_image(self, sample: Sample) -> NDArray[np.uint8]:
        """Read an image without its label, uint8 [H, W, 3]; one that is kept is read-only."""
        image = self._image(sample)
        with self._lock:
            if self._keep(self._new(sample, image)):
                self._images.setdefault(sample.image, image)
        return image

    def _image(self, sample: Sample) -> NDArray[np.uint8]:
        kept = self._images.get(sample.image)
        return self._read_image(sample) if kept is None else kept

    def _new(self, sample: Sample, image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        return [] if sample.image in self._images else [image]

    def _keep(self, arrays: Sequence[NDArray[np.uint8]]) -> bool:
        """Whether there is room for these arrays, which are then read-only and counted."""
        size = sum(array.nbytes for array in arrays)
        if size > self._left:
            return False
        self._left -= size
        for array in arrays:
            array.setflags(write=False)
        return True


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
