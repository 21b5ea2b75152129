"""What each round does: its steps, schedule, batches, and the method that trains its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from darseg.config.recipe import Recipe
from darseg.config.training import TrainingConfig
from darseg.data.augment import Augmentation
from darseg.data.batches import part_sizes
from darseg.errors import RecipeError, faults
from darseg.methods.adversarial import Adversarial
from darseg.methods.consistency import Consistency, Supervision
from darseg.methods.teacher import with_teacher
from darseg.model.network import Network
from darseg.model.recompute import recompute_blocks
from darseg.pseudo.labeling import Ratio
from darseg.run.best import check_keep
from darseg.run.build import auxiliary_weight_of, check_sizes, classes_of, pick_device, spec_of
from darseg.run.dynamic import dynamic_of, rounds_method
from darseg.run.labeled_part import labeled_in
from darseg.run.learners import LearnerSettings, learner_of, second_network
from darseg.run.online import colors_of, fitted, online_method, online_of, teacher_of, undivided
from darseg.training.loss import LabeledLoss, balanced_weights
from darseg.training.method import Method
from darseg.training.optimize import SGD, AdamW, OptimizerKind
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

PUBLISHED_RATES = {"sgd": (0.01, 10.0), "adamw": (5e-6, 40.0)}
"""Optimizer → learning rate of the backbone, and the heads' factor: DARS's release, and UniMatch V2's for DINOv2."""

SYNCED = ("pspnet", "deeplabv3plus", "linear")
"""Architectures whose BatchNorm sees the images of all GPUs, as published: DARS's release, UniMatch, DINOv2."""

POOLED = ("pspnet", "deeplabv3plus")
"""Architectures with a BatchNorm over the mean of the whole image, which needs two images."""

REPORT_EVERY = 10
"""Steps between figures in the journal and on TensorBoard."""


def augmentation_of(recipe: Recipe, round_index: int, fill: tuple[int, int, int]) -> Augmentation:
    """How images are augmented in a round; `fill` is the color of padding (RGB, 0 to 255)."""
    how = recipe.augmentation
    return Augmentation(
        crop=recipe.at(round_index).training.crop,
        scale=tuple(recipe.rounds[round_index].scale or how.scale),
        rotate=how.rotate,
        blur=how.blur,
        mirror=how.mirror,
        fill=fill,
        colors=colors_of(how.colors),
    )


@dataclass(frozen=True)
class Round:
    """One round: what it labels, how long it trains, on which part of the schedule.

    Attributes:
        labeling_ratio: share of the unlabeled pixels to label before training, or "auto"; None in a round without pseudo
            labels, and if a global threshold decides.
        span: fractions of the poly curve that its steps cover.
        batch: labeled images of a step.
        pseudo_batch: pseudo-labeled images of a step; 0 in a round without pseudo labels.
        epoch_steps: steps of one epoch.
        epochs: how many; None if the recipe counts in steps.
        micro_batch: images per forward pass.
        online: how it learns from unlabeled images while it trains; None: it does not.
        begins: the round in which its network began: this one, if it does not go on with that of the round before.
    """

    index: int
    labeling_ratio: Ratio | None
    augmentation: Augmentation
    steps: int
    span: tuple[float, float]
    learning_rate: float
    batch: int
    pseudo_batch: int
    epoch_steps: int
    epochs: int | None
    micro_batch: int
    online: Consistency | Adversarial | None = None
    begins: int = 0

    @property
    def labels(self) -> bool:
        """Whether it learns from pseudo labels."""
        return self.pseudo_batch > 0


