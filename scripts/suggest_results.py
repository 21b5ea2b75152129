"""The evidence in docs/suggest.md: 24 labels of NEU-Seg, and 24 more, suggested or drawn at random.

    .venv/bin/python scripts/suggest_results.py runs/suggest --draws 0 1 2 --threads 1 --data DATA --weights FILE

Each draw trains on 24 labels, adds 24 suggested or random images with their labels, and trains that network on with the
48. It may be stopped and started again: finished steps are not repeated. `--only start random` leaves out a part.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import darseg
from darseg.data.files import read_json, write_whole
from darseg.run.directory import write_json
from darseg.run.evaluate import evaluate_result
from darseg.run.machine import keep_memory
from neu_seg_results import RECIPE, REGIMES, SCALES

LABELS = 24
"""Labels to begin with, and images that are added to them."""

POOL = 600
"""Unlabeled images that are looked at, of 3,456; random ones are drawn from all."""

STEPS = 300
KINDS = ("start", "random", "suggested")
ROLES = ("validation", "test")


def recipe_for(args: argparse.Namespace, seed: int, lists: tuple[Path, Path], weights: Path) -> darseg.Recipe:
    """The recipe of one training on labels alone; unlabeled images only align its decisions."""
    labeled, unlabeled = lists
    changes = [
        *REGIMES["half"][1],
        f"seed={seed}",
        f"augmentation.scale={SCALES['half'][0]}",
        f"data.root={args.data.resolve()}",
        f"data.labeled={labeled.resolve()}",
        f"data.unlabeled={unlabeled.resolve()}",
        f"network.weights={weights.resolve()}",
        f"rounds=[{{steps: {args.steps}}}]",
    ]
    return darseg.load_recipe(RECIPE, [*changes, *([f"threads={args.threads}"] if args.threads else [])])


def lists_with(args: argparse.Namespace, folder: Path, added: list[str]) -> tuple[Path, Path]:
    """The lists of labeled and unlabeled images, once `added` are labeled; written into `folder`."""
    labeled, unlabeled = (
        (args.data / f"{role}_{LABELS}.txt").read_text().split() for role in ("labeled", "unlabeled")
    )
    assert len(added) == LABELS and set(added) <= set(unlabeled)
    paths = folder / "labeled.txt", folder / "unlabeled.txt"
    rest = [name for name in unlabeled if name not in set(added)]
    for path, ids in zip(paths, ([*labeled, *added], rest), strict=True):
        write_whole(path, "".join(f"{name}\n" for name in ids))
    return paths


def added_images(args: argparse.Namespace, kind: str, seed: int, folder: Path) -> list[str]:
    """The ids that are labeled next, suggested by the first network, or drawn at random."""
    if kind == "random":
        unlabeled = (args.data / f"unlabeled_{LABELS}.txt").read_text().split()
        chosen = np.random.default_rng(seed).choice(len(unlabeled), LABELS, replace=False)
        return [unlabeled[at] for at in sorted(chosen)]
    out = folder / "suggestions"
    if not (out / "suggested.txt").exists():
        darseg.suggest(folder / "start" / "run", out, count=LABELS, pool=POOL)
    return (out / "suggested.txt").read_text().split()


def train_and_score(args: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """Train one network, unless it is trained, and score it on both sets of images that it never saw."""
    folder = args.out / f"draw_{seed}"
    here = folder / kind
    weights = folder / "start" / "run" / "round_0" / "network.safetensors"
    if kind == "start":
        lists = args.data / f"labeled_{LABELS}.txt", args.data / f"unlabeled_{LABELS}.txt"
        weights = args.weights
    else:
        lists = lists_with(args, here, added_images(args, kind, seed, folder))
    recipe = recipe_for(args, seed, lists, weights)
    darseg.train(recipe, here / "run")
    path = here / "scores.json"
    if not path.exists():
        names = darseg.manifest_of(recipe).classes.names
        scored = {role: evaluate_result(here / "run", role=role).to_json(names) for role in ROLES}
        write_json(path, scored)
    return read_json(path)


def of_decisions(scored: dict[str, Any], decisions: str) -> float:
    """The mean IoU of plain or of aligned decisions; the plain ones if nothing was aligned."""
    own = scored if scored["decisions"] == decisions else scored.get(decisions, scored)
    return own["mean_iou"]


def table(results: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Mean IoU as Markdown: a row for each kind, draw by draw and on average."""
    draws = sorted({seed for by_seed in results.values() for seed in by_seed})
    lines = []
    for role in ROLES:
        for decisions in ("plain", "aligned"):
            heads = " | ".join(f"draw {seed}" for seed in draws)
            lines += [f"| {role}, {decisions} | {heads} | mean |", "|---|" + "---|" * (len(draws) + 1)]
            for kind, by_seed in results.items():
                values = [of_decisions(by_seed[seed][role], decisions) for seed in draws if seed in by_seed]
                cells = " | ".join(f"{value:.3f}" for value in [*values, mean(values)])
                lines.append(f"| {kind} | {cells} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--data", type=Path, required=True, help="the folder of NEU-Seg")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of EfficientNet-Lite0")
    args = parser.parse_args()
    keep_memory()  # as the command line does
    results: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in args.only}
    for kind in args.only:
        for seed in args.draws:
            results[kind][seed] = train_and_score(args, kind, seed)
    print(table(results))


if __name__ == "__main__":
    main()
