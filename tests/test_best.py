"""The best round is found, goes on, and is what commands use; a round that made it worse does not go unnoticed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file

import darseg
import forks
from conftest import KILL_BEFORE, recipe_dict, write_png
from darseg.cli.tables import rounds_table
from darseg.config.recipe import ResultConfig
from darseg.config.text import load_recipe, load_saved_recipe
from darseg.data.walk import PREDICTED
from darseg.demo.scenes import SCENE_CLASSES, draw_scene
from darseg.errors import RecipeError, RunError
from darseg.model.weights import read_spec
from darseg.report.facts import DataFacts, read_run, remarks
from darseg.report.verdict import _steps
from darseg.run.basis import basis_of, labeling_round
from darseg.run.best import (
    BEST,
    COUNTS,
    RECORD,
    RoundScore,
    Standing,
    Weights,
    describe_result,
    read_best,
    run_weights,
    standings,
    standings_of,
    write_best,
)
from darseg.run.browse import Repredictor, open_round
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import load_trained, result_path
from darseg.run.labelers import labelers_of
from darseg.run.rounds import train
from darseg.training.bootstrap import mean_iou_of, paired_difference
from darseg.training.scores import Scores
from wording import refused, says

QUIET = Console(quiet=True)
K = 3


def counts_of(seed: int, images: int, right: float) -> np.ndarray:
    """int64 [N, 3, K]: counts of images of 300 pixels, of which about so large a share is right."""
    generator = np.random.default_rng(seed)
    listed = []
    for _ in range(images):
        truth = generator.integers(0, K, 300)
        predicted = np.where(generator.random(300) < right, truth, generator.integers(0, K, 300))
        confusion = np.zeros((K, K), np.int64)
        np.add.at(confusion, (truth, predicted), 1)
        listed.append([np.diag(confusion), confusion.sum(1), confusion.sum(0)])
    return np.array(listed)


def scored(index: int, counts: np.ndarray | None, mean: float | None = None) -> RoundScore:
    """A round's score; the mean IoU is that of the counts."""
    if mean is None:
        assert counts is not None
        mean = float(mean_iou_of(counts.sum(axis=0)[None])[0])
    return RoundScore(index, mean, counts)


# --- the comparison


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([0.3, 0.5, 0.6, 0.62, 0.9]), min_size=1, max_size=5))
def test_standings_are_those_of_a_slow_comparison(shares: list[float]) -> None:
    """Equal shares have equal counts: ties, which the earlier round wins."""
    listed = [scored(index, counts_of(1, 12, share)) for index, share in enumerate(shares)]
    best = 0
    for standing, score in zip(standings(listed, seed=5), listed, strict=True):
        if score.index == 0:
            assert (standing.best, standing.against, standing.verdict) == (0, None, None)
            continue
        before = listed[best]
        assert before.counts is not None and score.counts is not None
        change, low, high = paired_difference(before.counts, score.counts, seed=5)
        assert standing.against == best and standing.difference == (change, low, high)
        assert change == pytest.approx(score.mean_iou - before.mean_iou, abs=1e-12)
        verdict = "same"
        if low > 0:
            verdict = "better"
        if high < 0:
            verdict = "worse"
        assert standing.verdict == verdict and standing.to_json()["verdict"] == verdict
        if score.mean_iou > before.mean_iou:
            best = score.index
        assert standing.best == best


def test_two_rounds_in_the_other_order_have_the_opposite_verdict() -> None:
    counts = {0.4: counts_of(1, 20, 0.4), 0.8: counts_of(2, 20, 0.8)}
    up = standings([scored(0, counts[0.4]), scored(1, counts[0.8])], seed=0)[-1]
    down = standings([scored(0, counts[0.8]), scored(1, counts[0.4])], seed=0)[-1]
    assert (up.verdict, up.best, down.verdict, down.best) == ("better", 1, "worse", 0)
    assert up.difference is not None and down.difference is not None
    assert up.difference.low == pytest.approx(-down.difference.high)


