"""The classifier that removes classes from predictions: recipe → values, and what a run has of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from darseg.config.image_classes import ImageClassesConfig
from darseg.config.recipe import Recipe
from darseg.config.values import WeightsFile
from darseg.data.augment import Augmentation
from darseg.data.colors import Colors
from darseg.data.manifest import Manifest
from darseg.data.unlabeled import Boxes, StrongViews
from darseg.errors import RecipeError, faults
from darseg.methods.mlmt import Mlmt
from darseg.model.download import fetch
from darseg.model.image_classes import ImageClasses, ImageClassifier, load_image_classes, load_imagenet
from darseg.run.build import CACHE, classes_of
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.settings import digest_settings
from darseg.training.optimize import SGD
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

CLASSIFIER = "image_classes.safetensors"
"""File of a run's first round."""

BACKGROUND = "background"
"""The class that is never removed, unless the recipe says otherwise: it is what is left."""

STREAM = 0x6D6C6D74
"""Stands in seeds where rounds have their number."""

STRONG = StrongViews(
    Colors(jitter=(0.4, 0.4, 0.4, 0.1), jitter_share=1.0, gray_share=0.0, blur=(0.1, 2.0), blur_share=1.0),
    Boxes(share=0.0),
)
"""Strong views of MLMT's release."""


@dataclass(frozen=True)
class ClassifierPlan:
    """How the classifier is trained.

    Attributes:
        side: pixels of the square that images are scaled to.
    """

    backbone: str
    side: int
    classes: int
    how: Mlmt
    stage: Stage
    learning_rate: float
    optimizer: SGD = field(default_factory=SGD)

    @property
    def augmentation(self) -> Augmentation:
        """Of labeled images and weak views, which are squares already: they are mirrored."""
        return Augmentation((self.side, self.side), scale=(1.0, 1.0), rotate=0.0, blur=False)

    def digest(self) -> str:
        """Of everything that can change the result of the training."""
        # These two change nothing in it.
        stage = replace(self.stage, checkpoint_every=Stage.checkpoint_every, report_every=Stage.report_every)
        return digest_settings(settings=replace(self, stage=stage), strong=STRONG)


def plan_classifier(recipe: Recipe, manifest: Manifest, processes: int = 1) -> ClassifierPlan | None:
    """How a recipe trains its classifier of images; None if it has none.

    An epoch is floor(labeled images / batch) steps, at least 1. Raises RecipeError for what cannot be.
    """
    config, labeled = recipe.image_classes, len(manifest.labeled)
    if config is None:
        return None
    kept_classes(recipe)
    lines = []
    if not manifest.unlabeled:
        lines.append(
            "there are no unlabeled images to learn from. Set data.unlabeled, or remove image_classes"
        )
    for name in ("batch", "unlabeled_batch"):
        size = getattr(config, name)
        if size % processes:
            lines.append(f"image_classes.{name}: {size} images cannot be divided among {processes} processes")
    if lines:
        raise RecipeError(faults("The classifier of images cannot be trained so", lines))
    epoch_steps = classifier_epoch(config, labeled)
    return ClassifierPlan(
        backbone=config.backbone,
        side=config.size,
        classes=len(classes_of(recipe)),
        how=Mlmt(
            epoch_steps,
            batch=config.batch,
            unlabeled=config.unlabeled_batch,
            weight=config.weight,
            ramp=config.ramp,
            decay=config.decay,
        ),
        stage=_stage(recipe, config, epoch_steps),
        learning_rate=config.learning_rate,
        optimizer=SGD(config.momentum, config.weight_decay, nesterov=config.momentum > 0),
    )


