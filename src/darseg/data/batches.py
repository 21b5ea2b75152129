"""Endless, seeded streams of batches that can begin at any step.

The seed and a position in the stream alone decide which sample stands there and how it is augmented. So the number of
threads that prepare a stream changes nothing.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from darseg.data.augment import Augmentation
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import Load, draw_example, load_example
from darseg.data.manifest import Sample

Memory = TypeVar("Memory")

CERTAIN = 255
"""Value of probability 1 in the confidences of pseudo labels."""


@dataclass(frozen=True)
class Batch:
    """Images with what to learn at each pixel.

    A stream's images lie channels last in memory, as the decoder made them and as convolutions want them.

    Attributes:
        images: uint8 [B, 3, H, W], RGB.
        labels: uint8 [B, H, W]; 255: nothing to learn at this pixel.
        ids: of the samples, B of them.
        weights: float [B, H, W], the weight of each pixel in the loss; None: 1 everywhere.
        feature_masks: float [B, C] for each of the network's four feature maps, the factors of its channels (feature
            dropout as data); empty: none.
        targets: float [B, K, H, W], the probabilities to match at each pixel, for losses that match them; None: none.
        confidences: uint8 [B, H, W], how sure of each label whoever made it was, CERTAIN times its probability; None: not
            known.
        divisor: int64 [], what the sum of the loss over pixels is divided by: counted over the whole batch, of all
            processes, before it is split. None: the labeled pixels of this batch.
    """

    images: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    weights: Tensor | None = None
    feature_masks: tuple[Tensor, ...] = ()
    targets: Tensor | None = None
    confidences: Tensor | None = None
    divisor: Tensor | None = None

    def count(self) -> Tensor:
        """What the sum of the loss over pixels is divided by, int64 []."""
        return (self.labels != IGNORE).sum() if self.divisor is None else self.divisor

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of `size` images, each with the divisor of the whole (None: this batch as it is)."""
        if size is None or size >= len(self.ids):
            return [self]
        return self.cut(range(size, len(self.ids), size))

    def cut(self, places: Sequence[int]) -> list[Batch]:
        """The batch cut before each place of its first axis, each part with the divisor of the whole."""
        divisor, bounds = self.count(), [0, *places, len(self.ids)]
        return [
            Batch(
                images=self.images[start:end],
                labels=self.labels[start:end],
                ids=self.ids[start:end],
                weights=None if self.weights is None else self.weights[start:end],
                feature_masks=tuple(mask[start:end] for mask in self.feature_masks),
                targets=None if self.targets is None else self.targets[start:end],
                confidences=None if self.confidences is None else self.confidences[start:end],
                divisor=divisor,
            )
            for start, end in itertools.pairwise(bounds)
        ]


def split_together(batches: Sequence[Batch], size: int | None) -> list[tuple[Batch, ...]]:
    """Micro-batches of several batches, in step: at most `size` images of each.

    None leaves the batches as they are. Batches of unequal sizes are cut into equally many parts, as equal as possible.
    No part is empty, so a batch with few images limits how small the parts of the others get.
    """
    if size is None:
        return [tuple(batches)]
    sizes = part_sizes([len(batch.ids) for batch in batches], size)
    parts = [
        [batch] if len(own) == 1 else batch.cut([*itertools.accumulate(own)][:-1])
        for batch, own in zip(batches, sizes, strict=True)
    ]
    return list(zip(*parts, strict=True))


