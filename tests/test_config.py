"""The recipe: what is read, and what is refused – all faults at once, with lines and nearest keys."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.config.text import dump_recipe, load_recipe, load_saved_recipe, recipe_differences
from darseg.config.values import WeightsFile
from darseg.errors import RecipeError
from darseg.run.build import check_sizes, evaluation_protocol, labeling_protocol, spec_of
from darseg.run.remedies import less_to_predict
from wording import refused

SMALL = """\
data:
  root: photos
  classes: [road, tree]
network:
  weights: none
rounds:
  - {steps: 10}
  - {steps: 10, labeling_ratio: 0.4}
"""


def write(folder: Path, text: str = SMALL) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["network.weights=weights/r.pth"])
    assert recipe.data.root == str((tmp_path / "photos").resolve())
    assert recipe.network.weights == str((tmp_path / "weights" / "r.pth").resolve())
    assert load_recipe(tmp_path / "recipe.yaml").network.weights == "none"


def test_short_forms(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path),
        [
            "training.crop=361",
            "labeling.window=[65, 97]",
            "data.validation=val.txt",
            "training.learning_rate=1e-3",
        ],
    )
    assert recipe.training.crop == (361, 361) and recipe.labeling.window == (65, 97)
    assert recipe.data.validation is not None and recipe.data.validation.list == "val.txt"
    assert recipe.training.learning_rate == 0.001


def test_windows_that_are_whole_images(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["evaluation.window=whole", "training.crop=65"])
    assert evaluation_protocol(recipe).window == "whole" and labeling_protocol(recipe).window == (65, 65)
    (tmp_path / "saved.yaml").write_text(dump_recipe(recipe))
    assert load_saved_recipe(tmp_path / "saved.yaml") == recipe
    check_sizes(recipe, spec_of(recipe).build())
    advice = less_to_predict(recipe, "evaluation", evaluation_protocol(recipe))
    assert "evaluation.window=[65, 65] (now whole images)" in advice
    with refused(RecipeError, "labeling.window", "wide"):
        load_recipe(tmp_path / "recipe.yaml", ["labeling.window=wide"])


def test_a_download_needs_its_digest(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    recipe = load_recipe(write(tmp_path), [f"network.weights={{url: 'https://x.y/z.pth', sha256: {digest}}}"])
    assert recipe.network.weights == WeightsFile(url="https://x.y/z.pth", sha256=digest)
    with refused(RecipeError, "network.weights", "url", "sha256"):
        load_recipe(write(tmp_path), ["network.weights={url: 'https://x.y/z.pth'}"])


def test_all_faults_at_once_with_lines_and_nearest_keys(tmp_path: Path) -> None:
    text = """\
seed: -1
data:
  root: x
  clases: camvid
network: {weights: ~, output_stride: 4}
traning: {}
training:
  lerning_rate: 0.1
  batch: 3.5
  crop: big
  window: 5
