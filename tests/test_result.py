"""A run's result: class weights found, decided on held-out images, folded in, and used by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from scipy import stats

import darseg
import forks
from conftest import recipe_dict, write_png
from darseg.cli.tables import rounds_table
from darseg.config.recipe import ResultConfig
from darseg.config.text import load_recipe, load_saved_recipe
from darseg.data.images import read_image
from darseg.demo.scenes import draw_scene
from darseg.errors import RecipeError, RunError
from darseg.model.aligned import AlignmentRecord, classifier_bias, fold_alignment
from darseg.model.network import NetworkSpec
from darseg.model.predict import predict
from darseg.model.weights import load_network, read_alignment, save_network
from darseg.model.windows import Protocol
from darseg.pseudo.alignment import Alignment
from darseg.report.comparison import compare_runs
from darseg.run.browse import open_round
from darseg.run.build import evaluation_protocol, manifest_of
from darseg.run.evaluate import evaluate_result
from darseg.run.result import decide_result
from darseg.run.settings import digest_settings
from darseg.run.steps import evaluate as evaluate_step
from darseg.run.steps.align import candidates_of, choose_images, find_candidates, why_off
from darseg.training.bootstrap import counts_of_image, expanded_tail, mean_iou_of, paired_difference
from darseg.training.scores import Scores
from darseg.view.app import viewer_app
from wording import refused, says

torch.set_num_threads(1)

K = 3
SPEC = NetworkSpec("pspnet", "resnet18", K, 16, head_channels=16, class_names=("a", "b", "c"))
TRUE = (1.0, 3.0, 0.6)
"""Class weights with which the network of the runs here is right."""


# --- the paired bootstrap


def random_counts(generator: np.random.Generator, images: int, right: float) -> np.ndarray:
    """Counts of images of 400 pixels, of which so large a share is right."""
    confusions = []
    for _ in range(images):
        truth = generator.integers(0, K, 400)
        wrong = generator.random(400) > right + generator.normal(0, 0.05)
        predicted = np.where(wrong, generator.integers(0, K, 400), truth)
        confusions.append(Scores.empty(K).plus(truth.astype(np.uint8), predicted.astype(np.uint8)).confusion)
    return np.stack([counts_of_image(confusion) for confusion in confusions])


def test_mean_iou_of_counts_is_that_of_scores() -> None:
    generator = np.random.default_rng(0)
    confusion = generator.integers(0, 50, (5, 5))
    confusion[3], confusion[:, 3] = 0, 0  # a class that occurs nowhere
    expected = Scores(confusion).mean_iou
    assert mean_iou_of(counts_of_image(confusion)[None])[0] == pytest.approx(expected, rel=1e-12)
    assert np.isnan(mean_iou_of(np.zeros((1, 3, 5), int))).all()


def test_the_bootstrap_against_a_slow_one() -> None:
    generator = np.random.default_rng(1)
    plain, other = random_counts(generator, 9, 0.7), random_counts(generator, 9, 0.75)
    found = paired_difference(plain, other, seed=4, resamples=250)

    draws = np.random.default_rng(4)
    differences = []
    for _ in range(250):
        times = draws.multinomial(9, np.full(9, 1 / 9))
        images = [image for image, count in enumerate(times) for _ in range(count)]
        means = []
        for counts in (plain, other):
            right, true, predicted = sum(counts[image] for image in images)
            means.append(np.mean([r / (t + p - r) for r, t, p in zip(right, true, predicted, strict=True)]))
        differences.append(means[1] - means[0])
    differences.sort()
    assert found.mean_iou == pytest.approx(
        mean_iou_of(other.sum(0)[None])[0] - mean_iou_of(plain.sum(0)[None])[0]
    )
    # Nine images: the quantiles at 0.024 and 0.976 of 250 numbers, which lie between these.
    assert differences[6] <= found.low <= differences[7]
    assert differences[242] <= found.high <= differences[243]


def test_intervals_of_few_images_are_wider() -> None:
    for images in (2, 3, 4, 5, 10, 30, 150):
        t = stats.t.ppf(0.05, images - 1)
        expected = stats.norm.cdf(t * np.sqrt(images / (images - 1)))
        assert expanded_tail(0.9, images) == pytest.approx(expected, rel=0.02), images
    assert expanded_tail(0.9, 10_000) == pytest.approx(0.05, rel=0.001)
    # Five images without a true difference: of the middle 90 % of the drawn ones, three times as many lie above 0.
    generator = np.random.default_rng(5)
    draws = [(random_counts(generator, 5, 0.6), random_counts(generator, 5, 0.6)) for _ in range(150)]
    above = np.mean([paired_difference(*draw, seed=0, resamples=100).low > 0 for draw in draws])
    assert above < 0.09


def test_a_clear_gain_a_clear_loss_and_noise() -> None:
    generator = np.random.default_rng(2)
    weak, strong = random_counts(generator, 30, 0.5), random_counts(generator, 30, 0.7)
    assert paired_difference(weak, strong, seed=0).low > 0.05
    assert paired_difference(strong, weak, seed=0).high < -0.05
    assert paired_difference(weak, weak, seed=0) == (0, 0, 0)
    # Without a true difference, about 5 % of the intervals lie above 0.
    above = [
        paired_difference(
            random_counts(generator, 20, 0.6), random_counts(generator, 20, 0.6), seed=0, resamples=200
        ).low
        > 0
        for _ in range(60)
    ]
    assert np.mean(above) < 0.15


# --- the decision


def alignment(strength: float = 1.0, bound: float = 5.0) -> Alignment:
    weights = np.array([1.0, 2.0, 0.5]) ** strength
    share = np.array([0.5, 0.3, 0.2])
    return Alignment(
        weights, np.ones(K, bool), share, share, 3, True, strength=strength, bound=bound, pixels=9
    )


def test_the_candidate_whose_interval_begins_highest_is_used() -> None:
    generator = np.random.default_rng(3)
    counts = np.stack([random_counts(generator, 30, right) for right in (0.5, 0.55, 0.7, 0.6)], axis=1)
    candidates = [alignment(0.5, 2.0), alignment(0.5, 5.0), alignment(1.0, 2.0)]
    decision = decide_result("auto", candidates, counts, fault=None, seed=0)
    assert decision.used and decision.chosen == 1
    difference = decision.differences[1]
    assert difference == paired_difference(counts[:, 0], counts[:, 2], seed=0)
    says(
        decision.why,
        "strength 0.5",
        "bound 5",
        "30 held-out",
        f"{difference.low:+.4f}",
        vary=[r"[+-]\d\.\d{4}"],
    )

    worse = decide_result("auto", candidates[:1], counts[:, [2, 1]], fault=None, seed=0)
    assert not worse.used and worse.chosen == 0
    says(worse.why, "not used", "worse", vary=[r"[+-]\d\.\d{4}"])
    equal = decide_result("auto", candidates[:1], counts[:, [2, 2]], fault=None, seed=0)
    assert not equal.used
    forced = decide_result("on", candidates[:1], counts[:, [2, 1]], fault=None, seed=0)
    assert forced.used
    says(forced.why, "as the recipe says", vary=[r"[+-]\d\.\d{4}"])


def test_decisions_without_candidates_or_held_out_images() -> None:
    nothing = np.zeros((0, 2, 3, K), np.int64)
    assert not decide_result("on", [], nothing[:, :1], fault="all is a", seed=0).used
    assert decide_result("on", [alignment()], nothing, fault=None, seed=0).used
    decision = decide_result("auto", [alignment()], nothing, fault=None, seed=0)
    assert not decision.used
    says(decision.why, "not used")


# --- candidates


def rows(*log_probabilities: Sequence[float]) -> np.ndarray:
    return np.array(log_probabilities, np.float16)


def test_what_cannot_be_aligned_is_said() -> None:
    wanted, names = np.array([0.4, 0.3, 0.2, 0.1]), ("a", "b", "c", "d")
    settings = [(1.0, 2.0), (1.0, 5.0)]
    one = find_candidates(rows([0, -1, -2, -3], [0, -2, -1, -3]), wanted, settings, names=names)
    assert one["candidates"] == [] and one["predicted"] == [1, 0, 0, 0]
    says(one["fault"], "one class (a)")

    # Two classes are predicted, but never by a narrow margin; the others never.
    weak = find_candidates(rows(*[[0, -9, -9, -9]] * 9, [-9, 0, -9, -9]), wanted, settings, names=names)
    assert weak["candidates"] == []
    says(weak["fault"], "of 4 classes", "[1/2, 2]", "[1/5, 5]", "c, d")

    # All classes are within reach, but no weight divides equal scores.
    ties = rows(*[[0, -0.1, -9, -9]] * 8, *[[-0.1, 0, -9, -9]] * 2)
    tied = find_candidates(ties, np.array([0.5, 0.5, 0, 0]), settings, names=names)
    assert tied["candidates"] == []
    says(tied["fault"], "equal scores")

    unusable = find_candidates(rows(), wanted, settings, names=names, unusable=["x", "y"])
    assert unusable["candidates"] == [] and unusable["predicted"] is None
    says(unusable["fault"], "NaN", "x and 1 more")


def test_candidates_of_the_recipe() -> None:
    assert candidates_of(ResultConfig()) == [(0.5, 2.0), (0.5, 5.0), (1.0, 2.0), (1.0, 5.0)]
    assert candidates_of(ResultConfig(align="on")) == [(1.0, 5.0)]
    assert candidates_of(ResultConfig(align="on", strength=0.7, bound=3.0)) == [(0.7, 3.0)]
    assert candidates_of(ResultConfig(bound=3.0)) == [(0.5, 3.0), (1.0, 3.0)]


def test_images_are_chosen_by_id_alone() -> None:
    samples = [darseg.Sample(f"{index:04d}", Path(f"{index}.png")) for index in range(1200)]
    chosen = choose_images(samples, seed=3)
    assert len(chosen) == 500 and chosen == sorted(chosen, key=lambda sample: sample.id)
    assert {sample.id for sample in choose_images(samples[::-1], seed=3)} == {sample.id for sample in chosen}
    assert {sample.id for sample in choose_images(samples, seed=4)} != {sample.id for sample in chosen}
    assert choose_images(samples[:7], seed=3) == samples[:7]


# --- runs


def scenes(root: Path, *, weights: Sequence[float] | None = TRUE) -> Path:
    """A data set whose truth is what a random network says with class weights, and a recipe that trains it little."""
    torch.manual_seed(1)
    network = SPEC.build()
    # Passes in training mode, so that BatchNorm knows the images; then logits that vary, with equal class shares.
    images = {index: draw_scene(7, index, (65, 97))[0] for index in range(26)}
    network.train()
    with torch.no_grad():
        batch = torch.from_numpy(np.stack([images[index] for index in range(8)])).permute(0, 3, 1, 2)
        for _ in range(30):
            network(batch)
        network.eval()
        last = network.head.last
        last.weight.mul_(2 / network(batch).main.std(dim=(0, 2, 3))[:, None, None, None])
        logits = network(batch).main.permute(0, 2, 3, 1).flatten(0, 2).numpy()
        last.bias.add_(torch.from_numpy(np.log(darseg.align(logits, [1 / K] * K, bound=1e6).weights)))
    save_network(network, root / "initial.safetensors", SPEC)
    if weights is not None:
        record = AlignmentRecord(
            weights, [True] * K, target=[0.4] * K, reached=[0.4] * K, strength=1, bound=5
        )
        fold_alignment(network, record)
    places = {"labeled": range(6), "unlabeled": range(6, 16), "validation": range(16, 26)}
    for role, indices in places.items():
        for index in indices:
            write_png(root / "images" / f"{index:02d}.png", images[index])
            label = predict(network, images[index], Protocol((65, 97), mirror=False)).classes
            write_png(root / "labels" / f"{index:02d}.png", label)
        (root / f"{role}.txt").write_text("".join(f"{index:02d}\n" for index in indices))
    recipe = recipe_dict(root)
    recipe["data"]["classes"] = list(SPEC.class_names)
    recipe["network"] |= {"backbone": "resnet18", "weights": "initial.safetensors"}
    recipe["training"] |= {"crop": [65, 97], "learning_rate": 1e-6, "batch": 4, "half_batch": 4}
    recipe["labeling"] = {"window": [65, 97], "mirror": False}
    recipe["evaluation"] = {"mirror": False}
    recipe["rounds"] = [{"steps": 1}, {"steps": 1, "labeling_ratio": 0.5}]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose result is aligned."""
    out = tmp_path_factory.mktemp("aligned") / "run"
    darseg.train(load_recipe(recipe_file), out)
    return out