def part_sizes(images: Sequence[int], size: int | None) -> list[list[int]]:
    """How many images each part of each batch has, as `split_together` cuts them.

    Args:
        images: of each batch.
        size: as of `split_together`.
    """
    if size is None:
        return [[count] for count in images]
    count = min(-(-max(images) // size), min(images))
    sizes = []
    for own in images:
        bounds = [*range(0, own, size), own]
        if len(bounds) != count + 1:
            bounds = [own * part // count for part in range(count + 1)]
        sizes.append([end - start for start, end in itertools.pairwise(bounds)])
    return sizes


def sample_index(position: int, count: int, seed: Sequence[int]) -> int:
    """The index, below `count`, of the sample at `position`: each epoch is a new permutation."""
    epoch, place = divmod(position, count)
    return int(_order(tuple(seed), epoch, count)[place])


@lru_cache(maxsize=8)  # two streams, each between two epochs
def _order(seed: tuple[int, ...], epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([*seed, 0, epoch]).permutation(count)


@dataclass(frozen=True)
class StreamPlace:
    """Where a stream runs: its share of every batch and the threads that prepare it.

    Attributes:
        rank, processes: the stream yields this process's part of every batch; all parts together are exactly the batches
            of one process.
        workers: threads that prepare batches ahead.
        pin: put batches together in pinned memory, from which a GPU copies while the host goes on.
    """

    rank: int = 0
    processes: int = 1
    workers: int = 2
    pin: bool = False


def stream_batches(
    samples: Sequence[Sample],
    classes: ClassSet,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: Sequence[int],
    start: int = 0,
    place: StreamPlace = StreamPlace(),
    load: Load = load_example,
) -> Iterator[Batch]:
    """Yield the batches of steps `start`, `start` + 1, … without end.

    The worker threads write straight into the batch's memory, so nothing is left to collate. OpenCV and numpy release
    the interpreter lock while they decode and warp, so threads are enough. Close the generator to stop them.

    Args:
        batch_size: images of a batch, over all processes.
        seed: non-negative integers that name the stream; equal seeds give equal streams.
        load: reads a sample; a Cache's `load` decodes each sample only once.

    Raises the error of a sample at the step whose batch holds it.
    """
    own = batch_size // place.processes
    sure = samples[0].confidence is not None  # those of a stream are alike

    def begin(step: int) -> tuple[tuple[Tensor, ...], list[Callable[[], str]]]:
        """Images (channels last), labels, any confidences; the work that fills them and gives their ids."""
        shapes = [(own, *augmentation.crop, 3), *[(own, *augmentation.crop)] * (2 if sure else 1)]
        tensors = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=place.pin) for shape in shapes)
        image_array, label_array, *others = (tensor.numpy() for tensor in tensors)

        def fill(row: int, position: int) -> str:
            sample = samples[sample_index(position, len(samples), seed)]
            generator = np.random.default_rng([*seed, 1, position])
            example = draw_example(sample, classes, augmentation, generator=generator, load=load)
            image_array[row], label_array[row] = example.image, example.label
            for confidence_array in others:
                confidence_array[row] = example.confidence
            return example.id

        first = step * batch_size + place.rank * own
        return tensors, [partial(fill, row, first + row) for row in range(own)]

    with closing(ahead_of_steps(begin, start, workers=place.workers, own=own)) as filled:
        for (images, labels, *others), ids in filled:
            yield Batch(images.permute(0, 3, 1, 2), labels, ids, confidences=others[0] if others else None)


def ahead_of_steps(
    begin: Callable[[int], tuple[Memory, Sequence[Callable[[], str]]]], start: int, *, workers: int, own: int
) -> Generator[tuple[Memory, tuple[str, ...]]]:
    """Yield the filled memory of steps `start`, `start` + 1, …, each with the ids of its images.

    Args:
        begin: step → memory, and the work of the threads: a call for each image, which fills its part and returns its id.
        own: images of a step in this process.

    Raises the error of an image at the step that holds it. Close the generator to stop the threads.
    """
    # Enough batches ahead to keep all threads busy.
    ahead = max(2, -(-2 * workers // own))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[tuple[Memory, list[Future[str]]]] = deque()
    try:
        for step in itertools.count(start):
            memory, jobs = begin(step)
            waiting.append((memory, [pool.submit(job) for job in jobs]))
            if len(waiting) > ahead:
                filled, ids = waiting.popleft()
                yield filled, tuple(future.result() for future in ids)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
