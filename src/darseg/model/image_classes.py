"""Which classes a whole image shows: a classifier whose answers remove classes from a prediction.

Letters: B images, K classes, H, W pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from darseg.data.files import parse_json, write_whole
from darseg.data.square import squared
from darseg.errors import DataError, RecipeError, WeightsError, faults, shortened
from darseg.model.backbone import RESNETS, UNDILATED, ResNet
from darseg.model.fitting import COUNTER, foreign_keys, misfits_of
from darseg.model.torchfile import read_bare_part, read_tensors

REMOVED = -65504.0
"""The logit of a removed class: float16's lowest number. Its probability is 0, and it can be averaged and exported,
which minus infinity cannot."""

METADATA = "darseg"
"""The only entry of a file's metadata: safetensors writes several in no fixed order, and equal networks should be equal
files."""

IMAGE_CLASSES = "image_classes"
"""Entry of the description in a file that holds a classifier."""

SIDES = (32, 4096)
"""Smallest and largest side of the square that a classifier takes, in pixels."""


class ImageClassifier(nn.Module):
    """An undilated ResNet with a linear layer over the mean of its last feature map.

    Attributes:
        classes: K.
        mean, std: buffers of its normalization (RGB, 0..255), float32 [3].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, classes: int) -> None:
        super().__init__()
        if backbone not in RESNETS:
            raise RecipeError(f"There is no classifier on {backbone!r}. Choose one of {', '.join(RESNETS)}.")
        self.backbone = ResNet(backbone, RESNETS[backbone], UNDILATED)
        self.classes = classes
        self.last = nn.Linear(self.backbone.channels[-1], classes)
        self.register_buffer("mean", torch.tensor(self.backbone.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(self.backbone.std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of "the image shows the class" for images [B, 3, side, side] with colors 0 to 255."""
        colors = images.to(self.mean.dtype)
        normalized = (colors - self.mean[:, None, None]) / self.std[:, None, None]
        return self.last(self.backbone(normalized).stage4.mean((2, 3)))


@dataclass(frozen=True)
class ImageClasses:
    """A trained classifier and what follows from its answers.

    Attributes:
        classifier: in eval mode.
        side: pixels of the square that it takes.
        threshold: classes that are less probable are removed.
        keep: numbers of the classes that are never removed.
        zero: the logits of a removed class become 0, so that it can still win where all others are negative. The
            release does so. False: it cannot win.

    Raises DataError for values that cannot be.
    """

    classifier: ImageClassifier
    side: int = 320
    threshold: float = 0.2
    keep: tuple[int, ...] = (0,)
    zero: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(sorted(self.keep)))
        self.classifier.eval().requires_grad_(False)
        lines = []
        if not 0 <= self.threshold <= 1:
            lines.append(f"the threshold is {self.threshold}; expected a number from 0 to 1")
        if not SIDES[0] <= self.side <= SIDES[1]:
            lines.append(f"the side is {self.side}; expected {SIDES[0]} to {SIDES[1]} pixels")
        if strange := [k for k in self.keep if not 0 <= k < self.classifier.classes]:
            lines.append(
                f"keep has the classes {strange}; expected numbers from 0 to {self.classifier.classes - 1}"
            )
        if lines:
            raise DataError(faults("A classifier of images cannot be used so", lines))

    @torch.no_grad()
    def presence(self, images: Sequence[Tensor]) -> Tensor:
        """Probabilities, float [B, K], that images show the classes.

        Args:
            images: uint8 [H, W, 3] each, RGB, of any sizes.
        """
        device = self.classifier.mean.device
        squares = [
            squared(image.to(device, non_blocking=True).permute(2, 0, 1)[None], self.side) for image in images
        ]
        with torch.autocast(device.type, enabled=False):
            return self.classifier(torch.cat(squares)).sigmoid()

    def removed(self, images: Sequence[Tensor]) -> Tensor:
        """Which classes are removed, bool [B, K]; arguments as of `presence`."""
        return self.removed_by(self.presence(images))

    def removed_by(self, presence_BK: Tensor) -> Tensor:
        """Which classes are removed at these probabilities.

        If none would be left, the most probable one is. With `zero` none need be left: all have logit 0 then.
        """
        classes = range(presence_BK.shape[1])
        always = torch.tensor([k in self.keep for k in classes], device=presence_BK.device)
        kept = (presence_BK >= self.threshold) | always
        if not self.zero:
            most_probable = presence_BK == presence_BK.amax(dim=1, keepdim=True)
            kept = kept | (most_probable & ~kept.any(dim=1, keepdim=True))
        return ~kept

    def without(self, logits_BKHW: Tensor, removed_BK: Tensor) -> Tensor:
        """The logits without the removed classes."""
        return logits_BKHW.masked_fill(removed_BK[:, :, None, None], 0.0 if self.zero else REMOVED)

    def in_order(self, order: Sequence[int]) -> ImageClasses:
        """The same for classes in another order; for each class `order` has its place in the old one.

        The classifier is changed in place.
        """
        with torch.no_grad():
            for tensor in (self.classifier.last.weight, self.classifier.last.bias):
                tensor.copy_(tensor[list(order)])
        keep = tuple(new for new, old in enumerate(order) if old in self.keep)
        return dataclasses.replace(self, keep=keep)

    def to_json(self) -> dict[str, Any]:
        """All but the weights, for the description in a file."""
        return {
            "backbone": self.classifier.backbone.name,
            "side": self.side,
            "threshold": self.threshold,
            "keep": list(self.keep),
            "zero": self.zero,
        }


@dataclass(frozen=True)
class Described:
    """What a file says of its classifier.

    Raises DataError for values of other types.
    """

    backbone: str
    side: int
    threshold: float
    keep: tuple[int, ...]
    zero: bool

    @classmethod
    def from_json(cls, value: Any) -> Described:
        """The description that `ImageClasses.to_json` gave. Raises DataError for anything else."""
        names = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise DataError(f"the entries about image classes are not {', '.join(sorted(names))}")
        fits = (
            isinstance(value["backbone"], str)
            and type(value["side"]) is int
            and type(value["threshold"]) in (int, float)
            and isinstance(value["keep"], list)
            and all(type(k) is int for k in value["keep"])
            and type(value["zero"]) is bool
        )
        if not fits or value["backbone"] not in RESNETS:
            raise DataError(f"the entries about image classes are {shortened(dict(value))}")
        return cls(
            backbone=value["backbone"],
            side=value["side"],
            threshold=value["threshold"],
            keep=tuple(value["keep"]),
            zero=value["zero"],
        )

    def build(self, classes: int) -> ImageClasses:
        """The same with a classifier whose weights are still to be loaded. Raises DataError."""
        return ImageClasses(
            ImageClassifier(self.backbone, classes),
            side=self.side,
            threshold=self.threshold,
            keep=self.keep,
            zero=self.zero,
        )


def save_image_classes(how: ImageClasses, path: Path) -> None:
    """Write a classifier, and how it decides, to a file. Raises StorageError if the disk refuses."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in how.classifier.state_dict().items()}
    metadata = {METADATA: json.dumps({IMAGE_CLASSES: how.to_json()}, sort_keys=True)}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def load_image_classes(path: Path) -> ImageClasses:
    """What `save_image_classes` wrote, on the CPU. Raises WeightsError if the file is missing or damaged."""
    tensors = read_tensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = parse_json((file.metadata() or {})[METADATA])
        how = Described.from_json(content[IMAGE_CLASSES]).build(len(tensors["last.bias"]))
        how.classifier.load_state_dict(tensors)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, DataError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {shortened(str(error))}"
        raise WeightsError(
            f"{path} is not the classifier of images that a run left there ({reason}). Restore it from a copy, or delete "
            "classify.json next to it and run the same command again."
        ) from error
    return how


def load_imagenet(classifier: ImageClassifier, source: Path) -> tuple[int, tuple[str, ...]]:
    """Fill a classifier's backbone with weights in torchvision's layout.

    Returns:
        the number of tensors that were filled, and the keys of the file that were not needed.

    Raises WeightsError, leaving the classifier as it was, if the file does not fit.
    """
    _, tensors = read_bare_part(source)
    backbone = classifier.backbone.state_dict()
    wanted = [key for key in backbone if key in tensors or not key.endswith(COUNTER)]
    lines = [*misfits_of(backbone, {key: key for key in wanted}, tensors).values()]
    unused = tuple(sorted(tensors.keys() - {*wanted}))
    lines += [
        f"{key}: not part of this backbone" for key in foreign_keys(unused, classifier.backbone, wanted)
    ]
    if lines:
        raise WeightsError(
            faults(
                f"{source} does not fit the classifier's backbone {classifier.backbone.name}. Give torchvision's weights "
                "of this backbone (image_classes.weights), or choose the backbone that these weights belong to "
                "(image_classes.backbone). What does not fit",
                lines,
                limit=10,
            )
        )
    with torch.no_grad():
        for key in wanted:
            backbone[key].copy_(tensors[key])
    return len(wanted), unused
