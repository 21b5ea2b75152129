"""Re-distribution on arrays against a slow version: every confidence sorted, as the method says."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.config.text import load_recipe
from darseg.data.prediction import SCALES
from darseg.errors import DataError, RecipeError
from darseg.pseudo.labeling import Confidence, Labeling
from darseg.pseudo.redistribute import redistribute
from darseg.run.redistribute import read_scores
from wording import refused, says

torch.set_num_threads(1)

Arrays = dict[str, np.ndarray]


def draw(seed: int, classes: int, images: int, kind: str) -> Arrays:
    """Logits of images of differing sizes and both types, with many ties; some classes are never predicted."""
    rng = np.random.default_rng(seed)
    offset = rng.normal(0, 2, (classes, 1, 1))
    offset[rng.random(classes) < 0.3] = -40
    arrays = {}
    for index in range(images):
        logits = offset + rng.normal(0, 2, (classes, *rng.integers(1, 13, 2)))
        if kind == "ties":
            logits = np.round(logits)
        elif kind == "saturated":
            logits *= 9
        arrays[f"street/{index}"] = logits.astype(rng.choice([np.float16, np.float32]))
    return arrays


def draw_counts(seed: int, classes: int) -> list[int]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10**6, classes) * (rng.random(classes) < 0.8)
    counts[0] += 1
    return counts.tolist()


def decided(arrays: Arrays) -> dict[str, list[list[tuple[int, float]]]]:
    """Rows of (class, confidence) for each image, by torch's float16 softmax."""
    images = {}
    for name, logits in arrays.items():
        probabilities = torch.softmax(torch.from_numpy(logits).half(), dim=0).numpy()
        classes, confidences = probabilities.argmax(axis=0), probabilities.max(axis=0)
        images[name] = [
            list(zip(*row, strict=True)) for row in zip(classes.tolist(), confidences.tolist(), strict=True)
        ]
    return images


def flat(image: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [pixel for row in image for pixel in row]


seeds = st.integers(0, 2**32)
class_numbers = st.integers(2, 12) | st.just(255)
kinds = st.sampled_from(["plain", "ties", "saturated"])
ratios = st.floats(0.001, 1) | st.sampled_from([0.2, 0.4, 0.65, 1.0])


@settings(max_examples=60, deadline=None)
@given(seeds, class_numbers, st.integers(1, 4), kinds, ratios, st.booleans())
def test_dars_equals_sorting_every_confidence(
    seed: int, classes: int, images: int, kind: str, ratio: float, sampling: bool
) -> None:
    arrays, counts = draw(seed, classes, images, kind), draw_counts(seed, classes)
    result = redistribute(arrays, counts, ratio, sampling="random" if sampling else "none", seed=seed)
    described = result.thresholds.to_json()
    pixels = decided(arrays)
    total = sum(len(flat(image)) for image in pixels.values())
    assert list(result.labels) == list(arrays)
    kept = dict.fromkeys(range(classes), 0)
    for k in range(classes):
        ranked = sorted((p for image in pixels.values() for c, p in flat(image) if c == k), reverse=True)
        wanted = int(ratio * (counts[k] / sum(counts)) * total)
        assert described["predicted"][k] == len(ranked) and described["wanted"][k] == wanted
        if not ranked:
            assert described["threshold"][k] is None
            assert described["keep"][k] == described["accepted"][k] == 0
            continue
        threshold = ranked[min(max(wanted, 1), len(ranked)) - 1]
        accepted = sum(p >= threshold for p in ranked)
        share = min(1, wanted / accepted) if sampling or wanted == 0 else 1
        assert described["threshold"][k] == threshold
        assert described["accepted"][k] == accepted and described["keep"][k] == share
        for name, image in pixels.items():
            m = torch.tensor(sum(c == k and p >= threshold for c, p in flat(image)))
            labeled = result.labels[name] == k
            assert labeled.sum() == int(m) - int(m - m.float() * share)
            kept[k] += int(labeled.sum())
            for (c, p), here in zip(flat(image), labeled.ravel().tolist(), strict=True):
                assert not here or (c == k and p >= threshold)
    assert result.kept.tolist() == list(kept.values())
    for name, label in result.labels.items():
        assert label.dtype == np.uint8 and label.shape == arrays[name].shape[1:]
        assert np.isin(label, [*range(classes), 255]).all()


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(1, 4), ratios)
def test_fine_without_sampling_meets_the_target_up_to_one_code(
    seed: int, classes: int, images: int, ratio: float
) -> None:
    arrays, counts = draw(seed, classes, images, "plain"), draw_counts(seed, classes)
    result = redistribute(arrays, counts, ratio, confidence="fine", sampling="none")
    scores = np.concatenate([a.reshape(classes, -1).astype(np.float64) for a in arrays.values()], axis=1)
    picked = scores.argmax(axis=0)
    top = scores.max(axis=0)
    odds = np.exp(scores - top)
    odds[picked, np.arange(len(picked))] = 0
    log_odds = -np.log(odds.sum(axis=0))
    for k in range(classes):
        ranked = np.sort(log_odds[picked == k])[::-1]
        wanted = int(ratio * (counts[k] / sum(counts)) * len(picked))
        if wanted == 0 or wanted > len(ranked):
            assert result.kept[k] == (0 if wanted == 0 else len(ranked))
            continue
        same_code = np.abs(ranked - ranked[wanted - 1]) <= 1 / 1024 + 2e-5
        assert wanted <= result.kept[k] < wanted + same_code.sum()


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 12), kinds, ratios, st.sampled_from(["float16", "fine"]), st.randoms())
def test_the_order_of_images_does_not_matter(
    seed: int, classes: int, kind: str, ratio: float, confidence: str, random
) -> None:
    arrays, counts = draw(seed, classes, 5, kind), draw_counts(seed, classes)
    shuffled = list(arrays.items())
    random.shuffle(shuffled)
    forth = redistribute(arrays, counts, ratio, confidence=confidence, seed=seed)
    back = redistribute(iter(shuffled), counts, ratio, confidence=confidence, seed=seed)
    assert forth.thresholds == back.thresholds and forth.histogram == back.histogram
    assert np.array_equal(forth.kept, back.kept)
    for name in arrays:
        assert forth.labels[name].tobytes() == back.labels[name].tobytes()


