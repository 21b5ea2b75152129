"""`darseg init`: a recipe for an unknown folder and this machine, with its reasons as comments."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.files import aside_name, is_taken, named, read_file, real, write_whole
from darseg.data.images import IMAGE_SUFFIXES, image_size
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.suffixes import unread_files, unread_line
from darseg.data.video import VIDEO_SUFFIXES
from darseg.data.walk import unreadable
from darseg.errors import DarsegError, DataError, RunError
from darseg.init.data import draft_unknown
from darseg.init.draft import Draft
from darseg.init.fit import Fit, Machine, fit_machine
from darseg.init.published import LAYOUT_FOLDERS, draft_published, find_published
from darseg.init.text import data_lines, header_text, recipe_text
from darseg.run.build import manifest_of
from darseg.run.check import check

MOST_SIZES = 50
"""How many images of a published set are opened to learn their sizes."""

READ = (*IMAGE_SUFFIXES, *LABEL_SUFFIXES, *VIDEO_SUFFIXES)
"""Suffixes of files that init reads, or mentions otherwise."""


@dataclass(frozen=True)
class Proposal:
    """What `propose_recipe` wrote.

    Attributes:
        recipe: its path.
        lists: the list files next to it.
        notes: what was found.
        warnings: what a reader must look at, also the faults that `check` still reports.
    """

    recipe: Path
    lists: tuple[Path, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def propose_recipe(
    folder: Path | str,
    out: Path | str | None = None,
    *,
    weights: Path | str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    machine: Machine | None = None,
) -> Proposal:
    """Write a commented recipe, which `check` accepts, for a folder of images of which some have labels.

    On a GPU it names DINOv2's weights. If they are not there, a warning says where to get them, and `check` refuses the
    recipe until then.

    All images and labels are read. Files that cannot be read are reported, and list files next to the recipe leave them
    out. Nothing is written into the folder.

    Args:
        folder: images and labels in any of the usual arrangements (docs/init.md).
        out: the recipe; default: the folder's name with .yaml, in the current folder.
        weights: pretrained weights; default: a file resnet*.pth, or for a GPU dinov2_vit*14_pretrain.pth, in the folder
            or next to the recipe, otherwise none.
        overwrite: replace an earlier recipe and its lists.
        machine: the machine that the recipe is for; None: this one.

    Raises DataError if there is nothing to learn from, saying what to do first; RunError if the recipe exists;
    WeightsError for given weights that do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the folder that holds the images.")
    out = Path(out) if out else Path(f"{folder.resolve().name or 'images'}.yaml")
    lists = out.with_name(f"{out.stem}_lists")
    for path in (out, lists):
        if is_taken(path) and not overwrite:
            raise RunError(
                f"{named(path)} exists already. Choose another name (--out), or replace it and your "
                "changes in it (--force)."
            )
    console = console or Console()
    unread = unread_line(folder, unread_files(folder, READ))
    try:
        draft = _draft(folder, lists, console)
    except DataError as error:
        raise DataError(f"{error}\n{unread}" if unread else str(error)) from None
    draft.warnings += filter(None, (unread, unreadable(folder)))
    if draft.roles is None:
        _count_images(draft, out)
    fit = fit_machine(draft, folder, out, weights=weights, machine=machine)
    return _write(draft, fit, out, lists=lists, console=console)


def _draft(folder: Path, lists: Path, console: Console) -> Draft:
    """The data section: of a published data set, or of any other folder."""
    layout, other = find_published(folder) or (None, "")
    if layout is not None and not other:
        return draft_published(layout)
    draft = draft_unknown(layout.root if layout else folder, lists, console)
    if layout is not None:
        draft.notes.insert(
            0,
            f"{layout.root} has the folders of {layout.name} ({LAYOUT_FOLDERS[layout.name]}), but other data: {other}. "
            "So it is read as data of your own",
        )
    return draft


