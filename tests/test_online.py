"""Learning from unlabeled images while training: teacher, mixing, acceptance, and what methods are equal to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from darseg.choices import AdversarialMethod, Mixing, OnlineMethod
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.prediction import FINE
from darseg.data.views import Views
from darseg.errors import RecipeError
from darseg.methods.acceptance import Above, Aligned, Predicted, accept, acceptance_state
from darseg.methods.consistency import Consistency, OnlineState, Supervision, mixing_masks
from darseg.methods.draws import uniform
from darseg.methods.figures import (
    ACCEPTED,
    ACCEPTED_BY,
    AGREED,
    INSIDE,
    KNOWN,
    KNOWN_BY,
    RIGHT,
    RIGHT_BY,
    STUDENT_RIGHT,
    TEACHER_RIGHT,
    THRESHOLDS,
    TRUE,
)
from darseg.methods.mixing import box_mask, class_mask, mix, partners_of
from darseg.methods.self_training import self_training
from darseg.methods.teacher import Teacher, TeacherSettings, in_eval_mode, with_teacher
from darseg.model.decide import decide
from darseg.model.recompute import recompute_blocks
from darseg.run.online import MAKERS
from darseg.training.loss import cross_entropy, squared_error
from darseg.training.method import Feed, Streamed, stay
from darseg.training.optimize import SGD
from darseg.training.stage import Stage, run_stage
from test_methods import IMAGES, network_learner, run, seconds, stream_of, tensors
from test_stage import CLASSES, DEEPLAB, SIDE, build
from wording import refused

torch.set_num_threads(1)

HOW = Consistency("fixmatch", batch=IMAGES, accept=Above(0.4))
STEPS = 3
CONSISTENT = [method for method in MAKERS if method not in get_args(AdversarialMethod)]
"""Methods with strong views; those with a discriminator are in test_adversarial.py."""


def how_of(method: OnlineMethod) -> Consistency:
    return replace(HOW, method=method, views=2 if method == "unimatch_v2" else 1)


def views_at(step: int = 0, strong: int = 1) -> Views:
    views = next(stream_of(Feed("unlabeled", IMAGES, strong), 1, step, (0, 1)))
    assert isinstance(views, Views)
    return views


def labeled_at(step: int = 0) -> Batch:
    batch = next(stream_of(Feed("labeled", IMAGES), 0, step, (0, 1)))
    assert isinstance(batch, Batch)
    return batch


def make(how: Consistency, network: nn.Module | None = None, auxiliary_weight: float = 0.0):
    learner = network_learner(network or build(DEEPLAB), SGD())
    more = seconds(how, learner.module)
    return MAKERS[how.method](learner, how, Supervision(IMAGES, auxiliary_weight), seed=(0, 1), **more)


# --- the teacher


@pytest.mark.parametrize("decay", [0.0, 0.4, 0.9])
def test_the_teacher_is_the_running_average(decay: float) -> None:
    """Against the formula, for a parameter, BatchNorm's statistics and its counter."""
    student = build(DEEPLAB).double()
    teacher = Teacher(student)
    names = tuple(
        name for name in student.state_dict() if name.endswith(("weight", "running_mean", "running_var"))
    )
    wanted = {name: student.state_dict()[name].clone() for name in names}
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        with torch.no_grad():
            for value in student.state_dict().values():
                if value.is_floating_point():
                    value += torch.rand(value.shape, generator=generator, dtype=torch.float64)
                else:
                    value += 1
        teacher.follow(student, TeacherSettings(decay), step)
        stays = min(1 - 1 / (step + 1), decay)
        for name in names:
            wanted[name] = stays * wanted[name] + (1 - stays) * student.state_dict()[name]
    held = teacher.network.state_dict()
    for name in names:
        assert torch.allclose(held[name], wanted[name], rtol=1e-12)
    counters = [name for name in held if name.endswith("num_batches_tracked")]
    assert counters and all(torch.equal(held[name], student.state_dict()[name]) for name in counters)


