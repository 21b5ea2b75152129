"""Files that are not read, by their suffixes, with what to do about them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from darseg.data.foreign import FORMATS, TEXTS, foreign_format
from darseg.data.images import IMAGE_SUFFIXES
from darseg.data.labels import LABEL_SUFFIXES
from darseg.data.video import VIDEO_SUFFIXES
from darseg.data.walk import walk

TO_PNG = "Convert them to PNG"
TO_MP4 = "Convert them to MP4 (H.264)"
TO_TIFF = "Export them as TIFF or PNG"

UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf"), TO_PNG),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".psd", ".svg", ".ico", ".exr", ".hdr"), TO_PNG),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), TO_PNG),
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5"), TO_PNG),
    **dict.fromkeys(
        (".nii", ".nii.gz", ".dcm", ".nrrd", ".mha", ".czi", ".nd2", ".lif", ".vsi", ".svs"), TO_TIFF
    ),
    **dict.fromkeys((".img", ".ecw", ".sid", ".grd", ".nc", ".zarr"), TO_TIFF),
    **dict.fromkeys((".m4v", ".wmv", ".flv", ".mpg", ".mpeg", ".3gp", ".mts", ".m2ts", ".ogv"), TO_MP4),
    **dict.fromkeys((".zip", ".rar", ".7z", ".tar", ".gz", ".tgz"), "Unpack them"),
    # Read as pictures, so these are among label maps.
    **dict.fromkeys(
        (".jpg", ".jpeg", ".jpe", ".jfif", ".webp"), "JPEG and WebP change label values: export them as PNG"
    ),
}
"""Suffix of pictures, label maps and videos that are not read → what to do."""

HARMLESS = frozenset(
    (
        ".md",
        ".rst",
        ".pdf",
        ".doc",
        ".docx",
        ".htm",
        ".html",
        ".log",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".lnk",
        ".db",
        ".py",
        ".sh",
        ".bat",
        ".ipynb",
        ".xls",
        ".xlsx",
        ".csv",
        ".txt",
        ".json",
        ".geojson",
        ".xml",
        ".tfw",
        ".tifw",
        ".tiffw",
        ".jgw",
        ".jpgw",
        ".pgw",
        ".pngw",
        ".wld",
        ".prj",
        ".ovr",
        ".part",
        ".bak",
        ".lst",
        ".list",
        ".names",
        ".data",
        ".sha256",
        ".md5",
        ".url",
        ".exe",
        ".pkl",
        ".pth",
        ".pt",
        ".safetensors",
        ".onnx",
    )
)
"""Suffixes of files next to pictures that nobody takes for pictures or label maps. Of TEXTS, the formats of annotation
tools are listed nevertheless."""

MOST_SUFFIXES = 6
"""Suffixes that a line lists."""

MOST_OPENED = 500
"""Text files of a suffix that are opened to recognize their format; of more, every second, third, … is."""

NO_SUFFIX = "without a suffix"

_KNOWN = {*IMAGE_SUFFIXES, *LABEL_SUFFIXES, *VIDEO_SUFFIXES}
_REMEDIES_OF_FORMATS = {kind.name: kind.remedy for kind in FORMATS}
_PAPERS = ("readme", "license", "licence", "copying", "authors", "notice", "version", "makefile", "checksums")


def unread_files(folder: Path, read: Iterable[str]) -> Counter[str]:
    """Suffix or format → number of files in or below a folder that may be meant to be read and are not.

    Hidden files and folders and files of `HARMLESS` suffixes are left out. Annotation files of tools whose formats are
    not read count by format ("YOLO text").

    Args:
        read: suffixes that the caller reads.
    """
    counts: Counter[str] = Counter()
    texts: dict[str, list[Path]] = {}
    known = set(read)
    for directory, names in walk(folder):
        for name in names:
            suffix = _suffix_of(name)
            if name.startswith(".") or suffix in known:
                continue
            if suffix in TEXTS:
                texts.setdefault(suffix, []).append(Path(directory, name))
            elif suffix not in HARMLESS and (suffix or not name.lower().startswith(_PAPERS)):
                counts[suffix or NO_SUFFIX] += 1
    for paths in texts.values():
        opened = sorted(paths)[:: 1 + len(paths) // MOST_OPENED]
        formats = Counter(kind.name for path in opened if (kind := foreign_format(path)))
        for name, count in formats.items():
            counts[name] += round(count * len(paths) / len(opened))
    return counts


def _suffix_of(name: str) -> str:
    return ".nii.gz" if name.lower().endswith(".nii.gz") else os.path.splitext(name)[1].lower()


def found_suffixes(folder: Path) -> str:
    """What is in or below a folder, by suffix, with what to do about what is not read."""
    counts: Counter[str] = Counter()
    for _, names in walk(folder):
        counts.update(_suffix_of(name) or NO_SUFFIX for name in names if not name.startswith("."))
    if not counts:
        return "the folder is empty"
    unread = unread_files(folder, LABEL_SUFFIXES)
    return f"the folder holds {_listed(counts)} file(s).{_remedies(unread)}".removesuffix(".")


def unread_line(folder: Path, counts: Counter[str]) -> str:
    """A sentence about files that were passed over, and what to do; empty if there are none."""
    if not counts:
        return ""
    line = f"{folder}: {counts.total():,} file(s) are of kinds that are not read here: {_listed(counts)}."
    return line + _remedies(counts)


def _listed(counts: Counter[str]) -> str:
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MOST_SUFFIXES)]
    if len(counts) > MOST_SUFFIXES:
        listed.append(f"{len(counts) - MOST_SUFFIXES} more kinds")
    return ", ".join(listed)


def _remedies(counts: Counter[str]) -> str:
    remedies = dict.fromkeys(
        remedy
        for suffix in counts
        for remedy in (
            _REMEDIES_OF_FORMATS.get(suffix),
            UNREAD.get(suffix),
        )
        if remedy
    )
    return "".join(f" {text}." for text in remedies)
