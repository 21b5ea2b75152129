"""The recipe: what a user writes, typed and checked section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from darseg.choices import Architecture, LabelFormat, NamedValues, Precision, ResultAlign
from darseg.config.values import FilePath, Key, Section, WeightsFile, check_label_parts, check_weights
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

Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


def _pair(value: Any) -> Any:
    return (value, value) if type(value) is int else value


Size = Annotated[tuple[Count, Count], BeforeValidator(_pair)]  # height and width; a single number means both


NAMED_VALUES: tuple[str, ...] = get_args(NamedValues)
"""Values of data.label_values that have a name; `data/encoding.py` gives them their meaning."""


def _falling(bounds: tuple[float, float] | None) -> str | None:
    """What is wrong with two bounds that are in the wrong order; otherwise None."""
    if bounds is None or bounds[0] <= bounds[1]:
        return None
    return f"found {list(bounds)}; the first number should be the smaller one"


class SourceConfig(Section):
    """Where the images of one role come from; a plain string is the list file."""

    list: FilePath | None = None  # file below data.root: an id, or image-path [label-path], per line
    images: FilePath | None = None  # folder below data.root; None: data.images
    labels: FilePath | None = None
    every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep entries 0, n, 2n, …
    except_every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep the others

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.every and self.except_every:
            yield (), "has both every and except_every; keep one of them"


Source = Annotated[
    SourceConfig, BeforeValidator(lambda value: {"list": value} if isinstance(value, str) else value)
]


def _classes(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        names, value = list(value), tuple(value)
    elif isinstance(value, Mapping):
        names = list(value)
        for name, color in value.items():
            parts = color if isinstance(color, (list, tuple)) else []
            if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
                raise ValueError(
                    f"the color of {name!r} should be three numbers from 0 to 255, as in [128, 64, 0]"
                )
        value = {name: tuple(color) for name, color in value.items()}
    else:
        raise ValueError("should be the name of a built-in set, a list of names, or names with colors")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError('class names should be strings; quote names such as "yes" or "1"')
    if not 2 <= len(names) <= 255:
        raise ValueError(f"should have 2 to 255 classes, and has {len(names)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"each class name should appear once; repeated: {', '.join(repeated)}")
    return value


def _values(value: Any) -> Any:
    if isinstance(value, str):
        if value not in NAMED_VALUES:
            raise ValueError(f"should be one of {', '.join(NAMED_VALUES)}, or value: class")
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"should be one of {', '.join(NAMED_VALUES)}, or value: class, as in {{0: ignore, 255: crack}}"
        )
    # A saved recipe holds its keys as strings.
    value = {int(key) if isinstance(key, str) and key.isdigit() else key: name for key, name in value.items()}
    for key, name in value.items():
        if key != "other" and not (type(key) is int and 0 <= key <= 65535):
            raise ValueError(f"{key!r} is not a label value; it should be 0 to 65535, or other")
        if type(name) not in (int, str):
            raise ValueError(f"{key}: {name!r} should be the name or index of a class, or ignore")
    return value


def _label_colors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("should be class: [[red, green, blue], …], as in {ignore: [[0, 0, 0]]}")
    for name, colors in value.items():
        if name == "other" and isinstance(colors, str):
            if colors != "ignore":
                raise ValueError("other: should be ignore, or the colors of a class that is named other")
            continue
        for color in colors if isinstance(colors, (list, tuple)) else [None]:
            parts = color if isinstance(color, (list, tuple)) else []
            if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
                raise ValueError(f"{name}: should be a list of colors, as in [[0, 0, 0], [255, 255, 255]]")
    return {
        name: colors if isinstance(colors, str) else tuple(tuple(color) for color in colors)
        for name, colors in value.items()
    }


def _bands(value: Any) -> Any:
    value = [value] if type(value) is int else value
    if isinstance(value, (list, tuple)) and len(value) not in (1, 3):
        raise ValueError(f"should be three bands (red, green, blue) or one (gray), and has {len(value)}")
    return tuple(value) if isinstance(value, list) else value


class DataConfig(Section):
    root: FilePath  # in the file: relative to its folder; once loaded: absolute
    layout: Literal["folders", "cityscapes", "voc"] = "folders"
    classes: Annotated[Any, PlainValidator(_classes)]  # cityscapes | voc | camvid | names | {name: [r, g, b]}
    ignore: Annotated[StrictInt, Field(ge=0, le=255)] = 255
    label_values: Annotated[Any, PlainValidator(_values)] = "index"
    label_format: LabelFormat = "auto"
    label_colors: Annotated[Any, PlainValidator(_label_colors)] | None = None
    label_parts: Annotated[Any, PlainValidator(check_label_parts)] | None = None
    label_transparent: StrictStr | StrictInt = "ignore"  # what alpha 0 is: ignore, a class, or as_drawn
    orientation: Literal["auto", "upright", "stored"] = "auto"
    bands: Annotated[tuple[Count, ...], BeforeValidator(_bands)] | None = None  # None: the first three
    white: StrictFloat | None = None  # for values of other than 8 bits; None: 65535
    black: StrictFloat = 0.0
    max_pixels: Count = 2**30
    images: FilePath | None = None  # None: images, or the layout's
    labels: FilePath | None = None  # None: labels, or the layout's
    sbd: FilePath | None = None  # voc: SBD's folder, absolute or below root
    labeled: Source | None = None
    unlabeled: Source | None = None
    validation: Source | None = None
    test: Source | None = None

    def sources(self) -> Iterator[tuple[str, SourceConfig]]:
        """The sources that are given, by role."""
        for role in ("labeled", "unlabeled", "validation", "test"):
            if source := getattr(self, role):
                yield role, source

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if self.label_values != "index" and self.ignore != 255:
            yield (
                ("ignore",),
                "has no effect with data.label_values; map the value to ignore there",
            )
        elif not isinstance(self.classes, str) and self.ignore < len(self.classes):
            yield (
                ("ignore",),
                f"found {self.ignore}, which is class {self.ignore} of {len(self.classes)}; "
                "use a value that is not a class",
            )
        if self.label_format == "index" and self.label_colors:
            yield ("label_colors",), "has no effect with label_format index; remove one of them"
        if self.label_format == "color" and self.label_values != "index":
            yield ("label_values",), "has no effect with label_format color; remove one of them"
        if self.label_parts is not None:
            if self.layout != "folders":
                yield ("label_parts",), f"does not work with layout {self.layout}; remove it"
            named = {"label_values", "label_format", "label_colors", "label_transparent", "ignore"}
            for name in sorted(named & self.model_fields_set):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield (name,), "has no effect with data.label_parts; remove it"
        if self.black >= (65535 if self.white is None else self.white):
            yield ("black",), f"found {self.black:g}; should be below data.white"
        if self.layout != "voc" and self.sbd:
            yield ("sbd",), f"is only for layout voc, and the layout is {self.layout}; remove it"
        if self.layout != "folders":
            fixed: list[Key] = [(name,) for name in ("images", "labels") if getattr(self, name) is not None]
            fixed += [(role, "labels") for role, source in self.sources() if source.labels is not None]
            for key in fixed:
                yield key, f"is fixed by layout {self.layout}; remove it"
        for role, source in self.sources():
            for key, message in source.conflicts():
                yield (role, *key), message


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
    head_channels: Count | None = None  # None: 512 (pspnet)
    auxiliary_weight: NotNegative | None = None  # None: 0.4 (pspnet)

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        for name in ("head_channels", "auxiliary_weight"):
            if self.architecture == "deeplabv2" and getattr(self, name):
                yield (name,), "is for pspnet; deeplabv2 has no such head. Remove it"


class AugmentationConfig(Section):
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    rotate: Annotated[StrictFloat, Field(ge=0, le=180)] = 10.0
    blur: StrictBool = True
    mirror: StrictBool = True

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        if message := _falling(self.scale):
            yield ("scale",), message


# BatchNorm of the pyramid's 1x1 bin needs at least two images.
BatchSize = Annotated[StrictInt, Field(ge=2)]


class TrainingConfig(Section):
    crop: Size = (713, 713)
    batch: BatchSize = 16
    half_batch: BatchSize | None = None  # None: half of batch
    micro_batch: BatchSize | None = None  # None: batches and half batches are not divided
    learning_rate: Positive = 0.01
    head_factor: Positive = 10.0
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    power: Positive = 0.9
    pseudo_weight: NotNegative = 1.0
    precision: Precision = "fp32"
    sync_batchnorm: StrictBool | None = None  # None: on for pspnet
    compile: StrictBool = False
    recompute: StrictBool = False
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2
    workers: Count | None = None  # None: chosen by the number of cores
    cache: StrictBool | None = None  # None: chosen by free memory

    def conflicts(self) -> Iterator[tuple[Key, str]]:
        yield from self._undivided("batch", self.batch)
        if self.recompute and self.compile:
            # Compiled, BatchNorm's statistics of the two passes of a step move wrongly, or the backward pass fails.
            yield ("recompute",), "does not work with training.compile; set only one of them"

    def conflicts_of_halves(self) -> Iterator[tuple[Key, str]]:
        """Conflicts of the half batches, which only rounds with pseudo labels have."""
        yield from self._undivided("half_batch", self.half_batch or self.batch // 2)
        if self.half_batch is None and self.batch < 4:
            yield ("batch",), f"found {self.batch}; half of it is less than 2. Set training.half_batch"

    def _undivided(self, name: str, size: int) -> Iterator[tuple[Key, str]]:
        micro = self.micro_batch
        if micro and size > micro and size % micro:
            yield ("micro_batch",), f"found {micro}; should divide training.{name}, which is {size}"


class ProtocolConfig(Section):
    base_size: Count | None = None
    window: Size | None = None
    mirror: StrictBool = True
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)


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
        if message := _falling(self.scale):
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
    labeling: LabelingConfig = LabelingConfig()
    evaluation: ProtocolConfig = ProtocolConfig()
    result: ResultConfig = ResultConfig()
    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]

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
        if len(self.rounds) > 1:
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
        yield from self._conflicts_of_rounds()

    def _conflicts_of_rounds(self) -> Iterator[tuple[Key, str]]:
        for index, config in enumerate(self.rounds):
            key: Key = ("rounds", index)
            if index == 0 and config.labeling_ratio is not None:
                yield (
                    (*key, "labeling_ratio"),
                    "round 0 trains on labeled images alone, without a ratio; remove it",
                )
            elif index > 0:
                for name, message in self.labeling.faults(config.labeling_ratio):
                    if name == "labeling_ratio":
                        yield (*key, name), message
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
