"""Labeling that is stopped by a full disk or SIGKILL, or shared between processes, gives the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import forks
import test_labeling
from conftest import KILL_BEFORE
from darseg.errors import StorageError
from darseg.run import redistribute as module
from darseg.training.processes import Processes
from test_labeling import ARRAYS, COUNTS, NAMES, RATIO, RECORDS, file_of, outcome, redistribute_quietly, save
from wording import refused

pytestmark = pytest.mark.usefixtures("small_network")

source, wanted = test_labeling.source, test_labeling.wanted


# The disk.


def test_too_little_free_space_is_refused_before_the_work(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 12 * 3 * ARRAYS[NAMES[0]][0].size  # three bytes per pixel, all images as large as the first
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with refused(StorageError, str(tmp_path / "deep" / "out"), "3 bytes", "--predict-twice"):
        redistribute_quietly(source, tmp_path / "deep" / "out", COUNTS, RATIO)
    assert not (tmp_path / "deep").exists()
    redistribute_quietly(source, tmp_path / "twice", COUNTS, RATIO, predict_twice=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)
    assert outcome(tmp_path / "twice") == outcome(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("name", "twice"),
    [
        (f"{NAMES[5]}.prediction", False),
        *((name, twice) for name in (f"{NAMES[7]}.png", *RECORDS, ".begun.json") for twice in (False, True)),
    ],
)
def test_a_disk_that_fills_up_loses_nothing(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], name: str, twice: bool
) -> None:
    out, fsync = tmp_path / "out", os.fsync

    def full(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=rf"disk is full.*{name}"):
            redistribute_quietly(source, out, COUNTS, RATIO, predict_twice=twice)
    assert not list(out.rglob("*.part")) and not (out / "redistribution.json").exists()
    redistribute_quietly(source, out, COUNTS, RATIO, predict_twice=twice)
    assert outcome(out) == wanted


def test_after_a_full_disk_predicting_twice_continues(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        if ".prediction" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO)
    redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, predict_twice=True)
    assert outcome(tmp_path / "out") == wanted


@pytest.mark.parametrize(("twice", "reads"), [(False, 0), (True, 1)])
def test_what_was_counted_and_written_is_not_predicted_again(
    source: Path,
    tmp_path: Path,
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    twice: bool,
    reads: int,
) -> None:
    out, fsync, read = tmp_path / "out", os.fsync, []

    def full(descriptor: int) -> None:
        if f"{NAMES[7]}.png" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full"):
            redistribute_quietly(source, out, COUNTS, RATIO, predict_twice=twice)
    missing = [name for name in NAMES if not (out / f"{name}.png").exists()]
    scores = module.read_scores
    monkeypatch.setattr(module, "read_scores", lambda path: (read.append(path), scores(path))[1])
    redistribute_quietly(source, out, COUNTS, RATIO, predict_twice=twice)
    assert NAMES[7] in missing and len(missing) < 12
    assert sorted(read) == [file_of(source, name) for name in missing] * reads
    assert outcome(out) == wanted


def test_damaged_waiting_files_are_made_again(source: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    """Half a prediction and half a label map, as a failing disk leaves them."""
    out, fsync = tmp_path / "out", os.fsync

    def broken(descriptor: int) -> None:
        if f"{NAMES[7]}.png" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with refused(StorageError, f"{NAMES[7]}.png", "Input/output error"):
            redistribute_quietly(source, out, COUNTS, RATIO)
    for path in (out / f"{NAMES[0]}.png", out / ".predictions" / f"{NAMES[9]}.prediction"):
        path.write_bytes(path.read_bytes()[:30])
    redistribute_quietly(source, out, COUNTS, RATIO)
    assert outcome(out) == wanted


# Kills.

KILLER = (
    KILL_BEFORE
    + """
import sys
from pathlib import Path

import darseg.run.redistribute
from darseg.cli import main

base, arguments = Path(sys.argv[1]), sys.argv[2:]
os.fsync = lambda descriptor: None  # slow, and a kill loses nothing that the system has buffered


