"""Commands that pseudo-label: with a trained network, or from predictions of any framework."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from darseg.choices import Trainer
from darseg.cli.options import DataRoot, Plain, RoundIndex, Source
from darseg.cli.tables import print_labels, say
from darseg.errors import RecipeError, faults
from darseg.pseudo.labeling import AlignSettings, Confidence, LabelingMethod, Sampling

METHOD = "How thresholds are chosen."
THRESHOLD = "Confidence threshold (method: global)."
CONFIDENCE = "Scale that confidences are counted on."
SAMPLING = "Drop the surplus of ties at random, or keep it."
SEED = "Seed of the random sampling."
ALIGN = "First give the decisions the class shares of the labeled pixels."
BOUND = "Largest class weight and reciprocal of the smallest, with --align."
STRENGTH = "Power of the class weights, from 0 to 1, with --align."
TWICE = "Predict again instead of keeping predictions on the disk while labeling."

DataFileFor = Annotated[
    Trainer | None,
    typer.Option("--for", help="Also write the data file with which this trainer reads the labels."),
]


def label(
    source: Source,
    images: Annotated[Path, typer.Argument(help="A folder of images to pseudo-label.")],
    out: Annotated[Path, typer.Argument(help="Folder for ID.png and redistribution.json.")],
    overrides: DataRoot = None,
    recipe: Annotated[
        Path | None, typer.Option(help="For a checkpoint: the recipe it was trained with.")
    ] = None,
    class_counts: Annotated[
        Path | None,
        typer.Option(help="JSON or YAML: labeled pixels per class. Default: counted in the labeled masks."),
    ] = None,
    round_index: RoundIndex = None,
    labeling_ratio: Annotated[
        float | None, typer.Option(help="Share of all pixels to label. Default: the last round's.")
    ] = None,
    method: Annotated[LabelingMethod | None, typer.Option(help=f"{METHOD} Default: the recipe's.")] = None,
    threshold: Annotated[float | None, typer.Option(help=THRESHOLD)] = None,
    confidence: Annotated[
        Confidence | None, typer.Option(help=f"{CONFIDENCE} Default: the recipe's.")
    ] = None,
    sampling: Annotated[Sampling | None, typer.Option(help=f"{SAMPLING} Default: the recipe's.")] = None,
    align: Annotated[
        bool | None, typer.Option("--align/--no-align", help=f"{ALIGN} Default: the recipe's.")
    ] = None,
    bound: Annotated[float | None, typer.Option(help=f"{BOUND} Default: the recipe's.")] = None,
    strength: Annotated[float | None, typer.Option(help=f"{STRENGTH} Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help=f"{SEED} Default: the recipe's.")] = None,
    predict_twice: Annotated[bool, typer.Option("--predict-twice", help=TWICE)] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of CPU threads. Default: the recipe's.")
    ] = None,
    plain: Plain = False,
    trainer: DataFileFor = None,
) -> None:
    """Pseudo-label a folder of images with a trained network; torchrun shares the work among processes."""
    from darseg.run.label import describe_labeling, label_folder

    record = label_folder(
        source,
        images,
        out,
        recipe=recipe,
        class_counts=class_counts,
        round_index=round_index,
        labeling_ratio=labeling_ratio,
        method=method,
        threshold=threshold,
        confidence=confidence,
        sampling=sampling,
        align=_align_settings(align, bound, strength),
        seed=seed,
        predict_twice=predict_twice,
        threads=threads,
        plain=plain,
        overrides=overrides or [],
        trainer=trainer,
    )
    print_labels(record, out, describe_labeling(record, source, round_index, plain=plain))
    _say_data_file(trainer, out)


def _say_data_file(trainer: Trainer | None, out: Path) -> None:
    """Print where a trainer's data file is; only the first process prints."""
    from darseg.run.trainers import FILES

    if trainer is not None and os.environ.get("RANK", "0") == "0":
        say(f"Data file: {out / FILES[trainer]}. Add your validation images to it; its first lines say how.")


