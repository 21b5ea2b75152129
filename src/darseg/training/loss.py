"""Cross-entropy over labeled pixels, so that micro-batches and processes add up to the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.model.network import Output


@dataclass(frozen=True)
class LabeledLoss:
    """What the loss of the labeled images is, besides cross-entropy.

    Attributes:
        hard_below: online hard example mining: only pixels whose true class has less probability than this count; None:
            all do. The loss is the mean over them (Shrivastava et al. 2016; as UniMatch has it for Cityscapes).
        least: pixels for an image, on average, that count in any case: those with the least probability.
        class_weights: factors of the classes' losses; empty: all 1. The mean over pixels is not divided by them.
    """

    hard_below: float | None = None
    least: int = 0
    class_weights: tuple[float, ...] = ()


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights that give every class the same share of the loss, if all pixels cost the same.

    Pixels / (classes that occur · pixels of the class): their mean over the pixels is 1, so that the loss keeps its size.
    Classes without a pixel have 1. (King and Zeng 2001; scikit-learn's class_weight="balanced".)

    Args:
        counts: labeled pixels per class, at least one of them above 0.
    """
    total, present = sum(counts), sum(count > 0 for count in counts)
    return tuple(total / (present * count) if count else 1.0 for count in counts)


def precise(values: torch.Tensor) -> torch.Tensor:
    """In float32 at least: half precision is not enough for sums and exponentials."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(logits_BKHW: torch.Tensor, batch: Batch, how: LabeledLoss | None = None) -> torch.Tensor:
    """The weighted sum of cross-entropy over labeled pixels, divided by `batch.count()`.

    It is 0 if no pixel is labeled. The result of a micro-batch is its share of the whole batch's mean. Hard pixels are
    chosen within each micro-batch and process, as in released code; the mean over them counts as much as the labeled
    pixels that it is of.
    """
    logits, labels = precise(logits_BKHW), batch.labels.long()
    if how is not None and how != LabeledLoss():
        total = _chosen(logits, labels, batch, how=how)
    elif batch.weights is None:
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    else:
        total = (F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") * batch.weights).sum()
    return total / batch.count().clamp(min=1)


def _chosen(logits: torch.Tensor, labels: torch.Tensor, batch: Batch, how: LabeledLoss) -> torch.Tensor:
    """The loss of weighted classes and hard pixels, times the number of labeled pixels."""
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    labeled = labels != IGNORE
    weights = torch.ones_like(losses) if batch.weights is None else batch.weights.to(losses)
    if how.class_weights:
        # Made on a GPU from Python's numbers, it would make the host wait for the GPU.
        by_class = torch.tensor(how.class_weights, dtype=losses.dtype).to(losses.device, non_blocking=True)
        weights = weights * by_class[labels.clamp(max=len(how.class_weights) - 1)]
    if how.hard_below is None:
        return (losses * weights * labeled).sum()
    probability = torch.where(labeled, (-losses.detach()).exp(), torch.inf)
    flat = probability.flatten()
    least = min(how.least * len(labels), flat.numel())
    # The least-th smallest; infinite if fewer are labeled, so that all count.
    limit = (
        flat.kthvalue(least).values.clamp(min=how.hard_below) if least else flat.new_full((), how.hard_below)
    )
    kept = (probability <= limit) & labeled
    mean = (losses * weights * kept).sum() / kept.sum().clamp(min=1)
    return mean * labeled.sum()


def squared_error(logits_BKHW: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The weighted squared distance to `batch.targets`, added up over classes, over `batch.count()`.

    Distances are of probabilities. The result of a micro-batch is its share of the whole batch's.
    """
    assert batch.targets is not None
    distances = (precise(logits_BKHW).softmax(1) - batch.targets).square().sum(1)
    if batch.weights is not None:
        distances = distances * batch.weights
    return distances.sum() / batch.count().clamp(min=1)


def supervised(
    network: Callable, batch: Batch, auxiliary_weight: float, how: LabeledLoss | None = None
) -> torch.Tensor:
    """CE(main) + auxiliary_weight · CE(auxiliary) of one batch (the release: 0.4 for PSPNet)."""
    output = network(batch.images, batch.feature_masks) if batch.feature_masks else network(batch.images)
    return supervised_loss(output, batch, auxiliary_weight, how=how)


def outputs_together(network: Callable, batches: Sequence[Batch]) -> list[Output]:
    """The network's output for each batch, of one forward pass over all images.

    BatchNorm sees them together.
    """
    output = network(torch.cat([batch.images for batch in batches]))
    bounds = [0, *itertools.accumulate(len(batch.ids) for batch in batches)]
    return [
        Output(output.main[start:end], None if output.auxiliary is None else output.auxiliary[start:end])
        for start, end in itertools.pairwise(bounds)
    ]


def supervised_loss(
    output: Output, batch: Batch, auxiliary_weight: float, how: LabeledLoss | None = None
) -> torch.Tensor:
    """What `supervised` makes of the network's output for the batch."""
    loss = cross_entropy(output.main, batch, how)
    if output.auxiliary is not None and auxiliary_weight > 0:
        loss = loss + auxiliary_weight * cross_entropy(output.auxiliary, batch, how)
    return loss
