"""A round's pseudo labels, image by image: facts, label maps, and predictions, kept or repeated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from darseg.config.recipe import Recipe
from darseg.data.classes import ClassSet
from darseg.data.files import refuse_link
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.manifest import Manifest, Sample
from darseg.data.maps import label_path
from darseg.data.prediction import SCALES, Prediction
from darseg.errors import DataError, RunError, StorageError
from darseg.model.predict import predict
from darseg.pseudo.labelset import ImageFacts, Predictor, prediction_path, read_prediction
from darseg.run.build import (
    check_overrides,
    manifest_of,
    recipe_of,
    set_threads,
)
from darseg.run.data_digest import digest_samples, stranger
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import Trained, load_trained
from darseg.run.label_samples import network_predictor, network_scores
from darseg.run.labelers import is_there, load_labeler
from darseg.run.marks import read_excluded, read_marks
from darseg.run.records import read_texts

REMEMBERED = 16  # predictions kept in memory: 6 MB each at 1024×2048 pixels


@dataclass(frozen=True)
class LabeledRound:
    """A round whose label maps are done.

    Attributes:
        samples: the unlabeled images of the run, in their order; `label` is their truth, if it is known.
        excluded: ids of the images that the round left out; they have no label map.
        noted: id → facts that the round stored; empty for rounds that stored none.
        stranger: why images, their truth and predictions are not shown; empty if they are those of the run's beginning.
    """

    run: RunDirectory
    index: int
    recipe: Recipe
    classes: ClassSet
    samples: tuple[Sample, ...]
    excluded: frozenset[str]
    noted: Mapping[str, ImageFacts]
    stranger: str = ""

    def label_map(self, sample: Sample) -> np.ndarray | None:
        """uint8 [H, W], 255 = not labeled; None if the round left the image out.

        Raises DataError, or StorageError if the map is a link out of the run folder.
        """
        if sample.id in self.excluded:
            return None
        path = label_path(self.run.labels(self.index), sample.id)
        refuse_link(path, self.run.root)
        return read_label(path)


def open_round(root: Path | str, index: int | None = None, overrides: Sequence[str] = ()) -> LabeledRound:
    """Open a round of a run folder whose label maps are done.

    Args:
        index: default: the last of them.
        overrides: "data.root=PATH", if the run's data were moved.

    Raises RunError if there is none, or if marks, exclusions or facts are damaged; StorageError if links lead out of the
    folder.
    """
    run = RunDirectory(root)
    run.refuse_links()
    check_overrides(root, overrides)
    recipe = recipe_of(root, overrides)
    done = run.rounds_with("label")
    if not done or (index is not None and index not in done):
        raise RunError(f"{run.root}: {_nothing_to_open(index, done, recipe)}")
    index = done[-1] if index is None else index
    manifest = manifest_of(recipe)
    read_marks(run, {sample.id for sample in manifest.unlabeled})
    round_ = labeled_round(run, index, recipe=recipe, manifest=manifest)
    changed = [] if _as_begun(run, manifest) else ["unlabeled"]
    return replace(round_, stranger=stranger(recipe.data.root, changed, "view"))


def _as_begun(run: RunDirectory, manifest: Manifest) -> bool:
    """Whether the unlabeled images have the names and sizes that the run recorded when it began."""
    try:
        recorded = read_texts(run.data, "Restore it from a copy.")
    except FileNotFoundError:
        return False
    return recorded.get("unlabeled") == digest_samples(manifest.unlabeled)


def _nothing_to_open(index: int | None, done: Sequence[int], recipe: Recipe) -> str:
    """Why a round cannot be opened, and what to do."""
    if not recipe.pseudo_rounds and any(config.use == "online" for config in recipe.rounds):
        return (
            "the rounds of this run are online: they learn from unlabeled images while they train, and write no pseudo "
            "labels."
        )
    if not recipe.pseudo_rounds and len(recipe.rounds) > 1:
        return (
            "all rounds of this run learn from the labeled images alone (use: labeled), so there are no pseudo labels. "
            "Add a round without that key to the recipe, and train a new run."
        )
    if not recipe.pseudo_rounds:
        return (
            "the recipe of this run has only round 0, which never has pseudo labels. Add rounds and unlabeled images to "
            "the recipe, and train a new run."
        )
    if done:
        return (
            f"round {index} has no pseudo labels; rounds with pseudo labels: {', '.join(map(str, done))}. Choose one of "
            "them, or continue the run with `darseg train`."
        )
    never = "" if recipe.pseudo_labels(0) else ", and round 0 never has any"
    return f"no round has pseudo labels yet{never}. Continue the run with `darseg train`."


def labeled_round(run: RunDirectory, index: int, *, recipe: Recipe, manifest: Manifest) -> LabeledRound:
    """Like `open_round`, for callers that have recipe and data, and know that the label maps are done."""
    excluded = frozenset(read_excluded(run, index))
    noted = run.image_facts(index, len(manifest.classes))
    return LabeledRound(
        run=run,
        index=index,
        recipe=recipe,
        classes=manifest.classes,
        samples=manifest.unlabeled,
        excluded=excluded,
        noted=noted,
    )


def read_facts(round_: LabeledRound) -> Iterator[tuple[int, ImageFacts | None]]:
    """Yield (position among the samples, facts) of every image that the round labeled.

    Facts that the round did not store are counted in its label maps, one after the other; None if a map cannot be read.
    """
    for position, sample in enumerate(round_.samples):
        if sample.id in round_.noted:
            yield position, round_.noted[sample.id]
        elif sample.id not in round_.excluded:
            try:
                label = round_.label_map(sample)
            except (DataError, StorageError):
                yield position, None
                continue
            assert label is not None
            yield position, ImageFacts.of_map(label, len(round_.classes))


class RememberedPredictions:
    """Predictions of images, one at a time; the last few stay in memory. Several threads may ask.

    Args:
        predict: makes the prediction of an image.
    """

    def __init__(self, predict: Callable[[Sample], Prediction]) -> None:
        self._make = predict
        self._recent: OrderedDict[str, Prediction] = OrderedDict()
        self._busy, self._lock = threading.Lock(), threading.Lock()

    def known(self, sample: Sample) -> Prediction | None:
        """The prediction of an image, if it is in memory."""
        with self._lock:
            if sample.id in self._recent:
                self._recent.move_to_end(sample.id)
            return self._recent.get(sample.id)

    def prediction(self, sample: Sample) -> Prediction:
        """The prediction of an image. Raises DataError, WeightsError, NumericsError."""
        with self._busy:
            if (recent := self.known(sample)) is not None:
                return recent
            prediction = self._make(sample)
            with self._lock:
                self._recent[sample.id] = prediction
                while len(self._recent) > REMEMBERED:
                    self._recent.popitem(last=False)
            return prediction


class ResultPredictor(RememberedPredictions):
    """The predictions of a run's result, as `darseg predict` makes them.

    Args:
        plain: of the network as it was trained, also if the result's decisions are aligned.
    """

    def __init__(self, run: RunDirectory, plain: bool = False) -> None:
        super().__init__(self._predict)
        self.run, self.plain = run, plain
        self._trained: Trained | None = None

    def _predict(self, sample: Sample) -> Prediction:
        if self._trained is None:
            self._trained = load_trained(self.run.root, plain=self.plain)
        image = read_image(sample.image, sample.reading)
        return predict(self._trained.network, image, self._trained.protocol(image), name=str(sample.image))


class Repredictor(RememberedPredictions):
    """The predictions that a round's labels were made from.

    They are read from the disk if the run kept them. Otherwise the same network predicts again by the same protocol.
    """

    def __init__(self, round_: LabeledRound) -> None:
        super().__init__(self._kept_or_new)
        self.round = round_
        self._predictor: Predictor | None = None

    def _kept_or_new(self, sample: Sample) -> Prediction:
        kept = read_prediction(self.round.run.predictions(self.round.index), sample.id)
        return kept or self._predict(sample)

    def reachable(self, sample: Sample) -> bool:
        """Whether the prediction was kept, or the network that labeled is still there."""
        kept = prediction_path(self.round.run.predictions(self.round.index), sample.id)
        return kept.exists() or self._can_predict

    @cached_property
    def _can_predict(self) -> bool:
        """Whether the network that labeled is still there; looked up once, since its whole file is hashed."""
        return is_there(self.round.run, self.round.recipe, self.round.index)

    def _predict(self, sample: Sample) -> Prediction:
        recipe, run, index = self.round.recipe, self.round.run, self.round.index
        if self._predictor is None:
            set_threads(recipe.threads)
            alignment = run.label_set(index).alignment
            aligns = recipe.labeling.align != "none"
            network, protocol = load_labeler(run, recipe, index, plain=aligns)
            scale = SCALES[recipe.labeling.confidence]
            if alignment is None:
                self._predictor = network_predictor(network, protocol, scale)
            else:
                scores = network_scores(network, protocol, scale)
                self._predictor = scores.predictor(alignment.factors)
        return self._predictor.predict(sample, read_image(sample.image, sample.reading))
