"""Data that were moved: a run finds them again, and every command takes their new place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from darseg.config.text import load_recipe
from darseg.errors import DataError, RecipeError, RunError
from darseg.run.build import check_overrides, recipe_of
from darseg.run.evaluate import load_trained
from darseg.run.marks import mark_bad
from wording import refused, says


def test_a_moved_project_finds_its_data(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    moved = tmp_path / "elsewhere" / "p"
    shutil.move(project, moved)
    recipe = recipe_of(moved / "runs" / "tiny")
    assert recipe.data.root == str(moved / "data")
    says(capfd.readouterr().err, str(project / "data"), str(moved / "data"))


def test_data_that_moved_alone_are_found_by_the_recipe_beside(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "data", tmp_path / "new_name")
    recipe = project / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("root: data", f"root: {tmp_path / 'new_name'}"))
    assert recipe_of(project / "runs" / "tiny").data.root == str(tmp_path / "new_name")


def test_other_data_at_the_likely_place_are_not_taken(project: Path, tmp_path: Path) -> None:
    moved = tmp_path / "p"
    shutil.move(project, moved)
    next((moved / "data" / "images").rglob("*.png")).write_bytes(b"of another size")
    assert recipe_of(moved / "runs" / "tiny").data.root == str(project / "data")


def test_any_recipe_nearby_with_the_same_data_section_says_where_they_are(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run, text = project / "runs" / "tiny", (project / "tiny.yaml").read_text()
    (project / "tiny.yaml").unlink()
    for name in ("one", "two"):
        shutil.copytree(project / "data", tmp_path / name)
    shutil.rmtree(project / "data")
    (project / "broken.yaml").write_text("[")
    (project / "other.yaml").write_text(text.replace("labeled.txt", "unlabeled.txt"))
    assert recipe_of(run).data.root == str(project / "data")
    (project / "experiment.yaml").write_text(text.replace("root: data", f"root: {tmp_path / 'one'}"))
    assert recipe_of(run).data.root == str(tmp_path / "one")
    says(capfd.readouterr().err, str(tmp_path / "one"), "experiment.yaml")
    (project / "second.yml").write_text(text.replace("root: data", f"root: {tmp_path / 'two'}"))
    assert recipe_of(run).data.root == str(tmp_path / "one")
    says(
        capfd.readouterr().err, str(tmp_path / "one"), "experiment.yaml", str(tmp_path / "two"), "data.root="
    )


def test_a_place_on_the_command_line_begins_at_the_current_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "runs" / "tiny"
    shutil.move(project / "data", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for recipe in (
        load_recipe(project / "tiny.yaml", ["data.root=moved"]),
        recipe_of(run, ["data.root=moved"]),
        load_trained(run, overrides=["data.root=moved"]).recipe,
        load_trained(
            run / "round_0" / "network.safetensors", 0, ["data.root=moved"], recipe=run / "recipe.yaml"
        ).recipe,
    ):
        assert recipe is not None and recipe.data.root == str(tmp_path / "moved")
    assert recipe_of(run, ["data.root=typo"]).data.root == str(tmp_path / "typo")
    (project / "below").mkdir()  # as 0.2 took it
    assert load_recipe(project / "tiny.yaml", ["data.root=below"]).data.root == str(project / "below")


def test_images_of_moved_data_are_marked(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "data", tmp_path / "moved")
    run, place = project / "runs" / "tiny", [f"data.root={tmp_path / 'moved'}"]
    with pytest.raises(DataError):
        mark_bad(run, ["u/07"])
    assert mark_bad(run, ["u/07"], overrides=place) == ["u/07"]
    with pytest.raises(RecipeError):
        mark_bad(run, ["u/07"], overrides=["seed=1"])


def test_only_the_place_of_data_can_be_given_where_nothing_else_matters(project: Path) -> None:
    run = project / "runs" / "tiny"
    check_overrides(run, ["data.root=x"])
    with refused(RecipeError, "training.batch=2", "data.root=PATH", "evaluation.nonsense"):
        check_overrides(run, ["training.batch=2", "evaluation.nonsense=1", "data.root=x"])
    checkpoint = run / "round_0" / "network.safetensors"
    with refused(RunError, "data.root=x", str(checkpoint), "--recipe"):
        load_trained(checkpoint, overrides=["data.root=x"])


VERBS = {
    "predict": ("image", "out", "data.root=moved"),
    "align": ("image", "data.root=moved", "--out", "out.safetensors"),
    "label": ("image", "out", "data.root=moved"),
    "export": ("out.onnx", "data.root=moved"),
    "evaluate": ("data.root=moved",),
    "report": ("data.root=moved",),
    "view": ("data.root=moved",),
}
"""Command → its arguments after the run folder."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_about_a_run_takes_the_place_of_its_data(
    verb: str, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call
) -> None:
    shutil.move(project / "data", tmp_path / "moved")
    shutil.copy(next((tmp_path / "moved").rglob("*.png")), tmp_path / "image")
    asked = []

    def stop(recipe, overrides=()):
        asked.append(list(overrides))
        raise RunError("stop")

    home = {"report": "darseg.report.facts", "view": "darseg.run.browse"}.get(verb, "darseg.run.evaluate")
    monkeypatch.setattr(f"{home}.recipe_of", stop)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(verb, project / "runs" / "tiny", *VERBS[verb])
    assert (code, err.splitlines()[-1]) == (2, "darseg: stop")
    assert asked == [["data.root=moved"]]
