"""Weights: saved and read back, pretrained backbones, refusals, downloads."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import pickle
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from torch import Tensor

from darseg.choices import Architecture
from darseg.errors import DarsegError, StorageError, WeightsError
from darseg.model import download
from darseg.model.backbone import RESNETS
from darseg.model.download import fetch
from darseg.model.network import Network, NetworkSpec, build_network
from darseg.model.weights import load_network, load_weights, read_spec, save_network
from wording import refused

torch.set_num_threads(1)

REASON = r"(?<=read as weights: ).*(?=\. The file is damaged)"
"""What torch or safetensors say of a damaged file; it differs between their versions."""

SHARED = Path(os.environ.get("DARSEG_SHARED", Path(__file__).resolve().parents[2] / "shared"))

SPEC = NetworkSpec(
    backbone="resnet18",
    classes=2,
    output_stride=16,
    head_channels=8,
    class_names=("ground", "sky"),
    class_colors=((1, 2, 3), (4, 5, 6)),
)


def small(backbone: str = "resnet18", seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build_network(backbone=backbone, classes=2, output_stride=16, head_channels=8)


def timm() -> Any:
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"timm cannot be imported: {error}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "network.safetensors"
    save_network(small(), path, SPEC)
    return path


def snapshot(network: Network) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


# --- our own files


def test_round_trip(saved: Path) -> None:
    assert read_spec(saved) == SPEC
    loaded = load_network(saved)
    assert not loaded.training
    assert same(loaded.state_dict(), small().state_dict())


def test_equal_networks_are_equal_files(saved: Path, tmp_path: Path) -> None:
    for attempt in range(2):
        save_network(small(), tmp_path / f"{attempt}.safetensors", SPEC)
        assert (tmp_path / f"{attempt}.safetensors").read_bytes() == saved.read_bytes()
    network = small()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    save_network(network, tmp_path / "last.safetensors", SPEC)
    assert (tmp_path / "last.safetensors").read_bytes() == saved.read_bytes()


def test_a_loaded_network_does_not_depend_on_its_file(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    path.write_bytes(saved.read_bytes())
    loaded = load_network(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(loaded.state_dict(), small().state_dict())


def test_normalization_is_saved(tmp_path: Path) -> None:
    network = small()
    network.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    save_network(network, tmp_path / "n.safetensors", SPEC)
    assert load_network(tmp_path / "n.safetensors").fill == (1, 2, 3)


def test_a_description_of_another_network_is_refused(tmp_path: Path) -> None:
    with refused(WeightsError, "n.safetensors", "backbone resnet18 / resnet34", "NetworkSpec"):
        save_network(small(), tmp_path / "n.safetensors", NetworkSpec("pspnet", "resnet34", 2, 16, 8))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_network(small(), tmp_path / "file" / "n.safetensors", SPEC)


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("other.safetensors", "other.pth"):
        with refused(WeightsError, name, "darseg convert", "network.weights"):
            load_network(tmp_path / name)


def test_a_description_from_the_future(saved: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    for change, fact in (({"shape": "round"}, "'shape'"), ({"architecture": "cube"}, "'cube'")):
        fields = {**json.loads(_metadata(saved)), **change}
        path = tmp_path / "n.safetensors"
        safetensors.torch.save_file(tensors, path, {"darseg": json.dumps(fields)})
        with refused(WeightsError, "n.safetensors", fact, "--upgrade", vary=[r"(?s)\(.*\)"]):
            load_network(path)
    safetensors.torch.save_file(tensors, path, {"darseg": "{"})
    with refused(WeightsError, "n.safetensors", vary=[r"\(.*\)"]):
        load_network(path)


def described(saved: Path, path: Path, change: Any) -> Path:
    """A copy of a saved network with another description: with these fields, or this text."""
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    text = head["__metadata__"]["darseg"]
    head["__metadata__"]["darseg"] = (
        json.dumps(json.loads(text) | change) if isinstance(change, dict) else change
    )
    new = json.dumps(head).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])
    return path


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"head_channels": 10**9}, ["1000000000", "8192"]),
        ({"head_channels": 8.0}, ["head_channels", "8.0"]),
        ({"classes": True}, ["classes", "True"]),
        ({"classes": 10**400}, ["classes", "255"]),
        ({"backbone": ["resnet18"]}, ["backbone", "resnet18"]),
        ({"backbone": None}, ["backbone", "None"]),
        ({"backbone": "timm/" + "a*" * 1000}, ["backbone", "2005", "200"]),
        ({"output_stride": 16.0}, ["output_stride", "16.0"]),
        ({"auxiliary": "no"}, ["auxiliary", "no"]),
        ({"class_names": [1, 2]}, ["class names"]),
        ({"class_names": "ab" * 10**6}, ["description"]),
        ({"class_colors": ["abc", "def"]}, ["class colors"]),
        ({"class_colors": [[0, 0, 256], [0, 0, 0]]}, ["class colors", "256"]),
        ({"class_colors": 7}, ["description"]),
        ("[" * 100_000, ["description", "deep"]),
        ("[]", ["description"]),
        ("1" * 5000, ["description"]),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict | str) else "",
)
def test_hostile_descriptions_are_refused(change: Any, facts: list[str], saved: Path, tmp_path: Path) -> None:
    path = described(saved, tmp_path / "n.safetensors", change)
    with refused(WeightsError, str(path), *facts):
        load_network(path)


def test_a_described_network_is_compared_before_it_is_built(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description of a small file may name a network of gigabytes."""
    path = described(saved, tmp_path / "n.safetensors", {"backbone": "resnet101", "head_channels": 8192})
    built: list[str] = []
    build = NetworkSpec.build

    def spy(spec: NetworkSpec) -> Network:
        network = build(spec)
        built.append(next(network.parameters()).device.type)
        return network

    monkeypatch.setattr(NetworkSpec, "build", spy)
    with pytest.raises(WeightsError, match="does not fit"):
        load_network(path)
    assert built == ["meta"]


