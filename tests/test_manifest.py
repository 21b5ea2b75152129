"""Images and labels are found, paired and checked; every fault is reported with its file."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.advice import unknown_values
from darseg.data.classes import IGNORE, class_set
from darseg.data.encoding import LabelEncoding
from darseg.data.examine import examine
from darseg.data.images import IMAGE_SUFFIXES, Reading, image_size, read_image
from darseg.data.labels import read_label
from darseg.data.manifest import (
    Manifest,
    Sample,
    Source,
    Sources,
    build_manifest,
    find_files,
    find_samples,
    sample_id,
)
from darseg.data.walk import unreadable
from darseg.errors import DataError
from wording import refused, says

CLASSES = class_set(["field", "road", "house"])
IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
LABEL = np.random.default_rng(0).integers(0, 3, (6, 8), np.uint8)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values if values.ndim == 2 else values[..., ::-1])
    return path


def populate(root: Path, images: str = "", labels: str = "") -> Source:
    """Write images and label maps with these ids (separated by blanks) into `images/` and `labels/`."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    for name in images.split():
        save(root / "images" / f"{name}.png", IMAGE)
    for name in labels.split():
        save(root / "labels" / f"{name}.png", LABEL)
    return Source(root, root / "images", root / "labels")


def listed(source: Source, text: str | bytes, name: str = "list.txt", **more) -> Source:
    path = source.root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return replace(source, list_file=path, **more)


def ids(samples) -> list[str]:
    return [sample.id for sample in samples]


def png(values: np.ndarray, depth: int, color: int, *chunks: bytes) -> bytes:
    """A PNG written by hand: one or two channels of uint8 values, `depth` bits each in the file."""
    lines = b""
    for row in values.reshape(len(values), -1):
        bits = "".join(f"{value:0{depth}b}" for value in row)
        bits += "0" * (-len(bits) % 8)
        lines += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def with_segment(data: bytes, payload: bytes) -> bytes:
    """A JPEG with an APP1 segment put first."""
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


# Reading images


@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_images_are_read_as_rgb(tmp_path: Path, suffix: str):
    path = save(tmp_path / f"a{suffix}", IMAGE)
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and np.array_equal(image, IMAGE)
    assert image_size(path) == (6, 8)


def test_jpegs_and_gray_images_are_read_as_rgb(tmp_path: Path):
    soft = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    for suffix in (".jpg", ".jpeg", ".JPG"):
        assert np.abs(read_image(save(tmp_path / f"a{suffix}", soft)).astype(int) - soft).max() < 8
    gray = read_image(save(tmp_path / "gray.png", LABEL))
    assert np.array_equal(gray, np.repeat(LABEL[..., None], 3, 2))


def test_orientation_marks_turn_the_image_unless_it_is_to_stay_as_stored(tmp_path: Path):
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # orientation: a quarter turn
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<I", 0)
    image = np.zeros((16, 40, 3), np.uint8)
    image[:, 20:] = 250
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_segment(jpeg(image), exif))
    assert cv2.imread(str(path)).shape == (40, 16, 3)  # OpenCV follows this tag by default
    stored = Reading(upright=False)
    assert image_size(path) == (40, 16) and image_size(path, stored) == (16, 40)
    image = read_image(path, stored)
    assert image[:, 22:].min() > 200 and image[:, :18].max() < 50


