"""Label a folder of images with a trained network; shared parts of labeling folder to folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.config.recipe import LabelingConfig, Recipe
from darseg.data.files import ASIDE, read_json, refuse_links_out_of, remove_leftovers
from darseg.data.images import IMAGE_SUFFIXES, image_size
from darseg.data.manifest import Sample, count_pixels, find_files
from darseg.errors import DataError, RunError, faults
from darseg.model.predict import Protocol
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.labeling import Confidence, Labeling, LabelingMethod, Sampling
from darseg.pseudo.labelset import Predictor, prediction_path
from darseg.run.align_samples import AddSample, align_samples
from darseg.run.build import labeling_protocol, manifest_of, masks
from darseg.run.directory import digest_path, write_json
from darseg.run.evaluate import Trained, check_classes, load_trained
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests
from darseg.run.journal import Journal
from darseg.run.label_samples import LabelFiles, LabelTask, check_disk, label_samples, network_predictor
from darseg.run.records import read_object
from darseg.run.settings import digest_settings
from darseg.training.processes import Processes

MakePredictor = Callable[..., Predictor]
"""(confidence scale, folder=where predictions wait or None) → the predictor of a folder's files.

If decisions are aligned, it also gets weights=float64 [K], which multiply the probabilities.
"""


@dataclass(frozen=True)
class ClassCounts:
    """Labeled pixels per class, and the classes' names if they are known."""

    counts: Sequence[int]
    names: Sequence[str] | None


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
    """

    source: Path
    samples: Sequence[Sample]
    out: Path
    labeling: Labeling
    classes: ClassCounts
    seed: int
    inputs: Mapping[str, str]
    predict_twice: bool

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
    def alignment(self) -> Path:
        return self.out / ".alignment.json"

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


def label_folder(
    source: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    class_counts: Path | str | None = None,
    round_index: int | None = None,
    labeling_ratio: float | None = None,
    method: LabelingMethod | None = None,
    threshold: float | None = None,
    confidence: Confidence | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    predict_twice: bool = False,
    threads: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Pseudo-label a folder of images with a trained network: `out/ID.png` and `out/redistribution.json`.

    What is not given comes from the recipe: the run's own, or `recipe` for a checkpoint outside a run folder.

    Args:
        source: run folder (its last finished round, or `round_index`) or .safetensors checkpoint.
        images: folder of images, subfolders included; or one image.
        class_counts: JSON file of labeled pixels per class; None: they are counted in the recipe's labeled masks.

    Returns:
        the content of `redistribution.json`.
    """
    processes = Processes.here()
    trained = load_trained(source, round_index, recipe=recipe, threads=threads)
    recipe = trained.recipe
    job = FolderJob(
        source=Path(images),
        samples=_images_in(Path(images)),
        out=Path(out),
        classes=_count_classes(source, trained, class_counts),
        labeling=_complete_labeling(
            recipe,
            method=method,
            ratio=labeling_ratio,
            threshold=threshold,
            confidence=confidence,
            sampling=sampling,
        ),
        seed=seed if seed is not None else (recipe.seed if recipe else 0),
        inputs=_digest_predictor(trained),
        predict_twice=predict_twice,
    )
    predictor = partial(network_predictor, trained.network, _protocol_of(trained))
    return label_into_folder(job, predictor, image_size, processes=processes, console=console)


def _images_in(path: Path) -> list[Sample]:
    """The images of a folder, or the one image."""
    if path.is_file():
        return [Sample(path.stem, path)]
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Give a folder of images, or one image.")
    samples = [Sample(name, file) for name, file in find_files(path, IMAGE_SUFFIXES).items()]
    if not samples:
        raise DataError(f"{path}: no images there. Give a folder of {', '.join(IMAGE_SUFFIXES)} files.")
    return samples


