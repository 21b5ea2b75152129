"""Aligned labels in rounds and by `darseg label`: against slow arithmetic, killed anywhere, by two processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import forks
from conftest import recipe_dict
from darseg.config.recipe import Recipe
from darseg.config.text import dump_recipe, load_recipe
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.errors import DataError, NumericsError, RecipeError, StorageError
from darseg.model import predict as predict_module
from darseg.model.aligned import AlignmentRecord, fold_alignment
from darseg.model.predict import predict_scores
from darseg.model.weights import load_network, read_spec, save_network
from darseg.pseudo.alignment import Alignment
from darseg.pseudo.labeling import AlignSettings
from darseg.pseudo.labelset import read_prediction
from darseg.pseudo.redistribute import redistribute
from darseg.pseudo.scores import scores_from_bytes, scores_to_bytes
from darseg.report.overview import write_report
from darseg.run import align_samples, label_samples
from darseg.run.browse import Repredictor, open_round
from darseg.run.build import labeling_protocol, load_to_predict
from darseg.run.directory import RunDirectory
from darseg.run.label import label_folder
from darseg.run.rounds import train
from test_labeling import outcome as files_of
from test_run import outcome, warnings_of
from wording import refused, says

CLASSES = ("sky", "road", "building", "vegetation")
UNLABELED = [f"u/{index:02d}" for index in range(7, 13)]
label_quietly = partial(label_folder, console=Console(quiet=True))
quietly = partial(train, console=Console(quiet=True))


@pytest.fixture(scope="module")
def path(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short rounds, the second with aligned labels, of a network that predicts all four classes."""
    file = tmp_path_factory.mktemp("recipe") / "aligned.yaml"
    values = recipe_dict(tiny_data)
    values["network"] |= {"backbone": "resnet18_half"}
    values["training"] |= {"workers": 1}
    values["data"]["classes"] = list(CLASSES)
    values["data"]["label_values"] = {0: "sky", 1: "road", 3: "building", 4: "vegetation", "other": "ignore"}
    values["labeling"] |= {"align": "decisions", "bound": 20.0}
    values["rounds"] = [{"steps": 20}, {"steps": 2, "labeling_ratio": 0.5}]
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def recipe(path: Path) -> Recipe:
    return load_recipe(path)


@pytest.fixture
def images(tiny_data: Path) -> Path:
    return tiny_data / "images"


@pytest.fixture(scope="module")
def run(path: Path) -> Path:
    """An undisturbed run."""
    folder = path.parent / "run"
    quietly(load_recipe(path), folder)
    return folder


@pytest.fixture(scope="module")
def wanted(run: Path) -> dict[str, bytes]:
    return outcome(run)


def described(run: Path) -> dict[str, Any]:
    return json.loads((run / "round_1" / "thresholds.json").read_text())


def logits_of(run: Path, images: Path) -> dict[str, torch.Tensor]:
    """The averaged logits of round 0's network, recovered from nothing but its windows."""
    torch.set_num_threads(1)
    network = load_to_predict(run / "round_0" / "network.safetensors").eval()
    protocol = labeling_protocol(load_recipe(run / "recipe.yaml"))
    with torch.inference_mode():
        return {
            name: predict_scores(
                network, read_image(images / f"{name}.png"), protocol, average="logits"
            ).mean(0, 65)
            for name in UNLABELED
        }


# The arithmetic.


