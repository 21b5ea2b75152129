"""An unknown folder → which files are images, which are their labels, what the values mean, what the classes are called.

Guesses, each with its reason; whoever uses them lets `examine` judge the result. Nothing is written.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from PIL import Image

from darseg.data.classes import BUILT_IN, IGNORE
from darseg.data.encoding import IDS_SUFFIX, TRAIN_IDS_SUFFIX
from darseg.data.images import IMAGE_SUFFIXES, image_size
from darseg.data.labels import LABEL_SUFFIXES, decode_label
from darseg.data.video import VIDEO_SUFFIXES
from darseg.errors import DataError


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


LABEL_WORDS = _set(
    "label labels mask masks annotation annotations annot annots gt gts groundtruth truth segmentation segmentations seg "
    "segs target targets labelmap labelmaps labelids labeltrainids trainids gtfine gtcoarse maske masken"
)
IMAGE_WORDS = _set(
    "image images img imgs im photo photos picture pictures frame frames rgb input inputs original originals leftimg8bit "
    "bild bilder foto fotos"
)
COLOR_WORDS = _set("color colour colors colours colored coloured")
"""Labels as colors: taken where there are no others."""
OTHER_WORDS = _set("vis instance instances instanceids object objects overlay overlays")
"""No labels of classes, whatever else the name says."""
FILLERS = _set("class classes ground fine aug raw png jpeg jpg")
"""Say nothing beside the words above."""
IN_NAMES = LABEL_WORDS | IMAGE_WORDS | COLOR_WORDS | OTHER_WORDS

SPLITS = {
    "labeled": ("labeled", "labelled"),
    "unlabeled": ("unlabeled", "unlabelled"),
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
LIST_FOLDERS = (".", "lists", "splits", "ImageSets/Segmentation", "ImageSets")

MOST_COLORS = 255
"""Of all label files together; more are photographs, or drawings with smoothed edges."""

MOST_OF_A_TWIN = 64
"""Different values or colors in a file that its name alone does not tell from a photograph."""

NAME_FILES = (
    *(
        "classes",
        "class_names",
        "classnames",
        "labels",
        "label_names",
        "names",
        "categories",
        "class_dict",
        "obj",
    ),
    *(
        "label_colors",
        "label_colours",
        "labelmap",
        "label_map",
        "id2label",
        "palette",
        "colormap",
        "data",
        "dataset",
    ),
)
NAME_SUFFIXES = (".txt", ".names", ".csv", ".json", ".yaml", ".yml")

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Found:
    """An image, its label file, and the part of the data set that a folder's name puts it in (a key of SPLITS)."""

    image: Path
    label: Path | None
    split: str | None


@dataclass
class Discovery:
    """What is in a folder.

    Attributes:
        found: all images, sorted by path.
        lists: part → images, of list files; `list_files`: part → the file.
        annotations: files of annotation tools, and the kind of the first.
        notes: what was not used, and why.
    """

    root: Path
    found: list[Found] = field(default_factory=list)
    lists: dict[str, list[Path]] = field(default_factory=dict)
    list_files: dict[str, Path] = field(default_factory=dict)
    annotations: list[Path] = field(default_factory=list)
    annotation_kind: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    """A picture file, with the words of its path taken apart.

    Attributes:
        rank: among label files: 0, or 1 for colors, 2 for what is no label of classes.
        place: what is the same for all label files of one making: label words of folders and name, and the suffix.
        full, bare: what image and label have in common: folders without such words, and the name with or without them.
    """

    path: Path
    label_folder: bool
    label_name: bool
    rank: int
    place: tuple[str, ...]
    full: str
    bare: str
    split: str | None


def discover(root: Path) -> Discovery:
    """Look through a folder. Raises DataError where it cannot be read."""
    result = Discovery(root)
    pictures, texts, videos = _walk(root)
    files = [_take_apart(path, root) for path in pictures]
    labels = [one for one in files if one.label_folder]
    # A word in a name alone may be part of a picture's name: it makes a label only beside an image without it.
    plain = [one for one in files if not one.label_folder and not one.label_name]
    beside = {one.full for one in plain} | {one.bare for one in plain}
    labels += [one for one in files if one.label_name and not one.label_folder and one.bare in beside]
    known = {one.path for one in labels}
    images = [one for one in files if one.path not in known]
    if not labels:
        twins = _twins(images)
        labels = twins
        known = {one.path for one in twins}
        images = [one for one in images if one.path not in known]
    if labels and not images:
        raise DataError(
            f"{root}: {len(labels)} files look like label maps by their names, the first is {labels[0].path}, and there "
            "are no images. Give the folder that holds both."
        )
    label_of = _pair(images, labels, result)
    result.found = [Found(one.path, label_of.get(one.path), one.split) for one in images]
    if videos:
        result.notes.append(
            f"{len(videos)} video(s) are not used, the first is {videos[0]}: their frames, as images, could be used"
        )
    _read_lists(result)
    for path in texts:
        kind = _annotation_kind(path)
        if kind:
            result.annotations.append(path)
            result.annotation_kind = result.annotation_kind or kind
    return result


