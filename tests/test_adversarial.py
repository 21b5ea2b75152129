"""Methods with a discriminator: AdvSemiSeg and s4GAN, against slow versions of their losses."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import forks
from darseg.config.text import load_recipe
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.errors import RecipeError, SizeError
from darseg.methods.adversarial import Adversarial, feeds
from darseg.methods.consistency import Supervision
from darseg.methods.figures import ACCEPTED, INSIDE, KNOWN, RIGHT
from darseg.methods.teacher import TeacherSettings
from darseg.model.discriminators import ImageDiscriminator, PixelDiscriminator
from darseg.model.network import Output
from darseg.run.check import plan
from darseg.run.online import MAKERS, PUBLISHED, fitted, online_of, undivided
from darseg.run.rounds import train
from darseg.training.checkpoint import Checkpoint
from darseg.training.method import Method
from darseg.training.optimize import SGD, Adam, faster_blocks, faster_heads
from darseg.training.stage import Stage
from test_methods import ADVSEMISEG, NARROW, S4GAN, network_learner, run
from test_online_runs import KILLED, events_of, online_recipe, write
from test_run import outcome
from test_stage import CLASSES, DEEPLAB, build
from wording import refused, says

torch.set_num_threads(1)

COUNT, SIDE = 3, 33
METHODS = {"advsemiseg": ADVSEMISEG, "s4gan": S4GAN}
each_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def narrow_discriminators(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "published" not in request.node.name:
        monkeypatch.setattr("darseg.model.discriminators.WIDTHS", NARROW)


def make(how: Adversarial, seed: Sequence[int] = (0, 1)) -> Method:
    """In float64, with judgments that differ from place to place and image to image."""
    learner = network_learner(build(DEEPLAB).double(), SGD())
    method = MAKERS[how.method](learner, how, Supervision(COUNT), seed=seed)
    with torch.no_grad():
        for parameter in method.state.discriminator.parameters():
            parameter *= 3
    method.state.discriminator.eval()  # nothing is dropped
    return method


def labeled_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (COUNT, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    void = torch.rand(labels.shape, generator=generator) < 0.2
    return Batch(pixels, labels.masked_fill(void, IGNORE), tuple(f"{seed}/{row}" for row in range(COUNT)))


def unlabeled_views(truth: bool = False) -> Views:
    batch = labeled_batch(7)
    inside = torch.ones(COUNT, SIDE, SIDE, dtype=torch.bool)
    inside[0, 20:] = False
    none = torch.zeros(0, COUNT, 4, dtype=torch.int32)
    strong = batch.images.new_zeros(0, *batch.images.shape)
    return Views(
        batch.images, strong, inside, none, torch.arange(COUNT), batch.ids, batch.labels if truth else None
    )


def doubt(method: Method, views: Views) -> None:
    """Shift the judgments of the network's predictions, so that half of the pixels are taken for true."""
    method.network.eval()
    with torch.no_grad():
        judge = method.state.discriminator
        scores = judge(method.network(views.weak).main.softmax(1))
        judge.layers[-1].bias -= scores[views.inside].median()
    method.network.train()


def fixed_network(logits: Sequence[Tensor]) -> Callable:
    """A network that answers with given logits, batch by batch."""
    answers = iter(logits)
    return lambda images: Output(next(answers), None)


def random_logits(seed: int, count: int = COUNT, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CLASSES, side, side, generator=generator, dtype=torch.float64).mul(2)


def one_hot(labels: Tensor) -> Tensor:
    maps = torch.zeros(COUNT, CLASSES, SIDE, SIDE, dtype=torch.float64)
    for b, y, x in (labels != IGNORE).nonzero().tolist():
        maps[b, int(labels[b, y, x]), y, x] = 1
    return maps


def mean_over(labels: Tensor, value: Callable[[int, int, int], Tensor]) -> Tensor:
    """The mean of a value over the pixels that are not 255, one after the other."""
    places = (labels != IGNORE).nonzero().tolist()
    return sum((value(*place) for place in places), torch.zeros((), dtype=torch.float64)) / len(places)