def test_files_that_are_not_images_are_refused(tmp_path: Path):
    with refused(DataError, str(tmp_path / "gone.jpg")):
        read_image(tmp_path / "gone.jpg")
    for name, content in {"text.jpg": b"not an image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with refused(DataError, str(tmp_path / name), ".jpg, .jpeg, .jpe, .jfif, .png"):
            read_image(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with refused(DataError, str(tmp_path / "folder.png"), "it is a folder"):
        read_image(tmp_path / "folder.png")


def test_files_without_read_permission_are_refused(tmp_path: Path, monkeypatch):
    def refuse(path: Path, *_: object):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr("os.open", refuse)
    with refused(DataError, str(tmp_path / "a.png"), "Permission denied"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["jpg", "png", "thumbnail"])
def test_files_that_are_cut_off_are_refused(tmp_path: Path, kind: str):
    """Decoders would silently fill the rest with gray."""
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = cv2.imencode(".png", big)[1].tobytes() if kind == "png" else jpeg(big)
    if kind == "thumbnail":  # it has an end mark of its own
        data = with_segment(data, b"Exif\0\0" + jpeg(big[:16, :16]))
    path = tmp_path / f"a.{kind[:3].replace('thu', 'jpg')}"
    path.write_bytes(data)
    assert image_size(path) == (64, 64)
    for length in (len(data) // 2, len(data) * 3 // 4, len(data) - 20):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"{path.name}: .*{length} bytes"):
            read_image(path)
    path.write_bytes(data[:200])
    with refused(DataError, str(path), "200 bytes"):
        read_image(path)


def test_data_that_cameras_add_after_the_picture_is_ignored(tmp_path: Path):
    path = tmp_path / "motion.jpg"
    path.write_bytes(jpeg(IMAGE) + b"\0film" * 2000)
    assert image_size(path) == (6, 8)


def test_a_damaged_png_is_refused(tmp_path: Path):
    data = bytearray(cv2.imencode(".png", IMAGE)[1].tobytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    with refused(DataError, str(tmp_path / "a.png")):
        read_image(tmp_path / "a.png")


# Reading labels


def test_all_values_of_8_bit_labels_are_read_unchanged(tmp_path: Path):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "a.png", every)
    label = read_label(path)
    assert label.dtype == np.uint8 and np.array_equal(label, every)


def test_the_ignore_value_of_the_recipe_becomes_255(tmp_path: Path):
    path = save(tmp_path / "a.png", np.array([[0, 11], [10, 255]], np.uint8))
    assert read_label(path, LabelEncoding(ignore=11)).tolist() == [[0, 255], [10, 255]]
    assert read_label(path, LabelEncoding(ignore=11)).dtype == np.uint8
    assert read_label(path).tolist() == [[0, 11], [10, 255]]


def test_a_png_written_by_hand_is_valid(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(LABEL, 8, 0))
    assert np.array_equal(read_label(tmp_path / "a.png"), LABEL)


# Folders


def test_files_are_found_in_nested_folders_in_order_of_their_ids(tmp_path: Path):
    for name in ("b/2.png", "b/10.JPG", "a.jpeg", "b.c.png", "deep/er/x y.png"):
        save(tmp_path / name, IMAGE)
    for name in ("notes.txt", ".hidden.png", ".checkpoints/a.png", "deep/.cache/z.png", "b/2.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = find_files(tmp_path, IMAGE_SUFFIXES)
    assert list(files) == ["a", "b.c", "b/10", "b/2", "deep/er/x y"]
    assert files["b/10"] == tmp_path / "b" / "10.JPG"


def test_linked_folders_are_followed(tmp_path: Path):
    save(tmp_path / "elsewhere" / "a.png", IMAGE)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list(find_files(tmp_path / "images", IMAGE_SUFFIXES)) == ["linked/a"]


def test_missing_and_empty_folders_are_refused(tmp_path: Path):
    with refused(DataError, str(tmp_path / "gone"), "data.root", "data.images", "data.labels"):
        find_files(tmp_path / "gone", IMAGE_SUFFIXES)
    source = populate(tmp_path)
    assert find_files(source.images, IMAGE_SUFFIXES) == {}
    with refused(DataError, str(source.images), ".jpg, .jpeg, .jpe, .jfif, .png"):
        find_samples(source)
    with refused(DataError, str(source.images)):
        build_manifest(CLASSES, Sources(source))


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch):
    save(tmp_path / "open" / "a.png", IMAGE)
    (tmp_path / "shut").mkdir()
    scandir = __import__("os").scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert list(find_files(tmp_path, IMAGE_SUFFIXES)) == ["open/a"]
    says(unreadable(tmp_path), "1 folder", str(tmp_path / "shut"), "Permission denied")
    with refused(DataError, str(tmp_path / "shut"), "Permission denied"):
        find_files(tmp_path / "shut", IMAGE_SUFFIXES)


def test_ids_must_differ_by_more_than_suffix_and_case(tmp_path: Path):
    for name in ("a.jpg", "a.png", "b/C.png", "B/c.png", "d.png"):
        save(tmp_path / name, IMAGE)
    pairs = [
        f"{tmp_path / 'a.jpg'} and {tmp_path / 'a.png'}",
        f"{tmp_path / 'B/c.png'} and {tmp_path / 'b/C.png'}",
    ]
    with refused(DataError, str(tmp_path), *pairs) as caught:
        find_files(tmp_path, IMAGE_SUFFIXES)
    assert "d.png" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.jpg", "a"), ("b/a.b.png", "b/a.b"), ("./x//y z.PNG", "x/y z"), (Path("c/d"), "c/d")],
)
def test_a_sample_id_is_the_path_without_suffix(path: str | Path, expected: str):
    assert sample_id(path) == expected


def test_images_are_paired_with_the_label_of_their_id(tmp_path: Path):
    source = populate(tmp_path, "b/1 a c", "a b/1 b/2")
    save(source.images / "c.txt.png", IMAGE)
    samples = find_samples(source)
    assert samples == (
        Sample("a", source.images / "a.png", source.labels / "a.png"),
        Sample("b/1", source.images / "b/1.png", source.labels / "b/1.png"),
        Sample("c", source.images / "c.png"),
        Sample("c.txt", source.images / "c.txt.png"),
    )


def test_label_maps_in_a_folder_below_the_images_are_not_images(tmp_path: Path):
    save(tmp_path / "a.png", IMAGE)
    save(tmp_path / "labels" / "a.png", LABEL)
    source = Source(tmp_path, tmp_path, tmp_path / "labels")
    assert find_samples(source) == (Sample("a", tmp_path / "a.png", tmp_path / "labels" / "a.png"),)


# List files


def test_lists_of_ids_keep_their_order(tmp_path: Path):
    source = populate(tmp_path, "a b/1 c", "a b/1")
    assert find_samples(listed(source, "c\na\nb/1\n")) == (
        Sample("c", source.images / "c.png"),
        Sample("a", source.images / "a.png", source.labels / "a.png"),
        Sample("b/1", source.images / "b/1.png", source.labels / "b/1.png"),
    )


@pytest.mark.parametrize(
    "text", ["a\nb\n", "a\nb", "a \t\r\nb\r\n", "\n\n  a\n\nb\n \n", "\ufeffa\nb\n", b"\xef\xbb\xbf  a\r\nb"]
)
def test_lists_from_all_editors(tmp_path: Path, text: str | bytes):
    assert ids(find_samples(listed(populate(tmp_path, "a b c"), text))) == ["a", "b"]


def test_lists_may_name_paths(tmp_path: Path):
    source = populate(tmp_path, "a b", "b")
    save(tmp_path / "city" / "x.jpg", IMAGE)
    save(tmp_path / "masks" / "x_train.png", LABEL)
    text = """
        city/x.jpg masks/x_train.png
        images/a.png\tlabels/b.png
        images/b.png
    """
    assert find_samples(listed(source, text)) == (
        Sample("city/x", tmp_path / "city/x.jpg", tmp_path / "masks/x_train.png"),
        Sample("images/a", tmp_path / "images/a.png", tmp_path / "labels/b.png"),
        Sample("images/b", tmp_path / "images/b.png", tmp_path / "labels/b.png"),  # the label of its id
    )
    full = listed(source, f"{tmp_path}/city/x.jpg {tmp_path}/masks/x_train.png")
    assert find_samples(full) == find_samples(listed(source, "./city//x.jpg masks/x_train.png"))


def test_names_in_lists_may_contain_blanks(tmp_path: Path):
    source = populate(tmp_path)
    for name in ("my  street.jpg", "my.jpg", "my.jpg copy.jpg", "a b c.png"):
        save(source.images / name, IMAGE)
    save(source.labels / "the mask  1.png", LABEL)
    save(source.labels / "a b c.png", LABEL)
    text = """
        images/my  street.jpg   labels/the mask  1.png
        images/my.jpg labels/the mask  1.png
        images/my.jpg copy.jpg labels/the mask  1.png
        a b c
    """
    expected = (
        Sample("images/my  street", source.images / "my  street.jpg", source.labels / "the mask  1.png"),
        Sample("images/my", source.images / "my.jpg", source.labels / "the mask  1.png"),
        Sample("images/my.jpg copy", source.images / "my.jpg copy.jpg", source.labels / "the mask  1.png"),
        Sample("a b c", source.images / "a b c.png", source.labels / "a b c.png"),
    )
    assert find_samples(listed(source, text)) == expected
    assert find_samples(listed(source, "images/my  street.jpg")) == (
        Sample("images/my  street", source.images / "my  street.jpg"),
    )


words = st.text("ab .", min_size=1, max_size=6).map(str.strip).filter(lambda word: word.strip("."))


@settings(max_examples=60, deadline=None)
@given(image=words, label=words, gap=st.sampled_from([" ", "  ", "\t", " \t "]))
def test_any_names_with_blanks_are_split_where_the_files_are(tmp_path_factory, image, label, gap):
    root = tmp_path_factory.mktemp("blanks")
    source = Source(root, root / "images", root / "labels")
    save(root / "i" / f"{image}.png", IMAGE)
    save(root / "l" / f"{label}.png", LABEL)
    samples = find_samples(listed(source, f"i/{image}.png{gap}l/{label}.png\n"))
    assert samples == (Sample(f"i/{image}", root / "i" / f"{image}.png", root / "l" / f"{label}.png"),)


def test_lines_that_cannot_be_used_are_all_reported(tmp_path: Path):
    root = tmp_path / "root"
    source = populate(root, "a", "a")
    outside = save(tmp_path / "outside" / "o.png", IMAGE)
    (root / "notes.txt").write_text("")
    lines = [
        "a",
        "gone",
        "images/gone.jpg labels/a.png",
        "images/a.png labels/gone.png",
        "notes.txt labels/a.png",
        "../outside/o.png labels/a.png",
        f"{outside} labels/a.png",
        "x" * 5000,
    ]
    facts = [f"line {number}: {lines[number - 1]!r}" for number in (2, 3, 5, 8)]
    # A label map named after such an id would be written outside the run folder.
    images = [(6, lines[5].split()[0]), (7, str(outside))]
    with refused(DataError, f"{root / 'list.txt'}: 7 line(s)", *facts, vary=["x{5000}"]) as caught:
        find_samples(listed(source, "\n".join(lines)))
    reported = str(caught.value).splitlines()[1:]
    assert len(reported) == 7 and [line.split(":")[0] for line in reported] == [
        f"  - line {number}" for number in (2, 3, 4, 5, 6, 7, 8)
    ]
    assert str(root / "labels/gone.png") in reported[2]
    assert all(
        image in reported[number - 2] and str(root) in reported[number - 2] for number, image in images
    )


def test_lists_that_name_an_image_twice_are_refused(tmp_path: Path):
    source = populate(tmp_path, "a b")
    save(source.images / "B2.png", IMAGE)
    save(tmp_path / "images" / "b2x" / "y.png", IMAGE)
    save(tmp_path / "images" / "B2X" / "Y.jpg", IMAGE)
    paths = replace(source, images=tmp_path / "none")
    image = source.images / "a.png"
    with refused(DataError, str(tmp_path / "list.txt"), f"{image} and {image}"):
        find_samples(listed(paths, "images/a.png\nimages/b.png\nimages/a.png"))
    pair = f"{source.images / 'b2x/y.png'} and {source.images / 'B2X/Y.jpg'}"
    with refused(DataError, str(tmp_path / "list.txt"), pair):
        find_samples(listed(paths, "images/b2x/y.png\nimages/B2X/Y.jpg"))


def test_lists_that_cannot_be_read_are_refused(tmp_path: Path):
    source = populate(tmp_path, "a")
    with refused(DataError, str(tmp_path / "gone.txt"), "darseg split"):
        find_samples(replace(source, list_file=tmp_path / "gone.txt"))
    with refused(DataError, str(tmp_path / "list.txt"), "UTF-8"):
        find_samples(listed(source, "größe".encode("latin-1")))
    with refused(DataError, str(source.images), "it is a folder"):
        find_samples(replace(source, list_file=source.images))
    with refused(DataError, str(tmp_path / "list.txt"), "names no images"):
        find_samples(listed(source, "\n  \n"))


# every and except_every


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 20), step=st.integers(2, 6), shuffle=st.randoms())
def test_every_and_except_every_divide_a_list(tmp_path_factory, count, step, shuffle):
    root = tmp_path_factory.mktemp("parts")
    source = populate(root)
    names = [f"{index:02d}" for index in range(count)]
    for name in names:
        (source.images / f"{name}.png").write_bytes(b"")
    shuffle.shuffle(names)
    source = listed(source, "\n".join(names))
    kept = ids(find_samples(replace(source, every=step)))
    assert kept == names[::step]
    others = replace(source, except_every=step)
    if count == 1:
        with pytest.raises(DataError, match=r"list\.txt"):
            find_samples(others)
    else:
        assert ids(find_samples(others)) == [name for name in names if name not in kept]


