"""Values of label files that are no classes: smoothed edges, JPEG, single pixels, near colors.

A value or color is judged by how rare it is, by the shape of its regions, and by its neighbors:

- *edge*: at least half of its pixels lie in steps of at most 3 pixels from one value to another, with a value between
  the two; smoothing (anti-aliasing) and resizing with interpolation make such pixels.
- *speck*: at least half of its pixels have no equal neighbor, and it occurs in few files.
- *noise*: it is one of at least 8 values whose pixels hardly form blocks of 2x2; JPEG leaves such values.
- *near*: a color that differs from a much more frequent one by at most 8 in each channel and occurs in fewer files.

Whatever else occurs is a class, however rare it is: its regions are compact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAIN_SHARE = 0.05
"""A value with at least this share of the pixels is a class, whatever its shape."""

LONGEST_STEP = 3
"""Pixels of one value in a step from one value to another; smoothing and resizing make steps of 1 to 3 pixels."""

MOST_SPECKS = 0.1
"""Share of the files in which single pixels may occur and still be slips: a class of points occurs in more."""

EDGE_VALUES = 3
"""Smoothing leaves several values in steps. A single one in many files may be a class of outlines."""

NOISE_VALUES = 8
"""As many loose values are noise: so many classes of loose pixels do not exist together."""
NOISE_SHARE, NOISE_SCATTERED = 0.005, 0.4
"""A value of loose pixels is noise only if it has at most this share of all pixels, or if so many are steps or single."""

NEAR_COLOR, NEAR_TIMES = 8, 4
"""Largest difference in a channel, and how much more frequent the other color is."""

SURE_DISTANCE, SURE_TIMES = 16, 3
"""A stray value belongs to the nearest class if it is this near, and every other class is this many times as far."""

MOST_OPENED = 48
"""Files that are looked at again to judge values."""

PHOTO_SHARE = 0.3
"""A file of which so many pixels hold unknown values is no label map with flaws, but something else."""


@dataclass
class Shapes:
    """What the pixels of each value look like, counted over some files: value → pixels."""

    pixels: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    single: Counter[int] = field(default_factory=Counter)
    blocks: Counter[int] = field(default_factory=Counter)

    def add(self, raw: NDArray[np.integer], colored: bool) -> None:
        """Count a file: values [H, W], or colors as R·65536 + G·256 + B."""
        values, index = np.unique(raw, return_inverse=True)
        index = index.reshape(raw.shape)
        names = values.tolist()
        single = _single(raw)
        masks = {
            "pixels": np.ones(raw.shape, bool),
            "steps": steps_between(raw, colored) & ~single,
            "single": single,
            "blocks": _blocks(raw),
        }
        for name, mask in masks.items():
            counts = np.bincount(index[mask], minlength=len(names)).tolist()
            getattr(self, name).update(dict(zip(names, counts, strict=True)))

    def share(self, kind: Counter[int], value: int) -> float:
        """The share of a value's pixels that are of a kind (`steps`, `single` or `blocks`)."""
        return kind[value] / self.pixels[value] if self.pixels[value] else 0.0

    def scattered(self, value: int) -> float:
        """The share of a value's pixels that are single or lie in steps."""
        return self.share(self.steps, value) + self.share(self.single, value)


