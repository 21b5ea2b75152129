"""One contract, passed by every network; slow oracles."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import darseg
from darseg.errors import DataError, RecipeError, SizeError
from darseg.model.backbone import RESNETS, Features
from darseg.model.heads import (
    BINS,
    AtrousHead,
    DeepLabV3PlusHead,
    PyramidPoolingHead,
    pool_by_products,
    upsample,
)
from darseg.model.network import ARCHITECTURES, Network, NetworkSpec, build_network
from darseg.model.sides import Sides
from darseg.model.vit import POSITION_OFFSET, resizing
from darseg.model.weights import load_network, save_network
from darseg.model.windows import Memory, Protocol
from darseg.training.optimize import SGD, build_optimizer, faster_heads, set_rates
from wording import refused, says

torch.set_num_threads(1)

CLASSES = 5


def sgd(network: Network, *, stage4_as_head: bool = False) -> torch.optim.Optimizer:
    """The optimizer of self-training, heads at ten times the rate."""
    return build_optimizer(network, SGD(), faster_heads(10, stage4_as_head=stage4_as_head))


NETWORKS = [
    ("deeplabv2/resnet101_caffe", 16),
    ("deeplabv2/resnet18", 8),
    ("deeplabv2/timm/resnet18", 16),
    ("resnet18", 8),
    ("resnet18", 16),
    ("resnet18_half", 8),
    ("resnet50", 16),
    ("resnet50_deep", 8),
    ("resnet101_deep", 16),
    ("timm/tf_efficientnet_lite0", 16),
    ("timm/resnet18", 16),
    ("timm/mobilenetv3_small_100", 16),
    ("timm/convnext_atto", 16),
    ("deeplabv3plus/resnet18", 8),
    ("deeplabv3plus/resnet50_deep", 16),
    ("deeplabv3plus/timm/tf_efficientnet_lite0", 16),
    ("dpt/timm/vit_small_patch14_dinov2", 14),
    ("dpt/timm/vit_small_patch14_reg4_dinov2", 14),
    ("dpt/timm/vit_small_patch16_dinov3", 16),
    ("dpt/timm/vit_tiny_patch16_224", 16),
    ("dpt/timm/test_vit2", 16),
    ("dpt/timm/test_vit3", 16),
    ("dpt/timm/convnext_atto", 32),
    ("dpt/timm/swin_tiny_patch4_window7_224", 32),
    ("dpt/timm/pvt_v2_b0", 32),
    ("dpt/timm/resnet18", 32),
    ("linear/timm/vit_tiny_patch16_224", 16),
    ("linear/resnet18", 8),
]
"""[Architecture/]backbone, and pixels of the image per pixel of the last feature map."""


def spec_of(name: str, stride: int) -> NetworkSpec:
    """A small network of an architecture on a backbone; PSPNet if none is named."""
    first, _, rest = name.partition("/")
    architecture, backbone = (first, rest) if first in ARCHITECTURES else ("pspnet", name)
    if backbone.startswith("timm/"):
        try:
            importlib.import_module("timm")
        except (ImportError, RuntimeError, OSError) as error:
            pytest.skip(f"timm cannot be imported: {error}")
    dilated = stride if stride in (8, 16) else 8
    return NetworkSpec(architecture, backbone, CLASSES, dilated, head_channels=16)  # ty: ignore


def build(spec: NetworkSpec, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return spec.build()


def pictures(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def shake(module: torch.nn.Module) -> None:
    """Scales and statistics of BatchNorm that are not all 0 and 1; a scale of 0 would let no gradient
    through."""
    generator = torch.Generator().manual_seed(5)
    for key, value in module.state_dict().items():
        if value.ndim == 1 and key.endswith(("weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
        elif value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("name", "stride"), NETWORKS)
def test_contract(name: str, stride: int, tmp_path: Path) -> None:
    spec = spec_of(name, stride)
    network = build(spec)
    assert network.classes == CLASSES and network.stride == stride
    sides = network.sides
    assert sides == spec.sides and sides.step == stride

    # The same seed gives the same network.
    again = build(spec).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in network.state_dict().items())

    # The backbone keeps to its stride.
    shake(network)
    height, width = sides.up(65), sides.up(33)
    features = network.backbone.eval()(torch.zeros(1, 3, height, width))
    assert tuple(stage.shape[1] for stage in features) == network.backbone.channels
    # A stem of patches (ConvNeXt) leaves the last pixel of a side out, padded convolutions do not.
    assert features.stage4.shape[2:] in [(height // stride + n, width // stride + n) for n in (0, 1)]

    # Training: outputs at input size, gradients reach every parameter but the frozen ones.
    network.train()
    height, width = sides.up(33), sides.up(49)
    labels = torch.randint(0, CLASSES, (2, height, width), generator=torch.Generator().manual_seed(1))
    output = network(pictures(2, 3, height, width))
    assert (output.auxiliary is not None) == (spec.architecture == "pspnet")
    outputs = [logits for logits in output if logits is not None]
    assert all(logits.shape == (2, CLASSES, height, width) for logits in outputs)
    torch.stack([F.cross_entropy(logits, labels) for logits in outputs]).sum().backward()
    trainable = {name: value for name, value in network.named_parameters() if value.requires_grad}
    frozen = {name for name, _ in network.named_parameters()} - trainable.keys()
    norms = {
        key for key, value in network.backbone.named_modules() if isinstance(value, torch.nn.BatchNorm2d)
    }
    caffe = name == "deeplabv2/resnet101_caffe"
    assert frozen == {f"backbone.{key}.{part}" for key in norms for part in ("weight", "bias") if caffe}
    for key, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key
    network.zero_grad()

    # Evaluation: main only, any legal size, one image at a time or many.
    network.eval()
    with torch.no_grad():
        height, width = sides.up(65), sides.up(33)
        images = pictures(2, 3, height, width)
        output = network(images)
        assert output.auxiliary is None
        assert output.main.shape == (2, CLASSES, height, width) and output.main.isfinite().all()
        single = network(images[1:]).main
        assert torch.allclose(single, output.main[1:], rtol=1e-4, atol=1e-4 * float(single.abs().max()))
        mean, std = (
            torch.tensor(part)[:, None, None] for part in (network.mean.tolist(), network.std.tolist())
        )
        assert torch.equal(network((images.float() - mean) / std).main, output.main)

    # Saved and read back: the same logits, to the bit.
    save_network(network, tmp_path / "network.safetensors", spec)
    loaded = load_network(tmp_path / "network.safetensors")
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images).main, output.main)

    # Parameter groups: every parameter exactly once, heads at ten times the rate.
    backbone_group, head_group = sgd(network).param_groups
    grouped = [id(parameter) for group in (backbone_group, head_group) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in trainable.values())
    slow = {id(value) for key, value in trainable.items() if key.startswith("backbone.")}
    assert {id(parameter) for parameter in backbone_group["params"]} == slow
    assert (backbone_group["factor"], head_group["factor"]) == (1, 10)
    assert backbone_group["weight_decay"] == head_group["weight_decay"] == 1e-4

    # Sizes.
    smallest, next_one = sides.down(1), sides.up(1, least=2)
    with pytest.raises(SizeError, match=f"^{next_one - 1} x {next_one + 1} .* {smallest} x {next_one} or"):
        network(pictures(1, 3, next_one - 1, next_one + 1))
    network(pictures(1, 3, smallest, smallest))


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet18_half", "resnet34", "resnet50", "resnet101"])
def test_shapes_of_plain_resnets(backbone: str, output_stride: int) -> None:
    with torch.device("meta"):  # shapes alone, nothing is computed
        network = NetworkSpec(backbone=backbone, classes=CLASSES, output_stride=output_stride).build()
        height, width = 33, 65
        output = network(torch.zeros(2, 3, height, width))
        assert output.auxiliary is not None
        assert output.main.shape == output.auxiliary.shape == (2, CLASSES, height, width)
        stages = network.backbone(torch.zeros(2, 3, height, width))
        for features, stride in zip(stages, (4, 8, output_stride, output_stride), strict=True):
            assert features.shape[2:] == ((height - 1) // stride + 1, (width - 1) // stride + 1)


# --- sizes and inputs


@pytest.fixture(scope="module")
def small() -> Network:
    return build(NetworkSpec(backbone="resnet18", classes=3, output_stride=8, head_channels=8)).eval()


@pytest.mark.parametrize("sides", [Sides(8), Sides(16), Sides(14, 0), Sides(1, 0)], ids=str)
@given(st.integers(-3, 200))
def test_sides_are_rounded_to_the_nearest_legal_ones(sides: Sides, side: int) -> None:
    legal = [sides.step * n + sides.offset for n in range(1, 300)]
    assert sides.is_legal(side) == (side in legal)
    assert sides.up(side) == min(candidate for candidate in legal if candidate >= side)
    assert sides.down(side) == max([candidate for candidate in legal if candidate <= side], default=legal[0])
    assert sides.up(side, least=2) == min(candidate for candidate in legal[1:] if candidate >= side)
    assert sides.nearest(side) == min(legal, key=lambda candidate: (abs(candidate - side), -candidate))


def test_sides_that_are_not_possible() -> None:
    for step, offset in ((0, 1), (8, -1)):
        with refused(SizeError, str(step), str(offset)):
            Sides(step, offset)


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_network_takes_only_legal_sizes(small: Network, height: int, width: int) -> None:
    legal = {8 * k + 1 for k in range(1, 40)}
    if {height, width} <= legal:
        small.sides.check(height, width)
    else:
        with pytest.raises(SizeError):
            small.sides.check(height, width)


def test_an_illegal_size_is_refused_with_the_nearest_legal_ones(small: Network) -> None:
    with refused(SizeError, "50 x 64", "8n + 1", "49 x 57 or 57 x 65"):
        small(torch.zeros(1, 3, 50, 64))
    with refused(SizeError, "3 x 9", "8n + 1", "9 x 9"):
        small(torch.zeros(1, 3, 3, 9))


def test_names_of_version_0_2_still_work_and_warn(small: Network) -> None:
    image = pictures(1, 3, 20, 30)[0].permute(1, 2, 0).contiguous().numpy()
    protocol, batch = Protocol((17, 17)), pictures(1, 3, 9, 9)
    with pytest.deprecated_call() as record:
        codes = small.predict(image, protocol).codes
        classes = darseg.predict_classes(small, image, protocol)
        normalized = small.normalise(batch)
        side = small.legal_side(20)
        small.check_size(9, 17)
    prediction = darseg.predict(small, image, protocol)
    assert (codes == prediction.codes).all() and (classes == prediction.classes).all()
    assert torch.equal(normalized, small.normalize(batch)) and side == 25
    assert [Path(warning.filename).name for warning in record] == [Path(__file__).name] * 5
    with pytest.deprecated_call():
        again = darseg.predict_classes(small, image, protocol, Memory())
    assert (again == classes).all()
    says(
        "\n".join(str(warning.message) for warning in record),
        *("darseg.predict(", "network.sides.up", "network.sides.check", "normalize", "0.4"),
    )


def test_other_inputs_are_refused(small: Network) -> None:
    with refused(DataError, "[1, 4, 9, 9]", "[B, 3, H, W]"):
        small(torch.zeros(1, 4, 9, 9))
    with refused(DataError, "int64", "uint8"):
        small(torch.zeros(1, 3, 9, 9, dtype=torch.int64))


def test_mean_std_and_fill(small: Network) -> None:
    assert np.allclose(small.mean.numpy() / 255, [0.485, 0.456, 0.406])
    assert np.allclose(small.std.numpy() / 255, [0.229, 0.224, 0.225])
    assert small.fill == (124, 116, 104)
    assert not any(name in ("mean", "std") for name, _ in small.named_parameters())


def test_timm_brings_its_own_mean_and_std() -> None:
    network = build(spec_of("timm/tf_efficientnet_lite0", 16))
    assert network.mean.tolist() == network.std.tolist() == [127.5] * 3
    assert network.fill == (128, 128, 128)


def test_without_auxiliary_head() -> None:
    network = build_network(backbone="resnet18", classes=3, head_channels=8, auxiliary=False)
    assert network(pictures(2, 3, 17, 17)).auxiliary is None
    assert not any("auxiliary" in key for key in network.state_dict())


def test_frozen_parameters_are_in_no_group() -> None:
    network = build_network(backbone="resnet18", classes=3, head_channels=8)
    frozen = next(network.backbone.parameters()).requires_grad_(False)
    grouped = [parameter for group in sgd(network).param_groups for parameter in group["params"]]
    assert len(grouped) == len(list(network.parameters())) - 1
    assert all(parameter is not frozen for parameter in grouped)


def test_defaults_are_the_papers_head() -> None:
    spec = NetworkSpec()
    assert (spec.architecture, spec.backbone, spec.classes) == ("pspnet", "resnet50", 19)
    assert (spec.output_stride, spec.head_channels, spec.auxiliary) == (8, 512, True)


# --- refusals


def test_all_faults_of_a_spec_at_once() -> None:
    facts = ("'fcn'", "pspnet", "is 1;", "output stride 4", "0 head channels", "class names is 2")
    with refused(RecipeError, *facts):
        NetworkSpec(architecture="fcn", classes=1, output_stride=4, head_channels=0, class_names=("a", "b"))


def test_unknown_backbone() -> None:
    with refused(RecipeError, "'resnet52'", "resnet50_deep", "timm/NAME"):
        build_network(backbone="resnet52")


@pytest.mark.parametrize(
    "fault",
    ["ImportError('no timm')", "RuntimeError('torchvision::nms does not exist')"],
    ids=["missing", "another torchvision"],
)
def test_timm_that_cannot_be_imported(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text(f"raise {fault}")
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    facts = ('pip install "darseg[timm]"', fault.split("'")[1], "timm/resnet18", "torchvision")
    with refused(RecipeError, *facts):
        build_network(backbone="timm/resnet18")


def test_timm_networks_that_do_not_exist_or_do_not_dilate() -> None:
    spec_of("timm/resnet18", 16)  # skips if timm is not installed
    with refused(RecipeError, "'resnet18x'", vary=[r"timm [\d.]+", r"(?<=are ).*(?=\. See)"]):
        build_network(backbone="timm/resnet18x")
    with refused(RecipeError, "timm/hrnet_w18_small", "stride 8", "stride 16", vary=[r"\(.*\)"]):
        build_network(backbone="timm/hrnet_w18_small", output_stride=8)
    with refused(RecipeError, "timm/vit_tiny_patch16_224", "cannot be dilated", "dpt"):
        build_network(backbone="timm/vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "size, patches, width, projections",
    [
        ("large", 14, 256, [256, 512, 1024, 1024]),
        ("giant", 14, 384, [1536] * 4),
    ],
)
def test_the_large_networks_of_dinov2_have_published_shapes(
    size: str, patches: int, width: int, projections: list[int]
) -> None:
    """Without memory for their weights; the smaller two are compared with released networks in test_convert.py."""
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = NetworkSpec("dpt", f"timm/vit_{size}_patch14_dinov2", 21).build()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    levels = [shape for name, shape in shapes.items() if ".levels." in name and name.endswith(".0.weight")]
    assert [shape[:2] for shape in levels] == [(kept, projections[-1]) for kept in projections]
    (classifier,) = [shape for name, shape in shapes.items() if name.endswith("classifier.weight")]
    assert classifier == (21, width, 1, 1) and network.sides.step == patches


def test_backbones_that_dpt_cannot_take() -> None:
    spec_of("timm/resnet18", 16)  # skips if timm is not installed
    with refused(RecipeError, "resnet50", "timm/resnet50"):
        build_network("dpt", "resnet50")
    with refused(RecipeError, "timm/levit_128s", "strides 4, 8, 16 and 32", "[16, 32, 64]"):
        build_network("dpt", "timm/levit_128s")
    with refused(RecipeError, "timm/maxvit_nano_rw_256", "any size", vary=[r"(?<=- ).*"]):
        build_network("dpt", "timm/maxvit_nano_rw_256")
    with refused(RecipeError, "timm/vit_tiny_r_s16_p8_224", vary=[r"(?<=- ).*"]):
        build_network("dpt", "timm/vit_tiny_r_s16_p8_224")
    with refused(RecipeError, "timm/xcit_nano_12_p16_224", "any size", vary=[r"\(.*\)"]):
        build_network("dpt", "timm/xcit_nano_12_p16_224")


# --- slow oracles, written from the description


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{key}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def slow_pool(x: Tensor) -> Tensor:
    """3x3 maxima at every second pixel, the last included although a window reaches beyond the border there."""
    height, width = (math.ceil((side - 1) / 2) + 1 for side in x.shape[2:])
    out = torch.zeros(*x.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
            out[:, :, i, j] = x[:, :, rows, columns].amax((2, 3))
    return out


def dilated_resnet(
    name: str, state: dict[str, Tensor], x: Tensor, output_stride: int, *, dilate_first: bool
) -> list[Tensor]:
    plan, caffe = RESNETS[name], name == "resnet101_caffe"
    if plan.deep_stem:
        for index, stride in ((1, 2), (2, 1), (3, 1)):
            x = F.conv2d(x, state[f"conv{index}.weight"], stride=stride, padding=1)
            x = norm(state, f"bn{index}", x).relu()
    else:
        x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)).relu()
    x = slow_pool(x) if caffe else F.max_pool2d(x, 3, 2, 1)
    strides = {8: (1, 2, 1, 1), 16: (1, 2, 2, 1)}[output_stride]
    dilations = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2)}[output_stride]
    stages = []
    for stage in range(4):
        block = 0
        while f"layer{stage + 1}.{block}.conv1.weight" in state:
            key, y = f"layer{stage + 1}.{block}", x
            stride, strided = strides[stage] if block == 0 else 1, False
            for index in (1, 2, 3):
                weight = state.get(f"{key}.conv{index}.weight")
                if weight is None:
                    continue
                three = weight.shape[-1] == 3
                dilation = dilations[stage] if three else 1
                if three and block == 0 and not dilate_first:
                    dilation = dilations[max(0, stage - 1)]
                step = stride if (three or caffe) and not strided else 1
                strided |= three or caffe
                y = F.conv2d(y, weight, stride=step, padding=dilation if three else 0, dilation=dilation)
                y = norm(state, f"{key}.bn{index}", y)
                if f"{key}.conv{index + 1}.weight" in state:
                    y = y.relu()
            if f"{key}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
                x = norm(state, f"{key}.downsample.1", x)
            x = (x + y).relu()
            block += 1
        stages.append(x)
    return stages


@pytest.mark.parametrize(
    ("name", "output_stride", "size"),
    [
        ("resnet18", 8, (49, 65)),
        ("resnet18", 16, (49, 65)),
        ("resnet18_half", 8, (49, 65)),
        ("resnet50", 8, (49, 65)),
        ("deeplabv3plus/resnet50", 8, (49, 65)),
        ("resnet50_deep", 16, (49, 65)),
        ("deeplabv3plus/resnet50_deep", 16, (49, 65)),
        ("resnet101_caffe", 8, (49, 33)),
        # Before pooling 26 x 20 pixels: whether sizes are rounded up shows. A network refuses such sides, a backbone
        # takes them.
        ("resnet101_caffe", 16, (51, 40)),
    ],
)
def test_resnets_against_the_oracle(name: str, output_stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    architecture, _, name = name.rpartition("/")
    spec = NetworkSpec(architecture or "pspnet", name, 3, output_stride, head_channels=8)  # ty: ignore
    backbone = spec.build().backbone
    shake(backbone.eval())
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = dilated_resnet(
            name, backbone.state_dict(), x, output_stride, dilate_first=architecture != "deeplabv3plus"
        )
        for features, expected in zip(backbone(x), wanted, strict=True):
            assert features.shape == expected.shape
            assert torch.allclose(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def slow_upsample(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Corners on corners, between the four neighbors linearly."""
    out = np.zeros((x.shape[0], height, width))
    for row in range(height):
        for column in range(width):
            y = row * (x.shape[1] - 1) / max(1, height - 1)
            z = column * (x.shape[2] - 1) / max(1, width - 1)
            for i in {math.floor(y), math.ceil(y)}:
                for j in {math.floor(z), math.ceil(z)}:
                    out[:, row, column] += (1 - abs(y - i)) * (1 - abs(z - j)) * x[:, i, j]
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(2, 9), st.integers(2, 9))
def test_upsample_against_the_oracle(h: int, w: int, height: int, width: int) -> None:
    x = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(h * 7 + w))
    assert np.allclose(
        upsample(x, (height, width))[0].numpy(), slow_upsample(x[0].numpy(), height, width), atol=1e-5
    )


