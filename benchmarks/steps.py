"""Training steps: darseg's loop with its loader, and a notebook's loop over batches that are ready in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from host import now

from darseg.data.augment import Augmentation
from darseg.data.batches import Batch, StreamPlace, stream_batches
from darseg.data.classes import ClassSet, class_set
from darseg.data.dataset import Cache
from darseg.data.manifest import Sample
from darseg.demo.scenes import draw_scene
from darseg.methods.self_training import self_training
from darseg.model.network import Network
from darseg.run.machine import usable_cores, workers_for
from darseg.training.method import Learner, Method
from darseg.training.optimize import SGD, AdamW, faster_heads
from darseg.training.stage import AUTOCAST, Stage, StepReport, run_stage

RATE = 1e-4  # learning rate of the timed steps
SCENES = 32  # that are drawn; more images differ in their noise alone
LARGEST_SCENE = 385  # pixels: the longest side that scenes are drawn with; larger images are scaled up


@dataclass(frozen=True)
class Data:
    """Labeled samples, their classes, and how they are decoded."""

    samples: Sequence[Sample]
    classes: ClassSet
    cache: Cache

    def roles(self, batch: int) -> list[tuple[Sequence[Sample], int]]:
        """Half of the samples as labeled, half as pseudo-labeled ones, each with its batch size."""
        half = len(self.samples) // 2
        return [(self.samples[:half], batch), (self.samples[half:], batch)]


def drawn(
    folder: Path, count: int, size: tuple[int, int], suffix: str, classes: int = 19
) -> tuple[list[Sample], ClassSet]:
    """Drawn scenes as files: images in the format of `suffix` with camera noise, and PNG label maps."""
    shrink = min(1.0, LARGEST_SCENE / max(size))
    scene_size = tuple(max(65, round(side * shrink)) for side in size)
    folder.mkdir(parents=True, exist_ok=True)

    scenes = [draw_scene(0, index, scene_size) for index in range(min(count, SCENES))]

    def draw(index: int) -> Sample:
        image, label = scenes[index % SCENES]
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
        noise = np.random.default_rng(index).normal(0, 2, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
        label = np.where(label < 255, label % classes, label)
        sample = Sample(f"{index}", folder / f"{index}{suffix}", folder / f"{index}_label.png")
        cv2.imwrite(str(sample.image), image[:, :, ::-1])
        cv2.imwrite(str(sample.label), label)
        return sample

    with ThreadPoolExecutor(usable_cores()) as pool:
        samples = list(pool.map(draw, range(count)))
    return samples, class_set([f"class {k}" for k in range(classes)])


@dataclass(frozen=True)
class Loop:
    """What both loops do.

    Attributes:
        auxiliary: weight of the auxiliary loss.
        optimizer: SGD or AdamW, with the same numbers on both sides.
        skipped: first steps that are not counted: they make cuDNN's handles, and use up what was prepared ahead.
    """

    network: Network
    stage: Stage
    auxiliary: float
    optimizer: SGD | AdamW = field(default_factory=SGD)
    skipped: int = 1

    @property
    def device(self) -> torch.device:
        return self.network.mean.device


@dataclass(frozen=True)
class Pace:
    """How fast a loop is.

    Attributes:
        seconds, burned: seconds per step by the clock, and of the processor in all threads.
        waiting: share of the time that it waited for data.
    """

    seconds: float
    burned: float
    waiting: float = 0.0


def bare(
    loop: Loop,
    batches: Sequence[Sequence[Batch]],
    forward: Callable,
    on_step: Callable[[int], object] = lambda step: None,
) -> Pace:
    """The pace of a notebook's loop over ready batches."""
    network, stage, device = loop.network, loop.stage, loop.device
    backbone = set(network.backbone.parameters())
    heads = [parameter for parameter in network.parameters() if parameter not in backbone]
    groups = [{"params": list(backbone), "factor": 1.0}, {"params": heads, "factor": 10.0}]
    kind, fused = loop.optimizer, True if device.type == "cuda" else None
    if isinstance(kind, SGD):
        make = partial(torch.optim.SGD, momentum=kind.momentum)
    else:
        make = partial(torch.optim.AdamW, betas=kind.betas)
    optimizer = make(groups, lr=RATE, weight_decay=kind.weight_decay, fused=fused)
    autocast = AUTOCAST[stage.precision]
    network.train()
    began, burned = now(), time.process_time()
    for step in range(stage.steps):
        if step == loop.skipped:
            began, burned = now(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = stage.schedule.rate(step, stage.steps, RATE) * group["factor"]
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for batch in batches[step % len(batches)]:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = forward(batch.images)
            labels = batch.labels.long()
            loss = loss + F.cross_entropy(output.main.float(), labels, ignore_index=255)
            if output.auxiliary is not None:
                loss = loss + loop.auxiliary * F.cross_entropy(
                    output.auxiliary.float(), labels, ignore_index=255
                )
        loss.backward()
        optimizer.step()
        on_step(step)
    counted = stage.steps - loop.skipped
    return Pace((now() - began) / counted, (time.process_time() - burned) / counted)


def method_of(network: Network, auxiliary: float, optimizer: SGD | AdamW) -> Method:
    """Self-training of a network; the feeds are not used, since the streams are passed."""
    learner = Learner("network", network, RATE, optimizer, faster_heads(10.0))
    return self_training(learner, batch=8, pseudo_batch=8, auxiliary_weight=auxiliary)


def staged(
    loop: Loop,
    streams: Callable[[int], Sequence[Iterator[Batch]]],
    on_step: Callable[[int], object] = lambda step: None,
) -> Pace:
    """The pace of darseg's loop with its loader."""
    stage = loop.stage
    marks: list[tuple[float, float, float]] = []
    begun: list[float] = []

    def opened(first: int) -> Sequence[Iterator[Batch]]:
        streamed = streams(first)
        begun.append(time.monotonic())
        return streamed

    def look(report: StepReport) -> None:
        on_step(report.step)
        if report.step in (loop.skipped - 1, stage.steps - 1):
            waited = report.waiting * (time.monotonic() - begun[0])
            marks.append((now(), time.process_time(), waited))

    run_stage(method_of(loop.network, loop.auxiliary, loop.optimizer), opened, stage, on_step=look)
    (first, burned_first, waited_first), (last, burned, waited) = marks
    counted = stage.steps - loop.skipped
    waiting = max(0.0, waited - waited_first) / (last - first)
    return Pace((last - first) / counted, (burned - burned_first) / counted, waiting)


def streams_of(
    roles: Sequence[tuple[Sequence[Sample], int]],
    classes: ClassSet,
    how: Augmentation,
    *,
    cache: Cache,
    pin: bool,
) -> Callable[[int], list[Iterator[Batch]]]:
    """First step → a stream for each role, as darseg opens them."""
    place = StreamPlace(workers=workers_for(None, 1, len(roles)), pin=pin)

    def streams(first: int) -> list[Iterator[Batch]]:
        return [
            stream_batches(
                samples,
                classes,
                how,
                batch_size=size,
                seed=(0, role),
                start=first,
                place=place,
                load=cache.load,
            )
            for role, (samples, size) in enumerate(roles)
        ]

    return streams


def ready_batches(
    streams: Callable[[int], list[Iterator[Batch]]], device: torch.device, count: int = 2
) -> list[list[Batch]]:
    """The batches of `count` steps, on the device."""
    feeds = streams(0)
    ready = []
    for _ in range(count):
        batches = [next(feed) for feed in feeds]
        ready.append([Batch(b.images.to(device), b.labels.to(device), b.ids) for b in batches])
    for feed in feeds:
        feed.close()
    return ready
