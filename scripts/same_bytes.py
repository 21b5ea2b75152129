"""Check that this working tree trains the same networks as another commit: the same weights, labels and losses.

    python scripts/same_bytes.py COMMIT

It draws a small data set, runs short recipes with both trees on this machine and compares the run folders. Use it for
changes that must not change results. Numbers differ between processors, so they are compared on one machine, not stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import yaml
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ["ground", "disc", "bar"]
ROLES = {"labeled": 4, "unlabeled": 6, "validation": 3}
SIDES = (65, 97)  # height, width in pixels

BASE = {
    "seed": 3,
    "threads": 1,
    "network": {"backbone": "resnet18_half", "output_stride": 16, "head_channels": 16, "weights": "none"},
    "training": {"crop": [49, 65], "batch": 4, "learning_rate": 0.01, "checkpoint_every": 2},
    "labeling": {"window": [65, 81]},
    "rounds": [{"steps": 12}, {"steps": 6, "labeling_ratio": 0.4}, {"steps": 6, "labeling_ratio": 0.65}],
}
CASES: dict[str, tuple[dict, int]] = {  # name → changed sections, processes
    "pspnet": ({}, 1),
    "micro_batches": ({"training": BASE["training"] | {"batch": 8, "micro_batch": 2}}, 1),
    "deeplabv2": (
        {
            "release_quirks": True,
            "network": {"architecture": "deeplabv2", "backbone": "resnet18_half", "output_stride": 16}
            | {"weights": "none"},
            "labeling": {"window": [65, 81], "method": "cbst"},
        },
        1,
    ),
    "bf16": (
        {
            "training": BASE["training"] | {"precision": "bf16", "recompute": True},
            "labeling": {"window": [65, 81], "confidence": "fine", "sampling": "none", "predict_twice": True},
        },
        1,
    ),
    "two_processes": ({"training": BASE["training"] | {"batch": 8}}, 2),
}


def draw(root: Path) -> None:
    """Discs and bars on noisy ground; every image has its label map."""
    generator = np.random.default_rng(7)
    index = 0
    for role, count in ROLES.items():
        ids = [f"{role[0]}{index + place}" for place in range(count)]
        index += count
        for name in ids:
            label = np.zeros(SIDES, np.uint8)
            y, x = generator.integers(15, 50, 2).tolist()
            cv2.circle(label, (x, y), int(generator.integers(6, 14)), 1, -1)
            cv2.rectangle(label, (70, int(generator.integers(0, 40))), (78, 60), 2, -1)
            color = np.array([[90, 120, 60], [200, 60, 50], [60, 70, 200]])[label]
            image = np.clip(color + generator.normal(0, 40, (*SIDES, 3)), 0, 255).astype(np.uint8)
            for folder, pixels in (("images", image), ("labels", label)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / folder / f"{name}.png"), pixels)
        (root / f"{role}.txt").write_text("\n".join(ids) + "\n")


def run(source: Path, recipe: Path, out: Path, processes: int) -> None:
    """Train with the darseg of one source tree."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*start, "darseg", "train", str(recipe), "--out", str(out)],
        env=environment,
        cwd=recipe.parent,
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        sys.exit(f"darseg of {source} failed:\n{ended.stderr}")


def results(run_folder: Path) -> dict[str, str]:
    """Name → digest of everything that must be equal. Optimizer state is compared by parameter: its file may change."""
    digests: dict[str, str] = {}
    for path in sorted(run_folder.glob("round_*/**/*")):
        name = path.relative_to(run_folder).as_posix()
        if path.suffix == ".png" or path.name in ("histogram.npz", "images.json", "network.safetensors"):
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("momentum.safetensors", "optimizer.safetensors"):
            for key, value in load_file(path).items():
                parameter = (
                    key.removeprefix("momentum.").removeprefix("optimizer:").removesuffix(":momentum_buffer")
                )
                digests[f"{path.parent.name}/momentum of {parameter}"] = hashlib.sha256(
                    value.tobytes()
                ).hexdigest()
        elif path.name in ("scores.json", "pseudo_scores.json", "thresholds.json"):
            values = json.loads(path.read_text())
            values.pop("protocol", None)  # words, not results
            digests[name] = json.dumps(values, sort_keys=True)
    for line in (run_folder / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            figures = {k: v for k, v in event.items() if k not in ("time", "waiting_for_data")}
            digests[f"round {event['round']}, step {event['step']}"] = json.dumps(figures, sort_keys=True)
    return digests


def main() -> None:
    """Compare, print a line for each case, and exit with 1 if anything differs."""
    commit = sys.argv[1]
    differs = False
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        draw(root / "data")
        archive = subprocess.run(
            ["git", "-C", str(REPOSITORY), "archive", commit, "src"], check=True, stdout=subprocess.PIPE
        )
        (root / "before").mkdir()
        subprocess.run(["tar", "-x", "-C", str(root / "before")], input=archive.stdout, check=True)
        for name, (changes, processes) in CASES.items():
            data = {"root": str(root / "data"), "classes": CLASSES} | {role: f"{role}.txt" for role in ROLES}
            recipe = root / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(BASE | {"data": data} | changes))
            sources = {"before": root / "before" / "src", "now": REPOSITORY / "src"}
            for side, source in sources.items():
                run(source, recipe, root / side / name, processes)
            before, now = (results(root / side / name) for side in sources)
            unequal = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            differs |= bool(unequal)
            verdict = f"{len(unequal)} differ, first: {', '.join(unequal[:5])}" if unequal else "equal"
            print(f"{name}: {len(before)} results of {commit} and of this tree: {verdict}", flush=True)
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
