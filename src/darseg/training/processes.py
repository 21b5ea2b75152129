"""One process or many, started by torchrun: who does what, and how results come together.

Training on many processes is PyTorch's DistributedDataParallel, used directly: a layer such as Lightning Fabric would
take over wrapping, autocast and moving to the device, a few lines here, and leave what takes many lines – shares, losses
over all labeled pixels, statistics, signals.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import socket
import stat
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darseg.data.batches import Batch
from darseg.errors import DarsegError, RunError

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a process waits for the others: the first may train for days while they wait to label."""

TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets besides WORLD_SIZE; without them processes cannot meet."""

RESTARTED = {"TORCHELASTIC_MAX_RESTARTS": 0, "GROUP_WORLD_SIZE": 1}
"""torchrun's number of restarts, and of nodes: both larger than this if it starts processes of several nodes again."""

SILENCE = 240
"""Seconds after which a machine that does not answer is gone. A cable or switch may be changed meanwhile."""

REPORTING = 2.0
"""Seconds that the first process has to report an error before the others end: torchrun then ends all."""


class Processes:
    """The processes of this run; one alone if torchrun did not start others.

    Attributes:
        rank: the number of this process, from 0.
        count: how many processes there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def here(cls) -> Processes:
        """Join the processes that torchrun started: through gloo, and for tensors on GPUs through NCCL."""
        count = _world_size()
        if count == 1:
            return cls()
        if not dist.is_initialized():
            backend = "cpu:gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
                backend += ",cuda:nccl"
            dist.init_process_group(backend, timeout=PATIENCE)
            notice_silence()
            atexit.register(disconnect)
        return cls(dist.get_rank(), count)

    @classmethod
    def joined(cls) -> Processes:
        """The processes that torch.distributed connects; this one alone if it is not initialized."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def here_together(self) -> int:
        """How many of the processes run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.count > 1 else 1

    # --- work and its results

    def share(self, items: Sequence[T], group: int = 1) -> Sequence[T]:
        """The items that this process works on; each item belongs to one process.

        Args:
            group: so many consecutive items stay together: the groups are the same for any number of processes.
        """
        if group == 1 or self.count == 1:
            return items[self.rank :: self.count]
        starts = range(self.rank * group, len(items), self.count * group)
        return [item for start in starts for item in items[start : start + group]]

    def add_up(self, counts: np.ndarray) -> np.ndarray:
        """int64 counts, added up over all processes."""
        if self.count == 1:
            return counts
        total = torch.from_numpy(np.array(counts, np.int64))
        dist.all_reduce(total)
        return total.numpy()

    def to_first(self, rows: np.ndarray) -> np.ndarray:
        """In the first process, the rows of all processes, one after the other; in the others their own."""
        if self.count == 1:
            return rows
        parts: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(rows, parts)
        return rows if parts is None else np.concatenate(parts)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returned in the first process, in all of them; if it raised a DarsegError, all end."""
        value = self.together(lambda: make() if self.first else None)
        if self.count == 1:
            return value  # ty: ignore[invalid-explicit-return]
        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """`work()`; if it raises a DarsegError in any process, all end and the first reports all errors."""
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except DarsegError as raised:
            error = raised
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, None if error is None else (type(error), str(error)))
        errors = [answer for answer in answers if answer is not None]
        if errors:
            self._end(errors)
        return result  # ty: ignore[invalid-explicit-return]

    def end_all(self, error: DarsegError) -> NoReturn:
        """End all processes with an error that all of them have met; the first reports it."""
        self._end([(type(error), str(error))])

    def leave(self, error: BaseException) -> NoReturn:
        """End a process other than the first, which reports the error that all have met."""
        time.sleep(REPORTING)
        raise SystemExit(getattr(error, "code", 2))

    def _end(self, errors: list[tuple[type[DarsegError], str]]) -> NoReturn:
        kind, text = errors[0]
        if not self.first:
            self.leave(kind(text))
        raise kind("\n".join(dict.fromkeys(text for _, text in errors)))

    def any(self, *here: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any process. The question goes over the CPU, so no GPU is waited for."""
        if self.count == 1:
            return here
        flags = torch.tensor(here, dtype=torch.int64)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return tuple(map(bool, flags))

    def gather(self, names: Sequence[str]) -> list[str]:
        """The names of all processes, sorted, each once."""
        if self.count == 1:
            return sorted(set(names))
        all_names: list[Sequence[str]] = [()] * self.count
        dist.all_gather_object(all_names, names)
        return sorted({name for names_there in all_names for name in names_there})

    # --- a training step

    @property
    def own_seed(self) -> tuple[int, ...]:
        """What makes this process's dropout another than the first's."""
        return (self.rank,) if self.rank else ()

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network, or a wrapper that averages its gradients over all processes."""
        if self.count == 1:
            return network
        # Statistics are not sent from the first process before every pass: the two halves of a step are two passes, and
        # a change between them would spoil the backward pass.
        indices = [device.index or 0] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about a newer name of this option
            return DistributedDataParallel(network, device_ids=indices, broadcast_buffers=False)

    def gathers(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Exchange gradients once a step, with its last micro-batch."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of a module that is not wrapped, as `wrap` does for the network."""
        if self.count == 1:
            return
        for parameter in module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.count

    def count_together(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches with divisors that are counted over all processes."""
        if self.count == 1:
            return list(batches)
        counts = torch.stack([batch.count() for batch in batches])
        dist.all_reduce(counts)
        return [replace(batch, divisor=count) for batch, count in zip(batches, counts, strict=True)]

    def sum_seen(self, seen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors added up over all processes; each process names the same ones."""
        if self.count == 1:
            return seen
        total = {name: value.clone() for name, value in sorted(seen.items())}
        for value in total.values():
            dist.all_reduce(value)
        return total

    def add_figures(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures, numbers or vectors, added up over all processes; the gradient's norm is the same in all."""
        if self.count == 1:
            return dict(figures)
        names = sorted(set(figures) - {"gradient_norm"})
        total = torch.cat([figures[name].float().flatten() for name in names])
        dist.all_reduce(total)
        parts = total.split([figures[name].numel() for name in names])
        summed = {name: part.view_as(figures[name]) for name, part in zip(names, parts, strict=True)}
        return summed | {"gradient_norm": figures["gradient_norm"]}

    def total(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch; not finite if that of any process is not."""
        if self.count == 1:
            return loss
        loss = loss.clone()
        dist.all_reduce(loss)
        return loss

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Average BatchNorm's running statistics over processes that each saw their own share.

        In float64, where equal values, as those of a frozen backbone, stay what they are.
        """
        if self.count == 1:
            return
        statistics = [
            buffer
            for name, buffer in module.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        ]
        if not statistics:
            return
        total = torch.cat([buffer.double().flatten() for buffer in statistics])
        dist.all_reduce(total)
        total /= self.count
        for buffer, average in zip(
            statistics, total.split([item.numel() for item in statistics]), strict=True
        ):
            buffer.copy_(average.view_as(buffer))


def _world_size() -> int:
    """How many processes torchrun started. Raises RunError if only some of its variables are set."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise RunError(f"The environment variable WORLD_SIZE is {text!r}. Unset it, or start with torchrun.")
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if int(text) > 1 and missing:
        raise RunError(
            f"The environment variable WORLD_SIZE is {text}, but {', '.join(missing)} are not set. torchrun sets them "
            "all: start with torchrun, or unset WORLD_SIZE to work with one process."
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and all(
        os.environ.get(name, "").isdecimal() and int(os.environ[name]) > most
        for name, most in RESTARTED.items()
    ):
        # Processes meet under the number of restarts, which nodes count for themselves: a process that failed is counted,
        # one that torchrun ends because another node starts again is not. They would wait for each other.
        raise RunError(
            "torchrun --max-restarts on several nodes: processes that are started again may not find each other, since "
            "PyTorch lets them meet where those before them met. Set the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes before torchrun, or leave --max-restarts out."
        )
    return int(text)


def notice_silence() -> None:
    """Let the system end connections to machines that have been silent for `SILENCE` seconds.

    A process that ends closes its connections, and the others notice. A machine that loses its power or its network does
    not, and whoever waits for it would wait for `PATIENCE`. Machines answer also while their processes compute or are
    stopped. Nothing happens on systems other than Linux.
    """
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                    _end_if_silent(connection)


def _end_if_silent(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, SILENCE // 4),  # seconds without data until the other machine is asked
        (socket.TCP_KEEPINTVL, SILENCE // 8),  # seconds between questions
        (socket.TCP_KEEPCNT, 6),
        (socket.TCP_USER_TIMEOUT, 1000 * SILENCE),  # milliseconds: of data that is not confirmed
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def disconnect() -> None:
    """Leave the processes that torch.distributed connects; does nothing in a process that is alone.

    The group's threads abort the interpreter as it ends (SIGABRT, "terminate called without an active exception") if
    anything holds the group then: a wrapped network that waits for the garbage collector does.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
