"""Mix images of a batch in pairs: CutMix and ClassMix.

Images 0 and 1, 2 and 3, … are partners. So partners lie in the same process if its share is even, and mixing happens
before a batch is divided: neither processes nor micro-batches change what is mixed. The same mask is applied to
everything that belongs to an image: its pixels, labels, weights, and what is inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from darseg.data.classes import IGNORE
from darseg.errors import RecipeError
from darseg.methods.draws import uniform


def partners_of(count: int, device: torch.device) -> Tensor:
    """The partner of each of `count` images, int64 [B]. Raises RecipeError if an image has none."""
    if count % 2:
        raise RecipeError(
            f"Images are mixed in pairs, but a process has {count} unlabeled image(s) in a step. Make online.batch a "
            "multiple of twice the number of processes, or set online.mixing: none."
        )
    return torch.arange(count, device=device) ^ 1


def mix(own: Tensor, partners: Tensor, mask_BHW: Tensor) -> Tensor:
    """What the partner has where the mask is true, otherwise an image's own.

    Args:
        own: [B, H, W] or [B, C, H, W].
        partners: int64 [B].
        mask_BHW: bool.
    """
    mask = mask_BHW if own.ndim == 3 else mask_BHW[:, None]
    return torch.where(mask, own[partners], own)


def box_mask(boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """CutMix: true inside of each image's box, bool [B, H, W]; an empty box is true nowhere.

    Args:
        boxes_B4: int32, top, left, bottom and right.
        size: H and W.
    """
    top, left, bottom, right = boxes_B4[:, :, None].unbind(1)  # each [B, 1]
    rows, columns = (torch.arange(side, device=boxes_B4.device) for side in size)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]


def class_mask(
    predicted_BHW: Tensor, classes: int, partners: Tensor, *, seed: Sequence[int], positions: Tensor
) -> Tensor:
    """ClassMix: true where the partner shows one of its chosen classes, bool [B, H, W].

    Of the classes that an image shows, half are chosen at random (the floor of half).

    Args:
        predicted_BHW: uint8, predicted classes; 255: outside of the image, never chosen.
        seed: of the round.
        positions: int64 [B], of the images in their stream.
    """
    images = len(predicted_BHW)
    # One more place for pixels outside.
    places = predicted_BHW.long().clamp(max=classes).reshape(images, -1)
    shown = torch.zeros(images, classes + 1, dtype=torch.bool, device=places.device)
    shown.scatter_(1, places, True)
    shown[:, classes] = False
    draws = uniform(seed, positions[:, None], torch.arange(classes + 1, device=places.device))
    ranks = draws.masked_fill(~shown, torch.inf).argsort(1).argsort(1)
    chosen = shown & (ranks < shown.sum(1, keepdim=True) // 2)
    mask = chosen.gather(1, places).reshape(predicted_BHW.shape)
    return mask[partners]


assert IGNORE == 255  # the largest of a uint8, so that clamping puts it after all classes
