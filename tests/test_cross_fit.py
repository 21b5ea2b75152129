"""Rounds with labeling_ratio: auto without validation images: folds of the labeled images show the precision."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import forks
from conftest import write_png
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.prediction import FLOAT16, Prediction
from darseg.errors import RecipeError, RunError
from darseg.experiment.compare import seconds_of
from darseg.model.decide import decide
from darseg.model.predict import predict_for_labeling, scores_for_labeling
from darseg.pseudo.distribution import ClassDistribution, count_labels
from darseg.pseudo.precision import ExpectedPrecision, HeldOutBuilder, choose_by_precision
from darseg.report.facts import read_run
from darseg.report.overview import write_report
from darseg.run.build import labeling_protocol, load_to_predict, manifest_of
from darseg.run.check import check, plan
from darseg.run.directory import RunDirectory
from darseg.run.folds import assign_folds, assigned_folds, fold_count, fold_records, fold_warnings
from darseg.run.held_out import describe_auto
from darseg.run.rounds import train
from test_auto_ratio import CLASSES, draw_roles, truth, write
from test_auto_ratio import values_of as values_with_validation
from test_run import kill_and_finish, outcome, warnings_of
from wording import refused, says

QUIET = Console(quiet=True)
COUNTS = {"labeled": 11, "unlabeled": 3}
STEPS, TARGET = 8, 0.3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 33 x 49 pixels, none of them for validation."""
    return draw_roles(tmp_path_factory.mktemp("scenes"), COUNTS)


def values_of(data: Path, **labeling: Any) -> dict[str, Any]:
    values = values_with_validation(data, **({"target_precision": TARGET} | labeling))
    del values["data"]["validation"]
    values["training"]["checkpoint_every"] = 3
    return values | {"rounds": [{"steps": STEPS}, {"steps": 1, "labeling_ratio": "auto"}]}


@pytest.fixture(scope="module")
def recorded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    """A run; file of a network → ids that it was trained on; file → ids of held-out images that it predicted."""
    from darseg.run import held_out
    from darseg.run.steps import label as label_step
    from darseg.run.steps import train as train_step

    folder, last = tmp_path_factory.mktemp("run"), {}
    trained: dict[Path, list[str]] = {}
    predicted: dict[Path, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        opened, saved = train_step.open_stream, train_step.save_network
        loaded, asked = label_step.load_to_predict, held_out.read_truth

        def open_stream(*arguments: Any, samples: tuple[Sample, ...], **named: Any) -> Iterator:
            last.setdefault("ids", []).extend(sample.id for sample in samples)
            return opened(*arguments, samples=samples, **named)

        def save_network(network: Any, path: Path, spec: Any) -> None:
            trained[path] = last.pop("ids")
            saved(network, path, spec)

        def load(path: Path, plain: bool) -> Any:
            last["network"] = path
            return loaded(path, plain)

        def read_truth(sample: Sample) -> np.ndarray:
            predicted.setdefault(last["network"], []).append(sample.id)
            return asked(sample)

        for module, double in ((train_step, open_stream), (train_step, save_network), (held_out, read_truth)):
            patch.setattr(module, double.__name__, double)
        patch.setattr(label_step, "load_to_predict", load)
        train(load_recipe(write(folder / "auto.yaml", values_of(data))), folder / "run", console=QUIET)
    return folder / "run", trained, predicted


@pytest.fixture(scope="module")
def run(recorded: tuple[Path, dict, dict]) -> Path:
    return recorded[0]


def fold_network(run: Path, number: int) -> Path:
    return run / "folds" / f"fold_{number}" / "round_0" / "network.safetensors"


def bytes_of(run: Path) -> dict[str, bytes]:
    """What an interruption must not change, with the networks on folds."""
    return outcome(run) | {path.parts[-3]: path.read_bytes() for path in run.glob("folds/*/*/*.safetensors")}


def thresholds_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "round_1" / "thresholds.json").read_text())


