"""Networks: images in, logits at the size of the images out.

Letters: B images, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from darseg.choices import Architecture
from darseg.errors import DataError, RecipeError, faults, shortened
from darseg.model.backbone import OUTPUT_STRIDES, Backbone, build_backbone
from darseg.model.former import FormerMethods
from darseg.model.heads import (
    ATROUS_DILATIONS,
    RELEASE_BRANCHES,
    AtrousHead,
    AuxiliaryHead,
    PyramidPoolingHead,
    upsample,
)
from darseg.model.sides import Sides

if TYPE_CHECKING:  # it folds into networks
    from darseg.model.aligned import AlignmentRecord

KINDS: dict[type, str] = {str: "text", int: "an integer", bool: "true or false"}
MOST_CHANNELS = 8192
"""Width of a head at most: with 2048 features of a ResNet, its convolution then has 0.3 billion weights."""
LONGEST_NAME = 200
"""Characters of a backbone's name."""

ARCHITECTURES = get_args(Architecture)
HEAD_CHANNELS = 512
"""Width of PSPNet's last 3x3 convolution, as published."""


class Output(NamedTuple):
    """Logits (not probabilities) at the size of the images."""

    main: Tensor
    """[B, K, H, W]"""
    auxiliary: Tensor | None
    """[B, K, H, W] in training; None in eval mode and for networks without an auxiliary head."""


class Network(FormerMethods, nn.Module):
    """A segmentation network that knows which images it takes.

    Attributes:
        classes: K.
        stride: pixels of the image per pixel of the last feature map, along one side.
        sides: the image sides it takes: stride * n + 1 pixels.
        mean, std: buffers of its normalization (RGB, 0..255), float32 [3].
        fill: the mean color, for padding.
        alignment: the class weights that are folded into its classifier; None: it is as it was trained.
    """

    mean: Tensor
    std: Tensor
    alignment: AlignmentRecord | None = None

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        auxiliary_head: nn.Module | None,
        *,
        classes: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.auxiliary_head = auxiliary_head
        self.classes = classes
        self.stride = stride
        self.sides = Sides(stride)
        # Buffers are part of the state dict: a saved network keeps the normalization it was trained with.
        self.register_buffer("mean", torch.tensor(backbone.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(backbone.std, dtype=torch.float32))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean color in whole numbers (RGB, 0..255), to pad images with."""
        red, green, blue = (round(part) for part in self.mean.tolist())
        return red, green, blue

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] RGB → float (x - mean) / std. Float images are returned unchanged."""
        if images.dtype == torch.uint8:
            return (images.to(self.mean.dtype) - self.mean[:, None, None]) / self.std[:, None, None]
        return images

    def forward(self, images: Tensor) -> Output:
        """Logits of `images` [B, 3, H, W]: uint8 RGB, or floats that are normalized already.

        Raises SizeError for sides the network does not take, DataError for other shapes or types.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"The images have shape {list(images.shape)}. The network takes batches of RGB images, [B, 3, H, W]."
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise DataError(
                f"The images are {images.dtype}. The network takes torch.uint8 (0..255, RGB), or floats that are "
                "normalized already."
            )
        height, width = images.shape[-2:]
        self.sides.check(height, width)
        features = self.backbone(self.normalize(images))
        main = upsample(self.head(features.stage4), (height, width))
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = upsample(self.auxiliary_head(features.stage3), (height, width))
        return Output(main, auxiliary)


def _is_tuple_of(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(map(fits, values))


def _is_color(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else ()
    return len(parts) == 3 and all(isinstance(part, Integral) and 0 <= part <= 255 for part in parts)


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build a network again; saved with its weights.

    Attributes:
        head_channels: width of PSPNet's head; DeepLabv2 ignores it.
        auxiliary: whether PSPNet has an auxiliary head; DeepLabv2 has none.
        class_names, class_colors (RGB, 0..255): for readers of the predictions; empty if unknown.
        release_classifier: DeepLabv2 sums two branches instead of four, as the release does.

    Raises RecipeError, naming all faults, for values that cannot work.
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
        if problems := self._of_wrong_type():  # a description in a foreign file may hold anything
            raise RecipeError(faults("This network cannot be built", problems))
        if self.architecture not in ARCHITECTURES:
            problems.append(f"architecture {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.output_stride not in OUTPUT_STRIDES:
            problems.append(f"output stride {self.output_stride}: choose 8 (finer) or 16 (faster)")
        if not 2 <= self.classes <= 255:
            problems.append(f"the number of classes is {shortened(self.classes)}; expected 2 to 255")
        if not 1 <= self.head_channels <= MOST_CHANNELS:
            problems.append(
                f"{shortened(self.head_channels)} head channels: 1 to {MOST_CHANNELS} are possible (the paper has 512)"
            )
        if self.architecture == "deeplabv2" and self.auxiliary:
            problems.append("auxiliary: deeplabv2 has no auxiliary head")
        if self.architecture != "deeplabv2" and self.release_classifier:
            problems.append("release_classifier: only deeplabv2's classifier differs in the release")
        for kind, values in (("names", self.class_names), ("colors", self.class_colors)):
            if values and self.classes <= 255 and len(values) != self.classes:
                problems.append(
                    f"the number of class {kind} is {len(values)}; expected {self.classes}, one for each class, or none"
                )
        if problems:
            raise RecipeError(faults("This network cannot be built", problems))

    def _of_wrong_type(self) -> list[str]:
        """A line for each value that is of another type than its field, or of no sensible size."""
        types: dict[str, type] = {"architecture": str, "backbone": str, "classes": int, "output_stride": int}
        types |= {"head_channels": int, "auxiliary": bool, "release_classifier": bool}
        lines = [
            f"{name} is {shortened(getattr(self, name))}; expected {KINDS[kind]}"
            for name, kind in types.items()
            if not isinstance(getattr(self, name), Integral if kind is int else kind)
            or (kind is int and isinstance(getattr(self, name), bool))
        ]
        if type(self.backbone) is str and len(self.backbone) > LONGEST_NAME:
            lines.append(
                f"the name of the backbone has {len(self.backbone)} characters; expected at most {LONGEST_NAME}"
            )
        if not _is_tuple_of(self.class_names, lambda name: type(name) is str):
            lines.append(f"the class names are {shortened(self.class_names)}; expected strings")
        if not _is_tuple_of(self.class_colors, _is_color):
            lines.append(
                f"the class colors are {shortened(self.class_colors)}; expected (red, green, blue) from 0 to 255"
            )
        return lines

    @property
    def sides(self) -> Sides:
        """The image sides that the network takes."""
        return Sides(self.output_stride)

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
        return Network(backbone, head, auxiliary_head, classes=self.classes, stride=self.output_stride)


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

    Args:
        architecture: `pspnet` or `deeplabv2`.
        backbone: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet50_deep`, `resnet101_deep` (these two with the
            paper's stem of three 3x3 convolutions), `resnet101_caffe` (DeepLabv2's) or `timm/NAME`.
        auxiliary: whether it has an auxiliary head; None: if the architecture has one.

    Raises RecipeError.

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
        output_stride=output_stride,
        head_channels=head_channels,
        auxiliary=auxiliary,
        release_classifier=release_classifier,
    ).build()
