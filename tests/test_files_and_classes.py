"""Files appear whole or not at all; maps are written as PNG; class sets are checked when they are made."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.numpy import save_file

import forks
from darseg.data import files
from darseg.data.classes import (
    BUILT_IN,
    CAMVID,
    CITYSCAPES,
    VOC,
    ClassSet,
    class_set,
    distinct_colors,
)
from darseg.data.files import ASIDE, storage_error, write_whole, write_whole_with
from darseg.data.images import read_image
from darseg.data.maps import write_map
from darseg.data.plain_yaml import parse_yaml
from darseg.errors import DataError, StorageError
from darseg.pseudo.labelset import read_prediction
from darseg.pseudo.scores import read_waiting_scores
from wording import refused, says


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Files


@pytest.mark.parametrize(
    ("data", "expected"), [(b"\x00\xff", b"\x00\xff"), ("größe\n", "größe\n".encode()), (b"", b"")]
)
def test_a_file_is_written_and_its_folders_are_created(tmp_path: Path, data: bytes | str, expected: bytes):
    write_whole(tmp_path / "a" / "b" / "file.bin", data)
    assert (tmp_path / "a" / "b" / "file.bin").read_bytes() == expected
    assert names(tmp_path) == ["a", "a/b", "a/b/file.bin"]


def test_an_earlier_file_is_replaced_and_no_name_aside_is_foreseen(tmp_path: Path):
    """A link that waits under the name that earlier versions wrote aside is not followed, and stays."""
    path, theirs = tmp_path / "file", tmp_path / "theirs"
    write_whole(path, b"earlier")
    theirs.write_bytes(b"precious")
    path.with_name("file" + ASIDE).symlink_to(theirs)
    write_whole(path, b"later")
    assert path.read_bytes() == b"later" and theirs.read_bytes() == b"precious"
    assert names(tmp_path) == ["file", "file.part", "theirs"]


def test_a_link_is_replaced_by_the_file_and_not_written_through(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"precious")
    for name in ("file", "log"):
        (tmp_path / name).symlink_to(theirs)
    write_whole(tmp_path / "file", b"mine")
    with pytest.raises(OSError) as caught:
        files.open_to_append(tmp_path / "log")
    says(str(storage_error(caught.value, tmp_path / "log")), str(tmp_path / "log"), str(theirs), "link")
    assert theirs.read_bytes() == b"precious" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_mode_of_any_new_file_whoever_writes_them(tmp_path: Path, mask: int):
    """safetensors writes files that only their owner can read."""
    before = os.umask(mask)
    try:
        write_whole_with(tmp_path / "a", lambda aside: save_file({"a": np.zeros(3)}, aside))
        write_whole(tmp_path / "b", b"b")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {0o666 & ~mask}


def test_only_what_a_kill_left_is_removed(tmp_path: Path):
    """Not a file that is being written, nor a link, nor a file of the user that has almost such a name."""
    for name in (
        "a.0123456789abcdef.part",
        "deep/b.png.00000000ffffffff.part",
        "v.mp4.0123456789abcdef.part.mp4",
    ):
        write_whole(tmp_path / name, b"half")
    kept = ["a.part", "thesis.0123.part", "x.0123456789ABCDEF.part", "0123456789abcdef.part.tar.gz"]
    for name in kept:
        write_whole(tmp_path / name, b"precious")
    (tmp_path / "c.0123456789abcdef.part").symlink_to(tmp_path / "a.part")

    def write(aside: Path) -> None:
        aside.write_bytes(b"now")
        files.remove_leftovers(tmp_path)

    write_whole_with(tmp_path / "now", write)
    assert names(tmp_path) == sorted([*kept, "c.0123456789abcdef.part", "deep", "now"])


def test_a_name_of_any_length_that_the_system_takes_is_written(tmp_path: Path):
    name = "ü" * 125 + ".png"  # 254 bytes
    write_whole(tmp_path / name, b"data")
    assert names(tmp_path) == [name]


def special_files(folder: Path) -> dict[str, Path]:
    """One of every kind of thing that is no file."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return {name: folder / name for name in ("pipe", "folder", "link", "socket")} | {
        "device": Path("/dev/zero")
    }


def test_files_of_absurd_sizes_are_refused_at_once(tmp_path: Path):
    """A file with holes states any size; it would fill the memory."""
    for name, head in (
        ("a.png", b"\x89PNG\r\n\x1a\n"),
        ("a.json", b"{"),
        ("a.scores", b""),
        ("a.prediction", b""),
    ):
        (tmp_path / name).write_bytes(head)
        os.truncate(tmp_path / name, 1 << 40)
    with refused(DataError, str(tmp_path / "a.png"), "1,099,511,627,776 bytes"):
        read_image(tmp_path / "a.png")
    with pytest.raises(OSError, match="bytes"):
        files.read_json(tmp_path / "a.json")
    assert read_waiting_scores(tmp_path, "a") is None and read_prediction(tmp_path, "a") is None


