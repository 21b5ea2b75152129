"""A round's pseudo labels, image by image: what is known of each, and its maps – kept on the disk, or predicted again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from darseg.config.recipe import Recipe
from darseg.data.classes import ClassSet
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.manifest import Manifest, Sample
from darseg.data.maps import label_path
from darseg.data.prediction import SCALES, Prediction
from darseg.errors import DataError, RunError
from darseg.pseudo.labelset import ImageFacts, Predictor, read_prediction
from darseg.run.build import labeling_protocol, load_to_predict, manifest_of, recipe_of, set_threads
from darseg.run.directory import RunDirectory
from darseg.run.label_samples import network_predictor
from darseg.run.marks import read_excluded, read_marks

REMEMBERED = 16  # predictions kept in memory: 6 MB each at 1024×2048 pixels


@dataclass(frozen=True)
class LabeledRound:
    """A round whose label maps are done.

    Attributes:
        samples: the unlabeled images of the run, in their order; `label` is their truth where it is known.
        excluded: ids of those that the round left out: they have no label map.
        noted: id → what the round wrote down of them; empty where it did not.
    """

    run: RunDirectory
    index: int
    recipe: Recipe
    classes: ClassSet
    samples: tuple[Sample, ...]
    excluded: frozenset[str]
    noted: Mapping[str, ImageFacts]

    def label_map(self, sample: Sample) -> np.ndarray | None:
        """uint8 [H, W], 255 = not labeled; None where the round left the image out. Raises DataError."""
        if sample.id in self.excluded:
            return None
        return read_label(label_path(self.run.labels(self.index), sample.id))


def open_round(root: Path | str, index: int | None = None) -> LabeledRound:
    """A round of a run folder (by default the last) whose label maps are done.

    Raises RunError where there is none, and where marks, exclusions or facts are damaged.
    """
    run = RunDirectory(root)
    recipe = recipe_of(root)
    done = run.rounds_with("label")
    if not done or (index is not None and index not in done):
        found = (
            f"rounds with pseudo labels: {', '.join(map(str, done))}"
            if done
            else "no round has pseudo labels yet"
        )
        raise RunError(
            f"{run.root}: {found}. Wanted is {'one' if index is None else f'round {index}'}; round 0 never has any"
            + (
                ", and `darseg train` goes on with rounds that are missing."
                if len(recipe.rounds) > 1
                else ", and this run's recipe has no other: add rounds, with unlabeled images, and train anew."
            )
        )
    index = done[-1] if index is None else index
    manifest = manifest_of(recipe)
    read_marks(run, {sample.id for sample in manifest.unlabeled})
    return labeled_round(run, index, recipe, manifest)


def labeled_round(run: RunDirectory, index: int, recipe: Recipe, manifest: Manifest) -> LabeledRound:
    """`open_round` for one who has recipe and data at hand, and knows that the round's label maps are done."""
    excluded = frozenset(read_excluded(run, index))
    noted = run.image_facts(index, len(manifest.classes))
    return LabeledRound(run, index, recipe, manifest.classes, manifest.unlabeled, excluded, noted)


def read_facts(one: LabeledRound) -> Iterator[tuple[int, ImageFacts | None]]:
    """(position among the samples, facts) of every image that the round labeled: as the round wrote them down, else by
    reading one label map after the other. None: its label map cannot be read."""
    for position, sample in enumerate(one.samples):
        if sample.id in one.noted:
            yield position, one.noted[sample.id]
        elif sample.id not in one.excluded:
            try:
                label = one.label_map(sample)
            except DataError:
                yield position, None
                continue
            assert label is not None
            yield position, ImageFacts.of_map(label, len(one.classes))


class Repredictor:
    """Predictions that a round's labels were made from: those kept on the disk, or made again by the same network and
    protocol, one at a time; the last few stay in memory."""

    def __init__(self, one: LabeledRound) -> None:
        self.round = one
        self._predictor: Predictor | None = None
        self._done: OrderedDict[str, Prediction] = OrderedDict()
        self._busy, self._lock = threading.Lock(), threading.Lock()

    def known(self, sample: Sample) -> Prediction | None:
        """The prediction where it is at hand in memory."""
        with self._lock:
            if sample.id in self._done:
                self._done.move_to_end(sample.id)
            return self._done.get(sample.id)

    def prediction(self, sample: Sample) -> Prediction:
        """The prediction of an image. Raises DataError, WeightsError, NumericsError."""
        with self._busy:
            if (found := self.known(sample)) is not None:
                return found
            found = read_prediction(self.round.run.predictions(self.round.index), sample.id)
            found = found or self._predict(sample)
            with self._lock:
                self._done[sample.id] = found
                while len(self._done) > REMEMBERED:
                    self._done.popitem(last=False)
            return found

    def _predict(self, sample: Sample) -> Prediction:
        recipe, before = self.round.recipe, self.round.index - 1
        if self._predictor is None:
            set_threads(recipe.threads)
            network = load_to_predict(self.round.run.network(before))
            protocol, scale = labeling_protocol(recipe), SCALES[recipe.labeling.confidence]
            self._predictor = network_predictor(network, lambda image: protocol, scale)
        return self._predictor.predict(sample, read_image(sample.image))
