"""Images and videos to predict: find them, name their results, and leave out those that are done."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from darseg.choices import PredictionKind
from darseg.data.files import is_taken, real
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.manifest import find_files, sample_id
from darseg.data.maps import is_whole
from darseg.data.suffixes import unread_files, unread_line
from darseg.data.video import VIDEO_SUFFIXES, VideoFacts, is_whole_video
from darseg.data.walk import unreadable
from darseg.errors import DataError, RunError, faults

KINDS: tuple[PredictionKind, ...] = get_args(PredictionKind)


@dataclass(frozen=True)
class Medium:
    """An image or video, and the name of its results: a path below their kind's folder, without suffix."""

    name: str
    path: Path
    is_video: bool

    @classmethod
    def of(cls, name: str, path: Path) -> Medium:
        """The suffix of `path` decides whether it is a video."""
        return cls(name, path, path.suffix.lower() in VIDEO_SUFFIXES)


@dataclass(frozen=True)
class Outputs:
    """Where results go: `folder/KIND/NAME.png`, for each of the kinds.

    Frames of videos go to `folder/KIND/NAME/000001.png` and so on, overlays of videos to `folder/overlay/NAME.mp4`.
    """

    folder: Path
    kinds: Sequence[str]

    def path(self, medium: Medium, kind: str, number: int = 0) -> Path:
        """The file of an image, or of a video's frame with this number, from 1 on."""
        if medium.is_video and kind == "overlay":
            return self.folder / kind / f"{medium.name}.mp4"
        name = f"{medium.name}/{number:06d}" if medium.is_video else medium.name
        return self.folder / kind / f"{name}.png"

    def is_complete(self, medium: Medium, facts: VideoFacts | None) -> bool:
        """Whether all files of a medium are there, none of them empty or cut off."""
        return all(map(_is_whole, self._files(medium, facts)))

    def damaged(self, medium: Medium, facts: VideoFacts | None) -> list[Path]:
        """The files of a medium that are there, but empty or cut off."""
        return [path for path in self._files(medium, facts) if is_taken(path) and not _is_whole(path)]

    def _files(self, medium: Medium, facts: VideoFacts | None) -> Iterator[Path]:
        for kind in self.kinds:
            one = facts is None or kind == "overlay"
            for number in (0,) if one else range(1, max(1, facts.frames) + 1):  # some headers state no number
                yield self.path(medium, kind, number)

    def present(self, medium: Medium) -> list[Path]:
        """The files that stand where those of a medium go; of a video, one of its folder."""
        files = []
        for kind in self.kinds:
            path = self.path(medium, kind, 1)
            if medium.is_video and kind != "overlay" and path.parent.is_dir():
                files += sorted(path.parent.iterdir())[:1]
            elif is_taken(path):
                files.append(path)
        return files

    def others(self, media: Sequence[Medium]) -> bool:
        """Whether there are results of other media than these, or of other kinds."""
        names = {medium.name for medium in media}
        videos = tuple(f"{medium.name}/" for medium in media if medium.is_video)
        for kind in KINDS:
            for path in (self.folder / kind).rglob("*.*"):
                if path.suffix not in (".png", ".mp4"):
                    continue
                name = path.relative_to(self.folder / kind).with_suffix("").as_posix()
                if kind not in self.kinds or (name not in names and not name.startswith(videos)):
                    return True
        return False

    def later_frames(self, video: Medium, last: int) -> list[Path]:
        """Frames after the last one, which an earlier call wrote for a longer video of that name."""
        frames = []
        for kind in self.kinds:
            number = last + 1
            while kind != "overlay" and is_taken(path := self.path(video, kind, number)):
                frames.append(path)
                number += 1
        return frames


def find_media(patterns: Sequence[Path | str], out: Path) -> list[Medium]:
    """All images and videos that paths, folders and patterns name, sorted; nothing inside `out`.

    Raises DataError if one of them names nothing, or if two results would get the same name.
    """
    ordered = list_media(patterns, out)
    clashes = _clashes(ordered)
    if clashes:
        raise DataError(
            faults(
                "Results would get the same name. Rename one file of each pair. Or give the folder above them, or a "
                "quoted pattern, so that names keep their folders",
                clashes,
            )
        )
    return ordered


