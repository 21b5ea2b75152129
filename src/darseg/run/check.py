"""Before a run: what is wrong with the data, and what the recipe will do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from torch import nn

from darseg.config.recipe import Recipe
from darseg.data.examine import Findings, examine
from darseg.data.manifest import Manifest, count_pixels
from darseg.data.maps import check_names
from darseg.errors import DarsegError, DataError
from darseg.methods.adversarial import Adversarial
from darseg.model.network import Network
from darseg.pseudo.distribution import count_labels
from darseg.run.best import describe_keep
from darseg.run.build import (
    as_recipe,
    beginnings,
    build_networks,
    evaluation_protocol,
    labeling_protocol,
    layout_of,
    manifest_of,
    masks,
    spec_of,
)
from darseg.run.dynamic import describe_dynamic
from darseg.run.folds import assigned_folds, check_folds, fold_warnings, planned_folds
from darseg.run.held_out import notes_of_auto
from darseg.run.image_classes import describe_classifier, initial_classifier, plan_classifier
from darseg.run.journal import Journal
from darseg.run.label_samples import waiting_bytes
from darseg.run.labelers import labelers_of, labeling_protocol_of, who_labels
from darseg.run.memory import memory_of, memory_of_classifier
from darseg.run.online import (
    describe_discriminator,
    describe_online,
    describe_views,
    teacher_of,
    unused_online,
)
from darseg.run.plan import (
    Round,
    class_weights_of,
    describe_shares,
    learner_of,
    learner_settings,
    plan_training,
    stage_of,
)
from darseg.run.quirks import describe_quirks
from darseg.run.target import check_prior, target_lines
from darseg.run.unread import unread_data
from darseg.training.method import Learner
from darseg.training.optimize import layer_of

USUAL_LABELS = Path("runs/recipe/round_1/labels")
"""Where label maps lie unless --out names another run folder; for the length of their names."""


def check(recipe: Recipe | Path | str, console: Console | None = None) -> Findings:
    """Every fault of a recipe's data, network sizes and weights, in one go. Reads every image and label.

    Raises DataError only if the images cannot even be listed.
    """
    recipe = as_recipe(recipe)
    try:
        manifest = manifest_of(recipe)
    except DataError as error:
        unread = unread_data(recipe) if recipe.data.layout == "folders" else []
        fresh = [line for line in unread if f"{line.partition(': ')[0]}: " not in str(error)]
        raise DataError("\n".join([str(error), *fresh])) from None
    findings = read_all(manifest, console or Console())
    faults, warnings = list(findings.faults), list(findings.warnings)
    if layout := layout_of(recipe):
        warnings += layout.warnings()
    warnings += [*manifest.warnings, *unread_data(recipe)]
    notes = list(findings.notes)
    try:
        check_prior(recipe, manifest)
    except DarsegError as error:
        faults.append(str(error))
    try:
        networks = {index: network for index, (network, _) in build_networks(recipe).items()}
        check_names(USUAL_LABELS, [sample.id for sample in manifest.unlabeled])
        check_folds(recipe, manifest)
        if len(findings.labeled) == len(manifest.labeled):  # otherwise there are faults
            folds = assigned_folds(recipe, manifest, findings.labeled)
            warnings += fold_warnings(manifest.classes.names, findings.labeled, folds)
        plan_training(
            recipe,
            networks,
            labeled=len(manifest.labeled),
            unlabeled=len(manifest.unlabeled),
            validation=len(manifest.validation),
            processes=1,
        )
    except DarsegError as error:
        faults.append(str(error))
    try:
        if plan_classifier(recipe, manifest) is not None:
            initial_classifier(recipe)
    except DarsegError as error:
        faults.append(str(error))
    try:
        labelers = labelers_of(recipe)
        for labeler in labelers.values():
            labeler.load(plain=True)
        notes += who_labels(recipe, labelers)
    except DarsegError as error:
        faults.append(str(error))
    return replace(findings, faults=tuple(faults), warnings=tuple(warnings), notes=tuple(notes))


def read_all(manifest: Manifest, console: Console) -> Findings:
    """Read every image and label, with a progress bar, and collect what is wrong with them."""
    total = sum(len(samples) for samples in manifest.roles().values())
    with Journal(None, None, console).progress("check", total) as advance:
        return examine(manifest, advance)


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike.

    Attributes:
        name: what they belong to.
        rate: the learning rate at which round 0 begins, after any warm-up; 0 if they do not learn.
        weight_decay: its factor.
        parameters: their number of values.
    """

    name: str
    rate: float
    weight_decay: float
    parameters: int