def test_the_seed_decides_what_is_drawn() -> None:
    tied = {name: np.stack([np.ones((20, 20)), np.zeros((20, 20))]).astype(np.float32) for name in "ab"}
    first, again = (redistribute(tied, [1, 1], 0.5, seed=1).labels for _ in range(2))
    reseeded = redistribute(tied, [1, 1], 0.5, seed=2).labels
    assert all((first[name] == 0).sum() == 100 for name in "ab")  # int(0.5 · 0.5 · 800) of both
    assert all(np.array_equal(first[name], again[name]) for name in "ab")
    assert all(not np.array_equal(first[name], reseeded[name]) for name in "ab")
    assert not np.array_equal(first["a"], first["b"])


def probabilities(*rows: list[tuple[int, float]]) -> np.ndarray:
    """Three classes: (class, its probability) of each pixel → float32 [3, H, W]."""
    array = np.zeros((3, len(rows), len(rows[0])), np.float32)
    for i, row in enumerate(rows):
        for j, (k, p) in enumerate(row):
            array[:, i, j] = (1 - p) / 2
            array[k, i, j] = p
    return array


BY_HAND = {
    "a": probabilities([(0, 1.0), (0, 0.875), (0, 0.875), (1, 0.5)], [(0, 0.75), (0, 0.625), (1, 0.75), (1, 0.5)]),
    "b": probabilities([(0, 0.5)], [(1, 0.875)]),
}  # fmt: skip


def test_dars_by_hand() -> None:
    # 10 pixels, ratio 0.5: int(5 · 0.6) = 3 of class 0, 1 of class 1, 1 of class 2, which is never predicted.
    result = redistribute(BY_HAND, [6, 2, 2], 0.5, probabilities=True)
    described = result.thresholds.to_json()
    assert described["threshold"] == [0.875, 0.875, None]
    assert described["wanted"] == [3, 1, 1] and described["predicted"] == [6, 4, 0]
    assert described["accepted"] == [3, 1, 0] and described["keep"] == [1, 1, 0]
    assert result.labels["a"].tolist() == [[0, 0, 0, 255], [255] * 4]
    assert result.labels["b"].tolist() == [[255], [1]]
    assert result.kept.tolist() == [3, 1, 0]


def test_without_sampling_all_accepted_are_kept() -> None:
    # 2 of class 0 wanted, but the second and third largest tie; with sampling one of three goes.
    counts = [4, 4, 2]
    kept = redistribute(BY_HAND, counts, 0.5, probabilities=True, sampling="none")
    assert kept.labels["a"].tolist() == [[0, 0, 0, 255], [255, 255, 1, 255]]
    assert kept.kept.tolist() == [3, 2, 0] and kept.thresholds.keep.tolist() == [1, 1, 0]
    drawn = redistribute(BY_HAND, counts, 0.5, probabilities=True)
    assert drawn.kept.tolist() == [2, 2, 0] and drawn.thresholds.keep.tolist() == [2 / 3, 1, 0]
    assert drawn.thresholds.accept.tolist() == kept.thresholds.accept.tolist()


