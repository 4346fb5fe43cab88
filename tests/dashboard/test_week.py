"""A week of counting takes no more memory than its first half hour."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from moeserve import expert_balance
from moeserve.dashboard import panels
from moeserve.dashboard.live import LiveSource
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts
from moeserve.stats.snapshot import MAX_REPORTS, MAX_WINDOWS

LAYERS, EXPERTS, RANKS = 2, 8, 2
BUSY = [1.0] * 3 * MAX_WINDOWS * MAX_REPORTS  # seconds between reports: traffic without a break
WEEK = [61.0] * (7 * 24 * 60)  # then a request a minute


@pytest.mark.slow
def test_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.8e9]
    monkeypatch.setattr(expert_balance.time, "time", lambda: now[0])
    placement, topology = Placement.identity(LAYERS, EXPERTS, EXPERTS), Topology.of(RANKS, EXPERTS)
    balance = ExpertBalance(placement, topology, layers=(1, 2), model="m", top_k=1, expert_groups=1)
    source = LiveSource(balance)
    counts = np.ones((2, LAYERS, EXPERTS), "<u4").tobytes()
    sizes = []
    for i, seconds in enumerate(BUSY + WEEK):
        now[0] += seconds
        for rank in range(RANKS):
            message = ExpertCounts(rank, i, 1, 1.0, (EXPERTS, EXPERTS), counts, slot_counts=counts)
            balance.add(message)
        if i % 500 == 499:
            recording = source.read()
            assert recording is not None and panels.summary(source, recording)["state"] == "ready"
            sizes.append(len(pickle.dumps((balance.ring, balance.generations))))
    each = 2 * 2 * LAYERS * EXPERTS * 8  # logical and slots, two phases
    assert max(sizes) < 1.1 * max(sizes[:6]) and max(sizes) < MAX_WINDOWS * (each + 1000)
    windows = balance.ring.windows
    assert len(windows) <= MAX_WINDOWS and windows[-1].end == now[0]
