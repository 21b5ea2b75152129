"""Stops training before anything moves if the loss or a gradient is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from darseg.errors import NumericsError
from darseg.training.processes import Processes

SMALLEST_SCALE = 1.0
"""fp16's loss scaling at and below which gradients that are not finite are no longer blamed on the scaling."""

REMEDIES = {
    "fp32": "or look at these images and labels",
    "bf16": "or with training.precision=fp32",
    "fp16": "or with training.precision=bf16 or fp32",
}


@dataclass(frozen=True)
class WatchedStep:
    """A step as the watch sees it.

    Attributes:
        rate: learning rate.
        ids: of the images of this process.
        numbers: float32: the loss and the gradient's norm; after `look`, preceded by 1 (failed) or 0.
    """

    step: int
    rate: float
    ids: tuple[str, ...]
    numbers: Tensor


@torch.no_grad()
def gradient_norm(module: nn.Module) -> Tensor:
    """The Euclidean norm over all gradients of a module, [], in float32 or, if higher, their precision."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    return torch.linalg.vector_norm(norms.to(torch.promote_types(norms.dtype, torch.float32)))


class Watch:
    """Looks at every step, and raises in all processes at the same one.

    On the CPU it raises at once. On a GPU the host does not wait: a flag on the device stops the optimizers, and the
    host reads the flag when it arrives, a few steps later.
    """

    def __init__(self, processes: Processes, device: torch.device, *, steps: int, precision: str) -> None:
        self.processes, self.steps, self.precision = processes, steps, precision
        self.blocked = torch.zeros((), device=device) if device.type == "cuda" else None
        self.waiting: deque[tuple[torch.cuda.Event, WatchedStep]] = deque()
        self.failed: WatchedStep | None = None

    def look(
        self,
        step: WatchedStep,
        scaler: torch.amp.GradScaler,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Check the loss and the norm in `step.numbers`; raises NumericsError at once on the CPU."""
        loss, norm = step.numbers
        # If gradients are beyond fp16's range, the scaler skips the step and scales less.
        excused = scaler.scale(torch.ones_like(loss)) > SMALLEST_SCALE
        failed = ~(torch.isfinite(loss) & (torch.isfinite(norm) | excused)).reshape(())
        numbers = torch.cat([failed.float().reshape(1), step.numbers])
        if self.blocked is None:
            self._read(replace(step, numbers=numbers))
            self.settle()
            return
        self.blocked = torch.maximum(self.blocked, failed.float())
        if not scaler.is_enabled():
            for optimizer in optimizers:
                optimizer.found_inf = self.blocked  # ty: ignore[missing-attribute]
        host = numbers.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting.append((event, replace(step, numbers=host)))
        while self.waiting and self.waiting[0][0].query():
            self._read(self.waiting.popleft()[1])

    def settle(self) -> None:
        """Wait for all steps looked at. Raises NumericsError if one failed; all processes call this together."""
        while self.waiting:
            event, step = self.waiting.popleft()
            event.synchronize()
            self._read(step)
        if self.failed is not None:
            raise NumericsError(self._describe(self.failed))

    def _read(self, step: WatchedStep) -> None:
        if self.failed is None and step.numbers[0]:
            self.failed = step

    def _describe(self, step: WatchedStep) -> str:
        _, loss, norm = step.numbers.tolist()
        ids = ", ".join(self.processes.gather(step.ids))
        return (
            f"The loss or the gradient is not finite at step {step.step} of {self.steps} (loss {loss:g}, gradient norm "
            f"{norm:g}, learning rate {step.rate:g}; images {ids}). This step did not change the weights, and the last "
            "good checkpoint is kept. Start a new run with a lower training.learning_rate, "
            f"{REMEDIES[self.precision]}."
        )
