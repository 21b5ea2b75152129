"""Drawn splits: which images, what the lists and the report say, and that recipes take them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import darseg
from conftest import REPOSITORY, recipe_dict, write_png
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.splits import draw, labeled_count, sequences_of
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DataError, RecipeError, RunError, StorageError
from darseg.run.build import manifest_of
from darseg.run.split import draw_split
from wording import refused, says

FILES = ["labeled.txt", "split.json", "unlabeled.txt"]
some = settings(max_examples=150, deadline=None)
seeds = st.integers(0, 2**32)
pools = st.lists(st.text("abc/_0", min_size=1, max_size=6), min_size=2, max_size=40, unique=True)


# How many


@given(st.integers(2, 10**6), st.fractions(0, 1).filter(lambda f: 0 < f < 1))
def test_a_fraction_is_rounded_half_up_and_leaves_images_on_both_sides(images: int, fraction: Fraction):
    exact = Decimal(images * fraction.numerator) / Decimal(fraction.denominator)
    rounded = int(exact.quantize(Decimal(1), ROUND_HALF_UP))
    assert labeled_count(images, fraction) == sorted([1, rounded, images - 1])[1]


def test_the_published_counts_of_cityscapes():
    assert [labeled_count(2975, Fraction(1, n)) for n in (2, 4, 8)] == [1488, 744, 372]


# Plain draws


def place(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()


def test_a_draw_never_changes():
    """Lists that were published must come out unchanged, whatever the versions of Python and numpy."""
    ids = [f"city/{index:03d}" for index in range(100)]
    assert draw(ids, 4, 0) == ("city/014", "city/041", "city/068", "city/071")
    assert draw(ids, 4, 1) == ("city/011", "city/062", "city/082", "city/094")


@some
@given(pools, st.data(), seeds)
def test_plain_draws(ids: list[str], data: st.DataObject, seed: int):
    small = data.draw(st.integers(1, len(ids) - 1))
    large = data.draw(st.integers(small, len(ids) - 1))
    drawn = draw(ids, large, seed)
    assert len(drawn) == large and list(drawn) == sorted(drawn) and set(drawn) <= set(ids)
    assert drawn == draw(data.draw(st.permutations(ids)), large, seed)
    assert set(draw(ids, small, seed)) <= set(drawn)
    assert set(drawn) == set(sorted(ids, key=lambda name: place(seed, "", name))[:large])
    more = [*ids, "another"]
    assert set(draw(more, large, seed)) - {"another"} <= set(drawn)


def test_all_subsets_are_equally_likely():
    ids, draws = ["a", "b", "c", "d", "e"], 4000
    counts = Counter(draw(ids, 2, seed) for seed in range(draws))
    expected = draws / math.comb(5, 2)
    assert len(counts) == 10
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom: one seed range in a thousand is above


@pytest.mark.parametrize("count", [-1, 0, 5, 6])
def test_counts_that_cannot_be(count: int):
    with refused(RecipeError, f"{count} of 5 images"):
        draw(list("abcde"), count, 0)


# Sequences


def test_the_sequence_is_the_first_group_or_the_whole_match():
    ids = ["train/aachen/aachen_000001_000019", "train/bad-homburg/bad-homburg_1"]
    assert sequences_of(ids, "train/([a-z-]+)/") == ["aachen", "bad-homburg"]
    assert sequences_of(ids, "train/[a-z-]+/") == ["train/aachen/", "train/bad-homburg/"]
    assert sequences_of(ids, "[a-z-]+/([a-z-]+)_(0+)?") == ["aachen", "bad-homburg"]


def test_ids_without_sequence_are_named():
    ids = ["a_1", *(f"image{index}" for index in range(7)), "_8"]
    with refused(DataError, "'^([a-z]*)_'", "8 of 9 ids", "'image0'", "'image4'", "… and 3 more") as caught:
        sequences_of(ids, "^([a-z]*)_")  # the empty name of the last one is not a sequence either
    assert "'image5'" not in str(caught.value)


def test_a_pattern_whose_group_took_no_part_finds_no_sequence():
    with refused(DataError, "1 of 2 ids", "'b1'"):
        sequences_of(["a_1", "b1"], "([a-z])_|1")


def test_a_pattern_that_is_not_a_regular_expression():
    with refused(RecipeError, "'('", vary=[r"\(missing.* 0\)"]):
        sequences_of(["a_1"], "(")


def slow_sequences(ids: list[str], names: list[str], count: int, seed: int) -> tuple[str, ...]:
    members = {name: [i for i, own in zip(ids, names, strict=True) if own == name] for name in names}
    order = sorted(members, key=lambda name: place(seed, "", name))
    taken: list[str] = []
    for name in order:
        if len(taken) + len(members[name]) <= count:
            taken += members[name]
    if not taken:
        smallest = min(map(len, members.values()))
        taken = next(members[name] for name in order if len(members[name]) == smallest)
    return tuple(sorted(taken))


@some
@given(pools, st.data(), seeds, st.booleans())
def test_sequences_stay_together(ids: list[str], data: st.DataObject, seed: int, balanced: bool):
    names = data.draw(st.lists(st.sampled_from("pqrstu"), min_size=len(ids), max_size=len(ids)))
    count = data.draw(st.integers(1, len(ids) - 1))
    present = np.random.default_rng(seed).random((len(ids), 3)) < 0.3 if balanced else None
    if len(set(names)) == 1:
        with pytest.raises(DataError, match=rf"{len(ids)} images .*'{names[0]}'"):
            draw(ids, count, seed, sequences=names, present=present)
        return
    drawn = set(draw(ids, count, seed, sequences=names, present=present))
    sequence = dict(zip(ids, names, strict=True))
    sizes = Counter(names)
    inside = {sequence[name] for name in drawn}
    assert drawn == {name for name in ids if sequence[name] in inside}
    assert 0 < len(drawn) < len(ids)
    if len(drawn) > count:
        assert len(inside) == 1 and len(drawn) == min(sizes.values())
    else:  # nothing that still fits was left
        assert all(len(drawn) + sizes[name] > count for name in set(names) - inside)
    if not balanced:
        assert tuple(sorted(drawn)) == slow_sequences(ids, names, count, seed)


# Balanced draws


def slow_stratification(ids: list[str], count: int, seed: int, classes: dict[str, set[int]]) -> set[str]:
    """One image of each class, then Sechidis et al., algorithm 1, with two subsets; sets and fractions."""
    share = {"labeled": Fraction(count, len(ids)), "unlabeled": 1 - Fraction(count, len(ids))}
    kinds = sorted(set().union(*classes.values()))
    having = {k: [name for name in ids if k in classes[name]] for k in kinds}
    having = {
        k: sorted(names, key=lambda name, k=k: place(seed, f"class {k}", name)) for k, names in having.items()
    }
    subsets: dict[str, set[str]] = {"labeled": set(), "unlabeled": set()}

    def desired(subset: str, k: int) -> Fraction:
        return share[subset] * len(having[k]) - len(subsets[subset] & set(having[k]))

    def desired_size(subset: str) -> Fraction:
        return share[subset] * len(ids) - len(subsets[subset])

    def remaining(k: int) -> list[str]:
        return [name for name in having[k] if not any(name in subset for subset in subsets.values())]

    for k in sorted(kinds, key=lambda k: len(having[k])):
        if not subsets["labeled"] & set(having[k]) and len(subsets["labeled"]) < count:
            subsets["labeled"].add(having[k][0])
    while any(map(remaining, kinds)):
        rarest = min(filter(remaining, kinds), key=lambda k: len(remaining(k)))
        for name in remaining(rarest):
            best = max(subsets, key=lambda subset: (desired(subset, rarest), desired_size(subset)))
            full = [subset for subset in subsets if desired_size(subset) <= 0]
            subsets[next(other for other in (best, *subsets) if other not in full)].add(name)
    for name in sorted(ids, key=lambda name: place(seed, "", name)):
        if len(subsets["labeled"]) < count:
            subsets["labeled"].add(name)
    return subsets["labeled"]


@some
@given(pools, st.data(), seeds, st.integers(1, 6))
def test_balanced_draws(ids: list[str], data: st.DataObject, seed: int, kinds: int):
    count = data.draw(st.integers(1, len(ids) - 1))
    rng = np.random.default_rng(seed)
    present = rng.random((len(ids), kinds)) < rng.random(kinds)
    drawn = draw(ids, count, seed, present=present)
    assert len(drawn) == count and list(drawn) == sorted(drawn) and set(drawn) <= set(ids)
    order = data.draw(st.permutations(range(len(ids))))
    assert drawn == draw([ids[i] for i in order], count, seed, present=present[order])
    chosen = np.isin(ids, drawn)
    images = present.sum(0)
    occurring = np.flatnonzero(images)
    absent = [k for k in occurring if not present[chosen, k].any()]
    assert not absent or count < len(occurring)
    if absent:  # every rarer class was served
        rarer = [k for k in occurring if images[k] < min(images[absent])]
        assert present[chosen][:, rarer].any(0).all() and len(rarer) < len(occurring)
    classes = {name: set(np.flatnonzero(row)) for name, row in zip(ids, present, strict=True)}
    assert set(drawn) == slow_stratification(ids, count, seed, classes)


@some
@given(seeds, st.lists(st.integers(2, 60), min_size=2, max_size=6), st.sampled_from([2, 3, 8]))
def test_classes_that_do_not_overlap_get_their_share(seed: int, sizes: list[int], part: int):
    """Within one image, where each class's share of the whole is at least one image."""
    sizes = [size * part for size in sizes]
    kinds = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"{k}/{index}" for index, k in enumerate(kinds)]
    drawn = draw(ids, len(ids) // part, seed, present=kinds[:, None] == np.arange(len(sizes)))
    counts = Counter(int(name.split("/")[0]) for name in drawn)
    assert all(abs(counts[k] - size // part) <= 1 for k, size in enumerate(sizes))


def rare_pool() -> tuple[list[str], np.ndarray]:
    """200 images; of four classes 0 is in all, 1 in 100, 2 in 20, 3 in 3 of them."""
    present = np.zeros((200, 4), bool)
    rng = np.random.default_rng(5)
    for k, images in enumerate((200, 100, 20, 3)):
        present[rng.permutation(200)[:images], k] = True
    return [f"{index:03d}" for index in range(200)], present


def test_rare_classes_appear_even_if_a_plain_draw_misses_them():
    ids, present = rare_pool()
    runs, count = 400, 20
    plain = np.array([present[np.isin(ids, draw(ids, count, s))].sum(0) for s in range(runs)])
    balanced = np.array(
        [present[np.isin(ids, draw(ids, count, s, present=present))].sum(0) for s in range(runs)]
    )
    missed = math.comb(197, count) / math.comb(200, count)  # 0.73: no image with class 3 among 20
    spread = math.sqrt(missed * (1 - missed) / runs)
    assert abs((plain[:, 3] == 0).mean() - missed) < 4 * spread
    assert (balanced[:, 3] >= 1).all() and balanced[:, 3].mean() < 1.1
    assert (abs(balanced - [20, 10, 2, 1]) <= 1).all()  # the shares of the pool, in every draw
    assert plain[:, 1].std() > 1.5 > 0.5 > balanced[:, 1].std()


def test_images_of_a_rare_class_are_equally_likely():
    ids, present = rare_pool()
    runs = 600
    counts = sum(np.isin(ids, draw(ids, 20, seed, present=present)).astype(int) for seed in range(runs))
    assert (abs(counts[present[:, 3]] - runs / 3) < 4 * math.sqrt(runs * 2 / 9)).all()
    assert counts.min() > 0


def test_a_class_in_any_image_of_a_sequence_is_in_the_sequence():
    ids = [f"{name}{index}" for name in "pqrs" for index in range(3)]
    present = np.zeros((12, 1), bool)
    present[ids.index("r1")] = True
    sequences = [name[0] for name in ids]
    assert all(draw(ids, 3, s, sequences=sequences, present=present) == ("r0", "r1", "r2") for s in range(20))


# The folder


def recipe_of(data: Path, *overrides: str) -> Recipe:
    path = data.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(data)))
    return load_recipe(path, overrides)


def folder_recipe(data: Path, **roles) -> Recipe:
    """Without lists: labeled are the images with a label map, unlabeled all others."""
    path = data.parent / "folder.yaml"
    plain = {"root": str(data), "classes": list(SCENE_CLASSES.names), **roles}
    path.write_text(yaml.safe_dump({**recipe_dict(data), "data": plain}))
    return load_recipe(path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """The tiny data set, to be changed."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def pool_lines(root: Path) -> list[str]:
    ids = (root / "labeled.txt").read_text().split() + (root / "unlabeled.txt").read_text().split()
    return [f"images/{name}.png labels/{name}.png" for name in sorted(ids)]


@pytest.mark.parametrize("flags", [[], ["--balanced"]], ids=["random", "balanced"])
def test_the_lists_and_the_report(call, recipe_file: Path, tiny_data: Path, tmp_path: Path, flags: list[str]):
    out = tmp_path / "new" / "lists"
    code, printed, err = call("split", recipe_file, out, "--fraction", "0.3", "--seed", "4", *flags)
    assert code == 0, err
    assert sorted(content(out)) == FILES
    lists = {role: (out / f"{role}.txt").read_text() for role in ("labeled", "unlabeled")}
    lines = {role: text.splitlines() for role, text in lists.items()}
    assert all(
        text.endswith("\n") and own == sorted(own)
        for text, own in zip(lists.values(), lines.values(), strict=True)
    )
    assert len(lines["labeled"]) == 3 and sorted(lines["labeled"] + lines["unlabeled"]) == pool_lines(
        tiny_data
    )
    report = json.loads((out / "split.json").read_text())
    names = SCENE_CLASSES.names
    assert list(report) == ["method", "seed", "fraction", "count", "sequences", "lists", "absent"]
    assert [report[key] for key in ("seed", "fraction", "count", "sequences")] == [4, "3/10", 3, None]
    assert report["method"] == ("balanced" if flags else "random")
    table = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in printed.splitlines()}
    for at, (role, own) in enumerate(lines.items()):
        pixels = np.zeros((len(own), len(names)), int)
        for row, line in enumerate(own):
            label = cv2.imread(str(tiny_data / line.split()[1]), cv2.IMREAD_UNCHANGED)
            pixels[row] = [(label == k).sum() for k in range(len(names))]
        assert report["lists"][role] == {
            "images": len(own),
            "without_label": 0,
            "sequences": None,
            "images_with_class": dict(zip(names, (pixels > 0).sum(0).tolist(), strict=True)),
            "pixels": dict(zip(names, pixels.sum(0).tolist(), strict=True)),
            "sha256": hashlib.sha256(lists[role].encode()).hexdigest(),
        }
        for k, name in enumerate(names):
            shares = pixels.sum(0) / pixels.sum()
            assert table[name][2 * at : 2 * at + 2] == [str((pixels[:, k] > 0).sum()), f"{shares[k]:.4%}"]
        if role == "labeled":
            assert report["absent"] == [
                name for name, count in zip(names, pixels.sum(0), strict=True) if count == 0
            ]
    if report["absent"]:
        assert f"warning: classes without a pixel in labeled.txt: {', '.join(report['absent'])}" in printed
    assert "images: 3 labeled, 7 unlabeled\n" in printed and f"Written to {out}." in printed


def test_the_printed_arguments_put_the_lists_into_a_recipe(call, recipe_file: Path, tmp_path: Path):
    out = tmp_path / "my lists"
    code, printed, _ = call("split", recipe_file, out, "--count", 4)
    assert code == 0
    words = shlex.split(printed[printed.index("on the command line:\n") :].partition("\n")[2])
    assert words == [f"data.{role}={out}/{role}.txt" for role in ("labeled", "unlabeled")]
    for command in ("plan", "check"):
        code, printed, err = call(command, recipe_file, *words)
        assert code == 0, err
        assert "images: 4 labeled, 6 unlabeled, 3 validation, 0 test" in printed
    manifest = manifest_of(load_recipe(recipe_file, words))
    assert all(sample.label and sample.label.is_file() for sample in manifest.unlabeled)


def test_the_same_images_whatever_the_recipe_calls_them(recipe_file: Path, tmp_path: Path):
    """Lists of ids, and the drawn lists of paths: larger draws still hold the smaller."""
    draw_split(load_recipe(recipe_file), tmp_path / "three", count=3)
    lists = [f"data.{role}={tmp_path / 'three' / role}.txt" for role in ("labeled", "unlabeled")]
    draw_split(load_recipe(recipe_file, lists), tmp_path / "again", count=3)
    assert content(tmp_path / "again") == content(tmp_path / "three")
    draw_split(load_recipe(recipe_file, lists), tmp_path / "five", count=5)
    smaller, larger = (
        set((tmp_path / n / "labeled.txt").read_text().splitlines()) for n in ("three", "five")
    )
    assert smaller < larger and len(larger) == 5


def test_images_without_lists(data: Path, tmp_path: Path):
    """Images with a label are labeled, all others unlabeled; validation images stay out."""
    for name in ("u/07", "u/08", "u/09"):
        (data / "labels" / f"{name}.png").unlink()
    recipe = folder_recipe(data, validation={"every": 5})
    report = draw_split(recipe, tmp_path / "out", count=6)
    lines = [line for role in ("labeled", "unlabeled") for line in (tmp_path / "out" / f"{role}.txt").open()]
    held_out = {sample.image.relative_to(data).as_posix() for sample in manifest_of(recipe).validation}
    everything = {path.relative_to(data).as_posix() for path in (data / "images").rglob("*.png")}
    assert {line.split()[0] for line in lines} == everything - held_out and len(held_out) == 2
    assert {line.strip() for line in lines if len(line.split()) == 1} == {
        f"images/u/0{n}.png" for n in (7, 8, 9)
    }
    assert sum(summary["without_label"] for summary in report["lists"].values()) == 3


def test_the_same_draw_is_accepted_and_another_one_changes_nothing(call, recipe_file: Path, tmp_path: Path):
    out = tmp_path / "lists"
    assert call("split", recipe_file, out, "--fraction", "1/5")[0] == 0
    before = content(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert call("split", recipe_file, out, "--fraction", "0.2")[0] == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    code, _, err = call("split", recipe_file, out, "--fraction", "1/5", "--seed", "1")
    assert code == 2 and content(out) == before
    says(err, f"{out / 'labeled.txt'} exists", "nothing was written")
    # The same lists, asked for in another way: the report differs.
    code, _, err = call("split", recipe_file, out, "--count", "2")
    assert code == 2 and f"{out / 'split.json'} exists" in err and content(out) == before
    # Killed in between, the same command goes on.
    (out / "split.json").unlink()
    (out / "unlabeled.txt").unlink()
    assert call("split", recipe_file, out, "--fraction", "1/5")[0] == 0
    assert content(out) == before
    # Half of it there, and of another draw: not even the missing files are written.
    (out / "labeled.txt").unlink()
    with pytest.raises(RunError, match=r"unlabeled\.txt exists"):
        draw_split(load_recipe(recipe_file), out, count=3)
    assert sorted(content(out)) == FILES[1:]


def test_the_recipes_own_lists_are_not_overwritten(call, data: Path, recipe_file: Path):
    before = (data / "labeled.txt").read_bytes()
    code, _, err = call("split", recipe_file, data, f"data.root={data}", "--count", "3")
    assert code == 2 and f"{data}/labeled.txt exists" in err
    assert (data / "labeled.txt").read_bytes() == before and not (data / "split.json").exists()


def test_folders_that_cannot_be_written(recipe_file: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=rf"{tmp_path}/file/labeled\.txt"):
        draw_split(load_recipe(recipe_file), tmp_path / "file", count=3)
    (tmp_path / "out" / "labeled.txt").mkdir(parents=True)
    with pytest.raises(RunError, match=rf"{tmp_path}/out/labeled\.txt"):
        draw_split(load_recipe(recipe_file), tmp_path / "out", count=3)


def test_sequences_from_the_command_line(call, recipe_file: Path, tmp_path: Path):
    out = tmp_path / "out"
    code, printed, err = call("split", recipe_file, out, "--fraction", "1/8", "--sequences", "images/(.)/")
    assert code == 0, err
    report = json.loads((out / "split.json").read_text())
    assert report["sequences"] == "images/(.)/" and report["count"] == 1
    assert [summary["sequences"] for summary in report["lists"].values()] == [["l"], ["u"]]
    says(
        printed[printed.index("images: 4") :],
        "1 labeled images",
        "give 4",
        "sequences: 1 labeled, 1 unlabeled",
        f"data.labeled={out}/labeled.txt",
    )
    assert len((out / "labeled.txt").read_text().splitlines()) == 4
    code, printed, _ = call(
        "split", recipe_file, tmp_path / "b", "--count", "9", "--sequences", "images/(.)/", "--balanced"
    )
    assert code == 0 and json.loads((tmp_path / "b" / "split.json").read_text())["method"] == "balanced"


def test_images_without_a_label_map(call, data: Path, recipe_file: Path, tmp_path: Path):
    for path in (data / "labels" / "u").iterdir():
        path.unlink()
    code, printed, _ = call("split", recipe_file, tmp_path / "out", f"data.root={data}", "--count", "8")
    assert code == 0
    report = json.loads((tmp_path / "out" / "split.json").read_text())
    bare = report["lists"]["labeled"]["without_label"]
    assert 4 <= bare <= 6
    assert f"warning: {bare} images of labeled.txt" in printed
    code, _, err = call(
        "split", recipe_file, tmp_path / "b", f"data.root={data}", "--count", "8", "--balanced"
    )
    assert code == 2 and not (tmp_path / "b").exists()
    says(err, "6 of 10 images", "'images/u/07'", "--balanced")


def test_lists_without_any_label_have_no_table(call, data: Path, recipe_file: Path, tmp_path: Path):
    for path in (data / "labels" / "u").iterdir():
        path.unlink()
    sequences = ["--sequences", "images/(.)/", "--count", "6"]  # takes u or l, by the seed
    for seed in range(20):
        out = tmp_path / f"out{seed}"
        code, printed, err = call("split", recipe_file, out, f"data.root={data}", "--seed", seed, *sequences)
        assert code == 0, err
        report = json.loads((out / "split.json").read_text())
        if report["lists"]["labeled"]["sequences"] == ["u"]:
            assert report["absent"] is report["lists"]["labeled"]["pixels"] is None
            assert (
                "unlabeled: images" in printed
                and " labeled: images" not in printed
                and "absent" not in printed
            )
            return
    raise AssertionError("no seed drew the sequence without labels")


BAD_CALLS = {
    "": ["fraction", "count"],
    "--fraction=1/2 --count=3": ["fraction", "count"],
    "--fraction=eighth": ["eighth", "1/8", "0.125"],
    "--fraction=1/0": ["1/0"],
    "--fraction=nan": ["nan"],
    "--fraction=0": [" 0 ", "above 0"],
    "--fraction=8/8": [" 1 ", "below 1"],
    "--fraction=-1/8": ["-1/8", "above 0"],
    "--count=0": ["0 of 10 images"],
    "--count=10": ["10 of 10 images"],
    "--count=3 --sequences=(": ["'('"],
    "--count=3 --sequences=l/": ["'l/'", "6 of 10 ids"],
    "--count=3 --sequences=images": ["10 images", "'images'"],
    "--count=3 --balanced --sequences=images": ["10 images", "'images'"],
}


@pytest.mark.parametrize("arguments", BAD_CALLS)
def test_bad_calls(call, recipe_file: Path, tmp_path: Path, arguments: str):
    code, _, err = call("split", recipe_file, tmp_path / "out", *arguments.split())
    assert code == 2 and "Traceback" not in err and not (tmp_path / "out").exists()
    says(err, *BAD_CALLS[arguments], vary=[r"\(missing.* 0\)"])


@pytest.mark.parametrize(
    ("override", "fact"), [("data.labeled=gone.txt", "gone.txt"), ("data.lists=3", "data.lists")]
)
def test_recipes_that_cannot_work(call, recipe_file: Path, tmp_path: Path, override: str, fact: str):
    code, _, err = call("split", recipe_file, tmp_path / "out", "--count=3", override)
    assert code == 2 and fact in err and not (tmp_path / "out").exists()


def test_all_bad_labels_are_named(data: Path, tmp_path: Path):
    write_png(data / "labels" / "l" / "04.png", np.full((65, 97), 77, np.uint8))
    (data / "labels" / "u" / "08.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)^2 label map.*l/04\.png: .*77 \(6305 pixels\).*u/08\.png: "):
        draw_split(recipe_of(data), tmp_path / "out", count=3)
    with pytest.raises(RecipeError, match="10 of 10 images"):  # known before the labels are read
        draw_split(recipe_of(data), tmp_path / "out", count=10, balanced=True)
    assert not (tmp_path / "out").exists()


def test_ignored_pixels_belong_to_no_class(data: Path, tmp_path: Path):
    for path in (data / "labels").rglob("*.png"):
        write_png(path, np.array([[0, 0, 255], [1, 255, 200]], np.uint8))
    pixels = draw_split(recipe_of(data, "data.ignore=200"), tmp_path / "out", count=3)["lists"]["labeled"][
        "pixels"
    ]
    assert list(pixels.values()) == [6, 3, *[0] * (len(SCENE_CLASSES) - 2)]


def test_files_that_lists_cannot_name(data: Path, tmp_path: Path):
    shutil.move(data / "labels", tmp_path / "elsewhere")
    shutil.copytree(data / "images" / "u", tmp_path / "far")
    with refused(DataError, "data.root", str(data), "elsewhere/l/03.png") as caught:
        draw_split(recipe_of(data, "data.labels=../elsewhere"), tmp_path / "out", count=3)
    assert str(caught.value).count("\n  - ") == 10
    images = recipe_of(
        data, f"data.labels={tmp_path}/elsewhere", f"data.unlabeled={{images: {tmp_path}/far}}"
    )
    with pytest.raises(DataError, match=rf"{tmp_path}/far/07\.png"):
        draw_split(images, tmp_path / "out", count=3)


@pytest.mark.parametrize(
    ("name", "fact"),
    [("line\nbreak", r"line\nbreak.png"), ("next\x85line", r"next\x85line.png")],
    ids=["line break", "next line"],
)
def test_names_that_lists_cannot_hold(data: Path, tmp_path: Path, name: str, fact: str):
    (data / "images" / "l" / "03.png").rename(data / "images" / "l" / f"{name}.png")
    with refused(DataError, fact):
        draw_split(folder_recipe(data), tmp_path / "out", count=3)


def test_names_that_are_not_utf_8(data: Path, tmp_path: Path):
    (data / "images" / "l" / "03.png").rename(data / "images" / "l" / os.fsdecode(b"latin \xe9.png"))
    with pytest.raises(DataError, match="UTF-8"):
        draw_split(folder_recipe(data), tmp_path / "out", count=3)


def test_names_with_blanks_come_back(data: Path, tmp_path: Path):
    for folder in ("images", "labels"):
        for path in list((data / folder / "u").iterdir()):
            path.rename(path.with_name(f" an  im\u3000age {path.name} .png".replace(".png ", " ")))
    recipe = folder_recipe(data)
    draw_split(recipe, tmp_path / "out", count=3)
    lists = [f"data.{role}={tmp_path / 'out' / role}.txt" for role in ("labeled", "unlabeled")]
    again = manifest_of(load_recipe(tmp_path / "folder.yaml", lists))
    before = {(sample.image, sample.label) for sample in manifest_of(recipe).labeled}
    assert {(sample.image, sample.label) for sample in (*again.labeled, *again.unlabeled)} == before
    assert all(label for _, label in before)


@pytest.mark.parametrize("twin", ["03.PNG", "03.jpg", "Ab.png"])
def test_ids_that_differ_only_in_suffix_or_case(data: Path, tmp_path: Path, twin: str):
    """In one folder they are refused anyway; the two lists here name files below the root."""
    for name in ("aB.png", twin):
        shutil.copy(data / "images" / "l" / "03.png", data / "images" / "l" / name)
    (data / "labeled.txt").write_text("images/l/03.png labels/l/03.png\nimages/l/aB.png labels/l/04.png\n")
    (data / "unlabeled.txt").write_text(f"images/l/{twin}\nimages/u/07.png\n")
    (data / "validation.txt").write_text("images/v/00.png labels/v/00.png\n")
    with refused(DataError, "data.root", f"{data}/images/l/{twin}") as caught:
        draw_split(recipe_of(data, "data.images=none"), tmp_path / "out", count=2)
    assert str(caught.value).count("\n  - ") == 2


def test_from_python(recipe_file: Path, tmp_path: Path):
    recipe = darseg.load_recipe(recipe_file)
    report = darseg.draw_split(recipe, str(tmp_path / "a"), fraction=0.3, seed=2)
    assert report == json.loads((tmp_path / "a" / "split.json").read_text()) and report["fraction"] == "3/10"
    assert darseg.draw_split(recipe, tmp_path / "a", fraction=Fraction(3, 10), seed=2) == report
    assert darseg.draw_split(recipe, tmp_path / "b", count=3, seed=2)["lists"] == report["lists"]


def test_a_pool_of_one_image(data: Path, tmp_path: Path):
    for path in [*(data / "images").rglob("*.png")][1:]:
        path.unlink()
    with refused(RecipeError, "0 of 1 images"):
        draw_split(folder_recipe(data), tmp_path / "out", fraction="1/2")


def test_real_frames(shared: Path, tmp_path: Path):
    """CamVid: in a balanced eighth, each class is in as many images as its share, within one or two."""
    recipe = load_recipe(
        REPOSITORY / "recipes" / "camvid_1of8.yaml", [f"data.root={shared / 'data' / 'camvid'}"]
    )
    report = draw_split(recipe, tmp_path / "out", fraction="1/8", balanced=True)
    labeled, unlabeled = (report["lists"][role] for role in ("labeled", "unlabeled"))
    assert (labeled["images"], unlabeled["images"], report["absent"]) == (46, 321, [])
    for name, images in labeled["images_with_class"].items():
        assert abs(images - 46 / 367 * (images + unlabeled["images_with_class"][name])) < 2, name
    drives = draw_split(recipe, tmp_path / "drives", fraction="1/2", sequences="images/([^_]+)_")["lists"]
    assert sorted(drives["labeled"]["sequences"] + drives["unlabeled"]["sequences"]) == [
        "0001TP",
        "0006R0",
        "0016E5",
    ]
    assert drives["labeled"]["images"] in (62, 101, 163)  # of 62, 101 and 204 frames, at most 184
