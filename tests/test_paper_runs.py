"""The shipped recipes on tiny data in the real folder layouts: check, split, plan, two rounds, scores.

A recipe of each method and kind of data runs, one with its own network cut to a few blocks, the others with a small one.
With DARSEG_FULL=1 all recipes run, with their own networks. What each plans is in test_recipes.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import FULL, REPOSITORY, thorough
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.run.directory import RunDirectory
from draw_layouts import VOC_FURTHER, VOC_TRAIN, draw_cityscapes, draw_voc

pytestmark = pytest.mark.usefixtures("small_network", "few_blocks")

RECIPES = REPOSITORY / "recipes"


def sampled(names: Iterable[str], *always: str) -> list[Any]:
    """Parameters of a test: the names that run always, and the others with DARSEG_FULL=1."""
    listed = list(names)
    assert set(always) <= set(listed)
    return [pytest.param(name, marks=() if name in always else thorough) for name in listed]


CITYSCAPES_RECIPES = [
    path.stem
    for path in sorted(RECIPES.glob("cityscapes_*.yaml"))
    if "dinov2" not in path.stem and not path.stem.endswith("_r101")
]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Cityscapes as most people have it, with id labels only, and VOC with SBD; and the truth by image."""
    root = tmp_path_factory.mktemp("downloads")
    truth = draw_cityscapes(root / "cityscapes", train_ids=False)
    truth |= draw_voc(root / "VOCdevkit/VOC2012", sbd=root / "benchmark_RELEASE/dataset")
    return root, truth


def small(root: Path, data: str, full: bool = False) -> list[str]:
    """Changes of a recipe: rounds of two steps on small crops and images, of its own network if it is `full`."""
    changes = [
        f"data.root={root / data}",
        "network.weights=none",
        "threads=1",
        "training={crop: 49, batch: 4, half_batch: 2, learning_rate: 0.001}",
        "labeling.base_size=49",
        "evaluation.base_size=49",
        "rounds=[{steps: 2}, {steps: 2, labeling_ratio: 0.5}]",
    ]
    return changes if full or FULL else [*changes, "network.backbone=resnet18_half"]


def files_of(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def follow(call, name: str, changes: list[str], run: Path, unlabeled: int, validation: int) -> dict:
    """Plan, train and evaluate, and check the run folder. Returns the scores of round 1."""
    recipe = REPOSITORY / "recipes" / f"{name}.yaml"
    code, out, err = call("plan", recipe, *changes)
    assert code == 0, err
    assert f"{unlabeled} unlabeled, {validation} validation" in out
    code, out, err = call("train", recipe, *changes, "--out", run)
    assert code == 0, err
    described = json.loads((run / "round_1" / "scores.json").read_text())
    assert "probabilities averaged" in described["protocol"] and "long side 49" in described["protocol"]
    assert sum(map(sum, described["confusion"])) > 0
    code, out, err = call("evaluate", run, "--out", run.parent / f"{name}.json")
    assert code == 0 and described["protocol"] in out, err
    scored = json.loads((run.parent / f"{name}.json").read_text())
    assert scored["confusion"] == described["confusion"]
    maps = {path for path in files_of(run) if path.startswith("round_1/labels/")}
    assert len(maps) == unlabeled
    return described


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sampled(CITYSCAPES_RECIPES, "cityscapes_1of8_pspnet50_713", "cityscapes_1of8_deeplabv2_101_361"),
)
def test_cityscapes(name: str, downloads, call, tmp_path: Path) -> None:
    root, truth = downloads
    recipe = REPOSITORY / "recipes" / f"{name}.yaml"
    none = ["data.labeled=null", "data.unlabeled=null"]
    changes = small(root, "cityscapes")
    code, out, err = call("check", recipe, *changes, *none, "rounds=[{steps: 1}]")
    assert code == 0, err
    # 12 of 2,975 images are reported, with what to do. The labels are ids, and are read as train ids.
    for fact in ("12 images", "2,975", "cologne", "leftImg8bit_trainvaltest.zip", "14 label files"):
        assert fact in out
    code, out, err = call(
        "split", recipe, tmp_path / "lists", *changes, *none, "--fraction", "1/4", "--balanced"
    )
    assert code == 0, err
    lists = [f"data.{role}={tmp_path / 'lists' / role}.txt" for role in ("labeled", "unlabeled")]
    run = tmp_path / "run"
    scores = follow(call, name, [*changes, *lists], run, unlabeled=9, validation=2)
    # Every truth pixel of the validation images was scored, in train ids.
    pixels = np.concatenate([truth[f"frankfurt_{i:06d}_000019"].ravel() for i in range(2)])
    counts = np.bincount(pixels[pixels != 255], minlength=19)
    assert np.array_equal(np.array(scores["confusion"]).sum(1), counts)
    # The class shares are those of the labeled list.
    drawn = [
        line.split("/")[-1].split("_leftImg8bit")[0]
        for line in (tmp_path / "lists/labeled.txt").read_text().split()
    ]
    shares = np.bincount(np.concatenate([truth[name].ravel() for name in drawn]), minlength=256)[:19]
    budgets = json.loads((run / "round_1" / "thresholds.json").read_text())["wanted"]
    total = 9 * 97 * 129
    assert budgets == [int(0.5 * (share / shares.sum()) * total) for share in shares]


