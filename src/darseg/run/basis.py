"""What a round builds on: the rounds whose networks label for it, and that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from darseg.config.recipe import Recipe
from darseg.run.best import RoundScore, best_of, mean_iou
from darseg.run.directory import RunDirectory
from darseg.run.records import damaged


@dataclass(frozen=True)
class Basis:
    """The rounds that a round builds on.

    Attributes:
        labels: whose network labels.
        weights: whose weights and optimizer the training goes on from, if no new network begins.
    """

    labels: int
    weights: int


def basis_of(run: RunDirectory, recipe: Recipe, index: int) -> Basis:
    """What a round builds on: rounds that it names; otherwise the one before, or the best before.

    A network can only go on from rounds that trained the same one.
    """
    goes_on, config = recipe.goes_on_from(index), recipe.rounds[index]
    labels, weights = recipe.labeled_by(index), index - 1 if goes_on is None else goes_on
    if recipe.result.keep == "last" or index == 0:
        return Basis(labels, weights)

    def best_among(rounds: Sequence[int]) -> int:
        return best_of([RoundScore(at, mean_iou(run, at)) for at in rounds]).index

    before = range(index)
    if not isinstance(config.labels_from, int):
        labels = best_among(before)
    if goes_on is not None and config.continues is None:
        begins = recipe.starts(index)
        weights = best_among([at for at in before if recipe.starts(at) == begins])
    return Basis(labels, weights)


def trained_from(run: RunDirectory, index: int) -> int | None:
    """The round whose network a round went on from; None: one began there, or it is not trained.

    Raises RunError if a record is damaged.
    """
    record = run.read_record(index, "train")
    if record is None:
        return None
    for at in reversed(range(index)):
        before, name = run.read_record(at, "train"), run.network(at).name
        if before is not None and before.outputs.get(name) == record.inputs.get("network"):
            return at
    return None


def labeling_round(run: RunDirectory, index: int) -> int:
    """The round whose network labeled a round, if the run's own did.

    Raises RunError if the record is damaged.
    """
    record = run.read_record(index, "label")
    noted = index - 1 if record is None else record.facts.get("labeling_round", index - 1)
    if type(noted) is not int or not -1 <= noted < index:
        path = run.record_path(index, "label")
        raise damaged(path, "labeling_round is not a round before it", "Restore it from a copy.")
    return noted
