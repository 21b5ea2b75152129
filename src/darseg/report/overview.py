"""The page of one run: the verdict first, then why, and last what the run was made with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from markupsafe import Markup

from darseg.data.classes import ClassSet
from darseg.errors import DarsegError
from darseg.model.windows import Protocol
from darseg.pseudo.labeling import Ratio
from darseg.report import charts, step_charts
from darseg.report.acceptance import MOST_CLASSES, accepted_chart, class_charts, teacher_chart
from darseg.report.elements import UNDEFINED, Change, Chart, Entry, Row, Tab, Table, class_entries, figure_of
from darseg.report.expected import expected_section
from darseg.report.facts import STEPS, DataFacts, RoundFacts, RunFacts, headline, read_data, read_run
from darseg.report.gallery import draw_gallery
from darseg.report.networks import checkpoints, who_labels
from darseg.report.page import Page, render
from darseg.report.result import result_section
from darseg.report.share import shareable, without_places
from darseg.report.targets import INTERVAL, add_targets, alignment_table, interval_cells, shrunk_columns
from darseg.report.verdict import mean_iou, verdict
from darseg.run.build import labeling_protocol
from darseg.run.data_digest import sources
from darseg.run.directory import RunDirectory

MOST_ROWS = 3000  # rows for a class and round in one section
MOST_CELLS = 400_000  # of confusion matrices
FULL_BAR = 0.05  # change of IoU that fills half a bar, unless a class changed more
SELDOM = ("classify", "cross-fit")
"""Steps that few runs have; other runs do not show them."""


def write_report(
    run: Path | str,
    out: Path | str | None = None,
    *,
    pictures: bool = False,
    share: bool = False,
    overrides: Sequence[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write a page about a run folder, finished or in progress: one file that needs no network.

    Args:
        run: the run folder.
        out: the file to write; default: report.html in the run folder.
        pictures: show images even if they are not those that the run began with.
        share: leave out absolute paths, secrets in addresses, and the names of this machine and its user.
        overrides: "data.root=PATH", if the run's data were moved.
        say: called with a line that says which files are read.

    Returns:
        The path of the page.

    Raises:
        RunError: `run` is not a run folder or is damaged, or `out` is a file that darseg did not write.
        StorageError: the page cannot be written.
    """
    start = time.monotonic()
    facts = read_run(run, overrides)
    data = read_data(facts)
    if data.manifest is not None:
        samples = itertools.chain(*data.manifest.roles().values())
        say(sources(facts.root, facts.recipe.data.root, samples))
    if pictures:
        data = replace(data, stranger="")
    if share:
        data = replace(
            data, fault=data.fault and without_places(data.fault), stranger=without_places(data.stranger)
        )
    gallery = pictures_of(facts, data, share=share)
    if share:
        facts = shareable(facts)
    page = page_of(facts, data, gallery, seconds=time.monotonic() - start)
    return page.write(Path(out) if out else RunDirectory(run).report)


def pictures_of(facts: RunFacts, data: DataFacts, share: bool = False) -> Markup:
    """The gallery of a run as HTML, or the reason why it cannot be drawn."""
    fault, gallery = data.fault or data.stranger or None, None
    try:
        gallery = None if data.stranger else draw_gallery(facts, data)
    except (
        DarsegError
    ) as error:  # the figures are still worth a page if an image is missing or damaged by now
        fault = without_places(headline(error)) if share else headline(error)
    return render(
        "gallery",
        gallery=gallery,
        fault=fault,
        classes=class_entries(facts.classes),
        protocol=_labeling_protocol(facts).describe("logits"),
    )


def _labeling_protocol(facts: RunFacts) -> Protocol:
    """How the labels that the gallery shows were predicted."""
    if not facts.labeled:
        return labeling_protocol(facts.recipe)
    last = facts.labeled[-1]
    if last.labeler is None:
        return labeling_protocol(facts.recipe.at(last.labeling_round))
    return replace(labeling_protocol(facts.recipe), window=last.labeler["window"])


def page_of(facts: RunFacts, data: DataFacts, pictures: Markup, *, seconds: float) -> Page:
    """The page about a run. pictures: its gallery; seconds: spent on reading and drawing so far."""
    page = Page(facts.name, _about(facts, data))
    page.section("Verdict", verdict(facts, data), heading=False)
    if facts.scored:
        page.section("Classes", _classes(page, facts))
    if any(round_.aligned for round_ in facts.rounds):
        page.section("Result", _result(facts, data))
    if facts.labeled:
        page.section("Class shares", _shares(page, facts, data))
        if any(round_.labels and round_.labels.alignment for round_ in facts.labeled):
            page.section("Aligned decisions", _alignments(facts, data))
        if any(round_.labels and round_.labels.expected for round_ in facts.labeled):
            page.section("Expected precision", _expected(facts))
        page.section("Thresholds", _thresholds(facts))
        page.section("Confidences", _confidences(page, facts))
    if any(len(round_.curve.steps) for round_ in facts.rounds):
        page.section("Training", _training(page, facts, data))
    if facts.scored:
        page.section("Confusion", _confusion(page, facts))
    page.section("Gallery", pictures)
    page.section("Run", _run(facts, data, seconds))
    return page


