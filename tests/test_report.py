"""Reports: facts against the files, pictures against predictions made by hand, pages in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

import darseg
from conftest import REPOSITORY, recipe_dict
from darseg.config.text import load_recipe
from darseg.data.classes import ClassSet, distinct_colors
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.data.prediction import FINE, FLOAT16, Prediction
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DataError, Interrupted, RunError
from darseg.model.predict import predict_for_labeling
from darseg.model.weights import load_network
from darseg.pseudo.histogram import ConfidenceHistogram
from darseg.pseudo.labelset import prediction_path
from darseg.pseudo.thresholds import choose_global
from darseg.report import charts, gallery, overview, page, step_charts
from darseg.report.acceptance import accepted_chart, class_charts, teacher_chart
from darseg.report.comparison import compare_runs, spread
from darseg.report.curve import Curve
from darseg.report.facts import RoundFacts, read_data, read_run, remarks
from darseg.report.overview import page_of, write_report
from darseg.run.browse import open_round
from darseg.run.build import labeling_protocol, manifest_of
from darseg.run.directory import RunDirectory
from darseg.training.scores import Scores
from wording import refused, says

K = len(SCENE_CLASSES)
TRAP = "<script>document.title='taken'</script>"
IMAGE_TRAP = "<img src=x onerror=\"document.title='taken'\">"
NAMES = (
    TRAP,
    IMAGE_TRAP,
    "</title><b>bold & 'quoted' \"twice\"",
    "%{y} $x^2$ {0}",
    "smile 😀 und größer",
    "a very long name of a class " * 5,
    "2020-01-01",
    "<!--<script>",
    "  two  blanks ",
    "7",
    "last",
)


@pytest.fixture(scope="module")
def hostile(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose class and file names are hostile, with its data: `run/`, `data/`, `after_0.html`.

    The report of round 1 failed: its callback raised an error.
    """
    folder = tmp_path_factory.mktemp("hostile")
    renamed = {"u/07": f"u/{IMAGE_TRAP}", "u/08": "u/%{y} 'q' & 😀", "u/09": "u/" + "long" * 40}
    for kind in ("images", "labels"):
        for path in (tiny_data / kind).rglob("*.png"):
            name = path.relative_to(tiny_data / kind).with_suffix("").as_posix()
            target = folder / "data" / kind / f"{renamed.get(name, name)}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for role in ("labeled", "unlabeled", "validation"):
        ids = [renamed.get(name, name) for name in (tiny_data / f"{role}.txt").read_text().split()]
        (folder / "data" / f"{role}.txt").write_text("".join(f"{name}\n" for name in ids))
    recipe = recipe_dict(folder / "data")
    recipe["data"]["classes"] = list(NAMES)
    (folder / "hostile.yaml").write_text(yaml.safe_dump(recipe))
    calls: list[Path] = []

    def after_round(root: Path) -> None:
        calls.append(root)
        if len(calls) == 2:
            raise ValueError("printer on fire")
        write_report(root)
        if len(calls) == 1:
            shutil.copy(root / "report.html", folder / "after_0.html")

    darseg.train(load_recipe(folder / "hostile.yaml"), folder / "run", after_round=after_round)
    assert calls == [folder / "run"] * 3
    return folder


