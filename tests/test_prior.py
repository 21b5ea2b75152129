"""Class shares of labeled images: how certain they are, and how they are shrunk toward a network's estimate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from conftest import SIZE, recipe_dict, write_png
from darseg.cli.tables import print_table, shares_table
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.demo.scenes import draw_scene
from darseg.errors import DataError, RecipeError
from darseg.model.predict import predict_scores
from darseg.pseudo.distribution import count_each, count_labels
from darseg.pseudo.labeled_shares import LabeledShares, labeled_shares
from darseg.pseudo.labelset import PseudoLabelSet
from darseg.pseudo.shrink import Calibration, ShrunkShares, shrink_shares
from darseg.report.overview import write_report
from darseg.run import calibrate as calibrate_module
from darseg.run.adapt import align_network
from darseg.run.build import labeling_protocol, load_to_predict
from darseg.run.check import check, plan
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from test_aligned_labels import stopped
from test_run import outcome, warnings_of
from wording import refused, says

quietly = partial(train, console=Console(quiet=True))

CLASSES = ("sky", "road", "building", "vegetation")

OCCURS, SIZES = np.array([0.3, 0.5, 0.35]), np.array([0.07, 0.15, 0.07])
"""Of drawn images: how often each class but the first is in one, and its mean part of it."""


def draw(generator: np.random.Generator, images: int) -> np.ndarray:
    """Pixels of 4 classes in drawn images, int64 [N, 4]: rare classes are in some images, in objects of many sizes."""
    parts = (generator.random((images, 3)) < OCCURS) * SIZES * generator.lognormal(-0.3, 0.8, (images, 3))
    parts = np.minimum(parts, 0.3)
    return (np.concatenate([1 - parts.sum(1, keepdims=True), parts], axis=1) * 40_000).astype(np.int64)


def predict(generator: np.random.Generator, counts: np.ndarray) -> np.ndarray:
    """What a network predicts of such images: it misses most of classes 1 and 3, and sees some that is none."""
    found = counts[:, 1:] * generator.beta([0.6, 2, 0.6], [2.4, 1, 2.4], (len(counts), 3))
    found += 40_000 * generator.gamma(0.3, [0.003, 0.02, 0.003], (len(counts), 3))
    found = np.minimum(found, 13_000)
    return np.concatenate([40_000 - found.sum(1, keepdims=True), found], axis=1).astype(np.int64)


TRUTH = draw(np.random.default_rng(99), 300_000).sum(0) / (300_000 * 40_000)


# --- intervals


def test_the_interval_is_that_of_a_slow_bootstrap() -> None:
    counts = draw(np.random.default_rng(0), 40)
    shares, generator = labeled_shares(counts), np.random.default_rng(1)
    drawn = []
    for _ in range(1500):
        total = np.zeros(4)
        for _ in range(40):
            total += counts[generator.integers(40)]
        drawn.append(total / total.sum())
    # Hesterberg's table of adjusted levels has about 4.5 % instead of 5 % for 40 images.
    low, high = np.quantile(drawn, [0.0448, 1 - 0.0448], axis=0)
    assert np.allclose([shares.low, shares.high], [low, high], atol=0.04 * (high - low).max(), rtol=0.08)
    assert np.array_equal(shares.share, counts.sum(0) / counts.sum())
    assert shares.images.tolist() == np.count_nonzero(counts, axis=0).tolist() and shares.total == 40
    # The deviation is that of the drawn logarithms, but for Student's factor of few images.
    factor = np.sqrt((shares.images - 1) / (shares.images - 3))
    relative = np.std(drawn, axis=0) / shares.share * factor
    assert np.allclose(shares.deviation, relative, rtol=0.12)


def test_intervals_hold_the_true_share_about_as_often_as_they_say() -> None:
    generator, held, wide = np.random.default_rng(2), [], []
    for _ in range(120):
        shares = labeled_shares(draw(generator, 40))
        held.append((shares.low <= TRUTH) & (shares.high >= TRUTH))
        wide.append(shares.uncertain)
    assert (abs(np.mean(held, axis=0) - 0.88) < 0.1).all()
    assert np.mean(wide, axis=0)[1] > 0.5 and np.mean(wide, axis=0)[0] == 0


@given(st.integers(0, 2**32), st.integers(2, 30))
@settings(max_examples=25, deadline=None)
def test_only_the_set_of_labeled_images_counts(seed: int, images: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 50, (images, 3)) * (generator.random((images, 3)) < 0.6)
    counts[0, 0] += 1
    shares = labeled_shares(counts)
    again = labeled_shares(np.concatenate([np.zeros((2, 3), np.int64), generator.permutation(counts)]))
    for name in ("share", "low", "high", "deviation", "images"):
        assert np.array_equal(getattr(shares, name), getattr(again, name), equal_nan=True), name
    few = shares.images < 2
    assert (np.isnan(shares.low) == few).all() and (np.isnan(shares.high) == few).all()
    assert (shares.low <= shares.share)[~few].all() and (shares.share <= shares.high)[~few].all()
    assert (np.isinf(shares.deviation) == (shares.images < 4)).all()
    assert shares.uncertain[few].all()
    for k in np.flatnonzero(~few):
        assert shares.uncertain[k] == (shares.high[k] >= 2 * shares.low[k])
        assert shares.flag(k).startswith("uncertain: ") == shares.uncertain[k]


def test_without_an_interval_the_reason_is_given() -> None:
    shares = labeled_shares([[90, 10, 0], [60, 0, 0], [70, 0, 0]])
    assert shares.describe(1) == "in one labeled image only" and shares.describe(2) == "in no labeled image"
    assert "to" in shares.describe(0) and shares.uncertain.tolist() == [False, True, True]
    alone = labeled_shares([[50, 50, 0]])
    assert np.isnan(alone.low).all() and np.isinf(alone.deviation).all() and alone.uncertain.all()
    assert alone.flag(0) == "in one labeled image only"
    with refused(DataError, "[2, 1, 3]"):
        labeled_shares(np.ones((2, 1, 3), np.int64))
    with pytest.raises(DataError, match="zero"):
        labeled_shares(np.zeros((3, 4), np.int64))


def test_many_images_and_classes_need_little_memory() -> None:
    counts = np.random.default_rng(0).poisson(2, (3000, 150))
    shares = labeled_shares(counts)
    exact = np.sqrt(
        (counts / counts.mean(0) - counts.sum(1, keepdims=True) / counts.sum(1).mean()).var(0) / 3000
    )
    assert np.allclose(shares.deviation, exact, rtol=0.01)
    assert np.allclose(np.log(shares.high / shares.low) / 2, 1.645 * exact, rtol=0.15)


def test_each_label_map_is_counted_by_itself() -> None:
    maps = [("a", np.array([[0, 1, 255]], np.uint8)), ("b", np.array([[2], [2]], np.uint8))]
    assert count_each(maps, 3).tolist() == [[1, 1, 0], [0, 0, 2]]
    assert count_labels(maps, 3).tolist() == [1, 1, 2] and count_labels([], 3).tolist() == [0, 0, 0]
    with pytest.raises(DataError, match="value 2"):
        count_each(maps, 2)


# --- shrinking


def shares_of(share: Any, deviation: Any) -> LabeledShares:
    share, nothing = np.array(share, np.float64), np.full(len(share), np.nan)
    images = np.full(len(share), 9)
    return LabeledShares(share, nothing, nothing, np.array(deviation, np.float64), images, total=9)


def distributions(classes: int) -> Any:
    return st.lists(st.integers(1, 1000), min_size=classes, max_size=classes).map(
        lambda parts: np.array(parts) / sum(parts)
    )


@given(st.integers(0, 2**32), distributions(5), distributions(5))
@settings(max_examples=80, deadline=None)
def test_shrunk_shares_lie_between_both_and_add_up(seed: int, share: np.ndarray, q: np.ndarray) -> None:
    generator = np.random.default_rng(seed)
    deviation = np.where(generator.random(5) < 0.2, np.inf, generator.exponential(0.5, 5))
    ratio = np.where(generator.random(5) < 0.2, np.nan, generator.lognormal(0, 1, 5))
    calibration = Calibration(ratio, np.where(np.isnan(ratio), np.inf, generator.exponential(0.5, 5)), 20)
    shrunk = shrink_shares(shares_of(share, deviation), calibration, q)
    assert abs(shrunk.share.sum() - 1) < 1e-12 and abs(shrunk.network.sum() - 1) < 1e-12
    ends = np.sort([shrunk.labeled, shrunk.network], axis=0)
    assert (shrunk.share >= ends[0] - 1e-12).all() and (shrunk.share <= ends[1] + 1e-12).all()
    unknown = np.isnan(ratio)
    assert np.allclose(shrunk.share[unknown], share[unknown], rtol=1e-12)  # no estimate: as labeled
    order = generator.permutation(5)
    moved = shrink_shares(
        shares_of(share[order], deviation[order]),
        replace(calibration, ratio=ratio[order], deviation=calibration.deviation[order]),
        q[order],
    )
    assert np.allclose(moved.share, shrunk.share[order], rtol=1e-9)
    again = ShrunkShares.from_json(json.loads(json.dumps(shrunk.to_json())))
    assert again.to_json() == shrunk.to_json() and np.array_equal(again.share, shrunk.share)


@given(distributions(4), distributions(4), st.floats(0.01, 3))
@settings(max_examples=50, deadline=None)
def test_the_labeled_shares_stay_if_they_are_certain_or_confirmed(
    share: np.ndarray, q: np.ndarray, deviation: float
) -> None:
    certain = shrink_shares(shares_of(share, [0] * 4), Calibration(np.ones(4), np.full(4, deviation), 20), q)
    assert np.allclose(certain.share, share, rtol=1e-12)
    confirmed = Calibration(share / q, np.full(4, 0.1), 20)
    assert np.allclose(shrink_shares(shares_of(share, [deviation] * 4), confirmed, q).share, share, rtol=1e-9)
    unknown = Calibration(np.full(4, np.nan), np.full(4, np.inf), 20)
    assert np.allclose(shrink_shares(shares_of(share, [deviation] * 4), unknown, q).share, share, rtol=1e-12)
    trusted = shrink_shares(shares_of(share, [np.inf] * 4), Calibration(np.ones(4), np.ones(4), 20), q)
    assert np.allclose(trusted.share, q, rtol=1e-9)


def test_two_classes_are_weighted_by_their_variances() -> None:
    """Of equal deviations the geometric mean, by hand: sqrt(0.1 · 0.4) = 0.2 and sqrt(0.9 · 0.6) = 0.735."""
    shrunk = shrink_shares(
        shares_of([0.9, 0.1], [0.3, 0.3]),
        Calibration(np.array([0.75, 2]), np.array([0.3, 0.3]), 20),
        [0.8, 0.2],
    )
    assert np.allclose(shrunk.network, [0.6, 0.4])
    assert np.allclose(shrunk.share, np.array([0.73485, 0.2]) / 0.93485, atol=1e-4)


def test_calibration_counts_true_and_predicted_pixels() -> None:
    true = np.array([[8, 2, 0], [9, 1, 0], [6, 4, 0], [10, 0, 0], [0, 0, 0], [7, 3, 0]])
    predicted = np.array([[9, 1, 0], [9, 1, 0], [8, 1, 1], [10, 0, 0], [0, 0, 0], [8, 2, 0]])
    calibration = Calibration.of(true, predicted)
    assert calibration.images == 5 and np.allclose(calibration.ratio[:2], [40 / 44, 2])
    assert np.isnan(calibration.ratio[2]) and np.isinf(calibration.deviation[2])
    parts = true[:, 1] / 10 - predicted[:, 1] / 5
    variance = np.log1p((parts**2).sum() * 5 / 4) * (4 - 1) / (4 - 3)  # 4 images have class 1
    assert np.isclose(calibration.deviation[1], np.sqrt(variance))
    again = Calibration.of(true[::-1], predicted[::-1])
    assert np.array_equal(again.deviation, calibration.deviation)


@pytest.mark.parametrize("network", ["weak", "exact"])
def test_on_drawn_images_shrunk_shares_are_nearer_to_the_truth(network: str) -> None:
    """24 labeled and 60 validation images: a smaller error than labeled; 4,000 labeled images: hardly any change."""
    generator, errors, moves = np.random.default_rng(5), [], []
    for labels, tries in ((24, 60), (4000, 2)):
        for _ in range(tries):
            unlabeled, validation = draw(generator, 1500), draw(generator, 60)
            known, seen = (
                (counts if network == "exact" else predict(generator, counts))
                for counts in (validation, unlabeled)
            )
            shares = labeled_shares(draw(generator, labels))
            shrunk = shrink_shares(shares, Calibration.of(validation, known), seen.sum(0) / seen.sum())
            truth = unlabeled.sum(0) / unlabeled.sum()
            logs = [np.log(np.maximum(share, 1e-4) / truth)[1:] for share in (shares.share, shrunk.share)]
            if labels == 24:
                errors.append(np.square(logs))
            else:
                moves.append(abs(logs[1] - logs[0]))
    labeled, moved = np.sqrt(np.mean(errors, axis=0)).mean(axis=1)
    assert moved < 0.75 * labeled, (labeled, moved)
    assert network == "exact" or np.max(moves) < 0.1


def test_damaged_shrunk_shares_are_refused() -> None:
    whole = shrink_shares(
        shares_of([0.5, 0.5], [1, 1]), Calibration(np.ones(2), np.ones(2), 12), [0.4, 0.6]
    ).to_json()
    for changed in (
        {"share": [0.5, 0.6]}, {"share": [1.0]}, {"network_deviation": [-1, 0]}, {"images": "many"}, {"labeled": None},
    ):  # fmt: skip
        with pytest.raises(DataError):
            ShrunkShares.from_json(whole | changed)
    with pytest.raises(DataError, match="KeyError"):
        ShrunkShares.from_json({})


# --- a run


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with 12 images for validation."""
    root = tmp_path_factory.mktemp("shrunk") / "data"
    shutil.copytree(tiny_data, root)
    names = [f"more/{index:02d}" for index in range(12)]
    for index, name in enumerate(names):
        image, label = draw_scene(8, index, SIZE)
        write_png(root / "images" / f"{name}.png", image)
        write_png(root / "labels" / f"{name}.png", label)
    (root / "validation.txt").write_text("\n".join(names) + "\n")
    return root


