"""The ledger of an experiment: a line for each run that begins, ends or fails, and for each call."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

import darseg
from darseg.experiment.design import PlannedTrial
from darseg.run.begin import environment
from darseg.run.journal import Journal

LONGEST_REASON = 2000
"""Characters of a reason that the ledger keeps."""


class Ledger:
    """Appends lines to `ledger.jsonl` and reads them; a last line that a kill cut off is passed over."""

    def __init__(self, path: Path, console: Console) -> None:
        self.journal = Journal(path, None, console)

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self.journal.say(text)

    def opened(self, *, jobs: int, added: tuple[str, ...]) -> None:
        """Note a call: machine, versions, commit, and variants that it adds."""
        self.journal.event("opened", jobs=jobs, added=list(added), **machine())

    def begun(self, trial: str, task: str, reuse: str | None) -> None:
        """Note that a run begins or goes on."""
        self.journal.event("begun", trial=trial, task=task, reuse=reuse)

    def finished(self, trial: PlannedTrial, seconds: float) -> None:
        """Note that a run is trained and scored."""
        self.journal.event(
            "finished", trial=trial.name, steps=trial.steps, images=trial.images, seconds=round(seconds, 3)
        )

    def tested(self, trial: str) -> None:
        """Note that a run's test images are scored."""
        self.journal.event("tested", trial=trial)

    def failed(self, trial: str, task: str, reason: str) -> None:
        """Note why a run failed."""
        self.journal.event("failed", trial=trial, task=task, reason=reason[:LONGEST_REASON])

    def failures(self) -> dict[str, str]:
        """Name of a run → why its training failed the last time that it was tried."""
        reasons: dict[str, str] = {}
        for event in self.journal.events("begun", "failed", "finished"):
            trial, reason = event.get("trial"), event.get("reason")
            if not isinstance(trial, str) or event.get("task", "train") != "train":
                continue
            reasons.pop(trial, None)
            if event["event"] == "failed" and isinstance(reason, str):
                reasons[trial] = reason
        return reasons

    def added_after_test(self) -> tuple[str, ...]:
        """Variants that were added when test images had been scored."""
        tested, names = False, dict[str, None]()
        for event in self.journal.events("opened", "tested"):
            tested |= event["event"] == "tested"
            added = event.get("added")
            if tested and isinstance(added, list):
                names |= dict.fromkeys(name for name in added if isinstance(name, str))
        return tuple(names)

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Where the experiment ran and with what: name and value; several values if it went on elsewhere."""
        values: dict[str, dict[str, None]] = {}
        for event in self.journal.events("opened"):
            for name in FACTS:
                if isinstance(value := event.get(name), str | int):
                    values.setdefault(name, {})[str(value)] = None
        return tuple((name, ", ".join(seen)) for name, seen in values.items())

    def finished_runs(self) -> set[str]:
        """The names of runs that are noted as finished."""
        return {str(event.get("trial")) for event in self.journal.events("finished")}


FACTS = ("device", "cores", "darseg", "commit", "torch", "python")
"""What the page says about the machine."""


def machine() -> Mapping[str, Any]:
    """What the machine and the program are; the commit if the program lies in its repository."""
    return environment(1) | {"cores": os.cpu_count() or 1, "commit": commit()}


def commit() -> str | None:
    """The commit of darseg's repository, "-dirty" if files differ; None without a repository."""
    root = Path(darseg.__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None if answer.returncode == 0 else None
