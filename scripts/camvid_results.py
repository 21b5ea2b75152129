"""Everything in docs/results.md: train all variants on CamVid, score the test images once, print the tables.

    .venv/bin/python scripts/camvid_results.py runs/camvid --seeds 0 1 [--threads 1]

It may be stopped and started again: finished steps are not repeated. Two seeds can run at once as two processes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import darseg
from darseg.run.directory import write_json
from darseg.run.machine import keep_memory

RECIPE = Path(__file__).parents[1] / "recipes" / "camvid_1of8.yaml"
STEPS = 100  # steps of a round in the recipe
TOTAL = f"rounds=[{{steps: {3 * STEPS}}}]"
GLOBAL_ROUNDS = f"rounds=[{{steps: {STEPS}}}, {{steps: {STEPS}}}, {{steps: {STEPS}, scale: [0.4, 2.0]}}]"

# Run folder → changes to the recipe. Round 0 of dars is "labeled only"; cbst and global reuse it.
RUNS = {
    "dars": [],
    "control": [TOTAL],
    "cbst": ["labeling.method=cbst"],
    "global": ["labeling.method=global", "labeling.threshold=0.9", GLOBAL_ROUNDS],
    "all_labeled": ["data.labeled={list: train.txt}", "data.unlabeled=null", TOTAL],
}
# Column → (run folder, round).
COLUMNS = {
    "labeled only": ("dars", 0),
    "control": ("control", 0),
    "dars 1": ("dars", 1),
    "dars 2": ("dars", 2),
    "cbst 1": ("cbst", 1),
    "cbst 2": ("cbst", 2),
    "global 1": ("global", 1),
    "global 2": ("global", 2),
    "all labeled": ("all_labeled", 0),
}


def run_all(out: Path, seed: int, threads: int | None) -> None:
    """Train the runs that are missing, and score them on the test images."""
    keep_memory()  # as the command line does
    fixed = [f"seed={seed}", *([f"threads={threads}"] if threads else [])]
    for name, changes in RUNS.items():
        reuse = out / "dars" if name in ("cbst", "global") else None
        darseg.train(darseg.load_recipe(RECIPE, [*fixed, *changes]), out / name, reuse)
    for name, index in COLUMNS.values():
        path = test_path(out, name, index)
        if not path.exists():
            scores, protocol = darseg.evaluate(out / name, role="test", round_index=index)
            names = darseg.CAMVID.names
            write_json(path, scores.to_json(names) | {"protocol": protocol.describe()})


def test_path(out: Path, name: str, index: int) -> Path:
    return out / f"{name}.round_{index}.test.json"


def table(folders: list[Path]) -> str:
    """Test IoU by class as the mean over the seeds, then figures for each seed, as Markdown."""
    scores = {
        column: [json.loads(test_path(folder, *where).read_text()) for folder in folders]
        for column, where in COLUMNS.items()
    }
    lines = ["| test | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in darseg.CAMVID.names:
        cells = [_mean([scored["iou"][name] for scored in by_seed]) for by_seed in scores.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        cells = [_mean([scored[key] for scored in by_seed]) for by_seed in scores.values()]
        lines.append(f"| **{key.replace('_', ' ')}** | " + " | ".join(cells) + " |")
        for index, folder in enumerate(folders):
            cells = [f"{by_seed[index][key]:.3f}" for by_seed in scores.values()]
            lines.append(f"| – {folder.name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    lines.append(
        f"| **val mean IoU** | {' | '.join(_mean(_val(folders, *where)) for where in COLUMNS.values())} |"
    )
    lines.append("")
    lines += [
        "| pseudo labels | share of pixels labeled | of those right | recall of true pixels |",
        "|---|---|---|---|",
    ]
    for column, (name, index) in COLUMNS.items():
        if index:
            lines.append(f"| {column} | {' | '.join(_pseudo(folders, name, index))} |")
    lines += [
        "",
        "| seconds | " + " | ".join(folder.name for folder in folders) + " |",
        "|---|" + "---|" * len(folders),
    ]
    for name in RUNS:
        cells = [
            f"{sum(entry['seconds'] for entry in _summary(folder / name)['rounds']):.0f}"
            for folder in folders
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shares(folder: Path, name: str, index: int) -> str:
    """Class shares of the unlabeled images' truth, raw predictions and pseudo labels, and the latter's precision."""
    run = darseg.RunDirectory(folder / name)
    labels = run.label_set(index)
    scored = json.loads((run.round(index) / "pseudo_scores.json").read_text())
    truth = scored["truth"]
    lines = [f"| {name} {index} | truth | predicted | pseudo labels | precision |", "|---|---|---|---|---|"]
    predicted, kept = labels.histogram.predicted, labels.kept
    for k, cls in enumerate(darseg.CAMVID.names):
        precision = scored["precision"][cls]
        lines.append(
            f"| {cls} | {truth[k] / sum(truth):.2%} | {predicted[k] / predicted.sum():.2%} | "
            f"{kept[k] / max(1, kept.sum()):.2%} | {'undefined' if precision is None else f'{precision:.3f}'} |"
        )
    return "\n".join(lines)


def _val(folders: list[Path], name: str, index: int) -> list[float]:
    return [_summary(folder / name)["rounds"][index]["mean_iou"] for folder in folders]


def _summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def _pseudo(folders: list[Path], name: str, index: int) -> list[str]:
    rows = []
    for folder in folders:
        labels = darseg.RunDirectory(folder / name).label_set(index)
        scored = json.loads((folder / name / f"round_{index}" / "pseudo_scores.json").read_text())
        confusion = scored["confusion"]
        right = sum(confusion[k][k] for k in range(len(confusion)))
        share = labels.kept.sum() / labels.histogram.predicted.sum()
        rows.append((share, scored["pixel_accuracy"], right / sum(scored["truth"])))
    return [_mean(list(column)) for column in zip(*rows, strict=True)]


def _mean(values: list[float | None]) -> str:
    defined = [value for value in values if value is not None]
    return f"{mean(defined):.3f}" if defined else "undefined"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    folders = [arguments.out / f"seed_{seed}" for seed in arguments.seeds]
    for seed, folder in zip(arguments.seeds, folders, strict=True):
        run_all(folder, seed, arguments.threads)
    print(table(folders))
    for index in (1, 2):
        print("\n" + shares(folders[0], "dars", index))


if __name__ == "__main__":
    main()
