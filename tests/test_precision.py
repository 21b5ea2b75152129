"""Ratios from a target precision: the rule against a slow one, its laws, and what it keeps on fresh images."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.prediction import FINE, FLOAT16, ConfidenceScale, Prediction
from darseg.errors import DataError, RecipeError
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.precision import ExpectedPrecision, HeldOutBuilder, HeldOutCounts, choose_by_precision
from darseg.pseudo.thresholds import Thresholds, choose_dars, choose_thresholds
from test_pseudo_laws import draw_distribution
from wording import refused

Image = tuple[Prediction, np.ndarray]
seeds = st.integers(0, 2**32)
some = settings(max_examples=10, deadline=None)


def draw_images(seed: int, classes: int, count: int, scale: ConfidenceScale = FLOAT16) -> list[Image]:
    """Small images with few distinct confidences, more often right where these are large, and some unlabeled pixels."""
    rng = np.random.default_rng(seed)
    values = np.sort(rng.integers(0, scale.codes, 9)).astype(np.uint16)
    present = np.flatnonzero(rng.random(classes) < 0.8)
    present = present if len(present) else np.array([0])
    images = []
    for _ in range(count):
        shape = tuple(rng.integers(1, 12, 2))
        predicted, rank = rng.choice(present, shape).astype(np.uint8), rng.integers(0, len(values), shape)
        right = rng.random(shape) < 0.5 + 0.5 * rank / len(values)
        truth = np.where(right, predicted, rng.integers(0, classes, shape)).astype(np.uint8)
        truth[rng.random(shape) < 0.1] = 255
        images.append((Prediction(predicted, values[rank], scale), truth))
    return images


def count(images: list[Image], classes: int) -> HeldOutCounts:
    builder = HeldOutBuilder(classes, images[0][0].scale)
    for prediction, truth in images:
        builder.add(prediction, truth)
    return builder.build()


def histogram_of(images: list[Image], classes: int) -> ConfidenceHistogram:
    builder = HistogramBuilder(classes, images[0][0].scale)
    for prediction, _ in images:
        builder.add(prediction)
    return builder.build()


# The rule, once more and slowly.


def accepted_and_wrong(images: list[Image], k: int | None, code: int) -> list[tuple[int, int]]:
    """Of each image: labeled pixels predicted as class k (None: any) with at least a code, and the wrong ones of them."""
    pairs = []
    for prediction, truth in images:
        taken = (truth != 255) & (prediction.codes >= code)
        if k is not None:
            taken &= prediction.classes == k
        pairs.append((int(taken.sum()), int((taken & (prediction.classes != truth)).sum())))
    return pairs


def slow_bound(pairs: list[tuple[int, int]]) -> float:
    accepted, wrong = sum(a for a, _ in pairs), sum(w for _, w in pairs)
    if not accepted:
        return 0
    images, q = len(pairs), wrong / accepted
    effective = accepted**2 / sum(a * a for a, _ in pairs)
    variance = images / (images - 1) * sum((w - q * a) ** 2 for a, w in pairs) / accepted**2
    # One more image of effective size, all wrong: accepted / effective pixels.
    one_more = (accepted - wrong) / (accepted + accepted / effective)
    return max(0, min(one_more, 1 - q - 1.645 * math.sqrt(variance)))


def slow_choice(
    images: list[Image], wanted: Thresholds, target: float, codes: list[int]
) -> list[tuple[int | None, str]]:
    """Code (None: nothing) and basis of each class. codes: those at which anything changes, in order."""
    choices = []
    for k in range(len(wanted.accept)):
        everything = accepted_and_wrong(images, k, 0)
        squares = sum(a * a for a, _ in everything)
        own = squares > 0 and sum(a for a, _ in everything) ** 2 / squares >= 10
        usable, started = [], False
        for code in codes:
            started = started or slow_bound(accepted_and_wrong(images, k if own else None, code)) >= target
            accepted, wrong = map(sum, zip(*accepted_and_wrong(images, k, code), strict=True))
            if started and (accepted == 0 or (accepted - wrong) / accepted >= target):
                usable.append(code)
        at_most = [code for code in usable if code <= wanted.accept[k]]
        chosen = at_most[-1] if at_most else usable[0] if usable else None
        if wanted.predicted[k] == 0:
            chosen = None
        choices.append((chosen, "none" if not usable else "class" if own else "all classes"))
    return choices


@pytest.mark.parametrize("scale", [FLOAT16, FINE])
@settings(max_examples=6, deadline=None)
@given(seeds, st.sampled_from([10, 13, 40]), st.sampled_from([0.0, 0.4, 0.6, 0.7, 0.8]))
def test_thresholds_are_those_of_the_slow_rule(
    scale: ConfidenceScale, seed: int, held_out: int, target: float
) -> None:
    classes = 3
    known, fresh = (draw_images(seed, classes, held_out, scale), draw_images(seed, classes, 9, scale))
    histogram, distribution = histogram_of(fresh, classes), draw_distribution(seed, classes)
    thresholds, expected = choose_by_precision(
        histogram, distribution, count(known, classes), target_precision=target
    )
    dars = choose_dars(histogram, distribution, 1.0)
    # Between two confidences that occur nothing changes, but the code just above one begins that stretch.
    occurring = {int(code) for prediction, _ in [*known, *fresh] for code in np.unique(prediction.codes)}
    codes = sorted(
        {0, *occurring, *(code + 1 for code in occurring), *dars.accept.tolist()} & {*range(scale.codes)}
    )
    for k, (code, basis) in enumerate(slow_choice(known, dars, target, codes)):
        assert expected.basis[k] == basis
        confident = sum(
            int(((p.classes == k) & (p.codes >= (scale.codes if code is None else code))).sum())
            for p, _ in fresh
        )
        assert thresholds.accepted[k] == confident
        if confident:
            accepted, wrong = map(sum, zip(*accepted_and_wrong(known, k, code), strict=True))
            assert accepted == expected.pixels[k]
            assert thresholds.keep[k] == min(1, dars.wanted[k] / confident)
            assert expected.expected[k] == (pytest.approx(1 - wrong / accepted) if accepted else None)


@settings(max_examples=6, deadline=None)
@given(seeds, st.integers(2, 5))
def test_counts_are_exact_and_add_up_in_any_order(seed: int, classes: int) -> None:
    images = draw_images(seed, classes, 12)
    whole = count(images, classes)
    assert count(images[::-1], classes) == whole == count(images[:5], classes) + count(images[5:], classes)
    assert HeldOutCounts.unpack(whole.pack()) == HeldOutCounts.from_bytes(whole.to_bytes()) == whole
    assert HeldOutCounts.from_bytes(whole.to_bytes()).to_bytes() == whole.to_bytes()
    for k, code in itertools.product([*range(classes), None], (0, 9000, 15360)):
        pairs, row = accepted_and_wrong(images, k, code), classes if k is None else k
        sums = [sum(p) for p in zip(*((a, w, a * a, a * w, w * w) for a, w in pairs), strict=True)]
        assert whole.sums[:, row, code].tolist() == sums
        if code == 0:
            assert whole.images[row] == sum(a > 0 for a, _ in pairs)
    assert whole.held_out == 12 and whole.squares == sum(int((t != 255).sum()) ** 2 for _, t in images)


# Laws.


@some
@given(seeds, st.integers(2, 6), st.lists(st.floats(0, 0.999), min_size=2, max_size=4))
def test_laws_of_the_target(seed: int, classes: int, targets: list[float]) -> None:
    known = count(draw_images(seed, classes, 25), classes)
    histogram = histogram_of(draw_images(seed, classes, 8), classes)
    distribution = draw_distribution(seed, classes)
    dars = choose_dars(histogram, distribution, 1.0)
    assert choose_by_precision(histogram, distribution, known, target_precision=0.0)[0] == dars
    before = np.minimum(dars.wanted, dars.accepted)
    for target in sorted(targets):
        thresholds, expected = choose_by_precision(histogram, distribution, known, target_precision=target)
        taken = np.minimum(thresholds.wanted, thresholds.accepted)
        assert (taken <= before).all()  # a higher target never labels more of a class
        before = taken
        assert np.array_equal(thresholds.wanted, dars.wanted)
        for k in range(classes):
            if expected.expected[k] is not None:
                assert expected.expected[k] >= target
            if expected.basis[k] == "none":
                assert thresholds.accepted[k] == 0 and expected.bound[k] is None
            elif expected.bound[k] is not None:
                assert expected.bound[k] >= target
        described = json.loads(json.dumps(expected.to_json()))
        assert ExpectedPrecision.from_json(described, classes) == expected


def test_a_less_sure_threshold_is_used_where_only_that_is_precise_and_the_surplus_is_drawn() -> None:
    """A class is wrong where it is surest: DARS's threshold would take only that."""
    code = np.array([0.6, 0.9], np.float16).view(np.uint16)
    classes = np.zeros((10, 10), np.uint8)
    codes = np.full((10, 10), code[0])
    codes[0] = code[1]
    truth = classes.copy()
    truth[0] = 1
    images: list[Image] = [(Prediction(classes, codes), truth)] * 40
    histogram = histogram_of(images, 2)
    shares = ClassDistribution(np.array([0.1, 0.9]))
    assert choose_dars(histogram, shares, 1.0).accept[0] == code[1]
    thresholds, expected = choose_by_precision(histogram, shares, count(images, 2), target_precision=0.8)
    assert thresholds.accept[0] == code[0] and thresholds.accepted[0] == 4000
    assert thresholds.keep[0] == 0.1 and thresholds.wanted[0] == 400
    assert expected.expected == (0.9, None) and expected.ratio == (1.0, 0.0)
    assert expected.of_all([400, 0]) == 0.9


