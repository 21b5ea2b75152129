"""The recipe's section `online` – learning from unlabeled images while training – and its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, StrictBool, StrictFloat, StrictInt

from darseg.choices import AdversarialMethod, Mixing, OnlineAlign, OnlineMethod
from darseg.config.values import Count, Fraction, Key, NotNegative, Positive, Section, falling
from darseg.pseudo.labeling import BOUND, check_bound, check_ratio, check_strength

OF_DISCRIMINATORS = ("method", "batch", "above", "teacher", "adversarial")
"""The keys that methods with a discriminator have."""


class ColorsConfig(Section):
    """How colors are changed at random; data/colors.py has what the numbers mean."""

    jitter: tuple[NotNegative, NotNegative, NotNegative, Annotated[StrictFloat, Field(ge=0, le=0.5)]] = (
        0.5,
        0.5,
        0.5,
        0.25,
    )
    jitter_share: Fraction = 0.8
    gray_share: Fraction = 0.2
    blur: tuple[Positive, Positive] = (0.1, 2.0)
    blur_share: Fraction = 0.5

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if message := falling(self.blur):
            yield ("blur",), message


Area = Annotated[StrictFloat, Field(gt=0, le=1)]


class BoxesConfig(Section):
    """How boxes of CutMix are drawn; data/unlabeled.py has what the numbers mean."""

    share: Fraction = 0.5
    area: tuple[Area, Area] = (0.02, 0.4)
    aspect: tuple[Positive, Positive] | None = (0.3, 1 / 0.3)

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name in ("area", "aspect"):
            if message := falling(getattr(self, name)):
                yield (name,), message


class TeacherConfig(Section):
    """A running average of the network's weights."""

    decay: Annotated[StrictFloat, Field(ge=0, lt=1)] | None = None  # None: as published
    result: StrictBool = True  # the round saves it


class AlignedConfig(Section):
    """Acceptance by class shares; `Aligned` in methods/acceptance.py has what the numbers mean."""

    ratio: Annotated[StrictFloat, AfterValidator(check_ratio)]
    window: Count = 50  # steps


class AdversarialConfig(Section):
    """Methods with a discriminator; None: as published. methods/adversarial.py has what it means."""

    learning_rate: Positive | None = None  # of the discriminator
    labeled: NotNegative | None = None
    unlabeled: NotNegative | None = None
    self_training: NotNegative | None = None
    start: Annotated[StrictInt, Field(ge=0)] | None = None  # step


class OnlineConfig(Section):
    """What rounds with `use: online` do; None: as published for the method."""

    method: OnlineMethod = "fixmatch"
    batch: Count | None = None  # None: as many unlabeled images a step as labeled ones
    strong_views: Count | None = None
    above: Fraction | None = None
    aligned: AlignedConfig | None = None  # instead of `above`
    class_thresholds: StrictBool = False  # instead of `above`
    align: OnlineAlign = "none"
    align_window: Count = 50  # steps
    bound: Annotated[StrictFloat, AfterValidator(check_bound)] = BOUND
    strength: Annotated[StrictFloat, AfterValidator(check_strength)] = 1.0
    weight: NotNegative = 1.0
    mixing: Mixing | None = None
    labeler: Literal["teacher", "student"] | None = None
    teacher: TeacherConfig | None = None
    colors: ColorsConfig | None = None
    boxes: BoxesConfig | None = None
    adversarial: AdversarialConfig | None = None

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name in ("teacher", "colors", "boxes"):
            section: Section | None = getattr(self, name)
            for key, message in section.conflicts() if section else ():
                yield (name, *key), message
        if self.method in get_args(AdversarialMethod):
            yield from self._faults_with_discriminator()
            return
        if self.adversarial is not None:
            yield ("adversarial",), f"has no effect with online.method: {self.method}; remove it"
        yield from self._faults_of_acceptance()
        if self.labeler == "student" and self.teacher is not None and self.method != "cps":
            yield ("teacher",), "has no effect with online.labeler: student; remove one of them"
        if self.labeler == "student" and self.method == "mean_teacher":
            yield ("labeler",), "mean_teacher is defined by its teacher; remove the key, or use fixmatch"
        if self.labeler is not None and self.method == "cps":
            yield ("labeler",), "has no effect with cps, whose two networks label for each other; remove it"
        if self.method == "unimatch_v2" and self.strong_views not in (None, 2):
            yield (
                ("strong_views",),
                f"found {self.strong_views}; unimatch_v2 drops complementary channels of two views; remove the key",
            )
        mixing = self.mixing or ("classmix" if self.method == "classmix" else None)
        if self.boxes is not None and mixing in ("classmix", "none"):
            yield ("boxes",), f"has no effect with online.mixing: {mixing}; remove it"
        if self.mixing != "none" and self.batch is not None and self.batch % 2:
            yield (
                ("batch",),
                f"found {self.batch}; images are mixed in pairs, so it should be even. Or set online.mixing: none",
            )

    def _faults_with_discriminator(self) -> Iterator[tuple[Key, str]]:
        for name, value in self:
            if name not in OF_DISCRIMINATORS and value != type(self).model_fields[name].default:
                yield (
                    (name,),
                    f"has no effect with online.method: {self.method}, where a discriminator judges; remove it",
                )
        if self.method == "s4gan" and self.adversarial is not None and self.adversarial.labeled is not None:
            yield (
                ("adversarial", "labeled"),
                "has no effect with s4gan, whose discriminator does not judge labeled images; remove it",
            )

    def _faults_of_acceptance(self) -> Iterator[tuple[Key, str]]:
        rules = {"above": self.above is not None, "aligned": self.aligned is not None}
        given = [
            name for name, there in (rules | {"class_thresholds": self.class_thresholds}).items() if there
        ]
        for name in given[1:]:
            yield (name,), f"is another rule than online.{given[0]}; remove one of them"
        if self.align != "decisions":
            for name in ("align_window", "bound", "strength"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield (name,), "has an effect only with online.align: decisions; remove it, or set that"
        if self.align != "none" and self.method == "mean_teacher":
            message = "mean_teacher learns probabilities, not decisions; remove the key, or use fixmatch"
            yield ("align",), message
