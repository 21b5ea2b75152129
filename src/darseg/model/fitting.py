"""How the tensors of a foreign file fit a network: where each comes from, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from darseg.model.backbone import Backbone, ResNet
from darseg.model.timm_backbones import all_keys

COUNTER = "num_batches_tracked"
"""End of the keys that files of a torch before 0.4.1 lack; nothing here needs them."""


def origin_of(key: str, backbone: Backbone, tensors: Mapping[str, Tensor]) -> str:
    """The key in the file that fills `key` of the backbone."""
    if isinstance(backbone, ResNet):
        return key
    key = key.removeprefix("body.")
    if key in tensors:
        return key
    # For some networks timm unpacks a sequence as it cuts off the classifier: stages.0.x becomes stages_0.x.
    top, _, rest = key.partition(".")
    unpacked = (f"{top[:i]}.{top[i + 1 :]}.{rest}" for i, letter in enumerate(top) if letter == "_")
    return next((candidate for candidate in unpacked if candidate in tensors), key)


def foreign_keys(unused: tuple[str, ...], backbone: Backbone, filled: Iterable[str]) -> list[str]:
    """Unused keys of a backbone's file that are not a classifier's.

    ResNet-101's weights would fill every place of a ResNet-50: only the keys left over distinguish them.
    """
    tops = {name.partition(".")[0] for name in filled}
    foreign = [key for key in unused if key.partition(".")[0] in tops]
    if foreign and not isinstance(backbone, ResNet):
        whole = all_keys(backbone.name)
        foreign = [key for key in foreign if key not in whole]
    return foreign


def misfits_of(
    expected: Mapping[str, Tensor], origin: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """A line for each key whose origin is missing, has another shape or does not hold plain numbers."""
    misfits = {}
    for key, name in origin.items():
        shape = list(expected[key].shape)
        tensor = tensors.get(name)
        if tensor is None:
            misfits[key] = f"{name}: missing, expected {shape}"
        elif list(tensor.shape) != shape:
            misfits[key] = f"{name}: has shape {list(tensor.shape)}, expected {shape}"
        elif not _is_plain(tensor) or tensor.is_floating_point() < expected[key].is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            place = f"{tensor.layout}, {tensor.device}"
            misfits[key] = f"{name}: holds {kind} ({place}), expected dense floating-point numbers on the CPU"
    return misfits


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
