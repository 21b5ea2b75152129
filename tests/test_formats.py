"""Images and labels of all formats, compared with files written by hand; usual mistakes and their remedies."""

from __future__ import annotations

import copy
import io
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from conftest import recipe_dict
from darseg.config.text import load_recipe
from darseg.data.advice import usual_mistakes
from darseg.data.classes import CITYSCAPES, IGNORE, VOC, class_set
from darseg.data.encoding import PLAIN, LabelEncoding, label_encoding
from darseg.data.examine import examine
from darseg.data.images import IMAGE_SUFFIXES, Reading, image_size, read_image, read_picture
from darseg.data.labels import decode_label, read_label
from darseg.data.manifest import Manifest, Sample, find_files
from darseg.data.scaling import Scaling
from darseg.errors import DataError, RecipeError
from darseg.run.check import check
from draw_layouts import VOC_FURTHER, draw_voc, voc_palette, write_mat
from wording import refused, says

H, W = 13, 21
RANDOM = np.random.default_rng(0)
CLASSES = class_set(["field", "road", "house"])
COLORED = class_set({"field": [0, 0, 0], "road": [128, 64, 128], "house": [200, 10, 30]})


# Files are written by hand, so that no decoder is compared with its own encoder.


def packed(values: np.ndarray, depth: int, align: int = 8) -> list[bytes]:
    """Rows of values of `depth` bits each, the first in the highest bits."""
    rows = []
    for row in values.reshape(len(values), -1).tolist():
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % align)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return rows


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, depth: int = 8, color: int = 0, *chunks: bytes) -> bytes:
    """color: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGB with alpha."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color, 0, 0, 0)
    lines = b"".join(b"\0" + row for row in packed(values, depth))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    values: np.ndarray,
    depth: int = 8,
    photometric: int = 1,
    *,
    order: str = "<",
    palette: list[int] | None = None,
    alpha: int | None = None,
    turned: int | None = None,
    kind: int = 1,
) -> bytes:
    """photometric: 1 gray, 2 RGB, 3 palette. kind: 1 unsigned, 2 signed, 3 float."""
    samples = values.shape[2] if values.ndim == 3 else 1
    code = {(16, 1): "u2", (16, 2): "i2", (32, 1): "u4", (32, 2): "i4", (32, 3): "f4"}.get((depth, kind))
    pixels = values.astype(order + code).tobytes() if code else b"".join(packed(values, depth))
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [values.shape[1]]),
        257: ("I", [values.shape[0]]),
        258: ("H", [depth] * samples),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [8]),
        277: ("H", [samples]),
        278: ("I", [values.shape[0]]),
        279: ("I", [len(pixels)]),
        339: ("H", [kind] * samples),
    }
    tags |= {320: ("H", palette)} if palette else {}
    tags |= {338: ("H", [alpha])} if alpha is not None else {}
    tags |= {274: ("H", [turned])} if turned else {}
    pixels += b"\0" * (len(pixels) % 2)
    entries, beyond, start = b"", b"", 8 + len(pixels) + 2 + 12 * len(tags) + 4
    for tag, (letter, numbers) in sorted(tags.items()):
        field = b"".join(struct.pack(order + letter, number) for number in numbers)
        if len(field) > 4:
            field, beyond = struct.pack(order + "I", start + len(beyond)), beyond + field
        entries += struct.pack(order + "HHI", tag, 3 if letter == "H" else 4, len(numbers)) + field.ljust(
            4, b"\0"
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + beyond


def bmp(values: np.ndarray, depth: int, palette: np.ndarray, top_down: bool = False) -> bytes:
    """With a palette [n, 3], or of 24 bits (values [H, W, 3], no palette)."""
    flat = values[..., ::-1] if depth == 24 else values
    rows = packed(flat, min(depth, 8), 32)
    body = b"".join(rows if top_down else rows[::-1])
    colors = b"".join(bytes((int(b), int(g), int(r), 0)) for r, g, b in palette)
    start = 54 + len(colors)
    height = -len(values) if top_down else len(values)
    head = struct.pack(
        "<IiiHHIIiiII", 40, values.shape[1], height, 1, depth, 0, len(body), 0, 0, len(palette), 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + colors + body


def with_pillow(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def random_values(depth: int, *channels: int) -> np.ndarray:
    return RANDOM.integers(0, 2**depth, (H, W, *channels))


def in_eight_bits(values: np.ndarray, depth: int) -> np.ndarray:
    """The documented rule: fewer than 8 bits are stretched to 0..255, and 16-bit values become round(v / 257)."""
    if depth == 16:
        return np.array([int(value / 257 + 0.5) for value in values.reshape(-1).tolist()]).reshape(
            values.shape
        )
    return values * 255 // (2**depth - 1)


def gray(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


# Images


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("format", ["png", "tif"])
def test_gray_images_become_rgb(tmp_path: Path, format: str, depth: int):
    values = random_values(depth)
    data = png(values, depth) if format == "png" else tiff(values, depth)
    image = read_image(put(tmp_path / f"a.{format}", data))
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.array_equal(image, gray(in_eight_bits(values, depth)))
    assert image_size(tmp_path / f"a.{format}") == (H, W)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("format", ["png", "tif", "tif big-endian"])
def test_color_images_are_read_without_alpha(tmp_path: Path, format: str, channels: int, depth: int):
    """Transparent pixels keep their colors; OpenCV would multiply those of TIFFs with alpha."""
    if format != "png" and (channels, depth) == (2, 16):
        pytest.skip("gray with alpha of 16 bits is in PNGs alone")
    values = random_values(depth, channels)
    values[:, :4, -1] = 0
    order = ">" if "big" in format else "<"
    alpha = 2 if channels in (2, 4) else None
    if format == "png":
        data = png(values, depth, {2: 4, 3: 2, 4: 6}[channels])
    else:
        data = tiff(values, depth, 1 if channels == 2 else 2, order=order, alpha=alpha)
    expected = in_eight_bits(values, depth)
    expected = gray(expected[..., 0]) if channels == 2 else expected[..., :3]
    assert np.array_equal(read_image(put(tmp_path / f"a.{format[:3]}", data)), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("format", ["png", "png transparent", "tif", "bmp", "bmp top down"])
def test_palette_images_become_rgb(tmp_path: Path, format: str, depth: int):
    if format.startswith("bmp") and depth == 2:
        pytest.skip("BMP has no 2 bits")
    values, palette = random_values(depth), RANDOM.integers(0, 256, (2**depth, 3))
    if format.startswith("png"):
        transparent = [chunk(b"tRNS", b"\0\x80")] if "transparent" in format else []
        data = png(values, depth, 3, chunk(b"PLTE", bytes(palette.astype(np.uint8))), *transparent)
    elif format == "tif":
        data = tiff(values, depth, 3, palette=(palette.T.reshape(-1) * 257).tolist())
    else:
        data = bmp(values, depth, palette, "top" in format)
    assert np.array_equal(read_image(put(tmp_path / f"a.{format[:3]}", data)), palette[values])


def test_images_of_other_formats_are_read(tmp_path: Path):
    image = random_values(8, 3).astype(np.uint8)
    picture, second_page = Image.fromarray(image), Image.fromarray(255 - image)
    files = {
        "24.bmp": bmp(image, 24, np.empty((0, 3))),
        "pillow.bmp": with_pillow(picture, "BMP"),
        "rgba.bmp": with_pillow(picture.convert("RGBA"), "BMP"),
        "lossless.webp": with_pillow(picture, "WEBP", lossless=True),
        "alpha.webp": with_pillow(picture.convert("RGBA"), "WEBP", lossless=True),
        "pages.tif": with_pillow(picture, "TIFF", save_all=True, append_images=[second_page]),
        **{
            f"{how}.tiff": with_pillow(picture, "TIFF", compression=how)
            for how in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits")
        },
    }
    for name, data in files.items():
        assert np.array_equal(read_image(put(tmp_path / name, data)), image), name
    soft = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    for name, options in {"JPEG": {}, "WEBP": {}, "TIFF": {"compression": "jpeg"}}.items():
        path = put(tmp_path / f"soft.{name.lower()[:4]}", with_pillow(Image.fromarray(soft), name, **options))
        assert np.abs(read_image(path).astype(int) - soft).max() < 8, name
    gray_jpeg = with_pillow(Image.fromarray(soft[..., 0]), "JPEG")
    assert np.abs(read_image(put(tmp_path / "gray.jpg", gray_jpeg)).astype(int) - 200).max() < 8


@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_16_bit_images_are_rounded_to_8_bits(tmp_path_factory, values: list[int]):
    path = tmp_path_factory.mktemp("deep") / "a.png"
    path.write_bytes(png(np.array([values]), 16))
    nearest = [min(range(256), key=lambda v: abs(257 * v - value)) for value in values]
    assert read_image(path)[0, :, 1].tolist() == nearest


@pytest.mark.parametrize(
    "depth, kind, name", [(16, 2, "int16"), (32, 1, "uint32"), (32, 2, "int32"), (32, 3, "float32")]
)
def test_images_of_other_depths_need_a_white(tmp_path: Path, depth: int, kind: int, name: str):
    values = random_values(8)
    path = put(tmp_path / "a.tif", tiff(values, depth, kind=kind))
    with pytest.raises(DataError) as caught:
        read_image(path)
    if name == "float32":
        says(str(caught.value), str(path), name, "data.white", vary=[r"from .*?\."])
    assert name in str(caught.value)
    lighter = np.rint(np.clip((values - 10) * 255 / 190, 0, 255))
    assert np.array_equal(read_image(path, Reading(scaling=Scaling(black=10, white=200))), gray(lighter))


def test_white_is_the_brightest_value_of_16_bits(tmp_path: Path):
    values = random_values(12)
    expected = gray(np.rint(values * 255 / 4095))
    for format, data in {"png": png(values, 16), "tif": tiff(values, 16)}.items():
        path = put(tmp_path / f"a.{format}", data)
        assert np.array_equal(read_image(path, Reading(scaling=Scaling(white=4095))), expected)
        picture = read_picture(path)
        assert picture.peak == values.max() and picture.pixels.max() <= 16


def test_what_is_no_number_or_holds_nothing_is_black(tmp_path: Path):
    values = random_values(8).astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -9999
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, extratags=[(42113, 2, 0, "-9999", True)])
    image = read_image(path, Reading(scaling=Scaling(white=1.0)))
    assert image[0, :3, 0].tolist() == [0, 255, 0]
    assert np.array_equal(image[1:, :, 1], np.rint(values[1:] * 255))
    bright = RANDOM.integers(0, 256, (H, W, 3), dtype=np.uint8)
    bright[:2], bright[3, 0] = 255, (255, 255, 7)
    tifffile.imwrite(path, bright, photometric="rgb", extratags=[(42113, 2, 0, "255", True)])
    expected = np.where((bright == 255).all(2, keepdims=True), 0, bright)
    assert np.array_equal(read_image(path), expected)


@pytest.mark.parametrize("bands", [2, 4, 5, 8])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_bands_are_chosen(tmp_path: Path, bands: int, planar: str, photometric: str):
    """BigTIFF, tiles, strips and compression do not matter; neither does how GDAL describes further bands."""
    if photometric == "rgb" and bands == 2:
        pytest.skip("RGB has three bands")
    values = RANDOM.integers(0, 256, (bands, 40, 50), dtype=np.uint8)
    path = tmp_path / "a.tif"
    options: dict = {"bigtiff": bands == 5, "compression": "lzw" if bands > 4 else None}
    options |= {"tile": (16, 32)} if bands == 8 else {}
    stored = values if planar == "separate" else np.ascontiguousarray(np.moveaxis(values, 0, 2))
    further = bands - (3 if photometric == "rgb" else 1)
    tifffile.imwrite(
        path, stored, photometric=photometric, planarconfig=planar, extrasamples=[0] * further, **options
    )
    picture = read_picture(path)
    first = values[:3] if bands > 2 else values[[0, 0, 0]]
    assert np.array_equal(picture.pixels, np.moveaxis(first, 0, 2))
    assert f"{bands} bands" in picture.notes[0] and "data.bands" in picture.notes[0]
    chosen = (bands, 1, 2)
    picture = read_picture(path, Reading(bands=chosen))
    assert np.array_equal(picture.pixels, np.moveaxis(values[[bands - 1, 0, 1]], 0, 2))
    assert picture.notes == ()
    assert np.array_equal(read_image(path, Reading(bands=(2,))), gray(values[1]))
    with pytest.raises(DataError):
        read_image(path, Reading(bands=(1, 2, bands + 1)))


def test_bands_that_are_not_there_are_named(tmp_path: Path):
    path = put(tmp_path / "a.tif", tiff(random_values(8, 3), 8, 2))
    with refused(DataError, str(path), "data.bands", "[1, 2, 4]", "3 band(s)"):
        read_image(path, Reading(bands=(1, 2, 4)))


def test_alpha_is_no_band_and_is_not_multiplied_into_colors(tmp_path: Path):
    values = RANDOM.integers(0, 256, (H, W, 4), dtype=np.uint8)
    values[..., 3] //= 4
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, photometric="rgb", extrasamples=["unassalpha"], compression="deflate")
    assert np.array_equal(read_image(path), values[..., :3]) and read_picture(path).notes == ()


def test_one_limit_of_pixels_holds_for_all_formats(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own would be another
    rgb, values = random_values(8, 3).astype(np.uint8), random_values(1)
    messages: set[str] = set()
    picture = Image.fromarray(rgb)
    images = {
        f"a.{name.lower()}": with_pillow(picture, name)
        for name in ("PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF")
    }
    palette = RANDOM.integers(0, 256, (2, 3))
    colors = (palette.T.reshape(-1) * 257).tolist()
    labels = {
        "b.png": png(values, 1),
        "c.png": png(values, 1, 3, chunk(b"PLTE", bytes(palette.astype(np.uint8)))),
        "b.tif": tiff(values, 8),
        "c.tif": tiff(values, 8, 3, palette=colors * 128),
        "b.bmp": bmp(values, 1, palette),
    }
    for name, data in images.items():
        path = put(tmp_path / name, data)
        assert read_image(path, Reading(max_pixels=H * W)).shape == (H, W, 3)
        with pytest.raises(DataError) as caught:
            read_image(path, Reading(max_pixels=H * W - 1))
        messages.add(str(caught.value).replace(name, "a"))
    for name, data in labels.items():
        path = put(tmp_path / name, data)
        assert np.array_equal(read_label(path, max_pixels=H * W), values), name
        with pytest.raises(DataError) as caught:
            read_label(path, max_pixels=H * W - 1)
        messages.add(str(caught.value).replace(name, "a"))
    (message,) = messages
    says(message, f"{H}x{W}", f"{H * W - 1}", "data.max_pixels")


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF", ".gif", ".GIF"])
def test_other_suffixes_are_read(tmp_path: Path, suffix: str):
    soft = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    format = "GIF" if suffix.lower() == ".gif" else "JPEG"
    put(tmp_path / f"a{suffix}", with_pillow(Image.fromarray(soft), format))
    (path,) = find_files(tmp_path, IMAGE_SUFFIXES).values()
    assert np.abs(read_image(path).astype(int) - soft).max() < 8


def test_of_several_frames_the_first_is_read(tmp_path: Path):
    first, second = Image.new("RGB", (W, H), (200, 0, 0)), Image.new("RGB", (W, H), (0, 0, 200))
    for format in ("GIF", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        path = put(
            tmp_path / f"a.{format}",
            with_pillow(first, format, save_all=True, append_images=[second], **options),
        )
        picture = read_picture(path)
        assert (picture.pixels == (200, 0, 0)).all() and "first" in picture.notes[0]


def test_gif_masks_are_indices(tmp_path: Path):
    values = random_values(4).astype(np.uint8)
    picture = Image.fromarray(values, "P")
    picture.putpalette(RANDOM.integers(0, 256, 768, dtype=np.uint8).tobytes())
    path = put(tmp_path / "a.gif", with_pillow(picture, "GIF"))
    assert np.array_equal(read_label(path), values)


def test_label_maps_of_several_pages_are_refused(tmp_path: Path):
    """A page for each class, of which only the first would be read; overviews are no such pages."""
    pages = [np.eye(H, W, number, np.uint8) for number in range(3)]
    first, *others = [Image.fromarray(page, "P") for page in pages]
    path = put(tmp_path / "a.gif", with_pillow(first, "GIF", save_all=True, append_images=others))
    with refused(DataError, "a.gif", "3 pages"):
        read_label(path)
    for kind, accepted in {0: False, 2: False, 1: True}.items():
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for number, page in enumerate(pages):
                file.write(page, subfiletype=kind if number else 0, metadata=None)
        if accepted:
            assert np.array_equal(read_label(tmp_path / "a.tif"), pages[0])
        else:
            with refused(DataError, "a.tif", "3 pages", "label_parts"):
                read_label(tmp_path / "a.tif")


def turned(values: np.ndarray, mark: int) -> np.ndarray:
    """The picture that a viewer shows (EXIF 2.32, section 4.6.4), pixel by pixel."""
    rows, columns = values.shape[:2]
    upright = np.zeros((columns, rows) if mark > 4 else (rows, columns), values.dtype)
    for row in range(rows):
        for column in range(columns):
            down, right = rows - 1 - row, columns - 1 - column
            place = {
                1: (row, column), 2: (row, right), 3: (down, right), 4: (down, column),
                5: (column, row), 6: (column, down), 7: (right, down), 8: (right, row),
            }[mark]  # fmt: skip
            upright[place] = values[row, column]
    return upright


@pytest.mark.parametrize("mark", range(1, 9))
@pytest.mark.parametrize("depth", [8, 16])
def test_tiffs_are_turned_upright(tmp_path: Path, mark: int, depth: int):
    values = random_values(8)
    path = put(tmp_path / "a.tif", tiff(values * (257 if depth == 16 else 1), depth, turned=mark))
    assert np.array_equal(read_image(path), gray(turned(values, mark)))
    assert np.array_equal(read_image(path, Reading(upright=False)), gray(values))
    if depth == 8:
        assert np.array_equal(read_label(path), values)


def test_white_that_is_zero_turns_drawn_masks_and_not_class_values(tmp_path: Path):
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    tifffile.imwrite(tmp_path / "classes.tif", classes, photometric="miniswhite")
    assert np.array_equal(read_label(tmp_path / "classes.tif"), classes)
    drawn = np.array([[True, False], [False, True]])
    tifffile.imwrite(tmp_path / "drawn.tif", ~drawn, photometric="miniswhite")
    assert np.array_equal(read_label(tmp_path / "drawn.tif"), drawn)


@pytest.mark.parametrize("mark", range(1, 9))
def test_pictures_of_all_formats_are_turned_upright(tmp_path: Path, mark: int):
    values = np.kron(random_values(8, 3).astype(np.uint8)[:2, :3], np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = mark
    for format, options in {
        "PNG": {},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 98, "subsampling": 0},
    }.items():
        path = put(
            tmp_path / f"a.{format}", with_pillow(Image.fromarray(values), format, exif=exif, **options)
        )
        for upright in (True, False):
            image = read_image(path, Reading(upright=upright))
            expected = np.stack([turned(values[..., c], mark if upright else 1) for c in range(3)], 2)
            assert image.shape == expected.shape and image.flags.c_contiguous
            assert np.abs(image.astype(int) - expected).max() < 12, format
    for packed in (False, True):  # as ImageMagick before 7.0.7 wrote it
        block, text = b"Exif\0\0" + exif.tobytes(), PngImagePlugin.PngInfo()
        block = block.replace(b"Exif\0\0" * 2, b"Exif\0\0")
        text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=packed)
        path = put(tmp_path / "text.png", with_pillow(Image.fromarray(values), "PNG", pnginfo=text))
        assert np.array_equal(read_image(path), np.stack([turned(values[..., c], mark) for c in range(3)], 2))
    path = tmp_path / "big.tif"
    tifffile.imwrite(path, values, photometric="rgb", bigtiff=True, extratags=[(274, 3, 1, mark, True)])
    assert np.array_equal(read_image(path), np.stack([turned(values[..., c], mark) for c in range(3)], 2))


# Labels


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("format", ["png", "tif", "tif big-endian"])
def test_gray_labels_are_values(tmp_path: Path, format: str, depth: int):
    """Decoders stretch fewer than 8 bits: class 1 would be 255, 85 or 17."""
    values = random_values(depth) % 256
    data = (
        png(values, depth) if format == "png" else tiff(values, depth, order=">" if "big" in format else "<")
    )
    label = read_label(put(tmp_path / f"a.{format[:3]}", data))
    assert label.dtype == np.uint8 and np.array_equal(label, values)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("format", ["png", "png transparent", "tif", "bmp", "bmp top down"])
@pytest.mark.parametrize("palette", ["colors", "grays", "equal"])
def test_palette_labels_are_indices(tmp_path: Path, format: str, depth: int, palette: str):
    """With any palette: colors, grays from dark to light, or the same color for all indices."""
    if format.startswith("bmp") and depth == 2:
        pytest.skip("BMP has no 2 bits")
    count = 2**depth
    colors = {
        "colors": RANDOM.integers(0, 256, (count, 3)),
        "grays": np.stack([np.arange(count) * 255 // (count - 1)] * 3, 1),
        "equal": np.full((count, 3), 7),
    }[palette]
    values = random_values(depth)
    if format.startswith("png"):
        transparent = [chunk(b"tRNS", b"\0\x80")] if "transparent" in format else []
        data = png(values, depth, 3, chunk(b"PLTE", bytes(colors.astype(np.uint8))), *transparent)
    elif format == "tif":
        data = tiff(values, depth, 3, palette=(colors.T.reshape(-1) * 257).tolist())
    else:
        data = bmp(values, depth, colors, "top" in format)
    path = put(tmp_path / f"a.{format[:3]}", data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_label(path), values)
        # The same files, read by their colors.
        if palette == "colors":
            table = {tuple(map(int, color)): k for k, color in enumerate(colors)}
            encoding = LabelEncoding("color", colors=tuple(sorted(table.items())))
            expected = np.array([[table[tuple(map(int, colors[v]))] for v in row] for row in values])
            assert np.array_equal(read_label(path, encoding), expected)


@pytest.mark.parametrize("format", ["png", "tif"])
def test_transparent_pixels_are_not_labeled(tmp_path: Path, format: str):
    """Even if 255 stands for a class."""
    values = RANDOM.integers(0, 2, (H, W)) * 255
    alpha = RANDOM.choice([0, 1, 255], (H, W))
    gray_alpha, rgb_alpha = np.stack([values, alpha], 2), np.stack([values, values, values, alpha], 2)
    binary = label_encoding(class_set(["no", "yes"]), values="binary")
    expected = np.where(alpha == 0, IGNORE, values // 255)
    pair = png(gray_alpha, 8, 4) if format == "png" else tiff(gray_alpha, 8, 1, alpha=2)
    assert np.array_equal(read_label(put(tmp_path / f"a.{format}", pair), binary), expected)
    four = png(rgb_alpha, 8, 6) if format == "png" else tiff(rgb_alpha, 8, 2, alpha=2)
    path = put(tmp_path / f"b.{format}", four)
    index = label_encoding(class_set(["no", "yes"]), values="binary", format="index")
    assert np.array_equal(read_label(path, index), expected)
    plain = read_label(path, LabelEncoding("index", ignore=200))
    assert np.array_equal(plain, np.where(alpha == 0, IGNORE, values))
    in_color = label_encoding(class_set({"no": [0, 0, 0], "yes": [255, 255, 255]}))
    assert np.array_equal(read_label(path, in_color), expected)
    findings = examine(
        manifest_of(tmp_path, path, encoding=in_color, classes=class_set(["no", "yes"]), shape=(H, W))
    )
    assert findings.faults == () and findings.pixels["labeled"][2] == (alpha == 0).sum()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_value_maps_equal_a_slow_loop(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("map")
    depth = data.draw(st.sampled_from([8, 16]))
    top = 2**depth - 1
    count = data.draw(st.integers(2, 6))
    names = [f"class {k}" for k in range(count)]
    targets = st.sampled_from([*range(count), *names, "ignore"])
    table = data.draw(st.dictionaries(st.integers(0, top), targets, min_size=1, max_size=12))
    fallback = data.draw(st.none() | targets)
    values = data.draw(st.lists(st.sampled_from([*table, 0, 255, top]), min_size=4, max_size=40))
    encoding = label_encoding(
        class_set(names), values=table | ({} if fallback is None else {"other": fallback})
    )
    path = folder / "a.png"
    path.write_bytes(png(np.array([values]), depth))

    def meaning(name: int | str) -> int:
        return 255 if name == "ignore" else name if isinstance(name, int) else names.index(name)

    expected, unknown = [], set()
    for value in values:
        if value in table or fallback is not None:
            expected.append(meaning(table.get(value, fallback)))
        else:
            unknown.add(value)
    if not unknown:
        assert read_label(path, encoding).tolist() == [expected]
        return
    with pytest.raises(DataError) as caught:
        read_label(path, encoding)
    for value in unknown:
        assert f"{value} ({values.count(value)} pixel" in str(caught.value)
    assert "data.label_values" in str(caught.value)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_colors_are_read_as_classes(tmp_path_factory, data):
    color = st.tuples(*[st.integers(0, 255)] * 3)
    colors = data.draw(st.lists(color, min_size=3, max_size=8, unique=True))
    classes = class_set({f"class {k}": color for k, color in enumerate(colors[:-1])})
    encoding = label_encoding(classes, colors={"ignore": [colors[-1]]})
    label = np.array(data.draw(st.lists(st.integers(0, len(colors) - 1), min_size=1, max_size=30)))[None]
    pixels = np.array(colors)[label]
    path = tmp_path_factory.mktemp("colors") / "a.png"
    path.write_bytes(png(pixels, 8, 2))
    assert np.array_equal(read_label(path, encoding), np.where(label == len(colors) - 1, IGNORE, label))
    assert decode_label(path, "auto").tolist() == (pixels @ (65536, 256, 1)).tolist()


def test_value_maps_that_have_a_name(tmp_path: Path):
    path = put(tmp_path / "a.png", png(np.array([[0, 1, 2, 3, 255]])))
    assert read_label(path, label_encoding(CLASSES, values="one_based")).tolist() == [[255, 0, 1, 2, 255]]
    masks = label_encoding(class_set(["no", "yes"]), values="binary")
    assert read_label(put(tmp_path / "b.png", png(np.array([[0, 255]]))), masks).tolist() == [[0, 1]]
    # The same masks, saved with one bit per pixel.
    for name, data in {"c.png": png(np.array([[0, 1]]), 1), "c.tif": tiff(np.array([[0, 1]]), 1)}.items():
        assert read_label(put(tmp_path / name, data), masks).tolist() == [[0, 1]]
    ids = label_encoding(CITYSCAPES, values="cityscapes_ids")
    path = put(tmp_path / "d.png", png(np.array([[0, 7, 33, 34, 255]])))
    assert read_label(path, ids).tolist() == [[255, 0, 18, 255, 255]]
    many = class_set([f"class {k}" for k in range(255)])
    path = put(tmp_path / "e.png", png(np.array([[0, 1, 255]])))
    assert read_label(path, label_encoding(many, values="one_based")).tolist() == [[255, 0, 254]]


def test_values_above_255_need_a_value_map(tmp_path: Path):
    path = put(tmp_path / "a.png", png(np.array([[0, 255, 256, 26001, 26001]]), 16))
    with refused(DataError, str(path), "26001 (2 pixels), 256 (1 pixel)", "data.label_values"):
        read_label(path)
    encoding = label_encoding(CLASSES, values={0: "field", 255: 1, 256: "house", 26001: "ignore"})
    assert read_label(path, encoding).tolist() == [[0, 1, 2, 255, 255]]


ENCODINGS_REFUSED = {
    "a value of an unknown class": (
        {"values": {0: "street"}},
        ["data.label_values.0", "'street'", "field, road"],
    ),
    "a value of an unknown index": ({"values": {0: 3}}, ["data.label_values.0", "3", "field, road"]),
    "other values of an unknown class": ({"values": {"other": "sky"}}, ["data.label_values.other", "'sky'"]),
    "binary for three classes": ({"values": "binary"}, ["data.label_values", "binary", "2", "3"]),
    "Cityscapes' ids for three classes": ({"values": "cityscapes_ids"}, ["data.label_values", "19", "3"]),
    "an unknown value map": (
        {"values": "two_based"},
        ["data.label_values", "'two_based'", "index, one_based, binary, cityscapes_ids"],
    ),
    "an ignore value with a value map": (
        {"values": "one_based", "ignore": 9},
        ["data.ignore", "data.label_values"],
    ),
    "an ignore value that is a class": ({"ignore": 2}, ["data.ignore", "2", "between 3 and 255"]),
    "an ignore value above 255": ({"ignore": 256}, ["data.ignore", "256", "255"]),
    "a color of an unknown class": ({"colors": {"sky": [[1, 2, 3]]}}, ["data.label_colors", "'sky'"]),
    "a color of a truth value": ({"colors": {True: [[1, 2, 3]]}}, ["data.label_colors", "True"]),
    "a color of a class and of ignored pixels": (
        {"colors": {"road": [[1, 2, 3]], "ignore": [[1, 2, 3]]}},
        ["data.classes", "data.label_colors", "road and ignore", "[1, 2, 3]"],
    ),
    "three faults at once": (
        {"values": {0: "street", 1: "sky"}, "ignore": 9},
        ["data.label_values.0", "data.label_values.1", "data.ignore"],
    ),
}


@pytest.mark.parametrize("case", ENCODINGS_REFUSED)
def test_encodings_that_are_refused(case: str):
    arguments, facts = ENCODINGS_REFUSED[case]
    with refused(RecipeError, *facts):
        label_encoding(CLASSES, **{"own_colors": False, **arguments})


def test_a_color_of_two_classes_is_refused_or_not_read(tmp_path: Path):
    """It may be meant for drawing only, but it is never silently read as one of the two."""
    classes = class_set({"a": [1, 2, 3], "b": [1, 2, 3], "c": [9, 9, 8]})
    with refused(RecipeError, "a and b", "[1, 2, 3]", "data.classes", "data.label_colors"):
        label_encoding(classes, format="color")
    with refused(RecipeError, "c and ignore", "[9, 9, 8]", "data.classes", "data.label_colors"):
        label_encoding(classes, colors={"ignore": [[9, 9, 8]]})
    path = put(tmp_path / "a.png", png(np.array([[[9, 9, 8], [1, 2, 3]]]), 8, 2))
    with refused(DataError, str(path), "[1, 2, 3] (1 pixel)"):
        read_label(path, label_encoding(classes))


def test_colors_instead_of_values_and_values_instead_of_colors_are_refused(tmp_path: Path):
    own = np.random.default_rng(7)  # messages count pixels: the values must not depend on the tests before
    values, colors = own.integers(0, 2, (H, W)), own.integers(0, 256, (H, W, 3))
    as_color, as_index = LabelEncoding("color", colors=(((0, 0, 0), 0),)), LabelEncoding("index")
    files = {"png": png, "tif": tiff}
    for suffix, write in files.items():
        for depth in (1, 2, 4, 8, 16):
            path = put(tmp_path / f"a.{suffix}", write(values, depth))
            with pytest.raises(DataError, match=r"data\.label_format"):
                read_label(path, as_color)
        with refused(DataError, str(path), "data.label_format", "index"):
            read_label(path, as_color)
        path = put(tmp_path / f"b.{suffix}", write(colors, 8, 2))
        with refused(DataError, str(path), "data.label_format", "data.classes: {name: [red, green, blue]}"):
            read_label(path, as_index)
        with refused(DataError, str(path), "data.classes: {name: [red, green, blue]}", "data.label_colors"):
            read_label(path)
        same = put(tmp_path / f"c.{suffix}", write(gray(values), 8, 2))
        assert np.array_equal(read_label(same, as_index), values)
        with refused(DataError, str(same), "data.label_format: index"):
            read_label(same)
        with refused(DataError, str(same), "data.label_format: index"):
            read_label(same, label_encoding(COLORED))
    border = put(tmp_path / "d.png", png(np.array([[[0, 0, 0], [224, 224, 192]]]), 8, 2))
    with refused(DataError, str(border), "[224, 224, 192] (1 pixel)", "data.label_colors: {ignore: "):
        read_label(border, label_encoding(COLORED))


@pytest.mark.parametrize(
    ("name", "color", "channels"), [("RGB", 2, 3), ("gray with alpha", 4, 2), ("RGB with", 6, 4)]
)
def test_16_bit_labels_must_have_one_channel(tmp_path: Path, name: str, color: int, channels: int):
    path = put(tmp_path / "a.png", png(random_values(16, channels), 16, color))
    with refused(DataError, str(path), f"16-bit {name}"):
        read_label(path)


def test_files_that_cannot_be_labels_are_refused(tmp_path: Path):
    colors = put(tmp_path / "a.tif", tiff(random_values(16, 3), 16, 2))
    with refused(DataError, str(colors), "16 bits"):
        read_label(colors, label_encoding(COLORED))
    floats = put(tmp_path / "b.tif", tiff(np.array([[0, 1.5], [2, 3]]), 32, kind=3))
    with refused(DataError, str(floats), "1.5", "whole numbers"):
        read_label(floats)
    for value, kind in ((-1, 2), (65536, 1)):
        wide = put(tmp_path / "c.tif", tiff(np.array([[0, value]]), 32, kind=kind))
        with refused(DataError, str(wide), f"{min(0, value)} to {max(0, value)}", "65535"):
            read_label(wide)
    wide = put(tmp_path / "c.tif", tiff(np.array([[0, 7]]), 32, kind=2))
    assert read_label(wide).tolist() == [[0, 7]]
    soft = put(
        tmp_path / "d.tif",
        with_pillow(Image.fromarray(np.zeros((9, 9), np.uint8)), "TIFF", compression="jpeg"),
    )
    with refused(DataError, str(soft), "JPEG", "LZW"):
        read_label(soft)
    lossy = put(tmp_path / "d.jpg", with_pillow(Image.fromarray(np.zeros((9, 9), np.uint8)), "JPEG"))
    with refused(DataError, str(lossy), "JPEG", "PNG"):
        read_label(lossy)
    for name, data in {"e.png": b"", "f.png": b"no image", "g.mat": b"", "h.mat": b"no mat"}.items():
        fact = ".mat" if name.endswith(".mat") else "PNG, BMP"
        with refused(DataError, str(tmp_path / name), fact, vary=[r"\((?:MatReadError|IndexError).*?\)"]):
            read_label(put(tmp_path / name, data))


def test_whole_numbers_of_any_type_are_labels(tmp_path: Path):
    values = random_values(8)
    values[0, 0] = -9999
    expected = np.where(values == -9999, IGNORE, values)
    for type in (np.int16, np.int32, np.float32, np.float64):
        tifffile.imwrite(tmp_path / "a.tif", values.astype(type), extratags=[(42113, 2, 0, "-9999", True)])
        assert np.array_equal(read_label(tmp_path / "a.tif"), expected), type
    numbers = np.where(values == -9999, np.nan, values).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", numbers, compression="deflate")
    assert np.array_equal(read_label(tmp_path / "a.tif"), expected)
    # A value that may be a class is one, whatever GDAL says about it.
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((H, W), np.uint8), extratags=[(42113, 2, 0, "0", True)])
    assert (read_label(tmp_path / "a.tif") == 0).all()


# SBD


def test_sbd_files_are_read(tmp_path: Path):
    label = RANDOM.integers(0, 21, (H, W), np.uint8)
    write_mat(tmp_path / "a.mat", label)
    read = read_label(tmp_path / "a.mat")
    assert read.dtype == np.uint8 and read.flags.c_contiguous and np.array_equal(read, label)
    assert np.array_equal(read_label(tmp_path / "a.mat", label_encoding(VOC, format="color")), label)


def test_mat_files_of_other_origin_are_refused(tmp_path: Path):
    from scipy.io import savemat

    contents = {
        "other": {"x": np.zeros(3)},
        "instances": {"GTinst": {"Segmentation": np.zeros((2, 2), np.uint8)}},
        "floats": {"GTcls": {"Segmentation": np.zeros((2, 2))}},
        "cells": {"GTcls": {"Segmentation": np.array([[1, "a"]], object)}},
        "deep": {"GTcls": {"Segmentation": np.full((2, 2), 300, np.uint16)}},
        "negative": {"GTcls": {"Segmentation": np.full((2, 2), -1, np.int16)}},
        "cube": {"GTcls": {"Segmentation": np.zeros((2, 2, 2), np.uint8)}},
        "empty": {"GTcls": {"Segmentation": np.zeros((0, 0), np.uint8)}},
    }
    for name, content in contents.items():
        savemat(tmp_path / f"{name}.mat", content)
        with pytest.raises(DataError, match=rf"{name}\.mat: .*SBD"):
            read_label(tmp_path / f"{name}.mat")
    with refused(
        DataError, str(tmp_path / "other.mat"), "GTcls.Segmentation", "benchmark_RELEASE/dataset/cls"
    ):
        read_label(tmp_path / "other.mat")


def test_sbd_files_need_scipy(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with refused(DataError, str(tmp_path / "a.mat"), 'pip install "darseg[sbd]"', vary=[r"\(import .*?\)"]):
        read_label(put(tmp_path / "a.mat", b"x"))


# Damage


def sound_files() -> dict[str, tuple[bytes, Callable[[Path], np.ndarray]]]:
    values, colors = random_values(2), random_values(8, 3).astype(np.uint8)
    small = Image.fromarray(values.astype(np.uint8))
    picture = Image.fromarray(colors)
    palette = chunk(b"PLTE", bytes(range(12)))
    scipy_file = io.BytesIO()
    write_mat(scipy_file, RANDOM.integers(0, 21, (H, W), np.uint8))  # type: ignore[arg-type]
    return {
        "gray.png": (png(values, 2), read_label),
        "palette.png": (png(values, 2, 3, palette), read_label),
        "color.png": (png(colors, 8, 2), read_image),
        "deep.png": (png(random_values(16), 16), read_image),
        "a.jpg": (with_pillow(picture, "JPEG"), read_image),
        "a.webp": (with_pillow(picture, "WEBP"), read_image),
        "lossless.webp": (with_pillow(picture, "WEBP", lossless=True), read_image),
        "image.bmp": (bmp(colors, 24, np.empty((0, 3))), read_image),
        "label.bmp": (bmp(values, 8, np.array([[3, 1, 2]] * 4)), read_label),
        "image.tif": (with_pillow(picture, "TIFF"), read_image),
        "deep.tif": (tiff(random_values(16, 3), 16, 2), read_image),
        "label.tif": (tiff(values, 4), read_label),
        "lzw.tif": (with_pillow(small, "TIFF", compression="tiff_lzw"), read_label),
        "deflate.tif": (with_pillow(picture, "TIFF", compression="tiff_deflate"), read_image),
        "a.mat": (scipy_file.getvalue(), read_label),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", sound_files())
def test_damaged_files_are_refused_or_read_correctly(tmp_path: Path, name: str):
    """A file that is cut off or altered gives an error that names it, never another exception or a crash.

    Formats with a checksum (PNG, SBD's .mat) are never read wrongly.
    """
    data, read = sound_files()[name]
    path = put(tmp_path / name, data)
    sound = read(path)
    for share in (0.1, 0.3, 0.5, 0.8):
        put(path, data[: int(len(data) * share)])
        with pytest.raises(DataError, match=name):
            read(path)
    generator, same = random.Random(3), 0
    for _ in range(120):
        at = generator.randrange(len(data) if generator.random() < 0.6 else min(len(data), 150))
        changed = bytearray(data)
        match generator.randrange(3):
            case 0:
                changed[at] ^= 1 << generator.randrange(8)
            case 1:
                changed[at:at] = bytes([generator.randrange(256)])
            case 2:
                changed[at : at + 8] = bytes(8)
        try:
            read_now = read(put(path, bytes(changed)))
        except DataError as error:
            assert str(path) in str(error)
            continue
        if name.endswith((".png", ".mat")):
            assert np.array_equal(read_now, sound)
            same += 1
    assert not name.endswith(".png") or same < 20


def test_a_png_without_an_image_is_refused(tmp_path: Path):
    for data in (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), b"\x89PNG\r\n\x1a\nIEND", b"\x89PNG"):
        path = put(tmp_path / "a.png", data)
        for read in (read_image, read_label):
            with pytest.raises(DataError, match=r"a\.png: this file is (damaged|cut off)"):
                read(path)


# What `darseg check` reports


def manifest_of(folder: Path, *labels: Path, encoding=PLAIN, classes=CLASSES, shape=(6, 8)) -> Manifest:
    image = folder / "image.png"
    assert cv2.imwrite(str(image), np.zeros((*shape, 3), np.uint8))
    samples = tuple(Sample(path.stem, image, path, encoding=encoding) for path in labels)
    return Manifest(classes, samples, (), validation=())


def recipe_of(folder: Path, classes: object, *labels: bytes, suffix: str = ".png", **data: object):
    """A recipe file and a data set of these label files, with different images of the same sizes."""
    for role, start in (("labels", 0), ("more", len(labels))):
        for index, content in enumerate(labels):
            path = put(folder / "labels" / f"{start + index}{suffix}", content)
            try:
                height, width = Image.open(path).size[::-1]
            except OSError:
                height, width = H, W
            put(folder / "images" / f"{start + index}.png", png(np.full((height, width), start + index)))
        ids = [str(start + index) for index in range(len(labels))]
        (folder / ("labeled.txt" if role == "labels" else "validation.txt")).write_text("\n".join(ids))
    put(folder / "images" / "u.png", png(np.full((H, W), 200)))
    (folder / "unlabeled.txt").write_text("u")
    recipe = recipe_dict(folder)
    recipe["data"] |= {"classes": classes, **data}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def stripes(*values: int) -> np.ndarray:
    return np.repeat(np.array([values]), 4, 0)


THREE, TWO = ["field", "road", "house"], ["no", "yes"]
MISTAKES = {
    "masks": (TWO, [png(stripes(0, 255))], ["no", "data.label_values: binary"], {"label_values": "binary"}),
    "masks of three": (
        THREE,
        [png(stripes(0, 255))],
        ["data.label_values: {0: field, 255: …}"],
        {"label_values": {0: "field", 255: "road"}},
    ),
    "counted from one": (
        THREE,
        [png(stripes(1, 2, 3))],
        ["data.label_values: one_based", "data.ignore: 3"],
        {"label_values": "one_based"},
    ),
    "shifted, 0 is not labeled": (
        THREE,
        [png(stripes(0, 1, 2, 3))],
        ["data.label_values: one_based", "data.ignore: 3"],
        {"label_values": "one_based"},
    ),
    "last is not labeled": (
        THREE,
        [png(stripes(0, 1, 2, 3))],
        ["data.label_values: one_based", "data.ignore: 3"],
        {"ignore": 3},
    ),
    "spread grays": (
        THREE,
        [png(stripes(0, 100, 200))],
        ["3", "data.label_values: {0: …, 100: …, 200: …}"],
        {"label_values": {0: "field", 100: "road", 200: "house"}},
    ),
    "cityscapes ids": (
        "cityscapes",
        [png(stripes(*range(34)))],
        ["data.label_values: cityscapes_ids"],
        {"label_values": "cityscapes_ids"},
    ),
    "some cityscapes ids": (
        "cityscapes",
        [png(stripes(0, 1, 3, 7, 8, 11, 17, 20, 21, 22, 23, 24, 26, 27))],
        ["data.label_values: cityscapes_ids"],
        {"label_values": "cityscapes_ids"},
    ),
    "colors as gray": (
        {"sky": [70, 130, 180], "road": [128, 64, 128], "car": [0, 0, 142]},
        [png(stripes(118, 90, 16))],
        ["16 as car, 90 as road, 118 as sky", "data.label_format: color", "data.label_values"],
        {"label_values": {118: "sky", 90: "road", 16: "car"}},
    ),
    "colors without a table": (
        THREE,
        [png(np.array([[[0, 0, 0], [1, 2, 3], [4, 5, 6]]]), 8, 2)],
        ["data.classes: {name: [red, green, blue]}"],
        {"classes": {"field": [0, 0, 0], "road": [1, 2, 3], "house": [4, 5, 6]}},
    ),
    "a border": (
        {"field": [0, 0, 0], "road": [1, 2, 3], "house": [4, 5, 6]},
        [png(np.array([[[0, 0, 0], [1, 2, 3], [4, 5, 6], [224, 224, 192]]]), 8, 2)],
        ["[224, 224, 192]", "data.label_colors: {ignore: [[0, 0, 0]]}"],
        {"label_colors": {"ignore": [[224, 224, 192]]}},
    ),
    "an index map as RGB": (
        THREE,
        [png(gray(stripes(0, 1, 2)), 8, 2)],
        ["data.label_format: index"],
        {"label_format": "index"},
    ),
    "a palette of colors that differ from file to file": (
        {"field": [0, 0, 0], "road": [1, 2, 3]},
        [png(stripes(0, 0, 7), 8, 3, chunk(b"PLTE", bytes([*[0] * 21, 1, 2, 3])))],
        ["2", "data.label_values: {0: …, 7: …}"],
        {"label_format": "color"},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_usual_mistakes_are_reported_and_the_remedy_works(tmp_path: Path, call, mistake: str):
    classes, labels, facts, remedy = copy.deepcopy(MISTAKES[mistake])
    path = recipe_of(tmp_path, classes, *labels)
    findings = check(load_recipe(path))
    assert findings.faults
    says("\n".join([*findings.faults, *findings.warnings]), *facts)
    code, out, err = call("check", path)
    assert code == 2 and all("".join(fact.split()) in "".join((out + err).split()) for fact in facts)
    fixed = check(
        load_recipe(recipe_of(tmp_path / "fixed", remedy.pop("classes", classes), *labels, **remedy))
    )
    assert fixed.faults == (), fixed.faults
    assert not any("label_" in warning or "data.ignore" in warning for warning in fixed.warnings)
    assert sum(fixed.pixels["labeled"][:-1]) > 0


SOUND = {
    "classes": (THREE, stripes(0, 1, 2)),
    "with ignored": (THREE, stripes(0, 1, 2, 255)),
    "two": (TWO, stripes(0, 1)),
    "two with ignored": (TWO, stripes(0, 1, 255)),
    "all of cityscapes": ("cityscapes", stripes(*range(19), 255)),
    "all of voc": ("voc", stripes(*range(21), 255)),
    "255 classes": ([f"class {k}" for k in range(255)], stripes(*range(256))),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_labels_raise_no_false_alarm(tmp_path: Path, case: str):
    classes, values = SOUND[case]
    findings = check(load_recipe(recipe_of(tmp_path, classes, png(values), png(values[::-1]))))
    assert findings.faults == () and findings.warnings == () and findings.notes[1:] == ()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_values_that_are_classes_are_not_reported_as_a_mistake(data):
    """Any combination of classes and 255 that has class 0 and class 1 is not reported."""
    count = data.draw(st.integers(2, 40))
    classes = data.draw(st.sampled_from([CITYSCAPES, VOC, class_set([f"class {k}" for k in range(count)])]))
    seen = data.draw(st.sets(st.sampled_from([*range(len(classes)), 255]))) | {
        0,
        data.draw(st.integers(1, 1)),
    }
    for encoding in (PLAIN, label_encoding(classes), label_encoding(classes, ignore=254)):
        assert usual_mistakes(seen, classes, encoding) == []


def test_an_absent_class_0_is_a_warning(tmp_path: Path):
    findings = check(load_recipe(recipe_of(tmp_path, THREE, png(stripes(1, 2)))))
    assert findings.faults == ()
    says(findings.warnings[0], "0", "field", "data.label_values: one_based")
    # It is not a fault if there is another one, either.
    path = recipe_of(tmp_path / "b", THREE, png(stripes(1, 2)))
    put(tmp_path / "b" / "images" / "u.png", b"")
    findings = check(load_recipe(path))
    assert len(findings.faults) == 1 and "u.png" in findings.faults[0]


def test_values_are_not_called_absent_if_labels_are_unreadable(tmp_path: Path):
    """The absent values may be in these files."""
    for values in (stripes(0, 255), stripes(1)):
        path = recipe_of(tmp_path, TWO, png(values), png(stripes(0, 1)))
        for name in ("1", "3"):
            put(tmp_path / "labels" / f"{name}.png", b"broken")
        findings = check(load_recipe(path))
        assert [Path(fault.split(":")[0]).name for fault in findings.faults] == ["1.png", "3.png"]
        assert not any("label_values" in line for line in (*findings.faults, *findings.warnings))


def test_mat_and_png_labels_of_voc_are_checked_together(tmp_path: Path):
    truth = draw_voc(tmp_path / "VOC2012", sbd=tmp_path / "VOC2012" / "SBD")
    root = tmp_path / "VOC2012"
    samples = [
        Sample(name, root / "JPEGImages" / f"{name}.jpg", root / "SBD" / "cls" / f"{name}.mat")
        for name in VOC_FURTHER
    ]
    findings = examine(Manifest(VOC, tuple(samples), (), validation=()))
    assert findings.faults == ()
    counts = sum(np.bincount(truth[name].reshape(-1), minlength=256) for name in VOC_FURTHER)
    assert findings.pixels["labeled"].tolist() == [*counts[:21], counts[255]]


def test_the_palette_of_voc_holds_its_class_colors():
    colors = np.array(voc_palette()).reshape(256, 3)
    assert [tuple(color) for color in colors[:21].tolist()] == list(VOC.colors)
    assert colors[255].tolist() == [224, 224, 192]
