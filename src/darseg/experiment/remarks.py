"""What a comparison says in words: the answer first, then what a reader must know to trust it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from darseg.experiment.statistics import (
    FEW_SHOWING,
    LEVEL,
    MOST_SEEDS,
    POINT,
    WIDE,
    Comparison,
    Difference,
    Estimate,
    Summary,
)

FEW_IMAGES = 10
"""Below, a bootstrap over images says little: the same number as for a run's result."""

BASES = {"steps": "as many steps", "images": "as many images seen", "seconds": "as many seconds"}


def interval_text(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def answer(comparison: Comparison) -> tuple[str, ...]:
    """A paragraph per number of labels: which variants differ from their control, by validation."""
    if not any(row.seeds for row in comparison.variants):
        return ("No run of a variant has ended yet.",)
    if "validation" not in comparison.images:
        return (
            "No validation images were scored, so nothing is chosen here. Test scores are for reporting.",
        )
    return tuple(_answer(comparison, labels) for labels in comparison.labels)


def _answer(comparison: Comparison, labels: int) -> str:
    rows = [row for row in comparison.variants if row.arm.labels == labels]
    known = [(row, difference) for row in rows if (difference := row.difference()) is not None]
    place = f"With {labels} labels"
    if not known:
        return f"{place}, no variant has a difference to a control yet."
    known.sort(key=lambda pair: -pair[1].mean_iou.mean)
    better = [pair for pair in known if pair[1].told_apart and pair[1].mean_iou.mean > 0]
    worse = [pair for pair in known if pair[1].told_apart and pair[1].mean_iou.mean < 0]
    row, difference = known[0]
    if better:
        sentences = [
            f"{place}, {row.arm.name} is better than its control, {_control(difference)}: {_both(row)}."
        ]
        better = better[1:]
    elif worse:
        sentences = [f"{place}, no variant is better than its control."]
    else:
        sentences = [f"{place}, no variant is told apart from its control.", _largest(known)]
    for adjective, pairs in (("Also better", better), ("Worse", worse)):
        if pairs:
            listed = ", ".join(f"{row.arm.name} {interval_text(it.mean_iou)}" for row, it in pairs)
            sentences.append(f"{adjective}: {listed}.")
    undecided = len(known) - sum(difference.told_apart for _, difference in known)
    if undecided and undecided < len(known):
        sentences.append(f"Not told apart: {undecided} of {len(known)} variants.")
    if undecided:
        sentences.append(_needed(known))
    return " ".join(filter(None, sentences))


def _control(difference: Difference) -> str:
    return f"{difference.control} ({BASES[difference.basis]})"


def _both(row: Summary) -> str:
    """The difference on validation images, with aligned decisions, and on test images."""
    parts = []
    difference = row.difference()
    if difference is not None:
        parts.append(f"mean IoU {interval_text(difference.mean_iou)} on validation images")
    if (aligned := row.difference(decisions="aligned")) is not None:
        parts.append(f"{interval_text(aligned.mean_iou)} with aligned decisions of both")
    if (tested := row.difference("test")) is not None:
        parts.append(f"{interval_text(tested.mean_iou)} on test images")
    return ", ".join(parts)


def _largest(known: Sequence[tuple[Summary, Difference]]) -> str:
    row, _ = max(known, key=lambda pair: abs(pair[1].mean_iou.mean))
    return f"The largest difference is that of {row.arm.name}: {_both(row)}."


def _needed(known: Sequence[tuple[Summary, Difference]]) -> str:
    """What would tell a difference of one point: seeds, and whether there are enough images for it."""
    differences = [difference for _, difference in known if not difference.told_apart]
    if not any(difference.includes_training for difference in differences):
        return "Each has one seed, and other seeds may differ by more: run two at least, better five."
    text = (
        f"To tell a difference of {POINT:g} on these images, {most_seeds(differences)} seeds would be needed"
    )
    margin = max(
        max(it.mean_iou.image_high - it.mean_iou.mean, it.mean_iou.mean - it.mean_iou.image_low)
        for it in differences
    )
    if margin > POINT:
        return (
            f"{text}; other images would move it by {margin:.3f}, which only more validation images narrow."
        )
    return f"{text}."


def most_seeds(differences: Iterable[Difference]) -> str:
    """The largest number of seeds that one of these differences needs; empty if none has several seeds."""
    counts = [difference.seeds_for_one_point for difference in differences if difference.includes_training]
    sure = [count for count in counts if count is not None]
    if len(sure) < len(counts):
        return f"more than {MOST_SEEDS}"
    return f"about {max(sure)}" if sure else ""


def missing_reason(comparison: Comparison, row: Summary) -> str:
    """Why a variant has no difference on validation images to its first control; empty if it has."""
    if row.arm.kind != "variant" or row.difference() is not None:
        return ""
    if not row.arm.controls:
        return "it has no control"
    if not row.seeds:
        return "none of its runs has ended"
    if row.score("validation") is None:
        return "it has no validation scores"
    _, name = row.arm.controls[0]
    control = next(it for it in comparison.rows if (it.arm.name, it.arm.labels) == (name, row.arm.labels))
    if control.score("validation") is not None:
        return f"it has no seed in common with its control {name}"
    failed = any((it.variant, it.labels) == (name, row.arm.labels) for it in comparison.evidence.failures)
    return (
        f"all runs of its control {name} that ended have failed"
        if failed
        else f"its control {name} has not run"
    )


def warnings(comparison: Comparison) -> tuple[str, ...]:
    """What limits the answer, the gravest first."""
    return tuple(
        [
            *_about_test(comparison),
            *_about_runs(comparison),
            *comparison.evidence.notes,
            *_about_scores(comparison),
        ]
    )


def _about_test(comparison: Comparison) -> Iterator[str]:
    """Whether test images served to choose."""
    evidence = comparison.evidence
    if "test" not in comparison.images:
        return
    if "validation" not in comparison.images:
        yield (
            "There are no validation scores. Whoever chooses by these test scores can no longer report them: the best of "
            "several is too good by chance. Set data.validation in the base recipe."
        )
    if evidence.added_after_test:
        yield (
            f"Variants were added after test images were scored: {', '.join(evidence.added_after_test)}. If the test "
            "scores were a reason, they are no longer an unseen test."
        )
    if evidence.test_in_validation:
        yield (
            f"{evidence.test_in_validation} of {comparison.images['test']} test images are validation images too. They "
            "were used to choose, so their scores are too good. Remove them from data.test."
        )


def _about_runs(comparison: Comparison) -> Iterator[str]:
    """Runs that are missing, and rows that lack a difference."""
    evidence = comparison.evidence
    if evidence.failures:
        yield f"{len(evidence.failures)} of {evidence.planned} runs failed; the table shows the others."
    ended = len(evidence.trials) + len(evidence.failures)
    if ended < evidence.planned:
        yield f"Not finished: {ended} of {evidence.planned} runs have ended."
    for row in comparison.variants:
        place = f"{row.arm.name} with {row.arm.labels} labels"
        if reason := missing_reason(comparison, row):
            yield f"{place} has no difference: {reason}."
        difference = row.difference()
        if difference is not None and set(difference.seeds) != set(row.seeds):
            lacking = ", ".join(str(seed) for seed in row.seeds if seed not in difference.seeds)
            yield (
                f"{place}: its control has no scores of seed {lacking}, so the difference is of "
                f"{len(difference.seeds)} of {len(row.seeds)} seeds."
            )
    for row in comparison.rows:
        plain, aligned = row.score("validation"), row.score("validation", "aligned")
        if plain is not None and aligned is not None and aligned.seeds != plain.seeds:
            yield (
                f"{row.arm.name} with {row.arm.labels} labels: aligned scores are of {len(aligned.seeds)} of "
                f"{len(plain.seeds)} seeds; the others found no class weights."
            )


def _about_scores(comparison: Comparison) -> Iterator[str]:
    """Intervals that say less than they seem to."""
    differences = [difference for row in comparison.variants for difference in row.differences]
    if any(not difference.includes_training for difference in differences):
        yield (
            "Intervals of one seed show how much the images matter. They do not include training noise, so none of them "
            "tells a difference."
        )
    for role, images in comparison.images.items():
        if images < FEW_IMAGES:
            yield f"There are only {images} {role} images. Intervals of fewer than {FEW_IMAGES} are too narrow."
    scored = [row for row in comparison.rows if row.score("validation") is not None]
    plain = [row for row in scored if row.score("validation", "aligned") is None]
    if plain and len(plain) == len(scored):
        yield (
            "No run has aligned scores. result.align: auto in the base recipe gives them, with 10 validation images or "
            "more: aligning the control alone may gain as much as a method."
        )
    elif plain:
        names = ", ".join(dict.fromkeys(row.arm.name for row in plain))
        yield f"No aligned scores have: {names}. Their runs looked for no class weights, or found none."
    if uncertain := uncertain_classes(comparison):
        yield (
            f"Little is known of {', '.join(uncertain)}: in at least one row, the {LEVEL:.0%} interval of the validation "
            f"IoU is wider than {WIDE:g}, or fewer than {FEW_SHOWING} images show the class. Mean IoU counts it like any "
            "other class."
        )


def uncertain_classes(comparison: Comparison) -> list[str]:
    """Classes that occur in validation images and whose plain IoU says little in some row."""
    scores = [score for row in comparison.rows if (score := row.score("validation")) is not None]
    return [
        name
        for k, name in enumerate(comparison.evidence.classes)
        if any(score.classes[k].images and score.classes[k].uncertain for score in scores)
    ]
