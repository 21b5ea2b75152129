"""Weak scaling on a CPU: twice the work in two processes, against one process and against two runs of their own.

    .venv/bin/python benchmarks/weak_scaling.py [--processes 2] [--turns 3] [--steps 40] [--images 200]

`darseg train` on drawn images: `--steps` steps of 8 crops on labels, then a round whose `--images` pseudo labels are made
first. With P processes the batch and the number of unlabeled images are P times as large, so an ideal machine takes the
same seconds. Two runs next to each other, which share nothing, show what the machine itself allows. One thread each.
Seconds are those of the records: of the first round's training, and of labeling; starting the processes does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from drawn import draw_data, train_command
from host import commit
from scale import CLASSES, recipe_of

SIDE, CROP, BATCH = 129, 97, 8


def recipe(root: Path, *, steps: int, times: int) -> dict[str, Any]:
    """Two rounds on the drawn data, with `times` times the batch."""
    content = recipe_of(root, SIDE)
    content["network"]["head_channels"] = 128
    content["training"] = {"crop": CROP, "batch": BATCH * times, "workers": 1}
    content["rounds"] = [{"steps": steps}, {"steps": 1, "labeling_ratio": 0.5}]
    return content


def start(path: Path, out: Path, processes: int) -> subprocess.Popen[bytes]:
    """A run, with one thread a process."""
    return subprocess.Popen(
        train_command(path, out, processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def seconds(run: Path) -> tuple[float, float]:
    """Seconds of training in round 0, and of labeling."""
    records = (run / "round_0" / "train.json", run / "round_1" / "label.json")
    return tuple(json.loads(record.read_text())["seconds"] for record in records)  # ty: ignore[invalid-return-type]


def measure(folder: Path, kind: str, processes: int, *, args: argparse.Namespace) -> tuple[float, float]:
    """The seconds of one turn of a kind of runs; of several runs the mean."""
    times = processes if kind == "together" else 1
    data = folder / f"data_{times}"
    if not data.is_dir():
        draw_data(data, CLASSES, args.images * times, np.random.default_rng(0), side=SIDE, truth=False)
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe(data, steps=args.steps, times=times)))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        outs = [Path(name) / str(at) for at in range(processes if kind == "apart" else 1)]
        children = [start(path, out, processes if kind == "together" else 1) for out in outs]
        for child in children:
            output, _ = child.communicate()
            if child.returncode:
                raise SystemExit(output.decode(errors="replace")[-4000:])
        figures = [seconds(out) for out in outs]
    return statistics.mean(it[0] for it in figures), statistics.mean(it[1] for it in figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=200, help="unlabeled images of a process")
    args = parser.parse_args()
    kinds = ("alone", "apart", "together")
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="darseg_weak_") as name:
        for _ in range(args.turns):
            for kind in kinds:
                taken[kind].append(measure(Path(name), kind, args.processes, args=args))
    count = args.processes
    print(f"commit {commit()}, {count} processes of one thread, {args.turns} turns\n")
    head = f"one process | {count} runs apart | {count} processes, {count} x the work | efficiency | of the machine's"
    print(f"| s, median | {head} |")
    print("|---|---|---|---|---|---|")
    for at, part in enumerate(
        (f"{args.steps} steps of {BATCH} crops a process", f"labeling {args.images} images a process")
    ):
        turns = [[taken[kind][turn][at] for kind in kinds] for turn in range(args.turns)]
        alone, apart, together = (statistics.median(column) for column in zip(*turns, strict=True))
        ideal = statistics.median(turn[0] / turn[2] for turn in turns)
        machine = statistics.median(turn[1] / turn[2] for turn in turns)
        print(f"| {part} | {alone:.1f} | {apart:.1f} | {together:.1f} | {ideal:.2f} | {machine:.2f} |")


if __name__ == "__main__":
    main()
