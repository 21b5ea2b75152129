"""Networks that judge a class map: is it a true one, or a network's prediction?

A class map is float [B, K, H, W]: probabilities of the classes at each pixel, or the truth, with 1 at the true class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darseg.errors import SizeError

WIDTHS = (64, 128, 256, 512)
"""Channels after each convolution, in both discriminators, as published."""

SLOPE = 0.2
"""Of the leaky ReLUs, for negative inputs."""

DROPPED = 0.5
"""Share of the channels that the image discriminator drops."""


def _halving(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)


class PixelDiscriminator(nn.Module):
    """A judgment for each pixel, fully convolutional (AdvSemiSeg, Hung et al., BMVC 2018).

    Five 4x4 convolutions of stride 2, without normalization: K → 64 → 128 → 256 → 512 → 1.

    Args:
        classes: K.
    """

    least_side = 32
    """Pixels: each of the five convolutions halves the sides."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((classes, *WIDTHS), WIDTHS, strict=False):
            layers += [_halving(inputs, outputs), nn.LeakyReLU(SLOPE, inplace=True)]
        self.layers = nn.Sequential(*layers, _halving(WIDTHS[-1], 1))

    def forward(self, maps_BKHW: Tensor) -> Tensor:
        """Logits, [B, H, W], of "the map is true here"; scaled up bilinearly from 1/32 of the sides."""
        scores = self.layers(maps_BKHW)
        scores = F.interpolate(scores, maps_BKHW.shape[2:], mode="bilinear", align_corners=True)
        return scores[:, 0]


class Judged(NamedTuple):
    """What the image discriminator makes of class maps with their images.

    Attributes:
        scores: [B], logits of "the map is true".
        features: [B, 512], what the scores are made from.
    """

    scores: Tensor
    features: Tensor


class ImageDiscriminator(nn.Module):
    """A judgment for each image, of its class map and its colors (s4GAN, Mittal et al., TPAMI 2019).

    Four 4x4 convolutions of stride 2, K + 3 → 64 → 128 → 256 → 512, the mean over all places, and a linear layer. Half of
    the channels are dropped after each of the first three.

    Args:
        classes: K.
    """

    least_side = 16
    """Pixels: each of the four convolutions halves the sides."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((classes + 3, *WIDTHS), WIDTHS, strict=False):
            layers += [_halving(inputs, outputs), nn.LeakyReLU(SLOPE, inplace=True), nn.Dropout2d(DROPPED)]
        self.layers = nn.Sequential(*layers[:-1])
        self.score = nn.Linear(WIDTHS[-1], 1)

    def forward(self, maps_BKHW: Tensor, images: Tensor) -> Judged:
        """Judge class maps of images, uint8 [B, 3, H, W]."""
        colors = images.to(maps_BKHW.dtype) / 255
        features = self.layers(torch.cat([maps_BKHW, colors], 1)).mean((2, 3))
        return Judged(self.score(features)[:, 0], features)


Discriminator = PixelDiscriminator | ImageDiscriminator


def check_crop(discriminator: type[Discriminator], height: int, width: int) -> None:
    """Raise SizeError if crops are too small for a discriminator."""
    if min(height, width) < discriminator.least_side:
        least = discriminator.least_side
        raise SizeError(
            f"The discriminator halves the sides of crops several times, so it takes {least} x {least} pixels or more. "
            f"The crop has {height} x {width}. Make training.crop larger."
        )
