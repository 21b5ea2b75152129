"""`darseg compare`: run what is missing of an experiment, survive what fails, collect scores."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from darseg.config.experiment import ExperimentFile, load_experiment
from darseg.config.text import dump_recipe, load_recipe
from darseg.data.files import write_whole
from darseg.errors import RecipeError, RunError
from darseg.experiment.check import Checked, check_images
from darseg.experiment.counts import read_counts
from darseg.experiment.design import Design, PlannedTrial, design_of, trial_name, with_steps
from darseg.experiment.folder import ExperimentFolder
from darseg.experiment.ledger import Ledger
from darseg.experiment.processes import Ended, Task, run_tasks
from darseg.experiment.statistics import compare_trials
from darseg.experiment.tables import write_tables
from darseg.experiment.trial import Evidence, Failure, Trial
from darseg.run.directory import RunDirectory
from darseg.run.folds import fold_records, fold_run
from darseg.run.signals import Stop, catch_signals

Publish = Callable[[Evidence, Path], object]
"""Writes what an experiment shows into its folder; called after each run."""


@dataclass(frozen=True)
class Compared:
    """What a call of `compare` leaves.

    Attributes:
        evidence: of all runs that are finished.
        untested: whether test images of finished runs are not scored, because runs failed or their scoring did.
    """

    evidence: Evidence
    untested: bool


def compare(
    experiment: ExperimentFile | Path | str,
    out: Path | str,
    *,
    jobs: int = 1,
    test: bool = False,
    console: Console | None = None,
    publish: Publish | None = None,
) -> Compared:
    """Run what is missing of an experiment in the folder `out`, and collect what its runs show.

    Each run is trained by a process of its own, into an ordinary run folder. A run that fails is reported, and the others
    go on; a later call tries it again. Test images are scored when all runs are finished.

    Args:
        experiment: the path of its file, or what `darseg.load_experiment` returns.
        jobs: number of runs at a time; they share the cores, or have a GPU each.
        test: score the test images of the finished runs also if others failed.
        publish: called with the evidence and the folder, after each run and at the end; None: compare.json, compare.csv
            and compare.md are written. `darseg.publish_comparison` also writes the page.

    Raises DarsegError: a bad experiment, data whose scores cannot be compared, a folder begun with another experiment.
    """
    file = experiment if isinstance(experiment, ExperimentFile) else load_experiment(experiment)
    if jobs < 1:
        raise RecipeError(f"Found {jobs} jobs; there should be 1 at least.")
    folder, console = ExperimentFolder(out), console or Console()
    folder.make()
    ledger = Ledger(folder.ledger, console)
    waiting = f"Waiting for the runs of an earlier call in {folder.root} to end"
    with folder.held(lambda: ledger.say(waiting)) as held, catch_signals() as stop:
        added = folder.check(file)
        # The folder begins, and variants are noted, when nothing is wrong with them: what is noted may not change.
        with tempfile.TemporaryDirectory(prefix="darseg_compare_") as scratch:
            planned = design_of(file, Path(scratch))
            folder.check_runs({trial.name: trial.recipe for trial in planned.trials})
            checked = check_images(planned, folder.checked)
        ledger.opened(jobs=jobs, added=added)
        folder.begin(file)
        design = design_of(file, folder.lists)
        work = _Work(
            folder, ledger, design, checked=checked, jobs=jobs, held=held, stop=stop, publish=publish
        )
        with stop.patiently():
            trials = work.train(design.trials)
            trials += work.train(work.as_many_seconds())
            untested = work.test(trials, asked=test)
        return Compared(work.publish_all(trials), untested)


class _Work:
    """An experiment at work."""

    def __init__(
        self,
        folder: ExperimentFolder,
        ledger: Ledger,
        design: Design,
        *,
        checked: Checked,
        jobs: int,
        held: int,
        stop: Stop,
        publish: Publish | None,
    ) -> None:
        self.folder, self.ledger, self.design, self.checked = folder, ledger, design, checked
        self.jobs, self.held, self.stop, self.publish = jobs, held, stop, publish
        self.known: dict[str, PlannedTrial] = {trial.name: trial for trial in design.trials}

    def finished(self, trial: PlannedTrial) -> bool:
        """Whether a run is trained and its validation images are scored."""
        return self.folder.counts(trial.name, "validation").is_file()

    def train(self, trials: Sequence[PlannedTrial]) -> list[PlannedTrial]:
        """Train the runs that are missing; returns all of them."""
        self.known |= {trial.name: trial for trial in trials}
        missing = [trial for trial in trials if not self.finished(trial)]
        noted = self.ledger.finished_runs()
        for trial in trials:  # a kill may have come between the end of a run and its line
            if trial not in missing and trial.name not in noted:
                self.ledger.finished(trial, seconds_of(self.folder, trial))
        if len(missing) < len(trials):
            self.ledger.say(f"{len(trials) - len(missing)} of {len(trials)} runs are finished already")
        for trial in missing:
            write_whole(self.folder.recipe(trial.name), dump_recipe(trial.recipe))
        self._run([self._task(trial) for trial in missing])
        return list(trials)

    def _task(self, trial: PlannedTrial) -> Task:
        """The training of a run, which waits for the rounds that it takes over from another one."""
        source = self.design.sources.get(trial.name)
        if source is None:
            return Task(trial.name, "train")
        run = RunDirectory(self.folder.run(source.name))

        def ready() -> bool:
            return source.name in self.ended or run.record_path(source.rounds - 1, "evaluate").is_file()

        return Task(trial.name, "train", ready=ready, reuse=run.root)

    def _run(self, tasks: Sequence[Task]) -> None:
        """Run tasks, and note and publish how each ends."""
        self.ended = {name for name, trial in self.known.items() if self.finished(trial)}
        count = len(tasks)
        running = run_tasks(
            self.folder, tasks, jobs=self.jobs, held=self.held, stop=self.stop, begun=self._begun
        )
        with contextlib.closing(running):
            for done, ended in enumerate(running, 1):
                self._note(ended, f"[{done}/{count}]")

    def _note(self, ended: Ended, place: str) -> None:
        """Note and publish how a task ended.

        Args:
            place: its number among all tasks.
        """
        name, task = ended.task.trial, ended.task.kind
        self.ended.add(name)
        if ended.reason is not None:
            self.ledger.failed(name, task, ended.reason)
            self.ledger.say(f"{place} {name}: failed: {ended.reason}")
        elif task == "train":
            trial = self.known[name]
            seconds = seconds_of(self.folder, trial)
            self.ledger.finished(trial, seconds)
            self.ledger.say(f"{place} {name}: {trial.steps} steps in {seconds:.0f} s")
        else:
            self.ledger.tested(name)
            self.ledger.say(f"{place} {name}: test images scored")
        if task == "train":
            self._publish_so_far()

    def _publish_so_far(self) -> None:
        """Publish what is known; hours of training do not end because a page could not be written."""
        try:
            self.publish_all(list(self.known.values()))
        except Exception as error:  # any
            self.ledger.journal.warn(f"the page could not be written: {type(error).__name__}: {error}")

    def _begun(self, task: Task) -> None:
        reuse = None if task.reuse is None else str(task.reuse.relative_to(self.folder.root / "runs"))
        self.ledger.begun(task.trial, task.kind, reuse)

    def as_many_seconds(self) -> list[PlannedTrial]:
        """The controls of as many seconds as their variants took.

        The step rate is that of the control of as many steps. Without both of these runs there is none.
        """
        controls = {arm.name: dict(arm.controls) for arm in self.design.arms}
        trials = []
        for trial in self.design.trials:
            name = self.design.seconds_controls.get(trial.variant)
            if name is None:
                continue
            known = self.known.get(trial_name(controls[trial.variant]["steps"], trial.labels, trial.seed))
            if known is None or not self.finished(trial) or not self.finished(known):
                continue
            if (steps := self._begun_steps(trial_name(name, trial.labels, trial.seed))) is None:
                rate = known.steps / seconds_of(self.folder, known)
                steps = max(1, math.floor(rate * seconds_of(self.folder, trial)))
            trials.append(with_steps(trial, name, steps))
        return trials

    def _begun_steps(self, trial: str) -> int | None:
        """The steps with which a control of as many seconds was begun."""
        path = self.folder.recipe(trial)
        if not path.is_file():
            return None
        return load_recipe(path).rounds[0].steps

    def test(self, trials: Sequence[PlannedTrial], *, asked: bool) -> bool:
        """Score the test images of all runs once these are finished; returns whether they are due.

        Nobody can choose a variant by scores that are not there before all variants are.
        """
        if not self.checked.test:
            return False
        ready = [trial for trial in trials if self.finished(trial)]
        if len(ready) < self.planned and not asked:
            return True
        missing = [trial for trial in ready if not self.folder.counts(trial.name, "test").is_file()]
        self._run([Task(trial.name, "test") for trial in missing])
        return not all(self.folder.counts(trial.name, "test").is_file() for trial in ready)

    @property
    def planned(self) -> int:
        """Number of runs, with the controls of as many seconds."""
        timed = sum(trial.variant in self.design.seconds_controls for trial in self.design.trials)
        return len(self.design.trials) + timed

    def publish_all(self, trials: Sequence[PlannedTrial]) -> Evidence:
        """Publish what is known, and return it."""
        evidence = self.evidence(trials)
        if self.publish is not None:
            self.publish(evidence, self.folder.root)
        else:
            write_tables(compare_trials(evidence), self.folder.root)
        return evidence

    def evidence(self, trials: Sequence[PlannedTrial]) -> Evidence:
        """What the finished runs show; test scores only if all finished runs have them."""
        reasons = self.ledger.failures()
        done = [trial for trial in trials if self.finished(trial)]
        tested = sum(self.folder.counts(trial.name, "test").is_file() for trial in done)
        notes = (
            f"Test images of {tested} of {len(done)} finished runs are scored; the scores are shown when all are.",
        )
        return Evidence(
            title=self.design.file.title,
            classes=self.checked.classes,
            arms=self.design.arms,
            trials=tuple(self._ended(trial, tested=tested == len(done)) for trial in done),
            failures=tuple(
                Failure(
                    trial.variant,
                    trial.labels,
                    trial.seed,
                    reason=reasons[trial.name].strip().splitlines()[0],
                )
                for trial in trials
                if trial.name in reasons and not self.finished(trial) and reasons[trial.name].strip()
            ),
            planned=self.planned,
            added_after_test=self.ledger.added_after_test(),
            test_in_validation=self.checked.test_in_validation,
            notes=notes if 0 < tested < len(done) else (),
            facts=self.ledger.facts(),
        )

    def _ended(self, trial: PlannedTrial, *, tested: bool) -> Trial:
        return Trial(
            trial.variant,
            trial.labels,
            trial.seed,
            steps=trial.steps,
            images=trial.images,
            seconds=seconds_of(self.folder, trial),
            validation=read_counts(self.folder.counts(trial.name, "validation")),
            test=read_counts(self.folder.counts(trial.name, "test")) if tested else None,
        )


def seconds_of(folder: ExperimentFolder, trial: PlannedTrial) -> float:
    """Seconds in which a run labeled and trained, steps that it took over included; not its scores.

    The networks that it trained on folds of the labeled images count, too.

    Raises RunError if a record is damaged or missing.
    """
    run, seconds, folds = RunDirectory(folder.run(trial.name)), 0.0, 0
    for planned in trial.rounds:
        steps = ("label", "train") if planned.labels else ("train",)
        if trial.recipe.image_classes is not None and planned.index == 0:
            steps = ("classify", *steps)
        for step in steps:
            record = run.read_record(planned.index, step)
            if record is None:
                raise RunError(
                    f"{run.record_path(planned.index, step)} is missing, though the run is finished. Restore it, or "
                    f"delete {run.root} and run the same command again."
                )
            seconds += record.seconds
            folds = max(folds, record.folds)
    trained = fold_records(run, folds)
    if len(trained) < folds:
        raise RunError(
            f"{fold_run(run, len(trained)).root} has no record of its training, though the run is finished. Restore it, "
            f"or delete {run.root} and run the same command again."
        )
    seconds += sum(record.seconds for record in trained)
    return round(seconds, 3)
