"""The classifier of whole images (MLMT): its losses, schedule, views, and what it removes, against slow versions."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import Batch, stream_batches
from darseg.data.classes import IGNORE, ClassSet, distinct_colors
from darseg.data.dataset import load_example, load_image
from darseg.data.labels import read_label
from darseg.data.prediction import FINE, FLOAT16
from darseg.data.square import marks, square_examples, square_images, squared
from darseg.data.unlabeled import stream_views
from darseg.data.views import Views
from darseg.errors import DataError, RecipeError, RunError, WeightsError
from darseg.experiment.compare import seconds_of
from darseg.experiment.controls import rounds_of
from darseg.experiment.design import PlannedTrial
from darseg.experiment.folder import ExperimentFolder
from darseg.methods.mlmt import Mlmt, cosine_loss, mlmt, presence_loss, presence_of
from darseg.model.class_order import reorder_classes
from darseg.model.image_classes import ImageClasses, ImageClassifier, load_image_classes, load_imagenet
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import predict, predict_for_labeling, predict_probabilities
from darseg.model.weights import load_network, load_weights, read_spec, save_network
from darseg.model.windows import Protocol, sum_windows
from darseg.report.overview import write_report
from darseg.run.build import manifest_of
from darseg.run.check import check, plan
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import describe_decisions, evaluate, load_trained
from darseg.run.image_classes import STRONG, plan_classifier
from darseg.run.memory import memory_of_classifier
from darseg.run.rounds import train
from darseg.training.method import Learner
from darseg.training.schedule import Schedule
from test_online_runs import events_of, write
from test_run import outcome
from wording import refused, says

torch.set_num_threads(1)

CLASSES, SIDE = 4, 32
SPEC = NetworkSpec(
    "linear", "resnet18_half", CLASSES, output_stride=16, class_names=("background", "a", "b", "c")
)


def classifier(seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    return ImageClassifier("resnet18_half", CLASSES)


class Answers(ImageClassifier):
    """A classifier that gives fixed probabilities, image by image."""

    def __init__(self, presence: list[list[float]]) -> None:
        super().__init__("resnet18_half", CLASSES)
        self.presence = presence

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor(self.presence[: len(images)]).logit()


def network(seed: int = 1) -> Network:
    torch.manual_seed(seed)
    built = SPEC.build().eval()
    with torch.no_grad():
        built.head.last.weight *= 20  # ty: ignore
    return built


def picture(height: int = 60, width: int = 83, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- losses and schedule


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_images(targets: Tensor) -> Batch:
    count = len(targets)
    pixels = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    labels = torch.zeros(count, 1, 1, dtype=torch.uint8)
    return Batch(pixels, labels, tuple(map(str, range(count))), targets=targets[:, :, None, None])


def test_the_loss_of_presence_is_binary_cross_entropy() -> None:
    logits, present = random(5, CLASSES, seed=0) * 2, (random(5, CLASSES, seed=1) > 0).double()
    expected = []
    for b, k in itertools.product(range(5), range(CLASSES)):
        p = 1 / (1 + math.exp(-float(logits[b, k])))
        expected.append(-math.log(p) if present[b, k] else -math.log(1 - p))
    assert float(presence_loss(logits, of_images(present))) == pytest.approx(sum(expected) / len(expected))


def test_the_loss_of_unlabeled_images_is_one_minus_the_cosine() -> None:
    student, teacher = random(6, CLASSES, seed=2), random(6, CLASSES, seed=3)
    expected = []
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        product = sum(a * b for a, b in zip(mine, theirs, strict=True))
        lengths = math.sqrt(sum(a * a for a in mine)) * math.sqrt(sum(b * b for b in theirs))
        expected.append(1 - product / lengths)
    assert float(cosine_loss(student, of_images(teacher))) == pytest.approx(sum(expected) / 6)


def test_a_steps_loss_is_that_of_strong_views_and_the_teachers_weak_ones() -> None:
    student = classifier().double()
    how = Mlmt(epoch_steps=2, batch=2, unlabeled=3, weight=0.7, ramp=(1, 5))
    method = mlmt(Learner("classifier", student, 0.1), how, seed=(0, 1))
    with torch.no_grad():
        method.state.teacher.network.last.weight *= -0.5  # ty: ignore
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    maps = torch.full((2, SIDE, SIDE), IGNORE, dtype=torch.uint8)
    maps[0, :3], maps[1, 5, 7] = 2, 3
    labeled = Batch(pixels[:2], maps, ("l0", "l1"))
    inside, boxes = torch.ones(3, SIDE, SIDE, dtype=torch.bool), torch.zeros(1, 3, 4, dtype=torch.int32)
    views = Views(pixels[2:5], pixels[None, 5:], inside, boxes, torch.arange(40, 43), ("a", "b", "c"))

    for step, weight in ((2, 0.0), (3, 0.0), (7, 0.7 * 2 / 4)):
        batches = method.label(method.state, student, [labeled, views], step).batches
        student.train()
        loss, figures = method.loss(student.eval(), batches, step)
        expected = presence_loss(student(pixels[:2]), of_images(torch.eye(CLASSES).double()[[2, 3]]))
        assert figures["loss_labeled"] == expected
        if weight:
            mirrored = [bool((batches[1].images[row] != pixels[5 + row]).any()) for row in range(3)]
            seen = torch.stack([pixels[5 + r].flip(-1) if mirrored[r] else pixels[5 + r] for r in range(3)])
            teacher = method.state.teacher.network(pixels[2:5])  # ty: ignore
            part = cosine_loss(student(seen), of_images(teacher))
            assert figures["loss_unlabeled"] == pytest.approx(float(part))
            expected = expected + weight * part
        else:
            assert len(batches) == 1
        assert loss.item() == pytest.approx(expected.item())
    many = replace(views, weak=pixels[2:3].repeat(64, 1, 1, 1), strong=pixels[None, 5:6].repeat(1, 64, 1, 1, 1),
                   positions=torch.arange(64), ids=tuple(map(str, range(64))))  # fmt: skip
    batch = method.label(method.state, student, [labeled, many], 7).batches[1]
    flips = sum(bool((image != pixels[5]).any()) for image in batch.images)
    assert 20 < flips < 44
    assert torch.equal(batch.images[0], pixels[5]) or torch.equal(batch.images[0], pixels[5].flip(-1))


def test_the_teacher_is_the_running_average_and_the_result() -> None:
    student = classifier()
    method = mlmt(Learner("classifier", student, 0.1), Mlmt(1, decay=0.6), seed=(0, 1))
    names = [name for name, value in student.state_dict().items() if value.is_floating_point()]
    average = {name: student.state_dict()[name].clone() for name in names}
    for step in range(5):
        with torch.no_grad():
            for number, name in enumerate(names):
                student.state_dict()[name].add_(0.1 * math.sin(step + number))
        method.moved(method.state, student, {}, step)
        share = min(1 - 1 / (step + 1), 0.6)
        average = {name: share * average[name] + (1 - share) * student.state_dict()[name] for name in names}
    teacher = method.outcome(method.state, student)
    assert teacher is not student and not teacher.training
    assert all(torch.allclose(teacher.state_dict()[name], average[name], atol=1e-5) for name in names)
    assert not torch.allclose(teacher.state_dict()["last.weight"], student.state_dict()["last.weight"])


def test_planned_memory_is_what_a_step_keeps(tiny_data: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write(classified(tiny_data, batch=4, unlabeled_batch=8), tmp_path))
    planned = plan_classifier(recipe, manifest_of(recipe))
    assert planned is not None
    own = ImageClassifier("resnet18_half", planned.classes)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own.state_dict(keep_vars=True).values()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        parts = [own(torch.zeros(images, 3, SIDE, SIDE)) for images in (4, 8)]
    assert all(part.requires_grad for part in parts)
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    measured = sum(size for address, size in sizes.items() if address not in addresses)
    memory = memory_of_classifier(planned, processes=1)
    assert memory.activation_bytes == pytest.approx(measured, rel=0.01)
    assert memory.state_bytes == 16 * sum(parameter.numel() for parameter in own.parameters())
    shared = memory_of_classifier(planned, processes=2)
    small = replace(planned, stage=replace(planned.stage, micro_batch=4))
    for less in (shared, memory_of_classifier(small, processes=1)):
        assert less.activation_bytes == pytest.approx(memory.activation_bytes / 2, rel=0.01)


def test_the_weight_rises_as_published() -> None:
    """0 in epochs 0 to 10, then (epoch - 10) · 2/100, and 1 from epoch 60 on."""
    how = Mlmt(epoch_steps=82)
    for epoch in range(100):
        published = 0.0 if epoch <= 10 else min(1.0, (epoch - 10) * 2 / 100)
        for step in (0, 40, 81):
            assert how.weight_at(82 * epoch + step) == pytest.approx(published)
    assert how.weight_at(82 * 60 - 1) < 1 == how.weight_at(82 * 60)


def test_the_rate_is_torchs_cosine_from_epoch_to_epoch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.03)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-4)
    schedule = Schedule("cosine", lowest=1e-4, hold=7)
    for epoch in range(100):
        wanted = optimizer.param_groups[0]["lr"]
        rates = {schedule.rate(7 * epoch + step, 700, 0.03) for step in range(7)}
        assert len(rates) == 1 and rates.pop() == pytest.approx(wanted, rel=1e-9)
        optimizer.step()
        torchs.step()


# --- images as squares


@pytest.mark.parametrize("size", [(500, 375), (20, 31), (64, 64), (1, 5)])
def test_squares_are_torchs_antialiased_bilinear_scaling(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    wanted = F.interpolate(images.float(), (64, 64), mode="bilinear", antialias=True, align_corners=False)
    assert float((squared(images, 64) - wanted).abs().max()) <= 0.5 + 1e-3


def test_streams_show_whole_images_and_all_their_classes(tiny_data: Path, tmp_path: Path) -> None:
    manifest = manifest_of(load_recipe(write(recipe_dict(tiny_data), tmp_path)))
    how = Augmentation((SIDE, SIDE), scale=(1.0, 1.0), rotate=0.0, blur=False)
    samples = {sample.id: sample for sample in (*manifest.labeled, *manifest.unlabeled)}
    batch = next(
        stream_batches(manifest.labeled, manifest.classes, how, batch_size=6, seed=(1,),
                       load=square_examples(SIDE, load_example))
    )  # fmt: skip
    views = next(
        stream_views(manifest.unlabeled, how, STRONG, views=1, batch_size=6, seed=(1,),
                     load=square_images(SIDE, load_image))
    )  # fmt: skip
    mirrored = 0
    for name, seen in (*zip(batch.ids, batch.images, strict=True), *zip(views.ids, views.weak, strict=True)):
        image = torch.from_numpy(load_image(samples[name])).permute(2, 0, 1)[None]
        square = squared(image, SIDE)[0].to(torch.uint8)
        mirrored += torch.equal(seen, square.flip(-1))
        assert torch.equal(seen, square) or torch.equal(seen, square.flip(-1))
    assert 0 < mirrored < 12 and views.inside.all()
    assert (views.strong[0] != views.weak).any(dim=(1, 2, 3)).all()  # ty: ignore
    present = presence_of(batch.labels, len(manifest.classes))
    for name, row in zip(batch.ids, present, strict=True):
        label = load_example(samples[name], manifest.classes).label
        assert set(np.unique(label)) - {IGNORE} == set(row.nonzero().flatten().tolist())


def test_marks_hold_each_class_once() -> None:
    label = np.full((9, 9), IGNORE, np.uint8)
    label[2, 3], label[4:6] = 7, 0
    assert sorted(marks(label, 32).ravel().tolist())[:3] == [0, 7, IGNORE]


# --- what is removed


REMOVALS = [
    ((0,), 0.2, [0.1, 0.3, 0.19, 0.9], [False, False, True, False]),
    ((), 0.2, [0.1, 0.3, 0.19, 0.9], [True, False, True, False]),
    ((0, 2), 0.2, [0.1, 0.1, 0.1, 0.2], [False, True, False, False]),
    ((), 0.5, [0.1, 0.3, 0.2, 0.2], [True, False, True, True]),  # otherwise no class would be left
    ((0,), 0.5, [0.1, 0.3, 0.2, 0.2], [False, True, True, True]),
    ((0,), 0.0, [0.1, 0.0, 0.2, 0.2], [False] * 4),
]


@pytest.mark.parametrize(("keep", "threshold", "presence", "wanted"), REMOVALS)
def test_which_classes_are_removed(
    keep: tuple[int, ...], threshold: float, presence: list[float], wanted: list[bool]
) -> None:
    how = ImageClasses(Answers([presence]), SIDE, threshold, keep)
    assert how.removed([torch.from_numpy(picture())]).tolist() == [wanted]


def test_the_release_may_multiply_all_classes_by_zero() -> None:
    """Then the first class wins."""
    own = network()
    own.image_classes = ImageClasses(Answers([[0.1, 0.05, 0.19, 0.15]]), SIDE, keep=(), zero=True)
    assert own.image_classes.removed([torch.from_numpy(picture())]).all()
    assert not predict(own, picture()).classes.any()


def test_a_classifier_is_asked_about_the_whole_image() -> None:
    own = classifier().eval()
    how = ImageClasses(own, SIDE)
    images = [torch.from_numpy(picture(40, 70, 1)), torch.from_numpy(picture(33, 32, 2))]
    for image, given in zip(images, how.presence(images), strict=True):
        square = squared(image.permute(2, 0, 1)[None], SIDE)
        normalized = (square - own.mean[:, None, None]) / own.std[:, None, None]
        features = own.backbone(normalized).stage4
        assert features.shape[2:] == (1, 1)  # stride 32
        logits = own.last.weight @ features[0, :, 0, 0] + own.last.bias
        assert torch.allclose(given, logits.sigmoid(), atol=1e-5)


PROTOCOLS = {
    "windows": Protocol((33, 49)),
    "scales": Protocol((33, 49), mirror=False, scales=(0.75, 1.0)),
    "whole": Protocol("whole"),
}
PRESENCE = [[0.1, 0.6, 0.05, 0.7], [0.9, 0.1, 0.4, 0.1]]


def without(own: Network, absent: list[int]) -> Network:
    """The network whose classifier itself can no longer name these classes: a slow other way to remove them."""
    other = network()
    other.load_state_dict(own.state_dict())
    with torch.no_grad():
        other.head.last.bias[absent] = -1e5  # ty: ignore
    return other


@pytest.mark.parametrize("name", PROTOCOLS)
def test_removed_classes_are_those_that_the_network_cannot_name(name: str) -> None:
    own, protocol = network(), PROTOCOLS[name]
    plain = predict(own, picture(), protocol).classes
    gone = int(np.bincount(plain.ravel()).argmax())
    answers = [[0.1 if k == gone else 0.6 for k in range(CLASSES)]]
    own.image_classes = ImageClasses(Answers(answers), SIDE, keep=())
    removed = predict(own, picture(), protocol)
    expected = without(own, [gone])
    assert gone not in removed.classes
    assert np.array_equal(removed.classes, predict(expected, picture(), protocol).classes)
    assert np.array_equal(removed.codes, predict(expected, picture(), protocol).codes)
    probabilities = predict_probabilities(own, picture(), protocol)
    assert np.allclose(probabilities.sum(0), 1, atol=1e-5) and not probabilities[gone].any()
    for scale in (FLOAT16, FINE):
        labels = predict_for_labeling(own, picture(), protocol, scale=scale)
        wanted = predict_for_labeling(expected, picture(), protocol, scale=FINE)
        assert np.mean(labels.classes == wanted.classes) > 0.999 and gone not in labels.classes


def test_each_image_of_a_pass_loses_its_own_classes() -> None:
    own, images = network(), [picture(seed=3), picture(seed=4)]
    protocol = replace(PROTOCOLS["windows"], windows_at_once=4)
    own.image_classes = ImageClasses(Answers(PRESENCE), SIDE)
    with torch.inference_mode():
        [sums] = sum_windows(own, [*map(torch.from_numpy, images)], protocol, average="probabilities")
        for index, absent in enumerate(([2], [1, 3])):
            [alone] = sum_windows(
                without(own, absent), [torch.from_numpy(images[index])], protocol, average="probabilities"
            )
            part = sums.of_image(index, 2)
            assert torch.allclose(part.total_KHW, alone.total_KHW, atol=1e-5)


def test_a_pixel_is_certain_if_one_class_is_left() -> None:
    own = network()
    own.image_classes = ImageClasses(Answers([[0.1, 0.1, 0.0, 0.15]]), SIDE, keep=())
    assert (predict(own, picture()).classes == 3).all()
    labels = predict_for_labeling(own, picture(), PROTOCOLS["windows"])
    assert (labels.classes == 3).all() and labels.codes.min() == FLOAT16.codes - 1


def test_the_release_multiplies_by_zero() -> None:
    """So a removed class wins where all others are negative."""
    own = network()
    protocol = Protocol((65, 97), mirror=False)
    with torch.inference_mode():
        [sums] = sum_windows(own, [torch.from_numpy(picture())], protocol, average="logits")
        # At half of the pixels both kept classes are negative.
        own.head.last.bias -= sums.mean(0, 60)[[1, 3]].amax(0).median()  # ty: ignore
        [sums] = sum_windows(own, [torch.from_numpy(picture())], protocol, average="logits")
        logits = sums.mean(0, 60).clone().numpy()
    own.image_classes = ImageClasses(Answers([[0.1, 0.9, 0.1, 0.9]]), SIDE, keep=(), zero=True)
    absent = [True, False, True, False]
    expected = np.zeros((60, 83), np.uint8)
    for y, x in itertools.product(range(60), range(83)):
        values = [0.0 if absent[k] else float(logits[k, y, x]) for k in range(CLASSES)]
        expected[y, x] = values.index(max(values))
    assert 0 < (expected == 0).sum() < expected.size
    assert np.array_equal(predict_for_labeling(own, picture(), protocol, scale=FINE).classes, expected)


# --- files


def with_classifier(seed: int = 5) -> Network:
    own = network()
    own.image_classes = ImageClasses(classifier(seed), SIDE, 0.45, keep=(0, 3))
    return own


def test_a_network_is_saved_with_its_classifier(tmp_path: Path) -> None:
    own, path = with_classifier(), tmp_path / "network.safetensors"
    save_network(own, path, SPEC)
    loaded, plain = load_network(path), load_network(path, plain=True)
    for again in (loaded, plain):
        assert again.image_classes is not None and not again.image_classes.classifier.training
        assert (again.image_classes.side, again.image_classes.threshold) == (SIDE, 0.45)
        assert again.image_classes.keep == (0, 3) and not again.image_classes.zero
        image = [torch.from_numpy(picture())]
        assert torch.equal(again.image_classes.presence(image), own.image_classes.presence(image))  # ty: ignore
    assert np.array_equal(predict(loaded, picture()).codes, predict(own, picture()).codes)
    save_network(loaded, tmp_path / "again.safetensors", read_spec(path))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    # Training goes on from the network alone.
    fresh = SPEC.build()
    report = load_weights(fresh, path)
    assert fresh.image_classes is None and report.whole and not report.unused
    assert all(torch.equal(own.state_dict()[key], value) for key, value in fresh.state_dict().items())


def test_classes_in_another_order_are_removed_alike() -> None:
    order = (2, 0, 3, 1)
    own, other = with_classifier(), reorder_classes(with_classifier(), order)
    image = [torch.from_numpy(picture())]
    assert own.image_classes and other.image_classes
    assert torch.equal(
        other.image_classes.removed(image)[0], own.image_classes.removed(image)[0][list(order)]
    )
    assert other.image_classes.keep == (1, 2)
    renamed = np.array(order)[predict(other, picture()).classes]
    assert np.array_equal(renamed, predict(own, picture()).classes)


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(with_classifier(), path, SPEC)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["darseg"])

    def written(changes: dict[str, Any]) -> Path:
        content = described | {"image_classes": described["image_classes"] | changes}
        changed = tmp_path / "changed.safetensors"
        changed.write_bytes(safetensors.torch.save(tensors, {"darseg": json.dumps(content)}))
        return changed

    with refused(WeightsError, "changed.safetensors", "image classes"):
        load_network(written({"side": "wide"}))
    with refused(WeightsError, "changed.safetensors", "image classes"):
        load_network(written({"more": 1}))
    with refused(WeightsError, "changed.safetensors", "[4]", "keep"):
        load_network(written({"keep": [4]}))
    del tensors["image_classes.last.bias"]
    with refused(WeightsError, "changed.safetensors", "image_classes.last.bias", "missing"):
        load_network(written({}))
    with refused(WeightsError, "changed.safetensors", "classify.json"):
        load_image_classes(written({}))


def test_imagenets_weights_fill_the_backbone(tmp_path: Path) -> None:
    own, path = classifier(1), tmp_path / "imagenet.pth"
    state = {key: value.clone() for key, value in own.backbone.state_dict().items()}
    torch.save(state | {"fc.weight": torch.zeros(1000, 256), "fc.bias": torch.zeros(1000)}, path)
    other = classifier(2)
    head = other.last.weight.clone()
    count, unused = load_imagenet(other, path)
    assert count == len(state) and unused == ("fc.bias", "fc.weight")
    assert all(torch.equal(value, state[key]) for key, value in other.backbone.state_dict().items())
    assert torch.equal(other.last.weight, head)
    with refused(WeightsError, str(path), "resnet18", "image_classes.weights", "has shape"):
        load_imagenet(ImageClassifier("resnet18", CLASSES), path)


def test_what_a_classifier_cannot_be() -> None:
    with refused(DataError, "1.5", "16", "[4]", "0 to 3"):
        ImageClasses(classifier(), 16, 1.5, keep=(0, 4))
    with refused(RecipeError, "vgg"):
        ImageClassifier("vgg", CLASSES)
    with refused(RecipeError, "ramp"):
        Mlmt(1, ramp=(3, 3))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_exported_files_remove_classes(suffix: str, tmp_path: Path) -> None:
    """write_exported compares the file with the network itself, on images of several sizes."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    from darseg.model.export import metadata_of, write_exported

    own, images = with_classifier(), {"a": picture(), "b": picture(47, 52, 1)}
    assert own.image_classes
    presence = own.image_classes.presence([*map(torch.from_numpy, images.values())])
    middle = float(presence[:, 1:3].mean())  # between classes 1 and 2, so that one of them is removed
    own.image_classes = replace(own.image_classes, threshold=middle)
    for image in images.values():
        assert own.image_classes.removed([torch.from_numpy(image)])[0, 1:3].sum() == 1
    classes = ClassSet(SPEC.class_names, distinct_colors(CLASSES))
    parity = write_exported(own, tmp_path / f"n{suffix}", images, metadata=metadata_of(SPEC, classes, {}))
    assert parity.worst >= 0.999 and parity.reach < 1000


