"""What the journal noted of a round's steps, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darseg.run.records import is_number

LOSS = "loss_"  # begins the names of losses in the journal's step events
# Of online rounds: shares of pixels; and lists of such shares, or of confidences, by class.
ACCEPTANCE = (
    "accepted",
    "precision",
    "moved",
    "unaligned",
    "agreement",
    "teacher_right",
    "student_right",
)
BY_CLASS = ("accepted_by_class", "precision_by_class", "thresholds")


@dataclass(frozen=True, eq=False)
class Curve:
    """Figures that the journal noted of a round's steps.

    Attributes:
        steps: int64 [N], rising, counted from the round's first step.
        figures: name → float64 [N], NaN if undefined; "learning_rate", those of ACCEPTANCE, and all that
            begin with LOSS.
        by_class: name of BY_CLASS → float64 [N, K], NaN if undefined or not noted at that step.
    """

    steps: NDArray[np.int64]
    figures: Mapping[str, NDArray[np.float64]]
    by_class: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = (*self.figures.values(), *self.by_class.values())
        if any(len(values) != len(self.steps) for values in columns):
            raise ValueError("A curve needs one value of every figure for each step.")

    def values(self, figure: str, k: int | None = None) -> NDArray[np.float64] | None:
        """float64 [N]: a figure, or that of class k; None if it was never noted."""
        if k is None:
            return self.figures.get(figure)
        return self.by_class[figure][:, k] if figure in self.by_class else None


def curve_of(events: Sequence[dict], classes: int) -> Curve:
    """The curve of a round's step events.

    If step numbers go backwards (a resumed run, a repeated round), earlier entries for those steps and later ones are
    dropped.
    """
    noted: dict[int, dict] = {}  # step → its event
    for event in events:
        step = event["step"]
        if noted and step <= next(reversed(noted)):
            noted = {earlier: figures for earlier, figures in noted.items() if earlier < step}
        noted[step] = event
    present = dict.fromkeys(name for event in noted.values() for name in event)
    kept = ("learning_rate", *ACCEPTANCE)
    names = [name for name in present if name in kept or name.startswith(LOSS)]

    def figure(name: str) -> NDArray[np.float64]:
        values = [event.get(name) for event in noted.values()]
        return np.array([value if is_number(value) else np.nan for value in values], np.float64)

    def by_class(name: str) -> NDArray[np.float64]:
        rows = [event.get(name) for event in noted.values()]
        whole = [row if isinstance(row, list) and len(row) == classes else [None] * classes for row in rows]
        return np.array(
            [[value if is_number(value) else np.nan for value in row] for row in whole], np.float64
        )

    return Curve(
        np.array(list(noted), np.int64),
        {name: figure(name) for name in names},
        {name: by_class(name) for name in BY_CLASS if name in present},
    )
