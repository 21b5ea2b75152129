"""The experiment: what `darseg compare` is to compare, typed and checked; a recipe for each variant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from darseg.config.recipe import Recipe
from darseg.config.text import OVERRIDE, flow, load_recipe, load_section, recipe_differences
from darseg.config.values import Count, FilePath, Key, Section
from darseg.errors import RecipeError, faults

CONTROL, ALL_LABELS = "control_", "all_labels"
"""What names of controls begin with, and the name of the ceiling: variants may not have them."""

LONGEST_NAME = 80

CHANGES = "changes."
"""Begins an override that is one more change of the base recipe."""

COMPARABLE = ("data.unlabeled", "data.bands", "data.white", "data.black", "data.max_pixels")
"""Keys of the data that a variant may change: its scores are still of the same images and labels."""


def _changes(value: Any) -> Any:
    """Changes as "key=value"; a mapping of dotted keys says the same."""
    if isinstance(value, Mapping):
        return tuple(f"{key}={flow(inner)}" for key, inner in value.items())
    return value


def _labels(value: Any) -> Any:
    return {"count": value} if type(value) is int else value


Changes = Annotated[tuple[StrictStr, ...], BeforeValidator(_changes)]


Seed = Annotated[StrictInt, Field(ge=0, lt=1 << 63)]


class VariantConfig(Section):
    """Changes of the base recipe, under a name."""

    name: StrictStr
    changes: Changes = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None  # None: all of the experiment
    labels: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None  # numbers; None: all of them

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        yield from _repeated("seeds", self.seeds or ())
        yield from _repeated("labels", self.labels or ())
        if not re.fullmatch(rf"[A-Za-z0-9][\w.+-]{{0,{LONGEST_NAME - 1}}}", self.name, re.ASCII):
            yield (
                ("name",),
                f"found {self.name!r}; it names a folder, so it should have letters, digits and _ . + - alone, "
                f"{LONGEST_NAME} at most",
            )
        if self.name.startswith(CONTROL) or self.name == ALL_LABELS:
            yield ("name",), f"found {self.name!r}; compare itself gives such names. Choose another"


class LabelsConfig(Section):
    """Which images are labeled: a number of them, drawn, or those of list files."""

    count: Count | None = None  # of the labeled images; drawn with each seed
    labeled: FilePath | None = None  # list file, as data.labeled
    unlabeled: FilePath | None = None  # list file; None: the images that are left

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if (self.count is None) == (self.labeled is None):
            yield (), "should be a number of images, or list files as in {labeled: a.txt, unlabeled: b.txt}"
        if self.count is not None and self.unlabeled is not None:
            yield (
                ("unlabeled",),
                "has no effect with count: the images that are not drawn are unlabeled. Remove it",
            )


Labels = Annotated[LabelsConfig, BeforeValidator(_labels)]


class ControlsConfig(Section):
    """Which controls each variant gets: labels alone, for as many steps, images or seconds."""

    steps: StrictBool = True
    images: StrictBool = True
    seconds: StrictBool = False


class Experiment(Section):
    """All settings of an experiment."""

    recipe: FilePath  # in the file: relative to its folder; once loaded: absolute
    changes: Changes = ()
    variants: Annotated[tuple[VariantConfig, ...], Field(min_length=1)]
    labels: tuple[Labels, ...] = ()  # none: as the recipe has them
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    controls: ControlsConfig = ControlsConfig()
    all_labels: StrictBool = False

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for index, variant in enumerate(self.variants):
            for key, message in variant.conflicts():
                yield ("variants", index, *key), message
            if unknown := [seed for seed in variant.seeds or () if seed not in self.seeds]:
                yield (
                    ("variants", index, "seeds"),
                    f"found {unknown[0]}, which is no seed of the experiment; name some of {list(self.seeds)}",
                )
        for index, labels in enumerate(self.labels):
            for key, message in labels.conflicts():
                yield ("labels", index, *key), message
        names = [variant.name.casefold() for variant in self.variants]
        yield from _repeated("variants", names, inner=("name",))
        yield from _repeated("seeds", self.seeds)
        yield from _repeated("labels", [labels.count or labels.labeled for labels in self.labels])
        if self.controls.seconds and not self.controls.steps:
            yield (
                ("controls", "seconds"),
                "needs controls.steps, whose step rate says how many steps take as many seconds; set it to true",
            )


def _repeated(section: str, values: Sequence[Any], inner: Key = ()) -> Iterator[tuple[Key, str]]:
    """A fault at each entry of a list whose value an earlier one has.

    Args:
        inner: key of the value in an entry.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            first = f"{section}.{list(values).index(value)}"
            yield (section, index, *inner), f"{value} is given twice, first in {first}; remove one"


