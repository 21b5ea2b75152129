"""The section about a run's result: scores plain and aligned, class shares, and the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from darseg.data.classes import ClassSet
from darseg.pseudo.labeled_shares import LabeledShares
from darseg.report.elements import UNDEFINED, Entry, Row, Tab, Table, css_color, figure_of
from darseg.report.page import render
from darseg.report.targets import INTERVAL, interval_cells
from darseg.training.scores import Scores

SHARES = ("predicted", "wanted", "reached")
"""Class shares on the unlabeled images: of the plain decisions, of the labeled pixels, of the aligned decisions."""


@dataclass(frozen=True, eq=False)
class AlignedFacts:
    """What scores.json says about a round's aligned decisions.

    Attributes:
        used: whether the result is the aligned network.
        why: a sentence.
        scores: of the aligned network on the validation images; None if there are none.
        columns: name → float64 [K]: "weight" and SHARES, as far as they are known.
    """

    used: bool
    why: str
    scores: Scores | None
    columns: Mapping[str, NDArray[np.float64]]

    @classmethod
    def read(cls, content: Mapping[str, Any] | None, names: Sequence[str]) -> AlignedFacts | None:
        """The facts in a scores.json that `RunDirectory.scores` has checked, None if it has none.

        Raises ValueError, TypeError or KeyError if they are damaged.
        """
        if content is None or "aligned" not in content:
            return None
        aligned = content["aligned"]
        scores = Scores.from_json(aligned) if "confusion" in aligned else None
        if scores is not None and len(scores.confusion) != len(names):
            raise ValueError(f"aligned scores of {len(scores.confusion)} classes instead of {len(names)}")
        shares = aligned.get("shares", {})
        if not isinstance(shares, Mapping):
            raise ValueError("'shares' of the aligned decisions must be an object")
        columns = {"weight": aligned.get("weights")} | {name: shares.get(name) for name in SHARES}
        return cls(
            bool(aligned["used"]),
            why=str(aligned["why"]),
            scores=scores,
            columns={
                key: np.array([float(values[name]) for name in names])
                for key, values in columns.items()
                if values is not None
            },
        )


def result_section(
    classes: ClassSet,
    rounds: Sequence[tuple[int, Scores, AlignedFacts]],
    labeled: LabeledShares | None,
    *,
    omitted: str,
) -> Markup:
    """The section as HTML.

    Args:
        rounds: index, plain scores and facts of each round that is shown.
        labeled: the class shares that are wanted, with their intervals, if they are known.
        omitted: a sentence about the others.
    """
    tabs = [
        Tab(f"Round {index}", {"why": aligned.why, "table": _table(classes, plain, aligned, labeled=labeled)})
        for index, plain, aligned in rounds
    ]
    return render("result", rounds=tabs, omitted=omitted)


def _table(
    classes: ClassSet, plain: Scores, aligned: AlignedFacts, *, labeled: LabeledShares | None
) -> Table | None:
    """One row for each class; None if nothing was found that could be aligned."""
    if not aligned.columns:
        return None
    titles, columns, means = ["class"], [], []
    for key, title in (("iou", "IoU"), ("precision", "precision"), ("recall", "recall")):
        for kind, scores in (("plain", plain), ("aligned", aligned.scores)):
            if scores is not None and scores.confusion.any():
                titles.append(f"{title} {kind}")
                columns.append([figure_of(value) for value in getattr(scores, key)])
                means.append(figure_of(scores.mean_iou) if key == "iou" else "")
    for name in SHARES:
        if name in aligned.columns:
            titles.append(f"share {name}")
            columns.append([f"{value:.3%}" for value in aligned.columns[name]])
            means.append("")
        if name == "wanted" and name in aligned.columns:
            titles.append(f"{INTERVAL} of wanted")
            columns.append(interval_cells(labeled, len(classes)))
            means.append("")
    if "weight" in aligned.columns:
        titles.append("weight")
        columns.append([f"{value:.3g}" for value in aligned.columns["weight"]])
        means.append("")
    heads = [Entry(name, css_color(color)) for name, color in zip(classes.names, classes.colors, strict=True)]
    rows = [Row(head, list(cells)) for head, cells in zip(heads, zip(*columns, strict=True), strict=True)]
    return Table(titles, [*rows, Row("mean", [cell or UNDEFINED for cell in means])])
