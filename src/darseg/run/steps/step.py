"""How a step is done: finished? → do → record. The only place that decides it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from darseg.run.course import Course
from darseg.run.directory import RunDirectory, StepRecord
from darseg.run.settings import Inputs

Name = Literal["classify", "label", "train", "align", "evaluate"]

EVENTS: Mapping[Name, str] = {
    "classify": "classified",
    "label": "labeled",
    "train": "trained",
    "align": "aligned",
    "evaluate": "evaluated",
}


@dataclass(frozen=True)
class Result:
    """What a step's record and the console hold besides its outputs.

    Attributes:
        facts: plain values worth keeping, for the record and the journal.
        sentence: what the console says, with the step's seconds; empty: nothing.
        recorded: called when the record is written; for what a kill before it must not leave twice.
    """

    facts: Mapping[str, Any]
    sentence: str = ""
    recorded: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Work:
    """What is left to do when a step's work is done.

    Attributes:
        outputs: files and folders of the round that the step leaves, by name; their digests are recorded.
        write: writes what is not written yet; called by the first process.
        seconds_before: of earlier calls that were stopped.
    """

    outputs: Sequence[str]
    write: Callable[[], Result]
    seconds_before: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step of a round.

    Attributes:
        inputs: digests of what goes in.
        work: does it; called by all processes together.
        tidy: removes temporary files; called by the first process after the record is written, and again if a kill came
            between the two.
    """

    name: Name
    round_index: int
    inputs: Inputs
    work: Callable[[], Work]
    tidy: Callable[[], None] = lambda: None


def _why_not(reuse: RunDirectory, step: Step) -> str:
    """Why a step of another run is not copied, though its images and labels have the same contents."""
    record = reuse.read_record(step.round_index, step.name)
    if record is None:
        return "it is not finished there"
    return f"its {', '.join(step.inputs.differences(record.inputs))} differ there"


def complete(course: Course, step: Step) -> StepRecord:
    """The record of a step; the step is done first, unless it is finished with the same inputs."""
    run, processes, index = course.run, course.processes, step.round_index

    def look() -> StepRecord | None:
        was_done = run.record_path(index, step.name).exists()
        kept_from = [role for role in course.not_reusable if role in step.inputs.digests]
        record = run.finished(index, step.name, step.inputs, reuse=None if kept_from else course.reuse)
        if record is not None:
            step.tidy()
        if course.reuse and record is not None and not was_done:
            course.journal.event("copied", round=index, step=step.name, source=str(course.reuse.root))
            course.journal.say(f"round {index}: {step.name}: copied from {course.reuse.root}")
        if course.reuse and record is None:
            reasons = [course.not_reusable[role] for role in kept_from] or [_why_not(course.reuse, step)]
            report = course.journal.warn if kept_from else course.journal.say
            report(f"round {index}: {step.name}: not copied from {course.reuse.root}: {'; '.join(reasons)}")
        return record

    record = processes.from_first(look)
    if record is not None:
        return record
    began = time.monotonic()
    work = step.work()
    elapsed = time.monotonic() - began

    def write() -> StepRecord:
        started = time.monotonic()
        result = work.write()
        seconds = work.seconds_before + elapsed + time.monotonic() - started
        record = run.finish(
            index, step.name, inputs=step.inputs, outputs=work.outputs, seconds=seconds, facts=result.facts
        )
        step.tidy()
        course.journal.event(EVENTS[step.name], round=index, seconds=round(record.seconds, 1), **result.facts)
        result.recorded()
        if result.sentence:
            course.journal.say(f"round {index}: {result.sentence} ({record.seconds:.0f} s)")
        return record

    return processes.from_first(write)
