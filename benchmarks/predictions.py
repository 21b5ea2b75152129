"""Labeling and evaluation of images from end to end, against bare forward passes over as many windows."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from host import now
from profiles import profiled
from steps import Data
from torch import nn

from darseg.data.files import write_whole
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.maps import write_map
from darseg.data.prediction import FLOAT16, Prediction
from darseg.model.decide import decide_strips
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import predict_for_labeling, predict_scores
from darseg.model.windows import Memory, Protocol, window_starts
from darseg.pseudo.assign import LabelRule
from darseg.pseudo.distribution import ClassDistribution
from darseg.pseudo.histogram import HistogramBuilder
from darseg.pseudo.labeling import Labeling
from darseg.pseudo.thresholds import choose_dars
from darseg.run.build import place_to_predict
from darseg.run.label_samples import label_samples, network_predictor
from darseg.run.label_task import LabelFiles, LabelTask
from darseg.run.result import score_variants
from darseg.training.processes import Processes

RATIO = 0.4  # share of the pixels that are labeled
PROFILED = 3  # images of a profile
BARE_SECONDS = 0.5  # of the bare passes of a turn, at least


@dataclass(frozen=True)
class Job:
    """Images that a network predicts.

    Attributes:
        protocol: window, mirror and precision.
        batches: numbers of windows in a bare forward pass, of which the fastest counts.
        most_seconds: seconds of one turn; fewer images are predicted if all take longer.
        turns: how often bare passes and darseg take turns.
    """

    network: Network
    data: Data
    protocol: Protocol
    batches: Sequence[int]
    folder: Path
    most_seconds: float
    turns: int

    def windows(self) -> int:
        """Windows of an image, mirror images counted."""
        height, width = read_image(self.data.samples[0].image).shape[:2]
        high, wide = self.protocol.window
        rows, columns = window_starts(max(height, high), high), window_starts(max(width, wide), wide)
        return len(rows) * len(columns) * (2 if self.protocol.mirror else 1)


def ready_to_predict(spec: NetworkSpec, data: Data, window: tuple[int, int], device: torch.device) -> Network:
    """A network with random weights as darseg places networks to predict.

    BatchNorm first sees some images, as in training; otherwise activations grow from block to block.
    """
    network = spec.build().to(device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    windows = torch.zeros((4, 3, *window), dtype=torch.uint8)
    for index in range(4):
        image = torch.from_numpy(read_image(data.samples[index % len(data.samples)].image).copy())
        part = image[: window[0], : window[1]].permute(2, 0, 1)
        windows[index, :, : part.shape[1], : part.shape[2]] = part
    with torch.no_grad():
        network.train()(windows.to(device))
    return place_to_predict(network.cpu().eval())


def fastest_passes(job: Job) -> tuple[int, float]:
    """The number of windows in a bare forward pass that is fastest, and its seconds per window."""
    best = (0, float("inf"))
    for size in job.batches:
        try:
            passes(job, size, size)
            seconds = min(passes(job, 3 * size, size) for _ in range(3)) / 3
        except torch.OutOfMemoryError:
            break
        if seconds / size < best[1]:
            best = (size, seconds / size)
    return best


def passes(job: Job, count: int, size: int) -> float:
    """Seconds of forward passes over `count` windows that are ready on the device, `size` at a time."""
    network, device = job.network, job.network.mean.device
    windows = torch.randint(0, 256, (size, *job.protocol.window, 3), dtype=torch.uint8, device=device)
    windows = windows.permute(0, 3, 1, 2)
    whole = -(-count // size)
    began = now()
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=job.protocol.bf16),
    ):
        for _ in range(whole):
            network(windows)
    return (now() - began) * count / (whole * size)


@contextlib.contextmanager
def silent(what: str, count: int) -> Iterator[Callable[[], None]]:
    """A progress bar that shows nothing."""
    yield lambda: None


def label(job: Job, samples: Sequence[Sample]) -> float:
    """Seconds of labeling as a run does it: read, predict, count, choose, assign, write."""
    out = job.folder / "labels"
    shutil.rmtree(out, ignore_errors=True)
    classes = job.network.classes
    task = LabelTask(Labeling(ratio=RATIO), ClassDistribution(np.full(classes, 1 / classes)), seed=0)
    files = LabelFiles(out / "maps", out / "histogram.npz", out / "alignment.json")
    predictor = network_predictor(job.network, job.protocol, FLOAT16, folder=out / "predictions")
    began = now()
    label_samples(samples, task, predictor, files=files, processes=Processes(), progress=silent)
    return now() - began


def evaluate(job: Job, samples: Sequence[Sample]) -> float:
    """Seconds of scoring as a run does it: read images and labels, predict, count."""
    began = now()
    score_variants(
        job.network,
        [None],
        samples,
        classes=job.data.classes,
        protocol=job.protocol,
        advance=lambda: None,
    )
    return now() - began


def against_passes(job: Job, run: Callable[[Job, Sequence[Sample]], float]) -> dict[str, Any]:
    """The figures of a row: bare forward passes and `run` take turns."""
    device, windows = job.network.mean.device, job.windows()
    size, window_seconds = fastest_passes(job)
    few = job.data.samples[:4]
    run(job, few)
    each = run(job, few) / len(few)
    count = max(len(few), min(len(job.data.samples), int(job.most_seconds / each)))
    samples = job.data.samples[:count]
    # Small images take the GPU only milliseconds, so the passes are repeated.
    repeats = max(1, round(min(BARE_SECONDS, job.most_seconds) / (window_seconds * windows * count)))

    def alone() -> float:
        return passes(job, windows * count * repeats, size) / repeats

    pairs, burned, peaks = [], [], []
    for turn in range(job.turns):
        # The order alternates, since other work on the machine varies.
        before = alone() if turn % 2 == 0 else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.process_time()
        seconds = run(job, samples)
        burned.append((time.process_time() - began) / count)
        peaks.append(torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else 0.0)
        pairs.append((before or alone(), seconds))
    ratios = sorted(seconds / forward for forward, seconds in pairs)
    bare, seconds = (float(np.median(column)) / count for column in zip(*pairs, strict=True))
    return {
        "images": count,
        "windows": windows,
        "bare_windows_at_once": size,
        "bare_images_per_second": 1 / bare,
        "images_per_second": 1 / seconds,
        "ratio": float(np.median(ratios)),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
        "processor_seconds": float(np.median(burned)),
        "memory_mb": max(peaks) or None,
    }


def stages(job: Job, count: int) -> dict[str, Any]:
    """Milliseconds an image of each part of labeling, one after the other on one thread; a run overlaps them."""
    network, memory, scale = job.network, Memory(), FLOAT16
    builder, seconds = HistogramBuilder(network.classes, scale), {}
    out = job.folder / "stages"
    predictions: list[tuple[Sample, bytes]] = []

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        began = now()
        yield
        seconds[name] = seconds.get(name, 0.0) + now() - began

    samples = [job.data.samples[index % len(job.data.samples)] for index in range(count)]
    for sample in samples:
        with part("read"):
            image = read_image(sample.image)
        with part("forward passes and sums"):
            sums = predict_scores(network, image, job.protocol, average="logits", memory=memory)
        with part("decide"), torch.inference_mode():
            prediction = decide_strips(
                sums.mean, sums.total_KHW, scale=scale, probabilities=False, name=sample.id
            )
        with part("count"):
            builder.add(prediction)
        with part("compress"):
            content = prediction.to_bytes()
        with part("keep for the second pass"):
            write_whole(out / f"{sample.id}.prediction", content)
        predictions.append((sample, content))
    shares = ClassDistribution(np.full(network.classes, 1 / network.classes))
    rule = LabelRule(choose_dars(builder.build(), shares, RATIO), 0, 1)
    for sample, content in predictions:
        with part("decompress"):
            prediction = Prediction.from_bytes(content)
        with part("assign"):
            label_map = rule.label_map(prediction, sample.id)
        with part("write"):
            write_map(out / f"{sample.id}.png", label_map)
    return {name: 1000 * value / count for name, value in seconds.items()}


def image_profile(job: Job) -> dict[str, Any]:
    """The stages of labeling, and the profiler's figures of one image without reading and writing."""
    images = [read_image(sample.image) for sample in job.data.samples[:PROFILED]]
    memory = Memory()

    def run() -> None:
        for image in images:
            predict_for_labeling(job.network, image, job.protocol, memory=memory)

    run()
    stages(job, 1)  # the first calls of each part
    count = max(2, len(job.data.samples) // 8)
    return {"stages_ms": stages(job, count), **profiled(run, len(images))}
