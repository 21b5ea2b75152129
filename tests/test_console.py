"""A console that goes away, fills up or knows few characters ends no work; Ctrl-C and SIGHUP end it cleanly."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

import darseg
from darseg.errors import Interrupted
from darseg.run.console import Enduring, quiet_writers
from darseg.run.journal import Journal
from darseg.run.signals import catch_signals
from wording import says

CODE = "import sys; sys.argv = ['darseg', *sys.argv[1:]]; from darseg.__main__ import main; main()"
COMMAND = (sys.executable, "-c", CODE)


def closed_pipe() -> io.TextIOWrapper:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_journal_goes_on_when_its_console_has_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", None, Console(file=closed_pipe()))
    with journal.progress("train", 3) as advance:
        for _ in range(3):
            advance()
            journal.say("a line")
    journal.warn("a warning")
    assert [event["text"] for event in journal.events("warning")] == ["a warning"]


def test_a_terminal_that_is_closed_ends_no_progress_bar() -> None:
    controller, terminal = os.openpty()
    stream = os.fdopen(terminal, "w")
    journal = Journal(None, None, Console(file=stream, force_terminal=True))
    with journal.progress("train", 3) as advance:
        advance()
        os.close(controller)
        advance()
        journal.say("nobody reads this")
        advance()
    stream.close()


def test_what_a_full_disk_loses_is_known() -> None:
    with open("/dev/full", "w") as file:
        stream = Enduring(file)
        stream.write("text")
        stream.flush()
        assert stream.lost == "No space left on device"
        stream.let_go()


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("ascii", "a \\u2192 \\xe9 \\udcff"), ("latin-1", "a \\u2192 é \\udcff"), ("utf-8", "a → é \\udcff")],
)
def test_every_console_prints_every_character(encoding: str, printed: str) -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Journal(None, None, Console(file=inner)).say("a → é \udcff")
    inner.flush()
    content = inner.buffer
    assert isinstance(content, io.BytesIO)
    assert content.getvalue().decode(encoding) == f"{printed}\n"


def test_a_closed_pipe_is_quiet_and_a_full_disk_is_said() -> None:
    with closed_pipe() as stdout:
        ended = subprocess.run([*COMMAND, "--help"], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    with open("/dev/full", "w") as stdout:
        ended = subprocess.run([*COMMAND, "--help"], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    says(ended.stderr, "No space left on device")


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2])
def test_control_c_while_modules_are_imported_is_quiet(seconds: float) -> None:
    code = (
        "import sys, time, builtins; sys.argv = ['darseg', 'plan', 'no.yaml']; import darseg; print(flush=True)\n"
        "importing = builtins.__import__\n"
        "def slowly(name, *rest):\n    time.sleep(0.002); return importing(name, *rest)\n"
        "builtins.__import__ = slowly\n"
        "from darseg.__main__ import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_control_c_is_answered_before_anything_is_imported_that_takes_time() -> None:
    source = Path(darseg.__file__).read_text()
    before = source[: source.index("_signal.signal(_signal.SIGINT, _leave)")]
    imported = {line.split()[1] for line in before.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"_signal", "os", "sys"}  # built in, or loaded by Python itself


def test_tensorboards_thread_prints_no_traceback_of_what_is_reported_anyway() -> None:
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    printed: list[object] = []
    ended = quiet_writers(printed.append)
    writer = _AsyncWriterThread.__new__(_AsyncWriterThread)
    for error, thread, count in (
        (FileNotFoundError(), writer, 0),
        (ValueError(), writer, 1),
        (FileNotFoundError(), threading.Thread(), 2),
    ):
        ended(threading.ExceptHookArgs((type(error), error, None, thread)))
        assert len(printed) == count


def test_a_closed_terminal_stops_like_sigterm() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with pytest.raises(Interrupted, match="SIGHUP") as stopped, catch_signals() as stop:
            with stop.patiently():
                os.kill(os.getpid(), signal.SIGHUP)  # noted: training saves its state first
                assert stop()
            stop.check()
        assert stopped.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