def recipe_with(data: Path, path: Path, **labeling: Any) -> Recipe:
    values = recipe_dict(data)
    values["training"] |= {"workers": 1}
    values["data"]["classes"] = list(CLASSES)
    values["data"]["label_values"] = {0: "sky", 1: "road", 3: "building", 4: "vegetation", "other": "ignore"}
    values["labeling"] |= {"prior": "shrunk", **labeling}
    values["result"] = {"align": "off"}
    values["rounds"] = [{"steps": 20}, {"steps": 2, "labeling_ratio": 0.5}]
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


@pytest.fixture(scope="module", params=["none", "decisions"])
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with shrunk shares, and with aligned labels or without."""
    folder = tmp_path_factory.mktemp("runs")
    options = {} if request.param == "none" else {"align": "decisions", "bound": 20.0}
    quietly(recipe_with(data, folder / "recipe.yaml", **options), folder / "run")
    return folder / "run"


def described(run: Path) -> dict[str, Any]:
    return json.loads((run / "round_1" / "thresholds.json").read_text())


def decisions(run: Path, data: Path, name: str) -> np.ndarray:
    """What round 0's network says of an image, from nothing but its windows."""
    torch.set_num_threads(1)
    network = load_to_predict(run / "round_0" / "network.safetensors").eval()
    protocol = labeling_protocol(load_recipe(run / "recipe.yaml"))
    image = read_image(data / "images" / f"{name}.png")
    with torch.inference_mode():
        scores = predict_scores(network, image, protocol, average="logits").mean(0, len(image))
    return torch.softmax(scores.half().float(), 0).half().argmax(0).numpy()


