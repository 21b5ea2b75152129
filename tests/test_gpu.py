"""What only a GPU can show. `python3 -m pytest -m gpu tests/test_gpu.py`, with PYTHONPATH=src in a bare checkout.

Without a CUDA GPU all are skipped. With DARSEG_GPU_DRY=1 they run on the CPU as far as they can, so that this file is
itself tested: what a GPU computes is then compared with the CPU's own results.

float32 is float32 here: TF32, in which PyTorch lets convolutions on GPUs compute by default, is off.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

import test_methods
from conftest import REPOSITORY, recipe_dict, write_png
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import Batch, StreamPlace, stream_batches
from darseg.data.classes import IGNORE
from darseg.data.prediction import FINE, FINE_STEPS, FLOAT16
from darseg.demo.scenes import draw_scene
from darseg.errors import DataError, Interrupted, NumericsError
from darseg.init.fit import step_seconds
from darseg.methods.self_training import self_training, self_training_loss
from darseg.model import windows as sliding
from darseg.model.decide import decide
from darseg.model.image_classes import ImageClasses, ImageClassifier
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import predict, predict_for_labeling, scores_for_labeling
from darseg.model.recompute import recompute_blocks
from darseg.model.together import Picture, Together
from darseg.model.weights import save_network
from darseg.model.windows import Protocol
from darseg.pseudo.labeling import AlignSettings
from darseg.run import build as build_module
from darseg.run import rounds as rounds_module
from darseg.run.build import load_to_predict, manifest_of, pick_device, place
from darseg.run.directory import RunDirectory
from darseg.run.label import label_folder
from darseg.run.rounds import train
from darseg.run.steps import train as train_step
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.loss import LabeledLoss, cross_entropy
from darseg.training.method import Figures
from darseg.training.optimize import SGD, AdamW
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage, StepReport, run_stage, to_device
from test_methods import METHODS, everything, network_learner, tensors
from test_stage import CLASSES, DEEPLAB, PSPNET, SIDE, batch_at, build, method_of, still, streams_of

GPU = torch.cuda.is_available()
DRY = bool(os.environ.get("DARSEG_GPU_DRY"))
REASON = "no CUDA GPU here (DARSEG_GPU_DRY=1 runs on the CPU what can run there)"
QUIET = Console(quiet=True)
SECONDS = 100  # after which a command is killed
VIT = NetworkSpec("dpt", "timm/vit_small_patch14_dinov2", CLASSES, head_channels=32)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (GPU or DRY), reason=REASON)]
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU here")
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


def device() -> torch.device:
    """The GPU; the CPU in a dry run."""
    return pick_device()


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is off: for cuDNN by PyTorch's switch, for cuBLAS by default, and for both by NVIDIA's variable."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of test_methods' tests are on the device, as `place` puts them there."""
    monkeypatch.setattr(test_methods, "build", placed)


def placed(spec: NetworkSpec) -> Network:
    """A network of test_stage on the device."""
    return place(build(spec))