def test_every_of_a_folder_counts_the_images_that_have_a_label(tmp_path: Path):
    source = populate(tmp_path, "a b c d e f", "b d e f")
    assert ids(find_samples(replace(source, every=2))) == ["b", "e"]
    assert ids(find_samples(replace(source, except_every=2))) == ["d", "f"]


def test_every_is_refused_for_a_folder_without_labels(tmp_path: Path):
    source = populate(tmp_path / "x", "a b")
    for more in ({"every": 2}, {"except_every": 2}):
        with refused(DataError, str(source.images), "2 images", str(source.labels), "data.labels"):
            find_samples(replace(source, **more))


# Roles


def role_ids(manifest: Manifest) -> dict[str, list[str]]:
    return {role: ids(samples) for role, samples in manifest.roles().items() if samples}


def test_images_with_a_label_are_labeled_by_default_and_the_others_unlabeled(tmp_path: Path):
    manifest = build_manifest(CLASSES, Sources(populate(tmp_path, "a b c d", "b d")))
    assert role_ids(manifest) == {"labeled": ["b", "d"], "unlabeled": ["a", "c"]}
    assert manifest.classes is CLASSES
    assert all(s.label is None for s in manifest.unlabeled) and all(s.label for s in manifest.labeled)


def test_validation_takes_every_nth_of_those_with_a_label(tmp_path: Path):
    source = populate(tmp_path, "a b c d e f g", "b d e f g")
    manifest = build_manifest(CLASSES, Sources(source, validation=replace(source, every=3)))
    assert role_ids(manifest) == {
        "labeled": ["d", "e", "g"],
        "unlabeled": ["a", "c"],
        "validation": ["b", "f"],
    }
    (note,) = manifest.notes
    says(note, "validation took 2", "images", "not trained on: b, f.")
    assert note in examine(manifest).notes


