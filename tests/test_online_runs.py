"""Whole runs with online rounds: keys, plans, files, resuming after kills, processes, marks, the journal."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.colors import UNCHANGED, Colors
from darseg.data.unlabeled import Boxes
from darseg.errors import RecipeError, RunError
from darseg.methods.acceptance import Above, Aligned, ClassThresholds, MeanAligned, Realigned
from darseg.methods.realigned import WeightSearch
from darseg.methods.teacher import TeacherSettings
from darseg.model.weights import load_network
from darseg.run.browse import open_round
from darseg.run.check import plan
from darseg.run.marks import mark_bad
from darseg.run.online import unused_online
from darseg.run.plan import plan_rounds
from darseg.run.rounds import train
from darseg.run.steps.train import settings_of
from test_run import outcome
from wording import refused, says

QUIET = Console(quiet=True)
FILL = (124, 116, 104)


def online_recipe(data: Path, **online: Any) -> dict:
    """An online round, a DARS round, and an online round again; most pixels are accepted (of 11 classes)."""
    recipe = recipe_dict(data)
    recipe["online"] = {"above": 0.12} | online
    recipe["rounds"] = [
        {"steps": 5, "use": "online"},
        {"steps": 3, "labeling_ratio": 0.4},
        {"steps": 4, "use": "online"},
    ]
    return recipe


def write(recipe: dict, folder: Path, name: str = "online.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    ended = forks.python(
        "-m", "darseg", "train", write(online_recipe(tiny_data), folder), "--out", folder / "run"
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def events_of(run: Path, name: str) -> list[dict]:
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == name]


# --- whole runs


def test_online_rounds_before_and_after_a_dars_round(finished: Path) -> None:
    with_labels = {path.parent.name for path in finished.glob("round_*/label.json")}
    assert with_labels == {"round_1"}
    for index in range(3):
        inputs = json.loads((finished / f"round_{index}" / "train.json").read_text())["inputs"]
        assert ("unlabeled" in inputs) == (index != 1)
        assert (inputs["labels"] == "none") == (index != 1)
    assert len(json.loads((finished / "summary.json").read_text())["rounds"]) == 3
    page = (finished / "report.html").read_text()
    assert "fixmatch" in page and "labeled images only" not in page
    assert "Accepted while training" in page and "share of accepted pixels by step" in page


def test_the_journal_has_shares_of_accepted_pixels_and_their_precision(finished: Path) -> None:
    steps = events_of(finished, "step")
    assert {event["round"] for event in steps} == {0, 1, 2}
    for event in steps:
        online = event["round"] != 1
        assert ("loss_unlabeled" in event) == online and not any(name.startswith("pixels") for name in event)
        if online:
            assert 0 < event["accepted"] <= 1
        # The truth is read every tenth step.
        assert ("precision" in event) == (online and event["step"] % 10 == 0)
        assert event.get("precision") is None or 0 <= event["precision"] <= 1
        looked = online and event["step"] % 10 == 0
        for name in ("accepted_by_class", "precision_by_class"):
            assert len(event.get(name, ())) == (11 if looked else 0)
        if looked:
            assert sum(event["accepted_by_class"]) == pytest.approx(1, abs=1e-4)
            assert all(share is None or 0 <= share <= 1 for share in event["precision_by_class"])
            assert all(0 <= event[name] <= 1 for name in ("agreement", "teacher_right", "student_right"))
    page = (finished / "report.html").read_text()
    assert "Teacher and student" in page and "Right ones among the accepted, by class" in page
    assert "Smallest accepted confidence" not in page


def test_the_teacher_is_what_the_round_saves(tiny_data: Path, tmp_path: Path) -> None:
    """With a decay of 0 the teacher is the network that learns."""
    recipe = online_recipe(tiny_data)
    recipe["rounds"] = [{"steps": 4, "use": "online"}]
    weights = {}
    for name, teacher in (
        ("student", {"decay": 0.9, "result": False}),
        ("follows", {"decay": 0.0}),
        ("average", {"decay": 0.9}),
    ):
        recipe["online"]["teacher"] = teacher
        recipe["online"]["weight"] = 0.0  # what the teacher labels does not matter then
        train(write(recipe, tmp_path), tmp_path / name)
        weights[name] = load_network(tmp_path / name / "round_0" / "network.safetensors").state_dict()
    assert all(torch.equal(value, weights["follows"][key]) for key, value in weights["student"].items())
    assert any(not torch.equal(value, weights["average"][key]) for key, value in weights["student"].items())


def test_an_average_in_rounds_that_are_not_online(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 4}, {"steps": 3, "labeling_ratio": 0.4}]
    networks = []
    for name, teacher in (("plain", None), ("average", {"decay": 0.7})):
        if teacher:
            recipe["training"]["teacher"] = teacher
        train(write(recipe, tmp_path), tmp_path / name)
        networks.append(load_network(tmp_path / name / "round_0" / "network.safetensors").state_dict())
    assert any(not torch.equal(value, networks[1][key]) for key, value in networks[0].items())
    # The next round labels and goes on from the average.
    summary = json.loads((tmp_path / "average" / "summary.json").read_text())
    assert [round_["steps"] for round_ in summary["rounds"]] == [4, 3]


KILLED = """
import itertools, os, signal, sys
from darseg.run.rounds import train
from darseg.run.steps import train as step
real, count = step.save_checkpoint, itertools.count(1)
def save(checkpoint, path):
    real(checkpoint, path)
    if next(count) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
