"""The command line: commands → functions. Prints and exits, decides nothing.

torch, OpenCV and pydantic are imported inside the commands, so that `darseg --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from darseg import __version__
from darseg.errors import DarsegError, Interrupted
from darseg.pseudo.labeling import Confidence, Method, Sampling

app = typer.Typer(
    name="darseg",
    help="A good segmentation network from a few labeled images and many unlabeled ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Role(str, Enum):
    validation = "validation"
    test = "test"
    labeled = "labeled"
    unlabeled = "unlabeled"


class Format(str, Enum):
    coco = "coco"
    panoptic = "panoptic"
    labelme = "labelme"
    cityscapes = "cityscapes"
    cvat = "cvat"


class Other(str, Enum):
    fault = "fault"
    ignore = "ignore"


INTERRUPTED = 130  # exit code of what Ctrl-C ended: 128 + SIGINT

TWICE = "Predict again instead of keeping predictions on the disk while labeling."


class Released(str, Enum):
    pspnet50 = "pspnet50"
    deeplabv2_101 = "deeplabv2_101"


class ClassNames(str, Enum):
    cityscapes = "cityscapes"
    voc = "voc"
    camvid = "camvid"


class Kind(str, Enum):
    index = "index"
    color = "color"
    overlay = "overlay"
    confidence = "confidence"


class Existing(str, Enum):
    fault = "fault"
    keep = "keep"
    replace = "replace"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to do, with which data.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value …]", help="Change keys of the recipe, e.g. training.batch=8."),
]
Source = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or a .safetensors file.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"darseg {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the drawn data, both runs and the picture go.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the training; the data are always the same.")] = 0,
) -> None:
    """Draw a long-tailed data set, train on it with and without DARS, and compare class by class."""
    from darseg.demo.demo import demo as run_demo
    from darseg.report.overview import write_report

    run_demo(out, seed, after_round=write_report)


@app.command()
def init(
    folder: Annotated[
        Path, typer.Argument(help="Images, some of them with labels, in any usual arrangement.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="RECIPE.yaml", help="Default: NAME_OF_FOLDER.yaml, here.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Pretrained weights. Default: resnet*.pth in FOLDER or here, else none."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier recipe and its lists.")] = False,
) -> None:
    """Look at a folder of images and write a commented recipe for it that fits this machine."""
    from darseg.config.text import load_recipe
    from darseg.init.propose import propose_recipe

    made = propose_recipe(folder, out, weights=weights, overwrite=force)
    for note in made.notes:
        print(f"found: {note}")
    for warning in made.warnings:
        print(f"warning: {warning}")
    print(f"Written: {', '.join(map(str, (made.recipe, *made.lists)))}. Read it, then:")
    name, run = shlex.quote(str(made.recipe)), shlex.quote(str(Path("runs") / made.recipe.stem))
    commands = [f"check {name}", f"plan {name}", f"train {name}", f"report {run}"]
    if len(load_recipe(made.recipe).rounds) > 1:  # else there will be no pseudo labels to look through
        commands.append(f"view {run}")
    for command in commands:
        print(f"  darseg {command}")


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME_OF_RECIPE.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(help="Another run folder; steps it did with the same inputs are copied.")
    ] = None,
) -> None:
    """Run all rounds of a recipe, or go on where it was stopped: label, train, evaluate, round by round."""
    from darseg.config.text import load_recipe
    from darseg.report.overview import write_report
    from darseg.run.rounds import train as run_train

    folder = out or Path("runs") / recipe.stem
    summary = run_train(load_recipe(recipe, overrides or []), folder, reuse, after_round=write_report)
    _print_table(_rounds_table(summary))
    print(f"Written to {folder}")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN… [OUT.html]", help="Run folders; several are compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the page goes; default: report.html in the run folder, comparison.html here."
        ),
    ] = None,
) -> None:
    """Write a page about a run, finished or at work, or one that compares runs; it needs no network."""
    from darseg.report.comparison import NAME, compare_runs
    from darseg.report.overview import write_report

    if (
        out is None
        and len(runs) > 1
        and runs[-1].suffix.lower() in (".html", ".htm")
        and not runs[-1].is_dir()
    ):
        *runs, out = runs
    if len(runs) == 1:
        print(f"Written to {write_report(runs[0], out)}")
        return
    compared = compare_runs(runs, out or Path(NAME))
    _print_table([list(row) for row in compared.rows])
    for warning in compared.warnings:
        print(f"warning: {warning}")
    print(f"Written to {compared.out}")


@app.command()
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
    role: Annotated[Role, typer.Option(help="Which images.")] = Role.validation,
    round_index: Annotated[
        int | None, typer.Option("--round", min=0, help="Default: the last finished.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Score a trained network on labeled images, by the recipe's protocol or a changed one."""
    from darseg.config.text import load_recipe
    from darseg.run.build import classes_of
    from darseg.run.directory import RunDirectory, write_json
    from darseg.run.evaluate import evaluate as run_evaluate

    changes = overrides or []
    given = load_recipe(recipe, changes) if recipe else None
    scores, protocol = run_evaluate(source, given, role.value, round_index, [] if given else changes)
    names = classes_of(given or load_recipe(RunDirectory(source).recipe, changes)).names
    described: dict[str, Any] = scores.to_json(names) | {"protocol": protocol.describe(), "role": role.value}
    rows = [["class", "IoU", "precision", "recall"]]
    rows += [[name, *(described[key][name] for key in ("iou", "precision", "recall"))] for name in names]
    _print_table(rows)
    print(f"Protocol: {protocol.describe()}")
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        print(f"{key.replace('_', ' ')}: {_cell(described[key])}")
    if out:
        write_json(out, described)


