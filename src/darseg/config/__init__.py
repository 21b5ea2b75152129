"""What a user writes: the recipe (recipe.py) and its YAML text (text.py)."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

_MOVED = {"load_recipe": "text", "Recipe": "recipe"}  # what version 0.2 had in this module

if not TYPE_CHECKING:  # type checkers report these names, as they report unknown ones

    def __getattr__(name: str) -> Any:
        """Names of version 0.2 that still work here and warn. Version 0.4 removes them."""
        if name not in _MOVED:
            raise AttributeError(f"module 'darseg.config' has no attribute {name!r}")
        warnings.warn(
            f"darseg.config.{name} is removed in darseg 0.4. Use darseg.{name} instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(f"darseg.config.{_MOVED[name]}"), name)
