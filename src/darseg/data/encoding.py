"""How the values and colors of label files map to classes: what a recipe's label settings mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from darseg.choices import LabelFormat, NamedValues
from darseg.data.classes import CITYSCAPES, IGNORE, ClassSet
from darseg.errors import RecipeError, faults

RGB = tuple[int, int, int]

IDS_SUFFIX = "_labelIds.png"
"""Ends the names of Cityscapes' label maps that hold its 35 ids instead of the 19 train ids."""

TRAIN_IDS_SUFFIX = "_labelTrainIds.png"

NEAREST = -2
"""`LabelEncoding.other_color` if colors that are not listed become the class whose color is clearly the nearest."""

AS_DRAWN = -1
"""`LabelEncoding.transparent` if alpha is left out: transparent pixels have the value or color that they hide."""

NAMED_VALUES: tuple[str, ...] = get_args(NamedValues)

# Cityscapes' id of each train id, from its published label table; all other ids are not evaluated.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class LabelEncoding:
    """How the values of a label file become classes.

    Attributes:
        format: "index": a single channel (or three equal ones) of values, or palette indices; "color": colors;
            "auto": gray and palette files are index, RGB files are color.
        values: (value in the file, class or 255) for index files; None: values are the classes.
        other: what values that are not listed become; None: they are a fault.
        ignore: if `values` is None, the value other than 255 that is not a class.
        colors: (color, class or 255) for color files.
        other_color: what colors that are not listed become: 255, or NEAREST; None: they are a fault.
        transparent: what pixels of alpha 0 become: a class, 255 (not labeled), or AS_DRAWN.
        city_ids: files named *_labelIds.png hold Cityscapes' ids, files named *_labelTrainIds.png do not.
    """

    format: LabelFormat = "auto"
    values: tuple[tuple[int, int], ...] | None = None
    other: int | None = None
    ignore: int = IGNORE
    colors: tuple[tuple[RGB, int], ...] = ()
    city_ids: bool = False
    other_color: int | None = None
    transparent: int = IGNORE

    def for_file(self, path: Path) -> LabelEncoding:
        """This encoding, or the one that the file's name calls for: Cityscapes' ids, or train ids."""
        if self.city_ids and path.name.endswith(IDS_SUFFIX):
            return CITY_IDS
        holds_train_ids = self.city_ids and self.values is not None and path.name.endswith(TRAIN_IDS_SUFFIX)
        return PLAIN if holds_train_ids else self


PLAIN = LabelEncoding()
"""Values are classes, 255 is not labeled: what darseg itself writes."""

CITY_IDS = LabelEncoding(values=tuple((value, k) for k, value in enumerate(CITYSCAPES_IDS)), other=IGNORE)


def label_encoding(
    classes: ClassSet,
    ignore: int = IGNORE,
    values: str | Mapping[int | str, int | str] = "index",
    *,
    format: LabelFormat = "auto",
    colors: Mapping[str, Sequence[Sequence[int]] | str] | None = None,
    own_colors: bool = True,
    transparent: str | int = "ignore",
) -> LabelEncoding:
    """The encoding that a recipe's label settings describe.

    Args:
        ignore: the value other than 255 that is not a class; only if `values` is "index".
        values: value → class (name or index) or "ignore", with the key "other" for all values that are not listed; or
            a name: "index" (values are classes), "one_based" (0 is not labeled, classes are counted from 1), "binary"
            (0 and 255, or 0 and 1 in files of one bit), "cityscapes_ids".
        colors: class name or "ignore" → colors that stand for it, in addition to the classes' own.
            `other: "ignore"` leaves the pixels of all other colors unlabeled; `other: "nearest"` gives them to the class
            whose color is clearly the nearest (`tables.nearest_classes`), and leaves the rest unlabeled.
        own_colors: the colors of `classes` are those of the label files.
        transparent: the class (name or index) of pixels of alpha 0, or "ignore", or "as_drawn" (alpha is left out).

    Raises:
        RecipeError: settings contradict each other or the classes. The message lists every one.
    """
    listed = colors or {}
    colors = {name: group for name, group in listed.items() if not isinstance(group, str)}
    pairs, other = _value_map(classes, values)
    meanings = _color_meanings(classes, colors, own_colors)
    # Where files of values are expected, a color of two classes may be meant for drawing only. It is not read.
    table = {color: targets[0] for color, targets in meanings.items() if len(set(targets)) == 1}
    shared = {color: targets for color, targets in meanings.items() if color not in table}
    problems = [
        *_value_faults(classes, values),
        *_ignore_faults(classes, ignore, has_value_map=pairs is not None),
        *(
            _unknown_class(classes, name, "data.label_colors")
            for name in colors
            if _index(classes, name) is None
        ),
        *(_shared_color(classes, color, shared[color]) for color in shared if format == "color" or colors),
        *_transparent_faults(classes, transparent),
    ]
    if problems:
        raise RecipeError(faults("The label settings of the recipe cannot be used", problems))
    return LabelEncoding(
        format=format,
        values=pairs,
        other=other,
        ignore=ignore,
        colors=tuple(sorted(table.items())),
        city_ids=values in ("index", "cityscapes_ids") and classes.names == CITYSCAPES.names,
        other_color={"ignore": IGNORE, "nearest": NEAREST}.get(str(listed.get("other"))),
        transparent=AS_DRAWN if transparent == "as_drawn" else _index(classes, transparent) or 0,
    )


