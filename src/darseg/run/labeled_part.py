"""Which of the labeled images a round learns from: all, or the part that it names."""

from __future__ import annotations

from collections.abc import Sequence

from darseg.config.recipe import Recipe
from darseg.data.manifest import Sample
from darseg.data.splits import part_bounds, part_of
from darseg.errors import RecipeError


def labeled_in(recipe: Recipe, index: int, labeled: int) -> int:
    """How many labeled images a round learns from. Raises RecipeError if its part is empty."""
    part = recipe.rounds[index].labeled_part
    if part is None:
        return labeled
    first, end = part_bounds(part, labeled)
    if end <= first:
        raise RecipeError(
            f"rounds.{index}.labeled_part: {list(part)} holds none of the {labeled} labeled images. Give a larger part."
        )
    return end - first


def labeled_samples(recipe: Recipe, index: int, labeled: Sequence[Sample]) -> Sequence[Sample]:
    """The labeled images that a round learns from: all, or the part that it names, in their order."""
    part = recipe.rounds[index].labeled_part
    if part is None:
        return labeled
    chosen = part_of([sample.id for sample in labeled], part, recipe.seed)
    return tuple(sample for sample in labeled if sample.id in chosen)
