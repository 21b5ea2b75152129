"""Networks saved and loaded, and networks filled with foreign weights.

Networks are saved as safetensors, together with all that is needed to build them again. Other weights come from torch
files or safetensors: backbones pretrained on ImageNet in the layouts of torchvision, semseg and timm, whole networks in
ours and in the original release's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from darseg.data.files import parse_json, write_whole
from darseg.errors import DataError, RecipeError, WeightsError, faults
from darseg.model.aligned import AlignmentRecord, check_folded, unfold_alignment
from darseg.model.backbone import RESNETS
from darseg.model.class_order import Order, class_order, classifier_keys, reorder_classes
from darseg.model.fitting import COUNTER, foreign_keys, misfits_of, origin_of
from darseg.model.heads import ATROUS_DILATIONS
from darseg.model.image_classes import IMAGE_CLASSES, METADATA, Described
from darseg.model.network import Network, NetworkSpec
from darseg.model.release import RELEASED, classes_in, our_key, released_architecture
from darseg.model.torchfile import (
    check_head,
    damaged,
    is_safetensors,
    read_bare_part,
    read_start,
    read_tensors,
)
from darseg.model.vit import Transformer, as_timm

ALIGNMENT = "alignment"
"""Entry of the description in a file: the class weights that are folded into the classifier."""

OF_CLASSIFIER = f"{IMAGE_CLASSES}."
"""Beginning of the keys of that classifier's tensors."""

LONGEST_DESCRIPTION = 1_000_000
"""Characters of that entry; 255 long class names need a tenth."""

NORMALIZATION = ("mean", "std")
"""Buffers of a network that files of other frameworks lack."""


# --- networks of darseg


def save_network(network: Network, path: Path, spec: NetworkSpec) -> None:
    """Write weights and `spec` to `path`, whole or not at all; equal networks give equal bytes.

    Class weights that are folded in (`network.alignment`) are recorded, so that they can be taken away again. The
    classifier that removes classes (`network.image_classes`) is in the file, too.

    Raises WeightsError if `spec` describes another network, StorageError if the disk refuses.
    """
    with torch.device("meta"):  # shapes only: no memory, no random numbers drawn
        described = spec.build()
    actual, expected = _identity(network), _identity(described)
    if actual != expected:
        if len(differing := [name for name in actual if actual[name] != expected[name]]) > 1:
            differing.remove("number of parameters")  # a consequence of the others
        listed = ", ".join(f"{name} {actual[name]} / {expected[name]}" for name in differing)
        raise WeightsError(
            f"{path} was not written: the network and its description differ: {listed}. Give the NetworkSpec it was "
            "built from."
        )
    state, described_in_file = network.state_dict(), dataclasses.asdict(spec)
    if (how := network.image_classes) is not None:
        described_in_file[IMAGE_CLASSES] = how.to_json()
        state |= {f"{OF_CLASSIFIER}{key}": tensor for key, tensor in how.classifier.state_dict().items()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if network.alignment is not None:
        described_in_file[ALIGNMENT] = network.alignment.to_json()
    metadata = {METADATA: json.dumps(described_in_file, sort_keys=True)}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def _identity(network: Network) -> dict[str, object]:
    """What distinguishes networks, weights aside: name → value, as for a message."""
    return {
        "classes": network.classes,
        "output stride": network.stride,
        "auxiliary head": "no" if network.auxiliary_head is None else "yes",
        "backbone": network.backbone.name,
        "head": type(network.head).__name__,
        "summed branches": getattr(network.head, "summed", 0),
        "number of parameters": f"{sum(value.numel() for value in network.state_dict().values()):,}",
    }


def read_spec(path: Path) -> NetworkSpec:
    """The description of the network saved at `path`, with class names and colors. Raises WeightsError."""
    return _read_description(path).spec


def read_alignment(path: Path) -> AlignmentRecord | None:
    """The class weights in the network saved at `path`; None if there are none. Raises WeightsError."""
    return _read_description(path).alignment


def removes_classes(path: Path) -> bool:
    """Whether the network saved at `path` has a classifier that removes classes. Raises WeightsError."""
    return _read_description(path).image_classes is not None


class _Description(NamedTuple):
    """What a file says of its network."""

    spec: NetworkSpec
    alignment: AlignmentRecord | None
    image_classes: Described | None


def _read_description(path: Path) -> _Description:
    metadata: dict[str, str] = {}
    start = read_start(path)
    try:
        if is_safetensors(start):
            check_head(path)
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise damaged(path, error) from error
    if METADATA not in metadata:
        raise WeightsError(
            f"{path} is not a network saved by darseg: it does not say which network its weights belong to. Convert a "
            "checkpoint of the release with darseg convert; backbone-only weights go into the recipe (network.weights)."
        )
    try:
        if len(metadata[METADATA]) > LONGEST_DESCRIPTION:
            raise ValueError(
                f"it has {len(metadata[METADATA]):,} characters, of {LONGEST_DESCRIPTION:,} at most"
            )
        fields = parse_json(metadata[METADATA])
        fields["class_names"] = tuple(fields["class_names"])
        fields["class_colors"] = tuple(tuple(color) for color in fields["class_colors"])
        record = fields.pop(ALIGNMENT, None)
        alignment = None if record is None else AlignmentRecord.from_json(record)
        described = fields.pop(IMAGE_CLASSES, None)
        image_classes = None if described is None else Described.from_json(described)
        return _Description(NetworkSpec(**fields), alignment, image_classes)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecipeError, DataError) as error:
        raise WeightsError(
            f"{path}: the description of the network cannot be read ({error}). If it comes from a newer darseg, upgrade "
            "with pip install --upgrade darseg; otherwise save the network again."
        ) from error


