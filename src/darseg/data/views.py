"""What a stream of unlabeled images yields: weak and strong views of the same pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Views:
    """Views of unlabeled images, drawn by position. A method's label phase makes a `Batch` of them.

    Attributes:
        weak: uint8 [B, 3, H, W], RGB: scaled, rotated, mirrored and cropped.
        strong: uint8 [V, B, 3, H, W]: the same pixels with other colors and blurred; V may be 0.
        inside: bool [B, H, W]: False where the crop reached beyond the image and was padded.
        boxes: int32 [V, B, 4]: top, left, bottom, right of the region to mix; an empty box mixes nothing.
        positions: int64 [B]: of the images in the stream; draws per image and pixel are keyed by them, so that any number
            of processes and micro-batches draws the same.
        ids: of the samples, B of them.
        truth: uint8 [B, H, W], 255 = unknown, of images whose labels happen to be known: measured, never used. None:
            unknown for all.
    """

    weak: Tensor
    strong: Tensor
    inside: Tensor
    boxes: Tensor
    positions: Tensor
    ids: tuple[str, ...]
    truth: Tensor | None = None