def truth_of(data: Path, name: str) -> np.ndarray:
    table = np.full(256, 255)
    table[[0, 1, 3, 4]] = range(4)
    return table[read_label(data / "labels" / f"{name}.png")]


def test_a_round_aims_at_the_shrunk_shares(run: Path, data: Path) -> None:
    names = {
        role: (data / f"{role}.txt").read_text().split() for role in ("labeled", "unlabeled", "validation")
    }
    count = partial(np.bincount, minlength=4)
    labeled = [count(truth[truth < 255]) for truth in (truth_of(data, name) for name in names["labeled"])]
    true, predicted = [], []
    for name in names["validation"]:
        truth, said = truth_of(data, name), decisions(run, data, name)
        true.append(count(truth[truth < 255]))
        predicted.append(count(said[truth < 255]))
    seen = sum(count(decisions(run, data, name).ravel()) for name in names["unlabeled"])
    record = described(run)["prior"]
    assert record["images"] == 12 and np.allclose(record["labeled"], np.sum(labeled, 0) / np.sum(labeled))
    expected = shrink_shares(
        labeled_shares(np.array(labeled)), Calibration.of(true, predicted), seen / seen.sum()
    )
    # Equal logits may fall to another class here than in one forward pass of several windows.
    assert np.allclose(record["share"], expected.share, rtol=0.02)
    assert np.allclose(record["network"], expected.network, rtol=0.02)
    assert np.abs(np.array(record["share"]) / record["labeled"] - 1).max() > 0.02
    content, pixels = described(run), len(names["unlabeled"]) * SIZE[0] * SIZE[1]
    wanted = [int(0.5 * share * pixels) for share in record["share"]]
    assert content["wanted"] == wanted
    if "alignment" in content:
        aligned, reached = content["alignment"], np.array(content["alignment"]["reachable"])
        factor = np.array(aligned["target"])[reached] / np.array(record["share"])[reached]
        assert aligned["converged"] and np.allclose(factor, factor[0])
    labels = RunDirectory(run).label_set(1)
    assert labels.prior is not None and labels.prior.to_json() == record
    assert "calibration.json" not in {path.name for path in (run / "round_1").iterdir()}
    assert set(json.loads((run / "round_1" / "label.json").read_text())["inputs"]) >= {
        "validation",
        "settings",
    }


