"""Less memory for more time: activations of a ResNet's blocks are computed again in the backward pass."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from darseg.errors import RecipeError
from darseg.model.backbone import BasicBlock, Bottleneck
from darseg.model.network import Network


def recompute_blocks(network: Network) -> None:
    """Keep only the inputs of each block while training, and compute the rest again where the backward pass needs it.

    Gradients are the same. Each BatchNorm sees a batch twice, so its momentum m becomes 1 − √(1 − m): two updates then
    move its statistics as one did. Raises RecipeError for backbones without such blocks (timm's).
    """
    blocks = [module for module in network.backbone.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise RecipeError(
            f"training.recompute: {network.backbone.name} has no blocks that could be computed again; take a ResNet, or "
            "a smaller training.micro_batch."
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d) and module.momentum:
                module.momentum = 1 - math.sqrt(1 - module.momentum)


def _forward(block: nn.Module, forward, x: Tensor) -> Tensor:
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, x, use_reentrant=False)
    return forward(x)
