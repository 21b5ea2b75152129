"""Evaluate: a round's network on the validation images, plain and aligned; and what its result is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darseg.model.aligned import AlignmentRecord, fold_alignment
from darseg.model.weights import load_network, read_spec, save_network
from darseg.model.windows import Protocol, group_size
from darseg.run.best import COUNTS, write_counts
from darseg.run.build import evaluation_protocol, load_to_predict
from darseg.run.course import Course
from darseg.run.directory import StepRecord, digest_path, write_json
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests
from darseg.run.plan import Round
from darseg.run.records import read_scored
from darseg.run.remedies import explain_memory, less_to_predict
from darseg.run.result import DECISION_VERSION, Decision, decide_result, describe_decision, score_variants
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.align import Candidates
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.training.bootstrap import LEVEL, RESAMPLES
from darseg.training.scores import Scores

SCORES = "scores.json"
FIGURES = ("mean_iou", "mean_accuracy", "pixel_accuracy")


def evaluate_round(
    course: Course, round_: Round, candidates: Candidates | None
) -> tuple[Mapping[str, Any], StepRecord]:
    """Score the network of a round's last step on the validation images, and decide what the result is.

    Args:
        candidates: what the align step found; None if the run aligns nothing.

    Returns:
        the content of scores.json, and the step's record.
    """
    protocol, result = evaluation_protocol(course.recipe.at(round_.index)), course.recipe.result
    aligning = None if candidates is None else {"align": result.align, "fault": candidates.fault}
    deciding = None
    if candidates is not None and candidates.usable:
        deciding = {
            "seed": course.recipe.seed,
            "level": LEVEL,
            "resamples": RESAMPLES,
            "rule": DECISION_VERSION,
        }
    digests = {
        "settings": digest_settings(protocol=protocol, result=aligning, decision=deciding),
        "validation": course.data["validation"],
        "network": digest_path(course.run.network(round_.index)),
    }
    if candidates is not None and candidates.usable:
        digests["alignment"] = digest_settings(
            candidates=[alignment.to_json() for alignment in candidates.usable]
        )
    earlier = [] if aligning else earlier_digests(lambda: digest_format_1(protocol=as_format_1(protocol)))
    if deciding:  # as steps were recorded that did not yet note how they decided
        earlier = [digest_settings(protocol=protocol, result=aligning)]
    step = Step(
        "evaluate",
        round_.index,
        Inputs(digests, earlier),
        work=lambda: _Evaluation(course, round_, protocol, candidates=candidates).run(),
    )
    record = complete(course, step)
    # The first process reads: on a network disk others may not see yet what it has just written.
    return course.processes.from_first(lambda: _read_scores(course, round_)), record


def _read_scores(course: Course, round_: Round) -> Mapping[str, Any]:
    course.run.scores(round_.index)  # says what is damaged
    return read_scored(course.path(round_, SCORES), course.manifest.classes.names)


class _Evaluation:
    """A round's evaluation at work."""

    def __init__(
        self, course: Course, round_: Round, protocol: Protocol, *, candidates: Candidates | None
    ) -> None:
        self.course, self.round, self.protocol = course, round_, protocol
        self.aligns, self.candidates = candidates is not None, candidates or Candidates()
        self.names = course.manifest.classes.names
        source = f"round {round_.index}, {self.candidates.source}"
        self.records = [AlignmentRecord.of(alignment, source) for alignment in self.candidates.usable]

    def run(self) -> Work:
        """The work of all processes: each scores its share of the images; the first decides."""
        confusions, counts = self._score()
        described = Scores(confusions[0]).to_json(self.names) | {"protocol": self.protocol.describe()}
        mode, decision = self.course.recipe.result.align, None
        if self.aligns:
            decision = self.course.processes.from_first(
                lambda: decide_result(
                    mode,
                    self.candidates.usable,
                    counts,
                    fault=self.candidates.fault,
                    seed=self.course.recipe.seed,
                )
            )
            described["aligned"] = describe_decision(
                decision,
                self.candidates.usable,
                confusions,
                names=self.names,
                predicted=self.candidates.predicted,
                wanted=self.candidates.wanted,
            )
        outputs, chosen = [SCORES], 0
        if decision is not None and decision.used and decision.chosen is not None:
            outputs.append(self.course.run.result(self.round.index).name)
            chosen = 1 + decision.chosen
        if self.course.manifest.validation:
            outputs.append(COUNTS)
        return Work(outputs, lambda: self._write(described, decision, counts[:, chosen]))

    def _score(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Confusions of all images, int64 [1 + M, K, K]; counts of each, int64 [N, 1 + M, 3, K].

        The counts are whole only in the first process.
        """
        course, round_ = self.course, self.round
        samples, processes = course.manifest.validation, course.processes
        network = load_to_predict(course.run.network(round_.index))
        group = group_size(self.protocol, network.mean.device)
        share = processes.share(samples, group)
        with (
            course.journal.progress(f"round {round_.index}: evaluate", len(share)) as advance,
            explain_memory(less_to_predict(course.recipe.at(round_.index), "evaluation", self.protocol)),
        ):
            own = processes.together(
                lambda: score_variants(
                    network,
                    [None, *self.records],
                    share,
                    classes=course.manifest.classes,
                    protocol=self.protocol,
                    advance=advance,
                )
            )
        confusions = processes.add_up(own.confusions)
        # In the order of the images, whatever the number of processes: the bootstrap draws by position.
        places = processes.to_first(np.array(processes.share(range(len(samples)), group), np.int64))
        return confusions, processes.to_first(own.counts)[np.argsort(places)]

    def _write(
        self, described: Mapping[str, Any], decision: Decision | None, counts_N3K: NDArray[np.int64]
    ) -> Result:
        """Write the scores, the counts of the result, and the aligned network if it is the result."""
        course, index = self.course, self.round.index
        write_json(course.path(self.round, SCORES), described)
        if course.manifest.validation:
            write_counts(course.path(self.round, COUNTS), counts_N3K)
        result = course.run.result(index)
        if decision is not None and decision.used and decision.chosen is not None:
            plain = course.run.network(index)
            network = fold_alignment(load_network(plain), self.records[decision.chosen])
            save_network(network, result, read_spec(plain))
        else:
            result.unlink(missing_ok=True)  # of an evaluation that was deleted to be repeated
        figures = {name: described[name] for name in FIGURES}
        facts: dict[str, Any] = figures | {"iou": described["iou"]}
        sentence = _sentence(figures, len(course.manifest.validation))
        noted = dict(figures)
        if decision is not None:
            aligned = described["aligned"]
            facts["aligned"] = {
                key: aligned[key]
                for key in ("used", "strength", "bound", "mean_iou", "difference", "interval")
                if key in aligned
            }
            sentence += f". {decision.why.removesuffix('.')}"
            noted |= {f"aligned_{name}": aligned[name] for name in FIGURES if name in aligned}
        last_step = sum(planned.steps for planned in course.rounds[: index + 1]) - 1
        return Result(
            facts, sentence, recorded=lambda: course.journal.scalars(last_step, "validation", noted)
        )


def _sentence(figures: Mapping[str, float | None], images: int) -> str:
    text = ", ".join(
        f"{name.replace('_', ' ')} {'undefined' if value is None else format(value, '.4f')}"
        for name, value in figures.items()
    )
    return f"{text} on {images} validation images"
