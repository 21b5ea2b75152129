"""Training on many processes gives what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import REPOSITORY, recipe_dict
from darseg.data.batches import Batch
from darseg.training.stage import Stage, StepReport, run_stage
from test_stage import DEEPLAB, batch_at, build, method_of, still

STEPS = 20


def losses(processes: int, rank: int, micro_batch: int | None) -> list[tuple[float, ...]]:
    """Losses of both streams in each step, in float64; every process has its part of each batch of 8."""

    def stream(number: int, step: int):
        while True:
            whole = batch_at(step, number, 8)
            own = 8 // processes
            at = slice(rank * own, (rank + 1) * own)
            yield Batch(whole.images[at], whole.labels[at], whole.ids[at])
            step += 1

    shown = []

    def on_step(report: StepReport) -> None:
        shown.append(tuple(float(report.figures[name]) for name in ("loss_labeled", "loss_pseudo")))

    method = method_of(build(DEEPLAB).double(), still, 1e-4)
    stage = Stage(steps=STEPS, micro_batch=micro_batch, report_every=1)
    run_stage(method, lambda first: [stream(n, first) for n in range(2)], stage, on_step=on_step)
    return shown


def torchrun(count: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")]),
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            *command,
        ],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.slow
def test_two_processes_and_micro_batches_have_the_losses_of_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wanted = np.array(losses(1, 0, None))
    assert np.isfinite(wanted).all() and wanted[0, 0] != wanted[-1, 0]
    assert np.abs(np.array(losses(1, 0, 2)) - wanted).max() < 1e-9
    (tmp_path / "two.py").write_text(
        "import json, sys, torch, torch.distributed as dist\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "from test_processes import losses\n"
        "for micro in (None, 2):\n"
        "    found = losses(2, dist.get_rank(), micro)\n"
        "    if dist.get_rank() == 0: json.dump(found, open(f'{micro}.json', 'w'))\n"
        "dist.destroy_process_group()\n"
    )
    ended = torchrun(2, "two.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for micro in (None, 2):
        found = np.array(json.loads((tmp_path / f"{micro}.json").read_text()))
        assert np.abs(found - wanted).max() < 1e-9


@pytest.mark.slow
def test_a_run_on_two_processes_and_one_that_goes_on_with_its_folder(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["training"] |= {"batch": 8, "half_batch": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ("-m", "darseg", "train", "tiny.yaml", "--out", "run")
    ended = torchrun(2, *command, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 processes share every batch" in ended.stdout and "round 0: 4, round 1: 2 + 2" in ended.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["rounds"]) == 3
    # Every validation pixel is scored once, whoever scored it.
    confusion = np.array(json.loads((tmp_path / "run/round_2/scores.json").read_text())["confusion"])
    assert 0.9 < confusion.sum() / (3 * 65 * 97) <= 1
    # One process goes on where two ended: here there is nothing left to do, and all digests hold. (From a checkpoint of
    # two it goes on in test_unkillable.py.)
    again = torchrun(1, *command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


@pytest.mark.slow
def test_batches_that_cannot_be_shared_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["training"] |= {"batch": 5, "half_batch": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = torchrun(2, "-m", "darseg", "train", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert ended.returncode != 0
    assert "training.batch: 5 images cannot be divided among 2 processes" in ended.stderr
    assert "training.half_batch: 1 image for each of 2 processes" in ended.stderr
    assert not (tmp_path / "run").exists()
