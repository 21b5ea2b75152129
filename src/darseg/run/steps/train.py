"""Train: one round's network, in place and into the run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from darseg.config.recipe import Recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import StreamPlace
from darseg.data.manifest import Sample
from darseg.methods.adversarial import Adversarial
from darseg.methods.consistency import Consistency
from darseg.methods.dynamic import DynamicLoss
from darseg.methods.teacher import TeacherSettings
from darseg.model.network import Network, NetworkSpec
from darseg.model.weights import load_network, save_network
from darseg.run.build import auxiliary_weight_of, pick_device, spec_of
from darseg.run.course import Course
from darseg.run.data_digest import digest_samples
from darseg.run.directory import StepRecord, digest_path
from darseg.run.dynamic import dynamic_of, keeps_confidences
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests, stage_format_1
from darseg.run.image_classes import digest_image_classes, trained_image_classes
from darseg.run.labeled_part import labeled_samples
from darseg.run.machine import workers_for
from darseg.run.marks import fix_excluded, report_excluded, without
from darseg.run.online import teacher_of, with_shares
from darseg.run.plan import LearnerSettings, Round, learner_settings, method_of, stage_of
from darseg.run.remedies import explain_memory, less_to_train
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.checkpoints import latest_checkpoint
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.run.streams import open_stream
from darseg.training.checkpoint import OPTIMIZER, Checkpoint, Part, load_checkpoint, part_of, save_checkpoint
from darseg.training.method import Feed, Method, Streamed
from darseg.training.optimize import fits
from darseg.training.stage import Stage, StepReport, run_stage


@dataclass(frozen=True)
class TrainSettings:
    """Everything about a round's training that can change its result."""

    stage: Stage
    learner: LearnerSettings
    augmentation: Augmentation
    batch: tuple[int, int]
    auxiliary_weight: float
    network: NetworkSpec
    pseudo_weight: float | None = None
    recompute: bool = False
    freeze: str = "none"
    drop_path: float = 0.0
    online: Consistency | Adversarial | None = None
    teacher: TeacherSettings | None = None
    dynamic: DynamicLoss | None = None
    one_pass: bool = False

    def digest(self) -> str:
        """The digest that a record holds."""
        # These two change nothing in the result.
        unaffected = replace(
            self.stage, checkpoint_every=Stage.checkpoint_every, report_every=Stage.report_every
        )
        return digest_settings(settings=replace(self, stage=unaffected))

    def earlier_digests(self) -> list[str]:
        """What earlier formats of the run folder recorded for these settings."""
        if (
            self.freeze != "none"
            or self.drop_path
            or self.online
            or self.teacher
            or self.dynamic
            or self.one_pass
        ):
            return []  # format 1 did not know them
        return earlier_digests(
            lambda: digest_format_1(
                stage=stage_format_1(
                    self.stage, self.learner.optimizer, **as_format_1(self.learner, ignore=("optimizer",))
                ),
                augmentation=as_format_1(self.augmentation),
                batch=self.batch,
                auxiliary_weight=self.auxiliary_weight,
                pseudo_weight=self.pseudo_weight,
                network=as_format_1(self.network),
                recompute=self.recompute,
            )
        )


def settings_of(recipe: Recipe, round_: Round, counts: Sequence[int], *, pseudo: bool) -> TrainSettings:
    """The settings of a round.

    Args:
        counts: labeled pixels per class.
        pseudo: whether it has pseudo-labeled images.
    """
    recipe = recipe.at(round_.index)
    return TrainSettings(
        stage=stage_of(recipe, round_),
        learner=learner_settings(recipe, round_, counts),
        augmentation=round_.augmentation,
        batch=(round_.batch, round_.pseudo_batch),
        auxiliary_weight=auxiliary_weight_of(recipe),
        network=spec_of(recipe),
        pseudo_weight=recipe.training.pseudo_weight if pseudo else None,
        recompute=recipe.training.recompute,
        freeze=recipe.network.freeze,
        drop_path=recipe.network.drop_path,
        online=round_.online,
        teacher=None if round_.online else teacher_of(recipe),
        dynamic=dynamic_of(recipe) if pseudo else None,
        one_pass=bool(pseudo) and recipe.training.joins_halves and recipe.training.dynamic_loss is None,
    )


