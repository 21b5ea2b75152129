"""Training on many processes gives what training on one gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import forks
from conftest import recipe_dict
from darseg.data.batches import Batch
from darseg.model.network import Network, NetworkSpec
from darseg.training.stage import Stage, StepReport, run_stage
from test_stage import CLASSES, DEEPLAB, batch_at, build, method_of, still
from wording import says

STEPS = 8


PATCH = 16
NETWORKS = ("deeplabv2", "transformer", "frozen")


def network_of(name: str) -> Network:
    """A small network; the transformers have DPT's head, one on a backbone that does not learn."""
    if name == "deeplabv2":
        return build(DEEPLAB)
    torch.manual_seed(0)
    network = NetworkSpec("dpt", "timm/test_vit", CLASSES, head_channels=16).build()
    if name == "frozen":
        network.freeze_backbone()
    return network


def losses(name: str, processes: int, rank: int, micro_batch: int | None) -> list[tuple[float, ...]]:
    """The losses of both streams in each step of a float64 network; every process has its part of each batch of 8.

    Several processes add up their figures as float32.
    """

    def stream(number: int, step: int):
        while True:
            whole = batch_at(step, number, 8)
            own = 8 // processes
            at = slice(rank * own, (rank + 1) * own)
            side = slice(None) if name == "deeplabv2" else slice(PATCH)
            yield Batch(whole.images[at, :, side, side], whole.labels[at, side, side], whole.ids[at])
            step += 1

    reported = []

    def on_step(report: StepReport) -> None:
        reported.append(tuple(float(report.figures[name]) for name in ("loss_labeled", "loss_pseudo")))

    method = method_of(network_of(name).double(), still, 1e-4)
    stage = Stage(steps=STEPS, micro_batch=micro_batch, report_every=1)
    run_stage(method, lambda first: [stream(n, first) for n in range(2)], stage, on_step=on_step)
    return reported


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_and_micro_batches_have_the_losses_of_one(name: str, tmp_path: Path) -> None:
    if name != "deeplabv2":
        pytest.importorskip("timm")
    torch.set_num_threads(1)
    expected = np.array(losses(name, 1, 0, None))
    assert np.isfinite(expected).all() and expected[0, 0] != expected[-1, 0]
    assert np.abs(np.array(losses(name, 1, 0, 2)) - expected).max() < 1e-9
    (tmp_path / "two.py").write_text(
        "import json, sys, torch, torch.distributed as dist\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "from darseg.training.processes import disconnect\n"
        "from test_processes import losses\n"
        "for micro in (None, 2):\n"
        f"    reported = losses('{name}', 2, dist.get_rank(), micro)\n"
        "    if dist.get_rank() == 0: json.dump(reported, open(f'{micro}.json', 'w'))\n"
        "disconnect()\n"
    )
    ended = forks.torchrun("two.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for micro in (None, 2):
        reported = np.array(json.loads((tmp_path / f"{micro}.json").read_text()))
        assert np.abs(reported - expected).max() < 1e-6  # three roundings of losses near 1 to float32


@pytest.mark.slow
def test_one_process_resumes_the_finished_run_of_two(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["training"] |= {"batch": 8, "half_batch": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ("-m", "darseg", "train", "tiny.yaml", "--out", "run")
    ended = forks.torchrun(*command, cwd=tmp_path)  # the real torchrun is in test_unkillable.py
    assert ended.returncode == 0, ended.stderr
    line = next(line for line in ended.stdout.splitlines() if "2 processes" in line)
    says(line, "round 0: 4", "round 1: 2 + 2")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert len(summary["rounds"]) == 3
    # Every validation pixel is scored once, whichever process scores it.
    confusion = np.array(json.loads((tmp_path / "run/round_2/scores.json").read_text())["confusion"])
    assert 0.9 < confusion.sum() / (3 * 65 * 97) <= 1
    # There is nothing left to do, and all digests agree. test_unkillable.py resumes from a checkpoint of two processes.
    again = forks.python(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary


@pytest.mark.slow
def test_batches_that_cannot_be_shared_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["training"] |= {"batch": 5, "half_batch": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    ended = forks.torchrun("-m", "darseg", "train", "tiny.yaml", "--out", "run", cwd=tmp_path)
    assert ended.returncode != 0
    message = [line for line in ended.stderr.splitlines() if line.startswith(("darseg: ", "  - "))]
    # Both processes report it, unless torchrun ends one of them first.
    says("\n".join(dict.fromkeys(message)), "training.batch: 5", "2 processes", "training.half_batch: 1")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_end_quietly_whatever_still_holds_the_group(tmp_path: Path) -> None:
    (tmp_path / "end.py").write_text(
        "import torch\n"
        "from darseg.training.processes import Processes\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "Processes.here()\n"
        "def work():\n"
        "    wrapped = DistributedDataParallel(torch.nn.Conv2d(3, 4, 3))\n"
        "    wrapped(torch.rand(2, 3, 8, 8)).sum().backward()\n"
        "    return wrapped\n"
        "kept = work()\n"
        "work()\n"
    )
    for _ in range(4):  # without the collector about every third time ended in SIGABRT
        ended = forks.torchrun("end.py", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
