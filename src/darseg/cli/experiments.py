"""Commands about experiments: several runs that answer one question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from darseg.cli.options import without_changes
from darseg.cli.tables import Rows, print_table, say
from darseg.errors import RunError, faults

if TYPE_CHECKING:
    from darseg.experiment.compare import Compared
    from darseg.experiment.plan import ExperimentPlan


def compare(
    experiment: Annotated[
        Path,
        typer.Argument(metavar="EXPERIMENT.yaml", help="What to compare: a recipe, variants, labels, seeds."),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OUT] [key=value …]",
            help="Folder of the experiment (default: runs/NAME_OF_FILE); the same one resumes it. And keys of the "
            "experiment to change, e.g. seeds=[0]; changes.KEY=value changes the base recipe.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time; they share the cores, or have a GPU each.")
    ] = 1,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show runs, steps, hours and disk; measures a few steps.")
    ] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Score the test images also if runs have failed.")
    ] = False,
) -> None:
    """Compare variants of a recipe with fair controls: run what is missing, and say what helps."""
    from darseg.config.experiment import load_experiment

    outs, changes = without_changes(words or [])
    if len(outs) > 1:
        raise RunError(f"Found {len(outs)} folders: {', '.join(outs)}. Give one.")
    out = Path(outs[0]) if outs else Path("runs") / experiment.stem
    file = load_experiment(experiment, changes)
    if plan:
        from darseg.experiment.plan import plan_experiment

        say("Measuring step rates; nothing is written")
        _print_plan(plan_experiment(file, out, jobs=jobs))
        return
    from darseg.experiment.compare import compare as run_compare
    from darseg.report.variants import NAME, publish_comparison

    compared = run_compare(file, out, jobs=jobs, test=test, publish=publish_comparison)
    evidence = compared.evidence
    say(f"{len(evidence.trials)} of {evidence.planned} runs are finished. Written to {out / NAME}")
    _report_failures(compared, out, test=test)


def _report_failures(compared: Compared, out: Path, *, test: bool) -> None:
    """Raise RunError if runs failed, or the scoring of test images."""
    evidence = compared.evidence
    if compared.untested and not evidence.failures:
        raise RunError(
            f"The test images of some runs are not scored; the ledger, {out / 'ledger.jsonl'}, says why. The same "
            "command tries again."
        )
    if evidence.failures:
        lines = [
            f"{failure.variant}, {failure.labels} labels, seed {failure.seed}: {failure.reason}"
            for failure in evidence.failures
        ]
        raise RunError(
            faults(f"{len(lines)} run(s) failed; what they printed is in {out / 'logs'}", lines)
            + "\nThe same command tries them again."
            + (
                " Test images are scored when all runs are finished, or with --test."
                if compared.untested and not test
                else ""
            )
        )


def _print_plan(planned: ExperimentPlan) -> None:
    columns = ("run", "labels", "runs", "finished", "steps", "of these shared", "images", "hours", "GB")
    rows: Rows = [list(columns)]
    for arm in planned.arms:
        numbers = [arm.labels, arm.runs, arm.finished, f"{arm.steps:,}", f"{arm.shared:,}", f"{arm.images:,}"]
        rows.append([arm.name, *numbers, f"{arm.seconds / 3600:.2f}", f"{arm.bytes / 1e9:.2f}"])
    print_table(rows)
    for line in planned.sharing:
        say(line)
    for name in planned.timed:
        say(f"{name}: its steps are estimated; they follow from the seconds that its variant takes")
    runs = sum(arm.runs - arm.finished for arm in planned.arms)
    say(
        f"{runs} runs to do, about {planned.hours:.1f} hours with {planned.jobs} at a time and {planned.threads} "
        f"thread(s) each, {planned.bytes / 1e9:.1f} GB of disk"
    )
    if planned.measured:
        say(f"Rates: from {planned.measured}")
