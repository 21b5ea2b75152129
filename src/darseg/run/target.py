"""The class shares that a recipe aims at: for what, how certain, what shrinking needs."""

from __future__ import annotations

from collections.abc import Sequence

from darseg.config.recipe import Recipe
from darseg.data.manifest import Manifest
from darseg.data.resampling import LEVEL
from darseg.errors import DataError, RecipeError
from darseg.pseudo.distribution import count_each
from darseg.pseudo.labeled_shares import LabeledShares, labeled_shares
from darseg.run.build import masks
from darseg.run.folds import assigned_folds, fold_warnings
from darseg.run.steps.align import why_off
from darseg.training.bootstrap import LEAST_HELD_OUT

NAMED = 12
"""Most uncertain classes that a line names."""


Counted = tuple[list[int], LabeledShares | None, tuple[int, ...]]
"""Labeled pixels per class; how certain their shares are, if they are to be shrunk; folds, if the run cross-fits."""


def count_labeled(recipe: Recipe, manifest: Manifest, warnings: list[str]) -> Counted:
    """What a run needs to know of its label maps; adds to `warnings` what folds cannot measure."""
    each = count_each(masks(manifest.labeled), len(manifest.classes))
    labeled = labeled_shares(each) if recipe.labeling.prior == "shrunk" else None
    folds = assigned_folds(recipe, manifest, each)
    warnings += fold_warnings(manifest.classes.names, each, folds)
    return each.sum(axis=0).tolist(), labeled, folds


def labeled_shares_of(manifest: Manifest) -> LabeledShares:
    """The class shares of the labeled images. Raises DataError if their label maps cannot be used."""
    return labeled_shares(count_each(masks(manifest.labeled), len(manifest.classes)))


def check_prior(recipe: Recipe, manifest: Manifest) -> None:
    """Raise RecipeError if labeled shares cannot be shrunk for lack of validation images."""
    held_out = len(manifest.validation)
    if recipe.labeling.prior == "shrunk" and held_out < LEAST_HELD_OUT:
        raise RecipeError(
            f"labeling.prior: shrunk calibrates the network's class shares on validation images; there are {held_out}, "
            f"and at least {LEAST_HELD_OUT} are needed. Name more in data.validation, or remove the key."
        )


def targets_of(recipe: Recipe, manifest: Manifest) -> list[str]:
    """What aims at the labeled images' class shares."""
    labeling, online = recipe.labeling, recipe.online
    targets = []
    if recipe.pseudo_rounds and (labeling.method == "dars" or labeling.align != "none"):
        targets.append("pseudo labels")
    if any(config.use == "online" for config in recipe.rounds) and (online.aligned or online.align != "none"):
        targets.append("online rounds")
    if recipe.result.align != "off" and why_off(recipe, manifest, [1]) is None:
        targets.append("the result")
    return targets


def target_lines(recipe: Recipe, manifest: Manifest) -> tuple[str, ...]:
    """Lines about the class shares that the recipe aims at; none if it aims at none.

    It reads all label maps of the labeled images.
    """
    targets = targets_of(recipe, manifest)
    if not targets:
        return ()
    begin = f"target of {_listed(targets)}: the class shares of {len(manifest.labeled)} labeled image(s)"
    try:
        shares = labeled_shares_of(manifest)
    except DataError as error:
        first = str(error).partition("\n")[0].removesuffix(":")
        return (f"{begin}; they cannot be shown: {first}. darseg check lists all faults",)
    lines = [f"{begin}; {describe_uncertain(shares, manifest.classes.names)}"]
    if recipe.labeling.prior == "shrunk":
        lines.append(
            "labeling.prior: shrunk moves the target of pseudo labels toward the network's estimate, calibrated on "
            f"{len(manifest.validation)} validation images"
        )
    return tuple(lines)


def describe_uncertain(shares: LabeledShares, names: Sequence[str]) -> str:
    """Which shares are uncertain, with their intervals; or that none is."""
    level = f"{LEVEL:.0%} interval"
    lines = uncertain_shares(shares, names)
    if not lines:
        return f"no {level} spans a factor of 2"
    more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return f"uncertain ({level}): {', '.join(lines[:NAMED])}{more}"


def uncertain_shares(shares: LabeledShares, names: Sequence[str]) -> list[str]:
    """Name and interval of each class whose share is uncertain."""
    return [
        f"{name} {shares.describe(k)}"
        for k, (name, uncertain) in enumerate(zip(names, shares.uncertain, strict=True))
        if uncertain
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
