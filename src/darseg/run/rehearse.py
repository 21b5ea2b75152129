"""A rehearsal before round 0: what can be known to fail later fails before hours of training."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from darseg.config.recipe import Recipe
from darseg.data.images import read_image
from darseg.data.manifest import Manifest, Sample, count_pixels
from darseg.model.fold import fold_batchnorm
from darseg.model.network import Network
from darseg.model.predict import predict, predict_for_labeling
from darseg.pseudo.distribution import ClassDistribution
from darseg.run.build import evaluation_protocol, labeling_protocol, place
from darseg.run.directory import RunDirectory
from darseg.run.label_samples import check_disk
from darseg.run.remedies import explain_memory, less_to_predict


def rehearse(
    recipe: Recipe,
    network: Network,
    *,
    manifest: Manifest,
    run: RunDirectory,
    counts: list[int],
    largest: Mapping[str, Sample],
) -> None:
    """Predict one image by each protocol of the recipe, as evaluation and labeling will.

    Args:
        network: the initial one; it stays as it is. Nothing is written, and no random numbers are drawn.
        counts: labeled pixels per class.
        largest: role → its largest image, which needs most memory.

    Raises DarsegError, as those steps would: for windows, scales, memory, class counts and disk space.
    """
    labels = recipe.pseudo_rounds
    if labels:
        ClassDistribution.from_counts(counts)
        check_disk(
            run.root,
            count_pixels(manifest.unlabeled),
            recipe.labeling.at(labels[0].labeling_ratio),
            classes=network.classes,
            predict_twice=recipe.labeling.predict_twice,
            twice="set labeling.predict_twice=true",
        )
    with torch.inference_mode(False):
        trial = place(fold_batchnorm(copy.deepcopy(network).eval()))
    if sample := largest.get("validation"):
        protocol = evaluation_protocol(recipe)
        with explain_memory(less_to_predict(recipe, "evaluation", protocol, begun=False)):
            predict(trial, read_image(sample.image, sample.reading), protocol, name=str(sample.image))
    if labels and (sample := largest.get("unlabeled")):
        protocol = labeling_protocol(recipe)
        with explain_memory(less_to_predict(recipe, "labeling", protocol, begun=False)):
            predict_for_labeling(
                trial, read_image(sample.image, sample.reading), protocol, name=str(sample.image)
            )
