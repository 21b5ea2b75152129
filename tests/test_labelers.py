"""One network labels, another learns: networks of rounds, and labels from other runs and files."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DarsegError, RecipeError, RunError, SizeError
from darseg.model.aligned import AlignmentRecord, fold_alignment
from darseg.model.class_order import reorder_classes, reordered_spec
from darseg.model.sides import Sides
from darseg.model.weights import load_network, read_spec, save_network
from darseg.report.overview import write_report
from darseg.run.browse import Repredictor, open_round
from darseg.run.check import check, plan
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import evaluate
from darseg.run.label import label_folder
from darseg.run.labelers import labelers_of
from darseg.run.rounds import train
from test_run import KILLED, kill_and_finish, outcome
from wording import refused, says

pytestmark = pytest.mark.usefixtures("small_network")

QUIET = Console(quiet=True)
VIT = {"architecture": "linear", "backbone": "timm/vit_tiny_patch16_224", "weights": "none"}  # sides 16n
CNN = {"backbone": "resnet18_half", "output_stride": 16, "head_channels": 16, "weights": "none"}  # 16n + 1


def values_of(data: Path, **changed: object) -> dict:
    """The tiny recipe, with windows that are the crops; a value None removes the key."""
    values = recipe_dict(data) | {"labeling": {}} | changed
    return {key: value for key, value in values.items() if value is not None}


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def teacher(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round with a transformer, which takes multiples of 16."""
    folder = tmp_path_factory.mktemp("teacher")
    values = values_of(tiny_data, network=VIT, rounds=[{"steps": 3}])
    values["training"] = values["training"] | {"crop": [48, 64]}
    train(load_recipe(write(folder / "vit.yaml", values)), folder / "vit", console=QUIET)
    return folder / "vit"


def student_values(data: Path, teacher: Path, count: int = 2, **first: object) -> dict:
    """A recipe whose first round learns from the teacher's labels, and its second, if any, from its own."""
    rounds = [
        {"steps": 4, "labels_from": str(teacher), "labeling_ratio": 0.4} | first,
        {"steps": 3, "labeling_ratio": 0.5},
    ]
    return values_of(data, network=CNN, rounds=rounds[:count])


