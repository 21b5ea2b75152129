"""Cross-entropy over labeled pixels, so that micro-batches and processes add up to the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from darseg.data.batches import Batch
from darseg.data.classes import IGNORE


def cross_entropy(logits_BKHW: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The weighted sum of cross-entropy over labeled pixels, divided by `batch.count()`.

    It is 0 if no pixel is labeled. The result of a micro-batch is its share of the whole batch's mean.
    """
    precise = torch.promote_types(
        logits_BKHW.dtype, torch.float32
    )  # half precision is not enough for the sum
    logits, labels = logits_BKHW.to(precise), batch.labels.long()
    if batch.weights is None:
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    else:
        total = (F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") * batch.weights).sum()
    return total / batch.count().clamp(min=1)


def supervised(network: Callable, batch: Batch, auxiliary_weight: float) -> torch.Tensor:
    """CE(main) + auxiliary_weight · CE(auxiliary) of one batch (the release: 0.4 for PSPNet)."""
    assert not batch.feature_masks, "no network takes feature masks yet"
    output = network(batch.images)
    loss = cross_entropy(output.main, batch)
    if output.auxiliary is not None and auxiliary_weight > 0:
        loss = loss + auxiliary_weight * cross_entropy(output.auxiliary, batch)
    return loss