def _walk(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, JSON and XML files, and videos; not hidden ones, nor those in run folders."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: the folder cannot be read ({error.strerror}). Check its permissions."
        ) from error

    pictures, texts, videos = [], [], []
    for directory, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if {"recipe.yaml", "journal.jsonl"} <= set(names):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            suffix = path.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES or suffix in LABEL_SUFFIXES:
                pictures.append(path)
            elif suffix in (".json", ".xml"):
                texts.append(path)
            elif suffix in VIDEO_SUFFIXES:
                videos.append(path)
    return pictures, texts, videos


def _words(name: str) -> list[str]:
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    words: list[str] = []
    for word in re.split(r"[^0-9a-z]+", apart.lower()):
        joined = re.fullmatch(r"(train|val|valid|test)(annots?|masks?|labels?|gt|images?|imgs?)", word)
        words += joined.groups() if joined else [word]
    return [word for word in words if word]


def _take_apart(path: Path, root: Path) -> _File:
    below = path.relative_to(root)
    folders, place, split = [], [], None
    label_folder, rank = False, 0
    for part in below.parts[:-1]:
        words = _words(part)
        is_label = part.lower() in LABEL_WORDS or bool(LABEL_WORDS & set(words))
        meaningful = is_label or part.lower() in IMAGE_WORDS or bool(IMAGE_WORDS & set(words))
        if is_label:
            label_folder = True
            rank = max(rank, _rank(words))
            place.append("_".join(word for word in words if word not in SPLIT_OF))
            drop = LABEL_WORDS | COLOR_WORDS | OTHER_WORDS | FILLERS
        else:
            drop = IMAGE_WORDS | FILLERS if meaningful else frozenset()
        rest = [word for word in words if word not in drop] if meaningful else [part.lower()]
        folders += ["_".join(rest)] if rest else []
        split = next((SPLIT_OF[word] for word in words if word in SPLIT_OF), split)
    name, taken = below.stem, []
    while True:
        end = re.fullmatch(r"(.+?)[_\-. ]([A-Za-z]+8?[A-Za-z]*)", name)
        begin = re.fullmatch(r"([A-Za-z]+)[_\-. ](.+)", name)
        for match, word, rest in ((end, 2, 1), (begin, 1, 2)):
            if match and (match[word].lower() in IN_NAMES or match[word] == "L"):  # CamVid's
                taken.append("l" if match[word] == "L" else match[word].lower())
                name = match[rest]
                break
        else:
            break
    label_name = not IMAGE_WORDS.issuperset(taken)
    rank = max(rank, _rank(taken))
    head = "/".join(folders)
    return _File(
        path,
        label_folder,
        label_name,
        rank,
        (*place, *sorted({*taken} - IMAGE_WORDS), path.suffix.lower()),
        f"{head}/{below.stem.casefold()}",
        f"{head}/{name.casefold()}",
        split,
    )


def _rank(words: Iterable[str]) -> int:
    given = set(words)
    return 2 if given & OTHER_WORDS else 1 if given & COLOR_WORDS else 0


