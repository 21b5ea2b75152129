"""Backbones: dilated ResNets, and the contract that all backbones fulfill.

A backbone turns normalized images, float [B, 3, H, W], into `Features`. Its attributes are its `name`, the `channels` of
its four feature maps, its `stride` (pixels of the image per pixel of the last map), the `sides` of images that it takes,
and the `mean` and `std` (RGB, 0..255) that its weights expect.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from darseg.model.sides import Sides

RGB = tuple[float, float, float]

IMAGENET_MEAN: RGB = (123.675, 116.28, 103.53)
IMAGENET_STD: RGB = (58.395, 57.12, 57.375)
"""Mean and standard deviation of ImageNet's images (RGB, 0..255), as torchvision's weights expect."""

OUTPUT_STRIDES = (8, 16)
"""Pixels of the image per pixel of the last feature map, along one side."""

UNDILATED = 32
"""Output stride of a ResNet as it was published, for classifiers of whole images."""

STRIDES_AND_DILATIONS = {8: (1, 2, 1, 4), 16: (2, 1, 1, 2), UNDILATED: (2, 1, 2, 1)}
"""Output stride → stride and dilation of stage 3, then of stage 4."""


class Features(NamedTuple):
    """The four feature maps that heads take, float [B, channels[i], h_i, w_i], from early to late.

    Of a dilated network h4 = ceil(H / output stride), and the sides of stage 1 are a quarter of the image's. Of a plain
    transformer all four have one place for each patch.
    """

    stage1: Tensor
    stage2: Tensor
    stage3: Tensor
    stage4: Tensor


class Backbone(Protocol):
    """What every backbone is, besides a module."""

    name: str
    channels: tuple[int, int, int, int]
    stride: int
    sides: Sides
    mean: RGB
    std: RGB

    def __call__(self, images: Tensor) -> Features: ...


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
    block of a stage. With output stride 16, stage 4 has dilation 2; with 32 nothing is dilated.
    Parameters are named as in torchvision; with the deep stem (three 3x3 convolutions instead of one 7x7) as in semseg.
    In a DeepLab plan BatchNorm's scale and shift are frozen; its running statistics still change.

    Args:
        dilate_first: False: the first block of a dilated stage keeps the dilation of the stage before it, as in
            torchvision, and so in most DeepLabv3+ networks.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, name: str, plan: ResNetPlan, output_stride: int, dilate_first: bool = True) -> None:
        super().__init__()
        self.name = name
        self.stride = output_stride
        self.sides = Sides(output_stride)
        self.deep_stem = plan.deep_stem
        width = plan.width
        expanded = width * plan.block.expansion
        self.channels = (expanded, 2 * expanded, 4 * expanded, 8 * expanded)
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
        stride3, dilation3, stride4, dilation4 = STRIDES_AND_DILATIONS[output_stride]
        inputs = 2 * width if plan.deep_stem else width
        before = 1

        def stage(width: int, depth: int, *, stride: int, dilation: int) -> nn.Sequential:
            nonlocal inputs, before
            blocks: list[nn.Module] = []
            for index in range(depth):
                own = before if index == 0 and not dilate_first else dilation
                blocks.append(plan.block(inputs, width, stride if index == 0 else 1, own))
                inputs = width * plan.block.expansion
            before = dilation
            return nn.Sequential(*blocks)

        self.layer1 = stage(width, plan.depths[0], stride=1, dilation=1)
        self.layer2 = stage(2 * width, plan.depths[1], stride=2, dilation=1)
        self.layer3 = stage(4 * width, plan.depths[2], stride=stride3, dilation=dilation3)
        self.layer4 = stage(8 * width, plan.depths[3], stride=stride4, dilation=dilation4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if not module.weight.is_meta:  # where PyTorch takes milliseconds to draw nothing
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d) and plan.deeplab:
                module.requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        x = self.relu(self.bn1(self.conv1(images)))
        if self.deep_stem:
            x = self.relu(self.bn2(self.conv2(x)))
            x = self.relu(self.bn3(self.conv3(x)))
        stage1 = self.layer1(self.maxpool(x))
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        return Features(stage1, stage2, stage3=stage3, stage4=self.layer4(stage3))
