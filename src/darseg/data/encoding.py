"""How the values and colors of label files map to classes: what a recipe's label settings mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darseg.choices import LabelFormat
from darseg.data.classes import CITYSCAPES, IGNORE, ClassSet
from darseg.errors import RecipeError, faults

RGB = tuple[int, int, int]

IDS_SUFFIX = "_labelIds.png"
"""Ends the names of Cityscapes' label maps that hold its 35 ids instead of the 19 train ids."""

TRAIN_IDS_SUFFIX = "_labelTrainIds.png"

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
        ignore: if `values` is None, the value besides 255 that is no class.
        colors: (color, class or 255) for color files.
        city_ids: files named *_labelIds.png hold Cityscapes' ids, files named *_labelTrainIds.png do not.
    """

    format: LabelFormat = "auto"
    values: tuple[tuple[int, int], ...] | None = None
    other: int | None = None
    ignore: int = IGNORE
    colors: tuple[tuple[RGB, int], ...] = ()
    city_ids: bool = False

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
    colors: Mapping[str, Sequence[Sequence[int]]] | None = None,
    own_colors: bool = True,
) -> LabelEncoding:
    """The encoding that a recipe's label settings describe.

    Args:
        ignore: the value besides 255 that is no class; only if `values` is "index".
        values: value → class (name or index) or "ignore", with the key "other" for all values that are not listed; or
            a name: "index" (values are classes), "one_based" (0 is not labeled, classes are counted from 1), "binary"
            (0 and 255, or 0 and 1 in files of one bit), "cityscapes_ids".
        colors: class name or "ignore" → colors that stand for it, in addition to the classes' own.
        own_colors: the colors of `classes` are those of the label files.

    Raises:
        RecipeError: settings contradict each other or the classes. The message lists every one.
    """
    problems: list[str] = []
    pairs, other = _value_map(classes, values, problems)
    if pairs is not None and ignore != IGNORE:
        problems.append(
            "data.ignore cannot be combined with data.label_values. List the value there instead, as value: ignore."
        )
    if pairs is None and not len(classes) <= ignore <= IGNORE:
        problems.append(
            f"data.ignore: {ignore} is not between {len(classes)} and 255. The values below {len(classes)} are classes."
        )
    meanings = _color_meanings(classes, colors or {}, own_colors, problems=problems)
    # Where files of values are expected, a color of two classes may be meant for drawing only. It is not read.
    table = {color: targets[0] for color, targets in meanings.items() if len(set(targets)) == 1}
    if format == "color" or colors:
        problems += _shared_colors(
            classes, {color: meanings[color] for color in meanings if color not in table}
        )
    if problems:
        raise RecipeError(faults("The label settings of the recipe cannot be used", problems))
    return LabelEncoding(
        format=format,
        values=pairs,
        other=other,
        ignore=ignore,
        colors=tuple(sorted(table.items())),
        city_ids=values in ("index", "cityscapes_ids") and classes.names == CITYSCAPES.names,
    )


Pairs = tuple[tuple[int, int], ...]
"""(value in a file, class or 255)."""


def _value_map(
    classes: ClassSet, values: str | Mapping[int | str, int | str], problems: list[str]
) -> tuple[Pairs | None, int | None]:
    """`values` and `other` of the encoding; what does not fit is added to `problems`."""
    count = len(classes)
    if isinstance(values, Mapping):
        targets = {
            value: _target(classes, name, f"data.label_values.{value}", problems=problems)
            for value, name in values.items()
        }
        other = targets.pop("other", None)
        return tuple(sorted((int(value), k) for value, k in targets.items())), other
    match values:
        case "index":
            return None, None
        case "one_based":
            return ((0, IGNORE), (IGNORE, IGNORE), *((k + 1, k) for k in range(count))), None
        case "binary":
            if count != 2:
                problems.append(f"data.label_values: binary is for 2 classes, but the recipe has {count}.")
            return ((0, 0), (1, 1), (255, 1)), None
        case "cityscapes_ids":
            if count != len(CITYSCAPES_IDS):
                problems.append(
                    f"data.label_values: cityscapes_ids is for the 19 classes of Cityscapes, but the recipe has {count}."
                )
            return CITY_IDS.values, CITY_IDS.other
    problems.append(
        f"data.label_values: there is no value map {values!r}. Give index, one_based, binary, cityscapes_ids, or "
        "value: class for each value."
    )
    return None, None


def _target(classes: ClassSet, name: int | str, key: str, *, problems: list[str]) -> int:
    """The class that `name` stands for in the recipe's key, or 255; what stands for neither is added to `problems`."""
    if name == "ignore":
        return IGNORE
    if type(name) is int and 0 <= name < len(classes):
        return name
    if name in classes.names:
        return classes.names.index(str(name))
    problems.append(
        f"{key}: {name!r} is neither a class nor ignore. The classes are {', '.join(classes.names)}."
    )
    return IGNORE


def _color_meanings(
    classes: ClassSet, colors: Mapping[str, Sequence[Sequence[int]]], own_colors: bool, *, problems: list[str]
) -> dict[RGB, list[int]]:
    """Color → the classes (or 255) that it stands for; unknown names are added to `problems`."""
    meanings: dict[RGB, list[int]] = {}
    if own_colors:
        for k, color in enumerate(classes.colors):
            meanings.setdefault(color, []).append(k)
    for name, listed in colors.items():
        k = _target(classes, name, "data.label_colors", problems=problems)
        for red, green, blue in listed:
            meanings.setdefault((red, green, blue), []).append(k)
    return meanings


def _shared_colors(classes: ClassSet, meanings: Mapping[RGB, Sequence[int]]) -> list[str]:
    """A line for each of these colors, which stand for more than one class."""
    return [
        f"data.classes, data.label_colors: {' and '.join(_name(classes, k) for k in targets)} have the same color, "
        f"{list(color)}. Give each a color of its own."
        for color, targets in meanings.items()
    ]


def _name(classes: ClassSet, k: int) -> str:
    return "ignore" if k == IGNORE else classes.names[k]