def load_network(path: Path | str, plain: bool = False) -> Network:
    """The network saved at `path`, on the CPU and in eval mode.

    If class weights are folded into its classifier, `network.alignment` is their record; `network.image_classes` removes
    classes from its predictions, if the file has that.

    Args:
        plain: take away the class weights that are folded into its classifier.

    Raises WeightsError for files that are missing, damaged or not networks of darseg, RecipeError if the backbone cannot
    be built here (timm is not installed).
    """
    path = Path(path)
    spec, alignment, image_classes = _read_description(path)
    tensors = read_tensors(path)
    with torch.device("meta"):  # a small file may describe a network that fills the memory
        described = spec.build()
        expected = described.state_dict()
        if image_classes is not None:
            expected |= _of_classifier(path, image_classes, spec)
    problems = list(misfits_of(expected, {key: key for key in expected}, tensors).values())
    problems += [f"{key}: not part of this network" for key in tensors if key not in expected]
    if problems:
        raise WeightsError(
            faults(f"{path} does not fit the network it describes", problems, limit=10)
            + "\nIt may come from another version of darseg: save the network again with this one."
        )
    # Random weights are not drawn for nothing; but timm's networks hold more than their state.
    network = described.to_empty(device="cpu") if spec.backbone in RESNETS else spec.build()
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(OF_CLASSIFIER)}
    network.load_state_dict(own)
    if image_classes is not None:
        network.image_classes = image_classes.build(spec.classes)
        network.image_classes.classifier.load_state_dict(
            {key.removeprefix(OF_CLASSIFIER): tensors[key] for key in tensors.keys() - own.keys()}
        )
    if alignment is not None:
        try:
            check_folded(network, alignment)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}\nRestore the file, or export the result again.") from None
        network.alignment = alignment
        if plain:
            unfold_alignment(network)
    return network.eval()


def _of_classifier(path: Path, described: Described, spec: NetworkSpec) -> dict[str, Tensor]:
    """The tensors of a file's classifier, by key. Raises WeightsError."""
    try:
        state = described.build(spec.classes).classifier.state_dict()
    except DataError as error:
        raise WeightsError(f"{path}: {error}\nRestore the file, or save the network again.") from error
    return {f"{OF_CLASSIFIER}{key}": tensor for key, tensor in state.items()}


