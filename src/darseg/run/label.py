"""Label a folder of images with a trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from darseg.choices import Trainer
from darseg.config.recipe import LabelingConfig, Recipe
from darseg.data.images import IMAGE_SUFFIXES, Reading, image_size
from darseg.data.manifest import Sample, find_files
from darseg.data.pictures import marked_line
from darseg.data.suffixes import unread_files, unread_line
from darseg.data.walk import unreadable
from darseg.errors import DataError, RunError
from darseg.model.aligned import unfold_alignment
from darseg.model.weights import read_alignment
from darseg.model.windows import Protocol
from darseg.pseudo.distribution import count_labels
from darseg.pseudo.labeling import AlignSettings, Confidence, Labeling, LabelingMethod, Sampling
from darseg.pseudo.labelset import Predictor
from darseg.pseudo.scores import ScoreSource
from darseg.run.build import check_overrides, labeling_protocol, manifest_of, masks
from darseg.run.class_counts import ClassCounts, read_class_counts
from darseg.run.directory import digest_path
from darseg.run.evaluate import Trained, describe_decisions, load_trained, result_path
from darseg.run.formats import as_format_1, digest_format_1, earlier_digests
from darseg.run.journal import Journal
from darseg.run.label_files import FolderJob, label_into_folder
from darseg.run.label_samples import network_predictor, network_scores
from darseg.run.remedies import explain_memory, less_at_once
from darseg.run.settings import digest_settings
from darseg.run.trainers import check_trainer, write_for
from darseg.training.processes import Processes


def label_folder(
    source: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | Path | str | None = None,
    class_counts: Path | str | None = None,
    round_index: int | None = None,
    labeling_ratio: float | None = None,
    method: LabelingMethod | None = None,
    threshold: float | None = None,
    confidence: Confidence | None = None,
    sampling: Sampling | None = None,
    align: bool | AlignSettings | None = None,
    seed: int | None = None,
    predict_twice: bool = False,
    threads: int | None = None,
    console: Console | None = None,
    plain: bool = False,
    overrides: Sequence[str] = (),
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Pseudo-label a folder of images with a trained network: `out/ID.png` and `out/redistribution.json`.

    What is not given comes from the recipe: the run's own, or `recipe` for a checkpoint. Returns that JSON content.

    Args:
        source: run folder (its result, or the round `round_index`) or .safetensors checkpoint.
        images: folder of images, with subfolders; or one image.
        class_counts: JSON file of labeled pixels per class; None: they are counted in the recipe's labeled masks.
        align: first give decisions the labeled pixels' class shares; see `align`.
        predict_twice: predict again instead of keeping predictions, or with `align` scores of all classes, on the disk.
        plain: label with the network as it was trained, also if the result's decisions are aligned.
        overrides: "data.root=PATH", if the recipe's data were moved.
        trainer: write a data file for this trainer, too: `out/yolo.yaml`, `out/lightly_train.yaml` or `out/mmseg.py`.
    """
    processes = Processes.here()
    check_overrides(source, overrides)
    check_trainer(trainer, Path(images), Path(out))
    trained = load_trained(source, round_index, overrides, recipe=recipe, threads=threads, plain=plain)
    job = FolderJob(
        source=Path(images),
        samples=_images_in(Path(images), trained.reading()),
        out=Path(out),
        classes=processes.from_first(lambda: _count_classes(source, trained, class_counts)),
        labeling=_complete_labeling(
            trained.recipe,
            method=method,
            ratio=labeling_ratio,
            threshold=threshold,
            confidence=confidence,
            sampling=sampling,
            align=align,
        ),
        seed=_seed(trained) if seed is None else seed,
        inputs=_digest_predictor(trained),
        predict_twice=predict_twice,
    )
    return _label(job, trained, trainer, processes=processes, console=console)


def _label(
    job: FolderJob,
    trained: Trained,
    trainer: Trainer | None,
    *,
    processes: Processes,
    console: Console | None,
) -> dict[str, Any]:
    _report(job, trained, console=console if processes.first else Console(quiet=True))
    size_of = partial(image_size, reading=trained.reading())
    with explain_memory(less_at_once(trained.recipe, "labeling")):
        record = label_into_folder(
            job, _source_of(job, trained), size_of, processes=processes, console=console
        )
    if trainer is not None:
        classes = trained.classes()
        processes.from_first(
            lambda: write_for(trainer, job.source, job.out, samples=job.samples, classes=classes)
        )
    return record


def describe_labeling(
    record: Mapping[str, Any], source: Path | str, round_index: int | None = None, *, plain: bool = False
) -> str:
    """A line that says whether labels are of plain or aligned decisions, and of which class weights.

    Args:
        record: what `label_folder` returned; the others are its arguments.
    """
    if "alignment" not in record:
        return describe_decisions(source, round_index, plain)
    decisions = "aligned on these images" if record["alignment"]["converged"] else "plain"
    path = result_path(source, round_index)
    left_out = "" if read_alignment(path) is None else f"; the class weights in {path} are left out"
    return f"Decisions: {decisions}{left_out}"


