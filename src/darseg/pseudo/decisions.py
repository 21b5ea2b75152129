"""The decisions of many pixels as a function of a bias per class. Letters: N pixels, K classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

BLOCK = 1 << 15
"""Pixels processed at a time, so that a column of them stays in the processor's cache."""


@dataclass(frozen=True)
class Decisions:
    """The pixels whose decision depends on the weights, and the counts of all others.

    Attributes:
        columns: float32 [K, n], scores of undecided pixels relative to their largest.
        decided: int64 [K], pixels that have this class whatever the weights.
        limit: largest absolute bias.
    """

    columns: NDArray[np.float32]
    decided: NDArray[np.int64]
    limit: float

    @classmethod
    def of(cls, scores_NK: NDArray[np.floating], limit: float) -> Decisions:
        """Set the pixels aside whose second class cannot win: it is more than twice the limit behind.

        Raises DataError if scores are NaN or a pixel's largest score is not finite.
        """
        decided, unusable = np.zeros(scores_NK.shape[1], np.int64), 0
        undecided = [np.empty((scores_NK.shape[1], 0), np.float32)]
        for start in range(0, len(scores_NK), BLOCK):
            scores = scores_NK[start : start + BLOCK]
            wide = np.ascontiguousarray(scores.T, np.float64 if scores.dtype == np.float64 else np.float32)
            largest = wide.max(axis=0)
            unusable += np.count_nonzero(~np.isfinite(largest) | np.isnan(wide.sum(axis=0)))
            relative = (wide - largest).astype(np.float32)
            is_open = np.count_nonzero(relative >= np.float32(-2.001 * limit), axis=0) > 1
            decided += np.bincount(relative[:, ~is_open].argmax(axis=0), minlength=len(decided))
            undecided.append(relative[:, is_open])
        if unusable:
            raise DataError(
                f"The scores of {unusable} of {len(scores_NK)} pixels are NaN or infinite. Predict again; if they are "
                "the same, the network has diverged."
            )
        return cls(np.concatenate(undecided, axis=1), decided, limit)

    @property
    def pixels(self) -> int:
        """Number of pixels, decided ones too."""
        return int(self.decided.sum()) + self.columns.shape[1]

    def count(self, bias: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64 [K]: pixels of each class by argmax of scores + bias; of equal ones the first."""
        shift, counts = bias.astype(np.float32), self.decided.copy()
        for start in range(0, self.columns.shape[1], BLOCK):
            columns = self.columns[:, start : start + BLOCK]
            best, winner = columns[0] + shift[0], np.zeros(columns.shape[1], np.uint8)
            for k in range(1, len(shift)):
                score = columns[k] + shift[k]
                np.copyto(winner, k, where=score > best)
                np.maximum(best, score, out=best)
            counts += np.bincount(winner, minlength=len(shift))
        return counts

    def sweep(
        self,
        bias: NDArray[np.float64],
        low: NDArray[np.int64],
        *,
        high: NDArray[np.int64],
        reachable: NDArray[np.bool_],
        slack: int,
        anchored: bool,
    ) -> NDArray[np.float64]:
        """The bias after each reachable class in turn was moved to its share, given the others.

        Args:
            anchored: a class that has a share from `low` to `high` with bias 0 gets bias 0.
        """
        bias, classes, shape = bias.copy(), len(bias), self.columns.shape
        later = np.empty(shape, np.float32)  # best score of all classes after k
        later[-1] = -np.inf
        for k in range(classes - 2, -1, -1):
            np.add(self.columns[k + 1], np.float32(bias[k + 1]), out=later[k])
            np.maximum(later[k], later[k + 1], out=later[k])
        earlier = np.full(shape[1], -np.inf, np.float32)
        for k in range(classes):
            if reachable[k]:
                margin = np.maximum(earlier, later[k]) - self.columns[k]  # won with a larger bias than this
                plain = int(np.count_nonzero(margin < np.float32(0 if anchored else bias[k])))
                wanted = min(max(plain, low[k] - self.decided[k]), high[k] - self.decided[k])
                if anchored and wanted == plain:
                    bias[k] = 0
                elif anchored or abs(wanted - plain) > slack:
                    bias[k] = _bias_for(margin, int(wanted), self.limit)
            np.maximum(earlier, self.columns[k] + np.float32(bias[k]), out=earlier)
        return bias


def _bias_for(margin: NDArray[np.float32], count: int, limit: float) -> float:
    """The bias, at most `limit` in size, that is above `count` of the margins, or as many as ties allow."""
    if not 0 <= count <= len(margin):
        return math.copysign(limit, count)
    if count in (0, len(margin)):
        edge = float(margin.max()) + 1e-3 if count else float(margin.min(initial=math.inf)) - 1e-3
        return min(max(edge, -limit), limit)
    parts = np.partition(margin, (count - 1, count))
    below, above = float(parts[count - 1]), float(parts[count])
    if below == above:  # ties: all of them or none
        tied = below
        smaller, larger = margin[margin < tied], margin[margin > tied]
        if count - len(smaller) <= len(margin) - len(larger) - count:
            below, above = float(smaller.max(initial=tied - 1)), tied
        else:
            below, above = tied, float(larger.min(initial=tied + 1))
    return min(max((below + above) / 2, -limit), limit)
