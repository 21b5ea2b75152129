"""Labeled pixels per class as a user gives them: a list, or by name in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darseg.data.files import parse_json, read_text
from darseg.errors import DataError, faults
from darseg.run.class_names import name_faults
from darseg.run.prior import read_yaml_pairs

EXAMPLE = "for example [9000, 120]"
YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class ClassCounts:
    """Labeled pixels per class, and the classes' names if they are known."""

    counts: Sequence[int]
    names: Sequence[str] | None


def read_class_counts(path: Path, names: Sequence[str] | None = None) -> ClassCounts:
    """Labeled pixels per class from a JSON or YAML file: a list, or name → count.

    Args:
        names: the classes in the order that the counts should have; None: the file's order.

    Raises DataError.
    """
    try:
        text = read_text(path, "utf-8-sig")
        content = _yaml(text, path) if path.suffix in YAML else parse_json(text, _Pairs)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Give the labeled pixels per class as JSON; {EXAMPLE}."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON ({error}). Give a list or name → count; {EXAMPLE}."
        ) from error
    if isinstance(content, _Pairs):
        return _by_name(content, str(path), names)
    return check_class_counts(content, str(path), names)


def check_class_counts(content: Any, source: str, names: Sequence[str] | None = None) -> ClassCounts:
    """A list of counts, or name → count, as counts and names. Raises DataError that begins with `source`."""
    if isinstance(content, Mapping):
        return _by_name(_Pairs((str(name), count) for name, count in content.items()), source, names)
    counts = _whole(content, names, source)
    if names is not None and len(counts) != len(names):
        raise DataError(
            f"{source} has {len(counts)} class counts, but there are {len(names)} classes ({', '.join(names)}). Give "
            "one count per class."
        )
    return ClassCounts(counts, names)


class _Pairs(list):
    """Names with their values as they are written; a dict would hide names given twice."""


def _yaml(text: str, path: Path) -> list[Any]:
    pairs = read_yaml_pairs(text, path)
    return [value for _, value in pairs] if all(name is None for name, _ in pairs) else _Pairs(pairs)


def _by_name(pairs: _Pairs, source: str, names: Sequence[str] | None) -> ClassCounts:
    """Counts by name, in the order of `names`. Raises DataError for double, unknown and missing names."""
    given = [name for name, _ in pairs]
    lines = name_faults([(name, "") for name in given], given if names is None else names)
    if lines:
        expected = "" if names is None else f" The classes are {', '.join(names)}."
        raise DataError(faults(f"{source}: expected one count for each class.{expected} What differs", lines))
    order = given if names is None else list(names)
    by_name = dict(pairs)
    return ClassCounts(_whole([by_name[name] for name in order], order, source), order)


def _whole(counts: Any, names: Sequence[str] | None, source: str) -> list[int]:
    """Counts as whole numbers. Raises DataError that begins with `source`."""
    try:
        whole = [int(count) for count in counts]
    except (TypeError, ValueError, OverflowError):
        whole = []
    if not whole or any(isinstance(c, (bool, str)) or c != w for c, w in zip(counts, whole, strict=True)):
        raise DataError(
            f"{source}: expected the labeled pixels per class as whole numbers, a list or name → count; {EXAMPLE}."
        )
    called = (
        names if names is not None and len(names) == len(whole) else [f"class {k}" for k in range(len(whole))]
    )
    negative = [f"{called[k]}: {count}" for k, count in enumerate(whole) if count < 0]
    if negative:
        raise DataError(f"{source}: labeled pixels cannot be negative ({', '.join(negative)}).")
    return whole
