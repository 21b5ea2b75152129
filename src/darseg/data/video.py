"""Video files → frames, and frames → a video file."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from darseg.data.decoders import together_quietly
from darseg.data.files import aside_of, check_regular, open_file, storage_error
from darseg.errors import DataError, StorageError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")

USUAL_RATE = 25.0
"""Frames per second of files that do not state a rate."""

LARGEST_TIMEBASE = 65535
"""Largest denominator of a frame's duration in MPEG-4 part 2 (ISO 14496-2, vop_time_increment_resolution)."""

LOWEST_RATE = 0.01

DECIMALS = 3
"""Digits after the point that OpenCV keeps of a rate."""

HIGHEST_RATE = 240.0
"""Frames per second above which a header is not believed: files of variable rate state the unit of their times."""

CODEC = "mp4v"
"""MPEG-4 part 2: OpenCV from the package index can write it into .mp4 files on every system."""

FORMATS = "mov,matroska,avi,flv,asf,mpeg,mpegts"
"""FFmpeg's formats of files that hold their frames themselves; a playlist would open other files and addresses."""

IRREGULAR, RARE = 0.5, 0.01
"""Gaps between frames that differ so much from the usual one, in more than this share of the frames, are irregular."""

OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
"""OpenCV passes what this variable holds on to FFmpeg; there is no argument for it."""


@dataclass(frozen=True)
class VideoFacts:
    """What the header of a video file states.

    Attributes:
        frames: number of frames, which some kinds of files only estimate.
        rate: frames per second.
    """

    frames: int
    rate: float


def writable_rate(rate: float) -> float:
    """The nearest frames per second that an .mp4 file of this codec can state."""
    for decimals in range(DECIMALS, -1, -1):
        nearest = round(rate, decimals)
        if nearest * 10**decimals <= LARGEST_TIMEBASE:
            return max(nearest, LOWEST_RATE)
    return float(LARGEST_TIMEBASE)


def video_facts(path: Path) -> VideoFacts:
    """Facts from the header of a video file. Raises DataError if it cannot be opened as a video."""
    capture = _open(path)
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if rate > HIGHEST_RATE:
            rate = _measured_rate(capture) or rate
    finally:
        capture.release()
    return VideoFacts(
        int(frames) if frames > 0 else 0, rate if math.isfinite(rate) and rate > 0 else USUAL_RATE
    )


def is_whole_video(path: Path) -> bool:
    """Whether the boxes of an .mp4 file fill it (ISO 14496-12, 4.2): not if it is empty or cut off."""
    try:
        with open_file(path) as file:
            end, at = file.seek(0, os.SEEK_END), 0
            while at < end:
                file.seek(at)
                head = file.read(16)
                size = int.from_bytes(head[:4], "big")
                size = int.from_bytes(head[8:], "big") if size == 1 else size
                if size < 8:  # of the head itself
                    return False
                at += size
            return 0 < at == end
    except OSError:
        return False


