"""Faults of labeling in a folder: damaged files, settings out of range, stale inputs, folders in each other."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from darseg.data.prediction import FINE
from darseg.errors import DarsegError, DataError, RecipeError, RunError
from darseg.model.decide import decide
from darseg.run.label import label_folder, read_class_counts
from darseg.run.redistribute import read_scores
from test_interrupted import torchrun
from test_labeling import ARRAYS, COUNTS, NAMES, RATIO, file_of, redistribute_quietly, save


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source", ARRAYS)


def test_processes_end_well(source: Path, tmp_path: Path) -> None:
    """Threads of a group that is left behind would abort some of them."""
    (tmp_path / "c.json").write_text(json.dumps(COUNTS))
    for index in range(3):
        result = torchrun("-m", "darseg", "redistribute", source, tmp_path / f"out{index}",
                          "--class-counts", tmp_path / "c.json", "--labeling-ratio", RATIO)  # fmt: skip
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_data_errors(tmp_path: Path, suffix: str) -> None:
    """Readers raise a dozen kinds of errors for damaged bytes."""
    path = tmp_path / f"x{suffix}"
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    np.save(path, values) if suffix == ".npy" else np.savez_compressed(path, values)
    data, others = path.read_bytes(), set()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        try:
            read_scores(path)
        except DataError:
            pass
        except Exception as error:
            others.add(type(error).__name__)
    assert not others


def test_an_archive_of_something_else_is_a_data_error(source: Path, tmp_path: Path) -> None:
    """Its member is no array: numpy gives bytes."""
    with zipfile.ZipFile(file_of(source, NAMES[1]), "w") as archive:
        archive.writestr("notes.txt", "no array")
    with pytest.raises(DataError):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def test_the_first_file_may_be_bad_too(source: Path, tmp_path: Path) -> None:
    """The disk is estimated from the first that can be read."""
    for name in (NAMES[0], NAMES[5]):
        file_of(source, name).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 file\(s\) cannot be used"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


@pytest.mark.parametrize(
    ("ratio", "how"), [(1.5, {}), (0, {}), (None, {"method": "global", "threshold": 2.0})]
)
def test_ratios_are_checked_before_the_work(source: Path, tmp_path: Path, ratio, how) -> None:
    """Before anything is predicted and the folder bound to them."""
    with pytest.raises(RecipeError):
        redistribute_quietly(source, tmp_path / "out", COUNTS, ratio, **how)
    assert not (tmp_path / "out").exists()


def test_new_predictions_of_the_same_size_are_noticed(source: Path, tmp_path: Path) -> None:
    """Arrays of one shape have one size: the time of their change tells them apart."""
    redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)
    for name, array in ARRAYS.items():
        save(source, {name: array[::-1]}) if file_of(source, name).suffix == ".npy" else None
    with pytest.raises(DarsegError):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def test_the_output_may_not_lie_in_the_input(source: Path) -> None:
    """What is written there would be read as input the next time."""
    with pytest.raises(RunError, match="choose a folder elsewhere"):
        redistribute_quietly(source, source / "out", COUNTS, RATIO)
    assert not (source / "out").exists()


def test_probabilities_just_below_zero_are_taken_by_fine() -> None:
    """Within the tolerance, and taken by float16."""
    scores = torch.tensor([1.0, -1e-6]).reshape(2, 1, 1)
    assert decide(scores, FINE, True).confidence[0, 0] == pytest.approx(1)


def test_infinite_counts_are_refused(tmp_path: Path) -> None:
    """JSON has no infinity, but 1e999 is read as one."""
    (tmp_path / "c.json").write_text("[1e999, 1]")
    with pytest.raises(DataError):
        read_class_counts(tmp_path / "c.json")


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize("name", ["redistribution.json", ".begun.json"])
def test_a_damaged_or_foreign_record_is_refused(source: Path, tmp_path: Path, text: str, name: str) -> None:
    """Or another program's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(DarsegError):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)


def test_a_recipe_of_other_classes_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    """A class the network does not have would get a share of the prior."""
    import yaml

    from conftest import recipe_dict
    from darseg.config.text import load_recipe
    from darseg.model.weights import save_network
    from darseg.run.build import spec_of

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    recipe = load_recipe(tmp_path / "tiny.yaml")
    spec = spec_of(recipe)
    save_network(spec.build(), tmp_path / "n.safetensors", spec)
    names = [*recipe.data.classes, "unicorn"]
    more = load_recipe(tmp_path / "tiny.yaml", [f"data.classes={names}"])
    with pytest.raises(DarsegError):
        label_folder(tmp_path / "n.safetensors", tiny_data / "images" / "u", tmp_path / "out", recipe=more)


def test_the_first_image_may_be_bad_too(tiny_data: Path, tmp_path: Path) -> None:
    """The same with images."""
    import yaml

    from conftest import recipe_dict
    from darseg.config.text import load_recipe
    from darseg.model.weights import save_network
    from darseg.run.build import spec_of

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    recipe = load_recipe(tmp_path / "tiny.yaml")
    spec = spec_of(recipe)
    save_network(spec.build(), tmp_path / "n.safetensors", spec)
    images = shutil.copytree(tiny_data / "images" / "u", tmp_path / "images")
    for name in ("07.png", "09.png"):
        (images / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"2 file\(s\) cannot be used"):
        label_folder(tmp_path / "n.safetensors", images, tmp_path / "out", recipe=recipe)


def test_all_wrong_settings_in_one_error(source: Path, tmp_path: Path) -> None:
    """The scale and the range of the ratio among them."""
    with pytest.raises(RecipeError, match=r"(?s)exact.*sampling 'some'|sampling 'some'.*exact"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, confidence="exact", sampling="some")
