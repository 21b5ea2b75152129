"""Torch files of 2016 and early 2017, tar archives: torchvision's first ResNets are such (resnet50-19c8e357.pth).

torch reads them by unpickling without a guard, or not at all. Read here, they can name nothing but dictionaries, numbers
and `Parameter`, and those stand for harmless things of our own.
"""

from __future__ import annotations

import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_DTYPES = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}


class _Parameter:
    """What stands for torch's Parameter: keeps its tensor."""

    def __init__(self, data: Tensor | None = None, *_: object) -> None:
        self.data = data

    def __setstate__(self, state: tuple) -> None:
        if len(state) == 5:  # the oldest way: the tensor is in the state
            self.data = state[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], tensors: dict[int, Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self.tensors = tensors

    def find_class(self, module: str, name: str) -> Any:
        kind = name.removesuffix("Storage").removesuffix("Tensor")
        if module in ("torch", "torch.cuda") and kind in _DTYPES:
            return _DTYPES[kind]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.nn.parameter", "Parameter"):
            return _Parameter
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")

    def persistent_load(self, name: str) -> Tensor:
        return self.tensors[int(name)]


def read_tarred(path: Path) -> Any:
    """What was saved in the archive: a state dict, or a dictionary around one; tensors are on the CPU.

    Raises pickle.UnpicklingError where it names anything else; all sorts of errors where it is damaged.
    """
    tensors: dict[int, Tensor] = {}

    def member(name: str) -> IO[bytes]:
        file = tar.extractfile(name)
        if file is None:
            raise ValueError(f"{name} is no file")
        return file

    def load(file: IO[bytes]) -> Any:
        return _Unpickler(file, tensors).load()

    def numbers(file: IO[bytes], count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}q", file.read(8 * count))

    with tarfile.open(path, "r:") as tar:
        storages: dict[int, Tensor] = {}
        with member("storages") as file:
            for _ in range(load(file)):
                key, _location, dtype = load(file)
                (length,) = numbers(file, 1)
                data = bytearray(file.read(length * dtype.itemsize))
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                if len(storages[key]) != length:
                    raise ValueError(f"storage {key} is cut short")
            for key, root, offset, length in load(file):
                storages[key] = storages[root][offset : offset + length]
        with member("tensors") as file:
            for _ in range(load(file)):
                key, storage, _kind = load(file)
                (sides,) = struct.unpack("<i4x", file.read(8))
                shape, stride, (offset,) = numbers(file, sides), numbers(file, sides), numbers(file, 1)
                # as_strided counts from the beginning of what a view is of.
                offset += storages[storage].storage_offset()
                tensors[key] = storages[storage].as_strided(shape, stride, offset)
        with member("pickle") as file:
            return _plain(load(file))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.data if isinstance(value, _Parameter) else value