def cross_entropy_at(logits: Tensor, labels: Tensor) -> Callable[[int, int, int], Tensor]:
    return lambda b, y, x: -torch.log(torch.softmax(logits[b, :, y, x], 0)[int(labels[b, y, x])])


def answer(scores: Tensor, true: bool) -> Callable[..., Tensor]:
    """Binary cross-entropy of one judgment, from the sigmoid."""
    sign = 1 if true else -1
    return lambda *place: torch.log(1 + torch.exp(-sign * scores[place]))


# --- the discriminators


def test_parameters_as_published() -> None:
    """K = 21. Shapes of convolutions: outputs, inputs, 4, 4."""
    pixel, image = PixelDiscriminator(21), ImageDiscriminator(21)
    shapes = [tuple(parameter.shape) for parameter in pixel.parameters()]
    assert shapes == [
        (64, 21, 4, 4), (64,), (128, 64, 4, 4), (128,), (256, 128, 4, 4), (256,), (512, 256, 4, 4), (512,),
        (1, 512, 4, 4), (1,),
    ]  # fmt: skip
    shapes = [tuple(parameter.shape) for parameter in image.parameters()]
    assert shapes == [
        (64, 24, 4, 4), (64,), (128, 64, 4, 4), (128,), (256, 128, 4, 4), (256,), (512, 256, 4, 4), (512,),
        (1, 512), (1,),
    ]  # fmt: skip
    strides = {
        (m.stride, m.padding) for d in (pixel, image) for m in d.modules() if isinstance(m, torch.nn.Conv2d)
    }
    slopes = [
        m.negative_slope for d in (pixel, image) for m in d.modules() if isinstance(m, torch.nn.LeakyReLU)
    ]
    assert strides == {((2, 2), (1, 1))} and slopes == [0.2] * 8
    drops = [module.p for module in image.modules() if isinstance(module, torch.nn.Dropout2d)]
    assert drops == [0.5] * 3 and not any(isinstance(m, torch.nn.Dropout2d) for m in pixel.modules())


def test_judgments_have_the_places_they_should() -> None:
    """Of 1/32 of the sides, scaled up with corners on corners; and features from the mean over all places."""
    torch.manual_seed(0)
    maps = torch.rand(2, CLASSES, 64, 97, dtype=torch.float64)
    pixel = PixelDiscriminator(CLASSES).double()
    small, scores = pixel.layers(maps)[:, 0], pixel(maps)
    assert small.shape == (2, 2, 3) and scores.shape == (2, 64, 97)
    for y, x in ((0, 0), (0, 2), (1, 0), (1, 2)):
        corner = scores[:, y * 63, x * 48]
        assert torch.allclose(corner, small[:, y, x], rtol=1e-9)
    half = 0.25 * small[:, 0, 0] + 0.25 * small[:, 0, 1] + 0.25 * small[:, 1, 0] + 0.25 * small[:, 1, 1]
    middle = 0.5 * (scores[:, 31, 24] + scores[:, 32, 24])
    assert torch.allclose(middle, half, rtol=1e-9)
    image = ImageDiscriminator(CLASSES).double().eval()
    pictures = torch.randint(0, 256, (2, 3, 64, 97), dtype=torch.uint8)
    judged = image(maps, pictures)
    places = image.layers(torch.cat([maps, pictures.double() / 255], 1))
    features = sum(places[:, :, y, x] for y in range(4) for x in range(6)) / 24
    assert places.shape[2:] == (4, 6) and torch.allclose(judged.features, features)
    assert torch.allclose(judged.scores, features @ image.score.weight[0] + image.score.bias)


