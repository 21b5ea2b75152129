"""Label the files of a folder into another: begin, continue where a call was stopped, finish."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from darseg.data.files import ASIDE, real, refuse_links_out_of, remove_leftovers
from darseg.data.manifest import Sample, count_pixels
from darseg.data.maps import is_whole, label_path
from darseg.data.prediction import SCALES, ConfidenceScale
from darseg.errors import DarsegError, DataError, RecipeError, RunError, faults, shortened
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.labelset import Predictor, described_labels, prediction_path
from darseg.pseudo.scores import ScoreSource, scores_path
from darseg.pseudo.thresholds import AUTO
from darseg.run.class_counts import ClassCounts
from darseg.run.directory import write_json
from darseg.run.journal import Journal
from darseg.run.label_samples import check_disk, label_samples, waiting_bytes
from darseg.run.label_task import LabelFiles, LabelTask
from darseg.run.machines import check_alike
from darseg.run.outputs import held_folder
from darseg.run.records import damaged, read_object
from darseg.run.settings import digest_settings
from darseg.training.processes import Processes


@dataclass(frozen=True)
class FolderJob:
    """Files of one folder that are to be labeled into another.

    Attributes:
        source: the folder, or the only file.
        samples: its files.
        out: gets `ID.png`, `histogram.npz` and `redistribution.json`.
        classes: labeled pixels per class.
        seed: of the random sampling.
        inputs: digests of what decides the predictions besides the files.
        predict_twice: predict again instead of keeping predictions on the disk.
        from_files: the files hold scores; otherwise they are images.
    """

    source: Path
    samples: Sequence[Sample]
    out: Path
    labeling: Labeling
    classes: ClassCounts
    seed: int
    inputs: Mapping[str, str]
    predict_twice: bool
    from_files: bool = False

    @property
    def result(self) -> Path:
        return self.out / "redistribution.json"

    @property
    def marker(self) -> Path:
        return self.out / ".begun.json"

    @property
    def histogram(self) -> Path:
        return self.out / "histogram.npz"

    @property
    def waiting(self) -> Path:
        return self.out / ".predictions"

    @property
    def scores(self) -> Path:
        return self.out / ".scores"

    @property
    def alignment(self) -> Path:
        return self.out / ".alignment.json"

    @property
    def scale(self) -> ConfidenceScale:
        return SCALES[self.labeling.confidence]

    @cached_property
    def file_states(self) -> dict[str, list[int]]:
        """Id → size and time of the last change: arrays of equal shape make files of equal size."""
        states, problems = {}, []
        for sample in self.samples:
            try:
                stat = sample.image.stat()
                states[sample.id] = [stat.st_size, stat.st_mtime_ns]
            except OSError as error:
                dangling = sample.image.is_symlink() and isinstance(error, FileNotFoundError)
                reason = "it is a link to a file that does not exist" if dangling else error.strerror
                problems.append(f"{sample.image}: {reason}")
        if problems:
            raise DataError(
                faults(f"{self.source}: these files cannot be read. Restore or remove them", problems)
            )
        return states

    @cached_property
    def record(self) -> dict[str, Any]:
        """What decides the result; the same in a later call, or that call is refused."""
        settings = {"seed": self.seed, "class_counts": list(self.classes.counts)}
        files = digest_settings(files=self.file_states)
        return {
            "settings": self.labeling.settings() | settings,
            "inputs": {**self.inputs, "files": files},
        }


def label_into_folder(
    job: FolderJob,
    source: Predictor | ScoreSource,
    size_of: Callable[[Path], tuple[int, ...]],
    *,
    processes: Processes,
    console: Console | None,
) -> dict[str, Any]:
    """Label the files of a folder into another, or continue where an earlier call was stopped.

    Args:
        source: predictions of the files; their scores if decisions are aligned.
        size_of: file → its height and width, for an estimate of the disk space that predictions need.

    Returns:
        the content of `redistribution.json`.
    """
    if job.labeling.ratio == "auto":
        raise RecipeError(AUTO)
    if job.source.is_dir() and real(job.source) in (real(job.out), *real(job.out).parents):
        raise RunError(
            f"{job.out} lies in {job.source}, whose files are to be labeled. Choose a folder elsewhere."
        )
    task = LabelTask(
        job.labeling,
        ClassDistribution.from_counts(job.classes.counts),
        job.seed,
        inputs=digest_settings(**job.record),
    )
    journal = Journal(None, None, console or Console(quiet=not processes.first))
    images = digest_settings(ids=[sample.id for sample in job.samples])
    decisive = digest_settings(
        **{**job.record, "inputs": dict(job.inputs)}
    )  # times of copied files may differ
    check_alike(processes, {"the files to label": images, "settings and network": decisive})
    with contextlib.ExitStack() as stack:
        if processes.from_first(lambda: _begin(job, size_of, stack, say=journal.say)):
            return _read_result(job)
        try:
            labels = label_samples(
                job.samples,
                task,
                source,
                files=LabelFiles(job.out, job.histogram, job.alignment),
                processes=processes,
                progress=journal.progress,
            )
        except DarsegError:
            if processes.first:
                _forget(job)
            raise
        names = list(job.classes.names) if job.classes.names else None
        described = labels.to_json() | {"classes": names, "images": len(job.samples)}
        processes.from_first(lambda: _finish(job, described))
    return _read_result(job)


def _begin(
    job: FolderJob,
    size_of: Callable[[Path], tuple[int, ...]],
    stack: contextlib.ExitStack,
    *,
    say: Callable[[str], None],
) -> bool:
    """Record what is begun, or check that an earlier call began the same. Returns if that finished.

    Args:
        stack: gets the lock of the folder, so that no second call works in it.
        say: prints a line.
    """
    if locked := job.out.is_dir():
        stack.enter_context(held_folder(job.out))
    refuse_links_out_of(job.out)
    remove_leftovers(job.out)
    if job.marker.exists():
        _resume(job)
        return False
    if job.result.exists():
        _check_same(job, job.result, _changed(job, _read_record(job.result)))
        missing = sum(not is_whole(label_path(job.out, sample.id)) for sample in job.samples)
        if not missing:
            _remove_waiting(job)  # left by a kill right after the result was written
            return True
        say(
            f"{missing} of {len(job.samples)} label maps in {job.out} are missing, empty or cut off; they are made again"
        )
        write_json(job.marker, {**job.record, "sizes": job.file_states})
        return False
    if job.out.exists() and not job.out.is_dir():
        raise RunError(f"{job.out} is a file. Choose a folder for the label maps.")
    if job.out.exists() and any(path.suffix != ASIDE for path in job.out.iterdir()):
        raise RunError(
            f"{job.out} is not empty, and no earlier call of this command began it. Choose another folder."
        )
    what_waits = {
        "classes": len(job.classes.counts),
        "predict_twice": job.predict_twice,
        "from_files": job.from_files,
    }
    if waiting_bytes(job.labeling, **what_waits):
        pixels = count_pixels(job.samples, size_of)
        check_disk(job.out, pixels, job.labeling, twice="use --predict-twice", **what_waits)
    if not locked:  # from here on the folder is there
        stack.enter_context(held_folder(job.out))
        if any(path.suffix != ASIDE for path in job.out.iterdir()):
            raise RunError(f"{job.out}: another call has just begun there. Choose another folder.")
    write_json(job.marker, {**job.record, "sizes": job.file_states})
    return False


def _has_results(job: FolderJob) -> bool:
    """Whether anything that a call worked for is in the folder."""
    if job.histogram.exists() or job.result.exists():
        return True
    return any(path.is_file() for folder in (job.waiting, job.scores) for path in folder.rglob("*"))


def _forget(job: FolderJob) -> None:
    """Leave nothing behind of a call that could use none of the files, as with mistyped class counts."""
    if _has_results(job):
        return
    _remove_waiting(job)
    job.marker.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        job.out.rmdir()


def _resume(job: FolderJob) -> None:
    """Prepare to continue what an earlier call began. Raises RunError if it was something else."""
    earlier = _read_record(job.marker)
    changed = _changed(job, earlier)
    if changed and not _has_results(job):
        job.alignment.unlink(missing_ok=True)  # of the other settings or files
        write_json(job.marker, {**job.record, "sizes": job.file_states})
        return
    inputs = job.record["inputs"]
    only_files = changed == ["inputs"] and earlier["inputs"] | {"files": inputs["files"]} == inputs
    if not only_files or job.histogram.exists():
        _check_same(job, job.marker, changed)
        return
    # Class weights follow from all files, and aligned predictions from these: without weights, labeling removes them.
    job.alignment.unlink(missing_ok=True)
    # Files were fixed, added or removed while counting: what waits of all others is still valid.
    for name, state in earlier.get("sizes", {}).items():
        if job.file_states.get(name) != state:
            prediction_path(job.waiting, name).unlink(missing_ok=True)
            scores_path(job.scores, name).unlink(missing_ok=True)
    write_json(job.marker, {**job.record, "sizes": job.file_states})


def _finish(job: FolderJob, described: Mapping[str, Any]) -> None:
    """Write the result; from then on an equal call has nothing to do."""
    write_json(job.result, {**described, **job.record})
    job.marker.unlink()
    _remove_waiting(job)


def _remove_waiting(job: FolderJob) -> None:
    """Remove what is only kept while working."""
    for folder in (job.waiting, job.scores):
        shutil.rmtree(folder, ignore_errors=True)
    job.alignment.unlink(missing_ok=True)


def _changed(job: FolderJob, earlier: Mapping[str, Any]) -> list[str]:
    """Which parts of a job's record differ from those of an earlier call: "settings", "inputs"."""
    return [key for key in job.record if earlier.get(key) != job.record[key]]


