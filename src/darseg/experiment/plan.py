"""What an experiment will take: runs, steps, images, hours by measured rates, and disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from darseg.config.data import SourceConfig
from darseg.config.experiment import ExperimentFile, load_experiment
from darseg.config.recipe import Recipe
from darseg.data.files import regular_files, write_whole
from darseg.data.manifest import Manifest, Sample
from darseg.errors import DarsegError, RecipeError, RunError
from darseg.experiment.check import check_images
from darseg.experiment.controls import rounds_of
from darseg.experiment.design import Design, PlannedTrial, design_of, with_steps
from darseg.experiment.folder import ExperimentFolder
from darseg.methods.acceptance import first_steps
from darseg.methods.consistency import Consistency
from darseg.run.build import manifest_of
from darseg.run.directory import RunDirectory
from darseg.run.folds import TRAINED_ROUND, USUAL_FOLDS, fold_count
from darseg.run.image_classes import classifier_epoch
from darseg.run.journal import Journal
from darseg.run.machine import default_threads
from darseg.run.plan import Round
from darseg.run.rounds import train
from darseg.run.settings import digest_text
from darseg.run.split import pool_of
from darseg.run.steps.align import IMAGES as MOST_ALIGNED

REHEARSED_STEPS = 11
"""Of each round in the rehearsal. The journal notes the first and the eleventh; ten are timed, without the start."""

REHEARSED_IMAGES = 16
"""Of each role in the rehearsal."""


@dataclass(frozen=True)
class Rate:
    """What a kind of round costs.

    Attributes:
        step: seconds of a training step.
        label: seconds to label an image, 0 in rounds without pseudo labels.
        score: seconds to predict and score an image.
        network_bytes: of weights and optimizer state.
        weights_bytes: of weights alone.
        label_bytes: of an image's label map.
    """

    step: float
    label: float
    score: float
    network_bytes: int
    weights_bytes: int
    label_bytes: float


NOTHING = Rate(0.0, 0.0, score=0.0, network_bytes=0, weights_bytes=0, label_bytes=0.0)


@dataclass(frozen=True)
class PlannedArm:
    """What the runs of a variant, control or ceiling take at one number of labels.

    Attributes:
        runs, finished: their number, and how many of them are finished.
        steps: training steps of the runs that are missing.
        shared: how many of these are taken over from other runs.
        images: that these runs see.
        seconds: to do what is missing, with one run at a time.
        bytes: on the disk, of the missing runs.
    """

    name: str
    labels: int
    runs: int
    finished: int
    steps: int
    shared: int
    images: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class ExperimentPlan:
    """What is left to do of an experiment.

    Attributes:
        jobs: runs at a time.
        threads: CPU threads of each.
        measured: where the rates come from.
        sharing: a line for each variant that takes rounds over.
        timed: names of controls of as many seconds; their steps are estimated by the rates.
    """

    arms: tuple[PlannedArm, ...]
    jobs: int
    threads: int
    measured: str
    sharing: tuple[str, ...]
    timed: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Until everything is done, if all places are busy until the end."""
        return sum(arm.seconds for arm in self.arms) / self.jobs / 3600

    @property
    def bytes(self) -> int:
        """Disk that is still to be filled."""
        return sum(arm.bytes for arm in self.arms)


