"""One stage of training: the plain loop, on one process or many. What to minimize comes in as a function.

Many processes are PyTorch's DistributedDataParallel: started by torchrun, each with its share of every batch. Plainly,
not through a layer such as Lightning Fabric: that would take over wrapping, autocast and moving to the device, a few
lines here, and leave what is long – shares, losses over all labeled pixels, statistics, signals.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darseg.choices import Precision
from darseg.data.batches import Batch
from darseg.errors import Interrupted, NumericsError
from darseg.model.network import Network, parameter_groups
from darseg.training.checkpoint import Checkpoint, restore_momentum
from darseg.training.schedule import rate_at

Objective = Callable[[Callable, Sequence[Batch], int], tuple[Tensor, Mapping[str, Tensor]]]
"""(network, one batch of each stream, step) → (loss, figures to report). Losses and figures of the micro-batches and
processes of a step are added up: means over a batch divide by `Batch.count_labeled`."""

Streams = Callable[[int], Sequence[Iterator[Batch]]]
"""First step → the streams of batches from there on; each process has its own share."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

SMALLEST_SCALE = 1.0
"""Of fp16's loss scaling: gradients that are not finite without any scaling are not its fault."""


@dataclass(frozen=True)
class Stage:
    """One stage of SGD.

    Attributes:
        steps: how many; span: the fractions of the poly curve they cover; learning_rate: the curve's base.
        head_factor: heads learn at this many times the backbone's rate.
        precision: bf16, fp16: forward passes under autocast; fp16 with scaled losses.
        seed: non-negative integers from which dropout is drawn, with the step.
        checkpoint_every: steps between checkpoints.
        micro_batch: images per forward pass of a process; gradients are accumulated. None: each batch whole. BatchNorm
            sees micro-batches.
        report_every: steps between those whose figures are added up over all processes.
        compile: run the network through torch.compile.
        stage4_as_head, first_step_at_zero: as the release has it, by mistake (see `release_quirks` in docs/recipe.md).
    """

    steps: int
    span: tuple[float, float]
    learning_rate: float
    head_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    precision: Precision = "fp32"
    seed: tuple[int, ...] = (0,)
    checkpoint_every: int = 200
    micro_batch: int | None = None
    report_every: int = 10
    compile: bool = False
    stage4_as_head: bool = False
    first_step_at_zero: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of the backbone at a step."""
        if step == 0 and self.first_step_at_zero:
            return 0.0
        return rate_at(step, self.steps, self.span, self.learning_rate, self.power)

    def reports(self, step: int) -> bool:
        """Whether the figures of a step are those of all processes."""
        return step % self.report_every == 0 or step == self.steps - 1


def run_stage(
    network: Network,
    streams: Streams,
    objective: Objective,
    stage: Stage,
    begin: Checkpoint | None = None,
    momentum: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, float, Mapping[str, Tensor], float], None] = lambda *given: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    stop: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Train `network` in place and return the state after the last step.

    Where torch.distributed is initialized, all processes call this together, and their batches are one batch: the
    loss is divided by the labeled pixels of all.

    Args:
        begin: a checkpoint of this stage to go on from.
        momentum: where there is none: the momentum the stage before ended with.
        on_step: called with the step just done, its learning rate, the objective's figures besides `gradient_norm`
            (of this process's share of the batch; of the whole where `stage.reports(step)`), and the share of the time
            so far that was spent waiting for batches.
        on_checkpoint: called every `checkpoint_every` steps, not after the last.
        stop: asked after every step; where it says so (in any process), a checkpoint is made and Interrupted raised.

    Raises NumericsError before the optimizer moves a weight where loss or gradient is not finite. On a GPU the host does
    not wait for every step: the error comes a few steps later, always before a checkpoint, and until then weights and
    momentum stay as they were (fp16: as the scaler has it, which passes over steps, but not over those that follow).
    """
    device, team = network.mean.device, _Team(network.mean.device)
    groups = parameter_groups(
        network, stage.learning_rate, stage.head_factor, stage.weight_decay, stage.stage4_as_head
    )
    optimizer = torch.optim.SGD(
        groups, lr=stage.learning_rate, momentum=stage.momentum, fused=device.type == "cuda" or None
    )
    scaler = torch.amp.GradScaler(device.type, enabled=stage.precision == "fp16")
    first = 0
    if begin is not None:
        begin.restore(network, optimizer, scaler)
        first = begin.step
    else:
        restore_momentum(momentum or {}, network, optimizer)
    if first >= stage.steps:
        network.eval()
        return Checkpoint.capture(stage.steps, network, optimizer, scaler)
    network.train()
    module = team.wrap(network)
    forward = torch.compile(module) if stage.compile else module
    watch = _Watch(stage, team)
    autocast = AUTOCAST[stage.precision]
    feeds = streams(first)
    began, waited = time.monotonic(), 0.0
    try:
        for step in range(first, stage.steps):
            torch.manual_seed(_dropout_seed((*stage.seed, *team.own_seed), step))
            asked = time.monotonic()
            batches = [_to(next(feed), device) for feed in feeds]
            waited += time.monotonic() - asked
            batches = team.count_together(batches)
            rate = stage.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.zero_grad(set_to_none=True)
            loss, figures = torch.zeros((), device=device), {}
            rounds = list(zip(*(batch.split(stage.micro_batch) for batch in batches), strict=True))
            for number, parts in enumerate(rounds, 1):
                with team.gathers(module, number == len(rounds)):
                    with torch.autocast(device.type, autocast, enabled=autocast is not None):
                        part, shown = objective(forward, parts, step)
                    # DistributedDataParallel averages gradients; the parts of a batch are to be added.
                    scaler.scale(part * team.count).backward()
                loss = loss + part.detach()
                figures = {name: figures.get(name, 0.0) + value for name, value in shown.items()}
            scaler.unscale_(optimizer)
            figures["gradient_norm"] = norm = _gradient_norm(network)
            watch.look(step, rate, team.total(loss), norm, scaler, optimizer, batches)
            scaler.step(optimizer)
            scaler.update()
            if stage.reports(step):
                figures = team.add_up(figures)
            on_step(step, rate, figures, waited / max(time.monotonic() - began, 1e-9))
            done = step + 1
            stopped, failed = team.any(stop(), watch.failed is not None)
            if failed:
                watch.settle()
            if (stopped or done % stage.checkpoint_every == 0) and done < stage.steps:
                watch.settle()
                team.average_statistics(network)
                on_checkpoint(Checkpoint.capture(done, network, optimizer, scaler))
            if stopped and done < stage.steps:
                raise Interrupted(f"stopped after step {done} of {stage.steps}; its state was saved.")
        watch.settle()
    finally:
        for feed in feeds:
            feed.close()  # ty: ignore[missing-attribute]
    team.average_statistics(network)
    network.eval()
    return Checkpoint.capture(stage.steps, network, optimizer, scaler)


