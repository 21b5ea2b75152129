"""From an experiment to its runs: variants, controls and ceiling, by number of labels and seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from darseg.config.experiment import ALL_LABELS, CONTROL, ExperimentFile
from darseg.config.recipe import Recipe
from darseg.errors import RecipeError, faults
from darseg.experiment.budgets import Budget, budgets_of, ceiling_of
from darseg.experiment.controls import (
    digest_recipe,
    digests_of_beginnings,
    images_of,
    labels_alone,
    learns_from_labels_alone,
    rounds_of,
    steps_for_images,
    steps_of,
)
from darseg.experiment.trial import Arm, Basis
from darseg.run.build import manifest_of
from darseg.run.plan import Round


@dataclass(frozen=True)
class PlannedTrial:
    """A run of an experiment.

    Attributes:
        recipe: with seed and images.
        unlabeled: the number of unlabeled images.
    """

    variant: str
    labels: int
    seed: int
    recipe: Recipe
    rounds: tuple[Round, ...]
    unlabeled: int

    @property
    def name(self) -> str:
        """Its folder below runs/."""
        return trial_name(self.variant, self.labels, self.seed)

    @property
    def steps(self) -> int:
        """Training steps of all rounds."""
        return steps_of(self.rounds)

    @property
    def images(self) -> int:
        """Images that it sees in training."""
        return images_of(self.rounds)


def trial_name(variant: str, labels: int, seed: int) -> str:
    """The name of a run, which is its folder below runs/."""
    return f"{variant}/{labels}_seed_{seed}"


@dataclass(frozen=True)
class Source:
    """The run from which another one takes its first rounds."""

    name: str
    rounds: int


@dataclass(frozen=True)
class Design:
    """All runs of an experiment that can be planned before any is finished.

    Attributes:
        trials: in the order in which they start.
        sources: name of a trial → the earlier one that shares its first rounds.
    """

    file: ExperimentFile
    arms: tuple[Arm, ...]
    trials: tuple[PlannedTrial, ...]
    sources: Mapping[str, Source]

    @property
    def seconds_controls(self) -> dict[str, str]:
        """Name of a variant → name of its control of as many seconds, if the experiment has such controls."""
        return {arm.name: name for arm in self.arms for basis, name in arm.controls if basis == "seconds"}


def design_of(file: ExperimentFile, lists: Path) -> Design:
    """The runs of an experiment.

    Args:
        lists: folder for drawn lists.

    Raises RecipeError, DataError, RunError.
    """
    budgets = budgets_of(file, lists)
    seeds = file.settings.seeds
    variants = {
        name: tuple(_trial(name, recipe, budget, seed=seeds[0]) for budget in budgets[seeds[0]])
        for name, recipe in file.recipes.items()
    }
    controls = _Controls(file, budgets[seeds[0]])
    for trials in variants.values():
        controls.add(trials)
    _check_labels(file, [budget.labels for budget in budgets[seeds[0]]])
    trials: list[PlannedTrial] = []
    arms = list(_arms(file, budgets[seeds[0]], controls))
    ceiling = ceiling_of(file, budgets[seeds[0]][0], lists) if file.settings.all_labels else None
    for seed in seeds:
        for place, budget in enumerate(budgets[seed]):
            recipes = {name: by_budget[place] for name, by_budget in controls.recipes.items()} | dict(
                file.recipes
            )
            wanted = _wanted(file, controls, labels=budget.labels, seed=seed)
            trials += [
                _trial(name, recipe, budget, seed=seed) for name, recipe in recipes.items() if name in wanted
            ]
        if ceiling is not None:
            steps = next(iter(variants.values()))[0].steps
            trials.append(_trial(ALL_LABELS, labels_alone(file.base, steps), ceiling, seed=seed))
    if ceiling is not None:
        arms.append(Arm(ALL_LABELS, ceiling.labels, "ceiling"))
    return Design(file, tuple(arms), tuple(trials), sources=_sources(trials))


def _check_labels(file: ExperimentFile, numbers: Sequence[int]) -> None:
    """Raise RecipeError if a variant has a number of labels that the experiment does not have."""
    lines = [
        f"variants.{index}.labels ({variant.name}): found {number}; the experiment has {', '.join(map(str, numbers))}"
        for index, variant in enumerate(file.settings.variants)
        for number in variant.labels or ()
        if number not in numbers
    ]
    if lines:
        raise RecipeError(faults(f"{file.path} cannot be used", lines))


def _wanted(file: ExperimentFile, controls: _Controls, *, labels: int, seed: int | None = None) -> set[str]:
    """The variants that run at a number of labels, with their controls.

    Args:
        seed: None: with any seed.
    """
    variants = {
        variant.name
        for variant in file.settings.variants
        if (variant.labels is None or labels in variant.labels)
        and (variant.seeds is None or seed is None or seed in variant.seeds)
    }
    return variants | {control for name in variants for _, control in controls.of[name]}


def _trial(name: str, recipe: Recipe, budget: Budget, *, seed: int) -> PlannedTrial:
    recipe = budget.of(recipe).model_copy(update={"seed": seed})
    labels, unlabeled = budget.labels, budget.unlabeled
    if not budget.data:  # the recipe's own images, which a variant may have changed
        manifest = manifest_of(recipe)
        if len(manifest.labeled) != labels:
            raise RecipeError(
                f"{name}: its data.unlabeled leaves {len(manifest.labeled)} labeled images, and the base recipe has "
                f"{labels}. Name the labeled images with data.labeled in the recipe."
            )
        unlabeled = len(manifest.unlabeled)
    rounds = rounds_of(recipe, labeled=labels, unlabeled=unlabeled)
    return PlannedTrial(name, labels, seed, recipe=recipe, rounds=tuple(rounds), unlabeled=unlabeled)


class _Controls:
    """Collects the controls of variants; equal ones are one.

    Attributes:
        recipes: name of a control → its recipe at each budget, without the budget's images and seed.
        of: name of a variant → what its controls have as much of, and their names.
    """

    def __init__(self, file: ExperimentFile, budgets: Sequence[Budget]) -> None:
        self.file, self.budgets = file, budgets
        self.recipes: dict[str, tuple[Recipe, ...]] = {}
        self.of: dict[str, list[tuple[Basis, str]]] = {}
        self._names: dict[tuple[str, ...], str] = {}

    def add(self, trials: Sequence[PlannedTrial]) -> None:
        """Add the controls of a variant.

        Args:
            trials: at each budget, of one seed.
        """
        wanted, variant = self.file.settings.controls, trials[0].variant
        recipe, of = self.file.recipes[variant], self.of.setdefault(variant, [])
        alone = learns_from_labels_alone(recipe)
        # What a variant of labels alone changes is what is compared; the others differ in their use of unlabeled images.
        compared = self.file.base if alone else recipe
        steps: dict[Basis, tuple[int, ...]] = {}
        if wanted.steps:
            steps["steps"] = tuple(trial.steps for trial in trials)
        if wanted.images:
            steps["images"] = tuple(steps_for_images(compared, trial.images) for trial in trials)
        for basis, numbers in steps.items():
            recipes = tuple(labels_alone(compared, number) for number in numbers)
            if alone and recipes == tuple(labels_alone(recipe, number) for number in numbers):
                continue  # the variant is such a control itself
            of.append((basis, self._name(variant, basis, numbers, recipes=recipes)))
        if wanted.seconds and not alone:
            of.append(("seconds", f"{CONTROL}seconds_of_{variant}"))

    def _name(self, variant: str, basis: Basis, steps: Sequence[int], *, recipes: tuple[Recipe, ...]) -> str:
        """The name of a control; what is added to an experiment later does not give it to another recipe."""
        key = tuple(map(digest_recipe, recipes))
        if key not in self._names:
            same = len({*steps}) == 1
            name = f"{CONTROL}{steps[0]}_steps" if same else f"{CONTROL}{basis}_of_{variant}"
            if same and recipes[0] != labels_alone(self.file.base, steps[0]):
                name = f"{name}_of_{variant}"
            self._names[key], self.recipes[name] = name, recipes
        return self._names[key]


def _arms(file: ExperimentFile, budgets: Sequence[Budget], controls: _Controls) -> Iterator[Arm]:
    changes = {variant.name: variant.changes for variant in file.settings.variants}
    for budget in budgets:
        wanted = _wanted(file, controls, labels=budget.labels)
        for name in filter(wanted.__contains__, controls.recipes):
            yield Arm(name, budget.labels, "control")
        for name in filter(wanted.__contains__, file.recipes):
            of = controls.of[name]
            yield Arm(name, budget.labels, controls=tuple(of), changes=changes[name])
            for basis, control in of:
                if basis == "seconds":
                    yield Arm(control, budget.labels, "control")


def with_steps(trial: PlannedTrial, name: str, steps: int) -> PlannedTrial:
    """A control of `steps` steps of a variant's run, on the same images."""
    recipe = labels_alone(trial.recipe, steps)
    rounds = rounds_of(recipe, labeled=trial.labels, unlabeled=trial.unlabeled)
    return replace(trial, variant=name, recipe=recipe, rounds=tuple(rounds))


def _sources(trials: Sequence[PlannedTrial]) -> dict[str, Source]:
    """For each trial the earlier one that shares most of its first rounds."""
    owners: dict[str, str] = {}  # digest of beginning rounds → the first trial that has them
    sources: dict[str, Source] = {}
    for trial in trials:
        digests = digests_of_beginnings(trial.recipe)
        shared = [count for count, digest in enumerate(digests, 1) if digest in owners]
        if shared:
            sources[trial.name] = Source(owners[digests[shared[-1] - 1]], shared[-1])
        for digest in digests:
            owners.setdefault(digest, trial.name)
    return sources
