"""What the machine has to spare, read from files as Linux has them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from darseg.run import build, machine
from darseg.run.machine import cache_limit, free_memory, usable_cores, workers_for

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
FREE = 8_000_000 * 1024


def system(root: Path, groups: str, files: dict[str, str], meminfo: str = MEMINFO) -> Path:
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_what_the_system_says(tmp_path):
    assert free_memory(system(tmp_path, "0::/\n", {})) == FREE


def test_a_limit_at_any_height_counts_and_files_in_memory_are_free(tmp_path):
    tree = "sys/fs/cgroup/slurm"
    files = {
        f"{tree}/memory.max": "5000\n",
        f"{tree}/memory.current": "4000\n",
        f"{tree}/memory.stat": "anon 1500\nfile 2500\ninactive_file 2000\nactive_file 500\nfile_dirty 0\n",
        f"{tree}/step/memory.max": "max\n",
        f"{tree}/step/memory.current": "4000\n",
        f"{tree}/step/memory.stat": "anon 1500\n",
    }
    assert free_memory(system(tmp_path, "0::/slurm/step\n", files)) == 5000 - 4000 + 2500


def test_the_first_version_of_control_groups(tmp_path):
    tree = "sys/fs/cgroup/memory"
    files = {
        f"{tree}/memory.limit_in_bytes": f"{2**63 - 4096}\n",  # no limit
        f"{tree}/memory.usage_in_bytes": "9000\n",
        f"{tree}/memory.stat": "cache 1\n",
        f"{tree}/job/memory.limit_in_bytes": "7000\n",
        f"{tree}/job/memory.usage_in_bytes": "6500\n",
        f"{tree}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 100\n",
    }
    groups = "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n"
    assert free_memory(system(tmp_path, groups, files)) == 7000 - 6500 + 300


def test_used_up_is_nothing_not_less(tmp_path):
    files = {
        f"sys/fs/cgroup/memory.{name}": text for name, text in (("max", "5"), ("current", "9"), ("stat", ""))
    }
    assert free_memory(system(tmp_path, "0::/\n", files)) == 0


def test_where_the_system_does_not_say(tmp_path):
    assert free_memory(tmp_path) is None
    assert free_memory(system(tmp_path, "0::/\n", {}, "MemTotal: 5 kB\n")) is None


def test_the_cache_takes_half_of_the_free_memory_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 8000)
    assert cache_limit(None, 1) == 4000 and cache_limit(None, 4) == 1000
    assert cache_limit(True, 4) == sys.maxsize and cache_limit(False, 1) == 0
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    assert cache_limit(None, 1) == 0


def test_cores_are_those_this_process_may_use():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "streams", "workers"),
    [
        (None, 2, 1, 1, 2),
        (None, 2, 1, 2, 1),
        (None, 1, 4, 2, 1),
        (None, 64, 1, 1, 8),
        (None, 64, 8, 2, 4),
        (None, 6, 2, 2, 2),
        (5, 64, 1, 2, 3),
        (12, 2, 1, 1, 12),
    ],
)
def test_workers(monkeypatch, wanted, cores, processes, streams, workers):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert workers_for(wanted, processes, streams) == workers


FAULTS = """
import resource, sys
from darseg.run.machine import keep_memory

if sys.argv[1] != "leave":
    if sys.argv[1] == "old":  # a glibc that allows 32 MiB at most
        import ctypes
        from types import SimpleNamespace
        from darseg.run import machine
        real = ctypes.CDLL(None).mallopt
        def mallopt(which, size):
            return real(which, size) if which != machine.M_MMAP_THRESHOLD or size <= 32 << 20 else 0
        machine.ctypes = SimpleNamespace(CDLL=lambda name: SimpleNamespace(mallopt=mallopt))
    keep_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * int(sys.argv[2])
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The least of several: small blocks may have taken some of what was free, so that it must be made larger once.
print(min([faults() for _ in range(6)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries allocate in other ways")
def test_kept_memory_is_used_again_instead_of_taken_anew():
    def faults(how: str, size: int = 64 << 20, **told: str) -> int:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
        }
        call = [sys.executable, "-c", FAULTS, how, str(size)]
        return int(subprocess.run(call, env=clean | told, check=True, capture_output=True, text=True).stdout)

    pages = (64 << 20) // os.sysconf("SC_PAGESIZE")
    assert faults("leave") > 0.9 * pages
    assert faults("keep") < 0.01 * pages
    assert faults("keep", 8 << 20) < 0.01 * pages
    # Where so much is refused, blocks that were used again before still are.
    assert faults("old", 8 << 20) < 0.01 * pages
    # Whoever says how glibc is to do it is obeyed.
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="1000000") > 0.9 * pages


def test_as_many_threads_as_cores_that_may_be_used(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(build, "usable_cores", lambda: 4)
    try:
        for here, wanted, threads in ((None, None, 4), ("2", None, 2), ("8", None, 1), ("2", 3, 3)):
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
            if here:
                monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
            build.set_threads(wanted)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
