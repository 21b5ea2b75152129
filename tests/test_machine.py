"""Free memory from files as Linux has them, cores, threads, and memory that a process keeps."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from rich.console import Console

from conftest import recipe_dict
from darseg.cli import COMPUTING, app
from darseg.config.text import load_recipe
from darseg.experiment.processes import environment_of
from darseg.model.weights import save_network
from darseg.model.windows import _slide
from darseg.run import begin, machine
from darseg.run.browse import LabeledRound, Repredictor
from darseg.run.build import classes_of, manifest_of, spec_of
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import evaluate, load_trained
from darseg.run.export import export_network
from darseg.run.label import label_folder
from darseg.run.machine import cache_limit, default_threads, free_memory, usable_cores, workers_for
from darseg.run.predict import predict_folder
from darseg.run.rounds import train
from darseg.run.settings import Inputs

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
FREE = 8_000_000 * 1024


def system(root: Path, groups: str, files: dict[str, str], meminfo: str = MEMINFO) -> Path:
    for name, text in {"proc/meminfo": meminfo, "proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_without_limits_is_what_the_system_says(tmp_path):
    assert free_memory(system(tmp_path, "0::/\n", {})) == FREE


def test_limits_at_any_level_count_and_files_in_memory_are_free(tmp_path):
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


def test_version_1_of_control_groups(tmp_path):
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


def test_free_memory_is_never_negative(tmp_path):
    files = {
        f"sys/fs/cgroup/memory.{name}": text for name, text in (("max", "5"), ("current", "9"), ("stat", ""))
    }
    assert free_memory(system(tmp_path, "0::/\n", files)) == 0


def test_free_memory_of_a_system_that_does_not_say(tmp_path):
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
def test_workers_share_the_cores(monkeypatch, wanted, cores, processes, streams, workers):
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    assert workers_for(wanted, processes, streams) == workers


@pytest.mark.parametrize("jobs", [1, 2, 3, 64])
def test_runs_of_an_experiment_share_cores_and_memory(monkeypatch, jobs):
    monkeypatch.setattr(machine, "usable_cores", lambda: 6)
    monkeypatch.setattr(machine, "free_memory", lambda: 24000)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment_of(0, jobs).items():
        monkeypatch.setenv(name, value)
    assert jobs * default_threads() <= max(6, jobs) and jobs * workers_for(None, 1, 1) <= max(6, jobs)
    assert jobs * cache_limit(None, 1) <= 12000 and cache_limit(None, 2) == 12000 // (2 * jobs)
    assert workers_for(5, 1, 1) == 5 and cache_limit(True, 1) == sys.maxsize
    monkeypatch.setenv("DARSEG_JOBS", "many")
    assert cache_limit(None, 1) == 12000


FAULTS = """
import resource, sys
from darseg.run.machine import keep_memory

action, size = sys.argv[1], int(sys.argv[2])
if action == "library":  # what functions of the library do before they predict or train
    from darseg.model.network import build_network
    from darseg.run.build import place
    place(build_network(backbone="resnet18_half", output_stride=16, head_channels=8))
elif action == "old glibc":  # accepts 32 MiB at most
    import ctypes
    from types import SimpleNamespace
    from darseg.run import machine
    real = ctypes.CDLL(None).mallopt
    def mallopt(which, value):
        return real(which, value) if which != machine.M_MMAP_THRESHOLD or value <= 32 << 20 else 0
    machine.ctypes = SimpleNamespace(CDLL=lambda name: SimpleNamespace(mallopt=mallopt))
if action in ("keep", "old glibc"):
    keep_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The least of several: small blocks may have taken part of what was free, so that it must grow once.
