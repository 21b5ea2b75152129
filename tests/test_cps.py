"""Cross pseudo supervision: two networks that learn from each other, against slow losses."""

from __future__ import annotations

import copy
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.classes import IGNORE
from darseg.data.colors import UNCHANGED
from darseg.data.unlabeled import Boxes, StrongViews
from darseg.errors import RecipeError
from darseg.methods.acceptance import Above, Aligned
from darseg.methods.aligned import WindowThresholds, codes_of, counted
from darseg.methods.consistency import Consistency, Supervision
from darseg.methods.cps import cps
from darseg.methods.figures import ACCEPTED, AGREED, INSIDE, KNOWN, RIGHT, STUDENT_RIGHT, TEACHER_RIGHT
from darseg.methods.teacher import TeacherSettings, in_eval_mode
from darseg.model.network import NetworkSpec
from darseg.run.build import spec_of
from darseg.run.check import plan
from darseg.run.learners import second_network
from darseg.run.online import describe_online, online_of
from darseg.run.plan import method_of, plan_rounds
from darseg.run.rounds import train
from darseg.training.method import Method
from darseg.training.optimize import SGD
from test_adversarial import fixed_network, random_logits
from test_methods import IMAGES, network_learner, seconds
from test_online import labeled_at, views_at
from test_online_runs import KILLED, events_of, online_recipe, write
from test_run import outcome
from test_stage import CLASSES, DEEPLAB, SIDE, build
from wording import refused, says

torch.set_num_threads(1)

HOW = Consistency("cps", batch=IMAGES, accept=Above(0.0), teacher=None, weight=0.7)


def make(how: Consistency = HOW) -> Method:
    """In float64."""
    network = build(DEEPLAB).double()
    learner = network_learner(network, SGD())
    return cps(learner, how, Supervision(IMAGES), seed=(0, 1), **seconds(how, network))


