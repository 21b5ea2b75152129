"""The charts of a report, drawn by plotly. Colors of text, grid and paper come from the page, which has two themes."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16, ConfidenceScale
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.report.facts import LOSSES, RoundFacts

# Of middling lightness, so that they stand out from white and from near-black.
TRUTH, PREDICTED, KEPT, NEUTRAL = "#8b95a5", "#e08a1e", "#3b82f6", "#94a3b8"
SERIES = ("#3b82f6", "#e08a1e", "#10a37f", "#d4537e", "#8b5cf6", "#64a30d", "#06a5c4", "#c2703d")

LONGEST_NAME = 22  # characters of a name on an axis; all of it is in the hover text
ROW = 24  # pixels of a class in charts that have a row for each
POINTS = 1000  # of a curve; more are averaged

BINS = 60
DETAIL = {"float16": 0.998, "fine": 0.999999}  # confidences above are not binned by log-odds
TICKS = (0.1, 0.5, 0.9, 0.99)


def text_of(name: str) -> str:
    """A name as plotly shows it literally: it reads a few tags in texts."""
    return html.escape(name, quote=False)


def short(name: str) -> str:
    return text_of(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")


def _figure(height: int, **layout: Any) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        font={"size": 12},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        hoverlabel={"namelength": -1},
        **layout,
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _class_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """A row for each class, the first at the top."""
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[short(name) for name in names],
        range=[len(names) - 0.5, -0.5],
        zeroline=False,
    )


def _rows_height(count: int) -> int:
    return 90 + ROW * count


def shares_chart(
    names: Sequence[str],
    labeled: NDArray | None,
    labels: PseudoLabelSet,
    truth: NDArray | None,
    aligned: bool,
) -> go.Figure:
    """Class shares of one round on a logarithmic axis: labeled masks, raw predictions, what was kept; the truth of the
    unlabeled images where known. Shares of 0 stand at the left edge.

    aligned: whether the method aims at the shares of the labeled masks.
    """
    series = [
        ("labeled images" + " (the aim)" * aligned, labeled, TRUTH, "diamond"),
        ("raw predictions", labels.thresholds.predicted, PREDICTED, "circle-open"),
        ("pseudo labels kept", labels.kept, KEPT, "circle"),
        ("truth of the unlabeled", truth, "#10a37f", "line-ns-open"),
    ]
    shares = [
        (title, counts / max(1, counts.sum()), color, symbol)
        for title, counts, color, symbol in series
        if counts is not None
    ]
    positive = np.concatenate([values[values > 0] for _, values, _, _ in shares])
    low = 10.0 ** np.floor(np.log10(positive.min()))
    edge = low / 2  # where none is
    figure = _figure(_rows_height(len(names)))
    for k in range(len(names)):  # a line from raw to kept: which way labeling moved the class
        raw, kept = (max(shares[at - len(shares)][1][k], edge) for at in _raw_and_kept(shares))
        figure.add_shape(
            type="line", x0=raw, x1=kept, y0=k, y1=k, line={"color": NEUTRAL, "width": 2}, layer="below"
        )
    for title, values, color, symbol in shares:
        figure.add_scatter(
            x=np.maximum(values, edge).tolist(),
            y=list(range(len(names))),
            name=title,
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            text=[f"{text_of(name)}: {value:.4%}" for name, value in zip(names, values, strict=True)],
            hovertemplate="%{text}<extra>" + title + "</extra>",
        )
    _class_rows(figure, names)
    powers = list(range(int(np.log10(low)), 1))
    figure.update_xaxes(
        type="log",
        range=[float(np.log10(edge)) - 0.1, 0.05],
        tickvals=[edge, *(10.0**power for power in powers)],
        ticktext=["0", *(f"{10.0 ** (power + 2):g} %" for power in powers)],
    )
    return figure


def _raw_and_kept(shares: Sequence[tuple]) -> tuple[int, int]:
    titles = [title for title, *_ in shares]
    return titles.index("raw predictions"), titles.index("pseudo labels kept")


def iou_chart(names: Sequence[str], rounds: Sequence[RoundFacts]) -> go.Figure:
    """IoU of every class, a dot for each round; undefined ones are left out."""
    values = np.array([one.scores.iou for one in rounds if one.scores is not None])
    figure = _figure(_rows_height(len(names)))
    for k in range(len(names)):
        row = values[:, k][~np.isnan(values[:, k])]
        if len(row):
            figure.add_shape(
                type="line",
                x0=row.min(),
                x1=row.max(),
                y0=k,
                y1=k,
                line={"color": NEUTRAL, "width": 2},
                layer="below",
            )
    for one, row, color in zip(rounds, values, ramp(len(rounds)), strict=True):
        figure.add_scatter(
            x=[None if np.isnan(value) else float(value) for value in row],
            y=list(range(len(names))),
            name=f"round {one.index}",
            mode="markers",
            marker={"color": color, "size": 11},
            text=[text_of(name) for name in names],
            hovertemplate="%{text}: %{x:.4f}<extra>round " + str(one.index) + "</extra>",
        )
    _class_rows(figure, names)
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False, dtick=0.2)
    return figure


def ramp(count: int) -> list[str]:
    """Colors from gray to blue, the last round the bluest."""
    start, end = np.array([170, 178, 190]), np.array([37, 99, 235])
    parts = np.linspace(0, 1, count) if count > 1 else [1.0]
    return ["rgb({}, {}, {})".format(*(start + (end - start) * part).round().astype(int)) for part in parts]


def loss_chart(rounds: Sequence[RoundFacts]) -> go.Figure:
    """Losses of all steps that the journal noted, rounds one after the other."""
    titles = dict(zip(LOSSES, ("labeled", "pseudo-labeled"), strict=True))
    figure = _curves(rounds, titles, dict(zip(LOSSES, (PREDICTED, KEPT), strict=True)))
    figure.update_yaxes(rangemode="tozero")
    return figure


def rate_chart(rounds: Sequence[RoundFacts]) -> go.Figure:
    """The learning rate at the noted steps."""
    figure = _curves(rounds, {"learning_rate": "learning rate"}, {"learning_rate": "#10a37f"})
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero", exponentformat="power")
    return figure


def _curves(rounds: Sequence[RoundFacts], titles: Mapping[str, str], colors: Mapping[str, str]) -> go.Figure:
    figure = _figure(300, hovermode="x unified")
    begin, shown = 0, set()
    for one in rounds:
        for name, title in titles.items():
            if name not in one.curve.figures:
                continue
            steps, values = thin(one.curve.steps, one.curve.figures[name])
            figure.add_scatter(
                x=(steps + begin).tolist(),
                y=[None if np.isnan(value) else float(value) for value in values],
                name=title,
                legendgroup=name,
                showlegend=name not in shown,
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={"color": colors[name], "width": 2},
                hovertemplate="%{y:.4g}",
            )
            shown.add(name)
        label = {"text": f"round {one.index}", "font": {"size": 11}}
        figure.add_annotation(
            x=begin, y=1, yref="paper", xanchor="left", yanchor="top", showarrow=False, xshift=3, **label
        )
        if begin:
            figure.add_vline(x=begin, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
        begin += one.steps or int(one.curve.steps.max(initial=-1)) + 1
    figure.update_xaxes(title="step", zeroline=False)
    return figure


def thin(steps: NDArray, values: NDArray, points: int = POINTS) -> tuple[NDArray, NDArray]:
    """A curve of at most so many points, each the mean of neighbors."""
    if len(steps) <= points:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), points)
    known = [values[group][~np.isnan(values[group])] for group in groups]
    means = np.array([one.mean() if len(one) else np.nan for one in known])
    return np.array([steps[group].mean() for group in groups]), means


def confusion_chart(names: Sequence[str], confusion: NDArray) -> go.Figure:
    """Rows: truth, columns: prediction; a cell's color and number are its share of the row."""
    total = confusion.sum(1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    count = len(names)
    known = (total > 0)[:, 0]
    figure = _figure(150 + max(ROW, 18) * count)
    few = count <= 30  # numbers would not fit
    figure.add_heatmap(
        z=[row.tolist() if there else [None] * count for row, there in zip(share, known, strict=True)],
        zmin=0,
        zmax=1,
        colorscale=[[0, "rgba(59,130,246,0.04)"], [1, "rgba(59,130,246,1)"]],
        showscale=False,
        xgap=1,
        ygap=1,
        text=[[f"{value:.0%}" if value >= 0.005 else "" for value in row] for row in share] if few else None,
        texttemplate="%{text}" if few else None,
        textfont={"size": 10},
        customdata=[
            [[text_of(names[i]), text_of(names[j]), int(confusion[i, j])] for j in range(count)]
            for i in range(count)
        ],
        hovertemplate="%{customdata[0]} predicted as %{customdata[1]}: %{z:.2%}, %{customdata[2]:,} px<extra></extra>",
    )
    _class_rows(figure, names)
    figure.update_xaxes(
        tickvals=list(range(count)),
        ticktext=[short(name) for name in names],
        side="top",
        tickangle=-45,
        zeroline=False,
        showgrid=False,
        range=[-0.5, count - 0.5],
    )
    figure.update_yaxes(showgrid=False)
    return figure


def places(scale: ConfidenceScale, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the codes of a scale are drawn, and the edges of the bins.

    Confidences are placed by their log-odds, which spreads what is near 1, from 1/K on; those above DETAIL share the
    space of five bins, in the order of their codes: for float16 each of the last five numbers has a bin of its own.

    Returns:
        float64 [codes], rising; float64 [BINS + 6].
    """
    confidence = scale.confidence(np.arange(scale.codes))
    with np.errstate(divide="ignore"):
        odds = np.log(confidence) - np.log1p(-confidence)
    low = float(-np.log(max(classes, 2) - 1.0))
    high = float(np.log(DETAIL[scale.name] / (1 - DETAIL[scale.name])))
    width = (high - low) / BINS
    beyond = int(np.searchsorted(odds, high))
    place = np.clip(odds, low, high)
    place[beyond:] = high + 5 * width * np.arange(scale.codes - beyond) / (scale.codes - beyond)
    return place, low + width * np.arange(BINS + 6, dtype=np.float64)


def bin_confidences(
    counts: NDArray[np.int64], accept: int, scale: ConfidenceScale, classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], float | None]:
    """One class's counts [codes] in bins of which the threshold is an edge.

    Returns:
        edges [B + 1], counts [B], and where the threshold is; None where nothing is accepted.
    """
    place, edges = places(scale, classes)
    threshold = float(place[accept]) if accept < scale.codes else None
    if threshold is not None:
        edges = np.sort(np.append(edges[abs(edges - threshold) > 1e-6], threshold))
    which = np.clip(np.searchsorted(edges, place + 1e-9, "right") - 1, 0, len(edges) - 2)
    return edges, np.bincount(which, counts, len(edges) - 1).astype(np.int64), threshold


def confidence_chart(labels: PseudoLabelSet, k: int, color: tuple[int, int, int]) -> go.Figure:
    """Confidences of the pixels predicted as class k, counts on a logarithmic axis; those below the threshold in gray."""
    scale, count = labels.histogram.scale, len(labels.histogram.counts)
    accept = int(labels.thresholds.accept[k])
    edges, counts, threshold = bin_confidences(labels.histogram.counts[k], accept, scale, count)
    above = edges[:-1] >= (np.inf if threshold is None else threshold)
    figure = _figure(150, bargap=0, showlegend=False)
    place, _ = places(scale, count)
    confidence = scale.confidence(np.arange(scale.codes))
    ends = confidence[np.clip(np.searchsorted(place, edges - 1e-9), 0, scale.codes - 1)]
    figure.add_bar(
        x=((edges[:-1] + edges[1:]) / 2).tolist(),
        y=[int(value) or None for value in counts],
        width=np.diff(edges).tolist(),
        marker={
            "color": [f"rgb{tuple(color)}" if one else "rgba(148,163,184,0.55)" for one in above],
            "line": {"width": 0.5, "color": NEUTRAL},
        },
        customdata=[f"{begin:.4g} – {end:.4g}" for begin, end in itertools.pairwise(ends)],
        hovertemplate="confidence %{customdata}: %{y:,} pixels<extra></extra>",
    )
    if threshold is not None:
        figure.add_vline(x=threshold, line={"color": "#e5484d", "width": 2})
    # The same axes for all classes of a round, so that they can be compared.
    most = labels.histogram.counts.sum(axis=1).max()
    figure.update_yaxes(
        type="log", range=[-0.3, float(np.log10(max(most, 10)))], exponentformat="SI", nticks=4
    )
    wanted = [*TICKS, *(() if scale is FLOAT16 else (0.9999,))]
    shown = [(float(np.log(p / (1 - p))), f"{p:g}") for p in wanted if np.log(p / (1 - p)) >= edges[0]]
    shown.append((float(edges[-1]), "1"))
    figure.update_xaxes(
        range=[float(edges[0]), float(edges[-1])],
        tickvals=[at for at, _ in shown],
        ticktext=[said for _, said in shown],
        zeroline=False,
        showgrid=False,
        tickangle=0,
    )
    figure.update_layout(margin={"l": 4, "r": 8, "t": 4, "b": 4}, font={"size": 10})
    return figure


def compared_chart(groups: Sequence[tuple[str, NDArray]]) -> go.Figure:
    """Mean IoU of groups of runs: a bar with its deviation, and each run as a dot. groups: name, float64 [runs]."""
    figure = _figure(100 + 46 * len(groups), showlegend=False, bargap=0.35)
    rows = list(range(len(groups)))
    deviations = [float(np.std(values, ddof=1)) if len(values) > 1 else 0 for _, values in groups]
    figure.add_bar(
        x=[float(values.mean()) for _, values in groups],
        y=rows,
        orientation="h",
        marker={"color": [SERIES[at % len(SERIES)] for at in rows], "opacity": 0.75},
        error_x={"type": "data", "array": deviations, "color": NEUTRAL, "thickness": 2},
        hovertemplate="mean %{x:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=[float(value) for _, values in groups for value in values],
        y=[at for at, (_, values) in enumerate(groups) for _ in values],
        mode="markers",
        marker={"color": NEUTRAL, "size": 8, "line": {"width": 1, "color": "#475569"}},
        hovertemplate="%{x:.4f}<extra>a run</extra>",
    )
    _class_rows(figure, [name for name, _ in groups])
    figure.update_xaxes(rangemode="tozero", zeroline=False, title="mean IoU")
    return figure


def compared_classes_chart(names: Sequence[str], groups: Sequence[tuple[str, NDArray]]) -> go.Figure:
    """IoU of every class, a dot with its deviation for each group. groups: name, float64 [runs, K]."""
    figure = _figure(_rows_height(len(names)) + 8 * len(names) * max(1, len(groups) - 1))
    for at, (group, values) in enumerate(groups):
        offset = (
            0.0 if len(groups) == 1 else 0.56 * (at / (len(groups) - 1) - 0.5) * min(1.0, len(groups) / 4)
        )
        known = [column[~np.isnan(column)] for column in values.T]
        figure.add_scatter(
            x=[float(one.mean()) if len(one) else None for one in known],
            y=[k + offset for k in range(len(names))],
            error_x={
                "type": "data",
                "array": [float(np.std(one, ddof=1)) if len(one) > 1 else 0 for one in known],
                "thickness": 1.5,
            },
            name=short(group),
            mode="markers",
            marker={"color": SERIES[at % len(SERIES)], "size": 9},
            text=[f"{text_of(name)}, {text_of(group)}" for name in names],
            hovertemplate="%{text}: %{x:.4f}<extra></extra>",
        )
    _class_rows(figure, names)
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False, dtick=0.2, title="IoU")
    return figure
