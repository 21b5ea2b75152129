"""Score the networks of run folders plain and aligned, on validation and test images; print tables.

    .venv/bin/python scripts/aligned_scores.py score scores runs/neu/half_48_seed_0/*
    .venv/bin/python scripts/aligned_scores.py table scores half_48 --seeds 0 1              # validation, to choose by
    .venv/bin/python scripts/aligned_scores.py table scores half_48 --seeds 0 1 --role test  # once
    .venv/bin/python scripts/aligned_scores.py score scores runs/camvid/seed_0/dars runs/camvid/seed_0/control

`score` takes every round that is trained and not scored yet, and writes SCORES/GROUP/RUN.round_N.json, where GROUP is the
folder that the run lies in. Class weights are found on at most 500 unlabeled images of the run, with the shares of its
labeled masks as target. Aligned predictions are those of p·w, renormalized; with one window for an image and no mirror,
as for NEU-Seg, that is what the network with the weights in its classifier predicts.

The column "result" is what the product gives: the network that the run decided to use (strength, bound, plain or
aligned, on validation images), with the weights in its classifier, scored by `darseg evaluate`. "decided" has the
weights that the run decided about, also if it does not use them. Both are absent for runs without such a decision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import darseg
from darseg.data.dataset import Example, load_example
from darseg.data.images import read_image
from darseg.data.manifest import Sample
from darseg.data.pipeline import overlapped
from darseg.model.aligned import unfold_alignment
from darseg.model.predict import predict_scores
from darseg.model.windows import Memory
from darseg.pseudo.distribution import count_labels
from darseg.pseudo.pixel_sample import PixelSample
from darseg.run.build import masks
from darseg.run.directory import write_json
from darseg.run.evaluate import Trained, evaluate_result, load_trained
from darseg.run.machine import keep_memory
from darseg.run.media import Medium
from darseg.run.shots import choose_shots
from darseg.training.scores import number

IMAGES = 500
BINS = 15  # of confidences, as in Guo et al. 2017
SEED = 0
ROLES = ("validation", "test")
KINDS = ("plain", "aligned")
PRODUCT = ("decided", "result")  # by the run itself

# Column → (run, rounds of which the last one that is scored is shown).
COLUMNS = {
    "labels alone": ("dars", [0]),
    "control": ("control", [0]),
    "dars 1": ("dars", [1]),
    "dars 2": ("dars", [2]),
    "aligned labels 1": ("aligned", [1]),
    "aligned labels 2": ("aligned", [2]),
    "larger ratios": ("dars_large", [2]),
    "aligned, larger ratios": ("aligned_large", [2]),
    "long round 0, aligned": ("long", [1]),
    "control, then aligned": ("continued", [1]),
    "control, then dars": ("continued_plain", [1]),
    "control with teacher": ("control_teacher", [0]),
    "fixmatch": ("fixmatch", [1]),
    "fixmatch, 0.7": ("fixmatch_70", [1]),
    "mean teacher": ("mean_teacher", [1]),
    "all labels": ("all", [0]),
}


class Reliability:
    """How often predictions of a confidence are right: pixels, summed confidence and right ones in equal bins."""

    def __init__(self) -> None:
        self.pixels, self.confidence, self.right = (np.zeros(BINS) for _ in range(3))

    def add(self, confidence: NDArray[np.floating], right: NDArray[np.bool_]) -> None:
        """Add pixels: their confidences from 0 to 1, and whether their classes are right."""
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        self.pixels += np.bincount(bins, minlength=BINS)
        self.confidence += np.bincount(bins, weights=confidence, minlength=BINS)
        self.right += np.bincount(bins, weights=right, minlength=BINS)

    @property
    def error(self) -> float:
        """The expected calibration error: |confidence - accuracy| of the bins, averaged by pixels."""
        return float(np.abs(self.confidence - self.right).sum() / max(1, self.pixels.sum()))

    def to_json(self) -> dict[str, Any]:
        whole = np.maximum(self.pixels, 1)
        columns = {"confidence": self.confidence / whole, "accuracy": self.right / whole}
        return {
            "expected_calibration_error": self.error,
            "pixels": self.pixels.tolist(),
            **{name: values.tolist() for name, values in columns.items()},
        }


def score_runs(out: Path, folders: Sequence[Path], unlabeled_of: Sequence[Path]) -> None:
    """Score all trained rounds of run folders that are not scored yet."""
    for folder in folders:
        run = darseg.RunDirectory(folder)
        for index in reversed(list(run.rounds_with("train"))):  # the last tells most, if time runs out
            path = out / folder.parent.name / f"{folder.name}.round_{index}.json"
            if not path.exists():
                write_json(path, score(folder, index, unlabeled_of))
                print(f"{path} written", flush=True)


def score(folder: Path, index: int, others: Sequence[Path]) -> dict[str, Any]:
    """Scores of one network, plain and aligned."""
    trained = load_trained(folder, index)
    unfold_alignment(trained.network)
    assert trained.recipe is not None
    manifest = darseg.manifest_of(trained.recipe)
    counts = count_labels(masks(manifest.labeled), len(manifest.classes))
    unlabeled = list(manifest.unlabeled) or _unlabeled_of(others)
    alignment = darseg.align(_sample(trained, unlabeled), counts / counts.sum())
    record: dict[str, Any] = {
        "classes": list(manifest.classes.names),
        "labeled_shares": (counts / counts.sum()).tolist(),
        "alignment": alignment.to_json(),
    }
    for role in ROLES:
        if samples := manifest.roles()[role]:
            record[role] = _score_role(trained, samples, alignment.weights) | _product(folder, index, role)
    return record


def _product(folder: Path, index: int, role: Any) -> dict[str, Any]:
    """Scores of what the run decided: the result, and the aligned network whether it is that or not."""
    done = evaluate_result(folder, role=role, round_index=index, console=Console(quiet=True))
    names = darseg.manifest_of(darseg.load_recipe(darseg.RunDirectory(folder).recipe)).classes.names
    by_kind = {"result": done.scores} if done.plain or done.aligned else {}
    if by_kind:
        by_kind["decided"] = done.aligned or done.scores
    scored = {kind: scores.to_json(names) for kind, scores in by_kind.items()}
    return scored | ({"used": "plain" if done.plain is None else "aligned"} if by_kind else {})


def _unlabeled_of(folders: Sequence[Path]) -> list[Sample]:
    """For a run with all labels: the unlabeled images of the first of the runs that has some."""
    for folder in folders:
        samples = darseg.manifest_of(darseg.load_recipe(darseg.RunDirectory(folder).recipe)).unlabeled
        if samples:
            return list(samples)
    raise SystemExit("None of the run folders has unlabeled images. Score dars in the same call.")


def _sample(trained: Trained, samples: Sequence[Sample]) -> NDArray[np.float16]:
    media = [Medium.of(sample.id, sample.image) for sample in samples]
    chosen = [shot.medium for shot in choose_shots(media, IMAGES, SEED).chosen]
    pixels = PixelSample(trained.network.classes, SEED)
    predicted = _predictions(trained, chosen, lambda medium: read_image(medium.path), lambda image: image)
    for medium, _, scores in predicted:
        pixels.add(medium.name, scores, probabilities=True)
    return pixels.rows(pixels.sizes())


def _score_role(trained: Trained, samples: Sequence[Sample], weights: NDArray[np.float64]) -> dict[str, Any]:
    classes = trained.classes()
    scores = {kind: darseg.Scores.empty(len(classes)) for kind in KINDS}
    reliability = {kind: Reliability() for kind in KINDS}

    def load(sample: Sample) -> Example:
        return load_example(sample, classes)

    for _, example, plain in _predictions(trained, samples, load, lambda example: example.image):
        weighted = plain * weights.astype(np.float32)[:, None, None]
        weighted /= weighted.sum(axis=0)
        for kind, probabilities in (("plain", plain), ("aligned", weighted)):
            decided = probabilities.argmax(axis=0).astype(np.uint8)
            scores[kind] = scores[kind].plus(example.label, decided)
            seen = example.label != 255
            confidence = probabilities.max(axis=0)[seen]
            reliability[kind].add(confidence, (decided == example.label)[seen])
    result = {}
    for kind in KINDS:
        confusion = scores[kind].confusion
        result[kind] = {
            **scores[kind].to_json(classes.names),
            "predicted_shares": _shares(confusion.sum(axis=0), classes.names),
            "reliability": reliability[kind].to_json(),
        }
    result["true_shares"] = _shares(scores["plain"].confusion.sum(axis=1), classes.names)
    return result


def _shares(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, float | None]:
    return {name: number(share) for name, share in zip(names, counts / max(1, counts.sum()), strict=True)}


def _predictions(
    trained: Trained, items: Sequence[Any], read: Callable[[Any], Any], image_of: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any, NDArray[np.float32]]]:
    """Each item, what was read of it, and its probabilities, float32 [K, H, W]."""
    memory = Memory()
    for start in range(0, len(items), 16):
        predicted: list[tuple[Any, Any, NDArray[np.float32]]] = []

        def work(item: Any, content: Any, predicted: list = predicted) -> None:
            image = image_of(content)
            protocol = trained.protocol(image)
            sums = predict_scores(trained.network, image, protocol, average="probabilities", memory=memory)
            predicted.append((item, content, sums.mean(0, image.shape[0]).cpu().numpy()))

        overlapped(items[start : start + 16], read=read, work=work, write=lambda *_: None)
        yield from predicted


def table(out: Path, group: str, seeds: Sequence[int], role: str) -> str:
    """Mean IoU, each class, and calibration of every column, plain and aligned, as Markdown."""
    columns: dict[str, dict[int, dict[str, Any]]] = {}
    for title, (run, rounds) in COLUMNS.items():
        by_seed = {}
        for seed in seeds:
            suffix = f"{'_'.join(group.split('_')[:-1])}_all_seed_{seed}" if run == "all" else ""
            folder = out / (suffix or f"{group}_seed_{seed}")
            paths = [folder / f"{run}.round_{index}.json" for index in rounds]
            if run == "dars" and rounds == [0] and not paths[0].exists():
                paths = [folder / "aligned.round_0.json"]
            if paths[-1].exists():
                by_seed[seed] = json.loads(paths[-1].read_text())
        if by_seed:
            columns[title] = by_seed
    if not columns:
        return f"There are no scores of {group} in {out}."
    names = next(iter(next(iter(columns.values())).values()))["classes"]
    lines = [f"### {group}, {role}, seeds {', '.join(map(str, seeds))}", ""]
    lines += _rows(columns, role, seeds, names)
    for title, by_seed in columns.items():
        lines += ["", *_class_rows(title, list(by_seed.values()), role)]
    return "\n".join(lines)


def _rows(columns: dict, role: str, seeds: Sequence[int], names: Sequence[str]) -> list[str]:
    kinds = [*KINDS, *(kind for kind in PRODUCT if any(kind in record[role] for record in _all(columns)))]
    heads = [f"{title} {kind}" for title in columns for kind in kinds]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]

    def line(title: str, figure: Callable[[dict], float | None], seed: int | None = None) -> str:
        cells = []
        for by_seed in columns.values():
            scored = [record for key, record in by_seed.items() if seed is None or key == seed]
            for kind in kinds:
                values = [figure(record[role][kind]) for record in scored if kind in record[role]]
                defined = [value for value in values if value is not None]
                cells.append(f"{mean(defined):.3f}" if defined else "–")
        return f"| {title} | " + " | ".join(cells) + " |"

    lines.append(line("**mean IoU**", lambda scored: scored["mean_iou"]))
    if len(seeds) > 1:
        lines += [line(f"– seed {seed}", lambda scored: scored["mean_iou"], seed) for seed in seeds]
    lines += [line(name, lambda scored, name=name: scored["iou"][name]) for name in names]
    lines.append(
        line(
            "calibration error",
            lambda scored: scored.get("reliability", {}).get("expected_calibration_error"),
        )
    )
    return lines


def _all(columns: dict) -> Iterator[dict]:
    """The records of all columns and seeds."""
    for by_seed in columns.values():
        yield from by_seed.values()


def _class_rows(title: str, records: Sequence[dict], role: str) -> list[str]:
    """Precision, recall and shares of the classes of one column, and the class weights."""
    heads = [f"{figure} {kind}" for figure in ("precision", "recall", "share") for kind in KINDS]
    lines = [f"| {title} | weight | true share | " + " | ".join(heads) + " |", "|---|" + "---|" * 8]
    for k, name in enumerate(records[0]["classes"]):
        figures = [[record["alignment"]["weights"][k] for record in records]]
        figures.append([record[role]["true_shares"][name] for record in records])
        for key in ("precision", "recall", "predicted_shares"):
            figures += [[record[role][kind][key][name] for record in records] for kind in KINDS]
        cells = []
        for values in figures:
            defined = [value for value in values if value is not None]
            cells.append(f"{mean(defined):.3f}" if defined else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("out", type=Path)
    scoring.add_argument("runs", type=Path, nargs="+")
    scoring.add_argument(
        "--unlabeled-of", type=Path, help="a run whose unlabeled images serve runs without any"
    )
    printing = commands.add_parser("table")
    printing.add_argument("out", type=Path)
    printing.add_argument("group", help="regime and number of labels, as in half_48")
    printing.add_argument("--seeds", type=int, nargs="+", default=[0])
    printing.add_argument("--role", choices=ROLES, default="validation")
    args = parser.parse_args()
    if args.command == "score":
        keep_memory()
        score_runs(args.out, args.runs, [args.unlabeled_of] if args.unlabeled_of else args.runs)
    else:
        print(table(args.out, args.group, args.seeds, args.role))


if __name__ == "__main__":
    main()
