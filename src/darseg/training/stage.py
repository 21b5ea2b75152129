"""One stage of training: the only loop, on one process or many. What happens in a step comes in as a `Method`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from darseg.choices import Precision
from darseg.data.batches import Batch
from darseg.errors import Interrupted
from darseg.training.checkpoint import OPTIMIZER, Checkpoint, Optimization, Part, part_of
from darseg.training.method import Method, Streamed
from darseg.training.optimize import build_optimizer, restore_optimizer, set_rates
from darseg.training.processes import Processes
from darseg.training.schedule import Schedule
from darseg.training.watch import Watch, WatchedStep, gradient_norm

Streams = Callable[[int], Sequence[Iterator[Streamed]]]
"""First step → a stream for each feed of the method from there on, each with this process's share of every batch."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Stage:
    """How long a stage is, and how its steps are computed.

    Attributes:
        steps: how many.
        schedule: of the learning rates; each learner has its own base.
        precision: bf16, fp16: forward passes run under autocast; fp16 scales losses.
        seed: non-negative integers from which dropout is drawn, with the step.
        checkpoint_every: steps between checkpoints.
        micro_batch: images per forward pass of a process; gradients are accumulated. None: each batch whole. BatchNorm
            sees micro-batches.
        report_every: steps between those whose figures are added up over all processes.
        compile: run the network through torch.compile.
    """

    steps: int
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = "fp32"
    seed: tuple[int, ...] = (0,)
    checkpoint_every: int = 200
    micro_batch: int | None = None
    report_every: int = 10
    compile: bool = False

    def reports(self, step: int) -> bool:
        """Whether the figures of a step are those of all processes."""
        return step % self.report_every == 0 or step == self.steps - 1


@dataclass(frozen=True)
class StepReport:
    """A finished step.

    Attributes:
        rate: learning rate of the network.
        figures: the method's, and `gradient_norm`; of this process's share of the batch, or of the whole batch if
            `stage.reports(step)`.
        waiting: share of the time so far that was spent waiting for batches.
    """

    step: int
    rate: float
    figures: Mapping[str, Tensor]
    waiting: float


