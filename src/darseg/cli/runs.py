"""Commands about runs: train, look at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from darseg.cli.options import DataRoot, Overrides, Plain, RecipeFile, without_changes, without_root
from darseg.cli.tables import print_table, rounds_table, say
from darseg.errors import RunError

MOST_STEPS = 50
"""Steps that a preview shows at most: of 16 crops each, such a page has about 100 MB."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the drawn data, both runs and the picture.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training; the data are always the same.")] = 0,
) -> None:
    """Draw a long-tailed data set, train on it with and without DARS, and compare class by class."""
    from darseg.demo.demo import run_demo
    from darseg.report.overview import write_report

    run_demo(out, seed, after_round=write_report)


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME_OF_RECIPE.")] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(help="Another run folder; copy the steps it finished with the same inputs."),
    ] = None,
) -> None:
    """Run all rounds of a recipe, or continue where it stopped: label, train and evaluate in each round."""
    from darseg.config.text import load_recipe
    from darseg.report.overview import write_report
    from darseg.run.rounds import train as run_train

    folder = out or Path("runs") / recipe.stem
    summary = run_train(load_recipe(recipe, overrides or []), folder, reuse, after_round=write_report)
    print_table(rounds_table(summary))
    say(f"Written to {folder}")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN… [OUT.html]",
            help="Run folders; several are compared. Also data.root=PATH, if the data of one run were moved.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: report.html in the run folder; comparison.html in the current folder."
        ),
    ] = None,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Show images even if they are not those that the run began with."),
    ] = False,
    share: Annotated[
        bool,
        typer.Option("--share", help="Leave out absolute paths and the names of this machine and its user."),
    ] = False,
) -> None:
    """Write a page about a run, finished or not, or one that compares runs. The page needs no internet."""
    from darseg.report.comparison import NAME, compare_runs
    from darseg.report.overview import write_report

    runs, overrides = without_root(runs)
    if not runs:
        raise RunError("Give the run folder, too: darseg report RUN data.root=PATH.")
    last = runs[-1]
    if out is None and len(runs) > 1 and last.suffix.lower() in (".html", ".htm") and not last.is_dir():
        *runs, out = runs
    if len(runs) == 1:
        written = write_report(runs[0], out, pictures=pictures, share=share, overrides=overrides, say=say)
        say(f"Written to {written}")
        if share:
            say(
                "The page holds no absolute paths, no secrets in addresses, and no names of this machine or its user. It "
                "shows images of the data set with their ids, and the recipe."
            )
        return
    if pictures or share or overrides:
        raise RunError(
            "--pictures, --share and data.root= are for the report of one run. Leave them out to compare runs."
        )
    compared = compare_runs(runs, out or Path(NAME))
    print_table(compared.rows)
    for warning in compared.warnings:
        say(f"warning: {warning}")
    say(f"Written to {compared.out}")


def preview(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE.yaml|RUN",
            help="A recipe, or a run folder, which also has the labels that networks make.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUT.html] [section.key=value …]",
            help="The page to write (default: preview.html in the current folder), and keys of the recipe to change; of "
            "a run folder only data.root.",
        ),
    ] = None,
    round_index: Annotated[int, typer.Option("--round", min=0, help="Round whose images to show.")] = 0,
    steps: Annotated[
        int, typer.Option(min=1, max=MOST_STEPS, help="Steps to show, from the round's first on.")
    ] = 1,
) -> None:
    """Write a page with what the network will see: the images of a round's first steps and their labels."""
    from darseg.report.preview import write_preview

    outs, overrides = without_changes(words or [])
    if len(outs) > 1:
        raise RunError(f"Found {len(outs)} names of pages: {', '.join(outs)}. Give one.")
    out = Path(outs[0]) if outs else None
    written = write_preview(source, out, round_index=round_index, steps=steps, overrides=overrides)
    for note in written.notes:
        say(f"note: {note}")
    say(f"Written to {written.out}")


def view(
    run: Annotated[Path, typer.Argument(help="A run folder with pseudo labels.")],
    overrides: DataRoot = None,
    round_index: Annotated[
        int | None,
        typer.Option(
            "--round", min=1, help="Round whose pseudo labels to show. Default: the last that has some."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the page; 0: any free one. Default: 8765, or the next free one."
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Also open the page in the browser.")] = False,
    pictures: Annotated[
        bool,
        typer.Option("--pictures", help="Show images even if they are not those that the run began with."),
    ] = False,
    plain: Plain = False,
) -> None:
    """Look through a run's unlabeled images in the browser and mark bad ones; all stays on this machine."""
    from darseg.view.viewer import view_run

    view_run(
        run,
        round_index,
        port,
        open_browser=open_browser,
        pictures=pictures,
        plain=plain,
        overrides=overrides or [],
        say=say,
    )
