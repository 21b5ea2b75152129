"""Pictures that are data once, or not at all: links, what darseg wrote, and the same picture under two names."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darseg.data.classes import ClassSet
from darseg.data.examine import examine
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.manifest import Manifest, Sample, find_files
from darseg.data.suffixes import unread_files
from darseg.errors import RunError
from darseg.run import contents
from darseg.run.directory import RunDirectory, digest_path
from wording import refused, says

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.roll(PIXELS, seed, axis=1)).save(path)
    return path


def test_each_real_folder_is_visited_once_by_its_own_path(tmp_path: Path) -> None:
    picture(tmp_path / "set/z/deep/a.png")
    picture(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/alias").symlink_to("z/deep")  # comes first by its name
    (tmp_path / "set/z/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/other_again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set/z")
    found = find_files(tmp_path / "set", IMAGE_SUFFIXES)
    assert list(found) == ["other/b", "z/deep/a"]
    assert all(path.is_file() for path in found.values())


def test_one_folder_of_label_maps_may_stand_for_several_of_images(tmp_path: Path) -> None:
    picture(tmp_path / "labels/day/a.png")
    (tmp_path / "labels/night").symlink_to("day")
    (tmp_path / "labels/day/up").symlink_to("..")
    assert list(find_files(tmp_path / "labels", LABEL_SUFFIXES, labels=True)) == ["day/a", "night/a"]


@pytest.mark.parametrize(
    "marks", [("recipe.yaml", "run.json"), ("recipe.yaml", "journal.jsonl"), (".predicted.json",)]
)
def test_what_darseg_wrote_is_no_data_below_a_folder_but_is_if_it_is_named(
    tmp_path: Path, marks: tuple[str, ...]
) -> None:
    picture(tmp_path / "a.png")
    written = picture(tmp_path / "runs/first/round_1/labels/a.png").parents[2]
    picture(tmp_path / "runs/first/b.gif")
    for name in marks:
        (written / name).touch()
    for labels in (False, True):
        assert list(find_files(tmp_path, IMAGE_SUFFIXES, labels=labels)) == ["a"]
    assert not unread_files(tmp_path, IMAGE_SUFFIXES)
    assert list(find_files(written / "round_1/labels", IMAGE_SUFFIXES)) == ["a"]
    assert "round_1/labels/a" in find_files(written, IMAGE_SUFFIXES)


def test_pseudo_labels_of_a_folder_are_label_maps_but_no_images(tmp_path: Path) -> None:
    picture(tmp_path / "pseudo/a.png")
    (tmp_path / "pseudo/redistribution.json").touch()
    picture(tmp_path / "b.png")
    assert list(find_files(tmp_path, IMAGE_SUFFIXES)) == ["b"]
    assert list(find_files(tmp_path, LABEL_SUFFIXES, labels=True)) == ["b", "pseudo/a"]


def test_a_recipe_alone_does_not_make_a_run_folder(tmp_path: Path) -> None:
    picture(tmp_path / "sub/a.png")
    (tmp_path / "sub/recipe.yaml").touch()
    assert list(find_files(tmp_path, IMAGE_SUFFIXES)) == ["sub/a"]


def manifest(root: Path, roles: dict[str, list[tuple[str, int, int | None]]]) -> Manifest:
    """Roles of (file name, number of the picture, number of the label map)."""
    samples = {}
    for role, entries in roles.items():
        samples[role] = []
        for name, number, label in entries:
            image, mask = picture(root / role / name, number), None
            if label is not None:
                mask = root / role / f"{Path(name).stem}_mask.png"
                Image.fromarray(np.arange(40 * 48, dtype=np.uint8).reshape(40, 48) // (2 + label) % 2).save(
                    mask
                )
            samples[role].append(Sample(f"{role}/{Path(name).stem}", image, mask))
    given = {role: tuple(samples.get(role, ())) for role in ("labeled", "unlabeled", "validation", "test")}
    return Manifest(ClassSet(("ground", "box"), ((0, 0, 0), (255, 0, 0))), **given)


def test_the_same_picture_in_two_roles_is_counted_with_a_pair(tmp_path: Path) -> None:
    drawn = manifest(
        tmp_path,
        {
            "labeled": [("a.png", 1, 0), ("b.png", 2, 0)],
            "unlabeled": [("c.bmp", 2, None), ("d.png", 3, None)],
            "validation": [("e.tif", 1, 0), ("f.png", 4, 0), ("g.png", 3, 0)],
            "test": [("h.png", 4, 0), ("i.png", 5, 0)],
        },
    )
    lines = [line for line in examine(drawn).warnings if "same picture" in line]
    found = {
        tuple(sorted(name for name in "abcdefghi" if f"/{name}." in line)): line.split()[:2] for line in lines
    }
    assert found == {
        ("a", "e"): ["1", "validation"],  # other bytes, the same pixels
        ("b", "c"): ["1", "unlabeled"],
        ("d", "g"): ["1", "validation"],
        ("f", "h"): ["1", "test"],
    }
    says("\n".join(lines), str(drawn.labeled[0].image), str(drawn.validation[0].image))


def test_a_repeated_picture_and_contradicting_labels_are_counted(tmp_path: Path) -> None:
    entries = [("a.png", 1, 0), ("b.png", 1, 0), ("c.png", 1, 1), ("d.png", 2, 0)]
    drawn = manifest(tmp_path, {"labeled": entries, "unlabeled": [("e.png", 3, None)]})
    lines = [line for line in examine(drawn).warnings if "picture" in line]
    assert len(lines) == 2
    says(lines[0], "2 labeled", "a.png", "b.png")
    says(lines[1], "1 label", str(drawn.labeled[2].label), str(drawn.labeled[0].label))


def test_pictures_of_equal_bytes_but_other_shape_are_not_the_same(tmp_path: Path) -> None:
    drawn = manifest(tmp_path, {"labeled": [("a.png", 1, 0)], "unlabeled": [("b.png", 2, None)]})
    Image.fromarray(np.roll(PIXELS, 1, axis=1).reshape(48, 40, 3)).save(drawn.unlabeled[0].image)
    assert not [line for line in examine(drawn).warnings if "picture" in line]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def of_bmp(root: Path) -> Manifest:
    """Four images in two roles, all of one size in bytes."""
    return manifest(
        root,
        {
            "labeled": [("a.bmp", 1, 0), ("b.bmp", 2, 0)],
            "unlabeled": [("c.bmp", 3, None), ("d.bmp", 4, None)],
        },
    )


def test_files_that_were_only_touched_or_moved_are_the_same_and_are_read_once(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(contents, "digest_path", lambda path: (read.append(path), digest_path(path))[1])
    drawn = of_bmp(tmp_path / "data")
    first = contents.keep_contents(run, drawn)
    assert len(read) == 6
    assert (
        first["labeled"]["labeled/a"].digest
        == hashlib.sha256(drawn.labeled[0].image.read_bytes()).hexdigest()
    )
    assert contents.keep_contents(run, drawn) == first and len(read) == 6
    os.utime(drawn.unlabeled[1].image, (1, 1))
    for _ in range(2):
        contents.keep_contents(run, drawn)
        assert read[6:] == [drawn.unlabeled[1].image]
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = [
        dataclasses.replace(sample, image=Path(str(sample.image).replace("/data/", "/moved/")))
        for sample in drawn.unlabeled
    ]
    there = dataclasses.replace(drawn, labeled=(), unlabeled=tuple(moved))
    assert contents.keep_contents(run, there)["unlabeled"].keys() == first["unlabeled"].keys()
    assert len(read) == 7
    shutil.copytree(tmp_path / "moved", tmp_path / "data")  # keeps the times of writing only
    for _ in range(2):
        contents.keep_contents(run, dataclasses.replace(drawn, labeled=()))
        assert len(read) == 7 + len(drawn.unlabeled)


def test_other_contents_of_the_same_size_are_refused_by_name(run: RunDirectory, tmp_path: Path) -> None:
    drawn = of_bmp(tmp_path / "data")
    contents.keep_contents(run, drawn)
    times = drawn.labeled[1].image.stat()
    picture(drawn.labeled[1].image, 5)
    os.utime(
        drawn.labeled[1].image, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # as unpacking an archive does
    with refused(RunError, str(run.root), "1 file", str(drawn.labeled[1].image), "--out NEW_FOLDER"):
        contents.keep_contents(run, drawn)
    picture(drawn.labeled[1].image, 2)
    contents.keep_contents(run, drawn)


@pytest.mark.parametrize("damage", ["", "[]", '{"labeled": {"a": 3}}', '{"labeled": {"a": [1, 2, "../x"]}}'])
def test_damaged_contents_are_refused(run: RunDirectory, tmp_path: Path, damage: str) -> None:
    run.contents.write_text(damage)
    with pytest.raises(RunError, match=str(run.contents)):
        contents.keep_contents(run, of_bmp(tmp_path / "data"))
