"""Pictures that are data once, or not at all: links, what darseg wrote, and the same picture under two names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.manifest import find_files
from darseg.data.suffixes import unread_files

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
