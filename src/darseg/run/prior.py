"""Class shares that a user gives: by name, as shares or as counts of pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from darseg.data.files import parse_json, read_text
from darseg.errors import DataError, faults, shortened
from darseg.run.class_names import name_faults

Prior = Path | str | Mapping[str, float] | Sequence[float]
"""The shares of the classes as a user gives them; see `class_shares`."""

ROUNDING = 0.01
"""How far given shares may add up from 1: they are rounded, and divided by their sum."""

EXAMPLE = "for example {road: 0.7, sky: 0.3}, or counts of pixels, {road: 7000, sky: 3000}"


@dataclass(frozen=True)
class _Entry:
    """One class of a prior: its name (None in a list), its value as it is written, and where it is."""

    name: str | None
    value: Any
    place: str


def class_shares(prior: Prior, names: Sequence[str]) -> NDArray[np.float64]:
    """The share of each class, float64 [K], sum 1.

    Args:
        prior: class name → share, or whole numbers of pixels, in any order; or a list in the order of the classes; or
            a JSON or YAML file of either. Whole numbers are divided by their sum; shares must add up to 1, and may be
            rounded.
        names: the network's classes.

    Raises DataError, listing all faults: other or missing names, values that are negative or not numbers, another sum.
    """
    if isinstance(prior, (str, Path)):
        source, entries = str(prior), _read(Path(prior))
    elif isinstance(prior, Mapping):
        source, entries = "prior", [_Entry(str(name), value, "prior") for name, value in prior.items()]
    else:
        source, entries = "prior", [_Entry(None, value, "prior") for value in prior]
    values, lines = _by_class(entries, names)
    if not lines:
        lines = _value_faults(entries, values)
    if lines:
        raise DataError(faults(f"{source}: these are not the shares of the network's classes", lines))
    shares = np.array([float(entry.value) for entry in values], np.float64)
    return shares / shares.sum()


def _by_class(entries: Sequence[_Entry], names: Sequence[str]) -> tuple[list[_Entry], list[str]]:
    """The entries in the order of the classes, and a line for every fault."""
    if all(entry.name is None for entry in entries):
        lines = []
        if len(entries) != len(names):
            lines.append(f"the list has {len(entries)} numbers; expected {len(names)}, one per class")
        return list(entries), lines
    by_name = {entry.name: entry for entry in entries if entry.name is not None}
    lines = name_faults([(entry.name or "", entry.place) for entry in entries], names)
    return [by_name[name] for name in names if name in by_name], lines


def _value_faults(entries: Sequence[_Entry], values: Sequence[_Entry]) -> list[str]:
    """A line for each value that is no share or count, and for a sum that is not 1."""
    lines = []
    for index, entry in enumerate(values):
        name = entry.name or f"number {index + 1}"
        if not _is_number(entry.value) or not 0 <= float(entry.value) < math.inf:
            lines.append(
                f"{entry.place}: {name}: found {shortened(entry.value)}; expected a number of at least 0"
            )
    if lines:
        return lines
    numbers = [float(entry.value) for entry in entries]
    total = sum(numbers)
    counts = all(number == int(number) for number in numbers)
    if total == 0:
        return ["all of them are 0"]
    if not counts and abs(total - 1) > ROUNDING:
        percent = "; these look like percentages, so divide each by 100" if abs(total - 100) <= 1 else ""
        return [f"the shares add up to {total:g}; expected 1{percent}"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and abs(value) < 1e300


def _read(path: Path) -> list[_Entry]:
    """The entries of a JSON or YAML file. Raises DataError for any other content."""
    try:
        text = read_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Give the share of each class as JSON or YAML; {EXAMPLE}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}).") from error
    try:
        return _json_entries(text, path)
    except json.JSONDecodeError:
        pass  # YAML, which also has JSON's faults, with their lines
    except ValueError as error:
        raise DataError(f"{path}: {error}. Give the share of each class; {EXAMPLE}.") from error
    try:
        return _yaml_entries(text, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise DataError(
            f"{place}: neither JSON nor YAML ({getattr(error, 'problem', None) or error}). Give the share of each "
            f"class; {EXAMPLE}."
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{path}: its lists and mappings are nested too deeply. Give the share of each class; {EXAMPLE}."
        ) from error


def _json_entries(text: str, path: Path) -> list[_Entry]:
    content = parse_json(text, lambda pairs: pairs)  # a dict would hide names given twice
    if isinstance(content, list) and text.lstrip().startswith("{"):
        return [_Entry(name, value, path.name) for name, value in content]
    if isinstance(content, list):
        return [_Entry(None, value, path.name) for value in content]
    raise _other_content(path)


def _yaml_entries(text: str, path: Path) -> list[_Entry]:
    """Names are taken as they are written: `no` is a name, although YAML means false by it."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(node, yaml.SequenceNode):
        pairs = [(None, item) for item in node.value]
    elif isinstance(node, yaml.MappingNode):
        pairs = [(str(name.value), value) for name, value in node.value]
    else:
        raise _other_content(path)
    return [
        _Entry(name, _written(value), f"{path.name}:{value.start_mark.line + 1}") for name, value in pairs
    ]


def read_yaml_pairs(text: str, path: Path) -> list[tuple[str | None, Any]]:
    """The names, as they are written, and values of a YAML mapping; in a list the names are None.

    Raises ValueError for anything else.
    """
    try:
        entries = _yaml_entries(text, path)
    except (yaml.YAMLError, DataError, RecursionError) as error:
        raise ValueError(f"as YAML neither: {getattr(error, 'problem', None) or error}") from None
    return [(entry.name, entry.value) for entry in entries]


def _written(node: yaml.Node) -> Any:
    """A number; or the text of anything else."""
    try:
        return float(node.value)
    except (TypeError, ValueError):
        return node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _other_content(path: Path) -> DataError:
    return DataError(
        f"{path}: expected the share of each class by its name, or a list of K numbers; {EXAMPLE}."
    )
