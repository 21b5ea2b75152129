"""Annotation files of other tools become label maps: slow reference painters, rules of order, faults, the command."""

from __future__ import annotations

import base64
import json
import re
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
from darseg.annotate.annotations import read_annotations
from darseg.annotate.cityscapes import CITYSCAPES_VOID
from darseg.annotate.rasterize import RECORD, Rasterized, rasterize_folder
from darseg.annotate.regions import AnnotatedImage, Region, paint
from darseg.config.text import load_recipe
from darseg.data.classes import CAMVID, CITYSCAPES, VOC
from darseg.errors import DarsegError, DataError, RunError
from darseg.run.outputs import held_folder
from wording import refused, says

HEIGHT, WIDTH = 8, 10


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder, except the record of what was drawn."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def read_map(path: Path) -> np.ndarray:
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert label is not None and label.dtype == np.uint8 and label.ndim == 2
    return label


def images_of(path: Path, **options: Any) -> list[AnnotatedImage]:
    """All images, which have no faults."""
    images = list(read_annotations(path, **options).images())
    assert not [image for image in images if isinstance(image, str)], images
    return [image for image in images if isinstance(image, AnnotatedImage)]


def painted(path: Path, index: dict[str, int], **options: Any) -> np.ndarray:
    """The label map of the only image."""
    (image,) = images_of(path, **options)
    label = paint(image, index)
    assert isinstance(label, np.ndarray), label
    return label


def lines_of(path: Path, **options: Any) -> list[str]:
    """All faults, of reading and of drawing, without the folder."""
    lines: list[str] = []
    for image in read_annotations(path, **options).images():
        result = [image] if isinstance(image, str) else paint(image, {})
        lines += result if isinstance(result, list) else []
    return [line.replace(f"{path.parent}/", "") for line in lines]


def only_line(path: Path, **options: Any) -> str:
    """The only fault."""
    (line,) = lines_of(path, **options)
    return line


def cases(**values: tuple) -> list[Any]:
    """Parameters of a test by their ids."""
    return [pytest.param(*value, id=id_) for id_, value in values.items()]


def rasterize(path: Path, out: Path, **options: Any) -> Rasterized:
    return rasterize_folder(path, out, **options)


# Files as the tools write them


