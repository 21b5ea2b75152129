"""What the benchmarks say about the machine, and how they read its clocks."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


def now() -> float:
    """Seconds of the clock, once the GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds that a call takes."""
    began = clock()
    run()
    return clock() - began


@dataclass(frozen=True)
class Call:
    """What a command took: seconds of the clock and of the processor, MB of its largest process."""

    seconds: float
    processor: float
    memory: float


def called(command: Sequence[str]) -> Call:
    """A command, with one thread a process. Raises SystemExit with what a command that fails has printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(output.read().decode(errors="replace")[-4000:])
    seconds = time.perf_counter() - began
    return Call(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def resident() -> int:
    """The peak memory of this process in bytes, as the kernel has noted it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def commit() -> str:
    """The commit of this folder: DARSEG_COMMIT, or what git says; "unknown" without its history."""
    if given := os.environ.get("DARSEG_COMMIT"):
        return given
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
