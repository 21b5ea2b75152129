"""Plain vision transformers as backbones: DINOv2, DINOv3, and those of ImageNet, all built by timm.

A transformer has one token for each patch of the image. The tokens after four of its blocks are its feature maps.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from darseg.errors import RecipeError
from darseg.model.backbone import Features
from darseg.model.sides import Sides
from darseg.model.timm_backbones import create_body, in_255

BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
"""Number of blocks → those whose tokens the head takes (DINOv2's and UniMatch V2's DPT). Others: evenly."""

CLASSIFIER_PARTS = {"attn_pool", "fc_norm", "head"}
"""Parts of a transformer that only its classifier uses."""

POSITION_OFFSET = 0.1
"""DINOv2 adds this to the number of patches along a side when it resizes its position embeddings."""

MOST_TOKENS_BESIDES = 16
"""Class tokens and registers that a transformer may have, at most."""

CUBIC = -0.75
"""Coefficient of PyTorch's bicubic interpolation."""


class Transformer(nn.Module):
    """A plain vision transformer of timm; `Features` are maps of the tokens after four blocks.

    The tokens are normalized. The class token and registers take part in attention and are left out of the maps.
    Position embeddings are resized to the image's patches: DINOv2's without registers as its authors do, all others
    as timm does. Raises RecipeError if timm cannot be imported, does not know `name`, or cannot build it for images
    of any size.

    Args:
        drop_path: stochastic depth: the share of the last block's calls that are left out in training; earlier blocks
            less, down to 0 for the first.
    """

    def __init__(self, name: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.name = name
        self.body = _create(name, drop_path_rate=drop_path)
        if isinstance(self.body.norm, nn.Identity) and hasattr(self.body, "fc_norm"):
            self.body.norm = self.body.fc_norm  # networks that average tokens normalize the average instead
        for part in CLASSIFIER_PARTS & self.body._modules.keys():
            setattr(self.body, part, nn.Identity())
        height, width = self.body.patch_embed.patch_size
        if height != width:
            raise RecipeError(f"{name} has patches of {height} x {width} pixels; only square ones work.")
        self.stride = int(height)
        self.sides = Sides(self.stride, offset=0)
        depth = len(self.body.blocks)
        self.blocks = list(BLOCKS.get(depth) or ((k * depth) // 4 - 1 for k in (1, 2, 3, 4)))
        self.channels = (self.body.embed_dim,) * 4
        self.mean = in_255(self.body.pretrained_cfg["mean"])
        self.std = in_255(self.body.pretrained_cfg["std"])
        if "dinov2" in name and self.body.reg_token is None:
            self.body._pos_embed = partial(_embed_positions, self.body)

    def forward(self, images: Tensor) -> Features:
        return Features(
            *self.body.forward_intermediates(images, self.blocks, norm=True, intermediates_only=True)
        )


# Key in a file of Hugging Face's transformers → DINOv2's own.
_HUGGING_FACE = {
    r"(?:dinov2\.)?embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
    r"(?:dinov2\.)?embeddings\.position_embeddings": "pos_embed",
    r"(?:dinov2\.)?embeddings\.patch_embeddings\.projection\.(.+)": r"patch_embed.proj.\1",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)": r"blocks.\1.attn.proj.\2",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(.+)": r"blocks.\1.attn.\2.\3",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.mlp\.weights_in\.(.+)": r"blocks.\1.mlp.w12.\2",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.mlp\.weights_out\.(.+)": r"blocks.\1.mlp.w3.\2",
    r"(?:dinov2\.)?encoder\.layer\.(\d+)\.(.+)": r"blocks.\1.\2",
    r"(?:dinov2\.)?layernorm\.(.+)": r"norm.\1",
}


def as_timm(transformer: Transformer, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights of a transformer as timm names them, and a sentence if positions were resized.

    Args:
        tensors: as timm or the authors name them; those of DINOv2 also as Hugging Face's transformers do.
    """
    tensors = dict(tensors)
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        tensors = _from_hugging_face(tensors)
    # timm reads the files of a network's authors with a function beside the network.
    module = sys.modules[type(transformer.body).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None)
    if translate is None:
        return tensors, ""
    before = tensors.get("pos_embed")
    translated = translate(dict(tensors), transformer.body)
    if "norm.weight" not in translated:
        translated = {re.sub(r"^fc_norm\.", "norm.", key): value for key, value in translated.items()}
    after = translated.get("pos_embed")
    # Class and register tokens may have positions of their own; only another grid is a resizing.
    if before is None or after is None or abs(before.shape[1] - after.shape[1]) <= MOST_TOKENS_BESIDES:
        return translated, ""
    return translated, f"its {before.shape[1]:,} position embeddings were resized to {after.shape[1]:,}"


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        matches = ((re.fullmatch(theirs, key), ours) for theirs, ours in _HUGGING_FACE.items())
        named[next((match.expand(ours) for match, ours in matches if match), key)] = tensor
    for key in [key for key in named if ".attn.query." in key]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in named for part in parts):
            named[key.replace(".query.", ".qkv.")] = torch.cat([named.pop(part) for part in parts])
    return named


@lru_cache
def is_transformer(name: str) -> bool:
    """Whether a network of timm ("timm/…") is a plain transformer: patches and blocks, no stages.

    Raises RecipeError if timm does not know it.
    """
    with torch.device("meta"):  # no memory, no random numbers drawn
        body = create_body(name)
    blocks = getattr(body, "blocks", None)
    return (
        hasattr(body, "patch_embed")
        and not hasattr(body.patch_embed, "backbone")  # a CNN before the blocks
        and isinstance(blocks, (nn.Sequential, nn.ModuleList))
        and all(hasattr(block, "attn") for block in blocks)
    )


def _create(name: str, **how: Any) -> Any:
    how = {key: value for key, value in how.items() if value}
    try:
        body = create_body(name, num_classes=0, dynamic_img_size=True, **how)
        if not hasattr(body, "forward_intermediates") or not hasattr(body.patch_embed, "patch_size"):
            raise TypeError("it gives no tokens after single blocks")
    except RecipeError:
        raise
    except Exception as error:  # timm refuses with assertions, TypeError, …
        raise RecipeError(
            f"{name} cannot be built for images of any size ({type(error).__name__}: {error}). Choose another "
            "transformer, such as timm/vit_small_patch14_dinov2."
        ) from error
    return body


def _embed_positions(body: Any, patches: Tensor) -> Tensor:
    """Class token and patches [B, h, w, C] with their positions, [B, 1 + h * w, C], as DINOv2 has them."""
    height, width = patches.shape[1:3]
    positions = body.pos_embed
    side = math.isqrt(positions.shape[1] - 1)
    grid = positions[0, 1:].reshape(side, side, -1)
    # Sides as tensors: a condition on the size of the image could not be exported.
    sides = [torch.scalar_tensor(value, dtype=torch.float64) for value in (height, width)]
    offset = torch.where((sides[0] == side) & (sides[1] == side), 0.0, POSITION_OFFSET)
    rows = resizing(side, height, scale=(sides[0] + offset) / side, like=grid)
    columns = resizing(side, width, scale=(sides[1] + offset) / side, like=grid)
    grid = torch.einsum("hi,ijc,wj->hwc", rows, grid, columns)
    tokens = (patches + grid).flatten(1, 2)
    first = (body.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
    return body.pos_drop(torch.cat([first, tokens], dim=1))


def resizing(before: int, after: int, scale: Tensor, *, like: Tensor) -> Tensor:
    """Weights [after, before] that resize one side bicubically, as PyTorch does with a scale factor.

    With scale 1 they are the identity. A matrix, because exporters cannot write an interpolation whose scale depends on
    the image.
    """
    at = ((torch.arange(after, dtype=torch.float64) + 0.5) / scale - 0.5).to(torch.float32)
    first = at.floor()
    weights = torch.zeros(after, before)
    for neighbor in (-1, 0, 1, 2):
        distance = (at - first - neighbor).abs()
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
        far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
        place = (first + neighbor).clamp(0, before - 1).long()
        at_place = (place[:, None] == torch.arange(before)).to(weights)
        weights = weights + torch.where(distance <= 1, near, far)[:, None] * at_place
    # A few kilobytes; without non_blocking the host would wait for a GPU in every pass.
    return weights.to(like, non_blocking=True)
