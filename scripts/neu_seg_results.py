"""The evidence on NEU-Seg in docs/results.md: train the runs of one regime, seed and number of labels.

    .venv/bin/python scripts/neu_seg_results.py runs/neu --regime half --labels 48 --seed 0 --threads 1 control dars

It may be stopped and started again: finished steps are not repeated. Several can run at once as processes of one thread.
"""

from __future__ import annotations

import argparse
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

# Run → steps of round 0 and ratios of the rounds after it, in units of a round's steps; whether labels are aligned;
# the run whose round 0 is the same.
RUNS = {
    "control": (3, [], False, None),
    "dars": (1, [0.4, 0.65], False, None),
    "aligned": (1, [0.4, 0.65], True, "dars"),
    "aligned_large": (1, [0.65, 0.9], True, "dars"),
    "dars_large": (1, [0.65, 0.9], False, "dars"),
    "long": (2, [0.65], True, None),
    "continued": (3, [0.65], True, "control"),
    "continued_plain": (3, [0.65], False, "control"),
    "all": (3, [], False, None),
}


def overrides(regime: str, labels: int, seed: int, run: str, steps: int) -> list[str]:
    """The changes to the recipe that make a run with `steps` steps a round."""
    changes = REGIMES[regime][1]
    first, ratios, aligned, _ = RUNS[run]
    usual, last = SCALES[regime]
    rounds = [f"{{steps: {first * steps}}}"]
    rounds += [f"{{steps: {steps}, labeling_ratio: {ratio}}}" for ratio in ratios]
    if len(ratios) == 2:
        rounds[-1] = f"{{steps: {steps}, labeling_ratio: {ratios[-1]}, scale: {last}}}"
    source = "train.txt" if run == "all" else f"labeled_{labels}.txt"
    return [
        *changes,
        f"seed={seed}",
        f"augmentation.scale={usual}",
        f"data.labeled={source}",
        f"data.unlabeled={'null' if run == 'all' else f'unlabeled_{labels}.txt'}",
        f"rounds=[{', '.join(rounds)}]",
        *(["labeling.align=decisions"] if aligned else []),
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
        first = RUNS[run][3]
        reuse = first and folder(args.out, args.regime, args.labels, args.seed, first)
        recipe = darseg.load_recipe(RECIPE, changes)
        darseg.train(recipe, folder(args.out, args.regime, args.labels, args.seed, run), reuse)


if __name__ == "__main__":
    main()
