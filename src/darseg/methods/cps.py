"""Cross pseudo supervision (Chen et al., CVPR 2021): two networks learn from each other's classes.

They have the same shape and begin with other weights. Both learn the labeled images, and on unlabeled ones the classes
that the other predicts. The second network is a learner of its own, and a part of the state; the round saves the first.

One point is not as released: both networks label the unlabeled images in eval mode, before the step, so that processes
add up, and so that the rules of acceptance and alignment work as in the other methods. Each network's labels have a rule
of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.methods.acceptance import Accepted, Predicted, accept, acceptance_state, advance
from darseg.methods.consistency import (
    Consistency,
    OnlineState,
    Supervision,
    eval_logits,
    feeds,
    mixed_view,
    mixing_masks,
    saved_network,
    teacher_follows,
)
from darseg.methods.figures import LOOK_EVERY, compared_counts, counts_by_class, counts_of
from darseg.model.network import Network, Output
from darseg.training.loss import supervised, supervised_loss
from darseg.training.method import Figures, Labeled, Learner, Method, Streamed

SECOND = "second"
"""Name of the second learner."""

PREFIX = "second_"
"""How the names begin of what `own_acceptance` follows."""


class CrossState(OnlineState):
    """What moves with the steps: the second network, and what the rules of acceptance remember.

    Attributes:
        acceptance: of the second network's labels, which the first learns.
        own_acceptance: of the first network's labels, which the second learns.
    """

    def __init__(self, network: Network, second: Network, how: Consistency) -> None:
        super().__init__(network, how)
        self.second = second
        self.own_acceptance = acceptance_state(how.accept, how.batch, network.classes)


def cps(
    learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int], second: Network
) -> Method:
    """CE1(L) + CE2(L) + weight · (CE1(U against the classes of 2) + CE2(U against the classes of 1)).

    With mixing, both networks learn the same mixed views, with the labels mixed alike. Without, the labeled images join
    U: at their labeled pixels too, each network learns the classes of the other. These losses divide by all pixels that
    are not padding, not only by the accepted ones.

    Args:
        learner: the first network with its optimizer; the second has one like it.
        labeled: how the labeled images are learned.
        seed: of the draws that choose classes to mix and pixels to keep.
        second: the second network, of the shape of the first; learns in place.
    """
    network = learner.module
    assert isinstance(network, Network)

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        batch, views = streamed
        assert isinstance(batch, Batch) and isinstance(views, Views) and isinstance(state, CrossState)
        logits = eval_logits(network, views), eval_logits(state.second, views)
        accepted, own = _accepted(state, views, logits, how=how, seed=seed)
        classes = logits[0].shape[1]
        masks = mixing_masks(how.mixing, views, accepted, classes=classes, seed=seed)
        batches = [
            mixed_view(views, labels, view, mask=mask)
            for labels in (accepted, own)
            for view, mask in enumerate(masks)
        ]
        seen = dict(accepted.seen) | {f"{PREFIX}{name}": value for name, value in own.seen.items()}
        return Labeled([batch, *batches], _counts(views, accepted, logits[0], step=step), seen)

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        return _losses(network, state.second, batches, how=how, labeled=labeled)

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        assert isinstance(state, CrossState)
        teacher_follows(state, network, how, step=step)
        advance(how.accept, state.acceptance, seen, step=step)
        own = {name.removeprefix(PREFIX): value for name, value in seen.items() if name.startswith(PREFIX)}
        advance(how.accept, state.own_acceptance, own, step=step)

    state = CrossState(network, second, how)
    return Method(
        feeds=feeds(labeled.size, how),
        learners=(learner, replace(learner, name=SECOND, module=second)),
        loss=loss,
        label=label,
        moved=moved,
        state=state,
        outcome=lambda state, network: saved_network(state, network, how),
    )


def _accepted(
    state: CrossState, views: Views, logits: tuple[Tensor, Tensor], *, how: Consistency, seed: Sequence[int]
) -> tuple[Accepted, Accepted]:
    """What is accepted for the first network to learn, and what for the second.

    Args:
        logits: what the first and the second answer to the weak views.
    """
    first, second = (
        accept(
            how.accept,
            rule,
            Predicted(scores.softmax(1), views.inside, views.positions, seed=(*seed, number)),
        )
        for number, (rule, scores) in enumerate(
            ((state.acceptance, logits[1]), (state.own_acceptance, logits[0]))
        )
    )
    return first, second


def _counts(views: Views, accepted: Accepted, logits: Tensor, *, step: int) -> Figures:
    """What is reported of the labels that the first network learns.

    Args:
        logits: its own answers to the weak views.
    """
    counts = dict(counts_of(views, accepted))
    if step % LOOK_EVERY == 0:
        counts |= counts_by_class(views, accepted, logits.shape[1])
        counts |= compared_counts(logits.argmax(1).to(torch.uint8), views, accepted)
    return counts


def _losses(
    network: Callable, second: nn.Module, batches: Sequence[Batch], *, how: Consistency, labeled: Supervision
) -> tuple[Tensor, Figures]:
    """The loss of `cps`, and its parts.

    Args:
        batches: labeled images; the views with the labels for the first network; those with the labels for the second.
    """
    batch, *views = batches
    auxiliary, networks = labeled.auxiliary_weight, (network, second)
    outputs = [learning(batch.images) for learning in networks]
    own, others = (supervised_loss(output, batch, auxiliary, how=labeled.loss) for output in outputs)
    figures = {"loss_labeled": own.detach()}
    if how.weight:
        shares = views[: how.views], views[how.views :]
        crossed = []
        for index, learning in enumerate(networks):
            known = None
            if how.mixing == "none":
                known = outputs[index], _labeled_by(outputs[1 - index], batch)
            crossed.append(_crossed(learning, shares[index], known, auxiliary=auxiliary))
        figures["loss_unlabeled"] = crossed[0].detach()
        own, others = own + how.weight * crossed[0], others + how.weight * crossed[1]
    return own + others, figures | {"loss_second": others.detach()}


def _labeled_by(output: Output, batch: Batch) -> Batch:
    """Labeled images with the classes of a network's output, at the pixels that are labeled."""
    classes = output.main.detach().argmax(1).to(torch.uint8)
    return replace(batch, labels=classes.masked_fill(batch.labels == IGNORE, IGNORE))


def _crossed(
    network: Callable, views: Sequence[Batch], known: tuple[Output, Batch] | None, *, auxiliary: float
) -> Tensor:
    """The loss of a network against the other's classes, a mean over the pixels of all images.

    Args:
        views: of the unlabeled images, with the other's labels.
        known: the network's output for the labeled images, and these with the other's classes; None: views alone count.
    """
    more = 0 if known is None else known[1].count()
    losses = [supervised(network, replace(view, divisor=view.count() + more), auxiliary) for view in views]
    total = torch.stack(losses).mean()
    if known is None:
        return total
    output, batch = known
    return total + supervised_loss(output, replace(batch, divisor=views[0].count() + more), auxiliary)
