"""`darseg align`: a network fitted to another place's class mix, the prior a user gives, and what cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import recipe_dict, write_png
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.video import VideoWriter
from darseg.errors import DataError, NumericsError, RecipeError, RunError
from darseg.model.aligned import classifier_bias
from darseg.model.network import NetworkSpec
from darseg.model.predict import predict
from darseg.model.weights import load_network, read_alignment, read_spec, save_network
from darseg.model.windows import Protocol
from darseg.run.adapt import align_network
from darseg.run.build import evaluation_protocol
from darseg.run.media import list_media
from darseg.run.prior import class_shares
from darseg.run.rounds import train
from darseg.run.shots import choose_shots
from wording import refused, says

torch.set_num_threads(1)

NAMES = ("road", "grass", "sign")
SPEC = NetworkSpec(
    "pspnet", "resnet18", 3, 16, head_channels=8, auxiliary=False, class_names=NAMES,
    class_colors=((1, 1, 1), (2, 2, 2), (3, 3, 3)),
)  # fmt: skip
PRIOR = {"sign": 0.4, "road": 0.35, "grass": 0.25}
WANTED = np.array([0.35, 0.25, 0.4])
SIZE = (33, 49)


def save(path: Path, bias: tuple[float, ...] = (0.0, 0.0, 0.0), spec: NetworkSpec = SPEC) -> Path:
    """A network whose classes depend on the image; `bias` favors some of them."""
    torch.manual_seed(1)
    network = spec.build()
    with torch.no_grad():
        network.head.classifier.weight.mul_(8)  # ty: ignore
        classifier_bias(network).copy_(torch.tensor(bias))
    save_network(network.eval(), path, spec)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site_b")
    rng = np.random.default_rng(0)
    for index in range(6):
        coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
        write_png(folder / f"{index}.png", coarse.repeat(8, 0).repeat(8, 1)[: SIZE[0], : SIZE[1]])
    return folder


@pytest.fixture(scope="module")
def network(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that names each class, `sign` too seldom."""
    path = tmp_path_factory.mktemp("networks") / "site_a.safetensors"
    save(path)
    medians = np.median([scores_of(path, file).reshape(3, -1) for file in files_of(images)], axis=(0, 2))
    save(path, tuple((np.array([0.3, 0.3, -0.2]) - medians).tolist()))
    return path


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def scores_of(path: Path, image: Path) -> np.ndarray:
    pixels = torch.from_numpy(read_image(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return load_network(path)(pixels).main[0].numpy()


def shares_of(path: Path, images: Path) -> np.ndarray:
    """Shares of what a network file predicts, without a record or sample: predicted again, counted."""
    network = load_network(path)
    counts = np.zeros(network.classes)
    for file in files_of(images):
        classes = predict(network, read_image(file), Protocol(SIZE, mirror=False)).classes
        counts += np.bincount(classes.ravel(), minlength=network.classes)
    return counts / counts.sum()


def test_the_written_network_predicts_the_wanted_shares(
    network: Path, images: Path, tiny_data: Path, tmp_path: Path
) -> None:
    # One window without its mirror image: nothing is averaged after the softmax, so that a bias is exactly a factor.
    changes = {"evaluation": {"window": SIZE, "mirror": False}}
    recipe = recipe_dict(tiny_data) | changes
    recipe["data"] |= {"classes": list(NAMES)}
    before = shares_of(network, images)
    assert (before > 0.02).all() and np.abs(before - WANTED).max() > 0.05
    adapted = align_network(
        network, images, tmp_path / "b.safetensors", prior=PRIOR, recipe=Recipe.model_validate(recipe)
    )
    assert adapted.path == tmp_path / "b.safetensors" and adapted.doubts == () and adapted.failed == ()
    assert adapted.images == adapted.available == 6
    assert np.allclose(adapted.before, before, atol=1e-3)
    assert np.allclose(adapted.wanted, WANTED) and np.allclose(adapted.alignment.reached, WANTED, atol=1e-3)
    assert np.abs(shares_of(adapted.path, images) - WANTED).max() < 2e-3
    record = read_alignment(adapted.path)
    assert record is not None and np.allclose(record.weights, adapted.alignment.weights)
    assert "6 of 6 images, given" in record.source and read_spec(adapted.path) == SPEC
    plain = load_network(adapted.path, plain=True)
    for key, value in load_network(network).state_dict().items():
        assert torch.equal(plain.state_dict()[key], value)
    assert json.loads(json.dumps(adapted.to_json()))["wanted"] == adapted.wanted.tolist()


def test_weights_that_a_network_has_are_replaced(network: Path, images: Path, tmp_path: Path) -> None:
    first = align_network(network, images, tmp_path / "b.safetensors", prior=[0.3, 0.3, 0.4], strength=0.5)
    assert first.path
    again = align_network(first.path, images, tmp_path / "c.safetensors", prior=PRIOR)
    direct = align_network(network, images, tmp_path / "d.safetensors", prior=PRIOR)
    assert np.array_equal(again.before, direct.before)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_choice_of_images_depends_on_names_alone(images: Path, tmp_path: Path) -> None:
    video = tmp_path / "drive.mp4"
    writer = VideoWriter(video, 5.0)
    for value in range(0, 250, 10):
        writer.add(np.full((32, 48, 3), value, np.uint8))
    writer.close()
    media = list_media([images, video])
    chosen = choose_shots(media, 7, 0)
    backward = choose_shots(media[::-1], 7, 0)
    assert chosen.available == 6 + 25 and len(chosen.chosen) == 7
    assert {shot.id for shot in chosen.chosen} == {shot.id for shot in backward.chosen}
    assert {shot.id for shot in choose_shots(media, 7, 1).chosen} != {shot.id for shot in chosen.chosen}
    fewer = {shot.id for shot in choose_shots(media, 3, 0).chosen}
    assert fewer < {shot.id for shot in chosen.chosen}
    assert len(choose_shots(media, 100, 0).chosen) == 31


def test_videos_and_files_of_one_name_are_taken_together(network: Path, images: Path, tmp_path: Path) -> None:
    video = tmp_path / "drive.mp4"
    writer = VideoWriter(video, 5.0)
    for file in files_of(images):
        writer.add(read_image(file))
    writer.close()
    other = tmp_path / "other"
    shutil.copytree(images, other)
    (other / "broken.png").write_bytes(b"no picture")
    (other / "broken.mp4").write_bytes(b"no video")
    adapted = align_network(network, [images, other, video], tmp_path / "b.safetensors", prior=PRIOR)
    assert adapted.images == 6 + 6 + 6 and adapted.path is not None
    assert len(adapted.failed) == 2 and all("broken" in line for line in adapted.failed)
    few = align_network(network, [images, video], tmp_path / "c.safetensors", prior=PRIOR, limit=5)
    assert few.images == 5 and few.available == 12


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one short round, whose network then names all classes."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(Recipe.model_validate(recipe_dict(tiny_data) | {"rounds": [{"steps": 1}]}), folder)
    path = folder / "round_0" / "network.safetensors"
    spec, zeros = read_spec(path), (0.0,) * 11
    save(path, spec=spec, bias=zeros)
    files = sorted((tiny_data / "images").rglob("*.png"))
    scores = [scores_of(path, file) for file in files]
    save(path, spec=spec, bias=tuple((-np.median(scores, axis=(0, 2, 3))).tolist()))
    return folder


def test_a_run_has_the_shares_of_its_labeled_masks(
    run: Path, tiny_data: Path, call: Callable, tmp_path: Path
) -> None:
    counts = np.zeros(11)
    for name in (tiny_data / "labeled.txt").read_text().split():
        counts += np.bincount(read_label(tiny_data / "labels" / f"{name}.png").ravel(), minlength=256)[:11]
    code, out, error = call("align", run, tiny_data / "images", "--bound", 1000)
    assert code == 0, error
    path = run.with_name("tiny_aligned.safetensors")
    assert path.is_file() and str(path) in out
    lines = [line.split() for line in out[out.index("class ") :].splitlines()[1:12]]
    assert [line[3] for line in lines] == [f"{count / counts.sum():.2%}" for count in counts]
    says(
        out[out.index("Written") :].replace(str(run.parent), "RUNS"),
        "RUNS/tiny_aligned.safetensors",
        "--recipe RUNS/tiny",
    )
    # With the run's recipe the file is predicted by the run's protocol: here all windows of an image, not the whole.
    recipe = ("--recipe", run / "recipe.yaml")
    assert call("predict", path, tiny_data / "images", tmp_path / "p", "--kind", "index", *recipe)[0] == 0
    classes = [read_label(file) for file in sorted((tmp_path / "p" / "index").rglob("*.png"))]
    images = [read_image(file) for file in sorted((tiny_data / "images").rglob("*.png"))]
    protocol = evaluation_protocol(load_recipe(run / "recipe.yaml"))
    for predicted, image in zip(classes, images, strict=True):
        assert np.array_equal(predicted, predict(load_network(path), image, protocol).classes)
    code, _, error = call("align", run, tiny_data / "images")
    assert code == 2
    says(error.replace(str(run.parent), "RUNS"), "tiny_aligned.safetensors", "--out", "--force")
    assert call("align", run, tiny_data / "images", "--bound", 1000, "--force")[0] == 0
    code, _, error = call("align", path, tiny_data / "images", "--out", path, "--force", "--prior", path)
    assert code == 2
    says(error.replace(str(run.parent), "RUNS"), "tiny_aligned.safetensors")


def test_a_shift_is_estimated_from_the_images(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    adapted = align_network(run, tiny_data / "images", tmp_path / "b.safetensors", shift=True)
    assert adapted.shift is not None and np.array_equal(adapted.wanted, adapted.shift.share)
    assert adapted.alignment.bound == 20
    labeled = align_network(run, tiny_data / "images", tmp_path / "c.safetensors")
    assert np.allclose(adapted.shift.trained, labeled.wanted) and labeled.alignment.bound == 5


PRIORS: dict[str, tuple[str, str, list[str]]] = {
    "other names": ("a.json", '{"road": 0.5, "gras": 0.3, "sign": 0.2}', ["gras", "grass"]),
    "missing": ("a.json", '{"road": 0.7, "grass": 0.3}', ["missing: sign"]),
    "negative and text": ("a.yaml", "road: 1.2\ngrass: -0.2\nsign: few\n", ["a.yaml:2", "-0.2", "a.yaml:3", "few"]),
    "nan": ("a.json", '{"road": NaN, "grass": true, "sign": null}', ["nan", "True", "None"]),
    "twice": ("a.yaml", "road: 0.5\ngrass: 0.3\nroad: 0.1\nsign: 0.1\n", ["a.yaml:3", "road", "a.yaml:1"]),
    "twice in JSON": ("a.json", '{"road": 0.5, "grass": 0.3, "road": 0.1, "sign": 0.1}', ["road"]),
    "sum": ("a.json", '{"road": 0.5, "grass": 0.3, "sign": 0.1}', ["0.9", "expected 1"]),
    "percent": ("a.yaml", "{road: 50.5, grass: 29.5, sign: 20}", ["100", "divide"]),
    "all zero": ("a.json", "[0, 0, 0]", ["0"]),
    "too short": ("a.json", "[0.5, 0.5]", ["2 numbers", "expected 3"]),
    "no mapping": ("a.json", '"road"', ["a.json", "share of each class"]),
    "damaged": ("a.yaml", "road: [0.5\n", ["a.yaml:2"]),
    "empty": ("a.json", "", ["a.json"]),
    "too deep": ("a.json", "[" * 100_000, ["a.json", "deep"]),
    "too many digits": ("a.json", '{"road": 1%s, "grass": 1, "sign": 1}' % ("0" * 5000), ["a.json", "digits"]),
    "too large": ("a.json", '{"road": 1%s, "grass": 1, "sign": 1}' % ("0" * 400), ["a.json", "road"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PRIORS)
def test_a_prior_that_cannot_be_used_is_refused(case: str, tmp_path: Path) -> None:
    name, text, facts = PRIORS[case]
    (tmp_path / name).write_text(text)
    with refused(DataError, *facts):
        class_shares(tmp_path / name, NAMES)


def test_a_prior_is_matched_by_name(tmp_path: Path) -> None:
    texts = {
        "a.yaml": "sign: 2e-1\nroad: 0.5\ngrass: 0.3\n",
        "b.json": '{"sign": 200, "road": 500, "grass": 300}',
        "c.json": "[500, 300, 200]",
        "d.yml": "- 0.5\n- 0.3\n- 0.2\n",
        "e.json": '{\t"road": 0.503, "grass": 0.302, "sign": 0.2}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert np.allclose(class_shares(tmp_path / name, NAMES), [0.5, 0.3, 0.2], atol=3e-3), name
    assert np.allclose(class_shares(np.array([0.5, 0.3, 0.2]).tolist(), NAMES), [0.5, 0.3, 0.2])
    (tmp_path / "no.yaml").write_text("no: 0.4\nyes: 0.6\n")
    assert class_shares(tmp_path / "no.yaml", ["no", "yes"]).tolist() == [0.4, 0.6]
    with refused(DataError, "no such file", "missing.json"):
        class_shares("missing.json", NAMES)


def test_zero_for_a_class_that_is_predicted_is_refused(network: Path, images: Path, tmp_path: Path) -> None:
    with refused(DataError, "sign", vary=[r"\d+\.\d+%"]):
        align_network(network, images, tmp_path / "b.safetensors", prior={"road": 1, "grass": 1, "sign": 0})
    assert not list(tmp_path.iterdir())


def test_doubtful_weights_are_not_written_unless_asked(network: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    single = files_of(images)[0]
    adapted = align_network(network, single, out, prior=PRIOR)
    assert adapted.path is None and not out.exists()
    says("\n".join(adapted.doubts), "one image")
    assert align_network(network, single, out, prior=PRIOR, despite_doubts=True).path == out

    silent = save(tmp_path / "silent.safetensors", (100.0, 0.0, 0.0))
    adapted = align_network(silent, images, tmp_path / "c.safetensors", prior=PRIOR, despite_doubts=True)
    assert adapted.path is None and adapted.before.tolist() == [1, 0, 0]
    says("\n".join(adapted.doubts), "one class only")

    weak = align_network(network, images, tmp_path / "d.safetensors", prior=[0.005, 0.005, 0.99], bound=1.2)
    assert weak.path is None
    says("\n".join(weak.doubts), "[1/1.2, 1.2]")


def test_the_command_says_what_it_found_and_what_it_did_not_write(
    network: Path, images: Path, call: Callable, tmp_path: Path
) -> None:
    prior = tmp_path / "prior.json"
    prior.write_text(json.dumps(PRIOR))
    code, out, error = call(
        "align", network, files_of(images)[0], "--prior", prior, "--out", tmp_path / "b.safetensors"
    )
    assert code == 2 and [line.split()[0] for line in out[out.index("class ") :].splitlines()[:4]] == [
        "class",
        *NAMES,
    ]
    says(error[error.index("darseg:") :], "one image", "--despite-doubts")
    code, out, error = call(
        "align",
        network,
        files_of(images)[0],
        "--prior",
        prior,
        "--out",
        tmp_path / "b.safetensors",
        "--despite-doubts",
    )
    assert code == 0 and (tmp_path / "b.safetensors").exists()
    says(
        out[out.index("Shares of") :].replace(str(tmp_path), "TMP"),
        "1 image",
        "TMP/b.safetensors",
        vary=[r"[\d,]+ pixels"],
    )


def test_what_cannot_work_is_refused_before_anything_is_predicted(
    network: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("predicted")

    monkeypatch.setattr("darseg.run.adapt.predict_probabilities", never)
    out = tmp_path / "b.safetensors"
    with refused(RunError, "--prior", "--recipe"):
        align_network(network, images, out)
    with refused(RunError, "--shift", "--recipe"):
        align_network(network, images, out, shift=True)
    with refused(RunError, "--prior", "--shift"):
        align_network(network, images, out, prior=PRIOR, shift=True)
    with refused(RunError, "number of images is 0"):
        align_network(network, images, out, prior=PRIOR, limit=0)
    with refused(RecipeError, "bound: found 1", "strength: found 2"):
        align_network(network, images, out, prior=PRIOR, bound=1, strength=2)
    with refused(RunError, "b.onnx", "b.safetensors"):
        align_network(network, images, tmp_path / "b.onnx", prior=PRIOR)
    with refused(RunError, "is the network to align"):
        align_network(network, images, network, prior=PRIOR, overwrite=True)
    (tmp_path / "folder.safetensors").mkdir()
    with refused(RunError, "is a folder"):
        align_network(network, images, tmp_path / "folder.safetensors", prior=PRIOR)
    (tmp_path / "empty").mkdir()
    with refused(DataError, "no images"):
        align_network(network, tmp_path / "empty", out, prior=PRIOR)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with refused(DataError, "broken.png"):
        align_network(network, tmp_path / "broken.png", out, prior=PRIOR)


def test_a_network_that_has_diverged_is_named(images: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "diverged.safetensors", (float("nan"), 0.0, 0.0))
    with refused(NumericsError, "0.png", "diverged"):
        align_network(path, images, tmp_path / "b.safetensors", prior=PRIOR)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_recipe_of_other_classes_is_refused(
    network: Path, images: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_dict(tiny_data)
    recipe["data"]["classes"] = ["road", "sign", "lawn"]
    with refused(DataError, str(network), "road, sign, lawn", "grass"):
        align_network(network, images, tmp_path / "b.safetensors", recipe=Recipe.model_validate(recipe))


def test_a_network_that_hardly_knows_most_classes_is_not_written(images: Path, tmp_path: Path) -> None:
    """Two of six classes are ever predicted; these could be aligned."""
    torch.manual_seed(2)
    spec = NetworkSpec("pspnet", "resnet18", 6, 16, head_channels=8, auxiliary=False)
    path = save(tmp_path / "weak.safetensors", spec=spec, bias=(0, 0, -100, -100, -100, -100))
    medians = np.median([scores_of(path, file).reshape(6, -1) for file in files_of(images)], axis=(0, 2))
    save(path, spec=spec, bias=(-medians[0], -medians[1], -100, -100, -100, -100))
    adapted = align_network(path, images, tmp_path / "b.safetensors", prior=[30, 30, 10, 10, 10, 10])
    assert adapted.alignment.reachable.sum() == 2 and adapted.path is None
    says("\n".join(adapted.doubts), "of 6 classes, 4", "[1/20, 20]")
    asked = align_network(
        path, images, tmp_path / "b.safetensors", prior=[30, 30, 10, 10, 10, 10], despite_doubts=True
    )
    assert asked.path is None and asked.doubts == adapted.doubts  # there are no weights to write
