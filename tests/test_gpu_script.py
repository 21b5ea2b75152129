"""scripts/gpu.py, which measures on a GPU what only a GPU can show: every part of it, tiny, without one."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from darseg.config.experiment import load_experiment

NONE = "no time left"
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))
import gpu  # noqa: E402
from gpu import Job, run_jobs  # noqa: E402


def test_the_comparison_runs_on_drawn_images_and_leaves_its_scores(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "scripts/gpu.py", str(out), "--dry", "--parts", "comparison"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["comparison"]["ended"] == {"comparison": "1 of 1 commands done"}
    compared = json.loads((out / "compare.json").read_text())
    assert [variant["name"] for variant in compared["variants"]] == ["control_4_steps", "dars"]
    assert all(0 <= variant["test"]["mean"] <= 1 for variant in compared["variants"])
    evidence = json.loads(gzip.decompress((out / "comparison.json.gz").read_bytes()))
    assert evidence


def test_the_comparison_has_all_methods_of_the_experiment_with_all_seeds(tmp_path: Path) -> None:
    gpu.write_experiment(tmp_path / "experiment.yaml", tmp_path, dry=False)
    loaded = load_experiment(tmp_path / "experiment.yaml")
    written, source = loaded.settings, load_experiment(gpu.EXPERIMENT).settings
    assert [variant.name for variant in written.variants] == [variant.name for variant in source.variants]
    assert [*written.seeds] == [0, 1, 2] and all(variant.seeds is None for variant in written.variants)
    assert loaded.base.data.root == str(tmp_path)


def test_without_a_gpu_only_a_dry_run_begins(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "scripts/gpu.py", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "no GPU" in done.stderr
    command += ["--dry", "--seconds", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert done.returncode == 1  # in a dry run all has to be seen
    assert {**summary, "machine": None} == {
        "machine": None,
        "tests": NONE,
        "benchmarks": NONE,
        "comparison": NONE,
    }


def test_a_part_that_fails_is_told_by_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Job("tests", [[sys.executable, "-c", "raise SystemExit(3)"]])
    monkeypatch.setattr(gpu, "tests", lambda out, dry: [failing])
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--dry", "--parts", "tests"])
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    assert json.loads((tmp_path / "summary.json").read_text())["tests"]["ended"] == {"tests": "exit code 3"}


def test_what_is_not_done_in_time_is_stopped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 1)
    quick = [sys.executable, "-c", "print('done')"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    deaf = [
        sys.executable,
        "-c",
        f"import signal, time; signal.signal({signal.SIGINT:d}, lambda *_: None); time.sleep(60)",
    ]
    commands = {"whole": [quick, quick], "failed": [failing, quick], "slow": [quick, slow], "deaf": [deaf]}
    jobs = [Job(name, lines) for name, lines in commands.items()]
    began = time.monotonic()
    ended = run_jobs(jobs, tmp_path, began + 3, at_once=3)
    assert time.monotonic() - began < 30
    assert ended == {
        "whole": "2 of 2 commands done",
        "failed": "exit code 3",
        "slow": "stopped in command 2 of 2",
        "deaf": "stopped in command 1 of 1",
    }
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert all(job.process is None or job.process.wait(5) for job in jobs)