@pytest.mark.parametrize("size", [(2, 2), (7, 5), (6, 13)])
def test_pyramid_pooling_against_the_oracle(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = PyramidPoolingHead(8, 5, 3).eval()
    shake(head)
    state = head.state_dict()
    height, width = size
    x = torch.randn(1, 8, *size)
    parts = [x]
    for index, bins in enumerate(BINS):
        pooled = torch.zeros(1, 8, bins, bins)
        for i in range(bins):
            for j in range(bins):
                rows = slice(i * height // bins, -(-(i + 1) * height // bins))
                columns = slice(j * width // bins, -(-(j + 1) * width // bins))
                pooled[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
        y = F.conv2d(pooled, state[f"branches.{index}.conv.weight"])
        y = norm(state, f"branches.{index}.norm", y).relu()
        parts.append(torch.from_numpy(slow_upsample(y[0].numpy(), *size)).float()[None])
    y = F.conv2d(torch.cat(parts, 1), state["fuse.conv.weight"], padding=1)
    y = norm(state, "fuse.norm", y).relu()
    wanted = F.conv2d(y, state["classifier.weight"], state["classifier.bias"])
    with torch.no_grad():
        assert torch.allclose(head(Features(x, x, x, x)), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 6), (13, 45), (90, 90), (1, 7)])
@pytest.mark.parametrize("bins", BINS)
def test_pooling_by_products_is_adaptive_pooling(bins: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = F.adaptive_avg_pool2d(x, bins)
    pooled = pool_by_products(x, bins)
    assert pooled.shape == wanted.shape and torch.allclose(pooled, wanted, atol=1e-6)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (pooled, wanted)]
    assert torch.allclose(*gradients, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = pool_by_products(x.detach().bfloat16(), bins)
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), wanted, atol=0.02)
    large = torch.full((1, 2, *size), 1000.0).half()  # sums of 90 x 90 pixels are beyond fp16
    assert torch.allclose(pool_by_products(large, bins), large[:, :, :1, :1], rtol=2e-3)


@pytest.mark.parametrize(("branches", "size"), [(4, (29, 9)), (2, (9, 29)), (4, (1, 2))])
def test_atrous_head_against_the_oracle(branches: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = AtrousHead(6, 3, branches)
    state, x = head.state_dict(), torch.randn(2, 6, *size)
    assert len(state) == 8  # all four branches are kept, whatever is summed
    assert [branch.weight.requires_grad for branch in head.branches] == [
        index < branches for index in range(4)
    ]
    wanted = torch.zeros(2, 3, *size)
    for index, dilation in enumerate((6, 12, 18, 24)[:branches]):
        padded = F.pad(x, (dilation,) * 4)
        wanted += state[f"branches.{index}.bias"][:, None, None]
        for i in range(3):
            for j in range(3):
                rows = slice(i * dilation, i * dilation + size[0])
                columns = slice(j * dilation, j * dilation + size[1])
                weight = state[f"branches.{index}.weight"][:, :, i, j]
                wanted += torch.einsum("kc,bchw->bkhw", weight, padded[:, :, rows, columns])
    with torch.no_grad():
        assert torch.allclose(head(Features(x, x, x, x)), wanted, atol=1e-5)


def slow_conv(state: dict[str, Tensor], key: str, x: Tensor, dilation: int = 1) -> Tensor:
    """A convolution that keeps the size, its BatchNorm if there is one, and ReLU."""
    weight = state[f"{key}.conv.weight"]
    padding = dilation * (weight.shape[-1] // 2)
    return norm(state, f"{key}.norm", F.conv2d(x, weight, padding=padding, dilation=dilation)).relu()


@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplabv3plus_head_against_the_oracle(output_stride: int) -> None:
    torch.manual_seed(0)
    head = DeepLabV3PlusHead(6, 8, 5, classes=3, output_stride=output_stride).eval()
    shake(head)
    state = head.state_dict()
    low, high = torch.randn(2, 6, 29, 33), torch.randn(2, 8, 15, 17)
    parts = [slow_conv(state, "branches.0", high)]
    for index, dilation in enumerate((6, 12, 18), start=1):
        parts.append(slow_conv(state, f"branches.{index}", high, dilation * 16 // output_stride))
    whole = slow_conv(state, "whole", torch.stack([x.mean((1, 2)) for x in high])[:, :, None, None])
    parts.append(whole * torch.ones(1, 1, 15, 17))
    y = slow_conv(state, "project", torch.cat(parts, 1))
    y = torch.stack([torch.from_numpy(slow_upsample(x.numpy(), 29, 33)).float() for x in y])
    y = torch.cat([slow_conv(state, "reduce", low), y], 1)
    y = slow_conv(state, "fuse.1", slow_conv(state, "fuse.0", y))
    wanted = F.conv2d(y, state["classifier.weight"], state["classifier.bias"])
    with torch.no_grad():
        assert torch.allclose(head(Features(low, low, high, high)), wanted, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [(37, 5), (37, 9), (4, 11), (7, 7)])
def test_positions_are_resized_as_pytorch_does_with_a_scale_factor(before: int, after: int) -> None:
    grid = torch.randn(before, before, 3, generator=torch.Generator().manual_seed(before))
    scale = (after + POSITION_OFFSET) / before
    weights = resizing(before, after, scale=torch.tensor(scale, dtype=torch.float64), like=grid)
    wanted = F.interpolate(
        grid.permute(2, 0, 1)[None], scale_factor=(scale, scale), mode="bicubic", align_corners=False
    )
    assert wanted.shape[2:] == (after, after)
    ours = torch.einsum("hi,ijc,wj->chw", weights, grid, weights)
    assert torch.allclose(ours, wanted[0], atol=1e-4)


def test_stochastic_depth_acts_in_training_only() -> None:
    spec = spec_of("dpt/timm/vit_tiny_patch16_224", 16)
    torch.manual_seed(0)
    network, plain = spec.build(drop_path=0.5), build(spec)
    assert network.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(network.state_dict())
    images = pictures(2, 3, 32, 48)
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = network(images).main, network(images).main
        assert not torch.allclose(first, second)
        assert torch.equal(network.eval()(images).main, plain.eval()(images).main)
    with refused(RecipeError, "resnet18", "stochastic depth"):
        NetworkSpec(backbone="resnet18").build(drop_path=0.5)


def test_new_convolutions_of_deeplabv2_have_a_standard_deviation_of_a_hundredth() -> None:
    torch.manual_seed(0)
    weights = torch.cat([branch.weight.detach().flatten() for branch in AtrousHead(64, 9).branches])
    assert abs(float(weights.std()) - 0.01) < 1e-4 and abs(float(weights.mean())) < 1e-4


# --- what tells DeepLabv2 from PSPNet in training


def test_frozen_scales_stay_while_statistics_change() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network("deeplabv2", "resnet101_caffe", 3, 16)
    shake(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = sgd(network)
    set_rates(optimizer, 0.1)
    labels = torch.zeros(2, 17, 17, dtype=torch.long)
    F.cross_entropy(network(pictures(2, 3, 17, 17)).main, labels).backward()
    optimizer.step()
    for key, value in network.state_dict().items():
        part = key.rpartition(".")[2]
        frozen = key in ("mean", "std") or (key.startswith("backbone.") and value.ndim == 1)
        moves = part in ("running_mean", "running_var", "num_batches_tracked") or not frozen
        assert torch.equal(value, before[key]) != moves, key


def test_two_branches_instead_of_four() -> None:
    two, four = (
        build(NetworkSpec("deeplabv2", "resnet18", 3, auxiliary=False, release_classifier=release)).eval()
        for release in (True, False)
    )
    assert two.state_dict().keys() == four.state_dict().keys()
    four.load_state_dict(two.state_dict())
    images = pictures(1, 3, 33, 33)
    with torch.no_grad():
        assert not torch.allclose(two(images).main, four(images).main)
        for branch in four.head.branches[2:]:  # ty: ignore
            branch.weight.zero_(), branch.bias.zero_()
        assert torch.allclose(two(images).main, four(images).main, atol=1e-6)
    names = {name for name, value in two.named_parameters() if not value.requires_grad}
    assert names == {f"head.branches.{index}.{part}" for index in (2, 3) for part in ("weight", "bias")}
    with refused(RecipeError, "release_classifier", "deeplabv2"):
        build_network(backbone="resnet18", release_classifier=True)


def test_stage_4_learns_at_the_heads_rate_as_in_the_release() -> None:
    with torch.device("meta"):
        network = build_network("deeplabv2", "resnet101_caffe", 3)
    named = {id(value): name for name, value in network.named_parameters()}
    backbone, heads = (
        {named[id(value)] for value in group["params"]}
        for group in sgd(network, stage4_as_head=True).param_groups
    )
    assert {".".join(name.split(".")[:2]) for name in heads} == {"backbone.layer4", "head.branches"}
    assert {name.split(".")[1] for name in backbone} == {"conv1", "layer1", "layer2", "layer3"}
    trainable = {name for name, value in network.named_parameters() if value.requires_grad}
    assert backbone | heads == trainable and not backbone & heads
