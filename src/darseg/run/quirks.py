"""What `release_quirks` reproduces in a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from darseg.config.recipe import Recipe
from darseg.methods.adversarial import Adversarial
from darseg.model.heads import ATROUS_DILATIONS, RELEASE_BRANCHES
from darseg.run.plan import Round, head_factor_of


def describe_quirks(recipe: Recipe, rounds: Sequence[Round]) -> str:
    """The slips of releases that the rounds reproduce, as a sentence."""
    quirks = ["the first step of each later round has learning rate 0"] if len(rounds) > 1 else []
    of_deeplab = [
        planned for planned in rounds if recipe.at(planned.begins).network.architecture == "deeplabv2"
    ]
    judged = [planned for planned in rounds if isinstance(planned.online, Adversarial)]
    if any(planned not in judged for planned in of_deeplab):
        quirks.append(f"stage 4 learns {head_factor_of(recipe):g} times as fast, like the head")
    if any(planned in judged for planned in of_deeplab):
        quirks.append("blocks of the backbone learn 3 times as fast, their shortcuts 4 times")
    if of_deeplab:
        quirks.append(f"the classifier sums {RELEASE_BRANCHES} of its {len(ATROUS_DILATIONS)} branches")
    if judged:
        quirks.append("padding of unlabeled images counts like their pixels")
    if recipe.image_classes is not None:
        quirks.append("classes that an image does not show get logit 0 instead of being removed")
        if recipe.image_classes.keep is None:
            quirks[-1] += ", the background as well"
    return f"release_quirks reproduces slips of the release: {'; '.join(quirks) or 'none in this recipe'}"
