"""Label files → classes: index, palette and color images, value maps, the ids of Cityscapes, SBD's .mat files."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from darseg.data.classes import CITYSCAPES, IGNORE, ClassSet
from darseg.data.images import JPEG_MARK, PNG_COLORS, is_png, open_with_pillow, read_bytes, read_whole
from darseg.errors import DataError, RecipeError, faults

RGB = tuple[int, int, int]

LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".mat")

UNKNOWN = 256
"""In lookup tables: no class and not 255."""

TRANSPARENT = -1
"""Among values and colors: the last entry of their lookup tables, not labeled."""

LARGEST = 65535
"""Of 16-bit label values."""

MAT_COMPRESSED = 15
"""Kind of a compressed part of a .mat file (miCOMPRESSED)."""

IDS_SUFFIX = "_labelIds.png"
"""Ends the names of Cityscapes' label maps that hold its 35 ids instead of the 19 train ids."""

TRAIN_IDS_SUFFIX = "_labelTrainIds.png"

# Cityscapes' id of each train id, from its published label table; all other ids are not evaluated.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class LabelEncoding:
    """How the values of a label file become classes.

    Attributes:
        format: "index": a single channel (or three equal ones) of values, or palette indices; "color": colors;
            "auto": gray and palette files are index, RGB files color.
        values: (value in the file, class or 255) for index files; None: values are the classes.
        other: what values that are not listed become; None: they are a fault.
        ignore: where `values` is None, the value besides 255 that is no class.
        colors: (color, class or 255) for color files.
        city_ids: files called *_labelIds.png hold Cityscapes' ids, files called *_labelTrainIds.png do not.
    """

    format: Literal["auto", "index", "color"] = "auto"
    values: tuple[tuple[int, int], ...] | None = None
    other: int | None = None
    ignore: int = IGNORE
    colors: tuple[tuple[RGB, int], ...] = ()
    city_ids: bool = False

    def for_file(self, path: Path) -> LabelEncoding:
        """This encoding, or that of Cityscapes' ids, or train ids, where the file's name says so."""
        if self.city_ids and path.name.endswith(IDS_SUFFIX):
            return CITY_IDS
        trained = self.city_ids and self.values is not None and path.name.endswith(TRAIN_IDS_SUFFIX)
        return PLAIN if trained else self


PLAIN = LabelEncoding()
"""Values are classes, 255 is not labeled: what darseg itself writes."""

CITY_IDS = LabelEncoding(values=tuple((value, k) for k, value in enumerate(CITYSCAPES_IDS)), other=IGNORE)


def label_encoding(
    classes: ClassSet,
    ignore: int = IGNORE,
    values: str | Mapping[int | str, int | str] = "index",
    format: Literal["auto", "index", "color"] = "auto",
    colors: Mapping[str, Sequence[Sequence[int]]] | None = None,
    own_colors: bool = True,
) -> LabelEncoding:
    """The encoding that a recipe describes.

    Args:
        values: value → class (name or index) or "ignore", where "other" stands for all else; or a name: "index" (values
            are classes), "one_based" (0 is not labeled, classes from 1 on), "binary" (0 and 255, or 1 in files of one
            bit), "cityscapes_ids".
        colors: class name or "ignore" → colors that stand for it, besides the classes' own.
        own_colors: the colors of `classes` are those of the label files.

    Raises RecipeError naming what does not fit.
    """
    count, wrong = len(classes), []

    def target(name: int | str, where: str) -> int:
        if name == "ignore":
            return IGNORE
        if type(name) is int and 0 <= name < count:
            return name
        if name in classes.names:
            return classes.names.index(str(name))
        wrong.append(f"{where}: {name!r} is neither a class nor ignore; classes: {', '.join(classes.names)}")
        return IGNORE

    pairs: tuple[tuple[int, int], ...] | None = None
    other = None
    if isinstance(values, Mapping):
        listed = {value: target(name, f"data.label_values.{value}") for value, name in values.items()}
        other = listed.pop("other", None)
        pairs = tuple(sorted((int(value), k) for value, k in listed.items()))
    elif values == "one_based":
        pairs = ((0, IGNORE), (IGNORE, IGNORE), *((k + 1, k) for k in range(count)))
    elif values == "binary":
        pairs = ((0, 0), (1, 1), (255, 1))
        if count != 2:
            wrong.append(f"data.label_values: binary has 2 classes, the recipe has {count}")
    elif values == "cityscapes_ids":
        pairs, other = CITY_IDS.values, CITY_IDS.other
        if count != len(CITYSCAPES_IDS):
            wrong.append(f"data.label_values: cityscapes_ids has 19 classes, the recipe has {count}")
    elif values != "index":
        wrong.append(
            f"data.label_values: {values!r} is no value map, nor index, one_based, binary or cityscapes_ids"
        )
    if pairs is not None and ignore != IGNORE:
        wrong.append("data.ignore: has no meaning beside data.label_values; say value: ignore there")
    if pairs is None and not count <= ignore <= IGNORE:
        wrong.append(
            f"data.ignore: the value {ignore} lies among the class values 0..{count - 1} or above 255: choose one "
            f"from {count} to 255"
        )
    meanings: dict[RGB, list[int]] = {}
    if own_colors:
        for k, color in enumerate(classes.colors):
            meanings.setdefault(color, []).append(k)
    for name, several in (colors or {}).items():
        k = target(name, "data.label_colors")
        for red, green, blue in several:
            meanings.setdefault((red, green, blue), []).append(k)
    # Where files of values are expected, a color of two classes may be meant for drawing alone; it is not read.
    table = {color: several[0] for color, several in meanings.items() if len(set(several)) == 1}
    if format == "color" or colors:
        for color, several in meanings.items():
            if color not in table:
                named = " and ".join("ignore" if k == IGNORE else classes.names[k] for k in several)
                wrong.append(f"data.classes, data.label_colors: {named} have one color, {list(color)}")
    if wrong:
        raise RecipeError(faults("The labels cannot be read so", wrong))
    return LabelEncoding(
        format,
        pairs,
        other,
        ignore,
        tuple(sorted(table.items())),
        city_ids=values in ("index", "cityscapes_ids") and classes.names == CITYSCAPES.names,
    )


