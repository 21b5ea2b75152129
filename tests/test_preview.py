"""`darseg preview`: a page with exactly what training draws, which trains and changes nothing."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import SIZE, recipe_dict, write_png
from darseg.choices import OnlineMethod
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation
from darseg.data.batches import stream_batches
from darseg.data.classes import IGNORE, ClassSet
from darseg.data.unlabeled import StrongViews, stream_views
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DarsegError, RecipeError, RunError
from darseg.model.weights import load_network, save_network
from darseg.report.gallery import CHECKS
from darseg.report.preview import FRAME, HATCHES, draw_tile, write_preview
from darseg.run.build import build_initial_network, build_networks, manifest_of, spec_of
from darseg.run.marks import mark_bad
from darseg.run.plan import method_of, plan_rounds
from darseg.run.preview import SeenBatch, preview_round
from darseg.run.rounds import train
from darseg.run.seen import TRUTH, Tile
from darseg.run.steps import train as train_step
from darseg.run.streams import feeds_of
from test_report import IMAGE_TRAP, TRAP
from wording import refused, says

ABOVE = 0.12
"""Confidence from which labels count; of 11 classes and a network of few steps, most pixels reach it."""


def rounds_recipe(data: Path, **online: Any) -> dict:
    """A round on labeled images, an online round, and a DARS round."""
    recipe = recipe_dict(data)
    recipe["online"] = {"above": ABOVE, "strong_views": 2} | online
    recipe["rounds"] = [{"steps": 3}, {"steps": 2, "use": "online"}, {"steps": 2, "labeling_ratio": 0.5}]
    return recipe


def write(recipe: dict, folder: Path) -> Path:
    path = folder / "scenes.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """A run folder, and what the label phase of each step got and gave: (round, streamed, batches)."""
    folder, steps = tmp_path_factory.mktemp("previewed"), []

    def recording(recipe: Any, round_: Any, network: Any, *, counts: Any) -> Any:
        method = method_of(recipe, round_, network, counts=counts)

        def label(state: Any, network: Any, streamed: Any, step: int) -> Any:
            labeled = method.label(state, network, streamed, step)
            steps.append([round_.index, streamed, labeled.batches])
            return labeled

        return replace(method, label=label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "method_of", recording)
        train(write(rounds_recipe(tiny_data), folder), folder / "run")
    return folder / "run", steps


def drawn(source: Path, **options: Any) -> list[SeenBatch]:
    return list(preview_round(source, **options).batches)


def pixels_of(batch: SeenBatch, place: int = 0) -> np.ndarray:
    """The tiles at a place of all images, stacked."""
    return np.stack([image.own[place].pixels for image in batch.images])


def as_images(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- exactly what training draws


def test_every_round_shows_what_training_got(trained: tuple[Path, list]) -> None:
    """All streams at all steps, against what the label phase was given; labels of the first online step."""
    run, steps = trained
    for index, count in enumerate((3, 2, 2)):
        trained_on = [step for step in steps if step[0] == index]
        assert len(trained_on) == count
        seen = drawn(run, round_index=index, steps=count)
        for step, (_, streamed, batches) in enumerate(trained_on):
            labeled, *others = [batch for batch in seen if batch.step == step]
            assert tuple(image.id for image in labeled.images) == streamed[0].ids
            assert np.array_equal(pixels_of(labeled), as_images(streamed[0].images))
            assert np.array_equal(pixels_of(labeled, 1), streamed[0].labels.numpy())
            assert len(others) == len(streamed) - 1 == (0 if index == 0 else 1)
            if index == 2:
                assert np.array_equal(pixels_of(others[0]), as_images(streamed[1].images))
                assert np.array_equal(pixels_of(others[0], 1), streamed[1].labels.numpy())
            if index == 1:
                views, images = streamed[1], others[0].images
                assert np.array_equal(pixels_of(others[0]), as_images(views.weak))
                for view in range(2):
                    shown = np.stack([image.views[view][0].pixels for image in images])
                    assert np.array_equal(shown, as_images(views.strong[view]))
                    mixed = np.stack([image.views[view][1].pixels for image in images])
                    assert np.array_equal(mixed, as_images(batches[1 + view].images))
                    labels = np.stack([image.views[view][2].pixels for image in images])
                    if step == 0:  # later the teacher has moved
                        assert np.array_equal(labels, batches[1 + view].labels.numpy())


def test_a_recipe_alone_draws_the_same_positions(tiny_data: Path, tmp_path: Path) -> None:
    """Against streams that are opened here, with the seed (recipe, round, number of the stream)."""
    source = write(rounds_recipe(tiny_data), tmp_path)
    manifest = manifest_of(load_recipe(source))
    how = Augmentation(crop=(49, 65))
    labeled = stream_batches(manifest.labeled, manifest.classes, how, batch_size=2, seed=(3, 1, 0))
    weak = replace(how, blur=False)
    unlabeled = stream_views(
        manifest.unlabeled, weak, StrongViews(), views=2, batch_size=2, seed=(3, 1, 1), truth_every=1
    )
    expected = list(zip(islice(labeled, 2), islice(unlabeled, 2), strict=True))
    seen = drawn(source, round_index=1, steps=2)
    assert [batch.step for batch in seen] == [0, 0, 1, 1]
    for (batch, views), first, second in zip(expected, seen[::2], seen[1::2], strict=True):
        assert np.array_equal(pixels_of(first), as_images(batch.images))
        assert np.array_equal(pixels_of(second), as_images(views.weak))
        for row, image in enumerate(second.images):
            weak_tile, truth = image.own
            assert truth.caption == TRUTH and np.array_equal(truth.pixels, views.truth[row].numpy())
            assert np.array_equal(weak_tile.inside, views.inside[row].numpy())
            for view, (strong, mixed, mixed_truth) in enumerate(image.views):
                top, left, bottom, right = views.boxes[view, row].tolist()
                assert strong.box == mixed.box == ((top, left, bottom, right) if bottom else None)
                box = np.s_[top:bottom, left:right]
                for tile, own in (
                    (mixed, as_images(views.strong[view])),
                    (mixed_truth, views.truth.numpy()),
                ):
                    wanted = own[row].copy()
                    wanted[box] = own[row ^ 1][box]
                    assert np.array_equal(tile.pixels, wanted)
                inside = views.inside[row].numpy().copy()
                inside[box] = views.inside[row ^ 1].numpy()[box]
                assert np.array_equal(mixed.inside, inside)


def test_labels_are_those_of_the_network_the_round_starts_from(trained: tuple[Path, list]) -> None:
    """Against a softmax of the saved network, the threshold, and boxes pasted here."""
    run, _ = trained
    (_, batch) = drawn(run, round_index=1)
    network = load_network(run / "round_0" / "network.safetensors").eval()
    weak = torch.from_numpy(pixels_of(batch)).permute(0, 3, 1, 2)
    with torch.no_grad():
        confidence, classes = network(weak).main.softmax(1).max(1)
    inside = np.stack([image.own[0].inside for image in batch.images])
    wanted = np.where((confidence.numpy() >= ABOVE) & inside, classes.numpy(), IGNORE)
    near = np.abs(confidence.numpy() - ABOVE) < 1e-4  # another order of sums may decide otherwise
    assert ((pixels_of(batch, 1) == wanted) | near).mean() > 0.999
    assert (wanted != IGNORE).mean() > 0.1
    for row, image in enumerate(batch.images):
        assert re.fullmatch(r"label: \d+% of the pixels", image.own[1].caption)
        own = image.own[1].pixels, batch.images[row ^ 1].own[1].pixels
        for strong, mixed, label in image.views:
            top, left, bottom, right = strong.box or (0, 0, 0, 0)
            expected = own[0].copy()
            expected[top:bottom, left:right] = own[1][top:bottom, left:right]
            assert np.array_equal(label.pixels, expected)
            assert (label.pixels[~mixed.inside] == IGNORE).all()
            assert mixed.caption.endswith("no box") == (strong.box is None)


def test_labels_by_mean_probabilities_know_the_labeled_shares(
    trained: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    saved["online"] |= {"align": "probabilities"}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    given: list[Any] = []

    def recording(*arguments: Any, counts: Any) -> Any:
        given.append(counts)
        return method_of(*arguments, counts=counts)

    monkeypatch.setattr(sys.modules["darseg.run.preview"], "method_of", recording)
    drawn(tmp_path / "run", round_index=1)
    labeled = manifest_of(load_recipe(tmp_path / "run" / "recipe.yaml")).labeled
    maps = [np.asarray(Image.open(sample.label)) for sample in labeled]
    wanted = sum(np.bincount(values.ravel(), minlength=256) for values in maps)
    assert given and all(list(counts) == wanted[:11].tolist() for counts in given)


@pytest.mark.parametrize(
    ("online", "captions"),
    [
        ({"mixing": "classmix"}, ["strong view", "mixed", "label"]),
        ({"mixing": "none"}, ["strong view", "label"]),
        ({"method": "mean_teacher"}, ["strong view", "mixed", "most probable class, weight"]),
        ({"method": "classmix"}, ["strong view", "mixed", "most probable class, weight"]),
        ({"labeler": "student"}, ["strong view", "mixed", "label"]),
        ({"aligned": {"ratio": 0.5, "window": 1}, "above": None}, ["strong view", "mixed", "label: 0%"]),
        ({"align": "decisions", "align_window": 1}, ["strong view", "mixed", "label"]),
        ({"align": "probabilities"}, ["strong view", "mixed", "label"]),
        ({"method": "unimatch"}, ["strong view", "mixed", "label"]),
        ({"method": "unimatch_v2"}, ["strong view", "mixed", "label"]),
    ],
)
def test_every_method_and_mixing(
    trained: tuple[Path, list], tiny_data: Path, tmp_path: Path, online: dict, captions: list[str]
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    saved["online"] = {"above": ABOVE} | online
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    batch = drawn(tmp_path / "run", round_index=1)[1]
    images = batch.images
    assert ("accepts nothing in the first 1 steps" in batch.note) == ("aligned" in online)
    for image in images:
        assert len(image.views) == (2 if "unimatch" in online.get("method", "") else 1)
        for view in image.views:
            assert all(tile.caption.startswith(name) for tile, name in zip(view, captions, strict=True))
            assert (view[-1].pixels[~view[-1].inside] == IGNORE).all()
            assert view[-1].pixels[view[-1].inside].min() < 11 or "aligned" in online
    mixes = online.get("mixing") != "none"
    changed = [not np.array_equal(image.views[0][0].pixels, image.views[0][1].pixels) for image in images]
    assert not mixes or any(changed)
    # UniMatch drops about half of the weak view's channels; V2 half of a strong view's, of every second image.
    shares = [
        [
            re.findall(r"(\d+)% of channels dropped", tile.caption)
            for tile in (image.own[0], image.views[0][1])
        ]
        for image in images
    ]
    match online.get("method"):
        case "unimatch":
            assert all(35 <= int(*weak) <= 65 and not mixed for weak, mixed in shares)
        case "unimatch_v2":
            low, high = sorted(int(*mixed) for _, mixed in shares)
            assert low == 0 and 35 <= high <= 65 and not any(weak for weak, _ in shares)
        case _:
            assert shares == [[[], []]] * 2


def test_labels_of_a_second_network_are_not_shown(trained: tuple[Path, list], tmp_path: Path) -> None:
    """It begins with the round; the first network, which is trained, labels for it alone."""
    shutil.copytree(trained[0], tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    saved["online"] = {"method": "cps"}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(saved))
    batch = drawn(tmp_path / "run", round_index=1)[1]
    says(batch.note, "second network")
    assert batch.images and {tile.caption for image in batch.images for view in image.views for tile in view} == {
        "strong view", "mixed", f"mixed {TRUTH}",
    }  # fmt: skip


@pytest.mark.parametrize("name", get_args(OnlineMethod))
def test_feeds_are_known_without_a_network(tiny_data: Path, name: str) -> None:
    """They are those of the method that trains."""
    recipe = load_recipe_of(rounds_recipe(tiny_data, method=name))
    network, _ = build_initial_network(recipe)
    rounds = plan_rounds(recipe, labeled=4, unlabeled=6, fills={0: network.fill})
    for round_ in rounds:
        assert feeds_of(round_) == method_of(recipe, round_, network, counts=[1] * 11).feeds


def load_recipe_of(values: dict) -> Any:
    from darseg.config.recipe import Recipe

    return Recipe.model_validate(values)


def test_padding_is_marked(tiny_data: Path, tmp_path: Path) -> None:
    """Small scales pad; without blur, padding far from the image has the fill color, and no class."""
    recipe = recipe_dict(tiny_data)
    recipe["augmentation"] = {"scale": [0.3, 0.5], "blur": False}
    fill = build_initial_network(load_recipe_of(recipe))[0].fill
    (batch,) = drawn(write(recipe, tmp_path))
    for image in batch.images:
        for tile in image.own:
            assert tile.inside.any() and not tile.inside.all()
        picture, label = image.own
        assert (label.pixels[~label.inside] == IGNORE).all()
        rows, columns = np.nonzero(picture.inside)
        far = np.ones(picture.inside.shape, bool)
        far[max(0, rows.min() - 2) : rows.max() + 3, max(0, columns.min() - 2) : columns.max() + 3] = False
        assert far.any() and (picture.pixels[far] == fill).all()


def test_the_color_of_padding_needs_no_network(tiny_data: Path, tmp_path: Path) -> None:
    """It is that of the network that training builds, also if its weights are a whole network's."""
    recipe = recipe_dict(tiny_data)
    recipe["augmentation"] = {"scale": [0.3, 0.5], "blur": False}
    first = load_recipe_of(recipe)
    network, _ = build_initial_network(first)
    network.mean.fill_(7.0)
    save_network(network, tmp_path / "whole.safetensors", spec_of(first))
    recipe["network"]["weights"] = str(tmp_path / "whole.safetensors")
    source = write(recipe, tmp_path)
    assert build_networks(load_recipe(source))[0][0].fill == (7, 7, 7)
    assert dict(preview_round(source).settings)["padding"] == "color 7, 7, 7 (RGB)"


