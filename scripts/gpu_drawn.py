"""A drawn stand-in for NEU-Seg where that is not there: gray plates with bright, dark and grooved defects."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

SIDE = 200  # pixels, as in NEU-Seg
LABELED, UNLABELED, HELD_OUT = 16, 8, 4  # few: what runs on them is tried, not what it learns


def draw_neu_seg(folder: Path) -> None:
    """Write images/, labels/ and the lists that recipes/neu_seg_48.yaml names."""
    roles = {"labeled_48": LABELED, "unlabeled_48": UNLABELED, "val": HELD_OUT, "test": HELD_OUT}
    names: dict[str, list[str]] = {}
    for role, count in roles.items():
        names[role] = [f"{role}/{index:06d}" for index in range(count)]
        for part in ("images", "labels"):
            (folder / part / role).mkdir(parents=True)
        for index, name in enumerate(names[role]):
            image, label = _draw(len(names) * 1000 + index)
            cv2.imwrite(str(folder / "images" / f"{name}.jpg"), image)
            cv2.imwrite(str(folder / "labels" / f"{name}.png"), label)
        (folder / f"{role}.txt").write_text("".join(f"{name}\n" for name in names[role]))
    train = names["labeled_48"] + names["unlabeled_48"]
    (folder / "train.txt").write_text("".join(f"{name}\n" for name in train))


def _draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    image = generator.normal(120, 12, (SIDE, SIDE))
    label = np.zeros((SIDE, SIDE), np.uint8)
    for kind, brightness in ((1, -60), (2, 50), (3, -30)):
        center = tuple(int(place) for place in generator.integers(20, SIDE - 20, 2))
        axes = tuple(int(length) for length in generator.integers(8, 40, 2))
        shape = np.zeros((SIDE, SIDE), np.uint8)
        cv2.ellipse(shape, center, axes, float(generator.uniform(0, 180)), 0, 360, color=1, thickness=-1)
        image[shape == 1] += brightness
        label[shape == 1] = kind
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2), label
