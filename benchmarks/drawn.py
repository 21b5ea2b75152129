"""Data sets and commands that benchmarks share: many files that are links to a few small ones, and `darseg train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

LINKS = 30_000  # to one file; file systems limit them
FEW = 4
"""Labeled images, and validation images."""


def draw_data(
    root: Path, classes: int, images: int, rng: np.random.Generator, *, side: int, truth: bool = True
) -> list[str]:
    """Few labeled and validation images and many unlabeled ones, with their lists; the ids of the unlabeled ones.

    Args:
        side: pixels of an image's side.
        truth: whether unlabeled images have label maps, too.
    """
    counts = {"l": FEW, "u": images, "v": FEW}
    for kind, high in (("images", 256), ("labels", classes)):
        for name, count in counts.items():
            if kind == "labels" and name == "u" and not truth:
                continue
            (root / kind / name).mkdir(parents=True)
            for at in range(count):
                path = root / kind / name / f"{at:06d}.png"
                if at % LINKS == 0:
                    shape = (side, side, 3) if kind == "images" else (side, side)
                    Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(path)
                    first = path
                else:
                    os.link(first, path)
    listed = {"labeled": "l", "unlabeled": "u", "validation": "v"}
    for role, name in listed.items():
        (root / f"{role}.txt").write_text("".join(f"{name}/{at:06d}\n" for at in range(counts[name])))
    return [f"u/{at:06d}" for at in range(images)]


def train_command(recipe: Path, out: Path, processes: int) -> list[str]:
    """`darseg train`; by torchrun if there are several processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "darseg", "train", str(recipe), "--out", str(out)]
