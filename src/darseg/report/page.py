"""Self-contained pages: styles, scripts, packed plotly and chart data are inside; nothing is fetched.

HTML comes from the templates next to this file, and jinja2 escapes every value in them. So names, which may contain
anything, stay text without an explicit escape.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

import darseg
from darseg.data.files import is_taken, named, open_file, write_whole
from darseg.errors import RunError, printable
from darseg.report.elements import Chart, direction, figure_of, signed

MARK = '<meta name="generator" content="darseg '
"""Distinguishes pages of darseg, which may be overwritten, from the user's files."""

TEMPLATES = Environment(
    loader=PackageLoader("darseg.report"),
    autoescape=True,
    finalize=lambda value: printable(value) if type(value) is str else value,  # not HTML, which is Markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"figure": figure_of, "signed": signed, "direction": direction}


def render(template: str, **values: Any) -> Markup:
    """HTML of a template, `NAME.html.j2`, with all values escaped."""
    return Markup(TEMPLATES.get_template(f"{template}.html.j2").render(**values))


@dataclass(frozen=True)
class Base:
    """The place of what several charts share: its number among the charts, and their height."""

    number: int
    height: int


class Page:
    """Collects the sections and charts of a page. about: a line of text below the title."""

    def __init__(self, title: str, about: str) -> None:
        self.title, self.about = title, about
        self._sections: list[tuple[str, bool, Markup]] = []  # title, whether it is a heading, body
        self._charts: list[str] = []

    def section(self, title: str, body: Markup, heading: bool = True) -> None:
        """Add a section. heading: whether its title is shown above it, too, and not only in the navigation."""
        self._sections.append((title, heading, body))

    def chart(self, figure: go.Figure, description: str, wide: bool = False) -> Chart:
        """Add a chart, and return its place for a template. Arguments as in `Chart`."""
        height = int(figure.layout.height)
        return Chart(self._add(figure.to_json()), height, description, wide=wide)

    def base(self, shared: Mapping[str, Any]) -> Base:
        """Add what several charts share: their layout, and what `page.js` needs to draw each."""
        return Base(self._add(_json(shared)), int(shared["layout"]["height"]))

    def chart_on(self, base: Base, numbers: Mapping[str, Any], description: str, wide: bool = False) -> Chart:
        """Add a chart of which only the numbers differ from others on this base."""
        return Chart(self._add(_json({**numbers, "base": base.number})), base.height, description, wide=wide)

    def _add(self, text: str) -> int:
        """Add a JSON text to the charts. Returns its position."""
        self._charts.append(text)
        return len(self._charts) - 1

    def html(self) -> str:
        """The whole document."""
        script = _asset("page.js")
        plotly, packed = _plotly() if self._charts else ("", "")
        return render(
            "page",
            title=self.title,
            about=self.about,
            sections=self._sections,
            mark=Markup(MARK),
            version=darseg.__version__,
            policy=_policy(*filter(None, (script, plotly))),
            style=Markup(_asset("page.css")),
            # No name can end the script element; JSON reads the escape as the sign.
            charts=Markup(f"[{','.join(self._charts)}]".replace("<", "\\u003c")),
            plotly=packed,
            charts_drawn=bool(self._charts),
            script=Markup(script),
        )

    def write(self, out: Path) -> Path:
        """Write the page as a whole.

        Raises:
            RunError: `out` is a folder, or a file that darseg did not write.
            StorageError: the file cannot be written.
        """
        check_out(out)
        write_whole(out, self.html())
        return out


def check_out(out: Path) -> None:
    """Raise RunError if a page cannot be written to `out`: a folder, or a file that darseg did not write."""
    if out.is_dir():
        raise RunError(f"{out} is a folder. Give the name of a file for the page, for example report.html.")
    if is_taken(out) and MARK.encode() not in _beginning(out):
        raise RunError(
            f"{named(out)} exists and was not written by darseg. Choose another name for the page, or "
            "move the file away."
        )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":"))


def _policy(*scripts: str) -> str:
    """The content policy: only these scripts run, whatever a name contains; no network requests."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _beginning(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(400)
    except FileNotFoundError:  # a link that leads nowhere
        return b""


def _asset(name: str) -> str:
    return importlib.resources.files("darseg.report").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> tuple[str, str]:
    """plotly's script, and the same gzipped as base64, which is a third of its size."""
    script = get_plotlyjs()
    return script, base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()
