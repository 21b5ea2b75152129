"""Predictions of many images, whose windows go through the network together.

Images come in groups of fixed members, and which of them share a forward pass follows from their group alone: other
numbers of windows in a pass can change last bits of the scores. On a CPU a group is one image. On a GPU nothing here
waits for it, so that it works on one pass while images are read, others are launched, and results are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darseg.data.pipeline import AHEAD, ONE_BY_ONE, Finish, Flow, ready
from darseg.data.prediction import BYTES_PER_PIXEL, ConfidenceScale, Prediction
from darseg.errors import DataError, NumericsError
from darseg.model.aligned import AlignmentRecord, Variants
from darseg.model.decide import decide_later
from darseg.model.network import Network
from darseg.model.predict import checked_image, decide_sums, whole_image
from darseg.model.windows import (
    MOST_WINDOWS,
    Average,
    Memory,
    Protocol,
    WindowSums,
    group_size,
    images_in_pass,
    like_size,
    place,
    sum_windows,
)

Item = TypeVar("Item")

SUMS_IN_MEMORY = 1 << 30
"""Bytes of the probabilities of all variants of images; what is more is predicted in several passes."""

MOST_THREADS = 8
"""Most threads that read images for a GPU, and as many that write. One core reads some 20 PNG files of 1024x2048
pixels a second (docs/performance.md)."""

MOST_ITEMS, MOST_BYTES = 4 * MOST_WINDOWS, 64 << 20
"""Images that are read ahead for a GPU, and as many results that wait to be written: enough for two passes of the
smallest images, and for ten of 1024x2048 pixels."""


@dataclass(frozen=True)
class Picture:
    """An image ready for the network.

    Attributes:
        name: for error messages.
        pixels: uint8 [H, W, 3], RGB; for a GPU in pinned memory, from which it copies by itself.
    """

    name: str
    pixels: Tensor

    @classmethod
    def of(cls, image: NDArray[np.uint8], name: str, device: torch.device) -> Picture:
        """An image for a network on this device. Raises DataError unless it is uint8 [H, W, 3] with pixels."""
        pixels = torch.from_numpy(checked_image(image, name))
        return cls(name, pixels.pin_memory() if device.type == "cuda" else pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


class Together:
    """Predicts groups of images by one network in eval mode.

    Args:
        protocol: None: each image in one window, and its mirror.
        scale: of the confidences.
        records: class weights of the variants that predict; None: the network itself.

    Attributes:
        images: how many images are a group.
    """

    def __init__(
        self,
        network: Network,
        protocol: Protocol | None,
        *,
        average: Average,
        scale: ConfidenceScale,
        records: Sequence[AlignmentRecord | None] | None = None,
    ) -> None:
        self.network, self.protocol, self.device = network, protocol, network.mean.device
        self._at_once = self.device.type == "cpu"
        self.images = group_size(protocol, self.device)
        self._average: Average = average
        self._scale, self._records = scale, records
        self._memories = [Memory() for _ in range(1 if records is None else len(records))]
        self._variants: dict[int, list[Variants]] = {}

    def predict(
        self, pictures: Iterator[tuple[Item, Picture]]
    ) -> Iterator[tuple[Item, Finish[list[Prediction]]]]:
        """Predict a group of images.

        Returns:
            each item, in the order in which they go through the network, with what returns the predictions of the
            variants. It, or the iterator itself, raises NumericsError if an image's scores are not numbers.
        """
        waiting: dict[tuple[Protocol, tuple[int, int]], list[tuple[Item, Picture]]] = {}
        for item, picture in pictures:
            protocol = self.protocol or whole_image(self.network, picture.pixels.numpy())
            key = protocol, like_size(protocol, *picture.size)
            alike = waiting.setdefault(key, [])
            alike.append((item, picture))
            if len(alike) == images_in_pass(protocol, self.network, picture.size):
                yield from self._predict(protocol, waiting.pop(key))
        for (protocol, _), alike in waiting.items():
            yield from self._predict(protocol, alike)

    def predict_each(
        self, pictures: Iterator[tuple[Item, Picture]]
    ) -> Iterator[tuple[Item, Finish[Prediction]]]:
        """`predict` without variants: each item with what returns its prediction."""
        for item, finish in self.predict(pictures):
            yield item, partial(_first, finish)

    def _predict(
        self, protocol: Protocol, batch: Sequence[tuple[Item, Picture]]
    ) -> Iterator[tuple[Item, Finish[list[Prediction]]]]:
        """One batch of images of like size."""
        pictures = [picture for _, picture in batch]
        pixels = [picture.pixels for picture in pictures]
        decided: list[list[Finish[Prediction]]] = []
        with torch.inference_mode():
            for variants in self._parts(pixels):
                memories = self._memories[: len(variants) if variants else 1]
                all_sums = sum_windows(
                    self.network,
                    pixels,
                    protocol,
                    average=self._average,
                    memories=memories,
                    variants=variants,
                )
                decided += [self._decide(sums, pictures) for sums in all_sums]
        for (item, _), *of_variants in zip(batch, *decided, strict=True):
            yield item, partial(_all, of_variants)

    def _parts(self, pixels: Sequence[Tensor]) -> Sequence[Variants | None]:
        """The variants of the network in as many parts as the memory for their sums asks for."""
        if self._records is None:
            return [None]
        sums = 4 * self.network.classes * sum(image.shape[0] * image.shape[1] for image in pixels)
        at_once = min(len(self._records), max(1, SUMS_IN_MEMORY // sums))
        if at_once not in self._variants:
            self._variants[at_once] = [
                Variants(self.network, self._records[start : start + at_once])
                for start in range(0, len(self._records), at_once)
            ]
        return self._variants[at_once]

    def _decide(self, sums: WindowSums, pictures: Sequence[Picture]) -> list[Finish[Prediction]]:
        """What gives the prediction of each image."""
        count, (_, height, width) = len(pictures), sums.total_KHW.shape
        probabilities = self._average == "probabilities"
        if self._at_once:
            finished = []
            for index, picture in enumerate(pictures):
                part = sums.of_image(index, count)
                top, left = place(picture.size, height, width)
                part.crop(top, left, height=picture.size[0], width=picture.size[1])
                prediction = decide_sums(
                    part, scale=self._scale, probabilities=probabilities, name=picture.name
                )
                finished.append(ready(prediction))
            return finished
        total_KBHW = sums.total_KHW.unflatten(0, (count, -1)).transpose(0, 1)
        scores_KBHW = torch.empty(total_KBHW.shape, device=total_KBHW.device)
        torch.div(total_KBHW, sums.count_HW, out=scores_KBHW)
        names = [picture.name for picture in pictures]
        waits = decide_later(scores_KBHW, scale=self._scale, probabilities=probabilities, names=names)
        return [partial(_cropped, wait, picture.size) for wait, picture in zip(waits, pictures, strict=True)]


def _cropped(wait: Callable[[], Prediction], size: tuple[int, int]) -> Prediction:
    """A prediction without the padding of its image."""
    try:
        prediction = wait()
    except DataError as error:
        raise NumericsError(str(error)) from None
    if prediction.classes.shape == size:
        return prediction
    top, left = place(size, *prediction.classes.shape)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    classes, codes = prediction.classes[rows, columns], prediction.codes[rows, columns]
    return Prediction(np.ascontiguousarray(classes), np.ascontiguousarray(codes), prediction.scale)


def _all(finishes: Sequence[Finish[Prediction]]) -> list[Prediction]:
    return [finish() for finish in finishes]


def _first(finish: Finish[list[Prediction]]) -> Prediction:
    return finish()[0]


def flow_for(device: torch.device) -> Flow:
    """How many images are read ahead for a network on this device, and wait to be written."""
    if device.type == "cpu":
        return ONE_BY_ONE
    threads = min(MOST_THREADS, max(AHEAD, torch.get_num_threads()))
    return Flow(threads, items=MOST_ITEMS, bytes=MOST_BYTES, weigh=_weigh)


def _weigh(content: object) -> int:
    """Bytes of an image that was read, alone or with its labels, or of a prediction that waited."""
    if isinstance(content, Prediction):
        return BYTES_PER_PIXEL * content.classes.size
    if isinstance(content, tuple):
        return sum(map(_weigh, content))
    return content.pixels.nbytes if isinstance(content, Picture) else getattr(content, "nbytes", 0)