@pytest.mark.slow
@pytest.mark.parametrize("lists", ["derived", "published"])
def test_voc(lists: str, downloads, call, tmp_path: Path) -> None:
    root, truth = downloads
    name = "voc_1464_pspnet50_321"
    recipe = REPOSITORY / "recipes" / f"{name}.yaml"
    changes = small(root, "VOCdevkit/VOC2012", full=lists == "derived")
    if lists == "published":  # they name SegmentationClassAug, which does not exist here; lines end in blanks
        for role, names in (("labeled", VOC_TRAIN), ("unlabeled", VOC_FURTHER)):
            text = "".join(f"JPEGImages/{id_}.jpg SegmentationClassAug/{id_}.png \n" for id_ in names)
            (tmp_path / f"{role}.txt").write_text(text)
            changes.append(f"data.{role}={tmp_path / role}.txt")
    code, out, err = call("check", recipe, *changes)
    assert code == 0, err
    for fact in ("train.txt", "4 images", "1,464", "9,118", "benchmark.tgz"):
        assert fact in out
    run = tmp_path / "run"
    scores = follow(call, name, changes, run, unlabeled=6, validation=3)
    validation = ("2007_000033", "2007_000042", "2008_000009")
    pixels = np.concatenate([truth[name].ravel() for name in validation])
    counts = np.bincount(pixels[pixels != 255], minlength=21)
    assert np.array_equal(np.array(scores["confusion"]).sum(1), counts)
    # Pseudo labels are compared with SBD's truth.
    pseudo_scores = json.loads((run / "round_1" / "pseudo_scores.json").read_text())
    pixels = np.concatenate([truth[name].ravel() for name in VOC_FURTHER])
    assert pseudo_scores["truth"] == np.bincount(pixels, minlength=256)[:21].tolist()
    label = read_label(next(RunDirectory(run).labels(1).rglob("*.png")))
    assert label.shape == (97, 129)


@pytest.mark.slow
def test_a_run_with_release_quirks_and_micro_batches(downloads, call, tmp_path: Path) -> None:
    root, _ = downloads
    recipe = REPOSITORY / "recipes" / "cityscapes_1of8_deeplabv2_101_361.yaml"
    changes = [
        *small(root, "cityscapes"),
        "data.labeled={every: 4}",
        "data.unlabeled={except_every: 4}",
        "training.micro_batch=2",
        "release_quirks=true",
    ]
    code, _, err = call("train", recipe, *changes, "--out", tmp_path / "run")
    assert code == 0, err
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    rates = [(e["round"], e["step"], e["learning_rate"]) for e in events if e["event"] == "step"]
    assert rates[0] == (0, 0, 0.001)
    assert [rate for index, step, rate in rates if (index, step) == (1, 0)] == [0.0]
    assert [rate for index, step, rate in rates if (index, step) == (1, 1)] == [
        pytest.approx(0.001 * 0.25**0.9)
    ]


