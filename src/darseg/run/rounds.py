"""All rounds of a run: label, train, evaluate, and again. Every step is skipped where it is done already."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

import darseg
from darseg.config.recipe import Recipe
from darseg.config.text import dump_recipe, load_recipe, recipe_differences
from darseg.data.batches import Batch, stream_batches
from darseg.data.classes import ClassSet
from darseg.data.dataset import Cache
from darseg.data.examine import reading_notes
from darseg.data.files import write_whole
from darseg.data.labels import read_label
from darseg.data.manifest import Manifest, Sample, count_pixels
from darseg.errors import DataError, Interrupted, MemoryLimit, NumericsError, RunError, StorageError, faults
from darseg.model.backbone import RESNETS
from darseg.model.network import Network
from darseg.model.predict import Protocol
from darseg.model.sides import Sides
from darseg.model.weights import load_network, save_network
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.labelset import PseudoLabelSet, read_facts_logs
from darseg.run.build import (
    Round,
    auxiliary_weight_of,
    bf16_is_emulated,
    build_initial_network,
    check_shares,
    check_sizes,
    describe_shares,
    evaluation_protocol,
    labeling_protocol,
    load_to_predict,
    manifest_of,
    masks,
    pick_device,
    place,
    plan_rounds,
    prepare_training,
    set_threads,
    spec_of,
)
from darseg.run.check import read_all
from darseg.run.directory import (
    RunDirectory,
    StepRecord,
    digest_manifest,
    digest_path,
    digest_settings,
    digest_state,
    open_run,
    write_json,
    written_since,
)
from darseg.run.evaluate import evaluate_samples
from darseg.run.journal import Journal
from darseg.run.label_samples import LabelFiles, LabelTask, check_disk, label_samples, network_predictor
from darseg.run.machine import cache_limit, workers_for
from darseg.run.marks import fix_excluded, read_excluded, read_marks, without
from darseg.run.signals import Stop, catch_signals
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.loss import self_training
from darseg.training.processes import Processes
from darseg.training.scores import Scores
from darseg.training.stage import Stage, run_stage

LOG_EVERY = 10  # steps between figures in the journal and TensorBoard


@dataclass(frozen=True)
class Course:
    """What all steps of a run share."""

    recipe: Recipe
    run: RunDirectory
    manifest: Manifest
    data: Mapping[str, str]  # role → digest of its samples
    counts: Sequence[int]  # labeled pixels per class: the prior
    rounds: Sequence[Round]
    reuse: RunDirectory | None
    journal: Journal
    processes: Processes
    stop: Stop
    after_round: Callable[[Path], object] | None

    def path(self, round_: Round, name: str) -> Path:
        return self.run.round(round_.index) / name


def train(
    recipe: Recipe,
    out: Path | str,
    reuse: Path | str | None = None,
    console: Console | None = None,
    after_round: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Run all rounds of a recipe in the folder `out`, or go on where an earlier call stopped.

    Args:
        reuse: another run folder; steps it finished with the same inputs are copied instead of done again
            (round 0 is the same for all labeling methods, for example).
        after_round: called with the run folder after each round that was worked on, and after the last; by the first
            process, not in the seconds of the round. Meant for `darseg.write_report`: where it fails, the run
            goes on with a warning.

    Returns:
        the content of `summary.json`.

    Raises DarsegError: bad recipe, data, weights or disk; a run folder begun with another recipe.
    """
    processes = Processes.here()
    set_threads(recipe.threads)
    manifest = processes.together(lambda: manifest_of(recipe))
    data = digest_manifest(manifest)
    network, weights_from = processes.together(lambda: build_initial_network(recipe))
    check_sizes(recipe, network)
    rounds = plan_rounds(recipe, len(manifest.labeled), len(manifest.unlabeled), network.fill)
    check_shares(recipe, rounds, processes.count)
    prepare_training(recipe, network, processes.count)
    console = console or Console(quiet=not processes.first)

    def begin(stack: contextlib.ExitStack) -> tuple[Path, list[int], bool]:
        if not RunDirectory(out).recipe.exists():  # before hours of work, not after them
            found = read_all(manifest, console)
            if found.faults:
                raise DataError(
                    faults(f"The data have {len(found.faults)} fault(s), nothing was begun", found.faults)
                )
        counts = count_labels(masks(manifest.labeled), len(manifest.classes))
        run = open_run(
            Path(out), dump_recipe(recipe), lambda found: recipe_differences(load_recipe(found), recipe), data
        )
        return run.root, counts.tolist(), stack.enter_context(run.held())

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(catch_signals())
        root, counts, locked = processes.from_first(lambda: begin(stack))
        run = RunDirectory(root)
        journal = Journal(
            run.journal if processes.first else None, run.tensorboard if processes.first else None, console
        )
        stack.callback(journal.close)
        other = RunDirectory(reuse) if reuse else None
        course = Course(
            recipe, run, manifest, data, counts, rounds, other, journal, processes, stop, after_round
        )
        try:
            if processes.first:
                _begin(course, weights_from)
                if not locked:
                    journal.warn(
                        f"{run.root} lies on a file system without locks: a second process that works in it at the same "
                        "time would not be noticed"
                    )
            return run_rounds(course, network)
        except BaseException as error:
            with contextlib.suppress(StorageError):  # a full disk must not hide why the run stopped
                journal.event("stopped", reason=f"{type(error).__name__}: {error}")
            if isinstance(error, Interrupted) and stop.asked:
                error.code = stop.exit_code
            if not processes.first and isinstance(error, (Interrupted, NumericsError)):
                processes.leave(error)  # all processes meet these, one tells of them
            raise


