"""Align: class weights that give a network the labeled pixels' class shares on unlabeled images.

The weights are only candidates: the evaluation decides on held-out images whether they become part of the result. A run
on labels alone has no unlabeled images; it predicts those that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.config.recipe import Recipe, ResultConfig
from darseg.data.dataset import load_image
from darseg.data.files import read_json
from darseg.data.manifest import Manifest, Sample
from darseg.data.pipeline import overlapped
from darseg.errors import DataError, RunError
from darseg.model.aligned import AlignmentRecord
from darseg.model.predict import predict_probabilities
from darseg.model.windows import Memory
from darseg.pseudo.align import align_by_strengths
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.pixel_sample import PixelSample
from darseg.run.build import evaluation_protocol, load_to_predict
from darseg.run.course import Course
from darseg.run.directory import StepRecord, digest_path, write_json
from darseg.run.marks import read_excluded, without
from darseg.run.plan import Round
from darseg.run.remedies import explain_memory, less_to_predict
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.training.bootstrap import LEAST_HELD_OUT

ALIGNMENT = "result_alignment.json"

STRENGTHS, BOUNDS = (0.5, 1.0), (2.0, 5.0)
"""Candidates of `auto`, from the gentlest to the strongest; `on` takes the last of each."""

IMAGES = 500
"""Most images to predict: so many show the class shares to about 2 % of each."""

LEAST_IMAGES = 5
"""Images below which class shares are left alone: so few have shares of their own."""

PIXELS = 1 << 19
"""Most pixels in the sample: the standard error of a share is at most 0.001, and 0.0014 with 255 classes."""


@dataclass(frozen=True)
class Candidates:
    """What the align step found.

    Attributes:
        usable: class weights that could become part of the result.
        fault: why there are none.
        wanted: float [K], class shares of the labeled pixels.
        predicted: float [K], those of the plain decisions on the unlabeled images; None if they are not known.
        images: how many were predicted.
        labeled: whether these were images that the network was trained on.
    """

    usable: tuple[Alignment, ...] = ()
    fault: str | None = None
    wanted: tuple[float, ...] = ()
    predicted: tuple[float, ...] | None = None
    images: int = 0
    labeled: bool = False

    @property
    def source(self) -> str:
        """The images that the weights are from, in words."""
        return f"{self.images} {'labeled' if self.labeled else 'unlabeled'} images of the run"


def candidates_of(config: ResultConfig) -> list[tuple[float, float]]:
    """Strength and bound of each candidate."""
    auto = config.align == "auto"
    strengths = STRENGTHS if auto else STRENGTHS[-1:]
    bounds = BOUNDS if auto else BOUNDS[-1:]
    if config.strength is not None:
        strengths = (config.strength,)
    if config.bound is not None:
        bounds = (config.bound,)
    return [(strength, bound) for strength in strengths for bound in bounds]


def why_off(recipe: Recipe, manifest: Manifest, counts: Sequence[int]) -> str | None:
    """Why a run aligns nothing though its recipe does not say off; None if there is no reason."""
    role, held_out = "unlabeled" if manifest.unlabeled else "labeled", len(manifest.validation)
    if recipe.result.align == "off":
        return None
    if (count := len(manifest.roles()[role])) < LEAST_IMAGES:
        return f"{count} {role} image(s) do not show the class shares; at least {LEAST_IMAGES} are needed"
    if not any(counts):
        return "no pixel is labeled, so there are no class shares"
    if recipe.result.align == "auto" and held_out < LEAST_HELD_OUT:
        return f"{held_out} validation image(s) cannot show whether it helps; at least {LEAST_HELD_OUT} are needed"
    return None


def align_round(course: Course, round_: Round) -> tuple[Candidates | None, StepRecord | None]:
    """Find class weights for a round's network.

    Returns:
        the candidates, None if the run aligns nothing; and the step's record, None if there was nothing to do.
    """
    if course.recipe.result.align == "off" or why_off(course.recipe, course.manifest, course.counts):
        return None, None
    excluded = course.processes.from_first(lambda: read_excluded(course.run, round_.index))
    unlabeled = without(course.manifest.unlabeled, excluded)
    if course.manifest.unlabeled and len(unlabeled) < LEAST_IMAGES:
        return Candidates(fault=f"only {len(unlabeled)} unlabeled image(s) are not marked as bad"), None
    chosen = choose_images(unlabeled or course.manifest.labeled, course.recipe.seed)
    digests = {
        "settings": digest_settings(
            protocol=evaluation_protocol(course.recipe.at(round_.index)),
            candidates=candidates_of(course.recipe.result),
            seed=course.recipe.seed,
            images=IMAGES,
            pixels=PIXELS,
        ),
        "labeled": course.data["labeled"],
        "unlabeled": course.data["unlabeled"],
        "network": digest_path(course.run.network(round_.index)),
    }
    if excluded:
        digests["excluded"] = digest_settings(ids=list(excluded))
    record = complete(
        course, Step("align", round_.index, Inputs(digests), work=lambda: _align(course, round_, chosen))
    )
    # The first process reads: on a network disk others may not see yet what it has just written.
    return course.processes.from_first(lambda: read_candidates(course.path(round_, ALIGNMENT))), record


def choose_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """At most IMAGES of the samples, in their order; seed and ids decide."""

    def drawn(sample: Sample) -> bytes:
        return hashlib.sha256(json.dumps(["darseg.run.steps.align", seed, sample.id]).encode()).digest()

    ids = {sample.id for sample in sorted(samples, key=drawn)[:IMAGES]}
    return [sample for sample in samples if sample.id in ids]


def _align(course: Course, round_: Round, chosen: Sequence[Sample]) -> Work:
    """The work of all processes: sample the predictions of their share; the first finds the weights."""
    classes, processes = course.manifest.classes, course.processes
    distribution = ClassDistribution.from_counts(course.counts)
    rows, unusable = _sample(course, round_, chosen)
    found = processes.from_first(
        lambda: find_candidates(
            rows,
            distribution.share,
            candidates_of(course.recipe.result),
            names=classes.names,
            unusable=unusable,
        )
    )

    def write() -> Result:
        protocol = evaluation_protocol(course.recipe.at(round_.index)).describe()
        described = {"classes": list(classes.names), "images": len(chosen), "protocol": protocol} | found
        if not course.manifest.unlabeled:
            described["labeled"] = True
        write_json(course.path(round_, ALIGNMENT), described)
        if found["fault"]:
            course.journal.warn(
                f"round {round_.index}: decisions cannot be aligned: {found['fault']}. The result is the plain network; "
                "train longer if that is not enough"
            )
        return Result({"candidates": len(found["candidates"]), "images": len(chosen)})

    return Work([ALIGNMENT], write)


def _sample(course: Course, round_: Round, chosen: Sequence[Sample]) -> tuple[NDArray[np.float16], list[str]]:
    """A sample of the predictions, float16 [N, K], whole in the first process; ids of images with NaN."""
    classes, processes, protocol = (
        len(course.manifest.classes),
        course.processes,
        evaluation_protocol(course.recipe.at(round_.index)),
    )
    network, memory = load_to_predict(course.run.network(round_.index)), Memory()
    pixels, unusable = PixelSample(classes, course.recipe.seed, PIXELS), []
    share = processes.share(chosen)

    def work(sample: Sample, image: NDArray[np.uint8]) -> None:
        scores = predict_probabilities(network, image, protocol, memory=memory)
        if np.isfinite(scores).all():
            pixels.add(sample.id, scores, probabilities=True)
        else:
            unusable.append(sample.id)

    with (
        course.journal.progress(f"round {round_.index}: align", len(share)) as advance,
        explain_memory(less_to_predict(course.recipe.at(round_.index), "evaluation", protocol)),
    ):
        processes.together(
            lambda: overlapped(
                share,
                read=load_image,
                work=work,
                write=lambda *_: None,
                advance=advance,
            )
        )
    return processes.to_first(pixels.rows(processes.add_up(pixels.sizes()))), processes.gather(unusable)


def find_candidates(
    rows_NK: NDArray[np.float16],
    wanted: NDArray[np.float64],
    settings: Sequence[tuple[float, float]],
    *,
    names: Sequence[str],
    unusable: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of result_alignment.json: usable class weights, or why there are none.

    Args:
        rows_NK: sample of log-probabilities.
        wanted: class shares of the labeled pixels.
        settings: strength and bound of each candidate.
        unusable: ids of images whose predictions are not numbers.
    """
    found: dict[str, Any] = {"wanted": wanted.tolist(), "predicted": None, "candidates": [], "fault": None}
    if unusable:
        more = f" and {len(unusable) - 1} more" if len(unusable) > 1 else ""
        return found | {"fault": f"predictions are NaN or infinite ({unusable[0]}{more})"}
    predicted = np.bincount(rows_NK.argmax(axis=1), minlength=len(wanted)) / len(rows_NK)
    found["predicted"] = predicted.tolist()
    if np.count_nonzero(predicted) == 1:
        return found | {"fault": f"all predictions are of one class ({names[int(predicted.argmax())]})"}
    alignments = {
        (alignment.strength, alignment.bound): alignment
        for bound in dict.fromkeys(bound for _, bound in settings)
        for alignment in align_by_strengths(
            rows_NK,
            wanted,
            bound=bound,
            strengths=[strength for strength, other in settings if other == bound],
        )
    }
    ordered = [alignments[setting] for setting in settings]
    found["candidates"] = [alignment.to_json() for alignment in ordered if alignment.converged]
    if not found["candidates"]:
        found["fault"] = "; ".join(dict.fromkeys(str(alignment.fault(names)) for alignment in ordered))
    return found


