"""What a report says of the class shares aimed at: their intervals, how they were shrunk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from darseg.data.classes import ClassSet
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.labeled_shares import LabeledShares
from darseg.pseudo.shrink import ShrunkShares
from darseg.report.elements import UNDEFINED, Row, Table, class_entries

INTERVAL = "90 % interval"
AIM = "#d4537e"
"""Color of shrunk shares."""


def add_targets(
    figure: go.Figure,
    names: Sequence[str],
    labeled: LabeledShares | None,
    *,
    shrunk: ShrunkShares | None,
    color: str,
) -> None:
    """Draw the interval of each labeled share in its row of a chart, and a shrunk share.

    Args:
        figure: with a logarithmic axis of shares, a row for each class.
        color: of the labeled images.
    """
    edge = float(figure.layout.xaxis.tickvals[0])  # where shares of 0 are drawn
    if labeled is not None:
        ends = [np.maximum(end, edge) for end in (labeled.low, labeled.high)]
        known = [k for k in range(len(names)) if not np.isnan(labeled.low[k])]
        figure.add_scatter(
            x=[value for k in known for value in (float(ends[0][k]), float(ends[1][k]), None)],
            y=[value for k in known for value in (k, k, None)],
            name=f"{INTERVAL} of labeled images",
            mode="lines",
            line={"color": color, "width": 6},
            opacity=0.4,
            hoverinfo="skip",
        )
    if shrunk is not None:
        figure.add_scatter(
            x=np.maximum(shrunk.share, edge).tolist(),
            y=list(range(len(names))),
            name="shrunk shares (the aim)",
            mode="markers",
            marker={"color": AIM, "symbol": "diamond-open", "size": 10, "line": {"width": 2, "color": AIM}},
            hovertemplate="%{x:.4%}<extra>shrunk shares</extra>",
        )


def interval_cells(labeled: LabeledShares | None, classes: int) -> list[str]:
    """The interval of each class's labeled share, and whether it is uncertain."""
    return [UNDEFINED if labeled is None else labeled.flag(k) for k in range(classes)]


def alignment_table(
    classes: ClassSet, alignment: Alignment, labeled: LabeledShares | None, *, shrunk: ShrunkShares | None
) -> Table:
    """The shares of aligned decisions: before, wanted and after, with the class weights."""
    wanted, title = None if labeled is None else labeled.share, "labeled images"
    if shrunk is not None:
        wanted, title = shrunk.share, "shrunk (the aim)"
    rows, intervals = [], interval_cells(labeled, len(classes))
    for k, entry in enumerate(class_entries(classes)):
        before, aim, after = (
            UNDEFINED if shares is None else f"{shares[k]:.3%}"
            for shares in (alignment.plain, wanted, alignment.reached)
        )
        reachable = bool(alignment.reachable[k])
        weight = f"{alignment.weights[k]:.3g}" if reachable else "out of reach"
        rows.append(Row(entry, [before, aim, intervals[k], after, weight], "" if reachable else "worst"))
    columns = ["without weights", title, f"{INTERVAL} of labeled", "with weights", "weight"]
    return Table(["share of pixels", *columns], rows)


def shrunk_columns(shrunk: ShrunkShares | None) -> dict[str, list[str]]:
    """Title → cells of the network's estimate and of the shrunk shares; none without."""
    if shrunk is None:
        return {}
    estimates = [
        f"{share:.3%}" if np.isfinite(deviation) else UNDEFINED
        for share, deviation in zip(shrunk.network, shrunk.network_deviation, strict=True)
    ]
    return {
        f"network, calibrated on {shrunk.images} images": estimates,
        "shrunk (the aim)": [f"{share:.3%}" for share in shrunk.share],
    }
