"""From a recipe to the plain values that the rooms take: manifest, network, protocols, threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from darseg.config.data import SourceConfig
from darseg.config.recipe import LabelingConfig, ProtocolConfig, Recipe
from darseg.config.text import load_recipe, load_saved_recipe, recipe_differences
from darseg.config.values import WeightsFile
from darseg.data.classes import CITYSCAPES, IGNORE, ClassSet, class_set
from darseg.data.dataset import read_truth
from darseg.data.encoding import LabelEncoding, label_encoding
from darseg.data.images import USUAL, Reading
from darseg.data.label_parts import PartRule
from darseg.data.layouts import Layout, find_sbd
from darseg.data.manifest import Manifest, Sample, Source, Sources, build_manifest
from darseg.data.pictures import follow_marks
from darseg.data.scaling import Scaling
from darseg.errors import DataError, RecipeError, RunError, SizeError, faults
from darseg.model.download import fetch
from darseg.model.fold import fold_batchnorm
from darseg.model.network import Network, NetworkSpec
from darseg.model.weights import load_network, load_weights
from darseg.model.windows import Protocol
from darseg.run.directory import RunDirectory
from darseg.run.machine import default_threads
from darseg.run.moved import with_moved_data
from darseg.run.records import read_plain

Module = TypeVar("Module", bound=nn.Module)

AUXILIARY_WEIGHT = 0.4  # of the auxiliary loss (PSPNet, section 3.1 of its paper; the release)

IMAGES, LABELS = "images", "labels"
"""Folders below data.root, unless the recipe names others."""

ORIENTATION = "orientation"
"""Key of a run's environment.json: how its pictures were read, if `data.orientation: auto` chose that."""

CACHE = Path(os.environ.get("DARSEG_CACHE", "~/.cache/darseg"))

PLACE_KEYS = ("data.root=",)
"""Beginnings of what other commands take: the place of data that were moved."""


