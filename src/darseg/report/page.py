"""A page that needs nothing but itself: styles, script, plotly packed, charts as data. Nothing is fetched."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import html
import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

import darseg
from darseg.data.files import write_whole
from darseg.errors import RunError

MARK = '<meta name="generator" content="darseg '
"""By this a page that may be written over is told from a file of the user's."""

escape = html.escape


class Page:
    """Collects the sections and charts of a page. What it is given as HTML has its texts escaped already."""

    def __init__(self, title: str, about: str) -> None:
        self.title, self.about = title, about
        self._sections: list[tuple[str, str]] = []  # title in the navigation, HTML
        self._charts: list[str] = []
        self._tabs = 0

    def section(self, title: str, body: str, heading: bool = True) -> None:
        """Add a section. `title` is plain text."""
        head = f"<h2>{escape(title)}</h2>" if heading else ""
        self._sections.append((title, head + body))

    def chart(self, figure: go.Figure, what: str, wide: bool = False) -> str:
        """HTML of the place where a chart will be drawn. `what` it shows, for those who do not see it; a `wide` one
        scrolls inside its box on a narrow screen."""
        self._charts.append(figure.to_json())
        box = (
            f'<div class="chart{" wide" * wide}" data-chart="{len(self._charts) - 1}" role="img" '
            f'aria-label="{escape(what)}" style="height:{figure.layout.height}px"></div>'
        )
        return f'<div class="box">{box}</div>' if wide else box

    def tabs(self, titles: Sequence[str], bodies: Sequence[str]) -> str:
        """HTML of bodies of which one is shown, the last at first."""
        if len(bodies) == 1:
            return bodies[0]
        self._tabs += 1
        ids = [f"tab-{self._tabs}-{index}" for index in range(len(titles))]
        last = len(ids) - 1
        buttons = "".join(
            f'<button type="button" data-shows="{name}" aria-pressed="{"true" if at == last else "false"}">'
            f"{escape(title)}</button>"
            for at, (name, title) in enumerate(zip(ids, titles, strict=True))
        )
        shown = "".join(
            f'<div id="{name}"{"" if at == last else " hidden"}>{body}</div>'
            for at, (name, body) in enumerate(zip(ids, bodies, strict=True))
        )
        return f'<div class="tabs">{buttons}</div>{shown}'

    def html(self) -> str:
        """The whole document."""
        style, script, (plotly, packed) = _asset("page.css"), _asset("page.js"), _plotly()
        # Only these two scripts run, whatever a name contains; and nothing may be asked of any network.
        policy = (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {_hash(script)} {_hash(plotly)}; "
            "base-uri 'none'; form-action 'none'"
        )
        links = "".join(
            f'<a href="#s{index}">{escape(title)}</a>' for index, (title, _) in enumerate(self._sections)
        )
        sections = "\n".join(
            f'<section id="s{index}">{body}</section>' for index, (_, body) in enumerate(self._sections)
        )
        # No name can end the script element; JSON reads the escape as the sign.
        charts = ("[" + ",".join(self._charts) + "]").replace("<", "\\u003c")
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}{darseg.__version__}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(self.title)} – darseg</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{escape(self.title)}</h1><p class="about">{self.about}</p></header>
<nav><div>{links}</div></nav>
<main>
<noscript><section>Charts need JavaScript; tables and images do not.</section></noscript>
{sections}
</main>
<footer>Written by darseg {darseg.__version__}. The page holds everything it shows; nothing is fetched.</footer>
<dialog></dialog>
<script type="application/json" id="charts">{charts}</script>
<script type="text/plain" id="plotly">{packed}</script>
<script>{script}</script>
</body>
</html>
"""

    def write(self, out: Path) -> Path:
        """Write the page whole. Raises RunError where a file is there that is no page of darseg, StorageError."""
        if out.is_dir():
            raise RunError(f"{out} is a folder: give the name of a file for the page, as in report.html.")
        if out.exists() and MARK.encode() not in _beginning(out):
            raise RunError(f"{out} is there and was not written by darseg: choose another name for the page.")
        write_whole(out, self.html())
        return out


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(400)


def _asset(name: str) -> str:
    return importlib.resources.files("darseg.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> tuple[str, str]:
    """plotly's script, and the same as base64 of gzip: a third of its size."""
    script = get_plotlyjs()
    return script, base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """HTML of a table that scrolls inside its box. Cells are HTML; a row has a CSS class and its cells, the first its
    head."""
    body = "".join(
        f'<tr class="{style}"><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for style, cells in rows
    )
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<div class="box"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def figure_of(value: float | None, digits: int = 3) -> str:
    """A figure between 0 and 1, or that it is undefined."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def change_of(change: float, digits: int = 3) -> str:
    """A difference with its sign, as HTML colored by it."""
    if change != change:
        return "–"
    direction = "up" if change >= 0.5 * 10**-digits else "down" if change <= -0.5 * 10**-digits else "even"
    return f'<span class="{direction}">{signed(change, digits)}</span>'


def signed(change: float, digits: int = 3) -> str:
    """A difference with its sign; a true minus."""
    text = f"{abs(change):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("+" if change > 0 else "−") + text
