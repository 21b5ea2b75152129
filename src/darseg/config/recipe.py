"""The recipe: what a user writes, typed and checked section by section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictFloat, StrictInt

from darseg.choices import ResultAlign
from darseg.config.data import DataConfig
from darseg.config.online import OnlineConfig
from darseg.config.training import AugmentationConfig, NetworkConfig, TrainingConfig
from darseg.config.values import Count, Fraction, Key, Positive, Section, Window, falling
from darseg.pseudo.labeling import (
    BOUND,
    Align,
    Confidence,
    Labeling,
    LabelingMethod,
    Sampling,
    check_bound,
    check_ratio,
    check_strength,
    check_threshold,
    labeling_faults,
)


class ProtocolConfig(Section):
    base_size: Count | None = None
    window: Window | None = None
    mirror: StrictBool = True
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    windows_at_once: Count | None = None  # None: by the device


class LabelingConfig(ProtocolConfig):
    method: LabelingMethod = "dars"
    threshold: Annotated[StrictFloat, AfterValidator(check_threshold)] | None = None
    confidence: Confidence = "float16"
    sampling: Sampling = "random"
    align: Align = "none"
    bound: Annotated[StrictFloat, AfterValidator(check_bound)] = BOUND
    strength: Annotated[StrictFloat, AfterValidator(check_strength)] = 1.0
    keep_predictions: StrictBool = False
    predict_twice: StrictBool = False

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name, message in self.faults(ratio=None):
            if name != "labeling_ratio":  # a key of the rounds
                yield (name,), message
        if self.keep_predictions and self.predict_twice:
            yield (
                ("predict_twice",),
                "writes no predictions that labeling.keep_predictions could keep; set only one of them",
            )

    def at(self, ratio: float | None) -> Labeling:
        """What a round with this labeling ratio labels by."""
        return Labeling(**self._settings(), ratio=ratio)

    def faults(self, ratio: float | None) -> Iterator[tuple[str, str]]:
        """Key and fault of everything that keeps `at` from working."""
        return labeling_faults(**self._settings(), ratio=ratio)

    def _settings(self) -> dict[str, Any]:
        names = ("method", "threshold", "confidence", "sampling", "align", "bound", "strength")
        return {name: getattr(self, name) for name in names}


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare on or off as a boolean."""
    return ("on" if value else "off") if type(value) is bool else value


class ResultConfig(Section):
    align: Annotated[ResultAlign, BeforeValidator(_on_or_off)] = "auto"
    strength: Annotated[StrictFloat, AfterValidator(check_strength)] | None = None  # None: 1; auto: 1/2 or 1
    bound: Annotated[StrictFloat, AfterValidator(check_bound)] | None = None  # None: 5; auto: 2 or 5

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name in ("strength", "bound"):
            if self.align == "off" and getattr(self, name) is not None:
                yield (name,), "has no effect with result.align: off; remove it"
        if self.strength == 0:
            yield ("strength",), "found 0.0, which aligns nothing; set result.align: off instead"


class RoundConfig(Section):
    use: Literal["online"] | None = None  # None: labeled images in round 0, then pseudo labels
    epochs: Count | None = None
    steps: Count | None = None
    epoch_over: Literal["labeled", "unlabeled"] | None = None  # None: labeled in round 0, then unlabeled
    labeling_ratio: Annotated[StrictFloat, AfterValidator(check_ratio)] | None = None
    scale: tuple[Positive, Positive] | None = None
    learning_rate: Positive | None = None
    span: tuple[Fraction, Fraction] | None = None

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if (self.epochs is None) == (self.steps is None):
            yield (), "should have either epochs or steps"
        if self.steps and self.epoch_over:
            yield ("epoch_over",), "has no effect if steps are given; remove it"
        if message := falling(self.scale):
            yield ("scale",), message
        if self.span and self.span[0] >= self.span[1]:
            yield ("span",), f"found {list(self.span)}; the first number should be the smaller one"


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
    labeling: LabelingConfig = LabelingConfig()
    evaluation: ProtocolConfig = ProtocolConfig()
    result: ResultConfig = ResultConfig()
    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]

    def pseudo_labels(self, index: int) -> bool:
        """Whether a round begins with pseudo labels."""
        return index > 0 and self.rounds[index].use is None

    @property
    def pseudo_rounds(self) -> list[RoundConfig]:
        """The rounds that begin with pseudo labels."""
        return [config for index, config in enumerate(self.rounds) if self.pseudo_labels(index)]

    @property
    def halves(self) -> bool:
        """Whether there are rounds with labeled and unlabeled images."""
        return len(self.rounds) > 1 or self.rounds[0].use == "online"

    def spans(self) -> list[tuple[float, float]]:
        """Which part of the poly curve each round uses.

        It is the round's `span`, or [before / (before + own), 1], in epochs or steps. Equal rounds give [0, 1],
        [1/2, 1], [2/3, 1], as the growing epoch totals of the release do.
        """
        spans, done = [], 0
        for config in self.rounds:
            own = config.steps or config.epochs or 0
            spans.append(config.span or (done / (done + own), 1.0))
            done += own
        return spans

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
        network = self.network
        if (
            self.release_quirks
            and network.architecture == "deeplabv2"
            and network.backbone.startswith("timm/")
        ):
            yield (
                ("release_quirks",),
                "works with deeplabv2 only on darseg's own ResNets, because it changes the learning rate of stage 4; "
                f"network.backbone is {network.backbone}",
            )
        if network.freeze == "backbone":
            if self.training.recompute:
                yield ("training", "recompute"), "has no effect on a frozen backbone; remove it"
            if self.training.layer_decay != 1:
                yield ("training", "layer_decay"), "has no effect on a frozen backbone; remove it"
        yield from self._conflicts_of_rounds()

    def _conflicts_of_rounds(self) -> Iterator[tuple[Key, str]]:
        for index, config in enumerate(self.rounds):
            key: Key = ("rounds", index)
            if config.use == "online":
                if config.labeling_ratio is not None:
                    yield (*key, "labeling_ratio"), "has no effect in a round with use: online; remove it"
            elif index == 0 and config.labeling_ratio is not None:
                yield (
                    (*key, "labeling_ratio"),
                    "round 0 trains on labeled images alone, without a ratio; remove it",
                )
            elif index > 0:
                for name, message in self.labeling.faults(config.labeling_ratio):
                    if name == "labeling_ratio":
                        yield (*key, name), message
        if self.training.teacher is not None and all(config.use == "online" for config in self.rounds):
            yield ("training", "teacher"), "is for rounds that are not online; use online.teacher instead"
        with_steps = [config.steps is not None for config in self.rounds]
        complete = all((config.epochs is None) != (config.steps is None) for config in self.rounds)
        if complete and any(with_steps) and not all(with_steps):
            yield (
                ("rounds",),
                "some have epochs, some steps; use the same unit for all, because the learning rate's curve counts in it",
            )


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths; relative ones start at `folder`."""
    data = recipe.data.model_copy(
        update={"root": str((folder / Path(recipe.data.root).expanduser()).resolve())}
    )
    weights = recipe.network.weights
    if isinstance(weights, str) and weights != "none":
        weights = str((folder / Path(weights).expanduser()).resolve())
    network = recipe.network.model_copy(update={"weights": weights})
    return recipe.model_copy(update={"data": data, "network": network})
