"""A run folder of darseg 0.2 resumes, and every verb opens it; run folders of later versions are refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from conftest import REPOSITORY
from darseg.config.text import as_begun, load_recipe, load_saved_recipe
from darseg.errors import FormatError, RunError
from darseg.model.weights import load_network
from darseg.report.facts import DataFacts, read_data, read_run, remarks
from darseg.run.browse import open_round
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from darseg.training.checkpoint import load_checkpoint
from darseg.view.app import viewer_app
from wording import refused, says

pytest.importorskip("timm")

OLD = REPOSITORY / "tests" / "assets" / "run_0.2"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the old run folder, with its data."""
    shutil.copytree(OLD, tmp_path / "old")
    recipe = tmp_path / "old" / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("root: DATA", f"root: {tmp_path / 'old' / 'data'}"))
    return tmp_path / "old" / "run"


def events(run: Path, name: str) -> list[dict]:
    lines = (run / "journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == name]


def test_it_resumes_where_it_stopped(old: Path) -> None:
    files = [path for path in old.rglob("*") if path.is_file() and "checkpoint" not in path.name]
    kept = {path: path.read_bytes() for path in files if path.parent.name.startswith(("round_", "u"))}
    summary = train(load_recipe(old / "recipe.yaml"), old)
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1]
    assert all(path.read_bytes() == content for path, content in kept.items())
    # Only what was left to do was done, from step 2 on.
    trained = [entry["round"] for entry in events(old, "trained")]
    assert trained == [0, 1] and len(events(old, "labeled")) == 1
    assert [entry["step"] for entry in events(old, "step") if entry["round"] == 1] == [0, 4]
    assert not list(old.glob("round_*/checkpoint_*"))
    # Done again there is nothing to do: old and new records agree with this version's settings.
    again = train(load_recipe(old / "recipe.yaml"), old)
    assert again == summary and len(events(old, "trained")) == 2


def test_training_goes_on_with_the_old_weights_and_momentum(old: Path) -> None:
    checkpoint = load_checkpoint(next(old.glob("round_1/checkpoint_*.safetensors")))
    assert checkpoint.step == 2 and set(checkpoint.parts) == {"network", "optimizer", "method"}
    trainable = dict(load_network(old / "round_0" / "network.safetensors").named_parameters())
    assert set(checkpoint.parts["optimizer"]) == {f"{name}:momentum_buffer" for name in trainable}
    raw = load_file(next(old.glob("round_1/checkpoint_*.safetensors")))
    for name, value in checkpoint.parts["optimizer"].items():
        assert torch.equal(value, raw[f"momentum.{name.removesuffix(':momentum_buffer')}"]) and value.any()
    train(load_recipe(old / "recipe.yaml"), old)
    final = load_network(old / "round_1" / "network.safetensors").state_dict()
    changes = [
        float((final[name] - value).abs().max()) for name, value in checkpoint.parts["network"].items()
    ]
    assert 0 < np.median(changes) < 0.1  # three more steps, not a start from scratch


def test_its_steps_can_be_reused(old: Path, tmp_path: Path) -> None:
    train(load_recipe(old / "recipe.yaml", ["rounds=[{steps: 6}]"]), tmp_path / "new", reuse=old)
    name = "round_0/network.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (old / name).read_bytes()
    other = load_recipe(old / "recipe.yaml", ["rounds=[{steps: 6}]", "training.weight_decay=0.01"])
    train(other, tmp_path / "other", reuse=old)
    assert (tmp_path / "other" / name).read_bytes() != (old / name).read_bytes()


def test_what_is_reused_is_reported_and_a_wrong_folder_refused(old: Path, tmp_path: Path) -> None:
    recipe = load_recipe(old / "recipe.yaml", ["rounds=[{steps: 6}]"])
    with refused(RunError, str(tmp_path / "nothing"), "recipe.yaml", "--reuse"):
        train(recipe, tmp_path / "new", reuse=tmp_path / "nothing")
    assert not (tmp_path / "new").exists()
    train(recipe, tmp_path / "new", reuse=old)
    copied = [(entry["round"], entry["step"]) for entry in events(tmp_path / "new", "copied")]
    assert copied == [(0, "train"), (0, "evaluate")]


