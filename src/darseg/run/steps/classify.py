"""Classify: the classifier of whole images, which removes classes from the run's predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darseg.data.batches import StreamPlace, stream_batches
from darseg.data.dataset import Cache, load_example, load_image
from darseg.data.square import square_examples, square_images
from darseg.data.unlabeled import stream_views
from darseg.methods.mlmt import mlmt, presence_of
from darseg.model.image_classes import ImageClasses, ImageClassifier, save_image_classes
from darseg.run.build import place
from darseg.run.course import Course
from darseg.run.directory import StepRecord
from darseg.run.image_classes import (
    CLASSIFIER,
    STREAM,
    STRONG,
    ClassifierPlan,
    classifier_path,
    with_decisions_of,
)
from darseg.run.machine import cache_limit, workers_for
from darseg.run.remedies import explain_memory
from darseg.run.settings import Inputs, digest_state
from darseg.run.steps.checkpoints import latest_checkpoint
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.run.steps.train import rounded
from darseg.training.checkpoint import Checkpoint, save_checkpoint
from darseg.training.method import Feed, Learner, Streamed
from darseg.training.stage import StepReport, run_stage

CHECKPOINT = "classify"
"""How the names of the unfinished step's checkpoints begin, in the folder of round 0."""

NO_MEMORY = (
    "Set a smaller image_classes.micro_batch (images of each kind in a forward pass), image_classes.unlabeled_batch or "
    "image_classes.size."
)


def train_image_classes(course: Course, planned: ClassifierPlan, classifier: ImageClassifier) -> StepRecord:
    """Train the classifier of a run before its first round; all processes together.

    Args:
        classifier: as it begins; trained in place, unless the step is finished already.
    """
    training = _Training(course, planned, classifier)
    digests = {
        "settings": planned.digest(),
        "labeled": course.data["labeled"],
        "unlabeled": course.data["unlabeled"],
        "classifier": digest_state(classifier.state_dict()),
    }
    inputs, tidy = Inputs(digests), lambda: course.run.drop_checkpoints(0, kind=CHECKPOINT)
    return complete(course, Step("classify", 0, inputs, work=training.run, tidy=tidy))


