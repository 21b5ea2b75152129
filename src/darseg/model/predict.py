"""Whole-image prediction: scales, windows, mirror. The only sliding window in darseg.

Labeling averages logits, evaluation averages probabilities (softmax per window), as the release does.
Shape letters: K classes, H, W pixels of the image, h, w of a window, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from darseg.data.prediction import FINE, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError, NumericsError
from darseg.model.decide import decide_strips
from darseg.model.network import Network

WINDOWS_AT_ONCE = 4  # windows (and as many mirrored) in one forward pass; fixed, since it can move last bits
STRIDE = 2 / 3  # of the window's side; the release's overlap


@dataclass(frozen=True)
class Protocol:
    """How whole images are predicted.

    Attributes:
        window: height, width of the sliding window, pixels (one number for both); legal sides of the network.
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

    def __post_init__(self) -> None:
        sides = (self.window, self.window) if isinstance(self.window, int) else tuple(self.window)
        if len(sides) != 2 or min(sides) < 1 or not self.scales or min(self.scales) <= 0:
            raise DataError(
                f"A protocol with window {self.window} and scales {self.scales}: wanted are two sides of at least 1 "
                "pixel and scales above 0."
            )
        object.__setattr__(self, "window", sides)

    def describe(self, average: Literal["logits", "probabilities"] = "probabilities") -> str:
        """In words; `average` is what is averaged over windows, mirror and scales."""
        window = f"{self.window[0]}x{self.window[1]}"
        size = f"long side {self.base_size}" if self.base_size else "own size"
        mirror = "with mirror" if self.mirror else "no mirror"
        return f"{size}, windows {window} with stride 2/3, {mirror}, scales {list(self.scales)}, {average} averaged"


def window_starts(side: int, window: int) -> list[int]:
    """Where windows begin along a side of at least `window` pixels; the last is pulled back inside."""
    stride = math.ceil(window * STRIDE)
    count = math.ceil((side - window) / stride) + 1
    return [min(index * stride, side - window) for index in range(count)]


class Memory:
    """The sums of one image, used again for the next: fresh pages cost as much as the adding itself."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def zeros(self, device: torch.device, *shape: int) -> torch.Tensor:
        """float32 zeros; they last until the next call."""
        size = math.prod(shape)
        if len(self._flat) < size or self._flat.device != device:
            self._flat = torch.zeros(size, device=device)
            return self._flat.view(shape)
        return self._flat[:size].view(shape).zero_()


class WindowSums:
    """Sums of window scores float32 [K, H, W], and over how many windows each pixel's sum is.

    Works plane by plane: a plane fits in the cache, all K do not.
    """

    def __init__(
        self, classes: int, height: int, width: int, device: torch.device, memory: Memory | None = None
    ) -> None:
        self.total_KHW = (memory or Memory()).zeros(device, classes, height, width)
        self.count_HW = torch.zeros(height, width, device=device)

    def add(
        self, scores_Khw: torch.Tensor, top: int, left: int, mirrored: torch.Tensor | None = None
    ) -> None:
        """Add a window whose corner lies at `top`, `left`, and the scores of its mirror image."""
        height, width = scores_Khw.shape[1:]
        rows, columns = slice(top, top + height), slice(left, left + width)
        window = self.total_KHW[:, rows, columns]
        if window.device.type == "cpu":
            for k in range(len(window)):
                if mirrored is None:
                    window[k] += scores_Khw[k]
                else:
                    window[k] += mirrored[k].flip(1).add_(scores_Khw[k])
        else:
            window += scores_Khw
            if mirrored is not None:
                window += mirrored.flip(2)
        self.count_HW[rows, columns] += 1 if mirrored is None else 2

    def crop(self, top: int, left: int, height: int, width: int) -> None:
        """Forget what lies outside: the padding of a small image."""
        self.total_KHW = self.total_KHW[:, top : top + height, left : left + width]
        self.count_HW = self.count_HW[top : top + height, left : left + width]

    def mean(self, top: int, bottom: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Averages of some rows, float32 [K, bottom - top, W]."""
        return torch.div(self.total_KHW[:, top:bottom], self.count_HW[top:bottom], out=out)


