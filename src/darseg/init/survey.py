"""Images and label files, read: sizes, values and colors, and what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from darseg.data.alpha import AlphaCounts
from darseg.data.encoding import LabelEncoding
from darseg.data.images import image_size
from darseg.data.label_facts import look_again, palette_clash, used_colors
from darseg.data.label_parts import Parts, join_parts
from darseg.data.labels import read_raw
from darseg.data.orientation import orientation_mark, upright_size
from darseg.data.strays import MAIN_SHARE, Content, Shapes, Stray, find_strays, spread
from darseg.data.tables import nearest_classes
from darseg.data.threads import in_threads
from darseg.errors import DataError
from darseg.init.discover import FoundImage
from darseg.init.names import RGB

MOST_COLORS = 255
"""Different values or colors of label maps; files with more are photographs, or drawings with smoothed edges."""


MOST_KEPT = 2000
"""Values or colors of a file that are kept, the most frequent."""

FEW, FEW_SHARE = 32, 0.7
"""The most frequent values of a label map hold at least this share of its pixels; those of a photograph do not."""


COMMON_SHARE = 0.01
"""Share of the pixels of a file that a color needs so that others may be flaws of it."""


@dataclass(frozen=True)
class LabelContent:
    """What one label file holds.

    Attributes:
        size: height and width.
        colors: whether it holds colors; otherwise values.
        pixels: value, or color as red · 65536 + green · 256 + blue → number of pixels.
        palette: colors of the values.
        alpha: pixels that are transparent, if any are.
    """

    size: tuple[int, int]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...] = ()
    alpha: AlphaCounts | None = None


@dataclass(frozen=True)
class Survey:
    """What all images and labels hold.

    Attributes:
        sizes: image → height and width.
        faults: file → what is wrong with it.
        colors, pixels: of all usable label files together, as in `LabelContent`, without what `strays` names.
        palette: the palette of the first label file that has one.
        strays: values or colors that are no classes.
        by_color: all files have palettes, which number colors differently, so that the colors count.
        alpha: pixels that are transparent, and `alpha_files` with such pixels.
        all_pixels: pixels of all usable label files.
        warnings: what a reader must look at.
    """

    sizes: Mapping[Path, tuple[int, int]]
    faults: Mapping[Path, str]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...]
    strays: Mapping[int, Stray] = field(default_factory=dict)
    by_color: bool = False
    alpha: AlphaCounts = field(default_factory=AlphaCounts)
    alpha_files: int = 0
    all_pixels: int = 0
    warnings: tuple[str, ...] = ()


def survey(images: Sequence[FoundImage], advance: Callable[[], object] = lambda: None) -> Survey:
    """Read every image and label file; `advance` is called after each image."""
    sizes: dict[Path, tuple[int, int]] = {}
    faults: dict[Path, str] = {}
    contents: dict[Path, LabelContent] = {}
    for image, (size, content) in zip(images, in_threads(_read, images), strict=True):
        if isinstance(size, str):
            faults[image.image] = size
        else:
            sizes[image.image] = size
        if image.label is not None and isinstance(content, str):
            faults[image.label] = content
        elif image.label is not None and isinstance(content, LabelContent):
            fitting = (
                (size, upright_size(size, orientation_mark(image.image))) if isinstance(size, tuple) else ()
            )
            if isinstance(size, tuple) and content.size not in fitting:
                faults[image.label] = (
                    f"{image.label}: the label has {content.size[0]}x{content.size[1]} pixels, but its image "
                    f"{image.image} has {size[0]}x{size[1]} (height x width)"
                )
            else:
                contents[image.label] = content
        advance()
    palettes = _Palettes.of(contents)
    if palettes.all_by_color:
        contents = {path: _in_colors(content) for path, content in contents.items()}
    colors = sum(content.colors for content in contents.values()) * 2 > len(contents)
    for path, content in contents.items():
        if content.colors != colors:
            kinds = ("values", "colors")
            faults[path] = (
                f"{path} holds {kinds[content.colors]}, but most label files hold {kinds[colors]}. Convert it"
            )
    contents = {path: content for path, content in contents.items() if content.colors == colors}
    return replace(
        _summed(contents, colors, by_color=palettes.all_by_color),
        sizes=sizes,
        faults=faults,
        warnings=palettes.warnings,
    )


def _summed(contents: Mapping[Path, LabelContent], colors: bool, *, by_color: bool) -> Survey:
    """All usable label files together; values that are no classes are told apart."""
    pixels: Counter[int] = Counter()
    files: Counter[int] = Counter()
    paths: dict[int, list[Path]] = defaultdict(list)
    alpha = AlphaCounts()
    for path, content in contents.items():
        pixels.update(content.pixels)
        files.update(content.pixels.keys())
        alpha = alpha.plus(content.alpha) if content.alpha else alpha
        for value in content.pixels:
            paths[value].append(path)
    total = pixels.total()
    rare = {
        value: paths[value]
        for value in sorted(pixels, key=lambda value: pixels[value])
        if pixels[value] < MAIN_SHARE * total
    }
    encoding = LabelEncoding(format="color" if by_color else "auto")
    strays = {}
    if rare:
        shapes = look_again(spread(rare), encoding, colors)
        strays = find_strays(Content(colors, pixels, files, file_count=len(contents)), shapes)
    return Survey(
        sizes={},
        faults={},
        colors=colors,
        pixels={value: count for value, count in pixels.items() if value not in strays},
        palette=next((content.palette for content in contents.values() if content.palette), ()),
        strays=strays,
        by_color=by_color,
        alpha=alpha,
        alpha_files=sum(content.alpha is not None for content in contents.values()),
        all_pixels=sum(content.size[0] * content.size[1] for content in contents.values()),
    )


@dataclass(frozen=True)
class _Palettes:
    """Whether the palettes of label files number colors differently, and what to say about it."""

    all_by_color: bool = False
    warnings: tuple[str, ...] = ()

    @staticmethod
    def of(contents: Mapping[Path, LabelContent]) -> _Palettes:
        """Compare the palettes of all files.

        Raises DataError, with both palettes, if some number colors differently and others have no palette.
        """
        tables = {
            path: table
            for path, content in contents.items()
            if (table := used_colors(content.palette, sorted(content.pixels)))
        }
        clash = palette_clash(tables)
        if not clash:
            return _Palettes()
        if clash.same_color and len(tables) < len(contents):
            other = next(path for path in contents if path not in tables)
            raise DataError(
                f"{clash.text} {len(contents) - len(tables):,} label files have no such palette, for example {other}, so "
                "neither values nor colors say which class is meant. Export all label maps with one numbering."
            )
        if not clash.same_color:
            return _Palettes(False, (f"{clash.text} The values were taken for the classes, not the colors",))
        return _Palettes(True, (f"{clash.text} So the colors were taken for the classes, not the values",))


def _in_colors(content: LabelContent) -> LabelContent:
    """A label of palette indices as the colors that they stand for."""
    pixels: Counter[int] = Counter()
    for value, count in content.pixels.items():
        red, green, blue = content.palette[value]
        pixels[red << 16 | green << 8 | blue] += count
    return replace(content, colors=True, pixels=pixels, palette=())


def _read(image: FoundImage) -> tuple[tuple[int, int] | str, LabelContent | str | None]:
    """The image's size and the label's content; a text is what is wrong with the file."""
    try:
        size: tuple[int, int] | str = image_size(image.image)
    except DataError as error:
        size = str(error)
    try:
        if image.parts is not None:
            return size, _content_of_masks(image.parts)
        return size, read_label_content(image.label) if image.label else None
    except DataError as error:
        return size, str(error)


def _content_of_masks(parts: Parts) -> LabelContent:
    """Classes of a label map that is several masks. Raises DataError if these cannot be joined."""
    classes = join_parts(parts).classes
    counts = np.bincount(classes.reshape(-1), minlength=256).tolist()
    height, width = classes.shape
    return LabelContent((height, width), False, {k: count for k, count in enumerate(counts) if count})


def read_label_content(path: Path) -> LabelContent:
    """Values or colors of a label file. Raises DataError if it cannot be a label map of classes."""
    raw = read_raw(path, "auto")
    colors = raw.values.dtype == np.int32
    if colors:
        values, counts = np.unique(raw.values, return_counts=True)
    else:
        counted = np.bincount(raw.values[raw.values >= 0])
        values = np.flatnonzero(counted)
        counts = counted[values]
    if len(values) > MOST_COLORS:
        _refuse_photographs(path, raw.values, counts, colors=colors)
    pixels = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value >= 0}
    pixels = dict(Counter(pixels).most_common(MOST_KEPT))
    height, width = raw.values.shape
    palette = () if colors else raw.palette
    return LabelContent((height, width), colors, pixels, palette=palette, alpha=AlphaCounts.of(raw))


def _refuse_photographs(path: Path, raw: np.ndarray, counts: np.ndarray, *, colors: bool) -> None:
    """Raise DataError for a file of many values, unless few of them hold nearly all pixels."""
    few = np.sort(counts)[-FEW:].sum() / raw.size
    if colors:  # JPEG spreads the colors of a label map over many, which are near them
        values = np.unique(raw)
        frequent = values[(counts >= COMMON_SHARE * raw.size) & (values >= 0)]
        known = [((value >> 16, value >> 8 & 255, value & 255), 0) for value in frequent.tolist()]
        few = max(few, float(counts[nearest_classes(values, known) == 0].sum() / raw.size))
    shapes = Shapes()
    shapes.add(raw, colors)
    solid = sum(shapes.share(shapes.blocks, value) >= 0.5 for value in shapes.pixels)
    if few < FEW_SHARE or solid > MOST_COLORS:
        raise DataError(
            f"{path} holds {len(counts)} different {'colors' if colors else 'values'}, so it is a photograph, shows "
            "instances, or has smoothed edges. Export it again, without smoothing and with one value per class"
        )


def palette_of(path: Path) -> tuple[RGB, ...]:
    """The palette of a label file; empty if it has none."""
    try:
        return read_raw(path, "auto").palette
    except DataError:
        return ()