def test_without_an_interval_the_scores_alone_choose_and_the_reason_is_said() -> None:
    few = standings([scored(0, counts_of(1, 9, 0.4)), scored(1, counts_of(2, 9, 0.8))], seed=0)
    old = standings([scored(0, None, 0.5), scored(1, counts_of(1, 12, 0.3))], seed=0)
    other = standings([scored(0, counts_of(1, 12, 0.9)), scored(1, counts_of(1, 13, 0.3))], seed=0)
    assert [entries[-1].verdict for entries in (few, old, other)] == [None] * 3
    assert [entries[-1].best for entries in (few, old, other)] == [1, 0, 0]
    assert few[-1].to_json()["interval"] is None
    says(describe_result(few, keep="best", finished=True), "Round 1", "10 validation images", "9")
    says(describe_result(old, keep="best", finished=True), "Round 0", "earlier version")
    says(describe_result(other, keep="best", finished=True), "Round 0", "other images")
    assert describe_result(few, keep="last", finished=True) == ""


def test_what_is_said_of_the_result() -> None:
    drawn = [(3, 0.5), (3, 0.8), (9, 0.8), (3, 0.3)]
    listed = [scored(index, counts_of(seed, 12, share)) for index, (seed, share) in enumerate(drawn)]
    entries = standings(listed, seed=0)
    assert [entry.verdict for entry in entries] == [None, "better", "same", "worse"]
    vary = [r"[+-]?0\.\d{4}"]
    says(describe_result(entries, keep="best", finished=True), "Round 1", "Round 2", "Round 3", vary=vary)
    says(describe_result(entries[:2], keep="best", finished=False), "so far", vary=vary)
    says(describe_result(entries, keep="last", finished=True), "Round 3", "result.keep=best", vary=vary)
    assert describe_result(entries[:3], keep="last", finished=False) == ""
    nothing = standings([scored(0, None, math.nan), scored(1, None, math.nan)], seed=0)
    assert nothing[-1].best == 1 and nothing[-1].describe() == ""
    says(describe_result(nothing, keep="best", finished=True), "Round 1", "no validation image")


# --- runs


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, and a recipe whose round 1 ruins the network by its learning rate."""
    root = tmp_path_factory.mktemp("scenes")
    places = {"labeled": range(4), "unlabeled": range(4, 9), "validation": range(9, 19)}
    for role, indices in places.items():
        for index in indices:
            image, label = (part[::2, ::2] for part in draw_scene(7, index, (65, 97)))
            write_png(root / "images" / f"{index:02d}.png", image)
            write_png(root / "labels" / f"{index:02d}.png", label)
        (root / f"{role}.txt").write_text("".join(f"{index:02d}\n" for index in indices))
    recipe = recipe_dict(root)
    recipe["training"] |= {"crop": [33, 49], "checkpoint_every": 1, "learning_rate": 0.02}
    recipe["labeling"] = {"window": [33, 49], "mirror": False}
    recipe["evaluation"] = {"mirror": False}
    recipe["result"] = {"align": False, "keep": "best"}
    recipe["rounds"] = [
        {"steps": 12},
        {"steps": 2, "labeling_ratio": 0.5, "learning_rate": 5.0},
        {"steps": 2, "labeling_ratio": 0.5, "learning_rate": 0.0001},
    ]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept its best round."""
    out = tmp_path_factory.mktemp("kept") / "run"
    ended = forks.python("-m", "darseg", "train", recipe_file, "--out", out)
    assert ended.returncode == 0, ended.stderr
    (out.parent / "said.txt").write_text(ended.stdout)
    return out


