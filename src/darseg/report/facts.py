"""What a run folder says, as plain values: rounds, curves, remarks; and the data beside it, where it is still there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from darseg.data.classes import ClassSet
from darseg.data.manifest import Manifest
from darseg.errors import DarsegError, DataError, RunError
from darseg.pseudo.distribution import count_labels
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.run.build import classes_of, manifest_of, masks, recipe_of
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal
from darseg.run.marks import read_excluded
from darseg.training.scores import Scores

WORSE = 0.02  # IoU that a class loses from one round to the next before it is remarked on

NEVER = "never predicted, so not pseudo-labeled"

LOSSES = ("loss_labeled", "loss_pseudo")


@dataclass(frozen=True, eq=False)
class Curve:
    """What the journal noted of a round's steps. `steps` count from the round's first; undefined figures are NaN.

    steps: int64 [N], rising.
    figures: name → float64 [N]; "learning_rate" and those of LOSSES that the round has.
    """

    steps: NDArray[np.int64]
    figures: Mapping[str, NDArray[np.float64]]

    def __post_init__(self) -> None:
        if any(len(values) != len(self.steps) for values in self.figures.values()):
            raise ValueError("A curve has a figure for every step.")


@dataclass(frozen=True, eq=False)
class RoundFacts:
    """One round, as far as it is done; None for what is not.

    Attributes:
        labels: its pseudo labels; pseudo: those against the truth of the unlabeled images, where that is known.
        truth: int64 [K], pixels of each class in that truth.
        left_out: unlabeled images marked as bad when it began.
        steps: of training; scores: on the validation images; protocol: how these were predicted.
        seconds: step ("label", "train", "evaluate") → how long it took.
    """

    index: int
    labeling_ratio: float | None
    labels: PseudoLabelSet | None
    pseudo: Scores | None
    truth: NDArray[np.int64] | None
    left_out: int
    steps: int | None
    scores: Scores | None
    protocol: str | None
    seconds: Mapping[str, float]
    curve: Curve

    @property
    def scored(self) -> bool:
        """Whether there are scores, of at least one pixel."""
        return self.scores is not None and bool(self.scores.confusion.any())


@dataclass(frozen=True, eq=False)
class RunFacts:
    """A run folder. `rounds` are those that were begun, `planned` is how many the recipe has.

    Attributes:
        data: role → digest of its samples; began: seconds since 1970, None where the journal does not say.
        warned: the journal's warnings, each once, in order.
    """

    root: Path
    recipe_text: str
    method: str
    seed: int
    classes: ClassSet
    rounds: tuple[RoundFacts, ...]
    planned: int
    environment: Mapping[str, Any]
    data: Mapping[str, str]
    began: float | None
    weights: str | None
    finished: bool
    warned: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def scored(self) -> tuple[RoundFacts, ...]:
        """The rounds with scores."""
        return tuple(one for one in self.rounds if one.scored)

    @property
    def labeled(self) -> tuple[RoundFacts, ...]:
        """The rounds with pseudo labels."""
        return tuple(one for one in self.rounds if one.labels is not None)

    @property
    def seconds(self) -> float:
        return sum(sum(one.seconds.values()) for one in self.rounds)


@dataclass(frozen=True, eq=False)
class DataFacts:
    """The data set of a run as it is found now; where it is not, `fault` says why and the rest is None.

    counts: int64 [K], pixels of each class in the labeled masks.
    """

    manifest: Manifest | None
    counts: NDArray[np.int64] | None
    fault: str | None = None


@dataclass(frozen=True)
class Remark:
    """Something to look at. `worse`: scores went down; otherwise a warning."""

    text: str
    worse: bool = False


def read_run(root: Path | str) -> RunFacts:
    """Read a run folder, finished or at work. Raises RunError where it is none, or damaged."""
    run = RunDirectory(root)
    recipe = recipe_of(root)
    classes = classes_of(recipe)
    journal = Journal(run.journal, None, Console(quiet=True))
    steps = journal.events("step")
    ratios = [one.labeling_ratio for one in recipe.rounds]
    rounds = [_read_round(run, index, ratio, steps) for index, ratio in enumerate(ratios)]
    started = [*journal.events("started"), {}][0]
    return RunFacts(
        root=Path(root),
        recipe_text=run.recipe.read_text(encoding="utf-8"),
        method=recipe.labeling.method,
        seed=recipe.seed,
        classes=classes,
        rounds=tuple(one for one in rounds if one.seconds or len(one.curve.steps)),
        planned=len(rounds),
        environment=_read(run.environment) or {},
        data=_read(run.data) or {},
        began=started.get("time"),
        weights=started.get("weights"),
        finished="evaluate" in rounds[-1].seconds,
        warned=tuple(dict.fromkeys(str(one.get("text")) for one in journal.events("warning"))),
    )


def _read_round(run: RunDirectory, index: int, ratio: float | None, events: Sequence[dict]) -> RoundFacts:
    folder = run.round(index)
    records = {step: run.read_record(index, step) for step in ("label", "train", "evaluate")}
    done = {step: record for step, record in records.items() if record is not None}
    labels = pseudo = truth = scores = protocol = None
    try:
        if "label" in done:
            labels = run.label_set(index)
            measured = _read(folder / "pseudo_scores.json")
            if measured is not None:
                pseudo, truth = Scores.from_json(measured), np.array(measured["truth"], np.int64)
        if "evaluate" in done:
            measured = _read(folder / "scores.json") or {}
            scores, protocol = Scores.from_json(measured), measured.get("protocol")
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        raise RunError(
            f"{folder}: results of a finished step are damaged or were removed ({type(error).__name__}: {error}). "
            "Restore them, or delete the step's record (label.json, train.json, evaluate.json), all later rounds, and "
            "run the same `darseg train` again."
        ) from error
    return RoundFacts(
        index=index,
        labeling_ratio=ratio,
        labels=labels,
        pseudo=pseudo,
        truth=truth,
        left_out=len(read_excluded(run, index)),
        steps=done["train"].facts.get("steps") if "train" in done else None,
        scores=scores,
        protocol=protocol,
        seconds={step: record.seconds for step, record in done.items()},
        curve=_curve([one for one in events if one.get("round") == index]),
    )


def _curve(events: Sequence[dict]) -> Curve:
    """Where steps go back, in a resumed run or a round done anew, what was noted of them and later ones holds no more."""
    last: dict[int, dict] = {}
    for one in events:
        step = one.get("step")
        if isinstance(step, int):
            if last and step <= next(reversed(last)):
                last = {other: noted for other, noted in last.items() if other < step}
            last[step] = one
    steps = list(last)
    names = [name for name in ("learning_rate", *LOSSES) if any(name in last[step] for step in steps)]

    def figure(name: str) -> NDArray[np.float64]:
        values = [last[step].get(name) for step in steps]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    return Curve(np.array(steps, np.int64), {name: figure(name) for name in names})


def _read(path: Path) -> Any:
    """A JSON object; None where there is no such file. Raises RunError where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON ({error}). Restore it from a copy.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds {type(value).__name__}, wanted an object. Restore it from a copy.")
    return value


