"""Scores to classes and confidences against slow versions; how predictions are kept; the pipeline."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.pipeline import AHEAD, overlapped
from darseg.data.prediction import FINE, FLOAT16, SCALES, ConfidenceScale, Prediction
from darseg.errors import DataError, StorageError
from darseg.model import decide as module
from darseg.model.decide import decide
from wording import refused

torch.set_num_threads(1)

seeds = st.integers(0, 2**32)
class_numbers = st.sampled_from([2, 3, 19, 150, 255])
shapes = st.tuples(st.integers(1, 140), st.sampled_from([1, 3, 13, 32, 48, 64, 65]))
strips = st.sampled_from([1, 700, 5000, 1 << 19])
KINDS = ("plain", "ties", "saturated", "huge", "flat")


def draw(seed: int, classes: int, shape: tuple[int, int], kind: str) -> torch.Tensor:
    """float32 logits [K, H, W] in which ties, saturation and values beyond float16 are common."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (classes, *shape))
    if kind == "ties":
        logits = np.round(logits / 2)
    elif kind == "saturated":
        logits *= 12
    elif kind == "huge":
        logits = rng.choice([-3e38, -70000.0, -60000.0, 0.0, 5.0, 60000.0], logits.shape)
        logits[0] = np.maximum(logits[0], -60000)  # all below float16's lowest is NaN, tested by itself
    elif kind == "flat":
        logits[:] = 0
    return torch.from_numpy(logits.astype(np.float32))


def decide_in_strips(strip: int, *arguments) -> Prediction:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRIP", strip)
        return decide(*arguments)


@settings(max_examples=60, deadline=None)
@given(seeds, class_numbers, shapes, st.sampled_from(KINDS), strips, st.booleans())
def test_float16_is_torchs_softmax_bit_for_bit(
    seed: int, classes: int, shape: tuple[int, int], kind: str, strip: int, half: bool
) -> None:
    logits = draw(seed, classes, shape, kind)
    given_ = logits.clamp(-65504).half() if half else logits
    before = given_.clone()
    prediction = decide_in_strips(strip, given_)
    probabilities = torch.softmax(logits.half(), dim=0)
    assert np.array_equal(prediction.codes, probabilities.amax(0).numpy().view(np.uint16))
    # First of the largest, found by looking from the last class to the first.
    first = np.zeros(shape, np.uint8)
    for k in reversed(range(classes)):
        first[(probabilities[k] == probabilities.amax(0)).numpy()] = k
    assert np.array_equal(prediction.classes, first)
    assert torch.equal(given_, before)


