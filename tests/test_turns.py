"""Two networks in one run: rounds that name which earlier network labels, which goes on, and where another begins."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from conftest import recipe_dict
from darseg.config.recipe import Recipe, RoundConfig
from darseg.config.text import dump_recipe, load_recipe, load_saved_recipe
from darseg.data.labels import read_label
from darseg.data.splits import draw, part_bounds, part_of
from darseg.errors import Interrupted, RecipeError
from darseg.model.network import NetworkSpec
from darseg.model.weights import load_weights
from darseg.report.facts import read_data, read_run, remarks
from darseg.report.overview import write_report
from darseg.report.verdict import _cards, _steps
from darseg.run.basis import Basis, basis_of, labeling_round, trained_from
from darseg.run.browse import Repredictor, _nothing_to_open, open_round
from darseg.run.build import build_networks, manifest_of
from darseg.run.check import check, plan
from darseg.run.data_digest import digest_samples
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.label import label_folder
from darseg.run.labeled_part import labeled_samples
from darseg.run.plan import plan_rounds
from darseg.run.rounds import train
from darseg.run.steps import train as train_step
from test_run import outcome
from wording import refused, says

pytestmark = pytest.mark.usefixtures("small_network")

QUIET = Console(quiet=True)
SLOW = 1e-9
"""A learning rate that moves no weight by a visible amount."""

TURNS = [
    {"steps": 2, "labeled_part": [0.0, 0.75]},
    {"steps": 2, "use": "labeled", "continues": "none", "labeled_part": [0.25, 1.0]},
    {"steps": 2, "labeling_ratio": 0.4, "labels_from": 0, "continues": 1, "learning_rate": SLOW},
    {"steps": 2, "labeling_ratio": 0.4, "labels_from": 1, "continues": 0, "learning_rate": SLOW},
    {"steps": 2, "labeling_ratio": 0.8, "labels_from": 3, "continues": 2},
    {"steps": 2, "labeling_ratio": 0.8, "labels_from": 2, "continues": 3},
]
LABELS, WEIGHTS = {2: 0, 3: 1, 4: 3, 5: 2}, {2: 1, 3: 0, 4: 2, 5: 3}


def values_of(data: Path, **changed: Any) -> dict:
    """A recipe of two networks that label for each other, with DMT's loss; without random draws of labels."""
    values = recipe_dict(data)
    values["training"] |= {"half_batch": 1, "pseudo_batch": 3, "checkpoint_every": 1}
    values["training"]["dynamic_loss"] = {"method": "dmt", "gamma": 0.5}
    values["labeling"] = {"method": "cbst", "window": "whole", "mirror": False}
    values["evaluation"] = {"window": "whole", "mirror": False}
    return values | {"result": {"align": "off"}, "rounds": TURNS} | changed


def recipe_of(data: Path, folder: Path, **changed: Any) -> Recipe:
    path = folder / "turns.yaml"
    path.write_text(yaml.safe_dump(values_of(data, **changed), sort_keys=False))
    return load_recipe(path)


# --- the recipe


def simulated(rounds: list[dict[str, Any]]) -> list[tuple[int, Any, Any, tuple[float, float]]]:
    """Round → where its network began, its section, its crop, its span: every network is carried along by hand."""
    states: list[dict[str, Any]] = []
    for index, config in enumerate(rounds):
        named = config.get("continues")
        if index == 0:
            state = {"began": 0, "network": None, "crop": None, "done": 0}
        elif "network" in config or named == "none":
            state = states[index - 1] | {"began": index, "done": 0}
        else:
            state = dict(states[index - 1 if named is None else named])
        state |= {name: config[name] for name in ("network", "crop") if name in config}
        before = state["done"]
        state["done"] = before + config["steps"]
        states.append(state | {"span": (before / state["done"], 1.0)})
    return [(state["began"], state["network"], state["crop"], state["span"]) for state in states]


def drawn_rounds(draws: random.Random) -> list[dict[str, Any]]:
    rounds: list[dict[str, Any]] = [{"steps": draws.randint(1, 9)}]
    for index in range(1, draws.randint(2, 9)):
        config: dict[str, Any] = {"steps": draws.randint(1, 9), "use": "labeled"}
        kind = draws.choice(["before", "before", "names", "names", "none", "network"])
        if kind == "names":
            config["continues"] = draws.randrange(index)
        elif kind == "none":
            config["continues"] = "none"
        elif kind == "network":
            config["network"] = {"weights": f"{index}.pth"}
        if draws.random() < 0.3:
            config["crop"] = [draws.randint(1, 99), 9]
        rounds.append(config)
    return rounds


