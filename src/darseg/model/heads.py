"""Heads: features in, logits at the size of the features out.

Only the convolutions that give logits have a bias; elsewhere a BatchNorm makes it redundant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS = (1, 2, 3, 6)
"""Sides of the grids that pyramid pooling averages over (PSPNet)."""

DROPOUT = 0.1
"""Share of channels dropped before a head's last convolution, in training (PSPNet)."""

ATROUS_DILATIONS = (6, 12, 18, 24)
"""Dilations of the parallel convolutions of DeepLabv2's classifier."""

RELEASE_BRANCHES = 2
"""How many of these branches the release sums: its loop returns early."""

ATROUS_STD = 0.01
"""Standard deviation of the normal distribution that DeepLabv2 draws new convolutions from."""


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] resized bilinearly to [B, C, *size]; corners stay corners (so sides are 8n + 1)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; the size is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class PyramidPoolingHead(nn.Module):
    """Pyramid pooling (PSPNet): local features concatenated with context pooled at four scales.

    [B, inputs, h, w] → [B, classes, h, w]. Each of the four branches averages over the cells of a grid and keeps
    inputs // 4 channels; `channels` is the width of the 3x3 convolution that joins them.
    """

    def __init__(self, inputs: int, channels: int, classes: int) -> None:
        super().__init__()
        width = inputs // len(BINS)
        self.branches = nn.ModuleList(ConvNormReLU(inputs, width, 1) for _ in BINS)
        self.fuse = ConvNormReLU(inputs + len(BINS) * width, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(
        self, features: Tensor, pool: Callable[[Tensor, int], Tensor] = F.adaptive_avg_pool2d
    ) -> Tensor:
        """Logits of the features.

        Args:
            pool: (features, bins) → means over a grid of bins x bins cells; exported networks have their own.
        """
        return self.classify(self.prepare(features, pool))

    def prepare(
        self, features: Tensor, pool: Callable[[Tensor, int], Tensor] = F.adaptive_avg_pool2d
    ) -> Tensor:
        """What the classifier sees."""
        height, width = features.shape[-2:]
        parts = [features]
        for bins, branch in zip(BINS, self.branches, strict=True):
            parts.append(upsample(branch(pool(features, bins)), (height, width)))
        return self.dropout(self.fuse(torch.cat(parts, dim=1)))

    def classify(self, prepared: Tensor) -> Tensor:
        """Logits of what `prepare` returned."""
        return self.classifier(prepared)

    @property
    def last(self) -> nn.Conv2d:
        """The convolution whose bias is added to the logits once."""
        return self.classifier


class AuxiliaryHead(nn.Module):
    """A small classifier on stage 3 that helps training (PSPNet): [B, inputs, h, w] → [B, classes, h, w].

    Its 3x3 convolution has inputs // 4 channels; for ResNet-50's 1024 that is 256, as in the release.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fuse = ConvNormReLU(inputs, inputs // 4, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(inputs // 4, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.fuse(features)))


class AtrousHead(nn.Module):
    """DeepLabv2's classifier: parallel 3x3 convolutions, dilated 6, 12, 18 and 24, summed.

    [B, inputs, h, w] → [B, classes, h, w]. The first `branches` of the four are summed. All four are kept, because the
    release has four and sums two.
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

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.prepare(features))

    def prepare(self, features: Tensor) -> Tensor:
        """What the classifier sees: the features themselves."""
        return features

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
