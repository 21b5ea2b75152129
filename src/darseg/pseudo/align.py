"""Class weights that give the decisions of a network the class shares of the labeled pixels.

Of K classes, weights w > 0 are found so that argmax p·w has the wanted shares over a sample of pixels. Since
softmax(z + log w) is p·w, renormalized, the weights are a bias of the logits. Letters: N pixels, K classes.

Source: prior correction (Saerens et al. 2002), logit adjustment (Menon et al. 2021); here for hard shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.errors import DataError, RecipeError, faults
from darseg.pseudo.alignment import Alignment, is_weak
from darseg.pseudo.decisions import Decisions
from darseg.pseudo.distribution import SHARE_TOLERANCE, check_class_count
from darseg.pseudo.labeling import BOUND, check_bound, check_strength

TOLERANCE = 2e-4
"""How far a share may be from its target, besides two pixels: below the error of a share in a sample of 2^20 pixels."""

EASED = (1, 4, 16)
"""Factors of the tolerance that are tried one after the other with float16 scores: the next pixels that a class can gain
or lose may be many with equal scores."""

SWEEPS = 200
"""Sweeps over all classes before a search is given up; networks need about 5 to 40."""

SETTLED = 1e-3
"""Largest change of a bias in the last sweep, with an interval: every bias is then the smallest that suffices."""

AT_BOUND = 0.999
"""Part of the largest bias at which a class counts as being at the bound."""

RELEASES = 2
"""How often a class at the bound may move again, if it has its share there once the others have theirs."""

SMALLEST_STEP = 0.125
"""Least part of a sweep's changes that is made."""

STALLED = 20
"""Sweeps without any progress after which a search is given up."""


def align(
    scores_NK: ArrayLike,
    target: ArrayLike,
    *,
    bound: float = BOUND,
    strength: float = 1.0,
    tolerance: float = TOLERANCE,
    interval: tuple[ArrayLike, ArrayLike] | None = None,
) -> Alignment:
    """Find class weights w so that the decisions argmax p·w have the target shares.

    A class that is never predicted, that has the target 0, or whose weight would leave [1/bound, bound] is out of
    reach: its weight is 1, and the other classes share the remaining pixels in proportion to their targets. The
    logarithms of their weights, averaged by target, are 0, unless a class has its share just at the bound. Only the set
    of pixels counts, not their order.

    Args:
        scores_NK: logits or log-probabilities of pixels, a constant per pixel has no effect; float [N, K].
        target: wanted shares, for example those of the labeled pixels; [K], sum 1.
        bound: largest weight and reciprocal of the smallest, above 1.
        strength: power of the weights, from 0 to 1.
        tolerance: largest difference between a share and its target, besides two pixels; with float16 scores, of which
            many may be equal, 4 times that if need be, and then 16 times.
        interval: lowest and highest share of each class, [K] each, around `target`. A class whose share is inside
            keeps its weight of 1, and the others move only to the ends of their intervals. Weights are not rescaled.

    Returns:
        the alignment; with `converged` False and weights of 1 if fewer than two or less than half of the wanted classes
        are within reach, or if so many pixels have equal scores that the shares cannot be reached.

    Raises:
        DataError: scores or shares cannot be used.
        RecipeError: bound, strength or tolerance is out of range.

    >>> align(np.array([[2.0, 0], [1, 0], [0.5, 0], [0, 1]]), [0.5, 0.5]).weights.round(2).tolist()
    [0.69, 1.45]
    """
    [alignment] = align_by_strengths(
        scores_NK, target, bound=bound, strengths=[strength], tolerance=tolerance, interval=interval
    )
    return alignment


def align_by_strengths(
    scores_NK: ArrayLike,
    target: ArrayLike,
    *,
    bound: float,
    strengths: Sequence[float],
    tolerance: float = TOLERANCE,
    interval: tuple[ArrayLike, ArrayLike] | None = None,
) -> list[Alignment]:
    """`align` for each strength; the weights are searched once, since strength is only their power."""
    for strength in strengths:
        check_settings(bound, strength, tolerance)
    wanted = _Wanted.checked(target, interval)
    scores = checked_scores(scores_NK, len(wanted.share))
    decisions = Decisions.of(scores, math.log(bound))
    plain = decisions.count(np.zeros(len(wanted.share)))
    reachable = (plain > 0) & (wanted.share > 0)
    slacks = [
        int(factor * tolerance * decisions.pixels)
        for factor in (EASED if scores.dtype == np.float16 else (1,))
    ]
    result, reachable = _search_eased(decisions, wanted, slacks=slacks, reachable=reachable)
    if is_weak(reachable, wanted.share):
        result = replace(result, converged=False)
    bias = result.bias if result.converged else np.zeros(len(wanted.share))
    full = (decisions.count(bias) if result.converged else plain) / decisions.pixels
    aim = wanted.share
    if result.converged:
        rest = (1 - full[~reachable].sum()) / wanted.share[reachable].sum()
        aim = np.where(reachable & wanted.exact, wanted.share * rest, full)
    return [
        Alignment(
            weights=np.exp(strength * bias),
            reachable=reachable,
            target=aim,
            reached=full if strength == 1 else decisions.count(strength * bias) / decisions.pixels,
            iterations=result.sweeps,
            converged=result.converged,
            plain=plain / decisions.pixels,
            strength=float(strength),
            bound=float(bound),
            pixels=decisions.pixels,
        )
        for strength in strengths
    ]


