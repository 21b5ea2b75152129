"""Align a trained network with the images of another place, without labels and without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.files import is_taken, named
from darseg.data.pictures import marked_line
from darseg.data.pipeline import overlapped
from darseg.errors import DataError, NumericsError, RunError, faults
from darseg.model.aligned import AlignmentRecord, fold_alignment, unfold_alignment
from darseg.model.class_order import reorder_classes
from darseg.model.predict import predict_probabilities
from darseg.model.weights import load_network, save_network
from darseg.model.windows import Memory
from darseg.pseudo.align import TOLERANCE, align, check_settings
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.distribution import count_each
from darseg.pseudo.labeled_shares import LabeledShares, labeled_shares
from darseg.pseudo.labeling import BOUND
from darseg.pseudo.pixel_sample import PixelSample
from darseg.pseudo.shift import Shift, estimate_shift
from darseg.run.build import check_overrides, manifest_of, masks
from darseg.run.evaluate import Trained, load_trained
from darseg.run.journal import Journal
from darseg.run.media import Medium, list_media, unread_lines
from darseg.run.prior import Prior, class_shares
from darseg.run.remedies import explain_memory, less_at_once
from darseg.run.shots import Shot, choose_shots, read_shot, with_frames
from darseg.run.target import uncertain_shares

OTHER_BOUND = 20.0
"""Default largest class weight for given and estimated shares: the class mixes of two places may differ several times."""

IMAGES = 500
"""Most images (and frames) that class weights are found on by default."""

SUFFIX = ".safetensors"

SEED = 0
"""Of the choice of images and pixels."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """What `align_network` found and wrote.

    Attributes:
        names: of the classes.
        before: float64 [K], shares of the plain decisions on the images.
        wanted: float64 [K], shares that were asked for.
        alignment: the class weights, and the shares with them (`reached`).
        shift: how the wanted shares were estimated; None if they were given or counted.
        images: images and frames that were predicted.
        available: how many there were.
        failed: a line for each file that could not be read.
        doubts: reasons why the weights should not be trusted.
        path: the network that was written; None: nothing was.
        uncertain: name and interval of each class whose labeled share, as the target, is uncertain.
    """

    names: tuple[str, ...]
    before: NDArray[np.float64]
    wanted: NDArray[np.float64]
    alignment: Alignment
    shift: Shift | None
    images: int
    available: int
    failed: tuple[str, ...]
    doubts: tuple[str, ...]
    path: Path | None
    uncertain: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return {
            "classes": list(self.names),
            "before": self.before.tolist(),
            "wanted": self.wanted.tolist(),
            "alignment": self.alignment.to_json(),
            "shift": self.shift.to_json() if self.shift else None,
            "images": self.images,
            "available": self.available,
            "failed": list(self.failed),
            "doubts": list(self.doubts),
            "path": str(self.path) if self.path else None,
            "uncertain": list(self.uncertain),
        }


def align_network(
    source: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    prior: Prior | None = None,
    shift: bool = False,
    recipe: Recipe | Path | str | None = None,
    round_index: int | None = None,
    bound: float | None = None,
    strength: float = 1.0,
    limit: int = IMAGES,
    overwrite: bool = False,
    despite_doubts: bool = False,
    console: Console | None = None,
    overrides: Sequence[str] = (),
) -> Adapted:
    """Give a network's decisions on unlabeled images the wanted class shares, and write it.

    The network is not trained: class weights become a bias of its classifier (`darseg.align`). The shares are those of
    the recipe's labeled masks, or `prior`, or estimated from the images (`shift`, see `estimate_shift`).

    Args:
        source: run folder (its result, or the round `round_index`) or .safetensors checkpoint. Class weights that it
            has already are taken away first.
        images: an image, a video, a folder, a pattern such as "photos/**/*.jpg", or several of these.
        out: the .safetensors file to write; None: NAME_aligned.safetensors next to the source.
        prior: shares or counts of pixels by class name, or a JSON or YAML file of them.
        recipe: for a checkpoint: the recipe it was trained with, for its protocol and labeled masks.
        bound: largest class weight and reciprocal of the smallest; None: 5, and 20 for a prior or shift.
        strength: power of the class weights, from 0 to 1.
        limit: most images and frames to predict; a seeded choice if there are more.
        overwrite: replace `out` if it exists.
        despite_doubts: write the network even if there are doubts (`Adapted.doubts`).
        overrides: "data.root=PATH", if the recipe's data were moved.

    Returns:
        shares and weights. `path` is None, and nothing was written, if there are doubts, or no weights.

    Raises RunError, RecipeError, WeightsError, StorageError, NumericsError; DataError for a prior that is not one of
    these classes, or with 0 for a class that is predicted, and if no image can be read.
    """
    task = _Task(prior, shift, bound=bound, strength=strength, limit=limit)
    check_overrides(source, overrides)
    path = _check_out(Path(source), Path(out) if out is not None else None, round_index, overwrite=overwrite)
    trained = load_trained(source, round_index, overrides, recipe=recipe)
    unfold_alignment(trained.network)
    patterns = [images] if isinstance(images, (str, Path)) else images
    media = list_media(patterns)
    _report(Journal(None, None, console or Console()), patterns, media, upright=trained.reading().upright)
    adapted = _find_weights(source, trained, media, task=task, console=console)
    if not adapted.alignment.converged or (adapted.doubts and not despite_doubts):
        return adapted
    note = f"{adapted.images} of {adapted.available} images, {task.origin} class shares"
    network = load_network(trained.path, plain=True)
    if trained.order is not None:
        reorder_classes(network, trained.order)
    save_network(fold_alignment(network, AlignmentRecord.of(adapted.alignment, note)), path, trained.spec)
    return replace(adapted, path=path)


def _report(
    journal: Journal, patterns: Sequence[Path | str], media: Sequence[Medium], *, upright: bool
) -> None:
    """Say how many images have an orientation mark, and what of the folders is not read."""
    images = (medium.path for medium in media if not medium.is_video)
    if line := marked_line(images, upright=upright):
        journal.say(line)
    for line in unread_lines(patterns):
        journal.warn(line)


@dataclass(frozen=True)
class _Task:
    """What is asked for. Raises RunError and RecipeError for what cannot work; see `align_network`."""

    prior: Prior | None
    shift: bool
    bound: float | None
    strength: float
    limit: int

    def __post_init__(self) -> None:
        if self.prior is not None and self.shift:
            raise RunError(
                "Both a prior and --shift are given. Choose one: --prior gives the class shares, --shift estimates them."
            )
        if self.limit < 1:
            raise RunError(f"The number of images is {self.limit}; expected at least 1.")
        check_settings(self.largest, self.strength)

    @property
    def origin(self) -> str:
        """Where the wanted shares are from."""
        return "estimated" if self.shift else "given" if self.prior is not None else "labeled"

    @property
    def largest(self) -> float:
        """The largest class weight."""
        return self.bound if self.bound is not None else BOUND if self.origin == "labeled" else OTHER_BOUND


def _find_weights(
    source: Path | str,
    trained: Trained,
    media: Sequence[Medium],
    *,
    task: _Task,
    console: Console | None,
) -> Adapted:
    """Predict the images, and find the class weights that give their decisions the wanted shares."""
    names = trained.classes().names
    uncertain: list[str] = []
    if task.prior is not None:
        wanted = class_shares(task.prior, names)
    else:
        labeled = _labeled_shares(source, trained, shift=task.shift)
        wanted, uncertain = labeled.share, [] if task.shift else uncertain_shares(labeled, names)
    sampled = _sample(trained, media, task.limit, title="predict", console=console)
    estimate = None
    if task.shift:
        reference = _sample_reference(trained, task.limit, console)
        estimate = estimate_shift(sampled.rows, wanted, reference)
        wanted = estimate.share
    alignment = align(sampled.rows, wanted, bound=task.largest, strength=task.strength)
    assert alignment.plain is not None
    if task.prior is not None:
        _check_zeros(wanted, alignment.plain, names)
    return Adapted(
        names=names,
        before=alignment.plain,
        wanted=wanted,
        alignment=alignment,
        shift=estimate,
        images=sampled.images,
        available=sampled.available,
        failed=sampled.failed,
        doubts=_doubts(alignment, estimate, names, images=sampled.images),
        path=None,
        uncertain=tuple(uncertain),
    )


def _check_out(source: Path, out: Path | None, round_index: int | None, *, overwrite: bool) -> Path:
    """The file to write. Raises RunError if it must not be written."""
    if out is None:
        stem = source.resolve().stem if source.suffix == SUFFIX else source.resolve().name
        stem += "" if round_index is None else f"_round_{round_index}"
        out = source.resolve().with_name(f"{stem}_aligned{SUFFIX}")
        remedy = f"Give another name with --out OUT{SUFFIX}"
    else:
        remedy = "Give another name"
    if out.suffix != SUFFIX:
        raise RunError(
            f"{out}: networks of darseg are safetensors files. Name it {out.with_suffix(SUFFIX).name}."
        )
    if out.is_dir():
        raise RunError(f"{out} is a folder. Give the name of a file to write.")
    if out.exists() and source.exists() and out.samefile(source):
        raise RunError(f"{out} is the network to align. {remedy}.")
    if is_taken(out) and not overwrite:
        raise RunError(
            f"{named(out)} exists already and was left as it is. {remedy}, or replace it with --force."
        )
    return out


def _labeled_shares(source: Path | str, trained: Trained, *, shift: bool) -> LabeledShares:
    """The class shares of the recipe's labeled masks. Raises RunError without a recipe."""
    if trained.recipe is None:
        needed = (
            "the shares it was trained with are not known, and --shift compares with them. Give"
            if shift
            else "its labeled masks are not known. Give the class shares with --prior SHARES.json, or"
        )
        raise RunError(
            f"{source} is a checkpoint outside a run folder, so {needed} its recipe with --recipe RECIPE.yaml."
        )
    try:
        labeled = manifest_of(trained.recipe).labeled
        each = count_each(masks(labeled), trained.network.classes)
    except DataError as error:
        remedy = "" if shift else "\nOr give the class shares with --prior SHARES.json."
        raise DataError(f"{error}{remedy}") from None
    return labeled_shares(each)


