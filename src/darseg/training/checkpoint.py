"""The state of a stage in named parts, saved as safetensors; equal states give equal bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from darseg.data.files import parse_json, raise_if_unreadable, write_whole_with
from darseg.errors import FormatError, RunError, faults
from darseg.model.torchfile import check_head
from darseg.training.method import Learner, Method
from darseg.training.optimize import SEPARATOR, optimizer_state, restore_optimizer

NETWORK, OPTIMIZER, METHOD = "network", "optimizer", "method"

FORMAT = 2
"""1: darseg 0.2 – the parts "network" and "momentum", dots between part and name, no format in the file."""

Part = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on after `step` steps.

    Data, augmentation and dropout are not in it: they are drawn from the seed and the step.

    Attributes:
        parts: "network" and "method" (state dicts), "optimizer" of the network and "optimizer.NAME" of other learners
            (see `optimizer_state`). A file that keeps only some of them has only those.
        scaling: state of fp16's loss scaling; empty otherwise.
    """

    step: int
    parts: Mapping[str, Part]
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(cls, step: int, method: Method, optimization: Optimization) -> Checkpoint:
        """The present state, as references: save it before the next step."""
        parts: dict[str, Part] = {NETWORK: method.network.state_dict(), METHOD: method.state.state_dict()}
        for learner, optimizer in zip(method.learners, optimization.optimizers, strict=True):
            parts[part_of(learner)] = optimizer_state(learner.module, optimizer)
        return cls(step, parts, optimization.scaler.state_dict())

    def restore(self, method: Method, optimization: Optimization) -> None:
        """Put everything back. Raises RunError if a part is missing or nobody asks for it."""
        wanted = {NETWORK, METHOD, *map(part_of, method.learners)}
        unknown = [f"{name}: not part of this method" for name in self.parts if name not in wanted]
        missing = [f"{name}: missing" for name in sorted(wanted) if name not in self.parts]
        if unknown or missing:
            raise RunError(
                faults("The checkpoint belongs to another method", unknown + missing)
                + "\nGo on with the recipe that wrote it, or delete the checkpoints of this round to start it again."
            )
        try:
            method.network.load_state_dict(self.parts[NETWORK])
            method.state.load_state_dict(self.parts[METHOD])
            for learner, optimizer in zip(method.learners, optimization.optimizers, strict=True):
                restore_optimizer(learner.module, optimizer, self.parts[part_of(learner)])
            if self.scaling:
                optimization.scaler.load_state_dict(dict(self.scaling))
        except (RuntimeError, KeyError) as error:  # tensors or keys are missing, or of other shapes
            raise RunError(
                f"The checkpoint does not fit this network and its method: {error}\nGo on with the recipe that wrote it, "
                "or delete the checkpoints of this round to start it again."
            ) from error

    def optimizers(self) -> Checkpoint:
        """The state of the network's optimizer: what a round leaves besides its network.

        Other learners are parts of the method's state, which begins again in every round.
        """
        return Checkpoint(self.step, {name: part for name, part in self.parts.items() if name == OPTIMIZER})


@dataclass(frozen=True)
class Optimization:
    """The optimizers of a method's learners, in their order, and fp16's loss scaling."""

    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: torch.amp.GradScaler

    def step(self) -> None:
        """Move all learners, or none if the scaler finds a gradient beyond the range of fp16."""
        if self.scaler.is_enabled() and len(self.optimizers) > 1:
            # The scaler decides for each optimizer alone, and PyTorch has no public way to inform it of the others.
            overflow_flags = [
                value
                for optimizer in self.optimizers
                for value in self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
            ]
            overflowed = torch.stack([flag.to(overflow_flags[0].device) for flag in overflow_flags]).amax(0)
            for flag in overflow_flags:
                flag.copy_(overflowed)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()


def part_of(learner: Learner) -> str:
    """The name of a learner's optimizer in a checkpoint."""
    return OPTIMIZER if learner.name == NETWORK else f"{OPTIMIZER}.{learner.name}"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint whole. Raises StorageError if the disk is full; an earlier file is then kept."""
    tensors = {
        f"{part}{SEPARATOR}{name}": value.detach().cpu().contiguous()
        for part, values in checkpoint.parts.items()
        for name, value in values.items()
    }
    # One entry: safetensors writes several in no fixed order.
    state = {"format": FORMAT, "step": checkpoint.step, "parts": sorted(checkpoint.parts)}
    state["crc32"] = _checksum(tensors)
    metadata = {
        "checkpoint": json.dumps(
            state | ({"scaling": dict(checkpoint.scaling)} if checkpoint.scaling else {})
        )
    }
    write_whole_with(path, lambda aside: save_file(tensors, aside, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises RunError if it is damaged, FormatError if a later version wrote it.

    Raises StorageError if it cannot be opened, but may be whole.
    """
    try:
        check_head(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if "checkpoint" not in metadata:
                return _format_1(file, metadata)
            state = parse_json(metadata["checkpoint"])
            if state["format"] > FORMAT:
                raise FormatError(
                    f"{path}: this checkpoint is of format {state['format']}, and this version of darseg reads formats "
                    f"up to {FORMAT}. Go on with the version that wrote it, or upgrade darseg."
                )
            step, scaling = _checked(state["step"], state.get("scaling", {}))
            parts: dict[str, dict[str, Tensor]] = {name: {} for name in state["parts"]}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part, name = key.split(SEPARATOR, 1)
                parts[part][name] = file.get_tensor(key)
            _check_sum(parts, state.get("crc32"))
            return Checkpoint(step, parts, scaling)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError, OSError) as error:
        raise_if_unreadable(error, path)
        raise RunError(
            f"{path}: this checkpoint is damaged ({error}). Delete it and run the same command again; if no "
            "checkpoint is left, the stage starts from its beginning."
        ) from error


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over the bytes of contiguous CPU tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1)
        value = zlib.crc32(flat.view(torch.uint8).numpy(), value) if flat.numel() else value
    return value


def _check_sum(parts: Mapping[str, Part], recorded: int | None) -> None:
    """Raise ValueError if tensors are not those that were written; early files have no checksum."""
    tensors = {
        f"{part}{SEPARATOR}{name}": value for part, values in parts.items() for name, value in values.items()
    }
    if recorded is not None and recorded != _checksum(tensors):
        raise ValueError("its content is not what was written: the checksum differs")


def _format_1(file: Any, metadata: Mapping[str, str]) -> Checkpoint:
    """A checkpoint of darseg 0.2: the state of SGD was its momentum alone, and methods had no state."""
    parts: dict[str, dict[str, Tensor]] = {NETWORK: {}, OPTIMIZER: {}, METHOD: {}}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        part, name = key.split(".", 1)
        if part not in (NETWORK, "momentum"):
            raise ValueError(f"unknown part {part}")
        if part == "momentum":
            parts[OPTIMIZER][f"{name}{SEPARATOR}momentum_buffer"] = file.get_tensor(key)
        else:
            parts[part][name] = file.get_tensor(key)
    step, scaling = _checked(int(metadata["step"]), parse_json(metadata.get("scaling", "{}")))
    return Checkpoint(step, parts, scaling)


def _checked(step: Any, scaling: Any) -> tuple[int, dict[str, float]]:
    """The step and the loss scaling of a file. Raises ValueError for anything that no checkpoint holds."""
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError(f"its step is {str(step)[:60]}")
    if not isinstance(scaling, dict) or not all(type(value) in (int, float) for value in scaling.values()):
        raise ValueError("its loss scaling is no object of numbers")
    return step, scaling
