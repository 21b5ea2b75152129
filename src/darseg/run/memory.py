"""How much memory training will need, counted before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from darseg.config.recipe import Recipe
from darseg.data.batches import part_sizes
from darseg.methods.adversarial import Adversarial
from darseg.model.footprint import classifier_memory, discriminator_memory, training_memory
from darseg.model.network import Network
from darseg.run.build import spec_of
from darseg.run.image_classes import ClassifierPlan
from darseg.run.online import teacher_of
from darseg.run.plan import Round
from darseg.training.method import Learner
from darseg.training.optimize import SGD


class Memory(NamedTuple):
    """Bytes of weights, gradients and averages, and of what a step keeps for its backward pass."""

    state_bytes: int
    activation_bytes: int


def memory_of(recipe: Recipe, rounds: Sequence[Round], learner: Learner, *, processes: int) -> Memory:
    """The float32 memory of a process in the rounds of one network, without workspaces.

    Args:
        recipe: as it holds in these rounds.
        learner: the network.
    """
    network, micro_batch = learner.module, recipe.training.micro_batch
    assert isinstance(network, Network)
    most: dict[tuple[int, int], int] = {}  # crop → images in memory at once
    judged = [0, 0]  # by a discriminator
    for planned in rounds:
        crop, images = planned.augmentation.crop, _images(planned, micro_batch, processes)
        most[crop] = max(2, images, most.get(crop, 0))
        if isinstance(planned.online, Adversarial):
            own = _judging(
                planned, planned.online, classes=network.classes, processes=processes, micro_batch=micro_batch
            )
            judged = [max(pair) for pair in zip(judged, own, strict=True)]
    memories = [
        training_memory(
            spec_of(recipe),
            images,
            height=height,
            width=width,
            averages=1 if isinstance(learner.optimizer, SGD) else 2,
            frozen=network.frozen,
        )
        for (height, width), images in most.items()
    ]
    learn_at_once = max(planned.online.networks if planned.online else 1 for planned in rounds)
    return Memory(
        learn_at_once * memories[0][0] + _teacher_bytes(recipe, rounds, network) + judged[0],
        max(activations for _, activations in memories) + judged[1],
    )


def memory_of_classifier(planned: ClassifierPlan, processes: int) -> Memory:
    """As `memory_of`, of the classifier of whole images, which learns before round 0."""
    how = planned.how
    shares = [share // processes for share in (how.batch, how.unlabeled if how.weight else 0) if share]
    images = sum(max(parts) for parts in part_sizes(shares, planned.stage.micro_batch))
    return Memory(*classifier_memory(planned.backbone, planned.classes, images=images, side=planned.side))


def _images(planned: Round, micro_batch: int | None, processes: int) -> int:
    """Images whose activations a process keeps until the backward pass: of all parts of a micro-batch.

    An image counts once for each network that learns it.
    """
    if planned.online is None:
        shares = [share // processes for share in (planned.batch, planned.pseudo_batch) if share]
        return sum(max(parts) for parts in part_sizes(shares, micro_batch))
    labeled, unlabeled = _largest_parts(planned, planned.online.batch, micro_batch, processes=processes)
    how = planned.online
    return how.networks * (labeled + (how.passes * unlabeled if how.weight else 0))


def _largest_parts(
    planned: Round, unlabeled: int, micro_batch: int | None, *, processes: int
) -> tuple[int, int]:
    """Labeled and unlabeled images of the largest micro-batches of a process."""
    parts = part_sizes([planned.batch // processes, -(-unlabeled // processes)], micro_batch)
    return max(parts[0]), max(parts[1])


def _judging(
    planned: Round, how: Adversarial, *, classes: int, processes: int, micro_batch: int | None
) -> tuple[int, int]:
    """What the discriminator of a round adds: its own numbers, and what it keeps.

    It judges predictions twice, for the network and for itself, and truths once.
    """
    labeled, unlabeled = _largest_parts(planned, how.batch, micro_batch, processes=processes)
    predictions = unlabeled + (labeled if how.method == "advsemiseg" else 0)
    height, width = planned.augmentation.crop
    return discriminator_memory(
        how.discriminator, classes, maps=2 * predictions + labeled, height=height, width=width
    )


def _teacher_bytes(recipe: Recipe, rounds: Sequence[Round], network: nn.Module) -> int:
    """Bytes of a teacher's weights, if any round has one."""
    taught = any(
        teacher_of(recipe) if planned.online is None else planned.online.teacher for planned in rounds
    )
    return sum(parameter.nbytes for parameter in network.parameters()) if taught else 0
