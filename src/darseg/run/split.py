"""Draw the labeled and the unlabeled list of a recipe's images, and write down what was drawn."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.advice import unknown_values
from darseg.data.classes import ClassSet
from darseg.data.files import write_whole
from darseg.data.labels import read_label
from darseg.data.manifest import Sample, sample_id
from darseg.data.splits import draw, labeled_count, sequences_of
from darseg.errors import DataError, RecipeError, RunError, faults
from darseg.run.build import manifest_of
from darseg.run.directory import digest_text
from darseg.run.journal import Journal


def draw_split(
    recipe: Recipe,
    out: Path | str,
    *,
    fraction: str | float | Fraction | None = None,
    count: int | None = None,
    seed: int = 0,
    balanced: bool = False,
    sequences: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Draw which images of a recipe are labeled: `out/labeled.txt`, `out/unlabeled.txt`, `out/split.json`.

    Drawn from are the labeled and unlabeled images of the recipe, not those for validation or test. An id is
    the image's path below `data.root` without suffix, as it is once the lists are used, however the recipe
    names it now. How images are drawn: `darseg.data.splits.draw`.

    Args:
        fraction: share to be labeled, as in "1/8" or 0.125; either this or `count`.
        count: images to be labeled.
        balanced: see to it that rare classes appear; every image needs a label map.
        sequences: regular expression that finds in an id the name of its sequence, which stays together.

    Returns:
        the content of `split.json`: settings, and for each list `images`, `without_label`, `sequences`, `sha256`,
        and per class `images_with_class` and `pixels` (None where no image has a label map); `absent`, the classes
        without a pixel in the labeled list.

    Raises RecipeError for settings that cannot work, DataError for labels and paths that cannot be used, RunError
    where `out` holds other lists; nothing is overwritten.
    """
    if (fraction is None) == (count is None):
        raise RecipeError("Give either a fraction or a count of images to be labeled, one of the two.")
    share = None if fraction is None else _fraction(fraction)
    manifest = manifest_of(recipe)
    classes = manifest.classes
    pool = _pool(
        (*manifest.labeled, *manifest.unlabeled), Path(recipe.data.root), recipe.data.layout != "folders"
    )
    ids = list(pool)
    samples = [sample for sample, _ in pool.values()]
    bare = np.array([sample.label is None for sample in samples])
    if balanced and bare.any():
        raise DataError(
            f"{bare.sum()} of {len(bare)} images have no label map, the first is {ids[bare.argmax()]!r}: a balanced "
            "split needs to know the classes of all. Draw a plain one, or take these out of the recipe."
        )
    groups = None if sequences is None else sequences_of(ids, sequences)
    wanted = labeled_count(len(ids), share) if share is not None else count or 0
    labeled = draw(ids, wanted, seed, groups)  # settings that cannot work fail before minutes of reading
    with Journal(None, None, console or Console()).progress("labels", len(ids)) as advance:
        pixels = _count_pixels(samples, classes, advance)
    if balanced:
        labeled = draw(ids, wanted, seed, groups, pixels > 0)

    def describe(mask: np.ndarray, text: str) -> dict[str, Any]:
        known = mask & ~bare

        def per_class(values: np.ndarray) -> dict[str, int] | None:
            return (
                dict(zip(classes.names, values[known].sum(0).tolist(), strict=True)) if known.any() else None
            )

        return {
            "images": int(mask.sum()),
            "without_label": int((mask & bare).sum()),
            "sequences": sorted({groups[i] for i in np.flatnonzero(mask)}) if groups else None,
            "images_with_class": per_class(pixels > 0),
            "pixels": per_class(pixels),
            "sha256": digest_text(text),
        }

    chosen = np.isin(ids, labeled)
    masks = {"labeled": chosen, "unlabeled": ~chosen}
    texts = {
        role: "".join(f"{line}\n" for (_, line), own in zip(pool.values(), mask, strict=True) if own)
        for role, mask in masks.items()
    }
    lists = {role: describe(mask, texts[role]) for role, mask in masks.items()}
    counts = lists["labeled"]["pixels"]
    described = {
        "method": "balanced" if balanced else "random",
        "seed": seed,
        "fraction": None if share is None else str(share),
        "count": wanted,
        "sequences": sequences,
        "lists": lists,
        "absent": counts and [name for name in classes.names if not counts[name]],
    }
    files = {f"{role}.txt": text for role, text in texts.items()}
    _write_new(Path(out), {**files, "split.json": json.dumps(described, indent=2, allow_nan=False) + "\n"})
    return described


