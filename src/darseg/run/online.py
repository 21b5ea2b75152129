"""Rounds with `use: online`: from the recipe's section to the method, and what is reported of it.

A further method needs its published settings (PUBLISHED) and a case in `online_method`; a further rule of acceptance its
key in config/online.py, and a line in `online_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from darseg.choices import OnlineMethod
from darseg.config.online import ColorsConfig, OnlineConfig, TeacherConfig
from darseg.config.recipe import Recipe
from darseg.data.colors import UNCHANGED, Colors
from darseg.data.unlabeled import Boxes, StrongViews
from darseg.errors import RecipeError
from darseg.methods import adversarial, consistency
from darseg.methods.acceptance import (
    MOVED,
    UNALIGNED,
    Above,
    Acceptance,
    Aligned,
    ClassThresholds,
    MeanAligned,
    Realigned,
    Rule,
    first_steps,
    with_prior,
)
from darseg.methods.adversarial import BETAS, Adversarial, advsemiseg, s4gan
from darseg.methods.classmix import classmix
from darseg.methods.consistency import Consistency, Supervision, fixmatch
from darseg.methods.cps import cps
from darseg.methods.figures import (
    ACCEPTED,
    ACCEPTED_BY,
    AGREED,
    INSIDE,
    KNOWN,
    KNOWN_BY,
    RIGHT,
    RIGHT_BY,
    STUDENT_RIGHT,
    TEACHER_RIGHT,
    THRESHOLDS,
    TRUE,
)
from darseg.methods.mean_teacher import mean_teacher
from darseg.methods.realigned import WeightSearch
from darseg.methods.teacher import TeacherSettings
from darseg.methods.unimatch import unimatch, unimatch_v2
from darseg.model.discriminators import check_crop
from darseg.model.network import Network
from darseg.training.method import Feed, Learner, Method

PUBLISHED: Mapping[OnlineMethod, Consistency | Adversarial] = {
    "advsemiseg": Adversarial(
        "advsemiseg", batch=2, labeled=0.01, unlabeled=0.001, self_training=0.1, above=0.2
    ),
    "classmix": Consistency(
        "classmix",
        batch=2,
        strong=StrongViews(UNCHANGED),
        mixing="classmix",
        accept=Above(0.968),
        teacher=TeacherSettings(0.99, result=False),
    ),
    "cps": Consistency(
        "cps",
        batch=2,
        strong=StrongViews(UNCHANGED, Boxes(share=1.0, area=(0.25, 0.5), aspect=None)),
        accept=Above(0.0),
        teacher=None,
    ),
    "fixmatch": Consistency("fixmatch", batch=2),
    "mean_teacher": Consistency(
        "mean_teacher",
        batch=2,
        strong=StrongViews(UNCHANGED, Boxes(share=1.0, area=(0.5, 0.5), aspect=None)),
        accept=Above(0.97),
        teacher=TeacherSettings(0.99),
    ),
    "s4gan": Adversarial("s4gan", batch=2, labeled=0.0, unlabeled=0.1, self_training=1.0, above=0.6),
    "unimatch": Consistency("unimatch", batch=2, views=2, teacher=None),
    "unimatch_v2": Consistency("unimatch_v2", batch=2, views=2),
}
"""Method → its published settings: FixMatch with a teacher as in UniMatch V2; CutMix mean teacher of French et al.;
ClassMix for VOC; UniMatch, whose network labels for itself; UniMatch V2; AdvSemiSeg and s4GAN for VOC; CPS with CutMix
for VOC."""

SELF_TRAINING_AFTER = 5000 / 20_000
"""Share of the steps after which AdvSemiSeg trains itself: its release begins at step 5,000 of 20,000."""

MAKERS: Mapping[OnlineMethod, Callable[..., Method]] = {
    "advsemiseg": advsemiseg,
    "classmix": classmix,
    "cps": cps,
    "fixmatch": fixmatch,
    "mean_teacher": mean_teacher,
    "s4gan": s4gan,
    "unimatch": unimatch,
    "unimatch_v2": unimatch_v2,
}
"""Method → the function that makes it; arguments as of `fixmatch`. That of cps takes the second network, too."""


def colors_of(config: ColorsConfig | None) -> Colors | None:
    """How the recipe has colors changed."""
    return None if config is None else Colors(**config.model_dump())


def teacher_of(recipe: Recipe) -> TeacherSettings | None:
    """The teacher of the rounds that are not online; None: none."""
    config = recipe.training.teacher
    return None if config is None else _teacher(config, TeacherSettings())


def _teacher(config: TeacherConfig | None, usual: TeacherSettings) -> TeacherSettings:
    if config is None:
        return usual
    return TeacherSettings(usual.decay if config.decay is None else config.decay, config.result)


def unused_online(recipe: Recipe) -> str | None:
    """Which keys of `online` do nothing, since no round is online, as a sentence; None if all do.

    It is no error: variants of an experiment change the rounds of one recipe, and leave its other sections as they are.
    """
    if any(config.use == "online" for config in recipe.rounds):
        return None
    fields, given = OnlineConfig.model_fields, set(recipe.online.model_fields_set)
    if "online" not in recipe.model_fields_set or given == set(fields):  # a run folder's recipe has all keys
        given = {name for name, value in recipe.online if value != fields[name].default}
    if not given:
        return None
    keys = ", ".join(f"online.{name}" for name in fields if name in given)
    return f"no round has use: online, so {keys} will do nothing. Set use: online in a round, or remove the section"


def online_of(recipe: Recipe, batch: int) -> Consistency | Adversarial:
    """What the recipe's online rounds do.

    Args:
        batch: labeled images of a step.

    Raises RecipeError if unlabeled images cannot be mixed in pairs.
    """
    config, usual = recipe.online, PUBLISHED[recipe.online.method]
    if isinstance(usual, Adversarial):
        return _with_discriminator(recipe, usual, batch)
    teacher = usual.teacher
    if config.labeler == "student":
        teacher = None
    elif config.labeler == "teacher" or config.teacher is not None:
        teacher = _teacher(config.teacher, teacher or TeacherSettings())
    strong = replace(
        usual.strong,
        colors=colors_of(config.colors) or usual.strong.colors,
        boxes=usual.strong.boxes if config.boxes is None else Boxes(**config.boxes.model_dump()),
    )
    return replace(
        usual,
        batch=config.batch or batch,
        views=config.strong_views or usual.views,
        strong=strong,
        mixing=config.mixing or usual.mixing,
        accept=_acceptance(config, usual.accept),
        weight=config.weight,
        teacher=teacher,
    )


def _with_discriminator(recipe: Recipe, usual: Adversarial, batch: int) -> Adversarial:
    config = recipe.online
    given = {} if config.adversarial is None else config.adversarial.model_dump(exclude_none=True)
    return replace(
        usual,
        **given,
        batch=config.batch or batch,
        above=usual.above if config.above is None else config.above,
        padding=recipe.release_quirks,
        teacher=None if config.teacher is None else _teacher(config.teacher, TeacherSettings()),
    )


def _acceptance(config: OnlineConfig, usual: Acceptance) -> Acceptance:
    rule = usual if config.above is None else Above(config.above)
    if config.aligned is not None:
        rule = Aligned(config.aligned.ratio, config.aligned.window)
    if config.class_thresholds:
        rule = ClassThresholds()
    assert isinstance(rule, Rule)
    match config.align:
        case "none":
            return rule
        case "decisions":
            return Realigned(rule, config.align_window, WeightSearch(config.strength, config.bound))
        case "probabilities":
            return MeanAligned(rule)


def fitted(
    how: Consistency | Adversarial, *, index: int, steps: int, crop: tuple[int, int]
) -> Consistency | Adversarial:
    """What an online round of so many steps does.

    Raises RecipeError if it ends before a part of it begins, SizeError if the crop is too small for it.
    """
    if isinstance(how, Adversarial):
        check_crop(how.discriminator, *crop)
        start = how.start
        if start is None:  # s4GAN leaves the first step out
            start = round(SELF_TRAINING_AFTER * steps) if how.method == "advsemiseg" else 1
        if how.self_training and start >= steps:
            raise RecipeError(
                f"Round {index} has {steps} step(s), but self-training begins at step {start}, counted from 0 "
                "(online.adversarial.start). Give the round more steps, let it begin earlier, or set "
                "online.adversarial.self_training: 0.0."
            )
        return replace(how, start=start)
    first = first_steps(how.accept)
    if steps <= first:
        raise RecipeError(
            f"Round {index} has {steps} steps, but online.aligned and online.align have an effect only after their first "
            f"window, here of {first} steps. Give it more steps, or make online.aligned.window and online.align_window "
            "smaller."
        )
    return how


def undivided(how: Consistency | Adversarial, processes: int, micro_batch: int | None) -> str | None:
    """Why a round's batches cannot be divided so; None if they can."""
    if how.method != "s4gan" or (processes == 1 and micro_batch is None):
        return None
    divided = f"{processes} processes" if processes > 1 else f"training.micro_batch {micro_batch}"
    return (
        f"online.method s4gan: it compares means over whole batches, so {divided} would change what it learns. Train on "
        "one process without training.micro_batch"
    )


