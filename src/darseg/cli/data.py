"""Commands for data and recipes, before a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from darseg.choices import AnnotationFormat
from darseg.cli.options import Overrides, RecipeFile
from darseg.cli.tables import (
    class_weights_line,
    counts_by_role,
    group_line,
    plan_table,
    print_drawn,
    print_split,
    print_table,
    say,
    shares_table,
)


def init(
    folder: Annotated[
        Path, typer.Argument(help="Images, some of them with labels, in any usual arrangement.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE.yaml",
            help="The recipe to write. Default: NAME_OF_FOLDER.yaml in the current folder.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Pretrained weights. Default: resnet*.pth, or DINOv2's for a GPU, in FOLDER or here, otherwise none."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier recipe and its lists.")] = False,
) -> None:
    """Look at a folder of images and write a commented recipe for it that fits this machine."""
    from darseg.config.text import load_recipe
    from darseg.init.propose import propose_recipe

    proposal = propose_recipe(folder, out, weights=weights, overwrite=force)
    for note in proposal.notes:
        say(f"found: {note}")
    for warning in proposal.warnings:
        say(f"warning: {warning}")
    say(f"Written: {', '.join(map(str, (proposal.recipe, *proposal.lists)))}. Read it, then:")
    name, run = shlex.quote(str(proposal.recipe)), shlex.quote(str(Path("runs") / proposal.recipe.stem))
    commands = [f"check {name}", f"plan {name}", f"train {name}", f"report {run}"]
    if len(load_recipe(proposal.recipe).rounds) > 1:  # otherwise there are no pseudo labels to look through
        commands.append(f"view {run}")
    for command in commands:
        say(f"  darseg {command}")


def rasterize(
    annotations: Annotated[
        Path, typer.Argument(help="A COCO or CVAT file, or a folder of labelme's or Cityscapes' JSON files.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for ID.png and classes.yaml.")],
    kind: Annotated[
        AnnotationFormat | None,
        typer.Option(
            "--format", help="Format of the annotations. Default: recognized by what the file holds."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Classes in this order (a,b,c), or cityscapes, voc, camvid. Default: all categories."
        ),
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Class of pixels that nobody annotated. Default: not labeled.")
    ] = None,
    other: Annotated[
        Literal["fault", "ignore"],
        typer.Option(
            help="Categories that are not among the classes: report a fault, or leave them unlabeled."
        ),
    ] = "fault",
    panoptic_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of COCO panoptic's PNGs. Default: the path of the JSON file without .json."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also draw label maps again that were corrected by hand.")
    ] = False,
) -> None:
    """Draw annotation files as label maps: COCO, COCO panoptic, labelme, Cityscapes, CVAT."""
    from darseg.annotate.rasterize import rasterize_folder
    from darseg.errors import DataError, faults

    drawn = rasterize_folder(
        annotations,
        out,
        format=kind,
        classes=classes,
        background=background,
        ignore_other=other == "ignore",
        panoptic_folder=panoptic_folder,
        overwrite=force,
    )
    print_drawn(drawn, out)
    if drawn.faults:
        raise DataError(faults(f"{len(drawn.faults)} fault(s); all other images are done", drawn.faults))


def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find every fault of a recipe's data in one go, and show the class shares."""
    from darseg.config.text import load_recipe
    from darseg.errors import DataError, faults
    from darseg.run.build import classes_of
    from darseg.run.check import check as run_check

    loaded = load_recipe(recipe, overrides or [])
    findings = run_check(loaded)
    pixels = {
        role: findings.pixels[role]
        for role, count in findings.images.items()
        if count and findings.pixels[role].sum()
    }
    print_table(shares_table(classes_of(loaded).names, pixels, findings.labeled))
    say("images: " + counts_by_role(findings.images.items()))
    for note in findings.notes:
        say(f"note: {note}")
    for warning in findings.warnings:
        say(f"warning: {warning}")
    if findings.faults:
        raise DataError(faults(f"{len(findings.faults)} fault(s)", findings.faults))
    say("No faults.")


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that torchrun will start.")] = 1,
) -> None:
    """Show what a recipe will do: rounds, steps, learning rates, images, memory, temporary disk."""
    from darseg.config.text import load_recipe
    from darseg.run.check import plan as run_plan

    planned = run_plan(load_recipe(recipe, overrides or []), processes)
    print_table(plan_table(planned))
    say("images: " + counts_by_role(planned.images.items()))
    for line in planned.who_labels:
        say(line)
    for network in planned.networks:
        begins = f" from round {network.begins} on" if network.begins else ""
        say(f"network{begins}: {network.description}, {network.parameters / 1e6:.1f} million parameters")
        for group in network.groups:
            say(group_line(group))
    if planned.class_weights:
        say(class_weights_line(planned))
    say(f"labeling: {planned.labeling}")
    say(f"evaluation: {planned.evaluation}")
    for line in planned.target:
        say(line)
    say(f"temporary disk while labeling: at most {planned.temporary_bytes / 1e6:.0f} MB")
    for network in planned.networks:
        begins = f" from round {network.begins} on" if network.begins else ""
        say(
            f"memory of a process while training{begins}, fp32: {network.state_bytes / 1e9:.2f} GB weights, gradients "
            f"and the optimizer's averages, {network.activation_bytes / 1e9:.2f} GB kept for the backward pass, plus the "
            "convolutions' workspace"
        )
    for note in planned.notes:
        say(f"note: {note}")


def split(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="Folder for labeled.txt, unlabeled.txt and split.json.")],
    overrides: Overrides = None,
    fraction: Annotated[
        str | None, typer.Option(metavar="1/8|0.125", help="Share of the images that are to be labeled.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of images to label, instead of --fraction.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Make sure that rare classes appear; needs all labels.")
    ] = False,
    sequences: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Regular expression that finds the sequence in an id (its first group, or all it matches). "
            "A sequence is never split.",
        ),
    ] = None,
) -> None:
    """Draw which of a recipe's images are labeled, and write both lists."""
    from darseg.config.text import load_recipe
    from darseg.run.split import draw_split

    record = draw_split(
        load_recipe(recipe, overrides or []),
        out,
        fraction=fraction,
        count=count,
        seed=seed,
        balanced=balanced,
        sequences=sequences,
    )
    print_split(record)
    say(f"Written to {out}. Use the lists in the recipe, or after its name on the command line:")
    for role in record["lists"]:
        say(f"  {shlex.quote(f'data.{role}={(out / role).resolve()}.txt')}")
