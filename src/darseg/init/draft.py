"""The data section of a proposed recipe while it is made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Form = dict[str, tuple[Any, str]]
"""Keys of the data section: key → value and comment, in order."""


@dataclass
class Draft:
    """What is known about the data so far.

    Attributes:
        classes: as in a recipe; `class_comment` is the reason.
        class_notes: a comment for each class.
        keys: more keys of the data section.
        forms: ways to say the roles of the images, the simplest first; the first that gives `roles` is used.
        roles: role → (image, label) as intended; None: as the layout says.
        sizes: (height, width) of images.
        labeled, unlabeled: numbers of images.
        missing: the weight file that the recipe names and that has yet to be got.
        notes, warnings: what init prints; warnings must be looked at.
    """

    root: Path
    classes: Any
    class_comment: str
    class_notes: Sequence[str] = ()
    keys: Form = field(default_factory=dict)
    forms: list[Form] = field(default_factory=lambda: [{}])
    roles: dict[str, list[tuple[Path, Path | None]]] | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    labeled: int = 0
    unlabeled: int = 0
    missing: Path | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def path_from(folder: Path, path: Path) -> str:
    """A path as seen from a folder; absolute if they have little in common."""
    try:
        relative = Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
    return relative if relative.count("../") <= 3 else path.absolute().as_posix()