@each_method
def test_a_discriminator_begins_as_the_seed_says(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    network = network_learner(build(DEEPLAB), SGD())
    torch.manual_seed(5)
    states = [
        MAKERS[name](network, METHODS[name], Supervision(4), seed=seed).state.state_dict()
        for seed in ((0, 1), (0, 1), (0, 2))
    ]
    assert torch.equal(torch.rand(1), expected)  # other random numbers are not moved
    keys = [key for key in states[0] if key.endswith("weight")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert keys and not any(torch.equal(states[0][key], states[2][key]) for key in keys)


# --- AdvSemiSeg


def test_the_losses_of_advsemiseg() -> None:
    """Its four terms and the discriminator's two, pixel by pixel; and no gradient goes where it should not."""
    how = replace(ADVSEMISEG, labeled=0.3, unlabeled=0.2, self_training=0.7, above=0.5)
    method = make(how)
    judge = method.state.discriminator
    batch, views, truth = labeled_batch(1), unlabeled_views(), labeled_batch(2)
    doubt(method, views)
    batches = method.label(method.state, method.network, [batch, views, truth], 3).batches
    logits = [random_logits(seed).requires_grad_() for seed in (3, 4)]
    loss, figures = method.loss(fixed_network(logits), batches, 3)
    loss.backward()
    moved = [value.grad.clone() for value in logits]
    learned = [parameter.grad.clone() for parameter in judge.parameters()]

    inside = torch.where(views.inside, 0, IGNORE)
    pseudo = batches[2].labels
    assert 0 < (pseudo != IGNORE).sum() < views.inside.sum()
    maps = [value.softmax(1) for value in logits]
    scores = [judge(value) for value in maps]
    parts = {
        "loss_labeled": mean_over(batch.labels, cross_entropy_at(logits[0], batch.labels)),
        "loss_adversarial_labeled": mean_over(batch.labels, answer(scores[0], true=True)),
        "loss_adversarial_unlabeled": mean_over(inside, answer(scores[1], true=True)),
        "loss_self_training": mean_over(pseudo, cross_entropy_at(logits[1], pseudo)),
    }
    weights = (1, 0.3, 0.2, 0.7)
    of_network = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
    # Predictions of both kinds are one batch for the discriminator.
    both = torch.cat([batch.labels, inside])
    of_judge = 0.5 * mean_over(both, answer(judge(torch.cat(maps).detach()), true=False))
    of_judge = of_judge + 0.5 * mean_over(truth.labels, answer(judge(one_hot(truth.labels)), true=True))
    parts["loss_discriminator"] = of_judge
    assert figures.keys() == parts.keys()
    for key, value in parts.items():
        assert float(figures[key]) == pytest.approx(value.item(), rel=1e-9), key
    assert loss.item() == pytest.approx((of_network + of_judge).item(), rel=1e-9)
    for own, wanted in zip(moved, torch.autograd.grad(of_network, logits, retain_graph=True), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-9, atol=1e-15)
    for own, wanted in zip(learned, torch.autograd.grad(of_judge, [*judge.parameters()]), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("padding", [False, True], ids=["without", "with_padding"])
def test_what_advsemiseg_trains_itself_on(padding: bool) -> None:
    """The network's classes in eval mode, at pixels with a judgment of at least `above`; nothing before the start."""
    method = make(replace(ADVSEMISEG, above=0.5, start=2, padding=padding))
    streamed = [labeled_batch(1), unlabeled_views(truth=True), labeled_batch(2)]
    views = streamed[1]
    assert isinstance(views, Views) and views.truth is not None
    doubt(method, views)
    before = method.label(method.state, method.network, streamed, 1)
    assert (before.batches[2].labels == IGNORE).all() and before.figures[ACCEPTED] == 0
    statistics = {key: value.clone() for key, value in method.network.state_dict().items()}
    after = method.label(method.state, method.network, streamed, 2)
    assert all(torch.equal(value, statistics[key]) for key, value in method.network.state_dict().items())
    assert method.network.training
    method.network.eval()
    with torch.no_grad():
        probabilities = method.network(views.weak).main.softmax(1)
        trusted = torch.sigmoid(method.state.discriminator(probabilities)) >= 0.5
    learns = trusted & (views.inside | padding)
    assert 0 < learns.sum() < learns.numel()
    assert torch.equal(after.batches[2].labels.long(), torch.where(learns, probabilities.argmax(1), IGNORE))
    assert torch.equal(after.batches[1].labels != IGNORE, views.inside | padding)
    known = learns & (views.truth != IGNORE)
    wanted = {
        INSIDE: (views.inside | padding).sum(),
        ACCEPTED: learns.sum(),
        KNOWN: known.sum(),
        RIGHT: (known & (probabilities.argmax(1) == views.truth)).sum(),
    }
    assert {key: int(value) for key, value in after.figures.items()} == {
        key: int(v) for key, v in wanted.items()
    }


# --- s4GAN


def test_the_losses_of_s4gan() -> None:
    """Its three terms and the discriminator's two, image by image; and no gradient goes where it should not."""
    method = make(replace(S4GAN, unlabeled=0.4, self_training=0.7, above=0.5))
    judge = method.state.discriminator
    batch, views, truth = labeled_batch(1), unlabeled_views(truth=True), labeled_batch(2)
    batches = method.label(method.state, method.network, [batch, views, truth], 3).batches
    logits = [random_logits(seed).requires_grad_() for seed in (3, 4)]
    maps = logits[1].softmax(1) * views.inside[:, None]
    scores, features = judge(maps, views.weak)
    with torch.no_grad():  # one of the three images scores above 1/2
        judge.score.bias -= scores.sort().values[1:].mean()
    loss, figures = method.loss(fixed_network(logits), batches, 3)
    loss.backward()
    moved = [value.grad.clone() for value in logits]
    learned = [parameter.grad.clone() for parameter in judge.parameters()]

    scores, features = judge(maps, views.weak)
    real = judge(one_hot(truth.labels), truth.images)
    chosen = [row for row in range(COUNT) if 1 / (1 + math.exp(-float(scores[row].detach()))) > 0.5]
    assert len(chosen) == 1
    labels = torch.full((COUNT, SIDE, SIDE), IGNORE)
    for row in chosen:
        labels[row] = torch.where(views.inside[row], logits[1][row].argmax(0), IGNORE)
    distances = [
        abs(sum(real.features[row, k].detach() for row in range(COUNT)) / COUNT - sum(features[:, k]) / COUNT)
        for k in range(NARROW[-1])
    ]
    parts = {
        "loss_labeled": mean_over(batch.labels, cross_entropy_at(logits[0], batch.labels)),
        "loss_feature_matching": sum(distances) / len(distances),
        "loss_self_training": mean_over(labels, cross_entropy_at(logits[1], labels)),
    }
    of_network = sum(weight * part for weight, part in zip((1, 0.4, 0.7), parts.values(), strict=True))
    fake = judge(maps.detach(), views.weak)
    of_judge = 0.5 * sum(answer(fake.scores, true=False)(row) for row in range(COUNT)) / COUNT
    of_judge = of_judge + 0.5 * sum(answer(real.scores, true=True)(row) for row in range(COUNT)) / COUNT
    parts["loss_discriminator"] = of_judge
    for key, value in parts.items():
        assert float(figures[key]) == pytest.approx(value.item(), rel=1e-9), key
    assert loss.item() == pytest.approx((of_network + of_judge).item(), rel=1e-9)
    known = (labels != IGNORE) & (views.truth != IGNORE)
    assert (figures[ACCEPTED], figures[KNOWN]) == ((labels != IGNORE).sum(), known.sum())
    assert figures[RIGHT] == (known & (labels == views.truth)).sum()
    for own, wanted in zip(moved, torch.autograd.grad(of_network, logits, retain_graph=True), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-9, atol=1e-15)
    for own, wanted in zip(learned, torch.autograd.grad(of_judge, [*judge.parameters()]), strict=True):
        assert torch.allclose(own, wanted, rtol=1e-9, atol=1e-15)


def test_s4gan_leaves_out_the_first_step_and_padding() -> None:
    method = make(replace(S4GAN, above=0.0, start=1))
    streamed = [labeled_batch(1), unlabeled_views(), labeled_batch(2)]
    views = streamed[1]
    assert isinstance(views, Views)
    for step, pixels in ((0, 0), (1, int(views.inside.sum()))):
        made = method.label(method.state, method.network, streamed, step)
        _, figures = method.loss(fixed_network([random_logits(3), random_logits(4)]), made.batches, step)
        assert int(figures[ACCEPTED]) == pixels and made.figures == {INSIDE: views.inside.sum()}
        assert KNOWN not in figures
    released = make(replace(S4GAN, above=0.0, start=1, padding=True))
    made = released.label(released.state, released.network, streamed, 1)
    _, figures = released.loss(fixed_network([random_logits(3), random_logits(4)]), made.batches, 1)
    assert int(figures[ACCEPTED]) == int(made.figures[INSIDE]) == views.inside.numel()


# --- as learners


@each_method
def test_a_teacher_is_what_is_saved_if_asked_for(name: str) -> None:
    how = replace(METHODS[name], batch=4, teacher=TeacherSettings(0.9))
    ends = []
    for teacher in (how.teacher, TeacherSettings(0.9, result=False), None):
        learner = network_learner(build(DEEPLAB), SGD())
        method = MAKERS[name](learner, replace(how, teacher=teacher), Supervision(4), seed=(0, 0))
        run(method, Stage(steps=2))
        ends.append((method, method.outcome(method.state, method.network)))
    averaged, followed, plain = ends
    assert averaged[1] is averaged[0].state.teacher.network
    assert followed[1] is followed[0].network and plain[0].state.teacher is None
    weights = [end.state_dict() for _, end in ends]
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[1].items())
    assert any(not torch.equal(value, weights[2][key]) for key, value in weights[0].items())


def test_the_discriminator_has_its_own_optimizer_and_leaves_nothing_to_the_next_round() -> None:
    method = make(replace(S4GAN, batch=COUNT, learning_rate=0.002))
    network, judge = method.learners
    assert (judge.name, judge.learning_rate, judge.optimizer) == ("discriminator", 0.002, Adam((0.9, 0.99)))
    assert judge.module is method.state.discriminator and network.name == "network"
    asked = [(feed.role, feed.size, feed.strong) for feed in feeds(5, replace(S4GAN, batch=4))]
    assert asked == [("labeled", 5, 0), ("unlabeled", 4, 0), ("labeled", 5, 0)]
    parts = {"network": {}, "method": {}, "optimizer": {}, "optimizer.discriminator": {}}
    assert Checkpoint(3, parts).optimizers().parts.keys() == {"optimizer"}


def test_blocks_that_were_listed_three_times_learn_three_times_as_fast() -> None:
    factor = faster_blocks(faster_heads(10.0))
    assert factor("backbone.conv1.weight") == 1
    assert factor("backbone.layer3.4.conv2.weight") == factor("backbone.layer1.0.bn1.weight") == 3
    assert factor("backbone.layer2.0.downsample.0.weight") == 4
    assert factor("head.branches.0.weight") == 10


# --- recipes


def settings(data: Path, folder: Path, online: dict, **keys: object):
    recipe = online_recipe(data, **online)
    recipe["online"] = online
    recipe["rounds"] = [{"steps": 8, "use": "online"}]
    return load_recipe(write(recipe | keys, folder))


def test_settings_are_those_of_the_releases(tiny_data: Path, tmp_path: Path) -> None:
    advsemiseg = online_of(settings(tiny_data, tmp_path, {"method": "advsemiseg"}), 10)
    assert advsemiseg == Adversarial(
        "advsemiseg",
        batch=10,
        labeled=0.01,
        unlabeled=0.001,
        self_training=0.1,
        above=0.2,
        learning_rate=1e-4,
    )
    published = fitted(advsemiseg, index=0, steps=20_000, crop=(321, 321))
    assert isinstance(published, Adversarial) and published.start == 5000
    s4gan = online_of(settings(tiny_data, tmp_path, {"method": "s4gan"}), 8)
    assert s4gan == replace(PUBLISHED["s4gan"], batch=8)
    assert isinstance(s4gan, Adversarial)
    assert (s4gan.unlabeled, s4gan.self_training, s4gan.above, s4gan.learning_rate) == (0.1, 1, 0.6, 1e-4)
    begun = fitted(s4gan, index=0, steps=40_000, crop=(321, 321))
    assert isinstance(begun, Adversarial) and begun.start == 1
    changed = settings(
        tiny_data,
        tmp_path,
        {
            "method": "s4gan",
            "batch": 3,
            "above": 0.7,
            "teacher": {},
            "adversarial": {"learning_rate": 1e-5, "unlabeled": 0.2, "self_training": 0.5, "start": 4},
        },
        release_quirks=True,
    )
    assert online_of(changed, 8) == Adversarial(
        "s4gan", 3, labeled=0, unlabeled=0.2, self_training=0.5, above=0.7, start=4, learning_rate=1e-5, padding=True,
        teacher=TeacherSettings(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("online", "facts"),
    [
        ({"method": "fixmatch", "adversarial": {}}, ["online.adversarial", "fixmatch"]),
        (
            {"method": "advsemiseg", "mixing": "none", "weight": 0.5, "align": "decisions"},
            ["online.mixing", "online.weight", "online.align"],
        ),
        ({"method": "s4gan", "adversarial": {"labeled": 0.1}}, ["online.adversarial.labeled"]),
        ({"method": "s4gan", "adversarial": {"start": -1}}, ["online.adversarial.start"]),
    ],
)
def test_keys_that_have_no_effect_are_refused(
    online: dict, facts: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    with refused(RecipeError, *facts):
        settings(tiny_data, tmp_path, online)


def test_rounds_that_cannot_be_are_refused() -> None:
    with refused(RecipeError, "Round 2", "8 step(s)", "step 8", "online.adversarial.start"):
        fitted(replace(ADVSEMISEG, start=8), index=2, steps=8, crop=(33, 33))
    fitted(replace(ADVSEMISEG, start=8, self_training=0.0), index=2, steps=8, crop=(33, 33))
    with refused(SizeError, "32 x 32", "25 x 97"):
        fitted(ADVSEMISEG, index=0, steps=8, crop=(25, 97))
    fitted(S4GAN, index=0, steps=8, crop=(25, 97))
    assert undivided(ADVSEMISEG, 2, 4) is None and undivided(S4GAN, 1, None) is None
    says(undivided(S4GAN, 2, None) or "", "s4gan", "2 processes")
    says(undivided(S4GAN, 1, 4) or "", "s4gan", "training.micro_batch 4")


def test_a_plan_refuses_s4gan_in_micro_batches(tiny_data: Path, tmp_path: Path) -> None:
    training = {"crop": [49, 65], "batch": 8, "micro_batch": 2}
    with refused(RecipeError, "s4gan", "training.micro_batch 2"):
        plan(settings(tiny_data, tmp_path, {"method": "s4gan"}, training=training))
    planned = plan(settings(tiny_data, tmp_path, {"method": "advsemiseg"}, training=training))
    alone = plan(
        settings(tiny_data, tmp_path, {"method": "fixmatch", "labeler": "student"}, training=training)
    )
    # Weights, gradients and two averages of 4 bytes each, of five convolutions.
    discriminator = sum(
        16 * outputs * inputs + outputs for inputs, outputs in itertools.pairwise((11, *NARROW, 1))
    )
    assert planned.state_bytes - alone.state_bytes == 4 * 4 * discriminator
    # Five class maps of two images are judged, and the maps of features behind them are kept.
    kept = 2 * 5 * 4 * (49 * 65 * 11 + 24 * 32 * 8 + 12 * 16 * 8 + 6 * 8 * 16 + 3 * 4 * 16)
    assert planned.activation_bytes - alone.activation_bytes == kept


@pytest.mark.slow
@each_method
def test_killed_in_the_second_round_it_ends_with_the_same_bytes(
    name: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = online_recipe(tiny_data)
    recipe["online"] = {"method": name, "above": 0.4, "adversarial": {"start": 1}}
    recipe["rounds"] = [{"steps": 3, "use": "online"}, {"steps": 5, "use": "online"}]
    path = write(recipe, tmp_path)
    train(path, tmp_path / "whole")
    narrow = f"from darseg.model import discriminators\ndiscriminators.WIDTHS = {NARROW}\n"
    # Saved are a checkpoint of round 0, its optimizer, and a checkpoint of round 1.
    ended = forks.python("-c", narrow + KILLED, path, tmp_path / "killed", "3")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "killed" / "round_0" / "train.json").exists()
    train(path, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    last = events_of(tmp_path / "whole", "step")[-1]
    assert last["round"] == 1 and 0 < last["accepted"] <= 1 and last["loss_discriminator"] > 0
