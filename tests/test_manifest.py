"""Images and labels found, paired and checked; every fault named with its file."""

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
from darseg.data.examine import Findings, examine
from darseg.data.images import IMAGE_SUFFIXES, image_size, read_image
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
from darseg.errors import DataError

CLASSES = class_set(["field", "road", "house"])
IMAGE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
LABEL = np.random.default_rng(0).integers(0, 3, (6, 8), np.uint8)


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values if values.ndim == 2 else values[..., ::-1])
    return path


def populate(root: Path, images: str = "", labels: str = "") -> Source:
    """Images and label maps with these ids (blanks between them) in `images/` and `labels/`."""
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


def test_jpegs_and_gray_images(tmp_path: Path):
    soft = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    for suffix in (".jpg", ".jpeg", ".JPG"):
        assert np.abs(read_image(save(tmp_path / f"a{suffix}", soft)).astype(int) - soft).max() < 8
    gray = read_image(save(tmp_path / "gray.png", LABEL))
    assert np.array_equal(gray, np.repeat(LABEL[..., None], 3, 2))


def test_a_camera_that_was_turned_does_not_turn_the_image(tmp_path: Path):
    """EXIF orientation would turn the image away from its label map."""
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # orientation: a quarter turn
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<I", 0)
    image = np.zeros((16, 40, 3), np.uint8)
    image[:, 20:] = 250
    path = tmp_path / "turned.jpg"
    path.write_bytes(with_segment(jpeg(image), exif))
    assert cv2.imread(str(path)).shape == (40, 16, 3)  # the tag is one that OpenCV obeys
    assert image_size(path) == (16, 40)
    assert read_image(path)[:, 22:].min() > 200 and read_image(path)[:, :18].max() < 50
    label = np.zeros((16, 40), np.uint8)
    assert examine(manifest_of(Sample("a", path, save(tmp_path / "a.png", label)))).faults == ()


