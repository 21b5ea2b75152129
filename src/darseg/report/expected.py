"""The section about rounds whose ratio is auto: what held-out images promise, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from darseg.data.classes import ClassSet
from darseg.pseudo.precision import ExpectedPrecision
from darseg.report.elements import UNDEFINED, Row, Tab, Table, class_entries, figure_of
from darseg.report.facts import RoundFacts
from darseg.report.page import render

COLUMNS = (
    "class",
    "follows",
    "taken of its share",
    "expected precision",
    "lower bound",
    "held-out pixels",
    "held-out images",
    "effective images",
)
FOLLOWS = {"class": "own pixels", "all classes": "all classes together", "none": "nothing reaches the target"}


def expected_section(classes: ClassSet, rounds: Sequence[RoundFacts], omitted: str) -> Markup:
    """The section as HTML.

    Args:
        rounds: those that are shown; all have an expected precision.
        omitted: a sentence about the others.
    """
    tabs = []
    for round_ in rounds:
        assert round_.labels is not None and round_.labels.expected is not None
        expected = round_.labels.expected
        content = {
            "table": _table(classes, round_, expected),
            "target": f"{expected.target:g}",
            "held_out": expected.held_out,
            "folds": expected.folds,
        }
        tabs.append(Tab(f"Round {round_.index}", content))
    measured = any(round_.pseudo is not None for round_ in rounds)
    return render("expected", rounds=tabs, omitted=omitted, measured=measured)


def _table(classes: ClassSet, round_: RoundFacts, expected: ExpectedPrecision) -> Table:
    """One row for each class, and one for all labels together."""
    assert round_.labels is not None
    pseudo, rows = round_.pseudo, []
    for k, entry in enumerate(class_entries(classes)):
        share = expected.ratio[k]
        cells = [
            FOLLOWS[expected.basis[k]],
            UNDEFINED if share is None else f"{share:.1%}",
            _figure(expected.expected[k]),
            _figure(expected.bound[k]),
            f"{expected.pixels[k]:,}",
            f"{expected.images[k]:,}",
            f"{expected.effective[k]:.1f}",
        ]
        if pseudo is not None:
            cells.append(figure_of(pseudo.precision[k]))
        rows.append(Row(entry, cells, "worst" if expected.basis[k] == "none" else ""))
    cells = ["", "", _figure(expected.of_all(round_.labels.kept)), "", "", "", ""]
    if pseudo is not None:
        cells.append(figure_of(pseudo.pixel_accuracy))
    rows.append(Row("all labels", cells, "total"))
    return Table([*COLUMNS, *(["measured precision"] if pseudo is not None else [])], rows)


def _figure(value: float | None) -> str:
    return UNDEFINED if value is None else figure_of(value)
