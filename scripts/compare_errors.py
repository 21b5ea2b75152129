"""How often `darseg compare` tells two variants apart: without a true difference (false alarms) and with one (power).

Experiments are drawn: images differ in size and difficulty, classes in share, and each training has its own luck.
Prints a row for each number of seeds: the share of the experiments whose two variants are told apart, and the mean
difference, for several true gains.

.venv/bin/python scripts/compare_errors.py --draws 1000
"""

from __future__ import annotations

import argparse

import numpy as np

from darseg.experiment.statistics import compare_trials
from darseg.experiment.trial import Arm, Evidence, RoleScores, Trial

CLASSES = 4
SHARES = (0.75, 0.15, 0.07, 0.03)  # of the classes
RESAMPLES = 400
"""Drawn sets of images; fewer than in earnest, for speed."""


def drawn_evidence(
    generator: np.random.Generator, seeds: int, *, images: int, noise: float, effect: float = 0.0
) -> Evidence:
    """An experiment with a variant and its control, both with plain validation scores.

    Args:
        noise: standard deviation between trainings, of each class's share of right pixels.
        effect: how much higher that share is for the variant.
    """
    sizes_NK = generator.gamma(1.5, 2000, (images, CLASSES)) * SHARES
    true_NK = np.where(generator.random((images, CLASSES)) < 0.7, sizes_NK, 0).astype(np.int64)
    difficulty_NK = generator.normal(0, 0.15, (images, CLASSES))
    arms = (Arm("control", 48, "control"), Arm("variant", 48, controls=(("steps", "control"),)))
    trials = []
    for arm, gain in zip(arms, (0.0, effect), strict=True):
        for seed in range(seeds):
            luck_K = generator.normal(0, noise, CLASSES)
            taste_NK = generator.normal(0, 0.05, (images, CLASSES))  # images that this training finds harder
            right_NK = generator.binomial(
                true_NK, np.clip(0.7 + gain + luck_K + difficulty_NK + taste_NK, 0, 1)
            )
            predicted_NK = right_NK + np.roll(true_NK - right_NK, 1, axis=1)
            counts = np.stack([right_NK, true_NK, predicted_NK], axis=1)
            scores = RoleScores(tuple(f"{image:04d}" for image in range(images)), counts)
            trials.append(Trial(arm.name, 48, seed, 1000, 8000, seconds=60.0, validation=scores))
    return Evidence("drawn", ("a", "b", "c", "d"), arms, tuple(trials), planned=2 * seeds)


def told_apart(
    draws: int, seeds: int, *, images: int, noise: float, effect: float = 0.0
) -> tuple[float, float]:
    """The share of drawn experiments whose variants are told apart, and the mean difference of mean IoU."""
    generator = np.random.default_rng([seeds, images])
    count, total = 0, 0.0
    for _ in range(draws):
        evidence = drawn_evidence(generator, seeds, images=images, noise=noise, effect=effect)
        difference = compare_trials(evidence, resamples=RESAMPLES).variants[0].difference()
        assert difference is not None
        count += difference.told_apart
        total += difference.mean_iou.mean
    return count / draws, total / draws


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--images", type=int, nargs="+", default=[40, 150])
    parser.add_argument("--noise", type=float, default=0.01)
    arguments = parser.parse_args()
    effects = (0.0, 0.01, 0.02, 0.04)
    for images in arguments.images:
        for seeds in (2, 3, 5, 8):
            cells = []
            for effect in effects:
                share, mean = told_apart(
                    arguments.draws, seeds, images=images, noise=arguments.noise, effect=effect
                )
                cells.append(f"{share:6.1%} of {mean:+.4f}")
            print(f"{images} images, {seeds} seeds:", "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
