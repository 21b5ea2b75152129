"""Scores in, classes and confidences out: the arithmetic of labeling, written once.

Letters: K classes, H x W pixels. Works through an image in strips that stay in the processor's cache; on a GPU
only classes and codes cross to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from darseg.data.prediction import FINE_LOWEST, FINE_STEPS, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError

STRIP = 1 << 19
"""Scores worked on at a time on a CPU (float32: 2 MB, the cache of a core)."""

VECTOR = 64
"""Pixels: a multiple of what a processor's vector holds (AVX-512: 32 float16)."""

PROBABILITY_TOLERANCE = 0.01
"""How far given probabilities may miss [0, 1] and a sum of 1: float16 rounds 255 of them by less."""


def decide(
    scores_KHW: Tensor, scale: ConfidenceScale = FLOAT16, probabilities: bool = False, name: str = "image"
) -> Prediction:
    """The most probable class of each pixel and its probability (DARS, section 3; METHOD: the release's arithmetic).

    FLOAT16: logits are cast to float16, `torch.softmax` gives float16 probabilities, the largest of those decides,
    the first where several are equal. FINE: the largest logit decides; confidence is its float32 log-odds.

    Args:
        scores_KHW: float16 or float32 logits, or, with `probabilities`, what a softmax made of them.

    Raises DataError naming the image: not [K, H, W], K not from 2 to 255, NaN, infinite, beyond float16, no
    probabilities.
    """
    _check(scores_KHW, name)
    shape, device = scores_KHW.shape, scores_KHW.device
    return decide_strips(
        lambda top, bottom, out: out.copy_(scores_KHW[:, top:bottom]),
        shape,
        device,
        scale,
        probabilities,
        name,
    )


def decide_strips(
    fill: Callable[[int, int, Tensor], object],
    shape: tuple[int, ...],
    device: torch.device,
    scale: ConfidenceScale,
    probabilities: bool,
    name: str,
) -> Prediction:
    """`decide` on scores that are made strip by strip.

    Args:
        fill: (top, bottom, out) puts the scores of these rows into out, float32 [K, bottom - top, W].
    """
    classes, height, width = shape
    # torch.softmax computes what is left over after whole vectors with another exp; with strips of whole vectors
    # that is the end of the image, as if it had been given at once.
    whole = VECTOR // math.gcd(width, VECTOR)
    rows = -(-STRIP // (classes * width * whole)) * whole if device.type == "cpu" else height
    rows = min(rows, height)
    picked = torch.empty((height, width), dtype=torch.uint8, device=device)
    codes = torch.empty((height, width), dtype=torch.int32, device=device)
    buffers = _Buffers(classes * rows * width, device)
    pick = _float16 if scale is FLOAT16 else _fine
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        scores = buffers.view(torch.float32, classes, bottom - top, width)
        fill(top, bottom, scores)
        if probabilities:
            _check_probabilities(scores, name)
        picked[top:bottom], codes[top:bottom] = pick(scores, buffers, probabilities, name)
    return Prediction(picked.cpu().numpy(), codes.cpu().numpy().astype(np.uint16), scale)


class _Buffers:
    """Memory for one strip, used again for the next: fresh pages cost more than the arithmetic."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.made: dict[tuple[torch.dtype, str], Tensor] = {}

    def view(self, dtype: torch.dtype, *shape: int, use: str = "") -> Tensor:
        if (dtype, use) not in self.made:
            self.made[dtype, use] = torch.empty(self.size, dtype=dtype, device=self.device)
        return self.made[dtype, use][: math.prod(shape)].view(shape)


def _float16(scores: Tensor, buffers: _Buffers, probabilities: bool, name: str) -> tuple[Tensor, Tensor]:
    shape = scores.shape
    half = buffers.view(torch.float16, *shape).copy_(scores)
    if not probabilities:
        half = torch.softmax(half, dim=0, out=buffers.view(torch.float16, *shape, use="softmax"))
    keys = buffers.view(torch.int32, *shape).copy_(half.view(torch.int16))
    if probabilities:
        keys.clamp_(0, FLOAT16.codes - 1)  # 1.0004 is a rounded 1
    # One number that is largest for the largest probability and, among equal ones, for the first class.
    last = shape[0] - 1
    order = torch.arange(last, -1, -1, dtype=torch.int32, device=keys.device)[:, None, None]
    best = (keys.bitwise_left_shift_(8).add_(order)).amax(dim=0)
    codes = best >> 8
    low, high = torch.aminmax(codes)
    if not 0 <= int(low) <= int(high) < FLOAT16.codes:
        raise DataError(_overflow(scores, name))
    return (last - (best & 255)).to(torch.uint8), codes


def _fine(scores: Tensor, buffers: _Buffers, probabilities: bool, name: str) -> tuple[Tensor, Tensor]:
    if probabilities:
        scores.clamp_(min=0)
    top = scores.amax(dim=0)
    best = scores == top
    last = len(scores) - 1
    order = torch.arange(last, -1, -1, dtype=torch.int32, device=scores.device)[:, None, None]
    picked = last - (best * order).amax(dim=0)
    # Everything but the best, which is summed without it: 1 minus the best would lose what is small.
    others = scores if probabilities else (scores - top).exp_()
    rest = others.masked_fill(best, 0).sum(dim=0)
    rest += (best.sum(dim=0) - 1) * (top if probabilities else 1)
    log_odds = (top.log() if probabilities else 0) - rest.log()
    if bool(torch.isnan(log_odds).any()):
        raise DataError(_overflow(scores, name))
    codes = ((log_odds - FINE_LOWEST) * FINE_STEPS).round().clamp(0, 65535).int()
    return picked.to(torch.uint8), codes


def _check(scores: Tensor, name: str) -> None:
    shape = list(scores.shape)
    if scores.dtype not in (torch.float16, torch.float32) or len(shape) != 3:
        raise DataError(f"{name}: scores are {scores.dtype} {shape}; wanted float16 or float32 [K, H, W].")
    if not 2 <= shape[0] <= 255 or min(shape[1:]) < 1:
        raise DataError(
            f"{name}: scores have shape {shape}; wanted [K, H, W] with 2 to 255 classes and pixels."
        )
    # The sum of everything is finite only if each is; overflow of the sum itself is told apart below.
    if not bool(torch.isfinite(scores.sum(dtype=torch.float64))):
        wrong = int((~torch.isfinite(scores)).sum())
        raise DataError(
            f"{name}: {wrong} of {scores.numel()} scores are NaN or infinite. Predict this image again; if the "
            "network makes them, it has diverged."
        )


def _check_probabilities(scores: Tensor, name: str) -> None:
    low, high = float(scores.min()), float(scores.max())
    off = float((scores.float().sum(dim=0) - 1).abs().max())
    if low < -PROBABILITY_TOLERANCE or high > 1 + PROBABILITY_TOLERANCE or off > PROBABILITY_TOLERANCE:
        raise DataError(
            f"{name}: values from {low:g} to {high:g} that miss a sum of 1 by up to {off:g} are no probabilities. "
            "Give logits without --probabilities, or softmax them over the classes first."
        )


def _overflow(scores: Tensor, name: str) -> str:
    largest = float(scores.float().abs().nan_to_num(float("inf")).max())
    return (
        f"{name}: confidences are not numbers (largest score {largest:g}). Beyond 65504 float16 is infinite: use the "
        "confidence scale fine. If the scores are NaN or infinite, the network has diverged; train it again with a "
        "lower training.learning_rate."
    )
