"""What to change in a recipe if the GPU or the machine has too little memory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Sequence

import torch

from darseg.config.recipe import Recipe
from darseg.errors import MemoryLimit
from darseg.model.backbone import RESNETS
from darseg.model.sides import Sides
from darseg.model.vit import is_transformer
from darseg.model.windows import Protocol, windows_at_once
from darseg.run.build import evaluation_protocol, labeling_protocol, pick_device, spec_of
from darseg.run.plan import Round

_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|[Oo]ut of memory"
)
"""How PyTorch says that the CPU has no memory left: a plain RuntimeError."""

_NO_GPU_MEMORY = re.compile(r"CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY")
"""How CUDA and its libraries say that the GPU has none left, outside PyTorch's own allocations: a RuntimeError too."""


@contextlib.contextmanager
def explain_memory(remedy: str) -> Generator[None]:
    """Raise MemoryLimit, with what to change, if memory runs out inside the block, on the GPU or the CPU."""
    try:
        yield
    except Exception as error:
        if (reason := memory_reason(error)) is None:
            raise
        raise MemoryLimit(f"{reason}. {remedy}") from error


def memory_reason(error: BaseException) -> str | None:
    """What has too little memory, as a sentence; None if the error is another one."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_GPU_MEMORY.search(str(error))
    ):
        return f"The GPU has too little memory ({text})"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        wanted = re.search(r"tried to allocate (\d+) bytes", str(error))
        asked = f"{int(wanted[1]) / 1e9:,.1f} GB were asked for at once" if wanted else text or "MemoryError"
        return f"This machine has too little memory ({asked})"
    return None


def less_to_train(recipe: Recipe, round_: Round, processes: int) -> str:
    """The advice for training with less memory."""
    training = recipe.training
    own = round_.batch // processes
    present = min(training.micro_batch or own, own)
    half = (training.half_batch or training.batch // 2) if recipe.halves else training.batch
    shares = (training.batch // processes, half // processes)
    fits = [size for size in range(2, present // 2 + 1) if not any(share % size for share in shares)]
    remedies = [f"training.micro_batch={fits[-1]} (now {present} images at once)"] if fits else []
    if training.precision == "fp32":
        remedies.append("training.precision=bf16 (about half)")
    if not (training.recompute or training.compile) and _recomputes(recipe):
        remedies.append("training.recompute=true (less memory, a third more time)")
    remedies += _smaller("training.crop", training.crop, spec_of(recipe).sides)
    return f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. `darseg plan` estimates the memory of a step."


def less_to_predict(
    recipe: Recipe,
    section: str,
    protocol: Protocol,
    *,
    begun: bool = True,
    window: tuple[str, Sides] | None = None,
) -> str:
    """The advice for labeling or evaluation with less memory.

    Args:
        section: the recipe's section.
        begun: the run has a folder, with steps that can be copied.
        window: key of the window, and the sides of the network, if it is not the section's and the recipe's network.
    """
    key, sides = window or (f"{section}.window", spec_of(recipe).sides)
    smaller = [scale for scale in protocol.scales if scale <= 1] or [1.0]
    remedies = [f"{section}.scales={smaller}"] if max(protocol.scales) > 1 else []
    remedies += _fewer_windows(section, protocol)
    remedies += _smaller_windows(recipe, key, protocol, sides=sides)
    if not begun:
        return f"Change the recipe: {_either(remedies)}."
    return (
        f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. --reuse THIS_FOLDER copies the finished steps "
        "that do not depend on it."
    )


def less_at_once(recipe: Recipe | None, section: str = "evaluation") -> str:
    """The advice for a command that predicts outside a run's steps.

    Args:
        recipe: of the network; None: whole images are predicted.
        section: the recipe's section that says how.
    """
    if recipe is None:
        return (
            "Without a recipe, whole images are predicted in one window: give --recipe RECIPE.yaml with a smaller "
            f"{section}.window, or close other programs that use it."
        )
    protocol = labeling_protocol(recipe) if section == "labeling" else evaluation_protocol(recipe)
    smaller = _smaller_windows(recipe, f"{section}.window", protocol, sides=spec_of(recipe).sides)
    if pick_device().type == "cuda":  # a CPU predicts a small image by a single window in any case
        smaller = _fewer_windows(section, protocol) + smaller
    if not smaller:
        return "Close other programs that use it."
    return (
        "Close other programs that use it. Or copy the run's recipe.yaml, set there "
        f"{smaller[0]}, and give the network's file and --recipe COPY.yaml."
    )


ALONE = (
    "The network alone does not fit. Close other programs that use it, or choose a smaller network.backbone."
)
"""The advice if not even the weights have room."""


def _recomputes(recipe: Recipe) -> bool:
    """Whether training.recompute works on the backbone and saves memory."""
    name = recipe.network.backbone
    return recipe.network.freeze == "none" and (name in RESNETS or is_transformer(name))


def _fewer_windows(section: str, protocol: Protocol) -> list[str]:
    """Half as many windows in one forward pass; nothing if one goes alone, or their size is not known."""
    if isinstance(protocol.window, str):
        return []
    present = windows_at_once(protocol, pick_device(), protocol.window)
    return [f"{section}.windows_at_once={present // 2} (now {present})"] if present > 1 else []


def _smaller_windows(recipe: Recipe, key: str, protocol: Protocol, *, sides: Sides) -> list[str]:
    """The window at a key, smaller; nothing if it cannot be."""
    if protocol.window == "whole":
        return [f"{key}={[sides.up(side) for side in recipe.training.crop]} (now whole images)"]
    return _smaller(key, protocol.window, sides)


def _smaller(key: str, size: tuple[int, int], sides: Sides) -> list[str]:
    """The key with about half of each side, in sizes that the network takes; nothing if unchanged."""
    smaller = [sides.down(side // 2 + 1) for side in size]
    return [f"{key}={smaller} (now {list(size)}; about a quarter)"] if smaller != list(size) else []


def _either(remedies: Sequence[str]) -> str:
    *others, last = remedies or ["a smaller network.backbone"]
    return f"{', '.join(others)} or {last}" if others else last
