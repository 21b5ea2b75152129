"""Whether a round's result is its aligned network: scored and decided on held-out images."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.choices import ResultAlign
from darseg.data.classes import ClassSet
from darseg.data.dataset import load_example
from darseg.data.manifest import Sample
from darseg.data.pipeline import Finish, overlapped_groups
from darseg.data.prediction import FINE, Prediction
from darseg.model.aligned import AlignmentRecord
from darseg.model.network import Network
from darseg.model.together import Picture, Together, flow_for
from darseg.model.windows import Protocol
from darseg.pseudo.alignment import Alignment
from darseg.run.journal import Advance
from darseg.training.bootstrap import LEVEL, RESAMPLES, Difference, counts_of_image, paired_difference
from darseg.training.scores import Scores, number

DECISION_VERSION = 2
"""Of the rule by which the result is decided: another rule, another decision."""


@dataclass(frozen=True)
class VariantScores:
    """Scores of several variants of a network on the same images.

    Attributes:
        confusions: int64 [M, K, K].
        counts: int64 [N, M, 3, K], `counts_of_image` of each image.
    """

    confusions: NDArray[np.int64]
    counts: NDArray[np.int64]


def score_variants(
    network: Network,
    records: Sequence[AlignmentRecord | None],
    samples: Sequence[Sample],
    *,
    classes: ClassSet,
    protocol: Protocol,
    advance: Advance,
) -> VariantScores:
    """Scores of a network (in eval mode) with each of the class weights; None: without.

    Args:
        samples: beginning with a whole group of `group_size`, all of the same lengths but the last.
    """
    together = Together(network, protocol, average="probabilities", scale=FINE, records=records)
    counts: dict[str, NDArray[np.int64]] = {}

    def read(sample: Sample) -> tuple[NDArray[np.uint8], Picture]:
        example = load_example(sample, classes)
        return example.label, Picture.of(example.image, str(sample.image), together.device)

    def work(
        contents: Iterator[tuple[Sample, tuple[NDArray[np.uint8], Picture]]],
    ) -> Iterator[tuple[Sample, Finish[NDArray[np.int64]]]]:
        pictures = (((sample, label), picture) for sample, (label, picture) in contents)
        for (sample, label), finish in together.predict(pictures):
            yield sample, partial(_confusions, label, finish, len(classes))

    def count(sample: Sample, confusions: NDArray[np.int64]) -> None:
        with lock:
            totals[:] += confusions
            counts[sample.id] = np.stack([counts_of_image(confusion) for confusion in confusions])

    totals, lock = np.zeros((len(records), len(classes), len(classes)), np.int64), threading.Lock()
    overlapped_groups(
        (samples[start : start + together.images] for start in range(0, len(samples), together.images)),
        read=read,
        work=work,
        write=count,
        advance=advance,
        flow=flow_for(together.device),
    )
    shape = (0, len(records), 3, len(classes))
    in_order = [counts[sample.id] for sample in samples]
    return VariantScores(totals, np.stack(in_order) if in_order else np.zeros(shape, np.int64))


def _confusions(
    label: NDArray[np.uint8], finish: Finish[list[Prediction]], classes: int
) -> NDArray[np.int64]:
    """The confusion of each variant in one image, int64 [M, K, K]."""
    return np.stack(
        [Scores.empty(classes).plus(label, prediction.classes).confusion for prediction in finish()]
    )


@dataclass(frozen=True)
class Decision:
    """Whether aligned decisions are used, and why.

    Attributes:
        used: whether the result is the aligned network.
        why: a sentence.
        chosen: number of the candidate that is used, or that came nearest; None without candidates.
        differences: of each candidate's mean IoU from the plain one; empty if no images are held out.
    """

    used: bool
    why: str
    chosen: int | None = None
    differences: tuple[Difference, ...] = ()


def decide_result(
    mode: ResultAlign,
    candidates: Sequence[Alignment],
    counts: NDArray[np.int64],
    *,
    fault: str | None,
    seed: int,
) -> Decision:
    """Decide on held-out images; of several candidates, the one whose interval begins highest.

    With `auto` a candidate is used if the whole interval of its difference is above 0.

    Args:
        counts: int64 [N, 1 + candidates, 3, K], `counts_of_image` of the plain network and of each candidate.
        fault: why there are no candidates.
    """
    if not candidates:
        return Decision(False, f"Aligned decisions are not used: {fault}.")
    differences = tuple(
        paired_difference(counts[:, 0], counts[:, 1 + index], seed=seed) for index in range(len(candidates))
    )
    if any(np.isnan(difference.low) for difference in differences):
        why = (
            "Aligned decisions are used, as the recipe says; no held-out image shows their effect."
            if mode == "on"
            else "Aligned decisions are not used: no held-out image has a labeled pixel."
        )
        return Decision(mode == "on", why, chosen=0)
    chosen = max(range(len(candidates)), key=lambda index: differences[index].low)
    low, high = differences[chosen].low, differences[chosen].high
    if mode == "on":
        verdict = "used, as the recipe says"
    elif low > 0:
        verdict = "used"
    else:
        verdict = f"not used, because {'the interval is not above 0' if high > 0 else 'they make it worse'}"
    effect = _describe(candidates[chosen], differences[chosen])
    return Decision(
        mode == "on" or low > 0,
        f"Aligned decisions are {verdict}: {effect} on {len(counts)} held-out image(s).",
        chosen=chosen,
        differences=differences,
    )


def _describe(alignment: Alignment, difference: Difference) -> str:
    return (
        f"strength {alignment.strength:g} and bound {alignment.bound:g} change mean IoU by {difference.mean_iou:+.4f} "
        f"({LEVEL:.0%} interval {difference.low:+.4f} to {difference.high:+.4f})"
    )


def describe_decision(
    decision: Decision,
    candidates: Sequence[Alignment],
    confusions: NDArray[np.int64],
    *,
    names: Sequence[str],
    predicted: Sequence[float] | None,
    wanted: Sequence[float],
) -> dict[str, Any]:
    """What scores.json says under "aligned".

    Args:
        confusions: int64 [1 + candidates, K, K].
        predicted, wanted: class shares on the unlabeled images: those of the plain decisions, and the labeled pixels'.
    """
    described: dict[str, Any] = {"used": decision.used, "why": decision.why}
    if decision.chosen is None:
        return described
    alignment = candidates[decision.chosen]
    described |= {
        "strength": alignment.strength,
        "bound": alignment.bound,
        "weights": _by_name(names, alignment.weights.tolist()),
        "out_of_reach": [name for name, near in zip(names, alignment.reachable, strict=True) if not near],
        "shares": {
            "predicted": None if predicted is None else _by_name(names, predicted),
            "wanted": _by_name(names, wanted),
            "reached": _by_name(names, alignment.reached.tolist()),
        },
    }
    described |= Scores(confusions[1 + decision.chosen]).to_json(names)
    if not decision.differences:  # no held-out image: all scores are undefined
        return described
    return (
        described
        | _described_difference(decision.differences[decision.chosen])
        | {
            "candidates": [
                {"strength": candidate.strength, "bound": candidate.bound}
                | {"mean_iou": number(Scores(confusion).mean_iou)}
                | _described_difference(difference)
                for candidate, confusion, difference in zip(
                    candidates, confusions[1:], decision.differences, strict=True
                )
            ]
        }
    )


def _described_difference(difference: Difference) -> dict[str, Any]:
    return {
        "difference": difference.mean_iou,
        "interval": [difference.low, difference.high],
        "level": LEVEL,
        "resamples": RESAMPLES,
    }


def _by_name(names: Sequence[str], values: Sequence[float]) -> Mapping[str, float]:
    return dict(zip(names, values, strict=True))