@dataclass(frozen=True)
class ExperimentFile:
    """An experiment with the recipes of its variants.

    Attributes:
        base: the recipe with the changes that all variants have.
        recipes: name of a variant → its recipe, with the base's seed and labels.
    """

    path: Path
    settings: Experiment
    base: Recipe
    recipes: Mapping[str, Recipe]

    @property
    def title(self) -> str:
        """What the experiment is called: the file's name."""
        return self.path.stem


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentFile:
    """Read an experiment, its base recipe and the changes of its variants.

    Args:
        overrides: "key=value", as in "seeds=[0]"; "changes.KEY=value" changes a key of the base recipe, and a relative
            data.root then begins at the current folder.

    Raises RecipeError with all faults at once; variants that change which images are scored are among them.
    """
    path = Path(path)
    of_recipe = [override.removeprefix(CHANGES) for override in overrides if override.startswith(CHANGES)]
    own = [override for override in overrides if not override.startswith(CHANGES)]
    settings, text = load_section(Experiment, path, own, kind="experiment")
    folder = path.resolve().parent
    recipe = str((folder / Path(settings.recipe).expanduser()).resolve())
    settings = settings.model_copy(update={"recipe": recipe})
    shared, lines = [*_from_folder(settings.changes, folder), *of_recipe], []
    lines += _refused_seed((*settings.changes, *of_recipe), text.place(("changes",)), "changes")
    try:
        base = load_recipe(recipe, shared)
    except RecipeError as error:
        raise RecipeError(f"{text.place(('recipe',))}: {error}") from None
    recipes: dict[str, Recipe] = {}
    for index, variant in enumerate(settings.variants):
        key = ("variants", index, "changes")
        place, name = text.place(key), f"variants.{index}.changes"
        lines += _refused_seed(variant.changes, place, name)
        try:
            recipe = load_recipe(settings.recipe, [*shared, *_from_folder(variant.changes, folder)])
        except RecipeError as error:
            # Its first line names the recipe, and the others begin with "override" and the change.
            inner = [line.removeprefix("  - ").removeprefix(OVERRIDE) for line in str(error).splitlines()]
            lines += [f"{place}: {name} ({variant.name}): {line}" for line in inner[1:] or inner]
            continue
        recipes[variant.name] = recipe
        lines += [
            f"{place}: {name} ({variant.name}): {line}"
            for line in _not_comparable(base, recipe, settings.labels)
        ]
    if lines:
        raise RecipeError(faults(f"{path} cannot be used", lines))
    return ExperimentFile(path, settings, base=base, recipes=recipes)


def _from_folder(changes: Sequence[str], folder: Path) -> list[str]:
    """Changes in which a relative data.root begins at a folder."""
    return [
        f"data.root={flow(str((folder / Path(value.strip()).expanduser()).resolve()))}"
        if name == "data.root"
        else f"{name}{equals}{value}"
        for name, equals, value in (change.partition("=") for change in changes)
    ]


def _refused_seed(changes: Sequence[str], place: str, name: str) -> list[str]:
    if any(change.partition("=")[0] == "seed" for change in changes):
        return [f"{place}: {name}: seed: the seeds of an experiment are its key seeds. Write it there"]
    return []


def _not_comparable(base: Recipe, recipe: Recipe, labels: Sequence[LabelsConfig]) -> list[str]:
    """A line for each key that a variant may not change, or scores are of other images or classes."""
    allowed = COMPARABLE[1:] if labels else COMPARABLE
    changed: dict[str, list[str]] = {}
    for line in recipe_differences(base, recipe):
        key = ".".join(line.partition(":")[0].split(".")[:2])
        if key.startswith("data.") and key not in allowed:
            changed.setdefault(key, []).append(line)
    lines = []
    for key, differences in changed.items():
        reason = "scores of other images, labels or classes cannot be compared"
        remedy = "Remove it, or change it for all variants with the experiment's changes"
        if key in ("data.labeled", "data.unlabeled"):
            reason, remedy = (
                "all variants get the same images",
                "Remove it; the experiment's key labels says which",
            )
        shown = differences[0] if len(differences) == 1 else key
        lines.append(f"{shown}: {reason}. {remedy}")
    return lines
