"""Classes compared by name, and a network's channels put in another order of the same classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from darseg.errors import DataError
from darseg.model.aligned import AlignmentRecord
from darseg.model.heads import AtrousHead
from darseg.model.network import Network, NetworkSpec

T = TypeVar("T")

Order = tuple[int, ...]
"""For each class of the new order its place in the old one."""


def class_order(names: Sequence[str], wanted: Sequence[str]) -> Order | None:
    """The place of each wanted class among `names`; None if both are in the same order already.

    Raises DataError with both lists if they are not the same classes.
    """
    names, wanted = tuple(names), tuple(wanted)
    if names == wanted:
        return None
    if sorted(names) != sorted(wanted):
        raise DataError(f"its classes are {', '.join(names)}; expected {', '.join(wanted)}")
    return tuple(names.index(name) for name in wanted)


def reorder_classes(network: Network, order: Order) -> Network:
    """Put the channels of a network's logits in another order, in place; class weights go with them.

    Returns:
        the same network.
    """
    for _, classifier in _classifiers(network):
        assert isinstance(classifier.bias, Tensor)
        with torch.no_grad():
            for tensor in (classifier.weight, classifier.bias):
                tensor.copy_(tensor[list(order)])
    if network.alignment is not None:
        network.alignment = reordered_record(network.alignment, order)
    if network.image_classes is not None:
        network.image_classes = network.image_classes.in_order(order)
    return network


def reordered_spec(spec: NetworkSpec, order: Order) -> NetworkSpec:
    """The description of a network whose channels were put in another order."""
    return dataclasses.replace(
        spec,
        class_names=_reordered(spec.class_names, order),
        class_colors=_reordered(spec.class_colors, order),
    )


def reordered_record(record: AlignmentRecord, order: Order) -> AlignmentRecord:
    """Class weights in another order of the classes."""
    per_class = ("weights", "reachable", "target", "reached", "plain_bias")
    return dataclasses.replace(
        record, **{name: _reordered(tuple(getattr(record, name)), order) for name in per_class}
    )


def _reordered(values: tuple[T, ...], order: Order) -> tuple[T, ...]:
    return tuple(values[k] for k in order) if values else ()


def classifier_keys(network: Network) -> list[str]:
    """The keys of the tensors that have one entry for each class."""
    return [f"{name}.{kind}" for name, _ in _classifiers(network) for kind in ("weight", "bias")]


def _classifiers(network: Network) -> list[tuple[str, nn.Conv2d]]:
    """The convolutions whose channels are the classes, with their names."""
    head = network.head
    parts: list[Any] = list(head.branches) if isinstance(head, AtrousHead) else [head.last]
    if network.auxiliary_head is not None:
        parts.append(network.auxiliary_head.classifier)
    names = {module: name for name, module in network.named_modules()}
    return [(names[part], part) for part in parts]
