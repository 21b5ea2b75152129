"""Pseudo labeling against a slow, obvious version: lists of floats, sorted, as in the release."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.prediction import FINE, FLOAT16, Prediction
from darseg.errors import DataError, RecipeError
from darseg.pseudo.assign import assign, image_generator, kept_counts
from darseg.pseudo.distribution import ClassDistribution, count_label_pixels, count_labels
from darseg.pseudo.histogram import ConfidenceHistogram, HistogramBuilder
from darseg.pseudo.thresholds import Thresholds, choose_cbst, choose_dars, choose_global
from wording import refused

torch.set_num_threads(1)


def prediction_of(logits: np.ndarray) -> Prediction:
    """float16 logits [K, H, W] to a prediction, by torch's float16 softmax."""
    probabilities = torch.softmax(torch.from_numpy(logits), dim=0).numpy()
    return Prediction(
        probabilities.argmax(axis=0).astype(np.uint8),
        np.ascontiguousarray(probabilities.max(axis=0)).view(np.uint16),
    )


class Case:
    """Logits of a few images and a prior, drawn so that ties, saturation and absence are common."""

    def __init__(self, seed: int, classes: int, images: int, kind: str, ratio: float) -> None:
        rng = np.random.default_rng(seed)
        self.classes, self.ratio = classes, ratio
        offset = rng.normal(0, 3, (classes, 1, 1))
        offset[rng.random(classes) < 0.3] = -40  # never predicted
        self.logits = []
        for _ in range(images):
            shape = (classes, int(rng.integers(1, 14)), int(rng.integers(1, 14)))
            logits = offset + rng.normal(0, 2, shape)
            if kind == "ties":
                logits = np.round(logits)
            elif kind == "saturated":
                logits = logits * 9
            elif kind == "huge":
                logits = rng.choice([-np.inf, -60000.0, -3.0, 0.0, 2.0, 60000.0], shape)
                logits[0] = np.maximum(logits[0], 0)  # not all -inf: that is NaN, tested by itself
            elif kind == "flat":
                logits = np.zeros(shape)
            self.logits.append(logits.astype(np.float16))
        self.predictions = [prediction_of(logits) for logits in self.logits]
        prior = rng.integers(0, 1000, classes) * (rng.random(classes) < 0.7)
        prior[0] += 1
        self.prior = ClassDistribution.from_counts(prior)
        builder = HistogramBuilder(classes)
        for prediction in self.predictions:
            builder.add(prediction)
        self.histogram = builder.build()

    def pixels(self) -> list[list[tuple[int, float]]]:
        """The class and confidence of each pixel of each image, read from the logits."""
        images = []
        for logits in self.logits:
            # Classes first, as the method has it: torch's kernels for other layouts differ in last bits.
            probabilities = torch.softmax(
                torch.from_numpy(logits).reshape(self.classes, -1), dim=0
            ).T.tolist()
            images.append([(row.index(max(row)), max(row)) for row in probabilities])
        return images


cases = st.builds(
    Case,
    seed=st.integers(0, 2**32),
    classes=st.one_of(st.integers(2, 20), st.sampled_from([2, 254, 255])),
    images=st.integers(1, 4),
    kind=st.sampled_from(["plain", "ties", "saturated", "huge", "flat"]),
    ratio=st.one_of(st.floats(0.001, 1), st.sampled_from([0.2, 0.4, 0.65, 1.0])),
)


def slow_kept(pixels: list[list[tuple[int, float]]], k: int, threshold: float, share: float) -> list[int]:
    """Pixels of class k that each image keeps, in torch's types as in the release."""
    kept = []
    for image in pixels:
        count = torch.tensor(sum(1 for c, confidence in image if c == k and confidence >= threshold))
        kept.append(int(count) - int(count - count.float() * share))
    return kept