def flat(tensors_there: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> Tensor:
    """Floats of a state in one row, float64 on the CPU; less those of `start`."""
    return torch.cat(
        [
            (value.cpu().double() - (0 if start is None else start[name].cpu().double())).flatten()
            for name, value in tensors_there.items()
            if value.is_floating_point()
        ]
    )


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Euclidean, relative to the length of `theirs`."""
    return float((mine - theirs).norm() / theirs.norm())


def environment(**more: str) -> dict[str, str]:
    """For processes of their own: they find darseg and these tests wherever they run."""
    here = [str(REPOSITORY / "src"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(filter(None, here))
    loopback = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | loopback | more


def start(*command: object, cwd: Path, **more: str) -> subprocess.Popen:
    """A Python process of its own: one that is forked could not use the GPU after this one has."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment(**more),
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and all that it wrote."""
    try:
        out, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"did not end within {SECONDS} s:\n{out}") from None
    return process.returncode, out


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def two_rounds(data: Path, first: int, second: int) -> dict[str, Any]:
    """The tiny recipe with two rounds of so many steps."""
    values = recipe_dict(data)
    values["training"] |= {"checkpoint_every": 4, "half_batch": 4}
    values["rounds"] = [{"steps": first}, {"steps": second, "labeling_ratio": 0.5}]
    return values


def written(values: Mapping[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds in fp32; beside it its recipe, recipe.yaml."""
    folder = tmp_path_factory.mktemp("gpu")
    recipe = written(two_rounds(tiny_data, 60, 12), folder / "recipe.yaml")
    train(load_recipe(recipe), folder / "run", console=QUIET)
    return folder / "run"


def complete(run: Path, images: int = 6) -> None:
    """The files of a finished run of two rounds are there, and nothing that it needs only while it runs."""
    folder = RunDirectory(run)
    summary = json.loads(folder.summary.read_text())
    assert [round_["round"] for round_ in summary["rounds"]] == [0, 1]
    assert all(0 <= round_["mean_iou"] <= 1 for round_ in summary["rounds"])
    for index in (0, 1):
        state = load_to_predict(folder.network(index)).state_dict()
        assert all(bool(torch.isfinite(value).all()) for value in state.values())
        assert folder.optimizer(index).is_file() and folder.record_path(index, "evaluate").is_file()
    assert len(list(folder.labels(1).rglob("*.png"))) == images
    assert not list(run.glob("round_*/checkpoint_*")) and not list(run.rglob("*.part"))


# --- a stage


@pytest.mark.parametrize("name", METHODS)
@each_precision
def test_the_loss_is_finite_and_falls(name: str, precision: Any) -> None:
    """A teacher, a discriminator and counts too. The loss is of a batch that stays the same."""
    if not GPU and (precision, name) not in (("fp32", "everything"), ("bf16", "everything")):
        pytest.skip("takes long on a CPU, where test_methods.py runs them in fewer steps")
    reports: list[StepReport] = []
    method = METHODS[name](placed(DEEPLAB))
    stage = Stage(steps=24, schedule=Schedule("constant"), report_every=1, precision=precision)
    end = test_methods.run(method, stage, on_step=reports.append)
    losses = torch.stack([report.figures["loss"] for report in reports]).cpu()
    assert bool(torch.isfinite(losses).all())
    if name in ("self_training", "everything"):
        assert losses[-4:].mean() < 0.8 * losses[:4].mean()
    else:  # losses on labels that a network gives itself go up and down
        assert losses[12:].min() < 0.8 * losses[:4].max()
    assert {value.device for value in tensors(end).values()} == {device()}
    if precision == "fp16":
        skipped = sum(not math.isfinite(report.figures["gradient_norm"]) for report in reports)
        # Each of them halves the scale, and so does a discriminator's gradient beyond the range.
        assert 1 <= end.scaling["scale"] <= 2.0 ** (16 - skipped)


CONTRACT = {
    "checkpoint": test_methods.test_the_checkpoint_has_every_tensor_that_moves,
    "micro-batches": test_methods.test_micro_batches_add_up,
    "fp16": test_methods.test_with_fp16_all_learners_step_or_none,
    "optimizer": test_methods.test_a_stage_goes_on_with_the_optimizer_of_the_stage_before,
}
"""Promises of every method that are promised on GPUs as well."""


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("promise", CONTRACT)
def test_a_promise_of_every_method_is_kept(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    match promise:
        case "checkpoint":
            CONTRACT[promise]("everything", monkeypatch)
        case "micro-batches":
            CONTRACT[promise]("everything", 3)
        case _:
            CONTRACT[promise]()


def overflowing(network: Network, batches: Sequence[Batch], step: int) -> Any:
    """A loss whose scaled gradient is infinite in the first two steps."""
    loss, figures = self_training_loss(network, batches, 0.4, 1.0)
    return loss * (1e35 if step < 2 else 1.0), figures


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()], ids=["sgd", "adamw"])
def test_fp16s_first_steps_are_skipped_and_counted(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused SGD makes its momentum in its first step, which is skipped: it must not keep what was in that memory."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(1e30))
    network = placed(DEEPLAB)
    before = {name: value.clone() for name, value in network.named_parameters()}
    reports: list[StepReport] = []
    stage = Stage(steps=2, precision="fp16", report_every=1)
    method = method_of(network, overflowing, 0.01, optimizer=optimizer)
    end = run_stage(method, streams_of(1), stage, on_step=reports.append)
    assert not any(math.isfinite(report.figures["gradient_norm"]) for report in reports)
    assert end.scaling["scale"] == 2.0**14
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name]), name
    assert all(bool((value == 0).all()) for value in end.parts["optimizer"].values())
    end = copy.deepcopy(end)
    last = run_stage(method, streams_of(1), replace(stage, steps=8), begin=end, on_step=reports.append)
    assert any(math.isfinite(report.figures["gradient_norm"]) for report in reports)
    assert 0 < flat(last.parts["optimizer"]).abs().max() < 1e10
    assert 0 < flat(dict(network.named_parameters()), before).abs().max() < 10


# --- the CPU and the GPU


def loss_and_gradient(network: Network, precision: torch.dtype) -> tuple[float, Tensor]:
    """Of one step with fixed statistics and without dropout, in the network's precision."""
    network.train()
    where = network.mean.device
    with torch.autocast(where.type, precision, enabled=precision != torch.float32):
        loss, _ = still(network, [to_device(batch_at(0, stream), where) for stream in (0, 1)], 0)
    loss.backward()
    named = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    return float(loss.detach()), flat(named)


