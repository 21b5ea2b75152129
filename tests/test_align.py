"""Aligned decisions: against exact quantiles, a slow search, and laws that hold whatever the scores."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from darseg.errors import DataError, RecipeError
from darseg.pseudo import pixel_sample
from darseg.pseudo.align import TOLERANCE, align
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.pixel_sample import PixelSample, pixel_hashes, sample_limit
from wording import refused, says

seeds = st.integers(0, 2**32)
some = settings(max_examples=40, deadline=None)


def draw(seed: int, classes: int, pixels: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a network that favors frequent classes, multiples of 2^-12 in float32 [N, K]; and true shares."""
    rng = np.random.default_rng(seed)
    share = np.maximum(rng.dirichlet(np.ones(classes)), 0.02)
    share /= share.sum()
    truth = rng.choice(classes, pixels, p=share)
    scores = rng.normal(0, spread, (pixels, classes)) + np.log(share)
    scores[np.arange(pixels), truth] += 1.5
    return (np.round(scores * 4096) / 4096).astype(np.float32), share


def shares(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares of argmax p·w, computed the obvious way."""
    decided = (scores.astype(np.float64) + np.log(weights)).argmax(axis=1)
    return np.bincount(decided, minlength=len(weights)) / len(scores)


@some
@given(seeds, st.integers(1, 300), st.floats(0.02, 0.98))
def test_two_classes_are_the_exact_quantile(seed: int, pixels: int, share: float) -> None:
    scores = np.random.default_rng(seed).normal(0, 2, (pixels, 2))
    alignment = align(scores, [1 - share, share], bound=1e9, tolerance=0)
    margins = np.sort(scores[:, 1] - scores[:, 0])
    if not 0 < (margins > 0).sum() < pixels:
        assert not alignment.converged and alignment.weights.tolist() == [1, 1]
        return
    # The float64 rounding of (1 - share) · pixels decides ties of one half; both neighbors are as near.
    negatives = int(np.count_nonzero(margins + np.log(alignment.weights[1] / alignment.weights[0]) <= 0))
    assert alignment.converged and abs(negatives - (1 - share) * pixels) <= 0.5 + 1e-6
    threshold = np.log(alignment.weights[0] / alignment.weights[1])
    quantile = np.concatenate([[-np.inf], margins, [np.inf]])[negatives : negatives + 2]
    assert quantile[0] <= threshold <= quantile[1]


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(8, 40))
def test_three_classes_do_as_well_as_a_slow_search(seed: int, pixels: int) -> None:
    """Every pair of weights on a fine grid is tried."""
    scores, share = draw(seed, 3, pixels)
    alignment = align(scores, share, bound=1e6, tolerance=0)
    if not alignment.reachable.all():
        return
    grid = np.linspace(-6, 6, 241)
    second, third = (axis.ravel()[:, None] for axis in np.meshgrid(grid, grid))
    z = scores.astype(np.float64)
    a, b, c = z[:, 0], z[:, 1] + second, z[:, 2] + third
    counts = [((a >= b) & (a >= c)), (b > a) & (b >= c), (c > a) & (c > b)]
    errors = sum(np.abs(won.mean(axis=1) - p) for won, p in zip(counts, share, strict=True))
    assert alignment.converged
    assert np.abs(alignment.reached - share).sum() <= np.min(errors) + 1e-9


@some
@example(945, 10, 30, 2.0)  # a class has its share at the bound
@given(seeds, st.integers(2, 12), st.integers(30, 3000), st.sampled_from([2.0, 5.0, 50.0]))
def test_shares_are_reached_and_nothing_contradicts_them(
    seed: int, classes: int, pixels: int, bound: float
) -> None:
    scores, share = draw(seed, classes, pixels)
    alignment = align(scores, share, bound=bound)
    weights, reachable = alignment.weights, alignment.reachable
    assert alignment.pixels == pixels and np.allclose(alignment.reached, shares(scores, weights), atol=1e-9)
    assert ((weights >= 1 / bound * 0.999999) & (weights <= bound * 1.000001)).all()
    assert (weights[~reachable] == 1).all()
    if not alignment.converged:
        assert (weights == 1).all()
        return
    assert np.abs(alignment.reached - alignment.target).max() <= TOLERANCE + 2.01 / pixels
    assert (alignment.target[~reachable] == alignment.reached[~reachable]).all()
    rest = alignment.target[reachable] / share[reachable]
    assert np.allclose(rest, rest[0])
    logs = np.log(weights[reachable])
    if not np.isclose(np.abs(logs).max(), math.log(bound)):  # rescaled, a weight at the bound would leave it
        assert abs(np.average(logs, weights=share[reachable])) < 1e-9


@some
@given(seeds, st.integers(2, 12), st.randoms())
def test_neither_order_nor_constants_matter(seed: int, classes: int, random: Any) -> None:
    scores, share = draw(seed, classes, 500)
    alignment = align(scores, share)
    order = list(range(500))
    random.shuffle(order)
    constants = np.random.default_rng(seed).integers(-50, 50, (500, 1)).astype(np.float32)
    for changed in (scores[order], scores + constants):
        again = align(changed, share)
        assert again.to_json() == alignment.to_json()


@some
@given(seeds, st.integers(2, 8))
def test_aligned_decisions_need_no_second_alignment(seed: int, classes: int) -> None:
    scores, share = draw(seed, classes, 2000)
    alignment = align(scores, share, bound=100)
    if not alignment.converged or not alignment.reachable.all():
        return
    again = align(scores + np.log(alignment.weights), share, bound=100)
    assert np.allclose(again.weights, 1, atol=0.02) and again.converged
    scaled = align(scores + np.log(alignment.weights * 3), share, bound=100)
    assert np.array_equal(scaled.reached, again.reached)


@some
@given(seeds, st.integers(2, 6), st.floats(0.1, 10))
def test_decisions_do_not_depend_on_weights_that_were_there_before(
    seed: int, classes: int, scale: float
) -> None:
    """Scores of p·v, for any v and any scale of it, lead to the same decisions; weights are w/v, at one scale."""
    scores, share = draw(seed, classes, 3000)
    alignment = align(scores, share, bound=1e4)
    v = np.exp(np.random.default_rng(seed).normal(0, 0.5, classes))
    again = align((scores + np.log(v * scale)).astype(np.float32), share, bound=1e4)
    if not (alignment.converged and again.converged and (alignment.reachable & again.reachable).all()):
        return
    product = again.weights * v
    decisions = [
        (scores.astype(np.float64) + np.log(weights)).argmax(axis=1)
        for weights in (alignment.weights, product, 7 * product)
    ]
    assert np.mean(decisions[0] != decisions[1]) < 0.01
    assert np.array_equal(decisions[1], decisions[2])
    ratio = product / alignment.weights
    assert np.allclose(ratio / ratio[0], 1, atol=0.05)
    assert abs(np.average(np.log(again.weights), weights=share)) < 1e-9


@settings(max_examples=120, deadline=None)
@given(
    seeds,
    st.sampled_from([2, 3, 7, 40, 255]),
    st.sampled_from([1, 2, 50, 700]),
    st.sampled_from(["normal", "whole", "impossible", "huge", "equal", "one"]),
    st.sampled_from([1.0000001, 1.5, 5.0, 1e30]),
    st.sampled_from([0, 0.5, 1]),
    st.booleans(),
)
def test_every_number_is_finite_whatever_the_scores(
    seed: int, classes: int, pixels: int, kind: str, bound: float, strength: float, interval: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, rng.choice([1e-4, 1, 30]), (pixels, classes))
    match kind:
        case "whole":
            scores = np.round(scores)
        case "impossible":
            scores[rng.random(scores.shape) < 0.4] = -np.inf
            scores[np.arange(pixels), rng.integers(0, classes, pixels)] = 1
        case "huge":
            scores = (scores * 1e5).clip(-65504, 65504).astype(np.float16)
        case "equal":
            scores[:] = 3
        case "one":
            scores[:, rng.integers(0, classes)] += 100
    share = rng.dirichlet(np.full(classes, rng.choice([0.05, 1, 20])))
    share /= share.sum()
    wide = rng.random(classes) * 0.1
    ends = (np.maximum(share - wide, 0), share + wide) if interval else None
    alignment = align(scores, share, bound=bound, strength=strength, interval=ends)
    for values in (alignment.weights, alignment.target, alignment.reached, alignment.standard_error):
        assert np.isfinite(values).all()
    assert alignment.plain is not None and np.allclose(alignment.plain, shares(scores, np.ones(classes)))
    assert np.allclose(alignment.target.sum(), 1) and np.allclose(alignment.reached.sum(), 1)
    assert Alignment.from_json(json.loads(json.dumps(alignment.to_json()))).to_json() == alignment.to_json()


def test_a_network_that_reaches_less_than_half_of_the_classes_stays_plain() -> None:
    """Two classes of five could be aligned; with a sixth one that is not wanted, three of five are out of reach too."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (4000, 6)) + np.array([1, 0, -40, -40, -40, -40])
    weak = align(scores, [0.4, 0.3, 0.1, 0.1, 0.1, 0])
    assert not weak.converged and weak.weights.tolist() == [1] * 6
    assert np.array_equal(weak.reached, shares(scores, np.ones(6)))
    [warning] = weak.warnings(["a", "b", "c", "d", "e", "f"])
    says(warning, "of 5 classes, 3", "c, d, e)", "[1/5, 5]")
    enough = align(scores, [0.4, 0.4, 0.1, 0.1, 0, 0])
    assert enough.converged and enough.reachable.tolist() == [True, True] + [False] * 4
    [warning] = enough.warnings(["a", "b", "c", "d", "e", "f"])
    says(warning, "c, d, e, f", "[1/5, 5]")
    assert align(*draw(1, 3, 5000), bound=50).warnings(["a", "b", "c"]) == []
    equal = align(np.repeat([[1.0, 0.0], [0.0, 1.0]], 50, axis=0), [0.25, 0.75])
    [warning] = equal.warnings(["a", "b"])
    says(warning, "equal scores")


def test_it_is_not_always_the_plain_result() -> None:
    scores, share = draw(1, 5, 20_000)
    alignment = align(scores, share, bound=20)
    assert alignment.converged and alignment.reachable.all() and alignment.iterations > 0
    plain = np.abs(shares(scores, np.ones(5)) - share).max()
    assert plain > 0.05 and np.abs(alignment.reached - share).max() < 3e-4


def test_strength_is_a_power_of_the_weights() -> None:
    scores, share = draw(1, 5, 5000)
    none, half, full = (align(scores, share, bound=20, strength=s) for s in (0, 0.5, 1))
    assert none.weights.tolist() == [1] * 5 and np.array_equal(none.reached, shares(scores, none.weights))
    assert np.allclose(half.weights**2, full.weights) and np.array_equal(half.target, full.target)
    assert np.array_equal(half.reached, shares(scores, half.weights))


def test_a_class_out_of_reach_is_neither_raised_nor_lowered() -> None:
    """The third class hardly has a score; its weight would be far above 5, whatever the scale of the others."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (20_000, 3)) + np.array([1.5, 0, 0])
    scores[:, 2] -= 6
    scores[:100, 2] = 9
    alignment = align(scores, [0.4, 0.35, 0.25])
    assert alignment.converged and alignment.reachable.tolist() == [True, True, False]
    assert alignment.weights[2] == 1 and alignment.target[2] == alignment.reached[2]
    assert abs(alignment.reached[2] - 0.005) < 1e-3
    assert np.isclose(alignment.reached[0] / alignment.reached[1], 40 / 35, atol=0.01)
    assert abs(0.4 * np.log(alignment.weights[0]) + 0.35 * np.log(alignment.weights[1])) < 1e-9


def test_a_class_never_predicted_and_one_without_target_are_out_of_reach() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (5000, 4)) + np.array([1, 0, -40, -0.5])
    alignment = align(scores, [0.5, 0.4, 0.1, 0])
    assert alignment.converged and alignment.reachable.tolist() == [True, True, False, False]
    assert alignment.weights[2:].tolist() == [1, 1]
    assert alignment.target[2] == 0 and alignment.target[3] == alignment.reached[3] > 0.05


def test_a_share_inside_its_interval_moves_nothing() -> None:
    scores, _ = draw(2, 4, 5000)
    plain = shares(scores, np.ones(4))
    inside = align(scores, plain, interval=(plain - 0.01, plain + 0.01))
    assert inside.converged and inside.weights.tolist() == [1] * 4 and inside.iterations == 0
    wanted = plain + np.array([-0.04, 0.04, 0, 0])
    low, high = np.maximum(wanted - 0.02, 0), wanted + 0.02
    moved = align(scores, wanted, interval=(low, high))
    assert moved.converged and moved.weights[2:].tolist() == [1, 1]
    assert np.allclose(moved.reached[:2], [high[0], low[1]], atol=1e-3)
    point = align(scores, wanted, interval=(wanted, wanted))
    assert np.allclose(point.reached, wanted, atol=5e-4)


def test_equal_scores_that_cannot_be_divided_stay_plain() -> None:
    scores = np.repeat([[1.0, 0.0], [0.0, 1.0]], 50, axis=0)
    alignment = align(scores, [0.25, 0.75])
    assert not alignment.converged and alignment.weights.tolist() == [1, 1]
    assert alignment.reached.tolist() == [0.5, 0.5] and alignment.target.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("seed", range(8))
def test_scores_in_half_precision_reach_their_shares_as_far_as_their_steps_allow(seed: int) -> None:
    """Between 2 and 4, float16 has steps of 0.002, at which hundreds of these pixels change their class together."""
    margins = np.random.default_rng(seed).normal(2.6, 1, 400_000)
    scores = np.stack([0 * margins, -margins], axis=1).astype(np.float16)
    found = align(scores - scores.max(1, keepdims=True), [0.6, 0.4])
    assert found.converged and np.abs(found.reached - [0.6, 0.4]).max() <= 16 * TOLERANCE
    step = np.bincount(np.unique(margins.astype(np.float16), return_inverse=True)[1]).max() / len(margins)
    assert np.abs(found.reached - [0.6, 0.4]).max() <= max(TOLERANCE, step)


def test_one_class_for_all_pixels_stays_plain() -> None:
    alignment = align(np.array([[3.0, 1, 0]] * 7), [0.2, 0.3, 0.5])
    assert not alignment.converged and alignment.weights.tolist() == [1] * 3
    assert alignment.reached.tolist() == [1, 0, 0] and alignment.reachable.tolist() == [True, False, False]


def test_scores_of_minus_infinity_are_impossible_classes() -> None:
    scores, share = draw(3, 3, 500)
    scores = np.concatenate([scores, np.full((500, 1), -np.inf, np.float32)], axis=1)
    alignment = align(scores, [*(share * 0.9), 0.1], bound=50)
    assert alignment.converged and not alignment.reachable[3]
    assert np.allclose(alignment.reached[:3], share, atol=0.003)


SCORES, SHARE = draw(0, 3, 10)
UNUSABLE: dict[str, tuple[Any, ...]] = {
    "length": (SCORES, [0.5, 0.5], DataError, "[10, 3]", "2 classes"),
    "negative": (SCORES, [0.5, 0.7, -0.2], DataError, "class 2: -0.2"),
    "nan": (SCORES, [0.5, np.nan, 0.5], DataError, "class 1: nan"),
    "sum": (SCORES, [0.5, 0.5, 0.5], DataError, "1.5"),
    "counts": (SCORES, [[0.5, 0.5]], DataError, "[1, 2]"),
    "no pixels": (SCORES[:0], SHARE, DataError, "no pixels"),
    "nan score": (np.where(SCORES[4, 1] == SCORES, np.nan, SCORES), SHARE, DataError, "1 of 10"),
    "integers": (SCORES.astype(int), SHARE, DataError, "int64 [10, 3]"),
}


@pytest.mark.parametrize(("scores", "target", "kind", "facts"), [
    (scores, target, kind, facts) for scores, target, kind, *facts in UNUSABLE.values()
], ids=list(UNUSABLE))  # fmt: skip
def test_what_cannot_be_aligned_is_refused(scores: Any, target: Any, kind: type, facts: list[str]) -> None:
    with refused(kind, *facts):
        align(scores, target)


def test_settings_out_of_range_are_all_named() -> None:
    with refused(RecipeError, "bound: found 1", "strength: found 2", "tolerance: found -1"):
        align(SCORES, SHARE, bound=1, strength=2, tolerance=-1)
    with refused(DataError, "2 lowest", "3 highest"):
        align(SCORES, SHARE, interval=([0, 0], [1, 1, 1]))
    with refused(DataError, "class 1", "[0.9, 1]"):
        align(SCORES, SHARE, interval=([0, 0.9, 0], [1, 1, 1]))


def test_an_alignment_is_stored_exactly_and_cannot_contradict_itself() -> None:
    alignment = align(*draw(1, 5, 500))
    columns = json.loads(json.dumps(alignment.to_json()))
    assert Alignment.from_json(columns).to_json() == alignment.to_json()
    with refused(DataError, "KeyError", "weights"):
        Alignment.from_json({})
    for damage in ({"bound": 0}, {"bound": 1e400}, {"pixels": 1e400}, {"weights": [10**400] * 5}):
        with refused(DataError, "bound" if "bound" in damage else "OverflowError"):
            Alignment.from_json(columns | damage)
    ones = np.ones(5)
    for changes, facts in (
        ({"weights": ones * 9}, ["1/bound"]),
        ({"weights": ones * np.nan}, ["1/bound"]),
        ({"weights": ones * 2, "reachable": np.zeros(5, bool)}, ["out of reach"]),
        ({"weights": ones * 2, "converged": False}, ["convergence"]),
        ({"target": ones}, ["target"]),
        ({"reached": -ones / 5}, ["reached"]),
        ({"strength": 2.0}, ["strength"]),
        ({"pixels": 0}, ["pixels"]),
        ({"plain": ones}, ["plain"]),
        ({"target": np.ones(4) / 4}, ["target is float64 [4]", "float64 [5]"]),
    ):
        with refused(DataError, *facts):
            replace(alignment, **changes)


# The sample of pixels.


def images(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"image{index}": rng.normal(0, 2, (3, *rng.integers(1, 30, 2))).astype(np.float32)
        for index in range(count)
    }


def sorted_rows(rows: np.ndarray) -> list[list[float]]:
    return sorted(rows.tolist())


@some
@given(seeds, st.integers(1, 8), st.integers(1, 2000), st.integers(1, 3), st.randoms())
def test_the_sample_depends_on_neither_order_nor_processes(
    seed: int, count: int, limit: int, processes: int, random: Any
) -> None:
    arrays = images(seed, count)
    alone = PixelSample(3, seed, limit)
    for name, scores in arrays.items():
        alone.add(name, scores)
    rows = sorted_rows(alone.rows(alone.sizes()))
    assert len(rows) <= limit
    total = sum(scores[0].size for scores in arrays.values())
    assert total > limit or len(rows) == total
    shuffled = list(arrays.items())
    random.shuffle(shuffled)
    parts = [PixelSample(3, seed, limit) for _ in range(processes)]
    for index, (name, scores) in enumerate(shuffled):
        parts[index % processes].add(name, scores)
    sizes = sum(part.sizes() for part in parts)
    joined = np.concatenate([part.rows(np.asarray(sizes)) for part in parts])
    assert sorted_rows(joined) == rows


def test_every_pixel_has_the_same_chance_and_the_seed_decides() -> None:
    hashes = np.concatenate([pixel_hashes(3, f"image{index}", 1000) for index in range(100)])
    assert len(np.unique(hashes)) == 100_000
    counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
    assert np.abs(counts - 6250).max() < 5 * np.sqrt(6250)
    assert not (pixel_hashes(3, "image0", 1000) == pixel_hashes(4, "image0", 1000)).any()
    by_position = hashes.reshape(100, 1000) < np.uint64(1 << 62)
    assert np.abs(by_position.sum(axis=0) - 25).max() < 5 * np.sqrt(25)


def test_the_error_of_a_share_is_the_one_stated() -> None:
    """Over 200 seeds, shares in the sample scatter around the true ones by the standard error, not more."""
    rng = np.random.default_rng(0)
    scores = (
        rng.normal(0, 1, (3, 200, 200)).astype(np.float32) + np.array([1, 0, -1], np.float32)[:, None, None]
    )
    true = np.bincount(scores.argmax(axis=0).ravel(), minlength=3) / 40_000
    scaled = []
    for seed in range(200):
        sample = PixelSample(3, seed, 2000)
        sample.add("image", scores)
        rows = sample.rows(sample.sizes())
        alignment = align(rows, true, strength=0)
        assert 1000 < alignment.pixels == len(rows) <= 2000
        scaled.append((alignment.reached - true) / alignment.standard_error)
    spread = np.std(scaled, axis=0)
    assert (spread > 0.8).all() and (spread < 1.15).all()
    assert np.abs(np.mean(scaled, axis=0)).max() < 4 / np.sqrt(200)


def test_a_sample_takes_constant_memory() -> None:
    scores = np.zeros((3, 100, 100), np.float32)

    def peak(count: int) -> int:
        sample = PixelSample(3, 0, 5000)
        tracemalloc.start()
        for index in range(count):
            sample.add(f"image{index}", scores)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(80) < 1.3 * peak(10)
    assert sample_limit(19) == pixel_sample.PIXELS and sample_limit(255) * 255 <= pixel_sample.SCORES
    assert PixelSample(255, 0, pixel_sample.PIXELS).limit == sample_limit(255)


def test_probabilities_are_sampled_as_their_logarithms() -> None:
    scores = np.random.default_rng(0).normal(0, 2, (3, 9, 9)).astype(np.float32)
    exponentials = np.exp(scores)
    logits, probabilities = PixelSample(3, 0), PixelSample(3, 0)
    logits.add("a", scores)
    probabilities.add("a", exponentials / exponentials.sum(axis=0), probabilities=True)
    rows = [sample.rows(sample.sizes()).astype(float) for sample in (logits, probabilities)]
    assert np.allclose(*rows, atol=0.01) and rows[0].max() == 0
    with refused(DataError, "a:", "[2, 9, 9]", "[3, H, W]"):
        logits.add("a", scores[:2])
