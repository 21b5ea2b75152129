"""Choose which unlabeled images to show, and draw image, prediction, pseudo label, and any truth."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import read_truth
from darseg.data.images import read_image, shrink
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.data.threads import in_threads
from darseg.errors import DataError
from darseg.pseudo.labelset import ImageFacts
from darseg.report.facts import DataFacts, RunFacts
from darseg.run.browse import LabeledRound, Repredictor, labeled_round
from darseg.run.directory import RunDirectory
from darseg.run.labelers import read_labeler
from darseg.run.marks import without

EACH = 2  # images per reason
RARE = 3  # number of rare classes that are shown
MAPS_READ = 1000  # at most, if a run kept no facts of its images
SIDE = 480  # pixels of the long side of a picture
JPEG_QUALITY = 80
CHECK = 6  # pixels of a square of the checkerboard that means "not labeled"
CHECKS = ((226, 226, 230), (176, 176, 184))  # its two grays: a pattern, so no class looks like it


@dataclass(frozen=True)
class PictureMap:
    """One of the pictures of an image. url: a data URL."""

    url: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """An image of the gallery.

    Attributes:
        reasons: why it is shown.
        confidence: mean over its pixels, None if it is not known.
        share: of its pixels that are labeled.
        image, prediction, label, truth: data URLs; None if there is no prediction or truth.
        right: shares of right pixels of the prediction and of the pseudo label; None if they are not known.
    """

    id: str
    reasons: tuple[str, ...]
    confidence: float | None
    share: float
    image: str
    prediction: str | None
    label: str
    truth: str | None
    right: tuple[float | None, float | None]

    @property
    def maps(self) -> tuple[PictureMap, ...]:
        """What is shown of the image, in order; the photograph first."""
        prediction, label = ("" if share is None else f", {share:.0%} right" for share in self.right)
        maps = (
            (self.image, "image"),
            (self.prediction, f"raw prediction{prediction}"),
            (self.label, f"pseudo label, {self.share:.0%} labeled{label}"),
            (self.truth, "truth, not used"),
        )
        return tuple(PictureMap(url, caption) for url, caption in maps if url is not None)


@dataclass(frozen=True)
class Gallery:
    """Pictures of one round. notes: what a reader should know about how they were chosen and made."""

    round: int
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def image_facts(round_: LabeledRound) -> dict[str, ImageFacts]:
    """Facts of the images that a round labeled: those it stored, the others counted in their label maps.

    Of more than MAPS_READ label maps, that many are read, evenly spaced. Raises DataError if a map is damaged.
    """
    samples = without(round_.samples, {*round_.excluded, *round_.noted})
    if len(samples) > MAPS_READ:
        samples = [samples[at * len(samples) // MAPS_READ] for at in range(MAPS_READ)]

    def count(sample: Sample) -> tuple[str, ImageFacts]:
        label = round_.label_map(sample)
        assert label is not None
        return sample.id, ImageFacts.of_map(label, len(round_.classes))

    return dict(round_.noted) | dict(in_threads(count, samples, most_threads=2))


def choose(facts: Mapping[str, ImageFacts], prior: NDArray, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Choose the images to show: extremes of confidence and labeling, and examples of rare classes.

    These are the most and least confident, the most and least labeled, and for each of the rarest classes that were kept
    at all, the images with most of its pixels.

    Args:
        facts: id → facts of the image.
        prior: float or int [K], how frequent the classes are; the rarest are those with the smallest values.
        names: of the classes.

    Returns:
        id → reasons to show it, in the order to be shown. Ties are broken by id.
    """
    chosen: dict[str, list[str]] = {}

    def take(reason: str, worth: Callable[[ImageFacts], float | None]) -> None:
        values = [(worth(fact), name) for name, fact in facts.items()]
        ranked = sorted((-value, name) for value, name in values if value is not None)
        for _, name in ranked[:EACH]:
            chosen.setdefault(name, []).append(reason)

    take("most confident", lambda fact: fact.confidence)
    take("least confident", lambda fact: None if fact.confidence is None else -fact.confidence)
    take("most labeled", lambda fact: fact.coverage)
    take("least labeled", lambda fact: -fact.coverage)
    kept = np.sum([fact.kept for fact in facts.values()], axis=0) if facts else np.zeros(len(names))
    rare = sorted((k for k in range(len(names)) if kept[k] > 0), key=lambda k: (prior[k], k))
    for k in rare[:RARE]:
        take(f"rare class: {names[k]}", lambda fact, k=k: float(fact.kept[k]) or None)
    return chosen