@pytest.mark.parametrize(
    ("precision", "loss_within", "gradient_within"),
    [(torch.float32, 1e-5, 5e-3), (torch.bfloat16, 2e-2, 0.5)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("spec", [PSPNET, DEEPLAB], ids=["pspnet", "deeplabv2"])
def test_a_step_is_that_of_the_cpu(
    spec: NetworkSpec, precision: torch.dtype, loss_within: float, gradient_within: float
) -> None:
    """Against float32 on the CPU. bfloat16 rounds to 8 bits in every layer (on the CPU too: 0.2 and 0.3); float32
    differs by the order of sums."""
    wanted, direction = loss_and_gradient(build(spec), torch.float32)
    loss, gradient = loss_and_gradient(placed(spec), precision)
    assert loss == pytest.approx(wanted, rel=loss_within)
    assert distance(gradient, direction) < gradient_within
    assert float(gradient.norm()) == pytest.approx(float(direction.norm()), rel=0.1)


def test_losses_of_weighted_classes_and_hard_pixels_are_those_of_the_cpu() -> None:
    batch = batch_at(0, 0)
    logits = torch.randn(len(batch.ids), CLASSES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    weighted = replace(batch, weights=torch.rand(batch.labels.shape))
    for how in (
        None,
        LabeledLoss(class_weights=(1.0, 2.0, 0.5)),
        LabeledLoss(hard_below=0.5, least=3),
        LabeledLoss(hard_below=0.7, class_weights=(3.0, 1.0, 0.1)),
    ):
        for each in (batch, weighted):
            wanted = float(cross_entropy(logits, each, how))
            found = float(cross_entropy(logits.to(device()), to_device(each, device()), how))
            assert found == pytest.approx(wanted, rel=1e-5), how


@pytest.mark.parametrize("scale", [FLOAT16, FINE], ids=["float16", "fine"])
@pytest.mark.parametrize("weights", [None, np.array([0.5, 2.0, 1.0, 1.0, 3.0])], ids=["plain", "weighted"])
def test_decisions_are_those_of_the_cpu(scale: Any, weights: Any) -> None:
    """The same scores: classes differ only where two are equal up to rounding, codes by rounding."""
    scores = torch.randn(5, 70, 90, generator=torch.Generator().manual_seed(2)) * 4
    wanted = decide(scores.clone(), scale, weights=weights)
    found = decide(scores.to(device()), scale, weights=weights)
    assert np.mean(found.classes != wanted.classes) < 1e-3
    steps = np.abs(found.codes.astype(int) - wanted.codes.astype(int))
    assert steps.max() <= (2 if scale is FLOAT16 else 8)
    scores[2, 5, 7] = torch.nan
    with pytest.raises(DataError, match=r"spoiled\.png"):
        decide(scores.to(device()), scale, name="spoiled.png", weights=weights)


# --- the watch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [SGD(), AdamW()], ids=["sgd", "adamw"])
def test_a_loss_that_is_not_finite_is_found_and_moves_nothing(precision: Any, optimizer: Any) -> None:
    network, kept = placed(DEEPLAB), []
    saved: list[int] = []

    def spoiled(forward: Any, batches: Sequence[Batch], step: int) -> Any:
        loss, figures = still(forward, batches, step)
        return (loss * float("nan") if step == 3 else loss), figures

    def on_step(report: StepReport) -> None:
        if report.step == 2:
            kept.append({name: value.clone() for name, value in network.named_parameters()})

    stage = Stage(steps=40, precision=precision, checkpoint_every=8)
    method = method_of(network, spoiled, 0.01, optimizer=optimizer)
    with pytest.raises(NumericsError, match=r"at step 3 of 40 \(loss nan.*images 0/3/0"):
        run_stage(
            method, streams_of(1), stage, on_step=on_step, on_checkpoint=lambda end: saved.append(end.step)
        )
    assert saved == []  # the error comes before the first checkpoint
    for name, value in network.named_parameters():
        assert torch.equal(value, kept[0][name]), name


def waiting_is_an_error(switch: bool) -> None:
    """Let PyTorch raise an error where the host waits for the GPU."""
    if GPU:
        torch.cuda.set_sync_debug_mode("error" if switch else "default")


def steps_without_waiting(network: Network, spec: NetworkSpec, side: int, **how: Any) -> None:
    """Ten steps; in eight of them the host does not wait for the GPU."""
    labeled_loss = how.pop("labeled_loss", None)
    method = self_training(
        network_learner(network, how.pop("optimizer", SGD())),
        batch=4,
        pseudo_batch=4,
        auxiliary_weight=0.4 if spec.auxiliary else 0.0,
        labeled_loss=labeled_loss,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (4, side, side), dtype=torch.uint8, generator=generator)
    labels[:, :2] = IGNORE
    reports: list[int] = []

    def stream(number: int) -> Iterator[Batch]:
        while True:
            yield Batch(images.clone(), labels.clone(), ("a", "b", "c", "d"))

    def on_step(report: StepReport) -> None:
        reports.append(report.step)
        waiting_is_an_error(report.step < 8)

    try:
        stage = Stage(steps=10, report_every=1000, **how)
        run_stage(method, lambda first: [stream(0), stream(1)], stage, on_step=on_step)
    finally:
        waiting_is_an_error(False)
    assert reports == list(range(10))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"precision": "fp16"},
        {"precision": "bf16", "optimizer": AdamW()},
        {"clip": 0.1, "micro_batch": 2},
        {"labeled_loss": LabeledLoss(class_weights=(1.0, 2.0, 0.5))},
        {"labeled_loss": LabeledLoss(hard_below=0.7, least=5)},
        {"labeled_loss": LabeledLoss(hard_below=0.7)},
    ],
    ids=["fp32", "fp16", "bf16-adamw", "clip", "class-weights", "hard", "hard-without-least"],
)
def test_no_step_lets_the_host_wait(how: dict[str, Any]) -> None:
    steps_without_waiting(placed(PSPNET), PSPNET, SIDE, **dict(how))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"everything"}))  # which asks for a number itself
