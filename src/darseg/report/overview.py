"""The page of one run: the verdict first, then why, and last what it was made with."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from darseg.data.classes import ClassSet
from darseg.errors import DarsegError
from darseg.report import charts
from darseg.report.facts import DataFacts, RoundFacts, RunFacts, read_data, read_run, remarks
from darseg.report.gallery import Gallery, Picture, draw_gallery
from darseg.report.page import Page, change_of, escape, figure_of, signed, table
from darseg.run.build import labeling_protocol, recipe_of
from darseg.run.directory import RunDirectory

BAR = 0.05  # change of IoU that fills half a bar, where no class changed more


def write_report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write a page about a run folder, finished or at work: one file that needs no network.

    Args:
        out: default: report.html in the run folder.

    Returns:
        where it was written.

    Raises RunError: no run folder, a damaged one, or a file of the user's where the page should go; StorageError.
    """
    began = time.monotonic()
    facts = read_run(run)
    data = read_data(facts)
    pictures = pictures_of(facts, data)
    page = page_of(facts, data, pictures, time.monotonic() - began)
    return page.write(Path(out) if out else RunDirectory(run).report)


def pictures_of(facts: RunFacts, data: DataFacts) -> str:
    """The gallery of a run as HTML; where it cannot be drawn, why."""
    fault, gallery = data.fault, None
    try:
        gallery = draw_gallery(facts, data)
    except DarsegError as error:  # an image gone or damaged by now does not make the figures worthless
        fault = str(error)
    return _gallery(facts, gallery, fault)


def page_of(facts: RunFacts, data: DataFacts, pictures: str, seconds: float) -> Page:
    """The page about a run. pictures: its gallery; seconds: spent on reading and drawing so far."""
    page = Page(facts.name, _about(facts, data))
    page.section("Verdict", _verdict(facts, data), heading=False)
    if facts.scored:
        page.section("Classes", _classes(page, facts))
    if facts.labeled:
        page.section("Class shares", _shares(page, facts, data))
        page.section("Thresholds", _thresholds(page, facts))
        page.section("Confidences", _confidences(page, facts))
    if any(len(one.curve.steps) for one in facts.rounds):
        page.section("Training", _training(page, facts))
    if facts.scored:
        page.section("Confusion", _confusion(page, facts))
    page.section("Gallery", pictures)
    page.section("Run", _run(facts, data, seconds))
    return page


def _swatch(color: tuple[int, int, int]) -> str:
    return '<i class="swatch" style="background:rgb({},{},{})"></i>'.format(*color)


def _class_name(classes: ClassSet, k: int) -> str:
    return f'<span title="{escape(classes.names[k])}">{_swatch(classes.colors[k])}{escape(classes.names[k])}</span>'


def _about(facts: RunFacts, data: DataFacts) -> str:
    done = sum("evaluate" in one.seconds for one in facts.rounds)
    parts = [
        f"{done} of {facts.planned} rounds"
        if not facts.finished
        else f"{facts.planned} round{'s' * (facts.planned > 1)}, finished"
    ]
    if facts.planned > 1:
        parts.insert(0, f"method {facts.method}")
    if data.manifest is not None:
        roles = {role: len(samples) for role, samples in data.manifest.roles().items()}
        parts.append(f"{roles['labeled']:,} labeled + {roles['unlabeled']:,} unlabeled images")
        parts.append(f"scored on {roles['validation']:,}")
    if facts.began is not None:
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(facts.began)))
    return " · ".join(escape(part) for part in parts)


