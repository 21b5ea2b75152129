"""Suggested images as values: what was seen of them, why they are suggested, and their record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.data.classes import ClassSet
from darseg.errors import RunError
from darseg.model.uncertain import Uncertain
from darseg.pseudo.suggest import Pick
from darseg.run.directory import write_json
from darseg.run.records import read_object

RECORD, MARK = "suggestions.json", ".suggest.json"
"""In the output folder: what was chosen and why; and what an equal call has in common."""

NOTEWORTHY = 0.25
"""A class is named as a reason if it makes at least this part of the gain."""

VIEWS = {
    "mirror": "of the mirror image the network decides {share} of the pixels otherwise",
    "scale": "on a smaller scale it decides otherwise on {share}",
    "round": "the network of the round before decided otherwise on {share}",
}
"""Name of another view → what its disagreement means."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What was seen of an image: sums of `Uncertain`, and the shares of its pixels by decision."""

    shares: NDArray[np.float64]
    expected: NDArray[np.float64]
    uncertain: NDArray[np.float64]
    margin: float
    disagreements: Mapping[str, float]

    @classmethod
    def of(cls, prediction: Uncertain) -> Facts:
        """The facts of a prediction."""
        counts = np.bincount(prediction.classes.ravel(), minlength=len(prediction.expected))
        return cls(
            counts / prediction.classes.size,
            prediction.expected,
            prediction.uncertain,
            margin=prediction.margin,
            disagreements=prediction.disagreements,
        )


@dataclass(frozen=True)
class SuggestedImage:
    """An image to label, and why.

    Attributes:
        gain: what its labels would add (`darseg.pseudo.suggest`), and of each class by name.
        stands_for: unlabeled images that are nearer to it than to what is labeled or suggested before; itself too.
        newness: 0 to 1, its distance to the nearest image that is labeled or suggested before, as a part of the
            typical one.
        nearest: id of that image.
        shares: class name → share of the pixels that are decided as it.
        expected: class name → its mean probability.
        margin, disagreements: as in `Facts`.
        reasons: in words.
    """

    id: str
    gain: float
    gain_of: Mapping[str, float]
    stands_for: int
    newness: float
    nearest: str
    shares: Mapping[str, float]
    expected: Mapping[str, float]
    margin: float
    disagreements: Mapping[str, float]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Suggested:
    """What `suggest` chose.

    Attributes:
        classes, colors: names and colors (RGB) of the classes.
        labeled_pixels: of each class.
        images: in the order in which to label them.
        asked: how many were asked for.
        looked_at: unlabeled images that were predicted.
        available: unlabeled images of the recipe.
        marked: of these, how many are marked as bad and were left out.
        failed: a line for each image that could not be read.
        decisions, protocol: how images were predicted, in words.
        notes: what should be known about the written files.
    """

    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    labeled_pixels: tuple[int, ...]
    images: tuple[SuggestedImage, ...]
    asked: int
    looked_at: int
    available: int
    marked: int
    failed: tuple[str, ...]
    decisions: str
    protocol: str
    notes: tuple[str, ...] = ()

    @property
    def class_set(self) -> ClassSet:
        return ClassSet(self.classes, self.colors)

    def with_notes(self, notes: Sequence[str]) -> Suggested:
        """The same with notes about files, and about fewer images than were asked for."""
        fewer = []
        if len(self.images) < self.asked:
            unread = ", or could not be read" if self.failed else ""
            fewer = [
                f"Only {len(self.images)} of {self.asked} images are suggested: the others are near-duplicates of these, "
                f"or of labeled ones{unread}."
            ]
        return replace(self, notes=(*fewer, *notes))


