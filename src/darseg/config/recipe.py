"""The recipe: what a user writes, typed and checked section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

Key = tuple[str | int, ...]  # ("rounds", 0, "steps")

Count = Annotated[StrictInt, Field(ge=1)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]


def _pair(value: Any) -> Any:
    return (value, value) if type(value) is int else value


Size = Annotated[tuple[Count, Count], BeforeValidator(_pair)]
"""Height and width; one number stands for both."""


NAMED_VALUES = ("index", "one_based", "binary", "cityscapes_ids")
"""Of data.label_values; `data/labels.py` knows what they mean."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Section):
    """Where the images of one role come from; a text alone is the list file."""

    list: StrictStr | None = None  # file below data.root: an id, or image-path [label-path], per line
    images: StrictStr | None = None  # folder below data.root; None: data.images
    labels: StrictStr | None = None
    every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep entries 0, n, 2n, …
    except_every: Annotated[StrictInt, Field(ge=2)] | None = None  # keep the others


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
                raise ValueError(f"the color of {name!r} should be three numbers 0..255, as in [128, 64, 0]")
        value = {name: tuple(color) for name, color in value.items()}
    else:
        raise ValueError("should be a built-in set, a list of names, or names with colors")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError('class names should be texts; quote names such as "yes" or "1"')
    if not 2 <= len(names) <= 255:
        raise ValueError(f"should have between 2 and 255 classes, these are {len(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"class names given twice: {', '.join(twice)}")
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
    # A saved recipe has its keys as texts.
    value = {int(key) if isinstance(key, str) and key.isdigit() else key: name for key, name in value.items()}
    for key, name in value.items():
        if key != "other" and not (type(key) is int and 0 <= key <= 65535):
            raise ValueError(f"{key!r} is no label value; should be 0 to 65535, or other")
        if type(name) not in (int, str):
            raise ValueError(f"{key}: {name!r} should be a class, by name or index, or ignore")
    return value


def _label_colors(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("should be class: [[red, green, blue], …], as in {ignore: [[0, 0, 0]]}")
    for name, colors in value.items():
        for color in colors if isinstance(colors, (list, tuple)) else [None]:
            parts = color if isinstance(color, (list, tuple)) else []
            if len(parts) != 3 or not all(type(part) is int and 0 <= part <= 255 for part in parts):
                raise ValueError(f"{name}: should be a list of colors, as in [[0, 0, 0], [255, 255, 255]]")
    return {name: tuple(tuple(color) for color in colors) for name, colors in value.items()}


class DataConfig(_Section):
    root: StrictStr  # absolute once loaded; in the file relative to it
    layout: Literal["folders", "cityscapes", "voc"] = "folders"
    classes: Annotated[Any, PlainValidator(_classes)]  # cityscapes | voc | camvid | names | {name: [r, g, b]}
    ignore: Annotated[StrictInt, Field(ge=0, le=255)] = 255
    label_values: Annotated[Any, PlainValidator(_values)] = "index"
    label_format: Literal["auto", "index", "color"] = "auto"
    label_colors: Annotated[Any, PlainValidator(_label_colors)] | None = None
    images: StrictStr | None = None  # None: images, or the layout's
    labels: StrictStr | None = None  # None: labels, or the layout's
    sbd: StrictStr | None = None  # voc: SBD's folder, absolute or below root
    labeled: Source | None = None
    unlabeled: Source | None = None
    validation: Source | None = None
    test: Source | None = None


class WeightsFile(_Section):
    """Weights to download; the digest is checked before anything is read."""

    url: Annotated[StrictStr, Field(pattern=r"^(https?|file)://")]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-fA-F]{8,64}$")]  # or its beginning


def _weights(value: Any) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, WeightsFile):
        return value
    if isinstance(value, Mapping):
        try:
            return WeightsFile(**value)
        except (ValidationError, TypeError):
            raise ValueError(
                "should have exactly url (https://…) and sha256 (8 to 64 hex digits, from the first on)"
            ) from None
    raise ValueError('should be "none", the path of a weight file, or {url: …, sha256: …}')