def outcome(run: Path) -> dict[str, bytes]:
    """The bytes that an interruption must not change."""
    names = (
        "*.safetensors",
        "*/*.safetensors",
        "*/*.npz",
        "*/scores.json",
        "*/images.json",
        "*/labels/*.png",
    )
    paths = [path for name in (*names, RECORD) for path in run.glob(name)]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def test_a_ruined_round_is_noticed_and_the_next_goes_on_from_the_best(run: Path) -> None:
    folder, record = RunDirectory(run), json.loads((run / RECORD).read_text())
    scores = [json.loads((run / f"round_{index}/scores.json").read_text()) for index in range(3)]
    means = [content["mean_iou"] for content in scores]
    assert means[1] < means[0] and record["rounds"][1]["verdict"] == "worse"
    best = means.index(max(means))
    assert record["round"] == record["rounds"][2]["best"] == best != 1
    for index, content in enumerate(scores):  # the counts are those of the scores
        counts = np.load(run / f"round_{index}" / COUNTS)["counts"].sum(axis=0)
        confusion = Scores.from_json(content).confusion
        expected = [np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)]
        assert counts.tolist() == np.array(expected).tolist()
        assert record["rounds"][index]["mean_iou"] == content["mean_iou"]
    # Round 2 is labeled by, and starts from, round 0.
    assert labeling_round(folder, 2) == 0 and labeling_round(folder, 1) == 0
    first = digest_path(folder.network(0))
    for step in ("label", "train"):
        done = folder.read_record(2, step)
        assert done is not None and done.inputs["network"] == first
    weights = [load_file(folder.network(index)) for index in range(3)]
    moved = [max(float(abs(part[name] - weights[0][name]).max()) for name in part) for part in weights]
    assert moved[2] < moved[1] / 10

    assert (run / BEST).read_bytes() == folder.network(best).read_bytes()
    assert (
        record["sha256"] == digest_path(run / BEST)
        and record["weights"] == f"round_{best}/network.safetensors"
    )
    files = {path.name for path in run.iterdir()} - {"tensorboard"}
    assert files == {
        "recipe.yaml",
        "run.json",
        "environment.json",
        "data.json",
        "journal.jsonl",
        "summary.json",
    } | {
        *(f"round_{index}" for index in range(3)),
        *("report.html", "contents.json", BEST, RECORD),
    }
    assert not list(run.rglob("*.part"))


def test_the_console_the_summary_and_the_report_say_it_first(run: Path) -> None:
    said, why = (run.parent / "said.txt").read_text(), json.loads((run / RECORD).read_text())["why"]
    lines = [line for line in said.splitlines() if line]
    assert why in lines and why.startswith("Round ")
    assert any(line.startswith("round 1: worse than round 0 (-") for line in lines)
    assert any("by the network of round 0" in line for line in lines)
    summary = json.loads((run / "summary.json").read_text())
    best = summary["result"]["round"]
    assert summary["result"] == {"round": best, "weights": BEST, "why": why}
    assert summary["rounds"][1]["compared"]["verdict"] == "worse" and "compared" not in summary["rounds"][0]
    used = next(row for row in rounds_table(summary) if row[0] == "the result")
    assert used == ["the result", *("plain" if index == best else "" for index in range(3))]
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    compared = [event for event in events if event["event"] == "compared"]
    assert [(event["round"], event["against"], event["verdict"]) for event in compared[:1]] == [
        (1, 0, "worse")
    ]
    page = (run / "report.html").read_text()
    assert why in page and page.index(why) < page.index(f"mean IoU of the result, round {best}")
    assert f"{run / BEST} (round {best})" in page and "the network of round 0 (pspnet" in page