def test_what_validation_takes_is_said_briefly(tmp_path: Path):
    source = populate(tmp_path, names := " ".join(f"i{k:02}" for k in range(20)), names)
    (note,) = build_manifest(CLASSES, Sources(source, validation=replace(source, every=2))).notes
    assert note.endswith("i00, i02, i04, i06, i08, i10 and 4 more.")
    (tmp_path / "val.txt").write_text("i01\ni02\n")
    listed = replace(source, list_file=tmp_path / "val.txt")
    (note,) = build_manifest(CLASSES, Sources(source, validation=listed)).notes
    says(note, "validation: 2 image(s)", str(tmp_path / "val.txt"))


def test_labels_of_unlabeled_images_are_kept_for_measuring(tmp_path: Path):
    """The usual experiment: every nth image keeps its label, and the others count as unlabeled."""
    source = populate(tmp_path, "a b c d e", "a b c d")
    every, others = replace(source, every=2), replace(source, except_every=2)
    manifest = build_manifest(CLASSES, Sources(source, labeled=every, unlabeled=others))
    assert role_ids(manifest) == {"labeled": ["a", "c"], "unlabeled": ["b", "d"]}
    assert all(sample.label for sample in manifest.unlabeled)
    manifest = build_manifest(CLASSES, Sources(source, labeled=every))  # the rest: e has no label
    assert role_ids(manifest) == {"labeled": ["a", "c"], "unlabeled": ["b", "d", "e"]}
    manifest = build_manifest(CLASSES, Sources(source, unlabeled=every))
    assert role_ids(manifest) == {"labeled": ["b", "d"], "unlabeled": ["a", "c"]}


