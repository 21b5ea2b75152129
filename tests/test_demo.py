"""`darseg demo` with fewer scenes and steps; every figure it prints is checked against the files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console

from darseg.config.text import load_recipe
from darseg.data.labels import read_label
from darseg.demo import demo as module
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import RunError
from wording import refused

pytestmark = pytest.mark.usefixtures("small_network")

LABELED, UNLABELED, VALIDATION = 4, 6, 3


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """Folder, result and printed text."""
    out, text = tmp_path_factory.mktemp("demo"), module.recipe_text()
    short_text, changed = re.subn(r"steps: \d+", "steps: 3", text)
    assert changed == 2
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LABELED", "UNLABELED", "VALIDATION"):
            patch.setattr(module, name, globals()[name])
        patch.setattr(module, "recipe_text", lambda: short_text)
        console = Console(file=io.StringIO(), width=140)
        result = module.run_demo(out, 5, console)
    return out, result, console.file.getvalue()


def test_dars_and_control_get_the_same_number_of_steps(small_demo) -> None:
    out, result, _ = small_demo
    dars, control = (
        json.loads((out / "seed_5" / n / "summary.json").read_text()) for n in ("dars", "control")
    )
    assert [round_["steps"] for round_ in dars["rounds"]] == [3, 3]
    assert [round_["steps"] for round_ in control["rounds"]] == [6] and result["steps"] == 6
    assert result["mean_iou"] == {
        "labeled_only": dars["rounds"][0]["mean_iou"],
        "control": control["rounds"][0]["mean_iou"],
        "dars": dars["rounds"][1]["mean_iou"],
    }
    assert json.loads((out / "seed_5" / "demo.json").read_text()) == result


def test_the_result_of_a_network_is_said_next_to_its_plain_score(small_demo) -> None:
    _, result, _ = small_demo
    scores = {"mean_iou": 0.3, "iou": {}, "aligned": {"used": True, "mean_iou": 0.4}}
    result = result | {"result": dict.fromkeys(result["result"], module._result(scores))}
    console = Console(file=io.StringIO(), width=140)
    console.print(module._table(result))
    row = next(line for line in console.file.getvalue().splitlines() if "mean of the result" in line)
    assert row.count("0.4000 (aligned)") == 3
    unused = scores | {"aligned": {"used": False, "why": "no"}}
    assert module._result(unused) == {"aligned": False, "mean_iou": 0.3} == module._result({"mean_iou": 0.3})


def test_shares_are_counted_from_the_files(small_demo) -> None:
    out, result, _ = small_demo
    names = (out / "data" / "unlabeled.txt").read_text().split()
    for kind, folder in (("truth", out / "data" / "labels"), ("pseudo", out / "seed_5/dars/round_1/labels")):
        counts = np.zeros(len(SCENE_CLASSES))
        for name in names:
            counts += np.bincount(read_label(folder / f"{name}.png").ravel(), minlength=256)[: len(counts)]
        assert list(result["share"][kind].values()) == pytest.approx(counts / counts.sum())
    assert sum(result["share"]["predicted"].values()) == pytest.approx(1)


def test_the_table_shows_every_class_and_figure(small_demo) -> None:
    _, result, printed = small_demo
    for name in SCENE_CLASSES.names:
        row = next(line for line in printed.splitlines() if f" {name} " in line and "%" in line)
        for network in ("labeled_only", "control", "dars"):
            iou = result["iou"][network][name]
            assert ("undefined" if iou is None else f"{iou:.3f}") in row
        for kind in ("truth", "predicted", "pseudo"):
            assert f"{result['share'][kind][name]:.3%}" in row
    assert all(f"{value:.4f}" in printed for value in result["mean_iou"].values())


def test_the_picture_has_a_row_for_each_scene(small_demo) -> None:
    out, _, _ = small_demo
    picture = cv2.imread(str(out / "seed_5" / "demo.png"))
    assert picture.shape[0] > module.PICTURE_ROWS * 128 and picture.shape[1] > 5 * 192


def test_the_demo_recipe_is_the_one_that_the_docs_describe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(module.recipe_text())
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [round_.labeling_ratio for round_ in recipe.rounds] == [None, 0.8]
    assert tuple(recipe.data.classes) == SCENE_CLASSES.names and recipe.training.precision == "fp32"


@pytest.mark.parametrize("name", ["recipe.yaml", "data/labeled.txt", "data"])
def test_files_that_are_not_the_demos_stay(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with refused(RunError, str(tmp_path / name.partition("/")[0]), "--out"):
        module.run_demo(tmp_path)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["mine"]