@settings(max_examples=120, deadline=None)
@given(cases)
def test_dars_equals_sorting_every_pixel(case: Case) -> None:
    pixels = case.pixels()
    total = sum(len(image) for image in pixels)
    chosen = choose_dars(case.histogram, case.prior, case.ratio)
    labels = [
        assign(prediction, chosen, image_generator(0, 1, str(i)))
        for i, prediction in enumerate(case.predictions)
    ]
    kept = np.array([kept_counts(label, case.classes) for label in labels])
    for k in range(case.classes):
        confidences = sorted((p for image in pixels for c, p in image if c == k), reverse=True)
        wanted = int(case.ratio * case.prior.share[k] * total)
        assert chosen.predicted[k] == len(confidences)
        assert chosen.wanted[k] == wanted
        if not confidences:
            assert chosen.accept[k] == FLOAT16.codes
            assert np.isnan(chosen.threshold[k])
            assert chosen.keep[k] == chosen.accepted[k] == 0
            assert not kept[:, k].any()
            continue
        threshold = confidences[min(max(wanted, 1), len(confidences)) - 1]  # none wanted: as high as can be
        accepted = sum(1 for p in confidences if p >= threshold)
        share = min(1, wanted / accepted)
        assert chosen.threshold[k] == threshold
        assert chosen.accepted[k] == accepted
        assert chosen.keep[k] == share
        assert kept[:, k].tolist() == slow_kept(pixels, k, threshold, share)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_cbst_equals_sorting_every_pixel(case: Case) -> None:
    pixels = case.pixels()
    chosen = choose_cbst(case.histogram, case.ratio)
    for k in range(case.classes):
        confidences = sorted((p for image in pixels for c, p in image if c == k), reverse=True)
        if not confidences:
            assert chosen.accept[k] == FLOAT16.codes
            assert chosen.wanted[k] == chosen.keep[k] == 0
            continue
        rank = min(int(len(confidences) * case.ratio) + 1, len(confidences))
        assert chosen.threshold[k] == confidences[rank - 1]
        assert chosen.accepted[k] == sum(1 for p in confidences if p >= confidences[rank - 1])
        assert (chosen.wanted[k], chosen.keep[k]) == (rank, 1)


@settings(max_examples=60, deadline=None)
@given(cases, st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])))
def test_global_keeps_just_what_reaches_the_threshold(case: Case, threshold: float) -> None:
    chosen = choose_global(case.histogram, threshold)
    for i, (prediction, image) in enumerate(zip(case.predictions, case.pixels(), strict=True)):
        label = assign(prediction, chosen, image_generator(0, 0, str(i)))
        assert label.ravel().tolist() == [k if confidence >= threshold else 255 for k, confidence in image]
    assert (chosen.accept == FLOAT16.codes).tolist() == (chosen.predicted == 0).tolist()
    assert np.array_equal(chosen.wanted, chosen.accepted)


def predicted(rows: list[list[tuple[int, float]]]) -> Prediction:
    array = np.array(rows)
    return Prediction(array[..., 0].astype(np.uint8), array[..., 1].astype(np.float16).view(np.uint16))


def test_dars_by_hand() -> None:
    prediction = predicted([[(0, 1.0), (0, 1.0), (0, 1.0), (0, 0.75), (0, 0.5)], [(1, 0.5)] * 5])
    histogram = ConfidenceHistogram.count(prediction, 3)
    # 10 pixels at ratio 0.5: 2 of class 0, whose best three tie; 2 of class 1; 1 of class 2, never predicted.
    chosen = choose_dars(histogram, ClassDistribution(np.array([0.4, 0.4, 0.2])), 0.5)
    assert chosen.wanted.tolist() == [2, 2, 1]
    assert chosen.predicted.tolist() == [5, 5, 0]
    assert chosen.accepted.tolist() == [3, 5, 0]
    assert chosen.keep.tolist() == [2 / 3, 2 / 5, 0]
    assert chosen.threshold[:2].tolist() == [1.0, 0.5]
    assert np.isnan(chosen.threshold[2])
    label = assign(prediction, chosen, image_generator(0, 1, "a"))
    assert kept_counts(label, 3).tolist() == [2, 2, 0]
    assert label[0, 3:].tolist() == [255, 255]


def test_a_prior_of_zero_labels_nothing_and_too_few_predictions_are_all_kept() -> None:
    prediction = predicted([[(0, 1.0)] * 6 + [(1, 0.5), (1, 0.25)]])
    chosen = choose_dars(ConfidenceHistogram.count(prediction, 2), ClassDistribution(np.array([0.0, 1.0])), 1)
    assert chosen.accept.tolist() == [np.float16(1).view(np.uint16), np.float16(0.25).view(np.uint16)]
    assert chosen.wanted.tolist() == [0, 8]
    assert chosen.keep.tolist() == [0, 1]
    label = assign(prediction, chosen, image_generator(0, 1, "a"))
    assert label.tolist() == [[255] * 6 + [1, 1]]


