"""How far a figure varies with the images it was measured on: what all bootstraps share."""

from __future__ import annotations

import math
from statistics import NormalDist

RESAMPLES = 2000
"""Drawn sets of images; the ends of a 90 % interval then vary by about 2 % of its width."""
LEVEL = 0.9
"""How often an interval should hold the true figure."""


def expanded_tail(level: float, images: int) -> float:
    """Share of the drawn figures below an interval that holds the true one with chance `level`.

    Few images vary less among themselves than those they are drawn from, so the interval holds more than `level` of the
    drawn figures: as much more as one of Student's t is wider than one of the normal distribution.

    Source: expanded percentile interval, Hesterberg, What Teachers Should Know About the Bootstrap, 2015.
    """
    tail = (1 - level) / 2
    if images < 2:
        return tail
    return NormalDist().cdf(math.sqrt(images / (images - 1)) * student_t(tail, images - 1))


def student_t(share: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to 0.004 for shares from 0.025 to 0.975.

    Source: exact for 1 and 2 degrees of freedom; otherwise the expansion around the normal distribution in Abramowitz
    and Stegun, Handbook of Mathematical Functions 1964, 26.7.5.

    >>> round(student_t(0.05, 9), 2)
    -1.83
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    z, n = NormalDist().inv_cdf(share), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (order + 1) for order, term in enumerate(terms))
