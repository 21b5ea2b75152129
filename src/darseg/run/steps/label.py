"""Label: pseudo labels for the unlabeled images, by the network of an earlier round or a labeler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from darseg.data.classes import ClassSet
from darseg.data.files import write_whole
from darseg.data.labels import read_label
from darseg.data.manifest import Sample, count_pixels
from darseg.data.maps import labeled_by
from darseg.data.prediction import SCALES
from darseg.errors import RunError
from darseg.model.network import Network
from darseg.model.windows import Protocol
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.labelset import Predictor, PseudoLabelSet, read_facts_logs
from darseg.pseudo.scores import ScoreSource
from darseg.pseudo.shrink import Calibration
from darseg.run.build import load_to_predict, masks
from darseg.run.calibrate import calibrate
from darseg.run.course import Course
from darseg.run.directory import StepRecord, digest_path, write_json
from darseg.run.dynamic import keeps_confidences
from darseg.run.folds import TRAINED_ROUND, fold_run
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests
from darseg.run.held_out import HeldOut, HeldOutPart
from darseg.run.journal import NEVER, UNSHOWN
from darseg.run.label_samples import (
    check_disk,
    label_samples,
    network_predictor,
    network_scores,
)
from darseg.run.label_task import LabelFiles, LabelTask
from darseg.run.labelers import LABELS_FROM, labeling_protocol_of, read_labeler
from darseg.run.marks import fix_excluded, report_excluded, without
from darseg.run.plan import Round
from darseg.run.remedies import explain_memory, less_to_predict
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.align import choose_images
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.training.scores import Scores

HISTOGRAM, THRESHOLDS, FACTS, SCORES = "histogram.npz", "thresholds.json", "images.json", "pseudo_scores.json"
ALIGNMENT, WAITING_SCORES, HELD_OUT, CALIBRATION = (
    "alignment.json",
    "waiting_scores",
    "held_out.npz",
    "calibration.json",
)  # until the step is done

PRECISION_VERSION = 1
"""Of the rule by which thresholds follow a target precision."""


def label_round(course: Course, round_: Round, labeling_round: int) -> tuple[tuple[Sample, ...], StepRecord]:
    """Pseudo-label the unlabeled images; all processes together.

    Images that were marked as bad when the round began are left out; the round keeps its planned number of steps.

    Args:
        labeling_round: the round whose network labels, if the round has no labeler.

    Returns:
        the unlabeled samples with their new label maps, and the step's record.
    """
    run, index = course.run, round_.index
    excluded = course.processes.from_first(lambda: fix_excluded(run, index, course.manifest.unlabeled))
    unlabeled = without(course.manifest.unlabeled, excluded)
    distribution = course.processes.together(lambda: ClassDistribution.from_counts(course.counts))
    labeling = course.recipe.labeling.at(round_.labeling_ratio)
    task = LabelTask(labeling, distribution, seed=course.recipe.seed, round_index=index)
    inputs = _inputs(course, task, labeling_round, excluded=excluded)
    task = replace(task, inputs=digest_settings(**inputs.digests))
    step = Step(
        "label",
        index,
        inputs,
        work=lambda: _label(course, round_, task, unlabeled=unlabeled, labeling_round=labeling_round),
        tidy=lambda: _tidy(course, round_),
    )
    record = complete(course, step)
    # The first process looks: on a network disk others may not see yet what it has just written. Each makes its own
    # paths, since the same folders may have other paths on other machines.
    course.processes.from_first(lambda: run.label_set(index) and None)
    confidences = run.confidences(index) if keeps_confidences(course.recipe) else None
    return labeled_by(run.labels(index), unlabeled, confidences), record


def _inputs(course: Course, task: LabelTask, labeling_round: int, *, excluded: Sequence[str]) -> Inputs:
    index, labeling, labeler = task.round_index, task.labeling, course.labelers.get(task.round_index)
    protocol = labeling_protocol_of(course.recipe, index, labeler, labeling_round=labeling_round)
    rule = PRECISION_VERSION if labeling.ratio == "auto" else None
    digests = {
        "settings": digest_settings(
            protocol=protocol,
            labeling=labeling,
            seed=task.seed,
            precision_rule=rule,
            confidences=keeps_confidences(course.recipe) or None,
            prior=_prior(course),
        ),
        "labeled": course.data["labeled"],
        "unlabeled": course.data["unlabeled"],
    }
    if rule is not None and course.folds:
        digests["folds"] = course.processes.from_first(lambda: _digest_folds(course))
    if (rule is not None and not course.folds) or course.labeled is not None:
        digests["validation"] = course.data["validation"]
    if labeler is None:
        network = course.run.network(labeling_round)
        digests["network"] = course.processes.from_first(lambda: digest_path(network))
    else:
        digests["labels_from"] = labeler.digest
    if labeler is not None and labeler.order is not None:
        digests["order"] = digest_settings(order=list(labeler.order))
    if excluded:
        digests["excluded"] = digest_settings(ids=list(excluded))
    earlier = earlier_digests(
        lambda: digest_format_1(protocol=as_format_1(protocol), **as_format_1(labeling), seed=task.seed)
    )
    return Inputs(digests, earlier)


def _digest_folds(course: Course) -> str:
    """What decides the precision of a run that cross-fits: its networks, and what each predicts."""
    networks = [
        digest_path(fold_run(course.run, fold.number).network(TRAINED_ROUND)) for fold in course.folds
    ]
    ids = [[sample.id for sample in fold.held_out] for fold in course.folds]
    return digest_settings(networks=networks, ids=ids)


def _prior(course: Course) -> str | None:
    """The prior as digests of settings know it: they leave out the default."""
    return None if course.labeled is None else course.recipe.labeling.prior


def _label(
    course: Course, round_: Round, task: LabelTask, *, unlabeled: Sequence[Sample], labeling_round: int
) -> Work:
    """The work of all processes: predict, count, choose thresholds, assign."""
    run, journal, index = course.run, course.journal, round_.index
    labeler = course.labelers.get(index)
    protocol = labeling_protocol_of(course.recipe, index, labeler, labeling_round=labeling_round)
    course.processes.from_first(lambda: _prepare(course, round_, unlabeled))
    if labeler is None:
        network, remedy = (
            load_to_predict(run.network(labeling_round), plain=True),
            less_to_predict(course.recipe.at(labeling_round), "labeling", protocol),
        )
    else:
        network, window = labeler.load(plain=task.labeling.align != "none"), f"rounds.{index}.labels_window"
        remedy = less_to_predict(course.recipe, "labeling", protocol, window=(window, labeler.spec.sides))
    with explain_memory(remedy):
        if course.labeled is not None:
            calibration = _calibrate(course, task, network=network, protocol=protocol)
            task = replace(task, evidence=(course.labeled, calibration))
        labels = label_samples(
            unlabeled,
            task,
            _predictor(course, round_, network=network, protocol=protocol),
            files=LabelFiles(
                run.labels(index),
                histogram=course.path(round_, HISTOGRAM),
                alignment=course.path(round_, ALIGNMENT),
                logs=run.round(index),
                held_out=course.path(round_, HELD_OUT),
                confidences=run.confidences(index) if keeps_confidences(course.recipe) else None,
            ),
            processes=course.processes,
            progress=lambda title, total: journal.progress(f"round {index}: {title}", total),
            held_out=_held_out(course, round_, network=network, protocol=protocol),
        )
    outputs = ["labels", HISTOGRAM, THRESHOLDS, FACTS]
    if any(sample.label for sample in unlabeled):
        outputs.append(SCORES)
    if labeler is not None:
        outputs.append(LABELS_FROM)
    if keeps_confidences(course.recipe):
        outputs.append(run.confidences(index).name)
    # Records of runs that keep the last round stay as they were.
    facts = {"labeling_round": labeling_round} if labeler is None and labeling_round != index - 1 else {}
    return Work(outputs, lambda: _write(course, round_, labels, unlabeled=unlabeled, facts=facts))


def _calibrate(course: Course, task: LabelTask, *, network: Network, protocol: Protocol) -> Calibration:
    """How much more often classes occur than the network that labels predicts them, on validation images."""
    journal, index = course.journal, task.round_index
    return calibrate(
        choose_images(course.manifest.validation, task.seed),
        len(course.manifest.classes),
        network_predictor(network, protocol, task.scale),
        file=course.run.round(index) / CALIBRATION,
        inputs=task.inputs,
        processes=course.processes,
        progress=lambda title, total: journal.progress(f"round {index}: {title}", total),
        warn=lambda text: journal.warn(f"round {index}: {text}"),
    )


def _predictor(
    course: Course, round_: Round, *, network: Network, protocol: Protocol
) -> Predictor | ScoreSource:
    """The network's predictions, or its scores if decisions are aligned, and where they wait."""
    config, predictions = course.recipe.labeling, course.run.predictions(round_.index)
    scale, waits, read = SCALES[config.confidence], not config.predict_twice, course.decoded().load_image
    if config.normalized:
        return network_scores(network, protocol, scale, read=read)
    if config.align == "none":
        folder = predictions if waits else None
        return network_predictor(network, protocol, scale, folder=folder, read=read)
    return network_scores(
        network,
        protocol,
        scale,
        scores=course.path(round_, WAITING_SCORES) if waits else None,
        predictions=predictions,
        read=read,
    )


