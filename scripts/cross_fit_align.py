"""Does cross-fitting decide about aligned decisions as held-out images do? Runs of folds, scored on each other.

    .venv/bin/python scripts/cross_fit_align.py runs/fold_a runs/fold_b [--compare RUN]

Each run was trained on a part of the labeled images. Its last network is scored, plain and with each of its candidates of
class weights, on the labeled images of the other runs; the decision is that of `result.align: auto` on all of them.
--compare prints what a run that was trained on all labels has decided on its validation images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darseg.config.text import load_recipe
from darseg.data.files import read_json
from darseg.model.aligned import AlignmentRecord
from darseg.pseudo.alignment import Alignment
from darseg.run.build import evaluation_protocol, load_to_predict, manifest_of
from darseg.run.directory import RunDirectory
from darseg.run.result import decide_result, score_variants
from darseg.run.steps.align import read_candidates


def last_round(run: RunDirectory) -> int:
    return max(int(path.parent.name.removeprefix("round_")) for path in run.root.glob("round_*/scores.json"))


def together(candidates: Sequence[Sequence[Alignment]], counts: Sequence[NDArray[np.int64]]) -> str:
    """The decision on all images, among the strengths and bounds that every fold has."""
    settings = [[(alignment.strength, alignment.bound) for alignment in usable] for usable in candidates]
    common = [setting for setting in settings[0] if all(setting in others for others in settings)]
    columns = [[0, *(1 + own.index(setting) for setting in common)] for own in settings]
    chosen = [candidates[0][settings[0].index(setting)] for setting in common]
    pooled = np.concatenate([count[:, column] for count, column in zip(counts, columns, strict=True)])
    return decide_result("auto", chosen, pooled, fault="folds have no candidates in common", seed=0).why


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    runs = [RunDirectory(path) for path in args.runs]
    recipes = [load_recipe(run.recipe) for run in runs]
    labeled = [manifest_of(recipe).labeled for recipe in recipes]
    counts, candidates = [], []
    for number, (run, recipe) in enumerate(zip(runs, recipes, strict=True)):
        index = last_round(run)
        usable = read_candidates(run.round(index) / "result_alignment.json").usable
        records = [AlignmentRecord.of(alignment, "unlabeled images") for alignment in usable]
        held_out = [sample for other, samples in enumerate(labeled) if other != number for sample in samples]
        scored = score_variants(
            load_to_predict(run.network(index)),
            [None, *records],
            held_out,
            classes=manifest_of(recipe).classes,
            protocol=evaluation_protocol(recipe.at(index)),
            advance=lambda *_: None,
        )
        counts.append(scored.counts)
        candidates.append(usable)
        decision = decide_result("auto", usable, scored.counts, fault=None, seed=0)
        print(f"{run.root}: {decision.why}")
        for alignment, difference in zip(usable, decision.differences, strict=True):
            print(
                f"  strength {alignment.strength:g}, bound {alignment.bound:g}: {difference.mean_iou:+.4f} "
                f"({difference.low:+.4f} to {difference.high:+.4f})"
            )
    print(f"together: {together(candidates, counts)}")
    if args.compare:
        run = RunDirectory(args.compare)
        print(f"{run.root}: {read_json(run.round(last_round(run)) / 'scores.json')['aligned']['why']}")


if __name__ == "__main__":
    main()
