"""Recomputed activations change the memory of a step and nothing else; precisions; torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darseg.config.text import load_recipe
from darseg.data.batches import Batch
from darseg.errors import RecipeError
from darseg.methods.self_training import self_training_loss
from darseg.model.network import Network, NetworkSpec
from darseg.model.recompute import recompute_blocks
from darseg.run.rounds import train
from darseg.training.stage import Stage, StepReport, run_stage
from test_stage import CLASSES, DEEPLAB, PSPNET, SIDE, batch_at, build, method_of, streams_of
from wording import refused

torch.set_num_threads(1)

BOTTLENECKS = NetworkSpec("deeplabv2", "resnet50", CLASSES, 16, auxiliary=False)


def moving(network: Callable, batches: Any, step: int) -> Any:
    """The loss of a run: BatchNorm's statistics move, dropout is on, and two forward passes precede the backward pass."""
    return self_training_loss(network, batches, 0.4, 0.7)


def trained(spec: NetworkSpec, prepare: Callable[[Network], object]) -> tuple[Network, list[Tensor]]:
    """A network with the gradients of two batches, and the tensors that it kept for the backward pass."""
    network = build(spec)
    prepare(network)
    network.train()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = moving(network, [batch_at(0, 0, 4), batch_at(0, 1, 4)], 0)
    own = {value.untyped_storage().data_ptr() for value in network.state_dict(keep_vars=True).values()}
    kept = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own]
    loss.backward()
    return network, kept


def size(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("spec", [PSPNET, BOTTLENECKS], ids=["basic", "bottleneck"])
def test_gradients_and_statistics_are_the_same_with_less_kept(spec: NetworkSpec) -> None:
    """The same operations on the same shapes by the same kernels give the same bits."""
    plain, all_kept = trained(spec, lambda network: None)
    recomputed, kept = trained(spec, recompute_blocks)
    gradients = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradients[name].grad, parameter.grad), name
    state = plain.state_dict()
    assert list(recomputed.state_dict()) == list(state)
    for name, value in recomputed.state_dict().items():
        assert torch.equal(value, state[name]), name  # statistics move once
    assert len(kept) < len(all_kept) / 2 and size(kept) < 0.7 * size(all_kept)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stage_with_recompute_ends_with_the_same_weights(precision: Any) -> None:
    ends = []
    for prepare in (recompute_blocks, lambda network: None):
        network = build(DEEPLAB)
        prepare(network)
        stage = Stage(steps=2, precision=precision, micro_batch=3)
        run_stage(method_of(network, moving), streams_of(1), stage)
        ends.append(network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_statistics_over_all_gpus_change_once_too() -> None:
    """SyncBatchNorm is not a BatchNorm2d. It runs only on GPUs, so here its forward pass is replaced."""
    network = build(PSPNET)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
    recompute_blocks(network)
    block = network.backbone.layer1[0]
    norm, calls = block.bn1, []
    assert isinstance(norm, nn.SyncBatchNorm)
    norm.register_forward_pre_hook(lambda module, inputs: calls.append((module.momentum, len(calls))))
    norm.forward = lambda x: x.relu()  # saves a tensor, so that the backward pass runs it again
    block.bn2.forward = lambda x: x.relu()
    block(torch.rand(2, 32, 9, 9, requires_grad=True)).sum().backward()
    assert calls == [(0.1, 0), (0.0, 1)] and norm.momentum == 0.1 and norm.num_batches_tracked is not None


def test_nothing_is_computed_again_without_a_backward_pass() -> None:
    network = build(PSPNET)
    expected = network.eval()(batch_at(0, 0).images).main
    recompute_blocks(network)
    with torch.inference_mode():
        assert torch.equal(network(batch_at(0, 0).images).main, expected)


class Blockless(nn.Module):
    name = "timm/some"


def test_backbones_without_such_blocks_are_refused() -> None:
    network = build(PSPNET)
    network.backbone = Blockless()
    with refused(RecipeError, "training.recompute", "timm/some", "training.micro_batch"):
        recompute_blocks(network)


def test_recompute_that_cannot_work_is_refused_before_the_run_begins(
    recipe_file: Path, tmp_path: Path
) -> None:
    with refused(RecipeError, "training.recompute", "training.compile"):
        load_recipe(recipe_file, ["training.recompute=true", "training.compile=true"])
    pytest.importorskip("timm")
    changes = ["network.backbone=timm/resnet18", "training.recompute=true"]
    with refused(RecipeError, "timm/resnet18"):
        train(load_recipe(recipe_file, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recompute_in_a_recipe_reaches_the_network(recipe_file: Path, tmp_path: Path) -> None:
    runs = {}
    for recompute in ("false", "true"):
        changes = [f"training.recompute={recompute}", "rounds=[{steps: 2}, {steps: 1, labeling_ratio: 0.4}]"]
        train(load_recipe(recipe_file, changes), tmp_path / recompute)
        runs[recompute] = (tmp_path / recompute / "round_1" / "network.safetensors").read_bytes()
    assert runs["true"] == runs["false"]


# --- precisions


def test_fp16_and_bf16_are_near_fp32() -> None:
    """Losses are scaled and gradients scaled back. The tolerances are several roundings to 11 and to 8 bits."""
    norms = {}
    for precision in ("fp32", "bf16", "fp16"):
        stage = Stage(steps=1, precision=precision)

        def on_step(report: StepReport, name: str = precision) -> None:
            norms[name] = float(report.figures["gradient_norm"])

        run_stage(method_of(build(DEEPLAB), moving), streams_of(1), stage, on_step=on_step)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.1)


# --- torch.compile

DPT = NetworkSpec("dpt", "timm/test_vit", CLASSES, head_channels=16)


def compiled_and_plain(spec: NetworkSpec) -> list[dict[str, Tensor]]:
    """The states after two steps, in float64: compiled kernels round otherwise than plain ones."""
    stage = Stage(steps=2)
    ends = []
    for compiled in (True, False):
        network = legal(spec).double()
        side = slice(spec.sides.down(SIDE))

        def streams(first: int, side: slice = side) -> list[Iterator[Batch]]:
            (stream,) = streams_of(1)(first)
            cut = (
                replace(batch, images=batch.images[:, :, side, side], labels=batch.labels[:, side, side])
                for batch in stream
            )
            return [cut]

        run_stage(method_of(network, moving), streams, replace(stage, compile=compiled))
        ends.append(network.state_dict())
    return ends


def legal(spec: NetworkSpec) -> Network:
    """A network for images of a side that it takes; `build` gives BatchNorm statistics, which DPT has none of."""
    if spec.architecture != "dpt":
        return build(spec)
    torch.manual_seed(0)
    return spec.build()


@pytest.mark.parametrize("spec", [DEEPLAB, DPT], ids=["deeplabv2", "dpt"])
def test_a_traced_network_trains_as_the_plain_one(spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that torch.compile does except generating code, which takes a compiler and minutes."""
    if spec is DPT:
        pytest.importorskip("timm")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend="aot_eager"))
    compiled, plain = compiled_and_plain(spec)
    assert list(compiled) == list(plain)
    assert all(torch.allclose(value, plain[name], rtol=1e-7, atol=1e-9) for name, value in compiled.items())


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one() -> None:
    if not os.environ.get("DARSEG_COMPILE"):
        pytest.skip("takes minutes; set DARSEG_COMPILE=1")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here, and torch.compile needs one")
    compiled, plain = compiled_and_plain(DEEPLAB)
    assert all(torch.allclose(value, plain[name], rtol=1e-7, atol=1e-9) for name, value in compiled.items())
