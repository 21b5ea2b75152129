"""DST and DMT: weights of pseudo-labeled pixels against slow oracles, confidences on the disk, whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import Batch, stream_batches
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.dataset import read_truth
from darseg.data.label_parts import Parts
from darseg.data.manifest import Sample
from darseg.data.maps import label_path, labeled_by
from darseg.data.prediction import Prediction
from darseg.errors import DataError, RecipeError, RunError
from darseg.methods.dynamic import DynamicLoss, dynamic_self_training, dynamic_weights
from darseg.methods.self_training import self_training, self_training_loss
from darseg.pseudo.assign import LabelRule
from darseg.pseudo.histogram import HistogramBuilder
from darseg.pseudo.labelset import Predictor, assign_labels, read_prediction
from darseg.pseudo.thresholds import choose_cbst
from darseg.run.check import plan
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from darseg.training.method import Learner, Method
from test_run import outcome
from test_stage import CLASSES, DEEPLAB, PSPNET, batch_at, build
from wording import refused, says

QUIET = Console(quiet=True)


# --- the loss


def weight_of(chances: Tensor, label: int, confidence: int, how: DynamicLoss) -> float:
    """The weight of one pixel, from the papers' text: probabilities [K], label, the labeler's confidence of 255."""
    if label == IGNORE:
        return 0.0
    own, winner = float(chances[label]), int(torch.argmax(chances))
    if how.method == "dst":
        return own**how.gamma
    if winner == label:
        return own**how.gamma
    if float(chances[winner]) > confidence / 255:
        return 0.0
    assert how.gamma_disagreed is not None
    return own**how.gamma_disagreed


HOWS = [
    DynamicLoss("dst", 9.0),
    DynamicLoss("dst", 0.0),
    DynamicLoss("dmt", 5.0, 5.0),
    DynamicLoss("dmt", 3.0, 1.0),
]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_weights_are_those_of_single_pixels(how: DynamicLoss) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, CLASSES, 9, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES + 1, (2, 9, 11), generator=generator).to(torch.uint8)
    labels[labels == CLASSES] = IGNORE
    confidences = torch.randint(80, 256, (2, 9, 11), generator=generator).to(torch.uint8)
    images = torch.zeros(2, 3, 9, 11, dtype=torch.uint8)
    batch = Batch(images, labels, ("a", "b"), confidences=confidences)
    weights, kinds = dynamic_weights(logits.requires_grad_(), batch, how), set()
    assert not weights.requires_grad
    for b, y, x in np.ndindex(2, 9, 11):
        chances, label = logits[b, :, y, x].detach().softmax(0), int(labels[b, y, x])
        wanted = weight_of(chances, label, int(confidences[b, y, x]), how)
        assert float(weights[b, y, x]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)
        kinds.add((label == IGNORE, label == int(chances.argmax()), wanted == 0))
    # Every case of the rule occurs: not labeled, agreed, disagreed and kept, disagreed and dropped.
    assert len(kinds) >= (4 if how.method == "dmt" else 3)


@settings(max_examples=40, deadline=None)
@given(st.floats(-8, 8), st.floats(0, 12), st.integers(0, 255))
def test_laws_of_weights(score: float, gamma: float, confidence: int) -> None:
    """Weights are from 0 to 1, fall with the power, and DMT with all certain labelers is DST where powers are equal."""
    logits = torch.tensor([score, 0.0, -1.0], dtype=torch.float64).view(1, 3, 1, 1).repeat(3, 1, 1, 1)
    labels = torch.tensor([0, 1, 2], dtype=torch.uint8).view(3, 1, 1)
    batch = Batch(
        torch.zeros(3, 3, 1, 1, dtype=torch.uint8),
        labels,
        ("a", "b", "c"),
        confidences=torch.full_like(labels, confidence),
    )
    dst = dynamic_weights(logits, batch, DynamicLoss("dst", gamma))
    dmt = dynamic_weights(logits, batch, DynamicLoss("dmt", gamma, gamma))
    assert bool(((dst >= 0) & (dst <= 1)).all()) and bool((dmt <= dst).all())
    assert bool((dynamic_weights(logits, batch, DynamicLoss("dst", gamma + 1)) <= dst).all())
    sure = replace(batch, confidences=torch.full_like(labels, 255))
    assert torch.equal(dynamic_weights(logits, sure, DynamicLoss("dmt", gamma, gamma)), dst)


def dynamic(network: Any, how: DynamicLoss, **options: Any) -> Method:
    learner = Learner("network", network, 1e-3)
    return dynamic_self_training(learner, how, batch=2, pseudo_batch=4, **options)


def loss_of(method: Method, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    loss, figures = method.loss(
        method.network, method.label(method.state, method.network, batches, 0).batches, 0
    )
    return loss, dict(figures)


@pytest.mark.parametrize("auxiliary", [0.0, 0.4])
def test_the_loss_is_that_of_one_pass_over_both_halves(auxiliary: float) -> None:
    """Pixel by pixel, over the joined batch, divided by all its labeled pixels."""
    network = build(PSPNET if auxiliary else DEEPLAB).double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.eval()
    labeled, pseudo = batch_at(0, 0).cut([2])[0], batch_at(0, 1).cut([2, 4])[1]
    how = DynamicLoss("dst", 2.0)
    method = dynamic(network, how, auxiliary_weight=auxiliary, pseudo_weight=0.7)
    loss, figures = loss_of(method, [replace(batch, divisor=None) for batch in (labeled, pseudo)])
    output = network(torch.cat([labeled.images, pseudo.images]))
    labels = torch.cat([labeled.labels, pseudo.labels])
    count, sums = int((labels != IGNORE).sum()), [0.0, 0.0]
    for b, y, x in (labels != IGNORE).nonzero().tolist():
        label, main = int(labels[b, y, x]), output.main[b, :, y, x].detach().log_softmax(0)
        weight = 1.0 if b < 2 else float(main[label].exp()) ** 2
        sums[b >= 2] -= weight * float(main[label])
        if auxiliary:
            sums[b >= 2] -= (
                auxiliary * weight * float(output.auxiliary[b, :, y, x].detach().log_softmax(0)[label])
            )
    assert float(loss.detach()) == pytest.approx((sums[0] + 0.7 * sums[1]) / count, rel=1e-5)
    assert float(figures["loss_labeled"]) == pytest.approx(sums[0] / count, rel=1e-5)
    assert float(figures["loss_pseudo"]) == pytest.approx(sums[1] / count, rel=1e-5)


def test_a_power_of_0_is_cbst_up_to_the_size_of_the_halves() -> None:
    """With BatchNorm held, each half's sum is that of plain self-training; only what it is divided by differs."""
    network = build(DEEPLAB).double().eval()
    labeled, pseudo = batch_at(0, 0), batch_at(0, 1)
    _, ours = loss_of(dynamic(network, DynamicLoss("dst", 0.0)), [labeled, pseudo])
    plain = self_training(Learner("network", network, 1e-3), batch=6, pseudo_batch=6)
    _, theirs = loss_of(plain, [labeled, pseudo])
    total = labeled.count() + pseudo.count()
    for name, batch in (("loss_labeled", labeled), ("loss_pseudo", pseudo)):
        assert float(ours[name] * total) == pytest.approx(float(theirs[name] * batch.count()), rel=1e-6)