def _check_same(job: FolderJob, path: Path, changed: Sequence[str]) -> None:
    """Raise RunError if anything changed since the record in `path` was written."""
    if changed:
        raise RunError(
            f"{job.out} was begun with other {' and '.join(changed)} (see {path.name}). Choose another folder, or "
            "restore what was changed and continue in this one."
        )


def _read_result(job: FolderJob) -> dict[str, Any]:
    """The content of `redistribution.json`. Raises RunError if it is damaged."""
    record, count = read_object(job.result, "Choose another folder."), len(job.classes.counts)
    try:
        _, kept, _ = described_labels(record)
        names, images = record["classes"], record["images"]
        if len(kept) != count:
            raise ValueError(f"counts of {len(kept)} classes instead of {count}")
        if names is not None and not (
            isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"'classes' is {shortened(names)}, expected {count} names")
        if type(images) is not int or images < 0:
            raise ValueError(f"'images' is {shortened(images)}, expected their number")
    except (ValueError, TypeError, KeyError, OverflowError, DataError) as error:
        raise damaged(job.result, f"{type(error).__name__}: {error}", "Choose another folder.") from error
    return record


def _read_record(path: Path) -> dict[str, Any]:
    record = read_object(path, "Choose another folder.")
    keys = ("settings", "inputs")
    sizes = record.get("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(record.get(key), dict) for key in keys):
        raise RunError(f"{path} is not a file that darseg wrote. Choose another folder.")
    return record
