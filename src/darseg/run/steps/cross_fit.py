"""Cross-fit: a network for each fold of the labeled images, trained on the other folds as round 0 is."""

from __future__ import annotations

import copy
from dataclasses import replace

from darseg.model.network import Network
from darseg.run.build import place
from darseg.run.course import Course
from darseg.run.data_digest import digest_samples
from darseg.run.directory import StepRecord
from darseg.run.folds import TRAINED_ROUND, Fold, FoldJournal, fold_run
from darseg.run.plan import Round
from darseg.run.remedies import ALONE, explain_memory
from darseg.run.settings import digest_state
from darseg.run.steps.train import train_round


def train_folds(
    course: Course, round_: Round, initial: Network | None, *, network: Network | None
) -> list[StepRecord]:
    """Train the networks of all folds before the first round that needs them; all processes together.

    Args:
        round_: that is about to label; nothing is done before others.
        initial: the network as round 0 begins, which stays as it is; None if the run does not cross-fit.
        network: that the round before has trained. It makes way, since a GPU need not hold both, and comes back.
    """
    if initial is None or round_.index != course.recipe.follows_precision[0]:
        return []
    if network is not None:
        network.cpu()
    records = _train_each(course, initial)
    if network is not None:
        with explain_memory(ALONE):
            place(network)
    return records


def _train_each(course: Course, initial: Network) -> list[StepRecord]:
    """Train a copy of the initial network for each fold, in a folder of its own."""
    records, before = [], digest_state(initial.state_dict())
    for fold in course.folds:
        own = _course_of(course, fold)
        course.processes.from_first(lambda own=own, fold=fold: _begin(own, fold))
        with explain_memory(ALONE):
            network = place(copy.deepcopy(initial))
        record = train_round(
            own,
            course.rounds[TRAINED_ROUND],
            before,
            pseudo=(),
            network=network,
            goes_on_from=TRAINED_ROUND,
            keeps_optimizer=False,
        )
        records.append(record)
        course.stop.check()  # a signal may have come in the last step
    return records


def _course_of(course: Course, fold: Fold) -> Course:
    """The run as the training of a fold sees it: same settings, the images of the other folds."""
    return replace(
        course,
        run=fold_run(course.run, fold.number),
        manifest=replace(course.manifest, labeled=fold.rest),
        data={**course.data, "labeled": digest_samples(fold.rest)},
        reuse=None if course.reuse is None else fold_run(course.reuse, fold.number),
        journal=FoldJournal(course.journal, fold),
    )


def _begin(course: Course, fold: Fold) -> None:
    """Refuse links, which would be read like files of the run, and say what is trained."""
    course.run.refuse_links()
    if not course.run.record_path(TRAINED_ROUND, "train").exists():
        course.journal.say(
            f"a network learns from {len(fold.rest)} labeled images as in round {TRAINED_ROUND}, and will predict the "
            f"other {len(fold.held_out)}"
        )
