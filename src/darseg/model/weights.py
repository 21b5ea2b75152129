"""Reading and writing weights, without ever running code that a file brings along.

Networks are saved as safetensors, with what it takes to build them again. Other weights are read from torch files
(tensors only) or safetensors: backbones pretrained on ImageNet in the layouts of torchvision, semseg and timm, whole
networks in ours and in the original release's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pickle
import pickletools
import re
import tarfile
import urllib.parse
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from darseg.choices import ReleasedNetwork
from darseg.data.classes import ClassSet
from darseg.data.files import ASIDE, storage_error, write_whole
from darseg.errors import RecipeError, WeightsError, faults
from darseg.model.backbone import Backbone, TimmBackbone
from darseg.model.heads import ATROUS_DILATIONS
from darseg.model.network import Network, NetworkSpec
from darseg.model.release import CLASSIFIERS, RELEASED, our_key, released_architecture
from darseg.model.tarred import read_tarred

# All metadata is one entry: safetensors writes several in no fixed order; equal networks should be equal
# files.
METADATA = "darseg"

NORMALIZATION = ("mean", "std")
"""Buffers of a network that files of other frameworks lack."""

CHUNK = 1 << 20
"""Bytes read at a time from the network and the disk."""

TIMEOUT = 60.0
"""Seconds without an answer after which a download is given up."""


def save_network(network: Network, path: Path, spec: NetworkSpec) -> None:
    """Write weights and `spec` to `path`, whole or not at all; equal networks give equal bytes.

    Raises WeightsError where `spec` describes another network, StorageError where the disk refuses.
    """
    with torch.device("meta"):  # shapes alone: no memory, no random numbers drawn
        described = spec.build()
    given, told = _identity(network), _identity(described)
    if given != told:
        raise WeightsError(
            f"{path}: the network (classes, output stride, auxiliary head, backbone, head, its branches, numbers in all) "
            f"is {given}, but its description says {told}: give the NetworkSpec it was built from."
        )
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    metadata = {METADATA: json.dumps(dataclasses.asdict(spec), sort_keys=True)}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def _identity(network: Network) -> tuple:
    """What tells one network from another, weights aside."""
    return (
        network.classes,
        network.stride,
        network.auxiliary_head is not None,
        network.backbone.name,
        type(network.head).__name__,
        getattr(network.head, "summed", None),
        sum(value.numel() for value in network.state_dict().values()),
    )


def read_spec(path: Path) -> NetworkSpec:
    """What the network saved at `path` is, its class names and colors included. Raises WeightsError."""
    metadata: dict[str, str] = {}
    start = _check_there(path)
    try:
        if _is_safetensors(start):
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if METADATA not in metadata:
        raise WeightsError(
            f"{path} is not a network saved by darseg: it does not say which network its weights belong to. "
            "Turn a checkpoint of the release into one with darseg convert; weights of a backbone alone belong into a "
            "recipe (network.weights)."
        )
    try:
        fields = json.loads(metadata[METADATA])
        fields["class_names"] = tuple(fields["class_names"])
        fields["class_colors"] = tuple(tuple(color) for color in fields["class_colors"])
        return NetworkSpec(**fields)
    except (ValueError, TypeError, KeyError, RecipeError) as error:
        raise WeightsError(
            f"{path}: the description of the network cannot be read ({error}). It may come from a newer "
            "darseg: upgrade with pip install --upgrade darseg, or save the network again."
        ) from error


def load_network(path: Path | str) -> Network:
    """The network saved at `path`, on the CPU and in eval mode.

    Raises WeightsError for files that are missing, damaged or not networks of darseg, RecipeError where the
    backbone cannot be built here (timm is not installed).
    """
    path = Path(path)
    network = read_spec(path).build()
    found = _read_tensors(path)
    wanted = network.state_dict()
    wrong = list(_misfits(wanted, {key: key for key in wanted}, found).values())
    wrong += [f"{key}: not a part of this network" for key in found if key not in wanted]
    if wrong:
        raise WeightsError(
            faults(f"{path} does not fit the network it describes", wrong, limit=10)
            + "\nIt may come from another version of darseg: save the network again with this one."
        )
    network.load_state_dict(found)
    return network.eval()


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did."""

    source: Path
    loaded: tuple[str, ...]
    """Keys of the network that were filled."""
    unused: tuple[str, ...]
    """Keys of the file that the network has no place for: ImageNet's classifier; more where not strict."""
    uncounted: tuple[str, ...]
    """`num_batches_tracked` keys that the file, saved by an old torch, lacks. Nothing here needs them."""
    unfilled: tuple[str, ...] = ()
    """A line for each part that stays as it was, though the file should fill it; empty where strict."""
    whole: bool = False
    """Whether the file holds a whole network, heads included, and not a backbone alone."""
    architecture: str | None = None
    """Of the release, where the file has its layout."""


