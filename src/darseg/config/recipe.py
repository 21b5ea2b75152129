"""The recipe: what a user writes, typed and checked section by section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from darseg.choices import LabelingPrior, ResultAlign, ResultKeep
from darseg.config.data import DataConfig
from darseg.config.image_classes import ImageClassesConfig
from darseg.config.online import OnlineConfig
from darseg.config.training import AugmentationConfig, NetworkConfig, TrainingConfig
from darseg.config.values import (
    Continued,
    Count,
    Fraction,
    Key,
    LabelsFrom,
    Positive,
    Section,
    Size,
    Window,
    falling,
    or_word,
)
from darseg.pseudo.labeling import (
    BOUND,
    TARGET_PRECISION,
    Align,
    Confidence,
    Labeling,
    LabelingMethod,
    Ratio,
    Sampling,
    check_bound,
    check_ratio,
    check_strength,
    check_target_precision,
    check_threshold,
    labeling_faults,
)


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


class ProtocolConfig(Section):
    base_size: Count | None = None
    window: Window | None = None
    mirror: StrictBool = True
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    windows_at_once: Annotated[Count | None, BeforeValidator(_auto)] = None  # None: by the device


class LabelingConfig(ProtocolConfig):
    method: LabelingMethod = "dars"
    threshold: Annotated[StrictFloat, AfterValidator(check_threshold)] | None = None
    confidence: Confidence = "float16"
    sampling: Sampling = "random"
    align: Align = "none"
    bound: Annotated[StrictFloat, AfterValidator(check_bound)] = BOUND
    strength: Annotated[StrictFloat, AfterValidator(check_strength)] = 1.0
    target_precision: Annotated[StrictFloat, AfterValidator(check_target_precision)] = TARGET_PRECISION
    cross_fit: Annotated[StrictInt, Field(ge=2)] | None = (
        None  # None: 2 with too few validation images, or none
    )
    normalized: StrictBool = False
    prior: LabelingPrior = "labeled"
    keep_predictions: StrictBool = False
    predict_twice: StrictBool = False

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name, message in self.faults(ratio=None):
            if name != "labeling_ratio":  # a key of the rounds
                yield (name,), message
        if self.prior == "shrunk" and self.method != "dars" and self.align == "none":
            yield ("prior",), f"has no effect with method {self.method} without align; remove it"
        if self.normalized and (self.keep_predictions or self.predict_twice):
            name = "predict_twice" if self.predict_twice else "keep_predictions"
            yield (
                (name,),
                "has no effect with labeling.normalized, which predicts each image twice; remove it",
            )
        elif self.keep_predictions and self.predict_twice:
            yield (
                ("predict_twice",),
                "writes no predictions that labeling.keep_predictions could keep; set only one of them",
            )

    def at(self, ratio: Ratio | None) -> Labeling:
        """What a round with this labeling ratio labels by."""
        return Labeling(**self._settings(ratio), ratio=ratio)

    def faults(self, ratio: Ratio | None) -> Iterator[tuple[str, str]]:
        """Key and fault of everything that keeps `at` from working."""
        return labeling_faults(**self._settings(ratio), ratio=ratio)

    def describe(self) -> str:
        """How labels are chosen, as a part of a sentence."""
        aligned = "" if self.align == "none" else ", decisions aligned"
        return f"{self.method}{aligned}" + (
            ", decisions by probability / threshold" if self.normalized else ""
        )

    def _settings(self, ratio: Ratio | None) -> dict[str, Any]:
        names = ["method", "threshold", "confidence", "sampling", "align", "bound", "strength", "normalized"]
        if ratio == "auto":  # no other round has a target
            names.append("target_precision")
        return {name: getattr(self, name) for name in names}


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare on or off as a boolean."""
    return ("on" if value else "off") if type(value) is bool else value


