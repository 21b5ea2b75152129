"""CBST's decisions by probability / threshold, against the rule written pixel by pixel."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.data.maps import label_path
from darseg.data.prediction import FLOAT16
from darseg.errors import RecipeError
from darseg.model.decide import decide, relative_to_largest
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.scores import ScoreSource
from darseg.run.label_samples import label_samples
from darseg.run.label_task import LabelFiles, LabelTask
from darseg.training.processes import Processes
from wording import refused

K, SIZE = 5, (9, 13)


def drawn_scores(seed: int) -> dict[str, np.ndarray]:
    """Logits of four images, float16 [K, H, W], the largest 0; a class named seldom, and never with confidence."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name in ("a", "b", "c/d", "e"):
        logits = 0.6 * torch.randn(K, *SIZE, generator=generator)
        logits[3] -= 0.5
        logits[4] -= 99  # never named
        scores[name] = relative_to_largest(logits, FLOAT16).half().numpy()
    return scores


def labeled(scores: dict[str, np.ndarray], ratio: float, folder: Path) -> dict[str, np.ndarray]:
    """The label maps that the project makes."""
    samples = [Sample(name, folder / f"{name}.png") for name in scores]
    source = ScoreSource(
        read=lambda sample: None,
        score=lambda sample, content: scores[sample.id],
        decide=lambda sample, own, weights: decide(torch.from_numpy(own), FLOAT16, weights=weights),
        plain=lambda sample, content: decide(torch.from_numpy(scores[sample.id]), FLOAT16),
    )
    label_samples(
        samples,
        LabelTask(Labeling("cbst", ratio, normalized=True), ClassDistribution.from_counts([1] * K), seed=0),
        source,
        files=LabelFiles(folder / "labels", folder / "histogram.npz", folder / "alignment.json"),
        processes=Processes.here(),
        progress=lambda title, total: nullcontext(lambda note="": None),
    )
    return {name: read_label(label_path(folder / "labels", name)) for name in scores}


def by_rule(scores: dict[str, np.ndarray], ratio: float) -> tuple[dict[str, np.ndarray], int]:
    """The labels by the release's description, and how many are not the most probable class."""
    chances = {
        name: torch.softmax(torch.from_numpy(own), dim=0).double().numpy() for name, own in scores.items()
    }
    own: dict[int, list[float]] = {k: [] for k in range(K)}
    for probabilities in chances.values():
        for y, x in np.ndindex(*SIZE):
            k = int(np.argmax(probabilities[:, y, x]))
            own[k].append(probabilities[k, y, x])
    thresholds = [1e-4] * K
    if ratio < 1:
        thresholds = [sorted(own[k])[-int(len(own[k]) * ratio) - 1] if own[k] else np.inf for k in range(K)]
    labels, moved = {}, 0
    for name, probabilities in chances.items():
        labels[name] = np.full(SIZE, 255, np.uint8)
        for y, x in np.ndindex(*SIZE):
            quotients = [probabilities[k, y, x] / thresholds[k] for k in range(K)]
            best = int(np.argmax(quotients))
            if quotients[best] >= 1:
                labels[name][y, x] = best
                moved += best != int(np.argmax(probabilities[:, y, x]))
    return labels, moved


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9, 1.0])
def test_labels_are_those_of_the_rule(ratio: float, tmp_path: Path) -> None:
    scores = drawn_scores(int(10 * ratio))
    wanted, moved = by_rule(scores, ratio)
    found = labeled(scores, ratio, tmp_path)
    assert all(np.array_equal(found[name], label) for name, label in wanted.items())
    # With many labels some are not the most probable class; with all, none.
    assert (moved > 0) == (ratio in (0.6, 0.9))
    assert (ratio < 1) == any((label == 255).any() for label in wanted.values())


def test_a_map_that_is_lost_is_made_again(tmp_path: Path) -> None:
    scores = drawn_scores(6)
    whole = labeled(scores, 0.6, tmp_path)
    label_path(tmp_path / "labels", "c/d").unlink()
    again = labeled(scores, 0.6, tmp_path)
    assert all(np.array_equal(again[name], label) for name, label in whole.items())


def test_what_it_does_not_go_with() -> None:
    with refused(RecipeError, "normalized", "dars"):
        Labeling("dars", 0.5, normalized=True)
    with refused(RecipeError, "normalized", "fine"):
        Labeling("cbst", 0.5, confidence="fine", normalized=True)
    with refused(RecipeError, "normalized", "decisions"):
        Labeling("cbst", 0.5, align="decisions", normalized=True)
    assert "normalized" not in Labeling("cbst", 0.5).settings()
    assert Labeling("cbst", 0.5, normalized=True).settings()["normalized"] is True
