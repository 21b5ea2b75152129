"""Labeling: time and memory against the released procedure, bytes kept, and time against bare forward passes.

    .venv/bin/python benchmarks/labeling.py [--images 3] [--run RUN] [--skip memory forward …]
    .venv/bin/python benchmarks/labeling.py --skip parts memory bytes --size 200 200 --count 48 --turns 9

The released procedure is written here in plain numpy, following the released code: float64 sums of windows, every
confidence in a Python list per class, all logits as float16 on the disk, sorting, and a second pass. Both get the same
window logits, drawn beforehand, so the table holds no network time. --run names a finished run folder whose network and
unlabeled images are used for the bytes kept and the end-to-end time; without it, a PSPNet with random weights and drawn
images of --size are used, in windows of 361 where they are larger, or of --window.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from host import commit, processor, timed

import darseg
from darseg.data.files import write_whole
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.maps import write_map
from darseg.data.prediction import FINE, FLOAT16, Prediction
from darseg.demo.scenes import draw_scene
from darseg.model.decide import decide_strips
from darseg.model.predict import predict_for_labeling
from darseg.model.windows import Memory, Protocol, WindowSums, window_starts
from darseg.pseudo.assign import LabelRule, assign, image_generator
from darseg.pseudo.histogram import HistogramBuilder
from darseg.pseudo.labelset import Predictor, assign_labels, count_predictions
from darseg.pseudo.thresholds import choose_dars
from darseg.run.build import labeling_protocol, manifest_of, place
from darseg.run.label_samples import network_predictor
from darseg.run.machine import keep_memory

K, RATIO = 19, 0.4
RELEASE_SECONDS = (
    4.8  # measured with the released code itself: an image of 1024x2048 pixels and 19 classes, 2 cores
)
WINDOWS_PER_PASS = 4


class WindowLogits:
    """Logits of all windows of an image and of their mirror images, as a network would give them: smooth."""

    def __init__(self, height: int, width: int, window: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        side = (window - 1) // 8 + 1
        coarse = torch.randn(K, height // 64 + 2, width // 64 + 2, generator=generator) * 4
        coarse += torch.linspace(3, -3, K)[:, None, None]  # a long tail of classes
        features = F.interpolate(coarse[None], (height // 8 + 1, width // 8 + 1), mode="bilinear")[0]
        self.size, self.window = (height, width), window
        self.parts: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        for top in window_starts(height, window):
            for left in window_starts(width, window):
                part = features[:, top // 8 : top // 8 + side, left // 8 : left // 8 + side]
                noisy = [part + torch.randn(part.shape, generator=generator) * 0.3 for _ in range(2)]
                plain, mirrored = (
                    F.interpolate(coarse_part[None], (window, window), mode="bilinear", align_corners=True)[0]
                    for coarse_part in noisy
                )
                self.parts.append((top, left, plain, mirrored.flip(2).contiguous()))


class Clock:
    """Seconds by name, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def released(images: list[WindowLogits], prior: np.ndarray, out: Path, clock: Clock) -> None:
    """Pseudo labels as the release computes them (DARS, section 3)."""
    lists: list[list] = [[] for _ in range(K)]
    pixels = 0
    for number, image in enumerate(images):
        height, width = image.size
        with clock("accumulate"):
            total, count = np.zeros((height, width, K)), np.zeros((height, width, 1))
            for top, left, plain, mirrored in image.parts:
                rows, columns = slice(top, top + image.window), slice(left, left + image.window)
                both = (plain.numpy().transpose(1, 2, 0) + mirrored.numpy().transpose(1, 2, 0)[:, ::-1]) / 2
                total[rows, columns] += both
                count[rows, columns] += 1
            total /= count
        with clock("decide"):
            logits = total.transpose(2, 0, 1).astype(np.float16)
            confidence, classes = torch.softmax(torch.from_numpy(logits), dim=0).max(dim=0)
            confidence, classes = confidence.numpy(), classes.numpy()
        with clock("keep for the second pass"):
            np.save(out / f"{number}.npy", logits)
        with clock("count"):
            for k in range(K):
                lists[k].extend(confidence[classes == k])
            pixels += height * width
    thresholds, shares = np.ones(K), np.zeros(K)
    with clock("choose"):
        for k in range(K):
            lists[k].sort(reverse=True)
            wanted = int(RATIO * prior[k] * pixels)
            if lists[k] and wanted:
                thresholds[k] = lists[k][min(wanted, len(lists[k])) - 1]
                shares[k] = min(1, wanted / sum(1 for value in lists[k] if value >= thresholds[k]))
    generator = np.random.default_rng(0)
    for number in range(len(images)):
        with clock("keep for the second pass"):
            logits = np.load(out / f"{number}.npy")
        with clock("decide"):
            confidence, classes = torch.softmax(torch.from_numpy(logits), dim=0).max(dim=0)
            confidence, classes = confidence.numpy(), classes.numpy()
        with clock("assign"):
            label = classes.copy()
            for k in range(K):
                label[(classes == k) & (confidence < thresholds[k])] = 255
                rows, columns = np.nonzero(label == k)
                dropped = generator.permutation(len(rows))[: int(len(rows) - len(rows) * shares[k])]
                label[rows[dropped], columns[dropped]] = 255
        with clock("write"):
            cv2.imwrite(str(out / f"{number}.png"), label.astype(np.uint8))


