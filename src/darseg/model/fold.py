"""BatchNorm folded into the convolutions before it: the same logits but for rounding, with fewer passes over memory."""

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
"""What autograd calls the operation of a convolution."""


def fold_batchnorm(network: Network) -> Network:
    """Fold every BatchNorm that takes what a convolution gives, where nobody else does, into it; in place.

    In eval mode a BatchNorm multiplies each channel by a constant and adds one, which the convolution's weights can do
    as well. For predicting only: what is left cannot be trained or saved. Who takes what is read from autograd's record
    of one pass, so a network of any make can be given; all else stays as it is.

    Args:
        network: in eval mode.

    Returns:
        the same network.
    """
    for conv, norm in _pairs(network):
        _fold(network, conv, norm)
    return network


def _pairs(network: Network) -> list[tuple[str, str]]:
    """Names of convolutions and of the BatchNorms that alone take what they give."""
    names = {module: name for name, module in network.named_modules()}
    convs = [one for one in names if isinstance(one, nn.Conv2d) and not _watched(one)]
    norms = [one for one in names if isinstance(one, nn.BatchNorm2d) and not _watched(one)]
    made: list[tuple[nn.Module, Any]] = []  # module, the operation that made what it gave
    took: list[tuple[nn.Module, Any]] = []  # module, the operation that made what it took
    side = network.sides.up(2 * network.stride)
    with contextlib.ExitStack() as stack:
        for module in convs:
            stack.enter_context(module.register_forward_hook(lambda m, _, out: made.append((m, out.grad_fn))))
        for module in norms:
            stack.enter_context(
                module.register_forward_pre_hook(lambda m, given: took.append((m, given[0].grad_fn)))
            )
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        image = torch.zeros(1, 3, side, side, device=network.mean.device, requires_grad=True)
        logits = network(image).main
    takers, operations = Counter(), set()
    for operation in _operations(logits):
        operations.add(operation)
        takers.update(source for source, _ in operation.next_functions if source is not None)
    calls = Counter(module for module, _ in (*made, *took))
    by_operation = {operation: module for module, operation in made}
    found = []
    for norm, operation in took:
        conv = by_operation.get(operation)
        if conv is None or operation not in operations or operation.name() != CONVOLUTION:
            continue
        weight = operation.next_functions[1][0]  # an operation too, where weights are made of others
        own = getattr(weight, "variable", None) is conv.weight
        if own and takers[operation] == takers[weight] == calls[conv] == calls[norm] == 1:
            found.append((names[conv], names[norm]))
    return found


def _operations(result: Tensor) -> Iterator[Any]:
    """All operations that autograd recorded on the way to `result`, each once."""
    waiting: list[Any] = [result.grad_fn]
    seen = set(waiting)
    while waiting:
        operation = waiting.pop()
        yield operation
        for source, _ in operation.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)


def _watched(module: nn.Module) -> bool:
    """Whether somebody is called with what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _fold(network: nn.Module, conv: str, norm: str) -> None:
    old = network.get_submodule(norm)
    if old.running_mean is None:
        return  # a BatchNorm that takes each batch's own statistics
    if type(old) is nn.BatchNorm2d:
        rest: nn.Module = nn.Identity()
    elif isinstance(drop := getattr(old, "drop", None), nn.Module) and isinstance(old.act, nn.Module):
        rest = nn.Sequential(drop, old.act)  # timm's BatchNorm goes on with these
    else:
        return
    folded = fuse_conv_bn_eval(network.get_submodule(conv), old)  # ty: ignore[invalid-argument-type]
    for name, new in ((conv, folded), (norm, rest.eval())):
        above, _, last = name.rpartition(".")
        setattr(network.get_submodule(above), last, new)