# --- what is not known


def test_images_without_truth_or_network(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    for name in (tmp_path / "data" / "unlabeled.txt").read_text().split():
        (tmp_path / "data" / "labels" / f"{name}.png").unlink()
    source = write(rounds_recipe(tmp_path / "data"), tmp_path)
    for index in (1, 2):
        preview = preview_round(source, round_index=index)
        assert all(len(image.own) == 1 for image in list(preview.batches)[1].images)
        says("\n".join(preview.notes), "train")


def test_rounds_that_a_run_has_not_reached(trained: tuple[Path, list], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    for name in ("round_0/network.safetensors", "round_2/label.json"):
        (tmp_path / "run" / name).unlink()
    for index, fact in ((1, "round 0"), (2, "round 2")):
        preview = preview_round(tmp_path / "run", round_index=index)
        says("\n".join(preview.notes), fact)
        assert {tile.caption for image in list(preview.batches)[1].images for tile in image.own[1:]} == {
            TRUTH
        }


def test_images_marked_as_bad_are_left_out(trained: tuple[Path, list], tmp_path: Path) -> None:
    """The marks that the round would begin with; nothing is recorded."""
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    shutil.rmtree(run / "round_1")
    (bad,) = {image.id for image in drawn(run, round_index=1)[1].images[:1]}
    mark_bad(run, [bad])
    before = files_of(run)
    shown = {image.id for batch in drawn(run, round_index=1, steps=3)[1::2] for image in batch.images}
    assert len(shown) == 5 and bad not in shown
    assert files_of(run) == before


# --- the page and the command


def test_the_command_writes_one_page_and_changes_nothing_else(
    trained: tuple[Path, list], tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = trained[0], files_of(trained[0])
    monkeypatch.chdir(tmp_path)
    code, out, error = call("preview", run, "--round", "1", "--steps", "2")
    assert (code, error) == (0, "")
    says(out, "preview.html", "round 0")
    assert files_of(run) == before and [path.name for path in tmp_path.iterdir()] == ["preview.html"]
    page = (tmp_path / "preview.html").read_text()
    assert page.count("<figure") == 2 * (2 * 2 + 2 * (3 + 2 * 3))  # of 2 steps with 2 + 2 images
    for text in (
        "49 x 65 pixels",
        "0.5 to 2 times",
        "fixmatch",
        *SCENE_CLASSES.names,
        "nothing to learn",
        "Step 1: unlabeled",
    ):
        assert text in page, text
    assert all(image.id in page for batch in drawn(run, round_index=1) for image in batch.images)
    assert "http://" not in page and "https://" not in page and len(page) < 2_000_000
    # A page of darseg is replaced.
    code, out, error = call("preview", run, "preview.html")
    assert code == 0 and "Step 0: labeled images" in (tmp_path / "preview.html").read_text()


def test_keys_can_be_changed(tiny_data: Path, recipe_file: Path, tmp_path: Path, call: Any) -> None:
    out = tmp_path / "a.html"
    assert call("preview", recipe_file, "training.crop=[33, 33]", out, "seed=5")[0] == 0
    page = out.read_text()
    assert "33 x 33 pixels" in page and ">5</td>" in page


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--round", "3"], ["round 3", "0 to 2"]),
        (["taken.html"], ["taken.html"]),
        (["."], ["folder"]),
        (["a.html", "b.html"], ["a.html", "b.html"]),
        (["training.crop=[48, 65]"], ["training.crop", "49"]),
        (["training.crops=3"], ["training.crops"]),
        (["data.unlabeled=null", "data.labeled=null"], ["unlabeled"]),
    ],
)
def test_what_cannot_be_shown(
    recipe_file: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch, words: list, facts: list
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.html").write_text("mine")
    code, _, error = call("preview", recipe_file, *words)
    assert code == 2 and (tmp_path / "taken.html").read_text() == "mine"
    assert not (tmp_path / "preview.html").exists()
    says(error, *facts)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with refused(RecipeError, "missing.yaml"):
        preview_round(tmp_path / "missing.yaml")
    with refused(RunError, "recipe.yaml"):
        preview_round(tmp_path)


def test_a_run_whose_data_changed(trained: tuple[Path, list], tiny_data: Path, tmp_path: Path) -> None:
    """Its streams would be others; and a foreign run folder may name any folder of this machine."""
    shutil.copytree(tiny_data, tmp_path / "data")
    name = (tmp_path / "data" / "labeled.txt").read_text().split()[0]
    write_png(tmp_path / "data" / "images" / f"{name}.png", np.zeros((*SIZE, 3), np.uint8))
    with refused(RunError, "labeled", str(tmp_path / "data")):
        preview_round(trained[0], overrides=[f"data.root={tmp_path / 'data'}"])
    with refused(RecipeError, "data.root"):
        preview_round(trained[0], overrides=["seed=4"])


def test_damaged_images_are_named(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data" / "images" / "l").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DarsegError, match=r"images/l/\d\d\.png"):
        write_preview(write(recipe_dict(tmp_path / "data"), tmp_path), tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.fixture
def hostile_page(tmp_path: Path) -> Path:
    """The preview of images and classes whose names are HTML."""
    data = tmp_path / "data"
    for name in (IMAGE_TRAP.replace("/", ""), "b"):
        write_png(data / "images" / f"{name}.png", np.full((*SIZE, 3), 99, np.uint8))
        write_png(data / "labels" / f"{name}.png", np.zeros(SIZE, np.uint8))
    recipe = recipe_dict(data)
    recipe["data"] = {"root": str(data), "classes": [TRAP, "b"]}
    recipe["rounds"] = [{"steps": 1}]
    return write_preview(write(recipe, tmp_path), tmp_path / "a.html").out


def test_hostile_names_stay_text(hostile_page: Path) -> None:
    page = hostile_page.read_text()
    assert TRAP not in page and "<img src=x" not in page
    assert "&lt;img src=x" in page and "&lt;script&gt;" in page


def test_the_page_in_a_browser(hostile_page: Path, visit: Any) -> None:
    """Nothing runs or is fetched but the page's own script, which enlarges pictures."""
    visited = visit(hostile_page.as_uri())
    visited.page.locator("figure img").first.click()
    assert visited.page.locator("dialog[open] img").count() == 1
    assert "what the network sees" in visited.page.title()
    assert not visited.errors and not visited.leaving_the_machine()


def test_how_a_tile_is_drawn() -> None:
    classes = ClassSet(("a", "b"), ((10, 20, 30), (200, 0, 0)))
    label = np.zeros((40, 40), np.uint8)
    label[:10], label[10:20] = 1, IGNORE
    inside = np.ones((40, 40), bool)
    inside[30:] = False
    picture = draw_tile(Tile("", label, inside, box=(2, 3, 8, 9)), classes)

    def colors(rows: slice) -> set[tuple[int, ...]]:
        return {tuple(color) for color in picture[rows, 20:].reshape(-1, 3).tolist()}

    assert colors(np.s_[:10]) == {(200, 0, 0)} and colors(np.s_[20:30]) == {(10, 20, 30)}
    assert colors(np.s_[10:20]) == set(CHECKS) and colors(np.s_[30:]) == set(HATCHES)
    assert tuple(picture[2, 3]) == tuple(picture[7, 8]) == FRAME[0] and tuple(picture[1, 2]) == FRAME[1]
    photograph = np.full((40, 40, 3), 77, np.uint8)
    picture = draw_tile(Tile("", photograph, inside), classes)
    assert colors(np.s_[:30]) == {(77, 77, 77)} and colors(np.s_[30:]) == set(HATCHES)
    assert (photograph == 77).all()