class _Team:
    """This process and the others that torchrun started; one alone where torch.distributed is not initialized."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def own_seed(self) -> tuple[int, ...]:
        """What tells this process's dropout from the first's."""
        return (self.rank,) if self.rank else ()

    def wrap(self, network: Network) -> nn.Module:
        if self.count == 1:
            return network
        # Statistics are not sent from the first before every pass: the two halves of a step are two passes, and a
        # change between them would spoil the backward pass.
        indices = [self.device.index or 0] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a newer name for this option
            return DistributedDataParallel(network, device_ids=indices, broadcast_buffers=False)

    def gathers(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients go round once a step, with its last micro-batch."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return contextlib.nullcontext()

    def count_together(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, knowing how many pixels are labeled in those of all processes."""
        if self.count == 1:
            return list(batches)
        counts = torch.stack([batch.count_labeled() for batch in batches])
        dist.all_reduce(counts)
        return [replace(batch, labeled_pixels=own) for batch, own in zip(batches, counts, strict=True)]

    def add_up(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes; the gradient is the same in all."""
        if self.count == 1:
            return dict(figures)
        names = sorted(set(figures) - {"gradient_norm"})
        total = torch.stack([figures[name].float() for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total, strict=True)) | {"gradient_norm": figures["gradient_norm"]}

    def total(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch; not finite where that of any process is not."""
        if self.count == 1:
            return loss
        loss = loss.clone()
        dist.all_reduce(loss)
        return loss

    def any(self, *here: bool) -> tuple[bool, ...]:
        """Whether each is so in any process; asked on the CPU, so that no GPU is waited for."""
        if self.count == 1:
            return here
        flags = torch.tensor(here, dtype=torch.int64)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return tuple(map(bool, flags))

    def gather(self, names: Sequence[str]) -> list[str]:
        """Those of all processes, sorted."""
        if self.count == 1:
            return sorted(set(names))
        all_names: list[Sequence[str]] = [()] * self.count
        dist.all_gather_object(all_names, names)
        return sorted({name for own in all_names for name in own})

    @torch.no_grad()
    def average_statistics(self, network: Network) -> None:
        """BatchNorm's running statistics, averaged over processes that each saw their own share."""
        if self.count == 1:
            return
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer)
                buffer /= self.count


