"""Nothing that a user made is overwritten, and copies, moves and typing errors end no work."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from rich.console import Console

import darseg
from conftest import write_png
from darseg.config.text import load_recipe
from darseg.data.files import storage_error
from darseg.data.manifest import Manifest, Sample, find_files
from darseg.data.maps import path_of_id
from darseg.data.video import VideoWriter
from darseg.data.walk import walk
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DataError, RecipeError, RunError, StorageError
from darseg.model.weights import load_network, save_network
from darseg.run.build import build_initial_network, manifest_of, spec_of
from darseg.run.contents import digest_contents, keep_contents
from darseg.run.data_digest import digest_manifest, written_since
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import load_trained
from darseg.run.outputs import check_scores_file, held_folder
from darseg.run.reuse import other_content
from darseg.training import checkpoint
from darseg.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from darseg.training.processes import Processes
from wording import refused, says

QUIET = Console(quiet=True)


def test_copies_of_a_round_are_not_rounds(project: Path) -> None:
    run = RunDirectory(project / "runs" / "tiny")
    for name in ("round_0.bak", "round_old", "round_00", "round_1_of_2", "round_٣"):
        shutil.copytree(run.round(0), run.root / name)
    assert run.rounds_with("train") == [0]
    assert run.last_network() == run.network(0)


def test_a_network_that_was_changed_is_noticed(project: Path, capfd: pytest.CaptureFixture) -> None:
    run = RunDirectory(project / "runs" / "tiny")
    load_trained(run.root)
    assert not capfd.readouterr().err
    recipe = load_recipe(project / "tiny.yaml", ["seed=1"])
    save_network(build_initial_network(recipe)[0], run.network(0), spec_of(recipe))
    load_trained(run.root)
    says(capfd.readouterr().err, str(run.network(0)), "train.json")


@pytest.mark.parametrize("content", [b"mine", b"[]", b'{"mean_iou": 1}', b"\xff"])
def test_evaluate_replaces_only_its_own_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with refused(RunError, str(path), "darseg evaluate", "--out"):
        check_scores_file(path)
    assert path.read_bytes() == content
    path.write_text(json.dumps({"mean_iou": 1, "iou": {}, "protocol": "", "role": "test"}))
    check_scores_file(path)
    check_scores_file(tmp_path / "new" / "scores.json")
    assert not (tmp_path / "new").exists()


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(StorageError, str(tmp_path / "file" / "scores.json"), "is a file"):
        check_scores_file(tmp_path / "file" / "scores.json")
    with refused(RunError, str(tmp_path), "folder"):
        check_scores_file(tmp_path)


WRITERS = {
    "export": ("{run}", "{out}.onnx"),
    "convert": ("{run}/round_0/network.safetensors", "{out}.safetensors", "--architecture", "pspnet50"),
    "align": ("{run}", "{images}", "--out", "{out}.safetensors"),
    "evaluate": ("{run}", "--out", "{out}.json"),
    "report": ("{run}", "--out", "{out}.html"),
    "init": ("{data}", "--out", "{out}.yaml"),
    "split": ("{recipe}", "{out}", "--count", "3"),
    "train": ("{recipe}", "--out", "{out}"),
    "predict": ("{run}", "{images}", "{out}"),
    "label": ("{run}", "{images}", "{out}"),
    "redistribute": ("{scores}", "{out}", "--class-counts", "{counts}", "--labeling-ratio", "0.5"),
    "rasterize": ("{shapes}", "{out}"),
}
"""Commands that write what the user names → their arguments."""


@pytest.mark.parametrize(
    ("verb", "itself"),
    [
        *(pytest.param(verb, False, id=verb) for verb in WRITERS),
        *(pytest.param(verb, True, id=f"{verb}, itself") for verb in ("train", "predict", "label")),
    ],
)
def test_nothing_is_written_over_a_link_that_leads_nowhere(
    verb: str, itself: bool, project: Path, scores: Path, tmp_path: Path, call
) -> None:
    counts, shapes = tmp_path / "counts.json", tmp_path / "shapes" / "a.json"
    counts.write_text("[1, 2, 3]")
    shapes.parent.mkdir()
    shape = {"label": "x", "shape_type": "rectangle", "points": [[0, 0], [3, 3]]}
    other = shape | {"label": "y"}
    shapes.write_text(
        json.dumps({"imagePath": "a.png", "imageWidth": 9, "imageHeight": 9, "shapes": [shape, other]})
    )
    out = tmp_path / "out"
    places = {
        "run": project / "runs" / "tiny",
        "images": project / "data" / "images" / "u",
        "data": project / "data",
        "recipe": project / "tiny.yaml",
        "scores": scores,
        "counts": counts,
        "shapes": shapes.parent,
        "out": out,
    }
    arguments = [argument.format(**places) for argument in WRITERS[verb]]
    (link,) = (Path(argument) for argument in arguments if argument.startswith(str(out)))
    link.symlink_to(target := link if itself else tmp_path / "nowhere")
    code, _, err = call(verb, *arguments)
    assert code == 2 and str(link) in err and "Traceback" not in err
    assert os.readlink(link) == str(target) and not link.exists()
    says(err, str(link), vary=[r"(?s)^.*(?=darseg: )"])


def test_one_command_writes_into_a_folder_at_a_time(tmp_path: Path) -> None:
    with (
        held_folder(tmp_path / "out"),
        refused(RunError, str(tmp_path / "out")),
        held_folder(tmp_path / "out"),
    ):
        pass
    with held_folder(tmp_path / "out"):
        assert not list((tmp_path / "out").iterdir())


def test_a_path_does_for_a_recipe(project: Path) -> None:
    assert darseg.plan(str(project / "tiny.yaml")).images["validation"] == 3
    assert len(darseg.manifest_of(project / "tiny.yaml").labeled) == 4
    with refused(RecipeError, "int", "load_recipe"):
        darseg.plan(3)  # ty: ignore[invalid-argument-type]


def test_a_mistyped_role_is_named(project: Path) -> None:
    with refused(RunError, "'tset'", "validation, test, labeled, unlabeled"):
        darseg.evaluate(project / "runs" / "tiny", role="tset")  # ty: ignore[invalid-argument-type]


def test_faults_of_overrides_are_reported_together(project: Path) -> None:
    overrides = [
        "seed",
        "training.batch=x",
        "network.bakbone=3",
        "rounds.9.steps=1",
        "data.root=[",
        "threads=2",
    ]
    with refused(RecipeError, *(f"override {override}:" for override in overrides[:-1])):
        load_recipe(project / "tiny.yaml", overrides)
    with refused(RecipeError, "training.batch=4", "evaluation.nonsense"):
        darseg.evaluate(project / "runs" / "tiny", overrides=["training.batch=4", "evaluation.nonsense=1"])


@pytest.mark.parametrize("size", ["2", "two", "0", "-1"])
def test_a_world_size_alone_is_explained(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with refused(RunError, "WORLD_SIZE", size, "torchrun"):
        Processes.here()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Processes.here().count == 1


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "permissions"),
        (errno.ENAMETOOLONG, "255 bytes"),
        (errno.ENOENT, "removed"),
        (errno.EROFS, "another folder"),
        (errno.EIO, "disk"),
    ],
)
def test_what_cannot_be_written_gets_fitting_advice(number: int, remedy: str, tmp_path: Path) -> None:
    error = storage_error(OSError(number, os.strerror(number)), tmp_path / "file")
    says(str(error), str(tmp_path / "file"), os.strerror(number), remedy)
    assert ("permissions" in str(error)) == (number == errno.EACCES)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of scores of three classes, for two images."""
    folder = tmp_path / "scores"
    folder.mkdir()
    for seed, name in enumerate(("a", "b")):
        values = np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32)
        np.save(folder / f"{name}.npy", values)
    return folder


