"""A run that is killed, stopped, starved of disk, memory or data, or shared anew ends as one that was left in peace."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

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
from darseg.run import remedies
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
from test_processes import torchrun
from test_run import outcome
from test_stage import DEEPLAB, batch_at, build, method_of, still, streams_of
from wording import refused

torch.set_num_threads(1)

STEPS = (5, 4)


def small(data: Path, **training: Any) -> dict[str, Any]:
    """Two short rounds of a still smaller network."""
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
    """A run left in peace."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe(path), folder)
    return folder


@pytest.fixture(scope="module")
def wanted(finished: Path) -> dict[str, bytes]:
    return outcome(finished)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [one for line in (run / "journal.jsonl").open() if (one := json.loads(line))["event"] == name]


def left(run: Path, index: int = 0) -> list[str]:
    return sorted(file.name for file in (run / f"round_{index}").glob("checkpoint_*"))


def checkpoints(*steps: int) -> list[str]:
    return [f"checkpoint_{step:08d}.safetensors" for step in steps]


class Pulled(Exception):
    """The plug."""


def pull() -> None:
    raise Pulled


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch):
    """Let something happen, once, as the batch of a step of a round is asked for."""

    def arrange(index: int, step: int, act: Callable[[], object]) -> None:
        streamed, done = train_step.stream_batches, []

        def stream(*arguments: Any, **options: Any) -> Iterator:
            inner = streamed(*arguments, **options)
            try:
                for number, batch in enumerate(inner, options["start"]):
                    if options["seed"][1:] == (index, 0) and number == step and not done:
                        done.append(step)
                        act()
                    yield batch
            finally:
                inner.close()

        monkeypatch.setattr(train_step, "stream_batches", stream)

    return arrange


@pytest.fixture
def pulled(recipe: Recipe, tmp_path: Path, at_step):
    """A run folder whose run died in round 0 at its last step, with checkpoints of steps 2 and 4."""
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
import darseg.run.rounds
from darseg.cli import main

base, recipe, seed, kills, stops = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
moments = random.Random(seed)


def begin(out, at=0):
    '''The command in a fork of this process, killed before the at-th change of the disk.'''
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if at:
        os.fsync = lambda descriptor: None  # slow; a kill does not lose what the system holds
        kill_before(at)
    code = command(out)
    sys.stderr.flush()
    os._exit(code)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def where(out):
    '''The last step that is done, and what lies about of the next.'''
    done = [f"{path.parent.name}/{path.stem}" for path in out.glob("round_*/*.json")
            if path.stem in ("label", "train", "evaluate")]
    about = {path.name.split("_")[0] for path in out.glob("round_*/*") if path.is_dir() or "checkpoint" in path.name}
    halves = len(list(out.rglob("*.part")))
    return f"{len(done)} done, {'+'.join(sorted(about)) or 'nothing'} about, {halves} half-written"


def command(out):
    sys.argv = ["darseg", "train", recipe, "--out", str(out)]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


assert command(base / "warm") == 0  # here, so that what torch prepares need not be prepared in each fork
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
    code, found = end(child), where(out)
    if code == 0:  # it was through: drawn again
        shutil.rmtree(out)
        continue
    number += 1
    again = end(begin(out))
    print(json.dumps([which.name, round(moment / lasted, 3), code, found, again]), flush=True)
for at in (7, 11) if kills else ():
    out, count = base / f"often_{at}", 0
    while (code := end(begin(out, at))) == -signal.SIGKILL:
        count += 1
        for path in out.rglob("*.part"):
            path.write_bytes(path.read_bytes()[: 5 * count])
    print(json.dumps(["often", at, -9, f"{count} kills", code]), flush=True)
