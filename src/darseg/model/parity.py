"""Whether an exported file gives the classes of the network it was made from.

Letters: B images, K classes, H x W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from darseg.errors import ExportError, NumericsError, faults
from darseg.model.image_classes import REMOVED
from darseg.model.network import Network
from darseg.model.predict import predict_scores
from darseg.model.windows import Protocol

ONNX, PT2 = ".onnx", ".pt2"
SUFFIXES = (ONNX, PT2)

SAME_PIXELS = 0.999
"""Share of pixels that must have the same class in every compared image."""

CROPS = ((1 / 2, 2 / 3), (2 / 3, 1 / 2), (3 / 4, 3 / 5), (1 / 3, 5 / 6))
"""Shares of height and width to crop to: real images of one size would not show that other sizes are right."""

LEAST_STEPS = 2
"""Least n in padded sides of stride * n + 1: with n = 1 some backbones' features are a single pixel, without corners."""

Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""uint8 [B, H, W, 3] → classes uint8 [B, H, W], logits float32 [B, K, H, W]."""


@dataclass(frozen=True)
class Parity:
    """How well a file agrees with the network it was made from, in one window over the whole image.

    Attributes:
        images, crops: number of whole images compared, and of batches of two smaller crops, each of another size.
        pixels, different: how many were compared, and how many of them have another class.
        worst: smallest share of equal pixels in an image or batch.
        difference: largest absolute difference between two logits.
        reach: largest absolute logit.
        margin: largest distance of the network's two best logits at pixels whose classes differ; 0 if none differ.
    """

    images: int
    crops: int
    pixels: int
    different: int
    worst: float
    difference: float
    reach: float
    margin: float

    def __post_init__(self) -> None:
        possible = {
            "images": self.images > 0,
            "crops": self.crops >= 0,
            "pixels": self.pixels > 0,
            "different": 0 <= self.different <= self.pixels,
            "worst": 0 <= self.worst <= 1,
            "difference": self.difference >= 0,
            "reach": self.reach >= 0,
            "margin": self.margin >= 0,
        }
        if impossible := [f"{name} {getattr(self, name)}" for name, valid in possible.items() if not valid]:
            raise ExportError(f"The result of the comparison is not possible: {', '.join(impossible)}.")

    def describe(self) -> list[str]:
        """The parity in words, as lines."""
        share = 1 - self.different / self.pixels
        lines = [
            f"{self.images} images and {self.crops} batches of crops of other sizes, {self.pixels:,} pixels: "
            f"{share:.4%} have the same class, {self.worst:.4%} in the worst image",
            f"largest difference between two logits: {self.difference:.2g} (the largest logit is {self.reach:.3g})",
        ]
        if self.different:
            lines.append(
                f"at pixels whose classes differ, the two best logits are at most {self.margin:.2g} apart"
            )
        return lines


def compare(network: Network, run: Runner, images: Mapping[str, np.ndarray], *, path: Path) -> Parity:
    """Parity of an exported file on whole images, and on batches of two crops of other sizes.

    Raises ExportError naming every image on which the file fails or gives other classes, NumericsError.
    """
    problems: list[str] = []
    agreements: list[_Agreement] = []
    batches = {name: image[None] for name, image in images.items()}
    crops = _crops(images)
    for name, batch in (batches | crops).items():
        expected = np.stack([_one_window(network, image, name) for image in batch])
        agreement = _agreement(expected, run, batch)
        if isinstance(agreement, str):
            problems.append(f"{name}, {_size(batch)}: {agreement}")
            continue
        agreements.append(agreement)
        if not agreement.share >= SAME_PIXELS or not np.isfinite(agreement.difference):
            problems.append(
                f"{name}, {_size(batch)}: {agreement.share:.4%} of the classes are the same, logits differ by up to "
                f"{agreement.difference:.2g} (the largest is {agreement.reach:.3g})"
            )
    if problems:
        raise ExportError(
            faults(
                f"{path} was not written: run from the file, the network does not give {SAME_PIXELS:.1%} of the pixels "
                "of every image the same class",
                problems,
            )
            + f"\nThe cause is the exporter ({library_versions()}), not the images. The other format "
            f"({PT2 if path.suffix == ONNX else ONNX}) may work, or another release of these libraries."
        )
    return Parity(
        images=len(batches),
        crops=len(crops),
        pixels=sum(agreement.pixels for agreement in agreements),
        different=sum(agreement.different for agreement in agreements),
        worst=min(agreement.share for agreement in agreements),
        difference=max(agreement.difference for agreement in agreements),
        reach=max(agreement.reach for agreement in agreements),
        margin=max(agreement.margin for agreement in agreements),
    )


@dataclass(frozen=True)
class _Agreement:
    """How well a file agrees with the network on one batch; fields as those of `Parity`."""

    pixels: int
    different: int
    difference: float
    reach: float
    margin: float

    @property
    def share(self) -> float:
        return 1 - self.different / self.pixels


def _agreement(expected: np.ndarray, run: Runner, batch: np.ndarray) -> _Agreement | str:
    """Compare the file's logits for a batch with the network's [B, K, H, W]; or the reason it fails."""
    try:
        classes, logits = run(batch)
    except Exception as error:  # whatever a runtime raises if a graph holds only for other sizes
        return f"the file cannot be run ({first_line(error)})"
    if classes.shape != batch.shape[:3] or logits.shape != expected.shape:
        return f"the file gives classes {list(classes.shape)} and logits {list(logits.shape)}"
    different = classes != expected.argmax(axis=1)
    margin = 0.0
    if different.any():
        best = np.sort(np.moveaxis(expected, 1, -1)[different], axis=-1)
        margin = float((best[:, -1] - best[:, -2]).max())
    return _Agreement(
        pixels=different.size,
        different=int(different.sum()),
        difference=float(np.abs(logits - expected).max()),
        reach=float(np.abs(expected[expected != REMOVED]).max(initial=0)),
        margin=margin,
    )


def _crops(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Batches of two crops from corners of two images (or of one), in other sizes than theirs."""
    first, second = (*images.values(), *images.values())[:2]
    height, width = np.minimum(first.shape[:2], second.shape[:2])
    crops = {}
    for index, (down, right) in enumerate(CROPS):
        h, w = max(1, int(height * down)), max(1, int(width * right))
        crops[f"crops {index}"] = np.stack([first[:h, :w], second[-h:, -w:]])
    return crops


def _one_window(network: Network, image: np.ndarray, name: str) -> np.ndarray:
    """Logits of the network itself, from the sliding window of prediction: float32 [K, H, W]."""
    height, width = image.shape[:2]
    window = (network.sides.up(height, LEAST_STEPS), network.sides.up(width, LEAST_STEPS))
    logits = predict_scores(network, image, Protocol(window, mirror=False), average="logits")
    logits = logits.mean(0, height).numpy()
    if not np.isfinite(logits).all():
        raise NumericsError(
            f"{name}: the network's own logits are not finite, so there is nothing to compare with. The network has "
            "diverged in training; export an earlier round."
        )
    return logits


def library_versions() -> str:
    """The versions of the imported libraries that exporting depends on."""
    names = ("torch", "onnx", "onnxscript", "onnxruntime")
    return ", ".join(f"{name} {sys.modules[name].__version__}" for name in names if name in sys.modules)


def _size(batch: np.ndarray) -> str:
    count, height, width = batch.shape[:3]
    return f"{count} x {height} x {width} pixels"


def first_line(error: Exception, limit: int = 200) -> str:
    """Kind and first line of an error; those of exporters have many lines."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line[:limit].rstrip('.')}"