def recipe_of(run: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder; if its data moved since, with their new place.

    Raises RunError if there is none, RecipeError if it is damaged.
    """
    path = RunDirectory(run).recipe
    if not path.is_file():
        raise RunError(
            f"{run} is not a run folder: it has no recipe.yaml. Give the folder that `darseg train` wrote to."
        )
    recipe = load_saved_recipe(path, overrides)
    if any(override.startswith("data.root=") for override in overrides):
        return recipe
    return with_moved_data(recipe, RunDirectory(run), manifest_of)


def check_overrides(source: Path | str, overrides: Sequence[str], keys: tuple[str, ...] = PLACE_KEYS) -> None:
    """Raise RecipeError with all that is wrong with changes of a run folder's recipe.

    Args:
        keys: beginnings of what may be changed.
    """
    without_effect = [override for override in overrides if not override.startswith(keys)]
    if not without_effect:
        return
    listed = ", ".join(without_effect)
    if keys == PLACE_KEYS:
        message = f"{listed}: only data.root=PATH can be given here, the place of data that were moved."
    else:
        message = f"{listed}: this does not change an evaluation. Remove it; keys that do begin with {', '.join(keys)}."
    if (recipe := RunDirectory(source).recipe).is_file():
        try:
            load_recipe(recipe, overrides)
        except RecipeError as error:
            message = f"{message}\n{error}"
    raise RecipeError(message)


def as_recipe(recipe: Recipe | Path | str) -> Recipe:
    """A recipe, or the one in a file. Raises RecipeError for anything else."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe)
    raise RecipeError(
        f"Found a {type(recipe).__name__} instead of a recipe. Give the path of a YAML file, or what "
        "darseg.load_recipe(path) returns."
    )


def differences(first: Recipe, second: Recipe, ignore: Collection[str] = ()) -> list[str]:
    """A line "key: first → second" for every key in which two recipes differ, except those to ignore."""
    lines = recipe_differences(first, second)
    return [line for line in lines if line.split(":")[0] not in ignore]


def classes_of(recipe: Recipe) -> ClassSet:
    """The classes that a recipe names."""
    return class_set(recipe.data.classes)


def manifest_of(recipe: Recipe | Path | str) -> Manifest:
    """Find the images of every role. Raises DataError, RecipeError."""
    recipe = as_recipe(recipe)
    data, classes = recipe.data, classes_of(recipe)
    root = Path(data.root)
    encoding = _encoding_of(recipe)
    layout = layout_of(recipe)
    images = layout.images if layout else root / (data.images or IMAGES)
    labels = root / (data.labels or LABELS)

    # Nobody named the folder `images`: if labeled images are in other places, it need not be there.
    optional = layout is None and data.images is None
    reading = reading_of(recipe)
    whole = default = Source(
        root,
        images,
        labels,
        encoding=encoding,
        reading=reading,
        layout=layout,
        optional=optional,
        parts=part_rule_of(recipe),
    )
    labeled, validation = data.labeled, data.validation
    if layout is not None and layout.name == "cityscapes":
        default = replace(default, images=images / "train")
        validation = validation or SourceConfig(images="leftImg8bit/val")
    elif layout is not None:
        default = replace(default, ids=tuple(layout.training_ids()))
        labeled = labeled or SourceConfig(list="ImageSets/Segmentation/train.txt")
        validation = validation or SourceConfig(list="ImageSets/Segmentation/val.txt")

    def source(config: SourceConfig | None) -> Source | None:
        if config is None:
            return None
        # A list may name any image of the data set; without one the training images are meant.
        base = whole if config.list or config.images else default
        return replace(
            base,
            images=root / config.images if config.images else base.images,
            labels=root / config.labels if config.labels else labels,
            list_file=root / config.list if config.list else None,
            every=config.every,
            except_every=config.except_every,
        )

    roles = (labeled, data.unlabeled, validation, data.test)
    try:
        manifest = build_manifest(classes, Sources(default, *map(source, roles)))
        return follow_marks(manifest, data.orientation)
    except DataError as error:
        if layout and (hints := layout.warnings()):
            raise DataError(faults(f"{error}\nThe data set itself", hints)) from None
        raise


def _encoding_of(recipe: Recipe) -> LabelEncoding:
    """How the values and colors of label files become classes."""
    data = recipe.data
    return label_encoding(
        classes_of(recipe),
        data.ignore,
        data.label_values,
        format=data.label_format,
        colors=data.label_colors,
        own_colors=isinstance(data.classes, (str, Mapping)),
        transparent=data.label_transparent,
    )


def part_rule_of(recipe: Recipe) -> PartRule | None:
    """Which files are masks of which class, if a label map is several files."""
    parts, classes = recipe.data.label_parts, classes_of(recipe)
    if parts is None:
        return None
    indices = {"ignore": IGNORE, **{name: k for k, name in enumerate(classes.names)}}
    unknown = [
        f"data.label_parts: {name!r} is neither a class nor ignore. The classes are {', '.join(classes.names)}."
        for name in (*(name for name in parts if name != "other"), parts.get("other", "ignore"))
        if name not in indices
    ]
    if unknown:
        raise RecipeError(faults("The label settings of the recipe cannot be used", unknown))
    patterns = tuple((pattern, indices[name]) for name, pattern in parts.items() if name != "other")
    return PartRule(patterns, indices[parts.get("other", "ignore")])


def reading_of(recipe: Recipe | None) -> Reading:
    """How the recipe has pictures read, before the sizes of label maps have their say (`follow_marks`)."""
    if recipe is None:
        return USUAL
    data = recipe.data
    return Reading(
        upright=data.orientation != "stored",
        bands=data.bands,
        scaling=Scaling(data.black, data.white),
        max_pixels=data.max_pixels,
    )


def chosen_orientation(recipe: Recipe, manifest: Manifest) -> dict[str, str]:
    """What a run records if label maps said that pictures stay as they are stored; otherwise nothing."""
    upright = all(sample.reading.upright for samples in manifest.roles().values() for sample in samples)
    return {} if upright or recipe.data.orientation != "auto" else {ORIENTATION: "stored"}


def as_the_run_read(recipe: Recipe, run: RunDirectory) -> Recipe:
    """A run folder's recipe with the orientation that the run's pictures have been read in."""
    if recipe.data.orientation != "auto" or not run.environment.is_file():
        return recipe
    recorded = read_plain(run.environment, "Restore it from a copy.").get(ORIENTATION)
    if recorded != "stored":
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"orientation": "stored"})})