def coco(*annotations: dict, categories: Iterable[str] = ("car", "road"), **more: Any) -> dict:
    """One image of 8 x 10 pixels; categories get the ids 10, 20, … and are listed backwards."""
    listed = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(categories)]
    return {
        "images": [{"id": 1, "file_name": "street/x.jpg", "height": HEIGHT, "width": WIDTH}],
        "categories": listed[::-1],
        "annotations": [{"id": k, "image_id": 1, **annotation} for k, annotation in enumerate(annotations)],
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
    first = painted(write_json(folder / "a.json", labelme(shape("a", halves), **size)), {"a": 1})
    second = painted(write_json(folder / "b.json", labelme(shape("a", moved), **size)), {"a": 1})
    a = first[max(0, -down) : 60 - max(0, down), max(0, -right) : 60 - max(0, right)]
    b = second[max(0, down) : 60 - max(0, -down), max(0, right) : 60 - max(0, -right)]
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
def test_damaged_run_lengths_are_one_fault(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
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
    index = {"car": 0, "road": 1}  # the third category is not a class
    names = ("car", "road", "sky")
    label, again = (
        painted(write_json(folder / name, coco(*ordered, categories=names)), index)
        for name, ordered in (("a.json", annotations), ("b.json", shuffled))
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


def test_polygons_need_pycocotools_and_run_lengths_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    whole = {"category_id": 10, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 80]}}
    assert (painted(write_json(tmp_path / "r.json", coco(whole)), {"car": 0}) == 0).all()
    drawn = {"category_id": 10, "segmentation": [[0, 0, 3, 0, 3, 3]]}
    with refused(DarsegError, "pycocotools", 'pip install "darseg[coco]"'):
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
    says(only_line(path), "pan.json: annotations[0]", "pan/x.png", "--panoptic-folder")
    assert (painted(path, {"car": 1}, panoptic_folder=tmp_path / "elsewhere") == 1).all()


def test_unannotated_pixels_are_the_background_if_there_is_one(tmp_path: Path) -> None:
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
    for k, (record, pixels) in enumerate(kinds):
        label = painted(write_json(tmp_path / f"{k}.json", labelme(record)), {"a": 1})
        assert {(int(x), int(y)) for y, x in np.argwhere(label == 1)} == set(pixels), record


def test_lines_are_skipped_and_counted(tmp_path: Path) -> None:
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
    assert [image.id for image in images_of(tmp_path)] == [wanted]


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


def test_void_labels_of_cityscapes_are_not_evaluation_classes() -> None:
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
    assert [image.id for image in images_of(tmp_path)] == [wanted]


# CVAT


def test_cvat_layers_decide_which_shape_lies_on_top(tmp_path: Path) -> None:
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
    for k, (element, inside) in enumerate(kinds):
        (tmp_path / f"{k}.xml").write_text(cvat(element))
        label = painted(tmp_path / f"{k}.xml", {"a": 1})
        wanted = [[1 if inside(x, y) else 255 for x in range(WIDTH)] for y in range(HEIGHT)]
        assert label.tolist() == wanted, element


def test_cvat_shapes_without_area_are_skipped_and_counted(tmp_path: Path) -> None:
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
    with refused(DataError, str(tmp_path / "c.xml"), "<!DOCTYPE"):
        read_annotations(tmp_path / "c.xml")


# Faults: files that cannot be read at all


JSON_ERROR = r"damaged \(.*\)"  # differs between versions of Python
PROGRESS = r"[\d.,]+/s, \d+ s left"


@pytest.mark.parametrize(
    ("name", "text", "options", "facts"),
    cases(
        json_cut_off=("x.json", '{"images": [', {}, ["x.json"]),
        json_too_deep=("x.json", "[" * 100_000, {}, ["x.json"]),
        no_object=("x.json", "[]", {}, ["x.json", "--format"]),
        unknown_keys=("x.json", '{"b": 1, "a": 2}', {}, ["x.json", "'a', 'b'", "COCO"]),
        no_keys=("x.json", "{}", {}, ["x.json", "empty"]),
        unknown_format=("x.json", "{}", {"format": "voc"}, ["'voc'", "coco, panoptic, labelme"]),
        coco_without_images=("x.json", "{}", {"format": "coco"}, ["x.json", "COCO", "'images'"]),
        coco_images_no_list=("x.json", '{"images": {}}', {"format": "coco"}, ["'images'", "{}"]),
        panoptic_no_object=("x.json", "3", {"format": "panoptic"}, ["3", "'images'"]),
        xml_cut_off=("x.xml", "<annotations><image", {}, ["x.xml"]),
        other_xml=("x.xml", "<a/>", {}, ["x.xml", "<a>", "<annotations>", "1.1"]),
        video=("x.xml", "<annotations><track/></annotations>", {}, ["x.xml", "video", "<annotations>"]),
        empty_xml=("x.xml", "", {"format": "cvat"}, ["x.xml"]),
        folder_of_no_panoptic=(
            "x.json",
            '{"shapes": []}',
            {"panoptic_folder": Path("p")},
            ["--panoptic-folder", "x.json", "labelme"],
        ),
    ),
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, text: str, options: dict, facts: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    with refused(DataError, *facts, vary=[JSON_ERROR]):
        read_annotations(tmp_path / name, **options)


def test_missing_files_and_useless_folders_are_refused(tmp_path: Path) -> None:
    with refused(DataError, str(tmp_path / "none.json")):
        read_annotations(tmp_path / "none.json")
    with refused(DataError, str(tmp_path), "JSON", "labelme", "COCO"):
        read_annotations(tmp_path)
    write_json(tmp_path / "c.json", coco())
    with refused(DataError, str(tmp_path), "coco"):
        read_annotations(tmp_path, "coco")
    (line,) = read_annotations(tmp_path).images()
    assert isinstance(line, str)
    says(line, f"{tmp_path}/c.json", "coco")


# Faults of images, shape by shape


def rle(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict:
    return {"category_id": 10, "segmentation": {"size": list(size), "counts": counts}}


def drawn(*polygons: Any) -> dict:
    return {"category_id": 10, "segmentation": list(polygons)}


RANGE = "-1048576 to 1048576"


@pytest.mark.parametrize(
    ("annotation", "facts"),
    cases(
        unknown_category=({"category_id": 7, "segmentation": [[1] * 6]}, ["'category_id'", "7"]),
        category_no_integer=({"category_id": True}, ["'category_id'", "true"]),
        no_segmentation=({"category_id": 10}, ["'segmentation'"]),
        segmentation_a_string=({"category_id": 10, "segmentation": "a"}, ["'segmentation'", '"a"']),
        no_polygons=(drawn(), ["'segmentation'"]),
        two_points=(drawn([1, 2, 3, 4]), ["polygon 0", "4 numbers"]),  # pycocotools would take it for a box
        odd_numbers=(drawn([1] * 6, [1] * 7), ["polygon 1", "7 numbers"]),
        pairs=(drawn([[1, 2], [3, 4], [5, 6]]), ["polygon 0", "3 numbers"]),
        polygon_a_number=(drawn(3), ["polygon 0", "3"]),
        coordinate_a_string=(drawn([1, 2, 3, 4, 5, "6"]), ['"6"', RANGE]),
        coordinate_nan=(drawn([1, 2, 3, 4, 5, float("nan")]), ["NaN", RANGE]),
        coordinate_too_large=(drawn([1, 2, 3, 4, 5, 1e7]), ["10000000.0", RANGE]),
        other_size=(rle([80], (WIDTH, HEIGHT)), ["[10, 8]", "[8, 10]"]),
        counts_a_number=(rle(3), ["'counts'", "3"]),
        too_few_pixels=(rle([3, 4]), ["7 pixels", "80", "8 x 10"]),
        negative_run=(rle([-3, 83]), []),
        fraction_of_a_run=(rle([1.5, 78.5]), []),
        too_few_compressed_pixels=(rle("01"), ["1 pixel,", "80", "8 x 10"]),
        foreign_character=(rle("é"), ["'é'"]),
        number_too_long=(rle("o" * 20), ["'o'"]),
        number_cut_off=(rle("0o"), []),
    ),
)
def test_faults_of_coco_annotations(tmp_path: Path, annotation: dict, facts: list[str]) -> None:
    good = drawn([0, 0, 3, 0, 3, 3])
    says(
        only_line(write_json(tmp_path / "c.json", coco(good, annotation))), "c.json: annotations[1]: ", *facts
    )


@pytest.mark.parametrize(
    ("change", "facts"),
    cases(
        outside=({"file_name": "../x.jpg"}, ["'../x.jpg'"]),
        absolute=({"file_name": "/x.jpg"}, ["'/x.jpg'"]),
        backslash=({"file_name": "a\\x.jpg"}, ["'a\\\\x.jpg'"]),
        drive=({"file_name": "C:/x.jpg"}, ["'C:/x.jpg'"]),
        folder=({"file_name": "."}, ["'.'"]),
        empty=({"file_name": ""}, ["''"]),
        zero_byte=({"file_name": "a\0.jpg"}, ["'a\\x00.jpg'"]),
        name_a_number=({"file_name": 3}, ["'file_name'", "3"]),
        no_rows=({"height": 0}, ["0 x 10"]),
        half_a_column=({"width": 2.5}, ["8 x 2.5"]),
        infinite=({"width": float("inf")}, ["8 x inf"]),
        too_large=({"height": 1 << 20, "width": 1 << 20}, ["1048576 x 1048576"]),
        height_a_string=({"height": "8"}, ["'height'", '"8"']),
        no_id=({"id": None}, ["'id'", "null"]),
    ),
)
def test_faults_of_coco_images(tmp_path: Path, change: dict, facts: list[str]) -> None:
    content = coco()
    content["images"][0] |= change
    says(only_line(write_json(tmp_path / "c.json", content)), "c.json: images[0]: ", *facts)


def test_faults_of_a_coco_file_as_a_whole(tmp_path: Path) -> None:
    content = coco(drawn([1] * 6) | {"image_id": 9}, drawn([1] * 6) | {"image_id": [1]})
    content["images"] += [content["images"][0] | {"file_name": "y.jpg"}, "z.jpg"]
    content["categories"] += [{"id": 10, "name": "bus"}, {"id": [7], "name": "y"}, {"id": 3}]
    lines = lines_of(write_json(tmp_path / "c.json", content))
    facts = [
        ("categories[2]", "10", "'car'", "'bus'"),
        ("categories[3]", "'id'", "[7]"),
        ("categories[4]", "'name'"),
        ("images[1]", "1"),
        ("images[2]", '"z.jpg"', "'id'"),
        ("annotations[0]", "'image_id'", "9"),
        ("annotations[1]", "'image_id'", "[1]"),
        ("images[0]", "no annotation", "2 annotation(s)"),
    ]
    for line, (where, *parts) in zip(lines, facts, strict=True):
        says(line, f"c.json: {where}: ", *parts)


def test_faults_of_panoptic_pngs_and_segments(tmp_path: Path) -> None:
    ids = np.full((HEIGHT, WIDTH), 5)
    at = "pan.json: annotations[0]: "
    path = panoptic(tmp_path, ids + 300 * np.eye(HEIGHT, WIDTH, dtype=int), {5: 10, 6: 20})
    says(only_line(path), at, "pan/x.png", "305 (8 pixels)", "'segments_info'")
    says(only_line(panoptic(tmp_path, ids[1:], {5: 10})), at, "pan/x.png", "7 x 10", "8 x 10")
    says(only_line(panoptic(tmp_path, ids, {5: 11})), at, "'category_id'", "11")
    says(only_line(panoptic(tmp_path, ids, {5: 10, 0: 10})), at, "1 to 16777215")
    path = panoptic(tmp_path, ids, {5: 10})
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"] *= 2
    says(only_line(write_json(path, content)), at, "5", "twice")
    path = panoptic(tmp_path, ids, {5: 10})
    (tmp_path / "pan" / "x.png").write_bytes(b"no PNG")
    assert only_line(path).startswith(f"{at}pan/x.png: ")


@pytest.mark.parametrize(
    ("change", "facts"),
    cases(
        no_segments=([{"segments_info": []}], ["'segments_info'"]),
        segments_a_number=([{"segments_info": 3}], ["'segments_info'", "3"]),
        png_outside=([{"file_name": "../x.png"}], ["'../x.png'"]),
        no_annotation=([], ["0 annotations"]),
        two_annotations=([{}, {}], ["2 annotations"]),
    ),
)
def test_faults_of_panoptic_images(tmp_path: Path, change: list[dict], facts: list[str]) -> None:
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 5), {5: 10})
    content = json.loads(path.read_text())
    (annotation,) = content["annotations"]
    write_json(path, content | {"annotations": [annotation | changed for changed in change]})
    says(only_line(path, format="panoptic"), "pan.json: images[0]: ", *facts)


SMALL_PNG = base64.b64encode(cv2.imencode(".png", np.eye(4, dtype=np.uint8))[1].tobytes()).decode()


@pytest.mark.parametrize(
    ("record", "facts"),
    cases(
        two_points=(shape("a", [[1, 2], [3, 4]]), ["2 point(s)", "at least 3"]),
        rectangle_of_one_point=(shape("a", [[1, 2]], "rectangle"), ["1 point(s)", "expected 2"]),
        circle_of_four_points=(shape("a", square(1, 1, 2, 2), "circle"), ["4 point(s)", "expected 2"]),
        no_points=(shape("a", None), ["null"]),
        point_of_one_number=(shape("a", [[1, 2], [3, 4], [5]]), ["[5]", "[x, y]"]),
        coordinate_null=(shape("a", [[1, 2], [3, 4], [5, None]]), ["null", RANGE]),
        too_large=(shape("a", square(-(10**6), -(10**6), 10**6, 10**6)), ["2000001 x 2000001"]),
        radius_zero=(shape("a", [[4, 4], [4, 4]], "circle"), ["0 and 0"]),
        unknown_type=(shape("a", [], "star"), ["'shape_type'", '"star"']),
        type_a_list=(shape("a", [], ["star"]), ["'shape_type'", '["star"]']),
        no_label=({"points": square(1, 1, 2, 2)}, ["'label'"]),
        no_object=("a", ['"a"', "'label'"]),
        no_mask=(shape("a", [[1, 1], [2, 2]], "mask"), ["'mask'"]),
        mask_no_base64=(shape("a", [[1, 1], [2, 3]], "mask", mask="?"), ["'mask'", "3 x 2"]),
        mask_no_ascii=(shape("a", [[1, 1], [2, 3]], "mask", mask="é"), ["'mask'", "3 x 2"]),
        mask_empty=(shape("a", [[1, 1], [2, 3]], "mask", mask=""), ["'mask'", "3 x 2"]),
        mask_of_other_size=(shape("a", [[1, 1], [2, 3]], "mask", mask=SMALL_PNG), ["4 x 4", "3 x 2"]),
    ),
)
def test_faults_of_labelme_shapes(tmp_path: Path, record: Any, facts: list[str]) -> None:
    path = write_json(tmp_path / "x.json", labelme(shape("a", square(0, 0, 1, 1)), record))
    says(only_line(path), "x.json: shapes[1]: ", *facts)


@pytest.mark.parametrize(
    ("change", "facts"),
    cases(
        no_height=({"imageHeight": None}, ["x.json: ", "'imageHeight'", "null"]),
        path_a_number=({"imagePath": 1}, ["x.json: ", "'imagePath'", "1"]),
        name_of_a_folder=({"imagePath": "images/.."}, ["x.json: ", "'..'"]),
        empty_name=({"imagePath": ""}, ["x.json: ", "''"]),
        shapes_a_number=({"shapes": 3}, ["x.json: shapes: ", "3", "'label'"]),
    ),
)
def test_faults_of_labelme_files(tmp_path: Path, change: dict, facts: list[str]) -> None:
    says(only_line(write_json(tmp_path / "x.json", labelme(**change))), *facts)


def test_faults_of_a_labelme_file_and_its_shapes_are_reported_together(tmp_path: Path) -> None:
    first, second = lines_of(write_json(tmp_path / "x.json", labelme(shape("a", []), imageWidth=0)))
    assert first.startswith("x.json: ") and "8 x 0" in first
    assert second.startswith("x.json: shapes[0]: ")


def test_faults_of_cityscapes_files(tmp_path: Path) -> None:
    good = {"label": "car", "polygon": square(0, 0, 1, 1)}
    bad = [{"label": "car", "polygon": [[0, 0], [1, 1]]}, {"polygon": []}, {"label": "car"}, 7]
    path = write_json(tmp_path / "c.json", cityscapes(good, *bad, {"deleted": 1}, imgWidth="x"))
    facts = [
        ("c.json: ", "'imgWidth'", '"x"'),
        ("c.json: objects[1]: ", "2 point(s)"),
        ("c.json: objects[2]: ", "'label'"),
        ("c.json: objects[3]: ", "'polygon'"),
        ("c.json: objects[4]: ", "7", "'label'"),
    ]
    for line, parts in zip(lines_of(path), facts, strict=True):
        says(line, *parts)
    lines = lines_of(write_json(path, labelme()), format="cityscapes")
    for line, parts in zip(lines, [("c.json: ", "'imgHeight'"), ("c.json: objects: ", "null")], strict=True):
        says(line, *parts)


@pytest.mark.parametrize(
    ("element", "facts"),
    cases(
        two_points=('<polygon label="a" points="1,2;3,4"/>', ["2 point(s)", "at least 3"]),
        point_of_one_number=('<polygon label="a" points="1,2;3,4;5"/>', ["[5.0]", "[x, y]"]),
        point_of_text=('<polygon label="a" points="1,2;3,4;5,y"/>', ["'points'", '"y"', RANGE]),
        no_points=('<polygon label="a"/>', ["'points'"]),
        no_label=('<polygon points="1,2;3,4;5,6"/>', ["'label'"]),
        coordinate_nan=('<box label="a" xtl="1" ytl="nan" xbr="3" ybr="4"/>', ["'ytl'", '"nan"', RANGE]),
        layer_of_text=(
            '<box label="a" xtl="1" ytl="2" xbr="3" ybr="4" z_order="top"/>',
            ["'z_order'", '"top"', RANGE],
        ),
        no_radius=('<ellipse label="a" cx="1" cy="1" rx="0" ry="-1"/>', ["0 and -1"]),
        unknown_shape=('<star label="a"/>', ["<star>", "<polygon>", "<box>", "<ellipse>", "<mask>"]),
        run_of_text=('<mask label="a" rle="1,x" left="1" top="1" width="1" height="2"/>', ["'rle'", '"1,x"']),
        too_many_pixels=(
            '<mask label="a" rle="1,2" left="1" top="1" width="1" height="2"/>',
            ["3 pixels", "2 x 1"],
        ),
        negative_size=('<mask label="a" rle="1" left="1" top="1" width="-1" height="-1"/>', ["-1 x -1"]),
        half_a_row=('<mask label="a" left="1" top="0.5" width="1" height="1"/>', ["'top'", "0.5"]),
    ),
)
def test_faults_of_cvat_shapes(tmp_path: Path, element: str, facts: list[str]) -> None:
    good = '<box label="a" xtl="1" ytl="2" xbr="3" ybr="4" z_order="1"/>'
    (tmp_path / "c.xml").write_text(cvat(good, element))
    kind = element[1:].split()[0]
    says(only_line(tmp_path / "c.xml"), f"c.xml: image[0], {kind}[1]: ", *facts)


def test_faults_of_cvat_images(tmp_path: Path) -> None:
    (tmp_path / "c.xml").write_text(cvat(size='width="10"'))
    says(only_line(tmp_path / "c.xml"), "c.xml: image[0]: ", "'height'")
    (tmp_path / "c.xml").write_text(cvat(name="../x.jpg"))
    says(only_line(tmp_path / "c.xml"), "c.xml: image[0]: ", "'../x.jpg'")


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


def test_good_images_are_written_and_all_faults_reported(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = rasterize(folder, out)
    assert sorted(tree(out)) == ["a.png", "classes.yaml", "s/b.png"]
    assert (out / "classes.yaml").read_text() == (
        "classes: [car, road]\npixels:\n  car: 4\n  road: 40\nnot_labeled: 116\nimages: 2\n"
    )
    bad = f"{folder}/bad"
    facts = [
        (f"{bad}/c.json: shapes[0]: ", "1 point(s)"),
        (f"{bad}/c.json: shapes[1]: ", "0 point(s)"),
        (f"{bad}/f.json: ",),
        ("2 images", f"bad/e ({bad}/d.json)", f"bad/E ({bad}/e.json)"),
    ]
    for line, parts in zip(result.faults, facts, strict=True):
        says(line, *parts, vary=[JSON_ERROR])
    assert result.images == 2 and result.pixels.tolist() == [4, 40, 116]
    wanted = np.full((HEIGHT, WIDTH), 255)
    wanted[:4] = 1
    assert np.array_equal(read_map(out / "a.png"), wanted)


def test_a_rerun_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, before = rasterize(folder, out), tree(out)
    (out / "a.png").write_bytes(b"damaged")
    (out / "s" / "b.png.0123456789abcdef.part").write_bytes(b"half")
    again = rasterize(folder, out)
    assert tree(out) == before and first.faults == again.faults
    rasterize(folder, tmp_path / "other")
    assert tree(tmp_path / "other") == before


def test_label_maps_that_were_corrected_by_hand_are_kept(call, folder: Path, tmp_path: Path) -> None:
    out, corrected = tmp_path / "out", np.zeros((HEIGHT, WIDTH), np.uint8)
    rasterize(folder, out)
    drawn = tree(out)
    write_png(out / "a.png", corrected)
    mine = (out / "a.png").read_bytes()
    result = rasterize(folder, out)
    assert (result.images, result.kept) == (1, (str(out / "a.png"),))
    assert (out / "a.png").read_bytes() == mine
    (out / RECORD).unlink()  # as an earlier version left it
    write_json(folder / "s" / "b.json", labelme(shape("car", square(1, 1, 3, 3)), imagePath="b.jpg"))
    assert set(rasterize(folder, out).kept) == {str(out / "a.png"), str(out / "s" / "b.png")}
    _, printed, _ = call("rasterize", folder, out)
    (line,) = (line for line in printed.splitlines() if line.startswith("kept"))
    says(line, "2 label map(s)", str(out / "a.png"), "--force")
    call("rasterize", folder, out, "--force")
    assert (out / "a.png").read_bytes() == drawn["a.png"]
    write_json(folder / "s" / "b.json", labelme(shape("car", square(1, 1, 2, 2)), imagePath="b.jpg"))
    assert (
        rasterize(folder, out).kept == () and tree(out)["s/b.png"] == drawn["s/b.png"]
    )  # its own are drawn again


def test_two_calls_do_not_draw_into_one_folder_at_once(folder: Path, tmp_path: Path) -> None:
    with held_folder(tmp_path / "out"), refused(RunError, str(tmp_path / "out"), "another process"):
        rasterize(folder, tmp_path / "out")


def test_faults_of_drawing_are_reported_with_the_others(tmp_path: Path) -> None:
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
    facts = ["'car' (3 annotations)", "'road' (1 annotations)", "--classes", "--other ignore"]
    with refused(DataError, *facts, "c.json: shapes[0]", "f.json: ", vary=[JSON_ERROR]):  # all at once
        rasterize(folder, tmp_path / "out", classes="sky,tree")
    assert not (tmp_path / "out").exists()
    result = rasterize(folder, tmp_path / "out", classes="sky,road", ignore_other=True)
    assert result.pixels.tolist() == [0, 40, 120]


@pytest.mark.parametrize(
    ("names", "facts"),
    cases(
        one=(["car"], ["'car'", "--background NAME"]),
        too_many=([f"c{k}" for k in range(256)], ["256", "2", "255"]),
        none=([], ["0", "2", "255"]),
    ),
)
def test_too_few_and_too_many_classes_are_refused(tmp_path: Path, names: list[str], facts: list[str]) -> None:
    path = write_json(tmp_path / "c.json", coco(categories=names))
    with refused(DataError, *facts):
        rasterize(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_255_classes_are_possible(tmp_path: Path) -> None:
    whole = {"category_id": 2550, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 80]}}
    path = write_json(tmp_path / "c.json", coco(whole, categories=[f"c{k}" for k in range(255)]))
    assert rasterize(path, tmp_path / "out").pixels[254] == 80
    assert (read_map(tmp_path / "out" / "street" / "x.png") == 254).all()


def test_names_given_twice_are_refused(tmp_path: Path) -> None:
    with refused(DataError, "'car'"):
        rasterize(write_json(tmp_path / "c.json", coco()), tmp_path / "out", classes="car,road,car")


def test_a_file_without_images_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "c.json", coco(images=[]))
    with refused(DataError, str(path)):
        rasterize(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_files_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_png(out / "a.png", np.zeros((3, 3), np.uint8))
    before = tree(out)
    with refused(RunError, str(out)):
        rasterize(folder, out)
    for text in ("[1, 2]", "names: [a]", "a: [", "text"):
        (out / "classes.yaml").write_text(text)
        with refused(RunError, str(out / "classes.yaml")):
            rasterize(folder, out)
        assert (out / "classes.yaml").read_text() == text
    (out / "classes.yaml").unlink()
    assert tree(out) == before
    with refused(RunError, str(out / "a.png")):
        rasterize(folder, out / "a.png")


def test_maps_of_other_classes_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    rasterize(folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    with refused(RunError, str(tmp_path / "out"), "[car, road]", "[road, car]", "--classes"):
        rasterize(folder, tmp_path / "out", classes="road,car")
    assert tree(tmp_path / "out") == before


def test_the_panoptic_pngs_are_not_overwritten(tmp_path: Path) -> None:
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 5), {5: 10})
    before = tree(tmp_path)
    with refused(RunError, str(tmp_path / "pan")):
        rasterize(path, tmp_path / "pan")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("known", [CITYSCAPES, VOC, CAMVID])
