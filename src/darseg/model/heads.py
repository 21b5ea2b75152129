"""Heads: features in, logits at the size of the features out.

Only the convolutions that give logits have a bias; elsewhere a BatchNorm makes it redundant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darseg.model.backbone import Features

BINS = (1, 2, 3, 6)
"""Sides of the grids that pyramid pooling averages over (PSPNet)."""

PRODUCTS_FROM = 1024
"""Pixels of a feature map from which a GPU pools it by matrix products."""

DROPOUT = 0.1
"""Share of channels dropped before a head's last convolution, in training (PSPNet)."""

ATROUS_DILATIONS = (6, 12, 18, 24)
"""Dilations of the parallel convolutions of DeepLabv2's classifier."""

RELEASE_BRANCHES = 2
"""How many of these branches the release sums: its loop returns early."""

PYRAMID_DILATIONS = (6, 12, 18)
"""Dilations of DeepLabv3+'s spatial pyramid at output stride 16; at 8 they are doubled (Chen et al. 2018)."""

LOW_LEVEL_CHANNELS = 48
"""Channels that DeepLabv3+ keeps of stage 1."""

ATROUS_STD = 0.01
"""Standard deviation of the normal distribution that DeepLabv2 draws new convolutions from."""


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] resized bilinearly to [B, C, *size]; corners stay corners (so sides are 8n + 1)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def pool_cells(features: Tensor, bins: int) -> Tensor:
    """F.adaptive_avg_pool2d(features, bins), in the way that is quicker on their device.

    On a GPU PyTorch's kernel for channels-last memory takes a third of a PSPNet's time at 713x713; two matrix products
    read the features once.
    """
    height, width = features.shape[-2:]
    if features.is_cuda and height * width >= PRODUCTS_FROM:
        return pool_by_products(features, bins)
    return F.adaptive_avg_pool2d(features, bins)


def pool_by_products(features: Tensor, bins: int) -> Tensor:
    """F.adaptive_avg_pool2d(features, bins) as two matrix products, over rows and then over columns.

    The matrices hold zeros and powers of two, which every precision has exactly and which keep sums in the range of fp16;
    a factor makes means of the sums afterwards.
    """
    count, channels, height, width = features.shape
    row, by_row = _sums(height, bins, features)
    column, by_column = (row, by_row) if width == height else _sums(width, bins, features)
    at = features.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    summed = torch.matmul(row, at).view(count, bins, width * channels) * by_row
    summed = torch.matmul(column, summed.view(count * bins, width, channels)) * by_column
    return summed.view(count, bins, bins, channels).permute(0, 3, 1, 2)