def losses_at(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The cross-entropy of each pixel that is not 255, one after the other."""
    chances = logits.softmax(1)
    return [
        -torch.log(chances[b, int(labels[b, y, x]), y, x])
        for b, y, x in (labels != IGNORE).nonzero().tolist()
    ]


def mean(values: Sequence[Tensor], divisor: int) -> Tensor:
    return torch.stack([*values]).sum() / divisor


def in_eval(network: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), in_eval_mode(network):
        return network(images).main


# --- a step


@pytest.mark.parametrize("mixing", ["cutmix", "none"])
def test_the_losses(mixing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel by pixel; and no gradient goes through the classes that the other network gave."""
    method, batch, views = make(replace(HOW, mixing=mixing, accept=Above(0.5))), labeled_at(), views_at()
    with torch.no_grad():
        batches = method.label(method.state, method.network, [batch, views], 1).batches
    # The labeled images, then the views; of each network.
    logits = [random_logits(seed, IMAGES, SIDE).requires_grad_() for seed in range(4)]
    monkeypatch.setattr(method.state.second, "forward", fixed_network(logits[2:]))
    loss, figures = method.loss(fixed_network(logits[:2]), batches, 1)
    loss.backward()

    sums, wanted = [], {}
    for own, labeler, view in ((0, 2, batches[1]), (2, 0, batches[2])):
        supervised = mean(losses_at(logits[own], batch.labels), int((batch.labels != IGNORE).sum()))
        inside = int(view.count())  # all of the crops but the padding, whatever is accepted
        assert 0 < (view.labels != IGNORE).sum() < inside < view.labels.numel()
        crossed = losses_at(logits[own + 1], view.labels)
        if mixing == "none":
            assert inside == int(views.inside.sum())
            classes = torch.where(batch.labels == IGNORE, IGNORE, logits[labeler].argmax(1))
            crossed += losses_at(logits[own], classes)
            inside += int((batch.labels != IGNORE).sum())
        sums.append((supervised, mean(crossed, inside)))
    wanted["loss_labeled"], wanted["loss_unlabeled"] = sums[0]
    wanted["loss_second"] = sums[1][0] + 0.7 * sums[1][1]
    total = sums[0][0] + 0.7 * sums[0][1] + wanted["loss_second"]
    assert figures.keys() == wanted.keys()
    for key, value in wanted.items():
        assert float(figures[key]) == pytest.approx(value.item(), rel=1e-9), key
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    for own, gradient in zip(logits, torch.autograd.grad(total, logits), strict=True):
        assert torch.allclose(own.grad, gradient, rtol=1e-9, atol=1e-15)


def test_each_network_learns_what_the_other_says() -> None:
    """In eval mode, mixed like the images; labeling moves nothing."""
    method, views = make(), views_at()
    networks = method.network, method.state.second
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    with torch.no_grad():
        batches = method.label(method.state, method.network, [labeled_at(), views], 0).batches
    classes = [
        in_eval(network, views.weak).argmax(1).masked_fill(~views.inside, IGNORE) for network in networks
    ]
    assert 0.02 < (classes[0] != classes[1]).double().mean() < 1
    assert all(network.training for network in networks)
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert len(batches) == 3 and torch.equal(batches[1].images, batches[2].images)
    for batch, labels in zip(batches[1:], (classes[1], classes[0]), strict=True):
        for index in range(IMAGES):
            top, left, bottom, right = views.boxes[0, index].tolist()
            wanted, box = labels[index].clone(), np.s_[top:bottom, left:right]
            wanted[box] = labels[index ^ 1][box]
            assert torch.equal(batch.labels[index].long(), wanted)


def test_reported_is_what_the_first_network_learns() -> None:
    """It is the student, and the second its teacher."""
    method, views = make(replace(HOW, accept=Above(0.5))), views_at()
    truth = torch.full((IMAGES, SIDE, SIDE), IGNORE, dtype=torch.uint8)
    truth[3:] = 1
    with torch.no_grad():
        figures = method.label(
            method.state, method.network, [labeled_at(), replace(views, truth=truth)], 10
        ).figures
        later = method.label(method.state, method.network, [labeled_at(), views], 11).figures
    first = in_eval(method.network, views.weak).argmax(1)
    confidence, second = in_eval(method.state.second, views.weak).softmax(1).max(1)
    known = views.inside.clone()
    known[:3] = False
    kept = views.inside & (confidence >= 0.5)
    wanted = {
        INSIDE: views.inside, ACCEPTED: kept, KNOWN: kept & known, RIGHT: kept & known & (second == 1),
        AGREED: views.inside & (first == second), TEACHER_RIGHT: known & (second == 1),
        STUDENT_RIGHT: known & (first == 1),
    }  # fmt: skip
    assert {name: int(figures[name]) for name in wanted} == {name: int(v.sum()) for name, v in wanted.items()}
    assert 0 < int(figures[ACCEPTED]) < int(figures[INSIDE]) and AGREED not in later


def test_each_networks_labels_have_thresholds_of_their_own() -> None:
    counts = (5, 3, 2)
    method, views = make(replace(HOW, accept=Aligned(0.5, window=1, counts=counts))), views_at()
    with torch.no_grad():
        seen = method.label(method.state, method.network, [labeled_at(), views], 0).seen
        method.moved(method.state, method.network, seen, 0)
    states = []
    for network, rule in (
        (method.state.second, method.state.acceptance),
        (method.network, method.state.own_acceptance),
    ):
        confidence, classes = in_eval(network, views.weak).softmax(1).max(1)
        wanted = WindowThresholds(CLASSES)
        histogram = counted(classes, codes_of(confidence, views.inside), CLASSES)
        wanted.follow(histogram, counts, ratio=0.5, full=True)
        assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in rule.state_dict().items())
        states.append(rule.state_dict())
    assert any(not torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_result_is_the_first_network_or_its_average() -> None:
    method = make()
    assert method.outcome(method.state, method.network) is method.network
    assert [learner.name for learner in method.learners] == ["network", "second"]
    assert method.learners[1] == replace(method.learners[0], name="second", module=method.state.second)
    averaged = make(replace(HOW, teacher=TeacherSettings(0.5)))
    with torch.no_grad():
        for parameter in averaged.network.parameters():
            parameter += 1
    averaged.moved(averaged.state, averaged.network, {}, 0)
    saved = averaged.outcome(averaged.state, averaged.network)
    assert saved is averaged.state.teacher.network
    assert all(map(torch.equal, saved.parameters(), averaged.network.parameters()))


# --- how the second network begins


def test_the_second_network_begins_with_a_head_of_its_own() -> None:
    spec = NetworkSpec("pspnet", "resnet18_half", CLASSES, 16, 8)
    network = build(spec)
    network.mean += 3  # as of weights that expect other images
    network.freeze_backbone()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    second, same, later = (second_network(network, spec, seed=seed) for seed in ((0, 1), (0, 1), (0, 2)))
    whole = second_network(network, spec, seed=(0, 1), whole=True)
    assert torch.equal(torch.rand(1), expected)  # other random numbers are not moved
    assert second.frozen and not any(parameter.requires_grad for parameter in second.backbone.parameters())
    drawn = spec.build().state_dict()
    for key, value in network.state_dict().items():
        own, of_backbone = second.state_dict()[key], key.startswith("backbone.")
        assert torch.equal(own, same.state_dict()[key])
        if of_backbone or key in ("mean", "std"):
            assert torch.equal(own, value), key
        if of_backbone and value.ndim == 4:
            assert not torch.equal(whole.state_dict()[key], value), key
        if key in ("mean", "std"):
            assert torch.equal(whole.state_dict()[key], value)
        if not of_backbone and value.ndim == 4:
            assert not torch.equal(own, value) and not torch.equal(own, later.state_dict()[key]), key
            assert float(own.std()) == pytest.approx(float(drawn[key].std()), rel=0.3), key
        if key.endswith("running_mean") and not of_backbone:
            assert value.any() and not own.any()  # no statistics of the network before


def test_a_backbone_from_random_numbers_is_drawn_again_in_its_first_round_alone(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = settings(tiny_data, tmp_path, {"method": "cps"}, network={"weights": "none"})
    recipe = recipe.model_copy(update={"rounds": recipe.rounds * 2})
    equal = []
    for round_ in plan_rounds(recipe, labeled=4, unlabeled=4, fills={0: (0, 0, 0)}):
        network = spec_of(recipe).build()
        state = method_of(recipe, round_, network, counts=(1,) * network.classes).state
        pairs = zip(network.backbone.parameters(), state.second.backbone.parameters(), strict=True)
        equal.append(all(torch.equal(first, second) for first, second in pairs))
    assert equal == [False, True]


# --- the recipe


def settings(data: Path, folder: Path, online: dict, **sections: dict):
    recipe = recipe_dict(data)
    recipe["online"], recipe["rounds"] = online, [{"steps": 8, "use": "online"}]
    for section, values in sections.items():
        recipe[section] |= values
    return load_recipe(write(recipe, folder))


def test_settings_are_as_published_unless_the_recipe_says_otherwise(tiny_data: Path, tmp_path: Path) -> None:
    how = online_of(settings(tiny_data, tmp_path, {"method": "cps"}), 4)
    boxes = Boxes(share=1.0, area=(0.25, 0.5), aspect=None)
    assert how == Consistency(
        "cps", 4, strong=StrongViews(UNCHANGED, boxes), mixing="cutmix", accept=Above(0.0), weight=1.0, teacher=None
    )  # fmt: skip
    changed = {
        "method": "cps",
        "mixing": "none",
        "weight": 1.5,
        "above": 0.7,
        "teacher": {"decay": 0.9},
        "batch": 3,
    }
    assert online_of(settings(tiny_data, tmp_path, changed), 4) == replace(
        how, batch=3, mixing="none", weight=1.5, accept=Above(0.7), teacher=TeacherSettings(0.9)
    )
    for labeler in ("teacher", "student"):
        with refused(RecipeError, "online.labeler", "cps"):
            settings(tiny_data, tmp_path, {"method": "cps", "labeler": labeler, "teacher": {}})


def test_a_plan_counts_both_networks(tiny_data: Path, tmp_path: Path) -> None:
    alone, both = (
        plan(settings(tiny_data, tmp_path, online))
        for online in ({"method": "fixmatch", "labeler": "student"}, {"method": "cps"})
    )
    assert both.state_bytes == 2 * alone.state_bytes
    assert both.activation_bytes == pytest.approx(2 * alone.activation_bytes, rel=0.02)
    says(
        both.notes[0],
        "round 0",
        "cps",
        "2 unlabeled images",
        "cutmix",
        "two networks",
        "the first",
        "weight 1",
    )
    averages = [
        describe_online(
            online_of(
                settings(tiny_data, tmp_path, {"method": "cps", "teacher": {"decay": 0.9, "result": result}}),
                2,
            )
        )
        for result in (True, False)
    ]
    says(averages[0], "two networks", "0.9", "which the round saves")
    says(averages[1], "two networks", "the first", "0.9", "not saved")
    assert "saves the first" not in averages[0]


@pytest.mark.slow
def test_killed_in_the_second_round_it_ends_with_the_same_bytes(tiny_data: Path, tmp_path: Path) -> None:
    recipe = online_recipe(tiny_data)
    recipe["online"] = {"method": "cps", "aligned": {"ratio": 0.9, "window": 2}}
    recipe["rounds"] = [{"steps": 3, "use": "online"}, {"steps": 5, "use": "online"}]
    path = write(recipe, tmp_path)
    train(path, tmp_path / "whole")
    # Saved are a checkpoint of round 0, its optimizer, and a checkpoint of round 1.
    ended = forks.python("-c", KILLED, path, tmp_path / "killed", "3")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "killed" / "round_0" / "train.json").exists()
    train(path, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    last = events_of(tmp_path / "whole", "step")[-1]
    assert last["round"] == 1 and 0 < last["accepted"] <= 1 and last["loss_second"] > 0
