"""`darseg suggest`: which images to label next, with reasons and pre-labels, and what cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_png
from darseg.annotate.rasterize import rasterize_folder
from darseg.config.text import load_recipe
from darseg.data.classes import class_set
from darseg.data.encoding import label_encoding
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.manifest import Sample
from darseg.data.maps import write_map
from darseg.demo.scenes import draw_scene
from darseg.errors import DataError, RunError
from darseg.model.network import NetworkSpec
from darseg.model.predict import predict_scores
from darseg.model.uncertain import OTHER_SCALE, UncertainPredictor
from darseg.model.weights import save_network
from darseg.model.windows import Protocol
from darseg.pseudo.suggest import DUPLICATE, Candidates, Described, choose_images, gain_parts
from darseg.report.suggestions import suggest
from darseg.run.build import build_initial_network, spec_of
from darseg.run.directory import digest_path, write_json
from darseg.run.prelabels import SPECK, CocoFile, labelme_content, regions_of, stored_map
from darseg.run.suggestions import percent
from wording import refused, says

torch.set_num_threads(1)


# --- the choice


def described(features: np.ndarray, prefix: str = "u", digests: list[bytes] | None = None) -> Described:
    ids = tuple(f"{prefix}{index}" for index in range(len(features)))
    return Described(ids, np.asarray(features, np.float32), tuple(digests or [name.encode() for name in ids]))


def random_pool(seed: int, images: int = 9, classes: int = 3) -> tuple[Candidates, Described, np.ndarray]:
    rng = np.random.default_rng(seed)
    expected = rng.random((images, classes)) * 1000
    pool = Candidates(described(rng.random((images, 4))), expected, expected * rng.random((images, classes)))
    return pool, described(rng.random((3, 4)), "l"), rng.integers(0, 5000, classes)


def slow_choice(pool: Candidates, labeled: Described, counts: np.ndarray, count: int) -> list[str]:
    """The rule word for word, image by image."""
    unit = {
        name: vector / np.linalg.norm(vector)
        for images in (pool.images, labeled)
        for name, vector in zip(images.ids, images.features.astype(np.float64), strict=True)
    }
    known, near = counts.astype(float), list(labeled.ids)
    everyone = sorted(pool.images.ids)
    left = list(everyone)

    def distance(name: str) -> float:
        return min(float(np.linalg.norm(unit[name] - unit[taken])) for taken in near)

    typical = float(np.median([distance(name) for name in left]))
    known += known.sum() / 1000

    def gain(name: str, known: np.ndarray) -> float:
        at = pool.images.ids.index(name)
        useful = (pool.expected[at] + pool.uncertain[at]) / 2
        return sum(np.log((k + u) / k) for k, u in zip(known, useful, strict=True))

    def score(name: str, known: np.ndarray) -> float:
        nearer = {
            other: distance(other) - float(np.linalg.norm(unit[name] - unit[other])) for other in everyone
        }
        return sum(gain(other, known) * max(0, nearer[other]) for other in everyone)

    chosen: list[str] = []
    while len(chosen) < count:
        possible = [name for name in left if distance(name) > DUPLICATE * typical]
        if not possible:
            break
        best = max(possible, key=lambda name: score(name, known))
        chosen.append(best)
        left.remove(best)
        near.append(best)
        known = known + pool.expected[pool.images.ids.index(best)]
    return chosen


def names(pool: Candidates, labeled: Described, counts: Any, count: int) -> list[str]:
    return [pool.images.ids[pick.index] for pick in choose_images(pool, labeled, counts=counts, count=count)]


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_choice_is_the_rule_word_for_word(seed: int, count: int) -> None:
    pool, labeled, counts = random_pool(seed)
    assert names(pool, labeled, counts, count) == slow_choice(pool, labeled, counts, count)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_images_does_not_matter(seed: int) -> None:
    pool, labeled, counts = random_pool(seed)
    order = np.random.default_rng(seed + 1).permutation(len(pool.images.ids))
    images = pool.images
    shuffled = Candidates(
        Described(
            tuple(images.ids[at] for at in order),
            images.features[order],
            tuple(images.digests[at] for at in order),
        ),
        pool.expected[order],
        pool.uncertain[order],
    )
    turned = Described(labeled.ids[::-1], labeled.features[::-1], labeled.digests[::-1])
    assert names(shuffled, turned, counts, 5) == names(pool, labeled, counts, 5)


@given(st.integers(0, 10_000), st.sampled_from([4, 16, 100]))
@settings(max_examples=25, deadline=None)
def test_larger_pictures_of_the_same_scenes_and_longer_features_change_nothing(
    seed: int, factor: int
) -> None:
    pool, labeled, counts = random_pool(seed)
    larger = Candidates(
        replace(pool.images, features=pool.images.features * 4),
        pool.expected * factor,
        pool.uncertain * factor,
    )
    assert names(larger, labeled, counts * factor, 5) == names(pool, labeled, counts, 5)


pixels_of_classes = st.lists(st.floats(0, 1e9), min_size=3, max_size=3).map(np.array)


@given(pixels_of_classes, pixels_of_classes, pixels_of_classes)
@settings(max_examples=60, deadline=None)
def test_a_gain_is_never_negative_and_never_grows_with_more_labels(
    labeled: np.ndarray, more: np.ndarray, useful: np.ndarray
) -> None:
    parts, later = gain_parts(labeled + 1, useful), gain_parts(labeled + 1 + more, useful)
    assert (later >= 0).all() and (later <= parts).all()
    # Two images together add as much as one after the other.
    both = parts + gain_parts(labeled + 1 + useful, more)
    np.testing.assert_allclose(both, gain_parts(labeled + 1, useful + more), rtol=1e-6, atol=1e-9)


def test_the_image_with_the_class_that_has_few_labels_comes_first() -> None:
    expected = np.array([[900.0, 100, 0], [800, 200, 0], [950, 0, 50], [500, 500, 0]])
    pool = Candidates(described(np.eye(5)[:4]), expected, expected * 0.3)
    labeled = described(np.eye(5)[4:], "l")
    assert names(pool, labeled, [90_000, 9_000, 30], 1) == ["u2"]
    assert names(pool, labeled, [90_000, 30, 9_000], 1) == ["u3"]
    # Once its class is labeled, the others are next.
    assert names(pool, labeled, [90_000, 9_000, 30], 2)[1] == "u3"


def test_an_image_that_stands_for_many_comes_before_a_freak() -> None:
    """All have the same gain; ten resemble each other, one resembles nothing."""
    rng, far = np.random.default_rng(0), np.eye(6)
    crowd = far[0] + 0.3 * rng.random((10, 1)) * far[2] + 0.3 * rng.random((10, 1)) * far[3]
    expected = np.full((11, 2), 100.0)
    pool = Candidates(described(np.concatenate([far[1:2], crowd])), expected, expected)
    first, second = choose_images(pool, described(far[5:], "l"), counts=[50, 50], count=2)
    assert first.index > 0 and first.stands_for == 10
    assert second.index == 0 and second.stands_for == 1 and second.newness == 1


def test_certain_pixels_count_half() -> None:
    expected = np.array([[500.0, 500], [500, 500], [500, 500]])
    pool = Candidates(described(np.eye(4)[:3]), expected, expected * [[0.0], [1], [0.5]])
    (first, second) = choose_images(pool, described(np.eye(4)[3:], "l"), counts=[1000, 1000], count=2)
    assert (first.index, second.index) == (1, 2)
    np.testing.assert_allclose(first.parts, np.log(1 + 500 / 1002))
    np.testing.assert_allclose(second.parts, np.log(1 + 375 / 1502))


@pytest.mark.parametrize("uncertainty", [0.0, 0.5])
def test_near_duplicates_are_not_chosen_twice(uncertainty: float) -> None:
    """Not the same picture, nor one that looks like a chosen or a labeled one; fewer are chosen, if need be."""
    far = np.eye(6)
    features = np.stack([far[0], far[0] + 0.01 * far[5], far[1], far[2], far[3], far[4] + 0.01 * far[0]])
    digests = [b"a", b"b", b"c", b"d", b"d", b"e"]  # 3 and 4 are one picture, whatever their features
    expected = np.full((6, 2), 100.0)
    pool = Candidates(described(features, digests=digests), expected, expected * uncertainty)
    assert names(pool, described(far[4:5], "l"), [10, 10], 6) == ["u0", "u2", "u3"]


def test_the_labeled_picture_itself_is_never_chosen() -> None:
    pool = Candidates(described(np.eye(3)[:2], digests=[b"x", b"y"]), np.ones((2, 2)), np.ones((2, 2)))
    assert names(pool, described(np.eye(3)[2:], "l", [b"x"]), [1, 1], 2) == ["u1"]


def test_images_need_different_ids_and_one_feature_each() -> None:
    with refused(DataError, "2 ids (1 different)", "[2, 3]", "1 digests"):
        Described(("a", "a"), np.zeros((2, 3), np.float32), (b"x",))


# --- the network


SPEC = NetworkSpec("pspnet", "resnet18", 3, 16, head_channels=8, auxiliary=False)
PROTOCOL = Protocol((33, 49))


def network(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    made = SPEC.build().eval()
    with torch.no_grad():
        made.head.classifier.weight.mul_(8)
    return made


def picture(seed: int, size: tuple[int, int] = (40, 52)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]])


def mean_logits(made: Any, image: np.ndarray, protocol: Protocol) -> np.ndarray:
    sums = predict_scores(
        made, np.ascontiguousarray(image), replace(protocol, mirror=False), average="logits"
    )
    return sums.mean(0, image.shape[0]).numpy().astype(np.float64)


@pytest.mark.parametrize("mirror", [True, False])
def test_uncertainty_is_margin_and_disagreement_of_all_views(mirror: bool) -> None:
    own, earlier, image = network(), network(2), picture(3)
    protocol = replace(PROTOCOL, mirror=mirror)
    seen = UncertainPredictor(own, protocol, earlier).predict(image, "image")
    plain, mirrored = mean_logits(own, image, protocol), mean_logits(own, image[:, ::-1], protocol)[..., ::-1]
    scores = (plain + mirrored) / 2 if mirror else plain
    odds = np.exp(scores - scores.max(axis=0))
    probabilities = odds / odds.sum(axis=0)
    decided, ordered = scores.argmax(axis=0), np.sort(probabilities, axis=0)
    views = {
        "mirror": plain.argmax(axis=0) != mirrored.argmax(axis=0),
        "scale": mean_logits(own, image, replace(protocol, scales=(OTHER_SCALE,))).argmax(axis=0) != decided,
        "round": mean_logits(earlier, image, protocol).argmax(axis=0) != decided,
    }
    uncertainty = (1 - (ordered[-1] - ordered[-2]) + np.mean(list(views.values()), axis=0)) / 2
    assert (seen.classes == decided).all()
    assert seen.disagreements == {view: where.mean() for view, where in views.items()}
    assert any(seen.disagreements.values())
    np.testing.assert_allclose(seen.uncertainty, uncertainty, atol=1e-4)
    np.testing.assert_allclose(seen.expected, probabilities.sum(axis=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(seen.uncertain, (probabilities * uncertainty).sum(axis=(1, 2)), rtol=1e-3)
    np.testing.assert_allclose(seen.margin, (ordered[-1] - ordered[-2]).mean(), rtol=1e-4)


def test_a_feature_is_the_mean_of_the_last_feature_map_and_the_same_for_the_mirror_image() -> None:
    made, image = network(), picture(4, (33, 49))
    predictor = UncertainPredictor(made, PROTOCOL)
    with torch.no_grad():
        both = np.stack([image, image[:, ::-1]]).transpose(0, 3, 1, 2)
        last = made.backbone(made.normalize(torch.from_numpy(np.ascontiguousarray(both)))).stage4
    feature = predictor.predict(image, "image").feature
    np.testing.assert_allclose(feature, last.mean(dim=(0, 2, 3)), rtol=1e-4)
    np.testing.assert_array_equal(predictor.feature(image, "image"), feature)
    mirrored = predictor.feature(np.ascontiguousarray(image[:, ::-1]), "image")
    np.testing.assert_allclose(mirrored, feature, rtol=1e-4)
    other = predictor.feature(picture(5, (33, 49)), "image")
    assert np.linalg.norm(other - feature) > 100 * np.linalg.norm(mirrored - feature)


def test_images_before_do_not_change_what_is_seen() -> None:
    predictor, images = UncertainPredictor(network(), None), [picture(1), picture(2, (33, 65))]
    alone = [UncertainPredictor(network(), None).predict(image, "image") for image in images]
    for index in (1, 0, 1):
        again = predictor.predict(images[index], "image")
        for name in ("classes", "uncertainty", "expected", "uncertain", "feature"):
            np.testing.assert_array_equal(getattr(again, name), getattr(alone[index], name))


# --- pre-labels


def nested_map() -> np.ndarray:
    """Rings in each other, a hole at an edge, a diagonal, a line, and specks."""
    label = np.zeros((90, 120), np.uint8)
    rows, columns = np.indices(label.shape)
    radius = np.hypot(rows - 40, columns - 50)
    for k, limit in enumerate((36, 28, 20, 12, 5)):
        label[radius < limit] = (1, 0, 2, 1, 0)[k]
    label[70:, 80:] = 2
    label[80:85, 90:100] = 1
    label[(rows - columns > 30) & (rows > 60)] = 3
    label[3, 80:110] = 3  # a line
    label[10, 10] = 2  # specks
    return label


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """The mean over the classes of the first map."""
    values = []
    for k in np.unique(first):
        values.append(((first == k) & (second == k)).sum() / ((first == k) | (second == k)).sum())
    return float(np.mean(values))


NAMES = ("sky", "road", "car", "pole")


def test_polygons_are_read_back_with_holes_and_regions_in_holes(tmp_path: Path) -> None:
    label = nested_map()
    write_json(tmp_path / "json" / "a.json", labelme_content(label, NAMES, "a.png"))
    rasterize_folder(tmp_path / "json", tmp_path / "labels", classes=NAMES)
    again = read_label(tmp_path / "labels" / "a.png")
    assert iou(label, again) > 0.96
    assert (label[again != label] != 255).all() and (again != 255).all()
    assert again[10, 10] == 0 and label[10, 10] == 2 and SPECK > 1  # specks are left out
    for row, column in ((40, 50), (40, 60), (40, 67), (40, 75), (82, 95)):
        assert again[row, column] == label[row, column]


@pytest.mark.parametrize("index", range(3))
def test_polygons_of_scenes_agree_with_the_map(index: int, tmp_path: Path) -> None:
    label = draw_scene(7, index, (97, 129))[1]
    label[label == 255] = 0
    names = tuple(f"class {k}" for k in range(label.max() + 1))
    write_json(tmp_path / "json" / "a.json", labelme_content(label, names, "a.png"))
    rasterize_folder(tmp_path / "json", tmp_path / "labels", classes=names)
    again = read_label(tmp_path / "labels" / "a.png")
    assert (again == label).mean() > 0.98
    assert len(regions_of(label)[1]) < 60


def test_coco_is_read_back_exactly(tmp_path: Path) -> None:
    classes, coco = class_set(NAMES), CocoFile(class_set(NAMES))
    maps = {"a": nested_map(), "below/b": nested_map().T.copy(), "full": np.full((5, 7), 3, np.uint8)}
    for name, label in maps.items():
        coco.add(Sample(name, Path(f"images/{name}.jpg")), label)
    coco.write(tmp_path / "coco.json")
    done = rasterize_folder(tmp_path / "coco.json", tmp_path / "labels")
    assert done.classes == classes.names
    for name, label in maps.items():
        np.testing.assert_array_equal(read_label(tmp_path / "labels" / f"{name}.png"), label)


ENCODINGS: list[tuple[int, dict[str, Any], int]] = [
    (4, {}, 3),
    (4, {"values": "one_based"}, 4),
    (2, {"values": "binary"}, 255),
    (3, {"values": {7: "sky", 300: "road", 9: "car", 8: "car", 0: "ignore"}}, 300),
    (4, {"format": "color"}, 255),
]


@pytest.mark.parametrize(("count", "given", "largest"), ENCODINGS)
def test_pre_labels_hold_the_values_of_the_recipe(
    count: int, given: dict[str, Any], largest: int, tmp_path: Path
) -> None:
    classes = class_set({name: (40 * k, 255 - k, 9) for k, name in enumerate(NAMES[:count])})
    encoding = label_encoding(classes, **given)
    label = np.arange(12, dtype=np.uint8).reshape(3, 4) % count
    stored = stored_map(label, encoding)
    write_map(tmp_path / "a.png", stored)
    np.testing.assert_array_equal(read_label(tmp_path / "a.png", encoding), label)
    assert stored.max() == largest


def test_shares_in_words() -> None:
    assert [percent(share) for share in (0.0, 0.0004, 0.003, 0.0214, 0.12, 1.0)] == [
        "0.0 %", "<0.1 %", "0.3 %", "2.1 %", "12 %", "100 %",
    ]  # fmt: skip


# --- the command


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_command_writes_everything_and_continues(project: Path, call: Callable[..., Any]) -> None:
    run, out = project / "runs" / "tiny", project / "next"
    write_png(
        project / "data" / "images" / "u" / "07.png", read_image(project / "data" / "images" / "u" / "08.png")
    )
    (project / "data" / "images" / "u" / "09.png").write_bytes(b"no picture")
    write_json(run / "bad_images.json", [{"id": "u/10", "time": 1.0}])
    code, output, errors = call("suggest", run, out, "--count", 3)
    assert code == 0, errors
    chosen = (out / "suggested.txt").read_text().split()
    assert len(chosen) == 3 and set(chosen) <= {"u/07", "u/08", "u/11", "u/12"}
    assert not {"u/07", "u/08"} <= set(chosen)
    assert all(f"{place}. {name}: likely" in output for place, name in enumerate(chosen, 1))
    lines = [
        line
        for line in output.splitlines()
        if (" left" in line and "s left" not in line) or line.startswith("  - ")
    ]
    says("\n".join(lines), "1 unlabeled images are marked as bad", "u/09.png")
    record = json.loads((out / "suggestions.json").read_text())
    assert [image["id"] for image in record["images"]] == chosen and record["looked_at"] == 4
    for image in record["images"]:
        assert image["gain"] == pytest.approx(sum(image["gain_of"].values()))
        assert (
            sum(image["shares"].values())
            == pytest.approx(sum(image["expected"].values()))
            == pytest.approx(1)
        )
    page = (out / "suggestions.html").read_text()
    assert page.count("<figure>") == 12 and all(name in page for name in chosen)
    label = read_label(out / "labels" / f"{chosen[0]}.png")
    rasterize_folder(out / "coco.json", project / "drawn")
    np.testing.assert_array_equal(read_label(project / "drawn" / f"{chosen[0]}.png"), label)
    written = json.loads((out / "labelme" / f"{chosen[0]}.json").read_text())
    assert (
        out / "labelme" / "u" / written["imagePath"]
    ).resolve() == project / "data" / "images" / f"{chosen[0]}.png"
    assert str(project) not in page + json.dumps({**record, "failed": []}) + json.dumps(written)

    first = contents(out)
    (out / "suggested.txt").unlink()
    (out / "labels" / f"{chosen[1]}.png").unlink()
    (out / "labels" / f"{chosen[0]}.png").write_bytes(b"corrected")
    assert call("suggest", run, out, "--count", 3)[0] == 0
    assert contents(out) == {**first, f"labels/{chosen[0]}.png": b"corrected"}
    code, _, errors = call("suggest", run, out, "--count", 2)
    assert code == 2
    says(errors, str(out), "another count")


def test_the_round_before_is_asked_too(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "tiny"
    recipe = load_recipe(project / "tiny.yaml", ["seed=8"])
    earlier = [image.disagreements for image in suggest(run, tmp_path / "first", count=2).images]
    save_network(build_initial_network(recipe)[0], run / "round_1" / "network.safetensors", spec_of(recipe))
    record = json.loads((run / "round_0" / "train.json").read_text())
    record["outputs"] = {"network.safetensors": digest_path(run / "round_1" / "network.safetensors")}
    write_json(run / "round_1" / "train.json", record)
    done = suggest(run, tmp_path / "second", count=2)
    assert all(views.keys() == {"mirror", "scale"} for views in earlier)
    assert all(image.disagreements["round"] > 0 for image in done.images)
    assert any("round before" in reason for image in done.images for reason in image.reasons)
    assert suggest(run, tmp_path / "third", count=2, round_index=0).images[0].disagreements == earlier[0]


def test_what_cannot_be_suggested(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "tiny"
    with refused(RunError, "count is 0"):
        suggest(run, tmp_path / "out", count=0)
    with refused(DataError, "7 images", "only 6"):
        suggest(run, tmp_path / "out", count=7)
    with refused(DataError, "3 images", "only 2"):
        suggest(run, tmp_path / "out", count=3, pool=2)
    with refused(RunError, "network.safetensors is a checkpoint"):
        suggest(run / "round_0" / "network.safetensors", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with refused(RunError, str(tmp_path / "mine"), "other files"):
        suggest(run, tmp_path / "mine", count=2)
    write_json(run / "bad_images.json", [{"id": f"u/{k:02}", "time": 1.0} for k in range(7, 13)])
    with refused(DataError, "all 6 unlabeled images are marked"):
        suggest(run, tmp_path / "out", count=2)
    (run / "round_0" / "train.json").unlink()
    with refused(RunError, "no finished round"):
        suggest(run, tmp_path / "out", count=2)
    assert not (tmp_path / "out").exists()
