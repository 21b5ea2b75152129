"""Label images from predictions that another framework wrote to files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.data.files import check_regular
from darseg.data.manifest import Sample, find_files
from darseg.data.prediction import Prediction
from darseg.errors import DataError
from darseg.pseudo.labeling import AlignSettings, Confidence, Labeling, LabelingMethod, Sampling
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.redistribute import (
    check_array,
    decide_array,
    looks_like_probabilities,
    probabilities_message,
)
from darseg.pseudo.scores import ScoreSource
from darseg.run.class_counts import ClassCounts, check_class_counts, read_class_counts
from darseg.run.journal import Journal
from darseg.run.label_files import FolderJob, label_into_folder
from darseg.training.processes import Processes

SCORE_SUFFIXES = (".npy", ".npz")


def redistribute_folder(
    predictions: Path | str,
    out: Path | str,
    class_counts: Path | str | Sequence[int] | Mapping[str, int],
    labeling_ratio: float | None = None,
    *,
    method: LabelingMethod = "dars",
    threshold: float | None = None,
    confidence: Confidence = "float16",
    sampling: Sampling = "random",
    align: bool | AlignSettings = False,
    seed: int = 0,
    probabilities: bool = False,
    predict_twice: bool = False,
    names: Sequence[str] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Label images from predictions of any framework: `predictions/ID.npy` (or .npz) → `out/ID.png`.

    Files hold logits, floating-point numbers [K, H, W]; sizes may differ. Memory does not grow with the number of files,
    and a stopped call continues. With `align` the files are read once more. For the arguments, and for arrays in memory,
    see `redistribute`.

    Args:
        class_counts: labeled pixels per class, a list or name → count; or a JSON or YAML file of either.
        names: the classes in the order of the channels; None: counts by name have the channels' order.

    Returns:
        the content of `out/redistribution.json`: lists of K, `threshold` (None for a class never predicted), `keep`,
        `wanted`, `predicted`, `accepted`, `kept`.

    Raises:
        DataError: names every file that cannot be used, after all others are done.
    """
    processes = Processes.here()
    choices: Any = {"threshold": threshold, "confidence": confidence, "sampling": sampling}
    journal = Journal(None, None, Console(stderr=True, quiet=not processes.first))
    classes = _count_classes(class_counts, names, journal)
    job = FolderJob(
        source=Path(predictions),
        samples=_scores_in(Path(predictions)),
        out=Path(out),
        classes=classes,
        labeling=Labeling(method, labeling_ratio, **choices, **AlignSettings.fields(align)),
        seed=seed,
        inputs={"probabilities": str(probabilities)},
        predict_twice=predict_twice,
        from_files=True,
    )
    tally = _Tally()
    source = _source_of(job, len(classes.counts), probabilities, tally=tally)
    record = label_into_folder(
        job, source, lambda path: read_scores(path).shape[-2:], processes=processes, console=console
    )
    tally.warn(journal, len(job.samples), processes)
    return record


def _count_classes(
    class_counts: Path | str | Sequence[int] | Mapping[str, int],
    names: Sequence[str] | None,
    journal: Journal,
) -> ClassCounts:
    """Labeled pixels per class; if only their names say the order of the channels, that is printed."""
    if isinstance(class_counts, (str, Path)):
        classes = read_class_counts(Path(class_counts), names)
    else:
        classes = check_class_counts(class_counts, "class counts", names)
    if classes.names and names is None:
        journal.say(
            "note: the channels of the predictions are taken to be the classes in the order of the class counts: "
            f"{', '.join(classes.names)}. If theirs is another, give it with --classes."
        )
    return classes


class _Tally:
    """Ids of the files that are given as logits and look like probabilities."""

    def __init__(self) -> None:
        self.like_probabilities: set[str] = set()

    def warn(self, journal: Journal, files: int, processes: Processes) -> None:
        """Warn of them, those of all processes together."""
        alike = int(processes.add_up(np.array([len(self.like_probabilities)]))[0])
        if alike:
            journal.warn(probabilities_message(f"the scores of {alike} of {files} file(s)"))


def _source_of(
    job: FolderJob, classes: int, probabilities: bool, *, tally: _Tally
) -> Predictor | ScoreSource:
    """The predictions in the job's files, or their scores if decisions are aligned."""
    folder = None if job.predict_twice else job.waiting

    def read(sample: Sample) -> np.ndarray:
        return read_scores(sample.image)

    def decide(sample: Sample, scores: np.ndarray, weights: np.ndarray | None = None) -> Prediction:
        if not probabilities and looks_like_probabilities(scores):
            tally.like_probabilities.add(sample.id)
        return decide_array(
            scores, classes, job.scale, probabilities=probabilities, name=str(sample.image), weights=weights
        )

    if job.labeling.align == "none":
        return Predictor(read, decide, folder)
    return ScoreSource(
        read,
        lambda sample, scores: check_array(scores, classes, str(sample.image)).numpy(),
        decide,
        plain=decide,
        predictions=folder,
        probabilities=probabilities,
    )


def _scores_in(folder: Path) -> list[Sample]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the folder of the ID.npy or ID.npz files.")
    samples = [Sample(name, path) for name, path in find_files(folder, SCORE_SUFFIXES).items()]
    if not samples:
        raise DataError(f"{folder}: no predictions there. Expected files {' or '.join(SCORE_SUFFIXES)}.")
    return samples


_PARSING = threading.Lock()
LARGEST = 4 << 30
"""Bytes of a .npz file unpacked, whose size does not show what it asks for."""


def _load(path: Path) -> np.ndarray | list[str]:
    """The array of a file; the names of the arrays if a .npz does not have exactly one."""
    check_regular(path)
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        if (size := sum(member.file_size for member in content.zip.infolist())) > LARGEST:
            raise ValueError(
                f"it would have {size:,} bytes unpacked, of {LARGEST:,} at most; a .npy file has no limit"
            )
        names = content.files
        return content[names[0]] if len(names) == 1 else names


def read_scores(path: Path) -> np.ndarray:
    """The array of a .npy file, or the only one of a .npz; nothing is executed. Raises DataError."""
    try:
        try:
            content = _load(path)
        except SystemError:
            # Python 3.11 can confuse threads that parse literals at the same time, as numpy does for the heads of files
            # ("AST constructor recursion depth mismatch", seen with 3.11.7). It is not the file's fault.
            with _PARSING:
                content = _load(path)
    except Exception as error:  # zip, zlib, tokenizer and numpy raise a dozen kinds for damaged files
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
        raise DataError(
            f"{path}: cannot be read as an array of numbers ({type(error).__name__}: {error}). Write it again with "
            "numpy.save."
        ) from error
    if isinstance(content, list):
        raise DataError(f"{path}: contains {len(content)} arrays ({', '.join(content)}); expected one.")
    if not isinstance(content, np.ndarray):
        raise DataError(f"{path}: contains no array of numbers. Write it again with numpy.save.")
    return content
