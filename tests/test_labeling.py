"""`darseg redistribute` on folders: every file it writes, and every error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from darseg.data.labels import read_label
from darseg.data.maps import label_path
from darseg.errors import DataError, RecipeError, RunError, StorageError
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labelset import prediction_path
from darseg.pseudo.redistribute import redistribute
from darseg.run import redistribute as module
from darseg.run.redistribute import redistribute_folder
from wording import refused, says

torch.set_num_threads(1)

COUNTS = [600, 300, 90, 10]
RATIO = 0.5
RECORDS = ("redistribution.json", "histogram.npz")
redistribute_quietly = partial(redistribute_folder, console=Console(quiet=True))


def draw(count: int) -> dict[str, np.ndarray]:
    """Logits of images in subfolders, differing in size and type, with ties; the last class is never predicted."""
    rng = np.random.default_rng(count)
    arrays = {}
    for index in range(count):
        logits = np.round(rng.normal(0, 2, (4, 5 + index % 3, 7 + index % 4)))
        logits[3] = -40
        arrays[f"city_{index % 2}/{index:02d}.left"] = logits.astype(np.float16 if index % 3 else np.float32)
    return dict(sorted(arrays.items()))


def save(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    for index, (name, array) in enumerate(arrays.items()):
        path = folder / f"{name}{'.npz' if index % 2 else '.npy'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % 2:
            np.savez_compressed(path, scores=array)
        else:
            np.save(path, array)
    return folder


def outcome(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


ARRAYS = draw(12)
NAMES = list(ARRAYS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source"), ARRAYS)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that an uninterrupted call writes."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    redistribute_quietly(source, out, COUNTS, RATIO)
    return outcome(out)


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """The same files, to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "copied"))


@pytest.fixture
def counts_file(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(COUNTS))
    return path


def file_of(folder: Path, name: str) -> Path:
    return next(path for suffix in (".npy", ".npz") if (path := folder / f"{name}{suffix}").exists())


@pytest.mark.parametrize(
    "how",
    [
        {"labeling_ratio": RATIO, "seed": 3},
        {"labeling_ratio": 0.9, "confidence": "fine", "sampling": "none"},
        {"labeling_ratio": 0.3, "method": "cbst"},
        {"labeling_ratio": None, "method": "global", "threshold": 0.8},
    ],
    ids=["dars", "fine", "cbst", "global"],
)
def test_a_folder_is_labeled_as_arrays_are(source: Path, tmp_path: Path, how: dict) -> None:
    described = redistribute_quietly(source, tmp_path / "out", COUNTS, **how)
    result = redistribute(ARRAYS, COUNTS, **how)
    written = outcome(tmp_path / "out")
    assert set(written) == {*RECORDS, *(f"{name}.png" for name in NAMES)}
    for name in NAMES:
        assert written[f"{name}.png"] == cv2.imencode(".png", result.labels[name])[1].tobytes()
        assert np.array_equal(read_label(tmp_path / "out" / f"{name}.png"), result.labels[name])
    assert ConfidenceHistogram.from_bytes(written["histogram.npz"]) == result.histogram
    assert described == json.loads(written["redistribution.json"])
    wanted = result.thresholds.to_json() | {"kept": result.kept.tolist()}
    assert {key: described[key] for key in wanted} == wanted
    assert all(len(described[key]) == 4 for key in wanted if key != "confidence")
    assert described["threshold"][3] is None and None not in described["threshold"][:3]
    assert described["images"] == 12 and described["classes"] is None
    asked = {"method": "dars", "threshold": None, "confidence": "float16", "sampling": "random", "seed": 0}
    assert described["settings"] == asked | how | {"class_counts": COUNTS}


def test_probabilities_from_a_folder(tmp_path: Path) -> None:
    arrays = {name: torch.softmax(torch.from_numpy(a).float(), 0).numpy() for name, a in ARRAYS.items()}
    redistribute_quietly(save(tmp_path / "in", arrays), tmp_path / "out", COUNTS, RATIO, probabilities=True)
    labels = redistribute(arrays, COUNTS, RATIO, probabilities=True).labels
    for name in NAMES:
        assert np.array_equal(read_label(tmp_path / "out" / f"{name}.png"), labels[name])


