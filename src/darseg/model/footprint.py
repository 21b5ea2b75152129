"""How much memory a training step needs, counted without computing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from darseg.model.discriminators import Discriminator, ImageDiscriminator
from darseg.model.image_classes import ImageClassifier
from darseg.model.network import NetworkSpec

BYTES_PER_NUMBER = 4
"""Size of a float32."""


class _Attention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its result, and a number for each row of weights."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Its heads lie side by side, so that joining them copies nothing.
        result = torch.empty(queries.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(queries, keys, values, result, torch.empty(queries.shape[:-1]))
        return result


class _FusedAttention(TorchFunctionMode):
    """Inside, attention keeps what it keeps on processors; the meta device has no fused attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) == 3:
            return _Attention.apply(*args)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _counting(module: nn.Module) -> Generator[dict[int, int]]:
    """Count what autograd saves inside the block, but for a module's own tensors: storage → bytes."""
    own = {tensor.untyped_storage()._cdata for tensor in module.state_dict(keep_vars=True).values()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def training_memory(
    spec: NetworkSpec, images: int, height: int, width: int, *, averages: int = 1, frozen: bool = False
) -> tuple[int, int]:
    """Bytes of weights, gradients and averages, and of the tensors kept for the backward pass.

    In float32, for a batch of `images` crops, at the moment when a step needs most, without the workspace of
    convolutions. Runs the network on torch's meta device and adds up the tensors that autograd saves. Raises RecipeError.

    Args:
        averages: numbers that the optimizer keeps for a trained parameter: SGD's momentum, or Adam's two averages.
        frozen: whether the heads alone learn.
    """
    with torch.device("meta"):
        network = spec.build()
        if frozen:
            network.freeze_backbone()
        with _counting(network) as saved, _FusedAttention():
            output = network(torch.zeros(images, 3, height, width, dtype=torch.uint8))
            labels = torch.zeros(images, height, width, dtype=torch.uint8)
            # Kept until the sum is complete: the address of a freed tensor could be used again.
            losses = [F.cross_entropy(logits, labels.long()) for logits in output if logits is not None]
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        fixed = sum(parameter.numel() for parameter in network.parameters()) - trained
        del losses
    return BYTES_PER_NUMBER * ((2 + averages) * trained + fixed), sum(saved.values())


def discriminator_memory(
    kind: type[Discriminator], classes: int, *, maps: int, height: int, width: int
) -> tuple[int, int]:
    """What a discriminator adds to `training_memory`, with Adam: its own numbers, and what it keeps.

    Args:
        maps: class maps that it judges in a step.
    """
    with torch.device("meta"):
        discriminator = kind(classes)
        judged = torch.zeros(maps, classes, height, width, requires_grad=True)
        images = torch.zeros(maps, 3, height, width, dtype=torch.uint8)
        with _counting(discriminator) as saved:
            if isinstance(discriminator, ImageDiscriminator):
                judgments: Any = discriminator(judged, images)
            else:
                judgments = discriminator(judged)
        own = sum(parameter.numel() for parameter in discriminator.parameters())
        del judgments
    return BYTES_PER_NUMBER * 4 * own, sum(saved.values())  # weights, gradients and Adam's two averages


def classifier_memory(backbone: str, classes: int, *, images: int, side: int) -> tuple[int, int]:
    """As `training_memory`, of a classifier of whole images with SGD and its teacher."""
    with torch.device("meta"):
        classifier = ImageClassifier(backbone, classes)
        with _counting(classifier) as saved:
            logits = classifier(torch.zeros(images, 3, side, side, dtype=torch.uint8))
        own = sum(parameter.numel() for parameter in classifier.parameters())
        del logits
    return BYTES_PER_NUMBER * 4 * own, sum(saved.values())  # weights, gradients, momentum and the teacher
