"""How much memory a training step needs, counted without computing anything."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from darseg.model.network import NetworkSpec

BYTES_PER_NUMBER = 4
"""Size of a float32."""

PER_TRAINED_PARAMETER = 3
"""Numbers: weight, gradient and SGD's momentum."""


def training_memory(spec: NetworkSpec, images: int, height: int, width: int) -> tuple[int, int]:
    """Bytes of weights, gradients and momentum, and of the tensors kept for the backward pass.

    In float32, for a batch of `images` crops, at the moment when a step needs most, without the workspace of
    convolutions. Runs the network on torch's meta device and adds up the tensors that autograd saves. Raises RecipeError.
    """
    saved: dict[int, int] = {}
    with torch.device("meta"):
        network = spec.build()
        own = {tensor.untyped_storage()._cdata for tensor in network.state_dict(keep_vars=True).values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(torch.zeros(images, 3, height, width, dtype=torch.uint8))
            labels = torch.zeros(images, height, width, dtype=torch.uint8)
            # Kept until the sum is complete: the address of a freed tensor could be used again.
            losses = [F.cross_entropy(logits, labels.long()) for logits in output if logits is not None]
        trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        fixed = sum(parameter.numel() for parameter in network.parameters()) - trained
        del losses
    return BYTES_PER_NUMBER * (PER_TRAINED_PARAMETER * trained + fixed), sum(saved.values())
