"""Before an experiment: whether its scores can say something about images nobody trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darseg.data.files import read_json
from darseg.data.images import read_picture
from darseg.data.manifest import Manifest, Sample
from darseg.data.sameness import HELD_OUT, digest_pixels
from darseg.data.threads import in_threads
from darseg.errors import DataError, faults
from darseg.experiment.design import Design
from darseg.run.build import manifest_of
from darseg.run.data_digest import digest_manifest
from darseg.run.directory import write_json
from darseg.run.settings import digest_text

LEAST_VALIDATION = 2
"""Validation images below which there is no interval: it comes from the differences between images."""


@dataclass(frozen=True)
class Checked:
    """What is known about an experiment's images.

    Attributes:
        classes: their names.
        test: number of test images.
        test_in_validation: how many of these are the same picture as a validation image.
    """

    classes: tuple[str, ...]
    test: int
    test_in_validation: int


def check_images(design: Design, record: Path | None) -> Checked:
    """Refuse held-out images that are too few, or the same picture as an image that is trained on.

    Args:
        record: file that remembers the outcome, so that a later call with the same images does not read them all.

    Raises DataError.
    """
    manifests = list(_manifests(design))
    base = manifests[0]
    if len(base.validation) < LEAST_VALIDATION:
        raise DataError(
            f"data.validation has {len(base.validation)} image(s), and scores are compared on {LEAST_VALIDATION} at "
            "least: their intervals come from the differences between images. Set data.validation in the recipe."
        )
    digest = digest_text(json.dumps([digest_manifest(manifest) for manifest in manifests], sort_keys=True))
    shared = _remembered(record, digest)
    if shared is None:
        shared = _compare(manifests)
        if record is not None:
            write_json(record, {"images": digest, "test_in_validation": shared})
    return Checked(base.classes.names, len(base.test), shared)


def _manifests(design: Design) -> Iterator[Manifest]:
    """The images of each budget and variant, once; drawn ones are all of the base recipe's."""
    yield manifest_of(design.file.base)
    seen = {_selection(design.file.base.data.model_dump(mode="json"))}
    drawn = {str(labels.count) for labels in design.file.settings.labels if labels.count is not None}
    for trial in design.trials:
        selection = _selection(trial.recipe.data.model_dump(mode="json"))
        if selection not in seen and str(trial.labels) not in drawn:
            seen.add(selection)
            yield manifest_of(trial.recipe)


def _selection(data: Mapping[str, object]) -> str:
    return json.dumps(data, sort_keys=True)


def _remembered(record: Path | None, digest: str) -> int | None:
    """What an earlier call found out about the same images; None if there was none."""
    if record is None:
        return None
    try:
        content = read_json(record)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("images") != digest:
        return None
    shared = content.get("test_in_validation")
    return shared if type(shared) is int else None


def _compare(manifests: Sequence[Manifest]) -> int:
    """How many test images are validation images; raises DataError if held-out images are trained on."""
    roles: dict[Path, tuple[str, Sample]] = {}
    for manifest in manifests:
        for role, samples in manifest.roles().items():
            for sample in samples:
                if role in HELD_OUT or sample.image not in roles:
                    roles[sample.image] = (role, sample)
    entries = list(roles.values())
    digests = list(in_threads(lambda entry: _digest(entry[1]), entries))
    trained = {
        digest: sample
        for (role, sample), digest in zip(entries, digests, strict=True)
        if role not in HELD_OUT and digest is not None
    }
    same: dict[str, list[str]] = {role: [] for role in HELD_OUT}
    pictures: dict[str, set[bytes]] = {role: set() for role in HELD_OUT}
    counts = 0
    for (role, sample), digest in zip(entries, digests, strict=True):
        if role not in HELD_OUT or digest is None:
            continue
        pictures[role].add(digest)
        if digest in trained:
            same[role].append(f"{sample.image} is the same picture as {trained[digest].image}")
    if lines := [f"data.{role}: {line}" for role, found in same.items() for line in found]:
        raise DataError(
            faults(
                "Images that scores are measured on are also trained on, by their pixels. Remove them from the lists of "
                "one of the two",
                lines,
                limit=10,
            )
        )
    counts = sum(
        role == "test" and digest in pictures["validation"]
        for (role, _), digest in zip(entries, digests, strict=True)
    )
    return counts


def _digest(sample: Sample) -> bytes | None:
    """A digest of a picture's pixels; None if it cannot be read, which the run that reads it reports."""
    try:
        return digest_pixels(read_picture(sample.image, sample.reading).pixels)
    except DataError:
        return None