@dataclass(frozen=True)
class _Sampled:
    """Scores of a sample of pixels, float16 [N, K], and what they are of."""

    rows: NDArray[np.float16]
    images: int
    available: int
    failed: tuple[str, ...]


def _sample(
    trained: Trained, media: Sequence[Medium], limit: int, *, title: str, console: Console | None
) -> _Sampled:
    """Predict a choice of images and sample their pixels; unreadable files are left out.

    Raises DataError if no file can be read, NumericsError if the network has diverged.
    """
    shots = choose_shots(media, limit, SEED)
    failed, memory = list(shots.failed), Memory()
    pixels, images = PixelSample(trained.network.classes, SEED), 0

    def work(shot: Shot, image: np.ndarray | str) -> None:
        nonlocal images
        if isinstance(image, str):
            failed.append(image)
            return
        scores = predict_probabilities(trained.network, image, trained.protocol(image), memory=memory)
        try:
            pixels.add(shot.id, scores, probabilities=True, name=str(shot))
        except DataError as error:  # of one image, it would be of all
            raise NumericsError(str(error)) from None
        images += 1

    with (
        Journal(None, None, console or Console()).progress(title, len(shots.chosen)) as advance,
        explain_memory(less_at_once(trained.recipe)),
    ):
        overlapped(
            with_frames(shots.chosen, failed),
            read=partial(read_shot, reading=trained.reading()),
            work=work,
            write=lambda *_: None,
            advance=advance,
        )
    if not images:
        raise DataError(faults("None of these files can be read", sorted(failed)))
    return _Sampled(
        pixels.rows(pixels.sizes()), images, available=shots.available, failed=tuple(sorted(failed))
    )


