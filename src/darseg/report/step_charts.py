"""Charts over the steps of a run: losses, learning rates, and any other figure of the journal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from darseg.report.charts import KEPT, NEUTRAL, PREDICTED, SERIES, figure_of, short
from darseg.report.curve import LOSS
from darseg.report.facts import RoundFacts

POINTS = 1000  # of a curve; more are averaged

TITLES = {"loss_labeled": "labeled", "loss_pseudo": "pseudo-labeled"}  # others: the name without LOSS
LOSS_COLORS = {"loss_labeled": PREDICTED, "loss_pseudo": KEPT}  # others: the rest of SERIES


@dataclass(frozen=True)
class Line:
    """How a figure of the journal is drawn.

    Attributes:
        figure: its name in a curve.
        k: of which class, if it is noted by class.
        divisor: of its values.
    """

    figure: str
    title: str
    color: str
    k: int | None = None
    divisor: float = 1.0


def loss_lines(rounds: Sequence[RoundFacts]) -> list[Line]:
    """A line for every loss that the journal noted in any of the rounds; those on labels first."""
    noted = dict.fromkeys(name for round_ in rounds for name in round_.curve.figures if name.startswith(LOSS))
    names = [name for name in LOSS_COLORS if name in noted]
    names += [name for name in noted if name not in LOSS_COLORS]
    others = itertools.cycle(color for color in SERIES if color not in LOSS_COLORS.values())
    return [
        Line(
            figure=name,
            title=TITLES.get(name) or short(name.removeprefix(LOSS).replace("_", " ")),
            color=LOSS_COLORS.get(name) or next(others),
        )
        for name in names
    ]


def loss_chart(rounds: Sequence[RoundFacts]) -> go.Figure:
    """All losses at all steps that the journal noted, one round after the other."""
    figure = curves(rounds, loss_lines(rounds))
    figure.update_yaxes(rangemode="tozero")
    return figure


def rate_chart(rounds: Sequence[RoundFacts]) -> go.Figure:
    """The learning rate at the noted steps."""
    figure = curves(rounds, [Line("learning_rate", "learning rate", "#10a37f")])
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero", exponentformat="power")
    return figure


def curves(rounds: Sequence[RoundFacts], lines: Sequence[Line]) -> go.Figure:
    """These figures of the journal at their steps, one round after the other."""
    figure = figure_of(300, hovermode="x unified")
    start, in_legend = 0, set()
    for round_ in rounds:
        curve = round_.curve
        for line in lines:
            noted = curve.values(line.figure, line.k)
            if noted is None:
                continue
            steps, values = thin(curve.steps, noted / line.divisor)
            figure.add_scatter(
                x=(steps + start).tolist(),
                y=[None if np.isnan(value) else float(value) for value in values],
                name=line.title,
                legendgroup=f"{line.figure} {line.k}",
                showlegend=(line.figure, line.k) not in in_legend,
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={"color": line.color, "width": 2},
                hovertemplate="%{y:.4g}",
            )
            in_legend.add((line.figure, line.k))
        label = {"text": f"round {round_.index}", "font": {"size": 11}}
        figure.add_annotation(
            x=start, y=1, yref="paper", xanchor="left", yanchor="top", showarrow=False, xshift=3, **label
        )
        if start:
            figure.add_vline(x=start, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
        start += round_.steps or int(curve.steps.max(initial=-1)) + 1
    figure.update_xaxes(title="step", zeroline=False)
    return figure


def thin(steps: NDArray, values: NDArray, points: int = POINTS) -> tuple[NDArray, NDArray]:
    """Reduce a curve to at most `points` points, each the mean of its neighbors, NaN left out."""
    if len(steps) <= points:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), points)
    known = [values[group][~np.isnan(values[group])] for group in groups]
    means = np.array([numbers.mean() if len(numbers) else np.nan for numbers in known])
    return np.array([steps[group].mean() for group in groups]), means
