"""Names of version 0.2 that still work and warn. Version 0.4 removes them, and this file."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from darseg.data.prediction import Prediction
    from darseg.model.network import Network
    from darseg.model.windows import Memory, Protocol


def warn_renamed(former: str, new: str) -> None:
    """Warn the caller's caller that `former` is called `new` since version 0.3."""
    warnings.warn(
        f"{former} is removed in darseg 0.4. Use {new} instead.",
        DeprecationWarning,
        stacklevel=3,
    )


class FormerMethods:
    """Methods that `Network` had in version 0.2."""

    def predict(self: Network, image: NDArray[np.uint8], protocol: Protocol | None = None) -> Prediction:
        """Deprecated: call `darseg.predict(network, image, protocol)`."""
        warn_renamed("Network.predict(image)", "darseg.predict(network, image)")
        # At call time: this module is imported by model.network, which model.predict imports.
        return importlib.import_module("darseg.model.predict").predict(self, image, protocol)

    def normalise(self: Network, images: Tensor) -> Tensor:
        """Deprecated: call `normalize`."""
        warn_renamed("Network.normalise", "Network.normalize")
        return self.normalize(images)

    def legal_side(self: Network, n: int) -> int:
        """Deprecated: call `network.sides.up`."""
        warn_renamed("Network.legal_side", "network.sides.up")
        return self.sides.up(n)

    def check_size(self: Network, height: int, width: int) -> None:
        """Deprecated: call `network.sides.check`."""
        warn_renamed("Network.check_size", "network.sides.check")
        self.sides.check(height, width)


def predict_classes(
    network: Network, image: NDArray[np.uint8], protocol: Protocol, memory: Memory | None = None
) -> NDArray[np.uint8]:
    """Deprecated: the classes of `darseg.predict`, uint8 [H, W]."""
    warn_renamed("darseg.predict_classes", "darseg.predict(network, image, protocol).classes")
    predict = importlib.import_module("darseg.model.predict").predict
    return predict(network, image, protocol, memory=memory).classes.copy()  # callers may write to it
