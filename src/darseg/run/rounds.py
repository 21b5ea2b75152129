"""The whole run, round by round: label, train, align, evaluate. What is done is skipped."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.config.text import as_begun, dump_recipe, load_saved_recipe, recipe_differences
from darseg.data.examine import Findings, reading_notes
from darseg.data.manifest import Manifest, Sample
from darseg.data.maps import check_names
from darseg.errors import DataError, Interrupted, NumericsError, RunError, StorageError, faults
from darseg.model.image_classes import ImageClassifier
from darseg.model.network import Network
from darseg.run.basis import basis_of
from darseg.run.begin import FREE_KEYS, announce
from darseg.run.best import BEST, Standing, describe_result, standings_of, write_best
from darseg.run.build import (
    as_recipe,
    build_networks,
    manifest_of,
    place,
    set_threads,
)
from darseg.run.check import read_all
from darseg.run.course import Course
from darseg.run.data_digest import digest_manifest
from darseg.run.directory import (
    RecipeChanges,
    RunDirectory,
    StepRecord,
    check_format,
    digest_path,
    open_run,
    write_json,
)
from darseg.run.folds import check_folds, folds_of
from darseg.run.image_classes import ClassifierPlan, initial_classifier, plan_classifier
from darseg.run.journal import Journal
from darseg.run.labelers import Labeler, labelers_of
from darseg.run.machines import check_alike
from darseg.run.marks import read_excluded, read_marks
from darseg.run.plan import Round, plan_training
from darseg.run.rehearse import rehearse
from darseg.run.remedies import ALONE, explain_memory
from darseg.run.reuse import Judgment, judge_contents
from darseg.run.settings import digest_state
from darseg.run.signals import catch_signals
from darseg.run.steps.align import align_round
from darseg.run.steps.classify import train_image_classes
from darseg.run.steps.cross_fit import train_folds
from darseg.run.steps.evaluate import evaluate_round
from darseg.run.steps.label import label_round
from darseg.run.steps.train import train_round
from darseg.run.target import Counted, check_prior, count_labeled
from darseg.training.processes import Processes

SCORED = ("mean_iou", "iou", "mean_accuracy", "pixel_accuracy")
"""Figures of the summary, among those of scores.json."""


_Begun = tuple[Counted, bool, RecipeChanges, Judgment]


def train(
    recipe: Recipe | Path | str,
    out: Path | str,
    reuse: Path | str | None = None,
    console: Console | None = None,
    after_round: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Run all rounds of a recipe in the folder `out`, or go on where an earlier call stopped.

    Args:
        reuse: another run folder; steps that it finished with the same inputs are copied (round 0 is the same for all
            labeling methods, for example).
        after_round: called with the run folder after each round that was worked on, and after the last, by the first
            process; its time is not counted. Meant for `darseg.write_report`: if it fails, the run goes on with a
            warning.

    Returns the content of `summary.json`. Raises DarsegError, also for a run folder begun with another recipe.
    """
    processes, reused, run = Processes.here(), _reused(reuse), RunDirectory(out)
    console, warnings = console or Console(quiet=not processes.first), list[str]()
    recipe = processes.together(lambda: _as_begun(as_recipe(recipe), run))
    set_threads(recipe.threads)
    manifest = processes.together(lambda: manifest_of(recipe))
    data = _data_alike(processes, recipe, manifest=manifest)
    planned = processes.together(lambda: _plan(recipe, manifest, run.root, processes=processes.count))

    def begin(stack: contextlib.ExitStack) -> _Begun:
        check_names(run.labels(len(recipe.rounds) - 1), [sample.id for sample in manifest.unlabeled])
        largest = None if run.recipe.exists() else _check_data(manifest, console, warnings).largest
        counted = count_labeled(recipe, manifest, warnings)
        _rehearse(recipe, planned, largest, manifest=manifest, run=run, counts=counted[0])
        text, compare = dump_recipe(recipe), lambda saved: changes_of(load_saved_recipe(saved), recipe)
        changes = open_run(run, recipe_text=text, data=data, compare=compare)
        locked = stack.enter_context(run.held())
        return counted, locked, changes, judge_contents(run, reused, manifest, data=data)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(catch_signals())
        (counts, labeled, folds), locked, changes, judged = processes.from_first(lambda: begin(stack))
        course = Course(
            recipe=recipe,
            run=run,
            manifest=manifest,
            data=data,
            counts=counts,
            rounds=planned.rounds,
            reuse=reused,
            journal=stack.enter_context(_journal(run, processes, console)),
            processes=processes,
            stop=stop,
            after_round=after_round,
            judged=judged,
            labelers=planned.labelers,
            labeled=labeled,
            folds=folds_of(manifest.labeled, folds),
        )
        with _ending(course):
            announce(course, planned.sources, locked=locked, changes=changes)
            _warn(course.journal, warnings)
            return run_rounds(course, planned.networks, _classify(course, planned))


