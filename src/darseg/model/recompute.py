"""Less memory for more time: the backward pass computes activations of a ResNet's blocks again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from darseg.errors import RecipeError
from darseg.model.backbone import BasicBlock, Bottleneck
from darseg.model.network import Network


def recompute_blocks(network: Network) -> None:
    """In training, keep only each block's inputs; the backward pass computes the rest again.

    Gradients and BatchNorm's running statistics stay the same: the statistics change only the first time that a block
    sees a batch. Raises RecipeError for backbones without such blocks (timm's).
    """
    blocks = [module for module in network.backbone.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise RecipeError(
            f"training.recompute works only with darseg's ResNets; the backbone is {network.backbone.name}. Choose one "
            "of them, or a smaller training.micro_batch."
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)


def _forward(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not (block.training and torch.is_grad_enabled()):
        return forward(x)
    return checkpoint(
        forward,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_stay(block)),
    )


@contextlib.contextmanager
def _statistics_stay(block: nn.Module) -> Generator[None, None, None]:
    """Inside, BatchNorm works as in training, but its running statistics do not change."""
    # _BatchNorm, because SyncBatchNorm is not a BatchNorm2d.
    norms = [norm for norm in block.modules() if isinstance(norm, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
