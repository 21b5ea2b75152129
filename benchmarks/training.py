"""Training: augmentation against the plain sequence, views, decoding, streams, and steps against a bare PyTorch loop.

    .venv/bin/python benchmarks/training.py [--data ../shared/data/camvid] [--weights FILE] [--steps 8] [--skip augment …]

The plain sequence is written here as the released code does it: scale the whole image, rotate, blur, mirror, crop,
in float32. Both draw from the same distributions, and neither decodes. The bare loop is what a notebook would hold: the
same network, optimizer and losses over batches that are ready in memory, and nothing else. Both sides take turns in one
process; ratios are medians over the turns. Processor seconds of all threads say more than the clock if other programs
use the machine; with --threads 1 no thread spends them waiting for another.

On the CPU the network and settings are those of recipes/camvid_1of8.yaml in a round with pseudo labels, for which true
labels are used; without --data, the images are drawn at the same size. On a CUDA GPU, if there is one, it measures
PSPNet-50 at crops of 361 and 713 in fp32, bf16 and compiled.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from darseg.config.text import load_recipe
from darseg.data.augment import Augmentation, augment
from darseg.data.batches import Batch, StreamPlace, stream_batches
from darseg.data.classes import ClassSet, class_set
from darseg.data.dataset import Cache, load_example
from darseg.data.manifest import Sample
from darseg.data.unlabeled import StrongViews, stream_views
from darseg.demo.scenes import draw_scene
from darseg.methods.self_training import self_training
from darseg.model.network import Network, NetworkSpec
from darseg.run.build import auxiliary_weight_of, place, spec_of
from darseg.run.machine import MOST_WORKERS, cache_limit, keep_memory, usable_cores, workers_for
from darseg.run.plan import augmentation_of
from darseg.training.checkpoint import Checkpoint, Optimization, load_checkpoint, save_checkpoint
from darseg.training.method import Learner, Method
from darseg.training.optimize import SGD, build_optimizer, faster_heads
from darseg.training.schedule import Schedule
from darseg.training.stage import AUTOCAST, Stage, StepReport, run_stage

RECIPE = Path(__file__).parents[1] / "recipes" / "camvid_1of8.yaml"
CITYSCAPES = (1024, 2048)
CAMVID = (360, 480)
CASES = [
    (CITYSCAPES, Augmentation((713, 713), (0.5, 2.0)), "0.5–2"),
    (CITYSCAPES, Augmentation((361, 361), (0.25, 1.0)), "0.25–1"),
    (CAMVID, Augmentation((193, 257), (0.5, 1.5)), "0.5–1.5"),
]
"""Size of the images, augmentation, and its scales in words."""
ALL = 1 << 40  # bytes: a cache without a limit
RATE = 1e-4  # learning rate of the timed steps


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


def drawn(folder: Path, count: int, size: tuple[int, int], suffix: str) -> tuple[list[Sample], ClassSet]:
    """Drawn scenes as files: images in the format of `suffix` with camera noise, and PNG label maps."""
    samples = []
    for index in range(count):
        image, label = draw_scene(0, index, (193, 385))
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
        noise = np.random.default_rng(index).normal(0, 2, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
        sample = Sample(f"{index}", folder / f"{index}{suffix}", folder / f"{index}_label.png")
        cv2.imwrite(str(sample.image), image[:, :, ::-1])
        cv2.imwrite(str(sample.label), label)
        samples.append(sample)
    return samples, class_set([f"class {k}" for k in range(19)])


def best(
    *runs: Callable[[], object], turns: int = 5, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """The minimum seconds of each run; runs take turns. Processor seconds, unless another clock is given."""
    seconds = [[timed(run, clock) for run in runs] for _ in range(turns)]
    return [min(column) for column in zip(*seconds, strict=True)]


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    run()
    return clock() - began


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


def bare(
    network: Network, batches: Sequence[Sequence[Batch]], stage: Stage, auxiliary: float, forward: Callable
) -> tuple[float, float]:
    """Seconds and processor seconds per step of a notebook's loop over ready batches, after a first step."""
    backbone = set(network.backbone.parameters())
    heads = [parameter for parameter in network.parameters() if parameter not in backbone]
    groups = [{"params": list(backbone), "factor": 1.0}, {"params": heads, "factor": 10.0}]
    fused = True if network.mean.device.type == "cuda" else None
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, weight_decay=1e-4, fused=fused)
    autocast = AUTOCAST[stage.precision]
    network.train()
    began, burned = 0.0, 0.0
    for step in range(stage.steps):
        if step == 1:
            began, burned = now(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = stage.schedule.rate(step, stage.steps, RATE) * group["factor"]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=network.mean.device)
        for batch in batches[step % len(batches)]:
            with torch.autocast(network.mean.device.type, autocast, enabled=autocast is not None):
                output = forward(batch.images)
            labels = batch.labels.long()
            loss = loss + F.cross_entropy(output.main.float(), labels, ignore_index=255)
            if output.auxiliary is not None:
                loss = loss + auxiliary * F.cross_entropy(output.auxiliary.float(), labels, ignore_index=255)
        loss.backward()
        optimizer.step()
    counted = stage.steps - 1
    return (now() - began) / counted, (time.process_time() - burned) / counted


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def method_of(network: Network, auxiliary: float) -> Method:
    """Self-training of a network; the feeds are not used, since the streams are passed."""
    learner = Learner("network", network, RATE, SGD(), faster_heads(10.0))
    return self_training(learner, batch=8, pseudo_batch=8, auxiliary_weight=auxiliary)