def test_a_teacher_always_is_in_eval_mode_and_gets_no_gradients() -> None:
    state = OnlineState(build(DEEPLAB), HOW)
    state.train()
    assert state.teacher is not None
    assert not any(module.training for module in state.teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in state.parameters())


def test_a_teacher_of_a_network_that_recomputes_stands_on_its_own() -> None:
    """Blocks that recompute have a forward method that is bound to them."""
    network = build(DEEPLAB)
    recompute_blocks(network)
    teacher = Teacher(network)
    views = views_at()
    with torch.no_grad():
        before = teacher.network(views.weak).main.clone()
        for parameter in network.parameters():
            parameter += 1
        assert torch.equal(teacher.network(views.weak).main, before)


def test_an_average_changes_nothing_in_how_the_network_learns() -> None:
    learner = [network_learner(build(DEEPLAB), SGD()) for _ in range(3)]
    plain = self_training(learner[0], batch=IMAGES, pseudo_batch=IMAGES)
    averaged = with_teacher(
        self_training(learner[1], batch=IMAGES, pseudo_batch=IMAGES), TeacherSettings(0.5, result=False)
    )
    ends = [tensors(run(method, Stage(steps=STEPS))) for method in (plain, averaged)]
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    assert averaged.outcome(averaged.state, averaged.network) is averaged.network
    result = with_teacher(self_training(learner[2], batch=IMAGES), TeacherSettings(0.5))
    assert result.outcome(result.state, result.network) is not result.network


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_that_are_not_valid(decay: float) -> None:
    with refused(RecipeError, f"decay {decay}"):
        TeacherSettings(decay)


# --- draws


def test_draws_are_uniform_and_decided_by_their_keys() -> None:
    """A chi-square test of 40,000 numbers in 20 bins: beyond 50, chance has a probability of 1e-4."""
    rows, columns = torch.arange(200)[:, None], torch.arange(200)
    draws = uniform((3, 1), rows, columns)
    assert draws.shape == (200, 200) and draws.dtype == torch.float32
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    counts = torch.histc(draws, 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 50
    assert abs(float(torch.corrcoef(torch.stack([draws[:, 0], draws[:, 1]]))[0, 1])) < 0.3
    assert torch.equal(uniform((3, 1), rows[50:60], columns[7:9]), draws[50:60, 7:9])
    assert not torch.equal(uniform((3, 2), rows, columns), draws)
    assert not torch.equal(uniform((1, 3), rows, columns), draws)


def test_the_scrambling_is_splitmix64() -> None:
    """Against its definition in Python's integers."""

    def reference(value: int) -> int:
        mask = (1 << 64) - 1
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    keys = torch.tensor([0, 1, 12345, (1 << 62) + 7])
    wanted = [(reference((reference(5) + int(key)) & ((1 << 64) - 1)) >> 40) / (1 << 24) for key in keys]
    assert uniform((5,), keys).tolist() == wanted


# --- mixing


def test_boxes_are_mixed_pixel_by_pixel() -> None:
    boxes = torch.tensor([[1, 2, 4, 5], [0, 0, 0, 0], [0, 0, 5, 6], [3, 3, 3, 6]], dtype=torch.int32)
    mask, images = box_mask(boxes, (5, 6)), torch.arange(4 * 3 * 5 * 6).reshape(4, 3, 5, 6)
    mixed = mix(images, partners_of(4, images.device), mask)
    for index, (top, left, bottom, right) in enumerate(boxes.tolist()):
        wanted = images[index].clone()
        wanted[:, top:bottom, left:right] = images[(1, 0, 3, 2)[index], :, top:bottom, left:right]
        assert torch.equal(mixed[index], wanted)
    labels = images[:, 0]
    assert torch.equal(mix(labels, partners_of(4, images.device), mask), mixed[:, 0])


def test_classes_are_mixed_by_half() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 5, (6, 20, 20), generator=generator, dtype=torch.uint8)
    predicted[0] = 3  # one class: half of it, rounded down, is none
    predicted[1, :, :4] = IGNORE
    positions = torch.arange(10, 16)
    partners = partners_of(6, predicted.device)
    mask = class_mask(predicted, 5, partners, seed=(1,), positions=positions)
    for index in range(6):
        source = predicted[int(partners[index])]
        pasted = set(source[mask[index]].tolist())
        shown = set(source.unique().tolist()) - {IGNORE}
        assert len(pasted) == len(shown) // 2 and IGNORE not in pasted
        assert all(bool(mask[index][source == label].all()) for label in pasted)
    # Positions decide, not the order in a batch.
    later = class_mask(predicted[2:], 5, partners_of(4, predicted.device), seed=(1,), positions=positions[2:])
    assert torch.equal(later, mask[2:])
    assert not torch.equal(class_mask(predicted, 5, partners, seed=(2,), positions=positions), mask)


