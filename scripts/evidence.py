"""Keep what an experiment has shown in one small file, and go on from it on another machine.

    scripts/evidence.py keep EXPERIMENT.yaml OUT FILE.json.gz      after any call of `darseg compare EXPERIMENT.yaml OUT`
    scripts/evidence.py unpack EXPERIMENT.yaml OUT FILE.json.gz    then `darseg compare EXPERIMENT.yaml OUT` goes on

The file has, for each finished run, the counts of each held-out image, the records of its steps and a digest of its
recipe; and the ledger. Networks and paths are not in it, so a run that would take over a round trains it again. Equal
experiments give equal bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

from darseg.config.experiment import ExperimentFile, load_experiment
from darseg.config.recipe import Recipe
from darseg.config.text import dump_recipe
from darseg.data.files import write_whole
from darseg.errors import DarsegError, RunError, faults
from darseg.experiment.compare import seconds_of
from darseg.experiment.controls import digest_recipe
from darseg.experiment.counts import read_counts, scores_of
from darseg.experiment.design import PlannedTrial, design_of
from darseg.experiment.folder import ExperimentFolder
from darseg.run.directory import RunDirectory, write_json

ROLES = ("validation", "test")


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("keep", "unpack"))
    parser.add_argument("experiment", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("changes", nargs="*", help="key=value, as for darseg compare")
    args = parser.parse_args()
    try:
        file, folder = load_experiment(args.experiment, args.changes), ExperimentFolder(args.out)
        count = (keep if args.task == "keep" else unpack)(file, folder, args.file)
    except DarsegError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{count} finished run(s): {args.file if args.task == 'keep' else args.out}")


def planned(file: ExperimentFile, folder: ExperimentFolder) -> dict[str, PlannedTrial]:
    """The runs of an experiment by their names."""
    with tempfile.TemporaryDirectory() as scratch:
        lists = folder.lists if folder.lists.is_dir() else Path(scratch)
        return {trial.name: trial for trial in design_of(file, lists).trials}


def digest_without_paths(recipe: Recipe) -> str:
    """Digest of a recipe's values without what names places of one machine."""
    data = recipe.data.model_copy(update={"root": None, "labeled": None, "unlabeled": None})
    weights = Path(recipe.network.weights).name if recipe.network.weights else None
    network = recipe.network.model_copy(update={"weights": weights})
    return digest_recipe(recipe.model_copy(update={"data": data, "network": network}))


def keep(file: ExperimentFile, folder: ExperimentFolder, path: Path) -> int:
    """Write what is finished in the folder of an experiment; returns the number of runs."""
    folder.check(file)
    trials = planned(file, folder)
    folder.check_runs({name: trial.recipe for name, trial in trials.items()})
    runs: dict[str, Any] = {}
    for name, trial in trials.items():
        if not folder.counts(name, "validation").is_file():
            continue
        seconds_of(folder, trial)  # raises if a record is missing
        run = RunDirectory(folder.run(name))
        runs[name] = {
            "settings": digest_without_paths(trial.recipe),
            "records": {
                f"{planned_round.index}/{step}": json.loads(record.read_text())
                for planned_round in trial.rounds
                for step in ("label", "train")
                if (record := run.record_path(planned_round.index, step)).is_file()
            },
        } | {role: _counts(folder, name, role) for role in ROLES if folder.counts(name, role).is_file()}
    ledger = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    text = json.dumps({"format": 1, "ledger": ledger, "runs": runs}, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, gzip.compress(text.encode(), mtime=0))
    return len(runs)


def _counts(folder: ExperimentFolder, name: str, role: str) -> dict[str, Any]:
    read_counts(folder.counts(name, role))  # raises if they are damaged
    return json.loads(folder.counts(name, role).read_text())


def unpack(file: ExperimentFile, folder: ExperimentFolder, path: Path) -> int:
    """Write the finished runs of a file into a new folder of the experiment; returns their number.

    Raises RunError if the folder exists, or if a run is not one of the experiment's, or has another recipe there.
    """
    if folder.root.exists():
        raise RunError(f"{folder.root} exists. Choose a new folder.")
    content = _read(path)
    trials, lines = planned(file, folder), []
    for name, kept in content["runs"].items():
        if name not in trials:
            lines.append(f"{name}: not a run of this experiment")
        elif kept["settings"] != digest_without_paths(trials[name].recipe):
            lines.append(f"{name}: trained with another recipe")
    if lines:
        raise RunError(
            faults(f"{path} does not fit the experiment", lines, limit=10)
            + "\nUse the file that it was kept with."
        )
    folder.make()
    folder.begin(file)
    trials = {trial.name: trial for trial in design_of(file, folder.lists).trials}
    for name, kept in content["runs"].items():
        run = RunDirectory(folder.run(name))
        write_whole(folder.recipe(name), dump_recipe(trials[name].recipe))
        for key, record in kept["records"].items():
            index, step = key.split("/")
            record_path = run.record_path(int(index), step)
            record_path.parent.mkdir(parents=True, exist_ok=True)
            write_json(record_path, record)
        for role in ROLES:
            if role in kept:
                write_whole(folder.counts(name, role), json.dumps(kept[role]) + "\n")
    write_whole(folder.ledger, "".join(json.dumps(line) + "\n" for line in content["ledger"]))
    return len(content["runs"])


def _read(path: Path) -> dict[str, Any]:
    """What `keep` wrote. Raises RunError if the file is missing or damaged."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        if content["format"] != 1 or not isinstance(content["ledger"], list):
            raise ValueError("it has another format")
        for kept in content["runs"].values():
            if not {"settings", "records", "validation"} <= kept.keys():
                raise ValueError("a run is not whole")
            for role in kept.keys() & {*ROLES}:
                scores_of(kept[role])
    except (OSError, EOFError, zlib.error, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{path} is no evidence that was kept here ({reason}). Restore it from a copy."
        ) from error
    return content


if __name__ == "__main__":
    main()
