"""The shipped recipes: they have the paper's values, and their plans are what was published."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch

from conftest import REPOSITORY
from darseg.choices import Mixing, OnlineMethod
from darseg.config.text import load_recipe
from darseg.data.colors import UNCHANGED, Colors
from darseg.data.unlabeled import Boxes, StrongViews
from darseg.methods.acceptance import Above
from darseg.methods.adversarial import Adversarial
from darseg.methods.consistency import Consistency
from darseg.methods.dynamic import DynamicLoss
from darseg.methods.mlmt import Mlmt
from darseg.model.network import NetworkSpec
from darseg.run.build import manifest_of
from darseg.run.check import plan
from darseg.run.dynamic import dynamic_of
from darseg.run.image_classes import describe_classifier, kept_classes, plan_classifier
from darseg.run.plan import learner_settings, plan_rounds, stage_of
from darseg.training.loss import LabeledLoss
from darseg.training.optimize import SGD, AdamW, OptimizerKind
from wording import says

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


class Published(NamedTuple):
    """The settings of one experiment in the paper and the release."""

    network: str
    crop: int
    base_size: int
    scales: tuple[tuple[float, float], ...]
    ratios: tuple[float | None, ...]
    learning_rate: float
    epochs: int
    batches: tuple[tuple[int, int], ...]
    epoch_steps: tuple[int, ...]
    images: tuple[int, int, int]


SMALL, LARGE = (0.25, 1.0), (0.5, 2.0)
HALVES = ((16, 0), (8, 8), (8, 8))
EIGHTH, QUARTER = (372, 2603, 500), (744, 2231, 500)
PSPNET, DEEPLAB = "pspnet, resnet50_deep, output stride 8", "deeplabv2, resnet101_caffe, output stride 8"

PUBLISHED = {
    "cityscapes_1of8_pspnet50_713": Published(
        PSPNET, 713, 2048, (LARGE, LARGE, (0.5, 3.0)), (None, 0.4, 0.65), 0.01, 200, HALVES, (23, 325, 325), EIGHTH
    ),
    "cityscapes_1of4_pspnet50_713": Published(
        PSPNET, 713, 2048, (LARGE, LARGE, (0.4, 2.5)), (None, 0.4, 0.65), 0.01, 200, HALVES, (46, 278, 278), QUARTER
    ),
    "cityscapes_1of8_pspnet50_361": Published(
        PSPNET, 361, 1024, (SMALL, SMALL, (0.2, 1.5)), (None, 0.2, 0.5), 0.01, 200, HALVES, (23, 325, 325), EIGHTH
    ),
    "cityscapes_1of4_pspnet50_361": Published(
        PSPNET, 361, 1024, (SMALL, SMALL, (0.2, 1.5)), (None, 0.4, 0.6), 0.01, 200, HALVES, (46, 278, 278), QUARTER
    ),
    "cityscapes_1of8_deeplabv2_101_361": Published(
        DEEPLAB, 361, 1024, (SMALL,) * 3, (None, 0.2, 0.45), 0.002, 200, ((16, 0), (4, 4), (4, 4)), (162, 650, 650),
        EIGHTH,
    ),
    "voc_1464_pspnet50_321": Published(
        PSPNET, 321, 400, ((0.5, 1.5), (0.5, 1.5), (0.5, 2.0)), (None, 0.4, 0.5), 0.01, 50, HALVES, (91, 1139, 1139),
        (1464, 9118, 1449),
    ),
}  # fmt: skip


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def draw_cityscapes_names(root: Path, labeled: int, unlabeled: int, validation: int) -> None:
    """Write empty files with the names of Cityscapes, and the lists of the release."""
    for split, count in (("train", labeled + unlabeled), ("val", validation)):
        for index in range(count):
            name = f"{split}/town/town_{index:06d}_000019"
            touch(root / f"leftImg8bit/{name}_leftImg8bit.png")
            touch(root / f"gtFine/{name}_gtFine_labelIds.png")
    lines = [
        f"leftImg8bit/train/town/town_{i:06d}_000019_leftImg8bit.png "
        f"gtFine/train/town/town_{i:06d}_000019_gtFine_labelTrainIds.png \n"
        for i in range(labeled + unlabeled)
    ]
    for part in ("1of8", "1of4"):
        folder = root / "splits" / part
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "labeled.txt").write_text("".join(lines[:labeled]))
        (folder / "unlabeled.txt").write_text("".join(lines[labeled:]))


def draw_voc_names(root: Path, labeled: int, unlabeled: int, validation: int) -> None:
    ids = [f"2007_{i:06d}" for i in range(labeled + unlabeled + validation)]
    for number, name in enumerate(ids):
        touch(root / f"JPEGImages/{name}.jpg")
        kind = "SegmentationClassAug" if labeled <= number < labeled + unlabeled else "SegmentationClass"
        touch(root / kind / f"{name}.png")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(ids[:labeled]) + "\n")
    (lists / "val.txt").write_text("\n".join(ids[labeled + unlabeled :]) + "\n")
    drawn = root / "splits/1of8"
    drawn.mkdir(parents=True)
    (drawn / "labeled.txt").write_text("\n".join(ids[:labeled]) + "\n")
    (drawn / "unlabeled.txt").write_text("\n".join(ids[labeled : labeled + unlabeled]) + "\n")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    """Folders of empty files, by the number of images in each role. One image is real: its size is read."""
    roots: dict[tuple[int, int, int], Path] = {}
    roots[OWN] = tmp_path_factory.mktemp("own")
    draw_own_names(roots[OWN])
    for counts in {
        published.images for published in (*PUBLISHED.values(), *DYNAMIC.values(), *JUDGED.values())
    }:
        root = roots[counts] = tmp_path_factory.mktemp("names")
        voc = counts[2] == 1449
        (draw_voc_names if voc else draw_cityscapes_names)(root, *counts)
        first = sorted((root / ("JPEGImages" if voc else "leftImg8bit/train/town")).iterdir())[counts[0]]
        size = (375, 500, 3) if voc else (1024, 2048, 3)
        assert cv2.imwrite(str(first), np.zeros(size, np.uint8))
    return roots


class OnDino(NamedTuple):
    """The settings of a recipe with DPT on DINOv2; those of its optimizer are UniMatch V2's in all of them."""

    network: str
    crop: int
    batch: int
    micro_batch: int | None
    ohem: tuple[float, int] | None
    steps: tuple[int, ...]
    ratios: tuple[float | None, ...]
    scales: tuple[tuple[float, float], ...]
    evaluation: str
    images: tuple[int, int, int]


