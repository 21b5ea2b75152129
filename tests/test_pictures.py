"""Which way up pictures are read, damage that decoders only print, and files that are not read."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

import forks
from conftest import recipe_dict
from darseg.config.recipe import Recipe
from darseg.config.text import load_recipe
from darseg.data.classes import class_set
from darseg.data.examine import examine
from darseg.data.images import Reading, read_image, read_picture
from darseg.data.manifest import Manifest, Sample
from darseg.data.pictures import follow_marks
from darseg.data.suffixes import unread_files, unread_line
from darseg.errors import DataError, RecipeError
from darseg.run.build import manifest_of
from darseg.run.check import check
from darseg.run.data_digest import digest_manifest
from darseg.run.predict import predict_folder
from darseg.run.rounds import train
from wording import refused, says

CLASSES = class_set(["field", "road"])
H, W = 40, 56
SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8),
    (480, 320),
    interpolation=cv2.INTER_CUBIC,
)


def encoded(format: str = "JPEG", mark: int = 1, size: tuple[int, int] = (H, W), **options) -> bytes:
    exif = Image.Exif()
    exif[274] = mark
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH[: size[0], : size[1]]).save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def label(path: Path, size: tuple[int, int]) -> Path:
    values = np.zeros(size, np.uint8)
    values[:5, :9] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values)
    return path


def marked(
    folder: Path, marks: list[int], label_sizes: list[tuple[int, int]], unlabeled: tuple[int, ...] = ()
) -> Manifest:
    """A manifest of pictures of H x W stored pixels with these marks."""
    labeled = tuple(
        Sample(str(i), put(folder / f"{i}.jpg", encoded(mark=mark)), label(folder / f"l{i}.png", size))
        for i, (mark, size) in enumerate(zip(marks, label_sizes, strict=True))
    )
    rest = tuple(
        Sample(f"u{i}", put(folder / f"u{i}.jpg", encoded(mark=mark))) for i, mark in enumerate(unlabeled)
    )
    return Manifest(CLASSES, labeled, rest, ())


def ways(manifest: Manifest) -> set[bool]:
    return {sample.reading.upright for samples in manifest.roles().values() for sample in samples}


# Orientation


def test_sizes_of_label_maps_decide_which_way_up_pictures_are_read(tmp_path: Path) -> None:
    upright = marked(tmp_path / "a", [6, 1, 3], [(W, H), (H, W), (H, W)], unlabeled=(8, 1))
    stored = marked(tmp_path / "b", [6, 8, 3], [(H, W)] * 3, unlabeled=(6,))
    assert ways(follow_marks(upright, "auto")) == {True}
    assert ways(follow_marks(stored, "auto")) == {False}
    for manifest, way in ((upright, "upright"), (stored, "stored")):
        findings = examine(follow_marks(manifest, "auto"))
        assert findings.faults == ()
        assert findings.pixels["labeled"].tolist() == [3 * H * W - 135, 135, 0]
        says(
            "\n".join(findings.notes),
            way,
            f"{1 + (way == 'stored')} have the size" if way == "upright" else "2 that",
        )
    wrong = examine(follow_marks(stored, "upright"))
    assert len(wrong.faults) == 2
    says(wrong.faults[0], "EXIF 6", "data.orientation: stored", "0.jpg")
    assert len(examine(follow_marks(upright, "stored")).faults) == 1


def test_turns_that_keep_the_size_are_taken_for_upright_and_reported(tmp_path: Path) -> None:
    manifest = follow_marks(marked(tmp_path, [3, 2, 1], [(H, W)] * 3), "auto")
    assert ways(manifest) == {True}
    findings = examine(manifest)
    (warning,) = [line for line in findings.warnings if "EXIF" in line]
    says(warning, "2 labeled image(s)", "2 of both", "data.orientation", "darseg rasterize")
    assert warning in findings.pictures


def test_labels_of_both_kinds_are_a_fault_of_the_fewer(tmp_path: Path) -> None:
    manifest = follow_marks(marked(tmp_path, [6, 6, 8], [(W, H), (W, H), (H, W)]), "auto")
    (fault,) = examine(manifest).faults
    assert "2.jpg" in fault and "EXIF 8" in fault and "data.orientation: stored" in fault


def test_pictures_without_marks_are_read_as_before(tmp_path: Path) -> None:
    manifest = marked(tmp_path, [1, 1], [(H, W)] * 2)
    digests = digest_manifest(manifest)
    for orientation in ("auto", "upright"):
        followed = follow_marks(manifest, orientation)
        assert digest_manifest(followed) == digests and replace(followed, marks=None) == manifest
    assert digest_manifest(follow_marks(manifest, "stored")) != digests


@pytest.mark.parametrize("stored", [True, False])
def test_a_run_predicts_pictures_as_it_read_its_own(tmp_path: Path, stored: bool) -> None:
    for k in range(4):
        put(tmp_path / f"set/images/{k}.jpg", encoded(mark=6))
        label(tmp_path / f"set/labels/{k}.png", (H, W) if stored else (W, H))
    values = recipe_dict(tmp_path / "set") | {"rounds": [{"steps": 1}]}
    values["data"] = {"root": str(tmp_path / "set"), "classes": ["field", "road"]}
    values["data"]["validation"] = {"every": 2}
    values["training"] |= {"crop": 33, "batch": 2}
    path = put(tmp_path / "r.yaml", yaml.safe_dump(values).encode())
    train(load_recipe(path), tmp_path / "run")
    put(tmp_path / "in/new.jpg", encoded(mark=8))
    predicted = predict_folder(tmp_path / "run", tmp_path / "in", tmp_path / "out", ["index"])
    assert read_image(tmp_path / "out/index/new.png").shape[:2] == ((H, W) if stored else (W, H))
    says("\n".join(predicted.notes), "1 image(s)", "stored" if stored else "upright")
    told = predict_folder(tmp_path / "run", tmp_path / "in", tmp_path / "told", ["index"], recipe=path)
    assert "upright" in "\n".join(told.notes)


def test_a_turned_label_file_is_reported(tmp_path: Path) -> None:
    manifest = marked(tmp_path, [1], [(H, W)])
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(np.eye(H, W, dtype=np.uint8)).save(tmp_path / "l0.png", exif=exif)
    assert "1 label map(s) have an orientation mark" in "\n".join(examine(manifest).warnings)


def recipe_of(folder: Path, **data: object) -> Recipe:
    values = recipe_dict(folder) | {"data": {"root": str(folder), "classes": ["field", "road"], **data}}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def test_keys_of_the_recipe_reach_the_pictures(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.jpg", encoded(mark=6))
    label(tmp_path / "labels" / "a.png", (H, W))
    (sample,) = manifest_of(recipe_of(tmp_path)).labeled
    assert sample.reading == Reading(upright=False)
    keys = {"orientation": "upright", "bands": [3, 2, 1], "white": 4095, "black": 5, "max_pixels": H * W}
    (sample,) = manifest_of(recipe_of(tmp_path, **keys)).labeled
    assert sample.reading.upright and sample.reading.bands == (3, 2, 1)
    assert (sample.reading.scaling.black, sample.reading.scaling.white) == (5, 4095)
    assert np.array_equal(read_image(sample.image, sample.reading), read_image(sample.image)[..., ::-1])
    with refused(RecipeError, "data.bands", "data.max_pixels"):
        recipe_of(tmp_path, bands=[1, 2], max_pixels=0)
    with refused(RecipeError, "data.black", "data.white"):
        recipe_of(tmp_path, black=10, white=9)


def test_dark_pictures_of_16_bits_are_reported(tmp_path: Path) -> None:
    deep = SMOOTH[:H, :W, 0].astype(np.uint16) * 16
    assert cv2.imwrite(str(tmp_path / "a.png"), deep)
    sample = Sample("a", tmp_path / "a.png", label(tmp_path / "l.png", (H, W)))
    (warning,) = [line for line in examine(Manifest(CLASSES, (sample,), (), ())).warnings if "bits" in line]
    says(warning, "1 image(s)", f"{int(deep.max()):,}", "data.white: 4095")


# Damage


def damaged_files() -> dict[str, bytes]:
    jpeg = encoded(size=(320, 480), quality=90)
    restarts = cv2.imencode(".jpg", SMOOTH, [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes()
    progressive = encoded(size=(320, 480), quality=90, progressive=True)
    png, webp = encoded("PNG", size=(320, 480)), encoded("WEBP", size=(320, 480))
    tiff = encoded("TIFF", size=(320, 480), compression="tiff_lzw")
    half = len(jpeg) // 2
    return {
        "hole.jpg": jpeg[:half] + b"\0" * 200 + jpeg[half + 200 :],
        "missing.jpg": jpeg[:half] + jpeg[half + 300 :],
        "closed.jpg": jpeg[:half] + b"\xff\xd9",
        "cut.jpg": jpeg[:half],
        "restarts.jpg": restarts.replace(b"\xff\xd3", b"\xff\xd6"),
        "progressive.jpg": progressive[:half] + progressive[half + 50 :],
        "crc.png": png[:5000] + b"\0\1\2\3" + png[5004:],
        "cut.png": png[:5000],
        "cut.webp": webp[:-100],
        "strip.tif": tiff[: len(tiff) // 2] + b"\0" * 40 + tiff[len(tiff) // 2 + 40 :],
        "cut.tif": tiff[: len(tiff) // 2],
    }


def test_damage_is_a_fault_with_the_name_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = [
        Sample(name, put(tmp_path / name, data), label(tmp_path / "l.png", (320, 480)))
        for name, data in damaged_files().items()
    ]
    samples += [
        Sample(f"good{i}", put(tmp_path / f"good{i}.jpg", encoded(size=(320, 480))), samples[0].label)
        for i in range(9)
    ]
    findings = examine(Manifest(CLASSES, tuple(samples), (), ()))
    assert [fault.split(":")[0] for fault in findings.faults] == [
        str(tmp_path / name) for name in damaged_files()
    ]
    says("\n".join(findings.faults), "found marker 0xd6 instead of RST3", "premature end")
    assert capfd.readouterr() == ("", "")


def test_holes_that_the_decoder_does_not_notice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jpeg, silent = encoded(size=(320, 480)), 0
    for place in range(1500, len(jpeg) - 200, 500):
        path = put(tmp_path / "hole.jpg", jpeg[:place] + bytes(40) + jpeg[place + 40 :])
        with pytest.raises(DataError) as caught:
            read_image(path)
        silent += "hole of zeros" in str(caught.value)
    assert silent > 2 and capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"quality": 5}])
def test_flat_pictures_have_no_holes(tmp_path: Path, options: dict[str, object]) -> None:
    for color in ("black", "white", "gray"):
        for mode in ("L", "RGB", "CMYK"):
            buffer = io.BytesIO()
            Image.new("RGB", (480, 320), color).convert(mode).save(buffer, "JPEG", **options)
            assert read_image(put(tmp_path / "flat.jpg", buffer.getvalue())).shape == (320, 480, 3)


def test_further_data_after_a_picture_do_no_harm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As in motion photos, and padding before the end that some cameras write."""
    jpeg = encoded(size=(320, 480))
    truth = read_image(put(tmp_path / "a.jpg", jpeg))
    files = {
        "video.jpg": jpeg + b"\0\0\0\x18ftypmp42" * 50,
        "twice.jpg": jpeg + jpeg,
        "padded.jpg": jpeg[:-2] + b"\0" * 300 + b"\xff\xd9",
        "after.png": encoded("PNG", size=(320, 480)) + b"more",
    }
    for name, data in files.items():
        picture = read_picture(put(tmp_path / name, data))
        assert picture.pixels.shape == truth.shape
        assert name == "after.png" or np.array_equal(picture.pixels, truth), name
    assert capfd.readouterr() == ("", "")