def test_an_odd_number_of_images_has_no_pairs() -> None:
    with refused(RecipeError, "3 unlabeled image(s)", "online.batch"):
        partners_of(3, torch.device("cpu"))
    with refused(RecipeError, "5 unlabeled images a step", "online.mixing"):
        Consistency("fixmatch", batch=5)
    Consistency("fixmatch", batch=5, mixing="none")


@pytest.mark.parametrize("method", CONSISTENT)
def test_a_box_of_no_area_changes_nothing(method) -> None:
    how = how_of(method)
    views = views_at(strong=how.views)
    empty = replace(views, boxes=torch.tensor([4, 4, 4, 9], dtype=torch.int32).expand(how.views, IMAGES, 4))
    batches = []
    for mixing, given in (("cutmix", empty), ("none", views), ("cutmix", views)):
        made = make(replace(how, mixing=mixing))
        with torch.no_grad():
            batches.append(made.label(made.state, made.network, [labeled_at(), given], 0).batches[-1])
    unmixed, plain, mixed = batches
    assert torch.equal(unmixed.images, plain.images) and torch.equal(unmixed.labels, plain.labels)
    assert unmixed.divisor == plain.divisor
    assert not torch.equal(mixed.images, plain.images)


def test_labels_and_padding_are_mixed_like_the_images() -> None:
    """Images whose color is their index: a pixel tells from which image its label must be."""
    made, views = make(replace(HOW, accept=Above(0.0))), views_at()
    color = torch.arange(IMAGES, dtype=torch.uint8)[None, :, None, None, None]
    views = replace(views, strong=color.expand(1, IMAGES, 3, SIDE, SIDE))
    with torch.no_grad():
        batch = made.label(made.state, made.network, [labeled_at(), views], 0).batches[1]
        labels = made.state.teacher.network(views.weak).main.argmax(1).to(torch.uint8)
    labels = labels.masked_fill(~views.inside, IGNORE)
    source = batch.images[:, 0].long()
    assert set((source - torch.arange(IMAGES)[:, None, None]).unique().tolist()) == {-1, 0, 1}
    wanted = labels.gather(0, source)
    assert torch.equal(batch.labels, wanted)
    assert batch.divisor is not None and int(batch.divisor) == int((wanted != IGNORE).sum())


# --- acceptance


def test_pixels_above_the_threshold_are_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, 4, 5, 6, generator=generator).mul(3).softmax(1)
    inside = torch.rand(2, 5, 6, generator=generator) < 0.8
    how = Above(float(probabilities.max(1).values.flatten()[7]))  # reached exactly by one pixel
    accepted = accept(how, acceptance_state(how, 2, 4), Predicted(probabilities, inside, torch.arange(2)))
    for b, y, x in np.ndindex(2, 5, 6):
        numbers = probabilities[b, :, y, x].tolist()
        label = numbers.index(max(numbers)) if inside[b, y, x] else IGNORE
        assert int(accepted.predicted[b, y, x]) == label
        assert int(accepted.labels[b, y, x]) == (label if max(numbers) >= how.threshold else IGNORE)
    spoiled = probabilities.clone()
    spoiled[0, :, 0, 0] = float("nan")  # of a network that has failed
    accepted = accept(
        Above(0.0), acceptance_state(how, 2, 4), Predicted(spoiled, inside | True, torch.arange(2))
    )
    assert int((accepted.labels == IGNORE).sum()) == 1 and int(accepted.labels[0, 0, 0]) == IGNORE
    with refused(RecipeError, "threshold 1.5"):
        Above(1.5)