def test_commands_use_the_best_network(run: Path, call: Any, tmp_path: Path) -> None:
    folder, best = RunDirectory(run), json.loads((run / RECORD).read_text())["round"]
    recipe = load_saved_recipe(run / "recipe.yaml")
    expected = json.loads((run / f"round_{best}/scores.json").read_text())["mean_iou"]
    assert result_path(run) == run / BEST
    assert darseg.evaluate(run, console=QUIET)[0].mean_iou == expected
    assert darseg.evaluate(run, round_index=1, console=QUIET)[0].mean_iou != expected
    assert load_trained(run).round == best and load_trained(run, 1).path == folder.network(1)
    assert load_trained(run, plain=True).path == folder.network(best)
    images, digest = Path(recipe.data.root) / "images/10.png", digest_path(run / BEST)
    assert call("predict", run, images, tmp_path / "predicted", "--kind", "index")[0] == 0
    made_by = json.loads((tmp_path / "predicted" / PREDICTED).read_text())["made_by"]
    assert [entry["network"] for entry in made_by] == [digest]
    assert call("label", run, images, tmp_path / "labels")[0] == 0
    assert digest in (tmp_path / "labels/redistribution.json").read_text()
    student = load_recipe(
        run / "recipe.yaml", [f"rounds=[{{steps: 1, labels_from: {run}, labeling_ratio: 0.5}}]"]
    )
    assert labelers_of(student)[0].path == run / BEST and labelers_of(student)[0].digest == digest
    # A labeled image is predicted again by the network that labeled it.
    labeled = open_round(run, 2)
    predictor, sample = Repredictor(labeled), labeled.samples[0]
    facts = folder.image_facts(2, len(SCENE_CLASSES))[sample.id]
    torch.set_num_threads(1)
    again = np.bincount(predictor.prediction(sample).classes.ravel(), minlength=len(SCENE_CLASSES))
    assert tuple(again.tolist()) == facts.predicted


def test_an_export_says_how_its_score_was_measured(run: Path) -> None:
    from darseg.run.export import _facts

    facts = _facts(run, load_trained(run))
    best = json.loads((run / RECORD).read_text())["round"]
    assert facts["training"]["round"] == best and facts["source_sha256"] == digest_path(run / BEST)
    says(facts["training"]["mean_iou_note"], "validation images", "chosen")
    assert "mean_iou_note" not in _facts(run, load_trained(run, best))["training"]


def test_a_file_that_is_not_the_recorded_one_is_not_used(run: Path, tmp_path: Path, capsys: Any) -> None:
    """As a kill between the file and its record leaves it, or somebody who replaced the file."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    best = json.loads((copy / RECORD).read_text())["round"]
    shutil.copy(copy / "round_1/network.safetensors", copy / BEST)
    assert result_path(copy) == RunDirectory(copy).network(best)
    says(" ".join(capsys.readouterr().err.split()), BEST, RECORD, f"round_{best}")
    train(load_recipe(run / "recipe.yaml"), copy, console=QUIET)
    assert outcome(copy) == outcome(run) and result_path(copy) == copy / BEST
    (copy / f"round_{best}/network.safetensors").unlink()  # the file stands for itself
    assert read_spec(result_path(copy)).backbone == "resnet18_half"
    (copy / BEST).unlink()
    with refused(RunError, "missing"):
        result_path(copy)
    record = {"round": 0, "sha256": "0" * 64, "why": ""}
    faulty = ({"round": -1}, record | {"sha256": "x"}, record, record | {"rounds": [0]})
    for text in ("{", *map(json.dumps, faulty)):
        (copy / RECORD).write_text(text)
        with refused(RunError, RECORD, "--round", vary=[r"\(line .*?\)(?=\.)", r"\(Expecting.*?\)(?=\.)"]):
            result_path(copy)


def test_a_stop_before_the_comparison_is_said_and_the_next_call_compares(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    """As a kill leaves it between the scores of round 2 and what follows from them."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert run_weights(RunDirectory(copy)).path == copy / BEST and not capsys.readouterr().err
    shutil.copy(copy / "round_0/network.safetensors", copy / BEST)
    record = json.loads((copy / RECORD).read_text())
    record |= {"round": 0, "sha256": digest_path(copy / BEST), "rounds": record["rounds"][:2]}
    (copy / RECORD).write_text(json.dumps(record))
    lines = (copy / "journal.jsonl").read_text().splitlines(keepends=True)
    ends = [at for at, line in enumerate(lines) if json.loads(line)["event"] == "evaluated"]
    (copy / "journal.jsonl").write_text("".join(lines[: ends[-1] + 1]))
    assert run_weights(RunDirectory(copy)) == Weights(copy / BEST, 0)
    says(" ".join(capsys.readouterr().err.split()), "round 2", "not compared", "darseg train")
    student = load_recipe(
        run / "recipe.yaml", [f"rounds=[{{steps: 1, labels_from: {copy}, labeling_ratio: 0.5}}]"]
    )
    with refused(RunError, "round 2 is not compared", "darseg train"):
        labelers_of(student)
    for _ in range(2):
        train(load_recipe(run / "recipe.yaml"), copy, console=QUIET)
        assert outcome(copy) == outcome(run)
        events = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
        assert [event["round"] for event in events if event["event"] == "compared"] == [1, 2]


