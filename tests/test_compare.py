"""Experiments: read, designed, refused, planned, run, killed and resumed."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import forks
from conftest import REPOSITORY, recipe_dict
from darseg.config.experiment import load_experiment
from darseg.config.recipe import RoundConfig
from darseg.config.text import dump_recipe
from darseg.data.files import write_whole
from darseg.errors import DataError, RecipeError, RunError
from darseg.experiment import work
from darseg.experiment.check import check_images
from darseg.experiment.compare import compare
from darseg.experiment.controls import rounds_of, without_effectless
from darseg.experiment.design import Design, design_of
from darseg.experiment.folder import ExperimentFolder
from darseg.experiment.ledger import Ledger
from darseg.experiment.plan import plan_experiment
from darseg.run.directory import RunDirectory
from wording import refused, says

pytestmark = pytest.mark.usefixtures("small_network")

PAGES = ("compare.html", "compare.json", "compare.csv", "compare.md")

TEST = ("l/06",)
"""An image that is labeled in conftest's data, and serves as the test image here."""


@pytest.fixture
def experiment(tiny_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an experiment on the tiny data: two rounds, three labeled images, one test image."""

    def write(changes: dict[str, Any] | None = None, **keys: Any) -> Path:
        recipe = recipe_dict(tiny_data)
        recipe["rounds"] = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4}]
        labeled = (tiny_data / "labeled.txt").read_text().split()
        (tmp_path / "three.txt").write_text("\n".join(name for name in labeled if name not in TEST) + "\n")
        (tmp_path / "test.txt").write_text("\n".join(TEST) + "\n")
        recipe["data"] |= {"labeled": str(tmp_path / "three.txt"), "test": str(tmp_path / "test.txt")}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        content = {
            "recipe": "tiny.yaml",
            "changes": changes or {},
            "variants": [{"name": "dars"}],
            "seeds": [0],
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return path

    return write


def designed(path: Path, lists: str = "lists") -> Design:
    return design_of(load_experiment(path), path.parent / lists)


def ids(path: Path) -> set[str]:
    """The images of a list, as images/ID.png labels/ID.png."""
    return {Path(line.split()[0]).with_suffix("").as_posix() for line in path.read_text().splitlines()}


# Reading.


def test_faults_of_an_experiment_come_at_once_with_their_lines(tmp_path: Path, experiment) -> None:
    path = experiment()
    path.write_text(
        "recipe: tiny.yaml\nseeds: [0, 1, 0]\nlabels: [2, {count: 1, unlabeled: u.txt}, 2]\n"
        "controls: {steps: false, seconds: true}\n"
        "variants:\n- {name: dars}\n- {name: a b}\n- {name: Dars}\n- {name: control_1}\n"
    )
    facts = (
        "experiment.yaml:2",
        "seeds.2",
        "labels.1.unlabeled",
        "labels.2",
        "variants.1.name",
        "variants.2.name",
    )
    with refused(RecipeError, *facts, "variants.3.name", "controls.seconds"):
        load_experiment(path)
    path.write_text("recipe: tiny.yaml\nvariant: []\n")
    with refused(RecipeError, "experiment.yaml:2", "variant", "variants"):
        load_experiment(path)


def test_variants_that_cannot_be_compared_are_refused_with_the_key(experiment) -> None:
    path = experiment(
        variants=[
            {"name": "validation", "changes": {"data.validation": "labeled.txt"}},
            {"name": "test", "changes": ["data.test=null"]},
            {"name": "classes", "changes": {"data.classes": ["a", "b"]}},
            {"name": "fewer", "changes": {"data.labeled": {"list": "labeled.txt", "every": 2}}},
            {"name": "seed", "changes": {"seed": 3}},
            {"name": "typo", "changes": {"labeling.metod": "cbst"}},
            {"name": "good", "changes": {"labeling.method": "cbst"}},
        ]
    )
    facts = (
        "data.validation.list: validation.txt → labeled.txt",
        "data.test",
        "data.classes",
        "data.labeled",
        "seed",
        "labeling.metod",
    )
    with refused(RecipeError, *facts) as caught:
        load_experiment(path)
    assert "good" not in str(caught.value)


def test_changes_reach_the_recipes(experiment, tmp_path: Path) -> None:
    path = experiment(
        {"training.batch": 6}, variants=[{"name": "a"}, {"name": "b", "changes": ["training.batch=8"]}]
    )
    file = load_experiment(path, ["changes.threads=2", "seeds=[4, 5]"])
    assert [file.recipes[name].training.batch for name in "ab"] == [6, 8]
    assert file.base.threads == 2 and file.settings.seeds == (4, 5)
    here = load_experiment(experiment({"data.root": "elsewhere"}))
    assert here.base.data.root == str((tmp_path / "elsewhere").resolve())


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_experiments_of_the_repository_can_be_read(path: Path) -> None:
    if path.stem.endswith("_recipe"):
        return
    file = load_experiment(path)
    for name, recipe in file.recipes.items():
        steps = [planned.steps for planned in rounds_of(recipe, labeled=24, unlabeled=100)]
        assert all(steps), name


# Designing.


def test_counts_are_drawn_nested_and_the_others_are_unlabeled(
    experiment, tiny_data: Path, tmp_path: Path
) -> None:
    path = experiment(labels=[1, 2, 3], seeds=[0, 1])
    design = designed(path)
    for seed in (0, 1):
        one, two = (tmp_path / "lists" / f"{count}_seed_{seed}" for count in (1, 2))
        labeled = [ids(folder / "labeled.txt") for folder in (one, two)]
        assert [len(names) for names in labeled] == [1, 2] and labeled[0] < labeled[1]
        pool = {f"images/{name}" for name in (tmp_path / "three.txt").read_text().split()}
        unlabeled = {f"images/{name}" for name in (tiny_data / "unlabeled.txt").read_text().split()}
        assert ids(two / "unlabeled.txt") == unlabeled | (pool - labeled[1])
    assert {trial.labels for trial in design.trials} == {1, 2, 3}
    by_labels = {
        trial.labels: trial for trial in design.trials if trial.variant == "dars" and trial.seed == 1
    }
    assert [by_labels[count].unlabeled for count in (1, 2, 3)] == [8, 7, 6]
    again = designed(path)  # the lists are there already
    assert [trial.name for trial in again.trials] == [trial.name for trial in design.trials]
    with refused(RecipeError, "labels.0", "4", "3"):
        designed(experiment(labels=[4]))


def test_controls_see_labels_alone_for_as_many_steps_and_images(experiment) -> None:
    online = {"online.batch": 6, "rounds": [{"steps": 4}, {"steps": 6, "use": "online"}]}
    path = experiment(
        variants=[
            {"name": "dars"},
            {"name": "cbst", "changes": {"labeling.method": "cbst"}},
            {"name": "fixmatch", "changes": online},
            {"name": "wide", "changes": {"network.head_channels": 24}},
            {"name": "longer", "changes": {"rounds": [{"steps": 9}]}},
            {"name": "faster", "changes": {"training.learning_rate": 0.1, "rounds": [{"steps": 4}]}},
        ],
        controls={"seconds": True},
    )
    design = designed(path)
    controls = {arm.name: dict(arm.controls) for arm in design.arms}
    # Two rounds of 2 steps; half of a batch of 4 is labeled.
    assert controls["dars"] == {
        "steps": "control_4_steps",
        "images": "control_4_steps",
        "seconds": "control_seconds_of_dars",
    }
    assert controls["cbst"] | {"seconds": ""} == controls["dars"] | {"seconds": ""}
    # 4 steps of 4 images, then 6 steps of 2 + 6: 64 images, 16 steps of 4.
    assert (controls["fixmatch"]["steps"], controls["fixmatch"]["images"]) == (
        "control_10_steps",
        "control_16_steps",
    )
    # Another network is another control.
    assert controls["wide"]["steps"] == "control_4_steps_of_wide"
    # Labels alone are compared with the base recipe on labels alone, or are that themselves.
    assert controls["longer"] == {} and controls["faster"]["steps"] == "control_4_steps"
    trials = {trial.variant: trial for trial in design.trials}
    assert trials["fixmatch"].images == trials["control_16_steps"].images == 64
    assert trials["control_4_steps_of_wide"].recipe.network.head_channels == 24
    for name, trial in trials.items():
        if name.startswith("control"):
            assert len(trial.rounds) == 1 and not trial.rounds[0].labels and trial.rounds[0].online is None
    timed = {"control_seconds_of_dars", "control_seconds_of_cbst", "control_seconds_of_fixmatch"}
    assert set(design.seconds_controls.values()) == timed | {"control_seconds_of_wide"}
    assert Counter(trial.name for trial in design.trials).most_common(1)[0][1] == 1


def test_a_variant_may_run_with_some_seeds_and_numbers_of_labels(experiment, tmp_path: Path) -> None:
    longer = {"name": "longer", "changes": {"rounds": [{"steps": 4}, {"steps": 2, "labeling_ratio": 0.4}]}}
    some = {"name": "some", "changes": {"labeling.method": "cbst"}, "seeds": [1], "labels": [2]}
    content = {"labels": [1, 2], "seeds": [0, 1], "controls": {"images": False}, "all_labels": True}
    design = designed(experiment(variants=[some, longer | {"labels": [2]}], **content))
    names = [
        "control_6_steps/2_seed_0",
        "longer/2_seed_0",
        "all_labels/9_seed_0",
        "control_4_steps/2_seed_1",
        "control_6_steps/2_seed_1",
        "some/2_seed_1",
        "longer/2_seed_1",
        "all_labels/9_seed_1",
    ]
    assert [trial.name for trial in design.trials] == names
    assert [(arm.name, arm.labels) for arm in design.arms] == [
        ("control_4_steps", 2),
        ("control_6_steps", 2),
        ("some", 2),
        ("longer", 2),
        ("all_labels", 9),
    ]
    # A finished run that is left out later would vanish from the page.
    folder = ExperimentFolder(tmp_path / "out")
    for trial in design.trials:
        write_whole(folder.recipe(trial.name), dump_recipe(trial.recipe))
        write_whole(folder.counts(trial.name, "validation"), "{}")
    folder.check_runs({trial.name: trial.recipe for trial in design.trials})
    fewer = designed(experiment(variants=[some, longer | {"labels": [2], "seeds": [0]}], **content))
    with refused(RunError, str(folder.root), "longer/2_seed_1: is finished"):
        folder.check_runs({trial.name: trial.recipe for trial in fewer.trials})
    with refused(
        RecipeError, "variants.0.seeds", "found 3", "[0, 1]", "variants.1.labels.1", "2 is given twice"
    ):
        load_experiment(
            experiment(variants=[some | {"seeds": [1, 3]}, longer | {"labels": [2, 2]}], **content)
        )
    with refused(RecipeError, "variants.1.labels (longer)", "found 3", "1, 2"):
        designed(experiment(variants=[some, longer | {"labels": [3]}], **content))


def test_the_control_of_networks_in_turns_is_a_recipe_of_labels_alone(experiment) -> None:
    """It has no keys of pseudo labels, so it is that of the base recipe."""
    turns = {
        "training.half_batch": 1,
        "training.pseudo_batch": 3,
        "training.dynamic_loss": {"method": "dmt"},
        "labeling.method": "cbst",
        "rounds": [
            {"steps": 2, "labeled_part": [0.0, 0.7]},
            {"steps": 2, "use": "labeled", "continues": "none"},
            {"steps": 2, "labeling_ratio": 0.4, "labels_from": 0, "continues": 1},
        ],
    }
    design = designed(experiment(variants=[{"name": "dars"}, {"name": "dmt", "changes": turns}]))
    controls = {arm.name: dict(arm.controls) for arm in design.arms}
    assert controls["dmt"] == {"steps": "control_6_steps", "images": "control_6_steps"}
    assert {trial.variant for trial in design.trials} == {"dars", "dmt", "control_4_steps", "control_6_steps"}
    for trial in design.trials:
        assert not list(trial.recipe.conflicts()), trial.name
    # The best of several rounds of labels alone is still the result.
    recipe = next(trial.recipe for trial in design.trials if trial.variant == "control_6_steps")
    kept = recipe.result.model_copy(update={"keep": "best"})
    for rounds, keep in ((1, "last"), (2, "best")):
        rounds_alone = (RoundConfig(steps=2, use="labeled"),) * rounds
        several = recipe.model_copy(update={"rounds": rounds_alone, "result": kept})
        assert without_effectless(several).result.keep == keep


def test_first_rounds_are_shared_if_they_are_the_same(experiment) -> None:
    rounds = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4}, {"steps": 2, "labeling_ratio": 0.6}]
    path = experiment(
        variants=[
            {"name": "dars"},
            {"name": "cbst", "changes": {"labeling.method": "cbst"}},
            {"name": "third", "changes": {"rounds": rounds}},
            {"name": "rate", "changes": {"training.learning_rate": 0.5}},
            {"name": "continued", "changes": {"rounds": [{"steps": 4}, {"steps": 1, "labeling_ratio": 0.4}]}},
            {"name": "scored", "changes": {"evaluation.mirror": False}},
            {
                "name": "dst",
                "changes": {"training.dynamic_loss": {"method": "dst"}, "training.pseudo_batch": 3},
            },
        ],
        labels=[2, 3],
    )
    design = designed(path)
    sources = {name.partition("/3")[0]: source for name, source in design.sources.items() if "/3" in name}
    shared = {name: (source.name, source.rounds) for name, source in sources.items()}
    assert shared["cbst"] == ("dars/3_seed_0", 1) and shared["third"] == ("dars/3_seed_0", 2)
    assert shared["continued"] == ("control_4_steps/3_seed_0", 1)
    assert shared["scored"] == ("dars/3_seed_0", 2)
    assert shared["dst"] == ("dars/3_seed_0", 1)
    assert dict(design.arms[-1].controls) == {"steps": "control_4_steps", "images": "control_5_steps"}
    assert "rate" not in shared and "dars" not in shared
    order = [trial.name for trial in design.trials]
    assert all(order.index(source.name) < order.index(name) for name, source in design.sources.items())


def test_the_ceiling_has_all_labels(experiment) -> None:
    design = designed(experiment(labels=[1], all_labels=True))
    (ceiling,) = (trial for trial in design.trials if trial.variant == "all_labels")
    assert ceiling.labels == 1 + 8 and ceiling.steps == 4 and len(ceiling.rounds) == 1
    assert [arm.labels for arm in design.arms if arm.kind == "ceiling"] == [9]


# Refusing.


def test_held_out_images_that_are_trained_on_are_refused(experiment, tiny_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    trained = data / "images" / "u" / "09.png"
    shutil.copy(trained, data / "images" / "again.png")
    shutil.copy(data / "labels" / "u" / "09.png", data / "labels" / "again.png")
    (data / "test.txt").write_text("again\n")
    path = experiment({"data.root": str(data), "data.test": "test.txt"})
    with refused(DataError, "data.test", str(data / "images" / "again.png"), str(trained)):
        check_images(designed(path), None)


def test_fewer_than_two_validation_images_are_refused(experiment, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("v/00\n")
    path = experiment({"data.validation": str(tmp_path / "one.txt")})
    with refused(DataError, "data.validation", "1 image(s)", "2"):
        check_images(designed(path), None)


def test_what_was_checked_is_not_read_again(
    experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    design, record = designed(experiment()), tmp_path / "checked.json"
    first = check_images(design, record)
    assert (first.test, first.test_in_validation) == (1, 0)
    monkeypatch.setattr("darseg.experiment.check.read_picture", None)
    assert check_images(design, record) == first


def test_a_folder_goes_on_with_its_own_experiment_and_additions(experiment, tmp_path: Path) -> None:
    folder = ExperimentFolder(tmp_path / "out")
    names = [{"name": "dars"}, {"name": "cbst", "changes": {"labeling.method": "cbst"}}]
    folder.make()
    first = load_experiment(experiment(variants=names))
    assert folder.check(first) == ()
    folder.begin(first)
    added = load_experiment(experiment(variants=[*names, {"name": "global"}], seeds=[0, 1], all_labels=True))
    assert folder.check(added) == ("global",)
    folder.begin(added)
    other = [{"name": "dars", "changes": {"training.batch": 8}}]
    path = experiment({"training.crop": [33, 33]}, variants=other, seeds=[1], labels=[2])
    facts = ("dars", "cbst", "global", "seeds: 0", "training.crop", "all_labels", "labels")
    with refused(RunError, str(folder.root), *facts):
        folder.check(load_experiment(path))
    with pytest.raises(RunError, match="was begun with another experiment"):
        plan_experiment(load_experiment(path), folder.root)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with refused(RunError, str(tmp_path / "mine"), "experiment.yaml"):
        ExperimentFolder(tmp_path / "mine").make()


def test_a_run_is_never_taken_for_one_of_another_recipe(experiment, tmp_path: Path) -> None:
    """Variants that come first later: a control keeps its name, and a ceiling of other steps is refused."""
    wide = {"name": "wide", "changes": {"network.head_channels": 24}}
    folder = ExperimentFolder(tmp_path / "out")
    before = designed(experiment(variants=[wide], all_labels=True))
    for trial in before.trials:
        write_whole(folder.recipe(trial.name), dump_recipe(trial.recipe))
    after = designed(experiment(variants=[{"name": "dars"}, wide], all_labels=True))
    controls = {arm.name: arm.controls[0][1] for arm in after.arms if arm.kind == "variant"}
    assert controls == {"dars": "control_4_steps", "wide": "control_4_steps_of_wide"}
    folder.check_runs({trial.name: trial.recipe for trial in after.trials})
    longer = {"name": "longer", "changes": {"rounds": [{"steps": 9}]}}
    after = designed(experiment(variants=[longer, wide], all_labels=True))
    with refused(RunError, str(folder.root), "all_labels/9_seed_0: rounds.0.steps: 4 → 9"):
        folder.check_runs({trial.name: trial.recipe for trial in after.trials})


def test_a_folder_is_begun_when_nothing_is_wrong_with_the_experiment(experiment, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("v/00\n")
    folder = ExperimentFolder(tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.validation has 1 image"):
        compare(experiment({"data.validation": str(tmp_path / "one.txt")}), folder.root, console=_quiet())
    folder.make()
    assert folder.check(load_experiment(experiment())) == ()


def test_rounds_of_a_run_that_failed_before_it_began_are_not_waited_for(
    experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial, *_), folder, reused = designed(experiment()).trials, ExperimentFolder(tmp_path / "out"), []
    write_whole(folder.recipe(trial.name), dump_recipe(trial.recipe))
    monkeypatch.setattr(work, "train", lambda recipe, out, reuse, console: reused.append(reuse))
    monkeypatch.setattr(work, "score_run", lambda *_: ("", None))
    monkeypatch.setattr(work, "save_counts", lambda *_: None)
    source = tmp_path / "source"
    work.perform(folder, trial.name, "train", reuse=str(source))
    write_whole(source / "recipe.yaml", "")
    work.perform(folder, trial.name, "train", reuse=str(source))
    assert reused == [None, str(source)]


def test_a_ledger_with_a_torn_line_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", console=_quiet())
    ledger.begun("a/1_seed_0", "train", None)
    ledger.failed("a/1_seed_0", "train", "no luck")
    ledger.failed("b/1_seed_0", "test", "no matter")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"time": 9, "event": "begun", "trial": "a/1_se')
    assert ledger.failures() == {"a/1_seed_0": "no luck"}
    ledger.begun("a/1_seed_0", "train", None)
    assert ledger.failures() == {}


def _quiet() -> Any:
    from rich.console import Console

    return Console(quiet=True)


# Running.


def run(out: Path, path: Path, *words: object, jobs: int = 1, kill: str = "0", **environment: str) -> Any:
    """`darseg compare`, see comparing.py."""
    script = REPOSITORY / "tests" / "comparing.py"
    return forks.python(script, out, jobs, kill, path, *words, **environment)


def outcome(out: Path) -> dict[str, bytes]:
    """What an experiment leaves that does not depend on the time: pages, networks, counts, recipes and lists."""
    kept = ("network.safetensors", "_counts.json", ".yaml", ".txt", *PAGES)
    files = (path for path in out.rglob("*") if path.is_file() and path.parent.parent.name != "logs")
    return {
        path.relative_to(out).as_posix(): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in files
        if path.name.endswith(kept)
    }


@pytest.fixture(scope="module")
def compared(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An experiment of two runs, and its folder after an undisturbed call."""
    folder = tmp_path_factory.mktemp("compared")
    recipe = recipe_dict(tiny_data)
    recipe["rounds"] = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4}]
    recipe["evaluation"] = {"mirror": False}
    (folder / "three.txt").write_text("l/03\nl/04\nl/05\n")
    (folder / "test.txt").write_text("l/06\n")
    recipe["data"] |= {"labeled": str(folder / "three.txt"), "test": str(folder / "test.txt")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    content = {"recipe": "tiny.yaml", "variants": [{"name": "dars"}], "seeds": [0], "labels": [2]}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    ended = run(folder / "once", folder / "experiment.yaml")
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return folder / "experiment.yaml", folder / "once"


def test_killed_three_times_it_gives_the_same(compared: tuple[Path, Path], tmp_path: Path) -> None:
    path, once = compared
    out = tmp_path / "out"
    # Lines of the ledger: opened; begun and finished for each of two runs; then the same for their test images.
    kills = [run(out, path, kill="2"), run(out, path, kill="term 2"), run(out, path, kill="3")]
    assert [killed.returncode for killed in kills] == [-9, 143, -9], [killed.stderr for killed in kills]
    ended = run(out, path)
    assert ended.returncode == 0, ended.stderr
    assert outcome(out) == outcome(once)
    assert {*PAGES, "runs/dars/2_seed_0/test_counts.json", "lists/2_seed_0/labeled.txt"} <= outcome(
        out
    ).keys()
    calls = [json.loads(line)["event"] for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert calls.count("opened") == 4 and calls.count("finished") == 2 and calls.count("tested") == 2


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    compared: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = compared
    out = shutil.copytree(compared[1], tmp_path / "out")
    for counts in out.glob("runs/*/*/*_counts.json"):
        counts.unlink()
    broken = "{name: broken, changes: {training.learning_rate: 1.0e+30, rounds: [{steps: 4}]}}"
    ended = run(
        out, path, f"variants=[{{name: dars}}, {broken}]", jobs=2, TRIAL_KILLED="control_4_steps/2_seed_0"
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "broken, 2 labels, seed 0: The loss or the gradient is not finite" in ended.stderr
    assert "control_4_steps, 2 labels, seed 0: its process was killed" in ended.stderr
    assert "1 of 3 runs are finished" in ended.stdout
    assert (out / "runs" / "dars" / "2_seed_0" / "validation_counts.json").is_file()


def test_the_test_images_are_scored_when_all_runs_are_finished(
    compared: tuple[Path, Path], tmp_path: Path
) -> None:
    """Also in a folder that was copied, whose lists are elsewhere now."""
    path, once = compared
    out = shutil.copytree(once, tmp_path / "out")
    for counts in (*out.rglob("test_counts.json"), out / "runs/dars/2_seed_0/validation_counts.json"):
        counts.unlink()
    ended = run(out, path, TRIAL_KILLED="dars/2_seed_0")
    assert ended.returncode == 2 and not list(out.rglob("test_counts.json")) and "--test" in ended.stderr
    assert run(out, path, "--test", TRIAL_KILLED="dars/2_seed_0").returncode == 2
    assert [file.parent.parent.name for file in out.rglob("test_counts.json")] == ["control_4_steps"]
    shutil.copy(once / "runs/dars/2_seed_0/validation_counts.json", out / "runs/dars/2_seed_0")
    ended = run(out, path, TRIAL_KILLED="dars/2_seed_0")
    assert ended.returncode == 2 and "test images of some runs are not scored" in ended.stderr
    assert "Test images of 1 of 2 finished runs are scored" in (out / "compare.json").read_text()
    assert run(out, path).returncode == 0
    counts = {name: content for name, content in outcome(once).items() if name.endswith("_counts.json")}
    assert counts == {name: content for name, content in outcome(out).items() if name in counts}


def test_evidence_goes_to_another_machine_without_networks(
    compared: tuple[Path, Path], tmp_path: Path, call
) -> None:
    """The page is the same there, nothing is trained again, and further runs are."""
    path, once = compared
    archive, out = tmp_path / "evidence" / "tiny.json.gz", tmp_path / "there"

    def evidence(task: str, folder: Path, *changes: str) -> Any:
        return forks.python(REPOSITORY / "scripts" / "evidence.py", task, path, folder, archive, *changes)

    kept = evidence("keep", once)
    assert kept.returncode == 0, kept.stderr
    content = archive.read_bytes()
    assert evidence("keep", once).returncode == 0 and archive.read_bytes() == content
    assert str(tmp_path.parent).encode() not in gzip.decompress(content)
    assert evidence("unpack", out).returncode == 0
    assert not list(out.rglob("*.safetensors"))
    ended = run(out, path)
    assert ended.returncode == 0, ended.stderr
    assert not list(out.rglob("*.safetensors"))
    assert (out / "compare.json").read_bytes() == (once / "compare.json").read_bytes()
    # A later variant trains its first round itself: the network that has it is not there.
    cbst = "{name: cbst, changes: {labeling.method: cbst}}"
    ended = run(out, path, f"variants=[{{name: dars}}, {cbst}]")
    assert ended.returncode == 0, ended.stderr
    networks = {file.relative_to(out / "runs").parts[0] for file in out.rglob("network.safetensors")}
    assert networks == {"cbst"}
    refusal = evidence("unpack", tmp_path / "other", "changes.training.batch=6")
    assert refusal.returncode == 1 and "dars/2_seed_0: trained with another recipe" in refusal.stderr
    assert not (tmp_path / "other").exists()
    archive.write_bytes(content[:-9])
    damaged = evidence("unpack", tmp_path / "other")
    assert damaged.returncode == 1 and "is no evidence that was kept here" in damaged.stderr
    assert "Traceback" not in damaged.stderr and not (tmp_path / "other").exists()


def test_a_plan_says_what_is_left(compared: tuple[Path, Path], call) -> None:
    path, once = compared
    code, out, err = call("compare", path, once, "--plan", "seeds=[0, 1]", "controls.seconds=true")
    assert code == 0, err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[:5]}
    # labels, runs, finished, steps, of these shared, images
    assert rows["dars"][:6] == rows["control_4_steps"][:6] == ["2", "2", "1", "4", "0", "16"]
    seconds = {
        name: sum(
            record.seconds
            for index, step in ((0, "train"), (1, "label"), (1, "train"))
            if (record := RunDirectory(once / "runs" / name / "2_seed_0").read_record(index, step))
        )
        for name in ("dars", "control_4_steps")
    }
    steps = int(rows["control_seconds_of_dars"][3]) / 2
    # Rounds of equal settings share their rate, here round 0 of dars and the control, whose few steps vary.
    assert steps == pytest.approx(seconds["dars"] / (seconds["control_4_steps"] / 4), rel=0.6)
    assert "4 runs to do" in out and "finished runs" in out and not (once / "lists" / "2_seed_1").exists()


def test_a_plan_measures_what_nobody_has_run(
    compared: tuple[Path, Path], tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = compared
    monkeypatch.setattr("darseg.experiment.plan.REHEARSED_STEPS", 2)
    code, out, err = call("compare", path, tmp_path / "new", "--plan")
    assert code == 0, err
    assert "2 runs to do" in out and "a rehearsal of 2 steps" in out and not (tmp_path / "new").exists()


def test_a_plan_counts_the_classifier_of_images(experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darseg.experiment.plan.REHEARSED_STEPS", 3)
    hours = []
    for epochs in (3, 30_000):
        facts = {"backbone": "resnet18_half", "weights": "none", "size": 32, "batch": 2, "unlabeled_batch": 2}
        changes = {"image_classes": facts | {"epochs": epochs, "ramp": [0, 1]}}
        plan = plan_experiment(experiment(variants=[{"name": "judged", "changes": changes}]))
        (judged,) = (arm for arm in plan.arms if arm.name == "judged")
        hours.append(judged.seconds / 3600)
    # A step of the classifier takes some milliseconds at least, and an epoch is a step of 2 images.
    assert hours[1] - hours[0] > 30_000 * 0.002 / 3600


def test_a_plan_names_the_variant_that_cannot_be_measured(
    compared: tuple[Path, Path], tmp_path: Path, call
) -> None:
    path, _ = compared
    broken = "{name: broken, changes: {training.learning_rate: 1.0e+30, network.head_channels: 8}}"
    code, _, err = call("compare", path, tmp_path / "new", "--plan", f"variants=[{broken}]")
    assert code == 2
    says(err, "of_broken", "not finite", "without --plan")
