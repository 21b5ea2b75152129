"""Classes are compared by name: networks, recipes, counts and weights whose classes are in another order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import darseg
from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.images import read_image
from darseg.demo.scenes import SCENE_CLASSES, draw_scene
from darseg.errors import WeightsError
from darseg.model.aligned import (
    AlignmentRecord,
    check_folded,
    classifier_bias,
    fold_alignment,
    unfold_alignment,
)
from darseg.model.class_order import class_order, reorder_classes
from darseg.model.network import Network, NetworkSpec
from darseg.model.weights import load_network, read_spec, save_network
from darseg.run.build import build_initial_network
from wording import refused, says

torch.set_num_threads(1)

NAMES = SCENE_CLASSES.names
K = len(NAMES)
ORDER = tuple(np.random.default_rng(1).permutation(K).tolist())
MIXED = tuple(NAMES[k] for k in ORDER)
SPECS = {
    "pspnet": NetworkSpec("pspnet", "resnet18_half", K, output_stride=16, head_channels=16),
    "deeplabv2": NetworkSpec("deeplabv2", "resnet18_half", K, output_stride=16, auxiliary=False),
}
EVERYTHING = ["--method", "global", "--threshold", 0, "--confidence", "fine"]
"""Every pixel is labeled, and there are hardly any ties, which the order of the classes would decide."""

Write = Callable[..., Path]


def drawn(spec: NetworkSpec, seed: int = 0) -> Network:
    """A network with random weights, and a bias with which it predicts all classes of a drawn scene."""
    torch.manual_seed(seed)
    network = spec.build().eval()
    image = torch.from_numpy(draw_scene(7, 7, (65, 97))[0]).permute(2, 0, 1)[None]
    with torch.no_grad():
        bias = classifier_bias(network)
        logits = network(image).main
        last: Any = network.head.last
        last.weight.div_(logits.std())
        bias.copy_((bias - logits.mean(dim=(0, 2, 3))) / logits.std())
    return network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network that knows its classes' names, in the scenes' order."""
    spec = dataclasses.replace(SPECS["pspnet"], class_names=NAMES, class_colors=SCENE_CLASSES.colors)
    save_network(drawn(spec), tmp_path / "n.safetensors", spec)
    return tmp_path / "n.safetensors"


@pytest.fixture
def write(tiny_data: Path, tmp_path: Path) -> Write:
    """Write a recipe whose classes have these names, for the scenes' label maps."""

    def recipe(classes: tuple[str, ...], values: tuple[str, ...] = NAMES, **network: object) -> Path:
        content = recipe_dict(tiny_data)
        content["data"]["classes"] = list(classes)
        content["data"]["label_values"] = dict(enumerate(values)) | {255: "ignore"}
        content["network"] |= {"backbone": "resnet18_half"} | network
        content["evaluation"] = {"window": [65, 81]}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return recipe


