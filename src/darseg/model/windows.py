"""Windows of images through a network, summed where they overlap. The only sliding window in darseg.

Shape letters: B images, K classes, H, W pixels of an image, h, w of a window.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from darseg.errors import DataError
from darseg.model.aligned import Variants
from darseg.model.network import Network

WINDOWS_OF_IMAGE = 4
"""Windows (and as many mirrored ones) in one forward pass on a CPU. Fixed: another number can change last bits."""

PIXELS_AT_ONCE = 1 << 22
"""Pixels, mirrored ones included, in one forward pass on a GPU: four windows of 713x713 and their mirror images."""

MOST_WINDOWS = 64
"""Windows in one forward pass on a GPU, however small they are: images of as many wait for each other."""

IMAGES_AT_ONCE = 16
"""Images that go through a GPU together if each has a window of its own size."""

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
        windows_at_once: windows (and as many mirrored ones) in one forward pass, of several images if each has few;
            None: on a CPU up to 4 of one image; on a GPU as many as have 4 million pixels.

    Raises DataError for sizes and scales that are not possible.
    """

    window: Window
    base_size: int | None = None
    mirror: bool = True
    scales: tuple[float, ...] = (1.0,)
    bf16: bool = False
    windows_at_once: int | None = None

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
        if self.windows_at_once is not None and self.windows_at_once < 1:
            raise DataError(f"windows_at_once is {self.windows_at_once}. Give at least 1 window.")
        object.__setattr__(self, "window", window)

    @property
    def keeps_size(self) -> bool:
        """Whether images are predicted in their own size only."""
        return self.base_size is None and tuple(self.scales) == (1.0,)

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

    def zeros(self, device: torch.device, *shape: int) -> Tensor:
        """float32 zeros of this shape, valid until the next call."""
        size = math.prod(shape)
        if len(self._flat) < size or self._flat.device != device:
            self._flat = torch.zeros(size, device=device)
            return self._flat.view(shape)
        return self._flat[:size].view(shape).zero_()


class WindowSums:
    """Sums of window scores float32 [K, H, W], and how many windows each pixel's sum is of.

    Adds plane by plane: one plane fits in the cache, all K do not. The planes of several images of one size lie behind
    each other, [B * K, H, W].
    """

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, memory: Memory | None = None
    ) -> None:
        self.total_KHW = (memory or Memory()).zeros(device, *shape)
        self.count_HW = torch.zeros(shape[1:], device=device)

    def add(self, scores_Khw: Tensor, top: int, left: int, mirrored: Tensor | None = None) -> None:
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

    def of_image(self, index: int, images: int) -> WindowSums:
        """The sums of one of several images; they share their memory."""
        part = copy.copy(self)
        classes = len(self.total_KHW) // images
        part.total_KHW = self.total_KHW[index * classes : (index + 1) * classes]
        return part

    def mean(self, top: int, bottom: int, out: Tensor | None = None) -> Tensor:
        """Averages of the rows from `top` to `bottom`, float32 [K, bottom - top, W]."""
        return torch.div(self.total_KHW[:, top:bottom], self.count_HW[top:bottom], out=out)


