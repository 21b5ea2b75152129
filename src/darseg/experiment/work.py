"""One run of an experiment, in a process of its own.

    python -m darseg.experiment.work OUT TRIAL train|test [REUSE]

Whatever happens to it, the process that started it goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.config.text import dump_recipe, load_recipe, load_saved_recipe
from darseg.data.files import write_whole
from darseg.errors import DarsegError, Interrupted
from darseg.experiment.counts import save_counts, score_run
from darseg.experiment.folder import DRAWN_LISTS, ExperimentFolder
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal
from darseg.run.machine import keep_memory
from darseg.run.rounds import changes_of, train

FAILED = 2
"""Exit code of a run that failed; its reason is in a file."""


def main(arguments: Sequence[str]) -> int:
    """Do a task of a run; returns the exit code."""
    out, trial, task, *reuse = arguments
    folder = ExperimentFolder(out)
    end_with_the_other()
    keep_memory()
    try:
        perform(folder, trial, task, reuse=reuse[0] if reuse else None)
    except Interrupted as interrupted:
        return interrupted.code
    except DarsegError as error:
        reason = str(error)
        Journal(None, None, Console()).say(f"error: {reason}")
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    else:
        return 0
    write_whole(folder.reason(trial), reason)
    return FAILED


def perform(folder: ExperimentFolder, trial: str, task: str, *, reuse: str | None) -> None:
    """Train a run and score its validation images, or score its test images."""
    console, run = Console(), RunDirectory(folder.run(trial))
    recipe = load_recipe(folder.recipe(trial))
    follow_lists(run, recipe)
    if task == "train":
        if reuse is not None and not RunDirectory(reuse).recipe.is_file():
            reuse = None  # that run failed before it began
        train(recipe, run.root, reuse, console=console)
        network, scores = score_run(run, "validation", console)
        save_counts(folder.counts(trial, "validation"), network, scores)
    else:
        network, scores = score_run(run, "test", console)
        save_counts(folder.counts(trial, "test"), network, scores)


def follow_lists(run: RunDirectory, recipe: Recipe) -> None:
    """Let a run know where its lists are now, if the experiment's folder was moved.

    Whether they name the same images is not decided here: a run goes on only with those that it recorded.
    """
    if not run.recipe.is_file():
        return
    before = load_saved_recipe(run.recipe)
    keys = {line.partition(":")[0] for line in changes_of(before, recipe).binding}
    if keys and keys <= {*DRAWN_LISTS}:
        write_whole(run.recipe, dump_recipe(recipe))


def end_with_the_other() -> None:
    """End this process, as SIGTERM does, when the pipe from the one that started it is closed."""
    if sys.stdin is None or sys.stdin.isatty():
        return
    descriptor, own = sys.stdin.fileno(), os.getpid()

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(own, signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
