"""The text of a proposed recipe: every value with its reason as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from darseg.config.text import flow
from darseg.init.data import quoted
from darseg.init.draft import Draft, Form, path_from
from darseg.init.fit import DINO, DINO_SOURCE, Fit, is_dino, predicts_twice, takes_adamw
from darseg.model.network import HEAD_CHANNELS
from darseg.training.bootstrap import LEAST_HELD_OUT


def header_text(draft: Draft, out: Path) -> str:
    """The comments at the top: what to do next, what was found, and what to look at."""
    lines = [
        "# Written by darseg init. You can change everything; docs/recipe.md explains all keys.",
        f"# Next: darseg check {_one_line(quoted(out))}",
    ]
    for note in draft.notes:
        lines += _comment_lines(f"Found: {note}")
    for warning in draft.warnings:
        lines += _comment_lines(f"LOOK AT THIS: {warning}")
    return "\n".join(lines) + "\n"


def recipe_text(draft: Draft, fit: Fit, form: Form, *, out: Path) -> str:
    """The recipe without the comments at the top.

    Args:
        form: the keys that say the roles of the images.
        out: where the recipe will be, for paths relative to it.
    """
    lines = [
        *data_lines(draft, form, out),
        *_network_lines(fit),
        *_training_lines(draft, fit),
        *_result_lines(draft, fit),
        *_rounds_lines(draft, fit),
    ]
    return "\n".join(lines) + "\n"


def data_lines(draft: Draft, form: Form, out: Path) -> Iterator[str]:
    """The data section."""
    yield "data:"
    root = path_from(out.parent, draft.root)
    yield f"  root: {flow(root)}  # relative to this file; the paths below are relative to this folder"
    reason = _one_line(draft.class_comment)
    if isinstance(draft.classes, str):
        yield _entry("classes", draft.classes, reason)
    else:
        yield f"  classes:  # {reason}"
        for at, name in enumerate(draft.classes):
            colors = draft.classes if isinstance(draft.classes, dict) else None
            entry = f"{flow(name)}: {flow(colors[name])}" if colors else f"- {flow(name)}"
            note = draft.class_notes[at] if at < len(draft.class_notes) else ""
            yield f"    {entry}" + (f"  # {note} of the labeled pixels" if note else "")
    for key, (value, comment) in (draft.keys | form).items():
        yield _entry(key, value, comment)


def _entry(key: str, value: Any, comment: str) -> str:
    return f"  {key}: {flow(value)}" + (f"  # {_one_line(comment)}" if comment else "")


def _network_lines(fit: Fit) -> Iterator[str]:
    spec, gpu, stride = fit.spec, fit.device == "cuda", fit.spec.output_stride
    dino = is_dino(spec)
    alternative = "resnet101 is larger, as in the paper" if gpu else "with a GPU, use DINOv2"
    if dino:
        alternative = "vit_base_patch14_dinov2 is larger, and takes three times the work"
    yield "network:"
    if spec.architecture != "pspnet":
        reason = "the head of UniMatch V2 for DINOv2" if dino else "as in the weight file"
        yield f"  architecture: {spec.architecture}  # {reason}"
    yield f"  backbone: {spec.backbone}  # the main part of the network, for {fit.described}; {alternative}"
    pretrained = "DINOv2's own weights" if dino else "ImageNet weights, as in the paper"
    if spec.backbone == DINO:
        pretrained += f": {DINO_SOURCE}"
    weights = (
        pretrained
        if fit.weights != "none"
        else "the network starts from random numbers, which gives much lower scores if there are few labels. Better: "
        f"give torchvision's {spec.backbone} (download.pytorch.org/models), as a file or as "
        "{url: https://…, sha256: …}"
    )
    yield from _comment_lines(weights, "  ")
    yield f"  weights: {flow(fit.weights)}"
    if not takes_adamw(spec):
        detail = "as in the paper; 16 is faster" if gpu else "fast; 8 is finer and slower"
        yield f"  output_stride: {stride}  # one prediction for {stride} x {stride} pixels, then enlarged: {detail}"
    published = HEAD_CHANNELS.get(spec.architecture)
    if spec.head_channels != published:
        usual = f"fast; the paper has {published}" if published else "as in the weight file"
        yield f"  head_channels: {spec.head_channels}  # size of the last part of the network: {usual}"


ADAMW_RATE, ADAMW_HEADS = 0.0003, 10
"""For convolutional networks and few steps, as on a CPU. Measured: docs/networks.md, "Without a GPU"."""

PSEUDO_WEIGHT = 0.4
"""With `one_pass`, for few steps. Measured: docs/experiments.md, "Methods on NEU-Seg in 1,500 steps"."""


def _training_lines(draft: Draft, fit: Fit) -> Iterator[str]:
    heights, widths = (sorted(side) for side in zip(*(draft.sizes or [(0, 0)]), strict=True))
    smallest, largest = f"{heights[0]}x{widths[0]}", f"{heights[-1]}x{widths[-1]}"
    sizes = smallest if smallest == largest else f"{smallest} to {largest}"
    legal = fit.spec.sides
    multiples = f"multiples of {legal.step}" + (f" plus {legal.offset}" if legal.offset else "")
    pieces = f"{multiples}, within the images ({sizes})"
    memory = f"a step needs {fit.memory / 1e9:.1f} GB and may take {fit.budget / 1e9:.1f} GB here"
    yield "training:"
    yield f"  crop: {flow(list(fit.crop))}  # height and width of the pieces to train on: {pieces}"
    yield f"  batch: {fit.batch}  # images per step; {memory}"
    if takes_adamw(fit.spec):
        yield "  optimizer: adamw  # usual for networks of patches"
    elif fit.device == "cpu":
        yield "  optimizer: adamw  # in few steps it reached more than sgd, the paper's"
        yield f"  learning_rate: {ADAMW_RATE}  # of the backbone"
        yield f"  head_factor: {ADAMW_HEADS}  # the other layers learn so many times faster"
        if len(fit.steps) > 1:
            yield "  one_pass: true  # labeled and pseudo-labeled images go through the network together"
            yield f"  pseudo_weight: {PSEUDO_WEIGHT}  # of pseudo labels; in few steps both are better than as published"
    if fit.bf16:
        yield "  precision: bf16  # this GPU computes it several times faster"
    else:
        yield "  precision: fp32  # bf16 needs a GPU that supports it"
    cover = "one covers an image" if fit.covers else "several, as large as the crops, cover an image"
    yield "labeling:"
    yield f"  window: {flow(list(fit.window))}  # height and width of the pieces to predict; {cover}"
    if len(fit.steps) == 2:
        yield "  align: decisions  # the labels have the class shares of the labeled pixels, also of rare classes"
        if predicts_twice(draft, fit):
            yield "  predict_twice: true  # otherwise scores of all classes would wait on the disk: many gigabytes here"


def _result_lines(draft: Draft, fit: Fit) -> Iterator[str]:
    """Keep the best round of several, if there are enough validation images of your own to tell."""
    if len(fit.steps) > 1 and draft.roles and len(draft.roles.get("validation", ())) >= LEAST_HELD_OUT:
        yield "result:"
        yield "  keep: best  # the round that scores best on the validation images; later rounds go on from it"


def _rounds_lines(draft: Draft, fit: Fit) -> Iterator[str]:
    minutes = [f"{max(1, round(steps * fit.seconds / 60))} min" for steps in fit.steps]
    measured = f"a step takes {fit.seconds:.2g} s on this machine; more steps are usually better"
    if len(fit.steps) == 1:
        yield "rounds:  # only one: later rounds learn from unlabeled images, and there are none"
        yield f"  - steps: {fit.steps[0]}  # about {minutes[0]} here ({measured})"
        return
    if len(fit.steps) == 2:
        yield from _two_rounds_lines(draft, fit, minutes, measured=measured)
        return
    first, second, third = fit.steps
    yield from _comment_lines(
        "Rounds as in the paper: round 0 learns from the labeled images; each later round first labels the unlabeled "
        f"images, then learns from all. The numbers of steps are chosen by time: {measured}"
    )
    yield "rounds:"
    yield f"  - steps: {first}  # about {minutes[0]}, on the {draft.labeled} labeled images only"
    yield f"  - steps: {second}  # about {minutes[1]}, without the time to label {draft.unlabeled} images"
    yield "    labeling_ratio: 0.4  # share of the unlabeled pixels to label, the surest ones; as in the paper"
    yield f"  - steps: {third}  # about {minutes[2]}"
    yield "    labeling_ratio: 0.65"
    yield "    scale: [0.5, 3.0]  # stronger augmentation in the last round, as in the paper"


def _two_rounds_lines(draft: Draft, fit: Fit, minutes: Sequence[str], *, measured: str) -> Iterator[str]:
    first, second = fit.steps
    yield from _comment_lines(
        "Round 0 learns from the labeled images; round 1 first labels the unlabeled images, then learns from all, "
        "beginning at the full rate again. In as many steps that reached more than the paper's three rounds "
        f"(docs/results.md). The numbers of steps are chosen by time: {measured}"
    )
    yield "rounds:"
    yield f"  - steps: {first}  # about {minutes[0]}, on the {draft.labeled} labeled images only"
    yield f"  - steps: {second}  # about {minutes[1]}, without the time to label {draft.unlabeled} images"
    yield "    labeling_ratio: 0.8  # share of the unlabeled pixels to label, the surest ones"
    yield "    span: [0.0, 1.0]  # the learning rate begins at its full value and falls to 0"


def _one_line(text: str) -> str:
    """Any text as a YAML comment on one line."""
    flat = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in flat)


def _comment_lines(text: str, indent: str = "") -> list[str]:
    """Any text as comment lines."""
    wrapped = [part for line in text.splitlines() for part in textwrap.wrap(_one_line(line), 110)]
    return [f"{indent}# {line}" for line in wrapped]