def test_sampling_draws_every_accepted_pixel_equally_often() -> None:
    # 12 accepted, 5 wanted: 7 dropped (kept drawn); then 7 wanted: 5 dropped. Not only the tied ones.
    for wanted in (5, 7):
        prediction = predicted([[(0, 1.0)] * 4 + [(0, 0.5)] * 8 + [(1, 0.5)] * 4])
        counts = np.array([12, 4])
        chosen = Thresholds(
            np.array([1, 1], np.int32), np.array([wanted / 12, 1.0]), np.array([wanted, 4]), counts, counts
        )
        times = np.zeros(12)
        for i in range(3000):
            times += assign(prediction, chosen, image_generator(7, 1, f"image {i}"))[0, :12] == 0
        expected = 3000 * wanted / 12
        assert times.sum() == 3000 * wanted
        assert np.abs(times - expected).max() < 5 * np.sqrt(expected)


def test_float32_rounding_follows_the_release() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 300))
        share = float(rng.integers(1, count + 1) / count)
        counts = np.array([count, 0])
        prediction = Prediction(np.zeros((1, count), np.uint8), np.full((1, count), 15360, np.uint16))
        chosen = Thresholds(
            np.array([15360, FLOAT16.codes], np.int32), np.array([share, 0]), counts, counts, counts
        )
        label = assign(prediction, chosen, image_generator(0, 0, ""))
        num = torch.tensor(count)
        assert np.count_nonzero(label == 255) == int(num - num.float() * share)


def test_more_pixels_than_float32_counts() -> None:
    from darseg.pseudo.assign import _drop_count

    count = 2**24 + 3  # float32 has 2^24 + 4 next to it
    assert _drop_count(count, 1.0) == 0
    assert _drop_count(count, 0.0) == count


def test_image_generator_depends_on_seed_round_and_id() -> None:
    draws = {
        key: image_generator(*key).integers(2**63)
        for key in [
            (0, 1, "a"),
            (1, 1, "a"),
            (0, 2, "a"),
            (0, 1, "b"),
            (0, 11, "a"),
            (0, 1, "1a"),
            (0, 1, "ä/\udcff"),
        ]
    }
    assert len(set(draws.values())) == len(draws)
    assert image_generator(0, 1, "a").integers(2**63) == draws[0, 1, "a"]
    # Stored, so that a change of the recipe for seeds is noticed: it changes every label map.
    assert image_generator(0, 1, "aachen/000").integers(2**63) == 1827237030592856190


# What is refused.


def test_prediction_is_checked_and_read_only() -> None:
    classes, codes = np.zeros((2, 3), np.uint8), np.full((2, 3), 15360, np.uint16)
    prediction = Prediction(classes, codes)
    assert prediction.confidence.dtype == np.float32
    assert (prediction.confidence == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        prediction.classes[0, 0] = 1
    assert classes.flags.writeable
    with refused(DataError, "Prediction.classes", "int64 [2, 3]", "uint8 [H, W]"):
        Prediction(classes.astype(np.int64), codes)
    with refused(DataError, "Prediction.codes", "uint16 [6]"):
        Prediction(classes, codes.ravel())
    with refused(DataError, "Prediction.codes", "list"):
        Prediction(classes, [[1]])  # ty: ignore[invalid-argument-type]
    with refused(DataError, "[2, 3]", "[1, 3]"):
        Prediction(classes, codes[:1])
    with refused(DataError, "1 of 6", "15360", "15361"):
        Prediction(classes, np.where(np.arange(6).reshape(2, 3) == 4, 15361, 15360).astype(np.uint16))


@pytest.mark.parametrize("logits", [[np.inf, 0, 0], [-np.inf] * 3, [np.nan, 0, 0], [70000.0, 0, 0]])
def test_logits_that_overflow_float16_are_refused(logits: list[float]) -> None:
    with np.errstate(over="ignore"):
        half = np.array(logits).reshape(3, 1, 1).astype(np.float16)
    with refused(DataError, "1 of 1", "NaN"):
        prediction_of(half)


def test_large_finite_logits_saturate() -> None:
    prediction = prediction_of(np.array([60000, -60000, -np.inf]).reshape(3, 1, 1).astype(np.float16))
    assert prediction.codes.tolist() == [[FLOAT16.codes - 1]]


def test_what_is_not_a_distribution_is_refused() -> None:
    with refused(DataError, "3", "255"):
        ClassDistribution.from_counts([0, 0, 0])
    with refused(DataError, "class 1: -2"):
        ClassDistribution.from_counts([3, -2])
    with refused(DataError, "float64 [2]", "integers [K]"):
        ClassDistribution.from_counts([0.5, 0.5])
    for count in (1, 256):
        with refused(DataError, f"is {count};", "2 to 255"):
            ClassDistribution.from_counts([1] * count)
    with refused(DataError, "class 0: nan", "class 1: -1.0", "class 2: inf"):
        ClassDistribution(np.array([np.nan, -1.0, np.inf, 0.5]))
    with refused(DataError, "1.1, not 1", "ClassDistribution.from_counts"):
        ClassDistribution(np.array([0.6, 0.5]))
    with refused(DataError, "float32 [2]", "float64 [K]"):
        ClassDistribution(np.array([0.5, 0.5], np.float32))  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="read-only"):
        ClassDistribution.from_counts([1, 1]).share[0] = 1