def test_files_that_are_no_images(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.jpg: no such file\. Check the list and the folders"):
        read_image(tmp_path / "gone.jpg")
    for name, content in {"text.jpg": b"not an image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DataError, match=rf"{name}: cannot be decoded as an image \(.*\)\. Remove or replace it"
        ):
            read_image(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png: cannot be read \(Is a directory\)"):
        read_image(tmp_path / "folder.png")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch):
    def refuse(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\)"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["jpg", "png", "thumbnail"])
def test_truncated_files(tmp_path: Path, kind: str):
    """Decoders would fill the rest with gray."""
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = cv2.imencode(".png", big)[1].tobytes() if kind == "png" else jpeg(big)
    if kind == "thumbnail":  # it has an end mark of its own
        data = with_segment(data, b"Exif\0\0" + jpeg(big[:16, :16]))
    path = tmp_path / f"a.{kind[:3].replace('thu', 'jpg')}"
    path.write_bytes(data)
    assert image_size(path) == (64, 64)
    for length in (len(data) // 2, len(data) * 3 // 4, len(data) - 20):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"truncated \({length} bytes\)\. Copy or download it again"):
            read_image(path)


def test_what_cameras_add_behind_the_picture_does_no_harm(tmp_path: Path):
    path = tmp_path / "motion.jpg"
    path.write_bytes(jpeg(IMAGE) + b"\0film" * 2000)
    assert image_size(path) == (6, 8)


def test_a_damaged_png(tmp_path: Path):
    data = bytearray(cv2.imencode(".png", IMAGE)[1].tobytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        read_image(tmp_path / "a.png")


# Reading labels


def test_labels_are_read_as_they_are(tmp_path: Path):
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "a.png", every)
    label = read_label(path)
    assert label.dtype == np.uint8 and np.array_equal(label, every)


def test_the_users_ignore_value_becomes_255(tmp_path: Path):
    path = save(tmp_path / "a.png", np.array([[0, 11], [10, 255]], np.uint8))
    assert read_label(path, LabelEncoding(ignore=11)).tolist() == [[0, 255], [10, 255]]
    assert read_label(path, LabelEncoding(ignore=11)).dtype == np.uint8
    assert read_label(path).tolist() == [[0, 11], [10, 255]]


def test_the_hand_written_png_is_one(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(LABEL, 8, 0))
    assert np.array_equal(read_label(tmp_path / "a.png"), LABEL)


# Folders


def test_files_are_found_in_nested_folders_in_order_of_their_ids(tmp_path: Path):
    for name in ("b/2.png", "b/10.JPG", "a.jpeg", "b.c.png", "deep/er/x y.png"):
        save(tmp_path / name, IMAGE)
    for name in ("notes.txt", ".hidden.png", ".checkpoints/a.png", "deep/.cache/z.png", "b/2.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_files(tmp_path, IMAGE_SUFFIXES)
    assert list(found) == ["a", "b.c", "b/10", "b/2", "deep/er/x y"]
    assert found["b/10"] == tmp_path / "b" / "10.JPG"


def test_linked_folders_are_followed(tmp_path: Path):
    save(tmp_path / "elsewhere" / "a.png", IMAGE)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list(find_files(tmp_path / "images", IMAGE_SUFFIXES)) == ["linked/a"]


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"gone: no such folder\. Check data\.root, data\.images and data\.labels"
    ):
        find_files(tmp_path / "gone", IMAGE_SUFFIXES)
    source = populate(tmp_path)
    assert find_files(source.images, IMAGE_SUFFIXES) == {}
    with pytest.raises(DataError, match=r"images: no images found \(\.jpg, \.jpeg, \.png"):
        find_samples(source)
    with pytest.raises(DataError, match=r"images: no images found"):
        build_manifest(CLASSES, Sources(source))


def test_folders_that_cannot_be_read_are_not_skipped(tmp_path: Path, monkeypatch):
    save(tmp_path / "open" / "a.png", IMAGE)
    (tmp_path / "shut").mkdir()
    scandir = __import__("os").scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"shut: the folder cannot be read \(Permission denied\)"):
        find_files(tmp_path, IMAGE_SUFFIXES)


def test_ids_must_differ_by_more_than_suffix_and_case(tmp_path: Path):
    for name in ("a.jpg", "a.png", "b/C.png", "B/c.png", "d.png"):
        save(tmp_path / name, IMAGE)
    with pytest.raises(DataError) as caught:
        find_files(tmp_path, IMAGE_SUFFIXES)
    message = str(caught.value)
    assert f"{tmp_path}: ids must differ by more than suffix and case, rename one of each" in message
    assert f"{tmp_path / 'a.jpg'} and {tmp_path / 'a.png'}" in message
    assert f"{tmp_path / 'B/c.png'} and {tmp_path / 'b/C.png'}" in message
    assert "d.png" not in message


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("a.jpg", "a"), ("b/a.b.png", "b/a.b"), ("./x//y z.PNG", "x/y z"), (Path("c/d"), "c/d")],
)
def test_sample_ids(path: str | Path, wanted: str):
    assert sample_id(path) == wanted


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


def test_label_maps_below_the_images_are_no_images(tmp_path: Path):
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


def test_lists_of_paths(tmp_path: Path):
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


def test_names_with_blanks(tmp_path: Path):
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
    wanted = (
        Sample("images/my  street", source.images / "my  street.jpg", source.labels / "the mask  1.png"),
        Sample("images/my", source.images / "my.jpg", source.labels / "the mask  1.png"),
        Sample("images/my.jpg copy", source.images / "my.jpg copy.jpg", source.labels / "the mask  1.png"),
        Sample("a b c", source.images / "a b c.png", source.labels / "a b c.png"),
    )
    assert find_samples(listed(source, text)) == wanted
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
    found = find_samples(listed(source, f"i/{image}.png{gap}l/{label}.png\n"))
    assert found == (Sample(f"i/{image}", root / "i" / f"{image}.png", root / "l" / f"{label}.png"),)