def _sample_reference(trained: Trained, limit: int, console: Console | None) -> NDArray[np.float16] | None:
    """Scores of the recipe's unlabeled images, or validation images; None if it has neither.

    The labeled images would not do: the network was trained on them.
    """
    assert trained.recipe is not None
    roles = manifest_of(trained.recipe).roles()
    samples = roles["unlabeled"] or roles["validation"]
    media = [Medium.of(sample.id, sample.image) for sample in samples]
    if not media:
        return None
    return _sample(trained, media, limit, title="predict the recipe's own images", console=console).rows


def _check_zeros(wanted: NDArray[np.float64], before: NDArray[np.float64], names: Sequence[str]) -> None:
    """Raise DataError if the prior excludes a class that is predicted: no class weight is 0."""
    lines = [
        f"{name}: {share:.2%} of the pixels"
        for name, share, target in zip(names, before, wanted, strict=True)
        if target == 0 and share > TOLERANCE
    ]
    if lines:
        raise DataError(
            faults(
                "The prior has the share 0 for classes that the network predicts. Class weights cannot be 0: give them "
                "the share that you would accept, such as 0.0001. They are",
                lines,
            )
        )


def _doubts(
    alignment: Alignment, shift: Shift | None, names: Sequence[str], *, images: int
) -> tuple[str, ...]:
    """Why the class weights should not be trusted."""
    doubts = []
    if images == 1:
        doubts.append("there is only one image, and its class mix says little about others; give more images")
    if shift is not None and not shift.converged:
        doubts.append(
            "the class shares of these images could not be estimated: several classes look alike to the network. Give "
            "them with --prior"
        )
    elif shift is not None and not shift.corrected:
        doubts.append(
            "the network's bias could not be corrected before the shares were estimated: the recipe has no unlabeled "
            "and no validation images, or the network hardly knows one of the classes. Give the shares with --prior"
        )
    if (alignment.reached == 1).any():
        doubts.append(
            "the network predicts one class only, so there is nothing to align; it needs more training"
        )
    elif not alignment.converged:
        doubts += alignment.warnings(names)
    return tuple(doubts)
