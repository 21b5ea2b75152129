"""Which image has which role – labeled, unlabeled, validation, test – and how a recipe can say so."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from darseg.data.manifest import sample_id
from darseg.errors import DataError
from darseg.init.discover import Discovery, FoundImage
from darseg.init.draft import Draft, Form, path_from

SEQUENCE = re.compile(r"(.*?)[_\-]?\d+$")
"""The name of an image in a sequence: the sequence's name and a number."""

Parts = dict[str, list[FoundImage]]


def choose_roles(draft: Draft, discovery: Discovery, usable: Sequence[FoundImage], *, lists: Path) -> None:
    """Set the draft's roles and forms. Raises DataError if no labeled image is left for training.

    Args:
        usable: the images of `discovery` that can be used.
        lists: the folder for list files, if the recipe needs them.
    """
    parts = _parts(draft, discovery, usable)
    if not parts["train"]:
        raise DataError(
            f"{discovery.root}: no labeled image is left for training; {len(parts['validation'])} are for validation and "
            f"{len(parts['test'])} for testing. Label images of the training part."
        )
    drawn = not parts["validation"]
    if drawn and len(parts["train"]) > 1:
        parts["validation"] = parts["train"][::5]
        parts["train"] = [image for at, image in enumerate(parts["train"]) if at % 5]
    named = {"labeled": parts["train"], **{role: parts[role] for role in ("unlabeled", "validation", "test")}}
    draft.roles = {role: [(image.image, image.label) for image in images] for role, images in named.items()}
    if drawn:
        _warn_of_sequences(draft, [*parts["train"], *parts["validation"]])
    if discovery.parts is None:
        draft.forms = [*_forms(draft, discovery, drawn), _list_form(draft, lists, drawn)]
        return
    base: Form = {
        "images": (discovery.parts.images, "where the images are"),
        "labels": (discovery.parts.labels, "where the masks are"),
    }
    held_out: Form = {"validation": ({"every": 5}, _held_out(len(parts["validation"])))} if drawn else {}
    draft.forms = [base | held_out, base | _list_form(draft, lists, drawn)]


def _parts(draft: Draft, discovery: Discovery, usable: Sequence[FoundImage]) -> Parts:
    """The images of each part, by list files, otherwise by folders."""
    of_list = {image: split for split, images in discovery.lists.items() for image in images}
    parts: Parts = {"train": [], "validation": [], "test": [], "unlabeled": []}
    unlisted, without_label = 0, 0
    for image in usable:
        split = of_list.get(image.image) if of_list else image.split
        if of_list and split is None:
            # If a list names the labeled images, all others are unlabeled. Other lists leave labeled images out.
            if image.label and "labeled" not in discovery.lists:
                unlisted += 1
                continue
            split = "unlabeled"
        if split in ("validation", "test") and image.label is None:
            without_label += 1
            continue
        if split == "unlabeled" or (split != "validation" and split != "test" and image.label is None):
            parts["unlabeled"].append(image)
        else:
            parts[split if split in ("validation", "test") else "train"].append(image)
    if without_label:
        draft.notes.append(
            f"{without_label} image(s) of the validation or test part have no label and are left out"
        )
    if unlisted:
        draft.notes.append(
            f"{unlisted} labeled image(s) are in none of the lists and are left out: "
            + ", ".join(map(str, discovery.list_files.values()))
        )
    return parts


def _warn_of_sequences(draft: Draft, labeled: Sequence[FoundImage]) -> None:
    """Validation that takes every fifth image of a sequence measures too good scores."""
    groups: Counter[str] = Counter()
    for image in labeled:
        match = SEQUENCE.fullmatch(sample_id(image.image.relative_to(draft.root)))
        if match:
            groups[match[1]] += 1
    several = [name for name, count in groups.items() if count > 1]
    if len(several) > 1 and groups.total() >= 3 * len(groups):
        draft.warnings.append(
            f"the labeled images look like {len(groups)} sequences ({', '.join(map(repr, several[:3]))} …), and "
            "validation takes every fifth image. If neighbors show the same scene, scores will be too good. To hold out "
            "whole sequences, write their ids into a list and set data.validation to it"
        )


def _forms(draft: Draft, discovery: Discovery, drawn: bool) -> Iterator[Form]:
    """Ways to say the roles without our own list files. `drawn`: every fifth labeled image is held out."""
    roles, root = draft.roles or {}, draft.root
    counts = {role: len(pairs) for role, pairs in roles.items()}
    places = {role: _places(pairs, root) for role, pairs in roles.items()}
    train = places["labeled"]
    if train is None:
        return
    base: Form = {}
    if train[0] != "images":
        base["images"] = train[0], "where the images are"
    if train[1] != "labels":
        base["labels"] = train[1], "label maps with the same names"
    if discovery.list_files:
        yield _with_found_lists(base, discovery, counts, drawn=drawn)
    form = dict(base)
    if drawn and counts["validation"]:
        form["validation"] = {"every": 5}, _held_out(counts["validation"])
    for role in ("validation", "test"):
        if (place := places[role]) is not None and not (drawn and role == "validation"):
            form[role] = {"images": place[0], "labels": place[1]}, f"{counts[role]} image(s)"
    yield form
    if counts["unlabeled"] and (bare := _folder_of([image for image, _ in roles["unlabeled"]], root)):
        yield {**form, "unlabeled": ({"images": bare}, f"{counts['unlabeled']} image(s)")}


def _with_found_lists(base: Form, discovery: Discovery, counts: Mapping[str, int], *, drawn: bool) -> Form:
    """Roles by the list files that the folder has."""
    form = dict(base)
    for split, path in discovery.list_files.items():
        role = "labeled" if split == "train" else split
        if counts[role]:
            form[role] = path.relative_to(discovery.root).as_posix(), f"{counts[role]} image(s)"
    if drawn and "labeled" in form and counts["validation"]:
        train_list = form["labeled"][0]
        form["labeled"] = {"list": train_list, "except_every": 5}, f"{counts['labeled']} image(s)"
        form["validation"] = {"list": train_list, "every": 5}, _held_out(counts["validation"])
    return form


def _list_form(draft: Draft, lists: Path, drawn: bool) -> Form:
    """Roles by list files of our own next to the recipe; they can say everything."""
    form: Form = {}
    for role, pairs in (draft.roles or {}).items():
        if pairs:
            is_held_out = role == "validation" and drawn
            comment = _held_out(len(pairs)) if is_held_out else f"{len(pairs)} image(s)"
            form[role] = path_from(draft.root, lists / f"{role}.txt"), comment
    return form


def _held_out(count: int) -> str:
    return f"every fifth labeled image, {count} in all, is held out to measure scores"


def _places(pairs: Sequence[tuple[Path, Path | None]], root: Path) -> tuple[str, str] | None:
    """Folders of images and labels below `root`, if the first label lies in its folder as its image does."""
    if not pairs or pairs[0][1] is None:
        return None
    image, label = (list(path.relative_to(root).with_suffix("").parts) for path in pairs[0])  # ty: ignore
    if image[-1] != label[-1]:
        return None
    while image and label and image[-1] == label[-1]:
        image.pop()
        label.pop()
    return "/".join(image) or ".", "/".join(label) or "."


def _folder_of(images: Sequence[Path], root: Path) -> str | None:
    common = Path(os.path.commonpath([str(path.parent) for path in images]))
    return common.relative_to(root).as_posix() if common != root else None
