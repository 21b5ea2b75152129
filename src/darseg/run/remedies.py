"""What to change in a recipe if memory is not enough."""

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
    """If a GPU's memory is not enough, raise MemoryLimit with what to change."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryLimit(
            f"The GPU's memory is not enough ({str(error).splitlines()[0]}). {remedy}"
        ) from error


def less_to_train(recipe: Recipe, round_: Round, processes: int) -> str:
    """How a round of training takes less memory."""
    training = recipe.training
    own = round_.batch // processes
    now = min(training.micro_batch or own, own)
    half = (training.half_batch or training.batch // 2) if len(recipe.rounds) > 1 else training.batch
    shares = (training.batch // processes, half // processes)
    fits = [size for size in range(2, now // 2 + 1) if not any(share % size for share in shares)]
    remedies = [f"training.micro_batch={fits[-1]} (now {now} images at once)"] if fits else []
    if training.precision == "fp32":
        remedies.append("training.precision=bf16 (about half)")
    if not (training.recompute or training.compile) and recipe.network.backbone in RESNETS:
        remedies.append("training.recompute=true (less, for a third more time)")
    remedies += _smaller("training.crop", training.crop, spec_of(recipe).sides)
    return f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}. `darseg plan` counts what a step keeps."


def less_to_predict(recipe: Recipe, section: str, protocol: Protocol) -> str:
    """How labeling or evaluation takes less memory; `section` is that of the recipe."""
    remedies = _smaller(f"{section}.window", protocol.window, spec_of(recipe).sides)
    return (
        f"Start a new run (--out NEW_FOLDER) with {_either(remedies)}; --reuse THIS_FOLDER copies what does not "
        "depend on it."
    )


def _smaller(key: str, size: tuple[int, int], sides: Sides) -> list[str]:
    """The key with the size nearest to half of each side that a network takes; nothing if that is the present one."""
    smaller = [sides.down(side // 2 + 1) for side in size]
    return [f"{key}={smaller} (now {list(size)}; about a quarter)"] if smaller != list(size) else []


def _either(remedies: Sequence[str]) -> str:
    *others, last = remedies or ["a smaller network.backbone"]
    return f"{', '.join(others)} or {last}" if others else last
