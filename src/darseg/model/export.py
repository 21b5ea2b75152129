"""A trained network as a file for other programs, ONNX or torch.export, and the proof that it gives the same classes.

The file takes what decoders give, uint8 RGB [B, H, W, 3] of any size, and gives classes and logits of that size:
normalization, padding to a legal size and cropping are inside. It stands for one window over the whole image, without
mirror or other scales. Letters: B images, K classes, H x W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darseg import __version__
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.files import write_whole_with
from darseg.errors import ExportError, NumericsError, faults
from darseg.model.heads import PyramidPoolingHead, upsample
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import Protocol, predict_scores
from darseg.model.sides import Sides

ONNX, PT2 = ".onnx", ".pt2"
SUFFIXES = (ONNX, PT2)

INPUT, OUTPUTS = "images", ("classes", "logits")
"""What goes in and out is called so in the file."""

PT2_METADATA = "darseg.json"
"""The extra file inside a .pt2 that holds the metadata; in ONNX they are metadata_props."""

SAME_PIXELS = 0.999
"""Share of pixels that must have the same class in every image compared."""

EXAMPLE = (2, 70, 91)
"""Images, height and width traced with: no legal sides, and several images, so that nothing is taken for fixed."""

CROPS = ((1 / 2, 2 / 3), (2 / 3, 1 / 2), (3 / 4, 3 / 5), (1 / 3, 5 / 6))
"""Shares of height and width: real images of one size alone would not show that others are right too."""

LEAST_STEPS = 2
"""Least n in padded sides of stride * n + 1: with n = 1 some backbones' features are a single pixel, without corners."""

Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""uint8 [B, H, W, 3] → classes uint8 [B, H, W], logits float32 [B, K, H, W]."""


@dataclass(frozen=True)
class Parity:
    """How far a file agrees with the network it was made of, in one window over the whole image.

    Attributes:
        images, crops: whole images compared, and batches of two smaller crops of them, each of another size.
        pixels, different: how many there were, and how many of them had another class.
        worst: share of equal pixels in the image or batch where it is least.
        difference: the largest absolute difference between two logits.
        reach: the largest absolute logit.
        margin: where classes differ, how far apart the network's two best logits are at most; 0 where none do.
    """

    images: int
    crops: int
    pixels: int
    different: int
    worst: float
    difference: float
    reach: float
    margin: float

    def __post_init__(self) -> None:
        counts = self.images > 0 <= self.crops and 0 <= self.different <= self.pixels > 0
        if not (counts and 0 <= self.worst <= 1 and min(self.difference, self.reach, self.margin) >= 0):
            raise ExportError(f"{self}: these cannot be counts and differences of images that were compared.")

    def describe(self) -> list[str]:
        """In words, a line each."""
        share = 1 - self.different / self.pixels
        lines = [
            f"{self.images} images and {self.crops} batches of crops of other sizes, {self.pixels:,} pixels: "
            f"{share:.4%} have the same class, {self.worst:.4%} where it is least",
            f"largest difference between two logits: {self.difference:.2g} (logits reach {self.reach:.3g})",
        ]
        if self.different:
            lines.append(f"where classes differ, the two best logits are at most {self.margin:.2g} apart")
        return lines


class Portable(nn.Module):
    """A network as files hold it: uint8 [B, H, W, 3] → classes uint8 [B, H, W], logits float32 [B, K, H, W]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network = self.network
        height, width = images.shape[1:3]
        padded_h, padded_w = padded_side(height, network.sides), padded_side(width, network.sides)
        top, left = (padded_h - height) // 2, (padded_w - width) // 2
        normalized = network.normalize(images.permute(0, 3, 1, 2))
        # As the sliding window pads: all around, with the mean color, which is 0.
        around = (left, padded_w - width - left, top, padded_h - height - top)
        features = network.backbone(F.pad(normalized, around)).stage4
        head = network.head
        logits = head(features, mean_of_cells) if isinstance(head, PyramidPoolingHead) else head(features)
        logits = upsample(logits, (padded_h, padded_w))[:, :, top : top + height, left : left + width]
        return logits.argmax(dim=1).to(torch.uint8), logits


