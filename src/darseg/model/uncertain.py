"""Where a network is unsure of an image, and what its backbone sees in it.

The choice of images to label needs both (`darseg.pseudo.suggest`).

Letters: K classes, H x W pixels, D channels of the backbone's last feature map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from darseg.errors import NumericsError
from darseg.model.decide import STRIP, overflow_message
from darseg.model.network import Network
from darseg.model.predict import checked_image, predict_scores, whole_image
from darseg.model.windows import Memory, Protocol, WindowSums

OTHER_SCALE = 0.75
"""Factor of the scale on which an image is predicted once more: 9/16 of the cost, and details get lost that matter."""


@dataclass(frozen=True, eq=False)
class Uncertain:
    """What a network predicts for an image, and how unsure it is.

    Attributes:
        classes: uint8 [H, W], decisions as labeling makes them.
        uncertainty: float32 [H, W], 0 to 1: the mean of 1 - margin and of the share of views that disagree. The margin is
            the largest probability minus the second.
        expected: float64 [K], the sums of the probabilities: pixels that each class probably has.
        uncertain: float64 [K], the sums of the probabilities times the uncertainty.
        margin: its mean.
        disagreements: name of another view → share of the pixels that it decides otherwise.
        feature: float32 [D], mean of the backbone's last feature map over the image and its mirror image.
    """

    classes: NDArray[np.uint8]
    uncertainty: NDArray[np.float32]
    expected: NDArray[np.float64]
    uncertain: NDArray[np.float64]
    margin: float
    disagreements: dict[str, float]
    feature: NDArray[np.float32]


class UncertainPredictor:
    """Predicts an image, its mirror image and another scale, also by an earlier network if there is one.

    Args:
        network, earlier: in eval mode.
        protocol: as labeling predicts; None: each image in one window.
    """

    def __init__(self, network: Network, protocol: Protocol | None, earlier: Network | None = None) -> None:
        self.network, self.protocol, self.earlier = network, protocol, earlier
        self._memories = Memory(), Memory()

    @torch.inference_mode()
    def predict(self, image: NDArray[np.uint8], name: str) -> Uncertain:
        """Predict an image, uint8 [H, W, 3].

        Raises DataError for other arrays, NumericsError if scores are not numbers.
        """
        image = checked_image(image, name)
        protocol = self.protocol or whole_image(self.network, image)
        plain = replace(protocol, mirror=False)
        scales = tuple(scale * OTHER_SCALE for scale in protocol.scales)
        others = {"scale": (self.network, replace(plain, scales=scales))}
        if self.earlier is not None:
            others["round"] = (self.earlier, plain)
        views = {
            view: _classes(self._sums(network, image, how, memory=0), name)
            for view, (network, how) in others.items()
        }
        with _pooled(self.network.backbone) as pooled:
            own = self._sums(self.network, image, plain, memory=0)
            mirrored = self._sums(self.network, np.ascontiguousarray(image[:, ::-1]), plain, memory=1)
        feature = torch.stack(pooled).mean(dim=0).cpu().numpy()
        return _decide(own, mirrored, views, both=protocol.mirror, name=name, feature=feature)

    @torch.inference_mode()
    def feature(self, image: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
        """The feature of an image alone, as `predict` computes it."""
        image = checked_image(image, name)
        plain = replace(self.protocol or whole_image(self.network, image), mirror=False)
        with _pooled(self.network.backbone) as pooled:
            for view in (image, np.ascontiguousarray(image[:, ::-1])):
                self._sums(self.network, view, plain, memory=0)
        return torch.stack(pooled).mean(dim=0).cpu().numpy()

    def _sums(
        self, network: Network, image: NDArray[np.uint8], protocol: Protocol, *, memory: int
    ) -> WindowSums:
        return predict_scores(network, image, protocol, average="logits", memory=self._memories[memory])


@contextlib.contextmanager
def _pooled(backbone: nn.Module) -> Generator[list[Tensor]]:
    """Collects the mean feature, float32 [D], of every window that passes the backbone in the block."""
    pooled: list[Tensor] = []

    def collect(module: nn.Module, inputs: object, features: Sequence[Tensor]) -> None:
        pooled.extend(features[-1].float().mean(dim=(2, 3)))

    handle = backbone.register_forward_hook(collect)
    try:
        yield pooled
    finally:
        handle.remove()


def _strips(sums: WindowSums) -> list[slice]:
    """Rows that are decided together: as many as stay in the cache of a CPU."""
    classes, height, width = sums.total_KHW.shape
    rows = max(1, STRIP // (classes * width)) if sums.total_KHW.device.type == "cpu" else height
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _mean(sums: WindowSums, rows: slice, name: str) -> Tensor:
    """The mean logits of some rows. Raises NumericsError if a largest one is not finite."""
    mean = sums.mean(rows.start, rows.stop)
    if not bool(mean.amax(dim=0).isfinite().all()):
        raise NumericsError(overflow_message(mean, name))
    return mean


def _classes(sums: WindowSums, name: str) -> Tensor:
    """The decisions, uint8 [H, W]."""
    return torch.cat([_mean(sums, rows, name).argmax(dim=0).to(torch.uint8) for rows in _strips(sums)])


def _decide(
    own: WindowSums,
    mirrored: WindowSums,
    views: Mapping[str, Tensor],
    *,
    both: bool,
    name: str,
    feature: NDArray[np.float32],
) -> Uncertain:
    """Decisions and uncertainty of an image, strip by strip.

    Args:
        mirrored: of its mirror image.
        views: the decisions of other views, uint8 [H, W].
        both: decide by the mean of both; otherwise by the image's own scores.
    """
    classes, uncertainties = [], []
    expected = torch.zeros(len(own.total_KHW), dtype=torch.float64)
    uncertain, margins = expected.clone(), 0.0
    differing = dict.fromkeys(("mirror", *views), 0)
    for rows in _strips(own):
        first, second = _mean(own, rows, name), _mean(mirrored, rows, name).flip(2)
        scores = (first + second) / 2 if both else first
        decided, probabilities = scores.argmax(dim=0), scores.softmax(dim=0)
        differs = {"mirror": first.argmax(dim=0) != second.argmax(dim=0)}
        differs |= {view: other[rows] != decided for view, other in views.items()}
        largest = probabilities.topk(2, dim=0).values
        margin = largest[0] - largest[1]
        uncertainty = (1 - margin + sum(map(Tensor.float, differs.values())) / len(differs)) / 2
        expected += probabilities.sum(dim=(1, 2), dtype=torch.float64).cpu()
        uncertain += (probabilities * uncertainty).sum(dim=(1, 2), dtype=torch.float64).cpu()
        margins += float(margin.sum(dtype=torch.float64))
        for view, where in differs.items():
            differing[view] += int(where.sum())
        classes.append(decided.to(torch.uint8).cpu())
        uncertainties.append(uncertainty.cpu())
    decisions = torch.cat(classes).numpy()
    return Uncertain(
        classes=decisions,
        uncertainty=torch.cat(uncertainties).numpy(),
        expected=expected.numpy(),
        uncertain=uncertain.numpy(),
        margin=margins / decisions.size,
        disagreements={view: count / decisions.size for view, count in differing.items()},
        feature=feature,
    )
