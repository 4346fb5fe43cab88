"""Expert load of the last minutes: windows summed over the ranks, in a ring of bounded size.

Knows neither models nor engine, nor where experts are: counts in, windows of counts out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

MAX_WINDOWS = 64
"""Closed windows that are kept, each int64 [2, L, E + P]: 32 MB at 58 layers of 256 experts in 288 slots."""

MAX_REPORTS = 16
"""Reports of a rank (one a second) in a window at most: 64 windows are then 17 minutes of traffic."""

PAUSE_SECONDS = 2.0
"""A report that comes so long after the last one begins a new window: there was no traffic in between."""


@dataclass(frozen=True, eq=False)
class LoadWindow:
    """What all ranks counted in the steps start_step <= step < end_step.

    load: int64 [2, L, E], (token, choice) counts of logical experts, prefill and decode. tokens: of each phase.
    start, end: seconds since the epoch. slots: int64 [2, L, P], what was given to each slot; None where nobody
    told, or where the slots have become fewer in between.
    """

    start_step: int
    end_step: int
    start: float
    end: float
    tokens: tuple[int, int]
    load: Counts
    slots: Counts | None = None

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step

    def __add__(self, other: LoadWindow) -> LoadWindow:
        return LoadWindow(
            min(self.start_step, other.start_step),
            max(self.end_step, other.end_step),
            min(self.start, other.start),
            max(self.end, other.end),
            (self.tokens[0] + other.tokens[0], self.tokens[1] + other.tokens[1]),
            self.load + other.load,
            _both(self.slots, other.slots),
        )


def _both(one: Counts | None, other: Counts | None) -> Counts | None:
    known = one is not None and other is not None and one.shape == other.shape
    return one + other if known else None  # type: ignore[operator]


class LoadRing:
    """Takes the ranks' reports and keeps the newest windows, always whole ones.

    A window takes one report of each rank, so it is a second of traffic or more. When the ring is full,
    neighbours are merged in pairs and windows from then on take twice as many reports; once they take
    MAX_REPORTS, the oldest is dropped instead.
    """

    def __init__(self, max_windows: int = MAX_WINDOWS, max_reports: int = MAX_REPORTS):
        """max_windows: an even number."""
        assert max_windows % 2 == 0
        self._max_windows = max_windows
        self._max_reports = max_reports
        self._reports = 1  # of each rank in a window
        self._closed: list[LoadWindow] = []
        self._open: LoadWindow | None = None
        self._seen: Counter[int] = Counter()  # reports in the open window by rank
        self._total: Counts | None = None

    def add(self, rank: int, report: LoadWindow) -> None:
        """One rank's counts since its last report, in the order in which they come."""
        self._total = report.load.copy() if self._total is None else self._total + report.load
        if self._open is not None and (
            self._seen[rank] >= self._reports or report.end - self._open.end > PAUSE_SECONDS
        ):
            self._close(self._open)
            self._open = None
        self._open = report if self._open is None else self._open + report
        self._seen[rank] += 1

    def _close(self, window: LoadWindow) -> None:
        self._seen.clear()
        self._closed.append(window)
        if len(self._closed) < self._max_windows:
            return
        if self._reports < self._max_reports:
            self._closed = [a + b for a, b in zip(self._closed[::2], self._closed[1::2], strict=True)]
            self._reports *= 2
        else:
            del self._closed[0]

    def forget_slots(self) -> None:
        """The slots are numbered anew: what was given to the old ones means nothing any more."""
        self._closed = [replace(window, slots=None) for window in self._closed]
        self._open = None if self._open is None else replace(self._open, slots=None)

    @property
    def windows(self) -> list[LoadWindow]:
        """Oldest first, the last one so far; a list of the caller's own, of values that do not change."""
        return [*self._closed, *([] if self._open is None else [self._open])]

    @property
    def total(self) -> Counts | None:
        """int64 [2, L, E] of everything since the start, None before the first report."""
        return self._total

    def recent(self, seconds: float) -> LoadWindow | None:
        """The windows of the last so many seconds of traffic as one; the newest at least."""
        windows = self.windows
        if not windows:
            return None
        found = windows[-1]
        for window in reversed(windows[:-1]):
            if window.start < windows[-1].end - seconds:
                break
            found = found + window
        return found