def _runs(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of runs of equal values along the rows, in the flattened array."""
    height, width = raw.shape
    begins = np.ones((height, width), bool)
    begins[:, 1:] = raw[:, 1:] != raw[:, :-1]
    starts = np.flatnonzero(begins)
    return starts, np.diff(np.append(starts, height * width))


def steps_between(raw: np.ndarray, colored: bool = False) -> np.ndarray:
    """bool [H, W]: short runs, along rows or columns, whose value lies between the values on both sides."""
    return _steps(raw, colored) | _steps(raw.T, colored).T


def _steps(raw: np.ndarray, colored: bool) -> np.ndarray:
    """bool [H, W]: short runs along the rows whose value lies between the values on both sides."""
    width = raw.shape[1]
    flat = np.ascontiguousarray(raw).reshape(-1)
    starts, lengths = _runs(raw)
    ends = starts + lengths
    inner = (starts % width > 0) & (ends % width > 0) & (lengths <= LONGEST_STEP)
    starts_in, lengths_in = starts[inner], lengths[inner]
    left, here, right = flat[starts_in - 1], flat[starts_in], flat[starts_in + lengths_in]
    between = (left != right) & (left >= 0) & (right >= 0) & (here >= 0)
    for shift in (16, 8, 0) if colored else (None,):
        a, b, c = ((part if shift is None else part >> shift & 255) for part in (left, here, right))
        between &= (np.minimum(a, c) <= b) & (b <= np.maximum(a, c))
    marked = np.zeros(len(starts), bool)
    marked[np.flatnonzero(inner)[between]] = True
    return np.repeat(marked, lengths).reshape(raw.shape)


def _single(raw: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels without an equal one among their eight neighbors."""
    height, width = raw.shape
    padded = np.full((height + 2, width + 2), np.iinfo(np.int64).min, np.int64)
    padded[1:-1, 1:-1] = raw
    single = np.ones(raw.shape, bool)
    for row in range(3):
        for column in range(3):
            if (row, column) != (1, 1):
                single &= padded[row : row + height, column : column + width] != raw
    return single


def _blocks(raw: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels of blocks of 2x2 equal pixels."""
    blocks = np.zeros(raw.shape, bool)
    corner = raw[:-1, :-1]
    equal = (corner == raw[1:, :-1]) & (corner == raw[:-1, 1:]) & (corner == raw[1:, 1:])
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            blocks[rows, columns] |= equal
    return blocks


@dataclass(frozen=True)
class Stray:
    """A value that is no class.

    Attributes:
        cause: "edge", "speck", "noise" or "near".
        nearest: the class value that it surely belongs to; None if that is not clear.
    """

    value: int
    cause: str
    pixels: int
    files: int
    nearest: int | None


@dataclass(frozen=True)
class Content:
    """What a set of label files holds: value → pixels and → files, of all files, and the shapes in some."""

    colored: bool
    pixels: Mapping[int, int]
    files: Mapping[int, int]
    file_count: int


def find_strays(content: Content, shapes: Shapes, known: Iterable[int] = ()) -> dict[int, Stray]:
    """Value → why it is no class, for the values that are none.

    Args:
        known: values that are classes, or not labeled, for certain.
    """
    total = max(1, sum(content.pixels.values()))
    certain = set(known)
    rare = [
        value
        for value, count in content.pixels.items()
        if value not in certain and count < MAIN_SHARE * total and shapes.pixels[value]
    ]
    main = (set(content.pixels) - set(rare)) | certain
    loose = [
        value
        for value in rare
        if shapes.share(shapes.blocks, value) < 0.5
        and (content.pixels[value] < NOISE_SHARE * total or shapes.scattered(value) >= NOISE_SCATTERED)
    ]
    noise = set(loose) if len(loose) >= NOISE_VALUES else set()
    in_steps = [value for value in rare if shapes.share(shapes.steps, value) >= 0.5]
    smoothed = len(in_steps) >= EDGE_VALUES
    causes: dict[int, str] = {}
    for value in rare:
        few = content.files[value] <= max(2, MOST_SPECKS * content.file_count)
        steps, single = shapes.share(shapes.steps, value), shapes.share(shapes.single, value)
        if steps >= 0.5 and (few or smoothed):
            causes[value] = "edge"
        elif value in noise:
            causes[value] = "noise"
        elif steps + single >= 0.5 and (few or (smoothed and steps > 0)):
            causes[value] = "speck"
        elif content.colored and _is_near(value, content):
            causes[value] = "near"
    if len(causes) >= NOISE_VALUES:
        causes |= _around(content, shapes, set(content.pixels) - certain - set(causes))
    classes = sorted((main | set(rare)) - set(causes))
    return {
        value: Stray(
            value,
            cause,
            pixels=content.pixels[value],
            files=content.files[value],
            nearest=None if cause == "speck" else _nearest(value, classes, content.colored),
        )
        for value, cause in causes.items()
    }


def distance(value: int, other: int, colored: bool) -> int:
    """How much two values differ; for colors the largest difference in a channel."""
    if not colored:
        return abs(value - other)
    return max(abs((value >> shift & 255) - (other >> shift & 255)) for shift in (16, 8, 0))


def _is_near(value: int, content: Content) -> bool:
    """Whether a color is nearly that of a much more frequent one, which occurs in more files."""
    return any(
        0 < distance(value, other, colored=True) <= NEAR_COLOR
        and content.pixels[other] >= NEAR_TIMES * content.pixels[value]
        and content.files[other] > content.files[value]
        for other in content.pixels
    )


def _around(content: Content, shapes: Shapes, values: Iterable[int]) -> dict[int, str]:
    """Values next to a much more frequent one: with so much noise, JPEG has changed whole areas."""
    most = (
        0.9 if content.colored else 0.5
    )  # the share in blocks: gray values next to each other may be classes
    return {
        value: "noise"
        for value in values
        if shapes.share(shapes.blocks, value) <= most or content.colored
        if any(
            0 < distance(value, other, content.colored) <= SURE_DISTANCE
            and content.pixels[other] >= NEAR_TIMES * content.pixels[value]
            for other in content.pixels
        )
    }


def _nearest(value: int, classes: Sequence[int], colored: bool) -> int | None:
    """The class value that a stray surely belongs to, if any."""
    ranked = sorted((distance(value, other, colored), other) for other in classes)
    if not ranked or ranked[0][0] > SURE_DISTANCE:
        return None
    clear = len(ranked) == 1 or ranked[1][0] >= SURE_TIMES * ranked[0][0]
    return ranked[0][1] if clear else None


def spread(paths: Mapping[int, Sequence], most: int = MOST_OPENED) -> list:
    """At most `most` files, so that each of the values is in one of them if possible: value → its files."""
    chosen: dict = {}
    depth = 0
    while len(chosen) < most and any(depth < len(group) for group in paths.values()):
        for group in paths.values():
            if depth < len(group) and len(chosen) < most:
                chosen[group[depth]] = None
        depth += 1
    return list(chosen)


CAUSES = {
    "edge": "lie in narrow steps between two others, as smoothing or resizing with interpolation leaves them",
    "speck": "are single pixels",
    "noise": "are scattered or next to a class, as JPEG compression or interpolation leaves them",
    "near": "are nearly the color of a class",
}
"""Cause → what the pixels are."""


def describe(strays: Iterable[Stray], colored: bool, total: int) -> str:
    """A line that counts stray values by their causes.

    Args:
        total: pixels of all label files.
    """
    by_cause: dict[str, list[Stray]] = {cause: [] for cause in CAUSES}
    for stray in strays:
        by_cause[stray.cause].append(stray)
    parts = []
    for cause, group in by_cause.items():
        if group:
            group.sort(key=lambda stray: -stray.pixels)
            pixels = sum(stray.pixels for stray in group)
            examples = ", ".join(name_value(stray.value, colored) for stray in group[:3])
            more = ", …" if len(group) > 3 else ""
            least = max(stray.files for stray in group)
            parts.append(
                f"{len(group)} {'color' if colored else 'value'}(s) ({examples}{more}; {pixels:,} pixels, "
                f"{pixels / max(1, total):.2%}, in at least {least} file(s)) {CAUSES[cause]}"
            )
    return "; ".join(parts)


def name_value(value: int, colored: bool) -> str:
    """A value, or a color as in a recipe."""
    return str([value >> 16, value >> 8 & 255, value & 255]) if colored else str(value)
