"""Weight files of other programs, torch or safetensors, read without running code inside them."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from darseg.data.files import open_file, raise_if_unreadable
from darseg.errors import WeightsError

HARMLESS_PACKAGES = ("torch", "collections")
"""Packages whose names occur in every torch file."""

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")
"""Beginnings of files of gzip, bzip2 and xz."""

EXPANSION = 20
"""How many times as large as the file its unpacked content may be."""

MEMBERS_READ = 1000
"""Names of a tar archive that are looked at."""

LONGEST_HEAD = 1 << 22
"""Bytes of a safetensors file's list of tensors: twenty times what large networks need. Reading more takes long."""

PARTS = ("state_dict", "model_ema", "model")
"""Names under which checkpoints hold a network, in the order of preference. "model_ema" is the average over the steps
that UniMatch V2 is judged by."""

OLD_TAR_MEMBERS = {"storages", "tensors", "pickle"}
"""Files in the tar archives that torch.save wrote until early 2017."""


def read_bare(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by key, without the "module." that DataParallel puts before the keys."""
    return read_bare_part(path)[1]


def read_bare_part(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of PARTS under which a file holds them ("" if under none), and what `read_bare` gives."""
    part, tensors = _read(path)
    return part, {key.removeprefix("module."): value for key, value in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file by key. Nothing in the file is run.

    Raises WeightsError if the file is missing, damaged, unsafe, or holds no tensors by key.
    """
    return _read(path)[1]


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The part of a checkpoint that is read, and its tensors by key.

    Raises WeightsError if the file is missing, damaged, unsafe, or holds no tensors by key.
    """
    start = read_start(path)
    if is_safetensors(start):
        try:
            check_head(path)
            return "", safetensors.torch.load_file(path)
        except Exception as error:  # safetensors raises its own errors, torch's and OSError
            raise damaged(path, error) from error
    content = _load_guarded(path)
    part = _part_of(content)
    if part:
        content = content[part]
    if not isinstance(content, dict):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a state dict (names and tensors). Save the state dict "
            "instead: torch.save(model.state_dict(), path)."
        )
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors; its keys begin with {_some_keys(content)}. Give a file with a state "
            'dict, bare or under "state_dict".'
        )
    return part, tensors


def _part_of(content: Any) -> str:
    if not isinstance(content, dict):
        return ""
    return next((part for part in PARTS if isinstance(content.get(part), dict)), "")


def _some_keys(content: dict[Any, Any]) -> list[str]:
    """The first keys that are strings, shortened; writing out others could take forever."""
    return [key[:60] for key in sorted(key for key in content if isinstance(key, str))[:5]]


def read_start(path: Path) -> bytes:
    """The first bytes of `path`. Raises WeightsError unless it is a file that could hold weights."""
    try:
        with open_file(path) as file:
            start = file.read(64)
    except OSError as error:
        raise_if_unreadable(error, path)
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise WeightsError(
            f"Cannot read weights from {path}: {reason}. Check the path, or download the file."
        ) from error
    if start.lstrip().startswith(b"<"):
        raise WeightsError(
            f"{path} is a web page, not weights: the download gave a log-in or an error page. Open the address in a "
            "browser and save the file itself."
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not the weights it points to. Run git lfs pull in its repository."
        )
    return start


def is_safetensors(start: bytes) -> bool:
    """Whether a file with these first bytes is a safetensors file."""
    return start[8:9] == b"{"  # eight bytes of length, then JSON


def check_head(path: Path) -> None:
    """Raise ValueError if a safetensors file's list of tensors is longer than the file or LONGEST_HEAD."""
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
    if length > size - 8:
        raise ValueError(f"its list of tensors should have {length:,} bytes, and the file has {size:,}")
    if length > LONGEST_HEAD:
        raise ValueError(
            f"its list of tensors has {length:,} bytes, and no network needs more than {LONGEST_HEAD:,}"
        )


