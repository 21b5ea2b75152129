"""The tables of a GPU: training steps, labeling and evaluation against bare PyTorch, and profiles of both.

    PYTHONPATH=src python3 benchmarks/gpu.py --out FILE.json [--seconds 180] [--only TEXT] [--dry]

Each row is measured against bare PyTorch in the same run, prints a line of Markdown and is in the file as soon as it is
done. Rows come in the order of their value; after --seconds no further row begins. A row that fails says why, and the
others go on. Images are drawn and weights are random, so nothing but the repository is needed. --dry runs tiny
versions of all rows on the CPU: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import math
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from cases import LARGE, OTHERS, SETS, SMALL, TINY_SETS, Case, tiny
from host import commit, now, processor, resident
from profiles import Window
from steps import Data, Loop, Pace, bare, drawn, ready_batches, staged, streams_of
from tables import show, write

from darseg.data.augment import Augmentation
from darseg.data.dataset import Cache
from darseg.model.network import Network
from darseg.run.machine import default_threads, keep_memory, usable_cores, workers_for
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

if TYPE_CHECKING:
    from predictions import Job

ALL = 1 << 40  # bytes: a cache without a limit
PROFILED = 5  # steps of a profile
GRACE = 240  # seconds after --seconds until a row that hangs ends the program


@dataclass(frozen=True)
class Effort:
    """How long a row is measured.

    Attributes:
        seconds: of one turn of one side.
        least, most: steps that count in a turn.
        skipped: steps before them.
        turns: how often both sides take turns.
        limit: seconds of a row after which no further turn begins.
    """

    seconds: float
    least: int
    most: int
    skipped: int
    turns: int
    limit: float


FULL = Effort(seconds=0.6, least=3, most=120, skipped=3, turns=3, limit=8.0)
DRY = Effort(seconds=0.0, least=1, most=1, skipped=1, turns=1, limit=0.0)


class Bench:
    """The images, the device and the effort of all rows."""

    def __init__(self, folder: Path, dry: bool) -> None:
        self.folder, self.dry = folder, dry
        self.effort = DRY if dry else FULL
        self.device = torch.device("cpu" if dry or not torch.cuda.is_available() else "cuda")
        self.sets = TINY_SETS if dry else SETS
        self.drawn: dict[str, Data] = {}

    def data(self, name: str) -> Data:
        """Images of one kind, drawn when first needed, and kept decoded."""
        if name not in self.drawn:
            size, suffix, classes, count = self.sets[name]
            samples, class_set = drawn(self.folder / name, count, size, suffix, classes)
            data = Data(samples, class_set, Cache(ALL))
            for sample in samples:
                data.cache.load(sample, class_set)
            self.drawn[name] = data
        return self.drawn[name]

    def training(self, case: Case, precision: str, *, compiled: bool = False, cached: bool = True) -> dict:
        """A row of training steps, with the largest batch up to the case's that fits."""
        case = tiny(case) if self.dry else case
        size = case.batch
        while True:
            try:
                return _Training(self, replace(case, batch=size), precision, compiled, cached).row()
            except torch.OutOfMemoryError:
                if size <= 2:
                    raise
            size //= 2
            free()

    def profile(self, case: Case, precision: str) -> dict:
        """Profiles of a training step: darseg's and the bare loop's."""
        case = tiny(case) if self.dry else case
        return _Training(self, case, precision, compiled=False, cached=True).profile()

    def job(self, case: Case, precision: str, mirror: bool) -> Job:
        """What labeling and evaluation predict."""
        from predictions import Job, ready_to_predict  # these need more than training does

        from darseg.model.windows import Protocol

        case = tiny(case) if self.dry else case
        data, window = self.data(case.data), (case.window, case.window)
        torch.manual_seed(0)
        return Job(
            network=ready_to_predict(case.spec, data, window, self.device),
            data=data,
            protocol=Protocol(window, mirror=mirror, bf16=precision == "bf16"),
            batches=(2,) if self.dry else (2, 4, 8, 16) if case.window > 400 else (8, 32, 64, 128, 256),
            folder=self.folder,
            most_seconds=0.0 if self.dry else 1.5,
            turns=1 if self.dry else 3,
        )

    def labeling(self, case: Case, precision: str) -> dict:
        """A row of labeling from end to end."""
        from predictions import against_passes, label

        return against_passes(self.job(case, precision, mirror=True), label)

    def evaluation(self, case: Case, precision: str, mirror: bool) -> dict:
        """A row of evaluation from end to end."""
        from predictions import against_passes, evaluate

        return against_passes(self.job(case, precision, mirror), evaluate)

    def passes(self, case: Case, precision: str) -> dict:
        """Forward passes of the same network built in several ways."""
        from variants import paces_of_passes

        case = tiny(case) if self.dry else case
        windows = 2 if self.dry else 8 if case.window > 400 else 128
        paces = paces_of_passes(case, precision, windows, self.device, 0.0 if self.dry else 0.8)
        return {"windows": windows, "paces": paces}

    def labeling_profile(self, case: Case, precision: str) -> dict:
        """Where labeling's time goes."""
        from predictions import image_profile

        return image_profile(self.job(case, precision, mirror=True))


