"""What a round's network will see: images and labels of its first steps, as training draws them.

Nothing is trained, and nothing is written. Labels that only a network can give are shown if the run folder has the
network that the round starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import Cache, Example
from darseg.data.files import refuse_link
from darseg.data.manifest import Manifest, Sample
from darseg.errors import RunError
from darseg.methods.acceptance import MeanAligned, window_of
from darseg.methods.adversarial import Adversarial
from darseg.methods.consistency import Consistency
from darseg.model.torchfile import read_bare_part
from darseg.model.weights import load_network
from darseg.pseudo.distribution import count_labels
from darseg.run.basis import basis_of
from darseg.run.build import (
    beginnings,
    check_overrides,
    check_sizes,
    manifest_of,
    masks,
    recipe_of,
    set_threads,
    spec_of,
)
from darseg.run.data_digest import digest_samples
from darseg.run.directory import RunDirectory
from darseg.run.labeled_part import labeled_samples
from darseg.run.marks import expect_excluded, without
from darseg.run.online import describe_colors, describe_online, describe_views
from darseg.run.plan import Round, method_of, plan_rounds
from darseg.run.records import read_texts
from darseg.run.seen import TRUTH, SeenImage, labeled_images, labels_of, unlabeled_images
from darseg.run.streams import feeds_of, open_stream
from darseg.training.method import Feed, Method, Streamed

CACHED = 1 << 30
"""Bytes of decoded images that are kept: each labeled one is needed twice."""

TITLES = {"labeled": "labeled images", "pseudo": "pseudo-labeled images", "unlabeled": "unlabeled images"}
"""Role of a feed → title of its pictures."""


@dataclass(frozen=True, eq=False)
class SeenBatch:
    """The images of one stream at a step. note: what a reader should know about their labels."""

    step: int
    title: str
    images: tuple[SeenImage, ...]
    note: str


@dataclass(frozen=True, eq=False)
class Preview:
    """What a round's network will see.

    Attributes:
        name: of the recipe or the run folder.
        settings: what decides how images are cut out and changed, as name and text.
        boxes: whether boxes of images are mixed.
        notes: of the streams, each once.
        batches: step by step, the streams of each in order; drawn as they are asked for, once.
    """

    name: str
    round: int
    steps: int
    classes: ClassSet
    settings: tuple[tuple[str, str], ...]
    boxes: bool
    notes: tuple[str, ...]
    batches: Iterator[SeenBatch]


@dataclass(frozen=True)
class _Source:
    """A recipe with its data. run: the folder it was trained in; None: there is none."""

    name: str
    recipe: Recipe
    manifest: Manifest
    round: Round
    run: RunDirectory | None

    @property
    def index(self) -> int:
        """Number of the round."""
        return self.round.index


def preview_round(
    source: Path | str, *, round_index: int = 0, steps: int = 1, overrides: Sequence[str] = ()
) -> Preview:
    """Show what the network sees in the first steps of a round.

    Args:
        source: a recipe, or a run folder, which has networks and pseudo labels.
        overrides: keys of the recipe to change; of a run folder only data.root.

    Raises:
        RecipeError, DataError: as `train` does, before and while images are drawn.
        RunError: there is no such round, or a run's data have changed.
    """
    opened = _open(Path(source), round_index, overrides)
    set_threads(opened.recipe.threads)
    feeds = [_feed(opened, number, feed) for number, feed in enumerate(feeds_of(opened.round))]
    return Preview(
        name=opened.name,
        round=round_index,
        steps=steps,
        classes=opened.manifest.classes,
        settings=tuple(_settings(opened)),
        boxes=opened.round.online is not None and opened.round.online.mixing == "cutmix",
        notes=tuple(feed.note for feed in feeds if feed.note),
        batches=_batches(opened, feeds, steps),
    )


def _open(source: Path, index: int, overrides: Sequence[str]) -> _Source:
    run = RunDirectory(source) if source.is_dir() else None
    if run is None:
        recipe = load_recipe(source, overrides)
    else:
        run.refuse_links()
        check_overrides(source, overrides)
        recipe = recipe_of(source, overrides)
    last = len(recipe.rounds) - 1
    if index > last:
        known = f"rounds 0 to {last}" if last else "only round 0"
        raise RunError(
            f"{source}: there is no round {index}; the recipe has {known}. Choose one with --round."
        )
    manifest = manifest_of(recipe)
    if run is not None:
        _check_as_begun(run, recipe, manifest)
    rounds = plan_rounds(
        recipe,
        labeled=len(manifest.labeled),
        unlabeled=len(manifest.unlabeled),
        fills={begins: _fill(recipe.at(begins), begins) for begins in beginnings(recipe)},
    )
    name = source.resolve().name if run is not None else source.stem
    return _Source(name, recipe, manifest, round=rounds[index], run=run)


def _check_as_begun(run: RunDirectory, recipe: Recipe, manifest: Manifest) -> None:
    """Raise RunError if labeled or unlabeled images are not those that a run began with."""
    try:
        recorded = read_texts(run.data, "Restore it from a copy.")
    except FileNotFoundError:
        recorded = {}
    roles = {"labeled": manifest.labeled, "unlabeled": manifest.unlabeled}
    changed = [role for role, samples in roles.items() if recorded.get(role) != digest_samples(samples)]
    if changed:
        raise RunError(
            f"{run.root}: the images in {recipe.data.root} are not those that the run began with ({', '.join(changed)}: "
            "other files or sizes), so its streams cannot be shown. Restore the data, say where they are now with "
            "data.root=PATH, or preview a recipe."
        )


def _fill(recipe: Recipe, begins: int) -> tuple[int, int, int]:
    """The color of padding, without building the network: the mean of its backbone or weights.

    Raises SizeError if it cannot take the recipe's crop, WeightsError for damaged weights.
    """
    with torch.device("meta"):  # no memory and no random numbers
        network = spec_of(recipe).build()
    check_sizes(recipe, network, only="training.crop", round_index=begins)
    mean: Sequence[float] = network.backbone.mean
    weights = recipe.network.weights
    if isinstance(weights, str) and weights != "none" and Path(weights).is_file():
        _, tensors = read_bare_part(Path(weights))
        if "mean" in tensors:  # a whole network of darseg
            mean = tensors["mean"].tolist()
    red, green, blue = (round(part) for part in mean)
    return red, green, blue


# --- streams


@dataclass(frozen=True)
class _Shown:
    """A feed with its images.

    Attributes:
        open: opens the stream again; with `inside`, labels are 0, and 255 on padding.
        known: ids of the samples that have a label to show.
        caption: of that label.
    """

    feed: Feed
    open: Callable[..., Iterator[Streamed]]
    known: frozenset[str]
    caption: str
    note: str = ""


def _methods(source: _Source) -> tuple[Method, Method] | None:
    """The method of an online round with the network that it starts from, and the same without mixing.

    None if the round is not online, if that network is not trained, or if another one has a say in the labels: a
    discriminator, or a second network, which begins with the round.
    """
    round_, run = source.round, source.run
    how = round_.online
    if not isinstance(how, Consistency) or how.networks > 1:
        return None
    if run is None or round_.begins == round_.index:
        return None
    if not (path := run.network(_goes_on_from(source, run))).exists():
        return None
    network = load_network(path).to(memory_format=torch.channels_last)  # ty: ignore[no-matching-overload]
    recipe = source.recipe.at(round_.index)
    # Labeled pixels per class weigh the loss, which is not computed here, and act on later steps. Only this rule needs
    # them to label the first one.
    classes, labeled = len(source.manifest.classes), source.manifest.labeled
    follows = isinstance(how.accept, MeanAligned)
    counts = count_labels(masks(labeled), classes).tolist() if follows else [1] * classes

    def method(online: Consistency) -> Method:
        return method_of(recipe, replace(round_, online=online), network, counts=counts)

    return method(how), method(replace(how, mixing="none"))


def _feed(source: _Source, number: int, feed: Feed) -> _Shown:
    samples, caption, note = _samples_of(source, feed)
    cache = Cache(CACHED)
    labeled = frozenset(sample.id for sample in samples if sample.label is not None)

    def load(sample: Sample, classes: ClassSet) -> Example:
        if sample.label is not None:
            if source.run is not None and feed.role == "pseudo" and caption != TRUTH:
                refuse_link(sample.label, source.run.root)
            return cache.load(sample, classes)
        image = cache.load_image(sample)
        return Example(sample.id, image, np.full(image.shape[:2], IGNORE, np.uint8))

    def load_inside(sample: Sample, classes: ClassSet) -> Example:
        """With a label of zeros, the label of a crop is 255 exactly on padding."""
        example = load(sample, classes)
        return replace(example, label=np.zeros_like(example.label))

    def open_feed(inside: bool = False) -> Iterator[Streamed]:
        return open_stream(
            source.round,
            feed,
            number=number,
            seed=source.recipe.seed,
            samples=samples,
            classes=source.manifest.classes,
            load=load_inside if inside else load,
            truth_every=1,
        )

    if feed.role == "labeled" and number:
        note = "The discriminator compares predictions with these labels."
    return _Shown(feed, open_feed, labeled, caption=caption, note=note)


def _goes_on_from(source: _Source, run: RunDirectory) -> int:
    """The round whose network a round goes on from; as if all were alike if not all before are scored."""
    index, scored = source.index, run.rounds_with("evaluate")
    if scored[:index] != list(range(index)):
        goes_on = source.recipe.goes_on_from(index)
        return index - 1 if goes_on is None else goes_on
    return basis_of(run, source.recipe, index).weights


def _samples_of(source: _Source, feed: Feed) -> tuple[Sequence[Sample], str, str]:
    """The samples of a feed, the caption of their labels, and a note."""
    if feed.role == "labeled":
        return labeled_samples(source.recipe, source.index, source.manifest.labeled), "label", ""
    run, index, unlabeled = source.run, source.index, source.manifest.unlabeled
    note = "Labels need a trained network: train first, then preview the run folder."
    if run is not None:
        begun = feed.role == "unlabeled" and run.has_trained(index)
        unlabeled = without(unlabeled, expect_excluded(run, index, unlabeled, begun=begun))
        if feed.role == "pseudo":
            if index in run.rounds_with("label"):
                return run.label_set(index).samples(unlabeled), "pseudo label", ""
            note = f"The pseudo labels of round {index} are not made yet; `darseg train` makes them as the round begins."
        elif source.round.begins == index:
            note = f"The network of round {index} starts untrained, so its labels are not shown."
        elif not run.network(before := _goes_on_from(source, run)).exists():
            note = f"Labels need the network of round {before}, which is not trained yet."
        else:
            note = (
                f"Labels are made by the network of round {before}, from which this round starts. Those of the first "
                "step are training's; then training labels with a network that has moved on."
            )
            if isinstance(how := source.round.online, Consistency) and (window := window_of(how.accept)):
                note += (
                    f" online.aligned accepts nothing in the first {window} steps, whose predictions its thresholds are "
                    "chosen from. These are such steps: nothing has a label."
                )
    if isinstance(source.round.online, Adversarial):
        note = "The network labels for itself as it trains, where its discriminator trusts it, so no labels are shown."
    elif source.round.online is not None and source.round.online.networks > 1:
        note = "Labels are made by a second network, which begins with the round, so none are shown."
    if any(sample.label is not None for sample in unlabeled):
        note += " The truth is shown where it is known; nothing is learned from it."
    return unlabeled, TRUTH, note


def _batches(source: _Source, feeds: Sequence[_Shown], steps: int) -> Iterator[SeenBatch]:
    """The batches of all feeds, step by step."""
    methods = _methods(source)
    with ExitStack() as stack:

        def opened(shown: _Shown, **options: bool) -> Iterator[Any]:
            return stack.enter_context(closing(shown.open(**options)))  # ty: ignore[invalid-argument-type]

        streams = [opened(shown) for shown in feeds]
        insides = [opened(shown, inside=True) if shown.feed.role != "unlabeled" else None for shown in feeds]
        for step in range(steps):
            streamed = [next(stream) for stream in streams]
            for shown, stream, drawn in zip(feeds, insides, streamed, strict=True):
                if stream is None:
                    assert source.round.online is not None
                    labels = None if methods is None else labels_of(methods, streamed, step)
                    images = unlabeled_images(drawn, source.round.online.mixing, labels)
                else:
                    inside = next(stream).labels.numpy() != IGNORE
                    images = labeled_images(drawn, inside, known=shown.known, caption=shown.caption)
                yield SeenBatch(step, TITLES[shown.feed.role], tuple(images), note=shown.note)


# --- settings


def _settings(source: _Source) -> Iterator[tuple[str, str]]:
    """Name and text of what decides how images are cut out and changed."""
    round_, how = source.round, source.round.augmentation
    last = len(source.recipe.rounds) - 1
    kind = "labeled and pseudo-labeled images" if round_.labels else "labeled images"
    kind = "online" if round_.online else kind
    steps = "1 step" if round_.steps == 1 else f"{round_.steps:,} steps"
    yield "round", f"{round_.index} of 0 to {last}: {kind}, {steps}"
    batch = f"{round_.batch} labeled"
    batch += f" + {round_.pseudo_batch} pseudo-labeled" if round_.pseudo_batch else ""
    batch += f" + {round_.online.batch} unlabeled" if round_.online else ""
    yield "images of a step", batch
    yield "crop", f"{how.crop[0]} x {how.crop[1]} pixels (height x width)"
    yield "scale", f"{how.scale[0]:g} to {how.scale[1]:g} times the image"
    yield "rotation", f"half of the images, by up to {how.rotate:g}° either way" if how.rotate else "none"
    yield "mirror", "half of the images, left to right" if how.mirror else "none"
    but_weak = ", not the unlabeled ones" if round_.online else ""
    yield "blur", f"half of the images, 5 x 5 pixels{but_weak}" if how.blur else "none"
    yield "colors", f"{describe_colors(how.colors)}{but_weak}" if how.colors else "unchanged"
    yield "padding", "color {}, {}, {} (RGB)".format(*how.fill)
    if round_.online is not None:
        yield "online", describe_online(round_.online)
        yield from describe_views(round_.online)
    yield "seed", f"{source.recipe.seed}"
