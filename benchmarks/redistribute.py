"""`darseg redistribute` with and without --align: seconds of the processor, and the memory of both.

    .venv/bin/python benchmarks/redistribute.py [--files 2000] [--side 200] [--classes 5] [--turns 3]

The files hold float32 logits, drawn smooth, in which the last classes win too seldom; most files are links to a few.
The commands take turns, in processes of their own with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from host import called, commit, processor

DIFFERENT = 50
"""Files that are drawn; the others are links to these."""


def draw_logits(folder: Path, files: int, side: int, classes: int) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(files):
        path = folder / f"{number:06d}.npy"
        if number < DIFFERENT:
            coarse = generator.normal(0, 2, (classes, side // 20 + 2, side // 20 + 2)).astype(np.float32)
            smooth = np.stack([cv2.resize(plane, (side, side)) for plane in coarse])
            smooth -= np.linspace(0, 3, classes, dtype=np.float32)[:, None, None]
            np.save(path, smooth)
        else:
            os.link(folder / f"{number % DIFFERENT:06d}.npy", path)


def measured(folder: Path, out: Path, counts: Path, options: list[str]) -> tuple[float, float]:
    """Seconds of the processor and peak memory in MB of one call."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "darseg", "redistribute", str(folder), str(out)]
    command += [f"--class-counts={counts}", "--labeling-ratio=0.4", *options]
    call = called(command)
    return call.processor, call.memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, usual in (("files", 2000), ("side", 200), ("classes", 5), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    args = parser.parse_args()
    print(
        f"{processor()}, commit {commit()}, {args.files} files of {args.side}x{args.side}, {args.classes} classes\n"
    )
    with tempfile.TemporaryDirectory(prefix="darseg_redistribute_") as name:
        root = Path(name)
        draw_logits(root / "logits", args.files, args.side, args.classes)
        counts = root / "counts.json"
        counts.write_text(json.dumps([1000] * args.classes))
        turns = [
            [measured(root / "logits", root / "out", counts, options) for options in ([], ["--align"])]
            for _ in range(args.turns)
        ]
    print("| | without | with --align | ratio: median (least – most) |\n|---|---|---|---|")
    for at, title, digits in ((0, "processor seconds", 1), (1, "most memory, MB", 0)):
        plain, aligned = ([turn[kind][at] for turn in turns] for kind in (0, 1))
        ratios = sorted(later / first for first, later in zip(plain, aligned, strict=True))
        print(
            f"| {title} | {median(plain):.{digits}f} | {median(aligned):.{digits}f} | "
            f"{median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()
