"""What the values or colors of label files mean, as classes and keys of a recipe's data section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from darseg.data.alpha import alpha_line
from darseg.data.classes import BUILT_IN, CITYSCAPES, IGNORE
from darseg.data.encoding import CITYSCAPES_IDS, IDS_SUFFIX, TRAIN_IDS_SUFFIX
from darseg.data.strays import describe
from darseg.errors import DataError, faults
from darseg.init.names import RGB, NameList, foreign_names
from darseg.init.stray_keys import as_values, without_strays
from darseg.init.survey import MOST_COLORS, Survey
from darseg.init.words import CITYSCAPES_NAME

BLACK: RGB = (0, 0, 0)
MAY_BE_VOID = {BLACK, (255, 255, 255), (224, 224, 192)}
"""Colors that may be added to those of a built-in set: black, white, and VOC's outlines."""
NO_NAMES = "no names were found; rename the classes"


@dataclass(frozen=True)
class Guess:
    """What the label files mean.

    Attributes:
        classes: as in a recipe: a built-in set's name, names, or names with colors.
        keys: more keys of the recipe's data section (label_values, ignore, …) with their values.
        why: key → reason, also for "classes".
        notes: for each class, in order, which value it has, and its share of the labeled pixels.
        warnings: what a reader must look at.
    """

    classes: str | list[str] | dict[str, list[int]]
    keys: dict[str, Any]
    why: dict[str, str]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def guess_classes(survey: Survey, names: Sequence[NameList], labels: Sequence[Path]) -> Guess:
    """Which classes the labels hold, and how. Raises DataError if the labels cannot hold classes.

    Args:
        names: class names from files, the most likely first.
        labels: all label files; their names can show the data set.
    """
    if not survey.pixels:
        problems = [survey.faults[path] for path in labels if path in survey.faults]
        if problems:
            raise DataError(faults("No label file can be used", problems, limit=20))
        raise DataError(
            "All label files are completely transparent. Export them again with one value per class."
        )
    colors, strays = survey.colors, survey.strays
    keys: dict[str, Any] = {}
    why: dict[str, str] = {}
    pixels = dict(survey.pixels)
    if survey.by_color:
        keys["label_format"] = "color"
        why["label_format"] = "the palettes number colors differently, so colors count"
    elif colors and all(key >> 16 == key & 255 == key >> 8 & 255 for key in (*pixels, *strays)):
        keys["label_format"] = "index"
        why["label_format"] = "the label files are RGB with three equal channels: values, not colors"
        pixels = {key & 255: count for key, count in pixels.items()}
        strays = as_values(strays)
        colors = False
    if len(pixels) > MOST_COLORS:
        raise DataError(
            f"The label files hold {len(pixels)} different {'colors' if colors else 'values'} in total, so they show "
            "instances or have smoothed edges. Export them with one value per class."
        )
    values = _Values(pixels, survey.palette)
    try:
        guess = _guess_colors(pixels, names) if colors else _guess_values(values, names, labels)
    except DataError as error:
        raise DataError(f"{error}{_about_alpha(survey)}") from None
    more, reasons, warnings = without_strays(guess.classes, guess.keys, strays, colors=colors)
    if strays:
        warnings = [f"{describe(strays.values(), colors, survey.all_pixels)}. {warnings[0]}"]
    if survey.alpha_files:
        warnings.append(alpha_line(survey.alpha, survey.alpha_files, survey.all_pixels))
    return Guess(
        guess.classes,
        keys | guess.keys | more,
        why | guess.why | reasons,
        notes=guess.notes,
        warnings=(*guess.warnings, *warnings, *survey.warnings),
    )


def _about_alpha(survey: Survey) -> str:
    """What transparent pixels have to do with label files of one class; empty if there are none."""
    if not survey.alpha_files:
        return ""
    return (
        f" {alpha_line(survey.alpha, survey.alpha_files, survey.all_pixels)} For masks on a transparent background, "
        "write a recipe with data.classes: [background, NAME], label_transparent: background, and label_values (or "
        "label_colors) for NAME."
    )


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.2%}"


# Colors


def _guess_colors(pixels: Mapping[int, int], names: Sequence[NameList]) -> Guess:
    rgb = {(key >> 16, key >> 8 & 255, key & 255): count for key, count in pixels.items()}
    named = _named_colors(rgb, names) or _known_colors(rgb)
    classes, table, reason = named or _unnamed_colors(rgb)
    warnings: list[str] = []
    if named is None and BLACK in rgb:
        warnings.append(
            "black became the class background. If it means not labeled, remove background from data.classes and set "
            "data.label_colors: {ignore: [[0, 0, 0]]}"
        )
    if len(table) < 2:
        raise DataError(
            f"The label files hold only one color, {list(next(iter(rgb)))}, so there is only one class. Label the other "
            "pixels as another class."
        )
    class_colors = set(table.values())
    beyond = [color for color in rgb if color not in class_colors]
    keys: dict[str, Any] = {}
    why = {"classes": reason}
    labeled = sum(count for color, count in rgb.items() if color in class_colors)
    if beyond:
        keys["label_colors"] = {"ignore": [list(color) for color in sorted(beyond)]}
        why["label_colors"] = (
            f"colors of no class, {_share(sum(rgb[color] for color in beyond), sum(rgb.values()))} of all pixels"
        )
    notes = tuple(_share(rgb.get(color, 0), labeled) for color in table.values())
    return Guess(classes, keys, why, notes=notes, warnings=tuple(warnings))