def test_networks_and_crops_follow_the_rounds_that_go_on(tmp_path: Path) -> None:
    base = Recipe(
        **{"data": {"root": "x", "classes": ["a", "b"]}, "network": {"weights": "none"}},
        rounds=({"steps": 1},),
    )
    draws = random.Random(0)
    for _ in range(200):
        rounds = drawn_rounds(draws)
        recipe = base.model_copy(update={"rounds": tuple(RoundConfig(**config) for config in rounds)})
        assert not list(recipe.conflicts())
        for index, (began, network, crop, span) in enumerate(simulated(rounds)):
            here = recipe.at(index)
            assert recipe.starts(index) == began and recipe.spans()[index] == pytest.approx(span)
            assert here.network.weights == (network or {"weights": "none"})["weights"]
            assert list(here.training.crop) == (crop or [713, 713])


def test_a_recipe_of_turns_is_written_and_read_back(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_data, tmp_path)
    (tmp_path / "saved.yaml").write_text(dump_recipe(recipe))
    assert load_saved_recipe(tmp_path / "saved.yaml") == recipe
    assert [config.labels_from for config in recipe.rounds] == [None, None, 0, 1, 3, 2]
    # A name that is a number is a file if it is quoted.
    named = load_recipe(tmp_path / "turns.yaml", ["rounds.2.labels_from='0'"])
    assert named.rounds[2].labels_from == str(tmp_path / "0")


WRONG = {
    "rounds.0.labels_from=0": ["rounds.0.labels_from", "found 0", "no round comes before"],
    "rounds.0.continues=0": ["rounds.0.continues", "found 0", "no round comes before"],
    "rounds.0.continues=none": ["rounds.0.continues", "remove it"],
    "rounds.2.labels_from=2": ["rounds.2.labels_from", "found 2", "the round itself", "0 to 1"],
    "rounds.2.labels_from=4": ["rounds.2.labels_from", "found 4", "a later round", "0 to 1"],
    "rounds.3.continues=3": ["rounds.3.continues", "found 3", "the round itself", "0 to 2"],
    "rounds.1={steps: 2, use: labeled, continues: 5}": [
        "rounds.1.continues",
        "found 5",
        "an earlier round, 0",
    ],
    "rounds.2.continues=-1": ["rounds.2.continues", "-1", "0"],
    "rounds.2.continues=first": ["rounds.2.continues", "'first'", "none"],
    "rounds.2.labels_from=-1": ["rounds.2.labels_from", "-1", "path"],
    "rounds.2.labels_from=yes": ["rounds.2.labels_from", "True", "path"],
    "rounds.2.network={backbone: resnet18, weights: none}": [
        "rounds.2.network",
        "round 1",
        "continues: none",
    ],
    "rounds.2.use=labeled": ["rounds.2.labeling_ratio", "rounds.2.labels_from", "use: labeled"],
    "rounds.2.labels_window=[33, 33]": ["rounds.2.labels_window", "labeling.window"],
    "rounds.0.labeled_part=[0.5, 0.5]": ["rounds.0.labeled_part", "[0.5, 0.5]"],
    "rounds.0.labeled_part=[0, 2]": ["rounds.0.labeled_part", "found 2"],
}


@pytest.mark.parametrize("override", WRONG)
def test_rounds_that_cannot_be_meant(override: str, tiny_data: Path, tmp_path: Path) -> None:
    recipe_of(tiny_data, tmp_path)
    with refused(RecipeError, *WRONG[override]):
        load_recipe(tmp_path / "turns.yaml", [override])


def test_a_part_without_an_image_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    rounds = [TURNS[0] | {"labeled_part": [0.0, 0.1]}, *TURNS[1:]]
    with refused(RecipeError, "rounds.0.labeled_part", "[0.0, 0.1]", "4 labeled"):
        plan(recipe_of(tiny_data, tmp_path, rounds=rounds))


# --- the parts of the labeled images


