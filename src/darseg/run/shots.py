"""A seeded choice of the images of folders and patterns, and of the frames of videos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from darseg.data.images import USUAL, Reading, read_image
from darseg.data.video import read_frames, video_facts
from darseg.errors import DataError
from darseg.run.media import Medium


@dataclass(frozen=True)
class Shot:
    """An image, or a frame of a video with its number, from 1 on.

    Attributes:
        frame: uint8 [H, W, 3], once the video is read.
    """

    medium: Medium
    number: int = 0
    frame: np.ndarray | None = None

    @property
    def id(self) -> str:
        """What the choice of images and pixels depends on: the path below the folder, and the frame."""
        name = self.medium.name + self.medium.path.suffix
        return f"{name}/{self.number:06d}" if self.number else name

    def __str__(self) -> str:
        return f"{self.medium.path}, frame {self.number}" if self.number else str(self.medium.path)


@dataclass(frozen=True)
class Shots:
    """Images and frames that were chosen.

    Attributes:
        chosen: in the order of the media.
        available: of how many.
        failed: a line for each video that cannot be opened.
    """

    chosen: Sequence[Shot]
    available: int
    failed: Sequence[str]


def choose_shots(media: Sequence[Medium], limit: int, seed: int) -> Shots:
    """Choose at most `limit` images and frames: those whose ids have the smallest hashes.

    The choice depends on the seed and the ids alone, not on order. All frames that the header of a video states have the
    same chance as an image.
    """
    shots: list[Shot] = []
    failed: list[str] = []
    for medium in media:
        try:
            numbers = range(1, video_facts(medium.path).frames + 1) if medium.is_video else (0,)
        except DataError as error:
            failed.append(str(error))
            continue
        shots += [Shot(medium, number) for number in numbers]
    ranked = sorted(range(len(shots)), key=lambda index: _rank(shots[index].id, seed))
    return Shots([shots[index] for index in sorted(ranked[:limit])], len(shots), failed)


def _rank(shot_id: str, seed: int) -> bytes:
    return hashlib.sha256(f"darseg.run.shots {seed} {shot_id}".encode()).digest()


def with_frames(shots: Sequence[Shot], failed: list[str]) -> Iterator[Shot]:
    """The shots, those of videos with their frames; a video is decoded once, up to its last chosen frame.

    Args:
        failed: gets a line for each video that ends early.
    """
    numbers: dict[Medium, set[int]] = {}
    for shot in shots:
        if not shot.number:
            yield shot
            continue
        numbers.setdefault(shot.medium, set()).add(shot.number)
    for medium, wanted in numbers.items():
        try:
            for number, frame in enumerate(read_frames(medium.path), 1):
                if number in wanted:
                    yield Shot(medium, number, frame)
                if number == max(wanted):
                    break
        except DataError as error:
            failed.append(str(error))


def read_shot(shot: Shot, reading: Reading = USUAL) -> np.ndarray | str:
    """The image, uint8 [H, W, 3], or why it cannot be read."""
    if shot.frame is not None:
        return shot.frame
    try:
        return read_image(shot.medium.path, reading)
    except DataError as error:
        return str(error)
