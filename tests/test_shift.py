"""Class shares of another place by expectation maximization: against known truth, a slow version, and a grid."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.errors import DataError
from darseg.pseudo.shift import LARGEST_BIAS, Shift, estimate_shift
from wording import refused


def calibrated(seed: int, classes: int, pixels: int, *, trained: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Log-posteriors under the shares `trained` of points whose classes have the shares `true`, float64 [N, K].

    Each class is a normal distribution in three dimensions, so the posteriors are exact.
    """
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 2, (classes, 3))
    points = centers[rng.choice(classes, pixels, p=true)] + rng.normal(0, 1, (pixels, 3))
    likelihood = -0.5 * ((points[:, None] - centers) ** 2).sum(axis=2)
    with np.errstate(divide="ignore"):
        return np.maximum(likelihood + np.log(trained), -1000)


def shares(seed: int, classes: int) -> np.ndarray:
    drawn = np.maximum(np.random.default_rng(seed).dirichlet(np.ones(classes)), 0.02)
    return drawn / drawn.sum()


def textbook(scores: np.ndarray, trained: np.ndarray, steps: int) -> np.ndarray:
    """The algorithm as Saerens et al. print it, pixel by pixel (their equation 2.9)."""
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    share = trained.copy()
    for _ in range(steps):
        posteriors = []
        for probability in probabilities:
            adjusted = share / trained * probability
            posteriors.append(adjusted / adjusted.sum())
        share = np.mean(posteriors, axis=0)
    return share


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_the_true_shares_are_found_if_probabilities_are_calibrated(classes: int) -> None:
    trained, true = shares(1, classes), shares(2, classes)
    pixels = 200_000
    scores = calibrated(3, classes, pixels, trained=trained, true=true)
    shift = estimate_shift(scores.astype(np.float16), trained)
    assert shift.converged and shift.pixels == pixels
    assert np.abs(trained - true).max() > 0.1
    assert np.abs(shift.share - true).max() < 0.004  # 4 standard errors of classes that overlap by half
    same = estimate_shift(calibrated(4, classes, pixels, trained=trained, true=trained), trained)
    assert np.abs(same.share - trained).max() < 0.004


