"""ClassMix (Olsson et al., WACV 2021): paste half of the classes of an image, and learn all pixels.

Two points are not as released. The teacher labels in eval mode, as everywhere here, not with the batch's statistics. And
the share of confident pixels that scales the loss is that of each mixed image, not of the batch, so that micro-batches
and processes add up. The release mixes the teacher's probabilities and takes the largest; to mix its classes is the
same, since each pixel is of one image.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from darseg.data.views import Views
from darseg.methods.consistency import (
    Consistency,
    OnlineState,
    Prepared,
    Supervision,
    learned_classes,
    scaled_view,
    strong_batches,
    unlabeled_method,
)
from darseg.training.method import Learner, Method


def classmix(learner: Learner, how: Consistency, labeled: Supervision, *, seed: Sequence[int]) -> Method:
    """CE(labeled) + weight · mean over strong views of CE(all pixels against the weak one's labels).

    The loss of an image is multiplied by the share of its pixels that are accepted. Arguments as of `fixmatch`.
    """

    def prepare(state: OnlineState, network: nn.Module, views: Views) -> Prepared:
        return strong_batches(state, network, views, how=how, seed=seed, labeled=scaled_view)

    return unlabeled_method(learner, how, labeled, prepare=prepare, cost=learned_classes(labeled))
