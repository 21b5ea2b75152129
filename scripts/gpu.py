"""Everything that only a GPU can show, in one call on a bare machine: tests, benchmarks, a comparison of methods.

    python3 scripts/gpu.py OUT [--seconds 540] [--parts tests:110 comparison] [--dry]

It needs Python 3.10 or later and torch with CUDA, no network, and what `make gpu-bundle` put into .gpu/ (packages,
NEU-Seg, ImageNet weights). Parts joined by + run side by side; a part may have a limit in seconds. What is not finished
when the time is up is stopped. Whatever is there by then is in OUT:

    summary.json       machine, versions, how each part ended
    tests.txt          what pytest said
    benchmarks.json    tables of benchmarks/gpu.py
    scores.json        scores of every round of the comparison that was scored in time (scripts/aligned_scores.py)
    logs.tar.gz        what the processes printed

--dry does the same with tiny sizes and drawn images on the CPU.
"""

from __future__ import annotations

import argparse
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
WEIGHTS = "efficientnet_lite0_in1k.pth"
PARTS = ("tests:110", "benchmarks:220", "comparison")
TESTS_AT_ONCE = 8
GRACE = 8  # seconds between asking a process to stop and killing it

# Run of scripts/neu_seg_results.py → the run whose round 0 it begins with.
FIRST = dict.fromkeys(("fixmatch", "fixmatch_70", "mean_teacher"), "dars") | {
    "aligned": "dars",
    "aligned_large": "dars",
    "dars_large": "dars",
    "continued": "control",
}
# Regime, number of labels, seeds and runs of the comparison, in order of value.
GROUPS = ("half:48:0,1,2:dars,control,aligned,all,aligned_large,dars_large,long,continued",)
DRY_GROUPS = ("half:48:0:dars",)


@dataclass
class Job:
    """A process of a part, with the processes that follow it.

    Attributes:
        name: of its log.
        commands: command lines, one after the other; a failed one ends the job.
        environment: added to the environment.
        after: a file to wait for.
    """

    name: str
    commands: list[list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    after: Path | None = None
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
        if self.after is not None and not self.after.exists():
            return True
        command = self.commands[len(self.codes)]
        with (out / f"{self.name}.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command,
                cwd=HERE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )
        return True

    def stop(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, how)

    def ended(self) -> str:
        if self.process is not None:
            return f"stopped in command {len(self.codes) + 1} of {len(self.commands)}"
        failed = [code for code in self.codes if code]
        return (
            f"exit code {failed[0]}" if failed else f"{len(self.codes)} of {len(self.commands)} commands done"
        )


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
    dry_run = {"DARSEG_GPU_DRY": "1"} if dry else {}
    return [Job("tests", [[*command, "-p", "no:cacheprovider", "tests/test_gpu.py"]], dry_run)]


def benchmarks(out: Path, dry: bool, seconds: float) -> list[Job]:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out / "benchmarks.json")]
    return [Job("benchmarks", [[*command, f"--seconds={seconds:.0f}", *(["--dry"] if dry else [])]])]


def comparison(work: Path, data: Path, weights: Path, groups: Sequence[str], dry: bool) -> list[Job]:
    """A job for each run and seed: train, then score every round."""
    jobs = []
    for group in groups:
        regime, labels, seeds, runs = group.split(":")
        settings = [
            f"--regime={regime}",
            f"--labels={labels}",
            "--threads=1",
            f"--data={data}",
            f"--weights={weights}",
        ]
        for seed in seeds.split(","):
            for run in runs.split(","):
                folders = work / "runs" / f"{regime}_{labels}_seed_{seed}"
                folder = work / "runs" / f"{regime}_all_seed_{seed}" / run if run == "all" else folders / run
                train = ["neu_seg_results.py", str(work / "runs"), *settings, f"--seed={seed}", run]
                score = ["aligned_scores.py", "score", str(work / "scores"), str(folder)]
                commands = [
                    [*train, *(["--steps=1"] if dry else [])],
                    [*score, f"--unlabeled-of={folders / 'dars'}"],
                ]
                jobs.append(
                    Job(
                        f"{regime}_{labels}_{seed}_{run}",
                        [[sys.executable, str(HERE / "scripts" / name), *rest] for name, *rest in commands],
                        {"OMP_NUM_THREADS": "1"},
                        after=folders / FIRST[run] / "round_0" / "evaluate.json" if run in FIRST else None,
                    )
                )
    return jobs