def fine_oracle(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First class with the largest logit, and ln(p / (1 - p)) in float64 without 1 - p being formed."""
    scores = logits.double().numpy()
    classes = scores.argmax(axis=0)
    top = np.take_along_axis(scores, classes[None], 0)
    others = scores.copy()
    np.put_along_axis(others, classes[None], -np.inf, 0)
    largest = others.max(axis=0)
    return classes, top[0] - largest - np.log(np.exp(others - largest).sum(axis=0))


def fine_codes(log_odds: np.ndarray) -> np.ndarray:
    return np.clip((log_odds + 8) * 1024, 0, 65535)


@settings(max_examples=60, deadline=None)
@given(seeds, class_numbers, shapes, st.sampled_from(KINDS), strips, st.booleans())
def test_fine_is_log_odds_in_float64(
    seed: int, classes: int, shape: tuple[int, int], kind: str, strip: int, half: bool
) -> None:
    logits = draw(seed, classes, shape, kind)
    if half:
        logits = logits.clamp(-60000).half()
    before = logits.clone()
    prediction = decide_in_strips(strip, logits, FINE)
    classes_HW, log_odds = fine_oracle(logits)
    assert np.array_equal(prediction.classes, classes_HW)
    assert np.abs(prediction.codes - fine_codes(log_odds)).max() <= (1 / 2048 + 1e-5) * 1024
    assert torch.equal(logits, before)


@settings(max_examples=40, deadline=None)
@given(seeds, class_numbers, shapes, st.sampled_from(KINDS), st.booleans())
def test_probabilities_are_taken_as_they_are(
    seed: int, classes: int, shape: tuple[int, int], kind: str, half: bool
) -> None:
    probabilities = torch.softmax(draw(seed, classes, shape, kind), dim=0)
    probabilities = probabilities.half() if half else probabilities
    before = probabilities.clone()
    coarse = decide(probabilities, FLOAT16, True)
    rounded = probabilities.half().numpy()
    assert np.array_equal(coarse.classes, rounded.argmax(axis=0))
    assert np.array_equal(coarse.codes, rounded.max(axis=0).view(np.uint16))
    fine = decide(probabilities, FINE, True)
    exact = probabilities.double().numpy()
    picked = exact.argmax(axis=0)
    assert np.array_equal(fine.classes, picked)
    others = exact.copy()
    np.put_along_axis(others, picked[None], 0, 0)
    with np.errstate(divide="ignore"):
        log_odds = np.log(exact.max(axis=0)) - np.log(others.sum(axis=0))
    assert np.abs(fine.codes - fine_codes(log_odds)).max() <= (1 / 2048 + 2e-5) * 1024
    assert torch.equal(probabilities, before)


def test_ties_go_to_the_first_class_on_both_scales() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0], [-1.0, 0.0]]).reshape(4, 1, 2)
    for scale in (FLOAT16, FINE):
        for probabilities in (False, True):
            given_ = logits.softmax(0) if probabilities else logits
            prediction = decide(given_, scale, probabilities)
            assert prediction.classes.tolist() == [[1, 0]]
            assert prediction.confidence[0] == pytest.approx(logits.softmax(0).amax(0)[0].numpy(), abs=3e-4)


def test_float16_decides_by_rounded_probabilities_and_fine_by_logits() -> None:
    """Two logits that differ by less than float16 can tell: the first class wins there, the larger in fine."""
    logits = torch.tensor([1.0, 1.0001]).reshape(2, 1, 1)
    assert decide(logits).classes.tolist() == [[0]]
    assert decide(logits, FINE).classes.tolist() == [[1]]


def test_rounding_above_one_is_one() -> None:
    values = torch.tensor([1.0009765625, 0.0]).reshape(2, 1, 1).half()
    assert decide(values, FLOAT16, True).confidence.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("width", "height"), [(48, 150), (64, 9), (65, 200), (1, 300), (13, 64), (13, 65), (128, 3)]
)
def test_strips_are_whole_vectors_and_cover_every_row_once(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, softmax, seen = draw(1, 3, (height, width), "plain"), torch.softmax, []
    wanted = torch.softmax(logits.half(), dim=0).numpy()

    def noted(scores: torch.Tensor, *arguments, **options) -> torch.Tensor:
        seen.append(tuple(scores.shape))
        return softmax(scores, *arguments, **options)

    monkeypatch.setattr(module, "STRIP", 1)
    monkeypatch.setattr(torch, "softmax", noted)
    prediction = decide(logits)
    rows = [shape[1] for shape in seen]
    assert sum(rows) == height and all(shape == (3, shape[1], width) for shape in seen)
    assert all(count * width % 64 == 0 for count in rows[:-1])
    assert len(rows) > 1 or height <= 64
    assert np.array_equal(prediction.classes, wanted.argmax(axis=0))
    assert np.array_equal(prediction.codes, wanted.max(axis=0).view(np.uint16))


def scores_with(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Three classes, 2 x 2 pixels, the given values in the first class."""
    scores = torch.zeros(3, 2, 2, dtype=dtype)
    scores[0].view(-1)[: len(values)] = torch.tensor(values, dtype=dtype)
    return scores


NAN, INF = float("nan"), float("inf")
NOT_SCORES: dict[str, tuple[torch.Tensor, bool, tuple[str, ...]]] = {
    "nan": (scores_with(NAN, NAN), False, ("2 of 12", "NaN")),
    "nan as probabilities": (scores_with(NAN, NAN), True, ("2 of 12", "NaN")),
    "infinite": (scores_with(INF), False, ("1 of 12", "infinite")),
    "infinite both ways": (scores_with(-INF, INF), False, ("2 of 12", "infinite")),
    "infinite float16": (scores_with(-INF, dtype=torch.float16), False, ("1 of 12", "infinite")),
    "float64": (scores_with(dtype=torch.float64), False, ("torch.float64 [3, 2, 2]", "float16 or float32")),
    "int64": (scores_with(dtype=torch.int64), False, ("torch.int64 [3, 2, 2]", "float16 or float32")),
    "no classes": (scores_with()[0], False, ("torch.float32 [2, 2]", "[K, H, W]")),
    "a batch": (scores_with()[None], False, ("torch.float32 [1, 3, 2, 2]", "[K, H, W]")),
    "one class": (scores_with()[:1], False, ("[1, 2, 2]", "2 to 255")),
    "256 classes": (torch.zeros(256, 1, 1), False, ("[256, 1, 1]", "2 to 255")),
    "no pixels": (scores_with()[:, :0], False, ("[3, 0, 2]", "at least one pixel")),
    "sums of 0": (scores_with(), True, ("from 0 to 0", "by up to 1.")),
    "sums of 1.5": (scores_with(1, 1, 1, 1.5), True, ("from 0 to 1.5", "up to 0.5", "--probabilities")),
    "negative": (scores_with(-1, 1, 1, 1), True, ("from -1 to 1", "softmax")),
}


@pytest.mark.parametrize(("scores", "probabilities", "facts"), NOT_SCORES.values(), ids=NOT_SCORES)
def test_what_is_not_scores_is_refused_with_the_images_name(
    scores: torch.Tensor, probabilities: bool, facts: tuple[str, ...]
) -> None:
    with refused(DataError, "street 7: ", *facts) as error:
        decide(scores, FLOAT16, probabilities, "street 7")
    with pytest.raises(DataError) as same:
        decide(scores, FINE, probabilities, "street 7")
    assert str(same.value) == str(error.value)


@pytest.mark.parametrize("value", [65520.0, 70000.0, 3e38])
def test_logits_beyond_float16_are_refused_there_and_accepted_by_fine(value: float) -> None:
    scores = scores_with(0, value)
    with refused(DataError, "street 7: ", f"{value:g}", "65504", "confidence scale fine"):
        decide(scores, FLOAT16, name="street 7")
    fine = decide(scores, FINE, name="street 7")
    assert fine.classes.tolist() == [[0, 0], [0, 0]] and fine.codes[0, 1] == FINE.codes - 1


def test_the_largest_number_of_float16_is_accepted() -> None:
    assert decide(scores_with(65519.0)).codes[0, 0] == FLOAT16.codes - 1
    with refused(DataError, "70000"):
        decide(torch.full((3, 1, 1), -70000.0))  # each infinite in float16: no softmax
    assert decide(torch.full((3, 1, 1), -70000.0), FINE).confidence[0, 0] == pytest.approx(1 / 3, abs=1.3e-4)


# How a prediction is kept.


def draw_prediction(seed: int, shape: tuple[int, int], scale: ConfidenceScale, smooth: bool) -> Prediction:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, scale.codes, shape)
    classes = rng.integers(0, 256, shape)
    if smooth:
        codes, classes = np.sort(codes, axis=1), np.sort(classes, axis=0)
    return Prediction(classes.astype(np.uint8), codes.astype(np.uint16), scale)


