"""Reports become windows, however they come in."""

from __future__ import annotations

import numpy as np

from moeserve.online.windows import PREFILL_AFTER, BalancedPhase, Windows
from moeserve.stats.snapshot import LoadWindow


def report(start: int, end: int, count: int = 1, tokens: tuple[int, int] = (0, 1)) -> LoadWindow:
    return LoadWindow(start, end, start / 10, end / 10, tokens, np.full((2, 1, 2), count))


def test_a_window_closes_when_all_ranks_have_told() -> None:
    windows = Windows(2, 10)
    assert not list(windows.add(0, report(0, 10)))
    (window,) = windows.add(1, report(0, 10, 2))
    assert (window.start_step, window.end_step, window.tokens) == (0, 10, (0, 2))
    assert (window.load == 3).all()


def test_a_rank_that_says_nothing_holds_nothing_up_and_late_counts_are_not_lost() -> None:
    windows = Windows(3, 10)
    list(windows.add(0, report(0, 10)))
    list(windows.add(1, report(0, 10)))
    (first,) = windows.add(0, report(10, 20))
    assert first.end_step == 10 and (first.load == 2).all()
    list(windows.add(2, report(0, 10)))  # late
    (second,) = windows.add(1, report(10, 20))
    assert second.end_step == 20 and (second.load == 3).all()


def test_what_is_told_when_the_traffic_stops_goes_on_with_what_comes_next() -> None:
    windows = Windows(2, 10)
    for rank in (0, 1):
        assert not list(windows.add(rank, report(0, 4)))
    assert not list(windows.add(0, report(4, 10)))
    (window,) = windows.add(1, report(4, 10))
    assert (window.start_step, window.end_step) == (0, 10) and (window.load == 4).all()


def test_the_phase_with_most_steps_is_balanced() -> None:
    balanced = BalancedPhase()
    assert balanced.choose(report(0, 1, tokens=(5, 0))) == "prefill"
    assert balanced.choose(report(0, 1, tokens=(500, 1))) == "decode"
    for _ in range(PREFILL_AFTER - 1):
        assert balanced.choose(report(0, 1, tokens=(5, 0))) is None
    assert balanced.choose(report(0, 1, tokens=(0, 0))) is None
    assert balanced.choose(report(0, 1, tokens=(5, 0))) == "prefill"
