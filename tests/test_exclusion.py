"""Images marked as bad: later rounds leave them out, and everything else stays the same to the byte."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import darseg
import forks
from conftest import SIZE, recipe_dict
from darseg.config.text import load_recipe
from darseg.errors import RunError, StorageError
from darseg.run import label_samples, marks
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from darseg.run.steps import label as label_step
from test_run import outcome
from wording import refused, says

torch.set_num_threads(1)

QUIET = Console(quiet=True)
IDS = [f"u/{index:02d}" for index in range(7, 13)]  # of conftest's tiny data
BAD = ["u/08", "u/11"]
GOOD = [name for name in IDS if name not in BAD]


def small(data: Path) -> dict[str, Any]:
    """Three short rounds of an even smaller network."""
    values = recipe_dict(data)
    values["network"] |= {"backbone": "resnet18_half", "head_channels": 8}
    values["training"] |= {"workers": 1}
    values["rounds"] = [
        {"steps": 3},
        {"steps": 3, "labeling_ratio": 0.4},
        {"steps": 3, "labeling_ratio": 0.6},
    ]
    return values


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def recipe(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), small(tiny_data))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without marks."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(load_recipe(recipe), run, console=QUIET)
    return run


@pytest.fixture(scope="module")
def excluding(finished: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose round 2 left BAD out."""
    run = tmp_path_factory.mktemp("excluding") / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "round_2")
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run, console=QUIET)
    return run


