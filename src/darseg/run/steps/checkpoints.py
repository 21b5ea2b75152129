"""Which checkpoint a stopped step goes on from; damaged ones are left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from darseg.errors import FormatError, RunError, faults
from darseg.run.course import Course
from darseg.training.checkpoint import Checkpoint, load_checkpoint


def latest_checkpoint(
    course: Course, paths: Callable[[], Sequence[Path]], event: str, **fields: int
) -> tuple[Checkpoint | None, float]:
    """The checkpoint to go on from, and the seconds of training before it; None and 0 without one.

    The first process finds it and removes damaged later ones.

    Args:
        paths: lists them, the latest first.
        event: of the journal, for each of them; with its step, seconds and these fields.
    """
    whole: list[Checkpoint] = []  # the first process reads it to see whether it is whole

    def find() -> str | None:
        path, checkpoint = usable_checkpoint(course, paths())
        if path is None or checkpoint is None:
            return None
        whole.append(checkpoint)
        return path.relative_to(course.run.root).as_posix()

    # Its place in the run folder, which may have another path on another machine.
    name = course.processes.from_first(find)
    if name is None:
        return None, 0.0
    checkpoint = whole[0] if whole else load_checkpoint(course.run.root / name)
    wanted = {**fields, "step": checkpoint.step}
    seconds = [entry["seconds"] for entry in course.journal.events(event) if wanted.items() <= entry.items()]
    return checkpoint, seconds[-1] if seconds else 0.0


def usable_checkpoint(course: Course, paths: Sequence[Path]) -> tuple[Path | None, Checkpoint | None]:
    """The first checkpoint that can be read, and its path; None if there is no checkpoint.

    Removes damaged ones before it, with a warning. Raises RunError, naming all, if none of those there can be read.
    """
    damaged: dict[Path, RunError] = {}
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
        except FormatError:
            raise  # whole, but of a later version
        except RunError as error:
            damaged[path] = error
            continue
        for damaged_path in damaged:
            # Otherwise it would count as the newest of the checkpoints we keep.
            course.journal.warn(f"{damaged_path} is damaged and was removed; going back to {path.name}")
            damaged_path.unlink()
        return path, checkpoint
    if damaged:
        raise RunError(faults("No checkpoint of this round can be read", list(map(str, damaged.values()))))
    return None, None
