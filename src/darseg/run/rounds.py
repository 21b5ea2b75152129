"""All rounds of a run: label, train, evaluate, and again. Every step is skipped where it is done already."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console

import darseg
from darseg.config import Recipe, dump_recipe, load_recipe, recipe_differences
from darseg.data.batches import Batch, stream_batches
from darseg.data.classes import ClassSet
from darseg.data.dataset import load_example
from darseg.data.manifest import Manifest, Sample, read_image, read_label
from darseg.errors import DataError, faults
from darseg.model.network import Network
from darseg.model.predict import Protocol, predict, predict_classes
from darseg.model.weights import load_network, save_network
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labelset import PseudoLabelSet, assign_labels, count_predictions
from darseg.pseudo.thresholds import Thresholds, choose_cbst, choose_dars, choose_global
from darseg.run.build import (
    Round,
    bf16_is_emulated,
    build_initial_network,
    check_sizes,
    evaluation_protocol,
    labeling_protocol,
    manifest_of,
    pick_device,
    place,
    plan_rounds,
    spec_of,
)
from darseg.run.check import read_all
from darseg.run.directory import (
    RunDirectory,
    digest_manifest,
    digest_path,
    digest_settings,
    digest_state,
    open_run,
    write_json,
)
from darseg.run.journal import Journal
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.loss import self_training
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
    distribution: ClassDistribution
    rounds: Sequence[Round]
    reuse: RunDirectory | None
    journal: Journal

    def path(self, round_: Round, name: str) -> Path:
        return self.run.round(round_.index) / name


def train(
    recipe: Recipe, out: Path | str, reuse: Path | str | None = None, console: Console | None = None
) -> dict:
    """Run all rounds of a recipe in the folder `out`, or go on where an earlier call stopped.

    Args:
        reuse: another run folder; steps it finished with the same inputs are copied instead of done again
            (round 0 is the same for all labelling methods, for example).

    Returns:
        the content of `summary.json`.

    Raises DarsegError: bad recipe, data, weights or disk; a run folder begun with another recipe.
    """
    torch.set_num_threads(recipe.threads or os.cpu_count() or 1)
    manifest = manifest_of(recipe)
    data = digest_manifest(manifest)
    network, weights_from = build_initial_network(recipe)
    check_sizes(recipe, network)
    rounds = plan_rounds(recipe, len(manifest.labeled), len(manifest.unlabeled), network.fill)
    console = console or Console()
    if not RunDirectory(out).recipe.exists():  # before hours of work, not after them
        found = read_all(manifest, console)
        if found.faults:
            raise DataError(
                faults(f"The data have {len(found.faults)} fault(s), nothing was begun", found.faults)
            )
    distribution, absent = measure_distribution(manifest.labeled, manifest.classes)
    run = open_run(
        Path(out), dump_recipe(recipe), lambda found: recipe_differences(load_recipe(found), recipe), data
    )
    journal = Journal(run.journal, run.tensorboard, console)
    other = RunDirectory(reuse) if reuse else None
    course = Course(recipe, run, manifest, data, distribution, rounds, other, journal)
    try:
        _begin(course, weights_from)
        if absent:
            journal.warn(f"absent from all labelled masks, so never pseudo-labelled: {', '.join(absent)}")
        return run_rounds(course, network)
    except BaseException as error:
        journal.event("stopped", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        journal.close()


def run_rounds(course: Course, network: Network) -> dict:
    """The whole run: label (from round 1 on), train, evaluate, round by round; see `train`."""
    run, names = course.run, course.manifest.classes.names
    summary: dict = {"classes": list(names), "rounds": []}
    before = digest_state(network.state_dict())
    place(network)
    for round_ in course.rounds:
        pseudo, labeling = _label(course, round_, before) if round_.index else ((), 0.0)
        training = _train(course, round_, before, pseudo, network)
        scores, evaluating = _evaluate(course, round_)
        before = digest_path(run.network(round_.index))
        described = scores.to_json(names)
        summary["rounds"].append(
            {
                "round": round_.index,
                "labeling_ratio": round_.labeling_ratio,
                "mean_iou": described["mean_iou"],
                "iou": described["iou"],
                "mean_accuracy": described["mean_accuracy"],
                "pixel_accuracy": described["pixel_accuracy"],
                "steps": round_.steps,
                "seconds": round(labeling + training + evaluating, 1),
            }
        )
        write_json(run.summary, summary)
    course.journal.event("finished")
    return summary


def measure_distribution(labeled: Sequence[Sample], classes: ClassSet) -> tuple[ClassDistribution, list[str]]:
    """Class shares among the labelled pixels of the masks (DARS, section 3.2: the prior of alignment).

    Returns:
        the distribution, and the names of the classes that occur in no mask (their share is 0).
    """
    counts = count_labels(masks(labeled, classes), len(classes))
    absent = [name for name, count in zip(classes.names, counts, strict=True) if count == 0]
    return ClassDistribution.from_counts(counts), absent


def masks(samples: Sequence[Sample], classes: ClassSet) -> Iterator[tuple[str, np.ndarray]]:
    """(path, label map) of all samples that have one."""
    return ((str(s.label), read_label(s.label, classes.ignore)) for s in samples if s.label)


def environment() -> dict:
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
    }


def _begin(course: Course, weights_from: str) -> None:
    run, journal, now = course.run, course.journal, environment()
    roles = course.manifest.roles()
    counts = ", ".join(f"{len(samples)} {role}" for role, samples in roles.items() if samples)
    if run.environment.exists():
        first = json.loads(run.environment.read_text())
        changed = [f"{key} {first.get(key)} → {now[key]}" for key in now if first.get(key) != now[key]]
        journal.event("resumed", environment=now)
        journal.say(f"Going on in {run.root}: {counts}")
        if changed:
            journal.warn(f"another environment than at the start, last bits may differ: {'; '.join(changed)}")
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
    journal.say(f"Evaluation: {evaluation_protocol(course.recipe).describe()}")


def _label(course: Course, round_: Round, before: str) -> tuple[tuple[Sample, ...], float]:
    """Pseudo-label the unlabelled images with the network of the round before.

    Returns:
        the unlabelled samples with their new label maps, and seconds.
    """
    run, journal, unlabeled = course.run, course.journal, course.manifest.unlabeled
    classes, labeling, index = course.manifest.classes, course.recipe.labeling, round_.index
    protocol = labeling_protocol(course.recipe)
    inputs = {
        "settings": digest_settings(
            protocol=asdict(protocol),
            method=labeling.method,
            ratio=round_.labeling_ratio,
            threshold=labeling.threshold,
            seed=course.recipe.seed,
            ignore=classes.ignore,
        ),
        "labeled": course.data["labeled"],
        "unlabeled": course.data["unlabeled"],
        "network": before,
    }
    record = run.finished(index, "label", inputs, course.reuse)
    if record is not None:
        shutil.rmtree(run.predictions(index), ignore_errors=True)  # left by a kill just after the record
        return run.label_set(index).samples(unlabeled), record.seconds
    began = time.monotonic()
    network = place(load_network(run.network(index - 1)))
    with journal.progress(f"round {index}: predict", len(unlabeled)) as advance:
        histogram = count_predictions(
            unlabeled,
            len(classes),
            lambda sample: predict(network, read_image(sample.image), protocol, str(sample.image)),
            run.predictions(index),
            advance,
        )
    choose = chooser(labeling.method, course.distribution, round_.labeling_ratio, labeling.threshold)
    thresholds = choose(histogram)
    never = [name for name, found in zip(classes.names, thresholds.found, strict=True) if found == 0]
    if never:
        journal.warn(f"round {index}: never predicted, so not pseudo-labelled: {', '.join(never)}")
    with journal.progress(f"round {index}: label", len(unlabeled)) as advance:
        kept = assign_labels(
            unlabeled,
            thresholds,
            course.recipe.seed,
            index,
            run.predictions(index),
            run.labels(index),
            advance,
        )
    labels = PseudoLabelSet(run.labels(index), histogram, thresholds, kept)
    labels.save(course.path(round_, "histogram.npz"), course.path(round_, "thresholds.json"))
    outputs = ["labels", "histogram.npz", "thresholds.json"]
    facts = {"share": round(float(kept.sum() / max(1, histogram.predicted.sum())), 4)}
    known = [sample for sample in unlabeled if sample.label]
    if known:
        scores = pseudo_scores(known, labels, classes)
        truth = count_labels(masks(known, classes), len(classes))
        described = scores.to_json(classes.names) | {"truth": truth.tolist()}
        write_json(course.path(round_, "pseudo_scores.json"), described)
        outputs.append("pseudo_scores.json")
        facts["pixel_accuracy"] = round(scores.pixel_accuracy, 4) if scores.confusion.any() else None
    seconds = time.monotonic() - began
    run.finish(index, "label", inputs, outputs, seconds, facts)
    shutil.rmtree(run.predictions(index), ignore_errors=True)
    journal.event("labeled", round=index, seconds=round(seconds, 1), **facts)
    right = f", {facts['pixel_accuracy']:.3f} of those rightly" if facts.get("pixel_accuracy") else ""
    journal.say(
        f"round {index}: {facts['share']:.3f} of the unlabelled pixels labelled by {labeling.method}{right} "
        f"({seconds:.0f} s)"
    )
    return labels.samples(unlabeled), seconds


def chooser(
    method: str, distribution: ClassDistribution, labeling_ratio: float | None, threshold: float | None
) -> Callable[[ConfidenceHistogram], Thresholds]:
    """The labelling method of that name, ready for a histogram."""
    match method:
        case "dars":
            assert labeling_ratio is not None
            return partial(choose_dars, distribution=distribution, labeling_ratio=labeling_ratio)
        case "cbst":
            assert labeling_ratio is not None
            return partial(choose_cbst, labeling_ratio=labeling_ratio)
        case "global":
            assert threshold is not None
            return partial(choose_global, threshold=threshold)
    raise ValueError(f"labelling method {method!r}")


def pseudo_scores(samples: Sequence[Sample], labels: PseudoLabelSet, classes: ClassSet) -> Scores:
    """Pseudo labels against the truth that the unlabelled images happen to have: measured, never used."""
    scores = Scores.empty(len(classes))
    for (_, truth), sample in zip(masks(samples, classes), labels.samples(samples), strict=True):
        assert sample.label is not None
        scores = scores.plus(truth, read_label(sample.label))
    return scores


def _train(course: Course, round_: Round, before: str, pseudo: Sequence[Sample], network: Network) -> float:
    """Train one round's network, in place and into the run folder. Returns seconds."""
    run, journal, index = course.run, course.journal, round_.index
    recipe, settings, classes = course.recipe, course.recipe.training, course.manifest.classes
    stage = Stage(
        steps=round_.steps,
        span=round_.span,
        learning_rate=round_.learning_rate,
        head_factor=settings.head_factor,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        power=settings.power,
        bf16=settings.precision == "bf16",
        seed=(recipe.seed, index),
        checkpoint_every=settings.checkpoint_every,
    )
    inputs = {
        "settings": digest_settings(
            stage=asdict(stage) | {"checkpoint_every": None},  # changes nothing in the result
            augmentation=asdict(round_.augmentation),
            batch=(round_.batch, round_.pseudo_batch),
            auxiliary_weight=recipe.network.auxiliary_weight,
            pseudo_weight=settings.pseudo_weight if pseudo else None,
            network=asdict(spec_of(recipe)),
            ignore=classes.ignore,
        ),
        "labeled": course.data["labeled"],
        "labels": digest_path(run.labels(index)) if pseudo else "none",
        "network": before,
    }
    record = run.finished(index, "train", inputs, course.reuse)
    if record is not None:
        run.checkpoint(index).unlink(missing_ok=True)  # left by a kill just after the record
        return record.seconds
    momentum = None
    if index > 0:
        network.load_state_dict(load_network(run.network(index - 1)).state_dict())
        momentum = load_checkpoint(run.momentum(index - 1)).momentum
    begin, earlier = None, 0.0
    if run.checkpoint(index).exists():
        begin = load_checkpoint(run.checkpoint(index))
        saved = [e for e in journal.events("checkpoint") if (e["round"], e["step"]) == (index, begin.step)]
        earlier = saved[-1]["seconds"] if saved else 0.0
        journal.say(f"round {index}: going on at step {begin.step} of {stage.steps}")
    began = time.monotonic()
    steps_before = sum(other.steps for other in course.rounds[:index])
    workers = settings.workers or min(8, os.cpu_count() or 1)

    def streams(first: int) -> list[Iterator[Batch]]:
        roles = [(course.manifest.labeled, round_.batch)]
        if pseudo:
            roles.append((tuple(pseudo), round_.pseudo_batch))
        return [
            stream_batches(
                samples, classes, round_.augmentation, size, (recipe.seed, index, role), first, workers
            )
            for role, (samples, size) in enumerate(roles)
        ]

    def objective(net: Network, batches: Sequence[Batch], step: int):
        return self_training(net, batches, recipe.network.auxiliary_weight, settings.pseudo_weight)

    def on_step(step: int, rate: float, figures: Mapping[str, torch.Tensor]) -> None:
        note = ""
        if step % LOG_EVERY == 0 or step == stage.steps - 1:
            values = {name: round(float(value), 6) for name, value in figures.items()}
            journal.event("step", round=index, step=step, learning_rate=rate, **values)
            shown = {"learning_rate": rate, **values}
            journal.scalars(steps_before + step, "train", shown)
            note = f"loss {values['loss']:.3f}, rate {rate:.2e}"
        advance(note)

    def on_checkpoint(checkpoint: Checkpoint) -> None:
        save_checkpoint(checkpoint, run.checkpoint(index))
        seconds = round(earlier + time.monotonic() - began, 1)
        journal.event("checkpoint", round=index, step=checkpoint.step, seconds=seconds)

    with journal.progress(f"round {index}: train", stage.steps, begin.step if begin else 0) as advance:
        end = run_stage(network, streams, objective, stage, begin, momentum, on_step, on_checkpoint)
    save_network(network, run.network(index), spec_of(recipe))
    save_checkpoint(Checkpoint(end.step, {}, end.momentum), run.momentum(index))
    seconds = earlier + time.monotonic() - began
    facts = {"steps": stage.steps, "learning_rate": [stage.rate(0), stage.rate(stage.steps)]}
    run.finish(index, "train", inputs, ["network.safetensors", "momentum.safetensors"], seconds, facts)
    run.checkpoint(index).unlink(missing_ok=True)
    journal.event("trained", round=index, seconds=round(seconds, 1), **facts)
    return seconds


