"""Use a trained network: score it on labelled images, predict images of any folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from darseg.config import Recipe, load_recipe
from darseg.data.classes import ClassSet, distinct_colors
from darseg.data.dataset import Example, load_example
from darseg.data.images import IMAGE_SUFFIXES, read_image
from darseg.data.manifest import Sample, find_files
from darseg.data.pipeline import overlapped
from darseg.errors import DataError, RecipeError, RunError
from darseg.model.network import Network, NetworkSpec
from darseg.model.predict import Memory, Protocol, predict_classes
from darseg.model.weights import load_network, read_spec
from darseg.pseudo.labelset import write_map
from darseg.run.build import check_sizes, classes_of, evaluation_protocol, manifest_of, place
from darseg.run.directory import RunDirectory
from darseg.run.journal import Journal
from darseg.training.scores import Scores

OVERLAY_OPACITY = 0.55  # of the class colours over the image
EVALUATION_KEYS = ("data.", "evaluation.")  # of a recipe
KINDS = ("index", "color", "overlay")


@dataclass(frozen=True)
class Trained:
    """A trained network with what is known about it. `recipe` is None for a checkpoint outside a run folder."""

    network: Network
    spec: NetworkSpec
    recipe: Recipe | None
    path: Path

    def classes(self) -> ClassSet:
        names = self.spec.class_names or tuple(f"class {k}" for k in range(self.spec.classes))
        return ClassSet(names, self.spec.class_colors or distinct_colors(self.spec.classes))

    def protocol(self, image: np.ndarray) -> Protocol:
        """The recipe's evaluation protocol; without recipe the whole image in one window, and its mirror."""
        if self.recipe is not None:
            return evaluation_protocol(self.recipe)
        height, width = image.shape[:2]
        return Protocol((self.network.legal_side(height), self.network.legal_side(width)))


def load_trained(
    source: Path | str, round_index: int | None = None, overrides: Sequence[str] = ()
) -> Trained:
    """The network of a run folder (its last finished round, or `round_index`) or of a .safetensors file.

    `overrides` change the run folder's recipe. Raises RunError, WeightsError, RecipeError.
    """
    recipe, source = None, Path(source)
    path = source
    if source.is_dir():
        run = RunDirectory(source)
        path = run.last_network() if round_index is None else run.network(round_index)
        if not path.exists():
            raise RunError(f"{source}: round {round_index} is not finished ({path} does not exist).")
        recipe = load_recipe(run.recipe, overrides)
    elif not source.exists():
        raise RunError(f"{source}: no such run folder or checkpoint.")
    return Trained(place(load_network(path)), read_spec(path), recipe, path)


def check_classes(source: Path | str, trained: Trained, classes: ClassSet) -> None:
    """Raise DataError where a network and the classes of a recipe are not equally many."""
    if len(classes) != trained.network.classes:
        raise DataError(
            f"{source} has {trained.network.classes} classes, the recipe has {len(classes)}: give the recipe it "
            "was trained with."
        )


def evaluate(
    source: Path | str,
    recipe: Recipe | None = None,
    role: str = "validation",
    round_index: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> tuple[Scores, Protocol]:
    """Score a trained network on the images of one role.

    Args:
        source: run folder or .safetensors checkpoint; the latter needs `recipe`, which names data and protocol.
        role: "validation", "test", "labeled", or "unlabeled" where those images have labels.
        overrides: changes of the run folder's recipe, as in "evaluation.scales=[0.75, 1.0]"; a `recipe` takes its own
            when it is loaded.

    Raises RunError, WeightsError, RecipeError, DataError.
    """
    if recipe is not None and overrides:
        raise RunError(
            f"overrides {', '.join(overrides)}: they change a run folder's own recipe, and another one is given. Give "
            "them to load_recipe."
        )
    idle = [one for one in overrides if not one.startswith(EVALUATION_KEYS)]
    if idle:
        raise RecipeError(
            f"{', '.join(idle)}: changes nothing in an evaluation; keys that do begin with {' or '.join(EVALUATION_KEYS)}"
        )
    trained = load_trained(source, round_index, overrides)
    recipe = recipe or trained.recipe
    if recipe is None:
        raise RunError(
            f"{source} is a checkpoint outside a run folder: name the data with --recipe RECIPE.yaml."
        )
    classes = classes_of(recipe)
    check_classes(source, trained, classes)
    check_sizes(recipe, trained.network, "evaluation.window")
    samples = manifest_of(recipe).roles()[role]
    if not samples:
        raise DataError(f"The recipe has no {role} images. Set data.{role}, or choose another --role.")
    bare = [sample.id for sample in samples if sample.label is None]
    if bare:
        raise DataError(
            f"{len(bare)} {role} image(s) have no label map, the first is {bare[0]!r}: cannot be scored."
        )
    protocol = evaluation_protocol(recipe)
    with Journal(None, None, console or Console()).progress("evaluate", len(samples)) as advance:
        return evaluate_samples(trained.network, samples, classes, protocol, advance), protocol


def evaluate_samples(
    network: Network,
    samples: Sequence[Sample],
    classes: ClassSet,
    protocol: Protocol,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores of a network (in eval mode) on labelled samples."""
    scores, memory = Scores.empty(len(classes)), Memory()

    def score(_: Sample, example: Example) -> None:
        nonlocal scores
        scores = scores.plus(example.label, predict_classes(network, example.image, protocol, memory))

    overlapped(samples, lambda sample: load_example(sample, classes), score, lambda *_: None, advance)
    return scores


def predict_folder(
    source: Path | str,
    images: Path | str,
    out: Path | str,
    kinds: Sequence[str] = KINDS,
    console: Console | None = None,
) -> list[str]:
    """Predict an image, or all images below a folder, into `out/KIND/ID.png`.

    Args:
        kinds: "index" (class values), "color" (class colours), "overlay" (colours over the image).

    Returns:
        a line for each image that could not be read; the others are done.
    """
    trained, images, out = load_trained(source), Path(images), Path(out)
    found = {images.stem: images} if images.is_file() else find_files(images, IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{images}: no images found ({', '.join(IMAGE_SUFFIXES)}).")
    palette = trained.classes().palette()
    failed: list[str] = []
    with Journal(None, None, console or Console()).progress("predict", len(found)) as advance:
        for name, path in found.items():
            try:
                image = read_image(path)
            except DataError as error:
                failed.append(str(error))
                advance()
                continue
            classes = predict_classes(trained.network, image, trained.protocol(image))
            for kind in kinds:
                write_map(out / kind / f"{name}.png", _draw(kind, image, classes, palette))
            advance()
    return failed


def _draw(kind: str, image: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """What is written: uint8 [H, W] or, for OpenCV, [H, W, 3] in BGR."""
    if kind == "index":
        return classes
    colored = palette[classes]
    if kind == "overlay":
        colored = cv2.addWeighted(colored, OVERLAY_OPACITY, image, 1 - OVERLAY_OPACITY, 0)
    return cv2.cvtColor(colored, cv2.COLOR_RGB2BGR)
