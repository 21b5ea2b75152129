"""Whole-image prediction: scales, windows, mirror. The only sliding window in darseg.

`predict` averages probabilities (softmax per window), as evaluation does; `predict_for_labeling` averages logits, as
the release labels.
Shape letters: K classes, H, W pixels of the image, h, w of a window, N windows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from darseg.data.prediction import FINE, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError, NumericsError
from darseg.model.aligned import Variants
from darseg.model.decide import STRIP, decide_strips, overflow_message, relative_to_largest, scores_dtype
from darseg.model.network import Network

WINDOWS_AT_ONCE = 4
"""Windows (and as many mirrored ones) in one forward pass; fixed, because another number can change last bits."""

STRIDE = 2 / 3
"""Share of a window's side from one window to the next (the release's overlap)."""

Window = tuple[int, int] | Literal["whole"]
"""What the network predicts at once; `Protocol` says more."""

Average = Literal["logits", "probabilities"]
"""What is averaged over windows, mirror and scales."""


@dataclass(frozen=True)
class Protocol:
    """How whole images are predicted.

    Attributes:
        window: height and width of the sliding window in pixels (one number for both); legal sides of the network.
            "whole": each side of the image is scaled to the nearest legal one, and the logits are scaled back, both
            with corners on corners. UniMatch V2 scores VOC so.
        base_size: pixels of the long side to which the image is scaled first; None: its own size.
        mirror: average each window with its mirror image.
        scales: factors on top of base_size; the results are averaged.
        bf16: run the network under bfloat16 autocast.

    Raises DataError for sizes and scales that are not possible.
    """

    window: Window
    base_size: int | None = None
    mirror: bool = True
    scales: tuple[float, ...] = (1.0,)
    bf16: bool = False

    def __post_init__(self) -> None:
        window = (self.window, self.window) if isinstance(self.window, int) else self.window
        if not isinstance(window, str):
            window = tuple(window)
        legal = window == "whole" if isinstance(window, str) else len(window) == 2 and min(window) >= 1
        if not legal or not self.scales or min(self.scales) <= 0:
            raise DataError(
                f"A protocol with window {self.window} and scales {self.scales} is not possible. It takes two sides of "
                'at least 1 pixel, or "whole", and one or more scales above 0.'
            )
        object.__setattr__(self, "window", window)

    def describe(self, average: Average = "probabilities") -> str:
        """The protocol in words, with the precision that the network computes in."""
        if self.window == "whole":
            window = "whole images scaled to the nearest legal sides"
        else:
            window = f"windows {self.window[0]}x{self.window[1]} with stride 2/3"
        size = f"long side {self.base_size}" if self.base_size else "own size"
        mirror = "with mirror" if self.mirror else "no mirror"
        precision = "bf16" if self.bf16 else "fp32"
        return f"{size}, {window}, {mirror}, scales {list(self.scales)}, {average} averaged, {precision}"


def window_starts(side: int, window: int) -> list[int]:
    """First pixels of the windows along a side; the last window is moved back inside."""
    stride = math.ceil(window * STRIDE)
    count = math.ceil((side - window) / stride) + 1
    return [min(index * stride, side - window) for index in range(count)]


class Memory:
    """Memory for the sums of one image, reused: fresh pages cost as much as the additions."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def zeros(self, device: torch.device, *shape: int) -> torch.Tensor:
        """float32 zeros of this shape, valid until the next call."""
        size = math.prod(shape)
        if len(self._flat) < size or self._flat.device != device:
            self._flat = torch.zeros(size, device=device)
            return self._flat.view(shape)
        return self._flat[:size].view(shape).zero_()


