"""What a report for others leaves out: places on this machine, its name and that of its user."""

from __future__ import annotations

import getpass
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from darseg.data.plain_yaml import parse_yaml
from darseg.report.facts import RunFacts

HIDDEN = "…"

COMMON = {"", "root", "localhost"}
"""Names that tell nobody's."""

_BEGINNINGS = (
    r"(?<![\w./~…-])~[\w.-]*/",  # below a home folder
    r"(?<![\w./~…-])/(?!/)",
    r"(?<![\w.:/~…-])//(?=[^\s/])",  # of a network drive
    r"(?<!\w)[A-Za-z]:[\\/]",  # of Windows, as the next
    r"\\\\(?=\w)",
)
_PATH = re.compile(rf"(?:{'|'.join(_BEGINNINGS)})(?:[^\n]*[/\\])?")
"""Begins an absolute path, and ends with the last separator of the line.

A path may contain blanks, commas and quotes, so nobody can say where it ends. Too much is left out rather than
too little.
"""

_ADDRESS = re.compile(r"""([A-Za-z][\w+.-]{0,40}):/+([^\s"'<>]*)""")


def shareable(facts: RunFacts) -> RunFacts:
    """The facts without places and names of this machine: of paths only the last part is left."""
    known = (facts.root.resolve(), facts.root.absolute())
    environment = {
        without_places(name): without_places(value) if isinstance(value, str) else value
        for name, value in facts.environment.items()
    }
    return replace(
        facts,
        recipe_text=_shareable_recipe(facts.recipe_text, known),
        weights=facts.weights and without_places(facts.weights, known),
        warnings=tuple(without_places(text, known) for text in facts.warnings),
        environment=environment,
        shared=True,
    )


def _shareable_recipe(text: str, known: tuple[Path, ...]) -> str:
    """A recipe, written anew: its comments and the ways to write a text in YAML could hide a path."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return without_places(value, known) if isinstance(value, str) else value

    return yaml.safe_dump(plain(parse_yaml(text)), sort_keys=False, allow_unicode=True, width=10_000)


def without_places(text: str, known: tuple[Path, ...] = ()) -> str:
    """The text with only the last part of absolute paths, without secrets and names of machine and user.

    Args:
        known: paths of this machine, which are left out wherever they stand.
    """
    text = _ADDRESS.sub(_shareable_address, text)
    text = _PATH.sub(f"{HIDDEN}/", text)
    for path in (*known, Path.cwd(), Path.home()):
        if path != path.parent:
            text = text.replace(str(path), f"{HIDDEN}/{path.name}" if path != Path.home() else HIDDEN)
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], _user(), Path.home().name}
    for name in sorted(names - COMMON, key=len, reverse=True):
        text = re.sub(
            rf"(?<![\w-]){re.escape(name)}(?![\w:-])", HIDDEN, text
        )  # with a colon it is a key of the recipe
    return text


def _shareable_address(match: re.Match[str]) -> str:
    """An address without query and fragment, nothing of one with a user; of no web page its last part."""
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return f"/{rest}"  # a path, which may contain any sign
    if "@" in rest:  # a password may contain any sign, too
        return f"{scheme}://{HIDDEN}"
    address = re.split("[?#]", rest)[0]
    address += HIDDEN if address != rest else ""
    return f"{scheme}://{address}" if scheme in ("http", "https") else f"/{address}"


def _user() -> str:
    """The name of the user of this process; empty if the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return os.environ.get("USER", "")
