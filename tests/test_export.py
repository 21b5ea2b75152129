"""Exported networks: the same classes and logits from the file at any size; what is refused, leaving no file."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import darseg
from conftest import REPOSITORY, recipe_dict, thorough
from darseg.data.classes import ClassSet
from darseg.demo.scenes import draw_scene
from darseg.errors import ExportError, NumericsError
from darseg.model import backbone, export
from darseg.model.export import (
    Portable,
    mean_of_cells,
    metadata_of,
    padded_side,
    same_padding,
    write_exported,
)
from darseg.model.network import Network, NetworkSpec
from darseg.model.parity import CROPS, LEAST_STEPS, SUFFIXES, Parity, Runner, compare
from darseg.model.predict import predict_scores
from darseg.model.sides import Sides
from darseg.model.weights import save_network
from darseg.model.windows import Protocol
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.settings import Inputs
from test_networks import NETWORKS, spec_of
from wording import refused, says

torch.set_num_threads(1)

NAMES = ('<script>alert("1")</script>', "it's 100 % 'grün' 🚗", " ", "x" * 300, "null")
COLORS = ((1, 2, 3), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9))
SIZES = [(1, 65, 33), (2, 40, 100), (3, 97, 81), (1, 9, 10), (1, 1, 1), (2, 1, 70)]
"""Images, height, width; legal sides among them, and sides smaller than any legal one."""


def scenes(count: int, height: int, width: int) -> np.ndarray:
    """Drawn images uint8 [count, height, width, 3], cut from the middle if smaller than scenes can be."""
    whole = (max(65, height), max(65, width))
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    drawn = [draw_scene(11, index, whole)[0] for index in range(count)]
    return np.stack([image[top : top + height, left : left + width] for image in drawn])


def settled(spec: NetworkSpec) -> Network:
    """Random weights, statistics of BatchNorm as of drawn scenes: all parts of the network matter, classes vary."""
    torch.manual_seed(0)
    network = spec.build()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        size = network.sides.up(65), network.sides.up(97)
        network(torch.from_numpy(scenes(4, *size)).permute(0, 3, 1, 2))
    return network.eval()


def one_window(network: Network, images: np.ndarray) -> np.ndarray:
    """Logits of the sliding window where one covers the image; tiny images are padded to two steps."""
    sides = [network.sides.up(side, least=2) for side in images.shape[1:3]]
    protocol = Protocol((sides[0], sides[1]), mirror=False)
    return np.stack(
        [
            predict_scores(network, image, protocol, average="logits").mean(0, image.shape[0]).numpy()
            for image in images
        ]
    )


@pytest.fixture(scope="module")
def spec() -> NetworkSpec:
    return NetworkSpec(
        backbone="resnet18_half",
        classes=5,
        output_stride=16,
        head_channels=16,
        class_names=NAMES,
        class_colors=COLORS,
    )


@pytest.fixture(scope="module")
def network(spec: NetworkSpec) -> Network:
    return settled(spec)


@pytest.fixture(scope="module")
def run_folder(spec: NetworkSpec, network: Network, tiny_data: Path, tmp_path_factory) -> Path:
    """A run folder with one finished round of this network, on the tiny data."""
    run = RunDirectory(tmp_path_factory.mktemp("run") / "run")
    run.round(0).mkdir(parents=True)
    recipe = recipe_dict(tiny_data)
    recipe["data"]["classes"] = dict(zip(NAMES, map(list, COLORS), strict=True))
    recipe["data"]["label_values"] = "index"
    run.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    save_network(network, run.network(0), spec)
    run.finish(
        0,
        "train",
        inputs=Inputs({}),
        outputs=["network.safetensors"],
        seconds=1.0,
        facts={"steps": 6},
    )
    return run.root


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory) -> dict[str, tuple[Path, Parity]]:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("exported")
    paths = {suffix: folder / f"network{suffix}" for suffix in SUFFIXES}
    return {suffix: (path, darseg.export_network(run_folder, path)) for suffix, path in paths.items()}


def runner(path: Path) -> Runner:
    return export._onnx_runner(path) if path.suffix == ".onnx" else export._pt2_runner(path)


# --- the parts


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 6]))
def test_means_of_cells_are_adaptive_pooling(height: int, width: int, bins: int) -> None:
    features = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    assert torch.allclose(mean_of_cells(features, bins), F.adaptive_avg_pool2d(features, bins), atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from([8, 16]))
def test_padded_sides_are_the_smallest_legal_ones(side: int, stride: int) -> None:
    legal = [stride * n + 1 for n in range(2, 50)]
    smallest = min(candidate for candidate in legal if candidate >= side)
    assert padded_side(side, Sides(stride)) == Sides(stride).up(side, LEAST_STEPS) == smallest


@given(st.integers(1, 300), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_same_padding_is_the_least_that_keeps_every_stride(
    side: int, kernel: int, stride: int, dilation: int
) -> None:
    def outputs(padding: int) -> int:
        return (side + padding - dilation * (kernel - 1) - 1) // stride + 1

    padding = same_padding(side, kernel, stride, dilation)
    assert outputs(padding) >= math.ceil(side / stride)
    assert padding == 0 or outputs(padding - 1) < math.ceil(side / stride)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("name", "stride"), NETWORKS)
def test_padding_and_cropping_as_the_sliding_window_does(name: str, stride: int) -> None:
    network = settled(spec_of(name, stride)).double()  # rounding grows through a hundred layers
    for images in (scenes(2, 50, 41), scenes(1, 33, 65)):
        with torch.no_grad():
            classes, logits = Portable(network)(torch.from_numpy(images))
        expected = one_window(network, images)
        assert np.allclose(logits.numpy(), expected, atol=1e-5 * np.abs(expected).max())
        assert classes.dtype == torch.uint8 and torch.equal(classes.long(), logits.argmax(1))


# --- files


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_give_the_networks_logits_at_any_size(
    suffix: str, network: Network, exported: dict[str, tuple[Path, Parity]]
) -> None:
    run = runner(exported[suffix][0])
    for size in SIZES:
        images = scenes(*size)
        classes, logits = run(images)
        expected = one_window(network, images)
        assert classes.dtype == np.uint8 and logits.dtype == np.float32
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
        assert (classes == expected.argmax(1)).mean() > 0.999
        assert min(size[1:]) < 9 or len(np.unique(classes)) > 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_is_checked_on_its_validation_images(
    suffix: str, exported: dict[str, tuple[Path, Parity]]
) -> None:
    parity = exported[suffix][1]
    crops = sum(2 * int(65 * down) * int(97 * right) for down, right in CROPS)
    assert (parity.images, parity.crops, parity.pixels) == (3, 4, 3 * 65 * 97 + crops)
    assert parity.worst >= 0.999 and 0 < parity.difference < 1e-4 * parity.reach


def test_metadata(exported: dict[str, tuple[Path, Parity]], run_folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported[".onnx"][0])
    inside = {"darseg.json": ""}
    torch.export.load(exported[".pt2"][0], extra_files=inside)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(inside["darseg.json"]) == texts
    known = {key: json.loads(text) for key, text in texts.items()}
    assert known["class_names"] == list(NAMES)
    assert known["class_colors"] == [list(color) for color in COLORS]
    assert (known["ignore_index"], known["stride"]) == (255, 16)
    assert (known["side_step"], known["side_offset"]) == (16, 1)
    assert known["darseg_version"] == darseg.__version__
    assert known["network"]["backbone"] == "resnet18_half" and "class_names" not in known["network"]
    assert known["source_sha256"] == digest_path(RunDirectory(run_folder).network(0))
    assert known["training"] == {"round": 0, "labeling_ratio": None, "steps": 6}
    sides = [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", "height", "width", 3]
    assert [value.name for value in model.graph.output] == ["classes", "logits"]


def test_files_hold_nothing_about_this_machine(exported: dict[str, tuple[Path, Parity]]) -> None:
    for path, _ in exported.values():
        data = path.read_bytes()
        assert not any(
            str(folder).encode() in data for folder in (REPOSITORY, Path(torch.__file__).parent, Path.home())
        )
        assert sorted(file.name for file in path.parent.iterdir()) == ["network.onnx", "network.pt2"]


def test_the_script_of_the_docs_as_printed(
    network: Network, exported: dict[str, tuple[Path, Parity]], tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), re.DOTALL)
    (script,) = (block for block in blocks if "onnxruntime" in block)
    assert len(script.splitlines()) <= 15 and "darseg" not in script
    (tmp_path / "script.py").write_text(script)
    for library in ("darseg", "torch"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('not installed here')")
    (tmp_path / "network.onnx").write_bytes(exported[".onnx"][0].read_bytes())
    Image.fromarray(scenes(1, 75, 101)[0]).save(tmp_path / "photo.jpg")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image = np.array(Image.open(tmp_path / "photo.jpg").convert("RGB"))
    expected = one_window(network, image[None])[0].argmax(0)
    drawn = np.asarray(Image.open(tmp_path / "classes.png"))
    assert (drawn == np.array(COLORS)[expected]).all(-1).mean() > 0.999
    assert all(name in done.stdout for name in NAMES)
    assert f"{(expected == 1).mean():.1%}" in done.stdout


def assert_exported(network: Network, path: Path, varied: bool = True) -> None:
    """Right at other sizes than those it was checked on. varied: whether it says more than one class of an image."""
    images = {str(index): image for index, image in enumerate(scenes(2, 70, 91))}
    assert write_exported(network, path, images, metadata={}).worst >= 0.999
    run = runner(path)
    for size in ((3, 65, 97), (1, 120, 50)):
        classes, logits = run(scenes(*size))
        expected = one_window(network, scenes(*size))
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
        assert (classes == expected.argmax(1)).mean() >= 0.999
        assert len(np.unique(classes)) > 1 or not varied


# All networks at their full depth: benchmarks/export.py, its table in docs/export.md.


@pytest.mark.slow
@thorough
def test_pooling_that_rounds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    plan = backbone.RESNETS["resnet101_caffe"]._replace(depths=(1, 1, 1, 1))
    monkeypatch.setitem(backbone.RESNETS, "resnet101_caffe", plan)
    assert_exported(settled(spec_of("deeplabv2/resnet101_caffe", 8)), tmp_path / "network.onnx")


class SamePadded(torch.nn.Module):
    """A backbone of two of timm's convolutions whose padding depends on the size of what comes in."""

    name = "same-padded"

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = pytest.importorskip("timm.layers")
        self.first = layers.create_conv2d(3, 8, 5, stride=4, padding="same")
        self.second = layers.create_conv2d(8, channels, 3, stride=4, padding="same")

    def forward(self, images: torch.Tensor) -> backbone.Features:
        features = self.second(self.first(images).relu()).relu()
        return backbone.Features(*[features] * 4)


