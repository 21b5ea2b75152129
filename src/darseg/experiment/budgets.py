"""Label budgets: which images are labeled in a run, as list files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from darseg.config.data import DataConfig, SourceConfig
from darseg.config.experiment import ExperimentFile, LabelsConfig
from darseg.config.recipe import Recipe
from darseg.data.manifest import Manifest
from darseg.data.splits import draw
from darseg.errors import RecipeError, faults
from darseg.run.build import manifest_of
from darseg.run.split import pool_of, write_new

LISTS = "lists"


@dataclass(frozen=True)
class Budget:
    """The images that runs of one number of labels and one seed learn from.

    Attributes:
        labels, unlabeled: numbers of labeled and unlabeled images.
        data: changes of the recipe's section data; empty: as the recipe has it.
    """

    labels: int
    unlabeled: int
    data: dict[str, SourceConfig | None]

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these images."""
        if not self.data:
            return recipe
        data: DataConfig = recipe.data.model_copy(update=self.data)
        return recipe.model_copy(update={"data": data})


def budgets_of(file: ExperimentFile, folder: Path) -> dict[int, list[Budget]]:
    """Seed → the budgets of an experiment; drawn lists are written below a folder.

    Raises RecipeError for numbers that cannot be drawn, and for two budgets with equally many labels; DataError.
    """
    settings, base = file.settings, manifest_of(file.base)
    if not settings.labels:
        own = Budget(len(base.labeled), len(base.unlabeled), {})
        return {seed: [own] for seed in settings.seeds}
    _check_counts(file, base)
    listed = {index: _listed(file, labels) for index, labels in enumerate(settings.labels) if labels.labeled}
    budgets = {
        seed: [
            listed[index]
            if index in listed
            else _drawn(file.base, base, labels.count or 0, seed=seed, folder=folder)
            for index, labels in enumerate(settings.labels)
        ]
        for seed in settings.seeds
    }
    numbers = [budget.labels for budget in next(iter(budgets.values()))]
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise RecipeError(
            f"{file.path}: labels: two entries have {repeated[0]} labeled images, and runs are named by that number. "
            "Compare them in two experiments."
        )
    return budgets


def _check_counts(file: ExperimentFile, base: Manifest) -> None:
    lines = [
        f"labels.{index}: found {labels.count}; the recipe has {len(base.labeled)} labeled images to draw from"
        for index, labels in enumerate(file.settings.labels)
        if labels.count is not None and labels.count > len(base.labeled)
    ]
    if lines:
        raise RecipeError(faults(f"{file.path} cannot be used", lines))


def _listed(file: ExperimentFile, labels: LabelsConfig) -> Budget:
    """The budget of two list files, which lie below data.root, or next to the experiment's file."""
    data = {role: _source(file, getattr(labels, role)) for role in ("labeled", "unlabeled")}
    manifest = manifest_of(Budget(0, 0, data).of(file.base))
    return Budget(len(manifest.labeled), len(manifest.unlabeled), data)


def _source(file: ExperimentFile, name: str | None) -> SourceConfig | None:
    if name is None:
        return None
    here = file.path.resolve().parent / name
    usual = Path(file.base.data.root) / name
    return SourceConfig(list=str(here) if here.is_file() and not usual.is_file() else name)


def _drawn(recipe: Recipe, base: Manifest, count: int, *, seed: int, folder: Path) -> Budget:
    """A budget of `count` labeled images, drawn by the seed; the others are unlabeled.

    Smaller draws of a seed are parts of larger ones.
    """
    if count == len(base.labeled):
        return Budget(count, len(base.unlabeled), {})
    pool = pool_of(recipe, base.labeled)
    chosen = set(draw([image.id for image in pool], count, seed))
    rest = [image for image in pool if image.id not in chosen]
    lines = {
        "labeled": [image.line for image in pool if image.id in chosen],
        "unlabeled": [image.line for image in (*rest, *pool_of(recipe, base.unlabeled))],
    }
    return Budget(count, len(lines["unlabeled"]), _written(folder / f"{count}_seed_{seed}", lines))


def ceiling_of(file: ExperimentFile, budget: Budget, folder: Path) -> Budget:
    """The budget in which every image with a label map is labeled.

    Raises RecipeError if there are no more labels.
    """
    manifest = manifest_of(budget.of(file.base))
    known = [sample for sample in manifest.unlabeled if sample.label is not None]
    if not known:
        raise RecipeError(
            f"{file.path}: all_labels: no unlabeled image has a label map, so there are no more labels to train on. Set "
            "it to false."
        )
    labeled = pool_of(file.base, (*manifest.labeled, *known))
    rest = pool_of(file.base, [sample for sample in manifest.unlabeled if sample.label is None])
    lines = {"labeled": [image.line for image in labeled], "unlabeled": [image.line for image in rest]}
    return Budget(len(labeled), len(rest), _written(folder / "all_labels", lines))


def _written(
    folder: Path, lines: dict[str, Sequence[str]] | dict[str, list[str]]
) -> dict[str, SourceConfig | None]:
    """The sources of two lists, which are written; an empty one has none."""
    texts = {
        f"{role}.txt": "".join(f"{line}\n" for line in entries) for role, entries in lines.items() if entries
    }
    write_new(folder, texts)
    return {role: SourceConfig(list=str(path)) if path else None for role, path in _paths(folder, lines)}


def _paths(
    folder: Path, lines: dict[str, list[str]] | dict[str, Sequence[str]]
) -> Iterator[tuple[str, Path | None]]:
    for role, entries in lines.items():
        yield role, (folder / f"{role}.txt").resolve() if entries else None