def test_cbst_by_hand() -> None:
    # The (int(0.5 · 6) + 1) = 4th of class 0, the (int(0.5 · 4) + 1) = 3rd of class 1, where two tie.
    result = redistribute(BY_HAND, [1, 1, 1], 0.5, method="cbst", probabilities=True)
    assert result.thresholds.to_json()["threshold"] == [0.75, 0.5, None]
    assert result.labels["a"].tolist() == [[0, 0, 0, 1], [0, 255, 1, 1]]
    assert result.labels["b"].tolist() == [[255], [1]]
    assert result.kept.tolist() == [4, 4, 0]
    everything = redistribute(BY_HAND, [1, 1, 1], 1.0, method="cbst", probabilities=True)
    assert everything.kept.tolist() == [6, 4, 0]


@pytest.mark.parametrize("confidence", ["float16", "fine"])
def test_global_by_hand(confidence: str) -> None:
    how = {"method": "global", "confidence": confidence, "probabilities": True}
    result = redistribute(BY_HAND, [1, 1, 1], None, threshold=0.7, **how)
    assert result.labels["a"].tolist() == [[0, 0, 0, 255], [0, 255, 1, 255]]
    assert result.labels["b"].tolist() == [[255], [1]]
    assert result.kept.tolist() == [4, 2, 0]
    threshold = result.thresholds.to_json()["threshold"]
    assert threshold[0] == threshold[1] == pytest.approx(0.7, abs=5e-4) and threshold[0] >= 0.7
    assert threshold[2] is None
    assert redistribute(BY_HAND, [1, 1, 1], None, threshold=0.0, **how).kept.tolist() == [6, 4, 0]


def test_a_class_without_labeled_pixels_gets_none() -> None:
    result = redistribute(BY_HAND, [0, 5, 5], 1.0, probabilities=True)
    assert result.thresholds.wanted.tolist() == [0, 5, 5]
    assert result.kept.tolist() == [0, 4, 0] and result.thresholds.keep[0] == 0
    assert not any((label == 0).any() for label in result.labels.values())


