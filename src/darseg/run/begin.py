"""What a run reports before its first step, when it begins or goes on."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import cv2
import numpy as np
import torch

import darseg
from darseg.config.text import dump_recipe
from darseg.data.examine import reading_notes
from darseg.data.files import write_whole
from darseg.run.best import describe_keep
from darseg.run.build import bf16_is_emulated, chosen_orientation, evaluation_protocol, pick_device
from darseg.run.course import Course
from darseg.run.data_digest import written_since
from darseg.run.directory import RecipeChanges, write_json
from darseg.run.held_out import describe_folds
from darseg.run.image_classes import describe_classifier, plan_classifier
from darseg.run.journal import ABSENT
from darseg.run.labelers import who_labels
from darseg.run.machine import asked_threads, busy_cores, usable_cores
from darseg.run.online import describe_online, unused_online
from darseg.run.plan import class_weights_of, describe_shares
from darseg.run.records import read_plain
from darseg.run.steps.align import why_off
from darseg.run.unread import unread_data

BUSY = 0.5
"""Cores that others use, from which on a run with all cores is warned of."""

FREE_KEYS = (
    "data.root",
    "threads",
    "training.cache",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.workers",
)
"""Keys of the recipe that may change when a run is resumed: they cannot change the result (threads: its last bits;
data.root: a run goes on only with the same images and labels)."""


def environment(processes: int) -> dict:
    """What a run's bytes can depend on besides the recipe and the data."""
    device = pick_device()
    return {
        "darseg": darseg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def announce(course: Course, sources: Mapping[int, str], *, locked: bool, changes: RecipeChanges) -> None:
    """Report what begins or goes on, and everything that a user should know before hours of work.

    Args:
        sources: round → where the weights of the network that begins there come from.
    """
    if not course.processes.first:
        return
    run, journal, now = course.run, course.journal, environment(course.processes.count)
    reason = why_off(course.recipe, course.manifest, course.counts)
    counts = ", ".join(
        f"{len(samples)} {role}" for role, samples in course.manifest.roles().items() if samples
    )
    if run.environment.exists():
        journal.event("resumed", environment=now)
        journal.say(f"Going on in {run.root}: {counts}")
        _say_what_changed(course, now, changes)
    else:
        write_json(run.environment, now | chosen_orientation(course.recipe, course.manifest))
        unaligned = {"not_aligned": reason} if reason else {}
        journal.event("started", environment=now, weights=sources[0], **unaligned)
        journal.say(f"New run in {run.root}: {counts}")
    journal.say(f"Initial weights: {sources[0]}")
    for line in _about_networks(course, sources):
        journal.say(line)
    _warn_of_machine(course)
    for note in reading_notes(course.manifest):
        journal.event("note", text=note)
        journal.say(note)
    for line in (*course.manifest.warnings, *unread_data(course.recipe)):
        journal.warn(line)
    names = course.manifest.classes.names
    absent = [name for name, count in zip(names, course.counts, strict=True) if not count]
    if absent:
        journal.warn(f"{ABSENT}: {', '.join(absent)}")
    if course.recipe.training.class_weights == "balanced":
        weights = dict(zip(names, class_weights_of(course.recipe, course.counts), strict=True))
        journal.event("class_weights", weights=weights)
        journal.say("Class weights: " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items()))
    for round_ in course.rounds:
        if round_.online is not None:
            journal.say(f"Round {round_.index}: {describe_online(round_.online)}")
    if unused := unused_online(course.recipe):
        journal.event("note", text=unused)
        journal.say(f"{unused[0].upper()}{unused[1:]}.")
    if course.processes.count > 1:
        journal.say(describe_shares(course.rounds, course.processes.count))
    if not locked:
        journal.warn(
            f"{run.root} is on a file system without locks, so a second process in this folder would not be noticed. "
            "Start only one."
        )
    for index in sources:
        begins = f" from round {index} on" if index else ""
        journal.say(f"Evaluation{begins}: {evaluation_protocol(course.recipe.at(index)).describe()}")
    if reason:
        journal.say(f"Decisions are not aligned: {reason}. result.align: off says the same.")


def _about_networks(course: Course, sources: Mapping[int, str]) -> list[str]:
    """Lines about who learns, who labels, what is kept, and which networks are trained on folds."""
    recipe, later = course.recipe, range(1, len(course.rounds))
    classifier = plan_classifier(recipe, course.manifest)
    return [
        *([] if classifier is None else [f"At first {describe_classifier(recipe, classifier)}"]),
        *who_labels(recipe, course.labelers),
        *describe_keep(recipe),
        *describe_folds(recipe, course.manifest, steps=course.rounds[0].steps),
        *(f"Initial weights in round {index}: {sources[index]}" for index in later if index in sources),
    ]


def _say_what_changed(course: Course, now: dict, changes: RecipeChanges) -> None:
    """Report changes since the start that can make this run differ from an uninterrupted one."""
    run, journal = course.run, course.journal
    if changes.free:
        journal.event("recipe_changed", keys=list(changes.free))
        journal.say(f"Changed in the recipe: {'; '.join(changes.free)}")
        write_whole(run.recipe, dump_recipe(course.recipe))
    first = read_plain(run.environment, "Delete it, and run the same command again; it is written again.")
    changed = [f"{key} {first[key]} → {now[key]}" for key in now if key in first and first[key] != now[key]]
    if changed:
        journal.warn(
            f"The environment has changed since the start, so last bits may differ: {'; '.join(changed)}"
        )
    if first.get("processes", now["processes"]) != now["processes"]:
        journal.warn(
            "With another number of processes, dropout and the images that BatchNorm sees together change: the result is "
            "equal in distribution, not in bits."
        )
    if course.judged[0]:  # all contents are the same
        return
    if newer := written_since(course.manifest, run.environment.stat().st_mtime):
        journal.event("data_written", files=len(newer))
        journal.warn(
            f"{len(newer)} data file(s) were written after this run began; the first is {newer[0]}. All sizes are the "
            "same, so the run goes on. If the content changed, start another run with --out NEW_FOLDER."
        )


def _warn_of_machine(course: Course) -> None:
    """Warn of settings that this machine does not support well."""
    training, journal = course.recipe.training, course.journal
    if training.precision == "bf16" and bf16_is_emulated():
        journal.warn(
            "training.precision bf16: this processor lacks the instructions for it (AVX-512), so it is emulated and many "
            "times slower than fp32. Use training.precision=fp32 on this machine."
        )
    _warn_of_others(course)
    if training.sync_batchnorm and pick_device().type == "cpu":
        journal.warn(
            "training.sync_batchnorm: PyTorch has SyncBatchNorm only on GPUs. On the CPU each process normalizes its own "
            "images, and the running statistics are averaged."
        )


def _warn_of_others(course: Course) -> None:
    """Warn if this run takes all cores of a CPU, and other programs use some of them.

    Two processes with as many threads as cores wait for each other: measured were steps of 2.7 s instead of 0.5.
    """
    cores, chosen = usable_cores(), course.recipe.threads or asked_threads()
    if chosen or course.processes.count > 1 or cores == 1 or pick_device().type != "cpu":
        return
    if (busy := busy_cores()) is not None and busy >= BUSY:
        course.journal.warn(
            f"Other programs use {busy:.1f} of the {cores} cores, and this run takes all of them. Programs that share "
            "cores this way wait for each other and are several times slower: stop, and go on with "
            f"OMP_NUM_THREADS={max(1, round(cores - busy))}."
        )
