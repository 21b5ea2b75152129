"""Runs `darseg compare` with forks in place of processes of runs, and kills it. Run by forks.python.

    comparing.py OUT JOBS KILL experiment.yaml

KILL: the number of the ledger's line after which this process is killed, "term N" for SIGTERM there, or 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from darseg.cli import main
from darseg.experiment import compare, ledger, processes, work
from darseg.run import signals

TRIAL_KILLED = os.environ.get("TRIAL_KILLED", "")
"""Name of the run whose process kills itself before it trains."""


class Forked:
    """A fork that does the work of a run, in place of `subprocess.Popen`."""

    stdin = None

    def __init__(self, arguments: list[str], log: Path) -> None:
        own, self.pipe = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(own)
            return
        code = 99
        try:
            for number in signals.SIGNALS:  # a new process has none of this one's handlers
                signal.signal(number, signal.SIG_DFL)
            os.close(self.pipe)
            os.dup2(own, 0)
            log.parent.mkdir(parents=True, exist_ok=True)
            for number in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            if arguments[1] == TRIAL_KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            code = work.main(arguments)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def kill_after(lines: int, number: int) -> None:
    """Send a signal to this process a moment after the ledger has got so many lines."""
    event, count, own = ledger.Journal.event, 0, os.getpid()

    def counted(self: Any, name: str, **fields: Any) -> None:
        nonlocal count
        event(self, name, **fields)
        if os.getpid() == own and self.path is not None and self.path.name == "ledger.jsonl":
            count += 1
            if count == lines:
                os.kill(own, number)

    ledger.Journal.event = counted  # type: ignore[method-assign]


# Measured seconds are all that may differ.
compare.seconds_of = lambda folder, trial: float(trial.steps)  # type: ignore[assignment]

out, jobs, kill, *words = sys.argv[1:]
signal_sent = signal.SIGTERM if kill.startswith("term ") else signal.SIGKILL
if int(kill.removeprefix("term ")):
    kill_after(int(kill.removeprefix("term ")), signal_sent)
processes.start = lambda arguments, log, environment, *, held: Forked(list(arguments), log)  # type: ignore[assignment]
sys.argv = ["darseg", "compare", *words[:1], out, *words[1:], "--jobs", jobs]
main()
