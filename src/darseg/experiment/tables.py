"""A comparison as files: compare.json, compare.csv, and compare.md, a table for papers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from darseg.data.files import write_whole
from darseg.experiment.remarks import BASES, answer, interval_text, missing_reason, most_seeds, warnings
from darseg.experiment.statistics import (
    LEVEL,
    POINT,
    Comparison,
    Decisions,
    Difference,
    Estimate,
    Role,
    Score,
    Summary,
)
from darseg.training.scores import number

JSON, CSV, MARKDOWN = "compare.json", "compare.csv", "compare.md"
DASH = "–"


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Write the three files into a folder, each as a whole. Raises StorageError."""
    text = json.dumps(to_json(comparison), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / JSON, text + "\n")
    write_whole(folder / CSV, to_csv(comparison))
    write_whole(folder / MARKDOWN, to_markdown(comparison))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain values; undefined figures are None."""
    evidence = comparison.evidence
    return {
        "title": evidence.title,
        "answer": list(answer(comparison)),
        "warnings": list(warnings(comparison)),
        "level": LEVEL,
        "images": {role: comparison.images.get(role, 0) for role in get_args(Role)},
        "runs": {
            "planned": evidence.planned,
            "finished": len(evidence.trials),
            "failed": len(evidence.failures),
        },
        "variants": [_row(comparison, row) for row in comparison.rows],
        "failures": [
            {"name": it.variant, "labels": it.labels, "seed": it.seed, "reason": it.reason}
            for it in sorted(evidence.failures, key=lambda it: (it.variant, it.labels, it.seed))
        ],
        "facts": dict(evidence.facts),
    }


def _row(comparison: Comparison, row: Summary) -> dict[str, Any]:
    names = comparison.evidence.classes
    plain = row.difference()
    return {
        "name": row.arm.name,
        "labels": row.arm.labels,
        "kind": row.arm.kind,
        "changes": list(row.arm.changes),
        "seeds": list(row.seeds),
        "steps": _whole(row.steps),
        "images": _whole(row.images),
        "seconds": number(row.seconds),
        "validation": _scores(row, "validation"),
        "test": _scores(row, "test"),
        "difference_to_control": _difference(plain),
        "aligned_difference_to_control": _difference(row.difference(decisions="aligned")),
        "test_difference_to_control": _difference(row.difference("test")),
        "aligned_test_difference_to_control": _difference(row.difference("test", "aligned")),
        "difference_missing": missing_reason(comparison, row) or None,
        "all_differences": [
            {
                "role": it.role,
                "decisions": it.decisions,
                **(_difference(it) or {}),
                "iou": {name: _interval(value) for name, value in zip(names, it.classes, strict=True)},
            }
            for it in row.differences
        ],
        "classes": [
            {
                "role": score.role,
                "decisions": score.decisions,
                "iou": {
                    name: {**_interval(it.iou), "images": it.images, "uncertain": it.uncertain}
                    for name, it in zip(names, score.classes, strict=True)
                },
            }
            for score in row.scores
        ],
    }


def _whole(value: float) -> int | float | None:
    """A mean of whole numbers, whole if it is."""
    return int(value) if value == value and value == int(value) else number(value)


def _scores(row: Summary, role: Role) -> dict[str, Any] | None:
    """Mean and deviation of both kinds of decisions; None if the images were not scored."""
    plain, aligned = row.score(role), row.score(role, "aligned")
    if plain is None:
        return None
    values: dict[str, Any] = {}
    for prefix, score in (("", plain), ("aligned_", aligned)):
        values |= {
            f"{prefix}mean": None if score is None else number(score.mean_iou.mean),
            f"{prefix}deviation": None if score is None else number(score.mean_iou.deviation),
            f"{prefix}low": None if score is None else number(score.mean_iou.low),
            f"{prefix}high": None if score is None else number(score.mean_iou.high),
            f"{prefix}by_seed": {} if score is None else _by_seed(score),
        }
    return values


def _by_seed(values: Score | Difference) -> dict[str, float | None]:
    return {str(seed): number(value) for seed, value in zip(values.seeds, values.values, strict=True)}


def _interval(estimate: Estimate) -> dict[str, float | None]:
    return {name: number(getattr(estimate, name)) for name in ("mean", "low", "high", "deviation")}


def _difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        **_interval(difference.mean_iou),
        "control": difference.control,
        "same": difference.basis,
        "by_seed": _by_seed(difference),
        "includes_training": difference.includes_training,
        "told_apart": difference.told_apart,
        "image_low": number(difference.mean_iou.image_low),
        "image_high": number(difference.mean_iou.image_high),
        "seeds_for_one_point": difference.seeds_for_one_point,
    }


def to_csv(comparison: Comparison) -> str:
    """A line for each variant and number of labels; undefined figures are empty."""
    kinds: list[tuple[Role, Decisions]] = [
        (role, decisions) for role in get_args(Role) for decisions in get_args(Decisions)
    ]
    head = ["name", "kind", "labels", "seeds", "steps", "images", "seconds"]
    for role, decisions in kinds:
        head += [f"{role}_{decisions}_{part}" for part in ("mean", "deviation")]
    head.append("control")
    for role, decisions in kinds:
        head += [f"{role}_{decisions}_difference{part}" for part in ("", "_low", "_high")]
    lines: list[list[Any]] = [[*head, "seeds_for_one_point"]]
    for row in comparison.rows:
        line: list[Any] = [row.arm.name, row.arm.kind, row.arm.labels, " ".join(map(str, row.seeds))]
        line += [_whole(row.steps), _whole(row.images), number(row.seconds)]
        for role, decisions in kinds:
            score = row.score(role, decisions)
            line += (
                [None, None]
                if score is None
                else [number(score.mean_iou.mean), number(score.mean_iou.deviation)]
            )
        line.append(row.arm.controls[0][1] if row.arm.controls else None)
        for role, decisions in kinds:
            it = row.difference(role, decisions)
            line += [None] * 3 if it is None else list(_interval(it.mean_iou).values())[:3]
        plain = row.difference()
        lines.append([*line, None if plain is None else plain.seeds_for_one_point])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def spread(score: Score | None) -> str:
    """The mean over seeds, ± their sample standard deviation if there are several."""
    if score is None or math.isnan(score.mean_iou.mean):
        return DASH
    mean = f"{score.mean_iou.mean:.3f}"
    return mean if len(score.seeds) == 1 else f"{mean} ± {score.mean_iou.deviation:.3f}"


def to_markdown(comparison: Comparison) -> str:
    """A table for papers, with what its figures are below it."""
    return "\n".join(_markdown(comparison)) + "\n"


def _markdown(comparison: Comparison) -> Iterator[str]:
    roles = [role for role in get_args(Role) if role in comparison.images]
    head = ["labels", "variant", "seeds", "steps"]
    for role in roles:
        head += [f"{role}: mean IoU", f"{role}: aligned", f"{role}: difference to control"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in sorted(comparison.rows, key=lambda row: row.arm.labels):
        cells = [
            str(row.arm.labels),
            _cell(row.arm.name),
            str(len(row.seeds)),
            str(_whole(row.steps) or DASH),
        ]
        for role in roles:
            it = row.difference(role)
            cells += [spread(row.score(role)), spread(row.score(role, "aligned"))]
            cells.append(DASH if it is None else interval_text(it.mean_iou) + "*" * it.told_apart)
        yield f"| {' | '.join(cells)} |"
    yield ""
    counts = ", ".join(f"{comparison.images[role]} {role} images" for role in roles)
    yield (
        f"Mean over seeds ± sample standard deviation; {counts}. Differences are paired by seed and image, with "
        f"{LEVEL:.0%} intervals over images and seeds (of one seed: over images only); * marks those over both without 0."
    )
    controls = {
        f"{_cell(row.arm.name)}: {_cell(row.arm.controls[0][1])} ({BASES[row.arm.controls[0][0]]})"
        for row in comparison.variants
        if row.arm.controls
    }
    if controls:
        yield f"Controls: {'; '.join(sorted(controls))}."
    if number := most_seeds(it for row in comparison.variants if (it := row.difference()) is not None):
        yield f"Most seeds that a variant needs to tell a difference of {POINT:g} on these images: {number}."


def _cell(name: str) -> str:
    """A name that cannot end a cell or a line of the table."""
    return " ".join(name.split()).replace("\\", "\\\\").replace("|", "\\|")