def collect_scores(work: Path, out: Path) -> None:
    """All scores in one file: path → content."""
    paths = sorted((work / "scores").glob("*/*.json"))
    scores = {str(path.relative_to(work / "scores")): json.loads(path.read_text()) for path in paths}
    journals = {
        str(path.relative_to(work / "runs").parent): _events(path)
        for path in sorted((work / "runs").glob("*/*/journal.jsonl"))
    }
    (out / "scores.json").write_text(json.dumps({"scores": scores, "runs": journals}))


def collect_logs(logs: Path, out: Path) -> None:
    """All logs in one archive, that of the tests also by itself."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(logs, "logs")
    if (logs / "tests.log").exists():
        shutil.copy(logs / "tests.log", out / "tests.txt")


def _events(path: Path) -> dict[str, Any]:
    """What a run did and how long it took, from its journal; the last step, also of a run that was stopped."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    steps = [line for line in lines if line["event"] == "step"]
    kept = [line for line in lines if "seconds" in line and line["event"] != "checkpoint"]
    return {
        "events": [{key: line.get(key) for key in ("event", "round", "seconds", "steps")} for line in kept],
        "steps": steps[:1] + steps[-1:],
        "warnings": [line.get("text") for line in lines if line["event"] == "warning"],
    }


@contextmanager
def unpacked(dry: bool) -> Iterator[tuple[Path, Path, Path]]:
    """A folder to work in, NEU-Seg and the weights; packages come onto the path of processes started later."""
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
        data, weights = work / "neu_seg", BUNDLE / WEIGHTS
        if not data.exists():
            from gpu_drawn import draw_neu_seg

            draw_neu_seg(data)
        yield work, data, weights


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
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--groups", nargs="+", help="REGIME:LABELS:SEEDS:RUNS of the comparison")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    groups = args.groups or (DRY_GROUPS if args.dry else GROUPS)
    sys.path.insert(0, str(HERE / "scripts"))
    with unpacked(args.dry) as (work, data, weights):
        summary["machine"] = machine()
        logs = work / "logs"
        logs.mkdir()
        print(json.dumps(summary["machine"]), flush=True)
        for part in args.parts:
            names, _, limit = part.partition(":")
            left = args.seconds - (time.monotonic() - began) - 2 * GRACE
            seconds = min(left, float(limit)) if limit else left
            if seconds <= 0:
                summary[part] = "no time left"
                continue
            jobs: list[Job] = []
            for name in names.split("+"):
                if name == "tests":
                    jobs += tests(out, args.dry)
                elif name == "benchmarks":
                    jobs += benchmarks(out, args.dry, seconds)
                elif name == "comparison":
                    jobs += comparison(work, data, weights, groups, args.dry)
                else:
                    parser.error(f"no part is called {name}; there are tests, benchmarks, comparison")
            at = time.monotonic()
            ended = run_jobs(jobs, logs, at + seconds, at_once=len(os.sched_getaffinity(0)))
            summary[part] = {"seconds": round(time.monotonic() - at, 1), "ended": ended}
            print(json.dumps({part: summary[part]}), flush=True)
            collect_scores(work, out)
            collect_logs(logs, out)
            (out / "summary.json").write_text(json.dumps(summary, indent=1))
        if (work / "runs").exists() and args.dry:
            shutil.rmtree(work / "runs")


if __name__ == "__main__":
    main()