def train_round(
    course: Course,
    round_: Round,
    before: str,
    *,
    pseudo: Sequence[Sample],
    network: Network,
    goes_on_from: int,
    keeps_optimizer: bool = True,
) -> StepRecord:
    """Train one round's network; all processes together.

    Args:
        before: digest of the network as the round begins.
        pseudo: the unlabeled samples with their pseudo labels; empty in a round without and in online rounds.
        network: trained in place, unless the step is finished already.
        goes_on_from: the round whose weights and optimizer it takes over, unless its own network begins here.
        keeps_optimizer: save the optimizer's state at the end, for a round that goes on.
    """
    run, index = course.run, round_.index
    settings = settings_of(course.recipe, round_, course.counts, pseudo=bool(pseudo))
    labeled, own = labeled_samples(course.recipe, index, course.manifest.labeled), course.data["labeled"]
    if course.recipe.rounds[index].labeled_part is not None:
        own = course.processes.from_first(lambda: digest_samples(labeled))
    digests = {
        "settings": settings.digest(),
        "labeled": own,
        "labels": course.processes.from_first(lambda: digest_path(run.labels(index))) if pseudo else "none",
        "network": before,
    }
    if pseudo and keeps_confidences(course.recipe):
        digests["confidences"] = course.processes.from_first(lambda: digest_path(run.confidences(index)))
    unlabeled: Sequence[Sample] = ()
    if round_.online is not None:
        excluded = course.processes.from_first(lambda: _left_out(course, index))
        unlabeled = without(course.manifest.unlabeled, excluded)
        digests["unlabeled"] = course.data["unlabeled"]
        if excluded:
            digests["excluded"] = digest_settings(ids=list(excluded))
    if course.recipe.image_classes is not None:
        digests["image_classes"] = course.processes.from_first(
            lambda: digest_image_classes(course.recipe, run)
        )
    samples = {"labeled": labeled, "pseudo": tuple(pseudo), "unlabeled": tuple(unlabeled)}
    training = _Training(
        course,
        round_,
        settings.stage,
        samples=samples,
        network=network,
        goes_on_from=goes_on_from,
        keeps_optimizer=keeps_optimizer,
    )
    inputs, tidy = Inputs(digests, settings.earlier_digests()), lambda: run.drop_checkpoints(index)
    return complete(course, Step("train", index, inputs, work=training.run, tidy=tidy))


def _left_out(course: Course, index: int) -> tuple[str, ...]:
    """The unlabeled images that an online round leaves out: those marked as bad when it began."""
    run = course.run
    begun = run.has_trained(index)
    excluded = fix_excluded(run, index, course.manifest.unlabeled, begun=begun)
    if not begun:
        report_excluded(course.journal, index, excluded=len(excluded), total=len(course.manifest.unlabeled))
    return excluded


