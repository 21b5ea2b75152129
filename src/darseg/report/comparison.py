"""Compare several runs on one page. Runs that differ only in their seed share a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from darseg.errors import RunError, faults
from darseg.report import charts
from darseg.report.elements import UNDEFINED, Entry, Row, Table
from darseg.report.facts import RoundFacts, RunFacts, read_run
from darseg.report.page import Page, render
from darseg.run.build import differences

NAME = "comparison.html"
SAME = ("seed", "threads")  # keys in which the runs of a group may differ; threads change last bits at most
DATA = ("labeled", "unlabeled", "validation")
FIGURES = {"mean IoU": "mean_iou", "mean accuracy": "mean_accuracy", "pixel accuracy": "pixel_accuracy"}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one recipe with different seeds, represented by the rounds that are their results.

    Attributes:
        differences: from the recipe of the first group, one line each.
    """

    name: str
    runs: tuple[RunFacts, ...]
    differences: tuple[str, ...]

    @property
    def last(self) -> tuple[RoundFacts, ...]:
        """The round of each run that is its result: the last scored one, or the best."""
        return tuple(run.result for run in self.runs)

    @property
    def iou(self) -> NDArray[np.float64]:
        """float64 [runs, K]."""
        return np.array([round_.iou for round_ in self.last])

    @property
    def mean_iou(self) -> NDArray[np.float64]:
        """float64 [runs]."""
        return self.figure("mean_iou")

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation of mean IoU; None for one run."""
        return float(np.std(self.mean_iou, ddof=1)) if len(self.runs) > 1 else None

    def figure(self, name: str) -> NDArray[np.float64]:
        """float64 [runs]: a figure of the rounds that are the results."""
        return np.array([getattr(round_.scores, name) for round_ in self.last])

    @property
    def aligned(self) -> NDArray[np.float64]:
        """float64 [runs]: mean IoU of aligned decisions; NaN for a run that has none."""
        scores = [None if round_.aligned is None else round_.aligned.scores for round_ in self.last]
        return np.array([np.nan if known is None else known.mean_iou for known in scores])

    @property
    def result(self) -> NDArray[np.float64]:
        """float64 [runs]: mean IoU of the decisions that each run's result has, aligned or plain."""
        used = np.array([round_.aligned is not None and round_.aligned.used for round_ in self.last])
        return np.where(used, self.aligned, self.mean_iou)

    def by_round(self, index: int) -> NDArray[np.float64]:
        """float64 [runs that scored it]: mean IoU of a round."""
        scores = [round_.scores for run in self.runs for round_ in run.scored if round_.index == index]
        return np.array([known.mean_iou for known in scores if known is not None])


@dataclass(frozen=True)
class Comparison:
    """A comparison that was written.

    Attributes:
        out: path of the page.
        warnings: those on the page.
        rows: its table as plain text, the head first.
    """

    out: Path
    warnings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compare_runs(runs: Sequence[Path | str], out: Path | str = NAME) -> Comparison:
    """Write a page that compares the results of two or more run folders.

    Raises:
        RunError: a folder is not a run folder, is given twice, has no scores, or has other classes.
        StorageError: the page cannot be written.
    """
    facts = [read_run(run) for run in runs]
    _check(facts)
    groups = group_runs(facts)
    warnings = _warnings(facts, groups)
    rows: list[tuple[str, ...]] = [("IoU", *(group.name for group in groups))]
    for k, name in enumerate(facts[0].classes.names):
        rows.append((name, *(spread(group.iou[:, k]) for group in groups)))
    for title, name in FIGURES.items():
        rows.append((title, *(spread(group.figure(name)) for group in groups)))
    if any(round_.aligned for group in groups for round_ in group.last):
        rows.append(("mean IoU, aligned", *(spread(group.aligned) for group in groups)))
        rows.append(("mean IoU of the result", *(spread(group.result) for group in groups)))
    rows.append(("runs", *(str(len(group.runs)) for group in groups)))
    page = Page(" / ".join(group.name for group in groups), f"{len(facts)} runs, by their last scored rounds")
    page.section("Verdict", _verdict(page, groups, warnings), heading=False)
    page.section("Classes", _classes(page, groups, rows))
    page.section("Rounds", _rounds(groups))
    page.section("Runs", _runs(groups))
    return Comparison(page.write(Path(out)), tuple(warnings), tuple(rows))


