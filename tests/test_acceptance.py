"""Rules of acceptance that remember: class shares inside a round, against the functions that rounds of DARS use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from darseg.data.classes import IGNORE
from darseg.data.prediction import Prediction
from darseg.errors import RecipeError
from darseg.methods.acceptance import (
    MOVED,
    UNALIGNED,
    Above,
    Acceptance,
    Accepted,
    Aligned,
    ClassThresholds,
    MeanAligned,
    Predicted,
    Realigned,
    accept,
    acceptance_state,
    advance,
    with_prior,
)
from darseg.methods.aligned import codes_of, counted
from darseg.methods.consistency import Consistency
from darseg.methods.realigned import UNUSED, WeightSearch
from darseg.pseudo.align import align
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.thresholds import choose_dars
from darseg.training.stage import Stage
from test_methods import online, run, tensors
from test_stage import DEEPLAB, build
from wording import refused

torch.set_num_threads(1)

CLASSES, HEIGHT, WIDTH, IMAGES = 4, 40, 50, 2
COUNTS, SHARES = (700, 100, 150, 50), (480, 150, 190, 180)
"""Labeled pixels per class; class weights from 1/4 to 4 reach the second."""


def predicted_at(step: int, images: int = 1, sharpness: float = 3.0) -> Predicted:
    """Probabilities of random pixels, some of them outside; class 0 leads."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(images, CLASSES, HEIGHT, WIDTH, generator=generator) * sharpness
    logits[:, 0] += 1
    inside = torch.rand(images, HEIGHT, WIDTH, generator=generator) < 0.9
    positions = torch.arange(images) + step * images
    return Predicted(logits.softmax(1), inside, positions, seed=(5, 0))


def seen_by(how: Acceptance, state: nn.Module, predicted: Predicted, step: int) -> Accepted:
    """A step: label, then follow."""
    accepted = accept(how, state, predicted)
    advance(how, state, accepted.seen, step)
    return accepted


def as_prediction(predicted: Predicted, image: int) -> Prediction:
    """The pixels inside one image, as labeling predicts them."""
    confidence, classes = (
        numbers[image][predicted.inside[image]] for numbers in predicted.probabilities.max(1)
    )
    codes = confidence.numpy().astype(np.float16).view(np.uint16)
    return Prediction(classes.numpy().astype(np.uint8)[None], codes[None])


def kept_shares(labels: Tensor, inside: Tensor) -> np.ndarray:
    return np.bincount(labels.numpy().ravel(), minlength=IGNORE + 1)[:CLASSES] / int(inside.sum())


# --- class shares


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_aligned_on_one_image_equals_choose_dars(ratio: float) -> None:
    how, predicted = Aligned(ratio, window=1, counts=COUNTS), predicted_at(0)
    state = acceptance_state(how, IMAGES, CLASSES)
    seen_by(how, state, predicted, 0)
    prediction = as_prediction(predicted, 0)
    histogram = ConfidenceHistogram.count(prediction, CLASSES)
    wanted = choose_dars(histogram, ClassDistribution.from_counts(COUNTS), ratio)
    assert np.array_equal(state.lowest.numpy(), wanted.accept)
    assert np.array_equal(state.keep.numpy(), wanted.keep.astype(np.float32))
    labels = accept(how, state, predicted).labels[0]
    reached = prediction.codes[0] >= wanted.accept[prediction.classes[0]]
    kept = labels[predicted.inside[0]].numpy() != IGNORE
    assert not kept[~reached].any()
    sure = wanted.keep[prediction.classes[0]] == 1
    assert kept[reached & sure].all()
    assert (labels[~predicted.inside[0]] == IGNORE).all()


def test_the_labels_have_the_class_mix_of_the_labeled_pixels() -> None:
    """Of confidences that are all equal, draws keep the share; six standard errors."""
    chances = torch.full((2, CLASSES, 100, 100), 0.01)
    classes = torch.arange(100 * 100).view(100, 100) % CLASSES
    chances.scatter_(1, classes.expand(2, 1, 100, 100), 0.97)
    predicted = Predicted(chances, torch.ones(2, 100, 100, dtype=torch.bool), torch.arange(2), (1,))
    how = Aligned(0.2, window=1, counts=(50, 30, 20, 0))
    state = acceptance_state(how, IMAGES, CLASSES)
    assert (seen_by(how, state, predicted, 0).labels == IGNORE).all()
    again = accept(how, state, replace(predicted, positions=torch.arange(2, 4)))
    shares = kept_shares(again.labels, predicted.inside)
    wanted = 0.2 * np.array([0.5, 0.3, 0.2, 0.0])
    assert np.all(np.abs(shares - wanted) <= 6 * np.sqrt(wanted / 20_000)) and shares[3] == 0
    assert torch.equal(again.predicted[0], classes.to(torch.uint8))