def _verdict(facts: RunFacts, data: DataFacts) -> str:
    listed = "".join(
        f'<li class="{"worse" if one.worse else ""}">{escape(one.text)}</li>' for one in remarks(facts, data)
    )
    listed = f'<ul class="remarks">{listed}</ul>' if listed else ""
    if not facts.scored:
        return f'<p class="said">{escape(_unscored(facts))}</p>{listed}'
    first, last = facts.scored[0], facts.scored[-1]
    best = max(facts.scored, key=_mean)
    cards, before = [], None
    for one in facts.scored:
        delta = "" if before is None else _chip(_mean(one) - before) + " "
        what = "labeled images only" if one.index == 0 else "best" if one is best else ""
        cards.append(
            f'<div class="round{" best" * (one is best and len(facts.scored) > 1)}"><span>round {one.index}</span>'
            f"<b>{_mean(one):.3f}</b>{delta}<span>{what}</span></div>"
        )
        before = _mean(one)
    cards += [
        f'<div class="round"><span>round {index}</span><b>…</b><span>{"at work" if begun else "to come"}</span></div>'
        for index, begun in _missing(facts)
    ]
    overall = ""
    if last is not first:
        overall = f"<small>{_chip(_mean(last) - _mean(first))} since round {first.index}</small>"
    return (
        f'<div class="verdict"><div class="figure"><small>mean IoU after round {last.index}</small>{_mean(last):.3f}'
        f'{overall}</div><div class="rounds">{"".join(cards)}</div></div>'
        f'<p class="said">{_sentence(facts, first, last, best)}</p>{_caution(facts)}{listed}'
    )


def _caution(facts: RunFacts) -> str:
    """Later rounds train on: without a control nobody knows whether the pseudo labels helped."""
    if len(facts.scored) < 2:
        return ""
    steps = sum(one.steps or 0 for one in facts.rounds)
    return (
        f'<p class="hint">Later rounds also trained longer, {steps:,} steps in all. Whether the pseudo labels helped, a '
        f"control tells, as many steps on the labeled images alone: <code>darseg train THIS_RUN/recipe.yaml "
        f'"rounds=[{{steps: {steps}}}]" --out CONTROL</code>, then <code>darseg report THIS_RUN CONTROL</code>.</p>'
    )


def _missing(facts: RunFacts) -> list[tuple[int, bool]]:
    """Rounds without scores, and whether they were begun."""
    scored, begun = {one.index for one in facts.scored}, {one.index for one in facts.rounds}
    done = {one.index for one in facts.rounds if "evaluate" in one.seconds}
    return [(index, index in begun) for index in range(facts.planned) if index not in scored | done]


def _unscored(facts: RunFacts) -> str:
    if any("evaluate" in one.seconds for one in facts.rounds):
        return (
            "Nothing was scored: there are no labeled validation pixels. Set data.validation in the recipe."
        )
    return "No round has been scored yet."


def _mean(one: RoundFacts) -> float:
    assert one.scores is not None
    return one.scores.mean_iou


def _chip(change: float) -> str:
    text = signed(change)
    direction = {"+": "up", "−": "down"}.get(text[0], "even")
    return f'<span class="chip {direction}">{text}</span>'


def _sentence(facts: RunFacts, first: RoundFacts, last: RoundFacts, best: RoundFacts) -> str:
    """The verdict in words: how the rounds went, what gained and lost most, and the worst class."""
    assert first.scores is not None and last.scores is not None
    names, said = facts.classes.names, []
    iou, change = last.scores.iou, last.scores.iou - first.scores.iou
    if last is not first:
        moved = _mean(last) - _mean(first)
        went = "rose" if moved > 0 else "fell"
        said.append(
            f"Mean IoU {went} from {_mean(first):.3f} to <b>{_mean(last):.3f}</b>."
            if moved
            else f"Mean IoU stayed at <b>{_mean(last):.3f}</b>."
        )
        if best is not last:
            said.append(f"Round {best.index} was better ({_mean(best):.3f}).")
        known = np.flatnonzero(~np.isnan(change))
        if len(known):
            top, bottom = known[change[known].argmax()], known[change[known].argmin()]
            if change[top] > 0:
                said.append(f"Most gained: {escape(names[top])} ({signed(change[top])}).")
            if change[bottom] < 0:
                said.append(f"Most lost: {escape(names[bottom])} ({signed(change[bottom])}).")
    lowest = np.nanmin(iou)
    worst = [escape(names[k]) for k in np.flatnonzero(iou == lowest)]
    word = "Worst class" if len(worst) == 1 else "Worst classes"
    said.append(f"{word}: <b>{', '.join(worst)}</b> (IoU {lowest:.3f}).")
    labeled = [one for one in facts.labeled if one.pseudo is not None and one.pseudo.confusion.any()]
    if labeled:
        assert labeled[-1].pseudo is not None
        said.append(
            f"Of the pseudo labels of round {labeled[-1].index}, {labeled[-1].pseudo.pixel_accuracy:.0%} are right."
        )
    return " ".join(said)


