"""Counts and a placement give the rank loads and imbalance that can be worked out by hand."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from moeserve import expert_balance
from moeserve.eplb.formats.placement import parse_placement
from moeserve.eplb.formats.stats import format_stats, parse_stats
from moeserve.eplb.types import Placement, Topology
from moeserve.expert_balance import ExpertBalance
from moeserve.messages import ExpertCounts

TWICE = Placement(np.array([[0, 1, 0, 2], [0, 1, 2, 0], [1, 0, 2, 0]]), 3, generation=5)
"""Three layers of three experts on two ranks; expert 0 stands twice: on ranks 0 and 1."""


def balance_of(placement: Placement = TWICE, num_ranks: int = 2) -> ExpertBalance:
    topology = Topology.of(num_ranks, placement.num_slots)
    return ExpertBalance(placement, topology, layers=(1, 2, 4), model="m", top_k=2, expert_groups=1)


def counts(rank: int, prefill: list[int], decode: list[int], step: int = 10) -> ExpertCounts:
    """The same counts in each of three layers; top_k 2."""
    data = np.array([[prefill] * 3, [decode] * 3], "<u4").tobytes()
    tokens = (sum(prefill) // 2, sum(decode) // 2)
    return ExpertCounts(rank, step, 10, 1.0, tokens, data)


def test_rank_load_splits_replicas_evenly_and_keeps_phases_apart() -> None:
    balance = balance_of()
    assert balance.imbalance() == {} and not balance.rank_tokens().any()
    balance.add(counts(0, [4, 2, 0], [0, 0, 0]))
    balance.add(counts(1, [4, 0, 2], [0, 1, 5]))
    # prefill 8, 2, 2: layers 0 to 2 have 4 + 2 on rank 0 and 4 + 2 on rank 1; decode 0, 1, 5
    assert balance.rank_tokens().tolist() == [[18.0, 18.0], [3.0, 15.0]]
    found = balance.imbalance()
    assert (found["prefill"].worst, found["prefill"].mean) == (1.0, 1.0)
    assert found["decode"].mean == pytest.approx(5 / 3) and found["decode"].steps == 10


def test_worst_median_and_mean_are_over_layers() -> None:
    rows = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3]])
    balance = balance_of(Placement(rows, 4))
    balance.add(counts(0, [0] * 4, [6, 2, 0, 0]))  # all on rank 0, all on rank 0, 6 against 2
    found = balance.imbalance()["decode"]
    assert (found.worst, found.median) == (2.0, 2.0)
    assert found.mean == pytest.approx((2 + 2 + 1.5) / 3)
    assert list(balance.imbalance()) == ["decode"]


def test_stats_and_placement_are_files_that_read_back() -> None:
    balance = balance_of()
    assert balance.expert_load() is None
    balance.add(counts(0, [4, 2, 0], [0, 0, 0]))
    balance.add(counts(0, [0, 0, 0], [1, 1, 0], step=20))
    load = balance.expert_load()
    assert load is not None
    back = parse_stats(json.loads(format_stats(load)))
    assert [(w.phase, w.start_step, w.steps, w.tokens) for w in back.windows] == [
        ("prefill", 0, 10, 3),
        ("decode", 10, 10, 1),
    ]
    assert back.load.tolist() == [[[4, 2, 0]] * 3, [[1, 1, 0]] * 3]
    assert (back.layers, back.ep_size, back.top_k, back.placement) == ((1, 2, 4), 2, 2, TWICE)
    placed = parse_placement(json.loads(balance.placement_text()))
    assert (placed.placement, placed.ep_size, placed.layers, placed.model) == (TWICE, 2, (1, 2, 4), "m")


def test_the_identity_is_written_as_none() -> None:
    balance = balance_of(Placement.identity(3, 3, 4))
    balance.add(counts(0, [2, 0, 0], [0, 0, 0]))
    load = balance.expert_load()
    assert load is not None and load.placement is None


def test_status_says_what_is_true_without_online_balancing() -> None:
    balance = balance_of()
    assert balance.status()["imbalance"] == {}
    balance.add(counts(0, [0, 0, 0], [0, 1, 5]))
    status = balance.status()
    assert status | {"imbalance": {}} == {
        "generation": 5,
        "digest": TWICE.digest,
        "state": "off",
        "routing": "even",
        "num_slots": 4,
        "ep_size": 2,
        "survives_rank_loss": False,
        "imbalance": {},
        "migration": None,
        "rebalances": [],
    }
    assert status["imbalance"] == {
        "decode": {
            "mean": 1.666667,
            "median": 1.666667,
            "worst": 1.666667,
            "predicted": None,
            "measured": None,
            "window_steps": 10,
            "kept": {"mean": 1.666667, "worst": 1.666667, "windows": 1},
        }
    }


def test_tells_at_most_every_thirty_seconds_and_only_with_traffic(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = [1000.0]
    monkeypatch.setattr(expert_balance.time, "time", lambda: now[0])
    balance = balance_of()
    for _ in range(61):
        balance.add(counts(0, [0, 0, 0], [0, 1, 5]))
        now[0] += 1.0
    line = "decode: busiest rank carries 1.67x the mean (max/mean rank load, mean of 3 layers, last 30 s)"
    assert [record.getMessage() for record in caplog.records] == [line, line]
    one_rank = balance_of(Placement.identity(3, 3, 3), num_ranks=1)
    for _ in range(61):
        one_rank.add(counts(0, [0, 0, 0], [0, 1, 5]))
        now[0] += 1.0
    assert len(caplog.records) == 2
