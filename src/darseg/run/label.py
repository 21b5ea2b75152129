"""Label images: with a trained network, or from predictions that another framework wrote; one process or many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.config.recipe import Recipe
from darseg.data.files import write_whole
from darseg.data.images import IMAGE_SUFFIXES, image_size, read_image
from darseg.data.manifest import Sample, count_pixels, find_files
from darseg.data.prediction import BYTES_PER_PIXEL, SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError, RunError, StorageError
from darseg.model.network import Network
from darseg.model.predict import Memory, Protocol, predict
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labeling import Confidence, Labeling, Method, Sampling
from darseg.pseudo.labelset import (
    FactsLog,
    Predictor,
    PseudoLabelSet,
    assign_labels,
    count_predictions,
    prediction_path,
)
from darseg.pseudo.redistribute import decide_array
from darseg.pseudo.thresholds import Thresholds, choose_thresholds
from darseg.run.build import labeling_protocol, manifest_of, masks, set_threads
from darseg.run.directory import digest_path, digest_settings, write_json
from darseg.run.evaluate import check_classes, load_trained
from darseg.run.journal import Advance, Journal
from darseg.training.processes import Processes

SCORE_SUFFIXES = (".npy", ".npz")

Progress = Callable[[str, int], AbstractContextManager[Advance]]


def label_samples(
    samples: Sequence[Sample],
    classes: int,
    predictor: Predictor,
    choose: Callable[[ConfidenceHistogram], Thresholds],
    scale: ConfidenceScale,
    seed: int,
    round_index: int,
    labels: Path,
    histogram: Path,
    processes: Processes,
    progress: Progress,
    logs: Path | None = None,
) -> PseudoLabelSet:
    """Count, choose, assign: `labels/ID.png` for all samples, each written by one of the processes.

    Killed and called again with the same arguments it goes on: predictions that wait, a histogram that is there,
    and label maps that are there are not made again.

    Args:
        histogram: file of the confidences of all processes, written between counting and assigning.
        logs: folder for the facts of images, a file for each process; None: not kept.
    """
    mine = processes.share(samples)
    if histogram.exists():
        counted = ConfidenceHistogram.from_bytes(histogram.read_bytes())
        processes.wait()
    else:
        with progress("predict", len(mine)) as advance:
            part = processes.together(lambda: count_predictions(mine, classes, predictor, scale, advance))
        counted = ConfidenceHistogram(processes.add_up(part.counts), scale)
        processes.from_first(lambda: write_whole(histogram, counted.to_bytes()))
    thresholds = processes.together(lambda: choose(counted))
    log = None if logs is None else FactsLog(logs / f"images_{processes.rank}.jsonl")
    with progress("label", len(mine)) as advance:
        kept = processes.together(
            lambda: assign_labels(mine, thresholds, seed, round_index, predictor, labels, advance, log)
        )
    return PseudoLabelSet(labels, counted, thresholds, processes.add_up(kept))


def network_predictor(
    network: Network, protocol: Callable[[np.ndarray], Protocol], scale: ConfidenceScale, folder: Path | None
) -> Predictor:
    """Predictions of images by a network in eval mode."""

    memory = Memory()

    def run(sample: Sample, image: np.ndarray) -> Prediction:
        return predict(network, image, protocol(image), str(sample.image), scale, memory)

    return Predictor(lambda sample: read_image(sample.image), run, folder)


def check_disk(folder: Path, pixels: int, remedy: str) -> None:
    """Raise StorageError where waiting predictions of so many pixels might not fit on the disk of `folder`."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, BYTES_PER_PIXEL * pixels
    if free < needed:
        raise StorageError(
            f"{folder}: {free / 1e6:.0f} MB are free, and predictions that wait between counting and assigning may "
            f"need {needed / 1e6:.0f} MB ({BYTES_PER_PIXEL} bytes a pixel). Free some space, or {remedy}: then "
            "nothing waits, and each image is predicted twice."
        )