class ResultConfig(Section):
    align: Annotated[ResultAlign, BeforeValidator(_on_or_off)] = "auto"
    strength: Annotated[StrictFloat, AfterValidator(check_strength)] | None = None  # None: 1; auto: 1/2 or 1
    bound: Annotated[StrictFloat, AfterValidator(check_bound)] | None = None  # None: 5; auto: 2 or 5
    keep: ResultKeep = "last"

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name in ("strength", "bound"):
            if self.align == "off" and getattr(self, name) is not None:
                yield (name,), "has no effect with result.align: off; remove it"
        if self.strength == 0:
            yield ("strength",), "found 0.0, which aligns nothing; set result.align: off instead"


# A share, or "auto".
LabelingRatio = Annotated[
    StrictFloat,
    AfterValidator(check_ratio),
    or_word("auto", "should be a share above 0 and at most 1, or auto"),
    PlainSerializer(lambda value: value),
]


class RoundConfig(Section):
    use: Literal["online", "labeled"] | None = None  # None: labeled images in round 0, then pseudo labels
    # A round of this run, or the path of another network; None: the network of the round before labels
    labels_from: LabelsFrom | None = None
    labels_window: Window | None = None  # None: the window of its run; of a file, the crop, rounded up
    network: NetworkConfig | None = None  # from this round on; None: that of the round before goes on
    continues: Continued | None = None  # the round whose network goes on; None: the round before
    labeled_part: tuple[Fraction, Fraction] | None = None  # of the labeled images; None: all
    crop: Size | None = None  # from this round on; None: as before
    epochs: Count | None = None
    steps: Count | None = None
    epoch_over: Literal["labeled", "unlabeled"] | None = None  # None: labeled in round 0, then unlabeled
    labeling_ratio: LabelingRatio | None = None
    scale: tuple[Positive, Positive] | None = None
    learning_rate: Positive | None = None
    span: tuple[Fraction, Fraction] | None = None

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if (self.epochs is None) == (self.steps is None):
            yield (), "should have either epochs or steps"
        if self.steps and self.epoch_over:
            yield ("epoch_over",), "has no effect if steps are given; remove it"
        if self.labels_window and self.labels_from is None:
            yield (
                ("labels_window",),
                "is the window of a network in labels_from; remove it, or set labels_from",
            )
        if self.labels_window and isinstance(self.labels_from, int):
            yield (
                ("labels_window",),
                "is the window of a network of another run; for a round of this run set labeling.window instead",
            )
        if self.network is not None:
            for key, message in self.network.conflicts():
                yield ("network", *key), message
        if message := falling(self.scale):
            yield ("scale",), message
        for name, bounds in (("span", self.span), ("labeled_part", self.labeled_part)):
            if bounds and bounds[0] >= bounds[1]:
                yield (name,), f"found {list(bounds)}; the first number should be the smaller one"


