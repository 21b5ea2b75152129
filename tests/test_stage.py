"""One stage of training: micro-batches add up to the batch; the release's mistakes are optional; memory is predicted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import REPOSITORY, recipe_dict
from darseg.config.text import load_recipe
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.errors import NumericsError, RecipeError
from darseg.methods.self_training import self_training_loss
from darseg.model.footprint import training_memory
from darseg.model.network import Network, NetworkSpec
from darseg.run.check import plan
from darseg.run.plan import plan_rounds
from darseg.training.checkpoint import Checkpoint
from darseg.training.loss import cross_entropy
from darseg.training.method import Learner, Method
from darseg.training.optimize import SGD, faster_heads
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage, StepReport, run_stage, to_device
from wording import refused, says

torch.set_num_threads(1)

CLASSES, SIDE, IMAGES = 3, 17, 6
MICRO_STEPS = 6  # in float64, which is slow
PSPNET = NetworkSpec("pspnet", "resnet18_half", CLASSES, 16, 8)
DEEPLAB = NetworkSpec("deeplabv2", "resnet18_half", CLASSES, 16, auxiliary=False)


def build(spec: NetworkSpec) -> Network:
    """A network with BatchNorm statistics of images: fixed, they condition it as well as in training."""
    torch.manual_seed(0)
    network = spec.build()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(batch_at(99, 0).images)
    for norm in norms:
        norm.momentum = 0.1
    return network


def batch_at(step: int, stream: int, images: int = IMAGES) -> Batch:
    """Images with 0, 1/5, 2/5 … of their pixels labeled."""
    generator = torch.Generator().manual_seed(1000 * stream + step)
    pictures = torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (images, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    chance = torch.rand(images, SIDE, SIDE, generator=generator)
    labels[chance >= torch.arange(images)[:, None, None] / 5] = IGNORE
    return Batch(pictures, labels, tuple(f"{stream}/{step}/{index}" for index in range(images)))


def streams_of(count: int):
    def stream(number: int, step: int) -> Iterator[Batch]:
        while True:
            yield batch_at(step, number)
            step += 1

    return lambda first: [stream(number, first) for number in range(count)]


def still(network: Network, batches: Sequence[Batch], step: int) -> Any:
    """The loss with fixed BatchNorm statistics and without dropout, so that images do not influence each other."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout2d):
            module.eval()
    return self_training_loss(network, batches, 0.4, 0.7)


def method_of(
    network: Network,
    objective: Callable,
    learning_rate: float = 1e-3,
    *,
    optimizer: SGD = SGD(),  # noqa: B008 (frozen)
    stage4_as_head: bool = False,
) -> Method:
    """A method with any loss, whose network learns as in self-training."""
    factors = faster_heads(10.0, stage4_as_head=stage4_as_head)
    learner = Learner("network", network, learning_rate, optimizer, factors)
    return Method(feeds=(), learners=(learner,), loss=objective)


def run(
    stage: Stage,
    spec: NetworkSpec = PSPNET,
    streams: int = 2,
    *,
    objective: Callable = still,
    learner: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Network, list[tuple[float, dict[str, Tensor]]], Checkpoint]:
    """A new network trained for a stage, the rate and figures of each step, and the state at the end."""
    network, reports = build(spec).to(dtype), []
    end = run_stage(
        method_of(network, objective, **(learner or {})),
        streams_of(streams),
        stage,
        on_step=lambda report: reports.append((report.rate, dict(report.figures))),
        **options,
    )
    return network, reports, end


# --- micro-batches


@pytest.mark.parametrize(("spec", "streams"), [(PSPNET, 2), (DEEPLAB, 1)], ids=["pspnet", "deeplabv2"])
def test_micro_batches_are_the_batch(spec: NetworkSpec, streams: int) -> None:
    """In float64, where rounding is far below any mistake, whatever kernels the processor has."""
    rate = {"learning_rate": 1e-3}
    whole, expected, _ = run(Stage(steps=MICRO_STEPS), spec, streams, learner=rate, dtype=torch.float64)
    start = build(spec).double().state_dict()
    assert max(float((value - start[key]).abs().max()) for key, value in whole.state_dict().items()) > 1e-4
    for size in (1, 4):  # 4: the last is smaller
        stage = Stage(steps=MICRO_STEPS, micro_batch=size)
        network, reports, _ = run(stage, spec, streams, learner=rate, dtype=torch.float64)
        assert len(reports) == MICRO_STEPS
        for (rate_now, figures), (rate_whole, figures_whole) in zip(reports, expected, strict=True):
            assert rate_now == rate_whole and figures.keys() == figures_whole.keys()
            for name, value in figures.items():
                assert float(value) == pytest.approx(float(figures_whole[name]), rel=1e-9), name
        for key, value in network.state_dict().items():
            assert torch.allclose(value, whole.state_dict()[key], rtol=1e-9, atol=1e-10), key
    for _, figures in expected:
        parts = [float(figures[name]) for name in ("loss_labeled", "loss_pseudo")[:streams]]
        weighted = sum(weight * part for weight, part in zip((1, 0.7), parts, strict=False))
        assert float(figures["loss"]) == pytest.approx(weighted, rel=1e-9)


