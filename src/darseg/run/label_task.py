"""What labeling is asked for: settings, files and progress bars."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.data.prediction import SCALES, ConfidenceScale
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labeled_shares import LabeledShares
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.shrink import Calibration, ShrunkShares, shrink_shares
from darseg.run.journal import Advance

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a progress bar: what is done, how many steps it takes → a function that advances it."""


@dataclass(frozen=True)
class LabelTask:
    """What decides the label maps of a set of images besides their predictions.

    Attributes:
        distribution: shares of the classes among all labeled pixels.
        seed, round_index: of the random sampling, with an image's id.
        inputs: digest of what decides predictions and class weights; weights found with others are not taken over.
        evidence: what the shares are shrunk by; None: they are the target as they are.
    """

    labeling: Labeling
    distribution: ClassDistribution
    seed: int
    round_index: int = 0
    inputs: str = ""
    evidence: tuple[LabeledShares, Calibration] | None = None

    def shrunk(self, predicted: NDArray[np.float64] | None) -> ShrunkShares:
        """The shrunk shares of a task that has evidence.

        Args:
            predicted: shares of the network's own decisions on all images, [K].
        """
        assert self.evidence is not None and predicted is not None
        labeled, calibration = self.evidence
        return shrink_shares(labeled, calibration, predicted)

    @property
    def scale(self) -> ConfidenceScale:
        """The scale that confidences are counted on."""
        return SCALES[self.labeling.confidence]


@dataclass(frozen=True)
class LabelFiles:
    """Where labeling writes.

    Attributes:
        labels: folder of the label maps, `ID.png`.
        histogram: file of the confidences of all images, written between counting and assigning.
        alignment: file of the class weights, written before counting, if decisions are aligned.
        confidences: folder for maps of how sure the predictions are, `ID.png`; None: they are not written.
        logs: folder for the facts of images, one file per process; None: they are not kept.
        held_out: file of the counts of held-out images, written before the histogram, if the ratio is auto.
    """

    labels: Path
    histogram: Path
    alignment: Path
    logs: Path | None = None
    held_out: Path | None = None
    confidences: Path | None = None