def test_label_values_outside_the_classes_are_all_listed() -> None:
    good = np.array([[0, 1, 1, 255]], np.uint8)
    assert count_label_pixels(good, 2).tolist() == [1, 2]
    assert count_labels([("a", good), ("b", good)], 3).tolist() == [2, 4, 0]
    assert count_labels([], 3).tolist() == [0, 0, 0]
    bad = np.array([[0, 7, 7, 254]], np.uint8)
    with refused(DataError, "0..1", "255", "label map: value 7 (2 pixels), value 254 (1 pixel)"):
        count_label_pixels(bad, 2)
    with refused(DataError, "x.png: value 7 (2 pixels)", "z.png: int64 [1, 4]", "uint8 [H, W]"):
        count_labels([("x.png", bad), ("y.png", good), ("z.png", good.astype(np.int64))], 2)


def test_histogram_is_checked() -> None:
    histogram = ConfidenceHistogram.empty(3)
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0, 0] = 1
    with refused(DataError, "int64 [3, 5]", "int64 [K, 15361]"):
        ConfidenceHistogram(np.zeros((3, 5), np.int64))
    with refused(DataError, "1 histogram counts"):
        ConfidenceHistogram(histogram.counts - np.eye(3, FLOAT16.codes, dtype=np.int64)[:3] * [[1], [0], [0]])
    with refused(DataError, "is 1;", "2 to 255"):
        ConfidenceHistogram.empty(1)
    with refused(DataError, "3 and 4 classes", "float16 and float16"):
        histogram + ConfidenceHistogram.empty(4)
    with refused(DataError, "class 2", "2 classes (0..1)"):
        ConfidenceHistogram.count(predicted([[(2, 0.5)]]), 2)
    with refused(DataError, "float16", "fine"):
        HistogramBuilder(2, FINE).add(predicted([[(1, 0.5)]]))