def test_roles_from_lists_and_other_folders(tmp_path: Path):
    source = populate(tmp_path, "a b c d", "a b c d")
    elsewhere = populate(tmp_path / "other", "t", "t")
    manifest = build_manifest(
        CLASSES,
        Sources(
            source,
            labeled=listed(source, "d\na", "labeled.txt"),
            validation=listed(source, "b", "validation.txt"),
            test=elsewhere,
        ),
    )
    assert role_ids(manifest) == {
        "labeled": ["d", "a"],
        "unlabeled": ["c"],
        "validation": ["b"],
        "test": ["t"],
    }


def test_the_default_folder_is_needed_only_if_it_is_used(tmp_path: Path):
    source = populate(tmp_path, "a b", "a")
    nowhere = replace(source, images=tmp_path / "nowhere")
    labeled, unlabeled = listed(source, "a", "l.txt"), listed(source, "b", "u.txt")
    assert role_ids(build_manifest(CLASSES, Sources(nowhere, labeled=labeled, unlabeled=unlabeled))) == {
        "labeled": ["a"],
        "unlabeled": ["b"],
    }
    with refused(DataError, str(tmp_path / "nowhere")):
        build_manifest(CLASSES, Sources(nowhere, labeled=labeled))


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("lvtun"), min_size=1, max_size=10),
    labels=st.lists(st.booleans(), min_size=10),
)
def test_each_image_of_the_default_folder_has_one_role(tmp_path_factory, kinds, labels):
    """With lists for some of the roles, the other images get a role by their label, and none is lost."""
    source = populate(tmp_path_factory.mktemp("roles"))
    in_list: dict[str, list[str]] = {kind: [] for kind in "lvtu"}
    labeled = []
    for index, kind in enumerate(kinds):
        (source.images / f"{index}.png").write_bytes(b"")
        if kind in "lvt" or labels[index]:
            (source.labels / f"{index}.png").write_bytes(b"")
            labeled.append(f"{index}")
        if kind in in_list:
            in_list[kind].append(f"{index}")
    sources = [
        listed(source, "\n".join(in_list[kind]), f"{kind}.txt") if in_list[kind] else None for kind in "luvt"
    ]
    rest = [f"{index}" for index, kind in enumerate(kinds) if kind == "n"]
    expected = {
        "labeled": in_list["l"] or [name for name in rest if name in labeled],
        "unlabeled": in_list["u"],
        "validation": in_list["v"],
        "test": in_list["t"],
    }
    expected["unlabeled"] = in_list["u"] or [name for name in rest if name not in expected["labeled"]]
    if expected["labeled"]:
        manifest = build_manifest(CLASSES, Sources(source, *sources))
        assert role_ids(manifest) == {role: names for role, names in expected.items() if names}
    else:
        with pytest.raises(DataError, match=r"data\.labels"):
            build_manifest(CLASSES, Sources(source, *sources))