@dataclass(frozen=True)
class _Look:
    """A step that was looked at: `numbers` are whether it failed, the loss, and the gradient's norm."""

    step: int
    rate: float
    ids: tuple[str, ...]
    numbers: Tensor


class _Watch:
    """Stops before weights move where loss or gradient is not finite; in all processes at the same step.

    On the CPU at once. On a GPU the optimizer is told not to move, by a flag on the device, and the flag is read on the
    host when it has arrived there, without waiting.
    """

    def __init__(self, stage: Stage, team: _Team) -> None:
        self.stage, self.team = stage, team
        self.blocked = torch.zeros((), device=team.device) if team.device.type == "cuda" else None
        self.waiting: deque[tuple[torch.cuda.Event, _Look]] = deque()
        self.failed: _Look | None = None

    def look(
        self,
        step: int,
        rate: float,
        loss: Tensor,
        norm: Tensor,
        scaler: torch.amp.GradScaler,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Batch],
    ) -> None:
        # Gradients beyond fp16's range only make the scaler pass over the step and scale less.
        excused = scaler.scale(torch.ones_like(loss)) > SMALLEST_SCALE
        failed = ~(torch.isfinite(loss) & (torch.isfinite(norm) | excused))
        ids = tuple(name for batch in batches for name in batch.ids)
        numbers = torch.stack([failed.float(), loss.float(), norm.float()])
        if self.blocked is None:
            self._read(_Look(step, rate, ids, numbers))
            self.settle()
            return
        self.blocked = torch.maximum(self.blocked, failed.float())
        if not scaler.is_enabled():
            optimizer.found_inf = self.blocked  # ty: ignore[missing-attribute]
        host = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((event, _Look(step, rate, ids, host)))
        while self.waiting and self.waiting[0][0].query():
            self._read(self.waiting.popleft()[1])

    def settle(self) -> None:
        """Wait for what was looked at. Raises NumericsError where a step failed: all processes call this together."""
        while self.waiting:
            event, look = self.waiting.popleft()
            event.synchronize()
            self._read(look)
        if self.failed is not None:
            raise NumericsError(_not_finite(self.failed, self.stage, self.team.gather(self.failed.ids)))

    def _read(self, look: _Look) -> None:
        if self.failed is None and look.numbers[0]:
            self.failed = look


@torch.no_grad()
def _gradient_norm(network: Network) -> Tensor:
    """Euclidean norm over all gradients, float32 []."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack([g.float() for g in torch._foreach_norm(gradients)]))


def _dropout_seed(seed: Sequence[int], step: int) -> int:
    return int(np.random.SeedSequence([*seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {}
    for name in ("images", "labels"):
        tensor = getattr(batch, name)
        # Only from pinned memory does a copy run beside the host's work.
        moved[name] = (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
    return replace(batch, **moved)


def _not_finite(look: _Look, stage: Stage, ids: Sequence[str]) -> str:
    _, loss, norm = look.numbers.tolist()
    lower = {
        "fp32": "or look at these images and labels",
        "bf16": "or with training.precision=fp32",
        "fp16": "or with training.precision=bf16 or fp32",
    }
    return (
        f"Loss or gradient is not finite at step {look.step} of {stage.steps} (loss {loss:g}, gradient norm {norm:g}, "
        f"learning rate {look.rate:g}; images {', '.join(ids)}). The weights were not changed by it and the last good "
        f"checkpoint is kept. Start a new run with a lower training.learning_rate, {lower[stage.precision]}."
    )
