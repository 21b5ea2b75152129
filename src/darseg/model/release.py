"""How files of released code name the parts of a network: those of DARS, semseg and UniMatch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from darseg.model.network import NetworkSpec

RELEASED = {
    "pspnet50": NetworkSpec("pspnet", "resnet50_deep"),
    "deeplabv2_101": NetworkSpec("deeplabv2", "resnet101_caffe"),
    "deeplabv3plus_resnet50": NetworkSpec("deeplabv3plus", "resnet50_deep", 21, output_stride=16),
    "deeplabv3plus_resnet101": NetworkSpec("deeplabv3plus", "resnet101_deep", 21, output_stride=16),
    "dpt_dinov2_small": NetworkSpec("dpt", "timm/vit_small_patch14_dinov2", 21),
    "dpt_dinov2_base": NetworkSpec("dpt", "timm/vit_base_patch14_dinov2", 21),
    "dpt_dinov2_large": NetworkSpec("dpt", "timm/vit_large_patch14_dinov2", 21),
}
"""The networks of released checkpoints by name; the file decides the number of classes."""

CLASSIFIERS = {
    "pspnet": "cls.4.weight",
    "deeplabv2": "layer5.conv2d_list.0.weight",
    "deeplabv3plus": "classifier.weight",
    "dpt": "head.scratch.output_conv.2.weight",
}
"""The key of the classifier in the release's layout; the tensor's first side is K."""

MARKS = {**CLASSIFIERS, "deeplabv3plus": "head.b4.gap.1.weight"}
"""A key that only this architecture has in the release's layout."""

# Prefix of a key in the release → our prefix; None: nothing in the network uses it.
_PSPNET: dict[str, str | None] = {
    r"layer0\.0": "backbone.conv1",
    r"layer0\.1": "backbone.bn1",
    r"layer0\.3": "backbone.conv2",
    r"layer0\.4": "backbone.bn2",
    r"layer0\.6": "backbone.conv3",
    r"layer0\.7": "backbone.bn3",
    r"(layer[1-4])": r"backbone.\1",
    r"ppm\.features\.(\d)\.1": r"head.branches.\1.conv",
    r"ppm\.features\.(\d)\.2": r"head.branches.\1.norm",
    r"cls\.0": "head.fuse.conv",
    r"cls\.1": "head.fuse.norm",
    r"cls\.4": "head.classifier",
    r"aux\.0": "auxiliary_head.fuse.conv",
    r"aux\.1": "auxiliary_head.fuse.norm",
    r"aux\.4": "auxiliary_head.classifier",
}
_DEEPLABV2: dict[str, str | None] = {
    r"(conv1|bn1|layer[1-4])": r"backbone.\1",
    r"layer5\.conv2d_list\.(\d)": r"head.branches.\1",
}
_DEEPLABV3PLUS: dict[str, str | None] = {
    r"backbone\.conv1\.0": "backbone.conv1",
    r"backbone\.conv1\.1": "backbone.bn1",
    r"backbone\.conv1\.3": "backbone.conv2",
    r"backbone\.conv1\.4": "backbone.bn2",
    r"backbone\.conv1\.6": "backbone.conv3",
    r"backbone\.bn1": "backbone.bn3",
    r"head\.b([0-3])\.0": r"head.branches.\1.conv",
    r"head\.b([0-3])\.1": r"head.branches.\1.norm",
    r"head\.b4\.gap\.1": "head.whole.conv",
    r"head\.b4\.gap\.2": "head.whole.norm",
    r"head\.project\.0": "head.project.conv",
    r"head\.project\.1": "head.project.norm",
    r"reduce\.0": "head.reduce.conv",
    r"reduce\.1": "head.reduce.norm",
    r"fuse\.0": "head.fuse.0.conv",
    r"fuse\.1": "head.fuse.0.norm",
    r"fuse\.3": "head.fuse.1.conv",
    r"fuse\.4": "head.fuse.1.norm",
    r"classifier": "head.classifier",
}
_DPT: dict[str, str | None] = {
    r"backbone\.mask_token": None,
    r"backbone": "backbone.body",
    r"head\.projects\.(\d)": r"head.levels.\1.0",
    r"head\.resize_layers\.(\d)": r"head.levels.\1.1",
    # Levels are numbered from 0 here; the third is not resized, so its last convolution is the second of its parts.
    r"head\.scratch\.layer1_rn": "head.levels.0.2",
    r"head\.scratch\.layer2_rn": "head.levels.1.2",
    r"head\.scratch\.layer3_rn": "head.levels.2.1",
    r"head\.scratch\.layer4_rn": "head.levels.3.2",
    r"head\.scratch\.refinenet4\.resConfUnit1": None,
    r"head\.scratch\.refinenet1\.resConfUnit1": "head.fusions.0.skip",
    r"head\.scratch\.refinenet2\.resConfUnit1": "head.fusions.1.skip",
    r"head\.scratch\.refinenet3\.resConfUnit1": "head.fusions.2.skip",
    **{
        rf"head\.scratch\.refinenet{level}\.{theirs}": f"head.fusions.{level - 1}.{ours}"
        for level in (1, 2, 3, 4)
        for theirs, ours in (("resConfUnit2", "refine"), ("out_conv", "out"))
    },
    r"head\.scratch\.output_conv\.0": "head.smooth",
    r"head\.scratch\.output_conv\.2": "head.classifier",
}
_LAYOUTS = {"pspnet": _PSPNET, "deeplabv2": _DEEPLABV2, "deeplabv3plus": _DEEPLABV3PLUS, "dpt": _DPT}


def released_architecture(keys: Iterable[str]) -> str | None:
    """The architecture in whose released layout these keys of a state dict are; None if in neither."""
    keys = set(keys)
    return next((name for name, key in MARKS.items() if key in keys), None)


def our_key(key: str, architecture: str) -> str | None:
    """Our name of a key in the release's layout; None if the release has it, but does not use it.

    Unchanged if it is not part of the network.
    """
    for theirs, ours in _LAYOUTS[architecture].items():
        match = re.match(rf"{theirs}(?=\.|$)", key)
        if match:
            return None if ours is None else match.expand(ours) + key[match.end() :]
    return key


def classes_in(tensors: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the whole network in a file, the release's or darseg's; None for a backbone."""
    architecture = released_architecture(tensors)
    names = (
        [CLASSIFIERS[architecture]] if architecture else ["head.classifier.weight", "head.branches.0.weight"]
    )
    return next((len(tensors[name]) for name in names if name in tensors and tensors[name].ndim), None)