def label_folder(
    source: Path | str,
    images: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | None = None,
    class_counts: Path | str | None = None,
    round_index: int | None = None,
    labeling_ratio: float | None = None,
    method: Method | None = None,
    threshold: float | None = None,
    confidence: Confidence | None = None,
    sampling: Sampling | None = None,
    seed: int | None = None,
    predict_twice: bool = False,
    threads: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Pseudo-label all images below a folder with a trained network: `out/ID.png` and `out/redistribution.json`.

    What is not given comes from the recipe: the run's own, or `recipe` for a checkpoint outside a run folder.

    Args:
        source: run folder (its last finished round, or `round_index`) or .safetensors checkpoint.
        class_counts: JSON file of labeled pixels per class; else counted in the recipe's labeled masks.

    Returns:
        the content of `redistribution.json`.
    """
    processes = Processes.here()
    images, out = Path(images), Path(out)
    trained = load_trained(source, round_index)
    recipe = recipe or trained.recipe
    if recipe is None and class_counts is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder: give the labeled pixels per class with "
            "--class-counts COUNTS.json, or the recipe it was trained with by --recipe."
        )
    set_threads(threads or (recipe.threads if recipe else None))
    defaults = recipe.labeling if recipe else None
    method = method or (defaults.method if defaults else "dars")
    if defaults and recipe:
        same = defaults.method == method
        if threshold is None and method == "global" and same:
            threshold = defaults.threshold
        if labeling_ratio is None and method != "global":
            labeling_ratio = recipe.rounds[-1].labeling_ratio
    names = trained.classes().names
    if class_counts is not None:
        counts, given = read_class_counts(Path(class_counts))
        if len(counts) != trained.network.classes:
            raise DataError(
                f"{class_counts}: {len(counts)} counts, but the network has {trained.network.classes} classes."
            )
        names = given or names
    else:
        assert recipe is not None
        manifest = manifest_of(recipe)
        check_classes(source, trained, manifest.classes)
        counts = count_labels(masks(manifest.labeled), len(manifest.classes)).tolist()
    labeling = Labeling(
        method,
        ratio=labeling_ratio,
        threshold=threshold,
        confidence=confidence or (defaults.confidence if defaults else "float16"),
        sampling=sampling or (defaults.sampling if defaults else "random"),
    )
    seed = seed if seed is not None else (recipe.seed if recipe else 0)
    settings = labeling.settings() | {"seed": seed, "class_counts": counts}
    found = {images.stem: images} if images.is_file() else find_files(images, IMAGE_SUFFIXES)
    samples = [Sample(name, path) for name, path in found.items()]

    def protocol(image: np.ndarray) -> Protocol:
        return labeling_protocol(recipe) if recipe else trained.protocol(image)

    inputs = {
        "network": digest_path(trained.path),
        "protocol": digest_settings(protocol=asdict(labeling_protocol(recipe)) if recipe else None),
    }
    make = partial(network_predictor, trained.network, protocol)
    return _run(
        samples,
        images,
        out,
        names,
        labeling,
        settings,
        inputs,
        make,
        image_size,
        predict_twice,
        IMAGE_SUFFIXES,
        processes,
        console,
    )


def redistribute_folder(
    predictions: Path | str,
    out: Path | str,
    class_counts: Path | str | Sequence[int] | Mapping[str, int],
    labeling_ratio: float | None = None,
    *,
    method: Method = "dars",
    threshold: float | None = None,
    confidence: Confidence = "float16",
    sampling: Sampling = "random",
    seed: int = 0,
    probabilities: bool = False,
    predict_twice: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Label images from predictions of any framework: `predictions/ID.npy` (or .npz) → `out/ID.png`.

    Files hold logits, float16 or float32 [K, H, W]; sizes may differ. Constant memory, restartable; see
    `redistribute` for the arguments, and for the same on arrays.

    Args:
        class_counts: labeled pixels per class, a list or name → count; or a JSON file of either.

    Returns:
        the content of `out/redistribution.json`: lists of K, `threshold` (None for a class never predicted), `keep`,
        `wanted`, `predicted`, `accepted`, `kept`.

    Raises DataError naming every file that cannot be used, once all others are done.
    """
    processes = Processes.here()
    predictions, out = Path(predictions), Path(out)
    if not predictions.is_dir():
        raise DataError(f"{predictions}: no such folder. Give the one that holds ID.npy or ID.npz files.")
    if isinstance(class_counts, (str, Path)):
        counts, names = read_class_counts(Path(class_counts))
    else:
        counts, names = _class_counts(class_counts, "class counts")
    labeling = Labeling(
        method, ratio=labeling_ratio, threshold=threshold, confidence=confidence, sampling=sampling
    )
    settings = labeling.settings() | {"seed": seed, "class_counts": counts}
    samples = [Sample(name, path) for name, path in find_files(predictions, SCORE_SUFFIXES).items()]

    def make(scale: ConfidenceScale, folder: Path | None) -> Predictor:
        def run(sample: Sample, scores: np.ndarray) -> Prediction:
            return decide_array(scores, len(counts), scale, probabilities, str(sample.image))

        return Predictor(lambda sample: read_scores(sample.image), run, folder)

    return _run(
        samples,
        predictions,
        out,
        names,
        labeling,
        settings,
        {"probabilities": str(probabilities)},
        make,
        lambda path: read_scores(path).shape[-2:],
        predict_twice,
        SCORE_SUFFIXES,
        processes,
        console,
    )


def _run(
    samples: Sequence[Sample],
    where: Path,
    out: Path,
    names: Sequence[str] | None,
    labeling: Labeling,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[ConfidenceScale, Path | None], Predictor],
    size_of: Callable[[Path], tuple[int, ...]],
    predict_twice: bool,
    suffixes: Sequence[str],
    processes: Processes,
    console: Console | None,
) -> dict[str, Any]:
    """Label into a folder of its own, going on where an earlier call was stopped."""
    if not samples:
        raise DataError(f"{where}: nothing to label there; wanted are files {', '.join(suffixes)}.")
    distribution = ClassDistribution.from_counts(settings["class_counts"])
    choose = partial(choose_thresholds, labeling=labeling, distribution=distribution)
    scale = SCALES[labeling.confidence]
    if where.is_dir() and where.resolve() in (out.resolve(), *out.resolve().parents):
        raise RunError(f"{out} lies in {where}, whose files are to be labeled: choose a folder elsewhere.")
    # Arrays of one shape are files of one size, so the time of the last change counts as well.
    sizes = {sample.id: [(about := sample.image.stat()).st_size, about.st_mtime_ns] for sample in samples}
    begun = {"settings": dict(settings), "inputs": {**inputs, "files": digest_settings(files=sizes)}}
    result, marker, waiting = out / "redistribution.json", out / ".begun.json", out / ".predictions"
    histogram = out / "histogram.npz"

    def begin() -> bool:
        """Whether everything is done already."""
        for path in (marker, result):
            if not path.exists():
                continue
            earlier = _read_record(path)
            changed = [key for key in begun if earlier.get(key) != begun[key]]
            if path == marker and changed == ["inputs"] and not histogram.exists():
                # Files that were mended, added or removed while counting: what waits for the others still holds.
                files = {"files": begun["inputs"]["files"]}
                if {**earlier["inputs"], **files} == begun["inputs"]:
                    for name, size in earlier["sizes"].items():
                        if sizes.get(name) != size:
                            prediction_path(waiting, name).unlink(missing_ok=True)
                    write_json(marker, {**begun, "sizes": sizes})
                    changed = []
            if changed:
                raise RunError(
                    f"{out} was begun with other {' and '.join(changed)} (see {path.name}). Choose another folder "
                    "for these, or put back what was changed to go on with that one."
                )
            if path == result:
                shutil.rmtree(waiting, ignore_errors=True)  # left by a kill just after the result
                return True
            return False
        if out.exists() and (not out.is_dir() or any(p.suffix != ".part" for p in out.iterdir())):
            raise RunError(f"{out} is not empty and was not begun by this command: choose another folder.")
        if not predict_twice:
            check_disk(out, count_pixels(samples, size_of), "use --predict-twice")
        write_json(marker, {**begun, "sizes": sizes})
        return False

    if not processes.from_first(begin):
        journal = Journal(None, None, console or Console(quiet=not processes.first))
        labels = label_samples(
            samples,
            len(settings["class_counts"]),
            make(scale, None if predict_twice else waiting),
            choose,
            scale,
            settings["seed"],
            0,
            out,
            histogram,
            processes,
            journal.progress,
        )
        described = labels.to_json() | {"classes": list(names) if names else None, "images": len(samples)}

        def end() -> None:
            write_json(result, described | begun)
            marker.unlink()
            shutil.rmtree(waiting, ignore_errors=True)

        processes.from_first(end)
    return json.loads(result.read_text())


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict) and all(
            isinstance(record.get(key), dict) for key in ("settings", "inputs")
        ):
            return record
        found = "something else"
    except (OSError, ValueError) as error:
        found = str(error)
    raise RunError(f"{path}: this record is damaged or not darseg's ({found}). Choose another folder.")