def test_faults_of_the_roles_are_all_reported(tmp_path: Path):
    source = populate(tmp_path, "a b c d", "b")
    with pytest.raises(DataError) as caught:
        build_manifest(
            CLASSES,
            Sources(
                source,
                labeled=listed(source, "a\nb\nimages/c.png", "l.txt"),
                unlabeled=listed(source, "b", "u.txt"),
                validation=listed(source, "a", "v.txt"),
                test=listed(source, "d", "t.txt"),
            ),
        )
    lines = str(caught.value).splitlines()[1:]
    facts = [
        ["labeled: 2 image(s)", "'a'", "data.labels"],
        ["validation: 1 image(s)", "'a'"],
        ["test: 1 image(s)", "'d'"],
        [str(source.images / "b.png"), "labeled", "unlabeled"],
        [str(source.images / "a.png"), "labeled", "validation"],
    ]
    assert len(lines) == len(facts)
    assert all(fact in line for line, parts in zip(lines, facts, strict=True) for fact in parts)


def test_an_image_has_one_role_whichever_way_it_is_named(tmp_path: Path):
    source = populate(tmp_path, "a b", "a b")
    with refused(DataError, str(source.images / "a.png"), "labeled", "unlabeled"):
        build_manifest(
            CLASSES,
            Sources(
                source,
                labeled=listed(source, "a\nb", "l.txt"),
                unlabeled=listed(source, "./images//a.png", "u.txt"),
            ),
        )