def _sums(side: int, bins: int, features: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [bins, side] of zeros and 2^-k, and what its sums lack to means, [bins, 1].

    2^k is at least the number of pixels of a cell.
    """
    inside = cells(side, bins, features.device)
    pixels = inside.sum(dim=1, keepdim=True)
    power = torch.exp2(torch.ceil(torch.log2(pixels)))
    return (inside / power).to(features.dtype), (power / pixels).to(features.dtype)


def cells(side: int, bins: int, device: torch.device | None = None) -> Tensor:
    """The pixels of each cell of pooling, float32 [bins, side] of zeros and ones.

    Neighbors may share a pixel.
    """
    at = torch.arange(side, device=device)[None]
    cell = torch.arange(bins, device=device)[:, None]
    first, end = cell * side // bins, ((cell + 1) * side + bins - 1) // bins
    return ((at >= first) & (at < end)).float()


class Head(nn.Module):
    """What every head is: `prepare` computes what the classifier sees, and `classify` its logits."""

    classifier: nn.Conv2d

    def forward(self, features: Features) -> Tensor:
        return self.classify(self.prepare(features))

    def prepare(self, features: Features) -> Tensor:
        """What the classifier sees."""
        raise NotImplementedError

    def classify(self, prepared: Tensor) -> Tensor:
        """Logits of what `prepare` returned."""
        return self.classifier(prepared)

    @property
    def last(self) -> nn.Module:
        """The convolution whose bias is added to the logits once."""
        return self.classifier


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; the size is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class PyramidPoolingHead(Head):
    """Pyramid pooling (PSPNet): local features concatenated with context pooled at four scales.

    Stage 4, [B, inputs, h, w], → [B, classes, h, w]. Each of the four branches averages over the cells of a grid and
    keeps inputs // 4 channels; `channels` is the width of the 3x3 convolution that joins them.
    """

    def __init__(self, inputs: int, channels: int, classes: int) -> None:
        super().__init__()
        width = inputs // len(BINS)
        self.branches = nn.ModuleList(ConvNormReLU(inputs, width, 1) for _ in BINS)
        self.fuse = ConvNormReLU(inputs + len(BINS) * width, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Features, pool: Callable[[Tensor, int], Tensor] = pool_cells) -> Tensor:
        """Logits of the features.

        Args:
            pool: (features, bins) → means over a grid of bins x bins cells; exported networks have their own.
        """
        return self.classify(self.prepare(features, pool))

    def prepare(self, features: Features, pool: Callable[[Tensor, int], Tensor] = pool_cells) -> Tensor:
        """What the classifier sees."""
        local = features.stage4
        height, width = local.shape[-2:]
        parts = [local]
        for bins, branch in zip(BINS, self.branches, strict=True):
            parts.append(upsample(branch(pool(local, bins)), (height, width)))
        return self.dropout(self.fuse(torch.cat(parts, dim=1)))


class AuxiliaryHead(nn.Module):
    """A small classifier that helps training (PSPNet): stage 3, [B, inputs, h, w], → [B, classes, h, w].

    Its 3x3 convolution has inputs // 4 channels; for ResNet-50's 1024 that is 256, as in the release.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fuse = ConvNormReLU(inputs, inputs // 4, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(inputs // 4, classes, 1)

    def forward(self, features: Features) -> Tensor:
        return self.classifier(self.dropout(self.fuse(features.stage3)))


class AtrousHead(Head):
    """DeepLabv2's classifier: parallel 3x3 convolutions, dilated 6, 12, 18 and 24, summed.

    Stage 4, [B, inputs, h, w], → [B, classes, h, w]. The first `branches` of the four are summed. All four are kept,
    because the release has four and sums two.
    """

    def __init__(self, inputs: int, classes: int, branches: int = len(ATROUS_DILATIONS)) -> None:
        super().__init__()
        self.summed = branches
        self.branches = nn.ModuleList(
            nn.Conv2d(inputs, classes, 3, padding=dilation, dilation=dilation)
            for dilation in ATROUS_DILATIONS
        )
        for index, branch in enumerate(self.branches):
            nn.init.normal_(branch.weight, std=ATROUS_STD)  # ty: ignore[invalid-argument-type]
            branch.requires_grad_(index < branches)

    def prepare(self, features: Features) -> Tensor:
        """What the classifier sees: stage 4 itself."""
        return features.stage4

    def classify(self, prepared: Tensor) -> Tensor:
        """Logits of what `prepare` returned."""
        logits = self.branches[0](prepared)
        for branch in self.branches[1 : self.summed]:
            logits = logits + branch(prepared)
        return logits

    @property
    def last(self) -> nn.Module:
        """A convolution whose bias is added to the logits once: the first branch, always summed."""
        return self.branches[0]


class DeepLabV3PlusHead(Head):
    """DeepLabv3+ (Chen et al. 2018): a spatial pyramid on stage 4, refined with stage 1.

    Features → logits [B, classes, h1, w1], at the size of stage 1. The pyramid is a 1x1 convolution, three dilated 3x3
    convolutions and the mean over the image, each with `width` channels.
    """

    def __init__(self, low: int, high: int, width: int, *, classes: int, output_stride: int) -> None:
        super().__init__()
        factor = 16 // output_stride
        self.branches = nn.ModuleList([ConvNormReLU(high, width, 1)])
        self.branches.extend(
            ConvNormReLU(high, width, 3, dilation=factor * dilation) for dilation in PYRAMID_DILATIONS
        )
        self.whole = ConvNormReLU(high, width, 1)
        self.project = ConvNormReLU((len(self.branches) + 1) * width, width, 1)
        self.reduce = ConvNormReLU(low, LOW_LEVEL_CHANNELS, 1)
        self.fuse = nn.Sequential(
            ConvNormReLU(width + LOW_LEVEL_CHANNELS, width, 3), ConvNormReLU(width, width, 3)
        )
        self.classifier = nn.Conv2d(width, classes, 1)

    def prepare(self, features: Features) -> Tensor:
        """What the classifier sees."""
        low, high = features.stage1, features.stage4
        mean = self.whole(high.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *high.shape[-2:])
        pyramid = self.project(torch.cat([*(branch(high) for branch in self.branches), mean], dim=1))
        height, width = low.shape[-2:]
        return self.fuse(torch.cat([self.reduce(low), upsample(pyramid, (height, width))], dim=1))


class LinearHead(Head):
    """A BatchNorm and a linear classifier, as DINOv2 was judged by.

    Stage 4, [B, inputs, h, w], → [B, classes, h, w]. For frozen backbones, and to see what a backbone knows.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Conv2d(inputs, classes, 1)

    def prepare(self, features: Features) -> Tensor:
        """What the classifier sees."""
        return self.norm(features.stage4)
