"""Files of other programs: the released networks' answers, every foreign layout, what does not fit, `darseg convert`."""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

import darseg
from conftest import recipe_dict, thorough
from darseg.config.text import load_recipe
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import RecipeError, WeightsError
from darseg.model.convert import convert
from darseg.model.network import Network, NetworkSpec, build_network
from darseg.model.weights import load_network, load_weights, read_spec, save_network
from darseg.run.build import build_initial_network
from wording import refused, says

torch.set_num_threads(1)

REFERENCE = Path(__file__).parent / "assets" / "reference"
KEYS: dict[str, dict[str, tuple[list[int], str]]] = {
    name: json.loads((REFERENCE / f"{name}_keys.json").read_text()) for name in ("pspnet50", "deeplabv2_101")
}
"""Every key of the released networks' state dicts, with shape and type."""

STEM = ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"), (6, "conv3"), (7, "bn3"))


def prefixes(architecture: str) -> dict[str, str]:
    """Beginnings of keys, the release's → ours; no beginning is the beginning of another."""
    stages = {f"layer{stage}.": f"backbone.layer{stage}." for stage in (1, 2, 3, 4)}
    if architecture == "deeplabv2_101":
        branches = {f"layer5.conv2d_list.{index}.": f"head.branches.{index}." for index in range(4)}
        return stages | branches | {"conv1.": "backbone.conv1.", "bn1.": "backbone.bn1."}
    heads = {
        f"{theirs}.{index}.": f"{ours}.{part}."
        for theirs, ours in (("cls", "head"), ("aux", "auxiliary_head"))
        for index, part in ((0, "fuse.conv"), (1, "fuse.norm"), (4, "classifier"))
    }
    pyramid = {
        f"ppm.features.{branch}.{index}.": f"head.branches.{branch}.{part}."
        for branch in range(4)
        for index, part in ((1, "conv"), (2, "norm"))
    }
    return stages | heads | pyramid | {f"layer0.{index}.": f"backbone.{part}." for index, part in STEM}


def renamed(key: str, architecture: str) -> str:
    table = prefixes(architecture)
    (theirs,) = (beginning for beginning in table if key.startswith(beginning))
    return table[theirs] + key.removeprefix(theirs)


def reference_weight(key: str, shape: list[int]) -> Tensor:
    """The weights the answers were made with, drawn from the key's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(("reference:" + key).encode()))
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if key.endswith("running_var"):
        return torch.rand(shape, generator=generator) * 0.5 + 0.75
    if key.endswith("running_mean"):
        return torch.randn(shape, generator=generator) * 0.05
    if len(shape) == 4:
        return torch.randn(shape, generator=generator) * math.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    if len(shape) == 2:
        return torch.randn(shape, generator=generator) * math.sqrt(1 / shape[1])
    if key.endswith("weight"):
        return torch.rand(shape, generator=generator) * 0.4 + 0.5
    if key.endswith("gamma"):
        return torch.rand(shape, generator=generator) * 0.4 + 0.3
    return torch.randn(shape, generator=generator) * 0.05


def filled(value: float, shape: Sequence[int]) -> Tensor:
    """One number at every place, and in the file only once."""
    return torch.tensor(value).expand(shape)


def released_state(architecture: str, classes: int | None = None) -> dict[str, Tensor]:
    """The state dict of the reference; with `classes`: simple numbers, and so many rows in the classifiers."""
    state = {}
    for key, (shape, _) in KEYS[architecture].items():
        if classes is None:
            state[key] = reference_weight(key, shape)
        else:
            last = key.startswith(("cls.4.", "aux.4.", "layer5."))
            state[key] = filled(0.5, [classes, *shape[1:]] if last else shape)
    return state


def module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


def checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """As the release saves: a real optimizer's state with the weights."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.9, weight_decay=1e-4)
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 200,
        "state_dict": collections.OrderedDict(state),
        "optimizer": optimizer.state_dict(),
    }


