"""Learn from unlabeled images with a discriminator, which tells predicted class maps from true ones.

AdvSemiSeg (Hung et al., BMVC 2018) judges each pixel, s4GAN (Mittal et al., TPAMI 2019) each image. The network learns to
be taken for the truth, and the discriminator learns to see the difference. It is a second learner: its terms see detached
predictions, the network's terms see it with detached parameters, so all is one sum and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darseg.choices import AdversarialMethod, Mixing
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.colors import UNCHANGED
from darseg.data.unlabeled import StrongViews
from darseg.data.views import Views
from darseg.methods.acceptance import Accepted
from darseg.methods.consistency import Supervision
from darseg.methods.figures import ACCEPTED, INSIDE, KNOWN, LOOK_EVERY, RIGHT, counts_by_class, counts_of
from darseg.methods.teacher import Teacher, TeacherSettings, in_eval_mode
from darseg.model.discriminators import Discriminator, ImageDiscriminator, PixelDiscriminator
from darseg.model.network import Network
from darseg.training.loss import cross_entropy, precise, supervised_loss
from darseg.training.method import Feed, Figures, Labeled, Learner, Method, Streamed
from darseg.training.optimize import Adam

BETAS = (0.9, 0.99)
"""Of the discriminator's Adam, in both releases."""

DISCRIMINATORS: Mapping[AdversarialMethod, type[Discriminator]] = {
    "advsemiseg": PixelDiscriminator,
    "s4gan": ImageDiscriminator,
}


@dataclass(frozen=True)
class Adversarial:
    """How a network learns with a discriminator.

    Attributes:
        batch: unlabeled images of a step, over all processes.
        labeled: weight of the adversarial loss of the labeled images' predictions; s4gan has none.
        unlabeled: of the unlabeled ones': the adversarial loss (advsemiseg), or feature matching (s4gan).
        self_training: of the cross-entropy against the network's own classes, where the discriminator trusts them.
        above: the confidence from which it does: of a pixel (advsemiseg), of an image (s4gan).
        start: the first step with self-training; None: not yet known.
        learning_rate: base of the discriminator's schedule, which is that of the network.
        padding: unlabeled images' padding counts like their pixels, as in the releases.
        teacher: a running average of the network that labels nothing; None: none.
    """

    method: AdversarialMethod
    batch: int
    labeled: float
    unlabeled: float
    self_training: float
    above: float
    start: int | None = None
    learning_rate: float = 1e-4
    padding: bool = False
    teacher: TeacherSettings | None = None

    @property
    def passes(self) -> int:
        """Images that go through the network for the loss of an unlabeled image."""
        return 1

    @property
    def networks(self) -> int:
        """Networks of which each learns from all images."""
        return 1

    @property
    def weight(self) -> float:
        """Never 0: the discriminator learns from predictions of unlabeled images, whatever the network does."""
        return 1.0

    @property
    def views(self) -> int:
        """Strong views of each unlabeled image: the weak view is learned from."""
        return 0

    @property
    def strong(self) -> StrongViews:
        """How they would be made."""
        return StrongViews(UNCHANGED)

    @property
    def mixing(self) -> Mixing:
        """How images are mixed: not at all."""
        return "none"

    @property
    def discriminator(self) -> type[Discriminator]:
        """What judges."""
        return DISCRIMINATORS[self.method]

    def trains_itself(self, step: int) -> bool:
        """Whether a step has self-training."""
        assert self.start is not None
        return self.self_training > 0 and step >= self.start


