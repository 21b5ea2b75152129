"""Whole-image prediction: scales, windows, mirror. The only sliding window in darseg.

Labelling averages logits, evaluation averages probabilities (softmax per window), as the release does.
Shape letters: K classes, H, W pixels of the image, h, w of a window, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from darseg.data.prediction import Prediction
from darseg.errors import NumericsError
from darseg.model.network import Network

WINDOWS_AT_ONCE = 4  # windows (and as many mirrored) in one forward pass; fixed, since it can move last bits
STRIDE = 2 / 3  # of the window's side; the release's overlap


@dataclass(frozen=True)
class Protocol:
    """How whole images are predicted.

    Attributes:
        window: height, width of the sliding window, pixels; legal sides of the network.
        base_size: the image is first scaled so that its long side has this many pixels; None: as it is.
        mirror: average each window with its mirror image.
        scales: factors on top of base_size; the results are averaged.
        bf16: run the network under bfloat16 autocast.
    """

    window: tuple[int, int]
    base_size: int | None = None
    mirror: bool = True
    scales: tuple[float, ...] = (1.0,)
    bf16: bool = False

    def describe(self) -> str:
        window = f"{self.window[0]}x{self.window[1]}"
        size = f"long side {self.base_size}" if self.base_size else "own size"
        mirror = "with mirror" if self.mirror else "no mirror"
        return f"{size}, windows {window} with stride 2/3, {mirror}, scales {list(self.scales)}"


def window_starts(side: int, window: int) -> list[int]:
    """Where windows begin along a side of at least `window` pixels; the last is pulled back inside."""
    stride = math.ceil(window * STRIDE)
    count = math.ceil((side - window) / stride) + 1
    return [min(index * stride, side - window) for index in range(count)]


@torch.inference_mode()
def predict_scores(
    network: Network, image: np.ndarray, protocol: Protocol, average: Literal["logits", "probabilities"]
) -> torch.Tensor:
    """Averaged logits or probabilities, float32 [K, H, W] on the network's device.

    Args:
        network: in eval mode.
        image: uint8 [H, W, 3], RGB.
    """
    device = network.mean.device
    image_1CHW = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
    normalised = network.normalise(image_1CHW)
    height, width = image.shape[:2]
    total = None
    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(height, width)))
        size = _scaled(height, width, long_side)
        scaled = normalised if size == (height, width) else _resize(normalised, size)
        scores = _slide(network, scaled, protocol, average)
        if size != (height, width):
            scores = _resize(scores, (height, width))
        total = scores if total is None else total + scores
    assert total is not None
    return total[0] / len(protocol.scales)


def predict(network: Network, image: np.ndarray, protocol: Protocol, name: str = "image") -> Prediction:
    """Classes and confidences of an image as labelling wants them (DARS, section 3; the release's arithmetic).

    Logits are averaged in float32, cast to float16, and softmaxed once. Raises NumericsError naming the
    image where a confidence is not a number (logits beyond float16's 65,504, or a network that diverged).
    """
    logits_KHW = predict_scores(network, image, protocol, "logits")
    confidence, classes = torch.softmax(logits_KHW.half(), dim=0).max(dim=0)
    if not bool(torch.isfinite(confidence).all()):
        raise NumericsError(
            f"{name}: predicted confidences are not finite (largest logit {float(logits_KHW.abs().max()):g}). "
            "The network has diverged; train it again with a lower training.learning_rate."
        )
    codes = confidence.cpu().numpy().view(np.uint16)
    return Prediction(classes.to(torch.uint8).cpu().numpy(), codes)


def predict_classes(network: Network, image: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Classes of an image as evaluation wants them, uint8 [H, W]: probabilities averaged, then the largest."""
    return (
        predict_scores(network, image, protocol, "probabilities").argmax(dim=0).to(torch.uint8).cpu().numpy()
    )


def _scaled(height: int, width: int, long_side: int) -> tuple[int, int]:
    if height >= width:
        return long_side, max(1, round(long_side / height * width))
    return max(1, round(long_side / width * height)), long_side


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _slide(network: Network, image: torch.Tensor, protocol: Protocol, average: str) -> torch.Tensor:
    """Average over all windows that cover a pixel: [1, 3, H, W] → [1, K, H, W]."""
    height, width = image.shape[2:]
    window_h, window_w = protocol.window
    pad_h, pad_w = max(window_h - height, 0), max(window_w - width, 0)
    # Normalised mean colour is 0.
    padded = F.pad(image, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    corners = [
        (top, left)
        for top in window_starts(padded.shape[2], window_h)
        for left in window_starts(padded.shape[3], window_w)
    ]
    total = torch.zeros(1, network.classes, *padded.shape[2:], device=image.device)
    count = torch.zeros(1, 1, *padded.shape[2:], device=image.device)
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        some = corners[start : start + WINDOWS_AT_ONCE]
        windows = torch.cat(
            [padded[:, :, top : top + window_h, left : left + window_w] for top, left in some]
        )
        for (top, left), scores in zip(
            some, _window_scores(network, windows, protocol, average), strict=True
        ):
            total[0, :, top : top + window_h, left : left + window_w] += scores
            count[0, :, top : top + window_h, left : left + window_w] += 1
    total /= count
    top, left = pad_h // 2, pad_w // 2
    return total[:, :, top : top + height, left : left + width]


def _window_scores(
    network: Network, windows_NCHW: torch.Tensor, protocol: Protocol, average: str
) -> torch.Tensor:
    images = torch.cat([windows_NCHW, windows_NCHW.flip(3)]) if protocol.mirror else windows_NCHW
    with torch.autocast(images.device.type, torch.bfloat16, enabled=protocol.bf16):
        scores = network(images).main
    scores = scores.float()
    if average == "probabilities":
        scores = scores.softmax(dim=1)
    if protocol.mirror:
        plain, mirrored = scores.chunk(2)
        scores = (plain + mirrored.flip(3)) / 2
    return scores
