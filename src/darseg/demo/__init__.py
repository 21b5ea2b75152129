"""The drawn scenes and the command that trains on them."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    """Calls of `darseg.demo(…)`, once a function, still work for one version."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from darseg.demo.demo import run_demo

        warnings.warn(
            "Call darseg.run_demo(…) instead of darseg.demo(…), which the next version removes.",
            DeprecationWarning,
            stacklevel=2,
        )
        return run_demo(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom
