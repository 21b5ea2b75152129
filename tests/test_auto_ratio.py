"""Rounds with labeling_ratio: auto: what they leave, kills, two processes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import forks
from conftest import write_png
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.prediction import FLOAT16, Prediction
from darseg.demo.scenes import draw_scene
from darseg.errors import RecipeError
from darseg.model.decide import decide
from darseg.model.predict import predict_for_labeling, scores_for_labeling
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.precision import HeldOutBuilder, choose_by_precision
from darseg.report.overview import write_report
from darseg.run.build import labeling_protocol, load_to_predict
from darseg.run.check import plan
from darseg.run.directory import RunDirectory
from darseg.run.label import label_folder
from darseg.run.rounds import train
from test_run import kill_and_finish, outcome, warnings_of
from wording import refused, says

QUIET = Console(quiet=True)
CLASSES = ("sky", "road", "building", "vegetation")
COUNTS = {"validation": 14, "labeled": 3, "unlabeled": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 33 x 49 pixels, fourteen of them for validation."""
    return draw_roles(tmp_path_factory.mktemp("scenes"), COUNTS)


def draw_roles(root: Path, counts: Mapping[str, int]) -> Path:
    """Draw so many scenes of 33 x 49 pixels for each role, with a list of them; returns the folder."""
    first = 0
    for role, count in counts.items():
        names = [f"{index:02d}" for index in range(first, first + count)]
        for name in names:
            image, label = draw_scene(7, int(name), (65, 97))
            write_png(root / "images" / role / f"{name}.png", image[::2, ::2])
            write_png(root / "labels" / role / f"{name}.png", label[::2, ::2])
        (root / f"{role}.txt").write_text("".join(f"{role}/{name}\n" for name in names))
        first += count
    return root


def values_of(data: Path, **labeling: Any) -> dict[str, Any]:
    """A network that learns a little, and one round by its labels."""
    return {
        "seed": 3,
        "threads": 1,
        "data": {
            "root": str(data),
            "classes": list(CLASSES),
            "label_values": {0: "sky", 1: "road", 3: "building", 4: "vegetation", "other": "ignore"},
            **{role: f"{role}.txt" for role in COUNTS},
        },
        "network": {"backbone": "resnet18_half", "output_stride": 16, "head_channels": 16, "weights": "none"},
        "augmentation": {"rotate": 0.0},
        "training": {"crop": [33, 33], "batch": 4, "half_batch": 2, "workers": 1},
        "labeling": {"window": [33, 49], "target_precision": 0.5} | labeling,
        "result": {"align": "off"},
        "rounds": [{"steps": 25}, {"steps": 1, "labeling_ratio": "auto"}],
    }


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(load_recipe(write(folder / "auto.yaml", values_of(data))), folder / "run", console=QUIET)
    return folder / "run"