def load_weights(network: Network, source: Path, strict: bool = True) -> LoadReport:
    """Fill `network` with the weights of a file, on whatever device it is.

    Args:
        source: torch file or safetensors, bare or under "state_dict", keys with or without "module.", in the layout of
            - a network saved by darseg, or of the release's and semseg's PSPNet and DeepLabv2: fills all of it;
            - torchvision (ResNets), semseg (ResNets with the deep stem) or timm (its networks): fills the backbone,
              heads stay as they are.
        strict: every part must be filled, and nothing but ImageNet's classifier be left over. Otherwise what
            fits is loaded, and the report lists the rest.

    Raises WeightsError, leaving the network as it was, where strictness is hurt or nothing fits at all.
    """
    found = _read_bare(source)
    backbone, wanted = network.backbone, network.state_dict()
    architecture = released_architecture(found)
    whole = architecture is not None or any(key.startswith("backbone.") for key in found)
    if architecture is not None:
        theirs = {our_key(key, architecture): key for key in found}
        origin = {key: theirs.get(key, key) for key in wanted if key not in NORMALIZATION}
    elif whole:
        origin = {key: key for key in wanted}
    else:
        parts = backbone.state_dict()
        origin = {f"backbone.{key}": _origin(key, backbone, found) for key in parts}
    uncounted = tuple(
        key for key, name in origin.items() if key.endswith("num_batches_tracked") and name not in found
    )
    origin = {key: name for key, name in origin.items() if key not in uncounted}
    misfits = _misfits(wanted, origin, found)
    unused = tuple(sorted(set(found) - set(origin.values())))
    foreign = unused if whole else _foreign(unused, backbone, origin)
    wrong = list(misfits.values())
    wrong += [
        f"{key}: {'no part of this network' if whole else f'of a larger network than {backbone.name}'}"
        for key in foreign
    ]
    if whole and architecture is None and getattr(network.head, "summed", 0) == len(ATROUS_DILATIONS):
        with contextlib.suppress(WeightsError):  # of darseg's layout, but without a description
            if read_spec(source).release_classifier:
                wrong.append("classifier: of the file only two branches were trained, this network sums four")
    fitting = {key: name for key, name in origin.items() if key not in misfits}
    if wrong and (strict or fitting.keys() <= set(NORMALIZATION)):
        what = "the network" if whole else f"the backbone {backbone.name}"
        advice = _advice(network, found, architecture, whole)
        raise WeightsError(
            faults(
                f"{source} does not fit {what}. Nothing was loaded. {advice} What does not fit",
                wrong,
                limit=20,
            )
        )
    with torch.no_grad():
        for key, name in fitting.items():
            wanted[key].copy_(found[name])  # tensors of a state dict share the memory of the network's own
    return LoadReport(source, tuple(fitting), unused, uncounted, tuple(misfits.values()), whole, architecture)


def _advice(network: Network, found: Mapping[str, Tensor], architecture: str | None, whole: bool) -> str:
    if not whole:
        return (
            "Give weights of this backbone, or choose the backbone these weights are of (a plain and a deep stem, "
            "resnet50 and resnet50_deep, are two backbones)."
        )
    told = []
    if architecture:
        names = [name for name, spec in RELEASED.items() if spec.architecture == architecture]
        told.append(
            f"The file's layout is that of the released {architecture} (darseg convert --architecture {names[0]})."
        )
    classes = _classes_in(found)
    if classes not in (None, network.classes):
        told.append(f"The file is of a network for {classes} classes, this one has {network.classes}.")
    return " ".join(
        [
            *told,
            "Build the network the file was saved from, or take what fits: network.strict: false in a recipe, "
            "--no-strict with darseg convert.",
        ]
    )


def _classes_in(found: Mapping[str, Tensor]) -> int | None:
    """Classes of the whole network in a file, the release's or darseg's; None of a backbone alone."""
    names = (*CLASSIFIERS.values(), "head.classifier.weight", "head.branches.0.weight")
    return next((len(found[name]) for name in names if name in found and found[name].ndim), None)