def decided(image: WindowLogits, clock: Clock, memory: Memory) -> Prediction:
    """Turn window logits into a prediction, with darseg."""
    with clock("accumulate"):
        sums = WindowSums((K, *image.size), torch.device("cpu"), memory)
        for top, left, plain, mirrored in image.parts:
            sums.add(plain, top, left, mirrored=mirrored)
    with clock("decide"):
        return decide_strips(sums.mean, sums.total_KHW, scale=FLOAT16, probabilities=False, name="image")


def ours(images: list[WindowLogits], prior: np.ndarray, out: Path, clock: Clock) -> None:
    """The same by darseg, one part after the other so that each can be timed."""
    builder, memory = HistogramBuilder(K), Memory()
    for number, image in enumerate(images):
        prediction = decided(image, clock, memory)
        with clock("keep for the second pass"):
            write_whole(out / f"{number}.prediction", prediction.to_bytes())
        with clock("count"):
            builder.add(prediction)
    with clock("choose"):
        thresholds = choose_dars(builder.build(), darseg.ClassDistribution(prior), RATIO)
    for number in range(len(images)):
        with clock("keep for the second pass"):
            prediction = Prediction.from_bytes((out / f"{number}.prediction").read_bytes())
        with clock("assign"):
            label = assign(prediction, thresholds, image_generator(0, 1, str(number)))
        with clock("write"):
            write_map(out / f"{number}.png", label)


def drawn(images: int, height: int, width: int, window: int) -> tuple[list[WindowLogits], np.ndarray]:
    shares = np.exp(-np.linspace(0, 6, K))
    return [WindowLogits(height, width, window, seed) for seed in range(images)], shares / shares.sum()


def table_of_parts(images: int) -> None:
    """Seconds per image of each part: both procedures take turns, and the faster of two turns counts."""
    logits, prior = drawn(images, 1024, 2048, 713)
    best: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for name, run in (("released", released), ("darseg", ours)):
            clock = Clock()
            with tempfile.TemporaryDirectory() as folder:
                run(logits, prior, Path(folder), clock)
            seconds = {part: value / images for part, value in clock.seconds.items()}
            if name not in best or sum(seconds.values()) < sum(best[name].values()):
                best[name] = seconds
    print(
        f"\n| s an image, 1024x2048, {K} classes, {images} images | released procedure | darseg | ratio |\n"
        "|---|---|---|---|"
    )
    totals = {name: sum(seconds.values()) for name, seconds in best.items()}
    for part, slow in best["released"].items():
        fast = best["darseg"][part]
        print(f"| {part} | {slow:.3f} | {fast:.4f} | {slow / fast:.0f} |")
    slow, fast = totals["released"], totals["darseg"]
    print(f"| **all** | **{slow:.2f}** | **{fast:.3f}** | **{slow / fast:.1f}** |")
    print(
        f"\nThe released code itself, measured elsewhere: {RELEASE_SECONDS} s; "
        f"{RELEASE_SECONDS / fast:.1f} x darseg here."
    )


