"""Running means of a teacher's predictions, and what FreeMatch and ReMixMatch make of them.

They follow every step without waiting for the device. Sums are in float64, so that processes add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from darseg.pseudo.distribution import ClassDistribution

MOMENTUM = 0.999
"""Share of a mean that stays at each step, as published for both."""

SMALLEST = 1e-6
"""Is added to both shares, as in microsoft/Semi-supervised-learning's version of ReMixMatch's alignment."""


class RunningMeans(nn.Module):
    """Running means over the pixels of all steps; at first those of a network that knows nothing.

    Attributes:
        confidence: float64, mean of the largest probability.
        shares: float64 [K], mean of the probabilities.
        wanted: float64 [K], the shares of labeled pixels; empty if only thresholds are asked for.

    Args:
        classes: K.
        counts: labeled pixels per class, for `aligned`.
    """

    confidence: Tensor
    shares: Tensor
    wanted: Tensor

    def __init__(self, classes: int, counts: Sequence[int] = ()) -> None:
        super().__init__()
        # Given by the labels, so it is no part of checkpoints; a buffer, so that it is copied to the device only once.
        wanted = ClassDistribution.from_counts(counts).share.tolist() if counts else []
        self.register_buffer("wanted", torch.tensor(wanted, dtype=torch.float64), persistent=False)
        self.register_buffer("confidence", torch.tensor(1 / classes, dtype=torch.float64))
        self.register_buffer("shares", torch.full((classes,), 1 / classes, dtype=torch.float64))

    def class_thresholds(self) -> Tensor:
        """FreeMatch's: the mean confidence, times a class's share divided by the largest; float64 [K]."""
        return self.confidence * self.shares / self.shares.max()

    def aligned(self, probabilities: Tensor) -> Tensor:
        """ReMixMatch's: probabilities [B, K, H, W] times wanted / predicted share, normalized."""
        factors = (self.wanted + SMALLEST) / (self.shares + SMALLEST)
        product = probabilities * factors.to(probabilities.dtype)[:, None, None]
        return product / product.sum(1, keepdim=True)

    def follow(self, sums: Tensor) -> None:
        """Move toward the means of a step; stay if it had no pixel.

        Args:
            sums: of all processes, see `sums_of`.
        """
        pixels, confidence, shares = sums[0], sums[1], sums[2:]
        moves = (pixels > 0).double() * (1 - MOMENTUM)
        pixels = pixels.clamp(min=1)
        self.confidence.lerp_(confidence / pixels, moves)
        self.shares.lerp_(shares / pixels, moves)


def sums_of(probabilities: Tensor, inside: Tensor) -> Tensor:
    """Number of pixels, sums of their largest and of all probabilities, float64 [2 + K].

    Args:
        probabilities: float [B, K, H, W]; pixels that are not numbers are left out.
        inside: bool [B, H, W].
    """
    used = inside & ~probabilities.isnan().any(1)
    kept = probabilities.where(used[:, None], 0)
    parts = (
        used.sum(dtype=torch.float64)[None],
        kept.amax(1).sum(dtype=torch.float64)[None],
        kept.sum((0, 2, 3), dtype=torch.float64),
    )
    return torch.cat(parts)
