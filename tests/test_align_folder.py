"""`redistribute` with aligned decisions: the same bytes as weights applied by hand, however the work is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forks
from darseg.errors import DataError, RecipeError, RunError
from darseg.pseudo import redistribute as arrays_module
from darseg.pseudo.labeling import AlignSettings, Labeling
from darseg.pseudo.pixel_sample import PixelSample
from darseg.pseudo.redistribute import redistribute
from darseg.run import redistribute as module
from darseg.run.formats import as_format_1
from test_interrupted import KILLER
from test_labeling import file_of, outcome, redistribute_quietly, save
from wording import refused, says

torch.set_num_threads(1)

COUNTS = [400, 350, 250, 10]
RATIO = 0.5


def draw(count: int) -> dict[str, np.ndarray]:
    """Logits that favor the first class; the last one is never predicted."""
    rng = np.random.default_rng(count)
    offset = np.array([1.5, 0, 0, -40])[:, None, None]
    arrays = {}
    for index in range(count):
        logits = rng.normal(0, 2, (4, 15 + index % 3, 17 + index % 4)) + offset
        arrays[f"city_{index % 2}/{index:02d}"] = logits.astype(np.float16 if index % 3 else np.float32)
    return dict(sorted(arrays.items()))


ARRAYS = draw(8)
NAMES = list(ARRAYS)


def by_hand(arrays: dict[str, np.ndarray], weights: np.ndarray, half: bool = True) -> dict[str, np.ndarray]:
    """Logits of p·w, relative to the largest of their pixel."""
    bias = np.log(weights).astype(np.float32)[:, None, None]
    weighted = {}
    for name, array in arrays.items():
        relative = array.astype(np.float32) - array.max(axis=0).astype(np.float32)
        if half:
            relative = relative.astype(np.float16).astype(np.float32)
        weighted[name] = relative + bias
        weighted[name] -= weighted[name].max(axis=0)
    return weighted


def probabilities_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: torch.softmax(torch.from_numpy(a).float(), 0).numpy() for name, a in arrays.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source"), ARRAYS)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that an uninterrupted call writes."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    redistribute_quietly(source, out, COUNTS, RATIO, align=True)
    return outcome(out)


@pytest.mark.parametrize("how", [
    {}, {"confidence": "fine"}, {"method": "cbst", "align": AlignSettings(bound=4, strength=0.5)},
], ids=["dars", "fine", "half"])  # fmt: skip
def test_the_labels_are_those_of_weights_applied_by_hand(source: Path, tmp_path: Path, how: dict) -> None:
    align, plain = how.get("align", True), {key: how[key] for key in how if key != "align"}
    described = redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=align, **plain)
    result = redistribute(ARRAYS, COUNTS, RATIO, align=align, **plain)
    assert result.alignment is not None and result.alignment.converged
    assert described["alignment"] == result.alignment.to_json()
    assert described["alignment"]["reachable"] == [True, True, True, False]
    assert described["alignment"]["weights"][0] < 0.9 and described["alignment"]["weights"][3] == 1
    weighted = by_hand(ARRAYS, np.array(described["alignment"]["weights"]), how.get("confidence") != "fine")
    expected = redistribute(weighted, COUNTS, RATIO, **plain)
    redistribute_quietly(save(tmp_path / "weighted", weighted), tmp_path / "hand", COUNTS, RATIO, **plain)
    names = {f"{name}.png" for name in NAMES} | {"histogram.npz"}
    written, hand = outcome(tmp_path / "out"), outcome(tmp_path / "hand")
    assert set(written) == names | {"redistribution.json"}
    assert all(written[name] == hand[name] for name in names)
    for name in NAMES:
        assert np.array_equal(result.labels[name], expected.labels[name])
    assert result.thresholds == expected.thresholds
    unaligned = redistribute(ARRAYS, COUNTS, RATIO, **plain)
    assert unaligned.alignment is None and unaligned.thresholds != result.thresholds


def test_predicted_shares_are_the_labeled_ones() -> None:
    result = redistribute(ARRAYS, COUNTS, RATIO, align=True)
    shares = result.histogram.predicted / result.histogram.predicted.sum()
    assert result.alignment is not None
    assert np.abs(shares - result.alignment.reached).max() < 2e-3
    assert np.allclose(shares[:3], np.array(COUNTS[:3]) / sum(COUNTS[:3]), atol=3e-3)


def test_probabilities_are_multiplied_and_normalized_again(tmp_path: Path) -> None:
    arrays = probabilities_of(ARRAYS)
    result = redistribute(arrays, COUNTS, RATIO, align=True, probabilities=True)
    assert result.alignment is not None
    weights = torch.tensor(result.alignment.weights, dtype=torch.float32)[:, None, None]
    weighted = {name: torch.from_numpy(a) * weights for name, a in arrays.items()}
    weighted = {name: (product / product.sum(dim=0)).numpy() for name, product in weighted.items()}
    expected = redistribute(weighted, COUNTS, RATIO, probabilities=True)
    assert result.thresholds == expected.thresholds
    assert all(np.array_equal(result.labels[name], expected.labels[name]) for name in NAMES)
    described = redistribute_quietly(
        save(tmp_path / "in", arrays), tmp_path / "out", COUNTS, RATIO, align=True, probabilities=True
    )
    assert described["alignment"] == result.alignment.to_json()
    with refused(DataError, NAMES[0], "not probabilities"):
        redistribute(ARRAYS, COUNTS, RATIO, align=True, probabilities=True)


@pytest.mark.parametrize("confidence", ["float16", "fine"])
def test_large_logits_are_as_precise_as_small_ones(confidence: Any) -> None:
    """Only the differences within a pixel count: near 2000, where float16 has steps of 1, and 30,000."""
    small = {name: (array * 256).round().astype(np.float32) / 256 for name, array in ARRAYS.items()}
    expected = redistribute(small, COUNTS, RATIO, align=True, confidence=confidence)
    assert expected.alignment is not None and expected.alignment.converged
    for offset in (2000, 30_000):
        large = {name: array + np.float32(offset) for name, array in small.items()}
        result = redistribute(large, COUNTS, RATIO, align=True, confidence=confidence)
        assert result.thresholds == expected.thresholds
        assert all(np.array_equal(result.labels[name], expected.labels[name]) for name in NAMES)


@pytest.mark.parametrize("probabilities", [False, True])
def test_weights_of_one_are_the_plain_result(probabilities: bool) -> None:
    arrays: dict[str, np.ndarray] = ARRAYS
    if probabilities:  # whose sums are 1 only up to float16
        arrays = {name: array.astype(np.float16) for name, array in probabilities_of(ARRAYS).items()}
    how = {"probabilities": probabilities, "confidence": "fine"}
    plain = redistribute(arrays, COUNTS, RATIO, **how)
    aligned = redistribute(arrays, COUNTS, RATIO, align=AlignSettings(strength=0), **how)
    assert aligned.alignment is not None and set(aligned.alignment.weights) == {1}
    assert np.array_equal(aligned.histogram.counts, plain.histogram.counts)
    assert all(np.array_equal(aligned.labels[name], plain.labels[name]) for name in NAMES)


def test_a_small_sample_is_the_same_in_memory_and_from_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(PixelSample):
        def __init__(self, classes: int, seed: int) -> None:
            super().__init__(classes, seed, limit=500)

    monkeypatch.setattr("darseg.run.align_samples.PixelSample", Small)
    monkeypatch.setattr(arrays_module, "PixelSample", Small)
    described = redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=True)
    result = redistribute(ARRAYS, COUNTS, RATIO, align=True)
    backward = redistribute(list(ARRAYS.items())[::-1], COUNTS, RATIO, align=True)
    assert result.alignment is not None and backward.alignment is not None
    assert described["alignment"] == result.alignment.to_json() == backward.alignment.to_json()
    assert 250 <= result.alignment.pixels <= 500
    other = redistribute(ARRAYS, COUNTS, RATIO, align=True, seed=1).alignment
    assert other is not None and other.weights.tolist() != result.alignment.weights.tolist()


def test_predicting_twice_leaves_the_same_bytes(
    source: Path, tmp_path: Path, wanted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, scores = [], module.read_scores
    monkeypatch.setattr(module, "read_scores", lambda path: (read.append(path), scores(path))[1])
    redistribute_quietly(source, tmp_path / "twice", COUNTS, RATIO, align=True, predict_twice=True)
    assert outcome(tmp_path / "twice") == wanted and len(read) == 3 * len(NAMES)
    read.clear()
    redistribute_quietly(source, tmp_path / "once", COUNTS, RATIO, align=True)
    assert outcome(tmp_path / "once") == wanted and len(read) == 2 * len(NAMES) + 1  # and one for its size


def test_without_align_settings_and_files_are_as_before(source: Path, tmp_path: Path) -> None:
    described = redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=False)
    assert "alignment" not in described
    assert set(described["settings"]) == {
        "method", "labeling_ratio", "threshold", "confidence", "sampling", "seed", "class_counts",
    }  # fmt: skip
    assert as_format_1(Labeling(ratio=0.5)) == {
        "method": "dars", "ratio": 0.5, "threshold": None, "confidence": "float16", "sampling": "random",
    }  # fmt: skip
    with refused(RunError, "settings", "redistribution.json"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=True)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {name: ARRAYS[name] for name in NAMES[:2]})
    redistribute_quietly(source, tmp_path / "wanted", COUNTS, RATIO, align=True)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    command = ["redistribute", source, "OUT", "--class-counts", counts, "--labeling-ratio", RATIO, "--align"]
    result = forks.python("-c", KILLER, tmp_path / "killed", *command)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.splitlines()[-1].split()[0]) > 2 + 2 + 2 + 5
    wanted = outcome(tmp_path / "wanted")
    assert all(outcome(folder) == wanted for folder in (tmp_path / "killed").iterdir())


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_weights_of_other_counts_are_not_taken_over(source: Path, tmp_path: Path, monkeypatch) -> None:
    other = list(reversed(COUNTS))
    wanted = redistribute_quietly(source, tmp_path / "wanted", other, RATIO, align=True, predict_twice=True)
    with monkeypatch.context() as patched:
        patched.setattr("darseg.run.label_samples.count_predictions", stop)
        with pytest.raises(KeyboardInterrupt):
            redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=True, predict_twice=True)
    assert (tmp_path / "out" / ".alignment.json").is_file()  # and nothing else that was worked for
    described = redistribute_quietly(source, tmp_path / "out", other, RATIO, align=True, predict_twice=True)
    assert described["alignment"] == wanted["alignment"]


def test_two_processes_write_the_same_bytes(source: Path, tmp_path: Path, wanted: dict[str, bytes]) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    result = forks.torchrun("-m", "darseg", "redistribute", source, tmp_path / "out", "--align",
                            "--class-counts", counts, "--labeling-ratio", RATIO)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert outcome(tmp_path / "out") == wanted
    table = result.stdout[result.stdout.rindex("\nclass ") + 1 :]
    says(table.replace(str(tmp_path), "TMP"), "class 3", "out of reach", "8 images")


def test_a_file_that_was_fixed_changes_the_weights_of_all(tmp_path: Path) -> None:
    """Predictions that wait were made with weights of other files, and are not used."""
    arrays, how = probabilities_of(ARRAYS), {"align": True, "probabilities": True}
    source, out = save(tmp_path / "source", arrays), tmp_path / "out"
    redistribute_quietly(source, tmp_path / "wanted", COUNTS, RATIO, **how)
    damaged, wanted = file_of(source, NAMES[2]), outcome(tmp_path / "wanted")
    np.save(damaged, arrays[NAMES[2]] * 2)  # which only counting notices
    with refused(
        DataError, "1 file(s)", str(damaged), "not probabilities", vary=[r"from [\d.e-]+ to [\d.]+"]
    ):
        redistribute_quietly(source, out, COUNTS, RATIO, **how)
    assert (out / ".alignment.json").exists() and len(outcome(out)) == len(NAMES) + 1
    np.save(damaged, arrays[NAMES[2]])
    redistribute_quietly(source, out, COUNTS, RATIO, **how)
    assert outcome(out).keys() == wanted.keys()
    assert all(outcome(out)[name] == wanted[name] for name in wanted if name.endswith((".png", ".npz")))


def test_all_files_that_cannot_be_used_are_named(source: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "copied"))
    damaged = [file_of(copied, name) for name in (NAMES[2], NAMES[4])]
    for path, array in zip(damaged, (np.full((4, 5, 5), np.nan), np.zeros((3, 5, 5))), strict=True):
        np.save(path, array.astype(np.float32))
    with refused(DataError, "2 file(s)", *map(str, damaged), "NaN", "3 classes"):
        redistribute_quietly(copied, tmp_path / "out", COUNTS, RATIO, align=True)


def test_a_damaged_file_of_weights_is_named(source: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("darseg.run.label_samples.count_predictions", stop)
        with pytest.raises(KeyboardInterrupt):
            redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=True)
    (tmp_path / "out" / ".alignment.json").write_text("{}")
    with refused(RunError, ".alignment.json", "Remove it"):
        redistribute_quietly(source, tmp_path / "out", COUNTS, RATIO, align=True)


def test_impossible_settings_are_refused(source: Path, tmp_path: Path) -> None:
    settings: Any = AlignSettings(bound=1, strength=-1)
    with refused(RecipeError, "bound: found 1", "strength: found -1"):
        redistribute(ARRAYS, COUNTS, RATIO, align=settings)
    with refused(RecipeError, "bound", "align"):
        Labeling(ratio=0.5, bound=2)
    with refused(RecipeError, "align: found 'soft'", "none, decisions"):
        Labeling(ratio=0.5, align="soft")  # ty: ignore[invalid-argument-type]
    with refused(DataError, "only once", "mapping"):
        redistribute(iter(ARRAYS.items()), COUNTS, RATIO, align=True)


def test_the_command_refuses_settings_of_align_without_it(source: Path, tmp_path: Path, call) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    command = ["redistribute", source, tmp_path / "out", "--class-counts", counts, "--labeling-ratio", RATIO]
    code, _, err = call(*command, "--bound", "3", "--strength", "0.5")
    assert code == 2
    says(err, "--bound and --strength", "--align")
