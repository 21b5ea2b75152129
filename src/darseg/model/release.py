"""How files of the original release (and of semseg, on which it builds) name the parts of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from darseg.model.network import NetworkSpec

RELEASED = {
    "pspnet50": NetworkSpec("pspnet", "resnet50_deep"),
    "deeplabv2_101": NetworkSpec("deeplabv2", "resnet101_caffe", auxiliary=False),
}
"""The networks of the release by name; the file decides the number of classes."""

CLASSIFIERS = {"pspnet": "cls.4.weight", "deeplabv2": "layer5.conv2d_list.0.weight"}
"""A key that only this architecture has in the release's layout; the tensor's first side is K."""

# Prefix of a key in the release's sequences → our prefix.
_PSPNET = {
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
_DEEPLABV2 = {
    r"(conv1|bn1|layer[1-4])": r"backbone.\1",
    r"layer5\.conv2d_list\.(\d)": r"head.branches.\1",
}
_LAYOUTS = {"pspnet": _PSPNET, "deeplabv2": _DEEPLABV2}


def released_architecture(keys: Iterable[str]) -> str | None:
    """The architecture in whose released layout these keys of a state dict are; None if in neither."""
    keys = set(keys)
    return next((name for name, key in CLASSIFIERS.items() if key in keys), None)


def our_key(key: str, architecture: str) -> str:
    """Our name of a key in the release's layout; unchanged if it is not part of the network."""
    for theirs, ours in _LAYOUTS[architecture].items():
        match = re.match(rf"{theirs}(?=\.)", key)
        if match:
            return match.expand(ours) + key[match.end() :]
    return key


def classes_in(tensors: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the whole network in a file, the release's or darseg's; None for a backbone."""
    names = (*CLASSIFIERS.values(), "head.classifier.weight", "head.branches.0.weight")
    return next((len(tensors[name]) for name in names if name in tensors and tensors[name].ndim), None)