def test_at_least_one_labeled_image_is_needed(tmp_path: Path):
    with refused(DataError, "data.labels", ".png"):
        build_manifest(CLASSES, Sources(populate(tmp_path, "a b")))


# Examining


def manifest_of(*samples: Sample, **roles) -> Manifest:
    return Manifest(CLASSES, **{"labeled": samples, "unlabeled": (), "validation": ()} | roles)


NUMBERS = itertools.count()
"""So that no two images of `labels_of` are the same picture."""


def labels_of(folder: Path, *labels: np.ndarray) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            f"{index}",
            save(folder / "i" / f"{index}.png", IMAGE ^ np.uint8(next(NUMBERS) % 256)),
            save(folder / "l" / f"{index}.png", np.broadcast_to(np.asarray(label, np.uint8), (6, 8)).copy()),
        )
        for index, label in enumerate(labels)
    )


def test_sound_data_is_counted(tmp_path: Path):
    mixed = np.array([0, 1, 2, 2, 2, 255, 255, 0], np.uint8)
    labeled = labels_of(tmp_path / "a", mixed, 1)
    calls = itertools.count()
    manifest = manifest_of(
        *labeled, unlabeled=labels_of(tmp_path / "b", 0), validation=labels_of(tmp_path / "c", 2)
    )
    findings = examine(manifest, lambda: next(calls))
    assert findings.faults == ()
    says(
        findings.warnings[0], "field, road", "data.validation"
    )  # the only validation label has no such pixel
    assert len(findings.warnings) == 1
    assert findings.images == {"labeled": 2, "unlabeled": 1, "validation": 1, "test": 0}
    assert {role: counts.tolist() for role, counts in findings.pixels.items()} == {
        "labeled": [12, 6 + 48, 18, 12],
        "unlabeled": [48, 0, 0, 0],
        "validation": [0, 0, 48, 0],
        "test": [0, 0, 0, 0],
    }
    assert next(calls) == 4