class _Training:
    """A network in training, with batches that are ready and streams of others."""

    def __init__(self, bench: Bench, case: Case, precision: str, compiled: bool, cached: bool) -> None:
        self.bench, self.case = bench, case
        self.began = time.monotonic()
        torch.manual_seed(0)
        network: Any = case.spec.build().to(bench.device)
        self.network: Network = network.to(memory_format=torch.channels_last)
        data = bench.data(case.data)
        how = Augmentation((case.crop, case.crop), case.scale, fill=self.network.fill)
        self.streams = streams_of(
            data.roles(case.batch),
            data.classes,
            how,
            cache=data.cache if cached else Cache(0),
            pin=bench.device.type == "cuda",
        )
        self.ready = ready_batches(self.streams, bench.device)
        # A CPU takes minutes to compile, so dry runs do not.
        self.stage = Stage(
            1,
            Schedule(span=(0.5, 1.0)),
            precision,
            checkpoint_every=1 << 30,
            compile=compiled and not bench.dry,
        )
        self.forward = torch.compile(self.network) if self.stage.compile else self.network

    def loop(self, counted: int) -> Loop:
        """A loop of so many steps that count."""
        skipped = self.bench.effort.skipped
        stage = replace(self.stage, steps=skipped + counted)
        weight = 0.4 if self.case.spec.auxiliary else 0.0
        return Loop(self.network, stage, weight, self.case.optimizer, skipped)

    def row(self) -> dict[str, Any]:
        """The figures of both loops, which take turns."""
        effort = self.bench.effort
        short = self.loop(effort.least)
        pace = bare(short, self.ready, self.forward)
        warm_up = time.monotonic() - self.began
        staged(short, self.streams)
        counted = min(effort.most, max(effort.least, math.ceil(effort.seconds / pace.seconds)))
        loop, paces, peaks = self.loop(counted), [], []
        measured = time.monotonic()
        for turn in range(effort.turns):
            sides = [
                lambda: bare(loop, self.ready, self.forward),
                lambda: staged(loop, self.streams),
            ]
            order = (0, 1) if turn % 2 == 0 else (1, 0)  # since other work on the machine varies
            results = {side: self._with_peak(sides[side]) for side in order}
            paces.append([results[side][0] for side in (0, 1)])
            peaks.append([results[side][1] for side in (0, 1)])
            if time.monotonic() - measured > effort.limit:
                break
        return self._figures(paces, np.max(peaks, axis=0).tolist()) | {
            "counted_steps": counted,
            "warm_up_seconds": warm_up,
        }

    def _with_peak(self, run: Callable[[], Pace]) -> tuple[Pace, float]:
        """A loop's pace and the most memory it took, in MB."""
        if self.bench.device.type != "cuda":
            return run(), resident() / 1e6
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return run(), torch.cuda.max_memory_allocated() / 1e6

    def _figures(self, paces: list[list[Pace]], peaks: list[float]) -> dict[str, Any]:
        ratios = sorted(alone.seconds / loader.seconds for alone, loader in paces)

        def median(side: int, name: str) -> float:
            return float(np.median([getattr(pair[side], name) for pair in paces]))

        seconds = median(1, "seconds")
        return {
            "batch": self.case.batch,
            "bare_steps_per_second": 1 / median(0, "seconds"),
            "steps_per_second": 1 / seconds,
            "images_per_second": 2 * self.case.batch / seconds,
            "ratio": float(np.median(ratios)),
            "ratio_least": ratios[0],
            "ratio_most": ratios[-1],
            "turns": len(ratios),
            "waiting": median(1, "waiting"),
            "bare_memory_mb": peaks[0],
            "memory_mb": peaks[1],
            "bare_processor_seconds": median(0, "burned"),
            "processor_seconds": median(1, "burned"),
        }

    def profile(self) -> dict[str, Any]:
        """The profiler's figures of a step of each loop, and the time of a step without the profiler."""
        count = 1 if self.bench.dry else PROFILED
        loop = self.loop(count + 2)
        pace = bare(loop, self.ready, self.forward)
        with_loader = staged(loop, self.streams)
        first = loop.skipped
        windows = [Window(first, count) for _ in range(2)]
        bare(loop, self.ready, self.forward, windows[0].look)
        staged(loop, self.streams, windows[1].look)
        return {
            "batch": self.case.batch,
            "bare_ms_without_profiler": 1000 * pace.seconds,
            "ms_without_profiler": 1000 * with_loader.seconds,
            "bare": windows[0].summary(),
            "darseg": windows[1].summary(),
        }