def read_scores(path: Path) -> np.ndarray:
    """The array of a .npy file, or the only one of a .npz; nothing in it is run. Raises DataError."""
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.ndarray):
            with content:
                names = content.files
                content = content[names[0]] if len(names) == 1 else names
    except Exception as error:  # zip, zlib, tokenizer and numpy raise a dozen kinds for damaged files
        raise DataError(
            f"{path}: cannot be read as an array of numbers ({type(error).__name__}: {error}). Write it again with "
            "numpy.save."
        ) from error
    if isinstance(content, list):
        raise DataError(f"{path}: holds {len(content)} arrays ({', '.join(content)}); wanted one.")
    if not isinstance(content, np.ndarray):
        raise DataError(f"{path}: holds no array of numbers. Write it again with numpy.save.")
    return content


def read_class_counts(path: Path) -> tuple[list[int], list[str] | None]:
    """Labeled pixels per class from a JSON file: a list, or name → count. Returns counts and names."""
    try:
        return _class_counts(json.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Give labeled pixels per class as JSON, as in [9000, 120]."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error


def _class_counts(given: Any, where: str) -> tuple[list[int], list[str] | None]:
    names = list(map(str, given)) if isinstance(given, Mapping) else None
    counts = list(given.values()) if isinstance(given, Mapping) else given
    try:
        whole = [int(count) for count in counts]
    except (TypeError, ValueError, OverflowError):
        whole = []
    if not whole or any(isinstance(c, (bool, str)) or c != w for c, w in zip(counts, whole, strict=True)):
        raise DataError(f"{where}: wanted whole numbers, a list of K or name → count, as in [9000, 120].")
    negative = [
        f"{names[k] if names else f'class {k}'}: {count}" for k, count in enumerate(whole) if count < 0
    ]
    if negative:
        raise DataError(f"{where}: labeled pixels cannot be negative ({', '.join(negative)}).")
    return whole, names
