"""The evidence on NEU-Seg in docs/results.md: train the runs of one regime, seed and number of labels.

    .venv/bin/python scripts/neu_seg_results.py runs/neu --regime half --labels 48 --seed 0 --threads 1 control dars

It may be stopped and started again: finished steps are not repeated. Several can run at once as processes of one thread.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import darseg
from darseg.run.machine import keep_memory

RECIPE = Path(__file__).parents[1] / "recipes" / "neu_seg_48.yaml"

# Regime → steps of a round, and changes to the recipe.
REGIMES = {
    "full": (400, []),
    "half": (
        2000,
        [
            "training.crop=[97, 97]",
            "labeling.base_size=100",
            "labeling.window=[113, 113]",
            "evaluation.base_size=100",
            "evaluation.window=[113, 113]",
        ],
    ),
}
# Augmentation scales of rounds 0 and 1, and of round 2.
SCALES = {"full": ([0.5, 1.5], [0.4, 2.0]), "half": ([0.25, 0.75], [0.2, 1.0])}


@dataclass(frozen=True)
class Run:
    """A run, in units of a round's steps.

    Attributes:
        first: steps of round 0.
        ratios: labeling ratio of each round after it.
        changes: to the recipe.
        begins_as: the run whose round 0 is the same.
        online: units of one round that learns from unlabeled images while it trains.
    """

    first: int = 1
    ratios: tuple[float, ...] = ()
    changes: tuple[str, ...] = ()
    begins_as: str | None = None
    online: int = 0


ALIGNED = ("labeling.align=decisions",)
RUNS = {
    "control": Run(3),
    "control_teacher": Run(3, changes=("training.teacher={decay: 0.996}",)),
    "dars": Run(1, (0.4, 0.65)),
    "aligned": Run(1, (0.4, 0.65), ALIGNED, "dars"),
    "aligned_large": Run(1, (0.65, 0.9), ALIGNED, "dars"),
    "dars_large": Run(1, (0.65, 0.9), (), "dars"),
    "long": Run(2, (0.65,), ALIGNED),
    "continued": Run(3, (0.65,), ALIGNED, "control"),
    "continued_plain": Run(3, (0.65,), (), "control"),
    "fixmatch": Run(1, (), ("online.method=fixmatch",), "dars", online=2),
    "fixmatch_70": Run(1, (), ("online.method=fixmatch", "online.above=0.7"), "dars", online=2),
    "mean_teacher": Run(1, (), ("online.method=mean_teacher",), "dars", online=2),
    "all": Run(3),
}


def overrides(regime: str, labels: int, seed: int, name: str, steps: int) -> list[str]:
    """The changes to the recipe that make a run with `steps` steps a round."""
    run = RUNS[name]
    usual, last = SCALES[regime]
    rounds = [f"{{steps: {run.first * steps}}}"]
    rounds += [f"{{steps: {steps}, labeling_ratio: {ratio}}}" for ratio in run.ratios]
    if len(run.ratios) == 2:
        rounds[-1] = f"{{steps: {steps}, labeling_ratio: {run.ratios[-1]}, scale: {last}}}"
    if run.online:
        rounds.append(f"{{steps: {run.online * steps}, use: online}}")
    source = "train.txt" if name == "all" else f"labeled_{labels}.txt"
    return [
        *REGIMES[regime][1],
        f"seed={seed}",
        f"augmentation.scale={usual}",
        f"data.labeled={source}",
        f"data.unlabeled={'null' if name == 'all' else f'unlabeled_{labels}.txt'}",
        f"rounds=[{', '.join(rounds)}]",
        *run.changes,
    ]


def folder(out: Path, regime: str, labels: int, seed: int, run: str) -> Path:
    return out / f"{regime}_{'all' if run == 'all' else labels}_seed_{seed}" / run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--regime", choices=list(REGIMES), required=True)
    parser.add_argument("--labels", type=int, choices=(24, 48, 96, 192), default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path, help="the folder of NEU-Seg, if not where the recipe has it")
    parser.add_argument("--weights", type=Path, help="ImageNet weights; no such file: random ones")
    parser.add_argument("--steps", type=int, help="steps of a round, instead of the regime's")
    parser.add_argument("runs", nargs="+", choices=list(RUNS))
    args = parser.parse_args()
    keep_memory()  # as the command line does
    for run in args.runs:
        steps = args.steps or REGIMES[args.regime][0]
        changes = overrides(args.regime, args.labels, args.seed, run, steps)
        changes += [f"threads={args.threads}"] if args.threads else []
        changes += [f"data.root={args.data.resolve()}"] if args.data else []
        if args.weights:
            changes.append(f"network.weights={args.weights.resolve() if args.weights.exists() else 'none'}")
        first = RUNS[run].begins_as
        reuse = first and folder(args.out, args.regime, args.labels, args.seed, first)
        recipe = darseg.load_recipe(RECIPE, changes)
        darseg.train(recipe, folder(args.out, args.regime, args.labels, args.seed, run), reuse)


if __name__ == "__main__":
    main()
