"""A network's classes and a recipe's: compared by name, never by number alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from darseg.data.classes import ClassSet
from darseg.errors import DataError, faults
from darseg.model.class_order import Order, class_order
from darseg.model.network import NetworkSpec
from darseg.run.journal import Journal
from darseg.training.processes import Processes

REMEDY = "Give the recipe that the network was trained with, or call its classes the same"


def name_faults(given: Sequence[tuple[str, str]], names: Sequence[str]) -> list[str]:
    """Lines about names that are given twice, that are not among `names`, or that are missing.

    Args:
        given: each name with its place; the place may be empty.
    """
    places: dict[str, list[str]] = {}
    for name, place in given:
        places.setdefault(name, []).append(place)
    lines = []
    for name, group in places.items():
        if len(group) > 1:
            where = ", ".join(dict.fromkeys(filter(None, group)))
            lines.append(f"{name}: given {len(group)} times{f' ({where})' if where else ''}; keep one")
    unknown = [name for name in places if name not in names]
    missing = [name for name in names if name not in places]
    lines += [f"not a class: {', '.join(unknown)}"] if unknown else []
    lines += [f"missing: {', '.join(missing)}"] if missing else []
    return lines


def order_by_recipe(source: Path | str, spec: NetworkSpec, classes: ClassSet) -> Order | None:
    """The order that gives a network the recipe's classes; None if it has that order.

    What is matched, and what cannot be compared because the network has no names, is printed.

    Raises DataError if they are not the same classes; it has both lists.
    """
    if spec.classes != len(classes):
        own = f" ({', '.join(spec.class_names)})" if spec.class_names else ""
        raise DataError(
            f"{source} has {spec.classes} classes{own}, but the recipe has {len(classes)} "
            f"({', '.join(classes.names)}). Give the recipe that the network was trained with."
        )
    journal = Journal(None, None, Console(stderr=True, quiet=not Processes.joined().first))
    if not spec.class_names:
        journal.warn(
            f"{source} does not say what its classes are called. They are taken to be the recipe's, in this order: "
            f"{', '.join(classes.names)}."
        )
        return None
    try:
        order = class_order(spec.class_names, classes.names)
    except DataError:
        lines = [f"the network: {', '.join(spec.class_names)}", f"the recipe: {', '.join(classes.names)}"]
        raise DataError(faults(f"{source} and the recipe have different classes. {REMEDY}", lines)) from None
    if order is not None:
        journal.warn(
            f"{source} has the recipe's classes in another order. They are matched by name, and the recipe's order is "
            f"used: {', '.join(classes.names)}."
        )
    return order
