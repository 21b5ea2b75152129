"""Earlier formats of run folders: how darseg 0.2 (format 1) computed the digests of settings.

A format-1 digest covers every field that existed then, at its default or not. It can only equal today's settings if
everything that came later has its default; otherwise there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from darseg.data.augment import Augmentation
from darseg.model.network import NetworkSpec
from darseg.model.windows import Protocol
from darseg.pseudo.labeling import Labeling
from darseg.run.plan import LearnerSettings
from darseg.run.settings import default_of, digest_text
from darseg.training.optimize import SGD, OptimizerKind
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

FIELDS: Mapping[type, Sequence[str]] = {
    Augmentation: ("crop", "scale", "rotate", "blur", "mirror", "fill"),
    NetworkSpec: (
        "architecture",
        "backbone",
        "classes",
        "output_stride",
        "head_channels",
        "auxiliary",
        "class_names",
        "class_colors",
        "release_classifier",
    ),
    Labeling: ("method", "ratio", "threshold", "confidence", "sampling"),
    Protocol: ("window", "base_size", "mirror", "scales", "bf16"),
    SGD: ("momentum", "weight_decay"),
    LearnerSettings: ("learning_rate", "head_factor", "stage4_as_head"),
    Schedule: ("span", "power", "first_step_at_zero"),
    Stage: ("steps", "schedule", "precision", "seed", "micro_batch", "compile"),
}
"""The fields that had a meaning in format 1."""


class LaterSetting(Exception):
    """A setting that format 1 did not know is not at its default."""


def as_format_1(value: Any, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a value that format 1 knew. Raises LaterSetting."""
    known = FIELDS[type(value)]
    for item in fields(value):
        if item.name not in (*known, *ignore) and getattr(value, item.name) != default_of(item):
            raise LaterSetting(item.name)
    return {name: getattr(value, name) for name in known}


def digest_format_1(**settings: Any) -> str:
    """The digest of settings as format 1 computed it."""
    return digest_text(json.dumps(settings, sort_keys=True))


def earlier_digests(digest: Callable[[], str]) -> list[str]:
    """What earlier formats recorded for settings; nothing if `digest` meets one that they did not know."""
    try:
        return [digest()]
    except LaterSetting:
        return []


def stage_format_1(stage: Stage, optimizer: OptimizerKind, **learner: Any) -> dict[str, Any]:
    """What format 1 called a stage; `learner` has learning_rate, head_factor and stage4_as_head."""
    if not isinstance(optimizer, SGD):
        raise LaterSetting("optimizer")
    plain = as_format_1(stage, ignore=("checkpoint_every", "report_every"))
    schedule = as_format_1(plain.pop("schedule"))
    unused = {"checkpoint_every": None, "report_every": None}
    return plain | schedule | as_format_1(optimizer) | learner | unused