def _index(classes: ClassSet, name: int | str) -> int | None:
    """The class of a name or index, 255 for "ignore", None for anything else."""
    if name == "ignore":
        return IGNORE
    if type(name) is int and 0 <= name < len(classes):
        return name
    return classes.names.index(str(name)) if name in classes.names else None


def _value_map(
    classes: ClassSet, values: str | Mapping[int | str, int | str]
) -> tuple[tuple[tuple[int, int], ...] | None, int | None]:
    """`values` and `other` of the encoding; what `_value_faults` reports is left out."""
    if isinstance(values, Mapping):
        targets = {value: _index(classes, name) for value, name in values.items()}
        other = targets.pop("other", None)
        return tuple(sorted((int(value), k) for value, k in targets.items() if k is not None)), other
    match values:
        case "one_based":
            pairs = ((k + 1, k) for k in range(len(classes)))
            return ((0, IGNORE), (IGNORE, IGNORE), *pairs), None
        case "binary":
            return ((0, 0), (1, 1), (255, 1)), None
        case "cityscapes_ids":
            return CITY_IDS.values, CITY_IDS.other
    return None, None


def _value_faults(classes: ClassSet, values: str | Mapping[int | str, int | str]) -> list[str]:
    count = len(classes)
    if isinstance(values, Mapping):
        return [
            _unknown_class(classes, name, f"data.label_values.{value}")
            for value, name in values.items()
            if _index(classes, name) is None
        ]
    if values not in NAMED_VALUES:
        return [
            f"data.label_values: there is no value map {values!r}. Give {', '.join(NAMED_VALUES)}, or value: class "
            "for each value."
        ]
    if values == "binary" and count != 2:
        return [f"data.label_values: binary is for 2 classes, but the recipe has {count}."]
    if values == "cityscapes_ids" and count != len(CITYSCAPES_IDS):
        return [
            f"data.label_values: cityscapes_ids is for the 19 classes of Cityscapes, but the recipe has {count}."
        ]
    return []


def _ignore_faults(classes: ClassSet, ignore: int, *, has_value_map: bool) -> list[str]:
    if has_value_map and ignore != IGNORE:
        return [
            "data.ignore cannot be combined with data.label_values. List the value there instead, as value: ignore."
        ]
    if not has_value_map and not len(classes) <= ignore <= IGNORE:
        return [
            f"data.ignore: {ignore} is not between {len(classes)} and 255. The values below {len(classes)} are classes."
        ]
    return []


def _transparent_faults(classes: ClassSet, name: str | int) -> list[str]:
    if name == "as_drawn" or _index(classes, name) is not None:
        return []
    return [f"{_unknown_class(classes, name, 'data.label_transparent')} as_drawn leaves alpha out."]


def _unknown_class(classes: ClassSet, name: int | str, key: str) -> str:
    return f"{key}: {name!r} is neither a class nor ignore. The classes are {', '.join(classes.names)}."


def _color_meanings(
    classes: ClassSet, colors: Mapping[str, Sequence[Sequence[int]]], own_colors: bool
) -> dict[RGB, list[int]]:
    """Color → the classes (or 255) that it stands for."""
    meanings: dict[RGB, list[int]] = {}
    if own_colors:
        for k, color in enumerate(classes.colors):
            meanings.setdefault(color, []).append(k)
    for name, listed in colors.items():
        k = _index(classes, name)
        if k is not None:
            for red, green, blue in listed:
                meanings.setdefault((red, green, blue), []).append(k)
    return meanings


def _shared_color(classes: ClassSet, color: RGB, targets: Sequence[int]) -> str:
    names = " and ".join("ignore" if k == IGNORE else classes.names[k] for k in targets)
    return f"data.classes, data.label_colors: {names} have the same color, {list(color)}. Give each a color of its own."