@pytest.fixture
def run(hostile: Path, tmp_path: Path) -> Path:
    """A copy of that run that a test may damage."""
    return copy_run(hostile / "run", tmp_path / "run")


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder. Weights are linked, because they are large and no test changes them."""

    def copy(path: str, target: str) -> object:
        return os.link(path, target) if path.endswith(".safetensors") else shutil.copy2(path, target)

    return shutil.copytree(source, target, copy_function=copy)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content))


# --- facts


def test_facts_equal_the_files(hostile: Path) -> None:
    facts = read_run(hostile / "run")
    assert facts.classes.names == NAMES and facts.finished and facts.planned == 3
    assert [round_.index for round_ in facts.rounds] == [0, 1, 2]
    assert facts.method == "dars" and facts.seed == 3
    summary = read_json(hostile / "run" / "summary.json")
    for round_, expected in zip(facts.rounds, summary["rounds"], strict=True):
        folder = hostile / "run" / f"round_{round_.index}"
        assert round_.scores is not None and round_.scores.mean_iou == pytest.approx(expected["mean_iou"])
        assert sum(round_.seconds.values()) == pytest.approx(expected["seconds"], abs=0.06)
        assert round_.steps == expected["steps"] and round_.labeling_ratio == expected["labeling_ratio"]
        assert (round_.labels is not None) == (round_.index > 0)
        if round_.labels is None:
            continue
        chosen = read_json(folder / "thresholds.json")
        assert round_.labels.kept.tolist() == chosen["kept"]
        counts = np.load(folder / "histogram.npz")["float16_counts"]
        assert np.array_equal(round_.labels.histogram.counts, counts)
        assert round_.truth is not None
        assert round_.truth.tolist() == read_json(folder / "pseudo_scores.json")["truth"]


def test_labeled_masks_are_counted(hostile: Path) -> None:
    counts = np.zeros(K, int)
    for path in (hostile / "data" / "labels" / "l").glob("*.png"):
        values = np.asarray(Image.open(path))
        counts += [(values == k).sum() for k in range(K)]
    assert read_data(read_run(hostile / "run")).counts.tolist() == counts.tolist()


def test_the_last_entry_of_a_repeated_step_counts_and_torn_lines_are_skipped(run: Path) -> None:
    lines = [
        {"event": "step", "round": 0, "step": 3, "loss_labeled": None, "learning_rate": 0.25},
        {"event": "step", "round": 0, "step": 5, "loss_labeled": 9.5, "learning_rate": 0.5},
    ]
    text = "\n" + "\n".join(map(json.dumps, lines)) + '\n{"event": "step", "round": 0, "st'
    with open(run / "journal.jsonl", "a") as file:
        file.write(text)
    curve = read_run(run).rounds[0].curve
    assert curve.steps.tolist() == [0, 3, 5]
    assert curve.figures["loss_labeled"][2] == 9.5 and np.isnan(curve.figures["loss_labeled"][1])
    assert curve.figures["learning_rate"].tolist()[1:] == [0.25, 0.5]


def test_a_repeated_round_shows_its_own_curve_and_warnings(run: Path) -> None:
    """Its folder was deleted, as docs/view.md says; the journal still contains the first attempt."""
    before = read_run(run)
    journal = (run / "journal.jsonl").read_text()
    stale = "round 2: never predicted, so not pseudo-labeled: last, 7"
    lines = [
        {"event": "warning", "text": stale},
        {"event": "step", "round": 2, "step": 80, "loss_labeled": 3.0},
        {"event": "warning", "text": "something else"},
    ]
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + journal)
    facts = read_run(run)
    assert facts.rounds[2].curve.steps.tolist() == before.rounds[2].curve.steps.tolist()
    texts = [remark.text for remark in remarks(facts, read_data(facts))]
    assert stale not in texts and "something else" in texts
    assert sum(text.startswith("round 2: never predicted") for text in texts) == 1


def test_every_loss_in_the_journal_is_drawn(run: Path) -> None:
    """Methods report losses of their own; the report does not need to know them."""
    lines = [
        {
            "event": "step",
            "round": 2,
            "step": step,
            "loss_labeled": 3.0 - step,
            "loss_consistency": 0.5 + step,
        }
        | {f"loss_<b>{TRAP}": 1.0, "learning_rate": 0.1, "gradient_norm": 7.0}
        for step in range(3)
    ]
    with open(run / "journal.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_run(run)
    assert facts.rounds[2].curve.figures["loss_consistency"].tolist() == [0.5, 1.5, 2.5]
    chart = step_charts.loss_chart(facts.rounds)
    in_legend = [trace for trace in chart.data if trace.showlegend]
    names = [trace.name for trace in in_legend]
    assert names[:3] == ["labeled", "pseudo-labeled", "consistency"] and len(names) == 4
    assert names[3].startswith("&lt;b&gt;&lt;script")
    assert len({trace.line.color for trace in in_legend}) == 4
    consistency = [trace for trace in chart.data if trace.name == "consistency"]
    assert [list(trace.y) for trace in consistency] == [[0.5, 1.5, 2.5]]
    begin = sum(round_.steps or 0 for round_ in facts.rounds[:2])
    assert list(consistency[0].x) == [begin, begin + 1, begin + 2]
    assert "consistency" in write_report(run).read_text()


def test_what_alignments_did_is_drawn_with_what_was_accepted(run: Path) -> None:
    assert accepted_chart(read_run(run).rounds) is None
    with open(run / "journal.jsonl", "a") as file:
        for step in range(3):
            shares = {"accepted": step / 10, "moved": step / 4, "unaligned": 1.0 if step < 2 else 0.0}
            line = {
                "time": 0,
                "event": "step",
                "round": 2,
                "step": step,
                "loss": 1.0,
                "learning_rate": 0.1,
            } | shares
            file.write(json.dumps(line) + "\n")
    chart = accepted_chart(read_run(run).rounds)
    assert chart is not None
    drawn = {trace.name: list(trace.y) for trace in chart.data}
    assert drawn == {
        "accepted pixels": [0, 0.1, 0.2],
        "class changed by alignment": [0, 0.25, 0.5],
        "decided without class weights": [1, 1, 0],
    }


def test_what_is_accepted_of_each_class_is_drawn_against_the_labeled_shares(run: Path) -> None:
    facts = read_run(run)
    number = len(facts.classes)
    assert class_charts(facts.rounds, facts.classes, None) == {} and teacher_chart(facts.rounds) is None
    with open(run / "journal.jsonl", "a") as file:
        for step in (0, 10):
            line = {"time": 0, "event": "step", "round": 2, "step": step, "loss": 1.0, "learning_rate": 0.1}
            line["accepted_by_class"] = [0.5, *[0.1] * (number - 1)] if step else None
            line["thresholds"] = [None, *[0.25] * (number - 1)]
            line["precision_by_class"] = [1.0] * (number + 3)  # of other classes: damaged
            line["agreement"] = 0.75
            file.write(json.dumps(line) + "\n")
    facts = read_run(run)
    counts = np.array([4, 0, *[1] * (number - 2)])
    drawn = class_charts(facts.rounds, facts.classes, counts)
    assert set(drawn) == {"accepted_by_class", "thresholds"}
    ratios = {trace.name: list(trace.y) for trace in drawn["accepted_by_class"].data}
    names = [charts.short(name) for name in facts.classes.names]
    wanted = 4 / counts.sum()
    assert names[1] not in ratios and ratios[names[0]][0] is None
    assert ratios[names[0]][1] == pytest.approx(0.5 / wanted)
    assert ratios[names[2]][1] == pytest.approx(0.1 * counts.sum())
    thresholds = {trace.name: list(trace.y) for trace in drawn["thresholds"].data}
    assert thresholds[names[0]] == [None, None] and thresholds[names[1]] == [0.25, 0.25]
    shares = class_charts(facts.rounds, facts.classes, None)["accepted_by_class"].data
    assert [list(trace.y)[1] for trace in shares] == [0.5, *[0.1] * (number - 1)]
    teacher = teacher_chart(facts.rounds)
    assert teacher is not None and [list(trace.y) for trace in teacher.data] == [[0.75, 0.75]]
    assert "Smallest accepted confidence, by class" in write_report(run).read_text()


def scored(index: int, correct: list[int], confused: list[int]) -> RoundFacts:
    """A round with right[k] correct pixels of class k, and wrong[k] pixels predicted as the next class."""
    confusion = np.diag(correct).astype(np.int64)
    for k, count in enumerate(confused):
        confusion[k, (k + 1) % len(confused)] += count
    curve = Curve(np.zeros(0, np.int64), {})
    return RoundFacts(
        index=index,
        labeling_ratio=None,
        labels=None,
        pseudo=None,
        truth=None,
        left_out=0,
        steps=1,
        scores=Scores(confusion),
        protocol=None,
        seconds={"evaluate": 1.0},
        curve=curve,
    )


def test_remarks_name_rounds_that_lowered_scores(hostile: Path) -> None:
    facts = read_run(hostile / "run")
    three = ClassSet(("a", "b", "c"), distinct_colors(3))
    rounds = (scored(0, [90, 90, 0], [10, 10, 10]), scored(1, [50, 91, 0], [50, 9, 10]))
    facts = replace(
        facts, classes=three, rounds=rounds, warnings=("from the journal", "IoU 0 after round 1: c")
    )
    data = replace(read_data(facts), counts=np.array([5, 0, 1]))
    listed = remarks(facts, data)
    ious = [[90 / (100 + 10), 90 / (100 + 10), 0], [50 / (100 + 10), 91 / (100 + 50), 0]]
    assert [remark.worse for remark in listed] == [True, True, False, False, False]
    says(listed[0].text, "round 1", f"{np.mean(ious[0]):.4f} → {np.mean(ious[1]):.4f}")
    lost = f"a {ious[0][0]:.3f} → {ious[1][0]:.3f}, b {ious[0][1]:.3f} → {ious[1][1]:.3f}"
    says(listed[1].text, "round 1", "0.02", lost)
    says(listed[2].text, "never pseudo-labeled", ": b")
    says(listed[3].text, "round 1", ": c")  # once, though the journal says the same
    assert listed[4].text == "from the journal"


def test_the_page_suggests_a_control_of_as_many_steps(run: Path) -> None:
    facts = read_run(run)
    steps = sum(round_.steps or 0 for round_ in facts.rounds)
    assert f'"rounds=[{{steps: {steps}}}]"' in write_report(run).read_text()
    alone = replace(facts, rounds=facts.rounds[:1])
    assert "rounds=[" not in page_of(alone, read_data(alone), Markup(), seconds=0.0).html()


def test_what_both_run_and_files_report_is_listed_once(hostile: Path) -> None:
    """The journal warns of classes that are never predicted; the histograms show the same."""
    facts = read_run(hostile / "run")
    warnings = [text for text in facts.warnings if "never predicted" in text]
    assert warnings, "a network of six steps predicts every class; choose another seed"
    texts = [remark.text for remark in remarks(facts, read_data(facts))]
    assert len(texts) == len(set(texts))
    assert sum("never predicted" in text for text in texts) == len(warnings)
    assert any("ValueError: printer on fire" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("round_1/scores.json", "{", ["round_1/scores.json", "damaged", "evaluate.json"]),
        ("round_1/thresholds.json", None, ["round_1", "thresholds.json", "label.json", "darseg train"]),
        ("environment.json", "[]", ["environment.json", "list"]),
    ],
)
def test_a_damaged_run_is_reported(run: Path, call, name: str, content: str | None, facts: list[str]) -> None:
    (run / name).unlink() if content is None else (run / name).write_text(content)
    before = (run / "report.html").read_bytes()
    code, _, err = call("report", run)
    assert code == 2 and "Traceback" not in err
    says(err, *facts, vary=[r"(?<=\()(Expecting|FileNotFoundError).*?(?=\)\. )"])
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(("name", "content"), [("round_1/train.json", "[]"), ("recipe.yaml", None)])
def test_a_damaged_record_or_missing_recipe_leaves_the_old_page(
    run: Path, call, name: str, content: str | None
) -> None:
    (run / name).unlink() if content is None else (run / name).write_text(content)
    before = (run / "report.html").read_bytes()
    code, _, err = call("report", run)
    assert code == 2 and Path(name).name in err and "Traceback" not in err
    assert (run / "report.html").read_bytes() == before


# --- charts


@given(st.data(), st.sampled_from([FLOAT16, FINE]), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_bins_lose_no_pixel_and_the_threshold_is_one_of_their_edges(data, scale, classes: int) -> None:
    # The largest of K probabilities is at least 1/K, so no code is below that.
    lowest = scale.at_least(1 / classes)
    codes = data.draw(st.lists(st.integers(lowest, scale.codes - 1), max_size=30))
    accept = data.draw(st.integers(lowest, scale.codes))
    counts = np.bincount(np.array(codes, int), minlength=scale.codes)
    edges, binned, threshold = charts.bin_confidences(counts, accept, scale, classes=classes)
    assert (np.diff(edges) > 0).all() and len(binned) == len(
        edges
    ) - 1 <= charts.BINS + charts.DETAIL_BINS + 1
    assert binned.sum() == len(codes)
    place, _ = charts.places(scale, classes)
    inner = np.digitize(place[codes], edges[1:-1] - 1e-9)  # bin by bin, as the definition says
    assert np.array_equal(binned, np.bincount(inner, minlength=len(binned)))
    if accept == scale.codes:
        assert threshold is None
    else:
        assert threshold in edges
        assert binned[edges[:-1] >= threshold].sum() == sum(code >= accept for code in codes)


@pytest.mark.parametrize("classes", [2, 3, 19])
def test_the_middle_is_on_the_axis_of_confidences(run: Path, classes: int) -> None:
    labels = read_run(run).labeled[-1].labels
    assert labels is not None
    counts = np.zeros((classes, FLOAT16.codes), np.int64)
    counts[:, FLOAT16.at_least(0.7)] = 9
    histogram = ConfidenceHistogram(counts, FLOAT16)
    few = replace(labels, histogram=histogram, thresholds=choose_global(histogram, 0.6))
    axis = charts.confidence_base(few)["layout"]["xaxis"]
    assert axis["range"][0] <= axis["tickvals"][axis["ticktext"].index("0.5")] == 0


@pytest.mark.parametrize("method", ["dars", "cbst"])
def test_only_dars_aims_at_the_labeled_images(run: Path, method: str) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["labeling"]["method"] = method
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = write_report(run).read_text()
    aims = ("which the pseudo labels should match", "labeled images (the aim)")
    assert [aim in text for aim in aims] == [method == "dars"] * 2


def test_a_long_curve_is_averaged() -> None:
    steps = np.arange(0, 100_000, 10)
    values = np.where(steps == 0, np.nan, steps * 2.0)
    thinned, means = step_charts.thin(steps, values)
    assert len(thinned) == step_charts.POINTS and thinned[0] == 45 and thinned[-1] == 99_945
    assert means[-1] == pytest.approx(2 * 99_945) and means[0] == pytest.approx(2 * 50)
    assert (
        step_charts.thin(steps[:7], values[:7])[1] is not None
        and len(step_charts.thin(steps[:7], values[:7])[0]) == 7
    )


# --- gallery


def fact(confidence: float | None, kept: list[int], pixels: int = 100) -> gallery.ImageFacts:
    return gallery.ImageFacts(pixels=pixels, kept=tuple(kept), predicted=None, confidence=confidence)


def test_extremes_and_rare_classes_are_chosen() -> None:
    facts = {
        "a": fact(0.9, [90, 0, 0]),
        "b": fact(0.5, [10, 0, 1]),
        "c": fact(0.7, [50, 0, 9]),
        "d": fact(0.7, [50, 2, 0]),
        "e": fact(0.8, [60, 0, 0]),
    }
    chosen = gallery.choose(facts, np.array([0.9, 0.08, 0.02]), ("road", "pole", "sign"))
    assert chosen == {
        "a": ["most confident", "most labeled", "rare class: road"],
        "e": ["most confident", "most labeled", "rare class: road"],
        "b": ["least confident", "least labeled", "rare class: sign"],
        "c": ["least confident", "rare class: sign"],
        "d": ["least labeled", "rare class: pole"],
    }
    unknown = {name: replace(known, confidence=None) for name, known in facts.items()}
    reasons = gallery.choose(unknown, np.ones(3), ("", "", "")).values()
    assert not any("confident" in reason for listed in reasons for reason in listed)


def test_facts_of_images_from_their_file_or_from_the_maps(hostile: Path, run: Path) -> None:
    stored = gallery.image_facts(open_round(run, 2))
    (run / "round_2/images.json").unlink()
    counted = gallery.image_facts(open_round(run, 2))
    assert list(stored) == list(counted)
    kept = [sum(column) for column in zip(*(image.kept for image in counted.values()), strict=True)]
    assert kept == read_json(run / "round_2/thresholds.json")["kept"]
    assert all(image.confidence is None and 0 <= image.coverage <= 1 for image in counted.values())
    assert any(image.coverage > 0 for image in counted.values())
    for name, image in stored.items():
        assert image.coverage == counted[name].coverage and image.kept == counted[name].kept
        assert image.confidence is not None and 0 < image.confidence < 1


def test_images_whose_facts_are_lost_are_counted(run: Path) -> None:
    """A power cut can destroy the last facts that were stored, although the maps exist."""
    before = gallery.image_facts(open_round(run, 2))
    lost = sorted(before)[0]
    change_json(run / "round_2/images.json", lambda facts: facts.pop(lost))
    after = gallery.image_facts(open_round(run, 2))
    assert after.pop(lost).kept == before[lost].kept
    assert after == {name: fact for name, fact in before.items() if name != lost}


def test_only_some_of_many_label_maps_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAPS_READ", 2)
    (run / "round_2/images.json").unlink()
    facts = read_run(run)
    drawn = gallery.draw_gallery(facts, read_data(facts))
    assert drawn is not None and len(drawn.pictures) == 2
    says(drawn.notes[0], "2 of 6")


def test_images_that_a_round_left_out_are_not_shown(run: Path) -> None:
    name = open_round(run, 2).samples[0].id
    assert name in [picture.id for picture in (pictures_of_run(run) or ())]
    (run / "round_2/images.json").unlink()
    (run / "round_2/labels" / f"{name}.png").unlink()
    (run / "round_2/excluded.json").write_text(json.dumps([name]))
    pictures = pictures_of_run(run)
    assert pictures and name not in [picture.id for picture in pictures]
    text = write_report(run).read_text()
    assert re.findall(r"left out of round (\d)</th>\s*<td>(.*?)</td>", text) == [
        ("2", "1 unlabeled, marked as bad")
    ]


def pictures_of_run(run: Path) -> tuple[gallery.Picture, ...] | None:
    facts = read_run(run)
    drawn = gallery.draw_gallery(facts, read_data(facts))
    return drawn and drawn.pictures


def decode(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


@pytest.mark.parametrize("classes", [3, 254, 255])
def test_a_map_has_the_colors_of_the_classes_and_a_pattern_for_unlabeled_pixels(classes: int) -> None:
    colors = ClassSet(tuple(map(str, range(classes))), distinct_colors(255)[:classes])
    label = np.full((40, 60), 255, np.uint8)
    label[:20] = classes - 1
    url = gallery.map_url(label, colors)
    drawn = np.asarray(decode(url).convert("RGB"))
    assert url.startswith("data:image/png") and drawn.shape == (40, 60, 3)
    assert (drawn[:20] == colors.colors[-1]).all()
    assert set(map(tuple, drawn[20:].reshape(-1, 3).tolist())) == set(gallery.CHECKS)


def test_pictures_are_small(hostile: Path) -> None:
    image = np.zeros((1000, 2000, 3), np.uint8)
    assert decode(gallery.jpeg_url(image)).size == (480, 240)
    assert decode(gallery.map_url(np.zeros((3000, 10), np.uint8), SCENE_CLASSES)).size == (2, 480)


def test_raw_predictions_are_those_that_labeled(hostile: Path, run: Path) -> None:
    facts = read_run(run)
    drawn = gallery.draw_gallery(facts, read_data(facts))
    assert drawn is not None and drawn.round == 2 and 2 <= len(drawn.pictures) <= 14
    recipe = load_recipe(run / "recipe.yaml")
    samples = {sample.id: sample for sample in manifest_of(recipe).unlabeled}
    network = load_network(RunDirectory(run).network(1))
    picture = drawn.pictures[0]
    expected = predict_for_labeling(network, read_image(samples[picture.id].image), labeling_protocol(recipe))
    assert picture.prediction is not None and picture.truth is not None
    classes = np.asarray(decode(picture.prediction))
    assert (classes == expected.classes).mean() > 0.999  # memory formats change last bits
    truth = read_label(samples[picture.id].label)
    known = truth != 255
    assert picture.right[0] == pytest.approx((expected.classes == truth)[known].mean(), abs=0.001)
    label = read_label(run / "round_2" / "labels" / f"{picture.id}.png")
    assert picture.right[1] == pytest.approx((label == truth)[known & (label != 255)].mean())
    # Predictions that the run kept are shown unchanged.
    kept = Prediction(np.full((65, 97), 4, np.uint8), np.full((65, 97), 15000, np.uint16))
    path = prediction_path(RunDirectory(run).predictions(2), picture.id)
    path.parent.mkdir(parents=True)
    path.write_bytes(kept.to_bytes())
    again = gallery.draw_gallery(facts, read_data(facts))
    assert again is not None and (np.asarray(decode(again.pictures[0].prediction or "")) == 4).all()
    # Without the network there are none, and a note reports it.
    RunDirectory(run).network(1).unlink()
    without = gallery.draw_gallery(facts, read_data(facts))
    assert without is not None and [p.prediction is None for p in without.pictures].count(False) == 1
    says(without.notes[-1], "round 1", "network")


# --- the page


def scroll_through(page) -> None:
    """Bring every chart into view, because only then it is drawn."""
    until(page, "!!window.Plotly")
    height = page.evaluate("document.documentElement.scrollHeight")
    for top in range(0, height, 600):
        page.evaluate(f"window.scrollTo({{top: {top}, behavior: 'instant'}})")
        page.wait_for_timeout(40)
    until(
        page,
        "[...document.querySelectorAll('[data-chart]')].every(e => !e.offsetParent || e.querySelector('.main-svg'))",
    )


def until(page, condition: str, seconds: float = 60) -> None:
    """Wait until a condition holds. playwright's own waiting evaluates texts in the page, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        page.wait_for_timeout(50)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(hostile: Path, visit, width: int, scheme: str) -> None:
    path = hostile / "run" / "report.html"
    visited = visit(path.as_uri(), width=width, height=844, color_scheme=scheme)
    page = visited.page
    scroll_through(page)
    assert page.locator(".js-plotly-plot .main-svg").count() >= 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("figure img")
    assert images.count() >= 8
    assert page.evaluate("[...document.querySelectorAll('figure img')].every(e => e.naturalWidth > 0)")
    # Names are text on the page, in charts and in hover texts; none was run, none became an element.
    assert page.title() == "run – darseg"
    assert (
        page.locator("main script, main img:not(figure img), main b:not(.round b):not(.said b)").count() == 0
    )
    text = page.locator("main").inner_text()
    assert TRAP in text and IMAGE_TRAP in text and "</title><b>bold & 'quoted' \"twice\"" in text
    ticks = page.locator(".ytick text").all_text_contents()
    assert (
        TRAP[: charts.LONGEST_NAME - 1] + "…" in ticks and "2020-01-01" in ticks and "<!--<script>" in ticks
    )

    # The other theme also changes the colors of the charts.
    def inks() -> list:
        return page.evaluate(
            "[document.querySelector('.ytick text').style.fill, getComputedStyle(document.body).color]"
        )

    before = inks()
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    until(page, f"document.querySelector('.ytick text').style.fill != '{before[0]}'")
    after = inks()
    assert before[0] == before[1] and after[0] == after[1] and before != after
    # A click shows an earlier round, or enlarges a picture.
    button = page.locator(".tabs button", has_text="Round 1").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    images.first.click()
    assert page.locator("dialog[open] img").count() == 1
    assert visited.errors == [] and visited.leaving_the_machine() == []


