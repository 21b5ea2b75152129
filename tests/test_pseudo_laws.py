"""Laws of pseudo labeling that hold whatever the predictions."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.prediction import FLOAT16, Prediction
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.thresholds import Thresholds, choose_cbst, choose_dars, choose_global


def draw_predictions(seed: int, classes: int, images: int) -> list[Prediction]:
    """Images of differing sizes; few distinct confidences, half of them close to 1; some classes missing."""
    rng = np.random.default_rng(seed)
    values = np.append(rng.integers(0, FLOAT16.codes, 12), [15360] * 6 + [15359] * 6).astype(np.uint16)
    present = np.flatnonzero(rng.random(classes) < 0.7)
    present = present if len(present) else np.array([classes - 1])
    predictions = []
    for _ in range(images):
        shape = rng.integers(1, 30, 2)
        predictions.append(Prediction(rng.choice(present, shape).astype(np.uint8), rng.choice(values, shape)))
    return predictions


def draw_distribution(seed: int, classes: int) -> ClassDistribution:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10**6, classes) * (rng.random(classes) < 0.8)
    counts[-1] += 1
    return ClassDistribution.from_counts(counts)


def count_all(predictions: list[Prediction], classes: int) -> ConfidenceHistogram:
    builder = HistogramBuilder(classes)
    for prediction in predictions:
        builder.add(prediction)
    return builder.build()


seeds = st.integers(0, 2**32)
class_counts = st.one_of(st.integers(2, 21), st.just(255))
ratios = st.floats(0.001, 1)
some = settings(max_examples=25, deadline=None)


def test_codes_are_ordered_as_confidences() -> None:
    confidences = np.arange(FLOAT16.codes, dtype=np.uint16).view(np.float16)
    assert confidences[0] == 0
    assert confidences[-1] == 1
    assert (np.diff(confidences.astype(np.float64)) > 0).all()
    codes = np.arange(FLOAT16.codes, dtype=np.uint16).reshape(1, -1)
    assert np.array_equal(Prediction(np.zeros_like(codes, np.uint8), codes).confidence[0], confidences)


@some
@given(seeds, st.integers(2, 21))
def test_histograms_merge_in_any_way(seed: int, classes: int) -> None:
    predictions = draw_predictions(seed, classes, 3)
    a, b, c = (ConfidenceHistogram.count(prediction, classes) for prediction in predictions)
    assert (a + b) + c == a + (b + c) == (c + a) + b == count_all(predictions[::-1], classes)
    assert a + ConfidenceHistogram.empty(classes) == a
    assert (a + b + c).counts.sum() == sum(prediction.classes.size for prediction in predictions)
    assert np.array_equal((a + b).predicted, a.predicted + b.predicted)


@settings(max_examples=8, deadline=None)
@given(seeds, class_counts)
def test_written_values_are_read_back_equal(seed: int, classes: int) -> None:
    histogram = count_all(draw_predictions(seed, classes, 2), classes)
    data = histogram.to_bytes()
    assert ConfidenceHistogram.from_bytes(data) == histogram
    assert ConfidenceHistogram.from_bytes(data).to_bytes() == data
    for thresholds in (
        choose_dars(histogram, draw_distribution(seed, classes), 0.4),
        choose_cbst(histogram, 0.5),
        choose_global(histogram, 0.9),
    ):
        written = json.dumps(thresholds.to_json() | {"kept": [1, 2]}, allow_nan=False)
        assert Thresholds.from_json(json.loads(written)) == thresholds


def test_values_compare_by_content() -> None:
    first, second = ClassDistribution.from_counts([1, 3]), ClassDistribution.from_counts([3, 1])
    assert first == ClassDistribution.from_counts([2, 6])
    assert first != second
    histogram = count_all(draw_predictions(0, 2, 1), 2)
    assert histogram != ConfidenceHistogram.empty(2)
    assert choose_cbst(histogram, 0.1) != choose_cbst(histogram, 1)


@some
@given(seeds, class_counts, ratios)
def test_labels_are_the_predicted_class_or_nothing(seed: int, classes: int, ratio: float) -> None:
    predictions = draw_predictions(seed, classes, 3)
    chosen = choose_dars(count_all(predictions, classes), draw_distribution(seed, classes), ratio)
    for i, prediction in enumerate(predictions):
        label = assign(prediction, chosen, image_generator(seed, 1, str(i)))
        assert label.dtype == np.uint8
        assert label.shape == prediction.classes.shape
        assert ((label == prediction.classes) | (label == 255)).all()
        kept = label != 255
        assert (prediction.codes[kept] >= chosen.accept[prediction.classes[kept]]).all()


@some
@given(seeds, class_counts, ratios)
def test_an_image_gets_the_same_labels_in_any_order(seed: int, classes: int, ratio: float) -> None:
    predictions = dict(enumerate(draw_predictions(seed, classes, 4)))
    chosen = choose_dars(
        count_all(list(predictions.values()), classes), draw_distribution(seed, classes), ratio
    )
    forth = {i: assign(predictions[i], chosen, image_generator(seed, 1, f"image {i}")) for i in (0, 1, 2, 3)}
    back = {i: assign(predictions[i], chosen, image_generator(seed, 1, f"image {i}")) for i in (3, 1, 0, 2)}
    for i, prediction in predictions.items():
        assert np.array_equal(forth[i], back[i])
        by_columns = Prediction(np.asfortranarray(prediction.classes), np.asfortranarray(prediction.codes))
        assert np.array_equal(assign(by_columns, chosen, image_generator(seed, 1, f"image {i}")), forth[i])
        assert ConfidenceHistogram.count(by_columns, classes) == ConfidenceHistogram.count(
            prediction, classes
        )


@some
@given(seeds, class_counts, ratios)
def test_the_target_shares_are_met(seed: int, classes: int, ratio: float) -> None:
    predictions = draw_predictions(seed, classes, 4)
    chosen = choose_dars(count_all(predictions, classes), draw_distribution(seed, classes), ratio)
    kept = sum(
        (
            kept_counts(assign(p, chosen, image_generator(seed, 1, str(i))), classes)
            for i, p in enumerate(predictions)
        ),
        np.zeros(classes, np.int64),
    )
    assert (kept <= chosen.predicted).all()
    enough = chosen.predicted >= chosen.wanted
    # Every image rounds its kept pixels up, by less than one (the slack is float32's).
    assert (kept[enough] >= chosen.wanted[enough] - 1e-3).all()
    assert (kept[enough] <= chosen.wanted[enough] + len(predictions) + 1e-3).all()
    assert np.array_equal(kept[~enough], chosen.predicted[~enough])


@some
@given(seeds, class_counts, ratios, ratios)
def test_a_larger_ratio_accepts_more(seed: int, classes: int, first: float, second: float) -> None:
    low, high = sorted((first, second))
    predictions = draw_predictions(seed, classes, 2)
    histogram, distribution = count_all(predictions, classes), draw_distribution(seed, classes)
    for less, more in (
        (choose_dars(histogram, distribution, low), choose_dars(histogram, distribution, high)),
        (choose_cbst(histogram, low), choose_cbst(histogram, high)),
        (choose_global(histogram, high), choose_global(histogram, low)),
    ):
        assert (less.accept >= more.accept).all()
        assert (less.accepted <= more.accepted).all()
        assert (less.wanted <= more.wanted).all()


@some
@given(seeds, class_counts, ratios)
def test_a_class_without_predictions_or_without_a_share_gets_nothing(
    seed: int, classes: int, ratio: float
) -> None:
    predictions = draw_predictions(seed, classes, 2)
    histogram, distribution = count_all(predictions, classes), draw_distribution(seed, classes)
    chosen = choose_dars(histogram, distribution, ratio)
    assert np.array_equal(np.isnan(chosen.threshold), chosen.predicted == 0)
    assert np.array_equal(chosen.keep == 0, (chosen.predicted == 0) | (chosen.wanted == 0))
    kept = sum(
        kept_counts(assign(p, chosen, image_generator(0, 1, n)), classes)
        for n, p in zip("ab", predictions, strict=True)
    )
    assert not kept[chosen.keep == 0].any()


@some
@given(seeds, class_counts)
def test_cbst_at_ratio_one_keeps_everything(seed: int, classes: int) -> None:
    predictions = draw_predictions(seed, classes, 2)
    chosen = choose_cbst(count_all(predictions, classes), 1)
    for i, prediction in enumerate(predictions):
        assert np.array_equal(assign(prediction, chosen, image_generator(0, 1, str(i))), prediction.classes)