"""
)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    path: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    """Moments drawn uniformly over the time of a run; then again and again before every few changes of the disk."""
    kills = int(os.environ.get("DARSEG_KILLS", "6"))
    seed = int(os.environ.get("DARSEG_KILLS_SEED", "1"))
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, (tmp_path / "runs", path, seed, kills, max(2, kills // 5)))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(ended.stdout)  # shown with -s or where it fails
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("[")]
    assert all(again == 0 for *_, again in told), ended.stderr
    codes = {name: [code for which, _, code, *_ in told if which == name] for name in ("SIGKILL", "SIGTERM")}
    assert codes["SIGKILL"] == [-signal.SIGKILL] * kills
    assert set(codes["SIGTERM"]) <= {
        128 + signal.SIGTERM,
        -signal.SIGTERM,
    }  # the latter before the run begins
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 + len(told)
    for folder in folders:
        assert outcome(folder) == wanted, folder.name
        assert not list(folder.rglob("*.part")) and not list(folder.glob("round_*/checkpoint_*")), folder.name


# --- SIGTERM and SIGINT


@pytest.mark.parametrize(
    ("which", "index", "step", "code"),
    [
        (signal.SIGTERM, 0, 2, 143),
        (signal.SIGINT, 1, 0, 130),
        (
            signal.SIGINT,
            0,
            STEPS[0] - 1,
            130,
        ),  # in the last step: the round is written, and nothing begun after it
    ],
)
def test_signals_while_training_save_the_step_and_end(
    which, index: int, step: int, code: int, path: Path, tmp_path: Path, wanted, at_step, call
) -> None:
    run = tmp_path / "run"
    # Twice at once, as torchrun passes on what the terminal has sent already.
    at_step(index, step, lambda: [os.kill(os.getpid(), which) for _ in range(2)])
    ended, _, err = call("train", path, "--out", run)
    assert ended == code
    assert "Run the same command again to continue." in err and "Traceback" not in err
    last = step == STEPS[index] - 1
    said = f"stopped by {which.name}." if last else f"stopped after step {step + 1} of {STEPS[index]}"
    assert err.startswith(f"darseg: {said}")
    assert said in events(run, "stopped")[0]["reason"]
    assert left(run, index) == [] if last else checkpoints(step + 1)[0] in left(run, index)
    assert (run / f"round_{index}/train.json").exists() == last
    assert not (run / f"round_{index}/evaluate.json").exists()
    assert signal.getsignal(which) in (signal.SIG_DFL, signal.default_int_handler)
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted
    steps = [one["step"] for one in events(run, "step") if one["round"] == index]
    assert steps == sorted(set(steps))  # no step twice


@pytest.mark.parametrize(("where", "step"), [("label", "label"), ("evaluate", "evaluate")])
def test_signals_elsewhere_end_at_once(
    where: str, step: str, path: Path, tmp_path: Path, wanted, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    run, progress, asked = tmp_path / "run", Journal.progress, []

    def watched(self: Journal, title: str, *given):
        if title.endswith(where) and not asked:
            asked.append(title)
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(5)
        return progress(self, title, *given)

    monkeypatch.setattr(Journal, "progress", watched)
    began = time.monotonic()
    code, _, err = call("train", path, "--out", run)
    assert code == 143 and err.startswith("darseg: stopped by SIGTERM. Run the same command again")
    assert time.monotonic() - began < 60 and asked
    assert not (run / f"round_{int(asked[0].split()[1][0])}" / f"{step}.json").exists()
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_has_its_exit_code_wherever_it_comes(which: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught:
        Stop().handle(which, None)
    assert caught.value.code == 128 + which


def test_a_signal_asked_again_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = Stop()
    with stop.patiently():
        stop.handle(signal.SIGINT, None)
        stop.handle(signal.SIGTERM, None)  # passed on
        assert stop() and stop.asked == signal.SIGINT
        now += 2
        with pytest.raises(Interrupted, match=r"stopped by SIGINT\.$"):
            stop.handle(signal.SIGINT, None)
    with pytest.raises(Interrupted):
        stop.check()
    Stop().check()


# --- the run folder


def test_a_second_process_on_the_folder_is_refused(
    path: Path, recipe: Recipe, tmp_path: Path, wanted, at_step
) -> None:
    run, second = tmp_path / "run", []
    command = [sys.executable, "-m", "darseg", "train", str(path), "--out", str(run)]
    at_step(1, 1, lambda: second.append(subprocess.run(command, capture_output=True, text=True)))
    train(recipe, run)
    assert second[0].returncode == 2
    assert "another process is at work in this run folder" in second[0].stderr
    assert "--out NEW_FOLDER" in second[0].stderr and "Traceback" not in second[0].stderr
    assert outcome(run) == wanted
    with RunDirectory(run).held() as locked:  # free again
        assert locked


def test_a_folder_that_cannot_be_locked_is_said(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(load_recipe(path, ["rounds=[{steps: 1}]"]), tmp_path / "run")
    warned = [one["text"] for one in events(tmp_path / "run", "warning")]
    assert any("a file system without locks" in text for text in warned)


def test_a_data_file_written_anew_with_the_same_size_is_said(
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
    finally:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [one["files"] for one in events(run, "data_written")] == [1]
    warned = [one["text"] for one in events(run, "warning")]
    assert any(str(image) in text and "--out NEW_FOLDER" in text for text in warned)


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    size: int, recipe: Recipe, pulled: Path, wanted, at_step
) -> None:
    newest = pulled / "round_0" / checkpoints(4)[0]
    newest.write_bytes(newest.read_bytes()[:size])
    begun = []
    at_step(0, 2, lambda: begun.append(left(pulled)))
    train(recipe, pulled)
    assert begun == [
        checkpoints(2)
    ]  # the damaged one does not stand for a good one among those that are kept
    assert any(
        f"{newest} is damaged" in one["text"] and "00000002" in one["text"]
        for one in events(pulled, "warning")
    )
    assert outcome(pulled) == wanted


def test_where_all_checkpoints_are_damaged_all_are_named_and_kept(
    recipe: Recipe, pulled: Path, wanted
) -> None:
    files = [pulled / "round_0" / name for name in checkpoints(2, 4)]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError) as caught:
        train(recipe, pulled)
    assert all(f"{file}: this checkpoint is damaged" in str(caught.value) for file in files)
    assert "Delete it and run the same command again" in str(caught.value)
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
    assert code == 2 and "The disk is full" in err and "checkpoint_00000004" in err and "Traceback" not in err
    assert left(run) == checkpoints(2)
    assert "StorageError" in events(run, "stopped")[0]["reason"]
    assert call("train", path, "--out", run)[0] == 0
    assert outcome(run) == wanted


def test_a_disk_that_is_full_for_tensorboard_is_said(
    recipe: Recipe, tmp_path: Path, wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*given: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("add_scalar", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(SummaryWriter, name, full)
            with pytest.raises(StorageError, match=r"The disk is full: .*tensorboard"):
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
    """A recipe on a copy of the data, and one of its images."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (tmp_path / "copied.yaml").write_text(yaml.safe_dump(small(root)))
    image = sorted((root / "images/l").iterdir())[0]
    return load_recipe(tmp_path / "copied.yaml"), image


