"""Annotation files of other tools become label maps: slow painters, laws of order, every fault, the command."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import darseg
from conftest import write_png
from darseg.annotate.annotations import (
    CITYSCAPES_VOID,
    AnnotatedImage,
    Region,
    paint,
    read_annotations,
)
from darseg.annotate.rasterize import Rasterized, rasterize_folder
from darseg.config.text import load_recipe
from darseg.data.classes import CAMVID, CITYSCAPES, VOC
from darseg.errors import DarsegError, DataError, RunError

HEIGHT, WIDTH = 8, 10


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_map(path: Path) -> np.ndarray:
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert label is not None and label.dtype == np.uint8 and label.ndim == 2
    return label


def images_of(path: Path, **options: Any) -> list[AnnotatedImage]:
    found = list(read_annotations(path, **options).images())
    assert not [one for one in found if isinstance(one, str)], found
    return [one for one in found if isinstance(one, AnnotatedImage)]


def painted(path: Path, index: dict[str, int], **options: Any) -> np.ndarray:
    """The label map of the only image."""
    (image,) = images_of(path, **options)
    label = paint(image, index)
    assert isinstance(label, np.ndarray), label
    return label


def lines_of(path: Path, **options: Any) -> list[str]:
    """All faults, of reading and of drawing, without the folder."""
    lines: list[str] = []
    for one in read_annotations(path, **options).images():
        drawn = [one] if isinstance(one, str) else paint(one, {})
        lines += drawn if isinstance(drawn, list) else []
    return [line.replace(f"{path.parent}/", "") for line in lines]


def rasterize(path: Path, out: Path, **options: Any) -> Rasterized:
    return rasterize_folder(path, out, **options)


# Files as the tools write them


def coco(*annotations: dict, categories: Iterable[str] = ("car", "road"), **more: Any) -> dict:
    """One image, 8 x 10; categories get the ids 10, 20, …, and are listed backwards."""
    listed = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(categories)]
    return {
        "images": [{"id": 1, "file_name": "street/x.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": listed[::-1],
        "annotations": [{"id": k, "image_id": 1, **one} for k, one in enumerate(annotations)],
    } | more


def runs(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, the first outside."""
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def run_lengths(mask: np.ndarray, compressed: bool) -> dict:
    if not compressed:
        return {"size": list(mask.shape), "counts": runs(mask)}
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def labelme(*shapes: dict, **more: Any) -> dict:
    image = {"imagePath": "x.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
    return {"version": "5.4.1", "flags": {}, "shapes": list(shapes)} | image | more


def shape(label: str, points: Any, kind: str | None = "polygon", **more: Any) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}} | more


def cityscapes(*objects: dict, **more: Any) -> dict:
    return {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": list(objects)} | more


def square(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def cvat(*shapes: str, name: str = "street/x.jpg", size: str = 'width="10" height="8"') -> str:
    body = "\n".join(shapes)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta/>'
        f'<image id="0" name="{name}" {size}>{body}</image></annotations>'
    )


def panoptic(folder: Path, ids: np.ndarray, segments: dict[int, int], **more: Any) -> Path:
    """`pan.json` and `pan/x.png`; segments: id → category id."""
    parts = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    write_png(folder / "pan" / "x.png", parts)
    listed = [{"id": number, "category_id": category} for number, category in segments.items()]
    content = coco() | {"annotations": [{"image_id": 1, "file_name": "x.png", "segments_info": listed}]}
    return write_json(folder / "pan.json", content | more)


# Polygons, pixel by pixel


def nearest(value: float) -> int:
    return floor(Fraction(value) + Fraction(1, 2))


def covers(corners: list[tuple[int, int]], x: int, y: int) -> tuple[bool, bool]:
    """Whether a pixel must be filled (on the outline, or inside by the even-odd rule), and whether it may be (within
    half a pixel of an edge, along the axis in which the edge is flatter)."""
    on, inside, near = False, False, False
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = x2 - x1, y2 - y1
        flat = abs(dx) >= abs(dy)
        low, high, at = (min(x1, x2), max(x1, x2), x) if flat else (min(y1, y2), max(y1, y2), y)
        if low <= at <= high:
            if flat:
                off = abs(y - (y1 + Fraction(dy * (x - x1), dx or 1)))
            else:
                off = abs(x - (x1 + Fraction(dx * (y - y1), dy)))
            on, near = on or off == 0, near or off <= Fraction(1, 2)
        if (y1 > y) != (y2 > y) and x < x1 + Fraction(dx * (y - y1), dy):
            inside = not inside
    return on or inside, on or inside or near


coordinates = st.floats(-12, 22, width=32) | st.integers(-24, 44).map(lambda n: n / 2)
polygons = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=7)


@settings(max_examples=200, deadline=None)
@given(polygons)
def test_a_polygon_covers_the_pixels_inside_and_on_its_outline(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]]
) -> None:
    path = write_json(tmp_path_factory.mktemp("p") / "x.json", labelme(shape("a", points)))
    label = painted(path, {"a": 7})
    assert label.shape == (HEIGHT, WIDTH)
    corners = [(nearest(x), nearest(y)) for x, y in points]
    for y in range(HEIGHT):
        for x in range(WIDTH):
            must, may = covers(corners, x, y)
            assert not must or label[y, x] == 7, (x, y)
            assert may or label[y, x] == 255, (x, y)


@settings(max_examples=60, deadline=None)
@given(polygons, st.integers(-9, 9), st.integers(-9, 9))
def test_a_polygon_is_the_same_wherever_it_lies(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]], right: int, down: int
) -> None:
    folder = tmp_path_factory.mktemp("p")
    halves = [(floor(2 * x) / 2, floor(2 * y) / 2) for x, y in points]  # so that moving is exact
    moved = [(x + right, y + down) for x, y in halves]
    size = {"imageHeight": 60, "imageWidth": 60}
    whole = painted(write_json(folder / "a.json", labelme(shape("a", halves), **size)), {"a": 1})
    other = painted(write_json(folder / "b.json", labelme(shape("a", moved), **size)), {"a": 1})
    a = whole[max(0, -down) : 60 - max(0, down), max(0, -right) : 60 - max(0, right)]
    b = other[max(0, down) : 60 - max(0, -down), max(0, right) : 60 - max(0, -right)]
    assert np.array_equal(a, b)


