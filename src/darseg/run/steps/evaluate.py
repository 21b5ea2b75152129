"""Evaluate: a round's network on the validation images."""

from __future__ import annotations

from collections.abc import Mapping

from darseg.model.predict import Protocol
from darseg.run.build import evaluation_protocol, load_to_predict
from darseg.run.course import Course
from darseg.run.directory import StepRecord, digest_path, write_json
from darseg.run.evaluate import evaluate_samples
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests
from darseg.run.plan import Round
from darseg.run.remedies import explain_memory, less_to_predict
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.step import Result, Step, Work, complete
from darseg.training.scores import Scores

SCORES = "scores.json"
FIGURES = ("mean_iou", "mean_accuracy", "pixel_accuracy")


def evaluate_round(course: Course, round_: Round) -> tuple[Scores, StepRecord]:
    """Score the network of a round's last step on the validation images."""
    protocol = evaluation_protocol(course.recipe)
    inputs = Inputs(
        {
            "settings": digest_settings(protocol=protocol),
            "validation": course.data["validation"],
            "network": digest_path(course.run.network(round_.index)),
        },
        earlier_digests(lambda: digest_format_1(protocol=as_format_1(protocol))),
    )
    step = Step("evaluate", round_.index, inputs, work=lambda: _score(course, round_, protocol))
    record = complete(course, step)
    # The first process reads: on a network disk others may not see yet what it has just written.
    scores = course.processes.from_first(lambda: course.run.scores(round_.index))
    return scores, record


def _score(course: Course, round_: Round, protocol: Protocol) -> Work:
    """The work of all processes: each scores its share of the images."""
    samples, classes, processes = course.manifest.validation, course.manifest.classes, course.processes
    network = load_to_predict(course.run.network(round_.index))
    share = processes.share(samples)
    with (
        course.journal.progress(f"round {round_.index}: evaluate", len(share)) as advance,
        explain_memory(less_to_predict(course.recipe, "evaluation", protocol)),
    ):
        own = processes.together(
            lambda: evaluate_samples(network, share, classes, protocol=protocol, advance=advance)
        )
    described = Scores(processes.add_up(own.confusion)).to_json(classes.names)

    figures = {name: described[name] for name in FIGURES}
    last_step = sum(planned.steps for planned in course.rounds[: round_.index + 1]) - 1

    def write() -> Result:
        write_json(course.path(round_, SCORES), described | {"protocol": protocol.describe()})
        return Result(
            figures | {"iou": described["iou"]},
            _sentence(figures, len(samples)),
            recorded=lambda: course.journal.scalars(last_step, "validation", figures),
        )

    return Work([SCORES], write)


def _sentence(figures: Mapping[str, float | None], images: int) -> str:
    text = ", ".join(
        f"{name.replace('_', ' ')} {'undefined' if value is None else format(value, '.4f')}"
        for name, value in figures.items()
    )
    return f"{text} on {images} validation images"
