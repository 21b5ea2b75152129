"""Several runs in one table and chart; runs that differ in nothing but the seed are one column, mean ± deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.errors import RunError, faults
from darseg.report import charts
from darseg.report.facts import RoundFacts, RunFacts, read_run
from darseg.report.page import Page, escape, table
from darseg.run.build import differences, recipe_of

NAME = "comparison.html"
SAME = ("seed", "threads")  # keys in which the runs of a group may differ; threads move last bits at most
DATA = ("labeled", "unlabeled", "validation")


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one recipe under different seeds, by their last scored rounds.

    Attributes:
        differences: to the recipe of the first group, a line each.
    """

    name: str
    runs: tuple[RunFacts, ...]
    differences: tuple[str, ...]

    @property
    def last(self) -> tuple[RoundFacts, ...]:
        return tuple(run.scored[-1] for run in self.runs)

    @property
    def iou(self) -> NDArray[np.float64]:
        """float64 [runs, K]."""
        return np.array([one.scores.iou for one in self.last if one.scores is not None])

    @property
    def mean_iou(self) -> NDArray[np.float64]:
        """float64 [runs]."""
        return self.figure("mean_iou")

    def figure(self, name: str) -> NDArray[np.float64]:
        """float64 [runs]: a figure of the last scored rounds."""
        return np.array([getattr(one.scores, name) for one in self.last])

    def by_round(self, index: int) -> NDArray[np.float64]:
        """float64 [runs that scored it]: mean IoU of a round."""
        found = [one.scores for run in self.runs for one in run.scored if one.index == index]
        return np.array([scores.mean_iou for scores in found if scores is not None])


@dataclass(frozen=True)
class Comparison:
    """Where the page is, the warnings on it, and its table: a head and rows of plain text."""

    out: Path
    warnings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compare_runs(runs: Sequence[Path | str], out: Path | str = NAME) -> Comparison:
    """Write a page that compares the last scored rounds of two or more run folders.

    Raises RunError: no run folder, one given twice, nothing scored, other classes; StorageError.
    """
    facts = [read_run(run) for run in runs]
    _check(facts)
    groups = group_runs(facts)
    warnings = _warnings(facts, groups)
    classes = facts[0].classes
    rows: list[tuple[str, ...]] = [("IoU", *(group.name for group in groups))]
    rows += [(name, *(spread(group.iou[:, k]) for group in groups)) for k, name in enumerate(classes.names)]
    for title, name in (
        ("mean IoU", "mean_iou"),
        ("mean accuracy", "mean_accuracy"),
        ("pixel accuracy", "pixel_accuracy"),
    ):
        rows.append((title, *(spread(group.figure(name)) for group in groups)))
    rows.append(("runs", *(str(len(group.runs)) for group in groups)))
    page = Page(
        " / ".join(group.name for group in groups), f"{len(facts)} runs compared by their last scored rounds"
    )
    page.section("Verdict", _verdict(page, groups, warnings), heading=False)
    page.section("Classes", _classes(page, groups, rows))
    page.section("Rounds", _rounds(groups))
    page.section("Runs", _runs(groups))
    return Comparison(page.write(Path(out)), tuple(warnings), tuple(rows))


def spread(values: NDArray) -> str:
    """Mean, and the sample's standard deviation where there are several; undefined ones are left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "undefined"
    mean = f"{known.mean():.4f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.4f}"


def group_runs(facts: Sequence[RunFacts]) -> list[Group]:
    """Runs whose recipes differ in SAME at most, and whose data are the same, in the order of their first."""
    groups: list[list[RunFacts]] = []
    for one in facts:
        for group in groups:
            if not _apart(group[0], one):
                group.append(one)
                break
        else:
            groups.append([one])
    return [
        Group(name, tuple(group), tuple(_apart(groups[0][0], group[0])))
        for name, group in zip(_names(groups), groups, strict=True)
    ]


def _apart(first: RunFacts, second: RunFacts) -> list[str]:
    """What keeps two runs from being one but for the seed, a line each. Equal data may lie in different folders."""
    moved = [role for role in DATA if first.data.get(role) != second.data.get(role)]
    lines = differences(
        recipe_of(first.root), recipe_of(second.root), SAME if moved else (*SAME, "data.root")
    )
    return lines + [f"{role} images: others" for role in moved]


def _names(groups: Sequence[Sequence[RunFacts]]) -> list[str]:
    """The shortest ends of the folders' paths that tell the groups apart; what varies inside a group is a *."""
    paths = [[one.root.resolve().parts for one in group] for group in groups]
    for depth in range(1, 1 + max(len(path) for group in paths for path in group)):
        names = []
        for group in paths:
            columns = zip(*(((("",) * depth) + path)[-depth:] for path in group), strict=True)
            names.append("/".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns).strip("/"))
        if len(set(names)) == len(names) and "*" not in names:
            return names
    return [f"{chr(65 + at % 26)}{at // 26 or ''}" for at in range(len(groups))]


