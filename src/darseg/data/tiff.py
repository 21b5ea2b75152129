"""TIFF and BigTIFF files → the values of their first page, with what their tags say about them."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from darseg.errors import DataError

TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little and big endian; the last two are BigTIFF."""

Color = Literal["gray", "white is zero", "palette", "RGB", "CMYK", "YCbCr"]

COLORS: dict[int, Color] = {0: "white is zero", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
"""PhotometricInterpretation → what the values are; others, such as CIELab, are not read."""

COLOR_BANDS = {"RGB": 3, "CMYK": 4, "YCbCr": 3}
"""Bands that make up the color; all others have one."""

LOSSY = {6: "JPEG", 7: "JPEG", 34892: "JPEG", 33007: "JPEG"}
"""Compressions that change values."""

ALPHA = (1, 2)
"""ExtraSamples: associated and unassociated alpha. 0 is any other value, such as near infrared."""

NODATA = 42113
"""GDAL's tag: the value of pixels that hold nothing."""

# Our errors report broken files with path and remedy, so tifffile need not report them on standard error.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


@dataclass(frozen=True)
class Raster:
    """The first page of a TIFF, as it is stored.

    Attributes:
        values: [H, W, bands]; integers or floats.
        bits: of a value; fewer than its type has for 1, 2, 4 or 12 bits.
        color: what the first bands are.
        alpha: the band of opacity, None if there is none.
        palette: uint8 [N, 3], for the color "palette".
        nodata: the value of pixels that hold nothing (GDAL's tag), None if there is none.
        lossy: the compression that changed the values, "" for none.
        pages: pages of the file that have the size of the first; smaller versions and masks of it do not count.
    """

    values: np.ndarray
    bits: int
    color: Color
    alpha: int | None
    palette: np.ndarray | None
    nodata: float | None
    lossy: str
    pages: int

    @property
    def bands(self) -> int:
        """Number of bands without alpha."""
        return self.values.shape[2] - (self.alpha is not None)


def read_tiff(path: Path, data: bytes, limit: int) -> Raster:
    """The first page of a TIFF or BigTIFF: strips or tiles, planar or interleaved, any number of bands.

    Args:
        limit: most pixels that are read.

    Raises DataError if it cannot be decoded, has more pixels, or holds a kind of color that is not read.
    """
    import tifffile  # a third of a second, and most data sets have no TIFFs

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            _check_kind(path, page, limit)
            values = _bands_last(page, page.asarray(maxworkers=1))
            values = values.astype(np.uint8) if values.dtype == bool else values
            return Raster(
                values=values,
                bits=page.bitspersample,
                color=COLORS[int(page.photometric)]
                if int(page.compression) not in (6, 7)
                else _of_jpeg(page),
                alpha=_alpha(page),
                palette=_palette(page),
                nodata=_nodata(page),
                lossy=LOSSY.get(int(page.compression), ""),
                pages=sum(_is_page(candidate, page) for candidate in file.pages),
            )
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path}: there is not enough memory to decode this TIFF.") from None
    except IndexError:
        raise DataError(f"{path}: this TIFF is cut off. Copy or download it again.") from None
    except Exception as error:  # tifffile and the codecs fail in many ways on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path}: this TIFF cannot be decoded ({reason}). Copy or download it again."
        ) from None


def tiff_size(data: bytes) -> tuple[int, int]:
    """Stored height and width, from the header alone. May raise any error."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        return page.imagelength, page.imagewidth


def _check_kind(path: Path, page: Any, limit: int) -> None:
    pixels = page.imagelength * page.imagewidth
    if pixels > limit:
        raise too_large(path, (page.imagelength, page.imagewidth), limit)
    if int(page.photometric) not in COLORS:
        raise DataError(
            f"{path}: this TIFF has colors of the kind {page.photometric.name}. Convert it to gray or RGB."
        )
    if page.dtype is None or page.dtype.kind not in "buif":
        raise DataError(
            f"{path}: this TIFF has values of type {page.dtype}. Convert them to integers or floats."
        )
    if page.imagedepth != 1:
        raise DataError(
            f"{path}: this TIFF is a volume of {page.imagedepth} slices. Save each slice as a file."
        )


def too_large(path: Path, size: tuple[int, ...], limit: int) -> DataError:
    """The error about a picture with more pixels than the limit."""
    return DataError(
        f"{path}: this picture has {size[0]}x{size[1]} pixels, and the limit is {limit:,}. If the file is right, set "
        f"data.max_pixels to {size[0] * size[1]:,} or more, or cut it into tiles."
    )


def _bands_last(page: Any, values: np.ndarray) -> np.ndarray:
    """The values as [H, W, bands]."""
    if page.axes == "SYX":
        return np.ascontiguousarray(np.moveaxis(values, 0, 2))
    return values.reshape(page.imagelength, page.imagewidth, -1)


def _of_jpeg(page: Any) -> Color:
    """The color of decoded JPEG data: YCbCr has become RGB."""
    color = COLORS[int(page.photometric)]
    return "RGB" if color == "YCbCr" else color


def _alpha(page: Any) -> int | None:
    kinds = [int(kind) for kind in page.extrasamples]
    first = page.samplesperpixel - len(kinds)
    return next((first + index for index, kind in enumerate(kinds) if kind in ALPHA), None)


def _palette(page: Any) -> np.ndarray | None:
    if int(page.photometric) != 3 or page.colormap is None:
        return None
    colors = np.asarray(page.colormap).T  # 16 bits; some programs write 8
    return (colors >> 8 if colors.max(initial=0) > 255 else colors).astype(np.uint8)


def _nodata(page: Any) -> float | None:
    """GDAL's text, which tifffile takes for a number of the file's type only if it fits."""
    tag = page.tags.get(NODATA)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:
        return None


def _is_page(candidate: Any, page: Any) -> bool:
    """Whether a page is a picture of its own: no smaller version (1) or mask (4) of another."""
    kind = getattr(candidate, "subfiletype", 0) or 0
    return not kind & 5 and (candidate.imagelength, candidate.imagewidth) == (
        page.imagelength,
        page.imagewidth,
    )