def scores_of(run: Path, index: int = 1) -> dict[str, Any]:
    return json.loads((run / f"round_{index}" / "scores.json").read_text())


def test_a_run_finds_the_weights_decides_and_leaves_these_files(run: Path) -> None:
    scores = scores_of(run)
    aligned = scores["aligned"]
    assert aligned["used"] and aligned["mean_iou"] > scores["mean_iou"] + 0.05
    assert aligned["interval"][0] > 0 and aligned["difference"] == pytest.approx(
        aligned["mean_iou"] - scores["mean_iou"], abs=1e-12
    )
    assert {entry["strength"] for entry in aligned["candidates"]} == {0.5, 1.0}
    assert aligned["interval"] == max(entry["interval"] for entry in aligned["candidates"])
    full = json.loads((run / "round_1/result_alignment.json").read_text())["candidates"][-1]
    assert full["strength"] == 1 and full["reached"] == pytest.approx(full["target"], abs=0.01)
    moved, shares = np.log(list(aligned["weights"].values())), aligned["shares"]
    for k, name in enumerate(SPEC.class_names):
        assert np.sign(shares["reached"][name] - shares["predicted"][name]) == np.sign(moved[k]), name
    assert Scores.from_json(aligned).to_json(SPEC.class_names)["precision"] == aligned["precision"]

    files = {path.name for path in (run / "round_0").iterdir()}
    trained = {"network.safetensors", "optimizer.safetensors", "train.json"}
    assert files == trained | {
        "result_alignment.json",
        "align.json",
        "scores.json",
        "image_counts.npz",
        "evaluate.json",
        "result.safetensors",
    }
    summary = json.loads((run / "summary.json").read_text())["rounds"][1]
    assert summary["mean_iou"] == scores["mean_iou"]
    assert summary["aligned"] == {key: aligned[key] for key in summary["aligned"]}
    assert {"used", "why", "mean_iou", "iou"} <= set(summary["aligned"])

    # The result is the plain network with these weights, and nothing else.
    network, result = (
        load_network(run / "round_1/network.safetensors"),
        load_network(run / "round_1/result.safetensors"),
    )
    assert network.alignment is None and result.alignment is not None
    assert dict(zip(SPEC.class_names, result.alignment.weights, strict=True)) == aligned["weights"]
    assert result.alignment.plain_bias == tuple(classifier_bias(network).tolist())