def groups_of(learner: Learner) -> tuple[Group, ...]:
    """The parameters of a learner, grouped by how they learn, in their order in the network."""
    layers: dict[tuple[float, float], set[str]] = {}
    counts: Counter[tuple[float, float]] = Counter()
    for name, parameter in learner.module.named_parameters():
        factor = learner.rate_factor(name) if parameter.requires_grad else 0.0
        decay = learner.optimizer.weight_decay if factor and learner.decays(name, parameter) else 0.0
        key = learner.learning_rate * factor, decay
        layers.setdefault(key, set()).add(layer_of(name))
        counts[key] += parameter.numel()
    return tuple(Group(_joined(names), *key, parameters=counts[key]) for key, names in layers.items())


def _joined(layers: set[str]) -> str:
    """Names of layers as one; several of the backbone are "backbone"."""
    inside = layers - {"heads"}
    return ", ".join([*(inside if len(inside) < 2 else ["backbone"]), *(layers & {"heads"})])


@dataclass(frozen=True)
class PlannedNetwork:
    """A network that a recipe trains.

    Attributes:
        begins: the round in which it begins.
        description: a line.
        parameters: number of values in it, trained or not.
        groups: the parameters, grouped by how they learn.
        state_bytes: memory of weights, gradients and the optimizer's averages in float32.
        activation_bytes: memory that a step keeps for its backward pass in float32, without convolutions' workspace.
    """

    begins: int
    description: str
    parameters: int
    groups: tuple[Group, ...]
    state_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recipe will do.

    Attributes:
        rates: learning rate at the beginning and end of each round.
        images: their number by role.
        networks: those that are trained, one after the other.
        class_weights: class → factor of the loss of its labeled pixels; empty: all are 1.
        temporary_bytes: disk space needed while labeling.
        who_labels: a line for each round, if more than one network labels and learns, and one about `result.keep`.
        labeling, evaluation: a line that describes each.
        notes: what a reader might not expect.
        target: lines about the class shares that the recipe aims at.
        folds: round → how many networks are trained before it on folds of the labeled images, and the steps of each;
            empty if the recipe does not cross-fit.
    """

    rounds: tuple[Round, ...]
    rates: tuple[tuple[float, float], ...]
    images: dict[str, int]
    networks: tuple[PlannedNetwork, ...]
    class_weights: Mapping[str, float]
    temporary_bytes: int
    who_labels: tuple[str, ...]
    labeling: str
    evaluation: str
    notes: tuple[str, ...]
    target: tuple[str, ...]
    folds: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def network(self) -> str:
        """A line that describes the network of the first round."""
        return self.networks[0].description

    @property
    def parameters(self) -> int:
        """Number of values in the network of the first round, trained or not."""
        return self.networks[0].parameters

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameters of the network of the first round, grouped by how they learn."""
        return self.networks[0].groups

    @property
    def state_bytes(self) -> int:
        """Memory of weights, gradients and the optimizer's averages, of the network that needs most in all."""
        return self._largest.state_bytes

    @property
    def activation_bytes(self) -> int:
        """Memory that a step of that network keeps for its backward pass."""
        return self._largest.activation_bytes

    @property
    def _largest(self) -> PlannedNetwork:
        return max(self.networks, key=lambda planned: planned.state_bytes + planned.activation_bytes)