# --- runs


def classified(data: Path, **keys: Any) -> dict:
    recipe = recipe_dict(data)
    recipe["network"] = {
        "architecture": "linear",
        "backbone": "resnet18_half",
        "output_stride": 16,
        "weights": "none",
    }
    recipe["image_classes"] = {
        "backbone": "resnet18_half", "weights": "none", "size": SIDE, "batch": 2, "unlabeled_batch": 2,
        "epochs": 3, "ramp": [0, 2], "decay": 0.5, "threshold": 0.5,
    } | keys  # fmt: skip
    recipe["rounds"] = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4}]
    return recipe


KILLED = """
import os, signal, sys
from darseg.run.rounds import train
from darseg.run.steps import classify as step
real = step.save_checkpoint
def save(checkpoint, path):
    real(checkpoint, path)
    if checkpoint.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
step.save_checkpoint = save
train(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classified")
    train(write(classified(tiny_data), folder), folder / "run")
    return folder / "run"


def test_a_run_trains_the_classifier_first_and_saves_it_with_each_network(finished: Path) -> None:
    how = load_image_classes(finished / "round_0" / "image_classes.safetensors")
    for index in (0, 1):
        own = load_network(finished / f"round_{index}" / "network.safetensors").image_classes
        assert own is not None and own.to_json() == how.to_json()
        assert all(
            torch.equal(value, how.classifier.state_dict()[key])
            for key, value in own.classifier.state_dict().items()
        )
    assert (how.threshold, how.side, how.zero) == (0.5, SIDE, False)
    record = json.loads((finished / "round_0" / "classify.json").read_text())
    assert not list(finished.glob("round_0/classify_*"))
    [event] = events_of(finished, "classified")
    assert record["facts"]["steps"] == event["steps"] > 3
    assert 0 <= record["facts"]["removed_present"] <= 1 and 0 <= record["facts"]["removed_absent"] <= 1
    steps = events_of(finished, "classifier_step")
    assert "loss_unlabeled" not in steps[0] and steps[-1]["loss_unlabeled"] > 0


def test_predictions_of_a_run_are_those_of_its_recipe(finished: Path) -> None:
    """Evaluation, labels and predictions leave out what the classifier says is not there; a threshold of 0 does not."""
    recorded = json.loads((finished / "round_1" / "scores.json").read_text())
    scores, _ = evaluate(finished)
    assert scores.mean_iou == pytest.approx(recorded["mean_iou"], abs=1e-9)
    manifest = manifest_of(load_recipe(finished / "recipe.yaml"))
    trained = load_trained(finished)
    how = trained.network.image_classes
    assert how is not None
    for sample in manifest.validation[:2]:
        image = load_image(sample)
        removed = how.removed([torch.from_numpy(image)])[0].nonzero().flatten().tolist()
        assert removed and not {*np.unique(predict(trained.network, image).classes)} & {*removed}
    labeler = load_network(finished / "round_0" / "network.safetensors", plain=True).image_classes
    assert labeler is not None
    for sample in manifest.unlabeled[:4]:
        removed = labeler.removed([torch.from_numpy(load_image(sample))])[0].nonzero().flatten().tolist()
        kept = {*np.unique(read_label(finished / "round_1" / "labels" / f"{sample.id}.png")).tolist()}
        assert removed and not kept & {*removed}
    says(describe_decisions(finished), "plain", "classifier of whole images")
    everything = load_trained(finished, overrides=["image_classes.threshold=0.0"]).network.image_classes
    assert everything is not None
    assert not everything.removed([torch.from_numpy(load_image(manifest.validation[0]))]).any()


def test_killed_while_the_classifier_learns_it_ends_with_the_same_bytes(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path = write(classified(tiny_data), tmp_path)
    ended = forks.python("-c", KILLED, path, tmp_path / "run")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (
        list((tmp_path / "run" / "round_0").glob("classify_*"))
        and not (tmp_path / "run/round_0/classify.json").exists()
    )
    train(path, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished)
    own = "round_0/image_classes.safetensors"
    assert (tmp_path / "run" / own).read_bytes() == (finished / own).read_bytes()


KILLED_LATER = """
import os, signal, sys
from darseg.run import rounds
def evaluate_round(*args, **keys):
    os.kill(os.getpid(), signal.SIGKILL)
