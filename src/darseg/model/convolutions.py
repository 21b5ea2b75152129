"""Convolutions of timm's networks, replaced by faster ones with the same results.

timm builds networks for any image size and any device. Here sides are known (stride * n + 1), and PyTorch lacks a fast
kernel for training on a CPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution with stride 1 and a dilation d above 1 that keeps the size.

    On a CPU its backward pass takes several times as long as without dilation: oneDNN has no fast kernel for it
    (docs/performance.md). In training on a CPU it is therefore computed without dilation, on each of the d * d images
    that consist of every d-th row and column: the same products in the same sums.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and input.device.type == "cpu" and torch.is_grad_enabled()):
            return super().forward(input)
        batch, channels, height, width = input.shape
        down, across = self.dilation
        rows, columns = -(-height // down), -(-width // across)
        # Channels last, as in memory, so that whole pixels are copied.
        x = F.pad(input.permute(0, 2, 3, 1), (0, 0, 0, columns * across - width, 0, rows * down - height))
        x = x.reshape(batch, rows, down, columns, across, channels).permute(2, 4, 0, 1, 3, 5)
        x = x.reshape(down * across * batch, rows, columns, channels).permute(0, 3, 1, 2)
        y = F.conv2d(x, self.weight, self.bias, padding=_half(self.kernel_size), groups=channels)
        y = y.permute(0, 2, 3, 1).reshape(down, across, batch, rows, columns, channels)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, rows * down, columns * across, channels)
        return y[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def exchange_convolutions(network: nn.Module, timm: ModuleType) -> None:
    """Replace convolutions, in place, in a network for images with sides of stride * n + 1 pixels.

    Names and weights stay. Replaced are dilated depthwise convolutions (see `DilatedDepthwise`), and convolutions that
    compute the padding of each image ("same" as in TensorFlow) and copy it into a padded one: with such sides an odd
    kernel always gets the same padding on all sides, which the convolution can add by itself.
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
    """A convolution of another kind that shares the parameters of `conv`."""
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