def _count_images(draft: Draft, out: Path) -> None:
    """Numbers and sizes of a published set's images."""
    aside = aside_name(out)
    lines = [*data_lines(draft, {}, out), "network: {weights: none}", "rounds: [{steps: 1}]"]
    try:
        write_whole(aside, "\n".join(lines) + "\n")
        recipe = load_recipe(aside)
    finally:
        aside.unlink(missing_ok=True)
    manifest = manifest_of(recipe)
    draft.labeled, draft.unlabeled = len(manifest.labeled), len(manifest.unlabeled)
    samples = (*manifest.labeled, *manifest.unlabeled)
    for sample in samples[:: max(1, len(samples) // MOST_SIZES)]:
        with suppress(DataError):
            draft.sizes.append(image_size(sample.image))
    draft.notes.append(
        f"{draft.labeled} labeled and {draft.unlabeled} unlabeled images, {len(manifest.validation)} for validation"
    )


def _write(draft: Draft, fit: Fit, out: Path, *, lists: Path, console: Console) -> Proposal:
    """Write recipe and lists; if anything fails, all files are as before."""
    before: dict[Path, bytes | None] = {}  # list → its earlier content
    aside = aside_name(out)
    try:
        text = _first_form_that_works(draft, fit, aside, lists=lists, before=before)
        findings = check(load_recipe(aside), console)
        draft.warnings += [
            line
            for line in (*findings.faults, *findings.warnings)
            if line not in draft.warnings
            and not _counted(line)
            and not (
                draft.missing and str(draft.missing.absolute()) in line
            )  # the draft's own warning says it
        ]
        draft.notes += findings.notes
        write_whole(out, header_text(draft, out) + text)
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, content)
        with suppress(OSError):
            lists.rmdir()
        raise
    finally:
        aside.unlink(missing_ok=True)
    return Proposal(out, tuple(before), tuple(draft.notes), warnings=tuple(draft.warnings))


def _counted(line: str) -> bool:
    """Whether a line lists unread files that the line about the whole folder counts, too."""
    folder = Path(line.partition(": ")[0])
    return (
        folder.is_absolute() and folder.is_dir() and line == unread_line(folder, unread_files(folder, READ))
    )


def _first_form_that_works(
    draft: Draft, fit: Fit, aside: Path, *, lists: Path, before: dict[Path, bytes | None]
) -> str:
    """The recipe's text with the simplest form that gives the intended roles; also written to `aside`.

    The last form needs list files: they are written, and what they replace goes to `before`.
    """
    *simple, last = draft.forms
    for form in simple:
        text = recipe_text(draft, fit, form, out=aside)
        write_whole(aside, text)
        if _gives_roles(load_recipe(aside), draft):
            return text
    for role, pairs in (draft.roles or {}).items():
        if pairs:
            path = lists / f"{role}.txt"
            before[path] = read_file(path) if path.exists() else None
            named = [(image, None) for image, _ in pairs] if "label_parts" in draft.keys else pairs
            write_whole(path, "".join(f"{_line(draft.root, pair)}\n" for pair in named))
    text = recipe_text(draft, fit, last, out=aside)
    write_whole(aside, text)
    return text


def _gives_roles(recipe: Recipe, draft: Draft) -> bool:
    """Whether the recipe gives every image the intended role and label."""
    try:
        manifest = manifest_of(recipe)
    except DarsegError:
        return False
    intended = draft.roles or {}
    return all(
        _resolved(role, ((sample.image, sample.label) for sample in samples))
        == _resolved(role, intended[role])
        for role, samples in manifest.roles().items()
    )


def _resolved(role: str, pairs: Iterable[tuple[Path, Path | None]]) -> set[tuple[str, str | None]]:
    """Absolute paths of images and labels; labels of unlabeled images do not count."""
    return {
        (str(real(image)), str(real(label)) if label and role != "unlabeled" else None)
        for image, label in pairs
    }


def _line(root: Path, pair: tuple[Path, Path | None]) -> str:
    """The line of a list for an image and its label."""
    return " ".join(path.relative_to(root).as_posix() for path in pair if path)
