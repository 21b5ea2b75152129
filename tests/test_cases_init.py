"""Folders that users had trouble with elsewhere: init proposes a recipe that check accepts and that trains."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from darseg.annotate.rasterize import rasterize_folder
from darseg.config.text import load_recipe
from darseg.init import fit
from darseg.init.propose import propose_recipe
from darseg.run.build import classes_of, manifest_of
from darseg.run.check import check
from darseg.run.rounds import train

SHARED = Path(os.environ.get("DARSEG_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CASES = SHARED / "cases/data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="the drawings of cases are not part of the repository"),
]

TINY = (
    *("network.backbone=resnet18_half", "network.head_channels=16", "network.weights=none"),
    *("training.crop=33", "training.batch=2", "training.workers=1", "labeling.window=33"),
    "rounds=[{steps: 2}]",
)
OWN = ("background", "leaf", "mildew")


@dataclass(frozen=True)
class Case:
    """A folder below a drawn case, and the recipe that should come out.

    Attributes:
        classes: the number of classes, or names among them.
        images: number of labeled, unlabeled, validation and test images.
        annotations: files to draw first, with a background.
    """

    drawing: str
    folder: str
    images: tuple[int, int, int, int]
    classes: tuple[str, ...] | int
    annotations: tuple[str, ...] = ()


TRAIN, VALID, TEST = (f"export/{part}/_annotations.coco.json" for part in ("train", "valid", "test"))
RECIPES = (
    Case("00_base", "set", (4, 4, 2, 0), 3),
    Case("04_own_in_voc", "voc_palette", (6, 2, 2, 0), OWN),
    Case("04_own_in_voc", "voc_rgb", (6, 2, 2, 0), OWN),
    Case("04_own_in_voc", "city", (6, 0, 2, 0), 3),
    Case("05_names", "unicode", (6, 0, 2, 0), 2),
    Case("05_names", "suffixed", (6, 0, 2, 0), 2),
    Case("05_names", "lettercase", (6, 0, 2, 0), 2),
    Case("05_names", "lonely", (3, 1, 1, 0), 2),
    Case("12_foreign", "gif", (2, 1, 1, 0), 2),
    Case("21_beside", "export", (8, 0, 3, 2), ("background", "crack", "rust", "spall")),
    Case("21_beside", "export_and_one", (8, 1, 3, 2), ("background", "crack", "rust", "spall")),
    Case("23_mixed", "gif_some", (4, 0, 2, 0), 2),
    Case("23_mixed", "gif_all", (4, 0, 2, 0), 2),
    Case("23_mixed", "photos", (3, 0, 1, 0), 2),
    Case("24_near_colors", "potsdam", (4, 1, 2, 0), 6),
    Case("25_longname", "photos", (3, 3, 1, 0), 2),
    Case("28_alphalabel", "rgba", (4, 0, 2, 0), 2),
    Case("28_alphalabel", "soft", (4, 0, 2, 0), 2),
    Case("29_leak", "set", (6, 0, 3, 0), 2),
    Case("32_roboflow_coco", "export", (6, 0, 2, 2), ("crack", "rust"), annotations=(TRAIN, VALID, TEST)),
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All drawings, a folder each."""
    root = tmp_path_factory.mktemp("cases")
    for name in dict.fromkeys(case.drawing for case in RECIPES):
        subprocess.run([sys.executable, CASES / name / "make.py", root / name], check=True, cwd=root)
    return root


@pytest.mark.parametrize("case", RECIPES, ids=lambda case: f"{case.drawing}-{case.folder}")
def test_a_proposed_recipe_passes_check_and_trains(
    case: Case, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "step_seconds", lambda *_: 1.0)
    root = drawn / case.drawing
    for name in case.annotations:
        rasterize_folder(root / name, (root / name).parent / "labels", background="background")
    console = Console(file=io.StringIO(), width=400)
    propose_recipe(root / case.folder, tmp_path / "recipe.yaml", console=console)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert tuple(len(samples) for samples in manifest_of(recipe).roles().values()) == case.images
    names = classes_of(recipe).names
    if isinstance(case.classes, int):
        assert len(names) == case.classes
    else:
        assert [name for name in names if name in case.classes] == list(case.classes)
    assert not check(recipe, console).faults
    train(load_recipe(tmp_path / "recipe.yaml", TINY), tmp_path / "run", console=console)
    assert (tmp_path / "run/summary.json").is_file()
