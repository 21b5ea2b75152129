"""Keys of a recipe that read values which are no classes as their nearest class, or as not labeled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from darseg.data.classes import BUILT_IN, IGNORE, class_set
from darseg.data.strays import Stray
from darseg.data.tables import nearest_classes

MOST_LISTED = 24
"""Stray values that a recipe lists one by one; more become `other: ignore`."""

Classes = str | list[str] | dict[str, list[int]]


def as_values(strays: Mapping[int, Stray]) -> dict[int, Stray]:
    """Strays among grays that are written as colors, as the values that they are read as."""
    return {
        value & 255: replace(
            stray, value=value & 255, nearest=None if stray.nearest is None else stray.nearest & 255
        )
        for value, stray in strays.items()
    }


def without_strays(
    classes: Classes, keys: Mapping[str, Any], strays: Mapping[int, Stray], *, colors: bool
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Keys, their reasons, and a warning, so that a recipe reads strays; all empty if there are none.

    A stray becomes the class that it surely belongs to (`Stray.nearest`), all others become "not labeled".

    Args:
        keys: what the recipe says about values or colors so far.
        colors: the strays are colors.
    """
    if not strays:
        return {}, {}, []
    names = list(BUILT_IN[classes].names) if isinstance(classes, str) else list(classes)
    key, table = ("label_colors", {}) if colors else ("label_values", _value_table(names, keys))
    of_color = dict(zip(map(_key, _colors(classes)), names, strict=True)) if colors else {}
    target = {
        value: (of_color if colors else table).get(stray.nearest, "ignore")
        for value, stray in sorted(strays.items(), key=lambda item: -item[1].pixels)
    }
    given = {value: name for value, name in target.items() if name != "ignore"}
    lost = {value: name for value, name in target.items() if name == "ignore"}
    listed = dict(list(given.items())[:MOST_LISTED])
    rest = len(given) - len(listed)
    lists_all = colors and len(lost) + rest <= MOST_LISTED
    if colors and not lists_all:
        return _nearest(classes, keys, strays)
    if colors:
        groups: dict[str, Any] = defaultdict(list)
        for name, group in keys.get("label_colors", {}).items():
            groups[name] += group
        for value, name in target.items():
            groups[name].append([value >> 16, value >> 8 & 255, value & 255])
        settings: dict[Any, Any] = dict(groups)
    else:
        settings = {**table, **listed, "other": "ignore"}
    kept = sum(strays[value].pixels for value in (target if lists_all else listed) if value in given)
    left = sum(stray.pixels for stray in strays.values()) - kept
    parts = [f"{kept:,} pixels are read as the class whose value is next to theirs"] * bool(kept)
    parts += [f"{left:,} pixels are read as not labeled"] * bool(left)
    reason = "values that are no classes" if not colors else "colors that are no classes"
    warning = f"They were taken for flaws, not for classes: {', '.join(parts)} (data.{key})"
    return {key: settings}, {key: reason}, [warning]


def _nearest(
    classes: Classes, keys: Mapping[str, Any], strays: Mapping[int, Stray]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """What `without_strays` returns for more colors than a recipe can list."""
    listed = dict(keys.get("label_colors", {}))
    known = [(color, k) for k, color in enumerate(_colors(classes))]
    known += [(tuple(color), IGNORE) for color in listed.get("ignore", ())]
    targets = nearest_classes(np.array(list(strays), np.int32), known)
    kept = sum(stray.pixels for stray, k in zip(strays.values(), targets, strict=True) if k != IGNORE)
    left = sum(stray.pixels for stray in strays.values()) - kept
    warning = (
        f"They were taken for flaws, not for classes: {kept:,} pixels are read as the class whose color is clearly the "
        f"nearest, {left:,} pixels are read as not labeled (data.label_colors)"
    )
    settings = {"label_colors": {**listed, "other": "nearest"}}
    return settings, {"label_colors": "colors that are no classes"}, [warning]


def _value_table(names: list[str], keys: Mapping[str, Any]) -> dict[int, str]:
    """Value → class name, by what a recipe says so far."""
    match keys.get("label_values"):
        case None:
            return dict(enumerate(names))
        case "one_based":
            return {0: "ignore", **dict(enumerate(names, 1))}
        case "binary":
            return {0: names[0], IGNORE: names[1]}
        case table:
            return dict(table)


def _colors(classes: Classes) -> list[tuple[int, int, int]]:
    return list(class_set(classes).colors)


def _key(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]
