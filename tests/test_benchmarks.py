"""The benchmark of GPUs runs on any machine in a tiny version: all rows are there, and all figures are numbers."""

from __future__ import annotations

import colorsys
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from conftest import REPOSITORY, thorough

pytest.importorskip("timm")

FIGURES = {
    "training": {
        "bare_steps_per_second",
        "steps_per_second",
        "images_per_second",
        "ratio",
        "ratio_least",
        "ratio_most",
        "bare_memory_mb",
        "memory_mb",
        "bare_processor_seconds",
        "processor_seconds",
        "waiting",
    },
    "passes": {"windows", "paces"},
    "labeling": {"bare_images_per_second", "images_per_second", "ratio", "ratio_least", "ratio_most"},
    "evaluation": {"bare_images_per_second", "images_per_second", "ratio", "ratio_least", "ratio_most"},
    "profile": set(),
}

WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "zstandard"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


def run(out: Path, *options: str, program: tuple[str, ...] = ()) -> dict[str, Any]:
    """The file that a dry run writes; it also has to print each row."""
    command = [sys.executable, *program, "benchmarks/gpu.py", "--dry", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    for row in content["rows"]:
        assert f"| {row['name']} |" in done.stdout
    return content


@pytest.mark.slow
@thorough  # 28 rows with 10 networks; `make gpu DRY=1` runs them too
def test_all_rows_are_measured_in_a_dry_run(tmp_path: Path) -> None:
    content = run(tmp_path / "gpu.json", "--seconds", "600")
    assert content["not_started"] == [] and len(content["rows"]) == 28
    for row in content["rows"]:
        assert "failed" not in row, row
        assert all(map(math.isfinite, numbers(row))), row
        assert row.keys() >= FIGURES[row["table"]]
    profiles = {row["name"].partition(":")[0]: row for row in content["rows"] if row["table"] == "profile"}
    assert all(profiles["step"][side]["cpu_ms"] > 0 for side in ("bare", "darseg"))
    assert profiles["labeling"]["stages_ms"].keys() >= {"read", "forward passes and sums", "decide", "write"}


def test_rows_that_fail_say_why_and_the_others_go_on(tmp_path: Path) -> None:
    # Without these packages training can be measured, but not labeling.
    names = ["EfficientNet-Lite0 PSPNet, images 65x65, fp32", "EfficientNet-Lite0 PSPNet, 193, fp32"]
    only = ["labeling: " + names[0], "training: " + names[1]]
    content = run(tmp_path / "gpu.json", "--only", *only, program=("-c", WITHOUT))
    rows = {row["name"]: row for row in content["rows"]}
    labeling, training = (rows[name] for name in names)
    assert "zstandard is not installed" in labeling["failed"]
    assert "failed" not in training and training["ratio"] > 0


def test_no_row_begins_after_the_time_is_up(tmp_path: Path) -> None:
    content = run(tmp_path / "gpu.json", "--only", "labeling", "--seconds", "1e-9")
    assert content["rows"] == [] and len(content["not_started"]) == 6


def test_the_tensor_operations_that_views_are_compared_with() -> None:
    """Another hue as colorsys has it, a blur as OpenCV has it, and a command that prints its table."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from views import blurred, turned

    images, turns = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), (0.1, -0.2)
    found = turned(images, torch.tensor(turns)).permute(0, 2, 3, 1).reshape(2, -1, 3)
    for turn, pixels, others in zip(turns, images.permute(0, 2, 3, 1).reshape(2, -1, 3), found, strict=True):
        for pixel, other in zip(pixels.tolist(), others.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            assert other == pytest.approx(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), abs=1e-5)
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    smooth = blurred(image, torch.tensor([1.3]))[0].permute(1, 2, 0).numpy()
    expected = cv2.GaussianBlur(image[0].permute(1, 2, 0).numpy(), (13, 13), 1.3)
    assert np.allclose(smooth, expected, atol=1e-5)
    command = [sys.executable, "benchmarks/views.py", "--sides", "33", "--turns", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "| 33x33 |" in done.stdout, done.stderr
