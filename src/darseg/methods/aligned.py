"""DARS inside an online round: thresholds and keep shares, chosen from the last steps.

The exact histogram of a window of n steps is collected, `choose_dars` runs on it, and the next window begins with an
empty one. A ring of the last n steps, looked at every n steps, would have the same counts; this needs one histogram
instead of n. A step is labeled by the thresholds of the windows before its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from darseg.data.prediction import FLOAT16
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.thresholds import choose_dars

CODES = FLOAT16.codes


class WindowThresholds(nn.Module):
    """What the rule remembers; until the first window is full it accepts nothing.

    Attributes:
        counts: int64 [K, CODES], pixels of the window so far by class and confidence code.
        lowest: int64 [K], smallest accepted code; CODES accepts nothing.
        keep: float32 [K], share of the accepted pixels to keep.
    """

    counts: Tensor
    lowest: Tensor
    keep: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(classes, CODES, dtype=torch.int64))
        self.register_buffer("lowest", torch.full((classes,), CODES, dtype=torch.int64))
        self.register_buffer("keep", torch.zeros(classes))

    def accepts(self, classes: Tensor, codes: Tensor, draws: Tensor) -> Tensor:
        """Which pixels are kept, bool [B, H, W].

        Args:
            classes: int64 [B, H, W].
            codes: int64 [B, H, W]; -1 where a pixel is outside or its confidence is not a number.
            draws: float32 [B, H, W], uniform in [0, 1).
        """
        return (codes >= self.lowest[classes]) & (draws < self.keep[classes])

    def thresholds(self) -> Tensor:
        """Smallest accepted confidence of each class, float32 [K]; NaN where nothing is accepted."""
        codes = self.lowest.clamp(max=CODES - 1).to(torch.int16)
        return codes.view(torch.float16).float().masked_fill(self.lowest == CODES, torch.nan)

    def follow(self, seen: Tensor, share: Sequence[int], *, ratio: float, full: bool) -> None:
        """Add what all processes saw; after the last step of a window, choose and begin the next one.

        Choosing waits for the device. If the window has no pixel at all, the thresholds stay.

        Args:
            seen: int64 [K, CODES].
            share: labeled pixels per class.
            ratio: the labeling ratio.
            full: whether this is the last step of a window.
        """
        self.counts += seen
        if not full:
            return
        counts = self.counts.cpu().numpy().copy()
        self.counts.zero_()
        if counts.any():
            chosen = choose_dars(ConfidenceHistogram(counts), ClassDistribution.from_counts(share), ratio)
            self.lowest.copy_(torch.from_numpy(chosen.accept.copy()))
            self.keep.copy_(torch.from_numpy(chosen.keep.copy()))


def codes_of(confidence: Tensor, inside: Tensor) -> Tensor:
    """Bit patterns of the confidences as float16, int64; -1 outside and for what is not a number.

    Probabilities are at most 1, up to rounding, which float16 takes back.
    """
    codes = confidence.half().view(torch.int16).long().clamp(max=CODES - 1)
    return codes.masked_fill(~inside | confidence.isnan(), -1)


def counted(classes: Tensor, codes: Tensor, count: int) -> Tensor:
    """Pixels by class and code, int64 [K, CODES]; codes of -1 are left out.

    Integers are added up, so the order does not matter; `bincount` would make the host wait for a GPU.
    """
    cells = torch.where(codes >= 0, classes * CODES + codes, count * CODES).flatten()
    counts = torch.zeros(count * CODES + 1, dtype=torch.int64, device=cells.device)
    return counts.scatter_add_(0, cells, torch.ones_like(cells))[:-1].view(count, CODES)
