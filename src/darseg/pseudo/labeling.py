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


@dataclass(frozen=True)
class Labeling:
    """What pseudo labels are made by.

    Attributes:
        method: how thresholds are chosen.
        ratio: share of the unlabeled pixels to label, above 0 and at most 1; None with method "global".
        threshold: confidence from 0 to 1 with method "global"; None with the others.
        confidence: the scale that confidences are counted on.
        sampling: "random" drops the surplus that ties let in; "none" keeps it (method "dars" only).

    Raises RecipeError naming every setting that cannot work.

    >>> Labeling("global", threshold=0.9).settings()["threshold"]
    0.9
    """

    method: LabelingMethod = "dars"
    ratio: float | None = None
    threshold: float | None = None
    confidence: Confidence = "float16"
    sampling: Sampling = "random"

    def __post_init__(self) -> None:
        lines = [f"{name}: {message}" for name, message in labeling_faults(**vars(self))]
        if lines:
            raise RecipeError(faults("These labeling settings cannot work", lines))

    def settings(self) -> dict[str, Any]:
        """The fields by the names that users give them, as in `redistribution.json`."""
        return {
            "method": self.method,
            "labeling_ratio": self.ratio,
            "threshold": self.threshold,
            "confidence": self.confidence,
            "sampling": self.sampling,
        }


def labeling_faults(
    *, method: str, ratio: float | None, threshold: float | None, confidence: str, sampling: str
) -> Iterator[tuple[str, str]]:
    """Every fault of labeling settings: the setting's name in a recipe, and what is wrong with it."""
    for name, value, choices in (
        ("method", method, get_args(LabelingMethod)),
        ("confidence", confidence, get_args(Confidence)),
        ("sampling", sampling, get_args(Sampling)),
    ):
        if value not in choices:
            yield name, f"found {value!r}; should be one of {', '.join(choices)}"
    if method not in get_args(LabelingMethod):
        return  # what else it needs is unknown
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
        else:
            yield from _bound_faults("labeling_ratio", check_ratio, ratio)
        if threshold is not None:
            yield "threshold", f"is only for method global, and the method is {method}; remove it"


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


def _bound_faults(name: str, check: Callable[[float], float], value: float) -> Iterator[tuple[str, str]]:
    try:
        check(value)
    except ValueError as error:
        yield name, f"found {value}; {error}"