def test_coordinates_are_rounded_and_edges_belong(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "x.json",
        labelme(shape("a", [[1.5, 1.49], [4.49, 1.49], [4.49, 3.5], [1.5, 3.5]])),
    )
    wanted = np.full((HEIGHT, WIDTH), 255)
    wanted[1:5, 2:5] = 0
    assert np.array_equal(painted(path, {"a": 0}), wanted)


# COCO

masks = st.integers(0, 2**32).map(
    lambda seed: np.random.default_rng(seed).random((HEIGHT, WIDTH)) < (seed % 11) / 10
)


@settings(max_examples=80, deadline=None)
@given(masks, st.booleans())
def test_run_lengths_make_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, compressed: bool
) -> None:
    content = coco({"category_id": 20, "segmentation": run_lengths(mask, compressed), "iscrowd": 1})
    path = write_json(tmp_path_factory.mktemp("c") / "c.json", content)
    assert np.array_equal(painted(path, {"road": 3}), np.where(mask, 3, 255))


def test_long_runs_make_a_round_trip(tmp_path: Path) -> None:
    mask = np.zeros((900, 1100), bool)
    mask[17:800, 3:1000] = True
    mask[200, 500] = False
    image = [{"id": 1, "file_name": "x.jpg", "height": 900, "width": 1100}]
    content = coco({"category_id": 10, "segmentation": run_lengths(mask, True)}, images=image)
    assert np.array_equal(painted(write_json(tmp_path / "c.json", content), {"car": 0}) == 0, mask)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12))
def test_damaged_run_lengths_are_a_fault_and_nothing_worse(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    content = coco({"category_id": 10, "segmentation": {"size": [HEIGHT, WIDTH], "counts": text}})
    lines = lines_of(write_json(tmp_path_factory.mktemp("c") / "c.json", content))
    assert len(lines) <= 1 and all(line.startswith("c.json: annotations[0]: ") for line in lines)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(masks, st.sampled_from([10, 20, 30])), max_size=5), st.randoms())
def test_the_order_of_coco_annotations_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, claims: list[tuple[np.ndarray, int]], random: Any
) -> None:
    annotations = [
        {"category_id": number, "segmentation": run_lengths(mask, random.random() < 0.5)}
        for mask, number in claims
    ]
    shuffled = random.sample(annotations, len(annotations))
    folder = tmp_path_factory.mktemp("c")
    index = {"car": 0, "road": 1}  # the third category is no class
    names = ("car", "road", "sky")
    label, again = (
        painted(write_json(folder / name, coco(*one, categories=names)), index)
        for name, one in (("a.json", annotations), ("b.json", shuffled))
    )
    assert label.tobytes() == again.tobytes()
    for y in range(HEIGHT):
        for x in range(WIDTH):
            claimed = {number for mask, number in claims if mask[y, x]}
            wanted = {10: 0, 20: 1, 30: 255}[claimed.pop()] if len(claimed) == 1 else 255
            assert label[y, x] == wanted


def test_coco_polygons_are_drawn_as_pycocotools_draws_them(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    rng = np.random.default_rng(0)
    annotations = [
        {"category_id": 10, "segmentation": rng.uniform(-5, 15, (n, 8)).round(2).tolist()} for n in (1, 3, 2)
    ]
    for k, annotation in enumerate(annotations):
        path = write_json(tmp_path / f"{k}.json", coco(annotation))
        theirs = COCO(str(path))
        assert np.array_equal(painted(path, {"car": 1}) == 1, theirs.annToMask(theirs.anns[0]) == 1)
    path = write_json(
        tmp_path / "s.json", coco({"category_id": 10, "segmentation": [[2, 2, 5, 2, 5, 4, 2, 4]]})
    )
    wanted = np.full((HEIGHT, WIDTH), 255)
    wanted[2:4, 2:5] = 0  # half open, unlike cv2.fillPoly
    assert np.array_equal(painted(path, {"car": 0}), wanted)


def test_categories_of_one_name_are_one_class(tmp_path: Path) -> None:
    part = np.zeros((HEIGHT, WIDTH), bool)
    part[:4] = True
    both = [{"category_id": n, "segmentation": run_lengths(part, True)} for n in (10, 30)]
    path = write_json(tmp_path / "c.json", coco(*both, categories=("car", "road", "car")))
    result = rasterize(path, tmp_path / "out")
    assert result.classes == ("car", "road") and result.pixels.tolist() == [40, 0, 40]


def test_polygons_want_pycocotools_and_run_lengths_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    whole = {"category_id": 10, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 80]}}
    assert (painted(write_json(tmp_path / "r.json", coco(whole)), {"car": 0}) == 0).all()
    drawn = {"category_id": 10, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    with pytest.raises(DarsegError, match=r'could not be imported.*pip install "darseg\[coco\]"'):
        rasterize(write_json(tmp_path / "p.json", coco(drawn)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# COCO panoptic


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 2**24 - 1), min_size=1, max_size=6, unique=True))
def test_panoptic_ids_become_their_categories(
    tmp_path_factory: pytest.TempPathFactory, seed: int, numbers: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, *numbers], (HEIGHT, WIDTH))
    segments = {number: int(rng.choice([10, 20])) for number in numbers}
    path = panoptic(tmp_path_factory.mktemp("pan"), ids, segments)
    label = painted(path, {"car": 4, "road": 9})
    wanted = [[{0: 255, 10: 4, 20: 9}[segments.get(v, 0)] for v in row] for row in ids.tolist()]
    assert label.tolist() == wanted


def test_the_folder_of_panoptic_pngs_can_be_named(tmp_path: Path) -> None:
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 70000), {70000: 10})
    (tmp_path / "pan").rename(tmp_path / "elsewhere")
    at = "pan.json: annotations[0]: pan/x.png does not exist. Put the PNGs there, or name their folder "
    assert lines_of(path) == [at + "(--panoptic-folder)"]
    assert (painted(path, {"car": 1}, panoptic_folder=tmp_path / "elsewhere") == 1).all()


def test_void_is_the_background_when_there_is_one(tmp_path: Path) -> None:
    ids = np.zeros((HEIGHT, WIDTH), int)
    ids[0] = 5
    path = panoptic(tmp_path, ids, {5: 20})
    assert rasterize(path, tmp_path / "a").pixels.tolist() == [0, 10, 70]
    result = rasterize(path, tmp_path / "b", background="rest")
    assert result.classes == ("rest", "car", "road") and result.pixels.tolist() == [70, 0, 10, 0]


# labelme