def test_no_image_is_predicted_by_a_network_that_was_trained_on_it(recorded: tuple[Path, dict, dict]) -> None:
    run, trained, predicted = recorded
    labeled = {f"labeled/{index:02d}" for index in range(COUNTS["labeled"])}
    folds = [fold_network(run, number) for number in (0, 1)]
    assert {*predicted} == {*folds}
    assert {*trained[run / "round_0" / "network.safetensors"]} == labeled
    for path, ids in predicted.items():
        assert ids and not {*ids} & {*trained[path]} and {*ids} | {*trained[path]} == labeled
    assert sorted(predicted[folds[0]] + predicted[folds[1]]) == sorted(labeled)  # each once


def test_a_fold_is_trained_as_a_run_of_its_images_alone(
    recorded: tuple[Path, dict, dict], data: Path, tmp_path: Path
) -> None:
    run, trained, _ = recorded
    ids = sorted(trained[fold_network(run, 1)])
    listed = tmp_path / "rest.txt"
    listed.write_text("".join(f"{name}\n" for name in ids))
    values = values_of(data)
    del values["labeling"]["target_precision"]
    values["data"]["labeled"] = str(listed)
    values["rounds"] = values["rounds"][:1]
    train(load_recipe(write(tmp_path / "alone.yaml", values)), tmp_path / "alone", console=QUIET)
    alone = tmp_path / "alone" / "round_0" / "network.safetensors"
    assert alone.read_bytes() == fold_network(run, 1).read_bytes()
    assert fold_network(run, 0).read_bytes() != fold_network(run, 1).read_bytes()
    files = {path.name for path in fold_network(run, 1).parent.iterdir()}
    assert files == {"network.safetensors", "train.json"}


def predictions(run: Path, data: Path, number: int, ids: list[str], weights: np.ndarray | None) -> dict:
    """Of the network of a fold, image by image."""
    torch.set_num_threads(1)
    network = load_to_predict(fold_network(run, number))
    protocol, made = labeling_protocol(load_recipe(run / "recipe.yaml")), {}
    for name in ids:
        image = read_image(data / "images" / f"{name}.png")
        if weights is None:
            made[name] = predict_for_labeling(network, image, protocol)
        else:
            scores = scores_for_labeling(network, image, protocol, scale=FLOAT16)
            made[name] = decide(torch.from_numpy(scores), weights=weights)
    return made


def check_pooled(recorded: tuple, data: Path, run: Path, weights: np.ndarray | None = None) -> None:
    """thresholds.json says what the predictions of all folds together give."""
    first, _, predicted = recorded
    pooled: dict[str, Prediction] = {}
    for number in (0, 1):
        pooled |= predictions(run, data, number, predicted[fold_network(first, number)], weights)
    labels, content = RunDirectory(run).label_set(1), thresholds_of(run)["expected_precision"]
    truths = {name: truth(data, "labeled", Path(name).name) for name in pooled}
    counts = count_labels(list(truths.items()), len(CLASSES))
    builder = HeldOutBuilder(len(CLASSES))
    for name, prediction in pooled.items():
        builder.add(prediction, truths[name])
    thresholds, expected = choose_by_precision(
        labels.histogram, ClassDistribution.from_counts(counts), builder.build(), target_precision=TARGET
    )
    assert labels.thresholds == thresholds and labels.expected == replace(expected, folds=2)
    assert content["held_out"] == COUNTS["labeled"] and content["folds"] == 2
    # The precision once more and slowly: pixel by pixel over the images of both folds.
    for k in range(len(CLASSES)):
        right, taken = 0, 0
        for name, prediction in pooled.items():
            chosen = (prediction.classes == k) & (prediction.codes >= thresholds.accept[k])
            chosen &= truths[name] != 255
            taken += int(chosen.sum())
            right += int((chosen & (truths[name] == k)).sum())
        assert content["pixels"][k] == taken
        assert content["expected"][k] == (pytest.approx(right / taken) if taken else None)
    assert any(pixels > 0 for pixels in content["pixels"]) and any(thresholds_of(run)["kept"])


def test_precision_is_pooled_over_the_folds(recorded: tuple[Path, dict, dict], data: Path) -> None:
    run = recorded[0]
    check_pooled(recorded, data, run)
    record = json.loads((run / "round_1" / "label.json").read_text())
    assert {*record["inputs"]} == {"labeled", "unlabeled", "folds", "network", "settings"}
    assert record["facts"]["folds"] == 2
    assert not (run / "round_1" / "held_out.npz").exists()


