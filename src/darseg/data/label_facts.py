"""What label files hold besides classes: unknown values, palettes, alpha; counted and judged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from darseg.data.alpha import AlphaCounts, alpha_line
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.encoding import AS_DRAWN, CITY_IDS, NEAREST, RGB, LabelEncoding
from darseg.data.labels import RawLabel, read_raw
from darseg.data.resized import interpolation_lines
from darseg.data.strays import (
    MOST_OPENED,
    PHOTO_SHARE,
    Content,
    Shapes,
    Stray,
    describe,
    find_strays,
    name_value,
    spread,
)
from darseg.data.tables import (
    UNKNOWN,
    color_table,
    colors_against_values,
    is_ramp,
    nearest_classes,
    value_table,
)
from darseg.errors import DataError

MOST_PIXELS = 40_000_000
"""Pixels that are looked at again to judge values: some seconds."""

MOST_UNKNOWN = 1000
"""Unknown values of a file that are kept, the most frequent."""

MOST_SHOWN = 6
"""Values and palettes that a line lists."""


@dataclass(frozen=True)
class FileFacts:
    """What one label file holds besides classes.

    Attributes:
        values: the values that occur; empty for colors.
        unknown: value or color that is no class → pixels.
        left_out: pixels whose value is not listed and becomes "not labeled" by `other`.
        near: pixels whose color is not listed and becomes the nearest class by `other: nearest`.
        palette: (value, color) of the values that occur; empty if there is no palette or it is a ramp of grays.
        by_color: colors and values contradict each other, and the file is read by color.
        contradicts: they do, and not all colors are known.
        fault: what is wrong with the file, if its values are to blame; left out if the unknown values are explained.
    """

    path: Path
    encoding: LabelEncoding
    colored: bool
    size: int
    values: tuple[int, ...] = ()
    unknown: Mapping[int, int] = field(default_factory=dict)
    left_out: int = 0
    near: int = 0
    alpha: AlphaCounts | None = None
    palette: tuple[tuple[int, RGB], ...] = ()
    by_color: bool = False
    contradicts: bool = False
    fault: str = ""


def file_facts(raw: RawLabel, encoding: LabelEncoding, path: Path, *, count: int) -> FileFacts:
    """What a label file holds besides its classes, whose number is `count`."""
    as_drawn = encoding.transparent == AS_DRAWN and raw.drawn is not None
    values = raw.drawn if as_drawn and raw.drawn is not None else raw.values
    colored = values.dtype == np.int32
    palette: tuple[tuple[int, RGB], ...] = ()
    table = None
    counts = np.empty(0, int) if colored else _counts(values)
    used = np.flatnonzero(counts)
    if raw.palette and not colored:
        table = colors_against_values(raw.palette, used, encoding)
        palette = used_colors(raw.palette, used.tolist())
    by_color = table is not None and not any(table[value] == UNKNOWN for value, _ in palette)
    unknown, left_out = ({}, 0) if table is not None else _unknown(values, encoding, count, counts=counts)
    near = 0
    if colored and left_out and encoding.other_color == NEAREST:
        near, left_out = left_out, _far(values, encoding)
        near -= left_out
    return FileFacts(
        path,
        encoding,
        colored,
        size=values.size,
        values=tuple(used.tolist()),
        unknown=unknown,
        left_out=left_out,
        near=near,
        alpha=AlphaCounts.of(raw),
        palette=palette,
        by_color=by_color,
        contradicts=table is not None and not by_color,
    )


def _counts(values: np.ndarray) -> np.ndarray:
    """Value → pixels, without transparent ones."""
    return np.bincount(values[values >= 0] if values.dtype.kind == "i" else values.reshape(-1))


def _far(values: np.ndarray, encoding: LabelEncoding) -> int:
    """The pixels whose color is not listed and clearly nearest to no class."""
    missing = values[color_table(encoding.colors, None, IGNORE)[values] == UNKNOWN]
    return int((nearest_classes(missing, encoding.colors) == IGNORE).sum())


def _unknown(
    values: np.ndarray, encoding: LabelEncoding, count: int, *, counts: np.ndarray
) -> tuple[dict[int, int], int]:
    """Values that are no classes → pixels, and the number of pixels that `other: ignore` leaves out."""
    if values.dtype == np.int32:
        if not encoding.colors:
            return {}, 0
        missing = values[color_table(encoding.colors, None, IGNORE)[values] == UNKNOWN]
        if encoding.other_color is not None:
            return {}, missing.size
        if not missing.size:
            return {}, 0
        names, counts = np.unique(missing, return_counts=True)
        pairs = zip(names.tolist(), counts.tolist(), strict=True)
        return dict(Counter(dict(pairs)).most_common(MOST_UNKNOWN)), 0
    present = np.flatnonzero(counts)
    if encoding.values is None:
        strange = present[(present >= count) & (present != IGNORE) & (present != encoding.ignore)]
    elif encoding.other is not None:
        listed = {value for value, _ in encoding.values}
        rest = [value for value in present.tolist() if value not in listed and value != IGNORE]
        return {}, 0 if encoding == CITY_IDS else int(counts[rest].sum())
    else:
        strange = present[value_table(encoding)[present] == UNKNOWN]
    return dict(zip(strange.tolist(), counts[strange].tolist(), strict=True)), 0


def open_fault(file: FileFacts, explained: Collection[int]) -> str:
    """The file's fault, unless its unknown values are explained; otherwise empty."""
    return "" if file.unknown and set(file.unknown) <= set(explained) else file.fault