def run_rounds(course: Course, network: Network) -> dict[str, Any]:
    """The whole run: label (from round 1 on), train, evaluate, round by round; see `train`.

    All processes do all three together; the first writes.
    """
    run, names, processes = course.run, course.manifest.classes.names, course.processes
    summary: dict = {"classes": list(names), "rounds": []}
    before = digest_state(network.state_dict())
    place(network)
    worked = False
    for round_ in course.rounds:
        found_done = run.record_path(round_.index, "evaluate").exists()
        worked |= not found_done
        pseudo, labeling = _label(course, round_, before) if round_.index else ((), 0.0)
        training = _train(course, round_, before, pseudo, network)
        course.stop.check()  # asked in the last step
        scores, evaluating = _evaluate(course, round_)
        described = scores.to_json(names)
        figures = {key: described[key] for key in ("mean_iou", "iou", "mean_accuracy", "pixel_accuracy")}
        summary["rounds"].append(
            {
                "round": round_.index,
                "labeling_ratio": round_.labeling_ratio,
                **figures,
                "steps": round_.steps,
                "seconds": round(labeling + training + evaluating, 1),
            }
        )
        processes.from_first(lambda: write_json(run.summary, summary))
        before = digest_path(run.network(round_.index))
        if processes.first and not (found_done and round_ is not course.rounds[-1]):
            _report(course, round_)
    if processes.first and not worked:
        _say_finished(course)
    course.journal.event("finished")
    return summary


def _say_finished(course: Course) -> None:
    """Nothing was left to do; marks that came too late for the rounds are named."""
    run, last = course.run, course.rounds[-1].index
    course.journal.say("All rounds are finished already: nothing was done.")
    marks = read_marks(run, {sample.id for sample in course.manifest.unlabeled})
    late = set(marks) - set(read_excluded(run, last))
    if late and last:
        course.journal.say(
            f"{len(late)} image(s) are marked as bad that round {last} did not leave out: to do it anew, delete "
            f"{run.round(last)} and give the same command."
        )