@app.command()
def predict(
    source: Source,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES",
            help='Images, videos, folders, or quoted patterns such as "photos/**/*.jpg".',
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Gets index/, color/, overlay/ and confidence/.")
    ],
    kind: Annotated[list[Kind] | None, typer.Option(help="Only these; may be repeated.")] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", min=0, help="Default: the last finished.")
    ] = None,
    existing: Annotated[
        Existing, typer.Option(help="Files that are there: a fault, or keep what is whole, or replace them.")
    ] = Existing.fault,
) -> None:
    """Predict images and videos: class values, class colors, colors over the image, and confidences."""
    from darseg.errors import DataError, faults
    from darseg.run.predict import KINDS, predict_folder

    kinds = [one.value for one in kind] if kind else KINDS
    done = predict_folder(source, images, out, kinds, round_index, existing.value)
    told = [f"{done.images} image(s)"] if done.images or not done.videos else []
    told += [f"{done.frames} frame(s) of {done.videos} video(s)"] if done.videos else []
    told += [f"{done.kept} that were done before"] if done.kept else []
    print(f"{', '.join(told)}: {', '.join(str(out / one) for one in kinds)}")
    if done.failed:
        raise DataError(
            faults(
                f"{len(done.failed)} file(s) could not be read, or not to the end; all others are done",
                done.failed,
            )
        )


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="A run folder with pseudo labels.")],
    round_index: Annotated[
        int | None,
        typer.Option("--round", min=1, help="Whose pseudo labels. Default: the last that has some."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="0: any free one. Default: 8765, or the next free one."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Also open it in the browser.")] = False,
) -> None:
    """Look through the unlabeled images of a run in the browser, and mark bad ones. Nothing leaves this machine."""
    from darseg.view.viewer import view as run_view

    run_view(run, round_index, port, open_browser, lambda line: print(line, flush=True))


@app.command()
def export(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT.onnx|OUT.pt2", help="ONNX, or torch.export. Must not exist yet.")
    ],
    round_index: Annotated[
        int | None, typer.Option("--round", min=0, help="Default: the last finished.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Real images to check the file with. Default: the run's validation images."),
    ] = None,
) -> None:
    """Write a trained network for programs without darseg, and check that the file gives the same classes."""
    from darseg.run.export import export_network

    print("Writing it, then comparing it on real images: half a minute or more.", file=sys.stderr)
    for line in export_network(source, out, round_index, images).describe():
        print(line)
    print(f"Written to {out}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Of the release or of semseg; nothing in it is run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Must not exist yet.")],
    architecture: Annotated[Released, typer.Option(help="The network it is of.")],
    classes: Annotated[
        int | None, typer.Option(min=2, help="How many; default: as many as the file has.")
    ] = None,
    release_classifier: Annotated[
        bool,
        typer.Option(
            "--release-classifier", help="DeepLabv2 sums 2 of 4 branches, as published checkpoints need."
        ),
    ] = False,
    names: Annotated[ClassNames | None, typer.Option(help="Keep these class names and colors.")] = None,
    strict: Annotated[bool, typer.Option(help="--no-strict: take what fits, the rest is random.")] = True,
) -> None:
    """Turn a checkpoint of the original release into a network of darseg, for evaluate, predict and label."""
    from darseg.data.classes import class_set
    from darseg.model.weights import convert as run_convert

    known = class_set(names.value) if names else None
    report = run_convert(checkpoint, out, architecture.value, classes, release_classifier, known, strict)
    print(f"{len(report.loaded)} tensors of {checkpoint} are in {out}")
    if architecture is Released.deeplabv2_101 and not release_classifier:
        print(
            "note: all four branches of the classifier are summed; the release's own checkpoints were trained with two,"
        )
        print("and give its scores with --release-classifier alone")
    for title, lines in (
        ("not filled, drawn at random", report.unfilled),
        ("in the file, without a place here", report.unused),
        ("counts of batches the file lacks, left at 0", report.uncounted),
    ):
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))


