"""What a run folder says, as plain values: rounds, curves, remarks, and its data if it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.classes import ClassSet
from darseg.data.files import raise_if_unreadable, read_text
from darseg.data.manifest import Manifest
from darseg.errors import DarsegError, DataError, RunError, printable
from darseg.pseudo.distribution import count_each
from darseg.pseudo.labeled_shares import LabeledShares, labeled_shares
from darseg.pseudo.labeling import Ratio
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.report.curve import Curve, curve_of
from darseg.report.result import AlignedFacts
from darseg.run.basis import labeling_round, trained_from
from darseg.run.best import Standing, describe_result, standings_of
from darseg.run.build import check_overrides, classes_of, manifest_of, masks, recipe_of
from darseg.run.data_digest import digest_manifest, stranger
from darseg.run.directory import RunDirectory
from darseg.run.folds import fold_records
from darseg.run.journal import ABSENT, NEVER, UNSHOWN, Journal, in_current_words
from darseg.run.labelers import read_labeler
from darseg.run.marks import read_excluded
from darseg.run.records import read_object, read_plain, read_texts
from darseg.training.scores import Scores

STEPS = ("classify", "label", "train", "align", "evaluate")
"""The steps of a round in their order; only the first round of a run can have the first."""

WORSE = 0.02  # IoU that a class may lose from one round to the next without a remark

LONGEST_PROTOCOL = 300  # characters


@dataclass(frozen=True, eq=False)
class RoundFacts:
    """One round as far as it is done; fields of what is not done yet are None.

    Attributes:
        labels: its pseudo labels.
        pseudo: scores of the pseudo labels, if the truth of the unlabeled images is known.
        truth: int64 [K], pixels of each class in that truth.
        left_out: number of unlabeled images that were marked as bad when the round started.
        steps: number of training steps.
        scores: on the validation images.
        aligned: what is known of its aligned decisions; None if the run aligns nothing.
        protocol: how these were predicted.
        labeling_round: the round whose network labeled, if the run's own did.
        trained_from: the round whose network it went on from; None: a network began there, or it is not trained.
        labeler: path, architecture and backbone of the network that labeled, if it is none of the run's.
        seconds: step (see `STEPS`) → how long it took; "cross-fit": the training of all networks on folds of the labeled
            images, in the round before which they are trained.
    """

    index: int
    labeling_ratio: Ratio | None
    labels: PseudoLabelSet | None
    pseudo: Scores | None
    truth: NDArray[np.int64] | None
    left_out: int
    steps: int | None
    scores: Scores | None
    protocol: str | None
    seconds: Mapping[str, float]
    curve: Curve
    aligned: AlignedFacts | None = None
    labeling_round: int = 0
    trained_from: int | None = None
    labeler: Mapping[str, Any] | None = None

    @property
    def scored(self) -> bool:
        """Whether there are scores of at least one pixel."""
        return self.scores is not None and bool(self.scores.confusion.any())

    @property
    def iou(self) -> NDArray[np.float64]:
        """float64 [K]: IoU of every class of a scored round; NaN if undefined."""
        assert self.scores is not None
        return self.scores.iou


@dataclass(frozen=True, eq=False)
class RunFacts:
    """A run folder.

    Attributes:
        recipe: with the place of the data as it is now.
        rounds: those that have started.
        planned: number of rounds in the recipe.
        data: role → digest of its samples.
        started: seconds since 1970; None if the journal does not say.
        weights: where the initial weights came from.
        standings: how the scored rounds compare with the best before each.
        warnings: those in the journal, in this version's words, without repetitions, in order.
        shared: whether the page is for others, and so names no places of this machine (see `shareable`).
    """

    root: Path
    recipe: Recipe
    recipe_text: str
    method: str
    seed: int
    classes: ClassSet
    rounds: tuple[RoundFacts, ...]
    planned: int
    environment: Mapping[str, Any]
    data: Mapping[str, str]
    started: float | None
    weights: str | None
    finished: bool
    standings: tuple[Standing, ...]
    warnings: tuple[str, ...]
    shared: bool = False

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def scored(self) -> tuple[RoundFacts, ...]:
        """The rounds with scores."""
        return tuple(round_ for round_ in self.rounds if round_.scored)

    @property
    def keeps_best(self) -> bool:
        """Whether the best round is the result, and not the last."""
        return self.recipe.result.keep == "best"

    @property
    def result(self) -> RoundFacts:
        """The round that is the result so far, of a run with a scored round."""
        best = self.standings[-1].best if self.keeps_best and self.standings else None
        return next((round_ for round_ in self.scored if round_.index == best), self.scored[-1])

    @property
    def chosen(self) -> str:
        """Sentences about which round is the result; empty if there is nothing to say."""
        if len(self.standings) < 2:
            return ""
        return describe_result(self.standings, keep=self.recipe.result.keep, finished=self.finished)

    def before(self, round_: RoundFacts) -> RoundFacts | None:
        """The scored round that a scored round is compared with; None if there is none.

        That is the scored round before. If networks take turns, it is the round whose network the round went on from.
        """
        scored = self.scored
        if self.recipe.takes_turns:
            return next((entry for entry in scored if entry.index == round_.trained_from), None)
        at = scored.index(round_)
        return scored[at - 1] if at else None

    @property
    def labeled(self) -> tuple[RoundFacts, ...]:
        """The rounds with pseudo labels."""
        return tuple(round_ for round_ in self.rounds if round_.labels is not None)

    @property
    def seconds(self) -> float:
        """Seconds of all steps of all rounds."""
        return sum(sum(round_.seconds.values()) for round_ in self.rounds)


@dataclass(frozen=True, eq=False)
class DataFacts:
    """The data set of a run as it is now.

    Attributes:
        manifest: None if the data cannot be read.
        counts: int64 [K], pixels of each class in the labeled masks; None if the data cannot be read.
        fault: why the data cannot be read.
        stranger: why nothing of it may be shown; empty if these are the images that the run began with.
        labeled: the class shares of the labeled masks with their intervals; None if the data cannot be read.
    """

    manifest: Manifest | None
    counts: NDArray[np.int64] | None
    fault: str | None = None
    stranger: str = ""
    labeled: LabeledShares | None = None


@dataclass(frozen=True)
class Remark:
    """Something that a reader should not overlook. worse: scores went down; otherwise it is a warning."""

    text: str
    worse: bool = False


def read_run(root: Path | str, overrides: Sequence[str] = ()) -> RunFacts:
    """Read a run folder, finished or in progress.

    Args:
        overrides: "data.root=PATH", if the run's data were moved.

    Raises RunError if it is none or damaged, StorageError if links lead out of it.
    """
    check_overrides(root, overrides)
    run = RunDirectory(root)
    run.refuse_links()
    recipe = recipe_of(root, overrides)
    classes = classes_of(recipe)
    journal = Journal(run.journal, None, Console(quiet=True))
    steps = journal.events("step")
    precision = "bf16" if recipe.training.precision == "bf16" else "fp32"
    rounds = [
        _read_round(run, index, round_.labeling_ratio, events=steps, precision=precision, names=classes.names)
        for index, round_ in enumerate(recipe.rounds)
    ]
    if recipe.follows_precision and (folds := fold_records(run)):
        place, spent = recipe.follows_precision[0], sum(record.seconds for record in folds)
        rounds[place] = replace(rounds[place], seconds={"cross-fit": spent, **rounds[place].seconds})
    started = [*journal.events("started"), {}][0]
    return RunFacts(
        root=Path(root),
        recipe=recipe,
        recipe_text=read_text(run.recipe),
        method=recipe.labeling.method,
        seed=recipe.seed,
        classes=replace(classes, names=tuple(map(printable, classes.names))),  # charts take them as they are
        rounds=tuple(round_ for round_ in rounds if round_.seconds or len(round_.curve.steps)),
        planned=len(rounds),
        environment=_texts(run.environment, read_plain),
        data=_texts(run.data, read_texts),
        started=started.get("time"),
        weights=str(started["weights"]) if "weights" in started else None,
        finished="evaluate" in rounds[-1].seconds,
        standings=standings_of(run, recipe.seed),
        warnings=tuple(
            dict.fromkeys(in_current_words(str(event.get("text"))) for event in journal.events("warning"))
        ),
    )


def _read_round(
    run: RunDirectory,
    index: int,
    labeling_ratio: Ratio | None,
    *,
    events: Sequence[dict],
    precision: str,
    names: Sequence[str],
) -> RoundFacts:
    folder = run.round(index)
    records = {step: run.read_record(index, step) for step in STEPS}
    done = {step: record for step, record in records.items() if record is not None}
    labels = pseudo = truth = scores = aligned = protocol = None
    try:
        if "label" in done:
            labels = run.label_set(index)
            if len(labels.kept) != len(names):
                raise ValueError(f"thresholds of {len(labels.kept)} classes instead of {len(names)}")
            measured = _read(folder / "pseudo_scores.json")
            if measured is not None:
                pseudo, truth = (
                    run.scores(index, len(names), "pseudo_scores.json"),
                    np.array(measured["truth"]),
                )
                if truth.shape != (len(names),) or truth.dtype != np.int64:
                    raise ValueError(f"'truth' in pseudo_scores.json must be {len(names)} counts of pixels")
        if "evaluate" in done:
            scores, content = run.scores(index, len(names)), _read(folder / "scores.json") or {}
            aligned = AlignedFacts.read(content, names)
            protocol = str(content.get("protocol") or "")[:LONGEST_PROTOCOL] or None
            if protocol and not protocol.endswith(("fp32", "bf16")):
                protocol += f", {precision}"  # version 0.2 did not name it
    except (OSError, ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        raise_if_unreadable(error, folder)
        raise RunError(
            f"{folder}: results of a finished step are damaged or missing ({type(error).__name__}: {error}). "
            "Restore them; or delete the step's record (label.json, train.json, evaluate.json) and all later rounds, "
            "then run the same `darseg train` command again."
        ) from error
    return RoundFacts(
        index=index,
        labeling_ratio=labeling_ratio,
        labels=labels,
        pseudo=pseudo,
        truth=truth,
        left_out=len(read_excluded(run, index)),
        steps=done["train"].steps if "train" in done else None,
        scores=scores,
        aligned=aligned,
        protocol=protocol,
        seconds={step: record.seconds for step, record in done.items()},
        curve=curve_of([event for event in events if event.get("round") == index], classes=len(names)),
        labeling_round=labeling_round(run, index),
        trained_from=trained_from(run, index),
        labeler=read_labeler(folder) if "label" in done else None,
    )


def _read(path: Path) -> Any:
    """A JSON object; None if there is no such file. Raises RunError if it is damaged."""
    try:
        return read_object(path, "Restore it from a copy.")
    except FileNotFoundError:
        return None


def _texts(path: Path, read: Callable[[Path, str], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Texts and numbers in a file of a run; empty if there is none. Raises RunError if it is damaged."""
    try:
        return read(path, "Restore it from a copy.")
    except FileNotFoundError:
        return {}