def _classes(page: Page, facts: RunFacts) -> str:
    rounds, classes = facts.scored, facts.classes
    ious = np.array([one.scores.iou for one in rounds if one.scores is not None])
    change = ious[-1] - ious[0]
    worst = ious[-1] == np.nanmin(ious[-1])
    several = len(rounds) > 1
    most = max(BAR, float(np.nanmax(abs(change), initial=0)))
    head = ["IoU", *(f"round {one.index}" for one in rounds)]
    head += (
        [f"change since round {rounds[0].index}", "precision", "recall"]
        if several
        else ["precision", "recall"]
    )
    last = rounds[-1].scores
    assert last is not None
    rows = []
    for k in range(len(classes)):
        cells = [_class_name(classes, k), *(figure_of(row[k]) for row in ious)]
        if several:
            cells.append(change_of(change[k]) + _bar(change[k] / most))
        cells += [figure_of(last.precision[k]), figure_of(last.recall[k])]
        rows.append(("worst" if worst[k] else "", cells))
    means = [_mean(one) for one in rounds]
    cells = ["mean", *(figure_of(value) for value in means)]
    if several:
        cells.append(change_of(means[-1] - means[0]) + _bar((means[-1] - means[0]) / most))
    cells += ["", figure_of(last.mean_accuracy)]
    rows.append(("total", cells))
    protocol = rounds[-1].protocol
    hint = "IoU, precision and recall on the validation images" + (
        f", predicted at {protocol}" if protocol else ""
    )
    return (
        f'<p class="hint">{escape(hint)}. Red: the lowest. Undefined (–): neither in the truth nor predicted.</p>'
        + table(head, rows)
        + "<h3>IoU by round</h3>"
        + page.chart(charts.iou_chart(classes.names, rounds), "IoU of every class by round")
    )


def _bar(change: float) -> str:
    """A small bar to the right for what rose, to the left for what fell; from -1 to 1."""
    if change != change:
        return '<span class="bar"></span>'
    width = abs(change) * 50
    side = f"left:50%;width:{width:.1f}%" if change >= 0 else f"right:50%;width:{width:.1f}%"
    return f'<span class="bar {"up" if change >= 0 else "down"}"><i style="{side}"></i></span>'


def _per_round(page: Page, rounds: tuple[RoundFacts, ...], bodies: list[str]) -> str:
    return page.tabs([f"Round {one.index}" for one in rounds], bodies)


def _shares(page: Page, facts: RunFacts, data: DataFacts) -> str:
    names, bodies = facts.classes.names, []
    aligned = facts.method == "dars"
    for one in facts.labeled:
        assert one.labels is not None
        columns = {
            "labeled images": data.counts,
            "raw predictions": one.labels.thresholds.predicted,
            "pseudo labels kept": one.labels.kept,
            "truth of the unlabeled": one.truth,
        }
        known = {
            title: counts / max(1, counts.sum()) for title, counts in columns.items() if counts is not None
        }
        rows = [
            ("", [_class_name(facts.classes, k), *(f"{share[k]:.3%}" for share in known.values())])
            for k in range(len(names))
        ]
        figure = charts.shares_chart(names, data.counts, one.labels, one.truth, aligned)
        bodies.append(
            page.chart(figure, f"class shares of round {one.index}")
            + "<details><summary>The same as a table</summary>"
            + table(["share of pixels", *known], rows)
            + "</details>"
        )
    aim = (
        "which the pseudo labels should match" if aligned else f"which method {facts.method} does not aim at"
    )
    hint = (
        f"What each class has of all pixels: in the labeled images, {aim}; in the raw predictions, which lean to "
        "frequent classes; and in what was kept of them. Logarithmic."
    )
    if data.counts is None:
        hint += " The labeled images could not be read any more, so their shares are missing."
    return f'<p class="hint">{hint}</p>' + _per_round(page, facts.labeled, bodies)


