"""Networks of other runs, or in files, that label the images of a round instead of the run's own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darseg.config.recipe import Recipe
from darseg.config.text import load_saved_recipe
from darseg.data.files import real
from darseg.errors import DarsegError, DataError, RunError, SizeError, faults
from darseg.model.class_order import Order, class_order, reorder_classes
from darseg.model.network import Network, NetworkSpec
from darseg.model.weights import read_alignment, read_spec, removes_classes
from darseg.model.windows import Protocol, Window
from darseg.run.basis import labeling_round
from darseg.run.best import read_best, run_weights, uncompared
from darseg.run.build import classes_of, labeling_protocol, load_to_predict
from darseg.run.directory import ROUND_FOLDER, RunDirectory, digest_path
from darseg.run.records import damaged, is_digest, read_object

LABELS_FROM = "labels_from.json"
"""File in a round's folder that says which network labeled it, if it is not that of the round before."""

REMEDY = "Restore it from a copy, or delete label.json next to it and all later rounds, and run the same command again."


@dataclass(frozen=True)
class Labeler:
    """A network that labels a round's images without being trained there.

    Attributes:
        source: what `labels_from` names: a run folder, a folder of one of its rounds, or a file.
        path: its weights.
        spec: their description, with the file's order of the classes.
        digest: SHA-256 of the weights.
        window: height and width of the sliding window, or "whole".
        order: the recipe's order of the classes, if the file has another.
        aligned: whether class weights are part of its decisions.
    """

    source: Path
    path: Path
    spec: NetworkSpec
    digest: str
    window: Window
    order: Order | None = None
    aligned: bool = False

    def load(self, plain: bool) -> Network:
        """The network, ready to predict, with the recipe's order of the classes.

        Args:
            plain: without class weights. Raises WeightsError.
        """
        network = load_to_predict(self.path, plain)
        return network if self.order is None else reorder_classes(network, self.order)

    def describe(self) -> str:
        """What it is, for messages and the report."""
        facts = [
            self.spec.architecture,
            self.spec.backbone,
            f"{self.path.stat().st_size / 1e9:.2f} GB of weights",
            "whole images" if self.window == "whole" else f"windows of {' x '.join(map(str, self.window))}",
        ]
        if self.aligned:
            facts.append("aligned decisions")
        if removes_classes(self.path):
            facts.append("with its own classifier of whole images")
        if not self.spec.class_names:
            facts.append("its classes have no names and are taken in the recipe's order")
        if self.order is not None:
            facts.append("its classes are in another order and were matched by name")
        return f"{self.source} ({', '.join(facts)})"

    def to_json(self) -> dict[str, Any]:
        """What a round's folder keeps about it."""
        return {
            "path": str(self.source),
            "weights": str(self.path),
            "sha256": self.digest,
            "architecture": self.spec.architecture,
            "backbone": self.spec.backbone,
            "window": self.window if self.window == "whole" else list(self.window),
            "aligned": self.aligned,
        }


def labelers_of(recipe: Recipe, out: Path | None = None) -> dict[int, Labeler]:
    """Round → the network in its `labels_from`, for rounds that have one.

    Args:
        out: the run folder to train in; None: not known.

    Raises RunError, naming all, for networks that are missing, unfinished, of other classes or sizes, or of the run
    itself.
    """
    labelers: dict[int, Labeler] = {}
    lines = []
    for index, config in enumerate(recipe.rounds):
        if not isinstance(config.labels_from, str):
            continue
        try:
            if out is not None and real(Path(config.labels_from)).is_relative_to(real(out)):
                raise RunError(
                    f"{config.labels_from} is in {out}, the folder of this run, which would learn from itself. Without "
                    "labels_from the network of the round before labels; name another run, or a copy of the file."
                )
            labelers[index] = _labeler(recipe, index, Path(config.labels_from))
        except DarsegError as error:
            lines.append(f"rounds.{index}.labels_from: {error}")
    if lines:
        raise RunError(faults("Networks that should label cannot be used", lines))
    return labelers