@contextlib.contextmanager
def _journal(run: RunDirectory, processes: Processes, console: Console) -> Generator[Journal]:
    """The run's journal; that of a process other than the first writes nothing."""
    paths = (run.journal, run.tensorboard) if processes.first else (None, None)
    journal = Journal(*paths, console)
    try:
        yield journal
    finally:
        journal.close()


def _classify(course: Course, planned: _Planned) -> list[StepRecord]:
    """The record of the step that trains the classifier of whole images, if there is one."""
    return [] if planned.classifier is None else [train_image_classes(course, *planned.classifier)]


def run_rounds(
    course: Course, networks: dict[int, Network], before_rounds: Sequence[StepRecord] = ()
) -> dict[str, Any]:
    """All rounds: label, train, align, evaluate. All processes together; the first writes.

    Args:
        networks: round → the network that begins there; taken out when no later round trains it.
        before_rounds: steps that the first round's time includes.
    """
    run, names, processes = course.run, course.manifest.classes.names, course.processes
    summary: dict = {"classes": list(names), "rounds": []}
    worked, listed, initial = False, (), copy.deepcopy(networks[0]) if course.folds else None
    before_training = {begins: digest_state(network.state_dict()) for begins, network in networks.items()}
    network = None
    for round_ in course.rounds:
        was_done = run.record_path(round_.index, "evaluate").exists()
        worked |= not was_done
        records, pseudo = [] if round_.index else [*before_rounds], ()
        basis = processes.from_first(lambda at=round_.index: basis_of(run, course.recipe, at))
        if round_.labels:
            records += train_folds(course, round_, initial, network=network)
            pseudo, record = label_round(course, round_, basis.labels)
            records.append(record)
        network = _exchange(network, networks[round_.begins])
        if (before := before_training.get(round_.index)) is None:
            before = processes.from_first(lambda at=basis.weights: digest_path(run.network(at)))
        records.append(
            train_round(course, round_, before, pseudo=pseudo, network=network, goes_on_from=basis.weights)
        )
        course.stop.check()  # a signal may have come in the last step
        candidates, record = align_round(course, round_)
        if record is not None:
            records.append(record)
            course.stop.check()
        described, record = evaluate_round(course, round_, candidates)
        records.append(record)
        summary["rounds"].append(_summed_up(round_, described, records))
        listed, compared, result = processes.from_first(partial(_compare, course, round_, was_done=was_done))
        summary["rounds"][-1] |= compared
        summary.update(result)
        processes.from_first(lambda: write_json(run.summary, summary))
        _drop_unneeded(networks, course.rounds[round_.index + 1 :])
        if processes.first and not (was_done and round_ is not course.rounds[-1]):
            _call_after_round(course, round_)
    if processes.first and not worked:
        _say_finished(course)
    if said := describe_result(listed, keep=course.recipe.result.keep, finished=True):
        course.journal.say(said)
    course.journal.event("finished")
    return summary


def _exchange(before: Network | None, network: Network) -> Network:
    """Put a round's network in its place, and another one of the round before into main memory."""
    if before is not network:
        if before is not None:
            before.cpu()  # a GPU need not hold both
        with explain_memory(ALONE):
            place(network)
    return network


def _drop_unneeded(networks: dict[int, Network], later: Sequence[Round]) -> None:
    """Let go of the networks that no later round trains."""
    for begins in set(networks) - {round_.begins for round_ in later}:
        del networks[begins]


