"""The charts of a report. The page's theme colors text, grid and paper.

Most are plotly figures. Of those that a page holds many of, in every round one for each class or pair of classes, there
are only the numbers here, and `page.js` makes figures of them when they come into view.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from darseg.data.prediction import FLOAT16, ConfidenceScale
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.report.facts import RoundFacts

# Neither light nor dark, so that they stand out from white and from near-black.
TRUTH, PREDICTED, KEPT, NEUTRAL = "#8b95a5", "#e08a1e", "#3b82f6", "#94a3b8"
SERIES = ("#3b82f6", "#e08a1e", "#10a37f", "#d4537e", "#8b5cf6", "#64a30d", "#06a5c4", "#c2703d")

LONGEST_NAME = 22  # characters of a name on an axis; the hover text has all of them
ROW = 24  # pixels per class in charts with a row for each class

BINS = 60  # of confidences up to DETAIL
CONFIDENCE_HEIGHT = 150  # pixels of the chart of a class
DETAIL_BINS = 5  # of confidences above DETAIL
DETAIL = {"float16": 0.998, "fine": 0.999999}  # scale → above it, codes are spaced evenly, not by log-odds
TICKS = (0.1, 0.5, 0.9, 0.99)


def text_of(name: str) -> str:
    """Escape a name, because plotly interprets some HTML tags in texts."""
    return html.escape(name, quote=False)


def short(name: str) -> str:
    """An escaped name, cut to fit on an axis."""
    return text_of(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")


def figure_of(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the manner of all."""
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


def class_rows(figure: go.Figure, names: Sequence[str]) -> None:
    """Give each class a row, the first at the top."""
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[short(name) for name in names],
        range=[len(names) - 0.5, -0.5],
        zeroline=False,
    )


def rows_height(count: int) -> int:
    """Pixels of a chart with so many rows."""
    return 90 + ROW * count


def shares_chart(
    names: Sequence[str],
    labeled: NDArray | None,
    labels: PseudoLabelSet,
    *,
    truth: NDArray | None,
    aligned: bool,
) -> go.Figure:
    """Class shares of one round on a logarithmic axis. Shares of 0 are at the left edge.

    Args:
        names: of the classes.
        labeled: int64 [K], pixels in the labeled masks, if they are known.
        labels: raw predictions and what was kept of them.
        truth: int64 [K], pixels in the truth of the unlabeled images, if it is known.
        aligned: whether the method aims at the shares of the labeled masks.
    """
    raw, kept = _shares(labels.thresholds.predicted), _shares(labels.kept)
    series = [
        ("labeled images" + " (the aim)" * aligned, _shares(labeled), TRUTH, "diamond"),
        ("raw predictions", raw, PREDICTED, "circle-open"),
        ("pseudo labels kept", kept, KEPT, "circle"),
        ("truth of the unlabeled", _shares(truth), "#10a37f", "line-ns-open"),
    ]
    positive = np.concatenate([shares[shares > 0] for _, shares, _, _ in series if shares is not None])
    low = 10.0 ** np.floor(np.log10(positive.min()))
    edge = low / 2  # where shares of 0 are drawn
    figure = figure_of(rows_height(len(names)))
    assert raw is not None and kept is not None
    # A line from raw to kept: in which direction labeling moved the class.
    _row_lines(figure, np.maximum(raw, edge), np.maximum(kept, edge))
    for title, shares, color, symbol in series:
        if shares is None:
            continue
        figure.add_scatter(
            x=np.maximum(shares, edge).tolist(),
            y=list(range(len(names))),
            name=title,
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            text=[f"{text_of(name)}: {share:.4%}" for name, share in zip(names, shares, strict=True)],
            hovertemplate="%{text}<extra>" + title + "</extra>",
        )
    class_rows(figure, names)
    powers = list(range(int(np.log10(low)), 1))
    figure.update_xaxes(
        type="log",
        range=[float(np.log10(edge)) - 0.1, 0.05],
        tickvals=[edge, *(10.0**power for power in powers)],
        ticktext=["0", *(f"{10.0 ** (power + 2):g} %" for power in powers)],
    )
    return figure


def _shares(counts: NDArray | None) -> NDArray[np.float64] | None:
    return None if counts is None else counts / max(1, counts.sum())


