"""The charts of `darseg compare`: differences, scores over numbers of labels, cost against score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from darseg.experiment.remarks import interval_text
from darseg.experiment.statistics import Decisions, Difference, Role, Summary
from darseg.report.charts import NEUTRAL, TRUTH, figure_of, rows_height, short, text_of

ZERO = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper"}
ROWS_APART = 1.6  # rows of other charts that a row with an interval takes


def differences_chart(
    rows: Sequence[tuple[Summary, Difference]], colors: Mapping[str, str], *, labels_shown: bool
) -> go.Figure:
    """A dot with its interval for each difference, and a small one for each seed.

    Args:
        colors: of the variants, by name.
        labels_shown: whether rows have numbers of labels.
    """
    figure = figure_of(rows_height(round(ROWS_APART * len(rows))), showlegend=False)
    places = list(range(len(rows)))
    estimates = [difference.mean_iou for _, difference in rows]
    hues = [colors[row.arm.name] for row, _ in rows]
    figure.add_scatter(
        x=[value for _, difference in rows for value in difference.values],
        y=[at - 0.3 for at, (_, difference) in enumerate(rows) for _ in difference.values],
        mode="markers",
        marker={"color": NEUTRAL, "size": 6},
        text=[f"seed {seed}" for _, difference in rows for seed in difference.seeds],
        hovertemplate="%{text}: %{x:+.4f}<extra></extra>",
    )
    for at, it in enumerate(estimates):
        if it.low == it.low:
            figure.add_scatter(
                x=[it.low, it.high],
                y=[at, at],
                mode="lines",
                line={
                    "color": hues[at],
                    "width": 3,
                    "dash": "solid" if rows[at][1].includes_training else "dot",
                },
                hoverinfo="skip",
            )
    figure.add_scatter(
        x=[it.mean for it in estimates],
        y=places,
        mode="markers",
        marker={
            "color": hues,
            "size": 12,
            "symbol": ["circle" if difference.told_apart else "circle-open" for _, difference in rows],
            "line": {"width": 2, "color": hues},
        },
        text=[f"{text_of(row.arm.name)}: {interval_text(difference.mean_iou)}" for row, difference in rows],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_yaxes(
        tickvals=places,
        ticktext=[
            f"{short(row.arm.name)}, {row.arm.labels}" if labels_shown else short(row.arm.name)
            for row, _ in rows
        ],
        range=[len(rows) - 0.5, -0.6],
        zeroline=False,
    )
    figure.update_xaxes(zeroline=False, nticks=5)
    figure.update_layout(shapes=[{**ZERO, "line": {"color": NEUTRAL, "width": 1, "dash": "dash"}}])
    return figure


def budget_chart(
    names: Sequence[str], rows: Sequence[Summary], colors: Mapping[str, str], *, role: Role
) -> go.Figure:
    """Mean IoU over numbers of labels: a line for each name, thin and dotted for aligned decisions."""
    figure = figure_of(380, hovermode="closest")
    decided: tuple[Decisions, ...] = ("plain", "aligned")
    for name in names:
        for decisions in decided:
            known = [
                (row.arm.labels, score.mean_iou)
                for row in rows
                if row.arm.name == name and (score := row.score(role, decisions)) is not None
            ]
            if not known:
                continue
            known.sort(key=lambda pair: pair[0])
            is_plain = decisions == "plain"
            figure.add_scatter(
                x=[labels for labels, _ in known],
                y=[it.mean for _, it in known],
                error_y={
                    "type": "data",
                    "array": [it.deviation if it.deviation == it.deviation else 0 for _, it in known],
                    "thickness": 1.5,
                    "visible": is_plain,
                },
                name=short(name),
                legendgroup=name,
                showlegend=is_plain,
                mode="lines+markers",
                line={
                    "color": colors[name],
                    "width": 2 if is_plain else 1,
                    "dash": "solid" if is_plain else "dot",
                },
                marker={"size": 8 if is_plain else 5},
                hovertemplate=f"{text_of(name)}, {decisions}: %{{y:.4f}} with %{{x}} labels<extra></extra>",
            )
    ticks = sorted({row.arm.labels for row in rows})
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks], title="labels", zeroline=False
    )
    figure.update_yaxes(title="mean IoU", zeroline=False)
    return figure


def cost_chart(rows: Sequence[Summary], colors: Mapping[str, str], *, cost: str) -> go.Figure:
    """Mean IoU on validation images against a mean cost of a run, "seconds" or "images"."""
    figure = figure_of(360)
    several = len({row.arm.labels for row in rows}) > 1
    for name in dict.fromkeys(row.arm.name for row in rows):
        known = [
            (row, score.mean_iou.mean)
            for row in rows
            if row.arm.name == name and (score := row.score("validation")) is not None
        ]
        figure.add_scatter(
            x=[getattr(row, cost) for row, _ in known],
            y=[mean for _, mean in known],
            name=short(name),
            mode="markers+text" if several else "markers",
            text=[str(row.arm.labels) for row, _ in known],
            textposition="top center",
            textfont={"size": 10},
            marker={"color": colors[name], "size": 10},
            customdata=[[row.arm.labels] for row, _ in known],
            hovertemplate=f"{text_of(name)}, %{{customdata[0]}} labels: %{{y:.4f}}, %{{x:,.0f}} {cost}<extra></extra>",
        )
    figure.update_xaxes(rangemode="tozero", title=f"{cost} of a run", zeroline=False, nticks=6)
    figure.update_yaxes(title="mean IoU", zeroline=False)
    return figure


def color_of(kind: str, at: int, series: Sequence[str]) -> str:
    """The color of the variant at this place; controls and ceilings are gray."""
    return {"control": TRUTH, "ceiling": "#5b6472"}.get(kind) or series[at % len(series)]