def plan_experiment(
    experiment: ExperimentFile | Path | str, out: Path | str | None = None, *, jobs: int = 1
) -> ExperimentPlan:
    """What is left to do of an experiment; writes nothing in its folder.

    The rates are those of finished runs; of other kinds of rounds a few steps are trained in a temporary folder.

    Args:
        out: its folder; None, or a folder that is not there: nothing is done yet.
        jobs: runs at a time.

    Raises DarsegError as `compare` does before its first run.
    """
    file = experiment if isinstance(experiment, ExperimentFile) else load_experiment(experiment)
    if jobs < 1:
        raise RecipeError(f"Found {jobs} jobs; there should be 1 at least.")
    threads = max(1, default_threads() // jobs)
    with tempfile.TemporaryDirectory(prefix="darseg_plan_") as temporary:
        scratch = Path(temporary)
        folder = ExperimentFolder(out if out is not None else scratch / "out")
        folder.check(file)
        design = design_of(file, scratch / "lists")
        folder.check_runs({trial.name: trial.recipe for trial in design.trials})
        check_images(design, None)
        done = {trial.name for trial in design.trials if folder.counts(trial.name, "validation").is_file()}
        missing = [trial for trial in design.trials if trial.name not in done]
        manifest = manifest_of(file.base)
        rates = _rates_of_finished(folder, [trial for trial in design.trials if trial.name in done], manifest)
        known, before = {*rates}, torch.get_num_threads()
        try:
            for trial in missing:
                if any(kind not in rates for kind in _kinds(trial)):
                    rates = _rehearse(trial, scratch / "rehearsal" / trial.name, threads) | rates
        finally:
            torch.set_num_threads(before)
    timed = _timed(design, rates, manifest)
    done |= {trial.name for trial in timed if folder.counts(trial.name, "validation").is_file()}
    return ExperimentPlan(
        arms=_arms(replace(design, trials=(*design.trials, *timed)), done, rates=rates, manifest=manifest),
        jobs=jobs,
        threads=threads,
        measured=_origin(known, rates),
        sharing=tuple(_sharing(design)),
        timed=tuple(dict.fromkeys(trial.variant for trial in timed)),
    )


def _timed(design: Design, rates: Mapping[str, Rate], manifest: Manifest) -> list[PlannedTrial]:
    """The controls of as many seconds, with the steps that they get if the rates hold."""
    controls = []
    for trial in design.trials:
        name = design.seconds_controls.get(trial.variant)
        if name is None:
            continue
        seconds = _seconds_of_folds(trial, 0, rates=rates, manifest=manifest)
        for planned in trial.rounds:
            rate = rates[_kind(trial, planned)]
            seconds += planned.steps * rate.step + trial.unlabeled * rate.label
        short = with_steps(trial, name, 1)
        step = rates[_kind(short, short.rounds[0])].step  # that of the control of as many steps
        controls.append(with_steps(trial, name, max(1, int(seconds / step))))
    return controls


def _seconds_of_folds(
    trial: PlannedTrial, shared: int, *, rates: Mapping[str, Rate], manifest: Manifest
) -> float:
    """Seconds to train networks on folds of the labeled images, if a run does so after `shared` rounds."""
    count = fold_count(trial.recipe, len(manifest.validation))
    if not count or trial.recipe.follows_precision[0] < shared:
        return 0.0
    first = trial.rounds[TRAINED_ROUND]
    return count * first.steps * rates[_kind(trial, first)].step


def _kind(trial: PlannedTrial, planned: Round) -> str:
    """A digest of what decides how long a step of a round takes."""
    recipe = trial.recipe.at(planned.index)
    facts = {
        "network": recipe.network.model_dump(mode="json"),
        "training": recipe.training.model_copy(update={"learning_rate": None}).model_dump(mode="json"),
        "online": recipe.online.model_dump(mode="json") if planned.online is not None else None,
        "pseudo": planned.labels,
        "window": [
            recipe.labeling.window,
            recipe.labeling.base_size,
            recipe.evaluation.model_dump(mode="json"),
        ],
    }
    return digest_text(json.dumps(facts, sort_keys=True))


def _kinds(trial: PlannedTrial) -> list[str]:
    """The kinds of all that a run trains."""
    classifier = [] if trial.recipe.image_classes is None else [_classifier_kind(trial)]
    return [*classifier, *(_kind(trial, planned) for planned in trial.rounds)]


def _classifier_kind(trial: PlannedTrial) -> str:
    """A digest of what decides how long a step of the classifier of images takes."""
    assert trial.recipe.image_classes is not None
    usual = {"epochs": 0, "ramp": None}
    facts = trial.recipe.image_classes.model_dump(mode="json") | usual
    return digest_text(json.dumps({"classifier": facts}, sort_keys=True))


def _classifier_steps(trial: PlannedTrial) -> int:
    """How many steps a run trains its classifier of images, before its first round."""
    config = trial.recipe.image_classes
    return 0 if config is None else config.epochs * classifier_epoch(config, trial.labels)


def _rates_of_finished(
    folder: ExperimentFolder, trials: Iterable[PlannedTrial], manifest: Manifest
) -> dict[str, Rate]:
    """The rates of finished runs, by kind of round."""
    rates: dict[str, Rate] = {}
    for trial in trials:
        run = RunDirectory(folder.run(trial.name))
        if classified := run.read_record(0, "classify"):
            seconds = classified.seconds / _classifier_steps(trial)
            rates.setdefault(_classifier_kind(trial), replace(NOTHING, step=seconds))
        for planned in trial.rounds:
            images = trial.unlabeled, len(manifest.validation)
            rates.setdefault(_kind(trial, planned), _rate(run, planned, images, timed=None))
    return rates


def _rate(run: RunDirectory, planned: Round, images: tuple[int, int], *, timed: float | None) -> Rate:
    """What a finished round has cost.

    Args:
        images: numbers of unlabeled and validation images.
        timed: seconds of a step; None: as the record of the training says.
    """
    index, (unlabeled, validation) = planned.index, images
    labeled, trained, scored = (run.read_record(index, step) for step in ("label", "train", "evaluate"))
    train_seconds = trained.seconds if trained else 0.0
    return Rate(
        step=train_seconds / planned.steps if timed is None else timed,
        label=labeled.seconds / max(1, unlabeled) if labeled else 0.0,
        score=scored.seconds / max(1, validation) if scored else 0.0,
        network_bytes=_size(run.network(index)) + _size(run.optimizer(index)),
        weights_bytes=_size(run.network(index)),
        label_bytes=_size(run.labels(index)) / max(1, unlabeled) if labeled else 0.0,
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in regular_files(path)) if path.exists() else 0


def _rehearse(trial: PlannedTrial, folder: Path, threads: int) -> dict[str, Rate]:
    """The rates of a run's rounds, of a few steps and images."""
    recipe, numbers = _shortened(trial, folder, threads)
    run = RunDirectory(folder / "run")
    try:
        train(recipe, run.root, console=Console(quiet=True))
    except DarsegError as error:
        raise RunError(
            f"{trial.variant} fails in its first steps, which were to be measured: {error}\nCorrect or "
            "remove it. `darseg compare` without --plan reports it and runs the others."
        ) from error
    journal, times = Journal(run.journal, None, Console(quiet=True)), {}
    for event in journal.events("step"):
        times.setdefault(event["round"], []).append((event["step"], event["time"]))
    rates = {}
    if recipe.image_classes is not None:
        events = [*journal.events("classifier_step")]
        seconds = (events[-1]["time"] - events[0]["time"]) / (events[-1]["step"] - events[0]["step"])
        rates[_classifier_kind(trial)] = replace(NOTHING, step=seconds)
    for planned, short in zip(
        trial.rounds, rounds_of(recipe, labeled=numbers[0], unlabeled=numbers[1]), strict=True
    ):
        (first, began), (last, ended) = times[planned.index][0], times[planned.index][-1]
        timed = (ended - began) / (last - first) if last > first else None
        rates[_kind(trial, planned)] = _rate(run, short, numbers[1:], timed=timed)
    return rates


def _shortened(trial: PlannedTrial, folder: Path, threads: int) -> tuple[Recipe, tuple[int, int, int]]:
    """A run's recipe with few steps and images, and its numbers of images.

    These are labeled, unlabeled and validation images.
    """
    recipe, manifest = trial.recipe, manifest_of(trial.recipe)
    if not manifest.unlabeled:  # otherwise the labeled images that are left out would be unlabeled
        manifest = replace(manifest, unlabeled=manifest.labeled[REHEARSED_IMAGES:][:1])
    few = {
        role: samples[:REHEARSED_IMAGES]
        for role, samples in manifest.roles().items()
        if samples and role != "test"
    }
    sources: dict[str, SourceConfig | None] = {"unlabeled": None, "test": None}
    for role, samples in few.items():
        sources[role] = SourceConfig(list=str(_list(folder / f"{role}.txt", recipe, samples)))
    rounds = tuple(
        config.model_copy(
            update={"epochs": None, "steps": _few_steps(planned), "epoch_over": None, "span": None}
        )
        for config, planned in zip(recipe.rounds, trial.rounds, strict=True)
    )
    data = recipe.data.model_copy(update=sources)
    labeling = recipe.labeling
    if labeling.cross_fit:  # as many folds might not be possible with few images, and cost no other rate
        labeling = labeling.model_copy(update={"cross_fit": USUAL_FOLDS})
    update = {"labeling": labeling, "data": data, "rounds": rounds, "threads": recipe.threads or threads}
    if config := recipe.image_classes:
        epochs = -(-REHEARSED_STEPS // classifier_epoch(config, len(few["labeled"])))
        # Its unlabeled images count from the first epoch on.
        update["image_classes"] = config.model_copy(update={"epochs": max(2, epochs), "ramp": (0, 1)})
    if judged := recipe.online.adversarial:  # self-training begins after a quarter of the few steps
        judged = judged.model_copy(update={"start": None})
        update["online"] = recipe.online.model_copy(update={"adversarial": judged})
    numbers = [len(few.get(role, ())) for role in ("labeled", "unlabeled", "validation")]
    return recipe.model_copy(update=update), (numbers[0], numbers[1], numbers[2])


def _list(path: Path, recipe: Recipe, samples: Sequence[Sample]) -> Path:
    """A list file of samples, which is written."""
    write_whole(path, "".join(f"{image.line}\n" for image in pool_of(recipe, samples)))
    return path.resolve()


def _few_steps(planned: Round) -> int:
    """As few steps as tell the rate; more if an online method begins its work later."""
    least = REHEARSED_STEPS
    if isinstance(planned.online, Consistency):
        least = max(least, first_steps(planned.online.accept) + 1)
    return min(planned.steps, least)


def _arms(
    design: Design, done: set[str], *, rates: Mapping[str, Rate], manifest: Manifest
) -> tuple[PlannedArm, ...]:
    arms: dict[tuple[str, int], PlannedArm] = {}
    for trial in design.trials:
        key = trial.variant, trial.labels
        arm = arms.get(
            key, PlannedArm(*key, runs=0, finished=0, steps=0, shared=0, images=0, seconds=0, bytes=0)
        )
        arm = replace(arm, runs=arm.runs + 1)
        if trial.name in done:
            arms[key] = replace(arm, finished=arm.finished + 1)
            continue
        source = design.sources.get(trial.name)
        shared = source.rounds if source else 0
        seconds, size = _cost(trial, shared, rates=rates, manifest=manifest)
        arms[key] = replace(
            arm,
            steps=arm.steps + trial.steps,
            shared=arm.shared + sum(planned.steps for planned in trial.rounds[:shared]),
            images=arm.images + trial.images,
            seconds=arm.seconds + seconds,
            bytes=arm.bytes + size,
        )
    return tuple(arms.values())


def _cost(
    trial: PlannedTrial, shared: int, *, rates: Mapping[str, Rate], manifest: Manifest
) -> tuple[float, int]:
    """Seconds and bytes of a run whose first `shared` rounds are copied."""
    seconds, size, rate = _seconds_of_folds(trial, shared, rates=rates, manifest=manifest), 0, None
    if shared == 0 and trial.recipe.image_classes is not None:
        seconds += _classifier_steps(trial) * rates[_classifier_kind(trial)].step
    folds, first = fold_count(trial.recipe, len(manifest.validation)), trial.rounds[TRAINED_ROUND]
    size += folds * rates[_kind(trial, first)].weights_bytes
    aligned = 0 if trial.recipe.result.align == "off" else min(MOST_ALIGNED, trial.unlabeled or trial.labels)
    for planned in trial.rounds:
        rate = rates[_kind(trial, planned)]
        size += rate.network_bytes + round(rate.label_bytes * trial.unlabeled)
        if planned.index >= shared:
            seconds += planned.steps * rate.step + trial.unlabeled * rate.label
            seconds += (len(manifest.validation) + aligned) * rate.score
    if rate is not None:  # for the statistics
        seconds += (len(manifest.validation) + len(manifest.test)) * rate.score
    return seconds, size


def _origin(known: set[str], rates: Mapping[str, Rate]) -> str:
    """Where the rates come from."""
    parts = [f"finished runs ({len(known)} kinds of rounds)"] if known else []
    if rehearsed := len({*rates} - known):
        parts.append(
            f"a rehearsal of {REHEARSED_STEPS} steps and {REHEARSED_IMAGES} images of each role ({rehearsed} kinds of "
            "rounds)"
        )
    return " and ".join(parts)


def _sharing(design: Design) -> list[str]:
    """A line for each variant that takes its first rounds over from another one."""
    lines: dict[str, None] = {}
    for trial in design.trials:
        if source := design.sources.get(trial.name):
            rounds = "round 0" if source.rounds == 1 else f"rounds 0 to {source.rounds - 1}"
            lines[f"{trial.variant} takes over {rounds} of {source.name.split('/')[0]}"] = None
    return list(lines)
