"""How pseudo labels are made: method, ratio, threshold, scale and sampling as one checked value.

The recipe, the command line, Python and the settings digests share it. It imports nothing slow, so the command line can
show its choices at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from darseg.errors import RecipeError, faults

LabelingMethod = Literal["dars", "cbst", "global"]
"""How thresholds are chosen; see `choose_dars`, `choose_cbst` and `choose_global`."""
Confidence = Literal["float16", "fine"]
"""The scale that confidences are counted on; see `darseg.FLOAT16` and `darseg.FINE`."""
Sampling = Literal["random", "none"]
"""Whether the surplus of pixels that tie at a threshold is dropped at random, or kept."""
Align = Literal["none", "decisions"]
"""Whether decisions are first moved to the class shares of the labeled pixels; see `align`."""

Ratio = float | Literal["auto"]
"""Share of the unlabeled pixels to label; "auto": as much of each class as keeps to the target precision."""

BOUND = 5.0
"""Default largest weight of a class that is aligned."""

TARGET_PRECISION = 0.9
"""Default precision of pseudo labels with ratio "auto"."""


@dataclass(frozen=True)
class AlignSettings:
    """How far decisions are aligned: largest class weight, and the power of all weights; see `Labeling`.

    None is the recipe's value, where there is a recipe, or the default: 5 and 1.
    """

    bound: float | None = None
    strength: float | None = None

    @staticmethod
    def fields(align: bool | AlignSettings, bound: float = BOUND, strength: float = 1.0) -> dict[str, Any]:
        """The fields of `Labeling` for what Python functions take as `align`; True is `AlignSettings()`.

        Args:
            bound: what None stands for as a bound.
            strength: what None stands for as a strength.
        """
        if align is False:
            return {}
        settings = AlignSettings() if align is True else align
        return {
            "align": "decisions",
            "bound": bound if settings.bound is None else settings.bound,
            "strength": strength if settings.strength is None else settings.strength,
        }


@dataclass(frozen=True)
class Labeling:
    """What pseudo labels are made by.

    Attributes:
        method: how thresholds are chosen.
        ratio: share of the unlabeled pixels to label, above 0 and at most 1; "auto" (method "dars" only) follows
            `target_precision`; None with method "global".
        threshold: confidence from 0 to 1 with method "global"; None with the others.
        confidence: the scale that confidences are counted on.
        sampling: "random" drops the surplus that ties let in; "none" keeps it (method "dars" only).
        align: "decisions" multiplies probabilities by class weights that give the decisions the class shares of the
            labeled pixels, before thresholds are chosen.
        bound: largest class weight and reciprocal of the smallest, above 1.
        strength: power of the class weights, from 0 to 1.
        target_precision: with ratio "auto", the precision that held-out images should show of each class's labels, from 0
            to below 1.
        normalized: decide by probability divided by the class's threshold instead of by probability alone (method "cbst",
            confidence "float16").

    Raises RecipeError naming every setting that cannot work.

    >>> Labeling("global", threshold=0.9).settings()["threshold"]
    0.9
    """

    method: LabelingMethod = "dars"
    ratio: Ratio | None = None
    threshold: float | None = None
    confidence: Confidence = "float16"
    sampling: Sampling = "random"
    align: Align = "none"
    bound: float = BOUND
    strength: float = 1.0
    target_precision: float = TARGET_PRECISION
    normalized: bool = False

    def __post_init__(self) -> None:
        lines = [f"{name}: {message}" for name, message in labeling_faults(**vars(self))]
        if lines:
            raise RecipeError(faults("These labeling settings cannot work", lines))

    @property
    def of_scores(self) -> bool:
        """Whether the scores of all classes are needed until the label maps are made."""
        return self.align != "none" or self.normalized

    def settings(self) -> dict[str, Any]:
        """The fields as users name them, as in `redistribution.json`; later ones only if they are used."""
        settings = {
            "method": self.method,
            "labeling_ratio": self.ratio,
            "threshold": self.threshold,
            "confidence": self.confidence,
            "sampling": self.sampling,
        }
        if self.ratio == "auto":
            settings["target_precision"] = self.target_precision
        if self.normalized:
            settings |= {"normalized": True}
        if self.align == "none":
            return settings  # as earlier versions wrote them
        return settings | {"align": self.align, "bound": self.bound, "strength": self.strength}


def labeling_faults(
    *,
    method: str,
    ratio: Ratio | None,
    threshold: float | None,
    confidence: str,
    sampling: str,
    align: str = "none",
    bound: float = BOUND,
    strength: float = 1.0,
    target_precision: float = TARGET_PRECISION,
    normalized: bool = False,
) -> Iterator[tuple[str, str]]:
    """Every fault of labeling settings: the setting's name in a recipe, and what is wrong with it."""
    for name, value, choices in (
        ("method", method, get_args(LabelingMethod)),
        ("confidence", confidence, get_args(Confidence)),
        ("sampling", sampling, get_args(Sampling)),
        ("align", align, get_args(Align)),
    ):
        if value not in choices:
            yield name, f"found {value!r}; should be one of {', '.join(choices)}"
    for name, check, value, default in (
        ("bound", check_bound, bound, BOUND),
        ("strength", check_strength, strength, 1.0),
    ):
        yield from _bound_faults(name, check, value)
        if align == "none" and value != default:
            yield name, "has no effect without align; remove it, or align the decisions"
    if normalized and (method, confidence, align) != ("cbst", "float16", "none"):
        yield (
            "normalized",
            f"works with method cbst, confidence float16 and align none; found {method}, {confidence} and {align}",
        )
    if method not in get_args(LabelingMethod):
        return  # what else it needs is unknown
    yield from _bound_faults("target_precision", check_target_precision, target_precision)
    if target_precision != TARGET_PRECISION and ratio != "auto":
        yield "target_precision", "has no effect without labeling_ratio: auto; remove it"
    if sampling == "none" and method != "dars":
        yield "sampling", f"none is only for method dars, and the method is {method}; remove it"
    if method == "global":
        if ratio is not None:
            yield "labeling_ratio", "has no effect with method global; remove it"
        if threshold is None:
            yield "threshold", "missing; method global needs a confidence from 0 to 1"
        else:
            yield from _bound_faults("threshold", check_threshold, threshold)
    else:
        if ratio is None:
            yield "labeling_ratio", f"missing; method {method} needs a share above 0 and at most 1"
        elif ratio == "auto":
            yield from _auto_faults(method, sampling)
        else:
            yield from _bound_faults("labeling_ratio", check_ratio, ratio)
        if threshold is not None:
            yield "threshold", f"is only for method global, and the method is {method}; remove it"


