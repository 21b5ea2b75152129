"""Digests of the settings that decide what a step leaves: equal digests, equal results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

import torch


def digest_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_state(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of a state dict."""
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def digest_settings(**settings: Any) -> str:
    """SHA-256 of settings, independent of their order.

    Leaves out what is None and every field of a dataclass that has its default, so that a new option does not make
    existing run folders refuse.
    """
    return digest_text(json.dumps(_plain(settings), sort_keys=True))


def _plain(value: Any) -> Any:
    """Values of JSON; a dataclass as its name and the fields that differ from their defaults."""
    if is_dataclass(value):
        return {"is": type(value).__name__} | {
            item.name: _plain(getattr(value, item.name))
            for item in fields(value)
            if getattr(value, item.name) != default_of(item)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def default_of(item: Any) -> Any:
    """The default of a dataclass field; MISSING, which equals nothing, if it has none.

    A field whose default depends on others says in its metadata which value earlier versions left out ("left_out").
    """
    if "left_out" in item.metadata:
        return item.metadata["left_out"]
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default


@dataclass(frozen=True)
class Inputs:
    """Digests of everything that goes into a step, by name ("settings", "labeled", "network" …).

    Attributes:
        earlier_settings: digests of the same settings as earlier formats of the run folder computed them.
    """

    digests: Mapping[str, str]
    earlier_settings: Sequence[str] = field(default=())

    def differences(self, recorded: Mapping[str, str]) -> list[str]:
        """Names of the inputs that differ from those of a record."""
        changed = [key for key in {*recorded, *self.digests} if recorded.get(key) != self.digests.get(key)]
        if "settings" in changed and recorded.get("settings") in self.earlier_settings:
            changed.remove("settings")
        return sorted(changed)