def read_data(facts: RunFacts) -> DataFacts:
    """Find a run's data and count its labeled masks. Data that are gone are not an error."""
    try:
        manifest = manifest_of(facts.recipe)
        each = count_each(masks(manifest.labeled), len(facts.classes))
        changed = [
            role for role, digest in digest_manifest(manifest).items() if facts.data.get(role) != digest
        ]
    except DarsegError as error:
        return DataFacts(None, None, headline(error))
    return DataFacts(
        manifest,
        each.sum(axis=0),
        stranger=stranger(facts.recipe.data.root, changed, "report"),
        labeled=labeled_shares(each) if each.any() else None,
    )


def headline(error: DarsegError) -> str:
    """What a page says of an error: no list of faults, which may quote any file that a recipe names."""
    first, _, more = str(error).partition("\n")
    return f"{first.removesuffix(':')}. darseg check lists the faults." if more else first


def remarks(facts: RunFacts, data: DataFacts) -> list[Remark]:
    """Rounds that made scores worse, classes that vanished, and the run's own warnings.

    If the journal and the files say the same, it is listed once.
    """
    names = facts.classes.names
    listed: list[Remark] = []
    scored = {round_.index: round_ for round_ in facts.scored}
    best = facts.keeps_best and not facts.recipe.takes_turns
    against = {standing.index: standing.against for standing in facts.standings if best}
    for after in facts.scored:
        if before := scored.get(against.get(after.index), facts.before(after)):
            listed += _losses(before, after, names)
    if data.counts is not None and (absent := _named(names, data.counts == 0)):
        listed.append(Remark(f"{ABSENT}: {absent}"))
    for round_ in facts.labeled:
        assert round_.labels is not None
        predicted, kept = round_.labels.thresholds.predicted, round_.labels.kept
        if never := _named(names, predicted == 0):
            listed.append(Remark(f"round {round_.index}: {NEVER}: {never}"))
        unshown = predicted < 0  # none
        if (expected := round_.labels.expected) is not None:
            unshown = np.array([basis == "none" for basis in expected.basis]) & (predicted > 0)
            if text := _named(names, unshown):
                target = f"precision {expected.target:g}"
                listed.append(Remark(f"round {round_.index}: {UNSHOWN} ({target}): {text}"))
        if vanished := _named(names, (predicted > 0) & (kept == 0) & ~unshown):
            listed.append(Remark(f"round {round_.index}: predicted, but no pixel was kept: {vanished}"))
    if facts.scored:
        result = facts.result
        if zero := _named(names, result.iou == 0):
            listed.append(Remark(f"IoU 0 after round {result.index}: {zero}"))
    # For what was never predicted the files count: a round may have been repeated since the journal's warning.
    listed += [
        Remark(text) for text in facts.warnings if f": {NEVER}: " not in text and f": {UNSHOWN} (" not in text
    ]
    return list({remark.text: remark for remark in listed}.values())


def _losses(before: RoundFacts, after: RoundFacts, names: Sequence[str]) -> list[Remark]:
    assert before.scores is not None and after.scores is not None
    listed, change = [], after.iou - before.iou
    old, new = before.scores.mean_iou, after.scores.mean_iou
    if new < old:
        listed.append(Remark(f"round {after.index} lowered mean IoU: {old:.4f} → {new:.4f}", True))
    if lost := sorted(np.flatnonzero(change < -WORSE), key=lambda k: change[k]):
        text = ", ".join(f"{names[k]} {before.iou[k]:.3f} → {after.iou[k]:.3f}" for k in lost)
        listed.append(
            Remark(f"round {after.index} lowered the IoU of classes by more than {WORSE}: {text}", True)
        )
    return listed


def _named(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen)