def _thresholds(page: Page, facts: RunFacts) -> str:
    bodies = []
    for one in facts.labeled:
        assert one.labels is not None
        chosen, kept = one.labels.thresholds, one.labels.kept
        right = None if one.pseudo is None else one.pseudo.precision
        head = ["class", "threshold", "keep share", "wanted", "predicted", "above", "kept", "of predicted"]
        rows = []
        for k in range(len(facts.classes)):
            threshold = chosen.threshold[k]
            never = bool(np.isnan(threshold))
            cells = [
                _class_name(facts.classes, k),
                "never predicted" if never else f"{threshold:.5g}",
                "–" if never else f"{chosen.keep[k]:.4f}",
                *(
                    f"{int(counts[k]):,}"
                    for counts in (chosen.wanted, chosen.predicted, chosen.accepted, kept)
                ),
                "–" if not chosen.predicted[k] else f"{kept[k] / chosen.predicted[k]:.1%}",
            ]
            if right is not None:
                cells.append(figure_of(right[k]))
            rows.append(("worst" if never else "", cells))
        totals = [int(counts.sum()) for counts in (chosen.wanted, chosen.predicted, chosen.accepted, kept)]
        cells = ["all", "", "", *(f"{total:,}" for total in totals), f"{totals[3] / max(1, totals[1]):.1%}"]
        if right is not None and one.pseudo is not None:
            head.append("right")
            cells.append(figure_of(one.pseudo.pixel_accuracy))
        rows.append(("total", cells))
        bodies.append(table(head, rows))
    hint = (
        "Pixels predicted as a class at or above its threshold are accepted, of these the keep share becomes pseudo "
        "labels; the rest is not labeled."
    )
    if any(one.pseudo is not None for one in facts.labeled):
        hint += " Right: share of the kept pixels that agree with the truth of the unlabeled images, which is not used."
    return f'<p class="hint">{hint}</p>' + _per_round(page, facts.labeled, bodies)


def _confidences(page: Page, facts: RunFacts) -> str:
    classes, bodies = facts.classes, []
    for one in facts.labeled:
        assert one.labels is not None
        chosen, cells = one.labels.thresholds, []
        for k, name in enumerate(classes.names):
            title = f'<h3>{_swatch(classes.colors[k])}<span title="{escape(name)}">{escape(name)}</span></h3>'
            if not chosen.predicted[k]:
                cells.append(f'<div>{title}<p>&nbsp;</p><div class="never">never predicted</div></div>')
                continue
            share = one.labels.kept[k] / chosen.predicted[k]
            figure = charts.confidence_chart(one.labels, k, classes.colors[k])
            cells.append(
                f"<div>{title}<p>from {chosen.threshold[k]:.4g} on · {share:.0%} kept</p>"
                + page.chart(figure, f"confidences of {name} in round {one.index}")
                + "</div>"
            )
        bodies.append(f'<div class="small">{"".join(cells)}</div>')
    hint = (
        "Pixels by the confidence of their class; both axes logarithmic, confidences by their odds. Gray: below the "
        "threshold (red line), not labeled."
    )
    return f'<p class="hint">{hint}</p>' + _per_round(page, facts.labeled, bodies)


def _training(page: Page, facts: RunFacts) -> str:
    return (
        '<div class="two"><div><h3>Loss</h3>'
        + page.chart(charts.loss_chart(facts.rounds), "loss by step")
        + "</div><div><h3>Learning rate</h3>"
        + page.chart(charts.rate_chart(facts.rounds), "learning rate by step")
        + "</div></div>"
    )


def _confusion(page: Page, facts: RunFacts) -> str:
    bodies = []
    for one in facts.scored:
        assert one.scores is not None
        figure = charts.confusion_chart(facts.classes.names, one.scores.confusion)
        bodies.append(page.chart(figure, f"confusion matrix of round {one.index}", wide=True))
    hint = "Rows: the truth; columns: what was predicted; each row adds up to 100 %. Validation images."
    return f'<p class="hint">{hint}</p>' + _per_round(page, facts.scored, bodies)


