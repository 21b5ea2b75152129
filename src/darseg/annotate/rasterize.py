"""Annotation files of other tools into label maps: look at all of them, then draw one image after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console

from darseg.annotate.annotations import AnnotatedImage, Annotations, paint, read_annotations
from darseg.choices import AnnotationFormat
from darseg.data.classes import BUILT_IN, IGNORE, class_set
from darseg.data.files import ASIDE, write_whole
from darseg.data.maps import label_path, write_map
from darseg.data.pipeline import overlapped
from darseg.errors import DataError, RunError, faults
from darseg.run.journal import Journal

CLASSES = "classes.yaml"
"""In the folder of label maps: the classes in their order, and pixels of each."""


@dataclass(frozen=True)
class Rasterized:
    """What `rasterize_folder` wrote.

    Attributes:
        classes: names; class k is `classes[k]`.
        pixels: int64 [K + 1], over all maps; the last entry counts pixels that are not labeled.
        images: how many maps were written.
        skipped: kind of shape that is no area → how many were passed over.
        faults: a line each; the images they concern were not written.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    images: int
    skipped: Mapping[str, int]
    faults: tuple[str, ...]

    def recipe(self) -> str:
        """The recipe's lines about the classes."""
        built_in = [name for name, known in BUILT_IN.items() if known.names == self.classes]
        return f"data:\n  classes: {built_in[0] if built_in else _flow(self.classes)}"


@dataclass(frozen=True)
class _Survey:
    """What is in the files.

    Attributes:
        categories: annotations of each; those that the format counts as void are left out.
        where: id → place of each image that may be drawn.
    """

    categories: Counter[str]
    where: Mapping[str, str]
    skipped: Counter[str]
    faults: tuple[str, ...]


def rasterize_folder(
    annotations: Path | str,
    out: Path | str,
    *,
    format: AnnotationFormat | None = None,
    classes: str | Sequence[str] | None = None,
    background: str | None = None,
    ignore_other: bool = False,
    panoptic_folder: Path | str | None = None,
    console: Console | None = None,
) -> Rasterized:
    """Draw annotation files as label maps `out/ID.png`: 8-bit PNGs of class indices, 255 = not labeled.

    Which pixels a shape covers is said in `darseg.annotate.annotations`. The same input gives the same bytes.

    Args:
        annotations: a COCO or CVAT file, or a file or folder of labelme's or Cityscapes' JSON files.
        out: a new folder, or one this function wrote before with the same classes; `classes.yaml` is added to the maps.
        format: "coco", "panoptic", "labelme", "cityscapes" or "cvat"; default: recognized by content.
        classes: a built-in set's name, or names in their order (a list, or one text with commas). Default: all
            categories, COCO's by id, others by name.
        background: the class of pixels that nobody annotated, put first if it is not among the classes; default: they
            are not labeled.
        ignore_other: pixels of categories that are not among the classes are not labeled; default: a fault.
        panoptic_folder: PNGs of a COCO panoptic file; default: the file's path without suffix.

    Returns:
        what was written, with all faults of single images; the images without fault are done.

    Raises DataError, before anything is written, where categories are no classes, the classes do not work, or no image
    can be drawn; RunError where `out` holds something else; StorageError.
    """
    out = Path(out)
    read = read_annotations(
        Path(annotations), format, None if panoptic_folder is None else Path(panoptic_folder)
    )
    survey = _look(read)
    names, wrong = _choose(read, survey, classes, background, ignore_other)
    if not wrong and not survey.where:
        wrong = [f"{annotations}: no image can be drawn"]
    if wrong:
        raise DataError(faults("Nothing was written", [*wrong, *survey.faults]))
    _begin(out, names)
    index = {name: k for k, name in enumerate(names)}
    unclaimed = IGNORE if background is None else index[background]
    counts = np.zeros(256, np.int64)
    found = dict.fromkeys(survey.faults)
    done = 0

    def good() -> Iterator[AnnotatedImage]:
        for image in read.images():
            if isinstance(image, str):
                found[image] = None
            elif survey.where.get(image.id) == image.where:
                yield image

    def count(_: AnnotatedImage, painted: np.ndarray | list[str]) -> np.ndarray | None:
        nonlocal counts, done
        if isinstance(painted, list):
            found.update(dict.fromkeys(painted))
            return None
        counts += np.bincount(painted.reshape(-1), minlength=256)
        done += 1
        return painted

    def write(image: AnnotatedImage, label: np.ndarray | None) -> None:
        if label is not None:
            write_map(label_path(out, image.id), label)

    with Journal(None, None, console or Console()).progress("rasterize", len(survey.where)) as advance:
        overlapped(good(), lambda image: paint(image, index, unclaimed), count, write, advance)
    pixels = np.append(counts[: len(names)], counts[IGNORE])
    result = Rasterized(names, pixels, done, dict(sorted(survey.skipped.items())), tuple(found))
    described = {
        "pixels": dict(zip(names, pixels.tolist(), strict=False)),
        "not_labeled": int(pixels[-1]),
        "images": done,
    }
    write_whole(
        out / CLASSES, _classes_text(names) + yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    )
    return result


