"""Export a network to ONNX or torch.export, and check that the file gives the same classes.

The file takes images as decoders return them, uint8 RGB [B, H, W, 3] of any size, and gives classes and logits of that
size. Normalization, padding to a legal size and cropping are inside. It predicts one window over the whole image, without
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
from collections.abc import Generator, Mapping
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
from darseg.data.square import squared
from darseg.errors import ExportError
from darseg.model.heads import PyramidPoolingHead, cells, upsample
from darseg.model.network import Network, NetworkSpec
from darseg.model.parity import (
    LEAST_STEPS,
    ONNX,
    PT2,
    SUFFIXES,
    Parity,
    Runner,
    compare,
    first_line,
    library_versions,
)
from darseg.model.sides import Sides

INPUT, OUTPUTS = "images", ("classes", "logits")
"""Names of input and outputs in the file."""

PT2_METADATA = "darseg.json"
"""The extra file inside a .pt2 that holds the metadata; ONNX has metadata_props."""

EXAMPLE = (2, 70, 91)
"""Images, height and width of the example for tracing: several images and no legal sides, so that nothing is
taken as fixed."""


class Portable(nn.Module):
    """The network as a file: uint8 [B, H, W, 3] → classes uint8 [B, H, W], logits float32 [B, K, H, W]."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.classifier = network.image_classes.classifier if network.image_classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network, how = self.network, self.network.image_classes
        height, width = images.shape[1:3]
        padded_h, padded_w = padded_side(height, network.sides), padded_side(width, network.sides)
        top, left = (padded_h - height) // 2, (padded_w - width) // 2
        normalized = network.normalize(images.permute(0, 3, 1, 2))
        # As the sliding window pads: on all sides, with the mean color, which is 0 after normalization.
        around = (left, padded_w - width - left, top, padded_h - height - top)
        features = network.backbone(F.pad(normalized, around))
        head = network.head
        logits = head(features, mean_of_cells) if isinstance(head, PyramidPoolingHead) else head(features)
        logits = upsample(logits, (padded_h, padded_w))[:, :, top : top + height, left : left + width]
        if how is not None and self.classifier is not None:
            presence = self.classifier(squared(images.permute(0, 3, 1, 2), how.side)).sigmoid()
            logits = how.without(logits, how.removed_by(presence))
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
    """F.adaptive_avg_pool2d(features, bins) as two matrix products, which exporters can write."""
    height, width = features.shape[-2:]
    return _cells(height, bins, features.dtype) @ features @ _cells(width, bins, features.dtype).T


def _cells(side: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Weights [bins, side] that average over each cell."""
    inside = cells(side, bins).to(dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def metadata_of(spec: NetworkSpec, classes: ClassSet, facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file; every value is JSON, so that names may be any text.

    Args:
        facts: the digest of the weights, and what is known about the training.
    """
    built = {key: value for key, value in dataclasses.asdict(spec).items() if not key.startswith("class_")}
    sides = spec.sides
    known: dict[str, Any] = {
        "darseg_version": __version__,
        "class_names": classes.names,
        "class_colors": classes.colors,
        "ignore_index": IGNORE,
        "stride": sides.step,  # the backbone's; transformers ignore spec.output_stride
        "side_step": sides.step,
        "side_offset": sides.offset,
        "network": built,
        **facts,
    }
    return {key: json.dumps(value, sort_keys=True) for key, value in known.items()}


def write_exported(
    network: Network, path: Path, images: Mapping[str, np.ndarray], *, metadata: Mapping[str, str]
) -> Parity:
    """Write a network as ONNX or torch.export, and keep the file if it gives the same classes.

    Args:
        network: on the CPU, in eval mode.
        path: ends in .onnx or .pt2.
        images: name → uint8 [H, W, 3], RGB: real images to compare on.
        metadata: see `metadata_of`.

    Raises ExportError, leaving no file, if the network cannot be exported, onnx is not installed, or any image has fewer
    than SAME_PIXELS equal classes; NumericsError if the network's own logits are not finite; StorageError.
    """
    check_suffix(path)
    write, run = (_write_onnx, _onnx_runner) if path.suffix == ONNX else (_write_pt2, _pt2_runner)
    results: list[Parity] = []

    def write_and_compare(aside: Path) -> None:
        write(_traced(network, path), metadata, aside)
        results.append(compare(network, run(aside), images, path=path))

    write_whole_with(path, write_and_compare)
    return results[0]


def check_suffix(path: Path) -> None:
    """Raise ExportError unless the suffix is known and the packages that it needs are installed."""
    if path.suffix not in SUFFIXES:
        raise ExportError(
            f"{path}: the suffix decides the format, {ONNX} (for onnxruntime and others) or {PT2} (for torch.export). "
            f"Name it {path.stem}{ONNX}."
        )
    if path.suffix == ONNX:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _import(name)


def _traced(network: Network, path: Path) -> torch.export.ExportedProgram:
    example = torch.zeros(*EXAMPLE, 3, dtype=torch.uint8)
    try:
        dynamic = torch.export.Dim.DYNAMIC  # missing in earlier releases of torch
        with torch.no_grad(), _quiet(), _whole_number_padding():
            program = torch.export.export(
                Portable(network), (example,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)
            )
    except Exception as error:  # torch raises many kinds
        raise _not_exportable(network, path, error) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def _not_exportable(network: Network, path: Path, error: Exception) -> ExportError:
    return ExportError(
        f"{path} was not written: {network.backbone.name} cannot be exported for images of any size "
        f"({library_versions()}: {first_line(error)}). Choose another backbone (docs/export.md), or predict with "
        "darseg predict."
    )


def _write_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, str], path: Path) -> None:
    onnx = _import("onnx")
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=OUTPUTS,
                external_data=False,
                verbose=False,
            )
        assert exported is not None
        model = exported.model_proto
        _name_sides(model.graph)
        for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
            del node.metadata_props[:]  # lines of source code and folders of this machine
            node.doc_string = ""
        model.producer_name, model.producer_version = "darseg", __version__
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))
    except OSError:
        raise
    except Exception as error:  # exporter and checker raise many kinds
        raise ExportError(
            f"ONNX could not be written ({library_versions()}: {first_line(error)})."
        ) from error


def _name_sides(graph: Any) -> None:
    """Name the sides that vary, and drop inner sizes noted by the exporter: runtimes infer them."""
    del graph.value_info[:]
    names = {INPUT: ("batch", "height", "width", 3), "classes": ("batch", "height", "width")}
    names["logits"] = ("batch", None, "height", "width")
    for value in (*graph.input, *graph.output):
        for side, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if isinstance(name, str):
                side.dim_param = name


def _onnx_runner(path: Path) -> Runner:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # failures are raised as well
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
    """Inside, timm's "same" padding computes in integers: its float division has no symbolic form."""
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
    """Pixels to add to a side, so that a convolution gives ceil(side / stride)."""
    return max(((side + stride - 1) // stride - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Inside, exporters do not warn about their own internals, which users cannot change.

    Nor do they print the whole graph of a network that they cannot export: the error that they raise says why.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ExportError(
            f"Writing ONNX needs {name}, which cannot be imported here ({error}). Install it with: "
            f'pip install "darseg[onnx]". Or write a {PT2} file, which needs nothing more.'
        ) from error