def suggest(
    run: Annotated[Path, typer.Argument(help="A run folder whose round 0, at least, is finished.")],
    out: Annotated[
        Path, typer.Argument(help="New folder for suggested.txt, suggestions.html, and pre-labels.")
    ],
    overrides: DataRoot = None,
    count: Annotated[int, typer.Option(min=1, help="Number of images to suggest.")] = 24,
    pool: Annotated[
        int | None,
        typer.Option(min=1, help="Most unlabeled images to look at, chosen by a seed. Default: all."),
    ] = None,
    round_index: RoundIndex = None,
    plain: Plain = False,
) -> None:
    """Suggest which unlabeled images of a run to label next, with reasons and pre-labels to correct."""
    from darseg.report.suggestions import NAME
    from darseg.report.suggestions import suggest as suggest_images
    from darseg.run.suggest import LIST

    done = suggest_images(
        run, out, count=count, round_index=round_index, pool=pool, plain=plain, overrides=overrides or []
    )
    for place, image in enumerate(done.images, 1):
        say(f"{place}. {image.id}: {image.reasons[0]}")
    say(done.decisions)
    for note in done.notes:
        say(f"note: {note}")
    if done.failed:
        say("warning: " + faults("these files could not be read and were left out", done.failed))
    say(
        f"{len(done.images)} images of {done.looked_at:,} that were looked at: {out / LIST}. Page: {out / NAME}"
    )


def redistribute(
    predictions: Annotated[
        Path, typer.Argument(help="ID.npy or ID.npz: logits [K, H, W]; subfolders allowed.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for ID.png and redistribution.json.")],
    class_counts: Annotated[
        Path, typer.Option(help="JSON or YAML: labeled pixels per class, a list or name → count.")
    ],
    labeling_ratio: Annotated[
        float | None,
        typer.Option(help="Share of all pixels to label, 0 < ratio <= 1 (not with method global)."),
    ] = None,
    method: Annotated[LabelingMethod, typer.Option(help=METHOD)] = "dars",
    threshold: Annotated[float | None, typer.Option(help=THRESHOLD)] = None,
    confidence: Annotated[Confidence, typer.Option(help=CONFIDENCE)] = "float16",
    sampling: Annotated[Sampling, typer.Option(help=SAMPLING)] = "random",
    align: Annotated[bool, typer.Option("--align", help=ALIGN)] = False,
    bound: Annotated[float | None, typer.Option(help=f"{BOUND} Default: 5.")] = None,
    strength: Annotated[float | None, typer.Option(help=f"{STRENGTH} Default: 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help=SEED)] = 0,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The files hold probabilities, after the softmax.")
    ] = False,
    predict_twice: Annotated[bool, typer.Option("--predict-twice", help=TWICE)] = False,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…", help="The channels' classes. Default: in the order of the class counts."
        ),
    ] = None,
) -> None:
    """Label images from predictions of any framework, without the bias toward majority classes."""
    from darseg.run.redistribute import redistribute_folder

    record = redistribute_folder(
        predictions,
        out,
        class_counts,
        labeling_ratio=labeling_ratio,
        method=method,
        threshold=threshold,
        confidence=confidence,
        sampling=sampling,
        align=_align_settings(align, bound, strength) or False,
        seed=seed,
        probabilities=probabilities,
        predict_twice=predict_twice,
        names=classes.split(",") if classes else None,
    )
    print_labels(record, out)


def _align_settings(
    align: bool | None, bound: float | None, strength: float | None
) -> bool | AlignSettings | None:
    """What `label_folder` takes as `align`."""
    given = [f"--{name}" for name, value in (("bound", bound), ("strength", strength)) if value is not None]
    if given and not align:
        raise RecipeError(f"{' and '.join(given)} only matter with --align. Add --align, or omit them.")
    return AlignSettings(bound, strength) if align else align
