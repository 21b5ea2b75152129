"""A rehearsal before round 0: what can be known to fail later fails before hours of training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch

from darseg.config.recipe import Recipe
from darseg.data.dataset import load_image
from darseg.data.manifest import Manifest, Sample, count_pixels
from darseg.model.network import Network
from darseg.model.predict import predict, predict_for_labeling
from darseg.model.windows import Protocol
from darseg.pseudo.distribution import ClassDistribution
from darseg.run.build import evaluation_protocol, labeling_protocol, place_to_predict
from darseg.run.directory import RunDirectory
from darseg.run.folds import held_out_role
from darseg.run.label_samples import check_disk
from darseg.run.labelers import Labeler, labeling_protocol_of
from darseg.run.remedies import explain_memory, less_to_predict


def rehearse(
    recipe: Recipe,
    networks: Mapping[int, Network],
    *,
    manifest: Manifest,
    run: RunDirectory,
    counts: list[int],
    largest: Mapping[str, Sample],
    labelers: Mapping[int, Labeler] | None = None,
) -> None:
    """Predict one image by each protocol of the recipe, as evaluation and labeling will.

    Args:
        networks: round → the network that begins there; they stay as they are. Nothing is written, and no random numbers
            are drawn.
        counts: labeled pixels per class.
        largest: role → its largest image, which needs most memory.
        labelers: round → the network that labels there, if it is not that of the round before.

    Raises DarsegError, as those steps would: for windows, scales, memory, class counts and disk space.
    """
    labelers = labelers or {}
    labeled = [index for index in range(len(recipe.rounds)) if recipe.pseudo_labels(index)]
    if labeled:
        ClassDistribution.from_counts(counts)
        check_disk(
            run.root,
            count_pixels(manifest.unlabeled),
            recipe.labeling.at(recipe.rounds[labeled[0]].labeling_ratio),
            classes=networks[0].classes,
            predict_twice=recipe.labeling.predict_twice,
            twice="set labeling.predict_twice=true",
        )
    roles = ("unlabeled", held_out_role(recipe, len(manifest.validation)))
    to_label = [largest[role] for role in roles if role in largest]
    labeled_here = [index for index in labeled if index not in labelers]
    own = {recipe.starts(by) for index in labeled_here for by in _may_label(recipe, index)}
    for begins, network in networks.items():
        here = recipe.at(begins)
        with torch.inference_mode(False):
            trial = place_to_predict(copy.deepcopy(network).eval())
        if sample := largest.get("validation"):
            protocol = evaluation_protocol(here)
            with explain_memory(less_to_predict(here, "evaluation", protocol, begun=False)):
                predict(trial, load_image(sample), protocol, name=str(sample.image))
        for sample in to_label if begins in own else ():
            protocol = labeling_protocol(here)
            with explain_memory(less_to_predict(here, "labeling", protocol, begun=False)):
                _label(trial, sample, protocol)
    for index, labeler in labelers.items():
        for sample in to_label:
            protocol = labeling_protocol_of(recipe, index, labeler)
            window = f"rounds.{index}.labels_window", labeler.spec.sides
            with (
                torch.random.fork_rng(devices=[]),  # loading builds a network, which draws random numbers
                explain_memory(less_to_predict(recipe, "labeling", protocol, begun=False, window=window)),
            ):
                _label(labeler.load(plain=recipe.labeling.align != "none"), sample, protocol)


def _may_label(recipe: Recipe, index: int) -> Iterable[int]:
    """The rounds of this run whose network may label in a round."""
    if recipe.result.keep == "best" and recipe.rounds[index].labels_from is None:
        return range(index)
    return (recipe.labeled_by(index),)


def _label(network: Network, sample: Sample, protocol: Protocol) -> None:
    image = load_image(sample)
    predict_for_labeling(network, image, protocol, name=str(sample.image))