def test_the_weights_have_no_gradient() -> None:
    """The gradient is that of CE with the weights as constants."""
    how, (labeled, pseudo) = DynamicLoss("dst", 3.0), (batch_at(0, 0), batch_at(0, 1))
    ours, theirs = (build(DEEPLAB).double().eval() for _ in range(2))
    loss_of(dynamic(ours, how), [labeled, pseudo])[0].backward()
    main = [theirs(batch.images).main for batch in (labeled, pseudo)]
    weights = dynamic_weights(main[1], pseudo, how)
    costs = [
        torch.nn.functional.cross_entropy(of, batch.labels.long(), ignore_index=IGNORE, reduction="none")
        for of, batch in zip(main, (labeled, pseudo), strict=True)
    ]
    ((costs[0].sum() + (costs[1] * weights).sum()) / (labeled.count() + pseudo.count())).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "fixed statistics"])
def test_one_pass_is_two_means_of_the_joined_output(training: bool) -> None:
    """Pixel by pixel. Where BatchNorm's statistics are fixed it equals two passes, and elsewhere it does not."""
    network = build(PSPNET).double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout2d | torch.nn.BatchNorm2d):
            module.train(training and isinstance(module, torch.nn.BatchNorm2d))
    batches = [batch_at(0, 0).cut([2])[0], batch_at(0, 1).cut([2, 4])[1]]
    labeled, pseudo = (replace(batch, divisor=None) for batch in batches)
    apart, joined = (
        self_training_loss(network, [labeled, pseudo], 0.4, pseudo_weight=0.7, one_pass=one_pass)
        for one_pass in (False, True)
    )
    output = network(torch.cat([labeled.images, pseudo.images]))
    wanted = []
    for place, batch in ((0, labeled), (2, pseudo)):
        costs = [
            -float(factor * logits[place + b, :, y, x].detach().log_softmax(0)[int(batch.labels[b, y, x])])
            for b, y, x in (batch.labels != IGNORE).nonzero().tolist()
            for factor, logits in ((1.0, output.main), (0.4, output.auxiliary))
        ]
        wanted.append(2 * sum(costs) / len(costs))
    assert float(joined[0].detach()) == pytest.approx(wanted[0] + 0.7 * wanted[1], rel=1e-5)
    parts = [float(joined[1][name]) for name in ("loss_labeled", "loss_pseudo")]
    assert parts == pytest.approx(wanted, rel=1e-5)
    same = float(joined[0].detach()) == pytest.approx(float(apart[0].detach()), rel=1e-6)
    assert same == (not training)