def test_training_is_that_of_a_run_without_alignment(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    darseg.train(load_recipe(recipe_file, ["result.align=off"]), tmp_path / "off")
    for name in ("round_1/network.safetensors", "round_1/thresholds.json", "round_0/network.safetensors"):
        assert (tmp_path / "off" / name).read_bytes() == (run / name).read_bytes()
    assert "aligned" not in scores_of(tmp_path / "off")
    assert not list((tmp_path / "off").rglob("align*.json")) and not list((tmp_path / "off").rglob("result*"))
    plain = scores_of(run)
    del plain["aligned"]
    assert plain == scores_of(tmp_path / "off")


def test_commands_use_the_result_and_plain_switches_it_off(run: Path, call: Any, tmp_path: Path) -> None:
    scores = scores_of(run)
    code, out, _ = call("evaluate", run, "--out", tmp_path / "scores.json")
    assert code == 0 and "Decisions: aligned" in out and "plain IoU" in out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["confusion"] == scores["aligned"]["confusion"]
    assert written["plain"]["confusion"] == scores["confusion"]
    assert written["decisions"] == "aligned" and "aligned" not in written
    code, out, _ = call("evaluate", run, "--plain")
    assert code == 0 and "Decisions: plain, as asked for" in out and f"{scores['mean_iou']:.4f}" in out

    # A weights file of its own: --plain takes the weights away.
    result = run / "round_1/result.safetensors"
    recipe = load_saved_recipe(run / "recipe.yaml")
    assert darseg.evaluate(result, recipe)[0].mean_iou == scores["aligned"]["mean_iou"]
    assert darseg.evaluate(result, recipe, plain=True)[0].mean_iou == scores["mean_iou"]
    assert darseg.load_network(run).alignment == read_alignment(result)
    assert darseg.load_network(run, plain=True).alignment is None
    assert darseg.load_network(result, plain=True).alignment is None

    images = Path(recipe.data.root) / "images"
    expected = {}
    for plain in (False, True):
        folder = tmp_path / f"predicted_{plain}"
        assert call("predict", run, images, folder, "--kind", "index", *["--plain"] * plain)[0] == 0
        network, protocol = darseg.load_network(run, plain=plain), Protocol((65, 97), mirror=False)
        expected[plain] = predict(network, read_image(images / "20.png"), protocol).classes
        written = darseg.read_label(
            folder / "index/20.png", darseg.label_encoding(darseg.class_set(list("abc")))
        )
        assert (written != expected[plain]).mean() < 1e-3
    assert (expected[False] != expected[True]).mean() > 0.01

    labels = {}
    for plain in (False, True):
        out_folder = tmp_path / f"labels_{plain}"
        code, out, _ = call("label", run, images, out_folder, *["--plain"] * plain)
        assert code == 0 and f"Decisions: {'plain' if plain else 'aligned'}" in out
        labels[plain] = json.loads((out_folder / "redistribution.json").read_text())["predicted"]
    assert labels[False] != labels[True]
    for name, source, decisions in (("all", images, "aligned on these"), ("one", images / "20.png", "plain")):
        code, out, _ = call("label", run, source, tmp_path / name, "--align")
        assert code == 0
        says(out.splitlines()[-1], f"Decisions: {decisions}", "result.safetensors", "left out")


def test_the_viewer_shows_the_result_or_the_plain_network(run: Path) -> None:
    from starlette.testclient import TestClient

    round_ = open_round(run)
    sample, seen = round_.samples[0], {}
    for plain in (False, True):
        network = darseg.load_network(run, plain=plain)
        image = read_image(sample.image)
        expected = predict(network, image, Protocol((65, 97), mirror=False)).classes
        with TestClient(viewer_app(round_, "t", plain), base_url="http://127.0.0.1:8765") as client:
            client.headers["authorization"] = "token t"
            answer = client.get("/images/0/result")
            assert answer.status_code == 200, answer.text
            about = client.get("/api/run").json()["result"]
            pixel = client.get("/api/images/0/pixel?x=0.5&y=0.5").json()
        assert about.startswith("Decisions: plain" if plain else "Decisions: aligned")
        seen[plain] = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        colors = round_.classes.palette()[expected]
        assert seen[plain].shape == colors.shape and (seen[plain] != colors).any(axis=-1).mean() < 1e-3
        assert pixel["result"] == expected[pixel["y"], pixel["x"]]
    assert (seen[False] != seen[True]).any(axis=-1).mean() > 0.01


@pytest.mark.slow  # exporting takes seconds
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_result_gives_the_aligned_classes(
    run: Path, call: Any, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"network{suffix}"
    code, out, error = call("export", run, path)
    assert code == 0 and "Decisions: aligned" in out, error
    image = read_image(Path(load_saved_recipe(run / "recipe.yaml").data.root) / "images/20.png")
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        classes = session.run(["classes"], {"images": image[None]})[0][0]
        metadata = session.get_modelmeta().custom_metadata_map
    else:
        extra = {"darseg.json": ""}
        program = torch.export.load(str(path), extra_files=extra)
        classes = program.module()(torch.from_numpy(image)[None])[0][0].numpy()
        metadata = json.loads(extra["darseg.json"])
    record = read_alignment(run / "round_1/result.safetensors")
    assert record is not None and AlignmentRecord.from_json(json.loads(metadata["alignment"])) == record
    training = json.loads(metadata["training"])
    assert training["mean_iou"] == scores_of(run)["aligned"]["mean_iou"]
    says(training["mean_iou_note"], "validation", "strength", "bound")
    protocol = Protocol((65, 97), mirror=False)
    aligned, plain = (
        predict(darseg.load_network(run, plain=p), image, protocol).classes for p in (False, True)
    )
    assert (classes == aligned).mean() > 0.999 > (classes == plain).mean()


def test_interrupted_after_any_step_it_ends_with_the_same_bytes(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """What a kill can leave: records missing from some step on, with or without the files that the step wrote."""
    names = (
        "network.safetensors",
        "result_alignment.json",
        "scores.json",
        "image_counts.npz",
        "result.safetensors",
    )
    wanted = {name: (run / "round_1" / name).read_bytes() for name in names}
    for number, (gone, changed) in enumerate(
        [
            (["evaluate.json", "result.safetensors"], None),
            (["evaluate.json", "scores.json", "align.json", "result_alignment.json"], "result.safetensors"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        for name in gone:
            (copy / "round_1" / name).unlink()
        if changed:
            (copy / "round_1" / changed).write_bytes(b"half")
        darseg.train(load_recipe(recipe_file), copy)
        assert {name: (copy / "round_1" / name).read_bytes() for name in names} == wanted


@pytest.mark.slow
def test_two_processes_find_and_decide_the_same(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    """The bootstrap draws by position, so images that were shared out must come back in their order."""
    found = ("result_alignment.json", "scores.json", "image_counts.npz", "result.safetensors")
    shutil.copytree(run, tmp_path / "run")
    for name in (*found, "align.json", "evaluate.json"):
        (tmp_path / "run/round_1" / name).unlink()
    result = forks.torchrun("-m", "darseg", "train", recipe_file, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    for name in found:
        assert (tmp_path / "run/round_1" / name).read_bytes() == (run / "round_1" / name).read_bytes()


def test_without_a_gain_the_plain_network_stays(tmp_path: Path, call: Any) -> None:
    file = scenes(tmp_path, weights=None)  # the network is right as it is
    darseg.train(load_recipe(file, ["rounds=[{steps: 1}]"]), tmp_path / "run")
    aligned = scores_of(tmp_path / "run", 0)["aligned"]
    assert not aligned["used"] and aligned["interval"][0] <= 0
    assert not (tmp_path / "run/round_0/result.safetensors").exists()
    assert darseg.load_network(tmp_path / "run").alignment is None

    # Both are scored all the same, on other images too, and the plain ones are the result.
    code, out, _ = call("evaluate", tmp_path / "run", "--out", tmp_path / "scores.json")
    assert code == 0
    says(out.splitlines()[-1], "plain", "not used")
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["decisions"] == "plain" and "plain" not in written
    assert written["confusion"] == scores_of(tmp_path / "run", 0)["confusion"]
    assert written["aligned"]["confusion"] == aligned["confusion"] != written["confusion"]
    labeled = evaluate_result(tmp_path / "run", role="labeled", console=Console(quiet=True))
    assert labeled.aligned is not None and labeled.plain is None
    assert labeled.aligned.mean_iou < labeled.scores.mean_iou
    assert call("evaluate", tmp_path / "run", "--plain")[1].count("aligned") == 0
    text = darseg.write_report(tmp_path / "run").read_text()
    assert "plain checkpoint" not in text and "The result has plain decisions" in text

    # The recipe can insist; its own strength and bound are then the only candidate.
    changes = ["rounds=[{steps: 1}]", "result.align=on", "result.strength=0.5", "result.bound=3"]
    darseg.train(load_recipe(file, changes), tmp_path / "on", reuse=tmp_path / "run")
    record = darseg.load_network(tmp_path / "on").alignment
    assert record is not None and (record.strength, record.bound) == (0.5, 3)
    assert len(scores_of(tmp_path / "on", 0)["aligned"]["candidates"]) == 1


def test_without_held_out_images_the_recipe_can_insist(recipe_file: Path, tmp_path: Path, call: Any) -> None:
    """Nothing can be scored then; everything else works, and a run that is resumed has the same bytes."""
    changes = ["data.validation=null", "result.align=on", "rounds=[{steps: 1}]"]
    recipe, out = load_recipe(recipe_file, changes), tmp_path / "unseen"
    darseg.train(recipe, out)
    content = scores_of(out, 0)
    assert (
        content["aligned"]["used"] and content["aligned"]["mean_iou"] is None and content["mean_iou"] is None
    )
    assert set(content["aligned"]["iou"].values()) == {None} and "candidates" not in content["aligned"]
    record = darseg.load_network(out).alignment
    assert record is not None and min(record.weights) < 1 < max(record.weights)
    before = (out / "round_0/scores.json").read_bytes()
    darseg.train(recipe, out)
    assert (out / "round_0/scores.json").read_bytes() == before
    assert "no held-out image" in darseg.write_report(out).read_text()
    code, printed, _ = call("train", recipe_file, "--out", out, *changes)
    assert code == 0 and "undefined" in printed
    scores, _ = darseg.evaluate(out, role="labeled")
    assert 0 < scores.mean_iou < 1


def test_a_run_on_labels_alone_predicts_its_labeled_images(recipe_file: Path, tmp_path: Path) -> None:
    """The network says too little of two classes in them as well, and validation images show it."""
    lists = [(recipe_file.parent / f"{role}.txt").read_text() for role in ("labeled", "unlabeled")]
    (tmp_path / "all.txt").write_text("".join(lists))
    changes = [f"data.labeled={tmp_path / 'all.txt'}", "data.unlabeled=null", "rounds=[{steps: 1}]"]
    recipe = load_recipe(recipe_file, changes)
    darseg.train(recipe, tmp_path / "run")
    content = json.loads((tmp_path / "run/round_0/result_alignment.json").read_text())
    assert content["labeled"] is True and content["images"] == 16
    assert scores_of(tmp_path / "run", 0)["aligned"]["used"]
    record = darseg.load_network(tmp_path / "run").alignment
    assert record is not None and record.source == "round 0, 16 labeled images of the run"
    few = replace(manifest_of(recipe), labeled=manifest_of(recipe).labeled[:4])
    assert (
        why_off(recipe, few, [1]) == "4 labeled image(s) do not show the class shares; at least 5 are needed"
    )
    assert why_off(recipe, manifest_of(recipe), [1]) is None


def test_too_few_images_leave_the_run_as_it_was(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    for key, count, least in (("unlabeled", 4, 5), ("validation", 9, 10)):
        ids = (recipe_file.parent / f"{key}.txt").read_text().split()[:count]
        (tmp_path / f"{key}.txt").write_text("\n".join(ids) + "\n")
        changes = [f"data.{key}={tmp_path / key}.txt", "rounds=[{steps: 1}]"]
        darseg.train(load_recipe(recipe_file, changes), tmp_path / key)
        says(
            capsys.readouterr().out.split("fp32\n")[1].split("round 0")[0],
            str(count),
            key,
            f"at least {least}",
        )
        assert "aligned" not in scores_of(tmp_path / key, 0)
        assert not (tmp_path / key / "round_0/align.json").exists()


def test_the_result_section_reads_bare_words_and_refuses_others(recipe_file: Path) -> None:
    for text, value in (("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on"), ('"off"', "off")):
        assert load_recipe(recipe_file, [f"result.align={text}"]).result.align == value
    with refused(RecipeError, "result.align", "maybe"):
        load_recipe(recipe_file, ["result.align=maybe"])
    with refused(RecipeError, "result.strength", "result.bound", "off"):
        load_recipe(recipe_file, ["result.align=off", "result.strength=0.5", "result.bound=2"])
    with refused(RecipeError, "result.strength", "result.bound"):
        load_recipe(recipe_file, ["result.strength=2", "result.bound=1"])
    with refused(RecipeError, "result.strength", "off"):
        load_recipe(recipe_file, ["result.strength=0"])


def test_a_run_begun_with_another_result_is_refused(run: Path, recipe_file: Path) -> None:
    darseg.train(load_recipe(recipe_file), run)  # nothing to do
    with refused(RunError, "result.align: auto → off", "--out"):
        darseg.train(load_recipe(recipe_file, ["result.align=off"]), run)


def test_the_table_after_training_shows_both_and_the_result(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    rows = {row[0]: row[1:] for row in rounds_table(summary)}
    assert rows["validation"] == ["round 0", "round 0 aligned", "round 1", "round 1 aligned"]
    last = summary["rounds"][1]
    assert rows["mean iou"][2:] == [last["mean_iou"], last["aligned"]["mean_iou"]]
    assert rows["b"][2:] == [last["iou"]["b"], last["aligned"]["iou"]["b"]]
    assert rows["the result"] == ["", "aligned"] * 2
    summary["rounds"][1]["aligned"]["used"] = False
    assert {row[0]: row[1:] for row in rounds_table(summary)}["the result"] == ["", "aligned", "plain", ""]


def test_another_way_to_decide_is_noticed(
    run: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with monkeypatch.context() as patched, refused(RunError, "round_0", "evaluate", "settings"):
        patched.setattr(evaluate_step, "RESAMPLES", 100)
        darseg.train(load_recipe(recipe_file), copy)
    # Steps that did not note it are taken as they are.
    protocol = evaluation_protocol(load_recipe(recipe_file))
    earlier = digest_settings(protocol=protocol, result={"align": "auto", "fault": None})
    for path in copy.glob("round_*/evaluate.json"):
        record = json.loads(path.read_text())
        record["inputs"]["settings"] = earlier
        path.write_text(json.dumps(record))
    before = scores_of(copy)
    darseg.train(load_recipe(recipe_file), copy)
    assert scores_of(copy) == before


def test_a_damaged_alignment_is_named(run: Path, recipe_file: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/round_1/result_alignment.json"
    path.write_text(path.read_text().replace('"weights"', '"weighs"'))
    with refused(RunError, "result_alignment.json", "align.json"):
        darseg.train(load_recipe(recipe_file), tmp_path / "run")


@pytest.mark.parametrize("damage", [["mean_iou"], {"used": True, "why": "", "shares": 5}])
def test_damaged_aligned_scores_are_named(run: Path, tmp_path: Path, call: Any, damage: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/round_1/scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aligned": damage}))
    code, _, error = call("report", tmp_path / "run")
    assert code == 2 and "Traceback" not in error
    says(error, "round_1", "'aligned'" if isinstance(damage, list) else "'shares'")
    if isinstance(damage, list):
        code, _, error = call("export", tmp_path / "run", tmp_path / "network.onnx")
        assert code == 2
        says(error, "scores.json", "'aligned'")
        (tmp_path / "run/round_1/result.safetensors").unlink()
        code, _, error = call("evaluate", tmp_path / "run")
        assert code == 2
        says(error, "scores.json", "'aligned'")


def test_compared_runs_show_plain_aligned_and_the_result(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    darseg.train(load_recipe(recipe_file, ["result.align=off"]), tmp_path / "off", reuse=run)
    compared = compare_runs([run, tmp_path / "off"], tmp_path / "page.html")
    figures = {title: cells for title, *cells in compared.rows}
    plain, aligned = (f"{scores['mean_iou']:.4f}" for scores in (scores_of(run), scores_of(run)["aligned"]))
    assert figures["mean IoU"] == [plain, plain]
    assert figures["mean IoU, aligned"] == [aligned, "undefined"]
    assert figures["mean IoU of the result"] == [aligned, plain]
    page = compared.out.read_text()
    assert "These figures are of plain decisions" in page and f"has the best mean IoU, {aligned}" in page
    alone = compare_runs([tmp_path / "off"], tmp_path / "page.html")
    assert not any("aligned" in title for title, *_ in alone.rows)


def test_the_report_shows_both_scores_the_shares_and_the_decision(run: Path, tmp_path: Path) -> None:
    text = darseg.write_report(run, tmp_path / "report.html").read_text()
    aligned = scores_of(run)["aligned"]
    for fact in (
        aligned["why"].replace("+", "&#43;") if aligned["why"] not in text else aligned["why"],
        "IoU plain",
        "recall aligned",
        "share wanted",
        f"{aligned['iou']['b']:.3f}",
        f"{scores_of(run)['precision']['b']:.3f}",
        f"{aligned['shares']['reached']['c']:.3%}",
        f"{aligned['weights']['b']:.3g}",
        "round_1/result.safetensors",
        "round_1/network.safetensors",
        f"The result has aligned ones: mean IoU <b>{aligned['mean_iou']:.3f}</b>",
    ):
        assert fact in text
