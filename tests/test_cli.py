"""The command line as users meet it, the examples of the documents, and real data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import typer
import yaml

import forks
from conftest import REPOSITORY, recipe_dict
from darseg import __version__
from darseg.choices import BuiltInClasses, PredictionKind, ReleasedNetwork, Role
from darseg.cli import app
from darseg.config.text import load_recipe
from darseg.data.classes import BUILT_IN
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import RunError
from darseg.model.release import RELEASED
from darseg.run.evaluate import evaluate
from darseg.run.rounds import train
from wording import refused, says


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe_dict(tiny_data)))
    train(load_recipe(folder / "tiny.yaml", ["rounds=[{steps: 3}]"]), folder / "run")
    return folder / "run"


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # ty: ignore[unresolved-attribute]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_and_option_has_a_help_text(name: str) -> None:
    lines, options = [COMMANDS[name].help], []
    for parameter in COMMANDS[name].params:
        option = ", ".join(part for part in (*parameter.opts, *parameter.secondary_opts))
        assert parameter.help and parameter.help[-1] in ".)", f"{name} {option}: {parameter.help}"
        options.append(option)
        lines.append(f"{option}: {parameter.help}")
    says("\n".join(lines), *options)


def test_version(call) -> None:
    code, out, _ = call("--version")
    assert code == 0 and out == f"darseg {__version__}\n"


def test_a_choice_that_does_not_exist(call, run: Path, tmp_path: Path) -> None:
    code, _, err = call("evaluate", run, "--role", "trial")
    assert code == 2 and all(role in err for role in ("trial", *get_args(Role))) and "Traceback" not in err
    code, _, err = call("predict", run, tmp_path, tmp_path / "out", "--kind", "indices")
    assert code == 2 and all(kind in err for kind in ("indices", *get_args(PredictionKind)))


def test_plan_prints_rounds_and_rates(call, recipe_file: Path) -> None:
    code, out, _ = call("plan", recipe_file, "training.learning_rate=0.01")
    assert code == 0
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()[:4]]
    assert lines[1] == ["0", "-", "-", "1", "6", "4", "0.5 – 2", "0 – 1", "0.01", "0"]
    before = 6 / (6 + 5)  # share of the curve, in steps, before this round
    assert lines[2] == [
        "1",
        "0.4",
        "-",
        "3",
        "5",
        "2 + 2",
        "0.5 – 2",
        f"{before:.4g} – 1",
        f"{0.01 * (1 - before) ** 0.9:.6g}",
        "0",
    ]
    assert lines[3][6:8] == ["0.5 – 2.5", f"{11 / 16:.4g} – 1"]
    facts = ("4 labeled, 6 unlabeled, 3 validation, 0 test", "pspnet, resnet18", "window", "million", "GB")
    below_the_table = "\n".join(out.splitlines()[4:])
    says(below_the_table, *facts, f"at most {3 * 65 * 97 * 6 / 1e6:.0f} MB")


def test_plan_counts_epochs_as_the_method_does(call, recipe_file: Path) -> None:
    code, out, _ = call("plan", recipe_file, "rounds=[{epochs: 10}, {epochs: 10, labeling_ratio: 0.4}]")
    assert code == 0
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()[1:3]]
    assert [row[2:5] for row in rows] == [
        ["10", "1", "10"],
        ["10", "3", "30"],
    ]  # 4 / 4, 6 / 2 steps
    assert rows[1][8] == f"{0.01 * 0.5**0.9:.6g}"


def test_check_of_good_data_shows_class_shares(call, recipe_file: Path) -> None:
    code, out, err = call("check", recipe_file)
    assert code == 0 and "No faults." in out, err
    counts = np.zeros(len(SCENE_CLASSES))
    root = Path(load_recipe(recipe_file).data.root)
    for name in (root / "labeled.txt").read_text().split():
        counts += np.bincount(read_label(root / "labels" / f"{name}.png").ravel(), minlength=256)[
            : len(SCENE_CLASSES)
        ]
    road = next(line for line in out.splitlines() if line.startswith("road"))
    assert road.split()[1] == f"{counts[1] / counts.sum():.4%}"


def test_check_lists_every_fault_at_once(call, tiny_data: Path, recipe_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(tiny_data, root)
    (root / "images" / "l" / "03.png").write_bytes((root / "images" / "l" / "03.png").read_bytes()[:200])
    cv2.imwrite(str(root / "labels" / "l" / "04.png"), np.zeros((5, 5), np.uint8))
    cv2.imwrite(str(root / "labels" / "v" / "00.png"), np.full((65, 97), 77, np.uint8))
    (root / "images" / "u" / "09.png").write_bytes(b"not an image")
    code, _, err = call("check", recipe_file, f"data.root={root}", "training.crop=[50, 65]")
    assert code == 2 and "Traceback" not in err
    paths = ("images/l/03.png", "labels/l/04.png", "labels/v/00.png", "images/u/09.png")
    for fact in ("5 fault(s)", *paths, "5x5", "65x97", "77 (6305 pixels)", "training.crop"):
        assert fact in err


def test_check_warns_of_labels_without_image(
    call, tiny_data: Path, recipe_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "named"
    shutil.copytree(tiny_data, root)
    shutil.copy(root / "labels" / "l" / "03.png", root / "labels" / "l" / "03_gtFine.png")
    code, out, _ = call("check", recipe_file, f"data.root={root}")
    assert code == 0
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    says("\n".join(warnings), "1 label map(s)", str(root / "labels" / "l" / "03_gtFine.png"))


def test_an_image_with_two_roles_is_a_fault(call, tiny_data: Path, recipe_file: Path) -> None:
    code, _, err = call("check", recipe_file, "data.validation=labeled.txt")
    assert code == 2 and "is both labeled and validation" in " ".join(err.split())


def test_evaluate_refuses_overrides_without_effect_and_impossible_windows(call, run: Path) -> None:
    code, _, err = call("evaluate", run, "training.batch=8")
    assert code == 2
    says(err, "training.batch=8", "data.", "evaluation.")
    code, _, err = call("evaluate", run, "evaluation.window=100")
    assert code == 2
    says(err, "evaluation.window", "100 x 100", "97 x 97")
    code, out, _ = call("evaluate", run, "evaluation.scales=[0.5, 1.0]")
    assert code == 0 and "scales [0.5, 1.0]" in out


def test_evaluate_run_and_checkpoint_agree(call, run: Path, recipe_file: Path, tmp_path: Path) -> None:
    code, out, _ = call("evaluate", run, "--out", tmp_path / "a.json")
    assert code == 0 and "windows 65x81" in out
    again = call(
        "evaluate",
        run / "round_0" / "network.safetensors",
        "--recipe",
        run / "recipe.yaml",
        "--out",
        tmp_path / "b.json",
    )
    assert again[0] == 0
    scores, same = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert scores == same
    assert scores["iou"] == json.loads((run / "summary.json").read_text())["rounds"][0]["iou"]


def test_the_choices_are_the_networks_and_classes_that_exist() -> None:
    # `choices` imports nothing slow, so it repeats the keys of these tables.
    assert get_args(ReleasedNetwork) == tuple(RELEASED)
    assert get_args(BuiltInClasses) == tuple(BUILT_IN)


def test_evaluate_takes_changes_of_the_protocol(call, run: Path) -> None:
    changes = ["evaluation.scales=[0.5, 1.0]", "evaluation.mirror=false"]
    code, out, _ = call("evaluate", run, *changes)
    assert code == 0 and "no mirror, scales [0.5, 1.0]" in out
    again = call(
        "evaluate", run / "round_0" / "network.safetensors", "--recipe", run / "recipe.yaml", *changes
    )
    assert again[0] == 0 and again[1].partition("\nclass")[2] == out.partition("\nclass")[2] != ""
    code, _, err = call("evaluate", run, "evaluation.scale=[0.5]")
    assert code == 2 and "evaluation.scales" in err


def test_overrides_with_a_loaded_recipe_are_refused(run: Path) -> None:
    # They would have no effect, and the scores would not show it.
    with refused(RunError, "evaluation.scales=[0.5]", "load_recipe"):
        evaluate(run, load_recipe(run / "recipe.yaml"), overrides=["evaluation.scales=[0.5]"])


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "RUN", "--role", "test"], "data.test"),
        (["evaluate", "RUN", "--round", "5"], "round 5"),
        (["evaluate", "RUN/round_0/network.safetensors"], "--recipe"),
        (["predict", "RUN", "EMPTY", "OUT"], "empty"),
        (["predict", "EMPTY", "EMPTY", "OUT"], "empty"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_calls_exit_with_2_and_no_traceback(
    call, run: Path, tmp_path: Path, arguments: list[str], fact: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = [
        a.replace("RUN", str(run)).replace("EMPTY", str(empty)).replace("OUT", str(tmp_path / "o"))
        for a in arguments
    ]
    code, _, err = call(*filled)
    assert code == 2 and err.startswith("darseg: ") and fact in err and "Traceback" not in err


def test_predict_writes_index_color_and_overlay(call, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    code, _, err = call("predict", run, tiny_data / "images", tmp_path / "out")
    assert code == 0, err
    for path in sorted((tiny_data / "images").rglob("*.png")):
        name = path.relative_to(tiny_data / "images")
        index = read_label(tmp_path / "out" / "index" / name)
        color, overlay = (read_image(tmp_path / "out" / kind / name) for kind in ("color", "overlay"))
        palette = np.array(load_recipe(run / "recipe.yaml") and distinct(), np.uint8)
        assert (color == palette[index]).all()
        blend = 0.55 * color.astype(float) + 0.45 * read_image(path)
        assert np.abs(overlay - blend).max() <= 1


def distinct() -> list[tuple[int, int, int]]:
    from darseg.data.classes import distinct_colors

    return list(distinct_colors(len(SCENE_CLASSES)))


def test_predict_names_unreadable_images_and_does_the_others(
    call, run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    good = (tiny_data / "images" / "u" / "07.png").read_bytes()
    (images / "good.png").write_bytes(good)
    (images / "bad.png").write_bytes(good[: len(good) // 2])
    code, _, err = call("predict", run, images, tmp_path / "out", "--kind", "index")
    assert code == 2 and "1 file(s)" in err and "bad.png" in err
    assert [p.name for p in (tmp_path / "out").rglob("*.png")] == ["good.png"]


def test_the_python_example_runs_and_is_short(recipe_file: Path, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "python.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert len(code.splitlines()) <= 30
    result = forks.python("-c", code, cwd=recipe_file.parent)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 8


def test_the_example_for_other_frameworks_runs() -> None:
    text = (REPOSITORY / "docs" / "redistribute.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    result = forks.python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(40, 60) [")


def test_plan_counts_the_disk_that_labeling_needs(call, recipe_file: Path) -> None:
    assert "at most 0 MB" in call("plan", recipe_file, "labeling.predict_twice=true")[1]


def test_readme_recipe_is_valid(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    (tmp_path / "photos.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))
    recipe = load_recipe(tmp_path / "photos.yaml")
    assert recipe.training.crop == (361, 361) and [config.labeling_ratio for config in recipe.rounds] == [
        None,
        0.4,
        0.65,
    ]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    load_recipe(path)


def test_camvid_recipe_on_the_real_images(shared: Path, tmp_path: Path) -> None:
    """Two short rounds on real frames with the pretrained backbone: it learns, and labels what it knows."""
    pytest.importorskip("timm", reason="timm is an optional extra", exc_type=ImportError)
    recipe = load_recipe(
        REPOSITORY / "recipes" / "camvid_1of8.yaml",
        [
            f"data.root={shared / 'data' / 'camvid'}",
            f"network.weights={shared / 'weights' / 'efficientnet_lite0_in1k.pth'}",
            "data.labeled.every=16",  # 23 labeled frames
            "data.unlabeled={list: test.txt, every: 48}",  # 5 other frames
            "data.validation={list: val.txt, every: 25}",  # 5 frames
            "data.test=null",
            "rounds=[{steps: 12}, {steps: 1, labeling_ratio: 0.4}]",
            "labeling.mirror=false",
            "threads=1",
        ],
    )
    summary = train(recipe, tmp_path / "run")
    first = summary["rounds"][0]
    assert (
        first["pixel_accuracy"] > 0.5 and first["iou"]["road"] > 0.4
    )  # guessing the largest class gives 0.29
    truth = json.loads((tmp_path / "run" / "round_1" / "pseudo_scores.json").read_text())
    assert truth["pixel_accuracy"] > first["pixel_accuracy"]  # the confident pixels are right more often


def test_the_recipe_page_shows_every_key_with_its_default(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "recipe.md").read_text()
    defaults = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))
    of_online = (REPOSITORY / "docs" / "online.md").read_text().partition("## The keys\n")[2]
    defaults |= yaml.safe_load(re.search(r"```yaml\n(.*?)```", of_online, re.S).group(1))
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(defaults))
    recipe = load_recipe(tmp_path / "page.yaml").model_dump(mode="json")
    for section, keys in recipe.items():
        if isinstance(keys, dict):
            assert set(defaults[section]) == set(keys), section
    # The page's values are the defaults: leaving them out makes no difference.
    required = {
        "data": {key: defaults["data"][key] for key in ("root", "classes")},
        "rounds": defaults["rounds"],
    }
    required["network"] = {"weights": defaults["network"]["weights"]}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(required))
    assert load_recipe(tmp_path / "short.yaml").model_dump(mode="json") == recipe