@dataclass(frozen=True)
class _Wanted:
    """Wanted shares and their interval, float64 [K] each; `exact` if both ends are the share itself."""

    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    exact: bool

    @classmethod
    def checked(cls, target: ArrayLike, interval: tuple[ArrayLike, ArrayLike] | None) -> _Wanted:
        share = _checked_shares(target, "target")
        check_class_count(len(share))
        if abs(share.sum() - 1) > SHARE_TOLERANCE:
            raise DataError(
                f"The target shares add up to {share.sum():g}; expected 1. Divide them by their sum."
            )
        if interval is None:
            return cls(share, low=share, high=share, exact=True)
        low, high = (_checked_shares(end, "interval") for end in interval)
        if len(low) != len(share) or len(high) != len(share):
            raise DataError(
                f"The interval has {len(low)} lowest and {len(high)} highest shares, but the target has {len(share)}. "
                "Give one of each per class."
            )
        outside = np.flatnonzero(
            (share < low - SHARE_TOLERANCE) | (share > high + SHARE_TOLERANCE) | (low > high)
        )
        if len(outside):
            lines = [f"class {k}: {share[k]:g} is not in [{low[k]:g}, {high[k]:g}]" for k in outside]
            raise DataError(faults("Target shares must lie in their intervals", lines))
        return cls(share, low=low, high=high, exact=False)

    def ends(
        self, counts: NDArray[np.int64], *, reachable: NDArray[np.bool_], clamped: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lowest and highest number of pixels of each class, int64 [K] each, given those of the others.

        Free classes share what classes out of reach and clamped ones leave, in proportion to their targets.
        """
        free, pixels = reachable & ~clamped, counts.sum()
        low, high = counts.copy(), counts.copy()
        for group, among in ((free, free), (clamped, reachable)):
            if group.any():
                factor = (pixels - counts[~among].sum()) / self.share[among].sum()
                low[group] = _whole(self.low[group] * factor, whole=self.exact and group is free)
                high[group] = low[group] if self.exact else np.rint(self.high[group] * factor)
        return low, high


@dataclass(frozen=True)
class _Result:
    """Where a search ended: the bias, float64 [K], and the classes that are at the bound, bool [K]."""

    bias: NDArray[np.float64]
    leaving: NDArray[np.bool_]
    converged: bool
    sweeps: int


def _search_eased(
    decisions: Decisions, wanted: _Wanted, *, slacks: Sequence[int], reachable: NDArray[np.bool_]
) -> tuple[_Result, NDArray[np.bool_]]:
    """`_search_reachable` with the first of the slacks that converges."""
    sweeps = 0
    for slack in slacks:
        result, within = _search_reachable(decisions, wanted, slack=slack, reachable=reachable)
        sweeps += result.sweeps
        if result.converged or within.sum() < 2:
            break
    return replace(result, sweeps=sweeps), within


def _search_reachable(
    decisions: Decisions, wanted: _Wanted, *, slack: int, reachable: NDArray[np.bool_]
) -> tuple[_Result, NDArray[np.bool_]]:
    """Search until no class leaves, and the classes within reach, bool [K]; those that leave get bias 0."""
    bias, sweeps = np.zeros(len(wanted.share)), 0
    while reachable.sum() >= 2:
        result = _search(decisions, wanted, slack=slack, reachable=reachable, bias=bias)
        sweeps += result.sweeps
        if not result.leaving.any():
            return replace(result, sweeps=sweeps), reachable
        reachable = reachable & ~result.leaving
        bias = np.where(reachable, result.bias, 0.0)
    return _Result(bias, leaving=np.zeros_like(reachable), converged=False, sweeps=sweeps), reachable


def _search(
    decisions: Decisions,
    wanted: _Wanted,
    *,
    slack: int,
    reachable: NDArray[np.bool_],
    bias: NDArray[np.float64],
) -> _Result:
    """Move one class after the other to its share until all have theirs, up to `slack` pixels.

    A class that comes to the bound is held there, and the others share what it leaves; in the end it leaves.

    It is coordinate ascent on the concave function sum(target · bias) - mean(max(scores + bias)), whose gradient is
    the difference between wanted and given shares.
    """
    limit = decisions.limit
    clamped, releases = np.zeros(len(bias), np.bool_), np.zeros(len(bias), int)
    bias = _centered(bias, wanted, reachable).clip(-limit, limit)
    least, since, change, step = math.inf, 0, float(np.abs(bias).max()), 1.0
    slack += not reachable.all()  # their pixels change with the scale, in steps
    for sweeps in range(SWEEPS + 1):
        free, counts = reachable & ~clamped, decisions.count(bias)
        low, high = wanted.ends(counts, reachable=reachable, clamped=clamped)
        missing, surplus = low - counts > slack, counts - high > slack
        off = free & (missing | surplus)
        if not off.any() and (wanted.exact or change <= SETTLED):
            back = clamped & np.where(bias > 0, surplus, missing) & (releases < RELEASES)
            if not back.any():
                return _Result(bias, leaving=clamped, converged=True, sweeps=sweeps)
            clamped, releases, least = clamped & ~back, releases + back, math.inf
            continue
        distance = np.maximum(low - counts, counts - high)[off].sum() + change
        if distance >= least and not free.all():
            step = max(
                step / 2, SMALLEST_STEP
            )  # targets then depend on the decisions, so that a sweep may overshoot
        least, since = (distance, 0) if distance < least else (least, since + 1)
        if since > STALLED:
            break
        before = bias
        bias = decisions.sweep(bias, low, high=high, reachable=free, slack=slack, anchored=not wanted.exact)
        bias = _centered(before + step * (bias - before), wanted, free).clip(-limit, limit)
        change = float(np.abs(bias - before).max())
        hits = free & (np.abs(bias) >= AT_BOUND * limit)
        if hits.any():
            bias[hits] = np.copysign(limit, bias[hits])
            clamped, least = clamped | hits, math.inf
    return _Result(bias, leaving=clamped, converged=False, sweeps=sweeps)


def _centered(bias: NDArray[np.float64], wanted: _Wanted, free: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The bias with mean 0 over free classes, weighted by target.

    With an interval it is unchanged, because bias 0 has a meaning there.
    """
    if not wanted.exact or not free.any():
        return bias
    return np.where(free, bias - np.average(bias[free], weights=wanted.share[free]), bias)


def _whole(counts: NDArray[np.float64], *, whole: bool) -> NDArray[np.float64]:
    """Counts rounded; with `whole` so that their sum is kept, by the largest remainders."""
    if not whole:
        return np.rint(counts)
    floor = np.floor(counts + 1e-9)
    order = np.argsort(floor - counts, kind="stable")
    floor[order[: round(counts.sum() - floor.sum())]] += 1
    return floor


def checked_scores(scores_NK: ArrayLike, classes: int) -> NDArray[np.floating]:
    """The scores as an array, [N, K]. Raises DataError for another shape or type."""
    scores = np.asarray(scores_NK)
    if scores.dtype.kind != "f" or scores.ndim != 2 or scores.shape[1] != classes:
        raise DataError(
            f"The scores are {scores.dtype} {list(scores.shape)}, and the target has {classes} classes. Expected floats "
            f"[N, {classes}]."
        )
    if not len(scores):
        raise DataError("There are no pixels to align. Give the scores of at least one pixel.")
    return scores


def _checked_shares(shares: ArrayLike, name: str) -> NDArray[np.float64]:
    values = np.array(shares, np.float64)
    if values.ndim != 1:
        raise DataError(f"The {name} shares have shape {list(values.shape)}; expected one number per class.")
    unusable = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(unusable):
        lines = [f"class {k}: {values[k]}" for k in unusable]
        raise DataError(faults(f"The {name} shares must be finite and not negative", lines))
    return values


def check_settings(bound: float, strength: float, tolerance: float = TOLERANCE) -> None:
    """Raise RecipeError, naming all that are out of range."""
    lines = []
    for name, check, value in (("bound", check_bound, bound), ("strength", check_strength, strength)):
        try:
            check(value)
        except ValueError as error:
            lines.append(f"{name}: found {value}; {error}")
    if not 0 <= tolerance < 1:
        lines.append(f"tolerance: found {tolerance}; should be at least 0 and below 1")
    if lines:
        raise RecipeError(faults("These alignment settings cannot work", lines))
