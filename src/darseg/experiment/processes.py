"""Processes of runs: several side by side, each with its share of the cores, or a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from darseg.data.files import storage_error
from darseg.experiment.folder import ExperimentFolder
from darseg.experiment.work import FAILED
from darseg.run.machine import JOBS, default_threads
from darseg.run.signals import SIGNALS, Stop

POLL = 0.05
"""Seconds between looks at the processes."""


@dataclass(frozen=True)
class Task:
    """What a process does.

    Attributes:
        trial: name of the run.
        kind: "train" or "test".
        ready: whether it can start now.
        reuse: folder of the run that has the same first rounds.
    """

    trial: str
    kind: str
    ready: Callable[[], bool] = lambda: True
    reuse: Path | None = None


@dataclass(frozen=True)
class Ended:
    """A task that ended. reason: why it failed; None if it did not."""

    task: Task
    reason: str | None


def environment_of(slot: int, jobs: int) -> dict[str, str]:
    """The environment of the process in one of `jobs` places: its share of cores and memory, and its GPU."""
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": str(max(1, default_threads() // jobs)),
        JOBS: str(jobs),
    }
    count = torch.cuda.device_count()
    if count and jobs > 1:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = visible or [str(index) for index in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
    return environment


def start(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, held: int
) -> subprocess.Popen[bytes]:
    """Start the process of a run.

    Args:
        log: file that gets what it prints; it is continued.
        held: descriptor of the folder's lock, which the process holds too.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "darseg.experiment.work", *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(held,),
                start_new_session=True,  # Ctrl-C comes to this process alone, which hands it on
            )
    except OSError as error:
        raise storage_error(error, log) from error


def run_tasks(
    folder: ExperimentFolder,
    tasks: Sequence[Task],
    *,
    jobs: int,
    held: int,
    stop: Stop,
    begun: Callable[[Task], object],
) -> Generator[Ended]:
    """Run tasks, `jobs` at a time, in their order as far as they are ready; yields each as it ends.

    A signal is handed on to the processes; when they have ended, Interrupted is raised. A second one ends the wait.
    """
    pending, running = list(tasks), dict[int, tuple[Task, subprocess.Popen[bytes]]]()
    try:
        while pending or running:
            for slot in range(jobs):
                task = next((task for task in pending if task.ready()), None)
                if slot in running or task is None or stop():
                    continue
                pending.remove(task)
                folder.reason(task.trial).unlink(missing_ok=True)
                arguments = [
                    str(folder.root),
                    task.trial,
                    task.kind,
                    *([str(task.reuse)] if task.reuse else []),
                ]
                begun(task)
                environment = environment_of(slot, jobs)
                running[slot] = task, start(arguments, folder.log(task.trial), environment, held=held)
            if stop():
                _end(process for _, process in running.values())
                stop.check()
            for slot, (task, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    _close(process)
                    yield Ended(task, _reason(folder, task, process))
            time.sleep(POLL)
    finally:
        _end(process for _, process in running.values())


def _end(processes: Iterator[subprocess.Popen[bytes]]) -> None:
    """Ask processes to save their state, and wait for their end."""
    asked = list(processes)
    for process in asked:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in asked:
        process.wait()
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe to a process that has ended."""
    if process.stdin is not None:
        process.stdin.close()


def _reason(folder: ExperimentFolder, task: Task, process: subprocess.Popen[bytes]) -> str | None:
    """Why a process that ended has failed; None if it has not."""
    code, log = process.returncode, folder.log(task.trial)
    if code == 0:
        return None
    if code == FAILED:
        with contextlib.suppress(OSError):
            return folder.reason(task.trial).read_text(errors="replace")
    number = -code if code < 0 else code - 128
    if number in [int(sent) for sent in SIGNALS]:
        return f"its process was ended by {signal.Signals(number).name}, which was not sent to this one"
    if code == -signal.SIGKILL:
        return f"its process was killed, as the system does when memory is short; it printed {log}"
    return f"its process ended with exit code {code}; it printed {log}"