def without_round_1(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "round_1")
    (folder / "summary.json").unlink()
    return folder


def test_a_stopped_round_ends_with_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, wanted, folder = (
        load_recipe(run / "recipe.yaml"),
        outcome(run),
        without_round_1(run, tmp_path / "run"),
    )
    begun: list[int] = []
    counted = calibrate_module.count_truth
    monkeypatch.setattr(
        calibrate_module, "count_truth", lambda *given, **named: begun.append(1) or counted(*given, **named)
    )
    for at in (1, 2, 4):  # before the counts are written, right after, and later
        assert stopped(lambda: quietly(recipe, folder), folder / "round_1", at=at)
    counted_so_far = len(begun)
    assert (folder / "round_1" / "calibration.json").exists() and counted_so_far >= 24
    quietly(recipe, folder)
    assert outcome(folder) == wanted and len(begun) == counted_so_far


def test_damaged_counts_and_those_of_other_settings_are_made_again(run: Path, tmp_path: Path) -> None:
    recipe, folder = load_recipe(run / "recipe.yaml"), without_round_1(run, tmp_path / "run")
    (folder / "round_1").mkdir()
    waiting = folder / "round_1" / "calibration.json"
    waiting.write_text("{")
    quietly(recipe, folder)
    assert outcome(folder) == outcome(run)
    warnings = [text for text in warnings_of(folder) if "calibration.json" in text]
    says(warnings[0], "round 1", "calibration.json", "damaged", "predicted again", vary=[r"(?<=again: ).*"])
    folder = without_round_1(run, tmp_path / "settings")
    (folder / "round_1").mkdir()
    (folder / "round_1" / "calibration.json").write_text(json.dumps({"inputs": "0" * 64, "counts": []}))
    quietly(recipe, folder)
    assert outcome(folder) == outcome(run) and len(warnings) == 1
    assert not any("calibration.json" in text for text in warnings_of(folder))
    thresholds = folder / "round_1" / "thresholds.json"
    content = json.loads(thresholds.read_text())
    content["prior"]["share"][0] += 0.5
    thresholds.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged"):
        PseudoLabelSet.load(folder, folder / "round_1" / "histogram.npz", thresholds)


