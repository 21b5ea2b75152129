"""What can be known to fail later fails before round 0; memory that runs out is explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import write_png
from darseg.config.text import load_recipe
from darseg.data.video import VideoWriter
from darseg.errors import DataError, MemoryLimit, StorageError
from darseg.model import windows as sliding
from darseg.model.weights import save_network
from darseg.run import evaluate as evaluate_module
from darseg.run import predict as predict_module
from darseg.run import rounds
from darseg.run.build import build_initial_network, manifest_of, spec_of
from darseg.run.check import read_all
from darseg.run.directory import RunDirectory
from darseg.run.predict import predict_folder
from darseg.run.rehearse import rehearse
from darseg.run.remedies import less_at_once, memory_reason
from darseg.run.settings import digest_state
from wording import refused, says

QUIET = Console(quiet=True)
HUGE = "[1.0, 90000.0]"  # hundreds of terabytes: no allocator gives them


@pytest.mark.parametrize("section", ["evaluation", "labeling"])
def test_a_protocol_without_memory_fails_before_round_0(
    section: str, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [f"{section}.scales={HUGE}"])
    with refused(MemoryLimit, f"{section}.scales=[1.0]", "GB were asked for", vary=[r"[\d,.]+ GB"]):
        rounds.train(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_one_round_needs_no_labeling(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, [f"labeling.scales={HUGE}", "rounds=[{steps: 1}]"])
    manifest, (network, _) = manifest_of(recipe), build_initial_network(recipe)
    largest = {"unlabeled": manifest.unlabeled[0]}
    rehearse(
        recipe, {0: network}, manifest=manifest, run=RunDirectory(tmp_path), counts=[9] * 6, largest=largest
    )


def test_a_rehearsal_changes_neither_network_nor_random_numbers(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    manifest, (network, _) = manifest_of(recipe), build_initial_network(recipe)
    findings = read_all(manifest, QUIET)
    before, state = digest_state(network.state_dict()), torch.get_rng_state()
    run = RunDirectory(tmp_path / "run")
    rehearse(recipe, {0: network}, manifest=manifest, run=run, counts=[9] * 6, largest=findings.largest)
    assert digest_state(network.state_dict()) == before and network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "run").exists()


def test_the_largest_image_of_each_role_is_found(recipe_file: Path, tiny_data: Path, tmp_path: Path) -> None:
    manifest = manifest_of(load_recipe(recipe_file))
    largest = read_all(manifest, QUIET).largest
    assert set(largest) == {role for role, samples in manifest.roles().items() if samples}
    write_png(tmp_path / "images" / "a.png", np.zeros((9, 9, 3), np.uint8))
    write_png(tmp_path / "images" / "b.png", np.zeros((8, 30, 3), np.uint8))
    write_png(tmp_path / "images" / "c.png", np.zeros((9, 10, 3), np.uint8))
    write_png(tmp_path / "labels" / "a.png", np.zeros((9, 9), np.uint8))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {root: ., classes: [a, b]}\nnetwork: {weights: none}\nrounds: [{steps: 1}]\n")
    assert read_all(manifest_of(load_recipe(recipe)), QUIET).largest["unlabeled"].id == "b"


def test_class_counts_and_disk_are_looked_at_too(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file)
    manifest, (network, _) = manifest_of(recipe), build_initial_network(recipe)
    with pytest.raises(DataError):
        rehearse(
            recipe, {0: network}, manifest=manifest, run=RunDirectory(tmp_path), counts=[0] * 6, largest={}
        )
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}))
    with refused(StorageError, "labeling.predict_twice=true"):
        rounds.train(recipe, tmp_path / "run", console=QUIET)


def test_memory_of_the_machine_and_of_the_gpu_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 48)
    says(memory_reason(error.value) or "", "1,125,899.9 GB")
    with pytest.raises(MemoryError) as error:
        np.empty(1 << 48, np.float32)
    assert memory_reason(error.value)
    assert memory_reason(torch.cuda.OutOfMemoryError("CUDA out of memory.")) == (
        "The GPU has too little memory (CUDA out of memory.)"
    )
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be …",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ):
        reason = memory_reason(RuntimeError(text))
        assert reason == f"The GPU has too little memory ({text.splitlines()[0]})"
    assert memory_reason(RuntimeError("shapes differ")) is None


def exhausted(*arguments: Any, **options: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("command", ["evaluate", "label", "align"])
def test_a_command_that_predicts_says_what_to_do_without_memory(
    command: str, project: Path, tmp_path: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = project / "runs" / "tiny", project / "data" / "images" / "u"
    arguments = {
        "evaluate": (run,),
        "label": (run, images, tmp_path / "labels"),
        "align": (run, images, "--out", tmp_path / "aligned.safetensors"),
    }
    section = "labeling" if command == "label" else "evaluation"
    with monkeypatch.context() as patch:
        patch.setattr(sliding, "_slide", exhausted)
        code, _, err = call(command, *arguments[command])
    assert code == 2
    says(err, "Tried to allocate 2.00 GiB", f"{section}.window=[33, 33]", "--recipe")


def test_a_network_without_memory_is_no_traceback(
    project: Path, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "load_to_predict", exhausted)
    code, _, err = call("evaluate", project / "runs" / "tiny")
    assert code == 2
    says(err, "The network alone", "Tried to allocate 2.00 GiB")


def test_advice_where_nothing_smaller_is_known(recipe_file: Path) -> None:
    says(less_at_once(None), "--recipe", "evaluation.window")
    smallest = load_recipe(recipe_file, ["labeling.window=[17, 17]"])
    assert less_at_once(smallest, "labeling") == "Close other programs that use it."
    whole = load_recipe(recipe_file, ["labeling.window=whole"])
    assert "labeling.window=[49, 65] (now whole images)" in less_at_once(whole, "labeling")


def test_a_frame_without_memory_ends_the_video_with_a_message(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, network = load_recipe(recipe_file), tmp_path / "network.safetensors"
    save_network(build_initial_network(recipe)[0], network, spec_of(recipe))
    writer = VideoWriter(tmp_path / "in.mp4", 5)
    for _ in range(3):
        writer.add(np.zeros((32, 48, 3), np.uint8))
    writer.close()
    monkeypatch.setattr(predict_module, "predict", exhausted)
    with refused(MemoryLimit, "in.mp4, frame 1", "2.00 GiB", "cut it into pieces"):
        predict_folder(network, tmp_path / "in.mp4", tmp_path / "out", ["index"], console=QUIET)


def test_one_huge_picture_does_not_end_predict_for_the_others(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, network = load_recipe(recipe_file), tmp_path / "network.safetensors"
    save_network(build_initial_network(recipe)[0], network, spec_of(recipe))
    pixels = np.zeros((20, 30, 3), np.uint8)
    for name, image in {"a": pixels, "huge": np.zeros((21, 30, 3), np.uint8), "z": pixels}.items():
        write_png(tmp_path / "in" / f"{name}.png", image)
    whole = predict_module.predict

    def predict(network, image, *rest, **options):
        if len(image) == 21:
            torch.empty(1 << 48)
        return whole(network, image, *rest, **options)

    monkeypatch.setattr(predict_module, "predict", predict)
    done = predict_folder(network, tmp_path / "in", tmp_path / "out", ["index"], console=QUIET)
    assert done.images == 2 and sorted(path.name for path in (tmp_path / "out/index").iterdir()) == [
        "a.png",
        "z.png",
    ]
    says("\n".join(done.failed), "huge.png", "1,125,899.9 GB")
