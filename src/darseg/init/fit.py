"""What fits this machine and the images: network, weights, crop, batch, window, precision, steps."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from darseg.data.classes import BUILT_IN
from darseg.data.prediction import FLOAT16
from darseg.errors import DarsegError, DataError, RecipeError, WeightsError
from darseg.init.draft import Draft, path_from
from darseg.model.footprint import training_memory
from darseg.model.network import NetworkSpec
from darseg.model.timm_backbones import import_timm
from darseg.model.weights import load_weights, read_spec
from darseg.pseudo.scores import scores_bytes_per_pixel
from darseg.run.build import pick_device, place
from darseg.run.machine import free_memory, usable_cores

MEMORY_SHARE = 0.5
"""Share of the free memory that a step's tensors may take. The other half is for the workspace of convolutions, which is
not counted, for decoded images, and for other programs."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes of free memory to expect if the system does not say: any current machine has as much."""

PAPER_CROP = 713
DINO_CROP = 518
"""DINOv2's largest crop in its pretraining, and UniMatch V2's on VOC: 37 patches of 14."""
SMALL_CROP = 257
"""Crop on CPUs: a step with crops of 713 takes eight times as long there."""

LARGE_BATCH = 16
"""The paper's."""
HOURS = {"cpu": 1.0, "cuda": 8.0}
"""How long all rounds of the proposal may take."""
EPOCHS = 100, 40
"""Aims for all rounds together, shortened to the hours above: epochs over the labeled images and over the unlabeled
ones."""
PARTS = {"cpu": (1 / 3, 2 / 3), "cuda": (1 / 3, 1 / 3, 1 / 3)}
"""How the steps are divided among the rounds. Measured on a CPU: docs/results.md. On a GPU as many rounds as in the
paper."""
FEWEST_STEPS, MOST_STEPS = 100, 20_000
"""Of a round."""

DISK = 10 << 30
"""Bytes that scores may take between the passes of labeling; more, and images are predicted twice."""

LARGEST_WINDOW = {"cpu": 513, "cuda": 1025}
"""Sides of images that are predicted in one window; larger images are predicted in windows of the crop's size."""


DINO = "timm/vit_small_patch14_dinov2"
DINO_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
DINO_FILE = "dinov2_vits14_pretrain.pth"
DINO_SOURCE = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/{DINO_FILE} (88 MB)"
"""Backbone for GPUs, and where its weights are (docs/networks.md). init downloads nothing."""

WEIGHT_FILES = {"cpu": ("resnet*.pth",), "cuda": ("dinov2_vit*14_*pretrain.pth", "resnet*.pth")}
"""Files that are taken for pretrained weights."""


@dataclass(frozen=True)
class Machine:
    """The machine that a recipe is for.

    Attributes:
        kind: "cpu" or "cuda"; `described`: the machine in words.
        budget: bytes that a step may take.
        bf16: whether it computes bfloat16 fast.
    """

    kind: str
    described: str
    budget: int
    bf16: bool

    def __post_init__(self) -> None:
        if self.kind not in HOURS or self.budget < 1:
            raise DataError(
                f"A machine of kind {self.kind!r} with {self.budget} bytes is not possible. Its kind is "
                f"{' or '.join(HOURS)}, and it has memory."
            )


