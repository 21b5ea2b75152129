"""Images scaled to a square, whatever their aspect: what a classifier of whole images takes.

The scaling is written as two matrix products, so that training, prediction and exported files compute the same.
Letters: B images, H, W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import Example, Load, LoadImage
from darseg.data.manifest import Sample


def squared(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] with colors 0 to 255, scaled to float [B, 3, side, side], whole numbers.

    Bilinear, with triangles as wide as the reduction, so that no pixel is skipped (Pillow's rule).
    """
    height, width = images.shape[-2:]
    down, across = (_triangles(length, side, images.device) for length in (height, width))
    return (down @ images.to(torch.float32) @ across.T).round()


def _triangles(length: int, side: int, device: torch.device) -> Tensor:
    """The weights, float32 [side, length], of the old pixels in each new one; each row adds up to 1."""
    # As a tensor, since exporters know lengths only as symbols.
    factor = torch.scalar_tensor(length, dtype=torch.float32, device=device) / side
    centers = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) * factor
    pixels = torch.arange(length, dtype=torch.float32, device=device) + 0.5
    distances = (pixels[None, :] - centers[:, None]).abs() / factor.clamp(min=1.0)
    weights = (1.0 - distances).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def square_images(side: int, load: LoadImage) -> LoadImage:
    """What reads an image, uint8 [side, side, 3], of a sample."""
    return lambda sample: _square(load(sample), side)


def square_examples(side: int, load: Load) -> Load:
    """What reads a sample as a square example whose label map marks each class once.

    It marks those of the label map at its full size. A label map that is scaled down loses small things; the marks lose
    nothing that the classes of an image need.
    """

    def read(sample: Sample, classes: ClassSet) -> Example:
        example = load(sample, classes)
        return Example(example.id, _square(example.image, side), label=marks(example.label, side))

    return read


def marks(label: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A label map [side, side] in which each class of `label` has a pixel, and all others are 255."""
    present = np.unique(label)
    present = present[present != IGNORE]
    marked = np.full(side * side, IGNORE, np.uint8)
    marked[: len(present)] = present
    return marked.reshape(side, side)


def _square(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    scaled = squared(pixels[None], side)[0].permute(1, 2, 0).to(torch.uint8)
    return np.ascontiguousarray(scaled.numpy())