def _gallery(facts: RunFacts, gallery: Gallery | None, fault: str | None) -> str:
    if gallery is None or not gallery.pictures:
        if fault:
            return f'<p class="hint">The gallery could not be drawn:</p><pre>{escape(fault)}</pre>'
        return '<p class="hint">No round has labeled images yet.</p>'
    swatches = "".join(
        f'<span><span class="name">{_class_name(facts.classes, k)}</span></span>'
        for k in range(len(facts.classes))
    )
    protocol = labeling_protocol(recipe_of(facts.root)).describe("logits")
    hint = (
        f"Unlabeled images of round {gallery.round}: what the network of round {gallery.round - 1} predicted "
        f"({protocol}), and what was kept of it. " + " ".join(gallery.notes)
    )
    return (
        f'<p class="hint">{escape(hint)}</p><div class="legend">{swatches}'
        '<span><i class="swatch checks"></i>not labeled (255)</span></div>'
        + "".join(_picture(one) for one in gallery.pictures)
    )


def _picture(one: Picture) -> str:
    why = "".join(f'<span class="chip">{escape(reason)}</span>' for reason in one.reasons)
    if one.confidence is not None:
        why += f"<span>mean confidence {one.confidence:.3f}</span>"
    prediction, label = (("" if right is None else f", {right:.0%} right") for right in one.right)
    figures = [
        ("", one.image, "image"),
        ("map", one.prediction, f"raw prediction{prediction}"),
        ("map", one.label, f"pseudo label, {one.share:.0%} labeled{label}"),
        ("map", one.truth, "truth, not used"),
    ]
    shown = [
        f'<figure><img class="{kind}" src="{url}" alt="{escape(f"{one.id}: {what}")}">'
        f"<figcaption>{what}</figcaption></figure>"
        for kind, url, what in figures
        if url is not None
    ]
    few = " three" if len(shown) == 3 else ""
    return (
        f'<div class="picture"><h3>{escape(one.id)}</h3><div class="why">{why}</div>'
        f'<div class="maps{few}">{"".join(shown)}</div></div>'
    )


def _run(facts: RunFacts, data: DataFacts, seconds: float) -> str:
    rows = []
    for one in facts.rounds:
        times = [one.seconds.get(step) for step in ("label", "train", "evaluate")]
        cells = [f"round {one.index}", "–" if one.steps is None else f"{one.steps:,}"]
        cells.append("–" if one.labeling_ratio is None else f"{one.labeling_ratio:g}")
        cells += ["–" if value is None else f"{value:,.1f}" for value in times]
        rows.append(("", [*cells, f"{sum(value or 0 for value in times):,.1f}"]))
    rows.append(("total", ["all", "", "", "", "", "", f"{facts.seconds:,.1f}"]))
    head = ["seconds", "steps", "labeling ratio", "label", "train", "evaluate", "all"]
    told = {"folder": str(facts.root.resolve()), "initial weights": facts.weights or "–"}
    told |= {name: str(value) for name, value in facts.environment.items()}
    if data.manifest is not None:
        told |= {f"{role} images": f"{len(samples):,}" for role, samples in data.manifest.roles().items()}
    told |= {
        f"left out of round {one.index}": f"{one.left_out:,} unlabeled, marked as bad"
        for one in facts.rounds
        if one.left_out
    }
    trained = [one.index for one in facts.rounds if one.steps is not None]
    told["checkpoint"] = str(RunDirectory(facts.root).network(trained[-1])) if trained else "–"
    told["page"] = f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, in {seconds:.1f} s"
    about = table([], [("", [escape(name), escape(value)]) for name, value in told.items()], "facts")
    return (
        table(head, rows)
        + "<h3>Environment and data</h3>"
        + about
        + f"<details><summary>The recipe</summary><pre>{escape(facts.recipe_text)}</pre></details>"
    )