def plan(recipe: Recipe | Path | str, processes: int = 1) -> Plan:
    """What a recipe will do. Trains nothing, and reads only the size of the first unlabeled image.

    It reads all label maps of the labeled images, too, if anything aims at their class shares or balances by them.

    Args:
        processes: number of processes that torchrun will start; the plan's memory is that of one process.

    Raises RecipeError, DataError or SizeError for a recipe that cannot run.
    """
    recipe = as_recipe(recipe)
    manifest = manifest_of(recipe)
    check_folds(recipe, manifest)
    check_prior(recipe, manifest)
    networks = {index: spec_of(recipe.at(index)).build() for index in beginnings(recipe)}
    rounds = plan_training(
        recipe,
        networks,
        labeled=len(manifest.labeled),
        unlabeled=len(manifest.unlabeled),
        validation=len(manifest.validation),
        processes=processes,
    )
    labelers = labelers_of(recipe)
    waiting = _waiting_bytes(recipe, rounds, len(manifest.classes))
    labeling = {
        planned.index: labeling_protocol_of(recipe, planned.index, labelers.get(planned.index)).describe(
            "logits"
        )
        for planned in rounds
        if planned.labels
    }
    evaluation = {at: evaluation_protocol(recipe.at(at)).describe() for at in range(len(rounds))}
    return Plan(
        rounds=tuple(rounds),
        rates=tuple(_rates(recipe, planned) for planned in rounds),
        images={role: len(samples) for role, samples in manifest.roles().items()},
        networks=tuple(
            _planned_network(recipe.at(index), index, network, rounds=rounds, processes=processes)
            for index, network in networks.items()
        ),
        temporary_bytes=waiting * count_pixels(manifest.unlabeled) if waiting else 0,
        who_labels=(*who_labels(recipe, labelers), *describe_keep(recipe)),
        labeling=_describe_labeling(recipe, labeling),
        evaluation=_by_round(evaluation),
        class_weights=_class_weights(recipe, manifest),
        notes=(
            *notes_of_auto(recipe, manifest, steps=rounds[0].steps, network=networks[0]),
            *_on_data(recipe, manifest, processes),
            *_notes(recipe, rounds, networks, processes=processes),
        ),
        target=target_lines(recipe, manifest),
        folds=planned_folds(recipe, len(manifest.validation), steps=rounds[0].steps),
    )


def _waiting_bytes(recipe: Recipe, rounds: Sequence[Round], classes: int) -> int:
    """Bytes per pixel of what waits on the disk while a round labels; of the round that needs most."""
    per_pixel = [
        waiting_bytes(
            recipe.labeling.at(planned.labeling_ratio),
            classes,
            predict_twice=recipe.labeling.predict_twice,
        )
        for planned in rounds
        if planned.labels
    ]
    return max(per_pixel, default=0)


def _on_data(recipe: Recipe, manifest: Manifest, processes: int) -> list[str]:
    """Notes that depend on the data. Raises RecipeError for a classifier that cannot be trained."""
    classifier = plan_classifier(recipe, manifest, processes)
    if classifier is None:
        return []
    memory = memory_of_classifier(classifier, processes)
    return [
        describe_classifier(recipe, classifier),
        f"memory of a process while the classifier learns, fp32: {memory.state_bytes / 1e9:.2f} GB weights, gradients "
        f"and averages, {memory.activation_bytes / 1e9:.2f} GB kept for the backward pass (image_classes.micro_batch "
        "lowers this), plus the workspace of convolutions",
    ]


def _by_round(texts: Mapping[int, str]) -> str:
    """What holds in each round; said once if it is the same in all."""
    if len({*texts.values()}) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"round {index}: {text}" for index, text in texts.items())


def _planned_network(
    recipe: Recipe, index: int, network: Network, *, rounds: Sequence[Round], processes: int
) -> PlannedNetwork:
    """What is planned for the network that begins in a round.

    Args:
        recipe: as it holds there.
        rounds: all of the run.
    """
    learner = learner_of(learner_settings(recipe, rounds[index]), network)
    own = [planned for planned in rounds if planned.begins == index]
    memory = memory_of(recipe, own, learner, processes=processes)
    return PlannedNetwork(
        begins=index,
        description=_describe_network(recipe),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        groups=groups_of(learner),
        state_bytes=memory.state_bytes,
        activation_bytes=memory.activation_bytes,
    )


