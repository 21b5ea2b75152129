"""MLMT: a mean teacher for the classes of whole images (Mittal, Tatarchenko and Brox, TPAMI 2019).

A classifier learns from labeled images which classes they show, and from unlabeled ones to agree with its running
average. It learns by itself, next to no segmentation network, so it goes with any of them.
Letters: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darseg.data.batches import Batch
from darseg.data.views import Views
from darseg.errors import RecipeError
from darseg.methods.draws import uniform
from darseg.methods.teacher import Teacher, TeacherSettings
from darseg.training.loss import precise
from darseg.training.method import Feed, Figures, Labeled, Learner, Method, Streamed

MIRRORED = 0x6D69
"""Key of the draws that mirror strong views."""


@dataclass(frozen=True)
class Mlmt:
    """How the classifier learns; the defaults are those of the release.

    Attributes:
        batch, unlabeled: labeled and unlabeled images of a step.
        weight: of the unlabeled images' loss, once it is whole.
        ramp: epochs; at the first one the weight begins to rise from 0, at the second one it is whole.
        epoch_steps: steps of an epoch.
        decay: of the teacher, see `TeacherSettings`.
    """

    epoch_steps: int
    batch: int = 16
    unlabeled: int = 80
    weight: float = 1.0
    ramp: tuple[int, int] = (10, 60)
    decay: float = 0.999

    def __post_init__(self) -> None:
        lowest = min(self.epoch_steps, self.batch, self.unlabeled)
        if lowest < 1 or self.weight < 0 or not 0 <= self.ramp[0] < self.ramp[1]:
            raise RecipeError(
                f"The settings {self} are not possible. Numbers of steps and images should be at least 1, the weight at "
                "least 0, and the first epoch of the ramp below the second."
            )

    def weight_at(self, step: int) -> float:
        """The weight of the unlabeled images at a step, the same for all of an epoch."""
        first, last = self.ramp
        epoch = step // self.epoch_steps
        return self.weight * min(1.0, max(0.0, (epoch - first) / (last - first)))


class MlmtState(nn.Module):
    """The teacher of a classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.teacher = Teacher(classifier)


def feeds(how: Mlmt) -> tuple[Feed, ...]:
    """The streams of a step."""
    return Feed("labeled", how.batch), Feed("unlabeled", how.unlabeled, strong=1)


def mlmt(learner: Learner, how: Mlmt, *, seed: Sequence[int]) -> Method:
    """BCE(labeled) + weight · (1 - cosine of the student's logits and the teacher's).

    The student sees strong views of unlabeled images, the teacher weak ones. A class is present in a labeled image if its
    label map has a pixel of it. Unlabeled images are not predicted while their weight is 0.

    Args:
        learner: the classifier, images [B, 3, side, side] → logits [B, K], with its optimizer.
        seed: of the draws that mirror strong views; weak ones come mirrored, independently.
    """

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        assert isinstance(state, MlmtState)
        labeled, views = streamed
        assert isinstance(labeled, Batch) and isinstance(views, Views)
        classes = int(network.classes)  # ty: ignore[invalid-argument-type]
        batches = [_of_images(labeled.images, labeled.ids, presence_of(labeled.labels, classes))]
        if how.weight_at(step):
            mirrored = uniform((*seed, MIRRORED), views.positions) < 0.5
            strong = torch.where(mirrored[:, None, None, None], views.strong[0].flip(-1), views.strong[0])
            batches.append(_of_images(strong, views.ids, state.teacher.network(views.weak)))
        return Labeled(batches)

    def loss(network: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        labeled, *unlabeled = batches
        total = presence_loss(network(labeled.images), labeled)
        figures = {"loss_labeled": total.detach()}
        for batch in unlabeled:
            part = cosine_loss(network(batch.images), batch)
            figures["loss_unlabeled"] = part.detach()
            total = total + how.weight_at(step) * part
        return total, figures

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        assert isinstance(state, MlmtState)
        state.teacher.follow(network, TeacherSettings(how.decay), step)

    def outcome(state: nn.Module, network: nn.Module) -> nn.Module:
        assert isinstance(state, MlmtState)
        return state.teacher.network

    return Method(
        feeds=feeds(how),
        learners=(learner,),
        loss=loss,
        label=label,
        moved=moved,
        state=MlmtState(learner.module),
        outcome=outcome,
    )


def presence_of(labels_BHW: Tensor, classes: int) -> Tensor:
    """Which classes label maps have, float [B, K] of 0 and 1; 255 is none."""
    present = torch.zeros(len(labels_BHW), 256, device=labels_BHW.device)
    return present.scatter_(1, labels_BHW.flatten(1).long(), 1.0)[:, :classes]


def _of_images(images: Tensor, ids: tuple[str, ...], targets_BK: Tensor) -> Batch:
    """A batch whose images each have targets, and not their pixels: it counts images."""
    labels = torch.zeros(len(ids), 1, 1, dtype=torch.uint8, device=images.device)
    return Batch(images, labels, ids, targets=precise(targets_BK)[:, :, None, None])


def presence_loss(logits_BK: Tensor, batch: Batch) -> Tensor:
    """Binary cross-entropy of each class, its mean over classes and images."""
    assert batch.targets is not None
    logits = precise(logits_BK)
    targets = batch.targets.flatten(1).to(logits.dtype)
    costs = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return costs.mean(dim=1).sum() / batch.count()


def cosine_loss(logits_BK: Tensor, batch: Batch) -> Tensor:
    """1 - the cosine between an image's logits and its targets; the mean over images."""
    assert batch.targets is not None
    logits = precise(logits_BK)
    targets = batch.targets.flatten(1).to(logits.dtype)
    return (1 - F.cosine_similarity(logits, targets, dim=1)).sum() / batch.count()
