"""The JSON files of a run, checked when they are read: the folder may come from somebody else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from darseg.data.files import ACCESS, read_json
from darseg.errors import RunError, shortened

OUTPUTS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "classify": (frozenset({"image_classes.safetensors"}), frozenset()),
    "label": (
        frozenset({"labels", "histogram.npz", "thresholds.json"}),
        frozenset({"images.json", "pseudo_scores.json", "alignment.json", "labels_from.json", "confidences"}),
    ),
    "train": (
        frozenset({"network.safetensors"}),
        frozenset({"optimizer.safetensors", "momentum.safetensors"}),
    ),
    "align": (frozenset({"result_alignment.json"}), frozenset()),
    "evaluate": (frozenset({"scores.json"}), frozenset({"image_counts.npz", "result.safetensors"})),
}
"""Step → the outputs that its record always names, and those that it may name besides: nothing else is copied or read."""

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class StepRecord:
    """What a finished step leaves: digests of its inputs and outputs, seconds, and facts worth keeping."""

    step: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    seconds: float
    facts: Mapping[str, Any]

    @classmethod
    def from_json(cls, value: Any, step: str) -> StepRecord:
        """The record of this step. Raises ValueError for anything else."""
        checks: Mapping[str, tuple[Callable[[Any], bool], str]] = {
            "step": (lambda name: name == step, f'"{step}"'),
            "inputs": (_is_texts, "names and digests"),
            "outputs": (_is_digests, "names and SHA-256 digests"),
            "seconds": (lambda number: is_number(number) and number >= 0, "a number of seconds"),
            "facts": (lambda facts: isinstance(facts, dict), "an object"),
        }
        if not isinstance(value, dict) or {*value} != {item.name for item in fields(cls)}:
            raise ValueError(f"expected an object with {', '.join(checks)}")
        for name, (holds, expected) in checks.items():
            if not holds(value[name]):
                raise ValueError(f"{name!r} is {shortened(value[name])}, expected {expected}")
        always, sometimes = OUTPUTS[step]
        names = {*value["outputs"]}
        if foreign := sorted(names - always - sometimes):
            raise ValueError(f"{shortened(foreign[0])} is not an output of this step")
        if missing := sorted(always - names):
            raise ValueError(f"its outputs lack {missing[0]}")
        return cls(**value)

    @property
    def steps(self) -> int | None:
        """How many steps a training had; None if the record does not say."""
        count = self.facts.get("steps")
        return count if type(count) is int and 0 <= count < 1 << 53 else None

    @property
    def folds(self) -> int:
        """On how many folds of the labeled images a labeling measured its precision; 0: on none."""
        count = self.facts.get("folds")
        return count if type(count) is int and 0 <= count < 1 << 31 else 0


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float can hold."""
    if type(value) is int:
        return abs(value) < 1 << 63
    return type(value) is float and math.isfinite(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 digest in hexadecimal digits."""
    return len(text) == 64 and _HEX.issuperset(text)


def _is_digests(value: Any) -> bool:
    return _is_texts(value) and all(text == "missing" or is_digest(text) for text in value.values())


def read_object(path: Path, remedy: str, kind: type = dict) -> Any:
    """The object (or list) in a JSON file of a run.

    Raises FileNotFoundError, or RunError that ends with the remedy.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        # A folder or pipe in its place has no permissions to check.
        what = "Check its permissions." if error.errno in ACCESS else remedy
        raise RunError(f"{path} cannot be read: {error.strerror or error}. {what}") from error
    except ValueError as error:
        raise damaged(path, error, remedy) from error
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        expected, found = names.get(kind), names.get(type(value), shortened(value))
        raise damaged(path, f"expected {expected}, found {found}", remedy)
    return value


def read_texts(path: Path, remedy: str) -> dict[str, str]:
    """An object of texts in a JSON file of a run. Raises as `read_object`."""
    value = read_object(path, remedy)
    if not _is_texts(value):
        raise damaged(path, "expected only texts as values", remedy)
    return value


def read_plain(path: Path, remedy: str) -> dict[str, str | int | float | bool | None]:
    """An object of texts and numbers in a JSON file of a run. Raises as `read_object`."""
    value = read_object(path, remedy)
    nested = [
        name for name, item in value.items() if not (isinstance(item, str | bool | None) or is_number(item))
    ]
    if nested:
        raise damaged(
            path, f"{nested[0]!r} is {shortened(value[nested[0]])}, expected a text or a number", remedy
        )
    return value


def read_scored(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a round's scores.json, whose figures are checked, also those of aligned decisions.

    Args:
        names: the classes; none: any.

    Raises RunError if it is damaged.
    """
    remedy = "Restore it from a copy, or delete evaluate.json next to it, and run the same command again."
    try:
        content = read_object(path, remedy)
        _check_figures(content, names)
        if (aligned := content.get("aligned")) is not None:
            _check_aligned(aligned, names)
    except FileNotFoundError:
        raise damaged(path, "it is missing", remedy) from None
    except ValueError as error:
        raise damaged(path, error, remedy) from error
    return content


def _check_aligned(aligned: Any, names: Sequence[str]) -> None:
    if not isinstance(aligned, dict) or type(aligned.get("used")) is not bool:
        raise ValueError(
            f"'aligned' is {shortened(aligned)}, expected an object that says whether it is used"
        )
    if not isinstance(aligned.get("why"), str):
        raise ValueError("'aligned' does not say why")
    settings = [aligned[name] for name in ("strength", "bound") if name in aligned]
    if len(settings) == 1 or not all(map(is_number, settings)):
        raise ValueError("'strength' and 'bound' must be numbers")
    if "mean_iou" in aligned or aligned["used"]:
        _check_figures(aligned, names)


def _check_figures(scores: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        if not _is_figure(scores.get(name, "")):
            raise ValueError(f"{name!r} is {shortened(scores.get(name))}, expected a number")
    iou = scores.get("iou")
    if not isinstance(iou, dict) or not all(map(_is_figure, iou.values())) or (names and {*iou} != {*names}):
        raise ValueError(f"'iou' is {shortened(iou)}, expected a number for each class")


def _is_figure(value: Any) -> bool:
    """Whether a value is a number, or None, which stands for an undefined one."""
    return value is None or is_number(value)


def damaged(path: Path, reason: object, remedy: str) -> RunError:
    """The error to raise if a file of a run does not hold what darseg wrote."""
    return RunError(f"{path} is damaged ({reason}). {remedy}")
