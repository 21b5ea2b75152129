"""The teacher's decisions, aligned while training by weights found from the last steps.

A fixed number of pixels of every weak view is kept for a window of n steps; `align` then finds the weights that give the
decisions on them the class shares of the labeled pixels, and the next window begins. The sample holds the teacher's own
probabilities, without weights, so the weights of one window do not act on those of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darseg.methods.draws import uniform
from darseg.pseudo.align import align
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labeling import BOUND

SAMPLE = 1 << 16
"""Pixels of a window: the standard error of a share is at most 0.5 / sqrt(2^16) = 0.002, and finding the weights of 21
classes takes about 0.15 s on one core."""

UNUSED = 1.0
"""Marks rows of the sample without a pixel; the scores of a pixel are at most 0."""

LEAST = 1e-30
"""Smallest probability whose logarithm is kept; float16 holds it."""


@dataclass(frozen=True)
class WeightSearch:
    """How weights are found; see `align`.

    Attributes:
        strength: power of the weights, from 0 to 1.
        bound: largest weight and reciprocal of the smallest.
    """

    strength: float = 1.0
    bound: float = BOUND


class WindowWeights(nn.Module):
    """What the rule remembers; until the first window is full, the weights are 1.

    Attributes:
        weights: float64 [K], multiply the probabilities; all 1 if none could be found.
        found: int64, 1 if the last window gave weights, otherwise 0.
        sample: float16 [steps of a window, images of a step, pixels of an image, K], log-probabilities, relative to the
            largest of their pixel.
    """

    weights: Tensor
    found: Tensor
    sample: Tensor

    def __init__(self, classes: int, *, window: int, images: int) -> None:
        super().__init__()
        pixels = max(1, SAMPLE // (window * images))
        self.register_buffer("weights", torch.ones(classes, dtype=torch.float64))
        self.register_buffer("found", torch.zeros((), dtype=torch.int64))
        sample = torch.full((window, images, pixels, classes), UNUSED, dtype=torch.float16)
        self.register_buffer("sample", sample)

    def weighted(self, probabilities: Tensor) -> Tensor:
        """Probabilities [B, K, H, W] times the weights, normalized; unchanged if all are 1."""
        product = probabilities * self.weights.to(probabilities.dtype)[:, None, None]
        return torch.where((self.weights == 1).all(), probabilities, product / product.sum(1, keepdim=True))

    def sampled(
        self, probabilities: Tensor, inside: Tensor, *, positions: Tensor, seed: Sequence[int]
    ) -> Tensor:
        """Rows of a step's sample, float16 [images of a step, pixels, K]; 0 for other processes.

        Args:
            probabilities: float [B, K, H, W].
            inside: bool [B, H, W]; pixels outside leave their row unused.
            positions: int64 [B], of the images in their stream, which follow each other within a step.
            seed: of the draws that choose pixels.
        """
        images, pixels, classes = self.sample.shape[1:]
        size = inside[0].numel()
        drawn = min(pixels, size)
        # One pixel from each of as many runs of pixels, so that none is drawn twice: equal scores are hard to align.
        ends = torch.arange(drawn + 1, device=inside.device) * size // drawn
        draws = uniform(seed, positions[:, None], ends[:-1]).double()
        chosen = ends[:-1] + (draws * ends.diff()).long()
        rows = probabilities.flatten(2).gather(2, chosen[:, None].expand(-1, classes, -1)).transpose(1, 2)
        scores = rows.clamp(min=LEAST).log()
        scores = scores - scores.amax(2, keepdim=True)
        used = inside.flatten(1).gather(1, chosen) & ~scores.isnan().any(2)
        own = torch.where(used[:, :, None], scores, UNUSED).to(self.sample.dtype)
        own = F.pad(own, (0, 0, 0, pixels - drawn), value=UNUSED)
        whole = self.sample.new_zeros(images, pixels, classes)
        return whole.index_copy(0, positions % images, own)

    def follow(self, seen: Tensor, step: int, *, share: Sequence[int], search: WeightSearch) -> None:
        """Keep the sample of a step; after the last one of a window, find weights.

        Finding waits for the device.

        Args:
            seen: float16 [images of a step, pixels, K], of all processes.
            step: of the round, from 0.
            share: labeled pixels per class.
            search: how weights are found.
        """
        place = step % len(self.sample)
        self.sample[place] = seen
        if place < len(self.sample) - 1:
            return
        rows = self.sample.flatten(0, 2).cpu().numpy()
        rows = rows[rows[:, 0] != UNUSED]
        found, weights = False, np.ones(len(self.weights))
        if len(rows):
            target = ClassDistribution.from_counts(share).share
            alignment = align(rows, target, bound=search.bound, strength=search.strength)
            found, weights = alignment.converged, alignment.weights.copy()
        self.found.fill_(found)
        self.weights.copy_(torch.from_numpy(weights))
