"""Load a trained network with what is known about it, and score it on labeled images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console

from darseg.choices import Role
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.classes import ClassSet, distinct_colors
from darseg.data.images import Reading
from darseg.errors import DarsegError, DataError, RunError
from darseg.model.aligned import AlignmentRecord
from darseg.model.class_order import Order, reorder_classes, reordered_spec
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import whole_image
from darseg.model.weights import load_network as load_weights_file
from darseg.model.weights import read_alignment, read_spec, removes_classes
from darseg.model.windows import Protocol
from darseg.run.best import Weights, run_weights
from darseg.run.build import (
    as_recipe,
    as_the_run_read,
    check_overrides,
    check_sizes,
    classes_of,
    evaluation_protocol,
    load_to_predict,
    manifest_of,
    reading_of,
    recipe_of,
    set_threads,
)
from darseg.run.class_names import order_by_recipe
from darseg.run.directory import RESULT, RunDirectory, digest_path
from darseg.run.image_classes import with_decisions_of
from darseg.run.journal import Journal
from darseg.run.records import read_scored
from darseg.run.remedies import ALONE, explain_memory, less_at_once
from darseg.run.result import score_variants
from darseg.run.steps.align import chosen_record
from darseg.training.scores import Scores

EVALUATION_KEYS = ("data.", "evaluation.", "image_classes.threshold", "image_classes.keep", "threads")
"""Beginnings of the recipe's keys that change an evaluation."""


@dataclass(frozen=True)
class Trained:
    """A trained network with what is known about it.

    Attributes:
        recipe: as it holds in the network's round (a checkpoint's: in the last); None for a checkpoint without one.
        unaligned: whether class weights in the file were left out.
        order: the recipe's order of the classes, if the file has another; network and spec have the recipe's.
        round: of a run folder, that trained it; None for a checkpoint.
    """

    network: Network
    spec: NetworkSpec
    recipe: Recipe | None
    path: Path
    unaligned: bool = False
    order: Order | None = None
    round: int | None = None

    @property
    def alignment(self) -> AlignmentRecord | None:
        """The class weights that are part of the network; None: its decisions are plain."""
        return self.network.alignment

    def reading(self) -> Reading:
        """How the recipe has pictures read."""
        return reading_of(self.recipe)

    def classes(self) -> ClassSet:
        """Names and colors of the classes: the file's, the recipe's, or numbers and generated colors."""
        if self.recipe is not None and not self.spec.class_names:
            return classes_of(self.recipe)
        names = self.spec.class_names or tuple(f"class {k}" for k in range(self.spec.classes))
        return ClassSet(names, self.spec.class_colors or distinct_colors(self.spec.classes))

    def protocol(self, image: np.ndarray) -> Protocol:
        """The recipe's evaluation protocol; without a recipe, the whole image in one window and its mirror."""
        if self.recipe is not None:
            return evaluation_protocol(self.recipe)
        return whole_image(self.network, image)


def result_path(source: Path | str, round_index: int | None = None, plain: bool = False) -> Path:
    """The weights of a run's result, or of the round `round_index`; or `source`.

    Args:
        plain: the network as it was trained, also if the aligned one is the result.

    Raises RunError if there are none.
    """
    return _find(source, round_index, plain).path


def _find(source: Path | str, round_index: int | None, plain: bool) -> Weights:
    """`result_path` with the round that the weights are of."""
    source = Path(source)
    if not source.is_dir():
        if not source.exists():
            raise RunError(f"{source}: there is no such run folder or checkpoint. Check the path.")
        return Weights(source)
    return run_weights(RunDirectory(source), round_index, plain)


def load_network(source: Path | str, round_index: int | None = None, plain: bool = False) -> Network:
    """The result of a run folder, or the network of a .safetensors file, on the CPU and in eval mode.

    If class weights are folded into its classifier, `network.alignment` is their record.

    Args:
        round_index: of a run folder; None: its result.
        plain: take class weights away, so that the network is as it was trained.

    Raises RunError, WeightsError, and RecipeError if the backbone cannot be built here (timm is not installed).
    """
    return load_weights_file(result_path(source, round_index, plain), plain)


