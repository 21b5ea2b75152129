"""What fits this machine and the images: network, weights, crop, batch, window, precision, steps."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from darseg.data.classes import BUILT_IN
from darseg.errors import DarsegError, WeightsError
from darseg.init.draft import Draft, path_from
from darseg.model.footprint import training_memory
from darseg.model.network import NetworkSpec
from darseg.model.weights import load_weights, read_spec
from darseg.run.build import pick_device, place
from darseg.run.machine import free_memory, usable_cores

MEMORY_SHARE = 0.5
"""Share of the free memory that a step's tensors may take. The other half is for the workspace of convolutions, which is
not counted, for decoded images, and for other programs."""

UNKNOWN_MEMORY = 4 << 30
"""Bytes of free memory to expect if the system does not say: any current machine has as much."""

PAPER_CROP = 713
SMALL_CROP = 257
"""Crop on CPUs: a step with crops of 713 takes eight times as long there."""

LARGE_BATCH = 16
"""The paper's."""
HOURS = {"cpu": 1.0, "cuda": 8.0}
"""How long all rounds of the proposal may take."""
EPOCHS = 100, 20
"""Aims, shortened to the hours above: epochs over the labeled images in round 0, and over the unlabeled images in each
later round."""
FEWEST_STEPS, MOST_STEPS = 100, 20_000

LARGEST_WINDOW = {"cpu": 513, "cuda": 1025}
"""Sides of images that are predicted in one window; larger images are predicted in windows of the crop's size."""


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


def fit_machine(draft: Draft, folder: Path, out: Path, *, weights: Path | str | None) -> Fit:
    """Choose network and training settings; notes about weights go to the draft.

    Args:
        folder: the images; weights are looked for there, next to `out`, and in the current folder.
        out: the recipe to be written.
        weights: the user's choice.

    Raises WeightsError if the user's weights do not fit.
    """
    device = pick_device()
    kind = device.type
    if kind == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
        described = f"a GPU ({torch.cuda.get_device_name(device)})"
    else:
        budget = int((free_memory() or UNKNOWN_MEMORY) * MEMORY_SHARE)
        described = f"{usable_cores()} CPU core(s) without GPU"
    names = BUILT_IN[draft.classes].names if isinstance(draft.classes, str) else tuple(draft.classes)
    count = len(names)
    if kind == "cuda":
        spec = NetworkSpec(backbone="resnet50", classes=count)
    else:
        spec = NetworkSpec(backbone="resnet18", classes=count, output_stride=16, head_channels=128)
    if weights is not None:
        spec, chosen = _given_weights(spec, Path(weights), names, out=out)
    else:
        places = dict.fromkeys([out.parent.absolute(), folder.absolute(), Path.cwd()])
        spec, chosen = _find_weights(spec, draft, list(places), names=names, out=out)
    heights, widths = (sorted(side) for side in zip(*(draft.sizes or [(PAPER_CROP,) * 2]), strict=True))
    crop, batch, memory = crop_and_batch(
        spec,
        smallest=(heights[len(heights) // 10], widths[len(widths) // 10]),  # the few smaller ones are padded
        target=PAPER_CROP if kind == "cuda" else SMALL_CROP,
        labeled=draft.labeled,
        budget=budget,
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
        bf16=kind == "cuda" and torch.cuda.is_bf16_supported(),
        memory=memory,
        budget=budget,
        seconds=seconds,
        steps=steps_of_rounds(draft, batch=batch, seconds=seconds, limit=HOURS[kind] * 3600),
        device=kind,
        described=described,
    )


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
    known = re.search(r"resnet(18|34|50|101)(?!\d)", weights.name)
    return replace(spec, backbone=f"resnet{known[1]}") if known else spec


def _given_weights(
    spec: NetworkSpec, weights: Path, names: Sequence[str], *, out: Path
) -> tuple[NetworkSpec, str]:
    """The network for the user's weights, and the weights as in a recipe. Raises WeightsError."""
    spec = _with_backbone_of(spec, weights)
    load_weights(spec.build(), weights, class_names=names)
    return spec, path_from(out.parent, weights)


def _find_weights(
    spec: NetworkSpec, draft: Draft, places: Sequence[Path], *, names: Sequence[str], out: Path
) -> tuple[NetworkSpec, str]:
    """The first weight file that fits, or "none". Files for this backbone are tried first."""
    paths = [path for place in places for path in sorted(place.glob("resnet*.pth"))]
    paths.sort(key=lambda path: _with_backbone_of(spec, path).backbone != spec.backbone)
    for path in paths:
        suited = _with_backbone_of(spec, path)
        try:
            load_weights(suited.build(), path, class_names=names)
        except DarsegError as error:
            draft.notes.append(f"{path} is not used as pretrained weights: {error}")
            continue
        draft.notes.append(f"pretrained weights: {path}")
        return suited, path_from(out.parent, path)
    return spec, "none"


def crop_and_batch(
    spec: NetworkSpec, *, smallest: tuple[int, int], target: int, labeled: int, budget: int
) -> tuple[tuple[int, int], int, int]:
    """The largest crop, and for it the largest batch, whose step fits the memory; otherwise the smallest.

    Args:
        smallest: height and width that crops must not exceed.
        target: side that crops must not exceed.
        labeled: number of labeled images.
        budget: bytes that a step may take.

    Returns:
        height and width of the crop, images of a batch, bytes of a step.
    """
    sides = spec.sides
    crop = sides.down(min(target, smallest[0])), sides.down(min(target, smallest[1]))
    batches = [size for size in (LARGE_BATCH, 8, 4) if size <= max(4, labeled)]
    if pick_device().type == "cpu":
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


def steps_of_rounds(draft: Draft, *, batch: int, seconds: float, limit: float) -> tuple[int, ...]:
    """Steps of each round.

    Args:
        seconds: of a step; limit: of all rounds together.
    """
    aims = [EPOCHS[0] * draft.labeled / batch]
    if draft.unlabeled:
        aims += [EPOCHS[1] * draft.unlabeled / (batch // 2)] * 2
    aims = [min(max(aim, FEWEST_STEPS), MOST_STEPS) for aim in aims]
    factor = min(1.0, limit / (sum(aims) * seconds))
    return tuple(max(FEWEST_STEPS, 10 * round(aim * factor / 10)) for aim in aims)