@app.command()
def label(
    source: Source,
    images: Annotated[Path, typer.Argument(help="A folder of images to pseudo-label.")],
    out: Annotated[Path, typer.Argument(help="Gets ID.png and redistribution.json.")],
    recipe: Annotated[
        Path | None, typer.Option(help="For a checkpoint: the recipe it was trained with.")
    ] = None,
    class_counts: Annotated[
        Path | None,
        typer.Option(help="JSON: labeled pixels per class. Default: counted in the labeled masks."),
    ] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", min=0, help="Default: the last finished.")
    ] = None,
    labeling_ratio: Annotated[float | None, typer.Option(help="Default: of the last round.")] = None,
    method: Annotated[Method | None, typer.Option(help="Default: the recipe's.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of method global.")] = None,
    confidence: Annotated[Confidence | None, typer.Option(help="Default: the recipe's.")] = None,
    sampling: Annotated[Sampling | None, typer.Option(help="Default: the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.")] = None,
    predict_twice: Annotated[bool, typer.Option("--predict-twice", help=TWICE)] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Pseudo-label a folder of images with a trained network. Also under torchrun, on many processes."""
    from darseg.config.text import load_recipe
    from darseg.run.label import label_folder

    described = label_folder(
        source,
        images,
        out,
        recipe=load_recipe(recipe) if recipe else None,
        class_counts=class_counts,
        round_index=round_index,
        labeling_ratio=labeling_ratio,
        method=method,
        threshold=threshold,
        confidence=confidence,
        sampling=sampling,
        seed=seed,
        predict_twice=predict_twice,
        threads=threads,
    )
    _print_labels(described, out)


@app.command()
def redistribute(
    predictions: Annotated[
        Path, typer.Argument(help="ID.npy or ID.npz: logits [K, H, W]; subfolders allowed.")
    ],
    out: Annotated[Path, typer.Argument(help="Gets ID.png and redistribution.json.")],
    class_counts: Annotated[
        Path, typer.Option(help="JSON: labeled pixels per class, a list or name → count.")
    ],
    labeling_ratio: Annotated[
        float | None, typer.Option(help="Share of all pixels to label, 0 < ratio <= 1 (not with global).")
    ] = None,
    method: Annotated[Method, typer.Option(help="How thresholds are chosen.")] = "dars",
    threshold: Annotated[float | None, typer.Option(help="Confidence, for method global only.")] = None,
    confidence: Annotated[Confidence, typer.Option(help="Scale of confidences.")] = "float16",
    sampling: Annotated[Sampling, typer.Option(help="Drop the surplus of ties, or keep it.")] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Of the random sampling.")] = 0,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The files hold probabilities, softmaxed already.")
    ] = False,
    predict_twice: Annotated[bool, typer.Option("--predict-twice", help=TWICE)] = False,
) -> None:
    """Label images from predictions of any framework, without the bias toward majority classes."""
    from darseg.run.label import redistribute_folder

    described = redistribute_folder(
        predictions,
        out,
        class_counts,
        labeling_ratio,
        method=method,
        threshold=threshold,
        confidence=confidence,
        sampling=sampling,
        seed=seed,
        probabilities=probabilities,
        predict_twice=predict_twice,
    )
    _print_labels(described, out)


@app.command()
def rasterize(
    annotations: Annotated[
        Path, typer.Argument(help="A COCO or CVAT file, or a folder of labelme's or Cityscapes' JSON files.")
    ],
    out: Annotated[Path, typer.Argument(help="Gets ID.png and classes.yaml.")],
    kind: Annotated[
        Format | None, typer.Option("--format", help="Default: recognized by what is in the file.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="a,b,c in this order, or cityscapes, voc, camvid. Default: all categories."),
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="The class of pixels nobody annotated. Default: not labeled.")
    ] = None,
    other: Annotated[
        Other, typer.Option(help="Categories that are not among the classes: a fault, or not labeled.")
    ] = Other.fault,
    panoptic_folder: Annotated[
        Path | None, typer.Option(help="PNGs of COCO panoptic. Default: beside the file, without .json.")
    ] = None,
) -> None:
    """Make label maps of annotation files: COCO, COCO panoptic, labelme, Cityscapes, CVAT."""
    from darseg.annotate.rasterize import rasterize_folder
    from darseg.errors import DataError, faults

    made = rasterize_folder(
        annotations,
        out,
        format=kind and kind.value,
        classes=classes,
        background=background,
        ignore_other=other is Other.ignore,
        panoptic_folder=panoptic_folder,
    )
    rows: list[list[Any]] = [["class", "pixels", "share of labeled pixels"]]
    rows += [[name, int(made.pixels[k]), _share(made.pixels, k)] for k, name in enumerate(made.classes)]
    rows.append(["(not labeled, of all pixels)", int(made.pixels[-1]), _ignored(made.pixels)])
    _print_table(rows)
    for shape, count in made.skipped.items():
        print(f"passed over, no area: {count} {shape}")
    print(f"{made.images} label maps in {out}; in the recipe:\n{made.recipe()}")
    if made.faults:
        raise DataError(faults(f"{len(made.faults)} fault(s), all other images are done", made.faults))


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find every fault of a recipe's data in one go, and show the class shares."""
    from darseg.config.text import load_recipe
    from darseg.errors import DataError, faults
    from darseg.run.build import classes_of
    from darseg.run.check import check as run_check

    loaded = load_recipe(recipe, overrides or [])
    found = run_check(loaded)
    roles = [role for role, count in found.images.items() if count and found.pixels[role].sum()]
    rows: list[list[Any]] = [["share of labeled pixels", *roles]]
    for k, name in enumerate(classes_of(loaded).names):
        rows.append([name, *(_share(found.pixels[role], k) for role in roles)])
    rows.append(["(ignored, of all pixels)", *(_ignored(found.pixels[role]) for role in roles)])
    _print_table(rows)
    print("images: " + ", ".join(f"{count} {role}" for role, count in found.images.items()))
    for note in found.notes:
        print(f"note: {note}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    if found.faults:
        raise DataError(faults(f"{len(found.faults)} fault(s)", found.faults))
    print("No faults.")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="As many as torchrun will start.")] = 1,
) -> None:
    """Show what a recipe will do: rounds, steps, learning rates, images, temporary disk."""
    from darseg.config.text import load_recipe
    from darseg.run.check import plan as run_plan

    made = run_plan(load_recipe(recipe, overrides or []), processes)
    rows: list[list[Any]] = [
        [
            "round",
            "ratio",
            "epochs",
            "of steps",
            "steps",
            "images a step",
            "scale",
            "span",
            "rate at start",
            "at end",
        ]
    ]
    for one, (begin, end) in zip(made.rounds, made.rates, strict=True):
        batch = f"{one.batch} + {one.pseudo_batch}" if one.pseudo_batch else str(one.batch)
        low, high = one.augmentation.scale
        rows.append(
            [
                str(one.index),
                "-" if one.labeling_ratio is None else f"{one.labeling_ratio:g}",
                "-" if one.epochs is None else str(one.epochs),
                str(one.epoch_steps),
                str(one.steps),
                batch,
                f"{low:g} – {high:g}",
                f"{one.span[0]:.4g} – {one.span[1]:.4g}",
                f"{begin:.6g}",
                f"{end:.6g}",
            ]
        )
    _print_table(rows)
    print("images: " + ", ".join(f"{count} {role}" for role, count in made.images.items()))
    print(f"network: {made.network}, {made.parameters / 1e6:.1f} million parameters")
    print(f"labeling: {made.labeling}")
    print(f"evaluation: {made.evaluation}")
    print(f"temporary disk while labeling: at most {made.temporary_bytes / 1e6:.0f} MB")
    print(
        f"memory of a process while training, fp32: {made.state_bytes / 1e9:.2f} GB weights, gradients and momentum, "
        f"{made.activation_bytes / 1e9:.2f} GB kept for the backward pass; convolutions' workspace comes on top"
    )
    for note in made.notes:
        print(f"note: {note}")


