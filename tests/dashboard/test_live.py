"""What a running engine's windows say of its ranks, where they say it."""

from __future__ import annotations

import numpy as np

from moeserve.dashboard import advice, panels
from moeserve.dashboard.live import LiveSource, measured
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts
from moeserve.stats.snapshot import LoadWindow


def window(decode: int, slots: list[int] | None, prefill: int = 0) -> LoadWindow:
    given = None if slots is None else np.array([[[0] * len(slots)], [slots]])
    return LoadWindow(0, 1, 0.0, 1.0, (prefill, decode), np.zeros((2, 1, 3), np.int64), given)


def test_slots_are_added_up_by_rank() -> None:
    found = measured([window(6, [1, 2, 3, 0]), window(4, [0, 0, 4, 0])], Topology.of(2, 4))
    assert list(found) == ["decode"] and found["decode"].tolist() == [[[3.0, 3.0]], [[0.0, 4.0]]]


def test_half_known_is_unknown() -> None:
    """Of windows that nobody measured, or of when there were other slots: before a rank was lost."""
    topology = Topology.of(2, 4)
    assert measured([window(6, [1, 2, 3, 0]), window(4, None)], topology) == {}
    assert measured([window(6, [1, 2, 3, 0, 5, 5]), window(4, [0, 0, 4, 0])], topology) == {}
    assert list(measured([window(4, None, prefill=0), window(0, None)], topology)) == []


def test_the_version_tells_of_counts_and_of_placements() -> None:
    placement = Placement.identity(1, 3, 4)
    balance = ExpertBalance(placement, Topology.of(2, 4), layers=(0,), model="m", top_k=1, expert_groups=1)
    source = LiveSource(balance)
    versions = [source.version]
    assert source.read() is None
    counts = np.ones((2, 1, 3), "<u4").tobytes()
    balance.add(ExpertCounts(0, 5, 5, 1.0, (3, 3), counts))
    versions.append(source.version)
    balance.follow(Placement(np.array([[0, 1, 2, 2]]), 3, generation=1))
    versions.append(source.version)
    assert len(set(versions)) == 3
    recording = source.read()
    assert recording is not None and recording.previous == placement and recording.measured == {}


def test_after_the_loss_of_a_rank() -> None:
    """Three ranks of two slots, of which the middle one goes; the counts of before stay."""
    placement = Placement(np.array([[0, 1, 1, 2, 2, 0]]), 3)
    balance = ExpertBalance(placement, Topology.of(3, 6), layers=(0,), model="m", top_k=1, expert_groups=1)
    counts = np.array([[[0, 0, 0]], [[4, 4, 4]]], "<u4").tobytes()
    slots = np.array([[[0] * 6], [[2, 2, 2, 2, 2, 2]]], "<u4").tobytes()
    balance.add(ExpertCounts(0, 5, 5, 1.0, (0, 12), counts, slot_counts=slots))
    source = LiveSource(balance)
    before = source.version
    balance.regroup(Placement(np.array([[0, 1, 2, 0]]), 3, generation=1), [1])
    recording = source.read()
    assert recording is not None and source.version != before
    head = panels.summary(source, recording)
    assert (head["lost"], head["ep_size"], head["num_slots"]) == ([1], 2, 4)
    found = panels.history(recording, "decode", 0)
    assert (found["basis"], found["mean"]) == ("placement", [1.0])
    assert panels.layer_detail(recording, "decode", 0, None)["previous"] is None
    assert advice.verdict(recording, "decode")["as_it_was"] is None
