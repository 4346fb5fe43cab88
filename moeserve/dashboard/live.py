"""The dashboard's figures of a running engine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from moeserve.dashboard.recording import Recording
from moeserve.eplb.types import Floats, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.stats.snapshot import PHASES, LoadWindow


class LiveSource:
    """The counts of a running engine, and what its balancer did."""

    file: str | None = None

    def __init__(self, balance: ExpertBalance) -> None:
        self.model = balance.model
        self._balance = balance
        self._begun = time.time_ns() // 1_000_000  # a server that starts again has other versions

    @property
    def state(self) -> str | None:
        return self._balance.state

    @property
    def version(self) -> str:
        balance, windows = self._balance, self._balance.ring.windows
        newest = f"{len(windows)}.{windows[-1].end:.3f}" if windows else "0"
        decisions = sum(balance.online.ledger.results.values()) if balance.online is not None else 0
        return f"{self._begun}.{balance.placement.digest[:8]}.{balance.state}.{decisions}.{newest}"

    def read(self) -> Recording | None:
        balance, windows = self._balance, self._balance.ring.windows
        if not windows:
            return None
        placement = balance.placement
        return Recording(
            self.version,
            lambda: balance.load_of(windows, placement),
            placement,
            balance.topology,
            windows[-1].end,
            {str(phase): found for phase, found in balance.imbalance().items()},
            previous=balance.previous,
            rebalances=tuple(balance.online.history()) if balance.online is not None else (),
            make_measured=lambda: measured(windows, balance.topology),
            expert_bytes=balance.expert_bytes,
            routing=balance.split,
            lost=tuple(balance.lost),
        )


def measured(windows: Sequence[LoadWindow], topology: Topology) -> dict[str, Floats]:
    """[W, L, G] by phase: what each rank was given, of the phases whose windows all say it for these slots."""
    found: dict[str, Floats] = {}
    for i, phase in enumerate(PHASES):
        slots = [None if window.slots is None else window.slots[i] for window in windows if window.tokens[i]]
        known = [counts for counts in slots if counts is not None and counts.shape[-1] == topology.num_slots]
        if known and len(known) == len(slots):
            stacked = np.stack(known).astype(np.float64)
            found[phase] = stacked.reshape(*stacked.shape[:2], topology.num_ranks, -1).sum(axis=-1)
    return found