def test_what_is_accepted_is_counted() -> None:
    made, views = make(HOW), views_at()
    truth = torch.full((IMAGES, SIDE, SIDE), IGNORE, dtype=torch.uint8)
    truth[:3] = 1
    with torch.no_grad():
        figures = made.label(made.state, made.network, [labeled_at(), replace(views, truth=truth)], 0).figures
        chances = made.state.teacher.network(views.weak).main.softmax(1)
    confidence, classes = chances.max(1)
    kept = (confidence >= 0.4) & views.inside
    assert int(figures[INSIDE]) == int(views.inside.sum()) and int(figures[ACCEPTED]) == int(kept.sum()) > 0
    assert int(figures[KNOWN]) == int(kept[:3].sum()) > 0
    assert int(figures[RIGHT]) == int((kept[:3] & (classes[:3] == 1)).sum())
    for k in range(CLASSES):
        labeled = kept & (classes == k)
        assert int(figures[ACCEPTED_BY][k]) == int(labeled.sum())
        assert int(figures[KNOWN_BY][k]) == int(labeled[:3].sum())
        assert int(figures[RIGHT_BY][k]) == (int(labeled[:3].sum()) if k == 1 else 0)
    assert THRESHOLDS not in figures  # one for all, which the recipe has


def test_the_student_is_compared_with_its_teacher() -> None:
    made, views = make(HOW), views_at()
    truth = torch.full((IMAGES, SIDE, SIDE), IGNORE, dtype=torch.uint8)
    truth[2:] = 1
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    streamed = [labeled_at(), replace(views, truth=truth)]
    with torch.no_grad():
        figures = made.label(made.state, made.network, streamed, 10).figures
        teacher = made.state.teacher.network(views.weak).main.argmax(1)
        with in_eval_mode(made.network):
            student = made.network(views.weak).main.argmax(1)
    known = views.inside.clone()
    known[:2] = False
    assert 0 < int(figures[AGREED]) == int((views.inside & (teacher == student)).sum()) < int(figures[INSIDE])
    assert int(figures[TRUE]) == int(known.sum()) > 0
    assert int(figures[TEACHER_RIGHT]) == int((known & (teacher == 1)).sum())
    assert int(figures[STUDENT_RIGHT]) == int((known & (student == 1)).sum())
    assert all(torch.equal(before[name], value) for name, value in made.network.state_dict().items())
    with torch.no_grad():
        other_step = made.label(made.state, made.network, streamed, 11).figures
        alone = make(replace(HOW, teacher=None))
        without = alone.label(alone.state, alone.network, streamed, 10).figures
    assert AGREED not in other_step and ACCEPTED_BY not in other_step and KNOWN in other_step
    assert AGREED not in without and ACCEPTED_BY in without


def test_thresholds_by_class_are_noted() -> None:
    made, views = make(replace(HOW, accept=Aligned(0.5, window=1, counts=(1,) * CLASSES))), views_at()
    state = made.state.acceptance
    with torch.no_grad():
        nothing = made.label(made.state, made.network, [labeled_at(), views], 0).figures[THRESHOLDS]
        state.lowest[:] = int(torch.tensor(0.25).half().view(torch.int16))
        state.lowest[0] = state.counts.shape[1]  # accepts nothing
        figures = made.label(made.state, made.network, [labeled_at(), views], 0).figures
    assert nothing.isnan().all()
    thresholds = figures[THRESHOLDS] / figures[INSIDE]
    assert thresholds[0].isnan() and thresholds[1:].tolist() == [0.25] * (CLASSES - 1)


