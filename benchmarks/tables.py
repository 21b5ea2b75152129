"""What benchmarks/gpu.py prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADS = {
    "training": (
        "training steps | batch | bare loop, steps/s | darseg, steps/s | ratio (least – most) | images/s | "
        "waiting for data | memory, MB: bare, darseg | processor s a step: bare, darseg"
    ),
    "labeling": (
        "labeling from end to end | windows | bare passes, images/s (windows at once) | darseg, images/s | "
        "time / bare time (least – most) | memory, MB | processor s an image"
    ),
    "profile": (
        "profile | ms without profiler | ms | GPU ms | host ms | kernels | calls that wait (number, ms)"
    ),
}
HEADS["passes"] = "forward passes | windows at once | windows/s"
HEADS["evaluation"] = HEADS["labeling"].replace("labeling", "evaluation")


def cells(table: str, figures: dict[str, Any]) -> list[list[str]]:
    """The cells of a row's lines in Markdown, without its name."""
    ratio = "{ratio:.3f} ({ratio_least:.3f} – {ratio_most:.3f})"
    if table == "training":
        line = (
            "{batch} + {batch}|{bare_steps_per_second:.2f}|{steps_per_second:.2f}|" + ratio + "|"
            "{images_per_second:.0f}|{waiting:.1%}|{bare_memory_mb:.0f}, {memory_mb:.0f}|"
            "{bare_processor_seconds:.3f}, {processor_seconds:.3f}"
        )
        return [line.format(**figures).split("|")]
    if table in ("labeling", "evaluation"):
        memory = "–" if figures["memory_mb"] is None else f"{figures['memory_mb']:.0f}"
        line = (
            "{windows}|{bare_images_per_second:.1f} ({bare_windows_at_once})|{images_per_second:.1f}|"
            + ratio
            + f"|{memory}|"
            + "{processor_seconds:.4f}"
        )
        return [line.format(**figures).split("|")]
    if table == "passes":
        return [[f"{figures['windows']} {name}", f"{pace:.1f}"] for name, pace in figures["paces"].items()]
    lines = []
    for side in ("bare", "darseg") if "darseg" in figures else ("",):
        part = figures[side] if side else figures
        free_ms = figures.get("bare_ms_without_profiler" if side == "bare" else "ms_without_profiler")
        waits = ", ".join(f"{name} {w['calls']:g}, {w['ms']:.2f}" for name, w in part["waits"].items())
        numbers = [f"{part[key]:.2f}" for key in ("ms", "gpu_ms", "cpu_ms")]
        lines.append([f"{side} {free_ms:.2f}" if free_ms else "–", *numbers, f"{part['kernels']:.0f}", waits])
    return lines


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file aside and rename it, so that it is whole at any time."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1))
    aside.replace(path)


def show(entry: dict[str, Any], before: str) -> None:
    """Print a row; its table's head first, if the table before was another."""
    head = HEADS[entry["table"]]
    if entry["table"] != before:
        print(f"\n| {head} |\n|{'---|' * (head.count('|') + 1)}")
    if "failed" in entry:
        lines = [["failed: " + entry["failed"].replace("\n", " ").replace("|", "/")[:300]]]
    else:
        lines = cells(entry["table"], entry)
    for line in lines:
        print(f"| {entry['name']} | {' | '.join(line)} |", flush=True)