def read_label(path: Path | str, encoding: LabelEncoding = PLAIN) -> np.ndarray:
    """A label file as uint8 [H, W] of classes, 255 = not labeled.

    PNG, BMP and TIFF, one channel of up to 16 bits, palette or color, and SBD's .mat files. Where an alpha channel
    is 0 a pixel is not labeled. Where the values are the classes (`values` None) they are not compared with a
    number of classes; `unknown_values` does.

    Raises DataError where it is missing, cannot be decoded, or holds values or colors that are no class.
    """
    path = Path(path)
    encoding = encoding.for_file(path)
    return to_classes(decode_label(path, encoding.format), encoding, path)


def decode_label(path: Path, format: str) -> np.ndarray:
    """What a label file holds: values uint8 or uint16 [H, W], or colors int32 [H, W] (R·65536 + G·256 + B).

    Of a file with an alpha channel the values are int16; transparent values and colors are TRANSPARENT.
    """
    if path.suffix.lower() == ".mat":
        return _sbd(path, read_bytes(path))
    data = read_whole(path)
    if data.startswith(JPEG_MARK):
        raise DataError(
            f"{path}: found a JPEG; its compression changes label values. Give the original label maps, as PNG."
        )
    if is_png(data):
        depth, kind = data[24], PNG_COLORS.get(data[25], "unknown")
        if kind == "gray" and format != "color":
            # Decoders stretch 1, 2 and 4 bits to 0..255: class 1 would become 255.
            values = _decode_gray(path, data)
            return values // np.uint8(255 // (2**depth - 1)) if depth < 8 else values
        if depth == 16 and kind != "gray":
            raise DataError(f"{path}: found a 16-bit {kind} PNG; 16-bit labels have one channel of values.")
    try:
        image, bits = open_with_pillow(data)
        image.load()
    except Exception as error:  # Pillow's readers fail in many ways on damaged files
        error = "its kind is not known" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{path}: cannot be decoded as a label map ({error}). PNG, BMP, TIFF and SBD's .mat files are read."
        ) from None
    return _from_pillow(image, bits, format, path)


def _decode_gray(path: Path, data: bytes) -> np.ndarray:
    try:
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    if values is None or values.ndim != 2:
        raise DataError(f"{path}: cannot be decoded. Remove or replace it.")
    return values