# Fresh images.

CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "calibrated": lambda p: np.clip(p, 0.01, 0.995),
    "too sure": lambda p: np.clip(1.1 * p - 0.12, 0.01, 0.99),
    "too unsure": lambda p: np.clip(0.5 + 0.5 * p, 0.01, 0.999),
}


def draw_scenes(
    rng: np.random.Generator, count: int, right_at: Callable[[np.ndarray], np.ndarray]
) -> list[Image]:
    """Images of three classes in their own mixture, as a whole easier or harder than the curve says."""
    images = []
    for _ in range(count):
        predicted = rng.choice(3, size=(20, 20), p=rng.dirichlet([4, 2, 1])).astype(np.uint8)
        confidence = 1 - 0.66 * rng.beta(1, 6, size=predicted.shape)
        share = right_at(confidence)
        odds = share / (1 - share) * np.exp(rng.normal(0, 0.5))
        right = rng.random(predicted.shape) < odds / (1 + odds)
        truth = np.where(right, predicted, (predicted + 1) % 3).astype(np.uint8)
        images.append((Prediction(predicted, confidence.astype(np.float16).view(np.uint16)), truth))
    return images


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("held_out", [15, 60])
def test_fresh_images_keep_the_target_in_nearly_all_draws(name: str, held_out: int) -> None:
    """Whatever confidences mean: 0.85 on 700 fresh images, in at least 9 of 10 draws of held-out images."""
    rng, target, repeats = np.random.default_rng(5), 0.85, 8 if held_out == 60 else 20
    fresh = draw_scenes(rng, 700, CURVES[name])
    classes, codes, right = (
        np.concatenate(parts)
        for parts in zip(
            *((p.classes.ravel(), p.codes.ravel(), (p.classes == t).ravel()) for p, t in fresh), strict=True
        )
    )
    histogram = histogram_of(fresh[:100], 3)
    distribution = ClassDistribution.from_counts(histogram.predicted)
    held, accepted = [], 0.0
    for _ in range(repeats):
        counts = count(draw_scenes(rng, held_out, CURVES[name]), 3)
        thresholds, _ = choose_by_precision(histogram, distribution, counts, target_precision=target)
        for k in np.flatnonzero(thresholds.accepted):
            held.append(right[(classes == k) & (codes >= thresholds.accept[k])].mean() >= target)
        accepted += thresholds.accepted.sum() / histogram.predicted.sum() / repeats
    assert np.mean(held) >= 0.9
    if held_out == 60:  # not kept by accepting next to nothing
        assert accepted > 0.5