_Colors = tuple[str | dict[str, list[int]], dict[str, RGB], str]
"""Classes as in a recipe, name → color, and the reason."""


def _named_colors(rgb: Mapping[RGB, int], names: Sequence[NameList]) -> _Colors | None:
    """Read the classes from the first file of names that has two of the colors."""
    for name_list in names:
        if name_list.colors and len(set(name_list.colors) & set(rgb)) >= 2:
            table = dict(zip(name_list.names, name_list.colors, strict=True))
            classes = {name: list(color) for name, color in table.items()}
            return classes, table, f"names and colors of {name_list.path.name}"
    return None


def _known_colors(rgb: Mapping[RGB, int]) -> _Colors | None:
    """Take the classes of the built-in set with most of the colors, if all colors are its own."""
    fitting = [
        (len(set(rgb) & set(known.colors)), name)
        for name, known in BUILT_IN.items()
        if set(rgb) - MAY_BE_VOID <= set(known.colors)
        and not _may_be_others(name, len(set(rgb) & set(known.colors)))
    ]
    count, name = max(fitting, default=(0, ""))
    if count < 2:
        return None
    known = BUILT_IN[name]
    return name, dict(zip(known.names, known.colors, strict=True)), f"the colors are those of {name}"


def _may_be_others(name: str, count: int) -> bool:
    """Whether `count` of the colors of a built-in set may stand for other classes.

    labelme, CVAT and other tools draw any classes in VOC's colors.
    """
    return name == "voc" and count * 2 < len(BUILT_IN[name])


def _unnamed_colors(rgb: Mapping[RGB, int]) -> _Colors:
    """A class for each color, the most frequent first, but black before all."""
    ordered = sorted(rgb, key=lambda color: (color != BLACK, -rgb[color], color))
    table = {
        "background" if color == BLACK else "class_{:02x}{:02x}{:02x}".format(*color): color
        for color in ordered
    }
    classes = {name: list(color) for name, color in table.items()}
    return classes, table, f"{NO_NAMES}: the colors show which is which"


# Values


@dataclass(frozen=True)
class _Values:
    """What label files of values hold: value → pixels, and the colors of a palette."""

    pixels: Mapping[int, int]
    palette: Sequence[RGB]

    @property
    def real(self) -> set[int]:
        """The values without 255."""
        return set(self.pixels) - {IGNORE}


@dataclass(frozen=True)
class _Meaning:
    """What values mean.

    Attributes:
        table: value → class name, in the order of the classes.
        reason: why the classes have these names.
        encoding: "binary", "one_based", "map" (each value is listed), or None if values are indices of classes.
        colors: of the classes; None: those of the palette.
    """

    table: Mapping[int, str]
    reason: str
    encoding: str | None = None
    warnings: Sequence[str] = ()
    colors: Sequence[RGB] | None = None


def _guess_values(values: _Values, names: Sequence[NameList], labels: Sequence[Path]) -> Guess:
    own = any(foreign_names(name_list, CITYSCAPES.names) for name_list in names)
    if not own and _are_cityscapes(values, labels):
        return Guess("cityscapes", {}, {"classes": "the label files are named as in Cityscapes"})
    meanings = [(name_list, meaning) for name_list in names if (meaning := _named_values(values, name_list))]
    if meanings:
        (taken, meaning), *further = meanings
        for name_list, second in further:
            shared = values.pixels.keys() & meaning.table.keys() & second.table.keys()
            if any(meaning.table[value] != second.table[value] for value in shared):
                line = (
                    f"{name_list.path} names the values differently than {taken.path}, whose names were taken"
                )
                meaning = replace(meaning, warnings=[*meaning.warnings, line])
        return _described(values, meaning)
    unused = [
        f"{name_list.path} names {len(name_list.names)} classes, but the label values do not fit them"
        for name_list in names
    ]
    present = sorted(values.pixels)
    listed = ", ".join(map(str, present[:20])) + (" …" if len(present) > 20 else "")
    if present == [0, IGNORE]:
        table = {0: "background", IGNORE: "foreground"}
        return _described(values, _Meaning(table, NO_NAMES, "binary", warnings=unused))
    stretched = _are_stretched(present)
    real = present if stretched else sorted(values.real)
    if len(real) < 2:
        raise DataError(
            f"The label files hold only the value(s) {listed}; 255 means not labeled. So there is only one class: label "
            "the other pixels as another class."
        )
    return _known_palette(values, real, unused) or _described(
        values, _unnamed_values(real, unused, listed if stretched and IGNORE in real else None)
    )


