"""What tells one way to use unlabeled images from another: values and functions that the loop (stage.py) calls.

A step has two phases. *Label*: what the streams gave becomes ordinary batches, without gradients. *Loss*: the batches go
through the network, micro-batch by micro-batch. After the optimizers have stepped, *moved* lets the state follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from darseg.data.batches import Batch
from darseg.data.views import Views
from darseg.training.optimize import SGD, OptimizerKind

Figures = Mapping[str, Tensor]
"""Numbers to report, by name: "loss", the total, and any others. Those of the micro-batches and processes of a step are
added up. Reports draw "loss" and every "loss_*"."""

Streamed = Batch | Views
"""What a stream yields at a step."""


@dataclass(frozen=True)
class Feed:
    """A stream that a method asks for.

    Attributes:
        role: whose images: labeled ones, pseudo-labeled ones, or unlabeled ones (which come as `Views`).
        size: images of a batch, over all processes.
        strong: strong views of each unlabeled image.
    """

    role: Literal["labeled", "pseudo", "unlabeled"]
    size: int
    strong: int = 0


def equal_rates(name: str) -> float:
    """The rate factor of a parameter by its name: 1 for all."""
    return 1.0


@dataclass(frozen=True)
class Learner:
    """A module that an optimizer moves.

    Attributes:
        name: "network", or the name of a part of the method's state; names the optimizer's part of a checkpoint.
        module: its trainable parameters learn.
        learning_rate: the base of the schedule.
        optimizer: kind and plain numbers.
        rate_factor: parameter name → its rate as a multiple of the schedule's.
    """

    name: str
    module: nn.Module
    learning_rate: float
    optimizer: OptimizerKind = field(default_factory=SGD)
    rate_factor: Callable[[str], float] = equal_rates


def as_streamed(state: nn.Module, streamed: Sequence[Streamed], step: int) -> Sequence[Batch]:
    """The batches as the streams gave them: the label phase of a method whose streams are all labeled."""
    batches = [batch for batch in streamed if isinstance(batch, Batch)]
    assert len(batches) == len(streamed), "unlabeled images need a label phase of their own"
    return batches


def stay(state: nn.Module, network: nn.Module, step: int) -> None:
    """Nothing follows the network: for a method without state."""


@dataclass(frozen=True)
class Method:
    """One use of unlabeled images. Made by a function in `methods/`, picked by a `match` in run/build.py.

    Attributes:
        feeds: the streams of a step, in the order in which `label` receives them.
        learners: what the optimizers move; the first is the network.
        loss: (network, batches, step) → the loss of these micro-batches, a scalar, and figures. Losses add up over
            micro-batches and processes if every mean over pixels divides by `Batch.count()`.
        label: (state, what the streams gave, step) → batches, without gradients, on the process's whole share. It must
            not change the state: a step that fails leaves everything as it was.
        moved: (state, network, step) → None, after the optimizers have stepped: a teacher follows, counters advance.
        state: everything that moves with the step besides the network; saved, restored and placed with it.
        outcome: (state, network) → the network that the round saves.
        exact: whether micro-batches and processes add up to one batch.
    """

    feeds: tuple[Feed, ...]
    learners: tuple[Learner, ...]
    loss: Callable[[Callable, Sequence[Batch], int], tuple[Tensor, Figures]]
    label: Callable[[nn.Module, Sequence[Streamed], int], Sequence[Batch]] = as_streamed
    moved: Callable[[nn.Module, nn.Module, int], None] = stay
    state: nn.Module = field(default_factory=nn.Module)
    outcome: Callable[[nn.Module, nn.Module], nn.Module] = lambda state, network: network
    exact: bool = True

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        return self.learners[0].module
