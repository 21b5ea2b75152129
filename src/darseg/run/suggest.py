"""Suggest which unlabeled images of a run to label next, and write what a person needs to label them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.classes import ClassSet
from darseg.data.dataset import load_image
from darseg.data.encoding import PLAIN, LabelEncoding
from darseg.data.files import remove_leftovers, write_whole
from darseg.data.manifest import Manifest, Sample
from darseg.data.maps import check_names
from darseg.data.pipeline import overlapped
from darseg.data.sameness import digest_pixels
from darseg.errors import DataError, RunError, SizeError, faults
from darseg.model.network import Network
from darseg.model.uncertain import Uncertain, UncertainPredictor
from darseg.pseudo.distribution import count_labels
from darseg.pseudo.suggest import Candidates, Described, choose_images
from darseg.run.build import check_overrides, labeling_protocol, manifest_of, masks
from darseg.run.data_digest import digest_samples
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import Trained, describe_decisions, load_trained, result_path
from darseg.run.journal import Journal
from darseg.run.marks import read_marks, without
from darseg.run.outputs import held_folder
from darseg.run.prelabels import CocoFile, Prelabels
from darseg.run.remedies import explain_memory, less_at_once
from darseg.run.settings import digest_settings
from darseg.run.suggestions import (
    Facts,
    Suggested,
    begin_folder,
    describe_picks,
    read_suggested,
    write_suggested,
)

COUNT = 24
"""Images that are suggested by default."""

SEED = 0
"""Of the choice of the images that are looked at."""

LIST = "suggested.txt"
"""The suggested images, one a line, as recipes' lists name them. Written last."""

VERSION = 1
"""Of the rule; a later one does not continue what this one chose."""

Draw = Callable[[NDArray[np.uint8], Uncertain, ClassSet], object]
"""Takes a suggested image, uint8 [H, W, 3], its prediction, and the classes."""


@dataclass(frozen=True, eq=False)
class _Task:
    """A run that is opened to suggest images of it.

    Attributes:
        earlier: the network of the round before; None if there is none that takes the same windows.
        pool: the images that may be suggested.
        unlabeled: how many there are, with those that are not in the pool.
        marked: how many are marked as bad.
    """

    trained: Trained
    recipe: Recipe
    manifest: Manifest
    earlier: Network | None
    pool: tuple[Sample, ...]
    unlabeled: int
    marked: int
    journal: Journal

    def predictor(self) -> UncertainPredictor:
        return UncertainPredictor(self.trained.network, labeling_protocol(self.recipe), self.earlier)


def suggest_images(
    run: Path | str,
    out: Path | str,
    *,
    count: int = COUNT,
    round_index: int | None = None,
    pool: int | None = None,
    plain: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    draw: Draw = lambda *_: None,
) -> Suggested:
    """Choose the unlabeled images of a run to label next, and write their list and pre-labels.

    The files are `suggested.txt`, `suggestions.json`, `labels/ID.png` (in the recipe's values), `labelme/ID.json` and
    `coco.json`. If the call is stopped, the same call continues; files that exist are kept.

    Args:
        run: run folder.
        out: new folder, or one that an equal call began.
        count: images to suggest; fewer if the others are near-duplicates.
        round_index: whose network looks at the images; None: that of the run's result.
        pool: look at this many unlabeled images at most, chosen by a seed; None: all.
        plain: decide as the network was trained, also if the result's decisions are aligned.
        overrides: "data.root=PATH", if the run's data were moved.
        draw: called for each suggested image, in their order.

    Raises RunError, RecipeError, WeightsError, StorageError, NumericsError; DataError if there are too few images.
    """
    out, journal = Path(out), Journal(None, None, console or Console())
    _check_numbers(count, pool)
    task = _open(Path(run), round_index, overrides, pool=pool, plain=plain, journal=journal)
    if count > len(task.pool):
        raise DataError(
            f"{count} images are to be suggested, but only {len(task.pool)} unlabeled images can be. Lower the count."
        )
    check_names(out, [sample.id for sample in task.pool])
    inputs = _digest(task, count)
    with held_folder(out), explain_memory(less_at_once(task.recipe, "labeling")):
        remove_leftovers(out)
        begin_folder(out, inputs)
        suggested = read_suggested(out)
        if suggested is None:
            decisions = describe_decisions(run, round_index, plain)
            suggested = _choose(task, count, decisions)
            write_suggested(out, suggested)
        notes = _write_files(task, out, suggested, draw=draw)
        root = Path(task.recipe.data.root)
        samples = {sample.id: sample for sample in task.pool}
        lines = [_list_line(samples[picked.id], root) for picked in suggested.images]
        if not (out / LIST).exists():
            write_whole(out / LIST, "".join(f"{line}\n" for line in lines))
    return suggested.with_notes(notes)


