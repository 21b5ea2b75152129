"""scripts/gpu.py, which measures on a GPU what only a GPU can show: every part of it, tiny, without one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    assert summary["comparison"]["ended"] == {"half_48_0_dars": "2 of 2 commands done"}
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert sorted(scores) == [f"half_48_seed_0/dars.round_{index}.json" for index in range(3)]
    assert all(0 <= score["test"]["plain"]["mean_iou"] <= 1 for score in scores.values())


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
