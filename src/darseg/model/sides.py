"""The image sizes that a network takes: check, round up, round down, and name the nearest."""

from __future__ import annotations

from dataclasses import dataclass

from darseg.errors import SizeError


@dataclass(frozen=True)
class Sides:
    """The legal sides of an image, in pixels: step * n + offset with n = 1, 2, 3, …

    Attributes:
        step: pixels from one legal side to the next, at least 1.
        offset: 1 for networks whose corners stay corners (8n + 1), 0 for networks of patches (14n).

    >>> sides = Sides(8)
    >>> sides.is_legal(17), sides.up(18), sides.down(18)
    (True, 25, 17)
    """

    step: int
    offset: int = 1

    def __post_init__(self) -> None:
        if self.step < 1 or self.offset < 0:
            raise SizeError(
                f"Sides of {self.step} * n + {self.offset} pixels are not possible: the step must be at least 1 and "
                "the offset at least 0."
            )

    def __str__(self) -> str:
        return f"{self.step}n + {self.offset}" if self.offset else f"{self.step}n"

    def is_legal(self, side: int) -> bool:
        """Whether a network with these sides takes `side` pixels."""
        return side >= self.step + self.offset and (side - self.offset) % self.step == 0

    def up(self, side: int, least: int = 1) -> int:
        """The smallest legal side of at least `side` pixels, with n of at least `least`."""
        return self.step * max(least, -((self.offset - side) // self.step)) + self.offset

    def down(self, side: int) -> int:
        """The largest legal side of at most `side` pixels; the smallest of all if `side` is below it."""
        return self.step * max(1, (side - self.offset) // self.step) + self.offset

    def nearest(self, side: int) -> int:
        """The legal side nearest to `side` pixels; of two that are equally near, the larger."""
        below = self.down(side)
        return below if 2 * (side - below) < self.step else self.up(side)

    def near(self, height: int, width: int) -> str:
        """The legal sizes (height x width) just below and above a size, for messages."""
        smaller = f"{self.down(height)} x {self.down(width)}"
        larger = f"{self.up(height)} x {self.up(width)}"
        return larger if smaller == larger else f"{smaller} or {larger}"

    def check(self, height: int, width: int) -> None:
        """Raise SizeError, naming the nearest legal sizes, unless both sides are legal."""
        if not (self.is_legal(height) and self.is_legal(width)):
            raise SizeError(
                f"{height} x {width} pixels (height x width) is not a size this network takes: its sides are {self} "
                f"pixels. Choose the nearest: {self.near(height, width)}."
            )
