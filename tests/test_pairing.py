"""Label maps whose names differ from their images': paired if that is clear, otherwise refused; the rest is counted."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from darseg.data.classes import class_set
from darseg.data.manifest import Manifest, Source, Sources, build_manifest
from darseg.data.maps import check_names
from darseg.data.pairing import pair
from darseg.data.suffixes import unread_files, unread_line
from darseg.data.walk import unreadable
from darseg.errors import DataError
from wording import refused, says


def _draw(root: Path, images: Sequence[str], labels: Sequence[str]) -> Path:
    for folder, names in (("images", images), ("labels", labels)):
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _, data = cv2.imencode(Path(name).suffix, np.zeros((3, 4), np.uint8))
            path.write_bytes(data.tobytes())
    return root


def _manifest(root: Path, list_lines: Sequence[str] = ()) -> Manifest:
    source = Source(root, root / "images", root / "labels")
    if not list_lines:
        return build_manifest(class_set(("ground", "box")), Sources(source))
    (root / "list.txt").write_text("\n".join(list_lines))
    labeled = Source(root, root / "images", root / "labels", list_file=root / "list.txt")
    return build_manifest(class_set(("ground", "box")), Sources(source, labeled=labeled))


def _labels(manifest: Manifest) -> dict[str, str]:
    return {sample.image.name: sample.label.name for sample in manifest.labeled if sample.label}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (unicodedata.normalize("NFD", "Mühle.jpg"), unicodedata.normalize("NFC", "Mühle.png")),
        ("IMG_1.JPG", "img_1.PNG"),
        ("b.jpg", "b_mask.png"),
        ("b.jpg", "b-labels.png"),
        ("b.jpg", "b.jpg.png"),
        ("b.jpg", "mask_b.png"),
        ("b_image.jpg", "b_gt.png"),
        ("855_sat.jpg", "855_mask.png"),
        ("day 1/b.jpg", "Day 1/b_GT.png"),
    ],
)
def test_names_that_differ_are_paired_and_counted(tmp_path: Path, image: str, label: str) -> None:
    manifest = _manifest(_draw(tmp_path, ["a.jpg", image, "c.jpg"], ["a.png", label]))
    assert _labels(manifest) == {"a.jpg": "a.png", Path(image).name: Path(label).name}
    assert [sample.id for sample in manifest.unlabeled] == ["c"]
    says(manifest.notes[0], "1 image(s)", Path(image).name, Path(label).name, vary=["for example .*"])
    assert not manifest.warnings


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    manifest = _manifest(_draw(tmp_path, ["b.jpg"], ["b.png", "b_mask.png"]))
    assert _labels(manifest) == {"b.jpg": "b.png"} and not manifest.notes
    says("\n".join(manifest.warnings), "1 label map(s)", str(tmp_path / "labels/b_mask.png"))


def test_a_doubtful_pair_is_refused_with_the_names(tmp_path: Path) -> None:
    root = _draw(tmp_path, ["a.jpg", "b.jpg"], ["a.png", "b_mask.png", "b_label.png"])
    with refused(DataError, "b.jpg", "b_mask.png", "b_label.png"):
        _manifest(root)
    manifest = _manifest(root, ["a", "images/b.jpg labels/b_mask.png"])  # a list decides
    assert _labels(manifest) == {"a.jpg": "a.png", "b.jpg": "b_mask.png"}


def test_two_images_are_not_paired_with_one_label_map() -> None:
    names = [Path(name) for name in ("Ä.jpg", "Ä.png")]
    images = {unicodedata.normalize("NFD", "Ä"): names[0], "ä": names[0]}
    pairs = pair(images, {"Ä": names[1]})
    assert pairs.label_of == {unicodedata.normalize("NFD", "Ä"): "Ä"}  # case differs more
    doubtful = pair({"x_image": names[0], "x_rgb": names[0]}, {"x_mask": names[1]})
    assert not doubtful.label_of and set(doubtful.ambiguous) == {"x_image", "x_rgb"}


def test_label_maps_that_a_list_names_are_not_lonely(tmp_path: Path) -> None:
    root = _draw(tmp_path, ["a.jpg", "b.jpg"], ["a.png", "other.png", "gone.png"])
    manifest = _manifest(root, ["a", "images/b.jpg labels/other.png"])
    says("\n".join(manifest.warnings), "1 label map(s)", "gone.png")


def test_without_labeled_images_the_files_there_are_listed(tmp_path: Path) -> None:
    root = _draw(tmp_path, ["a.png", "b.png"], ["a.jpg", "b.jpg"])
    with refused(DataError, f"{root / 'labels'}", "2 .jpg", "export them as PNG"):
        _manifest(root)


FOREIGN = {
    "YOLO text": ("a.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.6 0.6 0.9 0.6\n"),
    "CSV with run lengths": ("train.csv", "ImageId,EncodedPixels\na0.jpg,1 5 40 5\n"),
    "VGG Image Annotator (VIA) JSON": ("via.json", '{"a": {"regions": [{"shape_attributes": {}}]}}'),
    "Supervisely JSON": ("a.json", '{"objects": [{"classTitle": "car", "geometryType": "polygon"}]}'),
    "Label Studio JSON": ("p.json", '[{"annotations": [{"result": [{"type": "brushlabels"}]}]}]'),
    "Pascal VOC XML": ("a.xml", "<annotation><object><bndbox/></object></annotation>"),
    "GeoJSON": ("a.geojson", '{"type": "FeatureCollection", "features": []}'),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_annotation_files_of_other_formats_are_named(tmp_path: Path, kind: str) -> None:
    name, content = FOREIGN[kind]
    (tmp_path / name).write_text(content)
    for harmless in ("README", "notes.txt", "classes.yaml", "list.csv", "package.json"):
        (tmp_path / harmless).write_text('{"name": 1}' if harmless.endswith("json") else "about 3 things\n")
    counts = unread_files(tmp_path, (".png",))
    assert list(counts) == [kind]
    says(unread_line(tmp_path, counts), kind)


def test_files_of_unknown_kinds_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.xyz", "c.xyz", "d", "LICENSE", ".hidden.xyz", "e.jpg"):
        (tmp_path / name).touch()
    assert unread_files(tmp_path, (".png",)) == {".xyz": 2, "without a suffix": 1, ".jpg": 1}
    assert not unread_files(tmp_path / "gone", ()) and unreadable(tmp_path / "gone") == ""


def test_names_that_are_too_long_for_the_folder_are_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "n" * 251  # the longest that ID.png can have on usual file systems
    check_names(tmp_path, ["a", long])
    (tmp_path / f"{long}.png").touch()
    with refused(DataError, "1 image(s)", "256 bytes", "255", vary=["n{100,}"]):
        check_names(tmp_path, ["a", f"{long}n"])
    deep = "/".join(["d" * 200] * 21)
    with refused(DataError, "1 image(s)", "path", "4095", vary=[r"\S*d{200}/\S*", r"\d+ bytes"]):
        check_names(tmp_path / "gone", ["a", deep])
    monkeypatch.setattr("os.pathconf", lambda *_: 143)  # an encrypted folder (eCryptfs)
    with refused(DataError, "2 image(s)", "143", vary=["n{100,}"]):
        check_names(tmp_path, ["a", "n" * 122, "n" * 140])