@app.command()
def split(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(help="Gets labeled.txt, unlabeled.txt and split.json.")],
    overrides: Overrides = None,
    fraction: Annotated[
        str | None, typer.Option(metavar="1/8|0.125", help="Share of the images to be labeled.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Or their number.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another draw.")] = 0,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="See to it that rare classes appear; needs all labels.")
    ] = False,
    sequences: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Images in whose ids this (its first group) finds the same stay together."
        ),
    ] = None,
) -> None:
    """Draw which of a recipe's images are labeled, and write both lists."""
    from darseg.config.text import load_recipe
    from darseg.run.split import draw_split

    described = draw_split(
        load_recipe(recipe, overrides or []),
        out,
        fraction=fraction,
        count=count,
        seed=seed,
        balanced=balanced,
        sequences=sequences,
    )
    _print_split(described)
    print(f"Written to {out}. In the recipe, or behind its name on the command line:")
    for role in described["lists"]:
        print(f"  {shlex.quote(f'data.{role}={(out / role).resolve()}.txt')}")


def _print_split(described: dict) -> None:
    lists = described["lists"]
    known = {role: one for role, one in lists.items() if one["pixels"]}
    if known:
        columns = [column for role in known for column in (f"{role}: images", "share of pixels")]
        rows: list[list[Any]] = [["class", *columns]]
        for name in next(iter(known.values()))["pixels"]:
            cells: list[Any] = [name]
            for one in known.values():
                share = one["pixels"][name] / max(1, sum(one["pixels"].values()))
                cells += [one["images_with_class"][name], f"{share:.4%}"]
            rows.append(cells)
        _print_table(rows)
    print("images: " + ", ".join(f"{one['images']} {role}" for role, one in lists.items()))
    if described["sequences"]:
        print("sequences: " + ", ".join(f"{len(one['sequences'])} {role}" for role, one in lists.items()))
    labeled = lists["labeled"]
    if labeled["images"] != described["count"]:
        print(
            f"warning: {described['count']} labeled images were wanted; whole sequences make {labeled['images']}"
        )
    if labeled["without_label"]:
        print(
            f"warning: {labeled['without_label']} images of labeled.txt have no label map yet; annotate them first"
        )
    if described["absent"]:
        print(f"warning: absent from labeled.txt: {', '.join(described['absent'])}")


