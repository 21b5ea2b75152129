"""Load a trained network with what is known about it, and score it on labeled images."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console

from darseg.choices import Role
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.classes import ClassSet, distinct_colors
from darseg.data.dataset import Example, load_example
from darseg.data.images import Reading
from darseg.data.manifest import Sample
from darseg.data.pipeline import overlapped
from darseg.errors import DarsegError, DataError, RecipeError, RunError
from darseg.model.aligned import AlignmentRecord
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import Memory, Protocol, predict, whole_image
from darseg.model.weights import read_spec
from darseg.run.build import (
    as_recipe,
    check_sizes,
    classes_of,
    evaluation_protocol,
    load_to_predict,
    manifest_of,
    reading_of,
    recipe_of,
    set_threads,
)
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.journal import Journal
from darseg.training.scores import Scores

EVALUATION_KEYS = ("data.", "evaluation.", "threads")
"""Beginnings of the recipe's keys that change an evaluation."""


@dataclass(frozen=True)
class Trained:
    """A trained network with what is known about it. `recipe` is None for a checkpoint given without one."""

    network: Network
    spec: NetworkSpec
    recipe: Recipe | None
    path: Path

    @property
    def alignment(self) -> AlignmentRecord | None:
        """The class weights that are part of the network; None: its decisions are plain."""
        return self.network.alignment

    def reading(self) -> Reading:
        """How the recipe has pictures read."""
        return reading_of(self.recipe)

    def classes(self) -> ClassSet:
        """Names and colors of the classes; numbers and generated colors if the file does not have them."""
        names = self.spec.class_names or tuple(f"class {k}" for k in range(self.spec.classes))
        return ClassSet(names, self.spec.class_colors or distinct_colors(self.spec.classes))

    def protocol(self, image: np.ndarray) -> Protocol:
        """The recipe's evaluation protocol; without a recipe, the whole image in one window and its mirror."""
        if self.recipe is not None:
            return evaluation_protocol(self.recipe)
        return whole_image(self.network, image)


def load_trained(
    source: Path | str,
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    *,
    recipe: Recipe | None = None,
    threads: int | None = None,
) -> Trained:
    """The network of a run folder (its last finished round, or `round_index`) or of a .safetensors file.

    From then on torch uses as many CPU threads as its recipe says.

    Args:
        overrides: changes of the run folder's recipe.
        recipe: used instead of the run folder's own.
        threads: CPU threads, whatever the recipe says.

    Raises RunError, WeightsError, RecipeError.
    """
    source = Path(source)
    path = source
    if source.is_dir():
        run = RunDirectory(source)
        path = run.last_network() if round_index is None else run.network(round_index)
        if not path.exists():
            raise RunError(
                f"{source}: round {round_index} is not finished ({path} does not exist). Choose an earlier round, or "
                "continue the run."
            )
        recipe = recipe or recipe_of(source, overrides)
    elif not source.exists():
        raise RunError(f"{source}: there is no such run folder or checkpoint. Check the path.")
    _warn_if_changed(path)
    set_threads(threads or (recipe.threads if recipe else None))
    return Trained(load_to_predict(path), read_spec(path), recipe, path=path)


def _warn_if_changed(network: Path) -> None:
    """Warn if a network of a run folder is not the one that its round recorded."""
    numbered = re.fullmatch(r"round_(\d+)", network.parent.name)
    if not numbered:
        return
    try:
        record = RunDirectory(network.parent.parent).read_record(int(numbered[1]), "train")
    except DarsegError:
        return
    recorded = record.outputs.get(network.name) if record else None
    if recorded is not None and recorded != digest_path(network):
        Journal(None, None, Console(stderr=True)).warn(
            f"{network} was changed after round {numbered[1]} finished (train.json has another digest). Its scores are "
            "not those of the run. Restore the file, if this was not intended."
        )


def check_classes(source: Path | str, trained: Trained, classes: ClassSet) -> None:
    """Raise DataError if the network has another number of classes than the recipe."""
    if len(classes) != trained.network.classes:
        raise DataError(
            f"{source} has {trained.network.classes} classes, but the recipe has {len(classes)}. Give the recipe that "
            "the network was trained with."
        )


def evaluate(
    source: Path | str,
    recipe: Recipe | Path | str | None = None,
    role: Role = "validation",
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> tuple[Scores, Protocol]:
    """Score a trained network on the images of one role.

    Args:
        source: run folder; or .safetensors checkpoint, which needs `recipe` for its data and protocol.
        role: "validation", "test", "labeled", or "unlabeled" if those images have labels.
        overrides: changes of the run folder's recipe, as in "evaluation.scales=[0.75, 1.0]". If `recipe` is given, give
            its changes to `load_recipe`.

    Returns:
        the scores, and the protocol that they were measured with.

    Raises RunError, WeightsError, RecipeError, DataError.
    """
    if role not in get_args(Role):
        raise RunError(f"There is no role {role!r}. Choose from {', '.join(get_args(Role))}.")
    recipe = None if recipe is None else as_recipe(recipe)
    if recipe is not None and overrides:
        raise RunError(
            f"The overrides {', '.join(overrides)} are for a run folder's own recipe, but another recipe is given. Give "
            "them to load_recipe."
        )
    _check_overrides(source, overrides)
    trained = load_trained(source, round_index, overrides, recipe=recipe)
    recipe = trained.recipe
    if recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder, so its data is not known. Give its recipe with --recipe "
            "RECIPE.yaml."
        )
    classes = classes_of(recipe)
    check_classes(source, trained, classes)
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
    protocol = evaluation_protocol(recipe)
    with Journal(None, None, console or Console()).progress("evaluate", len(samples)) as advance:
        return evaluate_samples(
            trained.network, samples, classes, protocol=protocol, advance=advance
        ), protocol


def _check_overrides(source: Path | str, overrides: Sequence[str]) -> None:
    """Raise RecipeError with all that is wrong with changes of a run folder's recipe."""
    without_effect = [override for override in overrides if not override.startswith(EVALUATION_KEYS)]
    if not without_effect:
        return
    message = (
        f"{', '.join(without_effect)}: this does not change an evaluation. Remove it; keys that do begin with "
        f"{', '.join(EVALUATION_KEYS)}."
    )
    if (recipe := RunDirectory(source).recipe).is_file():
        try:
            load_recipe(recipe, overrides)
        except RecipeError as error:
            message = f"{message}\n{error}"
    raise RecipeError(message)


def evaluate_samples(
    network: Network,
    samples: Sequence[Sample],
    classes: ClassSet,
    *,
    protocol: Protocol,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores of a network (in eval mode) on labeled samples."""
    scores, memory = Scores.empty(len(classes)), Memory()

    def score(sample: Sample, example: Example) -> None:
        nonlocal scores
        prediction = predict(network, example.image, protocol, name=str(sample.image), memory=memory)
        scores = scores.plus(example.label, prediction.classes)

    overlapped(
        samples,
        read=lambda sample: load_example(sample, classes),
        work=score,
        write=lambda *_: None,
        advance=advance,
    )
    return scores