@pytest.fixture(scope="module")
def psp_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference PSPNet as the release would have saved it: with module. and an optimizer."""
    path = tmp_path_factory.mktemp("released") / "pspnet50.pth"
    torch.save(checkpoint(module(released_state("pspnet50"))), path)
    return path


# --- the released networks' answers


@pytest.mark.parametrize("architecture", ["pspnet50", "deeplabv2_101"])
def test_converted_checkpoints_answer_as_released(
    architecture: str, psp_file: Path, tmp_path: Path, call: Callable
) -> None:
    deeplab = architecture == "deeplabv2_101"
    source, classes = psp_file, 19
    if deeplab:
        source, classes = tmp_path / "deeplab.pth", 21
        torch.save(checkpoint(released_state(architecture)), source, _use_new_zipfile_serialization=False)
    out = tmp_path / "out" / "network.safetensors"
    options = ["--release-classifier"] if deeplab else []
    code, output, errors = call(
        "convert", source, out, "--architecture", architecture, "--classes", classes, *options
    )
    assert code == 0, errors
    assert (
        output == f"{len(KEYS[architecture])} tensors of {source} are in {out}\n"
    )  # and nothing is left over

    network = darseg.load_network(out)
    assert not network.training
    x = torch.randn(1, 3, 89, 121, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        output = network(x).main
    wanted = np.load(REFERENCE / f"{architecture}_out.npz")["y"]
    assert output.shape == wanted.shape == (1, classes, 89, 121) and output.dtype == torch.float32
    assert np.abs(output.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()

    # Every tensor is where an independently written table of names puts it.
    ours = network.state_dict()
    names = {renamed(key, architecture): key for key in KEYS[architecture]}
    assert ours.keys() - names.keys() == {"mean", "std"}
    for key, name in names.items():
        assert torch.equal(ours[key], reference_weight(name, KEYS[architecture][name][0])), key
    if deeplab:  # the correct classifier answers otherwise
        convert(source, tmp_path / "four.safetensors", architecture)
        four = load_network(tmp_path / "four.safetensors")
        spec = read_spec(tmp_path / "four.safetensors")
        assert not spec.release_classifier and spec.classes == 21
        assert spec.class_names == spec.class_colors == ()
        small = x[:, :, :33, :33]
        with torch.no_grad():
            assert not torch.allclose(four(small).main, network(small).main, atol=1e-2)


# --- UniMatch's networks


def unimatch(name: str, request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The weights of a released network of UniMatch, in its layout, and its answers by name."""
    committed = (REFERENCE / f"{name}_keys.json").exists()
    folder = REFERENCE if committed else request.getfixturevalue("shared") / "reference"
    keys = json.loads((folder / f"{name}_keys.json").read_text())
    state = {key: reference_weight(key, shape) for key, (shape, _) in keys.items()}
    return state, dict(np.load(folder / f"{name}_out.npz"))


