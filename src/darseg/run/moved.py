"""Data that moved after a run began: the run finds it again, and takes it only if it is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
"""Folders above a run's in which a recipe of its name is looked for: runs/NAME lies next to NAME.yaml."""


def with_moved_data(recipe: Recipe, run: RunDirectory, manifest_of: Callable[[Recipe], Manifest]) -> Recipe:
    """The recipe of a run folder; if its data are elsewhere now, with their new place."""
    root = Path(recipe.data.root)
    if root.is_dir():
        return recipe
    for place in dict.fromkeys(_places(root, run.root.resolve())):
        moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(place)})})
        try:
            same = digest_manifest(manifest_of(moved)) == read_json(run.data)
        except (DarsegError, OSError, ValueError):
            continue
        if same:
            journal = Journal(None, None, Console(stderr=True))
            journal.say(f"note: {root} is not there; the same data are in {place}")
            return moved
    return recipe


def _places(root: Path, run: Path) -> Iterator[Path]:
    """Folders that may be the data's new place, likely ones first."""
    for folder in list(run.parents)[:NEAR]:
        beside = folder / f"{run.name}.yaml"
        if beside.is_file():
            try:
                yield Path(load_recipe(beside).data.root)
            except DarsegError:
                continue
    for start in range(1, len(root.parts)):  # the longest part of the old path that is there again
        for folder in run.parents:
            if (place := folder.joinpath(*root.parts[start:])).is_dir():
                yield place