def test_figures_that_the_page_makes_show_the_numbers_of_the_files(hostile: Path, visit) -> None:
    """Of confidences and confusion matrices the page holds only numbers, and draws them when they come into view."""
    visited = visit((hostile / "run" / "report.html").as_uri())
    scroll_through(visited.page)

    def figure(about: str) -> dict:
        drawn = visited.page.evaluate(
            "(about) => { const box = [...document.querySelectorAll('.chart')].find(e => e.ariaLabel === about);"
            " return {data: box.data[0], layout: box.layout}; }",
            about,
        )
        return drawn["data"] | {"shapes": drawn["layout"].get("shapes", [])}

    facts = read_run(hostile / "run")
    last = facts.rounds[-1]
    assert last.labels is not None and last.scores is not None
    drawn = figure("confusion matrix of round 2")
    confusion = last.scores.confusion
    total = confusion.sum(1, keepdims=True)
    shares = np.where(total > 0, confusion / np.maximum(1, total), np.nan)
    assert np.allclose(np.array(drawn["z"], float), shares, equal_nan=True)
    assert [cell[2] for cell in drawn["customdata"][0]] == confusion[0].tolist()
    assert drawn["text"][0] == [f"{share:.0%}" if share >= 0.005 else "" for share in shares[0]]
    scale, compared = last.labels.histogram.scale, 0
    for k in np.flatnonzero(last.labels.thresholds.predicted):
        drawn = figure(f"confidences of {NAMES[k]} in round 2")
        counts, accept = last.labels.histogram.counts[k], int(last.labels.thresholds.accept[k])
        edges, binned, threshold = charts.bin_confidences(counts, accept, scale, classes=K)
        assert [count or 0 for count in drawn["y"]] == binned.tolist()
        assert np.allclose(np.array(drawn["x"]) + np.array(drawn["width"]) / 2, edges[1:])
        assert [shape["x0"] for shape in drawn["shapes"]] == [threshold] * (threshold is not None)
        colored = [not color.startswith("rgba") for color in drawn["marker"]["color"]]
        assert colored == (edges[:-1] >= (np.inf if threshold is None else threshold)).tolist()
        lowest = f"{last.labels.thresholds.threshold[k]:.4g} – "
        assert threshold is None or drawn["customdata"][colored.index(True)].startswith(lowest)
        compared += 1
    assert compared > 1 and visited.errors == []


