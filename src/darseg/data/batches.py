"""Endless, seeded, resumable streams of batches.

Position p of a stream is decided by the seed and p alone: which sample, and how it is augmented. So a stream
can begin at any step, and the number of threads that prepare it changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from darseg.data.augment import Augmentation
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import Load, draw_example, load_example
from darseg.data.manifest import Sample


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, H, W], labels uint8 [B, H, W] (255 = not labeled), ids of length B.

    A stream's images lie channels last in memory, as the decoder made them and as convolutions want them.
    `labeled_pixels`, int64 [], are those of the whole batch where this is a micro-batch of it; None: of this one.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: tuple[str, ...]
    labeled_pixels: torch.Tensor | None = None

    def count_labeled(self) -> torch.Tensor:
        """What the sum of a loss over pixels is divided by, int64 []."""
        if self.labeled_pixels is None:
            return (self.labels != IGNORE).sum()
        return self.labeled_pixels

    def split(self, size: int | None) -> list[Batch]:
        """Micro-batches of `size` images (None: this batch as it is) that remember the labeled pixels of the whole."""
        if size is None or size >= len(self.ids):
            return [self]
        labeled = self.count_labeled()
        starts = range(0, len(self.ids), size)
        return [
            Batch(self.images[at : at + size], self.labels[at : at + size], self.ids[at : at + size], labeled)
            for at in starts
        ]


def sample_index(position: int, count: int, seed: Sequence[int]) -> int:
    """Which of `count` samples stands at `position`: each epoch is a permutation of its own."""
    epoch, place = divmod(position, count)
    return int(_order(tuple(seed), epoch, count)[place])


@lru_cache(maxsize=8)  # two streams, each between two epochs
def _order(seed: tuple[int, ...], epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([*seed, 0, epoch]).permutation(count)


def stream_batches(
    samples: Sequence[Sample],
    classes: ClassSet,
    augmentation: Augmentation,
    batch_size: int,
    seed: Sequence[int],
    start: int = 0,
    workers: int = 2,
    share: tuple[int, int] = (0, 1),
    load: Load = load_example,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield batches of step `start`, `start` + 1, … without end, prepared ahead by `workers` threads.

    Args:
        seed: non-negative integers that name the stream; equal seeds give equal streams.
        share: (rank, processes): only this process's part of every batch, of `batch_size` / processes images; all
            parts together are the very batches of one process.
        load: reads a sample; that of a Cache decodes each only once.
        pin: put batches together in pinned memory, from which a GPU copies beside the host's work.

    The threads write their examples into the batch themselves: whoever takes it finds nothing left to do.
    OpenCV and numpy release the interpreter lock for decoding and warping, so threads are enough.
    Errors of a sample are raised where its batch would have been yielded. Close the generator to stop.
    """

    rank, processes = share
    own = batch_size // processes
    ahead = max(2, -(-2 * workers // own))  # batches being prepared: enough to keep all threads busy
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[tuple[Tensor, Tensor, list[Future[str]]]] = deque()

    def begin(step: int) -> tuple[Tensor, Tensor, list[Future[str]]]:
        """Batch `step`, to be filled: images, channels last, labels, and ids to come."""
        images = torch.empty((own, *augmentation.crop, 3), dtype=torch.uint8, pin_memory=pin)
        labels = torch.empty((own, *augmentation.crop), dtype=torch.uint8, pin_memory=pin)
        into = images.numpy(), labels.numpy()

        def fill(place: int, position: int) -> str:
            sample = samples[sample_index(position, len(samples), seed)]
            generator = np.random.default_rng([*seed, 1, position])
            example = draw_example(sample, classes, augmentation, generator=generator, load=load)
            into[0][place], into[1][place] = example.image, example.label
            return example.id

        first = step * batch_size + rank * own
        return images, labels, [pool.submit(fill, place, first + place) for place in range(own)]

    step = start
    try:
        while True:
            while len(waiting) <= ahead:
                waiting.append(begin(step))
                step += 1
            images, labels, ids = waiting.popleft()
            yield Batch(images.permute(0, 3, 1, 2), labels, tuple(future.result() for future in ids))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