@pytest.mark.parametrize(("spec", "streams"), [(PSPNET, 2), (DEEPLAB, 1)], ids=["pspnet", "deeplabv2"])
def test_gradients_of_micro_batches_are_those_of_the_batch(spec: NetworkSpec, streams: int) -> None:
    """In float32, as training has it: one step, so that rounding cannot grow from step to step."""
    step = {"learning_rate": 1.0, "optimizer": SGD(momentum=0.0, weight_decay=0.0)}
    start = build(spec).state_dict()
    moves = []
    for size in (None, 1, 4):
        network, _, _ = run(Stage(steps=1, micro_batch=size), spec, streams, learner=step)
        moves.append(
            torch.cat([(value - start[name]).flatten() for name, value in network.named_parameters()])
        )
    assert moves[0].abs().max() > 0.1
    for move in moves[1:]:
        assert (move - moves[0]).norm() < 1e-3 * moves[0].norm()


def test_the_loss_is_the_sum_over_labeled_pixels_by_their_number() -> None:
    """Not the mean of the images' means, which differs if images have unequal shares of labeled pixels."""
    batch = batch_at(0, 0)
    logits = torch.randn(IMAGES, CLASSES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    costs = [
        -torch.log_softmax(logits[b, :, i, j].double(), 0)[batch.labels[b, i, j].long()]
        for b, i, j in (batch.labels != IGNORE).nonzero().tolist()
    ]
    expected = torch.as_tensor(sum(costs) / len(costs))
    assert torch.isclose(cross_entropy(logits, batch).double(), expected, rtol=1e-5)
    parts = [cross_entropy(own, part) for own, part in zip(logits.split(2), batch.split(2), strict=True)]
    assert torch.isclose(torch.stack(parts).sum().double(), expected, rtol=1e-5)
    assert cross_entropy(logits[:1], batch.split(1)[0]) == 0  # no pixel is labeled


def test_a_batch_without_labels_moves_nothing() -> None:
    empty = Batch(
        torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), torch.full((2, SIDE, SIDE), IGNORE), ("a", "b")
    )

    def streams(first: int) -> list[Iterator[Batch]]:
        return [(empty for _ in range(9))]

    for micro in (None, 1):
        network, before = build(PSPNET), build(PSPNET).state_dict()
        method = method_of(network, still, 0.1, optimizer=SGD(weight_decay=0.0))
        run_stage(method, streams, Stage(steps=2, micro_batch=micro))
        named = dict(network.named_parameters())
        assert all(torch.equal(value, before[name]) for name, value in named.items())


