"""Commands for trained networks: evaluate, predict, export, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from darseg.choices import BuiltInClasses, Existing, PredictionKind, ReleasedNetwork, Role
from darseg.cli.options import MOVED, DataRoot, Plain, RoundIndex, Source, TrainedWith, without_root
from darseg.cli.tables import print_adapted, print_table, say, text_of

BOUND = "Largest class weight and reciprocal of the smallest."
DOUBTS = "Write the network even if the weights are doubtful."


def evaluate(
    source: Source,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value …]",
            help='Change the protocol or the data, e.g. "evaluation.scales=[0.75, 1.0]" data.root=PATH.',
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="For a checkpoint: the recipe with its data.")] = None,
    role: Annotated[Role, typer.Option(help="The images to score on.")] = "validation",
    round_index: RoundIndex = None,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
    plain: Plain = False,
) -> None:
    """Score a trained network on labeled images, by the recipe's protocol or a changed one."""
    from darseg.config.text import load_recipe
    from darseg.run.build import classes_of
    from darseg.run.directory import RunDirectory, write_json
    from darseg.run.evaluate import describe_decisions, evaluate_result
    from darseg.run.outputs import check_scores_file

    if out:
        check_scores_file(out)
    changes = overrides or []
    loaded = load_recipe(recipe, changes) if recipe else None
    done = evaluate_result(
        source, loaded, role=role, round_index=round_index, overrides=[] if loaded else changes, plain=plain
    )
    names = classes_of(loaded or load_recipe(RunDirectory(source).recipe, changes)).names
    record: dict[str, Any] = done.to_json(names) | {"protocol": done.protocol.describe(), "role": role}
    columns = [(record, key) for key in ("iou", "precision", "recall")]
    titles, second_kind = ["class", "IoU", "precision", "recall"], None
    for kind in ("plain", "aligned"):
        if kind in record:
            second_kind = kind
            columns += [(record[kind], key) for key in ("iou", "precision", "recall")]
            titles += [f"{kind} IoU", "precision", "recall"]
    print_table([titles, *([name, *(scores[key][name] for scores, key in columns)] for name in names)])
    say(f"Protocol: {done.protocol.describe()}")
    say(describe_decisions(source, round_index, plain))
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        beside = f" ({second_kind}: {text_of(record[second_kind][key])})" if second_kind else ""
        say(f"{key.replace('_', ' ')}: {text_of(record[key])}{beside}")
    if done.aligned is not None:
        say("The plain decisions are the result; the aligned ones were found and not used.")
    if out:
        write_json(out, record)


def predict(
    source: Source,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES",
            help=f'Images, videos, folders, or quoted patterns such as "photos/**/*.jpg". {MOVED}',
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for index/, color/, overlay/ and confidence/.")
    ],
    kind: Annotated[
        list[str] | None,  # Typer (as of 0.29) cannot read a list of a Literal
        typer.Option(
            metavar="|".join(get_args(PredictionKind)), help="Write only this kind; may be repeated."
        ),
    ] = None,
    round_index: RoundIndex = None,
    existing: Annotated[
        Existing,
        typer.Option(help="If files exist: report a fault, keep those that are whole, or replace them."),
    ] = "fault",
    recipe: Annotated[
        Path | None, typer.Option(help="For a checkpoint: the recipe with its evaluation protocol.")
    ] = None,
    plain: Plain = False,
) -> None:
    """Predict images and videos: class values, class colors, colors over the image, and confidences."""
    from darseg.errors import DataError, faults
    from darseg.run.evaluate import describe_decisions
    from darseg.run.predict import KINDS, predict_folder

    (*images, out), overrides = without_root([*images, out])
    kinds = cast("list[PredictionKind]", kind) if kind else KINDS  # predict_folder checks them
    done = predict_folder(
        source,
        images,
        out,
        kinds=kinds,
        round_index=round_index,
        existing=existing,
        recipe=recipe,
        plain=plain,
        overrides=overrides,
    )
    say(describe_decisions(source, round_index, plain))
    counts = [f"{done.images} image(s)"] if done.images or not done.videos else []
    counts += [f"{done.frames} frame(s) of {done.videos} video(s)"] if done.videos else []
    counts += [f"{done.kept} that were done before"] if done.kept else []
    say(f"{', '.join(counts)}: {', '.join(str(out / name) for name in kinds)}")
    for note in done.notes:
        say(note)
    if done.failed:
        raise DataError(
            faults(
                f"{len(done.failed)} file(s) could not be read completely; all others are done",
                done.failed,
            )
        )