def _seed(trained: Trained) -> int:
    """The recipe's seed."""
    return trained.recipe.seed if trained.recipe else 0


def _report(job: FolderJob, trained: Trained, *, console: Console | None) -> None:
    """Say how many images have an orientation mark, and what of the folder is not read."""
    journal = Journal(None, None, console or Console())
    images = (sample.image for sample in job.samples)
    if line := marked_line(images, upright=trained.reading().upright):
        journal.say(line)
    if trained.recipe is not None and trained.recipe.labeling.prior == "shrunk":
        journal.say(
            "The recipe's labeling.prior: shrunk is for rounds of a run; here the labeled shares are the aim"
        )
    if job.source.is_dir():
        for line in (
            unread_line(job.source, unread_files(job.source, IMAGE_SUFFIXES)),
            unreadable(job.source),
        ):
            if line:
                journal.warn(line)


def _source_of(job: FolderJob, trained: Trained) -> Predictor | ScoreSource:
    """A network's predictions of the job's images, or its scores if decisions are aligned."""
    network, protocol = trained.network, _protocol_of(trained)
    if not job.labeling.of_scores:
        return network_predictor(
            network, protocol, job.scale, folder=None if job.predict_twice else job.waiting
        )
    scores = None if job.predict_twice else job.scores
    if job.labeling.normalized:
        return network_scores(network, protocol, job.scale)
    # Class weights that are part of the network would be multiplied by those of these images.
    plain = unfold_alignment(network)
    return network_scores(plain, protocol, job.scale, scores=scores, predictions=job.waiting)


def _images_in(path: Path, reading: Reading) -> list[Sample]:
    """The images of a folder, or the one image."""
    if path.is_file():
        return [Sample(path.stem, path, reading=reading)]
    if not path.is_dir():
        raise DataError(f"{path}: no such folder. Give a folder of images, or one image.")
    samples = [Sample(name, file, reading=reading) for name, file in find_files(path, IMAGE_SUFFIXES).items()]
    if not samples:
        raise DataError(f"{path}: no images there. Give a folder of {', '.join(IMAGE_SUFFIXES)} files.")
    return samples


def _count_classes(source: Path | str, trained: Trained, class_counts: Path | str | None) -> ClassCounts:
    """Labeled pixels per class: as given, otherwise counted in the recipe's labeled masks."""
    names = trained.classes().names
    if class_counts is not None:
        known = trained.spec.class_names or trained.recipe is not None
        given = read_class_counts(Path(class_counts), names if known else None)
        if len(given.counts) != trained.network.classes:
            raise DataError(
                f"{class_counts} has {len(given.counts)} class counts, but the network has "
                f"{trained.network.classes} classes. Give one count per class."
            )
        return ClassCounts(given.counts, given.names or names)
    if trained.recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder, so its labeled masks are not known. Give the labeled "
            "pixels per class with --class-counts COUNTS.json, or its recipe with --recipe RECIPE.yaml."
        )
    manifest = manifest_of(trained.recipe)
    return ClassCounts(count_labels(masks(manifest.labeled), len(manifest.classes)).tolist(), names)


def _complete_labeling(
    recipe: Recipe | None,
    *,
    method: LabelingMethod | None,
    ratio: float | None,
    threshold: float | None,
    confidence: Confidence | None,
    sampling: Sampling | None,
    align: bool | AlignSettings | None,
) -> Labeling:
    """What is given, completed from the recipe: its labeling section and the ratio of its last round."""
    config = recipe.labeling if recipe else LabelingConfig()
    method = method or config.method
    if ratio is None and method != "global" and recipe:
        ratio = [*recipe.rounds, *recipe.pseudo_rounds][-1].labeling_ratio
    if threshold is None and method == config.method:
        threshold = config.threshold
    if align is None:
        align = config.align != "none"
    return Labeling(
        method,
        ratio=ratio,
        threshold=threshold,
        confidence=confidence or config.confidence,
        sampling=sampling or config.sampling,
        normalized=config.normalized
        and method == "cbst"
        and (confidence or config.confidence) == "float16"
        and not align,
        **AlignSettings.fields(align, config.bound, config.strength),
    )


def _digest_predictor(trained: Trained) -> dict[str, str]:
    """Digests of what decides a network's predictions besides the images.

    A protocol that darseg 0.2 knew has the digest that 0.2 wrote, so that its folders go on working.
    """
    protocol = labeling_protocol(trained.recipe) if trained.recipe else None
    digests = earlier_digests(lambda: digest_format_1(protocol=as_format_1(protocol) if protocol else None))
    digests.append(digest_settings(protocol=protocol))
    decisions = {"decisions": "plain"} if trained.unaligned else {}
    if trained.order is not None:
        decisions["order"] = str(list(trained.order))
    return {"network": digest_path(trained.path), "protocol": digests[0], **decisions}


def _protocol_of(trained: Trained) -> Protocol | None:
    """How images are predicted for labeling; None without a recipe: each as a whole."""
    return None if trained.recipe is None else labeling_protocol(trained.recipe)
