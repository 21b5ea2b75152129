"""Read ahead, work, write behind: one item after the other, in constant memory."""

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
"""Items being read, and items being written, at any time."""


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Result],
    write: Callable[[Item, Result], object],
    advance: Callable[[], object] = lambda: None,
) -> None:
    """For every item: `read` in a thread ahead, `work` here, in order, `write` in a thread behind.

    An item that cannot be read or worked on (DataError) is passed over and the others are done; in the end all such
    errors are raised as one. Any other error stops at once, after what was being written is written.

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
                item, coming = ahead.popleft()
                fill()
                try:
                    result = work(item, coming.result())
                except DataError as error:
                    unusable.append(str(error))
                    advance()
                    continue
                while len(behind) >= AHEAD:
                    behind.popleft().result()
                behind.append(writers.submit(write, item, result))
                advance()
            for one in behind:
                one.result()
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    if unusable:
        raise DataError(
            faults(f"{len(unusable)} file(s) cannot be used; all others are done and kept", unusable)
            + "\nMend or remove them and run the same command again."
        )


def ahead_of(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, made in a thread of their own up to AHEAD before they are asked for."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, source, end))
            yield item  # ty: ignore[invalid-yield]
