"""Predict images and videos of any folder with a trained network, and write what was asked for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
from rich.console import Console

from darseg.choices import Existing, PredictionKind
from darseg.config.recipe import Recipe
from darseg.data.files import is_taken, remove_leftovers
from darseg.data.images import read_picture
from darseg.data.manifest import Sample
from darseg.data.maps import write_map
from darseg.data.pictures import PictureTally
from darseg.data.pipeline import ahead_of, overlapped
from darseg.data.prediction import FINE, Prediction
from darseg.data.video import VideoFacts, VideoWriter, read_frames, video_facts, writable_rate
from darseg.data.walk import PREDICTED
from darseg.errors import DataError, MemoryLimit, RunError
from darseg.model.predict import predict
from darseg.model.windows import Memory
from darseg.run.build import check_overrides, evaluation_protocol
from darseg.run.directory import RunDirectory, digest_path, write_json
from darseg.run.evaluate import Trained, load_trained
from darseg.run.journal import Journal
from darseg.run.media import KINDS, Medium, Outputs, find_media, still_to_do, unread_lines
from darseg.run.outputs import held_folder, read_settings
from darseg.run.remedies import memory_reason

OVERLAY_OPACITY = 0.55
"""Share of the class colors in an overlay; the rest is the image."""

EXISTING: tuple[Existing, ...] = get_args(Existing)
RECORD = PREDICTED
"""In the output folder: the networks and protocols that its files were made by."""
SMALLER = "Make the image smaller or cut it into pieces."
"""What to do about an image that needs more memory than there is."""
CERTAIN = 65535
"""Value of probability 1 in confidence maps."""


@dataclass(frozen=True)
class Predicted:
    """What `predict_folder` did.

    Attributes:
        images, videos, frames: how many were predicted; frames are those of the videos.
        kept: images and videos that were left alone because all their files existed.
        failed: a line for each image or video that could not be read, or not to its end.
        notes: lines about how files were read or written, if that may surprise.
    """

    images: int
    videos: int
    frames: int
    kept: int
    failed: tuple[str, ...]
    notes: tuple[str, ...] = ()


def predict_folder(
    source: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    kinds: Sequence[PredictionKind] = KINDS,
    round_index: int | None = None,
    existing: Existing = "fault",
    console: Console | None = None,
    *,
    recipe: Recipe | Path | str | None = None,
    plain: bool = False,
    overrides: Sequence[str] = (),
) -> Predicted:
    """Predict images and videos, by the recipe's evaluation protocol, into `out/KIND/NAME.png`.

    Frames of a video go to `out/KIND/NAME/000001.png` and so on, its overlay to `out/overlay/NAME.mp4`.

    Args:
        source: run folder; or .safetensors checkpoint, which predicts whole images in one window, and their mirror.
        images: an image, a video, a folder, a pattern such as "photos/**/*.jpg", or several of these. NAME is the path
            below the folder, or below the part of the pattern without wildcards; of a single file its name.
        kinds: "index" (class values), "color" (class colors), "overlay" (colors over the image), "confidence" (the
            class's probability, 16 bits: 65535 is 1).
        round_index: of a run folder; None: its result.
        existing: what to do if files exist already: "fault" refuses before anything is written; "keep" keeps those that
            are whole and predicts the others; "replace" replaces them.
        recipe: for a checkpoint: the recipe whose evaluation protocol it predicts with.
        plain: predict with the network as it was trained, also if the result's decisions are aligned.
        overrides: "data.root=PATH", if the recipe's data were moved.

    Files that cannot be read are skipped and named in the result. Raises RunError, WeightsError, RecipeError,
    StorageError, NumericsError, and DataError if nothing is found or two results would get the same name.
    """
    outputs = _check_outputs(Path(out), kinds, existing)
    check_overrides(source, overrides)
    trained = load_trained(source, round_index, overrides, recipe=recipe, plain=plain)
    patterns = [images] if isinstance(images, (str, Path)) else images
    media = find_media(patterns, outputs.folder)
    facts, failed = _read_video_facts(media)
    readable = [medium for medium in media if not medium.is_video or medium in facts]
    work = _Work(trained, outputs, facts, failed=failed, drop_later=existing == "replace")
    journal = Journal(None, None, console or Console())
    with held_folder(outputs.folder):
        todo = still_to_do(readable, facts, outputs, existing=existing)
        kept = len(readable) - len(todo)
        _say_damaged(todo if existing == "keep" else (), facts, outputs, journal=journal)
        made_by = _record(outputs, trained, journal, kept=kept, existing=existing, plain=plain)
        total = sum(max(1, facts[medium].frames) if medium.is_video else 1 for medium in todo)
        with journal.progress("predict", total) as advance:
            work.predict_all(todo, advance)
        if existing == "replace" and not outputs.others(todo) and not work.failed:
            write_json(outputs.folder / RECORD, {"made_by": [made_by]})
    return Predicted(
        images=work.images,
        videos=sum(medium.is_video for medium in todo),
        frames=work.frames,
        kept=kept,
        failed=tuple(sorted(work.failed)),
        notes=(*unread_lines(patterns), *work.notes()),
    )


def _check_outputs(out: Path, kinds: Sequence[str], existing: str) -> Outputs:
    """Raise RunError for unknown choices, and for places where predictions do not belong."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise RunError(f"There is no kind of picture {unknown[0]!r}. Choose from {', '.join(KINDS)}.")
    if existing not in EXISTING:
        raise RunError(f"existing is {existing!r}. Choose from {', '.join(EXISTING)}.")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Give a folder for the predictions, after the images.")
    if RunDirectory(out).recipe.exists():
        raise RunError(f"{out} is a run folder. Give another folder for the predictions, after the images.")
    for kind in kinds:
        remove_leftovers(out / kind)
    return Outputs(out, kinds)


def _say_damaged(
    todo: Sequence[Medium], facts: Mapping[Medium, VideoFacts], outputs: Outputs, *, journal: Journal
) -> None:
    """Report results that are there, but have to be made again."""
    damaged = [path for medium in todo for path in outputs.damaged(medium, facts.get(medium))]
    if damaged:
        journal.say(f"{len(damaged)} file(s) are empty or cut off and are made again, such as {damaged[0]}")


def _record(
    outputs: Outputs, trained: Trained, journal: Journal, *, kept: int, existing: Existing, plain: bool
) -> dict[str, str]:
    """Record by what the files of the folder are made. Raises RunError if those that are kept are not.

    What earlier calls recorded stays until their files are replaced, so that a call that is stopped leaves no files of
    two networks under the name of one.

    Args:
        kept: how many images and videos are left as they are.

    Returns:
        what this call makes files by.
    """
    path = outputs.folder / RECORD
    protocol = evaluation_protocol(trained.recipe).describe() if trained.recipe else "whole images"
    network = digest_path(trained.path) + (", plain" if plain else "")
    network += f", classes in order {list(trained.order)}" if trained.order is not None else ""
    present = {"network": network, "protocol": protocol}
    earlier = read_settings(path, damaged_is_unknown=existing == "replace") if outputs.others(()) else []
    differing = [key for key in present if any(entry.get(key) != present[key] for entry in earlier)]
    if kept and differing:
        raise RunError(
            f"{outputs.folder} holds results of another {' and '.join(differing)} (see {path.name}), so they cannot be "
            "kept among those of this one. Choose another folder, or use --existing replace."
        )
    if kept and not earlier:
        journal.warn(
            f"{path} is not there, so nobody knows by which network the {kept} kept result(s) were made."
        )
    if present not in earlier:
        write_json(path, {"made_by": [*earlier, present]})
    return present


def _read_video_facts(media: Sequence[Medium]) -> tuple[dict[Medium, VideoFacts], list[str]]:
    """The facts of all videos that can be opened, and a line for each that cannot."""
    facts: dict[Medium, VideoFacts] = {}
    failed = []
    for medium in media:
        if medium.is_video:
            try:
                facts[medium] = video_facts(medium.path)
            except DataError as error:
                failed.append(str(error))
    return facts, failed


@dataclass(frozen=True)
class _Shot:
    """An image that is still to be read; or a frame of a video with its number, from 1 on."""

    medium: Medium
    frame: np.ndarray | None = None
    number: int = 0
    movie: _Movie | None = None

    def __str__(self) -> str:
        return f"{self.medium.path}, frame {self.number}" if self.number else str(self.medium.path)


class _Work:
    """Predicts one image or frame after the other; reads ahead and writes behind in threads.

    Attributes:
        images, frames: how many were predicted.
        failed: a line for each file that could not be read, or not to its end.
    """

    def __init__(
        self,
        trained: Trained,
        outputs: Outputs,
        facts: Mapping[Medium, VideoFacts],
        *,
        failed: list[str],
        drop_later: bool,
    ) -> None:
        self.images = self.frames = 0
        self._drop_later = drop_later  # frames of a longer video that had the same name
        self.failed = failed
        self._trained, self._outputs, self._facts = trained, outputs, facts
        self._palette, self._memory = trained.classes().palette(), Memory()
        self._movie: _Movie | None = None
        self._notes: list[str] = []
        self._tally, self._lock = PictureTally(), threading.Lock()

    def notes(self) -> list[str]:
        """Lines about how pictures were read."""
        return [*self._tally.notes(), *self._tally.warnings(), *self._notes]

    def predict_all(self, media: Sequence[Medium], advance: Callable[[], object]) -> None:
        """Predict and write all; after any error no half-written overlay stays."""
        try:
            overlapped(
                self._shots(media), read=self._read, work=self._predict, write=self._write, advance=advance
            )
            self._close_movie()
        except BaseException:
            if self._movie is not None:
                self._movie.abandon()
            raise

    def _close_movie(self) -> None:
        if self._movie is not None:
            if (failure := self._movie.close()) is not None:
                self.failed.append(failure)
            self._movie = None

    def _shots(self, media: Sequence[Medium]) -> Iterator[_Shot]:
        for medium in media:
            if not medium.is_video:
                yield _Shot(medium)
                continue
            movie = None
            if "overlay" in self._outputs.kinds:
                path = self._outputs.path(medium, "overlay")
                rate = self._facts[medium].rate
                movie = _Movie(VideoWriter(path, rate))
                if not math.isclose(rate, writable_rate(rate), abs_tol=0.001):
                    self._notes.append(
                        f"{path}: written with {writable_rate(rate):g} frames per second, the nearest to {rate:g} that "
                        "the file can state."
                    )
            number = 0
            try:
                for number, frame in enumerate(ahead_of(read_frames(medium.path, self._notes)), 1):
                    yield _Shot(medium, frame, number, movie=movie)
            except DataError as error:
                self._keep_earlier(medium, number, movie, fault=str(error))
                continue
            if self._drop_later:
                for path in self._outputs.later_frames(medium, number):
                    path.unlink()

    def _keep_earlier(self, video: Medium, last: int, movie: _Movie | None, *, fault: str) -> None:
        """Let what an earlier call made of a video that is damaged by now stay, and report the damage.

        Args:
            last: number of the last frame that could be read.
        """
        stay = [f"{len(frames)} frame(s)"] if (frames := self._outputs.later_frames(video, last)) else []
        if movie is not None and is_taken(self._outputs.path(video, "overlay")):
            movie.discarded = True
            stay.append("the overlay")
        kept = f" Kept from an earlier call: {' and '.join(stay)}." if stay else ""
        self.failed.append(f"{fault}{kept}")

    def _read(self, shot: _Shot) -> np.ndarray | str:
        """The image, or why it cannot be read."""
        if shot.frame is not None:
            return shot.frame
        try:
            sample = Sample(shot.medium.name, shot.medium.path, reading=self._trained.reading())
            picture = read_picture(sample.image, sample.reading)
            with self._lock:
                self._tally.add("predicted", sample, picture)
            return picture.pixels
        except DataError as error:
            return str(error)
        except MemoryError as error:
            return f"{shot.medium.path}: {memory_reason(error)}. {SMALLER}"

    def _predict(self, shot: _Shot, image: np.ndarray | str) -> tuple[np.ndarray, Prediction] | None:
        if self._movie is not None and shot.movie is not self._movie:
            self._close_movie()
        if isinstance(image, str):
            self.failed.append(image)
            return None
        try:
            prediction = self._predicted(shot, image)
        except Exception as error:
            if (reason := memory_reason(error)) is None:
                raise
            if shot.number:  # all frames are of one size
                raise MemoryLimit(f"{shot}: {reason}. {SMALLER}") from error
            self.failed.append(f"{shot}: {reason}. {SMALLER}")
            self._memory = Memory()  # a part of it may be what the others need
            return None
        if shot.movie is not None:
            self._movie = shot.movie
            self._movie.add(lambda: draw_overlay(image, self._palette[prediction.classes]))
        if shot.number:
            self.frames += 1
        else:
            self.images += 1
        return image, prediction

    def _predicted(self, shot: _Shot, image: np.ndarray) -> Prediction:
        protocol = self._trained.protocol(image)
        return predict(self._trained.network, image, protocol, name=str(shot), memory=self._memory)

    def _write(self, shot: _Shot, result: tuple[np.ndarray, Prediction] | None) -> None:
        if result is None:
            return
        for kind in self._outputs.kinds:
            if shot.movie is None or kind != "overlay":
                path = self._outputs.path(shot.medium, kind, shot.number)
                write_map(path, _draw(kind, *result, palette=self._palette))


class _Movie:
    """Draws and writes the frames of a video one after the other, in a thread of its own.

    If frames do not fit into a video file, the file is left out, and the other kinds of predictions go on.

    Attributes:
        discarded: the file is not to appear, so that the one that is there stays.
    """

    def __init__(self, writer: VideoWriter) -> None:
        self._writer, self.discarded = writer, False
        self._pool = ThreadPoolExecutor(1)
        self._behind: Future[None] | None = None
        self._failure: str | None = None

    def add(self, draw: Callable[[], np.ndarray]) -> None:
        self._wait()
        if self._failure is None:
            self._behind = self._pool.submit(lambda: self._writer.add(draw()))

    def close(self) -> str | None:
        """Let the file appear. Returns why there is none, if frames did not fit into it."""
        self._wait()
        self._pool.shutdown()
        if self.discarded:
            self._writer.abandon()
        elif self._failure is None:
            self._writer.close()
        return self._failure

    def abandon(self) -> None:
        self._pool.shutdown()
        self._writer.abandon()

    def _wait(self) -> None:
        behind, self._behind = self._behind, None
        if behind is not None:
            try:
                behind.result()
            except DataError as error:
                self._failure = str(error)
                self._writer.abandon()


CONFIDENCE_VALUES = np.round(CERTAIN * FINE.confidence(np.arange(FINE.codes))).astype(np.uint16)
"""Values of a confidence map, for each code of a confidence."""


def _draw(kind: str, image: np.ndarray, prediction: Prediction, *, palette: np.ndarray) -> np.ndarray:
    """The picture to write: uint8 or uint16 [H, W]; or uint8 [H, W, 3] in BGR, as OpenCV writes it."""
    if kind == "index":
        return prediction.classes
    if kind == "confidence":
        return CONFIDENCE_VALUES[prediction.codes]
    colored = palette[prediction.classes]
    return cv2.cvtColor(draw_overlay(image, colored) if kind == "overlay" else colored, cv2.COLOR_RGB2BGR)


def draw_overlay(image: np.ndarray, colored: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(colored, OVERLAY_OPACITY, image, 1 - OVERLAY_OPACITY, 0)
