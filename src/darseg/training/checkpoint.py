"""The state of a stage: weights, momentum, step. Safetensors; equal states give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from darseg.data.files import write_whole_with
from darseg.errors import RunError
from darseg.model.network import Network


@dataclass(frozen=True)
class Checkpoint:
    """After `step` steps of a stage: the network's state dict, SGD's momentum by parameter name, and in fp16 the state
    of the loss scaling.

    Nothing else is needed to go on: data, augmentation and dropout are drawn from the seed and the step.
    """

    step: int
    network: Mapping[str, torch.Tensor]
    momentum: Mapping[str, torch.Tensor]
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(
        cls, step: int, network: Network, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> Checkpoint:
        """The present state, as references: save it before the next step."""
        momentum = {
            name: optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in network.named_parameters()
            if "momentum_buffer" in optimizer.state.get(parameter, {})
        }
        return cls(step, network.state_dict(), momentum, scaler.state_dict())

    def restore(
        self, network: Network, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Put weights, momentum and loss scaling back."""
        network.load_state_dict(self.network)
        restore_momentum(self.momentum, network, optimizer)
        if self.scaling:
            scaler.load_state_dict(dict(self.scaling))


@torch.no_grad()
def restore_momentum(
    momentum: Mapping[str, torch.Tensor], network: Network, optimizer: torch.optim.Optimizer
) -> None:
    """Give SGD the momentum that an earlier stage ended with; zeros where there is none.

    PyTorch would make it in the first step. Where that step is passed over (fp16 beyond its range), its fused SGD
    would go on with the memory as it found it.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if name in momentum:
                buffer.copy_(momentum[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole. Raises StorageError where the disk is full; the earlier one is kept."""
    tensors = {f"network.{key}": value for key, value in checkpoint.network.items()}
    tensors |= {f"momentum.{key}": value for key, value in checkpoint.momentum.items()}
    flat = {key: value.detach().contiguous() for key, value in tensors.items()}
    told = {"step": str(checkpoint.step)}
    if checkpoint.scaling:
        told["scaling"] = json.dumps(dict(checkpoint.scaling))
    write_whole_with(path, lambda aside: save_file(flat, aside, told))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises RunError where it is damaged."""
    network, momentum = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            step, scaling = int(told["step"]), json.loads(told.get("scaling", "{}"))
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part, name = key.split(".", 1)
                (network if part == "network" else momentum)[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise RunError(
            f"{path}: this checkpoint is damaged ({error}). Delete it and run the same command again; "
            "without any, the stage starts from its beginning."
        ) from error
    return Checkpoint(step, network, momentum, scaling)