def _describe_labeling(recipe: Recipe, protocols: Mapping[int, str]) -> str:
    """A line about the labeling of the rounds that begin with pseudo labels, which have these protocols."""
    if recipe.halves and not protocols:
        return "none before training, all rounds are online"
    described = _by_round(protocols) if protocols else labeling_protocol(recipe).describe("logits")
    return f"{recipe.labeling.describe()}, {described}"


def _class_weights(recipe: Recipe, manifest: Manifest) -> dict[str, float]:
    counts = None
    if recipe.training.class_weights == "balanced":
        counts = count_labels(masks(manifest.labeled), len(manifest.classes)).tolist()
    return dict(zip(manifest.classes.names, class_weights_of(recipe, counts), strict=False))


def _rates(recipe: Recipe, planned: Round) -> tuple[float, float]:
    """The rates at the beginning and end of a round's curve.

    Warm-up, and the release's first step at 0, would hide where the curve begins.
    """
    schedule = replace(stage_of(recipe, planned).schedule, first_step_at_zero=False, warm_up_steps=0)
    first, last = (schedule.rate(step, planned.steps, planned.learning_rate) for step in (0, planned.steps))
    return first, last


def _describe_network(recipe: Recipe) -> str:
    network, height_width = recipe.network, "x".join(map(str, recipe.training.crop))
    dilated = spec_of(recipe).sides.step == network.output_stride
    stride = f", output stride {network.output_stride}" if dilated else ""
    return f"{network.architecture}, {network.backbone}{stride}, crops {height_width}"


def _has_batchnorm(network: Network) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _online_notes(recipe: Recipe, rounds: Sequence[Round]) -> list[str]:
    """What online rounds do, and their discriminators; or which keys do nothing without such rounds."""
    online = [(planned.index, planned.online) for planned in rounds if planned.online is not None]
    notes = [
        "; ".join(
            [
                f"round {index} learns from unlabeled images while it trains, by {describe_online(how)}",
                *(f"{name}: {what}" for name, what in describe_views(how)),
            ]
        )
        for index, how in online
    ]
    notes += [
        f"round {index}: {describe_discriminator(how, spec_of(recipe.at(index)).classes)}"
        for index, how in online
        if isinstance(how, Adversarial)
    ]
    unused = unused_online(recipe)
    return notes if unused is None else [*notes, unused]


def _notes(
    recipe: Recipe, rounds: Sequence[Round], networks: Mapping[int, Network], *, processes: int
) -> tuple[str, ...]:
    notes = [describe_shares(rounds, processes)] if processes > 1 else []
    notes += _online_notes(recipe, rounds)
    notes += [f"rounds with pseudo labels learn by {line}" for line in describe_dynamic(recipe)]
    if teacher := teacher_of(recipe):
        notes.append(
            f"rounds that are not online save the running average of the weights, decay {teacher.decay:g}"
        )
    patches = [index for index, network in networks.items() if network.sides.offset == 0]
    if patches and recipe.training.optimizer == "sgd":
        notes.append(
            f"the network of round {patches[0]} cuts images into patches; such are published with AdamW, but "
            "training.optimizer is sgd. training.optimizer: adamw takes their published rates"
        )
    if steps := recipe.training.warm_up:
        notes.append(f"the rate first rises to the curve, over {steps} steps of each round")
    micro = recipe.training.micro_batch
    shares = {planned.index: planned.batch // processes for planned in rounds}
    if micro and any(share > micro for share in shares.values()):
        passes = ", ".join(f"round {index}: {max(1, share // micro)}" for index, share in shares.items())
        of_parts = ["BatchNorm sees"] if any(map(_has_batchnorm, networks.values())) else []
        of_parts += ["hard pixels are chosen in"] if recipe.training.ohem else []
        exception = f", but {' and '.join(of_parts)} micro-batches" if of_parts else ""
        notes.append(
            f"gradients are accumulated over micro-batches of {micro} images (number per batch: {passes}); the loss is "
            f"that of whole batches{exception}"
        )
    if recipe.release_quirks:
        notes.append(describe_quirks(recipe, rounds))
    return tuple(notes)
