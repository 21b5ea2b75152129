"""Runs of many tiny images: start-up, labeling and going on, with their memory.

    .venv/bin/python benchmarks/scale.py [--images 25000 50000 100000] [--side 33] [--processes 1] [--start]

For each number of images: a data set (links to a few small files), then `darseg train` with two rounds of two steps, so
that all unlabeled images are labeled once; then the same command again, for what it takes to go on. A network with half
the channels of a ResNet-18 and windows of one image; decoded images are not kept, so that the memory is that of all else.
Seconds of the clock and of the processor of all processes, and the most memory of one of them. Started with
`--processes 2`, the work is shared by `torchrun`. With --start, nothing is labeled.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from drawn import draw_data, train_command
from host import called, commit

CLASSES = 4


def recipe_of(root: Path, side: int, *, labels: bool = True) -> dict[str, Any]:
    """Two rounds, one without labels; all is as small as it can be but the number of images."""
    return {
        "data": {
            "root": str(root),
            "classes": [f"class_{k}" for k in range(CLASSES)],
            **{role: f"{role}.txt" for role in ("labeled", "unlabeled", "validation")},
        },
        "network": {"backbone": "resnet18_half", "weights": "none", "output_stride": 16, "head_channels": 8},
        "training": {"crop": side, "batch": 4, "workers": 1, "cache": False},
        "labeling": {"base_size": side, "window": [side, side], "mirror": False},
        "evaluation": {"base_size": side, "window": [side, side], "mirror": False},
        "result": {"align": "off"},
        "rounds": [{"steps": 2}, *([{"steps": 2, "labeling_ratio": 0.5}] if labels else [])],
    }


def first_step(run: Path, began: float) -> float:
    """Seconds from the start of the command to the end of the first step."""
    for line in (run / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] in ("step", "trained"):
            return event["time"] - began
    return float("nan")


def labeled(run: Path) -> float:
    """Seconds of labeling, by its record."""
    return json.loads((run / "round_1" / "label.json").read_text())["seconds"]


def measure(images: int, side: int, processes: int, *, labels: bool) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="darseg_scale_") as name:
        folder = Path(name)
        draw_data(folder / "data", CLASSES, images, np.random.default_rng(0), side=side, truth=False)
        recipe, run = folder / "recipe.yaml", folder / "run"
        recipe.write_text(yaml.safe_dump(recipe_of(folder / "data", side, labels=labels)))
        began = time.time()
        command = train_command(recipe, run, processes)
        whole = called(command)
        begun, labeling = first_step(run, began), labeled(run) if labels else math.nan
        again = called(command)
        maps = sum(1 for _ in (run / "round_1" / "labels").rglob("*.png"))
        if maps != (images if labels else 0):
            raise SystemExit(f"{maps} label maps of {images} images")
        return [
            f"{images:,}",
            f"{begun:.1f}",
            f"{labeling:.1f}",
            f"{labeling / images * 1000:.2f}",
            f"{whole.seconds:.1f}",
            f"{whole.processor:.1f}",
            f"{again.seconds:.1f}",
            f"{again.processor:.1f}",
            f"{max(whole.memory, again.memory):.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    parser.add_argument(
        "--side", type=int, default=33, help="pixels of an image's side, 1 + a multiple of 16"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--start", action="store_true")
    args = parser.parse_args()
    print(f"commit {commit()}, {args.processes} process(es) of one thread, images {args.side}x{args.side}\n")
    head = [
        "unlabeled images",
        "until the first steps, s",
        "labeling, s",
        "ms an image",
        "whole run, s",
        "of the processor, s",
        "again, s",
        "of the processor, s",
        "most memory, MB",
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for images in args.images:
        row = measure(images, args.side, args.processes, labels=not args.start)
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