def equal(first: Prediction, second: Prediction) -> bool:
    same = np.array_equal(first.classes, second.classes) and np.array_equal(first.codes, second.codes)
    return same and first.scale is second.scale


predictions = st.builds(
    draw_prediction,
    seeds,
    st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from([(1, 1), (1, 777), (777, 1)]),
    st.sampled_from(list(SCALES.values())),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(predictions)
def test_kept_and_read_again_is_the_same(prediction: Prediction) -> None:
    data = prediction.to_bytes()
    again = Prediction.from_bytes(data)
    assert equal(again, prediction) and again.classes.dtype == np.uint8 and again.codes.dtype == np.uint16
    assert again.to_bytes() == data
    by_columns = [np.asfortranarray(array) for array in (prediction.classes, prediction.codes)]
    assert Prediction(*by_columns, prediction.scale).to_bytes() == data


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_damage_never_passes_for_a_prediction(scale: ConfidenceScale) -> None:
    prediction = draw_prediction(3, (6, 7), scale, True)
    data = prediction.to_bytes()
    for length in range(len(data)):
        with pytest.raises(DataError, match=f" {length} bytes "):
            Prediction.from_bytes(data[:length])
    noticed = 0
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:  # some bits of the format mean nothing for the content
            assert equal(Prediction.from_bytes(bytes(flipped)), prediction)
        except DataError:
            noticed += 1
    assert noticed > 0.9 * 8 * len(data)


def test_other_content_is_refused() -> None:
    def packed(head: object, body: bytes) -> bytes:
        return zstandard.compress(json.dumps(head).encode() + b"\n" + body)

    about = {"scale": "float16", "height": 1, "width": 2}
    assert Prediction.from_bytes(packed(about, bytes(6))).codes.tolist() == [[0, 0]]
    others = [
        b"",
        b"nonsense",
        zstandard.compress(b"no line"),
        zstandard.compress(b"no json\n"),
        packed([], bytes(6)),
        packed(about, bytes(5)),
        packed(about | {"scale": "coarse"}, bytes(6)),
        packed(about | {"width": "2"}, bytes(6)),
    ]
    for data in others:
        with refused(DataError, f" {len(data)} bytes ", vary=[r"\(.*\)"]):
            Prediction.from_bytes(data)
    with refused(DataError, "2 of 2", "15360", "65280"):
        Prediction.from_bytes(packed(about, b"\0\0\xff\0\0\0"))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_codes_sort_as_confidences_do(scale: ConfidenceScale) -> None:
    confidences = scale.confidence(np.arange(scale.codes))
    assert (np.diff(confidences) >= 0).all() and confidences[0] >= 0 and confidences[-1] == 1
    assert scale.at_least(0.0) == 0 and scale.at_least(1.0000001) == scale.codes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SCALES.values())), st.floats(0, 1) | st.sampled_from([0.5, 0.75, 0.999755859375]))
