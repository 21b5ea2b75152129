"""One stage of training: the only loop, on one process or many. A `Method` fills its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darseg.choices import Precision
from darseg.data.batches import Batch, split_together
from darseg.errors import Interrupted, RecipeError, faults
from darseg.training.checkpoint import Checkpoint, Optimization, Part, part_of
from darseg.training.method import Method, Streamed, as_streamed, stay
from darseg.training.optimize import (
    build_optimizer,
    clip_gradients,
    fill_gradients,
    restore_optimizer,
    set_rates,
)
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
        clip: largest norm of a learner's gradient; larger ones are scaled down. None: none is.
    """

    steps: int
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = "fp32"
    seed: tuple[int, ...] = (0,)
    checkpoint_every: int = 200
    micro_batch: int | None = None
    report_every: int = 10
    compile: bool = False
    clip: float | None = None

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
    before: Mapping[str, Part] | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    stop: Callable[[], bool] = lambda: False,
) -> Checkpoint:
    """Train the method's network and state in place; return the state after the last step.

    If torch.distributed is initialized, all processes call this together and their batches are one batch.

    Args:
        begin: a checkpoint of this stage to go on from.
        before: the optimizer states with which the stage before ended, by part, for a stage that begins; learners
            without one start with a fresh optimizer.
        on_checkpoint: called every `checkpoint_every` steps, but not after the last.
        stop: asked after every step; if it says yes in any process, a checkpoint is made and Interrupted is raised.

    Raises NumericsError before anything moves if a loss or gradient is not finite. On a GPU the host does not wait for
    every step: the error comes a few steps later, always before a checkpoint. Until then weights and optimizers stay as
    they were (with fp16: as the scaler leaves them, which skips a step but not those that follow), while the method's
    state may move. Raises RecipeError if the method cannot do what the stage asks.
    """
    loop = _Loop(method, stage)
    first = loop.start(begin, before or {})
    if first >= stage.steps:
        return loop.end()
    running = streams(first)
    began, waited = time.monotonic(), 0.0
    try:
        for step in range(first, stage.steps):
            torch.manual_seed(_dropout_seed((*stage.seed, *loop.processes.own_seed), step))
            asked = time.monotonic()
            streamed = [to_device(next(stream), loop.device) for stream in running]
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
    return loop.end()