def test_no_step_of_a_method_lets_the_host_wait(name: str) -> None:
    reports: list[int] = []

    def on_step(report: StepReport) -> None:
        reports.append(report.step)
        waiting_is_an_error(report.step < 8)

    try:
        test_methods.run(METHODS[name](placed(DEEPLAB)), Stage(steps=10, report_every=1000), on_step=on_step)
    finally:
        waiting_is_an_error(False)
    assert reports == list(range(10))


def test_a_wait_would_be_seen() -> None:
    """In a loss that asks for a number."""
    if not GPU:
        pytest.skip("the CPU has nothing to wait for")
    try:
        waiting_is_an_error(True)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(torch.ones(3, device=device()).sum())
    finally:
        waiting_is_an_error(False)


# --- several processes

ALONE_AS_SEVERAL = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as exchange

from darseg.training.processes import Processes, disconnect
from darseg.training.stage import Stage
from test_gpu import distance, flat, placed
from test_methods import METHODS, run, tensors
from test_stage import DEEPLAB, PSPNET

GPU = torch.cuda.is_available()
torch.backends.cudnn.allow_tf32 = False


class Several(int):
    '''The number 1, which says that it is more: the one process exchanges with itself all that several would.'''

    def __eq__(self, number):
        return number != 1 and int.__eq__(self, number)

    def __gt__(self, number):
        return number == 1 or int.__gt__(self, number)

    __hash__ = int.__hash__




def state(end):
    return flat({name: value for name, value in tensors(end).items() if not name.startswith("optimizer")})


# DistributedDataParallel wants every parameter used, and not every method uses PSPNet's auxiliary head.
SPECS = {name: PSPNET if name == "self_training" else DEEPLAB for name in METHODS}
# A loss that is no sum over images is refused on several processes.
EXACT = {name: make for name, make in METHODS.items() if make(placed(SPECS[name])).exact}
assert len(EXACT) > len(METHODS) / 2
plain = {name: state(run(make(placed(SPECS[name])))) for name, make in EXACT.items()}
backend = "cpu:gloo,cuda:nccl" if GPU else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
together = Processes(0, Several(1))
assert together.count > 1 and not together.count == 1
Processes.joined = classmethod(lambda cls: together)
for name, make in EXACT.items():
    network = placed(SPECS[name])
    if GPU:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    end = state(run(make(network)))
    first = state(run(make(placed(SPECS[name])), Stage(steps=0)))
    assert distance(end - first, plain[name] - first) < 0.02, name
together.wait()
assert together.any(True, False) == (True, False) and together.gather(["b", "a"]) == ["a", "b"]
if GPU:
    # PyTorch's SyncBatchNorm is plain BatchNorm in a group of one; so its exchange is called here.
    x = torch.randn(4, 6, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.rand(6, device="cuda", requires_grad=True) for _ in range(2))
    statistics = [[torch.zeros(6, device="cuda"), torch.ones(6, device="cuda")] for _ in range(2)]
    ours = exchange.apply(x, weight, bias, *statistics[0], 1e-5, 0.1, dist.group.WORLD, 1)
    theirs = F.batch_norm(x, *statistics[1], weight, bias, True, 0.1, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, yours in zip(*statistics):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-5)
    for mine, yours in zip(*(torch.autograd.grad((y * y).sum(), [x, weight, bias]) for y in (ours, theirs))):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-3)
disconnect()
print("all is equal")
"""


def test_through_nccl_a_step_is_the_same(tmp_path: Path) -> None:
    """Gradients, counts, figures and statistics go through NCCL (gloo in a dry run), as between several GPUs."""
    code, out = finish(start("-c", ALONE_AS_SEVERAL, cwd=tmp_path))
    assert code == 0 and out.endswith("all is equal\n"), out


TRAIN_THROUGH_GLOO = """
import sys
import torch.distributed as dist

dist.init_process_group("gloo")  # NCCL refuses two processes on one GPU
from darseg.cli import main
from darseg.training.processes import disconnect

sys.argv = ["darseg", "train", *sys.argv[1:]]
try:
    main()
finally:
    disconnect()