def _twins(images: Sequence[_File]) -> list[_File]:
    """Labels that have their images' very names, but for the suffix, as in a.jpg and a.png."""
    groups: dict[str, list[_File]] = defaultdict(list)
    for one in images:
        groups[one.full].append(one)
    candidates = []
    for group in groups.values():
        label = [one for one in group if one.path.suffix.lower() in LABEL_SUFFIXES]
        if len(group) == 2 and len(label) == 1:
            candidates += label
    some = candidates[:: max(1, len(candidates) // 8)]
    good = sum(_is_label(one.path) for one in some)
    return candidates if some and good * 2 > len(some) else []


def _is_label(path: Path) -> bool:
    try:
        raw = decode_label(path, "auto")
    except DataError:
        return False
    return len(np.unique(raw)) <= MOST_OF_A_TWIN


def _pair(images: Sequence[_File], labels: Sequence[_File], result: Discovery) -> dict[Path, Path]:
    """Image → label. Of several labels of an image that of the place with most pairs counts."""
    by_full: dict[str, list[_File]] = defaultdict(list)
    by_bare: dict[str, list[_File]] = defaultdict(list)
    by_name: dict[str, list[_File]] = defaultdict(list)
    for one in images:
        by_full[one.full].append(one)
        by_bare[one.bare].append(one)
        by_name[PurePosixPath(one.bare).name].append(one)
    pairs: dict[tuple[str, ...], dict[Path, Path]] = defaultdict(dict)
    rank = {one.place: one.rank for one in labels}
    lonely, jpegs = [], []
    for one in labels:
        if one.path.suffix.lower() not in LABEL_SUFFIXES:
            jpegs.append(one.path)
            continue
        tries = (
            by_full.get(one.full),
            by_full.get(one.bare),
            by_bare.get(one.bare),
            by_name.get(PurePosixPath(one.bare).name),
        )
        match = next((some[0] for some in tries if some and len(some) == 1), None)
        if match is None:
            lonely.append(one.path)
        else:
            pairs[one.place].setdefault(match.path, one.path)
    if jpegs:
        result.notes.append(
            f"{len(jpegs)} file(s) that should be labels cannot be, the first is {jpegs[0]}: JPEG and WebP change the "
            "values. Export them again as PNG"
        )
    if lonely:
        result.notes.append(
            f"{len(lonely)} label file(s) belong to no image, the first is {lonely[0]}: wanted is its image's name"
        )
    label_of: dict[Path, Path] = {}
    for place in sorted(pairs, key=lambda place: (rank[place], -len(pairs[place]), place)):
        fresh = {image: label for image, label in pairs[place].items() if image not in label_of}
        usable = fresh if rank[place] == 0 or (rank[place] == 1 and not label_of) else {}
        unused = [label for image, label in pairs[place].items() if image not in usable]
        label_of.update(usable)
        if unused:
            result.notes.append(
                f"{len(unused)} file(s) as {unused[0]} are not used: further labels of the same images, or drawings of "
                "instances or for people"
            )
    return label_of


def _read_lists(result: Discovery) -> None:
    """List files whose lines name images that are here."""
    root = result.root
    by_path = {one.image.relative_to(root).with_suffix("").as_posix(): one.image for one in result.found}
    endings: dict[str, list[Path]] = defaultdict(list)
    for name, path in by_path.items():
        parts = name.split("/")
        for at in range(len(parts)):
            endings["/".join(parts[at:])].append(path)

    def image_of(line: str) -> Path | None:
        for text in (line, *line.split()[:1]):
            text = text.lstrip("./")
            for name in (
                (text, str(PurePosixPath(text).with_suffix(""))) if PurePosixPath(text).name else (text,)
            ):
                hits = endings.get(name, [])
                if name in by_path:
                    return by_path[name]
                if len(hits) == 1:
                    return hits[0]
        return None

    for folder in LIST_FOLDERS:
        for split, words in SPLITS.items():
            path = next(
                (
                    root / folder / f"{word}.txt"
                    for word in words
                    if (root / folder / f"{word}.txt").is_file()
                ),
                None,
            )
            if path is None or split in result.lists:
                continue
            try:
                lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError):
                continue
            images = [image_of(line) for line in lines]
            good = list(dict.fromkeys(image for image in images if image is not None))
            if len(good) * 10 < len(lines) * 9 or not good:
                result.notes.append(
                    f"{path} is not used: {len(lines) - len(good)} of its {len(lines)} lines name no image here"
                )
                continue
            if len(good) < len(lines):
                result.notes.append(
                    f"{path}: {len(lines) - len(good)} of {len(lines)} lines name no image here, or one again"
                )
            result.lists[split], result.list_files[split] = good, path


def _annotation_kind(path: Path) -> str:
    """The annotation tool that wrote a file, by its beginning and end; empty for anything else."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 12)))
            text = (head + file.read()).decode("utf-8", "replace")
    except OSError:
        return ""
    if path.suffix.lower() == ".xml":
        return "cvat" if "<annotations" in text else ""
    if '"shapes"' in text:
        return "labelme"
    if '"imgHeight"' in text and '"objects"' in text:
        return "cityscapes"
    if '"annotations"' in text and ('"images"' in text or '"categories"' in text):
        return "coco"
    return ""


# Values and classes


@dataclass(frozen=True)
class LabelLook:
    """What one label file holds: pixels of each value, or of each color. `palette`: colors of the values."""

    size: tuple[int, int]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...] = ()


@dataclass(frozen=True)
class Survey:
    """All images and labels, read. `faults`: file → what is wrong with it; `palette` that of the first palette file."""

    sizes: Mapping[Path, tuple[int, int]]
    faults: Mapping[Path, str]
    colors: bool
    pixels: Mapping[int, int]
    palette: tuple[RGB, ...]


def survey(found: Sequence[Found], advance: Callable[[], object] = lambda: None) -> Survey:
    """Read every image and label file."""
    sizes: dict[Path, tuple[int, int]] = {}
    faults: dict[Path, str] = {}
    looks: dict[Path, LabelLook] = {}

    def look(one: Found) -> tuple[tuple[int, int] | str, LabelLook | str | None]:
        try:
            size: tuple[int, int] | str = image_size(one.image)
        except DataError as error:
            size = str(error)
        try:
            return size, look_at_label(one.label) if one.label else None
        except DataError as error:
            return size, str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for one, (size, label) in zip(found, pool.map(look, found), strict=True):
            if isinstance(size, str):
                faults[one.image] = size
            else:
                sizes[one.image] = size
            if one.label is not None and isinstance(label, str):
                faults[one.label] = label
            elif one.label is not None and isinstance(label, LabelLook):
                if isinstance(size, tuple) and label.size != size:
                    faults[one.label] = (
                        f"{one.label}: {label.size[0]}x{label.size[1]} pixels, but its image {one.image} has "
                        f"{size[0]}x{size[1]} (height x width)"
                    )
                else:
                    looks[one.label] = label
            advance()
    colors = sum(look.colors for look in looks.values()) * 2 > len(looks)
    pixels: Counter[int] = Counter()
    for path, one_look in looks.items():
        if one_look.colors == colors:
            pixels.update(one_look.pixels)
        else:
            kinds = ("values", "colors")
            faults[path] = (
                f"{path}: holds {kinds[one_look.colors]}, most label files hold {kinds[colors]}. Convert it"
            )
    palette = next((look.palette for look in looks.values() if look.palette), ())
    return Survey(sizes, faults, colors, dict(pixels), palette)


def look_at_label(path: Path) -> LabelLook:
    """Values or colors of a label file. Raises DataError where it cannot be one."""
    raw = decode_label(path, "auto")
    colors = raw.dtype == np.int32
    if colors:
        values, counts = np.unique(raw, return_counts=True)
    else:
        shown = raw[raw >= 0]
        counted = np.bincount(shown)
        values = np.flatnonzero(counted)
        counts = counted[values]
    if len(values) > MOST_COLORS:
        raise DataError(
            f"{path}: {len(values)} different {'colors' if colors else 'values'} – a photograph, instances, or a "
            "drawing with smoothed edges, no label map of classes. Export it again, without smoothing"
        )
    pixels = {int(value): int(count) for value, count in zip(values, counts, strict=True) if value >= 0}
    palette: tuple[RGB, ...] = ()
    if not colors and path.suffix.lower() == ".png":
        with Image.open(path) as image:
            flat = image.getpalette("RGB") if image.mode == "P" else None
        if flat:
            palette = tuple((flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3))
    height, width = raw.shape
    return LabelLook((height, width), colors, pixels, palette)


@dataclass(frozen=True)
class NameList:
    """Class names of a file, with their values and colors where it has them."""

    path: Path
    names: tuple[str, ...]
    values: tuple[int, ...] | None = None
    colors: tuple[RGB, ...] | None = None


def find_names(folders: Iterable[Path]) -> list[NameList]:
    """Every file in these folders that names classes, the most usual names first."""
    found = []
    for folder in dict.fromkeys(folders):
        for stem in NAME_FILES:
            for suffix in NAME_SUFFIXES:
                path = folder / f"{stem}{suffix}"
                if not path.is_file() or path.stat().st_size > 1 << 20:
                    continue
                try:
                    text = path.read_text(encoding="utf-8-sig")
                    rows = (
                        _rows_of_text(text)
                        if suffix in (".txt", ".names", ".csv")
                        else _rows_of_data(json.loads(text) if suffix == ".json" else yaml.safe_load(text))
                    )
                except (OSError, ValueError, yaml.YAMLError, RecursionError):
                    continue
                made = _name_list(path, rows)
                if made:
                    found.append(made)
    return found


Row = tuple[str, int | None, RGB | None]
"""Name, value, color."""

_LINES: tuple[tuple[str, Callable[[re.Match], Row]], ...] = (
    (r"([^:]+):(\d+),(\d+),(\d+):.*", lambda m: (m[1], None, (int(m[2]), int(m[3]), int(m[4])))),  # CVAT
    (
        r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\D.*)",
        lambda m: (m[4], None, (int(m[1]), int(m[2]), int(m[3]))),
    ),
    (
        r"(.*?\D)[\s,;:]+(\d+)[\s,]+(\d+)[\s,]+(\d+)",
        lambda m: (m[1], None, (int(m[2]), int(m[3]), int(m[4]))),
    ),
    (r"(\d+)[\s,:;]+(\D.*)", lambda m: (m[2], int(m[1]), None)),
)


def _rows_of_text(text: str) -> list[Row]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for start in (0, 1):  # a table may have a head
        for pattern, row in _LINES:
            matches = [re.fullmatch(pattern, line) for line in lines[start:]]
            if len(matches) > 1 and all(matches):
                return [row(match) for match in matches if match]
    return [(line, None, None) for line in lines]


def _rows_of_data(content: Any) -> list[Row]:
    if isinstance(content, Mapping):
        for key in ("classes", "names", "labels", "categories", "class_names", "id2label"):
            if isinstance(content.get(key), (list, Mapping)):
                return _rows_of_data(content[key])
        rows: list[Row] = []
        for key, value in content.items():
            if str(key).isdigit() and isinstance(value, str):
                rows.append((value, int(key), None))
            elif isinstance(key, str) and type(value) is int:
                rows.append((key, value, None))
            elif isinstance(key, str) and _color(value):
                rows.append((key, None, _color(value)))
            else:
                return []
        return rows
    if not isinstance(content, list):
        return []
    rows = []
    for entry in content:
        if isinstance(entry, Mapping):
            number = entry.get("id")
            color = _color(entry.get("color"))
            rows.append((str(entry.get("name", "")), number if type(number) is int else None, color))
        else:
            rows.append((entry if isinstance(entry, str) else "", None, None))
    return rows


def _color(value: Any) -> RGB | None:
    good = isinstance(value, (list, tuple)) and len(value) == 3
    return (value[0], value[1], value[2]) if good and all(type(part) is int for part in value) else None


def _name_list(path: Path, rows: Sequence[Row]) -> NameList | None:
    names = tuple(row[0].strip() for row in rows)
    paths = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names) or all("/" in name for name in names)
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names) or "" in names or paths:
        return None
    values = tuple(row[1] for row in rows if row[1] is not None and 0 <= row[1] <= 65535)
    colors = tuple(row[2] for row in rows if row[2] is not None and max(row[2]) <= 255)
    return NameList(
        path,
        names,
        values if len(set(values)) == len(names) else None,
        colors if len(set(colors)) == len(names) else None,
    )


@dataclass(frozen=True)
class Guess:
    """What the label files mean: keys of a recipe's data section.

    Attributes:
        classes: of the recipe: a built-in set's name, names, or names with colors.
        keys: further keys (label_values, ignore, …) with their values.
        why: key → reason, "classes" among them.
        notes: for each class, in order: which value or color, and its share of the labeled pixels.
        warnings: what a reader must look at.
    """

    classes: str | list[str] | dict[str, list[int]]
    keys: dict[str, Any]
    why: dict[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def guess_classes(seen: Survey, names: Sequence[NameList], labels: Sequence[Path]) -> Guess:
    """Which classes the labels hold, and how. Raises DataError where they cannot be classes."""
    if not seen.pixels:
        raise DataError("Not one label file could be read, or all are transparent throughout.")
    colors = seen.colors
    keys: dict[str, Any] = {}
    why: dict[str, str] = {}
    pixels = dict(seen.pixels)
    if colors and all(key >> 16 == key & 255 == key >> 8 & 255 for key in pixels):
        keys["label_format"] = "index"
        why["label_format"] = "the label files are RGB with three equal channels: values, not colors"
        pixels = {key & 255: count for key, count in pixels.items()}
        colors = False
    if len(pixels) > MOST_COLORS:
        raise DataError(
            f"The label files hold {len(pixels)} different {'colors' if colors else 'values'} together: instances, or "
            "drawings with smoothed edges. Export them with one value per class."
        )
    made = _guess_colors(pixels, names) if colors else _guess_values(pixels, names, seen.palette, labels)
    return Guess(made.classes, keys | made.keys, why | made.why, made.notes, made.warnings)


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.2%}"


def _guess_colors(pixels: Mapping[int, int], names: Sequence[NameList]) -> Guess:
    rgb = {(key >> 16, key >> 8 & 255, key & 255): count for key, count in pixels.items()}
    void: RGB = (0, 0, 0)
    warnings: list[str] = []
    classes: str | dict[str, list[int]]
    for one in names:
        if one.colors and len(set(one.colors) & set(rgb)) >= 2:
            table = dict(zip(one.names, one.colors, strict=True))
            classes = {name: list(color) for name, color in table.items()}
            reason = f"names and colors of {one.path.name}"
            break
    else:
        known = [
            (len(set(rgb) & set(a_set.colors)), name)
            for name, a_set in BUILT_IN.items()
            if set(rgb) - {void, (255, 255, 255), (224, 224, 192)} <= set(a_set.colors)
        ]
        best = max(known, default=(0, ""))
        if best[0] >= 2:
            classes, table = (
                best[1],
                dict(zip(BUILT_IN[best[1]].names, BUILT_IN[best[1]].colors, strict=True)),
            )
            reason = f"the colors are those of {best[1]}"
        else:
            ordered = sorted(rgb, key=lambda color: (color != void, -rgb[color], color))
            table = {
                "background" if color == void else "class_{:02x}{:02x}{:02x}".format(*color): color
                for color in ordered
            }
            classes = {name: list(color) for name, color in table.items()}
            reason = "no names were found: rename them, the colors tell which is which"
            if void in rgb:
                warnings.append(
                    "black became the class background. If it means not labeled, take background out of data.classes "
                    "and set data.label_colors: {ignore: [[0, 0, 0]]}"
                )
    if len(table) < 2:
        raise DataError(
            f"The label files hold one color alone, {list(next(iter(rgb)))}: nothing to tell apart."
        )
    beyond = [color for color in rgb if color not in set(table.values())]
    keys: dict[str, Any] = {}
    why = {"classes": reason}
    labeled = sum(count for color, count in rgb.items() if color not in beyond)
    if beyond:
        keys["label_colors"] = {"ignore": [list(color) for color in sorted(beyond)]}
        why["label_colors"] = (
            f"colors of no class, {_share(sum(rgb[color] for color in beyond), sum(rgb.values()))} of all pixels"
        )
    notes = tuple(_share(rgb.get(color, 0), labeled) for color in table.values())
    return Guess(classes, keys, why, notes, tuple(warnings))


def _guess_values(
    pixels: Mapping[int, int], names: Sequence[NameList], palette: Sequence[RGB], labels: Sequence[Path]
) -> Guess:
    values = set(pixels)
    if any(path.name.endswith((IDS_SUFFIX, TRAIN_IDS_SUFFIX)) for path in labels):
        return Guess("cityscapes", {}, {"classes": "the labels are named as those of Cityscapes"}, (), ())
    for one in names:
        made = _named_values(pixels, one, palette)
        if made:
            return made
    unused = [
        f"{one.path} names {len(one.names)} classes, which the label values do not fit" for one in names
    ]
    listed = ", ".join(map(str, sorted(values)[:20])) + (" …" if len(values) > 20 else "")
    no_names = "no names were found: rename them"
    steps = np.diff(sorted(values))
    # Classes stretched to grays: 0, 127, 255; 0, 85, 170, 255.
    stretched = len(values) > 2 and 0 in values and steps.max() - steps.min() <= 1 < steps.min()
    ignored = IGNORE in values and not stretched
    real = sorted(values - {IGNORE} if ignored else values)
    if values == {0, IGNORE}:
        return _values_guess(
            pixels, {0: "background", IGNORE: "foreground"}, "binary", no_names, palette, unused
        )
    if len(real) < 2:
        raise DataError(
            f"The label files hold {listed} alone: one class is nothing to tell apart (255 is read as not labeled). "
            "Label what does not belong to it as another class."
        )
    for name, known in BUILT_IN.items():
        if list(palette[: len(known)]) == list(known.colors) and real[-1] < len(known):
            shares = _shares(pixels, {k: text for k, text in enumerate(known.names)})
            return Guess(name, {}, {"classes": f"the palette is that of {name}"}, shares, tuple(unused))
    if real == list(range(len(real))):
        return _values_guess(pixels, {v: f"class_{v}" for v in real}, None, no_names, palette, unused)
    if real == list(range(1, len(real) + 1)):
        reason = f"{no_names}. Values begin at 1"
        return _values_guess(pixels, {v: f"class_{v}" for v in real}, "one_based", reason, palette, unused)
    warnings = [*unused]
    if stretched and IGNORE in values:
        warnings.append(
            f"255 became a class, since the values ({listed}) are spread evenly, as classes in grays. If it means not "
            "labeled, set data.label_values.255: ignore and take its class out"
        )
    table: dict[int, str] = {v: f"class_{v}" for v in real}
    return _values_guess(
        pixels, table, "map", f"{no_names}. The numbers are the label values", palette, warnings
    )


def _named_values(pixels: Mapping[int, int], one: NameList, palette: Sequence[RGB]) -> Guess | None:
    """With the names of a file, where the values fit them."""
    count, values = len(one.names), set(pixels)
    reason = f"names of {one.path.name}"
    if one.values:
        table = dict(zip(one.values, one.names, strict=True))
        beyond = sorted(values - set(table) - {IGNORE})
        if not values & set(table):
            return None
        if sorted(table) == list(range(count)) and not beyond:
            return _values_guess(pixels, dict(sorted(table.items())), None, reason, palette, [], one.colors)
        warnings = [
            f"label values {', '.join(map(str, beyond[:20]))} have no name in {one.path.name}, and are not learned"
        ]
        return _values_guess(
            pixels, dict(sorted(table.items())), "map", reason, palette, warnings if beyond else []
        )
    real = values - {IGNORE}
    if count == 2 and values == {0, IGNORE}:
        table = {0: one.names[0], IGNORE: one.names[1]}
        return _values_guess(pixels, table, "binary", reason, palette, [])
    if real and max(real) < count:
        return _values_guess(pixels, dict(enumerate(one.names)), None, reason, palette, [], one.colors)
    if real and max(real) == count:
        table = dict(enumerate(one.names, 1))
        warnings = []
        if 0 in real:
            warnings.append(
                f"{count} names, values 0 to {count}: read as 0 = not labeled, classes from 1 on. If {count} is not "
                f"labeled instead, set data.ignore: {count} in place of data.label_values"
            )
        return _values_guess(pixels, table, "one_based", reason, palette, warnings)
    return None


def _shares(pixels: Mapping[int, int], table: Mapping[int, str]) -> tuple[str, ...]:
    labeled = sum(count for value, count in pixels.items() if value in table)
    return tuple(f"value {value}, {_share(pixels.get(value, 0), labeled)}" for value in table)


def _values_guess(
    pixels: Mapping[int, int],
    table: Mapping[int, str],
    encoding: str | None,
    reason: str,
    palette: Sequence[RGB],
    warnings: Sequence[str],
    colors: Sequence[RGB] | None = None,
) -> Guess:
    """`table`: value → class name, in the order of the classes. `encoding`: binary, one_based, "map", or the values are
    the classes."""
    keys: dict[str, Any] = {}
    why = {"classes": reason}
    if encoding == "map":
        beyond = sorted(set(pixels) - set(table))
        keys["label_values"] = {**table, **dict.fromkeys(beyond, "ignore")}
        why["label_values"] = "what each value stands for"
    elif encoding:
        keys["label_values"] = encoding
        why["label_values"] = {
            "binary": "the label files are masks of 0 and 255",
            "one_based": "0 is not labeled, classes are counted from 1",
        }[encoding]
    names = list(table.values())
    if colors is None and palette:
        from_palette = [palette[value] for value in table if value < len(palette)]
        colors = from_palette if len(set(from_palette)) == len(names) else None
    classes: list[str] | dict[str, list[int]] = names
    if colors is not None:
        classes = {name: list(color) for name, color in zip(names, colors, strict=True)}
    return Guess(classes, keys, why, _shares(pixels, table), tuple(warnings))
