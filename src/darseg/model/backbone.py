"""Backbones: dilated ResNets, and any network of timm behind the same contract.

A backbone turns normalized images, float [B, 3, H, W], into `Features`. Its attributes are its `name`, the `channels` of
its two feature maps, and the `mean` and `std` (RGB, 0..255) that its weights expect.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darseg.errors import RecipeError
from darseg.model.convolutions import exchange_convolutions

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)
"""Mean and standard deviation of ImageNet's images (RGB, 0..255), as torchvision's weights expect."""

OUTPUT_STRIDES = (8, 16)
"""Pixels of the image per pixel of the last feature map, along one side."""

TIMM = "timm/"
"""Prefix of backbones that timm builds, as in `timm/tf_efficientnet_lite0`."""


class Features(NamedTuple):
    """The feature maps that heads take; h = ceil(H / output stride), and w likewise."""

    stage3: Tensor
    """[B, channels[0], h3, w3]: input of the auxiliary head. Its sides are h and w; for some timm backbones with output
    stride 16 they are larger."""
    stage4: Tensor
    """[B, channels[1], h, w]: input of the main head."""


def _conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (ResNet-50 and -101); the stride is on the 3x3."""

    expansion = 4
    stride_on_first = False

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        stride1, stride2 = (stride, 1) if self.stride_on_first else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride=stride2, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


class CaffeBottleneck(Bottleneck):
    """A bottleneck with the stride on its first 1x1 convolution, as in Caffe's ResNets and DeepLabv2."""

    stride_on_first = True