step.save_checkpoint = save
train(sys.argv[1], sys.argv[2])
"""


def test_killed_in_online_rounds_it_ends_with_the_same_bytes(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, out = write(online_recipe(tiny_data), tmp_path), tmp_path / "run"
    for at in (2, 3, 3):  # checkpoints and ends: within round 0, at its end, within round 2
        ended = forks.python("-c", KILLED, recipe, out, str(at))
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (out / "round_1" / "train.json").exists()
    train(recipe, out)
    assert outcome(out) == outcome(finished)


@pytest.mark.slow
def test_killed_within_a_window_it_ends_with_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data, above=None, aligned={"ratio": 0.6, "window": 3}, align="decisions")
    recipe["online"] |= {"align_window": 5, "bound": 1000.0}
    recipe["training"] |= {"checkpoint_every": 2}
    recipe["rounds"] = [{"steps": 11, "use": "online"}]
    path = write(recipe, tmp_path)
    train(path, tmp_path / "whole")
    ended = forks.python("-c", KILLED, path, tmp_path / "killed", "2")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    train(path, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    first, last = events_of(tmp_path / "whole", "step")
    assert first["thresholds"] == [None] * 11 and any(share is not None for share in last["thresholds"])
    assert (first["step"], last["step"]) == (0, 10)
    assert (first["accepted"], first["unaligned"], first["moved"]) == (
        0,
        1,
        0,
    )  # nothing in the first windows
    assert 0 < last["accepted"] <= 1 and last["unaligned"] in (0, 1) and 0 <= last["moved"] <= 1


@pytest.mark.slow
def test_two_processes_go_on_with_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    """Stopped by a signal between two checkpoints, though each process has BatchNorm statistics of its own."""
    recipe = online_recipe(tiny_data, batch=4, strong_views=2)
    recipe["training"] |= {"half_batch": 4, "checkpoint_every": 100}
    recipe["rounds"] = [{"steps": 5, "use": "online"}]
    path = write(recipe, tmp_path)
    script = """
import os, signal, sys
from darseg.run.rounds import train
from darseg.run.steps import train as step
real = step._Training._report
def report(self, told, advance):
    real(self, told, advance)
    if told.step == 2 and sys.argv[3] == 'stop':
        os.kill(os.getpid(), signal.SIGTERM)