def test_later_labelme_shapes_lie_on_top(tmp_path: Path) -> None:
    shapes = [shape("a", square(0, 0, 5, 5)), shape("b", square(3, 3, 9, 7))]
    index = {"a": 0, "b": 1}
    label = painted(write_json(tmp_path / "x.json", labelme(*shapes)), index)
    assert label[4, 4] == 1 and label[0, 0] == 0 and label[0, 9] == 255
    label = painted(write_json(tmp_path / "y.json", labelme(*shapes[::-1])), index)
    assert label[4, 4] == 0


def test_the_kinds_of_labelme_shapes(tmp_path: Path) -> None:
    bits = np.array([[1, 0, 1], [0, 1, 1]], np.uint8) * 255
    text = base64.b64encode(cv2.imencode(".png", bits)[1].tobytes()).decode()
    kinds = [
        (shape("a", square(1, 1, 3, 2), None), [(x, y) for x in (1, 2, 3) for y in (1, 2)]),
        (shape("a", [[3, 2], [1, 1]], "rectangle"), [(x, y) for x in (1, 2, 3) for y in (1, 2)]),
        (
            shape("a", [[4, 3], [4, 5.5]], "circle"),
            [(x, y) for x in range(10) for y in range(8) if (x - 4) ** 2 + (y - 3) ** 2 <= 6.25],
        ),
        (
            shape("a", [[-1, 0], [-1, 2]], "circle"),
            [(x, y) for x in range(10) for y in range(8) if (x + 1) ** 2 + y**2 <= 4],
        ),
        (shape("a", [[6, 6], [8, 7]], "mask", mask=text), [(6, 6), (8, 6), (7, 7), (8, 7)]),
        (shape("a", [[8, 7], [10, 8]], "mask", mask=text), [(8, 7)]),
        (shape("a", [[-1, -1], [1, 0]], "mask", mask=text), [(0, 0), (1, 0)]),
        (shape("a", [[50, 50], [90, 60]], "rectangle"), []),
        (shape("a", [[-50, -50], [-20, -30]], "rectangle"), []),
    ]
    for k, (one, pixels) in enumerate(kinds):
        label = painted(write_json(tmp_path / f"{k}.json", labelme(one)), {"a": 1})
        assert {(int(x), int(y)) for y, x in np.argwhere(label == 1)} == set(pixels), one


def test_lines_are_no_areas_and_are_counted(tmp_path: Path) -> None:
    lines = [shape("wire", [[1, 1]] * n, kind) for n, kind in ((2, "line"), (3, "linestrip"), (1, "point"))]
    areas = [shape(name, square(0, 0, 2, 2)) for name in "ab"]
    write_json(tmp_path / "in" / "x.json", labelme(*lines, lines[0], *areas))
    result = rasterize(tmp_path / "in", tmp_path / "out")
    assert result.skipped == {"line": 2, "linestrip": 1, "point": 1}
    assert result.classes == ("a", "b") and result.pixels.tolist() == [0, 9, 71] and not result.faults


@pytest.mark.parametrize(
    ("file", "image", "wanted"),
    [
        ("x.json", "x.jpg", "x"),
        ("a/b/x.json", "y.z.png", "a/b/y.z"),
        ("a/x.json", "../images/x.jpg", "a/x"),
        ("x.json", "..\\images\\x.jpg", "x"),
        ("x.json", "C:\\photos\\x.jpg", "x"),
    ],
)
def test_a_labelme_image_is_named_by_its_file_and_the_jsons_folder(
    tmp_path: Path, file: str, image: str, wanted: str
) -> None:
    write_json(tmp_path / file, labelme(imagePath=image))
    assert [one.id for one in images_of(tmp_path)] == [wanted]


# Cityscapes


def test_cityscapes_polygons(tmp_path: Path) -> None:
    def thing(label: str, left: int, **more: Any) -> dict:
        return {"label": label, "polygon": square(left, 0, left, 7)} | more

    objects = [
        {"label": "road", "polygon": square(0, 0, 9, 7)},
        thing("cargroup", 1),
        thing("car", 2),
        thing("license plate", 2),
        thing("out of roi", 3),
        thing("polegroup", 4),
        thing("sky", 5, deleted=1),
        thing("person", 6, deleted=0),
    ]
    write_json(tmp_path / "in" / "aachen" / "aachen_0_1_gtFine_polygons.json", cityscapes(*objects))
    result = rasterize(tmp_path / "in", tmp_path / "out", classes="cityscapes")
    label = read_map(tmp_path / "out" / "aachen" / "aachen_0_1_leftImg8bit.png")
    road, car, person = (CITYSCAPES.names.index(name) for name in ("road", "car", "person"))
    assert label[3].tolist() == [road, car, car, 255, 255, road, person, road, road, road]
    assert result.skipped == {"license plate": 1} and result.recipe() == "data:\n  classes: cityscapes"
    result = rasterize(tmp_path / "in", tmp_path / "names")
    assert result.classes == ("car", "person", "road")
    result = rasterize(tmp_path / "in", tmp_path / "more", classes="road,out of roi", ignore_other=True)
    assert result.pixels.tolist() == [8 * 5, 8, 8 * 4]  # asked for, a void label is a class
    result = rasterize(
        tmp_path / "in", tmp_path / "back", classes=["car"], background="rest", ignore_other=True
    )
    assert result.pixels.tolist() == [0, 16, 64]  # annotated as something else is not background


def test_void_labels_of_cityscapes_are_no_evaluation_classes() -> None:
    assert not CITYSCAPES_VOID & set(CITYSCAPES.names)
    assert len(CITYSCAPES_VOID) + 1 + len(CITYSCAPES) == 35  # the labels of its published table


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("u/u_1_2_gtFine_polygons.json", "u/u_1_2_leftImg8bit"),
        ("u_1_2_gtCoarse_polygons.json", "u_1_2_leftImg8bit"),
        ("mine.json", "mine"),
    ],
)
def test_a_cityscapes_image_is_named_as_its_polygons(tmp_path: Path, file: str, wanted: str) -> None:
    write_json(tmp_path / file, cityscapes())
    assert [one.id for one in images_of(tmp_path)] == [wanted]


# CVAT