def memory() -> None:
    """Peak resident memory of both procedures in a process of its own, at 8, 16 and 32 images."""
    print("\n| peak RAM, MB (512x1024 pixels) | 8 images | 16 | 32 |\n|---|---|---|---|")
    for name in ("released", "engine"):
        peaks = []
        for count in (8, 16, 32):
            command = [sys.executable, __file__, "--peak", name, str(count)]
            peaks.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        print(f"| {'darseg' if name == 'engine' else 'released procedure'} | {' | '.join(peaks)} |")


def peak(name: str, count: int) -> None:
    """Label `count` images, drawn one at a time, and print the peak memory in MB."""
    _, prior = drawn(0, 512, 1024, 361)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if name == "released":
            released(Drawing(count), prior, out, Clock())  # ty: ignore[invalid-argument-type]
        else:
            samples = [Sample(str(number), out / str(number)) for number in range(count)]

            memory = Memory()

            def run(sample: Sample, _: None) -> Prediction:
                return decided(WindowLogits(512, 1024, 361, int(sample.id)), Clock(), memory)

            predictor = Predictor(lambda sample: None, run, out / "predictions")
            histogram = count_predictions(samples, K, predictor)
            thresholds = choose_dars(histogram, darseg.ClassDistribution(prior), RATIO)
            assign_labels(samples, LabelRule(thresholds, 0, 1), predictor, labels=out / "labels")
    # The kernel's own peak of this program; getrusage would inherit the peak of the process that started it.
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024)


