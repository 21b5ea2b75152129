"""The contract that every method keeps, whatever happens in its steps: one entry a method.

`everything` is no method for users: it uses all that the loop offers – views, a teacher, weights, a second learner –,
so that the loop's promises are tested before methods need them.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import REPOSITORY
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.errors import NumericsError, RunError
from darseg.methods.self_training import self_training
from darseg.model.network import Network
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.loss import cross_entropy
from darseg.training.method import Feed, Figures, Learner, Method, Streamed
from darseg.training.optimize import SGD, Adam, AdamW, OptimizerKind, build_optimizer, faster_heads
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage, StepReport, run_stage
from test_processes import torchrun
from test_stage import CLASSES, DEEPLAB, PSPNET, SIDE, build, streams_of
from wording import refused

torch.set_num_threads(1)

IMAGES, STEPS = 8, 5


def images(stream: int) -> tuple[Tensor, Tensor]:
    """Eight images, uint8 [8, 3, H, W], whose brightness tells the class, and labels uint8 [8, H, W]."""
    generator = torch.Generator().manual_seed(stream)
    labels = (torch.arange(IMAGES) % CLASSES)[:, None, None].expand(IMAGES, SIDE, SIDE)
    noise = torch.randint(0, 60, (IMAGES, 3, SIDE, SIDE), generator=generator)
    return (labels[:, None] * 90 + noise).to(torch.uint8), labels.to(torch.uint8).contiguous()


def stream_of(feed: Feed, number: int, first: int, share: tuple[int, int]) -> Iterator[Streamed]:
    """The same images at every step, with other pixels unlabeled or outside; this process's share of them."""
    rank, processes = share
    pixels, labels = images(number)
    own = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    step = first
    while True:
        generator = torch.Generator().manual_seed(1000 + step)
        unused = (
            torch.rand(IMAGES, SIDE, SIDE, generator=generator)
            < 0.1 * (1 + torch.arange(IMAGES))[:, None, None]
        )
        ids = tuple(f"{number}/{step}/{index}" for index in range(IMAGES))[own]
        if feed.role == "unlabeled":
            boxes = torch.zeros(feed.strong, IMAGES, 4, dtype=torch.int32)
            strong = (pixels // 2)[None].repeat(feed.strong, 1, 1, 1, 1)
            yield Views(pixels[own], strong[:, own], ~unused[own], boxes[:, own], ids)
        else:
            yield Batch(pixels[own], labels.masked_fill(unused, IGNORE)[own], ids)
        step += 1


def network_learner(network: Network, optimizer: OptimizerKind) -> Learner:
    return Learner("network", network, 1e-3, optimizer, faster_heads(10.0))


class EverythingState(nn.Module):
    """A teacher, a discriminator, and a count of the steps."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.discriminator = nn.Conv2d(CLASSES, 1, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def everything(network: Network, optimizer: OptimizerKind | None = None) -> Method:
    """A method that uses all eight fields."""
    torch.manual_seed(1)
    state = EverythingState(network)
    state.discriminator.to(network.mean.dtype)

    def label(state: nn.Module, streamed: Sequence[Streamed], step: int) -> Sequence[Batch]:
        labeled, views = streamed
        assert isinstance(labeled, Batch) and isinstance(views, Views)
        state.teacher.eval()
        confidence, classes = state.teacher(views.weak).main.softmax(1).max(1)
        pseudo = Batch(
            views.strong[0],
            classes.to(torch.uint8),
            views.ids,
            weights=confidence * views.inside,
            divisor=views.inside.sum(),
        )
        return [labeled, pseudo]

    def loss(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        labeled, pseudo = batches
        logits = forward(labeled.images).main
        parts = {
            "loss_labeled": cross_entropy(logits, labeled),
            "loss_pseudo": 0.3 * cross_entropy(forward(pseudo.images).main, pseudo),
        }
        scores = state.discriminator(logits.detach().softmax(1))[:, 0]
        wanted = (labeled.labels == 0).to(scores.dtype)
        costs = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        parts["loss_discriminator"] = (costs * (labeled.labels != IGNORE)).sum() / labeled.count()
        total = sum(parts.values())
        assert isinstance(total, Tensor)
        return total, {name: part.detach() for name, part in (parts | {"loss": total}).items()}

    def moved(state: nn.Module, network: nn.Module, step: int) -> None:
        state.steps += 1
        for mine, theirs in zip(
            state.teacher.state_dict().values(), network.state_dict().values(), strict=True
        ):
            mine.copy_(torch.lerp(mine, theirs, 0.5) if mine.is_floating_point() else theirs)

    return Method(
        feeds=(Feed("labeled", IMAGES), Feed("unlabeled", IMAGES, strong=1)),
        learners=(
            network_learner(network, optimizer or SGD()),
            Learner("discriminator", state.discriminator, 1e-3, Adam(betas=(0.9, 0.99))),
        ),
        loss=loss,
        label=label,
        moved=moved,
        state=state,
        outcome=lambda state, network: state.teacher,
    )


def rounds(network: Network, optimizer: OptimizerKind | None = None) -> Method:
    """DARS's rounds after the first."""
    learner = network_learner(network, optimizer or SGD())
    return self_training(learner, batch=IMAGES, pseudo_batch=IMAGES, auxiliary_weight=0.4, pseudo_weight=0.7)


METHODS: Mapping[str, Callable[..., Method]] = {"self_training": rounds, "everything": everything}
each_method = pytest.mark.parametrize("name", METHODS)


def frozen(method: Method) -> Method:
    """The method with BatchNorm's statistics held and nothing dropped: images then do not see each other."""

    def loss(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        for module in method.network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout2d):
                module.eval()
        return method.loss(forward, batches, step)

    return replace(method, loss=loss)


def run(
    method: Method, stage: Stage | None = None, share: tuple[int, int] = (0, 1), **options: Any
) -> Checkpoint:
    """Train a method on its streams."""

    def streams(first: int) -> list[Iterator[Streamed]]:
        return [stream_of(feed, number, first, share) for number, feed in enumerate(method.feeds)]

    return run_stage(method, streams, stage or Stage(steps=STEPS), **options)


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {
        f"{part}/{name}": value for part, values in checkpoint.parts.items() for name, value in values.items()
    }


# --- the contract


@each_method
def test_the_loss_is_finite_and_falls(name: str) -> None:
    reports: list[StepReport] = []
    method = METHODS[name](build(DEEPLAB))
    run(method, Stage(steps=24, schedule=Schedule("constant"), report_every=1), on_step=reports.append)
    losses = torch.stack([report.figures["loss"] for report in reports])
    assert torch.isfinite(losses).all() and losses[-4:].mean() < 0.8 * losses[:4].mean()
    assert isinstance(method.outcome(method.state, method.network), Network)
    assert all(figure.startswith("loss") or figure == "gradient_norm" for figure in reports[0].figures)


@each_method
@pytest.mark.parametrize("optimizer", [SGD(), AdamW()], ids=["sgd", "adamw"])
def test_stopped_and_resumed_at_any_step_it_ends_with_the_same_bytes(
    name: str, optimizer: OptimizerKind, tmp_path: Path
) -> None:
    stage = Stage(steps=STEPS, schedule=Schedule(warm_up_steps=2), checkpoint_every=1)

    def save(checkpoint: Checkpoint) -> None:
        save_checkpoint(checkpoint, tmp_path / str(checkpoint.step))

    whole = METHODS[name](build(DEEPLAB), optimizer)
    save(run(whole, stage, on_checkpoint=save))
    wanted = (tmp_path / str(STEPS)).read_bytes()
    for step in range(1, STEPS):
        method = METHODS[name](build(DEEPLAB), optimizer)
        end = run(method, stage, begin=load_checkpoint(tmp_path / str(step)))
        save_checkpoint(end, tmp_path / "resumed")
        assert (tmp_path / "resumed").read_bytes() == wanted, step


@each_method
def test_the_checkpoint_has_every_tensor_that_moves(name: str) -> None:
    method = METHODS[name](build(DEEPLAB))
    optimizers: list[torch.optim.Optimizer] = []
    checkpoint = tensors(run(method))
    for key, value in method.state.state_dict().items():
        assert torch.equal(checkpoint[f"method/{key}"], value)
    for key, value in method.network.state_dict().items():
        assert torch.equal(checkpoint[f"network/{key}"], value)
    for learner in method.learners:
        optimizers.append(build_optimizer(learner.module, learner.optimizer, learner.rate_factor))
        part = "optimizer" if learner.name == "network" else f"optimizer.{learner.name}"
        names = {"SGD": ["momentum_buffer"], "Adam": ["step", "exp_avg", "exp_avg_sq"]}[
            type(learner.optimizer).__name__
        ]
        moving = [key for key, value in learner.module.named_parameters() if value.requires_grad]
        wanted = {f"{part}/{key}:{tensor}" for key in moving for tensor in names}
        assert {key for key in checkpoint if key.startswith(f"{part}/")} == wanted
    assert all(optimizer.param_groups for optimizer in optimizers)


@each_method
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_micro_batches_add_up(name: str, micro_batch: int) -> None:
    """In float64, where rounding is far below any mistake."""
    make = METHODS[name]
    whole, parts = (frozen(make(build(DEEPLAB).double())) for _ in range(2))
    if not whole.exact:
        pytest.skip("says that micro-batches do not add up")
    wanted = tensors(run(whole))
    found = tensors(run(parts, Stage(steps=STEPS, micro_batch=micro_batch)))
    start = tensors(run(frozen(make(build(DEEPLAB).double())), Stage(steps=0)))
    assert max(float((wanted[key] - value).abs().max()) for key, value in start.items()) > 1e-4
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-10), key