def test_cvat_shapes_lie_as_their_layers_say(tmp_path: Path) -> None:
    polygon = '<polygon label="a" points="0.00,0.00;4.00,0.00;4.00,3.00;0.00,3.00" z_order="{}"/>'
    box = '<box label="b" xtl="3" ytl="2" xbr="6" ybr="5"{}/>'
    tops = []
    for k, (first, second) in enumerate([("0", ""), ("1", ""), ("2", ' z_order="3"'), ("-1", "")]):
        (tmp_path / f"{k}.xml").write_text(cvat(polygon.format(first), box.format(second)))
        label = painted(tmp_path / f"{k}.xml", {"a": 0, "b": 1})
        assert label[0, 0] == 0 and label[5, 6] == 1 and label[7, 9] == 255
        tops.append(int(label[3, 3]))
    assert tops == [1, 0, 1, 1]


def test_the_kinds_of_cvat_shapes(tmp_path: Path) -> None:
    kinds = [
        ('<box label="a" xtl="1.4" ytl="1" xbr="2.6" ybr="2"/>', lambda x, y: 1 <= x <= 3 and 1 <= y <= 2),
        # A quarter turn clockwise about (4, 3).
        (
            '<box label="a" xtl="1" ytl="2" xbr="7" ybr="4" rotation="90"/>',
            lambda x, y: 3 <= x <= 5 and y <= 6,
        ),
        (
            '<ellipse label="a" cx="4" cy="3" rx="3.5" ry="1.5"/>',
            lambda x, y: ((x - 4) / 3.5) ** 2 + ((y - 3) / 1.5) ** 2 <= 1,
        ),
        (
            # Turned by 45° clockwise, the long axis runs down to the right.
            '<ellipse label="a" cx="4" cy="3" rx="4" ry="1" rotation="45"/>',
            lambda x, y: ((x - 4 + y - 3) ** 2 / 16 + (y - 3 - x + 4) ** 2) / 2 <= 1,
        ),
        (
            '<mask label="a" rle="0, 1, 2, 3" left="8" top="1" width="3" height="2"/>',
            lambda x, y: (x, y) in {(8, 1), (8, 2), (9, 2)},
        ),
        ('<mask label="a" rle="1,1" left="-1" top="0" width="2" height="1"/>', lambda x, y: (x, y) == (0, 0)),
    ]
    for k, (one, inside) in enumerate(kinds):
        (tmp_path / f"{k}.xml").write_text(cvat(one))
        label = painted(tmp_path / f"{k}.xml", {"a": 1})
        wanted = [[1 if inside(x, y) else 255 for x in range(WIDTH)] for y in range(HEIGHT)]
        assert label.tolist() == wanted, one


def test_cvat_shapes_that_are_no_areas_are_counted(tmp_path: Path) -> None:
    kinds = ("points", "polyline", "cuboid", "skeleton", "tag", "tag")
    boxes = [f'<box label="{name}" xtl="0" ytl="0" xbr="1" ybr="1"/>' for name in "ba"]
    (tmp_path / "c.xml").write_text(cvat(*(f'<{kind} label="k"/>' for kind in kinds), *boxes))
    result = rasterize(tmp_path / "c.xml", tmp_path / "out")
    assert result.skipped == {"cuboid": 1, "points": 1, "polyline": 1, "skeleton": 1, "tag": 2}
    assert result.classes == ("a", "b") and result.pixels.tolist() == [4, 0, 76]


BOMB = '<?xml version="1.0" encoding="{}"?><!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "c.xml").write_bytes(BOMB.format(encoding).encode(encoding))
    with pytest.raises(DataError, match=r"c\.xml: a document type is not read.*Remove the <!DOCTYPE"):
        read_annotations(tmp_path / "c.xml")


# Faults: files that cannot be read at all


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("x.json", '{"images": [', {}, "x.json: broken JSON (Expecting value"),
        ("x.json", "[" * 100_000, {}, "x.json: broken JSON ("),
        ("x.json", "[]", {}, "format is not recognized, found no object"),
        ("x.json", '{"b": 1, "a": 2}', {}, "is not recognized, found an object with 'a', 'b'. Wanted COCO"),
        ("x.json", "{}", {}, "an object with no keys"),
        ("x.json", "{}", {"format": "voc"}, "No annotation format 'voc': there are coco, panoptic, labelme"),
        ("x.json", "{}", {"format": "coco"}, "x.json: 'images' is missing. Wanted is a COCO file."),
        ("x.json", '{"images": {}}', {"format": "coco"}, "'images' is {}, wanted a list. Wanted is"),
        ("x.json", "3", {"format": "panoptic"}, "found 3, wanted an object with 'images'"),
        ("x.xml", "<annotations><image", {}, "x.xml: broken XML ("),
        ("x.xml", "<a/>", {}, "found <a>, wanted <annotations> as CVAT exports for images (version 1.1)"),
        ("x.xml", "<annotations><track/></annotations>", {}, "found tracks of a video, wanted <annotations>"),
        ("x.xml", "", {"format": "cvat"}, "broken XML (no element found"),
        (
            "x.json",
            '{"shapes": []}',
            {"panoptic_folder": Path("p")},
            "a panoptic folder belongs to COCO panoptic annotations, these are labelme. Leave it away.",
        ),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, options: dict, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_annotations(tmp_path / name, **options)
    assert message in str(error.value)


def test_missing_files_and_useless_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_annotations(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"no JSON files. A folder holds labelme's or Cityscapes'"):
        read_annotations(tmp_path)
    write_json(tmp_path / "c.json", coco())
    with pytest.raises(DataError, match="is a folder, but coco annotations are one file: give that file"):
        read_annotations(tmp_path, "coco")
    lines = [line for line in read_annotations(tmp_path).images() if isinstance(line, str)]
    assert lines == [
        f"{tmp_path}/c.json: coco annotations are one file for all images: give that file, not {tmp_path}"
    ]


# Faults of images, shape by shape

NO_AREA = "wanted x and y of at least 3 points. Mend or remove it"
RANGE = "wanted a number from -1048576 to 1048576"
AGAIN = "Export the mask again"


