"""List files whose lines name images of a folder: train.txt, val.txt, labeled.txt and the like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from darseg.data.files import read_text
from darseg.init.words import SPLITS

LIST_FOLDERS = (".", "lists", "splits", "ImageSets/Segmentation", "ImageSets")


@dataclass(frozen=True)
class Lists:
    """List files: part of the data set → images, and → the file; notes about lines that are not used.

    Attributes:
        labels: image → the label map that its line names.
    """

    images: dict[str, list[Path]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    labels: dict[Path, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_lists(root: Path, images: Sequence[Path], labels: Sequence[Path]) -> Lists:
    """List files below `root`, one for each part; at least nine of ten lines must name images."""
    image_for, label_for = _finder(root, images), _finder(root, labels)
    lists = Lists()
    for folder in LIST_FOLDERS:
        for split, words in SPLITS.items():
            paths = [root / folder / f"{word}.txt" for word in words]
            path = next((path for path in paths if path.is_file()), None)
            if path is None or split in lists.images:
                continue
            try:
                lines = [line.strip() for line in read_text(path, "utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError):
                continue
            images_named = [image for line in lines if (image := image_for(line)) is not None]
            named = list(dict.fromkeys(images_named))
            missing = len(lines) - len(images_named)
            if len(images_named) * 10 < len(lines) * 9 or not named:
                lists.notes.append(
                    f"{path} is not used: {missing} of its {len(lines)} lines name no image in this folder"
                )
                continue
            if missing:
                lists.notes.append(f"{path}: {missing} of {len(lines)} lines name no image in this folder")
            if len(images_named) > len(named):
                lists.notes.append(
                    f"{path}: {len(images_named) - len(named)} of {len(lines)} lines repeat an image, which counts once"
                )
            lists.images[split], lists.files[split] = named, path
            for first, second in (line.split() for line in lines if len(line.split()) == 2):
                if (image := image_for(first)) and (label := label_for(second)):
                    lists.labels[image] = label
    return lists


def _finder(root: Path, images: Sequence[Path]) -> Callable[[str], Path | None]:
    """A function: line of a list → the image that it names, with or without suffix and leading folders."""
    by_path = {image.relative_to(root).with_suffix("").as_posix(): image for image in images}
    by_ending: dict[str, list[Path]] = defaultdict(list)
    for name, path in by_path.items():
        parts = name.split("/")
        for at in range(len(parts)):
            by_ending["/".join(parts[at:])].append(path)

    def image_for(line: str) -> Path | None:
        for text in (line, *line.split()[:1]):
            text = text.lstrip("./")
            has_name = bool(PurePosixPath(text).name)
            for name in (text, str(PurePosixPath(text).with_suffix(""))) if has_name else (text,):
                if name in by_path:
                    return by_path[name]
                candidates = by_ending.get(name, [])
                if len(candidates) == 1:
                    return candidates[0]
        return None

    return image_for
