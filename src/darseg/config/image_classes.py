"""The recipe's section `image_classes`: a classifier that removes classes from predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, StrictFloat, StrictInt, StrictStr

from darseg.config.values import (
    Count,
    Fraction,
    Key,
    NotNegative,
    Positive,
    Section,
    WeightsFile,
    check_weights,
)

Epoch = Annotated[StrictInt, Field(ge=0)]


class ImageClassesConfig(Section):
    """How the classifier learns and decides; by default as MLMT's release. See methods/mlmt.py."""

    backbone: StrictStr = "resnet101"  # one of darseg's own ResNets
    weights: Annotated[
        Any,
        PlainValidator(check_weights),
        PlainSerializer(lambda value: value.model_dump() if isinstance(value, WeightsFile) else value),
    ]
    size: Annotated[StrictInt, Field(ge=32, le=4096)] = 320  # side of the square that images are scaled to
    batch: Count = 16
    unlabeled_batch: Count = 80
    micro_batch: Count | None = None  # None: batches are not divided
    epochs: Count = 100  # of the labeled images
    learning_rate: Positive = 0.03
    lowest_rate: NotNegative = 0.0001
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 0.00001
    decay: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.999  # of the teacher
    weight: NotNegative = 1.0  # of the unlabeled images
    ramp: tuple[Epoch, Epoch] = (10, 60)  # epochs at which the weight leaves 0 and is whole
    threshold: Fraction = 0.2
    keep: tuple[StrictStr, ...] | None = None  # None: the class background, if there is one

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.ramp[0] >= self.ramp[1]:
            yield ("ramp",), f"found {list(self.ramp)}; the first number should be the smaller one"
        elif self.weight and self.ramp[0] >= self.epochs - 1:
            yield (
                ("ramp",),
                f"found {list(self.ramp)} with {self.epochs} epochs, so the unlabeled images would never count; let it "
                "begin earlier, or set image_classes.weight: 0",
            )
        if self.lowest_rate > self.learning_rate:
            yield ("lowest_rate",), f"found {self.lowest_rate}; should be at most image_classes.learning_rate"
