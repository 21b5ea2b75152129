"""Class weights that give the decisions of a network the class shares of the labeled pixels.

Of K classes, weights w > 0 are found so that argmax p·w has the wanted shares over a sample of pixels. Since
softmax(z + log w) is p·w, renormalized, the weights are a bias of the logits. Letters: N pixels, K classes.

Source: prior correction (Saerens et al. 2002), logit adjustment (Menon et al. 2021); here for hard shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darseg.errors import DataError, RecipeError, faults
from darseg.pseudo.decisions import Decisions
from darseg.pseudo.distribution import SHARE_TOLERANCE, check_class_count
from darseg.pseudo.labeling import BOUND, check_bound, check_strength

TOLERANCE = 2e-4
"""How far a share may be from its target, besides two pixels: below the error of a share in a sample of 2^21 pixels."""

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


@dataclass(frozen=True, eq=False)
class Alignment:
    """Class weights that move the decisions of a network to wanted class shares.

    Attributes:
        weights: float64 [K], multiply the probabilities; all 1 if nothing is aligned.
        reachable: bool [K]; False for a class that is never predicted, that has the target 0, or whose weight would
            leave [1/bound, bound]. Its weight is 1.
        target: float64 [K], shares that full strength aims at; for a class out of reach, the share that it then has.
        reached: float64 [K], shares of the decisions with these weights, in the sample.
        iterations: sweeps over all classes.
        converged: whether full strength reaches the target; if not, the weights are 1.
        strength: power of the weights: 0 leaves the decisions alone, 1 aligns them.
        bound: largest weight and reciprocal of the smallest.
        pixels: size of the sample.
        plain: float64 [K], shares of the decisions without weights, in the sample; None if not recorded.

    Raises DataError if the fields contradict each other.
    """

    weights: NDArray[np.float64]
    reachable: NDArray[np.bool_]
    target: NDArray[np.float64]
    reached: NDArray[np.float64]
    iterations: int
    converged: bool
    strength: float
    bound: float
    pixels: int
    plain: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        lines, arrays = [], {"weights": float, "reachable": bool, "target": float, "reached": float}
        if self.plain is not None:
            arrays["plain"] = float
        for name, dtype in arrays.items():
            array = np.array(getattr(self, name))
            if array.dtype != dtype or array.shape != (np.size(self.weights),):
                expected = f"{np.dtype(dtype)} [{np.size(self.weights)}]"
                lines.append(f"{name} is {array.dtype} {list(array.shape)}; expected {expected}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if lines:
            raise DataError(faults("An alignment has arrays with one entry per class", lines))
        check_class_count(len(self.weights))
        lowest, highest = (1 - SHARE_TOLERANCE) / self.bound, self.bound * (1 + SHARE_TOLERANCE)
        lines = [
            law
            for law, holds in (
                ("weights must be finite and from 1/bound to bound", _all_in(self.weights, lowest, highest)),
                ("weights must be 1 for classes out of reach", (self.weights[~self.reachable] == 1).all()),
                ("weights must be 1 without convergence", self.converged or (self.weights == 1).all()),
                ("target shares must be from 0 to 1 and add up to 1", _are_shares(self.target)),
                ("reached shares must be from 0 to 1 and add up to 1", _are_shares(self.reached)),
                (
                    "plain shares must be from 0 to 1 and add up to 1",
                    self.plain is None or _are_shares(self.plain),
                ),
                ("strength must be from 0 to 1", 0 <= self.strength <= 1),
                ("there must be pixels", self.pixels > 0),
            )
            if not holds
        ]
        if lines:
            raise DataError(faults("This alignment contradicts itself", lines))

    @property
    def standard_error(self) -> NDArray[np.float64]:
        """float64 [K]: of each reached share, due to the sample; at most 0.5 divided by the root of its size."""
        return np.sqrt(self.reached * (1 - self.reached) / self.pixels)

    def warnings(self, names: Sequence[str]) -> list[str]:
        """What a user should know: that nothing was aligned, or which classes were not.

        Args:
            names: of the classes, K.
        """
        out = [name for name, reachable in zip(names, self.reachable, strict=True) if not reachable]
        limits = f"[1/{self.bound:g}, {self.bound:g}]"
        if self.converged:
            reasons = f"never predicted, have no labeled pixels, or need a class weight outside {limits}"
            return [f"not aligned, because out of reach: {', '.join(out)}. They are {reasons}"] if out else []
        plain = "decisions could not be aligned, so the network's own are used"
        if _is_weak(self.reachable, self.target):
            wanted = [name for name, share in zip(names, self.target, strict=True) if share > 0]
            out = [name for name in out if name in wanted]
            return [
                f"{plain}: of {len(wanted)} classes, {len(out)} are out of reach ({', '.join(out)}), because they are "
                f"never predicted, or need a class weight outside {limits}. Train longer first, or do not align"
            ]
        return [f"{plain}: many pixels have equal scores, so that the class shares cannot be reached"]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return {
            "weights": self.weights.tolist(),
            "reachable": self.reachable.tolist(),
            "target": self.target.tolist(),
            "reached": self.reached.tolist(),
            **({} if self.plain is None else {"plain": self.plain.tolist()}),
            "strength": self.strength,
            "bound": self.bound,
            "converged": self.converged,
            "iterations": self.iterations,
            "pixels": self.pixels,
        }

    @classmethod
    def from_json(cls, columns: Mapping[str, Any]) -> Alignment:
        """The alignment that `to_json` described. Raises DataError for anything else."""
        try:
            return cls(
                weights=np.array(columns["weights"], np.float64),
                reachable=np.array(columns["reachable"], np.bool_),
                target=np.array(columns["target"], np.float64),
                reached=np.array(columns["reached"], np.float64),
                iterations=int(columns["iterations"]),
                converged=bool(columns["converged"]),
                strength=float(columns["strength"]),
                bound=float(columns["bound"]),
                pixels=int(columns["pixels"]),
                plain=np.array(columns["plain"], np.float64) if "plain" in columns else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"This is not an alignment ({type(error).__name__}: {error}). The file is damaged or of another kind; "
                "label again."
            ) from error


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
    logarithms of their weights, averaged by target, are 0. Only the set of pixels counts, not their order.

    Args:
        scores_NK: logits or log-probabilities of pixels, a constant per pixel has no effect; float [N, K].
        target: wanted shares, for example those of the labeled pixels; [K], sum 1.
        bound: largest weight and reciprocal of the smallest, above 1.
        strength: power of the weights, from 0 to 1.
        tolerance: largest difference between a share and its target, besides two pixels.
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
    check_settings(bound, strength, tolerance)
    wanted = _Wanted.checked(target, interval)
    decisions = Decisions.of(checked_scores(scores_NK, len(wanted.share)), math.log(bound))
    result, reachable = _search_reachable(decisions, wanted, int(tolerance * decisions.pixels))
    if _is_weak(reachable, wanted.share):
        result = replace(result, converged=False)
    bias = result.bias if result.converged else np.zeros(len(wanted.share))
    full = decisions.count(bias) / decisions.pixels
    aim = wanted.share
    if result.converged:
        rest = (1 - full[~reachable].sum()) / wanted.share[reachable].sum()
        aim = np.where(reachable & wanted.exact, wanted.share * rest, full)
    return Alignment(
        weights=np.exp(strength * bias),
        reachable=reachable,
        target=aim,
        reached=decisions.count(strength * bias) / decisions.pixels,
        iterations=result.sweeps,
        converged=result.converged,
        plain=decisions.count(np.zeros(len(wanted.share))) / decisions.pixels,
        strength=float(strength),
        bound=float(bound),
        pixels=decisions.pixels,
    )


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


def _search_reachable(decisions: Decisions, wanted: _Wanted, slack: int) -> tuple[_Result, NDArray[np.bool_]]:
    """Search until no class leaves, and the classes within reach, bool [K]; those that leave get bias 0."""
    bias, sweeps = np.zeros(len(wanted.share)), 0
    reachable = (decisions.count(bias) > 0) & (wanted.share > 0)
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


def _is_weak(reachable: NDArray[np.bool_], share: NDArray[np.float64]) -> bool:
    """Whether fewer than two or less than half of the wanted classes are within reach."""
    return reachable.sum() < max(2, np.count_nonzero(share) / 2)


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


def _all_in(values: NDArray[np.float64], low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def _are_shares(values: NDArray[np.float64]) -> bool:
    return _all_in(values, 0, 1 + SHARE_TOLERANCE) and abs(values.sum() - 1) <= 1e-6
