"""The recipe's section `data`: which images, with which labels, of which classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainValidator, StrictFloat, StrictInt, StrictStr

from darseg.choices import LabelFormat, NamedValues
from darseg.config.values import Count, FilePath, Key, Section, check_label_parts

NAMED_VALUES: tuple[str, ...] = get_args(NamedValues)
"""Values of data.label_values that have a name; `data/encoding.py` gives them their meaning."""


class SourceConfig(Section):
    """Where the images of one role come from; a plain string is the list file."""

    list: FilePath | None = None  # file below data.root: an id, or image-path [label-path], per line
    images: FilePath | None = None  # folder below data.root; None: data.images
    labels: FilePath | None = None
    every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep entries 0, n, 2n, …
    except_every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep the others

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.every and self.except_every:
            yield (), "has both every and except_every; keep one of them"


Source = Annotated[
    SourceConfig, BeforeValidator(lambda value: {"list": value} if isinstance(value, str) else value)
]


def _classes(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        names, value = list(value), tuple(value)
    elif isinstance(value, Mapping):
        names = list(value)
        for name, color in value.items():
            parts = color if isinstance(color, (list, tuple)) else []
            if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
                raise ValueError(
                    f"the color of {name!r} should be three numbers from 0 to 255, as in [128, 64, 0]"
                )
        value = {name: tuple(color) for name, color in value.items()}
    else:
        raise ValueError("should be the name of a built-in set, a list of names, or names with colors")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError('class names should be strings; quote names such as "yes" or "1"')
    if not 2 <= len(names) <= 255:
        raise ValueError(f"should have 2 to 255 classes, and has {len(names)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"each class name should appear once; repeated: {', '.join(repeated)}")
    return value


def _values(value: Any) -> Any:
    if isinstance(value, str):
        if value not in NAMED_VALUES:
            raise ValueError(f"should be one of {', '.join(NAMED_VALUES)}, or value: class")
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"should be one of {', '.join(NAMED_VALUES)}, or value: class, as in {{0: ignore, 255: crack}}"
        )
    # A saved recipe holds its keys as strings.
    value = {int(key) if isinstance(key, str) and key.isdigit() else key: name for key, name in value.items()}
    for key, name in value.items():
        if key != "other" and not (type(key) is int and 0 <= key <= 65535):
            raise ValueError(f"{key!r} is not a label value; it should be 0 to 65535, or other")
        if type(name) not in (int, str):
            raise ValueError(f"{key}: {name!r} should be the name or index of a class, or ignore")
    return value


def _label_colors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("should be class: [[red, green, blue], …], as in {ignore: [[0, 0, 0]]}")
    for name, colors in value.items():
        if name == "other" and isinstance(colors, str):
            if colors not in ("ignore", "nearest"):
                raise ValueError(
                    "other: should be ignore, nearest, or the colors of a class that is named other"
                )
            continue
        for color in colors if isinstance(colors, (list, tuple)) else [None]:
            parts = color if isinstance(color, (list, tuple)) else []
            if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
                raise ValueError(f"{name}: should be a list of colors, as in [[0, 0, 0], [255, 255, 255]]")
    return {
        name: colors if isinstance(colors, str) else tuple(tuple(color) for color in colors)
        for name, colors in value.items()
    }


def _bands(value: Any) -> Any:
    value = [value] if type(value) is int else value
    if isinstance(value, (list, tuple)) and len(value) not in (1, 3):
        raise ValueError(f"should be three bands (red, green, blue) or one (gray), and has {len(value)}")
    return tuple(value) if isinstance(value, list) else value


class DataConfig(Section):
    root: FilePath  # in the file: relative to its folder; once loaded: absolute
    layout: Literal["folders", "cityscapes", "voc"] = "folders"
    classes: Annotated[Any, PlainValidator(_classes)]  # cityscapes | voc | camvid | names | {name: [r, g, b]}
    ignore: Annotated[StrictInt, Field(ge=0, le=255)] = 255
    label_values: Annotated[Any, PlainValidator(_values)] = "index"
    label_format: LabelFormat = "auto"
    label_colors: Annotated[Any, PlainValidator(_label_colors)] | None = None
    label_parts: Annotated[Any, PlainValidator(check_label_parts)] | None = None
    label_transparent: StrictStr | StrictInt = "ignore"  # what alpha 0 is: ignore, a class, or as_drawn
    orientation: Literal["auto", "upright", "stored"] = "auto"
    bands: Annotated[tuple[Count, ...], BeforeValidator(_bands)] | None = None  # None: the first three
    white: StrictFloat | None = None  # for values of other than 8 bits; None: 65535
    black: StrictFloat = 0.0
    max_pixels: Count = 2**30
    images: FilePath | None = None  # None: images, or the layout's
    labels: FilePath | None = None  # None: labels, or the layout's
    sbd: FilePath | None = None  # voc: SBD's folder, absolute or below root
    labeled: Source | None = None
    unlabeled: Source | None = None
    validation: Source | None = None
    test: Source | None = None

    def sources(self) -> Iterator[tuple[str, SourceConfig]]:
        """The sources that are given, by role."""
        for role in ("labeled", "unlabeled", "validation", "test"):
            if source := getattr(self, role):
                yield role, source

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.label_values != "index" and self.ignore != 255:
            yield (
                ("ignore",),
                "has no effect with data.label_values; map the value to ignore there",
            )
        elif not isinstance(self.classes, str) and self.ignore < len(self.classes):
            yield (
                ("ignore",),
                f"found {self.ignore}, which is class {self.ignore} of {len(self.classes)}; "
                "use a value that is not a class",
            )
        if self.label_format == "index" and self.label_colors:
            yield ("label_colors",), "has no effect with label_format index; remove one of them"
        if self.label_format == "color" and self.label_values != "index":
            yield ("label_values",), "has no effect with label_format color; remove one of them"
        if self.label_parts is not None:
            if self.layout != "folders":
                yield ("label_parts",), f"does not work with layout {self.layout}; remove it"
            named = {"label_values", "label_format", "label_colors", "label_transparent", "ignore"}
            for name in sorted(named & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield (name,), "has no effect with data.label_parts; remove it"
        if self.black >= (65535 if self.white is None else self.white):
            yield ("black",), f"found {self.black:g}; should be below data.white"
        if self.layout != "voc" and self.sbd:
            yield ("sbd",), f"is only for layout voc, and the layout is {self.layout}; remove it"
        if self.layout != "folders":
            fixed: list[Key] = [(name,) for name in ("images", "labels") if getattr(self, name) is not None]
            fixed += [(role, "labels") for role, source in self.sources() if source.labels is not None]
            for key in fixed:
                yield key, f"is fixed by layout {self.layout}; remove it"
        for role, source in self.sources():
            for key, message in source.conflicts():
                yield (role, *key), message
