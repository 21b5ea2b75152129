"""Read ahead, work, and write behind, one item after the other, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from darseg.errors import DataError, faults

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")

AHEAD = 2
"""Largest number of items being read, and of items being written, at any time."""


def overlapped(
    items: Iterable[Item],
    *,
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Result],
    write: Callable[[Item, Result], object],
    advance: Callable[[], object] = lambda: None,
) -> None:
    """For every item: `read` ahead in a thread, `work` here and in order, `write` behind in a thread.

    An item whose `read` or `work` raises DataError is skipped, and at the end all these errors are raised as one. Any
    other error stops at once, after pending writes are done.

    Args:
        advance: called after each item's work.
    """
    unusable: list[str] = []
    source = iter(items)
    with ThreadPoolExecutor(AHEAD) as readers, ThreadPoolExecutor(AHEAD) as writers:
        ahead: deque[tuple[Item, Future[Read]]] = deque()
        behind: deque[Future[object]] = deque()

        def fill() -> None:
            for item in islice(source, AHEAD - len(ahead)):
                ahead.append((item, readers.submit(read, item)))

        fill()
        try:
            while ahead:
                item, reading = ahead.popleft()
                fill()
                try:
                    result = work(item, reading.result())
                except DataError as error:
                    unusable.append(str(error))
                    advance()
                    continue
                while len(behind) >= AHEAD:
                    behind.popleft().result()
                behind.append(writers.submit(write, item, result))
                advance()
            for writing in behind:
                writing.result()
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    if unusable:
        raise DataError(
            faults(f"{len(unusable)} file(s) cannot be used. All others are done and kept", unusable)
            + "\nFix or remove these files, then run the same command again."
        )


def ahead_of(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order; a thread of its own makes up to AHEAD of them before they are needed."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, source, end))
            yield item  # ty: ignore[invalid-yield]
