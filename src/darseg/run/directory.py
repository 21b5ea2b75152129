"""The run folder: where everything is written, and which steps are finished.

    RUN/
      recipe.yaml  run.json  environment.json  data.json  contents.json  journal.jsonl  tensorboard/  summary.json
      report.html  (bad_images.json)  (best.safetensors  best.json)  (folds/fold_N/round_0/)
      round_0/     network.safetensors  optimizer.safetensors  train.json   scores.json  evaluate.json
                   (image_counts.npz)  (result_alignment.json  align.json  result.safetensors)
      round_1/     labels/ID.png  histogram.npz  thresholds.json  images.json  (pseudo_scores.json)  label.json
                   (excluded.json)  (labels_from.json)  (confidences/ID.png)  + as round_0
      …
    and, only during the work, round_N/checkpoint_STEP.safetensors, round_N/predictions/ and
    round_N/images_PROCESS.jsonl.

A step of a round (label, train, align, evaluate) is finished when its record exists: label.json, train.json, align.json
or evaluate.json, which is written last. The record holds the digests of the step's inputs and outputs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darseg.data.files import (
    ASIDE,
    open_file,
    open_to_append,
    raise_if_unreadable,
    refuse_link,
    refuse_links_out_of,
    regular_files,
    remove_leftovers,
    storage_error,
    write_whole,
    write_whole_with,
)
from darseg.errors import FormatError, RunError, faults, shortened
from darseg.pseudo.labelset import ImageFacts, PseudoLabelSet
from darseg.run.outputs import lock
from darseg.run.records import StepRecord, damaged, read_object, read_texts
from darseg.run.settings import Inputs, digest_text
from darseg.training.scores import Scores

ROUND_FOLDER = re.compile(r"round_(0|[1-9][0-9]{0,5})")

RESULT = "result.safetensors"

FORMAT = 2
"""The format of the run folders that this version writes. It also reads format 1, darseg 0.2's (see formats.py)."""


@dataclass(frozen=True)
class RecipeChanges:
    """How the recipe a run is resumed with differs from the folder's, as "key: old → new".

    Attributes:
        binding: keys that can change the result.
        free: keys that cannot, such as training.workers; threads, which can change last bits, are among them.
    """

    binding: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