class WindowSums:
    """Sums of window scores float32 [K, H, W], and how many windows each pixel's sum is of.

    Adds plane by plane: one plane fits in the cache, all K do not.
    """

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, memory: Memory | None = None
    ) -> None:
        self.total_KHW = (memory or Memory()).zeros(device, *shape)
        self.count_HW = torch.zeros(shape[1:], device=device)

    def add(
        self, scores_Khw: torch.Tensor, top: int, left: int, mirrored: torch.Tensor | None = None
    ) -> None:
        """Add the scores of a window whose corner is at `top`, `left`, and those of its mirror image."""
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

    def crop(self, top: int, left: int, *, height: int, width: int) -> None:
        """Keep this part only, without the padding of a small image."""
        self.total_KHW = self.total_KHW[:, top : top + height, left : left + width]
        self.count_HW = self.count_HW[top : top + height, left : left + width]

    def mean(self, top: int, bottom: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Averages of the rows from `top` to `bottom`, float32 [K, bottom - top, W]."""
        return torch.div(self.total_KHW[:, top:bottom], self.count_HW[top:bottom], out=out)


def predict(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol | None = None,
    *,
    name: str = "image",
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image, as `darseg predict` and `darseg evaluate` compute them.

    Probabilities are averaged in float32. A network is put into eval mode and afterwards back as it was, each module by
    itself; weights and BatchNorm's statistics do not change. Do not call this while another thread trains the network.

    Args:
        image: uint8 [H, W, 3], RGB, of any size.
        protocol: windows, mirror and scales; None: the whole image in one window, and its mirror.
        name: of the image, for error messages.
        memory: give the same for many images of one size, and each is faster.

    Returns:
        classes and confidences on the scale FINE, whose codes are off by at most 1.3e-4. The command line folds
        BatchNorm into convolutions first, so that its confidences differ in the last bits.

    Raises DataError for other arrays, SizeError for windows the network does not take, NumericsError if probabilities are
    not numbers (the network has diverged).
    """
    image = _checked(image, name)
    with _eval_mode(network):
        sums = predict_scores(
            network, image, protocol or whole_image(network, image), average="probabilities", memory=memory
        )
        return _decide(sums, scale=FINE, probabilities=True, name=name)


def predict_for_labeling(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    name: str = "image",
    scale: ConfidenceScale = FLOAT16,
    memory: Memory | None = None,
) -> Prediction:
    """Classes and confidences of an image, for pseudo labels (DARS, section 3).

    Logits are averaged in float32; `decide` turns them into classes and confidences. The arguments are those of
    `predict`, except for `scale`, the scale of the confidences.

    Raises DataError for other arrays, SizeError for windows the network does not take, NumericsError if a confidence is
    not a number (logits above float16's 65,504, or a network that has diverged).
    """
    image = _checked(image, name)
    with _eval_mode(network):
        sums = predict_scores(network, image, protocol, average="logits", memory=memory)
        return _decide(sums, scale=scale, probabilities=False, name=name)


def scores_for_labeling(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    scale: ConfidenceScale = FLOAT16,
    name: str = "image",
    memory: Memory | None = None,
) -> NDArray:
    """Averaged logits minus the largest of their pixel, float16 [K, H, W]; float32 for FINE.

    Raises the errors of `predict_for_labeling`; NumericsError if a largest logit is not finite.
    """
    image = _checked(image, name)
    with _eval_mode(network), torch.inference_mode():
        sums = predict_scores(network, image, protocol, average="logits", memory=memory)
        (classes, height, width), device = sums.total_KHW.shape, sums.total_KHW.device
        scores_KHW = torch.empty((classes, height, width), dtype=scores_dtype(scale))
        rows = max(1, STRIP // (classes * width)) if device.type == "cpu" else height
        for top in range(0, height, rows):
            mean = sums.mean(top, min(top + rows, height))
            if not bool(mean.amax(dim=0).isfinite().all()):
                raise NumericsError(overflow_message(mean, name))
            scores_KHW[:, top : top + rows] = relative_to_largest(mean, scale)
        return scores_KHW.numpy()


@torch.inference_mode()
def predict_scores(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    average: Average,
    memory: Memory | None = None,
) -> WindowSums:
    """Sums of logits or probabilities over windows, mirror and scales, on the network's device.

    Args:
        network: in eval mode.
        image: uint8 [H, W, 3], RGB.
        memory: for the sums; the sums of the image before are overwritten.
    """
    return _scores(network, image, protocol, average=average, memories=[memory])[0]


@torch.inference_mode()
def predict_probabilities(
    network: Network, image: NDArray[np.uint8], protocol: Protocol, *, memory: Memory | None = None
) -> NDArray[np.float32]:
    """The mean probabilities over windows, mirror and scales, float32 [K, H, W].

    The arguments are those of `predict_scores`.
    """
    sums = predict_scores(network, image, protocol, average="probabilities", memory=memory)
    return sums.mean(0, len(image)).cpu().numpy()


@torch.inference_mode()
def predict_variants(
    variants: Variants,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    name: str = "image",
    memories: Sequence[Memory],
) -> list[Prediction]:
    """The predictions of an image by each variant of a network, bit for bit those of `predict`.

    Args:
        variants: of a network in eval mode.
        memories: one for each variant.
    """
    sums = _scores(
        variants.network,
        _checked(image, name),
        protocol,
        average="probabilities",
        memories=memories,
        variants=variants,
    )
    return [_decide(part, scale=FINE, probabilities=True, name=name) for part in sums]


def _scores(
    network: Network,
    image: NDArray[np.uint8],
    protocol: Protocol,
    *,
    average: Average,
    memories: Sequence[Memory | None],
    variants: Variants | None = None,
) -> list[WindowSums]:
    """`predict_scores` for each variant of a network; without variants, for the network itself."""
    device = network.mean.device
    image_HWC = torch.from_numpy(image).to(device, non_blocking=True)
    normalized = network.normalize(image_HWC.permute(2, 0, 1)[None])
    height, width = image.shape[:2]
    shape, whole = (network.classes, height, width), protocol.window == "whole"
    all_scales: list[WindowSums] = []
    for scale in protocol.scales:
        size = _scaled(height, width, round(scale * (protocol.base_size or max(height, width))))
        size = (network.sides.nearest(size[0]), network.sides.nearest(size[1])) if whole else size
        same = size == (height, width)
        scaled = normalized if same else _resize(normalized, size, corners=whole)
        how: dict = {"average": average, "memories": memories, "variants": variants}
        if whole:
            same = True  # the scores have the image's size
            sums = _whole(network, scaled, protocol, shape=shape, **how)
        else:
            sums = _slide(network, scaled, protocol, **how)
        if same and len(protocol.scales) == 1:
            return sums
        all_scales = all_scales or [WindowSums(shape, device) for _ in memories]
        for total, part in zip(all_scales, sums, strict=True):
            scores = part.mean(0, len(part.count_HW))
            total.add(scores if same else _resize(scores[None], (height, width), corners=False)[0], 0, 0)
    return all_scales


def whole_image(network: Network, image: NDArray[np.uint8]) -> Protocol:
    """The protocol of one window over the whole image [H, W, 3], padded to a legal size, and its mirror."""
    height, width = image.shape[:2]
    return Protocol((network.sides.up(height), network.sides.up(width)))


def _checked(image: np.ndarray, name: str) -> np.ndarray:
    """The image in torch's memory layout. Raises DataError unless it is uint8 [H, W, 3] with pixels."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        kind = (
            f"{image.dtype} {list(image.shape)}"
            if isinstance(image, np.ndarray)
            else f"a {type(image).__name__}"
        )
        raise DataError(
            f"{name}: this is {kind}. Give a numpy array, uint8 [H, W, 3], RGB, as darseg.read_image returns it."
        )
    if image.size == 0:
        raise DataError(f"{name}: an image of shape {list(image.shape)} has no pixels.")
    # Copies only views such as image[..., ::-1], and arrays that cannot be written to.
    return np.require(image, requirements=["C", "W"])


@contextlib.contextmanager
def _eval_mode(network: Network) -> Generator[None, None, None]:
    """The network is in eval mode inside; each module that was in training mode is again, afterwards."""
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _decide(sums: WindowSums, *, scale: ConfidenceScale, probabilities: bool, name: str) -> Prediction:
    try:
        with torch.inference_mode():
            return decide_strips(
                sums.mean, sums.total_KHW, scale=scale, probabilities=probabilities, name=name
            )
    except DataError as error:
        raise NumericsError(str(error)) from None


def _scaled(height: int, width: int, long_side: int) -> tuple[int, int]:
    if height >= width:
        return long_side, max(1, round(long_side / height * width))
    return max(1, round(long_side / width * height)), long_side


def _resize(images: torch.Tensor, size: tuple[int, int], *, corners: bool) -> torch.Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=corners)


def _slide(
    network: Network,
    image: torch.Tensor,
    protocol: Protocol,
    *,
    average: Average,
    memories: Sequence[Memory | None],
    variants: Variants | None,
) -> list[WindowSums]:
    """Scores of all windows of an image [1, 3, H, W], summed where they overlap, for each variant."""
    height, width = image.shape[2:]
    assert not isinstance(protocol.window, str)
    window_h, window_w = protocol.window
    pad_h, pad_w = max(window_h - height, 0), max(window_w - width, 0)
    # The mean color is 0 after normalization.
    padded = F.pad(image, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    corners = [
        (top, left)
        for top in window_starts(padded.shape[2], window_h)
        for left in window_starts(padded.shape[3], window_w)
    ]
    shape = (network.classes, padded.shape[2], padded.shape[3])
    all_sums = [WindowSums(shape, image.device, memory) for memory in memories]
    for start in range(0, len(corners), WINDOWS_AT_ONCE):
        batch = corners[start : start + WINDOWS_AT_ONCE]
        windows = torch.cat(
            [padded[:, :, top : top + window_h, left : left + window_w] for top, left in batch]
        )
        if protocol.mirror:
            windows = torch.cat([windows, windows.flip(3)])
        with _precision(protocol, windows, variants):
            logits = variants.logits(windows) if variants else [network(windows).main]
            for sums, scores in zip(all_sums, logits, strict=True):
                if average == "probabilities":
                    scores = scores.float().softmax(dim=1)
                for index, (top, left) in enumerate(batch):
                    mirrored = scores[len(batch) + index] if protocol.mirror else None
                    sums.add(scores[index], top, left, mirrored=mirrored)
    for sums in all_sums:
        sums.crop(pad_h // 2, pad_w // 2, height=height, width=width)
    return all_sums


def _whole(
    network: Network,
    image: torch.Tensor,
    protocol: Protocol,
    *,
    shape: tuple[int, int, int],
    average: Average,
    memories: Sequence[Memory | None],
    variants: Variants | None,
) -> list[WindowSums]:
    """Scores of a whole image [1, 3, h, w] for each variant; its logits are scaled to `shape`, [K, H, W]."""
    images = torch.cat([image, image.flip(3)]) if protocol.mirror else image
    all_sums = [WindowSums(shape, image.device, memory) for memory in memories]
    with _precision(protocol, images, variants):
        logits = variants.logits(images) if variants else [network(images).main]
        for sums, scores in zip(all_sums, logits, strict=True):
            scores = _resize(scores.float(), shape[1:], corners=True)
            if average == "probabilities":
                scores = scores.softmax(dim=1)
            sums.add(scores[0], 0, 0, mirrored=scores[1] if protocol.mirror else None)
    return all_sums


def _precision(protocol: Protocol, images: torch.Tensor, variants: Variants | None) -> torch.autocast:
    # Variants change the classifier's bias in between, which a cached cast of it would hide.
    return torch.autocast(images.device.type, torch.bfloat16, protocol.bf16, cache_enabled=variants is None)