def test_parts_overlap_as_their_bounds_do() -> None:
    """60 of 100 are in both, 20 in each alone; the first part is what the same seed draws."""
    names = [f"{number:03d}" for number in range(100)]
    first, second = part_of(names, (0.0, 0.8), 5), part_of(names, (0.2, 1.0), 5)
    assert (len(first), len(second), len(first & second), len(first | second)) == (80, 80, 60, 100)
    assert first == set(draw(names, 80, 5)) and second == set(names) - set(draw(names, 20, 5))
    assert first == part_of(names[::-1], (0.0, 0.8), 5) != part_of(names, (0.0, 0.8), 6)
    assert [part_bounds(part, 372) for part in ((0.0, 0.8), (0.2, 1.0), (0.0, 1.0))] == [
        (0, 298),
        (74, 372),
        (0, 372),
    ]


# --- the plan


def test_a_plan_says_who_labels_and_who_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """Four labeled images: parts of three, of which a batch of two makes one step an epoch."""
    rounds = [
        {key: value for key, value in config.items() if key != "steps"} | {"epochs": 2} for config in TURNS
    ]
    recipe = recipe_of(tiny_data, tmp_path, rounds=rounds, result={"align": "off", "keep": "best"})
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch": 2})})
    assert not check(recipe, QUIET).faults
    planned = plan(recipe)
    assert [row.begins for row in planned.rounds] == [0, 1, 1, 0, 1, 0]
    assert [(row.batch, row.pseudo_batch, row.epoch_steps) for row in planned.rounds] == [
        *[(2, 0, 1)] * 2,
        *[(1, 3, 2)] * 4,
    ]
    assert [row.span for row in planned.rounds] == [
        (0, 1),
        (0, 1),
        (1 / 2, 1),
        (1 / 2, 1),
        (2 / 3, 1),
        (2 / 3, 1),
    ]
    assert [network.begins for network in planned.networks] == [0, 1]
    *lines, keep = planned.who_labels
    for index, line in enumerate(lines):
        assert line.startswith(f"round {index}: ")
        assert ("no pseudo labels" in line and "from its own weights" in line) == (index < 2)
        if index >= 2:
            says(line, f"network of round {LABELS[index]} ", f"learns from round {WEIGHTS[index]},")
    says(keep, "rounds that name no other")


def test_labels_alone_need_no_unlabeled_images(tiny_data: Path, tmp_path: Path) -> None:
    fills = dict.fromkeys((0, 1), (0, 0, 0))
    training = recipe_dict(tiny_data)["training"]
    recipe = recipe_of(tiny_data, tmp_path, rounds=TURNS[:2], training=training)
    rounds = plan_rounds(recipe, labeled=4, unlabeled=0, fills=fills)
    assert [(row.batch, row.pseudo_batch, row.steps) for row in rounds] == [(4, 0, 2)] * 2
    with refused(RecipeError, "6 rounds", "data.unlabeled"):
        plan_rounds(recipe_of(tiny_data, tmp_path), labeled=4, unlabeled=0, fills=fills)


def test_without_pseudo_labels_the_viewer_says_why(tiny_data: Path, tmp_path: Path) -> None:
    training = recipe_dict(tiny_data)["training"]
    alone = recipe_of(tiny_data, tmp_path, rounds=TURNS[:2], training=training)
    says(_nothing_to_open(1, [], alone), "use: labeled", "no pseudo labels")
    says(_nothing_to_open(1, [], recipe_of(tiny_data, tmp_path)), "yet", "darseg train")


def test_a_second_network_has_random_weights_of_its_own(tiny_data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_data, tmp_path)
    first, second = (network.state_dict() for network, _ in build_networks(recipe).values())
    assert list(first) == list(second)
    drawn = [name for name in first if first[name].ndim > 1 and "backbone.mean" not in name]
    assert drawn and not any(
        torch.equal(first[name], second[name]) for name in drawn if first[name].std() > 0
    )
    again = build_networks(recipe)[1][0].state_dict()
    assert all(torch.equal(again[name], second[name]) for name in second)


