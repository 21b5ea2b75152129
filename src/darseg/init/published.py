"""Cityscapes and VOC as downloaded, or other data in their folders: what the files hold decides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from darseg.data.classes import BUILT_IN, CITYSCAPES, IGNORE, VOC
from darseg.data.encoding import CITYSCAPES_IDS, IDS_SUFFIX
from darseg.data.labels import decode_label
from darseg.data.layouts import CITIES, VALIDATION_CITIES, Layout, find_sbd
from darseg.errors import DataError
from darseg.init.draft import Draft
from darseg.init.names import RGB, find_names, foreign_names
from darseg.init.survey import palette_of
from darseg.init.words import CITYSCAPES_NAME

LAYOUT_FOLDERS = {
    "cityscapes": "leftImg8bit and gtFine",
    "voc": "JPEGImages, SegmentationClass and lists",
}

TEST_CITIES = ("berlin", "bielefeld", "bonn", "leverkusen", "mainz", "munich")
VOC_NAME = re.compile(r"(19|20)\d\d_\d{6}")
"""Names of VOC's images: the year and a number."""

VOC_BORDER: RGB = (224, 224, 192)
"""Color of the outlines in VOC's label files."""

MOST_OPENED = 40
"""How many label files are opened to see whether they hold the classes of a published set."""

NO_CLASSES = {"void", "border", "ignore", "unlabeled", "unlabelled", "_background_", "__ignore__"}
"""Names in lists of classes that are no classes of VOC."""


def find_published(folder: Path) -> tuple[Layout, str] | None:
    """The first folder with the layout of Cityscapes or VOC, up to two folders below `folder`.

    Returns:
        the layout, and why the data in it are other data; empty if they are the published ones.
    """
    for root in (folder, *(path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))):
        if not os.path.isdir(root):
            continue
        for layout in (Layout("cityscapes", root), Layout("voc", root)):
            if not layout.missing():
                if layout.name == "voc":
                    layout = replace(layout, sbd=find_sbd(root, None))
                return layout, _differs(layout)
    return None


def draft_published(layout: Layout) -> Draft:
    """The draft of a published data set, whose layout says the rest."""
    content, known = LAYOUT_FOLDERS[layout.name], BUILT_IN[layout.name]
    draft = Draft(layout.root, layout.name, f"the {len(known)} classes that scores count")
    draft.keys["layout"] = layout.name, f"the folder holds {content}, so the official split is used"
    draft.notes.append(f"{layout.root} has the layout of {layout.name} ({content})")
    return draft


def _differs(layout: Layout) -> str:
    """Why a folder with a published layout holds other data; empty if it may be the published data."""
    return _differs_from_cityscapes(layout) if layout.name == "cityscapes" else _differs_from_voc(layout)


def _differs_from_cityscapes(layout: Layout) -> str:
    for name_list in find_names([layout.root]):
        if own := foreign_names(name_list, CITYSCAPES.names):
            return f"{name_list.path} names the class(es) {_listed(own)}, which Cityscapes does not have"
    images = sorted(path for path in layout.images.glob("*/*/*.*") if not path.name.startswith("."))
    places = sorted({path.parent.name for path in images})
    if images and not (
        any(CITYSCAPES_NAME.match(path.name) for path in images)
        or {*CITIES, *VALIDATION_CITIES, *TEST_CITIES} & set(places)
    ):
        return f"the folders of images ({_listed(places)}) are none of Cityscapes' cities"
    for path in _some([label for image in images if (label := layout.label_of(image))]):
        most = max(CITYSCAPES_IDS) + 2 if path.name.endswith(IDS_SUFFIX) else len(CITYSCAPES)
        values = _values(path)
        beyond = [value for value in values if not isinstance(value, int) or most <= value != IGNORE]
        if beyond:
            return f"{path} holds the value(s) {_listed(beyond)}, which Cityscapes does not have"
    return ""


def _differs_from_voc(layout: Layout) -> str:
    for name_list in find_names([layout.root]):
        own = [name for name in name_list.names if name.casefold() not in {*VOC.names, *NO_CLASSES}]
        if own:
            return f"{name_list.path} names the class(es) {_listed(own)}, which VOC does not have"
    images = sorted(path for path in layout.images.glob("*") if not path.name.startswith("."))
    if images and not any(VOC_NAME.fullmatch(path.stem) for path in images):
        return f"the images are not named like VOC's (2007_000032), for example {images[0].name}"
    labels = [label for image in images if (label := layout.label_of(image)) and label.suffix == ".png"]
    for path in _some(labels):
        values, colors = _values(path), palette_of(path)
        if isinstance(values, set):
            if foreign := values - {*VOC.colors, VOC_BORDER}:
                return f"{path} has the color(s) {_listed(sorted(map(list, foreign)))}, which are not VOC's"
            continue
        beyond = [value for value in values if value >= len(VOC) and value != IGNORE]
        if beyond:
            return f"{path} holds the value(s) {_listed(beyond)}, which VOC does not have"
        # A palette of grays says nothing about the classes.
        named = [
            value for value in values if value < min(len(VOC), len(colors)) and len(set(colors[value])) > 1
        ]
        other = [list(colors[value]) for value in named if colors[value] != VOC.colors[value]]
        if other:
            return f"the palette of {path} has the color(s) {_listed(other)}, which are not VOC's"
    return ""


def _values(path: Path) -> list[int] | set[RGB]:
    """The values of a label file, or its colors; no values if it cannot be read."""
    try:
        raw = decode_label(path, "auto")
    except DataError:
        return []
    values = np.unique(raw[raw >= 0]).tolist()
    return values if raw.dtype != np.int32 else {(key >> 16, key >> 8 & 255, key & 255) for key in values}


def _some(paths: Sequence[Path]) -> Sequence[Path]:
    """At most MOST_OPENED of the paths, spread over them."""
    return paths[:: max(1, -(-len(paths) // MOST_OPENED))]


def _listed(items: Sequence[object], most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + (" …" if len(items) > most else "")
