"""Processes on several machines: what they must have in common, and what to say if one is gone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from darseg import __version__
from darseg.errors import RunError, faults
from darseg.run.records import is_digest
from darseg.training.processes import Processes

LOST = re.compile(r"gloo/|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|recvValue|sendBytes")
"""Words of PyTorch's errors about processes that cannot be reached: gloo's are plain RuntimeErrors."""

GONE = re.compile(r"\[[^]\s]*/gloo/[^]]*\] *")
"""Where in its source text gloo raised an error: of no use to whoever reads the message."""


def check_alike(processes: Processes, facts: Mapping[str, str]) -> None:
    """See that all processes work on the same: machines may have copies of code, recipe and data.

    Args:
        facts: what must be alike, in words → its digest in this process, or what the message shows. The version of darseg
            is added.

    Raises RunError in all processes if any fact differs; processes other than the first end quietly.
    """
    if processes.count == 1:
        return
    facts = dict(facts) | {"the version of darseg": __version__}
    seen = processes.gather([f"{name}\n{digest}" for name, digest in facts.items()])
    names = [entry.partition("\n")[0] for entry in seen]
    differing = [name for name in facts if names.count(name) != 1]
    if not differing:
        return
    processes.end_all(
        RunError(
            faults(
                "The processes of this run do not work on the same. On every machine these must be alike, so nothing was "
                "done",
                [f"{name}{_values(name, seen)}" for name in differing],
            )
            + "\nCopy them from one machine to the others, or use one folder that all share; then run the same command "
            "again."
        )
    )


def _values(name: str, seen: Sequence[str]) -> str:
    """What the processes have for that name, unless it is digests."""
    values = [value for key, _, value in (entry.partition("\n") for entry in seen) if key == name and value]
    return "" if all(map(is_digest, values)) else f" ({', '.join(values)})"


def lost_process(error: RuntimeError) -> str:
    """A message if the error says that another process is gone; otherwise nothing."""
    text = " ".join(str(error).split())
    if not (isinstance(error, dist.DistError) or LOST.search(text)) or not Processes.joined().count > 1:
        return ""
    reason = GONE.sub("", text).split(". ")[0].strip(" .")[:200]
    return (
        f"another process of this run has ended or cannot be reached ({reason}). What it printed on its machine says "
        "why. Finished steps and checkpoints are kept: run the same command again to continue, on these machines or on "
        "others."
    )
