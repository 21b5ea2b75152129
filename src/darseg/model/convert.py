"""Checkpoints of released code (DARS, semseg, UniMatch) as networks that darseg loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from darseg.data.classes import ClassSet
from darseg.data.files import is_taken, named
from darseg.errors import WeightsError
from darseg.model.release import RELEASED, classes_in
from darseg.model.torchfile import read_bare
from darseg.model.weights import LoadReport, load_weights, save_network


def convert(
    source: Path | str,
    out: Path | str,
    architecture: str,
    classes: int | None = None,
    release_classifier: bool = False,
    class_set: ClassSet | None = None,
    strict: bool = True,
) -> LoadReport:
    """Convert a checkpoint of released code (DARS, semseg, UniMatch) to a network that darseg can load.

    Args:
        source: as `load_weights` reads it; of "model" and "model_ema" (UniMatch V2's average) the latter.
        architecture: a name of `RELEASED`, as "pspnet50", "deeplabv3plus_resnet50" or "dpt_dinov2_base".
        classes: K; None: as many as the file (or `class_set`) has.
        release_classifier: DeepLabv2 sums two of its four branches, as the published checkpoints need it.
        class_set: names and colors to keep in the file.
        strict: see `load_weights`; if not strict, parts that are not filled are drawn from seed 0.

    Raises WeightsError: a file that is missing, damaged, unsafe or of another network; `out` exists.
    """
    source, out = Path(source), Path(out)
    if architecture not in RELEASED:
        raise WeightsError(
            f"There is no released network {architecture!r}. Choose one of {', '.join(RELEASED)}."
        )
    if is_taken(out):
        raise WeightsError(
            f"{named(out)} exists already and was left as it is. Give another name, or remove it."
        )
    if out.suffix != ".safetensors":
        raise WeightsError(
            f"{out}: networks of darseg are safetensors files. Name it {out.with_suffix('.safetensors').name}."
        )
    released = RELEASED[architecture]
    if classes is None:
        classes = len(class_set) if class_set else classes_in(read_bare(source)) or released.classes
    if class_set and len(class_set) != classes:
        raise WeightsError(
            f"The network should have {classes} classes, but there are {len(class_set)} names. Give the names of these "
            f"{classes} classes."
        )
    spec = dataclasses.replace(
        released,
        classes=classes,
        release_classifier=release_classifier,
        class_names=class_set.names if class_set else (),
        class_colors=class_set.colors if class_set else (),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # parts that are not filled are the same each time
        network = spec.build()
    report = load_weights(network, source, strict, class_names=spec.class_names)
    if not report.whole:
        raise WeightsError(
            f"{source} holds only a backbone, without a classifier. Name it in a recipe (network.weights) and train."
        )
    save_network(network, out, spec)
    return report
