"""A recipe for an unknown folder: what is in it, what fits this machine, and why, as comments (`darseg init`)."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from darseg.config.recipe import Recipe
from darseg.config.text import flow, load_recipe
from darseg.data.classes import BUILT_IN
from darseg.data.files import ASIDE, write_whole
from darseg.data.images import image_size
from darseg.data.layouts import Layout, find_sbd
from darseg.data.manifest import Manifest, sample_id
from darseg.errors import DarsegError, DataError, RunError, faults
from darseg.init.discover import Discovery, Found, discover, find_names, guess_classes, survey
from darseg.model.footprint import training_memory
from darseg.model.network import HEAD_CHANNELS, NetworkSpec
from darseg.model.weights import load_weights
from darseg.run.build import manifest_of, pick_device, place
from darseg.run.check import check
from darseg.run.journal import Journal
from darseg.run.machine import free_memory, usable_cores

MEMORY_SHARE = 0.5
"""Of the free memory that a step's tensors may take: the other half is for the workspace of convolutions, which is not
counted, for decoded images, and for whoever else is on the machine."""

UNKNOWN_MEMORY = 4 << 30
"""Where the system does not say: what any machine of these days has."""

PAPER_CROP = 713
SMALL_CROP = 257
"""On CPUs, where 713 takes eight times as long a step."""

LARGE_BATCH = 16
"""The paper's."""
HOURS = {"cpu": 1.0, "cuda": 8.0}
"""That all rounds may take by the proposal."""
EPOCHS = 100, 20
"""Over the labeled images in round 0, over the unlabeled ones in each later round: aims, cut to the hours above."""
FEWEST_STEPS, MOST_STEPS = 100, 20_000

LARGEST_WINDOW = {"cpu": 513, "cuda": 1025}
"""Sides of images that are predicted in one window; larger ones in windows of the crop's size."""

FIRST_TO_LABEL = 10, 50
"""Images to label before anything can be learned: at least, at most."""

SEQUENCE = re.compile(r"(.*?)[_\-]?\d+$")