def test_mistyped_class_counts_leave_nothing_behind(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        darseg.redistribute_folder(scores, tmp_path / "out", [1, 2, 3, 4], 0.5, console=QUIET)
    assert not (tmp_path / "out").exists()
    assert darseg.redistribute_folder(scores, tmp_path / "out", [1, 2, 3], 0.5, console=QUIET)["images"] == 2


@pytest.mark.parametrize("left", [None, 0, -1])
def test_a_label_map_that_is_not_whole_is_made_again_and_said(
    left: int | None, scores: Path, tmp_path: Path
) -> None:
    out, console = tmp_path / "out", Console(file=io.StringIO())
    record = darseg.redistribute_folder(scores, out, [1, 2, 3], 0.5, console=QUIET)
    before = (out / "a.png").read_bytes()
    if left is None:
        (out / "a.png").unlink()
    else:
        (out / "a.png").write_bytes(before[:left])
    assert darseg.redistribute_folder(scores, out, [1, 2, 3], 0.5, console=console) == record
    assert (out / "a.png").read_bytes() == before
    assert not (out / ".begun.json").exists()
    text = console.file.getvalue()  # ty: ignore[unresolved-attribute]
    says(text.splitlines()[0], "1 of 2", str(out))


def test_a_second_call_into_the_same_folder_is_refused(scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_folder(out), refused(RunError, str(out), "another process"):
        darseg.redistribute_folder(scores, out, [1, 2, 3], 0.5, console=QUIET)
    assert not list(out.iterdir())
    darseg.redistribute_folder(scores, out, [1, 2, 3], 0.5, console=QUIET)
    assert (out / "redistribution.json").exists()


@pytest.fixture
def networks(project: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two networks of one recipe, with other weights."""
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for seed, path in enumerate(paths):
        recipe = load_recipe(project / "tiny.yaml", [f"seed={seed}"])
        save_network(build_initial_network(recipe)[0], path, spec_of(recipe))
    return paths


def test_predictions_are_kept_only_among_those_of_the_same_network(
    networks: tuple[Path, Path], tmp_path: Path
) -> None:
    images, out, options = tmp_path / "in", tmp_path / "out", {"kinds": ["index"], "console": QUIET}
    for name in ("a", "b"):
        write_png(images / f"{name}.png", np.zeros((20, 30, 3), np.uint8))
    first, second = networks
    darseg.predict_folder(first, images, out, **options)
    (out / "index" / "b.png").unlink()
    with refused(RunError, str(out), "network", "--existing replace"):
        darseg.predict_folder(second, images, out, existing="keep", **options)
    assert not (out / "index" / "b.png").exists()
    done = darseg.predict_folder(first, images, out, existing="keep", **options)
    assert (done.images, done.kept) == (1, 1)
    darseg.predict_folder(second, images, out, existing="replace", **options)  # all of it
    assert darseg.predict_folder(second, images, out, existing="keep", **options).kept == 2
    write_png(images / "c.png", np.zeros((20, 30, 3), np.uint8))
    darseg.predict_folder(first, images / "c.png", out, **options)  # two networks in one folder, as asked
    with refused(RunError, str(out), "network", "--existing replace"):
        darseg.predict_folder(first, images, out, existing="keep", **options)


def test_an_earlier_versions_predictions_are_kept_with_a_warning(
    networks: tuple[Path, Path], tmp_path: Path
) -> None:
    images, out, console = tmp_path / "in", tmp_path / "out", Console(file=io.StringIO())
    write_png(images / "a.png", np.zeros((20, 30, 3), np.uint8))
    darseg.predict_folder(networks[0], images, out, kinds=["index"], console=QUIET)
    (out / ".predicted.json").unlink()
    with held_folder(out), refused(RunError, str(out)):
        darseg.predict_folder(networks[0], images, out, ["index"], existing="keep", console=QUIET)
    darseg.predict_folder(networks[0], images, out, ["index"], existing="keep", console=console)
    says(console.file.getvalue().splitlines()[0], ".predicted.json", "1 kept")  # ty: ignore[unresolved-attribute]


def test_files_of_a_user_where_frames_go_stay(networks: tuple[Path, Path], tmp_path: Path) -> None:
    frames, out = np.zeros((3, 32, 48, 3), np.uint8), tmp_path / "out"
    writer = VideoWriter(tmp_path / "film.mp4", 5)
    for frame in frames:
        writer.add(frame)
    writer.close()
    mine = out / "index" / "film" / "000007.png"
    write_png(mine, np.zeros((3, 3), np.uint8))
    with refused(RunError, str(mine), "--existing"):
        darseg.predict_folder(networks[0], tmp_path / "film.mp4", out, ["index"], console=QUIET)
    kept = darseg.predict_folder(
        networks[0], tmp_path / "film.mp4", out, ["index"], existing="keep", console=QUIET
    )
    assert kept.frames == 3 and mine.exists()
    (mine.parent / "000002.png").unlink()  # not the last one
    again = darseg.predict_folder(
        networks[0], tmp_path / "film.mp4", out, ["index"], existing="keep", console=QUIET
    )
    assert again.frames == 3 and (mine.parent / "000002.png").exists()


def test_a_checkpoint_that_may_not_be_read_is_neither_called_damaged_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint_00000001.safetensors"
    save_checkpoint(Checkpoint(1, {"network": {"a": torch.zeros(2)}}), path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()

    def forbidden(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Permission denied (os error 13)")

    monkeypatch.setattr(checkpoint, "safe_open", forbidden)
    with refused(StorageError, str(path), "Permission denied", "permissions") as caught:
        load_checkpoint(path)
    assert "elete" not in str(caught.value) and "damaged" not in str(caught.value)
    assert path.exists()


def test_files_that_may_not_be_read_are_not_called_damaged(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(project / "runs" / "tiny")
    opened = os.open

    def forbidden(path: Any, *rest: Any, **options: Any) -> int:
        if Path(path).suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", forbidden)
    for read in (load_network, digest_path):
        with refused(StorageError, "network.safetensors", "permissions"):
            read(run.network(0))


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_steps_of_other_pictures_of_the_same_size_are_not_copied(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(project / "data", other / "data")
    shutil.copy(project / "tiny.yaml", other)
    manifest = manifest_of(load_recipe(other / "tiny.yaml"))
    data, run = digest_manifest(manifest), RunDirectory(project / "runs" / "tiny")

    def reasons() -> dict[str, str]:
        return other_content(run, manifest, data=data, contents=digest_contents(manifest, {}))

    keep_contents(run, manifest)
    assert reasons() == {}
    path = manifest.labeled[1].image
    path.write_bytes(bytes(reversed(path.read_bytes())))
    assert digest_manifest(manifest) == data
    for _ in range(2):
        assert list(reasons()) == ["labeled"]
        says(reasons()["labeled"], "1 file", "labeled", str(path))
        run.contents.unlink(missing_ok=True)  # then the files themselves are compared
    (run.root / "data.json").write_text("{")
    assert set(reasons()) == {"labeled", "unlabeled", "validation", "test"}


def test_the_longest_names_are_labeled_too(tmp_path: Path) -> None:
    for name in ("a" * 251, "folder/" + "ä" * 125):
        assert path_of_id(tmp_path, name, ".png").name == f"{Path(name).name}.png"
        waiting = path_of_id(tmp_path, name, ".prediction")
        assert len(os.fsencode(waiting.name)) <= 255
        assert waiting != path_of_id(tmp_path, name + "b", ".prediction")
    assert path_of_id(tmp_path, "a/b", ".prediction") == tmp_path / "a" / "b.prediction"


# --- folders that cannot be read, and clocks


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images with a folder in it that cannot be read; root could read it whatever its mode is."""
    folder = tmp_path / "images"
    for name in ("a", "b", "private/c"):
        write_png(folder / f"{name}.png", np.zeros((9, 9, 3), np.uint8))
    scan = os.scandir

    def scandir(path: Any = ".") -> Any:
        if not isinstance(path, int) and Path(path).name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return folder


def test_a_folder_that_cannot_be_read_is_left_out_and_named(closed: Path, tmp_path: Path, call) -> None:
    assert [*find_files(closed, (".png",))] == ["a", "b"]
    with refused(DataError, str(closed / "private"), "Permission denied"):
        find_files(closed / "private", (".png",))
    for number in range(8):
        write_png(closed / f"{number}.png", np.full((9, 9, 3), number, np.uint8))
        write_png(tmp_path / "labels" / f"{number}.png", np.full((9, 9), number % 2, np.uint8))
    code, out, _ = call("init", tmp_path, "--out", tmp_path / "r.yaml")
    assert code == 0 and (tmp_path / "r.yaml").exists()
    (line,) = (line for line in out.splitlines() if line.startswith(f"warning: {tmp_path}:"))
    says(line, str(closed / "private"), "Permission denied", "1 folder(s)")


def test_a_folder_that_is_removed_while_it_is_listed_is_left_out(closed: Path, monkeypatch) -> None:
    for name in ("x", "y"):
        write_png(closed / name / "1.png", np.zeros((9, 9, 3), np.uint8))
    folders = walk(closed)
    assert next(folders)[0] == str(closed)
    shutil.rmtree(closed / "y")
    assert [directory for directory, _ in folders] == [str(closed / "x")]
    status = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and Path(path) == closed / "x":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
        return status(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert [*find_files(closed, (".png",))] == ["a", "b"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO, errno.EMFILE])
def test_what_the_system_refuses_is_one_line(number: int, call, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/data/images/7.png")

    monkeypatch.setattr("darseg.config.text.load_recipe", fail)
    code, _, err = call("plan", "r.yaml")
    assert code == 2 and err.count("\n") == 1
    says(err, "/data/images/7.png", os.strerror(number))


def test_errors_that_name_no_file_keep_their_traceback(call, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("darseg.config.text.load_recipe", fail)
    with pytest.raises(OSError):
        call("plan", "r.yaml")


def test_files_dated_in_the_future_are_not_taken_for_changed_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, np.zeros((9, 9, 3), np.uint8))
    manifest = Manifest(SCENE_CLASSES, (), (Sample("a", path, None),), (), ())
    began = time.time() + 1
    os.utime(path, (began + 3600, began + 3600))
    assert written_since(manifest, began) == []
    assert written_since(manifest, began - 3600) == [path]