def _row_lines(figure: go.Figure, starts: NDArray[np.float64], ends: NDArray[np.float64]) -> None:
    """Draw a line in each row, behind its dots; none where an end is NaN."""
    known = [k for k in range(len(starts)) if not np.isnan(starts[k] + ends[k])]
    figure.add_scatter(
        x=[value for k in known for value in (float(starts[k]), float(ends[k]), None)],
        y=[value for k in known for value in (k, k, None)],
        mode="lines",
        line={"color": NEUTRAL, "width": 2},
        hoverinfo="skip",
        showlegend=False,
    )


def iou_chart(names: Sequence[str], rounds: Sequence[RoundFacts]) -> go.Figure:
    """IoU of every class, with a dot for each scored round; undefined values are left out."""
    values = np.array([round_.iou for round_ in rounds])
    figure = figure_of(rows_height(len(names)))
    _row_lines(figure, np.fmin.reduce(values), np.fmax.reduce(values))
    for round_, row, color in zip(rounds, values, ramp(len(rounds)), strict=True):
        figure.add_scatter(
            x=[None if np.isnan(value) else float(value) for value in row],
            y=list(range(len(names))),
            name=f"round {round_.index}",
            mode="markers",
            marker={"color": color, "size": 11},
            text=[text_of(name) for name in names],
            hovertemplate="%{text}: %{x:.4f}<extra>round " + str(round_.index) + "</extra>",
        )
    class_rows(figure, names)
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False, dtick=0.2)
    return figure


def ramp(count: int) -> list[str]:
    """Colors from gray to blue; the last round is the bluest."""
    start, end = np.array([170, 178, 190]), np.array([37, 99, 235])
    parts = np.linspace(0, 1, count) if count > 1 else [1.0]
    return ["rgb({}, {}, {})".format(*(start + (end - start) * part).round().astype(int)) for part in parts]


def confusion_base(names: Sequence[str]) -> dict[str, Any]:
    """What the confusion matrices of all rounds share: names, and the layout of the figure."""
    count = len(names)
    figure = figure_of(150 + max(ROW, 18) * count)
    class_rows(figure, names)
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
    return {"names": [text_of(name) for name in names], "layout": _layout(figure)}


def _layout(figure: go.Figure) -> dict[str, Any]:
    return figure.to_plotly_json()["layout"]


def confusion_chart(confusion: NDArray) -> dict[str, Any]:
    """A confusion matrix, drawn by the page. Rows: truth; columns: prediction."""
    return {"kind": "confusion", "counts": confusion.tolist()}


