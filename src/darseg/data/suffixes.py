"""Files that are not read, by their suffixes, with what to do about them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

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
    ".zip": "Unpack them",
    # Read as pictures, so these are among label maps.
    **dict.fromkeys(
        (".jpg", ".jpeg", ".jpe", ".jfif", ".webp"), "JPEG and WebP change label values: export them as PNG"
    ),
}
"""Suffix of pictures, label maps and videos that are not read → what to do."""

MOST_SUFFIXES = 6
"""Suffixes that a line lists."""


def unread_files(folder: Path, read: Iterable[str]) -> Counter[str]:
    """Suffix → number of files in or below a folder that hold pictures or videos and are not read.

    Hidden files and folders are left out.

    Args:
        read: suffixes that the caller reads.
    """
    counts: Counter[str] = Counter()
    known = set(read)
    for _, names in walk(folder):
        for name in names:
            suffix = ".nii.gz" if name.lower().endswith(".nii.gz") else os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in UNREAD.keys() | _READ and suffix not in known:
                counts[suffix] += 1
    return counts


_READ = {*IMAGE_SUFFIXES, *LABEL_SUFFIXES, *VIDEO_SUFFIXES}


def unread_line(folder: Path, counts: Counter[str]) -> str:
    """A sentence about files that were passed over, and what to do; empty if there are none."""
    if not counts:
        return ""
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MOST_SUFFIXES)]
    if len(counts) > MOST_SUFFIXES:
        listed.append(f"{len(counts) - MOST_SUFFIXES} more kinds")
    remedies = dict.fromkeys(UNREAD[suffix] for suffix in counts if suffix in UNREAD)
    remedy = "".join(f" {text}." for text in remedies)
    return f"{folder}: {counts.total():,} file(s) are of kinds that are not read here: {', '.join(listed)}.{remedy}"
