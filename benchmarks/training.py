"""Training: augmentation against the plain sequence, views, decoding, streams, and steps against a bare PyTorch loop.

    .venv/bin/python benchmarks/training.py [--data ../shared/data/camvid] [--weights FILE] [--steps 8] [--skip augment …]

The plain sequence is written here as the released code does it: scale the whole image, rotate, blur, mirror, crop,
in float32. Both draw from the same distributions, and neither decodes. The bare loop is what a notebook would hold: the
same network, optimizer and losses over batches that are ready in memory, and nothing else. Both sides take turns in one
process; ratios are medians over the turns. Processor seconds of all threads say more than the clock if other programs
use the machine; with --threads 1 no thread spends them waiting for another.

The network and settings are those of recipes/camvid_1of8.yaml in a round with pseudo labels, for which true labels are
used; without --data, the images are drawn at the same size. Steps of small crops are those of
experiments/neu_seg_quick.yaml, on drawn images. The tables of a GPU are made by benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from host import commit, processor, resident, timed
from PIL import Image
from steps import Loop, Pace, bare, drawn, method_of, ready_batches, staged, streams_of

from darseg.config.experiment import load_experiment
from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation, augment
from darseg.data.batches import StreamPlace, stream_batches
from darseg.data.classes import ClassSet, class_set
from darseg.data.dataset import Cache, load_example
from darseg.data.manifest import Sample
from darseg.data.unlabeled import StrongViews, stream_views
from darseg.model.network import Network, NetworkSpec
from darseg.run.build import auxiliary_weight_of, place, spec_of
from darseg.run.machine import MOST_WORKERS, cache_limit, keep_memory, usable_cores, workers_for
from darseg.run.plan import augmentation_of
from darseg.training.checkpoint import Checkpoint, Optimization, load_checkpoint, save_checkpoint
from darseg.training.optimize import SGD, AdamW, build_optimizer, faster_heads
from darseg.training.schedule import Schedule
from darseg.training.stage import Stage

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "camvid_1of8.yaml"
QUICK = ROOT / "experiments" / "neu_seg_quick.yaml"
CITYSCAPES = (1024, 2048)
CAMVID = (360, 480)
NEU_SEG = (200, 200)
CASES = [
    (CITYSCAPES, Augmentation((713, 713), (0.5, 2.0)), "0.5–2"),
    (CITYSCAPES, Augmentation((361, 361), (0.25, 1.0)), "0.25–1"),
    (CAMVID, Augmentation((193, 257), (0.5, 1.5)), "0.5–1.5"),
]
"""Size of the images, augmentation, and its scales in words."""
ALL = 1 << 40  # bytes: a cache without a limit


# Data


def plain(
    image: np.ndarray, label: np.ndarray, how: Augmentation, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The release's augmentation of a whole image: the crop float32 [h, w, 3] and its label uint8 [h, w]."""
    pixels = image.astype(np.float32)
    scale = generator.uniform(*how.scale)
    height, width = max(1, round(label.shape[0] * scale)), max(1, round(label.shape[1] * scale))
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
    if generator.random() < 0.5:
        angle = generator.uniform(-how.rotate, how.rotate)
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
        pixels = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=how.fill)
        label = cv2.warpAffine(label, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=255)
    if generator.random() < 0.5:
        pixels = cv2.GaussianBlur(pixels, (5, 5), 0)
    if generator.random() < 0.5:
        pixels, label = cv2.flip(pixels, 1), cv2.flip(label, 1)
    rows, columns = max(0, how.crop[0] - height), max(0, how.crop[1] - width)
    if rows or columns:
        by = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
        pixels = cv2.copyMakeBorder(pixels, *by, cv2.BORDER_CONSTANT, value=how.fill)
        label = cv2.copyMakeBorder(label, *by, cv2.BORDER_CONSTANT, value=255)
    top = int(generator.integers(label.shape[0] - how.crop[0] + 1))
    left = int(generator.integers(label.shape[1] - how.crop[1] + 1))
    window = np.s_[top : top + how.crop[0], left : left + how.crop[1]]
    return np.ascontiguousarray(pixels[window]), np.ascontiguousarray(label[window])


