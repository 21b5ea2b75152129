"""Controls: labels alone, for as much of something as a variant has; and shared first rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from darseg.config.online import OnlineConfig
from darseg.config.recipe import LabelingConfig, ProtocolConfig, Recipe, ResultConfig, RoundConfig
from darseg.config.training import TrainingConfig
from darseg.run.build import beginnings
from darseg.run.plan import Round, plan_rounds
from darseg.run.settings import digest_text

_PREDICTING = tuple(ProtocolConfig.model_fields)
"""Keys of `labeling` that say how images are predicted, also without pseudo labels: evaluation takes its window."""

_OF_PSEUDO_LABELS = ("half_batch", "pseudo_batch", "pseudo_weight", "one_pass", "dynamic_loss")
"""Keys of `training` that have no effect without pseudo labels."""


def rounds_of(recipe: Recipe, *, labeled: int, unlabeled: int) -> list[Round]:
    """The rounds of a recipe with their steps and batches. Raises RecipeError if they cannot be.

    Args:
        labeled, unlabeled: numbers of images.
    """
    black = dict.fromkeys(beginnings(recipe), (0, 0, 0))  # of padding, which does not matter here
    return plan_rounds(recipe, labeled=labeled, unlabeled=unlabeled, fills=black)


def images_of(rounds: Sequence[Round]) -> int:
    """Images that rounds show to the network, each as often as a step takes it; views do not count."""
    return sum(
        planned.steps
        * (planned.batch + (planned.online.batch if planned.online is not None else planned.pseudo_batch))
        for planned in rounds
    )


def steps_of(rounds: Sequence[Round]) -> int:
    """Training steps of all rounds."""
    return sum(planned.steps for planned in rounds)


def steps_for_images(recipe: Recipe, images: int) -> int:
    """Steps on labels alone that see as many images, rounded up."""
    return math.ceil(images / recipe.training.batch)


def learns_from_labels_alone(recipe: Recipe) -> bool:
    """Whether neither a round of a recipe nor its classifier of images learns from unlabeled images."""
    return recipe.image_classes is None and not any(
        recipe.pseudo_labels(index) or config.use == "online" for index, config in enumerate(recipe.rounds)
    )


def labels_alone(recipe: Recipe, steps: int) -> Recipe:
    """The recipe in one round of labeled images alone, with the network that it ends with.

    What has no effect then is at its default, so that equal controls are equal recipes.
    """
    first = recipe.rounds[0]
    own = first if not recipe.pseudo_labels(0) and first.use != "online" else RoundConfig(steps=steps)
    last = recipe.at(len(recipe.rounds) - 1)
    only = RoundConfig(steps=steps, scale=own.scale, learning_rate=own.learning_rate)
    # The classifier of images learns from unlabeled ones.
    return _without_unused(last.model_copy(update={"rounds": (only,), "image_classes": None}))


def _without_unused(recipe: Recipe) -> Recipe:
    """A recipe of labels alone in which keys of pseudo labels and online rounds are at their defaults."""
    kept = {name: getattr(recipe.labeling, name) for name in _PREDICTING}
    usual, result = TrainingConfig(), recipe.result
    if len(recipe.rounds) == 1:
        result = result.model_copy(update={"keep": ResultConfig().keep})
    return recipe.model_copy(
        update={
            "labeling": LabelingConfig(**kept),
            "online": OnlineConfig(),
            "result": result,
            "training": recipe.training.model_copy(
                update={key: getattr(usual, key) for key in _OF_PSEUDO_LABELS}
            ),
        }
    )


def without_effectless(recipe: Recipe) -> Recipe:
    """The recipe, and one of labels alone without what has no effect in it."""
    return _without_unused(recipe) if learns_from_labels_alone(recipe) else recipe


def digest_recipe(recipe: Recipe) -> str:
    """SHA-256 of a recipe's values."""
    return digest_text(json.dumps(recipe.model_dump(mode="json"), sort_keys=True))


def digests_of_beginnings(recipe: Recipe) -> list[str]:
    """For each k the digest of what decides the training of the first k + 1 rounds.

    Equal digests, equal rounds. They say where to look: what is taken over is decided by the step records of the runs.
    """
    digests = []
    for count in range(1, len(recipe.rounds) + 1):
        begun = recipe.model_copy(
            update={
                "rounds": recipe.rounds[:count],
                "evaluation": ProtocolConfig(),
                "result": ResultConfig(keep=recipe.result.keep),
                "threads": None,
            }
        )
        if learns_from_labels_alone(begun):
            begun = _without_unused(begun).model_copy(update={"labeling": LabelingConfig()})
        digests.append(digest_recipe(begun))
    return digests
