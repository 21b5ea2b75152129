"""What distinguishes one use of unlabeled images from another, as values and functions.

The loop (stage.py) calls them. A step has two phases. *Label*: what the streams gave becomes ordinary batches, without
gradients. *Loss*: the batches go through the network, micro-batch by micro-batch. After the optimizers have stepped,
*moved* lets the state follow.
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
"""Numbers to report, or vectors of one for each class, by name. Those of the micro-batches and processes of a step are
added up; the loop adds "loss", the total. Reports draw "loss" and every "loss_*"."""

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


def all_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: on all."""
    return True


@dataclass(frozen=True)
class Learner:
    """A module that an optimizer moves.

    Attributes:
        name: "network", or the name of a part of the method's state; names the optimizer's part of a checkpoint.
        module: its trainable parameters learn.
        learning_rate: the base of the schedule.
        optimizer: kind and plain numbers.
        rate_factor: parameter name → its rate as a multiple of the schedule's.
        decays: (name, parameter) → whether weight decay acts on it.
    """

    name: str
    module: nn.Module
    learning_rate: float
    optimizer: OptimizerKind = field(default_factory=SGD)
    rate_factor: Callable[[str], float] = equal_rates
    decays: Callable[[str, nn.Parameter], bool] = all_decay


@dataclass(frozen=True)
class Labeled:
    """What the label phase makes of what the streams gave.

    Attributes:
        batches: what the loss gets.
        figures: numbers to report, added up over processes like the loss's.
        seen: tensors that `moved` gets, added up over processes: counts, histograms, sums of confidences.
    """

    batches: Sequence[Batch]
    figures: Figures = field(default_factory=dict)
    seen: Mapping[str, Tensor] = field(default_factory=dict)


def as_streamed(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
    """The batches as the streams gave them: the label phase of a method whose streams are all labeled."""
    batches = [batch for batch in streamed if isinstance(batch, Batch)]
    assert len(batches) == len(streamed), "unlabeled images need a label phase of their own"
    return Labeled(batches)


def stay(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
    """Nothing follows the network: for a method without state."""


@dataclass(frozen=True)
class Method:
    """One use of unlabeled images. Made by a function in `methods/`; `method_of` in run/plan.py picks it.

    Attributes:
        feeds: the streams of a step, in the order in which `label` receives them.
        learners: what the optimizers move; the first is the network.
        loss: (network, batches, step) → the loss of these micro-batches, a scalar, and figures. Losses add up over
            micro-batches and processes if every mean over pixels divides by `Batch.count()`.
        label: (state, network, what the streams gave, step) → `Labeled`, without gradients, on the process's whole
            share. It must not change the state or the network: a step that fails leaves everything as it was.
        moved: (state, network, seen, step) → None, after the optimizers have stepped: a teacher follows, counters and
            histograms advance. It is also called after a step that fp16's scaler skips.
        state: everything that moves with the step besides the network; saved, restored and placed with it.
        outcome: (state, network) → the network that the round saves.
        exact: whether micro-batches and processes add up to one batch; if not, both are refused.
    """

    feeds: tuple[Feed, ...]
    learners: tuple[Learner, ...]
    loss: Callable[[Callable, Sequence[Batch], int], tuple[Tensor, Figures]]
    label: Callable[[nn.Module, nn.Module, Sequence[Streamed], int], Labeled] = as_streamed
    moved: Callable[[nn.Module, nn.Module, Mapping[str, Tensor], int], None] = stay
    state: nn.Module = field(default_factory=nn.Module)
    outcome: Callable[[nn.Module, nn.Module], nn.Module] = lambda state, network: network
    exact: bool = True

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        return self.learners[0].module
