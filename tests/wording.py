"""What messages say: each test names the facts a message must hold, and one file, `wording.txt`, keeps the sentences.

    with refused(DataError, "photo.png", "23", "0 to 18"):   # the facts: path, number, key, command
        read_label(path)

So a sentence can be improved without touching tests: change it, run the tests with DARSEG_UPDATE_WORDING=1, and review
the change of `wording.txt`. Facts are compared always; sentences against the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).with_name("wording.txt")
UPDATE = "DARSEG_UPDATE_WORDING"
HEAD = "=== "

_TEMPORARY = re.compile(
    r"(?:/private)?/\S*?/pytest-of-[^/\s]+/pytest-\d+(?:/popen-gw\d+)?/[\w.\[\]-]+?\d+(?=[/\s'\",:;)\]]|\.?(?:\s|$))"
)
_used: Counter[str] = Counter()


@contextlib.contextmanager
def refused(
    kind: type[BaseException], *facts: str, vary: Sequence[str] = ()
) -> Iterator[pytest.ExceptionInfo]:
    """The block raises `kind`, and its message holds all `facts`.

    Args:
        facts: parts of the message that are true of this case: a path, line, number, key, or command.
        vary: regular expressions of what differs between machines or runs; replaced before the text is compared.
    """
    with pytest.raises(kind) as caught:
        yield caught
    says(str(caught.value), *facts, vary=vary)


def says(text: str, *facts: str, vary: Sequence[str] = ()) -> None:
    """`text` holds all `facts`, and its wording is that of `wording.txt`. Arguments as for `refused`."""
    missing = [fact for fact in facts if fact not in text]
    assert not missing, f"{missing} not in the message:\n{text}"
    test = os.environ["PYTEST_CURRENT_TEST"].rsplit(" (", 1)[0].removeprefix("tests/")
    _used[test] += 1
    name = test if _used[test] == 1 else f"{test} #{_used[test]}"
    plain = _TEMPORARY.sub("TMP", text).replace(str(REPOSITORY), "REPOSITORY")
    for pattern in vary:
        plain = re.sub(pattern, "…", plain)
    plain = "\n".join(line.rstrip() for line in plain.strip().splitlines())
    if os.environ.get(UPDATE):
        _store(name, plain)
        return
    known = read_snapshot().get(name)
    assert plain == known, (
        f"The wording of {name} is not that of {SNAPSHOT.name}. If it should be, run this test with {UPDATE}=1 and "
        f"review the file.\n--- {SNAPSHOT.name}\n{known}\n--- now\n{plain}"
    )


def read_snapshot() -> dict[str, str]:
    """Test → the text it saw when the file was last updated."""
    return _parse(SNAPSHOT.stat().st_mtime_ns) if SNAPSHOT.exists() else {}


@functools.lru_cache(maxsize=1)
def _parse(written: int) -> dict[str, str]:
    entries = SNAPSHOT.read_text(encoding="utf-8").split(f"\n{HEAD}")
    parts = (entry.removeprefix(HEAD).partition("\n") for entry in entries if entry.strip())
    return {name: text.strip("\n") for name, _, text in parts}


def _store(name: str, text: str) -> None:
    """Put one entry into the file; several processes of pytest may do so at once."""
    with open(SNAPSHOT.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = read_snapshot() | {name: text}
        content = "\n\n".join(f"{HEAD}{key}\n{entries[key]}" for key in sorted(entries))
        aside = SNAPSHOT.with_suffix(".aside")
        aside.write_text(content + "\n", encoding="utf-8")
        aside.replace(SNAPSHOT)