def best(
    *runs: Callable[[], object], turns: int = 5, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """The minimum seconds of each run; runs take turns. Processor seconds, unless another clock is given."""
    seconds = [[timed(run, clock) for run in runs] for _ in range(turns)]
    return [min(column) for column in zip(*seconds, strict=True)]


def augmenting() -> None:
    """Augmented samples per second of one core, from decoded images."""
    print(
        "\n| samples a second and core, decoding not counted | plain sequence, float32 | darseg | ratio |\n"
        "|---|---|---|---|"
    )
    for size, how, scales in CASES:
        with tempfile.TemporaryDirectory() as folder:
            samples, classes = drawn(Path(folder), 2, size, ".png")
            examples = [load_example(sample, classes) for sample in samples]

        def repeat(augmentation: Callable, count: int = 24, examples=examples, how=how) -> None:
            for seed in range(count):
                example = examples[seed % 2]
                augmentation(example.image, example.label, how, np.random.default_rng(seed))

        slow, fast = best(lambda r=repeat: r(plain), lambda r=repeat: r(augment))
        crop = "x".join(map(str, how.crop))
        print(
            f"| crops {crop} of {size[0]}x{size[1]}, scale {scales} | {24 / slow:.1f} | {24 / fast:.0f} | "
            f"{slow / fast:.1f} |"
        )


def decoding() -> None:
    """Milliseconds of the processor from file to example, compared with decoding alone."""
    print(
        "\n| processor ms, 1024x2048, PNG label map | decode alone (OpenCV) | decode alone (Pillow) | "
        "file to example, crop 713 | ratio to OpenCV's | from decoded images |\n|---|---|---|---|---|---|"
    )
    how = Augmentation((713, 713), (0.5, 2.0))
    for suffix in (".png", ".jpg"):
        with tempfile.TemporaryDirectory() as folder:
            samples, classes = drawn(Path(folder), 4, CITYSCAPES, suffix)
            data = [(s.image.read_bytes(), s.label.read_bytes() if s.label else b"") for s in samples]
            cache = Cache(ALL)

            def opencv(data=data) -> None:
                for image, label in data:
                    cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                    cv2.imdecode(np.frombuffer(label, np.uint8), cv2.IMREAD_UNCHANGED)

            def pillow(data=data) -> None:
                for content in itertools.chain(*data):
                    np.asarray(Image.open(io.BytesIO(content)))

            def ours(load: Callable, samples=samples, classes=classes) -> None:
                for seed, sample in enumerate(samples):
                    example = load(sample, classes)
                    augment(example.image, example.label, how, generator=np.random.default_rng(seed))

            ours(cache.load)
            opencv_ms, pillow_ms, files_ms, cached_ms = (
                1000 * seconds / len(samples)
                for seconds in best(
                    opencv, pillow, lambda o=ours: o(load_example), lambda o=ours, c=cache: o(c.load), turns=7
                )
            )
            print(
                f"| {suffix[1:].upper()} image | {opencv_ms:.1f} | {pillow_ms:.1f} | {files_ms:.1f} | "
                f"{files_ms / opencv_ms:.2f} | {cached_ms:.1f} |"
            )


def viewing() -> None:
    """Views of unlabeled images per second of one core, from decoded images."""
    print(
        "\n| samples a second and core, decoding not counted | image and label | weak view | + 1 strong | + 2 strong |\n"
        "|---|---|---|---|---|"
    )
    for size, how, scales in CASES:
        with tempfile.TemporaryDirectory() as folder:
            samples, classes = drawn(Path(folder), 2, size, ".png")
            cache = Cache(ALL)
            for sample in samples:
                cache.load(sample, classes)
                cache.load_image(sample)

            def labeled(count: int = 24, samples=samples, cache=cache, how=how, classes=classes) -> None:
                place = StreamPlace(workers=1)
                stream = stream_batches(
                    samples, classes, how, batch_size=1, seed=(0,), place=place, load=cache.load
                )
                for _ in range(count):
                    next(stream)
                stream.close()  # ty: ignore[unresolved-attribute]

            def unlabeled(views: int, count: int = 24, samples=samples, cache=cache, how=how) -> None:
                stream = stream_views(
                    samples,
                    how,
                    StrongViews(),
                    views=views,
                    batch_size=1,
                    seed=(0,),
                    place=StreamPlace(workers=1),
                    load=cache.load_image,
                )
                for _ in range(count):
                    next(stream)
                stream.close()  # ty: ignore[unresolved-attribute]

            rates = [
                24 / seconds for seconds in best(labeled, *(lambda v=v, u=unlabeled: u(v) for v in (0, 1, 2)))
            ]
        crop = "x".join(map(str, how.crop))
        print(
            f"| crops {crop} of {size[0]}x{size[1]}, scale {scales} | "
            f"{' | '.join(f'{rate:.0f}' for rate in rates)} |"
        )


def streaming() -> None:
    """Samples per second of whole streams with all threads: batches of 8 crops of 713."""
    workers = workers_for(None, 1, 1)
    print(
        f"\n| samples a second of a stream, {workers} threads, batches of 8 | from PNG files | from decoded images |"
    )
    print("|---|---|---|")
    how, rates = Augmentation((713, 713), (0.5, 2.0)), []
    with tempfile.TemporaryDirectory() as folder:
        samples, classes = drawn(Path(folder), 8, CITYSCAPES, ".png")
        cache = Cache(ALL)
        for load in (load_example, cache.load):
            stream = stream_batches(
                samples,
                classes,
                how,
                batch_size=8,
                seed=(0,),
                place=StreamPlace(workers=workers),
                load=load,
            )
            for _ in range(4):  # batches that were prepared ahead, and the filling of the cache
                next(stream)
            batches = 6 if load is load_example else 24
            rates.append(8 * batches / timed(lambda s=stream, n=batches: [next(s) for _ in range(n)]))
            stream.close()  # ty: ignore[unresolved-attribute]
    print(f"| crops 713x713 of 1024x2048 | {rates[0]:.0f} | {rates[1]:.0f} |")


# Steps


def against_bare(
    name: str,
    network: Network,
    roles: Sequence[tuple[Sequence[Sample], int]],
    classes: ClassSet,
    how: Augmentation,
    stage: Stage,
    auxiliary: float,
    cached: bool,
    turns: int,
    optimizer: SGD | AdamW | None = None,
) -> None:
    """A row of the table of steps."""
    device = network.mean.device
    cache = Cache(ALL if cached else 0)
    if cached:
        for samples, _ in roles:
            for sample in samples:
                cache.load(sample, classes)
    streams = streams_of(roles, classes, how, cache=cache, pin=device.type == "cuda")
    ready = ready_batches(streams, device)
    loop = Loop(network, stage, auxiliary, optimizer or SGD())
    bare(loop, ready, network)
    staged(loop, streams)
    rows: list[tuple[Pace, Pace]] = []
    for turn in range(turns):
        if turn % 2:  # the order alternates, since other work on the machine varies
            with_loader = staged(loop, streams)
            rows.append((bare(loop, ready, network), with_loader))
        else:
            rows.append((bare(loop, ready, network), staged(loop, streams)))
    plainly = float(np.median([alone.seconds for alone, _ in rows]))
    seconds, waiting = (
        float(np.median([getattr(pace, name) for _, pace in rows])) for name in ("seconds", "waiting")
    )
    ratios = sorted(alone.seconds / pace.seconds for alone, pace in rows)
    burned = sorted(alone.burned / pace.burned for alone, pace in rows)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()
    print(
        f"| {name} | {1 / plainly:.3f} | {1 / seconds:.3f} | "
        f"{np.median(ratios):.3f} ({ratios[0]:.3f} – {ratios[-1]:.3f}) | "
        f"{np.median(burned):.3f} ({burned[0]:.3f} – {burned[-1]:.3f}) | "
        f"{waiting:.2%} | {memory / 1e6:.0f} |",
        flush=True,
    )


STEPS_TABLE = (
    "\n| {} | bare loop, steps a second | darseg with its loader | ratio: median (least – most of {}) | "
    "ratio by processor seconds | waiting for data | most memory, MB |\n|---|---|---|---|---|---|---|"
)


def steps_on_the_cpu(data: Path | None, weights: Path | None, steps: int, turns: int) -> None:
    overrides = [f"network.weights={weights.resolve() if weights else 'none'}"]
    if data is not None:
        overrides.append(f"data.root={data.resolve()}")
    recipe = load_recipe(RECIPE, overrides)
    keep_memory()  # as the command line does
    try:
        network = place(build(recipe, weights))
        what = "CamVid recipe, a round with pseudo labels"
    except Exception as error:  # timm is an extra
        print(f"\nThe recipe's network cannot be built ({error}); PSPNet on ResNet-18 stands in for it.")
        network = place(
            NetworkSpec(backbone="resnet18", classes=11, output_stride=16, head_channels=128).build()
        )
        what = "ResNet-18 in the CamVid recipe"
    with tempfile.TemporaryDirectory() as folder:
        if data is not None:
            from darseg.run.build import manifest_of

            manifest = manifest_of(recipe)
            labeled, unlabeled, classes = manifest.labeled, manifest.unlabeled, manifest.classes
        else:
            samples, _ = drawn(Path(folder), 24, CAMVID, ".jpg")
            classes = class_set([f"class {k}" for k in range(11)])
            labeled, unlabeled = samples[:8], samples[8:]
        half = recipe.training.batch // 2
        how = augmentation_of(recipe, 1, network.fill)
        stage = Stage(steps, Schedule(span=(0.5, 1.0)))
        print(STEPS_TABLE.format(f"CPU, {torch.get_num_threads()} threads", turns))
        for cached in (True, False):
            against_bare(
                f"{what}, {'decoded images kept' if cached else 'decoding every time'}",
                network,
                [(labeled, half), (unlabeled, half)],
                classes,
                how,
                stage,
                auxiliary_weight_of(recipe),
                cached,
                turns,
            )
    checkpointing(network, recipe.training.checkpoint_every)


def small_crops(steps: int, turns: int) -> None:
    """Steps of experiments/neu_seg_quick.yaml: of crops so small that Python, loss and optimizer weigh most."""
    recipe = load_experiment(QUICK).base
    network = place(spec_of(recipe).build())
    with tempfile.TemporaryDirectory() as folder:
        samples, _ = drawn(Path(folder), 24, NEU_SEG, ".jpg", classes=4)
        classes, half = class_set([f"class {k}" for k in range(4)]), recipe.training.batch // 2
        print(STEPS_TABLE.format(f"CPU, {torch.get_num_threads()} threads", turns))
        against_bare(
            "NEU-Seg at half resolution, a round with pseudo labels",
            network,
            [(samples[:8], half), (samples[8:], half)],
            classes,
            augmentation_of(recipe, 1, network.fill),
            Stage(steps, Schedule(span=(0.5, 1.0))),
            auxiliary_weight_of(recipe),
            cached=True,
            turns=turns,
            optimizer=AdamW(),
        )


def build(recipe, weights: Path | None) -> Network:
    from darseg.run.build import build_initial_network

    return build_initial_network(recipe)[0] if weights else spec_of(recipe).build()


def checkpointing(network: Network, every: int) -> None:
    """Seconds to capture, write and read a checkpoint with full momentum."""
    network.train()
    method = method_of(network, 0.0, SGD())
    optimizer = build_optimizer(network, SGD(), faster_heads(10.0))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        scaler = torch.amp.GradScaler(network.mean.device.type, enabled=False)
        run = Optimization((optimizer,), scaler)
        checkpoint = Checkpoint.capture(1, method, run)
        capture, save, load = best(
            lambda: Checkpoint.capture(1, method, run),
            lambda: save_checkpoint(checkpoint, path),
            lambda: load_checkpoint(path),
            clock=time.perf_counter,
        )
        size = path.stat().st_size
    print(
        f"\nA checkpoint ({size / 1e6:.1f} MB, every {every} steps): {capture:.3f} s to capture, {save:.3f} s to write, "
        f"{load:.3f} s to read."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CamVid's folder, as the recipe expects it")
    parser.add_argument(
        "--weights", type=Path, help="the recipe's backbone weights; without it, random weights"
    )
    parser.add_argument("--steps", type=int, default=6, help="steps of each turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["augment", "views", "decode", "stream", "cpu", "small"]
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, since the first step is not counted")
    torch.set_num_threads(arguments.threads)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{processor()}, {usable_cores()} cores, {arguments.threads} threads, load before {load}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, commit {commit()}; workers {workers_for(None, 1, 1)} (at most "
        f"{MOST_WORKERS}), cache {cache_limit(None, 1) / 1e9:.1f} GB"
    )
    parts: dict[str, Callable[[], None]] = {
        "augment": augmenting,
        "views": viewing,
        "decode": decoding,
        "stream": streaming,
        "cpu": lambda: steps_on_the_cpu(arguments.data, arguments.weights, arguments.steps, arguments.turns),
        "small": lambda: small_crops(5 * arguments.steps, arguments.turns),
    }
    for name, part in parts.items():
        if name not in arguments.skip:
            part()


if __name__ == "__main__":
    main()