@dataclass(frozen=True)
class Proposal:
    """What `propose_recipe` wrote.

    Attributes:
        recipe: its path; lists: the list files beside it.
        notes: what was found; warnings: what a reader must look at, faults that `check` still finds among them.
    """

    recipe: Path
    lists: tuple[Path, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass
class _Data:
    """The data section in the making.

    Attributes:
        keys: key → (value, comment), in order.
        class_notes: a comment for each class.
        forms: the roles' keys, simplest first; the first that gives `roles` is taken.
        roles: role → (image, label) as meant; None: whatever the layout says.
        sizes: height, width of images.
    """

    root: Path
    classes: Any
    class_comment: str
    class_notes: Sequence[str] = ()
    keys: dict[str, tuple[Any, str]] = field(default_factory=dict)
    forms: list[dict[str, tuple[Any, str]]] = field(default_factory=lambda: [{}])
    roles: dict[str, list[tuple[Path, Path | None]]] | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    labeled: int = 0
    unlabeled: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    """What fits the machine. `covers`: a window covers the largest image; `seconds`: of a step; `steps` of each round."""

    spec: NetworkSpec
    weights: str
    crop: tuple[int, int]
    window: tuple[int, int]
    covers: bool
    batch: int
    bf16: bool
    memory: int
    budget: int
    seconds: float
    steps: tuple[int, ...]
    device: str
    described: str


def propose_recipe(
    folder: Path | str,
    out: Path | str | None = None,
    *,
    weights: Path | str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Proposal:
    """Look at a folder of images, some with labels, and write a commented recipe for it that `check` accepts.

    All images and labels are read. What cannot be read is left out, by list files beside the recipe, and named; nothing
    is written into the folder.

    Args:
        folder: images and labels in any of the usual arrangements (docs/init.md).
        out: the recipe; default: the folder's name with .yaml, in the current folder.
        weights: pretrained weights; default: a file resnet*.pth in the folder or beside the recipe, else none.
        overwrite: replace an earlier recipe and its lists.

    Raises DataError where there is nothing to learn from, saying what to do first; RunError where the recipe exists;
    WeightsError for given weights that do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder that holds the images.")
    out = Path(out) if out else Path(f"{folder.resolve().name or 'images'}.yaml")
    lists = out.with_name(f"{out.stem}_lists")
    for path in (out, lists):
        if path.exists() and not overwrite:
            raise RunError(
                f"{path} exists. Choose another name (--out), or replace it and what you changed in it (--force)."
            )
    console = console or Console()
    data = _published(folder) or _unknown(folder, lists, console)
    fit = _fit(data, folder, out, weights)
    return _write(data, fit, out, lists, console)


# The data


def _published(folder: Path) -> _Data | None:
    """Cityscapes or VOC as they are downloaded, here or up to two folders below."""
    for root in (folder, *(path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))):
        if not root.is_dir():
            continue
        for layout in (Layout("cityscapes", root), Layout("voc", root)):
            if layout.missing():
                continue
            if layout.name == "voc":
                layout = replace(layout, sbd=find_sbd(root, None))
            what = {"cityscapes": "leftImg8bit and gtFine", "voc": "JPEGImages, SegmentationClass and lists"}
            data = _Data(root, layout.name, f"the {len(BUILT_IN[layout.name])} classes it is scored with")
            data.keys["layout"] = layout.name, f"{what[layout.name]} are there: the official split"
            data.notes.append(f"{root} is laid out as {layout.name} ({what[layout.name]})")
            return data
    return None


def _unknown(folder: Path, lists: Path, console: Console) -> _Data:
    seen = discover(folder)
    labeled = [one for one in seen.found if one.label]
    if not seen.found:
        raise DataError(_nothing(folder, seen))
    if not labeled:
        raise DataError(_first_label(folder, seen))
    with Journal(None, None, console).progress("read", len(seen.found)) as advance:
        read = survey(seen.found, advance)
    label_folders = [one.label.parent for one in labeled if one.label]
    names = find_names([folder, *_common(folder, label_folders)])
    guess = guess_classes(read, names, [one.label for one in labeled if one.label])
    data = _Data(folder, guess.classes, guess.why.pop("classes"), guess.notes)
    for key, value in guess.keys.items():
        data.keys[key] = value, guess.why.get(key, "")
    data.notes += [f"{len(seen.found)} images, {len(labeled)} of them with labels, in {folder}", *seen.notes]
    if seen.annotations:
        data.notes.append(
            f"{len(seen.annotations)} annotation file(s) are not used, the first is {seen.annotations[0]}: label maps "
            "are there, and `darseg rasterize` would make others of them"
        )
    data.warnings += guess.warnings
    good = _usable(seen.found, read.faults, folder, data)
    _choose_roles(data, seen, good, lists)
    roles = data.roles or {}
    used = {image for pairs in roles.values() for image, _ in pairs}
    data.sizes = [size for path, size in sorted(read.sizes.items()) if path in used]
    data.labeled, data.unlabeled = len(roles["labeled"]), len(roles["unlabeled"])
    return data


def _nothing(folder: Path, seen: Discovery) -> str:
    more = f" There is: {'; '.join(seen.notes)}." if seen.notes else ""
    return f"{folder}: no images found (JPEG, PNG, BMP, TIFF, WebP are read).{more} Give the folder that holds them."


def _first_label(folder: Path, seen: Discovery) -> str:
    count = len(seen.found)
    if seen.annotations:
        first = seen.annotations[0]
        single = seen.annotation_kind in ("coco", "cvat")
        source = first if single else first.parent
        return (
            f"{folder}: {count} images, no label maps, but annotation files ({seen.annotation_kind}), the first is "
            f"{first}. Make label maps of them, then run this again:\n  darseg rasterize {_quoted(source)} "
            f"{_quoted(folder / 'labels')}"
        )
    least, most = FIRST_TO_LABEL
    wanted = min(count, max(least, min(most, count // 20)))
    chosen = [seen.found[at * count // wanted].image for at in range(wanted)]
    lines = [str(path.relative_to(folder)) for path in chosen]
    why = f"\n{'; '.join(seen.notes)}." if seen.notes else ""
    return (
        faults(
            f"{folder}: {count} images and no labels. Label some first – about {wanted}, unlike each other, that show "
            "every class; these are spread over the folder",
            lines,
            limit=least,
        )
        + "\nDraw label maps (PNG of class indices, 255 = not labeled) into labels/, under the names of their images, "
        "or annotate with labelme or CVAT and make label maps with `darseg rasterize`. Then run this again."
        "\nIf labels are there, they were taken for images: name their folder labels or masks, or their files a_mask.png "
        "beside a.jpg (docs/init.md has all names)." + why
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _common(root: Path, folders: Sequence[Path]) -> list[Path]:
    """The folder that holds all these, and those between it and `root`."""
    if not folders:
        return []
    common = Path(os.path.commonpath([str(path.absolute()) for path in folders]))
    top = root.absolute()
    between = [path for path in (common, *common.parents) if path == top or top in path.parents]
    return between + sorted(set(folders))[:4]


def _usable(found: Sequence[Found], wrong: Mapping[Path, str], folder: Path, data: _Data) -> list[Found]:
    """Images that can be used; a label that cannot is left out together with its image, whose label is meant to be."""
    good, lines = [], []
    ids: dict[str, Path] = {}
    for one in found:
        name = sample_id(one.image.relative_to(folder))
        told = [wrong[path] for path in (one.image, one.label) if path and path in wrong]
        if not _writable(str(one.image)) or (one.label and not _writable(str(one.label))):
            told.append(
                f"{str(one.image)!a}: a name that a list cannot hold (line ends, or no UTF-8). Rename it"
            )
        other = ids.setdefault(name.casefold(), one.image)
        if not told and other != one.image:
            told.append(
                f"{one.image}: its name differs from {other.name} in suffix or case alone. Rename one"
            )
        lines += told
        if not told:
            good.append(one)
    if lines:
        data.warnings.append(
            faults(
                f"{len(lines)} file(s) cannot be used; they and their images are left out", lines, limit=20
            )
        )
    return good


def _writable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return len(name.splitlines()) == 1


def _choose_roles(data: _Data, seen: Discovery, good: Sequence[Found], lists: Path) -> None:
    """Which image has which role, and how a recipe can say so."""
    of_list = {image: split for split, images in seen.lists.items() for image in images}
    parts: dict[str, list[Found]] = {"train": [], "validation": [], "test": [], "unlabeled": []}
    outside, bare = 0, 0
    for one in good:
        split = of_list.get(one.image) if of_list else one.split
        if of_list and split is None:
            # Where a list names what is labeled, or to be trained on, all others are for their pixels alone.
            if one.label and "labeled" not in seen.lists:
                outside += 1
                continue
            split = "unlabeled"
        if split in ("validation", "test") and one.label is None:
            bare += 1
            continue
        if split == "unlabeled" or (split != "validation" and split != "test" and one.label is None):
            parts["unlabeled"].append(one)
        else:
            parts[split if split in ("validation", "test") else "train"].append(one)
    if bare:
        data.notes.append(f"{bare} image(s) of the validation or test part have no label and are left out")
    if outside:
        data.notes.append(
            f"{outside} labeled image(s) are in none of the lists and are left out: "
            + ", ".join(map(str, seen.list_files.values()))
        )
    drawn = not parts["validation"]
    if not parts["train"]:
        raise DataError(
            f"{seen.root}: no labeled image is left for training: {len(parts['validation'])} are for validation, "
            f"{len(parts['test'])} for the test. Label images of the training part."
        )
    if drawn and len(parts["train"]) > 1:
        parts["validation"] = parts["train"][::5]
        parts["train"] = [one for at, one in enumerate(parts["train"]) if at % 5]
    named = {"labeled": parts["train"], **{role: parts[role] for role in ("unlabeled", "validation", "test")}}
    data.roles = {role: [(one.image, one.label) for one in some] for role, some in named.items()}
    _note_sequences(data, seen.root, parts, drawn)
    data.forms = [*_forms(data, seen, drawn), _listed(data, lists, drawn)]


def _note_sequences(data: _Data, root: Path, parts: Mapping[str, Sequence[Found]], drawn: bool) -> None:
    if not drawn:
        return
    groups: dict[str, int] = {}
    for one in (*parts["train"], *parts["validation"]):
        match = SEQUENCE.fullmatch(sample_id(one.image.relative_to(root)))
        if match:
            groups[match[1]] = groups.get(match[1], 0) + 1
    several = [name for name, count in groups.items() if count > 1]
    if len(several) > 1 and sum(groups.values()) >= 3 * len(groups):
        data.warnings.append(
            f"the labeled images look like {len(groups)} sequences ({', '.join(map(repr, several[:3]))} …), and "
            "validation takes every fifth image: if neighbors show the same scene, scores will be too good. Hold whole "
            "sequences out: write their ids into a list and set data.validation to it"
        )


Form = dict[str, tuple[Any, str]]


def _forms(data: _Data, seen: Discovery, drawn: bool) -> Iterator[Form]:
    """Ways to say the roles without list files of our own."""
    roles, root = data.roles or {}, data.root
    counts = {role: len(pairs) for role, pairs in roles.items()}
    places = {role: _places(pairs, root) for role, pairs in roles.items()}
    train = places["labeled"]
    if train is None:
        return
    base: Form = {}
    if train[0] != "images":
        base["images"] = train[0], "where the images are"
    if train[1] != "labels":
        base["labels"] = train[1], "label maps under the same names"
    if seen.list_files:
        form = dict(base)
        for split, path in seen.list_files.items():
            role = "labeled" if split == "train" else split
            if counts[role]:
                form[role] = path.relative_to(root).as_posix(), f"{counts[role]} images"
        if drawn and "labeled" in form and counts["validation"]:
            train_list = form["labeled"][0]
            form["labeled"] = {"list": train_list, "except_every": 5}, f"{counts['labeled']} images"
            form["validation"] = {"list": train_list, "every": 5}, _held_out(counts["validation"])
        yield form
    form = dict(base)
    if drawn and counts["validation"]:
        form["validation"] = {"every": 5}, _held_out(counts["validation"])
    for role in ("validation", "test"):
        if (there := places[role]) is not None and not (drawn and role == "validation"):
            form[role] = {"images": there[0], "labels": there[1]}, f"{counts[role]} images"
    yield form
    if counts["unlabeled"] and (bare := _folder_of([image for image, _ in roles["unlabeled"]], root)):
        yield {**form, "unlabeled": ({"images": bare}, f"{counts['unlabeled']} images")}


def _held_out(count: int) -> str:
    return f"every fifth labeled image, {count} in all, is held out for scores"


def _places(pairs: Sequence[tuple[Path, Path | None]], root: Path) -> tuple[str, str] | None:
    """Folders of images and labels below `root`, where each label lies in its own as its image does."""
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


def _listed(data: _Data, lists: Path, drawn: bool) -> Form:
    """Roles by list files beside the recipe: says everything."""
    form: Form = {}
    for role, pairs in (data.roles or {}).items():
        if pairs:
            listed = _from(data.root, lists / f"{role}.txt")
            what = _held_out(len(pairs)) if role == "validation" and drawn else f"{len(pairs)} images"
            form[role] = listed, what
    return form


def _from(folder: Path, path: Path) -> str:
    """A path as seen from a folder; absolute where they have little in common."""
    try:
        relative = Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()
    return relative if relative.count("../") <= 3 else path.absolute().as_posix()


# The machine


def _fit(data: _Data, folder: Path, out: Path, given: Path | str | None) -> _Fit:
    if data.roles is None:
        recipe = _trial(data, out, {})
        manifest = manifest_of(recipe)
        data.labeled, data.unlabeled = len(manifest.labeled), len(manifest.unlabeled)
        some = (*manifest.labeled, *manifest.unlabeled)
        for sample in some[:: max(1, len(some) // 50)]:
            with suppress(DataError):
                data.sizes.append(image_size(sample.image))
        data.notes.append(
            f"{data.labeled} labeled and {data.unlabeled} unlabeled images, {len(manifest.validation)} for validation"
        )
    device = pick_device()
    kind = device.type
    if kind == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
        described = f"a GPU ({torch.cuda.get_device_name(device)})"
    else:
        budget = int((free_memory() or UNKNOWN_MEMORY) * MEMORY_SHARE)
        described = f"{usable_cores()} CPU core(s), no GPU"
    names = data.classes if isinstance(data.classes, str) else list(data.classes)
    count = len(BUILT_IN[names]) if isinstance(names, str) else len(names)
    spec = (
        NetworkSpec(backbone="resnet50", classes=count)
        if kind == "cuda"
        else NetworkSpec(backbone="resnet18", classes=count, output_stride=16, head_channels=128)
    )
    spec, weights = _weights(spec, folder, out, given, data)
    heights, widths = (sorted(side) for side in zip(*(data.sizes or [(PAPER_CROP, PAPER_CROP)]), strict=True))
    small = heights[len(heights) // 10], widths[len(widths) // 10]  # a few small ones are padded
    target = PAPER_CROP if kind == "cuda" else SMALL_CROP
    crop, batch, memory = _crop_and_batch(spec, small, target, data.labeled, budget)
    largest = heights[-1], widths[-1]
    sides = spec.sides
    whole = max(sides.up(largest[0]), crop[0]), max(sides.up(largest[1]), crop[1])
    window = whole if max(whole) <= max(*crop, LARGEST_WINDOW[kind]) else crop
    seconds = _seconds(spec, batch, crop)
    return _Fit(
        spec=spec,
        weights=weights,
        crop=crop,
        window=window,
        covers=window == whole,
        batch=batch,
        bf16=kind == "cuda" and torch.cuda.is_bf16_supported(),
        memory=memory,
        budget=budget,
        seconds=seconds,
        steps=_steps(data, batch, seconds, HOURS[kind] * 3600),
        device=kind,
        described=described,
    )


def _weights(
    spec: NetworkSpec, folder: Path, out: Path, given: Path | str | None, data: _Data
) -> tuple[NetworkSpec, str]:
    """Pretrained weights, as the recipe names them, and the network with the backbone they are of."""

    def suited(path: Path) -> NetworkSpec:
        known = re.search(r"resnet(18|34|50|101)(?!\d)", path.name)
        return replace(spec, backbone=f"resnet{known[1]}") if known else spec

    if given is not None:
        path = Path(given)
        spec = suited(path)
        load_weights(spec.build(), path)
        return spec, _from(out.parent, path)
    places = dict.fromkeys([out.parent.absolute(), folder.absolute(), Path.cwd()])
    found = [path for place in places for path in sorted(place.glob("resnet*.pth"))]
    found.sort(key=lambda path: suited(path).backbone != spec.backbone)
    for path in found:
        try:
            load_weights(suited(path).build(), path)
        except DarsegError as error:
            data.notes.append(f"{path} is not used as pretrained weights: {error}")
            continue
        data.notes.append(f"pretrained weights: {path}")
        return suited(path), _from(out.parent, path)
    return spec, "none"


def _crop_and_batch(
    spec: NetworkSpec, small: tuple[int, int], target: int, labeled: int, budget: int
) -> tuple[tuple[int, int], int, int]:
    """The largest crop, and with it the largest batch, whose step fits the memory; the smallest of all if none does."""
    sides = spec.sides
    crop = sides.down(min(target, small[0])), sides.down(min(target, small[1]))
    batches = [size for size in (LARGE_BATCH, 8, 4) if size <= max(4, labeled)]
    if pick_device().type == "cpu":
        batches = [size for size in batches if size <= 8]
    while True:
        for batch in batches:
            memory = sum(training_memory(spec, batch, *crop))
            if memory <= budget or (batch == 4 and max(crop) <= sides.up(4 * sides.step)):
                return crop, batch, memory
        crop = sides.down(crop[0] * 3 // 4), sides.down(crop[1] * 3 // 4)


def _seconds(spec: NetworkSpec, batch: int, crop: tuple[int, int]) -> float:
    """Of a step here: two crops forth and back, once to warm up and once by the clock.

    On a CPU by the processor's clock, which other work on the machine does not move.
    """
    network = place(spec.build())
    device = network.mean.device
    images = torch.zeros(2, 3, *crop, dtype=torch.uint8, device=device)
    labels = torch.zeros(2, *crop, dtype=torch.int64, device=device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = 0.0
    for _ in range(2):
        began = clock()
        F.cross_entropy(network(images).main, labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    return max(1e-3, clock() - began) / threads * batch / 2


def _steps(data: _Data, batch: int, seconds: float, limit: float) -> tuple[int, ...]:
    aims = [EPOCHS[0] * data.labeled / batch]
    if data.unlabeled:
        aims += [EPOCHS[1] * data.unlabeled / (batch // 2)] * 2
    aims = [min(max(aim, FEWEST_STEPS), MOST_STEPS) for aim in aims]
    factor = min(1.0, limit / (sum(aims) * seconds))
    return tuple(max(FEWEST_STEPS, 10 * round(aim * factor / 10)) for aim in aims)


# The text


def _write(data: _Data, fit: _Fit, out: Path, lists: Path, console: Console) -> Proposal:
    written: dict[Path, bytes | None] = {}  # list → what stood there before
    aside = out.with_name(out.name + ASIDE)
    try:
        for form in data.forms:
            if form is data.forms[-1] and data.roles is not None:
                for role, pairs in data.roles.items():
                    if pairs:
                        path = lists / f"{role}.txt"
                        written[path] = path.read_bytes() if path.exists() else None
                        lines = [_line(data.root, image, label) for image, label in pairs]
                        write_whole(path, "".join(f"{line}\n" for line in lines))
            text = _text(data, fit, form, out)
            write_whole(aside, text)
            recipe = load_recipe(aside)
            if form is data.forms[-1] or _as_meant(recipe, data):
                break
        found = check(recipe, console)
        data.warnings += [*found.faults, *found.warnings]
        data.notes += found.notes
        write_whole(out, _comments(data, out) + text)
    except BaseException:
        for path, before in written.items():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, before)
        with suppress(OSError):
            lists.rmdir()
        raise
    finally:
        aside.unlink(missing_ok=True)
    return Proposal(out, tuple(written), tuple(data.notes), tuple(data.warnings))


def _trial(data: _Data, out: Path, form: Form) -> Recipe:
    """A recipe with this data section and anything else."""
    aside = out.with_name(out.name + ASIDE)
    text = [*_data_lines(data, form, out), "network: {weights: none}", "rounds: [{steps: 1}]"]
    try:
        write_whole(aside, "\n".join(text) + "\n")
        return load_recipe(aside)
    finally:
        aside.unlink(missing_ok=True)


def _as_meant(recipe: Recipe, data: _Data) -> bool:
    """Whether the recipe gives every image the role, and the label, that it is meant to have."""
    try:
        manifest: Manifest = manifest_of(recipe)
    except DarsegError:
        return False

    def pairs(role: str, some: Any) -> set[tuple[str, str | None]]:
        named = (
            (str(image.resolve()), label and role != "unlabeled" and str(label.resolve()))
            for image, label in some
        )
        return {(image, label or None) for image, label in named}

    meant = data.roles or {}
    return all(
        pairs(role, ((one.image, one.label) for one in samples)) == pairs(role, meant[role])
        for role, samples in manifest.roles().items()
    )


def _line(root: Path, image: Path, label: Path | None) -> str:
    named = [path.relative_to(root).as_posix() for path in (image, label) if path]
    return " ".join(named)


def _comment(text: str) -> str:
    """Any text as a YAML comment on one line."""
    flat = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in flat)


def _above_key(text: str, indent: str = "") -> list[str]:
    """Any text as comment lines of their own."""
    wrapped = [part for line in text.splitlines() for part in textwrap.wrap(_comment(line), 110)]
    return [f"{indent}# {line}" for line in wrapped]


def _comments(data: _Data, out: Path) -> str:
    lines = _above_key(
        f"Proposed by darseg init. Change what you like; all keys: docs/recipe.md. Next: darseg check {_quoted(out)}"
    )
    for note in data.notes:
        lines += _above_key(f"Found: {note}")
    for warning in data.warnings:
        lines += _above_key(f"LOOK AT THIS: {warning}")
    return "\n".join(lines) + "\n"


def _data_lines(data: _Data, form: Form, out: Path) -> list[str]:
    lines = ["data:"]

    def add(key: str, value: Any, comment: str) -> None:
        lines.append(f"  {key}: {flow(value)}" + (f"  # {_comment(comment)}" if comment else ""))

    add("root", _from(out.parent, data.root), "relative to this file; the paths below are relative to it")
    if isinstance(data.classes, str):
        add("classes", data.classes, data.class_comment)
    else:
        lines.append(f"  classes:  # {_comment(data.class_comment)}")
        for at, name in enumerate(data.classes):
            entry = (
                f"{flow(name)}: {flow(data.classes[name])}"
                if isinstance(data.classes, dict)
                else f"- {flow(name)}"
            )
            note = data.class_notes[at] if at < len(data.class_notes) else ""
            lines.append(f"    {entry}" + (f"  # {note} of the labeled pixels" if note else ""))
    for key, (value, comment) in (data.keys | form).items():
        add(key, value, comment)
    return lines


def _text(data: _Data, fit: _Fit, form: Form, out: Path) -> str:
    spec, gpu = fit.spec, fit.device == "cuda"
    minutes = [f"{max(1, round(steps * fit.seconds / 60))} min" for steps in fit.steps]
    ready = (
        "ImageNet weights, as the paper's"
        if fit.weights != "none"
        else f"starts from random numbers, and with few labels that costs most of the score: give torchvision's "
        f"{spec.backbone} (download.pytorch.org/models) here, as a file or as {{url: https://…, sha256: …}}"
    )
    lines = [
        *_data_lines(data, form, out),
        "network:",
        f"  backbone: {spec.backbone}  # for {fit.described}"
        + ("; resnet101 is the paper's larger one" if gpu else "; on a GPU take resnet50"),
        *_above_key(ready, "  "),
        f"  weights: {flow(fit.weights)}",
        f"  output_stride: {spec.output_stride}  # "
        + ("finer, as the paper's" if gpu else "faster; 8 is finer and takes longer"),
    ]
    if spec.head_channels != HEAD_CHANNELS:
        lines.append(
            f"  head_channels: {spec.head_channels}  # a narrow head is faster; the paper has {HEAD_CHANNELS}"
        )
    heights, widths = (sorted(side) for side in zip(*(data.sizes or [(0, 0)]), strict=True))
    sizes = f"{heights[0]}x{widths[0]}" + (
        "" if (heights[0], widths[0]) == (heights[-1], widths[-1]) else f" to {heights[-1]}x{widths[-1]}"
    )
    need = f"{spec.output_stride}n + 1 as the network needs, within the images ({sizes})"
    memory = f"{fit.memory / 1e9:.1f} GB, of {fit.budget / 1e9:.1f} GB that a step may take here"
    measured = f"{fit.seconds:.2g} s a step alone on this machine, measured; more is usually better"
    lines += [
        "training:",
        f"  crop: {flow(list(fit.crop))}  # height, width; {need}",
        f"  batch: {fit.batch}  # images a step; {memory}",
        f"  precision: {'bf16' if fit.bf16 else 'fp32'}  # "
        + ("this GPU computes it several times faster" if fit.bf16 else "bf16 is for GPUs that have it"),
        "labeling:",
        f"  window: {flow(list(fit.window))}  # for labeling and scoring; "
        + (
            "one window covers an image"
            if fit.covers
            else "an image is covered by several, as large as the crops"
        ),
    ]
    if len(fit.steps) == 1:
        lines += [
            "rounds:  # one: there are no unlabeled images, and later rounds learn from those",
            f"  - steps: {fit.steps[0]}  # about {minutes[0]} here ({measured})",
        ]
    else:
        first, second, third = fit.steps
        lines += [
            *_above_key(f"Rounds as the paper has them, steps by the time they take: {measured}"),
            "rounds:",
            f"  - steps: {first}  # about {minutes[0]}, on the {data.labeled} labeled images alone",
            f"  - steps: {second}  # about {minutes[1]}, besides labeling {data.unlabeled} images",
            "    labeling_ratio: 0.4  # share of the unlabeled pixels to label: the paper's; those that look surest",
            f"  - steps: {third}  # about {minutes[2]}",
            "    labeling_ratio: 0.65",
            "    scale: [0.5, 3.0]  # stronger augmentation in the last round: the paper's",
        ]
    return "\n".join(lines) + "\n"
