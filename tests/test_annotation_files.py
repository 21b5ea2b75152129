"""Annotation files as tools and people leave them: renamed pictures, missing sizes, encodings, ids as text, budgets."""

from __future__ import annotations

import base64
import json
import resource
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from darseg.annotate.annotations import read_annotations
from darseg.annotate.rasterize import rasterize_folder
from darseg.annotate.regions import AnnotatedImage, paint
from darseg.errors import DataError
from wording import refused, says

TRIANGLE = [[5, 5], [20, 5], [5, 20]]
TRIANGLE_PIXELS = 136  # 16 + 15 + … + 1


def _shape(label: str = "car", points: Any = TRIANGLE, kind: str = "polygon") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind}


def _picture(path: Path, height: int = 30, width: int = 40, color: int = 0) -> bytes:
    cv2.imwrite(str(path), np.full((height, width, 3), color, np.uint8))
    return path.read_bytes()


def _labelme(folder: Path, name: str, *shapes: dict[str, Any], **more: Any) -> Path:
    content = {
        "shapes": list(shapes) or [_shape()],
        "imagePath": f"{name}.jpg",
        "imageHeight": 30,
        "imageWidth": 40,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key: value for key, value in (content | more).items() if value != "omit"}))
    return path


def _coco(path: Path, *annotations: dict[str, Any], **changes: Any) -> Path:
    names = ("a.jpg", "b.jpg")
    images = [{"id": k, "file_name": name, "height": 30, "width": 40} for k, name in enumerate(names, 1)]
    categories = [{"id": 1, "name": "crack"}, {"id": 2, "name": "rust"}]
    content = {"images": images, "annotations": list(annotations), "categories": categories} | changes
    path.write_text(json.dumps(content))
    return path


def _square(image: Any, category: Any = 1, **more: Any) -> dict[str, Any]:
    segmentation = [[2, 2, 10, 2, 10, 10, 2, 10]]  # 64 pixels for pycocotools
    return {"image_id": image, "category_id": category, "segmentation": segmentation} | more


def _drawn(path: Path, out: Path) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    """Map → pixels that are not background; faults and warnings."""
    result = rasterize_folder(path, out, background="back")
    maps = {
        file.name: int((cv2.imread(str(file), cv2.IMREAD_UNCHANGED) > 0).sum()) for file in out.glob("*.png")
    }
    return maps, result.faults, result.warnings


def test_pictures_that_were_renamed_with_their_files(tmp_path: Path) -> None:
    for name, old in (("new_1", "DSC1.JPG"), ("new_2", "..\\raw\\DSC2.JPG")):
        _picture(tmp_path / f"{name}.jpg")
        _labelme(tmp_path, name, imagePath=old)
    maps, faults, warnings = _drawn(tmp_path, tmp_path / "out")
    assert maps == {"new_1.png": TRIANGLE_PIXELS, "new_2.png": TRIANGLE_PIXELS} and not faults
    says("\n".join(warnings), "2 file(s)", "new_1.json", "DSC1.JPG")


def test_a_renamed_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    _picture(tmp_path / "new.jpg", 31, 40)
    _labelme(tmp_path, "new", imagePath="DSC1.JPG")
    _picture(tmp_path / "b.jpg")
    _labelme(tmp_path, "b")
    maps, faults, _ = _drawn(tmp_path, tmp_path / "out")
    assert maps == {"b.png": TRIANGLE_PIXELS}
    says("\n".join(faults), "new.json", "30 x 40", "new.jpg", "31 x 40")


def test_a_copied_file_is_decided_by_the_embedded_picture_then_by_size_then_refused(tmp_path: Path) -> None:
    _labelme(tmp_path, "t1")
    _picture(tmp_path / "t1.jpg")
    data = _picture(tmp_path / "t2.jpg", color=200)
    _labelme(tmp_path, "t2", imagePath="t1.jpg", imageData=base64.b64encode(data).decode())
    maps, faults, warnings = _drawn(tmp_path, tmp_path / "embedded")
    assert set(maps) == {"t1.png", "t2.png"} and not faults and len(warnings) == 1
    _labelme(tmp_path, "t2", imagePath="t1.jpg", imageHeight=50)
    _picture(tmp_path / "t2.jpg", 50)
    maps, faults, _ = _drawn(tmp_path, tmp_path / "size")
    assert set(maps) == {"t1.png", "t2.png"} and not faults
    _labelme(tmp_path, "t2", imagePath="t1.jpg")
    _picture(tmp_path / "t2.jpg")
    maps, faults, _ = _drawn(tmp_path, tmp_path / "open")
    assert set(maps) == {"t1.png"}
    says("\n".join(faults), "t2.json", "t1.jpg", "t2.jpg", "'imagePath'")


