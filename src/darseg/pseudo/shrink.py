"""Class shares between those of the labeled images and a network's own calibrated estimate.

Few labeled images say little about a rare class. The network has seen all unlabeled images, but names rare classes too
seldom; images with known truth say by how much. Each class gets the mean of both logarithms, weighted by how certain they
are. Letters: N images with known truth, K classes.

Sources: ratio estimation (Cochran, Sampling Techniques, 1977, chapter 6); the mean weighted by inverse variances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.errors import DataError
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labeled_shares import LabeledShares, log_deviation

HALVINGS = 100
"""Of the interval in which the factor lies that makes the shares add up to 1: then it is exact."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """How much more often classes occur than a network predicts them, on held-out images.

    Attributes:
        ratio: float64 [K], true pixels divided by predicted ones; NaN for a class that is never true or never predicted.
        deviation: float64 [K], standard deviation of the ratio's logarithm; inf if it is not known.
        images: how many with known truth there are.
    """

    ratio: NDArray[np.float64]
    deviation: NDArray[np.float64]
    images: int

    @classmethod
    def of(cls, true_NK: ArrayLike, predicted_NK: ArrayLike) -> Calibration:
        """The calibration from true and predicted pixels, int64 [N, K]; the order has no effect."""
        counts = np.stack([np.asarray(true_NK), np.asarray(predicted_NK)], axis=1)
        counts = counts[counts.any(axis=(1, 2))]
        counts = counts[np.lexsort(counts.reshape(len(counts), -1).T)].astype(np.float64)
        true, predicted = counts.sum(axis=0)
        known = (true > 0) & (predicted > 0)
        ratio = np.divide(true, predicted, out=np.full(len(true), np.nan), where=known)
        influence = counts[:, 0] / np.maximum(true, 1) - counts[:, 1] / np.maximum(predicted, 1)
        images = np.count_nonzero(counts.any(axis=1), axis=0)
        deviation = np.where(known, log_deviation(influence, images), np.inf)
        return cls(ratio, deviation=deviation, images=len(counts))


@dataclass(frozen=True, eq=False)
class ShrunkShares:
    """Labeled class shares, shrunk toward a network's estimate.

    Attributes:
        share: float64 [K], sum 1; each between `labeled` and `network`.
        labeled, network: float64 [K], sum 1; `network` is the labeled share of a class that it cannot estimate.
        labeled_deviation, network_deviation: float64 [K], of their logarithms; inf if not known.
        images: those with known truth that the network's estimate is calibrated on.

    Raises DataError if the fields contradict each other.
    """

    share: NDArray[np.float64]
    labeled: NDArray[np.float64]
    network: NDArray[np.float64]
    labeled_deviation: NDArray[np.float64]
    network_deviation: NDArray[np.float64]
    images: int

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            array = np.array(getattr(self, field.name), np.float64)
            if field.name.endswith("deviation"):
                if array.shape != np.shape(self.share) or not (array >= 0).all():
                    raise DataError(
                        f"{field.name} of shrunk class shares is {array.tolist()}; expected a number of at least 0 for "
                        f"each of {np.size(self.share)} classes."
                    )
            else:
                array = ClassDistribution(array).share.copy()
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        if not len(self.share) == len(self.labeled) == len(self.network):
            raise DataError("Shrunk, labeled and estimated class shares must be of the same classes.")

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes, an unknown deviation is None."""
        described: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            if isinstance(value, int)
            else [number if math.isfinite(number) else None for number in value.tolist()]
            for name, value in described.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ShrunkShares:
        """The shares that `to_json` described. Raises DataError for anything else."""
        try:
            arrays = {
                field.name: np.array(
                    [math.inf if number is None else float(number) for number in content[field.name]]
                )
                for field in fields(cls)[:5]
            }
            return cls(**arrays, images=int(content["images"]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"These are not shrunk class shares ({type(error).__name__}: {error}). The file is damaged or of another "
                "kind; label again."
            ) from error


def shrink_shares(labeled: LabeledShares, calibration: Calibration, predicted: ArrayLike) -> ShrunkShares:
    """Shrink the labeled shares toward the network's estimate, predicted share × calibration ratio.

    With variances v of the logarithms, log s_k = (log l_k · v_network + log n_k · v_labeled) / (v_network + v_labeled).
    All shares are then multiplied by the factor with which they add up to 1, each as far as it stays between both.

    Args:
        predicted: shares of the network's decisions on the unlabeled images, [K].
    """
    decided = np.asarray(predicted, np.float64)
    first, estimate = labeled.share, decided * calibration.ratio
    known = (first > 0) & (estimate > 0) & np.isfinite(calibration.deviation)
    network = first.copy()
    if known.any():
        network[known] = estimate[known] * (first[known].sum() / estimate[known].sum())
    variance, of_network = labeled.deviation**2, np.where(known, calibration.deviation, np.inf) ** 2
    weight = np.ones(len(first))  # of the labeled share
    weight[known] = 0.0
    both = known & np.isfinite(variance)
    total = np.where(both, variance + of_network, 1)
    weight[both] = np.where(total[both] > 0, of_network[both] / np.where(total > 0, total, 1)[both], 1)
    logs = [np.log(np.where(first > 0, share, 1)) for share in (first, network)]
    mean = np.where(first > 0, np.exp(weight * logs[0] + (1 - weight) * logs[1]), 0)
    return ShrunkShares(
        share=_adding_up(mean, np.minimum(first, network), np.maximum(first, network)),
        labeled=first,
        network=network / network.sum(),
        labeled_deviation=labeled.deviation,
        network_deviation=np.where(known, calibration.deviation, np.inf),
        images=calibration.images,
    )


def _adding_up(
    shares: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The shares times a factor, each from `low` to `high`, so that their sum is 1.

    The sum of `low` must be at most 1, that of `high` at least 1.
    """
    if abs(shares.sum() - 1) < 1e-12:
        return shares / shares.sum()
    occurs = shares > 0
    least = float((low[occurs] / shares[occurs]).min())
    most = float((high[occurs] / shares[occurs]).max())
    for _ in range(HALVINGS):
        factor = (least + most) / 2
        if np.clip(factor * shares, low, high).sum() < 1:
            least = factor
        else:
            most = factor
    fitted = np.clip(most * shares, low, high)
    return fitted / fitted.sum()
