"""Which networks of a run labeled and learned, and where the weights of its result are."""

from __future__ import annotations

from pathlib import Path

from darseg.report.facts import RunFacts
from darseg.run.best import BEST
from darseg.run.directory import RunDirectory


def who_labels(facts: RunFacts) -> dict[str, str]:
    """Round → which network labeled and which learned; empty if one network does both in all rounds."""
    recipe = facts.recipe
    if not recipe.takes_turns and not any(
        round_.labeler or recipe.starts(round_.index) or round_.labeling_round != round_.index - 1
        for round_ in facts.rounds
    ):
        return {}
    lines = {}
    for round_ in facts.rounds:
        learner, labeler = recipe.at(round_.index).network, round_.labeler
        learns = f"{learner.architecture}, {learner.backbone} learns"
        if round_.trained_from is not None:
            learns += f" from round {round_.trained_from}"
        elif recipe.starts(round_.index) == round_.index:
            learns += " from its own weights"
        labels = "no pseudo labels"
        if labeler:
            path = Path(labeler["path"])
            labels = f"{path.name if facts.shared else path} ({labeler['architecture']}, {labeler['backbone']}) labels"
        elif recipe.pseudo_labels(round_.index):
            before = recipe.at(round_.labeling_round).network
            labels = f"the network of round {round_.labeling_round} ({before.architecture}, {before.backbone}) labels"
        lines[f"networks of round {round_.index}"] = f"{labels}, {learns}"
    return lines


def checkpoints(facts: RunFacts, run: RunDirectory, index: int) -> dict[str, str]:
    """The weights that commands use after a round, and the plain ones if these are others."""
    aligned = next(round_.aligned for round_ in facts.rounds if round_.index == index)
    plain, used = str(run.network(index)), aligned is not None and aligned.used
    path = str(run.result(index) if used else run.network(index))
    if facts.keeps_best and facts.scored:
        path = f"{run.root / BEST} (round {index})"
    if not used:
        return {"checkpoint": path}
    return {"checkpoint": f"{path} (aligned decisions)", "plain checkpoint": plain}