def layout_of(recipe: Recipe) -> Layout | None:
    """The published data set that the recipe names. Raises DataError if folders of it are missing."""
    data, root = recipe.data, Path(recipe.data.root)
    if data.layout == "folders":
        return None
    sbd = find_sbd(root, root / data.sbd if data.sbd else None) if data.layout == "voc" else None
    layout = Layout(data.layout, root, sbd, train_ids=classes_of(recipe).names == CITYSCAPES.names)
    missing = layout.missing()
    if missing:
        raise DataError(faults(f"data.layout {data.layout}: the data set is not complete", missing))
    return layout


def masks(samples: Sequence[Sample]) -> Iterator[tuple[str, np.ndarray]]:
    """Path and label map, uint8 [H, W], of every sample that has one."""
    return ((str(s.label), read_truth(s)) for s in samples if s.label)


def spec_of(recipe: Recipe) -> NetworkSpec:
    """The description of the network that a recipe trains."""
    classes = classes_of(recipe)
    network = recipe.network
    return NetworkSpec(
        architecture=network.architecture,
        backbone=network.backbone,
        classes=len(classes),
        output_stride=network.output_stride,
        head_channels=network.head_channels,
        auxiliary=auxiliary_weight_of(recipe) > 0,
        class_names=classes.names,
        class_colors=classes.colors,
        release_classifier=network.architecture == "deeplabv2" and recipe.release_quirks,
    )


def auxiliary_weight_of(recipe: Recipe) -> float:
    """Weight of the auxiliary loss; 0 if the architecture has no auxiliary head."""
    network = recipe.network
    default = AUXILIARY_WEIGHT if network.architecture == "pspnet" else 0.0
    return default if network.auxiliary_weight is None else network.auxiliary_weight


def build_initial_network(recipe: Recipe, draw: int | None = None) -> tuple[Network, str]:
    """The network as round 0 begins: on the CPU, heads drawn from the seed, backbone from its weights.

    Args:
        draw: a number that gives other random weights with the same seed; None: the seed's own.

    Returns:
        the network, and a sentence that says where its weights come from.

    Raises WeightsError if the weights cannot be used: a run never silently starts from random weights.
    """
    torch.manual_seed(recipe.seed if draw is None else _seed_of_draw(recipe.seed, draw))
    network = spec_of(recipe).build(recipe.network.drop_path)
    weights = recipe.network.weights
    if weights == "none":
        return network, f"none; {recipe.network.backbone} starts from random numbers (network.weights: none)"
    fetched = isinstance(weights, WeightsFile)
    path = fetch(weights.url, weights.sha256, CACHE.expanduser()) if fetched else Path(weights)
    report = load_weights(network, path, recipe.network.strict, class_names=classes_of(recipe).names)
    what = "the whole network" if report.whole else recipe.network.backbone
    source = f"{len(report.loaded)} tensors of {what} from {path}"
    if report.unfilled:
        source += f"; {len(report.unfilled)} that do not fit start from random numbers: {'; '.join(report.unfilled)}"
    if report.unused:
        source += f"; not needed: {', '.join(report.unused)}"
    for note in (report.classes, report.resized):
        source += f"; {note}" if note else ""
    if report.unaligned:
        source += "; its class weights are left out, since training goes on from the plain network"
    if report.architecture == "deeplabv2" and not recipe.release_quirks:
        source += (
            "; all four branches of its classifier are used here, but the release trained with two of them"
        )
    return network, source


def _seed_of_draw(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0] >> 1)


