"""How the network of a round learns: rates, optimizer, the loss of the labeled images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from darseg.errors import RecipeError
from darseg.model.network import Network, NetworkSpec
from darseg.model.vit import Transformer
from darseg.model.weights import NORMALIZATION
from darseg.training.loss import LabeledLoss
from darseg.training.method import Learner, all_decay
from darseg.training.optimize import (
    BACKBONE,
    SGD,
    OptimizerKind,
    faster_blocks,
    faster_heads,
    only_matrices,
    slower_layers,
)

SECOND_DRAWS = 1 << 22
"""Part of the seed with which a second network begins; those of other draws of a round have smaller numbers there."""


@dataclass(frozen=True)
class LearnerSettings:
    """How the network learns, in the terms of the recipe.

    Attributes:
        learning_rate: the backbone's base rate; the heads learn at `head_factor` times that.
        stage4_as_head: stage 4 learns at the heads' rate, as in the release's DeepLabv2.
        repeated_blocks: a ResNet's blocks learn faster, as in the releases of AdvSemiSeg and s4GAN.
        decay_vectors: whether weight decay acts on norms, biases and embeddings too.
        layer_decay: how much slower each block of a transformer learns than the one after it.
        labeled_loss: of the images with true labels.
    """

    learning_rate: float
    head_factor: float
    optimizer: OptimizerKind = field(default_factory=SGD)
    stage4_as_head: bool = False
    decay_vectors: bool = True
    layer_decay: float = 1.0
    labeled_loss: LabeledLoss = field(default_factory=LabeledLoss)
    repeated_blocks: bool = False


def learner_of(settings: LearnerSettings, network: Network) -> Learner:
    """The network with its optimizer. Raises RecipeError if it has no layers for layer_decay."""
    rate_factor = faster_heads(settings.head_factor, stage4_as_head=settings.stage4_as_head)
    if settings.repeated_blocks:
        rate_factor = faster_blocks(rate_factor)
    if settings.layer_decay != 1:
        if not isinstance(network.backbone, Transformer):
            raise RecipeError(
                f"training.layer_decay works with plain transformers; the backbone is {network.backbone.name}. Remove it."
            )
        blocks = len(network.backbone.body.blocks)
        rate_factor = slower_layers(rate_factor, settings.layer_decay, blocks=blocks)
    return Learner(
        name="network",
        module=network,
        learning_rate=settings.learning_rate,
        optimizer=settings.optimizer,
        rate_factor=rate_factor,
        decays=all_decay if settings.decay_vectors else only_matrices,
    )


def second_network(
    network: Network, spec: NetworkSpec, *, seed: Sequence[int], drop_path: float = 0.0, whole: bool = False
) -> Network:
    """A network as another, prepared for training alike, with other weights at the beginning.

    Its heads are drawn from the seed; its backbone is a copy. Other random numbers are not moved.

    Args:
        spec: of the network.
        seed: of the round.
        whole: the backbone is drawn, too, since that of the other begins from random numbers.
    """
    second = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        entropy = np.random.SeedSequence((*seed, SECOND_DRAWS))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
        drawn = spec.build(drop_path).state_dict()
    with torch.no_grad():
        for name, value in second.state_dict().items():
            # The normalization of images is no weight: it is that of the network.
            if name not in NORMALIZATION and (whole or not name.startswith(BACKBONE)):
                value.copy_(drawn[name])
    return second
