"""`darseg demo`: train on drawn scenes with and without DARS, and compare class by class."""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.files import is_taken, named, read_file, write_whole
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.maps import write_map
from darseg.demo.scenes import SCENE_CLASSES, write_scenes
from darseg.errors import RunError
from darseg.model.predict import predict
from darseg.run.build import evaluation_protocol, manifest_of
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import load_trained
from darseg.run.marks import read_excluded, without
from darseg.run.rounds import train

DATA_SEED = 2021
"""Seed of the drawn scenes: the year of the paper, chosen before anything was trained on them."""

LABELED, UNLABELED, VALIDATION = 16, 160, 60
PICTURE_ROWS = 4


def run_demo(
    out: Path | str,
    seed: int = 0,
    console: Console | None = None,
    after_round: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Draw the scenes, train with DARS and without, print the comparison and draw a picture.

    The run without DARS is the control: it trains on the labeled images only, for as many steps as all rounds together.

    Args:
        out: folder for `data/`, `recipe.yaml`, `seed_N/dars/`, `seed_N/control/`, `seed_N/demo.json`, `seed_N/demo.png`.
        seed: seed of the training; the drawn scenes are always the same.
        after_round: called after each round of both runs, as in `train`.

    Returns:
        the content of `demo.json`: for each class, the IoU of three networks and the class shares.
    """
    out, console, began = Path(out), console or Console(), time.monotonic()
    _check_folder(out)
    write_whole(out / "recipe.yaml", recipe_text())
    console.print(f"Drawing {LABELED} labeled, {UNLABELED} unlabeled and {VALIDATION} validation scenes …")
    write_scenes(out / "data", labeled=LABELED, unlabeled=UNLABELED, validation=VALIDATION, seed=DATA_SEED)
    folder = out / f"seed_{seed}"
    recipe = load_recipe(out / "recipe.yaml", [f"seed={seed}"])
    console.rule("DARS: rounds 0 and 1")
    dars = train(recipe, folder / "dars", console=console, after_round=after_round)
    console.rule("Control: the labeled images only, for as many steps")
    steps = sum(training_round["steps"] for training_round in dars["rounds"])
    longer = load_recipe(out / "recipe.yaml", [f"seed={seed}", f"rounds=[{{steps: {steps}}}]"])
    control = train(longer, folder / "control", console=console, after_round=after_round)
    result = compare(RunDirectory(folder / "dars"), dars, control)
    result |= {"seed": seed, "steps": steps, "seconds": round(time.monotonic() - began, 1)}
    write_whole(folder / "demo.json", json.dumps(result, indent=2) + "\n")
    write_map(folder / "demo.png", draw_picture(recipe, folder))
    console.rule("Results")
    console.print(_table(result))
    console.print(
        f"mean IoU of plain decisions: labeled only {result['mean_iou']['labeled_only']:.4f}, control "
        f"{result['mean_iou']['control']:.4f}, DARS {result['mean_iou']['dars']:.4f}  "
        f"({result['seconds']:.0f} s; picture of the results: {folder / 'demo.png'})",
        highlight=False,
        soft_wrap=True,
    )
    return result


def _check_folder(out: Path) -> None:
    """Raise RunError if the recipe or the data in a folder are not the demo's."""
    path = recipe = out / "recipe.yaml"
    if not is_taken(recipe):
        path = out / "data"
    if is_taken(path) and not (recipe.is_file() and read_file(recipe) == recipe_text().encode()):
        raise RunError(
            f"{named(path)} exists and was not written by this version of `darseg demo`, so it was left as it is. Choose "
            "another folder with --out."
        )


def recipe_text() -> str:
    """The demo's recipe, with the classes of the drawn scenes and their colors."""
    text = importlib.resources.files("darseg.demo").joinpath("demo.yaml").read_text()
    pairs = zip(SCENE_CLASSES.names, SCENE_CLASSES.colors, strict=True)
    return text.replace("CLASSES", "{" + ", ".join(f"{name}: {list(color)}" for name, color in pairs) + "}")


def compare(run: RunDirectory, dars: dict, control: dict) -> dict:
    """Scores of three networks and class shares, as in `demo.json`.

    The networks are "labeled_only" (DARS after round 0), "control" and "dars" (after the last round). Mean IoU and IoU
    are of plain decisions; "result" has the mean IoU of those that are used, and whether they are aligned. The shares
    are those of the unlabeled scenes in the last round: their truth, the predictions and the pseudo labels.
    """
    last = dars["rounds"][-1]["round"]
    labels = run.label_set(last)
    truth = np.array(json.loads((run.round(last) / "pseudo_scores.json").read_text())["truth"])
    counts = {"truth": truth, "predicted": labels.histogram.predicted, "pseudo": labels.kept}
    networks = {
        "labeled_only": dars["rounds"][0],
        "control": control["rounds"][-1],
        "dars": dars["rounds"][-1],
    }
    return {
        "mean_iou": {name: scores["mean_iou"] for name, scores in networks.items()},
        "iou": {name: scores["iou"] for name, scores in networks.items()},
        "result": {name: _result(scores) for name, scores in networks.items()},
        "share": {
            name: dict(zip(dars["classes"], (count / max(1, count.sum())).tolist(), strict=True))
            for name, count in counts.items()
        },
    }


def _result(scores: dict) -> dict:
    """The mean IoU of the decisions that are used after a round, and whether these are aligned."""
    aligned = scores.get("aligned", {"used": False})
    used = bool(aligned["used"])
    return {"aligned": used, "mean_iou": aligned["mean_iou"] if used else scores["mean_iou"]}


def _named_result(result: dict) -> str:
    return f"{result['mean_iou']:.4f} ({'aligned' if result['aligned'] else 'plain'})"


def _table(result: dict) -> Table:
    table = Table(
        title="IoU of plain decisions on the validation scenes, class shares of the unlabeled scenes in the last round"
    )
    table.add_column("class")
    for title in ("labeled only", "control", "DARS", "truth", "predicted", "pseudo labels"):
        table.add_column(title, justify="right")
    for name in result["share"]["truth"]:
        ious = (result["iou"][network][name] for network in ("labeled_only", "control", "dars"))
        shares = (result["share"][kind][name] for kind in ("truth", "predicted", "pseudo"))
        cells = ["undefined" if iou is None else f"{iou:.3f}" for iou in ious]
        table.add_row(name, *cells, *(f"{share:.3%}" for share in shares))
    table.add_section()
    networks = ("labeled_only", "control", "dars")
    table.add_row("mean", *(f"{result['mean_iou'][network]:.3f}" for network in networks))
    if any(result["result"][network]["aligned"] for network in networks):
        table.add_row(
            "mean of the result", *(_named_result(result["result"][network]) for network in networks)
        )
    return table


def draw_picture(recipe: Recipe, folder: Path) -> np.ndarray:
    """A table of pictures as BGR uint8 [h, w, 3].

    Each row is a scene: image, truth, prediction of round 0, pseudo labels (white: no label), prediction of DARS.
    """
    manifest = manifest_of(recipe)
    run = RunDirectory(folder / "dars")
    last = len(recipe.rounds) - 1
    palette, protocol = manifest.classes.palette(), evaluation_protocol(recipe)
    first, final = load_trained(run.root, 0).network, load_trained(run.root, last).network
    samples = without(manifest.unlabeled, read_excluded(run, last))[:PICTURE_ROWS]
    pseudo = run.label_set(last).samples(samples)
    rows = []
    for sample, labeled in zip(samples, pseudo, strict=True):
        assert sample.label is not None and labeled.label is not None
        image = read_image(sample.image)
        maps = [
            read_label(sample.label),
            predict(first, image, protocol).classes,
            read_label(labeled.label),
            predict(final, image, protocol).classes,
        ]
        rows.append([image, *(palette[label] for label in maps)])
    titles = ("image", "truth (never used)", "labeled only", f"pseudo labels, round {last}", "DARS")
    legend = list(zip(manifest.classes.names, manifest.classes.colors, strict=True))
    return sheet(rows, titles, legend)


def sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    *,
    gap: int = 6,
    line: int = 26,
) -> np.ndarray:
    """Pictures in a grid with titles and a legend, as BGR uint8 [h, w, 3].

    Args:
        rows: RGB pictures of one size.
        titles: one for each column.
        legend: class names and colors.
        gap, line: pixels between pictures, and of a line of text.
    """
    height, width = rows[0][0].shape[:2]
    total_w = len(titles) * (width + gap) + gap
    per_line = max(1, total_w // 130)
    legend_lines = -(-len(legend) // per_line)
    canvas = np.full(
        (line + len(rows) * (height + gap) + legend_lines * line + gap, total_w, 3), 255, np.uint8
    )

    def write(text: str, x: int, y: int) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)

    for column, title in enumerate(titles):
        write(title, gap + column * (width + gap), line - 9)
        for index, row in enumerate(rows):
            top, left = line + index * (height + gap), gap + column * (width + gap)
            canvas[top : top + height, left : left + width] = row[column]
    for index, (name, color) in enumerate(legend):
        x = gap + index % per_line * 130
        y = line + len(rows) * (height + gap) + index // per_line * line
        cv2.rectangle(canvas, (x, y + 6), (x + 14, y + 20), color, cv2.FILLED)
        write(name, x + 20, y + 18)
    return cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR)
