"""Read all images and labels of a manifest and report everything that is wrong with them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from darseg.data.advice import unknown_values, usual_mistakes
from darseg.data.classes import IGNORE, ClassSet, alike
from darseg.data.encoding import CITY_IDS, LabelEncoding
from darseg.data.images import Picture, read_picture
from darseg.data.label_facts import FileFacts, file_facts, judge, open_fault
from darseg.data.label_parts import Parts, join_parts, part_lines
from darseg.data.labels import raw_classes, read_raw
from darseg.data.manifest import Manifest, Sample
from darseg.data.orientation import UPRIGHT, orientation_mark
from darseg.data.pictures import PictureTally, orientation_lines, size_fault
from darseg.data.sameness import SameTally, digest_pixels
from darseg.data.threads import in_threads
from darseg.errors import DataError

NO_PIXELS = np.empty((0, 0, 3), np.uint8)
"""In place of those of a picture that was looked at."""


@dataclass(frozen=True)
class Findings:
    """What `examine` found out about a data set.

    Attributes:
        faults: lines about what a run would stop at.
        warnings: lines about what a run could live with.
        images: role → number of images.
        pixels: role → int64 [K + 1], pixels of each class; the last entry counts pixels that are not labeled.
        notes: lines about how files are read, if that may surprise a reader.
        largest: role → the readable image with most pixels.
        pictures: those of the notes and warnings that only reading the pictures shows.
        of_roles: those of the warnings that are about absent classes and roles, which a run reports itself.
        labeled: int64 [N, K], pixels of each class in each labeled image.
    """

    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    images: Mapping[str, int]
    pixels: Mapping[str, NDArray[np.int64]]
    notes: tuple[str, ...] = ()
    largest: Mapping[str, Sample] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    of_roles: tuple[str, ...] = ()
    labeled: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 0), np.int64))


@dataclass(frozen=True)
class _SampleFindings:
    """What one sample's files hold.

    Attributes:
        counts: int64 [256], pixels of each class and of 255.
        values: values of an index label file before they are mapped; empty for colors; None if the file is unreadable.
        faults: a line each.
        picture: the image without its pixels; None if it is unreadable.
        size: height and width of the image; 0 if it is unreadable.
        turned_label: whether the label file itself has an orientation mark.
        facts: what the label file holds besides classes; None if there is none that can be read.
        same, same_label: digests of the pixels and of their classes, if they can be read.
        overlapping: pixels that lie in masks of several classes, if the label map is several files.
    """

    counts: NDArray[np.int64]
    values: tuple[int, ...] | None
    faults: tuple[str, ...]
    picture: Picture | None = None
    size: tuple[int, int] = (0, 0)
    turned_label: bool = False
    facts: FileFacts | None = None
    overlapping: int = 0
    same: bytes | None = None
    same_label: bytes | None = None


def examine(manifest: Manifest, advance: Callable[[], object] = lambda: None) -> Findings:
    """Read every image and label of a manifest and collect all faults.

    `darseg check` and the start of a run do this. Nothing is written.

    Args:
        advance: called once per sample.
    """
    classes = manifest.classes
    entries: list[str | FileFacts] = []
    pixels, sizes = dict[str, NDArray[np.int64]](), dict[str, list[int]]()
    tally, same = PictureTally(manifest), SameTally()
    values_of, unreadable = dict[LabelEncoding, set[int]](), set[LabelEncoding]()
    joined, each = list[tuple[Parts, int]](), list[NDArray[np.int64]]()
    for role, samples in manifest.roles().items():
        counts, sizes[role] = np.zeros(256, np.int64), []
        results = in_threads(lambda sample: _examine_sample(sample, classes), samples)
        for sample, result in zip(samples, results, strict=True):
            counts += result.counts
            each += [result.counts[: len(classes)]] if role == "labeled" else []
            entries += [*result.faults, *([result.facts] if result.facts else [])]
            sizes[role].append(math.prod(result.size))
            tally.add(role, sample, result.picture, turned_label=result.turned_label)
            same.add(role, sample, image=result.same, label=result.same_label)
            if sample.parts:
                joined.append((sample.parts, result.overlapping))
            elif sample.label:
                encoding = sample.encoding.for_file(sample.label)
                values_of.setdefault(encoding, set()).update(result.values or ())
                unreadable |= {encoding} if result.values is None else set()
            advance()
        pixels[role] = np.append(counts[: len(classes)], counts[IGNORE])
    judgment = judge([entry for entry in entries if isinstance(entry, FileFacts)], classes)
    by_file = [entry if isinstance(entry, str) else open_fault(entry, judgment.strays) for entry in entries]
    faults = [*filter(None, by_file), *judgment.faults]
    warnings: list[str] = [*tally.warnings(), *same.warnings(), *judgment.warnings]
    for encoding, all_values in values_of.items():
        values = all_values - judgment.strays
        unknown = {value for value in values if value >= len(classes)} - {encoding.ignore, IGNORE}
        # Values that seem to be absent may be in files that could not be read.
        if unknown or encoding not in unreadable:
            lines = usual_mistakes(values, classes, encoding)
            (faults if unknown or values == {0, IGNORE} else warnings).extend(lines)
    warnings += alike(classes.names)
    of_roles: list[str] = []
    if manifest.labeled and not faults:
        faults, of_roles, unscored = _coverage(manifest, pixels)
        warnings += unscored
    return Findings(
        faults=tuple(faults),
        warnings=(*warnings, *of_roles, *_empty_roles(manifest)),
        of_roles=(*of_roles, *_empty_roles(manifest)),
        images={role: len(samples) for role, samples in manifest.roles().items()},
        pixels=pixels,
        notes=(*reading_notes(manifest), *tally.notes(), *judgment.notes, *part_lines(joined)),
        pictures=(*tally.notes(), *tally.warnings()),
        largest=_largest(manifest, sizes),
        labeled=np.array(each, np.int64).reshape(-1, len(classes)),
    )


def _largest(manifest: Manifest, pixels: Mapping[str, list[int]]) -> dict[str, Sample]:
    """Role → its image with most pixels, for roles with readable images."""
    return {
        role: samples[int(np.argmax(pixels[role]))]
        for role, samples in manifest.roles().items()
        if any(pixels[role])
    }


def _coverage(
    manifest: Manifest, pixels: Mapping[str, NDArray[np.int64]]
) -> tuple[list[str], list[str], list[str]]:
    """Which classes occur: faults, lines about absent classes, and about classes without scores."""
    classes = manifest.classes
    absent = [name for name, count in zip(classes.names, pixels["labeled"], strict=False) if count == 0]
    unscored = _unscored(classes, pixels) if manifest.validation else ""
    if len(absent) == len(classes):
        return (
            [
                "labeled: no pixel is labeled, because every label map holds only the ignore value. Check data.ignore "
                "and the label maps."
            ],
            [],
            [],
        )
    return [], [_absent(absent)] if absent else [], [unscored] if unscored else []


def _absent(names: list[str]) -> str:
    return (
        f"No labeled image has a pixel of: {', '.join(names)}. A class without labeled pixels is never pseudo-labeled. "
        "Label a few pixels of it, or remove it from data.classes."
    )


def _unscored(classes: ClassSet, pixels: Mapping[str, NDArray[np.int64]]) -> str:
    """A line about classes that are learned but not measured; empty if there are none."""
    names = [
        name
        for k, name in enumerate(classes.names)
        if pixels["labeled"][k] > 0 and pixels["validation"][k] == 0
    ]
    if not names:
        return ""
    return (
        f"No validation image has a pixel of: {', '.join(names)}. Scores will say nothing about a class without "
        "validation pixels. Choose other validation images (data.validation)."
    )


def _empty_roles(manifest: Manifest) -> list[str]:
    lines = []
    if not manifest.unlabeled:
        lines.append("There are no unlabeled images, so only round 0 (labeled images only) can be trained.")
    if not manifest.validation:
        lines.append(
            "There are no validation images, so nothing will be scored. Set data.validation (for example {every: 5})."
        )
    return lines


def reading_notes(manifest: Manifest) -> list[str]:
    """Lines about files whose names or orientation marks decide how they are read."""
    notes = [*manifest.notes, *orientation_lines(manifest)[0]]
    samples = [sample for role in manifest.roles().values() for sample in role]
    count = sum(
        sample.label is not None and sample.encoding.for_file(sample.label) is CITY_IDS for sample in samples
    )
    if count:
        notes.append(
            f"{count:,} label files hold Cityscapes' ids (labelIds); they are read as the 19 train ids."
        )
    return notes


def _examine_sample(sample: Sample, classes: ClassSet) -> _SampleFindings:
    faults: list[str] = []
    picture, size, same = None, (0, 0), None
    try:
        picture = read_picture(sample.image, sample.reading)
        size, same = picture.size, digest_pixels(picture.pixels)
        picture = replace(picture, pixels=NO_PIXELS)
    except DataError as error:
        faults.append(str(error))
    counts, values = np.zeros(256, np.int64), None
    if sample.label is None:
        return _SampleFindings(counts, values, tuple(faults), picture=picture, size=size, same=same)
    found = replace(
        _SampleFindings(counts, values, tuple(faults), picture=picture, size=size, same=same),
        turned_label=orientation_mark(sample.label) != UPRIGHT,
    )
    if sample.parts is not None:
        return _with_masks(found, sample, sample.parts)
    encoding = sample.encoding.for_file(sample.label)
    try:
        raw = read_raw(sample.label, encoding.format, sample.reading.max_pixels)
    except DataError as error:
        return replace(found, faults=(*faults, str(error)))
    facts = file_facts(raw, encoding, sample.label, count=len(classes))
    by_value = raw.values.dtype != np.int32 and not facts.by_color and not facts.contradicts
    values = facts.values if by_value else ()
    found = replace(found, values=values, facts=facts)
    if facts.contradicts:
        return found
    try:
        label = raw_classes(raw, encoding, sample.label)
    except DataError as error:
        return replace(found, facts=replace(facts, fault=str(error)))
    if all(size) and label.shape != size:
        faults.append(size_fault(sample, label.shape, size))
    counts = np.bincount(label.reshape(-1), minlength=256)
    unknown = unknown_values(counts, len(classes))
    if unknown:
        facts = replace(facts, fault=f"{sample.label}: {unknown}")
    return replace(found, counts=counts, faults=tuple(faults), facts=facts, same_label=digest_pixels(label))


def _with_masks(found: _SampleFindings, sample: Sample, parts: Parts) -> _SampleFindings:
    """The findings of a sample whose label map is several masks."""
    try:
        joined = join_parts(parts, sample.reading.max_pixels)
    except DataError as error:
        return replace(found, faults=(*found.faults, str(error)))
    counts = np.bincount(joined.classes.reshape(-1), minlength=256)
    found = replace(
        found,
        counts=counts,
        values=(),
        overlapping=joined.overlapping,
        same_label=digest_pixels(joined.classes),
    )
    if all(found.size) and joined.classes.shape != found.size:
        return replace(found, faults=(*found.faults, size_fault(sample, joined.classes.shape, found.size)))
    return found
