"""Class weights inside a network: a bias of its classifier, recorded so that it can be removed.

softmax(z + log w) is p·w, renormalized, so that class weights w cost nothing at prediction and travel with any export.
The upsampling behind the classifier keeps a constant. The auxiliary head does not predict and stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from darseg.errors import DataError, WeightsError, faults, shortened
from darseg.model.heads import upsample
from darseg.model.network import Network

BIAS_TOLERANCE = 1e-5
"""How far a classifier's bias may be from what its record says, relative or absolute: the logarithms of two machines
may differ in the last bits."""


@dataclass(frozen=True)
class AlignmentRecord:
    """What was added to a network's classifier, and why. Sequences have one entry per class.

    Attributes:
        weights: factors of the probabilities, above 0; if several were folded in, their products.
        reachable: False for classes that were left alone.
        target, reached: wanted shares, and those of the decisions with these weights.
        strength: power of the weights, from 0 to 1.
        bound: largest weight, and reciprocal of the smallest, of one folding.
        source: what the weights were found on, for readers.
        plain_bias: of the classifier without the weights; empty until they are folded in.

    Raises DataError for sequences of different lengths, and for weights that cannot be folded in.
    """

    weights: Sequence[float]
    reachable: Sequence[bool]
    target: Sequence[float]
    reached: Sequence[float]
    strength: float
    bound: float
    source: str = ""
    plain_bias: Sequence[float] = ()

    def __post_init__(self) -> None:
        lines = [
            f"{name} is {shortened(getattr(self, name))}; expected {expected}"
            for name, types, expected in (
                ("strength", (int, float), "a number"),
                ("bound", (int, float), "a number"),
                ("source", str, "a text"),
            )
            if not isinstance(getattr(self, name), types)
        ]
        for name, kind in (
            ("weights", float),
            ("reachable", bool),
            ("target", float),
            ("reached", float),
            ("plain_bias", float),
        ):
            values = tuple(map(kind, getattr(self, name)))
            object.__setattr__(self, name, values)
            if len(values) != len(self.weights) and (values or name != "plain_bias"):
                lines.append(f"{name} has {len(values)} entries; expected {len(self.weights)}, one per class")
        unusable = [k for k, weight in enumerate(self.weights) if not 0 < weight < math.inf]
        lines += [f"class {k}: the weight is {self.weights[k]}; expected a number above 0" for k in unusable]
        if lines:
            raise DataError(faults("This alignment cannot be part of a network", lines))

    @classmethod
    def of(cls, alignment: Any, source: str) -> AlignmentRecord:
        """The record of an `Alignment` (darseg.align) that was found on `source`."""
        return cls(
            weights=alignment.weights.tolist(),
            reachable=alignment.reachable.tolist(),
            target=alignment.target.tolist(),
            reached=alignment.reached.tolist(),
            strength=alignment.strength,
            bound=alignment.bound,
            source=source,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists are in the order of the classes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, columns: Mapping[str, Any]) -> AlignmentRecord:
        """The record that `to_json` described. Raises DataError for anything else."""
        names = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(columns, Mapping) or set(columns) != names:
            raise DataError(f"the alignment's entries are not {', '.join(sorted(names))}")
        try:
            return cls(**columns)
        except (TypeError, ValueError) as error:
            raise DataError(f"the alignment's entries are of other types: {error}") from error


def fold_alignment(network: Network, record: AlignmentRecord) -> Network:
    """Multiply a network's probabilities by class weights, in place, as a bias of the classifier.

    A second folding adds to the first: the network then has the product of the weights and the facts of the second.

    Args:
        record: `plain_bias` is not read; the network knows its own.

    Returns:
        the same network; `network.alignment` is its record.

    Raises DataError if the number of classes differs.
    """
    if len(record.weights) != network.classes:
        raise DataError(
            f"The alignment has {len(record.weights)} class weights, but the network has {network.classes} classes. "
            "Align with this network's own predictions."
        )
    earlier, bias = network.alignment, classifier_bias(network)
    weights, source = record.weights, record.source
    plain = bias.detach().double().cpu().tolist()
    if earlier is not None:
        plain = earlier.plain_bias
        weights = [old * new for old, new in zip(earlier.weights, weights, strict=True)]
        source = "; then ".join(filter(None, (earlier.source, source)))
    folded = dataclasses.replace(record, weights=weights, source=source, plain_bias=plain)
    _set(bias, folded_bias(folded))
    network.alignment = folded
    return network


class Variants:
    """Several class weights in one network: logits of each, for little more than the work of one.

    Only the classifier is run for each. The logits are bit for bit those of the network with these weights folded in.

    Args:
        records: one for each variant; None is the plain network. Their weights are the whole ones, also if the network
            has others.
    """

    def __init__(self, network: Network, records: Sequence[AlignmentRecord | None]) -> None:
        plain = network.alignment.plain_bias if network.alignment else classifier_bias(network).tolist()
        self.network = network
        biases = (
            plain if record is None else folded_bias(dataclasses.replace(record, plain_bias=plain))
            for record in records
        )
        # On the device once: each copy from the host would wait for a GPU.
        device = classifier_bias(network).device
        self._biases = [torch.tensor(values, dtype=torch.float64, device=device) for values in biases]

    def __len__(self) -> int:
        return len(self._biases)

    def logits(self, images: Tensor) -> Iterator[Tensor]:
        """The logits of each variant, one after the other, each as `network(images).main`."""
        network, (height, width) = self.network, images.shape[-2:]
        head: Any = network.head
        network.sides.check(height, width)
        prepared = head.prepare(network.backbone(network.normalize(images)))
        bias = classifier_bias(network)
        before = bias.clone()
        try:
            for values in self._biases:
                bias.copy_(values)
                yield upsample(head.classify(prepared), (height, width))
        finally:
            bias.copy_(before)


def unfold_alignment(network: Network) -> Network:
    """Take the class weights away again, in place: the bias is bit for bit what it was before them.

    Returns:
        the same network, unchanged if nothing was folded in.
    """
    if network.alignment is not None:
        _set(classifier_bias(network), network.alignment.plain_bias)
        network.alignment = None
    return network


def classifier_bias(network: Network) -> Tensor:
    """The bias, float [K], that is added to a network's logits."""
    last = network.head.last
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    return last.bias


def folded_bias(record: AlignmentRecord) -> list[float]:
    """The classifier's bias with the weights of a record whose plain bias is known."""
    return [b + math.log(w) for b, w in zip(record.plain_bias, record.weights, strict=True)]


def check_folded(network: Network, record: AlignmentRecord) -> None:
    """Raise WeightsError if the network's bias is not the one that the record says."""
    problems = []
    if len(record.weights) != network.classes or not record.plain_bias:
        problems.append(
            f"it has {len(record.weights)} class weights and {len(record.plain_bias)} plain biases; expected "
            f"{network.classes} of each"
        )
    else:
        pairs = zip(classifier_bias(network).double().tolist(), folded_bias(record), strict=True)
        problems += [
            f"class {k}: the bias is {actual:g}, and by the record it should be {expected:g}"
            for k, (actual, expected) in enumerate(pairs)
            if not math.isclose(actual, expected, rel_tol=BIAS_TOLERANCE, abs_tol=BIAS_TOLERANCE)
        ]
    if problems:
        raise WeightsError(faults("The record of the alignment does not fit the network", problems))


@torch.no_grad()
def _set(bias: Tensor, values: Sequence[float]) -> None:
    bias.copy_(torch.tensor(values, dtype=torch.float64))
