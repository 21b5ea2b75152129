"""How a network learns: groups of parameters, frozen backbones, clipping, hard pixels and class weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import darseg
from conftest import recipe_dict, thorough
from darseg.config.text import dump_recipe, load_recipe
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.labels import read_label
from darseg.errors import RecipeError
from darseg.methods.self_training import self_training, self_training_loss
from darseg.model.footprint import training_memory
from darseg.model.network import Network, NetworkSpec
from darseg.model.recompute import recompute_blocks
from darseg.run.build import classes_of, manifest_of
from darseg.run.check import check, groups_of, plan
from darseg.run.plan import LearnerSettings, learner_of, plan_rounds, syncs_batchnorm
from darseg.run.remedies import less_to_train
from darseg.run.rounds import train
from darseg.run.steps import train as train_step
from darseg.training.checkpoint import Checkpoint
from darseg.training.loss import LabeledLoss, balanced_weights, cross_entropy
from darseg.training.method import Figures, Learner, Method
from darseg.training.optimize import (
    SGD,
    Adam,
    AdamW,
    OptimizerKind,
    build_optimizer,
    faster_heads,
    restore_optimizer,
    set_rates,
)
from darseg.training.processes import Processes
from darseg.training.stage import Stage, run_stage
from test_run import kill_and_finish, outcome
from wording import refused, says

torch.set_num_threads(1)

VIT = "timm/vit_tiny_patch16_224"
CLASSES = 3


@pytest.fixture(autouse=True)
def _timm() -> None:
    pytest.importorskip("timm")


def build(spec: NetworkSpec, drop_path: float = 0.0) -> Network:
    torch.manual_seed(0)
    return spec.build(drop_path)


def batch_of(side: int, seed: int, images: int = 4) -> Batch:
    """Random images; a quarter of their pixels is not labeled."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (images, side, side), dtype=torch.uint8, generator=generator)
    unlabeled = torch.rand(images, side, side, generator=generator) < 0.25
    return Batch(pictures, labels.masked_fill(unlabeled, IGNORE), tuple(map(str, range(images))))


def stream_of(side: int) -> Callable[[int], Sequence[Iterator[Batch]]]:
    def stream(step: int) -> Iterator[Batch]:
        while True:
            yield batch_of(side, step)
            step += 1

    return lambda first: [stream(first)]


# --- groups of parameters


def learner(network: Network, **how: Any) -> Learner:
    settings = LearnerSettings(learning_rate=5e-6, head_factor=40.0, optimizer=AdamW(), **how)
    return learner_of(settings, network)


def on_meta(architecture: Any, backbone: str) -> Network:
    with torch.device("meta"):
        return NetworkSpec(architecture, backbone, CLASSES).build()


def test_with_adamw_the_heads_learn_40_times_as_fast() -> None:
    network = on_meta("dpt", VIT)
    backbone, heads = groups_of(learner(network))
    assert (backbone.name, backbone.rate, backbone.weight_decay) == ("backbone", 5e-6, 0.01)
    assert (heads.name, heads.rate, heads.weight_decay) == ("heads", pytest.approx(2e-4), 0.01)
    assert backbone.parameters == sum(value.numel() for value in network.backbone.parameters())
    assert heads.parameters == sum(value.numel() for value in network.head.parameters())


# With half the rate from block to block: twelve blocks, the embeddings before and the norm after them.
LAYERS = {
    "embeddings": 1 / 8192,
    "block 0": 1 / 4096,
    "block 1": 1 / 2048,
    "block 2": 1 / 1024,
    "block 3": 1 / 512,
    "block 4": 1 / 256,
    "block 5": 1 / 128,
    "block 6": 1 / 64,
    "block 7": 1 / 32,
    "block 8": 1 / 16,
    "block 9": 1 / 8,
    "block 10": 1 / 4,
    "block 11": 1 / 2,
    "last norm": 1.0,
    "heads": 40.0,
}


def test_layers_learn_slower_toward_the_input() -> None:
    network = on_meta("linear", VIT)
    halved = learner(network, layer_decay=0.5)
    groups = {group.name: group for group in groups_of(halved)}
    assert {name: group.rate / 5e-6 for name, group in groups.items()} == pytest.approx(LAYERS)
    assert sum(group.parameters for group in groups.values()) == sum(
        value.numel() for value in network.parameters()
    )
    optimizer = build_optimizer(network, halved.optimizer, halved.rate_factor)
    assert sorted(group["factor"] for group in optimizer.param_groups) == pytest.approx(
        sorted(LAYERS.values())
    )