# --- foreign weights


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        loaded: keys of the network that were filled.
        unused: keys of the file that the network has no place for: ImageNet's classifier; more if not strict.
        uncounted: `num_batches_tracked` keys that the file, saved by an old torch, lacks. Nothing here needs them.
        unfilled: a line for each part that stays as it was, though the file should fill it; empty if strict.
        whole: whether the file holds a whole network with heads, and not only a backbone.
        architecture: of the release, if the file has its layout.
        unaligned: whether class weights in the file were left out, so that the network is as it was trained.
        classes: a sentence that says how the classes were matched; empty for a backbone, and if there is nothing to say.
        resized: a sentence that says how a transformer's position embeddings were resized; empty if they were not.
        part: under which name the file holds the network, as "model_ema"; empty if under none.
    """

    source: Path
    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    uncounted: tuple[str, ...]
    unfilled: tuple[str, ...] = ()
    whole: bool = False
    architecture: str | None = None
    unaligned: bool = False
    classes: str = ""
    resized: str = ""
    part: str = ""


@dataclass(frozen=True)
class _Match:
    """How the tensors of a file fit a network.

    Attributes:
        origin: key of the network → key in the file that should fill it.
        misfits: key of the network → a line that says why the file's tensor does not fit.
        unused: keys of the file that fill nothing.
    """

    whole: bool
    architecture: str | None
    origin: Mapping[str, str]
    misfits: Mapping[str, str]
    uncounted: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def fitting(self) -> dict[str, str]:
        return {key: name for key, name in self.origin.items() if key not in self.misfits}


def load_weights(
    network: Network, source: Path, strict: bool = True, *, class_names: Sequence[str] = ()
) -> LoadReport:
    """Fill `network` with the weights of a file, on whatever device it is.

    Args:
        source: torch file or safetensors, bare or under "state_dict", keys with or without "module.", in the layout of
            - a network saved by darseg, or of the releases of DARS, semseg and UniMatch: fills all of it;
            - torchvision (ResNets), semseg (ResNets with the deep stem) or timm (its networks): fills the backbone,
              heads stay as they are.
        strict: every part must be filled, and only ImageNet's classifier may be left over. Otherwise what fits is
            loaded, and the report lists the rest.
        class_names: of the network; classes of a whole network are matched with them by name. Empty: by number.

    Raises WeightsError, leaving the network as it was, if `strict` is violated or nothing matches.
    """
    (part, tensors), note = read_bare_part(source), ""
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(OF_CLASSIFIER)}
    if isinstance(network.backbone, Transformer) and not _is_whole(tensors):
        tensors, note = as_timm(network.backbone, tensors)
    match = _match(network, tensors)
    matched = _match_classes(network, source, match, wanted=class_names)
    match = matched.match
    problems = _problems(network, source, match)
    if problems and (strict or match.fitting.keys() <= set(NORMALIZATION)):
        target = "the network" if match.whole else f"the backbone {network.backbone.name}"
        raise WeightsError(
            faults(
                f"{source} does not fit {target}. Nothing was loaded. {_advice(network, tensors, match)} What does not "
                "fit",
                problems,
                limit=20,
            )
        )
    state = network.state_dict()
    with torch.no_grad():
        for key, name in match.fitting.items():
            state[key].copy_(tensors[name])  # tensors of a state dict share the memory of the network's own
    ours = match.whole and match.architecture is None and match.fitting.keys() >= {*classifier_keys(network)}
    network.alignment = _alignment_in(source) if ours else None
    unaligned = network.alignment is not None and len(network.alignment.plain_bias) == network.classes
    if unaligned:
        unfold_alignment(network)
    network.alignment = None
    if matched.order is not None:
        reorder_classes(network, matched.order)
    return LoadReport(
        source,
        loaded=tuple(match.fitting),
        unused=match.unused,
        uncounted=match.uncounted,
        unfilled=tuple(match.misfits.values()),
        whole=match.whole,
        architecture=match.architecture,
        unaligned=unaligned,
        classes=matched.note,
        resized=note,
        part=part,
    )


@dataclass(frozen=True)
class _MatchedClasses:
    """A match whose classes were compared by name, the order to give them, and what to say about it."""

    match: _Match
    order: Order | None = None
    note: str = ""


def _match_classes(
    network: Network, source: Path, match: _Match, *, wanted: Sequence[str]
) -> _MatchedClasses:
    """Compare the classes of a whole network with those wanted; a classifier for others does not fit."""
    keys = [key for key in classifier_keys(network) if key in match.fitting]
    if not match.whole or not wanted or not keys:
        return _MatchedClasses(match)
    names: tuple[str, ...] = ()
    if match.architecture is None:
        with contextlib.suppress(WeightsError):  # a file in darseg's layout, but without a description
            names = read_spec(source).class_names
    if not names:
        note = f"it does not name its classes, so they are taken in the order {', '.join(wanted)}"
        return _MatchedClasses(match, note=note)
    try:
        order = class_order(names, wanted)
    except DataError as error:
        misfits = dict(match.misfits) | {key: f"{key}: the same" for key in keys}
        misfits[keys[0]] = f"{keys[0]}: {error} (if they are the same, call them so in the recipe)"
        return _MatchedClasses(dataclasses.replace(match, misfits=misfits))
    note = f"its classes are in another order and were matched by name: {', '.join(wanted)}" if order else ""
    return _MatchedClasses(match, order, note)


def _alignment_in(source: Path) -> AlignmentRecord | None:
    """The class weights in a file; None if it has none, or no description."""
    with contextlib.suppress(WeightsError):
        return read_alignment(source)
    return None


def _is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a whole network, not only a backbone."""
    return released_architecture(tensors) is not None or any(key.startswith("backbone.") for key in tensors)