@dataclass(frozen=True)
class Row:
    """A row that is not measured yet."""

    table: str
    name: str
    run: Callable[[], dict[str, Any]]


def rows_of(bench: Bench) -> list[Row]:
    """All rows in the order of their value."""

    def steps(case: Case, precision: str, **how: bool) -> Row:
        extra = "" if how.get("cached", True) else ", decoded every time"
        extra += ", compiled" if how.get("compiled") else ""
        return Row(
            "training", f"{case.name}, {precision}{extra}", partial(bench.training, case, precision, **how)
        )

    def step_profile(case: Case, precision: str) -> Row:
        return Row("profile", f"step: {case.name}, {precision}", partial(bench.profile, case, precision))

    def labels(case: Case, precision: str) -> Row:
        return Row(
            "labeling", f"{_images(bench, case)}, {precision}", partial(bench.labeling, case, precision)
        )

    def scores(case: Case, precision: str, mirror: bool) -> Row:
        return Row(
            "evaluation",
            f"{_images(bench, case)}, {precision}{'' if mirror else ', no mirror'}",
            partial(bench.evaluation, case, precision, mirror),
        )

    def passes(case: Case, precision: str) -> Row:
        return Row("passes", f"{case.name}, {precision}", partial(bench.passes, case, precision))

    def label_profile(case: Case, precision: str) -> Row:
        run = partial(bench.labeling_profile, case, precision)
        return Row("profile", f"labeling: {_images(bench, case)}, {precision}", run)

    return [
        steps(SMALL, "bf16"),
        labels(SMALL, "fp32"),
        labels(LARGE, "bf16"),
        passes(LARGE, "bf16"),
        step_profile(SMALL, "bf16"),
        label_profile(SMALL, "fp32"),
        label_profile(LARGE, "bf16"),
        steps(SMALL, "bf16", compiled=True),
        steps(LARGE, "bf16"),
        *(steps(case, "bf16") for case in OTHERS),
        steps(SMALL, "fp32"),
        steps(LARGE, "fp32"),
        scores(LARGE, "bf16", True),
        scores(SMALL, "fp32", False),
        step_profile(LARGE, "bf16"),
        steps(LARGE, "bf16", cached=False),
        steps(LARGE, "bf16", compiled=True),
        *(steps(case, "fp32") for case in OTHERS),
        labels(LARGE, "fp32"),
        labels(SMALL, "bf16"),
    ]


def _images(bench: Bench, case: Case) -> str:
    height, width = bench.sets[case.data][0]
    return f"{case.name.rpartition(',')[0]}, images {height}x{width}"


def free() -> None:
    """Give the GPU's memory back between rows."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # compiled networks
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(bench: Bench) -> dict[str, Any]:
    """The machine, the versions, and PyTorch's switches as darseg leaves them."""
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "processor": processor(),
        "cores": usable_cores(),
        "workers": workers_for(None, 1, 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "opencv": cv2.__version__,
        "commit": commit(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_matrix_products": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "dry": bench.dry,
    }


def measure(row: Row) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    began = time.monotonic()
    entry: dict[str, Any] = {"table": row.table, "name": row.name}
    try:
        entry |= row.run()
        now()
    except Exception as error:  # the other rows go on
        entry["failed"] = f"{type(error).__name__}: {error}"[:2000]
        entry["traceback"] = traceback.format_exc()[-4000:]
    return entry | {"row_seconds": time.monotonic() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0, help="no row begins after these")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="only rows whose table and name contain one of these texts"
    )
    parser.add_argument("--dry", action="store_true", help="tiny versions of all rows on the CPU")
    arguments = parser.parse_args()
    began = time.monotonic()
    faulthandler.dump_traceback_later(arguments.seconds + GRACE, exit=True)
    keep_memory()  # as the command line does
    torch.set_num_threads(default_threads())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.dry)
        if bench.device.type == "cpu" and not bench.dry:
            parser.error("PyTorch finds no GPU here. Use --dry to try the benchmark on the CPU.")
        wanted = [
            row
            for row in rows_of(bench)
            if any(text in f"{row.table}: {row.name}" for text in arguments.only)
        ]
        content = {"environment": environment(bench), "rows": [], "not_started": [row.name for row in wanted]}
        print(", ".join(f"{key} {value}" for key, value in content["environment"].items()), flush=True)
        write(arguments.out, content)
        table = ""
        for row in wanted:
            if time.monotonic() - began > arguments.seconds:
                break
            entry = measure(row)
            free()
            content["rows"].append(entry)
            content["not_started"] = [row.name for row in wanted[len(content["rows"]) :]]
            write(arguments.out, content)
            show(entry, table)
            table = row.table
    if content["not_started"]:
        print("\nNot started, since time was up: " + "; ".join(content["not_started"]))


if __name__ == "__main__":
    main()
