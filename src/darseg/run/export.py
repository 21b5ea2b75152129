"""Export a trained network to ONNX or torch.export, and check the file on real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darseg.data.files import is_taken, named
from darseg.data.images import IMAGE_SUFFIXES, read_image
from darseg.data.manifest import find_files
from darseg.errors import DataError, ExportError, RunError, faults
from darseg.model.export import check_suffix, metadata_of, write_exported
from darseg.model.parity import Parity
from darseg.run.best import BEST
from darseg.run.build import Module, check_overrides, evaluation_protocol, manifest_of
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import Trained, load_trained
from darseg.run.records import read_scored
from darseg.training.scores import number

COMPARED = 8
"""Most images to compare on, spread evenly over all; each is predicted twice."""

SELECTED = "on the validation images, on which use, strength and bound of the class weights were also decided"
"""How the mean IoU of aligned decisions was measured: it is a little optimistic."""

KEPT = "on the validation images, on which the round was also chosen among the run's rounds"
"""How the mean IoU of a run's best round was measured: the best of several is a little optimistic, too."""

ROLES = ("validation", "unlabeled", "labeled")
"""Roles of a recipe's images to compare on; the first role that has images is used."""


def export_network(
    source: Path | str,
    out: Path | str,
    round_index: int | None = None,
    images: Path | str | None = None,
    plain: bool = False,
    overrides: Sequence[str] = (),
) -> Parity:
    """Write a network for programs without darseg, and check that the file gives the same classes.

    The file takes images uint8 [B, H, W, 3], RGB, of any size and number. It gives classes uint8 [B, H, W] and logits
    float32 [B, K, H, W] of one window over the whole image, without mirror and other scales.

    Args:
        source: run folder or .safetensors checkpoint.
        out: OUT.onnx, or OUT.pt2 for torch.export; must not exist yet.
        round_index: of a run folder; None: its result.
        images: a folder (or file) of images to compare on, of which at most 8 are used; None: the recipe's validation
            images, or the unlabeled ones if there are none.
        plain: export the network as it was trained, also if the result's decisions are aligned.
        overrides: "data.root=PATH", if the run's data were moved.

    Raises ExportError, leaving no file, if it cannot be written, or if fewer than 99.9 % of the pixels of any image have
    the same class; RunError, WeightsError, DataError, NumericsError, StorageError.
    """
    source, out = Path(source), Path(out)
    check_suffix(out)
    if is_taken(out):
        raise ExportError(
            f"{named(out)} exists already and was left as it is. Give another name, or remove it."
        )
    check_overrides(source, overrides)
    trained = load_trained(source, round_index, overrides, plain=plain)
    compared = _images(source, trained, images)
    network = _on_cpu(trained.network)
    if network.image_classes is not None:  # does not move with the network
        _on_cpu(network.image_classes.classifier)
    metadata = metadata_of(trained.spec, trained.classes(), _facts(source, trained))
    return write_exported(network, out, compared, metadata=metadata)


def _on_cpu(module: Module) -> Module:
    """Move a network to the CPU, in the usual format of memory."""
    return module.cpu().to(memory_format=torch.contiguous_format)  # ty: ignore[no-matching-overload]


def _images(source: Path, trained: Trained, images: Path | str | None) -> dict[str, np.ndarray]:
    """Read up to COMPARED images, by name, from the folder or the recipe. Raises DataError, RunError."""
    if images is not None:
        folder = Path(images)
        paths = {folder.stem: folder} if folder.is_file() else find_files(folder, IMAGE_SUFFIXES)
        if not paths:
            raise DataError(
                f"{folder}: there are no images ({', '.join(IMAGE_SUFFIXES)}). Give another folder with --images."
            )
    elif trained.recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder. Give images to check the exported file with: --images "
            "FOLDER."
        )
    else:
        try:
            roles = manifest_of(trained.recipe).roles()
        except DataError as error:
            raise DataError(
                f"{error}\nOr give other images to check the exported file with: --images FOLDER."
            ) from None
        samples = next(filter(None, (roles[role] for role in ROLES)))
        paths = {sample.id: sample.image for sample in samples}
    names = list(paths)
    chosen = np.unique(np.linspace(0, len(names) - 1, COMPARED).round().astype(int))
    pictures, unreadable = {}, []
    for name in (names[index] for index in chosen):
        try:
            pictures[name] = read_image(paths[name], trained.reading())
        except DataError as error:
            unreadable.append(str(error))
    if unreadable:
        raise DataError(faults("Images to check the exported file with cannot be read", unreadable))
    return pictures


def _facts(source: Path, trained: Trained) -> Mapping[str, Any]:
    """Digest of the weights; for a run also how the network was trained and how it scored."""
    facts: dict[str, Any] = {"source_sha256": digest_path(trained.path)}
    if trained.alignment is not None:
        facts["alignment"] = trained.alignment.to_json()
    if trained.network.image_classes is not None:
        facts["image_classes"] = trained.network.image_classes.to_json()
    if trained.recipe is None or trained.round is None:
        return facts
    run, index = RunDirectory(source), trained.round
    training: dict[str, Any] = {
        "round": index,
        "labeling_ratio": trained.recipe.rounds[index].labeling_ratio,
    }
    if record := run.read_record(index, "train"):
        training["steps"] = record.steps
    if run.read_record(index, "evaluate"):
        training["mean_iou"] = number(run.scores(index, len(trained.classes())).mean_iou)
        best = trained.path == run.root / BEST
        notes = [KEPT] if best else []
        if trained.path == run.result(index) or (best and trained.alignment is not None):
            training["mean_iou"] = (
                read_scored(run.round(index) / "scores.json").get("aligned", {}).get("mean_iou")
            )
            notes = [SELECTED, *notes]
        if notes:
            training["mean_iou_note"] = "; ".join(notes)
        training["mean_iou_protocol"] = evaluation_protocol(trained.recipe).describe()
    return facts | {"training": training}
