"""Self-training in rounds (DARS, section 3): labeled and pseudo-labeled images, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from darseg.data.batches import Batch
from darseg.training.loss import LabeledLoss, outputs_together, supervised, supervised_loss
from darseg.training.method import Feed, Figures, Learner, Method


def self_training(
    learner: Learner,
    *,
    batch: int,
    pseudo_batch: int = 0,
    auxiliary_weight: float = 0.0,
    pseudo_weight: float = 1.0,
    labeled_loss: LabeledLoss | None = None,
    one_pass: bool = False,
) -> Method:
    """CE(labeled) + pseudo_weight · CE(pseudo-labeled), each with the auxiliary loss.

    Args:
        learner: the network with its optimizer.
        batch, pseudo_batch: images of a step with true and with pseudo labels; 0: labeled images alone.
        auxiliary_weight: of the auxiliary head's loss (the release: 0.4 for PSPNet).
        pseudo_weight: λ of the paper.
        labeled_loss: of the images with true labels, if it is more than cross-entropy.
        one_pass: both go through the network together.
    """

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        return self_training_loss(
            network,
            batches,
            auxiliary_weight,
            pseudo_weight=pseudo_weight,
            labeled_loss=labeled_loss,
            one_pass=one_pass,
        )

    return Method(feeds=feeds(batch, pseudo_batch), learners=(learner,), loss=loss)


def feeds(batch: int, pseudo_batch: int) -> tuple[Feed, ...]:
    """The streams of a step: labeled images, and pseudo-labeled ones if there are any."""
    labeled = Feed("labeled", batch)
    return (labeled, Feed("pseudo", pseudo_batch)) if pseudo_batch else (labeled,)


def self_training_loss(
    network: Callable,
    batches: Sequence[Batch],
    auxiliary_weight: float,
    pseudo_weight: float = 1.0,
    *,
    labeled_loss: LabeledLoss | None = None,
    one_pass: bool = False,
) -> tuple[Tensor, Figures]:
    """The loss of one step, a scalar, and its detached parts by name.

    The labeled and the pseudo-labeled batch go through the network one after the other, so that BatchNorm sees them
    apart, as in the release; or together, in one pass.
    """
    labeled, *pseudo = batches
    if one_pass and pseudo:
        own, *others = outputs_together(network, batches)
        loss = supervised_loss(own, labeled, auxiliary_weight, how=labeled_loss)
        parts = [
            supervised_loss(output, batch, auxiliary_weight)
            for output, batch in zip(others, pseudo, strict=True)
        ]
    else:
        loss = supervised(network, labeled, auxiliary_weight, how=labeled_loss)
        parts = [supervised(network, batch, auxiliary_weight) for batch in pseudo]
    figures = {"loss_labeled": loss.detach()}
    for part in parts:
        figures["loss_pseudo"] = part.detach()
        loss = loss + pseudo_weight * part
    return loss, figures
