"""Runs that are killed, stopped, short of disk, memory or data, or resumed by more processes end as others do."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import forks
from conftest import KILL_BEFORE, recipe_dict
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import StreamPlace, stream_batches
from darseg.errors import (
    DataError,
    Interrupted,
    MemoryLimit,
    NumericsError,
    RunError,
    StorageError,
)
from darseg.model.network import Network
from darseg.model.sides import Sides
from darseg.run import remedies, streams
from darseg.run.build import manifest_of
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal
from darseg.run.rounds import train
from darseg.run.signals import Stop
from darseg.run.steps import evaluate as evaluate_step
from darseg.run.steps import label as label_step
from darseg.run.steps import train as train_step
from darseg.training.checkpoint import load_checkpoint, save_checkpoint
from darseg.training.stage import Stage, StepReport, run_stage
from test_run import outcome, warnings_of
from test_stage import DEEPLAB, batch_at, build, method_of, still, streams_of
from wording import refused, says

torch.set_num_threads(1)

STEPS = (5, 4)


def small(data: Path, **training: Any) -> dict[str, Any]:
    """Two short rounds of an even smaller network."""
    values = recipe_dict(data)
    values["network"] |= {"backbone": "resnet18_half", "head_channels": 8}
    values["training"] |= {"workers": 1, **training}
    values["rounds"] = [{"steps": STEPS[0]}, {"steps": STEPS[1], "labeling_ratio": 0.4}]
    return values


@pytest.fixture(scope="module")
def path(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of all runs here."""
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(small(tiny_data)))
    return file


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


@pytest.fixture(scope="module")
def finished(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe(path), folder)
    return folder


@pytest.fixture(scope="module")
def wanted(finished: Path) -> dict[str, bytes]:
    return outcome(finished)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (run / "journal.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def left(run: Path, index: int = 0) -> list[str]:
    return sorted(file.name for file in (run / f"round_{index}").glob("checkpoint_*"))


def checkpoints(*steps: int) -> list[str]:
    return [f"checkpoint_{step:08d}.safetensors" for step in steps]


class Pulled(Exception):
    """The plug was pulled: the run ends without a word."""


def pull() -> None:
    raise Pulled


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch):
    """Call a function once, when the batch of a step of a round is requested."""

    def arrange(index: int, step: int, act: Callable[[], object]) -> None:
        real, done = streams.stream_batches, []

        def stream(*arguments: Any, **options: Any) -> Iterator:
            inner = real(*arguments, **options)
            try:
                for number, batch in enumerate(inner, options["start"]):
                    if options["seed"][1:] == (index, 0) and number == step and not done:
                        done.append(step)
                        act()
                    yield batch
            finally:
                inner.close()

        monkeypatch.setattr(streams, "stream_batches", stream)

    return arrange


@pytest.fixture
def pulled(recipe: Recipe, tmp_path: Path, at_step):
    """A run folder whose run died in the last step of round 0, with checkpoints of steps 2 and 4."""
    at_step(0, 4, pull)
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "run")
    assert left(tmp_path / "run") == checkpoints(2, 4)
    return tmp_path / "run"


# --- SIGKILL

