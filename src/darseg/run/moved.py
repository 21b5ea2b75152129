"""Data that moved after a run began: the run finds it again, and takes it only if it is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.files import read_json
from darseg.data.manifest import Manifest
from darseg.errors import DarsegError
from darseg.run.data_digest import digest_manifest
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal

NEAR = 3
"""Folders above a run's in which recipes are looked for: runs/NAME lies next to NAME.yaml."""
MOST_RECIPES = 50
"""YAML files that are read in one of these folders."""


def with_moved_data(recipe: Recipe, run: RunDirectory, manifest_of: Callable[[Recipe], Manifest]) -> Recipe:
    """The recipe of a run folder; if its data are elsewhere now, with their new place.

    The new place is that of a recipe nearby with the same data section, or where the old place lies now if all was moved
    together. It counts only if the data there are those that the run recorded.
    """
    root = Path(recipe.data.root)
    if root.is_dir():
        return recipe

    def moved_to(place: Path) -> Recipe:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(place)})})

    def is_same(place: Path) -> bool:
        try:
            return digest_manifest(manifest_of(moved_to(place))) == read_json(run.data)
        except (DarsegError, OSError, ValueError):
            return False

    places: dict[Path, str] = {}
    for place, reason in _recipes_places(recipe, run.root.resolve()):
        places.setdefault(place, reason)
    found = [place for place in places if is_same(place)]
    if not found:
        found = [*islice(filter(is_same, dict.fromkeys(_shifted(root, run.root.resolve()))), 1)]
    if not found:
        return recipe
    by = f" ({places[found[0]]})" if found[0] in places else ""
    others = f"; also in {', '.join(map(str, found[1:]))}. Choose with data.root=PATH" if found[1:] else ""
    journal = Journal(None, None, Console(stderr=True))
    journal.say(f"note: {root} is not there; the same data are in {found[0]}{by}{others}")
    return moved_to(found[0])


def _recipes_places(recipe: Recipe, run: Path) -> Iterator[tuple[Path, str]]:
    """The data's places in recipes near the run, and these; the recipe with the run's name first."""
    wanted = recipe.data.model_copy(update={"root": ""})
    for folder in list(run.parents)[:NEAR]:
        try:
            files = sorted(
                path for path in folder.iterdir() if path.suffix in (".yaml", ".yml") and path.is_file()
            )
        except OSError:
            continue
        files.sort(key=lambda path: path.stem != run.name)
        for path in files[:MOST_RECIPES]:
            try:
                data = load_recipe(path).data
            except DarsegError:
                continue
            if path.stem == run.name or data.model_copy(update={"root": ""}) == wanted:
                yield Path(data.root), f"by {path}"


def _shifted(root: Path, run: Path) -> Iterator[Path]:
    """Folders that the old place may be now, if the data were moved together with the run."""
    for start in range(1, len(root.parts)):  # the longest part of the old path that is there again
        for folder in run.parents:
            if (place := folder.joinpath(*root.parts[start:])).is_dir():
                yield place
