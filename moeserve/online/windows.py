"""The ranks' reports put together to windows, and the phase that is balanced. Knows no placement."""

from __future__ import annotations

from collections.abc import Iterator

from moeserve.stats.snapshot import LoadWindow, Phase

PREFILL_AFTER = 2  # windows in a row without decode after which prefill is balanced


class Windows:
    """Windows of `steps` steps or more, each with all that the ranks report of its steps."""

    def __init__(self, num_ranks: int, steps: int):
        self._num_ranks, self._steps = num_ranks, steps
        self._open: LoadWindow | None = None
        self._seen: set[int] = set()

    def add(self, rank: int, report: LoadWindow) -> Iterator[LoadWindow]:
        """The windows that this report closes: when all ranks have told of its last step, or one tells of a later
        one. What comes late counts in the window that is open then."""
        if self._open is not None and report.end_step > self._open.end_step and self._seen:
            yield from self._close()
        self._open = report if self._open is None else self._open + report
        self._seen.add(rank)
        if len(self._seen) == self._num_ranks:
            yield from self._close()

    def _close(self) -> Iterator[LoadWindow]:
        """Ranks also report in between when the traffic stops: such a window goes on with the next report."""
        self._seen.clear()
        if self._open is not None and self._open.steps >= self._steps:
            yield self._open
            self._open = None


class BalancedPhase:
    """Decode wherever there is decode, which is most steps; prefill where there is none. Never both at a time, as
    the two load the experts differently."""

    def __init__(self) -> None:
        self.phase: Phase | None = None
        self._without_decode = 0

    def choose(self, window: LoadWindow) -> Phase | None:
        """The phase of this window that counts, None where it has nothing to say. `phase` is then the same."""
        prefill, decode = window.tokens
        self._without_decode = 0 if decode else self._without_decode + 1
        if decode:
            self.phase = "decode"
        elif not prefill:
            return None
        elif self.phase != "decode" or self._without_decode >= PREFILL_AFTER:
            self.phase = "prefill"
        else:
            return None
        return self.phase
