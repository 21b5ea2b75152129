"""What labeling refuses: damaged files, settings out of range, changed inputs, folders inside each other."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import forks
from conftest import recipe_dict
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.prediction import FINE
from darseg.errors import DataError, RecipeError, RunError
from darseg.model.decide import decide
from darseg.model.weights import save_network
from darseg.run.build import spec_of
from darseg.run.class_counts import read_class_counts
from darseg.run.label import label_folder
from darseg.run.redistribute import read_scores
from test_labeling import ARRAYS, COUNTS, NAMES, RATIO, file_of, redistribute_quietly, save
from wording import refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", ARRAYS)


def test_two_processes_exit_with_zero(source: Path, tmp_path: Path) -> None:
    """If the process group were not closed, its threads would sometimes abort the interpreter as it exits."""
    (tmp_path / "c.json").write_text(json.dumps(COUNTS))
    for index in range(3):
        result = forks.torchrun("-m", "darseg", "redistribute", source, tmp_path / f"out{index}",
                                "--class-counts", tmp_path / "c.json", "--labeling-ratio", RATIO)  # fmt: skip
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_data_errors(tmp_path: Path, suffix: str) -> None:
    """Whichever of their dozen kinds of errors the readers raise for damaged bytes."""
    path = tmp_path / f"x{suffix}"
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    np.save(path, values) if suffix == ".npy" else np.savez_compressed(path, values)
    data, other_errors = path.read_bytes(), set()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        try:
            read_scores(path)
        except DataError:
            pass
        except Exception as error:
            other_errors.add(type(error).__name__)
    assert not other_errors


def test_an_archive_of_something_else_is_a_data_error(source: Path, tmp_path: Path) -> None:
    """numpy returns the bytes of a member that is not an array."""
    with zipfile.ZipFile(file_of(source, NAMES[1]), "w") as archive:
        archive.writestr("notes.txt", "no array")
    with refused(DataError, str(file_of(source, NAMES[1])), "numpy.save"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def test_the_first_file_may_be_damaged(source: Path, tmp_path: Path) -> None:
    """The disk space needed is estimated from the first file that can be read."""
    damaged = [file_of(source, name) for name in (NAMES[0], NAMES[5])]
    for path in damaged:
        path.write_bytes(b"")
    with refused(DataError, "2 file(s)", *map(str, damaged)):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


@pytest.mark.parametrize(
    ("ratio", "how"), [(1.5, {}), (0, {}), (None, {"method": "global", "threshold": 2.0})]
)
def test_ratio_and_threshold_are_checked_first(source: Path, tmp_path: Path, ratio, how) -> None:
    """Before anything is predicted, or a record written that later calls must match."""
    with pytest.raises(RecipeError):
        redistribute_quietly(source, tmp_path / "out", COUNTS, ratio, **how)
    assert not (tmp_path / "out").exists()


def test_new_predictions_of_the_same_size_are_noticed(source: Path, tmp_path: Path) -> None:
    """Arrays of equal shape make files of equal size, so the time of the last change counts."""
    redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)
    for name, array in ARRAYS.items():
        save(source, {name: array[::-1]}) if file_of(source, name).suffix == ".npy" else None
    with refused(RunError, str(tmp_path / "out"), "inputs", "redistribution.json"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def test_the_output_may_not_lie_in_the_input(source: Path) -> None:
    """Otherwise its files would be read as input the next time."""
    with refused(RunError, str(source / "out")):
        redistribute_quietly(source, source / "out", COUNTS, RATIO)
    assert not (source / "out").exists()


def test_the_fine_scale_accepts_probabilities_just_below_zero() -> None:
    """As float16 does; they are within the tolerance."""
    scores = torch.tensor([1.0, -1e-6]).reshape(2, 1, 1)
    assert decide(scores, FINE, True).confidence[0, 0] == pytest.approx(1)


def test_infinite_counts_are_refused(tmp_path: Path) -> None:
    """JSON has no infinity, but Python reads 1e999 as one."""
    (tmp_path / "c.json").write_text("[1e999, 1]")
    with refused(DataError, str(tmp_path / "c.json"), "[9000, 120]"):
        read_class_counts(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize("name", ["redistribution.json", ".begun.json"])
def test_a_damaged_or_foreign_record_is_refused(source: Path, tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with refused(RunError, str(tmp_path / "out" / name)):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


@pytest.mark.parametrize(
    "change",
    [
        {"kept": "x"},
        {"kept": [1.5, 2]},
        {"predicted": [10**30, 0]},
        {"threshold": [[], {}]},
        {"classes": [1, 2]},
        {"classes": "ab"},
        {"classes": ["a"]},
        {"images": "\x1b[2J"},
        {"alignment": {}},
    ],
    ids=str,
)
def test_a_finished_result_is_checked_before_it_is_printed(
    source: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)
    path = tmp_path / "out" / "redistribution.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(RunError, str(path), "damaged"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def save_untrained(data: Path, folder: Path) -> Recipe:
    """Write `tiny.yaml` and the checkpoint `n.safetensors` of its network. Returns the recipe."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(data)))
    recipe = load_recipe(folder / "tiny.yaml")
    spec = spec_of(recipe)
    save_network(spec.build(), folder / "n.safetensors", spec)
    return recipe


def test_a_recipe_of_other_classes_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    """Otherwise a class that the network does not have would get a share of the labels."""
    recipe = save_untrained(tiny_data, tmp_path)
    names = [*recipe.data.classes, "unicorn"]
    more = load_recipe(tmp_path / "tiny.yaml", [f"data.classes={names}"])
    with refused(DataError, "n.safetensors", f"{len(names) - 1} classes", str(len(names))):
        label_folder(tmp_path / "n.safetensors", tiny_data / "images" / "u", tmp_path / "out", recipe=more)


def test_the_first_image_may_be_damaged(tiny_data: Path, tmp_path: Path) -> None:
    """The disk space needed is estimated from the first image that can be read."""
    recipe = save_untrained(tiny_data, tmp_path)
    images = shutil.copytree(tiny_data / "images" / "u", tmp_path / "images")
    for name in ("07.png", "09.png"):
        (images / name).write_bytes(b"")
    with refused(DataError, "2 file(s)", str(images / "07.png"), str(images / "09.png")):
        label_folder(tmp_path / "n.safetensors", images, tmp_path / "out", recipe=recipe)


def test_all_faults_of_settings_are_in_one_error(source: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "'exact'", "'some'", "labeling_ratio"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, 1.5, confidence="exact", sampling="some")
