"""The statistics of `darseg compare`: intervals against slow ones, laws, false alarms, warnings, files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from conftest import REPOSITORY
from darseg.errors import RunError
from darseg.experiment.remarks import answer, warnings
from darseg.experiment.statistics import Comparison, compare_trials, seeds_needed
from darseg.experiment.tables import CSV, JSON, MARKDOWN, to_json, to_markdown, write_tables
from darseg.experiment.trial import Arm, Evidence, Failure, RoleScores, Trial
from wording import refused, says

sys.path.insert(0, str(REPOSITORY / "scripts"))
from compare_errors import told_apart

K = 3
ARMS = (
    Arm("labels only", 24, "control"),
    Arm("dars", 24, controls=(("steps", "labels only"),), changes=("rounds=3",)),
)


def drawn_scores(
    generator: np.random.Generator, right: float, *, images: int = 20, aligned: bool = True
) -> RoleScores:
    """Scores of a network that is right at about this share of pixels; class 2 is in every second image."""
    true = generator.integers(20, 400, (images, K))
    true[::2, 2] = 0

    def counts(share: float) -> np.ndarray:
        hit = generator.binomial(true, np.clip(generator.normal(share, 0.1, true.shape), 0, 1))
        return np.stack([hit, true, hit + np.roll(true - hit, 1, axis=1)], axis=1)

    ids = tuple(f"image_{at:02d}" for at in range(images))
    return RoleScores(ids, counts(right), counts(right + 0.02) if aligned else None)


def drawn_trials(
    seed: int = 0,
    *,
    rights: Sequence[float] = (0.6, 0.7),
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    images: int = 20,
) -> list[Trial]:
    generator = np.random.default_rng(seed)
    return [
        Trial(
            arm.name,
            arm.labels,
            number,
            steps=600,
            images=4800,
            seconds=60.0 + number,
            validation=drawn_scores(generator, right + generator.normal(0, 0.01), images=images),
            test=drawn_scores(generator, right + generator.normal(0, 0.01), images=images),
        )
        for arm, right in zip(arms, rights, strict=True)
        for number in seeds
    ]


def evidence(trials: Sequence[Trial], arms: Sequence[Arm] = ARMS, **more: object) -> Evidence:
    facts = {"planned": len(trials), **more}
    return Evidence("drawn", ("road", "grass", "sign"), tuple(arms), tuple(trials), **facts)  # ty: ignore


def without_test(trials: Sequence[Trial]) -> list[Trial]:
    return [replace(trial, test=None) for trial in trials]


def of(comparison: Comparison, name: str = "dars", labels: int = 24):
    return next(row for row in comparison.rows if (row.arm.name, row.arm.labels) == (name, labels))


# --- against slow versions


def slow_iou(images: Sequence[np.ndarray]) -> list[float | None]:
    """IoU of each class over the images."""
    result: list[float | None] = []
    for k in range(K):
        right = sum(int(image[0][k]) for image in images)
        union = sum(int(image[1][k]) + int(image[2][k]) for image in images) - right
        result.append(right / union if union else None)
    return result


def slow_mean(images: Sequence[np.ndarray]) -> float:
    known = [value for value in slow_iou(images) if value is not None]
    return sum(known) / len(known)


def slow_interval(values: Sequence[float], drawn: Sequence[float], images: int) -> tuple[float, float]:
    """The ends of the interval of a mean over seeds: images by drawn sets, seeds by t, added as squares."""
    mean = sum(values) / len(values)
    t = stats.t.ppf(0.025, images - 1) * math.sqrt(images / (images - 1))
    low, high = np.quantile(drawn, [stats.norm.cdf(t), 1 - stats.norm.cdf(t)])
    training = 0.0
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        training = float(half)
    return mean - math.sqrt((mean - low) ** 2 + training**2), mean + math.sqrt(
        (high - mean) ** 2 + training**2
    )


@pytest.mark.parametrize("count", [1, 3])
def test_the_difference_and_its_interval_against_slow_ones(count: int) -> None:
    trials = drawn_trials(seeds=range(count))
    resamples, images = 200, 20
    shown = of(compare_trials(evidence(trials), resamples)).difference("validation", "aligned")
    assert shown is not None and shown.seeds == tuple(range(count))

    generator = np.random.default_rng(0)
    sets = [
        [image for image, times in enumerate(row) for _ in range(times)]
        for row in generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    ]
    counts = {
        (trial.variant, trial.seed): trial.validation.aligned
        for trial in trials
        if trial.validation is not None
    }

    def difference(chosen: Sequence[int], seed: int) -> float:
        dars, control = (
            slow_mean([scores[image] for image in chosen])
            for name in ("dars", "labels only")
            if (scores := counts[name, seed]) is not None
        )
        return dars - control

    values = [difference(range(images), seed) for seed in range(count)]
    drawn = [sum(difference(chosen, seed) for seed in range(count)) / count for chosen in sets]
    low, high = slow_interval(values, drawn, images)
    assert shown.values == pytest.approx(values)
    assert shown.mean_iou.mean == pytest.approx(np.mean(values))
    assert (shown.mean_iou.low, shown.mean_iou.high) == pytest.approx((low, high), abs=2e-4)
    assert shown.includes_training == (count > 1)
    if count > 1:
        assert shown.mean_iou.deviation == pytest.approx(np.std(values, ddof=1))


def test_scores_and_classes_against_slow_ones() -> None:
    trials = drawn_trials()
    row = of(compare_trials(evidence(trials), 200))
    score = row.score("test")
    own = [trial.test.plain for trial in trials if trial.variant == "dars" and trial.test is not None]
    assert score is not None
    assert score.values == pytest.approx([slow_mean(list(counts)) for counts in own])
    for k, shown in enumerate(score.classes):
        values = [slow_iou(list(counts))[k] for counts in own]
        assert shown.iou.mean == pytest.approx(np.mean(values))
        assert shown.iou.deviation == pytest.approx(np.std(values, ddof=1))
        assert shown.images == (20, 20, 10)[k]
        assert 0 <= shown.iou.low < shown.iou.mean < shown.iou.high <= 1
    assert row.steps == 600 and row.images == 4800 and row.seconds == 61


def test_the_number_of_seeds_for_a_difference() -> None:
    """Against drawn paired t tests: the power is reached with this number, and not with two fewer."""
    generator = np.random.default_rng(0)
    for deviation in (0.008, 0.02):
        needed = seeds_needed(deviation)
        assert needed is not None
        powers = []
        for seeds in (needed, needed - 2):
            drawn = generator.normal(0.01, deviation, (20_000, seeds))
            powers.append((stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean())
        assert powers[0] > 0.78 and powers[1] < 0.8
    assert seeds_needed(0.0) == 2 and seeds_needed(math.nan) is None and seeds_needed(1.0) is None


# --- laws


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_trials_and_images_does_not_matter(random) -> None:
    trials = drawn_trials(seeds=(0, 1), images=6)
    expected = json.dumps(to_json(compare_trials(evidence(trials), 50)))
    shuffled = []
    for trial in random.sample(trials, len(trials)):
        changed = {}
        for role in ("validation", "test"):
            scores = getattr(trial, role)
            order = random.sample(range(6), 6)
            changed[role] = RoleScores(
                tuple(scores.ids[at] for at in order), scores.plain[order], scores.aligned[order]
            )
        shuffled.append(replace(trial, **changed))
    assert json.dumps(to_json(compare_trials(evidence(shuffled), 50))) == expected


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_swapping_variant_and_control_turns_the_sign(seed: int, count: int) -> None:
    arms = (
        Arm("a", 24, controls=(("steps", "b"),)),
        Arm("b", 24, controls=(("steps", "a"),)),
    )
    trials = drawn_trials(seed, arms=arms, seeds=range(count), images=8)
    comparison = compare_trials(evidence(trials, arms), 64)
    there, back = of(comparison, "a").difference(), of(comparison, "b").difference()
    assert there is not None and back is not None
    assert there.values == pytest.approx([-value for value in back.values])
    assert there.mean_iou.low == pytest.approx(-back.mean_iou.high)
    assert there.seeds_for_one_point == back.seeds_for_one_point
    assert there.told_apart == back.told_apart


def test_the_same_runs_do_not_differ_and_more_seeds_narrow_only_the_part_of_training() -> None:
    trials = drawn_trials()
    same = [replace(trial, variant="dars") for trial in trials if trial.variant == "labels only"]
    shown = of(compare_trials(evidence([*trials[:3], *same]), 100)).difference()
    assert shown is not None and shown.values == (0, 0, 0) and shown.seeds_for_one_point == 2
    assert (shown.mean_iou.low, shown.mean_iou.high) == (0, 0) and not shown.told_apart
    estimates = [
        difference.mean_iou
        for count in (2, 8)
        if (difference := of(compare_trials(evidence(drawn_trials(seeds=range(count))), 200)).difference())
    ]
    assert estimates[1].width < estimates[0].width / 2
    for it in estimates:
        assert it.low <= it.image_low <= it.mean <= it.image_high <= it.high


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_variants_that_differ_only_in_luck_are_told_apart_in_5_percent_at_most(seeds: int) -> None:
    alarms, mean = told_apart(200, seeds, images=30, noise=0.01)
    assert alarms <= 0.05 and abs(mean) < 0.002


def test_a_true_difference_is_told_apart() -> None:
    power, mean = told_apart(30, 5, images=30, noise=0.01, effect=0.05)
    assert power > 0.9 and mean > 0.03


# --- missing runs and warnings


def test_one_seed_tells_nothing_apart() -> None:
    comparison = compare_trials(evidence(without_test(drawn_trials(seeds=[0], rights=(0.3, 0.9)))), 100)
    difference = of(comparison).difference()
    assert difference is not None and difference.mean_iou.low > 0.2 and not difference.told_apart
    assert difference.seeds_for_one_point is None and math.isnan(difference.mean_iou.deviation)
    says(answer(comparison)[0], "With 24 labels", "dars", "one seed", vary=[r"[+-]0\.\d{3}"])
    says(*warnings(comparison), "one seed")


def test_a_variant_that_is_better_is_named_with_its_scores_on_test_images() -> None:
    comparison = compare_trials(evidence(drawn_trials(rights=(0.5, 0.8))))
    says(
        answer(comparison)[0],
        "dars is better than its control, labels only (as many steps)",
        "on validation images",
        "on test images",
        vary=[r"[+-]0\.\d{3}"],
    )
    assert warnings(comparison) == ()


def test_variants_that_are_worse_or_not_told_apart() -> None:
    arms = (*ARMS, Arm("cbst", 24, controls=(("steps", "labels only"),)))
    numbers = [r"[+-]?0\.\d{3}", r"about \d+"]
    comparison = compare_trials(evidence(drawn_trials(rights=(0.6, 0.6, 0.3), arms=arms), arms), 200)
    says(answer(comparison)[0], "no variant is better", "Worse: cbst", "1 of 2", vary=numbers)
    comparison = compare_trials(evidence(drawn_trials(rights=(0.6, 0.6))), 200)
    says(answer(comparison)[0], "no variant is told apart", "seeds would be needed", vary=numbers)
    # A deviation for which no number of seeds is given: neither the answer nor the table may give a smaller one.
    generator = np.random.default_rng(0)
    wild = [
        replace(trial, validation=drawn_scores(generator, 0.1 + 0.4 * trial.seed)) for trial in drawn_trials()
    ]
    comparison = compare_trials(evidence(wild[:3] + [replace(it, seed=2 - it.seed) for it in wild[3:]]), 200)
    assert "more than 1000 seeds would" in answer(comparison)[0] and "about" not in answer(comparison)[0]
    assert "on these images: more than 1000." in to_markdown(comparison)


def test_failed_and_missing_runs_are_reported() -> None:
    trials = without_test(drawn_trials(seeds=(0, 1, 2)))
    variant = [trial for trial in trials if trial.variant == "dars"]
    failures = tuple(Failure("labels only", 24, seed, "no memory") for seed in (2, 0, 1))
    comparison = compare_trials(evidence(variant, failures=failures, planned=8), 50)
    text = "\n".join(warnings(comparison))
    says(text, "3 of 8 runs failed", "6 of 8 runs", "dars with 24 labels", "control labels only")
    says("\n".join(answer(comparison)), "no variant has a difference")
    row = to_json(comparison)["variants"][1]
    assert row["difference_to_control"] is None and "labels only" in row["difference_missing"]
    assert [it["seed"] for it in to_json(comparison)["failures"]] == [0, 1, 2]
    # One control of three: the difference is of one seed only.
    comparison = compare_trials(evidence([*variant, trials[0]], planned=6), 50)
    difference = of(comparison).difference()
    assert difference is not None and difference.seeds == (0,)
    says(warnings(comparison)[1], "seed 1, 2", "1 of 3 seeds")
    assert answer(compare_trials(evidence([], planned=6))) == ("No run of a variant has ended yet.",)


def test_rows_without_aligned_scores_are_named() -> None:
    def plain(trial: Trial) -> Trial:
        assert trial.validation is not None
        return replace(trial, validation=replace(trial.validation, aligned=None))

    trials = without_test(drawn_trials(rights=(0.5, 0.8)))
    comparison = compare_trials(evidence([plain(it) if it.variant == "dars" else it for it in trials]), 50)
    says(warnings(comparison)[0], "No aligned scores have: dars")
    comparison = compare_trials(evidence([plain(it) for it in trials]), 50)
    says(warnings(comparison)[0], "No run has aligned scores", "result.align: auto")


def test_choosing_on_test_images_causes_a_warning() -> None:
    trials = drawn_trials()
    blind = [replace(trial, validation=None) for trial in trials]
    comparison = compare_trials(evidence(blind), 50)
    says(answer(comparison)[0], "No validation images")
    says(warnings(comparison)[0], "data.validation")
    comparison = compare_trials(evidence(trials, added_after_test=("dars",), test_in_validation=3), 50)
    says("\n".join(warnings(comparison)), "dars", "3 of 20 test images", "data.test")


def test_few_images_and_classes_of_which_little_is_known() -> None:
    trials = without_test(drawn_trials(images=9))
    for trial in trials:
        assert trial.validation is not None
        trial.validation.plain[1:, :, 2] = 0  # a sign in one image only
        trial.validation.plain[0, :, 2] = [5, 10, 10]
        trial.validation.plain[:, 0, 1] = [trial.seed * 10] * 9  # never the same grass
        trial.validation.plain[:, 1:, 1] = 20
    comparison = compare_trials(evidence(trials), 50)
    says("\n".join(warnings(comparison)), "only 9 validation images", "Little is known of grass, sign")
    score = of(comparison).score("validation")
    assert score is not None and [it.uncertain for it in score.classes] == [False, True, True]
    _, grass, sign = score.classes
    assert grass.images == 9 and grass.iou.width > 0.5
    assert sign.images == 1 and sign.iou.width == 0
    single = compare_trials(evidence(without_test(drawn_trials(images=1))), 50)
    difference = of(single).difference()
    assert difference is not None and math.isnan(difference.mean_iou.low) and not difference.told_apart


def test_trials_that_do_not_fit_together_are_refused() -> None:
    trials = drawn_trials(seeds=(0, 1))
    assert trials[3].validation is not None
    scores = trials[3].validation
    ids = (*scores.ids[:-1], "stranger")
    elsewhere = replace(
        trials[3], validation=replace(scores, ids=ids), test=drawn_scores(np.random.default_rng(0), 0.5)
    )
    unknown = replace(trials[0], variant="new")
    with refused(
        RunError,
        "'new' with 24 labels, seed 0",
        "seed 0: given 2 times",
        "seed 1: scored on 20 validation",
        "'image_19'",
    ):
        evidence([*trials[:3], elsewhere, unknown, trials[0]])
    with refused(RunError, "3 classes", "expected 2"):
        Evidence("drawn", ("road", "grass"), ARMS, tuple(trials[:1]))
    with refused(RunError, "'dars' with 24 labels: named twice", "control 'nothing'"):
        evidence([], (*ARMS, ARMS[1], Arm("cbst", 24, controls=(("steps", "nothing"),))))
    with pytest.raises(ValueError, match="expected int64"):
        RoleScores(("a",), np.zeros((1, 3)))
    with pytest.raises(ValueError, match="twice"):
        RoleScores(("a", "a"), np.zeros((2, 3, 1), np.int64))


# --- files


def test_the_files_hold_what_the_issue_lists(tmp_path: Path) -> None:
    arms = (*ARMS, *(replace(arm, labels=48) for arm in ARMS), Arm("all | labels", 900, "ceiling"))
    trials = drawn_trials(rights=(0.5, 0.6, 0.6, 0.7, 0.8), arms=arms)
    comparison = compare_trials(evidence(trials, arms, facts=(("machine", "this"),)), 100)
    write_tables(comparison, tmp_path)
    content = json.loads((tmp_path / JSON).read_text())
    rows = content["variants"]
    assert [(row["name"], row["labels"]) for row in rows] == [(arm.name, arm.labels) for arm in arms]
    dars = rows[3]
    assert dars["seeds"] == [0, 1, 2] and dars["steps"] == 600 and dars["seconds"] == 61
    difference = of(comparison, labels=48).difference()
    assert difference is not None
    values = {name: dars["difference_to_control"][name] for name in ("mean", "low", "high")}
    assert values == {name: getattr(difference.mean_iou, name) for name in values}
    for role, prefix in itertools.product(("validation", "test"), ("", "aligned_")):
        score = of(comparison, labels=48).score(role, "aligned" if prefix else "plain")
        assert score is not None
        assert dars[role][f"{prefix}mean"] == pytest.approx(
            np.mean(list(dars[role][f"{prefix}by_seed"].values()))
        )
        assert dars[role][f"{prefix}mean"] == score.mean_iou.mean
        assert dars[role][f"{prefix}deviation"] == pytest.approx(np.std(score.values, ddof=1))
    assert rows[0]["difference_to_control"] is None and rows[0]["difference_missing"] is None
    by_class = dars["all_differences"][0]["iou"]["grass"]
    assert by_class["mean"] == pytest.approx(
        rows[3]["classes"][0]["iou"]["grass"]["mean"] - rows[2]["classes"][0]["iou"]["grass"]["mean"]
    )

    lines = list(csv.DictReader(io.StringIO((tmp_path / CSV).read_text())))
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    assert float(lines[3]["validation_plain_difference_low"]) == dars["difference_to_control"]["low"]
    assert lines[0]["validation_plain_difference_low"] == ""

    table = [line for line in (tmp_path / MARKDOWN).read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(arms) and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "all \\| labels" in table[-1]
    mean, deviation = dars["test"]["mean"], dars["test"]["deviation"]
    assert f"| {mean:.3f} ± {deviation:.3f} |" in table[5]
