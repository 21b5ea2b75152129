"""The recipe: what is read, what is refused – all at once, with the line and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.config.recipe import WeightsFile
from darseg.config.text import dump_recipe, load_recipe, recipe_differences
from darseg.errors import RecipeError

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


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


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


def test_a_download_needs_its_digest(tmp_path: Path) -> None:
    digest = "0123456789abcdef" * 4
    recipe = load_recipe(write(tmp_path), [f"network.weights={{url: 'https://x.y/z.pth', sha256: {digest}}}"])
    assert recipe.network.weights == WeightsFile(url="https://x.y/z.pth", sha256=digest)
    assert "sha256" in refused(write(tmp_path), "network.weights={url: 'https://x.y/z.pth'}")


def test_all_faults_at_once_with_lines_and_nearest_keys(tmp_path: Path) -> None:
    message = refused(
        write(
            tmp_path,
            """\
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
""",
        )
    )
    for part in (
        "recipe.yaml:1: seed: found -1",
        "recipe.yaml:2: data.classes: missing",
        "recipe.yaml:4: data.clases: unknown key; the nearest known key is data.classes",
        "recipe.yaml:5: network.weights: found None",
        "recipe.yaml:5: network.output_stride: found 4; should be 8 or 16",
        "recipe.yaml:6: traning: unknown key; the nearest known key is training",
        "recipe.yaml:8: training.lerning_rate: unknown key; the nearest known key is training.learning_rate",
        "recipe.yaml:9: training.batch: found 3.5",
        "recipe.yaml:10: training.crop: found 'big'",
        "recipe.yaml:11: training.window: unknown key; it belongs elsewhere: evaluation.window, labeling.window",
        "recipe.yaml:12: rounds: found []; should have at least one entry",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml:1: found nothing"),
        ("- a\n", "recipe.yaml:1: found list"),
        ("data: [\n", "no valid YAML"),
        ("seed: 1\nseed: 2\n", "recipe.yaml:2: seed is given twice, first at recipe.yaml:1"),
        ("a: b: c\n", "recipe.yaml:1: no valid YAML"),
    ],
)
def test_texts_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(write(tmp_path, text))


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert "no such recipe" in refused(tmp_path / "nowhere.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "UTF-8" in refused(tmp_path / "image.yaml")
    assert "a folder, not a recipe" in refused(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch", "should be section.key=value"),
        ("rounds.7.steps=3", "there is no rounds.7"),
        ("training.batch=yes", "override training.batch=yes: training.batch: found True"),
        ("training.batch=1", "greater than or equal to 2"),
        ("training.batch=3", "training.half_batch"),
        ("augmentation.scale=[2, 1]", "the first should be the smaller"),
        ("labeling.method=global", "needs a confidence threshold"),
        ("labeling.threshold=0.5", "takes no threshold"),
        ("rounds.0.labeling_ratio=0.5", "takes no ratio"),
        ("rounds.1={steps: 5}", "needs a labeling_ratio"),
        ("rounds.1.labeling_ratio=1.5", "less than or equal to 1"),
        ("rounds.1.labeling_ratio=0", "greater than 0"),
        ("rounds.1={epochs: 5, labeling_ratio: 0.4}", "one unit for all"),
        ("rounds.0.epochs=5", "either epochs or steps"),
        ("rounds.0.span=[1, 0]", "the first should be the smaller"),
        ("data.classes=[road]", "between 2 and 255"),
        ("data.classes=[road, road]", "given twice: road"),
        ("data.classes={road: [1, 2], tree: [1, 2, 3]}", "three numbers"),
        ("data.classes=[road, yes]", "quote names"),
        ("data.ignore=1", "which is class 1"),
        ("data.labeled={every: 2, except_every: 2}", "should have one"),
        ("network.weights=null", '"none"'),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.micro_batch=3", "found 3; should divide training.batch, 16"),
        ("training.micro_batch=5", "found 5; should divide training.half_batch, 8"),
        ("network={weights: none, architecture: deeplabv2, head_channels: 64}", "deeplabv2 has no such head"),
        (
            "network={weights: none, architecture: deeplabv2, auxiliary_weight: 0.4}",
            "deeplabv2 has no such head",
        ),
        ("network.weights={url: 'https://a/b', sha256: 1234567}", "8 to 64 hex digits"),
        ("data.label_values=gray", "should be one of index, one_based"),
        ("data.label_values={}", "in {0: ignore, 255: crack}"),
        ("data.label_values={-1: road}", "-1 is no label value"),
        ("data.label_values={0: [1]}", "0: [1] should be a class, by name or index, or ignore"),
        ("data.label_colors=[1]", "should be class: [[red, green, blue]"),
        ("data.label_colors={road: [1, 2, 3]}", "road: should be a list of colors"),
    ],
)
def test_values_that_cannot_work(tmp_path: Path, override: str, message: str) -> None:
    assert message in refused(write(tmp_path), override)


def test_quirks_that_a_backbone_cannot_have(tmp_path: Path) -> None:
    # The plan would say that stage 4 learns faster, and nothing of it would happen.
    network = "network={weights: none, architecture: deeplabv2, backbone: timm/resnet18}"
    assert "belongs to a ResNet of darseg" in refused(write(tmp_path), network, "release_quirks=true")
    assert not load_recipe(tmp_path / "recipe.yaml", [network]).release_quirks


def test_a_fault_that_an_override_mends_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("photos", "photos\n  ignore: 1"))
    assert "recipe.yaml:3: data.ignore" in refused(path)
    assert load_recipe(path, ["data.ignore=254"]).data.ignore == 254


def test_global_rounds_have_no_ratio(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path), ["labeling={method: global, threshold: 0.9}", "rounds=[{steps: 1}, {steps: 1}]"]
    )
    assert recipe.labeling.threshold == 0.9
    assert "left out" in refused(tmp_path / "recipe.yaml", "labeling={method: global, threshold: 0.9}")


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