def read_data(facts: RunFacts) -> DataFacts:
    """The data of a run, its labeled masks counted. A run may have left its data behind: that is no error."""
    try:
        manifest = manifest_of(recipe_of(facts.root))
        counts = count_labels(masks(manifest.labeled), len(facts.classes))
    except DarsegError as error:
        return DataFacts(None, None, str(error))
    return DataFacts(manifest, counts)


def remarks(facts: RunFacts, data: DataFacts) -> list[Remark]:
    """What a reader should not overlook: rounds that made things worse, classes that vanished, warnings of the run.

    What the journal warned of and what the files show is said once, in the journal's words.
    """
    names = facts.classes.names
    found: list[Remark] = []
    for before, after in zip(facts.scored, facts.scored[1:], strict=False):
        found += _losses(before, after, names)
    if data.counts is not None and (absent := _named(names, data.counts == 0)):
        found.append(Remark(f"absent from all labeled masks, so never pseudo-labeled: {absent}"))
    for one in facts.labeled:
        assert one.labels is not None
        predicted, kept = one.labels.thresholds.predicted, one.labels.kept
        if never := _named(names, predicted == 0):
            found.append(Remark(f"round {one.index}: {NEVER}: {never}"))
        if vanished := _named(names, (predicted > 0) & (kept == 0)):
            found.append(Remark(f"round {one.index}: predicted, but not one pixel kept: {vanished}"))
    if facts.scored:
        last = facts.scored[-1]
        assert last.scores is not None
        if zero := _named(names, last.scores.iou == 0):
            found.append(Remark(f"IoU 0 after round {last.index}: {zero}"))
    # The files know better what was never predicted: a round may have been done anew since the journal warned of it.
    found += [Remark(text) for text in facts.warned if f": {NEVER}: " not in text]
    return list({remark.text: remark for remark in found}.values())


def _losses(before: RoundFacts, after: RoundFacts, names: Sequence[str]) -> list[Remark]:
    assert before.scores is not None and after.scores is not None
    found, old, new = [], before.scores.iou, after.scores.iou
    change = after.scores.mean_iou - before.scores.mean_iou
    if change < 0:
        found.append(Remark(f"round {after.index} made mean IoU worse: {_change(before, after)}", True))
    lost = [k for k in range(len(names)) if old[k] - new[k] > WORSE]
    if lost:
        lost.sort(key=lambda k: new[k] - old[k])
        said = ", ".join(f"{names[k]} {old[k]:.3f} → {new[k]:.3f}" for k in lost)
        found.append(Remark(f"round {after.index} cost classes more than {WORSE} of IoU: {said}", True))
    return found


def _change(before: RoundFacts, after: RoundFacts) -> str:
    assert before.scores is not None and after.scores is not None
    return f"{before.scores.mean_iou:.4f} → {after.scores.mean_iou:.4f}"


def _named(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, one in zip(names, chosen, strict=True) if one)
