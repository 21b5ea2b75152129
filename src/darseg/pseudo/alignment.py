"""Class weights that were found for the decisions of a network, and what they reach; see `align`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError, faults
from darseg.pseudo.distribution import SHARE_TOLERANCE, check_class_count

NAMED = 6
"""Most classes that a message about a fault names."""


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
        single: whether all pixels are of one image, whose class mix says little; the weights are then 1.

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
    single: bool = False

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
        if not 1 < self.bound < math.inf:
            raise DataError(f"The bound of an alignment is {self.bound:g}; expected a finite number above 1.")
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
    def factors(self) -> NDArray[np.float64] | None:
        """The weights; None if all are 1, so that decisions without them are the same bit for bit."""
        return None if (self.weights == 1).all() else self.weights

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
        weak = not self.single and is_weak(self.reachable, self.target)
        remedy = ". Train longer first, or do not align" if weak else ""
        return [f"decisions could not be aligned, so the network's own are used: {self.fault(names)}{remedy}"]

    def fault(self, names: Sequence[str]) -> str | None:
        """Why nothing was aligned; None if something was.

        Args:
            names: of the classes, K.
        """
        if self.converged:
            return None
        if self.single:
            return "there is only one image, and its class mix says little about others. Give more images"
        if not is_weak(self.reachable, self.target):
            return "many pixels have equal scores, so that the class shares cannot be reached"
        wanted = self.target > 0
        out = [name for name, lost in zip(names, wanted & ~self.reachable, strict=True) if lost]
        more = f" and {len(out) - NAMED} more" if len(out) > NAMED else ""
        return (
            f"of {np.count_nonzero(wanted)} classes, {len(out)} are out of reach ({', '.join(out[:NAMED])}{more}), "
            f"because they are never predicted, or need a class weight outside [1/{self.bound:g}, {self.bound:g}]"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return {
            "weights": self.weights.tolist(),
            "reachable": self.reachable.tolist(),
            "target": self.target.tolist(),
            "reached": self.reached.tolist(),
            **({} if self.plain is None else {"plain": self.plain.tolist()}),
            **({"single": True} if self.single else {}),
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
                single=bool(columns.get("single", False)),
            )
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"This is not an alignment ({type(error).__name__}: {error}). The file is damaged or of another kind; "
                "label again."
            ) from error


def for_images(alignment: Alignment, images: int) -> Alignment:
    """The alignment; without effect if it was found on one image.

    Args:
        images: that the sample is of.
    """
    if images != 1:
        return alignment
    assert alignment.plain is not None
    return replace(
        alignment,
        weights=np.ones_like(alignment.weights),
        reached=alignment.plain,
        converged=False,
        single=True,
    )


def is_weak(reachable: NDArray[np.bool_], share: NDArray[np.float64]) -> bool:
    """Whether fewer than two or less than half of the wanted classes are within reach."""
    return reachable.sum() < max(2, np.count_nonzero(share) / 2)


def _all_in(values: NDArray[np.float64], low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def _are_shares(values: NDArray[np.float64]) -> bool:
    return _all_in(values, 0, 1 + SHARE_TOLERANCE) and abs(values.sum() - 1) <= 1e-6