def _count_classes(source: Path | str, trained: Trained, class_counts: Path | str | None) -> ClassCounts:
    """Labeled pixels per class: as given, otherwise counted in the recipe's labeled masks."""
    names = trained.classes().names
    if class_counts is not None:
        class_counts_file = read_class_counts(Path(class_counts))
        if len(class_counts_file.counts) != trained.network.classes:
            raise DataError(
                f"{class_counts} has {len(class_counts_file.counts)} class counts, but the network has "
                f"{trained.network.classes} classes. Give one count per class."
            )
        return ClassCounts(class_counts_file.counts, class_counts_file.names or names)
    if trained.recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder, so its labeled masks are not known. Give the labeled "
            "pixels per class with --class-counts COUNTS.json, or its recipe with --recipe RECIPE.yaml."
        )
    manifest = manifest_of(trained.recipe)
    check_classes(source, trained, manifest.classes)
    return ClassCounts(count_labels(masks(manifest.labeled), len(manifest.classes)).tolist(), names)


def _complete_labeling(
    recipe: Recipe | None,
    *,
    method: LabelingMethod | None,
    ratio: float | None,
    threshold: float | None,
    confidence: Confidence | None,
    sampling: Sampling | None,
) -> Labeling:
    """What is given, completed from the recipe: its labeling section and the ratio of its last round."""
    config = recipe.labeling if recipe else LabelingConfig()
    method = method or config.method
    if ratio is None and method != "global" and recipe:
        ratio = recipe.rounds[-1].labeling_ratio
    if threshold is None and method == config.method:
        threshold = config.threshold
    return Labeling(
        method,
        ratio=ratio,
        threshold=threshold,
        confidence=confidence or config.confidence,
        sampling=sampling or config.sampling,
    )


def _digest_predictor(trained: Trained) -> dict[str, str]:
    """Digests of what decides a network's predictions besides the images.

    A protocol that darseg 0.2 knew has the digest that 0.2 wrote, so that its folders go on working.
    """
    protocol = labeling_protocol(trained.recipe) if trained.recipe else None
    digests = earlier_digests(lambda: digest_format_1(protocol=as_format_1(protocol) if protocol else None))
    digests.append(digest_settings(protocol=protocol))
    return {"network": digest_path(trained.path), "protocol": digests[0]}


def _protocol_of(trained: Trained) -> Callable[[np.ndarray], Protocol]:
    """How images are predicted for labeling; without a recipe, each as a whole."""
    if trained.recipe is None:
        return trained.protocol
    protocol = labeling_protocol(trained.recipe)
    return lambda image: protocol


def label_into_folder(
    job: FolderJob,
    make_predictor: MakePredictor,
    size_of: Callable[[Path], tuple[int, ...]],
    *,
    processes: Processes,
    console: Console | None,
    add: AddSample | None = None,
) -> dict[str, Any]:
    """Label the files of a folder into another, or continue where an earlier call was stopped.

    Args:
        size_of: file → its height and width, for an estimate of the disk space that predictions need.
        add: how the scores of a file are sampled, if the job aligns decisions.

    Returns:
        the content of `redistribution.json`.
    """
    if job.source.is_dir() and job.source.resolve() in (job.out.resolve(), *job.out.resolve().parents):
        raise RunError(
            f"{job.out} lies in {job.source}, whose files are to be labeled. Choose a folder elsewhere."
        )
    task = LabelTask(job.labeling, ClassDistribution.from_counts(job.classes.counts), job.seed)
    if not processes.from_first(lambda: _begin(job, size_of)):
        progress = Journal(None, None, console or Console(quiet=not processes.first)).progress
        make_predictor = partial(make_predictor, folder=None if job.predict_twice else job.waiting)
        aligned = {}
        if add is not None and job.labeling.align != "none":
            read = make_predictor(task.scale).read
            alignment = align_samples(
                job.samples,
                task,
                read=read,
                add=add,
                file=job.alignment,
                processes=processes,
                progress=progress,
            )
            make_predictor = partial(make_predictor, weights=alignment.weights)
            aligned = {"alignment": alignment.to_json()}
        labels = label_samples(
            job.samples,
            task,
            make_predictor(task.scale),
            files=LabelFiles(job.out, job.histogram),
            processes=processes,
            progress=progress,
        )
        names = list(job.classes.names) if job.classes.names else None
        described = labels.to_json() | aligned | {"classes": names, "images": len(job.samples)}
        processes.from_first(lambda: _finish(job, described))
    return read_object(job.result, "Choose another folder.")


