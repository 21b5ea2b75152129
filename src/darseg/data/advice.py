"""What label values that are not classes look like, and which key of the recipe to set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from darseg.data.classes import CITYSCAPES, IGNORE, ClassSet
from darseg.data.encoding import CITYSCAPES_IDS, RGB, LabelEncoding

MOST_LISTED = 8
"""Values or colors that a message lists."""


def unknown_values(values: np.ndarray, count: int) -> str | None:
    """A line about the values of a label file that are not classes; None if there are none.

    Args:
        values: int64 [256]: how often each value occurs.
        count: number of classes.
    """
    unknown = [value for value in np.flatnonzero(values).tolist() if value >= count and value != IGNORE]
    if not unknown:
        return None
    listed = [f"{value} ({pixel_count(values[value])})" for value in unknown[:MOST_LISTED]]
    return (
        f"the label map has values that are neither a class (0 to {count - 1}) nor 255 (not labeled): "
        f"{list_counts(listed, len(unknown))}. "
        "Set data.ignore or data.label_values, or add the classes."
    )


def pixel_count(count: int) -> str:
    """A number of pixels in words: "1 pixel", "2 pixels"."""
    return f"{count} pixel" if count == 1 else f"{count} pixels"


def list_counts(items: Sequence[str], total: int) -> str:
    """The items, and how many more there are of `total`."""
    return ", ".join(items) + (f" and {total - len(items)} more" if total > len(items) else "")


def color_advice(raw: np.ndarray) -> str:
    """What to do about a label file with colors that belong to no class.

    Args:
        raw: int32 [H, W], the colors as `decode_label` returns them.
    """
    if ((raw >> 16 == raw & 255) & (raw >> 8 & 255 == raw & 255))[raw >= 0].all():
        return "All three channels are equal, so this is an index map saved as RGB. Set data.label_format: index."
    return (
        "Give the classes their colors (data.classes: {name: [red, green, blue]}), and list the colors of pixels that "
        "are not labeled (data.label_colors: {ignore: [[0, 0, 0]]})."
    )


def usual_mistakes(values: Iterable[int], classes: ClassSet, encoding: LabelEncoding) -> list[str]:
    """The usual mistake that these label values look like, with the key to set; at most one line.

    Args:
        values: every value that occurs in the files, before they are mapped to classes.
    """
    if encoding.values is not None:
        return []
    count = len(classes)
    present = set(values)
    real = present - {encoding.ignore}
    unknown = {value for value in real if value >= count and value != IGNORE}
    if present == {0, 255} and encoding.ignore == IGNORE:
        return [_masks(classes)]
    if not unknown:
        return [_counted_from_one(classes)] if count > 1 and 0 not in present and real else []
    grays = {_gray(color): "ignore" if k == IGNORE else classes.names[k] for color, k in encoding.colors}
    if len(real) > 1 and all(value in grays or value in (0, IGNORE) for value in real):
        names = ", ".join(f"{value} as {grays[value]}" for value in sorted(unknown) if value in grays)
        return [
            f"The label values are the gray levels of the class colors ({names}), so color labels were read or saved as "
            "gray. Use the color files themselves (data.label_format: color), or map the gray levels "
            "(data.label_values)."
        ]
    if unknown == {count}:
        return [
            "The label values go one beyond the last class. If 0 is not labeled and classes are counted from 1, set "
            f"data.label_values: one_based. If {count} is not labeled, set data.ignore: {count}."
        ]
    city = classes.names == CITYSCAPES.names or (count == len(CITYSCAPES_IDS) and len(real) > count + 1)
    if city and max(unknown) <= max(CITYSCAPES_IDS):
        return ["The label values look like the ids of Cityscapes. Set data.label_values: cityscapes_ids."]
    if len(real) <= count + 1 and len(unknown) >= len(real - unknown):
        return [_few_values(present)]
    return []


def _masks(classes: ClassSet) -> str:
    first = classes.names[0]
    setting = (
        "data.label_values: binary" if len(classes) == 2 else f"data.label_values: {{0: {first}, 255: …}}"
    )
    return (
        "The label files hold only 0 and 255, as masks do. But 255 is read as not labeled, so only "
        f"the class {first} would be learned. If 255 is a class, set {setting}."
    )


def _counted_from_one(classes: ClassSet) -> str:
    return (
        f"No label file holds the value 0 ({classes.names[0]}). If classes are counted from 1, set "
        "data.label_values: one_based."
    )


def _few_values(present: set[int]) -> str:
    listed = ", ".join(f"{value}: …" for value in sorted(present))
    return (
        f"The label files hold {len(present)} different values. Say which class each is, by its name, its index, or "
        f"ignore: data.label_values: {{{listed}}}."
    )


def _gray(color: RGB) -> int:
    """The gray level that OpenCV and Pillow turn a color into (ITU-R 601)."""
    red, green, blue = color
    return round(0.299 * red + 0.587 * green + 0.114 * blue)
