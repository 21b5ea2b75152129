"""What is worth saying about pictures: which way up they are read, and what of them is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from darseg.data.images import Picture, stored_size
from darseg.data.manifest import Manifest, Sample
from darseg.data.orientation import TURNED_MARKS, TURNS, UPRIGHT, MarkedLabels, orientation_mark, upright_size

USUAL_DEPTHS = (10, 12, 14)
"""Bits of cameras and satellites whose values are saved in 16 bits."""


def size_fault(sample: Sample, label_size: tuple[int, ...], image_size: tuple[int, ...]) -> str:
    """A line about a label map whose size is not that of its image."""
    return (
        f"{sample.label}: the label map is {label_size[0]}x{label_size[1]} pixels (height x width), but its image "
        f"{sample.image} is {image_size[0]}x{image_size[1]}. Both must have the same size."
        + _hint_of_mark(sample, label_size)
    )


def _hint_of_mark(sample: Sample, label_size: tuple[int, ...]) -> str:
    """What the orientation mark of an image has to do with a wrong size; empty if it has none."""
    mark = orientation_mark(sample.image)
    if mark not in TURNED_MARKS:
        return ""
    way, other = ("upright", "stored") if sample.reading.upright else ("as it is stored", "upright")
    size = upright_size(stored_size(sample.image) or (0, 0), mark if other == "upright" else UPRIGHT)
    remedy = (
        f" The label map fits the {other} picture: if all do, set data.orientation: {other}."
        if label_size == size
        else ""
    )
    return f" The image has an orientation mark (EXIF {mark}: {TURNS[mark]}) and is read {way}.{remedy}"


def marked_line(paths: Iterable[Path], *, upright: bool) -> str:
    """A line that counts the files with an orientation mark; empty if there are none. Reads headers only."""
    count = sum(orientation_mark(path) != UPRIGHT for path in paths)
    way = "upright" if upright else "as they are stored"
    return f"{count:,} image(s) have an orientation mark (EXIF) and are read {way}." if count else ""


def weigh_marks(samples: Iterable[Sample]) -> MarkedLabels:
    """Compare the label maps of images that have an orientation mark with both sizes; reads headers only."""
    counts = {"upright": 0, "stored": 0, "both": 0}
    for sample in samples:
        if sample.label is None or (mark := orientation_mark(sample.image)) == UPRIGHT:
            continue
        stored, label = stored_size(sample.image), stored_size(sample.label)
        if stored is None or label is None:
            continue
        upright = upright_size(stored, mark)
        if upright == stored == label:
            counts["both"] += 1
        elif label == upright:
            counts["upright"] += 1
        elif label == stored:
            counts["stored"] += 1
    return MarkedLabels(**counts)


def follow_marks(manifest: Manifest, orientation: str) -> Manifest:
    """The manifest with its pictures read upright or as they are stored.

    Args:
        orientation: "upright", "stored", or "auto": as the label maps of marked images say; upright if they do not.
    """
    labeled = (*manifest.labeled, *manifest.validation, *manifest.test)
    marks = weigh_marks(labeled)
    if orientation == "upright" or (orientation == "auto" and not marks.say_stored):
        return replace(manifest, marks=marks)
    roles = {
        role: tuple(replace(sample, reading=replace(sample.reading, upright=False)) for sample in samples)
        for role, samples in manifest.roles().items()
    }
    return replace(manifest, marks=marks, **roles)


def orientation_lines(manifest: Manifest) -> tuple[list[str], list[str]]:
    """Notes and warnings about the label maps of images with an orientation mark."""
    marks = manifest.marks
    if marks is None or marks == MarkedLabels():
        return [], []
    samples = [sample for role in manifest.roles().values() for sample in role]
    upright = all(sample.reading.upright for sample in samples)
    way = "upright" if upright else "as they are stored"
    count = marks.upright + marks.stored + marks.both
    line = (
        f"{count:,} labeled image(s) have an orientation mark (EXIF) and are read {way}. Of their label maps, "
        f"{marks.upright:,} have the size of the upright picture, {marks.stored:,} that of the stored one, and "
        f"{marks.both:,} of both."
    )
    if marks.upright or marks.stored:
        return [line], []
    return [], [
        f"{line} So sizes do not say which picture the label maps belong to. They are taken for maps of the "
        f"{'upright' if upright else 'stored'} one. labelme, CVAT, Label Studio and `darseg rasterize` make maps of the "
        "upright one; other tools may not. Look at some, and set data.orientation to upright or stored."
    ]


class PictureTally:
    """Counts what examined pictures have in common."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        self._manifest = manifest
        self._marked: Counter[str] = Counter()
        self._first: dict[str, Path] = {}
        self._notes: Counter[str] = Counter()
        self._peaks: list[int] = []
        self._stored = False
        self._turned_labels = 0

    def add(self, role: str, sample: Sample, picture: Picture | None, *, turned_label: bool = False) -> None:
        """Count a picture, whose pixels are not looked at; None if it is unreadable."""
        self._turned_labels += turned_label
        if picture is None:
            return
        self._marked[role] += picture.mark != UPRIGHT
        self._stored |= not sample.reading.upright
        for note in picture.notes:
            self._notes[note] += 1
            self._first.setdefault(note, sample.image)
        if picture.peak is not None:
            self._peaks.append(picture.peak)

    def notes(self) -> list[str]:
        """Lines about how files are read."""
        lines = [
            f"{count:,} image(s), the first is {self._first[note]}: {note}"
            for note, count in self._notes.items()
        ]
        way = "as they are stored" if self._stored else "upright"
        if self._marked["unlabeled"]:
            lines.append(
                f"{self._marked['unlabeled']:,} unlabeled image(s) have an orientation mark (EXIF) and are read {way}."
            )
        if self._marked["predicted"]:
            lines.append(
                f"{self._marked['predicted']:,} image(s) have an orientation mark (EXIF). Their maps are of the "
                f"{'stored' if self._stored else 'upright'} picture."
            )
        return lines

    def warnings(self) -> list[str]:
        """Lines about marks that nothing decides on, turned label maps, and 16-bit images that are dark."""
        lines = orientation_lines(self._manifest)[1] if self._manifest else []
        if self._turned_labels:
            lines.append(
                f"{self._turned_labels:,} label map(s) have an orientation mark (EXIF) of their own, which is not "
                "followed. Save them without it."
            )
        bits = max(self._peaks, default=0).bit_length()
        depth = next((depth for depth in USUAL_DEPTHS if bits <= depth), None)
        if not self._peaks or depth is None:
            return lines
        return [
            *lines,
            f"{len(self._peaks):,} image(s) have 16 bits, but no value above {max(self._peaks):,}, so they are nearly "
            f"black. If their values have {depth} bits, set data.white: {2**depth - 1}.",
        ]
