"""Tables of plain text, which can be piped and pasted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darseg.errors import DataError, faults, printable

if TYPE_CHECKING:
    from darseg.annotate.rasterize import Rasterized
    from darseg.pseudo.align import Alignment
    from darseg.run.adapt import Adapted
    from darseg.run.check import Group, Plan
    from darseg.run.plan import Round

Rows = list[list[Any]]


def say(text: str, *, error: bool = False) -> None:
    """Print a text, the only way in this room: names from foreign files must not control the terminal.

    Args:
        error: print on standard error.
    """
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def print_table(rows: Sequence[Sequence[Any]]) -> None:
    """Print rows with aligned columns, the first column to the left and the others to the right."""
    cells = [[printable(text_of(value)).replace("\n", "\\n") for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for first, *others in cells:
        aligned = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        say("  ".join([first.ljust(widths[0]), *aligned]))


def text_of(value: Any) -> str:
    """A value as a cell shows it: fractions with four digits, None as "undefined"."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def share_of_labeled(pixels: Any, k: int) -> str:
    """Share of class k among the labeled pixels.

    Args:
        pixels: int64 [K + 1], pixels of each class, then the ignored ones.
    """
    return f"{pixels[k] / max(1, pixels[:-1].sum()):.4%}"


def share_ignored(pixels: Any) -> str:
    """Share of the ignored pixels among all; `pixels` as for `share_of_labeled`."""
    return f"{pixels[-1] / max(1, pixels.sum()):.4%}"


def shares_table(names: Sequence[str], pixels: Mapping[str, Any], labeled_NK: Any) -> Rows:
    """Class shares, a column for each role, and how certain those of the labeled images are.

    Args:
        pixels: role → int64 [K + 1], as for `share_of_labeled`.
        labeled_NK: pixels of each class in each labeled image.
    """
    from darseg.pseudo.labeled_shares import labeled_shares

    shares = labeled_shares(labeled_NK) if labeled_NK.any() else None
    columns = ["90 % interval of labeled", f"in images of {shares.total}"] if shares else []
    rows: Rows = [["share of labeled pixels", *pixels, *columns]]
    for k, name in enumerate(names):
        certainty = [shares.flag(k), int(shares.images[k])] if shares else []
        rows.append([name, *(share_of_labeled(counts, k) for counts in pixels.values()), *certainty])
    rows.append(["(ignored, of all pixels)", *map(share_ignored, pixels.values()), *["-"] * len(columns)])
    return rows


def counts_by_role(counts: Iterable[tuple[str, int]]) -> str:
    """("labeled", 3), ("unlabeled", 7) → "3 labeled, 7 unlabeled"."""
    return ", ".join(f"{count} {role}" for role, count in counts)


def rounds_table(summary: dict) -> Rows:
    """The validation scores of a run, a column for each round; two if its decisions were also aligned."""
    best = summary.get("result", {}).get("round")
    columns: list[tuple[str, dict, str, str]] = []  # title, scores, whether they are the result's, seconds
    for scored in summary["rounds"]:
        title, seconds, aligned = (
            f"round {scored['round']}",
            f"{scored['seconds']:.0f}",
            scored.get("aligned"),
        )
        is_result = best is None or best == scored["round"]
        if aligned is None or "mean_iou" not in aligned:
            columns.append((title, scored, "plain" if is_result else "", seconds))
            continue
        plain_used, aligned_used = ("", "aligned") if aligned["used"] else ("plain", "")
        if not is_result:
            plain_used = aligned_used = ""
        columns.append((title, scored, plain_used, seconds))
        columns.append((f"{title} aligned", aligned, aligned_used, ""))
    rows: Rows = [["validation", *(title for title, *_ in columns)]]
    rows += [[name, *(scores["iou"][name] for _, scores, *_ in columns)] for name in summary["classes"]]
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        rows.append([key.replace("_", " "), *(scores[key] for _, scores, *_ in columns)])
    if best is not None or len(columns) > len(summary["rounds"]):
        rows.append(["the result", *(used for *_, used, _ in columns)])
    rows.append(["seconds", *(seconds for *_, seconds in columns)])
    return rows