def test_the_command_writes_the_same_and_prints_a_table(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], call
) -> None:
    names = ["road", "sky", "car", "bus"]
    counts = tmp_path / "counts.json"
    counts.write_text("\ufeff" + json.dumps(dict(zip(names, COUNTS, strict=True))), encoding="utf-8")
    command = ["redistribute", source, tmp_path / "out", "--class-counts", counts, "--labeling-ratio", RATIO]
    code, printed, err = call(*command)
    assert code == 0, err
    written = outcome(tmp_path / "out")
    described, unnamed = (json.loads(files.pop("redistribution.json")) for files in (written, dict(wanted)))
    assert written == {name: data for name, data in wanted.items() if name != "redistribution.json"}
    assert described == unnamed | {"classes": names}
    lines = [line.split() for line in printed.splitlines() if ":" not in line]
    columns = ["threshold", "keep", "wanted", "predicted", "accepted", "kept"]
    assert lines[0] == ["class", *columns] and [line[0] for line in lines[1:5]] == names
    for k, line in enumerate(lines[1:5]):
        assert line[3:] == [str(described[column][k]) for column in columns[2:]]
    assert lines[4][1] == "-"
    pixels = sum(described["predicted"])
    says(
        printed,
        "12 images",
        f"{sum(described['kept']) / pixels:.2%}",
        str(tmp_path / "out"),
        vary=[r"[\d.]+/s, [\d.]+ \w+ left"],
    )


def test_predicting_twice_keeps_nothing_and_gives_the_same(
    call,
    source: Path,
    counts_file: Path,
    tmp_path: Path,
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(str(b)), replace(a, b)))
    out = tmp_path / "out"
    arguments = ["redistribute", source, out, "--class-counts", counts_file, "--labeling-ratio", RATIO]
    assert call(*arguments, "--predict-twice")[0] == 0
    assert outcome(out) == wanted
    assert len(written) == 12 + 3 and not [path for path in written if ".predictions" in path]
    again = tmp_path / "again"
    assert call("redistribute", source, again, *arguments[3:])[0] == 0
    assert len([path for path in written if ".predictions" in path]) == 12 and outcome(again) == wanted


