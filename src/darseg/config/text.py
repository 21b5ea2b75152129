"""The YAML text of a recipe or experiment: read with line numbers and overrides, and written."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from darseg.config.recipe import Recipe, ResultConfig, resolved
from darseg.config.values import Key, Section
from darseg.data.files import read_text
from darseg.errors import RecipeError, faults


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and does not read dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


LARGEST = 1 << 20
"""Bytes of a recipe: reading a MiB of YAML takes some 10 s."""
MOST_VALUES = 100_000
"""Values of a recipe, those that an alias repeats counted each time. A few lines of aliases can stand for billions."""
MOST_BITS = 1024
"""Of a number."""
LONGEST = 300
"""Characters of a value in a message."""
DEEPEST = 50
"""Lists and mappings in each other."""


Checked = TypeVar("Checked", bound=Section)

OVERRIDE = "override "
"""Begins the places of what a command line changes."""


class _TooMuchError(Exception):
    """A text asks for more than a recipe may. `mark`: where."""

    def __init__(self, problem: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


class Text:
    """The plain values of a YAML text, the place of each key, and the faults of the text itself."""

    def __init__(self, name: str, model: type[Section]) -> None:
        self.name, self.model = name, model
        self.places: dict[Key, str] = {}
        self.faults: list[str] = []
        self.values = 0  # read so far

    def read(self, text: str, key: Key = (), override: str | None = None) -> Any:
        """The values of `text`, which becomes the value of `key`."""
        loader = None
        try:
            loader = _Loader(text)  # raises an error for control characters
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, key, override=override)
        except (yaml.YAMLError, _TooMuchError) as error:
            mark = getattr(error, "problem_mark", None)
            place = override or (f"{self.name}:{mark.line + 1}" if mark else self.name)
            reason = getattr(error, "problem", None) or _reason(error)
            kind = "" if isinstance(error, _TooMuchError) else "not valid YAML: "
            self.faults.append(f"{place}: {kind}{reason}")
        except RecursionError:  # raised by the parser itself
            self.faults.append(f"{override or self.name}: {_TOO_DEEP}")
        finally:
            if loader is not None:
                loader.dispose()
        return None

    def _value(self, loader: _Loader, node: yaml.Node, key: Key, *, override: str | None) -> Any:
        place = override or f"{self.name}:{node.start_mark.line + 1}"
        self.places.setdefault(key, place)
        self.values += 1
        if self.values > MOST_VALUES:
            problem = f"there are more than {MOST_VALUES} values with those that aliases (*name) repeat. Write fewer"
            raise _TooMuchError(problem, node.start_mark)
        if len(key) > DEEPEST:  # also of an alias that contains itself
            raise _TooMuchError(_TOO_DEEP, node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._value(loader, item, (*key, index), override=override)
                for index, item in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode):
            values: dict[Any, Any] = {}
            for name_node, value_node in node.value:
                name = _scalar(loader, name_node)
                name_place = override or f"{self.name}:{name_node.start_mark.line + 1}"
                if not isinstance(name, (str, int, float, bool, type(None))):
                    self.faults.append(f"{name_place}: a key should be a string")
                    continue
                inner = (*key, name)
                if name in values:
                    self.faults.append(
                        f"{name_place}: {dotted(inner)} is set twice, first at {self.places[inner]}; remove one"
                    )
                self.places[inner] = name_place
                values[name] = self._value(loader, value_node, inner, override=override)
            return values
        return _scalar(loader, node)

    def place(self, key: Key) -> str:
        """The place of a key, or of the nearest key that contains it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, f"{self.name}:1")


_TOO_DEEP = f"lists and mappings lie in each other more than {DEEPEST} deep. A recipe needs 5; flatten it"


def _reason(error: Exception) -> str:
    """Why a text is no YAML, on one line; a control character's position counts characters."""
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.character, int):
        return (
            f"character {error.position + 1} is U+{error.character:04X}, which YAML does not allow; remove it"
        )
    return " ".join(str(error).split())


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    """The value of a node that is no list or mapping. Raises YAMLError, _TooMuchError."""
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError, AttributeError, TypeError, KeyError, IndexError) as error:
        # A number of thousands of digits, among others.
        text = str(node.value)
        shown = text if len(text) <= 40 else f"{text[:37]}… ({len(text)} characters)"
        problem = f"{shown} cannot be read as a value. Shorten it, or quote it if it is text"
        raise _TooMuchError(problem, node.start_mark) from error
    if (
        isinstance(value, int) and value.bit_length() > MOST_BITS
    ):  # in base 2, 16 or 60; too long to be written out
        raise _TooMuchError(
            f"{str(node.value)[:37]}… is a number of more than {MOST_BITS} bits", node.start_mark
        )
    return value