def describe_decisions(source: Path | str, round_index: int | None = None, plain: bool = False) -> str:
    """A line that says how a network decides: plain or aligned, and whether a classifier removes classes.

    Raises RunError, WeightsError.
    """
    path = result_path(source, round_index)
    removes = "; a classifier of whole images removes classes that it does not see" * removes_classes(path)
    record = read_alignment(path)
    if record is None:
        return f"Decisions: plain{removes}"
    if plain:
        return f"Decisions: plain, as asked for; the class weights in {path} are left out{removes}"
    return (
        f"Decisions: aligned (strength {record.strength:g}, bound {record.bound:g}; from {record.source}); --plain "
        f"leaves the class weights out{removes}"
    )


def load_trained(
    source: Path | str,
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    *,
    recipe: Recipe | Path | str | None = None,
    threads: int | None = None,
    plain: bool = False,
) -> Trained:
    """The result of a run folder, or the network of a .safetensors file, ready to predict.

    From then on torch uses as many CPU threads as its recipe says. If the recipe has the network's classes in another
    order, the network gets the recipe's order.

    Args:
        round_index: of a run folder; None: its result.
        overrides: changes of the run folder's recipe, or of the one at the path `recipe`.
        recipe: or its path; used instead of the run folder's own.
        threads: CPU threads, whatever the recipe says.
        plain: the network as it was trained, without class weights.

    Raises RunError, WeightsError, RecipeError; DataError if the recipe has other classes.
    """
    recipe = _changed_recipe(source, recipe, overrides)
    weights = _find(source, round_index, plain)
    path = weights.path
    if Path(source).is_dir() and recipe is None:
        recipe = as_the_run_read(recipe_of(source, overrides), RunDirectory(source))
    if recipe is not None:
        last = len(recipe.rounds) - 1
        recipe = recipe.at(last if weights.round is None else min(weights.round, last))
    _warn_if_changed(path)
    set_threads(threads or (recipe.threads if recipe else None))
    unaligned = plain and read_alignment(path) is not None
    spec = read_spec(path)
    order = None if recipe is None else order_by_recipe(source, spec, classes_of(recipe))
    with explain_memory(ALONE):
        network = load_to_predict(path, plain)
    if order is not None:
        network, spec = reorder_classes(network, order), reordered_spec(spec, order)
    if network.image_classes is not None and recipe is not None and recipe.image_classes is not None:
        network.image_classes = with_decisions_of(recipe, network.image_classes)
    return Trained(network, spec, recipe, path=path, unaligned=unaligned, order=order, round=weights.round)


def _changed_recipe(
    source: Path | str, recipe: Recipe | Path | str | None, overrides: Sequence[str]
) -> Recipe | None:
    """The recipe that is given for a checkpoint. Raises RunError if the overrides have none to change."""
    if isinstance(recipe, (str, Path)):
        return load_recipe(recipe, overrides)
    if overrides and recipe is not None:
        raise RunError(
            f"The overrides {', '.join(overrides)} are for a run folder's own recipe, but another recipe is given. Give "
            "them to load_recipe."
        )
    if overrides and not Path(source).is_dir():
        raise RunError(
            f"{', '.join(overrides)}: {source} is a checkpoint outside a run folder, so there is no recipe to change. "
            "Give its recipe with --recipe RECIPE.yaml, or leave this out."
        )
    return None if recipe is None else as_recipe(recipe)