def rle(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict:
    return {"category_id": 10, "segmentation": {"size": list(size), "counts": counts}}


def drawn(*polygons: Any) -> dict:
    return {"category_id": 10, "segmentation": list(polygons)}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"category_id": 7, "segmentation": [[1] * 6]}, "'category_id' 7 is none of the categories' ids"),
        ({"category_id": True}, "'category_id' is true, wanted an integer"),
        ({"category_id": 10}, "'segmentation' is missing"),
        ({"category_id": 10, "segmentation": "a"}, "'segmentation' is \"a\", wanted a list or an object"),
        (drawn(), "'segmentation' is empty: there is no area. Remove the annotation"),
        (drawn([1, 2, 3, 4]), f"polygon 0 has 4 numbers, {NO_AREA}"),  # pycocotools would take it as a box
        (drawn([1] * 6, [1] * 7), f"polygon 1 has 7 numbers, {NO_AREA}"),
        (drawn([[1, 2], [3, 4], [5, 6]]), f"polygon 0 has 3 numbers, {NO_AREA}"),
        (drawn(3), f"polygon 0 has 3, {NO_AREA}"),
        (drawn([1, 2, 3, 4, 5, "6"]), f'found the coordinate "6", {RANGE}'),
        (drawn([1, 2, 3, 4, 5, float("nan")]), f"found the coordinate NaN, {RANGE}"),
        (drawn([1, 2, 3, 4, 5, 1e7]), f"found the coordinate 10000000.0, {RANGE}"),
        (
            rle([80], (WIDTH, HEIGHT)),
            "the mask's size is [10, 8], its image's [8, 10] (height, width). Export",
        ),
        (rle(3), "'counts' is 3, wanted a list or a text"),
        (rle([3, 4]), f"the run lengths cover 7 pixels, wanted 80 (8 x 10, height x width). {AGAIN}"),
        (rle([-3, 83]), f"run lengths must be integers from 0 on. {AGAIN}"),
        (rle([1.5, 78.5]), f"run lengths must be integers from 0 on. {AGAIN}"),
        (rle("01"), "the run lengths cover 1 pixels, wanted 80 (8 x 10, height x width)"),
        (rle("é"), f"'é' does not belong into compressed run lengths. {AGAIN}"),
        (rle("o" * 20), "'o' does not belong into compressed run lengths"),
        (rle("0o"), f"compressed run lengths end in the middle. {AGAIN}"),
    ],
)
def test_faults_of_coco_annotations(tmp_path: Path, annotation: dict, message: str) -> None:
    good = drawn([0, 0, 3, 0, 3, 3])
    (line,) = lines_of(write_json(tmp_path / "c.json", coco(good, annotation)))
    assert line.startswith(f"c.json: annotations[1]: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"file_name": "../x.jpg"},
            "the image's name '../x.jpg' is no path below a folder of images: wanted",
        ),
        ({"file_name": "/x.jpg"}, "the image's name '/x.jpg' is no path below"),
        ({"file_name": "a\\x.jpg"}, "the image's name 'a\\\\x.jpg' is no path below"),
        ({"file_name": "C:/x.jpg"}, "the image's name 'C:/x.jpg' is no path below"),
        ({"file_name": "."}, "the image's name '.' is no path below"),
        ({"file_name": ""}, "the image's name '' is no path below"),
        ({"file_name": "a\0.jpg"}, "the image's name 'a\\x00.jpg' is no path below"),
        ({"file_name": 3}, "'file_name' is 3, wanted a text"),
        ({"height": 0}, "the image's size is 0 x 10 (height x width): no image is like that"),
        ({"width": 2.5}, "the image's size is 8 x 2.5 (height x width)"),
        ({"width": float("inf")}, "the image's size is 8 x inf (height x width)"),
        ({"height": 1 << 20, "width": 1 << 20}, "the image's size is 1048576 x 1048576 (height x width)"),
        ({"height": "8"}, "'height' is \"8\", wanted an integer or a number"),
        ({"id": None}, "'id' is null, wanted an integer or a text"),
    ],
)
def test_faults_of_coco_images(tmp_path: Path, change: dict, message: str) -> None:
    content = coco()
    content["images"][0] |= change
    (line,) = lines_of(write_json(tmp_path / "c.json", content))
    assert line.startswith(f"c.json: images[0]: {message}")


def test_faults_of_a_coco_file_as_a_whole(tmp_path: Path) -> None:
    content = coco(drawn([1] * 6) | {"image_id": 9}, drawn([1] * 6) | {"image_id": [1]})
    content["images"] += [content["images"][0] | {"file_name": "y.jpg"}, "z.jpg"]
    content["categories"] += [{"id": 10, "name": "bus"}, {"id": "x", "name": "y"}, {"id": 3}]
    assert lines_of(write_json(tmp_path / "c.json", content)) == [
        "c.json: categories[2]: the id 10 is given to 'car' and to 'bus'. Give each its own",
        "c.json: categories[3]: 'id' is \"x\", wanted an integer",
        "c.json: categories[4]: 'name' is missing",
        "c.json: images[1]: the id 1 was given to an image before",
        "c.json: images[2]: found \"z.jpg\", wanted an object with 'id'",
        "c.json: annotations[0]: 'image_id' 9 is none of the images' ids",
        "c.json: annotations[1]: 'image_id' is [1], wanted an integer or a text",
    ]