@dataclass(frozen=True)
class Judgment:
    """Lines about all label files, and the values that are explained as strays."""

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    strays: frozenset[int]


def judge(facts: Sequence[FileFacts], classes: ClassSet) -> Judgment:
    """What is wrong or surprising with all label files together."""
    faults, warnings, notes = [], [], []
    explained: set[int] = set()
    by_encoding: dict[tuple[LabelEncoding, bool], list[FileFacts]] = defaultdict(list)
    for file in facts:
        by_encoding[file.encoding, file.colored].append(file)
    for (encoding, colored), group in by_encoding.items():
        strays = _strays(group, encoding, classes, colored=colored)
        if strays:
            total = sum(file.size for file in group)
            faults.append(_stray_fault(strays, group, classes, total=total))
            explained |= set(strays)
            if colored and len(strays) > MOST_SHOWN:  # the remedy is `other: nearest`
                explained |= {value for file in group for value in _near_a_class(file)}
        if not colored:
            faults += _palette_faults(group, encoding, classes)
            warnings += _palette_warnings(group, encoding)
            warnings += _mixed_masks(group, encoding, classes)
        if not colored and not strays:
            paths = [file.path for file in group if not (file.by_color or file.unknown)]
            warnings += interpolation_lines(paths, encoding.format)
    by_color = [file for file in facts if file.by_color]
    if by_color:
        notes.append(
            f"{len(by_color):,} of {len(facts):,} label files have a palette that numbers the classes' colors "
            f"differently than data.classes, for example {by_color[0].path}. They are read by color. "
            "If their values count, set data.label_format: index."
        )
    near = [file.near for file in facts if file.near]
    if near:
        share = sum(near) / max(1, sum(file.size for file in facts))
        notes.append(
            f"{sum(near):,} pixels ({share:.2%}) in {len(near):,} label files have colors that the recipe does not list. "
            "They are read as the class whose color is nearest (other: nearest)."
        )
    left_out, files = sum(file.left_out for file in facts), sum(file.left_out > 0 for file in facts)
    if left_out:
        share = left_out / max(1, sum(file.size for file in facts))
        notes.append(
            f"{left_out:,} pixels ({share:.2%}) in {files:,} label files have values or colors that the recipe does not "
            "list. They are read as not labeled (other)."
        )
    warnings += alpha_lines(facts)
    return Judgment(tuple(faults), tuple(warnings), tuple(notes), strays=frozenset(explained))


def _mixed_masks(group: Sequence[FileFacts], encoding: LabelEncoding, classes: ClassSet) -> list[str]:
    """Masks of 0 and 255 among masks of 0 and 1, whose 255 would not be labeled."""
    stretched = [file for file in group if file.values == (0, IGNORE)]
    plain = [file for file in group if 1 in file.values]
    both = any(1 in file.values and IGNORE in file.values for file in group)
    if encoding.values is not None or len(classes) != 2 or both or not stretched or not plain:
        return []
    first, second = classes.names
    return [
        f"{len(stretched):,} of {len(group):,} label files hold just 0 and {IGNORE}, for example {stretched[0].path}, "
        f"and others 0 and 1, for example {plain[0].path}. {IGNORE} is read as not labeled. If it means {second}, set "
        f"data.label_values: {{0: {first}, 1: {second}, {IGNORE}: {second}}}."
    ]