def test_a_run_takes_the_folds_of_another_and_aligns_their_decisions(
    recorded: tuple[Path, dict, dict], data: Path, tmp_path: Path
) -> None:
    """The class weights are those of the network that labels."""
    said = io.StringIO()
    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data, align="decisions", bound=20.0)))
    train(recipe, tmp_path / "run", reuse=recorded[0], console=Console(file=said, width=1000))
    lines = [line for line in said.getvalue().splitlines() if "copied from" in line]
    assert [line.split(":")[0] for line in lines if "fold" in line] == ["fold 1 of 2", "fold 2 of 2"]
    for number in (0, 1):
        assert (
            fold_network(tmp_path / "run", number).read_bytes()
            == fold_network(recorded[0], number).read_bytes()
        )
    alignment = RunDirectory(tmp_path / "run").label_set(1).alignment
    assert alignment is not None
    check_pooled(recorded, data, tmp_path / "run", alignment.factors)


def test_killed_while_a_fold_trains_it_ends_with_the_same_bytes(
    run: Path, data: Path, tmp_path: Path
) -> None:
    recipe, folder = write(tmp_path / "auto.yaml", values_of(data)), tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("fold_1", "round_1", "summary.json"))
    kill_and_finish(recipe, folder, [("folds/fold_1/round_0/checkpoint_*.safetensors", 2)])
    assert bytes_of(folder) == bytes_of(run) and len(bytes_of(run)) > len(outcome(run)) == len(
        outcome(folder)
    )
    assert not list(folder.glob("folds/*/*/checkpoint_*"))
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "fold_step" and event["fold"] == 1]
    assert steps.count(0) == 2 and steps[-1] == STEPS - 1  # it went on, and did not begin again
    assert sum(event["event"] == "fold_trained" and event["fold"] == 1 for event in events) == 2


def test_a_changed_network_of_a_fold_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    fold_network(folder, 0).write_bytes(fold_network(folder, 1).read_bytes())
    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data)))
    with refused(RunError, "fold_0", "network.safetensors", "train.json"):
        train(recipe, folder, console=QUIET)


@pytest.mark.slow
def test_two_processes_measure_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    values = values_of(data)
    values["training"]["half_batch"] = 4  # of round 1
    recipe = write(tmp_path / "auto.yaml", values)
    result = forks.torchrun("-m", "darseg", "train", recipe, "--out", tmp_path / "two", "--reuse", run)
    assert result.returncode == 0, result.stderr
    assert thresholds_of(tmp_path / "two") == thresholds_of(run)


# What a reader sees.


def test_the_page_and_the_summary_know_of_the_folds(run: Path, tmp_path: Path) -> None:
    facts = read_run(run)
    seconds = sum(record.seconds for record in fold_records(RunDirectory(run)))
    assert seconds > 0 and facts.rounds[1].seconds["cross-fit"] == pytest.approx(seconds)
    assert [len(round_.curve.steps) for round_ in facts.rounds] == [2, 1]  # not those of the folds
    page = write_report(run, tmp_path / "page.html").read_text()
    assert "Target 0.3, 11 held-out images: the labeled ones in 2 folds" in page and "cross-fit" in page
    summary = json.loads((run / "summary.json").read_text())
    own = sum(RunDirectory(run).read_record(1, step).seconds for step in ("label", "train", "evaluate"))
    assert summary["rounds"][1]["seconds"] == pytest.approx(own + seconds, abs=0.11)


def test_an_experiment_counts_the_seconds_of_the_folds(run: Path, tmp_path: Path) -> None:
    rounds = (SimpleNamespace(index=0, labels=False), SimpleNamespace(index=1, labels=True))
    trial: Any = SimpleNamespace(name="auto", rounds=rounds, recipe=load_recipe(run / "recipe.yaml"))
    shutil.copytree(run, tmp_path / "run")
    folder: Any = SimpleNamespace(run=lambda name: tmp_path / "run")
    records = [
        *run.glob("round_*/train.json"),
        *run.glob("round_1/label.json"),
        *run.glob("folds/*/*/train.json"),
    ]
    assert len(records) == 5
    total = sum(json.loads(path.read_text())["seconds"] for path in records)
    assert seconds_of(folder, trial) == pytest.approx(total, abs=0.01)
    (tmp_path / "run" / "folds" / "fold_1" / "round_0" / "train.json").unlink()
    with refused(RunError, "fold_1", "no record"):
        seconds_of(folder, trial)


