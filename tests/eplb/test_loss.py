"""A lost rank's slots go, every expert stays, and shares add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.eplb import Placement, Topology
from moeserve.eplb.loss import without_rank

TOPOLOGY = Topology(num_ranks=3, slots_per_rank=2)


def test_the_others_take_over_in_proportion() -> None:
    slots = np.array([[0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    share = np.array([[0.5, 1.0, 0.3, 0.0, 0.2, 0.0], [0.5, 0.25, 0.75, 0.25, 0.25, 0.0]])
    placement = Placement(slots, 2, 7, share)
    left, topology = without_rank(placement, TOPOLOGY, 0)
    assert (left.generation, topology) == (8, Topology(2, slots_per_rank=2))
    assert left.slot_to_expert.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert np.allclose(left.share, [[0.6, 0.5, 0.4, 0.5], [1.0, 0.5, 0.5, 0.0]])  # expert 1 had nothing there
    middle, _ = without_rank(placement, TOPOLOGY, 1)
    assert middle.slot_to_expert.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_an_expert_on_the_lost_rank_alone_is_named() -> None:
    placement = Placement(np.array([[0, 1, 0, 2, 0, 1]]), 3)
    assert without_rank(placement, TOPOLOGY, 2)[0].num_slots == 4
    with pytest.raises(
        ValueError, match="expert 2 of MoE layer 0, counted from 0, has no slot on another rank"
    ):
        without_rank(placement, TOPOLOGY, 1)
    with pytest.raises(ValueError, match="rank = 3"):
        without_rank(placement, TOPOLOGY, 3)
    with pytest.raises(ValueError, match="only one"):
        without_rank(Placement(np.array([[0, 1]]), 2), Topology(1, slots_per_rank=2), 0)


@given(seed=st.integers(0, 1 << 30))
def test_what_survives_one_loss_loses_no_expert(seed: int) -> None:
    random = np.random.default_rng(seed)
    ranks, width, experts = int(random.integers(2, 6)), int(random.integers(1, 9)), int(random.integers(1, 9))
    if ranks * width < experts:
        return
    rows = [np.concatenate((np.arange(experts), random.integers(0, experts, ranks * width - experts)))] * 2
    placement = Placement(np.array([random.permutation(row) for row in rows]), experts)
    topology = Topology(ranks, slots_per_rank=width)
    survived = []
    for rank in range(ranks):
        try:
            left, smaller = without_rank(placement, topology, rank)
        except ValueError:
            continue
        left.check(smaller)
        survived.append(rank)
    assert (len(survived) == ranks) == placement.survives_rank_loss(topology)
