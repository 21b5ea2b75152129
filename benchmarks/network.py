"""Changes that make networks faster on a CPU, each timed against the same network without it.

    .venv/bin/python benchmarks/network.py [--turns 5] [--threads N] [--skip convolutions step passes]

Convolutions: a dilated depthwise convolution, forwards and backwards, against PyTorch's own and against one without
dilation, in processor seconds. Step: a training step of the CamVid recipe's network with random weights and images, with
timm's own convolutions and with the exchanged ones. Passes: forward passes as in labeling. A process keeps memory or not
as a whole, so each figure is the minimum of a process of its own, and processes take turns. Ratios are medians over the
turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from training import best, commit, processor, timed

from darseg.data.batches import Batch
from darseg.methods.self_training import self_training_loss
from darseg.model import backbone
from darseg.model.convolutions import DilatedDepthwise
from darseg.model.fold import fold_batchnorm
from darseg.model.network import Network, build_network
from darseg.run.machine import keep_memory

CONVOLUTIONS = (  # images, channels, height, width, side of the kernel
    (4, 1152, 13, 17, 5),  # the CamVid recipe: EfficientNet-Lite0, output stride 16, crops 193x257
    (4, 1152, 13, 17, 3),
    (4, 960, 45, 45, 5),  # MobileNetV3, output stride 8, crops 353x353
    (4, 960, 45, 45, 3),
)
LITE0 = "timm/tf_efficientnet_lite0"
PASSES = (  # backbone, output stride, classes, images, height, width
    (LITE0, 16, 11, 2, 369, 481),  # the CamVid recipe: a frame and its mirror image
    (LITE0, 16, 19, 2, 1025, 2049),
    ("resnet18", 8, 19, 8, 361, 361),
    ("resnet50_deep", 8, 19, 4, 361, 361),
)
VARIANTS = ("as it was", "memory kept", "convolutions exchanged", "BatchNorm folded")
"""Each variant includes those before it."""


def channels_last(what):
    return what.to(memory_format=torch.channels_last)


def convolutions(turns: int) -> None:
    print(
        "\n| ms, forwards + backwards | images x channels x h x w | PyTorch's, dilation 2 | exchanged | ratio "
        "| without dilation |"
    )
    print("|---|---|---|---|---|---|")
    for images, channels, height, width, side in CONVOLUTIONS:
        x = channels_last(torch.randn(images, channels, height, width)).requires_grad_()
        upstream = channels_last(torch.randn(images, channels, height, width))

        def use(
            kind: type[nn.Conv2d], dilation: int, x=x, upstream=upstream, channels=channels, side=side
        ) -> Callable[[], None]:
            padding = dilation * (side // 2)
            conv = channels_last(
                kind(
                    channels, channels, side, padding=padding, dilation=dilation, groups=channels, bias=False
                )
            )

            def run() -> None:
                for _ in range(3):
                    conv(x).backward(upstream)

            return run

        runs = use(nn.Conv2d, 2), use(DilatedDepthwise, 2), use(nn.Conv2d, 1)
        theirs, ours, without = (1000 * seconds / 3 for seconds in best(*runs, turns=turns))
        print(
            f"| {side}x{side} | {images}x{channels}x{height}x{width} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} | "
            f"{without:.1f} |"
        )


def network_of(name: str, stride: int, classes: int, exchanged: bool) -> Network:
    torch.manual_seed(0)
    exchange = backbone.exchange_convolutions
    if not exchanged:
        backbone.exchange_convolutions = lambda *arguments: None  # ty: ignore
    try:
        return channels_last(build_network("pspnet", name, classes, stride, 128))
    finally:
        backbone.exchange_convolutions = exchange


def step(turns: int) -> None:
    keep_memory()

    def batch() -> Batch:
        images = torch.randint(0, 256, (4, 3, 193, 257), dtype=torch.uint8)
        labels = torch.randint(0, 11, (4, 193, 257), dtype=torch.uint8)
        return Batch(channels_last(images), labels, ("",) * 4)

    batches = [batch(), batch()]

    def steps(exchanged: bool) -> Callable[[], None]:
        network = network_of(LITE0, 16, 11, exchanged).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

        def run() -> None:
            for _ in range(3):
                optimizer.zero_grad(set_to_none=True)
                self_training_loss(network, batches, 0.4, 1.0)[0].backward()
                optimizer.step()

        run()
        return run

    before, after = steps(False), steps(True)
    clocks = [(timed(before) / 3, timed(after) / 3) for _ in range(turns)]
    ratios = sorted(new / old for old, new in clocks)
    old, new = (min(column) for column in zip(*clocks, strict=True))
    print(
        f"\nA step of training, CamVid recipe's network, 4 + 4 crops of 193x257: {old:.3f} s with timm's convolutions, "
        f"{new:.3f} s with those exchanged; ratio {median(ratios):.3f} ({ratios[0]:.3f} – {ratios[-1]:.3f})."
    )


def passes(turns: int, threads: int) -> None:
    print(
        f"\n| s, forward pass (ratio to the first: median of {turns}) | images | {' | '.join(VARIANTS)} "
        "| memory, MB, first and last |"
    )
    print("|---|---|" + "---|" * (len(VARIANTS) + 1))
    for which, (name, _, _, images, height, width) in enumerate(PASSES):
        table = [
            [measure_in_a_process(which, variant, threads) for variant in range(len(VARIANTS))]
            for _ in range(turns)
        ]
        columns = list(zip(*table, strict=True))
        cells = []
        for column in columns:
            ratio = median(
                seconds / first for (seconds, _), (first, _) in zip(column, columns[0], strict=True)
            )
            cells.append(f"{min(seconds for seconds, _ in column):.3f} ({ratio:.2f})")
        memory = [max(size for _, size in column) for column in (columns[0], columns[-1])]
        what = f"{name.removeprefix('timm/')} | {images}x{height}x{width}"
        print(f"| {what} | {' | '.join(cells)} | {memory[0]:.0f}, {memory[1]:.0f} |", flush=True)


def measure_in_a_process(which: int, variant: int, threads: int) -> tuple[float, float]:
    """Seconds of the fastest pass and the peak memory in MB of a new process."""
    call = [sys.executable, __file__, "--child", str(which), str(variant), "--threads", str(threads)]
    return tuple(map(float, subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()))  # ty: ignore


def child(which: int, variant: int) -> None:
    import resource

    if variant >= 1:
        keep_memory()
    name, stride, classes, images, height, width = PASSES[which]
    network = network_of(name, stride, classes, exchanged=variant >= 2).eval()
    if variant >= 3:
        network = channels_last(fold_batchnorm(network))
    x: Tensor = torch.randn(images, 3, height, width)
    with torch.inference_mode():
        seconds = min(timed(lambda: network(x)) for _ in range(6))
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", nargs="*", default=[], choices=["convolutions", "step", "passes"])
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(*arguments.child)
        return
    print(f"{processor()}, {arguments.threads} threads, torch {torch.__version__}, commit {commit()}")
    if "convolutions" not in arguments.skip:
        convolutions(arguments.turns)
    if "step" not in arguments.skip:
        step(arguments.turns)
    if "passes" not in arguments.skip:
        passes(arguments.turns, arguments.threads)


if __name__ == "__main__":
    main()