def _check_numbers(count: int, pool: int | None) -> None:
    """Raise RunError for numbers of images that are not possible."""
    for name, number in (("count", count), ("pool", pool)):
        if number is not None and number < 1:
            raise RunError(f"The {name} is {number}. Give at least 1 image.")


def _open(
    run: Path,
    round_index: int | None,
    overrides: Sequence[str],
    *,
    pool: int | None,
    plain: bool,
    journal: Journal,
) -> _Task:
    """The run with all that is needed. Raises DataError if it has no image to suggest."""
    check_overrides(run, overrides)
    trained = load_trained(run, round_index, overrides, plain=plain)
    recipe = trained.recipe
    if recipe is None or not run.is_dir():
        raise RunError(f"{run} is a checkpoint, but images are suggested for a run. Give its run folder.")
    manifest = manifest_of(recipe)
    if not manifest.unlabeled:
        raise DataError(
            f"{run}: the recipe has no unlabeled images to choose from. Set data.unlabeled in the recipe, and train "
            "again; then suggest."
        )
    marks = read_marks(RunDirectory(run), {sample.id for sample in manifest.unlabeled})
    possible = without(manifest.unlabeled, marks)
    if not possible:
        raise DataError(
            f"{run}: all {len(manifest.unlabeled)} unlabeled images are marked as bad, so none can be suggested. Remove "
            "marks with `darseg view`."
        )
    chosen = sorted(possible, key=lambda sample: _rank(sample.id))[: pool or len(possible)]
    earlier = _earlier(run, trained, recipe, plain=plain, journal=journal)
    return _Task(
        trained=trained,
        recipe=recipe,
        manifest=manifest,
        earlier=earlier,
        pool=tuple(sorted(chosen, key=lambda sample: sample.id)),
        unlabeled=len(manifest.unlabeled),
        marked=len(marks),
        journal=journal,
    )


def _rank(name: str) -> bytes:
    return hashlib.sha256(f"darseg.run.suggest {SEED} {name}".encode()).digest()


def _earlier(run: Path, trained: Trained, recipe: Recipe, *, plain: bool, journal: Journal) -> Network | None:
    """The network of the round before, if there is one that takes the windows of this one."""
    index = (trained.round or 0) - 1
    if index < 0 or not RunDirectory(run).network(index).exists():
        return None
    network = load_trained(result_path(run, index, plain), recipe=recipe, plain=plain).network
    window = labeling_protocol(recipe).window
    try:
        if window != "whole":
            network.sides.check(*window)
    except SizeError:
        journal.say(
            f"The network of round {index} takes other windows, so its decisions are not compared with this round's."
        )
        return None
    return network


def _digest(task: _Task, count: int) -> str:
    """What decides which images are suggested."""
    return digest_settings(
        version=VERSION,
        network=digest_path(task.trained.path),
        plain=task.trained.unaligned,
        earlier=task.earlier is not None,
        protocol=labeling_protocol(task.recipe),
        pool=digest_samples(task.pool),
        labeled=digest_samples(task.manifest.labeled),
        count=count,
    )


@dataclass
class _Seen:
    """What was seen of images, in the order in which they were read.

    Attributes:
        failed: a line for each picture that cannot be read.
    """

    samples: list[Sample] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def described(self) -> Described:
        ids = tuple(sample.id for sample in self.samples)
        return Described(ids, np.stack(self.features), tuple(self.digests))