def test_data_that_vanish_or_change_before_the_rerun_are_named(
    tiny_data: Path, tmp_path: Path, wanted, at_step
) -> None:
    recipe, image = copied(tiny_data, tmp_path)
    at_step(0, 4, pull)
    with pytest.raises(Pulled):
        train(recipe, tmp_path / "run")
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=image.stem):
        train(recipe, tmp_path / "run")
    image.write_bytes(content + b"changed")
    with pytest.raises(RunError, match=r"begun with other images or labels \(labeled:.*--out NEW_FOLDER"):
        train(recipe, tmp_path / "run")
    assert left(tmp_path / "run") == checkpoints(2, 4)
    image.write_bytes(content)
    train(recipe, tmp_path / "run")
    assert outcome(tmp_path / "run") == wanted


@pytest.mark.parametrize("spoil", ["vanished", "cut off"])
def test_data_that_vanish_or_change_while_running_are_named(
    spoil: str, tiny_data: Path, tmp_path: Path, at_step
) -> None:
    recipe, image = copied(tiny_data, tmp_path)
    # An image that is kept in memory is not missed.
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"cache": False})})
    content = image.read_bytes()
    at_step(1, 0, lambda: image.unlink() if spoil == "vanished" else image.write_bytes(content[:200]))
    recipe = recipe.model_copy(
        update={"rounds": (recipe.rounds[0], recipe.rounds[1].model_copy(update={"steps": 9}))}
    )
    with pytest.raises(DataError, match=str(image)):
        train(recipe, tmp_path / "run")
    assert "DataError" in events(tmp_path / "run", "stopped")[0]["reason"]
    assert (tmp_path / "run/round_0/evaluate.json").exists()
    image.write_bytes(content)
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run/summary.json").exists()


