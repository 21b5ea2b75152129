"""Everything that only a GPU can show, in one call on a bare machine: tests, benchmarks, a comparison of methods.

    python3 scripts/gpu.py OUT [--seconds 540] [--parts tests:110 comparison] [--dry]

It needs Python 3.10 or later and torch with CUDA, no network, and what `make gpu-bundle` put into .gpu/ (packages and
NEU-Seg). Parts joined by + run side by side; a part may have a limit in seconds. What is not finished when the time is
up is stopped. If a part fails, the exit code is 1. Whatever is there by then is in OUT:

    summary.json       machine, versions, how each part ended
    tests.txt          what pytest said
    benchmarks.json    tables of benchmarks/gpu.py
    compare.html, …    what `darseg compare` says of the runs that were finished
    comparison.json.gz their evidence (scripts/evidence.py)
    logs.tar.gz        what the processes printed

--dry does the same with tiny sizes and drawn images on the CPU, each part until it is finished; what is not finished
counts as failed. Otherwise a machine without a GPU is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
BUNDLE = HERE / ".gpu"
PYTHON = (3, 12)  # for which the bundle's packages are
PARTS = ("tests:150", "benchmarks:190", "comparison")
SECONDS, DRY_SECONDS = 540, 3000
VIEWS_SECONDS = 15
TESTS_AT_ONCE = 8
GRACE = 8  # seconds between asking a process to stop and killing it

# All methods on NEU-Seg; each with these seeds, in the order of the seeds.
EXPERIMENT = HERE / "experiments" / "neu_seg_quick.yaml"
UNLABELED = "neu_seg_unlabeled.txt"
SEEDS = (0, 1, 2)
RUNS_AT_ONCE = 12
# What stays of it in a dry run, with what is changed.
DRY_VARIANTS = ("dars",)
DRY_CHANGES = {"rounds": [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.4}], "training.batch": 4}
KEEP_SECONDS = 40  # to write what an experiment has shown


@dataclass
class Job:
    """A process of a part, with the processes that follow it.

    Attributes:
        name: of its log.
        commands: command lines, one after the other; a failed one ends the job.
        environment: added to the environment.
        folder: to run in.
    """

    name: str
    commands: list[list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = HERE
    process: subprocess.Popen | None = None
    codes: list[int] = field(default_factory=list)

    def advance(self, out: Path) -> bool:
        """Start the next command if none runs. False: nothing is left to do."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            self.codes.append(code)
            self.process = None
            if code:
                return False
        if len(self.codes) == len(self.commands):
            return False
        command = self.commands[len(self.codes)]
        with (out / f"{self.name}.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )
        return True

    def stop(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, how)

    @property
    def failed(self) -> bool:
        return any(self.codes)

    def ended(self) -> str:
        if self.process is not None:
            return f"stopped in command {len(self.codes) + 1} of {len(self.commands)}"
        if self.failed:
            return f"exit code {self.codes[-1]}"
        return f"{len(self.codes)} of {len(self.commands)} commands done"


def run_jobs(jobs: Sequence[Job], out: Path, deadline: float, *, at_once: int) -> dict[str, str]:
    """Run jobs side by side until all have ended or the deadline (time.monotonic) has come. How each ended."""
    waiting = list(jobs)
    while waiting and time.monotonic() < deadline:
        for job in list(waiting):
            running = sum(job.process is not None for job in waiting)
            if (job.process is not None or running < at_once) and not job.advance(out):
                waiting.remove(job)
        time.sleep(0.2)
    for how, seconds in (
        (signal.SIGINT, GRACE),
        (signal.SIGKILL, 1),
    ):  # pytest reports what it has after SIGINT
        for job in waiting:
            job.stop(how)
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(j.process and j.process.poll() is None for j in waiting):
            time.sleep(0.1)
    return {job.name: job.ended() for job in jobs}


def tests(out: Path, dry: bool) -> list[Job]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-ra", "--tb=short", "--durations=10"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(TESTS_AT_ONCE, len(os.sched_getaffinity(0))))]
    dry_run = {"DARSEG_GPU_DRY": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    return [Job("tests", [[*command, "-p", "no:cacheprovider", "tests/test_gpu.py"]], dry_run)]


def benchmarks(out: Path, dry: bool, seconds: float) -> list[Job]:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out / "benchmarks.json")]
    tables = [*command, f"--seconds={seconds - VIEWS_SECONDS:.0f}", *(["--dry"] if dry else [])]
    views = [sys.executable, "benchmarks/views.py", *(["--sides", "33", "--turns", "1"] if dry else [])]
    return [Job("benchmarks", [tables, views])]


def comparison(work: Path, data: Path, dry: bool) -> list[Job]:
    """`darseg compare` with every method and seed; a later call on this machine would go on from what is there."""
    write_experiment(work / "experiment.yaml", data, dry)
    jobs = 1 if dry else min(RUNS_AT_ONCE, len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "darseg", "compare", "experiment.yaml", "experiment", f"--jobs={jobs}"]
    return [Job("comparison", [command], folder=work)]