def test_faults_of_panoptic_files(tmp_path: Path) -> None:
    ids = np.full((HEIGHT, WIDTH), 5)
    at = "pan.json: annotations[0]: "
    path = panoptic(tmp_path, ids + 300 * np.eye(HEIGHT, WIDTH, dtype=int), {5: 10, 6: 20})
    assert lines_of(path) == [f"{at}pan/x.png: 1 segment id(s) are not in 'segments_info': 305 (8 pixels)"]
    assert lines_of(panoptic(tmp_path, ids[1:], {5: 10})) == [
        f"{at}pan/x.png has 7 x 10 pixels, its image 8 x 10 (height x width)"
    ]
    assert lines_of(panoptic(tmp_path, ids, {5: 11})) == [
        f"{at}'category_id' 11 is none of the categories' ids"
    ]
    (line,) = lines_of(panoptic(tmp_path, ids, {5: 10, 0: 10}))
    assert line == f"{at}the segment id 0 is given twice, or is not from 1 to 16777215"
    path = panoptic(tmp_path, ids, {5: 10})
    content = json.loads(path.read_text())
    (annotation,) = content["annotations"]
    where = "pan.json: images[0]: "
    for changed, message in [
        ([], "found 0 annotations, wanted one, with its PNG and segments"),
        ([annotation, annotation], "found 2 annotations, wanted one, with its PNG and segments"),
        ([annotation | {"segments_info": []}], "'segments_info' is empty: nothing is annotated. Remove the"),
        ([annotation | {"segments_info": 3}], "'segments_info' is 3, wanted a list"),
        ([annotation | {"file_name": "../x.png"}], "the image's name '../x.png' is no path below"),
    ]:
        write_json(path, content | {"annotations": changed})
        (line,) = lines_of(path, format="panoptic")
        assert line.startswith(where + message)
    (tmp_path / "pan" / "x.png").write_bytes(b"no PNG")
    write_json(path, content)
    (line,) = lines_of(path)
    assert line.startswith(f"{at}pan/x.png: cannot be decoded")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (shape("a", [[1, 2], [3, 4]]), "found 2 point(s), wanted at least 3. Mend or remove the shape"),
        (shape("a", [[1, 2]], "rectangle"), "found 1 point(s), wanted 2. Mend or remove the shape"),
        (shape("a", square(1, 1, 2, 2), "circle"), "found 4 point(s), wanted 2. Mend or remove the shape"),
        (shape("a", None), "found null, wanted at least 3. Mend or remove the shape"),
        (shape("a", [[1, 2], [3, 4], [5]]), "found [5], wanted a point [x, y]"),
        (shape("a", [[1, 2], [3, 4], [5, None]]), f"found the coordinate null, {RANGE}"),
        (
            shape("a", square(-(10**6), -(10**6), 10**6, 10**6)),
            "a shape of 2000001 x 2000001 pixels (height x width) is too large to be drawn",
        ),
        (shape("a", [[4, 4], [4, 4]], "circle"), "the radii are 0 and 0, wanted are numbers above 0. Remove"),
        (shape("a", [], "star"), "'shape_type' is \"star\", wanted polygon, rectangle, circle or mask"),
        (shape("a", [], ["star"]), "'shape_type' is [\"star\"], wanted polygon, rectangle, circle or mask"),
        ({"points": square(1, 1, 2, 2)}, "'label' is missing"),
        ("a", "found \"a\", wanted an object with 'label'"),
        (shape("a", [[1, 1], [2, 2]], "mask"), "'mask' is missing"),
        (
            shape("a", [[1, 1], [2, 3]], "mask", mask="?"),
            "'mask' holds no image, its points span 3 x 2 (height x width)",
        ),
        (shape("a", [[1, 1], [2, 3]], "mask", mask="é"), "'mask' holds no image, its points span 3 x 2"),
        (shape("a", [[1, 1], [2, 3]], "mask", mask=""), "'mask' holds no image, its points span 3 x 2"),
        (
            shape(
                "a",
                [[1, 1], [2, 3]],
                "mask",
                mask=base64.b64encode(cv2.imencode(".png", np.eye(4, dtype=np.uint8))[1].tobytes()).decode(),
            ),
            "'mask' holds 4 x 4 pixels, its points span 3 x 2 (height x width)",
        ),
    ],
)
def test_faults_of_labelme_shapes(tmp_path: Path, one: Any, message: str) -> None:
    (line,) = lines_of(write_json(tmp_path / "x.json", labelme(shape("a", square(0, 0, 1, 1)), one)))
    assert line.startswith(f"x.json: shapes[1]: {message}")


def test_faults_of_labelme_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for change, message in [
        ({"imageHeight": None}, "x.json: 'imageHeight' is null, wanted an integer"),
        ({"imagePath": 1}, "x.json: 'imagePath' is 1, wanted a text"),
        ({"imagePath": "images/.."}, "x.json: the image's name '..' is no path below a folder of images"),
        ({"imagePath": ""}, "x.json: the image's name '' is no path below a folder of images"),
        ({"shapes": 3}, "x.json: shapes: found 3, wanted an object with 'label'"),
    ]:
        (line,) = lines_of(write_json(path, labelme(**change)))
        assert line.startswith(message)
    two = lines_of(write_json(path, labelme(shape("a", []), imageWidth=0)))
    assert [line.split(": ")[1] for line in two] == [
        "the image's size is 8 x 0 (height x width)",
        "shapes[0]",
    ]


def test_faults_of_cityscapes_files(tmp_path: Path) -> None:
    good = {"label": "car", "polygon": square(0, 0, 1, 1)}
    wrong = [{"label": "car", "polygon": [[0, 0], [1, 1]]}, {"polygon": []}, {"label": "car"}, 7]
    path = write_json(tmp_path / "c.json", cityscapes(good, *wrong, {"deleted": 1}, imgWidth="x"))
    assert lines_of(path) == [
        "c.json: 'imgWidth' is \"x\", wanted an integer",
        "c.json: objects[1]: found 2 point(s), wanted at least 3. Mend or remove the shape",
        "c.json: objects[2]: 'label' is missing",
        "c.json: objects[3]: 'polygon' is missing",
        "c.json: objects[4]: found 7, wanted an object with 'label'",
    ]
    assert lines_of(write_json(path, labelme()), format="cityscapes") == [
        "c.json: 'imgHeight' is missing",
        "c.json: objects: found null, wanted an object with 'label'",
    ]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ('<polygon label="a" points="1,2;3,4"/>', "found 2 point(s), wanted at least 3. Mend or remove"),
        ('<polygon label="a" points="1,2;3,4;5"/>', "found [5.0], wanted a point [x, y]"),
        ('<polygon label="a" points="1,2;3,4;5,y"/>', f"'points' holds \"y\", {RANGE}"),
        ('<polygon label="a"/>', "the attribute 'points' is missing"),
        ('<polygon points="1,2;3,4;5,6"/>', "the attribute 'label' is missing"),
        ('<box label="a" xtl="1" ytl="nan" xbr="3" ybr="4"/>', f"'ytl' holds \"nan\", {RANGE}"),
        (
            '<box label="a" xtl="1" ytl="2" xbr="3" ybr="4" z_order="top"/>',
            f"'z_order' holds \"top\", {RANGE}",
        ),
        ('<ellipse label="a" cx="1" cy="1" rx="0" ry="-1"/>', "the radii are 0 and -1, wanted are numbers"),
        ('<star label="a"/>', "found <star>, wanted <polygon>, <box>, <ellipse> or <mask>"),
        (
            '<mask label="a" rle="1,x" left="1" top="1" width="1" height="2"/>',
            f"'rle' holds \"1,x\", wanted run lengths. {AGAIN}",
        ),
        (
            '<mask label="a" rle="1,2" left="1" top="1" width="1" height="2"/>',
            f"the run lengths cover 3 pixels, wanted 2 (2 x 1, height x width). {AGAIN}",
        ),
        (
            '<mask label="a" rle="1" left="1" top="1" width="-1" height="-1"/>',
            "the mask is -1 x -1 pixels (height x width). Export it again",
        ),
        ('<mask label="a" left="1" top="0.5" width="1" height="1"/>', "'top' holds 0.5, wanted an integer"),
    ],
)
def test_faults_of_cvat_shapes(tmp_path: Path, one: str, message: str) -> None:
    good = '<box label="a" xtl="1" ytl="2" xbr="3" ybr="4" z_order="1"/>'
    (tmp_path / "c.xml").write_text(cvat(good, one))
    (line,) = lines_of(tmp_path / "c.xml")
    kind = one[1:].split()[0]
    assert line.startswith(f"c.xml: image[0], {kind}[1]: {message}")


