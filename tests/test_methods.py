"""The contract that every method keeps, whatever happens in its steps: one entry a method.

`everything` is no method for users: it uses all that the loop offers – views, a teacher, weights, a second learner –,
so that the loop's promises are tested before methods need them.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forks
from conftest import FULL, thorough
from darseg.data.batches import Batch, split_together
from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.errors import NumericsError, RecipeError, RunError
from darseg.methods.acceptance import Above, Aligned, ClassThresholds, MeanAligned, Realigned
from darseg.methods.adversarial import Adversarial
from darseg.methods.consistency import Consistency, Supervision
from darseg.methods.dynamic import DynamicLoss, dynamic_self_training
from darseg.methods.mlmt import Mlmt, mlmt
from darseg.methods.self_training import self_training
from darseg.methods.teacher import TeacherSettings, with_teacher
from darseg.model import discriminators
from darseg.model.discriminators import PixelDiscriminator
from darseg.model.network import Network
from darseg.run.online import MAKERS
from darseg.training import stage as stage_module
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.loss import cross_entropy
from darseg.training.method import Feed, Figures, Labeled, Learner, Method, Streamed
from darseg.training.optimize import SGD, Adam, AdamW, OptimizerKind, faster_heads, fits
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage, StepReport, run_stage, to_device
from test_stage import CLASSES, DEEPLAB, SIDE, build
from wording import refused

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("small_network")

IMAGES, STEPS = 8, 5


def images(stream: int, side: int = SIDE, count: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Images, uint8 [count, 3, H, W], whose brightness tells the class, and labels uint8 [count, H, W]."""
    generator = torch.Generator().manual_seed(stream)
    labels = (torch.arange(count) % CLASSES)[:, None, None].expand(count, side, side)
    noise = torch.randint(0, 60, (count, 3, side, side), generator=generator)
    return (labels[:, None] * 90 + noise).to(torch.uint8), labels.to(torch.uint8).contiguous()


