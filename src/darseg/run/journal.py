"""Report what happens in a run, while it happens: as JSON lines, in TensorBoard, and on the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from darseg.data.files import open_file, open_to_append, parse_json, read_text, storage_error
from darseg.errors import RunError, printable
from darseg.run.console import enduring
from darseg.run.records import is_number

QUIET_SECONDS = 30  # between progress lines if the console is not a terminal
Advance = Callable[..., None]

ABSENT = "No label map has pixels of these classes, so they are never pseudo-labeled"
"""Begins the warning of classes without pixels in the labeled masks; the report lists the same sentence."""
NEVER = "never predicted, so not pseudo-labeled"
"""Part of the warning of classes that a round never predicts; the report lists the same sentence."""
UNSHOWN = "no confidence shows the target on held-out images, so not pseudo-labeled"
"""Part of the warning of classes that a round with ratio auto does not label; the report lists the same sentence."""
_FORMER = {
    "absent from all labelled masks, so never pseudo-labelled": ABSENT,
    "never predicted, so not pseudo-labelled": NEVER,
}


def in_current_words(warning: str) -> str:
    """A warning of a journal, in this version's words if darseg 0.2 wrote it in others."""
    for former, current in _FORMER.items():
        warning = warning.replace(f"{former}: ", f"{current}: ", 1)
    return warning


class Journal:
    """Appends events to `journal.jsonl` and scalars to TensorBoard, and prints on the console.

    Args:
        path: of `journal.jsonl`; None: events are dropped.
        tensorboard: folder for TensorBoard's files; None: scalars are dropped.
        console: where lines and progress go.
    """

    def __init__(self, path: Path | None, tensorboard: Path | None, console: Console) -> None:
        self.path = path
        self.console = console
        console.file = enduring(console.file)
        self._tensorboard_folder = tensorboard
        self._writer = None

    def event(self, name: str, **fields: Any) -> None:
        """Append one line with time (seconds since 1970), event, and fields. Raises StorageError."""
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": name, **fields})
        try:
            # If a kill cut off the last line, the new one must not continue it.
            torn = self.path.exists() and not _ends_with_newline(self.path)
            with open_to_append(self.path) as file:
                file.write((("\n" if torn else "") + line + "\n").encode())
        except OSError as error:
            raise storage_error(error, self.path) from error

    def scalars(self, step: int, group: str, numbers: Mapping[str, float | None]) -> None:
        """Add figures to TensorBoard. Raises StorageError.

        Args:
            step: counted over the whole run.
            group: prefix of the names.
            numbers: name → value; None, an undefined figure, is left out.
        """
        if self._tensorboard_folder is None:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._writer = SummaryWriter(self._tensorboard_folder, purge_step=step)
            for name, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:  # raised by the writer's own thread
            raise storage_error(error, self._tensorboard_folder) from error

    def events(self, *names: str) -> list[dict]:
        """All events with these names so far, in order. Lines that a kill cut off are skipped."""
        if self.path is None or not self.path.exists():
            return []
        try:
            lines = read_text(self.path, errors="replace").splitlines()
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be read: {error.strerror or error}. Check its permissions, or restore it."
            ) from error
        entries = []
        for line in lines:
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") in names and _is_whole(entry):
                entries.append(entry)
        return entries

    def say(self, text: str) -> None:
        """Print a line on the console."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on the console and add it to the journal."""
        self.console.print(
            f"[yellow]warning[/yellow]: {escape(printable(text))}", highlight=False, soft_wrap=True
        )
        self.event("warning", text=text)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Generator[Advance, None, None]:
        """Show a bar with rate and time left, or print a line every 30 s if the console is not a terminal.

        Yields `advance(note="")`, to be called after each unit of work.

        Args:
            title: what is done.
            total: units of work.
            start: units that were done before.
        """
        began, done, printed = time.monotonic(), start, time.monotonic()

        def rate() -> float:
            return (done - start) / max(time.monotonic() - began, 1e-9)

        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with Progress(*columns, console=self.console) as bar:
                task = bar.add_task(title, total=total, completed=start, rate="", note="")

                def advance(note: str = "") -> None:
                    nonlocal done
                    done += 1
                    fields: dict[str, Any] = {"note": note} if note else {}
                    bar.update(task, completed=done, rate=f"{rate():.2f}/s", **fields)

                yield advance
            return

        def advance_quietly(note: str = "") -> None:
            nonlocal done, printed
            done += 1
            now = time.monotonic()
            if now - printed >= QUIET_SECONDS or done == total:
                printed = now
                left = (total - done) / max(rate(), 1e-9)
                self.say(f"{title}: {done}/{total}, {rate():.2f}/s, {left:.0f} s left {note}".rstrip())

        yield advance_quietly

    def close(self) -> None:
        """Write what TensorBoard still holds. Raises StorageError."""
        if self._writer is None or self._tensorboard_folder is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            raise storage_error(error, self._tensorboard_folder) from error


EVENT_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "time": lambda value: is_number(value) and 0 <= value < LATEST,
    "round": lambda value: type(value) is int and 0 <= value < 1 << 31,
    "step": lambda value: type(value) is int and 0 <= value < 1 << 53,
    "seconds": lambda value: is_number(value) and value >= 0,
}
"""Fields of events that are computed with. Others are only shown."""

NEEDED = {
    "step": {"round", "step"},
    "checkpoint": {"round", "step", "seconds"},
    "fold_checkpoint": {"round", "step", "seconds"},
}
"""Event → its fields that are always there."""

LATEST = 253_402_300_800
"""Seconds from 1970 to the year 10000, which no calendar here knows."""


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an event has the fields it needs, and those of EVENT_FIELDS are of their type."""
    return NEEDED.get(entry["event"], set()) <= entry.keys() and all(
        holds(entry[name]) for name, holds in EVENT_FIELDS.items() if name in entry
    )


def _ends_with_newline(path: Path) -> bool:
    with open_file(path) as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