KILLER = (
    KILL_BEFORE
    + """
import json, random, shutil, sys, time
from pathlib import Path

import torch.utils.tensorboard
import darseg.report.overview
import darseg.run.rounds
from darseg.cli import main

base, recipe, seed, kills, stops = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
moments = random.Random(seed)


def begin(out, at=0):
    '''Start the command in a fork of this process, killed before its at-th change of the disk.'''
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not at:
        darseg.report.overview.write_report = lambda *_: None  # takes half of the time of so short a run
    else:
        os.fsync = lambda descriptor: None  # slow, and a kill does not lose what the system holds
        kill_before(at)
    code = command(out)
    sys.stderr.flush()
    os._exit(code)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def progress(out):
    '''How many steps are finished, and what exists of the next.'''
    done = [f"{path.parent.name}/{path.stem}" for path in out.glob("round_*/*.json")
            if path.stem in ("label", "train", "evaluate")]
    started = {path.name.split("_")[0] for path in out.glob("round_*/*") if path.is_dir() or "checkpoint" in path.name}
    halves = len(list(out.rglob("*.part")))
    return f"{len(done)} finished, {'+'.join(sorted(started)) or 'nothing'} started, {halves} half-written"


def command(out):
    sys.argv = ["darseg", "train", recipe, "--out", str(out)]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


assert command(base / "warm") == 0  # torch prepares itself here, not in each fork
began = time.monotonic()
assert end(begin(base / "whole")) == 0
lasted = time.monotonic() - began
number = 0
while number < kills + stops:
    which = signal.SIGKILL if number < kills else signal.SIGTERM
    out, moment = base / f"killed_{number}", moments.uniform(0, lasted)
    child = begin(out)
    time.sleep(moment)
    os.kill(child, which)
    code, state = end(child), progress(out)
    if code == 0:  # it had finished: draw another moment
        shutil.rmtree(out)
        continue
    number += 1
    again = end(begin(out))
    print(json.dumps([which.name, round(moment / lasted, 3), code, state, again]), flush=True)
often = () if not kills else (8, 11) if kills > 3 else (11,)
for at in often:  # 7 are taken by a start that removes a leftover and repeats a step
    out, count = base / f"often_{at}", 0
    while (code := end(begin(out, at))) == -signal.SIGKILL:
        count += 1
        assert count < 200, progress(out)
        for path in out.rglob("*.part"):
            path.write_bytes(path.read_bytes()[: 5 * count])
    print(json.dumps(["often", at, -9, f"{count} kills", code]), flush=True)
"""
)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    path: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    """At moments drawn uniformly over a run; then repeatedly, before every eleventh change of the disk.

    DARSEG_KILLS=30 kills at thirty moments, and also before every eighth change.
    """
    kills = int(os.environ.get("DARSEG_KILLS", "3"))
    seed = int(os.environ.get("DARSEG_KILLS_SEED", "1"))
    ended = forks.python("-c", KILLER, tmp_path / "runs", path, seed, kills, max(1, kills // 5))
    print(ended.stdout)  # shown with -s, or if the test fails
    assert ended.returncode == 0, ended.stderr
    reports = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert all(again == 0 for *_, again in reports), ended.stderr
    codes = {
        name: [code for which, _, code, *_ in reports if which == name] for name in ("SIGKILL", "SIGTERM")
    }
    assert codes["SIGKILL"] == [-signal.SIGKILL] * kills
    # -SIGTERM: the signal came before the run handled it.
    assert set(codes["SIGTERM"]) <= {128 + signal.SIGTERM, -signal.SIGTERM}
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 + len(reports)
    for folder in folders:
        assert outcome(folder) == wanted, folder.name
        assert not list(folder.rglob("*.part")) and not list(folder.glob("round_*/checkpoint_*")), folder.name


# --- SIGTERM and SIGINT


@pytest.mark.parametrize(
    ("which", "index", "step", "code"),
    [
        (signal.SIGTERM, 0, 2, 143),
        (signal.SIGINT, 1, 0, 130),
        # In the last step: the round is written, and nothing is begun after it.
        (signal.SIGINT, 0, STEPS[0] - 1, 130),
    ],
)
def test_signals_while_training_save_the_step_and_end(
    which, index: int, step: int, code: int, path: Path, tmp_path: Path, wanted, at_step, call
) -> None:
    run = tmp_path / "run"
    # Twice at once: torchrun repeats the signal that the terminal has sent to all processes.
    at_step(index, step, lambda: [os.kill(os.getpid(), which) for _ in range(2)])
    ended, _, err = call("train", path, "--out", run)
    assert ended == code
    assert "Traceback" not in err
    last = step == STEPS[index] - 1
    fact = which.name if last else f"step {step + 1} of {STEPS[index]}"
    says(err, fact)
    assert fact in events(run, "stopped")[0]["reason"]
    assert left(run, index) == [] if last else checkpoints(step + 1)[0] in left(run, index)
    assert (run / f"round_{index}/train.json").exists() == last
    assert not (run / f"round_{index}/evaluate.json").exists()
    assert signal.getsignal(which) in (signal.SIG_DFL, signal.default_int_handler)
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted
    steps = [event["step"] for event in events(run, "step") if event["round"] == index]
    assert steps == sorted(set(steps))  # no step twice


@pytest.mark.parametrize(("title", "step"), [("label", "label"), ("evaluate", "evaluate")])
def test_signals_outside_training_end_the_run_at_once(
    title: str, step: str, path: Path, tmp_path: Path, wanted, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    run, progress, titles = tmp_path / "run", Journal.progress, []

    def watched(self: Journal, heading: str, *arguments):
        if heading.endswith(title) and not titles:
            titles.append(heading)
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(5)
        return progress(self, heading, *arguments)

    monkeypatch.setattr(Journal, "progress", watched)
    began = time.monotonic()
    code, _, err = call("train", path, "--out", run)
    assert code == 143
    says(err, "SIGTERM")
    assert time.monotonic() - began < 60 and titles
    assert not (run / f"round_{int(titles[0].split()[1][0])}" / f"{step}.json").exists()
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training_raises_with_its_exit_code(which: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught:
        Stop().handle(which, None)
    assert caught.value.code == 128 + which


def test_a_second_request_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = Stop()
    with stop.patiently():
        stop.handle(signal.SIGINT, None)
        stop.handle(signal.SIGTERM, None)  # repeated by torchrun
        assert stop() and stop.asked == signal.SIGINT
        now += 2
        with refused(Interrupted, "SIGINT"):
            stop.handle(signal.SIGINT, None)
    with pytest.raises(Interrupted):
        stop.check()
    Stop().check()


# --- the run folder


def test_a_second_process_on_the_folder_is_refused(
    path: Path, recipe: Recipe, tmp_path: Path, wanted, at_step
) -> None:
    run, second = tmp_path / "run", []
    command = ("-m", "darseg", "train", path, "--out", run)
    at_step(1, 1, lambda: second.append(forks.python(*command)))
    train(recipe, run)
    assert second[0].returncode == 2 and "Traceback" not in second[0].stderr
    says(second[0].stderr, str(run), "--out NEW_FOLDER")
    assert outcome(run) == wanted
    with RunDirectory(run).held() as locked:  # the lock is free again
        assert locked


def test_a_folder_that_cannot_be_locked_is_reported(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        train(load_recipe(path, ["rounds=[{steps: 1}]"]), tmp_path / "run")
    text = next(text for text in warnings_of(tmp_path / "run") if "locks" in text)
    says(text, str(tmp_path / "run"))


def test_a_data_file_written_again_with_the_same_size_is_reported(
    path: Path, recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(load_recipe(path, ["rounds=[{steps: 1}]"]), run)
    train(load_recipe(path, ["rounds=[{steps: 1}]"]), run)
    assert not events(run, "data_written")
    image = manifest_of(recipe).labeled[0].image
    before = image.stat()
    try:
        os.utime(image, (time.time() + 5, time.time() + 5))
        train(load_recipe(path, ["rounds=[{steps: 1}]"]), run)
        assert not events(run, "data_written")  # read, and found to be the same
        (run / "contents.json").unlink()  # as in a run folder of darseg 0.2
        train(load_recipe(path, ["rounds=[{steps: 1}]"]), run)
    finally:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [event["files"] for event in events(run, "data_written")] == [1]
    text = next(text for text in warnings_of(run) if str(image) in text)
    says(text, "1 data file", "--out NEW_FOLDER")


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    size: int, recipe: Recipe, pulled: Path, wanted, at_step
) -> None:
    newest = pulled / "round_0" / checkpoints(4)[0]
    newest.write_bytes(newest.read_bytes()[:size])
    begun = []
    at_step(0, 2, lambda: begun.append(left(pulled)))
    train(recipe, pulled)
    assert begun == [checkpoints(2)]  # the damaged one does not count among those that are kept
    text = next(text for text in warnings_of(pulled) if str(newest) in text)
    says(text, checkpoints(2)[0])
    assert outcome(pulled) == wanted


def test_if_all_checkpoints_are_damaged_all_are_named_and_kept(recipe: Recipe, pulled: Path, wanted) -> None:
    files = [pulled / "round_0" / name for name in checkpoints(2, 4)]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    reason = r"(?<=this checkpoint is damaged )\(.*?\)(?=\. )"  # safetensors' own words
    with refused(RunError, *map(str, files), vary=[reason]):
        train(recipe, pulled)
    assert left(pulled) == checkpoints(2, 4)
    for file in files:
        file.unlink()
    train(recipe, pulled)
    assert outcome(pulled) == wanted


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep: int, path: Path, tmp_path: Path, at_step) -> None:
    changes = [f"training.keep_checkpoints={keep}", "training.checkpoint_every=1", "rounds=[{steps: 9}]"]
    half = tmp_path / "run" / "round_0" / f"{checkpoints(3)[0]}.part"
    at_step(0, 5, lambda: (half.write_bytes(b"left by a kill"), pull()))
    with pytest.raises(Pulled):
        train(load_recipe(path, changes), tmp_path / "run")
    half.unlink()
    assert left(tmp_path / "run") == checkpoints(*range(6 - keep, 6))
    half.write_bytes(b"left by a kill")
    train(load_recipe(path, changes), tmp_path / "run")
    assert left(tmp_path / "run") == []


# --- the disk


def test_a_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(
    path: Path, tmp_path: Path, wanted, call
) -> None:
    run, fsync = tmp_path / "run", os.fsync

    def full(descriptor: int) -> None:
        if "checkpoint_00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = call("train", path, "--out", run)
    assert code == 2 and "Traceback" not in err
    says(err, str(run / "round_0" / checkpoints(4)[0]))
    assert left(run) == checkpoints(2)
    assert "StorageError" in events(run, "stopped")[0]["reason"]
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted


def test_a_disk_that_is_full_for_tensorboard_is_reported(
    recipe: Recipe, tmp_path: Path, wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("add_scalar", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(SummaryWriter, name, full)
            with refused(StorageError, str(tmp_path / "run/tensorboard")):
                train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run")
    assert outcome(tmp_path / "run") == wanted


def test_a_full_disk_does_not_hide_why_a_run_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step
) -> None:
    event = Journal.event

    def full(self: Journal, name: str, **fields: Any) -> None:
        if name == "stopped":
            raise StorageError("The disk is full")
        event(self, name, **fields)

    monkeypatch.setattr(Journal, "event", full)
    at_step(0, 1, pull)
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "run")


# --- data


def copied(tiny_data: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """A recipe with a copy of the data, and the path of a labeled image."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (tmp_path / "copied.yaml").write_text(yaml.safe_dump(small(root)))
    image = sorted((root / "images/l").iterdir())[0]
    return load_recipe(tmp_path / "copied.yaml"), image


def test_data_that_vanish_or_change_before_the_run_resumes_are_named(
    tiny_data: Path, tmp_path: Path, wanted, at_step
) -> None:
    recipe, image = copied(tiny_data, tmp_path)
    at_step(0, 4, pull)
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "run")
    content = image.read_bytes()
    image.unlink()
    with refused(DataError, "labeled.txt", "line 1", f"'l/{image.stem}'"):
        train(recipe, tmp_path / "run")
    image.write_bytes(content + b"changed")
    with refused(RunError, str(tmp_path / "run"), "labeled", "--out NEW_FOLDER"):
        train(recipe, tmp_path / "run")
    assert left(tmp_path / "run") == checkpoints(2, 4)
    image.write_bytes(content)
    train(recipe, tmp_path / "run")
    assert outcome(tmp_path / "run") == wanted


@pytest.mark.parametrize("spoil", ["vanished", "cut off"])
def test_data_that_vanish_or_change_during_training_are_named(
    spoil: str, tiny_data: Path, tmp_path: Path, at_step
) -> None:
    recipe, image = copied(tiny_data, tmp_path)
    # Without the cache: an image that is kept in memory is not read again.
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"cache": False})})
    content = image.read_bytes()
    at_step(1, 0, lambda: image.unlink() if spoil == "vanished" else image.write_bytes(content[:200]))
    recipe = recipe.model_copy(
        update={"rounds": (recipe.rounds[0], recipe.rounds[1].model_copy(update={"steps": 9}))}
    )
    with refused(DataError, str(image)):
        train(recipe, tmp_path / "run")
    assert "DataError" in events(tmp_path / "run", "stopped")[0]["reason"]
    assert (tmp_path / "run/round_0/evaluate.json").exists()
    image.write_bytes(content)
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run/summary.json").exists()


# --- numerics


def spoiled(kind: str, step_of: int = 1) -> Callable:
    """A loss that is not finite at a step, or of which only the gradient is not."""

    def objective(network: Network, batches: Any, step: int) -> Any:
        loss, figures = still(network, batches, step)
        if step == step_of:
            weight = next(iter(network.parameters()))
            # √0 is finite, but its slope is not.
            loss = loss * float("inf") if kind == "loss" else loss + (weight.sum() * 0).sqrt()
        return loss, figures

    return objective


@pytest.mark.parametrize(
    ("kind", "precision", "problem"),
    [("loss", "fp32", "loss inf"), ("gradient", "fp32", "norm nan"), ("gradient", "bf16", "norm nan")],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_weights_move(
    kind: str, precision: Any, problem: str
) -> None:
    network, moved = build(DEEPLAB), []

    def on_step(report: StepReport) -> None:
        moved.append({name: value.clone() for name, value in network.named_parameters()})

    stage = Stage(steps=3, precision=precision)
    ids = [f"0/1/{index}" for index in range(6)]
    facts = ["step 1 of 3", problem, *ids, "training.learning_rate"]
    numbers = [r"(?<=norm )[\d.]+", r"(?<=loss )[\d.]+"]
    with refused(NumericsError, *facts, vary=numbers) as caught:
        run_stage(method_of(network, spoiled(kind), 0.01), streams_of(1), stage, on_step=on_step)
    assert ("precision=fp32" in str(caught.value)) == (precision == "bf16")
    assert len(moved) == 1
    assert all(torch.equal(value, moved[0][name]) for name, value in network.named_parameters())


def test_fp16_skips_overflowing_steps_and_stops_if_scaling_does_not_help() -> None:
    network, norms = build(DEEPLAB), []
    start = {name: value.clone() for name, value in network.named_parameters()}

    def objective(net: Callable, batches: Any, step: int) -> Any:
        return (next(network.parameters()).sum() * 0).sqrt(), {}

    stage = Stage(steps=40, precision="fp16")
    with refused(NumericsError, "step 16 of 40"):  # 65536, halved 16 times, is 1
        run_stage(
            method_of(network, objective, 0.01),
            streams_of(1),
            stage,
            on_step=lambda report: norms.append(report.figures["gradient_norm"]),
        )
    assert not torch.isfinite(torch.stack(norms)).any()
    assert all(torch.equal(value, start[name]) for name, value in network.named_parameters())


def overflowing(net: Network, batches: Any, step: int) -> Any:
    halves = next(net.parameters()).half()  # the gradient of each is 3; 3 · 16384 is the first in range
    return (3 * halves).sum().float(), {}


def test_an_fp16_stage_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    """The scale falls before the checkpoint; a fresh scale would skip steps again."""

    stage = Stage(steps=6, precision="fp16", checkpoint_every=4)
    norms = []
    end = run_stage(
        method_of(build(DEEPLAB), overflowing),
        streams_of(1),
        stage,
        on_checkpoint=lambda checkpoint: save_checkpoint(checkpoint, tmp_path / "a.safetensors"),
        on_step=lambda report: norms.append(float(report.figures["gradient_norm"])),
    )
    assert [bool(np.isfinite(norm)) for norm in norms] == [False, False, True, True, True, True]
    kept = load_checkpoint(tmp_path / "a.safetensors")
    assert kept.scaling["scale"] == 16384
    again = run_stage(method_of(build(DEEPLAB), overflowing), streams_of(1), stage, begin=kept)
    for part in ("network", "optimizer"):
        resumed, expected = again.parts[part], end.parts[part]
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert again.scaling == end.scaling


def sgd_with(fused: bool | None) -> type[torch.optim.SGD]:
    """PyTorch's SGD, fused or not whatever its caller asks for."""

    class Chosen(torch.optim.SGD):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__(groups, **options | {"fused": fused})

    return Chosen


def test_a_skipped_first_step_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fused SGD, used on GPUs, would start from uninitialized memory."""

    ends, kinds, empty = [], [sgd_with(None), sgd_with(True)], torch.empty_like
    # Uninitialized memory may happen to be small, so it is filled.
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(1e30))
    stage = Stage(steps=4, precision="fp16")
    for kind in kinds:
        monkeypatch.setattr(torch.optim, "SGD", kind)
        ends.append(run_stage(method_of(build(DEEPLAB), overflowing), streams_of(1), stage))
    for part in ("network", "optimizer"):
        plain, fused_end = (end.parts[part] for end in ends)
        assert plain.keys() == fused_end.keys()
        for key in plain:  # the same gradients; the two SGDs may round the last bit otherwise
            torch.testing.assert_close(fused_end[key], plain[key], rtol=1e-6, atol=1e-6)


def test_fp16_runs_and_its_journal_is_json(path: Path, tmp_path: Path) -> None:
    changes = ["training.precision=fp16", "rounds=[{steps: 2}]"]
    train(load_recipe(path, changes), tmp_path / "run")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for line in (tmp_path / "run/journal.jsonl").open():
        json.loads(line, parse_constant=refuse)


def test_gradient_norm_and_waiting_are_reported(finished: Path, path: Path, tmp_path: Path, call) -> None:
    for event in events(finished, "step"):
        assert event["gradient_norm"] > 0 and 0 <= event["waiting_for_data"] <= 1
    assert len(events(finished, "step")) == 4
    code, out, _ = call("train", path, "rounds=[{steps: 1}]", "--out", tmp_path / "run")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("round 0: train: 1/1"))
    says(line, "1/1", "rate 1.00e-02", vary=[r"[\d.]+(?=/s)", r"(?<=loss )[\d.]+", r"\d+(?=%)"])


def test_waiting_is_measured() -> None:
    def slow(first: int) -> list[Iterator]:
        def stream() -> Iterator:
            while True:
                time.sleep(0.3)
                yield batch_at(0, 0, 2)

        return [stream()]

    shares = []
    method = method_of(build(DEEPLAB), still)
    run_stage(method, slow, Stage(steps=3), on_step=lambda report: shares.append(report.waiting))
    assert all(0.02 < share < 1 for share in shares)


# --- memory


@pytest.mark.parametrize(
    ("changes", "advice", "absent"),
    [
        (["training.batch=8"], "training.micro_batch=4 (now 8 images at once)", "micro_batch=2"),
        ([], "training.micro_batch=2 (now 4 images", "micro_batch=4"),
        (["training.micro_batch=2"], "training.precision=bf16", "micro_batch"),  # no less is possible
        (["training.batch=6", "training.half_batch=6", "training.micro_batch=6"], "micro_batch=3", "batch=2"),
        (["training.precision=fp16"], "training.recompute=true", "bf16"),
        (["training.recompute=true"], "training.precision=bf16", "recompute"),
        (["training.compile=true"], "training.precision=bf16", "recompute"),
        (
            ["training.micro_batch=2", "training.precision=fp16", "training.recompute=true"],
            "training.crop=[17, 33]",
            " or ",
        ),
    ],
)
def test_the_advice_if_a_gpu_has_too_little_memory_to_train(
    changes: list[str], advice: str, absent: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    monkeypatch.setattr(train_step, "run_stage", exhausted)
    facts = (advice, "Tried to allocate 2.00 GiB", "training.crop=[17, 33] (now [49, 65]")
    with refused(MemoryLimit, *facts, "--out NEW_FOLDER", "darseg plan") as caught:
        train(load_recipe(path, changes), tmp_path / "run")
    message = str(caught.value)
    assert "More words" not in message and absent not in message
    assert "--reuse" not in message  # each of these is an input of every training


def test_the_advice_if_the_recipe_cannot_save_more_memory() -> None:
    sides = Sides(16)
    assert remedies._smaller("training.crop", (17, 33), sides) == [
        "training.crop=[17, 17] (now [17, 33]; about a quarter)"
    ]
    assert remedies._smaller("training.crop", (17, 17), sides) == []
    assert remedies._either(["a", "b", "c"]) == "a, b or c"
    assert remedies._either([]) == "a smaller network.backbone"


@pytest.mark.parametrize(
    ("module", "name", "deleted", "advice"),
    [
        (
            evaluate_step,
            "score_variants",
            ["round_0/evaluate.json", "round_1"],
            "evaluation.window=[33, 33]",
        ),
        (label_step, "label_samples", ["round_1"], "labeling.window=[33, 33]"),
    ],
    ids=["evaluate", "label"],
)
def test_the_advice_if_a_gpu_has_too_little_memory_to_predict(
    module: Any,
    name: str,
    deleted: list[str],
    advice: str,
    recipe: Recipe,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in (run / entry for entry in deleted):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(module, name, exhausted)
    with refused(MemoryLimit, advice, "--out NEW_FOLDER", "--reuse"):
        train(recipe, run)


# --- processes


def test_sync_batchnorm_on_the_cpu_is_reported(path: Path, tmp_path: Path) -> None:
    for setting, count in (("true", 1), ("null", 0)):
        changes = [f"training.sync_batchnorm={setting}", "rounds=[{steps: 1}]"]
        train(load_recipe(path, changes), tmp_path / setting)
        warnings = [text for text in warnings_of(tmp_path / setting) if "training.sync_batchnorm" in text]
        assert len(warnings) == count
        for text in warnings:
            says(text, "SyncBatchNorm", "GPU")


TWO = """
import json, sys
import torch
import torch.distributed as dist

import test_unkillable as tests
from darseg.config.text import load_recipe
from darseg.errors import NumericsError
from darseg.run import streams
from darseg.run.rounds import train
from darseg.training.processes import Processes

processes = Processes.here()
torch.set_num_threads(1)
messages = {precision: tests.spoiled_message(processes.rank, precision) for precision in ("fp32", "fp16")}
json.dump(messages, open(f"messages_{processes.rank}.json", "w"))
recipe = load_recipe(sys.argv[1])
train(recipe, "one_then_two")
stream_batches = streams.stream_batches


def stream(*arguments, **options):
    for step, batch in enumerate(stream_batches(*arguments, **options), options["start"]):
        if options["seed"][1:] == (0, 0) and step == 4:
            raise tests.Pulled
        yield batch


streams.stream_batches = stream
try:
    train(recipe, "two_then_one")
except tests.Pulled:
    pass
"""


def spoiled_message(rank: int, precision: Any) -> str:
    """The error message in a process if only the second process's loss is not finite."""

    def stream(first: int) -> list[Iterator]:
        return [iter([replace(batch_at(step, 0, 2), ids=(f"{rank}/{step}",) * 2) for step in range(5)])]

    def objective(network: Network, batches: Any, step: int) -> Any:
        loss, figures = still(network, batches, step)
        return (loss * float("inf") if (rank, step) == (1, 1) else loss), figures

    class Feed:
        def __init__(self, batches: Iterator) -> None:
            self.batches = batches

        def __next__(self) -> Any:
            return next(self.batches)

        def close(self) -> None:
            pass

    method = method_of(build(DEEPLAB), objective)
    try:
        run_stage(method, lambda first: [Feed(*stream(first))], Stage(steps=4, precision=precision))
    except NumericsError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_another_number_of_processes_resumes_a_run_and_reports_what_that_means(
    tiny_data: Path, tmp_path: Path, at_step
) -> None:
    file = tmp_path / "eight.yaml"
    file.write_text(yaml.safe_dump(small(tiny_data, batch=8, half_batch=4)))
    (tmp_path / "two.py").write_text(TWO)
    at_step(0, 4, pull)
    with pytest.raises(Pulled):
        train(load_recipe(file), tmp_path / "one_then_two")
    ended = forks.torchrun("two.py", str(file), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        for message in json.loads((tmp_path / f"messages_{rank}.json").read_text()).values():
            assert "step 1 of 4 (loss inf" in message and "images 0/1, 1/1)" in message
    train(load_recipe(file), tmp_path / "two_then_one")
    for name, change in (("one_then_two", "1 → 2"), ("two_then_one", "2 → 1")):
        run = tmp_path / name
        changed, meaning = (
            next(text for text in warnings_of(run) if fact in text) for fact in (change, "BatchNorm")
        )
        says(changed, f"processes {change}")
        says(meaning, "distribution")
        assert len(events(run, "finished")) == 1
        assert [event["step"] for event in events(run, "checkpoint") if event["round"] == 0] == [2, 4]
        summary = json.loads((run / "summary.json").read_text())
        assert len(summary["rounds"]) == 2
        tensors = load_file(run / "round_1/network.safetensors")
        assert all(torch.isfinite(value).all() for value in tensors.values())


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves_the_step_and_reports_it_once(tiny_data: Path, tmp_path: Path) -> None:
    values = small(tiny_data, batch=8, half_batch=4)
    values["rounds"] = [{"steps": 100_000}]
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "darseg", "train", "long.yaml", "--out", "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not left(run):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    reason = events(run, "stopped")[0]["reason"]
    step = int(re.search(r"Interrupted: .*step (\d+) of 100000", reason)[1])
    assert err.count(f"step {step} of 100000") == 1, err
    assert checkpoints(step)[0] in left(run)


# --- shares of batches


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda own: st.tuples(st.just(own), st.integers(1, 3))),
    st.integers(0, 5),
    st.integers(0, 2**31),
)
def test_all_shares_together_are_the_batch(
    tiny_data: Path, sizes: tuple[int, int], start: int, seed: int
) -> None:
    own, processes = sizes
    data = manifest_of(Recipe.model_validate(small(tiny_data)))
    how = Augmentation(crop=(33, 33), scale=(0.5, 2.0), rotate=10, blur=True, mirror=True, fill=(1, 2, 3))

    def two_steps(share: tuple[int, int]) -> list:
        stream = stream_batches(
            data.labeled,
            data.classes,
            how,
            batch_size=own * processes,
            seed=(seed, 0, 0),
            start=start,
            place=StreamPlace(*share, workers=1),
        )
        batches = [next(stream) for _ in range(2)]
        stream.close()
        return batches

    whole, parts = two_steps((0, 1)), [two_steps((rank, processes)) for rank in range(processes)]
    for step in range(2):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([share.images for share in shares]), whole[step].images)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole[step].labels)
        assert sum((share.ids for share in shares), ()) == whole[step].ids
        assert all(len(share.ids) == own for share in shares)