def windows_at_once(protocol: Protocol, device: torch.device, window: tuple[int, int]) -> int:
    """Most windows (and as many mirrored ones) of this size in one forward pass."""
    if protocol.windows_at_once is not None:
        return protocol.windows_at_once
    if device.type == "cpu":
        return WINDOWS_OF_IMAGE
    pixels = math.prod(window) * (2 if protocol.mirror else 1)
    return min(MOST_WINDOWS, max(1, PIXELS_AT_ONCE // pixels))


def group_size(protocol: Protocol | None, device: torch.device) -> int:
    """How many consecutive images are a group, in which images may share forward passes.

    If all images have one window each, or each has two, and so on, all passes of a group are full.

    Args:
        protocol: None: each image has a window of its own size.
    """
    if protocol is not None and protocol.windows_at_once is not None:
        return protocol.windows_at_once
    if device.type == "cpu":
        return 1
    if protocol is None or isinstance(protocol.window, str):
        return IMAGES_AT_ONCE
    return windows_at_once(protocol, device, protocol.window)


def like_size(protocol: Protocol, height: int, width: int) -> tuple[int, int]:
    """A size that images have in common if they can go through the network together.

    It is their own, or the window that each of them fits into.
    """
    window = protocol.window
    if not isinstance(window, str) and protocol.keeps_size and height <= window[0] and width <= window[1]:
        return window
    return height, width


def images_in_pass(protocol: Protocol, network: Network, size: tuple[int, int]) -> int:
    """How many images like this one go through the network in one pass; at least 1."""
    device, sizes = network.mean.device, _sizes(protocol, network, size)
    if isinstance(protocol.window, str):
        return windows_at_once(protocol, device, max(sizes))
    counts = (
        math.prod(
            len(window_starts(max(side, window), window))
            for side, window in zip(scaled, protocol.window, strict=True)
        )
        for scaled in sizes
    )
    return max(1, windows_at_once(protocol, device, protocol.window) // max(counts))


def sum_windows(
    network: Network,
    images: Sequence[Tensor],
    protocol: Protocol,
    *,
    average: Average,
    memories: Sequence[Memory | None] = (None,),
    variants: Variants | None = None,
) -> list[WindowSums]:
    """Sums of logits or probabilities of images of like size, over windows, mirror and scales.

    Args:
        network: in eval mode.
        images: uint8 [H, W, 3] each, RGB, on the host, with equal `like_size`; they go through the network together.
        memories: for the sums of each variant; those of the call before are overwritten.
        variants: of the network; None: the network itself.

    Returns:
        the sums of each variant on the network's device, [B * K, H, W]; images of several sizes with their padding, so
        that each is at its `place`.
    """
    device, whole = network.mean.device, protocol.window == "whole"
    missing = _missing(network, images)
    normalized = _normalized(network, images, protocol)
    height, width = normalized.shape[2:]
    shape = (len(images) * network.classes, height, width)
    all_scales: list[WindowSums] = []
    for size in _sizes(protocol, network, (height, width)):
        same = size == (height, width)
        scaled = normalized if same else _resize(normalized, size, corners=whole)
        how: dict = {"average": average, "memories": memories, "variants": variants, "missing": missing}
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


def _missing(network: Network, images: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Logits of windows [n * B, K, h, w] → those without classes that their image does not show.

    The windows of all images at one place lie behind each other. Whole images are asked, not windows: a class may be in
    the image without being in a window of it.
    """
    how = network.image_classes
    if how is None:
        return lambda logits: logits
    how.classifier.to(network.mean.device)  # it does not move with the network
    removed_BK = how.removed(images)
    return lambda logits: how.without(logits.float(), removed_BK.repeat(len(logits) // len(removed_BK), 1))


def place(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Top and left of an image of height and width `size` that is padded to this height and width."""
    return (height - size[0]) // 2, (width - size[1]) // 2


def _normalized(network: Network, images: Sequence[Tensor], protocol: Protocol) -> Tensor:
    """The images as the network takes them, float32 [B, 3, H, W].

    Those of several sizes are padded to a window.
    """
    moved = [image.to(network.mean.device, non_blocking=True)[None].permute(0, 3, 1, 2) for image in images]
    if len({image.shape for image in images}) == 1:
        return network.normalize(moved[0] if len(moved) == 1 else torch.cat(moved))
    assert not isinstance(protocol.window, str)
    height, width = protocol.window
    padded = torch.zeros((len(images), 3, height, width), device=network.mean.device)
    for index, image in enumerate(images):
        top, left = place((image.shape[0], image.shape[1]), height, width)
        padded[index, :, top : top + len(image), left : left + image.shape[1]] = network.normalize(
            moved[index]
        )[0]
    return padded


def _sizes(protocol: Protocol, network: Network, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of an image of this size on each scale."""
    height, width = size
    long_sides = (round(scale * (protocol.base_size or max(height, width))) for scale in protocol.scales)
    sizes = [_scaled(height, width, long_side) for long_side in long_sides]
    if protocol.window == "whole":
        return [(network.sides.nearest(high), network.sides.nearest(wide)) for high, wide in sizes]
    return sizes


def _scaled(height: int, width: int, long_side: int) -> tuple[int, int]:
    if height >= width:
        return long_side, max(1, round(long_side / height * width))
    return max(1, round(long_side / width * height)), long_side


def _resize(images: Tensor, size: tuple[int, int], *, corners: bool) -> Tensor:
    return F.interpolate(images, size=size, mode="bilinear", align_corners=corners)


def _slide(
    network: Network,
    images: Tensor,
    protocol: Protocol,
    *,
    average: Average,
    memories: Sequence[Memory | None],
    variants: Variants | None,
    missing: Callable[[Tensor], Tensor],
) -> list[WindowSums]:
    """Scores of all windows of images [B, 3, H, W], summed where they overlap, for each variant."""
    count, _, height, width = images.shape
    assert not isinstance(protocol.window, str)
    window_h, window_w = protocol.window
    at_once = max(1, windows_at_once(protocol, images.device, protocol.window) // count)
    pad_h, pad_w = max(window_h - height, 0), max(window_w - width, 0)
    # The mean color is 0 after normalization.
    padded = F.pad(images, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    corners = [
        (top, left)
        for top in window_starts(padded.shape[2], window_h)
        for left in window_starts(padded.shape[3], window_w)
    ]
    shape = (count * network.classes, padded.shape[2], padded.shape[3])
    all_sums = [WindowSums(shape, images.device, memory) for memory in memories]
    for start in range(0, len(corners), at_once):
        batch = corners[start : start + at_once]
        windows = torch.cat(
            [padded[:, :, top : top + window_h, left : left + window_w] for top, left in batch]
        )
        if protocol.mirror:
            windows = torch.cat([windows, windows.flip(3)])
        with _precision(protocol, windows, variants):
            logits = variants.logits(windows) if variants else [network(windows).main]
            for sums, scores in zip(all_sums, map(missing, logits), strict=True):
                if average == "probabilities":
                    scores = scores.float().softmax(dim=1)
                # Each corner's windows of all images lie behind each other.
                of_corners = scores.unflatten(0, (-1, count)).flatten(1, 2) if count > 1 else scores
                for index, (top, left) in enumerate(batch):
                    mirrored = of_corners[len(batch) + index] if protocol.mirror else None
                    sums.add(of_corners[index], top, left, mirrored=mirrored)
    for sums in all_sums:
        sums.crop(pad_h // 2, pad_w // 2, height=height, width=width)
    return all_sums


def _whole(
    network: Network,
    images: Tensor,
    protocol: Protocol,
    *,
    shape: tuple[int, int, int],
    average: Average,
    memories: Sequence[Memory | None],
    variants: Variants | None,
    missing: Callable[[Tensor], Tensor],
) -> list[WindowSums]:
    """Scores of images [B, 3, h, w] in one piece, for each variant.

    Args:
        shape: [B * K, H, W], to which logits are scaled.
    """
    count = len(images)
    both = torch.cat([images, images.flip(3)]) if protocol.mirror else images
    all_sums = [WindowSums(shape, images.device, memory) for memory in memories]
    with _precision(protocol, both, variants):
        logits = variants.logits(both) if variants else [network(both).main]
        for sums, scores in zip(all_sums, logits, strict=True):
            scores = missing(_resize(scores.float(), shape[1:], corners=True))
            if average == "probabilities":
                scores = scores.softmax(dim=1)
            mirrored = scores[count:].flatten(0, 1) if protocol.mirror else None
            sums.add(scores[:count].flatten(0, 1), 0, 0, mirrored=mirrored)
    return all_sums


def _precision(protocol: Protocol, images: Tensor, variants: Variants | None) -> torch.autocast:
    # Variants change the classifier's bias in between, which a cached cast of it would hide.
    return torch.autocast(images.device.type, torch.bfloat16, protocol.bf16, cache_enabled=variants is None)