TWO = """
import torch, torch.distributed as dist
from darseg.training.checkpoint import save_checkpoint
from pathlib import Path
import test_methods as tests
dist.init_process_group('gloo')
for name, make in tests.METHODS.items():
    method = tests.frozen(make(tests.build(tests.DEEPLAB).double()))
    if method.exact:
        end = tests.run(method, share=(dist.get_rank(), 2))
        save_checkpoint(end, Path(f'{name}_{dist.get_rank()}'))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    ended = torchrun(2, "two.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for name, make in METHODS.items():
        method = frozen(make(build(DEEPLAB).double()))
        if not method.exact:
            continue
        wanted = tensors(run(method))
        for rank in (0, 1):
            found = tensors(load_checkpoint(tmp_path / f"{name}_{rank}"))
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-10), (name, key)


@each_method
def test_a_step_that_is_not_finite_moves_nothing(name: str) -> None:
    method = METHODS[name](build(DEEPLAB))
    kept: list[dict[str, Tensor]] = []

    def spoiled(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        loss, figures = method.loss(forward, batches, step)
        return (loss * float("nan") if step == 2 else loss), figures

    def keep(checkpoint: Checkpoint) -> None:
        kept.append(copy.deepcopy(tensors(checkpoint)))

    failing = replace(method, loss=spoiled)
    captured: list[Checkpoint] = []
    with pytest.raises(NumericsError):
        run(
            failing,
            Stage(steps=STEPS, checkpoint_every=1),
            on_checkpoint=lambda c: (keep(c), captured.append(c)),
        )
    assert len(kept) == 2
    # A checkpoint holds references: what it shows now is the state after the failed step. BatchNorm's statistics move in
    # the forward pass, before there is a loss.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in tensors(captured[-1]).items():
        if not (key.startswith("network/") and key.endswith(statistics)):
            assert torch.equal(value, kept[-1][key]), key


# --- what the loop refuses


def test_a_part_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    stage = Stage(steps=2, checkpoint_every=1)
    run(everything(build(DEEPLAB)), stage, on_checkpoint=lambda state: save_checkpoint(state, tmp_path / "c"))
    checkpoint = load_checkpoint(tmp_path / "c")
    with refused(RunError, "optimizer.discriminator"):
        run(rounds(build(DEEPLAB)), begin=checkpoint)
    del checkpoint.parts["method"]
    with refused(RunError, "method: missing"):
        run(everything(build(DEEPLAB)), begin=checkpoint)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    monkeypatch.setattr(sys.modules["darseg.training.checkpoint"], "FORMAT", 99)
    save_checkpoint(Checkpoint(1, {"network": {}}), path)
    monkeypatch.undo()
    with refused(RunError, str(path), "99"):
        load_checkpoint(path)


def test_the_discriminators_term_moves_no_weight_of_the_network() -> None:
    """Two learners are one sum and one backward pass: gradients stay apart by what each term detaches."""
    method = everything(build(DEEPLAB))
    (labeled, views) = (next(stream_of(feed, number, 0, (0, 1))) for number, feed in enumerate(method.feeds))
    batches = method.label(method.state, [labeled, views], 0)
    loss, figures = method.loss(method.network, batches, 0)
    loss.backward()
    apart = everything(build(DEEPLAB))
    output = apart.network(batches[0].images).main, apart.network(batches[1].images).main
    (cross_entropy(output[0], batches[0]) + 0.3 * cross_entropy(output[1], batches[1])).backward()
    for (key, one), other in zip(method.network.named_parameters(), apart.network.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.allclose(one.grad, other.grad, atol=1e-5), (
            key
        )
    assert {"loss", "loss_labeled", "loss_pseudo", "loss_discriminator"} == set(figures)


# --- what 0.2 did


def test_the_losses_are_those_of_darseg_0_2() -> None:
    """A stored trajectory. With AVX2 and AVX-512 kernels its losses differ by 3e-7; a step moves them by 1e-2."""
    stored = json.loads((REPOSITORY / "tests" / "assets" / "losses.json").read_text())
    reports: list[StepReport] = []
    run_stage(rounds(build(PSPNET)), streams_of(2), Stage(steps=8, report_every=1), on_step=reports.append)
    for name in ("loss_labeled", "loss_pseudo", "loss"):
        assert [float(report.figures[name]) for report in reports] == pytest.approx(stored[name], rel=5e-4), (
            name
        )


@pytest.mark.parametrize("size", [None, 1, 3, 8, 20])
def test_micro_batches_cut_every_tensor(size: int | None) -> None:
    pixels, labels = images(0)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(IMAGES, SIDE, SIDE, generator=generator)
    masks = (torch.rand(IMAGES, 5, generator=generator), torch.rand(IMAGES, 7, 1, 1, generator=generator))
    ids = tuple(map(str, range(IMAGES)))
    batch = Batch(pixels, labels, ids, weights=weights, feature_masks=masks, divisor=torch.tensor(77))
    parts = batch.split(size)
    assert torch.equal(torch.cat([part.images for part in parts]), pixels)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    assert torch.equal(torch.cat([part.weights for part in parts if part.weights is not None]), weights)
    for level, mask in enumerate(masks):
        assert torch.equal(torch.cat([part.feature_masks[level] for part in parts]), mask)
    assert sum((part.ids for part in parts), ()) == ids
    assert all(int(part.count()) == 77 for part in parts)


def test_weights_are_those_of_single_pixels() -> None:
    """Against a sum over pixels, one by one; weight 0 is as good as not labeled, but counts in the divisor."""
    pixels, labels = images(0)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(IMAGES, CLASSES, SIDE, SIDE, generator=generator, dtype=torch.float64)
    weights = torch.rand(IMAGES, SIDE, SIDE, generator=generator).double()
    labels = labels.masked_fill(torch.rand(IMAGES, SIDE, SIDE, generator=generator) < 0.3, IGNORE)
    batch = Batch(pixels, labels, tuple(map(str, range(IMAGES))), weights=weights, divisor=torch.tensor(500))
    total = 0.0
    for b, y, x in (labels != IGNORE).nonzero().tolist():
        chances = torch.softmax(logits[b, :, y, x], 0)
        total -= float(weights[b, y, x] * torch.log(chances[int(labels[b, y, x])]))
    assert float(cross_entropy(logits, batch)) == pytest.approx(total / 500, rel=1e-9)
    assert float(cross_entropy(logits, replace(batch, weights=torch.zeros_like(weights)))) == 0
    ones = replace(batch, weights=torch.ones_like(weights))
    plain = float(cross_entropy(logits, replace(batch, weights=None)))
    assert float(cross_entropy(logits, ones)) == pytest.approx(plain, rel=1e-12)


# --- schedules


@pytest.mark.parametrize("kind", ["poly", "cosine", "constant"])
def test_schedules_against_their_formulas(kind: Any) -> None:
    schedule = Schedule(kind, span=(0.2, 1.0), warm_up_steps=3)
    for step in range(11):
        progress = 0.2 + 0.8 * step / 10
        curve = {
            "poly": (1 - progress) ** 0.9,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "constant": 1.0,
        }[kind]
        assert schedule.rate(step, 10, 0.5) == pytest.approx(0.5 * curve * min(1.0, (step + 1) / 3))
