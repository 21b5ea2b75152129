"""Damaged and hostile files of every kind: reading ends well or with a DarsegError, quickly and in little memory.

DARSEG_FUZZ=20 tries twenty times as many files. The files are the same in every run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from conftest import recipe_dict
from darseg.annotate.rasterize import rasterize_folder
from darseg.cli.tables import print_labels
from darseg.config.text import load_recipe
from darseg.data.classes import ClassSet
from darseg.data.encoding import PLAIN, label_encoding
from darseg.data.images import read_image
from darseg.data.labels import read_label
from darseg.demo.scenes import SCENE_CLASSES
from darseg.errors import DarsegError, RunError, WeightsError
from darseg.model.network import NetworkSpec
from darseg.model.torchfile import read_tensors
from darseg.model.weights import load_network, load_weights, read_spec, save_network
from darseg.pseudo.scores import scores_from_bytes, scores_to_bytes
from darseg.report.facts import read_data, read_run, remarks
from darseg.report.overview import write_report
from darseg.run.browse import open_round, read_facts
from darseg.run.build import build_initial_network, recipe_of, spec_of
from darseg.run.directory import RunDirectory
from darseg.run.redistribute import redistribute_folder
from darseg.run.rounds import train
from darseg.training.checkpoint import SEPARATOR, load_checkpoint

FACTOR = float(os.environ.get("DARSEG_FUZZ", "1"))
SECONDS = 5  # of processor time that one file may take
MEMORY = 400  # MiB that one file may take


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=max(1, round(examples * FACTOR)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    signal.alarm(int(300 + 300 * FACTOR))
    yield
    signal.alarm(0)


def peak() -> int:
    """The most memory that this process has had since `tried` began, in MiB; 0 where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
    return 0


def tried(*uses: Callable[[], object], expected: Any = DarsegError) -> None:
    """Each of the uses ends well or with an expected error, and none takes long or much memory."""
    for use in uses:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before, began = peak(), time.process_time()
        try:
            use()
        except expected as error:
            str(error).encode(errors="surrogatepass")
        finally:
            seconds, grown = time.process_time() - began, peak() - before
            assert seconds < SECONDS, f"{seconds:.0f} s"
            assert grown < MEMORY, f"{grown} MiB"


# --- what files are changed to

DEEP, DIGITS, HUGE = "@deep@", "@digits@", "@huge@"  # placeholders of what json cannot write
WRITTEN = {DEEP: "[" * 3000 + "]" * 3000, DIGITS: "9" * 5000, HUGE: "1e999"}
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 255, 256, 65536, 10**6, 2**31, 2**63, 10**30, -(10**400)),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "\0", "\ud800", "../../x", "/etc/passwd", "a\nb", "\u202e\x1b[2J", "x" * 5000),
    *([], {}, [[]], [None], {"": {}}, ["x"] * 300, [0] * 300, [1e308, 1e308, 1e308, 1e308]),
    *(DEEP, DIGITS, HUGE),
]
junk = st.sampled_from(JUNK)


@st.composite
def changed(draw: st.DrawFn, value: Any, depth: int = 0) -> Any:
    """A value of JSON, changed at one place."""
    inner = isinstance(value, dict | list) and len(value) > 0
    if not inner or draw(st.integers(0, 5 + 4 * depth)) == 0:
        return draw(junk)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["inside"] * 6 + ["remove", "add", "twice"]))
    copy = dict(value) if isinstance(value, dict) else list(value)
    if action == "remove":
        del copy[key]
    elif action == "inside":
        copy[key] = draw(changed(value[key], depth + 1))
    elif isinstance(copy, list):
        copy.insert(key, copy[key] if action == "twice" else draw(junk))
    elif action == "add":
        copy[draw(st.sampled_from(["", "x", "\0", "../x", "-1", "0", "99"]))] = draw(junk)
    else:
        copy[f"{key} "] = copy[key]
    return copy


def as_json(value: Any) -> bytes:
    text = json.dumps(value)
    for placeholder, written in WRITTEN.items():
        text = text.replace(f'"{placeholder}"', written)
    return text.encode()