def list_media(patterns: Sequence[Path | str], out: Path | None = None) -> list[Medium]:
    """As `find_media`, for predictions that are not written: several may have the same name."""
    media: dict[tuple[str, Path], Medium] = {}
    for pattern in patterns:
        path, text = Path(pattern), str(pattern)
        if path.is_dir():
            matches = _below(path, root=path, out=out)
        elif path.is_file() or not glob.has_magic(text):
            if not path.exists():
                raise DataError(f"{path}: there is no such image, video or folder. Check the path.")
            matches = [Medium.of(path.stem, path)]
        else:
            matches = _matching(text, out)
        if not matches:
            raise DataError(
                f"{pattern}: there are no images ({', '.join(IMAGE_SUFFIXES)}) and no videos "
                f"({', '.join(VIDEO_SUFFIXES)}). Give another folder or pattern."
            )
        media.update({(medium.name, medium.path.absolute()): medium for medium in matches})
    return sorted(media.values(), key=lambda medium: (medium.name, medium.path))


def unread_lines(patterns: Sequence[Path | str]) -> list[str]:
    """A line for each folder of the patterns with files or folders that are not read."""
    folders = [Path(pattern) for pattern in patterns if Path(pattern).is_dir()]
    lines: list[str] = []
    for folder in folders:
        counts = unread_files(folder, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        lines += [unread_line(folder, counts), unreadable(folder)]
    return list(filter(None, lines))


def still_to_do(
    media: Sequence[Medium], facts: Mapping[Medium, VideoFacts], outputs: Outputs, *, existing: str
) -> list[Medium]:
    """What is to be predicted. Raises RunError if results exist and `existing` is "fault"."""
    if existing == "replace":
        return list(media)
    if existing == "keep":
        return [medium for medium in media if not outputs.is_complete(medium, facts.get(medium))]
    present = [str(path) for medium in media for path in outputs.present(medium)]
    if present:
        raise RunError(
            faults(
                f"{outputs.folder}: {len(present)} file(s) exist already, perhaps from another network. Choose another "
                "folder, or use --existing replace, or --existing keep to predict only what is missing",
                present,
                limit=5,
            )
        )
    return list(media)


def _is_whole(path: Path) -> bool:
    """Whether a file that `predict` wrote is neither missing nor cut off."""
    return is_whole(path) if path.suffix == ".png" else is_whole_video(path)


def _below(folder: Path, *, root: Path, out: Path | None) -> list[Medium]:
    """All images and videos below `folder`, named by their paths below `root`."""
    paths = [
        path
        for suffixes in (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
        for path in find_files(folder, suffixes).values()
    ]
    return [Medium.of(sample_id(path.relative_to(root)), path) for path in paths if not _is_below(path, out)]


def _matching(pattern: str, out: Path | None) -> list[Medium]:
    """Images and videos that match a pattern, and those in folders that match."""
    parts = Path(pattern).parts
    root = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    media: dict[Path, Medium] = {}
    for text in glob.iglob(pattern, recursive=True):
        path = Path(text)
        if path.is_dir():
            media.update({medium.path: medium for medium in _below(path, root=root, out=out)})
        elif path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not _is_below(path, out):
            media[path] = Medium.of(sample_id(path.relative_to(root)), path)
    return list(media.values())


def _is_below(path: Path, folder: Path | None) -> bool:
    return folder is not None and real(folder) in real(path).parents


def _clashes(media: Sequence[Medium]) -> list[str]:
    """A line for each name that two media would share; a video's name is also that of a folder."""
    by_name: dict[tuple[str, bool], list[Medium]] = {}
    for medium in media:
        by_name.setdefault((medium.name.casefold(), medium.is_video), []).append(medium)
    lines = [" and ".join(str(medium.path) for medium in same) for same in by_name.values() if len(same) > 1]
    for (name, is_video), same in by_name.items():
        if is_video:
            continue
        folders = [name[:index] for index, letter in enumerate(name) if letter == "/"]
        for folder in folders:
            lines += [
                f"{video.path}, whose frames get a folder, and {same[0].path}"
                for video in by_name.get((folder, True), [])
            ]
    return lines