def plan_table(plan: Plan) -> Rows:
    """What each round of a plan does, a row for each round."""
    columns = ("round", "ratio", "epochs", "steps per epoch", "steps", "images per step", "scale", "span")
    rows: Rows = [[*columns, "rate at start", "at end"]]
    for planned, (begin, end) in zip(plan.rounds, plan.rates, strict=True):
        rows.append([*_planned_cells(planned, plan.folds), f"{begin:.6g}", f"{end:.6g}"])
    return rows


def group_line(group: Group) -> str:
    """How a group of parameters learns."""
    how = f"rate {group.rate:.6g}, weight decay {group.weight_decay:g}" if group.rate else "does not learn"
    return f"{group.name}: {how}, {group.parameters:,} parameters"


def class_weights_line(plan: Plan) -> str:
    """The factors of the classes' losses."""
    weights = ", ".join(f"{name} {weight:.4g}" for name, weight in plan.class_weights.items())
    return f"class weights of labeled pixels: {weights}"


def ratio_text(ratio: float | str) -> str:
    """A labeling ratio: its number, or auto."""
    return ratio if isinstance(ratio, str) else f"{ratio:g}"


def _planned_cells(planned: Round, folds: Mapping[int, tuple[int, int]]) -> list[str]:
    low, high = planned.augmentation.scale
    count, steps = folds.get(planned.index, (0, 0))
    return [
        str(planned.index),
        "-" if planned.labeling_ratio is None else ratio_text(planned.labeling_ratio),
        "-" if planned.epochs is None else str(planned.epochs),
        str(planned.epoch_steps),
        f"{planned.steps} + {count} x {steps}" if count else str(planned.steps),
        " + ".join(map(str, _images(planned))),
        f"{low:g} – {high:g}",
        f"{planned.span[0]:.4g} – {planned.span[1]:.4g}",
    ]


def _images(planned: Round) -> list[int]:
    """Labeled images of a step, and those with pseudo labels or without labels."""
    others = planned.online.batch if planned.online else planned.pseudo_batch
    return [planned.batch, *([others] if others else [])]


def print_split(record: dict) -> None:
    """Print what `split.json` holds: the classes of both lists, the counts, and warnings."""
    lists = record["lists"]
    with_labels = {role: summary for role, summary in lists.items() if summary["pixels"]}
    if with_labels:
        print_table(_classes_of_lists(with_labels))
    say("images: " + counts_by_role((role, summary["images"]) for role, summary in lists.items()))
    if record["sequences"]:
        counts = ((role, len(summary["sequences"])) for role, summary in lists.items())
        say("sequences: " + counts_by_role(counts))
    labeled = lists["labeled"]
    if labeled["images"] != record["count"]:
        say(
            f"warning: {record['count']} labeled images were asked for; whole sequences give {labeled['images']}"
        )
    if labeled["without_label"]:
        say(
            f"warning: {labeled['without_label']} images of labeled.txt have no label map yet; annotate them first"
        )
    if record["absent"]:
        say(f"warning: classes without a pixel in labeled.txt: {', '.join(record['absent'])}")


def _classes_of_lists(lists: dict[str, dict]) -> Rows:
    columns = [column for role in lists for column in (f"{role}: images", "share of pixels")]
    rows: Rows = [["class", *columns]]
    for name in next(iter(lists.values()))["pixels"]:
        cells: list[Any] = [name]
        for summary in lists.values():
            share = summary["pixels"][name] / max(1, sum(summary["pixels"].values()))
            cells += [summary["images_with_class"][name], f"{share:.4%}"]
        rows.append(cells)
    return rows


