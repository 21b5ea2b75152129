"""One stage of training: the plain loop. What to minimise comes in as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from darseg.data.batches import Batch
from darseg.errors import NumericsError
from darseg.model.network import Network, parameter_groups
from darseg.training.checkpoint import Checkpoint, restore_momentum
from darseg.training.schedule import rate_at

Objective = Callable[[Network, Sequence[Batch], int], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
"""(network, one batch of each stream, step) → (loss, figures to report). Losses and figures of the micro-batches of
a step are added up: means over a batch divide by `Batch.count_labeled`."""

Streams = Callable[[int], Sequence[Iterator[Batch]]]
"""First step → the streams of batches from there on."""


@dataclass(frozen=True)
class Stage:
    """One stage of SGD.

    Attributes:
        steps: how many; span: the fractions of the poly curve they cover; learning_rate: the curve's base.
        head_factor: heads learn at this many times the backbone's rate.
        bf16: forward passes under bfloat16 autocast.
        seed: non-negative integers from which dropout is drawn, with the step.
        checkpoint_every: steps between checkpoints.
        micro_batch: images per forward pass; gradients are accumulated. None: each batch whole. BatchNorm sees
            micro-batches.
        stage4_as_head, first_step_at_zero: as the release has it, by mistake (see `release_quirks` in docs/recipe.md).
    """

    steps: int
    span: tuple[float, float]
    learning_rate: float
    head_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    bf16: bool = False
    seed: tuple[int, ...] = (0,)
    checkpoint_every: int = 200
    micro_batch: int | None = None
    stage4_as_head: bool = False
    first_step_at_zero: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of the backbone at a step."""
        if step == 0 and self.first_step_at_zero:
            return 0.0
        return rate_at(step, self.steps, self.span, self.learning_rate, self.power)


def run_stage(
    network: Network,
    streams: Streams,
    objective: Objective,
    stage: Stage,
    begin: Checkpoint | None = None,
    momentum: Mapping[str, torch.Tensor] | None = None,
    on_step: Callable[[int, float, Mapping[str, torch.Tensor]], None] = lambda step, rate, figures: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
) -> Checkpoint:
    """Train `network` in place and return the state after the last step.

    Args:
        begin: a checkpoint of this stage to go on from.
        momentum: where there is none: the momentum the stage before ended with.
        on_step: called with the step just done, its learning rate and the objective's figures.
        on_checkpoint: called every `checkpoint_every` steps, not after the last.

    Raises NumericsError before the optimiser moves a weight where the loss is not finite.
    """
    device = network.mean.device
    groups = parameter_groups(
        network, stage.learning_rate, stage.head_factor, stage.weight_decay, stage.stage4_as_head
    )
    optimizer = torch.optim.SGD(groups, lr=stage.learning_rate, momentum=stage.momentum)
    first = 0
    if begin is not None:
        begin.restore(network, optimizer)
        first = begin.step
    elif momentum:
        restore_momentum(momentum, network, optimizer)
    network.train()
    feeds = streams(first) if first < stage.steps else ()
    try:
        for step in range(first, stage.steps):
            torch.manual_seed(_dropout_seed(stage.seed, step))
            batches = [_to(next(feed), device) for feed in feeds]
            rate = stage.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            optimizer.zero_grad(set_to_none=True)
            loss, figures = torch.zeros((), device=device), {}
            for parts in zip(*(batch.split(stage.micro_batch) for batch in batches), strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=stage.bf16):
                    part, shown = objective(network, parts, step)
                part.backward()
                loss = loss + part.detach()
                figures = {name: figures.get(name, 0.0) + value for name, value in shown.items()}
            if not math.isfinite(loss.item()):
                raise NumericsError(_not_finite(step, stage, loss.item(), rate, batches))
            optimizer.step()
            on_step(step, rate, figures)
            done = step + 1
            if done % stage.checkpoint_every == 0 and done < stage.steps:
                on_checkpoint(Checkpoint.capture(done, network, optimizer))
    finally:
        for feed in feeds:
            feed.close()  # ty: ignore[missing-attribute]
    network.eval()
    return Checkpoint.capture(stage.steps, network, optimizer)


def _dropout_seed(seed: Sequence[int], step: int) -> int:
    return int(np.random.SeedSequence([*seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("images", "labels")}
    return replace(batch, **moved)


def _not_finite(step: int, stage: Stage, loss: float, rate: float, batches: Sequence[Batch]) -> str:
    ids = ", ".join(sorted({name for batch in batches for name in batch.ids}))
    return (
        f"The loss is {loss} at step {step} of {stage.steps} (learning rate {rate:g}; images {ids}). The weights "
        "were not changed by it and the last good checkpoint is kept. Start a new run with a lower "
        "training.learning_rate, or with training.precision=fp32 if it is bf16."
    )