def spread(values: NDArray) -> str:
    """The mean and, of several values, the sample's standard deviation; NaN is left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "undefined"
    mean = f"{known.mean():.4f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.4f}"


def group_runs(facts: Sequence[RunFacts]) -> list[Group]:
    """Group runs of the same data whose recipes differ at most in SAME, in order of first runs."""
    groups: list[list[RunFacts]] = []
    for run in facts:
        group = next((group for group in groups if not _differences(group[0], run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return [
        Group(name, tuple(group), tuple(_differences(groups[0][0], group[0])))
        for name, group in zip(_names(groups), groups, strict=True)
    ]


def _differences(first: RunFacts, second: RunFacts) -> list[str]:
    """What two runs differ in apart from SAME, one line each. Equal data may be in different folders."""
    moved = [role for role in DATA if first.data.get(role) != second.data.get(role)]
    ignored = SAME if moved else (*SAME, "data.root")
    lines = differences(first.recipe, second.recipe, ignored)
    return lines + [f"{role} images: others" for role in moved]


def _names(groups: Sequence[Sequence[RunFacts]]) -> list[str]:
    """The shortest path endings that distinguish the groups. Parts that vary inside a group become *."""
    paths = [[run.root.resolve().parts for run in group] for group in groups]
    for depth in range(1, 1 + max(len(path) for group in paths for path in group)):
        names = []
        for group in paths:
            columns = zip(*(((("",) * depth) + path)[-depth:] for path in group), strict=True)
            names.append("/".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns).strip("/"))
        if len(set(names)) == len(names) and "*" not in names:
            return names
    return [f"{chr(65 + at % 26)}{at // 26 or ''}" for at in range(len(groups))]


def _check(facts: Sequence[RunFacts]) -> None:
    """Raise RunError with all reasons why runs cannot be compared."""
    roots = [run.root.resolve() for run in facts]
    reasons = [f"{run.root}: given twice" for at, run in enumerate(facts) if roots[at] in roots[:at]]
    reasons += [f"{run.root}: no round was scored" for run in facts if not run.scored]
    reference, names = facts[0], facts[0].classes.names
    for run in facts[1:]:
        if run.classes.names != names:
            extra = [name for name in run.classes.names if name not in names]
            missing = [name for name in names if name not in run.classes.names]
            parts = [
                f"{verb} {', '.join(differing)}"
                for verb, differing in (("has", extra), ("lacks", missing))
                if differing
            ]
            how = "; ".join(parts) or "in another order"
            reasons.append(f"{run.root}: other classes than {reference.root} ({how})")
    if reasons:
        raise RunError(faults("These runs cannot be compared", reasons))


def _warnings(facts: Sequence[RunFacts], groups: Sequence[Group]) -> list[str]:
    warnings, reference = [], facts[0]
    protocol = reference.result.protocol
    for run in facts[1:]:
        if run.data.get("validation") != reference.data.get("validation"):
            warnings.append(
                f"{run.root} and {reference.root} were scored on different validation images. Their figures cannot be "
                "compared."
            )
        elif run.result.protocol != protocol:
            warnings.append(
                f"{run.root} and {reference.root} were scored by different protocols: {run.result.protocol} / "
                f"{protocol}"
            )
    warnings += [
        f"{run.root} is not finished. Its last scored round is {run.scored[-1].index}."
        for run in facts
        if not run.finished
    ]
    for group in groups:
        for at, run in enumerate(group.runs):
            same = next((earlier for earlier in group.runs[:at] if earlier.seed == run.seed), None)
            if same is not None:
                warnings.append(
                    f"{run.root} and {same.root} have the same seed, {run.seed}. Their deviation says little about "
                    "other seeds."
                )
    return warnings


def _color(at: int) -> str:
    return charts.SERIES[at % len(charts.SERIES)]


def _verdict(page: Page, groups: Sequence[Group], warnings: Sequence[str]) -> Markup:
    ranked = sorted(groups, key=lambda group: -group.mean_iou.mean())
    best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    cards = [
        {
            "entry": Entry(group.name, _color(at)),
            "mean_iou": float(group.mean_iou.mean()),
            "deviation": group.deviation,
            "runs": len(group.runs),
            "best": group is best,
        }
        for at, group in enumerate(groups)
    ]
    lead = None if second is None else float(best.mean_iou.mean() - second.mean_iou.mean())
    deviations = [group.deviation for group in ranked[:2] if group.deviation is not None]
    figure = charts.compared_chart([(group.name, group.mean_iou) for group in groups])
    return render(
        "compared_verdict",
        cards=cards,
        best=best.name,
        best_iou=spread(best.mean_iou),
        second=None if second is None else second.name,
        lead=lead,
        deviation=max(deviations, default=None),
        result=_best_result(groups),
        warnings=warnings,
        chart=page.chart(figure, "mean IoU of the runs"),
    )


def _best_result(groups: Sequence[Group]) -> dict[str, str] | None:
    """The group whose results are best; None if no run has aligned decisions."""
    if not any(round_.aligned for group in groups for round_ in group.last):
        return None
    best = max(groups, key=lambda group: group.result.mean())
    return {"name": best.name, "mean_iou": spread(best.result)}


def _classes(page: Page, groups: Sequence[Group], rows: Sequence[tuple[str, ...]]) -> Markup:
    names = groups[0].runs[0].classes.names
    figure = charts.compared_classes_chart(names, [(group.name, group.iou) for group in groups])
    head, *body = rows
    columns = [head[0], *(Entry(name, _color(at)) for at, name in enumerate(head[1:]))]
    lines = [Row(row[0], row[1:], "total" if at >= len(names) else "") for at, row in enumerate(body)]
    return render(
        "compared_classes", table=Table(columns, lines), chart=page.chart(figure, "IoU of every class")
    )


def _rounds(groups: Sequence[Group]) -> Markup:
    count = max(run.scored[-1].index for group in groups for run in group.runs) + 1
    rows = []
    for at, group in enumerate(groups):
        values = [group.by_round(index) for index in range(count)]
        rows.append(
            Row(
                Entry(group.name, _color(at)),
                [spread(scores) if len(scores) else UNDEFINED for scores in values],
            )
        )
    return render(
        "compared_rounds", table=Table(["mean IoU", *(f"round {index}" for index in range(count))], rows)
    )


def _runs(groups: Sequence[Group]) -> Markup:
    parts = []
    for at, group in enumerate(groups):
        rows = []
        for run, last, mean_iou in zip(group.runs, group.last, group.mean_iou, strict=True):
            cells = [str(run.seed), str(last.index), f"{mean_iou:.4f}", f"{run.seconds:,.0f}"]
            rows.append(Row(str(run.root), cells))
        parts.append(
            {
                "entry": Entry(group.name, _color(at)),
                "differences": group.differences,
                "table": Table(["run", "seed", "last round", "mean IoU", "seconds"], rows),
            }
        )
    return render("compared_runs", groups=parts, reference=groups[0].name)
