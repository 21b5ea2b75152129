"""Less memory for more time: the backward pass computes activations of a backbone's blocks again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from darseg.errors import RecipeError
from darseg.model.backbone import BasicBlock, Bottleneck
from darseg.model.network import Network
from darseg.model.vit import Transformer


def recompute_blocks(network: Network) -> None:
    """In training, keep only each block's inputs; the backward pass computes the rest again.

    Gradients and BatchNorm's running statistics stay the same: the statistics change only the first time that a block
    sees a batch. Raises RecipeError for backbones without such blocks (timm's CNNs).
    """
    backbone = network.backbone
    blocks: list[nn.Module] = [m for m in backbone.modules() if isinstance(m, (BasicBlock, Bottleneck))]
    if isinstance(backbone, Transformer):
        blocks = list(backbone.body.blocks)
    if not blocks:
        raise RecipeError(
            "training.recompute works only with darseg's ResNets and with transformers; the backbone is "
            f"{backbone.name}. Choose one of them, or a smaller training.micro_batch."
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)


def _forward(block: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_stay(block)),
        **kwargs,
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
