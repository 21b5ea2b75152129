"""CutMix mean teacher (French et al., BMVC 2020): match a teacher's probabilities on mixed images.

Two points are not as released. A box is not inverted at random: both images of a pair are mixed with each other, so
inverted boxes would draw from the same distribution. And the share of confident pixels that scales the loss is that of
each mixed image, not of the batch, so that micro-batches and processes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from darseg.data.batches import Batch
from darseg.data.views import Views
from darseg.methods.acceptance import Predicted, accept
from darseg.methods.consistency import (
    Consistency,
    OnlineState,
    Prepared,
    Supervision,
    mixed_with,
    mixing_masks,
    predict_weak,
    scaled_view,
    unlabeled_method,
)
from darseg.training.loss import squared_error
from darseg.training.method import Figures, Learner, Method


def mean_teacher(learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(labeled) + weight · squared difference of probabilities on mixed strong views.

    The teacher predicts the weak views; its logits are mixed like the images, then become probabilities. The loss of an
    image is multiplied by the share of its pixels that are accepted. Arguments as of `fixmatch`.
    """

    def prepare(state: OnlineState, network: nn.Module, views: Views) -> Prepared:
        logits = predict_weak(state, network, views)
        accepted = accept(
            how.accept,
            state.acceptance,
            Predicted(logits.softmax(1), views.inside, views.positions, seed=seed),
        )
        masks = mixing_masks(how.mixing, views, accepted, classes=logits.shape[1], seed=seed)
        batches = [
            replace(
                scaled_view(views, accepted, view, mask=mask), targets=mixed_with(logits, mask).softmax(1)
            )
            for view, mask in enumerate(masks)
        ]
        return accepted, batches

    def cost(network: Callable, unlabeled: Sequence[Batch]) -> tuple[Tensor, Figures]:
        consistency = torch.stack(
            [squared_error(network(view.images).main, view) for view in unlabeled]
        ).mean()
        return consistency, {"loss_unlabeled": consistency.detach()}

    return unlabeled_method(learner, how, labeled, prepare=prepare, cost=cost)
