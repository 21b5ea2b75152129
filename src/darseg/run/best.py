"""Which round is the best on the validation images: what later rounds go on from, and a run's result."""

from __future__ import annotations

import io
import math
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.files import read_file, write_whole, write_whole_with
from darseg.errors import RecipeError, RunError
from darseg.run.directory import RunDirectory, digest_path, write_json
from darseg.run.journal import Journal
from darseg.run.records import damaged, is_digest, read_object, read_scored
from darseg.training.bootstrap import LEAST_HELD_OUT, LEVEL, RESAMPLES, Difference, paired_difference
from darseg.training.scores import number

BEST, RECORD = "best.safetensors", "best.json"
"""In a run folder with `result.keep: best`: a copy of the best round's weights, and how it was chosen."""

COUNTS = "image_counts.npz"
"""In the folder of a round: `counts_of_image` of its result in each validation image."""

LARGEST = 1 << 31
"""Most bytes of unpacked counts: a million images of 89 classes."""

RULE_VERSION = 1
"""Of the rule by which the best round is chosen."""

Verdict = Literal["better", "same", "worse"]


@dataclass(frozen=True, eq=False)
class RoundScore:
    """How a round's result scored on the validation images.

    Attributes:
        mean_iou: of its decisions, plain or aligned; NaN if no pixel is labeled.
        counts: int64 [N, 3, K], `counts_of_image` of each image; None: the round was scored before these were kept.
    """

    index: int
    mean_iou: float
    counts: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Standing:
    """How a round compares with the best round before it.

    Attributes:
        images: number of validation images; None: not known.
        against: that round; None for the first.
        difference: of mean IoU, None if undefined; the interval is NaN if there is none.
        no_interval: why there is none.
        best: the best round up to this one.
    """

    index: int
    mean_iou: float
    images: int | None
    against: int | None = None
    difference: Difference | None = None
    no_interval: str = ""
    best: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """Whether the whole interval is above or below 0; None without an interval."""
        if self.difference is None or math.isnan(self.difference.low):
            return None
        return "better" if self.difference.low > 0 else "worse" if self.difference.high < 0 else "same"

    def to_json(self) -> dict[str, Any]:
        """As best.json, summary.json and the journal have it."""
        content: dict[str, Any] = {"round": self.index, "mean_iou": number(self.mean_iou)}
        if self.difference is not None:
            low, high = number(self.difference.low), number(self.difference.high)
            content |= {"against": self.against, "difference": number(self.difference.mean_iou)}
            content |= {"interval": None if low is None else [low, high], "verdict": self.verdict}
        return content | {"best": self.best}

    def describe(self) -> str:
        """How the round compares, as part of a sentence; empty for the first."""
        if self.difference is None:
            return ""
        words = {"better": "better than", "same": "neither better nor worse than", "worse": "worse than"}
        how = words[self.verdict] if self.verdict else self._order("higher than", "lower than", "as high as")
        return f"{how} round {self.against} ({self._change()})"

    def unused(self) -> str:
        """A sentence that says why a round after the best one is not the result."""
        if self.difference is None:
            return ""
        words = {"worse": "was worse", "same": "was neither better nor worse", "better": "was better"}
        how = words[self.verdict] if self.verdict else self._order("is higher", "is lower", "is as high")
        return f"Round {self.index} {how} ({self._change()}) and is not used."

    def _order(self, higher: str, lower: str, equal: str) -> str:
        change = self.difference.mean_iou if self.difference else math.nan
        return higher if change > 0 else lower if change < 0 else equal

    def _change(self) -> str:
        assert self.difference is not None
        low, high = self.difference.low, self.difference.high
        interval = self.no_interval or f"{LEVEL:.0%} interval {low:+.4f} to {high:+.4f}"
        return f"{self.difference.mean_iou:+.4f}, {interval}"


def standings(scores: Sequence[RoundScore], seed: int) -> tuple[Standing, ...]:
    """Each round against the best before it, which is chosen as by `best_of`.

    Args:
        scores: of the rounds, in their order.
        seed: of the bootstrap.
    """
    listed: list[Standing] = []
    best: RoundScore | None = None
    for score in scores:
        images = None if score.counts is None else len(score.counts)
        before, best = best, best_of([*([] if best is None else [best]), score])
        if before is None:
            listed.append(Standing(score.index, score.mean_iou, images, best=best.index))
            continue
        difference, reason = _difference(before, score, seed)
        listed.append(
            Standing(
                score.index,
                score.mean_iou,
                images,
                against=before.index,
                difference=difference,
                no_interval=reason,
                best=best.index,
            )
        )
    return tuple(listed)


def best_of(scores: Sequence[RoundScore]) -> RoundScore:
    """The round with the highest mean IoU, the earliest of equals; the last if none is defined."""
    best = scores[0]
    for score in scores[1:]:
        if math.isnan(best.mean_iou) or score.mean_iou > best.mean_iou:
            best = score
    return best


