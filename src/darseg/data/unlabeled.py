"""Endless, seeded streams of views of unlabeled images that can begin at any step.

As in batches.py, the seed and a position in the stream alone decide what stands there: which image, how it is cut out,
the colors of its strong views, and the boxes for mixing. The threads of the loader make the views with OpenCV
(docs/online.md says what they cost).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darseg.data.augment import Augmentation, change_colors, draw, inside_of, move_image, move_label
from darseg.data.batches import StreamPlace, ahead_of_steps, sample_index
from darseg.data.classes import IGNORE
from darseg.data.colors import Colors
from darseg.data.dataset import LoadImage, load_image, read_truth
from darseg.data.manifest import Sample
from darseg.data.views import Views
from darseg.errors import RecipeError

TRIES = 100
"""Draws of a box before it is made to fit. Of the published boxes, one in four or more fits a square crop."""


@dataclass(frozen=True)
class Boxes:
    """How the region to mix is drawn for each strong view; the defaults are those of CutMix in UniMatch.

    Attributes:
        share: share of the views that have a box.
        area: smallest and largest area of a box as a share of the crop; drawn uniformly.
        aspect: smallest and largest height divided by width; drawn uniformly, together with the place, until the box lies
            in the crop. None: the height, as a share of the crop's, is drawn between `area` and 1 with a uniform
            logarithm, and the place among those inside (French et al.).
    """

    share: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    aspect: tuple[float, float] | None = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"The share of views with a box, {self.share}, is not valid. Give 0 to 1.")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise RecipeError(
                f"The areas of boxes {list(self.area)} are not valid. Give the smallest and the largest share of the "
                "crop, above 0 and at most 1."
            )
        if self.aspect is not None and not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise RecipeError(
                f"The aspects of boxes {list(self.aspect)} are not valid. Give the smallest and the largest height "
                "divided by width, both above 0."
            )


@dataclass(frozen=True)
class StrongViews:
    """How strong views are made of a weak one."""

    colors: Colors = field(default_factory=Colors)
    boxes: Boxes = field(default_factory=Boxes)


def draw_box(
    crop: tuple[int, int], how: Boxes, *, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a box inside the crop; all 0 if the view has none."""
    if generator.random() >= how.share:
        return 0, 0, 0, 0
    area = how.area[0] + generator.random() * (how.area[1] - how.area[0])
    if how.aspect is None:
        share = math.exp(generator.random() * math.log(area))
        height, width = round(share * crop[0]), round(area / share * crop[1])
        return _placed(crop, (height, width), generator)
    pixels = area * crop[0] * crop[1]
    for _ in range(TRIES):
        aspect = how.aspect[0] + generator.random() * (how.aspect[1] - how.aspect[0])
        height, width = int(math.sqrt(pixels * aspect)), int(math.sqrt(pixels / aspect))
        top, left = (int(generator.integers(side)) for side in crop)
        if top + height <= crop[0] and left + width <= crop[1]:
            return top, left, top + height, left + width
    # A crop so long that hardly any box fits.
    height, width = min(crop[0], int(math.sqrt(pixels))), min(crop[1], int(math.sqrt(pixels)))
    return _placed(crop, (height, width), generator)