print(min([faults() for _ in range(6)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries allocate in other ways")
def test_freed_memory_is_kept_only_after_keep_memory():
    def faults(action: str, size: int = 64 << 20, **environment: str) -> int:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
        }
        call = [sys.executable, "-c", FAULTS, action, str(size)]
        return int(
            subprocess.run(call, env=clean | environment, check=True, capture_output=True, text=True).stdout
        )

    pages = (64 << 20) // os.sysconf("SC_PAGESIZE")
    assert faults("leave") > 0.9 * pages
    assert faults("library") > 0.9 * pages
    assert faults("keep") < 0.01 * pages
    assert faults("keep", 8 << 20) < 0.01 * pages
    # If glibc refuses that much, blocks that were used again before still are.
    assert faults("old glibc", 8 << 20) < 0.01 * pages
    # Settings in the environment win.
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="1000000") > 0.9 * pages


def test_the_command_line_keeps_memory_before_it_computes(call, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("darseg.cli.keep_memory", lambda: calls.append(1))
    assert call("evaluate", tmp_path / "nothing")[0] == 2 and calls == [1]
    assert call("check", tmp_path / "nothing")[0] == 2 and calls == [1]


def test_commands_that_compute_are_commands():
    assert set(COMPUTING) <= {command.callback.__name__ for command in app.registered_commands}


# --- threads


TICKS = "cpu  {0} 0 0 {1} 0 0 0 0 0 0\ncpu0 {0} 0 0 {2} 5 0 0 0 0 0\ncpu1 {0} 0 0 {1} 0 0 0 0 7 0\nintr 5\n"
"""proc/stat with two cores: user, idle and (of the first) waiting ticks."""


@pytest.mark.parametrize(("usable", "busy"), [({0, 1}, 0.75 + 0.25), ({1}, 0.25), ({7}, None)])
def test_cores_that_others_use(monkeypatch, tmp_path, usable, busy):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable)
    stat = tmp_path / "proc" / "stat"
    assert machine.busy_cores(0, tmp_path) is None
    stat.parent.mkdir()
    stat.write_text(TICKS.format(100, 500, 700))

    def later(_: float) -> None:
        # 30 ticks of work each; the first core was idle for 10, the second for 90.
        stat.write_text(TICKS.format(130, 590, 710))

    monkeypatch.setattr(machine.time, "sleep", later)
    measured = machine.busy_cores(0, tmp_path)
    assert measured == (busy if busy is None else pytest.approx(busy))


@pytest.mark.parametrize(
    ("omp", "processes", "threads"),
    [
        (None, None, 8),
        (None, "2", 4),
        (None, "16", 1),
        ("3", None, 3),
        ("1", None, 1),
        ("12", "2", 12),
        ("1", "2", 4),  # set by torchrun
        ("5,2", None, 5),
        ("0", None, 8),
        ("-1", None, 8),
        ("many", None, 8),
        ("", None, 8),
    ],
)
def test_threads_of_a_recipe_that_does_not_say(monkeypatch, omp, processes, threads):
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    for name, value in (("OMP_NUM_THREADS", omp), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert machine.default_threads() == threads


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a network of round 0, and a recipe that asks for 3 threads."""
    recipe = recipe_dict(tiny_data) | {"threads": 3}
    recipe["network"]["backbone"] = "resnet18_half"
    run = RunDirectory(tmp_path_factory.mktemp("threads") / "run")
    run.round(0).mkdir(parents=True)
    run.recipe.write_text(yaml.safe_dump(recipe))
    spec = spec_of(load_recipe(run.recipe))
    save_network(spec.build(), run.network(0), spec)
    run.finish(
        0,
        "train",
        inputs=Inputs({}),
        outputs=["network.safetensors"],
        seconds=1.0,
        facts={"steps": 6},
    )
    return run.root


def _view(run: Path, images: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    samples = manifest_of(recipe).unlabeled
    round_ = LabeledRound(RunDirectory(run), 1, recipe, classes_of(recipe), samples, frozenset(), {})
    with mock.patch.object(RunDirectory, "label_set", return_value=SimpleNamespace(alignment=None)):
        Repredictor(round_).prediction(samples[0])


QUIET = Console(quiet=True)
VERBS: dict[str, Callable[[Path, Path], object]] = {
    "evaluate": lambda run, images: evaluate(run, console=QUIET),
    "predict": lambda run, images: predict_folder(run, images, run.parent / "predicted", console=QUIET),
    "label": lambda run, images: label_folder(
        run, images, run.parent / "labels", labeling_ratio=0.5, console=QUIET
    ),
    "export": lambda run, images: export_network(run, run.parent / "network.pt2"),
    "view and report": _view,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_verb_on_a_run_predicts_with_the_recipes_threads(
    run, tiny_data, restored_threads, monkeypatch, verb
):
    used = set()

    def record(predict: Callable) -> Callable:
        def recorded(*arguments, **options):
            used.add(torch.get_num_threads())
            return predict(*arguments, **options)

        return recorded

    monkeypatch.setattr("darseg.model.windows._slide", record(_slide))
    monkeypatch.setattr("darseg.run.export.write_exported", record(lambda *_, **__: None))
    torch.set_num_threads(1)
    verb(run, tiny_data / "images" / "v")
    assert used == {3}


def test_threads_can_be_changed_for_one_call(run, tiny_data, restored_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    evaluate(run, overrides=["threads=4"], console=QUIET)
    assert torch.get_num_threads() == 4
    load_trained(run, overrides=["threads=null"])
    assert torch.get_num_threads() == 2
    load_trained(run, threads=4)
    assert torch.get_num_threads() == 4
    load_trained(RunDirectory(run).network(0))  # without a recipe
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("omp", "threads", "busy", "warned"),
    [
        (None, None, 1.4, True),
        (None, None, 0.4, False),
        (None, None, None, False),
        ("4", None, 3, False),
        (None, 2, 3, False),
    ],
)
def test_a_run_with_all_cores_says_if_others_use_them(
    monkeypatch, tiny_data, tmp_path, omp, threads, busy, warned
):
    monkeypatch.setattr(begin, "usable_cores", lambda: 4)
    monkeypatch.setattr(begin, "busy_cores", lambda: busy)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    recipe = recipe_dict(tiny_data) | {"rounds": [{"steps": 1}], "threads": threads}
    before = torch.get_num_threads()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(tmp_path / "recipe.yaml", tmp_path / "run", console=Console(quiet=True))
    torch.set_num_threads(before)
    events = map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())
    texts = [
        event["text"] for event in events if event["event"] == "warning" and "Other programs" in event["text"]
    ]
    assert len(texts) == warned
    if warned:
        assert "1.4 of the 4 cores" in texts[0] and "OMP_NUM_THREADS=3" in texts[0]
