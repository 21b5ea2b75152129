"""What a report for others leaves out: places on this machine, its name and that of its user."""

from __future__ import annotations

import getpass
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

from darseg.report.facts import RunFacts

HIDDEN = "…"

COMMON = {"", "root", "localhost"}
"""Names that tell nobody's."""

_PATH = re.compile(r"""(?:file:/+|(?<![\w./~…-])(?:~[\w.-]*/|/(?!/)))[^\s"'<>|)\]},;:]*""")
"""An absolute path, a path below a home folder, or a file's address, up to a blank or a sign of punctuation."""


def shareable(facts: RunFacts) -> RunFacts:
    """The facts without places and names of this machine: of paths only the last part is left."""
    known = (facts.root.resolve(), facts.root.absolute())
    environment = {
        name: without_places(value) if isinstance(value, str) else value
        for name, value in facts.environment.items()
    }
    return replace(
        facts,
        recipe_text=without_places(facts.recipe_text, known),
        weights=facts.weights and without_places(facts.weights, known),
        warnings=tuple(without_places(text, known) for text in facts.warnings),
        environment=environment,
        shared=True,
    )


def without_places(text: str, known: tuple[Path, ...] = ()) -> str:
    """The text with only the last part of absolute paths, and no name of this machine or its user.

    Args:
        known: paths that may contain blanks.
    """
    for path in (*known, Path.cwd(), Path.home()):
        if path != path.parent:
            text = text.replace(str(path), f"{HIDDEN}/{path.name}" if path != Path.home() else HIDDEN)
    text = _PATH.sub(lambda match: f"{HIDDEN}/{match[0].rstrip('/').rpartition('/')[2]}", text)
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], _user(), Path.home().name}
    for name in sorted(names - COMMON, key=len, reverse=True):
        text = re.sub(
            rf"(?<![\w-]){re.escape(name)}(?![\w:-])", HIDDEN, text
        )  # with a colon it is a key of the recipe
    return text


def _user() -> str:
    """The name of the user of this process; empty if the system knows none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return os.environ.get("USER", "")
