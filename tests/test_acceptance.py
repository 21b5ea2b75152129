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
    Acceptance,
    Accepted,
    Aligned,
    Predicted,
    accept,
    acceptance_state,
    advance,
    with_prior,
)
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.thresholds import choose_dars
from wording import refused

torch.set_num_threads(1)

CLASSES, HEIGHT, WIDTH = 4, 40, 50
COUNTS = (700, 100, 150, 50)


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
    state = acceptance_state(how)
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
    state = acceptance_state(how)
    assert (seen_by(how, state, predicted, 0).labels == IGNORE).all()
    again = accept(how, state, replace(predicted, positions=torch.arange(2, 4)))
    shares = kept_shares(again.labels, predicted.inside)
    wanted = 0.2 * np.array([0.5, 0.3, 0.2, 0.0])
    assert np.all(np.abs(shares - wanted) <= 6 * np.sqrt(wanted / 20_000)) and shares[3] == 0
    assert torch.equal(again.predicted[0], classes.to(torch.uint8))


def test_a_window_is_the_sum_of_its_steps_and_then_begins_anew() -> None:
    how = Aligned(0.3, window=3, counts=COUNTS)
    state, histogram = acceptance_state(how), ConfidenceHistogram.empty(CLASSES)
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
    state = acceptance_state(how)
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
    state = acceptance_state(how)
    seen_by(how, state, predicted, 0)
    chosen = state.lowest.clone()
    predicted.probabilities[:] = float("nan")
    spoiled = seen_by(how, state, predicted, 1)
    assert (spoiled.labels == IGNORE).all() and int(spoiled.seen["confidences"].sum()) == 0
    assert torch.equal(state.lowest, chosen)  # of an empty window nothing can be chosen


def test_the_rules_settings() -> None:
    assert with_prior(Aligned(0.4), COUNTS) == Aligned(0.4, counts=COUNTS)
    for ratio in (0.0, 1.5):
        with refused(RecipeError, f"ratio {ratio}"):
            Aligned(ratio)
    with refused(RecipeError, "window of 0 steps"):
        Aligned(0.4, window=0)