def _warn_if_changed(network: Path) -> None:
    """Warn if a network of a run folder is not the one that its round recorded."""
    numbered = re.fullmatch(r"round_(\d+)", network.parent.name)
    if not numbered:
        return
    try:
        step = "evaluate" if network.name == RESULT else "train"
        record = RunDirectory(network.parent.parent).read_record(int(numbered[1]), step)
    except DarsegError:
        return
    recorded = record.outputs.get(network.name) if record else None
    if recorded is not None and recorded != digest_path(network):
        Journal(None, None, Console(stderr=True)).warn(
            f"{network} was changed after round {numbered[1]} finished ({step}.json has another digest). Its scores are "
            "not those of the run. Restore the file, if this was not intended."
        )


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate_result` found.

    Attributes:
        scores: of the decisions that were asked for.
        plain: of the same network without class weights; None if these are its decisions anyway.
        aligned: of the same network with the class weights that its round found and did not use; None if it has none.
        protocol: how both were measured.
    """

    scores: Scores
    plain: Scores | None
    protocol: Protocol
    aligned: Scores | None = None

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """The scores, those of the other variant under "plain" or "aligned", and which one is the result."""
        others = {"plain": self.plain, "aligned": self.aligned}
        return self.scores.to_json(names) | {
            "decisions": "plain" if self.plain is None else "aligned",
            **{kind: scores.to_json(names) for kind, scores in others.items() if scores is not None},
        }


def evaluate(
    source: Path | str,
    recipe: Recipe | Path | str | None = None,
    role: Role = "validation",
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    plain: bool = False,
) -> tuple[Scores, Protocol]:
    """Score a trained network on the images of one role.

    Args:
        source: run folder; or .safetensors checkpoint, which needs `recipe` for its data and protocol.
        role: "validation", "test", "labeled", or "unlabeled" if those images have labels.
        overrides: changes of the run folder's recipe, as in "evaluation.scales=[0.75, 1.0]". If `recipe` is given, give
            its changes to `load_recipe`.
        plain: score the network as it was trained, also if its decisions are aligned.

    Returns:
        the scores, and the protocol that they were measured with.

    Raises RunError, WeightsError, RecipeError, DataError.
    """
    done = evaluate_result(
        source, recipe, role=role, round_index=round_index, overrides=overrides, console=console, plain=plain
    )
    return done.scores, done.protocol


def evaluate_result(
    source: Path | str,
    recipe: Recipe | Path | str | None = None,
    *,
    role: Role = "validation",
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    plain: bool = False,
) -> Evaluated:
    """`evaluate`, with the plain scores of a network whose decisions are aligned, or the reverse."""
    if role not in get_args(Role):
        raise RunError(f"There is no role {role!r}. Choose from {', '.join(get_args(Role))}.")
    check_overrides(source, overrides, EVALUATION_KEYS)
    trained = load_trained(source, round_index, overrides, recipe=recipe, plain=plain)
    recipe = trained.recipe
    if recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder, so its data is not known. Give its recipe with --recipe "
            "RECIPE.yaml."
        )
    classes = classes_of(recipe)
    check_sizes(recipe, trained.network, "evaluation.window")
    samples = manifest_of(recipe).roles()[role]
    if not samples:
        raise DataError(f"The recipe has no {role} images. Set data.{role}, or choose another --role.")
    unlabeled = [sample.id for sample in samples if sample.label is None]
    if unlabeled:
        raise DataError(
            f"{len(unlabeled)} of {len(samples)} {role} images have no label map, so they cannot be scored; the first is "
            f"{unlabeled[0]!r}. Add the label maps, or choose another --role."
        )
    protocol, network = evaluation_protocol(recipe), trained.network
    unused = None if plain or network.alignment is not None else _unused_alignment(trained, Path(source))
    records = [network.alignment]
    if network.alignment is not None or unused is not None:
        records.append(unused)
    with (
        Journal(None, None, console or Console()).progress("evaluate", len(samples)) as advance,
        explain_memory(less_at_once(recipe)),
    ):
        scored = score_variants(
            network, records, samples, classes=classes, protocol=protocol, advance=advance
        )
    scores = [Scores(confusion) for confusion in scored.confusions]
    second = scores[1] if len(scores) > 1 else None
    return Evaluated(
        scores[0],
        plain=None if network.alignment is None else second,
        protocol=protocol,
        aligned=None if unused is None else second,
    )


def _unused_alignment(trained: Trained, source: Path) -> AlignmentRecord | None:
    """The class weights that a run found for a network and did not use."""
    if trained.round is None or trained.order is not None:
        return None
    run, index = RunDirectory(source), trained.round
    if run.read_record(index, "evaluate") is None:
        return None
    run.scores(index)  # says what is damaged
    return chosen_record(run.round(index), read_scored(run.round(index) / "scores.json"))