@given(st.integers(1, 9), st.integers(1, 12) | st.none(), st.integers(1, 12) | st.none())
@settings(max_examples=40, deadline=None)
def test_laws_of_split(images: int, size: int | None, again: int | None) -> None:
    batch = batch_at(3, 0, images)
    parts = batch.split(size)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert tuple(name for part in parts for name in part.ids) == batch.ids
    assert all(len(part.ids) == len(part.images) == len(part.labels) for part in parts)
    assert len(parts) == -(-images // (size or images))
    assert all(len(part.ids) == (size or images) for part in parts[:-1])
    count = int((batch.labels != IGNORE).sum())
    pieces = [piece for part in parts for piece in part.split(again)]
    assert all(int(piece.count()) == count for piece in pieces)


def test_a_micro_batch_on_another_device_keeps_the_count_of_the_batch() -> None:
    part = batch_at(0, 0).split(2)[1]
    moved = to_device(part, torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta" and moved.ids == part.ids
    assert (
        part.divisor is not None and moved.count().device.type == "meta"
    )  # it has no value to compare there


def test_a_micro_batch_that_is_not_finite_names_the_ids_of_all_streams() -> None:
    calls = []

    def objective(network: Network, parts: Sequence[Batch], step: int) -> Any:
        calls.append(parts[0].ids)
        loss, figures = still(network, parts, step)
        return loss * (float("nan") if len(calls) == 5 else 1.0), figures

    before = None

    def on_step(report: StepReport) -> None:
        nonlocal before
        before = {key: value.clone() for key, value in network.named_parameters()}

    network = build(PSPNET)
    method = method_of(network, objective, 0.01)
    with refused(NumericsError, "step 1 of 3", "loss nan", "0/1/0", "1/1/5", vary=[r"norm [\d.]+"]):
        run_stage(method, streams_of(2), Stage(steps=3, micro_batch=2), on_step=on_step)
    assert before is not None
    assert all(torch.equal(value, before[key]) for key, value in network.named_parameters())


# --- mistakes of the release


def test_the_first_step_at_rate_0_leaves_the_weights_and_moves_momentum() -> None:
    slip, correct = (Schedule(span=(0.5, 1.0), first_step_at_zero=at_zero) for at_zero in (True, False))
    network, reports, end = run(Stage(steps=1, schedule=slip), learner={"learning_rate": 0.01})
    named = dict(network.named_parameters())
    assert [rate for rate, _ in reports] == [0.0]
    for key, value in build(PSPNET).named_parameters():
        assert torch.equal(named[key], value), key
    momentum = end.parts["optimizer"]
    assert all(value.abs().sum() > 0 for value in momentum.values())
    assert momentum.keys() == {f"{name}:momentum_buffer" for name in named}
    # Only that step: later ones have the curve's rate, as all steps have without the switch.
    rates = [[schedule.rate(step, 4, 0.01) for step in range(5)] for schedule in (slip, correct)]
    assert rates[0] == [0.0, *rates[1][1:]]
    assert rates[1][0] == pytest.approx(0.01 * 0.5**0.9)


def test_a_resumed_stage_with_a_first_step_at_0() -> None:
    schedule = Schedule(span=(0.5, 1.0), first_step_at_zero=True)
    stage = Stage(steps=4, schedule=schedule, checkpoint_every=2, micro_batch=2)
    kept: list[Checkpoint] = []

    def objective(network: Network, batches: Sequence[Batch], step: int) -> Any:
        return self_training_loss(network, batches, 0.4, 1.0)

    _, reports, end = run(
        stage, objective=objective, on_checkpoint=lambda checkpoint: kept.append(copy.deepcopy(checkpoint))
    )
    _, later, again = run(stage, objective=objective, begin=kept[0])
    assert [rate for rate, _ in later] == [rate for rate, _ in reports[2:]]
    for name, part in end.parts.items():
        assert all(torch.equal(value, again.parts[name][key]) for key, value in part.items()), name


def test_stage_4_learns_at_the_rate_of_the_heads() -> None:
    """Without momentum and decay a step is rate · gradient, so the two moves differ by the rate factor."""
    plain_sgd = SGD(momentum=0.0, weight_decay=0.0)
    start = build(DEEPLAB).state_dict()
    plain, quirk = (
        run(Stage(steps=1), DEEPLAB, learner={"optimizer": plain_sgd, "stage4_as_head": slip})[0].state_dict()
        for slip in (False, True)
    )
    for part, factor in (
        ("backbone.layer3.1.conv2", 1),
        ("backbone.layer4.1.conv2", 10),
        ("head.branches.0", 1),
    ):
        move, plain_move = (state[f"{part}.weight"] - start[f"{part}.weight"] for state in (quirk, plain))
        # Moves are small differences of float32 weights, so their last digits are lost.
        assert torch.allclose(move, factor * plain_move, rtol=1e-2, atol=1e-6), part


# --- epochs and memory, known before a run


@pytest.mark.parametrize(
    ("over", "epoch_steps"),
    [
        ((None, None), [2, 3]),  # 4 labeled, 6 unlabeled, 2 per step
        (("unlabeled", "labeled"), [3, 2]),
        (("labeled", "unlabeled"), [2, 3]),
    ],
)
def test_which_images_an_epoch_covers(
    over: tuple, epoch_steps: list[int], recipe_file, tmp_path, call
) -> None:
    rounds = [
        {"epochs": 5, "epoch_over": over[0]},
        {"epochs": 5, "labeling_ratio": 0.4, "epoch_over": over[1]},
    ]
    changes = [
        "training.batch=2",
        "training.half_batch=2",
        f"rounds={yaml.safe_dump(rounds, default_flow_style=True)}",
    ]
    recipe = load_recipe(recipe_file, changes)
    planned = plan_rounds(recipe, labeled=4, unlabeled=6, fills={0: (0, 0, 0)})
    expected = [(steps, 5 * steps, 5) for steps in epoch_steps]
    assert [(round_.epoch_steps, round_.steps, round_.epochs) for round_ in planned] == expected
    code, out, _ = call("plan", recipe_file, *changes)
    rows = [line.split() for line in out.splitlines()[1:3]]
    assert code == 0 and [row[2:5] for row in rows] == [["5", str(n), str(5 * n)] for n in epoch_steps]
    with refused(RecipeError, "rounds.0.epoch_over"):
        load_recipe(recipe_file, ["rounds=[{steps: 3, epoch_over: labeled}]"])


def measured(spec: NetworkSpec, images: int, height: int, width: int) -> int:
    """Bytes that a forward pass and the loss keep on the CPU, counted by the addresses of the saved tensors."""
    network = build(spec)
    own = {value.untyped_storage().data_ptr() for value in network.state_dict(keep_vars=True).values()}
    kept: list[Tensor] = []  # also keeps addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    batch = Batch(
        torch.zeros(images, 3, height, width, dtype=torch.uint8),
        torch.zeros(images, height, width, dtype=torch.uint8),
        tuple(map(str, range(images))),
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = self_training_loss(network, [batch], 0.4, 1.0)
    assert loss.requires_grad
    storages = [tensor.untyped_storage() for tensor in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("spec", [PSPNET, DEEPLAB, replace(PSPNET, classes=200)])
def test_predicted_memory_is_what_a_step_keeps(spec: NetworkSpec) -> None:
    state, kept = training_memory(spec, 2, 65, 49)
    assert kept == pytest.approx(measured(spec, 2, 65, 49), rel=0.005)
    network = build(spec)
    assert state == 12 * sum(parameter.numel() for parameter in network.parameters())


def test_memory_grows_with_images_and_frozen_parameters_cost_less() -> None:
    kept = [training_memory(PSPNET, images, 33, 65)[1] for images in (2, 4, 6)]
    assert kept[2] - kept[1] == kept[1] - kept[0] and kept[0] < 1.02 * (kept[1] - kept[0])
    caffe, resnet = (
        training_memory(NetworkSpec("deeplabv2", name, 3, 16, auxiliary=False), 2, 17, 17)[0]
        for name in ("resnet101_caffe", "resnet101")
    )
    with torch.device("meta"):
        network = NetworkSpec("pspnet", "resnet101", 3).build().backbone
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert resnet - caffe == 8 * sum(2 * module.num_features for module in norms)


def test_plan_counts_micro_batches(tiny_data, tmp_path) -> None:
    values = recipe_dict(tiny_data)
    values["training"] |= {"batch": 8, "half_batch": 4}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    whole, parts = (
        plan(load_recipe(tmp_path / "r.yaml", changes)) for changes in ([], ["training.micro_batch=2"])
    )
    spec = NetworkSpec("pspnet", "resnet18_half", len(values["data"]["classes"]), 16, 16)
    assert whole.activation_bytes == training_memory(spec, 8, 49, 65)[1]
    assert parts.activation_bytes == training_memory(spec, 4, 49, 65)[1]  # 2 + 2 pseudo-labeled
    note = next(note for note in parts.notes if "micro-batches" in note)
    says(note, "2 images", "round 0: 4", "round 1: 2")


# --- what 0.2 did


def test_the_losses_are_those_of_darseg_0_2() -> None:
    """A stored trajectory. With AVX2 and AVX-512 kernels its losses differ by 3e-7; a step moves them by 1e-2."""
    from test_methods import rounds  # which imports this file

    stored = json.loads((REPOSITORY / "tests" / "assets" / "losses.json").read_text())
    reports: list[StepReport] = []
    run_stage(rounds(build(PSPNET)), streams_of(2), Stage(steps=8, report_every=1), on_step=reports.append)
    for name in ("loss_labeled", "loss_pseudo", "loss"):
        reported = [float(report.figures[name]) for report in reports]
        assert reported == pytest.approx(stored[name], rel=5e-4), name