def test_the_report_follows_the_rounds_that_the_result_goes_on_from(run: Path) -> None:
    facts = read_run(run)
    entries = [Standing(0, 0.4, 10), Standing(1, 0.1, 10, against=0), Standing(2, 0.5, 10, against=0, best=2)]
    facts = replace(facts, standings=tuple(entries))
    assert _steps(facts) == 12 + 2  # not round 1's
    losses = [remark.text for remark in remarks(facts, DataFacts(None, None)) if remark.worse]
    first, ruined, last = (f"{round_.scores.mean_iou:.4f}" for round_ in facts.scored)
    assert f"round 1 lowered mean IoU: {first} → {ruined}" in losses
    assert not any(f"{ruined} →" in text for text in losses)
    assert (f"round 2 lowered mean IoU: {first} → {last}" in losses) == (last < first)
    steps = replace(facts, recipe=facts.recipe.model_copy(update={"result": ResultConfig(keep="last")}))
    assert _steps(steps) == 12 + 2 + 2


def test_killed_at_any_moment_the_best_network_is_whole(run: Path, tmp_path: Path) -> None:
    """Another round becomes the best; before each change of the disk the process is killed."""
    script = (
        KILL_BEFORE
        + """
import shutil, sys
from pathlib import Path
from darseg.config.text import load_saved_recipe
from darseg.run.best import standings_of, write_best
from darseg.run.directory import RunDirectory

source, out = map(Path, sys.argv[1:])
for at in range(1, 10):
    folder = out / str(at)
    shutil.copytree(source, folder)
    child = os.fork()
    if not child:
        kill_before(at)
        run = RunDirectory(folder)
        recipe = load_saved_recipe(run.recipe)
        write_best(run, recipe, standings_of(run, recipe.seed))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""
    )
    before = tmp_path / "before"
    before.mkdir()
    for name in ("recipe.yaml", "round_0", "round_1", "round_2"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, before / name)
    shutil.rmtree(before / "round_2" / "labels")
    worse = {"round": 1, "sha256": digest_path(run / "round_1/network.safetensors"), "why": "so far"}
    worse["rounds"] = [{"round": 0}, {"round": 1}]
    (before / RECORD).write_text(json.dumps(worse))
    shutil.copy(run / "round_1/network.safetensors", before / BEST)
    ended = forks.python("-c", script, before, tmp_path / "killed")
    assert ended.returncode == 0, ended.stderr
    folders = sorted((tmp_path / "killed").iterdir())
    assert len(folders) == 3  # a kill before each of two renames, and none
    recipe = load_saved_recipe(run / "recipe.yaml")
    for folder in folders:
        copy = RunDirectory(folder)
        kept = read_best(copy)
        assert kept is not None and digest_path(run_weights(copy).path) == kept.digest
        write_best(copy, recipe, standings_of(copy, recipe.seed))
        assert (folder / RECORD).read_bytes() == (run / RECORD).read_bytes()
        assert (folder / BEST).read_bytes() == (run / BEST).read_bytes()


@pytest.mark.slow
def test_killed_anywhere_the_run_ends_with_the_same_bytes(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    from test_run import kill_and_finish

    places = [("best.safetensors", 1), ("round_2/labels/*.png", 2), ("round_2/checkpoint_*", 1)]
    kill_and_finish(recipe_file, tmp_path / "run", places)
    assert outcome(tmp_path / "run") == outcome(run)


def test_a_round_that_is_repeated_brings_the_best_up_to_date(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "round_2")
    (copy / RECORD).unlink()
    train(load_recipe(recipe_file), copy, console=QUIET)
    assert outcome(copy) == outcome(run)


@pytest.mark.slow
def test_two_processes_choose_alike(recipe_file: Path, tmp_path: Path) -> None:
    batch = "training.half_batch=4"  # BatchNorm needs two images in each process
    ended = forks.torchrun("-m", "darseg", "train", recipe_file, batch, "--out", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    folder, record = RunDirectory(tmp_path / "run"), json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["sha256"] == digest_path(tmp_path / "run" / BEST)
    expected = basis_of(folder, load_saved_recipe(folder.recipe), 2).labels
    assert labeling_round(folder, 2) == expected
    # One process goes on in the finished folder, and agrees with everything.
    before = outcome(folder.root)
    train(load_recipe(recipe_file, [batch]), folder.root, console=QUIET)
    assert outcome(folder.root) == before


def test_a_run_that_keeps_the_last_round_warns_of_the_ruin(
    run: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """Steps are taken over from the other run as far as their inputs are the same."""
    out, console = (
        tmp_path / "run",
        Console(record=True, width=500, quiet=False, file=(tmp_path / "o").open("w")),
    )
    rounds = "rounds=[{steps: 12}, {steps: 2, labeling_ratio: 0.5, learning_rate: 5.0}]"
    train(load_recipe(recipe_file, ["result.keep=last", rounds]), out, reuse=run, console=console)
    said = console.export_text()
    assert "round 1: train: copied" in said and "round 1: evaluate: copied" in said
    assert not (out / BEST).exists() and not (out / RECORD).exists()
    assert result_path(out) == RunDirectory(out).network(1)
    sentence = describe_result(standings_of(RunDirectory(out), 3), keep="last", finished=True)
    assert sentence in said
    says(sentence, "Round 1", "round 0", "result.keep=best", vary=[r"[+-]0\.\d{4}"])
    page = darseg.write_report(out).read_text()
    assert sentence in page and page.index(sentence) < page.index("mean IoU after round 1")
    with refused(RunError, "result.keep", "--out NEW_FOLDER"):
        train(load_recipe(recipe_file, [rounds]), out, console=QUIET)


def test_a_network_goes_on_only_from_rounds_of_its_own(run: Path) -> None:
    """A new network begins in round 1, so round 2 goes on from round 1, and the best labels."""
    recipe = load_saved_recipe(run / "recipe.yaml")
    rounds = list(recipe.rounds)
    rounds[1] = rounds[1].model_copy(update={"network": recipe.network})
    changed = recipe.model_copy(update={"rounds": tuple(rounds)})
    basis = basis_of(RunDirectory(run), changed, 2)
    assert (basis.labels, basis.weights) == (0, 1)
    assert basis_of(RunDirectory(run), recipe, 2).weights == 0


def test_without_validation_images_nothing_is_begun(recipe_file: Path, tmp_path: Path, call: Any) -> None:
    values = yaml.safe_load(recipe_file.read_text())
    del values["data"]["validation"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with refused(RecipeError, "result.keep", "data.validation", "keep: last"):
        train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    for command in ("check", "plan"):
        code, _, error = call(command, tmp_path / "recipe.yaml")
        assert code != 0 and "result.keep: best needs validation images" in error
    code, out, _ = call("plan", recipe_file)
    assert code == 0 and "result.keep: best" in out