@pytest.mark.parametrize(
    "opens",
    [files.read_file, files.open_file, files.check_regular, files.read_json],
    ids=lambda f: f.__name__,
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, opens: Callable[[Path], object]):
    signal.alarm(20)  # a pipe would be waited on for ever
    try:
        for path in special_files(tmp_path).values():
            with pytest.raises(OSError, match="not a file"):
                opens(path)
    finally:
        signal.alarm(0)


def test_readers_never_see_a_half_written_file(tmp_path: Path):
    path = tmp_path / "file"
    write_whole(path, b"earlier")

    def write(aside: Path) -> None:
        assert aside.parent == path.parent  # renaming works within one disk only
        aside.write_bytes(b"lat")
        assert path.read_bytes() == b"earlier"
        aside.write_bytes(b"later")

    write_whole_with(path, write)
    assert path.read_bytes() == b"later" and names(tmp_path) == ["file"]


def half_then(error: BaseException):
    def write(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize("earlier", [None, b"earlier"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path, number: int, earlier: bytes | None):
    path = tmp_path / "file"
    if earlier is not None:
        path.write_bytes(earlier)
    before = names(tmp_path)
    with refused(StorageError, str(path), "full") as caught:
        write_whole_with(path, half_then(OSError(number, os.strerror(number))))
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == before and (earlier is None or path.read_bytes() == earlier)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_last_moment_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch, call: str
):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="full"):
        patch.setattr(files.os, call, fail)
        write_whole(path, b"later")
    assert path.read_bytes() == b"earlier" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("not a number"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_leave_no_file_either(tmp_path: Path, error: BaseException):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")
    with pytest.raises(type(error)) as caught:
        write_whole_with(path, half_then(error))
    assert caught.value is error
    assert path.read_bytes() == b"earlier" and names(tmp_path) == ["file"]


def test_a_system_error_is_recognized_in_a_message(tmp_path: Path):
    """As safetensors raises it: its error is not an OSError."""
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with refused(StorageError, str(tmp_path / "file"), "full"):
        write_whole_with(tmp_path / "file", half_then(RuntimeError(message)))
    assert names(tmp_path) == []


def test_safetensors_beyond_a_size_limit_is_a_storage_error(tmp_path: Path):
    """The real writer meets a real limit of the system, in a process of its own."""
    script = """
import resource, signal, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import save_file
from darseg.data.files import write_whole_with
from darseg.data.maps import write_map
from darseg.errors import StorageError
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_whole_with(path, lambda aside: save_file({"a": np.zeros(100_000)}, aside))
except StorageError as error:
    print(error)
"""
    path = tmp_path / "checkpoint"
    path.write_bytes(b"earlier")
    done = forks.python("-c", script, path)
    assert done.returncode == 0, done.stderr
    says(done.stdout, str(path), "File too large")
    assert path.read_bytes() == b"earlier" and names(tmp_path) == ["checkpoint"]


def test_a_file_in_place_of_a_folder_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "deep" / "below"):
        with refused(StorageError, str(path), f"{tmp_path / 'file'} is a file"):
            write_whole(path, b"data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_a_storage_error(tmp_path: Path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StorageError, match="Permission denied"):  # no refused: root skips this test
            write_whole(tmp_path / "file", b"data")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_storage_error_gives_the_reason_of_the_system(tmp_path: Path):
    with refused(StorageError, str(tmp_path / "file"), "Permission denied"):
        write_whole_with(tmp_path / "file", half_then(PermissionError(errno.EACCES, "Permission denied")))
    says(str(storage_error(OSError("odd"), Path("file"))), "file", "odd")


# Label maps


@pytest.mark.parametrize(
    ("kind", "shape"), [(np.uint8, (5, 7)), (np.uint16, (5, 7)), (np.uint8, (5, 7, 3)), (np.uint8, (1, 1))]
)
def test_maps_and_pictures_come_back_from_their_pngs(tmp_path: Path, kind: type, shape: tuple[int, ...]):
    values = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    path = tmp_path / "a" / "b.png"
    write_map(path, values[:, ::-1])  # a view that is not contiguous
    assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), values[:, ::-1])
    assert path.read_bytes() == cv2.imencode(".png", values[:, ::-1].copy())[1].tobytes()
    assert names(tmp_path) == ["a", "a/b.png"]


@pytest.mark.parametrize(
    "values",
    [np.zeros((5, 7)), np.zeros((5, 7), np.int64), np.zeros((5, 7, 2), np.uint8), np.zeros(7, np.uint8)],
    ids=["floats", "int64", "two channels", "a row"],
)
def test_other_arrays_are_not_written_as_maps(tmp_path: Path, values: np.ndarray):
    """OpenCV would cut floats and large integers down to 8 bits without an error."""
    path = tmp_path / "a.png"
    with refused(DataError, str(path), str(values.dtype), str(list(values.shape))):
        write_map(path, values)
    assert names(tmp_path) == []