def test_all_faults_are_reported_at_once(tmp_path: Path):
    good, unknown, small, colored = labels_of(tmp_path, [0, 1, 2, 255] * 2, [0, 7, 7, 9] * 2, 0, 0)
    assert small.label and colored.label
    save(small.label, LABEL[:5])
    save(colored.label, IMAGE)
    missing = Sample("m", tmp_path / "missing.png", tmp_path / "missing_label.png")
    broken = Sample("b", tmp_path / "broken.jpg")
    broken.image.write_bytes(jpeg(IMAGE)[:-30])
    manifest = manifest_of(good, unknown, small, colored, unlabeled=(broken,), validation=(missing,))
    findings = examine(manifest)
    facts = [
        [f"{unknown.label}: ", "7 (24 pixels), 9 (12 pixels)", "data.ignore", "data.label_values"],
        [f"{small.label}: ", "5x8", str(small.image), "6x8"],
        [f"{colored.label}: ", "data.classes"],
        [f"{broken.image}: ", f"{broken.image.stat().st_size} bytes"],
        [f"{missing.image}: "],
        [f"{missing.label}: "],  # not only the first of a sample's faults
    ]
    assert len(findings.faults) == len(facts)
    for fault, parts in zip(findings.faults, facts, strict=True):
        assert fault.startswith(parts[0])
        says(fault, *parts)


def test_the_ignore_value_of_the_recipe_is_not_a_fault(tmp_path: Path):
    samples = labels_of(tmp_path, [0, 1, 2, 11] * 2)
    assert "11 (12 pixels)" in examine(manifest_of(*samples)).faults[0]
    findings = examine(
        manifest_of(*(replace(sample, encoding=LabelEncoding(ignore=11)) for sample in samples))
    )
    assert findings.faults == () and findings.pixels["labeled"].tolist() == [12, 12, 12, 12]


def test_absent_classes_are_reported_as_a_warning(tmp_path: Path):
    findings = examine(manifest_of(*labels_of(tmp_path, 1, 255)))
    assert findings.faults == ()
    (absent,) = [warning for warning in findings.warnings if "house" in warning]
    says(absent, "field, house", "data.classes")
    assert "road" not in absent


def test_label_maps_without_a_labeled_pixel_are_a_fault(tmp_path: Path):
    findings = examine(manifest_of(*labels_of(tmp_path, 255, 255)))
    (fault,) = findings.faults
    says(fault, "labeled: ")
    assert not any("field" in warning for warning in findings.warnings)


def test_roles_without_images_are_reported_as_warnings(tmp_path: Path):
    unlabeled, validation = examine(manifest_of(*labels_of(tmp_path, [0, 1, 2, 2] * 2))).warnings
    says(unlabeled, "unlabeled", "round 0")
    says(validation, "data.validation")


def test_the_first_eight_of_many_unknown_values_are_listed():
    counts = np.zeros(256, np.int64)
    assert unknown_values(counts, len(CLASSES)) is None
    counts[[0, 1, 2, IGNORE]] = 5
    assert unknown_values(counts, len(CLASSES)) is None
    counts[3:20] = range(3, 20)
    line = unknown_values(counts, len(CLASSES))
    assert line is not None and "11 (" not in line
    says(line, "3 (3 pixels), 4 (4 pixels)", "10 (10 pixels) and 9 more", "data.ignore")


def test_names_that_are_not_utf8_are_all_refused(tmp_path: Path) -> None:
    """Records, pages and lists hold ids as text."""
    source = populate(tmp_path, "good")
    for name in (b"b\xff.png", b"c\xfe.png"):
        try:
            (source.images / os.fsdecode(name)).write_bytes(png(LABEL, 8, 0))
        except OSError:
            pytest.skip("this file system does not allow such names")
    with refused(DataError, str(source.images), "b\\udcff.png", "c\\udcfe.png", "UTF-8") as caught:
        find_samples(source)
    str(caught.value).encode()