def test_at_least_is_the_smallest_code_not_below(scale: ConfidenceScale, confidence: float) -> None:
    code = scale.at_least(confidence)
    assert scale.confidence(np.array(code)) >= confidence
    assert code == 0 or scale.confidence(np.array(code - 1)) < confidence


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 55, width=32))
def test_fine_is_as_exact_as_it_says(log_odds: float) -> None:
    """At most p(1 - p)/2048 <= 1.3e-4 of p and 1/2048 of 1 - p, with float32's last bits of the log-odds."""
    code = int(decide(torch.tensor([log_odds, 0.0]).reshape(2, 1, 1), FINE).codes[0, 0])
    p, rest = 1 / (1 + np.exp(-log_odds)), 1 / (1 + np.exp(log_odds))
    error = abs(FINE.confidence(np.array(code)) - p)
    assert error <= 1.3e-4 and error <= p * rest * (1 / 2048 + 2e-5) + 1e-15
    assert abs(1 / (1 + np.exp(code / 1024 - 8)) - rest) <= rest * (1 / 2048 + 2e-5)


def test_fine_reaches_down_to_the_flattest_prediction() -> None:
    flat = decide(torch.zeros(255, 1, 1), FINE)
    assert flat.codes[0, 0] > 0 and flat.confidence[0, 0] == pytest.approx(1 / 255, rel=1e-3)


# The pipeline.


class Witness:
    """Notes what happens to the items, and in which thread."""

    def __init__(self, read_fails: Callable[[int], bool] = lambda item: False) -> None:
        self.read_fails = read_fails
        self.events: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {"read": set(), "work": set(), "write": set()}
        self.lock = threading.Lock()

    def note(self, what: str, item: int) -> None:
        with self.lock:
            self.events.append((what, item))
            self.threads[what].add(threading.get_ident())

    def read(self, item: int) -> int:
        self.note("read", item)
        if self.read_fails(item):
            raise DataError(f"item {item} is bad")
        return item * 10

    def work(self, item: int, read: int) -> int:
        self.note("work", item)
        return read + 1

    def write(self, item: int, result: int) -> None:
        assert result == item * 10 + 1
        self.note("write", item)

    def items(self, what: str) -> list[int]:
        return [item for event, item in self.events if event == what]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 30])
def test_every_item_is_read_ahead_worked_on_in_order_and_written(count: int) -> None:
    witness, advanced = Witness(), []
    overlapped(
        iter(range(count)),
        read=witness.read,
        work=witness.work,
        write=witness.write,
        advance=lambda: advanced.append(len(advanced)),
    )
    everything = list(range(count))
    assert witness.items("work") == everything and advanced == everything
    assert sorted(witness.items("read")) == sorted(witness.items("write")) == everything
    assert witness.threads["work"] <= {threading.get_ident()}
    assert threading.get_ident() not in witness.threads["read"] | witness.threads["write"]
    for item in range(
        AHEAD + 1, count
    ):  # memory is bounded: no item is read before the ones well ahead are gone
        assert witness.events.index(("read", item)) > witness.events.index(("work", item - AHEAD - 1))
        assert witness.events.index(("work", item)) > witness.events.index(("write", item - AHEAD - 1))


def test_items_that_cannot_be_used_are_all_named_once_the_others_are_done() -> None:
    witness, advanced = Witness(lambda item: item in (0, 3, 9)), []

    def work(item: int, read: int) -> int:
        if item == 5:
            raise DataError("item 5 is no good")
        return witness.work(item, read)

    with refused(DataError, "4 file(s)", "item 0 is", "item 3 is", "item 5 is", "item 9 is"):
        overlapped(
            range(10), read=witness.read, work=work, write=witness.write, advance=lambda: advanced.append(0)
        )
    assert sorted(witness.items("write")) == [1, 2, 4, 6, 7, 8] and len(advanced) == 10


@pytest.mark.parametrize("where", ["read", "work", "write"])
@pytest.mark.parametrize("bad", [3, 19])
def test_any_other_error_stops_at_once_after_what_was_being_written(where: str, bad: int) -> None:
    witness = Witness()
    plain = {name: getattr(witness, name) for name in ("read", "work", "write")}

    def failing(item: int, *rest: int):
        if item == bad:
            raise StorageError("full")
        return plain[where](item, *rest)

    parts = plain | {where: failing}
    with pytest.raises(StorageError, match="full"):
        overlapped(range(20), **parts)
    worked, written = witness.items("work"), witness.items("write")
    assert len(worked) <= bad + 2 * AHEAD
    assert set(range(bad)) <= set(written) <= set(worked) - ({bad} if where == "write" else set())
    assert len(set(written)) == len(written)
