"""Windows add up to what was reported, stay whole, and stay few."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeserve.stats.snapshot import LoadRing, LoadWindow


def report(step: int, at: float, prefill: int = 0, decode: int = 0, steps: int = 1) -> LoadWindow:
    """Two layers of three experts: expert 0 has all of prefill, expert 2 all of decode."""
    load = np.zeros((2, 2, 3), np.int64)
    load[0, :, 0], load[1, :, 2] = prefill, decode
    return LoadWindow(step - steps, step, at - 1.0, at, (prefill, decode), load)


def tokens(ring: LoadRing) -> list[tuple[int, int]]:
    return [window.tokens for window in ring.windows]


def test_a_window_takes_one_report_of_each_rank() -> None:
    ring = LoadRing()
    assert ring.windows == [] and ring.total is None and ring.recent(30) is None
    ring.add(0, report(10, 1.0, prefill=5, steps=10))
    ring.add(1, report(11, 1.1, prefill=7, decode=1, steps=11))
    ring.add(1, report(21, 2.1, decode=2, steps=10))
    ring.add(0, report(20, 2.2, decode=3, steps=10))
    assert tokens(ring) == [(12, 1), (0, 5)]
    first, second = ring.windows
    assert (first.start_step, first.steps, first.start, first.end) == (0, 11, 0.0, 1.1)
    assert (second.start_step, second.end_step) == (10, 21)
    assert first.load[0].tolist() == [[12, 0, 0]] * 2
    assert first.load[1].tolist() == [[0, 0, 1]] * 2
    assert ring.total is not None and ring.total[1].tolist() == [[0, 0, 6]] * 2


def test_a_pause_ends_a_window() -> None:
    ring = LoadRing()
    ring.add(0, report(1, 1.0, decode=1))
    ring.add(1, report(2, 100.0, decode=1))  # its first, but of other traffic
    assert tokens(ring) == [(0, 1), (0, 1)]


def test_what_was_handed_out_does_not_change() -> None:
    ring = LoadRing()
    ring.add(0, report(1, 1.0, decode=1))
    windows = ring.windows
    ring.add(1, report(1, 1.1, decode=1))
    assert len(windows) == 1 and windows[0].tokens == (0, 1) and windows[0].load.sum() == 2


def test_a_full_ring_merges_neighbours_then_drops_the_oldest() -> None:
    ring = LoadRing(max_windows=4, max_reports=2)
    for second in range(5):
        ring.add(0, report(second + 1, float(second), decode=10**second))
    assert tokens(ring) == [(0, 11), (0, 1100), (0, 10000)]  # four were full: now pairs, and the open one
    for second in range(5, 10):
        ring.add(0, report(second + 1, float(second), decode=10**second))
    assert tokens(ring) == [(0, 11 * 10**n) for n in (2, 4, 6, 8)]  # 0 and 1 are gone
    assert ring.total is not None and ring.total[1, 0, 2] == 1111111111


def test_recent_is_measured_in_traffic_and_never_empty() -> None:
    ring = LoadRing()
    for second in range(10):
        ring.add(0, report(second + 1, float(second), decode=10**second))
    found = ring.recent(3.0)
    assert found is not None
    assert found.tokens == (0, 111 * 10**7) and found.steps == 3
    newest = ring.recent(0.0)
    assert newest is not None and newest.tokens == (0, 10**9)
    everything = ring.recent(1000.0)
    assert everything is not None and everything.tokens == (0, 1111111111)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.floats(0, 5)), max_size=200))
def test_nothing_is_lost_until_the_oldest_is_dropped(reports: list[tuple[int, int, float]]) -> None:
    ring = LoadRing(max_windows=8, max_reports=1 << 20)  # merges for ever
    now = 0.0
    for rank, count, wait in reports:
        now += wait
        ring.add(rank, report(1, now, decode=count))
    assert sum(decode for _, decode in tokens(ring)) == sum(count for _, count, _ in reports)
    assert len(ring.windows) <= 8
    starts = [window.start for window in ring.windows]
    assert starts == sorted(starts)