def describe_picks(
    picks: Sequence[Pick],
    ids: Sequence[str],
    facts: Sequence[Facts],
    *,
    classes: ClassSet,
    counts: NDArray[np.int64],
) -> tuple[SuggestedImage, ...]:
    """The chosen images with their reasons.

    Args:
        ids, facts: of all candidates.
        counts: int64 [K], labeled pixels of each class.
    """
    named = []
    for pick in picks:
        seen = facts[pick.index]
        image = SuggestedImage(
            id=ids[pick.index],
            gain=pick.gain,
            gain_of=dict(zip(classes.names, pick.parts.tolist(), strict=True)),
            stands_for=pick.stands_for,
            newness=pick.newness,
            nearest=pick.nearest,
            shares=dict(zip(classes.names, seen.shares.tolist(), strict=True)),
            expected=dict(zip(classes.names, (seen.expected / seen.expected.sum()).tolist(), strict=True)),
            margin=seen.margin,
            disagreements=dict(seen.disagreements),
            reasons=(),
        )
        named.append(replace(image, reasons=_reasons(image, classes.names, counts)))
    return tuple(named)


def _reasons(image: SuggestedImage, names: Sequence[str], counts: NDArray[np.int64]) -> tuple[str, ...]:
    """Why an image is suggested, in words; the most important reason first."""
    labeled = dict(zip(names, (counts / max(1, counts.sum())).tolist(), strict=True))
    ranked = sorted(names, key=lambda name: -image.gain_of[name])
    lines = []
    for place, name in enumerate(ranked):
        if place == 0 or image.gain_of[name] >= NOTEWORTHY * image.gain:
            known = (
                f"{percent(labeled[name])} of the labeled pixels are" if labeled[name] else "none is labeled"
            )
            lines.append(f"likely {name} (mean probability {percent(image.expected[name])}); {known}")
    for view, text in VIEWS.items():
        if image.disagreements.get(view, 0) >= 0.01:
            lines.append(text.format(share=percent(image.disagreements[view])))
    lines.append(f"the second class is {image.margin:.2f} less likely than the first, on average")
    if image.stands_for > 1:
        lines.append(f"it stands for {image.stands_for:,} images that resemble nothing labeled as much")
    lines.append(f"the most similar image that is labeled or suggested before is {image.nearest}")
    return tuple(lines)


def percent(share: float) -> str:
    """A share in percent: 12 %, 0.3 %, <0.1 %."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share:.1%}".replace("%", " %") if share < 0.1 else f"{share:.0%}".replace("%", " %")


def begin_folder(out: Path, inputs: str) -> None:
    """Mark a new folder as begun by these inputs. Raises RunError if it holds something else."""
    mark = out / MARK
    if mark.exists():
        if read_object(mark, "Choose another folder.").get("inputs") == inputs:
            return
        raise RunError(
            f"{out} holds suggestions of another network, other images or another count. They were left as they are; "
            "choose another folder."
        )
    if any(out.iterdir()):
        raise RunError(f"{out} holds other files, which were left as they are. Choose a new folder.")
    write_json(mark, {"inputs": inputs})


def write_suggested(out: Path, suggested: Suggested) -> None:
    """Write the record."""
    content = asdict(suggested)
    del content["notes"]
    content["images"] = [{"rank": rank} | image for rank, image in enumerate(content["images"], 1)]
    write_json(out / RECORD, content)


def read_suggested(out: Path) -> Suggested | None:
    """The record that an equal call wrote; None if there is none. Raises RunError if it is damaged."""
    remedy = "Remove it, and the images are chosen again."
    try:
        content: dict[str, Any] = read_object(out / RECORD, remedy)
    except FileNotFoundError:
        return None
    try:
        images = []
        for record in content.pop("images"):
            del record["rank"]
            images.append(SuggestedImage(**record | {"reasons": tuple(record["reasons"])}))
        for name in ("classes", "labeled_pixels", "failed"):
            content[name] = tuple(content[name])
        content["colors"] = tuple((red, green, blue) for red, green, blue in content["colors"])
        return Suggested(images=tuple(images), **content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{out / RECORD} is damaged ({error}). {remedy}") from error
