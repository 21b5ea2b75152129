"""What is known of all images of a round, and which of them a filter lists."""

from __future__ import annotations

import math
import threading
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.errors import printable
from darseg.run.browse import LabeledRound, read_facts

PERCENT, UNIT = (0.0, 100.0), (0.0, 1.0)  # ranges that pass every image
SORTS = ("list", "id", "coverage", "confidence", "share")


@dataclass(frozen=True)
class Filter:
    """Which images are listed, and in which order.

    Attributes:
        class_index: only images with pixels of this class.
        share: of these pixels at least, in percent.
        of: what `share` counts: pixels of the "label" or of the "prediction".
        coverage: from, to: labeled share in percent.
        confidence: from, to: mean confidence, 0 to 1.
        marked: only images that are marked as bad.
        text: part of the id.
        sort: "list" (the order of the run), "id", "coverage", "confidence" or "share".
        down: whether the order is descending.
    """

    class_index: int | None = None
    share: float = 0.0
    of: str = "label"
    coverage: tuple[float, float] = PERCENT
    confidence: tuple[float, float] = UNIT
    marked: bool = False
    text: str = ""
    sort: str = "list"
    down: bool = False

    @classmethod
    def of_query(cls, query: Mapping[str, str], classes: int) -> Filter:
        """The filter of a query string. Raises ValueError."""
        return cls(
            class_index=_class_index(query.get("class", ""), classes),
            share=number(query.get("share") or "0"),
            of=_choice(query, "of", ("label", "prediction")),
            coverage=_range(query, "coverage", PERCENT),
            confidence=_range(query, "confidence", UNIT),
            marked=query.get("marked") == "1",
            text=query.get("text", ""),
            sort=_choice(query, "sort", SORTS),
            down=query.get("down") == "1",
        )


def _class_index(text: str, classes: int) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) >= classes:
        raise ValueError(f"class {text} does not exist; classes are 0 to {classes - 1}")
    return int(text)


def _range(query: Mapping[str, str], name: str, whole: tuple[float, float]) -> tuple[float, float]:
    low, high = query.get(f"{name}_from"), query.get(f"{name}_to")
    return number(low) if low else whole[0], number(high) if high else whole[1]


def _choice(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    """A value of the query, by default the first that is allowed."""
    value = query.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"{name} is {value}, but must be one of {', '.join(allowed)}")
    return value