def test_lines_of_decoders_belong_to_their_files_and_others_are_passed_on(tmp_path: Path) -> None:
    """In a process of its own, since pytest has standard error of its own."""
    for name in ("hole.jpg", "restarts.jpg"):
        put(tmp_path / name, damaged_files()[name])
    put(tmp_path / "good.jpg", encoded(size=(320, 480)))
    code = """
import os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import cv2, numpy as np
from darseg.data.decoders import decode_quietly
names = ["good.jpg", "hole.jpg", "good.jpg", "restarts.jpg"] * 20
data = {name: np.fromfile(name, np.uint8) for name in names}
ended = False
def shout():
    count = 0
    while not ended or count < 50:
        os.write(2, f"line {count}\\n".encode())
        count += 1
        time.sleep(0.001)
    print(count)
thread = threading.Thread(target=shout)
thread.start()
with ThreadPoolExecutor(4) as pool:
    lines = list(pool.map(lambda name: decode_quietly(lambda: cv2.imdecode(data[name], 1))[1], names))
ended = True
thread.join()
print(sum(bool(line) for line in lines), all(bool(line) == (name != "good.jpg") for name, line in zip(names, lines)))
"""
    done = forks.python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, damaged, right = done.stdout.split()
    assert (damaged, right) == ("40", "True")
    assert sorted(done.stderr.split("\n")[:-1]) == sorted(f"line {i}" for i in range(int(count)))