def test_norms_biases_and_embeddings_need_not_decay() -> None:
    network = on_meta("dpt", VIT)
    how = learner(network, decay_vectors=False)
    optimizer = build_optimizer(network, how.optimizer, how.rate_factor, decays=how.decays)
    free = {
        id(value)
        for group in optimizer.param_groups
        if not group["weight_decay"]
        for value in group["params"]
    }
    for name, value in network.named_parameters():
        kind = name.rpartition(".")[2]
        vector = kind in ("bias", "gamma", "pos_embed", "cls_token") or "norm" in name
        assert (id(value) in free) == vector, name
    assert {group.weight_decay for group in groups_of(how)} == {0.0, 0.01}


def test_the_releases_stage_4_is_grouped_with_the_heads() -> None:
    network = on_meta("deeplabv2", "resnet18_half")
    settings = LearnerSettings(learning_rate=0.01, head_factor=10.0, stage4_as_head=True)
    slow, fast = groups_of(learner_of(settings, network))
    assert (slow.name, fast.name, fast.rate) == ("backbone", "stage 4, heads", 0.1)


# --- clipping


def slopes(network: nn.Module, optimizer: Any) -> Method:
    """The sum of all weights as the loss: each gradient is 1."""
    how = Learner("network", network, 1.0, optimizer)

    def loss(forward: Callable, batches: Sequence[Batch], step: int) -> tuple[Tensor, Figures]:
        total = torch.stack([value.sum() for value in network.parameters()]).sum()
        return total, {}

    return Method(feeds=(), learners=(how,), loss=loss)


@pytest.mark.parametrize(("limit", "step"), [(5.0, 0.5), (10.0, 1.0), (20.0, 1.0), (None, 1.0)])
def test_gradients_are_clipped_to_their_norm(limit: float | None, step: float) -> None:
    """A hundred gradients of 1 have the norm 10; a step of plain SGD at rate 1 moves each weight by its gradient."""
    network = nn.Linear(99, 1)
    before = [value.clone() for value in network.parameters()]
    norms = []
    run_stage(
        slopes(network, SGD(momentum=0.0, weight_decay=0.0)),
        stream_of(8),
        Stage(steps=1, clip=limit),
        on_step=lambda report: norms.append(float(report.figures["gradient_norm"])),
    )
    assert norms == pytest.approx([10.0])  # before clipping
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.allclose(old - new, torch.full_like(old, step), atol=1e-5)