"""


@pytest.mark.slow
def test_two_processes_share_a_run(tiny_data: Path, tmp_path: Path) -> None:
    """Both on this GPU. SyncBatchNorm is on, as PSPNet has it on GPUs."""
    values = two_rounds(tiny_data, 4, 3)
    recipe = written(values, tmp_path / "recipe.yaml")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    processes = [
        start(
            *("-c", TRAIN_THROUGH_GLOO, recipe, "--out", tmp_path / "run"),
            cwd=tmp_path,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE="2",
            **meeting,
        )
        for rank in (0, 1)
    ]
    ends = [finish(process) for process in processes]
    assert [code for code, _ in ends] == [0, 0], "\n".join(out for _, out in ends)
    complete(tmp_path / "run")


def test_torchrun_with_one_process(tiny_data: Path, tmp_path: Path) -> None:
    recipe = written(two_rounds(tiny_data, 2, 2), tmp_path / "recipe.yaml")
    launch = ("-m", "torch.distributed.run", "--master-port", free_port(), "--nproc-per-node", "1")
    command = ("-m", "darseg", "train", recipe, "--out", tmp_path / "run")
    code, out = finish(start(*launch, *command, cwd=tmp_path))
    assert code == 0, out
    complete(tmp_path / "run")


# --- data


def test_batches_come_in_pinned_memory_and_are_the_same(tiny_data: Path, tmp_path: Path) -> None:
    manifest = manifest_of(load_recipe(written(recipe_dict(tiny_data), tmp_path / "recipe.yaml")))
    streams = [
        stream_batches(
            manifest.labeled,
            manifest.classes,
            Augmentation(crop=(49, 65), fill=(0, 0, 0)),
            batch_size=4,
            seed=(1,),
            place=StreamPlace(pin=pin),
        )
        for pin in (GPU, False)
    ]
    for _ in range(5):
        pinned, plain = (next(stream) for stream in streams)
        assert pinned.images.is_pinned() == pinned.labels.is_pinned() == GPU
        moved, also = to_device(pinned, device()), to_device(plain, device())
        for batch in (moved, also):
            assert torch.equal(batch.images.cpu(), plain.images)
            assert torch.equal(batch.labels.cpu(), plain.labels)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.images.device == device() and batch.ids == plain.ids
        if GPU:  # what is pinned already is not copied on the host
            assert pinned.images.pin_memory().data_ptr() == pinned.images.data_ptr()
    for stream in streams:
        stream.close()  # ty: ignore[unresolved-attribute]


# --- runs


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_low_precision(precision: str, tiny_data: Path, tmp_path: Path, call: Callable) -> None:
    steps = (30, 6) if GPU else (2, 1)
    recipe = written(two_rounds(tiny_data, *steps), tmp_path / "recipe.yaml")
    code, _, err = call("train", recipe, "--out", tmp_path / "run", f"training.precision={precision}")
    assert code == 0, err
    complete(tmp_path / "run")
    losses = [event["loss"] for event in events(tmp_path / "run", "step") if event["round"] == 0]
    assert all(map(math.isfinite, losses)) and (not GPU or losses[-1] < losses[0])


def test_a_run_in_fp32(finished: Path) -> None:
    complete(finished)
    losses = [event["loss"] for event in events(finished, "step") if event["round"] == 0]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    if GPU:
        assert torch.cuda.get_device_name() in (finished / "environment.json").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path

from darseg.cli import main

run, replace = Path(sys.argv[2]), os.replace


def change(aside, path):
    replace(aside, path)
    if list(run.glob("round_1/checkpoint_*.safetensors")):
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = change
sys.argv = ["darseg", "train", sys.argv[1], "--out", str(run)]
main()
"""


def test_killed_and_resumed_it_finishes(tiny_data: Path, tmp_path: Path) -> None:
    """On a GPU equal bytes are not promised: its sums have no fixed order."""
    recipe = written(two_rounds(tiny_data, 3, 8), tmp_path / "recipe.yaml")
    code, out = finish(start("-c", KILLED, recipe, tmp_path / "run", cwd=tmp_path))
    assert code == -signal.SIGKILL, out
    [left] = RunDirectory(tmp_path / "run").checkpoints(1)
    state = load_checkpoint(left)
    assert state.step == 4 and all(bool(torch.isfinite(value).all()) for value in tensors(state).values())
    network = (tmp_path / "run" / "round_0" / "network.safetensors").read_bytes()
    train(load_recipe(recipe), tmp_path / "run", console=QUIET)
    complete(tmp_path / "run")
    assert (tmp_path / "run" / "round_0" / "network.safetensors").read_bytes() == network
    steps = [event["step"] for event in events(tmp_path / "run", "step") if event["round"] == 1]
    assert steps[-1] == 7 and steps == sorted(steps)


