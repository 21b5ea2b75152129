"""Before a run: what is wrong with the data, and what the recipe will do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from darseg.config import Recipe
from darseg.data.manifest import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    Findings,
    Manifest,
    count_pixels,
    examine,
    find_files,
)
from darseg.data.prediction import BYTES_PER_PIXEL
from darseg.errors import DarsegError
from darseg.run.build import (
    Round,
    build_initial_network,
    check_sizes,
    evaluation_protocol,
    labeling_protocol,
    manifest_of,
    plan_rounds,
    spec_of,
)
from darseg.run.journal import Journal
from darseg.training.schedule import rate_at


def check(recipe: Recipe, console: Console | None = None) -> Findings:
    """Everything that is wrong with a recipe's data, network sizes and weights, in one go.

    Reads every image and label. Raises DataError only where the images cannot even be listed.
    """
    manifest = manifest_of(recipe)
    found = read_all(manifest, console or Console())
    faults, warnings = list(found.faults), list(found.warnings)
    orphans = labels_without_image(recipe)
    if orphans:
        warnings.append(
            f"{len(orphans)} label map(s) in {recipe.data.labels} belong to no image in {recipe.data.images}, the first "
            f"is {orphans[0]!r}: a label needs the very path of its image, but for the suffix"
        )
    try:
        network, _ = build_initial_network(recipe)
        check_sizes(recipe, network)
        plan_rounds(recipe, len(manifest.labeled), len(manifest.unlabeled), network.fill)
    except DarsegError as error:
        faults.append(str(error))
    return Findings(tuple(faults), tuple(warnings), found.images, found.pixels)


def read_all(manifest: Manifest, console: Console) -> Findings:
    """Read every image and label, with a progress bar, and collect what is wrong with them."""
    total = sum(len(samples) for samples in manifest.roles().values())
    with Journal(None, None, console).progress("check", total) as advance:
        return examine(manifest, advance)


def labels_without_image(recipe: Recipe) -> list[str]:
    """Ids of label maps in `data.labels` that no image in `data.images` has."""
    folders = Path(recipe.data.root) / recipe.data.images, Path(recipe.data.root) / recipe.data.labels
    if not all(folder.is_dir() for folder in folders):
        return []
    images, labels = find_files(folders[0], IMAGE_SUFFIXES), find_files(folders[1], LABEL_SUFFIXES)
    return [name for name in labels if name not in images]


@dataclass(frozen=True)
class Plan:
    """What a recipe will do: its rounds, the rates they begin and end at, images and temporary disk."""

    rounds: tuple[Round, ...]
    rates: tuple[tuple[float, float], ...]
    images: dict[str, int]
    parameters: int
    temporary_bytes: int
    labeling: str
    evaluation: str


def plan(recipe: Recipe) -> Plan:
    """Plan a recipe without training or reading images, but for the size of the first unlabelled one."""
    manifest = manifest_of(recipe)
    network = spec_of(recipe).build()
    check_sizes(recipe, network)
    rounds = plan_rounds(recipe, len(manifest.labeled), len(manifest.unlabeled), network.fill)
    power = recipe.training.power
    rates = tuple(
        (
            rate_at(0, one.steps, one.span, one.learning_rate, power),
            rate_at(one.steps, one.steps, one.span, one.learning_rate, power),
        )
        for one in rounds
    )
    waits = len(rounds) > 1 and not recipe.labeling.predict_twice
    return Plan(
        rounds=tuple(rounds),
        rates=rates,
        images={role: len(samples) for role, samples in manifest.roles().items()},
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        temporary_bytes=BYTES_PER_PIXEL * count_pixels(manifest.unlabeled) if waits else 0,
        labeling=f"{recipe.labeling.method}, {labeling_protocol(recipe).describe()}",
        evaluation=evaluation_protocol(recipe).describe(),
    )
