"""A teacher: the running average of a network's weights, which follows the network after every step.

It can label for the network that learns (consistency.py, mean_teacher.py), and it can be what a round saves, evaluates
and labels with. `with_teacher` gives one to any method that has no state of its own.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from darseg.errors import RecipeError
from darseg.model.network import Network
from darseg.training.method import Method


@dataclass(frozen=True)
class TeacherSettings:
    """How a teacher follows.

    Attributes:
        decay: share of the teacher that stays at each step. Early steps, counted from t = 0, keep less:
            min(1 - 1 / (t + 1), decay), so that after the first step the teacher is the network.
        result: whether the round saves the teacher instead of the network that learns.
    """

    decay: float = 0.996
    result: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise RecipeError(
                f"The teacher's decay {self.decay} is not valid. Give a number from 0 to below 1, such as 0.996."
            )


class Teacher(nn.Module):
    """A copy of a network that does not learn by itself. It always is in eval mode.

    Attributes:
        network: the copy; its parameters need no gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever the modules around it do."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, network: nn.Module, settings: TeacherSettings, step: int) -> None:
        """Move toward a network, parameters and BatchNorm's statistics alike; counters are copied.

        Args:
            step: of the round, from 0.
        """
        decay = min(1 - 1 / (step + 1), settings.decay)
        mine, theirs = self.network.state_dict(), network.state_dict()
        numbers = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in numbers], [theirs[name] for name in numbers], 1 - decay)
        if counters := [name for name, value in mine.items() if not value.is_floating_point()]:
            torch._foreach_copy_([mine[name] for name in counters], [theirs[name] for name in counters])


class TeacherState(nn.Module):
    """The state of a method that has a teacher and nothing else."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.teacher = Teacher(network)


def with_teacher(method: Method, settings: TeacherSettings) -> Method:
    """The method with a teacher that follows its network; how the network learns stays the same."""
    network = method.network
    assert isinstance(network, Network) and not method.state.state_dict()

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        assert isinstance(state, TeacherState)
        state.teacher.follow(network, settings, step)

    def outcome(state: nn.Module, network: nn.Module) -> nn.Module:
        assert isinstance(state, TeacherState)
        return state.teacher.network if settings.result else network

    return replace(method, state=TeacherState(network), moved=moved, outcome=outcome)


@contextlib.contextmanager
def in_eval_mode(network: nn.Module) -> Generator[None]:
    """Every module in eval mode inside the block, so that predicting moves no statistics."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