@pytest.mark.parametrize(
    "name",
    [
        "dpt_dinov2_small",
        "deeplabv3plus_resnet50",
        pytest.param("dpt_dinov2_base", marks=thorough),
        pytest.param("deeplabv3plus_resnet101", marks=thorough),
    ],
)
def test_unimatchs_networks_answer_as_released(
    name: str, tmp_path: Path, call: Callable, request: pytest.FixtureRequest
) -> None:
    if name.startswith("dpt"):
        pytest.importorskip("timm")
    state, answers = unimatch(name, request)
    source, out = tmp_path / "best.pth", tmp_path / "network.safetensors"
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"model": module(worse), "model_ema": module(state), "epoch": 3, "previous_best": 0.8}, source)
    code, printed, errors = call("convert", source, out, "--architecture", name, "--classes", 21)
    assert code == 0, errors
    assert "(model_ema)" in printed
    network = darseg.load_network(out)
    for wanted in answers.values():
        x = torch.randn(1, 3, *wanted.shape[2:], generator=torch.Generator().manual_seed(11))
        with torch.no_grad():
            logits = network(x).main.numpy()
        assert logits.shape == wanted.shape
        assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()

    torch.save({"model": state}, source)  # a checkpoint without the average
    convert(source, tmp_path / "again.safetensors", name)
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's weights as Hugging Face's transformers name them."""
    simple = {
        "norm.": "layernorm.",
        "pos_embed": "embeddings.position_embeddings",
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    }
    named = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            rest = rest.replace("ls1.gamma", "layer_scale1.lambda1").replace(
                "ls2.gamma", "layer_scale2.lambda1"
            )
            rest = rest.replace("attn.proj.", "attention.output.dense.")
            if rest.startswith("attn.qkv."):
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    named[f"encoder.layer.{index}.attention.attention.{part}.{rest.rpartition('.')[2]}"] = (
                        third
                    )
                continue
            named[f"encoder.layer.{index}.{rest}"] = value
            continue
        (theirs,) = (theirs for theirs in simple if key.startswith(theirs))
        named[simple[theirs] + key.removeprefix(theirs)] = value
    return named


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("layout", ["authors", "timm", "hugging face"])
def test_dinov2s_weights_in_every_layout(registers: bool, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    name = "timm/vit_small_patch14" + ("_reg4" if registers else "") + "_dinov2"
    spec = NetworkSpec("linear", name, 3)
    wanted = spec.build().backbone.state_dict()
    for key, value in wanted.items():
        value.copy_(reference_weight(key, list(value.shape)))
    plain = {key.removeprefix("body."): value.clone() for key, value in wanted.items()}
    file = tmp_path / "weights.pth"
    if layout == "timm":
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file(plain, file)
    else:
        if registers:  # the authors keep positions of the class token, and leave registers without
            plain["register_tokens"] = plain.pop("reg_token")
            first = torch.full_like(plain["cls_token"], 0.25)
            plain["cls_token"] = plain["cls_token"] - first
            plain["pos_embed"] = torch.cat([first, plain["pos_embed"]], dim=1)
        plain["mask_token"] = torch.zeros(1, 384)
        torch.save(plain if layout == "authors" else hugging_face(plain), file)
    network = spec.build()
    report = load_weights(network, file)
    assert not report.whole and len(report.loaded) == len(wanted) and not report.resized
    for key, value in network.backbone.state_dict().items():
        assert torch.allclose(value, wanted[key], atol=1e-6), key


def test_the_norm_of_averaged_tokens_is_the_norm_of_the_maps(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    averaging = timm.create_model("test_vit2", pretrained=False)
    averaging.fc_norm.weight.data.fill_(0.75)
    torch.save(averaging.state_dict(), tmp_path / "weights.pth")
    network = NetworkSpec("linear", "timm/test_vit2", 3).build()
    report = load_weights(network, tmp_path / "weights.pth")
    assert set(report.unused) == {"head.weight", "head.bias"}
    assert torch.equal(network.state_dict()["backbone.body.norm.weight"], averaging.fc_norm.weight)


def test_positions_of_a_transformer_for_other_sizes_are_resized_and_said(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    file = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    larger = timm.create_model("vit_tiny_patch16_384", pretrained=False)
    safetensors.torch.save_file(larger.state_dict(), file)
    report = load_weights(NetworkSpec("dpt", "timm/vit_tiny_patch16_224", 3).build(), file)
    assert "577 position embeddings were resized to 197" in report.resized
    assert set(report.unused) == {"head.weight", "head.bias"}


# --- convert: what goes in


def test_semseg_with_21_classes_names_and_colors(tmp_path: Path, call: Callable) -> None:
    """semseg's names are the release's; K is the file's if --classes is not given. This file is of an old torch,
    which counts no batches, and has a block too many."""
    source, out = tmp_path / "voc.pth", tmp_path / "voc.safetensors"
    arguments = ("convert", source, out, "--architecture", "pspnet50", "--names", "voc")
    state = {key: value for key, value in released_state("pspnet50", 21).items() if "tracked" not in key}
    state["layer3.6.conv1.weight"] = torch.zeros(1)
    torch.save({"epoch": 50, "state_dict": module(state)}, source)
    code, _, errors = call(*arguments)
    says(errors, str(source), "layer3.6.conv1.weight", "--no-strict")
    assert code == 2 and not out.exists()
    code, output, errors = call(*arguments, "--no-strict")
    assert code == 0, errors
    first, *lines = output.splitlines()
    counts = [renamed(key, "pspnet50") for key in KEYS["pspnet50"] if key.endswith("num_batches_tracked")]
    assert first == f"{len(state) - 1} tensors of {source} are in {out}"
    assert lines[:2] == ["in the file, but not in the network:", "  layer3.6.conv1.weight"]
    assert lines[2] == "batch counts missing in the file, set to 0:"
    assert sorted(lines[3:]) == sorted(f"  {key}" for key in counts)
    spec = read_spec(out)
    assert (spec.architecture, spec.backbone, spec.classes) == ("pspnet", "resnet50_deep", 21)
    assert spec.class_names[:2] == ("background", "aeroplane") and spec.class_colors[1] == (128, 0, 0)
    whole = out.read_bytes()
    code, _, errors = call(*arguments, "--no-strict")
    says(errors, str(out))
    assert code == 2 and out.read_bytes() == whole


def test_a_wrong_number_of_classes(psp_file: Path, tmp_path: Path, call: Callable) -> None:
    out = tmp_path / "n.safetensors"
    arguments = ("convert", psp_file, out, "--architecture", "pspnet50", "--classes", 21)
    code, _, errors = call(*arguments)
    assert code == 2 and not out.exists()
    says(errors, "cls.4.weight", "[19, 512, 1, 1]", "[21, 512, 1, 1]", "19 classes", "has 21", "--no-strict")
    code, output, errors = call(*arguments, "--no-strict")
    assert code == 0, errors
    says(output, str(psp_file), str(out), "cls.4.bias", "aux.4.weight")
    assert output.count("has shape") == 4 and "not in the network" not in output
    loaded = load_network(out)
    assert loaded.classes == 21
    key = "ppm.features.2.1.weight"
    assert torch.equal(
        loaded.state_dict()[renamed(key, "pspnet50")], reference_weight(key, KEYS["pspnet50"][key][0])
    )
    arguments = ("convert", psp_file, tmp_path / "other.safetensors", "--architecture", "pspnet50")
    code, _, errors = call(*arguments, "--names", "voc")
    assert code == 2 and "for 19 classes; this one has 21" in errors
    code, _, errors = call(*arguments, "--classes", 21, "--names", "cityscapes")
    says(errors, "21 classes", "19 names")
    assert code == 2


def test_another_architectures_file(psp_file: Path, tmp_path: Path, call: Callable) -> None:
    torch.save(released_state("deeplabv2_101", 21), tmp_path / "deeplab.pth")
    for source, wanted, architecture in (
        (psp_file, "deeplabv2_101", "pspnet"),
        (tmp_path / "deeplab.pth", "pspnet50", "deeplabv2"),
    ):
        code, _, errors = call("convert", source, tmp_path / "n.safetensors", "--architecture", wanted)
        says(errors, str(source), f"released {architecture}", "--architecture")
        assert code == 2
    assert not (tmp_path / "n.safetensors").exists()


def test_backbones_alone_are_not_converted(tmp_path: Path, call: Callable) -> None:
    for backbone, architecture in (("resnet50_deep", "pspnet50"), ("resnet101", "deeplabv2_101")):
        torch.save(imagenet(backbone), tmp_path / "imagenet.pth")
        for strict in ("--strict", "--no-strict"):
            code, _, errors = call(
                *("convert", tmp_path / "imagenet.pth", tmp_path / "n.safetensors"),
                *("--architecture", architecture, strict),
            )
            says(errors, "imagenet.pth", "network.weights")
            assert code == 2
    assert not (tmp_path / "n.safetensors").exists()


def test_networks_of_darseg_have_their_own_number_of_classes(tmp_path: Path) -> None:
    spec = NetworkSpec("pspnet", "resnet50_deep", 3)
    save_network(spec.build(), tmp_path / "ours.safetensors", spec)
    convert(tmp_path / "ours.safetensors", tmp_path / "again.safetensors", "pspnet50")
    assert read_spec(tmp_path / "again.safetensors") == spec


def test_other_refusals_of_convert(psp_file: Path, tmp_path: Path, call: Callable) -> None:
    whole, cut = psp_file.read_bytes(), tmp_path / "cut.pth"
    out = tmp_path / "n.safetensors"
    for kept in (0, 1000, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:kept])
        code, _, errors = call("convert", cut, out, "--architecture", "pspnet50")
        assert code == 2 and f"cut.pth ({kept:,} bytes)" in errors and "cut short" in errors
    for arguments, facts in (
        ((tmp_path / "none.pth", out, "--architecture", "pspnet50"), ("none.pth",)),
        ((psp_file, out, "--architecture", "pspnet50", "--release-classifier"), ("deeplabv2",)),
        ((psp_file, tmp_path, "--architecture", "pspnet50"), (str(tmp_path),)),
    ):
        code, _, errors = call("convert", *arguments)
        says(errors, *facts)
        assert code == 2
    code, _, errors = call("convert", psp_file, out, "--architecture", "fcn")
    assert code == 2 and "pspnet50" in errors
    with refused(WeightsError, "'fcn'", "pspnet50, deeplabv2_101"):
        convert(psp_file, out, "fcn")
    with refused(RecipeError, "300", "2 to 255"):
        convert(psp_file, out, "pspnet50", classes=300)
    assert not out.exists()


# --- files that run code


class Runs:
    """What unpickling it does: leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_code_in_pickles_of_every_protocol(form: str, protocol: int, tmp_path: Path, call: Callable) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": {"cls.4.weight": torch.zeros(1)}, "x": Runs(trace)}
    if form == "bare":
        path.write_bytes(pickle.dumps(Runs(trace), protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    code, _, errors = call("convert", path, tmp_path / "n.safetensors", "--architecture", "pspnet50")
    assert code == 2 and "evil.pth" in errors and "mkdir" in errors
    assert "weights_only" not in errors  # torch's advice to read it without the guard
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_pickle_protocols_that_torch_does_not_guard(protocol: int, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "n.pth", pickle_protocol=protocol)
    with refused(WeightsError, "n.pth", vary=[r"\(Unsupported operand \d+\)"]):
        load_weights(small(), tmp_path / "n.pth")


def test_whole_modules_and_programs(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    with refused(WeightsError, "module.pth", "(torch.nn.modules.conv.Conv2d)"):
        load_weights(small(), tmp_path / "module.pth")
    torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(tmp_path / "script.pt")
    with refused(WeightsError, "script.pt", "TorchScript"):
        load_weights(small(), tmp_path / "script.pt")


def test_no_pickle_at_all(tmp_path: Path) -> None:
    path = tmp_path / "n.pth"
    for content in (b"hello", b"\x89PNG\r\n\x1a\n" + bytes(200), bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"cannot be read as weights") as caught:
            load_weights(small(), path)
        assert "weights_only" not in str(caught.value)


# --- pretrained backbones in the layouts of those who train them


def small(backbone: str = "resnet18", classes: int = 2, seed: int = 0, **options: Any) -> Network:
    torch.manual_seed(seed)
    return build_network(backbone=backbone, classes=classes, output_stride=16, head_channels=8, **options)


def imagenet(backbone: str) -> dict[str, Tensor]:
    """A classifier's state dict, keys and shapes written from the published description, not from our networks."""
    depths = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}[
        backbone.split("_")[0]
    ]
    deep, wide = backbone.endswith("deep"), not backbone.startswith("resnet18")
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(key: str, norm: str, outputs: int, inputs: int, side: int) -> None:
        shapes[f"{key}.weight"] = (outputs, inputs, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outputs,)
        shapes[f"{norm}.num_batches_tracked"] = ()

    if deep:
        for index, (outputs, inputs) in enumerate(((64, 3), (64, 64), (128, 64)), 1):
            convolution(f"conv{index}", f"bn{index}", outputs, inputs, 3)
    else:
        convolution("conv1", "bn1", 64, 3, 7)
    inputs = 128 if deep else 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = 4 * width if wide else width
        for block in range(depth):
            key = f"layer{stage + 1}.{block}"
            plan = (
                ((width, inputs, 1), (width, width, 3), (outputs, width, 1))
                if wide
                else ((width, inputs, 3), (width, width, 3))
            )
            for index, (to, of, side) in enumerate(plan, 1):
                convolution(f"{key}.conv{index}", f"{key}.bn{index}", to, of, side)
            if block == 0 and (wide or stage > 0):
                convolution(f"{key}.downsample.0", f"{key}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    shapes |= {"fc.weight": (1000, inputs), "fc.bias": (1000,)}
    return {
        key: filled((zlib.crc32(key.encode()) % 997) / 997, shape) if shape else torch.tensor(7)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("backbone", "file"),
    [
        ("resnet50_deep", "resnet50_deep"),  # semseg's
        ("resnet101_deep", "resnet101_deep"),
        ("resnet50", "resnet50"),  # torchvision's
        ("resnet101", "resnet101"),
        ("resnet101_caffe", "resnet101"),  # DeepLabv2 starts from torchvision's
    ],
)
def test_imagenet_classifiers(backbone: str, file: str, tmp_path: Path) -> None:
    state = imagenet(file)
    torch.save(module(state), tmp_path / "n.pth")
    network = small(backbone)
    heads = {key: value.clone() for key, value in network.state_dict().items() if "head" in key}
    report = load_weights(network, tmp_path / "n.pth")
    assert not report.whole and report.unused == ("fc.bias", "fc.weight") and not report.unfilled
    filled = network.state_dict()
    assert all(
        torch.equal(filled[f"backbone.{key}"], value) for key, value in state.items() if "fc." not in key
    )
    assert all(torch.equal(filled[key], value) for key, value in heads.items())


def test_what_fits_of_another_backbone_if_not_strict(tmp_path: Path) -> None:
    torch.save(imagenet("resnet50_deep"), tmp_path / "n.pth")
    network = small("resnet50")
    with pytest.raises(WeightsError):
        load_weights(network, tmp_path / "n.pth")
    report = load_weights(network, tmp_path / "n.pth", strict=False)
    assert [line.partition(":")[0] for line in report.unfilled] == [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.0.downsample.0.weight",
    ]
    says(report.unfilled[0], "[64, 3, 3, 3]", "[64, 3, 7, 7]")
    assert {"bn3.weight", "conv2.weight", "fc.weight"} <= set(report.unused)
    assert len(report.loaded) == len(network.backbone.state_dict()) - 3


@pytest.mark.parametrize(
    "kind",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to(torch.int8),
        lambda value: value.to(torch.complex64),
        lambda value: value.to("meta"),
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "int8", "complex", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_numbers(kind: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in imagenet("resnet18").items()}
    state["layer4.1.conv2.weight"] = kind(state["layer4.1.conv2.weight"])
    torch.save(state, tmp_path / "n.pth")
    network, before = small(), small().state_dict()
    with refused(WeightsError, "n.pth", "layer4.1.conv2.weight"):
        load_weights(network, tmp_path / "n.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) if value.ndim else value for key, value in imagenet("resnet18").items()}
    torch.save(state, tmp_path / "n.pth")
    network = small()
    load_weights(network, tmp_path / "n.pth")
    loaded = network.backbone.state_dict()["layer4.1.conv2.weight"]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state["layer4.1.conv2.weight"].float())


# --- weights of whole networks in a recipe


def recipe_of(tmp_path: Path, weights: Path, **network: Any):
    values = recipe_dict(tmp_path)
    values["network"] |= {"backbone": "resnet18", "weights": str(weights), **network}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(tmp_path / "r.yaml")


K = len(SCENE_CLASSES)


def test_a_network_of_darseg_as_initial_weights(tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    spec = NetworkSpec("pspnet", "resnet18", K, 16, 16)
    torch.manual_seed(5)
    source = spec.build()
    source.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    source.std.copy_(torch.tensor([4.0, 5.0, 6.0]))
    save_network(source, path, spec)
    network, origin = build_initial_network(recipe_of(tmp_path, path))
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in network.state_dict().items())
    assert network.fill == (1, 2, 3)
    says(origin, f"{len(wanted)} tensors", str(path))


def test_a_released_network_as_initial_weights(psp_file: Path, tmp_path: Path) -> None:
    options = {"backbone": "resnet50_deep", "head_channels": 512}
    assert K != 19
    with refused(WeightsError, "pspnet50.pth", "19 classes", f"has {K}", "network.strict: false"):
        build_initial_network(recipe_of(tmp_path, psp_file, **options))
    network, origin = build_initial_network(recipe_of(tmp_path, psp_file, strict=False, **options))
    says(origin, f"{len(KEYS['pspnet50']) - 4} tensors", "; 4 ", "cls.4.weight", "aux.4.bias")
    fresh = small(classes=K).mean  # a file of the release says nothing of the normalization
    assert torch.equal(network.mean, fresh)
    key = "cls.0.weight"
    assert torch.equal(
        network.state_dict()[renamed(key, "pspnet50")], reference_weight(key, KEYS["pspnet50"][key][0])
    )
    # Without auxiliary head what is left over is refused, or reported.
    options = {"backbone": "resnet50_deep", "head_channels": 512, "auxiliary_weight": 0.0}
    with refused(WeightsError, "pspnet50.pth", "aux.0.weight"):
        build_initial_network(recipe_of(tmp_path, psp_file, **options))
    _, origin = build_initial_network(recipe_of(tmp_path, psp_file, strict=False, **options))
    says(origin, "aux.0.weight")


def test_what_is_left_over_is_named(tmp_path: Path) -> None:
    torch.save(imagenet("resnet18"), tmp_path / "n.pth")
    _, origin = build_initial_network(recipe_of(tmp_path, tmp_path / "n.pth"))
    says(origin, "120 tensors of resnet18", str(tmp_path / "n.pth"), "fc.bias, fc.weight")


def test_files_of_darseg_must_match_in_more_than_mean_and_std(tmp_path: Path) -> None:
    """Every network has these two; loading them alone would silently start from random weights."""
    path = tmp_path / "n.safetensors"
    safetensors.torch.save_file(
        {"mean": torch.zeros(3), "std": torch.ones(3), "backbone.body.x": torch.ones(1)}, path
    )
    network = small()
    before = network.mean.clone()
    with refused(WeightsError, "n.safetensors", "backbone.conv1.weight"):
        load_weights(network, path, strict=False)
    assert torch.equal(network.mean, before)


def test_descriptions_must_be_of_the_network_that_is_saved(tmp_path: Path) -> None:
    plain = small(auxiliary=False)
    deeplab = small(architecture="deeplabv2", release_classifier=True)
    for network, spec in (
        (plain, NetworkSpec("deeplabv2", "resnet18", 2, 16, 8, auxiliary=False)),
        (plain, NetworkSpec("pspnet", "resnet18", 2, 16, 9, auxiliary=False)),
        (deeplab, NetworkSpec("deeplabv2", "resnet18", 2, 16, auxiliary=False)),
    ):
        with refused(WeightsError, "n.safetensors", "NetworkSpec"):
            save_network(network, tmp_path / "n.safetensors", spec)
    state = torch.get_rng_state()
    save_network(
        plain, tmp_path / "n.safetensors", NetworkSpec("pspnet", "resnet18", 2, 16, 8, auxiliary=False)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_networks_of_darseg_end_in_safetensors(psp_file: Path, tmp_path: Path) -> None:
    with refused(WeightsError, "n.pth", "n.safetensors"):
        convert(psp_file, tmp_path / "n.pth", "pspnet50")


def test_two_trained_branches_do_not_become_four_silently(tmp_path: Path) -> None:
    spec = NetworkSpec("deeplabv2", "resnet101_caffe", 3, auxiliary=False, release_classifier=True)
    save_network(spec.build(), tmp_path / "two.safetensors", spec)
    four = replace(spec, release_classifier=False).build()
    with refused(WeightsError, "two.safetensors", "two", "four"):
        load_weights(four, tmp_path / "two.safetensors")
    assert load_weights(spec.build(), tmp_path / "two.safetensors").whole
    assert load_weights(four, tmp_path / "two.safetensors", strict=False).loaded


def test_a_recipe_says_that_the_release_trained_two_branches(tmp_path: Path) -> None:
    state = released_state("deeplabv2_101", K)
    torch.save(state, tmp_path / "deeplab.pth")
    options = {
        "architecture": "deeplabv2",
        "backbone": "resnet101_caffe",
        "output_stride": 8,
        "head_channels": None,
    }
    recipe = recipe_of(tmp_path, tmp_path / "deeplab.pth", **options)
    origin = build_initial_network(recipe)[1]
    says(origin, "deeplab.pth", "all four branches", "two")
    quirks = recipe.model_copy(update={"release_quirks": True})
    network, origin = build_initial_network(quirks)
    assert "branches" not in origin and network.head.summed == 2
