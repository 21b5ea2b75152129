"""What a stage minimizes (DARS, section 3: cross-entropy on labeled and pseudo-labeled half-batches)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from darseg.data.batches import Batch
from darseg.data.classes import IGNORE

Figures = Mapping[str, torch.Tensor]


def cross_entropy(logits_BKHW: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over labeled pixels; 0 (and no gradient) where no pixel is labeled.

    Of a micro-batch: its share of the whole batch's mean, so that the micro-batches add up to it.
    """
    total = F.cross_entropy(logits_BKHW.float(), batch.labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / batch.count_labeled().clamp(min=1)


def supervised(network: Callable, batch: Batch, auxiliary_weight: float) -> torch.Tensor:
    """CE(main) + auxiliary_weight · CE(auxiliary) of one batch (the release: 0.4 for PSPNet)."""
    output = network(batch.images)
    loss = cross_entropy(output.main, batch)
    if output.auxiliary is not None and auxiliary_weight > 0:
        loss = loss + auxiliary_weight * cross_entropy(output.auxiliary, batch)
    return loss


def self_training(
    network: Callable, batches: Sequence[Batch], auxiliary_weight: float, pseudo_weight: float
) -> tuple[torch.Tensor, Figures]:
    """Loss of one step: labeled batch, then, where there is one, the pseudo-labeled batch times λ.

    The two go through the network one after the other, so BatchNorm sees them apart.

    Returns:
        the loss (a scalar) and its detached parts by name.
    """
    labeled, *pseudo = batches
    loss = supervised(network, labeled, auxiliary_weight)
    figures = {"loss_labeled": loss.detach()}
    for batch in pseudo:
        part = supervised(network, batch, auxiliary_weight)
        figures["loss_pseudo"] = part.detach()
        loss = loss + pseudo_weight * part
    return loss, figures | {"loss": loss.detach()}