def feeds_of(how: Consistency | Adversarial, batch: int) -> tuple[Feed, ...]:
    """The streams of an online round's step.

    Args:
        batch: labeled images of a step.
    """
    return adversarial.feeds(batch, how) if isinstance(how, Adversarial) else consistency.feeds(batch, how)


Figure = float | list[Any]
"""A number, or a list of one for each class."""

SHARES = {
    "accepted": (ACCEPTED, INSIDE),
    "moved": (MOVED, INSIDE),
    "unaligned": (UNALIGNED, INSIDE),
    "precision": (RIGHT, KNOWN),
    "agreement": (AGREED, INSIDE),
    "teacher_right": (TEACHER_RIGHT, TRUE),
    "student_right": (STUDENT_RIGHT, TRUE),
    "accepted_by_class": (ACCEPTED_BY, ACCEPTED),
    "precision_by_class": (RIGHT_BY, KNOWN_BY),
    "thresholds": (THRESHOLDS, INSIDE),
}
"""Name in the journal → the figure that is divided, and by which."""

COUNTS = {figure for pair in SHARES.values() for figure in pair}


def online_method(
    learner: Learner,
    how: Consistency | Adversarial,
    labeled: Supervision,
    *,
    counts: Sequence[int],
    seed: Sequence[int],
    second: Callable[[], Network],
) -> Method:
    """The method of an online round.

    Args:
        counts: labeled pixels per class; the other arguments are those of `fixmatch`.
        second: makes the second network of a method that has one.
    """
    if isinstance(how, Consistency):
        how = replace(how, accept=with_prior(how.accept, counts))
    if how.networks > 1:
        return MAKERS[how.method](learner, how, labeled, seed=seed, second=second())
    return MAKERS[how.method](learner, how, labeled, seed=seed)


