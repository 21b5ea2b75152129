"""Alpha channels of label files: counts of transparent pixels, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from darseg.data.labels import RawLabel


@dataclass(frozen=True)
class AlphaCounts:
    """Pixels of label files with alpha: transparent, partly so, and transparent with a color below."""

    transparent: int = 0
    partly: int = 0
    hidden: int = 0
    pixels: int = 0

    @staticmethod
    def of(raw: RawLabel) -> AlphaCounts | None:
        """The counts of a file; None if it has no alpha channel or nothing in it is transparent."""
        if raw.alpha is None or raw.drawn is None or raw.alpha.min(initial=255) == 255:
            return None
        clear = raw.alpha == 0
        transparent = int(clear.sum())
        hidden = int(np.count_nonzero(raw.drawn[clear]))
        partly = int((raw.alpha < 255).sum()) - transparent
        return AlphaCounts(transparent, partly, hidden=hidden, pixels=raw.alpha.size)

    def plus(self, other: AlphaCounts) -> AlphaCounts:
        return AlphaCounts(
            self.transparent + other.transparent,
            self.partly + other.partly,
            hidden=self.hidden + other.hidden,
            pixels=self.pixels + other.pixels,
        )


def alpha_line(total: AlphaCounts, files: int, pixels: int) -> str:
    """What transparent pixels of label files mean, with the key that changes it.

    Args:
        files: number of label files with such pixels.
        pixels: of all label files.
    """
    parts = []
    if total.transparent:
        parts.append(
            f"{total.transparent / max(1, pixels):.0%} of all label pixels are transparent (alpha 0) and read as not "
            "labeled, so that nothing is learned from them (no background, for example). If they are a class, name it in "
            "data.classes and set data.label_transparent: NAME"
        )
    if total.hidden:
        parts.append(
            f"{total.hidden:,} of these hide a color or value; if that counts, set data.label_transparent: as_drawn"
        )
    if total.partly:
        parts.append(f"{total.partly:,} pixels are partly transparent and read like opaque ones")
    return f"{files:,} label files have an alpha channel. {'. '.join(part[:1].upper() + part[1:] for part in parts)}."