def test_a_finished_folder_is_not_labeled_again(
    call, source: Path, counts_file: Path, tmp_path: Path, wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["redistribute", source, out, "--class-counts", counts_file, "--labeling-ratio", RATIO]
    code, first, _ = call(*arguments)
    (out / ".predictions" / "city_0").mkdir(parents=True)  # left by a kill at the very end
    (out / ".predictions" / "city_0" / "x.prediction").write_bytes(b"left over")
    monkeypatch.setattr(module, "read_scores", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(os, "replace", lambda a, b: pytest.fail(f"{b} was written"))
    again, second, _ = call(*arguments)
    assert (code, again) == (0, 0) and first.splitlines()[-6:] == second.splitlines()[-6:]
    assert outcome(out) == wanted and not (out / ".predictions").exists()


def test_other_settings_or_files_in_the_same_folder_are_refused(
    copied: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    redistribute_quietly(copied, out, COUNTS, RATIO)
    for counts, how in (
        (COUNTS, {"labeling_ratio": 0.4}),
        (COUNTS, {"labeling_ratio": RATIO, "seed": 1}),
        (COUNTS, {"labeling_ratio": RATIO, "confidence": "fine"}),
        (COUNTS, {"labeling_ratio": RATIO, "sampling": "none"}),
        (COUNTS, {"labeling_ratio": RATIO, "method": "cbst"}),
        ([600, 300, 91, 10], {"labeling_ratio": RATIO}),
    ):
        with pytest.raises(RunError, match=r"settings \(see redistribution.json\)"):
            redistribute_quietly(copied, out, counts, **how)
    with refused(RunError, str(out), "settings", "redistribution.json"):
        redistribute_quietly(copied, out, COUNTS, 0.4)
    with refused(RunError, str(out), "inputs", "redistribution.json"):
        redistribute_quietly(copied, out, COUNTS, RATIO, probabilities=True)
    np.save(copied / "new.npy", ARRAYS[NAMES[0]])
    with pytest.raises(RunError, match=r"inputs \(see redistribution.json\)"):
        redistribute_quietly(copied, out, COUNTS, RATIO)
    (copied / "new.npy").unlink()
    redistribute_quietly(copied, out, COUNTS, RATIO)
    assert outcome(out) == wanted


def test_a_folder_of_other_things_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "full", tmp_path / "file"):
        with refused(RunError, str(out)):
            redistribute_quietly(source, out, COUNTS, RATIO)
    with refused(StorageError, str(tmp_path / "file" / "out")):
        redistribute_quietly(source, tmp_path / "file" / "out", COUNTS, RATIO)
    assert outcome(tmp_path) == {"full/thesis.txt": b"dear", "file": b""}


def damage(folder: Path) -> dict[str, str]:
    """Damage all but the first two and the last two files. Returns name → what the message must say about it."""
    good = ARRAYS[NAMES[0]]
    truncated = file_of(folder, NAMES[2])
    truncated.write_bytes(truncated.read_bytes()[:-20])
    archive = file_of(folder, NAMES[3])
    archive.write_bytes(archive.read_bytes()[:60])
    np.save(file_of(folder, NAMES[4]), np.full(ARRAYS[NAMES[4]].shape, np.nan, np.float32))
    np.savez(file_of(folder, NAMES[5]), a=good, b=good)
    np.save(file_of(folder, NAMES[6]), np.array([{"a": 1}, None]), allow_pickle=True)
    np.savez(file_of(folder, NAMES[7]), scores=good[:3])
    np.save(file_of(folder, NAMES[8]), good.astype(np.int64))
    file_of(folder, NAMES[9]).write_bytes(b"")
    return {
        NAMES[2]: "numpy.save",
        NAMES[3]: "numpy.save",
        NAMES[4]: f"{ARRAYS[NAMES[4]].size} of {ARRAYS[NAMES[4]].size} scores",
        NAMES[5]: "2 arrays (a, b)",
        NAMES[6]: "Object arrays cannot be loaded",
        NAMES[7]: "3 classes",
        NAMES[8]: "int64 [4, 5, 7]",
        NAMES[9]: "EOFError",
    }


def test_all_damaged_files_are_named_and_the_others_kept(
    call, copied: Path, source: Path, counts_file: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    out, facts = tmp_path / "out", damage(copied)
    arguments = ["redistribute", copied, out, "--class-counts", counts_file, "--labeling-ratio", RATIO]
    for _ in range(2):
        code, _, err = call(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("  - ")]
        assert code == 2 and "Traceback" not in err
        assert len(lines) == 8 and all(
            line.startswith(f"  - {file_of(copied, name)}: ") and fact in line
            for line, (name, fact) in zip(lines, facts.items(), strict=True)
        )
        kept = {f".predictions/{name}.prediction" for name in NAMES if name not in facts}
        assert set(outcome(out)) == kept | {".begun.json"}
    says(err, "8 file(s)", vary=[r"\(\w+: .*\)(?=\. Write)"])
    shutil.copytree(source, copied, dirs_exist_ok=True)
    earlier = {p: p.stat().st_mtime_ns for p in out.rglob("*.prediction")}
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_scores", lambda p, f=module.read_scores: (read.append(p.name), f(p))[1])
        assert call(*arguments)[0] == 0
    assert sorted(read) == sorted(file_of(copied, name).name for name in facts) and len(earlier) == 4
    assert outcome(out) == wanted


def test_files_changed_while_counting_are_predicted_again(copied: Path, tmp_path: Path) -> None:
    """After a good file is replaced, a damaged one removed and another added, the labels are those of a first call."""
    np.save(damaged := file_of(copied, NAMES[4]), np.full((4, 5, 7), np.nan, np.float32))
    with refused(DataError, "1 file(s)", str(damaged), "140 of 140"):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, RATIO)
    damaged.unlink()
    np.save(file_of(copied, NAMES[2]), np.zeros((4, 9, 9), np.float32))
    np.save(copied / "new.npy", np.ones((4, 2, 2), np.float32))
    redistribute_quietly(copied, tmp_path / "out", COUNTS, RATIO)
    redistribute_quietly(copied, tmp_path / "other", COUNTS, RATIO)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "other")
    with pytest.raises(RunError, match=r"settings \(see redistribution.json\)"):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, 0.4)