def test_the_page_shows_intervals_and_shrunk_shares(run: Path, tmp_path: Path) -> None:
    page = write_report(run, tmp_path / "page.html").read_text()
    assert "network, calibrated on 12 images" in page and "shrunk (the aim)" in page
    assert "90 % interval of labeled" in page and "uncertain: " in page
    assert "calibrated on validation images" in page


def test_check_and_plan_say_which_targets_are_uncertain(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with(data, tmp_path / "recipe.yaml")
    findings = check(recipe, Console(quiet=True))
    assert not findings.faults and findings.labeled.shape == (4, 4)
    assert np.array_equal(findings.labeled.sum(0), findings.pixels["labeled"][:4])
    shares, printed = (
        labeled_shares(findings.labeled),
        shares_table(CLASSES, findings.pixels, findings.labeled),
    )
    print_table(printed)
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines()}
    for k, name in enumerate(CLASSES):
        assert shares.flag(k) in lines[name] and lines[name].split()[-1] == str(shares.images[k])
    target, shrunk = plan(recipe).target
    says(target, "pseudo labels", "4 labeled image(s)")
    says(shrunk, "labeling.prior", "12 validation images")
    values = recipe_dict(data)
    values["result"], values["rounds"] = {"align": "off"}, [{"steps": 2}]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(values))
    assert plan(load_recipe(tmp_path / "alone.yaml")).target == ()