def _placed(
    crop: tuple[int, int], size: tuple[int, int], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box of this height and width, at a place that is drawn uniformly."""
    top, left = (int(generator.integers(side - own + 1)) for side, own in zip(crop, size, strict=True))
    return top, left, top + size[0], left + size[1]


def stream_views(
    samples: Sequence[Sample],
    augmentation: Augmentation,
    strong: StrongViews,
    *,
    views: int,
    batch_size: int,
    seed: Sequence[int],
    start: int = 0,
    place: StreamPlace | None = None,
    load: LoadImage = load_image,
    truth_every: int | None = None,
) -> Iterator[Views]:
    """Yield the views of steps `start`, `start` + 1, … without end; labels are not needed.

    Args:
        augmentation: of the weak view, whose pixels all strong views show.
        views: strong views of each image.
        batch_size: images of a step, over all processes.
        seed: non-negative integers that name the stream; equal seeds give equal streams.
        truth_every: every so many steps, labels that happen to be known are read too, to measure with; None: never.

    Raises the error of an image at the step that holds it. Close the generator to stop its threads.
    """
    place = place or StreamPlace()
    own, crop = batch_size // place.processes, augmentation.crop
    known = truth_every is not None and any(sample.label is not None for sample in samples)

    def begin(step: int) -> tuple[_Memory, list[Callable[[], str]]]:
        measured = known and truth_every is not None and step % truth_every == 0
        first = step * batch_size + place.rank * own
        memory = _Memory.empty(own, views, crop, pin=place.pin, truth=measured, first=first)

        def fill(row: int) -> str:
            position = first + row
            sample = samples[sample_index(position, len(samples), seed)]
            truth = read_truth(sample) if measured and sample.label is not None else None
            _fill(memory, row, load(sample), truth=truth, how=(augmentation, strong), seed=(*seed, position))
            return sample.id

        return memory, [partial(fill, row) for row in range(own)]

    with closing(ahead_of_steps(begin, start, workers=place.workers, own=own)) as filled:
        for memory, ids in filled:
            yield memory.views(ids)


@dataclass(frozen=True)
class _Memory:
    """Where the views of a step are written, channels last; see `Views`."""

    weak: Tensor
    strong: Tensor
    inside: Tensor
    boxes: Tensor
    positions: Tensor
    truth: Tensor | None

    @classmethod
    def empty(
        cls, own: int, views: int, crop: tuple[int, int], *, first: int, pin: bool, truth: bool
    ) -> _Memory:
        """Memory for the images from position `first` on."""

        def pixels(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=pin)

        return cls(
            weak=pixels(own, *crop, 3),
            strong=pixels(views, own, *crop, 3),
            inside=torch.empty((own, *crop), dtype=torch.bool, pin_memory=pin),
            boxes=torch.zeros((views, own, 4), dtype=torch.int32, pin_memory=pin),
            positions=torch.arange(first, first + own),
            truth=torch.full((own, *crop), IGNORE, dtype=torch.uint8) if truth else None,
        )

    def views(self, ids: tuple[str, ...]) -> Views:
        """What was written."""
        return Views(
            weak=self.weak.permute(0, 3, 1, 2),
            strong=self.strong.permute(0, 1, 4, 2, 3),
            inside=self.inside,
            boxes=self.boxes,
            positions=self.positions,
            ids=ids,
            truth=self.truth,
        )


def _fill(
    memory: _Memory,
    row: int,
    image: NDArray[np.uint8],
    *,
    truth: NDArray[np.uint8] | None,
    how: tuple[Augmentation, StrongViews],
    seed: tuple[int, ...],
) -> None:
    """Draw all views of one image.

    Args:
        seed: of the stream, and the position: placement and each strong view have generators of their own, so that the
            number of strong views changes none of the others.
    """
    augmentation, strong = how
    *stream, position = seed
    size = image.shape[0], image.shape[1]
    drawn = draw(size, augmentation, generator=np.random.default_rng([*stream, 1, position]))
    weak = move_image(image, drawn, augmentation)
    inside = inside_of(size, drawn, augmentation)
    memory.weak.numpy()[row], memory.inside.numpy()[row] = weak, inside
    for view in range(len(memory.strong)):
        generator = np.random.default_rng([*stream, 2, position, view])
        changed = change_colors(weak, strong.colors, drawn, inside=inside, generator=generator)
        memory.strong.numpy()[view, row] = changed
        memory.boxes.numpy()[view, row] = draw_box(augmentation.crop, strong.boxes, generator=generator)
    if truth is not None and memory.truth is not None:
        memory.truth.numpy()[row] = move_label(truth, drawn, augmentation)