def test_an_iterable_is_read_once_and_may_reuse_its_array() -> None:
    scores = np.empty((3, 4, 5), np.float32)
    rng = np.random.default_rng(5)
    arrays = {name: rng.normal(size=scores.shape).astype(np.float32) for name in "abc"}

    def pairs():
        for name, array in arrays.items():
            scores[:] = array
            yield name, scores

    result, wanted = (redistribute(source, [3, 2, 1], 0.6) for source in (pairs(), arrays))
    assert all(np.array_equal(result.labels[name], wanted.labels[name]) for name in "abc")
    by_columns = {name: np.asfortranarray(array) for name, array in arrays.items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for source in (by_columns, tensors):
        again = redistribute(source, np.array([3, 2, 1]), 0.6)
        assert all(np.array_equal(again.labels[name], wanted.labels[name]) for name in "abc")


# What is refused.

GOOD = np.zeros((2, 3, 4), np.float32)


def test_settings_that_cannot_work_are_all_named() -> None:
    with refused(RecipeError, "'best'", "dars, cbst, global", "'some'", "random, none"):
        redistribute({"a": GOOD}, [1, 1], None, method=cast(Any, "best"), sampling=cast(Any, "some"))
    with refused(RecipeError, "labeling_ratio", "threshold", "method global"):
        redistribute({"a": GOOD}, [1, 1], 0.5, method="global")
    for method in ("dars", "cbst"):
        with refused(RecipeError, "labeling_ratio", "threshold", f"method {method}"):
            redistribute({"a": GOOD}, [1, 1], None, method=method, threshold=0.5)
    with refused(RecipeError, "confidence", "'exact'", "float16, fine"):
        redistribute({"a": GOOD}, [1, 1], 0.5, confidence=cast(Any, "exact"))
    for ratio in (0, 1.5, float("nan")):
        with refused(RecipeError, "labeling_ratio", f"found {ratio}"):
            redistribute({"a": GOOD}, [1, 1], ratio)
    with refused(RecipeError, "threshold", "found 1.5"):
        redistribute({"a": GOOD}, [1, 1], None, method="global", threshold=1.5)
    with refused(RecipeError, "sampling", "method dars", "cbst"):
        redistribute({"a": GOOD}, [1, 1], 0.5, method="cbst", sampling="none")


@pytest.mark.parametrize(
    ("scores", "facts"),
    [
        (GOOD.astype(np.uint8), ["uint8 [2, 3, 4]", "[K, H, W]"]),
        (GOOD.argmax(0), ["int64 [3, 4]", "[K, H, W]"]),
        (GOOD[None], ["float32 [1, 2, 3, 4]", "array[0]"]),
        (np.zeros((3, 4, 2), np.float32), ["[3, 4, 2]", "3 classes", "2", "numpy.moveaxis(array, -1, 0)"]),
        (GOOD[0], ["float32 [3, 4]", "[K, H, W]"]),
        (GOOD[:, :0], ["[2, 0, 4]", "[K, H, W]", "2 to 255 classes"]),
        (GOOD + np.inf, ["24 of 24"]),
        (GOOD + 7e4, ["65504", "fine"]),
    ],
)
def test_an_array_that_cannot_be_used_is_named(scores: np.ndarray, facts: list[str]) -> None:
    with refused(DataError, *facts) as caught:
        redistribute({"good": GOOD, "street 7": scores}, [1, 1], 0.5)
    assert str(caught.value).startswith("street 7: ")


@pytest.mark.parametrize("dtype", [">f4", ">f2", "f8", ">f8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_precision_and_order_of_bytes_and_axes_are_read(dtype: str, order: Any) -> None:
    """Scores that float16 holds exactly give the same labels whatever holds them."""
    arrays = {name: array.astype(np.float16) for name, array in draw(5, 4, 3, "plain").items()}
    wanted = redistribute({k: a.astype(np.float32) for k, a in arrays.items()}, [9, 3, 2, 1], 0.5)
    result = redistribute({k: a.astype(dtype, order=order) for k, a in arrays.items()}, [9, 3, 2, 1], 0.5)
    assert all(np.array_equal(result.labels[name], label) for name, label in wanted.labels.items())
    assert result.kept.sum() > 0


def test_probabilities_given_as_logits_are_warned_of() -> None:
    arrays = draw(2, 4, 3, "plain")
    soft = {k: torch.softmax(torch.from_numpy(a).float(), 0).numpy() for k, a in arrays.items()}
    mixed = {**arrays, "soft": soft["street/0"]}
    with pytest.warns(UserWarning) as caught:
        redistribute(mixed, [9, 3, 2, 1], 0.5)
    says(str(caught[0].message), "1 of 4", "--probabilities")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        redistribute(soft, [9, 3, 2, 1], 0.5, probabilities=True)
        redistribute(arrays, [9, 3, 2, 1], 0.5)
        redistribute({k: np.log(a) for k, a in soft.items()}, [9, 3, 2, 1], 0.5)


def test_ids_probabilities_and_counts_that_are_refused() -> None:
    with refused(DataError, "'a'"):
        redistribute([("a", GOOD), ("b", GOOD), ("a", GOOD)], [1, 1], 0.5)
    with refused(DataError, "a: "):
        redistribute({"a": GOOD}, [1, 1], 0.5, probabilities=True)
    with pytest.raises(DataError, match="histogram"):
        redistribute({}, [1, 1], 0.5)
    for counts, fact in (
        ([1], "is 1;"),
        ([1.0, 2.0], "integers"),
        ([1, -2], "class 1: -2"),
        ([0, 0], "All 2 pixel counts"),
    ):
        with pytest.raises(DataError, match=fact):
            redistribute({"a": GOOD}, counts, 0.5)


SETTINGS = [
    {"method": method, "ratio": ratio, "threshold": threshold, "sampling": sampling}
    for method in ("dars", "cbst", "global")
    for ratio in (None, 0.0, 0.4, 1.0, 1.1)
    for threshold in (None, -0.1, 0.0, 1.0, 1.1)
    for sampling in ("random", "none")
]


def test_recipe_and_python_accept_the_same_settings(tmp_path: Path) -> None:
    head = "{data: {root: ., classes: [a, b]}, network: {weights: none}, rounds: [{steps: 1}, {steps: 1}]}"
    (tmp_path / "recipe.yaml").write_text(head)
    accepted = 0
    for values in SETTINGS:
        text = {key: json.dumps(value) for key, value in values.items()}
        changes = [f"labeling.{key}={text[key]}" for key in ("method", "threshold", "sampling")]
        changes.append(f"rounds.1.labeling_ratio={text['ratio']}")
        try:
            labeling = Labeling(**values)
        except RecipeError:
            with pytest.raises(RecipeError):
                load_recipe(tmp_path / "recipe.yaml", changes)
        else:
            recipe = load_recipe(tmp_path / "recipe.yaml", changes)
            assert recipe.labeling.at(recipe.rounds[1].labeling_ratio) == labeling
            accepted += 1
    assert accepted == 2 * 2 + 2 + 2  # dars: 2 ratios, 2 samplings; cbst: 2 ratios; global: 2 thresholds


def test_confidence_names_are_those_of_the_scales() -> None:
    assert get_args(Confidence) == tuple(SCALES)


def test_a_file_that_python_fails_to_parse_in_threads_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's parser can fail if several threads parse literals at once, as numpy does for the heads of files."""
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(1, 2, 3))
    calls, load = [], np.load

    def failing(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=39, after=35)")
        return load(*arguments, **keywords)

    monkeypatch.setattr(np, "load", failing)
    assert read_scores(tmp_path / "a.npy").shape == (1, 2, 3) and len(calls) == 2
