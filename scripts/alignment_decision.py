"""How often `result.align: auto` errs on few held-out images, simulated; prints tables.

    .venv/bin/python scripts/alignment_decision.py

Images of 40,000 pixels have a background and one or two of three rarer classes (shares as in NEU-Seg). A plain network
finds a part of each object; an aligned one finds more of it, and more that is none. How much more that is none is set so
that the true gain in mean IoU of the full weights, on 50,000 images, is the wanted one. The four candidates are the
parts 0.35, 0.5, 0.7 and 1 of that effect.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darseg.training.bootstrap import LEVEL, expanded_tail, mean_iou_of

PARTS = (0.35, 0.5, 0.7, 1.0)
PIXELS, CLASSES = 40_000, 4
OCCURS, SIZE = np.array([0.12, 0.5, 0.35]), np.array([0.12, 0.15, 0.07])
IMAGES = (5, 8, 10, 15, 20, 30, 60)
TRIES, RESAMPLES, POPULATION = 1000, 400, 50_000


def draw(generator: np.random.Generator, images: int, more_wrong: float) -> NDArray[np.float64]:
    """Counts of images, float64 [images, 1 + candidates, 3, K]: right, true and predicted pixels."""
    shape = (images, CLASSES - 1)
    true = (generator.random(shape) < OCCURS) * SIZE * PIXELS * generator.lognormal(0, 0.8, shape)
    true = np.minimum(true, 0.3 * PIXELS)
    hard = generator.beta(1.2, 1.2, shape)
    detected, wrong = true * 0.75 * hard, 0.25 * true * generator.exponential(1, shape)
    wrong += SIZE * PIXELS * 0.02 * generator.exponential(1, shape)
    gained = 0.45 * (true - detected) * generator.beta(1.5, 1.5, shape)
    risen = more_wrong * SIZE * PIXELS * generator.exponential(1, shape) * generator.integers(0, 3, shape)
    counts = np.empty((images, 1 + len(PARTS), 3, CLASSES))
    for index, part in enumerate((0.0, *PARTS)):
        right = detected + part * gained
        predicted = np.minimum(right + wrong + part * risen, 0.3 * PIXELS + right)
        outside = predicted.sum(1) - right.sum(1)
        for row, values in enumerate((right, true, predicted)):
            counts[:, index, row, 1:] = values
        background = PIXELS - true.sum(1)
        missed = true.sum(1) - right.sum(1)
        counts[:, index, 0, 0] = np.maximum(background - outside, 0)
        counts[:, index, 1, 0], counts[:, index, 2, 0] = background, counts[:, index, 0, 0] + missed
    return counts


def gains(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gain of each candidate over the plain network, on all images together."""
    iou = mean_iou_of(counts.sum(0))
    return iou[1:] - iou[0]


def tuned(gain: float) -> float:
    """The amount of wrong pixels with which the full weights have this true gain."""
    low, high = 0.0, 4.0
    for _ in range(20):
        middle = (low + high) / 2
        if gains(draw(np.random.default_rng(1), POPULATION, middle))[-1] > gain:
            low = middle
        else:
            high = middle
    return low


def lower_ends(counts: NDArray[np.float64], generator: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """The interval's lower end of each candidate, as a percentile and as a percentile expanded for few images."""
    images = len(counts)
    times = generator.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    sums = np.tensordot(times, counts, axes=1)
    iou = np.stack([mean_iou_of(sums[:, index]) for index in range(counts.shape[1])], axis=1)
    tail = (1 - LEVEL) / 2
    drawn = iou[:, 1:] - iou[:, :1]
    return {
        "percentile": np.quantile(drawn, tail, axis=0),
        "expanded": np.quantile(drawn, expanded_tail(LEVEL, images), axis=0),
    }


def simulate(gain: float) -> None:
    """Print how often anything is accepted, and the true gain of what is chosen."""
    more_wrong = tuned(gain)
    truth = gains(draw(np.random.default_rng(2), POPULATION, more_wrong))
    print(f"\nTrue gains of the candidates: {', '.join(f'{value:+.3f}' for value in truth)}\n")
    print("| images | rule | accepted | of the full weights alone | gain: highest lower end | highest mean |")
    print("|---|---|---|---|---|---|")
    for images in IMAGES:
        generator = np.random.default_rng(images)
        results: dict[str, list[tuple[float, ...]]] = {"percentile": [], "expanded": []}
        for _ in range(TRIES):
            counts = draw(generator, images, more_wrong)
            means = gains(counts)
            for rule, low in lower_ends(counts, generator).items():
                accepted = low > 0
                by_low = truth[low.argmax()] if accepted.any() else 0.0
                by_mean = truth[np.where(accepted, means, -1).argmax()] if accepted.any() else 0.0
                results[rule].append((accepted.any(), accepted[-1], by_low, by_mean))
        for rule, rows in results.items():
            shares = np.array(rows, float).mean(0)
            print(
                f"| {images} | {rule} | {shares[0]:.1%} | {shares[1]:.1%} | {shares[2]:+.4f} | {shares[3]:+.4f} |"
            )


def main() -> None:
    for gain in (0.0, 0.03, -0.03):
        simulate(gain)


if __name__ == "__main__":
    main()