# Classes


def test_the_built_in_class_sets():
    assert (len(CITYSCAPES), len(VOC), len(CAMVID)) == (19, 21, 11)
    assert BUILT_IN == {"cityscapes": CITYSCAPES, "voc": VOC, "camvid": CAMVID}
    for built_in in BUILT_IN.values():
        assert len(set(built_in.colors)) == len(built_in)
    assert CITYSCAPES.names[:2] == ("road", "sidewalk") and CITYSCAPES.names[18] == "bicycle"
    assert CITYSCAPES.names[6:8] == ("traffic light", "traffic sign")
    assert CITYSCAPES.colors[13] == (0, 0, 142)
    assert VOC.names[0] == "background" and VOC.names[20] == "tvmonitor" and VOC.names[15] == "person"
    assert CAMVID.names[0] == "sky" and CAMVID.names[10] == "bicyclist"


def test_the_colors_of_voc_are_those_of_its_development_kit():
    """Bits 3b, 3b + 1 and 3b + 2 of a class's index are bit 7 - b of its red, green and blue."""
    for index, color in enumerate(VOC.colors):
        bits = [(index >> bit) & 1 for bit in range(24)]
        assert color == tuple(sum(bits[3 * b + c] << (7 - b) for b in range(8)) for c in range(3))


def test_distinct_colors_differ_and_keep_their_order():
    colors = distinct_colors(254)
    assert len(set(colors)) == 254
    assert all(0 <= part <= 255 for color in colors for part in color)
    assert not {(0, 0, 0), (255, 255, 255)} & set(colors)
    assert colors[:20] == VOC.colors[1:]
    assert distinct_colors(5) == colors[:5]  # a class keeps its color when others are added


def test_the_palette_has_a_color_for_each_label_value():
    palette = CITYSCAPES.palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert palette[:19].tolist() == [list(color) for color in CITYSCAPES.colors]
    assert not palette[19:255].any() and palette[255].tolist() == [255, 255, 255]


def test_class_sets_are_made_of_a_name_names_or_colors():
    assert class_set("voc") == VOC
    assert class_set("camvid") == CAMVID
    assert class_set(["a", "b"]) == ClassSet(("a", "b"), distinct_colors(2))
    assert class_set({"a": [1, 2, 3], "b": (4, 5, 6)}) == ClassSet(("a", "b"), ((1, 2, 3), (4, 5, 6)))
    assert len(class_set([str(index) for index in range(255)])) == 255


@pytest.mark.parametrize(
    ("classes", "facts"),
    [
        pytest.param("coco", ["'coco'", "cityscapes, voc, camvid"], id="an unknown name"),
        pytest.param(["one"], ["1", "2", "255"], id="one class"),
        pytest.param([], ["0", "2", "255"], id="no class"),
        pytest.param([str(index) for index in range(256)], ["256", "255"], id="256 classes"),
        pytest.param(["a", "b", "a"], ["'a'"], id="a repeated name"),
        pytest.param(["a", ""], ["name"], id="an empty name"),
        pytest.param({"a": [0, 0], "b": [0, 0, 0]}, ["a", "[0, 0]"], id="two numbers"),
        pytest.param(
            {"a": [0, 0, 0], "b": [0, 0, 256]}, ["b", "[0, 0, 256]", "255"], id="a number above 255"
        ),
        pytest.param({"a": [0, 0, -1], "b": [0, 0, 0]}, ["a", "[0, 0, -1]"], id="a number below 0"),
    ],
)
def test_class_sets_that_are_refused(classes, facts: list[str]):
    with refused(DataError, *facts):
        class_set(classes)


def test_each_class_needs_a_color():
    with refused(DataError, "2", "1"):
        ClassSet(("a", "b"), ((0, 0, 0),))


def test_small_yaml_files_may_have_aliases():
    assert parse_yaml("{classes: [a, b]}") == {"classes": ["a", "b"]}
    assert parse_yaml("") is None
    text = "path: &root /data\ncolors: &c [a, b]\nnames: *c\nbase: &d {x: 1}\nmore: {<<: *d, y: *root}\n"
    assert parse_yaml(text)["names"] == ["a", "b"] and parse_yaml(text)["more"] == {"x": 1, "y": "/data"}


def test_small_yaml_files_stand_for_a_limited_number_of_values():
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
    )
    laughs = "a0: &a0 [1]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    chain = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))
    for text in (merges, laughs, chain, "a: &a [*a]", "[" * 5000):
        with pytest.raises(ValueError, match=r"alias|deep"):
            parse_yaml(text)