def _from_pillow(image: Image.Image, bits: int, format: str, path: Path) -> np.ndarray:
    if image.mode == "P" and format == "color":
        image.info.pop("transparency", None)
        image = image.convert("RGB")
    mode = image.mode
    if mode in ("1", "L", "P", "I;16", "I;16B", "I", "LA") and format == "color":
        raise DataError(
            f"{path}: found one channel of values, and data.label_format is color. Set it to index, or to auto."
        )
    if mode == "1":
        return np.asarray(image).astype(np.uint8)
    if mode in ("L", "P"):
        values = np.asarray(image)
        return values // np.uint8(255 // (2**bits - 1)) if mode == "L" and bits < 8 else values  # as in PNGs
    if mode in ("I;16", "I;16B", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > LARGEST:
            raise DataError(f"{path}: values {values.min()} to {values.max()}; 0 to {LARGEST} are read.")
        return values.astype(np.uint16)
    if mode == "LA":
        values, alpha = np.moveaxis(np.asarray(image), 2, 0)
        return np.where(alpha == 0, np.int16(TRANSPARENT), values)
    if mode in ("RGB", "RGBA") and bits > 8:
        raise DataError(f"{path}: found colors of {bits} bits; 16-bit labels have one channel of values.")
    if mode not in ("RGB", "RGBA"):
        raise DataError(f"{path}: found pixels of kind {mode}; wanted are indices, a palette or RGB colors.")
    pixels = np.asarray(image)
    transparent = pixels[..., 3] == 0 if mode == "RGBA" else None
    if format == "index":
        if not (pixels[..., 0] == pixels[..., 1]).all() or not (pixels[..., 0] == pixels[..., 2]).all():
            raise DataError(
                f"{path}: found colors, and data.label_format is index. Set it to color, with the colors of the "
                "classes (data.classes: {name: [red, green, blue]})."
            )
        values = pixels[..., 0]
        return values if transparent is None else np.where(transparent, np.int16(TRANSPARENT), values)
    keys = pixels[..., 0].astype(np.int32)
    for channel in (1, 2):
        keys <<= 8
        keys |= pixels[..., channel]
    if transparent is not None:
        keys[transparent] = TRANSPARENT
    return keys


def _sbd(path: Path, data: bytes) -> np.ndarray:
    """The class map of SBD (Hariharan et al., ICCV 2011): struct GTcls, field Segmentation."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f'{path}: reading .mat files needs scipy ({error}). Install it with: pip install "darseg[sbd]".'
        ) from error
    try:
        _check_mat(data)
        found: Any = loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0]
        if found.ndim != 2 or found.dtype.kind not in "ui" or found.min() < 0 or found.max() > IGNORE:
            raise ValueError(f"{found.dtype} of shape {found.shape}")
    except Exception as error:  # scipy's reader fails in many ways on damaged files
        raise DataError(
            f"{path}: no class map of SBD (GTcls.Segmentation) can be read from it ({type(error).__name__}: {error}). "
            "Give the files of benchmark_RELEASE/dataset/cls, and copy them again where one is damaged."
        ) from error
    return np.ascontiguousarray(found, dtype=np.uint8)


def _check_mat(data: bytes) -> None:
    """Raise where a part of a .mat file (MATLAB 5) is cut off or damaged: scipy has crashed on such."""
    order: Literal["little", "big"] = "big" if data[126:128] == b"MI" else "little"
    at = 128
    while at < len(data):
        kind, size = (int.from_bytes(data[place : place + 4], order) for place in (at, at + 4))
        part = data[at + 8 : at + 8 + size]
        if len(part) < size:
            raise ValueError("the file is truncated")
        if kind == MAT_COMPRESSED:
            zlib.decompress(part)  # compares its checksum
        at += 8 + size


@lru_cache(maxsize=8)
def _value_table(encoding: LabelEncoding) -> np.ndarray:
    """uint16 [65537]: class, 255 or UNKNOWN of each value."""
    table = np.full(LARGEST + 2, UNKNOWN if encoding.other is None else encoding.other, np.uint16)
    table[TRANSPARENT] = IGNORE
    if encoding.values is None:
        table[:256] = np.arange(256)
        table[encoding.ignore] = IGNORE
    else:
        for value, k in encoding.values:
            table[value] = k
    return table


@lru_cache(maxsize=2)
def _color_table(colors: tuple[tuple[RGB, int], ...]) -> np.ndarray:
    """uint16 [2^24 + 1]: class, 255 or UNKNOWN of each color."""
    table = np.full(256**3 + 1, UNKNOWN, np.uint16)
    table[TRANSPARENT] = IGNORE
    for (red, green, blue), k in colors:
        table[red << 16 | green << 8 | blue] = k
    return table


def to_classes(raw: np.ndarray, encoding: LabelEncoding, path: Path) -> np.ndarray:
    """Classes uint8 [H, W] of what `decode_label` found. Raises DataError for what is no class."""
    if raw.dtype == np.int32:
        if not encoding.colors:
            raise DataError(f"{path}: found colors, but the classes have none. {_color_advice(raw)}")
        classes = _color_table(encoding.colors)[raw]
    elif raw.dtype == np.uint8 and encoding.values is None:
        if encoding.ignore == IGNORE:
            return raw
        return np.where(raw == encoding.ignore, np.uint8(IGNORE), raw)
    else:
        classes = _value_table(encoding)[raw]
    unknown = classes == UNKNOWN
    if not unknown.any():
        return classes.astype(np.uint8)
    values, counts = np.unique(raw[unknown], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:8]
    if raw.dtype == np.int32:
        listed = [f"{list(_rgb(int(values[i])))} ({counts[i]} pixels)" for i in order]
        advice = _color_advice(raw)
        what = "colors"
    else:
        listed = [f"{values[i]} ({counts[i]} pixels)" for i in order]
        advice = "Add them to data.label_values (value: class or ignore, or other: ignore)."
        what = "values"
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    raise DataError(f"{path}: label {what} that stand for no class: {', '.join(listed)}{more}. {advice}")


def _rgb(key: int) -> RGB:
    return key >> 16, key >> 8 & 255, key & 255


def _color_advice(raw: np.ndarray) -> str:
    if ((raw >> 16 == raw & 255) & (raw >> 8 & 255 == raw & 255))[raw >= 0].all():
        return "All three channels are equal, so this is an index map saved as RGB: set data.label_format: index."
    return (
        "Give the classes their colors (data.classes: {name: [red, green, blue]}), and list colors of pixels that "
        "are not labeled: data.label_colors: {ignore: [[0, 0, 0]]}."
    )


def unknown_values(values: np.ndarray, count: int) -> str | None:
    """A fault line for label values that are none of `count` classes, from how often each occurs, int64 [256]."""
    unknown = [value for value in np.flatnonzero(values).tolist() if value >= count and value != IGNORE]
    if not unknown:
        return None
    listed = ", ".join(f"{value} ({values[value]} pixels)" for value in unknown[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (
        f"label values outside the classes 0..{count - 1} and 255, not labeled: {listed}{more}. "
        "Set data.ignore or data.label_values, or add the classes"
    )


def usual_mistakes(seen: Iterable[int], classes: ClassSet, encoding: LabelEncoding) -> list[str]:
    """What the values of all index label files together look like, where that is a usual mistake, and the key to set.

    Args:
        seen: every value that occurs in the files, before any map.
    """
    if encoding.values is not None:
        return []
    count = len(classes)
    values = set(seen)
    real = values - {encoding.ignore}
    unknown = {value for value in real if value >= count and value != IGNORE}
    if values == {0, 255} and encoding.ignore == IGNORE:
        remedy = (
            "data.label_values: binary"
            if count == 2
            else f"data.label_values: {{0: {classes.names[0]}, 255: …}}"
        )
        return [
            "the labels hold 0 and 255 alone, as masks do, and 255 is read as not labeled, so that only "
            f"{classes.names[0]} would be learned. If 255 is a class, set {remedy}"
        ]
    if not unknown:
        if count > 1 and 0 not in values and real:
            return [
                f"no label holds the value 0 ({classes.names[0]}). If classes are counted from 1, set "
                "data.label_values: one_based"
            ]
        return []
    grays = {_gray(color): "ignore" if k == IGNORE else classes.names[k] for color, k in encoding.colors}
    if len(real) > 1 and all(value in grays or value in (0, IGNORE) for value in real):
        names = ", ".join(f"{value} as {grays[value]}" for value in sorted(unknown) if value in grays)
        return [
            f"the label values are the grays of the class colors ({names}): color labels that were read or saved as "
            "gray. Give the color files themselves (data.label_format: color), or map the grays in data.label_values"
        ]
    if unknown == {count}:
        return [
            f"the label values go one beyond the last class: if 0 is not labeled and classes are counted from 1, set "
            f"data.label_values: one_based; if {count} is not labeled, set data.ignore: {count}"
        ]
    city = classes.names == CITYSCAPES.names or (count == len(CITYSCAPES_IDS) and len(real) > count + 1)
    if city and max(unknown) <= max(CITYSCAPES_IDS):
        return ["the label values look like the ids of Cityscapes: set data.label_values: cityscapes_ids"]
    if len(real) <= count + 1 and len(unknown) >= len(real - unknown):
        listed = ", ".join(f"{value}: …" for value in sorted(values))
        return [
            f"the labels hold {len(values)} values in all; say which class each is: data.label_values: {{{listed}}} "
            "(a class name, its index, or ignore)"
        ]
    return []


def _gray(color: RGB) -> int:
    """The gray that colors become in OpenCV and Pillow (ITU-R 601)."""
    red, green, blue = color
    return round(0.299 * red + 0.587 * green + 0.114 * blue)