def _rounds_table(summary: dict) -> list[list[Any]]:
    rounds = summary["rounds"]
    rows: list[list[Any]] = [["validation", *(f"round {one['round']}" for one in rounds)]]
    rows += [[name, *(one["iou"][name] for one in rounds)] for name in summary["classes"]]
    for key in ("mean_iou", "mean_accuracy", "pixel_accuracy"):
        rows.append([key.replace("_", " "), *(one[key] for one in rounds)])
    rows.append(["seconds", *(f"{one['seconds']:.0f}" for one in rounds)])
    return rows


def _print_labels(described: dict, out: Path) -> None:
    """The choice class by class; under torchrun by the first process alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    names = described["classes"] or [f"class {k}" for k in range(len(described["kept"]))]
    columns = ("threshold", "keep", "wanted", "predicted", "accepted", "kept")
    rows: list[list[Any]] = [["class", *columns]]
    for k, name in enumerate(names):
        values = [described[column][k] for column in columns]
        rows.append([name, "-" if values[0] is None else values[0], *values[1:]])
    _print_table(rows)
    share = sum(described["kept"]) / max(1, sum(described["predicted"]))
    print(f"{described['images']} images, {share:.2%} of their pixels labeled, in {out}")


def _share(pixels: Any, k: int) -> str:
    return f"{pixels[k] / max(1, pixels[:-1].sum()):.4%}"


def _ignored(pixels: Any) -> str:
    return f"{pixels[-1] / max(1, pixels.sum()):.4%}"


def _cell(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _print_table(rows: list[list[Any]]) -> None:
    """Columns aligned, the first to the left; plain text, so that it can be piped and pasted."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print(
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            )
        )


def main() -> None:
    """Entry point: a DarsegError becomes a message and exit code 2, Ctrl-C exit code 130."""
    try:
        app()
    except Interrupted as error:
        print(f"darseg: {error} The same command goes on where it was.", file=sys.stderr)
        sys.exit(error.code)
    except DarsegError as error:
        print(f"darseg: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer ends by itself, without a word
            print("darseg: interrupted. What was finished is kept.", file=sys.stderr)
        raise
