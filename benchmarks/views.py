"""Strong views: OpenCV on a loader's thread, as darseg makes them, against tensor operations on the device.

    .venv/bin/python benchmarks/views.py [--sides 97 321 713] [--batch 8] [--turns 7]

Both jitter brightness, contrast, saturation and hue, turn gray and blur, with the shares and strengths of
`darseg.data.colors.Colors`. The tensor operations are written here for whole batches, as libraries for GPUs do it: one
order of the four jitters for a batch, in float32. OpenCV's time is that of one core. Where there is a GPU, the tensor
operations are timed on it as well, from uint8 batches that are there already.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from host import commit, processor
from torch import Tensor

from darseg.data.colors import LUMA, Colors, recolor
from darseg.demo.scenes import draw_scene

HOW = Colors()


def gray_of(images_N3HW: Tensor) -> Tensor:
    return (images_N3HW * images_N3HW.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def turned(images_N3HW: Tensor, turns_N: Tensor) -> Tensor:
    """Colors with another hue, through HSV."""
    high, low = images_N3HW.amax(1), images_N3HW.amin(1)
    spread = high - low
    safe = spread.clamp_min(1e-8)
    red, green, blue = images_N3HW.unbind(1)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = (hue / 6 + turns_N[:, None, None]) % 1
    offsets = hue.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    sector = (offsets + hue[:, None] * 6) % 6
    return high[:, None] - spread[:, None] * torch.minimum(sector, 4 - sector).clamp(0, 1)


def blurred(images_N3HW: Tensor, deviations_N: Tensor) -> Tensor:
    """Gaussian blur with a deviation for each image: two passes of a depthwise convolution."""
    count, _, height, width = images_N3HW.shape
    reach = math.ceil(3 * HOW.blur[1])
    at = torch.arange(-reach, reach + 1, device=images_N3HW.device)
    kernels = torch.exp(-0.5 * (at / deviations_N[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    flat = images_N3HW.reshape(1, 3 * count, height, width)
    flat = F.pad(flat, [reach] * 4, mode="reflect")
    flat = F.conv2d(
        F.conv2d(flat, kernels[:, :, :, None], groups=3 * count), kernels[:, :, None], groups=3 * count
    )
    return flat.reshape(images_N3HW.shape)


def recolor_batch(images_N3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Strong views of uint8 [N, 3, H, W], drawn image by image but for the order of the jitters."""
    device, count = images_N3HW.device, len(images_N3HW)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    jitters, grays, blurs = (
        drawn(count) < share for share in (HOW.jitter_share, HOW.gray_share, HOW.blur_share)
    )
    amounts = (2 * drawn(4, count) - 1) * torch.tensor(HOW.jitter, device=device)[:, None] * jitters
    images = images_N3HW.float() / 255
    for operation in torch.randperm(4, generator=generator).tolist():
        amount = amounts[operation]
        factor = (1 + amount)[:, None, None, None]
        if operation == 0:
            images = (images * factor).clamp(0, 1)
        elif operation == 1:
            middle = gray_of(images).mean((2, 3), keepdim=True)
            images = (middle + (images - middle) * factor).clamp(0, 1)
        elif operation == 2:
            gray = gray_of(images)
            images = (gray + (images - gray) * factor).clamp(0, 1)
        else:
            images = turned(images, amount)
    images = torch.where(grays[:, None, None, None], gray_of(images), images)
    deviations = HOW.blur[0] + drawn(count) * (HOW.blur[1] - HOW.blur[0])
    images = torch.where(blurs[:, None, None, None], blurred(images, deviations), images)
    return (images * 255).round().to(torch.uint8)


def least(work: Callable[[], object], turns: int) -> float:
    """Seconds of the fastest turn, by the clock, until the device is done."""
    seconds = []
    for _ in range(turns + 1):  # the first one is not counted
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[97, 321, 713])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    print(
        f"{processor()}{f', {torch.cuda.get_device_name()}' if gpu else ''}, one thread, Python "
        f"{platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}, commit {commit()}\n"
    )
    last = " tensor operations, GPU |" if gpu else ""
    print(f"| ms a strong view | OpenCV, one core | tensor operations, one core |{last}")
    print(f"|---|---|---|{'---|' if gpu else ''}")
    for side in args.sides:
        scenes = [
            cv2.resize(draw_scene(0, index, (193, 385))[0], (side, side)) for index in range(args.batch)
        ]
        batch = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous()
        draws, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        works = [
            lambda scenes=scenes, draws=draws: [recolor(image, HOW, generator=draws) for image in scenes],
            lambda batch=batch, generator=generator: recolor_batch(batch, generator),
        ]
        if gpu:
            there = batch.cuda()
            works.append(lambda there=there, generator=generator: recolor_batch(there, generator))
        # Draws differ from turn to turn, so a turn is several batches.
        times = [
            1000 * least(lambda work=work: [work() for _ in range(8)], args.turns) / 8 / args.batch
            for work in works
        ]
        print(f"| {side}x{side} | " + " | ".join(f"{value:.2f}" for value in times) + " |")


if __name__ == "__main__":
    main()