def _check(facts: Sequence[RunFacts]) -> None:
    places = [one.root.resolve() for one in facts]
    wrong = [f"{one.root}: given twice" for at, one in enumerate(facts) if places[at] in places[:at]]
    wrong += [f"{one.root}: no round was scored" for one in facts if not one.scored]
    first = facts[0]
    for one in facts[1:]:
        if one.classes.names != first.classes.names:
            only = [name for name in one.classes.names if name not in first.classes.names]
            lacks = [name for name in first.classes.names if name not in one.classes.names]
            said = "; ".join(
                [f"{title} {', '.join(names)}" for title, names in (("has", only), ("lacks", lacks)) if names]
            )
            wrong.append(f"{one.root}: other classes than {first.root} ({said or 'in another order'})")
    if wrong:
        raise RunError(faults("These runs cannot be compared", wrong))


def _warnings(facts: Sequence[RunFacts], groups: Sequence[Group]) -> list[str]:
    found, first = [], facts[0]
    for one in facts[1:]:
        if one.data.get("validation") != first.data.get("validation"):
            found.append(
                f"{one.root} was scored on other validation images than {first.root}: the figures cannot be compared"
            )
        elif one.scored[-1].protocol != first.scored[-1].protocol:
            found.append(
                f"{one.root} was scored by another protocol than {first.root}: {one.scored[-1].protocol} / "
                f"{first.scored[-1].protocol}"
            )
    found += [
        f"{one.root} is not finished: round {one.scored[-1].index} is its last"
        for one in facts
        if not one.finished
    ]
    for group in groups:
        for at, one in enumerate(group.runs):
            same = next((other for other in group.runs[:at] if other.seed == one.seed), None)
            if same is not None:
                found.append(
                    f"{one.root} has the seed of {same.root}, {one.seed}: their deviation says little of other seeds"
                )
    return found


def _swatch(at: int) -> str:
    return f'<i class="swatch" style="background:{charts.SERIES[at % len(charts.SERIES)]}"></i>'


def _verdict(page: Page, groups: Sequence[Group], warnings: Sequence[str]) -> str:
    best = max(groups, key=lambda group: group.mean_iou.mean())
    cards = []
    for at, group in enumerate(groups):
        values = group.mean_iou
        deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        count = f"{len(values)} runs" if len(values) > 1 else "one run"
        cards.append(
            f'<div class="round{" best" * (group is best)}"><span>{_swatch(at)}{escape(group.name)}</span>'
            f"<b>{values.mean():.3f}{deviation}</b><span>{count}{', best' * (group is best)}</span></div>"
        )
    said = f"Best mean IoU: <b>{escape(best.name)}</b>, {spread(best.mean_iou)}."
    if len(groups) > 1:
        second = max(
            (group for group in groups if group is not best), key=lambda group: group.mean_iou.mean()
        )
        ahead = best.mean_iou.mean() - second.mean_iou.mean()
        said += f" {ahead:.4f} ahead of {escape(second.name)}."
        deviation = max(
            (np.std(one.mean_iou, ddof=1) for one in (best, second) if len(one.runs) > 1), default=None
        )
        if deviation is None:
            said += " Of one run each: seeds may differ by as much."
        elif ahead < deviation:
            said += " That is less than the deviation between seeds."
    listed = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    figure = charts.compared_chart([(group.name, group.mean_iou) for group in groups])
    return (
        f'<div class="rounds">{"".join(cards)}</div><p class="said">{said}</p>'
        + (f'<ul class="remarks">{listed}</ul>' if listed else "")
        + page.chart(figure, "mean IoU of the runs")
    )


def _classes(page: Page, groups: Sequence[Group], rows: Sequence[tuple[str, ...]]) -> str:
    names = groups[0].runs[0].classes.names
    figure = charts.compared_classes_chart(names, [(group.name, group.iou) for group in groups])
    body = [
        ("total" if at >= len(names) else "", [escape(cell) for cell in row])
        for at, row in enumerate(rows[1:])
    ]
    head = ["IoU", *(f"{_swatch(at)}{escape(name)}" for at, name in enumerate(rows[0][1:]))]
    hint = "Mean over the runs of a column ± the sample's standard deviation, where there are several."
    return f'<p class="hint">{hint}</p>' + table(head, body) + page.chart(figure, "IoU of every class")


def _rounds(groups: Sequence[Group]) -> str:
    count = max(run.scored[-1].index for group in groups for run in group.runs) + 1
    rows = []
    for at, group in enumerate(groups):
        cells = [spread(values) if len(values := group.by_round(index)) else "–" for index in range(count)]
        rows.append(("", [f"{_swatch(at)}{escape(group.name)}", *cells]))
    hint = "Round 0 is trained on the labeled images alone."
    return f'<p class="hint">{hint}</p>' + table(
        ["mean IoU", *(f"round {index}" for index in range(count))], rows
    )


def _runs(groups: Sequence[Group]) -> str:
    parts: list[Any] = []
    for at, group in enumerate(groups):
        rows = []
        for run in group.runs:
            last = run.scored[-1]
            assert last.scores is not None
            cells = [
                str(run.root),
                str(run.seed),
                str(last.index),
                f"{last.scores.mean_iou:.4f}",
                f"{run.seconds:,.0f}",
            ]
            rows.append(("", [escape(cell) for cell in cells]))
        parts.append(f"<h3>{_swatch(at)}{escape(group.name)}</h3>")
        if group.differences:
            lines = "\n".join(group.differences)
            parts.append(
                f"<details><summary>{len(group.differences)} key(s) differ from {escape(groups[0].name)}</summary>"
                f"<pre>{escape(lines)}</pre></details>"
            )
        parts.append(table(["run", "seed", "last round", "mean IoU", "seconds"], rows))
    return "".join(parts)