rounds.evaluate_round = evaluate_round
rounds.train(sys.argv[1], sys.argv[2])
"""


def test_killed_in_a_round_it_goes_on_with_the_classifier_that_is_there(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    path, run = write(classified(tiny_data), tmp_path), tmp_path / "run"
    ended = forks.python("-c", KILLED_LATER, path, run)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    record = (run / "round_0" / "classify.json").read_bytes()
    train(path, run)
    assert outcome(run) == outcome(finished)
    train(path, run)  # nothing is left to do
    assert (run / "round_0" / "classify.json").read_bytes() == record
    assert len(events_of(run, "classified")) == 1
    (run / "round_0" / "classify.json").write_bytes(
        record.replace(b"image_classes.safetensors", b"network.safetensors")
    )
    with refused(RunError, "classify.json", "'network.safetensors' is not an output"):
        RunDirectory(run).read_record(0, "classify")


def test_another_run_takes_the_classifier_over_and_its_page_has_it(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = classified(tiny_data) | {"rounds": [{"steps": 2}, {"steps": 1, "labeling_ratio": 0.6}]}
    train(write(recipe, tmp_path), run, reuse=finished)
    copied = {(event["round"], event["step"]) for event in events_of(run, "copied")}
    assert {(0, "classify"), (0, "train"), (0, "evaluate")} <= copied
    own = "round_0/image_classes.safetensors"
    assert (run / own).read_bytes() == (finished / own).read_bytes()
    assert "<th>classify</th>" in write_report(run).read_text().replace(' scope="col"', "")


def test_a_comparison_counts_the_seconds_of_the_classifier(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    folder = ExperimentFolder(tmp_path)
    shutil.copytree(finished, folder.run("with/2_seed_0"))
    recipe = load_recipe(finished / "recipe.yaml")
    planned = PlannedTrial(
        "with", 2, 0, recipe=recipe, rounds=tuple(rounds_of(recipe, labeled=4, unlabeled=8)), unlabeled=8
    )
    names = ("round_0/classify", "round_0/train", "round_1/label", "round_1/train")
    seconds = [json.loads((finished / f"{name}.json").read_text())["seconds"] for name in names]
    assert min(seconds) > 0 and seconds_of(folder, planned) == pytest.approx(sum(seconds), abs=0.002)


def test_settings_are_the_releases_by_default(tiny_data: Path, tmp_path: Path) -> None:
    recipe = classified(tiny_data)
    recipe["image_classes"] = {"weights": "none"}
    loaded = load_recipe(write(recipe, tmp_path))
    planned = plan_classifier(loaded, manifest_of(loaded))
    assert planned is not None and (planned.backbone, planned.side) == ("resnet101", 320)
    assert planned.how == Mlmt(1, batch=16, unlabeled=80, weight=1.0, ramp=(10, 60), decay=0.999)
    assert planned.stage.steps == 100 and planned.stage.schedule == Schedule("cosine", lowest=1e-4, hold=1)
    optimizer = planned.optimizer
    assert (planned.learning_rate, optimizer.momentum, optimizer.weight_decay) == (0.03, 0.9, 1e-5)
    assert optimizer.nesterov
    colors = STRONG.colors
    assert (colors.jitter, colors.jitter_share, colors.gray_share) == ((0.4, 0.4, 0.4, 0.1), 1, 0)
    assert (colors.blur, colors.blur_share, STRONG.boxes.share) == ((0.1, 2.0), 1, 0)
    other = replace(planned, side=64)
    assert planned.digest() != other.digest()
    assert planned.digest() == replace(planned, stage=replace(planned.stage, checkpoint_every=7)).digest()


def test_what_a_recipe_cannot_ask(tiny_data: Path, tmp_path: Path) -> None:
    def planned(processes: int = 1, **keys: Any):
        recipe = load_recipe(write(classified(tiny_data, **keys), tmp_path))
        return plan_classifier(recipe, manifest_of(recipe), processes)

    with refused(RecipeError, "image_classes.ramp", "[2, 5]", "3 epochs"):
        planned(ramp=[2, 5])
    with refused(RecipeError, "image_classes.ramp", "[2, 2]"):
        planned(ramp=[2, 2])
    with refused(RecipeError, "image_classes.lowest_rate", "1.0"):
        planned(lowest_rate=1.0)
    with refused(RecipeError, "image_classes.keep", "unicorn"):
        planned(keep=["unicorn"])
    with refused(
        RecipeError, "image_classes.batch", "image_classes.unlabeled_batch", "2 images", "4 processes"
    ):
        planned(processes=4)
    recipe = load_recipe(write(classified(tiny_data), tmp_path))
    with refused(RecipeError, "unlabeled"):
        plan_classifier(recipe, replace(manifest_of(recipe), unlabeled=()))


def test_plan_and_check_know_the_classifier(tiny_data: Path, tmp_path: Path) -> None:
    path = write(classified(tiny_data), tmp_path)
    note, memory = plan(path).notes
    says(note, "resnet18_half", "32x32", "3 epochs", "2 labeled and 2 unlabeled", "0.5", "none")
    says(memory, "memory", "GB", "image_classes.micro_batch")
    released = " ".join(plan(load_recipe(path, ["release_quirks=true"])).notes)
    assert released.count("logit 0") == 2  # what is done, and that it is a slip
    assert not check(path).faults
    missing = load_recipe(
        path, [f"image_classes.weights={tmp_path / 'none.pth'}", "image_classes.keep=[ghost]"]
    )
    assert any("ghost" in fault for fault in check(missing).faults)
    missing = load_recipe(path, [f"image_classes.weights={tmp_path / 'none.pth'}"])
    assert any("none.pth" in fault for fault in check(missing).faults)