def test_a_window_is_the_sum_of_its_steps_and_then_begins_anew() -> None:
    how = Aligned(0.3, window=3, counts=COUNTS)
    state, histogram = acceptance_state(how, IMAGES, CLASSES), ConfidenceHistogram.empty(CLASSES)
    for step in range(6):
        predicted = predicted_at(step, images=2, sharpness=1 + step)
        chosen = state.lowest.clone()
        labels = seen_by(how, state, predicted, step).labels
        assert bool((labels == IGNORE).all()) == (step < 3)
        for image in range(2):
            histogram += ConfidenceHistogram.count(as_prediction(predicted, image), CLASSES)
        if step % 3 < 2:
            assert torch.equal(state.lowest, chosen)
            continue
        wanted = choose_dars(histogram, ClassDistribution.from_counts(COUNTS), 0.3)
        assert np.array_equal(state.lowest.numpy(), wanted.accept)
        histogram = ConfidenceHistogram.empty(CLASSES)


def test_draws_depend_on_seed_and_position_alone() -> None:
    how, predicted = Aligned(0.1, window=1, counts=COUNTS), predicted_at(0, images=4)
    state = acceptance_state(how, IMAGES, CLASSES)
    seen_by(how, state, predicted, 0)
    state.keep.fill_(0.5)
    whole = accept(how, state, predicted)
    half = Predicted(
        predicted.probabilities[2:], predicted.inside[2:], predicted.positions[2:], predicted.seed
    )
    own = accept(how, state, half)
    assert torch.equal(own.labels, whole.labels[2:])
    for other in (replace(half, seed=(6, 0)), replace(half, positions=half.positions + 1)):
        assert not torch.equal(accept(how, state, other).labels, own.labels)
    assert int(own.seen["confidences"].sum()) == int(half.inside.sum())


def test_what_is_not_a_number_is_neither_counted_nor_accepted() -> None:
    how, predicted = Aligned(1.0, window=1, counts=(1,) * CLASSES), predicted_at(0)
    state = acceptance_state(how, IMAGES, CLASSES)
    seen_by(how, state, predicted, 0)
    chosen = state.lowest.clone()
    predicted.probabilities[:] = float("nan")
    spoiled = seen_by(how, state, predicted, 1)
    assert (spoiled.labels == IGNORE).all() and int(spoiled.seen["confidences"].sum()) == 0
    assert torch.equal(state.lowest, chosen)  # of an empty window nothing can be chosen


# --- aligned decisions


def shares_of(classes: np.ndarray) -> np.ndarray:
    return np.bincount(classes.ravel(), minlength=CLASSES)[:CLASSES] / classes.size


def test_the_weights_give_all_decisions_of_the_window_the_shares_of_the_labeled_pixels() -> None:
    """Over all pixels, though only half of them were looked at: about 3600, with a standard error of at most 0.0083."""
    how = Realigned(Above(0.0), window=2, counts=SHARES)
    state = acceptance_state(how, IMAGES, CLASSES)
    state.weights.sample = state.weights.sample[:, :, :1000]
    plain, steps = [], [predicted_at(step, IMAGES) for step in range(2)]
    for step, predicted in enumerate(steps):
        accepted = seen_by(how, state, predicted, step)
        plain.append(accepted.predicted[predicted.inside].numpy())
        assert int(accepted.figures[UNALIGNED]) == int(predicted.inside.sum())
        assert int(accepted.figures[MOVED]) == 0
        assert torch.equal(accepted.predicted.long()[predicted.inside], argmax_of(predicted))
    after = [accept(how, state, predicted) for predicted in steps]
    aligned = [accepted.predicted[step.inside].numpy() for accepted, step in zip(after, steps, strict=True)]
    wanted = np.array(SHARES) / 1000
    assert np.abs(shares_of(np.concatenate(plain)) - wanted).max() > 0.1
    assert np.abs(shares_of(np.concatenate(aligned)) - wanted).max() < 0.025
    for accepted, before, now in zip(after, plain, aligned, strict=True):
        assert int(accepted.figures[MOVED]) == int((before != now).sum()) > 0
        assert int(accepted.figures[UNALIGNED]) == 0