def test_settings_and_files_may_not_both_change_midway(copied: Path, tmp_path: Path) -> None:
    np.save(file_of(copied, NAMES[4]), np.full((4, 5, 7), np.nan, np.float32))
    with pytest.raises(DataError):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, RATIO)
    np.save(file_of(copied, NAMES[4]), np.zeros((4, 5, 8), np.float32))
    with refused(RunError, str(tmp_path / "out"), "settings and inputs", ".begun.json"):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, 0.4)
    with refused(RunError, str(tmp_path / "out"), "other inputs", ".begun.json"):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, RATIO, probabilities=True)


COUNTS_TEXTS = {  # content of the file → facts that its message must contain
    "": ["given.json", "JSON"],
    "{": ["given.json", "JSON"],
    "[1, 2.5, 1, 1]": ["given.json", "whole numbers"],
    '[1, "2", 1, 1]': ["given.json", "whole numbers"],
    "[true, 2, 1, 1]": ["given.json", "whole numbers"],
    "[NaN, 2, 1, 1]": ["given.json", "whole numbers"],
    "[[1], 2, 1, 1]": ["given.json", "whole numbers"],
    "[]": ["given.json", "whole numbers"],
    "7": ["given.json", "whole numbers"],
    "null": ["given.json", "whole numbers"],
    '"12"': ["given.json", "whole numbers"],
    "[3, -1, 2, -4]": ["given.json", "class 1: -1, class 3: -4"],
    '{"road": 5, "sky": -2}': ["given.json", "sky: -2"],
    "[0, 0, 0, 0]": ["4"],
    "[5]": ["is 1;", "2 to 255"],
}


@pytest.mark.parametrize("text", COUNTS_TEXTS)
def test_class_counts_that_cannot_be_used(call, source: Path, tmp_path: Path, text: str) -> None:
    counts = tmp_path / "given.json"
    if text:
        counts.write_text(text)
    arguments = ("redistribute", source, tmp_path / "out", "--class-counts", counts, "--labeling-ratio", 0.5)
    code, _, err = call(*arguments)
    assert code == 2 and "Traceback" not in err
    says(err, *COUNTS_TEXTS[text])
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_work_are_named_before_anything_is_begun(source: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "labeling_ratio", "threshold", "global"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, 0.5, method="global")
    with refused(RecipeError, "confidence", "'exact'", "float16, fine"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, 0.5, confidence="exact")
    with refused(DataError, "class counts", "whole numbers"):
        redistribute_quietly(source, tmp_path / "out", [0.5, 0.5], 0.5)
    assert not (tmp_path / "out").exists()


def test_ids_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    good = ARRAYS[NAMES[0]]
    folder = save(tmp_path / "in", {"a/x": good})
    np.save(folder / "a" / "X.npy", good)
    np.savez(folder / "a" / "x.npz", good)
    with refused(DataError, "a/x.npy", "a/X.npy", "a/x.npz"):
        redistribute_quietly(folder, tmp_path / "out", COUNTS, RATIO)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    np.save(tmp_path / "empty" / ".hidden" / "x.npy", good)
    with refused(DataError, str(tmp_path / "empty"), ".npy", ".npz"):
        redistribute_quietly(tmp_path / "empty", tmp_path / "out", COUNTS, RATIO)
    with refused(DataError, str(tmp_path / "nowhere"), "ID.npy"):
        redistribute_quietly(tmp_path / "nowhere", tmp_path / "out", COUNTS, RATIO)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path_of", [label_path, prediction_path])
@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "", "."])
def test_ids_that_leave_the_folder_are_refused(
    path_of: Callable[[Path, str], Path], name: str, tmp_path: Path
) -> None:
    with refused(DataError, repr(name), str(tmp_path)):
        path_of(tmp_path, name)
    assert path_of(tmp_path, "a/..b/x.y").relative_to(tmp_path / "a" / "..b").stem == "x.y"