def this_machine() -> Machine:
    """The machine that this process runs on, with its GPU if it has one."""
    device = pick_device()
    if device.type == "cuda":
        free, described = torch.cuda.mem_get_info(device)[0], f"a GPU ({torch.cuda.get_device_name(device)})"
    else:
        free, described = free_memory() or UNKNOWN_MEMORY, f"{usable_cores()} CPU core(s) without GPU"
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Machine(device.type, described, budget=max(1, int(free * MEMORY_SHARE)), bf16=bf16)


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        weights: as in a recipe.
        crop, window: height and width.
        covers: whether a window covers the largest image.
        memory, budget: bytes that a step needs, and may take.
        seconds: of a step, measured.
        steps: of each round.
        device: "cpu" or "cuda"; `described`: the machine in words.
    """

    spec: NetworkSpec
    weights: str
    crop: tuple[int, int]
    window: tuple[int, int]
    covers: bool
    batch: int
    bf16: bool
    memory: int
    budget: int
    seconds: float
    steps: tuple[int, ...]
    device: str
    described: str


def fit_machine(
    draft: Draft, folder: Path, out: Path, *, weights: Path | str | None, machine: Machine | None = None
) -> Fit:
    """Choose network and training settings; notes and warnings about weights go to the draft.

    Args:
        folder: the images; weights are looked for there, next to `out`, and in the current folder.
        out: the recipe to be written.
        weights: the user's choice.
        machine: None: this one.

    Raises WeightsError if the user's weights do not fit.
    """
    machine = machine or this_machine()
    kind = machine.kind
    names = BUILT_IN[draft.classes].names if isinstance(draft.classes, str) else tuple(draft.classes)
    spec = _network_for(kind, len(names), draft)
    if weights is not None:
        spec, chosen = _given_weights(spec, Path(weights), names, out=out)
    else:
        places = dict.fromkeys([out.parent.absolute(), folder.absolute(), Path.cwd()])
        paths = [
            path for place in places for files in WEIGHT_FILES[kind] for path in sorted(place.glob(files))
        ]
        spec, chosen = _find_weights(spec, draft, paths, names=names, out=out)
    heights, widths = (sorted(side) for side in zip(*(draft.sizes or [(PAPER_CROP,) * 2]), strict=True))
    crop, batch, memory = crop_and_batch(
        spec,
        smallest=(heights[len(heights) // 10], widths[len(widths) // 10]),  # the few smaller ones are padded
        target=SMALL_CROP if kind == "cpu" else DINO_CROP if is_dino(spec) else PAPER_CROP,
        labeled=draft.labeled,
        budget=machine.budget,
        kind=kind,
    )
    whole = max(spec.sides.up(heights[-1]), crop[0]), max(spec.sides.up(widths[-1]), crop[1])
    window = whole if max(whole) <= max(*crop, LARGEST_WINDOW[kind]) else crop
    seconds = step_seconds(spec, batch, crop)
    return Fit(
        spec=spec,
        weights=chosen,
        crop=crop,
        window=window,
        covers=window == whole,
        batch=batch,
        bf16=machine.bf16,
        memory=memory,
        budget=machine.budget,
        seconds=seconds,
        steps=steps_of_rounds(draft, kind, batch=batch, seconds=seconds, limit=HOURS[kind] * 3600),
        device=kind,
        described=machine.described,
    )


def _network_for(kind: str, classes: int, draft: Draft) -> NetworkSpec:
    """The network to propose if no weight file asks for another one."""
    if kind == "cpu":
        return NetworkSpec(backbone="resnet18", classes=classes, output_stride=16, head_channels=128)
    try:
        import_timm(DINO)
    except RecipeError:
        draft.notes.append(
            'timm is not installed, so ResNet-50 is proposed. With it (pip install "darseg[timm]") init proposes DPT on '
            "DINOv2-S, which needs fewer labels"
        )
        return NetworkSpec(backbone="resnet50", classes=classes)
    return NetworkSpec("dpt", DINO, classes)


def is_dino(spec: NetworkSpec) -> bool:
    return spec.backbone.endswith("_dinov2")


def _with_backbone_of(spec: NetworkSpec, weights: Path) -> NetworkSpec:
    """The network with the backbone of a weight file: as darseg described it, or by its name."""
    with suppress(WeightsError):
        own = read_spec(weights)
        return replace(
            spec,
            architecture=own.architecture,
            backbone=own.backbone,
            output_stride=own.output_stride,
            head_channels=own.head_channels,
            auxiliary=None,
        )
    if dino := re.match(r"dinov2_vit([sblg])14_(reg4_)?pretrain", weights.name):
        backbone = f"timm/vit_{DINO_SIZES[dino[1]]}_patch14_{dino[2] or ''}dinov2"
        return NetworkSpec("dpt", backbone, spec.classes)
    if known := re.search(r"resnet(18|34|50|101)(?!\d)", weights.name):
        network = NetworkSpec(classes=spec.classes) if is_dino(spec) else spec
        return replace(network, backbone=f"resnet{known[1]}")
    return spec


def _given_weights(
    spec: NetworkSpec, weights: Path, names: Sequence[str], *, out: Path
) -> tuple[NetworkSpec, str]:
    """The network for the user's weights, and the weights as in a recipe. Raises WeightsError."""
    spec = _with_backbone_of(spec, weights)
    load_weights(spec.build(), weights, class_names=names)
    return spec, path_from(out.parent, weights)


