"""Video files → frames, and frames → a video file."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Our errors report broken files with path and remedy, so FFmpeg need not report them on standard error. OpenCV reads
# this when it first uses FFmpeg.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np

from darseg.data.files import aside_of, check_regular, storage_error
from darseg.errors import DataError, StorageError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

USUAL_RATE = 25.0
"""Frames per second of files that do not state a rate."""

CODEC = "mp4v"
"""MPEG-4 part 2: OpenCV from the package index can write it into .mp4 files on every system."""


@dataclass(frozen=True)
class VideoFacts:
    """What the header of a video file states.

    Attributes:
        frames: number of frames, which some kinds of files only estimate.
        rate: frames per second.
    """

    frames: int
    rate: float


def video_facts(path: Path) -> VideoFacts:
    """Facts from the header of a video file. Raises DataError if it cannot be opened as a video."""
    capture = _open(path)
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        capture.release()
    return VideoFacts(
        int(frames) if frames > 0 else 0, rate if math.isfinite(rate) and rate > 0 else USUAL_RATE
    )


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video in their order, uint8 [H, W, 3], RGB.

    They are turned as the file's orientation mark says, as in players: a video has no labels that must not be turned.

    Raises DataError if the file cannot be opened; and, after the last good frame, if more frames are missing than 1 and
    1 % of the number in the header, which some kinds of files only estimate.
    """
    expected = video_facts(path).frames
    capture = _open(path)
    count = 0
    try:
        while True:
            read, frame = capture.read()
            if not read:
                break
            count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if count == 0 or expected - count > 1 + expected // 100:
        raise DataError(
            f"{path}: this video is cut off or damaged. Only {count} of its {expected} frames can be read. Copy or "
            "download it again."
        )


def _open(path: Path) -> cv2.VideoCapture:
    try:
        check_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: this video file does not exist. Check the path.") from None
    except OSError as error:
        raise DataError(
            f"{path}: this video cannot be read ({error.strerror}). Give a video file."
        ) from error
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise DataError(
            f"{path}: this file cannot be opened as a video ({', '.join(VIDEO_SUFFIXES)}). It is cut off, damaged, or "
            "of a type that OpenCV does not read. Copy it again, or convert it."
        )
    return capture


class VideoWriter:
    """Writes frames into an .mp4 file (MPEG-4), which appears, whole, when the writer is closed.

    The sides of a video must be even, so the last row or column of an odd side is left out.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._parts = contextlib.ExitStack()  # closes the file aside, and so lets it appear or removes it
        self._aside = path
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3], RGB, as large as the first one. Raises DataError, StorageError."""
        height, width = frame.shape[:2]
        if self._writer is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # The suffix tells FFmpeg the format.
                self._aside = self._parts.enter_context(aside_of(self.path, self.path.suffix))
            except OSError as error:
                raise storage_error(error, self.path) from error
            code = cv2.VideoWriter.fourcc(*CODEC)
            self._size = (width, height)
            self._writer = cv2.VideoWriter(
                str(self._aside), cv2.CAP_FFMPEG, code, self.rate, (width & ~1, height & ~1)
            )
            if not self._writer.isOpened():
                self.abandon()
                raise StorageError(
                    f"Cannot write {self.path}: OpenCV cannot start a video of {width}x{height} pixels there. Choose "
                    "another folder, or leave out the kind overlay."
                )
        if (width, height) != self._size:
            raise DataError(
                f"{self.path}: a frame is {width}x{height} pixels, but the first was {self._size[0]}x{self._size[1]}. "
                "All frames of a video must have the same size."
            )
        self._writer.write(cv2.cvtColor(frame[: height & ~1, : width & ~1], cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Let the file appear, if any frame was added. Raises StorageError if it could not be written whole."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            # OpenCV reports no error if the disk is full; only the file itself shows it.
            if video_facts(self._aside).frames != self._frames:
                raise DataError("frames are missing")
            self._parts.close()
        except OSError as error:
            raise storage_error(error, self.path) from error
        except DataError as error:
            self.abandon()
            raise StorageError(
                f"{self.path} could not be written whole. The disk may be full. Free some space and predict this video "
                "again."
            ) from error

    def abandon(self) -> None:
        """Stop writing and leave no file behind."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        error = DataError("abandoned")
        self._parts.__exit__(type(error), error, None)  # so the file aside is removed
