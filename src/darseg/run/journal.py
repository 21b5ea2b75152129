"""What happens in a run, as it happens: JSON lines, TensorBoard, the console."""

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

from darseg.data.files import storage_error

QUIET_SECONDS = 30  # between progress lines where the console is no terminal
Advance = Callable[..., None]


class Journal:
    """Appends events to `journal.jsonl`, scalars to TensorBoard, and shows both on the console."""

    def __init__(self, path: Path | None, tensorboard: Path | None, console: Console) -> None:
        self.path = path
        self.console = console
        self._tensorboard_folder = tensorboard
        self._writer = None

    def event(self, name: str, **fields: Any) -> None:
        """Append one line: time (seconds since 1970), event, fields."""
        if self.path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": name, **fields})
        try:
            # A line cut off by a kill stays a line of its own.
            torn = self.path.exists() and not _ends_with_newline(self.path)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
        except OSError as error:
            raise storage_error(error, self.path) from error

    def scalars(self, step: int, group: str, numbers: Mapping[str, float | None]) -> None:
        """Add figures at a step, counted over the whole run, to TensorBoard; undefined ones are left out."""
        if self._tensorboard_folder is None:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._writer = SummaryWriter(self._tensorboard_folder, purge_step=step)
            for name, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)
        except OSError as error:  # of its thread that writes
            raise storage_error(error, self._tensorboard_folder) from error

    def events(self, name: str) -> list[dict]:
        """All events of that name so far; lines cut off by a kill are passed over."""
        if self.path is None or not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") == name:
                found.append(entry)
        return found

    def say(self, text: str) -> None:
        """A line on the console."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning on the console and in the journal."""
        self.console.print(f"[yellow]warning[/yellow]: {escape(text)}", highlight=False, soft_wrap=True)
        self.event("warning", text=text)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Generator[Advance, None, None]:
        """A bar with rate and time left; a line every 30 s where the console is no terminal.

        Yields `advance(note="")`, to be called after each unit of work.
        """
        began, done, said = time.monotonic(), start, time.monotonic()

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
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= QUIET_SECONDS or done == total:
                said = now
                left = (total - done) / max(rate(), 1e-9)
                self.say(f"{title}: {done}/{total}, {rate():.2f}/s, {left:.0f} s left {note}".rstrip())

        yield advance_quietly

    def close(self) -> None:
        if self._writer is None or self._tensorboard_folder is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            raise storage_error(error, self._tensorboard_folder) from error


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