def plan_rounds(
    recipe: Recipe, *, labeled: int, unlabeled: int, fills: Mapping[int, tuple[int, int, int]]
) -> list[Round]:
    """All rounds with their steps: an epoch is floor(images / batch) steps, at least 1.

    Images are the labeled ones in a round without unlabeled images, the unlabeled ones in others, unless the round says
    otherwise (epoch_over). Raises RecipeError if rounds need unlabeled images and there are none, or if a part of the
    labeled images is empty.

    Args:
        fills: round in which a network begins → the color of its padding.
    """
    indices = range(len(recipe.rounds))
    if unlabeled == 0:
        _check_alone(recipe)
    half = recipe.training.half_batch or recipe.training.batch // 2
    pseudo_half = recipe.training.pseudo_batch or half
    rounds = []
    for index, config, span in zip(indices, recipe.rounds, recipe.spans(), strict=True):
        labels = recipe.pseudo_labels(index)
        alone = config.use != "online" and not labels  # labeled images without others
        batch = recipe.training.batch if alone else half
        online = online_of(recipe, batch) if config.use == "online" else None
        over = config.epoch_over or ("labeled" if alone else "unlabeled")
        others = pseudo_half if online is None else online.batch
        size = batch if over == "labeled" or alone else others
        own = labeled_in(recipe, index, labeled)
        epoch_steps = max(1, (own if over == "labeled" else unlabeled) // size)
        steps = config.steps or (config.epochs or 0) * epoch_steps
        if online is not None:
            online = fitted(online, index=index, steps=steps, crop=recipe.at(index).training.crop)
        rounds.append(
            Round(
                index=index,
                labeling_ratio=config.labeling_ratio,
                augmentation=augmentation_of(recipe, index, fills[recipe.starts(index)]),
                steps=steps,
                span=span,
                learning_rate=config.learning_rate
                or recipe.training.learning_rate
                or PUBLISHED_RATES[recipe.training.optimizer][0],
                batch=batch,
                pseudo_batch=pseudo_half if labels else 0,
                epoch_steps=epoch_steps,
                epochs=config.epochs,
                micro_batch=min(batch, recipe.training.micro_batch or batch),
                online=online,
                begins=recipe.starts(index),
            )
        )
    return rounds


def _check_alone(recipe: Recipe) -> None:
    """Raise RecipeError if a round needs unlabeled images; there are none."""
    if any(config.use != "labeled" for config in recipe.rounds[1:]) or recipe.pseudo_labels(0):
        raise RecipeError(
            f"The recipe has {len(recipe.rounds)} rounds, but there are no unlabeled images, and rounds after the first "
            "learn from those. Set data.unlabeled, or keep only the first round."
            if recipe.rounds[0].labels_from is None
            else "rounds.0.labels_from: there are no unlabeled images that this network could label. Set data.unlabeled, "
            "or remove labels_from."
        )
    if recipe.rounds[0].use == "online":
        raise RecipeError(
            "Round 0 has use: online, but there are no unlabeled images to learn from. Set data.unlabeled, or remove the "
            "key."
        )


def plan_training(
    recipe: Recipe,
    networks: Mapping[int, Network],
    *,
    labeled: int,
    unlabeled: int,
    validation: int,
    processes: int,
) -> list[Round]:
    """The rounds, and the networks prepared for them. Raises RecipeError, SizeError.

    Args:
        networks: round → the network that begins there, as `Recipe.starts` numbers them; changed in place.
        labeled, unlabeled, validation: numbers of images.
    """
    check_keep(recipe, validation)
    for index, config in enumerate(recipe.rounds):
        if index in networks or config.crop is not None:
            check_sizes(recipe.at(index), networks[recipe.starts(index)], round_index=index)
    fills = {index: network.fill for index, network in networks.items()}
    rounds = plan_rounds(recipe, labeled=labeled, unlabeled=unlabeled, fills=fills)
    check_shares(recipe, rounds, processes)
    for index, network in networks.items():
        prepare_training(recipe.at(index), rounds[index], network, processes=processes)
    return rounds


def stage_of(recipe: Recipe, round_: Round) -> Stage:
    """The stage of a round's training."""
    training = recipe.training
    schedule = Schedule(
        span=round_.span,
        power=training.power,
        first_step_at_zero=recipe.release_quirks and round_.index > 0,
        warm_up_steps=training.warm_up,
    )
    return Stage(
        steps=round_.steps,
        schedule=schedule,
        precision=training.precision,
        seed=(recipe.seed, round_.index),
        checkpoint_every=training.checkpoint_every,
        micro_batch=training.micro_batch,
        report_every=REPORT_EVERY,
        compile=training.compile,
        clip=training.clip,
    )


def head_factor_of(recipe: Recipe) -> float:
    """How many times as fast as the backbone the heads learn."""
    return recipe.training.head_factor or PUBLISHED_RATES[recipe.training.optimizer][1]


def learner_settings(recipe: Recipe, round_: Round, counts: Sequence[int] | None = None) -> LearnerSettings:
    """How the network learns in a round.

    Args:
        counts: labeled pixels per class; None: as yet unknown. Balanced class weights are then left out.
    """
    training = recipe.training
    slips = recipe.release_quirks and recipe.network.architecture == "deeplabv2"
    of_others = isinstance(round_.online, Adversarial)
    return LearnerSettings(
        learning_rate=round_.learning_rate,
        head_factor=head_factor_of(recipe),
        optimizer=_optimizer(training),
        stage4_as_head=slips and not of_others,
        repeated_blocks=slips and of_others,
        decay_vectors=training.decay_vectors,
        layer_decay=training.layer_decay,
        labeled_loss=_labeled_loss(recipe, counts),
    )


def _optimizer(training: TrainingConfig) -> OptimizerKind:
    decay, momentum = training.weight_decay, training.momentum
    if training.optimizer == "adamw":
        return AdamW() if decay is None else AdamW(weight_decay=decay)
    usual = SGD()
    return SGD(
        momentum=usual.momentum if momentum is None else momentum,
        weight_decay=usual.weight_decay if decay is None else decay,
    )


def _labeled_loss(recipe: Recipe, counts: Sequence[int] | None) -> LabeledLoss:
    ohem = recipe.training.ohem
    return LabeledLoss(
        hard_below=ohem.threshold if ohem else None,
        least=ohem.least if ohem else 0,
        class_weights=class_weights_of(recipe, counts),
    )


def class_weights_of(recipe: Recipe, counts: Sequence[int] | None) -> tuple[float, ...]:
    """Factors of the classes' losses; none if all are 1, or if they are balanced and `counts` is None.

    Args:
        counts: labeled pixels per class.

    Raises RecipeError for unknown classes, and if there is no labeled pixel to balance by.
    """
    given: Mapping[str, float] | str | None = recipe.training.class_weights
    names = classes_of(recipe).names
    if given == "balanced":
        if counts is not None and not any(counts):
            raise RecipeError(
                "training.class_weights: balanced: there is no labeled pixel to balance by. Remove the key."
            )
        return balanced_weights(counts) if counts is not None else ()
    if not isinstance(given, Mapping) or not given:
        return ()
    if unknown := [name for name in given if name not in names]:
        raise RecipeError(
            f"training.class_weights: {', '.join(unknown)}: there is no such class. The classes are {', '.join(names)}."
        )
    return tuple(given.get(name, 1.0) for name in names)


def method_of(recipe: Recipe, round_: Round, network: Network, counts: Sequence[int]) -> Method:
    """The method that trains `network` in a round: an online one, or self-training.

    Args:
        counts: labeled pixels per class.
    """
    settings, auxiliary_weight = learner_settings(recipe, round_, counts), auxiliary_weight_of(recipe)
    learner = learner_of(settings, network)
    if round_.online is not None:
        return online_method(
            learner,
            round_.online,
            Supervision(round_.batch, auxiliary_weight, settings.labeled_loss),
            counts=counts,
            seed=(recipe.seed, round_.index),
            second=lambda: second_network(
                network,
                spec_of(recipe),
                seed=(recipe.seed, round_.index),
                drop_path=recipe.network.drop_path,
                whole=round_.begins == round_.index and recipe.network.weights == "none",
            ),
        )
    method = rounds_method(
        learner,
        dynamic_of(recipe),
        one_pass=recipe.training.joins_halves,
        batch=round_.batch,
        pseudo_batch=round_.pseudo_batch,
        auxiliary_weight=auxiliary_weight,
        pseudo_weight=recipe.training.pseudo_weight,
        labeled_loss=settings.labeled_loss,
    )
    teacher = teacher_of(recipe)
    return method if teacher is None else with_teacher(method, teacher)


def prepare_training(recipe: Recipe, round_: Round, network: Network, *, processes: int) -> None:
    """Prepare a network for training as the recipe of a round asks, once, before its first stage.

    Raises RecipeError if the network cannot do what the recipe asks.
    """
    learner_of(learner_settings(recipe, round_), network)
    if syncs_batchnorm(recipe, processes):
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if recipe.network.freeze == "backbone":
        network.freeze_backbone()
    if recipe.training.recompute:
        recompute_blocks(network)


def syncs_batchnorm(recipe: Recipe, processes: int) -> bool:
    """Whether BatchNorm sees the images of all processes; by default as published.

    Only on GPUs: PyTorch has no SyncBatchNorm for CPUs.
    """
    wanted = recipe.training.sync_batchnorm
    if wanted is None:
        wanted = recipe.network.architecture in SYNCED
    return wanted and processes > 1 and pick_device().type == "cuda"


def describe_shares(rounds: Sequence[Round], processes: int) -> str:
    """What each process does of every batch, as a sentence."""
    shares = ", ".join(
        f"round {planned.index}: {planned.batch // processes}"
        + (f" + {planned.pseudo_batch // processes}" if planned.pseudo_batch else "")
        + (f" + {planned.online.batch // processes} unlabeled" if planned.online else "")
        for planned in rounds
    )
    return (
        f"{processes} processes share every batch (images of a process: {shares}), the images to label and the images to "
        "evaluate"
    )


def _lonely_image(recipe: Recipe, planned: Round, processes: int) -> str | None:
    """What is wrong with an online round that has forward passes with one image; None if nothing is.

    Args:
        recipe: as it holds in that round.
    """
    how, architecture = planned.online, recipe.network.architecture
    if how is None or architecture not in POOLED or syncs_batchnorm(recipe, processes):
        return None
    labeled, unlabeled = part_sizes(
        [planned.batch // processes, how.batch // processes], recipe.training.micro_batch
    )
    if min([*labeled, *(unlabeled if how.weight else [])]) > 1:
        return None
    return (
        f"online.batch: {how.batch} unlabeled images next to {planned.batch} labeled ones leave a single image to a "
        f"pass, and BatchNorm over means of whole images ({architecture}) needs two. Leave online.batch out, which makes "
        "them as many, or set another training.micro_batch"
    )


def check_shares(recipe: Recipe, rounds: Sequence[Round], processes: int) -> None:
    """Raise RecipeError if batches cannot be divided among the processes."""
    lines: dict[str, None] = {}  # a set in order: rounds with equal batches have the same faults
    for planned in rounds:
        alone, size, here = (
            not planned.labels and planned.online is None,
            planned.batch,
            recipe.at(planned.index),
        )
        name, pseudo = "batch" if alone else "half_batch", planned.pseudo_batch
        own, micro = size // processes, recipe.training.micro_batch
        together = own + (pseudo // processes if recipe.training.joins_halves else 0)
        if size % processes:
            lines[f"training.{name}: {size} images cannot be divided among {processes} processes"] = None
        elif micro and own > micro and own % micro:
            lines[f"training.micro_batch: {micro} does not divide the {own} images of a process"] = None
        elif pseudo % processes:
            message = f"training.pseudo_batch: {pseudo} images cannot be divided among {processes} processes"
            lines[message] = None
        elif together < 2 and not syncs_batchnorm(here, processes) and here.network.architecture in POOLED:
            lines[
                f"training.{name}: {own} image for each of {processes} processes, and BatchNorm over means of whole "
                f"images ({here.network.architecture}) needs two"
            ] = None
    for planned in rounds:
        if (how := planned.online) is None:
            continue
        if how.batch % processes:
            lines[f"online.batch: {how.batch} images cannot be divided among {processes} processes"] = None
        elif how.mixing != "none" and how.batch // processes % 2:
            lines[
                f"online.batch: {how.batch // processes} image(s) for each of {processes} processes, and images are "
                "mixed in pairs"
            ] = None
        elif (message := undivided(how, processes, recipe.training.micro_batch)) or (
            message := _lonely_image(recipe.at(planned.index), planned, processes)
        ):
            lines[message] = None
    if lines:
        raise RecipeError(
            faults(
                f"{processes} processes share every batch, which is not possible"
                if processes > 1
                else "Batches cannot be divided so",
                list(lines),
            )
        )