def _tab(round_: RoundFacts, content: object) -> Tab:
    return Tab(f"Round {round_.index}", content)


def shown(rounds: Sequence[RoundFacts], most: int) -> tuple[tuple[RoundFacts, ...], str]:
    """The rounds that a section shows, so that the page stays small, and a sentence about the others.

    These are the first and the newest, at least two and at most `most` in all. Without others the sentence is empty.
    """
    most = max(2, most)
    if len(rounds) <= most:
        return tuple(rounds), ""
    kept = (rounds[0], *rounds[len(rounds) - most + 1 :])
    first, last = (rounds[at].index for at in (1, len(rounds) - most))
    left = f"Round {first} is" if first == last else f"Rounds {first} to {last} are"
    return kept, f"{left} not shown here, to keep the page small; their figures are in the run folder."


def _about(facts: RunFacts, data: DataFacts) -> str:
    done = sum("evaluate" in round_.seconds for round_ in facts.rounds)
    parts = [
        f"{facts.planned} round{'s' * (facts.planned > 1)}, finished"
        if facts.finished
        else f"{done} of {facts.planned} rounds"
    ]
    if facts.planned > 1:
        parts.insert(0, f"method {facts.method}")
    if data.manifest is not None:
        counts = {role: len(samples) for role, samples in data.manifest.roles().items()}
        parts.append(f"{counts['labeled']:,} labeled + {counts['unlabeled']:,} unlabeled images")
        parts.append(f"scored on {counts['validation']:,} images")
    if facts.started is not None:
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.started)))
    return " · ".join(parts)


def _classes(page: Page, facts: RunFacts) -> Markup:
    rounds, result = facts.scored, facts.result
    at, last = rounds.index(result), result.scores
    assert last is not None
    iou = np.array([round_.iou for round_ in rounds])
    means = [mean_iou(round_) for round_ in rounds]
    several = len(rounds) > 1
    change = iou[at] - iou[0]
    largest = max(FULL_BAR, float(np.nanmax(abs(change), initial=0)))

    def changed(value: float) -> list[Change]:
        return [Change(value, value / largest)] if several else []

    rows = []
    for k, entry in enumerate(class_entries(facts.classes)):
        cells = [*map(figure_of, iou[:, k]), *changed(float(change[k]))]
        cells += [figure_of(last.precision[k]), figure_of(last.recall[k])]
        rows.append(Row(entry, cells, "worst" if iou[at, k] == np.nanmin(iou[at]) else ""))
    cells = [*map(figure_of, means), *changed(means[at] - means[0]), "", figure_of(last.mean_accuracy)]
    rows.append(Row("mean", cells, "total"))
    columns = ["IoU", *(f"round {round_.index}" for round_ in rounds)]
    title, of = f"change since round {rounds[0].index}", ""
    if result is not rounds[-1]:
        title, of = f"round {result.index} since round {rounds[0].index}", f" of round {result.index}"
    columns += [title] * several + [f"precision{of}", f"recall{of}"]
    return render(
        "classes",
        protocol=rounds[-1].protocol,
        figures=Table(columns, rows),
        by_round=page.chart(charts.iou_chart(facts.classes.names, rounds), "IoU of every class by round"),
    )