def _compare(
    course: Course, round_: Round, *, was_done: bool
) -> tuple[tuple[Standing, ...], dict[str, Any], dict[str, Any]]:
    """Compare the rounds so far, and keep the best if the recipe says so; done by the first process.

    Args:
        was_done: whether an earlier call evaluated this round.

    Returns:
        the standings; what the summary gets about how the round compares; and about the result, if it is the best round.
    """
    run, journal, recipe = course.run, course.journal, course.recipe
    compared, result = dict[str, Any](), dict[str, Any]()
    listed = standings_of(run, recipe.seed)
    if (standing := next(entry for entry in listed if entry.index == round_.index)).difference is not None:
        described = {
            key: value for key, value in standing.to_json().items() if key not in ("round", "mean_iou")
        }
        compared["compared"] = described
        # A call that was stopped between scores and this left it to the next one.
        noted = {event.get("round") for event in journal.events("compared")}
        left = listed[-1] is standing and round_.index not in noted and not journal.events("finished")
        if not was_done or left:
            journal.event("compared", **standing.to_json())
            journal.say(f"round {round_.index}: {standing.describe()}")
    # If later rounds are scored already, what is there is of all of them.
    if recipe.result.keep == "best" and listed[-1] is standing:
        best = write_best(run, recipe, listed)
        result["result"] = {"round": best["round"], "weights": BEST, "why": best["why"]}
    return listed, compared, result


def _summed_up(round_: Round, described: Mapping[str, Any], records: Sequence[StepRecord]) -> dict[str, Any]:
    """What the summary says about a round whose scores are described."""
    return {
        "round": round_.index,
        "labeling_ratio": round_.labeling_ratio,
        **{key: described[key] for key in SCORED},
        **_aligned(described),
        "steps": round_.steps,
        "seconds": round(sum(record.seconds for record in records), 1),
    }


