"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe: which data, which network, which rounds.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value …]", help="Change keys of the recipe, e.g. training.batch=8."),
]
Source = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or a .safetensors file.")
]
RoundIndex = Annotated[
    int | None,
    typer.Option(
        "--round",
        min=0,
        help="Round of the run. Default: the run's result, its last finished round or its best.",
    ),
]
TrainedWith = Annotated[
    Path | None, typer.Option("--recipe", help="For a checkpoint: the recipe it was trained with.")
]
DataRoot = Annotated[
    list[str] | None,
    typer.Argument(metavar="[data.root=PATH]", help="Where the data are now, if they were moved."),
]
MOVED = "Also data.root=PATH, if the run's data were moved."
Plain = Annotated[
    bool, typer.Option("--plain", help="Use the network as it was trained, without class weights.")
]


def without_root(words: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The paths among the words of a command line, and `data.root=PATH`, which may be among them."""
    overrides = [str(word) for word in words if str(word).startswith("data.root=")]
    return [word for word in words if not str(word).startswith("data.root=")], overrides


CHANGE = re.compile(r"[\w.]+=")
"""How a change of the recipe begins: the key, and the sign."""


def without_changes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths among the words of a command line, and changes of the recipe, which may be among them."""
    changes = [word for word in words if CHANGE.match(word)]
    return [word for word in words if not CHANGE.match(word)], changes