def run(out, at=0):
    '''The exit code of the command in a fork of this process that is killed before the at-th change of the disk.'''
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for path in out.rglob("*.part"):
            path.write_bytes(path.read_bytes()[: at % 7])
        return code
    kill_before(at)
    sys.argv = ["darseg"] + [str(out) if word == "OUT" else word for word in arguments]
    try:
        main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(1)


kills = 0
for at in itertools.count(1):
    out = base / f"once_{at}"
    if run(out, at) != -signal.SIGKILL:
        break
    kills += 1
    assert run(out) == 0
for at in (3, 7):
    while run(base / f"often_{at}", at) == -signal.SIGKILL:
        kills += 1
print(kills, "kills")
"""
)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed before each single change of the disk, with files half-written; and repeatedly until it gets through."""
    source = save(tmp_path / "source", {name: ARRAYS[name] for name in NAMES[3:9]})
    redistribute_quietly(source, tmp_path / "wanted", COUNTS, RATIO)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    command = ["redistribute", source, "OUT", "--class-counts", counts, "--labeling-ratio", RATIO]
    result = forks.python("-c", KILLER, tmp_path / "killed", *command)
    assert result.returncode == 0, result.stderr
    kills = int(result.stdout.splitlines()[-1].split()[0])
    assert kills > 6 + 6 + 6 + 4  # predictions, maps, removed predictions, other files
    folders = list((tmp_path / "killed").iterdir())
    wanted = outcome(tmp_path / "wanted")
    assert len(folders) > 6 + 6 + 6 + 4 and all(outcome(folder) == wanted for folder in folders)


# Many processes.


def test_every_item_is_in_the_share_of_one_process() -> None:
    for count in (1, 2, 3, 7):
        for items in (list(range(5)), list(range(20)), []):
            shares = [Processes(rank, count).share(items) for rank in range(count)]
            assert sorted(item for share in shares for item in share) == items
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Processes(rank, 2).first for rank in (0, 1)] == [True, False]
    alone = Processes.here()
    assert alone.count == 1 and alone.first
    assert alone.from_first(lambda: "made") == "made" and alone.add_up(np.array([3])).tolist() == [3]


WITNESS = """
import os

replace = os.replace


def noted(aside, path):
    replace(aside, path)
    with open(os.environ["WITNESS"], "a") as file:
        file.write(os.environ["RANK"] + " " + str(path) + "\\n")


os.replace = noted
from darseg.cli import main

main()
"""


def test_two_processes_write_each_image_once_and_end_together_if_one_fails(
    source: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    copied, out, witness = (
        shutil.copytree(source, tmp_path / "copied"),
        tmp_path / "out",
        tmp_path / "written",
    )
    counts, script = tmp_path / "counts.json", tmp_path / "witness.py"
    counts.write_text(json.dumps(COUNTS))
    script.write_text(WITNESS)
    damaged = file_of(copied, NAMES[3])
    damaged.write_bytes(b"")
    arguments = ["redistribute", copied, out, "--class-counts", counts, "--labeling-ratio", RATIO]
    failed = forks.torchrun(script, *arguments, WITNESS=str(witness))
    assert failed.returncode != 0
    assert failed.stderr.count("darseg: 1 file(s)") == 1 and failed.stderr.count(f"  - {damaged}: ") == 1
    waiting = {f".predictions/{name}.prediction" for name in NAMES if name != NAMES[3]}
    assert set(outcome(out)) == waiting | {".begun.json"}

    shutil.copy2(file_of(source, NAMES[3]), damaged)
    result = forks.torchrun(script, *arguments, WITNESS=str(witness))
    assert result.returncode == 0, result.stderr
    assert outcome(out) == wanted
    assert result.stdout.count("12 images") == 1  # one process prints
    lines = [line.split(" ", 1) for line in witness.read_text().splitlines()]
    written = Counter(Path(path).relative_to(out).as_posix() for _, path in lines)
    assert written.pop(".begun.json") == 2  # once more, since a file had changed
    predictions = {f".predictions/{name}.prediction" for name in NAMES}
    assert set(written) == predictions | {f"{name}.png" for name in NAMES} | set(RECORDS)
    assert set(written.values()) == {1}
    for rank in ("0", "1"):
        maps = [path for who, path in lines if who == rank and path.endswith(".png")]
        assert len(maps) == 6