def _auto_faults(method: str, sampling: str) -> Iterator[tuple[str, str]]:
    if method != "dars":
        yield "labeling_ratio", f"auto is only for method dars, and the method is {method}; give a number"
    elif sampling == "none":
        yield "labeling_ratio", "auto drops what is above a class's share at random; remove sampling: none"


def check_ratio(ratio: float) -> float:
    """The labeling ratio itself. Raises ValueError if it is out of bounds."""
    if not 0 < ratio <= 1:
        raise ValueError("should be above 0 and at most 1")
    return ratio


def check_threshold(threshold: float) -> float:
    """The confidence threshold itself. Raises ValueError if it is out of bounds."""
    if not 0 <= threshold <= 1:
        raise ValueError("should be from 0 to 1")
    return threshold


def check_target_precision(precision: float) -> float:
    """The target precision itself. Raises ValueError if it is out of bounds."""
    if not 0 <= precision < 1:
        raise ValueError("should be at least 0 and below 1")
    return precision


def check_bound(bound: float) -> float:
    """The largest class weight itself. Raises ValueError if it is out of bounds."""
    if not 1 < bound < float("inf"):
        raise ValueError("should be above 1 and finite")
    return bound


def check_strength(strength: float) -> float:
    """The power of class weights itself. Raises ValueError if it is out of bounds."""
    if not 0 <= strength <= 1:
        raise ValueError("should be from 0 to 1")
    return strength


def _bound_faults(name: str, check: Callable[[float], float], value: float) -> Iterator[tuple[str, str]]:
    try:
        check(value)
    except ValueError as error:
        yield name, f"found {value}; {error}"