class NetworkConfig(_Section):
    architecture: Literal["pspnet", "deeplabv2"] = "pspnet"
    backbone: StrictStr = "resnet50"  # resnet18|34|50|101, …_half, …_deep, resnet101_caffe, timm/NAME
    output_stride: Literal[8, 16] = 8
    weights: Annotated[
        Any,
        PlainValidator(_weights),
        PlainSerializer(lambda value: value.model_dump() if isinstance(value, WeightsFile) else value),
    ]
    strict: StrictBool = True
    head_channels: Count | None = None  # None: 512 (pspnet)
    auxiliary_weight: NotNegative | None = None  # None: 0.4 (pspnet)


class AugmentationConfig(_Section):
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    rotate: Annotated[StrictFloat, Field(ge=0, le=180)] = 10.0
    blur: StrictBool = True
    mirror: StrictBool = True


# BatchNorm over the 1x1 bin of the pyramid needs two images.
BatchSize = Annotated[StrictInt, Field(ge=2)]


class TrainingConfig(_Section):
    crop: Size = (713, 713)
    batch: BatchSize = 16
    half_batch: BatchSize | None = None  # None: half of batch
    micro_batch: BatchSize | None = None  # None: batch and half batches go through the network whole
    learning_rate: Positive = 0.01
    head_factor: Positive = 10.0
    momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    power: Positive = 0.9
    pseudo_weight: NotNegative = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sync_batchnorm: StrictBool | None = None  # None: for pspnet
    compile: StrictBool = False
    recompute: StrictBool = False
    checkpoint_every: Count = 200
    keep_checkpoints: Count = 2
    workers: Count | None = None  # None: by the machine's cores
    cache: StrictBool | None = None  # None: by free memory


class ProtocolConfig(_Section):
    base_size: Count | None = None
    window: Size | None = None
    mirror: StrictBool = True
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)


class LabelingConfig(ProtocolConfig):
    method: Literal["dars", "cbst", "global"] = "dars"
    threshold: Annotated[StrictFloat, Field(gt=0, lt=1)] | None = None
    confidence: Literal["float16", "fine"] = "float16"
    sampling: Literal["random", "none"] = "random"
    keep_predictions: StrictBool = False
    predict_twice: StrictBool = False


class RoundConfig(_Section):
    epochs: Count | None = None
    steps: Count | None = None
    epoch_over: Literal["labeled", "unlabeled"] | None = None  # None: labeled in round 0, then unlabeled
    labeling_ratio: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    scale: tuple[Positive, Positive] | None = None
    learning_rate: Positive | None = None
    span: tuple[Fraction, Fraction] | None = None


class Recipe(_Section):
    """Everything a run is made of."""

    seed: Annotated[StrictInt, Field(ge=0)] = 0
    threads: Count | None = None
    release_quirks: StrictBool = False
    data: DataConfig
    network: NetworkConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    training: TrainingConfig = TrainingConfig()
    labeling: LabelingConfig = LabelingConfig()
    evaluation: ProtocolConfig = ProtocolConfig()
    rounds: Annotated[tuple[RoundConfig, ...], Field(min_length=1)]

    def spans(self) -> list[tuple[float, float]]:
        """Fractions of the poly curve per round: as given, or [before / (before + own), 1] in epochs or steps.

        Equal rounds give [0, 1], [1/2, 1], [2/3, 1] – what the release's growing epoch totals amount to.
        """
        spans, done = [], 0
        for one in self.rounds:
            own = one.steps or one.epochs or 0
            spans.append(one.span or (done / (done + own), 1.0))
            done += own
        return spans