def test_what_shrinking_needs_is_said_before_a_run(data: Path, tmp_path: Path) -> None:
    recipe_with(data, tmp_path / "recipe.yaml")
    (data / "few.txt").write_text("more/00\nmore/01\n")
    few = load_recipe(tmp_path / "recipe.yaml", ["data.validation=few.txt"])
    for begin in (plan, lambda recipe: quietly(recipe, tmp_path / "run")):
        with refused(RecipeError, "labeling.prior", "2", "at least 10"):
            begin(few)
    assert any("labeling.prior" in fault for fault in check(few, Console(quiet=True)).faults)
    assert not (tmp_path / "run").exists()
    with refused(RecipeError, "labeling.prior", "cbst"):
        recipe_with(data, tmp_path / "cbst.yaml", method="cbst")


def test_align_says_which_targets_are_uncertain(run: Path, data: Path, tmp_path: Path) -> None:
    adapted = align_network(
        run, data / "images" / "u", tmp_path / "aligned.safetensors", console=Console(quiet=True), bound=20.0,
        despite_doubts=True,
    )  # fmt: skip
    labeled = [truth_of(data, name) for name in (data / "labeled.txt").read_text().split()]
    shares = labeled_shares([np.bincount(truth[truth < 255], minlength=4) for truth in labeled])
    assert list(adapted.uncertain) == [
        f"{CLASSES[k]} {shares.describe(k)}" for k in range(4) if shares.uncertain[k]
    ]
    given = align_network(
        run, data / "images" / "u", tmp_path / "given.safetensors", console=Console(quiet=True),
        prior=dict.fromkeys(CLASSES, 0.25), despite_doubts=True,
    )  # fmt: skip
    assert given.uncertain == ()
