"""Which unlabeled images to show, and how: image, raw prediction, pseudo label, truth where it is known."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darseg.data.classes import IGNORE, ClassSet
from darseg.data.images import read_image, shrink
from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.labelset import ImageFacts, prediction_path
from darseg.report.facts import DataFacts, RunFacts
from darseg.run.browse import LabeledRound, Repredictor, labeled_round
from darseg.run.build import recipe_of
from darseg.run.directory import RunDirectory
from darseg.run.marks import without

EACH = 2  # images of a kind: most and least confident, fullest and emptiest, of a rare class
RARE = 3  # rarest classes that are shown
AT_MOST = 1000  # label maps that are read where a run kept no facts of its images
SIDE = 480  # pixels of the long side as drawn
JPEG_QUALITY = 80
CHECK = 6  # pixels of a square of the checcurboard that stands for "not labeled"
CHECKS = ((226, 226, 230), (176, 176, 184))  # its two grays: a pattern, so no class looks like it


@dataclass(frozen=True)
class Picture:
    """What stands under one image of the gallery: data URLs, and shares of right pixels where the truth is known."""

    id: str
    reasons: tuple[str, ...]
    confidence: float | None
    share: float
    image: str
    prediction: str | None
    label: str
    truth: str | None
    right: tuple[float | None, float | None]  # of the raw prediction, of the pseudo label


@dataclass(frozen=True)
class Gallery:
    """Pictures of one round, and what a reader should know about how they were come by."""

    round: int
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def image_facts(one: LabeledRound) -> dict[str, ImageFacts]:
    """Facts of the images a round labeled: as it wrote them down, those it did not counted in label maps.

    Of more than AT_MOST label maps, as many, evenly spaced, are read. Raises DataError where a map is damaged.
    """
    samples = without(one.samples, {*one.excluded, *one.noted})
    if len(samples) > AT_MOST:
        samples = [samples[at * len(samples) // AT_MOST] for at in range(AT_MOST)]

    def count(sample: Sample) -> tuple[str, ImageFacts]:
        label = one.label_map(sample)
        assert label is not None
        return sample.id, ImageFacts.of_map(label, len(one.classes))

    with ThreadPoolExecutor(2) as threads:  # decoding releases the interpreter lock
        return dict(one.noted) | dict(threads.map(count, samples))


def choose(facts: Mapping[str, ImageFacts], prior: NDArray, names: tuple[str, ...]) -> dict[str, list[str]]:
    """id → why it is shown, in the order to be shown: the most and least confident, the fullest and emptiest, the
    images with most pixels kept of the rarest classes that were kept at all.

    prior: [K], how frequent classes are; the rarest are those with the smallest. Ids decide between equals.
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
    """Pictures of the last round that has labels; None where none has, or the images are not there any more.

    Raw predictions are those that were kept, else made again with the network and protocol that labeled.
    """
    if not facts.labeled or data.manifest is None:
        return None
    round_ = facts.labeled[-1]
    assert round_.labels is not None
    one = labeled_round(RunDirectory(facts.root), round_.index, recipe_of(facts.root), data.manifest)
    samples = {sample.id: sample for sample in without(one.samples, one.excluded)}
    found = {name: fact for name, fact in image_facts(one).items() if name in samples}
    notes = []
    if len(found) < len(samples):
        notes.append(f"Chosen from {len(found):,} of {len(samples):,} images, evenly spaced.")
    if not any(fact.confidence is not None for fact in found.values()):
        notes.append(
            "The run kept no confidences of single images, so the most and least confident are not shown."
        )
    prior = data.counts if data.counts is not None else round_.labels.kept
    chosen = choose(found, prior, one.classes.names)
    repredictor = Repredictor(one)
    pictures = tuple(
        _picture(one, samples[name], reasons, found[name], _prediction(repredictor, samples[name]))
        for name, reasons in chosen.items()
    )
    if any(picture.prediction is None for picture in pictures):
        notes.append(
            f"The network of round {round_.index - 1} is not there any more, so raw predictions are missing."
        )
    return Gallery(round_.index, pictures, tuple(notes))


def _prediction(repredictor: Repredictor, sample: Sample) -> Prediction | None:
    """The raw prediction of an image; None where none was kept and the network is gone."""
    one = repredictor.round
    if (
        one.run.network(one.index - 1).exists()
        or prediction_path(one.run.predictions(one.index), sample.id).exists()
    ):
        return repredictor.prediction(sample)
    return None


def _picture(
    one: LabeledRound,
    sample: Sample,
    reasons: list[str],
    fact: ImageFacts,
    prediction: Prediction | None,
) -> Picture:
    classes, label = one.classes, one.label_map(sample)
    assert label is not None
    truth = read_label(sample.label, sample.encoding) if sample.label else None
    raw = None if prediction is None else prediction.classes
    if truth is not None and truth.shape != label.shape:
        raise DataError(
            f"{sample.label}: {truth.shape[0]}x{truth.shape[1]} pixels, its pseudo label has {label.shape[0]}x"
            f"{label.shape[1]} (height x width): the data changed since they were labeled."
        )
    return Picture(
        id=sample.id,
        reasons=tuple(reasons),
        confidence=fact.confidence if prediction is None else prediction.mean_confidence,
        share=fact.coverage,
        image=jpeg_url(read_image(sample.image)),
        prediction=None if raw is None else map_url(raw, classes),
        label=map_url(label, classes),
        truth=None if truth is None else map_url(truth, classes),
        right=(_right(raw, truth), _right(label, truth)),
    )


def _right(values: np.ndarray | None, truth: np.ndarray | None) -> float | None:
    """Share of the pixels with truth and answer that agree."""
    if values is None or truth is None:
        return None
    seen = (truth != IGNORE) & (values != IGNORE)
    return float((values == truth)[seen].mean()) if seen.any() else None


def jpeg_url(image: np.ndarray) -> str:
    """uint8 [H, W, 3] RGB → a small JPEG as data URL."""
    return _url(Image.fromarray(shrink(image, SIDE, cv2.INTER_AREA)), "jpeg", quality=JPEG_QUALITY)


def map_url(label: np.ndarray, classes: ClassSet) -> str:
    """uint8 [H, W] of classes and 255 → a small PNG of the classes' colors, 255 a checcurboard, as data URL."""
    # 254 and 255 stand for the checcurboard's grays: K is at most 255, and a map of 255 classes has only one free value.
    shown = shrink(label, SIDE, cv2.INTER_NEAREST)
    palette = classes.palette()
    rows, columns = np.indices(shown.shape) // CHECK
    other = (shown == IGNORE) & ((rows + columns) % 2 == 1)
    if len(classes) < IGNORE:
        palette[IGNORE], palette[IGNORE - 1] = CHECKS
        picture = Image.fromarray(np.where(other, IGNORE - 1, shown).astype(np.uint8), "P")
        picture.putpalette(palette.tobytes())
    else:
        palette[IGNORE] = CHECKS[0]
        colored = palette[shown]
        colored[other] = CHECKS[1]
        picture = Image.fromarray(colored)
    return _url(picture, "png", optimize=True)


def _url(picture: Image.Image, kind: str, **options: object) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