@pytest.fixture(scope="module")
def labeler(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of round 0 as a file."""
    path, plain = (
        tmp_path_factory.mktemp("labeler") / "plain.safetensors",
        run / "round_0" / "network.safetensors",
    )
    path.write_bytes(plain.read_bytes())
    return path


def read(run: Path, index: int = 1) -> dict[str, Any]:
    return json.loads((run / f"round_{index}" / "thresholds.json").read_text())


def predictions(run: Path, data: Path, role: str, weights: np.ndarray | None = None) -> dict[str, Prediction]:
    """Of the network of round 0, image by image."""
    torch.set_num_threads(1)
    recipe = load_recipe(run / "recipe.yaml")
    network, protocol = load_to_predict(run / "round_0" / "network.safetensors"), labeling_protocol(recipe)
    made = {}
    for path in sorted((data / "images" / role).iterdir()):
        image = read_image(path)
        if weights is None:
            made[path.stem] = predict_for_labeling(network, image, protocol)
        else:
            scores = scores_for_labeling(network, image, protocol, scale=FLOAT16)
            made[path.stem] = decide(torch.from_numpy(scores), weights=weights)
    return made


def truth(data: Path, role: str, name: str) -> np.ndarray:
    drawn, values = read_label(data / "labels" / role / f"{name}.png"), (0, 1, 3, 4)
    label = np.full_like(drawn, 255)
    for k, value in enumerate(values):
        label[drawn == value] = k
    return label


def check_thresholds(run: Path, data: Path, weights: np.ndarray | None = None) -> None:
    """thresholds.json says what the network's predictions of the validation images give."""
    labels, described = RunDirectory(run).label_set(1), read(run)
    builder = HeldOutBuilder(len(CLASSES))
    for name, prediction in predictions(run, data, "validation", weights).items():
        builder.add(prediction, truth(data, "validation", name))
    names = [path.stem for path in sorted((data / "images" / "labeled").iterdir())]
    counts = count_labels([(name, truth(data, "labeled", name)) for name in names], len(CLASSES))
    thresholds, expected = choose_by_precision(
        labels.histogram, ClassDistribution.from_counts(counts), builder.build(), target_precision=0.5
    )
    assert labels.thresholds == thresholds and labels.expected == expected
    assert described["expected_precision"] == expected.to_json()
    assert expected.held_out == COUNTS["validation"] and any(described["kept"])
    assert {*expected.basis} & {"class", "all classes"}
    assert all(share >= 0.5 for share in expected.expected if share is not None)


def test_thresholds_follow_the_networks_predictions_of_held_out_images(run: Path, data: Path) -> None:
    check_thresholds(run, data)
    record = json.loads((run / "round_1" / "label.json").read_text())
    assert {"labeled", "unlabeled", "validation", "network", "settings"} == {*record["inputs"]}
    assert 0.5 <= record["facts"]["expected_precision"] <= 1
    assert not (run / "round_1" / "held_out.npz").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert [entry["labeling_ratio"] for entry in summary["rounds"]] == [None, "auto"]


def test_the_page_compares_expected_and_measured_precision(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "page.html").read_text()
    for text in ("Expected precision", "measured precision", "Target 0.5, 14 held-out images", "own pixels"):
        assert text in page


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bytes(run: Path, data: Path, tmp_path: Path) -> None:
    """Round 0 is that of the other run."""
    recipe = write(tmp_path / "auto.yaml", values_of(data))
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("round_1", "summary.json"))
    kill_and_finish(recipe, tmp_path / "run", [("round_1/held_out.npz", 1), ("round_1/labels/**/*.png", 2)])
    assert outcome(tmp_path / "run") == outcome(run)
    assert not (tmp_path / "run" / "round_1" / "held_out.npz").exists()


