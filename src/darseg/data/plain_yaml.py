"""Small YAML files that users or other tools wrote: values without aliases."""

from __future__ import annotations

from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """The value of a small YAML text without aliases, which could stand for any number of values.

    Raises ValueError or yaml.YAMLError if it is no such text.
    """
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
        raise ValueError("it has an alias (*name); write the value out")
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None
