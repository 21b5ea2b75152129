"""The streams of a round's images: `train` learns from them, and `preview` shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from darseg.data.batches import StreamPlace, stream_batches
from darseg.data.classes import ClassSet
from darseg.data.dataset import Load, LoadImage, load_example, load_image
from darseg.data.manifest import Sample
from darseg.data.unlabeled import stream_views
from darseg.methods import self_training
from darseg.run import online
from darseg.run.plan import Round
from darseg.training.method import Feed, Streamed


def open_stream(
    round_: Round,
    feed: Feed,
    *,
    number: int,
    seed: int,
    samples: Sequence[Sample],
    classes: ClassSet,
    start: int = 0,
    place: StreamPlace | None = None,
    load: Load = load_example,
    load_views: LoadImage = load_image,
    truth_every: int | None = None,
) -> Iterator[Streamed]:
    """What a feed of a round's method yields from step `start` on.

    Args:
        number: of the feed among those of the method.
        seed: of the recipe; together with round and number it decides everything that is drawn.
        samples: those of the feed's role.
        load, load_views: read a labeled and an unlabeled image.
        truth_every: every so many steps, known labels of unlabeled images are read, too; None: never.
    """
    names = (seed, round_.index, number)
    if feed.role == "unlabeled":
        assert round_.online is not None
        return stream_views(
            samples,
            replace(round_.augmentation, blur=False, colors=None),  # the weak view
            round_.online.strong,
            views=feed.strong,
            batch_size=feed.size,
            seed=names,
            start=start,
            place=place,
            load=load_views,
            truth_every=truth_every,
        )
    return stream_batches(
        samples,
        classes,
        round_.augmentation,
        batch_size=feed.size,
        seed=names,
        start=start,
        place=place or StreamPlace(),
        load=load,
    )


def feeds_of(round_: Round) -> tuple[Feed, ...]:
    """The feeds that the method of a round has; known without its network."""
    if round_.online is not None:
        return online.feeds_of(round_.online, round_.batch)
    return self_training.feeds(round_.batch, round_.pseudo_batch)