def damaged(path: Path, error: Exception) -> WeightsError:
    """The error to raise if reading `path` failed with `error`.

    Raises StorageError if the file cannot be opened, but may be whole.
    """
    raise_if_unreadable(error, path)
    size = path.stat().st_size
    return WeightsError(
        f"{path} ({size:,} bytes) cannot be read as weights: {type(error).__name__}, {_first_line(str(error))}. The "
        "file is damaged, cut short, or neither a torch nor a safetensors file. Copy or download it again."
    )


def _load_guarded(path: Path) -> Any:
    """What torch.load gives with its guard against code. Raises WeightsError."""
    try:
        if read_start(path).startswith(COMPRESSED):
            raise WeightsError(
                f"{path} is a compressed file. Unpack it (tar -xf, or gunzip, bunzip2, unxz) and give the weight file "
                "inside."
            )
        if (members := _tar_members(path)) is not None:
            raise _tar_archive(path, members)
        _check_expansion(path)
        if _is_torchscript(path):  # torch before 2.6 loads these even with weights_only
            raise _unsafe(path, "it is a TorchScript archive, a program and not only weights")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # our error says more
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused_by_guard(path, error) from error
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise damaged(path, error) from error


def _tar_members(path: Path) -> set[str] | None:
    """The first names in a tar archive; None for other files."""
    try:
        with tarfile.open(path, "r:") as archive:  # never a compressed one, which could expand without bound
            return {member.name for member in itertools.islice(archive, MEMBERS_READ)}
    except tarfile.TarError:
        return None


def _check_expansion(path: Path) -> None:
    """Raise WeightsError if a zip archive grows much when unpacked; torch does not compress weights."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > EXPANSION * path.stat().st_size:
        raise WeightsError(
            f"{path} has {path.stat().st_size:,} bytes and would have {unpacked:,} unpacked, more than {EXPANSION} "
            "times as many. Weights hardly get smaller by compression. If you trust the file, unpack it and save its "
            "state dict again with torch.save(state_dict, path)."
        )


def _tar_archive(path: Path, members: set[str]) -> WeightsError:
    old_torch = members >= OLD_TAR_MEMBERS
    if old_torch:
        return WeightsError(
            f"{path} is a tar archive, as torch.save wrote them until early 2017. darseg does not read these. If you "
            "trust the file (loading it can run code), convert it with: torch.save(torch.load(path, "
            "weights_only=False), new_path). Or download a newer file of these weights."
        )
    return WeightsError(f"{path} is a tar archive. Unpack it (tar -xf) and give the weight file inside.")


def _refused_by_guard(path: Path, error: pickle.UnpicklingError) -> WeightsError:
    """What to say of a file that torch's guarded reader refuses: it is unsafe, or damaged."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    imports = [] if named else _imports(path)
    foreign = [name for name in imports if name.partition(".")[0] not in HARMLESS_PACKAGES]
    if named or foreign:
        return _unsafe(path, f"it holds more than tensors ({named[1] if named else ', '.join(foreign)})")
    if imports:
        return _unsafe(path, f"torch's guarded reader refuses it ({_first_line(str(error))})")
    return damaged(path, error)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _imports(path: Path) -> list[str]:
    """What unpickling a torch file would import, read without doing it; as far as it can be read."""
    names, texts = [], [""]
    with contextlib.suppress(Exception), open(path, "rb") as file:
        stream: IO[bytes] = file
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                stream = io.BytesIO(archive.read(member))
        while True:  # old files are several pickles in a row; the end of the file, or no pickle, raises
            for operation, value, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    names.append(str(value).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
                elif isinstance(value, str):
                    texts.append(value)
    return names


def _unsafe(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{path} was not read, because reading it could run code: {reason}. Get a file that holds only tensors. Or, if "
        "you trust this one, load it elsewhere and save its state dict with torch.save(state_dict, path)."
    )


def _first_line(text: str, limit: int = 200) -> str:
    """The first line of a message, without torch's preface; torch's messages have many lines."""
    text = text.rpartition("WeightsUnpickler error:")[2]
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line[:limit].rstrip(".")
