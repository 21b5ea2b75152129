"""BatchNorm folded into the convolution before it: equal logits up to rounding, less memory traffic."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from darseg.model.network import Network

CONVOLUTION = "ConvolutionBackward0"
"""Autograd's name for the operation of a convolution."""


def fold_batchnorm(network: Network) -> Network:
    """Fold each BatchNorm, in place, into the convolution that feeds it, if nothing else reads that.

    In eval mode a BatchNorm multiplies each channel by a constant and adds another, which the convolution's weights can
    do as well. The result can only predict, not be trained or saved. What feeds what is read from autograd's record of
    one pass, so any network works; everything else stays as it is.

    Args:
        network: in eval mode.

    Returns:
        the same network.
    """
    for conv, norm in _pairs(network):
        _fold(network, conv, norm)
    return network


def _pairs(network: Network) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that are their only consumers."""
    names = {module: name for name, module in network.named_modules()}
    convs = [module for module in names if isinstance(module, nn.Conv2d) and not _has_hooks(module)]
    norms = [module for module in names if isinstance(module, nn.BatchNorm2d) and not _has_hooks(module)]
    outputs: list[tuple[nn.Module, Any]] = []  # convolution, the operation that computed its output
    inputs: list[tuple[nn.Module, Any]] = []  # BatchNorm, the operation that computed its input
    side = network.sides.up(2 * network.stride)
    with contextlib.ExitStack() as stack:
        for module in convs:
            stack.enter_context(
                module.register_forward_hook(lambda conv, _, output: outputs.append((conv, output.grad_fn)))
            )
        for module in norms:
            stack.enter_context(
                module.register_forward_pre_hook(lambda norm, args: inputs.append((norm, args[0].grad_fn)))
            )
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        image = torch.zeros(1, 3, side, side).to(network.mean).requires_grad_()
        logits = network(image).main
    consumers, operations = Counter(), set()
    for operation in _operations(logits):
        operations.add(operation)
        consumers.update(source for source, _ in operation.next_functions if source is not None)
    calls = Counter(module for module, _ in (*outputs, *inputs))
    by_operation = {operation: module for module, operation in outputs}
    pairs = []
    for norm, operation in inputs:
        conv = by_operation.get(operation)
        if conv is None or operation not in operations or operation.name() != CONVOLUTION:
            continue
        weight = operation.next_functions[1][0]  # an operation too, if the weights are computed from others
        is_own = getattr(weight, "variable", None) is conv.weight
        if is_own and consumers[operation] == consumers[weight] == calls[conv] == calls[norm] == 1:
            pairs.append((names[conv], names[norm]))
    return pairs


def _operations(result: Tensor) -> Iterator[Any]:
    """All operations that autograd recorded for `result`, each once."""
    waiting: list[Any] = [result.grad_fn]
    seen = set(waiting)
    while waiting:
        operation = waiting.pop()
        yield operation
        for source, _ in operation.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the module's inputs or outputs."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold(network: nn.Module, conv: str, norm: str) -> None:
    old = network.get_submodule(norm)
    if old.running_mean is None:
        return  # this BatchNorm uses each batch's own statistics
    if type(old) is nn.BatchNorm2d:
        rest: nn.Module = nn.Identity()
    elif isinstance(drop := getattr(old, "drop", None), nn.Module) and isinstance(old.act, nn.Module):
        rest = nn.Sequential(drop, old.act)  # timm's BatchNorm continues with these
    else:
        return
    folded = fuse_conv_bn_eval(network.get_submodule(conv), old)  # ty: ignore[invalid-argument-type]
    for name, new in ((conv, folded), (norm, rest.eval())):
        above, _, last = name.rpartition(".")
        setattr(network.get_submodule(above), last, new)