def _held_out(course: Course, round_: Round, *, network: Network, protocol: Protocol) -> HeldOut | None:
    """The labeled images whose precision decides how much is labeled, if any does."""
    if round_.labeling_ratio != "auto":
        return None
    config = course.recipe.labeling
    source = network_predictor if config.align == "none" else network_scores
    predictor = partial(source, protocol=protocol, scale=SCALES[config.confidence])

    def of_fold(number: int) -> Predictor | ScoreSource:
        return predictor(load_to_predict(fold_run(course.run, number).network(TRAINED_ROUND), plain=True))

    parts = [HeldOutPart(fold.held_out, partial(of_fold, fold.number)) for fold in course.folds]
    return HeldOut(
        parts or [HeldOutPart(course.manifest.validation, lambda: predictor(network))],
        len(parts),
        course.path(round_, HELD_OUT),
        warn=lambda text: course.journal.warn(f"round {round_.index}: {text}"),
    )


def _prepare(course: Course, round_: Round, unlabeled: Sequence[Sample]) -> None:
    """Remove what may be of another labeling, see that the disk has room, and say what is left out."""
    run, journal, index = course.run, course.journal, round_.index
    histogram, thresholds = course.path(round_, HISTOGRAM), course.path(round_, THRESHOLDS)
    another = _drop_predictions_of_another(course, round_)
    if thresholds.exists() or another:
        # All maps were written but not recorded; or the record was deleted, to label again.
        shutil.rmtree(run.labels(index), ignore_errors=True)
        shutil.rmtree(run.confidences(index), ignore_errors=True)
        histogram.unlink(missing_ok=True)
        course.path(round_, HELD_OUT).unlink(missing_ok=True)
        thresholds.unlink(missing_ok=True)
        run.drop_facts_logs(index)
    if (labeler := course.labelers.get(index)) is not None:
        # Written only now, so that a run killed earlier drops the same files again.
        write_json(course.path(round_, LABELS_FROM), labeler.to_json())
    if not histogram.exists():
        config, classes = course.recipe.labeling, len(course.manifest.classes)
        check_disk(
            run.root,
            count_pixels(unlabeled),
            config.at(round_.labeling_ratio),
            classes=classes,
            predict_twice=config.predict_twice,
            twice="set labeling.predict_twice=true",
        )
    total = len(course.manifest.unlabeled)
    report_excluded(journal, index, excluded=total - len(unlabeled), total=total)