def test_weights_of_torchvisions_segmentation_networks_fill_the_backbone(tmp_path: Path) -> None:
    """Their keys begin with backbone, their heads are others, and they have no mean and deviation."""
    network = NetworkSpec("deeplabv2", "resnet18", 5, auxiliary=False).build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    normalization = {"backbone.mean", "backbone.std"} | {
        name for name in before if re.fullmatch(r"backbone\.(mean|deviation|std)", name)
    }
    theirs = {
        name: torch.rand_like(value) if value.is_floating_point() else value + 1
        for name, value in before.items()
        if name.startswith("backbone.") and name not in normalization
    }
    torch.save(theirs | {"classifier.4.weight": torch.rand(21, 256, 1, 1)}, tmp_path / "coco.pth")
    report = load_weights(network, tmp_path / "coco.pth", strict=False)
    after = network.state_dict()
    assert set(report.loaded) == set(theirs) and report.unused == ("classifier.4.weight",)
    for name, value in after.items():
        assert torch.equal(value, theirs.get(name, before[name])), name


# --- whole runs


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two networks in turns."""
    folder = tmp_path_factory.mktemp("turns")
    train(recipe_of(tiny_data, folder), folder / "run", console=QUIET)
    return folder / "run"


def weights_of(run: Path, index: int) -> dict[str, torch.Tensor]:
    """The weights that learn: tensors of several dimensions are no running statistics."""
    tensors = load_file(RunDirectory(run).network(index))
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim > 1}


def test_each_round_builds_on_the_rounds_it_names(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    folder, recipe = RunDirectory(run), load_saved_recipe(run / "recipe.yaml")
    for index, labels in LABELS.items():
        label, trained = folder.read_record(index, "label"), folder.read_record(index, "train")
        assert label is not None and trained is not None
        assert label.inputs["network"] == digest_path(folder.network(labels))
        assert trained.inputs["network"] == digest_path(folder.network(WEIGHTS[index]))
        assert basis_of(folder, recipe, index) == Basis(labels, WEIGHTS[index])
        assert (labeling_round(folder, index), trained_from(folder, index)) == (labels, WEIGHTS[index])
        assert (run / f"round_{index}" / "confidences").is_dir()
    assert [trained_from(folder, index) for index in (0, 1)] == [None, None]
    assert not (run / "round_1" / "labels").exists()
    # At this rate a round ends with the weights that it begins with.
    for index in (2, 3):
        own, other = weights_of(run, WEIGHTS[index]), weights_of(run, LABELS[index])
        for name, now in weights_of(run, index).items():
            assert torch.allclose(now, own[name], atol=1e-6, rtol=0), (index, name)
        assert (
            max(float((now - other[name]).abs().max()) for name, now in weights_of(run, index).items()) > 0.01
        )
    # The labels are those that `darseg label` makes with the network that is named, and not with the other.
    shutil.copytree(tiny_data / "images" / "u", tmp_path / "in" / "u")
    for source in (3, 2):
        out = tmp_path / f"labels_{source}"
        label_folder(run, tmp_path / "in", out, round_index=source, labeling_ratio=0.8, console=QUIET)
    for index, same in ((4, 3), (5, 2)):
        maps = sorted((run / f"round_{index}" / "labels").rglob("*.png"))
        assert len(maps) == 6
        equal = {
            source: all(
                (
                    read_label(path)
                    == read_label(tmp_path / f"labels_{source}" / path.relative_to(path.parents[1]))
                ).all()
                for path in maps
            )
            for source in (2, 3)
        }
        assert equal == {2: same == 2, 3: same == 3}


def test_a_part_of_the_labels_is_what_the_round_learns_from(run: Path) -> None:
    folder, recipe = RunDirectory(run), load_saved_recipe(run / "recipe.yaml")
    labeled = manifest_of(recipe).labeled
    parts = [labeled_samples(recipe, index, labeled) for index in range(6)]
    assert [len(part) for part in parts] == [3, 3, 4, 4, 4, 4]
    assert {sample.id for sample in parts[0]} != {sample.id for sample in parts[1]}
    for index, part in enumerate(parts):
        record = folder.read_record(index, "train")
        assert record is not None and record.inputs["labeled"] == digest_samples(part)
        assert len({sample.id for sample in part}) == len(part) and set(part) <= set(labeled)


def test_stopped_in_each_turn_the_run_ends_with_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes with the first checkpoint of every round; what is done again begins there."""
    recipe, stops, save = load_recipe(run / "recipe.yaml"), [], train_step.save_checkpoint

    def save_and_stop(checkpoint: Any, path: Path) -> None:
        save(checkpoint, path)
        if path.name.startswith("checkpoint_") and path.parent.name not in stops:
            stops.append(path.parent.name)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_step, "save_checkpoint", save_and_stop)
    for _ in TURNS:
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "run", console=QUIET)
    train(recipe, tmp_path / "run", console=QUIET)
    assert stops == [f"round_{index}" for index in range(6)]
    assert outcome(tmp_path / "run") == outcome(run)


