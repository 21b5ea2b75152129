"""Charts of what online rounds accepted; those by class belong here once the journal has them."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from darseg.report.charts import KEPT, NEUTRAL, PREDICTED, SERIES, Line, curves
from darseg.report.facts import ACCEPTANCE, RoundFacts

MOVED = SERIES[2]
LINES = [
    Line("accepted", "accepted pixels", KEPT),
    Line("precision", "right, where known", PREDICTED),
    Line("moved", "class changed by alignment", MOVED),
    Line("unaligned", "decided without class weights", NEUTRAL),
]


def accepted_chart(rounds: Sequence[RoundFacts]) -> go.Figure | None:
    """Shares of accepted pixels, of right ones among them, and of realigned ones; None without any."""
    online = [round_ for round_ in rounds if any(name in round_.curve.figures for name in ACCEPTANCE)]
    if not online:
        return None
    figure = curves(rounds, LINES)
    figure.update_yaxes(range=[0, 1.02])
    return figure