@pytest.mark.parametrize("confidence", ["float16", "fine"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_labels_are_those_of_slow_arithmetic(
    run: Path, images: Path, tmp_path: Path, confidence: Any, strength: float
) -> None:
    """Logits plus log w, softmax, the largest, thresholds by sorting: equal pixel for pixel without random sampling."""
    record = label_quietly(
        run, images / "u", tmp_path / "out", round_index=0, confidence=confidence, sampling="none",
        align=AlignSettings(strength=strength),
    )  # fmt: skip
    alignment = record["alignment"]
    assert alignment["converged"] and alignment["bound"] == 20 and alignment["strength"] == strength
    weights = torch.tensor(np.log(alignment["weights"]), dtype=torch.float32)[:, None, None]
    classes, confidences, ideal = [], [], []
    for scores in logits_of(run, images).values():
        if confidence == "float16":
            weighted = (scores - scores.amax(dim=0)).half().float() + weights
            p = torch.softmax((weighted - weighted.amax(dim=0)).half(), dim=0).float()
        else:
            p = torch.softmax((scores + weights).double(), dim=0)
        classes.append(p.argmax(dim=0).numpy())
        confidences.append(p.amax(dim=0).double().numpy())
        product = torch.softmax(scores.double(), 0) * torch.tensor(alignment["weights"])[:, None, None]
        ideal.append((product / product.sum(dim=0)).amax(dim=0).numpy())
    assert np.abs(np.stack(confidences) - np.stack(ideal)).max() < 2e-3
    counts, pixels = record["settings"]["class_counts"], np.stack(classes).size
    for k in range(4):
        ranked = np.sort(np.stack(confidences)[np.stack(classes) == k])[::-1]
        assert record["predicted"][k] == len(ranked)
        threshold = ranked[min(int(0.5 * (counts[k] / sum(counts)) * pixels), len(ranked)) - 1]
        assert np.isclose(
            record["threshold"][k], threshold, rtol=0, atol=0 if confidence == "float16" else 2e-4
        )
        for name, chosen, sure in zip(UNLABELED, classes, confidences, strict=True):
            label = read_label(tmp_path / "out" / f"{Path(name).name}.png")
            assert set(np.unique(label[chosen == k])) <= {k, 255}
            if confidence == "float16":
                assert np.array_equal(label == k, (chosen == k) & (sure >= threshold))
    shares = np.array(record["predicted"]) / pixels
    assert np.abs(shares - alignment["reached"]).max() < 2e-3
    if strength == 1:
        assert np.abs(np.array(alignment["reached"]) - alignment["target"]).max() < 1e-3
        reachable = np.array(alignment["reachable"])
        factor = np.array(alignment["target"])[reachable] / np.array(counts)[reachable]
        assert reachable.sum() >= 2 and np.allclose(factor, factor[0])
        assert np.abs(np.array(alignment["plain"]) - np.array(counts) / sum(counts)).max() > 0.05


def test_rounds_command_and_arrays_agree(run: Path, images: Path, tmp_path: Path) -> None:
    """The label step of a round, `darseg label`, and `redistribute` on saved logits."""
    record = label_quietly(run, images / "u", tmp_path / "out", round_index=0)
    logits = {Path(name).name: scores.numpy() for name, scores in logits_of(run, images).items()}
    arrays = redistribute(
        logits, record["settings"]["class_counts"], 0.5, align=AlignSettings(bound=20), seed=3
    )
    assert arrays.alignment is not None and arrays.alignment.to_json() == record["alignment"]
    for name, label in arrays.labels.items():
        assert np.array_equal(read_label(tmp_path / "out" / f"{name}.png"), label)
    labeled = described(run)
    for key in ("alignment", "threshold", "keep", "wanted", "predicted", "accepted"):
        assert labeled[key] == record[key], key


def test_weights_of_one_are_the_plain_labels(run: Path, images: Path, tmp_path: Path) -> None:
    plain = label_quietly(run, images / "u", tmp_path / "plain", round_index=0, align=False)
    settings = AlignSettings(bound=20, strength=0)
    aligned = label_quietly(run, images / "u", tmp_path / "aligned", round_index=0, align=settings)
    assert "alignment" not in plain and "align" not in plain["settings"]
    assert aligned["alignment"]["weights"] == [1] * 4
    written = [files_of(tmp_path / name) for name in ("plain", "aligned")]
    assert all(written[0][name] == written[1][name] for name in written[0] if not name.endswith(".json"))
    other = label_quietly(run, images / "u", tmp_path / "full", round_index=0)
    assert other["predicted"] != plain["predicted"]


def test_weights_that_are_part_of_a_network_are_not_used_twice(
    run: Path, recipe: Recipe, images: Path, tmp_path: Path
) -> None:
    path = run / "round_0" / "network.safetensors"
    network, spec, shares = load_network(path), read_spec(path), [0.25] * 4
    save_network(network, tmp_path / "plain.safetensors", spec)
    record = AlignmentRecord([1, 2, 0.5, 3], [True] * 4, target=shares, reached=shares, strength=1, bound=5)
    save_network(fold_alignment(network, record), tmp_path / "folded.safetensors", spec)
    for name in ("plain", "folded"):
        label_quietly(tmp_path / f"{name}.safetensors", images / "u", tmp_path / name, recipe=recipe)
    written = [files_of(tmp_path / name) for name in ("plain", "folded")]
    assert all(written[0][name] == written[1][name] for name in written[0] if not name.endswith(".json"))


@given(
    st.integers(0, 2**32), st.integers(2, 5), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([np.float16, np.float32]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_waiting_scores_are_stored_exactly(seed: int, k: int, h: int, w: int, dtype: Any) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (k, h, w * np.dtype(dtype).itemsize), np.uint8)
    scores = bits.view(dtype)
    assert scores_from_bytes(scores_to_bytes(scores)).tobytes() == scores.tobytes()
    assert scores_from_bytes(scores_to_bytes(scores)).shape == (k, h, w)


def test_damaged_scores_are_refused() -> None:
    whole = scores_to_bytes(np.zeros((2, 3, 4), np.float16))
    for damaged in (b"", whole[:-5], whole[:10] + b"x" + whole[11:], b"nothing of that kind"):
        with pytest.raises(DataError, match="not stored scores"):
            scores_from_bytes(damaged)
    large = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(
        8, "little"
    )  # the head of a frame that states its size
    heads = [
        b"[" * 100_000,
        b'{"dtype": "object", "shape": [1, 1, 1]}',
        b'{"dtype": "float16", "shape": [2]}',
    ]
    foreign = [zstandard.ZstdCompressor().compress(head + b"\n" + bytes(8)) for head in heads]
    for damaged in (large, *foreign):
        with pytest.raises(DataError, match="not stored scores"):
            scores_from_bytes(damaged)


# However the work is done.


def test_a_round_keeps_what_it_should(run: Path) -> None:
    left = {file.name for file in (run / "round_1").iterdir()}
    assert not left & {"alignment.json", "waiting_scores", "predictions"}
    alignment = described(run)["alignment"]
    assert alignment["converged"] and alignment["weights"] != [1] * 4
    labeled = next(
        event for line in (run / "journal.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == "labeled"
    )  # fmt: skip
    assert labeled["aligned"] is True
    assert RunDirectory(run).label_set(1).alignment.to_json() == alignment


def test_predicting_twice_leaves_the_same_bytes(
    run: Path,
    recipe: Recipe,
    path: Path,
    tmp_path: Path,
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, plain = [], label_samples.scores_for_labeling

    def counted(*arguments: Any, **options: Any) -> np.ndarray:
        names.append(options["name"])
        return plain(*arguments, **options)

    monkeypatch.setattr(label_samples, "scores_for_labeling", counted)
    for twice in (True, False):
        names.clear()
        folder = without_round_1(run, tmp_path / f"twice_{twice}")
        text = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(
            text.replace("predict_twice: false", f"predict_twice: {twice}".lower())
        )
        quietly(load_recipe(path, [f"labeling.predict_twice={twice}".lower()]), folder)
        assert len(names) == len(UNLABELED) * (2 if twice else 1)
        assert outcome(folder) == wanted


def without_round_1(run: Path, folder: Path) -> Path:
    """A copy of the run whose second round has not begun."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "round_1")
    (folder / "summary.json").unlink()
    return folder


class Pulled(BaseException):
    """The plug was pulled: the run ends without a word."""


def stopped(work: Callable[[], object], folder: Path, at: int) -> bool:
    """Whether `work` was stopped before the at-th file of the folder that appears or goes, with it half-written."""
    left, lock = at, threading.Lock()

    def change(act: Any, *names: Any, **options: Any) -> Any:
        nonlocal left
        if str(folder) in str(names[0]):
            with lock:
                left -= 1
            if left <= 0:
                raise Pulled
        return act(*names, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, partial(change, getattr(os, name)))
        try:
            work()
        except Pulled:
            return True
    return False


@pytest.mark.slow
def test_a_round_stopped_again_and_again_ends_with_the_same_bytes(
    run: Path, recipe: Recipe, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    folder, stops = without_round_1(run, tmp_path / "run"), 0
    while stopped(lambda: quietly(recipe, folder), folder / "round_1", at=4 + stops):
        stops += 1
    assert stops >= 4 and outcome(folder) == wanted


@pytest.mark.slow
def test_labeling_stopped_at_any_moment_ends_with_the_same_bytes(
    run: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for name in UNLABELED[:2]:
        shutil.copy2(images / f"{name}.png", tmp_path / "images")

    def label(folder: Path) -> None:
        label_quietly(run, tmp_path / "images", folder, round_index=0)

    label(tmp_path / "wanted")
    expected = files_of(tmp_path / "wanted")
    for at in itertools.count(1):
        folder = tmp_path / f"at_{at}"
        if not stopped(partial(label, folder), folder, at):
            break
        label(folder)
        assert files_of(folder) == expected, at
    # The marker, scores, weights, predictions, scores that go, counts, labels, result, marker, weights.
    assert at > 1 + 2 + 1 + 2 + 2 + 1 + 2 + 1 + 1 + 1


@pytest.mark.slow
def test_two_processes_leave_the_same_labels(run: Path, path: Path, images: Path, tmp_path: Path) -> None:
    label_quietly(run, images / "u", tmp_path / "one", round_index=0)
    result = forks.torchrun("-m", "darseg", "label", run, images / "u", tmp_path / "two", "--round", 0)
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_damaged_waiting_files_are_made_again(
    run: Path, recipe: Recipe, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    folder = without_round_1(run, tmp_path / "run")

    def stop(*arguments: Any, **options: Any) -> None:
        raise Pulled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align_samples, "align", stop)
        with pytest.raises(Pulled):
            quietly(recipe, folder)
    waiting = sorted((folder / "round_1" / "waiting_scores").rglob("*.scores"))
    assert len(waiting) == len(UNLABELED)
    waiting[0].write_bytes(waiting[0].read_bytes()[:100])
    waiting[1].unlink()
    quietly(recipe, folder)
    assert outcome(folder) == wanted


def test_weights_found_with_other_inputs_are_found_again(
    run: Path, recipe: Recipe, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    """A round stopped after half of its label maps, whose weights are then of other data: all of it is made again."""
    folder = without_round_1(run, tmp_path / "run")
    assert stopped(lambda: quietly(recipe, folder), folder / "round_1" / "labels", at=3)
    file = folder / "round_1" / "alignment.json"
    stale = json.loads(file.read_text())
    file.write_text(json.dumps(stale | {"weights": [1.0] * 4, "inputs": "of other data"}))
    (folder / "round_1" / "histogram.npz").write_bytes(b"of other weights")
    quietly(recipe, folder)
    assert outcome(folder) == wanted


def without_round_1_of(recipe: Recipe, run: Path, folder: Path) -> Path:
    without_round_1(run, folder)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def test_the_viewer_sees_the_aligned_predictions(run: Path, path: Path, tmp_path: Path) -> None:
    keep = load_recipe(path, ["labeling.keep_predictions=true"])
    folder = without_round_1_of(keep, run, tmp_path / "run")
    quietly(keep, folder)
    round_ = open_round(folder)
    assert len(round_.samples) == len(UNLABELED)
    for sample in round_.samples:
        kept = read_prediction(folder / "round_1" / "predictions", sample.id)
        again = Repredictor(open_round(run)).prediction(sample)
        assert kept is not None and np.array_equal(kept.classes, again.classes)
        assert np.array_equal(kept.codes, again.codes)


def test_the_report_and_the_command_show_it(run: Path, images: Path, tmp_path: Path, call) -> None:
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = re.sub(
        r"<[^>]*>|\s+", " ", page[page.rindex(">Aligned decisions<") : page.rindex(">Thresholds<")]
    )
    alignment, counts = described(run)["alignment"], [5190, 10591, 4129, 1381]
    code, printed, _ = call("label", run, images / "u", tmp_path / "out", "--round", 0)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    for k, name in enumerate(CLASSES):
        reached, plain = alignment["reached"][k], alignment["plain"][k]
        weight = f"{alignment['weights'][k]:.3g}" if alignment["reachable"][k] else "out of reach"
        for cell in (name, f"{plain:.3%}", f"{counts[k] / sum(counts):.3%}", f"{reached:.3%}", weight):
            assert cell in section, cell
        _, row = [line for line in lines if line[:1] == [name]]
        assert row[1:4] == [f"{share:.2%}" for share in (plain, reached, counts[k] / sum(counts))]


# What does not work.


def test_a_network_too_weak_keeps_its_own_labels(tiny_data: Path, tmp_path: Path) -> None:
    """After two steps hardly any of eleven classes is predicted; labels are those without align, and it is said."""
    values = recipe_dict(tiny_data)
    values["network"] |= {"backbone": "resnet18_half"}
    values["rounds"] = [{"steps": 2}, {"steps": 1, "labeling_ratio": 0.5}]
    runs = {}
    for align in ("none", "decisions"):
        values["labeling"]["align"] = align
        (tmp_path / "weak.yaml").write_text(yaml.safe_dump(values))
        quietly(load_recipe(tmp_path / "weak.yaml"), tmp_path / align)
        runs[align] = outcome(tmp_path / align)
    same = [name for name in runs["none"] if name.endswith((".png", ".npz", "images.json"))]
    assert len(same) == 10 and all(runs["none"][name] == runs["decisions"][name] for name in same)
    alignment = described(tmp_path / "decisions")["alignment"]
    assert not alignment["converged"] and set(alignment["weights"]) == {1}
    [warning] = [text for text in warnings_of(tmp_path / "decisions") if "align" in text]
    says(warning, "round 1", "of 11 classes", "own")


def test_one_image_and_one_class(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy2(images / f"{UNLABELED[0]}.png", tmp_path / "images" / "only.png")
    record = label_quietly(run, tmp_path / "images", tmp_path / "out", round_index=0)
    assert record["alignment"]["single"] and record["alignment"]["pixels"] == 65 * 97
    alone = label_quietly(run, tmp_path / "images", tmp_path / "plain", round_index=0, align=False)
    assert (record["predicted"], record["threshold"]) == (alone["predicted"], alone["threshold"])
    [warning] = Alignment.from_json(record["alignment"]).warnings(CLASSES)
    says(warning, "one image", "own")
    one = np.zeros((3, 4, 5), np.float32)
    one[1] = 9
    with_one = redistribute({"a": one}, [10, 20, 30], 0.5, align=True)
    plain = redistribute({"a": one}, [10, 20, 30], 0.5)
    assert with_one.alignment is not None and not with_one.alignment.converged
    assert np.array_equal(with_one.labels["a"], plain.labels["a"])


def test_a_network_that_diverged_is_refused(run: Path, images: Path, tmp_path: Path, monkeypatch) -> None:
    plain = predict_module.predict_scores

    def diverged(*arguments: Any, **options: Any) -> Any:
        sums = plain(*arguments, **options)
        sums.total_KHW[2, 7, 9] = float("nan")
        return sums

    monkeypatch.setattr(predict_module, "predict_scores", diverged)
    with refused(NumericsError, "07.png", "diverged"):
        label_quietly(run, images / "u", tmp_path / "out", round_index=0)


def test_too_little_disk_for_all_scores(
    run: Path, recipe: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = 65 * 97 * 6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * pixels - 1))
    with refused(StorageError, str(tmp_path / "out"), "8 bytes per pixel", "--predict-twice", "3 bytes"):
        label_quietly(run, images / "u", tmp_path / "out")
    label_quietly(run, images / "u", tmp_path / "plain", align=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * pixels - 1))
    with refused(StorageError, str(tmp_path / "out"), "3 bytes per pixel", "Free some space."):
        label_quietly(run, images / "u", tmp_path / "out", predict_twice=True)


def test_recipes_with_settings_of_align_are_checked(path: Path) -> None:
    for setting, facts in (
        ("labeling.align=soft", ["labeling.align", "none", "decisions"]),
        ("labeling.bound=1.0", ["labeling.bound", "above 1"]),
        ("labeling.strength=1.5", ["labeling.strength", "0 to 1"]),
        ("labeling.align=none", ["labeling.bound", "no effect without align"]),
    ):
        with refused(RecipeError, *facts):
            load_recipe(path, [setting])