def align(
    source: Source,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES",
            help='Unlabeled images or videos of the place, folders, or quoted patterns such as "b/**/*.jpg". '
            + MOVED,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .safetensors file to write. Default: NAME_aligned.safetensors next to the source."
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="JSON or YAML: class name → share, or → pixels. Default: the labeled masks' shares."
        ),
    ] = None,
    shift: Annotated[
        bool, typer.Option("--shift", help="Estimate the class shares of these images from the predictions.")
    ] = False,
    recipe: TrainedWith = None,
    round_index: RoundIndex = None,
    bound: Annotated[
        float | None, typer.Option(help=f"{BOUND} Default: 5; 20 with --prior or --shift.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Power of the class weights, from 0 to 1.")] = 1.0,
    limit: Annotated[int, typer.Option("--images", min=1, help="Most images and frames to predict.")] = 500,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    despite_doubts: Annotated[bool, typer.Option("--despite-doubts", help=DOUBTS)] = False,
) -> None:
    """Fit a trained network to another place's class mix, from unlabeled images and without training."""
    from darseg.run.adapt import align_network

    images, overrides = without_root(images)
    adapted = align_network(
        source,
        images,
        out,
        prior=prior,
        shift=shift,
        recipe=recipe,
        round_index=round_index,
        bound=bound,
        strength=strength,
        limit=limit,
        overwrite=force,
        despite_doubts=despite_doubts,
        overrides=overrides,
    )
    print_adapted(adapted)
    if recipe or source.is_dir():
        say(f"Predict with the same protocol: --recipe {recipe or source / 'recipe.yaml'}")


def export(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT.onnx|OUT.pt2", help="ONNX or torch.export file; must not exist.")
    ],
    round_index: RoundIndex = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Images to check the file with. Default: the run's validation images."),
    ] = None,
    plain: Plain = False,
    overrides: DataRoot = None,
) -> None:
    """Export a trained network for programs without darseg, and check that it gives the same classes."""
    from darseg.run.evaluate import describe_decisions
    from darseg.run.export import export_network

    say("Writing the file, then checking it on real images: half a minute or more.", error=True)
    parity = export_network(
        source, out, round_index=round_index, images=images, plain=plain, overrides=overrides or []
    )
    for line in parity.describe():
        say(line)
    say(describe_decisions(source, round_index, plain))
    say(f"Written to {out}")


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of DARS, semseg or UniMatch; nothing in it is run.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.safetensors", help="The network to write; must not exist.")
    ],
    architecture: Annotated[ReleasedNetwork, typer.Option(help="The network of the checkpoint.")],
    classes: Annotated[
        int | None, typer.Option(min=2, help="Number of classes. Default: as many as the file has.")
    ] = None,
    release_classifier: Annotated[
        bool,
        typer.Option(
            "--release-classifier", help="Sum 2 of DeepLabv2's 4 branches, as published checkpoints need."
        ),
    ] = False,
    names: Annotated[
        BuiltInClasses | None, typer.Option(help="Store the names and colors of these classes.")
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="With --no-strict, take what fits and draw the rest at random.")
    ] = True,
) -> None:
    """Convert a checkpoint of DARS's or UniMatch's release for evaluate, predict and label."""
    from darseg.data.classes import class_set
    from darseg.model.convert import convert as run_convert

    report = run_convert(
        checkpoint,
        out,
        architecture,
        classes=classes,
        release_classifier=release_classifier,
        class_set=class_set(names) if names else None,
        strict=strict,
    )
    part = f" ({report.part})" if report.part.startswith("model") else ""
    say(f"{len(report.loaded)} tensors of {checkpoint}{part} are in {out}")
    if architecture == "deeplabv2_101" and not release_classifier:
        say(
            "note: the classifier sums all four branches. The release trained its own checkpoints with two, so they"
        )
        say("reach its scores only with --release-classifier")
    for title, lines in (
        ("missing in the file, drawn at random", report.unfilled),
        ("in the file, but not in the network", report.unused),
        ("batch counts missing in the file, set to 0", report.uncounted),
    ):
        if lines:
            say(f"{title}:")
            say("\n".join(f"  {line}" for line in lines))
