"""Small YAML files of users and other tools: a few lines of them must not stand for billions."""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""Values of a file, those that an alias (*name) repeats counted each time."""
DEEPEST = 50
"""Lists and mappings in each other."""

_TOO_DEEP = "its lists and mappings are nested too deeply"


def parse_yaml(text: str) -> Any:
    """The value of a small YAML text.

    Raises ValueError or yaml.YAMLError if it is no such text, or if its aliases stand for too many values.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _count(node: yaml.Node, counted: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, aliases counted each time, and how deep they are nested.

    Args:
        counted: the numbers of nodes that were counted before; 0 for those that are being counted.

    Raises ValueError if there are too many, or too deep.
    """
    if (known := counted.get(id(node))) is not None:
        if not known[0]:
            raise ValueError("an alias (*name) in it stands for what contains it")
        return known
    counted[id(node)] = 0, 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    total, height = 1, 0
    for part in parts:
        inner = _count(part, counted)
        total, height = total + inner[0], max(height, inner[1])
        if total > MOST_VALUES:
            raise ValueError(
                f"it stands for more than {MOST_VALUES:,} values, those that aliases (*name) repeat counted each time"
            )
    if height >= DEEPEST:
        raise ValueError(_TOO_DEEP)
    counted[id(node)] = total, height + 1
    return total, height + 1