def test_powers_below_0_are_refused() -> None:
    with refused(RecipeError, "-1"):
        DynamicLoss("dst", -1.0)


# --- confidences next to label maps


@pytest.fixture
def drawn(tmp_path: Path) -> Sample:
    """An image whose confidences are 10 times its labels, wherever there are labels."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 20, (40, 60)).astype(np.uint8)
    labels[:, :9] = IGNORE
    for folder, values in (("labels", labels), ("confidences", np.where(labels == IGNORE, 7, labels * 10))):
        path = label_path(tmp_path / folder, "a/b")
        path.parent.mkdir(parents=True)
        assert cv2.imwrite(str(path), values.astype(np.uint8))
    image = tmp_path / "b.png"
    assert cv2.imwrite(str(image), generator.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    (sample,) = labeled_by(tmp_path / "labels", [Sample("a/b", image)], tmp_path / "confidences")
    return sample


CLASSES_20 = ClassSet(tuple(f"class{k}" for k in range(20)), ((0, 0, 0),) * 20)


def test_confidences_move_with_their_labels(drawn: Sample) -> None:
    """Scaled, rotated, mirrored, cropped and padded alike; the labels stay those of a stream without confidences."""
    how = Augmentation((33, 49), scale=(0.4, 2.0))
    streams = [
        stream_batches([sample], CLASSES_20, how, batch_size=3, seed=(1,))
        for sample in (drawn, replace(drawn, confidence=None))
    ]
    for _ in range(4):
        batch, plain = (next(stream) for stream in streams)
        assert batch.confidences is not None and plain.confidences is None
        assert torch.equal(batch.labels, plain.labels) and torch.equal(batch.images, plain.images)
        labeled = batch.labels != IGNORE
        assert bool(labeled.any()) and not bool(labeled.all())
        assert torch.equal(batch.confidences[labeled], 10 * batch.labels[labeled])
    for stream in streams:
        stream.close()  # ty: ignore[unresolved-attribute]


def test_confidences_of_another_size_are_refused(drawn: Sample) -> None:
    assert drawn.confidence is not None
    assert cv2.imwrite(str(drawn.confidence), np.zeros((40, 59), np.uint8))
    stream = stream_batches([drawn], CLASSES_20, Augmentation((9, 9)), batch_size=1, seed=(1,))
    with refused(DataError, str(drawn.confidence), str(drawn.label), "[40, 59]", "[40, 60]"):
        next(stream)


# --- whole runs


def dynamic_recipe(data: Path, how: dict[str, Any], **training: Any) -> dict[str, Any]:
    """A round on the labels alone and one on pseudo labels, of one labeled image with three others a step."""
    recipe = recipe_dict(data)
    recipe["training"] |= {"half_batch": 1, "pseudo_batch": 3, "dynamic_loss": how} | training
    recipe["labeling"] = {"method": "cbst", "window": "whole", "mirror": False, "keep_predictions": True}
    recipe["result"] = {"align": "off"}
    recipe["rounds"] = [{"steps": 1}, {"steps": 2, "labeling_ratio": 0.6}]
    return recipe


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with DMT's loss, whose network labels for itself."""
    folder = tmp_path_factory.mktemp("dynamic")
    recipe = write(dynamic_recipe(tiny_data, {"method": "dmt", "gamma": 0.5}), folder / "dmt.yaml")
    train(load_recipe(recipe), folder / "run", console=QUIET)
    return folder / "run"