def test_the_plan_says_what_cross_fitting_costs(data: Path, tmp_path: Path, call) -> None:
    recipe = write(tmp_path / "auto.yaml", values_of(data))
    planned = plan(load_recipe(recipe))
    assert planned.folds == {1: (2, STEPS)}
    says(planned.notes[0], "auto", "round 1", "0.3", "11 labeled images", "3 unlabeled")
    megabytes = f"{2 * planned.parameters * 4 / 1e6:.0f} MB"
    says(planned.notes[1], "cross-fit", "0 validation images", "2 times 8 steps", megabytes, "round 0")
    code, printed, _ = call("plan", recipe)
    assert code == 0 and "1 + 2 x 8" in printed and planned.notes[1] in printed.replace("\n", " ")
    several = load_recipe(recipe, ["labeling.cross_fit=5", "rounds.1.steps=2"])
    several = several.model_copy(update={"rounds": (*several.rounds, several.rounds[1])})
    lines = plan(several).notes
    says(lines[1], "5 more networks", "5 times 8 steps")
    says(lines[2], "round 2", "more confident", "less certain")
    assert "validation images" not in lines[1]


def test_folds_are_made_if_validation_images_are_too_few_or_if_asked(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data)))
    asked = load_recipe(tmp_path / "auto.yaml", ["labeling.cross_fit=3"])
    number = load_recipe(
        tmp_path / "auto.yaml", ["rounds.1.labeling_ratio=0.5", "labeling.target_precision=0.9"]
    )
    assert [fold_count(recipe, images) for images in (0, 9, 10, 500)] == [2, 2, 0, 0]
    assert [fold_count(asked, images) for images in (0, 9, 10, 500)] == [3, 3, 3, 3]
    assert [fold_count(number, images) for images in (0, 500)] == [0, 0]
    assert describe_auto(number, manifest_of(number)) == []


def test_classes_that_are_in_one_fold_only_are_named(data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "auto.yaml", values_of(data)))
    manifest = manifest_of(recipe)
    pixels = np.full((COUNTS["labeled"], 4), 9)
    names = manifest.classes.names
    assert fold_warnings(names, pixels, assigned_folds(recipe, manifest, pixels)) == []
    pixels[1:, 1] = 0  # one image
    pixels[2:, 2] = 0  # two images, which are in two folds
    pixels[:, 3] = 0  # none: other messages say so
    (line,) = fold_warnings(names, pixels, assigned_folds(recipe, manifest, pixels))
    says(line, "cross-fit", "one fold", "road")
    assert not {"sky", "building", "vegetation"} & {*line.split(": ")[-1].split(", ")}


def test_a_class_in_one_fold_is_said_before_and_while_a_run_works(data: Path, tmp_path: Path) -> None:
    """The only image of a class: whatever else is predicted as the class is wrong, so nothing of it is expected right."""
    values = values_of(data, target_precision=0.0)
    root = tmp_path / "scenes"
    shutil.copytree(data, root)
    for index in range(1, COUNTS["labeled"]):
        path = root / "labels" / "labeled" / f"{index:02d}.png"
        label = truth(root, "labeled", path.stem)
        write_png(
            path, np.where(label == 2, 255, np.array([0, 1, 3, 4])[np.minimum(label, 3)]).astype(np.uint8)
        )
    values["data"]["root"] = str(root)
    recipe = load_recipe(write(tmp_path / "auto.yaml", values), ["rounds.0.steps=2"])
    line = next(note for note in plan(recipe).notes if "one fold" in note)
    assert line.endswith(": building") and line in check(recipe, QUIET).warnings
    train(recipe, tmp_path / "run", console=QUIET)
    assert line in warnings_of(tmp_path / "run")
    expected = thresholds_of(tmp_path / "run")["expected_precision"]
    assert expected["expected"][2] in (0.0, None)


