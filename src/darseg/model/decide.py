"""Scores in, classes and confidences out: the arithmetic of labeling, written once.

Letters: K classes, H x W pixels. An image is processed in strips that stay in the processor's cache; on a GPU only
classes and codes are copied to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darseg.data.prediction import FINE_LOWEST, FINE_STEPS, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError

STRIP = 1 << 19
"""Scores processed at a time on a CPU (float32: 2 MB, the cache of a core)."""

VECTOR = 64
"""Pixels: a multiple of the numbers in a processor's vector (AVX-512: 32 float16)."""

PROBABILITY_TOLERANCE = 0.01
"""How far probabilities may be outside [0, 1] and their sum from 1: rounding 255 of them to float16 stays below."""


def decide(
    scores_KHW: Tensor,
    scale: ConfidenceScale = FLOAT16,
    probabilities: bool = False,
    name: str = "image",
    weights: NDArray[np.float64] | None = None,
) -> Prediction:
    """The most probable class of each pixel and its probability (DARS, section 3).

    FLOAT16, the release's arithmetic: logits are cast to float16, `torch.softmax` gives float16 probabilities, and the
    largest of those decides; of equal ones the first. FINE: the largest logit decides, and the confidence is its
    float32 log-odds.

    Args:
        scores_KHW: float16 or float32 logits; with `probabilities` their softmax.
        name: of the image, for error messages.
        weights: float64 [K], multiply the probabilities first, which are then normalized again (`align`): logits as
            `relative_to_largest` gives them plus log(weights), again relative to the largest; or float32
            probabilities times weights, divided by their sum. None: the arithmetic above, of the scores as they are.

    Raises DataError naming the image if scores are not [K, H, W], K is not from 2 to 255, or scores are NaN, infinite,
    beyond float16 or not probabilities.
    """
    _check(scores_KHW, name)
    factors = None if weights is None else weights if probabilities else np.log(weights)
    factors_K = (
        None if factors is None else torch.tensor(factors, dtype=torch.float32, device=scores_KHW.device)
    )

    def fill(top: int, bottom: int, out: Tensor) -> None:
        out.copy_(scores_KHW[:, top:bottom])
        if factors_K is not None and probabilities:
            _check_probabilities(out, name)  # their sum is 1 afterwards
            out.mul_(factors_K[:, None, None]).div_(out.sum(dim=0))
        elif factors_K is not None:
            relative_to_largest(out, scale)
            out.add_(factors_K[:, None, None])
            out.sub_(out.amax(dim=0))

    return decide_strips(
        fill,
        scores_KHW,
        scale=scale,
        probabilities=probabilities,
        name=name,
    )


def decide_normalized(
    scores_KHW: Tensor, thresholds: NDArray[np.float64], *, probabilities: bool
) -> Prediction:
    """The class of each pixel with the largest probability / threshold, and its probability (CBST).

    On the scale FLOAT16. Whether the probability reaches its threshold is then whether the quotient is at least 1. Of
    equal quotients the first class decides.

    Args:
        scores_KHW: as `relative_to_largest` gives them, or probabilities.
        thresholds: [K], above 0; infinite for a class that never decides.
    """
    half_KHW = scores_KHW.half() if probabilities else torch.softmax(scores_KHW.half(), dim=0)
    divisors_K = torch.from_numpy(thresholds).to(scores_KHW.device)
    classes_HW = (half_KHW.double() / divisors_K[:, None, None]).argmax(dim=0)
    codes_HW = half_KHW.gather(0, classes_HW[None])[0].view(torch.int16)
    return Prediction(classes_HW.byte().cpu().numpy(), codes_HW.cpu().numpy().view(np.uint16), FLOAT16)


def relative_to_largest(scores_KHW: Tensor, scale: ConfidenceScale) -> Tensor:
    """Logits minus the largest of their pixel, in place, rounded as they are kept for class weights.

    On the scale FLOAT16 they are rounded to float16. Near 0 it is finest, so that the classes that compete for a pixel
    are told apart however large its logits are.

    Args:
        scores_KHW: float32.
    """
    scores_KHW.sub_(scores_KHW.amax(dim=0))
    lowest = torch.finfo(scores_dtype(scale)).min  # a lower one's probability is 0 in any case
    scores_KHW.clamp_(min=lowest)
    return scores_KHW.copy_(scores_KHW.to(scores_dtype(scale)))