def test_stopped_and_resumed_it_finishes(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(written(two_rounds(tiny_data, 9, 2), tmp_path / "recipe.yaml"))
    real = train_step.save_checkpoint

    def save(checkpoint: Checkpoint, path: Path) -> None:
        real(checkpoint, path)
        if checkpoint.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_step, "save_checkpoint", save)
    with pytest.raises(Interrupted, match="step 5 of 9"):
        train(recipe, tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    assert load_checkpoint(RunDirectory(tmp_path / "run").checkpoints(0)[0]).step == 5
    train(recipe, tmp_path / "run", console=QUIET)
    complete(tmp_path / "run")


@each_precision
def test_a_state_is_saved_and_restored_bit_by_bit(precision: Any, tmp_path: Path) -> None:
    """Teacher, discriminator, counts, both optimizers, fp16's scaling; from there on the steps are the same ones."""
    if not GPU and precision == "fp16":
        pytest.skip("takes long on a CPU")
    stage = Stage(steps=6, precision=precision, checkpoint_every=3)
    method = everything(placed(DEEPLAB), AdamW())
    whole: list[float] = []

    def save(checkpoint: Checkpoint) -> None:
        save_checkpoint(checkpoint, tmp_path / "three")

    test_methods.run(
        method, stage, on_checkpoint=save, on_step=lambda report: whole.append(float(report.figures["loss"]))
    )
    assert {value.device for value in method.state.state_dict().values()} == {device()}
    again = everything(placed(DEEPLAB), AdamW())
    begin = load_checkpoint(tmp_path / "three")
    # No step is left to make: the state is that of the file.
    end = test_methods.run(again, replace(stage, steps=3), begin=begin)
    save_checkpoint(end, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "three").read_bytes()
    assert {value.device for value in tensors(end).values()} == {device()}
    assert int(again.state.steps) == 3
    later: list[float] = []
    test_methods.run(
        again, stage, begin=begin, on_step=lambda report: later.append(float(report.figures["loss"]))
    )
    assert later == pytest.approx(whole[3:], rel=0.05)


# --- labels, predictions, export


@contextlib.contextmanager
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks are loaded onto the CPU inside."""
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "pick_device", lambda: torch.device("cpu"))
        yield


def test_predictions_are_those_of_the_cpu(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 1 pixel in 1000 has another class; log-odds of the others differ by less than 0.02."""
    path, images = RunDirectory(finished).network(1), [draw_scene(7, 90 + k, (65, 97))[0] for k in range(6)]
    network = load_to_predict(path)
    with on_the_cpu(monkeypatch):
        plain = load_to_predict(path)
    assert network.mean.device == device() and plain.mean.device.type == "cpu"
    protocols = (Protocol((65, 81)), Protocol((49, 65), mirror=False, scales=(0.75, 1.25)))
    for protocol in protocols:
        pairs = [
            [predict_for_labeling(each, image, protocol, scale=FINE) for each in (network, plain)]
            for image in images
        ]
        pairs += [[predict(each, image, protocol) for each in (network, plain)] for image in images]
        found, wanted = (np.stack([pair[k].classes for pair in pairs]) for k in (0, 1))
        same = found == wanted
        assert np.mean(~same) < 1e-3 and len(np.unique(wanted)) > 1
        codes, others = (np.stack([pair[k].codes for pair in pairs]).astype(int)[same] for k in (0, 1))
        assert np.abs(codes - others).max() < 0.02 * FINE_STEPS
    scores, others = (scores_for_labeling(each, images[0], protocols[0]) for each in (network, plain))
    np.testing.assert_allclose(scores.astype(float), others.astype(float), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_images_share_passes_and_nothing_waits_for_the_gpu(
    average: Any, bf16: bool, finished: Path, tmp_path: Path
) -> None:
    """Decisions are those of one image at a time but for rounding; a group made again has the same bytes."""
    network, protocol = load_to_predict(RunDirectory(finished).network(1)), Protocol((65, 97), bf16=bf16)
    sizes = [(65, 97), (60, 90), (65, 97), (130, 194), (1, 5), (65, 130)] * 9
    scenes = [draw_scene(7, index, (130, 194))[0] for index in range(len(sizes))]
    images = [scene[:height, :width] for scene, (height, width) in zip(scenes, sizes, strict=True)]
    records = None if average == "logits" else [None]
    together = Together(network, protocol, average=average, scale=FINE, records=records)
    assert together.images == (64 if GPU else 1)

    def predicted() -> dict[int, Any]:
        pictures = [(index, Picture.of(image, str(index), device())) for index, image in enumerate(images)]
        try:
            waiting_is_an_error(True)
            finishes = list(together.predict_each(iter(pictures)))
        finally:
            waiting_is_an_error(False)
        return {index: finish() for index, finish in finishes}

    predicted()  # what is made once, such as memory
    first, again = predicted(), predicted()
    differing = codes = 0
    for index, image in enumerate(images):
        assert first[index].to_bytes() == again[index].to_bytes()
        if average == "logits":
            alone = predict_for_labeling(network, image, protocol, scale=FINE)
        else:
            alone = predict(network, image, protocol)
        same = first[index].classes == alone.classes
        differing += int((~same).sum())
        pair = (first[index].codes.astype(int)[same], alone.codes.astype(int)[same])
        codes = max(codes, int(np.abs(pair[0] - pair[1]).max(initial=0)))
    pixels = sum(height * width for height, width in sizes)
    assert differing < (1e-2 if bf16 else 1e-3) * pixels and codes < (0.5 if bf16 else 0.02) * FINE_STEPS


@pytest.mark.parametrize("align", [False, True], ids=["plain", "aligned"])
def test_labels_are_those_of_the_cpu(
    align: bool, finished: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than 1 pixel in 100 has another label, thresholds and class weights agree to 1 %, counts are exact."""
    images, maps, records = tiny_data / "images" / "u", [], []
    # Shares within reach: the roots of those that this network, which has hardly learned, predicts.
    options = {"labeling_ratio": 0.5, "console": QUIET}
    predicted = label_folder(finished, images, tmp_path / "before", align=False, **options)["predicted"]
    counts_file = tmp_path / "counts.json"
    counts_file.write_text(json.dumps([round(1000 * math.sqrt(count)) for count in predicted]))
    for name in ("device", "cpu"):
        with on_the_cpu(monkeypatch) if name == "cpu" else contextlib.nullcontext():
            record = label_folder(
                finished,
                images,
                tmp_path / name,
                confidence="fine",
                sampling="none",
                align=align and AlignSettings(bound=20.0),
                class_counts=counts_file,
                **options,
            )
        files = sorted((tmp_path / name).rglob("*.png"))
        assert len(files) == 6
        maps.append(np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in files]))
        records.append(record)
        with np.load(tmp_path / name / "histogram.npz") as histogram:
            counts = max((histogram[key] for key in histogram.files), key=lambda part: part.size)
            assert counts.sum() == maps[-1].size
        assert sum(record["predicted"]) == maps[-1].size
    assert np.mean(maps[0] != maps[1]) < 0.01 and len(np.unique(maps[1])) > 2
    found, wanted = (np.array(record["threshold"], float) for record in records)
    np.testing.assert_allclose(found, wanted, rtol=0.01)
    if align:
        found, wanted = (record["alignment"] for record in records)
        assert wanted["converged"] and found["reachable"] == wanted["reachable"]
        np.testing.assert_allclose(found["weights"], wanted["weights"], rtol=0.02)
        assert max(abs(math.log(weight)) for weight in wanted["weights"]) > 0.05


def test_a_round_with_aligned_decisions(tiny_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        written(two_rounds(tiny_data, 12, 2), tmp_path / "recipe.yaml"), ["labeling.align=decisions"]
    )
    train(recipe, tmp_path / "run", console=QUIET)
    complete(tmp_path / "run")
    assert "alignment" in json.loads((tmp_path / "run" / "round_1" / "thresholds.json").read_text())


def test_predict_evaluate_and_export(
    finished: Path, tiny_data: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call("predict", finished, tiny_data / "images" / "v", tmp_path / "predicted")
    assert code == 0, out + err
    assert len(list((tmp_path / "predicted" / "index").rglob("*.png"))) == 3
    scores = []
    for name in ("device", "cpu"):
        with on_the_cpu(monkeypatch) if name == "cpu" else contextlib.nullcontext():
            code, out, err = call("evaluate", finished, "--out", tmp_path / f"{name}.json")
        assert code == 0, out + err
        scores.append(json.loads((tmp_path / f"{name}.json").read_text())["mean_iou"])
    assert scores[0] == pytest.approx(scores[1], abs=0.005)
    recorded = json.loads((finished / "summary.json").read_text())["rounds"][-1]["mean_iou"]
    assert scores[0] == pytest.approx(recorded, abs=0.01)


@pytest.mark.slow
def test_an_exported_network_gives_the_classes_of_the_gpu(
    finished: Path, tmp_path: Path, call: Callable
) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    import onnxruntime

    code, out, err = call("export", finished, tmp_path / "network.onnx")
    assert code == 0, out + err
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    image = draw_scene(7, 99, (65, 97))[0]
    classes, *_ = session.run(None, {session.get_inputs()[0].name: image[None]})
    network = load_to_predict(RunDirectory(finished).network(1))
    wanted = predict(network, image, Protocol((65, 97), mirror=False)).classes
    assert np.mean(classes[0] == wanted) > 0.999


def test_a_classifier_of_images_is_exported_with_its_network(tmp_path: Path, call: Callable) -> None:
    """On the GPU it does not move with the network."""
    spec = replace(PSPNET, class_names=tuple(f"class_{k}" for k in range(CLASSES)))
    network = build(spec).eval()
    network.image_classes = ImageClasses(ImageClassifier("resnet18_half", CLASSES), 32, 0.5)
    source = tmp_path / "network.safetensors"
    save_network(network, source, spec)
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), draw_scene(7, 99, (65, 97))[0])
    code, out, err = call("export", source, tmp_path / "network.pt2", "--images", image)
    assert code == 0, out + err


# --- memory


@contextlib.contextmanager
def little_memory(mebibytes: int, monkeypatch: pytest.MonkeyPatch, *used: tuple[Any, str]) -> Iterator[None]:
    """PyTorch may take so much of the GPU inside. In a dry run, what would use it says that it cannot.

    Args:
        used: objects and their attributes that a dry run replaces.
    """

    def exhausted(*arguments: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    gc.collect()
    with monkeypatch.context() as patch:
        if GPU:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device()).total_memory
            torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / total, device())
        else:
            for owner, name in used:
                patch.setattr(owner, name, exhausted)
        try:
            yield
        finally:
            if GPU:
                torch.cuda.set_per_process_memory_fraction(1.0, device())
                torch.cuda.empty_cache()


def test_training_that_does_not_fit(
    tiny_data: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen crops of 705 keep over 2 GB."""
    values = two_rounds(tiny_data, 3, 1)
    values["training"] |= {"crop": [705, 705], "batch": 16, "half_batch": 16}
    recipe = written(values, tmp_path / "recipe.yaml")
    with little_memory(512, monkeypatch, (train_step, "run_stage")):
        code, _, err = call("train", recipe, "--out", tmp_path / "run")
    assert code == 2 and "Traceback" not in err, err
    for fact in (
        "The GPU has too little memory",
        "training.micro_batch=8",
        "training.precision=bf16",
        "--out",
    ):
        assert fact in err, err


def test_a_network_that_does_not_fit_loses_nothing(
    finished: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "round_1")
    network = (run / "round_0" / "network.safetensors").read_bytes()
    command = ("train", finished.parent / "recipe.yaml", "--out", run)
    with little_memory(1, monkeypatch, (rounds_module, "place")):
        code, _, err = call(*command)
    assert code == 2 and "The GPU has too little memory" in err and "Close other programs" in err, err
    code, _, err = call(*command)
    assert code == 0, err
    complete(run)
    assert (run / "round_0" / "network.safetensors").read_bytes() == network


def test_labeling_and_evaluation_that_do_not_fit(
    finished: Path, tiny_data: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 1025 and its mirror image take over 150 MB."""
    values = two_rounds(tiny_data, 60, 12)
    values["labeling"] = {"window": [1025, 1025]}
    recipe = written(values, tmp_path / "wide.yaml")
    network, images = RunDirectory(finished).network(1), tiny_data / "images" / "u"
    commands = {
        "evaluation.window=[513, 513]": ("evaluate", network, "--recipe", recipe),
        "labeling.window=[513, 513]": ("label", network, images, tmp_path / "labels", "--recipe", recipe),
    }
    for advice, command in commands.items():
        with little_memory(96, monkeypatch, (sliding, "_slide")):
            code, _, err = call(*command)
        assert code == 2 and "The GPU has too little memory" in err and advice in err, err


def test_a_picture_that_does_not_fit_is_named_and_the_others_are_predicted(
    finished: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:
        pytest.skip("test_rehearse.py has this for the CPU")
    write_png(tmp_path / "in" / "huge.png", np.zeros((3000, 3000, 3), np.uint8))
    write_png(tmp_path / "in" / "small.png", np.zeros((65, 97, 3), np.uint8))
    network = RunDirectory(finished).network(1)
    with little_memory(192, monkeypatch):
        code, out, err = call("predict", network, tmp_path / "in", tmp_path / "out")
    assert code == 2 and "huge.png" in err and "The GPU has too little memory" in err, out + err
    assert [path.name for path in (tmp_path / "out" / "index").rglob("*.png")] == ["small.png"]


# --- transformers


def vit(recompute: bool) -> Network:
    torch.manual_seed(0)
    network = place(VIT.build())
    if recompute:
        recompute_blocks(network)
    return network


def test_a_transformer_trains_with_fused_attention_and_recomputes() -> None:
    """The first loss is the same; the memory of a step is less."""
    pytest.importorskip("timm")
    losses, memory = [], []
    for recompute in (False, True):
        network = vit(recompute)
        assert all(block.attn.fused_attn for block in network.backbone.body.blocks)
        reports: list[float] = []
        kernels: contextlib.AbstractContextManager = contextlib.nullcontext()
        if GPU:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            from torch.nn.attention import SDPBackend, sdpa_kernel

            # Without the kernel that keeps all attention: a call that needs it fails.
            kernels = sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
            )

        def objective(forward: Any, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
            return self_training_loss(forward, batches, 0.0)

        side, images = (14 * 12, 8) if GPU else (14 * 3, 2)

        def stream(side: int = side, images: int = images) -> Iterator[Batch]:
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
            while True:
                yield Batch(pixels, (pixels[:, 0] > 128).to(torch.uint8), tuple(map(str, range(images))))

        method = method_of(network, objective, 1e-4, optimizer=AdamW())  # ty: ignore[invalid-argument-type]
        with kernels:
            run_stage(
                method,
                lambda first: [stream()],
                Stage(steps=3, precision="bf16"),
                on_step=lambda report, reports=reports: reports.append(float(report.figures["loss"])),
            )
        assert len(reports) == 3 and all(map(math.isfinite, reports))
        losses.append(reports)
        memory.append(torch.cuda.max_memory_allocated() if GPU else 0)
        del network, method
        gc.collect()
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert not GPU or memory[1] < 0.8 * memory[0]


@needs_gpu
def test_no_step_of_a_transformer_lets_the_host_wait() -> None:
    pytest.importorskip("timm")
    steps_without_waiting(vit(False), VIT, 14 * 6, precision="bf16", optimizer=AdamW())
    steps_without_waiting(vit(True), VIT, 14 * 6, precision="bf16", optimizer=AdamW())


def test_a_transformers_positions_are_those_of_the_cpu() -> None:
    """DINOv2's positions are resized on the CPU, and moved."""
    pytest.importorskip("timm")
    image = draw_scene(7, 3, (14 * 5, 14 * 6))[0]
    plain = VIT.build().eval()
    moved = copy.deepcopy(plain).to(device()).eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        wanted, found = plain(pixels).main, moved(pixels.to(device())).main.cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


# --- init, and what compiles


def test_init_measures_a_step() -> None:
    assert 0 < step_seconds(PSPNET, 4, (33, 33)) < 60


@needs_gpu
def test_init_proposes_for_the_gpu(tiny_data: Path, tmp_path: Path, call: Callable) -> None:
    code, out, err = call("init", tiny_data, "--out", tmp_path / "drafted.yaml")
    if code == 0:
        assert load_recipe(tmp_path / "drafted.yaml").training.precision == "bf16"
    assert "Traceback" not in err, out + err


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes most of a minute; `-m "gpu and not slow"` leaves it out. A dry run traces the network only."""
    if GPU and not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler here, and torch.compile needs one")
    if not GPU:
        whole = torch.compile
        monkeypatch.setattr(torch, "compile", lambda module: whole(module, backend="aot_eager"))
    networks = []
    first = placed(DEEPLAB).state_dict()
    for compiled in (True, False):
        network = placed(DEEPLAB)
        run_stage(method_of(network, still, 1e-3), streams_of(1), Stage(steps=3, compile=compiled))
        networks.append(network)
    moves = [flat(network.state_dict(), first) for network in networks]
    assert moves[1].norm() > 0 and distance(moves[0], moves[1]) < 0.02
    image = to_device(batch_at(7, 0), device()).images
    with torch.inference_mode():
        found, wanted = (network.eval()(image).main for network in networks)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