def dotted(key: Sequence[str | int]) -> str:
    """("rounds", 0, "steps") → "rounds.0.steps"."""
    return ".".join(map(str, key))


def load_section(
    model: type[Checked], path: Path, overrides: Sequence[str] = (), *, kind: str
) -> tuple[Checked, Text]:
    """The values in a YAML file, typed and checked, and the places of its keys.

    Args:
        kind: what the file is called in messages.

    Raises RecipeError with all faults at once.
    """
    text = Text(path.name, model)
    values = text.read(_content(path, kind))
    if not text.faults and not isinstance(values, dict):
        found = "nothing" if values is None else f"a value of type {type(values).__name__}"
        article = "an" if kind[0] in "aeiou" else "a"
        text.faults.append(
            f"{path.name}:1: found {found}; {article} {kind} is a mapping with the keys {', '.join(model.model_fields)}"
        )
    if text.faults:
        raise RecipeError(faults(f"{path} cannot be used", text.faults))
    for override in overrides:
        _override(values, override, text, kind=kind)
    section, lines = None, list(text.faults)
    try:
        section = model.model_validate(values)
        lines += [f"{text.place(key)}: {dotted(key)}: {message}" for key, message in section.conflicts()]
    except ValidationError as error:
        lines += [_describe(detail, text) for detail in error.errors() if not _follows(detail, error)]
    if lines or section is None:
        raise RecipeError(faults(f"{path} cannot be used", lines)) from None
    return section, text


def _content(path: Path, kind: str) -> str:
    """The text of a YAML file. Raises RecipeError if it cannot be read."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise RecipeError(
                f"{path} has {size:,} bytes, and a {kind} may have {LARGEST:,}. Name images in list files, not in the "
                f"{kind}."
            )
        return read_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: this {kind} does not exist. Give the path of a YAML file.") from None
    except IsADirectoryError:
        remedy = (
            ": `darseg init` writes one for a folder of images, and a run folder has its own, recipe.yaml"
            if kind == "recipe"
            else ""
        )
        raise RecipeError(
            f"{path} is a folder, not a {kind}. Give the path of a YAML file{remedy}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} cannot be read as UTF-8 text ({error}). Give the path of a YAML file."
        ) from error


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply the changes from a command line.

    Args:
        overrides: "section.key=value", with the value in YAML; list elements have numbers ("rounds.0.steps=300").
            A relative `data.root` begins at the current folder.

    Returns:
        the recipe; `data.root` and the path of `network.weights`, relative to the recipe's folder, are absolute in it.

    Raises RecipeError with all faults at once, each with its line and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    recipe, text = load_section(Recipe, path, overrides, kind="recipe")
    try:
        return resolved(_from_here(recipe, text, path.resolve().parent), path.resolve().parent)
    except (
        RuntimeError,
        OSError,
        ValueError,
    ) as error:  # a user after ~ who does not exist; a circle of links
        raise RecipeError(
            f"{path} cannot be used: data.root or network.weights is no usable path ({error}). Correct it."
        ) from error


def _from_here(recipe: Recipe, text: Text, folder: Path) -> Recipe:
    """The recipe; a relative `data.root` that a command line gave begins at the current folder.

    If nothing is there, but in the recipe's folder, it begins at that one, as in 0.2.
    """
    if not text.place(("data", "root")).startswith(OVERRIDE):
        return recipe
    path = Path(recipe.data.root).expanduser()
    root = folder / path if (folder / path).exists() and not path.exists() else path.absolute()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(root)})})


def load_saved_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` for a run folder's recipe; `result.align` is off if it has no result section."""
    recipe = load_recipe(path, overrides)
    if "result" in recipe.model_fields_set:
        return recipe
    return recipe.model_copy(update={"result": ResultConfig(align="off")})