class AdversarialState(nn.Module):
    """What moves with the steps: the discriminator, and a teacher if there is one."""

    def __init__(self, network: Network, how: Adversarial, seed: Sequence[int]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
            self.discriminator = how.discriminator(network.classes).to(network.mean.dtype)
        self.teacher = Teacher(network) if how.teacher is not None else None


def feeds(batch: int, how: Adversarial) -> tuple[Feed, ...]:
    """The streams of a step: labeled images, unlabeled ones, and ones whose truth is judged."""
    return Feed("labeled", batch), Feed("unlabeled", how.batch), Feed("labeled", batch)


def advsemiseg(learner: Learner, how: Adversarial, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(L) + labeled · A(L) + unlabeled · A(U) + self_training · CE(U), and the discriminator's loss.

    A is the cross-entropy of the discriminator's judgments of pixels against "true". CE(U) is against the network's own
    classes at pixels that the discriminator takes for true with a confidence of at least `above`. The label phase finds
    them, with the network in eval mode, so that their number is known before the loss and micro-batches and processes add
    up. The discriminator's loss is ½ CE(predictions of L and U against "predicted") + ½ CE(truth against "true"). Labeled
    pixels that are void count nowhere; in the truth all their classes are 0.

    Args:
        learner: the network with its optimizer.
        labeled: how the labeled images are learned.
        seed: decides how the discriminator begins.
    """
    network = learner.module
    assert isinstance(network, Network)
    state, classes = AdversarialState(network, how, seed), network.classes

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        batch, views, truth = streamed
        assert isinstance(batch, Batch) and isinstance(views, Views) and isinstance(truth, Batch)
        judged = _judged_of(views, how)
        labels = torch.full_like(judged.labels, IGNORE)
        if how.trains_itself(step):
            with in_eval_mode(network):
                maps = _probabilities(network(views.weak).main)
            assert isinstance(state, AdversarialState)
            trusted = precise(state.discriminator(maps)).sigmoid() >= how.above
            labels = maps.argmax(1).to(torch.uint8).masked_fill(~trusted | (judged.labels == IGNORE), IGNORE)
        pseudo, accepted = Batch(views.weak, labels, views.ids), Accepted(labels, labels)
        counted = replace(views, inside=judged.labels != IGNORE)
        counts = dict(counts_of(counted, accepted))
        if step % LOOK_EVERY == 0:
            counts |= counts_by_class(counted, accepted, classes)
        return Labeled([batch, judged, pseudo, truth], counts)

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        assert isinstance(state.discriminator, PixelDiscriminator)
        return _losses_of_pixels(network, batches, how, labeled=labeled, discriminator=state.discriminator)

    return _with_discriminator(learner, how, labeled, state=state, label=label, loss=loss)


def _losses_of_pixels(
    network: Callable,
    batches: Sequence[Batch],
    how: Adversarial,
    *,
    labeled: Supervision,
    discriminator: PixelDiscriminator,
) -> tuple[Tensor, Figures]:
    """The loss of `advsemiseg`, and its parts.

    Args:
        batches: labeled images; unlabeled ones, 255 on padding; the same with the labels to learn; truths.
    """
    batch, judged, pseudo, truth = batches
    output, logits = network(batch.images), network(judged.images).main
    supervision = supervised_loss(output, batch, labeled.auxiliary_weight, how=labeled.loss)
    own = cross_entropy(logits, pseudo)
    counts = batch.count(), judged.count()
    maps = _probabilities(torch.cat([output.main, logits]))
    sizes = [len(batch.ids), len(judged.ids)]
    scores = _held(discriminator)(maps).split(sizes)
    fooled = [
        _judgment(part, of, true=True) / count.clamp(min=1)
        for part, of, count in zip(scores, (batch, judged), counts, strict=True)
    ]
    scores = discriminator(maps.detach()).split(sizes)
    predicted = sum(_judgment(part, of, true=False) for part, of in zip(scores, (batch, judged), strict=True))
    predicted = predicted / (counts[0] + counts[1]).clamp(min=1)
    true = _judgment(discriminator(_truth_maps(truth, maps)), truth, true=True) / truth.count().clamp(min=1)
    detecting = 0.5 * predicted + 0.5 * true
    total = supervision + how.labeled * fooled[0] + how.unlabeled * fooled[1] + how.self_training * own
    return total + detecting, {
        "loss_labeled": supervision.detach(),
        "loss_adversarial_labeled": fooled[0].detach(),
        "loss_adversarial_unlabeled": fooled[1].detach(),
        "loss_self_training": own.detach(),
        "loss_discriminator": detecting.detach(),
    }


def s4gan(learner: Learner, how: Adversarial, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(L) + unlabeled · FM(U) + self_training · CE(U), and the discriminator's loss.

    FM, feature matching, is the mean over the discriminator's features of |mean of truths - mean of predictions of U|.
    CE(U) is against the network's own classes, in images whose prediction scores above `above`. The discriminator's loss
    is ½ CE(predictions of U against "predicted") + ½ CE(truths against "true"). It drops channels whenever it judges. In
    truths all classes of void pixels are 0, and so they are in predictions on padding.

    Means over a batch are no sums over images: there are no micro-batches and one process. Arguments as of `advsemiseg`.
    """
    network = learner.module
    assert isinstance(network, Network)
    state = AdversarialState(network, how, seed)

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        batch, views, truth = streamed
        assert isinstance(batch, Batch) and isinstance(views, Views) and isinstance(truth, Batch)
        # The truth of unlabeled images, where it is known, is measured alone.
        known = [] if views.truth is None else [Batch(views.weak, views.truth, views.ids)]
        judged = _judged_of(views, how)
        return Labeled([batch, judged, truth, *known], {INSIDE: judged.count()})

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        batch, judged, truth, *known = batches
        discriminator = state.discriminator
        assert isinstance(discriminator, ImageDiscriminator)
        supervision = supervised_loss(
            network(batch.images), batch, labeled.auxiliary_weight, how=labeled.loss
        )
        logits = network(judged.images).main
        maps = _probabilities(logits)
        inside = judged.labels != IGNORE
        predicted = maps * inside[:, None]
        looked = _held(discriminator)(predicted, judged.images)
        true = discriminator(_truth_maps(truth, maps), truth.images)
        means = precise(true.features.detach()).mean(0), precise(looked.features).mean(0)
        matching = (means[0] - means[1]).abs().mean()
        trusted = (precise(looked.scores.detach()).sigmoid() > how.above)[:, None, None]
        kept = inside & trusted & how.trains_itself(step)
        labels = maps.argmax(1).to(torch.uint8).masked_fill(~kept, IGNORE)
        own = cross_entropy(logits, replace(judged, labels=labels))
        false = discriminator(predicted.detach(), judged.images)
        detecting = (
            0.5 * F.softplus(precise(false.scores)).mean() + 0.5 * F.softplus(-precise(true.scores)).mean()
        )
        total = supervision + how.unlabeled * matching + how.self_training * own
        return total + detecting, {
            "loss_labeled": supervision.detach(),
            "loss_feature_matching": matching.detach(),
            "loss_self_training": own.detach(),
            "loss_discriminator": detecting.detach(),
            ACCEPTED: kept.sum(),
        } | {name: count for of in known for name, count in _right_of(labels, of).items()}

    method = _with_discriminator(learner, how, labeled, state=state, label=label, loss=loss)
    return replace(method, exact=False)


def _with_discriminator(
    learner: Learner,
    how: Adversarial,
    labeled: Supervision,
    *,
    state: AdversarialState,
    label: Callable[[nn.Module, nn.Module, Sequence[Streamed], int], Labeled],
    loss: Callable[[Callable, Sequence[Batch], int], tuple[Tensor, Figures]],
) -> Method:
    """The method with two learners, and a teacher that follows if there is one."""

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        assert isinstance(state, AdversarialState)
        if how.teacher is not None and state.teacher is not None:
            state.teacher.follow(network, how.teacher, step)

    def outcome(state: nn.Module, network: nn.Module) -> nn.Module:
        assert isinstance(state, AdversarialState)
        saved = how.teacher is not None and how.teacher.result and state.teacher is not None
        return state.teacher.network if saved else network

    judge = Learner("discriminator", state.discriminator, how.learning_rate, optimizer=Adam(BETAS))
    return Method(
        feeds=feeds(labeled.size, how),
        learners=(learner, judge),
        loss=loss,
        label=label,
        moved=moved,
        state=state,
        outcome=outcome,
    )


def _judged_of(views: Views, how: Adversarial) -> Batch:
    """The weak views; the label is 0 where the discriminator judges, and 255 on padding."""
    inside = torch.ones_like(views.inside) if how.padding else views.inside
    return Batch(
        views.weak, torch.zeros_like(inside, dtype=torch.uint8).masked_fill(~inside, IGNORE), views.ids
    )


def _held(discriminator: Discriminator) -> Callable[..., Any]:
    """The discriminator with detached parameters: gradients reach what it judges, not itself."""
    parameters = {name: value.detach() for name, value in discriminator.named_parameters()}
    return lambda *inputs: torch.func.functional_call(discriminator, parameters, inputs)


def _probabilities(logits_BKHW: Tensor) -> Tensor:
    """Softmax in float32 at least."""
    return precise(logits_BKHW).softmax(1)


def _truth_maps(truth: Batch, like_BKHW: Tensor) -> Tensor:
    """Labels as class maps like others: 1 at the class, and only zeros at void pixels."""
    labeled = truth.labels != IGNORE
    maps = torch.zeros(
        (len(truth.labels), *like_BKHW.shape[1:]), dtype=like_BKHW.dtype, device=like_BKHW.device
    )
    classes = truth.labels.masked_fill(~labeled, 0).long()
    return maps.scatter_(1, classes[:, None], labeled[:, None].to(maps.dtype))


def _judgment(scores_BHW: Tensor, batch: Batch, *, true: bool) -> Tensor:
    """The sum of the cross-entropy of judgments against one answer, over pixels that are not 255."""
    scores = precise(scores_BHW)
    return (F.softplus(-scores if true else scores) * (batch.labels != IGNORE)).sum()


def _right_of(labels: Tensor, known: Batch) -> dict[str, Tensor]:
    """Of the pixels with a label, those with a known truth, and those of them that are right."""
    kept = (labels != IGNORE) & (known.labels != IGNORE)
    return {KNOWN: kept.sum(), RIGHT: (kept & (labels == known.labels)).sum()}