# --- numerics


def spoiled(kind: str, step_of: int = 1) -> Callable:
    """An objective whose loss (or only whose gradient) is not finite at a step."""

    def objective(network: Network, batches: Any, step: int) -> Any:
        loss, figures = still(network, batches, step)
        if step == step_of:
            weight = next(iter(network.parameters()))
            # √0 is finite, its slope is not.
            loss = loss * float("inf") if kind == "loss" else loss + (weight.sum() * 0).sqrt()
        return loss, figures

    return objective


@pytest.mark.parametrize(
    ("kind", "precision", "shown"),
    [("loss", "fp32", "loss inf"), ("gradient", "fp32", "norm nan"), ("gradient", "bf16", "norm nan")],
)
def test_what_is_not_finite_stops_before_weights_move(kind: str, precision: Any, shown: str) -> None:
    network, moved = build(DEEPLAB), []

    def on_step(report: StepReport) -> None:
        moved.append({name: value.clone() for name, value in network.named_parameters()})

    stage = Stage(steps=3, precision=precision)
    with pytest.raises(NumericsError) as caught:
        run_stage(method_of(network, spoiled(kind), 0.01), streams_of(1), stage, on_step=on_step)
    message = str(caught.value)
    assert "at step 1 of 3" in message and shown in message
    assert all(f"0/1/{index}" in message for index in range(6))
    assert "lower training.learning_rate" in message
    assert ("precision=fp32" in message) == (precision == "bf16")
    assert len(moved) == 1
    assert all(torch.equal(value, moved[0][name]) for name, value in network.named_parameters())


def test_fp16_passes_over_steps_beyond_its_range_and_stops_where_scaling_is_no_remedy() -> None:
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
    """The scale has fallen before the checkpoint; begun anew, steps would be passed over again."""

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
        found, held = again.parts[part], end.parts[part]
        assert found.keys() == held.keys() and all(torch.equal(found[key], held[key]) for key in held)
    assert again.scaling == end.scaling


def _sgd(real: Callable, wanted: bool | None, groups: Any, **given: Any) -> torch.optim.Optimizer:
    return real(groups, **given | {"fused": wanted})


