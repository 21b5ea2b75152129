"""How well the shares of few labeled images are known, and what shrinking them gains; prints two tables.

    .venv/bin/python scripts/class_shares.py ../shared/data/neu_seg

The masks are those of NEU-Seg's training images. Labeled images are drawn from them. First, how often the interval of a
share holds the share of all masks. Then the error of the labeled shares and of the shrunk ones against the images that
were drawn neither as labeled nor for validation. There the network is drawn, too: it finds a part of each defect, which
differs from image to image, and some background as defect.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.data.labels import read_label
from darseg.pseudo.distribution import count_each
from darseg.pseudo.labeled_shares import labeled_shares
from darseg.pseudo.shrink import Calibration, shrink_shares

CLASSES = ("background", "inclusion", "patches", "scratches")
DRAWS = 200
NETWORKS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "weak": ((0.15, 0.6, 0.13), (0.001, 0.008, 0.001)),
    "good": ((0.4, 0.75, 0.4), (0.006, 0.01, 0.006)),
}
"""Name → mean recall of the defects, and the background that is predicted as each, as a part of it."""


def predict(generator: np.random.Generator, counts: NDArray[np.int64], network: str) -> NDArray[np.int64]:
    """The drawn network's pixels of each class in images with these true ones."""
    recall, wrong = (np.array(values) for values in NETWORKS[network])
    size = (len(counts), len(recall))
    found = counts[:, 1:] * generator.beta(3 * recall, 3 * (1 - recall), size)
    found += counts[:, :1] * np.minimum(generator.gamma(0.3, wrong / 0.3, size), 0.3)
    found = found.astype(np.int64)
    return np.concatenate(
        [counts.sum(axis=1, keepdims=True) - found.sum(axis=1, keepdims=True), found], axis=1
    )


def print_coverage(counts: NDArray[np.int64]) -> None:
    """How often the intervals hold the share of all images, and how often they are called uncertain."""
    truth, generator = counts.sum(axis=0) / counts.sum(), np.random.default_rng(0)
    print("| labeled images |", " | ".join(CLASSES), "|")
    for images in (12, 24, 48, 96):
        held, wide = [], []
        for _ in range(DRAWS):
            shares = labeled_shares(counts[generator.choice(len(counts), images, replace=False)])
            held.append((shares.low <= truth) & (truth <= shares.high))
            wide.append(shares.uncertain)
        cells = [
            f"{covered:.1%} ({share:.0%} uncertain)"
            for covered, share in zip(np.mean(held, axis=0), np.mean(wide, axis=0), strict=True)
        ]
        print(f"| {images} |", " | ".join(cells), "|")


def print_errors(counts: NDArray[np.int64]) -> None:
    """Root mean square error of the defects' log shares: labeled, pooled with validation, network, shrunk."""
    generator = np.random.default_rng(0)
    print("| network | labeled | validation | labeled shares | with validation masks | network | shrunk |")
    for network in NETWORKS:
        for labels in (24, 48, 192):
            for held_out in (10, 30, 150):
                errors = []
                for _ in range(DRAWS):
                    order = generator.permutation(len(counts))
                    drawn = counts[order[:labels]]
                    validation = counts[order[labels : labels + held_out]]
                    unlabeled = counts[order[labels + held_out :]]
                    seen = predict(generator, unlabeled, network).sum(axis=0)
                    calibration = Calibration.of(validation, predict(generator, validation, network))
                    shrunk = shrink_shares(labeled_shares(drawn), calibration, seen / seen.sum())
                    pooled = np.concatenate([drawn, validation]).sum(axis=0)
                    truth = unlabeled.sum(axis=0) / unlabeled.sum()
                    shares = (shrunk.labeled, pooled / pooled.sum(), shrunk.network, shrunk.share)
                    errors.append(np.log(np.maximum(shares, 1e-4) / truth)[:, 1:] ** 2)
                cells = [f"{error:.2f}" for error in np.sqrt(np.mean(errors, axis=0)).mean(axis=1)]
                print(f"| {network} | {labels} | {held_out} |", " | ".join(cells), "|", flush=True)


def main(root: Path) -> None:
    """Read the masks, and print both tables."""
    names = (root / "train.txt").read_text().split()
    counts = count_each(((name, read_label(root / "labels" / f"{name}.png")) for name in names), len(CLASSES))
    print_coverage(counts)
    print_errors(counts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
