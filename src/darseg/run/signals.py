"""SIGTERM, SIGINT and SIGHUP end a run cleanly: after the step in training, at once elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from darseg.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP comes when the terminal is closed, unless the run was started with nohup or in tmux."""

TOGETHER = 1.0
"""Seconds in which signals count as one request: a terminal sends Ctrl-C to all processes, and torchrun repeats it."""


class Stop:
    """Whether a signal has asked this process to end.

    While `patient` is set, a signal is only noted: training looks after every step and saves its state. Otherwise
    Interrupted is raised at once: labeling and evaluation lose one image at most. A second request does not wait for the
    step either.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.since = 0.0  # seconds of time.monotonic()
        self.patient = False

    def __call__(self) -> bool:
        return self.asked is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells."""
        return 128 + (self.asked or 0)

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if self.asked is None:
            self.asked, self.since = signal.Signals(number), time.monotonic()
            if not self.patient:
                self.check()
        elif time.monotonic() - self.since > TOGETHER:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has been noted."""
        if self.asked is not None:
            error = Interrupted(f"stopped by {self.asked.name}.")
            error.code = self.exit_code
            raise error

    @contextmanager
    def patiently(self) -> Generator[Stop, None, None]:
        """Only note signals inside the block; call `check` afterwards."""
        self.patient = True
        try:
            yield self
        finally:
            self.patient = False


@contextmanager
def catch_signals() -> Generator[Stop, None, None]:
    """Handle signals inside the block. Only the main thread can; in other threads nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    # Under nohup SIGHUP is ignored, and stays so.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in SIGNALS if not (number == signal.SIGHUP and ignored)]
    handlers_before = {number: signal.signal(number, stop.handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