def test_lines_that_lead_nowhere_are_all_named(tmp_path: Path):
    source = populate(tmp_path, "a", "a")
    outside = save(tmp_path.parent / f"{tmp_path.name}_outside" / "o.png", IMAGE)
    (tmp_path / "notes.txt").write_text("")
    lines = [
        "a",
        "gone",
        "images/gone.jpg labels/a.png",
        "images/a.png labels/gone.png",
        "notes.txt labels/a.png",
        f"../{outside.parent.name}/o.png labels/a.png",
        f"{outside} labels/a.png",
        "x" * 5000,
    ]
    with pytest.raises(DataError) as caught:
        find_samples(listed(source, "\n".join(lines)))
    message = str(caught.value)
    assert f"{tmp_path / 'list.txt'}: 7 line(s) lead nowhere" in message
    nowhere = f"is neither an id below {source.images} nor an image path below {tmp_path}"
    for number in (2, 3, 5, 8):
        assert f"line {number}: {lines[number - 1]!r} {nowhere}" in message
    assert f"line 4: label {tmp_path / 'labels/gone.png'} does not exist" in message
    for number in (6, 7):  # a label map named after such an id would be written outside the run folder
        assert (
            f"line {number}: image {lines[number - 1].split()[0]} must lie below data.root, {tmp_path}"
            in message
        )
    assert "line 1:" not in message


def test_lists_that_name_an_image_twice(tmp_path: Path):
    source = populate(tmp_path, "a b")
    save(source.images / "B2.png", IMAGE)
    save(tmp_path / "images" / "b2x" / "y.png", IMAGE)
    save(tmp_path / "images" / "B2X" / "Y.jpg", IMAGE)
    with pytest.raises(
        DataError, match=r"list\.txt: listed twice, or ids that differ only in case"
    ) as caught:
        find_samples(
            listed(replace(source, images=tmp_path / "none"), "images/a.png\nimages/b.png\nimages/a.png")
        )
    assert f"{source.images / 'a.png'} and {source.images / 'a.png'}" in str(caught.value)
    with pytest.raises(DataError, match="ids that differ only in case") as caught:
        find_samples(listed(replace(source, images=tmp_path / "none"), "images/b2x/y.png\nimages/B2X/Y.jpg"))
    assert "b2x/y.png and" in str(caught.value)


def test_lists_that_cannot_be_read(tmp_path: Path):
    source = populate(tmp_path, "a")
    with pytest.raises(DataError, match=r"gone\.txt: no such list file\. Check the recipe's data section"):
        find_samples(replace(source, list_file=tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"list\.txt: cannot be read as UTF-8 text"):
        find_samples(listed(source, "größe".encode("latin-1")))
    with pytest.raises(DataError, match=r"images: cannot be read as UTF-8 text \(.*directory"):
        find_samples(replace(source, list_file=source.images))
    with pytest.raises(DataError, match=r"list\.txt: no images found"):
        find_samples(listed(source, "\n  \n"))


# every and except_every


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 20), step=st.integers(2, 6), shuffle=st.randoms())
def test_every_and_except_every_part_a_list(tmp_path_factory, count, step, shuffle):
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
        with pytest.raises(DataError, match="no images found"):
            find_samples(others)
    else:
        assert ids(find_samples(others)) == [name for name in names if name not in kept]


def test_every_of_a_folder_counts_the_images_that_have_a_label(tmp_path: Path):
    source = populate(tmp_path, "a b c d e f", "b d e f")
    assert ids(find_samples(replace(source, every=2))) == ["b", "e"]
    assert ids(find_samples(replace(source, except_every=2))) == ["d", "f"]


def test_every_of_a_folder_without_labels(tmp_path: Path):
    source = populate(tmp_path / "x", "a b")
    for more in ({"every": 2}, {"except_every": 2}):
        message = r"images: none of the 2 images has a label map in .*labels, .* Check data\.labels"
        with pytest.raises(DataError, match=message):
            find_samples(replace(source, **more))


# Roles


def role_ids(manifest: Manifest) -> dict[str, list[str]]:
    return {role: ids(samples) for role, samples in manifest.roles().items() if samples}


def test_without_a_word_images_with_a_label_are_labeled_and_the_others_not(tmp_path: Path):
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


def test_labels_laid_aside_serve_for_measuring_only(tmp_path: Path):
    """The usual experiment: every nth image keeps its label, the others are taken for unlabeled."""
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
    other = populate(tmp_path / "other", "t", "t")
    manifest = build_manifest(
        CLASSES,
        Sources(
            source,
            labeled=listed(source, "d\na", "labeled.txt"),
            validation=listed(source, "b", "validation.txt"),
            test=other,
        ),
    )
    assert role_ids(manifest) == {
        "labeled": ["d", "a"],
        "unlabeled": ["c"],
        "validation": ["b"],
        "test": ["t"],
    }


