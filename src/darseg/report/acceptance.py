"""Charts of what online rounds accepted: in all, by class, and how teacher and student compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from darseg.data.classes import ClassSet
from darseg.report.charts import KEPT, NEUTRAL, PREDICTED, SERIES, short
from darseg.report.facts import RoundFacts
from darseg.report.step_charts import Line, curves

MOVED, STUDENT = SERIES[2], SERIES[3]
LINES = (
    Line("accepted", "accepted pixels", KEPT),
    Line("precision", "right, where known", PREDICTED),
    Line("moved", "class changed by alignment", MOVED),
    Line("unaligned", "decided without class weights", NEUTRAL),
)
TEACHER_LINES = (
    Line("agreement", "the same class", NEUTRAL),
    Line("teacher_right", "teacher right", KEPT),
    Line("student_right", "student right", STUDENT),
)
MOST_CLASSES = 30
"""Lines of a chart."""


def accepted_chart(rounds: Sequence[RoundFacts]) -> go.Figure | None:
    """Shares of accepted pixels, of right ones among them, and of realigned ones; None without any."""
    return _shares(rounds, LINES)


def teacher_chart(rounds: Sequence[RoundFacts]) -> go.Figure | None:
    """How often teacher and student say the same, and how often each is right; None if nothing was noted."""
    return _shares(rounds, TEACHER_LINES)


def class_charts(
    rounds: Sequence[RoundFacts], classes: ClassSet, counts: NDArray | None
) -> dict[str, go.Figure]:
    """Name of `BY_CLASS` → its curves by class, of those that the journal noted.

    Args:
        counts: [K] labeled pixels. With them, the share of a class among the accepted pixels is divided by its share
            among the labeled ones, on a logarithmic axis. The classes with the most of them are drawn.
    """
    order = np.arange(len(classes)) if counts is None else np.argsort(-counts, kind="stable")
    drawn, charts = sorted(order[:MOST_CLASSES].tolist()), dict[str, go.Figure]()
    wanted = None if counts is None else counts / max(1, counts.sum())
    for figure in ("accepted_by_class", "precision_by_class", "thresholds"):
        ratio = figure == "accepted_by_class" and wanted is not None
        lines = [
            Line(
                figure,
                short(classes.names[k]),
                "#" + "".join(f"{part:02x}" for part in classes.colors[k]),
                k=k,
                divisor=float(wanted[k]) if ratio and wanted is not None else 1.0,
            )
            for k in drawn
            if not ratio or (wanted is not None and wanted[k])
        ]
        if not any(_has_values(round_, line) for round_ in rounds for line in lines):
            continue
        charts[figure] = curves(rounds, lines)
        if ratio:
            charts[figure].update_yaxes(type="log")
        else:
            charts[figure].update_yaxes(range=[0, 1.02])
    return charts


def _shares(rounds: Sequence[RoundFacts], lines: Sequence[Line]) -> go.Figure | None:
    if not any(_has_values(round_, line) for round_ in rounds for line in lines):
        return None
    figure = curves(rounds, lines)
    figure.update_yaxes(range=[0, 1.02])
    return figure


def _has_values(round_: RoundFacts, line: Line) -> bool:
    values = round_.curve.values(line.figure, line.k)
    return values is not None and not np.isnan(values).all()
