"""How often `darseg compare` tells two variants apart: without a true difference (false alarms) and with one (power).

Experiments are drawn: images differ in size and difficulty, classes in share, and each training has its own luck.
Prints a row for each number of seeds: the share of the experiments whose two variants are told apart, and the mean
difference, for several true gains.

.venv/bin/python scripts/compare_errors.py --draws 1000
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

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


MIXTURES = (
    (0.01, 0, 0.02),
    (0.01, 0.05, 0.05),
    (0.01, 0.1, 0.05),
    (0.003, 0.1, 0.05),
    (0.0001, 0.1, 0.05),
    (0, 0, 0.1),
)
"""Standard deviations: of a training, of an image's difference, and of both together."""


def print_rules(draws: int, images: int = 100) -> None:
    """False alarms of two rules for normal differences: added ends of intervals, and Satterthwaite's."""
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        for training, image, both in MIXTURES:
            alarms = np.zeros(2)
            for _ in range(10):  # for less memory
                shape = (draws // 10, seeds, images)
                values = generator.normal(0, both, shape) + generator.normal(0, image, (shape[0], 1, images))
                values += generator.normal(0, training * np.sqrt(2), (shape[0], seeds, 1))
                mean = abs(values.mean((1, 2)))
                parts = [
                    values.mean(2).var(1, ddof=1) / seeds,
                    values.mean(1).var(1, ddof=1) / images,
                ]
                freedom = (seeds - 1, images - 1)
                ends = [stats.t.ppf(0.975, n) ** 2 * part for n, part in zip(freedom, parts, strict=True)]
                total = parts[0] + parts[1]
                shared = total**2 / sum(part**2 / n for n, part in zip(freedom, parts, strict=True))
                alarms[0] += (mean > np.sqrt(ends[0] + ends[1])).mean() / 10
                alarms[1] += (mean > stats.t.ppf(0.975, shared) * np.sqrt(total)).mean() / 10
            print(
                f"{seeds} seeds, noise {training}, {image}, {both}: {alarms[0]:.1%}, Satterthwaite {alarms[1]:.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--images", type=int, nargs="+", default=[40, 150])
    parser.add_argument("--noise", type=float, default=0.01)
    parser.add_argument("--rules", action="store_true", help="only compare rules, on normal differences")
    arguments = parser.parse_args()
    if arguments.rules:
        return print_rules(20_000)
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