rounds: []
"""
    facts = (
        "recipe.yaml:1: seed: found -1",
        "recipe.yaml:2: data.classes: ",
        "recipe.yaml:4: data.clases: unknown key; the nearest known key is data.classes",
        "recipe.yaml:5: network.weights: found None",
        "recipe.yaml:5: network.output_stride: found 4; should be 8 or 16",
        "recipe.yaml:6: traning: unknown key; the nearest known key is training",
        "recipe.yaml:8: training.lerning_rate: unknown key; the nearest known key is training.learning_rate",
        "recipe.yaml:9: training.batch: found 3.5",
        "recipe.yaml:10: training.crop: found 'big'",
        "recipe.yaml:11: training.window: unknown key",
        "evaluation.window, labeling.window",
        "recipe.yaml:12: rounds: found []",
    )
    with refused(RecipeError, *facts):
        load_recipe(write(tmp_path, text))


def test_a_value_instead_of_keys_is_told_the_keys(tmp_path: Path) -> None:
    with refused(RecipeError, "training.teacher: found 0.9; should be keys with values", "decay, result"):
        load_recipe(write(tmp_path), ["training.teacher=0.9"])


def test_a_fault_in_the_only_round_is_the_only_fault(tmp_path: Path) -> None:
    with refused(RecipeError, "rounds.0.use: found 'offline'; should be 'online' or 'labeled'\n"):
        load_recipe(write(tmp_path), ["rounds=[{steps: 1, use: offline, crop: no}]"])


def test_all_conflicts_at_once_with_their_sections(tmp_path: Path) -> None:
    overrides = [
        "data.ignore=1",
        "data.test={every: 2, except_every: 2}",
        "network.architecture=deeplabv2",
        "network.head_channels=64",
        "augmentation.scale=[2, 1]",
        "training.recompute=true",
        "training.compile=true",
        "training.batch=3",
        "labeling.threshold=0.5",
        "rounds.0.labeling_ratio=0.5",
        "rounds.1.span=[1, 0]",
    ]
    keys = ("data.ignore", "data.test", "network.head_channels", "augmentation.scale", "training.recompute")
    keys += ("training.batch", "labeling.threshold", "rounds.0.labeling_ratio", "rounds.1.span")
    with refused(RecipeError, *(f": {key}: " for key in keys)):
        load_recipe(write(tmp_path), overrides)


NO_RECIPES = {
    "": ["recipe.yaml:1", "nothing", "data, network"],
    "- a\n": ["recipe.yaml:1", "list", "data, network"],
    "data: [\n": ["recipe.yaml", "YAML"],
    "seed: 1\nseed: 2\n": ["recipe.yaml:2: seed", "recipe.yaml:1"],
    "a: b: c\n": ["recipe.yaml:1", "YAML"],
}


@pytest.mark.parametrize("text", NO_RECIPES)
def test_texts_that_are_not_recipes(tmp_path: Path, text: str) -> None:
    with refused(RecipeError, *NO_RECIPES[text]):
        load_recipe(write(tmp_path, text))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("start", "facts"),
    [
        (LAUGHS, ["100000 values", "alias"]),
        ("z: &z [*z]\n", ["recipe.yaml:1", "50 deep"]),
        ("z: " + "[" * 3000 + "]" * 3000 + "\n", ["recipe.yaml", "50 deep"]),
        ("z: " + "[" * 100 + "]" * 100 + "\n", ["recipe.yaml:1", "50 deep"]),
        ("# \a\n", ["character 3", "U+0007"]),
        ("seed: " + "9" * 5000 + "\n", ["recipe.yaml:1", "5000 characters"]),
        ("seed: " + "1:" * 3000 + "1\n", ["recipe.yaml"]),
        ("seed: 0b" + "2" * 50 + "\n", ["recipe.yaml"]),
        ("z: !!binary x\n", ["recipe.yaml:1"]),
        ("z: !!python/object/apply:os.getcwd []\n", ["recipe.yaml:1"]),
        ("#" * (1 << 20) + "\n", ["bytes", "1,048,576"]),
    ],
    ids=[
        "laughs",
        "circle",
        "3000",
        "100",
        "control",
        "digits",
        "base_60",
        "binary",
        "base64",
        "python",
        "large",
    ],
)
def test_texts_that_ask_for_too_much_are_refused(tmp_path: Path, start: str, facts: list[str]) -> None:
    """At once, and by a message: an alias of an alias stands for billions of values in a few lines."""
    began = time.process_time()
    with refused(RecipeError, *facts, vary=[r"1,048,\d+ bytes"]):
        load_recipe(write(tmp_path, start + SMALL))
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "override",
    [
        "seed=18446744073709551616",
        'data.root="a\\0b"',
        "data.root=" + "a" * 5000,
        "data.root=~no_such_user_here/x",
        "network.weights=" + "a" * 300,
        'network.weights={url: "http://[::1", sha256: "0000000000000000"}',
        "network.weights={url: 'http://example.org/n.pth', sha256: '000000000000000'}",
        "data.labeled=" + "ü" * 200,
    ],
    ids=["seed", "nul", "long", "user", "weights", "url", "http", "list"],
)
def test_overrides_that_no_system_takes_are_refused(tmp_path: Path, override: str) -> None:
    with refused(RecipeError, override.partition("=")[0].rpartition(".")[2]) as caught:
        load_recipe(write(tmp_path), [override])
    assert len(str(caught.value)) < 6000


def test_aliases_in_a_recipe_work(tmp_path: Path) -> None:
    text = SMALL.replace("{steps: 10}", "&r {steps: 7}").replace("{steps: 10, labeling_ratio: 0.4}", "*r")
    with refused(RecipeError, "rounds.1"):  # the second round lacks its labeling ratio
        load_recipe(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with refused(RecipeError, f"{tmp_path}/nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with refused(RecipeError, f"{tmp_path}/image.yaml", "UTF-8"):
        load_recipe(tmp_path / "image.yaml")


def test_a_folder_in_place_of_a_recipe(tmp_path: Path) -> None:
    with refused(RecipeError, str(tmp_path), "folder", "darseg init", "recipe.yaml"):
        load_recipe(tmp_path)


IMPOSSIBLE = {
    "training.batch": ["override training.batch", "section.key=value"],
    "rounds.7.steps=3": ["rounds.7"],
    "training.batch=yes": ["override training.batch=yes: training.batch", "True"],
    "training.batch=1": ["training.batch", "1", "2"],
    "training.batch=3": ["training.batch", "3", "training.half_batch"],
    "augmentation.scale=[2, 1]": ["augmentation.scale", "[2.0, 1.0]"],
    "labeling.method=global": ["labeling.threshold", "global"],
    "labeling.threshold=0.5": ["labeling.threshold", "dars"],
    "rounds.0.labeling_ratio=0.5": ["rounds.0.labeling_ratio"],
    "rounds.1={steps: 5}": ["rounds.1", "labeling_ratio", "dars"],
    "rounds.1.labeling_ratio=1.5": ["rounds.1.labeling_ratio", "1.5"],
    "rounds.1.labeling_ratio=0": ["rounds.1.labeling_ratio", "found 0"],
    "rounds.1={epochs: 5, labeling_ratio: 0.4}": ["rounds: ", "epochs", "steps"],
    "rounds.0.epochs=5": ["rounds.0", "epochs", "steps"],
    "rounds.0.span=[1, 0]": ["rounds.0.span", "[1.0, 0.0]"],
    "data.classes=[road]": ["data.classes", "1", "2 to 255"],
    "data.classes=[road, road]": ["data.classes", ": road"],
    "data.classes={road: [1, 2], tree: [1, 2, 3]}": ["data.classes", "'road'", "0 to 255"],
    "data.classes=[road, yes]": ["data.classes", "quote"],
    "data.ignore=1": ["data.ignore", "class 1 of 2"],
    "data.labeled={every: 2, except_every: 2}": ["data.labeled", "every", "except_every"],
    "network.weights=null": ["network.weights", '"none"'],
    "training.learning_rate=.nan": ["training.learning_rate"],
    "training.half_batch=1": ["training.half_batch", "1", "2", "training.one_pass"],
    "training={dynamic_loss: {method: dst}, one_pass: false}": ["training.one_pass", "training.dynamic_loss"],
    "training.pseudo_batch=0": ["training.pseudo_batch", "0"],
    "training.dynamic_loss={method: dst, gamma_disagreed: 5.0}": [
        "training.dynamic_loss.gamma_disagreed",
        "dmt",
    ],
    "training.micro_batch=3": ["training.micro_batch", "3", "training.batch", "16"],
    "training.micro_batch=5": ["training.micro_batch", "5", "training.half_batch", "8"],
    "network={weights: none, architecture: deeplabv2, head_channels: 64}": [
        "network.head_channels",
        "deeplabv2",
    ],
    "network={weights: none, architecture: deeplabv2, auxiliary_weight: 0.4}": [
        "network.auxiliary_weight",
        "deeplabv2",
    ],
    "network.weights={url: 'https://a/b', sha256: 1234567}": ["sha256", "8 to 64 hex digits"],
    "data.label_values=gray": ["data.label_values", "index, one_based"],
    "data.label_values={}": ["data.label_values", "{0: ignore, 255: crack}"],
    "data.label_values={-1: road}": ["data.label_values", "-1", "0 to 65535"],
    "data.label_values={0: [1]}": ["data.label_values", "0: [1]"],
    "data.label_colors=[1]": ["data.label_colors", "[[red, green, blue]"],
    "data.label_colors={road: [1, 2, 3]}": ["data.label_colors", "road", "[[0, 0, 0], [255, 255, 255]]"],
}


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_values_that_cannot_work(tmp_path: Path, override: str) -> None:
    with refused(RecipeError, *IMPOSSIBLE[override]):
        load_recipe(write(tmp_path), [override])


CONTRADICTIONS = {
    "data.label_values=one_based & data.ignore=7": ["data.ignore", "data.label_values"],
    "data.label_format=index & data.label_colors={road: [[1, 2, 3]]}": ["data.label_colors"],
    "data.label_format=color & data.label_values=one_based": ["data.label_values", "color"],
    "data.sbd=folder": ["data.sbd", "voc", "folders"],
    "data.layout=voc & data.images=a & data.labels=b": ["data.images", "data.labels", "voc"],
    "data.layout=cityscapes & data.test={labels: a}": ["data.test.labels", "cityscapes"],
    "labeling={keep_predictions: true, predict_twice: true}": ["labeling.predict_twice"],
    "labeling={method: cbst, sampling: none}": ["labeling.sampling", "dars", "cbst"],
    "training={recompute: true, compile: true}": ["training.recompute", "training.compile"],
    "rounds.0.epoch_over=labeled": ["rounds.0.epoch_over", "steps"],
    "rounds.1.scale=[2, 1]": ["rounds.1.scale", "[2.0, 1.0]"],
}


@pytest.mark.parametrize("overrides", CONTRADICTIONS)
def test_keys_that_do_not_work_together(tmp_path: Path, overrides: str) -> None:
    with refused(RecipeError, *CONTRADICTIONS[overrides]):
        load_recipe(write(tmp_path), overrides.split(" & "))


def test_a_run_of_one_round_has_no_half_batches(tmp_path: Path) -> None:
    changes = ["rounds=[{steps: 1}]", "training.batch=3", "training.micro_batch=3"]
    assert load_recipe(write(tmp_path), changes).training.batch == 3


def test_quirks_that_a_backbone_cannot_have(tmp_path: Path) -> None:
    # The plan would say that stage 4 learns faster, but it would not.
    network = "network={weights: none, architecture: deeplabv2, backbone: timm/resnet18}"
    with refused(RecipeError, "release_quirks", "network.backbone", "timm/resnet18"):
        load_recipe(write(tmp_path), [network, "release_quirks=true"])
    assert not load_recipe(tmp_path / "recipe.yaml", [network]).release_quirks


def test_an_override_can_fix_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("photos", "photos\n  ignore: 1"))
    with refused(RecipeError, "recipe.yaml:3: data.ignore", "1"):
        load_recipe(path)
    assert load_recipe(path, ["data.ignore=254"]).data.ignore == 254


def test_global_rounds_have_no_ratio(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path), ["labeling={method: global, threshold: 0.9}", "rounds=[{steps: 1}, {steps: 1}]"]
    )
    assert recipe.labeling.threshold == 0.9
    with refused(RecipeError, "rounds.1.labeling_ratio", "global"):
        load_recipe(tmp_path / "recipe.yaml", ["labeling={method: global, threshold: 0.9}"])


def test_spans_are_those_of_the_release(tmp_path: Path) -> None:
    rounds = "rounds=[{epochs: 200}, {epochs: 200, labeling_ratio: 0.4}, {epochs: 200, labeling_ratio: 0.65}]"
    assert load_recipe(write(tmp_path), [rounds]).spans() == [(0, 1), (1 / 2, 1), (2 / 3, 1)]
    rounds = "rounds=[{steps: 30}, {steps: 10, labeling_ratio: 0.4, span: [0.1, 0.9]}, {steps: 40, labeling_ratio: 1}]"
    assert load_recipe(write(tmp_path), [rounds]).spans() == [(0, 1), (0.1, 0.9), (0.5, 1)]


def test_differences_name_each_key(tmp_path: Path) -> None:
    old = load_recipe(write(tmp_path))
    new = load_recipe(write(tmp_path), ["training.batch=8", "rounds.1.labeling_ratio=0.5"])
    assert recipe_differences(old, old) == []
    assert recipe_differences(old, new) == ["rounds.1.labeling_ratio: 0.4 → 0.5", "training.batch: 16 → 8"]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    rate=st.floats(1e-12, 1e6),
    scale=st.tuples(st.floats(0.01, 1), st.floats(1, 10)),
    ratio=st.floats(0.001, 1),
    names=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True),
    mirror=st.booleans(),
)
def test_a_saved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rate: float,
    scale: tuple[float, float],
    ratio: float,
    names: list[str],
    mirror: bool,
) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load_recipe(write(folder))
    changed = recipe.model_copy(
        update={
            "seed": seed,
            "training": recipe.training.model_copy(update={"learning_rate": rate}),
            "augmentation": recipe.augmentation.model_copy(update={"scale": scale, "mirror": mirror}),
            "data": recipe.data.model_copy(update={"classes": tuple(names)}),
            "rounds": (recipe.rounds[0], recipe.rounds[1].model_copy(update={"labeling_ratio": ratio})),
        }
    )
    (folder / "saved.yaml").write_text(dump_recipe(changed), encoding="utf-8")
    assert load_recipe(folder / "saved.yaml") == changed