def _are_cityscapes(values: _Values, labels: Sequence[Path]) -> bool:
    """Whether label files are named like Cityscapes' own, and hold no values that it does not have."""
    named = [path.name for path in labels if path.name.endswith((IDS_SUFFIX, TRAIN_IDS_SUFFIX))]
    only_train_ids = all(name.endswith(TRAIN_IDS_SUFFIX) for name in named)
    most = len(CITYSCAPES) - 1 if only_train_ids else max(CITYSCAPES_IDS)
    return any(CITYSCAPES_NAME.match(name) for name in named) and max(values.real, default=0) <= most


def _are_stretched(present: Sequence[int]) -> bool:
    """Whether sorted values are classes stretched to grays, as 0, 127, 255 or 0, 85, 170, 255."""
    steps = np.diff(present)
    return len(present) > 2 and present[0] == 0 and bool(steps.max() - steps.min() <= 1 < steps.min())


def _known_palette(values: _Values, real: Sequence[int], warnings: Sequence[str]) -> Guess | None:
    """The built-in set whose colors the palette has."""
    for name, known in BUILT_IN.items():
        is_its_palette = list(values.palette[: len(known)]) == list(known.colors) and real[-1] < len(known)
        if is_its_palette and not _may_be_others(name, len(real)):
            shares = _shares(values.pixels, dict(enumerate(known.names)))
            why = {"classes": f"the palette is that of {name}"}
            return Guess(name, {}, why, notes=shares, warnings=tuple(warnings))
    return None


def _unnamed_values(real: Sequence[int], warnings: Sequence[str], grays: str | None) -> _Meaning:
    """A class for each value.

    Args:
        grays: the values as text, if they are stretched to grays and 255 is one of them.
    """
    table = {value: f"class_{value}" for value in real}
    if list(real) == list(range(len(real))):
        return _Meaning(table, NO_NAMES, warnings=warnings)
    if list(real) == list(range(1, len(real) + 1)):
        return _Meaning(table, f"{NO_NAMES}. Values start at 1", "one_based", warnings=warnings)
    if grays:
        warnings = [
            *warnings,
            f"255 became a class, because the values ({grays}) are evenly spaced, like classes shown as grays. If 255 "
            "means not labeled, set data.label_values.255 to ignore and remove its class",
        ]
    return _Meaning(table, f"{NO_NAMES}. The numbers are the label values", "map", warnings=warnings)


def _named_values(values: _Values, name_list: NameList) -> _Meaning | None:
    """The meaning by the names of a file; None if the values do not fit the names."""
    count, present, real = len(name_list.names), set(values.pixels), values.real
    file = name_list.path.name
    reason = f"names of {file}"
    if name_list.values:
        table = dict(sorted(zip(name_list.values, name_list.names, strict=True)))
        beyond = sorted(real - set(table))
        if not present & set(table):
            return None
        if list(table) == list(range(count)) and not beyond:
            return _Meaning(table, reason, colors=name_list.colors)
        warnings = [
            f"label values {', '.join(map(str, beyond[:20]))} have no name in {file} and are not learned"
        ]
        return _Meaning(table, reason, "map", warnings=warnings if beyond else [])
    if count == 2 and present == {0, IGNORE}:
        return _Meaning({0: name_list.names[0], IGNORE: name_list.names[1]}, reason, "binary")
    if real and max(real) < count:
        return _Meaning(dict(enumerate(name_list.names)), reason, colors=name_list.colors)
    if real and max(real) == count:
        warnings = []
        if 0 in real:
            warnings.append(
                f"{file} has {count} names and the values are 0 to {count}, so 0 was taken for not labeled. If {count} "
                f"means not labeled instead, set data.ignore: {count} and remove data.label_values"
            )
        return _Meaning(dict(enumerate(name_list.names, 1)), reason, "one_based", warnings=warnings)
    return None


def _shares(pixels: Mapping[int, int], table: Mapping[int, str]) -> tuple[str, ...]:
    labeled = sum(count for value, count in pixels.items() if value in table)
    return tuple(f"value {value}, {_share(pixels.get(value, 0), labeled)}" for value in table)


def _described(values: _Values, meaning: _Meaning) -> Guess:
    """The keys of a recipe that say what the values mean."""
    table, colors = meaning.table, meaning.colors
    keys: dict[str, Any] = {}
    why = {"classes": meaning.reason}
    if meaning.encoding == "map":
        beyond = sorted(set(values.pixels) - set(table))
        keys["label_values"] = {**table, **dict.fromkeys(beyond, "ignore")}
        why["label_values"] = "the class that each value stands for"
    elif meaning.encoding:
        keys["label_values"] = meaning.encoding
        why["label_values"] = {
            "binary": "the label files are masks of 0 and 255",
            "one_based": "0 means not labeled; classes start at 1",
        }[meaning.encoding]
    names = list(table.values())
    if colors is None and values.palette:
        from_palette = [values.palette[value] for value in table if value < len(values.palette)]
        colors = from_palette if len(set(from_palette)) == len(names) else None
    classes: list[str] | dict[str, list[int]] = names
    if colors is not None:
        classes = {name: list(color) for name, color in zip(names, colors, strict=True)}
    notes = _shares(values.pixels, table)
    return Guess(classes, keys, why, notes=notes, warnings=tuple(meaning.warnings))