def test_archives_that_expand_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**7))
    with refused(WeightsError, str(path), "10,000,000", vary=[r"[\d,]+(?= bytes and)"]):
        load_weights(small(), path)


def test_tensors_that_do_not_fit_their_description(saved: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    del tensors["backbone.conv1.weight"]
    tensors["head.classifier.bias"] = torch.zeros(7)
    tensors["surplus"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, tmp_path / "n.safetensors", {"darseg": _metadata(saved)})
    with refused(
        WeightsError,
        "n.safetensors",
        "backbone.conv1.weight",
        "head.classifier.bias",
        "[7]",
        "[2]",
        "surplus",
    ):
        load_network(tmp_path / "n.safetensors")


def _metadata(path: Path) -> str:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()["darseg"]


# --- damaged and unsafe files, for both readers


class Runs:
    """What unpickling it does: leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_would_run_code_are_refused(zipped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save(
        {"a": torch.zeros(1), "b": Runs(trace)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with refused(WeightsError, "evil.pth", "mkdir", "torch.save(state_dict, path)"):
        load_weights(small(), path)
    assert not trace.exists()


def test_bare_pickles_and_tar_archives_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Runs(trace)))
    with refused(WeightsError, "evil.pkl", "mkdir"):
        load_weights(small(), path)
    # The format of torch.save in 2016; torchvision's first ResNets are such files (resnet50-19c8e357.pth).
    with tarfile.open(tmp_path / "resnet50.pth", "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            archive.add(path, name)
    with refused(WeightsError, "resnet50.pth", "2017", "torch.save(torch.load("):
        load_weights(small(), tmp_path / "resnet50.pth")
    with tarfile.open(tmp_path / "weights.tar.gz", "w:gz") as archive:
        archive.add(path, "weights/net.pth")
    with refused(WeightsError, "weights.tar.gz", "tar -xf"):
        load_weights(small(), tmp_path / "weights.tar.gz")
    assert not trace.exists()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for read in (load_network, lambda path: load_weights(small(), path)):
        with refused(WeightsError, "missing.pth", "no such file"):
            read(tmp_path / "missing.pth")
        with refused(WeightsError, str(tmp_path), "folder"):
            read(tmp_path)


def test_web_pages_and_pointers(tmp_path: Path) -> None:
    page, pointer = tmp_path / "page.pth", tmp_path / "pointer.pth"
    page.write_text("\n<!DOCTYPE html><html>Please log in</html>")
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for read in (load_network, lambda path: load_weights(small(), path)):
        with refused(WeightsError, "page.pth", "web page"):
            read(page)
        with refused(WeightsError, "pointer.pth", "git lfs pull"):
            read(pointer)


@pytest.mark.parametrize("form", ["safetensors", "zip", "pickle"])
def test_truncated_files(form: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    if form == "safetensors":
        whole = saved.read_bytes()
    else:
        torch.save(small().backbone.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
        whole = path.read_bytes()
    network = small()
    before = snapshot(network)
    for kept in (0, 5, 1000, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=rf"weights \({kept:,} bytes\)"):
            load_weights(network, path)
        with pytest.raises(WeightsError):
            load_network(path)
    path.write_bytes(whole[:1000])
    with refused(WeightsError, "weights (1,000 bytes)", "cut short", vary=[REASON]):
        load_weights(network, path)
    assert same(network.state_dict(), before)


def test_files_that_are_not_state_dicts(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with refused(WeightsError, "list.pth", "holds a list", "model.state_dict()"):
        load_weights(small(), tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with refused(WeightsError, "numbers.pth", "'epoch'"):
        load_weights(small(), tmp_path / "numbers.pth")


# --- pretrained backbones


def imagenet(network: Network) -> dict[str, Tensor]:
    """A state dict as the file of a pretrained classifier has it."""
    state = {key: value.clone() for key, value in network.backbone.state_dict().items()}
    return {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize(
    ("backbone", "layout"),
    [
        ("resnet18", "bare"),
        ("resnet18", "nested"),
        ("resnet18", "module"),
        ("resnet18", "safetensors"),
        ("resnet50_deep", "bare"),
    ],
)
def test_resnets_from_imagenet(backbone: str, layout: str, tmp_path: Path) -> None:
    source, network = small(backbone, seed=1), small(backbone, seed=2)
    heads = {key: value for key, value in snapshot(network).items() if not key.startswith("backbone.")}
    state, path = imagenet(source), tmp_path / "weights.pth"
    if layout == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    if layout == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 9} if layout == "nested" else state, path)
    report = load_weights(network, path)
    assert same(network.backbone.state_dict(), source.backbone.state_dict())
    assert {key: network.state_dict()[key] for key in heads}.keys() == heads.keys()
    assert all(torch.equal(network.state_dict()[key], value) for key, value in heads.items())
    assert report.source == path
    assert set(report.loaded) == {f"backbone.{key}" for key in source.backbone.state_dict()}
    assert report.unused == ("fc.bias", "fc.weight")
    assert report.uncounted == ()


def test_files_of_an_old_torch_count_no_batches(tmp_path: Path) -> None:
    state = {key: value for key, value in imagenet(small(seed=1)).items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = small(seed=2)
    report = load_weights(network, tmp_path / "old.pth")
    assert same(network.backbone.state_dict(), small(seed=1).backbone.state_dict())
    assert len(report.uncounted) == 20 and "backbone.bn1.num_batches_tracked" in report.uncounted


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    state, path = imagenet(small(seed=1)), tmp_path / "weights.pth"
    del state["layer1.0.bn1.running_var"]
    state["layer4.0.conv1.weight"] = torch.zeros(512, 256, 1, 1)
    torch.save(state, path)
    network = small(seed=2)
    before = snapshot(network)
    missing = ("layer1.0.bn1.running_var", "[64]")
    other_shape = ("layer4.0.conv1.weight", "[512, 256, 1, 1]", "[512, 256, 3, 3]")
    with refused(WeightsError, "weights.pth", "resnet18", *missing, *other_shape):
        load_weights(network, path)
    assert same(network.state_dict(), before)


@pytest.mark.parametrize(
    ("stored", "wanted", "facts"),
    [
        ("resnet34", "resnet18", ("layer1.2.conv2.weight",)),
        ("resnet50_deep", "resnet50", ("conv1.weight", "[64, 3, 3, 3]", "[64, 3, 7, 7]")),
        ("resnet50", "resnet50_deep", ("conv2.weight", "resnet50_deep")),
    ],
    ids=["deeper", "deep stem", "plain stem"],
)
def test_weights_of_another_resnet(stored: str, wanted: str, facts: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(imagenet(small(stored)), tmp_path / "weights.pth")
    with refused(WeightsError, "weights.pth", wanted, *facts):
        load_weights(small(wanted), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("tf_efficientnet_lite0", {"conv_head", "bn2", "classifier"}),
        ("mobilenetv3_small_100", {"conv_head", "classifier"}),
        ("convnext_atto", {"head"}),  # its stages.0 is called stages_0 in the backbone
    ],
)
def test_timm_backbones(name: str, classifier: set[str], tmp_path: Path) -> None:
    whole = timm().create_model(name, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    network = small(f"timm/{name}")
    random_state = torch.get_rng_state()
    report = load_weights(network, tmp_path / "weights.pth")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(report.loaded) == {f"backbone.{key}" for key in network.backbone.state_dict()}
    assert len(report.loaded) + len(report.unused) == len(whole.state_dict())
    assert {key.split(".")[0] for key in report.unused} == classifier
    # As timm's whole network: the sum of all parameters of the backbone, and its first convolution.
    named = dict(whole.named_parameters())
    total = sum(value.double().sum() for key, value in named.items() if key not in report.unused)
    loaded = sum(value.double().sum() for value in network.backbone.parameters())
    assert torch.isclose(torch.as_tensor(loaded), torch.as_tensor(total))
    assert torch.equal(next(network.backbone.parameters()), next(iter(named.values())))


def test_weights_of_a_deeper_timm_network(tmp_path: Path) -> None:
    state = timm().create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    state["blocks.3.9.conv_dw.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    with refused(WeightsError, "weights.pth", "blocks.3.9.conv_dw.weight", "timm/tf_efficientnet_lite0"):
        load_weights(small("timm/tf_efficientnet_lite0"), tmp_path / "weights.pth")


def test_weights_of_another_timm_network(tmp_path: Path) -> None:
    torch.save(timm().create_model("resnet18", pretrained=False).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"conv_stem\.weight: missing"):
        load_weights(small("timm/mobilenetv3_small_100"), tmp_path / "weights.pth")


def test_pretrained_efficientnet_lite0() -> None:
    path = SHARED / "weights" / "efficientnet_lite0_in1k.pth"
    if not path.is_file():
        pytest.skip(f"no pretrained weights at {path} (set DARSEG_SHARED to the folder that has them)")
    whole = timm().create_model("tf_efficientnet_lite0", pretrained=False)
    network = small("timm/tf_efficientnet_lite0")
    report = load_weights(network, path)
    assert set(report.loaded) == {f"backbone.{key}" for key in network.backbone.state_dict()}
    assert {key.split(".")[0] for key in report.unused} == {"conv_head", "bn2", "classifier"}
    assert len(report.loaded) + len(report.unused) == len(whole.state_dict())
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 33, 33, dtype=torch.uint8)).main.isfinite().all()


# --- downloads

PORT = r"(?<=127\.0\.0\.1:)\d+"

CONTENT = bytes(range(256)) * 9000  # more than one chunk
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        if not self.path.startswith("/unstated"):
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path.startswith("/slow"):
            with contextlib.suppress(ConnectionError):
                for at in range(40):
                    self.wfile.write(CONTENT[at : at + 1])
                    time.sleep(0.02)
            return
        self.wfile.write(CONTENT[: 1 << 18] if self.path.startswith("/short") else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.requests = 0
    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_fetch_once(server: str, tmp_path: Path) -> None:
    path = fetch(f"{server}/net%20a.pth?x=1", DIGEST.upper(), tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert path.parent == tmp_path / "cache" and path.name.endswith("net a.pth")
    assert fetch(f"{server}/net%20a.pth?x=1", DIGEST, tmp_path / "cache") == path
    assert Handler.requests == 1
    path.write_bytes(b"damaged")  # on the disk: downloaded again
    assert fetch(f"{server}/net%20a.pth?x=1", DIGEST, tmp_path / "cache").read_bytes() == CONTENT
    assert Handler.requests == 2
    assert list(path.parent.iterdir()) == [path]


def test_fetch_from_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(CONTENT)
    assert fetch(source.as_uri(), DIGEST, tmp_path / "cache").read_bytes() == CONTENT


def test_only_files_are_fetched_and_leftovers_go(tmp_path: Path) -> None:
    """A pipe would be waited on, and a kill in the meantime would leave the half-written file."""
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/old.pth.0123456789abcdef.part").write_bytes(b"half")
    for path, kind in (
        (tmp_path / "pipe.pth", "named pipe"),
        (Path("/dev/zero"), "device"),
        (tmp_path, "folder"),
    ):
        with refused(WeightsError, path.as_uri(), kind):
            fetch(path.as_uri(), DIGEST, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    for name in ("a%00b.pth", "x" * 400, "..%2f..%2f..", "%1b[2J"):
        with pytest.raises(WeightsError):
            fetch(f"file:///nowhere/{name}", DIGEST, tmp_path / "cache")


@pytest.mark.parametrize("name", ["net.pth", "short.pth"])
def test_files_with_another_digest_are_refused(name: str, server: str, tmp_path: Path) -> None:
    wanted = "0" * 64 if name == "net.pth" else DIGEST
    actual = hashlib.sha256(CONTENT if name == "net.pth" else CONTENT[: 1 << 18]).hexdigest()
    with refused(WeightsError, f"{server}/{name}", wanted, actual, vary=[PORT]):
        fetch(f"{server}/{name}", wanted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_addresses_that_do_not_answer(server: str, tmp_path: Path) -> None:
    for url, reason in (
        (f"{server}/missing.pth", "404"),
        ("file:///nowhere/n.pth", "No such file"),
        ("n.pth", "unknown url type"),
    ):
        with refused(WeightsError, url, reason, vary=[PORT]):
            fetch(url, DIGEST, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_stays_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/net.pth"
        with refused(WeightsError, url, "timed out", vary=[PORT]):
            fetch(url, DIGEST, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_downloading(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(StorageError, "full", "net.pth"):
        fetch(f"{server}/net.pth", DIGEST, tmp_path)
    assert not list(tmp_path.iterdir())


def test_downloads_without_https_need_many_digits(server: str, tmp_path: Path) -> None:
    for url in (f"{server}/net.pth", "file:///n.pth"):
        with refused(WeightsError, url, "15", "16", "https", vary=[PORT]):
            fetch(url, DIGEST[:15], tmp_path)
    assert Handler.requests == 0
    assert fetch(f"{server}/net.pth", DIGEST[:16], tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["net.pth", "unstated.pth"])
def test_downloads_are_limited_in_size(
    name: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LARGEST", len(CONTENT) - 1)
    with refused(WeightsError, f"{server}/{name}", f"{len(CONTENT) - 1:,}", "path", vary=[PORT]):
        fetch(f"{server}/{name}", DIGEST, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(download, "LARGEST", len(CONTENT))
    assert fetch(f"{server}/{name}", DIGEST, tmp_path).read_bytes() == CONTENT


def test_downloads_are_limited_in_time(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the server never pauses for long."""
    monkeypatch.setattr(download, "LONGEST", 0.3)
    vary = [PORT, r"[\d,]+(?= bytes in)"]
    with refused(WeightsError, f"{server}/slow.pth", "bytes in", "path", vary=vary):
        fetch(f"{server}/slow.pth", DIGEST, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(CONTENT)
    with refused(StorageError, "source.pth is a file"):
        fetch(source.as_uri(), DIGEST, source / "cache")


def test_every_refusal_is_a_darseg_error() -> None:
    assert issubclass(WeightsError, DarsegError)


@pytest.mark.parametrize("architecture", sorted({*get_args(Architecture)} - {"dpt"}))  # which takes none
@pytest.mark.parametrize("backbone", sorted(RESNETS))
def test_networks_on_our_resnets_hold_nothing_but_their_state(architecture: str, backbone: str) -> None:
    """Otherwise a loaded network would have memory that nobody has filled."""
    with torch.device("meta"):
        network = NetworkSpec(architecture, backbone, 4, output_stride=16).build()
    held = {name for name, _ in (*network.named_buffers(), *network.named_parameters())}
    assert held == {*network.state_dict()}