@pytest.mark.parametrize("absent", ["omit", None])
def test_sizes_that_are_missing_come_from_the_picture(tmp_path: Path, absent: str | None) -> None:
    _picture(tmp_path / "a.jpg", 33, 44)
    _labelme(tmp_path, "a", imageHeight=absent, imageWidth=absent)
    (image,) = read_annotations(tmp_path / "a.json").images()
    assert isinstance(image, AnnotatedImage) and (image.height, image.width) == (33, 44)
    (tmp_path / "a.jpg").unlink()
    (line,) = read_annotations(tmp_path / "a.json").images()
    says(str(line), "a.json", "'imageHeight'", "Put the picture there")


def test_boxes_of_four_corners_are_polygons(tmp_path: Path) -> None:
    four = [[10, 4], [30, 4], [30, 20], [10, 20]]
    for kind in ("rectangle", "rotation", "polygon"):
        _labelme(tmp_path, kind, _shape("car", four, kind))
    maps, faults, _ = _drawn(tmp_path, tmp_path / "out")
    assert maps == {f"{kind}.png": 21 * 17 for kind in ("rectangle", "rotation", "polygon")} and not faults


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gbk"])
def test_encodings_that_are_read(tmp_path: Path, encoding: str) -> None:
    content = {"shapes": [_shape("道路a")], "imagePath": "图.jpg", "imageHeight": 30, "imageWidth": 40}
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    drawn = rasterize_folder(tmp_path / "a.json", tmp_path / "out", background="back")
    assert drawn.classes == ("back", "道路a") and (tmp_path / "out/图.png").is_file()
    assert bool(drawn.warnings) == (encoding == "gbk")
    if drawn.warnings:
        says("\n".join(drawn.warnings), "1 image(s)", "a.json", "GB18030", "道路a", "图", "iconv")


def test_a_coco_file_in_gbk_is_read(tmp_path: Path) -> None:
    path = _coco(tmp_path / "c.json", _square(1), categories=[{"id": 1, "name": "裂缝"}])
    path.write_bytes(json.dumps(json.loads(path.read_text()), ensure_ascii=False).encode("gbk"))
    drawn = rasterize_folder(path, tmp_path / "out", background="back")
    assert drawn.classes == ("back", "裂缝") and "2 image(s)" in drawn.warnings[0]


@pytest.mark.parametrize(
    "label", ["Straße", "Größe", "Überzug", "crème brûlée"], ids=["one", "two", "first", "several"]
)
def test_a_western_encoding_is_not_taken_for_chinese(tmp_path: Path, label: str) -> None:
    content = {"shapes": [_shape(label)], "imagePath": "a.jpg", "imageHeight": 30, "imageWidth": 40}
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode("cp1252"))
    with refused(DataError, "a.json", "UTF-8", "iconv -f GB18030", "CP1252"):
        _drawn(tmp_path / "a.json", tmp_path / "out")


@pytest.mark.parametrize("ids", [("1", "1"), (1, "1"), ("1", 1)])
def test_coco_ids_may_be_texts(tmp_path: Path, ids: tuple[Any, Any]) -> None:
    path = _coco(tmp_path / "c.json", _square(*ids), _square(2, 2))
    maps, faults, _ = _drawn(path, tmp_path / "out")
    assert maps == {"a.png": 64, "b.png": 64} and not faults


def test_an_image_without_annotations_is_not_drawn_if_some_annotations_are_lost(tmp_path: Path) -> None:
    path = _coco(tmp_path / "c.json", _square(17), _square(2, 2))
    maps, faults, _ = _drawn(path, tmp_path / "out")
    assert maps == {"b.png": 64}
    says("\n".join(faults), "annotations[0]", "17", "images[0]", "1 annotation(s)")