def test_built_in_sets_are_named_in_the_recipe(tmp_path: Path, known: Any) -> None:
    path = write_json(tmp_path / "c.json", coco(categories=known.names))
    result = rasterize(path, tmp_path / "out")
    assert yaml.safe_load(result.recipe())["data"]["classes"] in ("cityscapes", "voc", "camvid")


def test_names_that_yaml_would_misread_are_quoted(tmp_path: Path) -> None:
    names = ("no", "1", "a: b", "größe", "[x]", "long name " * 20)
    result = rasterize(write_json(tmp_path / "c.json", coco(categories=names)), tmp_path / "out")
    assert yaml.safe_load(result.recipe()) == {"data": {"classes": list(names)}}
    assert len(result.recipe().splitlines()) == 2
    assert yaml.safe_load((tmp_path / "out" / "classes.yaml").read_text())["classes"] == list(names)


def test_the_function_is_public() -> None:
    assert darseg.rasterize_folder is rasterize_folder and darseg.Rasterized is Rasterized


# The command


def test_the_command_prints_a_table_and_the_recipes_lines(call, tmp_path: Path) -> None:
    write_json(
        tmp_path / "in" / "x.json",
        labelme(shape("traffic light", square(0, 0, 9, 3)), shape("car", [[1, 1]], "point")),
    )
    labels = tmp_path / "photos" / "labels"
    code, out, err = call("rasterize", tmp_path / "in", labels, "--background", "rest")
    assert code == 0 and not err
    says(out, "1 point", str(labels), "classes: [rest, traffic light]", vary=[PROGRESS])
    lines = out.splitlines()
    rows = [match.groups() for line in lines if (match := re.fullmatch(r"(.*?) +(\d+) +([\d.]+%)", line))]
    assert [row[1:] for row in rows] == [("40", "50.0000%"), ("40", "50.0000%"), ("0", "0.0000%")]
    assert [row[0] for row in rows[:2]] == ["rest", "traffic light"]
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
    assert code == 2 and sorted(tree(tmp_path / "out")) == ["a.png", "classes.yaml", "s/b.png"]
    says(out, str(tmp_path / "out"), "2 label maps", vary=[PROGRESS])
    says(err, "4 fault", *(f"{folder}/bad/{name}.json" for name in "cdef"), vary=[JSON_ERROR])
    assert err.count("\n  - ") == 4 and "Traceback" not in err


def test_the_commands_options(call, folder: Path, tmp_path: Path) -> None:
    (folder / "bad").rename(tmp_path / "bad")
    code, _, err = call("rasterize", folder, tmp_path / "a", "--classes", "sky,car")
    assert code == 2
    says(err, "'road' (1 annotations)", "--classes", "--other ignore")
    options = ("--classes", "sky,car", "--other", "ignore", "--format", "labelme")
    code, out, err = call("rasterize", folder, tmp_path / "a", *options)
    assert code == 0 and out.endswith("  classes: [sky, car]\n"), err
    code, _, err = call("rasterize", folder, tmp_path / "b", "--format", "coco")
    assert code == 2
    says(err, "coco", str(folder))
    code, _, err = call("rasterize", folder, tmp_path / "b", "--panoptic-folder", tmp_path)
    assert code == 2
    says(err, "--panoptic-folder", str(folder))
    path = panoptic(tmp_path, np.full((HEIGHT, WIDTH), 5), {5: 10})
    (tmp_path / "pan").rename(tmp_path / "elsewhere")
    code, out, err = call("rasterize", path, tmp_path / "c", "--panoptic-folder", tmp_path / "elsewhere")
    assert code == 0 and "1 label maps" in out, err