class RunDirectory:
    """Names and reads the files of a run folder; the only place that knows its layout."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def format(self) -> Path:
        return self.root / "run.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def contents(self) -> Path:
        return self.root / "contents.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def bad_images(self) -> Path:
        return self.root / "bad_images.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def round(self, index: int) -> Path:
        return self.root / f"round_{index}"

    def network(self, index: int) -> Path:
        return self.round(index) / "network.safetensors"

    def result(self, index: int) -> Path:
        """The network with aligned decisions; the file exists only if these are the round's result."""
        return self.round(index) / RESULT

    def optimizer(self, index: int) -> Path:
        """The state of the optimizers at the end of a round; in format 1 the file is called momentum."""
        path, earlier = (self.round(index) / f"{name}.safetensors" for name in ("optimizer", "momentum"))
        return earlier if earlier.exists() and not path.exists() else path

    def checkpoint(self, index: int, step: int, kind: str = "checkpoint") -> Path:
        return self.round(index) / f"{kind}_{step:08d}.safetensors"

    def checkpoints(self, index: int, kind: str = "checkpoint") -> list[Path]:
        """The checkpoints of a round's unfinished training, or of another kind there, the latest first."""
        return sorted(self.round(index).glob(f"{kind}_*.safetensors"), reverse=True)

    def has_trained(self, index: int) -> bool:
        """Whether a round has begun to train and left a checkpoint, or is trained."""
        return bool(self.checkpoints(index)) or self.record_path(index, "train").exists()

    def drop_checkpoints(self, index: int, keep: int = 0, kind: str = "checkpoint") -> None:
        """Remove all checkpoints but the latest `keep`, and the half-written one that a kill may have left."""
        halves = self.round(index).glob(f"{kind}_*.safetensors*{ASIDE}")
        for path in (*self.checkpoints(index, kind)[keep:], *halves):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Generator[bool, None, None]:
        """Hold an exclusive lock on the run folder; the system releases it when the process ends.

        The locked file is the journal, opened for writing: NFS then locks it for all machines, which it does not do for
        a folder. What a kill left half-written is removed.

        Yields False if the file system has no locks. Raises RunError if another process holds the lock; StorageError if
        the journal cannot be written, or if a link leads out of the folder.
        """
        refuse_links_out_of(self.root)
        self.refuse_links()
        try:
            journal = open_to_append(self.journal)
        except OSError as error:
            raise storage_error(error, self.journal) from error
        try:
            locked = lock(
                journal.fileno(),
                f"{self.root}: another process is working in this run folder. Wait for it, end it, or start another run "
                "with --out NEW_FOLDER.",
            )
            remove_leftovers(self.root)
            yield locked
        finally:
            journal.close()

    def refuse_links(self) -> None:
        """Raise StorageError if a link leads out of the folder; maps may, and the report replaces it."""
        for path in (*self.root.glob("*"), *self.root.glob("round_*/*")):
            if path.is_symlink() and path != self.report:
                refuse_link(path, self.root)

    def labels(self, index: int) -> Path:
        return self.round(index) / "labels"

    def confidences(self, index: int) -> Path:
        return self.round(index) / "confidences"

    def predictions(self, index: int) -> Path:
        return self.round(index) / "predictions"

    def excluded(self, index: int) -> Path:
        """Ids of the unlabeled images that the round leaves out; the file exists only if there are any."""
        return self.round(index) / "excluded.json"

    def label_set(self, index: int) -> PseudoLabelSet:
        """The finished pseudo labels of a round. Raises DataError if they are damaged."""
        folder = self.round(index)
        return PseudoLabelSet.load(self.labels(index), folder / "histogram.npz", folder / "thresholds.json")

    def facts_logs(self, index: int) -> list[Path]:
        """The logs of an unfinished label step, one for each process."""
        return sorted(self.round(index).glob("images_*.jsonl"))

    def drop_facts_logs(self, index: int) -> None:
        for path in self.facts_logs(index):
            path.unlink()

    def image_facts(self, index: int, classes: int) -> dict[str, ImageFacts]:
        """Id → facts of that image from labeling; empty for a round that was labeled before these were kept.

        Raises RunError if the file is damaged.
        """
        path = self.round(index) / "images.json"
        remedy = (
            "Restore it from a copy, or delete label.json next to it and all later rounds, and run the same command "
            "again."
        )
        try:
            entries = read_object(path, remedy)
            return {name: ImageFacts.from_json(entry, classes) for name, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise damaged(path, f"{type(error).__name__}: {error}", remedy) from error

    def scores(self, index: int, classes: int | None = None, name: str = "scores.json") -> Scores:
        """The scores of a round that is evaluated. Raises RunError if they are damaged, or of other classes."""
        path = self.round(index) / name
        remedy = "Restore it from a copy, or delete evaluate.json next to it, and run the same command again."
        try:
            content = read_object(path, remedy)
            scores = Scores.from_json(content)
            if not isinstance(content.get("aligned", {}), dict):
                raise ValueError(f"'aligned' is {shortened(content['aligned'])}, expected an object")
            if classes is not None and len(scores.confusion) != classes:
                raise ValueError(f"scores of {len(scores.confusion)} classes instead of {classes}")
            return scores
        except FileNotFoundError:
            raise damaged(path, "it is missing", remedy) from None
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise damaged(path, f"{type(error).__name__}: {error}", remedy) from error

    def record_path(self, index: int, step: str) -> Path:
        return self.round(index) / f"{step}.json"

    def read_record(self, index: int, step: str) -> StepRecord | None:
        """The record of a step, None if it is not finished. Raises RunError if the record is damaged."""
        path = self.record_path(index, step)
        remedy = "Delete this record and run the same command again; the step is redone."
        try:
            return StepRecord.from_json(read_object(path, remedy), step)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise damaged(path, error, remedy) from error

    def rounds_with(self, step: str) -> list[int]:
        """The rounds in which that step is finished, in order."""
        folders = (path.parent.name for path in self.root.glob(f"round_*/{step}.json"))
        return sorted(int(number[1]) for folder in folders if (number := ROUND_FOLDER.fullmatch(folder)))

    def last_round(self) -> int:
        """The latest finished round. Raises RunError if no round is finished."""
        rounds = self.rounds_with("train")
        if not rounds:
            raise RunError(
                f"{self.root}: this folder has no finished round (no round_0/train.json). Give a run folder of "
                "`darseg train` in which round 0 is trained, or a .safetensors checkpoint."
            )
        return rounds[-1]

    def last_network(self) -> Path:
        """The plain network of the latest finished round. Raises RunError if no round is finished."""
        return self.network(self.last_round())

    def finished(
        self, index: int, step: str, inputs: Inputs, reuse: RunDirectory | None = None
    ) -> StepRecord | None:
        """The record of a step that was done with these inputs, or None if the step is still to be done.

        If `reuse` has the same step with the same inputs, its results are copied first.
        Raises RunError if the step was done with other inputs, or if its results have changed since.
        """
        record = self.read_record(index, step)
        if record is None and reuse is not None:
            reusable = reuse.read_record(index, step)
            if reusable is not None and not inputs.differences(reusable.inputs):
                self._copy(reuse, index, step, record=reusable)
                record = reusable
        if record is None:
            return None
        if changed := inputs.differences(record.inputs):
            remedy = "Restore the data as it was"  # unless other steps left what has changed
            if not {*changed} - {"network", "alignment", "labels_from", "image_classes", "folds"}:
                remedy = f"To repeat it with this network, delete {step}.json here and all later rounds"
            raise RunError(
                f"{self.round(index)}: step '{step}' was done with other inputs ({', '.join(changed)} differ). "
                f"{remedy}, or start another run with --out NEW_FOLDER."
            )
        self._check_outputs(
            index,
            record,
            f"Restore them, or delete {self.record_path(index, step).name} and all later rounds to repeat the step",
        )
        return record

    def _check_outputs(self, index: int, record: StepRecord, remedy: str) -> None:
        """Raise RunError if results of a step are not those of its record."""
        folder = self.round(index)
        changed = [name for name, digest in record.outputs.items() if digest_path(folder / name) != digest]
        if changed:
            raise RunError(
                faults(
                    f"{folder}: results of step '{record.step}' were changed or removed after it finished. {remedy}. "
                    "Changed or missing",
                    changed,
                )
            )

    def _copy(self, source_run: RunDirectory, index: int, step: str, *, record: StepRecord) -> None:
        """Take over the results of a step that are what its record says; links out of it are refused.

        Only files are copied, and not their modes: a foreign file could be one that runs with its owner's rights.
        """
        folder = source_run.round(index)
        for name in record.outputs:
            refuse_link(folder / name, source_run.root)
            refuse_links_out_of(folder / name, files=True)
        source_run._check_outputs(
            index, record, "Restore them, or train without --reuse. They belong to the run to reuse"
        )
        for name in record.outputs:
            for source in regular_files(folder / name):
                target = self.round(index) / source.relative_to(folder)
                write_whole_with(target, lambda aside, source=source: shutil.copyfile(source, aside))
        write_json(self.record_path(index, step), vars(record))

    def finish(
        self,
        index: int,
        step: str,
        *,
        inputs: Inputs,
        outputs: Iterable[str],
        seconds: float,
        facts: Mapping[str, Any],
    ) -> StepRecord:
        """Record that a step is finished. The record is written last, so that no step is half finished.

        Seconds are rounded here, so that a summary made from records is the same whether or not a step was done just now.
        """
        digests = {name: digest_path(self.round(index) / name) for name in outputs}
        record = StepRecord(step, dict(inputs.digests), digests, seconds=round(seconds, 3), facts=dict(facts))
        write_json(self.record_path(index, step), vars(record))
        return record


def open_run(
    run: RunDirectory, *, recipe_text: str, data: Mapping[str, str], compare: Callable[[Path], RecipeChanges]
) -> RecipeChanges:
    """Begin a run folder, or go on in one that was begun with the same recipe and the same data.

    Args:
        data: role → digest of its samples.
        compare: the recipe in the folder → what has changed.

    Raises RunError with both ways out if recipe or data differ; StorageError if nothing can be written.
    """
    root, changes = run.root, RecipeChanges()
    if run.recipe.exists():
        check_format(run)
        changes = compare(run.recipe)
        _check_unchanged(run, changes, data)
    elif root.exists() and not root.is_dir():
        raise RunError(f"{root} is a file, not a folder. Choose another path with --out.")
    elif root.exists() and any(path.suffix != ASIDE for path in root.iterdir()):
        raise RunError(f"{root} has files but is not a run folder. Choose another folder with --out.")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, root) from error
    # The recipe is first, since it makes the folder a run folder. After a kill in between, the next call writes the rest.
    if not run.recipe.exists():
        write_whole(run.recipe, recipe_text)
    if not run.format.exists() and not any(root.glob("round_*/*.json")):  # a folder with records has format 1
        write_json(run.format, {"format": FORMAT})
    if not run.data.exists():
        write_json(run.data, dict(data))
    return changes