step._Training._report = report
train(sys.argv[1], sys.argv[2])
"""
    (tmp_path / "run.py").write_text(script)
    for name, modes in (("whole", ("go",)), ("stopped", ("stop", "go"))):
        for mode in modes:
            ended = forks.torchrun("run.py", path, tmp_path / name, mode, cwd=tmp_path)
            assert (ended.returncode == 0) == (mode == "go"), ended.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    first = events_of(tmp_path / "whole", "step")[0]  # vectors are added up over processes, too
    assert sum(first["accepted_by_class"]) == pytest.approx(1, abs=1e-4)


def test_images_marked_as_bad_are_left_out_of_online_rounds(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, out = online_recipe(tiny_data), tmp_path / "run"
    recipe["rounds"] = [{"steps": 5, "use": "online"}, {"steps": 3, "use": "online"}]
    path = write(recipe, tmp_path)

    def mark(run: Path) -> None:
        if not (run / "bad_images.json").exists():
            mark_bad(run, ["u/07", "u/09"])

    train(path, out, after_round=mark)
    assert not (out / "round_0" / "excluded.json").exists()
    assert json.loads((out / "round_1" / "excluded.json").read_text()) == ["u/07", "u/09"]
    inputs = json.loads((out / "round_1" / "train.json").read_text())["inputs"]
    assert "excluded" in inputs
    train(path, out)  # round 0 keeps what it began with
    assert [event["round"] for event in events_of(out, "excluded")] == [1]


def test_a_run_without_pseudo_labels_has_none_to_look_through(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data)
    recipe["rounds"] = [{"steps": 2, "use": "online"}]
    train(write(recipe, tmp_path), tmp_path / "run")
    with refused(RunError, "online", "no pseudo labels"):
        open_round(tmp_path / "run")


def test_an_online_round_of_another_network_and_crop(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data)
    other = recipe["network"] | {"backbone": "resnet18_half", "head_channels": 8}
    recipe["rounds"] = [{"steps": 2}, {"steps": 3, "use": "online", "network": other, "crop": [33, 49]}]
    train(write(recipe, tmp_path), tmp_path / "run")
    networks = [load_network(tmp_path / "run" / f"round_{index}" / "network.safetensors") for index in (0, 1)]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert sizes[1] < sizes[0]


# --- the recipe


def planned(recipe: dict, folder: Path, *, labeled: int = 40, unlabeled: int = 60) -> list:
    loaded = load_recipe(write(recipe, folder))
    return plan_rounds(loaded, labeled=labeled, unlabeled=unlabeled, fills={0: FILL})


def test_settings_are_as_published_unless_the_recipe_says_otherwise(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"epochs": 2, "use": "online"}]
    (round_,) = planned(recipe, tmp_path)
    how = round_.online
    assert (round_.batch, how.batch, round_.pseudo_batch, round_.epoch_steps) == (2, 2, 0, 30)
    assert (how.method, how.accept, how.teacher) == ("fixmatch", Above(0.95), TeacherSettings(0.996))
    assert (how.strong.colors, how.strong.boxes, how.mixing, how.weight) == (Colors(), Boxes(), "cutmix", 1.0)
    recipe["online"] = {"method": "mean_teacher"}
    how = planned(recipe, tmp_path)[0].online
    assert (how.accept, how.teacher, how.strong.colors) == (Above(0.97), TeacherSettings(0.99), UNCHANGED)
    assert how.strong.boxes == Boxes(1.0, (0.5, 0.5), None)
    recipe["online"] = {
        "batch": 6,
        "strong_views": 2,
        "above": 0.8,
        "weight": 0.5,
        "teacher": {"result": False},
        "colors": {"jitter": [0.2, 0.2, 0.0, 0.0], "gray_share": 0.0},
        "boxes": {"share": 1.0},
    }
    recipe["rounds"][0]["epochs"] = 3
    (round_,) = planned(recipe, tmp_path)
    how = round_.online
    assert (how.batch, how.views, how.accept, how.weight) == (6, 2, Above(0.8), 0.5)
    assert how.teacher == TeacherSettings(0.996, result=False) and round_.epoch_steps == 10
    assert how.strong.colors == Colors(jitter=(0.2, 0.2, 0.0, 0.0), gray_share=0.0)
    assert how.strong.boxes == Boxes(share=1.0)
    recipe["online"] = {"aligned": {"ratio": 0.4, "window": 5}}
    assert planned(recipe, tmp_path)[0].online.accept == Aligned(0.4, 5)
    recipe["online"] |= {"align": "decisions"}
    recipe["rounds"][0]["epochs"] = 4
    assert planned(recipe, tmp_path)[0].online.accept == Realigned(Aligned(0.4, 5), 50)
    recipe["online"] = {"align": "decisions", "align_window": 20, "strength": 0.5, "bound": 3.0}
    accept = planned(recipe, tmp_path)[0].online.accept
    assert accept == Realigned(Above(0.95), 20, WeightSearch(0.5, 3.0))
    recipe["online"] = {"align": "probabilities", "class_thresholds": True}
    assert planned(recipe, tmp_path)[0].online.accept == MeanAligned(ClassThresholds())
    recipe["online"] = {"labeler": "student", "mixing": "classmix"}
    how = planned(recipe, tmp_path)[0].online
    assert how.teacher is None and how.mixing == "classmix"
    recipe["online"] = {"method": "classmix"}
    how = planned(recipe, tmp_path)[0].online
    assert (how.views, how.accept, how.mixing) == (1, Above(0.968), "classmix")
    assert how.teacher == TeacherSettings(0.99, result=False) and how.strong.colors == UNCHANGED
    recipe["online"] = {"method": "unimatch_v2"}
    how = planned(recipe, tmp_path)[0].online
    assert (how.views, how.accept, how.teacher, how.mixing) == (
        2,
        Above(0.95),
        TeacherSettings(0.996),
        "cutmix",
    )
    assert (how.strong.colors, how.strong.boxes) == (Colors(), Boxes())
    for changes, teacher in (
        ({}, None),
        ({"labeler": "teacher"}, TeacherSettings(0.996)),
        ({"teacher": {"decay": 0.9}}, TeacherSettings(0.9)),
    ):
        recipe["online"] = {"method": "unimatch", **changes}
        how = planned(recipe, tmp_path)[0].online
        assert (how.views, how.accept, how.teacher, how.mixing) == (2, Above(0.95), teacher, "cutmix")


def test_each_setting_has_its_digest(tiny_data: Path, tmp_path: Path) -> None:
    recipe, digests = recipe_dict(tiny_data), set()
    recipe["rounds"] = [{"steps": 2}]

    def digest() -> str:
        loaded = load_recipe(write(recipe, tmp_path))
        (round_,) = plan_rounds(loaded, labeled=4, unlabeled=6, fills={0: FILL})
        settings = settings_of(loaded, round_, [1] * 11, pseudo=False)
        assert len(settings.earlier_digests()) == (not digests)  # only the first is one that 0.2 knew
        return settings.digest()

    digests.add(digest())
    recipe["training"]["teacher"] = {"decay": 0.5}
    digests.add(digest())
    del recipe["training"]["teacher"]
    recipe["rounds"][0]["use"] = "online"
    digests.add(digest())
    changes = (
        {"method": "mean_teacher"},
        {"method": "classmix"},
        {"method": "cps"},
        {"above": 0.9},
        {"aligned": {"ratio": 0.4, "window": 1}},
        {"aligned": {"ratio": 0.5, "window": 1}},
        {"align": "decisions", "align_window": 1},
        {"align": "probabilities"},
        {"class_thresholds": True},
        {"align": "probabilities", "class_thresholds": True},
        {"align": "decisions", "align_window": 1, "strength": 0.5},
        {"align": "decisions", "align_window": 1, "aligned": {"ratio": 0.5, "window": 1}},
        {"batch": 4},
        {"strong_views": 2},
        {"weight": 0.5},
        {"mixing": "none"},
        {"labeler": "student"},
        {"teacher": {"decay": 0.9}},
        {"teacher": {"result": False}},
        {"colors": {"gray_share": 0.0}},
        {"boxes": {"aspect": None}},
    )
    for change in changes:
        recipe["online"] = change
        digests.add(digest())
    assert len(digests) == 3 + len(changes)


def test_keys_of_online_that_do_nothing_are_named(tiny_data: Path, tmp_path: Path) -> None:
    """No error: variants of an experiment change the rounds of a recipe, and leave its section online as it is."""
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 1}]
    assert unused_online(load_recipe(write(recipe, tmp_path))) is None
    recipe["online"] = {"method": "fixmatch", "above": 0.9}  # the method is the default
    loaded = load_recipe(write(recipe, tmp_path))
    (note,) = plan(loaded).notes
    says(note, "use: online", "online.method, online.above")
    train(tmp_path / "online.yaml", tmp_path / "run")
    assert note in [event["text"] for event in events_of(tmp_path / "run", "note")]
    # A run folder's recipe has every key: those at their defaults are not the user's.
    assert unused_online(load_recipe(tmp_path / "run" / "recipe.yaml")) == note.replace("online.method, ", "")
    changed = load_recipe(
        write(recipe_dict(tiny_data), tmp_path), ["online.weight=1.0", "rounds=[{steps: 1}]"]
    )
    assert "online.weight" in (unused_online(changed) or "")
    recipe["rounds"] = [{"steps": 2, "use": "online"}]
    assert unused_online(load_recipe(write(recipe, tmp_path))) is None


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"rounds": [{"steps": 2, "use": "online", "labeling_ratio": 0.4}]}, ["rounds.0.labeling_ratio"]),
        ({"rounds": [{"steps": 2, "use": "pseudo"}]}, ["rounds.0.use", "'online'"]),
        (
            {"online": {"method": "fixmatsch"}},
            ["online.method", "'fixmatch', 'mean_teacher', 'classmix'", "'unimatch_v2'"],
        ),
        ({"online": {"batch": 3}}, ["online.batch", "found 3", "even"]),
        ({"online": {"above": 1.5}}, ["online.above", "1.5"]),
        ({"online": {"aligned": {"ratio": 0.0}}}, ["online.aligned.ratio", "0.0"]),
        ({"online": {"aligned": {"window": 5}}}, ["online.aligned.ratio"]),
        ({"online": {"above": 0.9, "aligned": {"ratio": 0.4}}}, ["online.aligned", "online.above"]),
        ({"online": {"above": 0.9, "class_thresholds": True}}, ["online.class_thresholds", "online.above"]),
        ({"online": {"align": "probabilities", "strength": 0.5}}, ["online.strength", "align: decisions"]),
        ({"online": {"align": "decisions", "bound": 1.0}}, ["online.bound", "above 1"]),
        ({"online": {"strength": 0.5}}, ["online.strength", "online.align: decisions"]),
        ({"online": {"align_window": 10}}, ["online.align_window", "online.align: decisions"]),
        ({"online": {"align": "decisions", "method": "mean_teacher"}}, ["online.align", "use fixmatch"]),
        ({"online": {"labeler": "student", "teacher": {"decay": 0.9}}}, ["online.teacher"]),
        ({"online": {"labeler": "student", "method": "mean_teacher"}}, ["online.labeler"]),
        (
            {"online": {"method": "unimatch_v2", "strong_views": 1}},
            ["online.strong_views", "found 1", "two views"],
        ),
        ({"online": {"boxes": {"share": 1.0}, "mixing": "none"}}, ["online.boxes", "mixing: none"]),
        ({"online": {"boxes": {"share": 1.0}, "method": "classmix"}}, ["online.boxes", "mixing: classmix"]),
        ({"online": {"colors": {"blur": [2.0, 1.0]}}}, ["online.colors.blur"]),
        ({"online": {"colors": {"jitter": [0.1, 0.1, 0.1, 0.7]}}}, ["online.colors.jitter.3"]),
        ({"augmentation": {"colors": {"blur": [2.0, 1.0]}}}, ["augmentation.colors.blur"]),
        ({"training": {"teacher": {"result": False}}}, ["training.teacher.result"]),
    ],
)
def test_keys_that_do_not_work_together(
    change: dict, parts: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 2, "use": "online"}, {"steps": 2, "labeling_ratio": 0.4}]
    for section, values in change.items():
        recipe[section] = values if section == "rounds" else recipe.get(section, {}) | values
    with refused(RecipeError, *parts):
        load_recipe(write(recipe, tmp_path))


def test_a_round_that_ends_in_the_first_window_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data, above=None, aligned={"ratio": 0.4, "window": 4})
    with refused(RecipeError, "Round 2", "4 steps", "online.aligned.window"):
        planned(recipe, tmp_path)
    recipe["online"] = {"align": "decisions", "align_window": 5}
    with refused(RecipeError, "Round 0", "5 steps", "online.align_window"):
        planned(recipe, tmp_path)
    recipe["online"] = {"aligned": {"ratio": 0.4, "window": 3}}
    assert planned(recipe, tmp_path)[2].online.accept == Aligned(0.4, 3)


def test_a_teacher_of_no_round_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 2, "use": "online"}]
    recipe["training"]["teacher"] = {"decay": 0.9}
    with refused(RecipeError, "training.teacher", "online.teacher"):
        load_recipe(write(recipe, tmp_path))


def test_an_online_round_without_unlabeled_images_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 2, "use": "online"}]
    with refused(RecipeError, "Round 0", "data.unlabeled"):
        planned(recipe, tmp_path, unlabeled=0)


def test_processes_that_cannot_share_pairs_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["training"] |= {"batch": 8}
    recipe["rounds"] = [{"steps": 2, "use": "online"}]
    recipe["network"] = {"architecture": "deeplabv2", "backbone": "resnet18_half", "weights": "none"}
    recipe["network"]["output_stride"] = 16
    assert plan(load_recipe(write(recipe, tmp_path)), processes=2).rounds[0].online is not None
    with refused(RecipeError, "online.batch", "1 image(s) for each of 4 processes"):
        plan(load_recipe(write(recipe, tmp_path)), processes=4)
    recipe["online"] = {"batch": 6}
    with refused(RecipeError, "online.batch", "6 images cannot be divided among 4 processes"):
        plan(load_recipe(write(recipe, tmp_path)), processes=4)


@pytest.mark.parametrize(
    ("training", "unlabeled", "works"),
    [
        ({}, 2, True),
        ({}, 1, False),
        ({"half_batch": 8, "micro_batch": 2}, 8, True),
        ({"half_batch": 8, "micro_batch": 2}, 6, False),  # parts of 1 and 2 unlabeled images
        ({"half_batch": 4, "micro_batch": 2}, 8, False),  # parts of 1 labeled image
    ],
)
def test_passes_of_one_image_are_refused_where_means_of_images_are_normalized(
    tiny_data: Path, tmp_path: Path, training: dict, unlabeled: int, works: bool
) -> None:
    recipe = online_recipe(tiny_data, batch=unlabeled, mixing="none")
    recipe["training"] |= training
    recipe["rounds"] = [{"steps": 1, "use": "online"}]
    if works:
        train(load_recipe(write(recipe, tmp_path)), tmp_path / "run", console=QUIET)
        return
    with refused(RecipeError, "online.batch", "single image"):
        plan(load_recipe(write(recipe, tmp_path)))


def test_the_plan_says_what_is_done_and_what_memory_it_needs(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data, method="mean_teacher", strong_views=2, batch=4)
    taught = plan(load_recipe(write(recipe, tmp_path)))
    notes = [note for note in taught.notes if "learns from unlabeled images" in note]
    assert len(notes) == 2
    says(notes[0], "round 0", "mean_teacher", "4 unlabeled", "2 strong", "0.99")
    recipe["online"] |= {"above": None, "aligned": {"ratio": 0.25, "window": 2}}
    (note, _) = (
        text for text in plan(load_recipe(write(recipe, tmp_path))).notes if "unlabeled images" in text
    )
    says(note, "0.25", "class mix", "every 2 steps, nothing in the first 2")
    recipe["online"] = {"align": "decisions", "align_window": 3, "strength": 0.5}
    (note, _) = (
        text for text in plan(load_recipe(write(recipe, tmp_path))).notes if "unlabeled images" in text
    )
    recipe["online"] = {"align": "probabilities", "class_thresholds": True}
    (means, _) = (
        text for text in plan(load_recipe(write(recipe, tmp_path))).notes if "unlabeled images" in text
    )
    says(means, "ReMixMatch", "FreeMatch")
    says(note, "strength 0.5", "bound 5", "every 3 steps, plain in the first 3", "0.95")
    recipe["online"] = {"labeler": "student", "batch": 2}
    alone = plan(load_recipe(write(recipe, tmp_path)))
    parameters = 4 * taught.parameters
    assert taught.state_bytes - alone.state_bytes == parameters
    # 2 + 2 · 4 images instead of 2 + 2.
    assert taught.activation_bytes == pytest.approx(alone.activation_bytes * 10 / 4, rel=0.1)
    recipe["online"] = {"method": "unimatch", "batch": 2}
    dropped = plan(load_recipe(write(recipe, tmp_path)))
    # 2 + 3 · 2 images: two strong views, and the weak one with dropped features.
    assert dropped.activation_bytes == pytest.approx(alone.activation_bytes * 8 / 4, rel=0.1)
