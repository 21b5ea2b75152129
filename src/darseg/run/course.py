"""The value that all steps of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from darseg.config.recipe import Recipe
from darseg.data.dataset import Cache
from darseg.data.manifest import Manifest
from darseg.pseudo.labeled_shares import LabeledShares
from darseg.run.directory import RunDirectory
from darseg.run.folds import Fold
from darseg.run.journal import Journal
from darseg.run.labelers import Labeler
from darseg.run.machine import cache_limit
from darseg.run.plan import Round
from darseg.run.signals import Stop
from darseg.training.processes import Processes


@dataclass(frozen=True)
class Course:
    """A run as its steps see it.

    Attributes:
        data: role → digest of its samples.
        counts: labeled pixels per class, K numbers; their shares are the prior.
        reuse: another run folder; its steps are copied if their inputs are the same.
        judged: whether the contents of all data files are known to be those that the run began with, and `not_reusable`.
        after_round: called with the run folder after each round.
        labelers: round → the network that labels there, if it is not that of the round before.
        labeled: the labeled images' class shares, if they are shrunk.
        folds: of the labeled images, if the run cross-fits.
        cache: of all steps that read images to train on, or to label; see `decoded`.
    """

    recipe: Recipe
    run: RunDirectory
    manifest: Manifest
    data: Mapping[str, str]
    counts: Sequence[int]
    rounds: Sequence[Round]
    reuse: RunDirectory | None
    journal: Journal
    processes: Processes
    stop: Stop
    after_round: Callable[[Path], object] | None
    judged: tuple[bool, Mapping[str, str]] = (False, {})
    labelers: Mapping[int, Labeler] = field(default_factory=dict)
    labeled: LabeledShares | None = None
    folds: tuple[Fold, ...] = ()
    cache: Cache = field(default_factory=lambda: Cache(0))

    @property
    def not_reusable(self) -> Mapping[str, str]:
        """Role → why no step of `reuse` that depends on it may be copied."""
        return self.judged[1]

    def path(self, round_: Round, name: str) -> Path:
        """A file in the folder of a round."""
        return self.run.round(round_.index) / name

    def decoded(self) -> Cache:
        """The images that earlier steps decoded, with as much room for more as there is now."""
        self.cache.restart(
            cache_limit(self.recipe.training.cache, self.processes.here_together, kept=self.cache.kept)
        )
        return self.cache
