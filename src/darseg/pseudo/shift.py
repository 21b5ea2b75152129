"""The class shares of images from another place, estimated from a network's probabilities alone.

Letters: N pixels, K classes. Source: Saerens, Latinne, Decaestecker, "Adjusting the outputs of a classifier to new a
priori probabilities", Neural Computation 2002.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.errors import DataError
from darseg.pseudo.align import checked_scores
from darseg.pseudo.decisions import BLOCK
from darseg.pseudo.distribution import ClassDistribution

GAP = 1e-6
"""Largest distance from the highest likelihood, in nats per pixel: far below what 1,000 images can tell apart."""

STEPS = 2000
"""Steps after which the search is given up; networks need about 10 to 300."""


@dataclass(frozen=True, eq=False)
class Shift:
    """Class shares that explain the probabilities of a network best.

    Attributes:
        share: float64 [K], the estimated shares.
        trained: float64 [K], the shares that the network was trained with.
        steps: of the search.
        converged: whether no shares can be more likely by more than `GAP` nats per pixel.
        pixels: size of the sample.
    """

    share: NDArray[np.float64]
    trained: NDArray[np.float64]
    steps: int
    converged: bool
    pixels: int

    def __post_init__(self) -> None:
        for name in ("share", "trained"):
            share = ClassDistribution(getattr(self, name)).share  # checks it
            object.__setattr__(self, name, share)
        if len(self.share) != len(self.trained):
            raise DataError(
                f"A shift has {len(self.share)} estimated and {len(self.trained)} training shares; expected as many."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return {
            "share": self.share.tolist(),
            "trained": self.trained.tolist(),
            "steps": self.steps,
            "converged": self.converged,
            "pixels": self.pixels,
        }


def estimate_shift(scores_NK: ArrayLike, trained: ArrayLike) -> Shift:
    """Estimate the class shares of pixels from a network's scores, by expectation maximization.

    It assumes that pixels of a class look as they did in training and only the shares of the classes have changed, and
    that the probabilities are calibrated: of the pixels with probability 0.3, 30 % are of that class. Networks trained
    on few labels are not; their error becomes an error of the shares. Only the set of pixels counts, not their order.

    Args:
        scores_NK: logits or log-probabilities of pixels, a constant per pixel has no effect; float [N, K].
        trained: shares of the classes among the labeled pixels of training; [K], sum 1. A class with the share 0 gets
            the share 0.

    Returns:
        the shares of highest likelihood. The likelihood has one maximum, and `converged` says whether it was reached.

    Raises DataError: scores or shares cannot be used.

    >>> scores = np.log([[0.9, 0.1]] * 3 + [[0.2, 0.8]])
    >>> estimate_shift(scores, [0.5, 0.5]).share.round(2).tolist()
    [0.97, 0.03]
    """
    prior = ClassDistribution(np.array(trained, np.float64)).share
    scores = checked_scores(scores_NK, len(prior))
    ratios_nK = _ratios(scores, prior)
    share, steps, converged = prior.copy(), 0, False
    while not converged and steps < STEPS:
        total = np.zeros(len(share))
        for block in _blocks(ratios_nK):
            total += block.T @ (1 / (block @ share.astype(np.float32)))
        factor = total / len(scores)
        # The likelihood is concave, so its maximum lies below this tangent: Σ q_k (factor_k - 1) at most.
        converged = bool(factor.max() - 1 <= GAP)
        share = share * factor
        share /= share.sum()  # 1 except for rounding
        steps += 1
    return Shift(share, trained=prior, steps=steps, converged=converged, pixels=len(scores))


def _ratios(scores: NDArray[np.floating], prior: NDArray[np.float64]) -> NDArray[np.float32]:
    """Probabilities divided by the training shares, a factor per pixel aside, float32 [N, K]."""
    ratios, unusable = np.empty(scores.shape, np.float32), 0
    with np.errstate(divide="ignore"):
        offset = np.where(prior > 0, -np.log(prior), -np.inf)
    for start in range(0, len(scores), BLOCK):
        block = scores[start : start + BLOCK].astype(np.float64)
        unusable += np.count_nonzero(np.isnan(block.sum(axis=1)) | ~np.isfinite(block.max(axis=1)))
        with np.errstate(invalid="ignore"):
            block += offset
            ratios[start : start + BLOCK] = np.exp(block - block.max(axis=1, keepdims=True))
    if unusable:
        raise DataError(
            f"The scores of {unusable} of {len(scores)} pixels are NaN or infinite. Predict again; if they are the same, "
            "the network has diverged."
        )
    return ratios


def _blocks(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]
