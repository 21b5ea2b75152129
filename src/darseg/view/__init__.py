"""The local viewer of a run's pseudo labels."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    """Calls of `darseg.view(…)`, once a function, still work for one version."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from darseg.view.viewer import view_run

        warnings.warn(
            "Call darseg.view_run(…) instead of darseg.view(…), which the next version removes.",
            DeprecationWarning,
            stacklevel=2,
        )
        return view_run(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom
