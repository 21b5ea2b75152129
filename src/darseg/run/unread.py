"""Files and folders of a recipe's data that darseg does not read."""

from __future__ import annotations

from pathlib import Path

from darseg.config.recipe import Recipe
from darseg.data.files import real
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.suffixes import unread_files, unread_line
from darseg.data.walk import unreadable
from darseg.run.build import IMAGES, LABELS, layout_of


def unread_data(recipe: Recipe) -> list[str]:
    """A line for each folder of images or labels with files or folders that are not read."""
    data, root = recipe.data, Path(recipe.data.root)
    if layout_of(recipe):
        return []
    sources = [source for _, source in data.sources()]
    folders = {
        IMAGE_SUFFIXES: {data.images or IMAGES, *(source.images for source in sources if source.images)},
        LABEL_SUFFIXES: {data.labels or LABELS, *(source.labels for source in sources if source.labels)},
    }
    others = {IMAGE_SUFFIXES: folders[LABEL_SUFFIXES], LABEL_SUFFIXES: folders[IMAGE_SUFFIXES]}
    lines = []
    for suffixes, names in folders.items():
        for folder in sorted(root / name for name in names):
            mixed = any(_nested(folder, root / name) for name in others[suffixes])
            read = (*IMAGE_SUFFIXES, *LABEL_SUFFIXES) if mixed else suffixes
            lines += [unread_line(folder, unread_files(folder, read)), unreadable(folder)]
    return list(dict.fromkeys(filter(None, lines)))


def _nested(outer: Path, inner: Path) -> bool:
    """Whether a folder holds another, or is it."""
    return real(inner).is_relative_to(real(outer))
