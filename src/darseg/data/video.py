"""Video files → frames, and frames → a video file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What FFmpeg says of broken files on standard error, our errors say with path and remedy. Read when OpenCV first uses it.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np

from darseg.data.files import ASIDE, storage_error
from darseg.errors import DataError, StorageError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

USUAL_RATE = 25.0
"""Frames a second, for files that do not say."""

CODEC = "mp4v"
"""MPEG-4 part 2: what the OpenCV of the package index can write in .mp4 everywhere."""


@dataclass(frozen=True)
class VideoFacts:
    """What the head of a video file says. `frames`: how many; some kinds only estimate it. `rate`: frames a second."""

    frames: int
    rate: float


def video_facts(path: Path) -> VideoFacts:
    """Raises DataError where the file cannot be opened as a video."""
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

    Turned as the file's orientation mark says, as players do: a video has no labels that would have to turn with it.

    Raises DataError where it cannot be opened, and after the last good frame where it ends early: more than one frame
    and 1 % short of the number in its head, which some kinds of files only estimate.
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
            f"{path}: the video is cut off or damaged: {count} of {expected} frames can be read. Copy or download it "
            "again."
        )


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise DataError(
            f"{path}: cannot be opened as a video ({', '.join(VIDEO_SUFFIXES)}): it is cut off, damaged, or of a kind "
            "that OpenCV does not read. Copy it again, or convert it."
        )
    return capture


class VideoWriter:
    """Writes frames into an .mp4 file (MPEG-4) that appears, whole, when it is closed.

    Its sides must be even: of an odd one the last row or column is left out.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate = path, rate
        self._aside = path.with_name(path.stem + ASIDE + path.suffix)  # the suffix tells FFmpeg the format
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0

    def add(self, frame: np.ndarray) -> None:
        """Append uint8 [H, W, 3], RGB, as large as the first. Raises DataError, StorageError."""
        height, width = frame.shape[:2]
        if self._writer is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
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
                    f"Cannot write {self.path}: OpenCV cannot begin a video of {width}x{height} pixels there. Leave the "
                    "kind overlay out, or choose another folder."
                )
        if (width, height) != self._size:
            raise DataError(
                f"{self.path}: the frames change their size from {self._size} to {(width, height)}."
            )
        self._writer.write(cv2.cvtColor(frame[: height & ~1, : width & ~1], cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Let the file appear; nothing where no frame was added. Raises StorageError where it did not get whole."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            # Nothing tells of a disk that was full while writing, but the file itself.
            if video_facts(self._aside).frames != self._frames:
                raise DataError("frames are missing")
            with open(self._aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._aside, self.path)
        except OSError as error:
            raise storage_error(error, self.path) from error
        except DataError as error:
            raise StorageError(
                f"{self.path} could not be written whole. Is the disk full? Free some space and predict this video again."
            ) from error
        finally:
            self._aside.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._aside.unlink(missing_ok=True)
