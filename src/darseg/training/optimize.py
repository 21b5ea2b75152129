"""Optimizers as plain values, their parameter groups, and their state as tensors by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

SEPARATOR = ":"
"""Between a parameter's name and the name of a tensor of its optimizer state."""


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent. Defaults: the release of DARS."""

    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015). Defaults: PyTorch's."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). Defaults: PyTorch's."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


OptimizerKind = SGD | Adam | AdamW


def build_optimizer(
    module: nn.Module, kind: OptimizerKind, rate_factor: Callable[[str], float]
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `module`, a group for each rate factor.

    Each group holds its `factor`, so that a schedule can set `lr = rate * factor`; until it does, rates are 0.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rate_factor(name), []).append(parameter)
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())
    match kind:
        case SGD():
            make: type[torch.optim.Optimizer] = torch.optim.SGD
        case Adam():
            make = torch.optim.Adam
        case AdamW():
            make = torch.optim.AdamW
    return make(
        [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
        lr=0.0,
        fused=on_gpu or None,
        **asdict(kind),
    )


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as "PARAMETER:TENSOR" ("head.weight:momentum_buffer"), as references."""
    return {
        f"{name}{SEPARATOR}{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` gave. SGD starts with zeros if there is no momentum to restore.

    PyTorch would make SGD's momentum in its first step. If that step is skipped (fp16 beyond its range), its fused SGD
    would go on with uninitialized memory.
    """
    sgd = isinstance(optimizer, torch.optim.SGD)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = f"{name}{SEPARATOR}"
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if sgd:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if "momentum_buffer" in saved:
                buffer.copy_(saved["momentum_buffer"])
            optimizer.state[parameter]["momentum_buffer"] = buffer
        elif saved:
            for key, value in saved.items():
                # A step count stays on the CPU unless the optimizer is fused, as PyTorch has it.
                place = parameter.device if value.ndim or parameter.is_cuda else value.device
                like = torch.empty_like(parameter) if value.ndim else torch.empty((), device=place)
                optimizer.state[parameter][key] = like.copy_(value)


BACKBONE, LAST_STAGE = "backbone.", "backbone.layer4."


def faster_heads(factor: float, *, stage4_as_head: bool = False) -> Callable[[str], float]:
    """Rate factors: 1 for the backbone, `factor` for everything else (the release: 10).

    Args:
        stage4_as_head: a ResNet's last stage learns at the heads' rate, as in the release's DeepLabv2, which counts
            parameter groups wrongly.
    """

    def rate_factor(name: str) -> float:
        slow = name.startswith(BACKBONE) and not (stage4_as_head and name.startswith(LAST_STAGE))
        return 1.0 if slow else factor

    return rate_factor
