"""What to change in a recipe if a GPU has too little memory."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch

from darseg.config.recipe import Recipe
from darseg.errors import MemoryLimit
from darseg.model.backbone import RESNETS
from darseg.model.predict import Protocol
from darseg.model.sides import Sides
from darseg.run.build import spec_of
from darseg.run.plan import Round


@contextlib.contextmanager
def explain_memory(remedy: str) -> Generator[None]:
    """Raise MemoryLimit, with what to change, if the GPU runs out of memory inside the block."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryLimit(
            f"The GPU has too little memory ({str(error).splitlines()[0]}). {remedy}"
        ) from error


def less_to_train(recipe: Recipe, round_: Round, processes: int) -> str:
    """The advice for training with less memory."""
    training = recipe.training
    own = round_.batch // processes
    present = min(training.micro_batch or own, own)
    half = (training.half_batch or training.batch // 2) if len(recipe.rounds) > 1 else training.batch
    shares = (training.batch // processes, half // processes)
    fits = [size for size in range(2, present // 2 + 1) if not any(share % size for share in shares)]
    remedies = [f"training.micro_batch={fits[-1]} (now {present} images at once)"] if fits else []
    if training.precision == "fp32":
        remedies.append("training.precision=bf16 (about half)")
    if not (training.recompute or training.compile) and recipe.network.backbone in RESNETS:
        remedies.append("training.recompute=true (less memory, a third more time)")
    remedies += _smaller("training.crop", training.crop, spec_of(recipe).sides)
    return f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. `darseg plan` estimates the memory of a step."


def less_to_predict(recipe: Recipe, section: str, protocol: Protocol) -> str:
    """The advice for labeling or evaluation with less memory; `section` is the recipe's section."""
    remedies = _smaller(f"{section}.window", protocol.window, spec_of(recipe).sides)
    return (
        f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. --reuse THIS_FOLDER copies the finished steps "
        "that do not depend on it."
    )


def _smaller(key: str, size: tuple[int, int], sides: Sides) -> list[str]:
    """The key with about half of each side, in sizes that the network takes; nothing if unchanged."""
    smaller = [sides.down(side // 2 + 1) for side in size]
    return [f"{key}={smaller} (now {list(size)}; about a quarter)"] if smaller != list(size) else []


def _either(remedies: Sequence[str]) -> str:
    *others, last = remedies or ["a smaller network.backbone"]
    return f"{', '.join(others)} or {last}" if others else last
