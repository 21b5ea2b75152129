"""What the label phase of an online round reports: how much is accepted of which class, how right.

All figures are sums over pixels, so that they add up over processes; `with_shares` in run/online.py divides them. Those
by class, and those of the student, are of every `LOOK_EVERY`th step only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.methods.acceptance import Accepted
from darseg.methods.teacher import in_eval_mode
from darseg.training.method import Figures

INSIDE, ACCEPTED, KNOWN, RIGHT = "pixels_inside", "pixels_accepted", "pixels_known", "pixels_right"
"""Pixels of the weak views that are not padding, of those the accepted ones, of those with a known truth, of those with
the right label."""

ACCEPTED_BY, KNOWN_BY, RIGHT_BY = "accepted_by_class", "known_by_class", "right_by_class"
"""The same by the class of the label, [K]."""

THRESHOLDS = "threshold_pixels_by_class"
"""Smallest accepted confidence of each class times the pixels inside, [K]."""

TRUE, TEACHER_RIGHT, STUDENT_RIGHT, AGREED = (
    "pixels_true",
    "pixels_teacher",
    "pixels_student",
    "pixels_agreed",
)
"""Pixels inside with a known truth; those that the network that labels, and that the network that learns has right; and
those inside for which both say the same. Nothing is left out for a low confidence."""

LOOK_EVERY = 10
"""Steps between looks at the student: it predicts the weak views once more, which takes about a percent of the time."""


def counts_of(views: Views, accepted: Accepted) -> Figures:
    """Pixels inside, accepted, those that the rule counts, and accepted ones known and right."""
    kept = accepted.labels != IGNORE
    counts = {INSIDE: views.inside.sum(), ACCEPTED: kept.sum()} | dict(accepted.figures)
    if views.truth is not None:
        known = kept & (views.truth != IGNORE)
        counts |= {KNOWN: known.sum(), RIGHT: (known & (accepted.labels == views.truth)).sum()}
    return counts


def counts_by_class(views: Views, accepted: Accepted, classes: int) -> Figures:
    """Accepted pixels of each class, those known and right, and the thresholds if the rule has some."""
    counts = {ACCEPTED_BY: _by_class(accepted.labels, classes)}
    if accepted.thresholds is not None:
        counts[THRESHOLDS] = accepted.thresholds * views.inside.sum()
    if views.truth is not None:
        known = accepted.labels.masked_fill(views.truth == IGNORE, IGNORE)
        right = known.masked_fill(known != views.truth, IGNORE)
        counts |= {KNOWN_BY: _by_class(known, classes), RIGHT_BY: _by_class(right, classes)}
    return counts


def student_counts(network: nn.Module, views: Views, accepted: Accepted) -> Figures:
    """How the network that learns answers the weak views, compared with what labels them."""
    with in_eval_mode(network):
        return compared_counts(network(views.weak).main.argmax(1).to(torch.uint8), views, accepted)


def compared_counts(student: Tensor, views: Views, accepted: Accepted) -> Figures:
    """How classes of the network that learns, uint8 [B, H, W], compare with those of what labels it."""
    counts = {AGREED: (views.inside & (student == accepted.predicted)).sum()}
    if views.truth is not None:
        known = views.inside & (views.truth != IGNORE)
        counts |= {
            TRUE: known.sum(),
            TEACHER_RIGHT: (known & (accepted.predicted == views.truth)).sum(),
            STUDENT_RIGHT: (known & (student == views.truth)).sum(),
        }
    return counts


def _by_class(labels: Tensor, classes: int) -> Tensor:
    """Pixels of each class, int64 [K]; other values are left out. A GPU's host does not wait."""
    cells = labels.long().clamp(max=classes).flatten()
    counts = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, cells, torch.ones_like(cells))[:-1]
