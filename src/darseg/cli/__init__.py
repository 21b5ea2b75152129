"""The command line: commands → functions. Prints and exits, decides nothing.

torch, OpenCV and pydantic are imported inside the commands, so that `darseg --help` answers at once.
"""

from __future__ import annotations

import sys
import threading
from typing import Annotated

import typer

from darseg import __version__
from darseg.cli.data import check, init, plan, rasterize, split
from darseg.cli.experiments import compare
from darseg.cli.labeling import label, redistribute, suggest
from darseg.cli.networks import align, convert, evaluate, export, predict
from darseg.cli.runs import demo, preview, report, train, view
from darseg.cli.tables import say
from darseg.data.files import explained
from darseg.errors import DarsegError, Interrupted
from darseg.run.console import enduring_streams, quiet_writers
from darseg.run.machine import keep_memory

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT

COMPUTING = (
    "demo",
    "init",
    "train",
    "compare",
    "report",
    "evaluate",
    "predict",
    "align",
    "view",
    "export",
    "label",
    "preview",
    "suggest",
)
"""Commands that run networks, and so allocate the same tensors again and again."""

app = typer.Typer(
    name="darseg",
    help="Train a good segmentation network from a few labeled images and many unlabeled ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"darseg {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    if context.invoked_subcommand in COMPUTING:
        keep_memory()


# In the order of --help.
for command in (
    demo,
    init,
    train,
    compare,
    report,
    evaluate,
    predict,
    align,
    view,
    export,
    convert,
    label,
    redistribute,
    suggest,
):
    app.command()(command)
for command in (rasterize, check, plan, preview, split):
    app.command()(command)


def main() -> None:
    """Run the command line: a DarsegError becomes a message and exit code 2, Ctrl-C exit code 130."""
    before = threading.excepthook
    with enduring_streams() as output:
        threading.excepthook = quiet_writers(before)
        try:
            code = _run()
        finally:
            threading.excepthook = before
        output.flush()
        if (
            output.lost is not None and not code
        ):  # a full disk; a closed pipe, as in `darseg plan … | head`, is none
            say(f"darseg: all is done, but the output could not be written: {output.lost}.", error=True)
            code = 2
        sys.exit(code)


def _run() -> int | str | None:
    """Run the command, and print the errors that it ends with.

    Returns:
        the exit code.
    """
    try:
        app()
    except Interrupted as error:
        say(f"darseg: {error} Run the same command again to continue.", error=True)
        return error.code
    except DarsegError as error:
        say(f"darseg: {error}", error=True)
        return 2
    except OSError as error:
        if not (message := explained(error)):
            raise
        say(f"darseg: {message}", error=True)
        return 2
    except RuntimeError as error:
        from darseg.run.machines import lost_process

        if not (message := lost_process(error)):
            raise
        say(f"darseg: {message}", error=True)
        return 2
    except KeyboardInterrupt:  # before typer listens
        return INTERRUPTED
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer exits without a message
            say("darseg: interrupted. Finished work is kept.", error=True)
        return end.code
    return 0