class Recipe(Section):
    """All settings of a run."""

    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] = 0
    threads: Count | None = None
    release_quirks: StrictBool = False
    data: DataConfig
    network: NetworkConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    online: OnlineConfig = OnlineConfig()
    image_classes: ImageClassesConfig | None = None  # None: no class is removed from predictions
    labeling: LabelingConfig = LabelingConfig()
    evaluation: ProtocolConfig = ProtocolConfig()
    result: ResultConfig = ResultConfig()
    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]

    def pseudo_labels(self, index: int) -> bool:
        """Whether a round begins with pseudo labels."""
        config = self.rounds[index]
        return config.use is None and (index > 0 or config.labels_from is not None)

    @property
    def pseudo_rounds(self) -> list[RoundConfig]:
        """The rounds that begin with pseudo labels."""
        return [config for index, config in enumerate(self.rounds) if self.pseudo_labels(index)]

    @property
    def halves(self) -> bool:
        """Whether there are rounds with labeled and unlabeled images."""
        return bool(self.pseudo_rounds) or any(config.use == "online" for config in self.rounds)

    @property
    def follows_precision(self) -> list[int]:
        """The rounds with pseudo labels whose ratio is auto."""
        return [
            index
            for index, config in enumerate(self.rounds)
            if self.pseudo_labels(index) and config.labeling_ratio == "auto"
        ]

    def spans(self) -> list[tuple[float, float]]:
        """Which part of the poly curve each round uses.

        It is the round's `span`, or [before / (before + own), 1], in epochs or steps; before: of the rounds that trained
        the same network. Equal rounds give [0, 1], [1/2, 1], [2/3, 1], as the growing epoch totals of the release do. A
        new network begins a new curve.
        """
        spans, done = [], list[int]()
        for index, config in enumerate(self.rounds):
            goes_on = self.goes_on_from(index)
            before, own = 0 if goes_on is None else done[goes_on], config.steps or config.epochs or 0
            spans.append(config.span or (before / (before + own), 1.0))
            done.append(before + own)
        return spans

    def goes_on_from(self, index: int) -> int | None:
        """The round whose network a round goes on with; None: a network begins there.

        With `result.keep: best` it may be an earlier round of that network, if `continues` names none (see `basis_of`).
        """
        config = self.rounds[index]
        if index == 0 or config.network is not None or config.continues == "none":
            return None
        return index - 1 if config.continues is None else min(config.continues, index - 1)

    def labeled_by(self, index: int) -> int:
        """The round whose network labels in a round, if that is a network of this run.

        With `result.keep: best` it may be another, if `labels_from` names none (see `basis_of`).
        """
        named = self.rounds[index].labels_from
        return named if isinstance(named, int) else index - 1

    @property
    def takes_turns(self) -> bool:
        """Whether a round names an earlier one to label or to go on from, or begins another network."""
        return any(
            isinstance(config.labels_from, int) or config.continues is not None for config in self.rounds
        )

    def starts(self, index: int) -> int:
        """The round in which the network that a round trains began."""
        while (before := self.goes_on_from(index)) is not None:
            index = before
        return index

    def at(self, index: int) -> Recipe:
        """The recipe as it holds in a round: `network` and `training.crop` are those of that round.

        Both hold from the round that names them on, in the rounds that go on from it. A network that begins without a
        section or crop of its own takes those of the round before. Give it the whole recipe, not what an earlier call
        returned.
        """
        network, crop, reached = None, None, index
        while reached > 0:
            config = self.rounds[reached]
            network, crop = network or config.network, crop or config.crop
            goes_on = self.goes_on_from(reached)
            reached = reached - 1 if goes_on is None else goes_on
        if network is None and crop is None:
            return self
        training = self.training.model_copy(update={"crop": crop}) if crop else self.training
        return self.model_copy(update={"network": network or self.network, "training": training})

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        """Keys whose values do not work together: those of each section, then those of several sections."""
        sections: list[tuple[Key, Section]] = [
            ((name,), section) for name, section in self if isinstance(section, Section)
        ]
        sections += [(("rounds", index), config) for index, config in enumerate(self.rounds)]
        for above, section in sections:
            for key, message in section.conflicts():
                yield (*above, *key), message
        if self.halves:
            for key, message in self.training.conflicts_of_halves():
                yield ("training", *key), message
        for index in range(len(self.rounds)):
            if self.starts(index) == index:
                yield from self.at(index)._conflicts_of_network(index)
        yield from self._conflicts_of_rounds()

    def _conflicts_of_network(self, index: int) -> Iterator[tuple[Key, str]]:
        """Keys of several sections that do not work with the network that begins in a round."""
        network, above = self.network, f"rounds.{index}.network" if index else "network"
        if (
            self.release_quirks
            and network.architecture == "deeplabv2"
            and network.backbone.startswith("timm/")
        ):
            yield (
                ("release_quirks",),
                "works with deeplabv2 only on darseg's own ResNets, because it changes the learning rate of stage 4; "
                f"{above}.backbone is {network.backbone}",
            )
        if network.freeze == "backbone":
            if self.training.recompute:
                yield ("training", "recompute"), "has no effect on a frozen backbone; remove it"
            if self.training.layer_decay != 1:
                yield ("training", "layer_decay"), "has no effect on a frozen backbone; remove it"

    def _conflicts_of_rounds(self) -> Iterator[tuple[Key, str]]:
        for index, config in enumerate(self.rounds):
            key: Key = ("rounds", index)
            if index == 0:
                for name, place in (("network", "network"), ("crop", "training.crop")):
                    if getattr(config, name) is not None:
                        yield (*key, name), f"is for later rounds; the first has {place}. Write it there"
            yield from self._conflicts_of_turns(index)
            if config.use is not None:
                for name in ("labeling_ratio", "labels_from"):
                    if getattr(config, name) is not None:
                        yield (*key, name), f"has no effect in a round with use: {config.use}; remove it"
            elif not self.pseudo_labels(index) and config.labeling_ratio is not None:
                yield (
                    (*key, "labeling_ratio"),
                    "round 0 trains on labeled images alone, without a ratio; remove it, or set labels_from",
                )
            elif self.pseudo_labels(index):
                for name, message in self.labeling.faults(config.labeling_ratio):
                    if name == "labeling_ratio":
                        yield (*key, name), message
        yield from self._conflicts_of_unused()

    def _conflicts_of_turns(self, index: int) -> Iterator[tuple[Key, str]]:
        """Keys of a round that name another round which cannot be meant."""
        config = self.rounds[index]
        earlier = "an earlier round, " + ("0" if index == 1 else f"0 to {index - 1}")
        for name in ("labels_from", "continues"):
            named = getattr(config, name)
            if not isinstance(named, int) or named < index:
                continue
            what = "the round itself" if named == index else "a later round"
            remedy = f"name {earlier}" if index else "no round comes before round 0, so remove it"
            yield ("rounds", index, name), f"found {named}, {what}; {remedy}"
        if config.continues == "none" and index == 0:
            yield ("rounds", index, "continues"), "the first round always begins a network; remove it"
        if config.network is not None and isinstance(config.continues, int):
            yield (
                ("rounds", index, "network"),
                f"is another network than that of round {config.continues}, which this round continues; remove it, or "
                "set continues: none",
            )

    def _conflicts_of_unused(self) -> Iterator[tuple[Key, str]]:
        """Keys that need a round which does not exist, and units that do not match."""
        for name, default in (("target_precision", TARGET_PRECISION), ("cross_fit", None)):
            if getattr(self.labeling, name) != default and not self.follows_precision:
                yield (
                    ("labeling", name),
                    "has no effect without a round with labeling_ratio: auto; remove it",
                )
        if self.training.teacher is not None and all(config.use == "online" for config in self.rounds):
            yield ("training", "teacher"), "is for rounds that are not online; use online.teacher instead"
        if not self.pseudo_rounds:
            for name in ("pseudo_batch", "dynamic_loss"):
                if getattr(self.training, name) is not None:
                    yield (
                        ("training", name),
                        "is for rounds with pseudo labels, and there are none; remove it",
                    )
        with_steps = [config.steps is not None for config in self.rounds]
        complete = all((config.epochs is None) != (config.steps is None) for config in self.rounds)
        if complete and any(with_steps) and not all(with_steps):
            yield (
                ("rounds",),
                "some have epochs, some steps; use the same unit for all, because the learning rate's curve counts in it",
            )


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths; relative ones start at `folder`."""
    data = recipe.data.model_copy(update={"root": _absolute(recipe.data.root, folder)})
    network = _with_weights_from(recipe.network, folder)
    rounds = tuple(
        config.model_copy(
            update={
                "labels_from": _absolute(config.labels_from, folder)
                if isinstance(config.labels_from, str)
                else config.labels_from,
                "network": config.network and _with_weights_from(config.network, folder),
            }
        )
        for config in recipe.rounds
    )
    parts = {"data": data, "network": network, "rounds": rounds}
    if recipe.image_classes is not None:
        parts["image_classes"] = _with_weights_from(recipe.image_classes, folder)
    return recipe.model_copy(update=parts)


Weighted = TypeVar("Weighted", NetworkConfig, ImageClassesConfig)


def _with_weights_from(section: Weighted, folder: Path) -> Weighted:
    weights = section.weights
    if not isinstance(weights, str) or weights == "none":
        return section
    return section.model_copy(update={"weights": _absolute(weights, folder)})


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())