def test_dmt_keeps_how_sure_the_labeler_was(finished: Path) -> None:
    run = RunDirectory(finished)
    maps = sorted((finished / "round_1" / "confidences").rglob("*.png"))
    labels = sorted((finished / "round_1" / "labels").rglob("*.png"))
    assert [path.name for path in maps] == [path.name for path in labels] and len(maps) == 6
    for path in maps:
        name = path.relative_to(finished / "round_1" / "confidences").with_suffix("").as_posix()
        prediction = read_prediction(run.predictions(1), name)
        assert prediction is not None
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8
        assert np.abs(stored / 255 - prediction.confidence).max() <= 0.5 / 255 + 1e-6
    record = json.loads((finished / "round_1" / "label.json").read_text())
    assert "confidences" in record["outputs"]
    assert "confidences" in json.loads((finished / "round_1" / "train.json").read_text())["inputs"]
    assert not (finished / "round_0" / "confidences").exists()


def test_dst_stores_nothing_more_and_its_labels_are_not_reused_for_dmt(
    tiny_data: Path, finished: Path, tmp_path: Path
) -> None:
    """The labels are the same, the training is another."""
    recipe = write(dynamic_recipe(tiny_data, {"method": "dst", "gamma": 1.0}), tmp_path / "dst.yaml")
    train(load_recipe(recipe), tmp_path / "dst", reuse=finished, console=QUIET)
    assert not (tmp_path / "dst" / "round_1" / "confidences").exists()
    dst, wanted = (outcome(folder) for folder in (tmp_path / "dst", finished))
    maps = [name for name in dst if name.endswith(".png")]
    assert maps and all(dst[name] == wanted[name] for name in maps)
    assert dst["round_1/network.safetensors"] != wanted["round_1/network.safetensors"]
    dmt = write(dynamic_recipe(tiny_data, {"method": "dmt", "gamma": 0.5}), tmp_path / "dmt.yaml")
    train(load_recipe(dmt), tmp_path / "dmt", reuse=tmp_path / "dst", console=QUIET)
    assert outcome(tmp_path / "dmt") == wanted
    events = [json.loads(line) for line in (tmp_path / "dmt" / "journal.jsonl").read_text().splitlines()]
    copied = {(event["round"], event["step"]) for event in events if event["event"] == "copied"}
    assert copied == {(0, "train"), (0, "evaluate")}


def test_a_confidence_map_that_is_lost_while_labeling_is_made_again(tmp_path: Path) -> None:
    """One was never written and one is cut off: these two images are predicted again, no others."""
    generator, samples = np.random.default_rng(1), [Sample(f"a/{k}", tmp_path / f"{k}.png") for k in range(4)]
    made = {
        sample.id: Prediction(
            generator.integers(0, 3, (6, 7)).astype(np.uint8),
            generator.uniform(0, 1, (6, 7)).astype(np.float16).view(np.uint16),
        )
        for sample in samples
    }
    asked: list[str] = []

    def predict(sample: Sample, content: object) -> Prediction:
        asked.append(sample.id)
        return made[sample.id]

    builder = HistogramBuilder(3)
    for prediction in made.values():
        builder.add(prediction)
    rule = LabelRule(choose_cbst(builder.build(), 0.5), seed=0)
    predictor, folders = (
        Predictor(lambda sample: None, predict, None),
        [tmp_path / n for n in ("labels", "sure")],
    )

    def assign() -> dict[Path, bytes]:
        assign_labels(samples, rule, predictor, labels=folders[0], confidences=folders[1])
        return {path: path.read_bytes() for folder in folders for path in folder.rglob("*.png")}

    whole = assign()
    for sample in samples:
        stored = cv2.imread(str(label_path(folders[1], sample.id)), cv2.IMREAD_UNCHANGED)
        assert np.abs(stored / 255 - made[sample.id].confidence).max() <= 0.5 / 255 + 1e-6
    asked.clear()
    label_path(folders[1], "a/1").unlink()
    cut = label_path(folders[1], "a/2")
    cut.write_bytes(cut.read_bytes()[:-9])
    assert assign() == whole and sorted(asked) == ["a/1", "a/2"]


