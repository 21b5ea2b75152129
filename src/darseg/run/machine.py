"""What the machine has to spare, cores and memory, and how a process keeps what it has."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

CACHE_SHARE = 0.5
"""Of the free memory that decoded images may take, by all processes of this machine together: the other half is for the
network, and for the system to keep files in."""

MOST_WORKERS = 8
"""Threads that prepare batches. One core prepares 20 crops of 713x713 pixels a second from PNG files of 1024x2048, 285
from decoded images (docs/performance.md); eight have not been measured."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""

MAPPED_FROM = (1 << 30, 32 << 20)
"""Bytes of a block from which on it is taken from the system by itself and given back at once: as wanted, and as older
glibcs allow at most."""

KEPT = (1 << 31) - 1
"""Free bytes at the top of what the system gave, beyond which they are given back: the most an int can say."""


def keep_memory() -> None:
    """Let this process keep memory that it frees, for what it allocates next.

    glibc gives blocks of 32 MiB and more back at once and takes them anew for the next tensor of that size, each page of
    which the system then fills with zeros: of a large image's forward pass on a CPU that was more than half
    (docs/performance.md). Where another library allocates (not Linux, musl) or the environment says how glibc is
    to do it (`MALLOC_…_`, `GLIBC_TUNABLES`), nothing happens.
    """
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told:
        return
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Any call ends the threshold's growing by itself: it must not be left where it starts, at 128 KiB.
        if any(mallopt(M_MMAP_THRESHOLD, size) for size in MAPPED_FROM):
            mallopt(M_TRIM_THRESHOLD, KEPT)


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine's under taskset, Slurm or cpusets."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken without swapping or being killed; None where the system does not say (Linux does).

    The least of what the machine has and what containers and Slurm leave, which set limits at any height of the tree
    of control groups. Files that the system keeps in memory count as free.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, IndexError):
        return None
    tree = root / "sys/fs/cgroup"
    for _, kinds, path in groups if free else ():
        if "memory" in kinds.split(","):  # the first version of control groups
            top, limit, used, prefix = (
                tree / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        elif not kinds:
            top, limit, used, prefix = tree, "memory.max", "memory.current", ""
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there; or "max": no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                free.append(left + _kept_files(folder / "memory.stat", prefix))
    return max(0, min(free)) if free else None


def _kept_files(stat: Path, prefix: str) -> int:
    """Bytes of files that a control group keeps in memory and would give up."""
    values = dict(line.split() for line in stat.read_text().splitlines())
    return sum(int(values.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))


def cache_limit(wanted: bool | None, processes: int) -> int:
    """Bytes of decoded images that one of `processes` on this machine may keep (`training.cache`)."""
    if wanted is None:
        return int((free_memory() or 0) * CACHE_SHARE / processes)
    return sys.maxsize if wanted else 0


def workers_for(wanted: int | None, processes: int, streams: int) -> int:
    """Threads for each of `streams` streams of one of `processes` on this machine (`training.workers`)."""
    return -(-(wanted or min(MOST_WORKERS, max(1, usable_cores() // processes))) // streams)