def labeling_protocol_of(
    recipe: Recipe, index: int, labeler: Labeler | None, *, labeling_round: int | None = None
) -> Protocol:
    """How the unlabeled images are predicted in a round; the window is that of the network which labels.

    Args:
        labeler: None: the network of an earlier round labels.
        labeling_round: that round; None: the one that the recipe names, or the one before.
    """
    if labeler is None:
        return labeling_protocol(
            recipe.at(recipe.labeled_by(index) if labeling_round is None else labeling_round)
        )
    return replace(labeling_protocol(recipe), window=labeler.window)


def who_labels(recipe: Recipe, labelers: Mapping[int, Labeler]) -> list[str]:
    """A line for each round: which network labels, and which learns. None if one network does both."""
    rounds, keeps_best = range(len(recipe.rounds)), recipe.result.keep == "best"
    if not labelers and not any(map(recipe.starts, rounds)) and not recipe.takes_turns:
        return []
    before = "the best round before" if keeps_best else "the round before"
    lines = []
    for index in rounds:
        learner, config = recipe.at(index).network, recipe.rounds[index]
        learns = f"{learner.architecture}, {learner.backbone} learns"
        crop = "x".join(map(str, recipe.at(index).training.crop))
        start = "from its own weights" if recipe.starts(index) == index else f"from {before}"
        if isinstance(config.continues, int):
            start = f"from round {config.continues}"
        if index in labelers:
            labels = f"{labelers[index].describe()} labels, "
        elif not recipe.pseudo_labels(index):
            labels = "no pseudo labels, "
        elif keeps_best and config.labels_from is None:
            labels = "the network of the best round before labels, "
        else:
            by = recipe.labeled_by(index)
            labeling = recipe.at(by).network
            labels = f"the network of round {by} ({labeling.architecture}, {labeling.backbone}) labels, "
        lines.append(f"round {index}: {labels}{learns} {start}, crops {crop}")
    return lines


def _labeler(recipe: Recipe, index: int, source: Path) -> Labeler:
    path, window = _weights_at(source)
    spec = read_spec(path)
    order = _order(path, spec, classes_of(recipe).names)
    sides, config = spec.sides, recipe.rounds[index]
    if config.labels_window is not None:
        window = config.labels_window
        try:
            if window != "whole":
                sides.check(*window)
        except SizeError as error:
            raise SizeError(f"{source} with labels_window: {error}") from None
    if window is None:
        window = labeling_protocol(recipe.at(index)).window
        window = window if window == "whole" else (sides.up(window[0]), sides.up(window[1]))
    return Labeler(
        source,
        path,
        spec,
        digest=digest_path(path),
        window=window,
        order=order,
        aligned=read_alignment(path) is not None and recipe.labeling.align == "none",
    )


def _weights_at(source: Path) -> tuple[Path, Window | None]:
    """The weights that `labels_from` names, and the window that goes with them; a file has none."""
    return (source, None) if source.is_file() else _in_run(source)


def _in_run(source: Path) -> tuple[Path, Window]:
    """The weights of a finished run or round, and the window that its own recipe labels with."""
    numbered = ROUND_FOLDER.fullmatch(source.name)
    run = RunDirectory(source.parent if numbered and not RunDirectory(source).recipe.exists() else source)
    if not run.recipe.is_file():
        what = "is not a run folder: it has no recipe.yaml" if source.exists() else "does not exist"
        raise RunError(
            f"{source} {what}. Give a run folder of `darseg train`, a folder round_N in it, or a .safetensors file."
        )
    recipe = load_saved_recipe(run.recipe)
    named = int(numbered[1]) if numbered and run.root != source else None
    index = len(recipe.rounds) - 1 if named is None else named
    if run.read_record(index, "evaluate") is None:
        done = run.rounds_with("evaluate")
        remedy = f", or name a finished round, {run.round(done[-1])}" if done else ""
        raise RunError(
            f"{source}: round {index} is not finished there, so its network could still change. Finish that run with "
            f"`darseg train` first{remedy}."
        )
    best = read_best(run) if named is None else None
    if best and uncompared(run, best):
        raise RunError(
            f"{source}: round {index} is not compared with the best one yet, so another network could be the result. "
            "Finish that run with `darseg train` first."
        )
    weights = run_weights(run, named)
    assert weights.round is not None
    return weights.path, labeling_protocol(recipe.at(weights.round)).window