@pytest.fixture
def after(finished: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the run as it is when round `index` is done."""

    def copy(index: int) -> Path:
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        for later in range(index + 1, 3):
            shutil.rmtree(run / f"round_{later}")
        return run

    return copy


def labeled(run: Path, index: int) -> list[str]:
    folder = run / f"round_{index}" / "labels"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def events(run: Path, name: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "journal.jsonl").open()]
    return [entry for entry in entries if entry["event"] == name]


# What a round does with marks.


def test_a_round_with_marks_equals_one_whose_list_lacks_those_images(
    after: Callable[[int], Path], finished: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Labels, thresholds, histogram, weights and scores of both later rounds are equal to the byte."""
    run = after(0)
    assert darseg.mark_bad(run, BAD) == BAD
    train(load_recipe(recipe), run, console=QUIET)
    values = small(tiny_data)
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\n".join(GOOD) + "\n")
    values["data"]["unlabeled"] = str(shorter)
    wanted = tmp_path / "wanted"
    train(load_recipe(write_recipe(tmp_path / "other", values)), wanted, console=QUIET)
    assert outcome(run) == outcome(wanted)
    assert labeled(run, 1) == labeled(run, 2) == GOOD
    assert outcome(run) != outcome(finished)  # otherwise the marks would have had no effect
    for index in (1, 2):
        assert json.loads((run / f"round_{index}" / "excluded.json").read_text()) == BAD
        assert "excluded" in json.loads((run / f"round_{index}" / "label.json").read_text())["inputs"]
    excluded = [(entry["round"], entry["images"], entry["of"]) for entry in events(run, "excluded")]
    assert excluded == [(1, 2, 6), (2, 2, 6)]


def test_marks_made_after_a_round_leave_it_as_it_was(
    after: Callable[[int], Path], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = after(1)
    before = {index: files(run / f"round_{index}") for index in (0, 1)}
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run)
    says(next(line for line in capsys.readouterr().out.splitlines() if "bad" in line), "round 2", "2 of 6")
    assert {index: files(run / f"round_{index}") for index in (0, 1)} == before
    assert labeled(run, 1) == IDS and labeled(run, 2) == GOOD
    assert not (run / "round_1" / "excluded.json").exists()
    # Marks that change after the last round change nothing, but late ones are reported.
    whole = {index: files(run / f"round_{index}") for index in range(3)}
    for ids, bad in ((BAD, False), (["u/12"], True)):
        darseg.mark_bad(run, ids, bad)
        train(load_recipe(recipe), run)
        lines = [line for line in capsys.readouterr().out.splitlines() if "bad" in line]
        assert len(lines) == bad
        assert {index: files(run / f"round_{index}") for index in range(3)} == whole


def test_without_marks_files_and_records_are_as_before(after: Callable[[int], Path], recipe: Path) -> None:
    """So run folders from before there were marks continue."""
    run = after(2)
    assert not list(run.rglob("excluded.json")) and not (run / "bad_images.json").exists()
    for index in (1, 2):
        inputs = json.loads((run / f"round_{index}" / "label.json").read_text())["inputs"]
        assert sorted(inputs) == ["labeled", "network", "settings", "unlabeled"]
    # Removing all marks is the same as never setting them.
    shutil.rmtree(run / "round_2")
    darseg.mark_bad(run, BAD)
    darseg.mark_bad(run, BAD, bad=False)
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == IDS and not (run / "round_2" / "excluded.json").exists()


def test_a_repeated_round_takes_the_current_marks(after: Callable[[int], Path], recipe: Path) -> None:
    """As docs/view.md advises when all rounds are finished."""
    run = after(2)
    darseg.mark_bad(run, ["u/07"])
    shutil.rmtree(run / "round_2")
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == IDS[1:]


# Stopped halfway.


class Pulled(Exception):
    """Someone pulled the plug."""


@pytest.mark.parametrize("stage", ["counting", "assigning", "recording"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_round_keeps_the_marks_it_began_with(
    after: Callable[[int], Path],
    recipe: Path,
    finished: Path,
    excluding: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    marked: bool,
) -> None:
    run = after(1)
    if marked:
        darseg.mark_bad(run, BAD)
    place = {
        "counting": (label_samples, "count_predictions"),
        "assigning": (label_samples, "assign_labels"),
        "recording": (RunDirectory, "finish"),
    }[stage]
    real = getattr(*place)

    def pull(*arguments: Any, **keywords: Any) -> Any:
        if stage == "recording" and arguments[2] != "label":
            return real(*arguments, **keywords)
        raise Pulled

    with monkeypatch.context() as patch:
        patch.setattr(*place, pull)
        with pytest.raises(Pulled):
            train(load_recipe(recipe), run, console=QUIET)
    # Meanwhile the user marks one more image. If nothing was counted or marked yet, it would still be left out.
    if marked or stage != "counting":
        darseg.mark_bad(run, ["u/12"])
    train(load_recipe(recipe), run, console=QUIET)
    assert outcome(run) == outcome(excluding if marked else finished)
    assert labeled(run, 2) == (GOOD if marked else IDS)


def test_marks_made_before_anything_is_counted_are_used(
    after: Callable[[int], Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = after(1)

    def pull(*arguments: Any, **keywords: Any) -> Any:
        raise Pulled

    with monkeypatch.context() as patch:
        patch.setattr(label_step, "label_samples", pull)
        with pytest.raises(Pulled):
            train(load_recipe(recipe), run, console=QUIET)
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == GOOD


def test_changes_of_what_a_round_left_out_are_refused(excluding: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(excluding, run)
    path = run / "round_2" / "excluded.json"
    changes = {  # content of the file → facts of the message
        '["u/08"]': ["'label'", "excluded"],
        '["u/8"]': [str(path), "'u/8'", "6"],
        "[3]": [str(path), "entry 0: 3", str(run / "round_2")],
        "[": [str(path), str(run / "round_2")],
    }
    for text, facts in changes.items():
        path.write_text(text)
        with refused(RunError, *facts):
            train(load_recipe(recipe), run, console=QUIET)
    path.unlink()
    with pytest.raises(RunError, match="excluded"):
        train(load_recipe(recipe), run, console=QUIET)


# Other runs, other processes.


def test_reuse_copies_a_step_only_if_the_marks_are_equal(
    after: Callable[[int], Path], finished: Path, excluding: Path, recipe: Path
) -> None:
    run = after(1)
    labelings = len(events(run, "labeled"))
    train(load_recipe(recipe), run, reuse=excluding, console=QUIET)
    assert outcome(run) == outcome(finished)  # labeled again, not copied
    assert len(events(run, "labeled")) == labelings + 1
    shutil.rmtree(run / "round_2")
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run, reuse=excluding, console=QUIET)
    assert outcome(run) == outcome(excluding)
    assert len(events(run, "labeled")) == labelings + 1


@pytest.mark.slow
def test_all_processes_follow_the_first(tiny_data: Path, tmp_path: Path) -> None:
    values = small(tiny_data)
    values["training"] |= {"batch": 8}  # two images for each process
    values["rounds"] = [{"steps": 1}, {"steps": 1, "labeling_ratio": 0.4}]
    path, run = write_recipe(tmp_path, values), tmp_path / "run"
    train(load_recipe(path), run, console=QUIET)
    shutil.rmtree(run / "round_1")
    darseg.mark_bad(run, BAD)
    ended = forks.torchrun("-m", "darseg", "train", str(path), "--out", str(run), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert labeled(run, 1) == GOOD
    counted = RunDirectory(run).label_set(1).histogram.predicted.sum()
    assert counted == len(GOOD) * SIZE[0] * SIZE[1]


# The file of marks, and its faults.


def test_marks_are_sorted_and_keep_their_times(
    after: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = after(0)
    monkeypatch.setattr(time, "time", lambda: 100.25)
    assert darseg.mark_bad(run, ["u/11"]) == ["u/11"]
    monkeypatch.setattr(time, "time", lambda: 200.5)
    assert darseg.mark_bad(run, ["u/08", "u/11"]) == ["u/08", "u/11"]
    path = run / "bad_images.json"
    assert json.loads(path.read_text()) == [{"id": "u/08", "time": 200.5}, {"id": "u/11", "time": 100.25}]
    before = path.stat().st_mtime_ns
    assert darseg.mark_bad(run, ["u/08"]) == darseg.mark_bad(run, ["u/09"], bad=False) == ["u/08", "u/11"]
    assert path.stat().st_mtime_ns == before
    assert darseg.mark_bad(run, ["u/08"], bad=False) == ["u/11"]


DAMAGED_MARKS = {  # case → content of the file, facts of the message
    "cut off": ("[", ["bad_images.json"]),
    "no list": ('{"u/08": 1}', ["bad_images.json", "list", "object"]),
    "no marks": (
        '["u/08", {"id": 3, "time": 0}]',
        ["bad_images.json", "entry 0: 'u/08'", "entry 1: {'id': 3, 'time': 0}"],
    ),
    "unknown ids": (
        '[{"id": "x", "time": 0}, {"id": "u/08", "time": 0}, {"id": "../y", "time": 0}]',
        ["bad_images.json", "6", "'x'", "'../y'"],
    ),
    "all images": (
        json.dumps([{"id": name, "time": 0} for name in IDS]),
        ["bad_images.json", "all 6", "round 2", "darseg view"],
    ),
}


@pytest.mark.parametrize("case", DAMAGED_MARKS)
def test_a_damaged_file_of_marks_is_refused(after: Callable[[int], Path], recipe: Path, case: str) -> None:
    run = after(1)
    text, facts = DAMAGED_MARKS[case]
    (run / "bad_images.json").write_text(text)
    with refused(RunError, *facts):
        train(load_recipe(recipe), run, console=QUIET)
    assert not (run / "round_2").exists()
    assert (run / "bad_images.json").read_text() == text


def test_an_unknown_id_means_that_nothing_is_marked(
    after: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = after(0)
    with refused(RunError, "6", "'l/03'", "'nonsense'"):
        darseg.mark_bad(run, ["u/08", "l/03", "nonsense"])
    assert not (run / "bad_images.json").exists()
    with refused(RunError, str(tmp_path)):
        darseg.mark_bad(tmp_path, ["u/08"])
    darseg.mark_bad(run, ["u/08"])
    before = (run / "bad_images.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with refused(StorageError, str(run / "bad_images.json")):
        darseg.mark_bad(run, ["u/09"])
    assert (run / "bad_images.json").read_bytes() == before


MARKING = """
import os, sys
from darseg.run.build import manifest_of, recipe_of
from darseg.run.directory import RunDirectory
from darseg.run.marks import change_marks

run, part = sys.argv[1], int(os.environ["RANK"])
known = [sample.id for sample in manifest_of(recipe_of(run)).unlabeled]
for turn in range(41):
    for name in known[part::2]:
        change_marks(RunDirectory(run), known, [name], bad=turn % 2 == 0)
"""


def test_a_lock_of_the_marks_that_stays_held_is_named(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(finished)
    monkeypatch.setattr(marks, "PATIENCE", 0.05)
    with (
        marks._marking(run),
        refused(RunError, str(run.bad_images.with_suffix(".lock")), "0.05 seconds"),
        marks._marking(run),
    ):
        pass


def test_marks_made_at_once_are_all_kept(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ended = forks.torchrun("-c", MARKING, run)
    assert ended.returncode == 0, ended.stderr
    assert [entry["id"] for entry in json.loads((run / "bad_images.json").read_text())] == IDS


@pytest.mark.parametrize("ids", ["u/08", b"u/08", Path("u/08"), 8, [8]])
def test_ids_that_are_no_list_of_strings_are_refused(finished: Path, ids: Any) -> None:
    with refused(RunError, "list of ids", repr(ids) if not isinstance(ids, list) else "8"):
        darseg.mark_bad(finished, ids)
    assert not (finished / "bad_images.json").exists()
