"""Digests of settings: a new option at its default changes none, and every other setting changes one.

Both formats are pinned, since a digest that changes makes run folders refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from conftest import REPOSITORY
from darseg.config.text import load_recipe
from darseg.data.encoding import LabelEncoding
from darseg.model.windows import Protocol
from darseg.run.build import spec_of
from darseg.run.data_digest import _described
from darseg.run.formats import LaterSetting, as_format_1, digest_format_1, stage_format_1
from darseg.run.plan import plan_rounds
from darseg.run.settings import Inputs, digest_settings
from darseg.run.steps.train import TrainSettings, settings_of
from darseg.training.loss import LabeledLoss
from darseg.training.optimize import SGD, Adam, AdamW, OptimizerKind
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

OLD = REPOSITORY / "tests" / "assets" / "run_0.2" / "run"


def train_settings(tmp_path: Path) -> TrainSettings:
    """Those of round 0 of the old run folder, as train_round makes them."""
    path = tmp_path / "recipe.yaml"
    path.write_text((OLD / "recipe.yaml").read_text())
    recipe = load_recipe(path)
    network = spec_of(recipe).build()
    planned = plan_rounds(recipe, labeled=4, unlabeled=5, fills={0: network.fill})[0]
    return settings_of(recipe, planned, [1] * 11, pseudo=False)


def test_format_1_is_what_0_2_recorded(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    recorded = json.loads((OLD / "round_0" / "train.json").read_text())["inputs"]["settings"]
    settings = train_settings(tmp_path)
    assert settings.earlier_digests() == [recorded] and settings.digest() != recorded
    recorded = json.loads((OLD / "round_0" / "evaluate.json").read_text())["inputs"]["settings"]
    assert digest_format_1(protocol=as_format_1(Protocol((65, 65)))) == recorded
    # What 0.2 wrote into redistribution.json for a checkpoint without a recipe.
    assert digest_format_1(protocol=None).startswith("01322cbda6e22bd4")


def test_format_2_stays_what_it_is(tmp_path: Path) -> None:
    """If this fails, every run folder of this format would refuse: make a new format that accepts the old digests."""
    pytest.importorskip("timm")
    assert digest_settings(protocol=Protocol((65, 65))) == PINNED["protocol"]
    assert train_settings(tmp_path).digest() == PINNED["training"]


PINNED = {
    "protocol": "7f39a5ef8fe3423f852b2e05a984c808a0603adf95d9589db0d6369cf2e00454",
    "training": "421ef2ad6d6783027345a07b75ebdbbb01e29e03b4dbe1be6e3188869f159539",
}


def test_settings_that_differ_have_other_digests(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    settings = train_settings(tmp_path)
    stage = settings.stage
    changed = [
        replace(settings, stage=replace(stage, steps=7)),
        replace(settings, stage=replace(stage, micro_batch=2)),
        replace(settings, stage=replace(stage, compile=True)),
        replace(settings, stage=replace(stage, schedule=replace(stage.schedule, kind="cosine"))),
        replace(settings, stage=replace(stage, schedule=replace(stage.schedule, warm_up_steps=3))),
        replace(settings, learner=replace(settings.learner, learning_rate=0.02)),
        *(replace(settings, learner=replace(settings.learner, optimizer=kind)) for kind in (Adam(), AdamW())),
        replace(settings, learner=replace(settings.learner, optimizer=SGD(nesterov=True))),
        replace(settings, learner=replace(settings.learner, decay_vectors=False)),
        replace(settings, learner=replace(settings.learner, layer_decay=0.9)),
        replace(settings, learner=replace(settings.learner, labeled_loss=LabeledLoss(hard_below=0.7))),
        replace(settings, learner=replace(settings.learner, labeled_loss=LabeledLoss(class_weights=(2.0,)))),
        replace(settings, stage=replace(stage, clip=1.0)),
        replace(settings, freeze="backbone"),
        replace(settings, drop_path=0.1),
        replace(settings, one_pass=True),
        replace(settings, batch=(4, 2)),
        replace(settings, pseudo_weight=1.0),
        replace(settings, recompute=True),
        replace(settings, augmentation=replace(settings.augmentation, rotate=0.0)),
        replace(settings, network=replace(settings.network, head_channels=16)),
    ]
    assert len(settings.earlier_digests()) == 1
    assert not any(later.earlier_digests() for later in changed[-12:-5])  # 0.2 did not know these
    digests = {value.digest() for value in changed} | {settings.digest()}
    assert len(digests) == len(changed) + 1
    # What changes nothing in the result is left out.
    unaffected = replace(stage, checkpoint_every=77, report_every=3)
    assert replace(settings, stage=unaffected).digest() == settings.digest()


def test_a_new_option_at_its_default_changes_no_digest() -> None:
    @dataclass(frozen=True)
    class Before:
        side: int
        rate: float = 0.1

    old = digest_settings(value=Before(3), names=["a"])

    @dataclass(frozen=True)
    class After:
        side: int
        rate: float = 0.1
        later: str = "off"
        nested: Before = field(default_factory=lambda: Before(1))

    After.__name__ = "Before"
    assert digest_settings(value=After(3), names=["a"], other=None) == old
    assert digest_settings(value=After(3, later="on"), names=["a"]) != old
    assert digest_settings(value=After(3, nested=Before(2)), names=["a"]) != old
    assert digest_settings(value=After(4), names=["a"]) != old and digest_settings(value=After(3)) != old


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [
        (Stage(steps=3, schedule=Schedule("cosine")), SGD()),
        (Stage(steps=3, schedule=Schedule(warm_up_steps=1)), SGD()),
        (Stage(steps=3), SGD(nesterov=True)),
        (Stage(steps=3), AdamW()),
    ],
)
def test_what_0_2_did_not_know_has_no_digest_of_format_1(stage: Stage, optimizer: OptimizerKind) -> None:
    with pytest.raises(LaterSetting):
        stage_format_1(stage, optimizer, learning_rate=0.01)


def test_inputs_name_what_differs() -> None:
    inputs = Inputs({"settings": "new", "labeled": "a"}, ["old"])
    assert inputs.differences({"settings": "new", "labeled": "a"}) == []
    assert inputs.differences({"settings": "old", "labeled": "a"}) == []
    assert inputs.differences({"settings": "older", "labeled": "b", "more": "c"}) == [
        "labeled",
        "more",
        "settings",
    ]
    assert inputs.differences({"settings": "new"}) == ["labeled"]


def test_digests_of_data_name_what_format_1_named(tmp_path: Path) -> None:
    encoding = LabelEncoding("color", ignore=7, colors=(((1, 2, 3), 0),))
    assert repr(encoding).startswith(_described(encoding)[:-1])  # fields of later versions are left out
    assert _described(encoding) == (
        "LabelEncoding(format='color', values=None, other=None, ignore=7, colors=(((1, 2, 3), 0),), city_ids=False)"
    )

    @dataclass(frozen=True)
    class Later(LabelEncoding):
        orientation: str = "upright"

    assert _described(Later("color", ignore=7, colors=(((1, 2, 3), 0),))) == _described(encoding)
    assert "orientation='stored'" in _described(Later(orientation="stored"))
