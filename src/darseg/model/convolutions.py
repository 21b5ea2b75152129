"""Convolutions of other people's networks, exchanged for ones that give the same and take less time.

timm builds networks for any size of image and any device. Here sides are known (stride * n + 1), and training on a CPU
meets a gap in PyTorch's kernels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution whose dilation d is more than 1, at stride 1 and keeping the size.

    On a CPU the backward pass of such a convolution takes several times as long as of one without dilation: oneDNN has no
    fast kernel for it (docs/performance.md). So in training there it is one without dilation, over each of the d * d
    images that every d-th row and column make: the same products in the same sums.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and input.device.type == "cpu" and torch.is_grad_enabled()):
            return super().forward(input)
        batch, channels, height, width = input.shape
        down, across = self.dilation
        rows, columns = -(-height // down), -(-width // across)
        # Channels last, as they lie in memory: whole pixels are moved.
        x = F.pad(input.permute(0, 2, 3, 1), (0, 0, 0, columns * across - width, 0, rows * down - height))
        x = x.reshape(batch, rows, down, columns, across, channels).permute(2, 4, 0, 1, 3, 5)
        x = x.reshape(down * across * batch, rows, columns, channels).permute(0, 3, 1, 2)
        y = F.conv2d(x, self.weight, self.bias, padding=_half(self.kernel_size), groups=channels)
        y = y.permute(0, 2, 3, 1).reshape(down, across, batch, rows, columns, channels)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * down, columns * across, channels)
        return y[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def exchange_convolutions(network: nn.Module, timm: ModuleType) -> None:
    """Exchange, in place, the convolutions of a network that is only given images with sides of stride * n + 1.

    Names and weights stay. What is exchanged: dilated depthwise convolutions (see `DilatedDepthwise`), and those that
    work out for every image how much to pad ("same" as TensorFlow has it), copying it into a padded one: of such
    sides an odd kernel always gets the same padding all around, which the convolution adds by itself.
    """
    for name, child in network.named_children():
        if not isinstance(child, nn.Conv2d):
            exchange_convolutions(child, timm)
        elif type(child) is nn.Conv2d and _is_dilated_depthwise(child):
            setattr(network, name, _like(child, DilatedDepthwise, child.padding))
        elif type(child) is timm.layers.Conv2dSame and all(side % 2 for side in child.kernel_size):
            setattr(network, name, _like(child, nn.Conv2d, _half(child.kernel_size, child.dilation)))


def _is_dilated_depthwise(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels > 1
        and conv.kernel_size > (1, 1)
        and max(conv.dilation) > 1
        and conv.stride == (1, 1)
        and all(side % 2 for side in conv.kernel_size)
        and conv.padding == _half(conv.kernel_size, conv.dilation)
        and conv.padding_mode == "zeros"
    )


def _half(kernel: tuple[int, ...], dilation: tuple[int, ...] = (1, 1)) -> tuple[int, int]:
    """The padding that keeps the size at stride 1."""
    down, across = (step * (side - 1) // 2 for side, step in zip(kernel, dilation, strict=True))
    return down, across


def _like(conv: nn.Conv2d, kind: type[nn.Conv2d], padding: tuple[int, ...] | str) -> nn.Conv2d:
    """A convolution of another kind, with the very parameters of `conv`."""
    assert isinstance(padding, tuple)
    new = torch.nn.utils.skip_init(
        kind,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)