def _match(network: Network, tensors: Mapping[str, Tensor]) -> _Match:
    backbone, state = network.backbone, network.state_dict()
    architecture = released_architecture(tensors)
    whole = _is_whole(tensors)
    idle: set[str] = set()  # keys that the release has and does not use
    if architecture is not None:
        theirs = {our_key(key, architecture): key for key in tensors}
        idle = {key for key in tensors if our_key(key, architecture) is None}
        origin = {key: theirs.get(key, key) for key in state if key not in NORMALIZATION}
    elif whole:
        origin = {key: key for key in state}
    else:
        origin = {f"backbone.{key}": origin_of(key, backbone, tensors) for key in backbone.state_dict()}
    uncounted = tuple(key for key, name in origin.items() if key.endswith(COUNTER) and name not in tensors)
    origin = {key: name for key, name in origin.items() if key not in uncounted}
    return _Match(
        whole,
        architecture,
        origin,
        misfits=misfits_of(state, origin, tensors),
        uncounted=uncounted,
        unused=tuple(sorted(set(tensors) - set(origin.values()) - idle)),
    )


def _problems(network: Network, source: Path, match: _Match) -> list[str]:
    """A line for everything that violates strictness."""
    if match.whole:
        surplus = [f"{key}: not part of this network" for key in match.unused]
    else:
        foreign = foreign_keys(match.unused, network.backbone, match.origin.values())
        surplus = [f"{key}: belongs to a larger network than {network.backbone.name}" for key in foreign]
    problems = [*match.misfits.values(), *surplus]
    sums_all = getattr(network.head, "summed", 0) == len(ATROUS_DILATIONS)
    if match.whole and match.architecture is None and sums_all:
        with contextlib.suppress(WeightsError):  # a file in darseg's layout, but without a description
            if read_spec(source).release_classifier:
                problems.append("classifier: the file has two trained branches, this network sums four")
    return problems


def _advice(network: Network, tensors: Mapping[str, Tensor], match: _Match) -> str:
    if not match.whole:
        return (
            "Give weights of this backbone, or choose the backbone that these weights belong to (plain and deep "
            "stem, resnet50 and resnet50_deep, are two backbones)."
        )
    advice = []
    if match.architecture:
        names = [name for name, spec in RELEASED.items() if spec.architecture == match.architecture]
        advice.append(
            f"It has the layout of the released {match.architecture}, which darseg convert reads "
            f"(--architecture {names[0]})."
        )
    classes = classes_in(tensors)
    if classes not in (None, network.classes):
        advice.append(f"The file holds a network for {classes} classes; this one has {network.classes}.")
    advice.append(
        "Build the network that the file was saved from. Or load only what fits: network.strict: false in a recipe, "
        "--no-strict with darseg convert."
    )
    return " ".join(advice)
