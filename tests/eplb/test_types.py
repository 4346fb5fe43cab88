"""Placements, topologies and routing tables hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from moeserve.eplb.types import Placement, RoutingTable, Topology


def test_topology_refuses_slots_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="num_slots = 7 is not divisible by ep_size = 4: give 8"):
        Topology.of(4, 7)
    topology = Topology.of(8, 16, ranks_per_node=3)
    assert (topology.num_nodes, topology.node_of(7), topology.slots_per_rank) == (3, 2, 2)


def test_placement_is_checked_and_immutable() -> None:
    placement = Placement(np.array([[0, 1, 2, 0]]), 3)
    assert placement.replica_count.tolist() == [[2, 1, 1]]
    assert placement.share.tolist() == [[0.5, 1.0, 1.0, 0.5]]
    assert placement.slots_of(0, 0).tolist() == [0, 3]
    assert placement.slot_lists.tolist() == [[[0, 3], [1, -1], [2, -1]]]
    with pytest.raises(ValueError, match="read-only"):
        placement.slot_to_expert[0, 0] = 1
    for rows, message in (
        ([[0, 1, 1, 0]], "expert 2 has no slot"),
        ([[0, 1, 3, 2]], r"slot_to_expert\[0\]\[2\] = 3 is not an expert, expected 0 to 2"),
        ([[0.0, 1.0, 2.0]], "whole numbers"),
        ([0, 1, 2], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Placement(np.array(rows), 3)
    with pytest.raises(ValueError, match=r"shares of expert 0 add up to 0.9"):
        Placement(np.array([[0, 1, 2, 0]]), 3, share=np.array([[0.5, 1, 1, 0.4]]))
    with pytest.raises(ValueError, match="not a fraction"):
        Placement(np.array([[0, 1, 2, 0]]), 3, share=np.array([[0.5, 1, float("nan"), 0.5]]))


def test_digest_covers_slots_and_shares_but_not_the_generation() -> None:
    a = Placement(np.array([[0, 1, 2, 0]]), 3)
    assert a.with_generation(5).digest == a.digest
    assert a.with_generation(5) != a
    assert Placement(np.array([[0, 1, 0, 2]]), 3).digest != a.digest
    assert Placement(np.array([[0, 1, 2, 0]]), 3, share=np.array([[0.6, 1, 1, 0.4]])).digest != a.digest


def test_identity_is_round_robin() -> None:
    assert Placement.identity(2, 3, 5).slot_to_expert.tolist() == [[0, 1, 2, 0, 1]] * 2
    with pytest.raises(ValueError, match="each needs a slot"):
        Placement.identity(1, 5, 4)


def test_survives_rank_loss() -> None:
    topology = Topology.of(2, 4)
    assert Placement(np.array([[0, 1, 1, 0]]), 2).survives_rank_loss(topology)
    assert not Placement(np.array([[0, 0, 1, 1]]), 2).survives_rank_loss(topology)


@pytest.mark.parametrize("width", [60, 64, 7])
def test_weighted_table_is_within_one_column_and_its_mean_nearer(width: int) -> None:
    rng = np.random.default_rng(0)
    topology = Topology.of(8, 40)
    slots = np.concatenate([np.arange(24), rng.integers(0, 4, 16)])
    raw = rng.random(40)
    placement = Placement(slots[None], 24)
    share = raw / np.bincount(slots, weights=raw)[slots]
    placement = Placement(slots[None], 24, share=share[None])
    tables = [RoutingTable.weighted(placement, placement.share, rank, topology, width) for rank in range(8)]
    used = np.stack([_columns_by_slot(table, 40) for table in tables]) / width
    assert np.abs(used - share).max() < 1 / width
    assert np.abs(used.mean(axis=0) - share).max() < 0.4 / width
    for table in tables:
        assert (slots[table.slots[0]] == np.arange(24)[:, None]).all()


def test_even_table_is_exact_where_the_count_divides_and_rotates_with_the_source() -> None:
    topology = Topology.of(4, 12)
    placement = Placement(np.array([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4]]), 5)
    tables = [RoutingTable.even(placement, rank, topology) for rank in range(4)]
    for table in tables:
        assert _columns_by_slot(table, 12).tolist() == [12] * 5 + [20] * 3 + [30] * 2 + [60] * 2
    assert len({int(table.slots[0, 0, 0]) for table in tables}) > 1
    # neighbouring tokens of an expert go to different replicas
    pairs = tables[0].slots[0, 2]
    assert (pairs[:-1] != pairs[1:]).mean() > 0.6


def test_nearest_table_prefers_the_rank_then_the_node() -> None:
    topology = Topology.of(4, 8, ranks_per_node=2)
    placement = Placement(np.array([[0, 1, 0, 2, 0, 3, 1, 2]]), 4)
    table = RoutingTable.nearest(placement, 0, topology).slots[0]
    assert set(table[0]) == {0}
    assert set(table[1]) == {1}
    assert set(table[2]) == {3}
    assert set(table[3]) == {5}
    far = RoutingTable.nearest(placement, 3, topology).slots[0]
    assert set(far[0]) == {4}
    assert set(far[1]) == {6}


def _columns_by_slot(table: RoutingTable, num_slots: int) -> np.ndarray:
    return np.bincount(table.slots[0].ravel(), minlength=num_slots)