def argmax_of(predicted: Predicted) -> Tensor:
    return predicted.probabilities.argmax(1)[predicted.inside]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_weights_are_those_of_align_on_the_sample(strength: float) -> None:
    how = Realigned(Above(0.4), window=1, search=WeightSearch(strength, 4.0), counts=SHARES)
    state, predicted = acceptance_state(how, IMAGES, CLASSES), predicted_at(0, IMAGES)
    accepted = seen_by(how, state, predicted, 0)
    rows = accepted.seen["sample"].flatten(0, 1)
    used = (rows != UNUSED).all(1)
    assert len(rows) == 1 << 16 and bool((rows[~used] == UNUSED).all())
    pixels = predicted.probabilities.movedim(1, -1)[predicted.inside].log()
    relative = (pixels - pixels.amax(1, keepdim=True)).half()
    assert sorted(rows[used].tolist()) == sorted(relative.tolist())  # there are fewer pixels than it holds
    wanted = align(relative.numpy(), np.array(SHARES) / 1000, bound=4.0, strength=strength)
    assert np.array_equal(state.weights.weights.numpy(), wanted.weights) and (wanted.weights != 1).any()
    chances = predicted.probabilities.double() * torch.from_numpy(wanted.weights.copy())[:, None, None]
    confidence, classes = (chances / chances.sum(1, keepdim=True)).max(1)
    after = accept(how, state, predicted)
    assert torch.equal(after.predicted[predicted.inside].long(), classes[predicted.inside])
    kept = (after.labels != IGNORE)[predicted.inside & ((confidence - 0.4).abs() > 1e-6)]
    assert torch.equal(kept, (confidence >= 0.4)[predicted.inside & ((confidence - 0.4).abs() > 1e-6)])


def test_without_weights_decisions_are_plain_and_that_is_counted() -> None:
    """Class 0 is all that is predicted, then the others appear, then nothing is a number."""
    how = Realigned(Above(0.4), window=1, counts=SHARES)
    state, predicted = acceptance_state(how, IMAGES, CLASSES), predicted_at(0, IMAGES)
    alone = predicted_at(1, IMAGES)
    alone.probabilities[:] = torch.tensor([0.7, 0.1, 0.1, 0.1])[:, None, None]
    for given, found in ((alone, False), (predicted, True), (alone, False)):
        seen_by(how, state, given, 0)
        assert bool(state.weights.found) == found == bool((state.weights.weights != 1).any())
        accepted, plain = (
            accept(rule, part, predicted) for rule, part in ((how, state), (how.accept, nn.Module()))
        )
        assert torch.equal(accepted.labels, plain.labels) == (not found)
        assert int(accepted.figures[UNALIGNED]) == (0 if found else int(predicted.inside.sum()))
    spoiled = replace(predicted, probabilities=torch.full_like(predicted.probabilities, float("nan")))
    assert (seen_by(how, state, spoiled, 0).labels == IGNORE).all()
    assert not state.weights.found and bool((state.weights.sample == UNUSED).all())


def test_the_samples_of_two_processes_add_up_to_that_of_one() -> None:
    how, predicted = Realigned(Above(0.4), window=3, counts=COUNTS), predicted_at(7, images=4)
    state = acceptance_state(how, 4, CLASSES)
    halves = [
        replace(
            predicted,
            probabilities=predicted.probabilities[part],
            inside=predicted.inside[part],
            positions=predicted.positions[part],
        )
        for part in (slice(0, 2), slice(2, 4))
    ]
    parts = [accept(how, state, half).seen["sample"] for half in halves]
    assert torch.equal(parts[0] + parts[1], accept(how, state, predicted).seen["sample"])
    assert (parts[0][2:] == 0).all() and (parts[1][:2] == 0).all()
    state.weights.sample = state.weights.sample[
        :, :, :400
    ]  # fewer than there are pixels: seed and position choose
    chosen = accept(how, state, predicted).seen["sample"]
    again = accept(how, state, halves[1]).seen["sample"]
    other = accept(how, state, replace(halves[1], seed=(9,))).seen["sample"]
    assert torch.equal(again[2:], chosen[2:]) and not torch.equal(other, again)
    assert abs(float((chosen != UNUSED).any(2).float().mean()) - 0.9) < 0.06  # a tenth is outside


def test_aligned_shares_count_the_aligned_decisions() -> None:
    how = with_prior(Realigned(Aligned(0.3, window=1), window=1), SHARES)
    state, predicted = acceptance_state(how, IMAGES, CLASSES), predicted_at(0, IMAGES)
    seen_by(how, state, predicted, 0)
    weighted = predicted.probabilities * state.weights.weights.float()[:, None, None]
    confidence, classes = (weighted / weighted.sum(1, keepdim=True)).max(1)
    seen = accept(how, state, predicted).seen
    assert torch.equal(seen["confidences"], counted(classes, codes_of(confidence, predicted.inside), CLASSES))
    assert set(seen) == {"confidences", "sample"}


def test_alignment_of_strength_0_is_none_bit_for_bit() -> None:
    plain = Consistency("fixmatch", batch=8, accept=Above(0.4))
    ends = []
    for accepts in (
        Above(0.4),
        Realigned(Above(0.4), window=1, search=WeightSearch(strength=0.0), counts=(5, 3, 2)),
        Realigned(Above(0.4), window=1, counts=(5, 3, 2)),
    ):
        ends.append(tensors(run(online(replace(plain, accept=accepts))(build(DEEPLAB)), Stage(steps=4))))
    networks = [{key: value for key, value in end.items() if key in ends[0]} for end in ends]
    assert all(torch.equal(networks[1][key], value) for key, value in ends[0].items())
    assert any(not torch.equal(networks[2][key], value) for key, value in ends[0].items())


