"""Arguments and options that several commands share."""

from __future__ import annotations

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
    int | None, typer.Option("--round", min=0, help="Round of the run. Default: the last finished one.")
]
TrainedWith = Annotated[
    Path | None, typer.Option("--recipe", help="For a checkpoint: the recipe it was trained with.")
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Use the network as it was trained, without class weights.")
]