def chosen_record(folder: Path, scores: Mapping[str, Any]) -> AlignmentRecord | None:
    """The class weights that a round decided about, used or not; None if there are none.

    Args:
        folder: of the round.
        scores: the content of its scores.json.
    """
    aligned = scores.get("aligned", {})
    if "strength" not in aligned or not (folder / ALIGNMENT).exists():
        return None
    candidates = read_candidates(folder / ALIGNMENT)
    chosen = (aligned["strength"], aligned.get("bound"))
    found = [alignment for alignment in candidates.usable if (alignment.strength, alignment.bound) == chosen]
    return AlignmentRecord.of(found[0], candidates.source) if found else None


def read_candidates(path: Path) -> Candidates:
    """The candidates in a result_alignment.json. Raises RunError if it is damaged."""
    try:
        content: Mapping[str, Any] = read_json(path)
        predicted = content["predicted"]
        return Candidates(
            usable=tuple(map(Alignment.from_json, content["candidates"])),
            fault=content["fault"],
            wanted=tuple(content["wanted"]),
            predicted=None if predicted is None else tuple(predicted),
            images=int(content["images"]),
            labeled=bool(content.get("labeled", False)),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, DataError) as error:
        raise RunError(
            f"{path} is damaged ({type(error).__name__}: {error}). Restore it, or delete align.json and evaluate.json "
            "next to it, and run the same command again."
        ) from error
