"""One process or many (torchrun): who labels which images, and how their counts come together."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from darseg.errors import DarsegError

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the first may train for days while they wait to label."""

TELLING = 2.0
"""Seconds that the first process has to tell of an error before the others end: torchrun then ends all."""


class Processes:
    """The processes of this run, started by torchrun; one alone where there are no others.

    Attributes:
        rank: which this is, from 0; count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def here(cls) -> Processes:
        """Join the others that torchrun has started: by gloo, and for tensors on GPUs by NCCL; files are shared."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            backend = "cpu:gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
                backend += ",cuda:nccl"
            dist.init_process_group(backend, timeout=PATIENCE)
            atexit.register(dist.destroy_process_group)  # else its threads abort the interpreter as it ends
        return cls(dist.get_rank(), count)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    @property
    def here_together(self) -> int:
        """How many of them run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.count > 1 else 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that fall to this process: each falls to one."""
        return items[self.rank :: self.count]

    def add_up(self, counts: np.ndarray) -> np.ndarray:
        """int64 counts, added up over all processes."""
        if self.count == 1:
            return counts
        total = torch.from_numpy(np.array(counts, np.int64))
        dist.all_reduce(total)
        return total.numpy()

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all; where it raises a DarsegError, all end."""
        made = self.together(lambda: make() if self.first else None)
        if self.count == 1:
            return made  # ty: ignore[invalid-explicit-return]
        box: list[Any] = [made]
        dist.broadcast_object_list(box)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """`work()`, with one end for all: where some raise a DarsegError, the first tells all of them."""
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except DarsegError as raised:
            error = raised
        errors: list[Any] = [None] * self.count
        dist.all_gather_object(errors, None if error is None else (type(error), str(error)))
        told = [one for one in errors if one is not None]
        if told:
            self._end(told)
        return result  # ty: ignore[invalid-explicit-return]

    def leave(self, error: BaseException) -> NoReturn:
        """End a process beside the first, which tells of the error that all have met."""
        time.sleep(TELLING)
        raise SystemExit(getattr(error, "code", 2))

    def _end(self, told: list[tuple[type[DarsegError], str]]) -> NoReturn:
        if not self.first:
            self.leave(told[0][0](told[0][1]))
        raise told[0][0]("\n".join(dict.fromkeys(text for _, text in told)))
