"""The folder of an experiment: where everything is written, and with which file it was begun.

OUT/
  experiment.yaml  base_recipe.yaml  ledger.jsonl  checked.json  compare.json …
  lists/48_seed_0/labeled.txt, unlabeled.txt           drawn images
  recipes/VARIANT/48_seed_0.yaml                       what a run trains
  runs/VARIANT/48_seed_0/                              an ordinary run folder, and validation_counts.json,
                                                       test_counts.json: right, true and predicted pixels by image
  logs/VARIANT/48_seed_0.txt                           what a run printed
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from darseg.config.experiment import Experiment, ExperimentFile, LabelsConfig
from darseg.config.recipe import Recipe
from darseg.config.text import dump_recipe, load_recipe, load_section, recipe_differences
from darseg.data.files import ASIDE, remove_leftovers, storage_error, write_whole
from darseg.errors import RunError, faults
from darseg.experiment.controls import without_effectless
from darseg.run.outputs import lock
from darseg.run.rounds import changes_of

DRAWN_LISTS = ("data.labeled.list", "data.unlabeled.list")
"""Keys of a run's recipe that differ if the experiment's folder was moved."""

PATIENCE = 120.0
"""Seconds in which the runs of a call that was killed save their state and end."""


class ExperimentFolder:
    """Names the files of an experiment's folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def experiment(self) -> Path:
        return self.root / "experiment.yaml"

    @property
    def base_recipe(self) -> Path:
        return self.root / "base_recipe.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def checked(self) -> Path:
        return self.root / "checked.json"

    @property
    def lists(self) -> Path:
        return self.root / "lists"

    def recipe(self, trial: str) -> Path:
        return self.root / "recipes" / f"{trial}.yaml"

    def run(self, trial: str) -> Path:
        return self.root / "runs" / trial

    def counts(self, trial: str, role: str) -> Path:
        return self.run(trial) / f"{role}_counts.json"

    def log(self, trial: str) -> Path:
        return self.root / "logs" / f"{trial}.txt"

    def reason(self, trial: str) -> Path:
        """Why a run failed, from its process to the one that started it."""
        return self.root / "logs" / f"{trial}.failed"

    @contextmanager
    def held(self, waiting: Callable[[], object]) -> Generator[int, None, None]:
        """Hold the folder's lock; its descriptor is handed to the runs' processes, which hold it too.

        So a call after one that was killed waits until the runs of that one have ended.

        Args:
            waiting: called once if there is something to wait for.

        Raises RunError if the lock is held for longer than PATIENCE.
        """
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, self.root) from error
        try:
            refusal = f"{self.root}: another process is working in this folder. Wait for it, end it, or choose another."
            until, said = time.monotonic() + PATIENCE, False
            while True:
                try:
                    lock(descriptor, refusal)
                    break
                except RunError:
                    if time.monotonic() > until:
                        raise
                if not said:
                    waiting()
                    said = True
                time.sleep(0.05)
            remove_leftovers(self.root)
            yield descriptor
        finally:
            os.close(descriptor)

    def make(self) -> None:
        """Make the folder. Raises RunError if it is somebody else's, StorageError if it cannot be made."""
        root = self.root
        if root.exists() and not root.is_dir():
            raise RunError(f"{root} is a file, not a folder. Choose another path.")
        begun = self.experiment.is_file() or not root.is_dir()
        early = (self.ledger, self.checked)  # written first; a kill may have come then
        if not begun and any(path.suffix != ASIDE and path not in early for path in root.iterdir()):
            raise RunError(
                f"{root} has files but is not the folder of an experiment: it has no {self.experiment.name}. Choose "
                "another folder."
            )
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, root) from error

    def begin(self, file: ExperimentFile) -> None:
        """Note what the folder is for. Raises StorageError."""
        write_whole(self.base_recipe, dump_recipe(file.base))
        write_whole(self.experiment, dump_recipe(file.settings))

    def check_runs(self, recipes: Mapping[str, Recipe]) -> None:
        """Raise RunError if runs were begun with other recipes than the experiment has for them now.

        Also if a finished run is not part of the experiment any more.

        Args:
            recipes: by the name of the run.
        """
        variants = {trial.partition("/")[0] for trial in recipes}
        lines = [
            f"{trial}: is finished, and not part of the experiment any more (seeds or labels of its variant)"
            for trial in self._recipes()
            if trial not in recipes
            and trial.partition("/")[0] in variants
            and self.counts(trial, "validation").is_file()
        ]
        for trial, recipe in recipes.items():
            if (path := self.recipe(trial)).is_file():
                changes = changes_of(without_effectless(load_recipe(path)), without_effectless(recipe))
                lines += [
                    f"{trial}: {line}"
                    for line in changes.binding
                    if line.partition(":")[0] not in DRAWN_LISTS
                ]
        if lines:
            raise RunError(
                faults(f"{self.root} has runs of other recipes than this experiment's", lines, limit=10)
                + "\nAdd variants behind those that were there, or choose another folder."
            )

    def _recipes(self) -> list[str]:
        """The names of all runs that were begun."""
        folder = self.root / "recipes"
        return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.yaml"))

    def check(self, file: ExperimentFile) -> tuple[str, ...]:
        """Check that a folder was begun with this experiment; returns the variants added since.

        Seeds, numbers of labels, variants and controls may be added. Raises RunError if anything else has changed.
        """
        if not self.experiment.is_file():
            return ()
        before, _ = load_section(Experiment, self.experiment, kind="experiment")
        lines = _differences(before, file.settings)
        if self.base_recipe.is_file():
            lines += changes_of(load_recipe(self.base_recipe), file.base).binding
        if lines:
            raise RunError(
                faults(f"{self.root} was begun with another experiment", lines)
                + "\nUndo these changes to go on there, or choose another folder. Seeds, numbers of labels, variants and "
                "controls may be added."
            )
        known = {variant.name for variant in before.variants}
        return tuple(variant.name for variant in file.settings.variants if variant.name not in known)


def _differences(before: Experiment, now: Experiment) -> list[str]:
    """A line for each key whose change is more than an addition; the base recipe is compared by itself."""
    lines = [
        line
        for line in recipe_differences(before, now)
        if line.startswith(("controls.", "all_labels")) and not line.endswith("False → True")
    ]
    current = {variant.name: variant for variant in now.variants}
    for variant in before.variants:
        if variant.name not in current:
            lines.append(f"variants: {variant.name} is not there any more")
        elif (changes := current[variant.name].changes) != variant.changes:
            lines.append(f"variants: {variant.name}: changes: {list(variant.changes)} → {list(changes)}")
    lines += [f"seeds: {seed} is not there any more" for seed in before.seeds if seed not in now.seeds]
    if before.labels or not now.labels:
        lines += [
            f"labels: {_named(labels)} is not there any more"
            for labels in before.labels
            if labels not in now.labels
        ]
    else:
        lines.append(f"labels: those of the recipe → {', '.join(map(_named, now.labels))}")
    return lines


def _named(labels: LabelsConfig) -> str:
    return labels.labeled or str(labels.count)