def _difference(before: RoundScore, now: RoundScore, seed: int) -> tuple[Difference | None, str]:
    """The difference with its interval, and why it has none."""
    change = Difference(now.mean_iou - before.mean_iou, low=math.nan, high=math.nan)
    if math.isnan(change.mean_iou):
        return None, "no validation image has a labeled pixel"
    if before.counts is None or now.counts is None:
        return change, "no interval, because an earlier version of darseg kept no counts of images"
    if before.counts.shape != now.counts.shape:
        return change, "no interval, because the rounds were scored on other images"
    if (images := len(now.counts)) < LEAST_HELD_OUT:
        return change, f"no interval, because it needs {LEAST_HELD_OUT} validation images, not {images}"
    return paired_difference(before.counts, now.counts, seed=seed), ""


def describe_result(listed: Sequence[Standing], *, keep: str, finished: bool) -> str:
    """Which round is the result and how others compare, in sentences; empty if nothing is to be said.

    Args:
        keep: `result.keep` of the recipe.
        finished: whether all rounds are done.
    """
    last = listed[-1]
    if keep == "last":
        if last.verdict != "worse":
            return ""
        return (
            f"Round {last.index} is {'the result' if finished else 'the latest'}, and it is {last.describe()}. With "
            "result.keep=best, later rounds would go on from the best round, which would be the result."
        )
    best = next(standing for standing in listed if standing.index == last.best)
    role = "the result" if finished else "the best so far"
    if math.isnan(best.mean_iou):
        return f"Round {best.index} is {role}: no validation image has a labeled pixel, so the last round is taken."
    on = "" if best.images is None else f" on {best.images} validation image(s)"
    sentences = [f"Round {best.index} is {role}: mean IoU {best.mean_iou:.4f}{on}."]
    if best.difference is not None:
        sentences.append(f"It is {best.describe()}.")
    sentences += [standing.unused() for standing in listed if standing.index > best.index]
    return " ".join(sentences)


def check_keep(recipe: Recipe, validation: int) -> None:
    """Raise RecipeError if the best round is to be kept and there are no validation images to find it."""
    if recipe.result.keep == "best" and not validation:
        raise RecipeError(
            "result.keep: best needs validation images to tell which round is the best, and there are none. Set "
            "data.validation (every: 5 holds out every fifth labeled image), or set result.keep: last."
        )


def describe_keep(recipe: Recipe) -> list[str]:
    """What `result.keep: best` does, for plans; nothing if the recipe keeps the last round."""
    if recipe.result.keep == "last":
        return []
    goes_on = "rounds that name no other go on" if recipe.takes_turns else "later rounds go on"
    return [
        f"The round with the highest mean IoU on the validation images is the result, and {goes_on} from it "
        f"(result.keep: best); {BEST} is a copy of its weights."
    ]


# --- in a run folder


def standings_of(run: RunDirectory, seed: int) -> tuple[Standing, ...]:
    """The standings of the rounds that are scored. Raises RunError if scores or counts are damaged."""
    scores = [
        RoundScore(index, mean_iou(run, index), _read_counts(run.round(index) / COUNTS))
        for index in run.rounds_with("evaluate")
    ]
    return standings(scores, seed)


def write_counts(path: Path, counts_N3K: NDArray[np.int64]) -> None:
    """Write the counts of a round's result; equal counts give equal bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, counts=counts_N3K)
    write_whole(path, buffer.getvalue())


def _read_counts(path: Path) -> NDArray[np.int64] | None:
    """The counts that `write_counts` wrote, None if there are none. Raises RunError for other bytes."""
    if not path.exists():
        return None
    try:
        data = read_file(path)
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            if (size := sum(member.file_size for member in members.infolist())) > LARGEST:
                raise ValueError(f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most")
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            counts = archive["counts"]
        if counts.dtype != np.int64 or counts.ndim != 3 or counts.shape[1] != 3 or (counts < 0).any():
            raise ValueError("expected counts of pixels, int64 [N, 3, K]")
        return counts
    except Exception as error:  # zip, zlib and numpy raise a dozen kinds for damaged bytes; all mean the same
        remedy = "Restore it from a copy, or delete evaluate.json next to it, and run the same command again."
        raise damaged(path, f"{type(error).__name__}: {error}", remedy) from error


def mean_iou(run: RunDirectory, index: int) -> float:
    """The mean IoU of a round's result; NaN if undefined. Raises RunError if its scores are damaged."""
    content = read_scored(run.round(index) / "scores.json")
    aligned = content.get("aligned", {})
    figure = (aligned if aligned.get("used") else content)["mean_iou"]
    return math.nan if figure is None else float(figure)