def _report(course: Course, round_: Round) -> None:
    """What is wanted after a round; hours of training do not end because a page could not be written."""
    if course.after_round is None:
        return
    began = time.monotonic()
    try:
        course.after_round(course.run.root)
    except Exception as error:  # whatever it is
        course.journal.warn(f"the report could not be written: {type(error).__name__}: {error}")
    else:
        course.journal.say(f"round {round_.index}: report ({time.monotonic() - began:.1f} s)")


def environment(processes: int) -> dict[str, Any]:
    """What a run's bytes can depend on besides the recipe and the data."""
    device = pick_device()
    return {
        "darseg": darseg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _begin(course: Course, weights_from: str) -> None:
    run, journal, now = course.run, course.journal, environment(course.processes.count)
    roles = course.manifest.roles()
    counts = ", ".join(f"{len(samples)} {role}" for role, samples in roles.items() if samples)
    if run.environment.exists():
        first = json.loads(run.environment.read_text())
        changed = [
            f"{key} {first[key]} → {now[key]}" for key in now if key in first and first[key] != now[key]
        ]
        journal.event("resumed", environment=now)
        journal.say(f"Going on in {run.root}: {counts}")
        if changed:
            journal.warn(f"another environment than at the start, last bits may differ: {'; '.join(changed)}")
        if first.get("processes", now["processes"]) != now["processes"]:
            journal.warn(
                "on another number of processes dropout and BatchNorm's groups of images are others: the result is "
                "equal in distribution, not in bits"
            )
        if newer := written_since(course.manifest, run.environment.stat().st_mtime):
            journal.event("data_written", files=len(newer))
            journal.warn(
                f"{len(newer)} data file(s) were written after this run began, the first is {newer[0]}. All sizes are as "
                "they were, so it goes on; if what they hold is not, start another run with --out NEW_FOLDER"
            )
    else:
        write_json(run.environment, now)
        journal.event("started", environment=now, weights=weights_from)
        journal.say(f"New run in {run.root}: {counts}")
    journal.say(f"Initial weights: {weights_from}")
    if course.recipe.training.precision == "bf16" and bf16_is_emulated():
        journal.warn(
            "training.precision bf16: this processor lacks the instructions for it (AVX-512), so it runs emulated, "
            "many times slower than fp32. Use training.precision=fp32 on this machine."
        )
    for note in reading_notes(course.manifest):
        journal.event("note", text=note)
        journal.say(note)
    absent = [
        name for name, count in zip(course.manifest.classes.names, course.counts, strict=True) if not count
    ]
    if absent:
        journal.warn(f"absent from all labeled masks, so never pseudo-labeled: {', '.join(absent)}")
    if course.processes.count > 1:
        journal.say(describe_shares(course.rounds, course.processes.count))
    if course.recipe.training.sync_batchnorm and pick_device().type == "cpu":
        journal.warn(
            "training.sync_batchnorm: PyTorch has SyncBatchNorm on GPUs alone; here BatchNorm sees the images of its own "
            "process, and the running statistics are averaged"
        )
    journal.say(f"Evaluation: {evaluation_protocol(course.recipe).describe()}")


def _label(course: Course, round_: Round, before: str) -> tuple[tuple[Sample, ...], float]:
    """Pseudo-label the unlabeled images with the network of the round before; all processes together.

    Images marked as bad when the round began are left out; its number of steps stays as planned.

    Returns:
        the unlabeled samples with their new label maps, and seconds.
    """
    run, journal, index = course.run, course.journal, round_.index
    labeling = course.recipe.labeling
    excluded = course.processes.from_first(lambda: fix_excluded(run, index, course.manifest.unlabeled))
    unlabeled = without(course.manifest.unlabeled, excluded)
    protocol = labeling_protocol(course.recipe)
    task = LabelTask(
        labeling=labeling.at(round_.labeling_ratio),
        distribution=course.processes.together(lambda: ClassDistribution.from_counts(course.counts)),
        seed=course.recipe.seed,
        round_index=index,
    )
    histogram, thresholds = course.path(round_, "histogram.npz"), course.path(round_, "thresholds.json")
    inputs = {
        "settings": digest_settings(
            protocol=asdict(protocol),
            **asdict(task.labeling),
            seed=task.seed,
        ),
        "labeled": course.data["labeled"],
        "unlabeled": course.data["unlabeled"],
        "network": before,
        **({"excluded": digest_settings(ids=excluded)} if excluded else {}),
    }
    waiting = None if labeling.predict_twice else run.predictions(index)

    def begin() -> StepRecord | None:
        record = run.finished(index, "label", inputs, course.reuse)
        if record is not None:
            _clean_labeling(course, index)  # left by a kill just after the record
        elif thresholds.exists():
            # All maps were written but not recorded; or the record was deleted, to label anew.
            shutil.rmtree(run.labels(index), ignore_errors=True)
            histogram.unlink(missing_ok=True)
            thresholds.unlink()
            run.drop_facts_logs(index)
        if record is None and waiting is not None and not histogram.exists():
            check_disk(run.root, count_pixels(unlabeled), "set labeling.predict_twice=true")
        return record

    record = course.processes.from_first(begin)
    if record is not None:
        return run.label_set(index).samples(unlabeled), record.seconds
    if excluded:
        total = len(course.manifest.unlabeled)
        journal.event("excluded", round=index, images=len(excluded), of=total)
        journal.say(f"round {index}: {len(excluded)} of {total} unlabeled images left out, marked as bad")
    began = time.monotonic()
    network = load_to_predict(run.network(index - 1))
    with _memory_told(_less_to_predict(course.recipe, "labeling", protocol)):
        labels = label_samples(
            unlabeled,
            task,
            network_predictor(network, lambda image: protocol, task.scale, folder=waiting),
            files=LabelFiles(run.labels(index), histogram, logs=run.round(index)),
            processes=course.processes,
            progress=lambda title, total: journal.progress(f"round {index}: {title}", total),
        )
    end = partial(_record_labels, course, round_, inputs, labels, began, unlabeled)
    return labels.samples(unlabeled), course.processes.from_first(end)


def _clean_labeling(course: Course, index: int) -> None:
    course.run.drop_facts_logs(index)
    if not course.recipe.labeling.keep_predictions:
        shutil.rmtree(course.run.predictions(index), ignore_errors=True)


def _record_labels(
    course: Course,
    round_: Round,
    inputs: Mapping[str, str],
    labels: PseudoLabelSet,
    began: float,
    unlabeled: Sequence[Sample],
) -> float:
    """Write down how the label maps of a round came about, and that they are done. Returns seconds."""
    run, journal, index = course.run, course.journal, round_.index
    classes, histogram, kept = course.manifest.classes, labels.histogram, labels.kept
    predicted = labels.thresholds.predicted
    never = [name for name, found in zip(classes.names, predicted, strict=True) if found == 0]
    if never:
        journal.warn(f"round {index}: never predicted, so not pseudo-labeled: {', '.join(never)}")
    outputs = ["labels", "histogram.npz", "thresholds.json", "images.json"]
    facts = {"share": round(float(kept.sum() / max(1, histogram.predicted.sum())), 4)}
    known = [sample for sample in unlabeled if sample.label]
    if known:
        scores = pseudo_scores(known, labels, classes)
        truth = count_labels(masks(known), len(classes))
        described = scores.to_json(classes.names) | {"truth": truth.tolist()}
        write_json(course.path(round_, "pseudo_scores.json"), described)
        outputs.append("pseudo_scores.json")
        facts["pixel_accuracy"] = round(scores.pixel_accuracy, 4) if scores.confusion.any() else None
    found = read_facts_logs(run.facts_logs(index), len(classes))
    facts_of_images = {sample.id: found[sample.id].to_json() for sample in unlabeled if sample.id in found}
    write_whole(course.path(round_, "images.json"), json.dumps(facts_of_images) + "\n")
    write_json(course.path(round_, "thresholds.json"), labels.to_json())
    seconds = run.finish(index, "label", inputs, outputs, time.monotonic() - began, facts).seconds
    _clean_labeling(course, index)
    journal.event("labeled", round=index, seconds=round(seconds, 1), **facts)
    right = f", {facts['pixel_accuracy']:.3f} of those rightly" if facts.get("pixel_accuracy") else ""
    journal.say(
        f"round {index}: {facts['share']:.3f} of the unlabeled pixels labeled by "
        f"{course.recipe.labeling.method}{right} ({seconds:.0f} s)"
    )
    return seconds


def pseudo_scores(samples: Sequence[Sample], labels: PseudoLabelSet, classes: ClassSet) -> Scores:
    """Pseudo labels against the truth that the unlabeled images happen to have: measured, never used."""
    scores = Scores.empty(len(classes))
    for (_, truth), sample in zip(masks(samples), labels.samples(samples), strict=True):
        assert sample.label is not None
        scores = scores.plus(truth, read_label(sample.label))
    return scores


def _train(course: Course, round_: Round, before: str, pseudo: Sequence[Sample], network: Network) -> float:
    """Train one round's network, in place and into the run folder. Returns seconds."""
    run, journal, index, processes = course.run, course.journal, round_.index, course.processes
    recipe, settings, classes = course.recipe, course.recipe.training, course.manifest.classes
    stage = Stage(
        steps=round_.steps,
        span=round_.span,
        learning_rate=round_.learning_rate,
        head_factor=settings.head_factor,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        power=settings.power,
        precision=settings.precision,
        seed=(recipe.seed, index),
        checkpoint_every=settings.checkpoint_every,
        micro_batch=settings.micro_batch,
        report_every=LOG_EVERY,
        compile=settings.compile,
        stage4_as_head=recipe.release_quirks and recipe.network.architecture == "deeplabv2",
        first_step_at_zero=recipe.release_quirks and index > 0,
    )
    auxiliary_weight = auxiliary_weight_of(recipe)
    inputs = {
        "settings": digest_settings(
            stage=asdict(stage)
            | {"checkpoint_every": None, "report_every": None},  # change nothing in the result
            augmentation=asdict(round_.augmentation),
            batch=(round_.batch, round_.pseudo_batch),
            auxiliary_weight=auxiliary_weight,
            pseudo_weight=settings.pseudo_weight if pseudo else None,
            network=asdict(spec_of(recipe)),
            recompute=settings.recompute,
        ),
        "labeled": course.data["labeled"],
        "labels": digest_path(run.labels(index)) if pseudo else "none",
        "network": before,
    }

    whole: list[Checkpoint] = []  # read by the first process already, to see whether it is whole

    def done() -> tuple[StepRecord | None, Path | None]:
        record = run.finished(index, "train", inputs, course.reuse)
        if record is not None:
            run.drop_checkpoints(index)  # left by a kill just after the record
            return record, None
        path, checkpoint = _usable_checkpoint(course, index)
        if checkpoint is not None:
            whole.append(checkpoint)
        return None, path

    record, latest = processes.from_first(done)
    if record is not None:
        return record.seconds
    momentum = None
    if index > 0:
        network.load_state_dict(load_network(run.network(index - 1)).state_dict())
        momentum = load_checkpoint(run.momentum(index - 1)).momentum
    begin, earlier = None, 0.0
    if latest is not None:
        begin = whole.pop() if whole else load_checkpoint(latest)
        saved = [e for e in journal.events("checkpoint") if (e["round"], e["step"]) == (index, begin.step)]
        earlier = saved[-1]["seconds"] if saved else 0.0
        journal.say(f"round {index}: going on at step {begin.step} of {stage.steps}")
    began = time.monotonic()
    steps_before = sum(other.steps for other in course.rounds[:index])
    roles = [(course.manifest.labeled, round_.batch)]
    if pseudo:
        roles.append((tuple(pseudo), round_.pseudo_batch))
    workers = workers_for(settings.workers, processes.here_together, len(roles))
    cache = Cache(cache_limit(settings.cache, processes.here_together))

    def streams(first: int) -> list[Iterator[Batch]]:
        return [
            stream_batches(
                samples,
                classes,
                round_.augmentation,
                size,
                (recipe.seed, index, role),
                first,
                workers,
                (processes.rank, processes.count),
                cache.load,
                pick_device().type == "cuda",
            )
            for role, (samples, size) in enumerate(roles)
        ]

    def objective(net: Callable, batches: Sequence[Batch], step: int):
        return self_training(net, batches, auxiliary_weight, settings.pseudo_weight)

    def on_step(step: int, rate: float, figures: Mapping[str, torch.Tensor], waiting: float) -> None:
        note = ""
        if stage.reports(step):
            # fp16 passes over steps whose gradient is beyond its range: they have no norm.
            numbers = {name: float(value) for name, value in figures.items()}
            values = {name: round(one, 6) if math.isfinite(one) else None for name, one in numbers.items()}
            shown = {"learning_rate": rate, **values, "waiting_for_data": round(waiting, 4)}
            journal.event("step", round=index, step=step, **shown)
            journal.scalars(steps_before + step, "train", shown)
            note = f"loss {numbers['loss']:.3f}, rate {rate:.2e}, {waiting:.0%} waiting for data"
        advance(note)

    def on_checkpoint(checkpoint: Checkpoint) -> None:
        if not processes.first:
            return
        save_checkpoint(checkpoint, run.checkpoint(index, checkpoint.step))
        run.drop_checkpoints(index, settings.keep_checkpoints)
        seconds = round(earlier + time.monotonic() - began, 1)
        journal.event("checkpoint", round=index, step=checkpoint.step, seconds=seconds)

    with (
        journal.progress(f"round {index}: train", stage.steps, begin.step if begin else 0) as advance,
        course.stop.patiently() as stop,
        _memory_told(_less_to_train(recipe, round_, processes.count)),
    ):
        end = run_stage(network, streams, objective, stage, begin, momentum, on_step, on_checkpoint, stop)
    taken = earlier + time.monotonic() - began

    def write() -> float:
        save_network(network, run.network(index), spec_of(recipe))
        save_checkpoint(Checkpoint(end.step, {}, end.momentum), run.momentum(index))
        facts = {"steps": stage.steps, "learning_rate": [stage.rate(0), stage.rate(stage.steps)]}
        outputs = ["network.safetensors", "momentum.safetensors"]
        seconds = run.finish(index, "train", inputs, outputs, taken, facts).seconds
        run.drop_checkpoints(index)
        journal.event("trained", round=index, seconds=round(seconds, 1), **facts)
        return seconds

    return processes.from_first(write)


def _usable_checkpoint(course: Course, index: int) -> tuple[Path | None, Checkpoint | None]:
    """The latest checkpoint that can be read, and what is in it; None where there is none.

    Damaged ones after it are removed, with a warning. Raises RunError naming all where none of those there can be read.
    """
    damaged: dict[Path, RunError] = {}
    for path in course.run.checkpoints(index):
        try:
            checkpoint = load_checkpoint(path)
        except RunError as error:
            damaged[path] = error
            continue
        for other in damaged:
            # Else it would stand for a later one among those that are kept.
            course.journal.warn(f"{other} is damaged and was removed; going back to {path.name}")
            other.unlink()
        return path, checkpoint
    if damaged:
        raise RunError(
            faults("No checkpoint of this round can be read", [str(one) for one in damaged.values()])
        )
    return None, None


@contextlib.contextmanager
def _memory_told(remedy: str) -> Generator[None]:
    """What to change in the recipe where a GPU's memory is not enough."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryLimit(
            f"The GPU's memory is not enough ({str(error).splitlines()[0]}). {remedy}"
        ) from error


def _less_to_train(recipe: Recipe, round_: Round, processes: int) -> str:
    """How a round of training takes less memory."""
    training = recipe.training
    own = round_.batch // processes
    now = min(training.micro_batch or own, own)
    half = (training.half_batch or training.batch // 2) if len(recipe.rounds) > 1 else training.batch
    shares = (training.batch // processes, half // processes)
    fits = [size for size in range(2, now // 2 + 1) if not any(share % size for share in shares)]
    remedies = [f"training.micro_batch={fits[-1]} (now {now} images at once)"] if fits else []
    if training.precision == "fp32":
        remedies.append("training.precision=bf16 (about half)")
    if not (training.recompute or training.compile) and recipe.network.backbone in RESNETS:
        remedies.append("training.recompute=true (less, for a third more time)")
    remedies += _smaller("training.crop", training.crop, spec_of(recipe).sides)
    return f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. `darseg plan` counts what a step keeps."


def _less_to_predict(recipe: Recipe, section: str, protocol: Protocol) -> str:
    """How labeling or evaluation takes less memory."""
    remedies = _smaller(f"{section}.window", protocol.window, spec_of(recipe).sides)
    return (
        f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}; --reuse THIS_FOLDER takes over what does not "
        "depend on it."
    )


def _smaller(key: str, size: tuple[int, int], sides: Sides) -> list[str]:
    """The key with the nearest a network takes to half of each side; nothing where that is what it has."""
    smaller = [sides.down(side // 2 + 1) for side in size]
    return [f"{key}={smaller} (now {list(size)}; about a quarter)"] if smaller != list(size) else []


def _either(remedies: Sequence[str]) -> str:
    *others, last = remedies or ["a smaller network.backbone"]
    return f"{', '.join(others)} or {last}" if others else last


def _evaluate(course: Course, round_: Round) -> tuple[Scores, float]:
    """Score a round's network (of its last step) on the validation images. Returns scores and seconds."""
    run, journal, index = course.run, course.journal, round_.index
    samples, classes = course.manifest.validation, course.manifest.classes
    protocol = evaluation_protocol(course.recipe)
    path = course.path(round_, "scores.json")
    inputs = {
        "settings": digest_settings(protocol=asdict(protocol)),
        "validation": course.data["validation"],
        "network": digest_path(run.network(index)),
    }
    processes = course.processes
    record = processes.from_first(lambda: run.finished(index, "evaluate", inputs, course.reuse))
    if record is not None:
        return Scores.from_json(json.loads(path.read_text())), record.seconds
    began = time.monotonic()
    network = load_to_predict(run.network(index))
    with (
        journal.progress(f"round {index}: evaluate", len(processes.share(samples))) as advance,
        _memory_told(_less_to_predict(course.recipe, "evaluation", protocol)),
    ):
        own = processes.together(
            lambda: evaluate_samples(network, processes.share(samples), classes, protocol, advance)
        )
    scores = Scores(processes.add_up(own.confusion))
    described = scores.to_json(classes.names)
    taken = time.monotonic() - began

    def write() -> float:
        write_json(path, described | {"protocol": protocol.describe()})
        return run.finish(index, "evaluate", inputs, ["scores.json"], taken).seconds

    seconds = processes.from_first(write)
    figures = {name: described[name] for name in ("mean_iou", "mean_accuracy", "pixel_accuracy")}
    journal.event("evaluated", round=index, seconds=round(seconds, 1), **figures, iou=described["iou"])
    last_step = sum(other.steps for other in course.rounds[: index + 1]) - 1
    journal.scalars(last_step, "validation", figures)
    shown = ", ".join(
        f"{name.replace('_', ' ')} {'undefined' if value is None else format(value, '.4f')}"
        for name, value in figures.items()
    )
    journal.say(f"round {index}: {shown} on {len(samples)} validation images ({seconds:.0f} s)")
    return scores, seconds