def _order(path: Path, spec: NetworkSpec, names: tuple[str, ...]) -> Order | None:
    """The order that gives a network the recipe's classes. Raises DataError if they are others.

    Classes without names cannot be compared: they are taken in the recipe's order, which `Labeler.describe` says.
    """
    if not spec.class_names and spec.classes == len(names):
        return None
    try:
        return class_order(spec.class_names, names)
    except DataError:
        own = ", ".join(spec.class_names) or f"{spec.classes} without names"
        raise DataError(
            f"{path} has other classes than the recipe: {own}, instead of {', '.join(names)}. Give a network of the same "
            "classes, or call them the same."
        ) from None


def read_labeler(folder: Path) -> Mapping[str, Any] | None:
    """What the folder of a round says about its labeler; None if the run's own network labeled.

    Raises RunError if the file is damaged.
    """
    path = folder / LABELS_FROM
    try:
        value = read_object(path, REMEDY)
    except FileNotFoundError:
        return None
    texts = ("path", "weights", "sha256", "architecture", "backbone")
    window = value.get("window")
    if not all(isinstance(value.get(name), str) for name in texts) or not (is_digest(value["sha256"])):
        raise damaged(path, f"expected texts for {', '.join(texts)}, and a SHA-256 digest", REMEDY)
    if window != "whole" and not (
        isinstance(window, list)
        and len(window) == 2
        and all(type(side) is int and side > 0 for side in window)
    ):
        raise damaged(path, "expected a window of two sides in pixels, or whole", REMEDY)
    return value


def is_there(run: RunDirectory, recipe: Recipe, index: int) -> bool:
    """Whether the network that labeled a round is there, and is the one that labeled."""
    try:
        return _noted(run, recipe, index) is not None or run.network(labeling_round(run, index)).exists()
    except DarsegError:
        return False


def load_labeler(run: RunDirectory, recipe: Recipe, index: int, *, plain: bool) -> tuple[Network, Protocol]:
    """The network that labeled a round of a run folder, ready to predict, and how it predicted.

    Args:
        plain: without a labeler's class weights.

    Raises RunError if it is a labeler that is gone or has changed, WeightsError if the weights cannot be read.
    """
    labeler = _noted(run, recipe, index)
    by = labeling_round(run, index)
    protocol = labeling_protocol_of(recipe, index, labeler, labeling_round=by)
    if labeler is None:
        return load_to_predict(run.network(by), plain=True), protocol
    return labeler.load(plain), protocol


def _noted(run: RunDirectory, recipe: Recipe, index: int) -> Labeler | None:
    """The labeler that a round's folder names; None if the run's own network labeled."""
    noted = read_labeler(run.round(index))
    if noted is None:
        return None
    places = [Path(noted["weights"])]
    if index < len(recipe.rounds) and isinstance(moved := recipe.rounds[index].labels_from, str):
        with contextlib.suppress(DarsegError):  # the run was resumed with the file's new place
            places.append(_weights_at(Path(moved))[0])
    path = next((place for place in places if digest_path(place) == noted["sha256"]), None)
    if path is None:
        raise RunError(
            f"{places[0]}, which labeled round {index}, is gone or has changed since. Restore it to see its predictions."
        )
    spec, window = read_spec(path), noted["window"]
    order = _order(path, spec, classes_of(recipe).names)
    source, window = Path(noted["path"]), window if window == "whole" else (window[0], window[1])
    return Labeler(source, path, spec, digest=noted["sha256"], window=window, order=order)