def write_best(run: RunDirectory, recipe: Recipe, listed: Sequence[Standing]) -> Mapping[str, Any]:
    """Bring best.safetensors and best.json to what the scored rounds say; what is there already stays.

    The record is written last. A kill in between leaves a record that is not of the file, and `run_weights` then takes
    the round's own file.

    Returns:
        the content of best.json.
    """
    index = listed[-1].best
    weights = {standing.index: _weights(run, standing.index) for standing in listed}
    name, digest = weights[index]
    finished = listed[-1].index == len(recipe.rounds) - 1
    content = {
        "round": index,
        "weights": name,
        "sha256": digest,
        "why": describe_result(listed, keep="best", finished=finished),
        "images": listed[-1].images,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": recipe.seed,
        "rule": RULE_VERSION,
        "rounds": [
            standing.to_json() | dict(zip(("weights", "sha256"), weights[standing.index], strict=True))
            for standing in listed
        ],
    }
    path, record = run.root / BEST, run.root / RECORD
    if digest_path(path) != digest:
        write_whole_with(path, lambda aside: shutil.copyfile(run.root / name, aside))
    try:
        written = read_object(record, "")
    except (RunError, FileNotFoundError):
        written = None
    if written != content:
        write_json(record, content)
    return content


def _weights(run: RunDirectory, index: int) -> tuple[str, str]:
    """The file of a round's result, relative to the run folder, and its digest as the records have it."""
    for step, path in (("evaluate", run.result(index)), ("train", run.network(index))):
        record = run.read_record(index, step)
        if record is not None and path.name in record.outputs:
            return path.relative_to(run.root).as_posix(), record.outputs[path.name]
    raise RunError(f"{run.round(index)}: its records name no weights. Restore train.json from a copy.")


@dataclass(frozen=True)
class Best:
    """What best.json says.

    Attributes:
        digest: SHA-256 of the weights.
        why: sentences about the choice.
        compared: the rounds that it was chosen from.
    """

    round: int
    digest: str
    why: str
    compared: tuple[int, ...]


def read_best(run: RunDirectory) -> Best | None:
    """The best round so far of a run with `keep: best`; None for other runs. Raises RunError if damaged."""
    path = run.root / RECORD
    remedy = "Run `darseg train` again, which writes it again; or choose a round with --round."
    try:
        content = read_object(path, remedy)
    except FileNotFoundError:
        return None
    index, digest, why = (content.get(name) for name in ("round", "sha256", "why"))
    if type(index) is not int or not 0 <= index < 10**6:
        raise damaged(path, "'round' is not the number of a round", remedy)
    if not (isinstance(digest, str) and is_digest(digest) and isinstance(why, str)):
        raise damaged(path, "expected a SHA-256 digest and the reason", remedy)
    try:
        compared = tuple(entry["round"] for entry in content["rounds"])
    except (KeyError, TypeError) as error:
        raise damaged(path, "'rounds' is not a list of rounds", remedy) from error
    return Best(index, digest, why, compared=compared)


def uncompared(run: RunDirectory, best: Best) -> list[int]:
    """The rounds that are scored and not in best.json: a call was stopped between the two."""
    return [index for index in run.rounds_with("evaluate") if index not in best.compared]


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Attributes:
        round: of a run folder, that trained them; None for other files.
    """

    path: Path
    round: int | None = None


def run_weights(run: RunDirectory, index: int | None = None, plain: bool = False) -> Weights:
    """The weights of a run's result, or of one of its rounds.

    The result is that of the best round so far if the run keeps the best, otherwise that of the last finished round.

    Args:
        index: a round; None: the run's result.
        plain: the network as it was trained, also if the aligned one is the result.

    Raises RunError if there are none.
    """
    best = read_best(run) if index is None else None
    if best and (missed := uncompared(run, best)):
        Journal(None, None, Console(stderr=True)).warn(
            f"{run.root}: round {best.round} is the best so far, but round {missed[0]} is not compared with it yet. "
            "`darseg train` does so."
        )
    if index is None:
        index = best.round if best else run.last_round()
    own = run.network(index)
    if best is not None and not (plain and own.exists()):
        if digest_path(run.root / BEST) == best.digest:
            return Weights(run.root / BEST, index)
        Journal(None, None, Console(stderr=True)).warn(
            f"{run.root / BEST} is not the file that {RECORD} describes, so the weights in {run.round(index)} are used. "
            "`darseg train` writes it again."
        )
    if not own.exists() and run.record_path(index, "train").exists():
        raise RunError(f"{own} is missing, though its round is finished. Restore it from a copy.")
    if not own.exists():
        raise RunError(
            f"{run.root}: round {index} is not finished ({own} does not exist). Choose an earlier round, or continue the "
            "run."
        )
    aligned = run.result(index)
    return Weights(aligned if aligned.exists() and not plain else own, index)
