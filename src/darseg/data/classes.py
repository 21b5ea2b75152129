"""Names and colors of the classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darseg.errors import DataError

IGNORE = 255
"""The value of pixels that are not labeled, inside darseg and in every label map it writes."""


@dataclass(frozen=True)
class ClassSet:
    """K classes; class k is `names[k]`, drawn in `colors[k]` (RGB, 0..255)."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count <= 255:
            raise DataError(f"The number of classes is {count}. It must be between 2 and 255.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise DataError(
                f"These class names occur more than once: {', '.join(map(repr, repeated))}. Rename one of each."
            )
        if not all(isinstance(name, str) and name for name in self.names):
            raise DataError("A class has no name. Give each class a name that is not empty.")
        if len(self.colors) != count:
            raise DataError(
                f"The number of class names is {count}, but the number of colors is {len(self.colors)}. Give each class "
                "a color."
            )
        for name, color in zip(self.names, self.colors, strict=True):
            if len(color) != 3 or not all(0 <= part <= 255 for part in color):
                raise _color_error(name, color)

    def __len__(self) -> int:
        return len(self.names)

    def palette(self) -> NDArray[np.uint8]:
        """The color of each label value, uint8 [256, 3]; white for 255 (not labeled), black for other values."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        palette[IGNORE] = 255
        return palette


def _color_error(name: str, color: Sequence[int]) -> DataError:
    return DataError(
        f"The color of {name} is {list(color)}. A color is three numbers from 0 to 255: red, green, blue."
    )


def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` different colors: the bits of an index are spread over the channels, as in VOC's color map."""
    colors = []
    for index in range(count):
        color, rest = [0, 0, 0], index + 1  # VOC's 0 is black, which stands for "outside", as white does
        for bit in range(8):
            for channel in range(3):
                color[channel] |= ((rest >> channel) & 1) << (7 - bit)
            rest >>= 3
        colors.append((color[0], color[1], color[2]))
    return tuple(colors)


def alike(names: Sequence[str]) -> list[str]:
    """A line about classes whose names differ only in letter case or spaces: perhaps one class."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), []).append(name)
    same = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    if not same:
        return []
    return [
        f"These class names differ only in letter case, composition or spaces: {', '.join(same)}. Are they one class?"
    ]


def class_set(classes: str | Sequence[str] | Mapping[str, Sequence[int]]) -> ClassSet:
    """The built-in set of that name, or a set of names, or of names with their colors."""
    if isinstance(classes, str):
        if classes not in BUILT_IN:
            raise DataError(
                f"There is no built-in class set {classes!r}. Give one of {', '.join(BUILT_IN)}, or a list of classes."
            )
        return BUILT_IN[classes]
    if isinstance(classes, Mapping):
        for name, color in classes.items():
            if len(color) != 3:
                raise _color_error(name, color)
        colors = tuple((int(r), int(g), int(b)) for r, g, b in classes.values())
        return ClassSet(tuple(classes), colors)
    return ClassSet(tuple(classes), distinct_colors(len(classes)))


def _table(text: str) -> ClassSet:
    """A set from lines of a name and three numbers."""
    rows = [line.rsplit(maxsplit=3) for line in text.strip().splitlines()]
    return ClassSet(
        tuple(row[0].strip() for row in rows), tuple((int(r), int(g), int(b)) for _, r, g, b in rows)
    )


# The 19 train ids of Cityscapes with the colors of its published label table.
CITYSCAPES = _table("""
road 128 64 128
sidewalk 244 35 232
building 70 70 70
wall 102 102 156
fence 190 153 153
pole 153 153 153
traffic light 250 170 30
traffic sign 220 220 0
vegetation 107 142 35
terrain 152 251 152
sky 70 130 180
person 220 20 60
rider 255 0 0
car 0 0 142
truck 0 0 70
bus 0 60 100
train 0 80 100
motorcycle 0 0 230
bicycle 119 11 32
""")

# The 21 classes of PASCAL VOC 2012 with its development kit's color map.
VOC = _table("""
background 0 0 0
aeroplane 128 0 0
bicycle 0 128 0
bird 128 128 0
boat 0 0 128
bottle 128 0 128
bus 0 128 128
car 128 128 128
cat 64 0 0
chair 192 0 0
cow 64 128 0
diningtable 192 128 0
dog 64 0 128
horse 192 0 128
motorbike 64 128 128
person 192 128 128
pottedplant 0 64 0
sheep 128 64 0
sofa 0 192 0
train 128 192 0
tvmonitor 0 64 128
""")

# The 11 classes of CamVid as SegNet's authors grouped them, with their colors.
CAMVID = _table("""
sky 128 128 128
building 128 0 0
pole 192 192 128
road 128 64 128
pavement 0 0 192
tree 128 128 0
sign_symbol 192 128 128
fence 64 64 128
car 64 0 128
pedestrian 64 64 0
bicyclist 0 128 192
""")

BUILT_IN = {"cityscapes": CITYSCAPES, "voc": VOC, "camvid": CAMVID}