# --- what the methods are equal to


def test_with_a_frozen_teacher_and_threshold_0_fixmatch_is_self_training() -> None:
    how = replace(HOW, accept=Above(0.0), mixing="none", weight=0.7)
    online = replace(make(how, auxiliary_weight=0.4), moved=stay)
    end = tensors(run(online, Stage(steps=STEPS)))

    teacher = build(DEEPLAB).eval()

    def pseudo(first: int) -> Iterator[Streamed]:
        for views in stream_of(Feed("unlabeled", IMAGES, strong=1), 1, first, (0, 1)):
            assert isinstance(views, Views)
            with torch.no_grad():
                logits = teacher(views.weak).main
            classes = np.stack([decide(scores, FINE).classes for scores in logits])
            labels = torch.from_numpy(classes).masked_fill(~views.inside, IGNORE)
            yield Batch(views.strong[0], labels, views.ids)

    def streams(first: int) -> Sequence[Iterator[Streamed]]:
        return [stream_of(Feed("labeled", IMAGES), 0, first, (0, 1)), pseudo(first)]

    learner = network_learner(build(DEEPLAB), SGD())
    rounds = self_training(
        learner, batch=IMAGES, pseudo_batch=IMAGES, auxiliary_weight=0.4, pseudo_weight=0.7
    )
    wanted = tensors(run_stage(rounds, streams, Stage(steps=STEPS)))
    assert all(torch.equal(end[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("method", CONSISTENT)
def test_in_bfloat16_labels_and_targets_are_computed_in_float32(method) -> None:
    made = make(replace(how_of(method), accept=Above(0.0)))
    kept: list[Batch] = []

    def keep(network, batches: Sequence[Batch], step: int):
        kept.append(batches[1])
        return made.loss(network, batches, step)

    reports = []
    run(replace(made, loss=keep), Stage(steps=1, precision="bf16", report_every=1), on_step=reports.append)
    assert (
        bool(torch.isfinite(reports[0].figures["loss"])) and float(reports[0].figures["loss_unlabeled"]) > 0
    )
    for tensor, methods in (
        (kept[0].targets, {"mean_teacher"}),
        (kept[0].weights, {"mean_teacher", "classmix"}),
    ):
        assert (tensor is None) == (method not in methods)
        assert tensor is None or tensor.dtype == torch.float32


@pytest.mark.parametrize("method", CONSISTENT)
def test_with_weight_0_the_network_learns_as_from_labeled_images_alone(method) -> None:
    online = make(replace(how_of(method), weight=0.0))
    end = tensors(run(online, Stage(steps=STEPS)))
    labeled = self_training(network_learner(build(DEEPLAB), SGD()), batch=IMAGES)
    wanted = tensors(run(labeled, Stage(steps=STEPS)))
    assert all(torch.equal(end[key], value) for key, value in wanted.items())


def test_two_views_count_as_much_as_their_mean() -> None:
    """In one step, the loss of two views is the mean of the losses of each alone."""
    both = make(replace(HOW, views=2, mixing="none"))
    views = views_at(strong=2)
    colors = torch.stack([views.strong[0], views.strong[1] // 3])
    losses = []
    for chosen in (colors, colors[:1], colors[1:]):
        method = make(replace(HOW, views=len(chosen), mixing="none"))
        with torch.no_grad():
            given = replace(views, strong=chosen, boxes=views.boxes[: len(chosen)])
            batches = method.label(method.state, method.network, [labeled_at(), given], 0).batches
            method.network.eval()
            losses.append(float(method.loss(method.network, batches, 0)[1]["loss_unlabeled"]))
    assert losses[0] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-5)
    assert losses[1] != pytest.approx(losses[2], rel=1e-2) and both.feeds[1].strong == 2


def test_the_squared_error_against_single_pixels() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, aims = (torch.randn(2, CLASSES, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    labels = torch.zeros(2, 3, 4, dtype=torch.uint8)
    batch = Batch(
        labels[:, None].expand(2, 3, 3, 4),
        labels,
        ("a", "b"),
        weights=weights,
        targets=aims.softmax(1),
        divisor=torch.tensor(19),
    )
    total = 0.0
    for b, y, x in np.ndindex(2, 3, 4):
        learned, aim = (torch.softmax(scores[b, :, y, x], 0) for scores in (logits, aims))
        total += float(weights[b, y, x]) * sum(float(difference) ** 2 for difference in learned - aim)
    assert float(squared_error(logits, batch)) == pytest.approx(total / 19, rel=1e-9)


def test_mean_teacher_matches_the_teachers_mixed_probabilities() -> None:
    made, views = make(replace(HOW, method="mean_teacher")), views_at()
    with torch.no_grad():
        batch = made.label(made.state, made.network, [labeled_at(), views], 0).batches[1]
        chances = made.state.teacher.network(views.weak).main.softmax(1)
    assert batch.targets is not None and batch.weights is not None
    for index in range(IMAGES):
        top, left, bottom, right = views.boxes[0, index].tolist()
        box, partner = np.s_[top:bottom, left:right], index ^ 1
        wanted, inside = chances[index].clone(), views.inside[index].clone()
        wanted[:, top:bottom, left:right] = chances[partner][:, top:bottom, left:right]
        inside[box] = views.inside[partner][box]
        assert torch.allclose(batch.targets[index], wanted, atol=1e-6)
        share = ((wanted.max(0).values >= 0.4) & inside).sum() / inside.sum()
        assert torch.allclose(batch.weights[index], share * inside)


@pytest.mark.parametrize("mixing", ["cutmix", "classmix"])
def test_classmix_learns_every_pixel_as_much_as_its_image_is_sure(mixing: Mixing) -> None:
    made, views = make(replace(HOW, method="classmix", mixing=mixing)), views_at()
    with torch.no_grad():
        batch = made.label(made.state, made.network, [labeled_at(), views], 0).batches[1]
        chances = made.state.teacher.network(views.weak).main.softmax(1)
        seen = SimpleNamespace(predicted=chances.argmax(1).masked_fill(~views.inside, IGNORE))
        (mixed,) = mixing_masks(mixing, views, seen, classes=CLASSES, seed=(0, 1))  # ty: ignore
    assert mixed is not None
    partners, mask = mixed
    total, inside_all = 0.0, 0
    logits = made.network(batch.images).main.detach().double()
    for index in range(IMAGES):
        pasted = mask[index]
        wanted = torch.where(pasted, chances[partners[index]], chances[index])
        inside = torch.where(pasted, views.inside[partners[index]], views.inside[index])
        image = torch.where(pasted, views.strong[0][partners[index]], views.strong[0][index])
        assert torch.equal(batch.images[index], image)
        sure = ((wanted.max(0).values >= 0.4) & inside).sum() / inside.sum()
        learned = torch.log_softmax(logits[index], 0)
        for y, x in zip(*inside.nonzero(as_tuple=True), strict=True):
            total -= float(sure) * float(learned[wanted[:, y, x].argmax(), y, x])
        inside_all += int(inside.sum())
    assert mask.any() and not mask.all()
    assert float(cross_entropy(logits, batch)) == pytest.approx(total / inside_all, rel=1e-6)


def test_labeling_by_itself_leaves_the_network_as_it_was() -> None:
    made = make(replace(HOW, teacher=None))
    network = made.network.train()
    network.backbone.eval()  # ty: ignore[call-non-callable]
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        made.label(made.state, network, [labeled_at(), views_at()], 0)
    assert [module.training for module in network.modules()] == modes and any(modes) and not all(modes)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with in_eval_mode(network):
        assert not any(module.training for module in network.modules())
