"""A folder → the data section of its recipe, with notes on what was found and what cannot be used."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from darseg.data.manifest import sample_id
from darseg.errors import DataError, faults
from darseg.init.discover import Discovery, FoundImage, discover
from darseg.init.draft import Draft
from darseg.init.guess import guess_classes
from darseg.init.names import find_names
from darseg.init.parts import FoundParts
from darseg.init.roles import choose_roles
from darseg.init.survey import Survey, survey
from darseg.init.words import SPLITS
from darseg.run.journal import Journal

FIRST_TO_LABEL = 10, 50
"""How many images to label before anything can be learned: at least, at most."""


def draft_unknown(folder: Path, lists: Path, console: Console) -> Draft:
    """A folder that is no published data set. Raises DataError if there is nothing to learn from.

    Args:
        lists: the folder for list files, if the recipe needs them.
    """
    discovery = discover(folder)
    label_paths = [image.label for image in discovery.images if image.label]
    if not discovery.images:
        raise DataError(_no_images(folder, discovery))
    if not label_paths:
        raise DataError(_no_labels(folder, discovery))
    with Journal(None, None, console).progress("read", len(discovery.images)) as advance:
        content = survey(discovery.images, advance)
    if discovery.parts is not None:
        draft = _draft_of_masks(folder, discovery.parts)
    else:
        draft = _draft_of_maps(folder, content, label_paths)
    draft.notes += [
        f"{len(discovery.images)} images, {len(label_paths)} of them with labels, in {folder}",
        *discovery.notes,
    ]
    if discovery.annotations:
        first = discovery.annotations[0]
        draft.notes.append(
            f"{len(discovery.annotations)} annotation file(s) are not used, for example {first}, because there are label "
            "maps. `darseg rasterize` makes label maps of annotation files"
        )
    usable = _usable(discovery.images, content.faults, draft)
    if not usable:
        raise DataError(draft.warnings[-1])
    choose_roles(draft, discovery, usable, lists=lists)
    roles = draft.roles or {}
    used = {image for pairs in roles.values() for image, _ in pairs}
    draft.sizes = [size for path, size in sorted(content.sizes.items()) if path in used]
    draft.labeled, draft.unlabeled = len(roles["labeled"]), len(roles["unlabeled"])
    return draft


def _draft_of_maps(folder: Path, content: Survey, label_paths: Sequence[Path]) -> Draft:
    """Classes and label settings of label maps that are a file each."""
    warnings: list[str] = []
    names = find_names([folder, *_between(folder, [path.parent for path in label_paths])], warnings)
    guess = guess_classes(content, names, label_paths)
    draft = Draft(folder, guess.classes, guess.why["classes"], class_notes=guess.notes)
    for key, value in guess.keys.items():
        draft.keys[key] = value, guess.why.get(key, "")
    draft.warnings += [*warnings, *guess.warnings]
    return draft


def _draft_of_masks(folder: Path, parts: FoundParts) -> Draft:
    """Classes and patterns of label maps that are several masks each."""
    draft = Draft(
        folder, parts.classes, "from the names of the masks; rename them if you like, in label_parts, too"
    )
    other = parts.classes[0] if parts.background else "ignore"
    draft.keys["label_parts"] = (
        {**parts.patterns, "other": other},
        "of overlapping masks the one listed last counts",
    )
    line = f"several masks make up a label map; their names gave the classes {', '.join(parts.patterns)}"
    if parts.background:
        line += (
            f". Pixels of no mask became the class {other}; if they may be of any class, set other: ignore"
        )
    draft.warnings.append(line)
    if parts.unused:
        draft.warnings.append(
            f"{parts.unused} file(s) in {folder / parts.labels} are no masks of an image and are not used"
        )
    return draft


def quoted(path: Path) -> str:
    """A path for a command line."""
    return shlex.quote(str(path))


def _no_images(folder: Path, discovery: Discovery) -> str:
    more = f" {'; '.join(discovery.notes)}." if discovery.notes else ""
    return f"{folder} holds no images (JPEG, PNG, BMP, TIFF or WebP).{more} Give the folder that holds them."


def _no_labels(folder: Path, discovery: Discovery) -> str:
    """What to do with images that have no label maps."""
    count = len(discovery.images)
    if discovery.annotations:
        first, kind = discovery.annotations[0], discovery.annotation_kind
        commands = "\n".join(f"  {command}" for command in _rasterize_commands(folder, discovery))
        fills = kind != "cityscapes"
        return (
            f"{folder} holds {count} image(s) and no label maps, but {len(discovery.annotations)} annotation file(s) "
            f"({kind}), for example {first}. Make label maps of them, then run this command again:\n{commands}"
            + ("\n--background names the class of pixels that nobody annotated. " * fills)
            + ("Omit it if these pixels may be of any class." * fills)
        )
    least, most = FIRST_TO_LABEL
    enough = min(count, max(least, min(most, count // 20)))
    chosen = [discovery.images[at * count // enough].image for at in range(enough)]
    lines = [str(path.relative_to(folder)) for path in chosen]
    notes = f"\n{'; '.join(discovery.notes)}." if discovery.notes else ""
    return (
        faults(
            f"{folder} holds {count} image(s) and no labels. Label about {enough} first; choose different ones that "
            "show every class. These are spread over the folder",
            lines,
            limit=least,
        )
        + "\nDraw label maps (PNG of class indices, 255 = not labeled) into labels/, with the names of their images, or "
        "annotate with labelme or CVAT and make label maps with `darseg rasterize`. Then run this command again."
        "\nIf there are labels already, they were taken for images: name their folder labels or masks, or name the files "
        "like a_mask.png next to a.jpg (docs/init.md lists all names)." + notes
    )


def _rasterize_commands(folder: Path, discovery: Discovery) -> list[str]:
    """The commands that draw all annotation files: training first, then validation and test."""
    kind = discovery.annotation_kind
    sources = sorted(
        set(discovery.annotations if kind in ("coco", "cvat") else [discovery.annotations[0].parent]),
        key=lambda path: (_place_of_part(path, folder), path),
    )
    apart = len({path.parent for path in sources}) == len(sources) > 1  # each in the folder of its images
    background = "" if kind == "cityscapes" else " --background background"
    return [
        f"darseg rasterize {quoted(path)} {quoted((path.parent if apart else folder) / 'labels')}{background}"
        for path in sources
    ]


def _place_of_part(path: Path, root: Path) -> int:
    """Where the part of the data set that a path names stands in the usual order."""
    words = {word for part in path.relative_to(root).parts for word in re.split(r"[^a-z]+", part.lower())}
    named = (at for at, split in enumerate(SPLITS) if words & set(SPLITS[split]))
    return next(named, len(SPLITS))


def _between(root: Path, folders: Sequence[Path]) -> list[Path]:
    """The folder that holds all `folders`, its parents up to `root`, and the first four of `folders`."""
    if not folders:
        return []
    common = Path(os.path.commonpath([str(path.absolute()) for path in folders]))
    top = root.absolute()
    between = [path for path in (common, *common.parents) if path == top or top in path.parents]
    return between + sorted(set(folders))[:4]


def _usable(images: Sequence[FoundImage], damaged: Mapping[Path, str], draft: Draft) -> list[FoundImage]:
    """Images that can be used. An image with a damaged label is left out: it is meant to have a label."""
    usable, lines = [], []
    ids: dict[str, Path] = {}
    for image in images:
        name = sample_id(image.image.relative_to(draft.root))
        problems = [damaged[path] for path in (image.image, image.label) if path and path in damaged]
        if not _fits_a_list(str(image.image)) or (image.label and not _fits_a_list(str(image.label))):
            problems.append(
                f"{str(image.image)!a}: a list cannot hold this name (it has line ends, or is not UTF-8). Rename it"
            )
        same = ids.setdefault(name.casefold(), image.image)
        if not problems and same != image.image:
            problems.append(
                f"{image.image}: the name differs from {same.name} only in suffix or case. Rename one of them"
            )
        lines += problems
        if not problems:
            usable.append(image)
    if lines:
        headline = f"{len(lines)} file(s) cannot be used; they and their images are left out"
        draft.warnings.append(faults(headline, lines, limit=20))
    return usable


def _fits_a_list(name: str) -> bool:
    """Whether a name can be a line of a list file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1