@pytest.fixture(scope="module")
def student(tiny_data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small network that learns from the teacher."""
    folder = tmp_path_factory.mktemp("student")
    recipe = write(folder / "cnn.yaml", student_values(tiny_data, teacher))
    train(load_recipe(recipe), folder / "run", console=QUIET)
    return folder / "run"


def test_a_run_with_a_teacher_leaves_exactly_these_files(student: Path, teacher: Path) -> None:
    files = {p.relative_to(student).as_posix() for p in student.glob("round_*/*")}
    trained = ["network.safetensors", "optimizer.safetensors", "train.json", "scores.json", "evaluate.json"]
    trained += ["image_counts.npz"]
    labeled = [
        "labels",
        "histogram.npz",
        "thresholds.json",
        "images.json",
        "pseudo_scores.json",
        "label.json",
    ]
    expected = {f"round_{r}/{name}" for r in (0, 1) for name in (*trained, *labeled)}
    assert files == expected | {"round_0/labels_from.json"}
    assert len(list(student.glob("round_0/labels/**/*.png"))) == 6
    noted = json.loads((student / "round_0" / "labels_from.json").read_text())
    weights = teacher / "round_0" / "network.safetensors"
    assert noted == {
        "path": str(teacher),
        "weights": str(weights),
        "sha256": digest_path(weights),
        "architecture": "linear",
        "backbone": "timm/vit_tiny_patch16_224",
        "window": [48, 64],
        "aligned": False,
    }
    record = RunDirectory(student).read_record(0, "label")
    assert record is not None and record.inputs["labels_from"] == digest_path(weights)
    assert [read_spec(student / f"round_{r}/network.safetensors").backbone for r in (0, 1)] == [
        "resnet18_half"
    ] * 2


def test_a_teachers_labels_are_those_that_label_makes_with_it(
    student: Path, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data / "images" / "u", tmp_path / "in" / "u")  # an id is part of the random drawing
    label_folder(teacher, tmp_path / "in", tmp_path / "out", labeling_ratio=0.4, console=QUIET)
    names = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")]
    labels = np.stack([read_label(tmp_path / "out" / name) for name in names])
    assert len(names) == 6 and (labels < len(SCENE_CLASSES)).any()
    assert np.array_equal(labels, [read_label(student / "round_0" / "labels" / name) for name in names])


@pytest.mark.slow  # four processes, each of which loads torch and timm
def test_killed_anywhere_a_student_ends_with_the_same_bytes(
    student: Path, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run = write(tmp_path / "cnn.yaml", student_values(tiny_data, teacher)), tmp_path / "run"
    kill_and_finish(
        recipe,
        run,
        [
            ("round_0/labels/**/*.png", 2),
            ("round_0/checkpoint_*.safetensors", 1),
            ("round_1/labels/**/*.png", 2),
        ],
    )
    assert outcome(run) == outcome(student)


@pytest.mark.slow  # two processes, each of which loads torch and timm
def test_two_processes_label_by_a_teacher_as_one_does(
    student: Path, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run = write(tmp_path / "cnn.yaml", student_values(tiny_data, teacher, 1)), tmp_path / "run"
    result = forks.torchrun("-m", "darseg", "train", recipe, "training.batch=8", "--out", run)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"round 0: {teacher}") == 1
    ours, theirs = (
        {p.relative_to(folder): p.read_bytes() for p in (folder / "round_0" / "labels").rglob("*.png")}
        for folder in (run, student)
    )
    assert len(ours) == 6 and ours == theirs


def changed_copy(teacher: Path, folder: Path) -> tuple[Path, Path]:
    """Two files of a teacher: as it is, and with another classifier."""
    weights, other = folder / "teacher.safetensors", folder / "changed.safetensors"
    shutil.copy(teacher / "round_0" / "network.safetensors", weights)
    save_network(
        reorder_classes(load_network(weights), tuple(reversed(range(len(SCENE_CLASSES))))),
        other,
        read_spec(weights),
    )
    return weights, other


def test_a_teacher_that_changes_while_it_labels_labels_all_again(
    teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    weights, changed = changed_copy(teacher, tmp_path)
    values = student_values(tiny_data, weights, 1, labels_window=[48, 64], steps=1)
    recipe, run = write(tmp_path / "cnn.yaml", values), tmp_path / "run"
    ended = forks.python("-c", KILLED, recipe, run, "round_0/labels/**/*.png", 2)
    assert ended.returncode == -signal.SIGKILL
    shutil.copy(changed, weights)
    train(load_recipe(recipe), run, console=QUIET)
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (warning,) = [e["text"] for e in events if e["event"] == "warning" and "has changed since" in e["text"]]
    says(warning, str(weights), "round 0")
    train(load_recipe(recipe), tmp_path / "whole", console=QUIET)
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("damage", [None, "{"])
def test_a_round_repeated_by_another_teacher_takes_nothing_from_the_first(
    teacher: Path, tiny_data: Path, tmp_path: Path, damage: str | None
) -> None:
    weights, changed = changed_copy(teacher, tmp_path)
    values = student_values(tiny_data, weights, 1, labels_window=[48, 64], steps=1)
    values["labeling"] = {"keep_predictions": True}
    recipe, run, fresh = write(tmp_path / "cnn.yaml", values), tmp_path / "run", tmp_path / "fresh"
    train(load_recipe(recipe), run, console=QUIET)
    shutil.copy(changed, weights)
    for step in ("label", "train", "evaluate"):
        (run / "round_0" / f"{step}.json").unlink()
    if damage:
        (run / "round_0" / "labels_from.json").write_text(damage)
    for folder in (run, fresh):
        train(load_recipe(recipe), folder, console=QUIET)
    for name in ("labels_from.json", "histogram.npz", "thresholds.json"):
        assert (run / "round_0" / name).read_bytes() == (fresh / "round_0" / name).read_bytes(), name
    assert json.loads((run / "round_0" / "labels_from.json").read_text())["sha256"] == digest_path(changed)


def test_a_teacher_that_changed_afterwards_is_noticed(teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    weights, changed = changed_copy(teacher, tmp_path)
    values = student_values(tiny_data, weights, 1, labels_window=[48, 64], steps=1)
    recipe, run = load_recipe(write(tmp_path / "cnn.yaml", values)), tmp_path / "run"
    train(recipe, run, console=QUIET)
    round_ = open_round(run, 0)
    assert Repredictor(round_).reachable(round_.samples[0])
    # A moved file goes on; a changed one does not.
    (tmp_path / "moved").mkdir()
    shutil.move(weights, tmp_path / "moved" / weights.name)
    moved = student_values(tiny_data, tmp_path / "moved" / weights.name, 1, labels_window=[48, 64], steps=1)
    train(load_recipe(write(tmp_path / "cnn.yaml", moved)), run, console=QUIET)
    round_ = open_round(run, 0)
    assert Repredictor(round_).prediction(round_.samples[0]).classes.shape == (65, 97)
    shutil.copy(changed, tmp_path / "moved" / weights.name)
    with refused(RunError, "round_0", "labels_from", "label.json"):
        train(load_recipe(tmp_path / "cnn.yaml"), run, console=QUIET)
    # The labels stay visible; only what the teacher predicted is gone.
    assert not Repredictor(round_).reachable(round_.samples[0])
    with refused(RunError, str(weights), "round 0"):
        Repredictor(round_).prediction(round_.samples[0])
    assert "raw predictions are missing" in write_report(run).read_text()


def test_classes_in_another_order_are_matched_by_name(
    student: Path, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    weights, order = tmp_path / "reversed.safetensors", tuple(reversed(range(len(SCENE_CLASSES))))
    path = teacher / "round_0" / "network.safetensors"
    save_network(reorder_classes(load_network(path), order), weights, reordered_spec(read_spec(path), order))
    values = student_values(tiny_data, weights, 1, labels_window=[48, 64])
    train(load_recipe(write(tmp_path / "cnn.yaml", values)), tmp_path / "run", console=QUIET)
    first = {name: data for name, data in outcome(student).items() if name.startswith("round_0/")}
    assert outcome(tmp_path / "run") == first


@pytest.mark.parametrize("align", ["none", "decisions"])
def test_a_teachers_class_weights_count_unless_labels_are_aligned(
    align: str, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    weights, path = tmp_path / "aligned.safetensors", teacher / "round_0" / "network.safetensors"
    shares = [1 / len(SCENE_CLASSES)] * len(SCENE_CLASSES)
    record = AlignmentRecord(
        [2.0] + [1.0] * (len(SCENE_CLASSES) - 1),
        [True] * len(SCENE_CLASSES),
        target=shares,
        reached=shares,
        strength=1,
        bound=5,
    )
    save_network(fold_alignment(load_network(path), record), weights, read_spec(path))
    values = student_values(tiny_data, weights, 1) | {"labeling": {"align": align}}
    recipe = load_recipe(write(tmp_path / "r.yaml", values))
    labeler = labelers_of(recipe)[0]
    # A file's window is the crop, 49 x 65, rounded up.
    assert labeler.window == (64, 80)
    whole = labelers_of(load_recipe(tmp_path / "r.yaml", ["rounds.0.labels_window=whole"]))[0]
    assert whole.window == "whole" and "whole images" in whole.describe()
    assert labeler.aligned == (align == "none")
    assert (labeler.load(plain=align != "none").alignment is None) == (align != "none")
    assert ("aligned decisions" in labeler.describe()) == (align == "none")


def test_a_networks_successor_starts_from_its_own_weights(tiny_data: Path, tmp_path: Path) -> None:
    """A transformer labels, a small network learns from it, in one run."""
    rounds = [
        {"steps": 2},
        {"steps": 3, "labeling_ratio": 0.4, "network": CNN, "crop": [49, 65]},
        {"steps": 3, "labeling_ratio": 0.6},
    ]
    values = values_of(tiny_data, network=VIT, rounds=rounds)
    values["training"] = values["training"] | {"crop": [48, 64]}
    recipe = load_recipe(write(tmp_path / "both.yaml", values))
    assert not check(recipe, QUIET).faults
    planned = plan(recipe)
    assert [network.begins for network in planned.networks] == [0, 1]
    assert planned.networks[0].parameters > 5e6 > planned.networks[1].parameters
    assert planned.activation_bytes in [network.activation_bytes for network in planned.networks]
    assert [round_.span for round_ in planned.rounds] == [(0.0, 1.0), (0.0, 1.0), (0.5, 1.0)]
    assert [round_.augmentation.crop for round_ in planned.rounds] == [(48, 64), (49, 65), (49, 65)]
    run = tmp_path / "run"
    train(recipe, run, console=QUIET)
    specs = [read_spec(run / f"round_{index}" / "network.safetensors") for index in range(3)]
    assert [spec.backbone for spec in specs] == [VIT["backbone"], "resnet18_half", "resnet18_half"]
    assert [spec.sides for spec in specs] == [Sides(16, 0), Sides(16), Sides(16)]
    protocols = [json.loads((run / f"round_{i}" / "scores.json").read_text())["protocol"] for i in range(3)]
    assert ["48" in protocols[0], "49" in protocols[1], "49" in protocols[2]] == [True] * 3
    # The commands follow the network of each round.
    for index in range(3):
        scores, _ = evaluate(run, round_index=index, console=QUIET)
        assert scores.confusion.tolist() == RunDirectory(run).scores(index).confusion.tolist()
    label_folder(run, tiny_data / "images" / "u", tmp_path / "labels", console=QUIET)
    round_ = open_round(run, 1)
    assert Repredictor(round_).prediction(round_.samples[0]).classes.shape == (65, 97)
    page = write_report(run).read_text()
    says(
        "\n".join(line.strip() for line in page.splitlines() if " learns from " in line),
        "resnet18_half",
        "vit_tiny",
    )


def test_plan_and_check_say_who_labels_whom(call, teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "cnn.yaml", student_values(tiny_data, teacher))
    code, out, _ = call("plan", recipe)
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("round 0:") or line.startswith("round 1:")]
    says("\n".join(lines), str(teacher), "vit_tiny", "48 x 64", "resnet18_half")
    code, out, _ = call("check", recipe)
    assert code == 0 and str(teacher) in out


def test_steps_of_a_teacher_are_reused(student: Path, tmp_path: Path) -> None:
    recipe = load_recipe(student / "recipe.yaml", ["rounds.1.labeling_ratio=0.3"])
    train(recipe, tmp_path / "run", reuse=student, console=QUIET)
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    copied = [(e["round"], e["step"]) for e in events if e["event"] == "copied"]
    assert copied == [(0, "label"), (0, "train"), (0, "evaluate")]
    assert (tmp_path / "run/round_0/labels_from.json").read_bytes() == (
        student / "round_0/labels_from.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (["rounds.0.network={weights: none}"], ["rounds.0.network"]),
        (["rounds.0.crop=49"], ["rounds.0.crop", "training.crop"]),
        (["rounds.1.labels_window=49"], ["rounds.1.labels_window", "labels_from"]),
        (["rounds.0.labeling_ratio=null"], ["rounds.0.labeling_ratio"]),
        (
            ["rounds.1.network={architecture: dpt, output_stride: 16, weights: none}"],
            ["rounds.1.network.output_stride"],
        ),
        (["rounds.0.labels_from=''"], ["rounds.0.labels_from"]),
        (["rounds.0.use=online"], ["rounds.0.labels_from", "rounds.0.labeling_ratio", "use: online"]),
    ],
)
def test_recipes_that_cannot_work(
    changes: list[str], facts: list[str], teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "r.yaml", student_values(tiny_data, teacher))
    with refused(RecipeError, *facts):
        load_recipe(recipe, changes)


@pytest.mark.parametrize("kind", ["missing", "folder", "foreign", "unfinished", "classes", "window"])
def test_teachers_that_cannot_label_are_reported_before_training(
    kind: str, teacher: Path, tiny_data: Path, tmp_path: Path
) -> None:
    source, window = tmp_path / "teacher", None
    facts = {
        "missing": ["does not exist"],
        "folder": ["no recipe.yaml"],
        "foreign": ["not"],
        "unfinished": ["round 0 is not finished"],
        "classes": ["other classes", "crack"],
        "window": ["labels_window", "16n"],
    }[kind]
    if kind == "folder":
        source.mkdir()
    elif kind == "foreign":
        source.write_bytes(b"not weights")
    elif kind == "unfinished":
        shutil.copytree(teacher, source)
        (source / "round_0" / "evaluate.json").unlink()
    elif kind == "window":
        source, window = teacher, [49, 65]
    values = student_values(tiny_data, source)
    if kind == "classes":
        source = teacher
        values["data"]["classes"] = ["crack", *values["data"]["classes"][1:]]
        values["rounds"][0]["labels_from"] = str(source)
    if window:
        values["rounds"][0]["labels_window"] = window
    recipe = load_recipe(write(tmp_path / "r.yaml", values))
    with refused(RunError, "rounds.0.labels_from", str(source), *facts):
        train(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError) as caught:
        plan(recipe)
    assert str(caught.value) in check(recipe, QUIET).faults


def test_a_run_does_not_label_for_itself(student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(student, run)
    recipe = load_recipe(student / "recipe.yaml", [f"rounds.1.labels_from={run / 'round_0'}"])
    with refused(RunError, "rounds.1.labels_from", str(run)):
        train(recipe, run, console=QUIET)


def test_sizes_of_a_later_network_are_checked_before_training(tiny_data: Path, tmp_path: Path) -> None:
    rounds = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4, "network": VIT}]
    recipe = load_recipe(write(tmp_path / "r.yaml", values_of(tiny_data, rounds=rounds)))
    with refused(SizeError, "round 1", "rounds.1.crop", "16n", "48 x 64"):
        train(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DarsegError):
        plan(recipe)