@dataclass(frozen=True)
class _Training:
    """A round's training at work.

    Attributes:
        samples: role of a feed → its samples.
        goes_on_from: the round whose weights and optimizer it takes over, unless its own network begins here.
        keeps_optimizer: save the optimizer's state at the end.
    """

    course: Course
    round: Round
    stage: Stage
    samples: Mapping[str, Sequence[Sample]]
    network: Network
    goes_on_from: int
    keeps_optimizer: bool

    def run(self) -> Work:
        """Train from the latest checkpoint, the network of an earlier round, or a new one."""
        course, index, stage = self.course, self.round.index, self.stage
        recipe = course.recipe.at(index)
        run, journal = course.run, course.journal
        begin, seconds_before = latest_checkpoint(
            course, lambda: run.checkpoints(index), "checkpoint", round=index
        )
        before: Mapping[str, Part] = {}
        if self.round.begins < index:
            self.network.load_state_dict(load_network(run.network(self.goes_on_from)).state_dict())
            before = load_checkpoint(run.optimizer(self.goes_on_from)).parts
        if begin is not None:
            journal.say(f"round {index}: going on at step {begin.step} of {stage.steps}")
        method = method_of(recipe, self.round, self.network, counts=course.counts)
        first = begin.step if begin else 0
        with (
            journal.progress(f"round {index}: train", stage.steps, first) as advance,
            course.stop.patiently() as stop,
            explain_memory(less_to_train(recipe, self.round, course.processes.count)),
        ):
            end = run_stage(
                method,
                self._streams(method.feeds),
                stage,
                begin=begin,
                before=self._fitting(method, before),
                on_step=lambda report: self._report(report, advance),
                on_checkpoint=self._saver(seconds_before),
                stop=stop,
            )
        result = method.outcome(method.state, self.network)
        assert isinstance(result, Network)

        def write() -> Result:
            run.result(index).unlink(missing_ok=True)  # of a network that was trained here before
            result.image_classes = trained_image_classes(course.recipe, run)
            save_network(result, run.network(index), spec_of(recipe))
            result.image_classes = None  # training goes on without it
            if self.keeps_optimizer:
                save_checkpoint(end.optimizers(), run.optimizer(index))
            return Result({"steps": stage.steps, "learning_rate": [self._rate(0), self._rate(stage.steps)]})

        outputs = [run.network(index).name]
        if self.keeps_optimizer:
            outputs.append(run.optimizer(index).name)
        return Work(outputs, write, seconds_before)

    def _fitting(self, method: Method, before: Mapping[str, Part]) -> Mapping[str, Part]:
        """The optimizer states of an earlier round that are of this round's optimizers."""
        kinds = {part_of(learner): learner.optimizer for learner in method.learners}
        fitting = {name: part for name, part in before.items() if name in kinds and fits(kinds[name], part)}
        if before and OPTIMIZER not in fitting:
            self.course.journal.warn(
                f"round {self.round.index}: the optimizer is not that of the round before, so it starts fresh"
            )
        return fitting

    def _rate(self, step: int) -> float:
        return self.stage.schedule.rate(step, self.stage.steps, self.round.learning_rate)

    def _streams(self, feeds: Sequence[Feed]) -> Callable[[int], Sequence[Iterator[Streamed]]]:
        """First step → the streams that the method asks for."""
        course, recipe, processes = self.course, self.course.recipe, self.course.processes
        cache = course.decoded()
        place = StreamPlace(
            rank=processes.rank,
            processes=processes.count,
            workers=workers_for(recipe.training.workers, processes.here_together, len(feeds)),
            pin=pick_device().type == "cuda",
        )

        def stream(feed: Feed, number: int, first: int) -> Iterator[Streamed]:
            return open_stream(
                self.round,
                feed,
                number=number,
                seed=recipe.seed,
                samples=self.samples[feed.role],
                classes=course.manifest.classes,
                start=first,
                place=place,
                load=cache.load,
                load_views=cache.load_image,
                truth_every=self.stage.report_every,
            )

        return lambda first: [stream(feed, number, first) for number, feed in enumerate(feeds)]

    def _report(self, report: StepReport, advance: Callable[[str], None]) -> None:
        """Note a step whose figures are those of all processes in the journal and on TensorBoard."""
        note, journal = "", self.course.journal
        if self.stage.reports(report.step):
            # fp16 skips steps whose gradient is beyond its range: they have no norm.
            numbers = with_shares({name: value.tolist() for name, value in report.figures.items()})
            values = {name: rounded(value) for name, value in numbers.items()}
            fields = {"learning_rate": report.rate, **values, "waiting_for_data": round(report.waiting, 4)}
            journal.event("step", round=self.round.index, step=report.step, **fields)
            steps_before = sum(planned.steps for planned in self.course.rounds[: self.round.index])
            single = {name: value for name, value in fields.items() if not isinstance(value, list)}
            journal.scalars(steps_before + report.step, "train", single)
            note = (
                f"loss {numbers['loss']:.3f}, rate {report.rate:.2e}, {report.waiting:.0%} waiting for data"
            )
        advance(note)

    def _saver(self, seconds_before: float) -> Callable[[Checkpoint], None]:
        """Save a checkpoint and drop old ones; done by the first process."""
        course, index, began = self.course, self.round.index, time.monotonic()

        def save(checkpoint: Checkpoint) -> None:
            if not course.processes.first:
                return
            save_checkpoint(checkpoint, course.run.checkpoint(index, checkpoint.step))
            course.run.drop_checkpoints(index, course.recipe.training.keep_checkpoints)
            seconds = round(seconds_before + time.monotonic() - began, 1)
            course.journal.event("checkpoint", round=index, step=checkpoint.step, seconds=seconds)

        return save


def rounded(value: Any) -> Any:
    """A number, or each of a list, as the journal has it; None if it is undefined or not finite."""
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return round(value, 6) if value is not None and math.isfinite(value) else None