def test_faults_of_cvat_images(tmp_path: Path) -> None:
    (tmp_path / "c.xml").write_text(cvat(size='width="10"'))
    assert lines_of(tmp_path / "c.xml") == ["c.xml: image[0]: the attribute 'height' is missing"]
    (tmp_path / "c.xml").write_text(cvat(name="../x.jpg"))
    (line,) = lines_of(tmp_path / "c.xml")
    assert line.startswith("c.xml: image[0]: the image's name '../x.jpg' is no path below")


def test_a_painter_collects_each_fault_once() -> None:
    def fail() -> Any:
        raise DataError("no")

    regions = tuple(Region("a", where, fail) for where in ("here", "there", "here"))
    assert paint(AnnotatedImage("x", "f", 2, 3, regions, True), {"a": 0}) == ["here: no", "there: no"]


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good labelme files, and three bad ones."""
    root = tmp_path / "in"
    write_json(root / "a.json", labelme(shape("road", square(0, 0, 9, 3)), imagePath="a.jpg"))
    write_json(root / "s" / "b.json", labelme(shape("car", square(1, 1, 2, 2)), imagePath="b.jpg"))
    write_json(root / "bad" / "c.json", labelme(shape("car", [[1, 1]]), shape("car", []), imagePath="c.jpg"))
    write_json(root / "bad" / "d.json", labelme(shape("car", square(0, 0, 1, 1)), imagePath="e.jpg"))
    write_json(root / "bad" / "e.json", labelme(shape("car", square(0, 0, 1, 1)), imagePath="E.png"))
    (root / "bad" / "f.json").write_text("{")
    return root


def test_the_good_images_are_written_and_all_faults_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = rasterize(folder, out)
    assert sorted(tree(out)) == ["a.png", "classes.yaml", "s/b.png"]
    assert (out / "classes.yaml").read_text() == (
        "classes: [car, road]\npixels:\n  car: 4\n  road: 40\nnot_labeled: 116\nimages: 2\n"
    )
    bad = f"{folder}/bad"
    assert [line.split(". ")[0] for line in result.faults[:2]] == [
        f"{bad}/c.json: shapes[0]: found 1 point(s), wanted at least 3",
        f"{bad}/c.json: shapes[1]: found 0 point(s), wanted at least 3",
    ]
    assert result.faults[2].startswith(f"{bad}/f.json: broken JSON (")
    assert result.faults[3:] == (
        f"2 images differ by no more than suffix and case: bad/e ({bad}/d.json) and bad/E ({bad}/e.json). "
        "Rename all but one",
    )
    assert result.images == 2 and result.pixels.tolist() == [4, 40, 116]
    wanted = np.full((HEIGHT, WIDTH), 255)
    wanted[:4] = 1
    assert np.array_equal(read_map(out / "a.png"), wanted)


def test_a_rerun_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, before = rasterize(folder, out), tree(out)
    (out / "a.png").write_bytes(b"damaged")
    (out / "s" / "b.png.part").write_bytes(b"half")
    again = rasterize(folder, out)
    assert tree(out) == before and first.faults == again.faults
    rasterize(folder, tmp_path / "other")
    assert tree(tmp_path / "other") == before


def test_faults_of_drawing_are_told_with_the_others(tmp_path: Path) -> None:
    content = coco(rle([3, 4]), drawn([0, 0, 9, 0, 9, 7]) | {"image_id": 2}, drawn([1]) | {"image_id": 3})
    content["images"] += [content["images"][0] | {"id": n, "file_name": f"{n}.jpg"} for n in (2, 3)]
    result = rasterize(write_json(tmp_path / "c.json", content), tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["2.png", "classes.yaml"] and result.images == 1
    assert [line.split(": ")[1] for line in result.faults] == ["annotations[2]", "annotations[0]"]


def test_the_classes_of_coco_are_in_order_of_their_ids(tmp_path: Path) -> None:
    whole = {"category_id": 20, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 80]}}
    path = write_json(tmp_path / "c.json", coco(whole, categories=("zebra", "ape")))
    result = rasterize(path, tmp_path / "out")
    assert result.classes == ("zebra", "ape") and result.pixels.tolist() == [0, 80, 0]
    assert (read_map(tmp_path / "out" / "street" / "x.png") == 1).all()
    assert rasterize(path, tmp_path / "b", classes="ape, zebra").pixels.tolist() == [80, 0, 0]


def test_the_background_comes_first_unless_it_is_among_the_classes(folder: Path, tmp_path: Path) -> None:
    result = rasterize(folder, tmp_path / "a", background="rest")
    assert result.classes == ("rest", "car", "road") and result.pixels.tolist() == [116, 4, 40, 0]
    assert set(np.unique(read_map(tmp_path / "a" / "s" / "b.png"))) == {0, 1}
    result = rasterize(folder, tmp_path / "b", background="road", classes=["car", "road"])
    assert result.classes == ("car", "road") and result.pixels.tolist() == [4, 156, 0]
    result = rasterize(folder, tmp_path / "c", background="rest", classes="car", ignore_other=True)
    assert result.classes == ("rest", "car") and result.pixels.tolist() == [116, 4, 40]


def test_other_categories_are_a_fault_or_not_labeled(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        rasterize(folder, tmp_path / "out", classes="sky,tree")
    told = str(error.value)
    assert told.startswith("Nothing was written:\n  - categories that are not among the classes: 'car' (3 ")
    assert (
        "'road' (1 annotations). Add them (--classes), or leave their pixels unlabeled (--other ignore)"
        in told
    )
    assert "c.json: shapes[0]" in told and "broken JSON" in told  # all at once
    assert not (tmp_path / "out").exists()
    result = rasterize(folder, tmp_path / "out", classes="sky,road", ignore_other=True)
    assert result.pixels.tolist() == [0, 40, 120]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["car"],
            "one class, 'car', is nothing to tell apart: name what nobody annotated (--background NAME)",
        ),
        ([f"c{k}" for k in range(256)], "256 classes: between 2 and 255 are needed."),
        ([], "0 classes: between 2 and 255 are needed."),
    ],
)
def test_too_few_and_too_many_classes(tmp_path: Path, names: list[str], message: str) -> None:
    path = write_json(tmp_path / "c.json", coco(categories=names))
    with pytest.raises(DataError) as error:
        rasterize(path, tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_255_classes_are_possible(tmp_path: Path) -> None:
    whole = {"category_id": 2550, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 80]}}
    path = write_json(tmp_path / "c.json", coco(whole, categories=[f"c{k}" for k in range(255)]))
    assert rasterize(path, tmp_path / "out").pixels[254] == 80
    assert (read_map(tmp_path / "out" / "street" / "x.png") == 254).all()


def test_names_given_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be unique and not empty; given twice: \['car'\]"):
        rasterize(write_json(tmp_path / "c.json", coco()), tmp_path / "out", classes="car,road,car")


def test_nothing_to_draw(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", coco(images=[]))
    with pytest.raises(DataError, match=r"c\.json: no image can be drawn"):
        rasterize(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobodys_files_are_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_png(out / "a.png", np.zeros((3, 3), np.uint8))
    before = tree(out)
    with pytest.raises(RunError, match="is not empty and was not begun by this command: choose another"):
        rasterize(folder, out)
    for text in ("[1, 2]", "names: [a]", "a: [", "text"):
        (out / "classes.yaml").write_text(text)
        with pytest.raises(RunError, match=r"classes\.yaml was not written by this command"):
            rasterize(folder, out)
        assert (out / "classes.yaml").read_text() == text
    (out / "classes.yaml").unlink()
    assert tree(out) == before
    with pytest.raises(RunError, match=r"a\.png is a file: choose another folder"):
        rasterize(folder, out / "a.png")


def test_maps_of_other_classes_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    rasterize(folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(RunError) as error:
        rasterize(folder, tmp_path / "out", classes="road,car")
    assert "holds label maps of other classes: [car, road], now [road, car]. Their indices" in str(
        error.value
    )
    assert tree(tmp_path / "out") == before


def test_the_panoptic_pngs_are_not_overwritten(tmp_path: Path) -> None:
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 5), {5: 10})
    before = tree(tmp_path)
    with pytest.raises(RunError, match="is not empty"):
        rasterize(path, tmp_path / "pan")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("known", [CITYSCAPES, VOC, CAMVID])
def test_built_in_sets_come_with_their_name(tmp_path: Path, known: Any) -> None:
    path = write_json(tmp_path / "c.json", coco(categories=known.names))
    result = rasterize(path, tmp_path / "out")
    assert yaml.safe_load(result.recipe())["data"]["classes"] in ("cityscapes", "voc", "camvid")


def test_names_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    names = ("no", "1", "a: b", "größe", "[x]", "long name " * 20)
    result = rasterize(write_json(tmp_path / "c.json", coco(categories=names)), tmp_path / "out")
    assert yaml.safe_load(result.recipe()) == {"data": {"classes": list(names)}}
    assert len(result.recipe().splitlines()) == 2
    assert yaml.safe_load((tmp_path / "out" / "classes.yaml").read_text())["classes"] == list(names)


def test_it_is_public() -> None:
    assert darseg.rasterize_folder is rasterize_folder and darseg.Rasterized is Rasterized


# The command


def test_the_command_prints_a_table_and_the_recipes_lines(call, tmp_path: Path) -> None:
    write_json(
        tmp_path / "in" / "x.json",
        labelme(shape("traffic light", square(0, 0, 9, 3)), shape("car", [[1, 1]], "point")),
    )
    code, out, err = call(
        "rasterize", tmp_path / "in", tmp_path / "photos" / "labels", "--background", "rest"
    )
    assert code == 0 and not err
    lines = out.splitlines()
    rows = {line[:29].strip(): line[29:].split() for line in lines if "%" in line}
    assert rows == {
        "rest": ["40", "50.0000%"],
        "traffic light": ["40", "50.0000%"],
        "(not labeled, of all pixels)": ["0", "0.0000%"],
    }
    assert "skipped, because they have no area: 1 point" in lines
    assert f"1 label maps in {tmp_path}/photos/labels; in the recipe:" in lines
    assert lines[-2:] == ["data:", "  classes: [rest, traffic light]"]
    # What was printed makes a recipe that darseg accepts, maps included.
    write_png(tmp_path / "photos" / "images" / "x.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "\n".join(lines[-2:]) + "\n  root: photos\nrounds: [{steps: 1}]\nnetwork: {weights: none}\n"
    )
    assert load_recipe(recipe).data.classes == ("rest", "traffic light")
    code, out, err = call("check", recipe)
    assert code == 0 and "1 labeled" in out, err


def test_the_command_ends_with_2_after_faults(call, folder: Path, tmp_path: Path) -> None:
    code, out, err = call("rasterize", folder, tmp_path / "out")
    assert code == 2
    assert "2 label maps in" in out and sorted(tree(tmp_path / "out")) == ["a.png", "classes.yaml", "s/b.png"]
    assert err.startswith("darseg: 4 fault(s); all other images are done:\n  - ") and err.count("\n  - ") == 4
    assert "Traceback" not in err


def test_the_commands_options(call, folder: Path, tmp_path: Path) -> None:
    (folder / "bad").rename(tmp_path / "bad")
    code, _, err = call("rasterize", folder, tmp_path / "a", "--classes", "sky,car")
    assert code == 2 and "categories that are not among the classes: 'road' (1 annotations)" in err
    options = ("--classes", "sky,car", "--other", "ignore", "--format", "labelme")
    code, out, err = call("rasterize", folder, tmp_path / "a", *options)
    assert code == 0 and out.endswith("  classes: [sky, car]\n"), err
    code, _, err = call("rasterize", folder, tmp_path / "b", "--format", "coco")
    assert code == 2 and "coco annotations are one file" in err
    code, _, err = call("rasterize", folder, tmp_path / "b", "--panoptic-folder", tmp_path)
    assert code == 2 and "a panoptic folder belongs to COCO panoptic annotations, these are a folder" in err
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 5), {5: 10})
    (tmp_path / "pan").rename(tmp_path / "elsewhere")
    code, out, err = call("rasterize", path, tmp_path / "c", "--panoptic-folder", tmp_path / "elsewhere")
    assert code == 0 and "1 label maps" in out, err