def _begin(job: FolderJob, size_of: Callable[[Path], tuple[int, ...]]) -> bool:
    """Record what is begun, or check that an earlier call began the same. Returns if that finished."""
    refuse_links_out_of(job.out)
    remove_leftovers(job.out)
    if job.marker.exists():
        _resume(job)
        return False
    if job.result.exists():
        _check_same(job, job.result, _changed(job, _read_record(job.result)))
        _remove_waiting(job)  # left by a kill right after the result was written
        return True
    if job.out.exists() and not job.out.is_dir():
        raise RunError(f"{job.out} is a file. Choose a folder for the label maps.")
    if job.out.exists() and any(path.suffix != ASIDE for path in job.out.iterdir()):
        raise RunError(
            f"{job.out} is not empty, and no earlier call of this command began it. Choose another folder."
        )
    if not job.predict_twice:
        check_disk(job.out, count_pixels(job.samples, size_of), "use --predict-twice")
    write_json(job.marker, {**job.record, "sizes": job.file_states})
    return False


def _resume(job: FolderJob) -> None:
    """Prepare to continue what an earlier call began. Raises RunError if it was something else."""
    earlier = _read_record(job.marker)
    changed = _changed(job, earlier)
    inputs = job.record["inputs"]
    only_files = changed == ["inputs"] and earlier["inputs"] | {"files": inputs["files"]} == inputs
    if not only_files or job.histogram.exists():
        _check_same(job, job.marker, changed)
        return
    if job.labeling.align != "none":
        _remove_waiting(job)  # all of it follows from the class weights, and these from all files
    # Files were fixed, added or removed while counting: the waiting predictions of all others are still valid.
    for name, state in earlier.get("sizes", {}).items():
        if job.file_states.get(name) != state:
            prediction_path(job.waiting, name).unlink(missing_ok=True)
    write_json(job.marker, {**job.record, "sizes": job.file_states})


def _finish(job: FolderJob, described: Mapping[str, Any]) -> None:
    """Write the result; from then on an equal call has nothing to do."""
    write_json(job.result, {**described, **job.record})
    job.marker.unlink()
    _remove_waiting(job)


def _remove_waiting(job: FolderJob) -> None:
    """Remove what is only kept while working."""
    shutil.rmtree(job.waiting, ignore_errors=True)
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


def _read_record(path: Path) -> dict[str, Any]:
    record = read_object(path, "Choose another folder.")
    keys = ("settings", "inputs")
    sizes = record.get("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(record.get(key), dict) for key in keys):
        raise RunError(f"{path} is not a file that darseg wrote. Choose another folder.")
    return record


def read_class_counts(path: Path) -> ClassCounts:
    """Labeled pixels per class from a JSON file: a list, or name → count. Raises DataError."""
    try:
        return check_class_counts(read_json(path, "utf-8-sig"), str(path))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Give the labeled pixels per class as JSON; for example [9000, 120]."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON ({error}). Give a list or name → count; for example [9000, 120]."
        ) from error


def check_class_counts(content: Any, source: str) -> ClassCounts:
    """A list of counts, or name → count, as counts and names. Raises DataError that begins with `source`."""
    names = list(map(str, content)) if isinstance(content, Mapping) else None
    counts = list(content.values()) if isinstance(content, Mapping) else content
    try:
        whole = [int(count) for count in counts]
    except (TypeError, ValueError, OverflowError):
        whole = []
    if not whole or any(isinstance(c, (bool, str)) or c != w for c, w in zip(counts, whole, strict=True)):
        raise DataError(
            f"{source}: expected the labeled pixels per class as whole numbers, a list or name → count; for example "
            "[9000, 120]."
        )
    negative = [
        f"{names[k] if names else f'class {k}'}: {count}" for k, count in enumerate(whole) if count < 0
    ]
    if negative:
        raise DataError(f"{source}: labeled pixels cannot be negative ({', '.join(negative)}).")
    return ClassCounts(whole, names)
