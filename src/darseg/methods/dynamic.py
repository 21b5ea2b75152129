"""DST and DMT (Feng et al. 2020, 2022): a network doubts pseudo labels while it learns from them.

Each pseudo-labeled pixel is weighted by the probability that the network now gives to its label. DST's labels are the
network's own, of an earlier round; DMT's are another network's, and pixels where the network is surer of another class
than the labeler was of the label are left out. The weights come from the forward pass that the loss needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from darseg.choices import DynamicMethod
from darseg.data.batches import CERTAIN, Batch
from darseg.data.classes import IGNORE
from darseg.errors import RecipeError
from darseg.training.loss import LabeledLoss, outputs_together, precise, supervised_loss
from darseg.training.method import Feed, Figures, Labeled, Learner, Method, Streamed

PUBLISHED_GAMMA = {"dst": 9.0, "dmt": 5.0}
"""Powers of the releases; DMT's for PASCAL VOC."""


@dataclass(frozen=True)
class DynamicLoss:
    """How pseudo-labeled pixels are weighted.

    Attributes:
        method: "dst", or "dmt", whose batches have the labeler's confidences.
        gamma: power of the probability of the label; with "dmt" where the network's own class is the label.
        gamma_disagreed: with "dmt", the power at other pixels.
    """

    method: DynamicMethod
    gamma: float
    gamma_disagreed: float | None = None

    def __post_init__(self) -> None:
        powers = [self.gamma] if self.gamma_disagreed is None else [self.gamma, self.gamma_disagreed]
        if min(powers) < 0:
            raise RecipeError(f"The powers {powers} are not valid. Give numbers from 0 on.")


def dynamic_self_training(
    learner: Learner,
    how: DynamicLoss,
    *,
    batch: int,
    pseudo_batch: int,
    auxiliary_weight: float = 0.0,
    pseudo_weight: float = 1.0,
    labeled_loss: LabeledLoss | None = None,
) -> Method:
    """(Σ CE(labeled) + pseudo_weight · Σ weight · CE(pseudo-labeled)) / labeled pixels of both.

    As published, both halves go through the network together, and the sum is divided by the labeled pixels of the whole
    batch: the fewer pseudo labels there are, the less they count.

    Args:
        learner: the network with its optimizer.
        batch, pseudo_batch: images of a step with true and with pseudo labels.
        auxiliary_weight: of the auxiliary head's loss, which has the same weights.
        labeled_loss: of the images with true labels, if it is more than cross-entropy.
    """

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        batches = [batch for batch in streamed if isinstance(batch, Batch)]
        divisor = torch.stack([batch.count() for batch in batches]).sum()
        return Labeled([replace(batch, divisor=divisor) for batch in batches])

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        labeled, pseudo = batches
        of_labeled, of_pseudo = outputs_together(network, batches)
        weighted = replace(pseudo, weights=dynamic_weights(of_pseudo.main, pseudo, how))
        own = supervised_loss(of_labeled, labeled, auxiliary_weight, how=labeled_loss)
        part = supervised_loss(of_pseudo, weighted, auxiliary_weight)
        figures = {"loss_labeled": own.detach(), "loss_pseudo": part.detach()}
        return own + pseudo_weight * part, figures

    return Method(
        feeds=(Feed("labeled", batch), Feed("pseudo", pseudo_batch)),
        learners=(learner,),
        loss=loss,
        label=label,
    )


@torch.no_grad()
def dynamic_weights(logits_BKHW: Tensor, batch: Batch, how: DynamicLoss) -> Tensor:
    """The weight of each pixel in the loss, float [B, H, W], without gradients; 0: not labeled.

    DST: p(label)^gamma. DMT: the same where the network's own class is the label. Elsewhere p(label)^gamma_disagreed,
    and 0 where the network is surer of its own class than the labeler was of the label.

    Args:
        logits_BKHW: of the network that learns.
        batch: with the labeler's confidences for DMT.
    """
    probabilities = precise(logits_BKHW).softmax(1)
    labeled = batch.labels != IGNORE
    labels = batch.labels.long().masked_fill(~labeled, 0)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    match how.method:
        case "dst":
            weights = own**how.gamma
        case "dmt":
            assert batch.confidences is not None and how.gamma_disagreed is not None
            sureness, classes = probabilities.max(1)
            agrees, surer = classes == labels, sureness > batch.confidences.to(probabilities.dtype) / CERTAIN
            disagreed = (own**how.gamma_disagreed).masked_fill(surer, 0)
            weights = torch.where(agrees, own**how.gamma, disagreed)
    return weights.masked_fill(~labeled, 0)