def test_every_verb_opens_it(old: Path, tmp_path: Path, call: Callable) -> None:
    code, out, _ = call("evaluate", old)
    assert code == 0 and "mean iou" in out
    images = old.parent / "data" / "images" / "v"
    code, out, err = call("predict", old, images, tmp_path / "predicted")
    assert code == 0, err
    assert len(list((tmp_path / "predicted" / "index").rglob("*.png"))) == 3
    code, out, err = call("report", old)
    assert code == 0 and (old / "report.html").exists(), err


FORMER_ABSENT = "absent from all labelled masks, so never pseudo-labelled: pole, sign"
"""How 0.2 warned of classes without labeled pixels."""


def test_a_report_of_it_lists_each_fact_once(old: Path) -> None:
    """The journal has the warnings in 0.2's words; the report finds the same facts in the files."""
    warned = [entry["text"] for entry in events(old, "warning")]
    assert len(warned) == 1 and "never predicted, so not pseudo-labelled: sky" in warned[0]
    with open(old / "journal.jsonl", "a") as file:
        file.write(json.dumps({"event": "warning", "text": FORMER_ABSENT}) + "\n")
    facts = read_run(old)
    counts = [name not in ("pole", "sign") for name in facts.classes.names]
    for data in (DataFacts(None, np.array(counts, np.int64)), DataFacts(None, None, "the data is gone")):
        texts = [remark.text for remark in remarks(facts, data)]
        (never,) = (text for text in texts if "never predicted" in text)
        says(never, "round 1", warned[0].rpartition(": ")[2])
        (absent,) = (text for text in texts if text.endswith(": pole, sign"))
        says(absent, "never pseudo-labeled")
        assert "labelled" not in "".join(texts)


def test_a_report_of_a_new_run_lists_each_fact_once(old: Path, tmp_path: Path) -> None:
    recipe = load_recipe(old / "recipe.yaml", ["rounds=[{steps: 1}, {steps: 1, labeling_ratio: 0.4}]"])
    names = (*recipe.data.classes, "unicorn")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": names})})
    train(recipe, tmp_path / "new")
    warned = [entry["text"] for entry in events(tmp_path / "new", "warning")]
    facts = read_run(tmp_path / "new")
    texts = [remark.text for remark in remarks(facts, read_data(facts))]
    for part in ("these classes", "never predicted"):
        (text,) = (text for text in texts if part in text)
        assert warned.count(text) == 1 and "unicorn" in text


def test_the_viewer_opens_it(old: Path) -> None:
    """The page, the list, and every picture of an image."""
    viewer, headers = viewer_app(open_round(old, None), "a-token"), {"authorization": "token a-token"}
    with TestClient(viewer, base_url="http://127.0.0.1:8765", headers=headers) as client:
        assert client.get("/").status_code == 200
        while (about := client.get("/api/run").json())["read"] < about["images"]:
            time.sleep(0.01)
        assert (about["round"], about["images"], about["truth"]) == (1, 5, True)
        images = client.get("/api/images").json()["images"]
        facts = json.loads((old / "round_1" / "images.json").read_text())
        assert [image["id"] for image in images] == sorted(facts)
        for image in images:
            labels = cv2.imread(str(old / "round_1" / "labels" / f"{image['id']}.png"), cv2.IMREAD_UNCHANGED)
            assert image["coverage"] == pytest.approx(100 * (labels != 255).mean(), abs=1e-3)
            for kind in ("photo", "label", "prediction", "confidence", "truth"):
                picture = client.get(f"/images/{image['index']}/{kind}")
                assert picture.status_code == 200 and picture.headers["content-type"].startswith("image/")


def test_it_labels_other_images(old: Path, tmp_path: Path, call: Callable) -> None:
    images = old.parent / "data" / "images" / "v"
    code, out, err = call("label", old, images, tmp_path / "labels")
    assert code == 0 and str(tmp_path / "labels") in out, err
    record = json.loads((tmp_path / "labels" / "redistribution.json").read_text())
    settings = record["settings"]
    assert (record["images"], settings["method"], settings["labeling_ratio"]) == (3, "dars", 0.4)
    assert len(list((tmp_path / "labels").rglob("*.png"))) == 3


