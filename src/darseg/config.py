"""The recipe: what a user writes as YAML, typed, checked – all faults at once – and saved resolved."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
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

from darseg.errors import RecipeError, faults

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
                raise ValueError(f"the colour of {name!r} should be three numbers 0..255, as in [128, 64, 0]")
        value = {name: tuple(color) for name, color in value.items()}
    else:
        raise ValueError("should be a built-in set, a list of names, or names with colours")
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
                raise ValueError(f"{name}: should be a list of colours, as in [[0, 0, 0], [255, 255, 255]]")
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


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1e-4 as a number, as everybody means it, and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Text:
    """Plain values of a YAML text, where each key stands, and what is wrong with the text itself."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Key, str] = {}
        self.faults: list[str] = []

    def read(self, text: str, key: Key = (), override: str | None = None) -> Any:
        """The values of `text`, to stand at `key`."""
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, key, override)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = override or (f"{self.name}:{mark.line + 1}" if mark else self.name)
            self.faults.append(f"{place}: no valid YAML: {getattr(error, 'problem', None) or error}")
            return None
        finally:
            loader.dispose()

    def _value(self, loader: _Loader, node: yaml.Node, key: Key, override: str | None) -> Any:
        place = override or f"{self.name}:{node.start_mark.line + 1}"
        self.places.setdefault(key, place)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._value(loader, item, (*key, index), override) for index, item in enumerate(node.value)
            ]
        if isinstance(node, yaml.MappingNode):
            values: dict[Any, Any] = {}
            for name_node, value_node in node.value:
                name = loader.construct_object(name_node)
                where = override or f"{self.name}:{name_node.start_mark.line + 1}"
                if not isinstance(name, (str, int, float, bool, type(None))):
                    self.faults.append(f"{where}: a key should be a text")
                    continue
                inner = (*key, name)
                if name in values:
                    self.faults.append(
                        f"{where}: {dotted(inner)} is given twice, first at {self.places[inner]}"
                    )
                self.places[inner] = where
                values[name] = self._value(loader, value_node, inner, override)
            return values
        return loader.construct_object(node)

    def place(self, key: Key) -> str:
        """Where a key stands, or the nearest that encloses it."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, f"{self.name}:1")


def dotted(key: Sequence[str | int]) -> str:
    """("rounds", 0, "steps") → "rounds.0.steps"."""
    return ".".join(map(str, key))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and the changes of a command line.

    Args:
        overrides: "section.key=value", the value in YAML; list elements by number ("rounds.0.steps=300").

    `data.root` and the path of `network.weights` are relative to the recipe's folder, and absolute in the result.
    Raises RecipeError with all faults, each with its line and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. Give the path of a YAML file.") from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path}: a folder, not a recipe. Give the path of a YAML file; `darseg init` writes one for a folder of "
            "images, and a run folder has its own, recipe.yaml."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    text = _Text(path.name)
    values = text.read(content)
    if not text.faults and not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        text.faults.append(
            f"{path.name}:1: found {found}; a recipe has the keys {', '.join(Recipe.model_fields)}"
        )
    if not text.faults:
        for override in overrides:
            _override(values, override, text)
    if text.faults:
        raise RecipeError(faults(f"{path} cannot be used", text.faults))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_describe(one["loc"], one["type"], one["msg"], one["input"], text) for one in error.errors()]
        raise RecipeError(faults(f"{path} cannot be used", lines)) from None
    wrong = [f"{text.place(key)}: {dotted(key)}: {message}" for key, message in _contradictions(recipe)]
    if wrong:
        raise RecipeError(faults(f"{path} cannot be used", wrong))
    return _resolved(recipe, path.resolve().parent)


def _override(values: dict, override: str, text: _Text) -> None:
    place = f"override {override}"
    name, equals, value = override.partition("=")
    if not equals or not name:
        text.faults.append(f"{place}: should be section.key=value, as in training.batch=8")
        return
    key: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    # What stood below this key is gone.
    text.places = {known: where for known, where in text.places.items() if known[: len(key)] != key}
    new = text.read(value, key, place)
    text.places[key] = place
    into: Any = values
    for depth, part in enumerate(key[:-1]):
        if isinstance(into, list) and isinstance(part, int) and part < len(into):
            into = into[part]
        elif isinstance(into, dict):
            if into.get(part) is None:
                into[part] = {}
                text.places.setdefault(key[: depth + 1], place)
            elif isinstance(into[part], str):  # a source given as its list file alone
                into[part] = {"list": into[part]}
            into = into[part]
        else:
            text.faults.append(f"{place}: there is no {dotted(key[: depth + 1])}")
            return
    last = key[-1]
    if isinstance(into, dict) or (isinstance(into, list) and isinstance(last, int) and last < len(into)):
        into[last] = new
    else:
        text.faults.append(f"{place}: there is no {name}")


def _describe(loc: Key, kind: str, message: str, found: Any, text: _Text) -> str:
    key = dotted(loc)
    place = text.place(loc)
    if kind == "extra_forbidden":
        known = _keys_at(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, 1, 0.5)
        everywhere = {dotted(path) for path in _all_keys()}
        elsewhere = sorted(path for path in everywhere if path.rsplit(".", 1)[-1] == str(loc[-1]))
        if near:
            hint = f"the nearest known key is {dotted((*loc[:-1], near[0]))}"
        elif elsewhere:
            hint = f"it belongs elsewhere: {', '.join(elsewhere)}"
        else:
            hint = f"known here: {', '.join(known)}"
        return f"{place}: {key}: unknown key; {hint}"
    if kind == "missing":
        return f"{place}: {key}: missing; this key is required"
    message = (
        message.removeprefix("Value error, ")
        .removeprefix("Input ")
        .replace("a valid tuple", "a list, as in [1, 2]")
    )
    if kind == "too_short":
        message = "should have at least one entry"
    return f"{place}: {key}: found {found!r}; {message}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _keys_at(loc: Key) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _all_keys(model: type[BaseModel] = Recipe, above: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield (*above, name)
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*above, name))


def _contradictions(recipe: Recipe) -> Iterator[tuple[Key, str]]:
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
                "the first round trains on labelled images alone and takes no ratio",
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


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    """Paths made absolute."""
    data = recipe.data.model_copy(
        update={"root": str((folder / Path(recipe.data.root).expanduser()).resolve())}
    )
    weights = recipe.network.weights
    if isinstance(weights, str) and weights != "none":
        weights = str((folder / Path(weights).expanduser()).resolve())
    network = recipe.network.model_copy(update={"weights": weights})
    return recipe.model_copy(update={"data": data, "network": network})


class _Dumper(yaml.SafeDumper):
    """Safe YAML that reads back: PyYAML leaves Unicode's line breaks in plain texts, where they become blanks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.yaml_implicit_resolvers = (
    _Loader.yaml_implicit_resolvers
)  # to quote what the loader would take for a number


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out; `load_recipe` reads it back as an equal recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """A plain value as YAML on one line, as `load_recipe` reads it back."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("...\n").strip()


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """A line "key: old → new" for every key that differs."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    keys = sorted({*before, *after})
    return [
        f"{key}: {before.get(key, 'not set')} → {after.get(key, 'not set')}"
        for key in keys
        if before.get(key, ...) != after.get(key, ...)
    ]


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*key, name))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*key, index))
    else:
        yield dotted(key), value