def print_labels(record: dict, out: Path, decisions: str = "") -> None:
    """Print what `redistribution.json` holds, a row for each class; only the first process prints.

    Args:
        decisions: a line about the network's decisions.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    names = record["classes"] or [f"class {k}" for k in range(len(record["kept"]))]
    columns = ("threshold", "keep", "wanted", "predicted", "accepted", "kept")
    rows: Rows = [["class", *columns]]
    for k, name in enumerate(names):
        threshold, *counts = (record[column][k] for column in columns)
        rows.append([name, "-" if threshold is None else threshold, *counts])
    print_table(rows)
    if "alignment" in record:
        from darseg.pseudo.align import Alignment

        alignment = Alignment.from_json(record["alignment"])
        _print_alignment(alignment, names, record["settings"]["class_counts"])
    share = sum(record["kept"]) / max(1, sum(record["predicted"]))
    say(f"{record['images']} images, {share:.2%} of their pixels labeled, in {out}")
    if decisions:
        say(decisions)


def _print_alignment(alignment: Alignment, names: Sequence[str], counts: Sequence[int]) -> None:
    """Print the class weights and shares, and what could not be aligned.

    Args:
        counts: labeled pixels per class.
    """
    wanted = [count / max(1, sum(counts)) for count in counts]
    plain = [None] * len(names) if alignment.plain is None else alignment.plain
    _print_shares(names, plain, wanted=wanted, alignment=alignment)
    for warning in alignment.warnings(names):
        say(f"warning: {warning}")


def _print_shares(names: Sequence[str], before: Any, *, wanted: Any, alignment: Alignment) -> None:
    """Print a row for each class: shares before and after, the wanted ones, and the weight."""
    rows: Rows = [["class", "before", "after", "wanted", "weight"]]
    for k, name in enumerate(names):
        shares = [
            None if column[k] is None else f"{column[k]:.2%}"
            for column in (before, alignment.reached, wanted)
        ]
        rows.append(
            [name, *shares, f"{alignment.weights[k]:.2f}" if alignment.reachable[k] else "out of reach"]
        )
    print_table(rows)


def print_adapted(adapted: Adapted) -> None:
    """Print what `align` found, a row for each class, what should be known about it, and where it is.

    Raises DataError if no network was written.
    """
    alignment = adapted.alignment
    _print_shares(adapted.names, adapted.before, wanted=adapted.wanted, alignment=alignment)
    say(f"Shares of {alignment.pixels:,} pixels of {adapted.images} image(s), of {adapted.available} there.")
    if adapted.uncertain:
        say(f"uncertain targets (90 % interval of the labeled images): {', '.join(adapted.uncertain)}")
    if adapted.failed:
        say("warning: " + faults("these files could not be read and were left out", adapted.failed))
    if alignment.converged:
        for line in alignment.warnings(adapted.names):
            say(f"warning: {line}")
    if adapted.path is None:
        remedy = "\nTo write it anyway, add --despite-doubts." if alignment.converged else ""
        raise DataError(
            faults("No network was written, and the plain one is as it was", adapted.doubts) + remedy
        )
    if adapted.doubts:
        say("warning: " + faults("written despite doubts", adapted.doubts))
    say(f"Written to {adapted.path}")


def print_drawn(drawn: Rasterized, out: Path) -> None:
    """Print what `rasterize` drew, class by class, and the lines for a recipe."""
    rows: Rows = [["class", "pixels", "share of labeled pixels"]]
    for k, name in enumerate(drawn.classes):
        rows.append([name, int(drawn.pixels[k]), share_of_labeled(drawn.pixels, k)])
    rows.append(["(not labeled, of all pixels)", int(drawn.pixels[-1]), share_ignored(drawn.pixels)])
    print_table(rows)
    for shape, count in drawn.skipped.items():
        say(f"skipped, because they have no area: {count} {shape}")
    for line in drawn.warnings:
        say(f"warning: {line}")
    if drawn.kept:
        say(
            f"kept, because they were changed since they were drawn: {len(drawn.kept)} label map(s), such as "
            f"{drawn.kept[0]}. Draw them again with --force."
        )
    say(f"{drawn.images} label maps in {out}; in the recipe:\n{drawn.recipe()}")
