"""The page of `darseg compare`: which variants differ from their controls, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from markupsafe import Markup

from darseg.experiment.remarks import BASES, answer, interval_text, missing_reason, warnings
from darseg.experiment.statistics import (
    FEW_SHOWING,
    LEVEL,
    WIDE,
    ClassScore,
    Comparison,
    Difference,
    Estimate,
    Role,
    Summary,
    compare_trials,
)
from darseg.experiment.tables import spread, write_tables
from darseg.experiment.trial import Evidence
from darseg.report import charts, variant_charts
from darseg.report.elements import UNDEFINED, Entry, Row, Tab, Table, figure_of
from darseg.report.page import Page, check_out, render

NAME = "compare.html"


@dataclass(frozen=True, eq=False)
class _View:
    """What all sections of the page need. names, colors: of the arms, in their order."""

    page: Page
    comparison: Comparison
    names: tuple[str, ...]
    colors: dict[str, str]

    def entry(self, name: str) -> Entry:
        return Entry(name, self.colors[name])


def publish_comparison(evidence: Evidence, folder: Path) -> Comparison:
    """Write compare.html, compare.json, compare.csv and compare.md into a folder, each as a whole.

    Raises:
        RunError: `folder` has a compare.html that darseg did not write.
        StorageError: a file cannot be written.
    """
    check_out(folder / NAME)
    comparison = compare_trials(evidence)
    write_tables(comparison, folder)
    comparison_page(comparison).write(folder / NAME)
    return comparison


def comparison_page(comparison: Comparison) -> Page:
    """The page, not yet written."""
    evidence = comparison.evidence
    about = f"{len(evidence.trials)} of {evidence.planned} runs" + "".join(
        f", {count} {role} images" for role, count in comparison.images.items()
    )
    kinds = {arm.name: arm.kind for arm in reversed(evidence.arms)}
    names = tuple(dict.fromkeys(arm.name for arm in evidence.arms))
    variants = [name for name in names if kinds[name] == "variant"]
    colors = {
        name: variant_charts.color_of(
            kinds[name], variants.index(name) if name in variants else 0, charts.SERIES
        )
        for name in names
    }
    view = _View(Page(evidence.title, about), comparison, names=names, colors=colors)
    view.page.section("Answer", _answer(view), heading=False)
    view.page.section("Scores", _scores(view))
    if any(row.scores for row in comparison.rows):
        if any(row.difference() for row in comparison.variants):
            view.page.section("Differences", _differences(view))
        if len(comparison.labels) > 1:
            view.page.section("Labels", _labels(view))
        if "validation" in comparison.images:
            view.page.section("Cost", _cost(view))
            view.page.section("Classes", _classes(view))
    view.page.section("Runs", _runs(view))
    return view.page


def _answer(view: _View) -> Markup:
    return render("variants_answer", answer=answer(view.comparison), warnings=warnings(view.comparison))


def _scores(view: _View) -> Markup:
    """The main table: a row for each arm, by number of labels."""
    roles = [role for role in get_args(Role) if role in view.comparison.images]
    columns = ["variant", "labels", "seeds", "steps", "seconds"]
    for role in roles:
        columns += [role, f"{role}, aligned", f"{role}: difference", f"{role}: difference, aligned"]
    rows = []
    for row in sorted(view.comparison.rows, key=lambda row: row.arm.labels):
        cells = [str(row.arm.labels), str(len(row.seeds)), _number(row.steps), _number(row.seconds)]
        for role in roles:
            cells += [spread(row.score(role)), spread(row.score(role, "aligned"))]
            cells += [_interval(row.difference(role)), _interval(row.difference(role, "aligned"))]
        difference = row.difference()
        better = difference is not None and difference.told_apart and difference.mean_iou.mean > 0
        rows.append(Row(view.entry(row.arm.name), cells, "total" if better else ""))
    return render("variants_scores", table=Table(columns, rows), level=f"{LEVEL:.0%}")


def _number(value: float) -> str:
    return UNDEFINED if value != value else f"{value:,.0f}"


def _interval(difference: Difference | None) -> str:
    return UNDEFINED if difference is None else _interval_cell(difference.mean_iou)


def _differences(view: _View) -> Markup:
    """Dot plots of the differences to the first control, and a table of all."""
    comparison = view.comparison
    several = len(comparison.labels) > 1
    tabs = []
    for role in (role for role in reversed(get_args(Role)) if role in comparison.images):
        known = [
            (row, it)
            for row in sorted(comparison.variants, key=lambda row: row.arm.labels)
            if (it := row.difference(role)) is not None
        ]
        if known:
            figure = variant_charts.differences_chart(known, view.colors, labels_shown=several)
            description = (
                f"differences of mean IoU to the control on {role} images, with {LEVEL:.0%} intervals"
            )
            tabs.append(Tab(f"{role} images", view.page.chart(figure, description)))
    rows = [
        Row(
            view.entry(row.arm.name),
            [
                str(row.arm.labels),
                it.role,
                it.decisions,
                f"{it.control} ({BASES[it.basis]})",
                str(len(it.seeds)),
                interval_text(it.mean_iou),
                figure_of(it.mean_iou.deviation),
                UNDEFINED if it.seeds_for_one_point is None else str(it.seeds_for_one_point),
            ],
        )
        for row in comparison.variants
        for it in row.differences
    ]
    columns = [
        "variant",
        "labels",
        "images",
        "decisions",
        "control",
        "seeds",
        "difference",
        "deviation",
        "seeds needed",
    ]
    return render(
        "variants_differences",
        tabs=tabs,
        table=Table(columns, rows),
        level=f"{LEVEL:.0%}",
        several=several,
        variants=len(comparison.variants),
    )


def _labels(view: _View) -> Markup:
    comparison = view.comparison
    tabs = [
        Tab(
            f"{role} images",
            view.page.chart(
                variant_charts.budget_chart(view.names, comparison.rows, view.colors, role=role),
                f"mean IoU on {role} images over numbers of labels",
            ),
        )
        for role in reversed(get_args(Role))
        if role in comparison.images
    ]
    return render("variants_labels", tabs=tabs)


def _cost(view: _View) -> Markup:
    tabs = [
        Tab(
            title,
            view.page.chart(
                variant_charts.cost_chart(view.comparison.rows, view.colors, cost=cost),
                f"mean IoU on validation images against {cost}",
            ),
        )
        for title, cost in (("images seen in training", "images"), ("seconds", "seconds"))
    ]
    return render("variants_cost", tabs=tabs)


def _classes(view: _View) -> Markup:
    """IoU of every class, for each number of labels; ceilings are shown with all of them."""
    comparison = view.comparison
    names = comparison.evidence.classes
    tabs = []
    for labels in comparison.labels:
        rows = [row for row in comparison.rows if row.arm.labels == labels or row.arm.kind == "ceiling"]
        scored = {
            row.arm.name: score.classes for row in rows if (score := row.score("validation")) is not None
        }
        changed = {row.arm.name: it.classes for row in rows if (it := row.difference()) is not None}
        if not scored:
            continue
        shown = next(iter(scored.values()))
        scores = [
            Row(name, [str(shown[k].images), *(_class_cell(classes[k]) for classes in scored.values())])
            for k, name in enumerate(names)
        ]
        changes = [
            Row(name, [_interval_cell(classes[k]) for classes in changed.values()])
            for k, name in enumerate(names)
        ]
        tables = (
            Table(["IoU", "images", *map(view.entry, scored)], scores),
            Table(["difference of IoU", *map(view.entry, changed)], changes if changed else []),
        )
        tabs.append(Tab(f"{labels} labels", tables))
    return render("variants_classes", tabs=tabs, level=f"{LEVEL:.0%}", wide=WIDE, few=FEW_SHOWING)


def _class_cell(score: ClassScore) -> str:
    if score.iou.mean != score.iou.mean:
        return UNDEFINED
    ends = f"{figure_of(score.iou.low)}–{figure_of(score.iou.high)}"
    return f"{figure_of(score.iou.mean)} ({ends})" + " ?" * score.uncertain


def _interval_cell(estimate: Estimate) -> str:
    return UNDEFINED if estimate.mean != estimate.mean else interval_text(estimate)


def _runs(view: _View) -> Markup:
    """What each variant changes, which runs failed, and where all ran."""
    evidence = view.comparison.evidence
    failures = sorted(evidence.failures, key=lambda it: (it.variant, it.labels, it.seed))
    failed = Table(
        ["variant", "labels", "seed", "reason"],
        [Row(view.entry(it.variant), [str(it.labels), str(it.seed), it.reason]) for it in failures],
        "facts",
    )
    changes = {arm.name: arm.changes for arm in reversed(evidence.arms) if arm.changes}
    return render(
        "variants_runs",
        failed=failed,
        changes=[(view.entry(name), changes[name]) for name in view.names if name in changes],
        seeds=_seeds(view, view.comparison.rows),
        facts=Table([], [Row(name, [value]) for name, value in evidence.facts], "facts"),
    )


def _seeds(view: _View, rows: Sequence[Summary]) -> Table:
    """Mean IoU of each run on validation images."""
    numbers = sorted({seed for row in rows for seed in row.seeds})
    lines = []
    for row in sorted(rows, key=lambda row: row.arm.labels):
        score = row.score("validation")
        known = {} if score is None else dict(zip(score.seeds, score.values, strict=True))
        reason = missing_reason(view.comparison, row)
        cells = [figure_of(known.get(seed, np.nan), 4) for seed in numbers]
        lines.append(Row(view.entry(row.arm.name), [str(row.arm.labels), *cells, reason]))
    return Table(["validation mean IoU", "labels", *(f"seed {seed}" for seed in numbers), ""], lines)
