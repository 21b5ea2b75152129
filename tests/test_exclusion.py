"""Images marked as bad: rounds that begin after leave them out, all else stays as it was to the byte."""

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
from conftest import SIZE, recipe_dict
from darseg.config.text import load_recipe
from darseg.errors import RunError, StorageError
from darseg.run import label_samples
from darseg.run import rounds as module
from darseg.run.directory import RunDirectory
from darseg.run.rounds import train
from test_processes import torchrun
from test_run import outcome

torch.set_num_threads(1)

QUIET = Console(quiet=True)
IDS = [f"u/{index:02d}" for index in range(7, 13)]  # of conftest's tiny data
BAD = ["u/08", "u/11"]
GOOD = [name for name in IDS if name not in BAD]


def small(data: Path) -> dict[str, Any]:
    """Three short rounds of a still smaller network."""
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
    return [one for line in (run / "journal.jsonl").open() if (one := json.loads(line))["event"] == name]


# What a round does with marks.


def test_a_round_with_marks_equals_one_whose_list_lacks_those_images(
    after: Callable[[int], Path], finished: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """To the byte: labels, thresholds, histogram, weights, scores of both rounds that come after."""
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
    assert outcome(run) != outcome(finished)  # else nothing above was shown
    for index in (1, 2):
        assert json.loads((run / f"round_{index}" / "excluded.json").read_text()) == BAD
        assert "excluded" in json.loads((run / f"round_{index}" / "label.json").read_text())["inputs"]
    told = [(one["round"], one["images"], one["of"]) for one in events(run, "excluded")]
    assert told == [(1, 2, 6), (2, 2, 6)]


def test_marks_made_after_a_round_leave_it_as_it_was(
    after: Callable[[int], Path], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = after(1)
    before = {index: files(run / f"round_{index}") for index in (0, 1)}
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run)
    assert "round 2: 2 of 6 unlabeled images left out, marked as bad" in capsys.readouterr().out
    assert {index: files(run / f"round_{index}") for index in (0, 1)} == before
    assert labeled(run, 1) == IDS and labeled(run, 2) == GOOD
    assert not (run / "round_1" / "excluded.json").exists()
    # Marks that change once all is done change nothing.
    whole = {index: files(run / f"round_{index}") for index in range(3)}
    for ids, bad in ((BAD, False), (["u/12"], True)):
        darseg.mark_bad(run, ids, bad)
        train(load_recipe(recipe), run)
        said = capsys.readouterr().out
        assert "nothing was done" in said and ("1 image(s) are marked as bad that round 2" in said) == bad
        assert {index: files(run / f"round_{index}") for index in range(3)} == whole


def test_without_marks_no_file_and_no_record_is_another(after: Callable[[int], Path], recipe: Path) -> None:
    """Run folders from before there were marks go on."""
    run = after(2)
    assert not list(run.rglob("excluded.json")) and not (run / "bad_images.json").exists()
    for index in (1, 2):
        inputs = json.loads((run / f"round_{index}" / "label.json").read_text())["inputs"]
        assert sorted(inputs) == ["labeled", "network", "settings", "unlabeled"]
    # All marks taken away again is the same as none.
    shutil.rmtree(run / "round_2")
    darseg.mark_bad(run, BAD)
    darseg.mark_bad(run, BAD, bad=False)
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == IDS and not (run / "round_2" / "excluded.json").exists()


def test_a_round_done_anew_takes_the_marks_of_now(after: Callable[[int], Path], recipe: Path) -> None:
    """What docs/view.md says to do when all rounds are finished."""
    run = after(2)
    darseg.mark_bad(run, ["u/07"])
    shutil.rmtree(run / "round_2")
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == IDS[1:]


# Stopped in between.


class Pulled(Exception):
    """The plug."""


@pytest.mark.parametrize("where", ["counting", "assigning", "recording"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_round_keeps_to_the_marks_it_began_with(
    after: Callable[[int], Path],
    recipe: Path,
    finished: Path,
    excluding: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    marked: bool,
) -> None:
    run = after(1)
    if marked:
        darseg.mark_bad(run, BAD)
    place = {
        "counting": (label_samples, "count_predictions"),
        "assigning": (label_samples, "assign_labels"),
        "recording": (RunDirectory, "finish"),
    }[where]
    real = getattr(*place)

    def pull(*arguments: Any, **keywords: Any) -> Any:
        if where == "recording" and arguments[2] != "label":
            return real(*arguments, **keywords)
        raise Pulled

    with monkeypatch.context() as patch:
        patch.setattr(*place, pull)
        with pytest.raises(Pulled):
            train(load_recipe(recipe), run, console=QUIET)
    # Meanwhile the user marks more; where nothing was counted yet and nothing marked, that comes in time.
    if marked or where != "counting":
        darseg.mark_bad(run, ["u/12"])
    train(load_recipe(recipe), run, console=QUIET)
    assert outcome(run) == outcome(excluding if marked else finished)
    assert labeled(run, 2) == (GOOD if marked else IDS)


def test_marks_that_come_before_anything_is_counted_still_count(
    after: Callable[[int], Path], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = after(1)

    def pull(*arguments: Any, **keywords: Any) -> Any:
        raise Pulled

    with monkeypatch.context() as patch:
        patch.setattr(module, "label_samples", pull)
        with pytest.raises(Pulled):
            train(load_recipe(recipe), run, console=QUIET)
    darseg.mark_bad(run, BAD)
    train(load_recipe(recipe), run, console=QUIET)
    assert labeled(run, 2) == GOOD


def test_what_a_round_left_out_cannot_be_changed_in_silence(
    excluding: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(excluding, run)
    path = run / "round_2" / "excluded.json"
    changes: dict[str, tuple[Callable[[], object], str]] = {
        "fewer": (
            lambda: path.write_text('["u/08"]'),
            r"step 'label' was done with other inputs \(excluded differ\)",
        ),
        "unknown": (lambda: path.write_text('["u/8"]'), r"excluded.json: ids of images .*:\n  - 'u/8'"),
        "no ids": (lambda: path.write_text("[3]"), r"excluded.json: wanted are ids, found:\n  - entry 0: 3"),
        "damaged": (
            lambda: path.write_text("["),
            r"To do the round anew with the marks of now, delete .*round_2",
        ),
        "none": (path.unlink, r"step 'label' was done with other inputs \(excluded differ\)"),
    }
    for change, said in changes.values():
        change()
        with pytest.raises(RunError, match=said):
            train(load_recipe(recipe), run, console=QUIET)


# Other runs, other processes.


def test_reuse_takes_a_step_over_only_with_the_same_marks(
    after: Callable[[int], Path], finished: Path, excluding: Path, recipe: Path
) -> None:
    run = after(1)
    labelings = len(events(run, "labeled"))
    train(load_recipe(recipe), run, reuse=excluding, console=QUIET)
    assert outcome(run) == outcome(finished)  # not taken over
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
    ended = torchrun(2, "-m", "darseg", "train", str(path), "--out", str(run), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert labeled(run, 1) == GOOD
    counted = RunDirectory(run).label_set(1).histogram.predicted.sum()
    assert counted == len(GOOD) * SIZE[0] * SIZE[1]


# The file, and what can be wrong with it.


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", r"bad_images.json: cannot be read \(.*\)\. Mend it or delete it"),
        ('{"u/08": 1}', r"bad_images.json: wanted is a list, found dict\. Mend it or delete it"),
        (
            '["u/08", {"id": 3, "time": 0}]',
            r"found:\n  - entry 0: 'u/08'\n  - entry 1: \{'id': 3, 'time': 0\}",
        ),
        (
            '[{"id": "x", "time": 0}, {"id": "u/08", "time": 0}, {"id": "../y", "time": 0}]',
            r"not among the 6 unlabeled ones of this run:\n  - 'x'\n  - '../y'\nAn id is",
        ),
        (
            json.dumps([{"id": name, "time": 0} for name in IDS]),
            r"all 6 unlabeled images are marked as bad, so round 2 has none to label\. Take marks away",
        ),
    ],
)
def test_a_file_of_marks_that_cannot_be_used_is_told(
    after: Callable[[int], Path], recipe: Path, text: str, said: str
) -> None:
    run = after(1)
    (run / "bad_images.json").write_text(text)
    with pytest.raises(RunError, match=said):
        train(load_recipe(recipe), run, console=QUIET)
    assert not (run / "round_2").exists()
    assert (run / "bad_images.json").read_text() == text


def test_what_cannot_be_marked_is_told_and_nothing_is_marked(
    after: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = after(0)
    with pytest.raises(
        RunError, match=r"among the 6 unlabeled ones of this run:\n  - 'l/03'\n  - 'nonsense'"
    ):
        darseg.mark_bad(run, ["u/08", "l/03", "nonsense"])
    assert not (run / "bad_images.json").exists()
    with pytest.raises(RunError, match="no run folder"):
        darseg.mark_bad(tmp_path, ["u/08"])
    darseg.mark_bad(run, ["u/08"])
    before = (run / "bad_images.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="The disk is full"):
        darseg.mark_bad(run, ["u/09"])
    assert (run / "bad_images.json").read_bytes() == before