def run_stage(
    method: Method,
    streams: Streams,
    stage: Stage,
    *,
    begin: Checkpoint | None = None,
    optimizer_before: Part | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    stop: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Train the method's network and state in place; return the state after the last step.

    If torch.distributed is initialized, all processes call this together and their batches are one batch.

    Args:
        begin: a checkpoint of this stage to go on from.
        optimizer_before: without one: the state with which the network's optimizer ended the stage before.
        on_checkpoint: called every `checkpoint_every` steps, but not after the last.
        stop: asked after every step; if it says yes in any process, a checkpoint is made and Interrupted is raised.

    Raises NumericsError before anything moves if a loss or gradient is not finite. On a GPU the host does not wait for
    every step: the error comes a few steps later, always before a checkpoint, and until then weights and momentum stay
    as they were (with fp16: as the scaler leaves them, which skips a step but not those that follow).
    """
    loop = _Loop(method, stage)
    first = loop.start(begin, optimizer_before or {})
    if first >= stage.steps:
        return loop.end()
    running = streams(first)
    began, waited = time.monotonic(), 0.0
    try:
        for step in range(first, stage.steps):
            torch.manual_seed(_dropout_seed((*stage.seed, *loop.processes.own_seed), step))
            asked = time.monotonic()
            streamed = [_to(next(stream), loop.device) for stream in running]
            waited += time.monotonic() - asked
            rate, figures = loop.step(step, streamed)
            waiting = waited / max(time.monotonic() - began, 1e-9)
            on_step(StepReport(step, rate, figures, waiting=waiting))
            done = step + 1
            stopped, failed = loop.processes.any(stop(), loop.watch.failed is not None)
            if failed:
                loop.watch.settle()
            if (stopped or done % stage.checkpoint_every == 0) and done < stage.steps:
                on_checkpoint(loop.checkpoint(done))
            if stopped and done < stage.steps:
                raise Interrupted(f"stopped after step {done} of {stage.steps}; its state was saved.")
        loop.watch.settle()
    finally:
        for stream in running:
            stream.close()  # ty: ignore[missing-attribute]
    loop.processes.average_statistics(method.network)
    return loop.end()


class _Loop:
    """What a stage needs to make steps: optimizers, the wrapped network, the processes, the watch."""

    def __init__(self, method: Method, stage: Stage) -> None:
        self.method, self.stage = method, stage
        self.device = next(method.network.parameters()).device
        self.processes = Processes.joined()
        method.state.to(self.device)
        optimizers = (
            build_optimizer(learner.module, learner.optimizer, learner.rate_factor)
            for learner in method.learners
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=stage.precision == "fp16")
        self.run = Optimization(tuple(optimizers), scaler)
        self.module = self.processes.wrap(method.network, self.device)
        self.forward = torch.compile(self.module) if stage.compile else self.module
        self.watch = Watch(self.processes, self.device, steps=stage.steps, precision=stage.precision)

    def start(self, begin: Checkpoint | None, optimizer_before: Part) -> int:
        """Restore a checkpoint, or begin at step 0 with the optimizer of the stage before. Returns the first step."""
        method = self.method
        method.network.train()
        method.state.train()
        if begin is not None:
            begin.restore(method, self.run)
            return begin.step
        for learner, optimizer in zip(method.learners, self.run.optimizers, strict=True):
            state = optimizer_before if part_of(learner) == OPTIMIZER else {}
            restore_optimizer(learner.module, optimizer, state)
        return 0

    def step(self, step: int, streamed: Sequence[Streamed]) -> tuple[float, Mapping[str, Tensor]]:
        """Label, loss, optimizers, moved. Returns the network's rate and the figures."""
        method, stage, scaler = self.method, self.stage, self.run.scaler
        with torch.no_grad():
            batches = self.processes.count_together(method.label(method.state, streamed, step))
        rates = [stage.schedule.rate(step, stage.steps, one.learning_rate) for one in method.learners]
        for optimizer, rate in zip(self.run.optimizers, rates, strict=True):
            set_rates(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        loss, figures = self._backward(step, batches)
        for learner, optimizer in zip(method.learners, self.run.optimizers, strict=True):
            if learner.module is not method.network:
                self.processes.average_gradients(learner.module)
            scaler.unscale_(optimizer)
        norms = [gradient_norm(learner.module) for learner in method.learners]
        figures["gradient_norm"] = norms[0]
        ids = tuple(name for batch in batches for name in batch.ids)
        # The first norm is the network's; the norm over all learners is finite only if each is.
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        numbers = torch.stack([self.processes.total(loss).float(), norm.float()])
        self.watch.look(WatchedStep(step, rates[0], ids, numbers=numbers), scaler, self.run.optimizers)
        for optimizer in self.run.optimizers:
            scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            method.moved(method.state, method.network, step)
        if stage.reports(step):
            figures = self.processes.add_figures(figures)
        return rates[0], figures

    def _backward(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the whole batch, by micro-batches. Returns this process's loss and figures."""
        stage, autocast = self.stage, AUTOCAST[self.stage.precision]
        loss, figures = torch.zeros((), device=self.device), {}
        micro_batches = list(zip(*(batch.split(stage.micro_batch) for batch in batches), strict=True))
        for number, parts in enumerate(micro_batches, 1):
            with self.processes.gathers(self.module, number == len(micro_batches)):
                with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                    part, shown = self.method.loss(self.forward, parts, step)
                # DistributedDataParallel averages gradients; the parts of a batch are to be added.
                self.run.scaler.scale(part * self.processes.count).backward()
            loss = loss + part.detach()
            figures = {name: figures.get(name, 0.0) + value for name, value in shown.items()}
        return loss, figures

    def checkpoint(self, done: int) -> Checkpoint:
        """The state after `done` steps, if none of them failed."""
        self.watch.settle()
        self.processes.average_statistics(self.method.network)
        return Checkpoint.capture(done, self.method, self.run)

    def end(self) -> Checkpoint:
        """The state after the last step; network and state are then in eval mode."""
        self.method.network.eval()
        self.method.state.eval()
        return Checkpoint.capture(self.stage.steps, self.method, self.run)


def _dropout_seed(seed: Sequence[int], step: int) -> int:
    return int(np.random.SeedSequence([*seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _to(streamed: Streamed, device: torch.device) -> Streamed:
    """What a stream yielded, on the device; from pinned memory, so that the copy runs while the host goes on."""
    if device.type == "cpu":
        return streamed

    def move(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    names = ("images", "labels") if isinstance(streamed, Batch) else ("weak", "strong", "inside", "boxes")
    return replace(streamed, **{name: move(getattr(streamed, name)) for name in names})
