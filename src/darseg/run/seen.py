"""What a network sees of images as pictures: views, mixed images, labels, padding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darseg.choices import Mixing
from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.data.views import Views
from darseg.methods.consistency import mixed_with
from darseg.methods.mixing import box_mask, partners_of
from darseg.training.method import Method, Streamed

TRUTH = "truth, not used"


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture.

    Attributes:
        pixels: uint8 [H, W, 3], an image in RGB; or uint8 [H, W], a label map, 255: nothing to learn.
        inside: bool [H, W], False on padding.
        box: top, left, bottom and right of the region that comes from the partner; None: none.
    """

    caption: str
    pixels: NDArray[np.uint8]
    inside: NDArray[np.bool_]
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class SeenImage:
    """What the network sees of an image.

    Attributes:
        own: the image as it was cut out, and its label.
        views: for each strong view: the view, what it becomes by mixing, and its label.
    """

    id: str
    own: tuple[Tile, ...]
    views: tuple[tuple[Tile, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Labels:
    """What a method makes of unlabeled images.

    Attributes:
        weak: a strong view with its labels, not mixed: these are the labels of the weak views.
        others: what the loss gets besides the strong views: the weak view with features dropped, for example.
        mixed: what the loss gets for each strong view, a batch.
        insides: bool [B, H, W] for each of these, False on padding.
    """

    weak: Batch
    others: Sequence[Batch]
    mixed: Sequence[Batch]
    insides: Sequence[Tensor]


def labels_of(methods: tuple[Method, Method], streamed: Sequence[Streamed], step: int) -> Labels:
    """What an online method makes of a step's unlabeled images.

    Args:
        methods: that of the round, and the same without mixing. Of the batches that their label phase makes, the first
            is the labeled one, and the last are those of the strong views.
        streamed: a labeled batch, and views.
    """
    method, unmixed = methods
    labeled, views = streamed
    assert isinstance(views, Views)
    # Mixed like the strong views, the mask of padding says where a mixed image is padded.
    masks = views.inside[None, :, None].expand_as(views.strong).to(torch.uint8)
    with torch.no_grad():
        _, *learned = _label(method, streamed, step)
        insides = _label(method, [labeled, replace(views, strong=masks)], step)
        *_, weak = _label(unmixed, streamed, step)
    count = len(views.strong)
    return Labels(
        weak,
        others=learned[:-count],
        mixed=learned[-count:],
        insides=[batch.images[:, 0] > 0 for batch in insides[-count:]],
    )


def labeled_images(
    batch: Batch, inside: NDArray[np.bool_], *, known: Collection[str], caption: str
) -> Iterator[SeenImage]:
    """Images and labels as a stream of labeled or pseudo-labeled images gave them.

    Args:
        inside: [B, H, W].
        known: ids of the images whose labels are shown.
        caption: of the labels.
    """
    for row, name in enumerate(batch.ids):
        tiles = [Tile("image", _image(batch.images[row]), inside[row])]
        if name in known and caption == TRUTH:
            tiles += _truth_tile(caption, batch.labels, row, inside=inside[row])
        elif name in known:
            tiles.append(label_tile(caption, batch.labels[row], inside=inside[row]))
        yield SeenImage(name, tuple(tiles))


def _label(method: Method, streamed: Sequence[Streamed], step: int) -> Sequence[Batch]:
    return method.label(method.state, method.network, streamed, step).batches


def unlabeled_images(views: Views, mixing: Mixing, labels: Labels | None) -> Iterator[SeenImage]:
    """Weak and strong views of each image, with labels and mixing as far as they are known.

    Args:
        mixing: of the round.
        labels: None: there is no network that labels.
    """
    inside = views.inside.numpy()
    masks = [_box_mask(views, view, mixing) for view in range(len(views.strong))]
    for row, name in enumerate(views.ids):
        dropped = "".join(_dropped(batch, row) for batch in labels.others) if labels is not None else ""
        own = [Tile(f"weak view{dropped}", _image(views.weak[row]), inside[row])]
        if labels is not None:
            own.append(_learned_tile(labels.weak, row, inside=inside[row]))
        own += _truth_tile(TRUTH, views.truth, row, inside=inside[row])
        seen = [
            _view_tiles(views, view, row, mask=mask, labels=labels, mixes=mixing != "none")
            for view, mask in enumerate(masks)
        ]
        yield SeenImage(name, tuple(own), tuple(seen))


def _view_tiles(
    views: Views,
    view: int,
    row: int,
    *,
    mask: tuple[Tensor, Tensor] | None,
    labels: Labels | None,
    mixes: bool,
) -> tuple[Tile, ...]:
    """A strong view of an image, what it becomes by mixing, and its label, as far as they are known.

    Args:
        mask: partners and mask, if they do not depend on labels.
        mixes: whether images are mixed.
    """
    number = f" {view + 1}" if len(views.strong) > 1 else ""
    box = None if mask is None else _box_of(views, view, row)
    mixed_name = f"mixed{number}" if mask is None or box else f"mixed{number}, no box"
    strong_name = f"strong view{number}"
    if labels is not None and not mixes:
        strong_name += _dropped(labels.mixed[view], row)
    parts = [Tile(strong_name, _image(views.strong[view, row]), views.inside[row].numpy(), box=box)]
    if labels is not None:
        inside = labels.insides[view][row].numpy()
        mixed_name += _dropped(labels.mixed[view], row)
        if mixes:
            parts.append(Tile(mixed_name, _image(labels.mixed[view].images[row]), inside, box=box))
        parts.append(_learned_tile(labels.mixed[view], row, inside=inside))
    elif mask is not None:
        inside = mixed_with(views.inside, mask)[row].numpy()
        mixed = mixed_with(views.strong[view], mask)
        parts.append(Tile(mixed_name, _image(mixed[row]), inside, box=box))
        truth = None if views.truth is None else mixed_with(views.truth, mask)
        parts += _truth_tile(f"mixed {TRUTH}", truth, row, inside=inside)
    return tuple(parts)


def _dropped(batch: Batch, row: int) -> str:
    """The share of an image's channels that are dropped in feature maps, as the end of a caption."""
    if not batch.feature_masks:
        return ""
    channels = torch.cat([mask[row].flatten() for mask in batch.feature_masks])
    return f", {float((channels == 0).float().mean()):.0%} of channels dropped"


def _truth_tile(caption: str, truth: Tensor | None, row: int, *, inside: NDArray[np.bool_]) -> list[Tile]:
    """The truth of an image; empty if none of it is known."""
    if truth is None or not bool((truth[row] != IGNORE).any()):
        return []
    return [Tile(caption, truth[row].numpy(), inside)]


def _box_mask(views: Views, view: int, mixing: Mixing) -> tuple[Tensor, Tensor] | None:
    """Partners and mask of CutMix, which no label decides; None for other mixing."""
    if mixing != "cutmix":
        return None
    height, width = views.inside.shape[1:]
    partners = partners_of(len(views.ids), views.inside.device)
    return partners, box_mask(views.boxes[view], (height, width))


def _box_of(views: Views, view: int, row: int) -> tuple[int, int, int, int] | None:
    """The box of a strong view; None if it is empty."""
    top, left, bottom, right = views.boxes[view, row].tolist()
    return (top, left, bottom, right) if bottom > top and right > left else None


def _learned_tile(batch: Batch, row: int, *, inside: NDArray[np.bool_]) -> Tile:
    """What is learned from an image: classes; with a weight, the most probable ones of all pixels."""
    if batch.weights is None:
        return label_tile("label", batch.labels[row], inside=inside)
    weight = float(batch.weights[row].max())
    return Tile(f"most probable class, weight {weight:.2f}", batch.labels[row].numpy(), inside)


def label_tile(caption: str, label: Tensor, *, inside: NDArray[np.bool_]) -> Tile:
    """A label map, with the share of its pixels that have a class; padding does not count."""
    classes = label.numpy()
    share = float((classes[inside] != IGNORE).mean()) if inside.any() else 0.0
    return Tile(f"{caption}: {share:.0%} of the pixels", classes, inside)


def _image(pixels: Tensor) -> NDArray[np.uint8]:
    """uint8 [3, H, W] → [H, W, 3]."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
