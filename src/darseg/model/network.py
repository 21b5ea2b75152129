"""Networks: images in, logits at the size of the images out.

Letters: B images, K classes, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from darseg.choices import Architecture
from darseg.errors import DataError, RecipeError, SizeError, faults
from darseg.model.backbone import OUTPUT_STRIDES, Backbone, build_backbone
from darseg.model.heads import (
    ATROUS_DILATIONS,
    RELEASE_BRANCHES,
    AtrousHead,
    AuxiliaryHead,
    PyramidPoolingHead,
    upsample,
)

if TYPE_CHECKING:
    from darseg.data.prediction import Prediction
    from darseg.model.predict import Protocol

ARCHITECTURES = get_args(Architecture)
HEAD_CHANNELS = 512
"""Width of PSPNet's last 3x3 convolution, as published."""

BESIDE_HEADS = "backbone.layer4."
"""What learns at the heads' rate in the release's DeepLabv2, which counts parameter groups wrongly."""


class Output(NamedTuple):
    """Logits (not probabilities) at the size of the images."""

    main: Tensor
    """[B, K, H, W]"""
    auxiliary: Tensor | None
    """[B, K, H, W] in training; None in eval mode and of networks without an auxiliary head."""


class Network(nn.Module):
    """A segmentation network that knows how its images must look.

    Attributes: `classes` (K), `stride` (legal sides are stride * n + 1, n >= 1), the buffers `mean` and `std`
    (RGB, 0..255) and `fill` (the mean color, for padding).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        auxiliary_head: nn.Module | None,
        classes: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.auxiliary_head = auxiliary_head
        self.classes = classes
        self.stride = stride
        # Part of the state dict, so that a saved network keeps the normalization it was trained with.
        self.register_buffer("mean", torch.tensor(backbone.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(backbone.std, dtype=torch.float32))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean color as whole numbers (RGB, 0..255): what to pad images with."""
        red, green, blue = (round(part) for part in self.mean.tolist())
        return red, green, blue

    def legal_side(self, n: int) -> int:
        """The smallest side the network takes that is at least `n` pixels long."""
        return self.stride * max(1, -((1 - n) // self.stride)) + 1

    def check_size(self, height: int, width: int) -> None:
        """Raise SizeError, naming the nearest legal sizes, unless the network takes height x width pixels."""
        if all(side > 1 and (side - 1) % self.stride == 0 for side in (height, width)):
            return
        larger = (self.legal_side(height), self.legal_side(width))
        smaller = (self._legal_side_below(height), self._legal_side_below(width))
        near = f"{smaller[0]} x {smaller[1]} and {larger[0]} x {larger[1]}"
        if smaller == larger:
            near = f"{larger[0]} x {larger[1]}"
        raise SizeError(
            f"Images of {height} x {width} pixels (height x width): this network takes sides of "
            f"{self.stride}n + 1 pixels. Crop or pad to one of the nearest legal sizes: {near}."
        )

    def _legal_side_below(self, n: int) -> int:
        return self.stride * max(1, (n - 1) // self.stride) + 1

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] RGB → float (x - mean) / std; float images are taken as normalized already."""
        if images.dtype == torch.uint8:
            return (images.to(self.mean.dtype) - self.mean[:, None, None]) / self.std[:, None, None]
        return images

    def predict(self, image: np.ndarray, protocol: Protocol | None = None) -> Prediction:
        """Classes and confidences of an image, as `darseg predict` and `darseg evaluate` have them, but for rounding
        (these fold BatchNorm into convolutions).

        Args:
            image: uint8 [H, W, 3], RGB; of any size.
            protocol: windows, mirror and scales; None: the whole image at once, and its mirror.

        The network predicts in eval mode and is then put back as it was, each module by itself: neither weights nor
        BatchNorm's statistics move. Not while another thread trains it. Raises DataError for another array, SizeError
        for windows the network cannot take, NumericsError where probabilities are not numbers.
        """
        from darseg.model.predict import predict_evaluation, whole_image  # imports this module

        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image)
            raise DataError(
                f"An image of {found}: wanted is a numpy array, uint8 [H, W, 3], RGB, as darseg.read_image makes it."
            )
        if image.size == 0:
            raise DataError(f"An image of {list(image.shape)} has no pixels.")
        image = np.require(
            image, requirements=["C", "W"]
        )  # what torch takes; copies views such as image[..., ::-1]
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return predict_evaluation(self, image, protocol or whole_image(self, image))
        finally:
            for module in training:
                module.training = True

    def forward(self, images: Tensor) -> Output:
        """Logits of `images` [B, 3, H, W]: uint8 RGB, or float and normalized already.

        Raises SizeError for sides that are not stride * n + 1, DataError for other shapes or types.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"Images of shape {list(images.shape)}: a batch of RGB images, [B, 3, H, W], is wanted."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise DataError(
                f"Images of type {images.dtype}: give torch.uint8 (0..255, RGB) or floats that are "
                "normalized already."
            )
        height, width = images.shape[-2:]
        self.check_size(height, width)
        features = self.backbone(self.normalize(images))
        main = upsample(self.head(features.stage4), (height, width))
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = upsample(self.auxiliary_head(features.stage3), (height, width))
        return Output(main, auxiliary)


@dataclass(frozen=True)
class NetworkSpec:
    """What it takes to build a network again; saved beside its weights.

    Raises RecipeError, naming all faults, for values that cannot work. `class_names` and `class_colors` (RGB,
    0..255) are kept for whoever reads the predictions; empty where not known. `head_channels`, the width of the head,
    and the auxiliary head are PSPNet's; DeepLabv2 has neither. `release_classifier`: DeepLabv2 sums two branches
    instead of four, as the release does.
    """

    architecture: Architecture = "pspnet"
    backbone: str = "resnet50"
    classes: int = 19
    output_stride: int = 8
    head_channels: int = HEAD_CHANNELS
    auxiliary: bool = True
    class_names: tuple[str, ...] = ()
    class_colors: tuple[tuple[int, int, int], ...] = ()
    release_classifier: bool = False

    def __post_init__(self) -> None:
        found = []
        if self.architecture not in ARCHITECTURES:
            found.append(f"architecture {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.output_stride not in OUTPUT_STRIDES:
            found.append(f"output stride {self.output_stride}: choose 8 (finer) or 16 (faster)")
        if not 2 <= self.classes <= 255:
            found.append(f"{self.classes} classes: between 2 and 255 are needed")
        if self.head_channels < 1:
            found.append(f"{self.head_channels} head channels: at least 1 is needed (the paper has 512)")
        if self.architecture == "deeplabv2" and self.auxiliary:
            found.append("auxiliary: deeplabv2 has no auxiliary head")
        if self.architecture != "deeplabv2" and self.release_classifier:
            found.append("release_classifier: only deeplabv2's classifier differs in the release")
        for what, given in (("names", self.class_names), ("colors", self.class_colors)):
            if given and len(given) != self.classes:
                found.append(
                    f"{len(given)} class {what} for {self.classes} classes: give one for each, or none"
                )
        if found:
            raise RecipeError(faults("This network cannot be built", found))

    def build(self) -> Network:
        """The network, randomly initialized, in training mode. Raises RecipeError for unknown backbones."""
        backbone = build_backbone(self.backbone, self.output_stride)
        stage3, stage4 = backbone.channels
        if self.architecture == "deeplabv2":
            branches = RELEASE_BRANCHES if self.release_classifier else len(ATROUS_DILATIONS)
            head: nn.Module = AtrousHead(stage4, self.classes, branches)
        else:
            head = PyramidPoolingHead(stage4, self.head_channels, self.classes)
        auxiliary_head = AuxiliaryHead(stage3, self.classes) if self.auxiliary else None
        return Network(backbone, head, auxiliary_head, self.classes, self.output_stride)


def build_network(
    architecture: Architecture = "pspnet",
    backbone: str = "resnet50",
    classes: int = 19,
    output_stride: int = 8,
    head_channels: int = HEAD_CHANNELS,
    auxiliary: bool | None = None,
    release_classifier: bool = False,
) -> Network:
    """A network, randomly initialized and in training mode; the same after the same `torch.manual_seed`.

    `architecture` is `pspnet` or `deeplabv2`; `backbone` is `resnet18`, `resnet34`, `resnet50`, `resnet101`,
    `resnet50_deep`, `resnet101_deep` (the latter two with the paper's stem of three 3x3 convolutions),
    `resnet101_caffe` (DeepLabv2's) or `timm/NAME`. `auxiliary`: an auxiliary head; None: where the architecture has
    one. Raises RecipeError.

    >>> network = build_network(backbone="resnet18", classes=5, output_stride=16, head_channels=64).eval()
    >>> network(torch.zeros(1, 3, 33, 49, dtype=torch.uint8)).main.shape
    torch.Size([1, 5, 33, 49])
    """
    if auxiliary is None:
        auxiliary = architecture == "pspnet"
    return NetworkSpec(
        architecture,
        backbone,
        classes,
        output_stride,
        head_channels,
        auxiliary,
        release_classifier=release_classifier,
    ).build()


def parameter_groups(
    network: Network,
    learning_rate: float,
    head_factor: float,
    weight_decay: float,
    stage4_as_head: bool = False,
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the backbone at `learning_rate`, the heads at `head_factor` times that.

    Every trainable parameter is in exactly one. Besides `lr` and `weight_decay` a group has its `factor`, so
    that a schedule can set `lr = rate * factor`. The paper: learning rate 0.01, factor 10, decay 1e-4.
    `stage4_as_head`: a ResNet's last stage learns at the heads' rate, as in the release's DeepLabv2.
    """
    backbone, heads = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            slow = name.startswith("backbone.") and not (stage4_as_head and name.startswith(BESIDE_HEADS))
            (backbone if slow else heads).append(parameter)
    return [
        {"params": params, "lr": learning_rate * factor, "weight_decay": weight_decay, "factor": factor}
        for params, factor in ((backbone, 1.0), (heads, head_factor))
    ]