@dataclass(frozen=True)
class _Training:
    """The classifier's training at work."""

    course: Course
    planned: ClassifierPlan
    classifier: ImageClassifier

    def run(self) -> Work:
        """Train from the latest checkpoint, or from the beginning."""
        course, planned = self.course, self.planned
        journal, stage = course.journal, planned.stage
        begin, seconds_before = latest_checkpoint(
            course, lambda: course.run.checkpoints(0, CHECKPOINT), "classifier_checkpoint"
        )
        if begin is not None:
            journal.say(f"classifier of images: going on at step {begin.step} of {stage.steps}")
        learner = Learner(
            "classifier", place(self.classifier), planned.learning_rate, optimizer=planned.optimizer
        )
        method = mlmt(learner, planned.how, seed=stage.seed)
        first = begin.step if begin else 0
        with (
            journal.progress("classifier of images: train", stage.steps, first) as advance,
            course.stop.patiently() as stop,
            explain_memory(NO_MEMORY),
        ):
            run_stage(
                method,
                self._streams(method.feeds),
                stage,
                begin=begin,
                on_step=lambda report: self._report(report, advance),
                on_checkpoint=self._saver(seconds_before),
                stop=stop,
            )
        teacher = method.outcome(method.state, self.classifier)
        assert isinstance(teacher, ImageClassifier)
        how = with_decisions_of(course.recipe, ImageClasses(teacher, side=planned.side))
        return Work([CLASSIFIER], lambda: self._write(how), seconds_before)

    def _streams(self, feeds: Sequence[Feed]) -> Callable[[int], Sequence[Iterator[Streamed]]]:
        """First step → labeled images, and views of unlabeled ones, all scaled to squares."""
        course, planned, processes = self.course, self.planned, self.course.processes
        labeled, unlabeled = feeds
        cache = Cache(
            cache_limit(course.recipe.training.cache, processes.here_together),
            square_examples(planned.side, load_example),
            square_images(planned.side, load_image),
        )
        position = StreamPlace(
            rank=processes.rank,
            processes=processes.count,
            workers=workers_for(course.recipe.training.workers, processes.here_together, len(feeds)),
            pin=self.classifier.mean.is_cuda,
        )
        return lambda first: [
            stream_batches(
                course.manifest.labeled,
                course.manifest.classes,
                planned.augmentation,
                batch_size=labeled.size,
                seed=(course.recipe.seed, STREAM, 0),
                start=first,
                place=position,
                load=cache.load,
            ),
            stream_views(
                course.manifest.unlabeled,
                planned.augmentation,
                STRONG,
                views=unlabeled.strong,
                batch_size=unlabeled.size,
                seed=(course.recipe.seed, STREAM, 1),
                start=first,
                place=position,
                load=cache.load_image,
            ),
        ]

    def _report(self, report: StepReport, advance: Callable[[str], None]) -> None:
        """Note a step whose figures are those of all processes in the journal and on TensorBoard."""
        note, journal = "", self.course.journal
        if self.planned.stage.reports(report.step):
            values = {name: rounded(value.tolist()) for name, value in report.figures.items()}
            fields: dict[str, Any] = {"learning_rate": report.rate, **values}
            journal.event("classifier_step", step=report.step, **fields)
            journal.scalars(report.step, "classifier", fields)
            note = f"loss {report.figures['loss'].item():.3f}, rate {report.rate:.2e}"
        advance(note)

    def _saver(self, seconds_before: float) -> Callable[[Checkpoint], None]:
        """Save a checkpoint and drop old ones; done by the first process."""
        course, began = self.course, time.monotonic()

        def save(checkpoint: Checkpoint) -> None:
            if not course.processes.first:
                return
            save_checkpoint(checkpoint, course.run.checkpoint(0, checkpoint.step, CHECKPOINT))
            course.run.drop_checkpoints(0, course.recipe.training.keep_checkpoints, CHECKPOINT)
            seconds = round(seconds_before + time.monotonic() - began, 1)
            course.journal.event("classifier_checkpoint", step=checkpoint.step, seconds=seconds)

        return save

    def _write(self, how: ImageClasses) -> Result:
        """Save the classifier, and say what it would remove from the validation images."""
        course = self.course
        save_image_classes(how, classifier_path(course.run))
        present, absent = removed_shares(course, how)
        facts = {"steps": self.planned.stage.steps, "removed_present": present, "removed_absent": absent}
        if present is None or absent is None:
            return Result(facts, "classifier of images trained; no validation image says how well")
        return Result(
            facts,
            f"classifier of images trained; on the validation images it removes {absent:.1%} of the classes that are not "
            f"there, and {present:.1%} of those that are",
        )


def removed_shares(course: Course, how: ImageClasses) -> tuple[float | None, float | None]:
    """Of the classes that are in validation images, and of those that are not, the share that is removed.

    Done by the first process; None if there are no such classes.
    """
    classes, totals = course.manifest.classes, torch.zeros(2, 2, dtype=torch.int64)
    samples = course.manifest.validation
    with course.journal.progress("classifier of images: evaluate", len(samples)) as advance:
        for sample in samples:
            example = load_example(sample, classes)
            # Pictures that are read may be views that cannot be written to, which torch warns of.
            label, image = (
                torch.from_numpy(np.require(array, requirements=["C", "W"]))
                for array in (example.label, example.image)
            )
            there = presence_of(label[None], len(classes))[0] > 0
            removed = how.removed([image])[0].cpu()
            totals += _counts(there, removed)
            advance("")
    shares = [int(row[0]) / int(row[1]) if row[1] else None for row in totals]
    return _short(shares[0]), _short(shares[1])


def _counts(there_K: Tensor, removed_K: Tensor) -> Tensor:
    """Removed classes, and all, of those that are there and of those that are not; int64 [2, 2]."""
    rows = [[(group & removed_K).sum(), group.sum()] for group in (there_K, ~there_K)]
    return torch.tensor(rows, dtype=torch.int64)


def _short(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