def test_turns_that_stay_the_same_are_taken_over(run: Path, tmp_path: Path) -> None:
    """Round 4 has another labeler, so it is done again; round 5, which builds on rounds 2 and 3, is not."""
    recipe = load_recipe(run / "recipe.yaml", ["rounds.4.labels_from=0"])
    train(recipe, tmp_path / "run", reuse=run, console=QUIET)
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    copied = [(event["round"], event["step"]) for event in events if event["event"] == "copied"]
    alone, whole = ("train", "evaluate"), ("label", "train", "evaluate")
    steps = {0: alone, 1: alone, 2: whole, 3: whole, 5: whole}
    assert copied == [(index, step) for index, names in steps.items() for step in names]
    ours, theirs = outcome(tmp_path / "run"), outcome(run)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    assert changed and all(name.startswith("round_4/") for name in changed)


def test_a_run_with_other_turns_is_refused(run: Path, tmp_path: Path) -> None:
    for change in ("rounds.5.continues=2", "rounds.5.labels_from=3", "rounds.0.labeled_part=null"):
        with pytest.raises(Exception, match=re.escape(change.split("=")[0])):
            train(load_recipe(run / "recipe.yaml", [change]), run, console=QUIET)


def test_the_page_says_who_labels_and_who_goes_on(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    page = write_report(copy).read_text()
    lines = [re.sub(r"<[^>]+>", " ", line) for line in page.splitlines() if " learns " in line]
    assert len(lines) == 6
    for index, line in enumerate(lines[2:], 2):
        says(line, f"the network of round {LABELS[index]} ", f"learns from round {WEIGHTS[index]}")
    for line in lines[:2]:
        says(line, "no pseudo labels", "from its own weights")
    # Each round is compared with the round of its own network, and the steps of the result are its network's.
    facts = read_run(copy)
    means = [round_.scores.mean_iou for round_ in facts.rounds if round_.scores is not None]
    changes = [card.change for card in _cards(facts, facts.scored[-1])]
    assert changes[:2] == [None, None]
    assert changes[2:] == pytest.approx([means[index] - means[WEIGHTS[index]] for index in range(2, 6)])
    assert _steps(facts) == 3 * 2
    kept = facts.recipe.model_copy(update={"result": facts.recipe.result.model_copy(update={"keep": "best"})})
    for recipe in (facts.recipe, kept):
        listed = [remark.text for remark in remarks(replace(facts, recipe=recipe), read_data(facts))]
        lowered = {int(text.split()[1]) for text in listed if re.match(r"round \d lowered mean IoU", text)}
        assert lowered == {index for index in range(2, 6) if means[index] < means[WEIGHTS[index]]}
    # The viewer predicts again with the network that labeled.
    labeled = open_round(copy, 4)
    assert Repredictor(labeled).reachable(labeled.samples[0])
    (copy / "round_3" / "network.safetensors").unlink()
    assert not Repredictor(open_round(copy, 4)).reachable(labeled.samples[0])
    assert Repredictor(open_round(copy, 5)).reachable(labeled.samples[0])


def test_the_best_round_is_of_the_own_network_unless_a_round_is_named(run: Path) -> None:
    folder, recipe = RunDirectory(run), load_saved_recipe(run / "recipe.yaml")
    scores = [folder.scores(index).mean_iou for index in range(6)]

    def best(rounds: list[int]) -> int:
        return max(rounds, key=lambda index: (scores[index], -index))

    def changed(index: int, **update: Any) -> Recipe:
        rounds = list(recipe.rounds)
        rounds[index] = rounds[index].model_copy(update=update)
        kept = recipe.result.model_copy(update={"keep": "best"})
        return recipe.model_copy(update={"rounds": tuple(rounds), "result": kept})

    assert basis_of(folder, changed(5), 5) == Basis(2, 3)
    assert basis_of(folder, changed(5, labels_from=None), 5) == Basis(best([0, 1, 2, 3, 4]), 3)
    own = changed(5, continues=None)  # goes on with the network of round 4, which began in round 1
    assert basis_of(folder, own, 5) == Basis(2, best([1, 2, 4]))
