"""Drawn scenes have a long tail and exact labels, do not depend on what was drawn before, and are written once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.demo.scenes import SCENE_CLASSES, draw_scene, write_scenes
from darseg.errors import DataError, SizeError, StorageError
from wording import refused

LISTS = ("validation.txt", "labeled.txt", "unlabeled.txt")


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_scene(0, index) for index in range(200)]


def counts(scenes: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.sum([np.bincount(label.ravel(), minlength=256) for _, label in scenes], axis=0)


def ids(root: Path, name: str) -> list[str]:
    return (root / name).read_text().splitlines()


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_scenes_are_images_with_label_maps(scenes):
    for image, label in scenes:
        assert image.shape == (129, 193, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
        assert label.shape == (129, 193) and label.dtype == np.uint8 and label.flags.c_contiguous
        assert image.std() > 5  # there is something to see even at night and in fog


def test_shares_have_a_long_tail_and_every_class_occurs(scenes):
    total = counts(scenes)
    shares = total[: len(SCENE_CLASSES)] / total.sum()
    assert shares.min() > 0
    assert shares.max() / shares.min() >= 1000
    assert total[len(SCENE_CLASSES) : 255].sum() == 0
    # The rarest class is in many images, and tiny in each.
    rarest = int(shares.argmin())
    present = [int((label == rarest).sum()) for _, label in scenes if (label == rarest).any()]
    assert len(present) >= 40
    assert np.median(present) < 60


def test_few_pixels_are_ignored_and_only_next_to_vehicles(scenes):
    total = counts(scenes)
    assert 0 < total[255] / total.sum() < 0.03
    vehicles = [SCENE_CLASSES.names.index(name) for name in ("car", "van")]
    for _, label in scenes:
        near = cv2.dilate(np.isin(label, vehicles).astype(np.uint8), np.ones((3, 3), np.uint8))
        assert (label == 255).mean() < 0.06
        assert near[label == 255].all()


def test_color_changes_where_the_label_changes(scenes):
    """Edges of the picture lie on edges of its label, not next to them, and not on those of another scene."""

    def contrast(image: np.ndarray, label: np.ndarray) -> float:
        # Across two pixels, because the lens spreads an edge over two.
        step = np.abs(image[:, 2:].astype(int) - image[:, :-2]).mean(2)
        edge = (label[:, 2:] != label[:, :-2]) & (label[:, 2:] < 255) & (label[:, :-2] < 255)
        return float(step[edge].mean() / step[~edge].mean())

    here = np.mean([contrast(*scene) for scene in scenes])
    assert here > 1.8
    for shift, axis in ((4, 0), (-4, 0), (4, 1), (-4, 1)):
        shifted = np.mean([contrast(image, np.roll(label, shift, axis)) for image, label in scenes])
        assert shifted < 0.8 * here
    elsewhere = np.mean([contrast(scenes[n][0], scenes[n - 1][1]) for n in range(len(scenes))])
    assert elsewhere < 0.8 * here


def test_color_alone_does_not_distinguish_cars_from_vans(scenes):
    """Mean colors of similar classes differ by less than the spread of each."""
    for first, second in (("car", "van"), ("road", "path"), ("vegetation", "grass")):
        means, spreads = [], []
        for name in (first, second):
            k = SCENE_CLASSES.names.index(name)
            pixels = np.concatenate([image[label == k] for image, label in scenes]).astype(float)
            means.append(pixels.mean(0))
            spreads.append(pixels.std(0))
        assert (np.abs(means[0] - means[1]) < np.minimum(*spreads)).all(), (first, second)


def test_pixels_depend_only_on_seed_and_index(scenes):
    for index in (7, 0, 3):
        image, label = draw_scene(0, index)
        assert np.array_equal(image, scenes[index][0]) and np.array_equal(label, scenes[index][1])
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda index: draw_scene(0, index), range(24)))
    assert all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(drawn, scenes, strict=False)
    )
    assert not np.array_equal(draw_scene(1, 0)[0], scenes[0][0])
    assert len({image.tobytes() for image, _ in scenes}) == len(scenes)


def test_the_caller_may_change_a_drawn_scene(scenes):
    image, label = draw_scene(0, 5)
    image[:], label[:] = 0, 0
    assert np.array_equal(draw_scene(0, 5)[0], scenes[5][0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**33),
    size=st.tuples(st.integers(65, 385), st.integers(65, 385)),
)
def test_any_seed_index_and_size_can_be_drawn(seed: int, index: int, size: tuple[int, int]):
    image, label = draw_scene(seed, index, size)
    assert image.shape == (*size, 3) and label.shape == size
    assert np.isin(label, [*range(len(SCENE_CLASSES)), 255]).all()


@pytest.mark.parametrize("size", [(64, 193), (129, 386)])
def test_sizes_out_of_range_are_refused(size: tuple[int, int]):
    with refused(SizeError, f"{size[0]} x {size[1]}", "from 65 to 385", "129 x 193"):
        draw_scene(0, 0, size)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_a_negative_seed_or_index_is_refused(seed: int, index: int):
    with refused(DataError, f"Scene {index} of seed {seed}", "0 or more"):
        draw_scene(seed, index)


def test_a_set_has_its_files_and_lists(tmp_path: Path):
    root = tmp_path / "made" / "here"
    write_scenes(root, labeled=3, unlabeled=4, validation=2, seed=5)
    assert ids(root, "validation.txt") == ["scene_00000", "scene_00001"]
    assert ids(root, "labeled.txt") == ["scene_00002", "scene_00003", "scene_00004"]
    assert ids(root, "unlabeled.txt") == ["scene_00005", "scene_00006", "scene_00007", "scene_00008"]
    all_ids = [id_ for name in LISTS for id_ in ids(root, name)]
    for folder in ("images", "labels"):
        assert sorted(os.listdir(root / folder)) == [f"{id_}.png" for id_ in all_ids]
    for index, id_ in enumerate(all_ids):
        image, label = draw_scene(5, index)
        stored = cv2.imread(str(root / "images" / f"{id_}.png"), cv2.IMREAD_UNCHANGED)
        assert stored is not None and np.array_equal(stored[..., ::-1], image)
        stored = cv2.imread(str(root / "labels" / f"{id_}.png"), cv2.IMREAD_UNCHANGED)
        assert stored is not None and np.array_equal(stored, label)


def test_a_complete_set_is_left_alone_and_others_are_drawn_again(tmp_path: Path):
    write_scenes(tmp_path, labeled=2, unlabeled=1, validation=1, seed=0)
    before = snapshot(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    write_scenes(tmp_path, labeled=2, unlabeled=1, validation=1, seed=0)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == times

    (tmp_path / "labels" / "scene_00002.png").unlink()  # damaged
    write_scenes(tmp_path, labeled=2, unlabeled=1, validation=1, seed=0)
    assert snapshot(tmp_path) == before

    (tmp_path / "scenes.json").unlink()  # interrupted while drawing
    (tmp_path / "images" / "scene_00001.png").write_bytes(b"half")
    write_scenes(tmp_path, labeled=2, unlabeled=1, validation=1, seed=0)
    assert snapshot(tmp_path) == before

    write_scenes(tmp_path, labeled=2, unlabeled=1, validation=1, seed=1)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert after["images/scene_00000.png"] != before["images/scene_00000.png"]


def test_an_interrupted_set_is_not_taken_for_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_scenes(tmp_path, labeled=1, unlabeled=1, validation=1, seed=0)
    before = snapshot(tmp_path)

    def stop(seed: int, index: int):
        if index == 1:
            raise KeyboardInterrupt
        return draw_scene(seed, index)

    with monkeypatch.context() as patched:
        patched.setattr("darseg.demo.scenes.draw_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            write_scenes(tmp_path, labeled=1, unlabeled=1, validation=1, seed=9)
    assert not (tmp_path / "scenes.json").exists()
    write_scenes(tmp_path, labeled=1, unlabeled=1, validation=1, seed=0)
    assert snapshot(tmp_path) == before


def test_more_unlabeled_scenes_leave_the_others_as_they_are(tmp_path: Path):
    write_scenes(tmp_path / "few", labeled=2, unlabeled=0, validation=1, seed=3)
    write_scenes(tmp_path / "many", labeled=2, unlabeled=2, validation=1, seed=3)
    few, many = snapshot(tmp_path / "few"), snapshot(tmp_path / "many")
    assert few["unlabeled.txt"] == b""
    for name in set(few) - {"unlabeled.txt", "scenes.json"}:
        assert few[name] == many[name]


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "validation", "seed"),
    [(0, 1, 1, 0), (1, -1, 1, 0), (1, 1, -1, 0), (1, 1, 1, -1)],
)
def test_impossible_counts_are_refused(
    tmp_path: Path, labeled: int, unlabeled: int, validation: int, seed: int
):
    with refused(DataError, f"labeled={labeled}", f"validation={validation}", f"seed={seed}", "at least 1"):
        write_scenes(tmp_path, labeled=labeled, unlabeled=unlabeled, validation=validation, seed=seed)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "taken").write_text("a file")
    with refused(StorageError, str(tmp_path / "taken")):
        write_scenes(tmp_path / "taken", labeled=1, unlabeled=1, validation=1, seed=0)
