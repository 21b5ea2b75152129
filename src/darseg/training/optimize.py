"""Optimizers as plain values, their parameter groups, and their state as tensors by parameter name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from darseg.errors import RunError, faults

CLIP_EPSILON = 1e-6
"""Keeps clipping from dividing by zero (PyTorch's value)."""

SEPARATOR = ":"
"""Stands between a parameter's name and the name of a tensor of its optimizer state."""


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
    module: nn.Module,
    kind: OptimizerKind,
    rate_factor: Callable[[str], float],
    decays: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `module`.

    It has a group for each rate factor and use of weight decay. Each group holds its `factor`, so that a schedule can
    set `lr = rate * factor`; until it does, rates are 0.

    Args:
        decays: (name, parameter) → whether weight decay acts on it.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rate_factor(name), decays(name, parameter)), []).append(parameter)
    # On a CPU fused SGD is no faster, and 0.2 gave the bytes of the other; fused AdamW takes a sixth of the time.
    fused = any(parameter.is_cuda for parameter in module.parameters()) or not isinstance(kind, SGD)
    match kind:
        case SGD():
            make: type[torch.optim.Optimizer] = torch.optim.SGD
        case Adam():
            make = torch.optim.Adam
        case AdamW():
            make = torch.optim.AdamW
    return make(
        [
            {"params": parameters, "factor": factor} | ({} if decayed else {"weight_decay": 0.0})
            for (factor, decayed), parameters in groups.items()
        ],
        lr=0.0,
        fused=fused or None,
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


SGD_TENSORS = frozenset({"momentum_buffer"})
ADAM_TENSORS = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What an optimizer keeps for a parameter once it has stepped."""


def tensor_names(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """The tensors that an optimizer keeps for a parameter once it has stepped."""
    return SGD_TENSORS if isinstance(optimizer, torch.optim.SGD) else ADAM_TENSORS


def fits(kind: OptimizerKind, tensors: Mapping[str, Tensor]) -> bool:
    """Whether saved tensors are the state of an optimizer of this kind."""
    names = {key.rsplit(SEPARATOR, 1)[-1] for key in tensors}
    return names == (SGD_TENSORS if isinstance(kind, SGD) else ADAM_TENSORS)


def misfits(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> list[str]:
    """Why saved tensors are not the state of this optimizer, a line each; no tensors fit any."""
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    wanted = {f"{name}{SEPARATOR}{key}" for name in trainable for key in tensor_names(optimizer)}
    if not tensors:
        return []
    missing = [f"{name}: missing" for name in sorted(wanted - tensors.keys())]
    return missing + [f"{name}: not part of this optimizer" for name in sorted(tensors.keys() - wanted)]


@torch.no_grad()
def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` gave, or start fresh if it is empty: SGD then starts with zeros.

    PyTorch would make SGD's momentum in its first step. If that step is skipped (fp16 beyond its range), its fused SGD
    would go on with uninitialized memory. Raises RunError if the tensors are not those of this optimizer.
    """
    if lines := misfits(module, optimizer, tensors):
        raise RunError(faults("The saved state belongs to another optimizer", lines, limit=10))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(optimizer, torch.optim.SGD):
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if tensors:
                buffer.copy_(tensors[f"{name}{SEPARATOR}momentum_buffer"])
            optimizer.state[parameter]["momentum_buffer"] = buffer
        elif tensors:
            for key in tensor_names(optimizer):
                value = tensors[f"{name}{SEPARATOR}{key}"]
                # A step count stays on the CPU unless the optimizer is fused, as PyTorch has it.
                place = parameter.device if parameter.is_cuda else value.device
                like = torch.empty_like(parameter) if value.ndim else torch.empty((), device=place)
                optimizer.state[parameter][key] = like.copy_(value)


def fill_gradients(module: nn.Module) -> None:
    """Give zeros to trainable parameters without a gradient: all processes then sum the same ones."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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


def faster_blocks(rate_factor: Callable[[str], float]) -> Callable[[str], float]:
    """Rate factors with a ResNet's blocks 3 times as fast, and their shortcuts 4 times.

    The releases of AdvSemiSeg and s4GAN list the convolutions of blocks 3 times in one group of parameters, those of
    shortcuts 4 times, and PyTorch of that time moved a parameter once for each.
    """

    def faster(name: str) -> float:
        repeated = name.startswith(f"{BACKBONE}layer")
        return rate_factor(name) * ((4.0 if ".downsample." in name else 3.0) if repeated else 1.0)

    return faster


BLOCK = re.compile(r"backbone\.body\.blocks\.(\d+)\.")
"""A transformer's block in a parameter's name."""

EMBEDDINGS = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm_pre.")
"""What comes before a transformer's blocks."""


def slower_layers(
    rate_factor: Callable[[str], float], decay: float, *, blocks: int
) -> Callable[[str], float]:
    """Rate factors that fall by `decay` from block to block toward a transformer's input.

    As in BEiT (Bao et al. 2021). The last of the `blocks` has `decay` times the factor, the embeddings decay^(blocks
    + 1) times; norms after the last block and heads keep theirs.
    """

    def slowed(name: str) -> float:
        if match := BLOCK.match(name):
            return rate_factor(name) * decay ** (blocks - int(match[1]))
        before = name.startswith(BACKBONE) and name.removeprefix("backbone.body.").startswith(EMBEDDINGS)
        return rate_factor(name) * (decay ** (blocks + 1) if before else 1.0)

    return slowed


LAST_NORM = "backbone.body.norm."
"""What comes after them."""


def layer_of(name: str) -> str:
    """What a parameter belongs to, in a reader's words: heads, block 3, embeddings, stage 4, backbone …"""
    if not name.startswith(BACKBONE):
        return "heads"
    if match := BLOCK.match(name):
        return f"block {match[1]}"
    if name.removeprefix("backbone.body.").startswith(EMBEDDINGS):
        return "embeddings"
    if name.startswith(LAST_NORM):
        return "last norm"
    return "stage 4" if name.startswith(LAST_STAGE) else "backbone"


def only_matrices(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: not on norms, biases, layer scales and embeddings."""
    return parameter.ndim > 1 and not name.endswith(("pos_embed", "_token"))


def clip_gradients(module: nn.Module, norm: Tensor, limit: float) -> None:
    """Scale the gradients of `module` from their norm `norm` to at most `limit`; no GPU is waited for."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    torch._foreach_mul_(gradients, (limit / (norm + CLIP_EPSILON)).clamp(max=1.0))