def _aligned(described: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says about a round's aligned decisions; nothing if the recipe has them off."""
    if "aligned" not in described:
        return {}
    aligned = described["aligned"]
    return {"aligned": {key: aligned[key] for key in ("used", "why", *SCORED) if key in aligned}}


def _as_begun(recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe as the run was begun with, if it says nothing of the result; see `as_begun`."""
    if not run.recipe.is_file():
        return recipe
    check_format(run)
    return as_begun(recipe, load_saved_recipe(run.recipe))


@dataclass(frozen=True)
class _Planned:
    """What a run has before its first step.

    Attributes:
        networks: round → the network that begins there, prepared for training.
        sources: round → where that network's weights come from.
        labelers: round → the network that labels there, if it is not that of the round before.
        classifier: of whole images, and how it is trained.
    """

    rounds: list[Round]
    networks: dict[int, Network]
    sources: Mapping[int, str]
    labelers: Mapping[int, Labeler]
    classifier: tuple[ClassifierPlan, ImageClassifier] | None


def _plan(recipe: Recipe, manifest: Manifest, out: Path, *, processes: int) -> _Planned:
    """The rounds, their networks, prepared, and labelers. Raises RecipeError, SizeError, RunError."""
    check_folds(recipe, manifest)
    check_prior(recipe, manifest)
    begun = build_networks(recipe)
    networks = {index: network for index, (network, _) in begun.items()}
    labeled, unlabeled = len(manifest.labeled), len(manifest.unlabeled)
    rounds = plan_training(
        recipe,
        networks,
        labeled=labeled,
        unlabeled=unlabeled,
        validation=len(manifest.validation),
        processes=processes,
    )
    sources = {index: source for index, (_, source) in begun.items()}
    of_images = plan_classifier(recipe, manifest, processes)
    classifier = None if of_images is None else (of_images, initial_classifier(recipe)[0])
    return _Planned(rounds, networks, sources, labelers=labelers_of(recipe, out), classifier=classifier)


def _data_alike(processes: Processes, recipe: Recipe, *, manifest: Manifest) -> dict[str, str]:
    """Role → digest of its samples.

    Raises RunError in all processes if their recipes or data differ; paths may, see `FREE_KEYS`.
    """
    data = digest_manifest(manifest)
    binding = changes_of(processes.from_first(lambda: recipe), recipe).binding
    changed = sorted({line.split(":")[0] for line in binding})
    # The line that differs names the keys; the first process has none.
    check_alike(
        processes,
        {"the recipe": " ".join(changed)} | {f"the {role} images and labels": data[role] for role in data},
    )
    return data


def _rehearse(recipe: Recipe, planned: _Planned, largest: Mapping[str, Sample] | None, **data: Any) -> None:
    """`rehearse` with all networks of a run; not if it has begun already, so that `largest` is None."""
    if largest is not None:
        rehearse(recipe, planned.networks, labelers=planned.labelers, largest=largest, **data)


def _reused(folder: Path | str | None) -> RunDirectory | None:
    """The run folder whose steps may be copied. Raises RunError if there is none at that place."""
    if folder is None:
        return None
    if not RunDirectory(folder).recipe.is_file():
        raise RunError(
            f"{folder} is not a run folder: it has no recipe.yaml. Give --reuse a folder that `darseg train` wrote to."
        )
    return RunDirectory(folder)


def _warn(journal: Journal, lines: list[str]) -> None:
    for line in lines:
        journal.warn(line)


def _check_data(manifest: Manifest, console: Console, warnings: list[str]) -> Findings:
    """Read every image and label map. Raises DataError with all faults.

    Args:
        warnings: gets the lines about the data that a run does not report by itself.
    """
    findings = read_all(manifest, console)
    if findings.faults:
        raise DataError(
            faults(f"The data have {len(findings.faults)} fault(s), so nothing was begun", findings.faults)
        )
    known = {*findings.of_roles, *findings.pictures, *reading_notes(manifest)}
    warnings += [line for line in (*findings.warnings, *findings.notes) if line not in known]
    return findings


def changes_of(before: Recipe, now: Recipe) -> RecipeChanges:
    """What differs between two recipes of a run."""
    lines = recipe_differences(before, now)
    keys = (*FREE_KEYS, *_moved_files(before, now))
    free = tuple(line for line in lines if line.split(":")[0] in keys)
    return RecipeChanges(tuple(line for line in lines if line not in free), free)


def _moved_files(before: Recipe, now: Recipe) -> list[str]:
    """Keys of weights and labelers that moved; the steps' records hold what was in them."""
    keys, named_now = [], _files_of(now)
    for key, old in _files_of(before).items():
        new = named_now.get(key)
        if not (isinstance(old, str) and isinstance(new, str)) or "none" in (old, new):
            continue
        if Path(old).name == Path(new).name and not Path(old).exists():
            keys.append(key)
    return keys


def _files_of(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that name weights or labelers → their values."""
    values: dict[str, Any] = {"network.weights": recipe.network.weights}
    values["image_classes.weights"] = recipe.image_classes and recipe.image_classes.weights
    for index, config in enumerate(recipe.rounds):
        values[f"rounds.{index}.network.weights"] = config.network and config.network.weights
        values[f"rounds.{index}.labels_from"] = config.labels_from
    return values


@contextlib.contextmanager
def _ending(course: Course):
    """Note in the journal why a run stops, and end the other processes if all have met the same error."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(StorageError):  # a full disk must not hide why the run stopped
            course.journal.event("stopped", reason=f"{type(error).__name__}: {error}")
        if isinstance(error, Interrupted) and course.stop.asked:
            error.code = course.stop.exit_code
        if not course.processes.first and isinstance(error, (Interrupted, NumericsError)):
            course.processes.leave(error)  # the first process reports it
        raise


def _say_finished(course: Course) -> None:
    """Say that nothing was left to do, and which marks came too late for the rounds."""
    run, last = course.run, course.rounds[-1].index
    course.journal.say("All rounds are finished already: nothing was done.")
    marks = read_marks(run, {sample.id for sample in course.manifest.unlabeled})
    late = set(marks) - set(read_excluded(run, last))
    if late and course.rounds[-1].labels:
        course.journal.say(
            f"{len(late)} image(s) are marked as bad, but round {last} did not leave them out. To repeat that round, "
            f"delete {run.round(last)} and run the same command again."
        )


def _call_after_round(course: Course, round_: Round) -> None:
    """Call `after_round`; hours of training do not end because a page could not be written."""
    if course.after_round is None:
        return
    began = time.monotonic()
    try:
        course.after_round(course.run.root)
    except Exception as error:  # any
        course.journal.warn(f"the report could not be written: {type(error).__name__}: {error}")
    else:
        course.journal.say(f"round {round_.index}: report ({time.monotonic() - began:.1f} s)")
