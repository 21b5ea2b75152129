"""The run folder: who writes where, and what is done already.

    RUN/
      recipe.yaml  run.json  environment.json  data.json  journal.jsonl  tensorboard/  summary.json  report.html
      (bad_images.json)
      round_0/     network.safetensors  optimizer.safetensors  train.json   scores.json  evaluate.json
      round_1/     labels/ID.png  histogram.npz  thresholds.json  images.json  (pseudo_scores.json)  label.json
                   (excluded.json)  + as round_0
      …
    and, only while at work, round_N/checkpoint_STEP.safetensors, round_N/predictions/ and round_N/images_PROCESS.jsonl.

A step (label, train, evaluate of a round) is done when its manifest – label.json, train.json, evaluate.json,
written last – says so. It names the digests of what went in and of what came out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from darseg.data.encoding import PLAIN
from darseg.data.files import ASIDE, storage_error, write_whole, write_whole_with
from darseg.data.manifest import Manifest, Sample
from darseg.errors import DataError, RunError, faults
from darseg.pseudo.labelset import ImageFacts, PseudoLabelSet
from darseg.run.settings import Inputs, digest_text

FORMAT = 2
"""Of the run folders that this version writes. It reads all earlier ones: 1 is darseg 0.2's (see formats.py)."""


@dataclass(frozen=True)
class StepRecord:
    """What a finished step left: digests of its inputs and outputs, seconds, and facts worth keeping."""

    step: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    seconds: float
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class RecipeChanges:
    """What differs between the recipe of a run folder and the one it is resumed with, as "key: old → new".

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

    recipe = property(lambda self: self.root / "recipe.yaml")
    format = property(lambda self: self.root / "run.json")
    environment = property(lambda self: self.root / "environment.json")
    data = property(lambda self: self.root / "data.json")
    journal = property(lambda self: self.root / "journal.jsonl")
    tensorboard = property(lambda self: self.root / "tensorboard")
    summary = property(lambda self: self.root / "summary.json")
    bad_images = property(lambda self: self.root / "bad_images.json")
    report = property(lambda self: self.root / "report.html")

    def round(self, index: int) -> Path:
        return self.root / f"round_{index}"

    def network(self, index: int) -> Path:
        return self.round(index) / "network.safetensors"

    def optimizer(self, index: int) -> Path:
        """What the optimizers of a round ended with; format 1 called it momentum."""
        earlier = self.round(index) / "momentum.safetensors"
        return earlier if earlier.exists() else self.round(index) / "optimizer.safetensors"

    def checkpoint(self, index: int, step: int) -> Path:
        return self.round(index) / f"checkpoint_{step:08d}.safetensors"

    def checkpoints(self, index: int) -> list[Path]:
        """Those of a stage at work, the latest first."""
        return sorted(self.round(index).glob("checkpoint_*.safetensors"), reverse=True)

    def drop_checkpoints(self, index: int, keep: int = 0) -> None:
        """Remove all but the latest `keep`, and what a kill left of one being written."""
        halves = self.round(index).glob(f"checkpoint_*.safetensors{ASIDE}")
        for path in (*self.checkpoints(index)[keep:], *halves):
            path.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Generator[bool, None, None]:
        """Nobody else works in the folder meanwhile; freed by the system however this process ends.

        What is locked is the journal, opened for writing: so NFS holds it for all machines, as it does not a folder.
        Gives False where the file system has no locks. Raises RunError where another process holds it, StorageError
        where the journal cannot be written.
        """
        try:
            descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise storage_error(error, self.journal) from error
        locked = True
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.root}: another process is at work in this run folder. Wait for it or end it, or start "
                    "another run with --out NEW_FOLDER."
                ) from None
            except OSError:
                locked = False
            yield locked
        finally:
            os.close(descriptor)

    def labels(self, index: int) -> Path:
        return self.round(index) / "labels"

    def predictions(self, index: int) -> Path:
        return self.round(index) / "predictions"

    def excluded(self, index: int) -> Path:
        """Ids of unlabeled images that the round leaves out; there only where it leaves out some."""
        return self.round(index) / "excluded.json"

    def label_set(self, index: int) -> PseudoLabelSet:
        """The pseudo labels of a round that are done. Raises DataError where they are damaged."""
        folder = self.round(index)
        return PseudoLabelSet.load(self.labels(index), folder / "histogram.npz", folder / "thresholds.json")

    def facts_logs(self, index: int) -> list[Path]:
        """Of a label step at work, one of each process."""
        return sorted(self.round(index).glob("images_*.jsonl"))

    def drop_facts_logs(self, index: int) -> None:
        for path in self.facts_logs(index):
            path.unlink()

    def image_facts(self, index: int, classes: int) -> dict[str, ImageFacts]:
        """Id → what labeling found in that image; empty for rounds that were labeled before this was kept.

        Raises RunError where the file is damaged.
        """
        path = self.round(index) / "images.json"
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return {name: ImageFacts.from_json(entry, classes) for name, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"{path} is damaged ({type(error).__name__}: {error}). Put it back from a copy, or delete label.json "
                "beside it and all later rounds, and train again."
            ) from error

    def record_path(self, index: int, step: str) -> Path:
        return self.round(index) / f"{step}.json"

    def read_record(self, index: int, step: str) -> StepRecord | None:
        """What a finished step left, None where it is not finished. Raises RunError where it is damaged."""
        path = self.record_path(index, step)
        try:
            return StepRecord(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"{path}: this record is damaged ({error}). Delete it and run the same command again; the step is redone."
            ) from error

    def rounds_with(self, step: str) -> list[int]:
        """The rounds in which that step is finished, in order."""
        return sorted(int(path.parent.name.split("_")[1]) for path in self.root.glob(f"round_*/{step}.json"))

    def last_network(self) -> Path:
        """Weights of the latest finished round. Raises RunError where there is none."""
        rounds = self.rounds_with("train")
        if not rounds:
            raise RunError(
                f"{self.root}: no finished round here (no round_0/train.json). Wanted a run folder of "
                "`darseg train`, or a .safetensors checkpoint; run `darseg train` to its end first."
            )
        return self.network(rounds[-1])

    def finished(
        self, index: int, step: str, inputs: Inputs, reuse: RunDirectory | None = None
    ) -> StepRecord | None:
        """The record of a step that is done with these inputs, None if it is still to be done.

        If `reuse` did the same step with the same inputs, its results are copied first.
        Raises RunError if the step was done with other inputs, or its results were changed since.
        """
        record = self.read_record(index, step)
        if record is None and reuse is not None:
            other = reuse.read_record(index, step)
            if other is not None and not inputs.differences(other.inputs):
                self._copy(reuse, index, step, other)
                record = other
        if record is None:
            return None
        if changed := inputs.differences(record.inputs):
            raise RunError(
                f"{self.round(index)}: step '{step}' was done with other inputs ({', '.join(changed)} differ). "
                "Put the data back as it was, or start a new run folder with --out."
            )
        wrong = [
            name for name, digest in record.outputs.items() if digest_path(self.round(index) / name) != digest
        ]
        if wrong:
            raise RunError(
                faults(
                    f"{self.round(index)}: results of step '{step}' were changed or removed since it finished; "
                    f"delete {self.record_path(index, step).name} and all later rounds to redo it, or restore them",
                    wrong,
                )
            )
        return record

    def _copy(self, other: RunDirectory, index: int, step: str, record: StepRecord) -> None:
        for name in record.outputs:
            source, target = other.round(index) / name, self.round(index) / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                write_whole_with(target, lambda aside, source=source: shutil.copyfile(source, aside))
        write_whole_with(
            self.record_path(index, step),
            lambda aside: shutil.copyfile(other.record_path(index, step), aside),
        )

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
        """Record that a step is done; written last, so that it is done or not.

        Seconds are rounded here: take the record's, and a summary is the same whether its steps were done or found.
        """
        digests = {name: digest_path(self.round(index) / name) for name in outputs}
        record = StepRecord(step, dict(inputs.digests), digests, seconds=round(seconds, 3), facts=dict(facts))
        write_json(self.record_path(index, step), vars(record))
        return record


def open_run(
    run: RunDirectory, *, recipe_text: str, data: Mapping[str, str], compare: Callable[[Path], RecipeChanges]
) -> RecipeChanges:
    """Begin a run folder, or go on in one that was begun with the same recipe and data.

    Args:
        data: role → digest of its samples.
        compare: the recipe in the folder → what has changed.

    Raises RunError with both ways out if recipe or data differ; StorageError if nothing can be written.
    """
    root, changes = run.root, RecipeChanges()
    if run.recipe.exists():
        _check_format(run)
        changes = compare(run.recipe)
        _check_unchanged(run, changes, data)
    elif root.exists() and not root.is_dir():
        raise RunError(f"{root} is a file, not a folder. Choose another folder with --out.")
    elif root.exists() and any(path.suffix != ASIDE for path in root.iterdir()):
        raise RunError(f"{root} is not empty and is no run folder. Choose another folder with --out.")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, root) from error
    # The recipe first: it makes the folder a run folder. If a kill comes in between, the rest is noted next time.
    if not run.recipe.exists() or changes.free:
        write_whole(run.recipe, recipe_text)
    if not run.format.exists() and not any(root.glob("round_*/*.json")):  # a folder with records has format 1
        write_json(run.format, {"format": FORMAT})
    if not run.data.exists():
        write_json(run.data, dict(data))
    return changes


def _check_format(run: RunDirectory) -> None:
    """Raise RunError for a run folder of a later format than this version knows."""
    if not run.format.exists():
        return
    try:
        number = json.loads(run.format.read_text())["format"]
        newer = number > FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f'{run.format} is damaged ({error}). Write {{"format": {FORMAT}}} into it, or restore it from a copy.'
        ) from error
    if newer:
        raise RunError(
            f"{run.root} has format {number}, and this version of darseg works in run folders up to format {FORMAT}. "
            "Upgrade darseg (pip install --upgrade darseg), or start another run with --out NEW_FOLDER."
        )


def _check_unchanged(run: RunDirectory, changes: RecipeChanges, data: Mapping[str, str]) -> None:
    """Raise RunError if the run was begun with another recipe or other data."""
    if changes.binding:
        raise RunError(
            faults(f"{run.root} was begun with another recipe", changes.binding)
            + "\nEither undo these changes to go on with that run, or start another with --out NEW_FOLDER."
        )
    recorded = json.loads(run.data.read_text()) if run.data.exists() else dict(data)
    roles = [role for role in sorted({*recorded, *data}) if recorded.get(role) != data.get(role)]
    if roles:
        raise RunError(
            f"{run.root} was begun with other images or labels ({', '.join(roles)}: files were added, removed or "
            "changed in size). Either put them back to go on with that run, or start another with --out NEW_FOLDER."
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole, indented; NaN is refused, undefined figures are null."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def digest_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative paths and file digests; "missing" where there is none."""
    if path.is_dir():
        lines = [
            f"{p.relative_to(path).as_posix()} {digest_path(p)}"
            for p in sorted(path.rglob("*"))
            if p.is_file()
        ]
        return digest_text("\n".join(lines))
    if not path.exists():
        return "missing"
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def digest_samples(samples: Iterable[Sample]) -> str:
    """SHA-256 over ids, file sizes and how labels are read: notices what was added, removed or changed in size, without
    reading it all (see `written_since`)."""
    lines, missing = [], []
    for sample in samples:
        try:
            label = sample.label.stat().st_size if sample.label else "-"
            encoding = "" if sample.encoding == PLAIN else f"\t{sample.encoding}"
            lines.append(f"{sample.id}\t{sample.image.stat().st_size}\t{label}{encoding}")
        except OSError as error:
            missing.append(f"{error.filename}: {error.strerror}")
    if missing:
        raise DataError(faults("Files of the data set cannot be read", missing))
    return digest_text("\n".join(lines))


def written_since(manifest: Manifest, moment: float) -> list[Path]:
    """Images and label maps written after `moment` (seconds since 1970): perhaps with other content of the same size."""
    paths = {
        path
        for samples in manifest.roles().values()
        for sample in samples
        for path in (sample.image, sample.label)
        if path is not None
    }
    return sorted(path for path in paths if path.stat().st_mtime > moment)


def digest_manifest(manifest: Manifest) -> dict[str, str]:
    """Role → digest of its samples."""
    return {role: digest_samples(samples) for role, samples in manifest.roles().items()}


def digest_state(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of a state dict."""
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()