def test_damaged_histogram_files_are_refused() -> None:
    data = ConfidenceHistogram.count(predicted([[(1, 0.5), (0, 0.75)]]), 2).to_bytes()
    foreign, pickled = io.BytesIO(), io.BytesIO()
    np.savez_compressed(foreign, something=np.zeros(3))
    np.savez_compressed(pickled, float16_counts=np.array([{}], object))
    damaged = [
        b"",
        b"PK",
        data[:-30],
        data[: len(data) // 2],
        foreign.getvalue(),
        pickled.getvalue(),
        b"\x80\x04N.",
    ]
    middle = bytearray(data)
    middle[len(data) // 2] ^= 0xFF
    for content in [*damaged, bytes(middle)]:
        with pytest.raises(DataError, match=f"{len(content)} bytes"):
            ConfidenceHistogram.from_bytes(content)
    with refused(DataError, "4 bytes", "histogram", vary=[r"\(\w+: .*\)"]):
        ConfidenceHistogram.from_bytes(b"\x80\x04N.")


def test_choosing_refuses_what_cannot_work() -> None:
    histogram = ConfidenceHistogram.count(predicted([[(1, 0.5), (0, 0.75)]]), 2)
    prior = ClassDistribution(np.array([0.5, 0.5]))
    with refused(DataError, "3 classes", "2"):
        choose_dars(histogram, ClassDistribution.from_counts([1, 1, 1]), 0.5)
    for ratio in (0, -0.1, 1.01, float("nan")):
        with refused(RecipeError, "labeling_ratio", f"found {ratio}"):
            choose_dars(histogram, prior, ratio)
        with pytest.raises(RecipeError, match=f"labeling_ratio: found {ratio}"):
            choose_cbst(histogram, ratio)
    for threshold in (-0.1, 1.1, float("nan")):
        with refused(RecipeError, "threshold", f"found {threshold}"):
            choose_global(histogram, threshold)
    empty = ConfidenceHistogram.empty(2)
    for choose in (
        lambda: choose_dars(empty, prior, 1),
        lambda: choose_cbst(empty, 1),
        lambda: choose_global(empty, 0),
    ):
        with refused(DataError, "histogram"):
            choose()


def test_thresholds_are_checked() -> None:
    good: dict[str, Any] = {
        "accept": np.array([3, FLOAT16.codes], np.int32),
        "keep": np.array([0.5, 0.0]),
        "wanted": np.array([2, 1]),
        "predicted": np.array([9, 0]),
        "accepted": np.array([4, 0]),
    }
    thresholds = Thresholds(**good)
    with pytest.raises(ValueError, match="read-only"):
        thresholds.keep[0] = 1
    changes: list[tuple[dict[str, Any], list[str]]] = [
        ({"accept": np.array([3, 4], np.int64)}, ["accept is int64 [2]", "int32 [2]"]),
        ({"predicted": np.array([3])}, ["predicted is int64 [1]", "int64 [2]"]),
        ({"accept": np.array([-1, FLOAT16.codes], np.int32)}, ["class 0: accept", "15360"]),
        ({"keep": np.array([0.5, 0.1])}, ["class 1: keep"]),
        ({"keep": np.array([np.nan, 0.0])}, ["class 0: keep"]),
        ({"wanted": np.array([2, -1])}, ["class 1: wanted"]),
        ({"accepted": np.array([10, 0])}, ["class 0: accepted", "predicted"]),
        ({"predicted": np.array([9, 1]), "accepted": np.array([4, 1])}, ["class 1: accepted"]),
    ]
    for change, facts in changes:
        with refused(DataError, *facts):
            Thresholds(**(good | change))
    with refused(DataError, "is 1;"):
        Thresholds(**{name: array[:1] for name, array in good.items()})


def test_a_prediction_must_fit_the_thresholds() -> None:
    thresholds = choose_cbst(ConfidenceHistogram.count(predicted([[(1, 0.5), (0, 0.75)]]), 2), 1)
    generator = image_generator(0, 0, "")
    with refused(DataError, "class 2", "2 classes"):
        assign(predicted([[(2, 0.5)]]), thresholds, generator)
    fine = Prediction(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint16), FINE)
    with refused(DataError, "scale fine", "float16"):
        assign(fine, thresholds, generator)


def test_damaged_thresholds_files_are_refused() -> None:
    histogram = ConfidenceHistogram.count(predicted([[(1, 0.5), (0, 0.75)]]), 3)
    columns = choose_cbst(histogram, 1).to_json()
    assert columns["threshold"] == [0.75, 0.5, None]
    assert columns == json.loads(json.dumps(columns))
    damaged: list[Any] = [
        [],
        3,
        {},
        columns | {"threshold": ["a", 1, None]},
        columns | {"threshold": [1, [2], None]},
    ]
    for content in damaged:
        with pytest.raises(DataError, match="thresholds"):
            Thresholds.from_json(content)
    with refused(DataError, "thresholds", "'confidence'"):
        Thresholds.from_json({})
    for threshold in (1.5, 0.5, None):
        with pytest.raises(DataError, match="codes"):
            Thresholds.from_json(columns | {"threshold": [threshold, 0.5, None]})
    with refused(DataError, "thresholds", "codes"):
        Thresholds.from_json(columns | {"threshold": [0.3, 0.5, None]})
    with refused(DataError, "predicted is float64 [3]"):
        Thresholds.from_json(columns | {"predicted": [1.5, 1, 0]})
