"""SIGTERM and SIGINT end a run cleanly: at the next step while training, at once elsewhere, where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from darseg.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

TOGETHER = 1.0
"""Seconds within which signals are one request: a terminal sends Ctrl-C to all processes, and torchrun passes it on."""


class Stop:
    """Whether a signal has asked this process to end.

    While `patient` is set it is only noted – a stage of training looks at every step and saves its state –, else
    Interrupted is raised where the program is: labeling and evaluation lose one image at most. Asked again, it does not
    wait for the step either.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.since = 0.0
        self.patient = False

    def __call__(self) -> bool:
        return self.asked is not None

    @property
    def exit_code(self) -> int:
        """As shells have it: 128 + the number of the signal."""
        return 128 + (self.asked or 0)

    def handle(self, number: int, _: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self.since = signal.Signals(number), time.monotonic()
            if not self.patient:
                self.check()
        elif time.monotonic() - self.since > TOGETHER:
            self.check()

    def check(self) -> None:
        """Raise Interrupted where a signal has been noted."""
        if self.asked is not None:
            error = Interrupted(f"stopped by {self.asked.name}.")
            error.code = self.exit_code
            raise error

    @contextmanager
    def patiently(self) -> Generator[Stop, None, None]:
        """Signals are only noted inside; `check` afterwards."""
        self.patient = True
        try:
            yield self
        finally:
            self.patient = False


@contextmanager
def catch_signals() -> Generator[Stop, None, None]:
    """Signals are handled inside, and afterwards as before. Only the main thread can; elsewhere nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {one: signal.signal(one, stop.handle) for one in SIGNALS}
    try:
        yield stop
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
