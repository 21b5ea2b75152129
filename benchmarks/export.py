"""Exported networks compared with darseg's own on real images: equal classes, differences of logits, seconds.

    .venv/bin/python benchmarks/export.py [--images ../shared/data/camvid/images] [--count 2] [--turns 3] [NETWORK …]

Every network has random weights and BatchNorm statistics of the images, so that activations are of usual size and
classes vary; heads have 64 channels. NETWORK is ARCHITECTURE/BACKBONE/STRIDE; without it, all are measured. --turns N
times an image N times with each program, in turns, on one thread, and reports the median processor time, which other
work on the machine changes little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from darseg.data.classes import CAMVID
from darseg.data.images import IMAGE_SUFFIXES, read_image
from darseg.data.manifest import find_files
from darseg.model.export import _onnx_runner, _pt2_runner, metadata_of, write_exported
from darseg.model.network import Network, NetworkSpec
from darseg.model.parity import Parity
from darseg.model.predict import predict_scores
from darseg.model.windows import Protocol

NETWORKS = {
    "pspnet": (
        *(("resnet18_half", 8), ("resnet18", 8), ("resnet18", 16), ("resnet34", 16), ("resnet50", 8)),
        *(("resnet50_deep", 8), ("resnet50", 16), ("resnet101", 16), ("resnet101_deep", 16)),
        *(("timm/tf_efficientnet_lite0", 16), ("timm/resnet18", 16), ("timm/resnet50", 8)),
        *(("timm/mobilenetv3_small_100", 16), ("timm/mobilenetv3_large_100", 16), ("timm/convnext_atto", 16)),
    ),
    "deeplabv2": (("resnet101_caffe", 8), ("resnet101_caffe", 16), ("resnet18", 8), ("timm/resnet18", 16)),
    "deeplabv3plus": (("resnet18", 16),),
    "dpt": (("timm/vit_small_patch14_dinov2", 8),),  # whose stride is its patch, whatever is asked for
}
HEAD_CHANNELS = 64
"""Fewer than usual: the width of the heads does not change which operations are exported."""


def random_network(spec: NetworkSpec, images: list[np.ndarray]) -> Network:
    torch.manual_seed(0)
    network = spec.build()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    high, wide = network.sides.up(129), network.sides.up(161)
    corners = [corner for image in images for corner in (image[:high, :wide], image[-high:, -wide:])]
    with torch.no_grad():
        logits = network(torch.from_numpy(np.stack(corners)).permute(0, 3, 1, 2)).main
        if spec.architecture == "dpt":  # without BatchNorm one class would win everywhere
            network.head.classifier.bias -= logits.mean((0, 2, 3))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--images", type=Path, default=Path("../shared/data/camvid/images"))
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--turns", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = list(find_files(arguments.images, IMAGE_SUFFIXES).items())
    images = {
        name: read_image(path) for name, path in files[:: len(files) // arguments.count][: arguments.count]
    }
    print(f"torch {torch.__version__}, {len(images)} images of {arguments.images}", flush=True)
    print(
        "| network | stride | file | equal classes | lowest in | logits differ by | reach | classes seen | MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for architecture, networks in NETWORKS.items():
        for backbone, stride in networks:
            if arguments.names and f"{architecture}/{backbone}/{stride}" not in arguments.names:
                continue
            spec = NetworkSpec(
                architecture, backbone, len(CAMVID), stride, HEAD_CHANNELS, False, CAMVID.names
            )
            network = random_network(spec, list(images.values()))
            image = next(iter(images.values()))
            window = tuple(network.sides.up(side) for side in image.shape[:2])
            protocol = Protocol((window[0], window[1]), mirror=False)
            seen = len(
                predict_scores(network, image, protocol, average="logits")
                .mean(0, len(image))
                .argmax(0)
                .unique()
            )
            with tempfile.TemporaryDirectory() as folder:
                runners = {"torch": partial(predict_scores, network, image, protocol, average="logits")}
                seconds = []
                for suffix, runner in ((".onnx", _onnx_runner), (".pt2", _pt2_runner)):
                    path, begin = Path(folder, f"network{suffix}"), time.process_time()
                    parity = write_exported(network, path, images, metadata=metadata_of(spec, CAMVID, {}))
                    seconds.append(f"{suffix} {time.process_time() - begin:.0f}")
                    start, end = f"{architecture} {backbone} | {stride} | {suffix}", path.stat().st_size / 1e6
                    print(f"| {start} | {row(parity)} | {seen} | {end:.0f} |", flush=True)
                    runners[suffix] = partial(runner(path), image[None])
                print(f"  processor seconds of writing and checking: {', '.join(seconds)}", flush=True)
                times: dict[str, list[float]] = {name: [] for name in runners}
                for _ in range(arguments.turns):
                    for name, run in runners.items():
                        begin = time.process_time()
                        run()
                        times[name].append(time.process_time() - begin)
            if arguments.turns:
                seconds = [f"{name} {statistics.median(values):.2f}" for name, values in times.items()]
                print(f"  processor seconds of an image: {', '.join(seconds)}", flush=True)


def row(parity: Parity) -> str:
    """The table cells of a comparison."""
    share = 1 - parity.different / parity.pixels
    return f"{share:.4%} | {parity.worst:.4%} | {parity.difference:.1e} | {parity.reach:.3g}"


if __name__ == "__main__":
    main()
