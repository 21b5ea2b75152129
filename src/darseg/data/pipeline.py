"""Read ahead, work, and write behind, one item after the other, in constant memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, NoReturn, TypeVar

from darseg.errors import DataError, faults

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")

AHEAD = 2
"""Number of items that may be read ahead, and that may wait to be written, whatever their size."""

Finish = Callable[[], Result]
"""Waits for a result and returns it, or raises why there is none. Called in a thread that writes."""

Work = Callable[[Iterator[tuple[Item, Read]]], Iterator[tuple[Item, Finish[Result]]]]
"""The items of a group with what was read → each of them with its result, in any order."""


@dataclass(frozen=True)
class Flow:
    """How many items are on the way at once.

    Attributes:
        threads: that read, and as many that write.
        items: most items read ahead, and most that wait to be written; AHEAD are always allowed.
        bytes: what these may hold, by the weight of what was read. Images that are still being read are not counted, so
            that memory is bounded by this and the largest image for each thread.
        weigh: bytes of what was read.
    """

    threads: int = AHEAD
    items: int = AHEAD
    bytes: int = 0
    weigh: Callable[[object], int] = lambda _: 0


ONE_BY_ONE = Flow()


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
    overlapped_groups(([item] for item in items), read=read, work=each(work), write=write, advance=advance)


def ready(result: Result) -> Finish[Result]:
    """A result that is there already."""
    return lambda: result


def each(work: Callable[[Item, Read], Result]) -> Work[Item, Read, Result]:
    """Work on the items of a group one by one."""

    def result_or_error(item: Item, content: Read) -> Finish[Result]:
        try:
            return ready(work(item, content))
        except DataError as error:
            return partial(_raise, error)

    return lambda contents: ((item, result_or_error(item, content)) for item, content in contents)


def overlapped_groups(
    groups: Iterable[Iterable[Item]],
    *,
    read: Callable[[Item], Read],
    work: Work[Item, Read, Result],
    write: Callable[[Item, Result], object],
    advance: Callable[[], object] = lambda: None,
    flow: Flow = ONE_BY_ONE,
) -> None:
    """`overlapped` for work on several items at once: `work` is called for each group, here and in order.

    What `work` does with a group is up to this group alone, however fast items are read and written.

    Args:
        advance: called after each item's work.
        flow: how many items are read ahead and wait to be written.
    """
    with ThreadPoolExecutor(flow.threads) as readers, ThreadPoolExecutor(flow.threads) as writers:
        line = _Line(readers, writers, read=read, write=write, flow=flow)
        try:
            line.begin(groups)
            while line.ahead:
                for item, finish in work(line.contents(advance)):
                    line.add(item, finish)
                    advance()
            line.drain()
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    if line.unusable:
        texts = [text for _, text in sorted(line.unusable)]
        raise DataError(
            faults(f"{len(texts)} file(s) cannot be used. All others are done and kept", texts)
            + "\nFix or remove these files, then run the same command again."
        )


class _Line(Generic[Item, Read, Result]):
    """Items on their way: read ahead, and waiting to be written."""

    def __init__(
        self,
        readers: ThreadPoolExecutor,
        writers: ThreadPoolExecutor,
        *,
        read: Callable[[Item], Read],
        write: Callable[[Item, Result], object],
        flow: Flow,
    ) -> None:
        self.ahead: deque[tuple[int, Item, Future[Read]]] = deque()  # with the number of the group
        self.unusable: list[tuple[int, str]] = []  # in the order in which the items were met
        self._behind: deque[tuple[int, Future[None]]] = deque()  # with the weight
        self._readers, self._writers, self._flow = readers, writers, flow
        self._read, self._write = read, write
        self._source: Iterator[tuple[int, Item]] = iter(())
        self._met = self._weight = self._weight_behind = 0
        self._lock, self._reading, self._weight_ahead = threading.Lock(), 0, 0

    def begin(self, groups: Iterable[Iterable[Item]]) -> None:
        self._source = ((number, item) for number, group in enumerate(groups) for item in group)
        self._fill()

    def contents(self, advance: Callable[[], object]) -> Iterator[tuple[Item, Read]]:
        """The items of the next group with what was read, without those that cannot be read."""
        current, self._weight = self.ahead[0][0], 0
        while self.ahead and self.ahead[0][0] == current:
            _, item, reading = self.ahead.popleft()
            self._fill()
            self._met += 1
            try:
                content = reading.result()
            except DataError as error:
                self.unusable.append((self._met, str(error)))
                advance()
                continue
            weight = self._flow.weigh(content)
            with self._lock:
                self._weight_ahead -= weight
            # Results may come in another order, so the largest stands for all of the group.
            self._weight = max(self._weight, weight)
            yield item, content

    def add(self, item: Item, finish: Finish[Result]) -> None:
        """Let a result be written, as soon as there is room for it."""
        while len(self._behind) >= AHEAD and not self._room(
            len(self._behind), self._weight + self._weight_behind
        ):
            weight, writing = self._behind.popleft()
            self._weight_behind -= weight
            writing.result()
        self._behind.append((self._weight, self._writers.submit(self._finish, self._met, item, finish)))
        self._weight_behind += self._weight

    def drain(self) -> None:
        """Wait until everything is written."""
        for _, writing in self._behind:
            writing.result()

    def _room(self, items: int, weight: int) -> bool:
        return items < self._flow.items and weight <= self._flow.bytes

    def _fill(self) -> None:
        while len(self.ahead) < AHEAD or (
            self._reading < self._flow.threads and self._room(len(self.ahead), self._weight_ahead)
        ):
            if (following := next(self._source, None)) is None:
                return
            with self._lock:
                self._reading += 1
            self.ahead.append((*following, self._readers.submit(self._read_one, following[1])))

    def _read_one(self, item: Item) -> Read:
        weight = 0
        try:
            content = self._read(item)
            weight = self._flow.weigh(content)
            return content
        finally:
            with self._lock:
                self._reading -= 1
                self._weight_ahead += weight

    def _finish(self, met: int, item: Item, finish: Finish[Result]) -> None:
        try:
            result = finish()
        except DataError as error:
            self.unusable.append((met, str(error)))
            return
        self._write(item, result)


def _raise(error: DataError) -> NoReturn:
    raise error


def ahead_of(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order; a thread of its own makes up to AHEAD of them before they are needed."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, source, end) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, source, end))
            yield item  # ty: ignore[invalid-yield]
