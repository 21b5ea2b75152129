"""Learn from unlabeled images while training: strong views get the labels of the weak view.

FixMatch, as UniMatch (Yang et al., CVPR 2023; V2: TPAMI 2025) has it for segmentation. What all such methods share is
here too: their settings (`Consistency`), their state, and the prediction of weak views. A further method is a function
like `fixmatch`, here or in a file of its own (unimatch.py, mean_teacher.py, classmix.py, cps.py), a value of
`OnlineMethod` (choices.py), and an entry of `PUBLISHED` and `MAKERS` in run/online.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from darseg.choices import Mixing, OnlineMethod
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.unlabeled import StrongViews
from darseg.data.views import Views
from darseg.errors import RecipeError
from darseg.methods.acceptance import (
    Above,
    Acceptance,
    Accepted,
    Predicted,
    accept,
    acceptance_state,
    advance,
)
from darseg.methods.figures import LOOK_EVERY, counts_by_class, counts_of, student_counts
from darseg.methods.mixing import box_mask, class_mask, mix, partners_of
from darseg.methods.teacher import Teacher, TeacherSettings, in_eval_mode
from darseg.model.network import Network
from darseg.training.loss import LabeledLoss, precise, supervised
from darseg.training.method import Feed, Figures, Labeled, Learner, Method, Streamed


@dataclass(frozen=True)
class Consistency:
    """How a network learns from unlabeled images while it trains.

    Attributes:
        method: what is done with the views.
        batch: unlabeled images of a step, over all processes.
        views: strong views of each.
        strong: how they are made.
        mixing: how images of a batch are mixed in pairs, with their labels.
        accept: which predictions are learned from.
        weight: of the loss of the unlabeled images; at 0 they are labeled and counted, but not learned from.
        teacher: labels the weak views; None: the network itself does, in eval mode. Of cps it labels nothing.
    """

    method: OnlineMethod
    batch: int
    views: int = 1
    strong: StrongViews = field(default_factory=StrongViews)
    mixing: Mixing = "cutmix"
    accept: Acceptance = field(default_factory=Above)
    weight: float = 1.0
    teacher: TeacherSettings | None = field(default_factory=TeacherSettings)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.views < 1:
            raise RecipeError(
                f"Found {self.batch} unlabeled images with {self.views} strong views. Give at least 1 of both."
            )
        if self.mixing != "none" and self.batch % 2:
            raise RecipeError(
                f"Images are mixed in pairs, but there are {self.batch} unlabeled images a step. Make online.batch even, "
                "or set online.mixing: none."
            )
        if self.method == "unimatch_v2" and self.views != 2:
            raise RecipeError(
                f"unimatch_v2 drops complementary channels of two strong views, but there are {self.views}. Set "
                "online.strong_views: 2, or choose online.method: fixmatch."
            )

    @property
    def passes(self) -> int:
        """Images that go through a network for the loss of an unlabeled image."""
        return self.views + (self.method == "unimatch")

    @property
    def networks(self) -> int:
        """Networks that learn at once, each from all images."""
        return 2 if self.method == "cps" else 1


class OnlineState(nn.Module):
    """What moves with the steps: the teacher, if there is one, and what the rule of acceptance remembers."""

    def __init__(self, network: Network, how: Consistency) -> None:
        super().__init__()
        self.teacher = Teacher(network) if how.teacher is not None else None
        self.acceptance = acceptance_state(how.accept, how.batch, network.classes)


Prepared = tuple[Accepted, Sequence[Batch]]
"""What is accepted of the weak views, and what the network learns it from."""

Mask = tuple[Tensor, Tensor] | None
"""The partners of a batch's images, and what to take from them; None: nothing is mixed."""

Cost = Callable[[Callable, Sequence[Batch]], tuple[Tensor, Figures]]
"""(network, batches that were prepared or micro-batches of them) → their loss, and figures."""


class MixedView(Protocol):
    """Makes one of the strong views, with labels of the weak one, all mixed alike."""

    def __call__(self, views: Views, accepted: Accepted, view: int, *, mask: Mask) -> Batch: ...


@dataclass(frozen=True)
class Supervision:
    """How the labeled images of a step are learned.

    Attributes:
        size: images of a step, over all processes.
        auxiliary_weight: of the auxiliary head's loss.
        loss: if it is more than cross-entropy.
    """

    size: int
    auxiliary_weight: float = 0.0
    loss: LabeledLoss | None = None