def _shares(page: Page, facts: RunFacts, data: DataFacts) -> Markup:
    tabs, aligned = [], facts.method == "dars"
    rounds, omitted = shown(facts.labeled, MOST_ROWS // len(facts.classes))
    for round_ in rounds:
        assert round_.labels is not None
        figure = charts.shares_chart(
            facts.classes.names,
            data.counts,
            round_.labels,
            truth=round_.truth,
            aligned=aligned and not round_.labels.prior,
        )
        prior = round_.labels.prior
        add_targets(figure, facts.classes.names, data.labeled, shrunk=prior, color=charts.TRUTH)
        content = {
            "chart": page.chart(figure, f"class shares of round {round_.index}"),
            "table": _shares_table(facts.classes, data, round_),
        }
        tabs.append(_tab(round_, content))
    return render(
        "shares",
        rounds=tabs,
        omitted=omitted,
        aligned=aligned,
        shrunk=any(round_.labels and round_.labels.prior for round_ in rounds),
        method=facts.method,
        counted=data.counts is not None,
    )


def _shares_table(classes: ClassSet, data: DataFacts, round_: RoundFacts) -> Table:
    assert round_.labels is not None
    counts = {
        "labeled images": data.counts,
        "raw predictions": round_.labels.thresholds.predicted,
        "pseudo labels kept": round_.labels.kept,
        "truth of the unlabeled": round_.truth,
    }
    columns = {
        title: [f"{share:.3%}" for share in pixels / max(1, pixels.sum())]
        for title, pixels in counts.items()
        if pixels is not None
    }
    columns |= {f"{INTERVAL} of labeled": interval_cells(data.labeled, len(classes))}
    columns |= shrunk_columns(round_.labels.prior)
    rows = [
        Row(entry, [column[k] for column in columns.values()])
        for k, entry in enumerate(class_entries(classes))
    ]
    return Table(["share of pixels", *columns], rows)


def _result(facts: RunFacts, data: DataFacts) -> Markup:
    with_result = [round_ for round_ in facts.rounds if round_.aligned]
    rounds, omitted = shown(with_result, MOST_ROWS // len(facts.classes))
    entries = [
        (r.index, r.scores, r.aligned) for r in rounds if r.scores is not None and r.aligned is not None
    ]
    return result_section(facts.classes, entries, data.labeled, omitted=omitted)


def _alignments(facts: RunFacts, data: DataFacts) -> Markup:
    aligned = [round_ for round_ in facts.labeled if round_.labels and round_.labels.alignment]
    rounds, omitted = shown(aligned, MOST_ROWS // len(facts.classes))
    tabs = []
    for round_ in rounds:
        assert round_.labels is not None and round_.labels.alignment is not None
        alignment = round_.labels.alignment
        table = alignment_table(facts.classes, alignment, data.labeled, shrunk=round_.labels.prior)
        tabs.append(_tab(round_, {"table": table, "failed": not alignment.converged}))
    return render("alignment", rounds=tabs, omitted=omitted)


def _expected(facts: RunFacts) -> Markup:
    following = [round_ for round_ in facts.labeled if round_.labels and round_.labels.expected]
    rounds, omitted = shown(following, MOST_ROWS // len(facts.classes))
    return expected_section(facts.classes, rounds, omitted)


def _thresholds(facts: RunFacts) -> Markup:
    rounds, omitted = shown(facts.labeled, MOST_ROWS // len(facts.classes))
    tabs = [_tab(round_, _thresholds_table(facts.classes, round_)) for round_ in rounds]
    measured = any(round_.pseudo is not None for round_ in facts.labeled)
    return render("thresholds", rounds=tabs, omitted=omitted, measured=measured)


def _thresholds_table(classes: ClassSet, round_: RoundFacts) -> Table:
    assert round_.labels is not None
    chosen, kept, pseudo = round_.labels.thresholds, round_.labels.kept, round_.pseudo
    columns = ["class", "threshold", "keep share", "wanted", "predicted", "accepted", "kept", "of predicted"]
    counts = (chosen.wanted, chosen.predicted, chosen.accepted, kept)
    rows = []
    for k, entry in enumerate(class_entries(classes)):
        never = bool(np.isnan(chosen.threshold[k]))
        why = "accepts nothing" if chosen.predicted[k] else "never predicted"
        cells = [why if never else f"{chosen.threshold[k]:.5g}"]
        cells.append(UNDEFINED if never else f"{chosen.keep[k]:.4f}")
        cells += [f"{int(pixels[k]):,}" for pixels in counts]
        cells.append(f"{kept[k] / chosen.predicted[k]:.1%}" if chosen.predicted[k] else UNDEFINED)
        if pseudo is not None:
            cells.append(figure_of(pseudo.precision[k]))
        rows.append(Row(entry, cells, "worst" if never else ""))
    totals = [int(pixels.sum()) for pixels in counts]
    cells = ["", "", *(f"{total:,}" for total in totals), f"{totals[3] / max(1, totals[1]):.1%}"]
    if pseudo is not None:
        columns.append("right")
        cells.append(figure_of(pseudo.pixel_accuracy))
    rows.append(Row("all", cells, "total"))
    return Table(columns, rows)


@dataclass(frozen=True)
class ConfidenceCell:
    """The confidences of one class. chart: None for a class that was never predicted; kept: a share."""

    entry: Entry
    chart: Chart | None
    threshold: float = 0.0
    kept: float = 0.0


def _confidences(page: Page, facts: RunFacts) -> Markup:
    tabs, classes = [], facts.classes
    rounds, omitted = shown(facts.labeled, MOST_ROWS // len(classes))
    for round_ in rounds:
        assert round_.labels is not None
        chosen, cells, base = round_.labels.thresholds, [], page.base(charts.confidence_base(round_.labels))
        for k, entry in enumerate(class_entries(classes)):
            if not chosen.predicted[k]:
                cells.append(ConfidenceCell(entry, None))
                continue
            numbers = charts.confidence_chart(round_.labels, k, classes.colors[k])
            place = page.chart_on(base, numbers, f"confidences of {entry.name} in round {round_.index}")
            kept = round_.labels.kept[k] / chosen.predicted[k]
            cells.append(ConfidenceCell(entry, place, float(chosen.threshold[k]), kept=float(kept)))
        tabs.append(_tab(round_, cells))
    return render("confidences", rounds=tabs, omitted=omitted)


def _training(page: Page, facts: RunFacts, data: DataFacts) -> Markup:
    accepted, teacher = accepted_chart(facts.rounds), teacher_chart(facts.rounds)
    by_class = class_charts(facts.rounds, facts.classes, data.counts)
    return render(
        "training",
        loss=page.chart(step_charts.loss_chart(facts.rounds), "loss by step"),
        learning_rate=page.chart(step_charts.rate_chart(facts.rounds), "learning rate by step"),
        accepted=None if accepted is None else page.chart(accepted, "share of accepted pixels by step"),
        teacher=None if teacher is None else page.chart(teacher, "teacher and student by step"),
        by_class={name: page.chart(chart, f"{name} by step") for name, chart in by_class.items()},
        counted=data.counts is not None,
        most=MOST_CLASSES if len(facts.classes) > MOST_CLASSES else None,
    )


def _confusion(page: Page, facts: RunFacts) -> Markup:
    tabs, base = [], page.base(charts.confusion_base(facts.classes.names))
    rounds, omitted = shown(facts.scored, MOST_CELLS // len(facts.classes) ** 2)
    for round_ in rounds:
        assert round_.scores is not None
        numbers, about = (
            charts.confusion_chart(round_.scores.confusion),
            f"confusion matrix of round {round_.index}",
        )
        tabs.append(_tab(round_, page.chart_on(base, numbers, about, wide=True)))
    return render("confusion", rounds=tabs, omitted=omitted)


def _run(facts: RunFacts, data: DataFacts, seconds: float) -> Markup:
    usual = [step for step in STEPS if step not in SELDOM]
    steps = [step for step in SELDOM if any(step in round_.seconds for round_ in facts.rounds)] + usual
    rows = [Row(f"round {round_.index}", _work(round_, steps)) for round_ in facts.rounds]
    rows.append(Row("all", [*[""] * (len(steps) + 2), f"{facts.seconds:,.1f}"], "total"))
    columns = ["seconds", "steps", "labeling ratio", *steps, "all"]
    about = Table([], [Row(name, [text]) for name, text in _facts(facts, data, seconds).items()], "facts")
    return render("run", seconds=Table(columns, rows), about=about, recipe=facts.recipe_text)


def _work(round_: RoundFacts, steps: Sequence[str]) -> list[str]:
    """Cells: steps and labeling ratio of a round, and the seconds that its steps took."""
    seconds = [round_.seconds.get(step) for step in steps]
    return [
        UNDEFINED if round_.steps is None else f"{round_.steps:,}",
        _ratio(round_.labeling_ratio),
        *(UNDEFINED if value is None else f"{value:,.1f}" for value in seconds),
        f"{sum(value or 0 for value in seconds):,.1f}",
    ]


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return UNDEFINED
    return ratio if isinstance(ratio, str) else f"{ratio:g}"


def _facts(facts: RunFacts, data: DataFacts, seconds: float) -> dict[str, str]:
    """What the run was made with: name → text."""
    texts = {
        "folder": facts.name if facts.shared else str(facts.root.resolve()),
        "initial weights": facts.weights or UNDEFINED,
    }
    texts |= who_labels(facts)
    texts |= {name: str(value) for name, value in facts.environment.items()}
    if data.manifest is not None:
        texts |= {f"{role} images": f"{len(samples):,}" for role, samples in data.manifest.roles().items()}
    texts |= {
        f"left out of round {round_.index}": f"{round_.left_out:,} unlabeled, marked as bad"
        for round_ in facts.rounds
        if round_.left_out
    }
    trained = [round_.index for round_ in facts.rounds if round_.steps is not None]
    folder = Path(facts.name) if facts.shared else facts.root
    if trained:
        of_result = facts.result.index if facts.keeps_best and facts.scored else trained[-1]
        texts |= checkpoints(facts, RunDirectory(folder), of_result)
    else:
        texts["checkpoint"] = UNDEFINED
    texts["page"] = f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, in {seconds:.1f} s"
    return texts