def contradictions(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    data, labeling = recipe.data, recipe.labeling
    if data.label_values != "index" and data.ignore != 255:
        yield ("data", "ignore"), "has no meaning beside data.label_values; say value: ignore there"
    elif not isinstance(data.classes, str) and data.ignore < len(data.classes):
        yield (
            ("data", "ignore"),
            f"found {data.ignore}, which is class {data.ignore} of {len(data.classes)}; should be no class",
        )
    if data.layout != "folders":
        for name in ("images", "labels"):
            if getattr(data, name) is not None:
                yield ("data", name), f"layout {data.layout} knows where they are; leave it out"
        for role in ("labeled", "unlabeled", "validation", "test"):
            if (source := getattr(data, role)) and source.labels is not None:
                yield ("data", role, "labels"), f"layout {data.layout} knows where they are; leave it out"
    if data.label_format == "index" and data.label_colors:
        yield ("data", "label_colors"), "has no meaning with label_format index; leave one out"
    if data.label_format == "color" and data.label_values != "index":
        yield ("data", "label_values"), "has no meaning with label_format color; leave one out"
    if data.layout != "voc" and data.sbd:
        yield ("data", "sbd"), f"belongs to layout voc, this is {data.layout}"
    for role in ("labeled", "unlabeled", "validation", "test"):
        source = getattr(data, role)
        if source and source.every and source.except_every:
            yield ("data", role), "has both every and except_every; should have one"
    scales: list[tuple[Key, tuple[float, float] | None]] = [
        (("augmentation", "scale"), recipe.augmentation.scale)
    ]
    scales += [(("rounds", index, "scale"), one.scale) for index, one in enumerate(recipe.rounds)]
    for key, scale in scales:
        if scale and scale[0] > scale[1]:
            yield key, f"found {list(scale)}; the first should be the smaller"
    if (labeling.method == "global") != (labeling.threshold is not None):
        need = (
            "needs a confidence threshold"
            if labeling.method == "global"
            else "takes no threshold (only global does)"
        )
        yield ("labeling", "threshold"), f"method {labeling.method} {need}"
    if labeling.keep_predictions and labeling.predict_twice:
        yield (
            ("labeling", "predict_twice"),
            "makes no files that labeling.keep_predictions could keep; set one",
        )
    if labeling.sampling == "none" and labeling.method != "dars":
        yield ("labeling", "sampling"), f"only method dars samples, this is {labeling.method}; leave it out"
    network, training = recipe.network, recipe.training
    if network.architecture == "deeplabv2":
        for name in ("head_channels", "auxiliary_weight"):
            if getattr(network, name):
                yield ("network", name), "deeplabv2 has no such head; leave it out"
        if recipe.release_quirks and network.backbone.startswith("timm/"):
            yield (
                ("release_quirks",),
                "stage 4 at 10 x belongs to a ResNet of darseg; choose one as network.backbone",
            )
    micro, half = training.micro_batch, training.half_batch or training.batch // 2
    for name, size in (("batch", training.batch), ("half_batch", half if len(recipe.rounds) > 1 else 0)):
        if micro and size > micro and size % micro:
            yield ("training", "micro_batch"), f"found {micro}; should divide training.{name}, {size}"
    if training.recompute and training.compile:
        # Compiled, BatchNorm's statistics of the two passes of a step move wrongly, or the backward pass fails.
        yield ("training", "recompute"), "does not work with training.compile; set one"
    if len(recipe.rounds) > 1 and recipe.training.half_batch is None and recipe.training.batch < 4:
        yield (
            ("training", "batch"),
            f"found {recipe.training.batch}; half of it is below 2, set training.half_batch",
        )
    units = {"steps" if one.steps else "epochs" for one in recipe.rounds}
    for index, one in enumerate(recipe.rounds):
        key: Key = ("rounds", index)
        if (one.epochs is None) == (one.steps is None):
            yield key, "should have either epochs or steps"
        if one.steps and one.epoch_over:
            yield (*key, "epoch_over"), "has no meaning where steps are given; leave it out"
        if one.span and one.span[0] >= one.span[1]:
            yield (*key, "span"), f"found {list(one.span)}; the first should be the smaller"
        if index == 0 and one.labeling_ratio is not None:
            yield (
                (*key, "labeling_ratio"),
                "the first round trains on labeled images alone and takes no ratio",
            )
        elif index > 0 and labeling.method == "global" and one.labeling_ratio is not None:
            yield (
                (*key, "labeling_ratio"),
                "with labeling.method global the threshold decides; should be left out",
            )
        elif index > 0 and labeling.method != "global" and one.labeling_ratio is None:
            yield key, f"needs a labeling_ratio (0 < ratio <= 1) for labeling.method {labeling.method}"
    if len(units) > 1 and all((one.epochs is None) != (one.steps is None) for one in recipe.rounds):
        yield (
            ("rounds",),
            "some have epochs, some steps; should be one unit for all, since the schedule counts in it",
        )


def resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Paths made absolute."""
    data = recipe.data.model_copy(
        update={"root": str((folder / Path(recipe.data.root).expanduser()).resolve())}
    )
    weights = recipe.network.weights
    if isinstance(weights, str) and weights != "none":
        weights = str((folder / Path(weights).expanduser()).resolve())
    network = recipe.network.model_copy(update={"weights": weights})
    return recipe.model_copy(update={"data": data, "network": network})
