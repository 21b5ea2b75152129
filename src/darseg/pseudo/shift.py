"""The class shares of images from another place, estimated from a network's probabilities alone.

Letters: N pixels, K classes. Sources: Saerens, Latinne, Decaestecker, "Adjusting the outputs of a classifier to new a
priori probabilities", Neural Computation 2002 (the estimate); Alexandari, Kundaje, Shrikumar, "Maximum likelihood with
bias-corrected calibration is hard-to-beat at label shift adaptation", ICML 2020 (why to correct the bias first).
"""

from __future__ import annotations

import math
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


LARGEST_BIAS = math.log(100)
"""Largest correction of a class: beyond it the network hardly knows the class."""

EVEN = 0.02
"""Largest difference between the mean probability of a class and its share, as a part of it, once the bias is corrected:
closer than the shares of a few labeled images are known."""


SETTLED = 1e-6
"""Change of the bias at which a search that is limited by `LARGEST_BIAS` has ended."""

NEWTON_STEPS = 100
"""Steps after which the bias is given up; networks need about 5 to 10."""


@dataclass(frozen=True, eq=False)
class Shift:
    """Class shares that explain the probabilities of a network best.

    Attributes:
        share: float64 [K], the estimated shares.
        trained: float64 [K], the shares that the network was trained with.
        bias: float64 [K], what was added to the scores first: it makes the mean probabilities of the reference the
            trained shares; zeros without a reference.
        corrected: whether there was a reference, and no class needed a larger bias than `LARGEST_BIAS`.
        steps: of the search.
        converged: whether no shares can be more likely by more than `GAP` nats per pixel.
        pixels: size of the sample.
    """

    share: NDArray[np.float64]
    trained: NDArray[np.float64]
    bias: NDArray[np.float64]
    corrected: bool
    steps: int
    converged: bool
    pixels: int

    def __post_init__(self) -> None:
        for name in ("share", "trained"):
            share = ClassDistribution(getattr(self, name)).share  # checks it
            object.__setattr__(self, name, share)
        bias = np.array(self.bias, np.float64)
        bias.flags.writeable = False
        object.__setattr__(self, "bias", bias)
        if not self.share.shape == self.trained.shape == bias.shape or not np.isfinite(bias).all():
            raise DataError(
                f"A shift has {len(self.share)} estimated and {len(self.trained)} training shares, and the bias "
                f"{bias.tolist()}; expected as many finite numbers of each."
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return {
            "share": self.share.tolist(),
            "trained": self.trained.tolist(),
            "bias": self.bias.tolist(),
            "corrected": self.corrected,
            "steps": self.steps,
            "converged": self.converged,
            "pixels": self.pixels,
        }


def estimate_shift(scores_NK: ArrayLike, trained: ArrayLike, reference_NK: ArrayLike | None = None) -> Shift:
    """Estimate the class shares of pixels from a network's scores, by expectation maximization.

    It assumes that pixels of a class look as they did in training and only the shares of the classes have changed, and
    that the probabilities are calibrated: of the pixels with probability 0.3, 30 % are of that class. Networks trained
    on few labels are not: they favor frequent classes, and without a reference the estimate does so even more. Only the
    set of pixels counts, not their order.

    Args:
        scores_NK: logits or log-probabilities of pixels, a constant per pixel has no effect; float [N, K].
        trained: shares of the classes among the labeled pixels of training; [K], sum 1. A class with the share 0 gets
            the share 0.
        reference_NK: scores of unlabeled pixels from where the labeled images are from. A bias per class is added to all
            scores that makes their mean probabilities the trained shares, to 2 %: no shift is found where none is.

    Returns:
        the shares of highest likelihood. The likelihood has one maximum, and `converged` says whether it was reached.

    Raises DataError: scores or shares cannot be used.

    >>> scores = np.log([[0.9, 0.1]] * 3 + [[0.2, 0.8]])
    >>> estimate_shift(scores, [0.5, 0.5]).share.round(2).tolist()
    [0.97, 0.03]
    >>> estimate_shift(scores, [0.5, 0.5], scores).share.round(2).tolist()
    [0.5, 0.5]
    """
    prior = ClassDistribution(np.array(trained, np.float64)).share
    bias, corrected = np.zeros(len(prior)), False
    if reference_NK is not None:
        bias, corrected = _matching_bias(checked_scores(reference_NK, len(prior)), prior)
    scores = checked_scores(scores_NK, len(prior))
    with np.errstate(divide="ignore"):
        ratios_NK = _exponentials(scores, np.where(prior > 0, bias - np.log(prior), -np.inf))
    share, steps, converged = prior.copy(), 0, False
    while not converged and steps < STEPS:
        factor = _mean_quotients(ratios_NK, share)
        # The likelihood is concave, so its maximum lies below this tangent: Σ q_k (factor_k - 1) at most.
        converged = bool(factor.max() - 1 <= GAP)
        share = share * factor
        share /= share.sum()  # 1 except for rounding
        steps += 1
    return Shift(
        share,
        trained=prior,
        bias=bias,
        corrected=corrected,
        steps=steps,
        converged=converged,
        pixels=len(scores),
    )


def _matching_bias(
    scores: NDArray[np.floating], share: NDArray[np.float64]
) -> tuple[NDArray[np.float64], bool]:
    """The bias with which the mean probabilities are the shares, and whether it was found.

    Newton's method: it is where the concave function sum(share · bias) - mean(log sum exp(scores + bias)) is largest.
    """
    bias, occurring = np.zeros(len(share)), share > 0
    exponentials_NK = _exponentials(scores[:, occurring], np.zeros(occurring.sum()))
    free, wanted = bias[occurring], share[occurring]
    matched = False
    for _ in range(NEWTON_STEPS):
        mean, covariance = _moments(exponentials_NK, np.exp(free))
        if (np.abs(mean - wanted) <= EVEN * wanted).all():
            matched = True
            break
        # A constant for all classes has no effect: its direction, singular otherwise, gets a curvature.
        change = np.linalg.lstsq(covariance + 1 / len(free), wanted - mean, rcond=1e-9)[0].clip(-1, 1)
        before, free = free, free + change
        free = (free - np.average(free, weights=wanted)).clip(-LARGEST_BIAS, LARGEST_BIAS)
        if np.abs(free - before).max() <= SETTLED:
            break
    bias[occurring] = free
    return bias, matched


def _moments(
    exponentials_NK: NDArray[np.float32], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean probabilities with these weights, [K], and their derivatives by log(weights), [K, K]."""
    mean = np.zeros(len(weights))
    products = np.zeros((len(weights), len(weights)))
    for start in range(0, len(exponentials_NK), BLOCK):
        block = exponentials_NK[start : start + BLOCK] * weights.astype(np.float32)
        block /= block.sum(axis=1, keepdims=True)
        mean += block.sum(axis=0, dtype=np.float64)
        products += block.T @ block
    return mean / len(exponentials_NK), (np.diag(mean) - products) / len(exponentials_NK)


def _mean_quotients(
    exponentials_NK: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean over pixels of e_k / Σ_j e_j w_j, float64 [K]."""
    total = np.zeros(len(weights))
    for start in range(0, len(exponentials_NK), BLOCK):
        block = exponentials_NK[start : start + BLOCK].astype(np.float64)  # sums in float32 are off by GAP
        total += block.T @ (1 / (block @ weights))
    return total / len(exponentials_NK)


def _exponentials(scores: NDArray[np.floating], bias: NDArray[np.float64]) -> NDArray[np.float32]:
    """exp(scores + bias), with a factor per pixel that makes the largest 1, float32 [N, K]."""
    exponentials, unusable = np.empty(scores.shape, np.float32), 0
    for start in range(0, len(scores), BLOCK):
        block = scores[start : start + BLOCK].astype(np.float64)
        unusable += np.count_nonzero(np.isnan(block.sum(axis=1)) | ~np.isfinite(block.max(axis=1)))
        with np.errstate(invalid="ignore"):
            block += bias
            exponentials[start : start + BLOCK] = np.exp(block - block.max(axis=1, keepdims=True))
    if unusable:
        raise DataError(
            f"The scores of {unusable} of {len(scores)} pixels are NaN or infinite. Predict again; if they are the same, "
            "the network has diverged."
        )
    return exponentials