class ResNetPlan(NamedTuple):
    """What distinguishes one ResNet from another."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    deep_stem: bool = False
    width: int = 64
    """Channels of stage 1 (before a block's expansion); each stage has twice as many as the one before."""
    deeplab: bool = False
    """Follow DeepLabv2: max-pooling rounds sizes up, and BatchNorm's scale and shift are not trained."""


RESNETS = {
    "resnet18": ResNetPlan(BasicBlock, (2, 2, 2, 2)),
    "resnet34": ResNetPlan(BasicBlock, (3, 4, 6, 3)),
    "resnet18_half": ResNetPlan(BasicBlock, (2, 2, 2, 2), width=32),
    "resnet50": ResNetPlan(Bottleneck, (3, 4, 6, 3)),
    "resnet101": ResNetPlan(Bottleneck, (3, 4, 23, 3)),
    "resnet50_deep": ResNetPlan(Bottleneck, (3, 4, 6, 3), deep_stem=True),
    "resnet101_deep": ResNetPlan(Bottleneck, (3, 4, 23, 3), deep_stem=True),
    "resnet101_caffe": ResNetPlan(CaffeBottleneck, (3, 4, 23, 3), deeplab=True),
}


class ResNet(nn.Module):
    """A ResNet whose last stages are dilated instead of strided (as in "PyTorch Semantic Segmentation").

    With output stride 8, every 3x3 convolution of stage 3 has dilation 2 and of stage 4 dilation 4, including the first
    block of a stage. With output stride 16, stage 4 has dilation 2. Parameters are named as in torchvision; with the deep
    stem (three 3x3 convolutions instead of one 7x7) as in semseg. In a DeepLab plan BatchNorm's scale and shift are
    frozen; its running statistics still change.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, name: str, plan: ResNetPlan, output_stride: int) -> None:
        super().__init__()
        self.name = name
        self.deep_stem = plan.deep_stem
        width = plan.width
        self.channels = (4 * width * plan.block.expansion, 8 * width * plan.block.expansion)
        if plan.deep_stem:
            self.conv1 = _conv3x3(3, width, stride=2)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = _conv3x3(width, width)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = _conv3x3(width, 2 * width)
            self.bn3 = nn.BatchNorm2d(2 * width)
        else:
            self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=plan.deeplab)
        stride3, dilation3, stride4, dilation4 = (1, 2, 1, 4) if output_stride == 8 else (2, 1, 1, 2)
        inputs = 2 * width if plan.deep_stem else width

        def stage(width: int, depth: int, *, stride: int, dilation: int) -> nn.Sequential:
            nonlocal inputs
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(plan.block(inputs, width, stride if index == 0 else 1, dilation))
                inputs = width * plan.block.expansion
            return nn.Sequential(*blocks)

        self.layer1 = stage(width, plan.depths[0], stride=1, dilation=1)
        self.layer2 = stage(2 * width, plan.depths[1], stride=2, dilation=1)
        self.layer3 = stage(4 * width, plan.depths[2], stride=stride3, dilation=dilation3)
        self.layer4 = stage(8 * width, plan.depths[3], stride=stride4, dilation=dilation4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and plan.deeplab:
                module.requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        x = self.relu(self.bn1(self.conv1(images)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        x = self.layer2(self.layer1(self.maxpool(x)))
        stage3 = self.layer3(x)
        return Features(stage3, self.layer4(stage3))


class TimmBackbone(nn.Module):
    """A network of timm, without its classifier; `Features` are its last two feature maps.

    Mean and standard deviation are those of timm's configuration of the network.
    Raises RecipeError if timm cannot be imported, does not know `name`, or cannot build it with this output stride.
    """

    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        self.name = name
        model = name.removeprefix(TIMM)
        timm = import_timm(name)
        if not timm.is_model(model):
            near = timm.list_models(f"*{model.split('.')[0]}*")[:5]
            raise RecipeError(
                f"timm {timm.__version__} has no network {model!r}. "
                + (f"Similar names are {', '.join(near)}. " if near else "")
                + "See timm.list_models() for all names."
            )
        try:
            self.body = timm.create_model(
                model, features_only=True, output_stride=output_stride, pretrained=False
            )
        except (
            Exception
        ) as error:  # timm's networks refuse with assertions, TypeError, NotImplementedError, …
            raise _refused(name, output_stride, f"{type(error).__name__}: {error}") from error
        reductions = self.body.feature_info.reduction()
        if len(reductions) < 2 or reductions[-1] != output_stride:
            raise _refused(name, output_stride, f"its feature maps have strides {reductions}")
        stage3, stage4 = self.body.feature_info.channels()[-2:]
        self.channels = (stage3, stage4)
        self.mean = _in_255(self.body.pretrained_cfg["mean"])
        self.std = _in_255(self.body.pretrained_cfg["std"])
        exchange_convolutions(self.body, timm)

    def forward(self, images: Tensor) -> Features:
        return Features(*self.body(images)[-2:])

    def all_keys(self) -> frozenset[str]:
        """Keys of the state dict of the whole network, the classifier included."""
        timm = import_timm(self.name)
        with torch.device("meta"):  # names only: no memory, no random numbers drawn
            return frozenset(timm.create_model(self.name.removeprefix(TIMM), pretrained=False).state_dict())


Backbone = ResNet | TimmBackbone


def build_backbone(name: str, output_stride: int) -> Backbone:
    """The backbone `name`, randomly initialized; `output_stride` is 8 or 16. Raises RecipeError."""
    if name in RESNETS:
        return ResNet(name, RESNETS[name], output_stride)
    if name.startswith(TIMM):
        return TimmBackbone(name, output_stride)
    raise RecipeError(
        f"There is no backbone {name!r}. Choose one of {', '.join(RESNETS)}, or {TIMM}NAME for a network of timm."
    )


def import_timm(wanted_by: str) -> ModuleType:
    """The module timm. Raises RecipeError, which says how to install it, if it cannot be imported."""
    try:
        with warnings.catch_warnings():
            # torchvision's image extension, which nothing here uses, is missing with CPU builds of torch.
            warnings.filterwarnings("ignore", "Failed to load image Python extension")
            return importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision built for another torch fails with a RuntimeError or OSError, not an ImportError.
        raise RecipeError(
            f"The backbone {wanted_by} needs timm, which cannot be imported here ({type(error).__name__}: {error}). "
            'Install it with: pip install "darseg[timm]". If it is installed already, its torchvision does not fit this '
            f"torch: reinstall the two together. Backbones without timm are {', '.join(RESNETS)}."
        ) from error


def _refused(name: str, output_stride: int, reason: str) -> RecipeError:
    other_stride = 16 if output_stride == 8 else 8
    return RecipeError(
        f"{name} cannot be built with output stride {output_stride} ({reason}). Try output stride {other_stride}, or a "
        "network that timm can dilate, such as timm/resnet50, timm/mobilenetv3_large_100 or timm/tf_efficientnet_lite0."
    )


def _in_255(parts: tuple[float, ...]) -> RGB:
    red, green, blue = (255 * float(part) for part in parts)
    return red, green, blue