@functools.lru_cache(maxsize=8)
def places(scale: ConfidenceScale, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the codes of a confidence scale are drawn, and the edges of the bins.

    Confidences from 1/K to DETAIL are placed by their log-odds, which spreads those near 1. The codes above share the
    space of DETAIL_BINS bins evenly: for float16, each of the last five numbers has a bin of its own.

    Returns:
        float64 [codes], rising, and float64 [BINS + DETAIL_BINS + 1].
    """
    confidence = scale.confidence(np.arange(scale.codes))
    with np.errstate(divide="ignore"):
        odds = np.log(confidence) - np.log1p(-confidence)
    low = float(-np.log(max(classes, 2) - 1.0))
    high = float(np.log(DETAIL[scale.name] / (1 - DETAIL[scale.name])))
    width = (high - low) / BINS
    first = int(np.searchsorted(odds, high))  # code in the detailed part
    place = np.clip(odds, low, high)
    place[first:] = high + DETAIL_BINS * width * np.arange(scale.codes - first) / (scale.codes - first)
    return place, low + width * np.arange(BINS + DETAIL_BINS + 1, dtype=np.float64)


def bin_confidences(
    counts: NDArray[np.int64], accept: int, scale: ConfidenceScale, *, classes: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], float | None]:
    """Bin the counts of one class so that the threshold is an edge of a bin.

    Args:
        counts: int64 [codes], pixels by confidence.
        accept: the lowest accepted code; scale.codes if none is accepted.
        scale: of the codes.
        classes: K.

    Returns:
        Edges [B + 1], counts [B], and the place of the threshold; None if nothing is accepted.
    """
    place, edges = places(scale, classes)
    threshold = float(place[accept]) if accept < scale.codes else None
    if threshold is not None:
        edges = np.sort(np.append(edges[abs(edges - threshold) > 1e-6], threshold))
    first = np.searchsorted(place, edges - 1e-9)  # code of each bin
    first[0], first[-1] = 0, len(counts)  # the outer bins hold what lies beyond them, too
    return edges, np.diff(np.concatenate([[0], np.cumsum(counts)])[first]), threshold


def confidence_base(labels: PseudoLabelSet) -> dict[str, Any]:
    """What the charts of all classes of a round share: edges of the bins, their texts, and the layout."""
    scale, classes = labels.histogram.scale, len(labels.histogram.counts)
    _, edges = places(scale, classes)
    figure = figure_of(CONFIDENCE_HEIGHT, bargap=0, showlegend=False)
    _confidence_axes(figure, labels, edges)
    figure.update_layout(margin={"l": 4, "r": 8, "t": 4, "b": 4}, font={"size": 10})
    ends = [_end(scale, edge, classes=classes) for edge in edges]
    return {"edges": edges.tolist(), "ends": ends, "layout": _layout(figure)}


def _end(scale: ConfidenceScale, edge: float, *, classes: int) -> str:
    """The confidence at the edge of a bin."""
    place, _ = places(scale, classes)
    code = min(int(np.searchsorted(place, edge - 1e-9)), scale.codes - 1)
    return f"{float(scale.confidence(np.array(code))):.4g}"


def confidence_chart(labels: PseudoLabelSet, k: int, color: tuple[int, int, int]) -> dict[str, Any]:
    """Pixels of class k by confidence, drawn by the page; those below the threshold are gray."""
    scale, classes = labels.histogram.scale, len(labels.histogram.counts)
    accept = int(labels.thresholds.accept[k])
    _, counts, threshold = bin_confidences(labels.histogram.counts[k], accept, scale, classes=classes)
    end = None if threshold is None else _end(scale, threshold, classes=classes)
    return {
        "kind": "confidence",
        "counts": counts.tolist(),
        "threshold": threshold,
        "end": end,
        "color": f"rgb{tuple(color)}",
    }


def _confidence_axes(figure: go.Figure, labels: PseudoLabelSet, edges: NDArray[np.float64]) -> None:
    """Give all classes of a round the same axes, so that they can be compared."""
    most = labels.histogram.counts.sum(axis=1).max()
    figure.update_yaxes(
        type="log", range=[-0.3, float(np.log10(max(most, 10)))], exponentformat="SI", nticks=4
    )
    confidences = [*TICKS, *(() if labels.histogram.scale is FLOAT16 else (0.9999,))]
    ticks = [(float(np.log(p / (1 - p))), f"{p:g}") for p in confidences if np.log(p / (1 - p)) >= edges[0]]
    ticks.append((float(edges[-1]), "1"))
    figure.update_xaxes(
        range=[float(edges[0]), float(edges[-1])],
        tickvals=[place for place, _ in ticks],
        ticktext=[text for _, text in ticks],
        zeroline=False,
        showgrid=False,
        tickangle=0,
    )


def compared_chart(groups: Sequence[tuple[str, NDArray]]) -> go.Figure:
    """Mean IoU of groups of runs: a bar with its deviation, and a dot for each run.

    Args:
        groups: name, float64 [runs].
    """
    figure = figure_of(100 + 46 * len(groups), showlegend=False, bargap=0.35)
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
    class_rows(figure, [name for name, _ in groups])
    figure.update_xaxes(rangemode="tozero", zeroline=False, title="mean IoU")
    return figure


def compared_classes_chart(names: Sequence[str], groups: Sequence[tuple[str, NDArray]]) -> go.Figure:
    """IoU of every class: a dot with its deviation for each group of runs.

    Args:
        names: of the classes.
        groups: name, float64 [runs, K].
    """
    figure = figure_of(rows_height(len(names)) + 8 * len(names) * max(1, len(groups) - 1))
    for at, (group, values) in enumerate(groups):
        offset = (
            0.0 if len(groups) == 1 else 0.56 * (at / (len(groups) - 1) - 0.5) * min(1.0, len(groups) / 4)
        )
        known = [column[~np.isnan(column)] for column in values.T]
        figure.add_scatter(
            x=[float(ious.mean()) if len(ious) else None for ious in known],
            y=[k + offset for k in range(len(names))],
            error_x={
                "type": "data",
                "array": [float(np.std(ious, ddof=1)) if len(ious) > 1 else 0 for ious in known],
                "thickness": 1.5,
            },
            name=short(group),
            mode="markers",
            marker={"color": SERIES[at % len(SERIES)], "size": 9},
            text=[f"{text_of(name)}, {text_of(group)}" for name in names],
            hovertemplate="%{text}: %{x:.4f}<extra></extra>",
        )
    class_rows(figure, names)
    figure.update_xaxes(range=[-0.02, 1.02], zeroline=False, dtick=0.2, title="IoU")
    return figure