def padded_side(side: int, sides: Sides) -> int:
    """The legal side that an image's side is padded to, for sides that are symbols too.

    The number of steps is taken out of a tensor, which makes it a symbol of its own: sides of all feature maps stay short
    sums of it, instead of nested divisions that take minutes and end in conditions on the image's size.
    """
    step, offset = sides.step, sides.offset
    rounded_up = torch.sym_max(LEAST_STEPS, (side - 1 - offset + step) // step)
    steps = torch.scalar_tensor(rounded_up, dtype=torch.int64).item()
    torch._check(steps >= LEAST_STEPS)
    torch._check(step * steps + offset >= side)
    return step * steps + offset  # ty: ignore[invalid-explicit-return]


def mean_of_cells(features: Tensor, bins: int) -> Tensor:
    """F.adaptive_avg_pool2d(features, bins) as two matrix products; exporters cannot write that for sizes that vary."""
    height, width = features.shape[-2:]
    return _cells(height, bins, features.dtype) @ features @ _cells(width, bins, features.dtype).T


def _cells(side: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Weights [bins, side] that average over each cell; neighbors may share a pixel."""
    at, cell = torch.arange(side)[None], torch.arange(bins)[:, None]
    first, end = cell * side // bins, ((cell + 1) * side + bins - 1) // bins
    inside = ((at >= first) & (at < end)).to(dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def metadata_of(spec: NetworkSpec, classes: ClassSet, facts: Mapping[str, Any]) -> dict[str, str]:
    """What a file says about itself; every value is JSON, so that names may be any text.

    `facts`: what is known of the training, and the digest of the weights.
    """
    built = {key: value for key, value in dataclasses.asdict(spec).items() if not key.startswith("class_")}
    known: dict[str, Any] = {
        "darseg_version": __version__,
        "class_names": classes.names,
        "class_colors": classes.colors,
        "ignore_index": IGNORE,
        "stride": spec.output_stride,
        "network": built,
        **facts,
    }
    return {key: json.dumps(value, sort_keys=True) for key, value in known.items()}


def write_exported(
    network: Network, path: Path, images: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Parity:
    """Write a network as ONNX or as a program of torch.export, run the file, and keep it where it gives the same.

    Args:
        network: on the CPU, in eval mode.
        path: ends in .onnx or .pt2.
        images: name → uint8 [H, W, 3], RGB: real ones, to compare on.
        metadata: see `metadata_of`.

    Raises ExportError, leaving no file: the network cannot be exported, onnx is not installed, any image has fewer
    than SAME_PIXELS equal classes. NumericsError: the network's own logits are not finite. StorageError.
    """
    check_suffix(path)
    write, run = (_write_onnx, _onnx_runner) if path.suffix == ONNX else (_write_pt2, _pt2_runner)
    found: list[Parity] = []

    def write_and_compare(aside: Path) -> None:
        write(_traced(network, path), metadata, aside)
        found.append(compare(network, run(aside), images, path))

    write_whole_with(path, write_and_compare)
    return found[0]


def check_suffix(path: Path) -> None:
    """Raise ExportError unless the suffix says what to write and what that takes is installed."""
    if path.suffix not in SUFFIXES:
        raise ExportError(
            f"{path}: the suffix decides what is written, {ONNX} (for onnxruntime and others) or {PT2} "
            f"(for torch.export); name it {path.stem}{ONNX}."
        )
    if path.suffix == ONNX:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _import(name)


def compare(network: Network, run: Runner, images: Mapping[str, np.ndarray], path: Path) -> Parity:
    """Parity of an exported file on whole images, one at a time, and on batches of two crops of other sizes.

    Raises ExportError naming every image on which the file fails or gives other classes, NumericsError.
    """
    wrong, shares, differences, reaches, margins = [], [], [], [], [0.0]
    pixels = different = 0
    batches = {name: image[None] for name, image in images.items()}
    crops = _crops(images)
    for name, batch in (batches | crops).items():
        expected = np.stack([_one_window(network, image, name) for image in batch])
        try:
            classes, logits = run(batch)
        except Exception as error:  # whatever a runtime raises where a graph holds for other sizes only
            wrong.append(f"{name}, {_size(batch)}: the file cannot be run ({_reason(error)})")
            continue
        if classes.shape != batch.shape[:3] or logits.shape != expected.shape:
            wrong.append(
                f"{name}, {_size(batch)}: gives classes {list(classes.shape)} and logits {list(logits.shape)}"
            )
            continue
        other = classes != expected.argmax(axis=1)
        pixels, different = pixels + other.size, different + int(other.sum())
        shares.append(1 - float(other.mean()))
        differences.append(float(np.abs(logits - expected).max()))
        reaches.append(float(np.abs(expected).max()))
        if other.any():
            best = np.sort(np.moveaxis(expected, 1, -1)[other], axis=-1)
            margins.append(float((best[:, -1] - best[:, -2]).max()))
        if not shares[-1] >= SAME_PIXELS or not np.isfinite(differences[-1]):
            wrong.append(
                f"{name}, {_size(batch)}: {shares[-1]:.4%} of the classes are the same, logits differ by up to "
                f"{differences[-1]:.2g} of {reaches[-1]:.3g}"
            )
    if wrong:
        raise ExportError(
            faults(
                f"{path} was not written: run from the file, the network must give {SAME_PIXELS:.1%} of the pixels of "
                "every image the same class, and does not",
                wrong,
            )
            + f"\nThis is a fault of the exporter ({_versions()}), not of the images. The other format "
            f"({PT2 if path.suffix == ONNX else ONNX}) may work, or another release of these libraries."
        )
    return Parity(
        len(batches), len(crops), pixels, different, min(shares), max(differences), max(reaches), max(margins)
    )


def _crops(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Batches of two crops, from the corners of two images or of one, in other sizes than theirs."""
    first, second = (*images.values(), *images.values())[:2]
    height, width = np.minimum(first.shape[:2], second.shape[:2])
    crops = {}
    for index, (down, right) in enumerate(CROPS):
        h, w = max(1, int(height * down)), max(1, int(width * right))
        crops[f"crops {index}"] = np.stack([first[:h, :w], second[-h:, -w:]])
    return crops


def _one_window(network: Network, image: np.ndarray, name: str) -> np.ndarray:
    """Logits of the network itself, by the sliding window of prediction: float32 [K, H, W]."""
    height, width = image.shape[:2]
    window = (network.sides.up(height, LEAST_STEPS), network.sides.up(width, LEAST_STEPS))
    logits = predict_scores(network, image, Protocol(window, mirror=False), average="logits")
    logits = logits.mean(0, height).numpy()
    if not np.isfinite(logits).all():
        raise NumericsError(
            f"{name}: the network's own logits are not finite, so there is nothing to compare with. It diverged in "
            "training; export an earlier round."
        )
    return logits


def _traced(network: Network, path: Path) -> torch.export.ExportedProgram:
    example = torch.zeros(*EXAMPLE, 3, dtype=torch.uint8)
    try:
        dynamic = torch.export.Dim.DYNAMIC  # earlier releases of torch lack it
        with torch.no_grad(), _quiet(), _whole_number_padding():
            program = torch.export.export(
                Portable(network), (example,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)
            )
    except Exception as error:  # torch raises all kinds
        raise _refused(network, path, error) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def _refused(network: Network, path: Path, error: Exception) -> ExportError:
    return ExportError(
        f"{path} was not written: {network.backbone.name} cannot be exported for images of any size ({_versions()}: "
        f"{_reason(error)}). Other backbones can, see docs/export.md; or predict with darseg itself (darseg predict)."
    )


def _write_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str], path: Path) -> None:
    onnx = _import("onnx")
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=OUTPUTS,
                external_data=False,
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
        _name_sides(model.graph)
        for node in (*model.graph.node, *(node for one in model.functions for node in one.node)):
            del node.metadata_props[:]  # lines of source and folders of this machine
            node.doc_string = ""
        model.producer_name, model.producer_version = "darseg", __version__
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError:
        raise
    except Exception as error:  # exporter and checker raise all kinds
        raise ExportError(f"ONNX could not be written ({_versions()}: {_reason(error)}).") from error