def _drop_predictions_of_another(course: Course, round_: Round) -> bool:
    """Remove predictions that wait or were kept, unless the round's labeler made them.

    Returns whether there are any.
    """
    run, index, labeler = course.run, round_.index, course.labelers.get(round_.index)
    if labeler is None:
        return False
    path, now = course.path(round_, LABELS_FROM), labeler.to_json()
    try:
        before = read_labeler(path.parent)
    except RunError:  # the step is still to be done, so the file will be written again
        before = {}
    places = [course.path(round_, name) for name in (WAITING_SCORES, HISTOGRAM, HELD_OUT)]
    places.append(run.predictions(index))
    if before is None and not any(place.exists() for place in places):
        return False
    if before and all(before[name] == now[name] for name in ("sha256", "window")):
        return False
    what = (
        "has changed since labeling began"
        if before
        else f"may not be what labeled before ({path} is missing or damaged)"
    )
    course.journal.warn(f"round {index}: {labeler.source} {what}, so all images are labeled again")
    shutil.rmtree(run.predictions(index), ignore_errors=True)
    shutil.rmtree(course.path(round_, WAITING_SCORES), ignore_errors=True)
    course.path(round_, ALIGNMENT).unlink(missing_ok=True)
    return True


def _tidy(course: Course, round_: Round) -> None:
    index = round_.index
    course.run.drop_facts_logs(index)
    for name in (ALIGNMENT, HELD_OUT, CALIBRATION):
        course.path(round_, name).unlink(missing_ok=True)
    shutil.rmtree(course.path(round_, WAITING_SCORES), ignore_errors=True)
    if not course.recipe.labeling.keep_predictions:
        shutil.rmtree(course.run.predictions(index), ignore_errors=True)