class Table:
    """Facts of all images of a round, as columns. A thread fills it while the page lists the images.

    Attributes:
        pixels: int64 [N], of each image; 0 if not known.
        kept: int64 [N, K], pixels of each class in the pseudo label.
        predicted: int64 [N, K], pixels of each class in the prediction; -1 if not known.
        confidence: float64 [N], mean over the image; NaN if not known.
        left_out: bool [N], whether the round left the image out.
        read: bool [N], whether a row's facts are complete.
        unreadable: bool [N], whether the label map could not be read.
    """

    def __init__(self, round_: LabeledRound) -> None:
        count, classes = len(round_.samples), len(round_.classes)
        self.round = round_
        self.ids = [sample.id for sample in round_.samples]
        self.position = {name: at for at, name in enumerate(self.ids)}
        self.left_out = np.array([name in round_.excluded for name in self.ids])
        self.pixels = np.zeros(count, np.int64)
        self.kept = np.zeros((count, classes), np.int64)
        self.predicted = np.full((count, classes), -1, np.int64)
        self.confidence = np.full(count, np.nan)
        self.read = self.left_out.copy()
        self.unreadable = np.zeros(count, bool)
        self._folded = [_folded(name) for name in self.ids]
        self._rank = np.argsort(np.argsort(np.array(self.ids, object)))  # of each id in alphabetical order
        self._lock = threading.Lock()

    def fill(self, stop: threading.Event) -> None:
        """Read the facts of all images, until `stop` is set."""
        for at, facts in read_facts(self.round):
            if stop.is_set():
                return
            with self._lock:
                if facts is None:
                    self.unreadable[at] = True
                else:
                    self.pixels[at], self.kept[at] = facts.pixels, facts.kept
                    if facts.predicted is not None:
                        self.predicted[at] = facts.predicted
                    if facts.confidence is not None:
                        self.confidence[at] = facts.confidence
                self.read[at] = True

    def coverage(self) -> NDArray[np.float64]:
        """float64 [N]: labeled pixels of each image in percent; NaN if not known."""
        known = self.pixels > 0
        return np.where(known, 100 * self.kept.sum(1) / np.maximum(1, self.pixels), np.nan)

    def share(self, class_index: int, of: str) -> NDArray[np.float64]:
        """float64 [N]: pixels of a class in each image in percent; NaN if not known. of: as in Filter."""
        counts = (self.kept if of == "label" else self.predicted)[:, class_index]
        known = (self.pixels > 0) & (counts >= 0)
        return np.where(known, 100 * counts / np.maximum(1, self.pixels), np.nan)

    def select(self, wanted: Filter, marks: Mapping[str, float]) -> NDArray[np.int64]:
        """Positions of the images that pass a filter, in its order. An unknown value passes no bound."""
        with self._lock:
            coverage, share = self.coverage(), None
            passes = _inside(coverage, wanted.coverage, PERCENT)
            passes &= _inside(self.confidence, wanted.confidence, UNIT)
            if wanted.class_index is not None:
                share = self.share(wanted.class_index, wanted.of)
                passes &= (share > 0) & (share >= wanted.share)
            if wanted.marked:
                passes &= np.array([name in marks for name in self.ids])
            if wanted.text:
                part = _folded(wanted.text)
                passes &= np.array([part in name for name in self._folded])
            keys = {"id": self._rank, "coverage": coverage, "confidence": self.confidence, "share": share}
            positions = np.flatnonzero(passes)
            key = keys.get(wanted.sort)
            values = None if key is None else key[positions].astype(float)
        if values is None:
            return positions[::-1] if wanted.down else positions
        # What is not known comes last, in either direction.
        ordered = np.where(np.isnan(values), np.inf, -values if wanted.down else values)
        return positions[np.argsort(ordered, kind="stable")]

    def row(self, at: int, marks: Mapping[str, float], shares: Filter) -> dict[str, Any]:
        """An image as the list shows it. shares: which class share it shows."""
        class_index, pixels = shares.class_index, int(self.pixels[at])
        return {
            "index": at,
            "id": self.ids[at],
            "name": printable(self.ids[at]),
            "coverage": _plain(100 * int(self.kept[at].sum()) / pixels if pixels else math.nan),
            "confidence": _plain(self.confidence[at]),
            "share": None if class_index is None else _plain(self.share(class_index, shares.of)[at]),
            "bad": self.ids[at] in marks,
            "left_out": bool(self.left_out[at]),
            "unreadable": bool(self.unreadable[at]),
        }

    def percentages(self, counts: NDArray[np.int64], at: int) -> list[float] | None:
        """A row of `kept` or `predicted` in percent of the image; None if it is not known."""
        pixels = int(self.pixels[at])
        if not pixels or counts[at, 0] < 0:
            return None
        return [round(100 * int(count) / pixels, 3) for count in counts[at]]


def number(text: str) -> float:
    """A finite number. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a number")
    return value


def _inside(
    values: NDArray[np.float64], wanted: tuple[float, float], whole: tuple[float, float]
) -> NDArray[np.bool_]:
    """bool [N]: which values are in a range. The whole range passes NaN, too."""
    (low, high), (lowest, highest) = wanted, whole
    if low <= lowest and high >= highest:
        return np.ones(len(values), bool)
    return (values >= low) & (values <= high)


def _folded(text: str) -> str:
    """Text for searching: without case, and accents in one form (macOS separates them from letters)."""
    return unicodedata.normalize("NFC", text.casefold())


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
