"""Sums of windows: the bits of adding one whole window after the other, read in strips of any rows."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.model.windows import Memory, WindowSums, window_starts

CPU = torch.device("cpu")


def drawn(
    size: tuple[int, int], window: tuple[int, int], seed: int, *, mirror: bool, kind: torch.dtype
) -> list[tuple[int, int, torch.Tensor, torch.Tensor | None]]:
    """Corners, scores and mirrored scores of all windows, with many zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for top in window_starts(size[0], window[0]):
        for left in window_starts(size[1], window[1]):
            plain, mirrored = torch.randn(2, 3, *window, generator=generator).mul(9).to(kind)
            plain[0], mirrored[0] = plain[0].round().clamp(-0.0, 1), mirrored[0].round().clamp(-0.0, 1)
            parts.append((top, left, plain, mirrored if mirror else None))
    return parts


def one_after_the_other(size: tuple[int, int], parts: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counts in float32: each window as a whole, in order."""
    total, count = torch.zeros(3, *size), torch.zeros(size)
    for top, left, plain, mirrored in parts:
        both = plain if mirrored is None else mirrored.flip(2) + plain
        rows, columns = slice(top, top + plain.shape[1]), slice(left, left + plain.shape[2])
        total[:, rows, columns] += both
        count[rows, columns] += 1 if mirrored is None else 2
    return total, count


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().numpy().view(np.int32)


sides = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=40, deadline=None)
@given(
    sides,
    sides,
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
def test_strips_have_the_bits_of_adding_in_order(size, window, seed, mirror, kind, data) -> None:
    window = (min(window[0], size[0]), min(window[1], size[1]))
    parts = drawn(size, window, seed, mirror=mirror, kind=kind)
    rows = data.draw(st.integers(1, size[0]), label="rows of a strip")
    top, left = (data.draw(st.integers(0, side - 1)) for side in size)
    height, width = (
        data.draw(st.integers(1, side - first)) for side, first in zip(size, (top, left), strict=True)
    )
    total, count = one_after_the_other(size, parts)
    memory = Memory()
    memory.zeros(CPU, 3, *size).fill_(7)  # of the image before
    sums = WindowSums((3, *size), CPU, memory)
    for row, column, plain, mirrored in parts:
        sums.add(plain, row, column, mirrored=mirrored)
    assert np.array_equal(bits(sums.mean(0, size[0])), bits(total / count))
    sums.crop(top, left, height=height, width=width)
    inside = slice(top, top + height), slice(left, left + width)
    wanted = (total / count)[(slice(None), *inside)]
    for start in range(0, height, rows):
        strip = sums.mean(start, min(start + rows, height))
        assert np.array_equal(bits(strip), bits(wanted[:, start : start + rows]))
    assert torch.equal(sums.count_HW, count[inside])


def test_several_images_are_each_their_own_planes() -> None:
    parts = drawn((9, 14), (5, 6), 0, mirror=True, kind=torch.float32)
    total, count = one_after_the_other((9, 14), parts)
    sums = WindowSums((3, 9, 14), CPU)
    for top, left, plain, mirrored in parts:
        sums.add(plain, top, left, mirrored=mirrored)
    for index in range(3):
        part = sums.of_image(index, 3)
        part.crop(1, 2, height=7, width=5)
        assert torch.equal(part.mean(2, 6), (total / count)[index : index + 1, 3:7, 2:7])
