"""The recipe's sections `network`, `augmentation` and `training`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from darseg.choices import Architecture, DynamicMethod, Precision
from darseg.config.online import ColorsConfig, TeacherConfig
from darseg.config.values import (
    Count,
    Key,
    NotNegative,
    Positive,
    Section,
    Size,
    WeightsFile,
    check_weights,
    falling,
    or_word,
)


class NetworkConfig(Section):
    architecture: Architecture = "pspnet"
    backbone: StrictStr = "resnet50"  # resnet18|34|50|101, …_half, …_deep, resnet101_caffe, timm/NAME
    output_stride: Literal[8, 16] = 8
    weights: Annotated[
        Any,
        PlainValidator(check_weights),
        PlainSerializer(lambda value: value.model_dump() if isinstance(value, WeightsFile) else value),
    ]
    strict: StrictBool = True
    head_channels: Count | None = None  # None: as published
    auxiliary_weight: NotNegative | None = None  # None: 0.4 (pspnet)
    freeze: Literal["none", "backbone"] = "none"
    drop_path: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.0

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.architecture in ("deeplabv2", "linear") and self.head_channels:
            yield ("head_channels",), f"has no effect with {self.architecture}; remove it"
        if self.architecture != "pspnet" and self.auxiliary_weight:
            yield ("auxiliary_weight",), f"is for pspnet; {self.architecture} has no such head. Remove it"
        if self.architecture == "dpt" and self.output_stride != 8:
            yield ("output_stride",), "has no effect with dpt, which takes its backbone as it is; remove it"
        if self.drop_path and not self.backbone.startswith("timm/"):
            yield ("drop_path",), f"works with backbones of timm; the backbone is {self.backbone}. Remove it"
        if self.drop_path and self.freeze == "backbone":
            yield ("drop_path",), "has no effect on a frozen backbone; remove it"


class AugmentationConfig(Section):
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    rotate: Annotated[StrictFloat, Field(ge=0, le=180)] = 10.0
    blur: StrictBool = True
    mirror: StrictBool = True
    colors: ColorsConfig | None = None  # None: colors stay as they are

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if message := falling(self.scale):
            yield ("scale",), message
        for key, message in self.colors.conflicts() if self.colors else ():
            yield ("colors", *key), message


# BatchNorm over means of whole images (pspnet, deeplabv3plus) needs at least two.
BatchSize = Annotated[StrictInt, Field(ge=2)]


class OhemConfig(Section):
    """Learn from hard pixels of the labeled images alone."""

    threshold: Annotated[StrictFloat, Field(gt=0, le=1)] = 0.7  # hard: the true class has less probability
    least: Count = 100_000  # pixels kept for an image, on average


# Class → factor, or "balanced".
ClassWeights = Annotated[
    dict[StrictStr, Positive],
    or_word("balanced", "should be balanced, or class: factor, as in {road: 0.5}"),
    PlainSerializer(lambda value: value),
]


class DynamicLossConfig(Section):
    """How pseudo labels are doubted; `DynamicLoss` in methods/dynamic.py has what the numbers mean."""

    method: DynamicMethod = "dst"
    gamma: NotNegative | None = None  # None: 9 (dst), 5 (dmt)
    gamma_disagreed: NotNegative | None = None  # None: as gamma (dmt)

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.method == "dst" and self.gamma_disagreed is not None:
            yield ("gamma_disagreed",), "is for method dmt, where two networks may disagree; remove it"


class TrainingConfig(Section):
    crop: Size = (713, 713)
    batch: BatchSize = 16
    half_batch: Count | None = None  # None: half of batch
    pseudo_batch: Count | None = None  # None: as many pseudo-labeled images as labeled ones
    micro_batch: BatchSize | None = None  # None: batches and half batches are not divided
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive | None = None  # None: 0.01 (sgd), 5e-6 (adamw)
    head_factor: Positive | None = None  # None: 10 (sgd), 40 (adamw)
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] | None = None  # None: 0.9 (sgd)
    weight_decay: NotNegative | None = None  # None: 1e-4 (sgd), 0.01 (adamw)
    decay_vectors: StrictBool = True  # False: no weight decay on norms, biases and embeddings
    layer_decay: Annotated[StrictFloat, Field(gt=0, le=1)] = 1.0
    power: Positive = 0.9
    warm_up: Annotated[StrictInt, Field(ge=0)] = 0  # steps of each round
    clip: Positive | None = None  # largest norm of the gradient
    ohem: OhemConfig | None = None
    class_weights: ClassWeights | None = None
    pseudo_weight: NotNegative = 1.0
    one_pass: StrictBool | None = None  # None: with dynamic_loss
    dynamic_loss: DynamicLossConfig | None = None  # None: all pseudo labels count alike
    teacher: TeacherConfig | None = None  # of rounds that are not online; None: none
    precision: Precision = "fp32"
    sync_batchnorm: StrictBool | None = None  # None: on, but not for deeplabv2 and dpt
    compile: StrictBool = False
    recompute: StrictBool = False
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2
    workers: Count | None = None  # None: chosen by the number of cores
    cache: StrictBool | None = None  # None: chosen by free memory

    @property
    def joins_halves(self) -> bool:
        """Whether labeled and pseudo-labeled images go through the network together."""
        return self.dynamic_loss is not None if self.one_pass is None else self.one_pass

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        yield from self._undivided("batch", self.batch)
        if self.optimizer == "adamw" and self.momentum is not None:
            yield ("momentum",), "is for sgd; adamw has its own averages. Remove it"
        if self.teacher is not None and not self.teacher.result:
            yield (
                ("teacher", "result"),
                "found false; a teacher that only follows has no effect. Remove training.teacher",
            )
        if self.recompute and self.compile:
            # Compiled, BatchNorm's statistics of the two passes of a step move wrongly, or the backward pass fails.
            yield ("recompute",), "does not work with training.compile; set only one of them"

    def conflicts_of_halves(self) -> Iterator[tuple[Key, str]]:
        """Conflicts of the half batches, which only rounds with unlabeled images have."""
        if self.half_batch == 1 and not self.joins_halves:
            yield (
                ("half_batch",),
                "found 1; should be at least 2, unless labeled and pseudo-labeled images go through the network "
                "together (training.one_pass: true)",
            )
        if self.one_pass is False and self.dynamic_loss is not None:
            yield ("one_pass",), "found false, but training.dynamic_loss needs one pass; remove it"
        for key, message in self.dynamic_loss.conflicts() if self.dynamic_loss else ():
            yield ("dynamic_loss", *key), message
        yield from self._undivided("half_batch", self.half_batch or self.batch // 2)
        if self.half_batch is None and self.batch < 4:
            yield ("batch",), f"found {self.batch}; half of it is less than 2. Set training.half_batch"

    def _undivided(self, name: str, size: int) -> Iterator[tuple[Key, str]]:
        micro = self.micro_batch
        if micro and size > micro and size % micro:
            yield ("micro_batch",), f"found {micro}; should divide training.{name}, which is {size}"
