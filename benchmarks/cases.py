"""The networks and images that benchmarks/gpu.py measures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from darseg.model.network import NetworkSpec
from darseg.training.optimize import SGD, AdamW

SETS = {
    "street": ((1024, 2048), ".png", 19, 16),
    "photo": ((375, 500), ".jpg", 19, 32),
    "steel": ((200, 200), ".png", 4, 256),
}
"""Height and width, file format, classes and number of the drawn images: as Cityscapes, Pascal VOC and NEU-Seg are."""

TINY_SETS = {
    "street": ((96, 160), ".png", 19, 4),
    "photo": ((75, 100), ".jpg", 19, 4),
    "steel": ((65, 65), ".png", 4, 6),
}


@dataclass(frozen=True)
class Case:
    """A network, its crops and its images.

    Attributes:
        batch: labeled images of a step, and as many pseudo-labeled ones.
        scale: of the augmentation.
        window: of labeling; a legal side.
    """

    name: str
    spec: NetworkSpec
    crop: int
    scale: tuple[float, float]
    data: str
    batch: int = 8
    optimizer: SGD | AdamW = field(default_factory=SGD)
    window: int = 0


def _pspnet50(crop: int, scale: tuple[float, float]) -> Case:
    spec = NetworkSpec(backbone="resnet50_deep", classes=19)
    return Case(f"PSPNet-50, {crop}", spec, crop, scale, "street", window=crop)


def _dinov2(size: str, name: str) -> Case:
    spec = NetworkSpec("dpt", f"timm/vit_{name}_patch14_dinov2", classes=19)
    return Case(f"DINOv2-{size} + DPT, 518", spec, 518, (0.5, 2.0), "photo", batch=4, optimizer=AdamW())


LARGE = _pspnet50(713, (0.5, 2.0))
SMALL = Case(  # recipes/neu_seg_48.yaml
    "EfficientNet-Lite0 PSPNet, 193",
    NetworkSpec(backbone="timm/tf_efficientnet_lite0", classes=4, output_stride=16, head_channels=128),
    crop=193,
    scale=(0.5, 1.5),
    data="steel",
    window=209,
)
OTHERS = (
    _pspnet50(361, (0.25, 1.0)),
    _dinov2("S", "small"),
    Case(
        "DeepLabv2-101, 361",
        NetworkSpec("deeplabv2", "resnet101_caffe", classes=19),
        crop=361,
        scale=(0.25, 1.0),
        data="street",
    ),
    Case(
        "DeepLabv3+-50, 513",
        NetworkSpec("deeplabv3plus", "resnet50", classes=19, output_stride=16),
        crop=513,
        scale=(0.5, 2.0),
        data="photo",
    ),
    _dinov2("B", "base"),
)


def tiny(case: Case) -> Case:
    """The same architecture on a backbone that timm has for tests, with small crops."""
    dense = case.spec.architecture == "dpt"
    width = None if case.spec.architecture == "deeplabv2" else 16
    backbone = "timm/test_vit" if dense else "timm/test_efficientnet"
    spec = replace(case.spec, backbone=backbone, output_stride=8 if dense else 16, head_channels=width)
    return replace(case, spec=spec, crop=48 if dense else 49, batch=2, window=65)