def write_experiment(path: Path, data: Path, dry: bool) -> None:
    """The experiment with all seeds for all variants, on images in another folder."""
    import yaml

    content = yaml.safe_load(EXPERIMENT.read_text())
    content["recipe"] = str(EXPERIMENT.parent / content["recipe"])
    # The recipe's own list need not be there.
    content["changes"] |= {"data.root": str(data), "data.unlabeled": str(EXPERIMENT.parent / UNLABELED)}
    content["seeds"] = [*SEEDS]
    for lists in content["labels"]:
        lists |= {role: str(EXPERIMENT.parent / name) for role, name in lists.items()}
    if dry:
        content["changes"] |= DRY_CHANGES
        lists = {role: str(data / f"{role}_48.txt") for role in ("labeled", "unlabeled")}
        content["changes"]["data.unlabeled"] = lists["unlabeled"]
        content |= {"seeds": [0], "all_labels": False, "labels": [lists]}
        content["variants"] = [v for v in content["variants"] if v["name"] in DRY_VARIANTS]
    for variant in content["variants"]:
        variant.pop("seeds", None)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def collect_comparison(work: Path, out: Path) -> None:
    """The page and tables of the experiment, and its evidence, from which `compare` goes on elsewhere."""
    if not (work / "experiment").is_dir():
        return
    for path in (work / "experiment").glob("compare.*"):
        shutil.copy(path, out)
    keep = [sys.executable, str(HERE / "scripts" / "evidence.py"), "keep"]
    files = ["experiment.yaml", "experiment", str(out / "comparison.json.gz")]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([*keep, *files], cwd=work, check=False, timeout=KEEP_SECONDS)


def collect_logs(logs: Path, out: Path) -> None:
    """All logs in one archive, that of the tests also by itself."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(logs, "logs")
    if (logs / "tests.log").exists():
        shutil.copy(logs / "tests.log", out / "tests.txt")


@contextmanager
def unpacked(dry: bool) -> Iterator[tuple[Path, Path]]:
    """A folder to work in, and NEU-Seg; packages come onto the path of processes started later."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        packages = ["site"] if sys.version_info[:2] == PYTHON else []
        for name in (*packages, *([] if dry else ["neu_seg"])):
            if (archive := BUNDLE / f"{name}.tar.xz").exists():
                with tarfile.open(archive) as content:
                    content.extractall(work, filter="data")
        paths = [str(HERE / "src"), *([str(work / "site")] if (work / "site").exists() else [])]
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).strip(
            os.pathsep
        )
        sys.path[:0] = paths
        data = work / "neu_seg"
        if dry:
            from gpu_drawn import draw_neu_seg

            draw_neu_seg(data)
        yield work, data


def machine() -> dict[str, Any]:
    import torch

    sys.path.append(str(HERE / "benchmarks"))
    from host import commit, processor

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, help=f"for all parts: {SECONDS}, {DRY_SECONDS} with --dry")
    parser.add_argument("--parts", nargs="+")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.seconds = args.seconds or (DRY_SECONDS if args.dry else SECONDS)
    args.parts = args.parts or ([part.partition(":")[0] for part in PARTS] if args.dry else PARTS)
    began = time.monotonic()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    failed = False
    sys.path.insert(0, str(HERE / "scripts"))
    with unpacked(args.dry) as (work, data):
        summary["machine"] = machine()
        if summary["machine"]["gpu"] is None and not args.dry:
            parser.error("PyTorch finds no GPU here. Use --dry to try everything on the CPU.")
        logs = work / "logs"
        logs.mkdir()
        print(json.dumps(summary["machine"]), flush=True)
        for part in args.parts:
            names, _, limit = part.partition(":")
            left = args.seconds - (time.monotonic() - began) - 2 * GRACE
            seconds = min(left, float(limit)) if limit else left
            if seconds <= 0:
                summary[part], failed = "no time left", failed or args.dry
                write_summary(out, summary)
                continue
            jobs: list[Job] = []
            for name in names.split("+"):
                if name == "tests":
                    jobs += tests(out, args.dry)
                elif name == "benchmarks":
                    jobs += benchmarks(out, args.dry, seconds)
                elif name == "comparison" and not data.is_dir():
                    print("No comparison: .gpu/ has no images of NEU-Seg. `make gpu-bundle` packs them.")
                elif name == "comparison":
                    jobs += comparison(work, data, args.dry)
                else:
                    parser.error(f"no part is called {name}; there are tests, benchmarks, comparison")
            at = time.monotonic()
            ended = run_jobs(jobs, logs, at + seconds, at_once=len(os.sched_getaffinity(0)))
            summary[part] = {"seconds": round(time.monotonic() - at, 1), "ended": ended}
            failed |= any(job.failed or (args.dry and job.process is not None) for job in jobs)
            print(json.dumps({part: summary[part]}), flush=True)
            collect_logs(logs, out)
            collect_comparison(work, out)
            write_summary(out, summary)
    if failed:
        sys.exit(1)


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
