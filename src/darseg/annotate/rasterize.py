"""Annotation files of other tools → label maps: all files are checked first, then drawn."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console

from darseg.annotate.annotations import read_annotations
from darseg.annotate.regions import AnnotatedImage, Annotations, paint
from darseg.choices import AnnotationFormat
from darseg.data.classes import BUILT_IN, IGNORE, alike, class_set
from darseg.data.files import ASIDE, is_taken, read_file, read_text, remove_leftovers, write_whole
from darseg.data.maps import is_whole, label_path, write_map
from darseg.data.pipeline import overlapped
from darseg.data.plain_yaml import parse_yaml
from darseg.errors import DataError, RunError, faults
from darseg.run.directory import digest_path, write_json
from darseg.run.journal import Journal
from darseg.run.outputs import held_folder
from darseg.run.records import read_texts

CLASSES = "classes.yaml"
"""File in the folder of label maps: the classes in their order, and the pixels of each."""
RECORD = ".rasterized.json"
"""Next to it: id → SHA-256 of the label map as it was drawn, by which maps that were corrected by hand are known."""


@dataclass(frozen=True)
class Rasterized:
    """What `rasterize_folder` wrote.

    Attributes:
        classes: names; class k is `classes[k]`.
        pixels: int64 [K + 1], over all maps; the last entry counts pixels that are not labeled.
        images: how many maps were written.
        kept: paths of maps that were left as they are, because they were changed since they were drawn.
        skipped: kind of shape that is not an area → how many were skipped.
        faults: a line each; the images they concern were not written.
        warnings: lines about annotation files whose names were not taken as they are, and about damaged maps.
    """

    classes: tuple[str, ...]
    pixels: NDArray[np.int64]
    images: int
    skipped: Mapping[str, int]
    faults: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def recipe(self) -> str:
        """The recipe's lines about the classes."""
        built_in = [name for name, known in BUILT_IN.items() if known.names == self.classes]
        return f"data:\n  classes: {built_in[0] if built_in else _flow(self.classes)}"


@dataclass(frozen=True)
class _Survey:
    """What the files hold.

    Attributes:
        categories: name → number of annotations; categories that are void in the format are left out.
        where: id → place of each image that can be drawn.
    """

    categories: Counter[str]
    where: Mapping[str, str]
    skipped: Counter[str]
    faults: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Target:
    """The folder of the maps, the classes, and the value of pixels that no region covers.

    Attributes:
        drawn: id → SHA-256 of the map as it was drawn; maps that are drawn are added.
        overwrite: draw maps again that were changed since.
    """

    out: Path
    names: tuple[str, ...]
    unclaimed: int
    drawn: dict[str, str]
    overwrite: bool

    def is_changed(self, name: str, label: np.ndarray) -> bool:
        """Whether somebody changed the map of this image since it was drawn."""
        path = label_path(self.out, name)
        if not is_whole(path) or digest_path(path) == self.drawn.get(name):
            return False
        existing = cv2.imdecode(np.frombuffer(read_file(path), np.uint8), cv2.IMREAD_UNCHANGED)
        return existing is not None and not np.array_equal(existing, label)

    def write(self, name: str, label: np.ndarray) -> None:
        """Write a map, and remember its digest."""
        path = label_path(self.out, name)
        write_map(path, label)
        self.drawn[name] = digest_path(path)


def rasterize_folder(
    annotations: Path | str,
    out: Path | str,
    *,
    format: AnnotationFormat | None = None,
    classes: str | Sequence[str] | None = None,
    background: str | None = None,
    ignore_other: bool = False,
    panoptic_folder: Path | str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Rasterized:
    """Draw annotation files as label maps `out/ID.png`: 8-bit PNGs of class indices, 255 = not labeled.

    `darseg.annotate.shapes` says which pixels a shape covers. The same input gives the same bytes.

    Args:
        annotations: a COCO or CVAT file, or a file or folder of labelme's or Cityscapes' JSON files.
        out: a new folder, or one that this function wrote before with the same classes. It gets the maps and
            `classes.yaml`.
        format: "coco", "panoptic", "labelme", "cityscapes" or "cvat"; default: recognized by content.
        classes: a built-in set's name, or names in their order (a list, or one string with commas). Default: all
            categories, COCO's by id, others by name.
        background: the class of pixels that nobody annotated, put first unless it is among the classes; default: these
            pixels are not labeled.
        ignore_other: pixels of categories that are not among the classes are not labeled; default: a fault.
        panoptic_folder: PNGs of a COCO panoptic file; default: the file's path without suffix.
        overwrite: draw maps again that were changed since they were drawn; default: they are kept.

    Returns:
        what was written, with all faults of single images; images without faults are done.

    Raises DataError, before anything is written, if categories are not classes, the classes do not work, or no image can
    be drawn; RunError if `out` holds something else; StorageError.
    """
    out = Path(out)
    folder = None if panoptic_folder is None else Path(panoptic_folder)
    source = read_annotations(Path(annotations), format, folder)
    survey = _look(source)
    names, problems = _choose(source, survey, classes, background=background, ignore_other=ignore_other)
    if not survey.where:
        reason = "every image has faults" if survey.faults else "there are no images in it"
        problems = [f"{annotations}: nothing can be drawn, since {reason}"]
    if problems:
        raise DataError(faults("Nothing was written", [*problems, *survey.faults]))
    unclaimed = IGNORE if background is None else names.index(background)
    with _begun(out, names):
        target = _Target(out, names, unclaimed, drawn=_read_record(out), overwrite=overwrite)
        try:
            result = _draw(source, survey, target, console=console or Console())
        finally:
            write_json(out / RECORD, dict(sorted(target.drawn.items())))
        described = {
            "pixels": dict(zip(names, result.pixels.tolist(), strict=False)),
            "not_labeled": int(result.pixels[-1]),
            "images": result.images,
        }
        facts = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
        write_whole(out / CLASSES, _classes_text(names) + facts)
    return result


def _draw(source: Annotations, survey: _Survey, target: _Target, *, console: Console) -> Rasterized:
    """Write the label maps of all images without faults."""
    index = {name: k for k, name in enumerate(target.names)}
    counts = np.zeros(256, np.int64)
    fault_lines = dict.fromkeys(survey.faults)  # in order and without repetition
    done = 0
    kept: list[str] = []
    damaged: list[Path] = []
    empty: list[str] = []

    def drawable() -> Iterator[AnnotatedImage]:
        for image in source.images():
            if isinstance(image, str):
                fault_lines[image] = None
            elif survey.where.get(image.id) == image.where:
                yield image

    def paint_image(image: AnnotatedImage) -> np.ndarray | list[str] | None:
        painted = paint(image, index, target.unclaimed, empty=empty)
        changed = not isinstance(painted, list) and target.is_changed(image.id, painted)
        return None if changed and not target.overwrite else painted

    def count(image: AnnotatedImage, painted: np.ndarray | list[str] | None) -> np.ndarray | None:
        nonlocal counts, done
        if isinstance(painted, list):
            fault_lines.update(dict.fromkeys(painted))
            return None
        if painted is None:
            kept.append(str(label_path(target.out, image.id)))
            return None
        path = label_path(target.out, image.id)
        damaged.extend([path] if is_taken(path) and not is_whole(path) else [])
        counts += np.bincount(painted.reshape(-1), minlength=256)
        done += 1
        return painted

    def write(image: AnnotatedImage, label: np.ndarray | None) -> None:
        if label is not None:
            target.write(image.id, label)

    with Journal(None, None, console).progress("rasterize", len(survey.where)) as advance:
        overlapped(
            drawable(),
            read=paint_image,
            work=count,
            write=write,
            advance=advance,
        )
    pixels = np.append(counts[: len(target.names)], counts[IGNORE])
    skipped = dict(sorted(survey.skipped.items()))
    return Rasterized(
        target.names,
        pixels,
        images=done,
        skipped=skipped,
        faults=tuple(fault_lines),
        warnings=(*survey.warnings, *alike(target.names), *_empty_line(empty), *_damaged_line(damaged)),
        kept=tuple(kept),
    )


def _empty_line(places: Sequence[str]) -> list[str]:
    if not places:
        return []
    return [
        f"{len(places):,} shape(s) cover no pixel of their image, for example {min(places)}: they lie outside, or are "
        "smaller than a pixel. If there are many, their coordinates may be of a picture of another size, or shares from "
        "0 to 1"
    ]


def _damaged_line(paths: Sequence[Path]) -> list[str]:
    what = f"{len(paths)} label map(s) were empty or cut off and were drawn again"
    return [f"{what}, such as {paths[0]}"] if paths else []


def _look(source: Annotations) -> _Survey:
    """Check all images without drawing them."""
    fault_lines: list[str] = []
    renamed: list[str] = []
    chinese: list[AnnotatedImage] = []
    categories, skipped = Counter[str](), Counter[str]()
    same: dict[str, list[tuple[str, str]]] = {}  # id and place of images whose names differ at most in case
    for image in source.images():
        if isinstance(image, str):
            fault_lines.append(image)
            continue
        categories.update(region.category for region in image.regions if region.category not in image.void)
        skipped.update(image.skipped)
        renamed += [image.renamed] if image.renamed else []
        chinese += [image] if image.chinese else []
        same.setdefault(image.id.casefold(), []).append((image.id, image.where))
    for group in same.values():
        if len(group) > 1:
            listed = " and ".join(f"{name} ({where})" for name, where in group[:8])
            fault_lines.append(
                f"{len(group)} images have names that differ only in suffix or case: {listed}. Rename all but one"
            )
    where = dict(group[0] for group in same.values() if len(group) == 1)
    warnings = [_renamed_line(renamed)] if renamed else []
    if chinese:
        warnings.append(_chinese_line(chinese))
    if unused := [name for name in source.categories or () if name not in categories]:
        warnings.append(f"no annotation is of these categories of the file: {', '.join(unused)}")
    return _Survey(categories, where, skipped=skipped, faults=tuple(fault_lines), warnings=tuple(warnings))


def _renamed_line(renamed: Sequence[str]) -> str:
    return (
        f"{len(renamed)} file(s) name another picture in 'imagePath' than the one with their own name, which was taken, "
        f"for example {renamed[0]}"
    )


def _chinese_line(images: Sequence[AnnotatedImage]) -> str:
    names = dict.fromkeys(region.category for image in images for region in image.regions)
    shown = [name for name in (*names, *(image.id for image in images)) if not name.isascii()]
    return (
        f"the annotations of {len(images)} image(s) are not UTF-8, for example {images[0].where}. They were read as "
        f"GB18030 (Chinese Windows){': ' if shown else ''}{', '.join(shown[:4])}. If these names are wrong, convert the "
        "files to UTF-8 with iconv"
    )


def _choose(
    source: Annotations,
    survey: _Survey,
    classes: str | Sequence[str] | None,
    *,
    background: str | None,
    ignore_other: bool,
) -> tuple[tuple[str, ...], list[str]]:
    """The classes in their order, and a line for each problem with them."""
    problems: list[str] = []
    if classes is None:
        names = tuple(sorted(survey.categories)) if source.categories is None else source.categories
    elif not isinstance(classes, str):
        names = tuple(classes)
    elif classes in BUILT_IN:
        names = BUILT_IN[classes].names
    else:
        names = tuple(name.strip() for name in classes.split(","))
    if background is not None and background not in names:
        names = (background, *names)
    unlisted = [
        f"{name!r} ({count} annotations)"
        for name, count in sorted(survey.categories.items())
        if name not in names
    ]
    if unlisted and not ignore_other:
        problems.append(
            f"categories that are not among the classes: {', '.join(unlisted)}. Add them (--classes), or leave their "
            "pixels unlabeled (--other ignore)"
        )
    if len(names) == 1:
        problems.append(
            f"there is only one class, {names[0]!r}. Name a class for the pixels that nobody annotated (--background "
            "NAME), or give more classes"
        )
    else:
        try:
            class_set(names)
        except DataError as error:
            problems.append(str(error))
    return names, problems


@contextlib.contextmanager
def _begun(out: Path, names: tuple[str, ...]) -> Generator[None]:
    """Hold the folder, after it was marked as ours."""
    _check_folder(out, names)
    with held_folder(out):
        _check_folder(out, names)  # another process may have begun there meanwhile
        if not (out / CLASSES).exists():
            write_whole(out / CLASSES, _classes_text(names))
        yield


def _read_record(out: Path) -> dict[str, str]:
    """Id → SHA-256 of the map as it was drawn; empty if the record is missing or damaged."""
    with contextlib.suppress(
        RunError, FileNotFoundError
    ):  # then equal maps are ours, and all others are kept
        return read_texts(out / RECORD, "")
    return {}


def _check_folder(out: Path, names: tuple[str, ...]) -> None:
    """Raise RunError if the folder holds other files or maps of other classes."""
    marker = out / CLASSES
    remove_leftovers(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose another folder.")
    if marker.exists():
        try:
            content = parse_yaml(read_text(marker))
            earlier = content["classes"]
        except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, RecursionError):
            raise RunError(f"{marker} was not written by this command. Choose another folder.") from None
        if earlier != list(names):
            raise RunError(
                f"{out} holds label maps of the classes {_flow(earlier)}; now the classes are {_flow(names)}, and their "
                "indices would mix. Choose another folder, remove this one, or name its classes (--classes)."
            )
    elif out.is_dir() and any(path.suffix != ASIDE for path in out.iterdir()):
        raise RunError(f"{out} is not empty and was not made by this command. Choose another folder.")


def _classes_text(names: Sequence[str]) -> str:
    return f"classes: {_flow(names)}\n"


def _flow(names: Sequence[str]) -> str:
    """Names as YAML on one line, quoted if necessary."""
    text = yaml.safe_dump(list(names), default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.strip()
