"""The page of `darseg compare`: what it says, in a browser, whatever the names are."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import pytest

from darseg.data.files import ASIDE
from darseg.errors import RunError
from darseg.experiment.statistics import compare_trials
from darseg.experiment.trial import Arm, Evidence, Failure
from darseg.report.variants import comparison_page, publish_comparison
from test_compare_statistics import ARMS, drawn_trials, evidence
from wording import refused

TRAP = "</script><b>&\N{GRINNING FACE}"


@pytest.fixture
def full() -> Evidence:
    """Two numbers of labels, a variant with a hostile name, a ceiling, a failure."""
    hostile = Arm(TRAP, 24, controls=(("steps", "labels only"),), changes=("training.crop=<b>",))
    arms = (
        *(replace(arm, labels=labels) for labels in (24, 48) for arm in (*ARMS, hostile)),
        Arm("all labels", 900, "ceiling"),
    )
    trials = drawn_trials(rights=(0.5, 0.6, 0.4, 0.6, 0.75, 0.6, 0.8), arms=arms, images=12)
    failure = Failure(TRAP, 48, 2, f"DataError: {TRAP}")
    kept = [trial for trial in trials if (trial.variant, trial.labels, trial.seed) != (TRAP, 48, 2)]
    return evidence(kept, arms, failures=(failure,), planned=len(trials), facts=(("machine", TRAP),))


def test_all_files_are_written_and_written_again_the_same(full: Evidence, tmp_path: Path) -> None:
    names = {"compare.html", "compare.json", "compare.csv", "compare.md"}
    publish_comparison(full, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert first.keys() == names
    publish_comparison(replace(full, trials=full.trials[::-1]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert not list(tmp_path.glob(f"*{ASIDE}*"))


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "compare.html").write_text("my own page")
    with refused(RunError, "compare.html"):
        publish_comparison(evidence([]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.html"]


def test_the_page_begins_with_the_answer_and_shows_every_figure(full: Evidence) -> None:
    text = html.unescape(comparison_page(compare_trials(full, 100)).html())
    body = text[text.index("<main>") :]
    assert body.index("With 24 labels, ") < body.index("Scores") < body.index("Runs")
    comparison = compare_trials(full, 100)
    for row in comparison.rows:
        for score in row.scores:
            assert f"{score.mean_iou.mean:.3f} ± {score.mean_iou.deviation:.3f}" in body
        for difference in row.differences:
            estimate = difference.mean_iou
            assert f"{estimate.mean:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})" in body
    assert "1 of 21 runs failed" in body and "DataError: " in body


def test_an_experiment_that_has_just_begun_has_a_page() -> None:
    text = comparison_page(compare_trials(evidence([], planned=6))).html()
    assert "No run of a variant has ended yet." in text and "0 of 6 runs" in text
    trials = drawn_trials(seeds=(0,), images=1)
    text = comparison_page(compare_trials(evidence(trials[:1], planned=6))).html()
    assert "Not finished: 1 of 6 runs have ended." in text
    text = comparison_page(compare_trials(evidence(trials, planned=2))).html()
    assert "There are only 1 validation images" in text  # no interval of one image
    blind = [replace(trial, validation=None) for trial in trials]
    text = comparison_page(compare_trials(evidence(blind, planned=2))).html()
    assert "No validation images were scored" in text


def test_the_page_in_a_browser(full: Evidence, tmp_path: Path, visit) -> None:
    publish_comparison(full, tmp_path)
    visited = visit((tmp_path / "compare.html").as_uri(), width=390, height=844, color_scheme="dark")
    page = visited.page
    for heading in ("Differences", "Labels", "Cost"):
        section = page.locator("section", has=page.locator("h2", has_text=heading))
        section.scroll_into_view_if_needed()
        section.locator(".main-svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="test images").first.click()
    page.locator("#tab-differences-0 .main-svg").first.wait_for()
    assert TRAP in page.locator("main").inner_text()
    assert visited.errors == [] and visited.leaving_the_machine() == []