def vit(root: Path, data: str, rounds: int, full: bool = False) -> list[str]:
    """Changes of a recipe with DINOv2: two steps a round on small crops, of DINOv2-S unless it is `full`."""
    later = ", {steps: 2, labeling_ratio: 0.5}" * (rounds - 1)
    changes = [
        f"data.root={root / data}",
        "network.weights=none",
        "threads=1",
        "training.crop=42",
        "labeling.window=98",
        "training.batch=4",
        "training.micro_batch=2",
        "training.precision=fp32",  # bf16 is emulated on many CPUs
        f"rounds=[{{steps: 2}}{later}]",
    ]
    return changes if full or FULL else [*changes, "network.backbone=timm/vit_small_patch14_dinov2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sampled(
        ["cityscapes_1of8_dinov2_base_supervised", "cityscapes_1of8_dinov2_base_dars"],
        "cityscapes_1of8_dinov2_base_dars",  # its first round is the other recipe's
    ),
)
def test_cityscapes_on_dinov2(name: str, downloads, call, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    root, truth = downloads
    rounds = 1 if "supervised" in name else 2
    changes = [
        *vit(root, "cityscapes", rounds),
        "data.labeled={every: 4}",
        "data.unlabeled={except_every: 4}",
    ]
    code, _, err = call("train", RECIPES / f"{name}.yaml", *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / f"round_{rounds - 1}" / "scores.json").read_text())
    assert "own size, windows 98x98 with stride 2/3, no mirror" in scores["protocol"]
    pixels = np.concatenate([truth[f"frankfurt_{i:06d}_000019"].ravel() for i in range(2)])
    assert np.array_equal(
        np.array(scores["confusion"]).sum(1), np.bincount(pixels[pixels != 255], minlength=19)
    )
    labels = {path for path in files_of(tmp_path / "run") if path.startswith("round_1/labels/")}
    assert len(labels) == (0 if rounds == 1 else 9)


@pytest.mark.slow
def test_voc_on_dinov2(downloads, call, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    root, truth = downloads
    recipe = RECIPES / "voc_1464_dinov2_base_supervised.yaml"
    changes = vit(root, "VOCdevkit/VOC2012", 1)
    code, _, err = call("train", recipe, *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "round_0" / "scores.json").read_text())
    assert "whole images scaled to the nearest legal sides" in scores["protocol"]
    pixels = np.concatenate([truth[name].ravel() for name in ("2007_000033", "2007_000042", "2008_000009")])
    assert np.array_equal(
        np.array(scores["confusion"]).sum(1), np.bincount(pixels[pixels != 255], minlength=21)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sampled(
        [
            "voc_1464_dinov2_base_unimatch_v2",
            "cityscapes_1of8_dinov2_base_unimatch_v2",
            "voc_1464_unimatch_r101",
            "voc_1464_fixmatch_r101",
            "cityscapes_1of8_unimatch_r101",
            "cityscapes_1of8_fixmatch_r101",
            "voc_1of8_cps_r50",
            "voc_1of8_cps_plain_r50",
        ],
        "cityscapes_1of8_dinov2_base_unimatch_v2",
        "voc_1464_unimatch_r101",
        "voc_1464_fixmatch_r101",
        "cityscapes_1of8_unimatch_r101",
        "voc_1of8_cps_r50",
    ),
)
def test_online_recipes(name: str, downloads, call, tmp_path: Path) -> None:
    """Two steps. The DeepLabv3+ with its own ResNet-101 only if all recipes train their own networks."""
    root, truth = downloads
    voc = name.startswith("voc")
    changes = [
        f"data.root={root / ('VOCdevkit/VOC2012' if voc else 'cityscapes')}",
        "network.weights=none",
        "threads=1",
        "training.half_batch=4",
        "training.micro_batch=2",
        "rounds=[{steps: 2, use: online}]",
    ]
    if "dinov2" in name:
        pytest.importorskip("timm")
        changes += ["training.crop=42", "labeling.window=98"]
        changes += [] if FULL else ["network.backbone=timm/vit_small_patch14_dinov2"]
    else:
        changes += ["training.crop=49"] + ([] if FULL else ["network.backbone=resnet18_half"])
    if not voc:
        changes += ["data.labeled={every: 4}", "data.unlabeled={except_every: 4}"]
    if name.startswith("voc_1of8"):  # without the lists that are drawn
        changes += ["data.labeled=null", "data.unlabeled=null"]
    code, _, err = call("train", RECIPES / f"{name}.yaml", *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "round_0" / "scores.json").read_text())
    dino = "dinov2" in name
    window = "whole images" if voc and "cps" not in name else f"windows {'98x98' if dino else '49x49'}"
    assert window in scores["protocol"] and "no mirror" in scores["protocol"]
    names = (
        ("2007_000033", "2007_000042", "2008_000009")
        if voc
        else [f"frankfurt_{i:06d}_000019" for i in range(2)]
    )
    pixels = np.concatenate([truth[name].ravel() for name in names])
    counts = np.bincount(pixels[pixels != 255], minlength=21 if voc else 19)
    assert np.array_equal(np.array(scores["confusion"]).sum(1), counts)
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    figures = [event for event in events if event["event"] == "step"]
    assert figures and all(0 <= event["accepted"] <= 1 and "loss_unlabeled" in event for event in figures)
    assert ("loss_features" in figures[0]) == name.endswith("_unimatch_r101")
    assert ("loss_second" in figures[0]) == ("cps" in name)


