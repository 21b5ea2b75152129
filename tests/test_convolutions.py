"""Convolutions replaced by faster ones, and folded BatchNorm, compared with PyTorch's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from darseg.model.backbone import Features
from darseg.model.convolutions import DilatedDepthwise
from darseg.model.fold import fold_batchnorm
from darseg.model.heads import ConvNormReLU, LinearHead
from darseg.model.network import Network
from darseg.model.sides import Sides
from darseg.model.weights import save_network
from darseg.run.build import load_to_predict
from test_networks import NETWORKS, build, pictures, shake, spec_of


@pytest.fixture
def timm() -> Any:
    spec_of("timm/resnet18", 16)  # skips if timm is not installed
    return importlib.import_module("timm")


# --- dilated depthwise convolutions


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(2, 4),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([3, 5, 7])),
    dilation=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_dilated_depthwise_convolution_equals_pytorchs(
    batch, channels, size, kernel, dilation, bias, channels_last, seed
) -> None:
    torch.manual_seed(seed)
    padding = tuple(step * (side - 1) // 2 for step, side in zip(dilation, kernel, strict=True))
    ours = DilatedDepthwise(
        channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=bias
    ).double()
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, channels, *size, dtype=torch.float64).contiguous(memory_format=order)
    upstream = torch.randn_like(x)

    def run(forward: Any) -> list[Tensor]:
        given_x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = forward(given_x)
        return [y, *torch.autograd.grad(y, [given_x, *ours.parameters()], upstream)]

    theirs = run(lambda x: F.conv2d(x, ours.weight, ours.bias, 1, padding, dilation, channels))
    for trained, expected in zip(run(ours), theirs, strict=True):
        assert trained.shape == expected.shape
        torch.testing.assert_close(trained, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs[0])
        assert torch.equal(ours.eval()(x), theirs[0])


def test_bfloat16_goes_through_a_dilated_depthwise_convolution() -> None:
    torch.manual_seed(0)
    ours = DilatedDepthwise(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
    x = torch.randn(2, 8, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(x), rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.float32


# --- timm's networks with their convolutions exchanged

EXCHANGED = [
    ("tf_efficientnet_lite0", 16, DilatedDepthwise),
    ("tf_efficientnet_lite0", 8, DilatedDepthwise),
    ("tf_efficientnetv2_b0", 16, DilatedDepthwise),
    ("tf_mixnet_s", 16, DilatedDepthwise),
    ("tf_mobilenetv3_small_minimal_100", 8, DilatedDepthwise),
    ("mobilenetv3_small_100", 8, DilatedDepthwise),
    ("convnext_atto", 16, DilatedDepthwise),
    ("resnet18", 16, None),
]


@pytest.mark.parametrize(("name", "stride", "wanted"), EXCHANGED)
@pytest.mark.parametrize("size", [(17, 33), (81, 49)])
def test_replaced_convolutions_equal_timms(timm, name, stride, wanted, size) -> None:
    ours = build(spec_of(f"timm/{name}", stride)).backbone
    theirs = timm.create_model(name, features_only=True, output_stride=stride, pretrained=False)
    shake(ours)
    theirs.load_state_dict(ours.body.state_dict())  # the same names
    for network in (ours.double(), theirs.double()):
        for module in network.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
                module.p = module.drop_prob = 0.0
    kinds = [type(module) for module in ours.modules()]
    if wanted is not None:
        assert wanted in kinds
    same = [m for m in theirs.modules() if type(m).__name__ == "Conv2dSame" and m.kernel_size[0] % 2]
    assert bool(same) == name.startswith("tf_")
    left = [m for m in ours.modules() if type(m).__name__ == "Conv2dSame" and m.kernel_size[0] % 2]
    assert not left

    images = pictures(3, 3, *size).double() / 64 - 2
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        ours.zero_grad(), theirs.zero_grad()
        features, expected = ours(images), theirs(images)[-4:]
        sum(part.square().sum() for part in features).backward()
        sum(part.square().sum() for part in expected).backward()
        pairs = list(zip(features, expected, strict=True))
        pairs += [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
        pairs += list(zip(ours.buffers(), theirs.buffers(), strict=True))
        for actual, reference in pairs:
            assert (actual is None) == (reference is None)
            if actual is not None:
                torch.testing.assert_close(actual, reference, rtol=1e-8, atol=1e-8)


# --- BatchNorm folded


def logits(network: Network, *shape: int) -> Tensor:
    with torch.no_grad():
        return network(pictures(2, 3, *shape)).main


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("name", "stride"), [*NETWORKS, ("timm/resnet26d", 16)])
def test_folded_networks_give_the_same_logits(name: str, stride: int) -> None:
    """In float64, where rounding is far below any mistake, whatever kernels the processor has."""
    network = build(spec_of(name, stride)).eval()
    shake(network)
    network.double()
    size = network.sides.up(65), network.sides.up(97)
    before = logits(network, *size)
    foldable = (
        [network.backbone] if isinstance(network.head, LinearHead) else [network.backbone, network.head]
    )
    norms = [module for part in foldable for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    folded = fold_batchnorm(network)
    assert folded is network and not folded.training
    assert not any(module.training for module in folded.modules())
    if not isinstance(network.head, LinearHead):  # its BatchNorm has no convolution before it
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.head.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.backbone.modules())
    after = logits(network, *size)
    if not norms:
        assert torch.equal(after, before)
        return
    assert not torch.equal(after, before)  # something was done
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10 * float(before.abs().max()))


def test_what_predicts_can_be_loaded_in_inference_mode(tmp_path: Path) -> None:
    spec = spec_of("resnet18", 16)
    save_network(build(spec), tmp_path / "network.safetensors", spec)
    with torch.inference_mode():
        network = load_to_predict(tmp_path / "network.safetensors")
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.backbone.modules())
        assert network(pictures(1, 3, 33, 33)).main.isfinite().all()


class Odd(nn.Module):
    """A backbone in which only one BatchNorm may be folded: the others' inputs are used elsewhere, or they run twice."""

    mean, std = (120.0, 120.0, 120.0), (60.0, 60.0, 60.0)
    stride, sides = 8, Sides(8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 8, 1), nn.BatchNorm2d(8)
        self.shared, self.shared_norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.twice, self.after, self.again = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.left, self.right, self.norm = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.peeked, self.peeked_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.first = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Features:
        x = self.first(self.stem_norm(self.stem(images)))
        both = self.shared(x)
        x = both + self.shared_norm(both)
        x = self.after(self.twice(x)) + self.again(self.twice(x.relu()))
        x = self.norm(self.left(x)) + self.norm(self.right(x))
        x = self.peeked_norm(self.peeked(x)) + self.peeked.weight.mean()
        return Features(x, x, x, x)