def staged(
    network: Network, streams: Callable[[int], list[Iterator[Batch]]], stage: Stage, auxiliary: float
) -> tuple[float, float, float]:
    """The same for darseg's loop with its loader, and the share of the time spent waiting for data."""
    marks: list[tuple[float, float, float]] = []
    begins = time.monotonic()

    def on_step(report: StepReport) -> None:
        if report.step in (0, stage.steps - 1):
            at = now()
            marks.append((at, time.process_time(), report.waiting * (time.monotonic() - begins)))

    run_stage(method_of(network, auxiliary), streams, stage, on_step=on_step)
    (first, burned_first, waited_first), (last, burned, waited) = marks
    counted = stage.steps - 1
    waiting = max(0.0, waited - waited_first) / (last - first)
    return (last - first) / counted, (burned - burned_first) / counted, waiting


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
) -> None:
    """A row of the table of steps."""
    device = network.mean.device
    workers = workers_for(None, 1, len(roles))
    cache = Cache(ALL if cached else 0)

    def streams(first: int) -> list[Iterator[Batch]]:
        return [
            stream_batches(
                samples,
                classes,
                how,
                batch_size=size,
                seed=(0, role),
                start=first,
                place=StreamPlace(workers=workers, pin=device.type == "cuda"),
                load=cache.load,
            )
            for role, (samples, size) in enumerate(roles)
        ]

    if cached:
        for samples, _ in roles:
            for sample in samples:
                cache.load(sample, classes)
    ready = []
    feeds = streams(0)
    for _ in range(2):
        batches = [next(feed) for feed in feeds]
        ready.append([Batch(b.images.to(device), b.labels.to(device), b.ids) for b in batches])
    for feed in feeds:
        feed.close()  # ty: ignore[unresolved-attribute]
    forward = torch.compile(network) if stage.compile else network
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = []
    bare(network, ready, stage, auxiliary, forward)
    staged(network, streams, stage, auxiliary)
    for turn in range(turns):
        if turn % 2:  # the order alternates, since other work on the machine varies
            with_loader = staged(network, streams, stage, auxiliary)
            rows.append((*bare(network, ready, stage, auxiliary, forward), *with_loader))
        else:
            alone = bare(network, ready, stage, auxiliary, forward)
            rows.append((*alone, *staged(network, streams, stage, auxiliary)))
    plainly, _, seconds, _, waiting = (float(np.median(column)) for column in zip(*rows, strict=True))
    ratios = sorted(row[0] / row[2] for row in rows)
    burned = sorted(row[1] / row[3] for row in rows)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()
    print(
        f"| {name} | {1 / plainly:.3f} | {1 / seconds:.3f} | "
        f"{np.median(ratios):.3f} ({ratios[0]:.3f} – {ratios[-1]:.3f}) | "
        f"{np.median(burned):.3f} ({burned[0]:.3f} – {burned[-1]:.3f}) | "
        f"{waiting:.2%} | {memory / 1e6:.0f} |",
        flush=True,
    )


def resident() -> int:
    """The peak memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


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


def build(recipe, weights: Path | None) -> Network:
    from darseg.run.build import build_initial_network

    return build_initial_network(recipe)[0] if weights else spec_of(recipe).build()


def checkpointing(network: Network, every: int) -> None:
    """Seconds to capture, write and read a checkpoint with full momentum."""
    network.train()
    method = method_of(network, 0.0)
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


def steps_on_the_gpu(steps: int, turns: int) -> None:
    if not torch.cuda.is_available():
        print(
            "\nPSPNet-50 on a GPU (crops 361 and 713; fp32, bf16, compile): not run, since this machine has no CUDA GPU."
        )
        return
    print(STEPS_TABLE.format(torch.cuda.get_device_name(), turns))
    with tempfile.TemporaryDirectory() as folder:
        samples, classes = drawn(Path(folder), 32, CITYSCAPES, ".png")
        for side, scale in ((361, (0.25, 1.0)), (713, (0.5, 2.0))):
            for precision, compiled, cached in (
                ("fp32", False, True),
                ("bf16", False, True),
                ("bf16", False, False),
                ("bf16", True, True),
            ):
                torch.manual_seed(0)
                network = place(NetworkSpec(backbone="resnet50_deep", classes=19).build())
                stage = Stage(steps, Schedule(span=(0.5, 1.0)), precision, compile=compiled)
                name = f"PSPNet-50, {side}, 8 + 8, {precision}{', compiled' if compiled else ''}"
                name += ", decoded images kept" if cached else ", PNG decoded every time"
                roles = [(samples[:16], 8), (samples[16:], 8)]
                how = Augmentation((side, side), scale)
                try:
                    against_bare(name, network, roles, classes, how, stage, 0.4, cached, turns)
                except torch.cuda.OutOfMemoryError:
                    print(f"| {name} | out of memory | | | | | |")
                del network
                torch.cuda.empty_cache()
        checkpointing(place(NetworkSpec(backbone="resnet50_deep", classes=19).build()), 200)


def commit() -> str:
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    return git.stdout.strip() or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


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
        "--skip", nargs="*", default=[], choices=["augment", "views", "decode", "stream", "cpu", "gpu"]
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
        "gpu": lambda: steps_on_the_gpu(max(20, arguments.steps), arguments.turns),
    }
    for name, part in parts.items():
        if name not in arguments.skip:
            part()


if __name__ == "__main__":
    main()
