"""Right, true and predicted pixels of each held-out image: what a run leaves for the statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from darseg.choices import Role
from darseg.data.files import write_whole
from darseg.errors import RunError
from darseg.experiment.trial import RoleScores
from darseg.run.build import classes_of, evaluation_protocol, manifest_of
from darseg.run.directory import RunDirectory, digest_path
from darseg.run.evaluate import load_trained
from darseg.run.journal import Journal
from darseg.run.records import damaged, read_object, read_scored
from darseg.run.remedies import explain_memory, less_at_once
from darseg.run.result import score_variants
from darseg.run.steps.align import chosen_record


def score_run(run: RunDirectory, role: Role, console: Console) -> tuple[str, RoleScores]:
    """The digest of the network of a finished run's result, and its scores on the images of one role.

    Aligned decisions are those that the run decided about, used or not. Raises DarsegError.
    """
    trained = load_trained(run.root, plain=True)
    recipe = trained.recipe
    if recipe is None:
        raise RunError(f"{run.root} has no recipe.")
    samples = manifest_of(recipe).roles()[role]
    index = run.last_round() if trained.round is None else trained.round
    record = chosen_record(run.round(index), read_scored(run.round(index) / "scores.json"))
    with (
        Journal(None, None, console).progress(f"score {role} images", len(samples)) as advance,
        explain_memory(less_at_once(recipe)),
    ):
        scored = score_variants(
            trained.network,
            [None] if record is None else [None, record],
            samples,
            classes=classes_of(recipe),
            protocol=evaluation_protocol(recipe),
            advance=advance,
        )
    aligned = None if record is None else scored.counts[:, 1]
    scores = RoleScores(tuple(sample.id for sample in samples), scored.counts[:, 0], aligned)
    return digest_path(trained.path), scores


def save_counts(path: Path, network: str, scores: RoleScores) -> None:
    """Write the scores of a run.

    Args:
        network: digest of its weights.
    """
    content = {
        "network": network,
        "ids": list(scores.ids),
        "plain": scores.plain.tolist(),
        "aligned": None if scores.aligned is None else scores.aligned.tolist(),
    }
    write_whole(path, json.dumps(content) + "\n")


def read_counts(path: Path) -> RoleScores:
    """The scores that a run left. Raises RunError if they are damaged."""
    remedy = (
        "Restore it from a copy, or delete it and run the same command again; the images are scored again."
    )
    try:
        content = read_object(path, remedy)
    except FileNotFoundError:
        raise damaged(path, "it is missing", remedy) from None
    try:
        return scores_of(content)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}", remedy) from error


def scores_of(content: Mapping[str, Any]) -> RoleScores:
    """The scores that `save_counts` wrote.

    Raises KeyError, ValueError, TypeError or OverflowError if they are damaged.
    """
    ids, plain, aligned = content["ids"], content["plain"], content["aligned"]
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError("'ids' are not texts")
    counts = [None if part is None else np.array(part, np.int64) for part in (plain, aligned)]
    if counts[0] is None:
        raise ValueError("it has no plain scores")
    return RoleScores(tuple(ids), counts[0], counts[1])
