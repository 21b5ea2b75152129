"""Random numbers by key – seed, position of an image, pixel, class – on any device, without a state.

Draws during the label phase must not depend on how many processes share a batch, and must not wait for the device. A
generator's numbers depend on how many were drawn before; these depend on their keys alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
"""Constants of SplitMix64 (Steele, Lea and Flood 2014), as signed integers."""

BITS = 24
"""Random bits of a number: those of a float32 in [0, 1)."""


def uniform(seed: Sequence[int], *keys: Tensor) -> Tensor:
    """Numbers in [0, 1), each decided by the seed and its keys; float32, of the keys' broadcast shape.

    Args:
        seed: integers below 2^63.
        keys: int64 tensors, on the same device.
    """
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for number in seed:
        state = _scrambled(state + STEP + number)
    for key in keys:
        state = _scrambled(state + STEP + key)
    return _right(state, 64 - BITS).float() / (1 << BITS)


def _scrambled(value: Tensor) -> Tensor:
    """SplitMix64's output function; int64 products wrap around."""
    value = (value ^ _right(value, 30)) * FIRST
    value = (value ^ _right(value, 27)) * SECOND
    return value ^ _right(value, 31)


def _right(value: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills up with zeros, not with the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