def test_it_takes_the_steps_of_the_textbook() -> None:
    trained = shares(5, 4)
    scores = calibrated(6, 4, 300, trained=trained, true=shares(7, 4))
    shift = estimate_shift(scores, trained)
    assert shift.converged and shift.steps > 10
    assert np.allclose(shift.share, textbook(scores, trained, shift.steps), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_with_a_reference_a_bias_of_the_network_has_no_effect(classes: int) -> None:
    """A network that favors frequent classes: exact posteriors times factors, normalized by softmax."""
    trained, true = shares(12, classes), shares(13, classes)
    favor = np.linspace(2, -2, classes)
    reference = calibrated(15, classes, 100_000, trained=trained, true=trained) + favor
    # The same seed gives the same look of the classes.
    scores = calibrated(15, classes, 100_000, trained=trained, true=true) + favor
    shift = estimate_shift(scores, trained, reference)
    assert shift.corrected and shift.converged
    assert np.abs(shift.share - true).max() < 0.008
    assert np.abs(estimate_shift(scores, trained).share - true).max() > 0.03
    # On the reference itself there is no shift.
    assert np.abs(estimate_shift(reference, trained, reference).share / trained - 1).max() < 0.03
    biased = np.exp(reference + shift.bias)
    mean = (biased / biased.sum(axis=1, keepdims=True)).mean(axis=0)
    assert (np.abs(mean - trained) <= 0.02 * trained).all()


def test_a_class_that_is_hardly_known_is_not_corrected_without_limit() -> None:
    trained = np.array([0.5, 0.3, 0.2])
    scores = np.log(np.array([[0.7, 0.3, 1e-12]] * 60 + [[0.2, 0.8, 1e-12]] * 40))
    shift = estimate_shift(scores, trained, scores)
    assert not shift.corrected and np.abs(shift.bias).max() <= LARGEST_BIAS + 1e-9
    never = np.where(np.arange(3) == 2, -1000, scores)
    assert not estimate_shift(never, trained, never).corrected


def test_two_classes_have_the_likelihood_of_the_best_of_a_grid() -> None:
    trained = np.array([0.9, 0.1])
    scores = calibrated(8, 2, 4_000, trained=trained, true=np.array([0.4, 0.6]))
    ratios = np.exp(scores - scores.max(axis=1, keepdims=True)) / trained
    grid = np.linspace(0, 1, 20_001)
    likelihood = np.array([np.log(ratios @ [share, 1 - share]).mean() for share in grid])
    shift = estimate_shift(scores, trained)
    assert np.log(ratios @ shift.share).mean() > likelihood.max() - 1e-6
    assert abs(shift.share[0] - grid[likelihood.argmax()]) < 2e-3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_neither_the_order_of_pixels_and_classes_nor_a_constant_has_an_effect(
    seed: int, classes: int
) -> None:
    trained = shares(seed, classes)
    scores = calibrated(seed, classes, 500, trained=trained, true=shares(seed + 1, classes))
    shift = estimate_shift(scores, trained)
    rng = np.random.default_rng(seed)
    pixels, order = rng.permutation(500), rng.permutation(classes)
    moved = (scores + rng.normal(0, 3, (500, 1)))[pixels][:, order]
    assert np.allclose(estimate_shift(moved, trained[order]).share, shift.share[order], atol=1e-3)
    assert abs(shift.share.sum() - 1) < 1e-9


def test_a_class_without_labels_and_pixels_of_it_change_nothing_else() -> None:
    trained = np.array([0.6, 0.4, 0.0])
    scores = np.log(np.array([[0.8, 0.2, 1e-9]] * 70 + [[0.1, 0.9, 1e-9]] * 30))
    shift = estimate_shift(scores, trained)
    two = estimate_shift(scores[:, :2], trained[:2])
    assert shift.share[2] == 0 and np.allclose(shift.share[:2], two.share, atol=1e-6)
    certain = np.vstack([scores, [[-1000.0, -1000.0, 0.0]]])  # says nothing about the first two
    assert np.allclose(estimate_shift(certain, trained).share, shift.share, atol=1e-2)


def test_classes_that_cannot_be_told_apart_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darseg.pseudo.shift.STEPS", 5)
    trained = shares(9, 4)
    shift = estimate_shift(calibrated(10, 4, 300, trained=trained, true=shares(11, 4)), trained)
    assert not shift.converged and shift.steps == 5


def test_its_json_holds_plain_values() -> None:
    shift = estimate_shift(np.log([[0.9, 0.1]] * 3 + [[0.2, 0.8]]), [0.5, 0.5])
    described = json.loads(json.dumps(shift.to_json()))
    assert described["converged"] is True and described["pixels"] == 4
    assert described["trained"] == [0.5, 0.5] and described["share"] == shift.share.tolist()


def test_scores_and_shares_that_cannot_be_used_are_refused() -> None:
    scores = np.zeros((5, 2))
    with refused(DataError, "2 of 5", "NaN"):
        estimate_shift(np.where(np.arange(5)[:, None] < 2, np.nan, scores), [0.5, 0.5])
    with refused(DataError, "[5, 2]", "3 classes"):
        estimate_shift(scores, [0.2, 0.3, 0.5])
    with refused(DataError, "add up to 0.9"):
        estimate_shift(scores, [0.5, 0.4])
    with refused(DataError, "no pixels"):
        estimate_shift(scores[:0], [0.5, 0.5])
    with refused(DataError, "2 estimated", "3"):
        Shift(
            np.array([0.5, 0.5]),
            np.array([0.2, 0.3, 0.5]),
            bias=np.zeros(2),
            corrected=False,
            steps=1,
            converged=True,
            pixels=1,
        )