def _evaluate(course: Course, round_: Round) -> tuple[Scores, float]:
    """Score a round's network (of its last step) on the validation images. Returns scores and seconds."""
    run, journal, index = course.run, course.journal, round_.index
    samples, classes = course.manifest.validation, course.manifest.classes
    protocol = evaluation_protocol(course.recipe)
    path = course.path(round_, "scores.json")
    inputs = {
        "settings": digest_settings(protocol=asdict(protocol), ignore=classes.ignore),
        "validation": course.data["validation"],
        "network": digest_path(run.network(index)),
    }
    record = run.finished(index, "evaluate", inputs, course.reuse)
    if record is not None:
        return Scores.from_json(json.loads(path.read_text())), record.seconds
    began = time.monotonic()
    network = place(load_network(run.network(index)))
    with journal.progress(f"round {index}: evaluate", len(samples)) as advance:
        scores = evaluate_samples(network, samples, classes, protocol, advance)
    described = scores.to_json(classes.names)
    write_json(path, described | {"protocol": protocol.describe()})
    seconds = time.monotonic() - began
    run.finish(index, "evaluate", inputs, ["scores.json"], seconds)
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


def evaluate_samples(
    network: Network,
    samples: Sequence[Sample],
    classes: ClassSet,
    protocol: Protocol,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores of a network (in eval mode) on labelled samples."""
    scores = Scores.empty(len(classes))
    for sample in samples:
        example = load_example(sample, classes)
        scores = scores.plus(example.label, predict_classes(network, example.image, protocol))
        advance()
    return scores