def test_a_changed_confidence_map_is_noticed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = next((run / "round_1" / "confidences").rglob("*.png"))
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert cv2.imwrite(str(path), 255 - values)
    with refused(RunError, "round_1", "confidences"):
        train(load_recipe(run / "recipe.yaml"), run, console=QUIET)


def test_the_plan_of_a_dynamic_loss(tiny_data: Path, tmp_path: Path) -> None:
    """Six unlabeled images, three a step: an epoch is two steps."""
    recipe = dynamic_recipe(tiny_data, {"method": "dmt", "gamma": 3.0})
    recipe["rounds"] = [{"epochs": 3}, {"epochs": 3, "labeling_ratio": 0.6}]
    planned = plan(load_recipe(write(recipe, tmp_path / "r.yaml")))
    assert [(row.batch, row.pseudo_batch, row.steps) for row in planned.rounds] == [(4, 0, 3), (1, 3, 6)]
    (note,) = planned.notes
    says(note, "dmt", "power 3", "(3 where", "both")
    small = plan(load_recipe(tmp_path / "r.yaml", ["training.pseudo_batch=1"]))
    assert small.activation_bytes <= planned.activation_bytes
    with refused(RecipeError, "training.pseudo_batch: 3", "2 processes"):
        plan(load_recipe(tmp_path / "r.yaml", ["training.half_batch=2"]), processes=2)


def test_a_dynamic_loss_without_pseudo_labels_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    recipe = dynamic_recipe(tiny_data, {"method": "dst"})
    recipe["rounds"] = [{"steps": 3}]
    with refused(RecipeError, "training.dynamic_loss", "training.pseudo_batch", "pseudo labels"):
        load_recipe(write(recipe, tmp_path / "r.yaml"))


ALONE = ("rounds=[{steps: 1}]", "training.half_batch=null", "training.pseudo_batch=null")
"""What makes a control of the recipe: the labels alone."""


def test_pooled_batchnorm_takes_one_labeled_image_with_others(tiny_data: Path, tmp_path: Path) -> None:
    """PSPNet needs two images in a pass, and with a dynamic loss or `one_pass` has them."""
    recipe = dynamic_recipe(tiny_data, {"method": "dst"}, pseudo_batch=1)
    planned = plan(load_recipe(write(recipe, tmp_path / "r.yaml")))
    assert [(row.batch, row.pseudo_batch) for row in planned.rounds] == [(4, 0), (1, 1)]
    del recipe["training"]["dynamic_loss"]
    with refused(RecipeError, "training.half_batch", "found 1"):
        load_recipe(write(recipe, tmp_path / "r.yaml"))
    joined = plan(load_recipe(tmp_path / "r.yaml", ["training.one_pass=true"]))
    assert [(row.batch, row.pseudo_batch) for row in joined.rounds] == [(4, 0), (1, 1)]
    (note,) = joined.notes
    says(note, "one pass", "together")
    assert not plan(load_recipe(tmp_path / "r.yaml", ["training.one_pass=true", *ALONE])).notes


def test_pseudo_labels_take_the_place_of_known_masks_in_several_files(tmp_path: Path) -> None:
    """An unlabeled image whose truth is a mask a class: its truth is measured, never learned from."""
    truth, pseudo = tmp_path / "mask.png", label_path(tmp_path / "labels", "x")
    pseudo.parent.mkdir()
    assert cv2.imwrite(str(truth), np.full((4, 5), 255, np.uint8))
    assert cv2.imwrite(str(pseudo), np.full((4, 5), 7, np.uint8))
    known = Sample("x", tmp_path / "x.png", truth, parts=Parts(((truth, 3),), other=0))
    assert np.unique(read_truth(known)) == 3
    (sample,) = labeled_by(tmp_path / "labels", [known])
    assert np.unique(read_truth(sample)) == 7