def _write(
    course: Course,
    round_: Round,
    labels: PseudoLabelSet,
    *,
    unlabeled: Sequence[Sample],
    facts: Mapping[str, Any],
) -> Result:
    """Write how the label maps came about.

    Args:
        facts: more of them, for the record.
    """
    run, journal, index = course.run, course.journal, round_.index
    classes, histogram = course.manifest.classes, labels.histogram
    never = [
        name
        for name, predicted in zip(classes.names, labels.thresholds.predicted, strict=True)
        if predicted == 0
    ]
    if never:
        journal.warn(f"round {index}: {NEVER}: {', '.join(never)}")
    share = float(labels.kept.sum() / max(1, histogram.predicted.sum()))
    facts = {**facts, "share": round(share, 4)}
    known = [sample for sample in unlabeled if sample.label]
    if known:
        scores = pseudo_scores(known, labels, classes)
        truth = count_labels(masks(known), len(classes))
        described = scores.to_json(classes.names) | {"truth": truth.tolist()}
        write_json(course.path(round_, SCORES), described)
        facts["pixel_accuracy"] = round(scores.pixel_accuracy, 4) if scores.confusion.any() else None
    logs = read_facts_logs(run.facts_logs(index), len(classes))
    facts_of_images = {sample.id: logs[sample.id].to_json() for sample in unlabeled if sample.id in logs}
    write_whole(course.path(round_, FACTS), json.dumps(facts_of_images) + "\n")
    write_json(course.path(round_, THRESHOLDS), labels.to_json())
    expected = _say_precision(course, round_, labels, facts=facts)
    right = f"; {facts['pixel_accuracy']:.3f} of them are right" if facts.get("pixel_accuracy") else ""
    method, aligned = course.recipe.labeling.method, ""
    labeler = course.labelers.get(index)
    by = f", by the network of round {facts['labeling_round']}" if "labeling_round" in facts else ""
    by = by if labeler is None else f", by {labeler.source}"
    if labels.alignment is not None:
        facts["aligned"], aligned = labels.alignment.converged, " aligned decisions and"
        for warning in labels.alignment.warnings(classes.names):
            journal.warn(f"round {index}: {warning}")
    return Result(
        facts, f"{method}{aligned} labeled {facts['share']:.3f} of the unlabeled pixels{by}{expected}{right}"
    )


def _say_precision(course: Course, round_: Round, labels: PseudoLabelSet, *, facts: dict[str, Any]) -> str:
    """The end of the step's sentence; says which classes do not follow their own precision.

    Args:
        facts: of the step; gets the precision of all labels.
    """
    expected, names = labels.expected, course.manifest.classes.names
    if expected is None:
        return ""
    predicted = labels.thresholds.predicted > 0  # others have a warning of their own
    unshown = [name for name in expected.named("none", names) if predicted[names.index(name)]]
    if unshown:
        course.journal.warn(
            f"round {round_.index}: {UNSHOWN} (precision {expected.target:g}): {', '.join(unshown)}"
        )
    if few := [name for name in expected.named("all classes", names) if predicted[names.index(name)]]:
        course.journal.say(
            f"round {round_.index}: too few held-out images show these classes, so the precision of all classes together "
            f"decides: {', '.join(few)}"
        )
    share = expected.of_all(labels.kept)
    facts["expected_precision"] = None if share is None else round(share, 4)
    if expected.folds:
        facts["folds"] = expected.folds
    return "" if share is None else f", with expected precision {share:.3f}"


def pseudo_scores(samples: Sequence[Sample], labels: PseudoLabelSet, classes: ClassSet) -> Scores:
    """Scores of pseudo labels against truth that happens to be known: measured, never used."""
    scores = Scores.empty(len(classes))
    for (_, truth), sample in zip(masks(samples), labels.samples(samples), strict=True):
        assert sample.label is not None
        scores = scores.plus(truth, read_label(sample.label))
    return scores