def _fraction(value: str | float | Fraction) -> Fraction:
    try:
        return Fraction(str(value))  # 0.1 is a tenth, not its nearest binary fraction
    except (ValueError, ZeroDivisionError):
        raise RecipeError(f"fraction {value}: wanted a number as in 1/8 or 0.125.") from None


def _pool(samples: Sequence[Sample], root: Path, layout: bool) -> dict[str, tuple[Sample, str]]:
    """id → sample and its line, ids in sorted order. Raises DataError for lines that could not be read again.

    Lines name images alone where a layout knows their labels, which may lie elsewhere (SBD's).
    """
    pool, wrong = [], []
    for sample in samples:
        paths = [path for path in (sample.image, None if layout else sample.label) if path is not None]
        outside = [
            path for path in paths if not path.is_relative_to(root) or ".." in path.relative_to(root).parts
        ]
        if outside:
            wrong.append(f"{outside[0]} does not lie below it")
            continue
        line = " ".join(path.relative_to(root).as_posix() for path in paths)
        # A reader of UTF-8 lines strips them; names with line breaks or bytes that are no text would not come back.
        if line.encode(errors="ignore").decode().splitlines() != [line.strip()]:
            wrong.append(f"{line!r} cannot be a line of a list; rename the file")
        pool.append((sample_id(sample.image.relative_to(root)), (sample, line)))
    times = Counter(name.casefold() for name, _ in pool)
    wrong += [
        f"{sample.image} has the id of another" for name, (sample, _) in pool if times[name.casefold()] > 1
    ]
    if wrong:
        raise DataError(
            faults(
                f"Lists name files by their paths below data.root, {root}, and ids that differ by more than suffix "
                "and case. Set data.root to the folder that holds images and labels, rename files of one id",
                wrong,
            )
        )
    return dict(sorted(pool))


def _count_pixels(samples: Sequence[Sample], classes: ClassSet, advance: Callable[[], object]) -> np.ndarray:
    """int64 [N, K]: pixels of each class, 0 where there is no label. Raises DataError naming every bad label."""
    pixels, wrong = np.zeros((len(samples), len(classes)), np.int64), []

    def count(sample: Sample) -> np.ndarray | str:
        if sample.label is None:
            return np.zeros(256, np.int64)
        try:
            values = np.bincount(read_label(sample.label, sample.encoding).reshape(-1), minlength=256)
        except DataError as error:
            return str(error)
        line = unknown_values(values, len(classes))
        return f"{sample.label}: {line}" if line else values

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # decoding releases the interpreter lock
        for index, found in enumerate(threads.map(count, samples)):
            if isinstance(found, str):
                wrong.append(found)
            else:
                pixels[index] = found[: len(classes)]
            advance()
    if wrong:
        raise DataError(faults(f"{len(wrong)} label map(s) cannot be used", wrong))
    return pixels


def _write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write files that are not there. Raises RunError, before anything is written, where one is there and differs."""
    for name, text in texts.items():
        path = folder / name
        if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            raise RunError(
                f"{path} is there already and differs from what was drawn now; nothing was written. Choose another "
                "folder, or remove it."
            )
    for name, text in texts.items():
        if not (folder / name).exists():
            write_whole(folder / name, text)