# --- for comparison


def test_class_thresholds_are_those_of_freematch() -> None:
    """Against the published formulas, pixel by pixel."""
    how = ClassThresholds()
    state = acceptance_state(how, IMAGES, CLASSES)
    level, means = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES)
    for step in range(3):
        predicted = predicted_at(step, IMAGES)
        thresholds = level * means / means.max()
        labels = seen_by(how, state, predicted, step).labels
        pixels = predicted.probabilities.movedim(1, -1)[predicted.inside].double().numpy()
        wanted = np.where(pixels.max(1) >= thresholds[pixels.argmax(1)], pixels.argmax(1), IGNORE)
        assert np.array_equal(labels[predicted.inside].numpy(), wanted)
        level = 0.999 * level + 0.001 * pixels.max(1).mean()
        means = 0.999 * means + 0.001 * pixels.mean(0)
    assert float(state.confidence) == pytest.approx(level, rel=1e-12)
    assert state.shares.numpy() == pytest.approx(means, rel=1e-12)
    state.confidence.fill_(0.9)  # after many steps
    state.shares.copy_(torch.tensor([0.6, 0.2, 0.15, 0.05]))
    accepted = accept(how, state, predicted)
    confidence, classes = predicted.probabilities.max(1)
    kept = accepted.labels != IGNORE
    for k, threshold in enumerate((0.9, 0.3, 0.225, 0.075)):
        assert torch.equal(kept[classes == k], ((confidence >= threshold) & predicted.inside)[classes == k])


def test_mean_alignment_is_that_of_remixmatch() -> None:
    """With means that have settled, the mean of p · wanted / mean is the wanted one before it is normalized."""
    how = MeanAligned(Above(0.6), counts=COUNTS)
    state, predicted = acceptance_state(how, IMAGES, CLASSES), predicted_at(0, IMAGES)
    seen_by(how, state, predicted, 0)
    pixels = predicted.probabilities.movedim(1, -1)[predicted.inside].double().numpy()
    means = 0.999 / CLASSES + 0.001 * pixels.mean(0)
    assert state.weights.shares.numpy() == pytest.approx(means, rel=1e-12)
    state.weights.shares.copy_(torch.from_numpy(pixels.mean(0)))
    product = pixels * (np.array(COUNTS) / 1000 + 1e-6) / (pixels.mean(0) + 1e-6)
    assert product.mean(0) == pytest.approx(np.array(COUNTS) / 1000, abs=1e-5)
    wanted = product / product.sum(1, keepdims=True)
    accepted = accept(how, state, predicted)
    clear = np.abs(wanted.max(1) - 0.6) > 1e-5
    labels = np.where(wanted.max(1) >= 0.6, wanted.argmax(1), IGNORE)
    assert np.array_equal(accepted.labels[predicted.inside].numpy()[clear], labels[clear])
    assert int(accepted.figures[MOVED]) == int((wanted.argmax(1) != pixels.argmax(1)).sum()) > 0


def test_means_stay_without_pixels() -> None:
    how = MeanAligned(ClassThresholds(), counts=COUNTS)
    state, predicted = acceptance_state(how, IMAGES, CLASSES), predicted_at(0, IMAGES)
    seen_by(how, state, predicted, 0)
    before = {key: value.clone() for key, value in state.state_dict().items()}
    assert len(before) == 4
    for spoiled in (
        replace(predicted, inside=torch.zeros_like(predicted.inside)),
        replace(predicted, probabilities=torch.full_like(predicted.probabilities, float("nan"))),
    ):
        assert (seen_by(how, state, spoiled, 1).labels == IGNORE).all()
        assert all(torch.equal(value, before[key]) for key, value in state.state_dict().items())


def test_the_rules_settings() -> None:
    assert with_prior(Aligned(0.4), COUNTS) == Aligned(0.4, counts=COUNTS)
    assert with_prior(ClassThresholds(), COUNTS) == ClassThresholds()
    assert with_prior(MeanAligned(Above()), COUNTS) == MeanAligned(Above(), COUNTS)
    inner = with_prior(Realigned(Aligned(0.4)), COUNTS)
    assert inner == Realigned(Aligned(0.4, counts=COUNTS), counts=COUNTS)
    for ratio in (0.0, 1.5):
        with refused(RecipeError, f"ratio {ratio}"):
            Aligned(ratio)
    for rule in (lambda: Aligned(0.4, window=0), lambda: Realigned(Above(), window=0)):
        with refused(RecipeError, "window of 0 steps"):
            rule()
