"""From a recipe to the plain arguments that the rooms take. With `rounds` the only readers of the recipe."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from darseg.config import LabelingConfig, ProtocolConfig, Recipe, SourceConfig, WeightsFile
from darseg.data.augment import Augmentation
from darseg.data.classes import ClassSet, class_set
from darseg.data.manifest import Manifest, Sample, Source, build_manifest, read_label
from darseg.errors import RecipeError, SizeError, faults
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import Protocol
from darseg.model.weights import fetch, load_backbone

CACHE = Path(os.environ.get("DARSEG_CACHE", "~/.cache/darseg"))


def classes_of(recipe: Recipe) -> ClassSet:
    return class_set(recipe.data.classes, recipe.data.ignore)


def manifest_of(recipe: Recipe) -> Manifest:
    """Find the images of every role. Raises DataError."""
    data = recipe.data
    root = Path(data.root)
    default = Source(root, root / data.images, root / data.labels)

    def source(config: SourceConfig | None) -> Source | None:
        if config is None:
            return None
        return Source(
            root,
            root / (config.images or data.images),
            root / (config.labels or data.labels),
            root / config.list if config.list else None,
            config.every,
            config.except_every,
        )

    roles = (data.labeled, data.unlabeled, data.validation, data.test)
    return build_manifest(classes_of(recipe), default, *map(source, roles))


def masks(samples: Sequence[Sample], classes: ClassSet) -> Iterator[tuple[str, np.ndarray]]:
    """(path, label map) of all samples that have one."""
    return ((str(s.label), read_label(s.label, classes.ignore)) for s in samples if s.label)


def spec_of(recipe: Recipe) -> NetworkSpec:
    classes = classes_of(recipe)
    network = recipe.network
    return NetworkSpec(
        architecture=network.architecture,
        backbone=network.backbone,
        classes=len(classes),
        output_stride=network.output_stride,
        head_channels=network.head_channels,
        auxiliary=network.auxiliary_weight > 0,
        class_names=classes.names,
        class_colors=classes.colors,
    )


def build_initial_network(recipe: Recipe) -> tuple[Network, str]:
    """The network as round 0 begins: on the CPU, heads drawn from the seed, backbone from its weights.

    Returns:
        the network, and a sentence that says where its weights are from.

    Raises WeightsError: never does a run start from scratch in silence.
    """
    torch.manual_seed(recipe.seed)
    network = spec_of(recipe).build()
    weights = recipe.network.weights
    if weights == "none":
        return network, f"none, {recipe.network.backbone} starts from random numbers (network.weights: none)"
    fetched = isinstance(weights, WeightsFile)
    path = fetch(weights.url, weights.sha256, CACHE.expanduser()) if fetched else Path(weights)
    report = load_backbone(network, path)
    unused = f", {len(report.unused)} not needed (classifier)" if report.unused else ""
    return network, f"{len(report.loaded)} tensors of {recipe.network.backbone} from {path}{unused}"


def check_sizes(recipe: Recipe, network: Network) -> None:
    """Raise SizeError naming every crop and window the network cannot take, and the nearest it can."""
    sizes = {
        "training.crop": recipe.training.crop,
        "labeling.window": labeling_protocol(recipe).window,
        "evaluation.window": evaluation_protocol(recipe).window,
    }
    wrong = []
    for key, (height, width) in sizes.items():
        try:
            network.check_size(height, width)
        except SizeError as error:
            wrong.append(f"{key}: {error}")
    if wrong:
        raise SizeError(faults("The recipe has sizes this network cannot take", wrong))


def augmentation_of(recipe: Recipe, round_index: int, fill: tuple[int, int, int]) -> Augmentation:
    how = recipe.augmentation
    return Augmentation(
        crop=recipe.training.crop,
        scale=tuple(recipe.rounds[round_index].scale or how.scale),
        rotate=how.rotate,
        blur=how.blur,
        mirror=how.mirror,
        fill=fill,
    )


def _protocol(recipe: Recipe, config: ProtocolConfig | LabelingConfig) -> Protocol:
    return Protocol(
        window=tuple(config.window or recipe.labeling.window or recipe.training.crop),
        base_size=config.base_size,
        mirror=config.mirror,
        scales=tuple(config.scales),
        bf16=recipe.training.precision == "bf16",
    )


def labeling_protocol(recipe: Recipe) -> Protocol:
    return _protocol(recipe, recipe.labeling)


def evaluation_protocol(recipe: Recipe) -> Protocol:
    return _protocol(recipe, recipe.evaluation)


@dataclass(frozen=True)
class Round:
    """One round: what it labels, how long it trains, on which part of the schedule.

    Attributes:
        labeling_ratio: share of the unlabelled pixels to label before training; None in round 0, and in
            all rounds where a global threshold decides.
        span: fractions of the poly curve its steps cover.
        batch: labelled images a step; pseudo_batch: pseudo-labelled images a step (0 in round 0).
    """

    index: int
    labeling_ratio: float | None
    augmentation: Augmentation
    steps: int
    span: tuple[float, float]
    learning_rate: float
    batch: int
    pseudo_batch: int


def plan_rounds(recipe: Recipe, labeled: int, unlabeled: int, fill: tuple[int, int, int]) -> list[Round]:
    """All rounds with their steps: an epoch is floor(images / batch) steps, at least 1.

    Images are the labelled ones in round 0, the unlabelled ones later.
    Raises RecipeError where rounds need unlabelled images and there are none.
    """
    if len(recipe.rounds) > 1 and unlabeled == 0:
        raise RecipeError(
            f"{len(recipe.rounds)} rounds are wanted, but there are no unlabelled images: rounds after the first "
            "learn from those. Set data.unlabeled, or keep only the first round."
        )
    half = recipe.training.half_batch or recipe.training.batch // 2
    rounds = []
    for index, (config, span) in enumerate(zip(recipe.rounds, recipe.spans(), strict=True)):
        batch, count = (recipe.training.batch, labeled) if index == 0 else (half, unlabeled)
        rounds.append(
            Round(
                index=index,
                labeling_ratio=config.labeling_ratio,
                augmentation=augmentation_of(recipe, index, fill),
                steps=config.steps or (config.epochs or 0) * max(1, count // batch),
                span=span,
                learning_rate=config.learning_rate or recipe.training.learning_rate,
                batch=batch,
                pseudo_batch=0 if index == 0 else half,
            )
        )
    return rounds


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None: all cores, shared with the other processes on this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here))


def pick_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def bf16_is_emulated() -> bool:
    """Whether bfloat16 is slow here: on x86 processors without AVX-512 (over 20 times
    slower than fp32, measured with ResNet-18 on an AMD EPYC with AVX2 alone)."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return pick_device().type == "cpu" and on_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def place(network: Network) -> Network:
    """Move a network to the GPU where there is one. Channels-last: convolutions run several times faster so."""
    return network.to(pick_device()).to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