def build_networks(recipe: Recipe) -> dict[int, tuple[Network, str]]:
    """Round → the network that begins there, and where its weights come from.

    With `continues: none` its random weights are its own: two networks that begin alike would learn alike.
    """
    return {
        index: build_initial_network(recipe.at(index), index if config.continues == "none" else None)
        for index, config in enumerate(recipe.rounds)
        if recipe.goes_on_from(index) is None
    }


def beginnings(recipe: Recipe) -> list[int]:
    """The rounds in which a network begins: the first, and those that go on from none."""
    return [index for index in range(len(recipe.rounds)) if recipe.starts(index) == index]


def check_sizes(recipe: Recipe, network: Network, only: str = "", round_index: int = 0) -> None:
    """Raise SizeError with every crop and window that the network cannot take, and the nearest sizes.

    Args:
        recipe: as it holds in the round in which the network begins (`Recipe.at`).
        only: check only the size of this key.
        round_index: of that round.
    """
    sizes = {
        "training.crop": recipe.training.crop,
        "labeling.window": labeling_protocol(recipe).window,
        "evaluation.window": evaluation_protocol(recipe).window,
    }
    lines = []
    for key, size in sizes.items():
        if only not in ("", key) or size == "whole":
            continue
        height, width = size
        try:
            network.sides.check(height, width)
        except SizeError as error:
            lines.append(f"{key}: {error}")
    if not lines:
        return
    if not round_index:
        raise SizeError(faults("The recipe has sizes that this network cannot take", lines))
    raise SizeError(
        faults(
            f"The recipe has sizes that the network of round {round_index} cannot take. Set rounds.{round_index}.crop, "
            "which is also its window if labeling.window and evaluation.window are null",
            lines,
        )
    )


def _protocol(recipe: Recipe, config: ProtocolConfig | LabelingConfig) -> Protocol:
    return Protocol(
        window=config.window or recipe.labeling.window or recipe.training.crop,
        base_size=config.base_size,
        mirror=config.mirror,
        scales=tuple(config.scales),
        bf16=recipe.training.precision == "bf16",
        windows_at_once=config.windows_at_once,
    )


def labeling_protocol(recipe: Recipe) -> Protocol:
    """How labeling predicts whole images."""
    return _protocol(recipe, recipe.labeling)


def evaluation_protocol(recipe: Recipe) -> Protocol:
    """How evaluation predicts whole images."""
    return _protocol(recipe, recipe.evaluation)


def set_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads; None: as many as the environment and the machine say."""
    torch.set_num_threads(threads or default_threads())


def pick_device() -> torch.device:
    """The GPU of this process; the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def bf16_is_emulated() -> bool:
    """Whether bfloat16 is slow here, as on x86 processors without AVX-512.

    With ResNet-18 on an AMD EPYC that has only AVX2 it was over 20 times slower than fp32.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return pick_device().type == "cpu" and on_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def load_to_predict(path: Path, plain: bool = False) -> Network:
    """The network saved at `path`, placed to predict (`place_to_predict`), in eval mode.

    Args:
        plain: take away the class weights that are folded into its classifier.

    Everything that predicts loads networks here, so that one network gives the same bits everywhere (with equally many
    threads). Raises WeightsError.
    """
    # The caller may be in inference mode, and autograd does not record its tensors.
    with torch.inference_mode(False):
        network = place_to_predict(load_network(path, plain))
        if network.image_classes is not None:
            place(network.image_classes.classifier)
        return network


def place_to_predict(network: Network) -> Network:
    """A network in eval mode on its device; on a CPU with BatchNorm folded: it can only predict.

    On an H200 PSPNet-50 makes 11 % more passes if it is not (docs/performance.md): convolutions with a bias take a kernel
    more, which is slower than BatchNorm's.
    """
    return place(fold_batchnorm(network) if pick_device().type == "cpu" else network)


def place(network: Module) -> Module:
    """Move a network to the GPU, if there is one, in channels-last format: convolutions are faster in it."""
    return network.to(pick_device()).to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
