"""Networks: images in, logits at the size of the images out.

Letters: B images, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from darseg.choices import Architecture
from darseg.errors import DataError, RecipeError, faults, shortened
from darseg.model.backbone import OUTPUT_STRIDES, RESNETS, Backbone, Features, ResNet
from darseg.model.dpt import DPTHead
from darseg.model.former import FormerMethods
from darseg.model.heads import (
    ATROUS_DILATIONS,
    RELEASE_BRANCHES,
    AtrousHead,
    AuxiliaryHead,
    DeepLabV3PlusHead,
    LinearHead,
    PyramidPoolingHead,
    upsample,
)
from darseg.model.sides import Sides
from darseg.model.timm_backbones import TIMM, TimmBackbone, TimmScales
from darseg.model.vit import Transformer, is_transformer

if TYPE_CHECKING:  # it folds into networks
    from darseg.model.aligned import AlignmentRecord
    from darseg.model.image_classes import ImageClasses

KINDS: dict[type, str] = {str: "text", int: "an integer", bool: "true or false"}
DILATED = ("pspnet", "deeplabv2", "deeplabv3plus")
"""Architectures on a dilated backbone; the others take a backbone's scales or tokens as they are."""
MOST_CHANNELS = 8192
"""Width of a head at most: with 2048 features of a ResNet, its convolution then has 0.3 billion weights."""
LONGEST_NAME = 200
"""Characters of a backbone's name."""