def _name_sides(graph: Any) -> None:
    """Sides that vary get names to read; what the exporter noted of sizes inside goes, runtimes find it themselves."""
    del graph.value_info[:]
    given = {INPUT: ("batch", "height", "width", 3), "classes": ("batch", "height", "width")}
    given["logits"] = ("batch", None, "height", "width")
    for value in (*graph.input, *graph.output):
        for side, name in zip(value.type.tensor_type.shape.dim, given[value.name], strict=True):
            if isinstance(name, str):
                side.dim_param = name


def _onnx_runner(path: Path) -> Runner:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised as well
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(list(OUTPUTS), {INPUT: images}))


def _write_pt2(program: torch.export.ExportedProgram, metadata: Mapping[str, str], path: Path) -> None:
    data = io.BytesIO()
    with _quiet():
        torch.export.save(
            program, data, extra_files={PT2_METADATA: json.dumps(dict(metadata), sort_keys=True)}
        )
    path.write_bytes(data.getbuffer())


def _pt2_runner(path: Path) -> Runner:
    with _quiet():
        module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            classes, logits = module(torch.from_numpy(images))
        return classes.numpy(), logits.numpy()

    return run


@contextlib.contextmanager
def _whole_number_padding() -> Generator[None, None, None]:
    """timm's "same" padding, meanwhile reckoned in whole numbers: through its division by floats no symbol can be
    followed."""
    padding = sys.modules.get("timm.layers.padding")
    if padding is None:
        yield
        return
    theirs = padding.get_same_padding
    padding.get_same_padding = same_padding  # ty: ignore[missing-attribute]
    try:
        yield
    finally:
        padding.get_same_padding = theirs  # ty: ignore[missing-attribute]


def same_padding(side: int, kernel: int, stride: int, dilation: int) -> int:
    """Pixels to add to a side so that a convolution gives ceil(side / stride)."""
    return max(((side + stride - 1) // stride - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without the exporters' warnings of their own insides, which nobody here can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ExportError(
            f"Writing ONNX needs {name}, which could not be imported here ({error}). Install it with: "
            f'pip install "darseg[onnx]". A {PT2} file needs nothing more.'
        ) from error


def _versions() -> str:
    names = ("torch", "onnx", "onnxscript", "onnxruntime")
    return ", ".join(f"{name} {sys.modules[name].__version__}" for name in names if name in sys.modules)


def _size(batch: np.ndarray) -> str:
    count, height, width = batch.shape[:3]
    return f"{count} x {height} x {width} pixels"


def _reason(error: Exception, limit: int = 200) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:limit].rstrip('.')}"