def _measured_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second by the times of all frames; 0 if they have none."""
    count, end = 0, 0.0
    while True:
        with together_quietly():
            if not capture.grab():
                break
        count, end = count + 1, capture.get(cv2.CAP_PROP_POS_MSEC)
    return 1000 * (count - 1) / end if end > 0 else 0.0


def read_frames(path: Path, notes: list[str] | None = None) -> Iterator[np.ndarray]:
    """The frames of a video in their order, uint8 [H, W, 3], RGB.

    They are turned as the file's orientation mark says, as in players.

    Args:
        notes: gets a line if the decoder reports damage in frames that it returns all the same, and one if the frames do
            not follow each other at one rate.

    Raises DataError if the file cannot be opened; and, after the last good frame, if more frames are missing than 1 and
    1 % of the number in the header, which some kinds of files only estimate.
    """
    expected = video_facts(path).frames
    capture = _open(path)
    count, damaged, first = 0, 0, ""
    times: list[float] = []
    try:
        while True:
            with together_quietly() as lines:
                read, frame = capture.read()
            if not read:
                break
            count += 1
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
            if reports := lines():
                damaged += 1
                first = first or f"frame {count}: {reports[0].partition('] ')[2]}"
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    except cv2.error as error:
        raise DataError(
            f"{path}: frame {count} of this video cannot be decoded ({error.err}). Convert it."
        ) from error
    finally:
        capture.release()
    if damaged and notes is not None:
        notes.append(
            f"{path}: {damaged:,} of {count:,} frames are damaged according to the decoder and may show garbage "
            f"({first}). Copy the video again."
        )
    if notes is not None and (irregular := _irregular(times)):
        notes.append(
            f"{path}: this video has no constant rate; its frames are {irregular}. They are numbered in their order, and "
            "an overlay shows them at one rate, so it drifts from the original."
        )
    if count == 0 or expected - count > 1 + expected // 100:
        raise DataError(
            f"{path}: this video is cut off or damaged. Only {count} of its {expected} frames can be read. Copy or "
            "download it again."
        )


def _irregular(times: list[float]) -> str:
    """How far apart frames are if that varies, in words; empty if it does not.

    Args:
        times: of all frames, in milliseconds.
    """
    gaps = np.diff(times)
    usual = float(np.median(gaps)) if len(gaps) > 1 else 0.0
    if usual <= 0 or (np.abs(gaps - usual) > IRREGULAR * usual).mean() <= RARE:
        return ""
    return f"{gaps.min():.0f} to {gaps.max():.0f} ms apart"


def _open(path: Path) -> cv2.VideoCapture:
    try:
        check_regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: this video file does not exist. Check the path.") from None
    except OSError as error:
        raise DataError(
            f"{path}: this video cannot be read ({error.strerror}). Give a video file."
        ) from error
    # Without a colon in front of the first slash, which FFmpeg would take for a protocol. With one thread, what FFmpeg
    # prints belongs to the frame that is read.
    with together_quietly(), _this_file_alone():
        capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise DataError(
            f"{path}: this file cannot be opened as a video ({', '.join(VIDEO_SUFFIXES)}). It is cut off, damaged, or "
            "of a type that OpenCV does not read. Copy it again, or convert it."
        )
    return capture


_opening = threading.Lock()


@contextlib.contextmanager
def _this_file_alone() -> Generator[None, None, None]:
    """Inside the block, FFmpeg opens no playlists, and no other addresses than files."""
    with _opening:
        before = os.environ.get(OPTIONS)
        limits = f"format_whitelist;{FORMATS}|protocol_whitelist;file"
        os.environ[OPTIONS] = f"{before}|{limits}" if before else limits
        try:
            yield
        finally:
            os.environ.pop(OPTIONS)
            if before is not None:
                os.environ[OPTIONS] = before


class VideoWriter:
    """Writes frames into an .mp4 file (MPEG-4), which appears, whole, when the writer is closed.

    The sides of a video must be even, so the last row or column of an odd side is left out. The rate is the nearest one
    that the file can state (`writable_rate`).
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
            with together_quietly():
                self._writer = cv2.VideoWriter(
                    os.path.abspath(self._aside),
                    cv2.CAP_FFMPEG,
                    code,
                    writable_rate(self.rate),
                    (width & ~1, height & ~1),
                )
            if not self._writer.isOpened():
                self.abandon()
                raise DataError(
                    f"{self.path}: OpenCV cannot write a video of {width}x{height} pixels. Leave out the kind overlay, "
                    "or scale the video down."
                )
        if (width, height) != self._size:
            raise DataError(
                f"{self.path}: a frame is {width}x{height} pixels, but the first was {self._size[0]}x{self._size[1]}. "
                "All frames of a video must have the same size."
            )
        with together_quietly():
            self._writer.write(cv2.cvtColor(frame[: height & ~1, : width & ~1], cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Let the file appear, if any frame was added. Raises StorageError if it could not be written whole."""
        if self._writer is None:
            return
        with together_quietly():
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