def stream_of(
    feed: Feed, number: int, first: int, share: tuple[int, int], *, side: int = SIDE
) -> Iterator[Streamed]:
    """The same images at every step, with other pixels unlabeled or outside; this process's share of them."""
    (rank, processes), count = share, feed.size
    pixels, labels = images(number, side, count)
    own = slice(rank * count // processes, (rank + 1) * count // processes)
    step = first
    while True:
        generator = torch.Generator().manual_seed(1000 + step)
        unused = (
            torch.rand(count, side, side, generator=generator)
            < 0.1 * (1 + torch.arange(count))[:, None, None]
        )
        ids = tuple(f"{number}/{step}/{index}" for index in range(count))[own]
        if feed.role == "unlabeled":
            corners = torch.randint(0, side // 2, (feed.strong, count, 2), generator=generator)
            boxes = torch.cat([corners, corners + side // 2], 2).to(torch.int32)
            strong = (pixels // 2)[None].repeat(feed.strong, 1, 1, 1, 1)
            positions = step * count + torch.arange(count)
            yield Views(pixels[own], strong[:, own], ~unused[own], boxes[:, own], positions[own], ids)
        else:
            sureness = torch.randint(0, 256, labels.shape, dtype=torch.uint8, generator=generator)
            learned = labels.masked_fill(unused, IGNORE)[own]
            yield Batch(pixels[own], learned, ids, confidences=sureness[own] if number else None)
        step += 1


def network_learner(network: Network, optimizer: OptimizerKind) -> Learner:
    return Learner("network", network, 1e-3, optimizer, faster_heads(10.0))


class EverythingState(nn.Module):
    """A teacher, a discriminator, and counts of steps and of predicted classes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.discriminator = nn.Conv2d(CLASSES, 1, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(CLASSES, dtype=torch.int64))


def everything(network: Network, optimizer: OptimizerKind | None = None) -> Method:
    """A method that uses all eight fields."""
    torch.manual_seed(1)
    state = EverythingState(network)
    state.discriminator.to(network.mean.dtype)

    def label(state: nn.Module, network: nn.Module, streamed: Sequence[Streamed], step: int) -> Labeled:
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
        counts = torch.bincount(classes[views.inside], minlength=CLASSES)
        return Labeled([labeled, pseudo], figures={"accepted": confidence.mean()}, seen={"counts": counts})

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
        return total, {name: part.detach() for name, part in parts.items()}

    def moved(state: nn.Module, network: nn.Module, seen: Mapping[str, Tensor], step: int) -> None:
        state.steps += 1
        state.counts += seen["counts"]
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


def rounds(network: Network, optimizer: OptimizerKind | None = None, *, one_pass: bool = False) -> Method:
    """DARS's rounds after the first."""
    return self_training(
        network_learner(network, optimizer or SGD()),
        batch=IMAGES,
        pseudo_batch=IMAGES,
        auxiliary_weight=0.4,
        pseudo_weight=0.7,
        one_pass=one_pass,
    )


def dynamic(how: DynamicLoss) -> Callable[..., Method]:
    def make(network: Network, optimizer: OptimizerKind | None = None) -> Method:
        learner = network_learner(network, optimizer or SGD())
        return dynamic_self_training(learner, how, batch=IMAGES, pseudo_batch=IMAGES, pseudo_weight=0.7)

    return make


def online(how: Consistency | Adversarial) -> Callable[..., Method]:
    def make(network: Network, optimizer: OptimizerKind | None = None) -> Method:
        learner = network_learner(network, optimizer or SGD())
        more = seconds(how, network)
        return MAKERS[how.method](
            learner, how, Supervision(how.batch, auxiliary_weight=0.4), seed=(0, 0), **more
        )

    return make


def seconds(how: Consistency | Adversarial, network: Network) -> dict[str, Network]:
    """The second network of a method that has one: with the weights of the first, moved at random."""
    if how.networks == 1:
        return {}
    second, generator = copy.deepcopy(network), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in second.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter *= 1 + 0.1 * noise.to(parameter)
    return {"second": second}


class ImageLevel(Network):
    """A network that says which classes whole images show."""

    def forward(self, images: Tensor, feature_masks: Sequence[Tensor] = ()) -> Tensor:  # ty: ignore[invalid-method-override]
        return super().forward(images, feature_masks).main.mean((2, 3))


def of_images(network: Network, optimizer: OptimizerKind | None = None) -> Method:
    """Unlabeled images count from the second step on."""
    network.__class__ = ImageLevel
    learner = network_learner(network, optimizer or SGD())
    return mlmt(learner, Mlmt(1, batch=IMAGES, unlabeled=IMAGES, ramp=(0, 2), decay=0.9), seed=(0, 0))


COUNTS = (5, 3, 2)
"""Labeled pixels of each class."""
FIXMATCH = Consistency("fixmatch", batch=IMAGES, views=2, accept=Above(0.4))
ADVSEMISEG = Adversarial(
    "advsemiseg", batch=4, labeled=0.01, unlabeled=0.001, self_training=0.1, above=0.4, start=1
)
S4GAN = Adversarial("s4gan", batch=IMAGES, labeled=0, unlabeled=0.1, self_training=1, above=0.4, start=1)

METHODS: Mapping[str, Callable[..., Method]] = {
    "self_training": rounds,
    "self_training_one_pass": partial(rounds, one_pass=True),
    "everything": everything,
    "self_training_with_teacher": lambda *of: with_teacher(rounds(*of), TeacherSettings(0.9)),
    "dst": dynamic(DynamicLoss("dst", 2.0)),
    "dmt": dynamic(DynamicLoss("dmt", 2.0, 1.0)),
    "fixmatch": online(FIXMATCH),
    "fixmatch_without_teacher": online(replace(FIXMATCH, teacher=None, views=1, mixing="classmix")),
    "mean_teacher": online(replace(FIXMATCH, method="mean_teacher", views=1)),
    "classmix": online(replace(FIXMATCH, method="classmix", views=1, mixing="classmix")),
    "fixmatch_realigned": online(
        replace(FIXMATCH, views=1, accept=Realigned(Aligned(0.5, 2, COUNTS), window=2, counts=COUNTS))
    ),
    "fixmatch_class_thresholds": online(
        replace(FIXMATCH, views=1, accept=MeanAligned(ClassThresholds(), COUNTS))
    ),
    "fixmatch_aligned": online(replace(FIXMATCH, views=1, accept=Aligned(0.5, window=2, counts=COUNTS))),
    "cps": online(
        replace(
            FIXMATCH,
            method="cps",
            views=1,
            mixing="none",
            accept=Realigned(Aligned(0.5, 2, COUNTS), window=2, counts=COUNTS),
        )
    ),
    "advsemiseg": online(ADVSEMISEG),
    "s4gan": online(S4GAN),
    "mlmt": of_images,
    "unimatch": online(replace(FIXMATCH, method="unimatch", teacher=None)),
    "unimatch_v2": online(replace(FIXMATCH, method="unimatch_v2")),
}
SUMMED = {name: make for name, make in METHODS.items() if name != "s4gan"}
"""Those whose micro-batches and processes add up to one batch."""
RESUMED = [*SUMMED] if FULL else ["everything", "fixmatch_realigned", "cps"]
"""Those that are resumed on two processes: without DARSEG_FULL=1 two whose state is sums over processes, and one with
a second network that has statistics."""
NARROW = (8, 8, 16, 16)
LEARN = ("network", "second")
"""Learners that segment images."""


@pytest.fixture(autouse=True)
def narrow_discriminators(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer channels than published, so that tests take less time."""
    monkeypatch.setattr(discriminators, "WIDTHS", NARROW)


each_method = pytest.mark.parametrize("name", METHODS)


def in_turn(names: Iterable[str], values: Sequence[Any]) -> list[Any]:
    """Parameters of a test: every name with one of the values, in turn; with the others if DARSEG_FULL=1."""
    return [
        pytest.param(
            name, value, id=f"{name}-{value if isinstance(value, int) else type(value).__name__}", marks=marks
        )
        for place, name in enumerate(names)
        for number, value in enumerate(values)
        for marks in [() if number == place % len(values) else thorough]
    ]


def frozen(method: Method) -> Method:
    """The method with BatchNorm's statistics held and nothing dropped: images then do not see each other."""

    def loss(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        for learner in method.learners:
            for module in learner.module.modules():
                if isinstance(module, nn.BatchNorm2d | nn.Dropout2d) and learner.name in LEARN:
                    module.eval()
        return method.loss(forward, batches, step)

    return replace(method, loss=loss)


def side_of(method: Method) -> int:
    """The side of the images that a method learns from: its discriminator may need larger ones."""
    discriminator = getattr(method.state, "discriminator", None)
    return 33 if isinstance(discriminator, PixelDiscriminator) else SIDE


CLIPPED = Stage(steps=STEPS, clip=10.0)
"""Without batch statistics the losses of larger images would grow beyond all bounds."""
SHARED = replace(CLIPPED, steps=3)
"""By two processes: unlabeled images count from the second step on, and the third depends on them."""


def run(
    method: Method, stage: Stage | None = None, share: tuple[int, int] = (0, 1), **options: Any
) -> Checkpoint:
    """Train a method on its streams."""

    def streams(first: int) -> list[Iterator[Streamed]]:
        return [
            stream_of(feed, number, first, share, side=side_of(method))
            for number, feed in enumerate(method.feeds)
        ]

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
    assert torch.isfinite(losses).all()
    # The loss on labels that a network gives itself goes up and down, and takes that of the true labels with it.
    labeled = torch.stack([report.figures["loss_labeled"] for report in reports])
    assert labeled[-8:].median() < 0.5 * labeled[:4].mean()
    assert isinstance(method.outcome(method.state, method.network), Network)
    parts = [report.figures[name] for report in reports for name in report.figures if name.startswith("loss")]
    assert torch.isfinite(torch.stack(parts)).all() and torch.isfinite(reports[0].figures["gradient_norm"])


@pytest.mark.parametrize(("name", "optimizer"), in_turn(METHODS, [SGD(), AdamW()]))
def test_stopped_and_resumed_at_any_step_it_ends_with_the_same_bytes(
    name: str, optimizer: OptimizerKind, tmp_path: Path
) -> None:
    stage = Stage(steps=STEPS, schedule=Schedule(warm_up_steps=2), checkpoint_every=1, clip=0.5)

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
def test_the_checkpoint_has_every_tensor_that_moves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what PyTorch's own optimizers say they hold."""
    built: list[torch.optim.Optimizer] = []
    real = stage_module.build_optimizer

    def build_and_keep(*arguments: Any, **named: Any) -> torch.optim.Optimizer:
        built.append(real(*arguments, **named))
        return built[-1]

    monkeypatch.setattr(stage_module, "build_optimizer", build_and_keep)
    method = METHODS[name](build(DEEPLAB))
    checkpoint = tensors(run(method))
    assert len(built) == len(method.learners)
    wanted = {f"network/{key}": value for key, value in method.network.state_dict().items()}
    wanted |= {f"method/{key}": value for key, value in method.state.state_dict().items()}
    for learner, optimizer in zip(method.learners, built, strict=True):
        part = "optimizer" if learner.name == "network" else f"optimizer.{learner.name}"
        names = {id(parameter): key for key, parameter in learner.module.named_parameters()}
        for parameter, state in optimizer.state.items():
            wanted |= {f"{part}/{names[id(parameter)]}:{key}": value for key, value in state.items()}
    assert checkpoint.keys() == wanted.keys()
    assert all(torch.equal(checkpoint[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(("name", "micro_batch"), in_turn(SUMMED, [2, 3]))
def test_micro_batches_add_up(name: str, micro_batch: int) -> None:
    """In float64, where rounding is far below any mistake."""
    make = METHODS[name]
    whole, parts = (frozen(make(build(DEEPLAB).double())) for _ in range(2))
    assert whole.exact
    wanted = tensors(run(whole, CLIPPED))
    found = tensors(run(parts, replace(CLIPPED, micro_batch=micro_batch)))
    start = tensors(run(frozen(make(build(DEEPLAB).double())), Stage(steps=0)))
    assert max(float((wanted[key] - value).abs().max()) for key, value in start.items()) > 1e-4
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-10), key


TWO = """
import torch, torch.distributed as dist
from darseg.training.checkpoint import load_checkpoint, save_checkpoint
from darseg.training.processes import disconnect
from pathlib import Path
import test_methods as tests
dist.init_process_group('gloo')
tests.discriminators.WIDTHS = tests.NARROW
for name, make in tests.SUMMED.items():
    method = tests.frozen(make(tests.build(tests.DEEPLAB).double()))
    rank = dist.get_rank()
    end = tests.run(method, tests.SHARED, share=(rank, 2))
    save_checkpoint(end, Path(f'{name}_{rank}'))
    if name not in tests.RESUMED:
        continue
    # Stopped after step 2 and resumed, with BatchNorm's statistics moving.
    stage = tests.Stage(steps=4, checkpoint_every=2)
    make_32 = lambda: make(tests.build(tests.DEEPLAB))
    whole = tests.run(make_32(), stage, (rank, 2), on_checkpoint=lambda c: save_checkpoint(c, Path(f'{name}_{rank}_2')))
    save_checkpoint(whole, Path(f'{name}_{rank}_whole'))
    dist.barrier()
    begin = load_checkpoint(Path(f'{name}_0_2'))  # the first process saves, all read its file
    save_checkpoint(tests.run(make_32(), stage, (rank, 2), begin=begin), Path(f'{name}_{rank}_resumed'))
disconnect()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    ended = forks.torchrun("two.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for name, make in SUMMED.items():
        method = frozen(make(build(DEEPLAB).double()))
        assert method.exact
        wanted = tensors(run(method, SHARED))
        for rank in (0, 1):
            found = tensors(load_checkpoint(tmp_path / f"{name}_{rank}"))
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-10), (name, key)
        if name not in RESUMED:
            continue
        # Resumed on two processes it ends with the same bytes, in both.
        ends = [
            (tmp_path / f"{name}_{rank}_{kind}").read_bytes()
            for rank in (0, 1)
            for kind in ("whole", "resumed")
        ]
        assert len(set(ends)) == 1, name


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
        if not (key.startswith(("network/", "method/second.")) and key.endswith(statistics)):
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


def test_a_checkpoint_with_a_changed_byte_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(run(everything(build(DEEPLAB)), Stage(steps=1)), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    with refused(RunError, str(path), "checksum"):
        load_checkpoint(path)


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
    batches = method.label(method.state, method.network, [labeled, views], 0).batches
    loss, figures = method.loss(method.network, batches, 0)
    loss.backward()
    apart = everything(build(DEEPLAB))
    output = apart.network(batches[0].images).main, apart.network(batches[1].images).main
    (cross_entropy(output[0], batches[0]) + 0.3 * cross_entropy(output[1], batches[1])).backward()
    for (key, one), other in zip(method.network.named_parameters(), apart.network.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.allclose(one.grad, other.grad, atol=1e-5), (
            key
        )
    assert {"loss_labeled", "loss_pseudo", "loss_discriminator"} == set(figures)


def test_a_method_that_does_not_add_up_is_not_split() -> None:
    method = replace(rounds(build(DEEPLAB)), exact=False)
    with refused(RecipeError, "training.micro_batch 2"):
        run(method, Stage(steps=1, micro_batch=2))
    run(method, Stage(steps=1))


def test_batches_of_unequal_sizes_are_split_in_step() -> None:
    """One labeled and seven pseudo-labeled images, for example (DMT)."""
    method = frozen(rounds(build(DEEPLAB).double()))
    sizes = (2, 7)

    def streams(first: int) -> list[Iterator[Streamed]]:
        def stream(number: int) -> Iterator[Streamed]:
            for batch in stream_of(Feed("labeled", IMAGES), number, first, (0, 1)):
                assert isinstance(batch, Batch)
                yield batch.cut([sizes[number]])[0]

        return [stream(number) for number in range(2)]

    ends = []
    for size in (None, 3):
        method = frozen(rounds(build(DEEPLAB).double()))
        ends.append(tensors(run_stage(method, streams, Stage(steps=3, micro_batch=size))))
    assert all(torch.allclose(ends[1][key], value, rtol=1e-9, atol=1e-10) for key, value in ends[0].items())


@pytest.mark.parametrize("size", [None, 1, 2, 3, 8])
def test_micro_batches_of_several_batches(size: int | None) -> None:
    batches = [next(stream_of(Feed("labeled", IMAGES), number, 0, (0, 1))) for number in range(2)]
    assert isinstance(batches[0], Batch) and isinstance(batches[1], Batch)
    pair = [batches[0], batches[1].cut([5])[0]]
    parts = split_together(pair, size)
    for number, whole in enumerate(pair):
        ids = [part[number].ids for part in parts]
        assert sum(ids, ()) == whole.ids and all(ids)
        assert size is None or len(parts) == 5 or max(map(len, ids)) <= size


def test_with_fp16_all_learners_step_or_none() -> None:
    """The discriminator's gradient alone is beyond fp16's range."""
    method = everything(build(DEEPLAB))

    def overflowing(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        loss, figures = method.loss(forward, batches, step)
        halves = (
            method.state.discriminator.weight.half()
        )  # the gradient of each is 3 times the scale, beyond 65,504
        return loss + (3 * halves).sum().float(), figures

    start = {key: value.clone() for key, value in method.network.named_parameters()}
    norms: list[Tensor] = []
    spoiled = replace(method, loss=overflowing)
    run(
        spoiled, Stage(steps=2, precision="fp16"), on_step=lambda report: norms.append(report.figures["loss"])
    )
    assert len(norms) == 2
    for key, value in method.network.named_parameters():
        assert torch.equal(value, start[key]), key


def test_another_optimizer_is_no_state_to_resume_with() -> None:
    end = run(rounds(build(DEEPLAB)))
    with refused(RunError, "backbone.conv1.weight:exp_avg: missing"):
        run(rounds(build(DEEPLAB), AdamW()), Stage(steps=9), begin=end)
    assert fits(SGD(), end.parts["optimizer"]) and not fits(AdamW(), end.parts["optimizer"])


def test_a_stage_goes_on_with_the_optimizer_of_the_stage_before() -> None:
    """One step with momentum m, rate r and gradient g moves weights by r · (0.9 m + g)."""
    network = build(DEEPLAB)
    learner = Learner("network", network, 1.0, SGD(momentum=0.9, weight_decay=0.0))
    method = Method(
        feeds=(),
        learners=(learner,),
        loss=lambda forward, batches, step: (sum(p.sum() for p in network.parameters()), {}),
    )
    momentum = {
        f"{key}:momentum_buffer": torch.full_like(value, 2.0) for key, value in network.named_parameters()
    }
    start = {key: value.clone() for key, value in network.named_parameters()}
    run(method, Stage(steps=1), before={"optimizer": momentum})
    for key, value in network.named_parameters():
        if value.requires_grad:
            assert torch.allclose(start[key] - value, torch.full_like(value, 0.9 * 2 + 1), atol=1e-4), key


def test_everything_of_a_stream_moves_to_the_device() -> None:
    pixels, labels = images(0)
    weights = torch.rand(IMAGES, SIDE, SIDE)
    batch = Batch(
        pixels,
        labels,
        ("a",) * IMAGES,
        weights=weights,
        feature_masks=(torch.rand(IMAGES, 3),),
        targets=torch.rand(IMAGES, 3, SIDE, SIDE),
        confidences=labels,
        divisor=torch.tensor(4),
    )
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch) and moved.weights is not None and moved.divisor is not None
    assert moved.targets is not None and moved.targets.is_meta
    assert moved.confidences is not None and moved.confidences.is_meta
    held = [moved.images, moved.labels, moved.weights, *moved.feature_masks, moved.divisor]
    assert all(tensor.device.type == "meta" for tensor in held) and moved.ids == batch.ids


@pytest.mark.parametrize("size", [None, 1, 3, 8, 20])
def test_micro_batches_cut_every_tensor(size: int | None) -> None:
    pixels, labels = images(0)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(IMAGES, SIDE, SIDE, generator=generator)
    masks = (torch.rand(IMAGES, 5, generator=generator), torch.rand(IMAGES, 7, 1, 1, generator=generator))
    ids = tuple(map(str, range(IMAGES)))
    targets = torch.rand(IMAGES, CLASSES, SIDE, SIDE, generator=generator)
    batch = Batch(
        pixels,
        labels,
        ids,
        weights=weights,
        feature_masks=masks,
        targets=targets,
        confidences=labels + 9,
        divisor=torch.tensor(77),
    )
    parts = batch.split(size)
    assert torch.equal(torch.cat([part.images for part in parts]), pixels)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    assert torch.equal(torch.cat([part.weights for part in parts if part.weights is not None]), weights)
    assert torch.equal(torch.cat([part.targets for part in parts if part.targets is not None]), targets)
    sureness = [part.confidences for part in parts if part.confidences is not None]
    assert torch.equal(torch.cat(sureness), labels + 9)
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