def fixmatch(learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(labeled) + weight · mean over the strong views of CE(view against labels of the weak one).

    The second loss divides by all pixels that are not padding, not only by the accepted ones: if few are accepted, little
    is learned from them.

    Args:
        learner: the network with its optimizer.
        labeled: how the labeled images are learned; its auxiliary weight holds for the strong views, too.
        seed: of the draws that choose classes to mix and pixels to keep.
    """

    def prepare(state: OnlineState, network: nn.Module, views: Views) -> Prepared:
        return strong_batches(state, network, views, how=how, seed=seed)

    return unlabeled_method(learner, how, labeled, prepare=prepare, cost=learned_classes(labeled))


def learned_classes(labeled: Supervision) -> Cost:
    """The mean over the strong views of the cross-entropy of their labels."""

    def cost(network: Callable, unlabeled: Sequence[Batch]) -> tuple[Tensor, Figures]:
        consistency = torch.stack(
            [supervised(network, view, labeled.auxiliary_weight) for view in unlabeled]
        ).mean()
        return consistency, {"loss_unlabeled": consistency.detach()}

    return cost


def strong_batches(
    state: OnlineState,
    network: nn.Module,
    views: Views,
    *,
    how: Consistency,
    seed: Sequence[int],
    labeled: MixedView | None = None,
) -> Prepared:
    """What is accepted of the weak views, and the strong views with labels of it, mixed in pairs.

    Args:
        labeled: makes a strong view; None: `mixed_view`.
    """
    probabilities = predict_weak(state, network, views).softmax(1)
    predicted = Predicted(probabilities, views.inside, views.positions, seed=seed)
    accepted = accept(how.accept, state.acceptance, predicted)
    classes = probabilities.shape[1]
    masks = mixing_masks(how.mixing, views, accepted, classes=classes, seed=seed)
    make = labeled or mixed_view
    return accepted, [make(views, accepted, view, mask=mask) for view, mask in enumerate(masks)]


def unlabeled_method(
    learner: Learner,
    how: Consistency,
    labeled: Supervision,
    *,
    prepare: Callable[[OnlineState, nn.Module, Views], Prepared],
    cost: Cost,
) -> Method:
    """CE(labeled) + weight · cost(what was prepared); teacher and acceptance follow after each step.

    Args:
        labeled: how the labeled images are learned.
        prepare: (state, network, views) → what is accepted, and the batches to learn it from.
    """
    network = learner.module
    assert isinstance(network, Network)
    classes = network.classes

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        batch, views = streamed
        assert isinstance(batch, Batch) and isinstance(views, Views) and isinstance(state, OnlineState)
        accepted, batches = prepare(state, network, views)
        counts = dict(counts_of(views, accepted))
        if step % LOOK_EVERY == 0:
            counts |= counts_by_class(views, accepted, classes)
            if state.teacher is not None:
                counts |= student_counts(network, views, accepted)
        return Labeled([batch, *batches], counts, accepted.seen)

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        batch, *unlabeled = batches
        total = supervised(network, batch, labeled.auxiliary_weight, how=labeled.loss)
        figures: dict[str, Tensor] = {"loss_labeled": total.detach()}
        if how.weight == 0:
            return total, figures
        consistency, parts = cost(network, unlabeled)
        return total + how.weight * consistency, figures | dict(parts)

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        assert isinstance(state, OnlineState)
        teacher_follows(state, network, how, step=step)
        advance(how.accept, state.acceptance, seen, step=step)

    return Method(
        feeds=feeds(labeled.size, how),
        learners=(learner,),
        loss=loss,
        label=label,
        moved=moved,
        state=OnlineState(network, how),
        outcome=lambda state, network: saved_network(state, network, how),
    )


def teacher_follows(state: OnlineState, network: nn.Module, how: Consistency, *, step: int) -> None:
    """Let the teacher, if there is one, move toward the network."""
    if how.teacher is not None and state.teacher is not None:
        state.teacher.follow(network, how.teacher, step)


def saved_network(state: nn.Module, network: nn.Module, how: Consistency) -> nn.Module:
    """The network that a round saves: the teacher if there is one that is the result."""
    assert isinstance(state, OnlineState)
    saved = how.teacher is not None and how.teacher.result and state.teacher is not None
    return state.teacher.network if saved else network


def feeds(batch: int, how: Consistency) -> tuple[Feed, ...]:
    """The streams of a step: labeled images, and views of unlabeled ones."""
    return Feed("labeled", batch), Feed("unlabeled", how.batch, strong=how.views)


def predict_weak(state: OnlineState, network: nn.Module, views: Views) -> Tensor:
    """Logits of the weak views, float [B, K, H, W]: the teacher's, or the network's in eval mode."""
    return eval_logits(network if state.teacher is None else state.teacher.network, views)


def eval_logits(network: nn.Module, views: Views) -> Tensor:
    """What a network answers to the weak views in eval mode, float [B, K, H, W], in float32 at least."""
    with in_eval_mode(network):
        logits = network(views.weak).main
    return precise(logits)


def mixing_masks(
    mixing: Mixing, views: Views, accepted: Accepted, *, classes: int, seed: Sequence[int]
) -> list[Mask]:
    """For each strong view: partners and mask of what to take from them; None if nothing is mixed."""
    count, device = len(views.ids), views.inside.device
    masks: list[Mask] = []
    for view in range(len(views.strong)):
        match mixing:
            case "none":
                masks.append(None)
            case "cutmix":
                height, width = views.inside.shape[1:]
                masks.append((partners_of(count, device), box_mask(views.boxes[view], (height, width))))
            case "classmix":
                partners = partners_of(count, device)
                mask = class_mask(
                    accepted.predicted,
                    classes,
                    partners,
                    seed=(*seed, view),
                    positions=views.positions,
                )
                masks.append((partners, mask))
    return masks


def mixed_with(own: Tensor, mask: Mask) -> Tensor:
    """A tensor of images, mixed by partners and mask; as it is without them."""
    return own if mask is None else mix(own, *mask)


def mixed_view(views: Views, accepted: Accepted, view: int, *, mask: Mask) -> Batch:
    """A strong view with the accepted labels, all mixed alike."""
    return Batch(
        images=mixed_with(views.strong[view], mask),
        labels=mixed_with(accepted.labels, mask),
        ids=views.ids,
        divisor=mixed_with(views.inside, mask).sum(),
    )


def scaled_view(views: Views, accepted: Accepted, view: int, *, mask: Mask) -> Batch:
    """A strong view with every predicted class, all mixed alike.

    Each pixel weighs as much as the share of its image's pixels that are accepted.
    """
    inside = mixed_with(views.inside, mask)
    confident = (mixed_with(accepted.labels, mask) != IGNORE).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    return Batch(
        images=mixed_with(views.strong[view], mask),
        labels=mixed_with(accepted.predicted, mask),
        ids=views.ids,
        weights=confident[:, None, None] * inside,
        divisor=inside.sum(),
    )