def test_a_first_step_that_is_passed_over_leaves_no_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fused SGD, as on GPUs, would take memory as it finds it."""

    ends, real, empty = [], torch.optim.SGD, torch.empty_like
    # What it finds is seldom small.
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(1e30))
    stage = Stage(steps=4, precision="fp16")
    for fused in (None, True):
        monkeypatch.setattr(torch.optim, "SGD", partial(_sgd, real, fused))
        ends.append(run_stage(method_of(build(DEEPLAB), overflowing), streams_of(1), stage))
    for part in ("network", "optimizer"):
        plain, fused_ = (end.parts[part] for end in ends)
        assert plain.keys() == fused_.keys()
        for key in plain:
            torch.testing.assert_close(fused_[key], plain[key], rtol=1e-6, atol=1e-6)


def test_fp16_runs_and_its_journal_stays_json(path: Path, tmp_path: Path) -> None:
    changes = ["training.precision=fp16", "rounds=[{steps: 2}]"]
    train(load_recipe(path, changes), tmp_path / "run")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for line in (tmp_path / "run/journal.jsonl").open():
        json.loads(line, parse_constant=refuse)


def test_gradient_norm_and_waiting_are_told(finished: Path, path: Path, tmp_path: Path, call) -> None:
    for one in events(finished, "step"):
        assert one["gradient_norm"] > 0 and 0 <= one["waiting_for_data"] <= 1
    assert len(events(finished, "step")) == 4
    code, out, _ = call("train", path, "rounds=[{steps: 1}]", "--out", tmp_path / "run")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("round 0: train: 1/1"))
    assert "% waiting for data" in line and "loss" in line


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
    assert all(0.2 < share < 1 for share in shares)


# --- memory


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        (["training.batch=8"], r"training\.micro_batch=4 \(now 8 images at once\)", "micro_batch=2"),
        ([], r"training\.micro_batch=2 \(now 4 images", "micro_batch=4"),
        (["training.micro_batch=2"], r"with training\.precision=bf16", "micro_batch"),  # no less is possible
        (["training.batch=6", "training.half_batch=6", "training.micro_batch=6"], "micro_batch=3", "batch=2"),
        (
            ["training.precision=fp16"],
            r"training\.recompute=true \(less, for a third more time\) or tr",
            "bf16",
        ),
        (["training.recompute=true"], r"precision=bf16 \(about half\) or training\.crop", "recompute"),
        (["training.compile=true"], r"precision=bf16 \(about half\) or training\.crop", "recompute"),
        (
            ["training.micro_batch=2", "training.precision=fp16", "training.recompute=true"],
            r"with training\.crop=\[17, 33\] \(now",
            " or ",
        ),
    ],
)
def test_a_gpu_without_memory_names_what_to_change(
    changes: list[str], said: str, unsaid: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    monkeypatch.setattr(train_step, "run_stage", exhausted)
    with pytest.raises(MemoryLimit, match=said) as caught:
        train(load_recipe(path, changes), tmp_path / "run")
    message = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in message and "More words" not in message and unsaid not in message
    assert "training.crop=[17, 33] (now [49, 65]; about a quarter)" in message
    assert "--reuse" not in message  # each of these is an input of every training


def test_a_gpu_without_memory_where_recipes_can_do_no_more() -> None:
    assert remedies._smaller("training.crop", (17, 33), 16) == [
        "training.crop=[17, 17] (now [17, 33]; about a quarter)"
    ]
    assert remedies._smaller("training.crop", (17, 17), 16) == []
    assert remedies._either(["a", "b", "c"]) == "a, b or c"
    assert remedies._either([]) == "a smaller network.backbone"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("evaluate_samples", r"evaluation\.window=\[33, 33\] \(now \[65, 81\]"),
        ("label_samples", r"labeling\.window=\[33, 33\]"),
    ],
)
def test_a_gpu_without_memory_to_predict(
    name: str, said: str, recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for file in [run / "round_0/evaluate.json", *(run / "round_1").glob("*.json")]:
        if name == "label_samples" or "round_0" in str(file):
            file.unlink() if not (name == "label_samples" and "round_0" in str(file)) else None
    monkeypatch.setattr(evaluate_step if name == "evaluate_samples" else label_step, name, exhausted)
    with pytest.raises(MemoryLimit, match=said):
        train(recipe, run)


# --- processes


def test_sync_batchnorm_on_the_cpu_is_said(path: Path, tmp_path: Path) -> None:
    for wanted in ("true", "null"):
        changes = [f"training.sync_batchnorm={wanted}", "rounds=[{steps: 1}]"]
        train(load_recipe(path, changes), tmp_path / wanted)
        warned = [one["text"] for one in events(tmp_path / wanted, "warning")]
        assert any("PyTorch has SyncBatchNorm on GPUs alone" in text for text in warned) == (wanted == "true")


TWO = """
import json, sys
import torch
import torch.distributed as dist