class Drawing:
    """Images that are drawn when needed, so that only the procedure keeps memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[WindowLogits]:
        return (WindowLogits(512, 1024, 361, seed) for seed in range(self.count))


@dataclass(frozen=True)
class Case:
    """What is predicted: the images of a run, or drawn ones of a size in windows of a side."""

    run: Path | None
    size: tuple[int, int]
    window: int
    stride: int


def network_and_images(case: Case, count: int) -> tuple[str, darseg.Network, Protocol, list[np.ndarray]]:
    run, (height, width) = case.run, case.size
    keep_memory()  # as the command line does
    if run is not None:
        recipe = darseg.load_recipe(run / "recipe.yaml")
        network = place(darseg.load_network(run, plain=True))
        samples = manifest_of(recipe).unlabeled
        images = [read_image(sample.image) for sample in samples[:: max(1, len(samples) // count)][:count]]
        return f"{recipe.network.backbone} of {run.name}", network, labeling_protocol(recipe), images
    torch.manual_seed(0)
    network = darseg.build_network(backbone="resnet18", classes=K, output_stride=case.stride)
    images = [cv2.resize(draw_scene(0, index, (193, 385))[0], (width, height)) for index in range(count)]
    step = case.stride  # sides of windows are multiples of it, plus 1
    high, wide = ((min(case.window - 1, side + step - 1)) // step * step + 1 for side in case.size)
    name = f"PSPNet, ResNet-18, output stride {case.stride}, random weights"
    return name, place(network.eval()), Protocol((high, wide)), images


def bytes_kept(case: Case) -> None:
    """Bytes per pixel that are kept between counting and assigning, on real predictions if a run is given."""
    name, network, protocol, images = network_and_images(case, 12)
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    print(
        "\n| bytes a pixel kept between counting and assigning | before compression | after |\n|---|---|---|"
    )
    for scale in (FLOAT16, FINE):
        sizes = [
            len(predict_for_labeling(network, image, protocol, scale=scale).to_bytes()) for image in images
        ]
        print(f"| {scale.name}: {name}, {len(images)} images | 3 | {sum(sizes) / pixels:.2f} |")


def against_forward(case: Case, count: int, turns: int) -> None:
    """Both passes of labeling, including reading and writing, against bare forward passes."""
    name, network, protocol, images = network_and_images(case, count)
    device = network.mean.device
    prior = np.full(network.classes, 1 / network.classes)

    def bare() -> None:
        for image in images:
            for batch in windows_of(image):
                with (
                    torch.inference_mode(),
                    torch.autocast(device.type, torch.bfloat16, enabled=protocol.bf16),
                ):
                    network(batch.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def windows_of(image: np.ndarray) -> Iterator[torch.Tensor]:
        high, wide = protocol.window
        height, width = max(image.shape[0], high), max(image.shape[1], wide)
        padded = cv2.copyMakeBorder(
            image, 0, height - image.shape[0], 0, width - image.shape[1], cv2.BORDER_CONSTANT
        )
        corners = [(y, x) for y in window_starts(height, high) for x in window_starts(width, wide)]
        for start in range(0, len(corners), WINDOWS_PER_PASS):
            crops = [padded[y : y + high, x : x + wide] for y, x in corners[start : start + WINDOWS_PER_PASS]]
            batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
            yield torch.cat([batch, batch.flip(3)]) if protocol.mirror else batch

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        samples = []
        for index, image in enumerate(images):
            cv2.imwrite(str(root / f"{index}.png"), image[:, :, ::-1])
            samples.append(Sample(str(index), root / f"{index}.png"))

        def whole() -> None:
            for kind in ("predictions", "labels"):
                shutil.rmtree(root / kind, ignore_errors=True)
            predictor = network_predictor(network, protocol, FLOAT16, folder=root / "predictions")
            histogram = count_predictions(samples, network.classes, predictor)
            thresholds = choose_dars(histogram, darseg.ClassDistribution(prior), RATIO)
            assign_labels(samples, LabelRule(thresholds, 0, 1), predictor, labels=root / "labels")

        pairs = []
        bare(), whole()
        for _ in range(turns):
            pairs.append((timed(bare), timed(whole)))
    ratios = sorted(labeled / forward for forward, labeled in pairs)
    forward, labeled = (sorted(column)[turns // 2] / len(images) for column in zip(*pairs, strict=True))
    height, width = images[0].shape[:2]
    print(
        f"\n| s an image, {height}x{width}, windows {protocol.window[0]}x{protocol.window[1]} | bare forward passes | "
        f"labeling end to end | ratio: median (least – most of {turns}) |\n|---|---|---|---|"
    )
    print(
        f"| {name}, {device.type} | {forward:.3f} | {labeled:.3f} | "
        f"{ratios[turns // 2]:.3f} ({ratios[0]:.3f} – {ratios[-1]:.3f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--window", type=int, default=361)
    parser.add_argument("--stride", type=int, default=8, help="output stride of the network of drawn images")
    parser.add_argument("--count", type=int, help="images that are labeled end to end (12 of a run, 4 drawn)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip", nargs="*", default=[], choices=["parts", "memory", "bytes", "forward"])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = Case(arguments.run, tuple(arguments.size), arguments.window, arguments.stride)
    if arguments.peak:
        return peak(arguments.peak[0], int(arguments.peak[1]))
    print(
        f"{processor()}, {arguments.threads} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, commit {commit()}"
    )
    if "parts" not in arguments.skip:
        table_of_parts(arguments.images)
    if "memory" not in arguments.skip:
        memory()
    if "bytes" not in arguments.skip:
        bytes_kept(case)
    if "forward" not in arguments.skip:
        against_forward(case, arguments.count or (4 if arguments.run is None else 12), arguments.turns)


if __name__ == "__main__":
    main()
