"""The first section of a run's page: results of the rounds in cards and sentences, with remarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from darseg.report.facts import DataFacts, RoundFacts, RunFacts, remarks
from darseg.report.page import render


@dataclass(frozen=True)
class Card:
    """A round. mean_iou: None without scores; change: since `RunFacts.before`, None if there is none."""

    index: int
    mean_iou: float | None
    change: float | None
    note: str
    best: bool = False


@dataclass(frozen=True)
class ClassChange:
    """How much the IoU of one class changed."""

    name: str
    change: float


@dataclass(frozen=True)
class PseudoAccuracy:
    """The share of a round's pseudo labels that are right."""

    index: int
    accuracy: float


def verdict(facts: RunFacts, data: DataFacts) -> Markup:
    """HTML of the section."""
    listed = render("remarks", remarks=remarks(facts, data))
    if not facts.scored:
        return render("unscored", text=_unscored(facts)) + listed
    first, last = facts.scored[0], facts.result
    best = last if facts.keeps_best else max(facts.scored, key=mean_iou)
    gain, loss = _extremes(facts)
    iou = last.iou
    lowest = float(np.nanmin(iou))
    several = last is not first
    return (
        render(
            "verdict",
            chosen=facts.chosen,
            of_result=facts.keeps_best,
            cards=_cards(facts, best),
            first={"index": first.index, "mean_iou": mean_iou(first)},
            last={"index": last.index, "mean_iou": mean_iou(last)},
            best={"index": best.index, "mean_iou": mean_iou(best)},
            since=mean_iou(last) - mean_iou(first) if several else None,
            gain=gain,
            loss=loss,
            lowest=[facts.classes.names[k] for k in np.flatnonzero(iou == lowest)],
            lowest_iou=lowest,
            aligned=_aligned(last),
            pseudo=_pseudo(facts),
            # Later rounds train on. Without a control nobody knows whether the pseudo labels helped.
            steps=_steps(facts) if several else 0,
        )
        + listed
    )


def _steps(facts: RunFacts) -> int:
    """Training steps of the result's round and of those that it goes on from."""
    steps, last = {round_.index: round_.steps or 0 for round_ in facts.rounds}, facts.result.index
    before: dict[int, int | None]
    if facts.recipe.takes_turns:
        before = {round_.index: round_.trained_from for round_ in facts.rounds}
    elif not facts.keeps_best:
        return sum(count for index, count in steps.items() if index <= last)
    else:
        before = {standing.index: standing.against for standing in facts.standings}
    total, index = 0, last
    while index is not None:
        total += steps[index]
        index = before[index]
    return total


@dataclass(frozen=True)
class AlignedMean:
    """The mean IoU of a round's aligned decisions, and whether they are the result."""

    mean_iou: float
    used: bool


def _aligned(round_: RoundFacts) -> AlignedMean | None:
    """What a round's aligned decisions reach; None if there are none."""
    aligned = round_.aligned
    if aligned is None or aligned.scores is None:
        return None
    return AlignedMean(aligned.scores.mean_iou, aligned.used)


def mean_iou(round_: RoundFacts) -> float:
    """Mean IoU of a scored round."""
    assert round_.scores is not None
    return round_.scores.mean_iou


def _cards(facts: RunFacts, best: RoundFacts) -> list[Card]:
    cards = []
    mark = "the result" if facts.keeps_best else "best"
    for round_ in facts.scored:
        mean = mean_iou(round_)
        note = "labeled images only" if round_.labels is None else mark if round_ is best else ""
        if facts.recipe.rounds[round_.index].use == "online":
            note = ", ".join(
                [facts.recipe.online.method.replace("_", " "), *([mark] if round_ is best else [])]
            )
        before = facts.before(round_)
        change = None if before is None else mean - mean_iou(before)
        cards.append(
            Card(round_.index, mean, change, note=note, best=round_ is best and len(facts.scored) > 1)
        )
    started = {round_.index for round_ in facts.rounds}
    done = {round_.index for round_ in facts.rounds if round_.scored or "evaluate" in round_.seconds}
    cards += [
        Card(index, None, None, note="in progress" if index in started else "to come")
        for index in range(facts.planned)
        if index not in done
    ]
    return cards


def _unscored(facts: RunFacts) -> str:
    if any("evaluate" in round_.seconds for round_ in facts.rounds):
        return (
            "Nothing was scored: there are no labeled validation pixels. Set data.validation in the recipe."
        )
    return "No round has been scored yet."


def _extremes(facts: RunFacts) -> tuple[ClassChange | None, ClassChange | None]:
    """The class that gained most since the first scored round, and the one that lost most, if any did."""
    change = facts.result.iou - facts.scored[0].iou
    known = np.flatnonzero(~np.isnan(change))
    if not len(known):
        return None, None
    names = facts.classes.names
    top, bottom = known[change[known].argmax()], known[change[known].argmin()]
    gain = ClassChange(names[top], float(change[top])) if change[top] > 0 else None
    loss = ClassChange(names[bottom], float(change[bottom])) if change[bottom] < 0 else None
    return gain, loss


def _pseudo(facts: RunFacts) -> PseudoAccuracy | None:
    """The accuracy of the last round whose pseudo labels could be compared with the truth."""
    for round_ in reversed(facts.labeled):
        if round_.pseudo is not None and round_.pseudo.confusion.any():
            return PseudoAccuracy(round_.index, round_.pseudo.pixel_accuracy)
    return None