@st.composite
def _labeled(draw: st.DrawFn) -> tuple[list[Sample], np.ndarray, int, int]:
    images, classes = draw(st.integers(2, 14)), draw(st.integers(1, 4))
    shown = draw(st.lists(st.booleans(), min_size=images * classes, max_size=images * classes))
    samples = [Sample(f"{index:02d}", Path(f"{index}.png"), None) for index in range(images)]
    return (
        samples,
        np.array(shown).reshape(images, classes),
        draw(st.integers(2, images)),
        draw(st.integers(0, 9)),
    )


@settings(max_examples=60, deadline=None)
@given(_labeled(), st.randoms(use_true_random=False))
def test_folds_are_equal_parts_by_ids_and_seed(drawn: tuple, random: Any) -> None:
    samples, present, count, seed = drawn
    fold_of = assign_folds(samples, present, count, seed=seed)
    sizes = np.bincount(fold_of, minlength=count)
    assert len(fold_of) == len(samples) and len(sizes) == count and sizes.max() - sizes.min() <= 1
    order = list(range(len(samples)))
    random.shuffle(order)
    shuffled = assign_folds([samples[place] for place in order], present[order], count, seed=seed)
    assert [fold_of[place] for place in order] == list(shuffled)


def test_what_a_page_reads_of_folds_is_checked() -> None:
    fields = {"basis", "expected", "bound", "images", "effective", "pixels", "ratio"}
    content: dict[str, Any] = {name: [] for name in fields} | {"target": 0.9, "held_out": 12}
    assert ExpectedPrecision.from_json(content, 0).folds == 0
    assert "folds" not in ExpectedPrecision.from_json(content, 0).to_json()
    assert ExpectedPrecision.from_json(content | {"folds": 2}, 0).to_json()["folds"] == 2
    for folds in (-1, 13, "2", 2.5, True):
        with pytest.raises(ValueError, match="folds"):
            ExpectedPrecision.from_json(content | {"folds": folds}, 0)


# What is refused.


def test_what_cannot_be_cross_fit_is_refused_before_anything_is_begun(data: Path, tmp_path: Path) -> None:
    values = values_of(data)
    (data / "few.txt").write_text("".join(f"labeled/{index:02d}\n" for index in range(9)))

    def begin(*overrides: str, **changed: Any) -> None:
        recipe = load_recipe(write(tmp_path / "auto.yaml", values | changed), list(overrides))
        for start in (plan, lambda recipe: train(recipe, tmp_path / "run", console=QUIET)):
            start(recipe)

    with refused(
        RecipeError, "rounds.1.labeling_ratio", "0 validation", "9 labeled", "10", "data.validation"
    ):
        begin("data.labeled=few.txt")
    with refused(RecipeError, "labeling.cross_fit", "12 folds", "11 labeled images"):
        begin("labeling.cross_fit=12")
    with refused(RecipeError, "labeling.cross_fit", "2"):
        begin("labeling.cross_fit=1")
    with refused(RecipeError, "labeling.cross_fit", "labeling_ratio: auto"):
        begin("labeling.cross_fit=2", "labeling.target_precision=0.9", "rounds.1.labeling_ratio=0.5")
    first, auto = {"steps": 2}, {"steps": 2, "labeling_ratio": "auto"}
    with refused(RecipeError, "rounds.1.labeling_ratio", "round 0", "unlabeled images"):
        begin(rounds=[first | {"use": "online"}, auto])
    with refused(RecipeError, "rounds.0.labeled_part", "data.validation"):
        begin(rounds=[first | {"labeled_part": [0.0, 0.5]}, auto])
    with refused(RecipeError, "image_classes", "rounds.1.labeling_ratio", "data.validation"):
        begin(image_classes={"weights": "none"})
    with refused(RecipeError, "rounds.2.labeling_ratio", "another network", "data.validation"):
        begin(rounds=[first, auto | {"network": values["network"]}, auto])
    assert not (tmp_path / "run").exists()