def test_the_default_folder_is_needed_only_where_it_is_used(tmp_path: Path):
    source = populate(tmp_path, "a b", "a")
    nowhere = replace(source, images=tmp_path / "nowhere")
    labeled, unlabeled = listed(source, "a", "l.txt"), listed(source, "b", "u.txt")
    assert role_ids(build_manifest(CLASSES, Sources(nowhere, labeled=labeled, unlabeled=unlabeled))) == {
        "labeled": ["a"],
        "unlabeled": ["b"],
    }
    with pytest.raises(DataError, match="nowhere: no such folder"):
        build_manifest(CLASSES, Sources(nowhere, labeled=labeled))


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("lvtun"), min_size=1, max_size=10),
    labels=st.lists(st.booleans(), min_size=10),
)
def test_each_image_of_the_default_folder_has_one_role(tmp_path_factory, kinds, labels):
    """Lists for some of the roles: what they leave goes by its label, and nothing is lost."""
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
    wanted = {
        "labeled": in_list["l"] or [name for name in rest if name in labeled],
        "unlabeled": in_list["u"],
        "validation": in_list["v"],
        "test": in_list["t"],
    }
    wanted["unlabeled"] = in_list["u"] or [name for name in rest if name not in wanted["labeled"]]
    if wanted["labeled"]:
        manifest = build_manifest(CLASSES, Sources(source, *sources))
        assert role_ids(manifest) == {role: names for role, names in wanted.items() if names}
    else:
        with pytest.raises(DataError, match="no labeled images"):
            build_manifest(CLASSES, Sources(source, *sources))


def test_roles_that_do_not_work_out_are_all_named(tmp_path: Path):
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
    message = str(caught.value)
    assert "The roles of the images do not work out" in message
    assert "labeled: 2 image(s) without label map, the first is 'a'; each needs one in data.labels" in message
    assert "validation: 1 image(s) without label map, the first is 'a'" in message
    assert "test: 1 image(s) without label map, the first is 'd'" in message
    assert f"{source.images / 'a.png'} is labeled and validation: an image has one role" in message
    assert f"{source.images / 'b.png'} is labeled and unlabeled: an image has one role" in message


def test_an_image_has_one_role_however_it_is_named(tmp_path: Path):
    source = populate(tmp_path, "a b", "a b")
    with pytest.raises(DataError, match=r"a\.png is labeled and unlabeled"):
        build_manifest(
            CLASSES,
            Sources(
                source,
                labeled=listed(source, "a\nb", "l.txt"),
                unlabeled=listed(source, "./images//a.png", "u.txt"),
            ),
        )


def test_no_labeled_images(tmp_path: Path):
    message = r"no labeled images: at least one image needs a label map in data\.labels \(same path, \.png\)"
    with pytest.raises(DataError, match=message):
        build_manifest(CLASSES, Sources(populate(tmp_path, "a b")))


# Examining


def manifest_of(*samples: Sample, **roles) -> Manifest:
    return Manifest(CLASSES, **{"labeled": samples, "unlabeled": (), "validation": ()} | roles)


def labels_of(folder: Path, *labels: np.ndarray) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            f"{index}",
            save(folder / "i" / f"{index}.png", IMAGE),
            save(folder / "l" / f"{index}.png", np.broadcast_to(np.asarray(label, np.uint8), (6, 8)).copy()),
        )
        for index, label in enumerate(labels)
    )


def test_sound_data_is_counted(tmp_path: Path):
    mixed = np.array([0, 1, 2, 2, 2, 255, 255, 0], np.uint8)
    labeled = labels_of(tmp_path / "a", mixed, 1)
    calls = itertools.count()
    found = examine(
        Manifest(CLASSES, labeled, labels_of(tmp_path / "b", 0), labels_of(tmp_path / "c", 2)),
        lambda: next(calls),
    )
    assert found.faults == () and found.warnings == ()
    assert found.images == {"labeled": 2, "unlabeled": 1, "validation": 1, "test": 0}
    assert {role: counts.tolist() for role, counts in found.pixels.items()} == {
        "labeled": [12, 6 + 48, 18, 12],
        "unlabeled": [48, 0, 0, 0],
        "validation": [0, 0, 48, 0],
        "test": [0, 0, 0, 0],
    }
    assert next(calls) == 4