@pytest.mark.parametrize("kind", [Adam(betas=(0.8, 0.95), weight_decay=0.1), AdamW(weight_decay=0.1)])
def test_adam_steps_by_its_formula(kind: OptimizerKind) -> None:
    """Weights of both memory layouts, against the formulas of the papers in float64."""
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3)).double()
    layers[0].to(memory_format=torch.channels_last)
    optimizer = build_optimizer(layers, kind, lambda name: 10.0 if name.startswith("0.") else 1.0)
    set_rates(optimizer, 0.01)
    restore_optimizer(layers, optimizer, {})
    values = {name: parameter.detach().numpy().copy() for name, parameter in layers.named_parameters()}
    first, second = ({name: 0.0 * value for name, value in values.items()} for _ in range(2))
    for step in range(1, 4):
        layers.zero_grad()
        layers(torch.randn(2, 3, 9, 9, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        for name, parameter in layers.named_parameters():
            assert parameter.grad is not None
            gradient, rate = parameter.grad.numpy().copy(), 0.1 if name.startswith("0.") else 0.01
            if isinstance(kind, AdamW):
                values[name] *= 1 - rate * kind.weight_decay
            else:
                gradient += kind.weight_decay * values[name]
            first[name] = kind.betas[0] * first[name] + (1 - kind.betas[0]) * gradient
            second[name] = kind.betas[1] * second[name] + (1 - kind.betas[1]) * gradient**2
            mean, square = (
                first[name] / (1 - kind.betas[0] ** step),
                second[name] / (1 - kind.betas[1] ** step),
            )
            values[name] -= rate * mean / (square**0.5 + kind.eps)
            assert np.allclose(parameter.detach().numpy(), values[name], rtol=1e-9, atol=1e-12), name


# --- frozen backbones


def frozen_method(network: Network) -> Method:
    how = Learner("network", network, 1e-3, AdamW(), faster_heads(40.0))
    return self_training(how, batch=4, auxiliary_weight=0.4)


def test_a_frozen_backbone_stays_and_keeps_nothing() -> None:
    spec = NetworkSpec("linear", "resnet18_half", CLASSES, 16)
    network = build(spec)
    network.freeze_backbone()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    saved: list[Checkpoint] = []
    stage = Stage(steps=4, checkpoint_every=2)

    def keep(checkpoint: Checkpoint) -> None:
        parts = {
            part: {key: value.clone() for key, value in values.items()}
            for part, values in checkpoint.parts.items()
        }
        saved.append(replace(checkpoint, parts=parts))

    end = run_stage(frozen_method(network), stream_of(33), stage, on_checkpoint=keep)
    for key, value in network.state_dict().items():
        fixed = key.startswith("backbone.") or key in ("mean", "std")
        assert torch.equal(value, before[key]) == fixed, key  # statistics of the backbone's BatchNorm, too
    assert {name.partition(".")[0] for name in end.parts["optimizer"]} == {"head"}

    # Stopped after two steps and resumed.
    again = build(spec)
    again.freeze_backbone()
    run_stage(frozen_method(again), stream_of(33), stage, begin=saved[0])
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())


def test_statistics_that_are_the_same_in_all_processes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times a float32, divided by three, is often another one."""
    norm = nn.BatchNorm2d(1000)
    torch.manual_seed(0)
    for buffer in (norm.running_mean, norm.running_var):
        assert buffer is not None
        buffer.uniform_()
    before = norm.state_dict()["running_var"].clone()
    assert not torch.equal((before + before + before) / 3, before)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(x + x + x))
    Processes(0, 3).average_statistics(norm)
    assert torch.equal(norm.state_dict()["running_var"], before)


@pytest.mark.parametrize(
    "spec",
    [NetworkSpec("linear", VIT, CLASSES), NetworkSpec("deeplabv3plus", "resnet18_half", CLASSES, 16)],
    ids=["transformer", "cnn"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_predicted_memory_is_what_a_step_keeps(spec: NetworkSpec, frozen: bool) -> None:
    network = build(spec)
    if frozen:
        network.freeze_backbone()
    own = {value.untyped_storage().data_ptr() for value in network.state_dict(keep_vars=True).values()}
    kept: list[Tensor] = []
    side = network.sides.up(96)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        loss, _ = self_training_loss(network, [batch_of(side, 0, images=2)], 0.0)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    measured = sum(size for address, size in storages.items() if address not in own)
    state, predicted = training_memory(spec, 2, side, side, averages=2, frozen=frozen)
    assert loss.requires_grad and predicted == pytest.approx(measured, rel=0.005)
    numbers = sum((4 if value.requires_grad else 1) * value.numel() for value in network.parameters())
    assert state == 4 * numbers
    assert not frozen or not network.backbone(torch.zeros(1, 3, side, side)).stage4.requires_grad


# --- recomputed transformers


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputed_transformers_have_the_same_gradients(drop_path: float) -> None:
    """Also where blocks are left out at random: the same ones, when they are computed again."""

    def gradients(recompute: bool, seed: int = 5) -> tuple[list[Tensor], int]:
        network = build(NetworkSpec("dpt", VIT, CLASSES, head_channels=8), drop_path)
        if recompute:
            recompute_blocks(network)
        kept: list[Tensor] = []
        torch.manual_seed(seed)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            loss, _ = self_training_loss(network, [batch_of(32, 0), batch_of(32, 1)], 0.0)
        loss.backward()
        return [value.grad for value in network.parameters() if value.grad is not None], len(kept)

    plain, kept = gradients(False)
    again, kept_again = gradients(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert kept_again < kept / 2
    other_seed, _ = gradients(False, seed=6)
    same = all(torch.equal(one, other) for one, other in zip(plain, other_seed, strict=True))
    assert same == (drop_path == 0)


# --- hard pixels and class weights


def slow_loss(logits: Tensor, batch: Batch, how: LabeledLoss) -> float:
    """Pixel by pixel, as UniMatch's ProbOhemCrossEntropy2d says it, times the share of the batch's pixels."""
    pixels = []
    for b, y, x in (batch.labels != IGNORE).nonzero().tolist():
        label = int(batch.labels[b, y, x])
        chance = float(torch.softmax(logits[b, :, y, x], 0)[label])
        weight = 1.0 if batch.weights is None else float(batch.weights[b, y, x])
        weight *= how.class_weights[label] if how.class_weights else 1.0
        pixels.append((chance, -weight * float(torch.log(torch.tensor(chance, dtype=torch.float64)))))
    kept = pixels
    least = how.least * len(batch.images)
    if how.hard_below is not None and len(pixels) >= least:
        limit = max(how.hard_below, sorted(chance for chance, _ in pixels)[least - 1] if least else 0.0)
        kept = [pixel for pixel in pixels if pixel[0] <= limit]
    if not kept:
        return 0.0
    return sum(loss for _, loss in kept) / len(kept) * len(pixels) / max(1, int(batch.count()))


WAYS = {
    "hard": LabeledLoss(hard_below=0.3),
    "least": LabeledLoss(hard_below=0.05, least=40),
    "all": LabeledLoss(hard_below=0.05, least=1000),
    "none": LabeledLoss(hard_below=1e-9),
    "classes": LabeledLoss(class_weights=(0.5, 2.0, 3.0)),
    "both": LabeledLoss(hard_below=0.2, least=20, class_weights=(0.5, 2.0, 3.0)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_single_pixels(way: str, weighted: bool) -> None:
    how, generator = WAYS[way], torch.Generator().manual_seed(1)
    batch = batch_of(9, 3)
    batch.labels[1] = IGNORE  # an image without labels
    if weighted:
        batch = replace(batch, weights=torch.rand(batch.labels.shape, generator=generator))
    logits = 2 * torch.randn(4, CLASSES, 9, 9, generator=generator, dtype=torch.float64)
    assert float(cross_entropy(logits, batch, how)) == pytest.approx(slow_loss(logits, batch, how), rel=1e-6)

    # Micro-batches choose their own hard pixels; their means add up by their labeled pixels.
    parts = batch.split(2)
    shares = [cross_entropy(logits[2 * at : 2 * at + 2], part, how) for at, part in enumerate(parts)]
    slow = [slow_loss(logits[2 * at : 2 * at + 2], part, how) for at, part in enumerate(parts)]
    assert [float(share) for share in shares] == pytest.approx(slow, rel=1e-6)
    if how.hard_below is None:
        assert float(sum(shares)) == pytest.approx(slow_loss(logits, batch, how), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_without_labels_costs_nothing(way: str) -> None:
    batch = batch_of(9, 3)
    batch.labels[:] = IGNORE
    logits = torch.randn(4, CLASSES, 9, 9, requires_grad=True)
    loss = cross_entropy(logits, batch, WAYS[way])
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=30).filter(any))
def test_balanced_weights_give_each_class_the_same_share(counts: list[int]) -> None:
    weights = balanced_weights(counts)
    shares = [count * weight for count, weight in zip(counts, weights, strict=True)]
    present = [share for share in shares if share]
    assert present == pytest.approx([present[0]] * len(present))
    assert sum(shares) == pytest.approx(sum(counts))  # the mean over the pixels is 1
    assert all(weight == 1 for count, weight in zip(counts, weights, strict=True) if not count)


def test_balanced_weights_as_scikit_learn_has_them() -> None:
    # compute_class_weight("balanced", classes=[0, 1, 2], y=[0] * 6 + [1] * 3 + [2])
    assert balanced_weights([6, 3, 1]) == pytest.approx([10 / 18, 10 / 9, 10 / 3])


def test_pseudo_labels_are_learned_from_as_before() -> None:
    network = build(NetworkSpec("linear", VIT, CLASSES)).eval()
    batches = [batch_of(32, 0), batch_of(32, 1)]
    plain, hard = (
        self_training_loss(network, batches, 0.0, labeled_loss=how)[1] for how in (None, WAYS["classes"])
    )
    assert hard["loss_labeled"] != plain["loss_labeled"] and hard["loss_pseudo"] == plain["loss_pseudo"]


# --- recipes


TRANSFORMER = [
    "network.architecture=dpt",
    f"network.backbone={VIT}",
    "network.output_stride=8",
    "training.crop=32",
    "training.optimizer=adamw",
    "training.learning_rate=null",
    "labeling.window=48",
    "labeling.mirror=false",
]


def test_keys_that_do_not_work_together(recipe_file: Path) -> None:
    changes = [
        *("training.optimizer=adamw", "training.momentum=0.9", "network.drop_path=0.1"),
        *("network.freeze=backbone", "training.recompute=true", "training.layer_decay=0.9"),
    ]
    facts = ("training.momentum", "network.drop_path", "training.recompute", "training.layer_decay")
    with refused(RecipeError, *facts, "resnet18_half"):
        load_recipe(recipe_file, changes)
    with refused(RecipeError, "dpt", "output_stride", "auxiliary_weight"):
        load_recipe(
            recipe_file,
            ["network.architecture=dpt", "network.output_stride=16", "network.auxiliary_weight=0.4"],
        )


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("training.layer_decay=0.9", ("training.layer_decay", "resnet18_half")),
        ("training.class_weights={road: 2.0, rode: 3.0}", ("training.class_weights", "rode", "road")),
    ],
    ids=["layers", "classes"],
)
def test_what_a_network_or_its_classes_cannot_do_is_said_before_a_run(
    change: str, facts: tuple[str, ...], recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [change])
    with refused(RecipeError, *facts):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(check(recipe).faults) == 1
    with pytest.raises(RecipeError):
        plan(recipe)


def test_balanced_class_weights_are_those_of_the_labeled_masks(
    recipe_file: Path, tmp_path: Path, call: Callable
) -> None:
    """A run with them has the bytes of one with their numbers; plan shows the same numbers."""
    changes = ["rounds=[{steps: 2}]", "result.align=off"]
    recipe = load_recipe(recipe_file, [*changes, "training.class_weights=balanced"])
    labels = [read_label(sample.label) for sample in manifest_of(recipe).labeled if sample.label]
    names = classes_of(recipe).names
    counts = [sum(int((label == k).sum()) for label in labels) for k in range(len(names))]
    present = sum(count > 0 for count in counts)
    wanted = {
        name: sum(counts) / present / count if count else 1.0
        for name, count in zip(names, counts, strict=True)
    }
    assert plan(recipe).class_weights == pytest.approx(wanted)
    code, out, _ = call("plan", recipe_file, *changes, "training.class_weights=balanced")
    assert code == 0
    assert ", ".join(f"{name} {weight:.4g}" for name, weight in wanted.items()) in out

    train(recipe, tmp_path / "balanced")
    numbers = yaml.safe_dump(plan(recipe).class_weights, default_flow_style=True, width=10**6).strip()
    train(load_recipe(recipe_file, [*changes, f"training.class_weights={numbers}"]), tmp_path / "numbers")
    train(load_recipe(recipe_file, changes), tmp_path / "plain")
    balanced, same, plain = (
        (tmp_path / name / "round_0" / "network.safetensors").read_bytes()
        for name in ("balanced", "numbers", "plain")
    )
    assert balanced == same != plain
    events = [json.loads(line) for line in (tmp_path / "balanced" / "journal.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "class_weights"]
    assert event["weights"] == pytest.approx(wanted)
    assert "class_weights: balanced" in (tmp_path / "balanced" / "recipe.yaml").read_text()
    with refused(RecipeError, "training.class_weights", "balance", "{road: 0.5}"):
        load_recipe(recipe_file, ["training.class_weights=balance"])


def test_batches_of_one_image_a_process(recipe_file: Path) -> None:
    """The mean of an image's features goes through BatchNorm, which needs two."""
    for architecture in ("pspnet", "deeplabv3plus"):
        changes = [f"network.architecture={architecture}", "training.half_batch=2"]
        with refused(RecipeError, "training.half_batch", architecture):
            plan(load_recipe(recipe_file, changes), processes=2)
    changes = ["network.architecture=deeplabv2", "network.head_channels=null", "training.half_batch=2"]
    assert plan(load_recipe(recipe_file, changes), processes=2).rounds


@pytest.mark.parametrize(
    ("architecture", "synced"),
    [("pspnet", True), ("deeplabv3plus", True), ("linear", True), ("deeplabv2", False), ("dpt", False)],
)
def test_whose_batchnorm_sees_all_gpus(
    architecture: str, synced: bool, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darseg.run.plan.pick_device", lambda: torch.device("cuda"))
    changes = [
        f"network.architecture={architecture}",
        "network.head_channels=null",
        "network.output_stride=8",
    ]
    recipe = load_recipe(recipe_file, changes)
    assert syncs_batchnorm(recipe, 2) == synced and not syncs_batchnorm(recipe, 1)
    other = load_recipe(recipe_file, [*changes, f"training.sync_batchnorm={not synced}"])
    assert syncs_batchnorm(other, 2) == (not synced)


def test_less_memory_for_a_transformer(recipe_file: Path) -> None:
    """Recomputing is advised where it works and saves something."""
    changes = [*TRANSFORMER, "training.crop=64", "rounds=[{steps: 4}]"]
    for more, advised in (([], True), (["network.freeze=backbone"], False)):
        recipe = load_recipe(recipe_file, [*changes, *more])
        (planned,) = plan_rounds(recipe, labeled=4, unlabeled=6, fills={0: (0, 0, 0)})
        text = less_to_train(recipe, planned, processes=1)
        assert ("training.recompute=true" in text) == advised and "training.crop=[32, 32]" in text


def test_the_plan_of_a_transformer(recipe_file: Path, call: Callable) -> None:
    changes = [*TRANSFORMER, "training.warm_up=3", "rounds=[{steps: 4}]"]
    code, out, _ = call("plan", recipe_file, *changes)
    assert code == 0
    says("\n".join(out.splitlines()[2:]), VIT, "backbone: rate 5e-06", "heads: rate 0.0002", "3 steps")
    code, out, _ = call("plan", recipe_file, *changes, "network.freeze=backbone")
    assert code == 0 and "backbone: does not learn" in out


@thorough
def test_dinov2_killed_ends_with_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    """DPT on DINOv2-S, 30 steps from random numbers, killed at two checkpoints."""
    values = recipe_dict(tiny_data)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    changes = [
        *TRANSFORMER,
        "network.backbone=timm/vit_small_patch14_dinov2",
        "training.crop=28",
        "training.checkpoint_every=8",
        "labeling.window=42",
        "rounds=[{steps: 30}]",
        "result.align=off",
    ]
    recipe = tmp_path / "vit.yaml"
    recipe.write_text(dump_recipe(load_recipe(tmp_path / "r.yaml", changes)))
    train(recipe, tmp_path / "whole")
    places = [("round_0/checkpoint_*.safetensors", count) for count in (1, 2)]
    kill_and_finish(recipe, tmp_path / "killed", places)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_of_a_transformer(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed it ends with the same bytes; it labels, is evaluated, and can be exported."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    changes = [
        *TRANSFORMER,
        "network.backbone=timm/test_vit",  # timm's smallest
        "network.drop_path=0.2",
        "training.warm_up=2",
        "training.clip=1.0",
        "training.layer_decay=0.8",
        "training.decay_vectors=false",
        "training.recompute=true",
        "training.ohem={least: 200}",
        "training.class_weights={road: 0.5}",
        "rounds=[{steps: 3}, {steps: 2, labeling_ratio: 0.4}]",
        "result.align=off",
    ]
    recipe = load_recipe(tmp_path / "r.yaml", changes)
    summary = train(recipe, tmp_path / "whole")
    assert len(summary["rounds"]) == 2 and all("mean_iou" in scored for scored in summary["rounds"])

    save = train_step.save_checkpoint

    def save_and_stop(checkpoint: Checkpoint, path: Path) -> None:
        save(checkpoint, path)
        if path.name.startswith("checkpoint_"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped")
    assert list(tmp_path.glob("stopped/round_0/checkpoint_*"))
    train(recipe, tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert any(name.endswith(".png") for name in outcome(tmp_path / "whole"))
    parity = darseg.export_network(tmp_path / "whole", tmp_path / "network.pt2")
    assert (tmp_path / "network.pt2").exists() and parity