# Faults.


def test_what_cannot_be_measured_is_refused() -> None:
    images = draw_images(1, 3, 12)
    histogram, counts = histogram_of(images, 3), count(images, 3)
    shares = ClassDistribution(np.array([0.5, 0.25, 0.25]))
    with refused(RecipeError, "1.0", "below 1"):
        choose_by_precision(histogram, shares, counts, target_precision=1.0)
    with refused(DataError, "9 held-out", "10"):
        choose_by_precision(histogram, shares, count(images[:9], 3), target_precision=0.9)
    with refused(DataError, "2 classes", "float16", "3"):
        choose_by_precision(histogram, shares, count(draw_images(1, 2, 12), 2), target_precision=0.9)
    with refused(DataError, "3 and 2 classes"):
        counts + count(draw_images(1, 2, 12), 2)
    with refused(DataError, "[1, 1]", "[2, 2]"):
        HeldOutBuilder(3).add(
            Prediction(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint16)), np.zeros((2, 2), np.uint8)
        )
    with refused(DataError, "12 held-out images", "too many pixels"):
        HeldOutCounts(counts.sums, counts.images, 12, squares=1 << 63)
    with refused(DataError, "100 numbers"):
        HeldOutCounts.unpack(np.zeros(100, np.int64))
    with refused(DataError, "4 bytes", vary=[r"\(\w+: .*?\)(?=\.)"]):
        HeldOutCounts.from_bytes(b"zip?")
    with refused(RecipeError, "labeling_ratio: auto", "darseg train"):
        choose_thresholds(histogram, Labeling("dars", "auto"), shares)


def test_damaged_records_are_refused() -> None:
    images = draw_images(2, 3, 12)
    _, expected = choose_by_precision(
        histogram_of(images, 3),
        ClassDistribution(np.array([0.5, 0.25, 0.25])),
        count(images, 3),
        target_precision=0.5,
    )
    good = expected.to_json()
    for change in (
        {"basis": ["class", "class"]},
        {"basis": ["class", "class", "luck"]},
        {"expected": [0.5, 2, None]},
        {"ratio": [0.5, True, None]},
        {"pixels": [1, -1, 0]},
        {"target": "high"},
    ):
        with pytest.raises((ValueError, TypeError)):
            ExpectedPrecision.from_json(good | change, 3)
    with pytest.raises(KeyError):
        ExpectedPrecision.from_json({key: value for key, value in good.items() if key != "bound"}, 3)