def describe_online(how: Consistency | Adversarial) -> str:
    """What an online round does, as a part of a sentence."""
    if isinstance(how, Adversarial):
        return _describe_adversarial(how)
    labels = "by the network itself"
    if how.networks > 1:
        first = (
            "" if how.teacher is not None and how.teacher.result else ", of which the round saves the first"
        )
        labels = f"by two networks for each other{first}{_described_average(how.teacher)}"
    elif how.teacher is not None:
        saved = "which the round saves" if how.teacher.result else "which is not saved"
        labels = f"by a teacher of decay {how.teacher.decay:g}, {saved}"
    return (
        f"{how.method}: {how.batch} unlabeled images a step with {how.views} strong view(s), mixing {how.mixing}; "
        f"{_described(how.accept)}, {labels}; weight {how.weight:g}"
    )


def describe_views(how: Consistency | Adversarial) -> Iterator[tuple[str, str]]:
    """What strong views are and how boxes are cut, a name and a description each."""
    if isinstance(how, Adversarial):
        return
    yield "colors of strong views", describe_colors(how.strong.colors)
    if how.mixing == "cutmix":
        boxes = how.strong.boxes
        smallest, largest = (f"{area:.0%}" for area in boxes.area)
        area = smallest if smallest == largest else f"{smallest} to {largest}"
        yield "boxes", f"{boxes.share:.0%} of the views, {area} of the crop"