def test_a_closed_standard_error_is_left_closed() -> None:
    code = """
import os
os.close(2)
from darseg.data.decoders import decode_quietly
assert decode_quietly(lambda: os.write(2, b"Corrupt JPEG data: x\\n"))[1] == ["Corrupt JPEG data: x"]
try:
    os.fstat(2)
except OSError:
    print("closed")
"""
    done = forks.python("-c", code)
    assert done.returncode == 0 and done.stdout == "closed\n"


# Files that are not read


def test_files_of_other_kinds_are_listed(tmp_path: Path) -> None:
    for name in (
        "a.HEIC",
        "deep/b.heic",
        "c.npy",
        "d.m4v",
        "e.nii.gz",
        "f.jpg",
        "notes.txt",
        ".g.heic",
        ".h/i.heic",
    ):
        put(tmp_path / name, b"")
    counts = unread_files(tmp_path, (".jpg",))
    assert counts == {".heic": 2, ".npy": 1, ".m4v": 1, ".nii.gz": 1}
    says(unread_line(tmp_path, counts), "5 file(s)", "2 .heic", "PNG", "MP4")
    assert unread_line(tmp_path, unread_files(tmp_path, (*counts, ".jpg"))) == ""


def test_check_lists_what_it_does_not_read(tmp_path: Path) -> None:
    for index in range(4):
        put(tmp_path / "images" / f"{index}.jpg", encoded())
    put(tmp_path / "images" / "4.HEIC", b"")
    label(tmp_path / "labels" / "0.png", (H, W))
    label(tmp_path / "labels" / "1.png", (H, W))
    put(tmp_path / "labels" / "2.npy", b"")
    put(tmp_path / "labels" / "3.jpg", encoded())
    lines = [line for line in check(recipe_of(tmp_path)).warnings if "not read" in line]
    assert len(lines) == 2
    assert str(tmp_path / "images") in lines[0] and "1 .heic" in lines[0]
    assert str(tmp_path / "labels") in lines[1] and "1 .npy" in lines[1] and "1 .jpg" in lines[1]


def test_check_and_init_name_what_they_did_not_read_if_there_is_nothing_else(tmp_path: Path, call) -> None:
    folder = tmp_path / "photos"
    put(folder / "images" / "a.jpg", encoded())
    put(folder / "labels" / "a.npy", b"")
    recipe_of(folder)
    for command in (("check", folder / "r.yaml"), ("init", folder, "--out", tmp_path / "new.yaml")):
        status, _, errors = call(*command)
        assert status == 2 and "1 .npy" in errors and "Convert them to PNG" in errors, command