@st.composite
def edited(draw: st.DrawFn, data: bytes, most: int = 3, window: tuple[int, int] | None = None) -> bytes:
    """Bytes, changed at a few places, which may be limited to a window."""
    for _ in range(draw(st.integers(1, most))):
        begin, end = window or (0, len(data))
        at = draw(st.integers(begin, max(begin, min(end, len(data)) - 1)))
        action = draw(st.sampled_from(["set", "flip", "insert", "cut", "truncate", "repeat"]))
        some = draw(st.binary(min_size=1, max_size=8))
        if action == "set":
            data = data[:at] + some + data[at + len(some) :]
        elif action == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif action == "insert":
            data = data[:at] + some + data[at:]
        elif action == "cut":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif action == "truncate":
            data = data[:at]
        elif action == "repeat":
            piece = data[at : at + draw(st.integers(1, 64))]
            data = data[:at] + piece * draw(st.sampled_from([2, 5, 1000])) + data[at + len(piece) :]
    return data


def damaged_json(value: Any, text: bytes | None = None) -> st.SearchStrategy[bytes]:
    """A JSON file with another value at one or two places, or with other bytes."""
    once = changed(value)
    return st.one_of(once, once.flatmap(changed)).map(as_json) | edited(text or as_json(value))


# --- recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


RECIPE = recipe_dict(Path("data")) | {
    "data": recipe_dict(Path("data"))["data"]
    | {
        "classes": {"road": [128, 64, 128], "sky": [0, 0, 255], "tree": [0, 255, 0]},
        "label_values": {0: "road", 7: "sky", 9: "tree", "other": "ignore"},
    },
    "evaluation": {"scales": [0.5, 1.0], "mirror": True},
}
TEXT = yaml.safe_dump(RECIPE, sort_keys=False)
SNIPPETS = [
    *(
        "&a",
        "*a",
        "<<: *a",
        "? ",
        "- ",
        "!!python/object:os.system",
        "!!binary x",
        "!!set {a}",
        "!!int x",
        "!x",
    ),
    *(
        "{",
        "[",
        "}",
        "]",
        ": ",
        "|",
        ">",
        "%YAML 9",
        "---",
        "...",
        "\t",
        "\0",
        "\ufeff",
        "'",
        '"\\ud800"',
        "~",
    ),
    *(
        "1:2:3:4",
        "0x" + "f" * 500,
        "1e9999",
        ".nan",
        ".inf",
        "-.inf",
        "9" * 5000,
        "2001-01-01",
        "=",
        "[" * 5000,
    ),
]


