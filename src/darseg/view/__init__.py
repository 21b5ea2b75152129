"""The local viewer of a run's pseudo labels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class _CallableRoom(ModuleType):
    """Calls of `darseg.view(…)`, once a function, still work for one version, with 0.2's parameters."""

    def __call__(
        self,
        run: Path | str,
        round_index: int | None = None,
        port: int | None = None,
        open_browser: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        from darseg.view.viewer import view_run

        warnings.warn(
            "Call darseg.view_run(…) instead of darseg.view(…), which the next version removes.",
            DeprecationWarning,
            stacklevel=2,
        )
        view_run(run, round_index, port, open_browser=open_browser, say=say)


sys.modules[__name__].__class__ = _CallableRoom
