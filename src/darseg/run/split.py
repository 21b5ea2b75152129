"""Draw the labeled and the unlabeled list of a recipe's images, and write down what was drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.advice import unknown_values
from darseg.data.classes import ClassSet
from darseg.data.dataset import read_truth
from darseg.data.files import is_taken, named, read_file, write_whole
from darseg.data.manifest import Sample, sample_id
from darseg.data.splits import draw, labeled_count, sequences_of
from darseg.data.threads import in_threads
from darseg.errors import DataError, RecipeError, RunError, faults
from darseg.run.build import as_recipe, manifest_of
from darseg.run.directory import digest_text
from darseg.run.journal import Journal


def draw_split(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    fraction: str | float | Fraction | None = None,
    count: int | None = None,
    seed: int = 0,
    balanced: bool = False,
    sequences: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw which images of a recipe are labeled, and write both lists with a report.

    The files are `out/labeled.txt`, `out/unlabeled.txt` and `out/split.json`. `darseg.data.splits.draw` draws among the
    recipe's labeled and unlabeled images; an id is the image's path below `data.root` without suffix.

    Args:
        out: a new folder, or one that holds the same lists.
        fraction: share of images to be labeled, as in "1/8" or 0.125; give either this or `count`.
        count: number of images to be labeled.
        balanced: make sure that rare classes appear; every image needs a label map.
        sequences: regular expression that finds the name of the sequence in an id; sequences are not divided.

    Returns:
        the content of `split.json`: settings, and for each list `images`, `without_label`, `sequences`, `sha256`,
        and per class `images_with_class` and `pixels` (None if no image has a label map); `absent`, the classes
        without a pixel in the labeled list.

    Raises RecipeError for settings that cannot work, DataError for labels and paths that cannot be used, RunError if
    `out` holds other lists; nothing is overwritten.
    """
    if (fraction is None) == (count is None):
        raise RecipeError("Give either a fraction or a count of images to be labeled, not both.")
    share = None if fraction is None else _fraction(fraction)
    recipe, manifest = as_recipe(recipe), manifest_of(recipe)
    pool = pool_of(recipe, (*manifest.labeled, *manifest.unlabeled))
    if balanced:
        _check_all_labeled(pool)
    ids = [image.id for image in pool]
    groups = None if sequences is None else sequences_of(ids, sequences)
    wanted = labeled_count(len(ids), share) if share is not None else count or 0
    labeled = draw(ids, wanted, seed, sequences=groups)  # refuses bad settings before minutes of reading
    with Journal(None, None, console or Console()).progress("labels", len(ids)) as advance:
        pixels = _count_pixels([image.sample for image in pool], manifest.classes, advance)
    if balanced:
        labeled = draw(ids, wanted, seed, sequences=groups, present=pixels > 0)
    texts, lists = _both_lists(
        pool, np.isin(ids, labeled), pixels, classes=manifest.classes, sequences=groups
    )
    record = {
        "method": "balanced" if balanced else "random",
        "seed": seed,
        "fraction": None if share is None else str(share),
        "count": wanted,
        "sequences": sequences,
        "lists": lists,
        "absent": _absent(lists["labeled"]),
    }
    write_new(Path(out), {**texts, "split.json": json.dumps(record, indent=2, allow_nan=False) + "\n"})
    return record


def _fraction(value: str | float | Fraction) -> Fraction:
    try:
        return Fraction(str(value))  # 0.1 is a tenth, not its nearest binary fraction
    except (ValueError, ZeroDivisionError):
        raise RecipeError(f"The fraction {value} should be a number, as in 1/8 or 0.125.") from None


@dataclass(frozen=True)
class PoolImage:
    """An image that may be drawn, with its id and its line in a list."""

    id: str
    sample: Sample
    line: str


def pool_of(recipe: Recipe, samples: Sequence[Sample]) -> list[PoolImage]:
    """The images to draw from, sorted by id. Raises DataError for paths that a list cannot name.

    If a layout knows the labels, which may be elsewhere (SBD's), lines name the images alone.
    """
    root, with_labels = (
        Path(recipe.data.root),
        recipe.data.layout == "folders" and not recipe.data.label_parts,
    )
    pool, problems = [], []
    for sample in samples:
        paths = [path for path in (sample.image, sample.label if with_labels else None) if path is not None]
        outside = [
            path for path in paths if not path.is_relative_to(root) or ".." in path.relative_to(root).parts
        ]
        if outside:
            problems.append(f"{outside[0]} is not below it")
            continue
        line = " ".join(path.relative_to(root).as_posix() for path in paths)
        # Lists are read as stripped lines of UTF-8, so line breaks, blanks at the ends and other bytes would be lost.
        if line.encode(errors="ignore").decode().splitlines() != [line.strip()]:
            problems.append(f"{line!r} cannot be a line of a list; rename the file")
        pool.append(PoolImage(sample_id(sample.image.relative_to(root)), sample, line))
    times = Counter(image.id.casefold() for image in pool)
    problems += [
        f"{image.sample.image} has the same id as another file"
        for image in pool
        if times[image.id.casefold()] > 1
    ]
    if problems:
        raise DataError(
            faults(
                f"Lists name files by their paths below data.root, {root}, and their ids must differ by more than "
                "suffix and case. Set data.root to the folder that holds images and labels, and rename files that "
                "share an id",
                problems,
            )
        )
    return sorted(pool, key=lambda image: image.id)


def _check_all_labeled(pool: Sequence[PoolImage]) -> None:
    bare = [image.id for image in pool if image.sample.label is None]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(pool)} images have no label map, the first is {bare[0]!r}. A balanced split needs to "
            "know the classes of all images: draw without --balanced, or take these images out of the recipe."
        )


def _both_lists(
    pool: Sequence[PoolImage],
    chosen: np.ndarray,
    pixels: np.ndarray,
    *,
    classes: ClassSet,
    sequences: Sequence[str] | None,
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The texts of both lists by file name, and what `split.json` says about each by role.

    Args:
        chosen: bool [N], whether an image of the pool is labeled.
        pixels: int64 [N, K], pixels of each class in each image.
        sequences: the sequence of each image.
    """
    texts, lists = {}, {}
    for role, members in (("labeled", np.flatnonzero(chosen)), ("unlabeled", np.flatnonzero(~chosen))):
        text = "".join(f"{pool[i].line}\n" for i in members)
        with_label = np.array([i for i in members if pool[i].sample.label], np.intp)
        counts: dict[str, dict[str, int] | None] = {"images_with_class": None, "pixels": None}
        if len(with_label):
            counts["images_with_class"] = _by_name(classes, (pixels[with_label] > 0).sum(0))
            counts["pixels"] = _by_name(classes, pixels[with_label].sum(0))
        texts[f"{role}.txt"] = text
        lists[role] = {
            "images": len(members),
            "without_label": len(members) - len(with_label),
            "sequences": sorted({sequences[i] for i in members}) if sequences else None,
            **counts,
            "sha256": digest_text(text),
        }
    return texts, lists


def _by_name(classes: ClassSet, counts: np.ndarray) -> dict[str, int]:
    return dict(zip(classes.names, counts.tolist(), strict=True))


def _absent(summary: dict[str, Any]) -> list[str] | None:
    """The classes without a pixel in a list; None if none of its images has a label map."""
    return summary["pixels"] and [name for name, count in summary["pixels"].items() if not count]


def _count_pixels(samples: Sequence[Sample], classes: ClassSet, advance: Callable[[], object]) -> np.ndarray:
    """int64 [N, K]: pixels of each class, 0 without a label map. Raises DataError naming all bad labels."""
    pixels, problems = np.zeros((len(samples), len(classes)), np.int64), []

    def count(sample: Sample) -> np.ndarray | str:
        if sample.label is None:
            return np.zeros(256, np.int64)
        try:
            values = np.bincount(
                read_truth(sample).reshape(-1),
                minlength=256,
            )
        except DataError as error:
            return str(error)
        line = unknown_values(values, len(classes))
        return f"{sample.label}: {line}" if line else values

    for index, counts in enumerate(in_threads(count, samples)):
        if isinstance(counts, str):
            problems.append(counts)
        else:
            pixels[index] = counts[: len(classes)]
        advance()
    if problems:
        raise DataError(faults(f"{len(problems)} label map(s) cannot be used", problems))
    return pixels


def write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write the files that do not exist. Raises RunError before writing if one exists and differs."""
    for name, text in texts.items():
        path = folder / name
        if is_taken(path) and (not path.is_file() or read_file(path) != text.encode()):
            raise RunError(
                f"{named(path)} exists and differs from this draw; nothing was written. Choose another folder, or "
                "remove the file."
            )
    for name, text in texts.items():
        if not (folder / name).exists():
            write_whole(folder / name, text)
