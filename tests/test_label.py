"""`darseg label` with a trained network; labeling and training by two processes."""

from __future__ import annotations

import io
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import forks
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import StorageError
from darseg.model.predict import predict_for_labeling
from darseg.model.weights import load_network
from darseg.run.adapt import align_network
from darseg.run.build import labeling_protocol, place
from darseg.run.label import label_folder
from darseg.run.rounds import train
from test_labeling import outcome
from wording import refused, says

K = len(SCENE_CLASSES)
UNLABELED = [f"{index:02d}" for index in range(7, 13)]
label_quietly = partial(label_folder, console=Console(quiet=True))


@pytest.fixture(scope="module")
def recipe_path(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe = recipe_dict(tiny_data)
    recipe["network"]["backbone"] = "resnet18_half"
    recipe["rounds"] = [{"steps": 2}, {"steps": 1, "labeling_ratio": 0.5}]
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def run(recipe_path: Path) -> Path:
    """Two short rounds, by one process."""
    folder = recipe_path.parent / "run"
    train(load_recipe(recipe_path), folder, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def checkpoint(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last network, outside of its run folder."""
    target = tmp_path_factory.mktemp("checkpoint") / "network.safetensors"
    return Path(shutil.copy(run / "round_1" / "network.safetensors", target))


@pytest.fixture
def images(tiny_data: Path) -> Path:
    return tiny_data / "images" / "u"


def labeled_pixels(root: Path) -> list[int]:
    masks = [read_label(path) for path in (root / "labels" / "l").glob("*.png")]
    return [sum(int((mask == k).sum()) for mask in masks) for k in range(K)]


def predictions_of(run: Path, round_index: int, images: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    network = place(load_network(run / f"round_{round_index}" / "network.safetensors"))
    protocol = labeling_protocol(load_recipe(run / "recipe.yaml"))
    return {
        name: predict_for_labeling(network, read_image(images / f"{name}.png"), protocol)
        for name in UNLABELED
    }


@pytest.mark.parametrize("round_index", [None, 0])
def test_labels_are_the_networks_predictions(
    call, run: Path, images: Path, tmp_path: Path, round_index: int | None
) -> None:
    chosen = [] if round_index is None else ["--round", round_index]
    everything = ["--method", "global", "--threshold", 0, "--threads", 1]
    code, printed, err = call("label", run, images, tmp_path / "out", *everything, *chosen)
    assert code == 0, err
    predictions = predictions_of(run, 1 if round_index is None else 0, images)
    names = {f"{name}.png" for name in UNLABELED}
    assert set(outcome(tmp_path / "out")) == names | {"redistribution.json", "histogram.npz"}
    for name, prediction in predictions.items():
        assert np.array_equal(read_label(tmp_path / "out" / f"{name}.png"), prediction.classes)
    assert "6 images, 100.00%" in printed
    described = json.loads((tmp_path / "out" / "redistribution.json").read_text())
    counts = np.bincount(np.concatenate([p.classes.ravel() for p in predictions.values()]), minlength=K)
    assert described["kept"] == described["predicted"] == counts.tolist()
    assert described["classes"] == list(SCENE_CLASSES.names)


def test_what_is_not_given_comes_from_the_recipe(
    run: Path, tiny_data: Path, images: Path, tmp_path: Path
) -> None:
    """The last round's ratio, the seed, and class counts of the labeled masks; thresholds by sorting confidences."""
    described = label_quietly(run, images, tmp_path / "out")
    counts = labeled_pixels(tiny_data)
    settings = {"method": "dars", "labeling_ratio": 0.5, "threshold": None, "seed": 3, "class_counts": counts}
    assert described["settings"] == settings | {"confidence": "float16", "sampling": "random"}
    predictions = predictions_of(run, 1, images)
    pixels = [
        (int(k), float(p))
        for prediction in predictions.values()
        for k, p in zip(prediction.classes.ravel(), prediction.confidence.ravel(), strict=True)
    ]
    labels = {name: read_label(tmp_path / "out" / f"{name}.png") for name in UNLABELED}
    for k in range(K):
        ranked = sorted((p for c, p in pixels if c == k), reverse=True)
        wanted = int(0.5 * (counts[k] / sum(counts)) * len(pixels))
        assert described["wanted"][k] == wanted and described["predicted"][k] == len(ranked)
        if not ranked:
            assert described["threshold"][k] is None
            continue
        threshold = ranked[min(max(wanted, 1), len(ranked)) - 1]
        assert described["threshold"][k] == threshold
        for name, prediction in predictions.items():
            accepted = (prediction.classes == k) & (prediction.confidence >= threshold)
            assert ((labels[name] != k) | accepted).all()
        assert described["kept"][k] == sum(int((label == k).sum()) for label in labels.values())
    assert any(described["kept"])


def test_a_checkpoint_with_recipe_or_counts(
    run: Path, checkpoint: Path, recipe_path: Path, tiny_data: Path, images: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_path)
    label_quietly(run, images, tmp_path / "run")
    label_quietly(checkpoint, images, tmp_path / "recipe", recipe=recipe)
    assert outcome(tmp_path / "recipe") == outcome(tmp_path / "run")
    names = list(SCENE_CLASSES.names)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(dict(zip(names, labeled_pixels(tiny_data), strict=True))))
    described = label_quietly(
        checkpoint, images, tmp_path / "counts", class_counts=counts, labeling_ratio=0.5, seed=3, threads=1
    )
    asked = json.loads((tmp_path / "run" / "redistribution.json").read_text())
    assert described["settings"] == asked["settings"] and described["classes"] == names
    assert described["inputs"]["protocol"] != asked["inputs"]["protocol"]  # whole images instead of windows
    single = label_quietly(checkpoint, images / "09.png", tmp_path / "single", recipe=recipe)
    assert single["images"] == 1 and (tmp_path / "single" / "09.png").exists()


IMPOSSIBLE = {  # arguments → facts that the message must contain
    "CHECKPOINT IMAGES OUT": ["network.safetensors", "--class-counts COUNTS.json", "--recipe"],
    "CHECKPOINT IMAGES OUT --class-counts TWO": ["two.json", "2", f"{K} classes"],
    "RUN IMAGES OUT --class-counts TWO": ["two.json", "2", f"{K} classes"],
    "CHECKPOINT IMAGES OUT --class-counts ALL": ["labeling_ratio", "method dars"],
    "RUN IMAGES OUT --class-counts NONE": ["nowhere", "[9000, 120]"],
    "RUN IMAGES OUT --method global": ["threshold", "method global"],
    "RUN IMAGES OUT --threshold 0.5": ["threshold", "dars"],
    "RUN IMAGES OUT --round 7": ["run", "round 7"],
    "NONE IMAGES OUT": ["nowhere"],
    "RUN NONE OUT": ["nowhere"],
    "RUN EMPTY OUT": ["empty", ".png"],
}


@pytest.mark.parametrize("arguments", IMPOSSIBLE)
def test_calls_that_cannot_work(
    call, run: Path, checkpoint: Path, images: Path, tmp_path: Path, arguments: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.json").write_text("[9000, 120]")
    (tmp_path / "all.json").write_text(json.dumps([1] * K))
    paths = {
        "RUN": run,
        "CHECKPOINT": checkpoint,
        "IMAGES": images,
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty",
        "TWO": tmp_path / "two.json",
        "ALL": tmp_path / "all.json",
        "NONE": tmp_path / "nowhere",
    }
    code, _, err = call("label", *(paths.get(word, word) for word in arguments.split()))
    assert code == 2 and "Traceback" not in err
    says(err, *IMPOSSIBLE[arguments])
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named_and_all_others_are_kept(
    call, run: Path, images: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(images, tmp_path / "images"))
    whole = (copied / "10.png").read_bytes()
    (copied / "10.png").write_bytes(whole[:200])
    arguments = ["label", run, copied, tmp_path / "out", "--confidence", "fine", "--sampling", "none"]
    code, _, err = call(*arguments)
    assert code == 2 and "Traceback" not in err
    says(err, "1 file(s)", str(copied / "10.png"), "200 bytes")
    waiting = {f".predictions/{name}.prediction" for name in UNLABELED if name != "10"}
    assert set(outcome(tmp_path / "out")) == waiting | {".begun.json"}
    (copied / "10.png").write_bytes(whole)
    assert call(*arguments)[0] == 0
    assert call("label", run, copied, tmp_path / "other", *arguments[4:], "--predict-twice")[0] == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "other")


def test_pools_with_orientation_marks_are_read_upright_and_counted(
    run: Path, images: Path, tmp_path: Path
) -> None:

    for number, path in enumerate(sorted(images.glob("*.png"))):
        exif = Image.Exif()
        exif[274] = (1, 6, 3, 8)[number % 4]
        (tmp_path / "pool").mkdir(exist_ok=True)
        Image.open(path).convert("RGB").save(tmp_path / f"pool/{path.stem}.jpg", exif=exif)
    (tmp_path / "pool/x.heic").touch()
    text = io.StringIO()
    console = Console(file=text, width=400)
    label_folder(run, tmp_path / "pool", tmp_path / "out", console=console)
    for path in (tmp_path / "pool").glob("*.jpg"):
        assert read_image(tmp_path / f"out/{path.stem}.png").shape == read_image(path).shape
    lines = [line for line in text.getvalue().splitlines() if "EXIF" in line or "heic" in line]
    says("\n".join(lines), "4 image(s) have an orientation mark", "upright", "1 .heic")
    align_network(run, tmp_path / "pool", tmp_path / "a.safetensors", console=console)
    assert text.getvalue().count("4 image(s) have an orientation mark") == 2
    assert text.getvalue().count(".heic") == 2


def test_too_little_disk_requires_predicting_twice(
    run: Path, images: Path, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """label and a round of training refuse before predicting; with predict_twice, both give the same labels."""
    first, needed = Path(shutil.copytree(run, tmp_path / "first")), 3 * 65 * 97 * 6
    shutil.rmtree(first / "round_1")
    (first / "summary.json").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with refused(StorageError, str(tmp_path / "out"), "113.5 KB", "--predict-twice"):
        label_quietly(run, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with refused(StorageError, str(first), "113.5 KB", "labeling.predict_twice=true"):
        train(load_recipe(recipe_path), first, console=Console(quiet=True))
    assert not list(first.glob("round_1/**/*.p*"))
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(str(b)), replace(a, b)))
    twice = load_recipe(recipe_path, ["labeling.predict_twice=true"])
    train(twice, tmp_path / "run", reuse=first, console=Console(quiet=True))
    assert compared(tmp_path / "run") == compared(run)
    assert not [path for path in written if path.endswith(".prediction")]
    assert len([path for path in written if path.endswith(".png")]) == len(UNLABELED)


def compared(run: Path) -> dict[str, bytes]:
    """Files that neither interruptions nor the number of processes may change."""
    names = (
        "network.safetensors",
        "optimizer.safetensors",
        "thresholds.json",
        "histogram.npz",
        "images.json",
        "scores.json",
    )
    files = [
        *(p for name in names for p in run.glob(f"round_*/{name}")),
        *run.glob("round_*/labels/**/*.png"),
    ]
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in files}


# Two processes.


def test_label_by_two_processes(call, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    arguments = ["label", run, tiny_data / "images", tmp_path / "one", "--threads", 1]
    assert call(*arguments)[0] == 0
    result = forks.torchrun("-m", "darseg", *arguments[:3], tmp_path / "two", "--threads", 1)
    assert result.returncode == 0, result.stderr
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    labels = [p for p in outcome(tmp_path / "two") if p.endswith(".png")]
    assert len(labels) == 13 and result.stdout.count("13 images") == 1


def test_train_by_two_processes(run: Path, recipe_path: Path, tmp_path: Path) -> None:
    result = forks.torchrun(
        "-m", "darseg", "train", recipe_path, "training.batch=8", "--out", tmp_path / "run"
    )
    assert result.returncode == 0, result.stderr
    # The processes share every batch, so the bits differ (tests/test_processes.py compares the losses).
    assert compared(tmp_path / "run").keys() == compared(run).keys()
    assert len(compared(run)) == 3 * 2 + 3 + len(UNLABELED)
    assert result.stdout.count("2 processes share every batch") == 1
    events = [
        json.loads(line)["event"] for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    ]
    assert [events.count(name) for name in ("started", "labeled", "trained", "finished")] == [1, 1, 2, 1]
    kept = json.loads((tmp_path / "run" / "round_1" / "thresholds.json").read_text())["kept"]
    maps = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in tmp_path.glob("run/round_1/labels/**/*.png")]
    assert kept == [sum(int((label == k).sum()) for label in maps) for k in range(K)]
