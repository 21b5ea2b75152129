"""Rounds with pseudo labels, also those that doubt them (DST, DMT): from the recipe to the method."""

from __future__ import annotations

from typing import Any

from darseg.config.recipe import Recipe
from darseg.methods.dynamic import PUBLISHED_GAMMA, DynamicLoss, dynamic_self_training
from darseg.methods.self_training import self_training
from darseg.training.method import Learner, Method


def dynamic_of(recipe: Recipe) -> DynamicLoss | None:
    """How rounds with pseudo labels weight them; None: all alike."""
    config = recipe.training.dynamic_loss
    if config is None:
        return None
    gamma = PUBLISHED_GAMMA[config.method] if config.gamma is None else config.gamma
    if config.method == "dst":
        return DynamicLoss("dst", gamma)
    return DynamicLoss("dmt", gamma, gamma if config.gamma_disagreed is None else config.gamma_disagreed)


def keeps_confidences(recipe: Recipe) -> bool:
    """Whether labeling writes how sure the labeler was of each label, for the loss."""
    how = dynamic_of(recipe)
    return how is not None and how.method == "dmt"


def rounds_method(learner: Learner, how: DynamicLoss | None, *, one_pass: bool, **settings: Any) -> Method:
    """The method of a round that is not online.

    Args:
        how: None, or without pseudo-labeled images: plain self-training.
        one_pass: as of `self_training`; a dynamic loss always is of one pass.
        settings: as of `self_training`.
    """
    if how is None or not settings["pseudo_batch"]:
        return self_training(learner, one_pass=one_pass, **settings)
    return dynamic_self_training(learner, how, **settings)


def describe_dynamic(recipe: Recipe) -> list[str]:
    """How rounds with pseudo labels learn, as a sentence, if not as published for DARS."""
    if (how := dynamic_of(recipe)) is None:
        together = "one pass: labeled and pseudo-labeled images go through the network together"
        return [together] if recipe.training.joins_halves and recipe.pseudo_rounds else []
    weight = f"the network's probability of the label, to the power {how.gamma:g}"
    if how.method == "dmt":
        weight += (
            f" ({how.gamma_disagreed:g} where it names another class, 0 where it is surer of that than the labeler "
            "was of the label)"
        )
    return [
        f"{how.method}: a pseudo-labeled pixel's weight is {weight}; labeled and pseudo-labeled images go through the "
        "network together, and the loss is divided by the labeled pixels of both"
    ]