def _find_weights(
    spec: NetworkSpec, draft: Draft, paths: Sequence[Path], *, names: Sequence[str], out: Path
) -> tuple[NetworkSpec, str]:
    """The first weight file that fits. Files for this backbone are tried first.

    If there is none: "none"; for DINOv2 the file to get, since a transformer learns little from random numbers.
    """
    for path in sorted(paths, key=lambda path: _with_backbone_of(spec, path).backbone != spec.backbone):
        suited = _with_backbone_of(spec, path)
        try:
            load_weights(suited.build(), path, class_names=names)
        except DarsegError as error:
            draft.notes.append(f"{path} is not used as pretrained weights: {error}")
            continue
        draft.notes.append(f"pretrained weights: {path}")
        if is_dino(spec) and not is_dino(suited):
            draft.notes.append(
                f"DPT on DINOv2-S needs fewer labels than {suited.backbone}: get {DINO_SOURCE}, and run init again"
            )
        return suited, path_from(out.parent, path)
    if not is_dino(spec):
        return spec, "none"
    draft.missing = out.parent / DINO_FILE
    draft.warnings.append(
        f"the recipe needs a file that is not here: get {DINO_SOURCE}, and put it next to the recipe, as "
        f"{draft.missing}. Until then check and train refuse the recipe"
    )
    return spec, path_from(out.parent, draft.missing)


def crop_and_batch(
    spec: NetworkSpec, *, smallest: tuple[int, int], target: int, labeled: int, budget: int, kind: str
) -> tuple[tuple[int, int], int, int]:
    """The largest crop, and for it the largest batch, whose step fits the memory; otherwise the smallest.

    Args:
        smallest: height and width that crops must not exceed.
        target: side that crops must not exceed.
        labeled: number of labeled images.
        budget: bytes that a step may take.
        kind: "cpu" or "cuda".

    Returns:
        height and width of the crop, images of a batch, bytes of a step.
    """
    sides = spec.sides
    crop = sides.down(min(target, smallest[0])), sides.down(min(target, smallest[1]))
    batches = [size for size in (LARGE_BATCH, 8, 4) if size <= max(4, labeled)]
    if kind == "cpu":
        batches = [size for size in batches if size <= 8]
    while True:
        for batch in batches:
            memory = sum(training_memory(spec, batch, *crop, averages=2 if takes_adamw(spec) else 1))
            if memory <= budget or (batch == 4 and max(crop) <= sides.up(4 * sides.step)):
                return crop, batch, memory
        crop = sides.down(crop[0] * 3 // 4), sides.down(crop[1] * 3 // 4)


def takes_adamw(spec: NetworkSpec) -> bool:
    """Whether a network cuts images into patches: such are usually trained with AdamW."""
    return spec.sides.offset == 0


def step_seconds(spec: NetworkSpec, batch: int, crop: tuple[int, int]) -> float:
    """Seconds of a training step on this machine.

    Two crops go forward and backward, once to warm up and once measured. On a CPU the process's own time counts, so other
    work on the machine does not matter.
    """
    network = place(spec.build())
    device = network.mean.device
    images = torch.zeros(2, 3, *crop, dtype=torch.uint8, device=device)
    labels = torch.zeros(2, *crop, dtype=torch.int64, device=device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = 0.0
    for _ in range(2):
        began = clock()
        F.cross_entropy(network(images).main, labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    return max(1e-3, clock() - began) / threads * batch / 2


def steps_of_rounds(draft: Draft, kind: str, *, batch: int, seconds: float, limit: float) -> tuple[int, ...]:
    """Steps of each round.

    Args:
        kind: of the device, "cpu" or "cuda".
        seconds: of a step; limit: of all rounds together.
    """
    parts = PARTS[kind] if draft.unlabeled else (1.0,)
    epochs = EPOCHS[0] * draft.labeled / batch + EPOCHS[1] * draft.unlabeled / (batch // 2)
    together = min(epochs, limit / seconds)
    return tuple(max(FEWEST_STEPS, 10 * round(min(part * together, MOST_STEPS) / 10)) for part in parts)


def predicts_twice(draft: Draft, fit: Fit) -> bool:
    """Whether scores that wait while decisions are aligned might take too much of the disk."""
    heights, widths = zip(*(draft.sizes or [(0, 0)]), strict=True)
    pixels = draft.unlabeled * median(heights) * median(widths)
    return pixels * scores_bytes_per_pixel(fit.spec.classes, FLOAT16) > DISK