@pytest.mark.slow
@thorough
def test_padding_that_depends_on_the_size(spec: NetworkSpec, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    spec_of("timm/resnet18", 16)  # skips if timm is not installed
    network = settled(spec)
    network.backbone = SamePadded(network.backbone.channels[-1]).eval()  # ty: ignore
    padding = sys.modules["timm.layers.padding"]
    theirs = padding.get_same_padding
    assert_exported(network, tmp_path / "network.onnx", varied=False)
    assert padding.get_same_padding is theirs


def with_positions(network: Network) -> Network:
    """A transformer whose positions matter as much as its patches, and whose mean logits are 0, so that classes vary."""
    torch.manual_seed(1)
    torch.nn.init.normal_(network.backbone.body.pos_embed)  # ty: ignore
    with torch.no_grad():
        size = network.sides.up(65), network.sides.up(97)
        logits = network(torch.from_numpy(scenes(4, *size)).permute(0, 3, 1, 2)).main
        network.head.classifier.bias -= logits.mean((0, 2, 3))  # ty: ignore
    return network


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".pt2", marks=thorough)])
def test_dpt_on_dinov2(suffix: str, tmp_path: Path) -> None:
    """Its positions at any size."""
    pytest.importorskip("onnxruntime")
    network = with_positions(settled(spec_of("dpt/timm/vit_small_patch14_dinov2", 14)))
    assert_exported(network, tmp_path / f"network{suffix}")


