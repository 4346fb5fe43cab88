"""What became of each decision: the entries of /eplb/status, the totals of the metrics, the lines of the log."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeserve.eplb.rebalancer import Decision
from moeserve.server.metrics import Histogram
from moeserve.stats.snapshot import Phase

log = logging.getLogger(__name__)

Trigger = Literal["periodic", "requested", "placement", "resume"]
Result = Literal["applied", "skipped", "failed"]

KEPT, KEPT_SKIPPED = 64, 16  # records
KEPT_TABLES = 16  # of bytes from rank to rank: 72 ranks make one of 5,184 numbers
ALIKE_SECONDS = 30.0  # between two lines of the log about decisions that are skipped for the same reason
_DURATIONS = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5), *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0))


@dataclass
class Rebalance:
    """One decision and what became of it.

    before, predicted, after: imbalance (max/mean rank load, mean over layers) of what was in force, of the plan,
    and of the first full window that followed it. generation: in force when it was over. bytes: between ranks;
    rank_bytes [G, G]: from rank, to rank, for the newest. gain_seconds: what the moves were expected to save over
    the horizon. time: seconds since the epoch when it was over.
    """

    trigger: Trigger
    phase: Phase | None
    result: Result | None = None
    reason: str = ""
    generation: int = 0
    before: float | None = None
    predicted: float | None = None
    after: float | None = None
    moves: int = 0
    bytes: int = 0
    bytes_by_link: Counter[str] = field(default_factory=Counter)
    rank_bytes: npt.NDArray[np.int64] | None = None
    solve_seconds: float = 0.0
    migration_seconds: float = 0.0
    stall_seconds: float = 0.0
    gain_seconds: float | None = None
    time: float = 0.0

    @property
    def net_seconds(self) -> float | None:
        """Expected gain less the stall that was paid for it."""
        return None if self.gain_seconds is None else self.gain_seconds - self.stall_seconds

    def expect(self, decision: Decision) -> None:
        self.before, self.predicted = decision.before, decision.predicted
        self.gain_seconds, self.reason = decision.gain_seconds, decision.reason
        if decision.gain_seconds is not None and decision.cost_seconds is not None:
            self.reason += (
                f": moves save {decision.gain_seconds:.3g} s and cost {decision.cost_seconds:.3g} s"
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "trigger": self.trigger,
            "phase": self.phase,
            "result": self.result,
            "reason": self.reason,
            "before": _short(self.before),
            "predicted": _short(self.predicted),
            "after": _short(self.after),
            "moves": self.moves,
            "bytes": self.bytes,
            "bytes_by_link": dict(self.bytes_by_link),
            "rank_bytes": None if self.rank_bytes is None else self.rank_bytes.tolist(),
            "solve_seconds": _short(self.solve_seconds),
            "migration_seconds": _short(self.migration_seconds),
            "stall_seconds": _short(self.stall_seconds),
            "net_seconds": _short(self.net_seconds),
            "time": round(self.time, 3),
        }

    def __str__(self) -> str:
        text = f"rebalance ({self.trigger}) {self.result}: {self.reason}; imbalance {_shown(self.before)}"
        if self.result != "applied":
            return text
        return (
            f"{text}, predicted {_shown(self.predicted)}; generation {self.generation}, {self.moves} moves, "
            f"{self.bytes} bytes, {self.migration_seconds:.3f} s, steps held up {self.stall_seconds * 1e3:.1f} ms"
        )


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.4f}"


class Ledger:
    """All decisions, counted since the start; the newest of them whole."""

    def __init__(self) -> None:
        self.results: Counter[tuple[Trigger, Result]] = Counter()
        self.slots = 0
        self.bytes: Counter[str] = Counter(intra_node=0, inter_node=0)
        self.stall_seconds = 0.0
        self.solve, self.migration = Histogram(_DURATIONS), Histogram(_DURATIONS)
        self._acted: deque[Rebalance] = deque(maxlen=KEPT)
        self._skipped: deque[Rebalance] = deque(maxlen=KEPT_SKIPPED)
        self._told = ("", -ALIKE_SECONDS, 0)  # reason without its figures, when it was told, how many since

    def newest_first(self) -> list[Rebalance]:
        """Those that were skipped fall out sooner."""
        return sorted((*self._acted, *self._skipped), key=lambda record: -record.time)

    def finish(self, record: Rebalance, result: Result, reason: str, generation: int) -> None:
        """Enter a decision that is over, and tell of it in a line of the log."""
        record.result, record.reason, record.generation = result, reason, generation
        record.time = time.time()
        self.results[record.trigger, result] += 1
        if result == "skipped":
            self._skipped.append(record)
            self._tell_skipped(record)
            return
        self._acted.append(record)
        for old in [one for one in self._acted if one.rank_bytes is not None][:-KEPT_TABLES]:
            old.rank_bytes = None
        log.log(logging.WARNING if result == "failed" else logging.INFO, "%s", record)

    def _tell_skipped(self, record: Rebalance) -> None:
        kind = "".join(character for character in record.reason if not character.isdigit())
        last, since, alike = self._told
        now = time.monotonic()
        if kind == last and now - since < ALIKE_SECONDS:
            self._told = (last, since, alike + 1)
            return
        log.info("%s%s", record, f" ({alike} more were skipped as the one before)" if alike else "")
        self._told = (kind, now, 0)