def maps(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def in_the_other_order(label: np.ndarray) -> np.ndarray:
    """What a map of the scenes' order is in the mixed order; 255 stays."""
    table = np.full(256, 255)
    table[list(ORDER)] = np.arange(K)
    return table[label]


def test_evaluate_matches_classes_by_name(call, checkpoint: Path, write: Write, tmp_path: Path) -> None:
    scores = {}
    for name, classes in {"same": NAMES, "mixed": MIXED}.items():
        out = tmp_path / f"{name}.json"
        code, _, errors = call("evaluate", checkpoint, "--recipe", write(classes), "--out", out)
        assert code == 0, errors
        scores[name] = json.loads(out.read_text())
    assert list(scores["mixed"]["iou"]) == list(MIXED)
    confusion = np.array(scores["same"].pop("confusion"))
    assert np.array_equal(scores["mixed"].pop("confusion"), confusion[np.ix_(ORDER, ORDER)])
    assert scores["mixed"] == scores["same"]  # by name
    assert len({value for value in scores["same"]["iou"].values() if value}) > 2
    says(errors.splitlines()[0], "n.safetensors", ", ".join(MIXED), "by name")


def test_predict_and_label_follow_the_recipes_order(
    call, checkpoint: Path, write: Write, tiny_data: Path, tmp_path: Path
) -> None:
    images, results = tiny_data / "images" / "u", {}
    for name, classes in {"same": NAMES, "mixed": MIXED}.items():
        recipe = write(classes)
        out = tmp_path / name
        code, _, errors = call(
            "predict", checkpoint, images, out / "p", "--recipe", recipe, "--kind", "index"
        )
        assert code == 0, errors
        code, _, errors = call("label", checkpoint, images, out / "l", "--recipe", recipe, *EVERYTHING)
        assert code == 0, errors
        described = json.loads((out / "l" / "redistribution.json").read_text())
        kept = dict(zip(described["classes"], described["kept"], strict=True))
        counts = dict(zip(described["classes"], described["settings"]["class_counts"], strict=True))
        results[name] = maps(out / "p"), maps(out / "l"), kept, counts
    for same, mixed in zip(results["same"][:2], results["mixed"][:2], strict=True):
        assert same.keys() == mixed.keys() and len(same) == 6
        for name, label in same.items():
            assert len(np.unique(label)) > 2
            assert np.array_equal(mixed[name], in_the_other_order(label))
    assert results["same"][2:] == results["mixed"][2:]


def test_predictions_in_another_order_are_not_kept_among_others(
    call, checkpoint: Path, write: Write, tiny_data: Path, tmp_path: Path
) -> None:
    image = tiny_data / "images" / "u" / "07.png"
    arguments = ("predict", checkpoint, image, tmp_path / "out", "--kind", "index")
    assert call(*arguments, "--recipe", write(NAMES))[0] == 0
    code, _, errors = call(*arguments, "--recipe", write(MIXED), "--existing", "keep")
    assert code == 2
    says(errors.splitlines()[-1], str(tmp_path / "out"), "network", "--existing replace")


def test_align_writes_the_recipes_order(
    call, checkpoint: Path, write: Write, tiny_data: Path, tmp_path: Path
) -> None:
    adapted = {}
    for name, classes in {"same": NAMES, "mixed": MIXED}.items():
        out = tmp_path / f"{name}.safetensors"
        arguments = (
            "align",
            checkpoint,
            tiny_data / "images" / "u",
            "--recipe",
            write(classes),
            "--out",
            out,
        )
        code, _, errors = call(*arguments, "--despite-doubts")
        assert code == 0 and out.exists(), errors
        adapted[name] = load_network(out)
        assert read_spec(out).class_names == classes
    same, mixed = adapted["same"].alignment, adapted["mixed"].alignment
    assert same is not None and mixed is not None
    assert mixed.target == pytest.approx([same.target[k] for k in ORDER], rel=1e-2)
    assert mixed.weights == pytest.approx([same.weights[k] for k in ORDER], rel=1e-2)
    assert len(set(same.weights)) > 2


@pytest.mark.parametrize("architecture", SPECS)
def test_initial_weights_are_matched_by_name(write: Write, tmp_path: Path, architecture: str) -> None:
    spec = dataclasses.replace(SPECS[architecture], class_names=NAMES)
    network = drawn(spec)
    save_network(network, tmp_path / "w.safetensors", spec)
    options = {"architecture": architecture, "weights": str(tmp_path / "w.safetensors")}
    if architecture == "deeplabv2":
        options |= {"head_channels": None}
    begun, source = build_initial_network(load_recipe(write(MIXED, **options)))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (1, 3, 65, 97), np.uint8))
    with torch.no_grad():
        known, now = network(image), begun.eval()(image)
    assert torch.allclose(now.main, known.main[:, list(ORDER)], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(now.main, known.main, rtol=1e-2, atol=1e-2)
    if architecture == "pspnet":
        weights = (model.auxiliary_head.classifier.weight for model in (network, begun))
        old, new = weights
        assert torch.equal(new, old[list(ORDER)])
    says(source, str(tmp_path / "w.safetensors"), ", ".join(MIXED), "by name")


def test_initial_weights_of_other_classes_are_refused(
    call, checkpoint: Path, write: Write, tmp_path: Path
) -> None:
    others = ("ocean", *NAMES[1:])
    recipe = load_recipe(write(others, values=others, weights=str(checkpoint)))
    with refused(
        WeightsError, "n.safetensors", "head.classifier.weight", ", ".join(NAMES), ", ".join(others)
    ):
        build_initial_network(recipe)
    loose = write(others, values=others, weights=str(checkpoint), strict=False)
    begun, source = build_initial_network(load_recipe(loose))
    fresh, _ = build_initial_network(load_recipe(write(others, values=others)))
    says(source, "head.classifier.weight", "random", vary=[r"\d+ tensors"])
    assert torch.equal(begun.head.classifier.weight, fresh.head.classifier.weight)
    assert torch.equal(begun.backbone.conv1.weight, load_network(checkpoint).backbone.conv1.weight)


COMMANDS = {
    "evaluate": ["evaluate", "N", "--recipe", "R"],
    "predict": ["predict", "N", "IMAGES", "OUT", "--recipe", "R"],
    "label": ["label", "N", "IMAGES", "OUT", "--recipe", "R"],
    "align": ["align", "N", "IMAGES", "--recipe", "R"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_classes_are_refused_with_both_lists(
    call, checkpoint: Path, write: Write, tiny_data: Path, tmp_path: Path, command: str
) -> None:
    others = ("ocean", *NAMES[1:])
    places = {"N": checkpoint, "IMAGES": tiny_data / "images" / "u", "OUT": tmp_path / "out"}
    places["R"] = write(others, values=others)
    code, _, errors = call(*(places.get(word, word) for word in COMMANDS[command]))
    assert code == 2
    says(errors, "n.safetensors", ", ".join(NAMES), ", ".join(others))


def test_a_network_without_names_says_so_once(call, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    save_network(drawn(SPECS["pspnet"]), path, SPECS["pspnet"])
    code, printed, errors = call("evaluate", path, "--recipe", write(MIXED))
    assert code == 0 and (printed + errors).count("warning") == 1
    says(errors, "n.safetensors", ", ".join(MIXED))


def test_class_weights_move_with_their_classes(tiny_data: Path) -> None:
    network = drawn(SPECS["pspnet"])
    shares = np.full(K, 1 / K).tolist()
    record = AlignmentRecord(
        weights=np.linspace(0.5, 2, K).tolist(),
        reachable=[k != 3 for k in range(K)],
        target=shares,
        reached=shares,
        strength=1,
        bound=5,
    )
    image = torch.from_numpy(read_image(tiny_data / "images" / "u" / "07.png")).permute(2, 0, 1)[None]
    with torch.no_grad():
        plain = network(image).main
        aligned = fold_alignment(network, record)(image).main
        reorder_classes(network, ORDER)
        check_folded(network, network.alignment)
        assert network.alignment.reachable == tuple(k != 3 for k in ORDER)
        assert torch.allclose(network(image).main, aligned[:, list(ORDER)], atol=1e-4)
        assert torch.allclose(unfold_alignment(network)(image).main, plain[:, list(ORDER)], atol=1e-4)


def test_the_order_by_hand() -> None:
    assert class_order(["a", "b", "c"], ["c", "a", "b"]) == (2, 0, 1)
    assert class_order(["a", "b"], ["a", "b"]) is None


COUNTS = dict(zip(NAMES, range(900, 900 - 70 * K, -70), strict=True))
GIVEN: dict[str, tuple[str, list[str]]] = {
    "double": (json.dumps(COUNTS)[:-1] + ', "sky": 5}', ["sky", "2 times"]),
    "unknown": (json.dumps(COUNTS | {"ocean": 5}), ["ocean", ", ".join(NAMES)]),
    "missing": (json.dumps({k: v for k, v in COUNTS.items() if k != "car"}), ["car", "missing"]),
    "short": (json.dumps([1, 2]), ["2", f"{K} classes"]),
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_counts_by_name_in_any_order(
    call, checkpoint: Path, tiny_data: Path, tmp_path: Path, suffix: str
) -> None:
    given = tmp_path / f"counts{suffix}"
    given.write_text(json.dumps(COUNTS, sort_keys=True) if suffix == ".json" else yaml.safe_dump(COUNTS))
    image = tiny_data / "images" / "u" / "07.png"
    arguments = (
        "label",
        checkpoint,
        image,
        tmp_path / "out",
        "--class-counts",
        given,
        "--labeling-ratio",
        0.5,
    )
    code, _, errors = call(*arguments)
    assert code == 0, errors
    described = json.loads((tmp_path / "out" / "redistribution.json").read_text())
    assert described["settings"]["class_counts"] == list(COUNTS.values())
    assert described["classes"] == list(NAMES)


@pytest.mark.parametrize("kind", GIVEN)
def test_counts_of_other_classes_are_refused(
    call, checkpoint: Path, tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    text, facts = GIVEN[kind]
    (tmp_path / "counts.json").write_text(text)
    image = tiny_data / "images" / "u" / "07.png"
    arguments = ("label", checkpoint, image, tmp_path / "out", "--class-counts", tmp_path / "counts.json")
    code, _, errors = call(*arguments, "--labeling-ratio", 0.5)
    assert code == 2 and not (tmp_path / "out").exists()
    says(errors, "counts.json", *facts)


def test_redistribute_says_or_is_told_the_order_of_the_channels(call, tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(0, 2, (3, 20, 30)).astype(np.float32)
    (tmp_path / "p").mkdir()
    np.save(tmp_path / "p" / "a.npy", scores)
    (tmp_path / "counts.json").write_text(json.dumps({"car": 90, "road": 900, "sign": 10}))
    common = ("--class-counts", tmp_path / "counts.json", "--labeling-ratio", 0.5)
    code, _, errors = call("redistribute", tmp_path / "p", tmp_path / "a", *common)
    assert code == 0
    says(errors, "car, road, sign", "--classes")
    code, _, errors = call(
        "redistribute", tmp_path / "p", tmp_path / "b", *common, "--classes", "road,car,sign"
    )
    assert code == 0 and "note" not in errors
    wanted = darseg.redistribute({"a": scores}, [900, 90, 10], 0.5).labels["a"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b" / "a.png")), wanted)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "a" / "a.png")), wanted)


def test_redistribute_warns_of_probabilities_with_their_number(call, tmp_path: Path) -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (2, 3, 20, 30)).astype(np.float32))
    (tmp_path / "p").mkdir()
    np.save(tmp_path / "p" / "a.npy", torch.softmax(scores[0], 0).numpy())
    np.save(tmp_path / "p" / "b.npy", scores[1].numpy())
    (tmp_path / "counts.json").write_text("[90, 900, 10]")
    common = ("--class-counts", tmp_path / "counts.json", "--labeling-ratio", 0.5)
    code, _, errors = call("redistribute", tmp_path / "p", tmp_path / "a", *common)
    assert code == 0
    says(errors, "warning", "1 of 2", "--probabilities")
    code, _, errors = call("redistribute", tmp_path / "p", tmp_path / "b", *common, "--probabilities")
    assert code == 2
    says(errors, str(tmp_path / "p" / "b.npy"), "not probabilities", vary=[r"-?\d+\.\d+"])