def classifier_epoch(config: ImageClassesConfig, labeled: int) -> int:
    """Steps of an epoch with so many labeled images."""
    return max(1, labeled // config.batch)


def _stage(recipe: Recipe, config: ImageClassesConfig, epoch_steps: int) -> Stage:
    """The rate follows a cosine, from epoch to epoch."""
    return Stage(
        steps=config.epochs * epoch_steps,
        schedule=Schedule("cosine", lowest=config.lowest_rate, hold=epoch_steps),
        precision=recipe.training.precision,
        seed=(recipe.seed, STREAM),
        checkpoint_every=recipe.training.checkpoint_every,
        micro_batch=config.micro_batch,
    )


def kept_classes(recipe: Recipe) -> tuple[int, ...]:
    """Numbers of the classes that are never removed. Raises RecipeError for names that are no classes.

    By default the background; with `release_quirks` none, as in the release.
    """
    config, names = recipe.image_classes, classes_of(recipe).names
    assert config is not None
    if config.keep is None:
        return () if recipe.release_quirks else tuple(k for k, name in enumerate(names) if name == BACKGROUND)
    if unknown := [name for name in config.keep if name not in names]:
        raise RecipeError(
            f"image_classes.keep: {', '.join(unknown)}: there is no such class. The classes are {', '.join(names)}."
        )
    return tuple(names.index(name) for name in config.keep)


def initial_classifier(recipe: Recipe) -> tuple[ImageClassifier, str]:
    """The classifier as training begins, and a sentence that says where its weights come from.

    Raises WeightsError if the weights cannot be used: it never silently starts from random weights.
    """
    config = recipe.image_classes
    assert config is not None
    torch.manual_seed(recipe.seed)
    classifier = ImageClassifier(config.backbone, len(classes_of(recipe)))
    if config.weights == "none":
        return classifier, f"none; {config.backbone} starts from random numbers (image_classes.weights: none)"
    weights = config.weights
    fetched = isinstance(weights, WeightsFile)
    path = fetch(weights.url, weights.sha256, CACHE.expanduser()) if fetched else Path(weights)
    count, unused = load_imagenet(classifier, path)
    not_needed = f"; not needed: {', '.join(unused)}" if unused else ""
    return classifier, f"{count} tensors of {config.backbone} from {path}{not_needed}"


def with_decisions_of(recipe: Recipe, how: ImageClasses) -> ImageClasses:
    """A classifier that decides as a recipe says. The recipe's classes are those of the classifier."""
    config = recipe.image_classes
    assert config is not None
    return replace(how, threshold=config.threshold, keep=kept_classes(recipe), zero=recipe.release_quirks)


def classifier_path(run: RunDirectory) -> Path:
    """The classifier of a run, once it is trained."""
    return run.round(0) / CLASSIFIER


def trained_image_classes(recipe: Recipe, run: RunDirectory) -> ImageClasses | None:
    """A run's classifier, for its networks' files; None if it has none. Raises WeightsError."""
    if recipe.image_classes is None:
        return None
    return with_decisions_of(recipe, load_image_classes(classifier_path(run)))


def digest_image_classes(recipe: Recipe, run: RunDirectory) -> str:
    """Of the trained classifier and how it decides."""
    config = recipe.image_classes
    assert config is not None
    decides = {"threshold": config.threshold, "keep": kept_classes(recipe), "zero": recipe.release_quirks}
    return digest_settings(classifier=digest_path(classifier_path(run)), decides=decides)


def describe_classifier(recipe: Recipe, planned: ClassifierPlan) -> str:
    """What the classifier learns and does, as a sentence without its full stop."""
    config, how = recipe.image_classes, planned.how
    assert config is not None
    names = classes_of(recipe).names
    kept = ", ".join(names[k] for k in kept_classes(recipe)) or "none"
    removed = "have logit 0 in" if recipe.release_quirks else "are removed from"
    return (
        f"a classifier of whole images ({planned.backbone}, {planned.side}x{planned.side}) learns before round 0: "
        f"{config.epochs} epochs of {how.epoch_steps} steps, each with {how.batch} labeled and {how.unlabeled} unlabeled "
        f"images; classes below probability {config.threshold:g} {removed} every prediction (always kept: {kept})"
    )
