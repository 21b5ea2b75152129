"""How many cores and how much memory this process may use, and how it keeps memory that it has."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path

CACHE_SHARE = 0.5
"""Share of the free memory that decoded images may take, in all processes of this machine together. The other half is for
the network, and for the system to keep files in."""

MOST_WORKERS = 8
"""Most threads that prepare batches. One core prepares 20 crops of 713x713 pixels a second from PNG files of 1024x2048,
285 from decoded images (docs/performance.md); eight have not been measured."""

JOBS = "DARSEG_JOBS"
"""Environment variable: how many runs share this machine. `darseg compare --jobs` sets it for its runs."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""

MAPPED_FROM = (1 << 30, 32 << 20)
"""glibc's mmap threshold in bytes: from this size on, each block has a mapping of its own, which is returned to the
system as soon as it is freed. First the value we want, then the most that older glibcs accept."""

KEPT = (1 << 31) - 1
"""glibc's trim threshold in bytes: INT_MAX, so the heap is never trimmed."""


def keep_memory() -> None:
    """Let this process keep memory that it frees, for later allocations. Only the command line calls it.

    glibc returns blocks of 32 MiB and more to the system as soon as they are freed. The next tensor of that size gets new
    pages, which the system fills with zeros: that was more than half of a large image's forward pass on a CPU
    (docs/performance.md). Nothing happens with other C libraries (not Linux, musl), or if the environment configures
    glibc's allocator (`MALLOC_…_`, `GLIBC_TUNABLES`).
    """
    configured = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or configured:
        return
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Any call stops the mmap threshold from growing by itself, so it must not stay at its start, 128 KiB.
        if any(mallopt(M_MMAP_THRESHOLD, size) for size in MAPPED_FROM):
            mallopt(M_TRIM_THRESHOLD, KEPT)


def usable_cores() -> int:
    """Cores this process may run on; under taskset, Slurm or cpusets fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def default_threads() -> int:
    """Default CPU threads of a process: OMP_NUM_THREADS, otherwise its share of the usable cores."""
    return asked_threads() or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def asked_threads() -> int | None:
    """The CPU threads that the environment asks for with OMP_NUM_THREADS; None if it does not.

    torchrun sets it to 1 in several processes if it is not set. So 1 does not count there.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" is for nested regions
    if threads.isdecimal() and int(threads) > 0 and not (processes > 1 and int(threads) == 1):
        return int(threads)
    return None


def busy_cores(seconds: float = 0.2, root: Path = Path("/")) -> float | None:
    """How many of the usable cores other programs use now, while this process sleeps.

    None if the system does not say.

    Args:
        seconds: how long to look.
    """
    before = _core_ticks(root)
    time.sleep(seconds)
    after = _core_ticks(root)
    passed = [(now[0] - then[0], now[1] - then[1]) for then, now in zip(before, after, strict=False)]
    return sum(1 - idle / whole for idle, whole in passed if whole > 0) if passed else None


def _core_ticks(root: Path) -> list[tuple[int, int]]:
    """Idle and all ticks of each usable core since the machine was started (proc_stat(5))."""
    try:
        usable = os.sched_getaffinity(0)
        lines = (root / "proc/stat").read_text().splitlines()
        cores = [line.split() for line in lines if line.startswith("cpu") and line[3:4].isdigit()]
        ticks = {int(name[3:]): [int(value) for value in values[:8]] for name, *values in cores}
    except (OSError, ValueError, AttributeError):  # AttributeError: macOS, Windows
        return []
    return [(values[3] + values[4], sum(values)) for core, values in ticks.items() if core in usable]


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping or being killed; None if the system does not say.

    The least of what the machine has free and what containers and Slurm leave, which set limits at any level of the tree
    of control groups. Files that the system keeps in memory count as free.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, IndexError):
        return None
    tree = root / "sys/fs/cgroup"
    for _, controllers, path in groups if free else ():
        if "memory" in controllers.split(","):  # version 1 of control groups
            top, limit, used, prefix = (
                tree / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        elif not controllers:  # version 2
            top, limit, used, prefix = tree, "memory.max", "memory.current", ""
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max" means no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                free.append(left + _kept_files(folder / "memory.stat", prefix))
    return max(0, min(free)) if free else None


def _kept_files(stat: Path, prefix: str) -> int:
    """Bytes of files that a control group keeps in memory and would drop."""
    values = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(values.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))


def runs_together() -> int:
    """How many runs share this machine, as far as they know of each other."""
    jobs = os.environ.get(JOBS, "")
    return max(1, int(jobs)) if jobs.isdecimal() else 1


def cache_limit(cache: bool | None, processes: int, kept: int = 0) -> int:
    """Bytes of decoded images that one of a run's `processes` here may keep (`training.cache`).

    Args:
        kept: bytes that it keeps already, which are not free, but would be.
    """
    if cache is None:
        return int(((free_memory() or 0) / (processes * runs_together()) + kept) * CACHE_SHARE)
    return sys.maxsize if cache else 0


def workers_for(workers: int | None, processes: int, streams: int) -> int:
    """Threads for each of `streams`, in one of a run's `processes` here (`training.workers`)."""
    share = max(1, usable_cores() // (processes * runs_together()))
    return -(-(workers or min(MOST_WORKERS, share)) // streams)