def _choose(task: _Task, count: int, decisions: str) -> Suggested:
    """Look at all images, and choose."""
    if task.marked:
        task.journal.say(f"{task.marked} unlabeled images are marked as bad and left out.")
    left_out = task.unlabeled - task.marked - len(task.pool)
    if left_out:
        task.journal.say(
            f"{len(task.pool):,} of {len(task.pool) + left_out:,} unlabeled images are looked at, chosen by seed {SEED}."
        )
    classes = task.manifest.classes
    counts = count_labels(masks(task.manifest.labeled), len(classes))
    predictor = task.predictor()
    labeled = _look(task, task.manifest.labeled, lambda image, name: (predictor.feature(image, name), None))

    def predict(image: NDArray[np.uint8], name: str) -> tuple[NDArray[np.float32], Facts]:
        prediction = predictor.predict(image, name)
        return prediction.feature, Facts.of(prediction)

    seen = _look(task, task.pool, predict)
    if not labeled.samples or not seen.samples:
        role = "unlabeled" if labeled.samples else "labeled"
        raise DataError(faults(f"None of the {role} images can be read", [*labeled.failed, *seen.failed]))
    candidates = Candidates(
        seen.described(),
        np.stack([facts.expected for facts in seen.facts]),
        np.stack([facts.uncertain for facts in seen.facts]),
    )
    picks = choose_images(candidates, labeled.described(), counts=counts, count=count)
    return Suggested(
        classes=classes.names,
        colors=classes.colors,
        labeled_pixels=tuple(counts.tolist()),
        images=describe_picks(picks, candidates.images.ids, seen.facts, classes=classes, counts=counts),
        asked=count,
        looked_at=len(seen.samples),
        available=task.unlabeled,
        marked=task.marked,
        failed=tuple(sorted([*labeled.failed, *seen.failed])),
        decisions=decisions,
        protocol=labeling_protocol(task.recipe).describe("logits"),
    )


def _look(
    task: _Task,
    samples: Sequence[Sample],
    predict: Callable[[NDArray[np.uint8], str], tuple[NDArray[np.float32], Facts | None]],
) -> _Seen:
    """Look at images one after the other; those that cannot be read are left out."""
    seen = _Seen()

    def read(sample: Sample) -> NDArray[np.uint8] | str:
        try:
            return load_image(sample)
        except DataError as error:
            return str(error)

    def work(sample: Sample, image: NDArray[np.uint8] | str) -> None:
        if isinstance(image, str):
            seen.failed.append(image)
            return
        feature, facts = predict(image, str(sample.image))
        seen.samples.append(sample)
        seen.features.append(feature)
        seen.digests.append(digest_pixels(image))
        if facts is not None:
            seen.facts.append(facts)

    title = "predict" if samples is task.pool else "look at the labeled images"
    with task.journal.progress(title, len(samples)) as advance:
        overlapped(samples, read=read, work=work, write=lambda *_: None, advance=advance)
    return seen


def _write_files(task: _Task, out: Path, suggested: Suggested, *, draw: Draw) -> list[str]:
    """Write the pre-labels of the suggested images, and draw each. Returns notes about the files."""
    samples = {sample.id: sample for sample in task.pool}
    encoding, notes = _stored_as(task.manifest)
    classes: ClassSet = task.manifest.classes
    prelabels = Prelabels(out, classes, encoding=encoding, coco=CocoFile(classes))
    predictor = task.predictor()
    with task.journal.progress("pre-label", len(suggested.images)) as advance:
        for picked in suggested.images:
            sample = samples[picked.id]
            image = load_image(sample)
            prediction = predictor.predict(image, str(sample.image))
            prelabels.write(sample, prediction.classes)
            draw(image, prediction, classes)
            advance()
    prelabels.finish()
    return notes


def _stored_as(manifest: Manifest) -> tuple[LabelEncoding, list[str]]:
    """How the label files of the labeled images hold classes; and a note if that cannot be followed."""
    first = manifest.labeled[0]
    if first.parts is not None:
        return PLAIN, [
            "The recipe's label maps are several masks each (data.label_parts). The pre-labels are single maps of class "
            "indices instead."
        ]
    return first.encoding, []


def _list_line(sample: Sample, root: Path) -> str:
    """The image's line in a list of the recipe: its id, or its path below data.root if that is its id."""
    if sample.image.is_relative_to(root):
        relative = sample.image.relative_to(root)
        if relative.with_suffix("").as_posix() == sample.id:
            return relative.as_posix()
    return sample.id
