"""Whole runs: every file they leave, resuming after kills, refusing what cannot work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data import dataset
from darseg.data.classes import IGNORE
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DataError, NumericsError, RecipeError, RunError, SizeError, StorageError
from darseg.model.predict import predict_for_labeling
from darseg.model.weights import load_network
from darseg.run.build import labeling_protocol, load_to_predict, manifest_of
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from wording import refused, says

pytestmark = pytest.mark.usefixtures("small_network")

K = len(SCENE_CLASSES)
COMPARED = (
    "network.safetensors",
    "optimizer.safetensors",
    "thresholds.json",
    "histogram.npz",
    "images.json",
    "scores.json",
    "image_counts.npz",
    "pseudo_scores.json",
)


def outcome(run: Path) -> dict[str, bytes]:
    """The bytes that an interruption must not change."""
    files = [p for name in COMPARED for p in run.glob(f"round_*/{name}")] + list(
        run.glob("round_*/labels/**/*.png")
    )
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    result = forks.python("-m", "darseg", "train", folder / "tiny.yaml", "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def warnings_of(run: Path) -> list[str]:
    """The texts of a run's warnings, from its journal."""
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [event["text"] for event in events if event["event"] == "warning"]


def test_a_run_leaves_exactly_these_files(finished: Path) -> None:
    files = {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    unlabeled = [f"u/{index:02d}" for index in range(7, 13)]
    trained = ["network.safetensors", "optimizer.safetensors", "train.json", "scores.json", "evaluate.json"]
    trained += ["image_counts.npz"]
    labeled = ["histogram.npz", "thresholds.json", "images.json", "pseudo_scores.json", "label.json"]
    expected = {"recipe.yaml", "run.json", "environment.json", "data.json", "journal.jsonl", "summary.json"}
    expected |= {"report.html", "contents.json"}
    expected |= {f"round_{r}/{name}" for r in range(3) for name in trained}
    expected |= {f"round_{r}/{name}" for r in (1, 2) for name in labeled}
    expected |= {f"round_{r}/labels/{name}.png" for r in (1, 2) for name in unlabeled}
    assert len(events) == 1
    assert files - events == expected


@pytest.mark.parametrize(
    "changes", [{}, {"align": "decisions"}, {"align": "decisions", "predict_twice": True}]
)
def test_labeling_and_training_decode_an_image_once(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """With `training.cache`, over all rounds; without, labeling decodes each image in every pass."""
    decoded: Counter[str] = Counter()

    def counted(path: Path, *rule: object) -> np.ndarray:
        decoded[f"{path.parent.name}/{path.stem}"] += 1
        return read_image(path, *rule)

    monkeypatch.setattr(dataset, "read_image", counted)
    recipe = recipe_dict(tiny_data)
    recipe["labeling"] = recipe.get("labeling", {}) | changes
    results = []
    for cache in (True, False):
        decoded.clear()
        recipe["training"] |= {"cache": cache, "workers": 1}
        (path := tmp_path / f"{cache}.yaml").write_text(yaml.safe_dump(recipe))
        train(path, tmp_path / str(cache))
        results.append(tmp_path / str(cache))
        unlabeled = sorted(count for name, count in decoded.items() if name.startswith("u/"))
        if cache:  # one is predicted before the run begins, to see that memory suffices
            assert unlabeled == [1] * 5 + [2]
        else:
            assert len(unlabeled) == 6 and unlabeled[0] >= 3
    assert outcome(results[0]) == outcome(results[1])


@pytest.mark.parametrize("index", [1, 2])
def test_facts_of_images_are_those_of_their_predictions_and_maps(finished: Path, index: int) -> None:
    run = RunDirectory(finished)
    recipe = load_recipe(run.recipe)
    unlabeled = manifest_of(recipe).unlabeled
    torch.set_num_threads(recipe.threads)
    network = load_to_predict(run.network(index - 1))  # as labeling does, so that the bits are the same
    facts_by_id = run.image_facts(index, K)
    assert list(facts_by_id) == [sample.id for sample in unlabeled]
    for sample in unlabeled:
        facts = facts_by_id[sample.id]
        prediction = predict_for_labeling(network, read_image(sample.image), labeling_protocol(recipe))
        label = cv2.imread(str(run.labels(index) / f"{sample.id}.png"), cv2.IMREAD_UNCHANGED)
        assert facts.predicted == tuple(np.count_nonzero(prediction.classes == k) for k in range(K))
        assert facts.kept == tuple(np.count_nonzero(label == k) for k in range(K))
        assert facts.coverage == pytest.approx(np.mean(label != 255))
        assert facts.confidence == pytest.approx(prediction.confidence.astype(float).mean(), abs=1e-6)
    kept = np.sum([facts.kept for facts in facts_by_id.values()], axis=0)
    assert kept.tolist() == run.label_set(index).kept.tolist()


def test_damaged_facts_of_images_are_named(finished: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.image_facts(1, K) == {}
    run.round(1).mkdir()
    whole = (finished / "round_1" / "images.json").read_text()
    for text in (whole[:50], "[]", '{"a": {"confidence": "x"}}'):
        (run.round(1) / "images.json").write_text(text)
        # Python's own words differ between versions, numbers between processors.
        vary = [r"\(\w+Error: .*?\)(?=\.)", r"(?<=column )\d+ \(char \d+\)"]
        with refused(RunError, "round_1/images.json", "label.json", vary=vary):
            run.image_facts(1, K)


def test_summary_has_the_promised_form(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["classes"] == list(SCENE_CLASSES.names)
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert [entry["labeling_ratio"] for entry in summary["rounds"]] == [None, 0.4, 0.65]
    for index, entry in enumerate(summary["rounds"]):
        scores = json.loads((finished / f"round_{index}" / "scores.json").read_text())
        assert list(entry["iou"]) == summary["classes"]
        assert entry["iou"] == scores["iou"]
        defined = [value for value in entry["iou"].values() if value is not None]
        assert entry["mean_iou"] == pytest.approx(np.mean(defined))
        assert 0 <= entry["pixel_accuracy"] <= 1 and 0 <= entry["mean_accuracy"] <= 1 and entry["seconds"] > 0


def test_the_journal_holds_every_step_of_the_run(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "journal.jsonl").read_text().splitlines()]
    apart = ("step", "checkpoint", "warning", "note")
    names = [event["event"] for event in events if event["event"] not in apart]
    per_round = ["labeled", "trained", "evaluated", "compared"]
    assert names == ["started", "trained", "evaluated", *per_round, *per_round, "finished"]
    steps = [(e["round"], e["step"]) for e in events if e["event"] == "step"]
    assert steps == [(0, 0), (0, 5), (1, 0), (1, 4), (2, 0), (2, 4)]
    assert all(np.isfinite(e["loss"]) for e in events if e["event"] == "step")


@pytest.mark.parametrize("index", [1, 2])
def test_labels_equal_a_slow_oracle(finished: Path, index: int) -> None:
    """Sort every confidence of every image, as the paper says, and compare thresholds and kept counts."""
    run = RunDirectory(finished)
    recipe = load_recipe(run.recipe)
    manifest = manifest_of(recipe)
    network = load_network(run.network(index - 1)).to(memory_format=torch.channels_last)
    torch.set_num_threads(1)
    window = labeling_protocol(recipe).window
    assert window == (65, 81)
    counts = np.zeros(K, np.int64)
    for sample in manifest.labeled:
        label = read_label(sample.label)
        counts += np.array([(label == k).sum() for k in range(K)])
    confidences: list[list[float]] = [[] for _ in range(K)]
    predictions = {}
    for sample in manifest.unlabeled:
        image = read_image(sample.image)
        total, seen = np.zeros((K, 65, 97)), np.zeros((65, 97))
        # The stride is ceil(81 · 2/3) = 54; the second window would end at 135, so it begins at 97 − 81.
        for left in (0, 16):
            tile = torch.from_numpy(image[:, left : left + 81].copy()).permute(2, 0, 1)[None]
            with torch.inference_mode():
                plain, mirrored = network(tile).main[0], network(tile.flip(3)).main[0].flip(2)
            total[:, :, left : left + 81] += ((plain + mirrored) / 2).numpy()
            seen[:, left : left + 81] += 1
        probabilities = torch.softmax(torch.from_numpy(total / seen).float().half(), dim=0)
        confidence, classes = probabilities.max(dim=0)
        predictions[sample.id] = (classes.numpy(), confidence.float().numpy())
        for k in range(K):
            confidences[k] += confidence[classes == k].float().tolist()
    pixels = sum(map(len, confidences))
    described = json.loads((run.round(index) / "thresholds.json").read_text())
    ratio = [None, 0.4, 0.65][index]
    kept = np.zeros(K, np.int64)
    for k in range(K):
        ranked = sorted(confidences[k], reverse=True)
        budget = int(ratio * (counts[k] / counts.sum()) * pixels)
        assert described["wanted"][k] == budget
        # Batched and unbatched predictions may differ in their last bits, which moves single pixels of the 37,830: those
        # whose two best classes are equal in float16.
        assert abs(described["predicted"][k] - len(ranked)) <= 4
        if not ranked or budget == 0:
            assert described["threshold"][k] is None
            continue
        threshold = ranked[min(budget, len(ranked)) - 1]
        assert described["threshold"][k] == pytest.approx(threshold, abs=1e-3)
    for sample in manifest.unlabeled:
        label = read_label(run.labels(index) / f"{sample.id}.png")
        classes, _ = predictions[sample.id]
        labeled = label != IGNORE
        assert np.count_nonzero(label[labeled] != classes[labeled]) <= 4
        kept += np.bincount(label[labeled], minlength=K)
    assert kept.tolist() == described["kept"]
    enough = np.array(described["predicted"]) >= np.array(described["wanted"])
    assert (np.abs(kept - described["wanted"])[enough] <= len(manifest.unlabeled)).all()


KILLED = """
import os, signal, sys
from pathlib import Path
from darseg.cli import main

recipe, run, pattern, count = sys.argv[1:]
replace = os.replace


def change(aside, path):
    replace(aside, path)
    if len(list(Path(run).glob(pattern))) >= int(count):
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = change
sys.argv = ["darseg", "train", recipe, "--out", run]
main()
"""


def kill_and_finish(recipe: Path, run: Path, places: Sequence[tuple[str, int]]) -> None:
    """Train; the process is killed at each place, once so many files have a pattern, and the last one ends."""
    for pattern, count in places:
        ended = forks.python("-c", KILLED, recipe, run, pattern, count)
        assert ended.returncode == -signal.SIGKILL, (pattern, ended.stderr)
    result = forks.python("-m", "darseg", "train", recipe, "--out", run)
    assert result.returncode == 0, result.stderr


def test_killed_anywhere_it_ends_with_the_same_bytes(finished: Path, tiny_data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    run = tmp_path / "run"
    kill_and_finish(
        recipe,
        run,
        [
            ("round_0/checkpoint_*.safetensors", 1),
            ("round_1/predictions/**/*.prediction", 3),
            ("round_1/labels/**/*.png", 2),
            ("round_2/checkpoint_*.safetensors", 1),
        ],
    )
    assert outcome(run) == outcome(finished)
    assert not list(run.glob("round_*/predictions")) and not list(run.glob("round_*/checkpoint_*"))


def test_what_a_kill_leaves_around_a_record_is_cleaned_up(
    finished: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Killed after a step's record was written but before its temporary files were removed; and as the folder begins."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "round_1" / "predictions").mkdir()
    (run / "round_1" / "predictions" / "x.prediction").write_bytes(b"left over")
    (run / "round_2" / "checkpoint_00000002.safetensors").write_bytes(b"left over")
    (run / "data.json").unlink()
    train(load_recipe(run / "recipe.yaml"), run)
    assert outcome(run) == outcome(finished) and (run / "data.json").exists()
    assert not list(run.glob("round_*/predictions")) and not list(run.glob("round_*/checkpoint_*"))

    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.yaml.0123456789abcdef.part").write_text("seed: 3")  # killed before the rename
    train(load_recipe(finished / "recipe.yaml", ["rounds=[{steps: 1}]"]), begun)
    assert (begun / "summary.json").exists() and not list(begun.glob("*.part"))


def broken_copy(tiny_data: Path, root: Path) -> Path:
    """A validation label with an unknown value and a truncated unlabeled image: used only after round 0."""
    shutil.copytree(tiny_data, root)
    cv2.imwrite(str(root / "labels" / "v" / "00.png"), np.full((65, 97), 77, np.uint8))
    image = root / "images" / "u" / "09.png"
    image.write_bytes(image.read_bytes()[:300])
    return root


def test_faults_of_all_data_are_found_before_training(
    recipe_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    root = broken_copy(tiny_data, tmp_path / "broken")
    with refused(DataError, "images/u/09.png", "300 bytes", "labels/v/00.png", "77 (6305 pixels)"):
        train(load_recipe(recipe_file, [f"data.root={root}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_truth_of_some_unlabeled_images_is_measured(
    recipe_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "some"
    shutil.copytree(tiny_data, root)
    for index in range(9, 13):
        (root / "labels" / "u" / f"{index:02d}.png").unlink()
    run = RunDirectory(tmp_path / "run")
    changes = [f"data.root={root}", "rounds=[{steps: 2}, {steps: 1, labeling_ratio: 1.0}]"]
    train(load_recipe(recipe_file, changes), run.root)
    scored = json.loads((run.round(1) / "pseudo_scores.json").read_text())
    confusion = np.zeros((K, K), int)
    for name in ("07", "08"):
        truth, label = read_label(root / f"labels/u/{name}.png"), read_label(run.labels(1) / f"u/{name}.png")
        for k in range(K):
            for j in range(K):
                confusion[k, j] += ((truth == k) & (label == j)).sum()
    assert scored["confusion"] == confusion.tolist() and confusion.any()


@pytest.mark.parametrize("key", ["keep_predictions", "predict_twice"])
def test_predictions_kept_or_made_twice_give_the_same_labels(
    finished: Path, tmp_path: Path, key: str
) -> None:
    run = tmp_path / "run"
    changes = [f"labeling.{key}=true", "rounds=[{steps: 6}, {steps: 1, labeling_ratio: 0.4}]"]
    shutil.copytree(finished, tmp_path / "first", ignore=shutil.ignore_patterns("round_[12]"))
    train(load_recipe(finished / "recipe.yaml", changes), run, reuse=tmp_path / "first")
    for name in ("thresholds.json", "histogram.npz", *(f"labels/u/{i:02d}.png" for i in range(7, 13))):
        assert (run / "round_1" / name).read_bytes() == (finished / "round_1" / name).read_bytes()
    waiting = sorted(path.name for path in (run / "round_1").glob("predictions/u/*"))
    assert waiting == ([f"{i:02d}.prediction" for i in range(7, 13)] if key == "keep_predictions" else [])


def test_labels_are_made_again_if_their_record_was_deleted(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "round_1" / "label.json").unlink()
    (run / "round_1" / "labels" / "u" / "07.png").write_bytes(b"changed by hand")
    train(load_recipe(run / "recipe.yaml"), run)
    assert outcome(run) == outcome(finished)


def test_fine_confidences_meet_the_target_without_sampling(finished: Path, tmp_path: Path) -> None:
    changes = ["labeling.confidence=fine", "labeling.sampling=none"]
    changes += ["rounds=[{steps: 6}, {steps: 1, labeling_ratio: 0.4}]"]
    train(load_recipe(finished / "recipe.yaml", changes), tmp_path / "run", reuse=finished)
    labels = RunDirectory(tmp_path / "run").label_set(1)
    thresholds, counts = labels.thresholds, labels.histogram.counts
    assert thresholds.scale.name == "fine" and labels.kept.sum() > 0
    for k in range(K):
        if not thresholds.predicted[k] or not thresholds.wanted[k]:
            assert labels.kept[k] == 0
            continue
        last = counts[k, thresholds.accept[k]]  # pixels that share the last accepted code
        target = min(thresholds.wanted[k], thresholds.predicted[k])
        assert target <= labels.kept[k] < target + last


def test_too_little_disk_space_is_reported_before_labeling(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    recipe = load_recipe(recipe_file, ["rounds=[{steps: 1}, {steps: 1, labeling_ratio: 0.4}]"])
    with refused(StorageError, str(tmp_path / "run"), "labeling.predict_twice=true"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "round_1" / "predictions").exists()


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_bf16_on_a_processor_without_it_is_reported(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, warned: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    train(load_recipe(recipe_file, ["training.precision=bf16", "rounds=[{steps: 1}]"]), tmp_path / "run")
    warnings = [text for text in warnings_of(tmp_path / "run") if "training.precision bf16" in text]
    assert len(warnings) == warned
    for text in warnings:
        says(text, "AVX-512", "training.precision=fp32")


def test_running_a_finished_run_again_changes_nothing(finished: Path, tiny_data: Path) -> None:
    before = outcome(finished)
    summary = (finished / "summary.json").read_bytes()
    train(load_recipe(finished / "recipe.yaml"), finished)
    assert outcome(finished) == before and (finished / "summary.json").read_bytes() == summary


def test_another_recipe_is_refused_with_both_ways_out(finished: Path) -> None:
    changed = load_recipe(finished / "recipe.yaml", ["training.learning_rate=0.5"])
    with refused(RunError, str(finished), "training.learning_rate: 0.01 → 0.5", "--out NEW_FOLDER"):
        train(changed, finished)


def test_results_changed_by_hand_are_noticed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "round_1" / "labels" / "u" / "07.png").unlink()
    with refused(RunError, str(run / "round_1"), "'label'", "label.json", "- labels"):
        train(load_recipe(run / "recipe.yaml"), run)


def test_a_folder_that_is_not_a_run_folder_is_left_alone(recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "precious.jpg").write_bytes(b"x")
    with refused(RunError, str(folder), "--out"):
        train(load_recipe(recipe_file), folder)
    assert [p.name for p in folder.iterdir()] == ["precious.jpg"]


@pytest.mark.parametrize("method", ["cbst", "global"])
def test_other_methods_reuse_round_0(finished: Path, tmp_path: Path, method: str) -> None:
    changes = [f"labeling.method={method}", "rounds=[{steps: 6}, {steps: 3, labeling_ratio: 0.4}]"]
    if method == "global":
        changes = [changes[0], "labeling.threshold=0.3", "rounds=[{steps: 6}, {steps: 3}]"]
    summary = train(load_recipe(finished / "recipe.yaml", changes), tmp_path / "run", reuse=finished)
    for name in ("network.safetensors", "train.json", "scores.json", "evaluate.json"):
        assert (tmp_path / "run/round_0" / name).read_bytes() == (finished / "round_0" / name).read_bytes()
    assert len(summary["rounds"]) == 2
    described = json.loads((tmp_path / "run" / "round_1" / "thresholds.json").read_text())
    assert all(keep in (0.0, 1.0) for keep in described["keep"])  # neither method samples
    if method == "global":
        assert all(abs(value - 0.3) < 1e-3 for value in described["threshold"] if value is not None)


def test_loss_that_is_not_finite_stops_before_harm(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.learning_rate=1e30", "training.checkpoint_every=1"])
    with pytest.raises(NumericsError) as caught:  # which step it is depends on the processor
        train(recipe, tmp_path / "run")
    assert all(fact in str(caught.value) for fact in ("step", "l/0", "training.learning_rate"))
    assert not (tmp_path / "run" / "round_0" / "network.safetensors").exists()
    assert list((tmp_path / "run" / "round_0").glob("checkpoint_*.safetensors"))


def test_full_disk_while_labeling_loses_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    recipe, run, fsync = load_recipe(recipe_file), tmp_path / "run", os.fsync

    def full(descriptor: int) -> None:
        if "round_1/labels/u/09" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refused(StorageError, "round_1/labels/u/09"):
            train(recipe, run)
    assert not list(run.rglob("*.part"))
    assert not (run / "round_1" / "label.json").exists()
    train(recipe, run)
    assert outcome(run) == outcome(finished)


def test_run_folder_that_cannot_be_made(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(StorageError, str(tmp_path / "file/run")):
        train(load_recipe(recipe_file), tmp_path / "file" / "run")


def test_sizes_the_network_cannot_take_are_all_named(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.crop=[50, 64]", "labeling.window=60"])
    with refused(SizeError, "training.crop: 50 x 64", "labeling.window: 60 x 60", "49 x 49"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rounds_without_unlabeled_images_are_refused(
    recipe_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "all_labeled"
    for name in ("07", "08", "09"):
        for kind in ("images", "labels"):
            target = root / kind / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tiny_data / kind / "u" / f"{name}.png").read_bytes())
    recipe = load_recipe(
        recipe_file,
        [f"data.root={root}", "data.labeled=null", "data.unlabeled=null", "data.validation={every: 3}"],
    )
    with refused(RecipeError, "3 rounds", "data.unlabeled"):
        train(recipe, tmp_path / "run")


def test_a_class_absent_from_the_masks_is_allowed_and_reported(
    recipe_file: Path, tiny_data: Path, tmp_path: Path
) -> None:
    names = [*SCENE_CLASSES.names, "unicorn"]
    recipe = load_recipe(
        recipe_file, [f"data.classes={names}", "rounds=[{steps: 2}, {steps: 2, labeling_ratio: 0.5}]"]
    )
    summary = train(recipe, tmp_path / "run")
    assert "unicorn" in summary["classes"]
    says(warnings_of(tmp_path / "run")[0], "unicorn")
    described = json.loads((tmp_path / "run" / "round_1" / "thresholds.json").read_text())
    assert described["wanted"][-1] == 0 and described["kept"][-1] == 0


def test_masks_without_a_labeled_pixel(recipe_file: Path, tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "void"
    for kind in ("images", "labels"):
        for path in (tiny_data / kind).rglob("*.png"):
            target = root / path.relative_to(tiny_data)
            target.parent.mkdir(parents=True, exist_ok=True)
            if kind == "labels" and path.parent.name == "l":
                cv2.imwrite(str(target), np.full((65, 97), 255, np.uint8))
            else:
                target.write_bytes(path.read_bytes())
    for role in ("labeled", "unlabeled", "validation"):
        (root / f"{role}.txt").write_text((tiny_data / f"{role}.txt").read_text())
    with refused(DataError):
        train(load_recipe(recipe_file, [f"data.root={root}"]), tmp_path / "run")


def test_missing_weights_never_mean_a_start_from_scratch(recipe_file: Path, tmp_path: Path, call) -> None:
    code, _, err = call("train", recipe_file, "network.weights=nowhere.pth", "--out", tmp_path / "run")
    assert code == 2 and "nowhere.pth" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
