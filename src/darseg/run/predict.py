"""Predict images and videos of any folder with a trained network: find them, predict them, write what was asked for."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
from rich.console import Console

from darseg.choices import Existing, PredictionKind
from darseg.data.images import IMAGE_SUFFIXES, read_image
from darseg.data.manifest import find_files, sample_id
from darseg.data.maps import write_map
from darseg.data.pipeline import ahead_of, overlapped
from darseg.data.prediction import FINE, Prediction
from darseg.data.video import VIDEO_SUFFIXES, VideoFacts, VideoWriter, read_frames, video_facts
from darseg.errors import DataError, RunError, faults
from darseg.model.predict import Memory, predict
from darseg.run.directory import RunDirectory
from darseg.run.evaluate import load_trained
from darseg.run.journal import Journal

OVERLAY_OPACITY = 0.55  # of the class colors over the image
KINDS = get_args(PredictionKind)
EXISTING = get_args(Existing)
CERTAIN = 65535
"""Value of probability 1 in confidence maps."""


@dataclass(frozen=True)
class Predicted:
    """What `predict_folder` did.

    Attributes:
        images, videos, frames: how many were predicted; frames are the videos'.
        kept: images and videos that were left alone, since all their files were there.
        failed: a line for each image or video that could not be read, or not to its end.
    """

    images: int
    videos: int
    frames: int
    kept: int
    failed: tuple[str, ...]


@dataclass(frozen=True)
class _Input:
    """An image or video, and what its files will be called, below the folder of their kind and without suffix."""

    name: str
    path: Path
    video: bool


@dataclass(frozen=True)
class _Shot:
    """An image, still to be read, or a frame of a video with its number, from 1 on."""

    source: _Input
    frame: np.ndarray | None = None
    number: int = 0
    movie: _Movie | None = None


def predict_folder(
    source: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    kinds: Sequence[str] = KINDS,
    round_index: int | None = None,
    existing: Existing = "fault",
    console: Console | None = None,
) -> Predicted:
    """Predict images and videos, by the recipe's evaluation protocol, into `out/KIND/NAME.png`.

    Of a video, frames go to `out/KIND/NAME/000001.png` and so on, overlays to `out/overlay/NAME.mp4`.

    Args:
        source: run folder or .safetensors checkpoint; of the latter, whole images in one window with their mirror.
        images: an image, a video, a folder, a pattern such as "photos/**/*.jpg", or several of these. NAME is the path
            below the folder, or below the part of the pattern without wildcards; of a single file its name.
        kinds: "index" (class values), "color" (class colors), "overlay" (colors over the image), "confidence" (the
            class's probability, 16 bits: 65535 is 1).
        round_index: default: the last finished.
        existing: what to do where files are there already: "fault", before anything is written; "keep" what is whole
            and predict the others; "replace".

    What cannot be read is passed over and named in the result. Raises RunError, WeightsError, RecipeError, StorageError,
    NumericsError, and DataError where nothing is found or two files would get one name.
    """
    out = Path(out)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or existing not in EXISTING:
        raise RunError(
            f"kinds {list(kinds)}, existing {existing!r}: there are {', '.join(KINDS)}, and {', '.join(EXISTING)}."
        )
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Give a folder for the predictions, behind the images.")
    if RunDirectory(out).recipe.exists():
        raise RunError(f"{out} is a run folder. Give another one for the predictions, behind the images.")
    trained = load_trained(source, round_index)
    several = [images] if isinstance(images, (str, Path)) else images
    inputs = _find_inputs(several, out)
    failed: list[str] = []
    facts: dict[_Input, VideoFacts] = {}
    for one in inputs:
        if one.video:
            try:
                facts[one] = video_facts(one.path)
            except DataError as error:
                failed.append(str(error))
    readable = [one for one in inputs if not one.video or one in facts]
    todo = _not_done(readable, facts, out, kinds, existing)
    palette, memory = trained.classes().palette(), Memory()
    counts = {"images": 0, "frames": 0}
    movie: _Movie | None = None

    def shots() -> Iterator[_Shot]:
        for one in todo:
            if not one.video:
                yield _Shot(one)
                continue
            new = (
                _Movie(VideoWriter(out / "overlay" / f"{one.name}.mp4", facts[one].rate))
                if "overlay" in kinds
                else None
            )
            number = 0
            try:
                for number, frame in enumerate(ahead_of(read_frames(one.path)), 1):
                    yield _Shot(one, frame, number, new)
            except DataError as error:
                failed.append(str(error))
            _remove_frames(out, kinds, one, number)

    def read(shot: _Shot) -> np.ndarray | str:
        if shot.frame is not None:
            return shot.frame
        try:
            return read_image(shot.source.path)
        except DataError as error:
            return str(error)

    def work(shot: _Shot, image: np.ndarray | str) -> tuple[np.ndarray, Prediction] | None:
        nonlocal movie
        if movie is not None and shot.movie is not movie:
            movie.close()
            movie = None
        if isinstance(image, str):
            failed.append(image)
            return None
        name = f"{shot.source.path}, frame {shot.number}" if shot.number else str(shot.source.path)
        prediction = predict(trained.network, image, trained.protocol(image), name=name, memory=memory)
        if shot.movie is not None:
            movie = shot.movie
            movie.add(lambda: _overlay(image, palette[prediction.classes]))
        counts["frames" if shot.number else "images"] += 1
        return image, prediction

    def write(shot: _Shot, done: tuple[np.ndarray, Prediction] | None) -> None:
        if done is None:
            return
        name = f"{shot.source.name}/{shot.number:06d}" if shot.number else shot.source.name
        for kind in kinds:
            if shot.movie is None or kind != "overlay":
                write_map(out / kind / f"{name}.png", _draw(kind, *done, palette))

    total = sum(max(1, facts[one].frames) if one.video else 1 for one in todo)
    try:
        with Journal(None, None, console or Console()).progress("predict", total) as advance:
            overlapped(shots(), read=read, work=work, write=write, advance=advance)
        if movie is not None:
            movie.close()
    except BaseException:
        if movie is not None:
            movie.abandon()
        raise
    videos = sum(one.video for one in todo)
    return Predicted(
        counts["images"], videos, counts["frames"], len(readable) - len(todo), tuple(sorted(failed))
    )


class _Movie:
    """Draws and writes the frames of a video one after the other, in a thread of its own."""

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1)
        self._behind: Future[None] | None = None

    def add(self, draw: Callable[[], np.ndarray]) -> None:
        self._wait()
        self._behind = self._pool.submit(lambda: self._writer.add(draw()))

    def close(self) -> None:
        self._wait()
        self._pool.shutdown()
        self._writer.close()

    def abandon(self) -> None:
        self._pool.shutdown()
        self._writer.abandon()

    def _wait(self) -> None:
        behind, self._behind = self._behind, None
        if behind is not None:
            behind.result()


def _find_inputs(several: Sequence[Path | str], out: Path) -> list[_Input]:
    """Everything to predict, sorted by name. What lies in `out` is none of it. Raises DataError."""
    found: dict[tuple[str, Path], _Input] = {}
    for given in several:
        path, text = Path(given), str(given)
        if path.is_dir():
            here = _below(path, path, out)
        elif path.is_file() or not glob.has_magic(text):
            if not path.exists():
                raise DataError(f"{path}: no such image, video or folder.")
            here = [_input(path.stem, path)]
        else:
            here = _matching(text, out)
        if not here:
            raise DataError(
                f"{given}: no images found ({', '.join(IMAGE_SUFFIXES)}), nor videos ({', '.join(VIDEO_SUFFIXES)})."
            )
        found.update({(one.name, one.path.absolute()): one for one in here})
    inputs = sorted(found.values(), key=lambda one: (one.name, one.path))
    clashes = _clashes(inputs)
    if clashes:
        raise DataError(
            faults(
                "Files would get the same name. Rename one of each, or give their folder, or a quoted pattern, which "
                "keeps the folders",
                clashes,
            )
        )
    return inputs


def _input(name: str, path: Path) -> _Input:
    return _Input(name, path, path.suffix.lower() in VIDEO_SUFFIXES)


def _below(folder: Path, root: Path, out: Path) -> list[_Input]:
    """All images and videos below `folder`, named by their paths below `root`."""
    paths = [
        path
        for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
        for path in find_files(folder, suffixes).values()
    ]
    written = out.resolve()
    return [
        _input(sample_id(path.relative_to(root)), path)
        for path in paths
        if written not in path.resolve().parents
    ]


def _matching(pattern: str, out: Path) -> list[_Input]:
    """Images and videos that a pattern finds, and those in folders that it finds."""
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(at for at, part in enumerate(parts) if glob.has_magic(part))])
    found: dict[Path, _Input] = {}
    for text in glob.iglob(pattern, recursive=True):
        path = Path(text)
        if path.is_dir():
            found.update({one.path: one for one in _below(path, fixed, out)})
        elif (
            path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
            and out.resolve() not in path.resolve().parents
        ):
            found[path] = _input(sample_id(path.relative_to(fixed)), path)
    return list(found.values())


def _clashes(inputs: Sequence[_Input]) -> list[str]:
    """A line for each name that more than one would have; a video's name is that of a folder."""
    by_name: dict[tuple[str, bool], list[_Input]] = {}
    for one in inputs:
        by_name.setdefault((one.name.casefold(), one.video), []).append(one)
    lines = [" and ".join(str(one.path) for one in alike) for alike in by_name.values() if len(alike) > 1]
    for (name, video), alike in by_name.items():
        folders = [name[:at] for at, letter in enumerate(name) if letter == "/"]
        for films in () if video else (by_name.get((folder, True), []) for folder in folders):
            lines += [f"{film.path}, whose frames get a folder, and {alike[0].path}" for film in films]
    return lines


def _not_done(
    inputs: Sequence[_Input], facts: dict[_Input, VideoFacts], out: Path, kinds: Sequence[str], existing: str
) -> list[_Input]:
    """What is to be predicted. Raises RunError where files are there and nobody said what to do with them."""
    if existing == "replace":
        return list(inputs)

    def path_of(one: _Input, kind: str, number: int) -> Path:
        if not one.video:
            return out / kind / f"{one.name}.png"
        return out / kind / (f"{one.name}.mp4" if kind == "overlay" else f"{one.name}/{number:06d}.png")

    if existing == "keep":
        # The last frame is written after all others.
        return [
            one
            for one in inputs
            if not all(path_of(one, kind, facts[one].frames if one.video else 0).exists() for kind in kinds)
        ]
    there = [path for one in inputs for kind in kinds if (path := path_of(one, kind, 1)).exists()]
    if there:
        raise RunError(
            faults(
                f"{out}: {len(there)} file(s) are there already, perhaps of another network. Choose another folder, or "
                "say --existing replace, or --existing keep to go on with what is missing",
                [str(path) for path in there],
                limit=5,
            )
        )
    return list(inputs)


def _remove_frames(out: Path, kinds: Sequence[str], video: _Input, count: int) -> None:
    """Frames that an earlier call wrote of a longer video of that name: they would pass for this one's."""
    for kind in kinds:
        number = count + 1
        while (path := out / kind / video.name / f"{number:06d}.png").exists():
            path.unlink()
            number += 1


CONFIDENCE_VALUES = np.round(CERTAIN * FINE.confidence(np.arange(FINE.codes))).astype(np.uint16)
"""What is written for each code."""


def _draw(kind: str, image: np.ndarray, prediction: Prediction, palette: np.ndarray) -> np.ndarray:
    """What is written: uint8 or uint16 [H, W], or, for OpenCV, uint8 [H, W, 3] in BGR."""
    if kind == "index":
        return prediction.classes
    if kind == "confidence":
        return CONFIDENCE_VALUES[prediction.codes]
    colored = palette[prediction.classes]
    return cv2.cvtColor(_overlay(image, colored) if kind == "overlay" else colored, cv2.COLOR_RGB2BGR)


def _overlay(image: np.ndarray, colored: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(colored, OVERLAY_OPACITY, image, 1 - OVERLAY_OPACITY, 0)
