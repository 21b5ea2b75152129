"""Plain values that templates draw as HTML: tables, charts, tabs, names with a color."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from darseg.data.classes import ClassSet

UNDEFINED = "–"


@dataclass(frozen=True)
class Entry:
    """A name with its color, as in a legend. color: a CSS color."""

    name: str
    color: str


def class_entries(classes: ClassSet) -> list[Entry]:
    """The legend of the classes."""
    return [Entry(name, css_color(color)) for name, color in zip(classes.names, classes.colors, strict=True)]


@dataclass(frozen=True)
class Change:
    """A difference with a small bar next to it. part: the bar's length, -1 to 1, or NaN."""

    value: float
    part: float


@dataclass(frozen=True)
class Row:
    """A row of a table. style: "worst", "total", or nothing."""

    head: str | Entry
    cells: Sequence[str | Change]
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls inside its box. columns: their heads, none for a table without a head line."""

    columns: Sequence[str | Entry]
    rows: Sequence[Row]
    style: str = ""


@dataclass(frozen=True)
class Chart:
    """The place of a chart on a page.

    Attributes:
        number: position among the page's charts.
        height: pixels.
        description: for readers who do not see the chart.
        wide: the chart scrolls inside its box on a narrow screen.
    """

    number: int
    height: int
    description: str
    wide: bool = False


@dataclass(frozen=True)
class Tab:
    """One of several contents of which a page shows one at a time."""

    title: str
    content: Any


def css_color(color: Sequence[int]) -> str:
    """RGB from 0 to 255 → a CSS color."""
    return "rgb({},{},{})".format(*color)


def figure_of(value: float | None, digits: int = 3) -> str:
    """A figure between 0 and 1, or a dash if it is undefined."""
    return UNDEFINED if value is None or value != value else f"{value:.{digits}f}"


def signed(change: float, digits: int = 3) -> str:
    """A difference with its sign, which is a true minus or ± for zero; a dash if it is undefined."""
    if change != change:
        return UNDEFINED
    text = f"{abs(change):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("+" if change > 0 else "−") + text


def direction(change: float) -> str:
    """The CSS class of a difference: "up", "down", or "even"."""
    return {"+": "up", "−": "down"}.get(signed(change)[0], "even")