def test_a_coco_image_without_size_has_that_of_its_picture(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    path = _coco(tmp_path / "c.json", _square(1), images=images)
    with refused(DataError, "images[0]", "'height'", "a.jpg"):
        _drawn(path, tmp_path / "out")
    (tmp_path / "images").mkdir()
    _picture(tmp_path / "images" / "a.jpg")
    maps, _, warnings = _drawn(path, tmp_path / "out")
    assert maps == {"a.png": 64}
    says("\n".join(warnings), "rust")  # the category without annotations


ZIGZAG = [[k % 2 * 1_000_000, k % 7] for k in range(20_000)]
FLAT = [coordinate for point in ZIGZAG for coordinate in point]
ONE = {"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}
PNG = cv2.imencode(".png", np.zeros((4000, 4000), np.uint8))[1].tobytes()
ABSURD = {
    "size": (ONE | {"height": 10**9, "width": 10**9}, _square(1), "1000000000 x 1000000000"),
    "long side": (ONE | {"height": 10**9, "width": 1}, _square(1), "1000000000 x 1"),
    "outline": (ONE, _square(1, segmentation=[FLAT]), "20000 points"),
    "run lengths": (
        ONE,
        _square(1, segmentation={"size": [30, 40], "counts": [0, 10**15]}),
        "1000000000000000 pixels",
    ),
    "compressed": (ONE, _square(1, segmentation={"size": [30, 40], "counts": "0" + "o" * 6 + "0"}), "run"),
    "mask size": (
        ONE,
        _square(1, segmentation={"size": [10**9, 10**9], "counts": [10**18]}),
        "[1000000000, 1000000000]",
    ),
}


def test_shapes_without_a_pixel_and_names_that_are_nearly_equal_are_counted(tmp_path: Path) -> None:
    """Coordinates from 0 to 1 would make all of an image background."""
    shares = [[0.1, 0.1], [0.3, 0.1], [0.3, 0.3]]
    square = [{**_square(1), "segmentation": [[x for point in shares for x in point]]}, _square(2, 2)]
    maps, faults, warnings = _drawn(_coco(tmp_path / "c.json", *square), tmp_path / "coco")
    assert maps == {"a.png": 0, "b.png": 64} and not faults
    says("\n".join(warnings), "1 shape(s)", "annotations[0]")
    outside = [[x + 40, y] for x, y in TRIANGLE]
    _labelme(tmp_path, "a", _shape("car"), _shape("Car ", outside))
    _picture(tmp_path / "a.jpg")
    maps, faults, warnings = _drawn(tmp_path / "a.json", tmp_path / "labelme")
    assert maps == {"a.png": TRIANGLE_PIXELS} and not faults
    says("\n".join(warnings), "'Car ' and 'car'", "1 shape(s)", "shapes[1]")


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_numbers_end_soon_and_in_little_memory(tmp_path: Path, kind: str) -> None:
    image, annotation, fact = ABSURD[kind]
    path = _coco(tmp_path / "c.json", annotation, images=[image])
    _ends_soon(path, fact)


def _ends_soon(path: Path, fact: str) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    lines: list[str] = []
    for image in read_annotations(path).images():
        result = [image] if isinstance(image, str) else paint(image, {"crack": 0})
        assert isinstance(result, list), "drawn"
        lines += result
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    says("\n".join(lines), fact)


def test_absurd_labelme_shapes_end_soon_and_in_little_memory(tmp_path: Path) -> None:
    _ends_soon(_labelme(tmp_path, "long", _shape("crack", ZIGZAG)), "20000 points")
    mask = _shape("crack", [[0, 0], [9, 9]], "mask") | {"mask": base64.b64encode(PNG).decode()}
    _ends_soon(_labelme(tmp_path, "mask", mask), "4000 x 4000")
    _ends_soon(_labelme(tmp_path, "size", imageHeight=10**9, imageWidth=10**9), "1000000000 x 1000000000")


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("train.csv", "ImageId,EncodedPixels\na0.jpg,1 5 40 5\n", "CSV with run lengths"),
        ("via.json", '{"a": {"regions": [{"shape_attributes": {}}]}}', "VGG Image Annotator"),
        ("a.xml", "<annotation><object><bndbox/></object></annotation>", "Pascal VOC XML"),
        ("a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n", "YOLO text"),
    ],
)
def test_files_of_formats_that_are_not_read_are_named(
    tmp_path: Path, name: str, content: str, fact: str
) -> None:
    (tmp_path / name).write_text(content)
    with refused(DataError, name, fact):
        rasterize_folder(tmp_path / name, tmp_path / "out")