def as_begun(recipe: Recipe, saved: Recipe) -> Recipe:
    """The recipe that a run is resumed with: without a result section, it has that of the run folder."""
    return (
        recipe if "result" in recipe.model_fields_set else recipe.model_copy(update={"result": saved.result})
    )


def _override(values: dict, override: str, text: Text, *, kind: str) -> None:
    place = f"{OVERRIDE}{override if len(override) <= LONGEST else override[: LONGEST - 1] + '…'}"
    name, equals, value = override.partition("=")
    if not equals or not name:
        text.faults.append(f"{place}: should be section.key=value, as in training.batch=8")
        return
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    # The override replaces everything below this key.
    text.places = {other: at for other, at in text.places.items() if other[: len(key)] != key}
    known = len(text.faults)
    new = text.read(value, key, place)
    if len(text.faults) > known:
        return
    text.places[key] = place
    into: Any = values
    for depth, part in enumerate(key[:-1]):
        if isinstance(into, list) and isinstance(part, int) and part < len(into):
            into = into[part]
        elif isinstance(into, dict):
            if into.get(part) is None:
                into[part] = {}
                text.places.setdefault(key[: depth + 1], place)
            elif isinstance(into[part], str):  # a source given as its list file alone
                into[part] = {"list": into[part]}
            into = into[part]
        else:
            text.faults.append(f"{place}: the {kind} has no {dotted(key[: depth + 1])}")
            return
    last = key[-1]
    if isinstance(into, dict) or (isinstance(into, list) and isinstance(last, int) and last < len(into)):
        into[last] = new
    else:
        text.faults.append(f"{place}: the {kind} has no {name}")


def _follows(detail: ErrorDetails, error: ValidationError) -> bool:
    """Whether a list is too short only because an entry has a fault of its own and was left out."""
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in error.errors()
    )


def _describe(detail: ErrorDetails, text: Text) -> str:
    loc, message = detail["loc"], detail["msg"]
    key, place = dotted(loc), text.place(loc)
    if detail["type"] == "extra_forbidden":
        known = _keys_at(text.model, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, 1, 0.5)
        everywhere = {dotted(path) for path in _all_keys(text.model)}
        elsewhere = sorted(path for path in everywhere if path.rsplit(".", 1)[-1] == str(loc[-1]))
        if near:
            hint = f"the nearest known key is {dotted((*loc[:-1], near[0]))}"
        elif elsewhere:
            hint = f"this key exists elsewhere: {', '.join(elsewhere)}"
        else:
            hint = f"the keys here are {', '.join(known)}"
        return f"{place}: {key}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{place}: {key}: this key is required, and missing"
    message = (
        message.removeprefix("Value error, ")
        .removeprefix("Input ")
        .replace("a valid tuple", "a list, as in [1, 2]")
    )
    if detail["type"] == "too_short":
        message = "should have at least one entry"
    if detail["type"] == "model_type":
        message = f"should be keys with values; the keys here are {', '.join(_keys_at(text.model, loc))}"
    found = repr(detail["input"])
    found = found if len(found) <= LONGEST else f"{found[: LONGEST - 1]}…"
    return f"{place}: {key}: found {found}; {message}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _keys_at(model: type[BaseModel], loc: Key) -> list[str]:
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], above: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*above, name))


class _Dumper(yaml.SafeDumper):
    """Safe YAML that reads back equal.

    PyYAML itself writes Unicode line breaks into plain strings, and reads them as blanks.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
# Quotes strings that the loader would read as numbers.
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_recipe(recipe: Section) -> str:
    """The recipe as YAML with every key; `load_recipe` reads it back as an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """A plain value as YAML on one line, which `load_recipe` reads back as the same value."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("...\n").strip()


def recipe_differences(old: Section, new: Section) -> list[str]:
    """A line "key: old → new" for each key that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    keys = sorted({*before, *after})
    return [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in keys
        if before.get(key, ...) != after.get(key, ...)
    ]


def _shown(values: Mapping[str, Any], key: str) -> Any:
    """A value as a recipe has it."""
    value = values.get(key, "not set")
    return "null" if value is None else value


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*key, name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*key, index))
    else:
        yield dotted(key), value