def _strays(
    group: Sequence[FileFacts], encoding: LabelEncoding, classes: ClassSet, *, colored: bool
) -> dict[int, Stray]:
    """The unknown values that are flaws of the files, not classes."""
    suspects = [file for file in group if file.unknown and _strange(file) < PHOTO_SHARE * file.size]
    if not suspects:
        return {}
    pixels: Counter[int] = Counter()
    files: Counter[int] = Counter()
    paths: dict[int, list[Path]] = defaultdict(list)
    for file in suspects:
        pixels.update(file.unknown)
        files.update(file.unknown.keys())
        for value in file.unknown:
            paths[value].append(file.path)
    shapes = look_again(spread(paths, MOST_OPENED), encoding, colored)
    known = known_values(encoding, classes, colored)
    rest = sum(file.size for file in group) - pixels.total()
    share = Counter({value: shapes.pixels[value] for value in known if shapes.pixels[value]})
    pixels.update({value: count * rest // max(1, share.total()) for value, count in share.items()})
    files.update(dict.fromkeys(share, len(group) + 1))
    content = Content(colored, pixels, files, file_count=len(group))
    return find_strays(content, shapes, known)


def _near_a_class(file: FileFacts) -> set[int]:
    """The unknown colors of a file that are clearly nearest to one class."""
    colors = np.array(list(file.unknown), np.int32)
    return set(colors[nearest_classes(colors, file.encoding.colors) != IGNORE].tolist())


def _strange(file: FileFacts) -> int:
    """The pixels of unknown values that are not clearly nearest to the color of a class."""
    near = _near_a_class(file) if file.colored else set()
    return sum(count for value, count in file.unknown.items() if value not in near)


def known_values(encoding: LabelEncoding, classes: ClassSet, colored: bool) -> list[int]:
    """The values or colors that are classes or not labeled, by the recipe."""
    if colored:
        return [red << 16 | green << 8 | blue for (red, green, blue), _ in encoding.colors]
    if encoding.values is None:
        return [*range(len(classes)), encoding.ignore, IGNORE]
    return [value for value, _ in encoding.values]


def look_again(paths: Iterable[Path], encoding: LabelEncoding, colored: bool) -> Shapes:
    """The shapes of the values in some files."""
    shapes, left = Shapes(), MOST_PIXELS
    for path in paths:
        if left <= 0:
            break
        try:
            raw = read_raw(path, encoding.format).values
        except DataError:
            continue
        if (raw.dtype == np.int32) == colored:
            shapes.add(raw, colored)
            left -= raw.size
    return shapes


def _stray_fault(
    strays: Mapping[int, Stray], group: Sequence[FileFacts], classes: ClassSet, *, total: int
) -> str:
    encoding, colored = group[0].encoding, group[0].colored
    remedy = _remedy(strays, encoding, classes, colored=colored)
    files = [file for file in group if set(file.unknown) & set(strays)]
    return (
        f"{len(files):,} of {len(group):,} label files hold values that are no classes, for example {files[0].path}: "
        f"{describe(strays.values(), colored, total)}. Make these files again without smoothing and with "
        f"nearest-neighbor resizing, or {remedy}."
    )


def _remedy(strays: Mapping[int, Stray], encoding: LabelEncoding, classes: ClassSet, *, colored: bool) -> str:
    """What to do with stray values: leave them out, or give them to the class that they surely belong to."""
    names = {IGNORE: "ignore", **dict(enumerate(classes.names))}
    sure = sorted(
        (
            stray
            for stray in strays.values()
            if stray.nearest is not None and stray.cause in ("near", "noise")
        ),
        key=lambda stray: -stray.pixels,
    )[:MOST_SHOWN]
    if colored:
        of_color = {red << 16 | green << 8 | blue: k for (red, green, blue), k in encoding.colors}
        groups: dict[str, list[str]] = defaultdict(list)
        for stray in sure:
            if stray.nearest in of_color:
                groups[names[of_color[stray.nearest]]].append(name_value(stray.value, colored=True))
        entries = [f"{name}: [{', '.join(group)}]" for name, group in groups.items()]
        if len(strays) > MOST_SHOWN:
            return "give each pixel to the class of the nearest color: data.label_colors: {other: nearest}"
        return f"leave the pixels unlabeled: data.label_colors: {{{', '.join([*entries, 'other: ignore'])}}}"
    if encoding.values is None:
        table = dict(enumerate(classes.names))
        if encoding.ignore != IGNORE:
            table[encoding.ignore] = "ignore"
    else:
        table = {value: names[k] for value, k in encoding.values}
    entries = [f"{value}: {name}" for value, name in table.items()]
    shown = [*entries[:MOST_SHOWN], *(["…"] if len(entries) > MOST_SHOWN else []), "other: ignore"]
    return f"leave the pixels unlabeled: data.label_values: {{{', '.join(shown)}}}"


def _palette_faults(group: Sequence[FileFacts], encoding: LabelEncoding, classes: ClassSet) -> list[str]:
    """Palettes that number the same colors differently, if colors do not say which class is meant."""
    remedy = (
        "If the colors count, give the classes all their colors (data.classes: {name: [red, green, blue]}, "
        "data.label_colors: {ignore: …}). If the values count, set data.label_format: index."
    )
    wrong = [file for file in group if file.contradicts]
    if wrong:
        own = ", ".join(
            f"{name} {list(color)}"
            for name, color in list(zip(classes.names, classes.colors, strict=True))[:8]
        )
        return [
            f"{len(wrong):,} of {len(group):,} label files have a palette that numbers colors differently than "
            f"data.classes, and holds colors of no class, for example {wrong[0].path}: {_table(wrong[0].palette)}. "
            f"The recipe has: {own}. {remedy}"
        ]
    clash = _clash(group, encoding)
    return [f"{clash.text} {remedy}"] if clash and clash.same_color else []


def _palette_warnings(group: Sequence[FileFacts], encoding: LabelEncoding) -> list[str]:
    """A value in several colors: the files may each number their own colors."""
    clash = _clash(group, encoding)
    if clash is None or clash.same_color:
        return []
    return [
        f"{clash.text} The values count, not the colors. If the colors count, set data.label_format: color and give the "
        "classes their colors."
    ]


def _clash(group: Sequence[FileFacts], encoding: LabelEncoding) -> Clash | None:
    if encoding.format == "index":
        return None
    return palette_clash(
        {
            file.path: file.palette
            for file in group
            if file.palette and not (file.by_color or file.contradicts)
        }
    )


@dataclass(frozen=True)
class Clash:
    """Two palettes that do not agree.

    Attributes:
        same_color: they number the same color differently; otherwise they give one value two colors.
    """

    same_color: bool
    text: str


Palette = Sequence[tuple[int, RGB]]
"""(value, color) of the values that occur in a file."""


def used_colors(palette: Sequence[RGB], used: Sequence[int]) -> tuple[tuple[int, RGB], ...]:
    """(value, color) of the values that occur in a file; empty if its palette tells no classes apart."""
    first = palette[: used[-1] + 1] if used else ()
    if len(first) <= (used[-1] if used else 0) or len(set(first)) < len(first) or is_ramp(tuple(palette)):
        return ()
    return tuple((value, palette[value]) for value in used)


def palette_clash(palettes: Mapping[Path, Palette]) -> Clash | None:
    """The first contradiction between the palettes of files, those about equal colors before others."""
    by_color: dict[RGB, tuple[int, Path]] = {}
    by_value: dict[int, tuple[RGB, Path]] = {}
    two_colors: Clash | None = None
    for path, palette in palettes.items():
        for value, color in palette:
            earlier, source = by_color.setdefault(color, (value, path))
            if earlier != value:
                return Clash(
                    True,
                    f"The palettes of the label files number the same colors differently. {source}: "
                    f"{_table(palettes[source])}. {path}: {_table(palette)}.",
                )
            former, place = by_value.setdefault(value, (color, path))
            if former != color and two_colors is None:
                two_colors = Clash(
                    False,
                    f"The value {value} has different colors in the palettes of the label files: {list(former)} in "
                    f"{place}, {list(color)} in {path}.",
                )
    return two_colors


def _table(palette: Sequence[tuple[int, RGB]]) -> str:
    listed = ", ".join(f"{value} is {list(color)}" for value, color in palette[:MOST_SHOWN])
    return listed + (" …" if len(palette) > MOST_SHOWN else "")


def alpha_lines(facts: Sequence[FileFacts]) -> list[str]:
    """A line about label files with transparent pixels, if there are any that nobody has given a meaning."""
    with_alpha = [file for file in facts if file.alpha and file.encoding.transparent == IGNORE]
    total = AlphaCounts()
    for file in with_alpha:
        total = total.plus(file.alpha or AlphaCounts())
    return [alpha_line(total, len(with_alpha), sum(file.size for file in facts))] if with_alpha else []