def test_sections_of_many_rounds_show_the_first_and_the_newest(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [scored(index, [1], [0]) for index in range(9)]
    for most, expected, facts in (
        (9, range(9), ""),
        (8, (0, *range(2, 9)), "Round 1 is"),
        (4, (0, 6, 7, 8), "Rounds 1 to 5 are"),
        (0, (0, 8), "Rounds 1 to 7 are"),
    ):
        kept, omitted = overview.shown(rounds, most)
        assert [round_.index for round_ in kept] == list(expected)
        assert omitted.startswith(facts) and bool(omitted) == (len(kept) < 9)
    monkeypatch.setattr(overview, "MOST_CELLS", 0)
    text = write_report(hostile / "run", tmp_path / "small.html").read_text()
    says(re.search(r"adds up to 100%. (.*?)</p>", text)[1], "Round 1 is")  # ty: ignore[not-subscriptable]
    assert "confusion matrix of round 0" in text and "confusion matrix of round 1" not in text


def test_the_verdict_comes_first(hostile: Path) -> None:
    text = (hostile / "run" / "report.html").read_text()
    rounds = read_json(hostile / "run" / "summary.json")["rounds"]
    figures = re.search(r'class="figure"><small>mean IoU after round 2</small>(\d\.\d{3})', text)
    assert figures and figures[1] == f"{rounds[2]['mean_iou']:.3f}"
    ious = rounds[2]["iou"]
    lowest = min(value for value in ious.values() if value is not None)
    names = re.search(r"Lowest: <b>(.*?)</b>", text)
    assert names is not None
    assert html.unescape(names[1]) == ", ".join(name for name, value in ious.items() if value == lowest)


def test_a_last_round_as_good_as_the_first_neither_rose_nor_fell(run: Path) -> None:
    shutil.copy(run / "round_0/scores.json", run / "round_2/scores.json")
    text = write_report(run).read_text()
    mean = read_json(run / "round_0/scores.json")["mean_iou"]
    assert f"Mean IoU stayed at <b>{mean:.3f}</b>." in text


def test_names_of_classes_cannot_turn_text_around(tiny_data: Path, tmp_path: Path) -> None:
    values = recipe_dict(tiny_data)
    values["data"]["classes"][0] = "a\u202egnp"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert read_run(tmp_path).classes.names[0] == "a\\u202egnp"


def test_every_template_escapes_what_it_is_given() -> None:
    """HTML may come only from templates and from `render`, never from a filter that marks a value as safe."""
    folder = REPOSITORY / "src" / "darseg" / "report" / "templates"
    templates = {path.name for path in folder.glob("*.html.j2")}
    assert templates == set(page.TEMPLATES.list_templates()) and len(templates) > 10
    for path in folder.glob("*.html.j2"):
        assert not re.search(r"\|\s*safe|autoescape", path.read_text()), path.name
    text = page.render("unscored", text=f"{TRAP} & \"'")
    assert html.unescape(text) == f'<p class="said">{TRAP} & "\'</p>' and "<script" not in text
    turned = page.render("unscored", text="a\u202egnp\x1b[2J")
    assert turned == '<p class="said">a\\u202egnp\\x1b[2J</p>'
    with pytest.raises(UndefinedError):
        page.render("unscored")


def test_a_run_in_progress_has_a_page(hostile: Path) -> None:
    text = (hostile / "after_0.html").read_text()
    assert "mean IoU after round 0" in text and "1 of 3 rounds" in text
    assert text.count("<span>to come</span>") == 2 and "No round has labeled images yet." in text
    assert "Thresholds" not in text


def test_killed_in_the_middle_of_a_round(run: Path) -> None:
    """The labels of round 2 are done and its training is in progress; there is no summary yet."""
    for name in (
        "train.json",
        "network.safetensors",
        "optimizer.safetensors",
        "scores.json",
        "evaluate.json",
    ):
        (run / "round_2" / name).unlink()
    text = write_report(run).read_text()
    assert "mean IoU after round 1" in text and "2 of 3 rounds" in text and "<span>in progress</span>" in text
    assert "Unlabeled images of round 2" in text
    checkpoint = re.search(r"checkpoint</th>\s*<td>(.*?)</td>", text)
    assert checkpoint and checkpoint[1] == str(run / "round_1/network.safetensors")


def test_nothing_scored_yet(run: Path) -> None:
    for index in range(3):
        shutil.rmtree(run / f"round_{index}")
    (run / "journal.jsonl").unlink()
    text = write_report(run).read_text()
    assert "No round has been scored yet." in text and text.count("<span>") == 0


def test_without_validation_images(run: Path) -> None:
    def empty(scores: dict) -> None:
        scores["confusion"] = np.zeros((K, K), int).tolist()

    for index in range(3):
        change_json(run / f"round_{index}" / "scores.json", empty)
    text = write_report(run).read_text()
    assert "Nothing was scored: there are no labeled validation pixels. Set data.validation" in text


def test_a_missing_data_set_leaves_the_figures(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["root"] = "/nowhere/<b>"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = write_report(run).read_text()
    assert "The gallery could not be drawn:" in text and "/nowhere/&lt;b&gt;" in text
    assert "The labeled images can no longer be read" in text and "mean IoU after round 2" in text


def test_a_file_of_the_user_is_not_overwritten(run: Path, tmp_path: Path, call) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    code, _, err = call("report", run, mine)
    assert code == 2 and mine.read_text() == "<p>mine</p>"
    says(err, str(mine))
    with refused(RunError, str(tmp_path), "report.html"):
        write_report(run, tmp_path)
    code, out, _ = call("report", run, tmp_path / "new.html")
    assert code == 0 and out.endswith(f"\nWritten to {tmp_path / 'new.html'}\n")
    assert call("report", run, "--out", tmp_path / "new.html")[0] == 0  # a page of darseg may be


# --- with training


def test_a_finished_run_reports_again_and_signals_pass(hostile: Path, run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    called: list[Path] = []
    darseg.train(recipe, run, after_round=called.append)
    assert called == [run]

    def stop(root: Path) -> None:
        raise Interrupted("stopped by SIGTERM.")

    with pytest.raises(Interrupted):
        darseg.train(recipe, run, after_round=stop)
    texts = [json.loads(line).get("text", "") for line in (run / "journal.jsonl").read_text().splitlines()]
    assert not any("SIGTERM" in text for text in texts)


# --- comparison


@pytest.fixture
def several(hostile: Path, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """dars with two seeds, cbst with one, all with invented scores."""
    folders = {}
    for name, seed, method, right in (
        ("s0/dars", 0, "dars", 60),
        ("s1/dars", 1, "dars", 70),
        ("s0/cbst", 0, "cbst", 50),
    ):
        folder = copy_run(hostile / "run", tmp_path / name)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["seed"], recipe["labeling"]["method"] = seed, method
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        confusion = np.diag(np.full(K, right))
        confusion[0, 1] = 100 - right
        confusion[-1] = confusion[:, -1] = 0  # a class that never occurs
        change_json(
            folder / "round_2/scores.json", lambda scores, c=confusion: scores.update(confusion=c.tolist())
        )
        folders[name] = folder
    yield folders


def test_seeds_share_a_column_with_their_deviation(
    several: dict[str, Path], tmp_path: Path, call, visit
) -> None:
    out = tmp_path / "page.html"
    code, printed, err = call("report", *several.values(), out)
    assert code == 0, err
    first = [right / 100 for right in (60, 70)]
    rows = [line.split("  ") for line in printed.splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert cells["IoU"] == ["dars", "cbst"] and cells["runs"] == ["2", "1"]
    deviation = abs(first[0] - first[1]) / np.sqrt(2)
    assert cells[TRAP] == [f"{np.mean(first):.4f} ± {deviation:.4f}", "0.5000"]
    assert cells["last"] == ["undefined", "undefined"]
    means = [np.mean([r / 100, r / (r + 100 - r), *[1.0] * 8]) for r in (60, 70, 50)]
    assert cells["mean IoU"] == [spread(np.array(means[:2])), f"{means[2]:.4f}"]
    assert printed.endswith(f"Written to {out}\n")
    visited = visit(out.as_uri(), width=390, height=844)
    scroll_through(visited.page)
    assert visited.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert visited.page.locator(".js-plotly-plot .main-svg").count() >= 2
    text = visited.page.locator("main").inner_text()
    assert "Best mean IoU: dars" in text and TRAP in text
    assert "1 key differs from dars" in text and "labeling.method: dars → cbst" in out.read_text()
    assert visited.errors == [] and visited.leaving_the_machine() == []


def test_the_spread_is_the_standard_deviation_of_the_sample() -> None:
    values = [0.2, 0.5, 0.6]
    mean = sum(values) / 3
    deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert spread(np.array([*values, np.nan])) == f"{mean:.4f} ± {deviation:.4f}"
    assert spread(np.array([0.25])) == "0.2500" and spread(np.array([np.nan])) == "undefined"


def test_runs_that_cannot_be_compared(several: dict[str, Path], tmp_path: Path) -> None:
    dars, second, cbst = several.values()
    recipe = yaml.safe_load((second / "recipe.yaml").read_text())
    recipe["data"]["classes"] = {f"new{at}" if at == 0 else name: [at, 0, 0] for at, name in enumerate(NAMES)}
    (second / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(cbst / "round_0")
    for index in (1, 2):
        (cbst / f"round_{index}" / "evaluate.json").unlink()
    reasons = (
        f"{dars}: given twice",
        f"{cbst}: no round was scored",
        f"{second}: other classes than {dars} (has new0; lacks {NAMES[0]})",
    )
    with refused(RunError, *reasons):
        compare_runs([dars, second, cbst, dars], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_different_validation_images_or_protocols_cause_a_warning(
    several: dict[str, Path], tmp_path: Path
) -> None:
    dars, second, cbst = several.values()
    change_json(second / "data.json", lambda data: data.update(validation="other"))
    change_json(cbst / "round_2/scores.json", lambda scores: scores.update(protocol="upside down"))
    compared = compare_runs([dars, second, cbst], tmp_path / "x.html")
    says(compared.warnings[0], str(second), str(dars), "validation")
    says(compared.warnings[1], str(cbst), str(dars), "upside down", "protocols", vary=["(?<=/ )own size.*"])
    assert len(compared.rows[0]) == 4  # other images, so more than the seed differs
    text = html.unescape((tmp_path / "x.html").read_text())
    assert all(warning in text for warning in compared.warnings)


def test_the_same_seed_twice_causes_a_warning(several: dict[str, Path], tmp_path: Path) -> None:
    first, second = several["s0/dars"], tmp_path / "again"
    copy_run(first, second)
    compared = compare_runs([first, several["s1/dars"], second], tmp_path / "page.html")
    assert len(compared.warnings) == 1
    says(compared.warnings[0], str(first), str(second), "seed", "0")
    assert "3 runs" in compared.out.read_text() and "3 seeds" not in compared.out.read_text()


def test_damaged_label_maps_and_truth_of_another_size_are_reported(run: Path, tmp_path: Path) -> None:
    facts = read_run(run)
    data = read_data(facts)
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(small)
    manifest = data.manifest
    assert manifest is not None
    resized = tuple(replace(sample, label=small) for sample in manifest.unlabeled)
    with refused(DataError, str(small), "3x4", "65x97"):
        gallery.draw_gallery(facts, replace(data, manifest=replace(manifest, unlabeled=resized)))
    next((run / "round_2" / "labels").rglob("*.png")).write_bytes(b"nothing")
    assert "The gallery could not be drawn:" in write_report(run).read_text()
