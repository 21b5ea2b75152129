"""Work in threads: results in the order of the items, whatever their number."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darseg.data.threads import CHUNK, CHUNKS, MOST_THREADS, in_threads


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * CHUNK * CHUNKS), st.integers(1, MOST_THREADS))
def test_results_come_in_the_order_of_the_items(count: int, threads: int) -> None:
    items = list(range(count))
    assert list(in_threads(lambda item: item * item, items, threads)) == [item * item for item in items]


def test_few_items_are_spread_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    barrier = threading.Barrier(4, timeout=30)
    assert sorted(in_threads(lambda _: barrier.wait(), range(4))) == [0, 1, 2, 3]  # or none would go on


def test_after_an_error_no_more_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(0.001)
        return item

    found = []
    with pytest.raises(ValueError, match="three"):
        for item in in_threads(work, range(1000)):
            found.append(item)
    assert found == [0, 1, 2, 3][: len(found)] and len(begun) < 1000