# --- the comparison


def reference(network: Network) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = one_window(network, images)
        return logits.argmax(1).astype(np.uint8), logits

    return run


def test_parity_counts_differences(network: Network) -> None:
    right, images = reference(network), {"a": scenes(1, 70, 90)[0], "b": scenes(2, 80, 60)[1]}

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        classes, logits = right(batch)
        if batch.shape == (1, 70, 90, 3):
            classes[0, 5, 7] = (classes[0, 5, 7] + 1) % 5
            logits[0, 2, 3, 4] += 0.25
        return classes, logits

    parity = compare(network, run, images, path=Path("x.onnx"))
    wholes = [right(image[None])[1] for image in images.values()]
    best = sorted(wholes[0][0, :, 5, 7].tolist())
    assert (parity.images, parity.crops, parity.different) == (2, 4, 1)
    assert parity.worst == pytest.approx(1 - 1 / 6300)
    assert parity.difference == pytest.approx(0.25, abs=1e-5)
    assert parity.margin == pytest.approx(best[-1] - best[-2], abs=1e-5)
    assert parity.reach >= max(float(np.abs(logits).max()) for logits in wholes)
    first, second, _ = parity.describe()
    assert "2 images and 4 batches" in first and "99.98" in first and "0.25" in second


def test_every_image_with_other_classes_is_named_and_no_file_is_left(
    run_folder: Path, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    right = reference(network)

    def run(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        classes, logits = right(batch)
        if batch.shape[1:3] == (32, 64):
            raise RuntimeError("Reshape cannot\nbe done")
        if batch.shape[1:3] == (43, 48):
            return classes[:, :-1], logits
        if len(batch) == 1:
            classes[:, :2, :4] = 9  # 8 of 6305 pixels
        return classes, logits

    monkeypatch.setattr(export, "_traced", lambda network, path: None)
    monkeypatch.setattr(export, "_write_pt2", lambda program, metadata, path: path.write_bytes(b"x"))
    monkeypatch.setattr(export, "_pt2_runner", lambda path: run)
    code, _, message = call("export", run_folder, tmp_path / "out.pt2")
    assert code == 2 and not list(tmp_path.iterdir())
    wholes = ("v/00, 1 x 65 x 97 pixels", "99.8731%", "v/01, ", "v/02, ")
    crops = ("crops 0, 2 x 32 x 64 pixels", "Reshape cannot", "crops 1, 2 x 43 x 48 pixels", "[2, 42, 48]")
    says(
        message,
        *("out.pt2", "99.9%", ".onnx", f"torch {torch.__version__}", *wholes, *crops),
        vary=[r"\((torch|onnx)[^)]*\)", r"differ by up to \S+ \(the largest is \S+\)"],
    )
    assert "crops 2" not in message


def test_logits_that_are_not_finite(network: Network, spec: NetworkSpec, tmp_path: Path) -> None:
    diverged = spec.build().eval()
    diverged.load_state_dict(network.state_dict())
    with torch.no_grad():
        diverged.head.classifier.bias[2] = math.nan  # ty: ignore
    with refused(NumericsError, "photo", "earlier round"):
        compare(diverged, reference(network), {"photo": scenes(1, 40, 40)[0]}, path=Path("x.onnx"))

    def lost(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        classes, logits = reference(network)(images)
        return classes, np.full_like(logits, np.nan)

    with pytest.raises(ExportError, match=r"photo, 1 x 40 x 40 pixels: 100\.0000%.* nan "):
        compare(network, lost, {"photo": scenes(1, 40, 40)[0]}, path=Path("x.onnx"))


def test_parities_are_checked() -> None:
    with refused(ExportError, "images 0", "pixels 0"):
        Parity(0, 0, 0, 0, 1.0, 0.0, 0.0, 0.0)
    with refused(ExportError, "difference nan", "reach -1.0"):
        Parity(1, 4, 10, 0, 1.0, math.nan, -1.0, 0.0)


# --- the command


def test_the_command(
    run_folder: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    written = {}

    def write(network: Network, path: Path, images: dict, *, metadata: dict) -> Parity:
        written.update(images)
        return Parity(len(images), 4, 1_000_000, 1, 0.9995, 1e-5, 14.2, 2e-6)

    monkeypatch.setattr("darseg.run.export.write_exported", write)
    code, output, _ = call("export", run_folder, tmp_path / "out.pt2", "--round", 0)
    assert code == 0 and sorted(written) == ["v/00", "v/01", "v/02"]
    says(output, "1,000,000", "99.9999%", "99.9500%", "1e-05", "14.2", "2e-06", str(tmp_path / "out.pt2"))

    # At most 8 images, from the first to the last.
    written.clear()
    for index in range(20):
        cv2.imwrite(str(tmp_path / f"{index:02d}.png"), scenes(1, 20 + index, 30)[0])
    call("export", RunDirectory(run_folder).network(0), tmp_path / "out.pt2", "--images", tmp_path)
    assert len(written) == 8 and {"00", "19"} <= set(written)

    # Without validation images the unlabeled ones.
    written.clear()
    bare = tmp_path / "bare"
    RunDirectory(bare).round(0).mkdir(parents=True)
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    del recipe["data"]["validation"]
    (bare / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("network.safetensors", "train.json"):
        (bare / "round_0" / name).write_bytes((run_folder / "round_0" / name).read_bytes())
    assert call("export", bare, tmp_path / "out.pt2")[0] == 0
    assert len(written) == 6 and all(name.startswith("u/") for name in written)


def test_what_the_command_refuses(
    run_folder: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = RunDirectory(run_folder).network(0)
    images = tmp_path / "images"
    images.mkdir()

    def refusal(*arguments: object) -> str:
        code, _, message = call("export", *arguments)
        assert code == 2
        return message

    says(refusal(run_folder, tmp_path / "out.tflite"), "out.tflite", ".onnx", ".pt2")
    (tmp_path / "mine.pt2").write_text("mine")
    says(refusal(run_folder, tmp_path / "mine.pt2"), "mine.pt2")
    assert (tmp_path / "mine.pt2").read_text() == "mine"
    says(refusal(run_folder, tmp_path / "out.pt2", "--round", 7), str(run_folder), "round 7")
    says(refusal(checkpoint, tmp_path / "out.pt2"), str(checkpoint), "--images FOLDER")
    says(refusal(checkpoint, tmp_path / "out.pt2", "--images", images), str(images), "--images")
    for name in ("a.png", "b.jpg"):
        (images / name).write_text("no image")
    says(refusal(checkpoint, tmp_path / "out.pt2", "--images", images), "a.png", "b.jpg")
    moved = tmp_path / "moved"
    (moved / "round_0").mkdir(parents=True)
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    recipe["data"]["root"] = str(tmp_path / "gone")
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name in ("network.safetensors", "train.json"):
        (moved / "round_0" / name).write_bytes((run_folder / "round_0" / name).read_bytes())
    says(refusal(moved, tmp_path / "out.pt2"), str(tmp_path / "gone"), "--images FOLDER")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refusal(run_folder, tmp_path / "out.onnx")
    says(message, "onnxruntime", 'pip install "darseg[onnx]"', ".pt2", vary=[r"\(.*\)"])
    assert not list(tmp_path.glob("out*"))


class Capricious(torch.nn.Module):
    """A backbone whose computation depends on the numbers in the image, so that it cannot be exported."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.name = inner, "capricious"

    def forward(self, images: torch.Tensor) -> backbone.Features:
        return self.inner(images if images.sum() > 0 else -images)


def test_a_network_that_cannot_be_exported(spec: NetworkSpec, tmp_path: Path) -> None:
    network = settled(spec)
    network.backbone = Capricious(network.backbone)  # ty: ignore
    with refused(
        ExportError, "out.pt2", "capricious", "torch 2", "docs/export.md", vary=[r"\(torch.*\)(?=\. Choose)"]
    ):
        write_exported(network, tmp_path / "out.pt2", {"a": scenes(1, 40, 40)[0]}, metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", pytest.param("swin_tiny_patch4_window7_224", marks=thorough)],
)
def test_transformers_that_cannot_be_exported(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = spec_of(f"dpt/timm/{name}", 16).build().eval()
    with refused(
        ExportError,
        "out.onnx",
        f"timm/{name}",
        "torch 2",
        "docs/export.md",
        vary=[r"\(torch.*\)(?=\. Choose)"],
    ):
        write_exported(network, tmp_path / "out.onnx", {"a": scenes(1, 40, 40)[0]}, metadata={})
    assert not list(tmp_path.iterdir())
    assert "def forward" not in capfd.readouterr().err  # torch's graph of thousands of lines


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("resnet18", (8, 1)),
        ("deeplabv3plus/resnet18", (16, 1)),
        ("linear/resnet18", (8, 1)),
        ("dpt/timm/vit_small_patch14_dinov2", (14, 0)),
        ("dpt/timm/vit_tiny_patch16_224", (16, 0)),
        ("dpt/timm/convnext_atto", (32, 0)),
    ],
)
def test_metadata_have_the_sides_of_every_network(name: str, sides: tuple[int, int]) -> None:
    step, offset = sides
    spec = spec_of(name, step)
    metadata = metadata_of(spec, ClassSet(tuple("abcde"), COLORS), {})
    known = {key: json.loads(metadata[key]) for key in ("stride", "side_step", "side_offset")}
    assert known == {"stride": step, "side_step": step, "side_offset": offset}
    with torch.device("meta"):
        network = spec.build()
    assert (network.stride, network.sides) == (step, Sides(step, offset))


def test_metadata_of_a_checkpoint_outside_a_run() -> None:
    known = metadata_of(NetworkSpec(classes=2), ClassSet(("a", "b"), ((0, 0, 0), (1, 1, 1))), {})
    assert json.loads(known["class_names"]) == ["a", "b"] and "training" not in known