def test_everything_wrong_is_reported_at_once(tmp_path: Path):
    good, unknown, small, colored = labels_of(tmp_path, [0, 1, 2, 255] * 2, [0, 7, 7, 9] * 2, 0, 0)
    assert small.label and colored.label
    save(small.label, LABEL[:5])
    save(colored.label, IMAGE)
    missing = Sample("m", tmp_path / "missing.png", tmp_path / "missing_label.png")
    broken = Sample("b", tmp_path / "broken.jpg")
    broken.image.write_bytes(jpeg(IMAGE)[:-30])
    manifest = manifest_of(good, unknown, small, colored, unlabeled=(broken,), validation=(missing,))
    found = examine(manifest)
    wanted = [
        f"{unknown.label}: label values outside the classes 0..2 and 255, not labeled: 7 (24 pixels), 9 (12 pixels). "
        "Set data.ignore or data.label_values, or add the classes",
        f"{small.label}: 5x8 pixels, but its image {small.image} has 6x8 (height x width)",
        f"{colored.label}: found colors, but the classes have none",
        f"{broken.image}: the file is truncated",
        f"{missing.image}: no such file",
        f"{missing.label}: no such file",  # not only the first of a sample's faults
    ]
    assert len(found.faults) == len(wanted)
    assert all(fault.startswith(start) for fault, start in zip(found.faults, wanted, strict=True))


def test_the_users_ignore_value_is_no_fault(tmp_path: Path):
    samples = labels_of(tmp_path, [0, 1, 2, 11] * 2)
    assert "11 (12 pixels)" in examine(manifest_of(*samples)).faults[0]
    found = examine(manifest_of(*(replace(sample, encoding=LabelEncoding(ignore=11)) for sample in samples)))
    assert found.faults == () and found.pixels["labeled"].tolist() == [12, 12, 12, 12]


def test_absent_classes_are_warned_of(tmp_path: Path):
    found: Findings = examine(manifest_of(*labels_of(tmp_path, 1, 255)))
    assert found.faults == ()
    absent = [warning for warning in found.warnings if "absent" in warning]
    assert len(absent) == 1 and absent[0].startswith("absent from all labeled masks: field, house.")
    assert (
        "can never be pseudo-labeled; label a few pixels of it, or take it out of data.classes" in absent[0]
    )


def test_masks_without_a_labeled_pixel(tmp_path: Path):
    found = examine(manifest_of(*labels_of(tmp_path, 255, 255)))
    assert found.faults == ("labeled: not one pixel is labeled, every label map holds only the ignore value",)
    assert not any("absent" in warning for warning in found.warnings)


def test_roles_without_images_are_warned_of(tmp_path: Path):
    found = examine(manifest_of(*labels_of(tmp_path, [0, 1, 2, 2] * 2)))
    assert len(found.warnings) == 2
    assert "no unlabeled images: only round 0" in found.warnings[0]
    assert "no validation images: nothing will be scored; set data.validation" in found.warnings[1]


def test_many_unknown_values_are_cut_short():
    counts = np.zeros(256, np.int64)
    assert unknown_values(counts, len(CLASSES)) is None
    counts[[0, 1, 2, IGNORE]] = 5
    assert unknown_values(counts, len(CLASSES)) is None
    counts[3:20] = range(3, 20)
    line = unknown_values(counts, len(CLASSES))
    assert line is not None and "3 (3 pixels), 4 (4 pixels)" in line
    assert "10 (10 pixels) and 9 more. Set data.ignore" in line and "11 (" not in line


def test_names_that_are_no_utf8_are_refused_all_at_once(tmp_path: Path) -> None:
    """Records, pages and lists hold ids as text."""
    source = populate(tmp_path, "good")
    for odd in (b"b\xff.png", b"c\xfe.png"):
        try:
            (source.images / os.fsdecode(odd)).write_bytes(png(LABEL, 8, 0))
        except OSError:
            pytest.skip("this file system takes no such names")
    with pytest.raises(DataError, match="no UTF-8") as told:
        find_samples(source)
    assert "b\\udcff.png" in str(told.value) and "c\\udcfe.png" in str(told.value)
    str(told.value).encode()