def convert(
    source: Path | str,
    out: Path | str,
    architecture: ReleasedNetwork,
    classes: int | None = None,
    release_classifier: bool = False,
    class_set: ClassSet | None = None,
    strict: bool = True,
) -> LoadReport:
    """Write a checkpoint of the release or of semseg as a network of darseg, for `load_network` and `darseg predict`.

    Args:
        source: as `load_weights` reads it; an optimizer in the file is left out.
        architecture: "pspnet50" or "deeplabv2_101".
        classes: K; None: as many as the file (or `class_set`) has.
        release_classifier: DeepLabv2 sums two of its four branches, as the published checkpoints need it.
        class_set: names and colors to keep in the file.
        strict: see `load_weights`; parts that are not filled are drawn from seed 0 otherwise.

    Raises WeightsError: a file that is missing, damaged, unsafe or of another network; `out` exists.
    """
    source, out = Path(source), Path(out)
    if architecture not in RELEASED:
        raise WeightsError(f"No released network {architecture!r}: there are {', '.join(RELEASED)}.")
    if out.exists():
        raise WeightsError(f"{out} exists already, and is left as it is: give another name, or remove it.")
    if out.suffix != ".safetensors":
        raise WeightsError(
            f"{out}: networks of darseg are safetensors; name it {out.with_suffix('.safetensors').name}."
        )
    released = RELEASED[architecture]
    if classes is None:
        classes = len(class_set) if class_set else _classes_in(_read_bare(source)) or released.classes
    if class_set and len(class_set) != classes:
        raise WeightsError(
            f"{classes} classes are wanted, but the set of names has {len(class_set)}: give the names of these classes."
        )
    spec = dataclasses.replace(
        released,
        classes=classes,
        release_classifier=release_classifier,
        class_names=class_set.names if class_set else (),
        class_colors=class_set.colors if class_set else (),
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # what is drawn where not strict is the same each time
        network = spec.build()
    report = load_weights(network, source, strict)
    if not report.whole:
        raise WeightsError(
            f"{source} holds a backbone alone, no classifier: name it in a recipe (network.weights) and train."
        )
    save_network(network, out, spec)
    return report


def _origin(key: str, backbone: Backbone, found: dict[str, Tensor]) -> str:
    """The key in the file that fills `key` of the backbone."""
    if not isinstance(backbone, TimmBackbone):
        return key
    key = key.removeprefix("body.")
    if key in found:
        return key
    # For some networks timm unpacks a sequence as it cuts off the classifier: stages.0.x becomes stages_0.x.
    top, _, rest = key.partition(".")
    unpacked = (f"{top[:i]}.{top[i + 1 :]}.{rest}" for i, letter in enumerate(top) if letter == "_")
    return next((candidate for candidate in unpacked if candidate in found), key)


def _foreign(unused: tuple[str, ...], backbone: Backbone, origin: dict[str, str]) -> tuple[str, ...]:
    """Unused keys of a backbone's file that are no classifier's.

    ResNet-101's weights would fill every place of a ResNet-50: what is left over tells them apart.
    """
    tops = {name.partition(".")[0] for name in origin.values()}
    foreign = [key for key in unused if key.partition(".")[0] in tops]
    if foreign and isinstance(backbone, TimmBackbone):
        whole = backbone.all_keys()
        foreign = [key for key in foreign if key not in whole]
    return tuple(foreign)


def _misfits(wanted: dict[str, Tensor], origin: dict[str, str], found: dict[str, Tensor]) -> dict[str, str]:
    """A line for each wanted key whose origin is missing from `found`, has another shape or holds no plain numbers."""
    wrong = {}
    for key, name in origin.items():
        shape = list(wanted[key].shape)
        if name not in found:
            wrong[key] = f"{name}: missing, {shape} is wanted"
        elif list(found[name].shape) != shape:
            wrong[key] = f"{name}: has shape {list(found[name].shape)}, {shape} is wanted"
        elif not _is_plain(found[name]) or found[name].is_floating_point() < wanted[key].is_floating_point():
            kind = str(found[name].dtype).removeprefix("torch.")
            wrong[key] = (
                f"{name}: holds {kind} ({found[name].layout}), dense floating-point numbers are wanted"
            )
    return wrong


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"


def _read_bare(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by key, without the "module." that training on several GPUs puts before them."""
    return {key.removeprefix("module."): value for key, value in _read_tensors(path).items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by key; nothing in the file is run."""
    start = _check_there(path)
    try:
        if _is_safetensors(start):
            return safetensors.torch.load_file(path)
        if tarfile.is_tarfile(path):
            content: Any = read_tarred(path)
        elif _is_torchscript(path):  # torch before 2.6 loads these even with weights_only
            raise _unsafe(path, "it is a TorchScript archive, a program and not weights alone")
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows says more
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        imports = [] if named else _imports(path)
        strange = [name for name in imports if name.partition(".")[0] not in ("torch", "collections")]
        if named or strange:
            more = named[1] if named else ", ".join(strange)
            raise _unsafe(path, f"it holds more than tensors ({more})") from error
        if imports:
            raise _unsafe(path, f"torch's guarded reader does not take it ({_reason(str(error))})") from error
        raise _damaged(path, error) from error
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise _damaged(path, error) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state dict (names and tensors). Save the state "
            "dict instead: torch.save(model.state_dict(), path)."
        )
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors under its keys {sorted(map(str, content))[:5]}: give a state dict, "
            'bare or under "state_dict".'
        )
    return tensors