def scores_dtype(scale: ConfidenceScale) -> torch.dtype:
    """The type in which scores are kept for class weights: float16; float32 for the fine scale."""
    return torch.float16 if scale is FLOAT16 else torch.float32


def decide_strips(
    fill: Callable[[int, int, Tensor], object],
    like: Tensor,
    *,
    scale: ConfidenceScale,
    probabilities: bool,
    name: str,
) -> Prediction:
    """`decide` for scores that are computed strip by strip.

    Args:
        fill: (top, bottom, out) writes the scores of these rows into out, float32 [K, bottom - top, W].
        like: a tensor of the scores' shape, [K, H, W], on their device.
    """
    (classes, height, width), device = like.shape, like.device
    # torch.softmax uses another exp for the numbers left over after whole vectors. With strips of whole vectors, these
    # are only at the end of the image, as if it was processed at once.
    whole_vectors = VECTOR // math.gcd(width, VECTOR)  # rows
    rows = -(-STRIP // (classes * width * whole_vectors)) * whole_vectors if device.type == "cpu" else height
    rows = min(rows, height)
    decided = torch.empty((height, width), dtype=torch.uint8, device=device)
    codes = torch.empty((height, width), dtype=torch.int32, device=device)
    buffers = _Buffers(classes * rows * width, device)
    decide_strip = _float16 if scale is FLOAT16 else _fine
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        scores = buffers.view(torch.float32, classes, bottom - top, width)
        fill(top, bottom, scores)
        if probabilities:
            _check_probabilities(scores, name)
        decided[top:bottom], codes[top:bottom] = decide_strip(scores, buffers, probabilities)
        low, high = torch.aminmax(codes[top:bottom])
        if not 0 <= int(low) <= int(high) < scale.codes:
            raise DataError(overflow_message(scores, name))
    return Prediction(decided.cpu().numpy(), codes.cpu().numpy().astype(np.uint16), scale)


def decide_later(
    scores_KBHW: Tensor, *, scale: ConfidenceScale, probabilities: bool, names: Sequence[str]
) -> list[Callable[[], Prediction]]:
    """`decide` for several images on a GPU, without waiting for it.

    Args:
        scores_KBHW: float32; they are overwritten.
        names: of the B images, for error messages.

    Returns:
        for each image what waits for its prediction and returns it, or raises DataError as `decide` does. It may be
        called in another thread.
    """
    axes = (0, 2, 3)
    low, high = scores_KBHW.amin(axes), scores_KBHW.amax(axes)
    facts = [torch.maximum(high, -low).nan_to_num(float("inf"))]
    if probabilities:
        facts += [low, high, _off_one(scores_KBHW).amax((1, 2))]
    decide_all = _float16 if scale is FLOAT16 else _fine
    buffers = _Buffers(scores_KBHW.numel(), scores_KBHW.device)
    classes_BHW, codes_BHW = decide_all(scores_KBHW, buffers, probabilities)
    facts += [codes_BHW.amin((1, 2)).float(), codes_BHW.amax((1, 2)).float()]
    copies = [
        _copy_to_host(tensor) for tensor in (torch.stack(facts), classes_BHW, codes_BHW.to(torch.int16))
    ]
    copied = None
    if scores_KBHW.device.type == "cuda":
        copied = torch.cuda.Event()
        copied.record()

    def finish(index: int, name: str) -> Prediction:
        if copied is not None:
            copied.synchronize()
        known, classes, codes = (copy.numpy() for copy in copies)
        largest, *probable, low, high = known[:, index].tolist()
        if probable:
            _refuse_improbable(*probable, name=name)
        if not 0 <= low <= high < scale.codes:
            raise DataError(_overflow(largest, name))
        return Prediction(classes[index], codes[index].view(np.uint16), scale)

    return [partial(finish, index, name) for index, name in enumerate(names)]


def _copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; of a GPU's tensor it is whole once an event that is recorded later has passed."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Buffers:
    """Memory for one strip, used again for the next: fresh pages cost more than the arithmetic."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.blocks: dict[tuple[torch.dtype, str], Tensor] = {}

    def view(self, dtype: torch.dtype, *shape: int, use: str = "") -> Tensor:
        if (dtype, use) not in self.blocks:
            self.blocks[dtype, use] = torch.empty(self.size, dtype=dtype, device=self.device)
        return self.blocks[dtype, use][: math.prod(shape)].view(shape)


def _float16(scores: Tensor, buffers: _Buffers, probabilities: bool) -> tuple[Tensor, Tensor]:
    """Classes and codes of scores [K, ...].

    Confidences that are not numbers have codes outside of the scale.
    """
    shape = scores.shape
    half = buffers.view(torch.float16, *shape).copy_(scores)
    if not probabilities:
        half = torch.softmax(half, dim=0, out=buffers.view(torch.float16, *shape, use="softmax"))
    keys = buffers.view(torch.int32, *shape).copy_(half.view(torch.int16))
    if probabilities:
        keys.clamp_(0, FLOAT16.codes - 1)  # 1.0004 is a rounded 1
    # One number that is largest for the largest probability and, of equal ones, for the first class.
    best = (keys.bitwise_left_shift_(8).add_(_descending(keys))).amax(dim=0)
    last = shape[0] - 1
    return (last - (best & 255)).to(torch.uint8), best >> 8


def _fine(scores: Tensor, buffers: _Buffers, probabilities: bool) -> tuple[Tensor, Tensor]:
    """As `_float16`."""
    if probabilities:
        scores.clamp_(min=0)
    top = scores.amax(dim=0)
    best = scores == top
    last = len(scores) - 1
    classes = last - (best * _descending(scores)).amax(dim=0)
    # The sum of all others: 1 minus the best would lose small probabilities.
    others = scores if probabilities else (scores - top).exp_()
    rest = others.masked_fill(best, 0).sum(dim=0)
    rest += (best.sum(dim=0) - 1) * (top if probabilities else 1)
    log_odds = (top.log() if probabilities else 0) - rest.log()
    codes = ((log_odds - FINE_LOWEST) * FINE_STEPS).round().clamp(0, 65535).int()
    return classes.to(torch.uint8), codes.masked_fill_(log_odds.isnan(), -1)


def _descending(scores: Tensor) -> Tensor:
    """K - 1, …, 0, along the first axis of scores [K, ...]."""
    order = torch.arange(len(scores) - 1, -1, -1, dtype=torch.int32, device=scores.device)
    return order.view(-1, *[1] * (scores.dim() - 1))


def _check(scores: Tensor, name: str) -> None:
    shape = list(scores.shape)
    if scores.dtype not in (torch.float16, torch.float32) or len(shape) != 3:
        raise DataError(
            f"{name}: the scores are {scores.dtype} {shape}. Give float16 or float32 scores of shape [K, H, W]."
        )
    if not 2 <= shape[0] <= 255 or min(shape[1:]) < 1:
        raise DataError(
            f"{name}: the scores have shape {shape}. Give scores of shape [K, H, W], with 2 to 255 classes K, and at "
            "least one pixel."
        )
    # The sum is finite only if each score is; a float64 cannot overflow with so few.
    if not bool(torch.isfinite(scores.sum(dtype=torch.float64))):
        count = int((~torch.isfinite(scores)).sum())
        raise DataError(
            f"{name}: {count} of {scores.numel()} scores are NaN or infinite. Predict this image again; if the "
            "scores are the same, the network has diverged."
        )


def _check_probabilities(scores: Tensor, name: str) -> None:
    low, high = float(scores.min()), float(scores.max())
    _refuse_improbable(low, high, float(_off_one(scores).max()), name=name)


def _off_one(scores: Tensor) -> Tensor:
    """How far the sum of each pixel of scores [K, ...] is from 1."""
    return (scores.float().sum(dim=0) - 1).abs()


def _refuse_improbable(low: float, high: float, off: float, *, name: str) -> None:
    if math.isnan(off):  # comparisons below would let it pass
        raise DataError(_overflow(math.inf, name))
    if low < -PROBABILITY_TOLERANCE or high > 1 + PROBABILITY_TOLERANCE or off > PROBABILITY_TOLERANCE:
        raise DataError(
            f"{name}: these are not probabilities: values are from {low:g} to {high:g}, and their sums over the classes "
            f"differ from 1 by up to {off:g}. Give logits without --probabilities, or apply softmax over the classes."
        )


def overflow_message(scores: Tensor, name: str) -> str:
    """The error message for confidences that are not numbers."""
    return _overflow(float(scores.float().abs().nan_to_num(float("inf")).max()), name)


def _overflow(largest: float, name: str) -> str:
    return (
        f"{name}: confidences are not numbers (largest score {largest:g}). Scores above 65504 are infinite in float16: "
        "use the confidence scale fine. If the scores are NaN or infinite, the network has diverged: train it again with "
        "a lower training.learning_rate."
    )