class Wayward(Odd):
    """A backbone that depends on values, so that it cannot be traced with symbols."""

    def forward(self, images: Tensor) -> Features:
        return super().forward(images if images.sum() > 0 else -images)


class LastStage(ConvNormReLU):
    """A head."""

    def forward(self, x: Features) -> Tensor:  # ty: ignore[invalid-method-override]
        return super().forward(x.stage4)


def with_backbone(backbone: nn.Module) -> Network:
    network = Network(backbone, LastStage(8, 5, 1), None, classes=5)  # ty: ignore[invalid-argument-type]
    shake(network)
    return network.eval().double()


@pytest.mark.parametrize("kind", [Odd, Wayward])
def test_batchnorms_whose_inputs_have_other_consumers_stay(kind: type[Odd]) -> None:
    torch.manual_seed(0)
    backbone = kind()
    network = with_backbone(backbone)
    before = logits(network, 33, 41)
    norms = {name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    fold_batchnorm(network)
    left = {name for name, module in network.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms - left == {"stem_norm"}
    torch.testing.assert_close(
        logits(network, 33, 41), before, rtol=0, atol=1e-10 * float(before.abs().max())
    )


def test_timms_batchnorm_keeps_its_activation(timm) -> None:
    backbone = Odd()
    backbone.stem_norm = timm.layers.BatchNormAct2d(8, act_layer=nn.Hardtanh)
    network = with_backbone(backbone)
    before = logits(network, 33, 41)
    fold_batchnorm(network)
    assert not isinstance(backbone.stem_norm, nn.BatchNorm2d)
    torch.testing.assert_close(
        logits(network, 33, 41), before, rtol=0, atol=1e-10 * float(before.abs().max())
    )


class Scaled(nn.BatchNorm2d):
    """A subclass of BatchNorm that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Standardized(nn.Conv2d):
    """A convolution that does not multiply by its weights themselves."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight / self.weight.std(), self.bias, self.stride, self.padding)


def watched(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    return norm


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("stem_norm", Scaled(8)),
        ("stem_norm", nn.BatchNorm2d(8, track_running_stats=False)),
        ("stem_norm", watched(nn.BatchNorm2d(8))),
        ("stem", watched(nn.Conv2d(3, 8, 3, 8, 1))),
        ("stem", Standardized(3, 8, 3, 8, 1)),
        ("stem", parametrizations.weight_norm(nn.Conv2d(3, 8, 3, 8, 1))),
    ],
)
def test_subclasses_and_hooked_modules_stay(name: str, module: nn.Module) -> None:
    backbone = Odd()
    setattr(backbone, name, module)
    network = with_backbone(backbone)
    before = logits(network, 33, 41)
    fold_batchnorm(network)
    assert getattr(network.backbone, name) is module
    torch.testing.assert_close(
        logits(network, 33, 41), before, rtol=0, atol=1e-10 * float(before.abs().max())
    )