DYNAMIC_RECIPES = [path.stem for path in sorted(RECIPES.glob("*_d[sm]t_r101.yaml"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(DYNAMIC_RECIPES, "voc_1of8_dmt_r101", "cityscapes_1of8_dst_r101"))
def test_recipes_that_doubt_their_labels(name: str, downloads, call, tmp_path: Path) -> None:
    """Two steps of each of three rounds; of four rounds if two networks take turns."""
    root, _ = downloads
    voc, turns = name.startswith("voc"), "_dmt_" in name
    later = (
        "{steps: 2, use: labeled, continues: none, labeled_part: [0.25, 1.0]}, "
        "{steps: 2, labeling_ratio: 0.2, labels_from: 0, continues: 1}, "
        "{steps: 2, labeling_ratio: 1.0, labels_from: 1, continues: 0}"
        if turns
        else "{steps: 2, labeling_ratio: 0.2}, {steps: 2, labeling_ratio: 1.0}"
    )
    last = 3 if turns else 2
    changes = [
        f"data.root={root / ('VOCdevkit/VOC2012' if voc else 'cityscapes')}",
        "network.weights=none",
        "threads=1",
        "training.crop=49",
        "training.batch=4",
        f"data.labeled={'null' if voc else '{every: 4}'}",
        f"data.unlabeled={'null' if voc else '{except_every: 4}'}",
        f"rounds=[{{steps: 2}}, {later}]",
    ]
    if not voc:  # instead of 1024, at which these small images would be large
        changes += ["labeling.base_size=97", "evaluation.base_size=97"]
    changes += [] if FULL else ["network.backbone=resnet18_half"]
    code, _, err = call("train", RECIPES / f"{name}.yaml", *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / f"round_{last}" / "scores.json").read_text())
    assert sum(map(sum, scores["confusion"])) > 0
    facts = json.loads((tmp_path / "run" / f"round_{last}" / "label.json").read_text())["facts"]
    assert facts["share"] == 1.0  # ratio 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    sampled(
        (
            f"{data}_{method}_r101"
            for data in ("voc_1of8", "voc_1464", "cityscapes_1of8")
            for method in ("advsemiseg", "s4gan")
        ),
        "voc_1of8_advsemiseg_r101",
        "cityscapes_1of8_s4gan_r101",
    ),
)
def test_recipes_with_a_discriminator(name: str, downloads, call, tmp_path: Path) -> None:
    root, _ = downloads
    voc = name.startswith("voc")
    changes = [
        f"data.root={root / ('VOCdevkit/VOC2012' if voc else 'cityscapes')}",
        "network.weights=none",
        "threads=1",
        "training.crop=49",
        "training.half_batch=2",
        "online.adversarial.start=1",
        "evaluation.base_size=49",
        "rounds=[{steps: 2, use: online}]",
    ]
    changes += [] if FULL else ["network.backbone=resnet18_half"]
    if name.startswith("voc_1of8"):
        changes += ["data.labeled=null", "data.unlabeled=null"]
    if not voc:
        changes += ["data.labeled={every: 4}", "data.unlabeled={except_every: 4}"]
    code, _, err = call("train", RECIPES / f"{name}.yaml", *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "round_0" / "scores.json").read_text())
    assert "whole images" in scores["protocol"] and sum(map(sum, scores["confusion"])) > 0
    events = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    figures = [event for event in events if event["event"] == "step"]
    own = "adversarial_unlabeled" if "advsemiseg" in name else "feature_matching"
    losses = ("loss_labeled", f"loss_{own}", "loss_self_training", "loss_discriminator")
    assert figures and all(event[loss] >= 0 for event in figures for loss in losses)
    assert figures[0]["accepted"] == 0 <= figures[-1]["accepted"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("data", sampled(["voc_1of8", "voc_1464"], "voc_1464"))
def test_recipes_with_a_classifier_of_images(data: str, downloads, call, tmp_path: Path) -> None:
    """Two steps of the classifier and two of the network; then what it says is not there is not predicted."""
    root, _ = downloads
    changes = [
        f"data.root={root / 'VOCdevkit/VOC2012'}",
        "network.weights=none",
        "network.backbone=resnet18_half",
        "threads=1",
        "training.crop=49",
        "training.half_batch=2",
        "image_classes.weights=none",
        "image_classes.backbone=resnet18_half",
        "image_classes.size=64",
        "image_classes.batch=2",
        "image_classes.unlabeled_batch=2",
        "image_classes.epochs=2",
        "image_classes.ramp=[0, 1]",
        "evaluation.base_size=49",
        "rounds=[{steps: 2, use: online}]",
    ]
    changes += ["data.labeled=null", "data.unlabeled=null"] if data == "voc_1of8" else []
    run = tmp_path / "run"
    code, out, err = call("train", RECIPES / f"{data}_s4gan_mlmt_r101.yaml", *changes, "--out", run)
    assert code == 0 and "classes below probability 0.2" in out, err
    scores = json.loads((run / "round_0" / "scores.json").read_text())
    assert sum(map(sum, scores["confusion"])) > 0
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "classifier_step"]
    assert steps and "loss_unlabeled" in steps[-1]
    code, out, err = call("evaluate", run, "--out", tmp_path / "scores.json")
    assert code == 0, err
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == scores["confusion"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_images_dinov2_small", "own_images_cpu"])
def test_own_images(name: str, tiny_data: Path, call, tmp_path: Path) -> None:
    """A folder as the recipe describes it: images, and label maps of some of them."""
    pytest.importorskip("timm")
    for number, path in enumerate(sorted((tiny_data / "images").rglob("*.png"))):
        label = tiny_data / "labels" / path.relative_to(tiny_data / "images")
        for folder, source in (("images", path), ("labels", label)):
            (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
            if folder == "images" or number < 7:
                shutil.copy(source, tmp_path / "photos" / folder)
    changes = vit(tmp_path, "photos", 2, full=True)
    if name == "own_images_cpu":
        changes += ["training.crop=49", "training.micro_batch=null", "labeling.window=65"]
    changes += [f"data.classes=[{', '.join(SCENE_CLASSES.names)}]"]
    code, _, err = call("train", RECIPES / f"{name}.yaml", *changes, "--out", tmp_path / "run")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "round_1" / "scores.json").read_text())
    assert sum(map(sum, scores["confusion"])) > 0