@st.composite
def recipe_texts(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        value = draw(changed(RECIPE))
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_dump(value, sort_keys=False).encode(errors="surrogatepass")
    lines = TEXT.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        name, colon, _ = lines[at].partition(":")
        snippet = draw(st.sampled_from(SNIPPETS))
        lines[at] = draw(st.sampled_from([f"{name}{colon} {snippet}", snippet, f"  {lines[at]}", ""]))
    return draw(st.just("\n".join(lines).encode()) | edited(TEXT.encode()))


@fuzz(100)
@given(content=recipe_texts())
def test_recipes(folder: Path, content: bytes) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    tried(lambda: load_recipe(path))


@fuzz(60)
@given(
    key=st.sampled_from(["seed", "rounds.0.steps", "data.classes", "training", "rounds.9", "", "a.b.c", "."]),
    value=st.sampled_from(SNIPPETS),
)
def test_overrides(folder: Path, key: str, value: str) -> None:
    path = folder / "whole.yaml"
    path.write_text(TEXT)
    tried(lambda: load_recipe(path, [f"{key}={value}"]))


# --- runs


@pytest.fixture(scope="module")
def run(tiny_data: Path, folder: Path) -> Path:
    """A finished run of two rounds; another network labeled in the second."""
    values = recipe_dict(tiny_data)
    values["network"] |= {"backbone": "resnet18_half"}
    values["rounds"] = [{"steps": 2}, {"steps": 2, "labeling_ratio": 0.5}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    recipe, teacher = load_recipe(folder / "tiny.yaml"), folder / "teacher.safetensors"
    save_network(build_initial_network(recipe)[0], teacher, spec_of(recipe))
    values["rounds"][1]["labels_from"] = str(teacher)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    train(load_recipe(folder / "tiny.yaml"), folder / "run", console=Console(quiet=True))
    return folder / "run"


RECORDS = [
    *(
        "run.json",
        "data.json",
        "contents.json",
        "environment.json",
        "bad_images.json",
        "summary.json",
        "round_1/excluded.json",
    ),
    *(f"round_{index}/{step}.json" for index in (0, 1) for step in ("train", "evaluate", "scores")),
    *(f"round_1/{name}.json" for name in ("label", "images", "thresholds", "pseudo_scores", "labels_from")),
]
"""JSON files of a run."""
BINARIES = ["journal.jsonl", "recipe.yaml", "round_1/histogram.npz", "round_1/labels/u/07.png"]


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Let a file have another content for a while."""
    earlier = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink() if earlier is None else path.write_bytes(earlier)


def read_all(run: Path) -> None:
    """What reports, the viewer and a resumed run read, piece by piece."""
    directory, classes = RunDirectory(run), len(SCENE_CLASSES)

    def look() -> None:
        facts = read_run(run)
        remarks(facts, read_data(facts))

    tried(
        look,
        lambda: list(read_facts(open_round(run))),
        lambda: recipe_of(run),
        lambda: directory.label_set(1),
        lambda: directory.image_facts(1, classes),
        lambda: directory.scores(1, classes),
        lambda: directory.scores(1, classes, "pseudo_scores.json"),
        *(lambda step=step: directory.read_record(1, step) for step in ("label", "train", "evaluate")),
    )


@st.composite
def damaged_files(draw: st.DrawFn, run: Path, names: list[str]) -> tuple[str, bytes]:
    name = draw(st.sampled_from(names))
    path = run / name
    if name in BINARIES:
        return name, draw(edited(path.read_bytes(), most=2))
    value = json.loads(path.read_text()) if path.exists() else ["u/07"]
    return name, draw(damaged_json(value))


@fuzz(80)
@given(data=st.data())
def test_records(run: Path, data: st.DataObject) -> None:
    name, content = data.draw(damaged_files(run, RECORDS + BINARIES))
    with replaced(run / name, content):
        read_all(run)


@fuzz(6)
@given(data=st.data())
def test_a_run_with_damaged_records_is_resumed_or_refused(
    run: Path, folder: Path, data: st.DataObject
) -> None:
    names = [name for name in RECORDS + BINARIES if name != "round_1/excluded.json"]
    name, content = data.draw(damaged_files(run, names))
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / name).write_bytes(content)
    console = Console(quiet=True)
    tried(lambda: write_report(copy), lambda: train(load_recipe(run / "recipe.yaml"), copy, console=console))


EVENT = {"time": 1.0, "event": "step", "round": 0, "step": 1, "learning_rate": 0.01, "loss_main": 2.0}
STARTED = {"time": 1.0, "event": "started", "version": "0.3", "weights": "x", "device": "cpu"}


@fuzz(60)
@given(event=st.sampled_from([EVENT, STARTED]).flatmap(damaged_json), first=st.booleans())
def test_journal_lines(run: Path, event: bytes, first: bool) -> None:
    journal = (run / "journal.jsonl").read_bytes()
    lines = event + b"\n" + journal if first else journal + event + b"\n"
    with replaced(run / "journal.jsonl", lines):
        read_all(run)


# --- weights

SPEC = NetworkSpec(
    classes=3,
    backbone="resnet18_half",
    class_names=("road", "sky", "tree"),
    class_colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    output_stride=16,
    head_channels=16,
)
TENSORS = {"a.weight": torch.ones(4, 3), "b.bias": torch.zeros(5, dtype=torch.int64)}


def with_head(head: bytes, tensors: bytes, length: int | None = None) -> bytes:
    return (len(head) if length is None else length).to_bytes(8, "little") + head + tensors


@st.composite
def safetensors_files(draw: st.DrawFn, values: dict[str, torch.Tensor], metadata: dict[str, Any]) -> bytes:
    """Files with small tensors, whose head, or the description in it, is changed."""
    key, described = next(iter(metadata.items()))
    whole = safetensors.torch.save(values, {key: json.dumps(described)})
    size = int.from_bytes(whole[:8], "little")
    head, tensors = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    kind = draw(st.sampled_from(["head", "description", "bytes", "length"]))
    if kind == "bytes":
        return draw(edited(whole, window=(0, 8 + size)))
    if kind == "length":
        return with_head(
            whole[8 : 8 + size], tensors, draw(st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**63]))
        )
    if kind == "head":
        return with_head(as_json(draw(changed(head))), tensors)
    head["__metadata__"][key] = draw(damaged_json(described)).decode(errors="replace")
    return with_head(json.dumps(head).encode(), tensors)


@pytest.fixture(scope="module")
def network() -> Any:
    return SPEC.build().eval()


DESCRIPTION = {name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}


@fuzz(80)
@given(content=safetensors_files(TENSORS, {"darseg": DESCRIPTION}))
def test_heads_of_weights(folder: Path, network: Any, content: bytes) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(content)
    tried(lambda: load_network(path), lambda: load_weights(network, path))


PARTS = {name: {"x": torch.ones(2)} for name in ("network", "optimizer", "method")}
IN_PARTS = {
    f"{part}{SEPARATOR}{key}": value for part, values in PARTS.items() for key, value in values.items()
}
STATE = {"format": 2, "step": 3, "parts": [*PARTS], "scaling": {"scale": 1.0}}  # old files have no checksum


@fuzz(60)
@given(content=safetensors_files(IN_PARTS, {"checkpoint": STATE}))
def test_heads_of_checkpoints(folder: Path, content: bytes) -> None:
    path = folder / "checkpoint_00000003.safetensors"
    path.write_bytes(content)
    tried(lambda: load_checkpoint(path))


def torch_file(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": TENSORS, "epoch": 3}, buffer, **options)
    return buffer.getvalue()


TORCH_FILES = [torch_file(), torch_file(_use_new_zipfile_serialization=False)]


@fuzz(120)
@given(content=st.sampled_from(TORCH_FILES).flatmap(edited))
def test_torch_files(folder: Path, network: Any, content: bytes) -> None:
    path = folder / "weights.pth"
    path.write_bytes(content)
    tried(lambda: load_weights(network, path))


# --- label folders

SCORES = np.random.default_rng(0).normal(size=(3, 8, 9)).astype(np.float16)
HEAD = {"dtype": "float16", "shape": [3, 8, 9]}


@st.composite
def stored_scores(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return draw(edited(scores_to_bytes(SCORES)))
    head = draw(damaged_json(HEAD))
    return zstandard.ZstdCompressor().compress(head + b"\n" + SCORES.tobytes())


@fuzz(80)
@given(content=stored_scores())
def test_stored_scores(content: bytes) -> None:
    tried(lambda: scores_from_bytes(content))


@pytest.fixture(scope="module")
def labeled(folder: Path) -> Path:
    """`in/` with scores and `out/` with the label maps that `redistribute` made of them."""
    (folder / "in").mkdir()
    np.save(folder / "in/a.npy", SCORES)
    redistribute(folder)
    return folder


def redistribute(folder: Path, console: Console | None = None) -> None:
    record = redistribute_folder(
        folder / "in",
        folder / "out",
        [5, 3, 2],
        labeling_ratio=0.5,
        align=True,
        console=console or Console(quiet=True),
    )
    print_labels(record, folder / "out")


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(["redistribution.json", ".begun.json"]))
def test_records_of_label_folders(labeled: Path, data: st.DataObject, name: str) -> None:
    out = labeled / "out"
    record = json.loads((out / "redistribution.json").read_text())
    with replaced(out / "redistribution.json", (out / "redistribution.json").read_bytes()):
        (out / name).write_bytes(data.draw(damaged_json(record)))
        tried(lambda: redistribute(labeled))
    (out / ".begun.json").unlink(missing_ok=True)


TARGETS = [
    "/dev/zero",
    "/proc/self/mem",
    "/etc",
    "..",
    ".",
    "../run",
    "gone",
    "../whole.yaml",
    "round_0",
    "pipe",
]


@fuzz(30)
@given(
    name=st.sampled_from([*RECORDS, *BINARIES, "round_1", "round_1/labels", "more"]),
    target=st.sampled_from(TARGETS),
)
def test_links_in_runs(run: Path, name: str, target: str) -> None:
    path, aside = run / name, run.parent / "aside"
    if path.exists():
        path.rename(aside)
    with contextlib.suppress(FileExistsError):
        os.mkfifo(run.parent / "pipe")
    try:
        os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
        read_all(run)
    finally:
        path.unlink()
        if aside.exists():
            aside.rename(path)


# --- label maps and images

MAP = (np.arange(40 * 30).reshape(40, 30) // 400).astype(np.uint8)


def encoded(suffix: str, image: np.ndarray) -> bytes:
    done, data = cv2.imencode(suffix, image)
    assert done
    return data.tobytes()


def palette_png() -> bytes:
    from PIL import Image

    image, buffer = Image.fromarray(MAP, "P"), io.BytesIO()
    image.putpalette(bytes(range(9)))
    image.save(buffer, "png")
    return buffer.getvalue()


COLOR = np.repeat(MAP[:, :, None], 3, 2)
LABELS = {
    "gray.png": encoded(".png", MAP),
    "gray16.png": encoded(".png", MAP.astype(np.uint16)),
    "color.png": encoded(".png", COLOR),
    "alpha.png": encoded(".png", np.dstack([COLOR, MAP])),
    "palette.png": palette_png(),
    "map.tif": encoded(".tif", MAP),
    "map.bmp": encoded(".bmp", MAP),
    "photo.jpg": encoded(".jpg", COLOR * 50),
    "photo.webp": encoded(".webp", COLOR * 50),
}
COLORED = ClassSet(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
COLORED_MAP = label_encoding(COLORED, format="color")
ENCODINGS = [PLAIN, COLORED_MAP, label_encoding(COLORED, values={0: "a", 1: "b", "other": "ignore"})]


@fuzz(200)
@given(name=st.sampled_from(list(LABELS)), data=st.data(), encoding=st.sampled_from(ENCODINGS))
def test_label_maps_and_images(folder: Path, name: str, data: st.DataObject, encoding: Any) -> None:
    content = LABELS[name]
    window = data.draw(st.sampled_from([None, (8, min(60, len(content)))]))
    path = folder / name
    path.write_bytes(data.draw(edited(content, window=window)))
    tried(lambda: read_label(path, encoding), lambda: read_image(path))


# --- annotations

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]], "iscrowd": 0, "area": 32},
        {
            "id": 2, "image_id": 1, "category_id": 2, "iscrowd": 1,
            "segmentation": {"size": [20, 30], "counts": [100, 50, 450]},
        },
        {"id": 3, "image_id": 1, "category_id": 2, "segmentation": {"size": [20, 30], "counts": "c25?0000000Q="}},
    ],
}  # fmt: skip
LABELME = {
    "imagePath": "a.png", "imageHeight": 20, "imageWidth": 30, "version": "5",
    "shapes": [
        {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [9, 1], [9, 9]], "group_id": None, "flags": {}},
        {"label": "dog", "shape_type": "circle", "points": [[5, 5], [9, 9]]},
        {"label": "dog", "shape_type": "rectangle", "points": [[5, 5], [9, 9]]},
        {"label": "dog", "shape_type": "linestrip", "points": [[5, 5], [9, 9]]},
    ],
}  # fmt: skip
CITY = {
    "imgHeight": 20, "imgWidth": 30,
    "objects": [
        {"label": "road", "polygon": [[1, 1], [9, 1], [9, 9]]},
        {"label": "sky", "polygon": [[0, 0], [5, 0], [5, 5]]},
    ],
}  # fmt: skip
CVAT = (
    b'<?xml version="1.0"?><annotations><image id="0" name="a.png" width="30" height="20">'
    b'<polygon label="cat" points="1,1;9,1;9,9" z_order="0"/>'
    b'<box label="dog" xtl="1" ytl="1" xbr="5" ybr="5" z_order="1"/>'
    b'<mask label="cat" rle="3, 4, 5" left="1" top="2" width="4" height="3"/></image></annotations>'
)
ANNOTATIONS = st.one_of(damaged_json(COCO), damaged_json(LABELME), damaged_json(CITY), edited(CVAT))


@fuzz(200)
@given(content=ANNOTATIONS)
def test_annotations(folder: Path, content: bytes) -> None:
    path, out = folder / "annotations.json", folder / "drawn"
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    tried(lambda: rasterize_folder(path, out, console=Console(quiet=True)))


HEADS = {
    "length": with_head(b"{}", b"", 2**40),
    "longer than the file": with_head(b'{"a":1}', b"", 5000),
    "no object": with_head(b"[]", b""),
    "deep": with_head(b'{"a":' + b"[" * 100_000, b""),
    "outside": with_head(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(8)),
    "far outside": with_head(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[%d,%d]}}' % (2**62, 2**62 + 16), bytes(16)
    ),
    "negative": with_head(b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[16,0]}}', bytes(16)),
    "overlap": with_head(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}',
        bytes(24),
    ),
    "absurd": with_head(
        b'{"a":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,16]}}' % (2**40, 2**40), bytes(16)
    ),
    "many sides": with_head(
        b'{"a":{"dtype":"U8","shape":[%s1],"data_offsets":[0,1]}}' % (b"1," * 100_000), bytes(1)
    ),
    "many empty": with_head(
        b"{%s}"
        % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % k for k in range(100_000)),
        b"",
    ),
    "unknown type": with_head(b'{"a":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}', bytes(16)),
    "twice": with_head(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2 + b'"__metadata__":{}}', bytes(1)
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_lie_are_refused_at_once(folder: Path, network: Any, kind: str) -> None:
    path = folder / f"{kind}.safetensors"
    path.write_bytes(HEADS[kind])
    for use, refusal in (
        (lambda: load_network(path), WeightsError),
        (lambda: load_weights(network, path), WeightsError),
        (lambda: load_checkpoint(path), RunError),
    ):
        with pytest.raises(refusal) as caught:
            tried(use, expected=())
        assert str(path) in str(caught.value) and len(str(caught.value)) < 4000


def test_the_files_that_are_changed_can_be_read_before(folder: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    assert load_recipe(written("right.yaml", TEXT.encode())).seed == 3
    weights = safetensors.torch.save(TENSORS, {"darseg": json.dumps(DESCRIPTION)})
    assert read_spec(written("right.safetensors", weights)) == SPEC
    for content in (weights, *TORCH_FILES):
        assert read_tensors(written("right.pth", content)).keys() == TENSORS.keys()
    weights = safetensors.torch.save(IN_PARTS, {"checkpoint": json.dumps(STATE)})
    assert load_checkpoint(written("right.safetensors", weights)).parts.keys() == PARTS.keys()
    for name, content in LABELS.items():
        path = written(f"right_{name}", content)
        assert read_image(path).shape == (40, 30, 3)
        if not name.startswith("photo"):
            encoding = COLORED_MAP if name in ("color.png", "alpha.png") else PLAIN
            label = read_label(path, encoding)
            assert (label == np.where(MAP == 0, 255, MAP) if name == "alpha.png" else label == MAP).all()
    for content in (as_json(COCO), as_json(LABELME), as_json(CITY), CVAT):
        shutil.rmtree(folder / "drawn", ignore_errors=True)
        drawn = rasterize_folder(
            written("right.json", content), folder / "drawn", console=Console(quiet=True)
        )
        assert drawn.images == 1 and not drawn.faults