def _look(read: Annotations) -> _Survey:
    """Go through all images without drawing."""
    wrong: list[str] = []
    categories, skipped = Counter[str](), Counter[str]()
    same: dict[str, list[tuple[str, str]]] = {}  # id and place of images whose names differ in case at most
    for image in read.images():
        if isinstance(image, str):
            wrong.append(image)
            continue
        categories.update(one.category for one in image.regions if one.category not in image.void)
        skipped.update(image.skipped)
        same.setdefault(image.id.casefold(), []).append((image.id, image.where))
    for alike in same.values():
        if len(alike) > 1:
            listed = " and ".join(f"{name} ({where})" for name, where in alike[:8])
            wrong.append(
                f"{len(alike)} images differ by no more than suffix and case: {listed}. Rename all but one"
            )
    where = dict(alike[0] for alike in same.values() if len(alike) == 1)
    return _Survey(categories, where, skipped, tuple(wrong))


def _choose(
    read: Annotations,
    survey: _Survey,
    classes: str | Sequence[str] | None,
    background: str | None,
    ignore_other: bool,
) -> tuple[tuple[str, ...], list[str]]:
    """The classes in their order, and what is wrong with them."""
    wrong: list[str] = []
    if classes is None:
        names = tuple(sorted(survey.categories)) if read.categories is None else read.categories
    elif not isinstance(classes, str):
        names = tuple(classes)
    elif classes in BUILT_IN:
        names = BUILT_IN[classes].names
    else:
        names = tuple(name.strip() for name in classes.split(","))
    if background is not None and background not in names:
        names = (background, *names)
    other = [
        f"{name!r} ({count} annotations)"
        for name, count in sorted(survey.categories.items())
        if name not in names
    ]
    if other and not ignore_other:
        wrong.append(
            f"categories that are not among the classes: {', '.join(other)}. Add them (--classes), or leave "
            "their pixels unlabeled (--other ignore)"
        )
    if len(names) == 1:
        wrong.append(
            f"one class, {names[0]!r}, is nothing to tell apart: name what nobody annotated (--background NAME), "
            "or more classes"
        )
    else:
        try:
            class_set(names)
        except DataError as error:
            wrong.append(str(error))
    return names, wrong


def _begin(out: Path, names: tuple[str, ...]) -> None:
    """Make the folder ours, or see that it is: nobody's images may be overwritten, nor indices be mixed."""
    marker = out / CLASSES
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: choose another folder.")
    if marker.exists():
        try:
            held = yaml.safe_load(marker.read_text(encoding="utf-8"))
            there = held["classes"]
        except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
            raise RunError(f"{marker} was not written by this command: choose another folder.") from None
        if there != list(names):
            raise RunError(
                f"{out} holds label maps of other classes: {_flow(there)}, now {_flow(names)}. Their indices would mix: "
                "choose another folder, remove this one, or fix the classes (--classes)."
            )
    elif out.is_dir() and any(path.suffix != ASIDE for path in out.iterdir()):
        raise RunError(f"{out} is not empty and was not begun by this command: choose another folder.")
    else:
        write_whole(marker, _classes_text(names))


def _classes_text(names: Sequence[str]) -> str:
    return f"classes: {_flow(names)}\n"


def _flow(names: Sequence[str]) -> str:
    """Names as YAML on one line, quoted where they need it."""
    text = yaml.safe_dump(list(names), default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip()
