"""Pages of large runs: seconds and bytes of `darseg report`, and seconds of the viewer's answers.

    .venv/bin/python benchmarks/reports.py [--classes 150] [--rounds 12] [--images 0]

The run folder is drawn, not trained: scores, thresholds, histograms and facts of images have the sizes of a real run.
With --images N there is also a data set of N unlabeled images (links to a few small ones) and their label maps, and the
viewer is asked as its page asks. One thread; the second of two pages is timed, so imports do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from drawn import LINKS, draw_data
from PIL import Image
from starlette.testclient import TestClient

from darseg.config.text import dump_recipe, load_recipe
from darseg.data.prediction import FLOAT16
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.thresholds import choose_cbst
from darseg.report.overview import write_report
from darseg.run.browse import open_round
from darseg.run.directory import FORMAT, RunDirectory, write_json
from darseg.run.records import OUTPUTS
from darseg.training.scores import Scores
from darseg.view.app import viewer_app
from darseg.view.guard import draw_token

SIDE = 64
"""Pixels of a drawn image's side."""


def draw_run(folder: Path, classes: int, rounds: int, images: int) -> Path:
    """A run folder with data set, finished, and drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    names = [f"class {k:03d}" for k in range(classes)]
    ids = draw_data(folder / "data", classes, max(images, 8), rng, side=SIDE)
    recipe = {
        "data": {
            "root": str(folder / "data"),
            "classes": names,
            **{role: f"{role}.txt" for role in ("labeled", "unlabeled", "validation")},
        },
        "network": {"backbone": "resnet18_half", "weights": "none", "output_stride": 16, "head_channels": 8},
        "training": {"crop": 33, "batch": 4},
        "rounds": [{"steps": 1000}, *({"steps": 1000, "labeling_ratio": 0.5} for _ in range(rounds - 1))],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = RunDirectory(folder / "run")
    run.root.mkdir()
    run.recipe.write_text(dump_recipe(load_recipe(folder / "recipe.yaml")))
    run.format.write_text(json.dumps({"format": FORMAT}))
    for path in (run.environment, run.data):
        write_json(path, {"drawn": "yes"})
    events = [{"event": "started", "time": 1.7e9, "weights": "drawn"}]
    for index in range(rounds):
        draw_round(run, index, names=names, ids=ids, rng=rng)
        events += [
            {"event": "step", "round": index, "step": step, "learning_rate": 0.01, "loss_labeled": 1.0}
            for step in range(0, 1000, 10)
        ]
    run.journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run.root


def draw_round(
    run: RunDirectory, index: int, *, names: list[str], ids: list[str], rng: np.random.Generator
) -> None:
    """The files of a finished round."""
    folder, classes = run.round(index), len(names)
    folder.mkdir()
    confusion = rng.poisson(30, (classes, classes)) + np.diag(rng.integers(0, 20_000, classes))
    scores = Scores(confusion.astype(np.int64)).to_json(names)
    write_json(folder / "scores.json", scores | {"protocol": "drawn, fp32"})
    if index:
        codes = rng.integers(FLOAT16.codes // 2, FLOAT16.codes, (classes, 4000))
        counts = np.stack([np.bincount(row, minlength=FLOAT16.codes) for row in codes]).astype(np.int64)
        histogram = ConfidenceHistogram(counts)
        chosen = choose_cbst(histogram, 0.5)
        (folder / "histogram.npz").write_bytes(histogram.to_bytes())
        write_json(folder / "thresholds.json", chosen.to_json() | {"kept": chosen.accepted.tolist()})
        write_json(folder / "pseudo_scores.json", scores | {"truth": confusion.sum(1).tolist()})
        draw_facts(run, index, ids=ids, classes=classes, rng=rng)
    for step in ("label", "train", "evaluate")[not index :]:
        outputs = dict.fromkeys(OUTPUTS[step][0], "0" * 64)
        record = {"step": step, "inputs": {}, "outputs": outputs, "seconds": 1.0, "facts": {"steps": 1000}}
        write_json(run.record_path(index, step), record)


def draw_facts(
    run: RunDirectory, index: int, *, ids: list[str], classes: int, rng: np.random.Generator
) -> None:
    """`images.json` and the label maps."""
    facts, kept = {}, np.zeros(classes, int)
    for at, name in enumerate(ids):
        path = run.labels(index) / f"{name}.png"
        if at % LINKS == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            label = rng.integers(0, classes, (SIDE, SIDE), np.uint8)
            Image.fromarray(label).save(path)
            kept, first = np.bincount(label.ravel(), minlength=classes), path
        else:
            os.link(first, path)
        facts[name] = {"confidence": rng.random(), "predicted": kept.tolist(), "kept": kept.tolist()}
    write_json(run.round(index) / "images.json", facts)


def timed(call: Callable[[], Any]) -> tuple[str, Any]:
    """The seconds that a call took, as a text, and its value."""
    start, busy = time.monotonic(), time.process_time()
    value = call()
    return f"{time.monotonic() - start:.2f} s ({time.process_time() - busy:.2f} s of the processor)", value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="draw the run into this folder and keep it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.keep or Path(made)
        folder.mkdir(exist_ok=True)
        run = folder / "run"
        if not run.exists():
            draw_run(folder, given.classes, given.rounds, given.images)
        write_report(run)
        seconds, path = timed(lambda: write_report(run))
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        print(f"report of {given.classes} classes, {given.rounds} rounds: {seconds}, {size}")
        if given.images:
            ask_viewer(run)


def ask_viewer(run: Path) -> None:
    """Start the viewer and ask it as its page does."""
    token = draw_token()
    seconds, round_ = timed(lambda: open_round(run))
    print(f"view, {len(round_.samples):,} images: opened in {seconds}")
    headers = {"authorization": f"token {token}"}
    with TestClient(viewer_app(round_, token), base_url="http://127.0.0.1:8765", headers=headers) as client:

        def read_all() -> None:
            while (about := client.get("/api/run").json())["read"] < about["images"]:
                time.sleep(0.02)

        print(f"  facts of all images: {timed(read_all)[0]}")
        for query in (
            "limit=100",
            "limit=100&sort=coverage",
            "limit=100&class=3&sort=share&down=1",
            "limit=100&text=99",
        ):
            seconds, answer = timed(partial(client.get, f"/api/images?{query}"))
            print(f"  /api/images?{query}: {seconds}, {len(answer.content) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
