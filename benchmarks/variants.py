"""Forward passes of a network built in several ways: what folding, pooling and cuDNN's search are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from cases import Case
from host import now

from darseg.model import heads
from darseg.model.fold import fold_batchnorm
from darseg.model.network import Network
from darseg.training.stage import AUTOCAST

TURNS = 3
NEVER = 1 << 40  # pixels


def paces_of_passes(
    case: Case, precision: str, windows: int, device: torch.device, seconds: float
) -> dict[str, float]:
    """Windows a second, by variant.

    Args:
        windows: in a pass.
        seconds: of a variant's turn, at least; one pass if it takes longer.
    """
    torch.manual_seed(0)
    plain: Network = case.spec.build().eval()
    folded = fold_batchnorm(case.spec.build().eval())
    networks = {
        name: network.to(device).to(memory_format=torch.channels_last)
        for name, network in (("plain", plain), ("folded", folded))
    }
    images = torch.randint(0, 256, (windows, 3, case.window, case.window), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    autocast = AUTOCAST[precision]

    def run(network: Network) -> None:
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            network(images)

    variants: dict[str, tuple[str, Callable]] = {
        "BatchNorm folded": ("folded", usual),
        "BatchNorm by itself": ("plain", usual),
        "folded, PyTorch's adaptive pooling": ("folded", adaptive_pooling),
        "folded, cuDNN's search (benchmark)": ("folded", search),
    }
    paces: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, (network, how) in variants.items():
            with how():
                run(networks[network])
                began, passes = now(), 0
                while passes == 0 or now() - began < seconds / TURNS:
                    run(networks[network])
                    passes += 1
                paces[name].append(windows * passes / (now() - began))
    return {name: sorted(values)[len(values) // 2] for name, values in paces.items()}


@contextmanager
def usual() -> Iterator[None]:
    """As darseg does it."""
    yield


@contextmanager
def adaptive_pooling() -> Iterator[None]:
    """Pyramid pooling with PyTorch's kernel."""
    with mock.patch.object(heads, "PRODUCTS_FROM", NEVER):
        yield


@contextmanager
def search() -> Iterator[None]:
    """cuDNN tries its algorithms for each new size, and takes the fastest."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        yield