@torch.inference_mode()
def predict_scores(
    network: Network,
    image: np.ndarray,
    protocol: Protocol,
    average: Literal["logits", "probabilities"],
    memory: Memory | None = None,
) -> WindowSums:
    """Sums of logits or probabilities over windows, mirror and scales, on the network's device.

    Args:
        network: in eval mode.
        image: uint8 [H, W, 3], RGB.
        memory: for the sums of one image after the other; those of the image before are lost.
    """
    device = network.mean.device
    image_1CHW = torch.from_numpy(image).to(device, non_blocking=True).permute(2, 0, 1)[None]
    normalized = network.normalize(image_1CHW)
    height, width = image.shape[:2]
    all_scales: WindowSums | None = None
    for scale in protocol.scales:
        long_side = round(scale * (protocol.base_size or max(height, width)))
        size = _scaled(height, width, long_side)
        same = size == (height, width)
        sums = _slide(network, normalized if same else _resize(normalized, size), protocol, average, memory)
        if same and len(protocol.scales) == 1:
            return sums
        if all_scales is None:
            all_scales = WindowSums(network.classes, height, width, device)
        scores = sums.mean(0, size[0])
        all_scales.add(scores if same else _resize(scores[None], (height, width))[0], 0, 0)
    assert all_scales is not None
    return all_scales


def predict(
    network: Network,
    image: np.ndarray,
    protocol: Protocol,
    name: str = "image",
    scale: ConfidenceScale = FLOAT16,
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image as labeling wants them (DARS, section 3; the release's arithmetic).

    Logits are averaged in float32; `decide` makes classes and confidences of them. Raises NumericsError naming
    the image where a confidence is not a number (logits beyond float16's 65,504, or a network that diverged).
    """
    sums = predict_scores(network, image, protocol, "logits", memory)
    return _decide(sums, scale, False, name)


def predict_evaluation(
    network: Network,
    image: np.ndarray,
    protocol: Protocol,
    name: str = "image",
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image as evaluation wants them: probabilities averaged in float32, then the largest.

    Confidences are on the scale FINE, whose codes are off by at most 1.3e-4. Raises NumericsError naming the image
    where probabilities are not numbers (a network that diverged).
    """
    sums = predict_scores(network, image, protocol, "probabilities", memory)
    return _decide(sums, FINE, True, name)


def _decide(sums: WindowSums, scale: ConfidenceScale, probabilities: bool, name: str) -> Prediction:
    try:
        with torch.inference_mode():
            return decide_strips(
                sums.mean, sums.total_KHW.shape, sums.total_KHW.device, scale, probabilities, name
            )
    except DataError as error:
        raise NumericsError(str(error)) from None


def predict_classes(
    network: Network, image: np.ndarray, protocol: Protocol, memory: Memory | None = None
) -> np.ndarray:
    """The classes of `predict_evaluation`, uint8 [H, W]."""
    return predict_evaluation(network, image, protocol, memory=memory).classes.copy()  # may be written to


def whole_image(network: Network, image: np.ndarray) -> Protocol:
    """The image [H, W, 3] in one window, padded to a size the network takes, and its mirror."""
    height, width = image.shape[:2]
    return Protocol((network.legal_side(height), network.legal_side(width)))


def _scaled(height: int, width: int, long_side: int) -> tuple[int, int]:
    if height >= width:
        return long_side, max(1, round(long_side / height * width))
    return max(1, round(long_side / width * height)), long_side


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _slide(
    network: Network, image: torch.Tensor, protocol: Protocol, average: str, memory: Memory | None
) -> WindowSums:
    """Scores of all windows of an image [1, 3, H, W], summed where they overlap."""
    height, width = image.shape[2:]
    window_h, window_w = protocol.window
    pad_h, pad_w = max(window_h - height, 0), max(window_w - width, 0)
    # Normalized mean color is 0.
    padded = F.pad(image, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    corners = [
        (top, left)
        for top in window_starts(padded.shape[2], window_h)
        for left in window_starts(padded.shape[3], window_w)
    ]
    sums = WindowSums(network.classes, padded.shape[2], padded.shape[3], image.device, memory)
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        some = corners[start : start + WINDOWS_AT_ONCE]
        windows = torch.cat(
            [padded[:, :, top : top + window_h, left : left + window_w] for top, left in some]
        )
        if protocol.mirror:
            windows = torch.cat([windows, windows.flip(3)])
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=protocol.bf16):
            scores = network(windows).main
        if average == "probabilities":
            scores = scores.float().softmax(dim=1)
        for index, (top, left) in enumerate(some):
            sums.add(scores[index], top, left, scores[len(some) + index] if protocol.mirror else None)
    sums.crop(pad_h // 2, pad_w // 2, height, width)
    return sums
