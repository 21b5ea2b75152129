"""The same picture under two names: equal images, pixel by pixel, and what they mean for roles."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darseg.data.manifest import Sample

HELD_OUT = ("validation", "test")


def digest_pixels(pixels: NDArray[np.generic]) -> bytes:
    """A digest of an array's shape and values: equal for equal arrays only."""
    values = np.ascontiguousarray(pixels)
    return hashlib.blake2b(values.data, digest_size=16, salt=str(values.shape).encode()[:16]).digest()


@dataclass
class SameTally:
    """Collects digests of images and label maps as they are read, and finds those that are equal."""

    _images: dict[bytes, list[tuple[str, Sample, bytes | None]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, role: str, sample: Sample, *, image: bytes | None, label: bytes | None) -> None:
        """Take an image in; None for what cannot be read."""
        if image is not None:
            self._images[image].append((role, sample, label))

    def warnings(self) -> list[str]:
        """Lines about roles that share pictures, repeated pictures, and contradicting labels."""
        counts: Counter[tuple[str, str]] = Counter()
        examples: dict[tuple[str, str], tuple[Sample, Sample]] = {}
        unequal: list[tuple[Sample, Sample]] = []
        for group in self._images.values():
            if len(group) == 1:
                continue
            first = {role: sample for role, sample, _ in reversed(group)}
            for role, sample, _ in group:
                for other, earlier in first.items():
                    pair = (other, role)
                    if earlier is not sample and (other == role or _is_before(other, role)):
                        counts[pair] += 1
                        examples.setdefault(pair, (sample, earlier))
            labeled = [(sample, label) for _, sample, label in group if label is not None]
            unequal += [(sample, labeled[0][0]) for sample, label in labeled if label != labeled[0][1]]
        lines = [_line(*pair, count=counts[pair], example=examples[pair]) for pair in counts]
        if unequal:
            sample, earlier = unequal[0]
            lines.append(
                f"{len(unequal):,} label map(s) contradict another label map of the same picture, for example "
                f"{sample.label} and {earlier.label}. Remove the wrong one."
            )
        return lines


def _is_before(role: str, other: str) -> bool:
    """Whether a pair of roles is reported in this order."""
    order = ("labeled", "unlabeled", "validation", "test")
    return order.index(role) < order.index(other)


def _line(role: str, other: str, *, count: int, example: tuple[Sample, Sample]) -> str:
    """What it means that `count` pictures with the role `other` are pictures with `role`."""
    sample, earlier = example
    pair = f"{sample.image} and {earlier.image}"
    if role == other:
        return (
            f"{count:,} {role} image(s) repeat the picture of another one under a second name, for example {pair}. "
            "They count twice; remove one of each."
        )
    if role in HELD_OUT:
        return (
            f"{count:,} {other} image(s) are the same picture as {role} images, for example {pair}. Scores of the two "
            "are then not independent; remove them from one of the two."
        )
    if other in HELD_OUT:
        effect = "is trained on" if role == "labeled" else "is pseudo-labeled and trained on"
        return (
            f"{count:,} {other} image(s) are the same picture as {role} images, for example {pair}. What {effect} cannot "
            f"measure how well new images are segmented; remove them from {role} or from {other}."
        )
    return (
        f"{count:,} {other} image(s) are the same picture as {role} images, for example {pair}. Their labels are known; "
        f"remove them from {other}."
    )