class _Loop:
    """What a stage needs to make steps: optimizers, the wrapped network, the processes, the watch."""

    def __init__(self, method: Method, stage: Stage) -> None:
        self.method, self.stage = method, stage
        self.device = next(method.network.parameters()).device
        self.processes = Processes.joined()
        _check_sums(method, stage, self.processes.count)
        method.state.to(self.device)
        optimizers = (
            build_optimizer(learner.module, learner.optimizer, learner.rate_factor, decays=learner.decays)
            for learner in method.learners
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=stage.precision == "fp16")
        self.optimization = Optimization(tuple(optimizers), scaler)
        self.module = self.processes.wrap(method.network, self.device)
        self.forward = torch.compile(self.module) if stage.compile else self.module
        # A label phase may predict with BatchNorm's statistics, and a teacher follows them. They are then kept equal in
        # all processes at every step; otherwise a step would depend on when the last checkpoint averaged them.
        self.looks_at_statistics = method.label is not as_streamed or method.moved is not stay
        self.watch = Watch(self.processes, self.device, steps=stage.steps, precision=stage.precision)

    def start(self, begin: Checkpoint | None, before: Mapping[str, Part]) -> int:
        """Restore a checkpoint, or begin with the optimizers of the stage before. Returns the first step."""
        method = self.method
        method.network.train()
        method.state.train()
        if begin is not None:
            begin.restore(method, self.optimization)
            return begin.step
        for learner, optimizer in zip(method.learners, self.optimization.optimizers, strict=True):
            restore_optimizer(learner.module, optimizer, before.get(part_of(learner), {}))
        return 0

    def step(self, step: int, streamed: Sequence[Streamed]) -> tuple[float, Mapping[str, Tensor]]:
        """Label, loss, optimizers, moved. Returns the network's rate and the figures."""
        method, stage, optimization = self.method, self.stage, self.optimization
        with torch.no_grad(), self._autocast():
            labeled = method.label(method.state, method.network, streamed, step)
        batches = self.processes.count_together(labeled.batches)
        rates = [stage.schedule.rate(step, stage.steps, learner.learning_rate) for learner in method.learners]
        for optimizer, rate in zip(optimization.optimizers, rates, strict=True):
            set_rates(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        loss, figures = self._backward(step, batches)
        norms = self._gradient_norms()
        figures |= {"gradient_norm": norms[0]} | dict(labeled.figures)
        ids = tuple(name for batch in batches for name in batch.ids)
        # The norm over all learners is finite only if each is.
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        numbers = torch.stack([self.processes.total(loss).float(), norm.float()])
        watched = WatchedStep(step, rates[0], ids, numbers=numbers)
        self.watch.look(watched, optimization.scaler, optimization.optimizers)
        if stage.clip is not None:
            for learner, own in zip(method.learners, norms, strict=True):
                clip_gradients(learner.module, own, stage.clip)
        optimization.step()
        with torch.no_grad():
            if self.looks_at_statistics:
                for learner in method.learners:
                    self.processes.average_statistics(learner.module)
            method.moved(method.state, method.network, self.processes.sum_seen(labeled.seen), step)
        if stage.reports(step):
            figures = self.processes.add_figures(figures)
        return rates[0], figures

    def _backward(self, step: int, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the whole batch, by micro-batches. Returns this process's loss and figures."""
        total, figures = torch.zeros((), device=self.device), {}
        micro_batches = split_together(batches, self.stage.micro_batch)
        for number, parts in enumerate(micro_batches, 1):
            with self.processes.gathers(self.module, number == len(micro_batches)):
                with self._autocast():
                    loss, part_figures = self.method.loss(self.forward, parts, step)
                # DistributedDataParallel averages gradients; the parts of a batch are to be added.
                self.optimization.scaler.scale(loss * self.processes.count).backward()
            total = total + loss.detach()
            part_figures = {"loss": loss.detach()} | dict(part_figures)
            figures = {name: figures.get(name, 0.0) + value for name, value in part_figures.items()}
        return total, figures

    def _gradient_norms(self) -> list[Tensor]:
        """Bring the gradients of all learners together and unscale them. Returns their norms."""
        for learner, optimizer in zip(self.method.learners, self.optimization.optimizers, strict=True):
            if learner.module is not self.method.network:
                fill_gradients(learner.module)
                self.processes.average_gradients(learner.module)
            self.optimization.scaler.unscale_(optimizer)
        return [gradient_norm(learner.module) for learner in self.method.learners]

    def _autocast(self) -> torch.autocast:
        precision = AUTOCAST[self.stage.precision]
        return torch.autocast(self.device.type, precision, enabled=precision is not None)

    def checkpoint(self, done: int) -> Checkpoint:
        """The state after `done` steps, if none of them failed."""
        self.watch.settle()
        # Each process saw its own share; a teacher's statistics follow those.
        self.processes.average_statistics(self.method.network)
        self.processes.average_statistics(self.method.state)
        return Checkpoint.capture(done, self.method, self.optimization)

    def end(self) -> Checkpoint:
        """The state after the last step; network and state are then in eval mode."""
        self.method.network.eval()
        self.method.state.eval()
        return self.checkpoint(self.stage.steps)


def _check_sums(method: Method, stage: Stage, processes: int) -> None:
    """Raise RecipeError if a method's batches cannot be split as the stage and the processes ask."""
    lines = []
    if not method.exact and stage.micro_batch is not None:
        lines.append(
            f"training.micro_batch {stage.micro_batch}: its loss is not a sum over images. Remove the key"
        )
    if not method.exact and processes > 1:
        lines.append(f"{processes} processes: its loss is not a sum over images. Run it on one process")
    for feed in method.feeds:
        if feed.size % processes:
            lines.append(
                f"{feed.size} {feed.role} images a step cannot be divided among {processes} processes"
            )
    if lines:
        raise RecipeError(faults("This method cannot be trained with these settings", lines))


def _dropout_seed(seed: Sequence[int], step: int) -> int:
    return int(np.random.SeedSequence([*seed, step]).generate_state(1, np.uint64)[0] >> 1)


def to_device(streamed: Streamed, device: torch.device) -> Streamed:
    """All tensors of what a stream yielded, on the device; copied from pinned memory, in parallel."""
    if device.type == "cpu":
        return streamed

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value

    return replace(streamed, **{item.name: move(getattr(streamed, item.name)) for item in fields(streamed)})
