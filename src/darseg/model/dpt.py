"""DPT's head: four feature maps fused from coarse to fine (Ranftl et al. 2021).

As UniMatch V2 has it, without BatchNorm, so that small batches do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from darseg.model.backbone import Features
from darseg.model.heads import Head, upsample

WIDTHS = {384: 64, 768: 128, 1024: 256, 1536: 384}
"""Channels of a transformer's tokens → width of the fused maps, as published for DINOv2's S, B, L and g."""

PROJECTIONS = {
    384: (48, 96, 192, 384),
    768: (96, 192, 384, 768),
    1024: (256, 512, 1024, 1024),
    1536: (1536, 1536, 1536, 1536),
}
"""Channels of a transformer's tokens → channels of its four maps before they are fused, as published."""

USUAL_WIDTH = 128
"""Width for other backbones."""


class DPTHead(Head):
    """Features → logits [B, classes, h, w], with h and w twice those of the finest map.

    A transformer's four maps have the same size and become finer and coarser first: 4, 2, 1 and 1/2 times as many places
    along a side. Maps of strides 4, 8, 16 and 32 are fused as they are.

    Args:
        channels: of the four maps.
        width: channels of the fused maps; None: as published for this backbone.
        tokens: whether the maps are a transformer's.
    """

    def __init__(self, channels: Sequence[int], width: int | None, classes: int, *, tokens: bool) -> None:
        super().__init__()
        width = width or WIDTHS.get(channels[-1], USUAL_WIDTH)
        kept = _projections(channels[-1]) if tokens else channels
        self.levels = nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip(channels, kept, strict=True)):
            parts: list[nn.Module] = (
                [nn.Conv2d(inputs, outputs, 1), *_resize(index, outputs)] if tokens else []
            )
            self.levels.append(nn.Sequential(*parts, nn.Conv2d(outputs, width, 3, padding=1, bias=False)))
        # Nothing is fused with the coarsest map.
        self.fusions = nn.ModuleList(Fusion(width, skips=index < 3) for index in range(4))
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()
        self.classifier = nn.Conv2d(width, classes, 1)

    def prepare(self, features: Features) -> Tensor:
        """What the classifier sees."""
        first, second, third, x = (level(x) for level, x in zip(self.levels, features, strict=True))
        finest, *_, coarsest = self.fusions
        x = coarsest(x, None, _size(third))
        for fusion, skip, finer in ((self.fusions[2], third, second), (self.fusions[1], second, first)):
            x = fusion(x, skip, _size(finer))
        height, width = _size(first)
        return self.relu(self.smooth(finest(x, first, (2 * height, 2 * width))))


class Fusion(nn.Module):
    """A map plus a finer one, refined and enlarged to the size of the next."""

    def __init__(self, width: int, skips: bool) -> None:
        super().__init__()
        self.skip = Residual(width) if skips else None
        self.refine = Residual(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip is not None and finer is not None:
            x = x + self.skip(finer)
        return self.out(upsample(self.refine(x), size))


class Residual(nn.Module):
    """Two 3x3 convolutions after ReLUs, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(self.relu(x))))


def _projections(channels: int) -> tuple[int, ...]:
    return PROJECTIONS.get(channels) or (channels // 8, channels // 4, channels // 2, channels)


def _resize(index: int, channels: int) -> list[nn.Module]:
    """What makes map `index` of a transformer 4, 2, 1 or 1/2 times as fine."""
    match index:
        case 0 | 1:
            factor = (4, 2)[index]
            return [nn.ConvTranspose2d(channels, channels, factor, factor)]
        case 3:
            return [nn.Conv2d(channels, channels, 3, 2, padding=1)]
    return []


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