def draw_gallery(facts: RunFacts, data: DataFacts) -> Gallery | None:
    """Draw images of the last round that has labels; None if no round has any, or the data set is gone.

    Raw predictions are those that the run kept. Otherwise the network that labeled predicts again, by the same protocol.
    """
    if not facts.labeled or data.manifest is None:
        return None
    last = facts.labeled[-1]
    assert last.labels is not None
    round_ = labeled_round(RunDirectory(facts.root), last.index, recipe=facts.recipe, manifest=data.manifest)
    samples = {sample.id: sample for sample in without(round_.samples, round_.excluded)}
    known = {name: fact for name, fact in image_facts(round_).items() if name in samples}
    notes = []
    if len(known) < len(samples):
        notes.append(f"Chosen from {len(known):,} of {len(samples):,} images, evenly spaced.")
    if not any(fact.confidence is not None for fact in known.values()):
        notes.append(
            "The run did not store the confidences of single images, so the most and least confident are not shown."
        )
    prior = data.counts if data.counts is not None else last.labels.kept
    repredictor = Repredictor(round_)
    pictures = tuple(
        _picture(repredictor, samples[name], known[name], reasons=reasons)
        for name, reasons in choose(known, prior, round_.classes.names).items()
    )
    if any(picture.prediction is None for picture in pictures):
        own = read_labeler(round_.run.round(last.index)) is None
        gone = (
            f"of round {last.labeling_round} was removed"
            if own
            else "that labeled was removed, or has changed"
        )
        notes.append(f"The network {gone}, so raw predictions are missing.")
    return Gallery(last.index, pictures, tuple(notes))


def _prediction(repredictor: Repredictor, sample: Sample) -> Prediction | None:
    """The raw prediction of an image; None if it was not kept and the network is gone."""
    return repredictor.prediction(sample) if repredictor.reachable(sample) else None


def _picture(repredictor: Repredictor, sample: Sample, fact: ImageFacts, *, reasons: list[str]) -> Picture:
    classes, label = repredictor.round.classes, repredictor.round.label_map(sample)
    assert label is not None
    truth = read_truth(sample) if sample.label else None
    if truth is not None and truth.shape != label.shape:
        raise DataError(
            f"{sample.label}: the label map has {truth.shape[0]}x{truth.shape[1]} pixels (height x width), but the "
            f"pseudo label of this image has {label.shape[0]}x{label.shape[1]}. The data set changed after the "
            "round labeled it. Restore the data set, or start a new run."
        )
    prediction = _prediction(repredictor, sample)
    raw = None if prediction is None else prediction.classes
    return Picture(
        id=sample.id,
        reasons=tuple(reasons),
        confidence=fact.confidence if prediction is None else prediction.mean_confidence,
        share=fact.coverage,
        image=jpeg_url(read_image(sample.image, sample.reading)),
        prediction=None if raw is None else map_url(raw, classes),
        label=map_url(label, classes),
        truth=None if truth is None else map_url(truth, classes),
        right=(_right(raw, truth), _right(label, truth)),
    )


def _right(values: np.ndarray | None, truth: np.ndarray | None) -> float | None:
    """The share of right pixels among those that have both a truth and a value; None if there are none."""
    if values is None or truth is None:
        return None
    seen = (truth != IGNORE) & (values != IGNORE)
    return float((values == truth)[seen].mean()) if seen.any() else None


def jpeg_url(image: np.ndarray) -> str:
    """Shrink an image (uint8 [H, W, 3], RGB) and return it as the data URL of a JPEG."""
    return data_url(Image.fromarray(shrink(image, SIDE, cv2.INTER_AREA)), "jpeg", quality=JPEG_QUALITY)


def map_url(label: np.ndarray, classes: ClassSet) -> str:
    """Draw a label map (uint8 [H, W], 255 = not labeled) and return it as the data URL of a small PNG.

    Classes have their colors; 255 is a checkerboard.
    """
    # 254 and 255 become the checkerboard's grays. A map of 255 classes has only one free value, so it needs RGB.
    small = shrink(label, SIDE, cv2.INTER_NEAREST)
    palette = classes.palette()
    rows, columns = np.indices(small.shape) // CHECK
    dark = (small == IGNORE) & ((rows + columns) % 2 == 1)
    if len(classes) < IGNORE:
        palette[IGNORE], palette[IGNORE - 1] = CHECKS
        picture = Image.fromarray(np.where(dark, IGNORE - 1, small).astype(np.uint8), "P")
        picture.putpalette(palette.tobytes())
    else:
        palette[IGNORE] = CHECKS[0]
        colored = palette[small]
        colored[dark] = CHECKS[1]
        picture = Image.fromarray(colored)
    return data_url(picture, "png", optimize=True)


def data_url(picture: Image.Image, kind: str, **options: object) -> str:
    """A picture as the data URL of a file of this kind; options are those of Pillow."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