ARCHITECTURES = get_args(Architecture)
HEAD_CHANNELS = {"pspnet": 512, "deeplabv2": 512, "deeplabv3plus": 256}
"""Width of the head, as published; DeepLabv2 has none and ignores it. DPT's depends on its backbone."""


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
        sides: the image sides it takes: stride * n + 1 pixels; for networks of patches, multiples of the patch.
        mean, std: buffers of its normalization (RGB, 0..255), float32 [3].
        fill: the mean color, for padding.
        alignment: the class weights that are folded into its classifier; None: it is as it was trained.
        frozen: whether its backbone stays as it is in training (see `freeze_backbone`).
        image_classes: says for a whole image which classes are removed from its prediction; None: none are. It is saved
            with the network, but is no part of it: `forward`, training and the state dict do not know it.
    """

    mean: Tensor
    std: Tensor
    alignment: AlignmentRecord | None = None
    frozen: bool = False
    image_classes: ImageClasses | None = None

    def __init__(
        self,
        backbone: Backbone,
        head: nn.Module,
        auxiliary_head: nn.Module | None,
        *,
        classes: int,
    ) -> None:
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone = backbone
        self.head = head
        self.auxiliary_head = auxiliary_head
        self.classes = classes
        self.stride = backbone.stride
        self.sides = backbone.sides
        # Buffers are part of the state dict: a saved network keeps the normalization it was trained with.
        self.register_buffer("mean", torch.tensor(backbone.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(backbone.std, dtype=torch.float32))

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean color in whole numbers (RGB, 0..255), to pad images with."""
        red, green, blue = (round(part) for part in self.mean.tolist())
        return red, green, blue

    def freeze_backbone(self) -> None:
        """Train the heads alone.

        The backbone gets no gradients, keeps no activations, and its statistics stay.
        """
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        """As of any module, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] RGB → float (x - mean) / std. Float images are returned unchanged."""
        if images.dtype == torch.uint8:
            return (images.to(self.mean.dtype) - self.mean[:, None, None]) / self.std[:, None, None]
        return images

    def forward(self, images: Tensor, feature_masks: Sequence[Tensor] = ()) -> Output:
        """Logits of `images` [B, 3, H, W]: uint8 RGB, or floats that are normalized already.

        Args:
            feature_masks: for each of the four feature maps, float [B, C], the factors of its C channels at all places,
                before any head sees them (feature dropout as data); empty: none.

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
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(self.normalize(images))
        if feature_masks:
            features = masked(features, feature_masks)
        main = upsample(self.head(features), (height, width))
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = upsample(self.auxiliary_head(features), (height, width))
        return Output(main, auxiliary)


def masked(features: Features, masks: Sequence[Tensor]) -> Features:
    """Each feature map [B, C, h, w] times its mask [B, C], in the precision of the map."""
    pairs = zip(features, masks, strict=True)
    return Features(*(level * mask.to(level.dtype)[:, :, None, None] for level, mask in pairs))


def _is_tuple_of(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, tuple) and all(map(fits, values))


def _is_color(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else ()
    return len(parts) == 3 and all(isinstance(part, Integral) and 0 <= part <= 255 for part in parts)


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build a network again; saved with its weights.

    Attributes:
        output_stride: of a dilated backbone; transformers, and DPT on other networks of timm, ignore it.
        head_channels: width of the head; None: as published. DeepLabv2 and linear heads ignore it.
        auxiliary: whether PSPNet has an auxiliary head; None: PSPNet has one. The others have none.
        class_names, class_colors (RGB, 0..255): for readers of the predictions; empty if unknown.
        release_classifier: DeepLabv2 sums two branches instead of four, as the release does.

    Raises RecipeError, naming all faults, for values that cannot work.
    """

    architecture: Architecture = "pspnet"
    backbone: str = "resnet50"
    classes: int = 19
    output_stride: int = 8
    head_channels: int | None = field(default=None, metadata={"left_out": 512})  # by digests of settings
    auxiliary: bool | None = field(default=None, metadata={"left_out": True})
    class_names: tuple[str, ...] = ()
    class_colors: tuple[tuple[int, int, int], ...] = ()
    release_classifier: bool = False

    def __post_init__(self) -> None:
        if self.head_channels is None and isinstance(self.architecture, str):
            object.__setattr__(self, "head_channels", HEAD_CHANNELS.get(self.architecture))
        if self.auxiliary is None:
            object.__setattr__(self, "auxiliary", self.architecture == "pspnet")
        if problems := self._of_wrong_type():  # a description in a foreign file may hold anything
            raise RecipeError(faults("This network cannot be built", problems))
        if self.architecture not in ARCHITECTURES:
            problems.append(f"architecture {self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.output_stride not in OUTPUT_STRIDES:
            problems.append(f"output stride {self.output_stride}: choose 8 (finer) or 16 (faster)")
        if not 2 <= self.classes <= 255:
            problems.append(f"the number of classes is {shortened(self.classes)}; expected 2 to 255")
        if self.head_channels is not None and not 1 <= self.head_channels <= MOST_CHANNELS:
            problems.append(
                f"{shortened(self.head_channels)} head channels: 1 to {MOST_CHANNELS} are possible (the paper has 512)"
            )
        if self.architecture != "pspnet" and self.auxiliary:
            problems.append(f"auxiliary: {self.architecture} has no auxiliary head")
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
            if (
                not (name == "head_channels" and self.head_channels is None)
                and not isinstance(getattr(self, name), Integral if kind is int else kind)
            )
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
        """The image sides that the network takes. Raises RecipeError for unknown backbones."""
        return _sides(self.architecture, self.backbone, self.output_stride)

    def build(self, drop_path: float = 0.0) -> Network:
        """The network, randomly initialized, in training mode. Raises RecipeError for unknown backbones.

        Args:
            drop_path: stochastic depth of a backbone of timm: the share of the last block's calls that are left out in
                training; earlier blocks less.
        """
        backbone = build_backbone(
            self.backbone, self.architecture, output_stride=self.output_stride, drop_path=drop_path
        )
        first, _, third, last = backbone.channels
        match self.architecture:
            case "pspnet":
                head: nn.Module = PyramidPoolingHead(last, self.head_channels or 1, self.classes)
            case "deeplabv2":
                branches = RELEASE_BRANCHES if self.release_classifier else len(ATROUS_DILATIONS)
                head = AtrousHead(last, self.classes, branches)
            case "deeplabv3plus":
                width, stride = self.head_channels or 1, self.output_stride
                head = DeepLabV3PlusHead(first, last, width, classes=self.classes, output_stride=stride)
            case "dpt":
                tokens = isinstance(backbone, Transformer)
                head = DPTHead(backbone.channels, self.head_channels, self.classes, tokens=tokens)
            case "linear":
                head = LinearHead(last, self.classes)
        auxiliary_head = AuxiliaryHead(third, self.classes) if self.auxiliary else None
        return Network(backbone, head, auxiliary_head, classes=self.classes)


def build_backbone(
    name: str, architecture: Architecture, *, output_stride: int = 8, drop_path: float = 0.0
) -> Backbone:
    """The backbone `name` as an architecture wants it, randomly initialized. Raises RecipeError."""
    if name not in RESNETS and not name.startswith(TIMM):
        raise RecipeError(
            f"There is no backbone {name!r}. Choose one of {', '.join(RESNETS)}, or {TIMM}NAME for a network of timm."
        )
    if name in RESNETS:
        if architecture == "dpt":
            raise RecipeError(
                f"dpt takes backbones of timm, and {name} is darseg's own. Choose {TIMM}resnet50 or another of timm."
            )
        if drop_path:
            raise RecipeError(f"{name} has no stochastic depth (drop_path). Choose a backbone of timm, or 0.")
        return ResNet(name, RESNETS[name], output_stride, dilate_first=architecture != "deeplabv3plus")
    if architecture not in DILATED and is_transformer(name):
        return Transformer(name, drop_path)
    if architecture == "dpt":
        return TimmScales(name, drop_path)
    try:
        return TimmBackbone(name, output_stride, drop_path)
    except RecipeError:
        if not is_transformer(name):
            raise
        raise RecipeError(
            f"{name} is a plain transformer, which cannot be dilated, so {architecture} does not work on it. Choose "
            "network.architecture dpt, or linear."
        ) from None


@lru_cache
def _sides(architecture: Architecture, backbone: str, output_stride: int) -> Sides:
    if architecture in DILATED or backbone in RESNETS:
        return Sides(output_stride)
    with torch.device("meta"):  # no memory, no random numbers drawn
        return build_backbone(backbone, architecture, output_stride=output_stride).sides


def build_network(
    architecture: Architecture = "pspnet",
    backbone: str = "resnet50",
    classes: int = 19,
    output_stride: int = 8,
    head_channels: int | None = None,
    auxiliary: bool | None = None,
    release_classifier: bool = False,
) -> Network:
    """A network, randomly initialized and in training mode; the same after the same `torch.manual_seed`.

    Args:
        architecture: `pspnet`, `deeplabv2`, `deeplabv3plus`, `dpt` or `linear`.
        backbone: `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet50_deep`, `resnet101_deep` (these two with the
            paper's stem of three 3x3 convolutions), `resnet101_caffe` (DeepLabv2's) or `timm/NAME`. `dpt` takes
            backbones of timm; plain transformers (DINOv2, DINOv3, …) go with `dpt` and `linear`.
        head_channels: width of the head; None: as published.
        auxiliary: whether it has an auxiliary head; None: if the architecture has one.

    Raises RecipeError.

    >>> network = build_network(backbone="resnet18", classes=5, output_stride=16, head_channels=64).eval()
    >>> network(torch.zeros(1, 3, 33, 49, dtype=torch.uint8)).main.shape
    torch.Size([1, 5, 33, 49])
    """
    return NetworkSpec(
        architecture,
        backbone,
        classes,
        output_stride=output_stride,
        head_channels=head_channels,
        auxiliary=auxiliary,
        release_classifier=release_classifier,
    ).build()