import test_unkillable as tests
from darseg.config.text import load_recipe
from darseg.errors import NumericsError
from darseg.run.rounds import train
from darseg.run.steps import train as train_step
from darseg.training.processes import Processes

team = Processes.here()
torch.set_num_threads(1)
told = {}
for precision in ("fp32", "fp16"):
    told[precision] = tests.one_is_spoiled(team.rank, precision)
if team.first:
    json.dump(told, open("told.json", "w"))
else:
    json.dump(told, open("told_1.json", "w"))
recipe = load_recipe(sys.argv[1])
train(recipe, "one_then_two")
stream_batches = train_step.stream_batches


def stream(*arguments, **options):
    for step, batch in enumerate(stream_batches(*arguments, **options), options["start"]):
        if options["seed"][1:] == (0, 0) and step == 4:
            raise tests.Pulled
        yield batch


train_step.stream_batches = stream
try:
    train(recipe, "two_then_one")
except tests.Pulled:
    pass
"""


def one_is_spoiled(rank: int, precision: Any) -> str:
    """What a process is told where the loss of the second process alone is not finite."""

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
def test_another_number_of_processes_goes_on_and_says_what_that_means(
    tiny_data: Path, tmp_path: Path, at_step
) -> None:
    file = tmp_path / "eight.yaml"
    file.write_text(yaml.safe_dump(small(tiny_data, batch=8, half_batch=4)))
    (tmp_path / "two.py").write_text(TWO)
    at_step(0, 4, pull)
    with pytest.raises(Pulled):
        train(load_recipe(file), tmp_path / "one_then_two")
    ended = torchrun(2, "two.py", str(file), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for name in ("told", "told_1"):
        for message in json.loads((tmp_path / f"{name}.json").read_text()).values():
            assert "at step 1 of 4 (loss inf" in message and "images 0/1, 1/1)" in message
    train(load_recipe(file), tmp_path / "two_then_one")
    for name, change in (("one_then_two", "1 → 2"), ("two_then_one", "2 → 1")):
        run = tmp_path / name
        warned = [one["text"] for one in events(run, "warning")]
        assert any(f"processes {change}" in text for text in warned)
        assert any("equal in distribution, not in bits" in text for text in warned)
        assert len(events(run, "finished")) == 1
        assert [one["step"] for one in events(run, "checkpoint") if one["round"] == 0] == [2, 4]
        summary = json.loads((run / "summary.json").read_text())
        assert len(summary["rounds"]) == 2
        networks = load_checkpoint_tensors(run / "round_1/network.safetensors")
        assert all(torch.isfinite(value).all() for value in networks.values())


def load_checkpoint_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves_the_step_and_says_so_once(tiny_data: Path, tmp_path: Path) -> None:
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
    assert err.count("darseg: stopped after step") == 1, err
    assert "Interrupted" in events(run, "stopped")[0]["reason"]
    step = int(events(run, "stopped")[0]["reason"].split("after step ")[1].split()[0])
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

    def two(share: tuple[int, int]) -> list:
        stream = stream_batches(
            data.labeled,
            data.classes,
            how,
            batch_size=own * processes,
            seed=(seed, 0, 0),
            start=start,
            place=StreamPlace(*share, workers=1),
        )
        found = [next(stream) for _ in range(2)]
        stream.close()
        return found

    whole, parts = two((0, 1)), [two((rank, processes)) for rank in range(processes)]
    for step in range(2):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([one.images for one in shares]), whole[step].images)
        assert torch.equal(torch.cat([one.labels for one in shares]), whole[step].labels)
        assert sum((one.ids for one in shares), ()) == whole[step].ids
        assert all(len(one.ids) == own for one in shares)