def test_counts_that_are_kept_are_not_made_again_unless_damaged(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop between counting and labeling the held-out images are not predicted again."""
    from darseg.run import held_out, label_samples
    from darseg.run.steps import label as step

    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data)))
    train(recipe, tmp_path / "run", reuse=run, console=QUIET)
    folder, kept, counted = tmp_path / "run" / "round_1", [], []
    monkeypatch.setattr(step, "_tidy", lambda course, round_: None)
    add = held_out.HeldOutBuilder.add
    monkeypatch.setattr(
        held_out.HeldOutBuilder, "add", lambda builder, *image: (counted.append(1), add(builder, *image))[1]
    )
    choose = label_samples.choose_by_precision
    monkeypatch.setattr(
        label_samples,
        "choose_by_precision",
        lambda *values, **target: (kept.append(values[2]), choose(*values, **target))[1],
    )
    (folder / "label.json").unlink()  # with thresholds.json: everything is made again
    train(recipe, tmp_path / "run", console=QUIET)
    for damage in (b"damaged", None):
        for name in ("label.json", "thresholds.json"):
            (folder / name).unlink()
        if damage is not None:
            (folder / "held_out.npz").write_bytes(damage)
        train(recipe, tmp_path / "run", console=QUIET)
        assert outcome(tmp_path / "run") == outcome(run)
    assert len(counted) == 2 * COUNTS["validation"] and kept[0] == kept[1] == kept[2]
    warnings = [text for text in warnings_of(tmp_path / "run") if "held_out.npz" in text]
    assert len(warnings) == 1  # kept ones are taken without a word
    says(warnings[0], "round 1", "held_out.npz", "damaged", "predicted again")


def from_labeler(data: Path, labeler: Path, **labeling: Any) -> dict[str, Any]:
    rounds = [{"steps": 1, "labeling_ratio": "auto", "labels_from": str(labeler), "labels_window": [33, 49]}]
    return values_of(data, **labeling) | {"rounds": rounds}


@pytest.mark.slow
def test_a_labeler_and_two_processes_give_the_same_labels(
    run: Path, data: Path, labeler: Path, tmp_path: Path
) -> None:
    values = from_labeler(data, labeler)
    values["training"]["half_batch"] = 4
    recipe = write(tmp_path / "auto.yaml", values)
    result = forks.torchrun("-m", "darseg", "train", recipe, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    thresholds = read(tmp_path / "two", 0)
    assert thresholds["expected_precision"] == read(run)["expected_precision"]
    assert {name: thresholds[name] for name in ("code", "accepted", "wanted")} == {
        name: read(run)[name] for name in ("code", "accepted", "wanted")
    }


def test_aligned_decisions_are_measured_as_they_label(run: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data, align="decisions", bound=20.0)))
    train(recipe, tmp_path / "run", reuse=run, console=QUIET)
    alignment = RunDirectory(tmp_path / "run").label_set(1).alignment
    assert alignment is not None and alignment.converged
    check_thresholds(tmp_path / "run", data, alignment.factors)
    assert read(tmp_path / "run")["code"] != read(run)["code"]


# Keys, plan and refusals.


def test_the_plan_says_what_auto_does_and_costs(data: Path, tmp_path: Path, call) -> None:
    recipe = write(tmp_path / "auto.yaml", values_of(data))
    note = plan(load_recipe(recipe)).notes[0]
    says(note, "auto", "round 1", "0.5", "14 validation images", "4 unlabeled")
    code, printed, _ = call("plan", recipe)
    assert code == 0 and note in printed.replace("\n", " ")
    assert any(line.split()[:2] == ["1", "auto"] for line in printed.splitlines())
    best = plan(load_recipe(recipe, ["result.keep=best"])).notes[0]
    assert best.startswith(note)
    says(best, "result.keep: best", "same images", "optimistic")


def test_too_few_held_out_images_are_refused(data: Path, tmp_path: Path) -> None:
    values = values_of(data)
    values["data"]["validation"] = "few.txt"
    (data / "few.txt").write_text("".join(f"validation/{index:02d}\n" for index in range(9)))
    recipe = load_recipe(write(tmp_path / "auto.yaml", values))
    for begin in (plan, lambda recipe: train(recipe, tmp_path / "run", console=QUIET)):
        with refused(RecipeError, "rounds.1.labeling_ratio", "9", "10", "data.validation"):
            begin(recipe)
    assert not (tmp_path / "run").exists()


def test_keys_that_do_not_work_together_are_refused(data: Path, tmp_path: Path) -> None:
    def load(**changed: Any) -> None:
        load_recipe(write(tmp_path / "auto.yaml", values_of(data) | changed))

    with refused(RecipeError, "rounds.1.labeling_ratio", "auto is only for method dars", "cbst"):
        load(labeling={"method": "cbst"})
    with refused(RecipeError, "rounds.1.labeling_ratio", "sampling: none"):
        load(labeling={"sampling": "none"})
    with refused(RecipeError, "labeling.target_precision", "labeling_ratio: auto"):
        load(rounds=[{"steps": 1}, {"steps": 1, "labeling_ratio": 0.4}])
    with refused(RecipeError, "labeling.target_precision", "below 1"):
        load(labeling={"target_precision": 1.0})
    with refused(RecipeError, "rounds.1.labeling_ratio", "auto"):
        load(rounds=[{"steps": 1}, {"steps": 1, "labeling_ratio": "all"}])
    with refused(RecipeError, "rounds.0.labeling_ratio"):
        load(rounds=[{"steps": 1, "labeling_ratio": "auto"}])


def test_a_folder_needs_a_number(run: Path, data: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "labeling_ratio: auto"):
        label_folder(run, data / "images" / "unlabeled", tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()
    record = label_folder(
        run, data / "images" / "unlabeled", tmp_path / "out", labeling_ratio=0.3, console=QUIET
    )
    assert record["settings"]["labeling_ratio"] == 0.3