def test_it_is_exported(old: Path, tmp_path: Path, call: Callable) -> None:
    """The command compares the file's classes with the network's before it gives the file its name."""
    code, out, err = call("export", old, tmp_path / "network.pt2")
    assert code == 0 and (tmp_path / "network.pt2").stat().st_size > 0, err
    assert "Written to" in out


def test_a_later_format_is_refused(old: Path) -> None:
    run = RunDirectory(old)
    run.format.write_text('{"format": 99}\n')
    with refused(RunError, str(old), "99", "pip install --upgrade darseg", "--out"):
        train(load_recipe(old / "recipe.yaml"), old)
    run.format.write_text("{")
    with refused(RunError, "run.json", vary=[r"\(.*\)"]):
        train(load_recipe(old / "recipe.yaml"), old)


def test_a_new_run_folder_has_a_format_number(old: Path, tmp_path: Path) -> None:
    train(load_recipe(old / "recipe.yaml", ["rounds=[{steps: 1}]"]), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == {"format": 2}


# --- keys that may be changed when a run is resumed

FREE = [
    "training.workers=1",
    "training.cache=false",
    "training.checkpoint_every=1",
    "training.keep_checkpoints=3",
    "threads=2",
]


def test_keys_that_cannot_change_the_result_may_be_changed(old: Path) -> None:
    changed, saved = load_recipe(old / "recipe.yaml", FREE), load_saved_recipe(old / "recipe.yaml")
    assert saved.result.align == "off"
    threads = torch.get_num_threads()
    try:
        train(changed, old)
    finally:
        torch.set_num_threads(threads)
    (event,) = events(old, "recipe_changed")
    assert [line.split(":")[0] for line in event["keys"]] == sorted(key.split("=")[0] for key in FREE)
    warnings = [entry["text"] for entry in events(old, "warning")]
    assert any("threads 1 → 2" in text for text in warnings)
    # The folder says how it goes on, and the next resume changes nothing.
    assert load_recipe(old / "recipe.yaml") == as_begun(changed, saved)
    train(changed, old)
    assert len(events(old, "recipe_changed")) == 1


def test_keys_that_change_the_result_are_refused_with_the_others_unchanged(old: Path) -> None:
    before = (old / "recipe.yaml").read_bytes()
    with refused(RunError, "training.learning_rate: 0.01 → 0.02", "--out NEW_FOLDER"):
        train(load_recipe(old / "recipe.yaml", ["training.learning_rate=0.02", "training.workers=1"]), old)
    assert (old / "recipe.yaml").read_bytes() == before


def test_another_run_at_work_keeps_its_recipe(old: Path) -> None:
    before = (old / "recipe.yaml").read_bytes()
    with RunDirectory(old).held() as locked:
        if not locked:
            pytest.skip("a file system without locks")
        with refused(RunError, str(old), "--out NEW_FOLDER"):
            train(load_recipe(old / "recipe.yaml", FREE), old)
    assert (old / "recipe.yaml").read_bytes() == before and not events(old, "recipe_changed")


def test_a_checkpoint_of_a_later_version_is_never_removed(old: Path) -> None:
    later = old / "round_1" / "checkpoint_00000004.safetensors"
    save_file(
        {"network:x": torch.zeros(1)},
        later,
        {"checkpoint": '{"format": 99, "step": 4, "parts": ["network"]}'},
    )
    with refused(FormatError, str(later), "99"):
        train(load_recipe(old / "recipe.yaml"), old)
    assert later.exists()


def test_it_resumes_in_the_middle_of_labeling(old: Path) -> None:
    """A kill between two label maps: the histogram is there, thresholds and the record are not."""
    folder = old / "round_1"
    maps = {path: path.read_bytes() for path in sorted((folder / "labels").rglob("*.png"))}
    for name in ("label.json", "thresholds.json", "images.json", "pseudo_scores.json"):
        (folder / name).unlink()
    next(folder.glob("checkpoint_*")).unlink()
    for path in list(maps)[1:]:
        path.unlink()
    train(load_recipe(old / "recipe.yaml"), old)
    assert {path: path.read_bytes() for path in sorted((folder / "labels").rglob("*.png"))} == maps