def _check_there(path: Path) -> bytes:
    """The first bytes of `path`; WeightsError unless it is a file that could hold weights."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise WeightsError(
            f"Cannot read weights from {path}: {reason}. Check the path, or download it."
        ) from error
    if start.lstrip().startswith(b"<"):
        raise WeightsError(
            f"{path} is a web page, not weights: the download gave a page instead of the file (a log-in or "
            "an error page). Open the address in a browser and save the file itself."
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights it points to: run git lfs pull there."
        )
    return start


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{"  # eight bytes of length, then JSON


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _imports(path: Path) -> list[str]:
    """What unpickling a torch file would import, read without doing it; as far as it can be read."""
    found, texts = [], [""]
    with contextlib.suppress(Exception), open(path, "rb") as file:
        stream: IO[bytes] = file
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                stream = io.BytesIO(archive.read(name))
        while True:  # old files are several pickles in a row; their end, or no pickle, raises
            for operation, value, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    found.append(str(value).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(value, str):
                    texts.append(value)
    return found


def _damaged(path: Path, error: Exception) -> WeightsError:
    size = path.stat().st_size
    return WeightsError(
        f"{path} ({size:,} bytes) cannot be read as weights: {type(error).__name__}, {_reason(str(error))}. "
        "It is damaged, cut short, or neither a torch nor a safetensors file: copy or download it again."
    )


def _unsafe(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{path} was not read, since reading it could run code: {reason}. Get a file of tensors alone, or, "
        "if you trust this one, read it elsewhere and save its state dict with torch.save(state_dict, path)."
    )


def _reason(text: str, limit: int = 200) -> str:
    """The first line of a message, torch's preface left out; torch's go on for many."""
    text = text.rpartition("WeightsUnpickler error:")[2]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line[:limit].rstrip(".")


def fetch(url: str, sha256: str, cache_dir: Path) -> Path:
    """The file behind `url`, downloaded to `cache_dir` unless it is there already with digest `sha256`.

    `sha256` may be the beginning of the digest: torchvision's file names hold its first 8 digits.

    Raises WeightsError where it cannot be had or has another digest (then nothing is kept), StorageError
    where the disk refuses. Processes may fetch the same file at once.
    """
    wanted = sha256.lower()
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "weights"
    target = cache_dir / f"{wanted[:12]}-{name}"  # files of one name at two addresses do not collide
    if target.is_file() and _file_digest(target).startswith(wanted):
        return target
    aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}{ASIDE}")  # each process its own
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            digest, size = hashlib.sha256(), 0
            for chunk in _download(url):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if not digest.hexdigest().startswith(wanted):
            raise WeightsError(
                f"{url} gave {size:,} bytes with sha256 {digest.hexdigest()}, wanted was {wanted}: the "
                "download was cut short or the file has changed. Nothing was kept; try again, or check "
                "address and digest."
            )
        os.replace(aside, target)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return target


def _download(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while chunk := response.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise WeightsError(
            f"Cannot download {url}: {error}. Check the address and the connection, or download the file "
            "elsewhere and give its path."
        ) from error


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