# UniMatch V2's supervised.py on 4 GPUs: 3,000 images an epoch, whole batches only. VOC: 60 epochs, 8 images a GPU;
# Cityscapes: 180 epochs, 4 images and 200,000 hard pixels a GPU.
VOC_STEPS, CITYSCAPES_STEPS = 60 * (3000 // 4 // 8), 180 * (3000 // 4 // 4)
OWN = (80, 900, 20)
SLIDING = "own size, windows 798x798 with stride 2/3, no mirror"
BASE, SMALL_VIT = "dpt, timm/vit_base_patch14_dinov2", "dpt, timm/vit_small_patch14_dinov2"
THIRDS, RATIOS = (CITYSCAPES_STEPS // 3,) * 3, (None, 0.4, 0.65)
ON_DINO = {
    "voc_1464_dinov2_base_supervised": OnDino(
        BASE, 518, 32, 8, None, (VOC_STEPS,), (None,), (LARGE,),
        "own size, whole images scaled to the nearest legal sides, no mirror", (1464, 9118, 1449),
    ),
    "cityscapes_1of8_dinov2_base_supervised": OnDino(
        BASE, 798, 16, 4, (0.7, 200_000 // 4), (CITYSCAPES_STEPS,), (None,), (LARGE,), SLIDING, EIGHTH
    ),
    "cityscapes_1of8_dinov2_base_dars": OnDino(
        BASE, 798, 16, 4, (0.7, 200_000 // 4), THIRDS, RATIOS, (LARGE, LARGE, (0.5, 3.0)), SLIDING, EIGHTH
    ),
    "own_images_dinov2_small": OnDino(
        SMALL_VIT, 518, 16, None, None, (2000,) * 3, RATIOS, (LARGE,) * 3,
        "own size, windows 518x518 with stride 2/3, no mirror", OWN,
    ),
}  # fmt: skip


class Online(NamedTuple):
    """The settings of a recipe that learns from unlabeled images while it trains."""

    network: str
    crop: int
    batch: int
    micro_batch: int | None
    learner: tuple[float, float, OptimizerKind]
    ohem: tuple[float, int] | None
    steps: int
    method: tuple[OnlineMethod, int, float | None]
    evaluation: str
    images: tuple[int, int, int]


def epochs_of_4_gpus(unlabeled: int, batch: int, epochs: int) -> int:
    """Steps of a release: a GPU has a quarter of the images, filled up, and takes whole batches only."""
    return epochs * (-(-unlabeled // 4) // batch)


# Tables of UniMatch and UniMatch V2: rate of the backbone, factor of the heads. With SGD half the published rate and
# twice the decay, because our loss is twice the published one.
VOC, PLUS = (1464, 9118, 1449), "deeplabv3plus, resnet101_deep, output stride 16"
WHOLE = "own size, whole images scaled to the nearest legal sides, no mirror"
ADAMW = (5e-6, 40.0, AdamW(betas=(0.9, 0.999), weight_decay=0.01))
HALF_SGD = (0.001 / 2, 10.0, SGD(momentum=0.9, weight_decay=2 * 1e-4))
VOC_V1_STEPS = epochs_of_4_gpus(9118, 2, 80)
STREET_SGD = (0.005 / 2, 1.0, SGD(momentum=0.9, weight_decay=2 * 1e-4))
STREET_V1_STEPS, HARD = epochs_of_4_gpus(2603, 2, 240), (0.7, 200_000 // 2)
SLIDING_801 = SLIDING.replace("798x798", "801x801")
ONLINE = {
    "voc_1464_dinov2_base_unimatch_v2": Online(
        BASE, 518, 4 * 4, 4, ADAMW, None, epochs_of_4_gpus(9118, 4, 60), ("unimatch_v2", 2, 0.996), WHOLE, VOC
    ),
    "cityscapes_1of8_dinov2_base_unimatch_v2": Online(
        BASE, 798, 4 * 2, 2, ADAMW, (0.7, 200_000 // 2), epochs_of_4_gpus(2603, 2, 180), ("unimatch_v2", 2, 0.996),
        SLIDING, EIGHTH,
    ),
    "voc_1464_unimatch_r101": Online(
        PLUS, 321, 4 * 2, None, HALF_SGD, None, VOC_V1_STEPS, ("unimatch", 2, None), WHOLE, VOC
    ),
    "voc_1464_fixmatch_r101": Online(
        PLUS, 321, 4 * 2, None, HALF_SGD, None, VOC_V1_STEPS, ("fixmatch", 1, None), WHOLE, VOC
    ),
    "cityscapes_1of8_unimatch_r101": Online(
        PLUS, 801, 4 * 2, 2, STREET_SGD, HARD, STREET_V1_STEPS, ("unimatch", 2, None), SLIDING_801, EIGHTH
    ),
    "cityscapes_1of8_fixmatch_r101": Online(
        PLUS, 801, 4 * 2, 2, STREET_SGD, HARD, STREET_V1_STEPS, ("fixmatch", 1, None), SLIDING_801, EIGHTH
    ),
}  # fmt: skip


class Dynamic(NamedTuple):
    """The settings of a recipe of DST or DMT.

    Attributes:
        alone: steps and batch of a round on the labels alone.
        rounds: steps, labeled and pseudo-labeled images of every other round.
        rates: of these rounds, at their beginning.
    """

    dynamic: DynamicLoss
    crop: tuple[int, int]
    scale: tuple[float, float]
    alone: tuple[int, int]
    rounds: tuple[int, int, int]
    rates: tuple[float, float]
    protocols: tuple[str, str]
    images: tuple[int, int, int]


# The releases of DST-CBC and DMT: epochs of a round, and of those before it on the labels alone.
VOC_EIGHTH, HALF = (1322, 9260, 1449), (0.5, 0.5)
OWN_SIZE, WHOLES = "own size", "whole images scaled to the nearest legal sides, no mirror"
DYNAMIC = {
    "voc_1of8_dst_r101": Dynamic(
        DynamicLoss("dst", 9.0), (321, 321), (0.5, 1.5), (85 * (1322 // 8), 8), (6 * (9260 // 4), 4, 4),
        (0.002, 0.002), (OWN_SIZE, OWN_SIZE), VOC_EIGHTH,
    ),
    "voc_1464_dst_r101": Dynamic(
        DynamicLoss("dst", 9.0), (321, 321), (0.5, 1.5), (85 * (1464 // 8), 8), (6 * (9118 // 4), 4, 4),
        (0.002, 0.002), (OWN_SIZE, OWN_SIZE), VOC,
    ),
    "cityscapes_1of8_dst_r101": Dynamic(
        DynamicLoss("dst", 9.0), (257, 513), HALF, (170 * (372 // 8), 8), (6 * (2603 // 4), 4, 4),
        (0.002, 0.002), ("long side 513", "long side 1024"), EIGHTH,
    ),
    "voc_1of8_dmt_r101": Dynamic(
        DynamicLoss("dmt", 5.0, 5.0), (321, 321), (0.5, 1.5), (85 * (1322 // 8), 8), (4 * (9260 // 7), 1, 7),
        (0.002, 0.001), (OWN_SIZE, OWN_SIZE), VOC_EIGHTH,
    ),
    "voc_1464_dmt_r101": Dynamic(
        DynamicLoss("dmt", 5.0, 5.0), (321, 321), (0.5, 1.5), (85 * (1464 // 8), 8), (5 * (9118 // 7), 1, 7),
        (0.002, 0.001), (OWN_SIZE, OWN_SIZE), VOC,
    ),
    # 60 % of the labeled images begin in both networks, 20 % more in each: 223 + 74 or 75 of 372.
    "cityscapes_1of8_dmt_r101": Dynamic(
        DynamicLoss("dmt", 3.0, 3.0), (257, 513), HALF, (170 * (298 // 8), 8), (10 * (2603 // 6), 2, 6),
        (0.004, 0.004), ("long side 1024", "long side 1024"), EIGHTH,
    ),
}  # fmt: skip


class Judged(NamedTuple):
    """The settings of a recipe with a discriminator; the network and its optimizer are the same in all of them."""

    crop: tuple[int, int]
    scale: tuple[float, float]
    mirror: bool
    batch: int
    steps: int
    span: tuple[float, float]
    online: Adversarial
    evaluation: str
    images: tuple[int, int, int]


# AdvSemiSeg: 20,000 steps for VOC; for Cityscapes, which its release does not have, as ClassMix, which follows it.
# s4GAN: 30,000 of 40,000 steps are evaluated.
ADVSEMISEG = Adversarial(
    "advsemiseg", 10, labeled=0.01, unlabeled=0.001, self_training=0.1, above=0.2, start=5000
)
S4GAN = Adversarial("s4gan", 8, labeled=0, unlabeled=0.1, self_training=1, above=0.6, start=1)
HALVED = "long side 1024, whole images scaled to the nearest legal sides, no mirror"
JUDGED = {
    **{
        f"{name}_advsemiseg_r101": Judged(
            (321, 321), (1, 1), False, 10, 20_000, (0, 1), ADVSEMISEG, WHOLE, images
        )
        for name, images in (("voc_1of8", VOC_EIGHTH), ("voc_1464", VOC))
    },
    "cityscapes_1of8_advsemiseg_r101": Judged(
        (513, 1025), (0.5, 0.5), False, 2, 40_000, (0, 1), replace(ADVSEMISEG, batch=2, start=10_000), HALVED, EIGHTH
    ),
    **{
        f"{name}_s4gan_r101": Judged((321, 321), (1, 1), False, 8, 30_000, (0, 0.75), S4GAN, WHOLE, images)
        for name, images in (("voc_1of8", VOC_EIGHTH), ("voc_1464", VOC))
    },
    **{
        f"{name}_s4gan_mlmt_r101": Judged((321, 321), (1, 1), False, 8, 30_000, (0, 0.75), S4GAN, WHOLE, images)
        for name, images in (("voc_1of8", VOC_EIGHTH), ("voc_1464", VOC))
    },
    "cityscapes_1of8_s4gan_r101": Judged(
        (257, 513), (0.5, 0.5), True, 8, 30_000, (0, 0.75), replace(S4GAN, above=0.7, learning_rate=1e-5), HALVED, EIGHTH
    ),
}  # fmt: skip
# CPS's release: SGD at 0.01 on 4 GPUs, whose gradients are divided by 4 once too often. Its loss weight and mixing.
CROSSED: dict[str, tuple[float, Mixing]] = {
    "voc_1of8_cps_r50": (1.0, "cutmix"),
    "voc_1of8_cps_plain_r50": (1.5, "none"),
}
OTHERS = {"camvid_1of8", "neu_seg_48", "own_images_cpu"}


def printed(out: str) -> str:
    """A plan as docs/networks.md has it: without the class shares, since the files here are empty."""
    lines = [line for line in out.splitlines(keepends=True) if not line.startswith("target of ")]
    assert len(lines) > 5
    return "".join(lines)


def draw_own_names(root: Path) -> None:
    """Write empty files: 1,000 images, of which every tenth has a label map. One image is real."""
    for number in range(1000):
        touch(root / f"images/{number:04d}.jpg")
        if number % 10 == 0:
            touch(root / f"labels/{number:04d}.png")
    assert cv2.imwrite(str(root / "images/0001.jpg"), np.zeros((600, 800, 3), np.uint8))


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES} == {
        *PUBLISHED, *ON_DINO, *ONLINE, *CROSSED, *DYNAMIC, *JUDGED, *OTHERS,
    }  # fmt: skip


@pytest.mark.parametrize("name", ON_DINO)
def test_a_recipe_on_dinov2_plans_its_settings(
    name: str, names: dict[Any, Path], call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the docs show the plan as the command prints it."""
    pytest.importorskip("timm")
    wanted = ON_DINO[name]
    path, change = REPOSITORY / "recipes" / f"{name}.yaml", f"data.root={names[wanted.images]}"
    recipe = load_recipe(path, [change])
    planned = plan(recipe)
    assert planned.network == f"{wanted.network}, crops {wanted.crop}x{wanted.crop}"
    assert planned.images == dict(
        zip(("labeled", "unlabeled", "validation", "test"), (*wanted.images, 0), strict=True)
    )
    assert planned.evaluation.startswith(f"{wanted.evaluation}, scales [1.0], probabilities averaged")
    assert tuple(row.steps for row in planned.rounds) == wanted.steps
    assert tuple(row.labeling_ratio for row in planned.rounds) == wanted.ratios
    assert tuple(row.augmentation.scale for row in planned.rounds) == wanted.scales
    half = wanted.batch // 2
    assert [(row.batch, row.pseudo_batch) for row in planned.rounds] == [
        (wanted.batch, 0),
        *[(half, half)] * (len(wanted.steps) - 1),
    ]
    assert recipe.training.micro_batch == wanted.micro_batch
    assert [(group.name, group.rate, group.weight_decay) for group in planned.groups] == [
        ("backbone", 5e-6, 0.01),
        ("heads", pytest.approx(2e-4), 0.01),
    ]
    first = planned.rounds[0]
    learner, stage = learner_settings(recipe, first), stage_of(recipe, first)
    assert learner.optimizer == AdamW(betas=(0.9, 0.999), weight_decay=0.01)
    assert learner.labeled_loss == (LabeledLoss(*wanted.ohem) if wanted.ohem else LabeledLoss())
    assert (learner.decay_vectors, learner.layer_decay) == (True, 1)
    assert (stage.schedule.power, stage.schedule.warm_up_steps, stage.clip) == (0.9, 0, None)
    how = first.augmentation
    assert (how.rotate, how.blur, how.mirror) == (0, False, True)
    if name.endswith("supervised"):
        assert (recipe.result.align, stage.precision) == ("off", "fp32")
    # Micro-batches: there is no BatchNorm, and hard pixels are chosen in each.
    assert len(planned.notes) == bool(wanted.micro_batch) and "BatchNorm" not in "".join(planned.notes)
    assert ("hard pixels" in "".join(planned.notes)) == bool(wanted.ohem)
    monkeypatch.setattr(
        "darseg.run.check.plan", lambda *_: planned
    )  # building the network again takes seconds
    code, out, _ = call("plan", path, change)
    assert code == 0 and printed(out) in (REPOSITORY / "docs" / "networks.md").read_text(), out


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_recipe_plans_its_settings(
    name: str, names: dict[Any, Path], call, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ONLINE[name]
    if wanted.network == BASE:
        pytest.importorskip("timm")
    path, change = REPOSITORY / "recipes" / f"{name}.yaml", f"data.root={names[wanted.images]}"
    recipe = load_recipe(path, [change])
    planned = plan(recipe)
    assert planned.network == f"{wanted.network}, crops {wanted.crop}x{wanted.crop}"
    assert tuple(planned.images.values()) == (*wanted.images, 0)
    assert planned.evaluation.startswith(f"{wanted.evaluation}, scales [1.0], probabilities averaged")
    assert recipe.result.align == "off"
    (row,) = planned.rounds
    assert (row.steps, row.batch, row.pseudo_batch) == (wanted.steps, wanted.batch, 0)
    assert (row.augmentation.scale, row.augmentation.rotate) == ((0.5, 2.0), 0)
    assert (row.augmentation.blur, row.augmentation.mirror) == (False, True)
    assert recipe.training.micro_batch == wanted.micro_batch
    learner, stage = learner_settings(recipe, row), stage_of(recipe, row)
    assert (row.learning_rate, learner.head_factor, learner.optimizer) == wanted.learner
    assert learner.labeled_loss == (LabeledLoss(*wanted.ohem) if wanted.ohem else LabeledLoss())
    schedule = stage.schedule
    assert (schedule.kind, schedule.power, schedule.warm_up_steps, stage.clip, stage.precision) == (
        "poly", 0.9, 0, None, "fp32",
    )  # fmt: skip
    how = row.online
    assert how is not None
    assert (how.method, how.views, how.teacher and how.teacher.decay) == wanted.method
    accept = Above(0.0 if wanted.learner == STREET_SGD else 0.95)
    assert (how.batch, how.accept, how.weight, how.mixing) == (wanted.batch, accept, 1, "cutmix")
    assert (how.strong.colors, how.strong.boxes) == (
        Colors((0.5, 0.5, 0.5, 0.25), 0.8, 0.2),
        Boxes(0.5, (0.02, 0.4)),
    )
    assert how.strong.colors.blur == (0.1, 2.0) and how.strong.colors.blur_share == 0.5
    assert how.strong.boxes.aspect == (0.3, 1 / 0.3)
    if wanted.network == BASE:
        monkeypatch.setattr("darseg.run.check.plan", lambda *_: planned)  # building it again takes seconds
        code, out, _ = call("plan", path, change)
        assert code == 0 and printed(out) in (REPOSITORY / "docs" / "networks.md").read_text(), out


@pytest.mark.parametrize("name", CROSSED)
def test_a_recipe_with_two_networks_plans_its_settings(name: str, names: dict[Any, Path]) -> None:
    path = REPOSITORY / "recipes" / f"{name}.yaml"
    recipe = load_recipe(path, [f"data.root={names[VOC_EIGHTH]}"])
    (row,) = plan_rounds(recipe, labeled=1322, unlabeled=9260, fills={0: (0, 0, 0)})
    assert (row.steps, row.batch, row.span) == (34 * (9260 // 8), 8, (0, 1))
    how, learner, schedule = row.augmentation, learner_settings(recipe, row), stage_of(recipe, row).schedule
    assert (how.scale, how.rotate, how.blur, how.mirror, how.colors) == ((0.5, 2.0), 0, False, True, None)
    assert (row.learning_rate, learner.head_factor) == (0.01 / 4, 1)
    assert learner.optimizer == SGD(momentum=0.9, weight_decay=4 * 1e-4)
    assert not learner.decay_vectors
    assert (schedule.kind, schedule.power, recipe.result.align) == ("poly", 0.9, "off")
    weight, mixing = CROSSED[name]
    strong = StrongViews(UNCHANGED, Boxes(share=1.0, area=(0.25, 0.5), aspect=None))
    assert row.online == Consistency(
        "cps", 8, strong=strong, mixing=mixing, accept=Above(0.0), weight=weight, teacher=None
    )
    if mixing == "none":  # the networks take seconds
        return
    planned = plan(recipe)
    assert planned.network == "deeplabv3plus, resnet50_deep, output stride 16, crops 513x513"
    assert tuple(planned.images.values()) == (*VOC_EIGHTH, 0)
    assert planned.evaluation.startswith("own size, windows 513x513 with stride 2/3, no mirror, scales [1.0]")
    memory = f"{(planned.state_bytes + planned.activation_bytes) / 1e9:.0f} GB in fp32"
    assert memory in path.read_text()


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_recipe_that_doubts_its_labels_plans_its_settings(name: str, names: dict[Any, Path]) -> None:
    wanted = DYNAMIC[name]
    recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml", [f"data.root={names[wanted.images]}"])
    planned = plan(recipe)
    # Weights of torchvision have their strides on the 3x3 convolutions.
    size = f"crops {wanted.crop[0]}x{wanted.crop[1]}"
    assert planned.network == f"deeplabv2, resnet101, output stride 8, {size}"
    assert {recipe.at(row.index).network.backbone for row in planned.rounds} == {"resnet101"}
    memory = f"{(planned.state_bytes + planned.activation_bytes) / 1e9:.0f} GB in fp32"
    assert memory in (REPOSITORY / "recipes" / f"{name}.yaml").read_text()
    assert tuple(planned.images.values()) == (*wanted.images, 0)
    labeling, evaluation = wanted.protocols
    rule = "cbst" if wanted.dynamic.method == "dmt" else "cbst, decisions by probability / threshold"
    assert planned.labeling.startswith(f"{rule}, {labeling}, {WHOLES}")
    assert planned.evaluation.startswith(f"{evaluation}, {WHOLES}")
    alone = [row for row in planned.rounds if not row.pseudo_batch]
    others = [row for row in planned.rounds if row.pseudo_batch]
    assert {(row.steps, row.batch) for row in alone} == {wanted.alone}
    assert {(row.steps, row.batch, row.pseudo_batch) for row in others} == {wanted.rounds}
    networks = 2 if wanted.dynamic.method == "dmt" else 1
    assert (len(alone), len(others)) == (networks, 5 * networks)
    ratios = [row.labeling_ratio for row in others]
    assert ratios == [ratio for ratio in (0.2, 0.4, 0.6, 0.8, 1.0) for _ in range(networks)]
    # Each round has a whole poly curve of its own.
    for row, (begin, end) in zip(planned.rounds, planned.rates, strict=True):
        assert (begin, end) == (pytest.approx(wanted.rates[bool(row.pseudo_batch)]), 0)
    for row in planned.rounds:
        how, learner = row.augmentation, learner_settings(recipe.at(row.index), row)
        assert (how.scale, how.rotate, how.blur, how.mirror) == (wanted.scale, 0, False, True)
        assert (learner.optimizer, learner.head_factor) == (SGD(momentum=0.9, weight_decay=5e-4), 1)
        assert stage_of(recipe, row).schedule.power == 0.9
    assert dynamic_of(recipe) == wanted.dynamic
    assert (recipe.labeling.confidence, recipe.result.align, recipe.result.keep) == ("float16", "off", "best")
    turns = [(config.labels_from, config.continues) for config in recipe.rounds]
    if wanted.dynamic.method == "dst":
        assert turns == [(None, None)] * 6 and len(planned.networks) == 1
        return
    # In each phase both networks learn from the labels that the other made as the phase began; the second goes first.
    first, second, expected = 0, 1, [(None, None), (None, "none")]
    for _ in range(5):
        expected += [(first, second), (second, first)]
        first, second = len(expected) - 1, len(expected) - 2
    assert turns == expected
    assert [row.begins for row in planned.rounds] == [0, 1] + [1, 0] * 5
    sources = [str(recipe.at(index).network.weights) for index in range(12)]
    assert len({*sources}) == (2 if name.startswith("voc") else 1)
    assert [source == sources[0] for source in sources] == (
        [row.begins == 0 for row in planned.rounds] if name.startswith("voc") else [True] * 12
    )
    parts = [config.labeled_part for config in recipe.rounds]
    own = [None, None] if name.startswith("voc") else [(0.0, 0.8), (0.2, 1.0)]
    assert parts == [*own, *[None] * 10]


@pytest.mark.parametrize("name", JUDGED)
def test_a_recipe_with_a_discriminator_plans_its_settings(name: str, names: dict[Any, Path], call) -> None:
    wanted = JUDGED[name]
    path, change = REPOSITORY / "recipes" / f"{name}.yaml", f"data.root={names[wanted.images]}"
    recipe = load_recipe(path, [change])
    (row,) = plan_rounds(recipe, labeled=wanted.images[0], unlabeled=wanted.images[1], fills={0: (0, 0, 0)})
    how = row.augmentation
    assert (how.crop, how.scale, how.mirror, how.rotate, how.blur) == (
        wanted.crop, wanted.scale, wanted.mirror, 0, False,
    )  # fmt: skip
    assert (row.batch, row.pseudo_batch, row.steps, row.span) == (wanted.batch, 0, wanted.steps, wanted.span)
    assert row.online == wanted.online
    learner, stage = learner_settings(recipe, row), stage_of(recipe, row)
    assert (learner.learning_rate, learner.head_factor) == (2.5e-4, 10)
    assert learner.optimizer == SGD(momentum=0.9, weight_decay=5e-4)
    assert (learner.stage4_as_head, learner.repeated_blocks) == (False, False)
    assert (stage.schedule.kind, stage.schedule.power, stage.schedule.span) == ("poly", 0.9, wanted.span)
    assert recipe.result.align == "off"
    released = load_recipe(path, [change, "release_quirks=true"])
    slips = learner_settings(released, *plan_rounds(released, labeled=99, unlabeled=99, fills={0: (0, 0, 0)}))
    assert (slips.stage4_as_head, slips.repeated_blocks) == (False, True)
    if name.endswith(("voc_1of8_advsemiseg_r101", "cityscapes_1of8_s4gan_r101")):  # the network takes seconds
        planned = plan(released)
        assert planned.network.startswith("deeplabv2, resnet101_caffe, output stride 8, crops")
        assert tuple(planned.images.values()) == (*wanted.images, 0)
        assert planned.evaluation.startswith(f"{wanted.evaluation}, scales [1.0], probabilities averaged")
        learns, judge, quirks = planned.notes
        parameters = {"advsemiseg": "2,783,169", "s4gan": "2,776,513"}[wanted.online.method]
        says(
            learns, "round 0", wanted.online.method, f"{wanted.online.above:g}", f"step {wanted.online.start}"
        )
        says(judge, "round 0", parameters, "Adam", "0.9", "0.99", f"{wanted.online.learning_rate:g}")
        says(quirks, "3 times", "4 times", "2 of its 4 branches", "padding")


@pytest.mark.parametrize(("data", "images"), [("voc_1of8", VOC_EIGHTH), ("voc_1464", VOC)])
def test_a_recipe_with_mlmt_plans_its_classifier(
    data: str, images: tuple[int, int, int], names: dict[Any, Path]
) -> None:
    """ResNet-101, 320x320, 16 + 80 images, 100 passes over the labeled ones; the rest is s4GAN's recipe."""
    path, change = REPOSITORY / "recipes" / f"{data}_s4gan_mlmt_r101.yaml", f"data.root={names[images]}"
    recipe = load_recipe(path, [change])
    alone = load_recipe(REPOSITORY / "recipes" / f"{data}_s4gan_r101.yaml", [change])
    assert recipe.model_copy(update={"image_classes": None}) == alone
    planned = plan_classifier(recipe, manifest_of(recipe))
    assert planned is not None and planned.classes == 21
    assert (planned.backbone, planned.side, planned.learning_rate) == ("resnet101", 320, 0.03)
    assert planned.optimizer == SGD(momentum=0.9, weight_decay=1e-5, nesterov=True)
    epoch_steps = images[0] // 16
    assert planned.how == Mlmt(epoch_steps, batch=16, unlabeled=80, weight=1, ramp=(10, 60), decay=0.999)
    assert planned.stage.steps == 100 * epoch_steps
    rates = [planned.stage.schedule.rate(epoch * epoch_steps, planned.stage.steps, 0.03) for epoch in (0, 50)]
    assert rates == [pytest.approx(0.03), pytest.approx((0.03 + 0.0001) / 2)]
    assert recipe.image_classes is not None and recipe.image_classes.threshold == 0.2
    assert recipe.image_classes.weights == recipe.network.weights
    assert kept_classes(recipe) == (0,)
    released = load_recipe(path, [change, "release_quirks=true"])
    assert kept_classes(released) == ()
    says(
        describe_classifier(recipe, planned),
        "resnet101", "320x320", "100 epochs", f"{epoch_steps} steps", "16", "80", "0.2", "removed", "background",
    )  # fmt: skip
    says(describe_classifier(released, planned), "logit 0", "none")


def test_a_transformer_trained_with_sgd_is_said(names: dict[Any, Path]) -> None:
    pytest.importorskip("timm")
    path, root = REPOSITORY / "recipes" / "own_images_dinov2_small.yaml", f"data.root={names[OWN]}"
    sgd = plan(load_recipe(path, [root, "training.optimizer=sgd"]))
    (note,) = [line for line in sgd.notes if "patches" in line]
    says(note, "round 0", "training.optimizer: adamw")
    assert not any("patches" in line for line in plan(load_recipe(path, [root])).notes)


def test_the_plan_of_the_recipe_without_a_gpu_is_in_the_docs(names: dict[Any, Path], call) -> None:
    path = REPOSITORY / "recipes" / "own_images_cpu.yaml"
    code, out, _ = call("plan", path, f"data.root={names[OWN]}")
    assert code == 0 and printed(out) in (REPOSITORY / "docs" / "networks.md").read_text(), out


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_plans_what_was_published(name: str, names: dict[Any, Path], call) -> None:
    published = PUBLISHED[name]
    path = REPOSITORY / "recipes" / f"{name}.yaml"
    root = names[published.images]
    planned = plan(load_recipe(path, [f"data.root={root}"]))
    assert planned.network == f"{published.network}, crops {published.crop}x{published.crop}"
    assert planned.images == dict(
        zip(("labeled", "unlabeled", "validation", "test"), (*published.images, 0), strict=True)
    )
    protocol = (
        f"long side {published.base_size}, windows {published.crop}x{published.crop} with stride 2/3, with mirror, "
        "scales [1.0]"
    )
    assert planned.labeling == f"dars, {protocol}, logits averaged, fp32"
    assert planned.evaluation == f"{protocol}, probabilities averaged, fp32"
    assert planned.notes == ()
    assert tuple(row.augmentation.scale for row in planned.rounds) == published.scales
    assert tuple(row.labeling_ratio for row in planned.rounds) == published.ratios
    assert tuple((row.batch, row.pseudo_batch) for row in planned.rounds) == published.batches
    assert tuple(row.epoch_steps for row in planned.rounds) == published.epoch_steps
    assert all(row.epochs == published.epochs for row in planned.rounds)
    assert tuple(row.steps for row in planned.rounds) == tuple(
        published.epochs * n for n in published.epoch_steps
    )
    # The release goes on counting epochs: rounds enter the poly curve at 0, 1/2 and 2/3, and end at 0.
    for (begin, end), share in zip(planned.rates, (0, 1 / 2, 2 / 3), strict=True):
        assert begin == pytest.approx(published.learning_rate * (1 - share) ** 0.9) and end == 0
    # The command prints the same.
    code, out, _ = call("plan", path, f"data.root={root}")
    assert code == 0
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()[1:4]]
    for index, row in enumerate(rows):
        batch, pseudo = published.batches[index]
        low, high = published.scales[index]
        ratio = published.ratios[index]
        assert row[:7] == [
            str(index),
            f"{ratio:g}" if ratio else "-",
            str(published.epochs),
            str(published.epoch_steps[index]),
            str(published.epochs * published.epoch_steps[index]),
            f"{batch} + {pseudo}" if pseudo else str(batch),
            f"{low:g} – {high:g}",
        ]
        share = (0, 1 / 2, 2 / 3)[index]
        assert row[8:] == [f"{published.learning_rate * (1 - share) ** 0.9:.6g}", "0"]
    assert published.network in out and f"long side {published.base_size}" in out


def test_the_rest_of_the_papers_settings() -> None:
    for name in PUBLISHED:
        recipe = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml")
        training, augmentation = recipe.training, recipe.augmentation
        first, *_ = plan_rounds(recipe, labeled=100, unlabeled=100, fills={0: (0, 0, 0)})
        learner = learner_settings(recipe, first)
        assert learner.optimizer == SGD(momentum=0.9, weight_decay=1e-4)
        assert (learner.head_factor, training.power, training.pseudo_weight) == (10, 0.9, 1)
        assert (augmentation.rotate, augmentation.blur, augmentation.mirror) == (10, True, True)
        assert (recipe.labeling.method, recipe.labeling.confidence, recipe.labeling.sampling) == (
            "dars",
            "float16",
            "random",
        )
        assert not recipe.release_quirks


def test_a_plan_notes_quirks_and_micro_batches(names: dict[Any, Path]) -> None:
    path = REPOSITORY / "recipes" / "cityscapes_1of8_deeplabv2_101_361.yaml"
    changes = [f"data.root={names[EIGHTH]}", "release_quirks=true", "training.micro_batch=2"]
    planned = plan(load_recipe(path, changes))
    micro_batches, quirks = planned.notes
    says(micro_batches, "2 images", "round 0: 8, round 1: 2, round 2: 2", "BatchNorm")
    says(quirks, "release_quirks", "learning rate 0", "10 times", "2 of its 4 branches")
    (processes, micro_batches, _) = plan(load_recipe(path, changes), processes=4).notes
    assert processes.startswith("4 processes") and "round 0: 2, round 1: 1, round 2: 1" in micro_batches
    plain = plan(load_recipe(path, changes[:1]))
    assert planned.activation_bytes < plain.activation_bytes / 3
    with torch.device("meta"):
        network = NetworkSpec("deeplabv2", "resnet101_caffe", 19, auxiliary=False).build()
    expected = sum(parameter.numel() for parameter in network.parameters())
    assert planned.parameters == plain.parameters == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_it_needs(path: Path) -> None:
    opening = path.read_text().split("\ndata:")[0]
    for part in (
        "labeled",
        "# Needs",
        "# Takes",
        f"# Run     darseg train recipes/{path.name}",
        "disk",
        "memory",
    ):
        assert part in opening, part