def check_format(run: RunDirectory) -> None:
    """Raise RunError for a run folder of a later format than this version knows."""
    if not run.format.exists():
        return
    remedy = f'Write {{"format": {FORMAT}}} into it, or restore it from a copy.'
    number = read_object(run.format, remedy).get("format")
    if type(number) is not int or number < 1:
        raise damaged(run.format, f'expected {{"format": number}}, found {shortened(number)}', remedy)
    if number > FORMAT:
        raise FormatError(
            f"{run.root} has format {number}, and this version of darseg works in run folders up to format {FORMAT}. "
            "Upgrade darseg (pip install --upgrade darseg), or start another run with --out NEW_FOLDER."
        )


def _check_unchanged(run: RunDirectory, changes: RecipeChanges, data: Mapping[str, str]) -> None:
    """Raise RunError if the run was begun with another recipe or other data."""
    if changes.binding:
        raise RunError(
            faults(f"{run.root} was begun with another recipe", changes.binding)
            + "\nUndo these changes to go on with that run, or start another run with --out NEW_FOLDER."
        )
    recorded = dict(data)
    if run.data.exists():
        recorded = read_texts(
            run.data,
            "Restore it from a copy; or delete it if the images and labels are those the run began with, and run the "
            "same command again.",
        )
    roles = [role for role in sorted({*recorded, *data}) if recorded.get(role) != data.get(role)]
    if roles:
        raise RunError(
            f"{run.root} was begun with other images or labels ({', '.join(roles)}: files were added, removed or "
            "changed in size). Restore them to go on with that run, or start another run with --out NEW_FOLDER."
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, indented. NaN is refused: undefined figures are null."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def digest_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's paths and file digests; "missing" if there is neither (a pipe)."""
    if path.is_dir():
        files = regular_files(path)
        return digest_text("\n".join(f"{p.relative_to(path).as_posix()} {digest_path(p)}" for p in files))
    if not path.is_file():
        return "missing"
    sha = hashlib.sha256()
    try:
        with open_file(path) as file:
            while block := file.read(1 << 20):
                sha.update(block)
    except OSError as error:
        raise_if_unreadable(error, path)
        raise
    return sha.hexdigest()
