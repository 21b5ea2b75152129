"""The same work for many files, in threads, with the results in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 8

CHUNK = 64
"""Most items that are handed to a thread at once: that costs as much as reading a small file."""

CHUNKS = 16
"""Chunks for each thread, if there are few items, so that none is left with the last ones."""


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], most_threads: int = MOST_THREADS
) -> Iterator[Result]:
    """`work` of every item, in their order. Reading and decoding release the interpreter lock.

    An exception of an item is raised in its place, or in that of an item a little before; what waits is then left
    undone, as it is if the caller stops.
    """
    threads = max(1, min(most_threads, os.cpu_count() or 1))
    size = max(1, min(CHUNK, len(items) // (threads * CHUNKS)))

    def of_chunk(start: int) -> list[Result]:
        return [work(item) for item in items[start : start + size]]

    pool = ThreadPoolExecutor(threads)
    try:
        for results in pool.map(of_chunk, range(0, len(items), size)):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)