def describe_colors(colors: Colors) -> str:
    """How colors are changed, as a part of a sentence."""
    parts = []
    if colors.jitter_share:
        names = ("brightness", "contrast", "saturation", "hue")
        strengths = ", ".join(f"{name} {value:g}" for name, value in zip(names, colors.jitter, strict=True))
        parts.append(f"jitter of {colors.jitter_share:.0%} ({strengths})")
    if colors.gray_share:
        parts.append(f"gray {colors.gray_share:.0%}")
    if colors.blur_share:
        parts.append(f"blur of {colors.blur_share:.0%} ({colors.blur[0]:g} to {colors.blur[1]:g} pixels)")
    return "; ".join(parts) or "unchanged"


def _describe_adversarial(how: Adversarial) -> str:
    """A discriminator's round as a part of a sentence."""
    match how.method:
        case "advsemiseg":
            losses = f"adversarial loss of weight {how.labeled:g} (labeled) and {how.unlabeled:g} (unlabeled)"
            trusted = f"pixels that its discriminator takes for true with a confidence from {how.above:g} on"
        case "s4gan":
            losses = f"feature matching of weight {how.unlabeled:g}"
            trusted = f"images that its discriminator scores above {how.above:g}"
    own = f"self-training of weight {how.self_training:g} from step {how.start} on, of {trusted}"
    padding = "; padding counts like pixels of images" if how.padding else ""
    average = _described_average(how.teacher)
    return f"{how.method}: {how.batch} unlabeled images a step, {losses}, {own}{padding}{average}"


def _described_average(teacher: TeacherSettings | None) -> str:
    """A running average that labels nothing, as the end of a sentence; empty if there is none."""
    if teacher is None:
        return ""
    saved = "which the round saves" if teacher.result else "which is not saved"
    return f"; a running average of decay {teacher.decay:g}, {saved}"


def describe_discriminator(how: Adversarial, classes: int) -> str:
    """The second learner of a round, as a part of a sentence."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in how.discriminator(classes).parameters())
    return (
        f"its discriminator has {parameters:,} parameters, learned by Adam (betas {BETAS[0]:g} and {BETAS[1]:g}) from "
        f"rate {how.learning_rate:g} on, on the schedule of the network"
    )


def _described(rule: Acceptance) -> str:
    match rule:
        case Above(threshold):
            return f"labels at confidences from {threshold:g} on" if threshold else "labels for all pixels"
        case Aligned(ratio, window):
            return (
                f"labels for a share of {ratio:g} of the pixels, with the class mix of the labeled ones (thresholds "
                f"every {window} steps, nothing in the first {window})"
            )
        case ClassThresholds():
            return "labels by thresholds per class that follow the predictions (FreeMatch)"
        case MeanAligned(inner):
            return f"mean probabilities aligned with the labeled pixels (ReMixMatch); {_described(inner)}"
        case Realigned(inner, window, search):
            return (
                f"decisions aligned with the labeled pixels, strength {search.strength:g}, bound {search.bound:g} "
                f"(weights every {window} steps, plain in the first {window}); {_described(inner)}"
            )


def with_shares(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """The figures of a step with shares instead of counts of pixels; None where they are undefined.

    Of the pixels inside of the weak views, "accepted", "moved" (to another class by class weights), "unaligned" (decided
    without weights, since there were none) and "agreement" (of the networks that label and that learn) are shares.
    "precision" is the share of the accepted ones that are right, among those whose truth is known; "teacher_right" and
    "student_right" are the shares of all pixels with a known truth. By class, lists in class order: "accepted_by_class",
    shares of the accepted pixels; "precision_by_class"; "thresholds", smallest accepted confidences.
    """
    shares: dict[str, Any] = {name: value for name, value in figures.items() if name not in COUNTS}
    for name, (part, whole) in SHARES.items():
        if part in figures:
            shares[name] = _divided(figures[part], figures[whole])
    return shares


def _divided(part: Figure, whole: Figure) -> Figure | None:
    """Their quotient, class by class for lists; None where it is undefined."""
    if not isinstance(part, list):
        assert not isinstance(whole, list)
        return part / whole if whole else None
    if not isinstance(whole, list):
        whole = [whole] * len(part)
    return [_divided(own, count) for own, count in zip(part, whole, strict=True)]
