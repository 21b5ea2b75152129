"""UniMatch (Yang et al., CVPR 2023) and V2 (TPAMI 2025): FixMatch with two views, features dropped.

What is dropped is drawn by position and travels with the batch, so that micro-batches, processes and restarts change
nothing; the network multiplies its feature maps with it (`Network.forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from darseg.data.batches import Batch
from darseg.data.views import Views
from darseg.methods.consistency import (
    Consistency,
    OnlineState,
    Prepared,
    Supervision,
    fixmatch,
    strong_batches,
    unlabeled_method,
)
from darseg.methods.draws import uniform
from darseg.model.network import Network
from darseg.training.loss import supervised
from darseg.training.method import Figures, Labeled, Learner, Method, Streamed

DROPPED = 0.5
"""Share of the channels that are dropped; the others are multiplied by 1 / (1 - DROPPED)."""

CHANNELS, SPARED = 101, 102
"""Last numbers of the seeds that draw channels and spared images: no strong view has them."""


def unimatch(learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(labeled) + weight · (½ CE of the strong views + ½ CE of the weak view, features dropped).

    The first is the mean over the strong views. Both learn the labels of the weak view; those of the dropped features are
    not mixed. The published loss is half of this. Arguments as of `fixmatch`.
    """
    channels = _channels_of(learner)

    def prepare(state: OnlineState, network: nn.Module, views: Views) -> Prepared:
        accepted, batches = strong_batches(state, network, views, how=how, seed=seed)
        dropped = Batch(
            images=views.weak,
            labels=accepted.labels,
            ids=views.ids,
            feature_masks=dropout_masks(channels, views.positions, seed=seed),
            divisor=views.inside.sum(),
        )
        return accepted, [dropped, *batches]

    def cost(network: Callable, unlabeled: Sequence[Batch]) -> tuple[Tensor, Figures]:
        dropped, *strong = unlabeled
        views = torch.stack([supervised(network, view, labeled.auxiliary_weight) for view in strong]).mean()
        features = supervised(network, dropped, labeled.auxiliary_weight)
        figures = {"loss_unlabeled": views.detach(), "loss_features": features.detach()}
        return 0.5 * views + 0.5 * features, figures

    return unlabeled_method(learner, how, labeled, prepare=prepare, cost=cost)


def unimatch_v2(learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(labeled) + weight · mean over two strong views of CE, with complementary channels dropped.

    A channel that one view keeps, doubled, is zero in the other; half of the images keep all. The published loss is half
    of this. Arguments as of `fixmatch`.
    """
    channels = _channels_of(learner)
    plain = fixmatch(learner, how, labeled, seed=seed)

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
        views, made = streamed[1], plain.label(state, network, streamed, step)
        assert isinstance(views, Views)
        batch, first, second = made.batches
        masks = complementary_masks(channels, views.positions, seed=seed)
        kept, others = (
            replace(view, feature_masks=of) for view, of in zip((first, second), masks, strict=True)
        )
        return replace(made, batches=[batch, kept, others])

    return replace(plain, label=label)


def dropout_masks(channels: Sequence[int], positions: Tensor, *, seed: Sequence[int]) -> tuple[Tensor, ...]:
    """Factors of the channels of each feature map, float32 [B, C]: 0, or 2 for those that are kept.

    As Dropout2d(0.5) has them, drawn for each image, feature map and channel.

    Args:
        channels: C of each feature map.
        positions: int64 [B], of the images in their stream.
        seed: of the round.
    """
    return tuple(
        _factors(width, positions, seed=(*seed, CHANNELS, level)) for level, width in enumerate(channels)
    )


def complementary_masks(
    channels: Sequence[int], positions: Tensor, *, seed: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Factors of the channels for two views, float32 [B, C] for each feature map; they add up to 2.

    Maps of equal widths, as a transformer's, share one mask. One image of each pair of neighbors in the stream, drawn at
    random, is spared: its factors are 1. Arguments as of `dropout_masks`.
    """
    alike = len(set(channels)) == 1
    spared = spared_images(positions, seed=seed)[:, None]
    drawn = dropout_masks(channels[:1] if alike else channels, positions, seed=seed)
    first = tuple(mask.masked_fill(spared, 1.0) for mask in drawn) * (len(channels) if alike else 1)
    return first, tuple(2.0 - mask for mask in first)


def spared_images(positions: Tensor, *, seed: Sequence[int]) -> Tensor:
    """Which images keep all features, bool [B]: of positions 2n and 2n + 1 one, chosen at random."""
    even = uniform((*seed, SPARED), positions // 2) < 0.5
    return (positions % 2 == 0) == even


def _factors(width: int, positions: Tensor, *, seed: Sequence[int]) -> Tensor:
    draws = uniform(seed, positions[:, None], torch.arange(width, device=positions.device))
    return (draws >= DROPPED).float() / (1 - DROPPED)


def _channels_of(learner: Learner) -> Sequence[int]:
    network = learner.module
    assert isinstance(network, Network)
    return network.backbone.channels
